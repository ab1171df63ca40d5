"""A bundle's tokenizer: text to ids, ids to text, and the facts in tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.errors import BundleError, GenerationError
from qwen_aot.runtime.bundle.load import Bundle
from qwen_aot.runtime.bundle.strict_json import parse_object

__all__ = ["Tokenizer", "load_tokenizer"]

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
            BundleError: the tokenizer has an id that the model lacks, or chat_template is no template.
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
        self._chat_template = _read_template(config.get("chat_template"))
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
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, `pad_token` and `unk_token` as text, where the config has them."""
        found = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = self._config.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                found[name] = token
        return found

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to ids.

        Args:
            text: special tokens written in it become their ids.
            add_special_tokens: let the tokenizer add what it puts around every text (Qwen's adds nothing).
                False for text that a chat template made.

        Raises:
            GenerationError: the text holds surrogates (it was read from bytes that aren't UTF-8).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise GenerationError(
                f"the text isn't valid Unicode (a lone surrogate at character {error.start}): give UTF-8 text"
            ) from error
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Ids to text, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def piece(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it; None for an id of the model's padding."""
        return self._tokenizer.id_to_token(token_id)


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
    except Exception as error:  # the library raises Exception itself for whatever is wrong with the text
        raise BundleError(f"{TOKENIZER_NAME} can't be parsed ({str(error).strip()}); rebuild the bundle") from error
