"""PTX, the code that Triton compiles for NVIDIA's GPUs, executed on a CPU.

It lives in bench/ because `python -m bench execute` counts with it: tests may import bench, and
bench nothing of the tests. `program` reads the code, `operations` are its arithmetic, `memory` and
`races` watch the accesses, `counting` counts, `machine` runs all threads, `launcher` puts it in
the place of a GPU under Triton's own launches.
"""
