"""`plan`: tables and JSON for variants and checkpoints, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.engines.planner.devices import DEVICES
from qwen_aot.exporter.model.published.qwen1_5 import QWEN1_5
from qwen_aot.exporter.model.published.qwen3 import QWEN3
from qwen_aot.exporter.model.variants import GENERATIONS
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine
from qwen_aot.runtime.bundle.load import load_bundle
from tests.checkpoints import tiny_config, tiny_model
from tests.gguf_files import save_gguf
from tests.runtime.cli.conftest import Run

ROOT = Path(__file__).parents[3]


def planned(run: Run, *arguments: object) -> list[dict[str, Any]]:
    result = run("plan", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    plans: list[dict[str, Any]] = json.loads(result.stdout)["plans"]
    return plans


def test_qwen1_5_against_all_devices(run: Run) -> None:
    table = run("plan")
    assert table.exit_code == 0
    for key, device in DEVICES.items():
        assert f"{key}: {device.name}, SM " in table.stdout
    for name in QWEN1_5.models:
        assert sum(line.startswith(f"{name}  ") for line in table.stdout.splitlines()) == len(DEVICES)
    assert [(p["device"], p["model"]) for p in planned(run)] == [(d, name) for d in DEVICES for name in QWEN1_5.models]


def test_a_generation_stands_for_its_variants(run: Run) -> None:
    names = [p["model"] for p in planned(run, "qwen3-8b", "Qwen3", "qwq", "--device", "l4")]
    assert names == ["qwen3-8b", *(name for name in QWEN3.models if name != "qwen3-8b"), "qwq-32b"]
    for generation in GENERATIONS:
        assert [p["model"] for p in planned(run, generation.name, "--device", "l4")] == list(generation.models)


def test_the_help_names_every_generation(run: Run) -> None:
    text = " ".join(run("plan", "--help").stdout.split())
    assert f"A generation ({', '.join(each.name.lower() for each in GENERATIONS)}) stands for" in text


def test_a_row_says_what_its_json_says(run: Run) -> None:
    arguments = ("Qwen/Qwen1.5-7B-Chat", "--device", "RTX 4090", "--precision", "int8", "--context", 1000, "--batch", 2)
    (plan,) = planned(run, *arguments)
    assert (plan["model"], plan["device"], plan["target"]) == ("qwen1.5-7b", "rtx-4090", "tensorrt-rtx")
    assert (plan["precision"], plan["context"], plan["batch"], plan["fits"]) == ("int8", 1000, 2, True)
    parts = ("weight_bytes", "cache_bytes", "activation_bytes_estimated")
    assert plan["total_bytes"] == sum(plan[part] for part in parts)
    (row,) = (line.split() for line in run("plan", *arguments).stdout.splitlines() if line.startswith("qwen1.5-7b "))
    shown = [f"{plan[part] / 1e9:.2f}" for part in parts if plan[part] > 1e9]
    assert row[:3] == ["qwen1.5-7b", "int8", "1000"]
    assert all(number in row for number in shown) and len(shown) == 2
    assert row[-4:] == [
        "yes",
        str(plan["longest_context"]),
        str(plan["largest_batch"]),
        f"{plan['ceiling_tokens_per_second']:.0f}",
    ]


def test_filters_repeat(run: Run) -> None:
    plans = planned(
        run,
        *("qwen1.5-0.5b", "qwen1.5-4b", "qwen1.5-0.5b"),
        *("--device", "l4", "--device", "orin-nx-16gb", "--device", "L4"),
        *("--precision", "int4", "--precision", "fp16"),
    )
    assert [(p["device"], p["model"], p["precision"]) for p in plans] == [
        (device, model, precision)
        for device in ("l4", "orin-nx-16gb")
        for model in ("qwen1.5-0.5b", "qwen1.5-4b")
        for precision in ("int4", "fp16")
    ]


def test_what_does_not_fit_comes_with_advice(run: Run) -> None:
    result = run("plan", "qwen1.5-14b", "--device", "orin-nx-16gb")
    (plan,) = planned(run, "qwen1.5-14b", "--device", "orin-nx-16gb")
    assert plan["fits"] is False and plan["ceiling_tokens_per_second"] is None
    assert f"\nqwen1.5-14b fp16: lacks {plan['missing_bytes'] / 1e9:.3g} GB, int4 fits\n" in result.stdout


def test_a_precision_that_the_gpu_lacks_is_refused(run: Run) -> None:
    result = run("plan", "qwen1.5-0.5b", "--device", "agx-orin-64gb", "--precision", "fp8")
    assert result.exit_code == 0
    assert "\nrefused: fp8 needs SM 8.9 or later, and this is SM 8.7" in result.stdout
    assert "qwen1.5-0.5b " not in result.stdout


def test_bytes_are_those_of_the_built_bundle(run: Run, checkpoint: Path, bundle: Path) -> None:
    (plan,) = planned(
        run, checkpoint, *("--target", "cpu", "--precision", "fp32", "--context", 256, "--device", "orin-nx-16gb")
    )
    assert plan["model"] == "tiny-model"
    assert plan["weight_bytes"] == json.loads(run("inspect", bundle / "model.onnx", "--json").stdout)["weight_bytes"]
    with OnnxRuntimeEngine(load_bundle(bundle)) as engine:
        engine.cache.reserve(engine.manifest.max_capacity)
        assert plan["cache_bytes"] == engine.cache.nbytes


def test_the_cache_is_of_the_kernels_that_are_asked_for(run: Run) -> None:
    arguments = ("qwen1.5-7b", "--device", "orin-nx-16gb", "--target", "cpu")
    (own,), (theirs,) = planned(run, *arguments), planned(run, *arguments, "--kernels", "onnxruntime")
    assert (own["kernels"], theirs["kernels"]) == ("own", "onnxruntime")
    assert 2 * own["cache_bytes"] == theirs["cache_bytes"]
    read = own["decode_step_bytes"] - theirs["decode_step_bytes"]
    assert read == -2 * 2 * 32 * 4096 * 32768  # fp16 of 32 layers' keys and values, at the whole context
    assert own["longest_context"] > theirs["longest_context"]
    assert "target cpu by own kernels, batch 1" in " ".join(run("plan", *arguments).stdout.split())
    table = " ".join(run("plan", *arguments, "--kernels", "onnxruntime").stdout.split())
    assert "target cpu by ONNX Runtime's kernels, batch 1" in table
    (compiled,) = planned(run, "qwen1.5-7b", "--device", "orin-nx-16gb", "--kernels", "onnxruntime")
    assert compiled["target"] == "tensorrt" and compiled["kernels"] is None


def test_an_int8_cache(run: Run) -> None:
    arguments = ("qwen1.5-7b", "--device", "agx-orin-64gb", "--target", "tensorrt")
    (own,), (int8,) = planned(run, *arguments), planned(run, *arguments, "--kv-precision", "int8")
    assert (own["kv_precision"], int8["kv_precision"]) == ("auto", "int8")
    assert int8["cache_bytes"] * 256 == own["cache_bytes"] * 130  # heads of 128: a byte each, and a scale of two
    assert int8["weight_bytes"] == own["weight_bytes"]


def test_a_gguf_file(run: Run, tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", tiny_model(tiny_config()), "qwen2")
    (plan,) = planned(run, tmp_path / "tiny.gguf", "--device", "l4")
    assert (plan["model"], plan["context"]) == ("tiny.gguf", 512)


def test_variants_with_less_context_are_left_out(run: Run) -> None:
    planned_models = {p["model"] for p in planned(run, "qwen", "--device", "rtx-4090", "--context", "16384")}
    assert planned_models == {"qwen-7b", "qwen-72b"}
    result = run("plan", "qwen-14b", "--device", "rtx-4090", "--context", "16384")
    assert result.exit_code == 2 and "more than the model's 8192 tokens" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--device", "rtx-4091"), 2, "device 'rtx-4091' isn't known; accepted: orin-nano-8gb, orin-nx-16gb,"),
        (("qwen1.5-8b",), 2, "qwen1.5-8b doesn't exist and isn't a variant's name; accepted: a folder saved by"),
        (("no/such/model.gguf",), 2, "no/such/model.gguf doesn't exist and isn't a variant's name"),
        (("--context", "40000"), 2, "max_context 40000 is more than the model's 32768 tokens"),
        (("--context", "0"), 2, "max_context is 0; it must be at least 1"),
        (("--batch", "0"), 2, "max_batch is 0; it must be at least 1"),
        (("--precision", "fp7"), 2, "precision 'fp7' doesn't exist; what exists: cpu: fp32, int8, int4"),
        (("--target", "tensorrt-rtx", "--kv-precision", "int8"), 2, "kv_precision int8 needs the plugin's attention"),
        (("--kv-precision", "int2"), 2, "kv_precision 'int2' doesn't exist; accepted: auto, fp32, fp16, bf16, int8"),
        (("--target", "npu"), 2, "target 'npu' doesn't exist; what exists: cpu: fp32"),
        (("--target", "cpu", "--precision", "fp16"), 2, "target cpu with precision fp16 doesn't exist"),
    ],
)
def test_refusals(run: Run, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run("plan", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


def test_a_folder_that_is_no_checkpoint(run: Run, tmp_path: Path) -> None:
    result = run("plan", tmp_path)
    assert result.exit_code == 1
    assert "has no config.json and .safetensors files" in result.stderr


@pytest.mark.parametrize("is_variant", [True, False], ids=["variant", "checkpoint"])
def test_planning_imports_nothing_heavy(checkpoint: Path, is_variant: bool) -> None:
    model = "qwen1.5-7b" if is_variant else str(checkpoint)
    heavy = {"torch", "onnx", "onnx_ir", "onnxruntime", "tensorrt_rtx", "transformers"}
    if is_variant:  # a checkpoint's reader looks at its tokenizer too
        heavy |= {"tokenizers", "ml_dtypes", "safetensors"}
    code = (
        "import sys\n"
        "from qwen_aot.runtime.cli.main import qwen_aot\n"
        f"try:\n    qwen_aot.main(['plan', {model!r}, '--json'])\n"
        f"finally:\n    print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["[]"]
