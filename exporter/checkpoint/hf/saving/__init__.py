"""Quantized checkpoints written: a file for each format, a registry of them, and the folder that holds one.

`formats` lists what can be written, `matrix` is what a format is asked about, `folder` is the writer, which goes on
after a kill; `config_json` makes the model's configuration, `tensor_file` writes a file of tensors.
"""
