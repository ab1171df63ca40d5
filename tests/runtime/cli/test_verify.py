"""`verify` passes a sound bundle, and names what fails on another model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_aot.engines.verify.scores import Scores, Verification
from qwen_aot.runtime.cli import doctor, verify
from tests.checkpoints import save_tiny
from tests.runtime.cli.conftest import Run


def test_a_sound_bundle_passes(run: Run, bundle: Path, checkpoint: Path) -> None:
    result = run("verify", bundle, "--reference", checkpoint, "--window", 64, "--windows", 2, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert report["max_logit_difference"] < 1e-3
    assert report["positions"] == 100  # of 64: prefills end at 7 and 15, then 16 … 63
    assert report["greedy_tokens"] == 64
    assert report["perplexity"] > 1
    cpu = json.loads(run("doctor", "--json").stdout)["cpu"]
    assert report["cpu"] == {"name": cpu["name"], "features": cpu["features"]}


def test_a_cpu_bundles_numbers_are_said_to_be_this_cpus(
    run: Run, bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "processor", lambda: {"name": "Xeon [8]", "features": ["avx512_vnni", "amx_int8"]})
    text = run("verify", bundle, "--reference", checkpoint, "--window", 16, "--windows", 1).stdout
    assert "computed by Xeon [8] (avx512_vnni, amx_int8): another CPU adds in another order" in text
    scores = Scores(1, 0.0, 0.0, 0.0, 1.0, 0, None, 1, 1.0, 2.0, 2.0, 0.0)
    verify._show(Verification(scores, ()), runs_on_cpu=False)
    assert "all bounds hold" in (other := capsys.readouterr().out) and "computed by" not in other


def test_another_models_bundle_fails_and_says_where(run: Run, bundle: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", with_tokenizer=True, seed=1)
    result = run("verify", bundle, "--reference", tmp_path / "other", "--window", 32, "--windows", 1)
    assert result.exit_code == 1
    assert "failed: max_logit_difference, mean_logit_difference, kl_divergence" in result.stdout


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
    assert "failed: max_logit_difference\n" in result.stdout


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
