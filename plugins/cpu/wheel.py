"""Puts the CPU's kernels into the project's wheel: `python -m qwen_aot.plugins.cpu.wheel WHEEL LIBRARY -o FOLDER`.

The wheel of any platform has their sources. This one has the library too, where the runtime finds it, and a tag of its
processor and the glibc that it needs: an index gives it to those whom it fits, and the other to everybody else.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qwen_aot.errors import BuildError
from qwen_aot.extras import install_command
from qwen_aot.plugins.cpu.build import FILE_NAME
from qwen_aot.plugins.wheel import platform_tag

_PLACE = Path("qwen_aot", "plugins", "cpu", "lib", FILE_NAME)  # in the wheel
_ANY = "-py3-none-any.whl"


def make_wheel(wheel: Path, library: Path, folder: Path) -> Path:
    """Writes the wheel with the library into a folder, in the place of an earlier one of its name.

    Args:
        wheel: of the project, for any platform.
        library: as `plugins.cpu.build` built it, for this processor or another.
        folder: made if it isn't there.

    Raises:
        BuildError: one of the files is none of those, or the wheel can't be made.
    """
    if not wheel.name.startswith("qwen_aot-") or not wheel.name.endswith(_ANY):
        raise BuildError(f"{wheel} isn't the project's wheel of any platform; accepted: qwen_aot-VERSION{_ANY}")
    if importlib.util.find_spec("wheel") is None:
        raise BuildError(f"wheels are made by the package wheel, which isn't installed: `{install_command('release')}`")
    tag = platform_tag(library)
    with tempfile.TemporaryDirectory() as scratch:
        _run("unpack", wheel, "--dest", scratch)
        (unpacked,) = Path(scratch).iterdir()
        if not (unpacked / _PLACE).parents[1].is_dir():
            raise BuildError(f"{wheel} has no folder {_PLACE.parents[1]}: it is of an older version; build it anew")
        (unpacked / _PLACE).parent.mkdir(exist_ok=True)
        shutil.copyfile(library, unpacked / _PLACE)
        made = Path(scratch) / "made"
        made.mkdir()
        _run("pack", unpacked, "--dest-dir", made)
        (packed,) = made.iterdir()
        _run("tags", "--remove", "--platform-tag", tag, packed)
        (packed,) = made.iterdir()
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{packed.name}.part"
        shutil.copyfile(packed, part)
        return part.replace(folder / packed.name)


def _run(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "wheel", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise BuildError(f"`wheel {arguments[0]}` failed:\n{done.stdout.strip()}")


def main() -> int:
    """The command line. Exit codes: 0 ok, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_aot.plugins.cpu.wheel",
        description="Put the library of the CPU's kernels into the project's wheel.",
        epilog="Examples:\n  python -m qwen_aot.plugins.cpu.wheel dist/qwen_aot-0.1.0-py3-none-any.whl lib.so -o dist",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("wheel", type=Path, help="of the project, for any platform")
    parser.add_argument("library", type=Path, help=f"{FILE_NAME}, as plugins.cpu.build writes it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    try:
        print(make_wheel(arguments.wheel, arguments.library, arguments.output))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or arguments.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
