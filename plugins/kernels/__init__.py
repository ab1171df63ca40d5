"""Triton kernels of the plugins, each beside a plain PyTorch reference. Importing one imports triton."""
