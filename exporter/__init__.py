"""From a Qwen1.5 checkpoint to ONNX: configuration, checkpoint readers, trace, lowerings, weights."""
