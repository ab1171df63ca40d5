"""A type checker's view of the installed package: every name of the face has its type, and misuse is reported."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.installed.environments import run

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
REVEALED = {
    'qwen_aot.load("bundle")': "qwen_aot.runtime.generation.generator.Generator",
    'qwen_aot.build_bundle("c", qwen_aot.BuildSpec(), "b")': "qwen_aot.engines.bundle.build_report.BuildReport",
    'qwen_aot.open_checkpoint("c")': "qwen_aot.exporter.checkpoint.base.Checkpoint",
    "qwen_aot.GenerationConfig().temperature": "float",
    'qwen_aot.load("bundle").generate("a", max_new_tokens=3)': "qwen_aot.runtime.generation.request.Completion",
    'qwen_aot.load("bundle").generate([1, 2])': "qwen_aot.runtime.generation.request.Completion",
    'qwen_aot.load("bundle").generate(["a"])[0]': "qwen_aot.runtime.generation.request.Completion",
    'qwen_aot.load("bundle").generate([[1], [2]])[0]': "qwen_aot.runtime.generation.request.Completion",
    'qwen_aot.load("bundle").generate("a", n=2)[0]': "qwen_aot.runtime.generation.request.Completion",
    'qwen_aot.load("bundle").generate(["a"], n=2)[0][0]': "qwen_aot.runtime.generation.request.Completion",
    'qwen_aot.load("bundle").chat([])': "qwen_aot.runtime.generation.request.Completion",
    'qwen_aot.load("bundle").chat([], n=2)[0]': "qwen_aot.runtime.generation.request.Completion",
    'qwen_aot.GenerationService(qwen_aot.load("b")).submit("a").result()': (
        "qwen_aot.runtime.generation.request.Completion"
    ),
    "qwen_aot.__version__": "str",
}
WRONG = {
    "qwen_aot.load(3)": "arg-type",
    'qwen_aot.load("bundle").token_count': "attr-defined",
    'qwen_aot.load("bundle").generate("a", max_tokens=3)': "call-overload",
    'qwen_aot.load("bundle").generate("a", top_p="high")': "call-overload",
    'qwen_aot.build_bundle("c", "int4", "b")': "arg-type",
    "qwen_aot.build_bundel": "attr-defined",
    "qwen_aot.GenerationConfig(temprature=1.0)": "call-arg",
}


@pytest.fixture(scope="module")
def output(device: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What `mypy --strict` says about a user's two scripts; the first line of each is an import."""
    folder = tmp_path_factory.mktemp("types")
    lines = "".join(f"reveal_type({expression})\n" for expression in REVEALED)
    (folder / "right.py").write_text(f"import qwen_aot\n{lines}")
    lines = "".join(f"{expression}\n" for expression in WRONG)
    (folder / "wrong.py").write_text(f"import qwen_aot\n{lines}")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", device, "--no-pretty")
    done = run(*mypy, "--config-file=", "--cache-dir", folder / "cache", "right.py", "wrong.py", "page.py", cwd=folder)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_examples_of_the_docs_are_typed(output: list[str]) -> None:
    assert [line for line in output if line.startswith("page.py")] == []
    assert output[-1].endswith("(checked 3 source files)")


def test_names_have_their_types(output: list[str]) -> None:
    about = [line for line in output if line.startswith("right.py")]
    for number, (line, expected) in enumerate(zip(about, REVEALED.values(), strict=True), start=2):
        assert line == f'right.py:{number}: note: Revealed type is "{expected}"'


def test_wrong_uses_are_reported(output: list[str]) -> None:
    about = [line for line in output if line.startswith("wrong.py") and ": error: " in line]
    found = {(line.split(":")[1], line.rpartition("[")[2]) for line in about}  # of an overload there are two
    assert found == {(str(number), f"{code}]") for number, code in enumerate(WRONG.values(), start=2)}, about
