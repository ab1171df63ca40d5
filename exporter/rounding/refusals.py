"""What can't be rounded, said by the tensor's name."""

from __future__ import annotations

from qwen_aot.errors import BuildError
from qwen_aot.exporter.calibration.moments import Moment


def no_scale(name: str) -> BuildError:
    """The error for weights that are too large, or aren't numbers."""
    return BuildError(
        f"{name} holds NaN, infinities, or weights so large that float16 has no scale for them; accepted: groups of "
        "finite weights whose scale is at most 65504"
    )


def require_numbers(moment: Moment, name: str) -> None:
    """Checks what a projection was seen to read.

    Raises:
        BuildError: it isn't finite.
    """
    if not moment.is_finite:
        raise BuildError(
            f"what {name} reads isn't finite: on the calibration texts the model gives NaN, or numbers too large for "
            "float32; accepted: a checkpoint whose layers give finite numbers, or algorithm rtn, which looks at "
            "weights alone"
        )
