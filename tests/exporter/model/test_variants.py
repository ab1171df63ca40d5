from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import num_activated_parameters, num_parameters
from qwen_aot.exporter.model.variants import VARIANTS, canonical_name, variant_config

# As published with each model (safetensors metadata; for 0.5B without the tied head).
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
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    with torch.device("meta"):
        if config.model_type == "qwen":
            model: torch.nn.Module = first_generation(config)
        elif config.moe is None:
            model = Qwen2ForCausalLM(Qwen2Config(**common))
        else:
            experts = {
                "num_experts": config.moe.num_experts,
                "num_experts_per_tok": config.moe.num_experts_per_tok,
                "moe_intermediate_size": config.moe.moe_intermediate_size,
                "shared_expert_intermediate_size": config.moe.shared_expert_intermediate_size,
            }
            model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**common, **experts))
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_published_variant_is_there() -> None:
    assert set(VARIANTS) == set(PUBLISHED_PARAMETERS)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_count(name: str) -> None:
    config = variant_config(name)
    assert num_parameters(config) == PUBLISHED_PARAMETERS[name]
    assert num_parameters(config) == meta_parameters(config)


# As published in each model's config.json: rope_theta, tied embeddings, key/value heads.
PUBLISHED_FACTS = {
    "qwen-1.8b": (1e4, False, 16),
    "qwen-7b": (1e4, False, 32),
    "qwen-14b": (1e4, False, 40),
    "qwen-72b": (1e6, False, 64),
    "qwen1.5-0.5b": (1e6, True, 16),
    "qwen1.5-1.8b": (1e6, False, 16),
    "qwen1.5-4b": (5e6, False, 20),
    "qwen1.5-7b": (1e6, False, 32),
    "qwen1.5-14b": (1e6, False, 40),
    "qwen1.5-32b": (1e6, False, 8),
    "qwen1.5-72b": (1e6, False, 64),
    "qwen1.5-110b": (1e6, False, 8),
    "qwen1.5-moe-a2.7b": (1e6, False, 16),
}


# Of the first generation, where use_logn_attn and use_dynamic_ntk are true: seq_length, max_position_embeddings.
SEQ_LENGTHS = {"qwen-1.8b": (8192, 8192), "qwen-7b": (8192, 32768), "qwen-14b": (2048, 8192)}


@pytest.mark.parametrize("name", PUBLISHED_FACTS)
def test_facts_that_the_parameter_count_does_not_show(name: str) -> None:
    config = variant_config(name)
    assert (config.rope_theta, config.tie_word_embeddings, config.num_key_value_heads) == PUBLISHED_FACTS[name]
    length, context = SEQ_LENGTHS.get(name, (None, 32768))
    assert (config.max_position_embeddings, config.rms_norm_eps, config.attention_bias) == (context, 1e-6, True)
    assert (config.logn_attn_length, config.dynamic_ntk_length) == (length, length)
    assert config.head_dim == (64 if name == "qwen1.5-0.5b" else 128)
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


def test_activated_parameters_of_the_mixture() -> None:
    config = variant_config("qwen1.5-moe-a2.7b")
    assert round(num_parameters(config) / 1e9, 1) == 14.3
    assert round(num_activated_parameters(config) / 1e9, 1) == 2.7


@pytest.mark.parametrize(
    "spelling", ["qwen1.5-7b", "Qwen1.5-7B", "Qwen1.5-7B-Chat", "Qwen/Qwen1.5-7B-Chat", "qwen1.5-7b-chat"]
)
def test_spellings(spelling: str) -> None:
    assert canonical_name(spelling) == "qwen1.5-7b"
    assert variant_config(spelling) is VARIANTS["qwen1.5-7b"]


@pytest.mark.parametrize("spelling", ["qwen-1.8b", "Qwen/Qwen-1_8B", "Qwen-1_8B-Chat", "qwen-1.8b-chat"])
def test_spellings_of_a_number_with_a_point(spelling: str) -> None:
    assert canonical_name(spelling) == "qwen-1.8b"


def test_unknown_name_lists_the_known() -> None:
    assert canonical_name("qwen2-7b") is None
    with pytest.raises(
        CheckpointError, match=r"'qwen2-7b' is not a Qwen1.5 variant; accepted: qwen-1.8b, .*qwen1.5-0.5b, .*110b"
    ):
        variant_config("qwen2-7b")
