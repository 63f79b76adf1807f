"""str_kernels.integrations."""
