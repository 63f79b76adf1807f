"""Bytes: measured in a process of their own, counted, or planned."""
