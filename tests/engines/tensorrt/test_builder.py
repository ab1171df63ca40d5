"""TensorRT-RTX compiles small models of every kind for three GPUs, none of which is here."""

from __future__ import annotations

import _thread
import dataclasses
import itertools
import json
import re
import resource
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file

from qwen_aot.engines.build import build_bundle, plan_build
from qwen_aot.engines.bundle.progress import ProgressEvent
from qwen_aot.engines.planner.footprint import footprint
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.spec.targets import Target
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.engines.tensorrt import compile as compile_module
from qwen_aot.engines.tensorrt.builder import check
from qwen_aot.engines.tensorrt.program_text import Program
from qwen_aot.errors import BuildError, ExportError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.lowering.tensorrt import standard
from qwen_aot.exporter.model.io_spec import io_spec
from qwen_aot.runtime.bundle.manifest import Manifest, cache_capacity
from tests.checkpoints import save_tiny
from tests.pairs import identifier, swept
from tests.shared import once
from tests.tools import require_package

require_package("tensorrt_rtx", "pip install 'qwen-aot[tensorrt-rtx]'")
pytestmark = pytest.mark.trt

CAPABILITIES = ("8.6", "8.9", "12.0")
# What a model is made of; int4's blocks of 128 divide every width.
ATTENTION: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"heads": 6, "kv_heads": 2, "head_dim": 64, "hidden": 384},
    "norms": {"generation": "qwen3", "kv_heads": 2, "head_dim": 128},
}
HEAD: dict[str, dict[str, Any]] = {"untied": {}, "tied": {"tied": True}}
LAYER: dict[str, dict[str, Any]] = {"dense": {}, "moe": {"moe": {}, "head_dim": 64}}


@pytest.fixture(scope="module")
def checkpoints(shared_folder: Path) -> Path:
    """The folder of every kind of model, by names such as mha-untied-dense."""

    def make(folder: Path) -> None:
        for kind in itertools.product(ATTENTION, HEAD, LAYER):
            attention, head, layer = kind
            config = {"hidden": 256, "intermediate": 256, **LAYER[layer], **HEAD[head], **ATTENTION[attention]}
            save_tiny(folder / "-".join(kind), **config)

    once(shared_folder / "tensorrt_rtx", make)
    return shared_folder / "tensorrt_rtx"


@pytest.fixture
def compiled(checkpoints: Path, shared_folder: Path, tmp_path: Path) -> Callable[..., tuple[Path, Manifest]]:
    """Gives a copy of a kind's bundle, of those specs that several tests take: compiled once a session."""

    def build_once(kind: str, precision: Precision = Precision.FP16) -> tuple[Path, Manifest]:
        def make(folder: Path) -> None:
            build(checkpoints / kind, folder / "bundle", spec_of(precision))

        folder = shared_folder / "compiled" / f"{kind}-{precision}"
        once(folder, make)
        out = shutil.copytree(folder / "bundle", tmp_path / "bundle")
        return out, Manifest.from_json((out / "manifest.json").read_text())

    return build_once


MHA, GQA = "mha-untied-dense", "gqa-untied-dense"


def spec_of(precision: Precision = Precision.FP16, max_batch: int = 2, **options: Any) -> BuildSpec:
    options.setdefault("compute_capabilities", CAPABILITIES)
    return BuildSpec(
        target=Target.TENSORRT_RTX,
        precision=precision,
        max_batch=max_batch,
        max_context=192,
        prefill_chunk=64,
        tensorrt=TensorRtOptions(**options),
    )


def build(checkpoint: Path, out: Path, spec: BuildSpec) -> tuple[Manifest, list[ProgressEvent]]:
    events: list[ProgressEvent] = []
    build_bundle(checkpoint, spec, out, on_progress=events.append)
    return Manifest.from_json((out / "manifest.json").read_text()), events


STAGES = ["trace", "lower", "write weights", "compile", "hash", "check"]
COMPUTED = (Precision.FP16, Precision.BF16)
QUANTIZED = (Precision.INT8, Precision.INT4)  # fp8 isn't on all three GPUs
KIND_FACTORS = {
    "attention": list(ATTENTION),
    "head": list(HEAD),
    "layer": list(LAYER),
    "precision": [*COMPUTED, *QUANTIZED],
}


def has_form(case: Mapping[str, Any]) -> bool:
    """Not experts that are quantized: `test_experts_cannot_be_quantized`."""
    return case["layer"] == "dense" or case["precision"] in COMPUTED


BUILT = swept(KIND_FACTORS, has_form)


@pytest.mark.parametrize("case", BUILT, ids=identifier)
def test_every_kind_is_built_and_says_what_it_is(
    checkpoints: Path, compiled: Callable[..., tuple[Path, Manifest]], case: Mapping[str, Any]
) -> None:
    kind, precision = f"{case['attention']}-{case['head']}-{case['layer']}", case["precision"]
    spec = spec_of(precision)
    bundle, manifest = compiled(kind, precision)
    with open_checkpoint(checkpoints / kind) as checkpoint:
        config = checkpoint.config
    facts = manifest.engines.text.tensorrt
    assert facts is not None
    assert facts.compute_capabilities == CAPABILITIES
    # int4 matrices whose width no block divides are int8, which the planner counts as int4.
    assert facts.weight_bytes == pytest.approx(
        footprint(config, spec).weight_bytes, rel=0.01 if precision == "int4" else 0
    )
    assert facts.cache_bytes == footprint(config, spec).cache_bytes
    assert facts.layers["KV_CACHE_UPDATE"] == 2 * config.num_hidden_layers
    assert facts.layers["ATTENTION_INPUT"] == config.num_hidden_layers
    dtype = ir.DataType.BFLOAT16 if precision is Precision.BF16 else ir.DataType.FLOAT16
    contract = io_spec(config, dtype, cache_capacity(192, 64))
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in manifest.engines.text.outputs] == [
        (tensor.name, str(tensor.dtype.numpy()), tensor.dims) for tensor in contract.outputs
    ]
    expected = [(tensor.name, str(tensor.dtype.numpy()), tensor.dims) for tensor in contract.inputs]
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in manifest.engines.text.inputs] == expected
    assert {path.name for path in bundle.iterdir()} == {*manifest.files, "manifest.json"}
    assert "model.onnx" not in manifest.files


@pytest.mark.parametrize("case", BUILT, ids=identifier)
def test_the_plan_of_every_kind(compiled: Callable[..., tuple[Path, Manifest]], case: Mapping[str, Any]) -> None:
    """No product falls back to another type, no dense weight is written anew, and the cache's window is copied."""
    kind, precision = f"{case['attention']}-{case['head']}-{case['layer']}", case["precision"]
    bundle, manifest = compiled(kind, precision)
    assert b"tf32=0" in (bundle / "engine.rtx").read_bytes()  # what the graph has in fp32 is multiplied so
    plan, layers = manifest.engines.text.plan, manifest.model.num_hidden_layers
    assert plan is not None and list(plan) == ["prefill", "decode"]
    floats = "bfloat16" if precision is Precision.BF16 else "float16"
    codes = {Precision.INT8: "int8", Precision.INT4: "int4"}.get(precision, floats)
    for step in plan.values():
        assert len(step.layer_kernels) == layers and min(step.layer_kernels) > 5
        types = {(product.name, product.right) for product in step.matrix_products}
        lefts = {product.left for product in step.matrix_products}
        assert lefts <= {floats, "float32"}  # of routers, and of kernels that end the fp32 stream's norm themselves
        names = {"self_attn.qkv_proj", "self_attn.o_proj"}
        names |= {"mlp.gate_up_proj", "mlp.down_proj"} if case["layer"] == "dense" else set()
        told = {(re.sub(r"^model\.layers\.[*\d]+\.|\.weight$", "", name), right) for name, right in types}
        assert {right for name, right in told if name in names} == {codes}
        assert names <= {name for name, _ in told}
        copied = Counter({copy.name: copy.count for copy in step.copies if copy.name.startswith("present.")})
        assert copied == {"present.*.key": layers, "present.*.value": layers}
        scratch = {tensor.name for tensor in step.weight_scratch}
        if case["layer"] == "dense":
            assert scratch == set()
        else:  # the experts that few tokens chose
            assert scratch == {"model.layers.*.mlp.experts_gate_up", "model.layers.*.mlp.experts_down"}
            assert ("mlp.experts_down", floats) in told
            gates = [each for each in step.matrix_products if "mlp.gate." in each.name]
            # A router alone, between casts from and to the compute type, is multiplied in that.
            multiplied = floats if case["attention"] == "norms" else "float32"
            assert {each.right for each in gates} == {multiplied}
            assert {value for each in gates for value in (each.left, each.output)} <= {multiplied, "float32"}


def test_an_engine_that_stores_weights_twice_is_refused(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens without `flatten_tokens`: codes in one layout for prefill, in another for decode of two rows."""
    wide = tmp_path / "wide"
    save_tiny(wide, hidden=512, intermediate=2048)
    monkeypatch.setattr(standard, "flatten_tokens", lambda traced: 0)
    with pytest.raises(BuildError, match=r"stores 1[0-9],\d{3},\d{3} bytes of constants where the weights have "):
        build(wide, tmp_path / "b", spec_of(Precision.INT8))
    assert not (tmp_path / "b").exists()
    build(wide, tmp_path / "b", spec_of(Precision.INT8, max_batch=1))


def test_equal_matrices_are_stored_once(tmp_path: Path) -> None:
    """A checkpoint that was saved untied although its head is the embedding."""
    save_tiny(tmp_path / "model", hidden=256, vocab=4096)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    manifest, _ = build(tmp_path / "model", tmp_path / "b", spec_of())
    assert manifest.engines.text.plan is not None


@pytest.mark.parametrize(("rows", "speculate"), [(2, None), (4, None), (1, 4)])
def test_experts_whose_weights_are_gathered(tmp_path: Path, rows: int, speculate: int | None) -> None:
    """Of 60 experts, 4 a token, steps of up to 5 tokens gather; TensorRT-RTX can't compile it where all steps do."""
    moe = {"num_experts": 60, "num_experts_per_tok": 4}
    save_tiny(tmp_path / "model", moe=moe, hidden=256, head_dim=64)
    build(tmp_path / "model", tmp_path / "b", dataclasses.replace(spec_of(max_batch=rows), speculate=speculate))


def test_kernels_of_many_small_layers_are_no_weights(tmp_path: Path) -> None:
    """Experts' kernels take more room than a tiny model's weights leave."""
    save_tiny(tmp_path / "model", moe={}, hidden=128, head_dim=64, layers=4)
    manifest, _ = build(tmp_path / "model", tmp_path / "b", spec_of())
    assert manifest.engines.text.plan is not None


@pytest.mark.parametrize("kind", [BuildError, ValueError, KeyError, OSError])
def test_a_plan_that_cannot_be_read_costs_no_build(
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
) -> None:
    def another_grammar(engine: Path) -> list[Program]:
        raise kind(f"{engine.name} holds something else")

    monkeypatch.setattr(compile_module, "read_programs", another_grammar)
    manifest, _ = build(checkpoints / MHA, tmp_path / "b", spec_of())
    assert manifest.engines.text.plan is None
    assert "what TensorRT-RTX 1.7.1.116 compiled can't be told: " in caplog.text
    assert "engine.rtx holds something else" in caplog.text


@pytest.mark.parametrize("kind", [MHA, "gqa-tied-moe"])
def test_a_third_profile_checks_drafts(checkpoints: Path, tmp_path: Path, kind: str) -> None:
    """Compiled, for GPUs of which none is here: tests/gpu runs it."""
    spec = dataclasses.replace(spec_of(), speculate=4)
    manifest, _ = build(checkpoints / kind, tmp_path / "bundle", spec)
    text = manifest.engines.text
    assert text.logits_rows == 4
    assert [(profile.name, profile.min_tokens, profile.max_tokens) for profile in text.profiles] == [
        ("prefill", 1, 64),
        ("decode", 1, 1),
        ("verify", 2, 4),
    ]
    assert {"logits_positions": ("T",), "new_tokens": ("B",)}.items() <= {t.name: t.shape for t in text.inputs}.items()
    vocab_size = manifest.model.vocab_size
    assert [(tensor.name, tensor.shape) for tensor in text.outputs[:2]] == [
        ("logits", ("B", vocab_size)),
        ("last_logits", ("B", "T", vocab_size)),
    ]


@pytest.mark.parametrize("precision", [*QUANTIZED, Precision.FP8])
def test_experts_cannot_be_quantized(checkpoints: Path, tmp_path: Path, precision: Precision) -> None:
    with pytest.raises(ExportError, match=f"{precision} weights of a mixture of experts don't exist .*QwenMoE plugin"):
        build(checkpoints / "mha-untied-moe", tmp_path / "bundle", spec_of(precision, compute_capabilities=("8.9",)))
    assert list(tmp_path.iterdir()) == []


def test_fp8_is_built_for_the_gpus_that_have_it(checkpoints: Path, tmp_path: Path) -> None:
    manifest, _ = build(checkpoints / MHA, tmp_path / "bundle", spec_of(Precision.FP8, compute_capabilities=()))
    assert manifest.engines.text.tensorrt is not None
    assert manifest.engines.text.tensorrt.compute_capabilities == ("8.9", "12.0")


def test_the_head_is_quantized_on_request(checkpoints: Path, tmp_path: Path) -> None:
    specs = {"plain": spec_of(Precision.INT8), "quantized": spec_of(Precision.INT8, quantize_head=True)}
    built = {name: build(checkpoints / MHA, tmp_path / name, spec)[0] for name, spec in specs.items()}
    plain, quantized = built["plain"].engines.text, built["quantized"].engines.text
    assert plain.tensorrt is not None and quantized.tensorrt is not None
    assert plain.tensorrt.weight_bytes - quantized.tensorrt.weight_bytes > 100 * 128  # a byte for each of [131, 128]
    assert quantized.quantization == {"symmetric": True, "quantize_head": True}


def test_the_engine_names_its_gpus_and_its_stages_are_reported(checkpoints: Path, tmp_path: Path) -> None:
    _, events = build(checkpoints / MHA, tmp_path / "bundle", spec_of(compute_capabilities=("8.9",)))
    engine = (tmp_path / "bundle/engine.rtx").read_bytes()
    assert b"accelerators={sm89 }" in engine
    assert b"sm86" not in engine
    assert list(dict.fromkeys(event.stage for event in events)) == STAGES
    percents = [event.done for event in events if event.stage == "compile" and event.unit == "%"]
    assert percents == sorted(percents)
    assert percents[-1] > 0
    report = json.loads((tmp_path / "bundle/report.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == STAGES


def test_workspace_and_level_reach_the_builder(checkpoints: Path, tmp_path: Path) -> None:
    build(checkpoints / MHA, tmp_path / "bundle", spec_of(workspace_bytes=1 << 30, optimization_level=0))
    with pytest.raises(BuildError, match=r"no kernel works within the workspace limit; raise --workspace-mib .* said:"):
        build(checkpoints / MHA, tmp_path / "bundle", spec_of(workspace_bytes=1))
    assert (tmp_path / "bundle/engine.rtx").exists()  # the old bundle stands


def test_a_capability_the_library_does_not_know(checkpoints: Path, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    with (
        open_checkpoint(checkpoints / MHA) as source,
        pytest.raises(BuildError, match=r"can't build for compute capability 8.7, 99.0; it can for 7.5, 8.0, 8.6, 8.9"),
    ):
        spec = spec_of(compute_capabilities=("8.7", "8.9", "99.0"))
        build_bundle(source, spec, tmp_path / "bundle", on_progress=events.append)
    assert events == [] and list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing_and_knows_the_size(
    checkpoints: Path, compiled: Callable[..., tuple[Path, Manifest]], tmp_path: Path
) -> None:
    with open_checkpoint(checkpoints / MHA) as source:
        plan = plan_build(source, spec_of(), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    _, manifest = compiled(MHA)
    assert manifest.engines.text.tensorrt is not None
    assert 0 <= plan.estimate.bundle_bytes - manifest.engines.text.tensorrt.weight_bytes < 200_000


def test_a_verifier_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="its engine runs on its own GPU only; leave out --verify"):
        build_bundle(checkpoints / MHA, spec_of(), tmp_path / "bundle", verifier=lambda folder, advance: {})


def test_a_full_disk_while_the_engine_is_written(
    checkpoints: Path, compiled: Callable[..., tuple[Path, Manifest]], tmp_path: Path
) -> None:
    out, _ = compiled(MHA)
    before = (out / "engine.rtx").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the graph's weights fit, the engine's kernels don't; Python ignores SIGXFSZ, so that write fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limit[1]))
        with pytest.raises(BuildError, match=r"can't write .*: File too large"):
            build(checkpoints / MHA, out, spec_of())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (out / "engine.rtx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.usefixtures("answers_ctrl_c")
def test_ctrl_c_ends_the_build_and_leaves_the_old_bundle(
    checkpoints: Path, compiled: Callable[..., tuple[Path, Manifest]], tmp_path: Path
) -> None:
    out, _ = compiled(MHA)
    before = (out / "manifest.json").read_bytes()
    pressed = threading.Event()

    def press(event: ProgressEvent) -> None:
        if event.stage == "compile" and not pressed.is_set():
            pressed.set()
            threading.Timer(0.2, _thread.interrupt_main).start()  # SIGINT, as the terminal sends it

    with pytest.raises(KeyboardInterrupt):
        build_bundle(checkpoints / MHA, spec_of(), out, on_progress=press)
    assert (out / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(("share", "more"), [(0.85, 0), (1.0, 20_000_000)], ids=["too small", "too large"])
def test_an_engine_of_another_size_than_its_weights(
    compiled: Callable[..., tuple[Path, Manifest]], share: float, more: int
) -> None:
    out, manifest = compiled(GQA)
    check(out, manifest)
    assert manifest.engines.text.tensorrt is not None
    size = manifest.engines.text.tensorrt.weight_bytes
    with (out / "engine.rtx").open("r+b") as file:
        file.truncate(int(size * share) + more)
    check(out, manifest)  # its constants were compared: equal ones are stored once, and the rest is kernels
    text = dataclasses.replace(manifest.engines.text, plan=None)
    manifest = dataclasses.replace(manifest, engines=dataclasses.replace(manifest.engines, text=text))
    with pytest.raises(BuildError, match=r"TensorRT stored them in another precision, or more than once"):
        check(out, manifest)
