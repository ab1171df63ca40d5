"""The project's kernels for the CPU: custom ops of ONNX Runtime in one C++ library, and how it is compiled."""
