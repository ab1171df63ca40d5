"""Linears that another tool quantized, of a Hugging Face folder: a file for each format, and a registry of them.

`settings` finds what a folder says and parses it, `collect` tells which tensors belong together, `formats` lists what
is known, `linear` is the interface of what a format reads.
"""
