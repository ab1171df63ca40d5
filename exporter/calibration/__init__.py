"""Calibration: what a model computes on sample texts, by which its weights are quantized and its loss is measured.

A quantizer that weighs errors by the activations needs texts to run the model on (the calibration texts). The loss is
measured on other texts (the evaluation texts), so that a method that fits its samples too closely shows it.
"""
