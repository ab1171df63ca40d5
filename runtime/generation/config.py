"""GenerationConfig: how the tokens of one request are chosen and when it ends."""

from __future__ import annotations

import enum
import logging
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

from qwen_aot.errors import BundleError, GenerationError
from qwen_aot.runtime.bundle.load import Bundle
from qwen_aot.runtime.bundle.strict_json import parse_object

__all__ = ["UNSET", "GenerationConfig", "GenerationDefaults", "Unset"]

logger = logging.getLogger(__name__)

GENERATION_CONFIG_NAME = "generation_config.json"

# generation_config.json's keys that change what is generated and that we don't have, with the value that
# means "off".
_UNSUPPORTED: Mapping[str, object] = {
    "num_beams": 1,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": None,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": None,
}


TRANSFORMERS_TOP_K = 50  # what transformers takes where it samples and nobody gives a top_k


class Unset(enum.Enum):
    """The type of `UNSET`, which tells "not given" from None."""

    UNSET = enum.auto()


UNSET: Final = Unset.UNSET

_T = TypeVar("_T")
_Given: TypeAlias = _T | Unset


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """One request's settings, validated at construction.

    Attributes:
        max_new_tokens: None: until the context is full.
        temperature: divides the logits; 0 is greedy, and top_k and top_p then change nothing.
        top_k: the number of likeliest tokens to draw from; 0: all.
        top_p: the probability that the tokens to draw from must reach together; 1: all.
        repetition_penalty: divides the positive logits of tokens seen in prompt or output, and multiplies the
            negative ones; 1: off.
        seed: of this request's random numbers; None: a new one each time.
        stop: texts that end the request; they and what follows are not part of its output. The spelling of a
            special token stands for its id, ignore_eos or not.
        stop_token_ids: ids that end the request, besides the model's own.
        eos_token_ids: the model's own ids that end a text.
        ignore_eos: go on at eos_token_ids.
        logprobs: None: none. n: the log-probability of each token, and of the n likeliest in its place, from
            the raw logits.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check(
            "max_new_tokens",
            self.max_new_tokens,
            "at least 1 (a whole number), or None",
            self.max_new_tokens is None or (_is_whole(self.max_new_tokens) and self.max_new_tokens >= 1),
        )
        _check(
            "temperature",
            self.temperature,
            "0 (greedy) or 0.001 to 1000",
            _is_number(self.temperature) and (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3),
        )
        _check("top_k", self.top_k, "0 (off) or more (a whole number)", _is_whole(self.top_k) and self.top_k >= 0)
        _check("top_p", self.top_p, "above 0, up to 1 (off)", _is_number(self.top_p) and 0 < self.top_p <= 1)
        # As for the temperature: float32 logits stay finite, and a token that was seen can't become NaN.
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            "0.001 to 1000",
            _is_number(self.repetition_penalty) and 1e-3 <= self.repetition_penalty <= 1e3,
        )
        _check(
            "seed",
            self.seed,
            "0 or more (a whole number), or None",
            self.seed is None or (_is_whole(self.seed) and self.seed >= 0),
        )
        _check(
            "stop",
            self.stop,
            "a list of texts that aren't empty",
            _is_list(self.stop) and all(isinstance(text, str) and text for text in self.stop),
        )
        for name in ("stop_token_ids", "eos_token_ids"):
            ids = getattr(self, name)
            _check(name, ids, "a list of ids of 0 or more", _is_list(ids) and all(_is_whole(i) and i >= 0 for i in ids))
        _check("ignore_eos", self.ignore_eos, "True or False", isinstance(self.ignore_eos, bool))
        _check(
            "logprobs",
            self.logprobs,
            "0 to 100 (a whole number), or None",
            self.logprobs is None or (_is_whole(self.logprobs) and 0 <= self.logprobs <= 100),
        )

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the likeliest."""
        return self.temperature == 0

    @property
    def ending_ids(self) -> frozenset[int]:
        """Ids that end this request."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(self.eos_token_ids))


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a bundle says about generation, for settings that a request doesn't give."""

    do_sample: bool = False
    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = TRANSFORMERS_TOP_K
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> GenerationDefaults:
        """Reads generation_config.json, if the bundle has one; its ids that end a text go before the model's.

        Raises:
            BundleError: it isn't JSON, or a value is of the wrong type or out of range.
        """
        model_eos = bundle.manifest.model.eos_token_ids
        if not bundle.has(GENERATION_CONFIG_NAME):
            return cls(eos_token_ids=model_eos)
        text = bundle.read_text(GENERATION_CONFIG_NAME)
        document = parse_object(text, GENERATION_CONFIG_NAME, is_from_checkpoint=True)
        return cls.from_document(document, model_eos)

    @classmethod
    def from_document(cls, document: Mapping[str, Any], model_eos: tuple[int, ...] = ()) -> GenerationDefaults:
        """The same from a parsed generation_config.json; absent keys mean what they do in transformers.

        Raises:
            BundleError: a value is of the wrong type, or no request could be made with it.
        """
        unsupported = [k for k, off in _UNSUPPORTED.items() if document.get(k) not in (None, off)]
        if unsupported:
            logger.warning(
                "%s sets %s, which this runtime doesn't have: output differs from transformers'",
                GENERATION_CONFIG_NAME,
                ", ".join(unsupported),
            )
        eos = _read(document, "eos_token_id", (int, list), None)
        if isinstance(eos, list) and not all(type(token_id) is int for token_id in eos):
            raise BundleError(
                f"{GENERATION_CONFIG_NAME}: eos_token_id is {eos!r}; accepted: an id or a list of ids; "
                f"rebuild the bundle"
            )
        do_sample = _read(document, "do_sample", (bool,), False)
        settings: dict[str, Any] = {
            "max_new_tokens": _read(document, "max_new_tokens", (int,), None),
            "temperature": _read(document, "temperature", (int, float), 1.0),
            "top_k": _read(document, "top_k", (int,), TRANSFORMERS_TOP_K),
            "top_p": _read(document, "top_p", (int, float), 1.0),
            "repetition_penalty": _read(document, "repetition_penalty", (int, float), 1.0),
        }
        try:
            GenerationConfig(**settings)
        except GenerationError as error:
            raise BundleError(
                f"{GENERATION_CONFIG_NAME}: {error}; repair the checkpoint's own and rebuild the bundle"
            ) from error
        ids = model_eos if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        return cls(do_sample=do_sample, eos_token_ids=ids, **settings)

    def resolve(
        self,
        *,
        max_new_tokens: _Given[int | None] = UNSET,
        temperature: _Given[float] = UNSET,
        top_k: _Given[int] = UNSET,
        top_p: _Given[float] = UNSET,
        repetition_penalty: _Given[float] = UNSET,
        seed: _Given[int | None] = UNSET,
        stop: _Given[Sequence[str]] = UNSET,
        stop_token_ids: _Given[Sequence[int]] = UNSET,
        ignore_eos: _Given[bool] = UNSET,
        logprobs: _Given[int | None] = UNSET,
    ) -> GenerationConfig:
        """A request's settings: those given, and the bundle's for the rest.

        - Nothing given: the bundle decides between greedy (`do_sample` false or absent) and sampling.
        - temperature, top_k or top_p given: the request samples, whatever `do_sample` says.
        - temperature 0 given: greedy, and the bundle's repetition penalty is off unless one is given.

        Raises:
            GenerationError: a value is out of range or of another type.
        """
        samples = self.do_sample or any(value is not UNSET for value in (temperature, top_k, top_p))
        chosen_temperature = _or(temperature, self.temperature if samples else 0.0)
        penalty = 1.0 if temperature == 0 else self.repetition_penalty
        return GenerationConfig(
            max_new_tokens=_or(max_new_tokens, self.max_new_tokens),
            temperature=chosen_temperature,
            top_k=_or(top_k, self.top_k),
            top_p=_or(top_p, self.top_p),
            repetition_penalty=_or(repetition_penalty, penalty),
            seed=_or(seed, None),
            stop=_as_tuple(_or(stop, ())),
            stop_token_ids=_as_tuple(_or(stop_token_ids, ())),
            eos_token_ids=self.eos_token_ids,
            ignore_eos=_or(ignore_eos, False),
            logprobs=_or(logprobs, None),
        )


def _or(given: _Given[_T], default: _T) -> _T:
    return default if isinstance(given, Unset) else given


def _as_tuple(value: Sequence[_T]) -> tuple[_T, ...]:
    """What was given as a list; anything else as it is, to be refused: a tuple of a text would be its letters."""
    return tuple(value) if _is_list(value) else value  # type: ignore[return-value]


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)


def _check(name: str, value: object, accepted: str, is_fine: bool) -> None:
    if not is_fine:
        raise GenerationError(f"{name} is {value!r}; accepted: {accepted}")


def _read(document: Mapping[str, Any], key: str, types: tuple[type, ...], default: Any) -> Any:
    value = document.get(key)
    if value is None:
        return default
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = " or ".join(t.__name__ for t in types)
        raise BundleError(f"{GENERATION_CONFIG_NAME}: {key} is {value!r}; accepted: {names}; rebuild the bundle")
    return value
