"""Which matrices stay plain where inputs are rounded too, from a checkpoint to the folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_aot.engines import plain_share
from qwen_aot.engines.quantize import QuantizeReport, quantize_checkpoint
from qwen_aot.engines.spec.quantize_spec import QuantizeSpec
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import quiet, save_tiny

TEXTS = ("The quick brown fox jumps over the lazy dog. What is the capital of France? " * 40,)
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which one input has a number a thousand times the others', in some tokens alone."""
    path = tmp_path_factory.mktemp("plain") / "model"
    model: Any = save_tiny(path, with_tokenizer=True, layers=2)
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight[3] *= 60
        mlp.up_proj.weight[3] *= 60
    with quiet():
        model.save_pretrained(path)
    return path


def run(source: Path, out: Path, **changed: Any) -> QuantizeReport:
    spec = QuantizeSpec(**({"algorithm": "smoothquant", "tokens": 512, "sequence_length": 32} | changed))
    with open_checkpoint(source) as checkpoint:
        return quantize_checkpoint(checkpoint, spec, out, texts=TEXTS, threads=1)


def weights_of(source: Path, names: set[str]) -> int:
    with open_checkpoint(source) as checkpoint:
        return sum(math.prod(checkpoint.tensors[name].shape) for name in names)


def test_what_loses_most_stays_plain_within_the_share(source: Path, tmp_path: Path) -> None:
    whole, part = run(source, tmp_path / "whole", plain_share=0), run(source, tmp_path / "part", plain_share=0.3)
    plain = set(whole.forms) - set(part.forms)
    assert DOWN in plain
    assert 0 < weights_of(source, plain) <= 0.3 * weights_of(source, set(whole.forms))
    with open_checkpoint(part.out) as written:
        found = {name: info.encoding.form for name, info in written.tensors.items() if info.encoding is not None}
    assert found == dict(part.forms)
    for kept in ("q_proj", "gate_proj"):  # what reads one input stays together
        group = {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}[kept]
        for name in plain:
            if kept in name:
                assert {name.replace(kept, other) for other in group} <= plain


def test_where_little_is_lost_nothing_stays_plain(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_share, "ENOUGH", 1e9)
    assert len(run(source, tmp_path / "out").forms) == 2 * 7


def test_the_largest_share_leaves_half(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_share, "ENOUGH", 0.0)
    forms = run(source, tmp_path / "out", plain_share=0.5).forms
    assert weights_of(source, set(forms)) >= 0.5 * weights_of(
        source, set(run(source, tmp_path / "all", plain_share=0).forms)
    )
