"""A precision is one row: what rows must hold, and that a made-up one is known everywhere."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qwen_aot.engines.build import plan_build
from qwen_aot.engines.export import export_graph
from qwen_aot.engines.planner.devices import DEVICES
from qwen_aot.engines.planner.footprint import footprint
from qwen_aot.engines.planner.plans import plan, refusal_of
from qwen_aot.engines.spec.bounds import Bounds
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.lowerings import LOWERINGS
from qwen_aot.engines.spec.precisions import (
    PRECISIONS,
    Choices,
    Precision,
    PrecisionRow,
    combinations,
    plain_name,
    row_of,
)
from qwen_aot.engines.spec.targets import TARGETS, Target
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.engines.verify.layer_graphs import bound_for
from qwen_aot.engines.verify.scores import bounds_for
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.lowering.tensorrt.plugin_experts import PLUGIN_EXPERT_BITS
from qwen_aot.exporter.model.tensors import num_parameters
from qwen_aot.exporter.model.variants import VARIANTS
from qwen_aot.runtime.cli.main import qwen_aot
from tests.checkpoints import save_tiny
from tests.tools import require_package

NAME = "int8-fine"
REGISTER = f"""
from qwen_aot.engines.spec.bounds import Bounds
from qwen_aot.engines.spec.precisions import PRECISIONS, Choices, PrecisionRow
from qwen_aot.engines.spec.targets import Target

PRECISIONS["{NAME}"] = row = PrecisionRow(
    name="{NAME}",
    summary="integers in the smallest blocks",
    bits=8,
    targets={{Target.CPU: Choices(block_sizes=(16,), sensitive_bits=(8,)), Target.TENSORRT_RTX: Choices()}},
    weight_format="int8",
    lowest_capability="12.0",
    instead="int8",
    bounds=Bounds(kl_divergence=0.0123),
    layer_bound=0.0456,
)
"""


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> PrecisionRow:
    """A precision that nothing else in the project mentions."""
    monkeypatch.setitem(PRECISIONS, NAME, PRECISIONS["int8"])  # so that it is removed at the end
    names: dict[str, Any] = {}
    exec(REGISTER, names)
    row: PrecisionRow = names["row"]
    return row


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("precisions") / "tiny"
    save_tiny(path, with_tokenizer=True)
    return path


def run(*arguments: object) -> Any:
    """The JSON that a verb of the command line prints."""
    result = CliRunner().invoke(qwen_aot, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("row", PRECISIONS.values(), ids=PRECISIONS)
def test_a_row_says_all_that_its_targets_need(row: PrecisionRow) -> None:
    assert row.targets and row.summary
    assert row.instead is None or PRECISIONS[row.instead].bits == row.bits
    assert row.bounds != Bounds()
    for target, choices in row.targets.items():
        has_blocks = row.is_quantized and TARGETS[target].weight_layout == "blocks"
        assert (choices.block_sizes != () and choices.sensitive_bits != ()) or not has_blocks
        assert choices == Choices() or row.is_quantized
        if row.is_quantized and TARGETS[target].weight_layout == "dequantized":
            assert row.weight_format is not None
    assert row.weight_format is None or row.is_quantized
    assert not row.has_plugin_experts or row.weight_format is not None
    if row.is_quantized:
        assert row.has_plugin_experts == (row.weight_format in PLUGIN_EXPERT_BITS)
    if row.has_plugin_experts:
        assert PLUGIN_EXPERT_BITS[row.weight_format] == row.bits
    for target, choices in row.targets.items():
        if row.is_quantized and TARGETS[target].weight_layout == "blocks":
            assert {row.bits, *choices.sensitive_bits} <= {4, 8}  # what ONNX Runtime's blocks hold


def test_what_exists_in_the_order_of_messages() -> None:
    found = [(str(row.target), str(row.precision), row.compute_type) for row in combinations()]
    compiled = [
        ("fp16", "FLOAT16"),
        ("bf16", "BFLOAT16"),
        *((name, "FLOAT16") for name in ("int8", "int4", "fp8")),
    ]
    assert found == [
        *(("cpu", name, "FLOAT") for name in ("fp32", "int8", "int4")),
        ("cuda", "fp16", "FLOAT16"),
        ("cuda", "fp32", "FLOAT"),
        *(("cuda", name, "FLOAT16") for name in ("int8", "int4")),
        *((target, *row) for target in ("tensorrt-rtx", "tensorrt") for row in compiled),
    ]


def test_a_precision_is_its_name_and_one_object() -> None:
    assert list(Precision) == ["fp32", "fp16", "bf16", "int8", "int4", "fp8"]
    assert Precision("int8") is Precision.INT8 is pickle.loads(pickle.dumps(Precision.INT8))
    assert copy.deepcopy(Precision.INT8) is Precision.INT8
    assert f"{Precision.INT8}" == json.loads(json.dumps(Precision.INT8)) == "int8"
    assert Precision.FP8.row is PRECISIONS["fp8"]
    with pytest.raises(ValueError, match="'fp7' isn't a precision; accepted: fp32, fp16"):
        Precision("fp7")
    with pytest.raises(AttributeError, match="no precision FP7; accepted: fp32, fp16"):
        _ = Precision.FP7


def test_rows_are_found_by_a_manifests_name() -> None:
    assert row_of("int4").bits == 4
    assert (plain_name("FLOAT16"), plain_name("BFLOAT16")) == ("fp16", "bf16")
    with pytest.raises(BuildError, match="precision 'int3' doesn't exist; what exists: fp32, fp16, bf16, int8"):
        row_of("int3")


def test_without_its_row_a_precision_is_refused_everywhere(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=f"precision '{NAME}' doesn't exist"):
        BuildSpec(precision=NAME)  # type: ignore[arg-type]
    with pytest.raises(BuildError, match=f"lowering ort has no precision '{NAME}'"):
        export_graph(VARIANTS["qwen1.5-0.5b"], tmp_path / "graph", lowering="ort", precision=NAME)
    for bound in (bounds_for, bound_for):
        with pytest.raises(BuildError, match=f"precision '{NAME}' doesn't exist"):
            bound(NAME)


def test_one_row_makes_a_request(made_up: PrecisionRow) -> None:
    spec = BuildSpec(precision=NAME)  # type: ignore[arg-type]
    assert spec.precision.row == made_up
    assert spec.quantization == {"block_size": 16, "symmetric": True, "sensitive_bits": 8, "fast_prefill": False}
    compiled = BuildSpec(target=Target.TENSORRT_RTX, precision=Precision(NAME))
    assert compiled.compute_capabilities == ("12.0",)
    assert compiled.quantization == {"symmetric": True, "quantize_head": False}
    with pytest.raises(BuildError, match=f"cpu: fp32, int8, int4, {NAME}; cuda"):
        BuildSpec(target=Target.CUDA, precision=Precision(NAME))
    with pytest.raises(BuildError, match=rf"block_size 32 doesn't exist for cpu {NAME} \(allowed: 16\)"):
        BuildSpec(precision=Precision(NAME), block_size=32)
    with pytest.raises(BuildError, match=f"{NAME} needs compute capability 12.0 or later, and 8.9 is asked for"):
        BuildSpec(
            target=Target.TENSORRT_RTX,
            precision=Precision(NAME),
            tensorrt=TensorRtOptions(compute_capabilities=("8.9",)),
        )


def test_how_activations_are_quantized_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    both = PrecisionRow(
        name="both",
        summary="",
        bits=8,
        targets={Target.TENSORRT: Choices()},
        activations="static",
        weight_format="int8",
        bounds=Bounds(),
    )
    monkeypatch.setitem(PRECISIONS, "both", both)
    spec = BuildSpec(target=Target.TENSORRT, precision=Precision("both"))
    assert spec.quantization == {"symmetric": True, "quantize_head": False, "activations": "static"}


def test_one_row_is_planned(made_up: PrecisionRow) -> None:
    config, experts = VARIANTS["qwen1.5-0.5b"], VARIANTS["qwen1.5-moe-a2.7b"]
    spec = BuildSpec(precision=Precision(NAME))
    codes = footprint(config, spec).weight_bytes
    assert 10 / 8 < codes / num_parameters(config) < 1.02 * 10 / 8  # 8 bits and a fp32 scale for each 16 weights
    compiled = BuildSpec(target=Target.TENSORRT_RTX, precision=Precision(NAME))
    assert plan("0.5B", config, compiled, "rtx-5090").fits
    refusal = plan("0.5B", config, compiled, "rtx-4060").refusal
    assert refusal == f"{NAME} needs SM 12.0 or later, and this is SM 8.9; int8 is as small"
    assert refusal_of(experts, compiled, DEVICES["rtx-5090"]) == (
        f"quantized experts don't exist for tensorrt-rtx without a plugin ({NAME} asked for); fp16 does"
    )
    (found,) = run("plan", "qwen1.5-0.5b", "--device", "rtx-5090", "--target", "tensorrt-rtx", "--precision", NAME)[
        "plans"
    ]
    assert (found["precision"], found["fits"]) == (NAME, True)


def test_one_row_is_built_inspected_and_verified(made_up: PrecisionRow, checkpoint: Path, tmp_path: Path) -> None:
    request = ("build", checkpoint, "-o", tmp_path / "bundle", "--precision", NAME, "--max-context", 128)
    assert run(*request, "--dry-run")["bundle_bytes"] > 0
    assert not (tmp_path / "bundle").exists()
    report = run(*request)
    names = ("model.onnx.data", "tokenizer.qtok", "chat.qtpl")
    written = sum((tmp_path / "bundle" / name).stat().st_size for name in names)
    assert report["estimate"]["bundle_bytes"] == pytest.approx(written, rel=0.2)
    inspected = run("inspect", tmp_path / "bundle")
    assert inspected["precision"] == NAME
    assert inspected["quantization"]["block_size"] == 16
    limits = ("--window", 16, "--windows", 1, "--greedy-tokens", 1)
    result = CliRunner().invoke(
        qwen_aot, ["verify", str(tmp_path / "bundle"), "--reference", str(checkpoint), *map(str, limits), "--json"]
    )
    assert result.exit_code == 3, result.output  # random weights: its bound holds, and shows nothing
    verified = json.loads(result.stdout)
    assert [(check["name"], check["bound"]) for check in verified["checks"]] == [("kl_divergence", 0.0123)]
    assert bounds_for(NAME) == made_up.bounds
    assert bound_for(NAME) == 0.0456


@pytest.mark.tools
def test_one_row_is_lowered_for_tensorrt(made_up: PrecisionRow, checkpoint: Path, tmp_path: Path) -> None:
    require_package("tensorrt_rtx", "pip install 'qwen-aot[tensorrt-rtx]'")
    specs = [
        BuildSpec(target=Target.TENSORRT_RTX, precision=Precision(name), max_context=128) for name in (NAME, "int8")
    ]
    with open_checkpoint(checkpoint) as source:
        ours, int8 = (plan_build(source, spec, tmp_path / "bundle") for spec in specs)
    assert ours.estimate == int8.estimate
    assert "INT8" in {value.dtype.name for value in ours.traced.model.graph.initializers.values() if value.dtype}


def test_one_row_is_exported(made_up: PrecisionRow, tmp_path: Path) -> None:
    assert list(LOWERINGS["ort"].precisions) == ["fp32", "int8", "int4", NAME]
    assert NAME in LOWERINGS["standard"].precisions
    written = export_graph(VARIANTS["qwen1.5-0.5b"], tmp_path / "graph", lowering="ort", precision=NAME)
    assert 10 / 8 < written.weight_bytes / num_parameters(VARIANTS["qwen1.5-0.5b"]) < 1.1 * 10 / 8


@pytest.mark.parametrize("verb", ["build", "plan", "export"])
def test_one_row_is_in_the_help(verb: str) -> None:
    """In a process of its own: the help is made when the command line is imported."""
    start = "from qwen_aot.runtime.cli.main import qwen_aot; qwen_aot(prog_name='qwen-aot')"
    texts = [
        subprocess.run(
            [sys.executable, "-c", script, verb, "--help"], check=True, capture_output=True, text=True, timeout=60
        ).stdout
        for script in (REGISTER + start, start)
    ]
    assert [NAME in text for text in texts] == [True, False]
