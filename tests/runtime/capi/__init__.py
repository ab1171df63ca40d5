"""Tests of the C library: programs of src/ drive it, its inside or its interface, and Python compares what they say."""
