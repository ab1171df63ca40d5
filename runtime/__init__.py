"""The slim runtime that serves a bundle: no torch, onnx or transformers."""
