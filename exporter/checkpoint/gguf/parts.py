"""The files of a GGUF model, opened and checked: one, or all parts of a split one.

Source: llama.cpp's gguf-split: `split.no` (from 0), `split.count` and `split.tensors.count` stand in each part; all
other metadata stands in the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.downloads import why_missing
from qwen_aot.exporter.checkpoint.gguf.header import GgufHeader, GgufTensor, read_header
from qwen_aot.exporter.checkpoint.mapped import MappedFile
from qwen_aot.exporter.checkpoint.part_names import part_paths

_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_MAX_PARTS = 1000


@dataclass(frozen=True, slots=True)
class GgufFiles:
    """All that a model's files say before their tensors' data.

    Attributes:
        files: mapped, in order.
        metadata: the first part's.
        tensors: name -> which file it lies in, and where.
        sha256: of the header, or of all headers' hashes in order.
    """

    files: tuple[MappedFile, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[MappedFile, GgufTensor]]
    sha256: str

    def close(self) -> None:
        """Unmaps the files."""
        _close(self.files)


def open_files(path: Path) -> GgufFiles:
    """Opens a file; of a split model, any of whose parts may be named, all parts.

    Raises:
        CheckpointError: a file is damaged, a part is missing, or the parts are not of one model.
    """
    files: list[MappedFile] = []
    try:
        files.append(MappedFile(path))
        header = read_header(files[0])
        count = _split_count(path, header)
        if count == 1:
            return _join(files, [header])
        paths = part_paths(path)
        if paths is None or len(paths) != count:
            raise CheckpointError(
                f"{path} says that it is one of {count} parts, which its name doesn't; accepted: "
                f"NAME-00001-of-{count:05}.gguf and so on, side by side (rename them), or one file (llama.cpp's "
                "`llama-gguf-split --merge`)"
            )
        missing = [each.name for each in paths if not each.is_file()]
        if missing:
            raise CheckpointError(
                f"{path.parent} lacks {len(missing)} of {count} parts: {', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}; download them beside the others"
                f"{why_missing(path.parent, missing[0])}"
            )
        headers = []
        files.pop().close()
        for number, part in enumerate(paths):
            files.append(MappedFile(part))
            headers.append(read_header(files[-1]))
            _check_part(part, headers[-1], number, headers[0])
        return _join(files, headers)
    except CheckpointError:
        _close(files)
        raise


def _close(files: Iterable[MappedFile]) -> None:
    for file in files:
        file.close()


def _split_count(path: Path, header: GgufHeader) -> int:
    count = header.metadata.get(_COUNT, 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= _MAX_PARTS:
        raise CheckpointError(f"{path}: {_COUNT} is {count!r}; accepted: 1 to {_MAX_PARTS}")
    return max(count, 1)


def _check_part(path: Path, header: GgufHeader, number: int, first: GgufHeader) -> None:
    """A part is the one that its name says, of the same split as the first."""
    for key, expected in (
        (_NUMBER, number),
        (_COUNT, first.metadata.get(_COUNT)),
        (_TENSORS, first.metadata.get(_TENSORS)),
    ):
        found = header.metadata.get(key)
        if found != expected:
            raise CheckpointError(
                f"{path}: {key} is {found!r}, but the name and the first part say {expected!r}: the parts are of "
                "different models, or were renamed; download them again"
            )


def _join(files: list[MappedFile], headers: list[GgufHeader]) -> GgufFiles:
    tensors: dict[str, tuple[MappedFile, GgufTensor]] = {}
    for file, header in zip(files, headers, strict=True):
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in two parts: {tensors[name][0].path.name} and {file.path.name}; "
                    "download them again"
                )
            tensors[name] = (file, tensor)
    promised = headers[0].metadata.get(_TENSORS)
    if len(files) > 1 and promised is not None and promised != len(tensors):
        raise CheckpointError(
            f"{files[0].path}: {_TENSORS} is {promised!r}, but the {len(files)} parts have {len(tensors)} tensors; "
            "download them again"
        )
    hashes = [
        hashlib.sha256(file.view(0, (header.size,), np.dtype(np.uint8), None).tobytes()).hexdigest()
        for file, header in zip(files, headers, strict=True)
    ]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode("ascii")).hexdigest()
    return GgufFiles(tuple(files), headers[0].metadata, tensors, sha256)
