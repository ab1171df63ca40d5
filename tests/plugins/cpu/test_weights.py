"""Weights in large pages: the same numbers as from the bundle's file, given back with the session."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIABLE = "QWEN_AOT_CPU_WEIGHTS"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Prints what a projection gives, and the bytes of memory for which large pages are wanted: before the session, with it,
# behind it. The weights lie in a file of their own, as in a bundle.
PROGRAM = """
import gc, json, re, sys
import numpy as np, onnx, onnxruntime
from onnx import helper, numpy_helper

folder, library = sys.argv[1:]
N, K, block = 2048, 1024, 64
draws = np.random.default_rng(3)
codes = draws.integers(0, 256, (N, K // block, block // 2), dtype=np.uint8)
scales = draws.random((N, K // block), dtype=np.float32)
types = {"x": onnx.TensorProto.FLOAT, "y": onnx.TensorProto.FLOAT}
graph = helper.make_graph(
    [helper.make_node("QwenLinear", ["x", "codes", "scales"], ["y"], domain="qwen_aot.cpu",
                      K=K, N=N, bits=4, block_size=block, swiglu=0)],
    "g",
    [helper.make_tensor_value_info("x", types["x"], ["M", K])],
    [helper.make_tensor_value_info("y", types["y"], ["M", N])],
    [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")])
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
x = draws.standard_normal((2, K)).astype(np.float32)
y = sessions[0].run(None, {"x": x})[0]
sizes.append(wanted())
del sessions[0]
gc.collect()
again = sessions[0].run(None, {"x": x})[0]  # the other session's weights are still there
sizes.append(wanted())
sessions.clear()
gc.collect()
sizes.append(wanted())
print(json.dumps({"y": y.tobytes().hex(), "again": again.tobytes().hex(), "sizes": sizes}))
"""


def run(folder: Path, library: Path, value: str | None) -> dict[str, object]:
    environment = {name: text for name, text in os.environ.items() if name != VARIABLE}
    environment |= {} if value is None else {VARIABLE: value}
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, library],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_copies_have_the_numbers_of_the_file_and_end_with_their_sessions(tmp_path, library):
    if not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text():
        pytest.skip("the system has no large pages")
    copied, mapped = run(tmp_path / "copied", library, None), run(tmp_path / "mapped", library, "mapped")
    assert copied["y"] == copied["again"] == mapped["y"] == mapped["again"]
    before, two, one, none = copied["sizes"]
    assert two > before and one == two  # both sessions' copies share a region, which stays for the second
    assert none == before
    assert len(set(mapped["sizes"])) == 1
