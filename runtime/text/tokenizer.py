"""A bundle's tokenizer: text to ids, ids to text, and the facts in tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.errors import BundleError, GenerationError, is_panic
from qwen_aot.runtime.bundle.load import Bundle
from qwen_aot.runtime.bundle.strict_json import parse_object
from qwen_aot.runtime.text.control_tokens import ControlTokens, Span

__all__ = ["Tokenizer", "check_unicode", "load_tokenizer"]

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


class Tokenizer:
    """Wraps `tokenizers`; holds no state of a conversation."""

    def __init__(self, tokenizer: RustTokenizer, config: dict[str, Any], *, vocab_size: int) -> None:
        """Checks that every id is one that the model has.

        Args:
            tokenizer: of the `tokenizers` library; its padding and truncation are switched off.
            config: tokenizer_config.json (may be empty).
            vocab_size: the model's; often larger than the tokenizer's, being padded.

        Raises:
            BundleError: the tokenizer has an id that the model lacks, or the config a value of another type.
        """
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= vocab_size:
            raise BundleError(
                f"the tokenizer's largest id is {largest}, but the model's vocabulary ends before {vocab_size}: the "
                "bundle holds the tokenizer of another model; rebuild it from a checkpoint with its own"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._config = config
        self._special_tokens = ControlTokens(tokenizer)
        self._chat_template = _read_template(config.get("chat_template"))
        self._chat_control_tokens = _read_control_tokens(config.get("chat_control_tokens"))
        self._special_ids = frozenset(
            id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )

    @property
    def backend(self) -> RustTokenizer:
        """The tokenizer of the `tokenizers` library."""
        return self._tokenizer

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that have no text of their own (<|endoftext|>, <|im_start|>, ...)."""
        return self._special_ids

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is spelled so; None if there is none."""
        token_id = self._tokenizer.token_to_id(text)
        return token_id if token_id in self._special_ids else None

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template; of several named ones, `default`."""
        return self._chat_template

    @property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json (may be empty)."""
        return self._config

    @property
    def chat_control_tokens(self) -> list[str] | None:
        """Tokens that chats use as control tokens besides the special ones; None: the config doesn't say."""
        return self._chat_control_tokens

    def encode(self, text: str, *, add_special_tokens: bool = True, allow_special_tokens: bool = True) -> list[int]:
        """Text to ids; conversations are `ChatEncoder`'s.

        Args:
            text: to encode.
            add_special_tokens: let the tokenizer add what it puts around every text (Qwen's adds nothing).
            allow_special_tokens: special tokens that the text spells become their ids; False: they are plain text.

        Raises:
            GenerationError: the text holds surrogates (it was read from bytes that aren't UTF-8).
        """
        check_unicode(text)
        own: list[Span] | None = None if allow_special_tokens else []
        return self._special_tokens.encode(text, own, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Ids to text, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def piece(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it; None for an id of the model's padding."""
        return self._tokenizer.id_to_token(token_id)


def check_unicode(text: str) -> None:
    """Refuses surrogates, which no tokenizer takes.

    Raises:
        GenerationError: the text holds some (it was read from bytes that aren't UTF-8).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"the text isn't valid Unicode (a lone surrogate at character {error.start}): give UTF-8 text"
        ) from error


def _read_template(value: Any) -> str | None:
    """`chat_template`: a text, or several as [{"name": ..., "template": ...}]."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise BundleError(
            f"{TOKENIZER_CONFIG_NAME}: chat_template is a {type(value).__name__}; accepted: a text, or a list of "
            "objects with name and template; repair it in the checkpoint and rebuild"
        )
    return value


def _read_control_tokens(value: Any) -> list[str] | None:
    if value is not None and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise BundleError(
            f"{TOKENIZER_CONFIG_NAME}: chat_control_tokens is {value!r}; accepted: a list of texts; repair it in the "
            "checkpoint and rebuild"
        )
    return value


def load_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """The bundle's tokenizer; None if it was built from a checkpoint without one.

    Raises:
        BundleError: its files can't be parsed or don't fit the model.
    """
    name = bundle.manifest.text.tokenizer
    if name is None:
        return None
    config: dict[str, Any] = {}
    if bundle.has(TOKENIZER_CONFIG_NAME):
        config = parse_object(bundle.read_text(TOKENIZER_CONFIG_NAME), TOKENIZER_CONFIG_NAME, is_from_checkpoint=True)
    return Tokenizer(
        _parse_tokenizer(bundle.read_text(name)),
        config,
        vocab_size=bundle.manifest.model.vocab_size,
    )


def _parse_tokenizer(text: str) -> RustTokenizer:
    try:
        return RustTokenizer.from_str(text)
    except BaseException as error:  # the library raises Exception itself for what is wrong, and panics at some of it
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise BundleError(f"{TOKENIZER_NAME} can't be parsed ({str(error).strip()}); rebuild the bundle") from error
