"""A bundle's weights against those that its checkpoint makes again: every byte, or every hash.

The bytes of a cpu or cuda bundle lie in its data file. A TensorRT engine has its weights inside the plan; of it the
hashes are compared that were taken while they were stitched. Quantization is made of single IEEE operations on each
element (`exporter.quantize.blockwise`), so that codes and scales are the same on every CPU; only the rotary tables,
which are computed from sines and cosines, may differ in the last bit, and the scales of an int8 cache, which are the
largest of sums in float32, by a share that their initializer states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.engines.calibrate import calibration_windows, set_cache_scales
from qwen_aot.engines.verify.remade import lower_again, lower_vision_again
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.mapped import MappedFile
from qwen_aot.exporter.lowering.ort.int8_cache import has_scales
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import Part, make_weights
from qwen_aot.runtime.bundle.manifest import EngineEntry, Manifest, TextEngine
from qwen_aot.version import __version__

BYTES, HASHES = "bytes", "hashes"
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class WeightCheck:
    """How the weights stand to those made again.

    Attributes:
        verdict: failed: one is another. Inconclusive: it can't be told.
        compared: BYTES or HASHES; None: nothing was.
        tensors, bytes: that were made again.
        differing: names of initializers that aren't the same, in the graph's order.
        reason: why it didn't pass, for people; empty where it did.
    """

    verdict: Verdict
    compared: str | None
    tensors: int
    bytes: int
    differing: tuple[str, ...]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "verdict": self.verdict.value,
            "compared": self.compared,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "differing": list(self.differing),
        }


SKIPPED = WeightCheck(
    Verdict.INCONCLUSIVE, None, 0, 0, (), "the weights weren't compared with the checkpoint's (--skip-weights)"
)


def check_weights(
    folder: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_layer: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> WeightCheck:
    """Makes every weight of a bundle again and compares it, a few chunks of memory at a time.

    Args:
        folder: the bundle's.
        manifest: the bundle's.
        checkpoint: what it should have been built from.
        on_progress: called with bytes of the checkpoint done and in all.
        on_layer: called with layers done and in all, where the scales of a cache are found again before that.
        threads: see `exporter.weights.stitch.stitch`.

    Raises:
        DeployError: this version can't build such a bundle, or the checkpoint can't be read.
    """
    lowered = lower_again(folder, manifest, checkpoint)
    if has_scales(lowered):
        windows = calibration_windows(checkpoint)
        set_cache_scales(lowered, checkpoint, windows, on_layer or (lambda *_: None), threads)
    check = functools.partial(
        _check_engine, folder, manifest, checkpoint=checkpoint, on_progress=on_progress, threads=threads
    )
    text, vision = check(manifest.engines.text, lowered), manifest.engines.vision
    if vision is None:
        return text
    return _both(text, check(vision, lower_vision_again(folder, manifest, checkpoint)))


def _both(text: WeightCheck, vision: WeightCheck) -> WeightCheck:
    """Of two engines of a bundle: the worse verdict, and everything that differs."""
    return WeightCheck(
        Verdict.of((text.verdict, vision.verdict)),
        text.compared,
        text.tensors + vision.tensors,
        text.bytes + vision.bytes,
        (*text.differing, *vision.differing),
        "; ".join(reason for reason in (text.reason, vision.reason) if reason),
    )


def _check_engine(
    folder: Path,
    manifest: Manifest,
    engine: EngineEntry,
    lowered: Traced,
    *,
    checkpoint: Checkpoint,
    on_progress: Callable[[int, int], None] | None,
    threads: int | None,
) -> WeightCheck:
    recorded = engine.weight_hashes
    if engine.tensorrt is not None:
        if recorded is None:
            reason = "the bundle records no hashes of the weights in its engine: build it again with this version"
            return WeightCheck(Verdict.INCONCLUSIVE, None, 0, 0, (), reason)
        hashes = make_weights(lowered, checkpoint, lambda _: None, on_progress=on_progress, threads=threads)
        return _judge(manifest, lowered, HASHES, _differing_hashes(hashes, recorded))
    with _Bundled(folder, manifest, engine) as bundled:
        hashes = make_weights(lowered, checkpoint, bundled.compare, on_progress=on_progress, threads=threads)
        differing = bundled.differing | bundled.left_over(hashes)
        if isinstance(engine, TextEngine) and engine.kernels is not None:
            differing = bundled.read_otherwise(folder / engine.kernels.file) | differing
    if recorded is not None:  # of the rotary tables the bytes were compared more closely
        computed = _computed(lowered)
        by_hash = {name: why for name, why in _differing_hashes(hashes, recorded).items() if name not in computed}
        differing = by_hash | differing
    return _judge(manifest, lowered, BYTES, differing)


def _differing_hashes(made: Mapping[str, str], recorded: Mapping[str, str]) -> dict[str, str]:
    differing = {
        name: "its hash is another" if name in recorded else "the bundle has none"
        for name, digest in made.items()
        if recorded.get(name) != digest
    }
    return differing | {name: "the checkpoint makes none" for name in recorded if name not in made}


def _computed(lowered: Traced) -> set[str]:
    """Initializers that are made of no checkpoint tensor."""
    return {output.name for recipe in lowered.recipes.values() if not recipe.sources for output in recipe.outputs}


def _judge(manifest: Manifest, lowered: Traced, compared: str, differing: Mapping[str, str]) -> WeightCheck:
    outputs = [output for recipe in lowered.recipes.values() for output in recipe.outputs]
    order = [output.name for output in outputs]
    names = tuple(sorted(differing, key=lambda name: order.index(name) if name in order else len(order)))
    verdict, reason = Verdict.PASSED, ""
    if names:
        shown = "; ".join(f"{name} ({differing[name]})" for name in names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        reason = f"{len(names)} of {len(outputs)} weights aren't what the checkpoint makes: {shown}{more}"
        verdict = Verdict.FAILED
        here, there = __version__, manifest.tool_versions.get("qwen-aot", "an unknown version")
        if here != there:
            verdict = Verdict.INCONCLUSIVE
            reason += f"; qwen-aot {there} built it and this is {here}, which may be why: verify with that one"
        elif compared == HASHES and set(names) <= _computed(lowered):
            verdict = Verdict.INCONCLUSIVE
            reason += "; rotary tables made on another CPU may differ in a last bit, which hashes can't tell"
    return WeightCheck(verdict, compared, len(outputs), sum(output.nbytes for output in outputs), names, reason)


def _external_tensors(path: Path) -> dict[str, ir.ExternalTensor]:
    """The weights of a graph that lie in data files, by name."""
    return {
        name: value.const_value
        for name, value in ir.load(path).graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def _place(tensor: ir.ExternalTensor) -> tuple[str, int | None, int | None, str, tuple[int, ...]]:
    """Where a tensor lies, and as what its bytes are read."""
    return str(tensor.location), tensor.offset, tensor.length, tensor.dtype.name, tuple(tensor.shape.numpy())


class _Bundled:
    """The weights that a bundle's graph points at; `compare` may be called from several threads."""

    def __init__(self, folder: Path, manifest: Manifest, engine: EngineEntry) -> None:
        self.differing: dict[str, str] = {}
        self._tensors = _external_tensors(folder / engine.file)
        named = {str(tensor.location) for tensor in self._tensors.values()}
        self._files = {name: MappedFile(folder / name) for name in named & manifest.files.keys()}

    def __enter__(self) -> _Bundled:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.close()

    def left_over(self, made: Mapping[str, str]) -> dict[str, str]:
        """Weights of the graph that the checkpoint makes none for."""
        return {name: "the checkpoint makes none" for name in self._tensors if name not in made}

    def read_otherwise(self, path: Path) -> dict[str, str]:
        """Weights that the graph for own kernels reads from other places, or as other numbers."""
        others = _external_tensors(path)
        differing = {
            name: f"{path.name} has no such weight outside itself" for name in self._tensors.keys() - others.keys()
        }
        for name, other in others.items():
            ours = self._tensors.get(name)
            if ours is None or _place(ours) != _place(other):
                differing[name] = f"{path.name} reads it from another place"
        return differing

    def compare(self, part: Part) -> None:
        """Notes the initializer if this part of it isn't what lies in the bundle."""
        name = part.output.name
        if name not in self.differing and (why := self._difference(part)):
            self.differing[name] = why

    def _difference(self, part: Part) -> str:
        tensor = self._tensors.get(part.output.name)
        if tensor is None:
            return "the bundle has none"
        found = tensor.dtype, tuple(tensor.shape.numpy()), tensor.length
        if found != (part.output.dtype, part.output.shape, part.output.nbytes):
            return f"it is {found[0].name.lower()} {list(found[1])} in the bundle"
        file, offset = self._files.get(str(tensor.location)), tensor.offset or 0
        if file is None:
            return f"the bundle's manifest lists no file {tensor.location}"
        if offset + part.output.nbytes > file.size:
            return "it ends behind the bundle's data"
        begin, end = part.span
        stretches = file.view(offset, (part.outer, part.output.nbytes // part.outer), np.dtype(np.uint8), None)
        there, made = stretches[:, begin:end], part.stretches
        if np.array_equal(there, made):
            return ""
        if part.is_computed and part.output.tolerance:
            return _distance(there, part)
        return "" if part.is_computed and _is_nearly(there, made, part.output.dtype) else "its bytes are others"


def _distance(there: NDArray[np.uint8], part: Part) -> str:
    """Why floats aren't those of a computed initializer, as closely as it states; empty where they are."""
    made = part.array.astype(np.float64).reshape(-1)
    found = np.ascontiguousarray(there).view(part.output.dtype.numpy()).astype(np.float64).reshape(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.nan_to_num(np.abs(found / made - 1), nan=np.inf)
    worst = int(shares.argmax())
    if shares[worst] <= part.output.tolerance:
        return ""
    return (
        f"[{worst}] is {found[worst]:.6g} where {made[worst]:.6g} was found again, and {part.output.tolerance:.0%} are "
        "allowed"
    )


def _is_nearly(there: NDArray[np.uint8], made: NDArray[np.uint8], dtype: ir.DataType) -> bool:
    """Whether floats are neighbours at most: the same bits, or one apart.

    Sines and cosines in fp64 are within a bit or two on any CPU, so once rounded to fp32 nearly always the same.
    """
    if dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return False
    bits = np.dtype(np.int32 if dtype == ir.DataType.FLOAT else np.int16)
    steps = np.ascontiguousarray(there).view(bits).astype(np.int64) - made.view(bits)
    return bool(np.abs(steps).max(initial=0) <= 1)
