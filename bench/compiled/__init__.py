"""The compiled kernels: registers, spills, machine instructions."""
