"""Remakes generation.json: `python -m tests.golden.make_generation`. docs/generation.md has the rules.

- `numbers`: the first random numbers of a seed's choices, from PCG64 and SeedSequence stated in whole numbers.
- `texts`: whole outputs. After n tokens of output a choice's logits are the row {"size": 50, "seed": the case's + n}
  (tests/golden/rows.py), whatever the tokens were. Processors are transformers', as in make_sampling.py; a token that
  is drawn takes the next of `numbers`, one that isn't takes none. An id that ends the request is no part of its output.
- `ends`: a generation_config.json, a manifest's ids and length, what a request gives, and when it ends by that; and
  `draws`: what decides how its tokens are chosen.

Nothing of qwen_aot is imported.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.golden.make_sampling import drawn, scores_of

M32, M64, M128 = 2**32 - 1, 2**64 - 1, 2**128 - 1
SIZE = 50


def words(number: int) -> list[int]:
    """A whole number as 32-bit words, the lowest first."""
    found = [number & M32]
    while number := number >> 32:
        found.append(number & M32)
    return found


def seed_words(seed: int, choice: int) -> list[int]:
    """Eight words of state. Source: numpy's SeedSequence (O'Neill's seed_seq_fe, pool of four words).

    Choice 0 is SeedSequence(seed), choice i SeedSequence(seed, spawn_key=(i,)).
    """
    entropy = words(seed)
    entropy += [0] * (4 - len(entropy))
    if choice:
        entropy += words(choice)
    constant = 0x43B0D7E5

    def hashed(value: int) -> int:
        nonlocal constant
        value ^= constant
        constant = constant * 0x931E8875 & M32
        value = value * constant & M32
        return value ^ value >> 16

    def mixed(x: int, y: int) -> int:
        result = (0xCA01F9DD * x - 0x4973F715 * y) & M32
        return result ^ result >> 16

    pool = [hashed(value) for value in entropy[:4]]
    for source, target in itertools.product(range(4), range(4)):
        if source != target:
            pool[target] = mixed(pool[target], hashed(pool[source]))
    for value in entropy[4:]:
        for target in range(4):
            pool[target] = mixed(pool[target], hashed(value))
    state, constant = [], 0x8B51F9DD
    for i in range(8):
        value = pool[i % 4] ^ constant
        constant = constant * 0x58F38DED & M32
        value = value * constant & M32
        state.append(value ^ value >> 16)
    return state


def numbers(seed: int, choice: int) -> Iterator[float]:
    """Numbers in [0, 1): the upper 53 of 64 bits. Source: O'Neill's PCG, XSL-RR 128/64, https://www.pcg-random.org."""
    w = seed_words(seed, choice)
    s0, s1, s2, s3 = (w[2 * i] | w[2 * i + 1] << 32 for i in range(4))
    multiplier = 0x2360ED051FC65DA44385DF649FCCF645
    increment = (((s2 << 64 | s3) << 1) | 1) & M128
    state = ((increment + (s0 << 64 | s1)) * multiplier + increment) & M128
    while True:
        state = (state * multiplier + increment) & M128
        word, turn = (state >> 64 ^ state) & M64, state >> 122
        yield (((word >> turn | word << (64 - turn)) & M64) >> 11) * 2.0**-53


def text(case: dict[str, Any], choice: int) -> dict[str, Any]:
    """The tokens of one choice and why they end."""
    settings, output = case["settings"], []
    random = numbers(case["seed"], choice)
    while len(output) < case["max_new_tokens"]:
        row = {"size": SIZE, "seed": case["row_seed"] + len(output)}
        step = case | {"logits": row, "output": output}
        if settings.get("temperature") == 0:
            warpers = {key: value for key, value in settings.items() if key != "temperature"}
            token_id = int(scores_of(step | {"settings": warpers}, sample=False).argmax())
        else:
            u = next(random)
            found = drawn(scores_of(step, sample=True), u)
            assert found is not None, f"{case['name']}: {u} is too near to another token: take another seed"
            token_id = found
        if token_id in case["ending_ids"]:
            return {"token_ids": output, "finish_reason": "stop"}
        output = [*output, token_id]
    return {"token_ids": output, "finish_reason": "length"}


def text_case(name: str, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    case = {"name": name, "seed": 1, "row_seed": 100, "prompt": [3, 1, 3], "ending_ids": [], "max_new_tokens": 12}
    case |= {"settings": settings, "n": 1} | more
    return case | {"choices": [text(case, choice) for choice in range(case["n"])]}


TEXTS = [
    text_case("greedy", {"temperature": 0}),
    text_case("sampled", {"temperature": 1.0}),
    text_case("four choices", {"temperature": 1.0, "top_k": 20}, n=4, seed=7),
    text_case("choices of a seed of 70 bits", {"temperature": 0.9, "top_p": 0.9}, n=3, seed=2**69 + 12345),
    text_case("greedy choices are equal", {"temperature": 0, "presence_penalty": 1.0}, n=2),
    text_case("greedy with a bias", {"temperature": 0, "logit_bias": [[9, 3.0], [2, -100.0]]}),
    text_case("penalties count the output", {"temperature": 0.6, "frequency_penalty": 0.8, "presence_penalty": 0.3}),
    text_case("rewards for what came", {"temperature": 0, "frequency_penalty": -2.0}),
    text_case("the repetition penalty counts the prompt", {"temperature": 0, "repetition_penalty": 1.5}, prompt=[5, 8]),
    text_case("min_p", {"temperature": 1.2, "min_p": 0.2}, n=2, seed=3),
    text_case("an end", {"temperature": 1.0}, ending_ids=[*range(0, 50, 7)], n=4, seed=11, max_new_tokens=30),
    text_case(
        "no end before 5", {"temperature": 1.0, "min_new_tokens": 5}, ending_ids=[*range(0, 50, 3)], n=3, seed=11
    ),
    text_case("suppressed", {"temperature": 1.0, "suppress_tokens": [*range(25)]}, n=2, seed=5),
    text_case(
        "together",
        {
            "temperature": 0.8,
            "top_k": 30,
            "top_p": 0.95,
            "min_p": 0.02,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.2,
            "logit_bias": [[4, 2.0], [44, -3.0]],
            "suppress_tokens": [13],
            "min_new_tokens": 6,
        },
        n=3,
        seed=2024,
        ending_ids=[0, 30, 31, 32],
        max_new_tokens=20,
    ),
]


def end_case(name: str, document: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """What the rules say, in the order in which docs/generation.md has them."""
    case = {"name": name, "generation_config": document, "manifest_eos": [2], "manifest_length": None}
    case |= {"given": {}, "is_chat": False, "room": 5000} | more
    document, given = document or {}, case["given"]
    length = given.get("max_new_tokens")
    for source in (document.get("max_new_tokens"), case["manifest_length"], case["room"] if case["is_chat"] else 1024):
        length = source if length is None else length
    named = document.get("eos_token_id")
    named = [] if named is None else named if isinstance(named, list) else [named]
    ids = list(given["eos_token_ids"]) if given.get("eos_token_ids") is not None else named + case["manifest_eos"]
    if given.get("ignore_eos"):
        ids = []
    stop = given["stop"] if given.get("stop") is not None else document.get("stop_strings", [])
    draws = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    draws |= {key: value for key, value in document.items() if key in draws and value is not None}
    if given.get("temperature") == 0:
        draws["repetition_penalty"] = 1.0
    if not document.get("do_sample") and not given.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        draws["temperature"] = 0.0
    draws |= {key: value for key, value in given.items() if key in draws}
    return case | {
        "max_new_tokens": min(length, case["room"]),
        "ending_ids": sorted({*ids, *given.get("stop_token_ids", [])}),
        "stop": [stop] if isinstance(stop, str) else stop,
        "draws": draws,
    }


ENDS = [
    end_case("nothing says how long", None),
    end_case("nothing says how long, in a chat", None, is_chat=True),
    end_case("the manifest says", None, manifest_length=300),
    end_case("the manifest says, in a chat", None, manifest_length=300, is_chat=True),
    end_case("generation_config.json says", {"max_new_tokens": 200}, is_chat=True),
    end_case("both say", {"max_new_tokens": 200}, manifest_length=300),
    end_case("the request says", {"max_new_tokens": 200}, given={"max_new_tokens": 7}),
    end_case("the request says null", {"max_new_tokens": 200}, given={"max_new_tokens": None}),
    end_case("more than there is room for", None, given={"max_new_tokens": 10**12}, room=40),
    end_case("the default is more than there is room for", None, room=40),
    end_case("the bundle's is more than there is room for", {"max_new_tokens": 2**31}, room=40),
    end_case("room for one", {"max_new_tokens": 9}, room=1, is_chat=True),
    end_case("max_length is no default", {"max_length": 20}),
    end_case("an id of each", {"eos_token_id": 5}),
    end_case("ids of both", {"eos_token_id": [5, 2, 6]}, manifest_eos=[2, 7]),
    end_case("the request's ids", {"eos_token_id": 5}, given={"eos_token_ids": [9]}),
    end_case("no ids", {"eos_token_id": 5}, given={"eos_token_ids": []}),
    end_case("the request's ids are null", {"eos_token_id": 5}, given={"eos_token_ids": None}),
    end_case("more ids", {"eos_token_id": 5}, given={"stop_token_ids": [8]}),
    end_case("ids are ignored", {"eos_token_id": 5}, given={"ignore_eos": True, "stop_token_ids": [8]}),
    end_case("texts of the bundle", {"stop_strings": ["END", "\n\n"]}),
    end_case("one text of the bundle", {"stop_strings": "END"}),
    end_case("texts of the request", {"stop_strings": ["END"]}, given={"stop": ["x"]}),
    end_case("no texts", {"stop_strings": ["END"]}, given={"stop": []}),
    end_case("greedy where do_sample is absent", {"temperature": 0.6, "repetition_penalty": 1.1}),
    end_case("greedy where it is false", {"do_sample": False, "top_p": 0.5}),
    end_case("sampled where it is true", {"do_sample": True, "temperature": 0.6, "top_k": 20, "min_p": 0.1}),
    end_case("a temperature samples", {"temperature": 0.6}, given={"temperature": 0.9}),
    end_case("a top_k samples", {"temperature": 0.6}, given={"top_k": 5}),
    end_case("a top_p samples", {"temperature": 0.6}, given={"top_p": 0.5}),
    end_case("a min_p samples", {"temperature": 0.6}, given={"min_p": 0.5}),
    end_case("a seed does not", {"temperature": 0.6}, given={"seed": 5}),
    end_case("temperature 0", {"do_sample": True, "repetition_penalty": 1.1}, given={"temperature": 0}),
    end_case(
        "temperature 0 and a penalty",
        {"do_sample": True, "repetition_penalty": 1.1},
        given={"temperature": 0, "repetition_penalty": 1.2},
    ),
]
SEEDS = [
    (0, 0),
    (1, 0),
    (1, 1),
    (1, 2),
    (42, 0),
    (42, 127),
    (2**32, 0),
    (2**32 + 5, 1),
    (2**64 - 1, 3),
    (2**200 + 9, 2),
]


def main() -> None:
    """Writes generation.json beside this script."""
    sections = {
        "numbers": [
            # A decimal string: not every reader's numbers hold a large seed.
            {"seed": str(seed), "choice": choice, "numbers": list(itertools.islice(numbers(seed, choice), 4))}
            for seed, choice in SEEDS
        ],
        "texts": [case | {"seed": str(case["seed"])} for case in TEXTS],
        "ends": ENDS,
    }
    parts = [f'"{name}": [\n' + ",\n".join(map(json.dumps, cases)) + "\n]" for name, cases in sections.items()]
    path = Path(__file__).with_name("generation.json")
    path.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
