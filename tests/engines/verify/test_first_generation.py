"""The reference of first-generation Qwen: transformers' Qwen2 up to the trained length, and nothing beyond it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.engines.verify.reference import Reference
from qwen_aot.engines.verify.reference_model import BY_SECOND, BY_TRANSFORMERS, BY_US
from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from tests.first_qwen import CONFIG, LAYERS, SEQ_LENGTH, VOCAB, Statement, make_weights, older_config, save_folder
from tests.quantized_files import gptq, gptq_config, random_codes
from tests.vl_checkpoints import SeeingModel

IDS = np.random.default_rng(0).integers(0, VOCAB, SEQ_LENGTH)


@pytest.mark.parametrize("config", [CONFIG, older_config()], ids=["newer", "older"])
def test_it_is_the_published_model_up_to_the_trained_length(config: dict[str, Any], tmp_path: Path) -> None:
    with open_checkpoint(save_folder(tmp_path, config=config)) as checkpoint:
        reference = Reference(checkpoint)
    assert reference.read_by == BY_TRANSFORMERS
    np.testing.assert_allclose(reference.logits(IDS, 3), Statement(make_weights()).logits(IDS.tolist())[3:], atol=1e-4)
    assert reference.greedy(IDS[:20], 12) == Statement(make_weights()).greedy(IDS[:20].tolist(), 12)


def test_beyond_it_there_is_no_reference(tmp_path: Path) -> None:
    with open_checkpoint(save_folder(tmp_path)) as checkpoint:
        reference = Reference(checkpoint)
    message = rf"has {SEQ_LENGTH + 1} tokens, and beyond {SEQ_LENGTH} \(seq_length\).*windows of at most {SEQ_LENGTH}"
    with pytest.raises(CheckpointError, match=message):
        reference.logits(np.zeros(SEQ_LENGTH + 1, np.int64), 0)
    with pytest.raises(CheckpointError, match=message):
        reference.greedy(IDS[:20], SEQ_LENGTH - 19)


def test_a_model_without_either_formula_has_one_at_every_length(tmp_path: Path) -> None:
    config = {**CONFIG, "use_logn_attn": False, "use_dynamic_ntk": False}
    with open_checkpoint(save_folder(tmp_path, config=config)) as checkpoint:
        reference = Reference(checkpoint)
    ids = np.random.default_rng(0).integers(0, VOCAB, 100)
    np.testing.assert_allclose(reference.logits(ids, 90), Statement(make_weights(), config).logits(ids)[90:], atol=1e-4)


def test_a_quantized_folder_is_unpacked_by_the_second_reader(tmp_path: Path) -> None:
    weights: dict[str, Any] = dict(make_weights())
    plain: dict[str, Any] = dict(weights)
    for layer in range(LAYERS):
        module = f"transformer.h.{layer}.attn.c_attn"
        codes = random_codes(*weights.pop(f"{module}.weight").shape, seed=layer)
        weights |= {f"{module}.{part}": array for part, array in gptq(codes).items()}
        plain[f"{module}.weight"] = codes.values
    config = {**CONFIG, "quantization_config": gptq_config()}
    with open_checkpoint(save_folder(tmp_path, weights, config=config)) as checkpoint:
        reference = Reference(checkpoint)
    assert reference.read_by == BY_SECOND
    np.testing.assert_allclose(reference.logits(IDS, 0), Statement(plain).logits(IDS.tolist()), atol=1e-4)


def test_random_weights_have_one(tmp_path: Path) -> None:
    with open_checkpoint(save_folder(tmp_path)) as checkpoint:
        config = checkpoint.config
    reference = Reference(RandomCheckpoint(config))
    assert reference.read_by == BY_US
    assert reference.logits(IDS, 0).shape == (SEQ_LENGTH, VOCAB)


def test_of_a_model_that_takes_images_it_is_the_decoder(seeing: tuple[SeeingModel, Path]) -> None:
    model = seeing[0]
    ids = np.random.default_rng(0).integers(0, model.config["vocab_size"], 100)
    with open_checkpoint(model.folder) as checkpoint:
        reference = Reference(checkpoint)
        random = Reference(RandomCheckpoint(checkpoint.config))
    assert (reference.read_by, random.read_by) == (BY_TRANSFORMERS, BY_US)
    np.testing.assert_allclose(reference.logits(ids, 99)[0], model.logits(ids.tolist()), atol=1e-4)
    assert np.abs(random.logits(ids, 99)[0] - model.logits(ids.tolist())).max() > 0.1


def test_a_tensor_of_no_place_is_named(tmp_path: Path) -> None:
    with open_checkpoint(save_folder(tmp_path)) as checkpoint:
        save_folder(tmp_path, {**make_weights(), "transformer.h.0.attn.gate": np.ones(3, np.float32)})
        with pytest.raises(CheckpointError, match=r"has no tensor 'transformer.h.0.attn.gate'"):
            Reference(checkpoint)


def test_code_of_the_checkpoint_is_never_run(tmp_path: Path) -> None:
    """Not even where somebody says yes to every question of transformers'."""
    mark = tmp_path / "executed"
    config = {**CONFIG, "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}}
    folder = save_folder(tmp_path / "model", config=config)
    (folder / "configuration_qwen.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    script = (
        "import sys\n"
        "from qwen_aot.engines.verify.reference import Reference\n"
        "from qwen_aot.exporter.checkpoint.open import open_checkpoint\n"
        "with open_checkpoint(sys.argv[1]) as checkpoint:\n"
        "    print(Reference(checkpoint).read_by)\n"
    )
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, BY_TRANSFORMERS), done.stderr
    assert not mark.exists()
