"""Where a bundle's files may lie: in its folder, or, of a hub's snapshot, in the same model's blobs.

A hub's cache has each file once, by its content, and a snapshot of links to them:

    models--OWNER--NAME/blobs/HASH
    models--OWNER--NAME/snapshots/REV/model.onnx -> ../../blobs/HASH

Source: huggingface_hub's documentation, "Understand caching". `docs/bundle.md` has the rule for every reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen_aot.errors import BundleError

__all__ = ["Place", "place_of"]


@dataclass(frozen=True, slots=True)
class Place:
    """What a name in a bundle's folder leads to.

    Attributes:
        path: without any link.
        is_blob: it lies in a hub's blobs and not in the folder, so that size and hash must always be checked.
    """

    path: Path
    is_blob: bool


def place_of(folder: Path, name: str) -> Place:
    """Follows a name to its end, wherever the links between lead; what is there, if anything, isn't looked at.

    Raises:
        BundleError: the end is neither in the folder nor where a snapshot's files may be, or the links never end.
        OSError: it can't be followed.
    """
    path = folder / name
    try:
        root, found = folder.resolve(), path.resolve()
    except RuntimeError as error:  # what resolve() makes of a link to itself before Python 3.13
        raise BundleError(f"{path} is a link that leads to itself: copy the file again, or rebuild") from error
    if found.is_relative_to(root):
        return Place(found, is_blob=False)
    if found.parent == _blobs_of(root):
        return Place(found, is_blob=True)
    raise BundleError(
        f"{path} is a link to {found}, outside the bundle; a bundle is self-contained (of a hub's snapshot, links may "
        "lead to the same model's blobs): copy the files themselves into it (cp -rL), or rebuild"
    )


def _blobs_of(root: Path) -> Path | None:
    """The blobs of the snapshot that a folder, without links, is or lies in; None: it is in none."""
    for snapshot in (root, *root.parents):
        model = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and model.name.startswith("models--"):
            return model / "blobs"
    return None
