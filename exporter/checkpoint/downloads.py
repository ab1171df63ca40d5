"""What a download that isn't whole leaves behind: recognized, and named with what finishes it."""

from __future__ import annotations

from pathlib import Path

from qwen_aot.errors import CheckpointError

# Source: the Git LFS specification: the first line of a pointer, which stands where the file wasn't fetched.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".download", ".partial", ".aria2", ".tmp")
_LISTED = 3
# Where the hub's client keeps what it hasn't finished: beside a snapshot's folder, or in a local folder of its own.
_HIDDEN_DOWNLOADS = ("../../blobs", ".cache/huggingface/download")


def refuse_lfs_pointer(path: Path, content: bytes) -> None:
    """Checks the start of a file.

    Raises:
        CheckpointError: it is a pointer of Git LFS.
    """
    if content.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs install && git lfs pull` in "
            f"{path.parent}, or download the checkpoint with `hf download`"
        )


def refuse_unfinished(path: Path) -> None:
    """Checks that nothing still writes a file.

    aria2 gives a file its full size first, so that one which isn't finished looks whole and holds zeros.

    Raises:
        CheckpointError: the control file of a download lies beside it.
    """
    control = path.with_name(f"{path.name}.aria2")
    if control.exists():
        raise CheckpointError(
            f"{path} isn't downloaded yet: {control.name} lies beside it; finish the download (or delete "
            f"{control.name} if the file is whole)"
        )


def is_unfinished(name: str) -> bool:
    """Whether a file's name says that a download writes it."""
    return name.lower().endswith(_UNFINISHED)


def why_missing(folder: Path, name: str) -> str:
    """What is known of a file that isn't there, as the end of a sentence; empty: nothing."""
    path = folder / name
    if path.is_symlink():
        return (
            f"; it is a link to {path.readlink()}, which doesn't exist: the download wasn't finished or was cleaned up"
        )
    found = unfinished_downloads(folder)
    if not found:
        return ""
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return f"; unfinished downloads: {', '.join(found[:_LISTED])}{more}: finish them (run the same download again)"


def unfinished_downloads(folder: Path) -> list[str]:
    """Files that a download left beside a checkpoint's, or in the hub client's own folders, by name."""
    here = folder.resolve()
    places = [here]
    for place in _HIDDEN_DOWNLOADS:
        if place.startswith("..") and here.parent.name != "snapshots":
            continue
        places.append((here / place).resolve())
    return sorted(
        path.name for place in places if place.is_dir() for path in place.iterdir() if is_unfinished(path.name)
    )
