"""What a tool format is: a reader of an answer's text, piece by piece, that tells calls from content."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Call", "Piece", "ToolFormat", "ToolReader"]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function.

    Attributes:
        name: one of those that were offered.
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


Piece = str | Call  # content, or a call


class ToolReader(Protocol):
    """Reads one answer. What isn't a whole call of a function that was offered is content; no text is lost."""

    def push(self, text: str) -> list[Piece]:
        """What has become certain with a further piece of text."""

    def flush(self) -> list[Piece]:
        """The rest, once nothing follows."""


class ToolFormat(Protocol):
    """One format."""

    def fits(self, template_literals: Collection[str]) -> bool:
        """Whether a chat template teaches it.

        Args:
            template_literals: the texts of the template's own source.
        """

    def reader(self, names: Collection[str]) -> ToolReader:
        """A reader of one answer.

        Args:
            names: of the functions that were offered.
        """
