"""What the archives of a release hold: one import name, every file of the four folders, the same by both ways."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

from tests.installed.environments import ROOT, Archives

FOLDERS = ("engines", "exporter", "plugins", "runtime")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def dist_info(wheel: Path, name: str) -> str:
    (text,) = [data for file, data in contents(wheel).items() if file.endswith(f".dist-info/{name}")]
    return text.decode()


def sources() -> dict[str, bytes]:
    """Every file of the package by its name in a wheel, read where it lies in the checkout; nothing compiled."""
    package = ROOT / "src" / "qwen_aot"
    places = [(package, "qwen_aot"), *((ROOT / name, f"qwen_aot/{name}") for name in FOLDERS)]
    return {
        f"{prefix}/{path.relative_to(folder)}": path.read_bytes()
        for folder, prefix in places
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.is_relative_to(ROOT / "plugins/cpu/lib")
    }


def test_the_wheel_owns_one_name(archives: Archives) -> None:
    listed = [line.split(",")[0] for line in dist_info(archives.wheel, "RECORD").splitlines()]
    assert sorted(listed) == sorted(contents(archives.wheel))
    assert {name.split("/")[0] for name in listed if ".dist-info/" not in name} == {"qwen_aot"}
    assert dist_info(archives.wheel, "top_level.txt") == "qwen_aot\n"


def test_the_wheel_holds_the_sources_and_nothing_else(archives: Archives) -> None:
    expected = sources()
    kinds = ["py.typed", "engines/build.py", "plugins/src/gqa.cpp", "plugins/performance/resources.json"]
    kinds += [f"runtime/capi/{name}" for name in ("CMakeLists.txt", "src/exports.map", "src/api/model.cpp")]
    kinds += ["runtime/capi/include/qwen_aot.h", "runtime/capi/cmake/qwen_aot.pc.in"]
    kinds += [f"exporter/calibration/texts/{name}" for name in ("SOURCES.md", "evaluation/chinese.txt")]
    kinds += [f"runtime/server/page/{name}" for name in ("index.html", "chat.css", "chat.js", "images.js")]
    for name in kinds:
        assert f"qwen_aot/{name}" in expected  # the rule above finds every kind
    shipped = {name: data for name, data in contents(archives.wheel).items() if ".dist-info/" not in name}
    assert sorted(shipped) == sorted(expected)
    assert shipped == expected


def test_a_file_beside_the_folders_is_not_taken_for_a_source() -> None:
    assert "qwen_aot/tests/__init__.py" not in sources()
    assert not any(name.startswith("qwen_aot/qwen_aot") for name in sources())


def test_the_sdist_gives_the_same_wheel(archives: Archives) -> None:
    wheel, rebuilt = contents(archives.wheel), contents(archives.rebuilt)
    assert sorted(rebuilt) == sorted(wheel)
    assert rebuilt == wheel


def test_the_sdist_holds_files_where_the_checkout_has_links(archives: Archives) -> None:
    assert all((archives.checkout / "src" / "qwen_aot" / name).is_symlink() for name in FOLDERS)
    with tarfile.open(archives.sdist) as archive:
        members = archive.getmembers()
    assert all(member.isreg() or member.isdir() for member in members)
    names = {member.name.partition("/")[2] for member in members if member.isreg()}
    beside = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert {name for name in names if ".egg-info/" not in name} == beside | {f"src/{name}" for name in sources()}


def test_scripts(archives: Archives) -> None:
    assert dist_info(archives.wheel, "entry_points.txt") == (
        "[console_scripts]\n"
        "build-engine = qwen_aot.runtime.cli.main:build_engine_main\n"
        "qwen-aot = qwen_aot.runtime.cli.main:main\n"
    )


def test_an_editable_install_is_a_path_that_type_checkers_follow(archives: Archives) -> None:
    """One line with a folder; type checkers read such a file, and don't run code or import hooks."""
    (pth,) = [data.decode() for name, data in contents(archives.editable).items() if ".dist-info/" not in name]
    assert pth.splitlines() == [str(archives.checkout / "src")]
