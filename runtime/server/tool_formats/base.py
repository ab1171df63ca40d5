"""What a tool format is: how functions are told to a model, how its calls are read, and what they look like."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Call", "CallSyntax", "Function", "Offer", "Piece", "Told", "ToolFormat", "ToolReader"]


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


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a request offers.

    Attributes:
        name: letters, digits, _ and -.
        description: what it does; may be empty.
        parameters: JSON schema of its arguments, an object.
        is_strict: calls are held to the schema, whoever chooses them.
        where: the schema's place in the body.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    is_strict: bool
    where: str

    @property
    def parameters_text(self) -> str:
        """The schema as JSON, as models are told it."""
        return json.dumps(self.parameters, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Offer:
    """The functions of a request, and what is asked of the answer.

    Attributes:
        functions: all of them.
        is_required: the answer is a call, of `named` if that isn't None.
        named: the one to be called.
        may_repeat: whether an answer may have several calls; None: the request doesn't say.
    """

    functions: tuple[Function, ...]
    is_required: bool = False
    named: str | None = None
    may_repeat: bool | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The functions' names."""
        return tuple(function.name for function in self.functions)

    @property
    def callable(self) -> tuple[Function, ...]:
        """Those that the answer may call."""
        return tuple(each for each in self.functions if self.named in (None, each.name))


@dataclass(frozen=True, slots=True)
class Told:
    """A conversation in which functions, earlier calls and their results are plain text.

    Attributes:
        messages: of the roles system, user and assistant, with texts as contents.
        begun: how the answer begins, after which the model goes on; "": it begins by itself.
    """

    messages: list[dict[str, Any]]
    begun: str = ""


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """What calls look like: mark, name, arguments.

    Attributes:
        mark: text that begins a call.
        before_arguments: what stands between the mark and the arguments, `{name}` for the function's name.
        after: what follows the arguments.
        between: what stands between two calls; None: an answer has one at most.
        end: what the model may write behind its last call, a stop text; "": nothing.
        lead: regular expression of what may stand before the first call where one is required; "": nothing.
    """

    mark: str
    before_arguments: str
    after: str = ""
    between: str | None = None
    end: str = ""
    lead: str = ""


class ToolReader(Protocol):
    """Reads one answer. What isn't a whole call of a function that was offered is content; no text is lost."""

    def push(self, text: str) -> list[Piece]:
        """What has become certain with a further piece of text."""

    def flush(self) -> list[Piece]:
        """The rest, once nothing follows."""


class ToolFormat(Protocol):
    """One format."""

    @property
    def name(self) -> str:
        """What `--tool-format` calls it."""

    @property
    def syntax(self) -> CallSyntax:
        """What its calls look like."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer: what follows them isn't the model's to write."""

    def fits(self, template_literals: Collection[str]) -> bool:
        """Whether a chat template that takes tools teaches it.

        Args:
            template_literals: the texts of the template's own source.
        """

    def tell(self, messages: Sequence[Mapping[str, Any]], offer: Offer | None) -> Told:
        """A conversation for a template that takes no tools.

        Args:
            messages: as `chat` has read them.
            offer: the functions; None: there are only earlier calls to be told.

        Raises:
            ApiError: results of calls that nobody made, or nobody asks anything.
        """

    def reader(self, names: Collection[str], *, is_continued: bool) -> ToolReader:
        """A reader of one answer.

        Args:
            names: of the functions that were offered.
            is_continued: the answer goes on behind `Told.begun`.
        """
