"""Remakes schedule.json: what a batch asks of its engine, step by step, for requests that come and go.

    python tests/golden/make_schedule.py

The rules of docs/scheduling.md, written down a second time and as plainly as possible. Nothing of qwen_aot is imported.

A prompt is given as runs [first id, count] of consecutive ids, modulo VOCAB. The engine of these cases answers each
row with the number of tokens in it, modulo VOCAB; no request stops but by its length, its cancellation or a fault. A
request arrives, and is cancelled, before the step of that number. Calls are in order: ["copy", source row, target row,
tokens], ["decode", first row, [who or -1, ...]], ["prefill", row, request, first token, tokens], those that fail too.
Who is a request, or [request, choice] for its choices after the first. Each end is [request, reason, choice].

A fault makes the nth call of its kind fail, counted from 0: {"call": kind, "number": n, "rows": null}; with rows, a
decode in which the logits of these rows aren't finite. A call that fails leaves the rows as they were.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 211
ALONE, BESIDE, PER_IDLE_ROW, COPIES, COMPUTED = 256, 64, 192, 1024, 2

Unit = tuple[int, int]  # a request's choice


def request(
    prompt: list[list[int]], new: int, arrives: int = 0, cancelled: int | None = None, keep: bool = False, **more: Any
) -> dict[str, Any]:
    made = {"prompt": prompt, "max_new_tokens": new, "arrives": arrives, "cancelled": cancelled, "keep_cache": keep}
    return made | {"cache_scope": 0, "n": 1, "prompt_logprobs": None} | more


def fault(call: str, number: int, rows: list[int] | None = None) -> dict[str, Any]:
    return {"call": call, "number": number, "rows": rows}


def ids(prompt: list[list[int]]) -> list[int]:
    return [(first + i) % VOCAB for first, count in prompt for i in range(count)]


def common(tokens: list[int], prompt: list[int]) -> int:
    """How much of a prompt's beginning the tokens begin with; its last two tokens don't count."""
    n = 0
    while n < len(tokens) and n < len(prompt) - COMPUTED and tokens[n] == prompt[n]:
        n += 1
    return n


def steps(
    rows: int, prefill_chunk: int, requests: list[dict[str, Any]], faults: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    prompts = [ids(r["prompt"]) for r in requests]
    made: dict[Unit, list[int]] = {(i, c): [] for i, r in enumerate(requests) for c in range(r["n"])}
    user: list[Unit | None] = [None] * rows  # who is in each row
    cache: list[list[int]] = [[] for _ in range(rows)]
    queue: list[int] = []  # waiting requests
    turns: list[Unit] = []  # in prefill
    owner = [0] * rows  # scopes of the requests that a row's tokens are of
    age = [0] * rows  # when a row was last left with tokens, and 0 if it has none
    departures = 0
    left: dict[int, list[int]] = {}  # choices of requests that have come and not begun
    whole: set[int] = set()  # requests whose prompt has been computed
    ended: set[Unit] = set()
    counts = {"copy": 0, "decode": 0, "prefill": 0}
    waste = 0
    trace: list[dict[str, Any]] = []

    while len(ended) < len(made):
        number, calls, ends = len(trace), [], []
        for i, r in enumerate(requests):
            if r["arrives"] == number:
                queue.append(i)
                left[i] = list(range(1, r["n"]))

        def call(*parts: Any, calls: list[Any] = calls) -> dict[str, Any] | None:
            """Writes a call down; returns its fault, if it has one."""
            calls.append(list(parts))
            found = [f for f in faults if f["call"] == parts[0] and f["number"] == counts[parts[0]]]
            counts[parts[0]] += 1
            return found[0] if found else None

        def end(unit: Unit, reason: str, ends: list[Any] = ends) -> None:
            ended.add(unit)
            ends.append([unit[0], reason, unit[1]])

        def leave(row: int, reason: str) -> None:
            nonlocal departures
            unit = user[row]
            assert unit is not None
            user[row] = None
            if unit in turns:
                turns.remove(unit)
            if reason == "error" or not requests[unit[0]]["keep_cache"]:
                cache[row] = []
            departures += 1
            owner[row], age[row] = requests[unit[0]]["cache_scope"], departures if cache[row] else 0
            end(unit, reason)

        def looks(i: int) -> bool:
            """Whether a request may start from tokens of others."""
            return requests[i]["keep_cache"] and requests[i]["prompt_logprobs"] is None

        def usable(row: int, i: int) -> int:
            """How many of a row's tokens a request could start from."""
            occupant = user[row]
            if occupant is not None and not requests[occupant[0]]["keep_cache"]:
                return 0
            scope = owner[row] if occupant is None else requests[occupant[0]]["cache_scope"]
            if not looks(i) or scope != requests[i]["cache_scope"]:
                return 0
            return common(cache[row], prompts[i])

        def follows(i: int) -> bool:
            most = max(usable(row, i) for row in range(rows))
            for unit in turns:
                ahead = requests[unit[0]]
                if looks(i) and looks(unit[0]) and ahead["cache_scope"] == requests[i]["cache_scope"]:
                    alike = common(prompts[unit[0]], prompts[i])
                    done = len(cache[user.index(unit)])
                    if alike >= BESIDE and alike > done >= most:
                        return True
            return False

        def fail(row: int) -> None:
            unit = user[row]
            assert unit is not None
            leave(row, "error")
            if all(other is None or other[0] != unit[0] for other in user):
                while left[unit[0]]:
                    end((unit[0], left[unit[0]].pop(0)), "error")

        def token(row: int) -> None:
            """A token of whoever is in the row; one that ends leaves the row to the next choice of its request."""
            unit = user[row]
            assert unit is not None
            i = unit[0]
            whole.add(i)
            made[unit].append(len(cache[row]) % VOCAB)
            if len(made[unit]) == requests[i]["max_new_tokens"]:
                if left[i]:
                    end(unit, "length")
                    cache[row] = prompts[i]
                    user[row] = (i, left[i].pop(0))
                    token(row)
                else:
                    leave(row, "length")

        # 1. Who is cancelled ends: first those that wait, in their order, then by row, then choices that haven't begun.
        def is_cancelled(i: int, number: int = number) -> bool:
            return requests[i]["cancelled"] is not None and requests[i]["cancelled"] <= number

        for i in [i for i in queue if is_cancelled(i)]:
            queue.remove(i)
            end((i, 0), "cancelled")
        for row, unit in enumerate(user):
            if unit is not None and is_cancelled(unit[0]):
                leave(row, "cancelled")
        for i in sorted(left):
            while is_cancelled(i) and left[i]:
                end((i, left[i].pop(0)), "cancelled")

        # 2. Free rows are given out: to choices whose prompt is there, then to requests, until enough is copied. Those
        # that follow a prompt in prefill keep their place, and a row is left for each.
        copied = 0
        behind: list[int] = []
        while None in user and copied < COPIES:
            free = [row for row in range(rows) if user[row] is None]
            oldest = min(free, key=lambda r: age[r])
            due = [i for i in sorted(left) if left[i] and i in whole]
            if due:
                i, row = due[0], oldest
                donor = next(r for r, unit in enumerate(user) if unit is not None and unit[0] == i)
                user[row], age[row] = (i, left[i].pop(0)), 0
                if call("copy", donor, row, len(prompts[i])):
                    fail(row)
                    break
                copied += len(prompts[i])
                cache[row] = prompts[i]
                token(row)
                continue
            ahead = [i for i in queue if i not in behind]
            if not ahead or len(behind) >= len(free):
                break
            i = ahead[0]
            if follows(i):
                behind.append(i)
                continue
            queue.remove(i)
            most = max(usable(r, i) for r in free)
            row = min((r for r in free if usable(r, i) == most), key=lambda r: age[r])
            if 2 * (len(cache[row]) - most) > most:
                row = oldest
            best, source = usable(row, i), None
            for other in range(rows):
                if usable(other, i) > best:
                    best, source = usable(other, i), other
            user[row], age[row] = (i, 0), 0
            turns.append((i, 0))
            if source is not None:
                if call("copy", source, row, best):
                    fail(row)
                    break
                copied += best
                cache[row] = cache[source][:best]
            else:
                cache[row] = cache[row][:best]

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
                elif kept:
                    oldest = min((r for r in range(rows) if user[r] is None), key=lambda r: age[r])
                    move = (oldest, oldest)
        if move is None:
            waste = 0
        else:
            waste += PER_IDLE_ROW * (high - low + 1 - len(decoding))
            source, target = move
            if source == target and waste >= len(cache[source]):
                waste, cache[source], age[source] = 0, [], 0
            elif source != target and waste >= len(cache[source]):
                waste = 0
                if call("copy", source, target, len(cache[source])):
                    if user[source] is None:
                        cache[source], age[source] = [], 0
                    else:
                        fail(source)
                else:
                    cache[target], cache[source] = cache[source], []
                    user[target], user[source] = user[source], None
                    owner[target], age[target], age[source] = owner[source], age[source], 0

        # 4. One decode of all running rows: of the last token, or of the prompt's next where it is fed by token.
        decoding = running()
        if decoding:
            span = range(decoding[0], decoding[-1] + 1)
            who: list[Any] = []
            for r in span:
                unit = user[r] if r in decoding else None
                who.append(-1 if unit is None else unit[0] if unit[1] == 0 else list(unit))
            found = call("decode", span[0], who)
            if found is not None:
                for row in decoding if found["rows"] is None else found["rows"]:
                    fail(row)
            else:
                for row in decoding:
                    unit = user[row]
                    assert unit is not None
                    prompt = prompts[unit[0]]
                    fed = made[unit][-1] if made[unit] else prompt[len(cache[row])]
                    cache[row] = [*cache[row], fed]
                    if len(cache[row]) >= len(prompt):
                        token(row)

        # 5. One chunk of the prompt whose turn it is: a small one while anyone runs.
        if turns:
            chunk = min(BESIDE if running() else ALONE, prefill_chunk)
            unit = turns[0]
            i = unit[0]
            if requests[i]["prompt_logprobs"] is not None:
                chunk = 1
            row = user.index(unit)
            start = len(cache[row])
            piece = prompts[i][start : start + chunk]
            if call("prefill", row, i, start, len(piece)):
                fail(row)
            else:
                cache[row] = cache[row] + piece
                turns.pop(0)
                if len(cache[row]) == len(prompts[i]):
                    token(row)
                elif requests[i]["prompt_logprobs"] is None:
                    turns.append(unit)

        trace.append({"calls": calls, "ended": ends})
    return trace


def case(
    name: str,
    rows: int,
    prefill_chunk: int,
    requests: list[dict[str, Any]],
    *faults: dict[str, Any],
) -> dict[str, Any]:
    """A case, each fault of which comes to pass."""
    trace = steps(rows, prefill_chunk, requests, list(faults))
    kinds = [call[0] for step in trace for call in step["calls"]]
    for each in faults:
        assert kinds.count(each["call"]) > each["number"], f"{name}: {each} never happens"
    return {
        "name": name,
        "rows": rows,
        "prefill_chunk": prefill_chunk,
        "requests": requests,
        "faults": list(faults),
        "steps": trace,
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
        5,
        512,
        [request([[n, 5]], {0: 40, 3: 40}.get(n, 2), keep=n == 1) for n in range(3)]
        + [request([[3, 5]], 40), request([[80, 30]], 2, arrives=6, keep=True)],
    ),
    # reuse: by scope, from the row that was left longest ago, and of what another is computing
    case(
        "nothing is shared between scopes",
        3,
        512,
        [request([[7, 40]], 4, keep=True, cache_scope=1), request([[7, 40], [90, 9]], 4, arrives=6, keep=True)]
        + [request([[7, 40], [150, 9]], 4, arrives=12, keep=True, cache_scope=s) for s in (1, 2)],
    ),
    case(
        "scopes in one row",
        1,
        512,
        [request([[7, 40 + 5 * n]], 3, arrives=5 * n, keep=True, cache_scope=n // 2) for n in range(4)],
    ),
    case(
        "the row that was left longest ago is given away",
        3,
        512,
        [request([[30 * n, 9 + n]], 3, arrives=6 * n, keep=True) for n in range(3)]
        + [request([[0, 9], [9, 3], [100, 2]], 2, arrives=20, keep=True)]
        + [request([[150 + n, 9]], 2, arrives=26 + 5 * n, keep=n < 2) for n in range(4)],
    ),
    case(
        "a conversation is copied out of a row that it would cost much",
        2,
        512,
        [
            request([[7, 40], [90, 60]], 4, keep=True),
            request([[150, 9]], 3, arrives=10, keep=True),
            request([[7, 40], [180, 5]], 3, arrives=20, keep=True),
        ],
    ),
    case(
        "of rows that share alike the one that was left longest ago",
        3,
        512,
        [request([[7, 60], [100 + n, 2]], 2, arrives=5 * (2 - n), keep=True) for n in (2, 1, 0)]
        + [request([[7, 60], [170, 2]], 2, arrives=20, keep=True)],
    ),
    case(
        "a row is emptied when idle rows have cost as much as copying it",
        4,
        512,
        [request([[n, 400 if n in (1, 2) else 5]], 60 if n in (0, 3) else 2 + n, keep=n in (1, 2)) for n in range(4)],
    ),
    case(
        "a row outside the span is emptied, and one inside moves there",
        5,
        512,
        [request([[n, 5]], 90 if n in (1, 4) else 2 + n, keep=True) for n in range(5)],
    ),
    case(
        "a beginning that comes at once is computed once",
        4,
        512,
        [request([[7, 300], [90 + 20 * n, 9]], 3, keep=True) for n in range(3)],
    ),
    case(
        "who follows a prompt leaves rows to others, but for one of its own",
        3,
        64,
        [request([[7, 200]], 3, keep=True), request([[7, 200], [50, 3]], 3, keep=True)]
        + [request([[20 * n, 4]], 3) for n in range(3)],
    ),
    case(
        "a prompt that is followed is cancelled",
        2,
        64,
        [request([[7, 300]], 3, keep=True, cancelled=2), request([[7, 300], [50, 3]], 3, keep=True)],
    ),
    case(
        "nobody follows where it gives less than a chunk, in another scope, or for who keeps nothing",
        6,
        64,
        [
            request([[7, 63], [0, 200]], 3, keep=True),
            request([[7, 63], [50, 90]], 3, keep=True),
            request([[7, 63], [0, 200]], 3, keep=True, cache_scope=1),
            request([[7, 63], [0, 200]], 3),
            request([[7, 63], [0, 20]], 3, keep=True, prompt_logprobs=0),
        ],
    ),
    case(
        "who follows ends when it is cancelled",
        2,
        64,
        [request([[7, 300]], 3, keep=True), request([[7, 300], [50, 3]], 3, keep=True, cancelled=2)],
    ),
    case(
        "the prompt that is followed isn't the first whose beginning is alike",
        4,
        64,
        [
            request([[7, 150], [150, 5]], 20, arrives=2, keep=True, prompt_logprobs=0),
            request([[7, 70], [150, 60]], 30, arrives=2, keep=True),
            request([[7, 100], [150, 150]], 13, arrives=3, keep=True),
            request([[7, 70], [90, 5]], 1, arrives=4, keep=True),
            request([[7, 150], [150, 5]], 9, arrives=4, keep=True),
            request([[7, 150], [150, 150]], 26, arrives=6, keep=True, prompt_logprobs=0),
        ],
    ),
    case(
        "choices of a request that follows",
        3,
        64,
        [request([[7, 150]], 9, keep=True), request([[7, 150], [50, 3]], 3, keep=True, n=3)],
    ),
    case("two rows end in one step", 3, 64, [request([[n, 70]], 5, arrives=n) for n in (0, 1, 1, 2, 2)]),
    # choices of one prompt
    case("choices copy the prompt", 4, 512, [request([[1, 300]], 5, n=3)]),
    case("more choices than rows", 2, 512, [request([[1, 9]], 3, n=5)]),
    case("choices in one row", 1, 512, [request([[1, 9]], 3, n=3), request([[2, 5]], 2)]),
    case("choices of one token", 3, 512, [request([[1, 9]], 1, n=4), request([[2, 5]], 2)]),
    case("choices go before who came later", 3, 512, [request([[1, 70]], 4, n=3)] + [request([[2, 5]], 9)] * 3),
    case(
        "a free row goes to a choice before a request that waits",
        2,
        64,
        [request([[1, 100]], 9, n=3), request([[2, 5]], 3), request([[3, 5]], 3)],
    ),
    case("a step admits until enough is copied", 6, 512, [request([[1, 600]], 6, n=5), request([[2, 5]], 3)]),
    case("choices of two requests", 3, 64, [request([[1, 100]], 4, n=3), request([[2, 30]], 4, n=2)]),
    case("choices are cancelled in rows and before", 2, 512, [request([[1, 9]], 9, n=4, cancelled=3)]),
    case("choices are cancelled while their prompt is computed", 2, 64, [request([[1, 300]], 9, n=3, cancelled=2)]),
    case(
        "choices are cancelled while it waits", 1, 512, [request([[2, 4]], 9), request([[1, 9]], 9, n=3, cancelled=2)]
    ),
    case(
        "choices that keep their rows",
        3,
        512,
        [request([[7, 40]], 4, n=2, keep=True), request([[7, 40], [47, 4], [100, 9]], 3, arrives=12, keep=True)],
    ),
    case(
        "rows of choices are compacted",
        4,
        512,
        [request([[n, 5]], 3) for n in (1, 2, 3)] + [request([[9, 8]], 30, n=3)],
    ),
    # the prompt's log-probabilities
    case("a prompt fed by token", 1, 512, [request([[3, 5]], 3, prompt_logprobs=0)]),
    case("a prompt of one token", 1, 512, [request([[3, 1]], 2, prompt_logprobs=1)]),
    case(
        "a prompt fed beside a stream and a prompt",
        3,
        512,
        [request([[9, 5]], 12), request([[3, 7]], 3, arrives=2, prompt_logprobs=2), request([[0, 150]], 2, arrives=3)],
    ),
    case("two prompts fed by token", 3, 512, [request([[n, 6]], 2, prompt_logprobs=0) for n in (1, 2)]),
    case(
        "cancelled while its prompt is fed",
        2,
        512,
        [request([[3, 30]], 3, prompt_logprobs=0, cancelled=9), request([[1, 4]], 15)],
    ),
    case(
        "a prompt fed by token starts from nothing",
        2,
        512,
        [
            request([[7, 20]], 3, keep=True),
            request([[7, 30]], 3, arrives=6, keep=True, prompt_logprobs=0),
            request([[7, 30], [37, 2]], 2, arrives=45, keep=True),
        ],
    ),
    case("a prompt fed by token, then choices", 3, 512, [request([[3, 5]], 4, prompt_logprobs=0, n=4)]),
    # faults
    case("a prefill fails", 2, 64, [request([[1, 200]], 4), request([[2, 5]], 3)], fault("prefill", 2)),
    case(
        "the prefill of choices fails", 2, 64, [request([[1, 200]], 4, n=3), request([[2, 5]], 3)], fault("prefill", 1)
    ),
    case(
        "the prefill of a waiting one goes on", 1, 64, [request([[1, 9]], 4), request([[2, 5]], 3)], fault("prefill", 0)
    ),
    case(
        "a prompt that is fed by token fails at its first",
        1,
        64,
        [request([[1, 9]], 4, prompt_logprobs=0)],
        fault("prefill", 0),
    ),
    case(
        "a copied beginning fails",
        3,
        512,
        [
            request([[7, 40], [90, 30]], 30, keep=True),
            request([[7, 40], [150, 9]], 4, arrives=4, keep=True),
            request([[2, 5]], 2, arrives=4),
        ],
        fault("copy", 0),
    ),
    case("the copy of a choice fails, and the next is made", 3, 512, [request([[1, 9]], 6, n=4)], fault("copy", 0)),
    case("every copy of a choice fails", 2, 512, [request([[1, 9]], 3, n=3)], fault("copy", 0), fault("copy", 1)),
    case("a move fails", 4, 512, [request([[n, 5]], 20 if n in (0, 3) else 2) for n in range(4)], fault("copy", 0)),
    case(
        "the move of a conversation fails",
        5,
        512,
        [request([[n, 5]], {0: 40, 3: 40}.get(n, 2), keep=n == 1) for n in range(3)]
        + [request([[3, 5]], 40), request([[80, 30]], 2, arrives=6, keep=True)],
        fault("copy", 0),
    ),
    case("a decode fails", 2, 512, [request([[n, 4]], 6) for n in range(3)], fault("decode", 2)),
    case(
        "a decode fails beside a prompt",
        2,
        64,
        [request([[1, 4]], 20), request([[2, 300]], 3, arrives=2)],
        fault("decode", 3),
    ),
    case("one row's logits aren't finite", 3, 512, [request([[n, 4]], 6) for n in range(4)], fault("decode", 3, [1])),
    case(
        "two rows' logits aren't finite",
        4,
        512,
        [request([[n, 4]], 8) for n in range(4)],
        fault("decode", 4, [0, 3]),
        fault("decode", 5, [1]),
    ),
    case(
        "the logits of a row that keeps aren't finite",
        2,
        512,
        [request([[7, 9]], 5, keep=True), request([[7, 9], [16, 3]], 3, arrives=5, keep=True)],
        fault("decode", 1, [0]),
    ),
    case("a choice's logits aren't finite", 2, 512, [request([[1, 9]], 6, n=4)], fault("decode", 1, [1])),
    case(
        "the last row of choices fails",
        1,
        512,
        [request([[1, 9]], 4, n=3), request([[2, 4]], 2)],
        fault("decode", 1, [0]),
    ),
    case("a decode of choices fails", 2, 512, [request([[1, 9]], 4, n=5), request([[2, 4]], 2)], fault("decode", 1)),
    case(
        "the logits aren't finite while a prompt is fed",
        2,
        512,
        [request([[3, 6]], 3, prompt_logprobs=0), request([[1, 4]], 9)],
        fault("decode", 2, [1]),
        fault("decode", 4, [0]),
    ),
]


def main() -> None:
    document = {"vocabulary": VOCAB, "cases": CASES}
    path = Path(__file__).parent / "schedule.json"
    lines = [json.dumps(entry) for entry in CASES]
    path.write_text(f'{{"vocabulary": {VOCAB}, "cases": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == document


if __name__ == "__main__":
    main()
