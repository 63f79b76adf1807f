"""Execute PTX, the code that Triton compiles for NVIDIA's GPUs, on a CPU.

It is in bench/ because `python -m bench execute` counts with it, and bench may not import tests.
`program` parses the code, `operations` has its arithmetic, `memory` and `races` check the accesses,
`counting` counts, `machine` runs all threads, and `launcher` makes Triton launch on it instead of
on a GPU.
"""
