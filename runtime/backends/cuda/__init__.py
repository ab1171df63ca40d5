"""CUDA's runtime library: devices, memory, streams."""
