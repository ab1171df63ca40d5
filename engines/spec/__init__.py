"""What can be asked for: targets, precisions, TensorRT's options, and which combinations exist."""
