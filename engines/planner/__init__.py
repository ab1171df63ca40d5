"""What fits where, before anything is built."""
