"""Benchmarks: python -m bench speed."""
