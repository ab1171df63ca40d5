"""Makes a wheel of a built library, so that a device installs the plugins with pip: no compiler, no Triton.

`python -m qwen_aot.plugins.wheel LIBRARY -o FOLDER`. The wheel installs one package, `qwen_aot_plugins`, with the
library in it, where `runtime.bundle.plugin_library` finds it. Its tag names the processor, and the glibc that the
library needs.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qwen_aot.errors import BuildError
from qwen_aot.runtime.bundle.plugin_library import (
    PLUGIN_DISTRIBUTION,
    PLUGIN_LIBRARY,
    PLUGIN_PACKAGE,
    library_machine,
)
from qwen_aot.version import __version__

_GLIBC = re.compile(rb"\0GLIBC_(\d+)\.(\d+)(?=[.\0])")  # versions of symbols, in the table of names
_OLDEST_GLIBC = (2, 17)  # of manylinux tags for both processors (PEP 599)

_PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "{version}"
description = "TensorRT plugins of qwen-aot, compiled"
license = "Apache-2.0"
requires-python = ">=3.10"

[tool.setuptools]
packages = ["{package}"]

[tool.setuptools.package-data]
"*" = ["*.so"]
"""


def platform_tag(library: Path) -> str:
    """Where a library runs, as a wheel says it: manylinux_2_34_aarch64 for example (PEP 600).

    Raises:
        BuildError: it isn't a library, or of no processor that TensorRT runs on.
    """
    machine = library_machine(library)
    if " " in machine:
        raise BuildError(f"{library} is for {machine}; accepted: x86_64, aarch64")
    needed = [(int(major), int(minor)) for major, minor in _GLIBC.findall(library.read_bytes())]
    major, minor = max([_OLDEST_GLIBC, *needed])
    return f"manylinux_{major}_{minor}_{machine}"


def make_wheel(library: Path, folder: Path) -> Path:
    """Writes the wheel into a folder, in the place of an earlier one of its name.

    Args:
        library: as `plugins.library` built it, for this processor or another.
        folder: made if it isn't there.

    Raises:
        BuildError: it isn't a library, or the wheel can't be made.
    """
    tag = platform_tag(library)
    with tempfile.TemporaryDirectory() as scratch:
        project, built = Path(scratch) / "project", Path(scratch) / "dist"
        package = project / PLUGIN_PACKAGE
        package.mkdir(parents=True)
        (project / "pyproject.toml").write_text(
            _PROJECT.format(name=PLUGIN_DISTRIBUTION, version=__version__, package=PLUGIN_PACKAGE), encoding="utf-8"
        )
        (package / "__init__.py").write_text('"""The compiled TensorRT plugins of qwen-aot."""\n', encoding="utf-8")
        shutil.copyfile(library, package / PLUGIN_LIBRARY)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
        options = ["--config-settings", f"--build-option=--plat-name={tag}", "--wheel-dir", str(built), str(project)]
        done = subprocess.run([*pip, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise BuildError(f"pip couldn't make the wheel:\n{done.stdout.strip()}")
        (wheel,) = built.glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{wheel.name}.part"
        shutil.copyfile(wheel, part)
        return part.replace(folder / wheel.name)


def main() -> int:
    """The command line. Exit codes: 0 ok, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_aot.plugins.wheel",
        description="Make a wheel of a built library of the plugins.",
        epilog="Examples:\n  python -m qwen_aot.plugins.wheel build/plugins/libqwen_aot_plugins.so -o dist",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("library", type=Path, help=f"{PLUGIN_LIBRARY}, as plugins.library writes it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    try:
        print(make_wheel(arguments.library, arguments.output))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or arguments.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
