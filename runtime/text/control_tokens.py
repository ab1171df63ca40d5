"""Control tokens and the text that only looks like them: what is marked in a conversation, and how it is encoded.

In a conversation rendered to one text, a user's `<|im_end|>` looks like the template's own. So it is rendered twice: as
it is, and with marks around what its texts spell. Where both say the same, the marks tell whose a control token is. The
template's own become their ids; all between them is encoded as if the tokenizer had no control tokens. docs/chat.md
states the rule for whoever writes a second one.
"""

from __future__ import annotations

import bisect
import enum
import functools
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.errors import GenerationError

__all__ = ["ControlTokens", "How", "Marks", "Span", "placeholder_absent_from"]

Span = tuple[int, int]  # of characters: first, one behind the last

# Characters for marks and stand-ins are taken from the last two planes, which are for private use and have no text.
_PRIVATE = range(0xF0000, 0x10FFFE)
_SPACES = re.compile(r"\s*")
_NOT_CHARACTERS = {0xFFFFE, 0xFFFFF}
LONG_TEXT = 10_000  # characters, about a millisecond


class How(enum.Enum):
    """Where marks stand in a text. A template that looks at what is there may say something else because of one."""

    EDGES = enum.auto()  # around control tokens, and at ends of the text that could be a part of one
    TOKENS = enum.auto()  # around control tokens
    SPACED = enum.auto()  # around them and the whitespace beside them, for templates that strip what they cut there


@dataclass(frozen=True, slots=True)
class Marks:
    """Three characters that no text of a conversation has."""

    start: str  # before a control token that a text spells
    end: str  # behind it
    edge: str  # at the end of a text that a control token could continue from, or go on into

    @classmethod
    def absent_from(cls, texts: Collection[str]) -> Marks:
        """Marks that none of these texts has."""
        start, end, edge = _unused(texts, 3)
        return cls(start, end, edge)

    def strip(self, marked: str) -> tuple[str, list[tuple[str, int]]]:
        """The text without its marks, and each mark with the place in that text that it stands before."""
        pieces = re.split(f"([{self.start}{self.end}{self.edge}])", marked)
        places, length = [], 0
        for piece, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            length += len(piece)
            if mark:
                places.append((mark, length))
        return "".join(pieces[::2]), places


def placeholder_absent_from(texts: Iterable[str]) -> str:
    """A character that none of these texts has, to hold the place of what isn't text."""
    (place,) = _unused(list(texts), 1)
    return place


class ControlTokens:
    """The control tokens of a tokenizer: to be found, marked, and told from text."""

    def __init__(
        self, tokenizer: RustTokenizer, *, others: Collection[str] | None = None, literals: Collection[str] = ()
    ) -> None:
        """Makes the patterns.

        Args:
            tokenizer: its special tokens are control tokens.
            others: further added tokens that are, by their text; None: those in `literals`, but for whitespace.
            literals: texts that a template holds.
        """
        self._tokenizer = tokenizer
        self._added = dict(sorted(tokenizer.get_added_tokens_decoder().items()))
        self._of_added = _pattern(list(self._added.values()))
        if others is None:
            others = [token for text in literals for token in self._of_added.findall(text) if not token.isspace()]
        self.special = frozenset(token.content for token in self._added.values() if token.special)
        self.all = self.special | ({token.content for token in self._added.values()} & set(others))
        self._ids = {token.content: id_ for id_, token in self._added.items() if token.content in self.all}
        self._of_set = {kind: _Spellings(kind) for kind in (self.special, self.all)}
        # Such a token is looked for in normalized text: other spellings become it.
        self._has_normalized = tokenizer.normalizer is not None and any(
            token.normalized for token in self._added.values() if token.content in self.all
        )
        self._encoders: dict[str, tuple[RustTokenizer, dict[int, int], dict[str, str]]] = {}

    def mark(self, value: Any, marks: Marks, how: How, among: frozenset[str]) -> Any:
        """Puts marks into every text of a JSON value, keys included.

        Args:
            value: of None, bool, numbers, texts, lists and dicts.
            marks: absent from its texts.
            how: where they stand.
            among: `all` or `special`: the tokens to mark.
        """
        if isinstance(value, str):
            return self._of_set[among].mark(value, marks, how)
        if isinstance(value, Mapping):
            return {
                self.mark(key, marks, how, among): self.mark(item, marks, how, among) for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.mark(item, marks, how, among) for item in value]
        return value

    def spelled_in(self, text: str, *, among: frozenset[str]) -> list[str]:
        """Those of the tokens that a text spells, each once."""
        return list(dict.fromkeys(self._of_set[among].whole.findall(text)))

    def own(self, text: str, marks: Marks, places: Sequence[tuple[str, int]]) -> list[Span] | None:
        """Where a rendered text has control tokens that are the template's own.

        A spelling is a text's if marks stand around it, or one within it.

        Args:
            text: without marks.
            marks: those that `places` names.
            places: see `Marks.strip`.

        Returns:
            None if the template has changed what stood between two marks, so that this can't be told.
        """
        spelled = []
        for (mark, start), (next_mark, end) in itertools.pairwise(places):
            if (mark, next_mark) != (marks.start, marks.end):
                continue
            between = text[start:end]
            if between.strip() in self.all:
                start += len(between) - len(between.lstrip())
                spelled.append((start, start + len(between.strip())))
            elif self._of_added.search(between):
                return None
        return list(self._occurrences(text, spelled, [place for _, place in places]))

    def encode(self, text: str, own: Sequence[Span] | None, *, add_special_tokens: bool = False) -> list[int]:
        """Encodes a text in which control tokens stand only where they are named.

        Args:
            text: valid Unicode.
            own: the places of control tokens, ascending; whatever else spells one is plain text. None: every spelling
                is one, as the tokenizer's own `encode` has it.
            add_special_tokens: let the tokenizer add what it puts around every text.

        Raises:
            GenerationError: this tokenizer makes a control token of plain text, which can't be kept apart.
        """
        if own is None:
            return list(_encode(self._tokenizer, text, add_special_tokens).ids)
        if self._has_normalized or list(self._occurrences(text)) == list(own):
            encoding = _encode(self._tokenizer, text, add_special_tokens)
            if not self._has_normalized or self._has_only(encoding, text, own):
                return list(encoding.ids)
        (first,) = _unused([text], 1, together=len(self._ids) + self._holes)
        encoder, ids, stand_ins = self._encoder(first)
        pieces, position = [], 0
        for start, end in own:
            pieces += [text[position:start], stand_ins[text[start:end]]]
            position = end
        encoding = _encode(encoder, "".join([*pieces, text[position:]]), add_special_tokens)
        # What is put around a text is wanted, and has the tokenizer's own ids; the text has the encoder's, in which
        # control tokens come from stand-ins only.
        is_put = encoding.special_tokens_mask
        made = {id_ for id_, put in zip(encoding.ids, is_put, strict=True) if not put}
        unwanted = (made - set(ids)) & (set(self._ids.values()) - {self._unknown_id()})
        if unwanted:
            token = self._tokenizer.id_to_token(min(unwanted))
            raise GenerationError(
                f"the text spells the control token {token!r}, which this tokenizer can't take as plain text: leave it "
                "out, or allow special tokens in texts (allow_special_tokens=True, --allow-special-tokens)"
            )
        return [id_ if put else ids.get(id_, id_) for id_, put in zip(encoding.ids, is_put, strict=True)]

    def _has_only(self, encoding: Encoding, text: str, own: Sequence[Span]) -> bool:
        """Whether the tokenizer itself finds no other control tokens in a text than these."""
        places = set(own)
        control = set(self._ids.values()) - {self._unknown_id()}
        for id_, (start, end), is_put in zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True):
            if id_ in control and not is_put:
                token = text[start:end].strip()  # the whitespace that it takes is in its span
                start = text.index(token, start)
                if (start, start + len(token)) not in places:
                    return False
        return True

    @functools.cached_property
    def _holes(self) -> int:
        """How many ids below the model's largest have no token: a new token may be given one that is taken."""
        ids = self._tokenizer.get_vocab(with_added_tokens=False).values()
        return max(ids, default=-1) + 1 - len(ids)

    def _occurrences(self, text: str, spelled: Sequence[Span] = (), within: Sequence[int] = ()) -> Iterator[Span]:
        """Control tokens as the tokenizer finds added ones: leftmost first, and the longest of those.

        Args:
            text: to look in.
            spelled: ascending; what overlaps one is passed over.
            within: ascending places; what lies around one is passed over.
        """
        position = 0
        while match := self._of_added.search(text, position):
            start, end = match.span()
            overlap = bisect.bisect_left(spelled, (end,)) - 1  # the last that begins before the end
            inside = bisect.bisect_right(within, start)
            if (overlap >= 0 and spelled[overlap][1] > start) or (inside < len(within) and within[inside] < end):
                position = start + 1
                continue
            position = end
            if match[0] in self.all:
                yield start, end

    def _encoder(self, first: str) -> tuple[RustTokenizer, dict[int, int], dict[str, str]]:
        """The tokenizer without its control tokens, but with a character from `first` on that stands for each.

        It shares the model, so it costs no memory to speak of. Stand-ins take whitespace beside them as the tokens do.
        """
        made = self._encoders.get(first)
        if made is None:
            encoder = RustTokenizer(self._tokenizer.model)
            if self._tokenizer.normalizer is not None:
                encoder.normalizer = self._tokenizer.normalizer
            if self._tokenizer.pre_tokenizer is not None:
                encoder.pre_tokenizer = self._tokenizer.pre_tokenizer
            if self._tokenizer.post_processor is not None:
                encoder.post_processor = self._tokenizer.post_processor
            stand_ins = {content: chr(ord(first) + n) for n, content in enumerate(self._ids)}
            # The library counts tokens to number new ones, so these take the numbers up to the largest.
            encoder.add_tokens([chr(ord(first) + len(stand_ins) + n) for n in range(self._holes)])
            spellings = {}
            for id_, token in self._added.items():
                spelling = stand_ins.get(token.content, token.content)
                spellings[spelling] = id_
                flags = {"lstrip": token.lstrip, "rstrip": token.rstrip}
                if token.content not in stand_ins:
                    flags |= {"normalized": token.normalized, "single_word": token.single_word}
                encoder.add_tokens([AddedToken(spelling, **{"normalized": False, **flags})])
            found = {spelling: encoder.token_to_id(spelling) for spelling in spellings}
            ids = {new_id: spellings[spelling] for spelling, new_id in found.items() if new_id is not None}
            made = encoder, ids, stand_ins
            self._encoders = {first: made}
        return made

    def _unknown_id(self) -> int | None:
        token = getattr(self._tokenizer.model, "unk_token", None)
        return None if token is None else self._tokenizer.token_to_id(token)


class _Spellings:
    """A set of tokens, as they may stand in a text whole or cut by its ends."""

    def __init__(self, tokens: Collection[str]) -> None:
        self.whole = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
        self._heads = {token[:n] for token in tokens for n in range(1, len(token))}
        self._tails = {token[n:] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def mark(self, text: str, marks: Marks, how: How) -> str:
        inner = text.strip()  # templates strip texts: no mark stands where whitespace beside it would then be kept
        if not inner:
            return text
        before, _, after = text.partition(inner)
        reach = range(1, min(self._longest, len(inner) + 1))
        head = marks.edge if how is How.EDGES and any(inner[:n] in self._tails for n in reach) else ""
        tail = marks.edge if how is How.EDGES and any(inner[-n:] in self._heads for n in reach) else ""
        pieces, position = [before, head], 0
        for match in self.whole.finditer(inner):
            start, end = match.span()
            if how is How.SPACED:
                start = len(inner[position:start].rstrip()) + position
                end += len(_SPACES.match(inner, end)[0])  # type: ignore[index]  # it matches nothing as well
            pieces += [inner[position:start], marks.start, inner[start:end], marks.end]
            position = end
        return "".join([*pieces, inner[position:], tail, after])


def _encode(tokenizer: RustTokenizer, text: str, add_special_tokens: bool) -> Encoding:
    """Encodes a text; other threads of the interpreter go on meanwhile if it is long (`encode` stops them all)."""
    if len(text) <= LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def _pattern(tokens: Sequence[AddedToken]) -> re.Pattern[str]:
    """Any of these tokens, of those at one place the longest."""
    words = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    return re.compile(
        "|".join(
            rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
            for token in words
        )
        or "(?!)"
    )


def _unused(texts: Collection[str], count: int, together: int = 1) -> list[str]:
    """Characters for private use that no text has; `together`: each with as many behind it that none has either."""
    used = {ord(character) for text in texts for character in set(text) if ord(character) >= _PRIVATE.start}
    found: list[str] = []
    for code in range(_PRIVATE.start, _PRIVATE.stop - together, together):
        if len(found) == count:
            break
        if not (used | _NOT_CHARACTERS).intersection(range(code, code + together)):
            found.append(chr(code))
    if len(found) < count:
        raise GenerationError("the conversation uses up the characters for private use: leave some of them out")
    return found
