"""The record of an unfinished job: what was asked for, and which files are whole; one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType
from qwen_aot.whole_file import write_whole

_KEYS = {"request", "forms", "dtype", "files"}
_RESTART = "give the same, or start anew with --restart"


@dataclass(slots=True)
class Job:
    """What is known of a job.

    Attributes:
        request: JSON-able facts that decide every byte.
        forms: of the matrices that become codes; None: not decided yet.
        dtype: of the tensors that stay plain; None: not decided yet.
        files: name -> bytes and SHA-256 of those that are whole.
    """

    request: Mapping[str, Any]
    forms: dict[str, CodeForm] | None = None
    dtype: str | None = None
    files: dict[str, tuple[int, str]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes the record; the one before stands until then.

        Raises:
            OSError: it can't be written.
        """
        record = {
            "request": self.request,
            "forms": None if self.forms is None else {name: _to_json(form) for name, form in self.forms.items()},
            "dtype": self.dtype,
            "files": self.files,
        }
        write_whole(path, json.dumps(record).encode(), is_synced=True)


def read_job(path: Path) -> Job:
    """The record as it was written.

    Raises:
        BuildError: it is damaged.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(raw, dict) and raw.keys() == _KEYS and isinstance(raw["request"], dict)
        forms = raw["forms"]
        return Job(
            raw["request"],
            None if forms is None else {name: _from_json(form) for name, form in forms.items()},
            raw["dtype"],
            {name: (size, sha256) for name, (size, sha256) in raw["files"].items()},
        )
    except (OSError, ValueError, AssertionError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BuildError(f"{path}, the record of an unfinished job, is damaged; start anew with --restart") from error


def require_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Checks that a job is the one that was started.

    Raises:
        BuildError: it isn't; names what differs.
    """
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise BuildError(
                f"{path} holds an unfinished job with {key} {_shown(old.get(key))}, and this one has "
                f"{_shown(new.get(key))}; {_RESTART}"
            )


def require_same_forms(path: Path, old: Mapping[str, CodeForm], new: Mapping[str, CodeForm]) -> None:
    """Checks that a job stores its matrices as it was started to.

    Raises:
        BuildError: it doesn't; names the first matrix.
    """
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise BuildError(
                f"{path} holds an unfinished job with {name} as {_form(old.get(name))}, and this one has it as "
                f"{_form(new.get(name))}; {_RESTART}"
            )


def _form(form: CodeForm | None) -> str:
    if form is None:
        return "plain numbers"
    more = (" with zero points" if form.has_zero_points else "") + (
        " and an input's scale" if form.has_input_scale else ""
    )
    return f"{form.kind} in groups of {form.group_size}{more}"


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _to_json(form: CodeForm) -> list[Any]:
    return [
        form.bits,
        form.group_size,
        form.scale_dtype.name,
        form.has_zero_points,
        form.has_input_scale,
        form.code_type.value,
    ]


def _from_json(raw: list[Any]) -> CodeForm:
    bits, group_size, scale_dtype, has_zero_points, has_input_scale, *rest = raw
    (code_type,) = rest or [CodeType.INTEGER.value]  # versions before E4M3 wrote none
    return CodeForm(
        bits,
        group_size,
        np.dtype(scale_dtype),
        has_zero_points=has_zero_points,
        has_input_scale=has_input_scale,
        code_type=CodeType(code_type),
    )
