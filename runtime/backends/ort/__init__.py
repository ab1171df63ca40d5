"""The backend over ONNX Runtime's CPU and CUDA providers."""
