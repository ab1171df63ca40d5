"""Opening a bundle: every file that the manifest lists is there, whole, and inside the folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest

__all__ = ["Bundle", "file_sha256", "load_bundle"]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files have been checked."""

    path: Path
    manifest: Manifest

    @property
    def engine_path(self) -> Path:
        """The engine file."""
        return self.path / self.manifest.engines.text.file

    def has(self, name: str) -> bool:
        """Whether the manifest lists this file."""
        return name in self.manifest.files

    def read_text(self, name: str) -> str:
        """A listed UTF-8 text file.

        Raises:
            BundleError: the manifest doesn't list it, or it can't be read.
        """
        if not self.has(name):
            raise BundleError(f"the bundle {self.path} has no {name} (it has: {', '.join(self.manifest.files)})")
        return _read_text(self.path / name)


def load_bundle(path: str | Path, *, skip_hash_above: int | None = None) -> Bundle:
    """Reads a bundle's manifest and checks its files.

    Args:
        path: the bundle's folder.
        skip_hash_above: files larger than this many bytes are checked by size alone; None hashes all.

    Raises:
        BundleError: not a bundle, another format version, or a missing, truncated, altered or foreign file.
    """
    folder = Path(path)
    try:
        if not (folder / MANIFEST_NAME).is_file():
            raise BundleError(_not_a_bundle(folder))
    except OSError as error:
        raise BundleError(f"{folder} can't be read ({error.strerror}): check its permissions and the disk") from error
    manifest = Manifest.from_json(_read_text(folder / MANIFEST_NAME))
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry, skip_hash_above)
    return Bundle(folder, manifest)


def file_sha256(path: Path) -> str:
    """Of a file's content, in lower-case hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(folder: Path, name: str, entry: FileEntry, skip_hash_above: int | None) -> None:
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(
                f"{path} is a link to {path.resolve()}, outside the bundle; a bundle is self-contained: copy the file "
                "into it, or rebuild"
            )
        if not path.is_file():
            raise BundleError(f"{path} is missing, though {MANIFEST_NAME} lists it: copy the whole folder, or rebuild")
        size = path.stat().st_size
        if size != entry.bytes:
            kind = "truncated" if size < entry.bytes else "too long"
            raise BundleError(
                f"{path} is {kind}: {size} bytes, {MANIFEST_NAME} says {entry.bytes}; copy it again, or rebuild"
            )
        if skip_hash_above is not None and size > skip_hash_above:
            return
        found = file_sha256(path)
    except OSError as error:
        raise BundleError(f"{path} can't be read ({error.strerror}): check its permissions and the disk") from error
    except RuntimeError as error:  # what resolve() makes of a link to itself before Python 3.13
        raise BundleError(f"{path} is a link that leads to itself: copy the file again, or rebuild") from error
    if found != entry.sha256:
        raise BundleError(
            f"{path} is damaged or was changed: its SHA-256 is {found}, {MANIFEST_NAME} says {entry.sha256}; "
            f"copy it again, or rebuild"
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): it is damaged") from error
    except OSError as error:
        raise BundleError(f"{path} can't be read ({error.strerror}): check its permissions and the disk") from error


def _not_a_bundle(path: Path) -> str:
    """Says what the path is instead, where that can be told."""
    build = "a bundle is made from it with `build-engine CHECKPOINT -o BUNDLE`"
    if not path.exists():
        return f"{path} doesn't exist; accepted: a bundle's folder, as `build-engine` writes it"
    if path.suffix == ".gguf" or (path / "config.json").is_file():
        return f"{path} is a checkpoint, not a bundle: {build}"
    if path.is_file():
        inside = " (the folder it stands in is one)" if (path.parent / MANIFEST_NAME).is_file() else ""
        return f"{path} is a file; accepted: a bundle's folder{inside}"
    return f"{path} has no {MANIFEST_NAME}: it is not a bundle, or its build did not end; {build}"
