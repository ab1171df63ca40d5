"""Remakes schedule.json: what a batch asks of its engine, step by step, for requests that come and go.

    python tests/golden/make_schedule.py

The rules of docs/scheduling.md, written down a second time and as plainly as possible. Nothing of qwen_aot is imported.

A prompt is given as runs [first id, count] of consecutive ids, modulo VOCAB. The engine of these cases answers each
row with the number of tokens in it, modulo VOCAB; no request stops but by its length or its cancellation. A request
arrives, and is cancelled, before the step of that number. Calls are in order: ["copy", source row, target row, tokens],
["decode", first row, [request or -1, ...]], ["prefill", row, request, first token, tokens].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 211
ALONE, BESIDE, PER_IDLE_ROW = 256, 64, 192


def request(
    prompt: list[list[int]], new: int, arrives: int = 0, cancelled: int | None = None, keep: bool = False
) -> dict[str, Any]:
    return {"prompt": prompt, "max_new_tokens": new, "arrives": arrives, "cancelled": cancelled, "keep_cache": keep}


def ids(prompt: list[list[int]]) -> list[int]:
    return [(first + i) % VOCAB for first, count in prompt for i in range(count)]


def common(a: list[int], b: list[int]) -> int:
    n = 0
    while n < len(a) and n < len(b) and a[n] == b[n]:
        n += 1
    return n


def steps(rows: int, prefill_chunk: int, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    prompts = [ids(r["prompt"]) for r in requests]
    made: list[list[int]] = [[] for _ in requests]
    user: list[int | None] = [None] * rows  # the request in each row
    cache: list[list[int]] = [[] for _ in range(rows)]
    queue: list[int] = []  # waiting
    turns: list[int] = []  # requests in prefill
    ended: set[int] = set()
    waste = 0
    trace: list[dict[str, Any]] = []

    while len(ended) < len(requests):
        number, calls, ends = len(trace), [], []
        queue += [i for i, r in enumerate(requests) if r["arrives"] == number]

        def leave(i: int, reason: str, ends: list[Any] = ends) -> None:
            ended.add(i)
            ends.append([i, reason])
            if i in user:
                row = user.index(i)
                user[row] = None
                if not requests[i]["keep_cache"]:
                    cache[row] = []
            if i in turns:
                turns.remove(i)

        # 1. Who is cancelled ends: first those that wait, in their order, then by row.
        def is_cancelled(i: int, number: int = number) -> bool:
            return requests[i]["cancelled"] is not None and requests[i]["cancelled"] <= number

        for i in [i for i in queue if is_cancelled(i)]:
            queue.remove(i)
            leave(i, "cancelled")
        for i in [i for i in user if i is not None and is_cancelled(i)]:
            leave(i, "cancelled")

        # 2. Free rows are given out in order.
        while queue and None in user:
            i = queue.pop(0)
            prompt, keep = prompts[i], requests[i]["keep_cache"]
            free = [row for row in range(rows) if user[row] is None]
            empty = [row for row in free if not cache[row]]
            if not keep:
                row = empty[0] if empty else free[0]
                shared = 0
            else:
                row = free[0]
                for other in free:
                    if common(cache[other], prompt) > common(cache[row], prompt):
                        row = other
                gain = common(cache[row], prompt)
                if empty and 2 * (len(cache[row]) - gain) > gain:
                    row = empty[0]
                shared = min(common(cache[row], prompt), len(prompt) - 1)
            best, donor = shared, None
            for other in range(rows):
                occupant = user[other]
                if keep and other != row and (occupant is None or requests[occupant]["keep_cache"]):
                    n = min(common(cache[other], prompt), len(prompt) - 1)
                    if n > best:
                        best, donor = n, other
            user[row] = i
            turns.append(i)
            if donor is not None:
                calls.append(["copy", donor, row, best])
                cache[row] = cache[donor][:best]
                break
            cache[row] = cache[row][:shared]

        def running() -> list[int]:
            return [r for r in range(rows) if user[r] is not None and user[r] not in turns]

        # 3. At most one row is moved, when idle rows have cost as much as the move.
        decoding, move = running(), None
        if decoding:
            low, high = decoding[0], decoding[-1]
            empty = [r for r in range(rows) if user[r] is None and not cache[r]]
            between = [r for r in empty if low < r < high]
            if between:
                options = []
                for source, target in ((high, between[0]), (low, between[-1])):
                    after = [target if r == source else r for r in decoding]
                    options.append((max(after) - min(after), source, target))
                move = options[0][1:] if options[0][0] <= options[1][0] else options[1][1:]
            else:
                kept = [r for r in range(low + 1, high) if user[r] is None]
                if kept and empty:
                    move = (min(kept, key=lambda r: len(cache[r])), empty[0])
        if move is None:
            waste = 0
        else:
            waste += PER_IDLE_ROW * (high - low + 1 - len(decoding))
            source, target = move
            if waste >= len(cache[source]):
                waste = 0
                calls.append(["copy", source, target, len(cache[source])])
                cache[target], cache[source] = cache[source], []
                user[target], user[source] = user[source], None

        def token(row: int) -> None:
            i = user[row]
            assert i is not None
            made[i].append(len(cache[row]) % VOCAB)
            if len(made[i]) == requests[i]["max_new_tokens"]:
                leave(i, "length")

        # 4. One decode of all running rows.
        decoding = running()
        if decoding:
            span = range(decoding[0], decoding[-1] + 1)
            calls.append(["decode", span[0], [user[r] if r in decoding else -1 for r in span]])
            for row in decoding:
                i = user[row]
                assert i is not None
                cache[row] = [*cache[row], made[i][-1]]
                token(row)

        # 5. One chunk of the prompt whose turn it is: a small one while anyone runs.
        if turns:
            chunk = min(BESIDE if running() else ALONE, prefill_chunk)
            i = turns[0]
            row = user.index(i)
            start = len(cache[row])
            piece = prompts[i][start : start + chunk]
            calls.append(["prefill", row, i, start, len(piece)])
            cache[row] = cache[row] + piece
            turns.pop(0)
            if len(cache[row]) < len(prompts[i]):
                turns.append(i)
            else:
                token(row)

        trace.append({"calls": calls, "ended": ends})
    return trace


def case(name: str, rows: int, prefill_chunk: int, requests: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "rows": rows,
        "prefill_chunk": prefill_chunk,
        "requests": requests,
        "steps": steps(rows, prefill_chunk, requests),
    }


def conversation(turn: int, new: int, **options: Any) -> dict[str, Any]:
    """Turn n of one conversation: 40 tokens, then for each earlier turn its `new` answers and 20 more."""
    runs, length = [[7, 40]], 40
    for _ in range(turn):
        runs += [[length % VOCAB, new], [100, 20]]
        length += new + 20
    return request(runs, new, keep=True, **options)


CASES = [
    case("one request", 1, 512, [request([[5, 3]], 4)]),
    case("a prompt alone goes by 256", 2, 512, [request([[0, 600]], 3)]),
    case("the bundle's prefill chunk bounds a step", 2, 100, [request([[0, 250]], 2)]),
    case(
        "a long prompt beside a stream goes by 64", 2, 512, [request([[9, 5]], 12), request([[0, 300]], 3, arrives=3)]
    ),
    case("prompts take turns", 3, 128, [request([[n, 300]], 2) for n in range(3)]),
    case("more requests than rows", 2, 512, [request([[n, 4]], 2 + n) for n in range(7)]),
    case("cancelled while waiting", 1, 512, [request([[1, 4]], 6), request([[2, 4]], 3, cancelled=2)]),
    case("cancelled in its prefill", 2, 64, [request([[1, 4]], 6), request([[2, 400]], 3, cancelled=4)]),
    case("cancelled while it runs", 2, 512, [request([[1, 4]], 20, cancelled=5), request([[2, 4]], 8)]),
    case("cancelled before it comes", 2, 512, [request([[1, 4]], 3), request([[2, 4]], 3, arrives=2, cancelled=1)]),
    case(
        "rows are compacted",
        6,
        512,
        [request([[n, 5]], 30 if n in (0, 5) else 3) for n in range(6)] + [request([[3, 9]], 4, arrives=20)],
    ),
    case(
        "a long row moves when idle rows have cost as much",
        4,
        512,
        [request([[0, 5]], 40), request([[1, 5]], 3), request([[2, 5]], 3), request([[3, 500]], 30)],
    ),
    case(
        "the first row moves where that leaves the shorter span",
        6,
        512,
        [request([[n, 5]], {0: 40, 4: 40, 5: 40}.get(n, 2)) for n in range(6)],
    ),
    case("turns of a conversation", 2, 512, [conversation(n, 5, arrives=12 * n) for n in range(3)]),
    case(
        "a conversation begins as a running one does",
        3,
        512,
        [request([[7, 40], [90, 30]], 30, keep=True), request([[7, 40], [150, 9]], 4, arrives=4, keep=True)],
    ),
    case(
        "nobody takes from those that keep nothing",
        3,
        512,
        [request([[7, 40]], 30), request([[7, 40], [150, 9]], 4, arrives=4, keep=True)],
    ),
    case(
        "a kept row makes room",
        4,
        512,
        [request([[n, 5]], {0: 40, 3: 40}.get(n, 2), keep=n == 1) for n in range(3)]
        + [request([[3, 5]], 40), request([[80, 30]], 2, arrives=6, keep=True)],
    ),
    case("two rows end in one step", 3, 64, [request([[n, 70]], 5, arrives=n) for n in (0, 1, 1, 2, 2)]),
]


def main() -> None:
    document = {"vocabulary": VOCAB, "cases": CASES}
    path = Path(__file__).parent / "schedule.json"
    lines = [json.dumps(entry) for entry in CASES]
    path.write_text(f'{{"vocabulary": {VOCAB}, "cases": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == document


if __name__ == "__main__":
    main()
