"""What each verb shows on a real terminal of 40, 80 and 200 columns, kept in the folder `screens`.

`QWEN_AOT_WRITE_SCREENS=1` writes what is shown now in place of comparing it; look at the difference before it is kept.
Of screens whose figures differ from run to run these are shown as 0, and blanks that depend on their width as two.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from qwen_aot.engines.bundle.progress import ProgressEvent
from qwen_aot.runtime.capi import build as capi_build
from qwen_aot.runtime.capi.build import Installed
from qwen_aot.runtime.cli import bench, capi, doctor, gpu_check, verify
from qwen_aot.runtime.cli import compare as compare_verb
from qwen_aot.runtime.cli.command import VerbCommand
from qwen_aot.runtime.cli.console import busy, progress_on_stderr
from qwen_aot.runtime.cli.main import VERBS
from qwen_aot.runtime.measure import rounds
from tests.coded_checkpoints import MOE
from tests.quantized_files import gptq, gptq_config, save_quantized
from tests.runtime.cli import terminal
from tests.runtime.cli.reports import COMPARISON, LOADED, REPORTS
from tests.runtime.cli.terminal import Shown, show

KEPT = Path(__file__).parent / "screens"
WIDTHS = (40, 80, 200)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

MACHINE: dict[str, Any] = {
    "qwen_aot": "0.1.0",
    "python": "3.11.7",
    "system": "Linux-6.18.44-x86_64-with-glibc2.36",
    "cpu": {"name": "Some CPU", "features": ["avx2", "avx512_vnni"], "logical_cores": 8, "threads": 4},
    "own_kernels": {
        "library": "/opt/libqwen_aot_cpu.so",
        "version": 1,
        "instructions": "avx512_vnni",
        "is_stale": False,
        "problem": None,
    },
    "memory": {"total_bytes": 25_300_000_000, "available_bytes": 21_000_000_000},
    "free_disk_bytes": 82_300_000_000,
    "jetson": None,
    "gpus": [],
    "packages": {"click": "8.5.1", "rich": None},
    "extras": {
        "torch": {"version": "2.13.0+cpu", "extra": "build", "lacks": None},
        "onnxruntime-gpu": {"version": None, "extra": "cuda", "lacks": "it isn't installed"},
    },
    "targets": {},
}
FIGURES = {"median": 1234.5678, "min": 0.0001, "max": 23456.789, "values": [1.0]}
MEASURED: dict[str, Any] = {
    "model": "tiny-model",
    "target": "cpu",
    "precision": "fp32",
    "prompt_tokens": 512,
    "gen_tokens": 128,
    "rounds": 1,
    "load_seconds": 245.0,
    "peak_memory_bytes": 323_000_000,
    "speculation": {"drafts": 120, "draft_tokens": 344, "accepted_tokens": 290, "accepted_by_place": [110, 98, 82]},
    **{
        name: FIGURES
        for name in (
            "prefill_tokens_per_second",
            "first_token_seconds",
            "decode_tokens_per_second",
            "sampled_decode_tokens_per_second",
            "own_seconds_per_token",
            "own_share_of_step",
            "sampled_own_seconds_per_token",
            "sampled_own_share_of_step",
        )
    },
}
PLANNED = ("qwen1.5-7b", "qwen1.5-0.5b", "--device", "rtx-4060", "--precision", "int4", "--precision", "fp16")


def steady(text: str) -> str:
    """A screen without what differs from run to run."""
    text = re.sub(r"\b[0-9a-f]{20,64}\b|^ +[0-9a-f]{1,19}$", "HASH", text, flags=re.MULTILINE)
    text = re.sub(r"(?<![\w.-])\d[\d.,:+a-z-]*( min \d+ s)?( (bytes|kB|MB|GB)\b)?", "0", text)
    text = re.sub(r"^(\[.*?) +0/s$", r"\1", text, flags=re.MULTILINE)  # a rate: what is done at once has none
    return re.sub(r" {2,}", "  ", re.sub(r"─+", "─", re.sub(r"[━╸╺]+", "━", text)))


def require_fits(shown: Shown, columns: int) -> None:
    """Nothing that was written is wider than the terminal, and nothing is cut."""
    written = re.split(r"[\r\n]+", ESCAPES.sub("", shown.raw))
    too_wide = [line for line in written if cell_len(line) > columns]
    assert too_wide == []
    assert re.findall(r".*(?:\S…|…\S).*", shown.text) == []
    assert "Traceback" not in shown.text


def compare(name: str, columns: int, text: str) -> None:
    """Compares a screen with the one that is kept; lines of a `steady` one may break elsewhere, as figures differ."""
    path = KEPT / f"{name}.{columns}.txt"
    if os.environ.get("QWEN_AOT_WRITE_SCREENS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    kept = path.read_text(encoding="utf-8").removesuffix("\n")
    assert text == kept or (text.split() == kept.split() and text == steady(text))


def installed(prefix: Path, **options: Any) -> Installed:
    """An installation of the C library that is done at once."""
    prefix.mkdir(exist_ok=True)
    names = ("qwen_aot.h", "libqwen_aot.so", "libqwen_aot.a", "qwen_aot.pc", "libqwen_aot_cpu.so")
    (prefix / "libqwen_aot.so").write_bytes(bytes(250_000))
    return Installed(prefix, *(prefix / name for name in names))


@pytest.fixture
def place(checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `tiny-model` and `bundle`, and a machine that is the same everywhere."""
    (tmp_path / "tiny-model").symlink_to(checkpoint)
    (tmp_path / "bundle").symlink_to(bundle)
    save_quantized(tmp_path / "tiny-gptq", gptq_config(), gptq, moe=MOE)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "examine", lambda: MACHINE)
    monkeypatch.setattr(gpu_check, "examine", lambda: MACHINE)
    monkeypatch.setattr(gpu_check, "install_command", lambda extra: f"pip install '{extra}'")
    monkeypatch.setattr(doctor, "version", {"onnxruntime": "1.32", "torch": "2.13.0", "tensorrt": "10.1"}.get)
    monkeypatch.setattr(doctor, "install_command", lambda extra, **_: f"pip install '{extra}'")
    monkeypatch.delenv("QWEN_AOT_PLUGIN_LIBRARY", raising=False)
    monkeypatch.setattr(capi_build, "install_library", installed)
    monkeypatch.setattr(capi, "_onnxruntime_library", lambda: Path("/usr/lib/libonnxruntime.so.1.32.0"))
    monkeypatch.setattr(bench, "measure_bundle", lambda *arguments, **options: MEASURED)
    monkeypatch.setattr(bench, "measure_rows", lambda *arguments, **options: LOADED)
    monkeypatch.setattr(doctor, "processor", lambda: {"name": "Xeon [8]", "features": ["avx512_vnni"]})
    return tmp_path


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("plan", PLANNED, 0),
        ("plan-refused", ("qwen1.5-0.5b", "--device", "agx-orin-64gb", "--precision", "fp8"), 0),
        ("inspect-bundle", ("bundle",), 0),
        ("inspect-onnx", ("bundle/model.onnx",), 0),
        ("inspect-checkpoint", ("tiny-model",), 0),
        ("inspect-quantized", ("tiny-gptq",), 0),
        ("doctor", (), 0),
        ("bench", ("bundle",), 0),
        ("bench-load", ("bundle", "--concurrency", "1,16"), 1),
        ("generate", ("bundle", "--prompt-ids", "5,9", "--temperature", 0, "--max-new-tokens", 3, "--ignore-eos"), 0),
        ("gpu-check", ("gpu-check",), 1),
        ("capi", ("--prefix", "out"), 0),
        ("error-of-use", ("inspect", "no-such-folder-with-a-long-name-that-is-nowhere-on-this-machine"), 2),
        ("error-of-a-value", ("generate", "bundle", "--prompt", "x", "--temperature", "1e9"), 2),
        ("error-of-a-file", ("inspect", "damaged"), 1),
    ],
)
@pytest.mark.usefixtures("place")
def test_screens(name: str, arguments: tuple[object, ...], code: int, columns: int) -> None:
    verb = name.partition("-")[0]
    shown = show(*([verb] if verb in VERBS else []), *arguments, columns=columns)
    assert shown.exit_code == code, shown.text
    require_fits(shown, columns)
    compare(name, columns, steady(shown.text) if verb in ("inspect", "generate", "gpu") else shown.text)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize(("name", "code"), [("passed", 0), ("bound", 1), ("weights", 1), ("elsewhere", 3)])
@pytest.mark.usefixtures("place")
def test_verdicts(name: str, code: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "verify_bundle", lambda *arguments, **options: REPORTS[name])
    shown = show("verify", "bundle", "--reference", "tiny-model", columns=columns)
    assert shown.exit_code == code, shown.text
    require_fits(shown, columns)
    compare(f"verify-{name}", columns, shown.text)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.usefixtures("place")
def test_comparison(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_verb._Job, "run", lambda *arguments, **options: COMPARISON)
    shown = show("compare", "bundle", "--reference", "tiny-model", columns=columns)
    assert shown.exit_code == 3, shown.text
    require_fits(shown, columns)
    compare("compare", columns, shown.text)


def test_every_figure_of_the_readmes_plan_is_on_the_screen(place: Path) -> None:
    shown = show("plan", "qwen1.5-7b", "--device", "rtx-4060", columns=80)
    (row,) = (line for line in shown.lines if line.startswith("fp16 "))
    assert row.split() == ["fp16", "4096", "15.4", "2.42", "0.123", "18.0", "no", "-", "-", "-"]


@pytest.mark.parametrize(
    ("name", "verb", "options", "columns"),
    [
        ("dry-run", "build", ("--threads", 1, "--max-context", 256, "--dry-run"), 40),
        ("build", "build", ("--threads", 1, "--max-context", 256), 80),
        ("export", "export", ("--threads", 1), 80),
    ],
)
def test_what_takes_long(place: Path, name: str, verb: str, options: tuple[object, ...], columns: int) -> None:
    shown = show(verb, "tiny-model", "-o", "out", "--precision", "fp32", *options, columns=columns)
    assert shown.exit_code == 0, shown.text
    require_fits(shown, columns)
    above, _, place_and_sizes = shown.text.partition("\n/")  # where the folder's name, of any length, begins
    compare(name, columns, steady(above))
    assert (place / "out").exists() == (name != "dry-run") == ("peak memory" in place_and_sizes)


@click.command("work", cls=VerbCommand)
def long_job() -> None:
    """A job that reports as a build does."""
    with busy("loading a bundle with a long name, as folders of experiments have them, deep in a tree of folders"):
        pass
    with progress_on_stderr() as tell:
        for index, stage in enumerate(("trace", "write weights"), 1):
            tell(ProgressEvent(stage, index, 2))
            for done in (10_000_000, 55_000_000, 100_000_000):
                tell(ProgressEvent(stage, index, 2, done, 100_000_000))
            tell(ProgressEvent(stage, index, 2, 1, 1, unit=""))


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
@pytest.mark.parametrize("columns", WIDTHS)
def test_progress(columns: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "qwen_aot", long_job)
    shown = show(columns=columns, TERM=kind)
    assert shown.exit_code == 0
    require_fits(shown, columns)
    assert all(stage in shown.text for stage in ("[1/2]", "trace", "[2/2]", "write weights"))
    assert ("\x1b" in shown.raw) == (kind != "dumb")
    assert ("loading a bundle" in shown.text) == (kind == "dumb")  # a line that moved is gone at the end
    assert "loading a bundle" in shown.raw


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_fits_and_has_every_option(verb: str | None, columns: int) -> None:
    shown = show(*filter(None, [verb]), "--help", columns=columns)
    assert shown.exit_code == 0
    group = terminal.qwen_aot
    command = group.get_command(click.Context(group), verb) if verb else group
    assert command is not None
    options = [name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts]
    assert [name for name in options if name not in shown.text] == []
    lines = [line for line in shown.raw.replace("\r", "").splitlines() if cell_len(line) > columns]
    # A command to be copied is one line (or ends in a backslash), however narrow the terminal is.
    assert [line for line in lines if columns >= 80 or not re.match(" {4}.*(qwen-aot|build-engine|--)", line)] == []


HOSTILE = "[bold]x[/b]\x1b]0;t\x07\x9b31m:smile:"
SPELLED = "[bold]x[/b]\\x1b]0;t\\x07\\x9b31m:smile:"


def hostile_bundle(bundle: Path, folder: Path) -> Path:
    """A copy whose model and folder have that name."""
    copy = shutil.copytree(bundle, folder / HOSTILE)
    text = (copy / "manifest.json").read_text(encoding="utf-8")
    name = HOSTILE.encode("unicode_escape").decode().replace("\\x", "\\u00")
    (copy / "manifest.json").write_text(text.replace('"tiny-model"', f'"{name}"'), encoding="utf-8")
    return copy


@pytest.mark.parametrize("columns", [40, 80])
def test_names_of_others_are_text(
    bundle: Path, checkpoint: Path, tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = hostile_bundle(bundle, tmp_path)
    model = shutil.copytree(checkpoint, tmp_path / "models" / HOSTILE)
    one = [rounds.Round(1, 1, 1, 1)]
    monkeypatch.setattr(rounds, "measure_rounds", lambda *arguments: (one, one))
    commands: list[tuple[Any, ...]] = [
        ("inspect", copy),
        ("inspect", model),
        ("inspect", copy / "model.onnx"),
        ("bench", copy, "--prompt-tokens", 8, "--gen-tokens", 4),
        ("plan", model, "--device", "l4"),
        ("plan", HOSTILE),
        ("plan", "--device", HOSTILE),
        ("build", model, "-o", tmp_path / "out", "--target", HOSTILE),
        ("build", HOSTILE, "-o", tmp_path / "out"),
        ("export", HOSTILE, "-o", tmp_path / "out"),
        ("generate", tmp_path / "models" / HOSTILE, "--prompt", "x"),
        ("generate", copy, "--prompt-ids", HOSTILE),
        ("generate", HOSTILE, "--prompt", "x"),
        ("verify", HOSTILE, "--reference", "x"),
        (HOSTILE,),
        ("inspect", f"--{HOSTILE}"),
    ]
    for command in commands:
        shown = show(*command, columns=columns)
        require_fits(shown, columns)
        assert not set(shown.raw) & {"\x07", "\x9b"} and "\x1b]" not in shown.raw, command
        together = re.sub(r"\s", "", shown.text)
        # click quotes some names as Python would, and some it shortens to what was wrong with them
        name = SPELLED.rpartition("/")[2] if command[1:] == (model, "--device", "l4") else SPELLED  # of the folder
        assert name in together or name.replace("\\", "\\\\") in together, (command, shown.text)


def test_a_model_can_not_write_to_the_terminal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_aot.runtime.generation.generator import Generator
    from qwen_aot.runtime.generation.request import Completion, TokenEvent

    stream = Generator.stream

    def hostile(self: Generator, requests: Any) -> Any:
        for event in stream(self, requests):
            if isinstance(event, TokenEvent):
                yield dataclasses.replace(event, text=HOSTILE)
            else:
                assert isinstance(event, Completion)
                yield dataclasses.replace(event, last_text="\x1b[2J")

    monkeypatch.setattr(Generator, "stream", hostile)
    given = ("generate", "bundle", "--prompt", "x", "--max-new-tokens", 1, "--ignore-eos")
    shown = show(*given)
    assert "\x1b]" not in shown.raw and "\x1b[2J" not in shown.raw and "\x07" not in shown.raw
    assert f"{SPELLED}\\x1b[2J" in shown.text
    piped = CliRunner().invoke(terminal.qwen_aot, [str(argument) for argument in given])
    assert piped.stdout == f"{HOSTILE}\x1b[2J\n"  # what isn't seen by a terminal is exact


@pytest.mark.parametrize(
    ("variables", "is_colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
@pytest.mark.usefixtures("place")
def test_colors(variables: dict[str, str], is_colored: bool) -> None:
    shown = show("doctor", **variables)
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", shown.raw)) == is_colored
    assert (variables == {"TERM": "dumb"}) == ("\x1b" not in shown.raw)


@pytest.mark.usefixtures("place")
def test_a_pipe_gets_colors_by_request_only(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert "\x1b" not in run("doctor").stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in run("doctor").stdout


def test_a_pipe_gets_a_row_a_line(run: Callable[..., Any], place: Path) -> None:
    (line,) = (line for line in run("inspect", "bundle").stdout.splitlines() if line.startswith("model.onnx.data "))
    assert re.fullmatch(r"model\.onnx\.data +[\d.]+ kB \([\d,]+\) +ok +[0-9a-f]{64}", line)
