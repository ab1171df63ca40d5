"""`compare` on tiny bundles: figures against transformers, what is refused before any work, what goes on regardless."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_aot import figures
from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.verify import comparison, kept_reference, layer_graphs, reference
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.cli import source
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from qwen_aot.runtime.generation.generator import Generator
from tests.checkpoints import save_tiny
from tests.runtime.cli.conftest import Run

SMALL = ("--tokens", 96, "--window", 32)  # one window of each kind of text


@pytest.fixture(scope="module")
def coarse(checkpoint: Path) -> Path:
    """An int4 bundle of three rows."""
    out = checkpoint.parent / "coarse"
    build_bundle(checkpoint, BuildSpec(precision="int4", block_size=32, max_context=256, max_batch=3), out)
    return out


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference may not be loaded."""

    def explode(*arguments: object) -> NoReturn:
        raise AssertionError("the reference was loaded")

    monkeypatch.setattr(reference.Reference, "__init__", explode)


def report_of(run: Run, *arguments: object, code: int = 0) -> dict[str, Any]:
    result = run("compare", *arguments, "--json")
    assert result.exit_code == code, (result.output, result.exception)
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_a_worse_bundle_is_worse_and_the_reference_runs_once(
    run: Run, bundle: Path, coarse: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, open_now, at_once = [], set(), []
    load, opening, closing = reference.Reference.__init__, Generator.__init__, Generator.close

    def count_load(self: Any, *arguments: Any) -> None:
        loaded.append(self)
        load(self, *arguments)

    def count_opening(self: Any, *arguments: Any, **options: Any) -> None:
        open_now.add(id(self))
        at_once.append(len(open_now))
        opening(self, *arguments, **options)

    def count_closing(self: Any) -> None:
        open_now.discard(id(self))
        closing(self)

    monkeypatch.setattr(reference.Reference, "__init__", count_load)
    monkeypatch.setattr(Generator, "__init__", count_opening)
    monkeypatch.setattr(Generator, "close", count_closing)
    plot = tmp_path / "loss.svg"
    report = report_of(run, bundle, coarse, "--reference", checkpoint, *SMALL, "--plot", plot)
    assert len(loaded) == 1 and set(at_once) == {1}
    own, exact, rounded = report["rows"]
    assert [row["name"] for row in report["rows"]] == ["reference, fp32", "bundle", "coarse"]
    assert [row["bundle"] for row in report["rows"]] == [None, str(bundle), str(coarse)]
    assert abs(exact["accuracy"]["kl_divergence"]) < 1e-6
    assert exact["accuracy"]["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert exact["accuracy"]["top1_agreement"] == exact["accuracy"]["greedy_agreement"] == 1
    assert rounded["accuracy"]["kl_divergence"] > 1e-3 > 100 * abs(exact["accuracy"]["kl_divergence"])
    assert rounded["accuracy"]["top1_agreement"] < 1
    assert (own["bits_per_weight"], own["decode_tokens_per_second"]) == (32, None)
    files = {path.name: path.stat().st_size for path in coarse.iterdir()}
    assert rounded["weight_bytes"] == files["model.onnx"] + files["model.onnx.data"] < exact["weight_bytes"]
    assert list(rounded["by_kind"]) == ["prose", "code", "chinese"]
    assert sum(each["positions"] for each in rounded["by_kind"].values()) == rounded["accuracy"]["positions"]
    assert rounded["decode_tokens_per_second"]["median"] > 0
    assert [layer["layer"] for layer in rounded["layers"]] == [0, 1, -1]
    assert exact["layers"][0]["median_relative"] < 1e-4 < rounded["layers"][0]["median_relative"]
    drawn = plot.read_text(encoding="utf-8")
    assert drawn.startswith("<?xml") and report["plot"] == str(plot)


def test_perplexity_is_transformers(run: Run, bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. What is the capital of France?"
    (tmp_path / "page.txt").write_text(text, encoding="utf-8")
    report = report_of(run, bundle, "--reference", checkpoint, "--text", tmp_path / "page.txt")
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(checkpoint)(ids, labels=ids).loss
    assert report["windows"] == 1
    for row in report["rows"]:
        assert row["accuracy"]["positions"] == ids.numel() - 1
        assert row["accuracy"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert list(row["by_kind"]) == [str(tmp_path / "page.txt")]


def test_the_table(run: Run, bundle: Path, checkpoint: Path) -> None:
    result = run("compare", bundle, "--reference", checkpoint, *SMALL)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][1:3] == ["93", "tokens"] and "KL," in lines[1]
    assert [line[0] for line in lines[3:5]] == ["reference,", "bundle"]
    assert "the reference was read by transformers" in result.stdout
    assert "[2/3] run the reference ..." in result.stderr and "[3/3] score bundle ..." in result.stderr


@pytest.mark.usefixtures("unloaded")
def test_a_bundle_twice(run: Run, bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(bundle)
    result = run("compare", bundle, link, "--reference", checkpoint)
    assert result.exit_code == 2
    assert f"BUNDLE {link} is given twice, first as {bundle}; give each once" in result.stderr
    assert "is given twice; give" in run("compare", bundle, bundle, "--reference", checkpoint).stderr


def test_folders_of_one_name_are_told_by_their_paths(
    run: Run, bundle: Path, coarse: Path, checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    paths = [shutil.copytree(path, tmp_path / place / "same") for path, place in ((bundle, "a"), (coarse, "b"))]
    report = report_of(run, *paths, "--reference", checkpoint, "--tokens", 8)
    assert [row["name"] for row in report["rows"][1:]] == list(map(str, paths))


@pytest.mark.usefixtures("unloaded")
def test_a_bundle_of_another_vocabulary(run: Run, bundle: Path, coarse: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", vocab=400)
    result = run("compare", bundle, coarse, "--reference", tmp_path / "other")
    assert result.exit_code == 1
    assert "has vocab_size 400, the bundle's model tiny-model has 320" in result.stderr


@pytest.mark.usefixtures("unloaded")
def test_a_bundle_with_another_tokenizer(
    run: Run, bundle: Path, coarse: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(coarse, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    replace_file(other, "tokenizer.json", json.dumps(tokenizer))
    result = run("compare", bundle, other, "--reference", checkpoint)
    assert result.exit_code == 1
    assert "the tokenizer of other isn't that of bundle" in result.stderr


def replace_file(bundle: Path, name: str, text: str) -> None:
    """Another content, with its size and hash in the manifest."""
    (bundle / name).write_text(text, encoding="utf-8")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    content = text.encode()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_without_a_tokenizer_only_random_weights_are_scored(
    run: Run, decisive: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, bundle = decisive
    result = run("compare", bundle, "--reference", checkpoint)
    assert result.exit_code == 1
    assert "no bundle has a tokenizer (tokenizer.json), so that there are no tokens to score" in result.stderr
    monkeypatch.setattr(source, "open_source", lambda name, **_: open_checkpoint(name))  # as if it were a variant's
    report = report_of(run, bundle, "--reference", checkpoint, "--random-weights", "--tokens", 40)
    assert list(report["rows"][1]["by_kind"]) == ["random"]
    refused = run(
        "compare", bundle, "--reference", checkpoint, "--random-weights", "--text", checkpoint / "config.json"
    )
    assert refused.exit_code == 1 and "no bundle has a tokenizer" in refused.stderr


def test_what_this_machine_cannot_run_is_listed_and_the_others_go_on(
    run: Run, bundle: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = tmp_path / "fast"
    build_bundle(checkpoint, BuildSpec(precision="int8", max_context=256, fast_prefill=True), fast)
    monkeypatch.setattr("qwen_aot.runtime.backends.ort.engine.has_exact_integer_products", lambda: False)
    plot = tmp_path / "loss.png"
    report = report_of(run, fast, bundle, "--reference", checkpoint, *SMALL, "--plot", plot, code=3)
    _, lost, found = report["rows"]
    assert "--fast-prefill" in lost["not_compared"] and (lost["accuracy"], lost["layers"]) == (None, [])
    assert lost["weight_bytes"] > 0 and found["accuracy"]["positions"] == 93
    assert plot.read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(reference.Reference, "__init__", lambda *_: pytest.fail("the reference was loaded"))
    alone = run("compare", fast, "--reference", checkpoint)
    assert alone.exit_code == 1
    assert "this machine can run none of the bundles: fast: " in alone.stderr


def test_layers_that_cannot_be_told_are_said(
    run: Run, bundle: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise BuildError("a norm is behind an If")

    monkeypatch.setattr(layer_graphs, "compare_bundle_layers", refuse)
    plot = tmp_path / "loss.png"
    result = run("compare", bundle, "--reference", checkpoint, "--tokens", 20, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "the layers of bundle aren't drawn: a norm is behind an If" in result.stdout
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_a_bundle_that_fails_as_it_runs_is_a_failure_and_the_others_go_on(
    run: Run, bundle: Path, coarse: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = comparison.score

    def score(engine: Any, *arguments: Any, **options: Any) -> Any:
        if engine.manifest.max_batch == 3:
            raise NonFiniteLogitsError([1])
        return real(engine, *arguments, **options)

    monkeypatch.setattr(comparison, "score", score)
    result = run("compare", coarse, bundle, "--reference", checkpoint, *SMALL)
    assert result.exit_code == 1
    assert "note: coarse wasn't compared: the logits of row 1 hold NaN or Inf" in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines()[3:6]] == ["reference,", "coarse", "bundle"]


def test_where_nothing_was_compared_nothing_is_drawn(
    run: Run, coarse: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise NonFiniteLogitsError([0])

    monkeypatch.setattr(comparison, "score", fail)
    plot = tmp_path / "loss.png"
    result = run("compare", coarse, "--reference", checkpoint, "--tokens", 8, "--plot", plot, "--json")
    assert result.exit_code == 1 and not plot.exists()
    assert json.loads(result.stdout)["plot"] is None
    assert "loss.png wasn't written: no bundle was compared" in result.stderr


@pytest.mark.usefixtures("unloaded")
def test_a_disk_without_room(run: Run, bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_reference, "free_disk_bytes", lambda folder: 1000)
    result = run("compare", bundle, "--reference", checkpoint, *SMALL)
    assert result.exit_code == 1
    assert "the reference's logits of 93 tokens take 119,040 bytes, and" in result.stderr


@pytest.mark.usefixtures("unloaded")
def test_a_missing_matplotlib_is_said_before_the_work(
    run: Run, bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = run("compare", bundle, "--reference", checkpoint, "--plot", "loss.png")
    assert result.exit_code == 1
    assert "needs the package 'matplotlib', which isn't installed; install it with" in result.stderr
    assert "plot" in result.stderr.rpartition("install it with")[2]


def test_a_plot_that_fails_leaves_what_stood_there(
    run: Run, bundle: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    plot = tmp_path / "loss.png"
    plot.write_text("before")
    monkeypatch.setattr(figures, "render", fail)
    result = run("compare", bundle, "--reference", checkpoint, "--tokens", 20, "--plot", plot)
    assert result.exit_code == 1 and "No space left on device" in result.stderr
    assert "reference, fp32" in result.stdout  # the table isn't lost
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"loss.png": "before"}
