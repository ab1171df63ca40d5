"""An int8 cache on the CPU equals transformers with keys and values rounded by the same formula, by either kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import DynamicCache

from qwen_aot.errors import ExportError
from qwen_aot.exporter.calibration.cache_scales import CacheScales
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.graph.save import DATA_FILE, KERNELS_MODEL_FILE, save_beside, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.ort.contrib import OrtOptions
from qwen_aot.exporter.lowering.ort.int8_cache import scale_names, set_scales
from qwen_aot.exporter.lowering.ort.kernels import use_kernels
from qwen_aot.exporter.lowering.ort.prefill import FROM_TOKENS
from qwen_aot.exporter.lowering.ort.provider import Provider
from qwen_aot.exporter.quantize.blockwise import BlockFormat
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch
from tests.checkpoints import save_tiny
from tests.exporter.graph.test_trace import DENSE
from tests.exporter.stepper import Stepper

# Logits have std 1. Float32 sums in another order differ by 2e-5, and a number halfway between two codes falls to the
# other side for it: one code of one key moves logits by a thousandth of its row's part. Seen: 2e-6.
BOUND = 1e-3
# What swapped or doubled scales differ by at least; seen: 0.3.
CLEARLY_WRONG = 0.05

CASES: dict[str, dict[str, Any]] = {
    "mha": {"layers": 3},
    "gqa": {"heads": 6, "kv_heads": 2, "hidden": 96},
    "mqa": {"heads": 4, "kv_heads": 1},
    "experts": {"moe": {}},
    "norms of heads": {"generation": "qwen3", "kv_heads": 2, "head_dim": 32},
}


class RoundedCache(DynamicCache):
    """Holds what an int8 cache would: code times scale, codes -128 to 127, halves to the even one."""

    def __init__(self, scales: CacheScales) -> None:
        super().__init__()
        self._scales = scales

    def update(self, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        """Rounds what is new [B, Hkv, T, D]."""
        rounded = []
        for new, scales in ((keys, self._scales.keys[layer]), (values, self._scales.values[layer])):
            scale = torch.from_numpy(scales).view(new.shape[1], 1, new.shape[3])
            rounded.append(torch.clamp(torch.round(new / scale), -128, 127) * scale)
        return super().update(*rounded, layer, *args, **kwargs)


def random_scales(config: Any, factor: float = 1.0) -> CacheScales:
    """One for each channel; keys and values of these models are about 1, so that by some the largest are saturated."""
    rng = np.random.default_rng(5)
    shape = config.num_hidden_layers, config.num_key_value_heads * config.head_dim
    keys, values = (rng.uniform(low, 3 * low, shape) * factor for low in (0.012, 0.006))
    return CacheScales(keys.astype(np.float32), values.astype(np.float32))


def save(
    path: Path, folder: Path, scales: Any = random_scales, *, has_kernels: bool = False, **options: Any
) -> tuple[Path, CacheScales]:
    """The checkpoint's graph with an int8 cache, by own kernels or ONNX Runtime's, and its scales."""
    folder.mkdir()
    with open_checkpoint(path) as checkpoint:
        lowered = ort.lower(trace(checkpoint.config), OrtOptions(int8_cache=True, **options))
        found = scales(checkpoint.config)
        set_scales(lowered, found)
        stitch(lowered, checkpoint, folder / DATA_FILE)
    graph = save_graph(lowered, folder)
    if has_kernels:
        model = ir.load(graph)
        assert use_kernels(model, ir.DataType.INT8).attentions == checkpoint.config.num_hidden_layers
        graph = save_beside(model, folder, KERNELS_MODEL_FILE)
    return graph, found


def expected(model: Any, scales: CacheScales, tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of transformers with the rounded cache."""
    with torch.no_grad():
        logits = model(torch.tensor([list(tokens)]), cache=RoundedCache(scales), use_cache=True).logits
    return np.asarray(logits[0].float())


def worst(stepper: Stepper, model: Any, scales: CacheScales) -> float:
    """The largest difference of two rows' logits: prompts in chunks, tokens alone, one row idle, padding."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 131, 40).tolist() for _ in range(2)]
    wanted = [expected(model, scales, row) for row in rows]
    done, found = [0, 0], []
    for counts, pad in (((9, 4), 0), ((1, 1), 0), ((0, 1), 0), ((1, 0), 0), ((3, 20), 2), ((1, 1), 0), ((1, 1), 0)):
        logits = stepper.step(
            [row[start : start + count] for row, start, count in zip(rows, done, counts, strict=True)], pad
        )
        for index, count in enumerate(counts):
            done[index] += count
            if count:
                found.append(np.abs(logits[index] - wanted[index][done[index] - 1]).max())
    return float(max(found))


KERNELS = pytest.mark.parametrize("has_kernels", [False, True], ids=["onnxruntime", "own"])


@KERNELS
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_model_with_rounded_keys_and_values(case: str, has_kernels: bool, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny", **CASES[case])
    graph, scales = save(tmp_path / "tiny", tmp_path / "graph", has_kernels=has_kernels)
    stepper = Stepper(graph, 2, 64, fill=np.nan)  # unused slots hold 127
    assert {array.dtype for array in stepper.cache.values()} == {np.dtype(np.int8)}
    assert not any(name.endswith("_scale") for name in stepper.names)
    assert worst(stepper, model, scales) < BOUND


@KERNELS
def test_what_lies_beyond_the_codes_is_saturated(has_kernels: bool, tmp_path: Path) -> None:
    """By scales a quarter as large most numbers are beyond; wrapped round, they would have the other sign."""
    model = save_tiny(tmp_path / "tiny")
    few = functools.partial(random_scales, factor=0.25)
    graph, scales = save(tmp_path / "tiny", tmp_path / "graph", few, has_kernels=has_kernels)
    stepper = Stepper(graph, 2, 64)
    assert worst(stepper, model, scales) < BOUND
    codes = np.concatenate([array[:, :, :20].reshape(-1) for array in stepper.cache.values()])
    assert {codes.min(), codes.max()} == {-128, 127} and np.isin(codes, (-128, 127)).mean() > 0.2


@KERNELS
def test_swapped_doubled_and_shifted_scales_are_noticed(has_kernels: bool, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny", layers=1)
    wrong = {
        "swapped": lambda right: CacheScales(right.values, right.keys),
        "doubled": lambda right: CacheScales(2 * right.keys, right.values),
        "another channel's": lambda right: CacheScales(right.keys, np.roll(right.values, 1, axis=1)),
    }
    with open_checkpoint(tmp_path / "tiny") as checkpoint:
        right = random_scales(checkpoint.config)
    for name, change in wrong.items():
        scales = lambda config, c=change: c(random_scales(config))  # noqa: E731
        graph, other = save(tmp_path / "tiny", tmp_path / name, scales, has_kernels=has_kernels)
        assert worst(Stepper(graph, 2, 64), model, other) < BOUND
        assert worst(Stepper(graph, 2, 64), model, right) > CLEARLY_WRONG, name


def test_both_branches_of_a_fast_prefill_read_one_cache(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny")
    graph, _ = save(tmp_path / "tiny", tmp_path / "graph", weights=BlockFormat(8, 32), fast_prefill=True)
    tokens = np.random.default_rng(2).integers(0, 131, FROM_TOKENS + 8).tolist()
    whole, pieces = Stepper(graph, 1, 64), Stepper(graph, 1, 64)
    whole.step([tokens])
    for start in range(0, len(tokens), 8):
        pieces.step([tokens[start : start + 8]])
    for name, array in whole.cache.items():
        both = [codes[:, :, : len(tokens)].reshape(-1).astype(float) for codes in (array, pieces.cache[name])]
        # Activations are rounded in two ways, which moves codes by some; those of another scale or row don't agree.
        assert np.corrcoef(*both)[0, 1] > 0.95


def attentions(traced: Traced) -> list[ir.Node]:
    return [node for node in traced.model.graph.all_nodes() if node.op_type == "GroupQueryAttention"]


def test_each_layer_has_scales_of_its_own(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny", layers=3)
    with open_checkpoint(tmp_path / "tiny") as checkpoint:
        lowered = ort.lower(trace(checkpoint.config), OrtOptions(int8_cache=True))
    found = [tuple(value.name for value in node.inputs[12:14] if value is not None) for node in attentions(lowered)]
    assert found == [scale_names(layer) for layer in range(3)]
    assert all(node.attributes["kv_cache_bit_width"].as_int() == 8 for node in attentions(lowered))


def test_without_its_scales_no_weight_is_made(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny")
    with open_checkpoint(tmp_path / "tiny") as checkpoint:
        lowered = ort.lower(trace(checkpoint.config), OrtOptions(int8_cache=True))
        with pytest.raises(ExportError, match="scales of the int8 cache must be found before"):
            stitch(lowered, checkpoint, tmp_path / "data")


def test_a_head_size_without_a_kernel_is_refused() -> None:
    with pytest.raises(ExportError, match=r"a head size that 16 divides, .* this model's is 8; accepted: .* auto"):
        ort.lower(trace(DENSE), OrtOptions(int8_cache=True))


def test_cudas_kernel_is_refused() -> None:
    with pytest.raises(ExportError, match="int8_cache exists for the CPU's kernels, not for those of cuda"):
        OrtOptions(int8_cache=True, provider=Provider.CUDA)
