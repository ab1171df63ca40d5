"""Which Jetson this machine is, and what its JetPack brings: one table (standard library only)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["JETPACKS", "JetPack", "Jetson", "find_jetson"]

_RELEASE = re.compile(r"# R(\d+) \(release\), REVISION: (\d+)(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class JetPack:
    """What NVIDIA's system for Jetsons has, by the release notes of each.

    Attributes:
        name: its versions.
        tensorrt: which python3-libnvinfer brings.
        cuda: the newest that its driver runs.
        python: of the system, for which python3-libnvinfer is.
        is_supported: this project runs its engines there.
    """

    name: str
    tensorrt: str
    cuda: tuple[int, int]
    python: tuple[int, int]
    is_supported: bool


# The first release of Jetson Linux (L4T) that has it -> JetPack, oldest first.
JETPACKS: Mapping[tuple[int, ...], JetPack] = {
    (32,): JetPack("4", "8.2", (10, 2), (3, 6), is_supported=False),
    (35,): JetPack("5", "8.5", (11, 4), (3, 8), is_supported=False),
    (36,): JetPack("6.0", "8.6", (12, 2), (3, 10), is_supported=False),
    (36, 4): JetPack("6.1 or 6.2", "10.3", (12, 6), (3, 10), is_supported=True),
    (38,): JetPack("7.0 or 7.1", "10.13", (13, 0), (3, 12), is_supported=True),
}
_SUPPORTED_CHIPS = ("tegra234", "tegra264")  # Orin, Thor
_UNKNOWN_FROM = 39  # major release of Jetson Linux: newer than the table


@dataclass(frozen=True, slots=True)
class Jetson:
    """A board.

    Attributes:
        model: as its device tree says, "NVIDIA Jetson Orin Nano Developer Kit".
        chip: "tegra234" (Orin) or "tegra264" (Thor), for example; "" where the device tree doesn't say.
        release: of Jetson Linux (L4T), (36, 4, 3) for example; None: the file that says so isn't there, as in a
            container.
    """

    model: str
    chip: str
    release: tuple[int, ...] | None

    @property
    def jetpack(self) -> JetPack | None:
        """What its system has; None: it doesn't say, or is older or newer than the table."""
        if self.release is None or self.release[0] >= _UNKNOWN_FROM:
            return None
        reached = [jetpack for first, jetpack in JETPACKS.items() if self.release >= first]
        return reached[-1] if reached else None

    @property
    def has_supported_jetpack(self) -> bool:
        """Whether there is a JetPack for this board that this project runs on; an unknown chip may have one."""
        return self.chip in _SUPPORTED_CHIPS or not self.chip or self.chip > max(_SUPPORTED_CHIPS)

    @property
    def text(self) -> str:
        """Model, release and JetPack in one line."""
        release = "" if self.release is None else f", Jetson Linux {'.'.join(map(str, self.release))}"
        jetpack = self.jetpack
        return self.model + release + ("" if jetpack is None else f" (JetPack {jetpack.name})")


def find_jetson(root: Path = Path("/")) -> Jetson | None:
    """The board that this process runs on; None: it is none.

    Args:
        root: of the file system.
    """
    compatible = _text(root / "proc/device-tree/compatible").split("\0")
    chips = [match[1] for name in compatible if (match := re.fullmatch(r"nvidia,(tegra\d+)", name))]
    release = _RELEASE.search(_text(root / "etc/nv_tegra_release"))
    if not chips and release is None:
        return None
    model = _text(root / "proc/device-tree/model").strip("\0\n ") or "a Jetson"
    numbers = None if release is None else tuple(int(number) for number in release.groups() if number is not None)
    return Jetson(model, chips[0] if chips else "", numbers)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
