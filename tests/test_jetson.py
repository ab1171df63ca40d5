"""Boards recognised by a device tree and a release file, as NVIDIA's systems have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_aot.jetson import JETPACKS, Jetson, find_jetson

ORIN_NANO = ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "p3768-0000+p3767-0005-super", "234")
AGX_ORIN = ("NVIDIA Jetson AGX Orin Developer Kit", "p3737-0000+p3701-0005", "234")
THOR = ("NVIDIA Jetson AGX Thor Developer Kit", "p4071-0000+p3834-0008", "264")
RELEASE = (
    "# R{}, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n"
)


def system(root: Path, board: tuple[str, str, str] | None, release: str | None) -> Path:
    """A file system with what tells a board."""
    if board is not None:
        model, carrier, chip = board
        (root / "proc/device-tree").mkdir(parents=True)
        (root / "proc/device-tree/model").write_bytes(f"{model}\0".encode())
        names = (f"nvidia,{carrier}", "nvidia,p3767-0005", f"nvidia,tegra{chip}")
        (root / "proc/device-tree/compatible").write_bytes("".join(f"{name}\0" for name in names).encode())
    if release is not None:
        (root / "etc").mkdir()
        (root / "etc/nv_tegra_release").write_text(RELEASE.format(release))
    return root


@pytest.mark.parametrize(
    ("board", "release", "numbers", "jetpack"),
    [
        (ORIN_NANO, "36 (release), REVISION: 4.3", (36, 4, 3), "6.1 or 6.2"),
        (AGX_ORIN, "36 (release), REVISION: 4.0", (36, 4, 0), "6.1 or 6.2"),
        (AGX_ORIN, "36 (release), REVISION: 3.0", (36, 3, 0), "6.0"),
        (AGX_ORIN, "35 (release), REVISION: 6.1", (35, 6, 1), "5"),
        (THOR, "38 (release), REVISION: 2.1", (38, 2, 1), "7.0 or 7.1"),
        (THOR, "38 (release), REVISION: 4", (38, 4), "7.0 or 7.1"),
        (ORIN_NANO, "39 (release), REVISION: 1.0", (39, 1, 0), None),  # newer than the table
        (AGX_ORIN, "32 (release), REVISION: 7.1", (32, 7, 1), "4"),
        (AGX_ORIN, "28 (release), REVISION: 2.1", (28, 2, 1), None),  # older
        (ORIN_NANO, None, None, None),  # a container has the device tree alone
    ],
)
def test_boards(
    tmp_path: Path,
    board: tuple[str, str, str],
    release: str | None,
    numbers: tuple[int, ...] | None,
    jetpack: str | None,
) -> None:
    found = find_jetson(system(tmp_path, board, release))
    assert found == Jetson(board[0], f"tegra{board[2]}", numbers)
    assert (found.jetpack.name if found.jetpack else None) == jetpack


def test_a_release_file_without_a_device_tree(tmp_path: Path) -> None:
    found = find_jetson(system(tmp_path, None, "36 (release), REVISION: 4.3"))
    assert found == Jetson("a Jetson", "", (36, 4, 3))
    assert found.text == "a Jetson, Jetson Linux 36.4.3 (JetPack 6.1 or 6.2)"


@pytest.mark.parametrize(
    "compatible", [b"", b"raspberrypi,4-model-b\0brcm,bcm2711\0", b"nvidia,grace\0", b"\xff\xfe\0"]
)
def test_other_machines(tmp_path: Path, compatible: bytes) -> None:
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/compatible").write_bytes(compatible)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("something else\n")
    assert find_jetson(tmp_path) is None
    assert find_jetson(tmp_path / "nowhere") is None


def test_the_table_is_in_order() -> None:
    assert sorted(JETPACKS) == list(JETPACKS)
    assert [jetpack.is_supported for jetpack in JETPACKS.values()] == [False, False, False, True, True]
