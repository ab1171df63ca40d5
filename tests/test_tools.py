"""A missing tool skips in the first part of CI and fails in the second; a tool that is there does neither."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import DEEP, SECOND_PART, is_deep, lacking, require_package, require_tool

pytestmark = pytest.mark.tools

ROOT = Path(__file__).parents[1]
SKIPPED, FAILED = pytest.skip.Exception, pytest.fail.Exception


@pytest.fixture(params=["", "1"], ids=["first part", "second part"])
def raised(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    """What a missing tool raises in each part of CI."""
    monkeypatch.setenv(DEEP, request.param)
    return FAILED if request.param else SKIPPED


def test_what_is_lacking_is_named(raised: type[BaseException]) -> None:
    with pytest.raises(raised, match=r"^no card"):
        lacking("no card")


def test_a_missing_tool_is_named_with_its_remedy(raised: type[BaseException]) -> None:
    with pytest.raises(raised, match="no-such-tool or nor-this isn't installed: apt install it"):
        require_tool("no-such-tool", "nor-this", remedy="apt install it")


@pytest.mark.usefixtures("raised")
def test_a_tool_that_is_there_is_found(tmp_path: Path) -> None:
    assert Path(require_tool("no-such-tool", "sh", remedy="")).name == "sh"
    tool = tmp_path / "rare-tool"
    tool.touch(mode=0o755)
    assert require_tool("rare-tool", remedy="", path=str(tmp_path)) == str(tool)


def test_a_missing_package_is_named_with_its_remedy(raised: type[BaseException]) -> None:
    for module in ("no_such_package", "no_such_package.part", "json.no_such_part"):
        with pytest.raises(raised, match=f"^{module} isn't installed: pip install it"):
            require_package(module, "pip install it")


@pytest.mark.usefixtures("raised")
def test_a_package_that_is_there_is_given() -> None:
    assert require_package("json", "") is sys.modules["json"]


@pytest.mark.usefixtures("raised")
@pytest.mark.parametrize(
    ("code", "error"), [("import no_such_package", ModuleNotFoundError), ("raise ImportError('damaged')", ImportError)]
)
def test_a_package_that_fails_to_import_is_no_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: type[Exception]
) -> None:
    (tmp_path / "package_of_this_test.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error):
        require_package("package_of_this_test", "")


@pytest.mark.parametrize(
    ("value", "code"), [("", pytest.ExitCode.NO_TESTS_COLLECTED), ("1", pytest.ExitCode.INTERRUPTED)]
)
def test_a_module_that_lacks_its_package(tmp_path: Path, value: str, code: pytest.ExitCode) -> None:
    """While it is collected, as most do: skipped whole, or an error that ends the run."""
    (tmp_path / "test_of_this_test.py").write_text(
        "from tests.tools import require_package\n"
        "require_package('no_such_package', 'pip install it')\n"
        "def test_it(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "test_of_this_test.py"]
    environment = {**os.environ, DEEP: value}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert "no_such_package isn't installed: pip install it" in done.stdout


@pytest.mark.parametrize("value", ["0", "yes", " "])
def test_another_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(DEEP, value)
    with pytest.raises(pytest.UsageError, match=f"{DEEP} is '{value}'; accepted: 1, or unset"):
        is_deep()


def test_no_test_asks_for_a_package_in_another_way() -> None:
    """But those on a GPU, which .ci/deep doesn't run."""
    tests = Path(__file__).parent
    asking = {path for path in tests.rglob("*.py") if "importorskip(" in path.read_text(encoding="utf-8")}
    assert {path.relative_to(tests).parts[0] for path in asking - {Path(__file__)}} == {"gpu"}


ASKING = """
import pytest
from tests.tools import lacking, require_package, require_tool
MARK

@pytest.fixture
def tool():
    require_tool("sh", remedy="")

def test_by_a_fixture(tool): pass
def test_a_package(): require_package("json", "")
def test_a_thing(): lacking("no card")
"""


def test_a_test_that_the_second_part_does_not_run_may_not_ask(tmp_path: Path) -> None:
    """Even where the tool is there, so that this is seen on every machine."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_runtest_protocol\n")
    for marker in (*SECOND_PART, "trt"):
        (tmp_path / f"test_{marker}.py").write_text(ASKING.replace("MARK", f"pytestmark = pytest.mark.{marker}"))
    (tmp_path / "test_unmarked.py").write_text(ASKING.replace("MARK", ""))
    command = [sys.executable, "-m", "pytest", "-rA", "--no-fold-skipped", "-p", "no:cacheprovider"]
    environment = {**os.environ, DEEP: "", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command += ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = re.findall(r"^(PASSED|SKIPPED|FAILED|ERROR) test_(\w+)\.py", done.stdout, flags=re.MULTILINE)
    wanted = [(outcome, marker) for marker in SECOND_PART for outcome in ("PASSED", "PASSED", "SKIPPED")]
    wanted += [(outcome, file) for file in ("trt", "unmarked") for outcome in ("ERROR", "FAILED", "FAILED")]
    assert sorted(found) == sorted(wanted), done.stdout
    assert f"and .ci/deep doesn't run it; mark it with one of {', '.join(SECOND_PART)}" in done.stdout


def test_the_second_part_runs_those_markers() -> None:
    expression = f'-m "({" or ".join(SECOND_PART)}) and not gpu"'
    assert expression in (ROOT / ".ci" / "deep").read_text(encoding="utf-8")
    assert expression in (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
