"""The commands as a user starts them: real processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_aot.engines.bundle.writer import BundleWriter
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.cli.main import VERBS
from tests.runtime.cli.conftest import Run

ROOT = Path(__file__).parents[3]
QWEN_AOT = [sys.executable, "-m", "qwen_aot"]
HEAVY = "('torch', 'onnx', 'onnx_ir', 'onnxruntime', 'transformers', 'tokenizers')"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    done = python(
        "import sys\n"
        "from qwen_aot.runtime.cli.main import qwen_aot\n"
        "try:\n    qwen_aot.main(['--help'])\n"
        f"finally:\n    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["[]"]
    for name, verb in VERBS.items():
        assert f"{name:<{max(map(len, VERBS))}}  {verb.help}" in done.stdout


@pytest.mark.parametrize(
    ("verb", "lines"),
    [
        (
            "build",
            (
                "--target TEXT cpu, cuda, tensorrt-rtx or tensorrt: where it runs. [default: cpu]",
                "--precision TEXT The weights: fp32, fp16 or bf16, as computed; int8 or int4, integers that share "
                "scales; fp8, E4M3 floats that share scales; int8-sq, inputs of products too, by --algorithm "
                "smoothquant; fp8-sq, inputs of products too, by --algorithm gptq-fp8. [default: the target's]",
                "--max-batch INTEGER Rows that run together. [default: 1]",
                "--kv-precision TEXT auto, fp32, fp16, bf16, int8: the KV cache; auto is the compute type; int8 is for "
                "cpu, and for tensorrt's attention plugin. [default: auto]",
            ),
        ),
        ("plan", ("--kv-precision TEXT auto, fp32, fp16, bf16, int8: the KV cache. [default: auto]",)),
    ],
)
def test_help_tells_what_the_tables_of_builds_hold(run: Run, verb: str, lines: tuple[str, ...]) -> None:
    text = " ".join(run(verb, "--help").stdout.split())
    assert [line for line in lines if line not in text] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_two_examples_and_its_line_in_the_list(run: Run, verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    body = result.stdout.partition("\n\n")[2]
    examples = [line for line in body.splitlines() if line.strip().startswith(("qwen-aot ", "build-engine ", "cat "))]
    assert len(examples) == 2
    assert body.strip().splitlines()[0].rstrip(".") in VERBS[verb].help
    assert "Examples:" in body


def test_no_verb_shows_help(run: Run) -> None:
    result = run()
    assert "Commands:" in result.output
    assert "Traceback" not in result.output


def test_version(run: Run) -> None:
    from qwen_aot.version import __version__

    assert run("--version").stdout == f"qwen-aot, version {__version__}\n"


def test_build_engine_is_build() -> None:
    done = python(
        "import sys\n"
        "from qwen_aot.runtime.cli.main import build_engine_main\n"
        "sys.argv[1:] = ['-h']\n"
        "build_engine_main()"
    )
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: build-engine [OPTIONS] CHECKPOINT")


def test_a_closed_pipe_is_quiet(bundle: Path) -> None:
    process = subprocess.Popen(
        [*QWEN_AOT, "inspect", str(bundle), "--json"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == f"checking {bundle} ...\n".encode()
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.parametrize(
    "stage",
    ["write weights", "load check", *(pytest.param(stage, marks=pytest.mark.deep) for stage in ("trace", "hash"))],
)
def test_a_killed_build_leaves_the_old_bundle_and_the_next_one_cleans_up(
    checkpoint: Path, bundle: Path, tmp_path: Path, stage: str
) -> None:
    out = shutil.copytree(bundle, tmp_path / "bundle")
    process = subprocess.Popen(
        [*QWEN_AOT, "build", str(checkpoint), "-o", str(out), "--precision", "int8"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if f"{stage} ..." in line:
            break
    process.kill()
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    assert load_bundle(out).manifest.engines.text.precision == "fp32"
    with BundleWriter(out) as writer:
        assert list(writer.folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert load_bundle(out).manifest.engines.text.precision == "fp32"


# After Ctrl-C CPython ends by the signal itself if it struck inside an exec() of text (dataclasses); a shell sees 130.
@pytest.mark.parametrize(
    ("number", "codes", "message"),
    [(signal.SIGINT, {130, -signal.SIGINT}, "interrupted"), (signal.SIGTERM, {143}, "terminated")],
)
def test_a_stopped_build_leaves_what_stood_before(
    checkpoint: Path, tmp_path: Path, number: int, codes: set[int], message: str
) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    process = subprocess.Popen(
        [*QWEN_AOT, "build", str(checkpoint), "-o", str(out), "--precision", "fp32"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell, as this test may be, inherits "ignore SIGINT" and would hand it on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "trace ..." in line:
            break
    time.sleep(0.2)
    os.kill(process.pid, number)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() in codes
    assert rest.splitlines()[-1] == message
    assert "Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "qwen1.5-0.5b", "--random-weights", "-o", ""),
        ("build", "", "-o", "out"),
        ("export", "qwen1.5-0.5b", "-o", ""),
        ("gpu-check", "-o", ""),
        ("generate", "", "--prompt", "x"),
        ("chat", ""),
        ("bench", ""),
        ("inspect", ""),
        ("verify", "", "--reference", "x"),
        ("compare", "", "--reference", "x"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_empty_path_is_not_the_current_folder(
    arguments: tuple[str, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "is empty (a variable that isn't set?); give a path" in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []
