"""Weights rounded with the inputs in view that they multiply: codes lose least where it would cost answers most."""
