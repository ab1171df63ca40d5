"""Remakes qwen.json: `python -m tests.golden.make_qwen`, with ModelScope 1.40.0 and transformers 4.46.3.

What ModelScope's model of the first Qwen generation makes of the tiny checkpoint in `tests/first_qwen.py`: a prompt in
one step, then a given token a step with the cache kept, on both sides of each length at which its alpha changes. These
packages don't go with this project's own transformers, so they want an environment of their own:

    pip install torch==2.13.0 safetensors
    pip install --no-deps modelscope==1.40.0 transformers==4.46.3 tokenizers==0.20.3 huggingface-hub==0.26.5 einops

ModelScope's registry, which would import all of its models, is replaced by one that does nothing. Its module checks no
mask of a padded batch, so each text is a batch of its own.

A case: `prompt` (tokens of the first step), `ids` (all), `alpha` (that the model chose), and of the prompt's last token
and of each later one `logits` [1 + steps, 16] (the first 16 of the vocabulary) and `sums` (over all of it).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tests.first_qwen import CONFIG, SEQ_LENGTH, VOCAB, make_weights

PATH = Path(__file__).with_name("qwen.json")
PROMPTS = (5, SEQ_LENGTH - 1, SEQ_LENGTH, SEQ_LENGTH + 1, 2 * SEQ_LENGTH, 2 * SEQ_LENGTH + 1, 90)
STEPS, SHOWN = 20, 16


def stub(name: str, **content: Any) -> None:
    """A module of this name that holds these things."""
    module = ModuleType(name)
    module.__path__ = []
    module.__dict__.update(content)
    sys.modules[name] = module


def load_model() -> tuple[ModuleType, ModuleType]:
    """ModelScope's modules of the model and of its configuration."""

    class Names:
        def __getattr__(self, name: str) -> str:
            return name

    class Registry:
        @staticmethod
        def register_module(*_: Any, **__: Any) -> Any:
            return lambda cls: cls

    class Model: ...

    class TorchModel(Model):
        def __init__(self, *_: Any, **__: Any) -> None: ...

    spec = importlib.util.find_spec("modelscope")
    assert spec is not None and spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    stub("modelscope", Model=Model, TorchModel=TorchModel)
    stub("modelscope.metainfo", Models=Names())
    stub("modelscope.utils")
    stub("modelscope.utils.constant", Tasks=Names())
    stub("modelscope.utils.logger", get_logger=lambda *_, **__: logging.getLogger("modelscope"))
    stub("modelscope.models", MODELS=Registry)
    stub("modelscope.models.nlp")
    stub("modelscope.models.nlp.qwen")
    sys.modules["modelscope.models.nlp.qwen"].__path__ = [str(root / "models/nlp/qwen")]
    return (
        importlib.import_module("modelscope.models.nlp.qwen.backbone"),
        importlib.import_module("modelscope.models.nlp.qwen.configuration"),
    )


def main() -> None:
    """Writes the file."""
    backbone, configuration = load_model()
    config = configuration.QWenConfig(
        vocab_size=VOCAB,
        padded_vocab_size=VOCAB,
        n_embd=CONFIG["hidden_size"],
        n_layer=CONFIG["num_hidden_layers"],
        n_head=CONFIG["num_attention_heads"],
        kv_channels=CONFIG["kv_channels"],
        ffn_hidden_size=CONFIG["intermediate_size"],
        seq_length=SEQ_LENGTH,
        n_positions=CONFIG["max_position_embeddings"],
        layer_norm_epsilon=CONFIG["layer_norm_epsilon"],
        use_dynamic_ntk=True,
        use_logn_attn=True,
        use_flash_attn=False,
        bf16=False,
        fp16=False,
        fp32=True,
        pos_emb="rotary",
        params_dtype="torch.float32",
        resid_pdrop=0.0,
    )
    model = backbone.QWenModel(config).eval()
    weights = {name: torch.from_numpy(value) for name, value in make_weights().items()}
    head = weights.pop("lm_head.weight")
    model.load_state_dict({name.removeprefix("transformer."): value for name, value in weights.items()})
    cases = []
    for prompt in PROMPTS:
        ids = np.random.default_rng(prompt).integers(0, VOCAB, prompt + STEPS)
        logits, past = [], None
        with torch.no_grad():
            for part in (ids[:prompt], *ids[prompt:, None]):
                made = model(torch.from_numpy(part)[None], past_key_values=past, use_cache=True)
                past = made.past_key_values
                logits.append(made.last_hidden_state[0, -1] @ head.T)
        told = torch.stack(logits)
        cases.append(
            {
                "prompt": prompt,
                "ids": ids.tolist(),
                "alpha": model.h[0].attn._ntk_cached,
                "logits": [[round(value, 5) for value in row[:SHOWN].tolist()] for row in told],
                "sums": [round(float(row.double().sum()), 4) for row in told],
            }
        )
    PATH.write_text(json.dumps({"made_by": "ModelScope 1.40.0, transformers 4.46.3", "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
