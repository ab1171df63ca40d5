"""The builder of the targets tensorrt-rtx and tensorrt."""
