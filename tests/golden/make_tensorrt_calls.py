"""Remakes tensorrt_calls.json: `python -m tests.golden.make_tensorrt_calls TENSORRT PARSER`, two clones with history.

TENSORRT is a clone of NVIDIA/TensorRT, PARSER one of onnx/onnx-tensorrt, both Apache-2.0. Taken from them are facts:

    releases   oldest first, with the commit that each was read at
    calls      name of the Python bindings, "Builder.create_network" -> the first release whose source binds it
    operators  of ONNX that the parser of PARSER_RELEASE takes, as its docs/operators.md says; later ones take more

A name is what stands in a `py::class_`, a `py::enum_` or a member of one (`.def`, `.value` and their kin).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("tensorrt_calls.json")
RELEASES = [f"10.{minor}" for minor in range(17)] + ["11.0", "11.1"]
PARSER_RELEASE = "10.1"  # the last before 10.3 that its repository tells of

_NAME = re.compile(
    r'py::(?:class_|enum_)<[^;]*?>\s*\(\s*\w+\s*,\s*"(?P<owner>\w+)"'
    r"|\.(?:def|def_static|def_property|def_property_readonly|def_property_static|def_property_readonly_static"
    r'|def_readwrite|def_readonly|def_readonly_static|value)\(\s*"(?P<member>\w+)"',
    re.DOTALL,
)
_OPERATOR = re.compile(r"^\| (\w+) *\| Y ", re.MULTILINE)


def git(clone: str, *arguments: str) -> str:
    """What a git command prints."""
    done = subprocess.run(["git", "-C", clone, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def names(source: str) -> set[str]:
    """What one file of the bindings' source binds."""
    found, owner = set(), None
    for match in _NAME.finditer(source):
        if match["owner"]:
            owner = match["owner"]
            found.add(owner)
        elif owner is not None:
            found.add(f"{owner}.{match['member']}")
    return found


def bound(clone: str, branch: str) -> set[str]:
    """All names of a release."""
    files = git(clone, "ls-tree", "-r", "--name-only", branch, "python/src/infer", "python/src/parsers").split()
    return set().union(*(names(git(clone, "show", f"{branch}:{path}")) for path in files if path.endswith(".cpp")))


def make(tensorrt: str, parser: str) -> dict[str, Any]:
    """The file's content."""
    calls: dict[str, str] = {}
    for release in RELEASES:
        for name in bound(tensorrt, f"release/{release}"):
            calls.setdefault(name, release)
    table = git(parser, "show", f"{PARSER_RELEASE}-GA:docs/operators.md")
    return {
        "releases": {release: git(tensorrt, "rev-parse", f"release/{release}").strip() for release in RELEASES},
        "calls": dict(sorted(calls.items())),
        "operators": sorted(_OPERATOR.findall(table)),
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(make(*sys.argv[1:]), indent=0) + "\n")
