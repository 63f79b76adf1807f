"""Memory benchmarks: measured in a separate process, counted, or planned."""
