"""Names that a training framework put around a model's: `_orig_mod.` and the like, taken off where they are whole.

Source: what each framework calls the one child of its wrapping module: torch.compile `_orig_mod`,
DistributedDataParallel and DeepSpeed `module`, FSDP `_fsdp_wrapped_module`, activation checkpointing
`_checkpoint_wrapped_module`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.names import TensorNames

logger = logging.getLogger(__name__)

_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
# A model as the attribute of another module, whose state was saved: PEFT's, TRL's, one of the user's own.
_CONTAINERS = ("base_model.model.", "pretrained_model.", "language_model.", "model.")
_BASE = "model."  # what a decoder's names lack that was saved without its head


def unwrapped(path: Path, stored: Collection[str], names: TensorNames) -> Mapping[str, str]:
    """Each stored name -> the same without what stands around the model, where that is the same for all.

    Args:
        path: of the checkpoint, for messages.
        stored: all names in the files.
        names: of the architecture: where they know the names as they stand, nothing is taken off.

    Raises:
        CheckpointError: a module is wrapped for some of its tensors only: two models' tensors were mixed; or two names
            are one without it.
    """
    current = {name: name for name in stored}
    if not any(_is_wrapped(name) and names.find(name) for name in stored):
        _require_whole(path, stored)
        current = {name: _without_wrappers(name) for name in stored}
    current = _without_containers(current, names)
    first: dict[str, str] = {}
    for old, new in current.items():
        if first.setdefault(new, old) != old:
            raise CheckpointError(f"{path} has {new} twice, as {first[new]} and as {old}; accepted: one of them")
    changed = next(((old, new) for old, new in current.items() if old != new), None)
    if changed is not None:
        logger.info("%s: tensor names are read without what a framework put around them: %s as %s", path, *changed)
    return current


def _is_wrapped(name: str) -> bool:
    return not _WRAPPERS.isdisjoint(name.split("."))


def _without_wrappers(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)


def _require_whole(path: Path, stored: Collection[str]) -> None:
    """A wrapper is its parent's only child: whatever lies below the parent lies below it."""
    below: dict[tuple[str, ...], dict[str, str]] = {}  # parent -> child -> a tensor below it
    for name in stored:
        segments = name.split(".")
        for depth in range(len(segments)):
            below.setdefault(tuple(segments[:depth]), {}).setdefault(segments[depth], name)
    for children in below.values():
        wrappers = _WRAPPERS & children.keys()
        if wrappers and len(children) > 1:
            wrapper = min(wrappers)
            other = next(name for child, name in children.items() if child != wrapper)
            raise CheckpointError(
                f"{path} has tensors with and without {wrapper!r}: {children[wrapper]} and {other}; accepted: all of a "
                "module's or none. Save the model itself, not the one that the training framework wrapped."
            )


def _without_containers(current: Mapping[str, str], names: TensorNames) -> dict[str, str]:
    """Prefixes taken off, or the base's put before, while more names become known by it."""
    best = dict(current)
    while True:
        found = [
            {old: new.removeprefix(prefix) for old, new in best.items()}
            for prefix in _CONTAINERS
            if all(new.startswith(prefix) for new in best.values())
        ]
        if not any(new.startswith(_BASE) for new in best.values()):
            found.append({old: new if names.find(new) else _BASE + new for old, new in best.items()})
        better = max(found, key=lambda each: _known(each, names), default=best)
        if _known(better, names) <= _known(best, names):
            return best
        best = better


def _known(current: Mapping[str, str], names: TensorNames) -> int:
    return sum(names.find(name) is not None for name in current.values())
