"""`python -m str_kernels` is `str-kernels`."""

from .cli import main

if __name__ == "__main__":
    main()
