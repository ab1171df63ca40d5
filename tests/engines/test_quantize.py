"""A checkpoint in, a folder of codes out: what it stands for, what it loses, and how a killed job goes on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from qwen_aot.engines import quantize
from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.quantize import QuantizeReport, quantize_checkpoint
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.quantize_spec import QuantizeSpec
from qwen_aot.engines.verify.reference_model import load_model
from qwen_aot.errors import BuildError, DeployError, ExportError
from qwen_aot.exporter.checkpoint.encoding import dequantize
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.rounding.algorithms import ALGORITHMS
from qwen_aot.exporter.rounding.model import LayerRounder
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
from tests.checkpoints import quiet, reference_logits, save_tiny, save_tokenizer
from tests.exporter.checkpoint.test_formats import load
from tests.vl_checkpoints import SeeingModel

MOE: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "gqa, tied, bf16": {"kv_heads": 2, "tied": True, "dtype": "bfloat16"},
    "moe": {"moe": MOE, "dtype": "bfloat16"},
}
UNSEEN = 3  # the expert of `moe` that no token chooses in layer 0
TEXT = "The quick brown fox jumps over the lazy dog: 你好，世界 costs $12.50, naïve café & 3/4? def main(x): return x\n"
TEXTS = ["".join(TEXT[(7 * n) % 60 :] for n in range(40))]


def other_ids() -> list[list[int]]:
    """The texts' tokens, each behind others than there: a random model knows nothing of tokens that it wasn't shown."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), 320)
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    seen = np.unique(tokenizer.encode(TEXTS[0]).ids)
    found: list[list[int]] = np.random.default_rng(0).choice(seen, (4, 24)).tolist()
    return found


IDS = other_ids()


def spec_of(**changed: Any) -> QuantizeSpec:
    return QuantizeSpec(**({"group_size": 16, "tokens": 1024, "sequence_length": 32} | changed))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folders and models in fp32 whose inputs differ in size from column to column, as a trained model's do."""
    found = {}
    for name, config in MODELS.items():
        folder = tmp_path_factory.mktemp("source") / "model"
        model: Any = save_tiny(folder, with_tokenizer=True, **config)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("layernorm.weight"):
                    parameter *= torch.exp(0.8 * torch.randn(parameter.shape, generator=generator))
            if name == "moe":
                unwanted(model)
            with quiet():
                model.save_pretrained(folder)
        found[name] = folder, copy.deepcopy(model).float()
    return found


def unwanted(model: Any) -> None:
    """Layer 0's router never takes an expert: one number is the same in all tokens, and speaks against it."""
    layer = model.model.layers[0]
    model.model.embed_tokens.weight[:, 0] = 1.0
    layer.self_attn.o_proj.weight[0] = 0
    layer.post_attention_layernorm.weight[0] = 1.0
    layer.mlp.gate.weight[UNSEEN] = 0
    layer.mlp.gate.weight[:, 0] = 0
    layer.mlp.gate.weight[UNSEEN, 0] = -50.0


def run(source: Path, out: Path, spec: QuantizeSpec, **options: Any) -> QuantizeReport:
    options.setdefault("texts", TEXTS if spec.how.uses_texts else ())
    with open_checkpoint(source) as checkpoint:
        return quantize_checkpoint(checkpoint, spec, out, threads=1, **options)


def values_of(folder: Path) -> dict[str, NDArray[np.float32]]:
    """What a folder stands for, by the project's reader, which has tests of its own."""
    with open_checkpoint(folder) as checkpoint:
        return {
            name: dequantize(checkpoint.read_encoded(name))
            if info.encoding is not None
            else checkpoint.read(name).astype(np.float32)
            for name, info in checkpoint.tensors.items()
        }


def model_of(folder: Path, like: Any) -> Any:
    model = copy.deepcopy(like)
    load(model, values_of(folder))
    return model


def distance(found: Tensor, want: Tensor) -> float:
    """The mean square of the difference over that of what is right."""
    return float((found - want).square().mean() / (want - want.mean()).square().mean())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "awq"])
def test_a_folder_stands_for_nearly_the_model(
    name: str, format_name: str, sources: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    source, model = sources[name]
    report = run(source, tmp_path / "out", spec_of(format=format_name))
    assert report.out == tmp_path / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with open_checkpoint(report.out) as checkpoint:
        assert {key: info.encoding.form for key, info in checkpoint.tensors.items() if info.encoding} == report.forms
    lost = distance(reference_logits(model_of(report.out, model), IDS), reference_logits(model, IDS))
    # About 0.2 % of each matrix's outputs, which this model, whose norms spread its inputs, makes 2 to 10 % of.
    assert 1e-3 < lost < 0.15
    assert set(report.errors) == set(report.forms)
    assert max(report.errors.values()) < 0.03
    assert report.tokens == 1024


@pytest.mark.parametrize("name", MODELS)
def test_eight_bits_lose_next_to_nothing(name: str, sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    """Whatever is folded is folded back: what is left is 2 ** -8 of each group's largest weight."""
    source, model = sources[name]
    spec = spec_of(bits=8, table_bits=8)
    report = run(source, tmp_path / "out", spec)
    lost = distance(reference_logits(model_of(report.out, model), IDS), reference_logits(model, IDS))
    assert lost < 0.01
    # Negative control: one norm that isn't divided by what its readers were multiplied by.
    wrong = model_of(report.out, model)
    wrong.model.layers[0].input_layernorm.weight.data = model.model.layers[0].input_layernorm.weight.data
    assert distance(reference_logits(wrong, IDS), reference_logits(model, IDS)) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_each_algorithm_loses_less_of_a_layers_output_than_rounding(
    name: str, sources: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    """On the texts' tokens in another order, by transformers' layer."""
    source, model = sources[name]
    streams = layer_output(model)
    lost = {}
    for algorithm in ("rtn", "awq", "gptq", "awq-gptq"):
        report = run(source, tmp_path / algorithm, spec_of(algorithm=algorithm, sensitive_bits=4))
        lost[algorithm] = distance(layer_output(model_of(report.out, model)), streams)
    # On real models less is gained; here by 0.65 at most. A method that did nothing would be at 1.
    assert all(lost[algorithm] < 0.75 * lost["rtn"] for algorithm in ("awq", "gptq", "awq-gptq"))


def layer_output(model: Any) -> Tensor:
    """What layer 0 adds to the stream."""
    with torch.no_grad():
        states = model(torch.tensor(IDS), output_hidden_states=True).hidden_states
        found: Tensor = states[1] - states[0]
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["gqa, tied, bf16", "moe"])
def test_a_killed_job_goes_on_to_the_same_bytes(
    name: str, sources: dict[str, tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in each layer, behind its streams but in front of its shard, and in the tables; and run twice."""
    source, _ = sources[name]
    spec = spec_of(table_bits=8)
    want = bytes_of(run(source, tmp_path / "whole", spec).out)
    killed: list[str] = []

    def kill(place: str, module: object, attribute: str, when: Callable[..., bool]) -> None:
        """Once, behind the call."""
        call = getattr(module, attribute)

        def once(*args: Any, **options: Any) -> Any:
            result = call(*args, **options)
            if place not in killed and when(*args):
                killed.append(place)
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(module, attribute, once)

    kill("layer 0", LayerRounder, "round", lambda self, layer: layer == 0)
    kill("layer 1", LayerRounder, "round", lambda self, layer: layer == 1)
    kill("shard 0", quantize.QuantizedFolder, "add_layer", lambda self, layer, *_: layer == 0)
    kill("table", quantize, "round_table", lambda *_: True)
    reports = []
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", spec)
        assert not (tmp_path / "out").exists()
    reports.append(run(source, tmp_path / "out", spec))
    assert killed == ["layer 0", "shard 0", "layer 1", "table"]
    assert bytes_of(tmp_path / "out") == want
    assert len(reports[0].errors) == len(reports[0].forms) - (1 if name.startswith("gqa") else 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    again = bytes_of(run(source, tmp_path / "out", spec).out)  # over a folder of its own
    assert again == want
    # Negative control: the bytes are the seed's.
    other = bytes_of(run(source, tmp_path / "other", dataclasses.replace(spec, seed=1)).out)
    assert other["model-00001-of-00003.safetensors"] != want["model-00001-of-00003.safetensors"]


@pytest.fixture
def stopped(sources: dict[str, tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a job that was killed in its second layer."""
    with monkeypatch.context() as patch:
        whole = LayerRounder.round

        def only_first(self: LayerRounder, layer: int) -> Any:
            if layer:
                raise KeyboardInterrupt
            return whole(self, layer)

        patch.setattr(LayerRounder, "round", only_first)
        with pytest.raises(KeyboardInterrupt):
            run(sources["dense"][0], tmp_path / "out", spec_of())
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changed", "texts", "said"),
    [
        ({"seed": 1}, TEXTS, "seed 0, and this one has 1"),
        ({"bits": 8}, TEXTS, "bits 4, and this one has 8"),
        ({"algorithm": "rtn"}, (), 'algorithm "awq-gptq", and this one has "rtn"'),
        ({"format": "gptq"}, TEXTS, 'format "compressed-tensors", and this one has "gptq"'),
        ({}, [TEXT * 40], "texts"),
    ],
    ids=["seed", "bits", "algorithm", "format", "texts"],
)
def test_another_request_is_refused(
    changed: dict[str, Any], texts: list[str], said: str, stopped: Path, sources: dict[str, tuple[Path, Any]]
) -> None:
    source = sources["dense"][0]
    before = bytes_of(stopped.with_name(".out.quantizing") / "folder")
    with pytest.raises(BuildError, match="holds an unfinished job with") as caught:
        run(source, stopped, spec_of(**changed), texts=texts)
    assert said in str(caught.value)
    assert "give the same, or start anew with --restart" in str(caught.value)
    assert bytes_of(stopped.with_name(".out.quantizing") / "folder") == before
    assert run(source, stopped, spec_of(**changed), texts=texts, restart=True).out == stopped


@pytest.mark.parametrize("name", ["hidden-1.npy", "errors.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_state_is_refused(
    name: str, damage: str, stopped: Path, sources: dict[str, tuple[Path, Any]]
) -> None:
    path = stopped.with_name(".out.quantizing") / "state" / name
    content = path.read_bytes()
    match damage:
        case "gone":
            path.unlink()
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "changed":
            path.write_bytes(content.replace(b"{", b"[") if name.endswith("json") else content[:-1] + b"x")
    with pytest.raises(BuildError, match="start anew with --restart"):
        run(sources["dense"][0], stopped, spec_of())


def test_an_expert_that_no_token_chose_is_rounded_by_its_numbers(
    sources: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    source, model = sources["moe"]
    report = run(source, tmp_path / "out", spec_of(algorithm="gptq"))
    expert = f"model.layers.0.mlp.experts.{UNSEEN}."
    with torch.no_grad():
        streams = model(torch.tensor(IDS), output_hidden_states=True, output_router_logits=True)
    assert UNSEEN not in streams.router_logits[0].topk(2, dim=-1).indices  # or this test shows nothing
    values = values_of(report.out)
    with open_checkpoint(source) as checkpoint:
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"{expert}{part}.weight"
            want = checkpoint.read(name).astype(np.float32)
            assert np.square(values[name] - want).sum() < 0.02 * np.square(want).sum()
            assert 0 < report.errors[name] < 0.02
    nearest = values_of(run(source, tmp_path / "rtn", spec_of(algorithm="rtn")).out)
    name = f"{expert}gate_proj.weight"
    assert np.array_equal(values[name], nearest[name])
    chosen = name.replace(f"experts.{UNSEEN}", "experts.0")
    assert not np.array_equal(values[chosen], nearest[chosen])


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "awq"])
def test_a_bundle_answers_as_transformers_with_the_values_of_the_codes(
    format_name: str, sources: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    source, model = sources["gqa, tied, bf16"]
    folder = run(source, tmp_path / "out", spec_of(format=format_name, algorithm="awq")).out
    build_bundle(folder, BuildSpec(max_context=64), tmp_path / "bundle")
    want = reference_logits(model_of(folder, model), IDS)[0, -1].numpy()
    with OnnxRuntimeEngine(load_bundle(tmp_path / "bundle"), OrtOptions(threads=1)) as engine:
        found = engine.prefill(0, np.array(IDS[0]))
    assert np.abs(found - want).max() / want.std() < 0.1  # activations are rounded to 8 bits
    # Negative control: the model before it was quantized is further away.
    before = reference_logits(model, IDS)[0, -1].numpy()
    assert np.abs(found - before).max() > 2 * np.abs(found - want).max()


def test_random_weights_need_no_tokenizer(sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    with open_checkpoint(sources["dense"][0]) as checkpoint:
        config: ModelConfig = checkpoint.config
    with RandomCheckpoint(config) as random:
        assert quantize_checkpoint(random, spec_of(tokens=64), tmp_path / "out", threads=1).tokens == 64
        with pytest.raises(BuildError, match="texts were given, and random weights have no tokenizer"):
            quantize_checkpoint(random, spec_of(), tmp_path / "other", texts=TEXTS)


def test_torchs_threads_are_as_before(sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with open_checkpoint(sources["dense"][0]) as checkpoint:
        quantize_checkpoint(checkpoint, spec_of(algorithm="rtn"), tmp_path / "out", threads=before + 1)
    assert torch.get_num_threads() == before


def test_what_it_shows_meanwhile(sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    events: list[Any] = []
    report = run(sources["dense"][0], tmp_path / "out", spec_of(tokens=64), on_progress=events.append)
    assert [cost.stage for cost in report.stages] == ["calibrate", "round", "finish"]
    facts = report.to_json()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert report.seconds > 0
    assert report.peak_memory_bytes > 0
    assert {event.stage for event in events} == {"calibrate", "round", "finish"}


def refused(source: Path, out: Path, error: type[DeployError], said: str, spec: QuantizeSpec, **options: Any) -> None:
    """With nothing left behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=said):
        run(source, out, spec, **options)
    assert sorted(out.parent.iterdir()) == before


def test_a_checkpoint_that_is_quantized_already(sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    run(sources["dense"][0], tmp_path / "codes", spec_of(algorithm="rtn"))
    refused(tmp_path / "codes", tmp_path / "out", BuildError, r"is quantized already \(model.layers.0", spec_of())


def test_a_model_that_takes_images(seeing: tuple[SeeingModel, Path], tmp_path: Path) -> None:
    """Whose tower a quantized folder would lack, so that no build of it took images any more."""
    said = r"takes images, .* no place for its vision tower; accepted: build-engine .* --precision int4 or int8"
    for algorithm in ("rtn", "awq"):
        refused(seeing[0].folder, tmp_path / "out", BuildError, said, spec_of(algorithm=algorithm))
    with open_checkpoint(seeing[0].folder) as checkpoint:
        random = RandomCheckpoint(checkpoint.config)
    with pytest.raises(BuildError, match=said):
        quantize_checkpoint(random, spec_of(algorithm="rtn"), tmp_path / "out", threads=1)


def test_no_tokenizer(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", layers=1)
    refused(
        tmp_path / "model", tmp_path / "out", BuildError, "has no tokenizer.json, by which algorithm awq", spec_of()
    )
    run(tmp_path / "model", tmp_path / "out", spec_of(algorithm="rtn"))  # needs none


def test_texts_that_are_too_short(sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    source = sources["dense"][0]
    refused(source, tmp_path / "out", ExportError, "fewer than 32 tokens", spec_of(), texts=["too short"])


def test_texts_for_an_algorithm_that_looks_at_none(sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    source, spec = sources["dense"][0], spec_of(algorithm="rtn")
    refused(source, tmp_path / "out", BuildError, "algorithm rtn looks at none", spec, texts=TEXTS)


def test_pieces_longer_than_the_models_context(sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    spec = spec_of(sequence_length=513)
    refused(sources["dense"][0], tmp_path / "out", BuildError, "sequence_length is 513, and .* has 512 positions", spec)


def test_rows_that_no_group_divides(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", layers=1, with_tokenizer=True, intermediate=88)
    said = r"model.layers.0.mlp.down_proj.weight has rows of 88, which no group of 16, .* elements up to"
    refused(tmp_path / "model", tmp_path / "out", BuildError, said, spec_of())


@pytest.mark.parametrize("algorithm", ["rtn", "awq-gptq"])
@pytest.mark.parametrize("wrong", [1e8, float("nan"), float("-inf")])
def test_weights_that_have_no_scale(algorithm: str, wrong: float, tmp_path: Path) -> None:
    model: Any = save_tiny(tmp_path / "model", layers=1, with_tokenizer=True)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 7] = wrong
    with quiet():
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(BuildError, match=r"model.layers.0.mlp.down_proj.weight .*float16"):
        run(tmp_path / "model", tmp_path / "out", spec_of(algorithm=algorithm))


def test_activations_that_arent_numbers(tmp_path: Path) -> None:
    """Weights may be finite, and what comes of them not."""
    model: Any = save_tiny(tmp_path / "model", with_tokenizer=True)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias[:] = 1e30
        model.model.layers[0].self_attn.k_proj.bias[:] = 1e30
    with quiet():
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(BuildError, match=r"what model.layers.0.self_attn.o_proj.weight reads isn't finite"):
        run(tmp_path / "model", tmp_path / "out", spec_of())


def test_massive_activations(tmp_path: Path) -> None:
    """As trained models have them: a column a thousand times as large as the others."""
    model: Any = save_tiny(tmp_path / "model", with_tokenizer=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 9] = 1000.0
        model.model.layers[0].mlp.up_proj.weight[11] *= 300
    with quiet():
        model.save_pretrained(tmp_path / "model")
    report = run(tmp_path / "model", tmp_path / "out", spec_of())
    lost = distance(reference_logits(model_of(report.out, model), IDS), reference_logits(model, IDS))
    assert lost < 0.05


@pytest.mark.parametrize("algorithm", ["smoothquant", "gptq-fp8"])
@pytest.mark.parametrize("name", MODELS)
def test_rounded_inputs_lose_as_little_as_is_said(
    name: str, algorithm: str, sources: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    """The engine's reference, which reads the folder past our own reader and rounds inputs by the definition."""
    source, model = sources[name]
    report = run(source, tmp_path / "out", QuantizeSpec(algorithm=algorithm, tokens=1024, sequence_length=32))
    assert all(form.has_input_scale and form.bits == 8 for form in report.forms.values())
    assert {form.code_type for form in report.forms.values()} == {ALGORITHMS[algorithm].rounds_inputs}
    assert not any(".experts." in key for key in report.forms)
    with open_checkpoint(report.out) as checkpoint:
        rounded = load_model(checkpoint)[0]
    lost = distance(reference_logits(rounded, IDS), reference_logits(model, IDS))
    # Well below 0.1 % of each matrix's outputs, which this model makes ten times that of (see above). E4M3 has 0.07 %
    # of the input's square, and as much of the weights'.
    assert 1e-6 < lost < {"smoothquant": 0.03, "gptq-fp8": 0.08}[algorithm]
    assert max(report.errors.values()) < 2e-3
    for module in rounded.modules():  # negative control: scales that cut everything off
        for key, hook in module._forward_pre_hooks.items():
            module._forward_pre_hooks[key] = functools.partial(hook.func, hook.args[0], hook.args[1] / 20)
    assert distance(reference_logits(rounded, IDS), reference_logits(model, IDS)) > 10 * lost
