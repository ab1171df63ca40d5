"""The files that a manifest lists, and the names they may have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.checks import is_sha256

__all__ = ["MANIFEST_NAME", "PREPARED_NAME", "FileEntry", "check_file_name"]

MANIFEST_NAME = "manifest.json"
PREPARED_NAME = "prepared.json"  # in its place: a build that is still to be compiled (`build-engine --prepare`)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle, by its name relative to the bundle's folder."""

    bytes: int
    sha256: str  # 64 lower-case hex digits

    def __post_init__(self) -> None:
        if self.bytes < 0 or not is_sha256(self.sha256):
            raise BundleError(
                f"file entry has bytes {self.bytes} and sha256 {self.sha256!r}; accepted: a size of at least 0 and 64 "
                "lower-case hex digits"
            )


def check_file_name(name: str) -> None:
    """A file name may name a file in the bundle's folder or below, on every operating system.

    Raises:
        BundleError: it could name another one, or names the manifest.
    """
    path = PurePosixPath(name)
    is_safe = (
        name not in ("", ".", MANIFEST_NAME)
        and path.as_posix() == name  # no "./x", "a//b", "a/"
        and not path.is_absolute()
        and ".." not in path.parts
        # Drive letters, other separators, control characters, halves of UTF-16 pairs.
        and not re.search(r'[\\:\x00-\x1f<>"|?*\ud800-\udfff]', name)
    )
    if not is_safe:
        raise BundleError(
            f"{MANIFEST_NAME} lists a file named {name!r}; accepted: a relative path with '/' inside the "
            f"bundle's folder. Don't use this bundle unless you know where it comes from"
        )
