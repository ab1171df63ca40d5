"""Vectors that two readers of a bundle must agree on, and the scripts that remake them."""
