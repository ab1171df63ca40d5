"""Every shell command in README.md and docs/ names verbs, options, extras, modules and files that exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import tomllib

from qwen_aot.runtime.cli.main import VERBS, qwen_aot
from qwen_aot.version import __version__

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
PYTHON = re.compile(r"(\.venv/bin/)?python3?")
OURS = re.compile(r"(?:qwen-aot|build-engine|python3? -m (?:qwen_aot|tests)\S*) ")


def blocks(text: str) -> Iterator[str]:
    """The lines of every shell block, those that end in a backslash joined with the next."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from filter(None, map(str.strip, block.replace("\\\n", " ").splitlines()))


def spans(text: str) -> Iterator[str]:
    """Our own commands in running text."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", outside):
        line = " ".join(span.split())
        if OURS.match(f"{line} "):
            yield line


def commands() -> list[object]:
    return [
        pytest.param(line, id=f"{path.name}: {line[:60]}")
        for path in DOCUMENTS
        for text in [path.read_text(encoding="utf-8")]
        for line in dict.fromkeys([*blocks(text), *spans(text)])
    ]


def check(line: str) -> None:
    """Raises what is wrong with a command."""
    words = shlex.split(line, comments=True)
    program, arguments = words[0], words[1:]
    if program == "export":
        assert re.fullmatch(r"[A-Z_]+=.*", arguments[0])
    elif program == "sh":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
    elif program in ("qwen-aot", "build-engine"):
        check_ours(arguments if program == "qwen-aot" else ["build", *arguments])
    elif program == "pytest":
        check_pytest(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif PYTHON.fullmatch(program) and arguments[0] == "-m":
        check_module(arguments[1], arguments[2:])
    else:
        raise AssertionError(f"what is {program}?")


def check_ours(arguments: list[str]) -> None:
    """Verb, options, and values that don't name files."""
    if not arguments or arguments[0].startswith("-"):
        assert arguments[0] in ("--help", "--version") if arguments else True
        return
    verb, *rest = arguments
    context = click.Context(qwen_aot)
    command = qwen_aot.get_command(context, verb)
    assert command is not None, f"there is no verb {verb}; there are {', '.join(VERBS)}"
    values, _, order = command.make_parser(click.Context(command, info_name=verb)).parse_args([*rest])
    for parameter in order:
        given = values[parameter.name]
        if isinstance(parameter, click.Option) and isinstance(parameter.type, (click.Choice, click.types.IntParamType)):
            for value in given if parameter.multiple else [given]:
                parameter.type.convert(value, parameter, context)


def check_pip(arguments: list[str]) -> None:
    """Extras and local wheels; other projects aren't looked at."""
    assert arguments[0] in ("install", "uninstall", "wheel", "download"), arguments
    for argument in arguments[1:]:
        if found := re.fullmatch(r"(.*)\[(.*)\]", argument):
            place, extras = found.groups()
            # A release doesn't exist: the project is named by its clone or by a wheel of it.
            assert place in (".", f"qwen_aot-{__version__}-py3-none-any.whl"), place
            assert set(extras.split(",")) <= EXTRAS, extras
    assert not [
        argument for argument in arguments if re.match(r"qwen[-_]aot(?!(?:_plugins)?-[\d.]+\S*\.whl)", argument)
    ]


def check_pytest(arguments: list[str]) -> None:
    for argument in arguments:
        if argument.startswith("tests"):
            assert (ROOT / argument).exists(), argument


def check_module(module: str, arguments: list[str]) -> None:
    """A module that is there, and options that its source has."""
    if module == "pip":
        check_pip(arguments)
    elif module == "pytest":
        check_pytest(arguments)
    elif module != "venv":
        found = importlib.util.find_spec(module)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{module}.__main__")
        assert found is not None and found.origin is not None, module
        source = Path(found.origin).read_text(encoding="utf-8")
        for name in [word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)]:
            assert f'"{name}"' in source, f"{module} has no {name}"


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_documents(line: str) -> None:
    check(line)


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 40


@pytest.mark.parametrize(
    "line",
    [
        "qwen-aot fly bundle",
        "qwen-aot bench bundle --round 3 --rouns 2",
        "qwen-aot bench bundle --rounds many",
        "qwen-aot export x -o y --lowering fast",
        "build-engine x --percision int4",
        "sh scripts/nothing.sh",
        "pip install 'qwen-aot[cpu]'",
        "pip install qwen-aot",
        ".venv/bin/python -m pip install -e '.[gpu]'",
        "python -m qwen_aot.plugins.libary -o FOLDER",
        "python -m qwen_aot.plugins.library --smm 8.9",
        "pytest -m gpu tests/gpus",
        "make all",
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    with pytest.raises((AssertionError, click.ClickException, ModuleNotFoundError)):
        check(line)


def test_the_quick_start_ends_with_a_line_for_the_path_and_the_next_command() -> None:
    """As it is printed: what the shell makes of the script's last lines."""
    script = (ROOT / "scripts/quickstart.sh").read_text(encoding="utf-8")
    end = script[script.index("cat >&2 <<EOF") :]
    done = subprocess.run(["sh", "-c", end], cwd=ROOT, capture_output=True, text=True, check=True)
    path, command = [line.strip() for line in done.stderr.splitlines() if line.startswith("  ")]
    assert path == f'export PATH="{ROOT}/.venv/bin:$PATH"'
    check(command)
    assert shlex.split(command)[-1] == f"{ROOT}/bundles/smollm2"
    assert f"--output {Path(shlex.split(command)[-1]).relative_to(ROOT)}" in script
