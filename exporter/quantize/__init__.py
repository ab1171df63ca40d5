"""Weight quantization in NumPy, independent of any graph."""
