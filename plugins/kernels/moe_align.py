"""Groups (token, choice) entries by expert, each group padded to whole blocks of the grouped matrix products.

No atomics: every expert scans all ids itself, so that the order is the same in each run.
"""

import triton
import triton.language as tl


@triton.jit
def moe_count(expert_ids_ptr, counts_ptr, num_entries, BLOCK: tl.constexpr):
    """expert_ids [T·k] int32. Written: counts [E] int32, the entries that chose each expert. Grid: (E,)."""
    expert = tl.program_id(0)
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_entries, BLOCK):
        entry = start + offs
        ids = tl.load(expert_ids_ptr + entry, mask=entry < num_entries, other=-1)
        count += (ids == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(count, axis=0))


@triton.jit
def moe_scatter(
    expert_ids_ptr,
    counts_ptr,
    sorted_entries_ptr,
    block_experts_ptr,
    num_blocks_ptr,
    num_entries,
    num_experts,
    block_m,
    BLOCK: tl.constexpr,
):
    """Writes each expert's entries, in order, at the start of its own blocks of block_m.

    expert_ids [T·k] int32, counts [E] int32. Written: sorted_entries [blocks·block_m] int32, the entry (token·k +
    choice) of each place, or num_entries where a block is padded; block_experts [blocks] int32; num_blocks [1] int32.
    Only the first num_blocks blocks are written. Blocks are at most num_entries / block_m + min(E, num_entries). Ids
    outside 0 … E-1 are in no block. Grid: (E,).
    """
    expert = tl.program_id(0)
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, expert, BLOCK):
        other = start + offs
        before += tl.cdiv(tl.load(counts_ptr + other, mask=other < expert, other=0), block_m)
    first_block = tl.sum(before, axis=0)
    count = tl.load(counts_ptr + expert)
    blocks = tl.cdiv(count, block_m)
    if expert == num_experts - 1:
        tl.store(num_blocks_ptr, first_block + blocks)

    for start in range(0, blocks, BLOCK):
        tl.store(block_experts_ptr + first_block + start + offs, expert, mask=start + offs < blocks)
    places = sorted_entries_ptr + first_block.to(tl.int64) * block_m
    written = 0
    for start in range(0, num_entries, BLOCK):
        entry = start + offs
        ids = tl.load(expert_ids_ptr + entry, mask=entry < num_entries, other=-1)
        is_mine = ids == expert
        rank = tl.cumsum(is_mine.to(tl.int32), axis=0) - 1  # [BLOCK]
        tl.store(places + written + rank, entry, mask=is_mine)
        written += tl.sum(is_mine.to(tl.int32), axis=0)
    for start in range(count, blocks * block_m, BLOCK):
        tl.store(places + start + offs, num_entries, mask=start + offs < blocks * block_m)
