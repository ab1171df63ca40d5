"""Safetensors: one file or shards with an index, memory-mapped, checked before anything is trusted.

Source: the format section of safetensors' README: 8 bytes little-endian header length N, N bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`, then the data,
without holes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import FileSpan, TensorInfo
from qwen_aot.exporter.checkpoint.downloads import why_missing
from qwen_aot.exporter.checkpoint.hf.quantized.tensor_names import refuse_quantized
from qwen_aot.exporter.checkpoint.mapped import MappedFile
from qwen_aot.exporter.checkpoint.text_files import read_text

logger = logging.getLogger(__name__)

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"

_OTHER_FORMAT = "consolidated"  # the same weights by Mistral's names, which its repositories carry beside transformers'
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Of quantized checkpoints alone: codes, packed ones and indices.
_CODE_DTYPES: Mapping[str, np.dtype[Any]] = {
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


class SafetensorsFile:
    """One mapped file. `read` returns views of the mapping, which stay valid until `close`.

    Args:
        path: the file.
        is_quantized: integers are accepted, and names that a quantizing tool gives.

    Raises:
        CheckpointError: the file is not a sound safetensors file, or holds what isn't accepted.
    """

    def __init__(self, path: Path, *, is_quantized: bool = False) -> None:
        self.path = path
        self._file = MappedFile(path)
        try:
            header = _read_header(self._file)
            self.header_sha256 = hashlib.sha256(header).hexdigest()
            self.tensors = _parse_header(
                path, header, data_start=8 + len(header), size=self._file.size, is_quantized=is_quantized
            )
        except CheckpointError:
            self._file.close()
            raise

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """A read-only view of one tensor, or of some rows of it."""
        return self.view(self.tensors[name], rows)

    def view(self, info: TensorInfo, rows: slice | None = None) -> NDArray[Any]:
        """The same of a tensor that lies at a span of this file."""
        assert info.span is not None  # _parse_header sets it
        return self._file.view(info.span.offset, info.shape, info.dtype, rows)

    def drop_pages(self) -> None:
        """Gives pages that were read back to the system; views stay valid."""
        self._file.drop_pages()

    def close(self) -> None:
        """Unmaps the file."""
        self._file.close()


class SafetensorsShards:
    """All tensors of a folder: `model.safetensors`, its only `.safetensors` file, or the index's shards.

    Which files are read is what transformers reads; a `.safetensors` file that isn't among them is named in a warning.

    Args:
        folder: where they lie.
        is_quantized: integers are accepted, and names that a quantizing tool gives.

    Raises:
        CheckpointError: a file is missing or damaged, the index is wrong, or there are two sets of weights.
    """

    def __init__(self, folder: Path, *, is_quantized: bool = False) -> None:
        self._is_quantized = is_quantized
        self._files: dict[Path, SafetensorsFile] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        self._last_read: SafetensorsFile | None = None
        try:
            index = _find_index(folder)
            if index is None:
                self._add(_find_single(folder))
            else:
                self._open_indexed(folder, index)
        except CheckpointError:
            self.close()
            raise
        _warn_of_others(folder, {path.name for path in self._files})
        self.tensors: dict[str, TensorInfo] = {
            name: file.tensors[name] for file in self._files.values() for name in file.tensors
        }

    @property
    def header_sha256(self) -> str:
        """SHA-256 of the header, or of all headers' hashes in order of file name."""
        hashes = [file.header_sha256 for file in self._files.values()]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode("ascii")).hexdigest()

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """A read-only view of one tensor, or of some rows of it (`SafetensorsFile.read`)."""
        return self.view(self.tensors[name], rows)

    def view(self, info: TensorInfo, rows: slice | None = None) -> NDArray[Any]:
        """The same of a tensor that is a part of a stored one: its span lies in one of the files."""
        assert info.span is not None  # _parse_header sets it
        file = self._files[info.span.path]
        if self._last_read is not None and self._last_read is not file:
            self._last_read.drop_pages()
        self._last_read = file
        return file.view(info, rows)

    def close(self) -> None:
        """Unmaps every file."""
        for file in self._files.values():
            file.close()

    def _add(self, path: Path) -> SafetensorsFile:
        file = SafetensorsFile(path, is_quantized=self._is_quantized)
        self._files[path] = file
        for name in file.tensors:
            other = self._file_of.setdefault(name, file)
            if other is not file:
                raise CheckpointError(
                    f"tensor {name!r} is in two shards: {other.path.name} and {path.name}; save again"
                )
        return file

    def _open_indexed(self, folder: Path, index: Path) -> None:
        weight_map = _read_index(index)
        for shard in sorted(set(weight_map.values())):
            if not (folder / shard).is_file():
                present = ", ".join(sorted(each.name for each in folder.glob("*.safetensors"))) or "none"
                raise CheckpointError(
                    f"shard {shard} is missing from {folder}; {index.name} names it. Present: {present}. "
                    f"Download the checkpoint again{why_missing(folder, shard)}"
                )
            file = self._add(folder / shard)
            for name in file.tensors:
                if name not in weight_map:
                    raise CheckpointError(f"tensor {name!r} of {shard} is not listed in {index.name}; save again")
        for name, shard in weight_map.items():
            holder = self._file_of.get(name)
            if holder is None or holder.path.name != shard:
                raise CheckpointError(f"tensor {name!r} is not in {shard}, where {index.name} says it is; save again")


def _find_index(folder: Path) -> Path | None:
    """The index to read, or None: there is one file of weights.

    Raises:
        CheckpointError: there are two sets of weights, or several indexes.
    """
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    index = folder / INDEX_NAME
    if index not in found:
        if (folder / SINGLE_NAME).is_file() or not found:
            return None
        if len(found) > 1:
            names = ", ".join(each.name for each in found)
            raise CheckpointError(f"{folder} has several indexes: {names}; accepted: one, best called {INDEX_NAME}")
        return found[0]
    if not (folder / SINGLE_NAME).is_file():
        return index
    shards = set(_read_index(index).values())
    if shards == {SINGLE_NAME}:
        return index
    present = sorted(shard for shard in shards if shard != SINGLE_NAME and (folder / shard).is_file())
    if present:
        raise CheckpointError(
            f"{folder} holds two sets of weights: {SINGLE_NAME}, and {', '.join(present)} of {INDEX_NAME}; accepted: "
            f"one. transformers would read {SINGLE_NAME}: move the other away, with its index, or the other way round"
        )
    logger.warning("%s: %s names shards that aren't there and is not read: %s is", folder, INDEX_NAME, SINGLE_NAME)
    return None


def _find_single(folder: Path) -> Path:
    """The one file of weights in a folder without an index.

    Raises:
        CheckpointError: there is none, or several.
    """
    path = folder / SINGLE_NAME
    if path.is_file():
        return path
    found = sorted(folder.glob("*.safetensors"))
    found = [each for each in found if not each.name.startswith(_OTHER_FORMAT)] or found
    if len(found) == 1:
        return found[0]
    names = ", ".join(each.name for each in found) or "no .safetensors file"
    raise CheckpointError(
        f"{folder} has {names} and no {INDEX_NAME}; accepted: {SINGLE_NAME}, or shards with {INDEX_NAME}"
        f"{why_missing(folder, SINGLE_NAME if not found else INDEX_NAME)}"
    )


def _warn_of_others(folder: Path, read: set[str]) -> None:
    others = sorted(each.name for each in folder.glob("*.safetensors") if each.name not in read)
    strangers = [name for name in others if not name.startswith(_OTHER_FORMAT)]
    if strangers:
        logger.warning(
            "%s: %s not read, as in transformers: the weights are %s",
            folder,
            ", ".join(strangers) + (" is" if len(strangers) == 1 else " are"),
            ", ".join(sorted(read)[:2]) + (" ..." if len(read) > 2 else ""),
        )
    elif others:
        logger.info("%s: %s not read: the same weights by other names", folder, ", ".join(others))


def _read_index(path: Path) -> dict[str, str]:
    """The index's tensor name -> shard file name, each a plain name inside the folder."""
    try:
        index = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{path} has no "weight_map" object; accepted: tensor name -> shard file name')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or shard in {".", ".."} or set(shard) & set("/\\:\0"):
            raise CheckpointError(
                f"{path} puts tensor {name!r} in {shard!r}; accepted: the plain name of a file beside it"
            )
    return weight_map


def _read_header(file: MappedFile) -> bytes:
    prefix = file.view(0, (min(8, file.size),), np.dtype(np.uint8), None).tobytes()
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, file.size - 8):
        raise CheckpointError(
            f"{file.path} is not a safetensors file, or is truncated: of its {file.size} bytes, the header "
            f"would take {length}; download it again"
        )
    header = file.view(8, (length,), np.dtype(np.uint8), None).tobytes()
    if not header.startswith(b"{"):
        raise CheckpointError(f"{file.path}: the safetensors header doesn't start with '{{'; download it again")
    return header


def _parse_header(
    path: Path, header: bytes, *, data_start: int, size: int, is_quantized: bool
) -> dict[str, TensorInfo]:
    """Every tensor of the header, after checking that the spans tile the data exactly."""
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON ({error})") from error
    if not is_quantized:
        refuse_quantized(path, entries)
    dtypes = {**_DTYPES, **(_CODE_DTYPES if is_quantized else {})}
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = _parse_entry(path, name, entry, dtypes)
        if not 0 <= begin <= end <= size - data_start:
            raise CheckpointError(
                f"{path}: tensor {name!r} lies at {begin}..{end} of {size - data_start} data bytes; "
                "the file is truncated or damaged, download it again"
            )
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes != end - begin:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {list(shape)} and {dtype} takes {nbytes} bytes, "
                f"but its span {begin}..{end} has {end - begin}"
            )
        tensors[name] = TensorInfo(name, shape, dtype, FileSpan(path, data_start + begin, nbytes))
        spans.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            what = "overlaps the tensor before it" if begin < expected else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name!r} at {begin}..{end} {what} (ends at {expected})")
        expected = end
    if expected != size - data_start:
        raise CheckpointError(f"{path} has {size - data_start - expected} bytes that no tensor owns; save it again")
    return tensors


def _parse_entry(
    path: Path, name: str, entry: object, dtypes: Mapping[str, np.dtype[Any]]
) -> tuple[np.dtype[Any], tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: entry {name!r} must hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {dtype!r}; accepted: {', '.join(dtypes)} "
            "(others belong to quantized checkpoints: docs/quantized-checkpoints.md lists those that are read)"
        )
    if not _is_counts(shape):
        raise CheckpointError(f"{path}: tensor {name!r} has shape {shape!r}; accepted: a list of sizes")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: tensor {name!r} has data_offsets {offsets!r}; accepted: [begin, end]")
    return dtypes[dtype], tuple(shape), (offsets[0], offsets[1])


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return result
