"""What rounding would change of the stream, against the change itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_aot.exporter.calibration.decoder_layer import DecoderLayer, Place, load_weights
from qwen_aot.exporter.calibration.hidden_states import HiddenStates
from qwen_aot.exporter.checkpoint.encoding import CodeForm
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.tensors import Role
from qwen_aot.exporter.rounding.grid import fit_grid
from qwen_aot.exporter.rounding.sensitivity import Sensitivity, measure
from tests.checkpoints import save_tiny

SEQUENCES, LENGTH, HIDDEN = 4, 32, 64
FOUR, EIGHT = (CodeForm(bits, 32, np.dtype(np.float16)) for bits in (4, 8))


def measured(folder: Path, place: Path) -> list[Sensitivity]:
    place.mkdir()
    tokens = np.random.default_rng(0).integers(0, 131, (SEQUENCES, LENGTH))
    with open_checkpoint(folder) as checkpoint:
        hidden = HiddenStates(lambda layer: place / f"{layer}.npy", (SEQUENCES, LENGTH, HIDDEN))
        hidden.embed(checkpoint, tokens)
        found = list(measure(checkpoint, hidden, lambda *_: (FOUR, EIGHT), LENGTH))
    assert list(place.iterdir()) == []
    return found


@pytest.mark.parametrize("role", [Role.OUTPUT, Role.DOWN])
def test_the_last_matrices_change_the_stream_by_as_much_as_is_said(tmp_path: Path, role: Role) -> None:
    save_tiny(tmp_path / "model")
    found = measured(tmp_path / "model", tmp_path / "streams")
    said = next(each for each in found if each.layer == 0 and each.reading.places[0][0] is role)
    tokens = np.random.default_rng(0).integers(0, 131, (SEQUENCES, LENGTH))
    with open_checkpoint(tmp_path / "model") as checkpoint:
        weights = load_weights(checkpoint, 0)
        embedding = torch.from_numpy(checkpoint.read(Role.EMBEDDING.tensor_name()).astype(np.float32))
        compute = DecoderLayer(checkpoint.config, LENGTH)
    seen: dict[Place, torch.Tensor] = {}
    before = compute(weights, embedding[tokens], lambda reading, x: seen.__setitem__(reading.places[0], x))
    usual = before.square().sum(-1).median()
    for form, loss in zip((FOUR, EIGHT), said.losses, strict=True):
        x, matrix = seen[role, None], weights[role, None]
        grid = fit_grid(matrix, x.square().mean(0), form)
        change = x @ (grid.values(grid.nearest(matrix)) - matrix).T
        assert loss == pytest.approx(float(change.square().sum(-1).mean() / usual), rel=1e-3)
    assert said.losses[1] < 0.02 * said.losses[0]  # 16 times as fine: 256 times less


def test_every_reading_of_every_layer_is_there_once(tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    save_tiny(tmp_path / "model", moe={"mlp_only_layers": [1], **sizes})
    found = measured(tmp_path / "model", tmp_path / "streams")
    places = [(each.layer, place) for each in found for place in each.reading.places]
    assert len(places) == len(set(places))
    assert {place[0] for layer, place in places if layer == 1} >= {Role.QUERY, Role.OUTPUT, Role.GATE, Role.DOWN}
    assert {place[0] for layer, place in places if layer == 0} >= {Role.EXPERT_GATE, Role.EXPERT_DOWN, Role.SHARED_DOWN}
    assert all(np.isfinite(each.losses).all() and min(each.losses) > 0 for each in found)
