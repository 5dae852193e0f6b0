"""Triton kernels of the fused decode step; each has a plain PyTorch twin to be tested against."""
