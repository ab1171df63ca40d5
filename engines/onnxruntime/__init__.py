"""Builders of the targets that ONNX Runtime serves: cpu and cuda."""
