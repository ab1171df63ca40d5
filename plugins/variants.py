"""Every compiled form of every kernel, for each SM: one table, plain data, standard library only.

`aot` compiles it, `launch` and the library choose from it, tests take their parameters from it. A variant serves the
requests that its `match` describes: each fact named there equals the value, or lies in the [first, last] range.
To add a head size, add it to `HEAD_DIMS` and to the prefill and decode columns of each row of `TILES`. To add an SM,
add it to `SMS` and `FAMILIES` (and, if no row of `TILES` suits it, a row).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qwen_aot.errors import BuildError
from qwen_aot.plugins.signatures import KERNELS, Argument

SMS = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0", "12.1")
DTYPES = ("fp16", "bf16")  # what attention, experts and projections compute in
CACHES = ("same", "int8")  # the cache's dtype: that of the computation, or int8 with a scale per head and token
HEAD_DIMS = (64, 128)
WEIGHT_BITS = (16, 8, 4)  # see plugins/kernels/moe_gemm.py
DECODE_TOKENS = 16  # most tokens of the experts' decode path: one tile of a tensor-core instruction
DECODE_CHOICES = 8  # most experts per token of the decode path
# Rows of a block of `moe_scatter`, which both grouped products share, by tactic.
MOE_BLOCKS_M = (64, 32)
QUANT_BLOCK = 128  # elements along K that share a scale of int4 weights
# Sizes M and F, and K of projections, must be multiples of it: no load along K is masked, and int4 blocks are whole.
SIZE_MULTIPLE = 128
LINEAR_ROW_MULTIPLE = 16  # of the outputs N of a projection: 16 rows of 4-bit codes lie in 8 of bytes
# Blocks of K that share a scale of a projection: "small" ones are steps of 32 columns, of others a step has 64 or 128.
LINEAR_BLOCKS = ("small", "large")
SMALL_BLOCKS = (32, 64)  # columns
LARGE_BLOCKS = (128,)  # columns; and all of K
TACTICS = (1, 2)  # TensorRT's numbers of the tiles that it may choose among

# Query heads of a group over the tile that holds them. A tensor-core tile has 16 rows, so 2 … 16 heads cost the same
# loads and the same instructions; one head alone is cheaper without tensor cores.
GROUP_TILES = {1: (1, 1), 16: (2, 16)}


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form of a kernel.

    Attributes:
        match: The facts of a request that this variant serves: a value, or a (first, last) range of integers.
        constants: The kernel's constexpr arguments.
        types: What stands for `{dtype}`, `{cache}` and `{weight}` in the arguments' types.
    """

    kernel: str
    match: Mapping[str, str | int | tuple[int, int]]
    constants: Mapping[str, int]
    types: Mapping[str, str]
    num_warps: int
    num_stages: int = 1

    @property
    def name(self) -> str:
        """Unique within an SM, for example `gqa_decode-fp16-int8-d64-g2_16`."""
        return "-".join([self.kernel, *(_match_name(fact, value) for fact, value in self.match.items())])

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The run-time arguments with their types filled in."""
        return tuple(
            Argument(argument.name, argument.type.format(**self.types), argument.is_aligned)
            for argument in KERNELS[self.kernel].arguments
        )

    def serves(self, request: Mapping[str, str | int]) -> bool:
        """Whether each fact of `match` holds for a request that names all of them."""
        return all(fact in request and _matches(request[fact], value) for fact, value in self.match.items())

    def grid(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Programs along each axis, for the sizes that the kernel's grid names."""
        return tuple(
            _cdiv(math.prod(sizes[name] for name in names), per if isinstance(per, int) else self.constants[per])
            for names, per in KERNELS[self.kernel].grid
        )


def _match_name(fact: str, value: str | int | tuple[int, int]) -> str:
    prefix = {"head_dim": "d", "group": "g", "weight_bits": "w", "has_zeros": "z", "tactic": "t"}.get(fact, "")
    return prefix + ("_".join(map(str, value)) if isinstance(value, tuple) else str(value))


def _matches(value: str | int, accepted: str | int | tuple[int, int]) -> bool:
    if isinstance(accepted, tuple):
        return isinstance(value, int) and accepted[0] <= value <= accepted[1]
    return value == accepted


def _cdiv(value: int, per: int) -> int:
    return -(-value // per)


@dataclass(frozen=True, slots=True)
class Tile:
    """Tile sizes of one kernel: M rows of queries or tokens, N slots or output columns, K the summed axis.

    With `is_ordered`, int4 codes are put in the order of K, instead of a product of even and one of odd columns. With
    `is_halved`, prefill attention multiplies with the halves of values one after the other.
    """

    num_warps: int
    num_stages: int
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    is_ordered: bool = False
    is_halved: bool = False


# The decode products read weights and little else. 16 or 32 columns a program make hundreds of programs out of one
# layer (A2.7B, one token: 4 · 88 for gate and up, 4 · 64 for down), which fills 16 … 132 SMs several times over;
# 128 elements of K are 256 bytes a row, two full lines of L2. Two warps: a tile of 16 tokens has no work for more.
# Integer weights take twice the columns: fewer bytes, and what each step does once is work that an Orin is short of
# (but for gate and up of int8, bound by memory as they are; of down, 32 columns of int8 spill on SM 9.0).
# Second, two more steps in flight: a card of much bandwidth asks for them where programs are few.
def _deeper(tile: Tile) -> tuple[Tile, ...]:
    return tile, replace(tile, num_stages=5)


_DECODE_GATE_UP = {
    16: _deeper(Tile(block_n=16, block_k=128, num_warps=2, num_stages=3)),
    8: _deeper(Tile(block_n=16, block_k=128, num_warps=2, num_stages=3)),
    4: _deeper(Tile(block_n=32, block_k=128, num_warps=2, num_stages=3)),
}
_DECODE_DOWN = {
    16: _deeper(Tile(block_n=32, block_k=128, num_warps=2, num_stages=3)),
    8: _deeper(Tile(block_n=64, block_k=128, num_warps=2, num_stages=3)),
    4: _deeper(Tile(block_n=64, block_k=128, num_warps=2, num_stages=3)),
}

# The grouped products: 64 rows, because 512 tokens choosing 4 of 60 experts leave each 34 rows. 64 elements of K, so
# that three stages fit 99 KiB. int4 scales each step's result, in twice the registers: 4 warps spill, 8 don't. Second,
# 32 rows, of which fewer are padding where a prompt is short or its experts are uneven: half of the instructions of
# int4. Their products are those of one warp on every SM (wgmma and tcgen05 take 64 rows), at two barriers a step, or
# four with zeros.
_LARGE_BLOCK, _SMALL_BLOCK = MOE_BLOCKS_M
_GATE_UP_OF_32 = Tile(block_m=_SMALL_BLOCK, block_n=64, block_k=64, num_warps=4, num_stages=3)
_DOWN_OF_32 = Tile(block_m=_SMALL_BLOCK, block_n=128, block_k=64, num_warps=4, num_stages=3)
_GATE_UP = {
    16: (Tile(block_m=_LARGE_BLOCK, block_n=64, block_k=64, num_warps=4, num_stages=3), _GATE_UP_OF_32),
    8: (Tile(block_m=_LARGE_BLOCK, block_n=64, block_k=64, num_warps=4, num_stages=3), _GATE_UP_OF_32),
    4: (Tile(block_m=_LARGE_BLOCK, block_n=64, block_k=64, num_warps=8, num_stages=3), _GATE_UP_OF_32),
}
_DOWN = {
    16: (Tile(block_m=_LARGE_BLOCK, block_n=128, block_k=64, num_warps=4, num_stages=3), _DOWN_OF_32),
    8: (Tile(block_m=_LARGE_BLOCK, block_n=128, block_k=64, num_warps=4, num_stages=3), _DOWN_OF_32),
    4: (Tile(block_m=_LARGE_BLOCK, block_n=128, block_k=64, num_warps=8, num_stages=3), _DOWN_OF_32),
}

# Where tensor cores read weights from shared memory (wgmma, tcgen05), low and high nibbles are put in order in
# registers and stored there once. Four warps load each scale once; eight would load it 16 or 32 times.
_WARPGROUP_INT4 = Tile(block_m=_LARGE_BLOCK, block_n=64, block_k=64, num_warps=4, num_stages=3, is_ordered=True)
_WARPGROUP_GATE_UP = {**_GATE_UP, 4: (_WARPGROUP_INT4, _GATE_UP_OF_32)}
_WARPGROUP_DOWN = {**_DOWN, 4: (replace(_WARPGROUP_INT4, block_n=128), _DOWN_OF_32)}
# A whole block of K, whose scale is applied once.
_HOPPER_GATE_UP = {**_GATE_UP, 4: (replace(_WARPGROUP_INT4, block_k=QUANT_BLOCK), _GATE_UP_OF_32)}
_HOPPER_DOWN = {**_DOWN, 4: (replace(_WARPGROUP_INT4, block_n=128, block_k=QUANT_BLOCK), _DOWN_OF_32)}

# Prefill attention with warps' own tensor-core instructions (mma), on SM 8.x and 12.x. 128 queries halve the traffic of
# K and V against 64. Eight warps of 16 queries each: a row of scores lies within a warp, so that its softmax needs no
# shared memory. As many slots a step as registers hold, because what a step does besides products is then shared by
# more of them. Up to 254 registers and 64 KiB; what other tiles take: docs/plugins-performance.md.
# Second, 64 queries and four warps: twice the programs, for prompts of few heads that don't fill a card, and two beside
# each other on an SM. At head size 128 a warp keeps its own rows in both products only if values are taken in halves.
_PREFILL_MMA = {
    64: (
        Tile(block_m=128, block_n=128, num_warps=8, num_stages=2),
        Tile(block_m=64, block_n=64, num_warps=4, num_stages=2),
    ),
    128: (
        Tile(block_m=128, block_n=64, num_warps=8, num_stages=2),
        Tile(block_m=64, block_n=64, num_warps=4, num_stages=2, is_halved=True),
    ),
}
# Where tensor cores work on 64 rows at least, those of four warps.
_PREFILL_OF_64 = Tile(block_m=64, block_n=64, num_warps=4, num_stages=2)

# Decode attention: 64 slots a step are 39 KiB at head size 128, so that three or four programs fit an SM of 163 KiB or
# more. Where one has 99 KiB, 32 slots in three stages: two programs, or three with an int8 cache, and as many slots in
# flight. Head size 64 takes twice the slots.
_DECODE = {
    64: Tile(block_n=128, num_warps=4, num_stages=2),
    128: Tile(block_n=64, num_warps=4, num_stages=2),
}
_DECODE_SMALL = {
    64: Tile(block_n=64, num_warps=4, num_stages=3),
    128: Tile(block_n=32, num_warps=4, num_stages=3),
}

# Without tensor cores the keys, values and sums of every slot of a step are fp32 in registers: four or five programs
# fit with 32 slots at head size 128, two or three with 64, and 128 spill.
_DECODE_ONE = {
    64: Tile(block_n=64, num_warps=4, num_stages=3),
    128: Tile(block_n=32, num_warps=4, num_stages=2),
}

# A quantized cache is loaded ahead into registers and converted once, before it is shared: no stages. 64 slots spill at
# head size 128.
_PREFILL_INT8 = {
    64: (Tile(block_m=128, block_n=64, num_warps=8, num_stages=1),),
    128: (Tile(block_m=128, block_n=32, num_warps=8, num_stages=1),),
}

# Projections. In decode a warp has 32 columns of 4 bits, 16 or 32 of 8: programs of two warps fill SMs where a matrix
# has few rows, those of more columns read the tokens less often; which of them is faster, TensorRT times (the tactics).
# Blocks of 32 or 64 columns are scaled every 32, so that a step has less to do besides; zeros cost a tenth more
# instructions, and have one tile each.
_LINEAR_DECODE = {
    (8, "large", 0): (
        Tile(block_n=32, block_k=128, num_warps=2, num_stages=3),
        Tile(block_n=64, block_k=128, num_warps=2, num_stages=3),
    ),
    (4, "large", 0): (
        Tile(block_n=64, block_k=128, num_warps=2, num_stages=3),
        Tile(block_n=128, block_k=128, num_warps=4, num_stages=3),
    ),
    (4, "large", 1): (Tile(block_n=64, block_k=128, num_warps=2, num_stages=3),),
    (4, "small", None): (Tile(block_n=128, block_k=32, num_warps=4, num_stages=4),),
}
LINEAR_WIDEST_PROGRAM = max(tile.block_n for choices in _LINEAR_DECODE.values() for tile in choices)
# 64 rows and columns, of which a short prompt makes many programs, or twice or four times that, which share conversions
# of codes among more products.
_LINEAR_PREFILL = {
    (8, "large", 0): (
        Tile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),
        Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    ),
    (4, "large", 0): (
        Tile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),
        Tile(block_m=128, block_n=64, block_k=64, num_warps=4, num_stages=3),
    ),
    (4, "large", 1): (Tile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),),
    (4, "small", None): (Tile(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=4),),
}
# Where tensor cores read weights from shared memory, four warps work on 64 rows each.
_WARPGROUP_LINEAR_PREFILL = {
    **_LINEAR_PREFILL,
    (4, "large", 0): (
        Tile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),
        Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    ),
}


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of one SM family; those of attention by head size, those of experts by weight bits.

    `prefill_int8` is prefill over an int8 cache, `decode_one` decode for groups of one head. Those of projections go by
    weight bits, blocks, and whether there are zeros (None: both, told at run time). Where there are several, each has
    one tile for all tactics, or one a tactic; few tokens of experts with zeros take the first. What has a default is
    the same for every family so far.
    """

    prefill: Mapping[int, tuple[Tile, ...]]
    prefill_int8: Mapping[int, tuple[Tile, ...]] = field(default_factory=lambda: _PREFILL_INT8)
    decode: Mapping[int, Tile] = field(default_factory=lambda: _DECODE)
    decode_one: Mapping[int, Tile] = field(default_factory=lambda: _DECODE_ONE)
    gate_up: Mapping[int, tuple[Tile, ...]] = field(default_factory=lambda: _GATE_UP)
    down: Mapping[int, tuple[Tile, ...]] = field(default_factory=lambda: _DOWN)
    decode_gate_up: Mapping[int, tuple[Tile, ...]] = field(default_factory=lambda: _DECODE_GATE_UP)
    decode_down: Mapping[int, tuple[Tile, ...]] = field(default_factory=lambda: _DECODE_DOWN)
    linear_decode: Mapping[tuple[int, str, int | None], tuple[Tile, ...]] = field(
        default_factory=lambda: _LINEAR_DECODE
    )
    linear_prefill: Mapping[tuple[int, str, int | None], tuple[Tile, ...]] = field(
        default_factory=lambda: _LINEAR_PREFILL
    )


# SMs that differ only in how many there are and how fast their memory is share a row.
FAMILIES = {
    "8.0": "ampere-large",
    "8.7": "ampere-large",
    "8.6": "ampere-small",
    "8.9": "ampere-small",
    "9.0": "hopper",
    "10.0": "blackwell-large",
    "11.0": "blackwell-large",
    "12.0": "blackwell-small",
    "12.1": "blackwell-small",
}

# Shared memory that one program can have, in bytes. Source: CUDA C++ Programming Guide, table of technical
# specifications by compute capability ("maximum amount of shared memory per thread block").
SHARED_BYTES = {
    "ampere-large": 163 * 1024,
    "ampere-small": 99 * 1024,
    "hopper": 227 * 1024,
    "blackwell-large": 227 * 1024,
    "blackwell-small": 99 * 1024,
}

TILES = {
    # 163 KiB.
    "ampere-large": Tiles(prefill=_PREFILL_MMA),
    # 99 KiB.
    "ampere-small": Tiles(prefill=_PREFILL_MMA, decode=_DECODE_SMALL),
    # wgmma works on 64 rows for each group of four warps, and reads K and V from shared memory.
    "hopper": Tiles(
        prefill={
            64: (Tile(block_m=128, block_n=64, num_warps=8, num_stages=3), _PREFILL_OF_64),
            128: (Tile(block_m=128, block_n=64, num_warps=8, num_stages=2), _PREFILL_OF_64),
        },
        gate_up=_HOPPER_GATE_UP,
        down=_HOPPER_DOWN,
        linear_prefill=_WARPGROUP_LINEAR_PREFILL,
    ),
    # tcgen05 wants 64 or 128 rows; the accumulator lives in tensor memory, not in registers. Three stages spill.
    "blackwell-large": Tiles(
        prefill={
            64: (Tile(block_m=128, block_n=64, num_warps=8, num_stages=2), _PREFILL_OF_64),
            128: (Tile(block_m=128, block_n=64, num_warps=8, num_stages=2), _PREFILL_OF_64),
        },
        gate_up=_WARPGROUP_GATE_UP,
        down=_WARPGROUP_DOWN,
        linear_prefill=_WARPGROUP_LINEAR_PREFILL,
    ),
    # Ampere's instructions and 99 KiB.
    "blackwell-small": Tiles(prefill=_PREFILL_MMA, decode=_DECODE_SMALL),
}


Match = dict[str, str | int | tuple[int, int]]


def _by_tactic(match: Match, choices: Sequence[Tile]) -> Iterator[tuple[Match, Tile]]:
    """A row for each tile, told by the tactic where there are several."""
    for tactic, tile in zip(TACTICS, choices, strict=False):
        yield {**match, "tactic": tactic} if len(choices) > 1 else match, tile


def _attention_variants(tiles: Tiles, dtype: str, cache: str) -> list[Variant]:
    types = {"dtype": dtype, "cache": "i8" if cache == "int8" else dtype}
    facts: Match = {"dtype": dtype, "cache": cache}
    is_int8 = int(cache == "int8")
    # 16 heads of 64 pairs: 8 pairs a thread. One variant serves every head size up to 128.
    rotate = {"IS_INT8": is_int8, "HEADS": 16, "HALF": 64}
    result = [Variant("gqa_rotate", {**facts, "head_dim": (64, 128)}, rotate, types, num_warps=4)]
    for head_dim in HEAD_DIMS:
        choices = (tiles.prefill_int8 if is_int8 else tiles.prefill)[head_dim]
        for match, tile in _by_tactic({**facts, "head_dim": head_dim}, choices):
            constants = {"IS_INT8": is_int8, "IS_HALVED": int(tile.is_halved), "D": head_dim}
            constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "NUM_STAGES": tile.num_stages}
            result.append(Variant("gqa_prefill", match, constants, types, tile.num_warps, tile.num_stages))
        for group_tile, groups in GROUP_TILES.items():
            tile = (tiles.decode_one if group_tile == 1 else tiles.decode)[head_dim]
            constants = {"IS_INT8": is_int8, "D": head_dim, "GROUP": group_tile, "BLOCK_N": tile.block_n}
            constants["NUM_STAGES"] = tile.num_stages
            match = {**facts, "head_dim": head_dim, "group": groups}
            result.append(Variant("gqa_decode", match, constants, types, tile.num_warps, tile.num_stages))
    return result


def _expert_variants(tiles: Tiles, dtype: str, bits: int, has_zeros: int) -> list[Variant]:
    types = {"dtype": dtype, "weight": dtype if bits == 16 else "i8"}
    facts: Match = {"dtype": dtype, "weight_bits": bits}
    if bits == 4:
        facts["has_zeros"] = has_zeros
    result = []
    for kernel, by_bits in (
        ("moe_gate_up", tiles.gate_up),
        ("moe_down", tiles.down),
        ("moe_decode_gate_up", tiles.decode_gate_up),
        ("moe_decode_down", tiles.decode_down),
    ):
        is_decode = kernel.startswith("moe_decode")
        choices = by_bits[bits][:1] if is_decode and has_zeros else by_bits[bits]
        for match, tile in _by_tactic(facts, choices):
            constants = {
                "WEIGHT_BITS": bits,
                "HAS_ZEROS": has_zeros,
                "IS_ORDERED": int(tile.is_ordered),
                "BLOCK_M": DECODE_TOKENS if is_decode else tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "NUM_STAGES": tile.num_stages,
            }
            if is_decode:
                constants["CHOICES"] = DECODE_CHOICES
            result.append(Variant(kernel, match, constants, types, tile.num_warps, tile.num_stages))
    return result


def _linear_variants(tiles: Tiles, dtype: str) -> list[Variant]:
    types = {"dtype": dtype, "weight": "i8"}
    result = []
    for kernel, listed in (("linear_decode", tiles.linear_decode), ("linear_prefill", tiles.linear_prefill)):
        for (bits, blocks, has_zeros), choices in listed.items():
            facts: Match = {"dtype": dtype, "weight_bits": bits}
            if bits == 4 and has_zeros is not None:
                facts["has_zeros"] = has_zeros
            for match, tile in _by_tactic({**facts, "blocks": blocks}, choices):
                constants = {
                    "WEIGHT_BITS": bits,
                    "HAS_ZEROS": int(has_zeros != 0),
                    "BLOCK_M": DECODE_TOKENS if kernel == "linear_decode" else tile.block_m,
                    "BLOCK_N": tile.block_n,
                    "BLOCK_K": tile.block_k,
                    "NUM_STAGES": tile.num_stages,
                }
                result.append(Variant(kernel, match, constants, types, tile.num_warps, tile.num_stages))
    result.append(Variant("linear_reduce", {"dtype": dtype}, {"BLOCK": 1024}, {"dtype": dtype}, num_warps=4))
    return result


def linear_tactics(bits: int, blocks: str, has_zeros: bool) -> int:
    """Tiles that TensorRT may choose among for a form of a projection's weights; 1: there is nothing to choose."""
    of_form = [choices for form, choices in _LINEAR_DECODE.items() if form[:2] == (bits, blocks)]
    return len(of_form[0]) if len(of_form) == 1 else len(_LINEAR_DECODE[bits, blocks, int(has_zeros)])


def variants(sm: str) -> tuple[Variant, ...]:
    """All variants of one SM ("8.9").

    Raises:
        BuildError: If the SM isn't in `SMS`.
    """
    if sm not in FAMILIES:
        raise BuildError(f"no kernels for SM {sm}; there are for {', '.join(SMS)}")
    tiles = TILES[FAMILIES[sm]]
    result = [
        Variant("moe_count", {}, {"BLOCK": 1024}, {}, num_warps=4),
        Variant("moe_scatter", {}, {"BLOCK": 1024}, {}, num_warps=4),
        Variant("gqa_timed_lengths", {}, {"BLOCK": 1024}, {}, num_warps=4),
        Variant("moe_timed_ids", {}, {}, {}, num_warps=1),
    ]
    for dtype in DTYPES:
        for cache in CACHES:
            result += _attention_variants(tiles, dtype, cache)
        facts: dict[str, str | int | tuple[int, int]] = {"dtype": dtype}
        # 16 parts of a row a step: rarely more than one step.
        result.append(
            Variant(
                "gqa_reduce",
                {**facts, "head_dim": (64, 128)},
                {"SPLITS": 16, "BLOCK_D": 128},
                {"dtype": dtype},
                num_warps=4,
            )
        )
        for bits in WEIGHT_BITS:
            for has_zeros in (0, 1) if bits == 4 else (0,):
                result += _expert_variants(tiles, dtype, bits, has_zeros)
        result.append(Variant("moe_sum", facts, {"BLOCK": 1024}, {"dtype": dtype}, num_warps=4))
        result += _linear_variants(tiles, dtype)
    return tuple(result)


def select(sm: str, kernel: str, **request: str | int) -> Variant:
    """The variant of a kernel that serves a request, for example dtype="fp16", cache="int8", head_dim=64, group=5.

    Raises:
        BuildError: If none does; the message prints the request and what there is.
    """
    candidates = [variant for variant in variants(sm) if variant.kernel == kernel]
    for variant in candidates:
        if variant.serves(request):
            return variant
    asked = ", ".join(f"{fact}={value}" for fact, value in request.items())
    served = "; ".join(variant.name for variant in candidates) or "no variant of it at all"
    raise BuildError(f"no variant of {kernel} for SM {sm} serves {asked}; there are: {served}")
