"""The tables of docs/plugins-performance.md: the model of published shapes on the devices that it is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen_aot.engines.planner.devices import DEVICES
from qwen_aot.errors import BuildError
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.variants import VARIANTS
from qwen_aot.plugins.performance.bounds import Bound, Gpu, bound, occupancy
from qwen_aot.plugins.performance.costs import Cost, attention_costs, even_counts, expert_costs, linear_costs
from qwen_aot.plugins.performance.resources import LOOPING, recorded, resources_of
from qwen_aot.plugins.variants import QUANT_BLOCK, SMS, TACTICS, WEIGHT_BITS, variants

GPUS = ("orin-nano-8gb", "agx-orin-64gb", "rtx-4090", "l4")  # keys of qwen_aot.engines.planner.devices.DEVICES
MODELS = ("qwen1.5-0.5b", "qwen1.5-7b", "qwen1.5-32b", "qwen1.5-moe-a2.7b")
CAPACITY = 32768  # of the cache, in tokens
TOKENS = (1, 8, 128, 512)  # of experts' and projections' steps
LINEAR_BITS = (8, 4)  # with a scale a row; in blocks of 128


@dataclass(frozen=True, slots=True)
class Step:
    """One step of attention: rows, new tokens of each, and tokens that each row's cache holds before."""

    batch: int
    new: int
    cached: int

    @property
    def name(self) -> str:
        """For a table."""
        if self.new == 1:
            return f"decode {self.batch} × {self.cached + 1}"
        return f"prefill {self.new} over {self.cached}"


# Decode of 1 and 8 rows that then hold 512, 4,096 and 32,768 tokens, and prefill of one row.
STEPS = (
    *(Step(batch, 1, length - 1) for batch in (1, 8) for length in (512, 4096, 32768)),
    Step(1, 512, 0),
    Step(1, 512, 4096),
)


def gpu_of(device: str) -> Gpu:
    """A device of `engines.planner.devices` as the model sees it.

    Raises:
        BuildError: What its GPU computes isn't listed there.
    """
    facts = DEVICES[device]
    if facts.compute is None:
        raise BuildError(
            f"what {facts.name} computes isn't listed in engines/planner/devices.py; accepted: {', '.join(GPUS)}"
        )
    compute = facts.compute
    return Gpu(
        sm=facts.capability_name,
        sm_count=compute.sm_count,
        clock_hz=compute.clock_hz,
        bytes_per_second=facts.bytes_per_second,
        tensor_flops=compute.tensor_flops,
        l2_bytes=compute.l2_bytes,
    )


def attention(gpu: Gpu, config: ModelConfig, step: Step, cache: str, tactic: int = TACTICS[0]) -> list[Cost]:
    """The launches of one layer's attention."""
    return attention_costs(
        gpu.sm,
        gpu.sm_count,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        batch=step.batch,
        new=step.new,
        cached=step.cached,
        capacity=CAPACITY,
        cache=cache,
        tactic=tactic,
    )


def experts(gpu: Gpu, config: ModelConfig, num_tokens: int, bits: int, tactic: int = TACTICS[0]) -> list[Cost]:
    """The launches of one layer's experts, tokens spread over experts as evenly as can be."""
    moe = config.moe
    assert moe is not None
    k = moe.num_experts_per_tok
    return expert_costs(
        gpu.sm,
        counts=even_counts(num_tokens, k, moe.num_experts),
        num_tokens=num_tokens,
        k=k,
        hidden_size=config.hidden_size,
        inner_size=moe.moe_intermediate_size,
        bits=bits,
        tactic=tactic,
    )


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name to outputs N and inputs K of a dense layer's projections: q, k and v are one, gate and up are one."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "q k v": (config.query_size + 2 * config.key_value_size, hidden),
        "output": (hidden, config.query_size),
        "gate and up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def projections(gpu: Gpu, config: ModelConfig, num_tokens: int, bits: int, tactic: int) -> list[list[Cost]]:
    """The launches of each of `projection_shapes`, in their order."""
    return [
        linear_costs(
            gpu.sm,
            gpu.sm_count,
            num_tokens=num_tokens,
            rows=rows,
            columns=columns,
            bits=bits,
            group_size=columns if bits == 8 else QUANT_BLOCK,
            tactic=tactic,
        )
        for rows, columns in projection_shapes(config).values()
    ]


def _bound(gpu: Gpu, cost: Cost) -> Bound:
    return bound(gpu, cost, resources_of(gpu.sm, cost.variant))


def _cell(gpu: Gpu, cost: Cost) -> str:
    """Microseconds, and what they are bounded by."""
    found = _bound(gpu, cost)
    return f"{_number(found.seconds * 1e6)} {found.reason[0]}"


def _fill(gpu: Gpu, cost: Cost) -> str:
    """Programs, waves and occupancy."""
    filled = occupancy(gpu, cost, resources_of(gpu.sm, cost.variant))
    return f"{cost.working}, {filled.waves:.2f}, {100 * filled.warps:.0f} %"


def _number(value: float) -> str:
    """Three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def attention_bytes() -> str:
    """What attention moves and computes, with the tiles and parts of an L4."""
    gpu = gpu_of("l4")

    def rows() -> Iterator[Sequence[str]]:
        for model in MODELS:
            for step in STEPS:
                rotate, attend, *rest = attention(gpu, VARIANTS[model], step, "same")
                _, attend_int8, *_ = attention(gpu, VARIANTS[model], step, "int8")
                yield (
                    model.removeprefix("qwen1.5-"),
                    step.name,
                    *(_number(cost.distinct_bytes / 1e6) for cost in (rotate, attend, attend_int8)),
                    _number(attend.requested_bytes / attend.distinct_bytes),
                    _number(rest[0].distinct_bytes / 1e6) if rest and rest[0].working else "–",
                    _number(attend.useful_flops / 1e9),
                    _number(attend.tensor_flops / 1e9) if attend.tensor_flops else "–",
                )

    header = "model, step, rotate MB, attend MB, int8 cache MB, asked of L2, reduce MB, GFLOP, issued to tensor cores"
    return _table(header.split(", "), rows())


def _layer(gpu: Gpu, costs: Sequence[Cost]) -> str:
    """Microseconds of several launches together."""
    return _number(sum(_bound(gpu, cost).seconds for cost in costs if cost.working) * 1e6)


def attention_bounds(device: str) -> str:
    """What bounds attention on a device, and what its launches fill: of each step with the first tactic, then sums."""
    gpu = gpu_of(device)

    def rows() -> Iterator[Sequence[str]]:
        for model in MODELS:
            for step in STEPS:
                rotate, attend, *rest = attention(gpu, VARIANTS[model], step, "same")
                _, attend_int8, *_ = attention(gpu, VARIANTS[model], step, "int8")
                yield (
                    model.removeprefix("qwen1.5-"),
                    step.name,
                    _cell(gpu, rotate),
                    _cell(gpu, attend),
                    _fill(gpu, attend),
                    _cell(gpu, attend_int8),
                    _fill(gpu, attend_int8),
                    _cell(gpu, rest[0]) if rest and rest[0].working else "–",
                    *(
                        _layer(gpu, attention(gpu, VARIANTS[model], step, cache, tactic))
                        for cache in ("same", "int8")
                        for tactic in TACTICS
                    ),
                )

    fill = "programs, waves, occupancy"
    sums = ["all, first tactic", "second", "int8 cache, first", "second"]
    return _table(["model", "step", "rotate", "attend", fill, "attend, int8 cache", fill, "reduce", *sums], rows())


def expert_bytes() -> str:
    """What the experts of one layer of MoE-A2.7B move and compute."""
    gpu, config = gpu_of("l4"), VARIANTS["qwen1.5-moe-a2.7b"]

    def rows() -> Iterator[Sequence[str]]:
        for tokens in TOKENS:
            for bits in WEIGHT_BITS:
                costs = {cost.variant.kernel: cost for cost in experts(gpu, config, tokens, bits)}
                products = [cost for kernel, cost in costs.items() if kernel.endswith(("gate_up", "down"))]
                others = [cost for cost in costs.values() if cost not in products]
                yield (
                    str(tokens),
                    str(bits),
                    *(_number(cost.distinct_bytes / 1e6) for cost in products),
                    *(_number(cost.requested_bytes / cost.distinct_bytes) for cost in products),
                    _number(sum(cost.distinct_bytes for cost in others) / 1e6),
                    _number(sum(cost.useful_flops for cost in products) / 1e9),
                    _number(sum(cost.tensor_flops for cost in products) / 1e9),
                )

    header = "tokens, bits, gate_up MB, down MB, asked of L2 (gate_up), asked of L2 (down), other MB, GFLOP"
    return _table([*header.split(", "), "issued to tensor cores"], rows())


def expert_bounds(device: str) -> str:
    """What bounds the experts of one layer of MoE-A2.7B on a device, and what their launches fill."""
    gpu, config = gpu_of(device), VARIANTS["qwen1.5-moe-a2.7b"]

    def rows() -> Iterator[Sequence[str]]:
        for tokens in TOKENS:
            for bits in WEIGHT_BITS:
                costs = experts(gpu, config, tokens, bits)
                gate_up, down = (cost for cost in costs if cost.variant.kernel.endswith(("gate_up", "down")))
                others = sum(_bound(gpu, cost).seconds for cost in costs if cost is not gate_up and cost is not down)
                yield (
                    str(tokens),
                    str(bits),
                    _cell(gpu, gate_up),
                    _fill(gpu, gate_up),
                    _cell(gpu, down),
                    _fill(gpu, down),
                    _number(others * 1e6),
                    *(_layer(gpu, experts(gpu, config, tokens, bits, tactic)) for tactic in TACTICS),
                )

    fill = "programs, waves, occupancy"
    sums = ["all, first tactic", "second"]
    return _table(["tokens", "bits", "gate_up", fill, "down", fill, "count, scatter, sum", *sums], rows())


def projection_bounds(device: str) -> str:
    """What a dense layer's projections move and what bounds them on a device."""
    gpu = gpu_of(device)

    def rows() -> Iterator[Sequence[str]]:
        for model in (model for model in MODELS if VARIANTS[model].moe is None):
            for tokens in TOKENS:
                for bits in LINEAR_BITS:
                    by_tactic = [projections(gpu, VARIANTS[model], tokens, bits, tactic) for tactic in TACTICS]
                    launches = [cost for costs in by_tactic[0] for cost in costs]
                    yield (
                        model.removeprefix("qwen1.5-"),
                        str(tokens),
                        str(bits),
                        _number(sum(cost.distinct_bytes for cost in launches) / 1e6),
                        *(_cell(gpu, product) for product, *_ in by_tactic[0]),
                        _fill(gpu, by_tactic[0][1][0]),
                        *(_layer(gpu, [cost for costs in layer for cost in costs]) for layer in by_tactic),
                    )

    header = "model, tokens, bits, MB, q k v, output, gate and up, down"
    fill = "programs, waves, occupancy (output)"
    return _table([*header.split(", "), fill, "layer, first tiles", "layer, second tiles"], rows())


def devices() -> str:
    """The figures of the devices."""

    def rows() -> Iterator[Sequence[str]]:
        for device in GPUS:
            gpu = gpu_of(device)
            yield (
                DEVICES[device].name,
                gpu.sm,
                str(gpu.sm_count),
                f"{gpu.clock_hz / 1e9:.2f}",
                f"{gpu.bytes_per_second / 1e9:.1f}",
                f"{gpu.tensor_flops / 1e12:.1f}",
                str(gpu.l2_bytes >> 20),
            )

    return _table(["device", "SM", "SMs", "GHz", "GB/s", "tensor TFLOPS", "L2 MiB"], rows())


def machine_code(sm: str) -> str:
    """The main loops of an SM's fp16 kernels."""

    def rows() -> Iterator[Sequence[str]]:
        for variant in variants(sm):
            if variant.kernel not in LOOPING or variant.name not in recorded()[sm]:
                continue
            used = recorded()[sm][variant.name]
            loop = used.loop
            yield (
                f"`{variant.name}`",
                *map(str, (used.registers, used.shared_bytes, used.spill_bytes, loop.instructions, loop.products)),
                f"{loop.instructions / loop.products:.1f}" if loop.products else "–",
                *map(str, (loop.shuffles, loop.barriers)),
                ", ".join(f"{count} × {width}" for width, count in sorted(loop.loads.items(), reverse=True)),
            )

    header = (
        "variant, registers, shared bytes, spilled, instructions, products, instructions a product, shuffles, barriers"
    )
    return _table([*header.split(", "), "loads × bytes"], rows())


def tables() -> dict[str, str]:
    """Every table by the name that marks it in the document."""
    return {
        "devices": devices(),
        "attention bytes": attention_bytes(),
        **{f"attention on {device}": attention_bounds(device) for device in GPUS},
        "expert bytes": expert_bytes(),
        **{f"experts on {device}": expert_bounds(device) for device in GPUS},
        **{f"projections on {device}": projection_bounds(device) for device in GPUS},
        **{f"machine code of SM {sm}": machine_code(sm) for sm in SMS},
    }


def filled_in(document: str) -> str:
    """A document with each table between its marks, `<!-- table: NAME -->` and `<!-- end -->`, made anew.

    Raises:
        BuildError: A mark is missing.
    """
    for name, table in tables().items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, found, rest = document.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise BuildError(f"the document lacks the marks {start.strip()} and {end.strip()}")
        document = f"{before}{start}\n{table}\n\n{end}{after}"
    return document
