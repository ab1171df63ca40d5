from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.wrappers import unwrapped
from qwen_aot.exporter.checkpoint.names import CANONICAL, TensorNames
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.tensors import Role, tensor_shapes
from tests.checkpoints import save_tiny
from tests.exporter.checkpoint.hf.blocks import BLOCKS

PATH = Path("model")
PLAIN = (
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)
TIED = PLAIN[:-1]


def base(name: str) -> str:
    return name.removeprefix("model.")


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "distributed": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "inner model compiled": lambda name: name.replace("model.", "model._orig_mod.", 1),
    "layers compiled": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name.replace('layers.1.', 'layers.1._fsdp_wrapped_module.')}",
    "checkpointed layers": lambda name: name.replace(".self_attn.", ".self_attn._checkpoint_wrapped_module."),
    "model doubled": lambda name: f"model.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "peft compiled": lambda name: f"base_model.model._orig_mod.{name}",
    "attribute of a module": lambda name: f"module.model.{name}",
    "no base": base,
}


@pytest.mark.parametrize("form", WRAPPED)
@pytest.mark.parametrize("names", [PLAIN, TIED], ids=["head", "tied"])
def test_what_stands_around_every_name_is_taken_off(form: str, names: tuple[str, ...]) -> None:
    wrap = WRAPPED[form]
    assert unwrapped(PATH, [wrap(name) for name in names], CANONICAL) == {wrap(name): name for name in names}


def test_plain_names_stay_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for names in (PLAIN, TIED, ("model.layers.0.rotary_emb.inv_freq", *PLAIN)):
            assert unwrapped(PATH, names, CANONICAL) == {name: name for name in names}
        assert caplog.text == ""
        unwrapped(PATH, [f"module.{name}" for name in PLAIN], CANONICAL)
    assert "module.model.embed_tokens.weight as model.embed_tokens.weight" in caplog.text


MIXED = {
    "leading": (["_orig_mod.model.norm.weight", *PLAIN[:-2]], "'_orig_mod': _orig_mod.model.norm.weight and model"),
    "one layer's part": (
        ["model.layers.0._orig_mod.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"],
        "'_orig_mod': model.layers.0._orig_mod.input_layernorm.weight and model.layers.0.self_attn",
    ),
    "two wrappers": (["module.model.norm.weight", "_orig_mod.model.embed_tokens.weight"], "with and without"),
    "once and twice": (["module.module.a.weight", "module.b.weight"], "'module': module.module.a.weight and module.b"),
    "tensor and module": (["a._orig_mod", "a"], "has a twice, as a._orig_mod and as a; accepted: one of them"),
}


@pytest.mark.parametrize("form", MIXED)
def test_a_mixture_is_refused(form: str) -> None:
    names, message = MIXED[form]
    with pytest.raises(CheckpointError) as caught:
        unwrapped(PATH, names, CANONICAL)
    assert message in str(caught.value)


def test_a_container_of_some_names_only_is_left() -> None:
    names = ["base_model.model.model.norm.weight", "v_head.summary.weight"]
    assert unwrapped(PATH, names, CANONICAL) == {name: name for name in names}


def test_names_that_an_architecture_has_are_no_wrappers() -> None:
    own = TensorNames({Role.EMBEDDING: "module.tokens", Role.FINAL_NORM: "module.norm"})
    names = ["module.tokens", "module.norm"]
    assert unwrapped(PATH, names, own) == {name: name for name in names}
    assert unwrapped(PATH, [f"_orig_mod.{name}" for name in ("tokens", "unembed")], BLOCKS.names) == {
        "_orig_mod.tokens": "tokens",
        "_orig_mod.unembed": "unembed",
    }


SEGMENTS = st.sampled_from(["model", "layers", "0", "_orig_mod", "module", "weight", "norm", "embed_tokens", ""])


@settings(deadline=None, max_examples=200)
@given(names=st.sets(st.lists(SEGMENTS, min_size=1, max_size=5).map(".".join), min_size=1, max_size=6))
def test_any_names_are_told_apart_or_refused(names: set[str]) -> None:
    try:
        found = unwrapped(PATH, sorted(names), CANONICAL)
    except CheckpointError:
        return
    assert set(found) == names
    assert len(set(found.values())) == len(names)


def rename(folder: Path, wrap: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({wrap(name): array for name, array in load_file(path).items()}, path)


@pytest.mark.parametrize("form", ["both", "layers compiled", "peft", "no base"])
def test_a_wrapped_checkpoint_is_the_model(form: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path)
    rename(tmp_path, WRAPPED[form])
    with open_checkpoint(tmp_path) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == tensor_shapes(checkpoint.config)
        state = model.state_dict()
        for name in checkpoint.tensors:
            assert checkpoint.tensors[name].name == name
            np.testing.assert_array_equal(checkpoint.read(name, slice(1, 3)), state[name][1:3].numpy())


def test_transformers_reads_a_base_model_as_we_do(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, tied=True)
    model.model.save_pretrained(tmp_path)  # without `model.`
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForCausalLM"]}))
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    with open_checkpoint(tmp_path) as checkpoint:
        for name in checkpoint.tensors:
            np.testing.assert_array_equal(checkpoint.read(name), theirs[name].numpy())
        assert set(checkpoint.tensors) == set(theirs) - {"lm_head.weight"}
