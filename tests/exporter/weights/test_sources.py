"""A configuration that the headers contradict is refused before anything is traced, quickly and in little memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.engines import build as build_module
from qwen_aot.engines import export as export_module
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.config import parse
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.model.limits import MAX_TENSORS
from qwen_aot.exporter.model.tensors import num_parameters
from qwen_aot.exporter.weights.sources import check_headers
from tests.checkpoints import save_tiny
from tests.exporter.checkpoint.hf.facts import BASES, DENSE

LIES: dict[str, tuple[dict[str, Any], str]] = {
    "wider": (
        {"hidden_size": 524288, "head_dim": 16},
        r"embed_tokens.weight has shape \[131, 64\], .* \[131, 524288\]",
    ),
    "more words": ({"vocab_size": 2**24}, r"embed_tokens.weight has shape \[131, 64\], .* \[16777216, 64\]"),
    "deeper": ({"num_hidden_layers": 999, "layer_types": None}, r"tensor model\.layers\.2\.\S+ is missing"),
    "shallower": ({"num_hidden_layers": 1, "layer_types": None}, r"has no place for 12 tensors"),
    "larger MLP": ({"intermediate_size": 2**20, "num_hidden_layers": 2}, r"mlp\.gate_proj.weight has shape"),
    "more heads": ({"num_attention_heads": 8, "head_dim": 16}, r"q_proj.weight has shape"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources") / "model"
    save_tiny(path)
    return path


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES)
def test_lies_are_refused_before_the_trace(
    change: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(build_module, "trace", never)
    monkeypatch.setattr(export_module, "trace", never)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    raw = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    spec = BuildSpec(precision=Precision.FP32)
    with open_checkpoint(folder) as source:
        for work in (
            lambda: check_headers(source),
            lambda: build_module.plan_build(source, spec, tmp_path / "bundle"),
            lambda: build_module.build_bundle(source, spec, tmp_path / "bundle"),
            lambda: export_module.export_graph(source.config, tmp_path / "graph", checkpoint=source),
        ):
            with pytest.raises(CheckpointError, match=message):
                work()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_truth_passes(checkpoint: Path) -> None:
    with open_checkpoint(checkpoint) as source:
        check_headers(source)


SIZES = st.one_of(
    st.integers(-2, 300),
    st.integers(8, 40).map(lambda power: 2**power),
    st.sampled_from([2**20, 2**24, 2**28, 2**31 - 1, 2**31 - 2, 2**63, 10**30, 10**400]),
)
COUNTS = [*sorted(key for key, value in BASES["moe"].items() if type(value) is int), "head_dim", "sliding_window"]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(changes=st.dictionaries(st.sampled_from(COUNTS), SIZES, min_size=1, max_size=4))
def test_any_sizes_are_facts_or_an_error(changes: dict[str, int]) -> None:
    """What is accepted can also be listed: a limit of tensors is what keeps that short."""
    try:
        config = parse(BASES["moe"] | changes)
    except CheckpointError:
        return
    assert num_parameters(config) < 2**64
    if len(changes) == 1:  # the slow part, for some
        assert len(RandomCheckpoint(config).tensors) <= MAX_TENSORS


HOSTILE: dict[str, dict[str, Any]] = {
    "width": {"hidden_size": 2147483646},
    "experts": {"num_experts": 10000, "num_hidden_layers": 1000, "model_type": "qwen2_moe"},
    "layers": {"num_hidden_layers": 10**9},
    "context": {"max_position_embeddings": 2**40},
    "largest in range": {"num_hidden_layers": 1000, "vocab_size": 2**24},
}


def test_hostile_files_end_in_an_error_in_little_memory(tmp_path: Path, checkpoint: Path) -> None:
    """In another process, with an address space that a gigabyte would not fit."""
    for name, change in HOSTILE.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(DENSE | {"vocab_size": 131} | change))
    code = (
        "import resource, sys\n"
        "from qwen_aot.exporter.checkpoint.open import open_checkpoint\n"
        "from qwen_aot.exporter.weights.sources import check_headers\n"
        "from qwen_aot.errors import CheckpointError\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n"
        "        with open_checkpoint(folder) as source:\n"
        "            check_headers(source)\n"
        "    except CheckpointError:\n"
        "        continue\n"
        "    raise SystemExit(folder)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / name) for name in HOSTILE)],
        check=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )
