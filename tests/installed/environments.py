"""Builds the project's archives, and a device's environment out of the packages that the tests' own has."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
# Somebody else's distribution, with the names that the project's folders have in the repository.
NEIGHBOUR = {
    "runtime/__init__.py": "",
    "runtime/engine.py": "OWNER = 'somebody else'\n",
    "plugins/__init__.py": "OWNER = 'somebody else'\n",
}


@dataclass(frozen=True)
class Archives:
    """What `build_archives` makes.

    Attributes:
        wheel: from the checkout.
        rebuilt: the wheel from the unpacked sdist.
        editable: the wheel of `pip install --editable`.
        checkout: the copy that the first, the second and the last are made from.
    """

    sdist: Path
    wheel: Path
    rebuilt: Path
    editable: Path
    checkout: Path


def clean_environment() -> dict[str, str]:
    """The variables of this process without those that say where Python imports from."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command from `cwd` as a user's shell does; what it prints is kept."""
    return subprocess.run(command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, timeout=300)


def copy_checkout(folder: Path) -> Path:
    """A copy of the checkout: builds leave files where they run, and take up what earlier ones left."""
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "models", "bundles")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignore)
    return folder


def call_backend(source: Path, hook: str, out: Path) -> Path:
    """Calls a PEP 517 hook of the build backend, as pip does; gives the archive."""
    out.mkdir(parents=True)
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    done = run(sys.executable, "-c", code, out, cwd=source)
    assert done.returncode == 0, done.stderr
    (archive,) = out.iterdir()
    return archive


def build_archives(folder: Path) -> Archives:
    """Builds every kind of archive below `folder`."""
    checkout = copy_checkout(folder / "checkout")
    sdist = call_backend(checkout, "build_sdist", folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return Archives(
        sdist=sdist,
        wheel=call_backend(checkout, "build_wheel", folder / "wheel"),
        rebuilt=call_backend(unpacked, "build_wheel", folder / "rebuilt"),
        editable=call_backend(checkout, "build_editable", folder / "editable"),
        checkout=checkout,
    )


def make_device(folder: Path, wheel: Path, extra: str) -> Path:
    """A virtual environment with a neighbour's distribution, the wheel, and what `wheel[extra]` requires.

    Required packages are links to those of this environment, so that no index is asked; a package that the wheel
    doesn't require isn't there. Gives the environment's interpreter.
    """
    done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    python = folder / "bin" / "python"
    neighbour = write_wheel(folder.parent / "somebody_else-1.0-py3-none-any.whl", NEIGHBOUR)
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    done = run(*pip, "install", "--no-index", "--no-deps", neighbour, wheel, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    (metadata,) = importlib.metadata.distributions(name="qwen_aot", path=[str(packages)])
    link_requirements(metadata, extra, packages)
    done = run(*pip, "check", cwd=folder.parent)
    assert done.returncode == 0, done.stdout
    return python


def link_requirements(distribution: importlib.metadata.Distribution, extra: str, packages: Path) -> None:
    """Links what a distribution requires with an extra, and what that requires, into a site-packages folder."""
    for text in distribution.requires or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        required = importlib.metadata.distribution(requirement.name)
        is_new = False
        for name in {file.parts[0] for file in required.files or []} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(str(required.locate_file(name))))
                is_new = True
        if is_new:
            for wanted in requirement.extras or {""}:
                link_requirements(required, wanted, packages)


def write_wheel(path: Path, files: dict[str, str]) -> Path:
    """A wheel with these files, named as `path` says."""
    name, version, *_ = path.name.split("-")
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(file, text)
    return path
