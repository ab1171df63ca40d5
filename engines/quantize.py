"""Quantizes a checkpoint into a folder of codes: calibration, rounding layer by layer, and what each step costs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_aot.engines.bundle.progress import OnProgress, ignore_progress
from qwen_aot.engines.bundle.resources import threads_for
from qwen_aot.engines.bundle.stages import StageCost, Stages
from qwen_aot.engines.calibrate import calibration_windows
from qwen_aot.engines.mixed_bits import mixed_forms
from qwen_aot.engines.plain_share import forms_but_plain
from qwen_aot.engines.spec.quantize_spec import QuantizeSpec, bits_of
from qwen_aot.errors import BuildError
from qwen_aot.exporter.calibration.hidden_states import HiddenStates
from qwen_aot.exporter.checkpoint.base import Checkpoint, encodings_of
from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows
from qwen_aot.exporter.checkpoint.hf.saving.folder import WHEN_FULL, QuantizedFolder
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.model.tensors import Role
from qwen_aot.exporter.rounding.model import LayerRounder
from qwen_aot.exporter.rounding.table import head_moment, round_table
from qwen_aot.whole_file import write_whole
from qwen_aot.whole_folder import explained

_STAGES = ("calibrate", "round", "finish")
_MEASURED_TOKENS = 4096  # by which mixed bits, or matrices that stay plain, are chosen
_ERRORS = "errors.json"  # of the job: what each layer lost so far


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What was made and what it took.

    Attributes:
        out: the folder.
        forms: the codes of each matrix that was rounded.
        bits_per_weight: of all rounded matrices, scales and zero points counted.
        errors: of each matrix inside the layers: the mean squared difference of its outputs over their mean square
            (of its weights, where no texts were looked at).
        tokens: that were looked at.
        stages: what each took.
    """

    out: Path
    forms: Mapping[str, CodeForm]
    bits_per_weight: float
    errors: Mapping[str, float]
    tokens: int
    stages: tuple[StageCost, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(cost.seconds for cost in self.stages)

    @property
    def peak_memory_bytes(self) -> int:
        """Resident memory, the highest of all stages."""
        return max(cost.peak_memory_bytes for cost in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "bits_per_weight": self.bits_per_weight,
            "tokens": self.tokens,
            "errors": dict(self.errors),
            "stages": [asdict(cost) for cost in self.stages],
        }


def quantize_checkpoint(
    checkpoint: Checkpoint,
    spec: QuantizeSpec,
    out: Path,
    *,
    texts: Sequence[str] = (),
    restart: bool = False,
    threads: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> QuantizeReport:
    """Writes a folder of codes, or goes on with one that was begun.

    Args:
        checkpoint: opened; of plain numbers, or of codes that fix no precision (GGUF).
        spec: how.
        out: the folder.
        texts: to calibrate with; empty: the project's own.
        restart: a job that was begun is given up.
        threads: that compute at most; None: one for each core that this process may use.
        on_progress: told about each step.

    Raises:
        BuildError: the checkpoint is quantized already, takes images, has no tokenizer where one is needed, or `out`
            can't be written.
        ExportError: the texts are too short.
        CheckpointError: the checkpoint can't be read.
    """
    _require_plain(checkpoint)
    _require_reads(checkpoint, spec, texts)
    stages = Stages(("measure", *_STAGES) if spec.measures else _STAGES, on_progress)
    windows = None
    if spec.how.uses_texts:
        windows = calibration_windows(
            checkpoint,
            texts=texts,
            tokens=spec.tokens,
            length=spec.sequence_length,
            seed=spec.seed,
            why=f"by which algorithm {spec.algorithm} reads texts; put the model's beside it, or use algorithm rtn, "
            "which needs none",
        )
    tables = spec.table_forms(checkpoint.config)
    request = {**spec.request(), "texts": _digest(windows)}
    with (
        _threads(threads_for(threads)),
        QuantizedFolder(out, checkpoint, spec.format, request=request, restart=restart) as folder,
        explained(folder.out, WHEN_FULL),
    ):
        hidden = _streams(folder, checkpoint, windows)
        forms = _forms(folder, checkpoint, spec, windows, stages)
        folder.begin(forms | tables, state_bytes=0 if hidden is None else 2 * hidden.nbytes)
        stages.run("calibrate", lambda _: _begin(folder, checkpoint, hidden, windows))
        rounder = LayerRounder(checkpoint, hidden, forms, spec.how, _stored_as(folder.dtype), spec.sequence_length)
        errors = stages.run("round", lambda advance: _round(folder, rounder, hidden, advance), "layers")
        stages.run("finish", lambda _: folder.finish(_tables(checkpoint, spec, tables, hidden)))
    return QuantizeReport(
        folder.out,
        forms | tables,
        _bits_per_weight(checkpoint, forms | tables),
        errors,
        0 if windows is None else windows.size,
        tuple(stages.meter.costs),
    )


def _require_plain(checkpoint: Checkpoint) -> None:
    fixed = [name for name, encoding in encodings_of(checkpoint).items() if encoding.fixes_precision]
    if fixed:
        raise BuildError(
            f"{checkpoint.path} is quantized already ({fixed[0]} and {len(fixed) - 1} others are codes): rounding them "
            "again would lose more; accepted: the bfloat16, float16 or float32 checkpoint, or build-engine on this one"
        )
    if checkpoint.config.vision is not None:
        raise BuildError(
            f"{checkpoint.name} takes images, and a quantized folder has no place for its vision tower; accepted: "
            "build-engine on this one with --precision int4 or int8 and without --algorithm"
        )


def _require_reads(checkpoint: Checkpoint, spec: QuantizeSpec, texts: Sequence[str]) -> None:
    """Checks that what was said of texts is used, and that the model can read pieces so long."""
    if texts and not spec.how.uses_texts:
        raise BuildError(f"texts were given, and algorithm {spec.algorithm} looks at none; accepted: another algorithm")
    if texts and isinstance(checkpoint, RandomCheckpoint):
        raise BuildError("texts were given, and random weights have no tokenizer; accepted: no texts, for token ids")
    longest = checkpoint.config.max_position_embeddings
    if spec.how.uses_texts and spec.sequence_length > longest:
        raise BuildError(
            f"sequence_length is {spec.sequence_length}, and {checkpoint.path} has {longest} positions; accepted: that "
            "or less"
        )


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch computes with so many meanwhile, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digest(windows: NDArray[np.int64] | None) -> str | None:
    return None if windows is None else hashlib.sha256(windows.tobytes()).hexdigest()


def _streams(folder: QuantizedFolder, checkpoint: Checkpoint, windows: NDArray[np.int64] | None) -> HiddenStates | None:
    if windows is None:
        return None
    shape = (*windows.shape, checkpoint.config.hidden_size)
    return HiddenStates(lambda layer: folder.state_path(f"hidden-{layer}.npy"), shape)


def _forms(
    folder: QuantizedFolder,
    checkpoint: Checkpoint,
    spec: QuantizeSpec,
    windows: NDArray[np.int64] | None,
    stages: Stages,
) -> dict[str, CodeForm]:
    """The codes of every matrix inside the layers; of a job that goes on, those that it began with."""
    if not spec.measures:
        return spec.forms(checkpoint.config)
    if folder.forms is not None:
        tables = spec.table_forms(checkpoint.config)
        return {name: form for name, form in folder.forms.items() if name not in tables}
    assert windows is not None  # by QuantizeSpec
    chosen = windows[:: max(1, windows.size // _MEASURED_TOKENS)]
    shape = (*chosen.shape, checkpoint.config.hidden_size)
    hidden = HiddenStates(lambda layer: folder.state_path(f"float-{layer}.npy"), shape)
    hidden.embed(checkpoint, chosen)
    choose = mixed_forms if spec.bits_per_weight is not None else forms_but_plain
    return stages.run("measure", lambda advance: choose(checkpoint, spec, hidden, advance), "layers")


def _begin(
    folder: QuantizedFolder, checkpoint: Checkpoint, hidden: HiddenStates | None, windows: NDArray[np.int64] | None
) -> None:
    if hidden is None or windows is None or hidden.is_there(folder.layers_done):
        return
    if folder.layers_done:
        raise BuildError(
            f"the unfinished job of {folder.out} lacks what its layer {folder.layers_done} begins with; start anew "
            "with --restart"
        )
    hidden.embed(checkpoint, windows)


def _round(
    folder: QuantizedFolder,
    rounder: LayerRounder,
    hidden: HiddenStates | None,
    advance: Callable[[int, int], None],
) -> dict[str, float]:
    path = folder.state_path(_ERRORS)
    errors = _errors_so_far(folder, path)
    advance(folder.layers_done, folder.num_layers)
    for layer in range(folder.layers_done, folder.num_layers):
        saved = rounder.round(layer)
        errors |= saved.errors
        write_whole(path, json.dumps(errors).encode(), is_synced=True)
        folder.add_layer(layer, saved.encoded, saved.plain)
        if hidden is not None:
            hidden.forget(layer)
        del saved  # the next layer needs the room
        advance(layer + 1, folder.num_layers)
    return errors


def _errors_so_far(folder: QuantizedFolder, path: Path) -> dict[str, float]:
    if not folder.layers_done:
        return {}
    try:
        errors = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(errors, dict) and all(isinstance(error, float) for error in errors.values()):
            return errors
    except (OSError, ValueError, RecursionError):
        pass
    raise BuildError(
        f"{path}, what the unfinished job of {folder.out} lost so far, is damaged or missing; start anew with --restart"
    )


def _stored_as(dtype: str) -> Callable[[Tensor], Tensor]:
    stored = getattr(torch, dtype)
    return lambda weight: weight.to(stored).float()


def _tables(
    checkpoint: Checkpoint, spec: QuantizeSpec, tables: Mapping[str, CodeForm], hidden: HiddenStates | None
) -> dict[str, EncodedRows]:
    """Embedding and head as codes. A head's are chosen by what it reads, a separate embedding's by its numbers."""
    if not tables:
        return {}
    head = Role.HEAD.tensor_name()
    if head not in tables:
        head = Role.EMBEDDING.tensor_name()
    moment = None if hidden is None else head_moment(checkpoint, hidden)
    return {
        name: round_table(checkpoint, name, form, spec.how, moment if name == head else None)
        for name, form in tables.items()
    }


def _bits_per_weight(checkpoint: Checkpoint, forms: Mapping[str, CodeForm]) -> float:
    shapes = {name: checkpoint.tensors[name].shape for name in forms}
    bits = sum(bits_of(form, shapes[name]) for name, form in forms.items())
    return bits / sum(math.prod(shape) for shape in shapes.values())
