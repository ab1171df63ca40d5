"""Weights rounded with the inputs in view that they multiply: what codes lose is weighed by what it costs the answers."""
