"""Opening a bundle: every file that the manifest lists is there, whole, and where it may lie."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.files import PREPARED_NAME
from qwen_aot.runtime.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest
from qwen_aot.runtime.bundle.onnx_file import read_onnx_file
from qwen_aot.runtime.bundle.places import place_of
from qwen_aot.whole_file import file_sha256

__all__ = ["Bundle", "check_data_files", "load_bundle", "read_manifest"]

# A build replaces nothing that isn't as a build wrote it: a damaged bundle must go first.
_REMEDY = "copy it again, or delete the bundle and build it anew"
MAX_MANIFEST_BYTES = 16 << 20  # one of 110B's 80 layers with an int8 cache takes 0.1 MB


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
        """A listed UTF-8 text file; the very bytes that are given are hashed, not what stood there before.

        Raises:
            BundleError: the manifest doesn't list it, it can't be read, or it isn't as the manifest says.
        """
        if not self.has(name):
            raise BundleError(f"the bundle {self.path} has no {name} (it has: {', '.join(self.manifest.files)})")
        path, entry = self.path / name, self.manifest.files[name]
        with _explained(path):
            content = place_of(self.path, name).path.read_bytes()
        _check_size(path, len(content), entry)
        _check_hash(path, hashlib.sha256(content).hexdigest(), entry)
        return _decoded(path, content)


def load_bundle(path: str | Path, *, skip_hash_above: int | None = None) -> Bundle:
    """Reads a bundle's manifest and checks its files.

    Args:
        path: the bundle's folder.
        skip_hash_above: files larger than this many bytes are checked by size alone; None hashes all. Files in a hub's
            blobs are hashed whatever their size.

    Raises:
        BundleError: not a bundle, another format version, or a missing, truncated, altered or foreign file.
    """
    folder = Path(path)
    with _explained(folder):
        if not (folder / MANIFEST_NAME).is_file():
            raise BundleError(_not_a_bundle(folder))
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry, skip_hash_above)
    text = manifest.engines.text  # nothing here opens the other engine
    if PurePosixPath(text.file).suffix == ".onnx":
        check_data_files(folder, text.file, manifest)
    if text.kernels is not None:
        check_data_files(folder, text.kernels.file, manifest)
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """A bundle's manifest, which lies where its other files may; those aren't looked at.

    Raises:
        BundleError: it can't be read, lies elsewhere, or is no manifest of a known version.
    """
    path = folder / MANIFEST_NAME
    with _explained(path), place_of(folder, MANIFEST_NAME).path.open("rb") as file:
        content = file.read(MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} has more than {MAX_MANIFEST_BYTES} bytes, which no build writes: {_REMEDY}")
    return Manifest.from_json(_decoded(path, content))


def _check_file(folder: Path, name: str, entry: FileEntry, skip_hash_above: int | None) -> None:
    path = folder / name
    with _explained(path):
        place = place_of(folder, name)
        if not place.path.is_file():
            raise BundleError(f"{path} is missing, though {MANIFEST_NAME} lists it: copy the whole folder, or rebuild")
        size = place.path.stat().st_size
        _check_size(path, size, entry)
        if skip_hash_above is not None and size > skip_hash_above and not place.is_blob:
            return
        found = file_sha256(place.path)
    _check_hash(path, found, entry)


def _check_size(path: Path, size: int, entry: FileEntry) -> None:
    if size != entry.bytes:
        kind = "truncated" if size < entry.bytes else "too long"
        raise BundleError(f"{path} is {kind}: {size} bytes, {MANIFEST_NAME} says {entry.bytes}; {_REMEDY}")


def _check_hash(path: Path, found: str, entry: FileEntry) -> None:
    if found != entry.sha256:
        raise BundleError(
            f"{path} is damaged or was changed: its SHA-256 is {found}, {MANIFEST_NAME} says {entry.sha256}; {_REMEDY}"
        )


def check_data_files(folder: Path, name: str, manifest: Manifest) -> None:
    """A graph may read its weights from listed files only: whatever opens it follows the names in it.

    Raises:
        BundleError: it names another.
    """
    path = folder / name
    with _explained(path):
        locations = read_onnx_file(place_of(folder, name).path).locations
    for location in sorted(locations):
        if (PurePosixPath(name).parent / location).as_posix() not in manifest.files:
            raise BundleError(
                f"{path} names the data file {location!r}; accepted: a file that {MANIFEST_NAME} lists "
                f"({', '.join(manifest.files)}). Don't use this bundle unless you know where it comes from"
            )


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): it is damaged") from error


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals into BundleErrors."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"{path} can't be read ({error.strerror}): check its permissions and the disk") from error


def _not_a_bundle(path: Path) -> str:
    """Says what the path is instead, where that can be told."""
    build = "a bundle is made from it with `build-engine CHECKPOINT -o BUNDLE`"
    if not path.exists():
        return f"{path} doesn't exist; accepted: a bundle's folder, as `build-engine` writes it"
    if (path / PREPARED_NAME).is_file():
        return f"{path} is a build that was prepared, not a bundle: compile it with `build-engine {path} -o BUNDLE`"
    if path.suffix == ".gguf" or (path / "config.json").is_file():
        return f"{path} is a checkpoint, not a bundle: {build}"
    if path.is_file():
        inside = " (the folder it stands in is one)" if (path.parent / MANIFEST_NAME).is_file() else ""
        return f"{path} is a file; accepted: a bundle's folder{inside}"
    return f"{path} has no {MANIFEST_NAME}: it is not a bundle, or its build did not end; {build}"
