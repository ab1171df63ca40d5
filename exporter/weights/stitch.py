"""Streams recipes into external data, a few rows at a time, and hashes what it makes.

Nothing larger than a chunk is held in memory, so peak memory doesn't grow with the model. What was stitched can be made
again later without a file (`make_weights`), and is the same then: bytes for bytes, or by the hashes.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError, ExportError
from qwen_aot.exporter.checkpoint.base import Checkpoint, encodings_of
from qwen_aot.exporter.checkpoint.encoding import EncodedRows, arranged, with_columns
from qwen_aot.exporter.checkpoint.names import CANONICAL
from qwen_aot.exporter.checkpoint.nearest_names import nearest_clause
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import Role
from qwen_aot.exporter.weights.recipe import OutOfRangeError, Output, Recipe, Source, Traced
from qwen_aot.machine import usable_cores

CHUNK_BYTES = 16 << 20  # float32 bytes handled at once by a thread: large enough for NumPy, small against any model
_RESIDENT_BYTES = 32 << 20  # written pages that a thread keeps mapped
_SHARED_EXPERT = frozenset({Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN, Role.SHARED_EXPERT_GATE})
ALIGNMENT = 4096  # bytes; ONNX asks for page-aligned offsets so that external data can be memory-mapped


def output_bytes(traced: Traced) -> int:
    """Exact size of the external data file that `stitch` writes, padding included."""
    *_, end = _layout(traced.recipes.values()).values() or [(0, 0)]
    return end[0] + end[1]


def chunk_bytes(traced: Traced) -> int:
    """Float32 bytes of the most rows that `stitch` converts at once in a thread."""
    groups = (r.rows_per_group * r.row_bytes for r in traced.recipes.values())
    return max(CHUNK_BYTES, *groups)


def _layout(recipes: Iterable[Recipe]) -> dict[str, tuple[int, int]]:
    """Output name -> (offset, length) in the data file, in recipe order."""
    layout: dict[str, tuple[int, int]] = {}
    end = 0
    for recipe in recipes:
        for output in recipe.outputs:
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            layout[output.name] = (offset, output.nbytes)
            end = offset + output.nbytes
    return layout


def check_sources(traced: Traced, checkpoint: Checkpoint) -> None:
    """Every source exists with its shape, and every checkpoint tensor is used.

    Raises:
        CheckpointError: names the tensor and the rule.
    """
    used: set[str] = set()
    for recipe in traced.recipes.values():
        for source in recipe.sources:
            info = checkpoint.tensors.get(source.name)
            if info is None:
                asked = {each.name for recipe in traced.recipes.values() for each in recipe.sources}
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {source.name} is missing (shape {list(source.shape)} expected by"
                    f" config.json); the checkpoint has {len(checkpoint.tensors)} tensors"
                    f"{nearest_clause(source.name, checkpoint.tensors.keys() - asked)}"
                )
            if info.shape != source.shape:
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {source.name} has shape {list(info.shape)}, but the configuration"
                    f" asks for {list(source.shape)}"
                )
            used.add(source.name)
    used_here = used | traced.elsewhere
    unused = sorted(
        name for name in checkpoint.tensors if name not in used_here and not _may_be_unused(name, traced.config)
    )
    if unused:
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        raise CheckpointError(
            f"{checkpoint.path}: the model has no place for {len(unused)} tensors: {shown}"
            f"{nearest_clause(unused[0], used)}; does config.json belong to it?"
        )


def _may_be_unused(name: str, config: ModelConfig) -> bool:
    """Whether a model may hold this tensor and not need it.

    Old checkpoints store `rotary_emb.inv_freq`; tied ones may repeat the embedding as `lm_head.weight`; a shared expert
    of size 0 has matrices without elements, and a gate for them.
    """
    place = CANONICAL.find(name)
    has_empty_shared_expert = config.moe is not None and not config.moe.shared_expert_intermediate_size
    return (
        name.endswith("rotary_emb.inv_freq")
        or (config.tie_word_embeddings and name == Role.HEAD.tensor_name())
        or (has_empty_shared_expert and place is not None and place.role in _SHARED_EXPERT)
    )


def _check_encodings(traced: Traced, checkpoint: Checkpoint) -> None:
    """A graph must have been lowered for the encodings of the checkpoint that fills it: else codes would be lost."""
    found = encodings_of(checkpoint)
    if dict(traced.encodings) != found:
        raise ExportError(
            f"the graph wasn't lowered for {checkpoint.path}: it expects {len(traced.encodings)} tensors stored as "
            f"codes, and {len(found)} are; set Traced.encodings before lowering"
        )


def _check_tied_head(traced: Traced, checkpoint: Checkpoint) -> None:
    """A tied checkpoint's `lm_head.weight`, if stored, must equal the embedding."""
    head, embedding = Role.HEAD.tensor_name(), Role.EMBEDDING.tensor_name()
    if not traced.config.tie_word_embeddings or head not in checkpoint.tensors:
        return
    shape = checkpoint.tensors[embedding].shape
    if checkpoint.tensors[head].shape == shape:
        step = max(1, CHUNK_BYTES // (4 * shape[1]))
        rows = (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
        if all(np.array_equal(checkpoint.read(head, r), checkpoint.read(embedding, r)) for r in rows):
            return
    raise CheckpointError(
        f"{checkpoint.path}: config.json ties the embeddings, but {head} differs from {embedding};"
        ' set "tie_word_embeddings": false if the head is its own'
    )


@dataclass(frozen=True, slots=True)
class Part:
    """What one chunk of source rows makes of an initializer.

    Attributes:
        output: the initializer.
        is_computed: it is made of no checkpoint tensor.
        array: the part itself, in the initializer's own layout.
        first_row, end_row: of `rows` source rows; all 0 for a computed initializer, which is one part.
    """

    output: Output
    is_computed: bool
    array: NDArray[Any]
    first_row: int
    end_row: int
    rows: int

    @property
    def outer(self) -> int:
        """Stretches of the initializer that the rows' part is spread over."""
        return math.prod(self.output.shape[: self.output.row_axis])

    @property
    def span(self) -> tuple[int, int]:
        """Where the part begins and ends in each of those stretches, in bytes.

        Raises:
            ExportError: the array is of another size.
        """
        stretch = self.output.nbytes // self.outer
        begin, end = (
            (stretch * row // self.rows for row in (self.first_row, self.end_row)) if self.rows else (0, stretch)
        )
        if self.array.nbytes != self.outer * (end - begin):
            raise ExportError(
                f"recipe of {self.output.name} made {self.array.nbytes} bytes of rows {self.first_row} to"
                f" {self.end_row}, but the shape {list(self.output.shape)} holds {self.outer * (end - begin)}"
            )
        return begin, end

    @property
    def stretches(self) -> NDArray[np.uint8]:
        """The part's bytes [outer, end - begin]."""
        return np.ascontiguousarray(self.array).reshape(self.outer, -1).view(np.uint8)

    @property
    def in_row_order(self) -> NDArray[np.uint8]:
        """The part's bytes with the rows outermost, so that parts which follow each other can be hashed one by one."""
        elements = np.ascontiguousarray(self.array).reshape(self.outer, -1)
        return np.ascontiguousarray(elements.T).reshape(-1).view(np.uint8)


def stitch(
    traced: Traced,
    checkpoint: Checkpoint,
    data_file: Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> dict[str, str]:
    """Streams every recipe's outputs into one external-data file and points the graph's initializers at it.

    Args:
        traced: graph and recipes; its initializers become `ExternalTensor`s in place.
        checkpoint: where the sources are read.
        data_file: created (or overwritten), next to which the graph will be saved.
        on_progress: called with (bytes read so far, bytes to read) of sources.
        threads: chunks worked on at once; None: one for each of `machine.usable_cores`.

    Returns:
        The hash of each initializer, as of `make_weights`.

    Raises:
        CheckpointError: a tensor is missing, unused, of wrong shape, or holds NaN or Inf.
        ExportError: the graph was lowered for another checkpoint.
    """
    check_sources(traced, checkpoint)
    layout = _layout(traced.recipes.values())
    with open(data_file, "wb") as file:
        # Reserved, not just sized: a full disk is an error now, not a bus error on a mapped page later.
        os.posix_fallocate(file.fileno(), 0, output_bytes(traced))
    with _DataFile(data_file, layout) as data:
        hashes = make_weights(traced, checkpoint, data.write, on_progress=on_progress, threads=threads)
    place(traced, data_file)
    return hashes


def make_weights(
    traced: Traced,
    checkpoint: Checkpoint,
    take: Callable[[Part], None],
    *,
    on_progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> dict[str, str]:
    """Carries out every recipe, a few chunks at a time.

    Args:
        traced: graph and recipes.
        checkpoint: where the sources are read.
        take: called with each part of each initializer, by several threads at once.
        on_progress: see `stitch`.
        threads: see `stitch`.

    Returns:
        Initializer -> SHA-256 (hexadecimal) of its bytes, source rows outermost: of one whose rows run along its last
        axis, of its transpose. It doesn't depend on how the rows are cut.

    Raises:
        CheckpointError: a tensor is missing, unused, of wrong shape, or holds NaN or Inf.
        ExportError: the graph was lowered for another checkpoint.
    """
    check_sources(traced, checkpoint)
    _check_encodings(traced, checkpoint)
    _check_tied_head(traced, checkpoint)
    total = sum(_source_bytes(recipe) for recipe in traced.recipes.values())
    digests = {output.name: hashlib.sha256() for recipe in traced.recipes.values() for output in recipe.outputs}
    workers = threads or usable_cores()
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[Future[list[Part]], int]] = deque()

        def collect(limit: int) -> None:
            """Hashes finished chunks in order, which is the rows', until at most `limit` are left."""
            nonlocal done
            while len(pending) > limit:
                future, size = pending[0]
                for part in future.result():
                    digests[part.output.name].update(part.in_row_order.data)
                pending.popleft()
                done += size
                if on_progress is not None:
                    on_progress(done, total)

        try:
            for recipe in traced.recipes.values():
                for start, stop in _chunks(recipe):
                    size = _source_bytes(recipe) * (stop - start) // max(1, recipe.rows)
                    pending.append((pool.submit(_make_chunk, recipe, start, stop, checkpoint, take), size))
                    collect(workers)  # at most one chunk waits for each that is worked on
            collect(0)
        except BaseException:
            for future, _ in pending:
                future.cancel()
            raise
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _source_bytes(recipe: Recipe) -> int:
    return sum(4 * source.rows * math.prod(source.shape[1:]) for source in recipe.sources)


def _chunks(recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Row ranges of about CHUNK_BYTES."""
    group = recipe.rows_per_group
    step = max(1, CHUNK_BYTES // (recipe.row_bytes * group)) * group
    for start in range(0, recipe.rows, step):
        yield start, min(start + step, recipe.rows)


def _read_rows(recipe: Recipe, start: int, stop: int, checkpoint: Checkpoint) -> NDArray[np.float32]:
    """Rows start … stop of the stacked sources, as float32, finite; their indices where there are no sources."""
    if not recipe.sources:
        return np.arange(start, stop).astype(np.float32)  # made as float32, its steps beyond 2**24 would be 0 or 2
    parts = []
    for source, rows in _reached(recipe, start, stop):
        name, span = source.name, _span_to_read(source, rows)
        stored = checkpoint.read(name, span)
        with np.errstate(over="ignore"):
            part = stored.astype(np.float32, copy=False)
        if stored.dtype == np.float64:
            _check_finite(stored, name, span.start, checkpoint)
            _check_fits_float32(stored, part, name, span.start, checkpoint)
        else:
            _check_finite(part, name, span.start, checkpoint)  # the same numbers, and no second conversion to sum them
        part = part if source.row_order is None else part[source.row_order[rows] - span.start]
        parts.append(part if source.column_order is None else part[:, source.column_order])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _read_codes(recipe: Recipe, start: int, stop: int, checkpoint: Checkpoint) -> list[EncodedRows]:
    """Rows start … stop of the stacked sources, as the codes that each source has, with finite scales."""
    parts = []
    for source, rows in _reached(recipe, start, stop):
        span = _span_to_read(source, rows)
        part = checkpoint.read_encoded(source.name, span)
        _check_finite(part.scales.astype(np.float32, copy=False), f"{source.name} (scales)", span.start, checkpoint)
        if source.row_order is not None:
            order = source.row_order[rows] - span.start
            part = arranged(part, lambda array, _, order=order: array[order])  # type: ignore[misc]
        if source.column_order is not None:
            part = with_columns(part, source.column_order, f"{checkpoint.path}: tensor {source.name}")
        parts.append(part)
    return parts


def _span_to_read(source: Source, rows: slice) -> slice:
    """The rows of a tensor that hold those of its recipe: where it has another order, from its first to its last."""
    if source.row_order is None:
        return rows
    order = source.row_order[rows]
    return slice(int(order.min()), int(order.max()) + 1)


def _reached(recipe: Recipe, start: int, stop: int) -> Iterator[tuple[Source, slice]]:
    """The sources that rows start … stop of the stack lie in, and which of their rows these are."""
    first = 0
    for source in recipe.sources:
        low, high = max(start - first, 0), min(stop - first, source.rows)
        if low < high:
            yield source, slice(low, high)
        first += source.rows


def _check_fits_float32(
    stored: NDArray[np.float64], part: NDArray[np.float32], name: str, first_row: int, checkpoint: Checkpoint
) -> None:
    """A float64 tensor has no value beyond float32, in which everything is computed."""
    if not np.isfinite(part).all():
        first = np.argwhere(~np.isfinite(part))[0]
        where = [int(first[0]) + first_row, *map(int, first[1:])]
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} holds {stored[tuple(first)]:.6g} at {where}, which float32 doesn't hold "
            f"(at most {np.finfo(np.float32).max:.6g}); accepted: float64 tensors of values that fit float32"
        )


def _check_finite(part: NDArray[Any], name: str, first_row: int, checkpoint: Checkpoint) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        total = part.sum(dtype=np.float64 if part.dtype == np.float64 else np.float32)
    if np.isfinite(total):  # one pass; only a sum that isn't finite needs the closer look
        return
    bad = np.argwhere(~np.isfinite(part))
    if len(bad):
        where = [int(bad[0][0]) + first_row, *map(int, bad[0][1:])]
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} holds {part[tuple(bad[0])]} at {where}"
            f" ({len(bad)} such values nearby); the checkpoint is damaged"
        )


def _make_chunk(
    recipe: Recipe, start: int, stop: int, checkpoint: Checkpoint, take: Callable[[Part], None]
) -> list[Part]:
    try:
        if recipe.from_codes is not None:
            arrays = recipe.from_codes(_read_codes(recipe, start, stop, checkpoint))
        else:
            arrays = recipe.transform(_read_rows(recipe, start, stop, checkpoint))
    except OutOfRangeError as error:
        where = _place_of_row(recipe, start + error.row)
        raise ExportError(f"{checkpoint.path}: {where}: {error.reason}") from error
    if len(arrays) != len(recipe.outputs):
        raise ExportError(
            f"recipe of {recipe.outputs[0].name} gave {len(arrays)} arrays for {len(recipe.outputs)} outputs"
        )
    parts = [
        Part(output, not recipe.sources, array, start, stop, recipe.rows)
        for output, array in zip(recipe.outputs, arrays, strict=True)
    ]
    for part in parts:
        take(part)
    return parts


def _place_of_row(recipe: Recipe, row: int) -> str:
    """The tensor and its row that a row of the stack is."""
    for source, rows in _reached(recipe, row, row + 1):
        place = rows.start if source.row_order is None else source.row_order[rows.start]
        return f"tensor {source.name}, row {place}"
    return f"{recipe.outputs[0].name}, row {row}"  # computed


class _DataFile:
    """The external-data file under construction; `write` may be called from several threads."""

    def __init__(self, path: Path, layout: Mapping[str, tuple[int, int]]) -> None:
        self._layout = layout
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def __enter__(self) -> _DataFile:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._bytes  # the mapping can't be closed under it
        self._map.close()

    def write(self, part: Part) -> None:
        """Writes a part where it belongs."""
        offset, length = self._layout[part.output.name]
        outer = part.outer
        stretch = length // outer
        begin, end = part.span
        source = part.stretches
        target = self._bytes[offset : offset + length].reshape(outer, stretch)
        # Written pages stay in the page cache, but are dropped from this process's memory part by part.
        step = max(1, _RESIDENT_BYTES // (end - begin + 2 * mmap.PAGESIZE))
        for index in range(0, outer, step):
            some = slice(index, min(index + step, outer))
            target[some, begin:end] = source[some]
            self._drop_pages(offset + some.start * stretch, offset + some.stop * stretch)

    def _drop_pages(self, begin: int, end: int) -> None:
        """Gives the pages of a byte range back to the system (where it can); what was written is kept."""
        if hasattr(mmap, "MADV_DONTNEED"):
            begin -= begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def place(traced: Traced, data_file: Path) -> None:
    """Points the graph's initializers at the external-data file that `stitch` writes (or would write)."""
    layout = _layout(traced.recipes.values())
    initializers = traced.model.graph.initializers
    for recipe in traced.recipes.values():
        for output in recipe.outputs:
            offset, length = layout[output.name]
            initializers[output.name].const_value = ir.ExternalTensor(
                data_file.name,
                offset,
                length,
                output.dtype,
                shape=ir.Shape(output.shape),
                name=output.name,
                base_dir=data_file.parent,
            )
