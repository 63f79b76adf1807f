"""Row steps: one pass over the logits of a chunk, in Triton, PyTorch or compiled PyTorch."""
