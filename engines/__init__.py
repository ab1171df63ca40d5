"""From ONNX to a bundle: build specification, engine builders, bundle writer."""
