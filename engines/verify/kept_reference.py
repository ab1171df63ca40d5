"""What the reference says of some texts, kept in a temporary file: it runs once, and any number of bundles is compared.

The logits of 10,000 tokens and 151,936 words are 6 GB. They lie in a file that is mapped, and has no name on Linux.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen_aot.engines.verify.scores import ScoringReference
from qwen_aot.errors import BuildError
from qwen_aot.machine import free_disk_bytes

PROMPT_SHARE = 4  # of a window, the first quarter is the prompt that greedy tokens go on from
_LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True)
class KeptReference:
    """Windows of texts and the reference's answers.

    Attributes:
        windows: token ids [T] each, T >= 4.
        greedy: the likeliest tokens one after the other behind the first quarter of each window.
    """

    windows: tuple[NDArray[np.int64], ...]
    greedy: tuple[tuple[int, ...], ...]
    _logits: NDArray[np.float32]
    _starts: tuple[int, ...]

    def logits(self, window: int, position: int) -> NDArray[np.float32]:
        """Logits [V] behind a window's token; of each but the last, which has no next one to foretell."""
        row: NDArray[np.float32] = self._logits[self._starts[window] + position]
        return row

    def prompt(self, window: int) -> NDArray[np.int64]:
        """What the greedy tokens go on from."""
        return self.windows[window][: len(self.windows[window]) // PROMPT_SHARE]


def require_disk(positions: int, vocab_size: int) -> None:
    """Refuses, before the reference is loaded, what the folder of temporary files doesn't hold.

    Raises:
        BuildError: with what is needed, what is free and what to do.
    """
    folder = Path(tempfile.gettempdir())
    needed, free = positions * vocab_size * _LOGIT_BYTES, free_disk_bytes(folder)
    if needed > free:
        raise BuildError(
            f"the reference's logits of {positions:,} tokens take {needed:,} bytes, and {folder} has {free:,} free: "
            "score fewer tokens, or set the variable TMPDIR to a folder on a larger disk"
        )


@contextlib.contextmanager
def keep_reference(
    load: Callable[[], ScoringReference],
    windows: Sequence[NDArray[np.int64]],
    vocab_size: int,
    *,
    greedy_tokens: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[KeptReference]:
    """Runs the reference over the windows and lets it go; what it said is there until the context ends.

    Args:
        load: gives the reference; called once there is room for what it says.
        windows: token ids [T] each, T >= 4.
        vocab_size: V of its logits.
        greedy_tokens: generated behind each window's first quarter.
        on_progress: called with positions done and in all.

    Raises:
        BuildError: see `require_disk`.
    """
    counts = [len(window) - 1 for window in windows]
    total = sum(counts)
    require_disk(total, vocab_size)
    reference = load()
    starts = [0, *np.cumsum(counts).tolist()]
    greedy = []
    with tempfile.TemporaryFile(prefix="qwen-aot-logits-") as file:
        for window, end in zip(windows, starts[1:], strict=True):
            file.write(np.ascontiguousarray(reference.logits(window[:-1], 0), np.float32).data)
            greedy.append(tuple(reference.greedy(window[: len(window) // PROMPT_SHARE], greedy_tokens)))
            on_progress(end, total)
        file.flush()
        del reference
        mapped = np.memmap(file, np.float32, "r", shape=(total, vocab_size))
        yield KeptReference(tuple(windows), tuple(greedy), mapped, tuple(starts))
