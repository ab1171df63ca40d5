"""From a checkpoint to ONNX: configuration, checkpoint readers, trace, lowerings, weights."""
