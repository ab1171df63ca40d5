"""The installed package on a device: no torch, no onnx, whatever lies beside a user's script."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import qwen_aot
from qwen_aot.runtime.capi.build import find_cmake
from tests.installed.environments import NEIGHBOUR, run
from tests.runtime.texts import GOLDEN
from tests.runtime.toys import ALL_INPUTS, checksum, checksum_model, io_tables, make_manifest, write_bundle

VOCABULARY = 400  # of the model; the tokenizer has fewer, as in Qwen
NEEDS_BUILD = {"BuildReport", "build_bundle", "open_checkpoint"}
OWN_FOLDERS = ("engines", "exporter", "plugins", "runtime")


def python(device: Path, code: str, cwd: Path) -> str:
    done = run(device, "-c", code, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A user's folder with modules that are named like the project's folders; importing one is an error."""
    folder = tmp_path / "own"
    for name in OWN_FOLDERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise ZeroDivisionError('the own {name}')\n")
    for name in ("errors", "extras", "version"):
        (folder / f"{name}.py").write_text(f"raise ZeroDivisionError('the own {name}')\n")
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The checksum model, with a tokenizer whose ids fit its vocabulary."""
    inputs, outputs = io_tables(ALL_INPUTS, "float32", vocab_size=VOCABULARY)
    document = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    document["added_tokens"] = []
    texts = {"tokenizer.json": json.dumps(document), "generation_config.json": '{"max_new_tokens": 5}'}
    manifest = make_manifest(inputs=inputs, outputs=outputs, vocab_size=VOCABULARY)
    return write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs, VOCABULARY), manifest, texts)


def continuation(prompt: list[int], count: int) -> list[int]:
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(checksum(sequence))
    return sequence[len(prompt) :]


def test_the_device_has_what_the_runtime_needs_and_no_more(device: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u\n"
        "print([n for n in ('torch', 'onnx', 'onnx_ir', 'ml_dtypes', 'transformers', 'pytest') if u.find_spec(n)])\n"
        "import qwen_aot, onnxruntime; print(qwen_aot.__file__)"
    )
    found, home = python(device, code, tmp_path).splitlines()
    assert found == "[]"
    assert Path(home).is_relative_to(device.parents[1])


def test_every_name_is_there(device: Path, tmp_path: Path) -> None:
    code = (
        "from qwen_aot import *\n"
        "import qwen_aot\n"
        "print(sorted(set(qwen_aot.__all__) - set(globals())), dir(qwen_aot) == sorted(qwen_aot.__all__))\n"
        "print([name for name in dir(qwen_aot) if not hasattr(qwen_aot, name)], hasattr(qwen_aot, 'build_bundel'))"
    )
    assert python(device, code, tmp_path) == "[] True\n[] False\n"


def test_help_shows_every_name(device: Path, tmp_path: Path) -> None:
    text = python(device, "import pydoc, qwen_aot; print(pydoc.plain(pydoc.render_doc(qwen_aot)))", tmp_path)
    listed = {line.split()[1].split("(")[0] for line in text.splitlines() if line.startswith("    class ")}
    functions = {"draw_boxes", "find_boxes", "load", "open_picture"}
    aliases = {"Event", "EventStream", "Message", "Prompt"}
    assert listed == set(qwen_aot.__all__) - aliases - {"__version__"} - functions  # stand-ins are classes
    assert [name for name in aliases if f"    {name} = " not in text] == []
    assert "    load = open(path: 'str | Path'" in text and f"VERSION\n    {qwen_aot.__version__}\n" in text
    assert "pip install 'qwen-aot[build]'" in text


def test_what_needs_the_build_extra_says_so_when_it_is_used(device: Path, tmp_path: Path) -> None:
    code = (
        "import qwen_aot\n"
        f"for name in {sorted(NEEDS_BUILD)}:\n"
        "    assert not isinstance(name, getattr(qwen_aot, name) if name == 'BuildReport' else int)\n"
        "    try:\n"
        "        getattr(qwen_aot, name)('checkpoint', out='bundle')\n"
        "    except qwen_aot.BuildError as error:\n"
        "        print(error)"
    )
    lines = python(device, code, tmp_path).splitlines()
    for name, line in zip(sorted(NEEDS_BUILD), lines, strict=True):
        assert line.startswith(f"qwen_aot.{name} needs the package '"), line
        assert line.endswith("', which isn't installed; install it with `pip install 'qwen-aot[build]'`"), line


def test_every_other_name_is_the_real_one(device: Path, tmp_path: Path) -> None:
    code = (
        "import json, qwen_aot\n"
        "names = set(qwen_aot.__all__) - {'__version__'}\n"
        "print(json.dumps([name for name in names if getattr(qwen_aot, name).__module__ == 'qwen_aot']))"
    )
    assert set(json.loads(python(device, code, tmp_path))) == NEEDS_BUILD


@pytest.mark.parametrize("command", [("bin/qwen-aot",), ("bin/python", "-m", "qwen_aot")], ids=["script", "module"])
def test_the_command_line(device: Path, own_folder: Path, command: tuple[str, ...]) -> None:
    first, *rest = command
    program = (device.parents[1] / first, *rest)
    version = run(*program, "--version", cwd=own_folder)
    assert (version.returncode, version.stdout) == (0, f"qwen-aot, version {qwen_aot.__version__}\n")
    text = run(*program, "--help", cwd=own_folder)
    assert text.returncode == 0 and text.stdout.startswith("Usage: qwen-aot [OPTIONS] COMMAND"), text


def test_build_engine_names_the_extra(device: Path, own_folder: Path) -> None:
    done = run(device.parent / "build-engine", "qwen1.5-0.5b", "--random-weights", "-o", "bundle", cwd=own_folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: this command needs the package '")
    assert done.stderr.endswith("install it with `pip install 'qwen-aot[build]'`\n")
    assert done.stderr.count("\n") == 1
    assert not (own_folder / "bundle").exists()


def test_modules_of_a_user_named_like_our_folders(device: Path, own_folder: Path, bundle: Path) -> None:
    """The package generates where they lie on the path in front of it, and they are still theirs."""
    (own_folder / "script.py").write_text(
        "import json, sys\n"
        "import qwen_aot\n"
        "with qwen_aot.load(sys.argv[1], threads=1) as generator:\n"
        "    (completion,) = generator.generate([[1, 2, 3]])\n"
        "print(json.dumps(completion.token_ids))\n"
    )
    done = run(device, "script.py", bundle, cwd=own_folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == continuation([1, 2, 3], 5)
    generated = run(device.parent / "qwen-aot", "generate", bundle, "--prompt", "a", "--json", cwd=own_folder)
    assert generated.returncode == 0, generated.stderr
    for name in OWN_FOLDERS:
        with pytest.raises(subprocess.CalledProcessError):
            run(device, "-c", f"import {name}", cwd=own_folder).check_returncode()


def test_a_distribution_with_the_names_of_our_folders(device: Path, tmp_path: Path, bundle: Path) -> None:
    """It was installed in front of the wheel: its files are as they were, and both work."""
    (packages,) = device.parents[1].glob("lib/python*/site-packages")
    assert {name: (packages / name).read_text() for name in NEIGHBOUR} == NEIGHBOUR
    theirs = [f"{name.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}" for name in NEIGHBOUR][1:]
    code = f"import {', '.join(theirs)}, qwen_aot\nqwen_aot.load({str(bundle)!r}).close()\n"
    code += f"print({', '.join(f'{name}.OWNER' for name in theirs)})"
    assert python(device, code, tmp_path) == "somebody else somebody else\n"


@pytest.mark.deep
def test_the_c_library_is_built_from_the_wheel(device: Path, own_folder: Path, tmp_path: Path) -> None:
    """With a compiler and cmake; a device's own environment has no cmake, so that the tests' is put on the path."""
    cmake = tmp_path / "tools" / "cmake"
    cmake.parent.mkdir()
    cmake.symlink_to(find_cmake())
    command = f'PATH="{cmake.parent}:$PATH" exec "$0" capi --prefix "$1" --jobs 2 --json'
    done = run("sh", "-c", command, device.parent / "qwen-aot", tmp_path / "a prefix", cwd=own_folder)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert "[2/4] compile" in done.stderr
    program = own_folder / "program.c"
    program.write_text(
        "#include <qwen_aot.h>\n#include <stdio.h>\nint main(void) { puts(qwen_aot_version()); return 0; }\n"
    )
    include = Path(printed["header"]).parent
    built = run("gcc", program, f"-I{include}", printed["static"], "-ldl", "-lm", "-pthread", cwd=own_folder)
    assert built.returncode == 0, built.stderr
    assert run(own_folder / "a.out", cwd=own_folder).stdout == f"{qwen_aot.__version__}\n"
