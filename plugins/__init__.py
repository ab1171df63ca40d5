"""GQA and MoE plugins for TensorRT (Triton kernels and their C++ library)."""
