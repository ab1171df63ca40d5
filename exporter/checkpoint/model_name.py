"""What a model is called, by where its checkpoint lies: never a commit hash or a step's number."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from qwen_aot.exporter.checkpoint.part_names import whole_name

_HUB_FOLDER = "models--"  # of a hub's cache: models--ORGANISATION--NAME/snapshots/REVISION
_HASH = re.compile(r"[0-9a-f]{32,64}")
_STEP = re.compile(r"(checkpoint|global_step|step|epoch)?[-_]?[0-9]+")  # what trainers call what they save


@dataclass(frozen=True, slots=True)
class HubSnapshot:
    """A folder of a hub's cache.

    Attributes:
        repository: `ORGANISATION/NAME`, or `NAME`.
        revision: usually a commit hash.
        inside: folders below the snapshot that the path goes on into.
    """

    repository: str
    revision: str
    inside: tuple[str, ...]

    @property
    def name(self) -> str:
        """The repository's own name, and what is below it."""
        return "-".join((self.repository.rpartition("/")[2], *self.inside))


def located(path: Path) -> Path:
    """An absolute path whose last part is a name: `.` has none; links keep the names that their owner gave them."""
    # Only the file system knows what `..` behind a link is.
    return path.resolve() if ".." in path.parts else Path(os.path.abspath(path))


def hub_snapshot(folder: Path) -> HubSnapshot | None:
    """The snapshot that a folder is or lies in, links followed; None: it lies elsewhere."""
    parts = folder.resolve().parts
    for index in range(len(parts) - 2):
        if parts[index].startswith(_HUB_FOLDER) and parts[index + 1] == "snapshots":
            repository = parts[index].removeprefix(_HUB_FOLDER).replace("--", "/")
            return HubSnapshot(repository, parts[index + 2], parts[index + 3 :]) if repository else None
    return None


def folder_name(folder: Path) -> str:
    """The name of the model in a folder.

    A snapshot of a hub's cache has its repository's; a folder called after a step is called after its parent as well,
    and one called after a hash after its parent alone. A link's own name stands, where it says something.
    """
    folder = located(folder)
    if not _says_nothing(folder.name):
        return _without_escapes(folder)
    snapshot = hub_snapshot(folder)
    if snapshot is not None:
        return snapshot.name
    if _STEP.fullmatch(folder.name) and folder.parent.name:
        return f"{folder_name(folder.parent)}-{folder.name}"
    if folder.parent.name:
        return folder_name(folder.parent)
    return folder.name or "model"  # the root of the file system


def file_name(path: Path) -> str:
    """The name of the model in a file: its base name, of a split file that of the whole."""
    return whole_name(located(path).name)


def origin(folder: Path) -> dict[str, str]:
    """Where a snapshot was downloaded from, for the manifest: `repository` and `revision`; else empty."""
    snapshot = hub_snapshot(folder)
    return {} if snapshot is None else {"repository": snapshot.repository, "revision": snapshot.revision}


def _says_nothing(name: str) -> bool:
    return not name or _HASH.fullmatch(name) is not None or _STEP.fullmatch(name) is not None


def _without_escapes(folder: Path) -> str:
    """ModelScope's cache writes `.` as `___`: Qwen1___5-0___5B-Chat."""
    return folder.name.replace("___", ".") if "modelscope" in folder.parts else folder.name
