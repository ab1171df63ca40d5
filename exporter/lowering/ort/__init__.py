"""The graph as ONNX Runtime runs it fastest."""
