"""What a KV cache may be stored as on each target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from qwen_aot.errors import BuildError

KV_PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8")
DEFAULT_KV_PRECISION = "auto"  # the compute type

# How a target's int8 cache gets its scales: not at all, since it has none; for each head and token as it is written, by
# the project's plugin; or for each channel before the build, from sample texts.
Int8Cache = Literal["no", "plugin", "calibrated"]


def check_kv_precision(
    asked: str,
    precision: str,
    compute: str,
    target: str,
    *,
    attention: str,
    int8_caches: Mapping[str, Int8Cache],
) -> None:
    """Refuses what a target can't store keys and values as.

    Args:
        asked: for the cache.
        precision: of the weights.
        compute: the name of the precision whose weights are stored in the compute type: "fp32" for example.
        target: the build's.
        attention: who computes attention there: plugin or native.
        int8_caches: what each target has, by its name.

    Raises:
        BuildError: says what was asked for and what is accepted.
    """
    if asked not in KV_PRECISIONS:
        raise BuildError(f"kv_precision {asked!r} doesn't exist; accepted: {', '.join(KV_PRECISIONS)}")
    int8_cache = int8_caches[target]
    if asked == "int8" and int8_cache == "plugin" and attention != "plugin":
        raise BuildError(
            f"kv_precision int8 needs the plugin's attention, and {target} has attention {attention} here: TensorRT's "
            f"own reads a cache in its compute type; leave it out ({compute}), or use target tensorrt with attention "
            "plugin"
        )
    if asked == "int8" and int8_cache == "no":
        having = ", ".join(name for name, kind in int8_caches.items() if kind != "no")
        raise BuildError(
            f"kv_precision int8 doesn't exist for target {target}; leave it out ({compute}), or use one of: {having}"
        )
    if asked not in ("auto", "int8", compute):
        accepted = ", ".join(("auto", compute, *(() if int8_cache == "no" else ("int8",))))
        raise BuildError(
            f"kv_precision {asked} doesn't go with precision {precision}, which computes in {compute}: attention reads "
            f"a cache of its own type{'' if int8_cache == 'no' else ', or int8'}; accepted: {accepted}"
        )
