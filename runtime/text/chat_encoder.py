"""ChatEncoder: a conversation to token ids, with control tokens only where the template writes them."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.text.chat_template import RESERVED, ChatTemplate, Message, template_tokens
from qwen_aot.runtime.text.control_tokens import ControlTokens, How, Marks, placeholder_absent_from
from qwen_aot.runtime.text.image_tokens import ImageTokens, picture_label
from qwen_aot.runtime.text.thoughts import ThoughtTokens
from qwen_aot.runtime.text.tokenizer import Tokenizer, check_unicode

__all__ = ["ChatEncoder", "EncodedConversation"]

_ALLOW = "or allow special tokens in texts (allow_special_tokens=True, --allow-special-tokens)"
_SCHEMA = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """A conversation as tokens.

    Attributes:
        ids: up to the opening of the assistant's answer.
        image_starts: of each image, the index of the first token that stands for it.
    """

    ids: list[int]
    image_starts: tuple[int, ...]


class ChatEncoder:
    """A bundle's chat template and tokenizer together. Holds no state of a conversation; any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        """Finds the control tokens: the special ones, and other added tokens that the template writes or looks for."""
        self._tokenizer = tokenizer
        self._template = template
        self._control = ControlTokens(
            tokenizer.backend, others=tokenizer.chat_control_tokens, literals=template.literals
        )
        self._thoughts = ThoughtTokens.of(tokenizer, template)

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer | None) -> ChatEncoder:
        """That of a bundle.

        Raises:
            GenerationError: the bundle has no tokenizer, or its tokenizer no template.
        """
        source = tokenizer.chat_template if tokenizer else None
        if tokenizer is None or source is None:
            missing = "chat template" if tokenizer else "tokenizer"
            raise GenerationError(
                f"the bundle has no {missing}, so it can't chat: use `qwen-aot generate`, or rebuild it from a "
                "checkpoint whose tokenizer_config.json has a chat_template"
            )
        return cls(tokenizer, ChatTemplate(source, template_tokens(tokenizer.config)))

    @property
    def template(self) -> ChatTemplate:
        """The chat template."""
        return self._template

    @property
    def thoughts(self) -> ThoughtTokens | None:
        """What the model's thoughts stand between; None: it has none."""
        return self._thoughts

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        allow_special_tokens: bool = False,
    ) -> list[int]:
        """The ids of a conversation, up to the opening of the assistant's answer.

        A control token that a text spells (a content, a name, a tool's description, a variable, ...) is plain text. In
        the assistant's messages that is so for special tokens only: what else is a token there, such as `</think>`, the
        model wrote as one.

        Args:
            messages: with a `role`, and a `content` that is a text, or parts of type `text`; other entries go to the
                template as they are.
            tools: JSON schemas of functions.
            variables: what else the template gets.
            allow_special_tokens: control tokens that texts spell are control tokens.

        Raises:
            GenerationError: a message or tool isn't of this form, the template refuses them or takes no tools, or it
                acts on a control token that a text spells.
        """
        return self.encode_with_images(
            messages, tools=tools, variables=variables, allow_special_tokens=allow_special_tokens
        ).ids

    def encode_with_images(
        self,
        messages: Sequence[Message],
        *,
        image_rows: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        allow_special_tokens: bool = False,
    ) -> EncodedConversation:
        """The same, of messages in which parts of type `image` say where images stand.

        The published form: "Picture 1: ", the image's tokens, a new line; numbers begin anew in each message, and
        nothing stands between the parts.

        Args:
            messages: see `encode`.
            image_rows: tokens that stand for an image; None: there may be none.
            tools: see `encode`.
            variables: see `encode`.
            allow_special_tokens: see `encode`.

        Raises:
            GenerationError: see `encode`; or the template leaves an image out, or repeats one.
        """
        variables = variables or {}
        for name in RESERVED.intersection(variables):
            raise GenerationError(f"{name} is no variable of a template: the runtime gives it")
        others = {
            "tools": self._tools(tools),
            "variables": {name: _plain(value, name) for name, value in variables.items()},
        }
        place = None
        if image_rows is not None:
            place = placeholder_absent_from(_texts({**others, "messages": _plain(list(_list(messages)), "messages")}))
        given = {
            "messages": [self._message(message, f"messages[{n}]", place) for n, message in enumerate(_list(messages))],
            **others,
        }
        now = datetime.datetime.now()
        text = self._render(given, now)
        check_unicode(text)
        own = None if allow_special_tokens else self._own(given, text, now)
        if place is None or image_rows is None:
            return EncodedConversation(self._control.encode(text, own), ())
        return self._encode_pieces(text, own, place, image_rows, sum(each.count(place) for each in _texts(given)))

    def _encode_pieces(
        self, text: str, own: Sequence[tuple[int, int]] | None, place: str, image_rows: int, images: int
    ) -> EncodedConversation:
        """A rendered text, cut where its images stand: their tokens are control tokens, which cut any text."""
        pieces = text.split(place)
        if len(pieces) != images + 1:
            raise GenerationError(
                f"the chat template wrote {len(pieces) - 1} of {images} images: it acts on what messages say, and "
                "can't be used with images"
            )
        span = ImageTokens.of(self._tokenizer).span(image_rows)
        ids: list[int] = []
        starts = []
        position = reached = 0  # in the text; in `own`, which is ascending
        for number, piece in enumerate(pieces):
            if number:
                starts.append(len(ids) + 1)
                ids += span
            end = position + len(piece)
            within: list[tuple[int, int]] | None = None if own is None else []
            while own is not None and within is not None and reached < len(own) and own[reached][1] <= end:
                first, last = own[reached]
                within.append((first - position, last - position))
                reached += 1
            ids += self._control.encode(piece, within)
            position = end + len(place)
        return EncodedConversation(ids, tuple(starts))

    def _render(self, given: Mapping[str, Any], now: datetime.datetime) -> str:
        return self._template.render(given["messages"], tools=given["tools"], variables=given["variables"], now=now)

    def _own(self, given: Mapping[str, Any], text: str, now: datetime.datetime) -> list[tuple[int, int]]:
        """The places of the template's own control tokens in what it rendered."""
        marks = Marks.absent_from([text, *_texts(given)])
        for how in How:
            marked = self._mark(given, marks, how)
            stripped, places = marks.strip(text if marked == given else self._render(marked, now))
            own = self._control.own(text, marks, places) if stripped == text else None
            if own is not None:
                return own
        spelled = {token for each in _texts(given) for token in self._control.spelled_in(each, among=self._control.all)}
        raise GenerationError(
            f"the chat template acts on {', '.join(map(repr, sorted(spelled)))} in a text, so it is no plain text: "
            f"leave it out, {_ALLOW}"
        )

    def _mark(self, given: Mapping[str, Any], marks: Marks, how: How) -> dict[str, Any]:
        def mark(value: Any, among: frozenset[str] = self._control.all) -> Any:
            return self._control.mark(value, marks, how, among)

        special = self._control.special
        return {
            "messages": [
                mark(message, special) if message["role"] == "assistant" else mark(message)
                for message in given["messages"]
            ],
            "tools": mark(given["tools"]),
            "variables": {name: mark(value) for name, value in given["variables"].items()},  # the template's own names
        }

    def _message(self, message: Message, where: str, place: str | None) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise GenerationError(
                f"{where} is {_shown(message)}; accepted: an object with role and content, such as "
                '{"role": "user", "content": "Hello"}'
            )
        plain: dict[str, Any] = _plain(message, where)
        content = plain.get("content")
        if isinstance(content, list):
            plain["content"] = self._parts(content, where, place)
        elif content is not None and not isinstance(content, str):
            raise GenerationError(
                f"{where} has a content that is {_shown(content)}; accepted: a text, or parts of type text"
            )
        return plain

    def _parts(self, parts: list[Any], where: str, place: str | None) -> str | list[Any]:
        """Parts of a content as the template takes them: as they are, or their texts as lines.

        With images among them, one text, in which `place` stands for each.
        """
        texts, images = [], 0
        for n, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image" and place is not None:
                images += 1
                texts.append(f"{picture_label(images)}{place}\n")
                continue
            if kind != "text" or not isinstance(part.get("text"), str):
                raise GenerationError(
                    f"{where}: part {n} of the content is {f'of type {kind!r}' if kind else _shown(part)}; accepted: "
                    f'{{"type": "text", "text": ...}}{"" if place else ": this bundle takes no images"}'
                )
            texts.append(part["text"])
        if images:
            return "".join(texts)
        return parts if self._template.takes_parts else "\n".join(part["text"] for part in parts)

    def _tools(self, tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
        if tools is None:
            return None
        found = []
        for n, tool in enumerate(_list(tools, "tools")):
            if not isinstance(tool, Mapping):
                kind = f"the function {tool.__name__}" if hasattr(tool, "__name__") else _shown(tool)
                raise GenerationError(
                    f"tools[{n}] is {kind}; accepted: a JSON schema, {_SCHEMA}; transformers.utils.get_json_schema "
                    "makes one of a Python function"
                )
            found.append(_plain(tool, f"tools[{n}]"))
        if found and not self._template.takes_tools:
            raise GenerationError("the bundle's chat template takes no tools: describe them in a message instead")
        return found


def _list(value: Any, name: str = "messages") -> Sequence[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise GenerationError(f"{name} is {_shown(value)}; accepted: a list of them")
    return value


def _plain(value: Any, where: str) -> Any:
    """A value of JSON's types, which a template can't do harm with."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # subclasses carry methods
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{n}]") for n, item in enumerate(value)]
    raise GenerationError(
        f"{where} is {_shown(value)}; accepted: what JSON holds (texts, numbers, true, false, null, lists and objects)"
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _shown(value: object) -> str:
    text = repr(value)
    return f"a {type(value).__name__} ({text if len(text) <= 60 else text[:57] + '...'})"
