"""What tests/examples/test_dynamo.py asks of the worker's engine itself, by the Python that has Dynamo.

python tests/examples/dynamo_engine.py BUNDLE
"""

import asyncio
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "dynamo"))

from worker import BundleEngine  # noqa: E402  found there


class Context:
    """As much of Dynamo's as the engine uses."""

    def __init__(self, number):
        self.number = number

    def id(self):
        return str(self.number)

    def is_stopped(self):
        return False


async def collect(engine, number, request):
    try:
        return [chunk async for chunk in engine.generate(request, Context(number))]
    except Exception as error:
        return [type(error).__name__, str(error)]


async def main(bundle):
    engine, config = await BundleEngine.from_args([bundle, "--threads", "1", "--model-name", "m", "--max-queue", "0"])
    folder = Path(config.model_name)
    found = {"files": sorted(path.name for path in folder.iterdir())}
    started = await engine.start(1)
    registered = started.llm
    found["registered"] = [
        started.served_model_name,
        registered.context_length,
        registered.kv_cache_block_size,
        registered.total_kv_blocks,
        registered.max_num_seqs,
    ]
    ids = list(range(40))
    plain = {"token_ids": ids, "stop_conditions": {"max_tokens": 6, "ignore_eos": True}, "sampling_options": {}}
    found["answer"] = await collect(engine, 1, plain)
    found["again"] = (await collect(engine, 2, plain))[-1]
    found["packed"] = await collect(engine, 3, {**plain, "token_ids": b"".join(i.to_bytes(4, "little") for i in ids)})
    sampling = {"temperature": 1.0, "seed": 5, "n": 2, "top_p": None, "best_of": 1}
    found["choices"] = await collect(engine, 4, {**plain, "sampling_options": sampling})
    found["logprobs"] = (await collect(engine, 5, {**plain, "output_options": {"logprobs": 2}}))[0]
    found["refused"] = {
        "guided": await collect(engine, 6, {**plain, "sampling_options": {"guided_decoding": {"regex": "a"}}}),
        "schema": await collect(engine, 6, {**plain, "sampling_options": {"guided_decoding": {"json": {"not": {}}}}}),
        "unknown": await collect(engine, 7, {**plain, "sampling_options": {"swirl": 1}}),
        "temperature": await collect(engine, 8, {**plain, "sampling_options": {"temperature": -1}}),
        "long": await collect(engine, 9, {**plain, "token_ids": list(range(100)) * 9}),
    }

    # JSON by a schema, and beginnings of one salt alone.
    sampling = {"guided_decoding": {"json": {"enum": ["ab", "ac"]}, "regex": None}}
    held = {"token_ids": ids, "stop_conditions": {"max_tokens": 20}, "sampling_options": sampling}
    found["held"] = await collect(engine, 40, held)
    salted = [{**plain, "nvext": {"cache_salt": "x"}}, {**plain, "extra_args": {"nvext": {"cache_salt": "x"}}}]
    salted += [{**plain, "nvext": {"cache_salt": "y"}}, plain]
    ends = [(await collect(engine, 41 + n, each))[-1]["completion_usage"] for n, each in enumerate(salted)]
    found["salted"] = [end["prompt_tokens_details"]["cached_tokens"] for end in ends]

    # More than the rows and no queue: the last is sent elsewhere. One whose client leaves gives its row back.
    long = {"token_ids": ids, "stop_conditions": {"max_tokens": 460, "ignore_eos": True}}
    streams = [engine.generate(long, Context(10 + n)) for n in range(4)]
    for stream in streams:
        await anext(stream)
    found["full"] = await collect(engine, 20, plain)
    for n in range(4):
        await engine.abort(Context(10 + n))
    ends = []
    for stream in streams:
        ends.append([chunk async for chunk in stream][-1])  # no such comprehension before 3.11
    found["aborted"] = [[end["finish_reason"], end["completion_usage"]["completion_tokens"] < 460] for end in ends]
    found["free"] = engine._service.statistics().running
    stream = engine.generate(long, Context(30))
    await anext(stream)
    await stream.aclose()  # as when its task is cancelled
    while engine._service.statistics().running:
        await asyncio.sleep(0.01)
    found["at work"] = len(engine._at_work)
    await engine.cleanup()
    await engine.cleanup()
    found["folder"] = folder.exists()
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
