"""What became of one request of a load: an answer with its times, or a failure of a kind that can be counted."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_aot.str_enum import StrEnum

__all__ = ["Answer", "Failure", "FailureKind", "Outcome"]


class FailureKind(StrEnum):
    """Why a request has no answer."""

    CONNECT = "connect"  # no connection could be made
    STATUS = "status"  # an HTTP status that isn't 200; `Failure.status` has it
    TIMEOUT = "timeout"  # the answer wasn't whole in time
    DROPPED = "dropped"  # the connection ended in the middle
    INCOMPLETE = "incomplete"  # the response ended in order, before its stream's [DONE]
    STREAM_ERROR = "error in stream"  # an event of the stream is an error
    MALFORMED = "malformed"  # no stream of completion events
    NO_USAGE = "no usage"  # the stream doesn't say how many tokens it has
    WRONG_COUNTS = "wrong counts"  # it says what can't be
    ENGINE = "engine"  # of a bundle: its step failed, or it took no more requests


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that was answered whole; times are those of `time.perf_counter`, in seconds.

    Attributes:
        start: when the load has it sent: what sends it may be late, and a user's wait begins here.
        pieces: when each piece of text came; at least one.
        end: when the end of the stream came.
        prompt_tokens: as the server counts.
        completion_tokens: as the server counts, at least 1; pieces may be more or fewer.
    """

    start: float
    pieces: tuple[float, ...]
    end: float
    prompt_tokens: int
    completion_tokens: int

    @property
    def first_token(self) -> float:
        """From the start to the first text."""
        return self.pieces[0] - self.start

    @property
    def between_tokens(self) -> float | None:
        """From the first text to the last, for each token behind the first; None: there is one token, or one piece."""
        if self.completion_tokens < 2 or len(self.pieces) < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.completion_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Between one piece of text and the next."""
        return [later - earlier for earlier, later in zip(self.pieces, self.pieces[1:], strict=False)]

    @property
    def end_to_end(self) -> float:
        """From the start to the end."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that has no whole answer.

    Attributes:
        kind: what it is counted as.
        message: for people, of at most some hundred characters.
        start: as in `Answer`.
        end: when it failed.
        status: the HTTP status, where that is why.
    """

    kind: FailureKind
    message: str
    start: float
    end: float
    status: int | None = None

    @property
    def name(self) -> str:
        """What it is counted under: `status 429` and `status 500` are two kinds."""
        return f"{self.kind} {self.status}" if self.status is not None else str(self.kind)


Outcome = Answer | Failure
