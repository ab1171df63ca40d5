"""`verify` passes a sound bundle, and names what fails on another model's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.verify.bundle_report import BundleReport
from qwen_aot.engines.verify.scores import Scores, Verification
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import WeightCheck
from qwen_aot.exporter.checkpoint.gguf import reader as gguf_reader
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.cli import doctor, verify
from tests.bundle_copies import changed, data_tensors
from tests.checkpoints import save_tiny
from tests.decisive import save_decisive
from tests.gguf_files import save_gguf
from tests.runtime.cli.conftest import Run
from tests.vl_checkpoints import SeeingModel, make_seeing_model


def test_a_sound_bundle_passes(run: Run, decisive: tuple[Path, Path]) -> None:
    checkpoint, bundle = decisive
    result = run("verify", bundle, "--reference", checkpoint, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["verdict"], report["passed"], report["reasons"]) == ("passed", True, [])
    assert report["weights"] | {"bytes": 0, "tensors": 0} == {
        "verdict": "passed", "compared": "bytes", "tensors": 0, "bytes": 0, "differing": [],
    }  # fmt: skip
    assert report["weights"]["tensors"] == len(data_tensors(bundle))
    assert report["reference_reader"] == "transformers"
    assert report["max_logit_difference"] < 1e-3
    assert report["positions"] == 194  # of 256: prefills end at 31 and 63, then 64 … 255
    assert report["decisive_positions"] > 100
    assert report["greedy_tokens"] == 32
    assert report["perplexity"] > 1
    cpu = json.loads(run("doctor", "--json").stdout)["cpu"]
    assert report["cpu"] == {"name": cpu["name"], "features": cpu["features"]}
    shown = run("verify", bundle, "--reference", checkpoint, "--greedy-tokens", 4)
    assert shown.exit_code == 0
    assert "are the checkpoint's by every byte" in shown.stdout
    assert "passed: the weights are the checkpoint's and all bounds hold" in shown.stdout
    assert "[1/3] compare weights ..." in shown.stderr


def test_random_weights_are_inconclusive_and_their_bytes_are_said_to_be_right(
    run: Run, bundle: Path, checkpoint: Path
) -> None:
    asked = ("verify", bundle, "--reference", checkpoint, "--window", 64, "--windows", 2)
    result = run(*asked)
    assert result.exit_code == 3
    assert "are the checkpoint's by every byte" in result.stdout
    assert "inconclusive: the reference is sure of its next token at 0 of 100 positions" in result.stdout
    assert "passed" not in result.stdout
    report = json.loads(run(*asked, "--json").stdout)
    assert (report["verdict"], report["passed"], report["weights"]["verdict"]) == ("inconclusive", False, "passed")
    assert len(report["reasons"]) == 1


def test_a_model_that_takes_images(run: Run, seeing: tuple[SeeingModel, Path], tmp_path: Path) -> None:
    """All weights by their bytes, the tower's among them, and the decoder's answers to a text."""
    asked = ("--window", 64, "--windows", 2, "--greedy-tokens", 4, "--json")
    result = run("verify", seeing[1], "--reference", seeing[0].folder, *asked)
    assert result.exit_code == 3, result.output  # random weights are sure of nothing
    report = json.loads(result.stdout)
    assert (report["verdict"], len(report["reasons"])) == ("inconclusive", 1)
    assert (report["weights"]["verdict"], report["weights"]["compared"]) == ("passed", "bytes")
    assert report["weights"]["tensors"] > len(data_tensors(seeing[1]))
    assert report["reference_reader"] == "transformers"
    assert report["max_logit_difference"] < 1e-3 and report["greedy_agreement"] == 1
    layers = run("verify", seeing[1], "--reference", seeing[0].folder, "--per-layer", "--json")
    assert layers.exit_code == 0, layers.output
    assert json.loads(layers.stdout)["passed"] is True
    other = make_seeing_model(tmp_path / "other", seed=1)
    result = run("verify", seeing[1], "--reference", other.folder, *asked)
    assert result.exit_code == 1 and json.loads(result.stdout)["weights"]["verdict"] == "failed"


def test_where_the_engine_cannot_run_the_weights_are_compared(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = run("build", checkpoint, "-o", tmp_path / "b", "--precision", "int8", "--fast-prefill")
    assert built.exit_code == 0, built.output
    monkeypatch.setattr("qwen_aot.runtime.backends.ort.engine.has_exact_integer_products", lambda: False)
    result = run("verify", tmp_path / "b", "--reference", checkpoint, "--json")
    assert result.exit_code == 3, result.output
    report = json.loads(result.stdout)
    assert (report["verdict"], report["weights"]["verdict"], report["kl_divergence"]) == (
        "inconclusive",
        "passed",
        None,
    )
    (reason,) = report["reasons"]
    assert reason.startswith("its answers weren't compared: ") and "--fast-prefill" in reason


def test_without_the_weights_nothing_passes(run: Run, decisive: tuple[Path, Path]) -> None:
    checkpoint, bundle = decisive
    result = run("verify", bundle, "--reference", checkpoint, "--skip-weights")
    assert result.exit_code == 3
    assert "inconclusive: the weights weren't compared with the checkpoint's (--skip-weights)" in result.stdout
    assert "[1/2] load reference ..." in result.stderr
    refused = run("verify", bundle, "--reference", checkpoint, "--skip-weights", "--per-layer")
    assert refused.exit_code == 2 and "--skip-weights doesn't go with --per-layer" in refused.stderr
    refused = run("verify", bundle, "--reference", checkpoint, "--kernels", "own", "--per-layer")
    assert refused.exit_code == 2 and "--kernels doesn't go with --per-layer" in refused.stderr


def test_a_cpu_bundles_numbers_are_said_to_be_this_cpus(
    run: Run, bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "processor", lambda: {"name": "Xeon [8]", "features": ["avx512_vnni", "amx_int8"]})
    text = run("verify", bundle, "--reference", checkpoint, "--window", 16, "--windows", 1).stdout
    assert "computed by Xeon [8] (avx512_vnni, amx_int8): another CPU adds in another order" in text
    scores = Scores(1, 0.0, 0.0, 0.0, 1.0, 0, None, 1, 1.0, 1.0, 2.0, 2.0, 0.0)
    weights = WeightCheck(Verdict.PASSED, "hashes", 3, 12, (), "")
    verify._show(BundleReport(weights, Verification(scores, ()), "transformers"), runs_on_cpu=False)
    other = capsys.readouterr().out
    assert "all bounds hold" in other and "by their hashes" in other and "computed by" not in other


def test_another_models_weights_are_named_before_anything_is_scored(run: Run, bundle: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", with_tokenizer=True, seed=1)
    result = run("verify", bundle, "--reference", tmp_path / "other", "--window", 32, "--windows", 1)
    assert result.exit_code == 1
    assert "failed: 17 of 19 weights aren't what the checkpoint makes: model.embed_tokens.weight" in result.stdout
    assert "load reference" not in result.stderr and "positions" not in result.stdout
    by_scores = run("verify", bundle, "--reference", tmp_path / "other", "--window", 32, "--windows", 1,
                    "--skip-weights", "--json")  # fmt: skip
    assert by_scores.exit_code == 1
    report = json.loads(by_scores.stdout)
    assert [reason.split()[0] for reason in report["reasons"]] == [
        "max_logit_difference",
        "mean_logit_difference",
        "kl_divergence",
        "perplexity_ratio",
    ][: len(report["reasons"])]
    assert len(report["reasons"]) >= 3


def test_one_changed_weight_is_named_though_the_files_hash_is_another_too(
    run: Run, decisive: tuple[Path, Path], tmp_path: Path
) -> None:
    def double_one(values: Any) -> None:
        values.flat[5] *= 2

    checkpoint, bundle = decisive
    damaged = changed(bundle, tmp_path / "b", "model.layers.1.input_layernorm.weight", double_one)
    result = run("verify", damaged, "--reference", checkpoint, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["weights"]["differing"] == ["model.layers.1.input_layernorm.weight"]
    assert report["positions"] is None and report["checks"] == []
    assert (
        "1 of 19 weights aren't what the checkpoint makes: model.layers.1.input_layernorm.weight"
        in report["reasons"][0]
    )


def test_a_fault_of_our_gguf_reader_is_noticed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle and what is made again are both of our reading, and equal; the reference is of another's."""
    save_decisive(tmp_path / "d")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    save_gguf(tmp_path / "m.gguf", model, "qwen2")
    real = gguf_reader.parse
    monkeypatch.setattr(gguf_reader, "parse", lambda *facts: dataclasses.replace(real(*facts), rope_theta=500.0))
    with open_checkpoint(tmp_path / "m.gguf") as source:
        build_bundle(source, BuildSpec(precision=Precision.FP32, max_context=320), tmp_path / "b")
    result = run("verify", tmp_path / "b", "--reference", tmp_path / "m.gguf", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["weights"]["verdict"] == "passed"
    assert report["reference_reader"] == "the gguf package"
    assert any(reason.startswith("kl_divergence is ") for reason in report["reasons"])


@pytest.mark.parametrize("how", [(), ("--per-layer",)])
@pytest.mark.parametrize(
    ("facts", "said"), [({"vocab": 400}, "vocab_size 400"), ({"layers": 3}, "num_hidden_layers 3")]
)
def test_a_reference_of_another_size_is_refused(
    run: Run, bundle: Path, tmp_path: Path, how: tuple[str, ...], facts: dict[str, int], said: str
) -> None:
    save_tiny(tmp_path / "other", **{"vocab": 320, **facts})
    result = run("verify", bundle, "--reference", tmp_path / "other", *how)
    assert result.exit_code == 1
    assert said in result.stderr and "give the checkpoint that the bundle was built from" in result.stderr


@pytest.mark.parametrize("greedy", [253, 256, 300])
def test_a_context_without_room_is_refused(run: Run, bundle: Path, checkpoint: Path, greedy: int) -> None:
    result = run("verify", bundle, "--reference", checkpoint, "--greedy-tokens", greedy)
    assert result.exit_code == 1
    assert f"context of 256 tokens has no room for a window of at least 4 and {greedy} greedy tokens" in result.stderr


def test_bounds_can_be_given(run: Run, bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    result = run("verify", bundle, "--reference", checkpoint, "--text", tmp_path / "page.txt",
                 "--max-logit-difference", "1e-12", "--greedy-tokens", 4)  # fmt: skip
    assert result.exit_code == 1
    assert "failed: max_logit_difference is " in result.stdout and "at most 1e-12 is allowed" in result.stdout


def test_a_text_that_is_not_utf8(run: Run, bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_bytes(b"\xff")
    result = run("verify", bundle, "--reference", checkpoint, "--text", tmp_path / "page.txt")
    assert result.exit_code == 2
    assert "isn't UTF-8" in result.stderr


def test_per_layer(run: Run, bundle: Path, checkpoint: Path) -> None:
    result = run("verify", bundle, "--reference", checkpoint, "--per-layer", "--window", 40, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["passed"] is True and report["tokens"] == 40
    assert [row["layer"] for row in report["layers"]] == [0, 1, -1]


def test_per_layer_names_the_first_layer_over_a_bound(run: Run, bundle: Path, checkpoint: Path) -> None:
    result = run("verify", bundle, "--reference", checkpoint, "--per-layer", "--layer-bound", "1e-12")
    assert result.exit_code == 1
    assert "first over the bound of 1e-12: layer 0" in result.stdout


def test_a_layer_bound_alone_is_a_usage_error(run: Run, bundle: Path, checkpoint: Path) -> None:
    result = run("verify", bundle, "--reference", checkpoint, "--layer-bound", "0.1")
    assert result.exit_code == 2
    assert "--layer-bound goes with --per-layer" in result.stderr
