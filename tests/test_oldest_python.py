"""That the sources run on Python 3.10, which JetPack 6 has: nothing newer of the language or the standard library.

No such Python is needed: vermin reads the sources, and mypy checks them as 3.10's wherever it runs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import vermin

ROOT = Path(__file__).parents[1]
FOLDERS = ("exporter", "engines", "runtime", "plugins", "src/qwen_aot")
OLDEST = (3, 10)
# It stands behind a comparison with `sys.version_info`, which vermin doesn't follow; mypy does.
BEHIND_A_VERSION = ("src/qwen_aot/str_enum.py",)


SUBSCRIPTED_LATER = ("StreamHandler", "LoggerAdapter")  # `logging.StreamHandler[...]`: vermin and mypy let it pass


def too_new(source: str) -> list[str]:
    """What of a module needs a newer Python than OLDEST: a line each."""
    config = vermin.Config()
    config.set_verbose(3)  # as many as there are, each with its line
    config.add_exclusion("long")  # a tensor's method; vermin thinks of Python 2
    found = vermin.visit(source, config)
    if isinstance(found, list):  # of a source that this Python can't parse either
        return [f"syntax of Python {found}"]
    lines = [line for line in found.output_text().splitlines() if line]
    subscripted = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Subscript)]
    lines += [f"3.11 {ast.unparse(value)}[]" for value in subscripted if ast.unparse(value).endswith(SUBSCRIPTED_LATER)]
    return [line for line in lines if any(newer(version) for version in re.findall(r"\b3\.\d+", line))]


def newer(version: str) -> bool:
    return tuple(int(number) for number in version.split(".")) > OLDEST


def sources() -> Iterable[Path]:
    for folder in FOLDERS:
        pattern = "*.py" if folder.startswith("src") else "**/*.py"  # whose links lead to the other folders
        yield from sorted((ROOT / folder).glob(pattern))


def test_nothing_needs_a_newer_python() -> None:
    found = {str(path.relative_to(ROOT)): too_new(path.read_text()) for path in sources()}
    assert {path: lines for path, lines in found.items() if lines and path not in BEHIND_A_VERSION} == {}
    assert all(found[path] for path in BEHIND_A_VERSION)
    assert len(found) > 400


@pytest.mark.parametrize(
    "source",
    [
        "from enum import StrEnum",
        "import asyncio\nasync def f():\n    async with asyncio.timeout(1):\n        pass",
        "import hashlib\nhashlib.file_digest(None, 'sha256')",
        "try:\n    pass\nexcept* ValueError:\n    pass",
        "import tomllib",
        "import sys\nsys.exception()",
        "import logging\nclass It(logging.StreamHandler[str]):\n    pass",
    ],
)
def test_what_is_newer_is_noticed(source: str) -> None:
    assert too_new(source)
    assert not too_new("import asyncio\nfrom enum import Enum\nmatch 1:\n    case 1:\n        pass")


def test_mypy_checks_for_the_oldest() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    oldest = ".".join(map(str, OLDEST))
    assert f'python_version = "{oldest}"' in text
    assert f'requires-python = ">={oldest},' in text
    assert f'target-version = "py{oldest.replace(".", "")}"' in text
