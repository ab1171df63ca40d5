"""docs/json.md lists exactly the fields that `--json` prints, with their types."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qwen_aot.engines.verify.bundle_report import BundleReport
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import WeightCheck
from qwen_aot.runtime.capi import build as capi_build
from qwen_aot.runtime.cli import build, capi, doctor
from qwen_aot.runtime.cli.main import qwen_aot
from qwen_aot.runtime.vision.boxes import Box
from tests.checkpoints import save_tiny
from tests.coded_checkpoints import MOE
from tests.quantized_files import gptq, gptq_config, save_quantized
from tests.runtime.backends.tensorrt.engines import write_checksum_bundle
from tests.runtime.cli.conftest import Run
from tests.runtime.cli.test_doctor import ORIN
from tests.runtime.measure.scripted import scripted
from tests.vl_checkpoints import SeeingModel, noise, png

PAGE = Path(__file__).parents[3] / "docs" / "json.md"
TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
PERCENTILES = dict.fromkeys(("p50", "p95", "p99", "max"), "number")
SPREAD = {"median": "number", "min": "number", "max": "number", "values[]": "number"}


def documented(heading: str) -> dict[str, str]:
    """Field -> type of one section of the page; a spread and percentiles are spelled out."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    fields: dict[str, str] = {}
    for names, kind in re.findall(r"^\| (`.*?`) \| ([a-z ]+) \|", section, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", names):
            inside = {"spread": SPREAD, "percentiles": PERCENTILES}.get(kind)
            parts = {name: kind} if inside is None else {f"{name}.{part}": of for part, of in inside.items()}
            fields |= {path: f"{fields[path]} or {of}" if path in fields else of for path, of in parts.items()}
    return fields


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that isn't a filled object or list, by its path."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value:
        for item in value:
            yield from leaves(item, f"{path}[]")
    else:
        yield path, value


def pattern(field: str, kind: str = "") -> str:
    """A regular expression for the paths that a documented field stands for."""
    inside = r"(\..*|\[\].*)?" if "object" in kind else ""
    return re.escape(field).replace(r"\*", "[^[]+") + inside


def compare(heading: str, *outputs: Any) -> None:
    """Every field that was printed is documented, and of its type; every one that is documented was printed."""
    fields = documented(heading)
    containers = {field[: part.start()] for field in fields for part in re.finditer(r"\[\]|\.\*", field)}
    unseen = set(fields)
    for path, value in (leaf for output in outputs for leaf in leaves(output)):
        if value in ([], {}) and any(re.fullmatch(pattern(container), path) for container in containers):
            continue  # nothing is in it here
        matching = [field for field, kind in fields.items() if re.fullmatch(pattern(field, kind), path)]
        assert matching, f"{path} is printed and not documented under {heading}"
        kinds = fields[matching[0]].split(" or ")
        accepted = tuple(kind for name in kinds for kind in TYPES.get(name, ()))
        is_bool = isinstance(value, bool) and "boolean" not in kinds  # which Python takes for an integer
        assert "object" in kinds or (isinstance(value, accepted) and not is_bool), (path, value, kinds)
        unseen -= set(matching)
    assert not unseen, f"documented under {heading} and never printed: {sorted(unseen)}"


def of_other_weights() -> Any:
    """What `verify` prints of a bundle whose weights are others: nothing was scored."""
    check = WeightCheck(Verdict.FAILED, "bytes", 1, 4, ("model.norm.weight",), "model.norm.weight is another")
    return BundleReport(check, None, None).to_json()


def printed(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with experts and without a tokenizer."""
    path = tmp_path_factory.mktemp("json") / "experts"
    save_tiny(path, moe={})
    return path


@pytest.fixture(scope="module")
def verified(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """What `build-engine --verify` prints, and the bundle."""
    out = tmp_path_factory.mktemp("json") / "int4"
    asked = ("--precision", "int4", "--block-size", "16", "--max-context", "256", "--verify", "--json")
    return printed(CliRunner().invoke(build.command, [str(checkpoint), "-o", str(out), *asked])), out


def test_build_engine(verified: tuple[Any, Path], experts: Path, tmp_path: Path) -> None:
    asked = [str(experts), "-o", str(tmp_path / "b"), "--precision", "fp32", "--max-context", "256", "--json"]
    plain = printed(CliRunner().invoke(build.command, asked))
    compare("`build-engine`", verified[0], plain)
    compare("`verify`", verified[0]["verification"] | {"bundle": "", "reference": ""}, of_other_weights())
    assert plain["verification"] == {}
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert report.keys() == plain.keys() - {"bundle"}
    dry = [str(experts), "-o", str(tmp_path / "dry"), "--dry-run", "--json"]
    compare("`build-engine --dry-run`", printed(CliRunner().invoke(build.command, dry)))


def test_quantize(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    compare("`quantize`", printed(run("quantize", checkpoint, "-o", tmp_path / "q", "--algorithm", "rtn", "--json")))


def test_export(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    graphs = (checkpoint, "qwen-vl")  # without a tower and with one
    outputs = [printed(run("export", each, "-o", tmp_path / f"graph{n}", "--json")) for n, each in enumerate(graphs)]
    compare("`export`", *outputs)


def test_inspect_of_a_bundle(run: Run, verified: tuple[Any, Path], tmp_path: Path) -> None:
    engine = write_checksum_bundle(tmp_path / "engine", "tensorrt", plugins=True)
    compare("`inspect` of a bundle", *(printed(run("inspect", path, "--json")) for path in (verified[1], engine)))


def test_inspect_of_a_checkpoint(run: Run, checkpoint: Path, experts: Path, tmp_path: Path) -> None:
    save_quantized(tmp_path, gptq_config(), gptq, moe=MOE)
    outputs = [printed(run("inspect", path, "--tensors", "--json")) for path in (checkpoint, experts, tmp_path)]
    compare("`inspect` of a checkpoint", *outputs)


def test_inspect_of_an_onnx_file(run: Run, bundle: Path, experts: Path, tmp_path: Path) -> None:
    assert (
        run("export", experts, "-o", tmp_path / "graph", "--lowering", "plugin", "--precision", "fp16").exit_code == 0
    )
    outputs = [
        printed(run("inspect", path, "--tensors", "--json")) for path in (bundle / "model.onnx", tmp_path / "graph")
    ]
    compare("`inspect` of an ONNX file", *outputs)


def test_plan(run: Run) -> None:
    compare("`plan`", printed(run("plan", "--precision", "fp8", "--precision", "int8", "--context", "2048", "--json")))


def test_generate(
    run: Run,
    bundle: Path,
    experts: Path,
    seeing: tuple[SeeingModel, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [printed(run("generate", bundle, "--prompt", "a b", "--max-new-tokens", n, "--json")) for n in (1, 4)]
    asked = [str(experts), "-o", str(tmp_path / "b"), "--precision", "fp32", "--max-context", "256"]
    assert CliRunner().invoke(build.command, asked).exit_code == 0
    ids = printed(run("generate", tmp_path / "b", "--prompt-ids", "1,2", "--max-new-tokens", 2, "--json"))
    (tmp_path / "it.png").write_bytes(png(noise(9, 9)))
    monkeypatch.setattr("qwen_aot.runtime.vision.boxes.find_boxes", lambda _: [Box("cat", 1, 2, 3, 4)])
    asked = ["--image", str(tmp_path / "it.png"), "--prompt", "x", "--max-new-tokens", "2", "--json"]
    compare("`generate`", *texts, ids, printed(run("generate", seeing[1], *asked)))


def test_bench(run: Run, verified: tuple[Any, Path]) -> None:
    asked = ("--prompt-tokens", 8, "--gen-tokens", 4, "--rounds", 1, "--json")
    compare("`bench`", printed(run("bench", verified[1], *asked)))


def test_bench_of_rows(run: Run, bundle: Path, verified: tuple[Any, Path], tmp_path: Path) -> None:
    asked = ("--prompt-tokens", 8, "--gen-tokens", 4, "--concurrency", "1", "--requests", 1, "--json")
    plain = printed(run("bench", verified[1], *asked))
    drawn = printed(run("bench", bundle, *asked, "--plot", tmp_path / "p.png"))
    compare("`bench --concurrency` of a bundle", plain, drawn, failed(plain))


def test_bench_of_a_server(run: Run) -> None:
    asked = ("--prompt-tokens", 8, "--gen-tokens", 4, "--requests", 1, "--json")
    with scripted() as server:
        one = printed(run("bench", "--url", server.url, *asked, "--concurrency", "1"))
        other = printed(run("bench", "--url", server.url, *asked, "--rate", "9"))
    compare("`bench --url`", one, other, failed(one) | {"plot": "p.png"})


def failed(report: Any) -> Any:
    """The same where no request was answered."""
    lost = dict.fromkeys(("first_token_seconds", "between_tokens_seconds", "gap_seconds", "end_to_end_seconds"))
    return report | {"loads": [report["loads"][0] | lost | {"failures": {"dropped": 1}, "messages": {"dropped": "x"}}]}


def test_verify(run: Run, bundle: Path, checkpoint: Path) -> None:
    asked = ("--window", 40, "--windows", 1, "--greedy-tokens", 4, "--json")
    result = run("verify", bundle, "--reference", checkpoint, *asked)
    assert result.exit_code == 3  # random weights
    compare("`verify`", json.loads(result.stdout), of_other_weights())
    layers = printed(run("verify", bundle, "--reference", checkpoint, "--per-layer", "--window", 40, "--json"))
    compare("`verify --per-layer`", layers)


def test_compare(run: Run, bundle: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("compare", bundle, "--reference", checkpoint, "--tokens", 8, "--json")
    drawn = run(*asked, "--plot", tmp_path / "p.png").stdout
    printed_rows = json.loads(drawn)
    (row,) = printed_rows["rows"][1:]
    lost = {"accuracy": None, "by_kind": {}, "decode_tokens_per_second": None, "not_compared": "x", "no_layers": "x"}
    alone = {"accuracy": row["accuracy"] | {"kl_error": None, "perplexity_error": None, "ratio_error": None}}
    rows = [*printed_rows["rows"], row | lost, row | alone, row | {"by_kind": {"prose": alone["accuracy"]}}]
    compare("`compare`", printed_rows | {"rows": rows}, json.loads(run(*asked).stdout))


def test_doctor(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"name": "RTX", "compute_cap": "8.9", "memory.total": "1 MiB", "driver_version": "1"}
    found = []
    for gpus in ([], [row]):
        monkeypatch.setattr(doctor, "gpus", lambda gpus=gpus: gpus)
        found.append(printed(run("doctor", "--json")))
    for board in (ORIN, dataclasses.replace(ORIN, chip="", release=None)):
        monkeypatch.setattr(doctor, "find_jetson", lambda board=board: board)
        found.append(printed(run("doctor", "--json")))
    compare("`doctor`", *found)


def test_gpu_check(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpus", lambda: [])
    result = run("gpu-check", "-o", tmp_path / "report", "--json")
    assert result.exit_code == 1
    compare("`gpu-check`", json.loads(result.stdout))


def test_capi(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libqwen_aot.so").write_bytes(b"")
    files = [tmp_path / name for name in ("qwen_aot.h", "libqwen_aot.so", "libqwen_aot.a", "qwen_aot.pc", "it.so")]
    monkeypatch.setattr(capi_build, "install_library", lambda *_, **__: capi_build.Installed(tmp_path, *files))
    outputs = [printed(run("capi", "--prefix", tmp_path, "--json"))]
    monkeypatch.setattr(capi, "_onnxruntime_library", lambda: None)
    outputs.append(printed(run("capi", "--prefix", tmp_path, "--json")))
    compare("`capi`", *outputs)


def test_every_verb_with_json_has_its_section() -> None:
    context = qwen_aot.make_context("qwen-aot", [], resilient_parsing=True)
    commands = {name: qwen_aot.get_command(context, name) for name in qwen_aot.list_commands(context)}
    verbs = {name for name, verb in commands.items() if verb and any("--json" in p.opts for p in verb.params)}
    headings = re.findall(r"^## `([a-z-]+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert verbs | {"build-engine"} == set(headings) | ({"build"} & verbs)
