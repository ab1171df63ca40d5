"""Compares bundles with peers on this machine: every contender is measured in turn, round after round.

    python -m tests.bench.compare --bundle b128=./bundle \
        --peer onnxruntime-genai=/path/to/its/python:./genai-model --rounds 5 --json results.json

Contenders stay loaded and idle while others run. Each round draws new random prompts, the same for all, and runs the
contenders forwards or backwards by turns, so that a drift of the machine falls on all alike. Reported: medians with
the lowest and the highest, and each contender's ratio to the reference (the first peer), the median of the rounds'.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_aot.runtime.backends.cpu.kernels import Kernels
from tests.bench.results import new_file, write_new
from tests.bench.workers.protocol import READY

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).resolve().parent / "workers"
PEERS = {
    "llama-cpp": "llama_cpp.py",
    "onnxruntime-genai": "onnxruntime_genai.py",
    "openvino-genai": "openvino_genai.py",
}
MEASURES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Load:
    """What every contender does in a round.

    A prompt to its first token; `gen` greedy tokens of each of `rows` rows after its short prompt, all in each step.
    """

    prompt_tokens: int
    short_prompt_tokens: int
    gen_tokens: int
    vocab_size: int
    rows: int = 1

    def request(self, seed: int) -> dict[str, object]:
        """One round's token ids."""
        draws = random.Random(seed)

        def ids(count: int) -> list[int]:
            return [draws.randrange(self.vocab_size) for _ in range(count)]

        prompt = ids(self.prompt_tokens)
        short = [ids(self.short_prompt_tokens) for _ in range(self.rows)]
        return {"prompt": prompt, "short_prompts": short, "count": self.gen_tokens}


class Worker:
    """A contender's process. A context manager."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ)
        )
        if self._read() != READY:
            self.close()
            raise RuntimeError(f"{name}: {' '.join(command)} did not become ready; its messages stand above")

    def measure(self, request: Mapping[str, object]) -> dict[str, float]:
        """Seconds and peak memory of one round."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, float] = json.loads(self._read())
        return answer

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __enter__(self) -> Worker:
        return self

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __exit__(self, *_: object) -> None:
        self.close()


def rates(answer: Mapping[str, float], load: Load) -> dict[str, float]:
    """Tokens a second of one round; decode's are of all rows together."""
    return {
        "prefill": load.prompt_tokens / answer["prefill_seconds"],
        "decode": load.rows * load.gen_tokens / answer["decode_seconds"],
        "peak_memory_bytes": answer["peak_memory_bytes"],
    }


def summarize(rounds: Sequence[Mapping[str, Mapping[str, float]]], reference: str) -> dict[str, dict[str, object]]:
    """Per contender and measure: median, min, max, and the median of its rounds' ratios to the reference."""
    result: dict[str, dict[str, object]] = {}
    for name in rounds[0]:
        row: dict[str, object] = {"peak_memory_bytes": max(each[name]["peak_memory_bytes"] for each in rounds)}
        for measure in MEASURES:
            values = [each[name][measure] for each in rounds]
            ratios = [each[name][measure] / each[reference][measure] for each in rounds]
            row[measure] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        result[name] = row
    return result


def commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Each contender's command line, peers first."""
    result = {}
    for spec in arguments.peer:
        kind, _, rest = spec.partition("=")
        label, _, kind_name = kind.rpartition("@")
        python, _, model = rest.partition(":")
        if kind_name not in PEERS or not model:
            raise SystemExit(
                f"--peer {spec!r}: accepted: [LABEL@]KIND=PYTHON:MODEL with KIND one of {', '.join(PEERS)}"
            )
        result[label or kind_name] = [
            os.path.abspath(python),
            str(WORKERS / PEERS[kind_name]),
            str(Path(model).resolve()),
            str(arguments.threads),
            str(arguments.rows),
        ]
    for spec in arguments.bundle:
        named, _, path = spec.rpartition("=")
        label, at, kernels = named.rpartition("@")
        if at and kernels not in set(Kernels):
            raise SystemExit(f"--bundle {spec!r}: kernels are {kernels!r}; accepted: {', '.join(Kernels)}")
        result[(label if at else named) or Path(path).name] = [
            sys.executable,
            "-m",
            "tests.bench.workers.ours",
            str(Path(path).resolve()),
            str(arguments.threads),
            kernels if at else Kernels.AUTO,
        ]
    return result


def run(workers: Sequence[Worker], load: Load, rounds: int) -> list[dict[str, dict[str, float]]]:
    """The measured rounds, after one that warms up."""
    measured = []
    for index in range(rounds + 1):
        order = workers if index % 2 == 0 else workers[::-1]
        request = load.request(index)
        found = {worker.name: rates(worker.measure(request), load) for worker in order}
        if index:
            measured.append({worker.name: found[worker.name] for worker in workers})
    return measured


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bundle", action="append", default=[], metavar="[LABEL[@KERNELS]=]PATH", help=", ".join(Kernels)
    )
    parser.add_argument(
        "--peer", action="append", default=[], metavar="[LABEL@]KIND=PYTHON:MODEL", help=", ".join(PEERS)
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1, help="that decode at once (bundles: up to their --max-batch)")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--short-prompt-tokens", type=int, default=128)
    parser.add_argument("--gen-tokens", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=151_643, help="prompts are drawn below it")
    parser.add_argument("--json", type=new_file, help="also write every round's numbers here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints a table."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    load = Load(
        options.prompt_tokens, options.short_prompt_tokens, options.gen_tokens, options.vocab_size, options.rows
    )
    workers = [Worker(name, command) for name, command in commands(options).items()]
    load_average = os.getloadavg()[0]
    rounds = run(workers, load, options.rounds)
    for worker in workers:
        worker.close()
    summary = summarize(rounds, workers[0].name)
    print(
        f"{options.threads} threads, {options.rows} rows, {options.rounds} rounds, "
        f"load average before {load_average:.1f}"
    )
    print(f"{'':28}{'prefill tokens/s':>28}{'ratio':>18}{'decode tokens/s':>28}{'ratio':>18}{'memory':>10}")
    for name, row in summary.items():
        cells = []
        for measure in MEASURES:
            cell = row[measure]
            assert isinstance(cell, dict)
            cells.append(f"{cell['median']:10.1f} ({cell['min']:6.1f} … {cell['max']:6.1f})".rjust(28))
            cells.append(f"{cell['ratio']:.2f} ({cell['ratio_min']:.2f} … {cell['ratio_max']:.2f})".rjust(18))
        print(f"{name:28}{''.join(cells)}{row['peak_memory_bytes'] / 2**20:7.0f} MiB")  # type: ignore[operator]
    if options.json is not None:
        write_new(options.json, {"load": vars(options) | {"json": None}, "rounds": rounds, "summary": summary})


if __name__ == "__main__":
    main()
