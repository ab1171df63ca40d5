"""GrammarCompiler: grammars to constraints of a tokenizer's tokens, by llguidance.

llguidance spends a bounded number of steps on each thing, and a matcher that needs more is in error for good. What its
limits stand for was measured on Qwen's vocabulary of 151,936 tokens: docs/serving.md has the times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import llguidance
import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import ConstraintError
from qwen_aot.runtime.server.constraints.grammar import Grammar, HeldJson, json_grammar
from qwen_aot.runtime.text.token_bytes import TokenBytes
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["CompiledGrammar", "GrammarCompiler", "GrammarError"]

# Masks are made by the thread that drives the engine, so these also bound what one answer costs the others: some 10 ms
# a token at worst. A state of the lexer takes 1 to 2 kB.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    max_grammar_size=200_000,
    max_items_in_row=2_000,
    max_lexer_states=10_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    verbose_errors=False,  # a message with the grammar's state would be long, and show the schema in our log
)

# Codes of llguidance (`StopReason`) that are all it says, and what they mean to whoever gave a schema.
_STOP_REASONS = {
    "LexerTooComplex": "it takes too much work: shorten its patterns and lists",
    "NoExtension": "no text fits it",
    "NoExtensionBias": "no text fits it",
    "ParserTooComplex": "it takes too much work: shorten its lists, or make more of its properties required",
}
_DETAILS = "\n<non-verbose/>"  # what follows a message where details are left out
# The masks of eight tokens, by the byte that says which of them may come, the lowest bit first.
_MASKS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"),
    np.float32(0),
    np.float32(-np.inf),
)
_MAX_REASON = 200  # characters of what llguidance says

# Of an answer, before a grammar counts as compiled: behind a `{` is all that an object may begin with.
PROBED_TOKENS = 3


class GrammarError(Exception):
    """A grammar that can't be compiled.

    Attributes:
        where: the field or schema that is at fault.
        reason: why.
    """

    def __init__(self, where: str, reason: str) -> None:
        """Says both."""
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


class GrammarCompiler:
    """Compiles for one tokenizer; any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Sorts the vocabulary: a second and 60 MB for 151,936 tokens, in which no other thread of Python runs.

        Args:
            tokenizer: of the model.
            vocab_size: of the model, V.
        """
        vocabulary = _Vocabulary(tokenizer, vocab_size)
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary))
        self._vocab_size = vocab_size

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compiles a grammar and makes its first masks. Other threads run meanwhile.

        Raises:
            GrammarError: it isn't one, takes too much work, or no text fits it.
        """
        with _contained(lambda said: GrammarError(grammar.where, said)):
            return self._compile(grammar)

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        matcher = self._matcher(grammar.lark)
        reason = _failure(matcher)
        if reason is None:
            return CompiledGrammar(matcher, grammar.where, self._vocab_size)
        for part in grammar.parts:
            if (of_part := self._failure_of(part)) is not None:
                raise GrammarError(part.where, of_part)
        raise GrammarError(grammar.where, reason)

    def _failure_of(self, part: HeldJson) -> str | None:
        """Why one of a grammar's schemas can't be used, if it can't."""
        alone = self._matcher(llguidance.LLMatcher.grammar_from_json_schema(part.json))
        if alone.is_error():
            return _reason(alone)
        return _failure(self._matcher(json_grammar(part).lark))

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)


class CompiledGrammar:
    """See `ConstraintSource`. A constraint is a copy, which takes some 0.1 ms."""

    def __init__(self, matcher: llguidance.LLMatcher, where: str, vocab_size: int) -> None:
        """Keeps a matcher that has seen nothing, which nobody else has.

        Args:
            matcher: of the grammar.
            where: see `Grammar`.
            vocab_size: of the model.
        """
        self._matcher = matcher
        self._where = where
        self._vocab_size = vocab_size

    def start(self) -> _MatcherConstraint:
        """See `ConstraintSource`."""
        return _MatcherConstraint(self._matcher.deep_copy(), self._where, self._vocab_size)


class _MatcherConstraint:
    """See `Constraint`."""

    def __init__(self, matcher: llguidance.LLMatcher, where: str, vocab_size: int) -> None:
        self._matcher = matcher
        self._where = where
        self._vocab_size = vocab_size

    def mask(self) -> NDArray[np.float32]:
        """See `Constraint`."""
        with _contained(self._broken):
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()  # a matcher in error allows the end
        mask: NDArray[np.float32] = _MASKS.take(bits, axis=0).reshape(-1)[: self._vocab_size]
        return mask

    def accept(self, token_id: int) -> None:
        """See `Constraint`."""
        with _contained(self._broken):
            self._matcher.consume_token(token_id)
        self._check()

    @property
    def may_end(self) -> bool:
        """See `Constraint`."""
        return bool(self._matcher.is_accepting())

    @property
    def is_finished(self) -> bool:
        """See `Constraint`."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise self._broken(f"{_reason(self._matcher)}; make it simpler")

    def _broken(self, said: str) -> ConstraintError:
        return ConstraintError(f"the answer can't be held to {self._where} any more: {said}")


class _Vocabulary:
    """What llguidance reads of a tokenizer: each token's bytes, and that none of them ends a text.

    What ends an output, generation knows. Special tokens and ids without a token have no bytes, so no text has them.
    """

    eos_token_id = None  # one behind the vocabulary is made
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        known = TokenBytes(tokenizer)
        self.tokens = [known.of(token_id) for token_id in range(vocab_size)]

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that is forced, of which there is none: see `grammar`."""
        return []


@contextlib.contextmanager
def _contained(make_error: Callable[[str], Exception]) -> Iterator[None]:
    """What goes wrong in llguidance is one request's: a panic of Rust is no Exception, and would end the service.

    Args:
        make_error: of what went wrong, the error that is raised in its place.
    """
    try:
        yield
    except (GrammarError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise make_error(f"llguidance failed with a {type(error).__name__}") from error


def _failure(matcher: llguidance.LLMatcher) -> str | None:
    """Why a new matcher can't be used, if it can't; what takes too much work shows in its first masks."""
    probe = matcher.deep_copy()
    for _ in range(PROBED_TOKENS):
        if probe.is_stopped():
            break
        probe.consume_token(
            int(np.unpackbits(np.frombuffer(probe.compute_bitmask(), np.uint8), bitorder="little").argmax())
        )
    return _reason(probe) if probe.is_error() else None


def _reason(matcher: llguidance.LLMatcher) -> str:
    said = matcher.get_error().removesuffix(_DETAILS)
    return _STOP_REASONS.get(said) or " ".join(said.split())[:_MAX_REASON]
