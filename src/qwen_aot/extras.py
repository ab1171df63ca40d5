"""What a package that isn't installed is part of: one table, and one way to say it (standard library only)."""

from __future__ import annotations

# Import name of a package that only an extra brings -> that extra.
EXTRA_OF = {
    "cuda": "cuda",
    "gguf": "build",
    "ml_dtypes": "build",
    "onnx": "build",
    "onnx_ir": "build",
    "onnxruntime": "cpu",
    "onnxscript": "build",
    "polygraphy": "verify",
    "safetensors": "verify",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "torch": "build",
    "transformers": "verify",
    "triton": "plugins",
}


def missing_package(user: str, error: ModuleNotFoundError) -> str:
    """Says which extra brings a module that `user` needs and that isn't installed.

    Raises:
        ModuleNotFoundError: `error` itself, if no extra brings it: a bug of ours.
    """
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA_OF:
        raise error
    return (
        f"{user} needs the package {package!r}, which isn't installed; install it with "
        f"`pip install 'qwen-aot[{EXTRA_OF[package]}]'`"
    )
