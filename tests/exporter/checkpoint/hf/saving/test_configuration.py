"""quantization_config: which modules its patterns and lists mean, and what can't be in one folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType
from qwen_aot.exporter.checkpoint.hf.quantized.formats import FORMATS
from qwen_aot.exporter.checkpoint.hf.saving.formats import SAVED_FORMATS, saved_format
from qwen_aot.exporter.checkpoint.hf.saving.matrix import Matrix, patterns
from qwen_aot.exporter.model.tensors import Role
from tests.saved_folders import form

PLAIN = ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate")


W8A8 = CodeForm(8, 64, np.dtype(np.float16), has_input_scale=True)
FLOATS = dataclasses.replace(W8A8, code_type=CodeType.E4M3)


def matrix(role: Role, layer: int | None, each: CodeForm, shape: tuple[int, int] = (64, 64)) -> Matrix:
    return Matrix(role.tensor_name(layer, 0 if "expert}" in role.template else None), role, shape, each)


def mixed(*, zero_points: bool = False) -> list[Matrix]:
    usual, wide = form(zero_points=zero_points), form(8, 32, zero_points=zero_points)
    row = form(4, 64, zero_points=zero_points)
    found = [matrix(role, layer, usual) for layer in range(3) for role in (Role.QUERY, Role.KEY, Role.OUTPUT)]
    found += [matrix(Role.VALUE, layer, wide if layer else usual) for layer in range(3)]
    return [*found, *(matrix(Role.DOWN, layer, row) for layer in range(3))]


def scheme_by_dynamic(config: Mapping[str, Any], module: str) -> tuple[int, int] | None:
    """As GPTQModel finds it (`dynamic_get`): the first pattern that matches at the name's start; None: plain."""
    for key, override in config.get("dynamic", {}).items():
        if re.match(key[2:], module):
            return None if key.startswith("-:") else (override["bits"], override["group_size"])
    return config["bits"], config["group_size"]


def scheme_by_targets(config: Mapping[str, Any], module: str) -> tuple[int, int | None] | None:
    """As compressed-tensors finds it (`match_targets`): a name, then a pattern, then the class; None: ignored."""
    if module in config["ignore"]:
        return None
    targets = {target: group["weights"] for group in config["config_groups"].values() for target in group["targets"]}
    by_pattern = [target for target in targets if target.startswith("re:") and re.match(target[3:], module)]
    found = targets.get(module) or targets[by_pattern[0] if by_pattern else "Linear"]
    return found["num_bits"], found["group_size"]


def test_dynamic_says_each_modules_scheme() -> None:
    matrices = mixed()
    config = SAVED_FORMATS["gptq"].configuration(matrices, PLAIN, "qwen-aot:1")
    for each in matrices:
        size = -1 if each.is_whole_row else each.form.group_size
        assert scheme_by_dynamic(config, each.module) == (each.form.bits, size)
    for module in PLAIN[1:]:
        assert scheme_by_dynamic(config, module) is None
    assert scheme_by_dynamic(config, "model.layers.10.self_attn.v_proj") == (4, 32)
    assert config["lm_head"] is False
    assert (config["sym"], config["checkpoint_format"]) == (True, "gptq")
    assert config["meta"] == {"quantizer": ["qwen-aot:1"]}
    with_zeros = SAVED_FORMATS["gptq"].configuration(mixed(zero_points=True), (), "qwen-aot:1")
    assert (with_zeros["sym"], with_zeros["checkpoint_format"]) == (False, "gptq_v2")


def test_targets_say_each_modules_scheme() -> None:
    matrices = [*mixed(), *mixed(zero_points=True)[-1:]]
    config = SAVED_FORMATS["compressed-tensors"].configuration(matrices[:-1], PLAIN, "qwen-aot:1")
    for each in matrices[:-1]:
        size = None if each.is_whole_row else each.form.group_size
        assert scheme_by_targets(config, each.module) == (each.form.bits, size)
    assert all(scheme_by_targets(config, module) is None for module in PLAIN)
    assert list(config["config_groups"].values())[-1]["targets"] == ["Linear"]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_embedding_is_a_target_by_its_name(bits: int) -> None:
    matrices = [*mixed(), matrix(Role.EMBEDDING, None, form(bits))]
    config = SAVED_FORMATS["compressed-tensors"].configuration(matrices, (), "qwen-aot:1")
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert targets.count("model.embed_tokens") == 1
    assert scheme_by_targets(config, "model.embed_tokens") == (bits, 32)


@pytest.mark.parametrize("name", SAVED_FORMATS)
def test_this_projects_readers_take_the_configuration(name: str) -> None:
    matrices = [matrix(Role.QUERY, 0, form(zero_points=True))] if name == "awq" else mixed()
    config = SAVED_FORMATS[name].configuration(matrices, PLAIN, "qwen-aot:1")
    settings = FORMATS[name].parse(config)
    assert settings.why_plain("model.layers.0.self_attn.q_proj") is None
    if name != "gptq":
        assert all(settings.why_plain(module) for module in PLAIN)


def test_awq_names_whole_modules() -> None:
    config = SAVED_FORMATS["awq"].configuration([matrix(Role.QUERY, 0, form(zero_points=True))], PLAIN, "qwen-aot:1")
    assert config["modules_to_not_convert"] == list(PLAIN)
    assert (config["bits"], config["group_size"], config["zero_point"], config["version"]) == (4, 32, True, "gemm")


@pytest.mark.parametrize(
    ("name", "matrices", "message"),
    [
        ("awq", [matrix(Role.QUERY, 0, form())], "q_proj.weight has no zero points; accepted"),
        ("awq", mixed(zero_points=True), r"v_proj.weight has codes of 8 bits; accepted: 4"),
        (
            "awq",
            [matrix(Role.QUERY, 0, form(zero_points=True)), matrix(Role.KEY, 0, form(4, 16, zero_points=True))],
            "k_proj.weight has 4 bits in groups of 16, and most matrices 4 bits in groups of 32; accepted",
        ),
        ("awq", [matrix(Role.QUERY, 0, form(zero_points=True), (12, 64))], "q_proj.weight has 12 rows; accepted"),
        ("awq", [matrix(Role.HEAD, None, form(zero_points=True))], "lm_head.weight is outside the layers"),
        ("gptq", [matrix(Role.EMBEDDING, None, form())], "embed_tokens.weight is the embedding, which GPTQ doesn't"),
        (
            "gptq",
            [matrix(Role.QUERY, 0, form()), matrix(Role.KEY, 0, form(zero_points=True))],
            "k_proj.weight has zero points, and .*q_proj.weight none; accepted in one GPTQ folder",
        ),
        ("gptq", [matrix(Role.QUERY, 0, form(), (12, 64))], "q_proj.weight has 12 x 64 codes of 4 bits, which don't"),
        ("gptq", [matrix(Role.QUERY, 0, form(5))], "q_proj.weight has codes of 5 bits; accepted: 4, 8"),
        ("compressed-tensors", [matrix(Role.QUERY, 0, form(4, 24))], "rows of 64, which groups of 24 don't divide"),
        (
            "compressed-tensors",
            [matrix(Role.QUERY, 0, CodeForm(4, 32, form().scale_dtype, has_permutation=True))],
            "columns in another order; accepted",
        ),
        (
            "compressed-tensors",
            [matrix(Role.QUERY, 0, CodeForm(4, 32, np.dtype("float32")))],
            "has float32 scales; accepted: float16",
        ),
        *((name, [matrix(Role.QUERY, 0, W8A8)], "a scale of its input; accepted: none, or for") for name in ("gptq",)),
        (
            "compressed-tensors",
            [matrix(Role.QUERY, 0, W8A8), matrix(Role.KEY, 0, form(8, 64))],
            "k_proj.weight has no scale of its input, other than .*q_proj.weight; accepted: one kind in a folder",
        ),
        (
            "compressed-tensors",
            [matrix(Role.QUERY, 0, dataclasses.replace(W8A8, has_zero_points=True))],
            "accepted beside it: 8 bits without zero points",
        ),
        (
            "compressed-tensors",
            [matrix(Role.QUERY, 0, W8A8), matrix(Role.KEY, 0, FLOATS)],
            "k_proj.weight is E4M3 floats, and .*q_proj.weight 8 bits; accepted: one kind in a folder",
        ),
        (
            "compressed-tensors",
            [matrix(Role.QUERY, 0, dataclasses.replace(FLOATS, group_size=32))],
            "q_proj.weight is E4M3 floats; accepted of these: a scale a row, and one of its input",
        ),
        ("gptq", [matrix(Role.QUERY, 0, FLOATS)], "a scale of its input; accepted: none, or format compressed-tensors"),
    ],
)
def test_what_a_folder_cant_hold_is_refused_by_name(name: str, matrices: Sequence[Matrix], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        SAVED_FORMATS[name].check(matrices)


def test_another_format_is_refused() -> None:
    with pytest.raises(BuildError, match="format 'gguf' can't be written; accepted: gptq, awq, compressed-tensors"):
        saved_format("gguf")


_ENDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.experts.3.up_proj")


@given(chosen=st.sets(st.tuples(st.integers(0, 12), st.sampled_from(_ENDS)), min_size=1), with_head=st.booleans())
def test_patterns_match_these_modules_alone(chosen: set[tuple[int, str]], with_head: bool) -> None:
    modules = [f"model.layers.{layer}.{end}" for layer, end in sorted(chosen)] + ["lm_head"] * with_head
    found = patterns(modules)
    every = [f"model.layers.{layer}.{end}" for layer in range(13) for end in _ENDS]
    every += ["lm_head", "xlm_head", "model.layers.1.mlp.experts.30.up_proj", "model.layers.1.mlp.experts.3.up_proj.x"]
    matched = [module for module in every if any(re.match(pattern, module) for pattern in found)]
    assert sorted(matched) == sorted(modules)


def test_a_fused_modules_name_is_matched_where_all_its_parts_are() -> None:
    qkv = [f"model.layers.2.self_attn.{name}_proj" for name in "qkv"]
    (pattern,) = patterns(qkv, with_fused=True)
    assert re.match(pattern, "model.layers.2.self_attn.qkv_proj")
    (pattern,) = patterns(qkv[:2], with_fused=True)
    assert not re.match(pattern, "model.layers.2.self_attn.qkv_proj")
