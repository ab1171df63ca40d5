"""Writes a bundle whole: hashes, manifest last, moved into place by `FolderWriter`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwen_aot.errors import BuildError, BundleError
from qwen_aot.runtime.bundle.load import read_manifest
from qwen_aot.runtime.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest
from qwen_aot.whole_folder import FolderWriter, explained, refuse_unless_as_written, sync


class HashingWriter(FolderWriter):
    """A `FolderWriter` that knows the hashes of its files."""

    def __init__(self, out: Path, check: Callable[[Path], None], seal_name: str) -> None:
        """Writes nothing yet.

        Args:
            out: see `FolderWriter`.
            check: see `FolderWriter`.
            seal_name: of the file that will list the others.
        """
        super().__init__(out, check)
        self._seal_name = seal_name
        self._hashed: dict[str, FileEntry] = {}

    def hash_files(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Mapping[str, FileEntry]:
        """Hashes and syncs every file in `folder` but the seal; those of an earlier call are not read again.

        Args:
            on_progress: called with bytes done and bytes in all.

        Returns:
            An entry for each, by name.
        """
        with explained(self.out):
            new = sorted(
                path for path in self.folder.iterdir() if path.name != self._seal_name and path.name not in self._hashed
            )
            total = sum(path.stat().st_size for path in new)
            done = 0
            with ThreadPoolExecutor(1) as pool:
                syncs = [pool.submit(sync, path) for path in new]  # the disk writes while the CPU hashes
                for path in new:
                    digest = hashlib.sha256()
                    for block in _blocks(path):
                        digest.update(block)
                        done += len(block)
                        on_progress(done, total)
                    self._hashed[path.name] = FileEntry(bytes=path.stat().st_size, sha256=digest.hexdigest())
                for future in syncs:
                    future.result()
        return dict(sorted(self._hashed.items()))


class BundleWriter(HashingWriter):
    """Context manager of one build: fill `folder`, `seal`, `commit`. Leaving without commit undoes all."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, refuse_unless_replaceable, MANIFEST_NAME)

    def seal(
        self,
        manifest_for: Callable[[Mapping[str, FileEntry]], Manifest],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Manifest:
        """Hashes every file in `folder` (`hash_files`), then writes the manifest that lists them.

        May be called again after files were added.

        Args:
            manifest_for: makes the manifest from the files.
            on_progress: called with bytes done and bytes in all.

        Returns:
            The manifest as written.
        """
        manifest = manifest_for(self.hash_files(on_progress))
        with explained(self.out):
            (self.folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest


def refuse_unless_replaceable(out: Path) -> None:
    """Checks that `out` is free, an empty folder, or a bundle with nothing else in it.

    Raises:
        BuildError: replacing it would destroy something that isn't a bundle.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise BuildError(f"{out} is a file; give a folder for the bundle")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    advice = "give another folder, or move this one away; delete it, if nothing in it is yours"
    if MANIFEST_NAME not in names:
        raise BuildError(f"{out} isn't empty and isn't a bundle (no {MANIFEST_NAME}); {advice}")
    try:
        files = read_manifest(out).files
    except BundleError as error:
        raise BuildError(f"{out}/{MANIFEST_NAME} isn't a bundle's manifest ({error}); {advice}") from error
    listed = {name: (entry.bytes, entry.sha256) for name, entry in files.items()}
    refuse_unless_as_written(out, listed, MANIFEST_NAME, "manifest", advice)


def _blocks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(size):
            yield block
