"""Quantized folders as published, built without flags: their engines are transformers' with the values of the codes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
from tests.checkpoints import reference_logits, tiny_config, tiny_model
from tests.coded_checkpoints import MOE, load
from tests.quantized_files import (
    PROJECTIONS,
    awq,
    awq_config,
    compressed_tensors,
    compressed_tensors_config,
    gptq,
    gptq_config,
    random_codes,
    save_quantized,
)

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
# Each method's folder: configuration, packer, and how it is made beyond that.
FOLDERS: dict[str, tuple[dict[str, Any], Callable[..., Any], dict[str, Any]]] = {
    "gptq-int4": (gptq_config(group_size=32), gptq, {"zero_biases": True}),
    "gptq-int8": (
        gptq_config(bits=8, group_size=32),
        gptq,
        {"make": functools.partial(random_codes, bits=8), "zero_biases": True},
    ),
    "gptq-int4, act-order": (
        gptq_config(group_size=32, desc_act=True),
        gptq,
        {"make": functools.partial(random_codes, shuffled=True)},
    ),
    "awq-int4": (
        awq_config(group_size=32),
        awq,
        {"make": functools.partial(random_codes, symmetric=False, smallest_zero=0)},
    ),
    "compressed-tensors-w4a16": (compressed_tensors_config({"group_size": 32}), compressed_tensors, {}),
    "compressed-tensors-w4a16, embedding": (
        compressed_tensors_config({"group_size": 32}),
        compressed_tensors,
        {"names": (*PROJECTIONS, "embed_tokens")},
    ),
    "compressed-tensors-w8a16, embedding that is the head, zero points": (
        compressed_tensors_config({"num_bits": 8, "symmetric": False}),
        functools.partial(compressed_tensors, symmetric=False),
        {
            "make": functools.partial(random_codes, bits=8, symmetric=False, smallest_zero=0),
            "names": (*PROJECTIONS, "embed_tokens"),
            "tied": True,
        },
    ),
    "gptq-int4, experts": (gptq_config(group_size=32), gptq, {"zero_biases": True, "moe": MOE}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_builds_without_flags(name: str, tmp_path: Path) -> None:
    quantization, pack, options = FOLDERS[name]
    of_model = options.keys() & {"moe", "tied"}
    config = {"hidden": 64, "intermediate": 96, "heads": 4} | {key: options[key] for key in of_model}
    how = {key: value for key, value in options.items() if key not in of_model}
    saved = save_quantized(tmp_path / "checkpoint", quantization, pack, **how, **config)
    model: Any = tiny_model(tiny_config(layers=1, kv_heads=2, **config))
    values = {key: array.astype(np.float32) for key, array in saved.plain.items() if not _is_placeholder(key)}
    load(model, values | {key: codes.values for key, codes in saved.weights.items()})
    want = reference_logits(model, [IDS])[0, -1].numpy()

    def logits(spec: BuildSpec, bundle: Path) -> np.ndarray[Any, Any]:
        build_bundle(saved.folder, spec, bundle)
        text = load_bundle(bundle).manifest.engines.text
        counts = text.weight_encodings
        found = counts.requantized if spec.precision is Precision.FP32 else counts.kept
        assert (sum(found.values()), len(counts.kept) + len(counts.requantized)) == (len(saved.weights), 1)
        assert set(found) == {name.partition(",")[0]}
        with OnnxRuntimeEngine(load_bundle(bundle), OrtOptions(threads=1)) as engine:
            return engine.prefill(0, np.array(IDS))

    floats = logits(BuildSpec(precision=Precision.FP32, max_context=64), tmp_path / "floats")
    assert np.abs(floats - want).max() / want.std() < 1e-3  # sums in another order
    codes = logits(BuildSpec(max_context=64), tmp_path / "codes")
    assert np.abs(codes - want).max() / want.std() < 0.1  # activations are rounded to 8 bits
    # Negative control: zeros that are one too high are far outside of the first bound.
    high = {key: codes.values - codes.scales[:, codes.groups] for key, codes in saved.weights.items()}
    load(model, values | {key: array.astype(np.float32) for key, array in high.items()})
    assert np.abs(floats - reference_logits(model, [IDS])[0, -1].numpy()).max() / want.std() > 1e-2


def _is_placeholder(name: str) -> bool:
    """A bias of a module that has none, which GPTQ's packers write."""
    module, _, last = name.rpartition(".")
    return last == "bias" and module.rpartition(".")[2] in set(PROJECTIONS) - {"q_proj", "k_proj", "v_proj"}
