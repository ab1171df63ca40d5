"""Weights in large pages: the same numbers as from the bundle's file, given back with the session."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_aot.plugins.cpu.build import SOURCES, find_compiler
from tests.shared import once

VARIABLE = "QWEN_AOT_CPU_WEIGHTS"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Prints what a projection or experts give, and the bytes of memory for which large pages are wanted: before the
# session, with it, behind it. The weights lie in a file of their own, as in a bundle.
PROGRAM = """
import gc, json, re, sys
import numpy as np, onnx, onnxruntime
from onnx import helper, numpy_helper

op, folder, library = sys.argv[1:]
K, block = 1024, 64
draws = np.random.default_rng(3)

def matrices(name, *rows, width=K):
    codes = draws.integers(0, 256, (*rows, width // 2), dtype=np.uint8)
    scales = draws.random((*rows, width // block), dtype=np.float32)
    return [numpy_helper.from_array(codes, f"{name}_codes"), numpy_helper.from_array(scales, f"{name}_scales")]

if op == "QwenLinear":
    feeds, N, stored = {"x": K}, 2048, matrices("weight", 2048)
    names, attributes = ["x", *(tensor.name for tensor in stored)], {"K": K, "N": N, "swiglu": 0}
else:
    feeds, N = {"x": K, "logits": 4, "weights": 4}, K
    stored = matrices("gate_up", 4, 1024) + matrices("down", 4, K, width=512)
    names = [*feeds, *(tensor.name for tensor in stored)]
    names.insert(5, "")
    attributes = {"num_experts_per_tok": 2, "norm_topk_prob": 0}
float_of = lambda name, width: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["M", width])
graph = helper.make_graph(
    [helper.make_node(op, names, ["y"], domain="qwen_aot.cpu", bits=4, block_size=block, **attributes)],
    "g", [float_of(*feed) for feed in feeds.items()], [float_of("y", N)], stored)
opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qwen_aot.cpu", 1)]
onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), f"{folder}/model.onnx",
          save_as_external_data=True, location="data", size_threshold=0)

def wanted():
    found, size = 0, 0
    for line in open("/proc/self/smaps"):
        if line.startswith("Size:"):
            size = int(line.split()[1]) * 1024
        if line.startswith("VmFlags:") and "hg" in line.split():
            found += size
    return found

options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
sizes = [wanted()]
sessions = [onnxruntime.InferenceSession(f"{folder}/model.onnx", options) for _ in range(2)]
# Of more rows than 4, packed weights add up in the order of those that aren't.
fed = {name: draws.random((5, width), dtype=np.float32) for name, width in feeds.items()}
y = sessions[0].run(None, fed)[0]
sizes.append(wanted())
del sessions[0]
gc.collect()
again = sessions[0].run(None, fed)[0]  # the other session's weights are still there
sizes.append(wanted())
sessions.clear()
gc.collect()
sizes.append(wanted())
print(json.dumps({"y": y.tobytes().hex(), "again": again.tobytes().hex(), "sizes": sizes}))
"""


def run(folder: Path, library: Path, value: str | None, op: str = "QwenLinear") -> dict[str, object]:
    environment = {name: text for name, text in os.environ.items() if name != VARIABLE}
    environment |= {} if value is None else {VARIABLE: value}
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, op, folder, library],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("op", ["QwenLinear", "QwenMoE"])
def test_copies_have_the_numbers_of_the_file_and_end_with_their_sessions(op, tmp_path, library):
    if not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text():
        pytest.skip("the system has no large pages")
    copied, mapped = run(tmp_path / "copied", library, None, op), run(tmp_path / "mapped", library, "mapped", op)
    assert copied["y"] == copied["again"] == mapped["y"] == mapped["again"]
    before, two, one, none = copied["sizes"]
    assert two > before and one == two  # both sessions' copies share a region, which stays for the second
    assert none == before
    assert len(set(mapped["sizes"])) == 1


MIB = 1 << 20


@pytest.fixture(scope="session")
def program(shared_folder):
    """Makes a program of tests/plugins/cpu/src and one source of the library."""

    def make(cases: str, source: str) -> Path:
        def compile_it(folder: Path) -> Path:
            path = folder / cases
            files = [Path(__file__).parent / "src" / f"{cases}.cpp", SOURCES / f"{source}.cpp"]
            subprocess.run([*find_compiler(), "-std=c++17", "-O1", "-I", SOURCES, *files, "-o", path], check=True)
            return path

        return once(shared_folder / f"cpu_{cases}", compile_it)

    return make


def copies(program: Path, free: int) -> list[int]:
    environment = {name: text for name, text in os.environ.items() if name != VARIABLE}
    done = subprocess.run([program, str(free)], env=environment, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_copies_take_half_of_what_is_free(program):
    if not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text():
        pytest.skip("the system has no large pages")
    made = program("weights_cases", "weights")
    assert copies(made, 2 * 10 * MIB) == [
        10,
        10,
        20,
    ]  # what is given back is taken again; of twice as much, twice as many
    assert copies(made, 1000 * MIB) == [64, 64, 64]
    assert copies(made, 0) == [0, 0, 0]


def free_memory(program: Path, root: Path, files: dict[str, str]) -> int:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = subprocess.run([program, root], capture_output=True, text=True, check=True)
    return int(done.stdout)


MEMINFO = {"proc/meminfo": "MemTotal:       8000 kB\nMemAvailable:    4000 kB\n"}
V1, V2 = "sys/fs/cgroup/memory/", "sys/fs/cgroup/"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 0),
        (MEMINFO, 4000 * 1024),
        (
            MEMINFO
            | {"proc/self/cgroup": "0::/box/inner\n"}
            | {f"{V2}box/memory.max": "3000000\n", f"{V2}box/memory.current": "2000000\n"}
            | {f"{V2}box/memory.stat": "anon 5\ninactive_file 500000\n", f"{V2}box/inner/memory.max": "max\n"},
            1_500_000,  # of the group above, whose cached files can be dropped
        ),
        (
            MEMINFO
            | {"proc/self/cgroup": "0::/as/the/host/has/it\n"}
            | {f"{V2}memory.max": "100\n", f"{V2}memory.current": "400\n"},
            0,  # over its limit; the container's group is the mount's root
        ),
        (
            MEMINFO
            | {"proc/self/cgroup": "3:cpu,cpuacct:/a\n2:memory:/a\n"}
            | {f"{V1}a/memory.limit_in_bytes": "1000000\n", f"{V1}a/memory.usage_in_bytes": "250000\n"}
            | {f"{V1}a/memory.stat": "total_inactive_file 50000\n"},
            800_000,
        ),
    ],
    ids=["unknown", "machine", "version 2", "over its limit", "version 1"],
)
def test_free_memory_is_the_machines_or_what_a_group_leaves(tmp_path, program, files, expected):
    assert free_memory(program("free_memory_cases", "free_memory"), tmp_path, files) == expected


def test_a_value_that_is_no_form_of_weights_is_refused(tmp_path, library):
    with pytest.raises(AssertionError, match="QWEN_AOT_CPU_WEIGHTS is 'maped'; accepted: mapped, copied"):
        run(tmp_path / "wrong", library, "maped")
