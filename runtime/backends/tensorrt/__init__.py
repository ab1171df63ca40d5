"""The backend over TensorRT and TensorRT-RTX."""
