"""What `compare` and its workers say to each other: one JSON object a line. Standard library only.

A worker loads its model, prints READY, then answers each request {"prompt", "short_prompts", "count"} on standard
input with seconds for the prompt and for `count` greedy tokens of every row behind its short prompt, until the input
ends. Short prompts are of one length, one for each of the rows that the worker's command line names.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

READY = "ready"


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds until the prompt's first token is known, and for steps that decode a token of each row."""

    prefill_seconds: float
    decode_seconds: float


def serve(measure: Callable[[list[int], list[list[int]], int], Measured]) -> None:
    """Answers requests until there are no more."""
    print(READY, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        measured = measure(request["prompt"], request["short_prompts"], request["count"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(asdict(measured) | {"peak_memory_bytes": peak}), flush=True)
