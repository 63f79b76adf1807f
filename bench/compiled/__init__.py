"""What the compilers made of the kernels: registers, spills, machine instructions."""
