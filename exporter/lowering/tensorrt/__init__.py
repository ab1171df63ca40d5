"""The graph as TensorRT's parser takes it: in standard ops, or with the project's plugins."""
