"""The device side of the command line works where there is nothing that builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from qwen_aot.runtime.bundle.plugin_library import PLUGIN_LIBRARY_VARIABLE
from qwen_aot.runtime.cli.main import VERBS

DEVICE_VERBS = ("generate", "chat", "serve", "bench", "inspect", "doctor")
BUILD_SIDE = ("qwen_aot.exporter", "qwen_aot.engines")
BUILD_PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "gguf", "ml_dtypes", "safetensors")

BLOCK = f"""
import importlib.abc, runpy, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        for blocked in {(*BUILD_SIDE, *BUILD_PACKAGES)}:
            if name == blocked or name.startswith(blocked + "."):
                raise AssertionError(f"the device side imports {{name}}")

sys.meta_path.insert(0, Blocker())
"""


def blocked(code: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs code in a process that can import none of what builds."""
    command = [sys.executable, "-c", BLOCK + code, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != PLUGIN_LIBRARY_VARIABLE}
    return subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, check=False)


def run_blocked(arguments: Sequence[object], stdin: str = "") -> subprocess.CompletedProcess[str]:
    code = "from qwen_aot.runtime.cli.main import qwen_aot; qwen_aot.main(prog_name='qwen-aot')"
    return blocked(code, *map(str, arguments), stdin=stdin)


@pytest.mark.parametrize(
    ("arguments", "stdin", "shown"),
    [
        (("generate", "BUNDLE", "--prompt", "The bridge", "--max-new-tokens", "4", "--json"), "", '"finish_reason"'),
        (("chat", "BUNDLE", "--max-new-tokens", "4"), "hello\n", "ended by"),
        (("bench", "BUNDLE", "--prompt-tokens", "8", "--gen-tokens", "4", "--rounds", "1"), "", "peak memory"),
        (("inspect", "BUNDLE"), "", "sha256"),
        (("doctor",), "", "cpu build"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_device_verb_runs_without_what_builds(
    bundle: Path, arguments: tuple[str, ...], stdin: str, shown: str
) -> None:
    assert arguments[0] in DEVICE_VERBS
    done = run_blocked([bundle if argument == "BUNDLE" else argument for argument in arguments], stdin)
    assert (done.returncode, shown in done.stdout) == (0, True), done.stderr


def test_doctor_reports_every_target_without_what_builds() -> None:
    done = run_blocked(["doctor", "--json"])
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert set(facts["targets"]) == {"cpu", "cuda", "tensorrt-rtx", "tensorrt"}
    assert any("plugin" in text for text in facts["targets"]["tensorrt"]["build_lacks"])


@pytest.mark.parametrize("verb", VERBS)
def test_no_verbs_module_imports_what_builds(verb: str) -> None:
    done = blocked(f"import {VERBS[verb].module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", DEVICE_VERBS)
def test_a_device_verbs_help_imports_nothing_that_builds(verb: str) -> None:
    done = run_blocked([verb, "--help"])
    assert done.returncode == 0, done.stderr


def test_the_server_imports_nothing_that_builds() -> None:
    done = blocked("import qwen_aot.runtime.server.lifecycle, qwen_aot.runtime.server.app")
    assert done.returncode == 0, done.stderr


def test_no_verb_imports_what_serves_or_asks_when_it_is_imported() -> None:
    """The extras `serve` and `bench` are for one verb each; and their help needs nothing of it."""
    modules = [verb.module for verb in VERBS.values()]
    code = f"""
import importlib, sys
for name in {modules}: importlib.import_module(name)
import qwen_aot.runtime.generation.service
print(sorted(set(sys.modules) & {{"starlette", "uvicorn", "h11", "llguidance", "prometheus_client", "anyio", "httpx"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_blocker_sees_a_verb_that_builds(tmp_path: Path) -> None:
    done = run_blocked(["build", "qwen1.5-0.5b", "--random-weights", "-o", tmp_path / "out"])
    assert done.returncode != 0
    assert "AssertionError: the device side imports qwen_aot.engines" in done.stderr
    done = blocked("import torch")
    assert "AssertionError: the device side imports torch" in done.stderr


def test_inspect_reads_a_checkpoint_with_the_exporter(checkpoint: Path) -> None:
    """What a device has no use for; the one build-side part of a device verb."""
    done = run_blocked(["inspect", checkpoint])
    assert "AssertionError: the device side imports qwen_aot.exporter" in done.stderr
