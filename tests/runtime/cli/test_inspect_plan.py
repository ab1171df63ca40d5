"""`inspect` of a bundle whose manifest has a plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cli.conftest import Run

PLAN: dict[str, Any] = {
    "prefill": {
        "kernels": 26,
        "layer_kernels": [12, 13],
        "matrix_products": [
            {
                "name": "model.layers.*.mlp.down_proj.weight",
                "left": "int8",
                "right": "int8",
                "output": "float16",
                "count": 2,
            }
        ],
        "copies": [{"name": "present.*.key", "op": "SlicMul", "bytes": 9437184, "count": 2}],
        "weight_scratch": [],
    },
    "decode": {"kernels": 7, "layer_kernels": [], "matrix_products": [], "copies": [], "weight_scratch": []},
}  # fmt: skip


@pytest.fixture
def planned(bundle: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["engines"]["text"]["plan"] = PLAN
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_tables_say_what_was_compiled(run: Run, planned: Path) -> None:
    lines = [line.split() for line in run("inspect", planned).stdout.splitlines()]
    assert ["prefill", "26", "12", "to", "13"] in lines
    assert ["decode", "7", "not", "told"] in lines
    product = ["prefill", "model.layers.*.mlp.down_proj.weight", "int8", "×", "int8", "→", "float16", "2"]
    assert product in lines
    assert ["prefill", "present.*.key", "SlicMul", "9.44", "MB", "(9,437,184)", "2"] in lines
    assert ["copies"] in lines and ["weight-sized", "scratch"] not in lines
    assert "plan" not in [line[0] for line in lines if line]


def test_json_has_it_as_the_manifest_does(run: Run, planned: Path) -> None:
    assert json.loads(run("inspect", planned, "--json").stdout)["plan"] == PLAN


def test_a_bundle_without_one(run: Run, bundle: Path) -> None:
    lines = [line.split() for line in run("inspect", bundle).stdout.splitlines()]
    assert ["plan", "-"] in lines and ["copies"] not in lines
