"""Weights are made again and compared: one bit of one of them is named, for every target."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.verify import remade
from qwen_aot.engines.verify import weights as module
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import WeightCheck, check_weights
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.weights import stitch
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.manifest import Manifest
from tests.bundle_copies import changed, data_tensors
from tests.checkpoints import save_tiny

BUILDS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "int4-asymmetric": {"precision": "int4", "symmetric": False, "block_size": 32, "sensitive_bits": 4},
    "int8-fast-prefill": {"precision": "int8", "fast_prefill": True},
    "int8-speculating": {"precision": "int8", "speculate": 4},
    "cuda-fp16": {"target": "cuda", "precision": "fp16"},
    "cuda-int4": {"target": "cuda", "precision": "int4"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny"
    save_tiny(path, kv_heads=2, heads=4, hidden=64)
    return path


@pytest.fixture(scope="module")
def bundles(checkpoint: Path) -> Callable[[str], Path]:
    """Each kind of bundle, built once."""

    def build(name: str) -> Path:
        out = checkpoint.parent / name
        if not out.exists():
            build_bundle(checkpoint, BuildSpec(max_context=128, **BUILDS[name]), out)
        return out

    return build


def check(bundle: Path, checkpoint: Path, **options: Any) -> WeightCheck:
    with open_checkpoint(checkpoint) as source:
        return check_weights(bundle, load_bundle(bundle, skip_hash_above=0).manifest, source, **options)


@pytest.mark.parametrize("name", BUILDS)
def test_what_was_built_is_made_again(
    name: str, bundles: Callable[[str], Path], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles(name)
    manifest = load_bundle(bundle).manifest
    hashes = manifest.engines.text.weight_hashes
    tensors = data_tensors(bundle)
    assert hashes is not None and hashes.keys() == tensors.keys()
    monkeypatch.setattr(stitch, "CHUNK_BYTES", 3000)  # other cuts than the build's
    found = check(bundle, checkpoint, threads=2)
    assert (found.verdict, found.compared, found.differing, found.reason) == (Verdict.PASSED, "bytes", (), "")
    assert found.tensors == len(tensors)
    assert found.bytes == sum(tensor.length or 0 for tensor in tensors.values())


@pytest.mark.parametrize("change", ["elsewhere", "inside"])
def test_a_graph_for_own_kernels_that_reads_other_weights_is_named(
    change: str, bundles: Callable[[str], Path], checkpoint: Path, tmp_path: Path
) -> None:
    """Whoever's kernels run here: both graphs read each weight from one place."""
    bundle = shutil.copytree(bundles("int4"), tmp_path / "bundle")
    path = bundle / "model.kernels.onnx"
    model = onnx.load(path, load_external_data=False)
    first, second = (t for t in model.graph.initializer if t.name.endswith("self_attn.o_proj.weight_codes"))
    if change == "elsewhere":
        del first.external_data[:]
        first.external_data.extend(second.external_data)
    else:
        first.CopyFrom(onnx.numpy_helper.from_array(np.zeros(list(first.dims), np.uint8), first.name))
    path.write_bytes(model.SerializeToString())
    manifest = load_bundle(bundles("int4")).manifest
    with open_checkpoint(checkpoint) as source:
        found = check_weights(bundle, manifest, source)
    assert (found.verdict, found.differing) == (Verdict.FAILED, (first.name,))
    assert "model.kernels.onnx" in found.reason


def test_experts_of_own_kernels_that_read_another_layers_weights_are_named(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", hidden=64, moe={})
    bundle = build_bundle(tmp_path / "model", BuildSpec(max_context=128, precision="int4"), tmp_path / "bundle").out
    manifest = load_bundle(bundle).manifest
    path = bundle / "model.kernels.onnx"
    model = onnx.load(path, load_external_data=False)
    assert [node.op_type for node in model.graph.node].count("QwenMoE") == 2
    first, second = (t for t in model.graph.initializer if t.name.endswith("experts_down_codes"))
    places = [list(tensor.external_data) for tensor in (first, second)]
    for tensor, place in zip((first, second), reversed(places), strict=True):
        del tensor.external_data[:]
        tensor.external_data.extend(place)
    path.write_bytes(model.SerializeToString())
    with open_checkpoint(tmp_path / "model") as source:
        found = check_weights(bundle, manifest, source)
    assert (found.verdict, found.differing) == (Verdict.FAILED, (first.name, second.name))
    assert "model.kernels.onnx" in found.reason


def test_a_hash_is_of_the_rows_that_follow_each_other(bundles: Callable[[str], Path]) -> None:
    """As docs/bundle.md says it, computed by hand: of a matrix whose rows lie along its last axis, of its transpose."""
    import hashlib

    bundle = bundles("int8-fast-prefill")
    hashes = load_bundle(bundle).manifest.engines.text.weight_hashes or {}
    tensors = data_tensors(bundle)
    plain = tensors["model.layers.0.self_attn.qkv_proj.weight_codes"].numpy()
    assert hashes["model.layers.0.self_attn.qkv_proj.weight_codes"] == hashlib.sha256(plain.tobytes()).hexdigest()
    turned = tensors["model.layers.0.self_attn.qkv_proj.weight_channel_codes"].numpy()
    expected = hashlib.sha256(np.ascontiguousarray(turned.T).tobytes()).hexdigest()
    assert hashes["model.layers.0.self_attn.qkv_proj.weight_channel_codes"] == expected


@pytest.mark.parametrize("name", BUILDS)
def test_one_value_of_one_tensor_is_named(
    name: str, bundles: Callable[[str], Path], checkpoint: Path, tmp_path: Path
) -> None:
    bundle = bundles(name)
    scales = [tensor for tensor in data_tensors(bundle) if tensor.endswith("scales")]
    codes = [tensor for tensor in data_tensors(bundle) if tensor.endswith("codes")]
    tensors = [scales[0], scales[-1], codes[1]] if scales else ["model.layers.1.mlp.down_proj.weight"]
    for index, tensor in enumerate(tensors):

        def edit(values: np.ndarray[Any, Any]) -> None:
            if values.dtype.kind in "iu":
                values.flat[-1] ^= 1  # one code, or one of two in a byte
            else:
                values.flat[-1] *= 2

        damaged = changed(bundle, tmp_path / str(index), tensor, edit)
        found = check(damaged, checkpoint)
        assert found.verdict is Verdict.FAILED
        assert found.differing == (tensor,)
        assert tensor in found.reason and "its bytes are others" in found.reason


def test_random_weights_of_another_seed(bundles: Callable[[str], Path], checkpoint: Path, tmp_path: Path) -> None:
    with open_checkpoint(checkpoint) as source:
        one, other = (RandomCheckpoint(source.config, seed) for seed in (0, 1))
    build_bundle(one, BuildSpec(max_context=128), tmp_path / "b")
    manifest = load_bundle(tmp_path / "b").manifest
    assert check_weights(tmp_path / "b", manifest, one).verdict is Verdict.PASSED
    found = check_weights(tmp_path / "b", manifest, other)
    assert found.verdict is Verdict.FAILED
    assert len(found.differing) == found.tensors - 2  # all but the rotary tables
    assert "and " in found.reason and "more" in found.reason


def test_what_differs_is_told_apart_from_what_isnt_there(
    bundles: Callable[[str], Path], checkpoint: Path, tmp_path: Path
) -> None:
    bundle = changed(bundles("fp32"), tmp_path / "b", "model.norm.weight", lambda values: None)
    model = ir.load(bundle / "model.onnx")
    initializers = model.graph.initializers
    norm = initializers.pop("model.norm.weight")
    norm.name = "model.other.weight"
    initializers.add(norm)
    first = initializers["model.layers.0.input_layernorm.weight"]
    assert isinstance(first.const_value, ir.ExternalTensor)
    old = first.const_value
    first.const_value = ir.ExternalTensor(
        "elsewhere.data", old.offset, old.length, old.dtype, shape=old.shape, name=first.name or "", base_dir=bundle
    )
    second = initializers["model.layers.1.input_layernorm.weight"]
    second.const_value = ir.ExternalTensor(
        old.location, 1 << 40, old.length, old.dtype, shape=old.shape, name=second.name or "", base_dir=bundle
    )
    third = initializers["model.layers.0.self_attn.qkv_proj.bias"]
    third.const_value = ir.ExternalTensor(
        old.location, 0, 8, old.dtype, shape=ir.Shape([2]), name=third.name or "", base_dir=bundle
    )
    (bundle / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    with open_checkpoint(checkpoint) as source:
        reason = check_weights(bundle, load_bundle(bundles("fp32")).manifest, source).reason
    assert "model.norm.weight (the bundle has none)" in reason
    assert "model.other.weight (the checkpoint makes none)" in reason
    assert "model.layers.0.input_layernorm.weight (the bundle's manifest lists no file elsewhere.data)" in reason
    assert "model.layers.1.input_layernorm.weight (it ends behind the bundle's data)" in reason
    assert "model.layers.0.self_attn.qkv_proj.bias (it is float [2] in the bundle)" in reason


def with_hashes(bundle: Path, **changes: Any) -> Manifest:
    manifest = load_bundle(bundle, skip_hash_above=0).manifest
    text = manifest.engines.text
    return dataclasses.replace(
        manifest, engines=dataclasses.replace(manifest.engines, text=dataclasses.replace(text, **changes))
    )


def test_hashes_of_the_manifest_are_compared_too(bundles: Callable[[str], Path], checkpoint: Path) -> None:
    hashes = dict(load_bundle(bundles("int8")).manifest.engines.text.weight_hashes or {})
    del hashes["model.norm.weight"]
    wrong = with_hashes(bundles("int8"), weight_hashes=hashes | {"lm_head.weight_codes": "0" * 64, "x": "1" * 64})
    with open_checkpoint(checkpoint) as source:
        found = check_weights(bundles("int8"), wrong, source)
    assert found.verdict is Verdict.FAILED
    assert set(found.differing) == {"model.norm.weight", "lm_head.weight_codes", "x"}


def test_rotary_tables_may_differ_by_a_bit_and_no_more(
    bundles: Callable[[str], Path], checkpoint: Path, tmp_path: Path
) -> None:
    def up(steps: int) -> Callable[[np.ndarray[Any, Any]], None]:
        def edit(values: np.ndarray[Any, Any]) -> None:
            values.view(np.int32)[3, 1] += steps

        return edit

    assert check(changed(bundles("fp32"), tmp_path / "1", "model.rotary.cos", up(1)), checkpoint).verdict == "passed"
    two = check(changed(bundles("fp32"), tmp_path / "2", "model.rotary.cos", up(2)), checkpoint)
    assert two.differing == ("model.rotary.cos",) and two.verdict is not Verdict.PASSED
    weight = check(changed(bundles("fp32"), tmp_path / "3", "model.embed_tokens.weight", up(1)), checkpoint)
    assert weight.verdict is Verdict.FAILED


def test_another_versions_weights_are_inconclusive(
    bundles: Callable[[str], Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = changed(bundles("int4"), tmp_path / "b", "lm_head.weight_scales", lambda values: np.copyto(values, 1))
    assert check(damaged, checkpoint).verdict is Verdict.FAILED
    monkeypatch.setattr(module, "__version__", "99.0")
    found = check(damaged, checkpoint)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "built it and this is 99.0, which may be why: verify with that one" in found.reason
    assert check(bundles("int4"), checkpoint).verdict is Verdict.PASSED  # it makes the same


class TensorRt:
    """A manifest of a TensorRT engine, for which a graph of the cpu target stands."""

    def __init__(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bundle, spec = bundle, remade.spec_of(bundle, load_bundle(bundle).manifest)
        monkeypatch.setattr(remade, "spec_of", lambda *_: spec)

    def check(self, checkpoint: Path, **changes: Any) -> WeightCheck:
        manifest = with_hashes(self.bundle, **changes)
        object.__setattr__(manifest.engines.text, "tensorrt", object())  # all that is asked is whether there is one
        with open_checkpoint(checkpoint) as source:
            return check_weights(self.bundle, manifest, source)


def test_weights_inside_a_plan_are_compared_by_their_hashes(
    bundles: Callable[[str], Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TensorRt(bundles("int8"), monkeypatch)
    found = engine.check(checkpoint)
    assert (found.verdict, found.compared) == (Verdict.PASSED, "hashes")
    save_tiny(tmp_path / "other", kv_heads=2, heads=4, hidden=64, seed=1)
    assert engine.check(tmp_path / "other").verdict is Verdict.FAILED
    hashes = dict(load_bundle(bundles("int8")).manifest.engines.text.weight_hashes or {})
    doubled = engine.check(checkpoint, weight_hashes=hashes | {"lm_head.weight_scales": "0" * 64})
    assert doubled.verdict is Verdict.FAILED
    assert doubled.reason.endswith("lm_head.weight_scales (its hash is another)")
    table = engine.check(checkpoint, weight_hashes=hashes | {"model.rotary.sin": "0" * 64})
    assert table.verdict is Verdict.INCONCLUSIVE and "rotary tables made on another CPU" in table.reason
    both = {"model.rotary.sin": "0" * 64, "lm_head.weight_scales": "0" * 64}
    assert engine.check(checkpoint, weight_hashes=hashes | both).verdict is Verdict.FAILED
    unknown = engine.check(checkpoint, weight_hashes=None)
    assert (unknown.verdict, unknown.compared) == (Verdict.INCONCLUSIVE, None)
    assert "records no hashes" in unknown.reason


_QUANTIZE = """
import hashlib, numpy as np
from qwen_aot.exporter.quantize.blockwise import BlockFormat, quantize, quantize_channels
from qwen_aot.exporter.quantize.symmetric import fp8_channels, int4_blocks, int8_channels
rows = np.random.default_rng(0).standard_normal((96, 512), dtype=np.float32)
digest = hashlib.sha256()
for layout in (BlockFormat(4, 32), BlockFormat(4, 128), BlockFormat(8, 32), BlockFormat(4, 64, False)):
    made = quantize(rows, layout)
    digest.update(made.codes.tobytes() + made.scales.tobytes())
for made in (quantize_channels(rows), int4_blocks(rows, 128, np.float16), int8_channels(rows, 2.0**-12, np.float16),
             fp8_channels(rows, 2.0**-14, np.float16)):
    digest.update(made[0].tobytes() + made[1].tobytes())
print(digest.hexdigest())
"""


def test_codes_and_scales_dont_depend_on_the_cpus_instructions() -> None:
    """NumPy with everything that it would choose by the CPU switched off makes the same."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    found = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    digests = {
        subprocess.run(
            [sys.executable, "-c", _QUANTIZE],
            env={**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(disabled)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for disabled in ([], found)
    }
    assert len(digests) == 1


def test_the_json_is_plain(bundles: Callable[[str], Path], checkpoint: Path) -> None:
    document = check(bundles("int8"), checkpoint).to_json()
    assert json.loads(json.dumps(document)) == document
    assert set(document) == {"verdict", "compared", "tensors", "bytes", "differing"}
