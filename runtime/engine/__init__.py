"""The engine interface, and what every backend shares: rows, I/O table, KV cache."""
