"""GPTQ folders, against codes packed word by word (`tests.quantized_files`)."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, Encoding
from qwen_aot.exporter.checkpoint.hf.quantized import gptq as reader
from qwen_aot.exporter.checkpoint.hf.quantized import linear, words
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.tensors import tensor_shapes
from tests.quantized_files import (
    Codes,
    Parts,
    Saved,
    borrowed,
    gptq,
    gptq_config,
    random_codes,
    save_quantized,
    spoiled,
    word,
    wrapped,
)

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"


def save(folder: Path, make: Any = random_codes, pack: Callable[[Codes], Parts] = gptq, **config: Any) -> Saved:
    return save_quantized(folder, gptq_config(**config), pack, make=make)


def check(saved: Saved) -> None:
    """Every tensor of the model and no other; values, codes, zeros, scales and order of every quantized one."""
    with open_checkpoint(saved.folder) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == tensor_shapes(checkpoint.config)
        for name, weight in saved.weights.items():
            encoding = checkpoint.tensors[name].encoding
            assert encoding is not None
            assert encoding.form is not None
            np.testing.assert_array_equal(checkpoint.read(name), weight.values, err_msg=name)
            encoded = checkpoint.read_encoded(name)
            assert encoded.form == encoding.form
            order = np.arange(weight.codes.shape[1]) if encoded.permutation is None else encoded.permutation
            np.testing.assert_array_equal(encoded.codes, weight.codes[:, order], err_msg=name)
            np.testing.assert_array_equal(encoded.scales, weight.scales, err_msg=name)
            if encoded.zero_points is not None:
                np.testing.assert_array_equal(encoded.zero_points, weight.zeros, err_msg=name)
        for name, array in saved.plain.items():
            if name in checkpoint.tensors:
                assert checkpoint.read(name).tobytes() == array.tobytes(), name
                assert checkpoint.tensors[name].encoding is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "act-order"])
def test_effective_weights_are_exact(bits: int, group_size: int, kind: str, tmp_path: Path) -> None:
    asymmetric, shuffled = kind == "asymmetric", kind == "act-order"
    make = functools.partial(
        random_codes, bits=bits, group_size=group_size, symmetric=not asymmetric, shuffled=shuffled
    )
    saved = save(tmp_path, make, bits=bits, group_size=group_size, sym=not asymmetric, desc_act=shuffled)
    check(saved)
    with open_checkpoint(tmp_path) as checkpoint:
        k = 64 if group_size == -1 else group_size
        has_permutation = shuffled and group_size != -1
        form = CodeForm(bits, k, np.dtype(np.float16), asymmetric, has_permutation)
        assert checkpoint.tensors[f"{Q}.weight"].encoding == Encoding(f"gptq-int{bits}", form, fixes_precision=True)


def test_groups_as_published(tmp_path: Path) -> None:
    """128, and 64: whole numbers of groups, and one."""
    for group_size, intermediate in ((128, 256), (64, 64)):
        make = functools.partial(random_codes, group_size=group_size)
        config = gptq_config(group_size=group_size)
        check(
            save_quantized(tmp_path / str(group_size), config, gptq, make=make, hidden=128, intermediate=intermediate)
        )


@pytest.mark.parametrize("rows", [slice(0, 1), slice(5, 18), slice(7, 8), slice(40, 99), slice(3, 3), slice(20, 2, -3)])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_rows(rows: slice, kind: str, tmp_path: Path) -> None:
    make = functools.partial(random_codes, symmetric=kind == "symmetric", shuffled=True)
    saved = save(tmp_path, make, sym=kind == "symmetric", desc_act=True)
    weight = saved.weights[f"{Q}.weight"]
    with open_checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(f"{Q}.weight", rows), weight.values[rows])
        encoded = checkpoint.read_encoded(f"{Q}.weight", rows)
        assert encoded.permutation is not None
        np.testing.assert_array_equal(encoded.codes, weight.codes[rows][:, encoded.permutation])
        np.testing.assert_array_equal(encoded.scales, weight.scales[rows])


@pytest.mark.parametrize("rows", [None, slice(2, 60), slice(20, None, -3), slice(0, 0)])
def test_large_weights_are_made_a_chunk_at_a_time(
    rows: slice | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = save(tmp_path).weights[f"{Q}.weight"]
    monkeypatch.setattr(linear, "_CHUNK_ELEMENTS", 200)  # three rows
    counts: list[int] = []
    read_codes = linear.read_codes

    def noted(quantized: Any, part: slice | None) -> Any:
        found = read_codes(quantized, part)
        counts.append(len(found.codes))
        return found

    monkeypatch.setattr(linear, "read_codes", noted)
    with open_checkpoint(tmp_path) as checkpoint:
        expected = weight.values if rows is None else weight.values[rows]
        np.testing.assert_array_equal(checkpoint.read(f"{Q}.weight", rows), expected)
    assert sum(counts) == len(expected)
    assert all(count <= 3 for count in counts)


def test_rows_are_read_without_unpacking_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    unpacked = []

    def noted(packed: np.ndarray, bits: int) -> np.ndarray:
        unpacked.append(packed.shape)
        return words.unpack(packed, bits)

    monkeypatch.setattr(reader, "unpack", noted)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.read_encoded(f"{UP}.weight", slice(10, 13))
    assert unpacked == [(3, 8)]


def test_permutation_is_stable_and_groups_are_whole(tmp_path: Path) -> None:
    make = functools.partial(random_codes, shuffled=True)
    saved = save(tmp_path, make, desc_act=True)
    orders = {}
    with open_checkpoint(tmp_path) as checkpoint:
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = f"model.layers.0.self_attn.{name}.weight"
            order = checkpoint.read_encoded(weight, slice(0, 1)).permutation
            assert order is not None
            groups = saved.weights[weight].groups
            expected = sorted(range(64), key=lambda column: (groups[column], column))
            assert order.dtype == np.int64
            assert order.tolist() == expected
            orders[name] = order.tolist()
    assert orders["q_proj"] != orders["k_proj"]


def test_act_order_that_changed_nothing_is_no_permutation(tmp_path: Path) -> None:
    save(tmp_path, desc_act=True)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read_encoded(f"{Q}.weight").permutation is None


def test_old_files_lack_g_idx(tmp_path: Path) -> None:
    def pack(weight: Codes) -> Parts:
        return {name: array for name, array in gptq(weight).items() if name != "g_idx"}

    check(save(tmp_path, pack=pack))
    saved = save(tmp_path / "order", pack=pack, desc_act=True)
    with pytest.raises(CheckpointError, match=r"down_proj\.g_idx is missing; the module has qweight, qzeros, scales"):
        open_checkpoint(saved.folder)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_scales_keep_their_type(dtype: type, tmp_path: Path) -> None:
    saved = save(tmp_path, functools.partial(random_codes, scale_dtype=dtype))
    if dtype != np.float32:  # whose products are rounded once more
        check(saved)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read_encoded(f"{Q}.weight").scales.dtype == dtype


def test_experts(tmp_path: Path) -> None:
    """Every expert and the shared one are quantized, router and gate aren't; all quantized linears have a bias."""
    moe = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 8}
    saved = save_quantized(tmp_path, gptq_config(), gptq, zero_biases=True, moe=moe, layers=2)
    assert f"{EXPERT.format(7)}.up_proj.weight" in saved.weights
    check(saved)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["model.layers.1.mlp.gate.weight"].encoding is None
        assert checkpoint.tensors["model.layers.1.mlp.shared_expert_gate.weight"].dtype == np.float16


EXPERT = "model.layers.1.mlp.experts.{}"


def test_one_expert(tmp_path: Path) -> None:
    moe = {
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    check(save_quantized(tmp_path, gptq_config(), gptq, zero_biases=True, moe=moe))


def test_placeholder_biases(tmp_path: Path) -> None:
    saved = save_quantized(tmp_path, gptq_config(), gptq, zero_biases=True)
    assert f"{UP}.bias" in saved.plain
    check(saved)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read(f"{Q}.bias").tobytes() == saved.plain[f"{Q}.bias"].tobytes()
        assert f"{UP}.bias" not in checkpoint.tensors


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (np.array([0.0] * 95 + [6e-8], np.float16), rf"{UP}\.bias isn't zero, and the model has no bias there"),
        (np.array([0.0] * 95 + [np.nan], np.float16), rf"{UP}\.bias isn't zero"),
        (np.zeros(95, np.float16), rf"{UP}\.bias has shape \[95\]; accepted: \[96\]"),
    ],
)
def test_other_biases_there_are_refused(bias: np.ndarray, message: str, tmp_path: Path) -> None:
    saved = save_quantized(tmp_path, gptq_config(), gptq, zero_biases=True)
    saved.change(**{f"{UP}.bias": bias})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_denied_biases_of_experts_models_may_have_placeholders(tmp_path: Path) -> None:
    moe = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "qkv_bias": False}
    saved = save_quantized(tmp_path, gptq_config(), gptq, zero_biases=True, moe=moe)
    assert not saved.plain[f"{Q}.bias"].any()
    check(saved)


def test_a_quantized_head(tmp_path: Path) -> None:
    names = ("lm_head", "up_proj")
    saved = save_quantized(tmp_path, gptq_config(lm_head=True), gptq, names=names, vocab=136)
    assert set(saved.weights) == {"lm_head.weight", f"{UP}.weight"}
    check(saved)


def test_an_embedding_is_no_linear(tmp_path: Path) -> None:
    save_quantized(tmp_path, gptq_config(), gptq, names=("embed_tokens",), vocab=136)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens is quantized \(.*\), and no linear of this model"):
        open_checkpoint(tmp_path)


# Zero points

V2 = functools.partial(gptq, pack_zeros=word)
ASYMMETRIC = functools.partial(random_codes, symmetric=False)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("declared", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("stored", ["v1", "v2"])
def test_symmetric_zeros_are_the_middle_whatever_the_format_says(
    stored: str, declared: str | None, bits: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = functools.partial(random_codes, bits=bits)
    with caplog.at_level(logging.INFO, "qwen_aot"):
        check(save(tmp_path, make, gptq if stored == "v1" else V2, bits=bits, checkpoint_format=declared))
    is_wrong = (declared == "gptq_v2") != (stored == "v2")
    assert (f"zeros are stored as GPTQ format {stored}" in caplog.text) == is_wrong


def test_symmetric_zeros_of_two_formats_are_refused(tmp_path: Path) -> None:
    saved = save(tmp_path)
    saved.change(**{f"{UP}.qzeros": V2(saved.weights[f"{UP}.weight"])["qzeros"]})
    with pytest.raises(CheckpointError, match=rf"{UP}\.qzeros stores zeros as gptq_v2, and .*\.qzeros as gptq \(v1\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("pack", [gptq, V2])
@pytest.mark.parametrize("sym", [True, None])
def test_zeros_outside_the_symmetric_range_are_refused(pack: Any, sym: bool | None, tmp_path: Path) -> None:
    saved = save(tmp_path, sym=sym)
    weight = saved.weights[f"{UP}.weight"]
    weight.zeros[40, 1] = 10
    saved.change(**{f"{UP}.qzeros": pack(weight)["qzeros"]})
    with pytest.raises(
        CheckpointError, match=rf"{UP}\.qzeros has zeros other than 8, .*accepted: 8 throughout, or sym"
    ):
        open_checkpoint(tmp_path)
    saved = save(tmp_path / "said", sym=False, checkpoint_format="gptq_v2" if pack is V2 else None, pack=pack)
    saved.change(**{f"{UP}.qzeros": pack(weight)["qzeros"]})
    saved.weights[f"{UP}.weight"].zeros[40, 1] = 10
    check(saved)


@pytest.mark.parametrize("bits", [4, 8])
def test_v2_stores_zeros_as_they_are(bits: int, tmp_path: Path) -> None:
    make = functools.partial(ASYMMETRIC, bits=bits, smallest_zero=0)
    saved = save(tmp_path, make, V2, bits=bits, sym=False, checkpoint_format="gptq_v2")
    zeros = np.concatenate([weight.zeros.ravel() for weight in saved.weights.values()])
    assert (zeros == 0).any()
    assert (zeros == 2**bits - 1).sum() or bits == 8
    check(saved)


@pytest.mark.parametrize("quantizer", ["gptqmodel:7.7.0", ["optimum:1.24.0", "gptqmodel:2.0.0"]])
@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_that_gptqmodel_borrowed(quantizer: Any, bits: int, tmp_path: Path) -> None:
    make = functools.partial(ASYMMETRIC, bits=bits, smallest_zero=0)
    pack = functools.partial(gptq, pack_zeros=borrowed)
    check(save(tmp_path, make, pack, bits=bits, sym=False, checkpoint_format="gptq", meta={"quantizer": quantizer}))


@pytest.mark.parametrize("pack_zeros", [wrapped, borrowed, spoiled])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_v1_zero_of_0_is_refused_where_its_way_is_unknown(pack_zeros: Any, bits: int, tmp_path: Path) -> None:
    """It is read in a word's highest field, where all ways are one."""
    pack = functools.partial(gptq, pack_zeros=pack_zeros)
    fields = 32 // bits

    def make(n: int, k: int, *, seed: int) -> Codes:
        weight = ASYMMETRIC(n, k, bits=bits, seed=seed)
        weight.zeros[2 * fields - 1, 1] = 0
        return weight

    saved = save(tmp_path, make, pack, bits=bits, sym=False)
    check(saved)
    weight = saved.weights[f"{UP}.weight"]
    weight.zeros[fields + 1, 1] = 0
    saved.change(**{f"{UP}.qzeros": pack(weight)["qzeros"]})
    with pytest.raises(
        CheckpointError, match=rf"{UP}\.qzeros has a zero point of 0 as gptq \(v1\) at group 1, column {fields + 1}: "
    ):
        open_checkpoint(tmp_path)


# Which modules, at how many bits


def mixed(n: int, k: int, *, seed: int) -> Codes:
    """8 bits for matrices of 96 rows (gate and up), 4 for the others."""
    return random_codes(n, k, bits=8 if n == 96 else 4, group_size=16 if n == 96 else 32, seed=seed)


def test_bits_that_differ_by_module(tmp_path: Path) -> None:
    dynamic = {"+:.*(up|gate)_proj": {"bits": 8, "group_size": 16}, "-:.*router.*": {}}
    check(save(tmp_path, mixed, dynamic=dynamic))


def test_bits_that_the_configuration_lacks(tmp_path: Path) -> None:
    save(tmp_path, mixed)
    with pytest.raises(
        CheckpointError,
        match=r"gate_proj\.qweight of a weight \[N, K\] = \[96, 64\] has 16 words of codes along K, and its scales 4 "
        r"groups; accepted by the configuration: 4 bits in groups of 32, symmetric, where groups divide K",
    ):
        open_checkpoint(tmp_path)


def test_patterns_are_never_run(tmp_path: Path) -> None:
    """One of these takes a regular expression engine longer than the universe has."""
    check(save(tmp_path, dynamic={"(a*)*(.*.*)*.*$x": {"bits": 8}, "-:[": {}}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]},
            "modules_in_block_to_quantize lacks",
        ),
        ({"modules_to_not_convert": ["mlp.down_proj"]}, "modules_to_not_convert has 'mlp.down_proj'"),
    ],
)
def test_a_module_that_is_said_to_be_plain(config: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path, **config)
    with pytest.raises(CheckpointError, match=rf"has g_idx, qweight, qzeros, scales, although {message}"):
        open_checkpoint(tmp_path)


def test_modules_that_are_said_to_be_plain_and_are(tmp_path: Path) -> None:
    names = ("q_proj", "up_proj")
    for number, config in enumerate(
        (
            {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]},
            {"modules_to_not_convert": ["lm_head", "gate", "down_proj"]},
        )
    ):
        check(save_quantized(tmp_path / str(number), gptq_config(**config), gptq, names=names))


# Damage


def g_idx(*values: int) -> np.ndarray:
    index = np.arange(64, dtype=np.int32) // 32
    index[-len(values) :] = values
    return index


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "qweight int64": (
        "qweight",
        np.zeros((8, 96), np.int64),
        r"qweight has .* dtype int64; accepted .*: \[8, 96\], int32",
    ),
    "qweight cut": ("qweight", np.zeros((7, 96), np.int32), r"qweight of a weight .* has 7 words of codes along K"),
    "qweight narrow": ("qweight", np.zeros((8, 88), np.int32), r"qweight has shape \[8, 88\] .*accepted .*\[8, 96\]"),
    "qweight flat": ("qweight", np.zeros(8 * 96, np.int32), r"qweight of a weight .* has 768 words"),
    "qweight missing": ("qweight", None, "qweight is missing; the module has g_idx, qzeros, scales; save it again"),
    "qzeros missing": ("qzeros", None, "qzeros is missing; the module has g_idx, qweight, scales"),
    "qzeros wide": (
        "qzeros",
        np.zeros((2, 96), np.int32),
        r"qzeros has shape \[2, 96\] .*accepted .*: \[2, 12\], int32",
    ),
    "qzeros float": ("qzeros", np.zeros((2, 12), np.float32), "qzeros has shape .* and dtype float32"),
    "scales missing": ("scales", None, "scales is missing"),
    "scales of other groups": ("scales", np.ones((3, 96), np.float16), "its scales 3 groups; accepted by the conf"),
    "scales int32": ("scales", np.ones((2, 96), np.int32), "scales has .* accepted .*float16 or bfloat16 or float32"),
    "scales double": ("scales", np.ones((2, 96)), "scales has shape .* and dtype float64"),
    "g_idx short": ("g_idx", np.zeros(63, np.int32), r"g_idx has shape \[63\] .*accepted .*: \[64\], int32 or int64"),
    "g_idx negative": ("g_idx", g_idx(-1), r"g_idx puts column 63 in group -1; accepted: 0 to 1"),
    "g_idx large": ("g_idx", g_idx(2**31 - 1), r"puts column 63 in group 2147483647; accepted: 0 to 1"),
    "g_idx uneven": ("g_idx", g_idx(0), "puts 33 columns in group 0; accepted: 32 in each"),
    "g_idx all 0": ("g_idx", np.zeros(64, np.int32), "puts 64 columns in group 0; accepted: 32 in each"),
    "g_idx float": ("g_idx", np.zeros(64, np.float32), "g_idx has shape .* and dtype float32"),
    "weight as well": (
        "weight",
        np.zeros((96, 64), np.float16),
        "up_proj has a plain weight and g_idx, qweight, qzeros",
    ),
}


@pytest.mark.parametrize(("suffix", "array", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage(suffix: str, array: Any, message: str, tmp_path: Path) -> None:
    saved = save(tmp_path, desc_act=True)
    saved.change(**{f"{UP}.{suffix}": array})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("group_size", [48, 65, 128, 10**30])
def test_groups_that_do_not_divide(group_size: int, tmp_path: Path) -> None:
    save(tmp_path, group_size=group_size)
    with pytest.raises(CheckpointError, match=rf"accepted by the configuration: 4 bits in groups of {group_size}, "):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("sizes", [{"intermediate_size": 2**20}, {"num_hidden_layers": 1000}, {"vocab_size": 2**24}])
def test_a_configuration_of_a_huge_model_costs_nothing(sizes: dict[str, int], tmp_path: Path) -> None:
    """Tensors are compared by their headers before anything of the model's size is made."""
    saved = save(tmp_path)
    saved.configure(gptq_config(), **sizes)
    started = time.process_time()
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointError), open_checkpoint(tmp_path) as checkpoint:
            assert "intermediate_size" not in sizes
            assert len(checkpoint.tensors) == 15
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    saved = save(tmp_path)
    scales = np.ascontiguousarray(saved.weights[f"{UP}.weight"].scales.T)
    scales[1, 70] = value
    saved.change(**{f"{UP}.scales": scales})
    with open_checkpoint(tmp_path) as checkpoint:
        for read in (checkpoint.read, checkpoint.read_encoded):
            read(f"{UP}.weight", slice(0, 70))
            with pytest.raises(CheckpointError, match=rf"scale of row 70, group 1 of {UP}\.weight is -?(nan|inf); acc"):
                read(f"{UP}.weight", slice(60, 80))


def test_groups_that_the_configuration_denies(tmp_path: Path) -> None:
    """Some libraries then ignore g_idx, and some don't."""
    make = functools.partial(random_codes, shuffled=True)
    save(tmp_path, make)
    with pytest.raises(CheckpointError, match=r"g_idx puts columns in other groups .*accepted: .*desc_act: true"):
        open_checkpoint(tmp_path)
    check(save(tmp_path / "unsaid", make, desc_act=None))


def test_a_closed_checkpoint_reads_nothing(tmp_path: Path) -> None:
    save(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        pass
    with pytest.raises(CheckpointError, match="was closed; open the checkpoint again"):
        checkpoint.read(f"{UP}.weight")


def test_names_and_steps_as_of_any_checkpoint(tmp_path: Path) -> None:
    save(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        with pytest.raises(CheckpointError, match="has no tensor 'x'"):
            checkpoint.read("x")
        for name in ("x", f"{UP}.qweight", "model.norm.weight"):
            with pytest.raises(CheckpointError, match="isn't stored as codes that can be read"):
                checkpoint.read_encoded(name)


def test_wrapped_names(tmp_path: Path) -> None:
    saved = save_quantized(tmp_path, gptq_config(), gptq, zero_biases=True)
    state = load_file(saved.safetensors)
    save_file({f"_orig_mod.{name}": array for name, array in state.items()}, saved.safetensors)
    check(saved)
