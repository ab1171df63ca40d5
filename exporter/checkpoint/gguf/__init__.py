"""GGUF files: header and tensors, configuration, tokenizer."""
