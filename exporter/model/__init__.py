"""A model's facts: configuration, tensors, rotary frequencies, engine inputs and outputs, published variants."""
