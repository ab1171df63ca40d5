"""GenerationConfig: how the tokens of one request are chosen and when it ends."""

from __future__ import annotations

import enum
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias, TypeGuard, TypeVar

from qwen_aot.errors import BundleError, GenerationError
from qwen_aot.runtime.bundle.load import Bundle
from qwen_aot.runtime.bundle.manifest import Manifest
from qwen_aot.runtime.bundle.strict_json import parse_object
from qwen_aot.runtime.generation.checkpoint_settings import GENERATION_CONFIG_NAME, TRANSFORMERS_TOP_K, read_settings

__all__ = ["COMPLETION_TOKENS", "UNSET", "GenerationConfig", "GenerationDefaults", "Unset"]

COMPLETION_TOKENS = 1024  # of a request that isn't a chat's, where neither it nor the bundle says
MAX_CHOICES = 128  # as OpenAI's API
MAX_LOGPROBS = 100


class Unset(enum.Enum):
    """The type of `UNSET`, which tells "not given" from None."""

    UNSET = enum.auto()


UNSET: Final = Unset.UNSET

_T = TypeVar("_T")
_Given: TypeAlias = _T | Unset


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """One request's settings, validated at construction; docs/generation.md states what each does and in which order.

    What isn't given is off, and each token the likeliest; when a request ends, the bundle says: see
    `GenerationDefaults.complete`.

    Attributes:
        max_new_tokens: None: the bundle's, see `GenerationDefaults.complete`. A larger number than the context has
            room for is cut to it.
        min_new_tokens: ids that end the request aren't chosen before so many tokens.
        temperature: divides the logits; 0 is greedy, and top_k, top_p and min_p then change nothing.
        top_k: the number of likeliest tokens to draw from; 0: all.
        top_p: the probability that the tokens to draw from must reach together; 1: all.
        min_p: the least probability of a token to draw from, as a share of the likeliest one's; 0: all.
        repetition_penalty: divides the positive logits of tokens seen in prompt or output, and multiplies the
            negative ones; 1: off.
        presence_penalty: taken from the logits of tokens seen in the output; 0: off.
        frequency_penalty: taken from a token's logit as often as the output has it; 0: off.
        logit_bias: token id -> what is added to its logit.
        suppress_tokens: ids that are never chosen.
        seed: of this request's random numbers; None: new ones each time. Each choice has its own.
        n: how many choices, each an output of its own, are made of the prompt.
        stop: texts that end the request; they and what follows are not part of its output. The spelling of a
            special token stands for its id, ignore_eos or not. None: the bundle's.
        stop_token_ids: ids that end the request, besides the model's own.
        eos_token_ids: the model's own ids that end a text; None: the bundle's.
        ignore_eos: go on at eos_token_ids.
        logprobs: None: none. k: the log-probability of each token, and of the k likeliest in its place, from
            the raw logits.
        prompt_logprobs: the same for each token of the prompt, given those before it. The prompt then takes a decode
            step for each token, and starts from nothing that the cache holds.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    suppress_tokens: tuple[int, ...] = ()
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_draws()
        self._check_changes()
        self._check_ends()
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            is_fine = value is None or (_is_whole(value) and 0 <= value <= MAX_LOGPROBS)
            _check(name, value, f"0 to {MAX_LOGPROBS} (a whole number), or None", is_fine)
        # Copies: what the caller's own become later is no part of these settings.
        object.__setattr__(self, "logit_bias", {int(key): float(bias) for key, bias in self.logit_bias.items()})
        for name in ("suppress_tokens", "stop", "stop_token_ids", "eos_token_ids"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))

    def _check_lengths(self) -> None:
        _check(
            "max_new_tokens",
            self.max_new_tokens,
            "at least 1 (a whole number), or None",
            self.max_new_tokens is None or (_is_whole(self.max_new_tokens) and self.max_new_tokens >= 1),
        )
        _check(
            "min_new_tokens",
            self.min_new_tokens,
            "0 (off) or more (a whole number)",
            _is_whole(self.min_new_tokens) and self.min_new_tokens >= 0,
        )
        if self.max_new_tokens is not None:
            _check(
                "min_new_tokens",
                self.min_new_tokens,
                f"at most max_new_tokens, {self.max_new_tokens}",
                self.min_new_tokens <= self.max_new_tokens,
            )

    def _check_draws(self) -> None:
        _check(
            "temperature",
            self.temperature,
            "0 (greedy) or 0.001 to 1000",
            _is_number(self.temperature) and (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3),
        )
        _check("top_k", self.top_k, "0 (off) or more (a whole number)", _is_whole(self.top_k) and self.top_k >= 0)
        _check("top_p", self.top_p, "above 0, up to 1 (off)", _is_number(self.top_p) and 0 < self.top_p <= 1)
        _check("min_p", self.min_p, "0 (off) to 1", _is_number(self.min_p) and 0 <= self.min_p <= 1)
        _check(
            "seed",
            self.seed,
            "0 or more (a whole number), or None",
            self.seed is None or (_is_whole(self.seed) and self.seed >= 0),
        )
        _check("n", self.n, f"1 to {MAX_CHOICES} (a whole number)", _is_whole(self.n) and 1 <= self.n <= MAX_CHOICES)

    def _check_changes(self) -> None:
        # As for the temperature: float32 logits stay finite, and a token that was seen can't become NaN.
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            "0.001 to 1000",
            _is_number(self.repetition_penalty) and 1e-3 <= self.repetition_penalty <= 1e3,
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, "-2 to 2 (0: off)", _is_number(value) and -2 <= value <= 2)
        _check("logit_bias", self.logit_bias, "a mapping of ids to biases", isinstance(self.logit_bias, Mapping))
        for token_id, bias in self.logit_bias.items():
            _check("logit_bias", {token_id: bias}, "ids of 0 or more", _is_whole(token_id) and token_id >= 0)
            _check("logit_bias", {token_id: bias}, "biases of -100 to 100", _is_number(bias) and -100 <= bias <= 100)

    def _check_ends(self) -> None:
        _check(
            "stop",
            self.stop,
            "a list of texts that aren't empty",
            self.stop is None or (_is_list(self.stop) and all(isinstance(text, str) and text for text in self.stop)),
        )
        for name in ("suppress_tokens", "stop_token_ids", "eos_token_ids"):
            ids = getattr(self, name)
            is_fine = _is_list(ids) and all(_is_whole(i) and i >= 0 for i in ids)
            _check(name, ids, "a list of ids of 0 or more", is_fine or (ids is None and name == "eos_token_ids"))
        _check("ignore_eos", self.ignore_eos, "True or False", isinstance(self.ignore_eos, bool))

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the likeliest."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a bundle says about generation, for settings that a request doesn't give."""

    do_sample: bool = False
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = TRANSFORMERS_TOP_K
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    suppress_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> GenerationDefaults:
        """Reads the manifest and generation_config.json, if the bundle has one.

        Raises:
            BundleError: it isn't JSON, or a value is of the wrong type or out of range.
        """
        if not bundle.has(GENERATION_CONFIG_NAME):
            return cls.from_manifest(bundle.manifest)
        text = bundle.read_text(GENERATION_CONFIG_NAME)
        document = parse_object(text, GENERATION_CONFIG_NAME, is_from_checkpoint=True)
        return cls.from_document(document, bundle.manifest)

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> GenerationDefaults:
        """Of a bundle without a generation_config.json: greedy, with the manifest's ends and length."""
        return cls(max_new_tokens=manifest.default_max_new_tokens, eos_token_ids=manifest.model.eos_token_ids)

    @classmethod
    def from_document(cls, document: Mapping[str, Any], manifest: Manifest | None = None) -> GenerationDefaults:
        """Of a parsed generation_config.json; absent keys mean what they do in transformers.

        The ids that end a text are its own and the manifest's together: each may lack the one that ends a turn.

        Raises:
            BundleError: a value is of the wrong type, or no request could be made with it.
        """
        settings = read_settings(document)
        named = settings.pop("eos_token_ids")
        others = () if manifest is None else manifest.model.eos_token_ids
        if settings["max_new_tokens"] is None and manifest is not None:
            settings["max_new_tokens"] = manifest.default_max_new_tokens
        defaults = cls(eos_token_ids=tuple(dict.fromkeys((*named, *others))), **settings)
        try:
            for is_sampled in (False, True):
                replace(defaults, do_sample=is_sampled).complete(None, is_chat=False, room=1)
        except GenerationError as error:
            raise BundleError(
                f"{GENERATION_CONFIG_NAME}: {error}; repair the checkpoint's own and rebuild the bundle"
            ) from error
        return defaults

    def resolve(
        self,
        *,
        max_new_tokens: _Given[int | None] = UNSET,
        min_new_tokens: _Given[int] = UNSET,
        temperature: _Given[float] = UNSET,
        top_k: _Given[int] = UNSET,
        top_p: _Given[float] = UNSET,
        min_p: _Given[float] = UNSET,
        repetition_penalty: _Given[float] = UNSET,
        presence_penalty: _Given[float] = UNSET,
        frequency_penalty: _Given[float] = UNSET,
        logit_bias: _Given[Mapping[int, float]] = UNSET,
        suppress_tokens: _Given[Sequence[int]] = UNSET,
        seed: _Given[int | None] = UNSET,
        n: _Given[int] = UNSET,
        stop: _Given[Sequence[str] | None] = UNSET,
        stop_token_ids: _Given[Sequence[int]] = UNSET,
        eos_token_ids: _Given[Sequence[int] | None] = UNSET,
        ignore_eos: _Given[bool] = UNSET,
        logprobs: _Given[int | None] = UNSET,
        prompt_logprobs: _Given[int | None] = UNSET,
    ) -> GenerationConfig:
        """A request's settings: those given, and the bundle's for the rest.

        - Nothing given: the bundle decides between greedy (`do_sample` false or absent) and sampling.
        - temperature, top_k, top_p or min_p given: the request samples, whatever `do_sample` says.
        - temperature 0 given: greedy, and the bundle's repetition penalty is off unless one is given.
        - None, where a setting may be None, is the same as not given.

        Raises:
            GenerationError: a value is out of range or of another type.
        """
        samples = self.do_sample or any(value is not UNSET for value in (temperature, top_k, top_p, min_p))
        chosen_temperature = _or(temperature, self.temperature if samples else 0.0)
        penalty = 1.0 if temperature == 0 else self.repetition_penalty
        length = _or(max_new_tokens, None)
        # What the bundle asks at least is no reason to refuse a shorter request.
        shortest = min(self.min_new_tokens, length) if _is_whole(length) else self.min_new_tokens
        return GenerationConfig(
            max_new_tokens=length,
            min_new_tokens=_or(min_new_tokens, shortest),
            temperature=chosen_temperature,
            top_k=_or(top_k, self.top_k),
            top_p=_or(top_p, self.top_p),
            min_p=_or(min_p, self.min_p),
            repetition_penalty=_or(repetition_penalty, penalty),
            presence_penalty=_or(presence_penalty, 0.0),
            frequency_penalty=_or(frequency_penalty, 0.0),
            logit_bias=_or(logit_bias, {}),
            suppress_tokens=_as_tuple(_or(suppress_tokens, self.suppress_tokens)),
            seed=_or(seed, None),
            n=_or(n, 1),
            stop=_as_tuple(_or(stop, None)),
            stop_token_ids=_as_tuple(_or(stop_token_ids, ())),
            eos_token_ids=_as_tuple(_or(eos_token_ids, None)),
            ignore_eos=_or(ignore_eos, False),
            logprobs=_or(logprobs, None),
            prompt_logprobs=_or(prompt_logprobs, None),
        )

    def complete(self, config: GenerationConfig | None, *, is_chat: bool, room: int) -> GenerationConfig:
        """The settings that a request runs with: when it ends is known, whatever was left open.

        Args:
            config: the request's; None: nothing was given.
            is_chat: whether it answers in a chat.
            room: tokens that may follow its prompt, at least 1.

        Returns:
            max_new_tokens, stop and eos_token_ids are not None. The length is the one given, else the bundle's, else
            the room for a chat and `COMPLETION_TOKENS` for another request; never more than the room.
        """
        config = self.resolve() if config is None else config
        length = self.max_new_tokens if config.max_new_tokens is None else config.max_new_tokens
        if length is None:
            length = room if is_chat else COMPLETION_TOKENS
        length = min(length, room)
        return replace(
            config,
            max_new_tokens=length,
            min_new_tokens=min(config.min_new_tokens, length),
            stop=self.stop if config.stop is None else config.stop,
            eos_token_ids=self.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids,
        )


def _or(given: _Given[_T], default: _T) -> _T:
    return default if isinstance(given, Unset) else given


def _as_tuple(value: Any) -> Any:
    """What was given as a list; anything else as it is, to be refused: a tuple of a text would be its letters."""
    return tuple(value) if _is_list(value) else value


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)


def _check(name: str, value: object, accepted: str, is_fine: bool) -> None:
    if not is_fine:
        raise GenerationError(f"{name} is {value!r}; accepted: {accepted}")
