"""Seconds of a training step and of the loss alone."""
