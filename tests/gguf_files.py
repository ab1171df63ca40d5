"""Tiny GGUF files, written by the gguf package from transformers models, as its converter would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

_ARCHITECTURES = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen2moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
    "llama": gguf.MODEL_ARCH.LLAMA,
}


def smollm2_path() -> Path | None:
    """The real model that scripts/setup.sh fetches, if it is there."""
    path = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return path if path.is_file() else None


def hugging_face_state(model: torch.nn.Module) -> dict[str, NDArray[np.float32]]:
    """A model's tensors by their names in a Hugging Face file: experts apart, tied head left out."""
    state: dict[str, NDArray[np.float32]] = {}
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):  # [E, 2F, M], gate first
            prefix = name.removesuffix("gate_up_proj")
            for expert, both in enumerate(array):
                gate, up = np.split(both, 2)
                state |= {f"{prefix}{expert}.gate_proj.weight": gate, f"{prefix}{expert}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            state |= {f"{prefix}{expert}.down_proj.weight": each for expert, each in enumerate(array)}
        else:
            state[name] = array
    return state


def save_gguf(
    path: Path,
    model: Any,
    architecture: str,
    *,
    kind: Type = Type.F32,
    kinds: Mapping[str, Type] | None = None,
    facts: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
) -> dict[str, NDArray[np.float32]]:
    """Writes a model as GGUF and returns what it wrote, dequantized, by Hugging Face name.

    Args:
        path: the file to write.
        model: of `tests.checkpoints.tiny_model`.
        architecture: one of `_ARCHITECTURES`; of llama, biases are left out.
        kind: of the matrices; vectors stay F32.
        kinds: by the ends of Hugging Face names, of matrices of another type.
        facts: metadata that is added, or replaces what the model says; a value None removes the key.
        without: GGUF tensors that are left out.
    """
    config = model.config
    metadata: dict[str, Any] = {
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.freq_base": config.rope_parameters["rope_theta"],
    }
    head_dim = model.model.layers[0].self_attn.head_dim
    metadata[f"{architecture}.attention.key_length"] = head_dim
    metadata[f"{architecture}.attention.value_length"] = head_dim
    if architecture.endswith("moe"):
        metadata[f"{architecture}.expert_count"] = config.num_experts
        metadata[f"{architecture}.expert_used_count"] = config.num_experts_per_tok
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata | dict(facts or {})).items():
        _add(writer, key, value)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[architecture], config.num_hidden_layers)
    written: dict[str, NDArray[np.float32]] = {}
    for name, (array, members) in _stacked(hugging_face_state(model)).items():
        if architecture == "llama" and name.endswith(".bias"):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        if target in without:
            continue
        stored = array
        if architecture == "llama" and ".q_proj." in name:
            stored = _interleave(array, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            stored = _interleave(array, config.num_key_value_heads)
        if name.endswith("shared_expert_gate.weight"):
            stored = array.reshape(-1)  # as the converter does
        named = next((each for ending, each in (kinds or {}).items() if name.endswith(ending)), kind)
        used = named if stored.ndim > 1 else Type.F32
        data = gguf.quantize(stored, used)
        writer.add_tensor(target, data, raw_dtype=used)
        values = gguf.dequantize(data, used).reshape(stored.shape)
        if stored.shape == array.shape and not np.array_equal(stored, array):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = _deinterleave(values, heads)
        values = values.reshape(array.shape)
        written |= dict(zip(members, values, strict=True)) if members else {name: values}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)


def _stacked(
    state: Mapping[str, NDArray[np.float32]],
) -> dict[str, tuple[NDArray[np.float32], list[str]]]:
    """Experts of a layer stacked into one tensor [E, out, in], beside the names they came from."""
    result: dict[str, tuple[NDArray[np.float32], list[str]]] = {}
    groups: dict[str, list[str]] = {}
    for name, array in state.items():
        prefix, experts, rest = name.partition(".experts.")
        if experts:
            groups.setdefault(f"{prefix}.experts.{rest.split('.', 1)[1]}", []).append(name)
        else:
            result[name] = (array, [])
    for name, members in groups.items():
        result[name] = (np.stack([state[member] for member in members]), members)
    return result


def _interleave(array: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """A head's halves [2, D/2] -> [D/2, 2] along axis 0: the order of a llama file."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _deinterleave(array: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
