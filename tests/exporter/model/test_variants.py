from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
import transformers

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.tensorrt import standard
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.published.generation import Generation
from qwen_aot.exporter.model.tensors import num_activated_parameters, num_parameters
from qwen_aot.exporter.model.variants import (
    GENERATIONS,
    VARIANTS,
    canonical_name,
    find_generation,
    variant_config,
)
from tests.variants import KINDS

# As published with each model (safetensors metadata; of tied models without the head). Qwen3 up to 14B and Qwen2.5's
# 0.5B and 3B are Keras Hub's presets' too; the others from Qwen2 on are from memory of the model cards.
PUBLISHED_PARAMETERS = {
    "qwen-1.8b": 1_836_828_672,
    "qwen-7b": 7_721_324_544,
    "qwen-14b": 14_167_290_880,
    "qwen-72b": 72_287_920_128,
    "qwen-vl": 7_721_324_544,  # of its decoder; tests/exporter/model/test_vision.py counts the tower
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-7b": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
    "qwen1.5-32b": 32_512_218_112,
    "qwen1.5-72b": 72_287_920_128,
    "qwen1.5-110b": 111_209_914_368,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwq-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-4b-instruct-2507": 4_022_468_096,
    "qwen3-235b-a22b-instruct-2507": 235_093_634_560,
}


def first_generation(config: ModelConfig) -> torch.nn.Module:
    """The modules with parameters of the published modeling_qwen.py, which transformers doesn't have."""
    M, F, V = config.hidden_size, 2 * config.intermediate_size, config.vocab_size  # F as config.json says it
    projection = 128 * config.num_attention_heads  # kv_channels
    layers: list[torch.nn.Module] = []
    for _ in range(config.num_hidden_layers):
        attention = torch.nn.ModuleList(
            [torch.nn.Linear(M, 3 * projection), torch.nn.Linear(M, projection, bias=False)]
        )
        mlp = torch.nn.ModuleList([torch.nn.Linear(M, F // 2, bias=False), torch.nn.Linear(M, F // 2, bias=False)])
        mlp.append(torch.nn.Linear(F // 2, M, bias=False))
        layers += [torch.nn.RMSNorm(M), attention, torch.nn.RMSNorm(M), mlp]
    return torch.nn.ModuleList(
        [torch.nn.Embedding(V, M), *layers, torch.nn.RMSNorm(M), torch.nn.Linear(M, V, bias=False)]
    )


def meta_parameters(config: ModelConfig) -> int:
    """Of transformers' own model of these facts, written out once more and without storage."""
    facts = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.model_type.startswith("qwen3"):
        facts["head_dim"] = config.head_dim
    if config.moe is not None:
        facts |= {
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.num_experts_per_tok,
            "moe_intermediate_size": config.moe.moe_intermediate_size,
        }
    if config.model_type == "qwen2_moe":
        facts["shared_expert_intermediate_size"] = config.moe.shared_expert_intermediate_size
    kind = {
        "qwen": None,
        "qwen2": transformers.Qwen2ForCausalLM,
        "qwen2_moe": transformers.Qwen2MoeForCausalLM,
        "qwen3": transformers.Qwen3ForCausalLM,
        "qwen3_moe": transformers.Qwen3MoeForCausalLM,
    }[config.model_type]
    with torch.device("meta"):
        if config.model_type == "qwen":
            model: torch.nn.Module = first_generation(config)
        else:
            model = kind(transformers.AutoConfig.for_model(config.model_type, **facts))
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_published_variant_is_there() -> None:
    assert set(VARIANTS) == set(PUBLISHED_PARAMETERS)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_count(name: str) -> None:
    config = variant_config(name)
    assert num_parameters(config) == PUBLISHED_PARAMETERS[name]
    assert num_parameters(config) == meta_parameters(config)


# As published in each model's config.json: rope_theta, tied embeddings, key/value heads, context, rms_norm_eps.
PUBLISHED_FACTS = {
    "qwen-1.8b": (1e4, False, 16, 8192, 1e-6),
    "qwen-7b": (1e4, False, 32, 32768, 1e-6),
    "qwen-14b": (1e4, False, 40, 8192, 1e-6),
    "qwen-72b": (1e6, False, 64, 32768, 1e-6),
    "qwen1.5-0.5b": (1e6, True, 16, 32768, 1e-6),
    "qwen1.5-1.8b": (1e6, False, 16, 32768, 1e-6),
    "qwen1.5-4b": (5e6, False, 20, 32768, 1e-6),
    "qwen1.5-7b": (1e6, False, 32, 32768, 1e-6),
    "qwen1.5-14b": (1e6, False, 40, 32768, 1e-6),
    "qwen1.5-32b": (1e6, False, 8, 32768, 1e-6),
    "qwen1.5-72b": (1e6, False, 64, 32768, 1e-6),
    "qwen1.5-110b": (1e6, False, 8, 32768, 1e-6),
    "qwen1.5-moe-a2.7b": (1e6, False, 16, 32768, 1e-6),
    "qwen2-0.5b": (1e6, True, 2, 131072, 1e-6),
    "qwen2-57b-a14b": (1e6, False, 4, 131072, 1e-6),
    "qwen2.5-1.5b-instruct": (1e6, True, 2, 32768, 1e-6),
    "qwen2.5-3b": (1e6, True, 2, 32768, 1e-6),
    "qwen2.5-7b": (1e6, False, 4, 131072, 1e-6),
    "qwen2.5-7b-instruct": (1e6, False, 4, 32768, 1e-6),
    "qwen2.5-14b": (1e6, False, 8, 131072, 1e-5),
    "qwen2.5-32b": (1e6, False, 8, 131072, 1e-5),
    "qwen2.5-72b-instruct": (1e6, False, 8, 32768, 1e-6),
    "qwq-32b-preview": (1e6, False, 8, 32768, 1e-5),
    "qwen3-0.6b": (1e6, True, 8, 40960, 1e-6),
    "qwen3-4b": (1e6, True, 8, 40960, 1e-6),
    "qwen3-8b": (1e6, False, 8, 40960, 1e-6),
    "qwen3-14b": (1e6, False, 8, 40960, 1e-6),
    "qwen3-32b": (1e6, False, 8, 40960, 1e-6),
    "qwen3-30b-a3b": (1e6, False, 4, 40960, 1e-6),
    "qwen3-235b-a22b": (1e6, False, 4, 40960, 1e-6),
    "qwen3-4b-thinking-2507": (5e6, True, 8, 262144, 1e-6),
    "qwen3-235b-a22b-instruct-2507": (5e6, False, 4, 262144, 1e-6),
}


# Of the first generation, where use_logn_attn and use_dynamic_ntk are true: seq_length.
SEQ_LENGTHS = {"qwen-1.8b": 8192, "qwen-7b": 8192, "qwen-14b": 2048}


@pytest.mark.parametrize("name", PUBLISHED_FACTS)
def test_facts_that_the_parameter_count_does_not_show(name: str) -> None:
    config = variant_config(name)
    facts = (config.rope_theta, config.tie_word_embeddings, config.num_key_value_heads)
    assert (*facts, config.max_position_embeddings, config.rms_norm_eps) == PUBLISHED_FACTS[name]
    length = SEQ_LENGTHS.get(name)
    assert (config.logn_attn_length, config.dynamic_ntk_length) == (length, length)
    assert config.head_dim == (64 if "-0.5b" in name else 128)
    assert config.attention_bias == (not name.startswith("qwen3"))
    assert config.rope_scaling is None


def test_the_largest_variant_exports_in_little_memory(tmp_path: Path) -> None:
    """In a process of its own, as `qwen-aot export qwen1.5-110b` runs; allowed is 1 GB."""
    script = (
        "import re, sys, onnx_ir as ir\n"
        "from pathlib import Path\n"
        "from qwen_aot.exporter.lowering.tensorrt import standard\n"
        "from qwen_aot.exporter.graph.save import save_graph\n"
        "from qwen_aot.exporter.graph.trace import trace\n"
        "from qwen_aot.exporter.model.variants import variant_config\n"
        "traced = standard.lower(trace(variant_config('qwen1.5-110b'), ir.DataType.BFLOAT16))\n"
        "save_graph(traced, Path(sys.argv[1]))\n"
        # Not ru_maxrss, which begins with the peak of the process that forked this one.
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, cwd=root
    )
    assert int(done.stdout.split()[-1]) < 1_000_000  # KB; seen: 410,000
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert len(graph.output) == 1 + 2 * 80
    by_name = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    assert by_name["model.layers.79.self_attn.qkv_proj.weight"] == ((64 + 2 * 8) * 128, 8192)
    assert by_name["lm_head.weight"] == (152064, 8192)
    cache = next(value for value in graph.input if value.name == "past_key_values.79.key").type.tensor_type
    assert [dim.dim_param or dim.dim_value for dim in cache.shape.dim] == ["B", 8, "C", 128]
    assert cache.elem_type == onnx.TensorProto.BFLOAT16
    assert (tmp_path / "model.onnx").stat().st_size < 1 << 20


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.deep) for name in VARIANTS]
)
def test_every_variant_is_traced_with_all_its_parameters(name: str) -> None:
    """As `qwen-aot export NAME` does, and in the lowered graph: what it holds beside rotary tables."""
    config = variant_config(name)
    graph = standard.lower(trace(config, ir.DataType.BFLOAT16, positions=64)).model.graph
    sizes = {key: math.prod(value.shape) for key, value in graph.initializers.items() if "rotary" not in key}
    assert sum(sizes.values()) == num_parameters(config)


@pytest.mark.parametrize(
    ("name", "total", "activated"),
    [
        ("qwen1.5-moe-a2.7b", 14.3, 2.7),
        ("qwen2-57b-a14b", 57.4, 14.2),
        ("qwen3-30b-a3b", 30.5, 3.4),  # its card says 3.3
        ("qwen3-235b-a22b", 235.1, 22.2),  # 235 and 22
    ],
)
def test_activated_parameters_of_the_mixtures(name: str, total: float, activated: float) -> None:
    config = variant_config(name)
    assert round(num_parameters(config) / 1e9, 1) == total
    assert round(num_activated_parameters(config) / 1e9, 1) == activated


@pytest.mark.parametrize(
    "spelling", ["qwen1.5-7b", "Qwen1.5-7B", "Qwen1.5-7B-Chat", "Qwen/Qwen1.5-7B-Chat", "qwen1.5-7b-chat"]
)
def test_spellings(spelling: str) -> None:
    assert canonical_name(spelling) == "qwen1.5-7b"
    assert variant_config(spelling) is VARIANTS["qwen1.5-7b"]


@pytest.mark.parametrize("spelling", ["qwen-1.8b", "Qwen/Qwen-1_8B", "Qwen-1_8B-Chat", "qwen-1.8b-chat"])
def test_spellings_of_a_number_with_a_point(spelling: str) -> None:
    assert canonical_name(spelling) == "qwen-1.8b"


def test_an_ending_changes_the_context_and_not_the_shape() -> None:
    base, instruct = variant_config("qwen2.5-14b"), variant_config("Qwen/Qwen2.5-14B-Instruct")
    assert canonical_name("Qwen2.5-14B-Instruct") == "qwen2.5-14b-instruct"
    assert (base.max_position_embeddings, instruct.max_position_embeddings) == (131072, 32768)
    assert num_parameters(base) == num_parameters(instruct)
    assert canonical_name("Qwen2.5-3B-Instruct") == "qwen2.5-3b"  # no fact differs
    assert canonical_name("Qwen3-4B-Thinking-2507") == "qwen3-4b-instruct-2507"


@pytest.mark.parametrize("name", ["qwen2.5-7b-chat", "qwen3-8b-instruct-2507", "qwen3-2507", "qwen2-", "7b", ""])
def test_an_ending_or_a_size_that_is_not_published_is_unknown(name: str) -> None:
    assert canonical_name(name) is None


def test_unknown_name_lists_the_known() -> None:
    accepted = (
        r"'qwen2-8b' is not a published variant; accepted: qwen-1.8b, .*; qwen1.5-0.5b, -1.8b, .*, -moe-a2.7b "
        r"\(each also with -chat\); qwen2-0.5b, .*; qwq-32b \(also with -preview\); .*-235b-a22b-instruct-2507 "
        r"\(or in its place -thinking-2507\)$"
    )
    with pytest.raises(CheckpointError, match=accepted):
        variant_config("qwen2-8b")


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda each: each.name)
def test_every_listed_name_is_found_under_itself(generation: Generation) -> None:
    for name, config in generation.models.items():
        assert canonical_name(name) == name
        assert variant_config(name.upper()) is config is VARIANTS[name]
    assert find_generation(generation.name.upper()) is generation
