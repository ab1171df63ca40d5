"""How threads run: branches, barriers, memory; and each thing that a kernel may not do, refused with its line."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.ptx.interpreter import Counts, Interpreter, PtxError
from tests.plugins.ptx.programs import aligned, kernel, run

START = """
    .reg .b64 from, to, at;
    .reg .b32 thread, lane, warp, near, a, b, c;
    .reg .pred p, q;
    mov.u32 thread, %tid.x;
    and.b32 lane, thread, 31;
    shr.u32 warp, thread, 5;
    mad.lo.s32 near, thread, 16, shared;
    ld.param.b64 from, [source];
    ld.param.b64 to, [target];
    mad.wide.u32 at, thread, 4, to;
"""


def execute(
    interpreter: Interpreter, body: str, *, threads: int = 64, shared_bytes: int = 2048
) -> tuple[np.ndarray, Counts]:
    """A block over `source`, 0 … 4095 as int32, and `target`, a word for each thread."""
    source, target = aligned(np.arange(4096, dtype=np.int32)), aligned(np.full(threads, -1, np.int32))
    text = kernel(["source", "target"], START + body, threads=threads)
    counts = run(interpreter, text, {"source": source, "target": target}, threads=threads, shared_bytes=shared_bytes)
    return target, counts


@given(trips=st.lists(st.integers(0, 9), min_size=64, max_size=64), limit=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_each_thread_goes_its_own_way(trips: list[int], limit: int, interpreter: Interpreter) -> None:
    """A loop of as many rounds as the thread wants, with a branch in it; all meet again behind it."""
    body = f"""
    mad.wide.u32 at, thread, 4, from;
    ld.global.b32 a, [at];
    mov.b32 b, 0;
    mov.b32 c, 0;
    ROUND:
    setp.ge.s32 p, b, a;
    @p bra OUT;
    add.s32 b, b, 1;
    setp.gt.s32 q, b, {limit};
    @q bra MANY;
    add.s32 c, c, 1;
    bra.uni ROUND;
    MANY:
    add.s32 c, c, 100;
    bra ROUND;
    OUT:
    bar.sync 0;
    shfl.sync.idx.b32 b, c, 0, 31, -1;
    mad.wide.u32 at, thread, 8, to;
    st.global.v2.b32 [at], {{c, b}};
    """
    source, target = np.array(trips, np.int32), np.zeros((64, 2), np.int32)
    text = kernel(["source", "target"], START + body, threads=64)
    run(interpreter, text, {"source": source, "target": target}, threads=64)
    expected = [min(trip, limit) + 100 * max(trip - limit, 0) for trip in trips]
    assert target[:, 0].tolist() == expected
    assert target[:, 1].tolist() == [expected[0]] * 32 + [expected[32]] * 32


@given(trips=st.lists(st.integers(1, 9), min_size=32, max_size=32))
@settings(max_examples=15, deadline=None)
def test_a_loop_that_each_thread_leaves_by_itself(trips: list[int], interpreter: Interpreter) -> None:
    """As compilers write loops, with the branch at the end: some go back, and wait there for none."""
    body = """
    mad.wide.u32 from, thread, 4, from;
    ld.global.b32 a, [from];
    mov.b32 b, 0;
    ROUND:
    add.s32 b, b, 1;
    setp.lt.s32 p, b, a;
    @p bra ROUND;
    shfl.sync.idx.b32 c, b, 31, 31, -1;
    mad.lo.s32 b, b, 100, c;
    st.global.b32 [at], b;
    """
    source, target = np.array(trips, np.int32), np.zeros(32, np.int32)
    text = kernel(["source", "target"], START + body, threads=32)
    run(interpreter, text, {"source": source, "target": target}, threads=32)
    assert target.tolist() == [100 * trip + trips[31] for trip in trips]


def test_some_threads_end_early_and_the_rest_meet_at_barriers(interpreter: Interpreter) -> None:
    body = """
    setp.eq.b32 p, warp, 1;
    @p ret;
    bar.sync 0;
    setp.lt.s32 p, lane, 5;
    @p ret;
    st.global.b32 [at], thread;
    """
    target, counts = execute(interpreter, body, threads=96)
    assert target.tolist() == [thread if thread % 32 >= 5 and thread // 32 != 1 else -1 for thread in range(96)]
    assert counts.executed("bar.sync") == 2


def test_barriers_order_what_warps_write(interpreter: Interpreter) -> None:
    body = """
    st.shared.b32 [near], thread;
    bar.sync 0;
    xor.b32 a, thread, 63;
    mad.lo.s32 a, a, 16, shared;
    ld.shared.b32 b, [a];
    st.global.b32 [at], b;
    """
    target, counts = execute(interpreter, body)
    assert target.tolist() == list(range(63, -1, -1))
    assert counts.bytes("st.shared") == counts.bytes("ld.shared") == counts.written["target"] == 256
    assert counts.written_sectors["target"] == 8 and counts.read.total() == 0


def test_a_warp_asks_for_a_sector_once(interpreter: Interpreter) -> None:
    body = "ld.global.b32 a, [from];\nmad.wide.u32 at, thread, 32, from;\nld.global.b32 b, [at];"
    _, counts = execute(interpreter, body)
    assert counts.read["source"] == 2 * 64 * 4
    assert counts.read_sectors["source"] == 2 + 64


def test_the_grid(interpreter: Interpreter) -> None:
    """Each block has its place, and registers and shared memory of its own."""
    body = """
    .reg .b32 x, y, z;
    mov.u32 x, %ctaid.x;
    mov.u32 y, %ctaid.y;
    mov.u32 z, %ctaid.z;
    mad.lo.s32 a, z, 3, y;
    mad.lo.s32 a, a, 2, x;
    mad.wide.u32 at, a, 4, to;
    st.global.b32 [at], a;
    """
    target = np.full(24, -1, np.int32)
    buffers = {"source": np.zeros(1, np.int32), "target": target}
    run(interpreter, kernel(["source", "target"], START + body, threads=1), buffers, threads=1, grid=(2, 3, 4))
    assert target.tolist() == list(range(24))


@pytest.mark.parametrize(("threads", "said"), [(32, "with 32 threads a block, not 64"), (0, "0 threads")])
def test_a_block_of_another_size(threads: int, said: str, interpreter: Interpreter) -> None:
    text = kernel(["source", "target"], START, threads=64)
    buffers = {"source": np.zeros(4, np.int32), "target": np.zeros(64, np.int32)}
    with pytest.raises(PtxError, match=said):
        run(interpreter, text, buffers, threads=threads)


COPY = "cp.async.cg.shared.global [near], [from], 16, 16;\ncp.async.commit_group;\n"
WRITE = "st.shared.v4.b32 [near], {thread, thread, thread, thread};\n"
OTHERS = "xor.b32 a, near, 16;\n"  # what the neighbour has: near is a multiple of 32, or 16 more
PER_THREAD = "mad.wide.u32 from, thread, 16, from;\n"


def test_asynchronous_copies(interpreter: Interpreter) -> None:
    """Of whole pieces and of less, of which the rest is zeros; each thread waits for its own."""
    body = f"""
    {PER_THREAD}
    and.b32 b, thread, 3;
    shl.b32 b, b, 2;
    cp.async.ca.shared.global [near], [from], 16, b;
    cp.async.commit_group;
    add.s32 c, near, 1020;
    add.s64 from, from, -32;
    cp.async.cg.shared.global [c+4], [from+32], 16, 16;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.b32 a, [near+8];
    cp.async.wait_group 0;
    bar.sync 0;
    add.s32 c, c, 4;
    xor.b32 c, c, 16;
    ld.shared.b32 b, [c+4];
    mad.lo.s32 a, a, 10000, b;
    st.global.b32 [at], a;
    """
    target, counts = execute(interpreter, body)
    expected = [(4 * t + 2 if t % 4 == 3 else 0) * 10000 + 4 * (t ^ 1) + 1 for t in range(64)]
    assert target.tolist() == expected
    assert counts.read["source"] == 64 * 16 + sum(t % 4 * 4 for t in range(64))


REFUSED = {
    "below a tensor": ("add.s64 from, from, -4;\nld.global.b32 a, [from];", "lies in no allocation"),
    "behind a tensor": ("ld.global.b32 a, [from+16384];", "lies in no allocation"),
    "across a tensor's end": (
        "add.s64 from, from, 16376;\nld.global.v4.b32 {a, b, c, warp}, [from];",
        "16 bytes at 16376 of an allocation of 16384",
    ),
    "null": ("mov.b64 from, 0;\nld.global.b32 a, [from];", "is at address 0, which lies in no allocation"),
    "a misaligned load": ("ld.global.b32 a, [from+2];", "isn't a multiple of 4"),
    "a misaligned vector": ("ld.global.v4.b32 {a, b, c, warp}, [from+4];", "isn't a multiple of 16"),
    "a store outside": ("mad.wide.u32 at, thread, 8, to;\nst.global.b32 [at], thread;", "lies in no allocation"),
    "below shared memory": ("mov.b32 a, 0;\nst.shared.b32 [a], thread;", "thread 0 is at 0 of shared memory, outside"),
    "behind shared memory": (
        "st.shared.b32 [near+1040], thread;",
        "thread 63 is at 3072 of shared memory, outside of its 2048",
    ),
    "misaligned shared memory": (
        "st.shared.b32 [near+2], thread;",
        "thread 0 is at 1026 of shared memory, which isn't a",
    ),
    "shared memory that nobody wrote": ("ld.shared.b32 a, [near];", "reads shared memory that nobody wrote"),
    "part of it written": (
        "st.shared.b16 [near], 1;\nld.shared.b32 a, [near];",
        "reads shared memory that nobody wrote",
    ),
    "a register that was never set": ("add.s32 a, a, 1;", "a is read, which was never set"),
    "set in other threads only": (
        "setp.eq.b32 p, lane, 3;\n@p mov.b32 a, 1;\nadd.s32 b, a, 1;",
        "a is read, which was never set",
    ),
    "a guard that was never set": ("@p mov.b32 a, 1;", "its guard was never set"),
    "a read without a barrier": (
        WRITE + OTHERS + "ld.shared.b32 b, [a];",
        r"a race: at line \d+ \(ld.shared.b32 b, \[a\]\) thread 0 reads what thread 1 wrote at line \d+ \(st.shared.v4",
    ),
    "a read of another warp": (
        WRITE + "xor.b32 a, near, 512;\nbar.sync 0;\n" + WRITE + "ld.shared.b32 b, [a];",
        "thread 32 writes what thread 0 read",
    ),
    "a write after a read": (
        WRITE + "bar.sync 0;\n" + OTHERS + "ld.shared.b32 b, [a];\n" + WRITE,
        "a race: .* thread 0 writes what thread 1 read",
    ),
    "a write after many reads": (
        WRITE + "bar.sync 0;\nld.shared.b32 b, [shared];\n" + WRITE,
        "a race: .* thread 0 writes what several threads read",
    ),
    "two writes": (
        "st.shared.b32 [shared], thread;",
        "a race: .* thread 1 writes what thread 0 wrote",
    ),
    "the same value by another instruction": (
        "setp.eq.b32 p, lane, 0;\n@p st.shared.b32 [shared], 7;\n@!p st.shared.b32 [shared], 7;",
        "a race: .* thread 1 writes what thread 0 wrote",
    ),
    "a read of what several wrote": (
        "st.shared.b32 [shared], 7;\nld.shared.b32 a, [shared];",
        "a race: .* thread 0 reads what several threads wrote",
    ),
    "a barrier in one branch": (
        "setp.eq.b32 p, lane, 3;\n@p bra HERE;\nbar.sync 0;\nHERE:",
        "only some of a warp's threads get here",
    ),
    "another barrier": ("bar.sync 1;", "barriers other than 0"),
    "a shuffle in one branch": (
        "setp.lt.s32 p, lane, 3;\n@p shfl.sync.idx.b32 a, thread, 0, 31, -1;",
        "the threads that get here aren't the members",
    ),
    "a shuffle from elsewhere": (
        "setp.lt.s32 p, lane, 3;\n@p shfl.sync.idx.b32 a, thread, 9, 31, 7;",
        "taken from a thread that isn't here",
    ),
    "a uniform branch that isn't": (
        "setp.eq.b32 p, lane, 3;\n@p bra.uni HERE;\nHERE:",
        "some threads branch and some don't",
    ),
    "a copy that isn't waited for": (COPY + "ld.shared.b32 a, [near];", "hasn't brought yet, of line"),
    "a copy of another group": (COPY + "cp.async.wait_group 1;\nld.shared.b32 a, [near];", "hasn't brought yet"),
    "a copy that isn't committed": (
        "cp.async.cg.shared.global [near], [from], 16, 16;\ncp.async.wait_group 0;\nld.shared.b32 a, [near];",
        "hasn't brought yet",
    ),
    "a copy without a barrier": (
        COPY + "cp.async.wait_group 0;\n" + OTHERS + "ld.shared.b32 b, [a];",
        "a race: .* thread 0 reads what thread 1 wrote",
    ),
    "a copy over what is read": (
        WRITE + "bar.sync 0;\n" + OTHERS + "ld.shared.b32 b, [a];\n" + COPY,
        "a race: .* thread 0 writes what thread 1 read",
    ),
    "a write under a copy": (COPY + WRITE, "thread 0 writes where an asynchronous copy will"),
    "a copy of nothing's": ("cp.async.cg.shared.global [near], [from+0], 16, 17;", "more bytes are copied than"),
    "a copy of odd size": ("cp.async.ca.shared.global [near], [from], 12, 12;", "is of 4, 8 or 16 bytes"),
    "a copy from outside": ("add.s64 from, from, -16;\n" + COPY, "lies in no allocation"),
    "a copy to behind shared memory": (
        "cp.async.cg.shared.global [near+2048], [from], 16, 16;",
        "thread 0 is at 3072 of shared memory, outside",
    ),
    "a copy from behind a tensor": ("cp.async.cg.shared.global [near], [from+16384], 16, 16;", "lies in no allocation"),
    "a misaligned copy": ("add.s64 from, from, 8;\n" + COPY, "isn't a multiple of 16"),
    "a loop without end": ("ROUND:\nbra ROUND;", "the kernel doesn't end"),
    "a matrix's row that is misaligned": (
        WRITE + "bar.sync 0;\nadd.s32 near, near, 4;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {a}, [near];",
        "thread 0 is at 1028 of shared memory, which isn't a multiple of 16",
    ),
    "a matrix in one branch": (
        WRITE + "bar.sync 0;\nsetp.lt.s32 p, lane, 8;\n@p ldmatrix.sync.aligned.m8n8.x1.shared.b16 {a}, [near];",
        "only some of a warp's threads get here",
    ),
    "a parameter behind the last": ("ld.param.b64 from, [target+8];", "a parameter is read beyond the last one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, interpreter: Interpreter) -> None:
    body, said = REFUSED[name]
    with pytest.raises(PtxError, match=r"(?s)one, block \(0, 0, 0\): .*" + said):
        execute(interpreter, body)


BLOCK = ".reg .b32 block;\nmov.u32 block, %ctaid.x;\n"
GLOBAL_RACES = {
    "two blocks write": (
        "setp.eq.b32 p, thread, 0;\n@p st.global.b32 [to], block;",
        "thread 0 of block number 0 wrote",
    ),
    "one writes, another reads": (
        "setp.eq.b32 p, block, 0;\n@p st.global.b32 [at], thread;\n@!p ld.global.b32 a, [at];",
        "thread 0 reads what thread 0 of block number 0 wrote",
    ),
    "one reads, another writes": (
        "setp.eq.b32 p, block, 1;\n@p st.global.b32 [at], thread;\n@!p ld.global.b32 a, [at];",
        "thread 0 writes what thread 0 of block number 0 read",
    ),
    "many read, another writes": (
        "setp.eq.b32 p, block, 1;\n@p st.global.b32 [at], thread;\n@!p ld.global.b32 a, [to];",
        "thread 0 writes what several threads of block number 0 read",
    ),
    "several blocks read": (
        "setp.eq.b32 p, block, 2;\n@p st.global.b32 [at], thread;\n@!p ld.global.b32 a, [at];",
        "thread 0 writes what thread 0 of several blocks read",
    ),
    "threads of one block write": ("st.global.b32 [to], block;", "thread 1 writes what thread 0 of this block wrote"),
    "one thread reads what another wrote": (
        "st.global.b32 [at], block;\nld.global.b32 a, [to];",
        "thread 1 reads what thread 0 of this block wrote",
    ),
    "a thread writes what another read": (
        "ld.global.b32 a, [to];\nst.global.b32 [at], block;",
        "thread 0 writes what several threads of this block read",
    ),
}


def run_blocks(interpreter: Interpreter, body: str, blocks: int) -> None:
    buffers = {"source": np.zeros(64, np.int32), "target": np.zeros(64, np.int32)}
    run(
        interpreter, kernel(["source", "target"], START + BLOCK + body, threads=64), buffers, threads=64, grid=(blocks,)
    )


@pytest.mark.parametrize("name", GLOBAL_RACES)
def test_races_in_global_memory(name: str, interpreter: Interpreter) -> None:
    """Between blocks, which nothing orders, and between threads of one."""
    body, said = GLOBAL_RACES[name]
    with pytest.raises(PtxError, match=f"a race: .*{said}"):
        run_blocks(interpreter, body, 3)


def test_a_barrier_orders_threads_of_one_block(interpreter: Interpreter) -> None:
    body = "ld.global.b32 a, [to];\nbar.sync 0;\nst.global.b32 [at], block;\nbar.sync 0;\nld.global.b32 a, [to];"
    run_blocks(interpreter, body, 1)
    with pytest.raises(PtxError, match="thread 0 reads what thread 0 of block number 0 wrote"):
        run_blocks(interpreter, body, 2)


ALLOWED = {
    "the last word": "ld.global.b32 a, [from+16380];",
    "its own bytes again": WRITE + "ld.shared.b32 a, [near];\n" + WRITE,
    "the same value from all threads": "st.shared.b32 [shared], 7;\nbar.sync 0;\nld.shared.b32 a, [shared];",
    "reads of all": WRITE + "bar.sync 0;\nld.shared.b32 a, [shared];\nld.shared.b32 a, [shared];",
    "barriers between": WRITE + "bar.sync 0;\n" + OTHERS + "ld.shared.b32 b, [a];\nbar.sync 0;\n" + WRITE,
    "a copy of nothing from nowhere": (
        "mov.b64 from, 0;\ncp.async.cg.shared.global [near], [from], 16, 0;\ncp.async.commit_group;\n"
        "cp.async.wait_group 0;\nld.shared.b32 a, [near];"
    ),
    "a copy waited for by its thread": COPY + "cp.async.wait_group 0;\nld.shared.b32 a, [near];",
    "a load that its guard forbids": "setp.ne.b32 p, lane, lane;\nmov.b64 from, 0;\n@p ld.global.b32 a, [from];",
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name: str, interpreter: Interpreter) -> None:
    """What the refusals above mustn't take along."""
    execute(interpreter, ALLOWED[name])
