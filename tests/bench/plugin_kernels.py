"""Times the plugins' kernels on this machine's GPU, beside what docs/plugins-performance.md predicts.

    python -m tests.bench.plugin_kernels --model qwen1.5-7b --model qwen1.5-moe-a2.7b --json results.json

Each kernel of one layer and step is captured into a CUDA graph of many launches, over copies of the step's tensors that
together exceed L2 several times, and the graph is replayed between two CUDA events. Printed: microseconds a launch
(median of the rounds), the bytes that the model counts over that time, which part of the card's bandwidth it is, and
the model's bound. Bandwidth is that of engines/planner/devices.py, or else the memory clock times the bus width that
the driver reports; a Jetson reports another, and must be named. What a kernel reads of the one before it (parts, inner
activations) may be in L2, as in a real step.

A plugin that offers TensorRT tactics is measured with each. A second table has a step's kernels together, tactic beside
tactic: TensorRT times the same and keeps the fastest.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from qwen_aot.engines.planner.devices import DEVICES, Device, find_device
from qwen_aot.errors import BuildError
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.variants import VARIANTS
from qwen_aot.plugins.kernels.linear_reference import LinearWeights
from qwen_aot.plugins.kernels.moe_reference import ExpertWeights
from qwen_aot.plugins.launch import (
    Launch,
    gqa_launches,
    gqa_workspace,
    linear_launches,
    linear_workspace,
    moe_launches,
    moe_workspace,
    num_splits,
)
from qwen_aot.plugins.performance.bounds import Gpu, bound
from qwen_aot.plugins.performance.costs import Cost
from qwen_aot.plugins.performance.resources import recorded, resources_of
from qwen_aot.plugins.performance.tables import (
    CAPACITY,
    LINEAR_BITS,
    MODELS,
    STEPS,
    TOKENS,
    Step,
    attention,
    experts,
    projection_shapes,
    projections,
)
from qwen_aot.plugins.variants import QUANT_BLOCK, TACTICS, WEIGHT_BITS
from tests.bench.results import new_file, write_new

_TYPES = {"fp16": torch.float16, "fp32": torch.float32, "i32": torch.int32}
L2_TIMES = 4  # the copies of a kernel's tensors exceed L2 so many times
MOST_COPIES = 256  # of a small projection's weights (1.6 MB) it takes 190 to exceed the L2 of an RTX 4090 (72 MB)

# Of cuDeviceGetAttribute. Source: CUDA driver API, CUdevice_attribute.
_CLOCK_KHZ, _SM_COUNT, _MEMORY_KHZ, _BUS_BITS, _L2_BYTES = 13, 16, 36, 37, 38


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel's measurement.

    Attributes:
        tactic: TensorRT's number of the tiles.
        seconds: Of a launch, the median of the rounds.
        bytes: That the model counts, each once.
        share: Of the card's bandwidth.
        predicted_seconds: The model's bound.
        reason: What it is bounded by; "memory" alone is known of cards that the model isn't about.
    """

    case: str
    kernel: str
    seconds: float
    bytes: int
    share: float
    predicted_seconds: float
    reason: str
    tactic: int | None = None


def known_device(name: str) -> Device | None:
    """The device of the planner's table that CUDA calls by this name; Jetsons don't tell which they are."""
    found = [
        device for device in DEVICES.values() if name.removeprefix("NVIDIA ") == device.name.removeprefix("NVIDIA ")
    ]
    return found[0] if found else None


def bandwidth_of(memory_khz: int, bus_bits: int) -> float:
    """Bytes a second of memory that transfers twice a cycle, which is how drivers state its clock."""
    return 2 * memory_khz * 1e3 * bus_bits / 8


def copies_for(distinct_bytes: int, l2_bytes: int, free_bytes: int) -> int:
    """How many copies of a step's tensors to go through in turn, so that none is found in L2."""
    wanted = math.ceil(L2_TIMES * l2_bytes / max(1, distinct_bytes)) + 1
    return max(1, min(wanted, MOST_COPIES, int(0.6 * free_bytes / max(1, distinct_bytes))))


def predicted(gpu: Gpu, cost: Cost) -> tuple[float, str]:
    """The model's bound in seconds and its reason; by memory alone where a card's figures or resources aren't known."""
    if gpu.tensor_flops and gpu.sm in recorded():
        found = bound(gpu, cost, resources_of(gpu.sm, cost.variant))
        return found.seconds, found.reason
    return cost.distinct_bytes / gpu.bytes_per_second, "memory"


def measured(case: str, gpu: Gpu, cost: Cost, seconds: float, tactic: int | None = None) -> Row:
    """A row of the report."""
    prediction, reason = predicted(gpu, cost)
    share = cost.distinct_bytes / seconds / gpu.bytes_per_second
    return Row(case, cost.variant.kernel, seconds, cost.distinct_bytes, share, prediction, reason, tactic)


def report(gpu: Gpu, name: str, rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [
        f"{name}: SM {gpu.sm}, {gpu.sm_count} SMs, {gpu.bytes_per_second / 1e9:.0f} GB/s\n",
        "| case | kernel | tactic | µs | GB/s | of the card's | model µs | bound by | measured / model |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.case} | {row.kernel} | {row.tactic or '–'} | {row.seconds * 1e6:.1f}"
        f" | {row.bytes / row.seconds / 1e9:.0f}"
        f" | {100 * row.share:.0f} % | {row.predicted_seconds * 1e6:.1f} | {row.reason}"
        f" | {row.seconds / row.predicted_seconds:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def tactics_report(rows: Sequence[Row]) -> str:
    """A Markdown table of the steps that were measured with tactics: microseconds of all kernels of a step by tactic.

    A step that lacks a tactic has a dash there, and none is called the fastest.
    """
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.tactic is not None:
            of_step = found.setdefault(row.case, {})
            of_step[row.tactic] = of_step.get(row.tactic, 0.0) + row.seconds
    lines = [
        f"| step | {' | '.join(f'tactic {tactic}, µs' for tactic in TACTICS)} | fastest | slowest / fastest |",
        f"| --- |{' --- |' * len(TACTICS)} --- | --- |",
    ]
    for case, seconds in found.items():
        cells = [f"{seconds[tactic] * 1e6:.1f}" if tactic in seconds else "–" for tactic in TACTICS]
        is_whole = set(seconds) == set(TACTICS)
        fastest = str(min(seconds, key=lambda tactic: seconds[tactic])) if is_whole else "–"
        ratio = f"{max(seconds.values()) / min(seconds.values()):.2f}" if is_whole else "–"
        lines.append(f"| {' | '.join([case, *cells, fastest, ratio])} |")
    return "\n".join(lines)


def _workspace(shapes: dict[str, tuple[tuple[int, ...], str]], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, dtype=_TYPES[dtype], device=device) for name, (shape, dtype) in shapes.items()}


def attention_launches(
    gpu: Gpu,
    config: ModelConfig,
    step: Step,
    cache: str,
    device: torch.device,
    capacity: int,
    tactic: int = TACTICS[0],
) -> list[Launch]:
    """The launches of one layer's attention over random tensors of their own."""
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shape = (step.batch, kv_heads, capacity, head_dim)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float16, device=device)

    scales: list[torch.Tensor | None] = [None, None]
    if cache == "int8":
        key, value = (torch.randint(-127, 128, shape, dtype=torch.int8, device=device) for _ in range(2))
        scales = [torch.full(shape[:3], 1 / 127, dtype=torch.float16, device=device) for _ in range(2)]
    else:
        key, value = normal(*shape), normal(*shape)
    angles = torch.rand(capacity, head_dim // 2, device=device)
    past = torch.full((step.batch,), step.cached, device=device)
    splits = num_splits(step.batch, kv_heads, capacity, heads // kv_heads, cache, gpu.sm_count, tactic)
    sizes = {"batch": step.batch, "steps": step.new, "num_heads": heads, "head_dim": head_dim, "splits": splits}
    return gqa_launches(
        gpu.sm,
        gpu.sm_count,
        qkv=normal(step.batch, step.new, (heads + 2 * kv_heads) * head_dim),
        key=key,
        value=value,
        key_scale=scales[0],
        value_scale=scales[1],
        cos=angles.cos(),
        sin=angles.sin(),
        position_ids=past.unsqueeze(1) + torch.arange(step.new, device=device),
        cache_length=past,
        new_tokens=torch.full((step.batch,), step.new, device=device),
        output=torch.empty(step.batch, step.new, heads * head_dim, dtype=torch.float16, device=device),
        workspace=_workspace(gqa_workspace(**sizes, dtype="fp16"), device),
        num_heads=heads,
        scale=head_dim**-0.5,
        tactic=tactic,
    )


def _expert_weights(num_experts: int, rows: int, columns: int, bits: int, device: torch.device) -> ExpertWeights:
    if bits == 16:
        codes = torch.randn(num_experts, rows, columns, dtype=torch.float16, device=device) * columns**-0.5
        return ExpertWeights(codes, None, None, 16)
    codes = torch.randint(-127, 128, (num_experts, rows, columns * bits // 8), dtype=torch.int8, device=device)
    blocks = (num_experts, rows) if bits == 8 else (num_experts, rows, columns // QUANT_BLOCK)
    step = columns**-0.5 / (73 if bits == 8 else 5)
    return ExpertWeights(codes, torch.full(blocks, step, dtype=torch.float16, device=device), None, bits)


def expert_launches(
    gpu: Gpu, config: ModelConfig, num_tokens: int, bits: int, device: torch.device, tactic: int = TACTICS[0]
) -> list[Launch]:
    """The launches of one layer's experts, tokens spread as evenly as in the model."""
    moe = config.moe
    assert moe is not None
    E, k, M, F = moe.num_experts, moe.num_experts_per_tok, config.hidden_size, moe.moe_intermediate_size
    ids = (torch.arange(num_tokens * k, dtype=torch.int32, device=device) % E).view(num_tokens, k)
    sizes = {"num_tokens": num_tokens, "k": k, "num_experts": E, "hidden_size": M, "inner_size": F}
    hidden = torch.randn(num_tokens, M, dtype=torch.float16, device=device)
    return moe_launches(
        gpu.sm,
        hidden=hidden,
        expert_ids=ids,
        expert_weights=torch.rand(num_tokens, k, device=device),
        gate_up=_expert_weights(E, 2 * F, M, bits, device),
        down=_expert_weights(E, M, F, bits, device),
        output=torch.empty_like(hidden),
        workspace=_workspace(moe_workspace(**sizes, dtype="fp16"), device),
        tactic=tactic,
    )


def projection_launches(
    gpu: Gpu, cost: Cost, shape: tuple[int, int], num_tokens: int, bits: int, tactic: int, device: torch.device
) -> list[Launch]:
    """The launches of one projection over random tensors of its own: weights [N, K] in the blocks of `tables`.

    Args:
        gpu: Whose variants to take.
        cost: What the model counts of the product, for the number of its parts.
        shape: N and K.
        num_tokens: T.
        bits: Of a weight: 8 with a scale a row, or 4 in blocks of 128.
        tactic: Which tiles.
        device: Where the tensors are.
    """
    rows, columns = shape
    group_size = columns if bits == 8 else QUANT_BLOCK
    codes = torch.randint(-127, 128, (rows * bits // 8, columns), dtype=torch.int8, device=device)
    step = columns**-0.5 / (73 if bits == 8 else 5)
    scale = torch.full((columns // group_size, rows), step, dtype=torch.float16, device=device)
    x = torch.randn(num_tokens, columns, dtype=torch.float16, device=device)
    return linear_launches(
        gpu.sm,
        gpu.sm_count,
        x=x,
        weights=LinearWeights(codes, scale, None, bits, group_size),
        bias=None,
        output=torch.empty(num_tokens, rows, dtype=torch.float16, device=device),
        workspace=_workspace(linear_workspace(num_tokens=num_tokens, rows=rows, splits=cost.splits), device),
        tactic=tactic,
    )


def time_launches(launches: Sequence[Launch], rounds: int) -> float:
    """Seconds of one launch: the same kernel over several copies of its tensors, captured once and replayed."""
    repeats = max(1, 50 // len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for launch in launches:
                launch.run()
    graph.replay()
    found = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / (repeats * len(launches)))
    return statistics.median(found)


def time_step(
    case: str,
    gpu: Gpu,
    costs: Sequence[Cost],
    copies: Sequence[list[Launch]],
    rounds: int,
    tactic: int | None = None,
) -> list[Row]:
    """A row for each kernel of a step."""
    for launches in copies:  # each kernel's inputs are the results of those before it
        for launch in launches:
            launch.run()
    torch.cuda.synchronize()
    return [
        measured(case, gpu, cost, time_launches([launches[index] for launches in copies], rounds), tactic)
        for index, cost in enumerate(costs)
    ]


def find_gpu(device_key: str | None) -> tuple[str, Gpu]:
    """The name of the GPU that torch uses, and what the model needs to know of it.

    Raises:
        BuildError: The name that was given isn't in the planner's table, or a Jetson wasn't named.
    """
    driver = ctypes.CDLL("libcuda.so.1")

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        status = driver.cuDeviceGetAttribute(ctypes.byref(value), number, 0)
        if status:
            raise RuntimeError(f"cuDeviceGetAttribute({number}) gave status {status}")
        return value.value

    properties = torch.cuda.get_device_properties(0)  # initialises the driver
    known = DEVICES[find_device(device_key)] if device_key else known_device(properties.name)
    facts = known.compute if known is not None else None
    if known is None and properties.is_integrated:
        raise BuildError(
            f"CUDA calls this GPU {properties.name!r}: name it with --device; accepted: {', '.join(DEVICES)}"
        )
    return properties.name, Gpu(
        sm=f"{properties.major}.{properties.minor}",
        sm_count=attribute(_SM_COUNT),
        clock_hz=facts.clock_hz if facts else attribute(_CLOCK_KHZ) * 1e3,
        bytes_per_second=known.bytes_per_second
        if known
        else bandwidth_of(attribute(_MEMORY_KHZ), attribute(_BUS_BITS)),
        tensor_flops=facts.tensor_flops if facts else 0.0,
        l2_bytes=attribute(_L2_BYTES),
    )


def run(gpu: Gpu, models: Sequence[str], rounds: int) -> Iterator[Row]:
    """Measures every step of some models."""
    device = torch.device("cuda")

    def copies_of(costs: Sequence[Cost], tensor_bytes: int) -> int:
        free, _ = torch.cuda.mem_get_info()
        most = max(cost.distinct_bytes for cost in costs)
        return min(copies_for(most, gpu.l2_bytes, free), max(1, int(0.6 * free / tensor_bytes)))

    def time_projections(model: str) -> Iterator[Row]:
        config = VARIANTS[model]
        for bits, tokens, tactic in itertools.product(LINEAR_BITS, TOKENS, TACTICS):
            by_projection = projections(gpu, config, tokens, bits, tactic)
            for (name, shape), costs in zip(projection_shapes(config).items(), by_projection, strict=True):
                copies = [
                    projection_launches(gpu, costs[0], shape, tokens, bits, tactic, device)
                    for _ in range(copies_of(costs, math.prod(shape) * bits // 8))
                ]
                yield from time_step(f"{model} {name}, {tokens} tokens {bits} bits", gpu, costs, copies, rounds, tactic)
                del copies
                torch.cuda.empty_cache()

    def time_attention(model: str) -> Iterator[Row]:
        config = VARIANTS[model]
        for step, cache, tactic in itertools.product(STEPS, ("same", "int8"), TACTICS):
            # Slots beyond the row are never read: a cache that ends with it leaves memory for copies.
            capacity = min(CAPACITY, -(-(step.cached + step.new) // 256) * 256)
            costs = attention(gpu, config, step, cache, tactic)
            size = (1 if cache == "int8" else 2) * 2 * step.batch * config.key_value_size * capacity
            free, _ = torch.cuda.mem_get_info()
            case = f"{model} {step.name} {'int8 cache' if cache == 'int8' else 'fp16 cache'}"
            if size > 0.6 * free:
                print(f"{case}: left out, {size / 1e9:.1f} GB don't fit", file=sys.stderr)
                continue
            copies = [
                attention_launches(gpu, config, step, cache, device, capacity, tactic)
                for _ in range(copies_of(costs, size))
            ]
            yield from time_step(case, gpu, costs, copies, rounds, tactic)
            del copies
            torch.cuda.empty_cache()

    def time_experts(model: str) -> Iterator[Row]:
        config = VARIANTS[model]
        assert config.moe is not None
        for bits, tokens, tactic in itertools.product(WEIGHT_BITS, TOKENS, TACTICS):
            costs = experts(gpu, config, tokens, bits, tactic)
            size = config.moe.num_experts * 3 * config.hidden_size * config.moe.moe_intermediate_size * bits // 8
            copies = [
                expert_launches(gpu, config, tokens, bits, device, tactic)
                for _ in range(min(4, copies_of(costs, size)))
            ]
            yield from time_step(f"{model} {tokens} tokens {bits} bits", gpu, costs, copies, rounds, tactic)
            del copies
            torch.cuda.empty_cache()

    for model in models:
        yield from time_attention(model)
        yield from time_projections(model) if VARIANTS[model].moe is None else time_experts(model)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="may be given again (default: all)")
    parser.add_argument("--device", help=f"what this GPU is, for its bandwidth: {', '.join(DEVICES)}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=new_file, help="also write the numbers here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints a table. Exit codes: 0 ok, 1 no GPU or one that must be named, 2 usage."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if not torch.cuda.is_available():
        print("error: no CUDA device: a GPU, its driver and a CUDA build of torch are needed", file=sys.stderr)
        return 1
    try:
        name, gpu = find_gpu(options.device)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = list(run(gpu, options.model or MODELS, options.rounds))
    print(report(gpu, name, rows), tactics_report(rows), sep="\n\n")
    if options.json is not None:
        write_new(options.json, {"name": name, "gpu": asdict(gpu), "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
