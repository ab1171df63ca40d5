from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench import compare, plugin_kernels, speculation
from tests.bench.results import write_new


@pytest.mark.parametrize(
    ("parse", "needed"),
    [
        (compare.parse, ["--bundle", "a"]),
        (plugin_kernels.parse, ["--model", "qwen1.5-0.5b"]),
        (speculation.parse, ["bundle"]),
    ],
    ids=["compare", "plugin_kernels", "speculation"],
)
def test_results_that_stand_there_are_kept(
    parse: Callable[[list[str]], object], needed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text("of last week")
    with pytest.raises(SystemExit):
        parse([*needed, "--json", str(path)])
    assert "results.json exists already; give another name" in capsys.readouterr().err
    assert path.read_text() == "of last week"


def test_results_that_came_meanwhile_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_new(path, {"a": 1})
    assert path.read_text() == '{"a": 1}'
    with pytest.raises(FileExistsError):
        write_new(path, {"a": 2})
    assert path.read_text() == '{"a": 1}'
