"""`build` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_aot.engines.verify import weights
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import WeightCheck
from qwen_aot.machine import usable_cores
from tests.runtime.cli.conftest import Run
from tests.tools import require_package


def test_builds_and_reports_as_json(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    arguments = ("--precision", "fp32", "--max-batch", 3, "--verify", "--threads", 1, "--json")
    result = run("build", checkpoint, "-o", out, *arguments)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["bundle"] == str(out)
    assert report["verification"]["verdict"] == "inconclusive"  # random weights: kept, and said
    assert report["verification"]["weights"]["verdict"] == "passed"
    (warning,) = report["warnings"]
    assert warning.startswith("the verification is inconclusive, and the bundle was kept: the reference is sure of its")
    assert report["estimate"]["threads"] == 1
    assert "[1/6] trace ..." in result.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["engines"]["text"]["precision"], manifest["max_batch"]) == ("fp32", 3)
    assert json.loads((out / "report.json").read_text())["verification"]["passed"] is False


def test_a_bundle_that_fails_its_verification_isnt_kept(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = WeightCheck(Verdict.FAILED, "bytes", 1, 4, ("model.norm.weight",), "weights aren't: model.norm.weight")
    monkeypatch.setattr(weights, "check_weights", lambda *_, **__: failed)
    result = run("build", checkpoint, "-o", tmp_path / "bundle", "--precision", "fp32", "--verify")
    assert result.exit_code == 1
    assert "the bundle differs from the reference: weights aren't: model.norm.weight" in result.stderr
    assert "higher precision" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    arguments = (
        "build",
        "qwen1.5-0.5b",
        "--random-weights",
        "-o",
        tmp_path / "bundle",
        "--precision",
        "fp32",
        "--dry-run",
    )
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["bundle_bytes"] == pytest.approx(463_987_712 * 4, rel=0.01)
    assert facts["peak_memory_bytes"] > 0 and facts["seconds"] > 0
    assert 1 <= facts["threads"] <= usable_cores()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--precision", "fp7"), 2, "precision 'fp7' doesn't exist; what exists: cpu: fp32, int8, int4"),
        (("--target", "npu"), 2, "target 'npu' doesn't exist; what exists: cpu"),
        (("--precision", "fp32", "--block-size", "32"), 2, "fp32 has no blocks"),
        (("--max-context", "0"), 2, "max_context is 0"),
        (("--max-context", "99999"), 1, "max_context 99999 is more than the model's 512"),
        (("--compute-capability", "8.9"), 2, "target cpu takes no TensorRT options"),
        (("--target", "tensorrt-rtx", "--compute-capability", "ada"), 2, "'ada' isn't one; accepted: numbers like"),
        (("--target", "tensorrt-rtx", "--timing-cache", "x"), 2, "tensorrt-rtx doesn't take timing_cache: it times no"),
        (("--target", "tensorrt-rtx", "--precision", "fp8", "--compute-capability", "8.6"), 2, "fp8 needs compute"),
        (("--target", "tensorrt-rtx", "--optimization-level", "6"), 2, "6 is not in the range 0<=x<=5"),
        (("--target", "tensorrt-rtx", "--attention", "plugin"), 2, "TensorRT-RTX has no plugin layers"),
        (("--target", "tensorrt", "--moe", "fast"), 2, "moe 'fast' doesn't exist; accepted: plugin, native"),
        (
            ("--target", "tensorrt-rtx", "--plugin-library", __file__),
            2,
            "doesn't take plugin_library: it has no",
        ),
        (("--threads", "0"), 2, "0 is not in the range 1<=x<=1024"),
        (("--threads", "1025"), 2, "1025 is not in the range 1<=x<=1024"),
        (("--target", "cuda", "--kv-precision", "int8"), 2, "kv_precision int8 doesn't exist for target cuda"),
        (("--kv-precision", "fp16"), 2, "computes in fp32: attention reads a cache of its own type, or int8"),
        (("--random-weights",), 2, "--random-weights goes with a variant's name"),
    ],
)
def test_refusals(
    run: Run, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = run("build", checkpoint, "-o", tmp_path / "bundle", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.tools
@pytest.mark.trt
def test_builds_an_engine_without_a_gpu(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    require_package("tensorrt_rtx", "pip install 'qwen-aot[tensorrt-rtx]'")
    out = tmp_path / "bundle"
    arguments = ("--target", "tensorrt-rtx", "--compute-capability", "8.6,12.0", "--max-context", 192)
    arguments += ("--prefill-chunk", 64, "--workspace-mib", 512, "--optimization-level", 1)
    facts = json.loads(run("build", checkpoint, "-o", out, *arguments, "--dry-run", "--json").stdout)
    assert facts["disk_bytes"] > facts["bundle_bytes"] > 0
    assert not out.exists()
    result = run("build", checkpoint, "-o", out, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert "[4/6] compile ..." in result.stderr
    assert json.loads(result.stdout)["bundle"] == str(out)
    facts = json.loads(run("inspect", out, "--json").stdout)
    assert facts["compute_capabilities"] == ["8.6", "12.0"]
    assert facts["network_layers"] == sum(row["count"] for row in facts["layers"])
    assert facts["weight_bytes"] > 0 and facts["cache_bytes"] > 0 and facts["activation_bytes_estimated"] > 0
    assert {row["name"] for row in facts["files"]} >= {"engine.rtx", "report.json"}
    table = run("inspect", out).stdout
    assert "8.6, 12.0" in table and "KV_CACHE_UPDATE" in table
    result = run("build", checkpoint, "-o", out, *arguments, "--verify")
    assert result.exit_code == 1
    assert "leave out --verify" in result.stderr


def test_a_variant_needs_random_weights(run: Run, tmp_path: Path) -> None:
    result = run("build", "qwen1.5-0.5b", "-o", tmp_path / "bundle")
    assert result.exit_code == 2
    assert "is a variant's name and has no weights" in result.stderr


def test_a_name_that_is_nothing(run: Run, tmp_path: Path) -> None:
    result = run("build", "qwen9-3b", "-o", tmp_path / "bundle")
    assert result.exit_code == 2
    assert "qwen9-3b doesn't exist and isn't a variant's name" in result.stderr
    assert "qwen1.5-0.5b, -1.8b" in result.stderr and "-moe-a2.7b (each also with -chat)" in result.stderr
