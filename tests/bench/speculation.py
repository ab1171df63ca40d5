"""What speculation by prompt lookup gains: the same answers with and without drafts, from one bundle in one run.

    python -m tests.bench.speculation BUNDLE --rounds 3

Four kinds of prompts: edits and summaries of ten passages (tests/bench/speculation_prompts, written for this), copies
of them, and ten where there is nothing to copy. The bundle (`build-engine --speculate 4`) answers each greedily, with
and without drafts in turn, so that a drift of the machine falls on both. A kind's figure is its tokens over the seconds
that decoding took, medians over the rounds of each prompt; the ratio of both is what drafts gain.

Also: how far logits of a step with several tokens lie from those of steps with one (kernels add in another order, and
those that round activations to 8 bits round some the other way), and whether answers differ anywhere but where the two
best logits are nearer to each other than twice that.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_aot.machine import usable_cores
from qwen_aot.runtime.generation.batch import Batch
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.generation.request import Completion, Request
from tests.bench.results import new_file, write_new

FOLDER = Path(__file__).parent / "speculation_prompts"
# At most: about as many as the passages have, or a third of them; beyond, small models repeat themselves.
ANSWER_TOKENS: Mapping[str, int] = {"edit": 160, "summary": 64, "copy": 160, "other": 160}
BARS: Mapping[str, float] = {"edit and summary": 1.3, "copy": 1.8, "other": 0.97}

# Of each passage: what to change, and how the changed text begins.
EDITS: Mapping[str, tuple[str, str]] = {
    "harbour.txt": ("with the town called Norwick in the place of Veldwick", "The harbour of Norwick was built"),
    "bread.txt": ("for twice as much bread", "Mix one thousand grams of flour"),
    "letter.txt": ("to Mr Okafor in the place of Ms Halvorsen", "Dear Mr Okafor,\n\nThank you for your letter"),
    "inventory.txt": ("with shelf 3 renamed to shelf 5", "| part  | name            | shelf | count | price |\n"),
    "settings.json": ("with an interval of 300 seconds", '{\n  "name": "weather-station",\n  "interval_seconds": 300,'),
    "statistics.py.txt": ("with `total` renamed to `amount`", "def mean(values):\n    amount = 0.0\n"),
    "queue.c.txt": ("with room for 128 items", "struct queue {\n    int items[128];\n"),
    "meeting.txt": (
        "with the date corrected to the tenth of September",
        "Minutes of the meeting of the sailing club on",
    ),
    "bats.txt": ("in which bats are called flying mice", "Flying mice find their way in the dark"),
    "notice.txt": ("for the south stairwell", "Notice to all tenants. From Monday the sixth of March to Friday"),
}
# Of each passage: what the answer quotes, and how it begins.
SUMMARIES: Mapping[str, tuple[str, str]] = {
    "harbour.txt": ("The sentences that tell what each stage brought", "Each stage changed"),
    "bread.txt": ("The steps with a time in them", "1. Cover the bowl with a cloth"),
    "letter.txt": ("What the committee has decided and asks, in its own words", '"We have asked the parks department'),
    "inventory.txt": ("The rows of washers and hinges", "| B-200 | copper washer"),
    "settings.json": ("The settings of the sensors that are enabled", '{"id": "temperature", "pin": 4,'),
    "statistics.py.txt": ("The two functions for mean and median", "def mean(values):\n"),
    "queue.c.txt": ("The functions that change the queue", "int queue_push(struct queue *q, int item) {\n"),
    "meeting.txt": ("The decisions, as the minutes have them", "The club decided to raise"),
    "bats.txt": ("The sentences about hunting", "When a bat hunts, it"),
    "notice.txt": ("What a tenant must do", "Please fill a bucket"),
}
OTHER: Sequence[str] = (
    "Write a short story about a lighthouse keeper and his dog.",
    "Explain to a child why the sky is blue.",
    "What should I think about before I buy a used bicycle?",
    "Write a poem of eight lines about the first snow.",
    "How does a refrigerator keep things cold?",
    "Describe a market on a summer morning.",
    "What are good reasons to learn a second language?",
    "Invent a board game for two players, and tell its rules.",
    "Why do leaves change their colour in autumn?",
    "Write a speech for a grandmother's eightieth birthday.",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one prompt: tokens and seconds of decoding, with and without drafts; medians over rounds."""

    kind: str
    plain_tokens: int
    plain_seconds: float
    tokens: int
    seconds: float
    is_same: bool
    gap: float | None  # between the two best logits of plain decoding, where the answers first differ


@dataclass(frozen=True, slots=True)
class Gain:
    """Of one kind of prompts."""

    prompts: int
    plain_tokens_per_second: float
    tokens_per_second: float
    ratio: float
    lowest: float  # of its prompts
    highest: float


def prompts(generator: Generator) -> list[tuple[str, list[int]]]:
    """Kind and token ids of each: texts to be continued, and questions to be answered."""
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    found = []
    for name in EDITS:
        passage = (FOLDER / name).read_text(encoding="utf-8").rstrip()
        change, start = EDITS[name]
        found.append(("edit", f"{passage}\n\n---\n\nThe same text, {change}:\n\n{start}"))
        what, start = SUMMARIES[name]
        found.append(("summary", f"{passage}\n\n---\n\n{what}:\n\n{start}"))
        opening = passage[: len(passage) // 8]
        found.append(("copy", f"{passage}\n\n---\n\nThe same text again, unchanged:\n\n{opening}"))
    texts = [(kind, tokenizer.encode(text.rstrip(" "))) for kind, text in found]
    questions = [generator.chat_encoder.encode([{"role": "user", "content": text}]) for text in OTHER]
    return texts + [("other", ids) for ids in questions]


def answer(batch: Batch, ids: Sequence[int], tokens: int) -> Completion:
    """Greedy, alone."""
    batch.add(Request(ids, GenerationConfig(max_new_tokens=tokens)))
    last = None
    while not batch.is_idle:
        last = batch.step()[-1:] or last
    batch.restart()
    assert last
    (completion,) = last
    assert isinstance(completion, Completion)
    return completion


def measure(generator: Generator, kind: str, ids: Sequence[int], rounds: int) -> Answer:
    """One prompt, plain and with drafts in turn; a new batch each time, which has learned nothing of the prompt."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    texts: dict[bool, tuple[int, ...]] = {}
    for _ in range(rounds):
        for speculate in (False, True):
            batch = Batch(generator.engine, None, generator.defaults, speculate=speculate)
            completion = answer(batch, ids, ANSWER_TOKENS[kind])
            seconds[speculate].append(completion.timings.decode)
            texts[speculate] = completion.token_ids
    first = next((i for i, (a, b) in enumerate(zip(*texts.values(), strict=False)) if a != b), None)
    return Answer(
        kind,
        len(texts[False]) - 1,  # the first comes with the prefill
        statistics.median(seconds[False]),
        len(texts[True]) - 1,
        statistics.median(seconds[True]),
        texts[False] == texts[True],
        None if first is None else _gap(generator, [*ids, *texts[False][:first]]),
    )


def _gap(generator: Generator, ids: Sequence[int]) -> float:
    """Between the two best logits behind these tokens, the last one decoded."""
    engine = generator.engine
    engine.truncate(0, 0)
    engine.prefill(0, np.asarray(ids[:-1], np.int64))
    best = np.sort(engine.decode(0, np.asarray(ids[-1:], np.int64))[0])[-2:]
    engine.truncate(0, 0)
    return float(best[1] - best[0])


def kernel_difference(generator: Generator, ids: Sequence[int]) -> float:
    """The largest difference of a logit between steps of one token and of several, over the end of a text."""
    engine, logits_rows = generator.engine, generator.engine.manifest.engines.text.logits_rows
    assert logits_rows is not None
    start = len(ids) - len(ids) // 4 // logits_rows * logits_rows
    engine.truncate(0, 0)
    engine.prefill(0, np.asarray(ids[:start], np.int64))
    worst = 0.0
    for place in range(start, len(ids), logits_rows):
        fed = np.asarray(ids[place : place + logits_rows], np.int64)
        decoded = np.stack([engine.decode(0, fed[i : i + 1])[0].copy() for i in range(len(fed))])
        engine.truncate(0, place)
        worst = max(worst, float(np.abs(engine.verify(0, fed[None])[0] - decoded).max()))
    engine.truncate(0, 0)
    return worst


def gain(answers: Sequence[Answer]) -> Gain:
    """Of some answers together."""
    plain = sum(each.plain_tokens for each in answers) / sum(each.plain_seconds for each in answers)
    speed = sum(each.tokens for each in answers) / sum(each.seconds for each in answers)
    ratios = [
        each.tokens / each.seconds / (each.plain_tokens / each.plain_seconds) for each in answers if each.tokens > 8
    ]
    return Gain(len(answers), plain, speed, speed / plain, min(ratios), max(ratios))


def report(answers: Sequence[Answer], difference: float) -> dict[str, Any]:
    """Everything, as JSON values."""
    kinds = {
        "edit": ("edit",),
        "summary": ("summary",),
        "edit and summary": ("edit", "summary"),
        "copy": ("copy",),
        "other": ("other",),
    }
    gains = {name: asdict(gain([a for a in answers if a.kind in of])) for name, of in kinds.items()}
    gaps = [each.gap for each in answers if each.gap is not None]
    return {
        "gains": gains,
        "kernel_difference": difference,
        "same": sum(each.is_same for each in answers),
        "different": len(gaps),
        "widest_gap_where_different": max(gaps, default=0.0),
        "answers": [asdict(each) for each in answers],
    }


def misses(found: Mapping[str, Any]) -> list[str]:
    """The bars that a report misses."""
    gains = found["gains"]
    missed = [
        f"{kind}: {gains[kind]['ratio']:.2f} times plain decoding, {bar} wanted"
        for kind, bar in BARS.items()
        if gains[kind]["ratio"] < bar
    ]
    if found["widest_gap_where_different"] > 2 * found["kernel_difference"]:
        missed.append("an answer differs where the two best logits lie further apart than kernels can move them")
    return missed


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", type=new_file, help="also write every answer's numbers here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit code is 1 where a bar is missed."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    with Generator.open(options.bundle, threads=options.threads) as generator:
        cases = prompts(generator)
        answer(Batch(generator.engine, None, generator.defaults), cases[0][1], 16)
        answers = []
        for kind, ids in cases:
            answers.append(measure(generator, kind, ids, options.rounds))
            print(".", end="", file=sys.stderr, flush=True)
        difference = max(kernel_difference(generator, ids) for _, ids in cases[:: len(cases) // 8])
    found = report(answers, difference)
    print(file=sys.stderr)
    for kind, each in found["gains"].items():
        print(
            f"{kind:17} {each['prompts']:2} prompts  plain {each['plain_tokens_per_second']:6.1f}  drafts "
            f"{each['tokens_per_second']:6.1f} tokens/s  {each['ratio']:.2f} times "
            f"({each['lowest']:.2f} to {each['highest']:.2f})"
        )
    print(
        f"{found['same']} answers the same, {found['different']} not; there the two best logits lie up to "
        f"{found['widest_gap_where_different']:.3g} apart, and kernels move a logit by up to {difference:.3g}"
    )
    if options.json is not None:
        write_new(options.json, found)
    for line in misses(found):
        print(f"missed: {line}")
    return 1 if misses(found) else 0


if __name__ == "__main__":
    sys.exit(main())
