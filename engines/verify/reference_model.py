"""Reads a checkpoint into a transformers model, past our own readers wherever its files can be read by others.

A bundle is made of what our readers say. Were the reference made of it too, a fault of a reader (rows in another
order, a base frequency misread) would be on both sides and nothing would show it. So

- a Hugging Face folder of an architecture that transformers knows is read by transformers, which is told the names of
  tensors only where a framework put its own around them;
- a GGUF file is read by the gguf package, its keys and rotary order interpreted by tables of transformers;
- linears quantized by GPTQ, AWQ or their like, which transformers opens with their packages alone, are unpacked by a
  second reader (`quantized_model`), and the rest of their folder is read as any other;
- only what nobody else can read here (random weights; a folder of an architecture that is ours) comes through our
  reader.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from qwen_aot.engines.verify import first_generation
from qwen_aot.engines.verify.gguf_model import read_gguf
from qwen_aot.engines.verify.quantized_model import dequantized, round_inputs, weight_files
from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import Checkpoint, encodings_of
from qwen_aot.exporter.checkpoint.hf.saving.config_json import config_json
from qwen_aot.exporter.checkpoint.hf.wrappers import unwrapped
from qwen_aot.exporter.checkpoint.names import CANONICAL
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.model import vision_tensors
from qwen_aot.exporter.model.model_types import MODEL_TYPES
from qwen_aot.exporter.model.tensors import WeightClass, checkpoint_tensors

BY_TRANSFORMERS, BY_GGUF, BY_US = "transformers", "the gguf package", "qwen-aot's own reader"
BY_SECOND = "transformers, and a second reader of quantized linears"

_CLASSES: Mapping[str, str] = {
    **{name: kind.transformers_class for name, kind in MODEL_TYPES.items() if kind.transformers_class is not None},
    "llama": "LlamaForCausalLM",
}
_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")


def load_model(checkpoint: Checkpoint) -> tuple[Any, str]:
    """The model in fp32, and who read its files: BY_TRANSFORMERS, BY_GGUF, BY_SECOND or BY_US.

    Raises:
        CheckpointError: what was read isn't a whole model.
    """
    transformers: Any = importlib.import_module("transformers")  # its types don't follow its own calls
    logging = transformers.utils.logging
    was_shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its table of what is missing is advice to train; here that is judged below
    try:
        if isinstance(checkpoint, RandomCheckpoint):
            return _from_reader(transformers, checkpoint), BY_US
        if _is_known(checkpoint.path):
            is_quantized = any(each.fixes_precision for each in encodings_of(checkpoint).values())
            if is_quantized:
                return _quantized(transformers, checkpoint), BY_SECOND
            return _from_folder(transformers, checkpoint, _unwrapped_state(checkpoint)), BY_TRANSFORMERS
        if _model_type(checkpoint.path) == first_generation.MODEL_TYPE:
            return _first_generation(transformers, checkpoint)
        if checkpoint.path.is_file() and checkpoint.path.suffix.lower() == ".gguf":
            facts, state = read_gguf(checkpoint.path)
            return _from_state(transformers, checkpoint.path, facts, state), BY_GGUF
        return _from_reader(transformers, checkpoint), BY_US
    finally:
        logging.set_verbosity(verbosity)
        if was_shown:
            logging.enable_progress_bar()


def _is_known(path: Path) -> bool:
    """Whether this is a folder of an architecture that transformers reads as it is."""
    return _model_type(path) in _CLASSES


def _model_type(path: Path) -> str | None:
    """What a folder's config.json says; None: this is something else."""
    file = path / "config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None


def _first_generation(transformers: Any, checkpoint: Checkpoint) -> tuple[Any, str]:
    """A folder whose architecture transformers has under another name, up to a length."""
    is_quantized = any(each.fixes_precision for each in encodings_of(checkpoint).values())
    stored = _stored(weight_files(checkpoint.path))
    if is_quantized:
        stored = dequantized(checkpoint.path, stored)
    state = first_generation.qwen2_state(checkpoint.path, stored)
    model = _from_state(transformers, checkpoint.path, first_generation.qwen2_config(checkpoint.path), state)
    return model, BY_SECOND if is_quantized else BY_TRANSFORMERS


def _from_folder(transformers: Any, checkpoint: Checkpoint, state: Mapping[str, torch.Tensor] | None) -> Any:
    """`state`: its tensors by their names in transformers, in the place of its files."""
    config = transformers.AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain by now
    kind = getattr(transformers, _CLASSES[config.model_type])
    model, info = kind.from_pretrained(
        checkpoint.path if state is None else None,
        config=config,
        state_dict=state,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    _require_whole(checkpoint.path, model, info, () if checkpoint.config.attention_bias else _BIASES)
    return model.eval()


def _unwrapped_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor] | None:
    """The tensors of a folder without what a framework put around their names; None: nothing is around them.

    Only the names are by our reader's rule: safetensors reads the values, and a name that is no tensor of the model's
    is left over.
    """
    stored = _stored(sorted({info.span.path for info in checkpoint.tensors.values() if info.span is not None}))
    names = unwrapped(checkpoint.path, stored, CANONICAL)
    if all(old == new for old, new in names.items()):
        return None
    return {names[old]: tensor for old, tensor in stored.items()}


def _quantized(transformers: Any, checkpoint: Checkpoint) -> Any:
    """The model of a quantized folder, its linears with fp32 weights; they round what they read where it says so."""
    files = _stored(weight_files(checkpoint.path))
    stored = dequantized(checkpoint.path, files)
    state = {new: stored[old] for old, new in unwrapped(checkpoint.path, stored, CANONICAL).items()}
    model = _from_folder(transformers, checkpoint, state)
    round_inputs(model, {new: files[old] for old, new in unwrapped(checkpoint.path, files, CANONICAL).items()})
    return model


def _stored(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of some files, mapped and not read yet."""
    stored: dict[str, torch.Tensor] = {}
    for file in files:
        stored |= load_file(file)
    return stored


def _from_state(transformers: Any, path: Path, facts: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Any:
    config = transformers.AutoConfig.for_model(**facts)
    kind = getattr(transformers, _CLASSES[config.model_type])
    model, info = kind.from_pretrained(
        None, config=config, state_dict=dict(state), dtype=torch.float32, output_loading_info=True
    )
    _require_whole(path, model, info, ())
    return model.eval()


def _from_reader(transformers: Any, checkpoint: Checkpoint) -> Any:
    return _from_state(transformers, checkpoint.path, config_json(checkpoint.config), _state_dict(checkpoint))


def _require_whole(path: Path, model: Any, info: Mapping[str, Any], absent: Iterable[str]) -> None:
    """Nothing of the model is left as transformers drew it, and no tensor is left over.

    Args:
        path: for the message.
        model: whose missing biases become zeros.
        info: what transformers says it loaded.
        absent: ends of names of biases that the checkpoint doesn't have.
    """
    zeroed = [name for name in info["missing_keys"] if name.endswith(tuple(absent))] if absent else []
    wrong = {
        "missing": sorted(set(info["missing_keys"]) - set(zeroed)),
        "left over": sorted(name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")),
        "of another shape": sorted(str(entry[0]) for entry in info["mismatched_keys"]),
    }
    if found := "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in wrong.items() if names):
        raise CheckpointError(
            f"{path}: transformers makes another model of this checkpoint than was built of it ({found}), so that "
            "there is nothing to compare with"
        )
    with torch.no_grad():
        for name in zeroed:
            model.get_parameter(name).zero_()


def _state_dict(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every weight of the decoder as fp32. Biases that a checkpoint lacks and transformers' class has are zeros."""
    state = {
        name: torch.from_numpy(checkpoint.read(name).astype(np.float32))
        for name in checkpoint.tensors
        if not name.endswith("rotary_emb.inv_freq") and not name.startswith(vision_tensors.PREFIX)
    }
    for tensor in checkpoint_tensors(checkpoint.config.as_in_transformers):
        if tensor.role.weight_class is WeightClass.BIAS and tensor.name not in state:
            state[tensor.name] = torch.zeros(tensor.shape)
    return state
