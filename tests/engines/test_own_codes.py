"""Bundles and exports of checkpoints that fix their precision: built without flags, verified by every byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType

from qwen_aot.engines.build import build_bundle, plan_build
from qwen_aot.engines.export import export_graph
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.verify.layer_graphs import compare_bundle_layers
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import check_weights
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.cli import build as build_verb
from tests.bundle_copies import changed, data_tensors
from tests.checkpoints import reference_logits, tiny_config, tiny_model
from tests.coded_checkpoints import CODINGS, MOE, CodedCheckpoint
from tests.exporter.lowering.ort.test_own_codes import RELATIVE_BOUND, assert_bit_equal, difference
from tests.gguf_files import save_gguf

KINDS: dict[str, dict[str, Any]] = {
    "mixed": {"coding": CODINGS["mixed"]},
    "act-order": {"coding": CODINGS["an order of its own each"], "tied": True},
    "experts": {"coding": CODINGS["4 bits, zero points"], "moe": MOE},
    "norms of heads": {"coding": CODINGS["mixed"], "generation": "qwen3", "head_dim": 32, "kv_heads": 2},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[CodedCheckpoint, Path]]:
    """Each kind's checkpoint and bundle, built once and without flags."""
    root = tmp_path_factory.mktemp("own")

    def build(kind: str) -> tuple[CodedCheckpoint, Path]:
        source, out = CodedCheckpoint(**KINDS[kind]), root / kind
        if not out.exists():
            build_bundle(source, BuildSpec(max_context=128), out)
        return source, out

    return build


Built = Callable[[str], tuple[CodedCheckpoint, Path]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_without_flags_has_the_checkpoints_own_numbers(kind: str, built: Built) -> None:
    source, bundle = built(kind)
    assert_bit_equal(source, bundle / "model.onnx")
    text = load_bundle(bundle).manifest.engines.text
    assert text.precision == "int4" and text.quantization == {"own_codes": True, "fast_prefill": False}
    assert sum(text.weight_encodings.kept.values()) == len(source.coded)
    assert text.weight_encodings.requantized == {}


def test_its_engine_is_the_reference_but_for_rounded_activations(built: Built) -> None:
    source, bundle = built("mixed")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    want = reference_logits(source.model, [ids])[0, -1].numpy()
    with OnnxRuntimeEngine(load_bundle(bundle), OrtOptions(threads=1)) as engine:
        got = engine.prefill(0, np.array(ids))
    assert np.abs(got - want).max() / want.std() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_verify_makes_every_weight_again_and_names_one_that_differs(kind: str, built: Built, tmp_path: Path) -> None:
    source, bundle = built(kind)
    manifest = load_bundle(bundle, skip_hash_above=0).manifest
    found = check_weights(bundle, manifest, source)
    assert (found.verdict, found.compared) == (Verdict.PASSED, "bytes")
    tensors = [name for name in data_tensors(bundle) if name.endswith(("codes", "scales", "zero_points"))]
    zeros = [name for name in tensors if name.endswith("zero_points")]
    for index, tensor in enumerate((tensors[0], zeros[-1])):

        def edit(values: np.ndarray[Any, Any]) -> None:
            values.reshape(-1).view(np.uint8)[-1] ^= 1

        damaged = changed(bundle, tmp_path / str(index), tensor, edit)
        assert check_weights(damaged, manifest, source).differing == (tensor,)


def test_layers_are_compared_with_the_floats_of_the_same_codes(built: Built) -> None:
    source, bundle = built("act-order")
    manifest = load_bundle(bundle).manifest
    report = compare_bundle_layers(bundle, manifest, source, list(range(20)), 0.2)
    assert all(layer.has_passed for layer in report.layers)


@pytest.mark.parametrize("options", [{"precision": "int8"}, {"block_size": 32}, {"symmetric": False}])
def test_a_conflicting_flag_is_refused_before_any_work(options: dict[str, Any], tmp_path: Path) -> None:
    source = CodedCheckpoint(**KINDS["mixed"])
    for run in (build_bundle, plan_build):
        with pytest.raises(BuildError, match=r"the checkpoint.* stores .* tensors of test-int"):
            run(source, BuildSpec(**options), tmp_path / "b")  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


def test_floats_of_the_same_codes_on_request(tmp_path: Path) -> None:
    source = CodedCheckpoint(**KINDS["mixed"])
    report = build_bundle(source, BuildSpec(precision="fp32", max_context=64), tmp_path / "b")  # type: ignore[arg-type]
    assert report.manifest.engines.text.quantization == {}
    assert not any("second time" in warning for warning in report.warnings)
    assert difference(source, tmp_path / "b" / "model.onnx") < RELATIVE_BOUND


def test_a_gguf_files_codes_on_request(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    save_gguf(file, tiny_model(tiny_config(kv_heads=2)), "llama", kind=GGMLQuantizationType.Q4_1)
    asked = [str(file), "-o", str(tmp_path / "b"), "--max-context", "64", "--own-codes"]
    result = CliRunner().invoke(build_verb.command, asked)
    assert result.exit_code == 0, result.output
    manifest = load_bundle(tmp_path / "b").manifest
    text = manifest.engines.text
    assert text.quantization == {"own_codes": True, "fast_prefill": False}
    with open_checkpoint(file) as source:
        encoded = len([info for info in source.tensors.values() if info.encoding is not None])
        assert text.weight_encodings.kept == {"gguf-q4_1": encoded} and text.weight_encodings.requantized == {}
        found = check_weights(tmp_path / "b", manifest, source)
        assert (found.verdict, found.compared) == (Verdict.PASSED, "bytes")
        for lowering in ("ort", "standard"):
            out = tmp_path / lowering
            exported = export_graph(
                source.config, out, checkpoint=source, lowering=lowering, own_codes=True, max_context=64
            )
            ops = {node.op_type for node in onnx.load(exported.graph, load_external_data=False).graph.node}
            assert {"ReduceSum", "MatMulNBits" if lowering == "ort" else "DequantizeLinear"} <= ops
    plain = CliRunner().invoke(build_verb.command, [*asked[:3], *asked[3:5], "--precision", "fp32", "--own-codes"])
    assert plain.exit_code == 2 and "own_codes doesn't go with precision fp32" in plain.stderr


@pytest.mark.parametrize("lowering", ["ort", "standard", "plugin"])
def test_an_export_without_flags_has_the_checkpoints_codes(lowering: str, tmp_path: Path) -> None:
    source = CodedCheckpoint(**KINDS["mixed"])
    exported = export_graph(source.config, tmp_path, checkpoint=source, lowering=lowering, max_context=64)
    kinds = {node.op_type for node in onnx.load(exported.graph, load_external_data=False).graph.node}
    assert ("MatMulNBits" if lowering == "ort" else "DequantizeLinear") in kinds
    with pytest.raises(BuildError, match="precision int8 would round the weights a second time"):
        export_graph(source.config, tmp_path, checkpoint=source, lowering=lowering, precision="int8")
