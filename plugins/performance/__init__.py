"""The performance model of the kernels: what they move and compute, what bounds that, and what a launch fills.

`python -m qwen_aot.plugins.performance` prints the tables of docs/plugins-performance.md.
"""
