"""Every module has one import name, `qwen_aot.*`: the names of the folders alone are banned, and nothing uses them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import lacking, require_tool

ROOT = Path(__file__).parents[1]
FOLDERS = ("engines", "exporter", "plugins", "runtime")

_NAMES = rf"(?:{'|'.join(FOLDERS)}|qwen_aot_errors)\b"
# At the start of a line, a prompt's, a string's or a command's; what follows tells a statement from prose.
_BARE_IMPORT = re.compile(
    rf"""(?:^|[>"'`;(])[ \t]*(?:from[ ]+{_NAMES}[\w.]*[ ]+import\b"""
    rf"""|import[ ]+(?:[\w.]+(?:[ ]+as[ ]+\w+)?,[ ]*)*{_NAMES}[\w.]*[ ]*(?:$|as\b|[,;#"'`\\)]))"""
    rf"""|python3?[ ]+-m[ ]+{_NAMES}|\bqwen_aot_errors\b""",
    re.MULTILINE,
)


def bare_imports(text: str) -> list[str]:
    """Lines that import a folder of the project, or run a module of one, by its bare name."""
    lines = text.split("\n")
    return [lines[text.count("\n", 0, match.end())] for match in _BARE_IMPORT.finditer(text)]


def check_with_ruff(line: str) -> subprocess.CompletedProcess[str]:
    """Ruff's verdict on the names that this file of the package would import, by the project's configuration."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--ignore", "F,I", "--stdin-filename"]
    text = f'"""A module."""\n\n{line}\n'
    return subprocess.run(
        [*command, "runtime/scratch.py", "-"], cwd=ROOT, input=text, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("statement", ["import {}", "from {} import x", "from {}.y import x", "import {}.y as y"])
def test_ruff_bans_the_bare_names(name: str, statement: str) -> None:
    done = check_with_ruff(statement.format(name))
    assert done.returncode == 1
    assert "TID251" in done.stdout and f"import qwen_aot.{name}" in done.stdout


@pytest.mark.parametrize("name", FOLDERS)
def test_ruff_lets_the_full_names_through(name: str) -> None:
    done = check_with_ruff(f"import qwen_aot.{name}\nfrom qwen_aot import {name}\nfrom qwen_aot.{name} import x")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [*FOLDERS, "qwen_aot_errors"])
@pytest.mark.parametrize(
    "statement",
    [
        "import {}",
        "    import {}.build as build",
        "import json, {}",
        "import json as j, {}, sys",
        "from {} import x",
        "    from {}.y.z import x, y",
        ">>> import {}",
        'python -c "import {}.y; y.go()"',
        "code = 'from {} import x'",
        "import os; import {}  # noqa",
    ],
)
def test_bare_imports_are_found(name: str, statement: str) -> None:
    line = statement.format(name)
    assert set(bare_imports(f"a line\n{line}\nanother\n")) == {line}


@pytest.mark.parametrize(
    "text",
    [
        "import qwen_aot.engines",
        "from qwen_aot import engines",
        "from qwen_aot.engines.build import build_bundle",
        "import runtime_tables",
        "from . import engines",
        "build verbs\nimport engines and exporter inside their functions",
        "what comes from runtime is typed",
        "python -m qwen_aot.plugins.library",
    ],
)
def test_other_lines_are_not_taken_for_bare_imports(text: str) -> None:
    assert bare_imports(text) == []


@pytest.mark.tools
def test_no_file_has_a_bare_import() -> None:
    git = require_tool("git", remedy="apt install git")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        lacking(f"git knows no files of this checkout: {listed.stderr.strip()}")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name and ROOT / name != Path(__file__)]
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}
    assert {ROOT / "README.md", ROOT / "docs" / "architecture.md", ROOT / "engines" / "build.py"} <= set(texts)
    assert {str(path.relative_to(ROOT)): lines for path, text in texts.items() if (lines := bare_imports(text))} == {}
