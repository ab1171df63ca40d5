"""Streams in files: what is written is read, a kill leaves a whole file, and damage is seen."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_aot.exporter.calibration import hidden_states
from qwen_aot.exporter.calibration.hidden_states import HiddenStates
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import save_tiny

SHAPE = (5, 7, 64)
TOKENS = np.random.default_rng(0).integers(0, 131, SHAPE[:2])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A checkpoint and the embeddings of TOKENS."""
    folder = tmp_path_factory.mktemp("streams")
    model: Any = save_tiny(folder, layers=1)
    return folder, model.model.embed_tokens.weight[torch.from_numpy(TOKENS)].detach()


@pytest.fixture
def streams(saved: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HiddenStates:
    """Embedded; two sequences are computed at once, and one at the end."""
    monkeypatch.setattr(hidden_states, "_BATCH_TOKENS", 2 * SHAPE[1] + 3)
    found = HiddenStates(lambda layer: tmp_path / f"hidden-{layer}.npy", SHAPE)
    with open_checkpoint(saved[0]) as checkpoint:
        found.embed(checkpoint, TOKENS)
    return found


def all_of(streams: HiddenStates, layer: int) -> torch.Tensor:
    return torch.cat([streams.read(layer, part) for part in streams.batches()])


def test_embeddings(streams: HiddenStates, saved: tuple[Path, torch.Tensor]) -> None:
    assert torch.equal(all_of(streams, 0), saved[1])
    assert [len(range(*part.indices(5))) for part in streams.batches()] == [2, 2, 1]


def test_a_sequence_longer_than_what_is_computed_at_once(tmp_path: Path) -> None:
    streams = HiddenStates(lambda layer: tmp_path / str(layer), (3, hidden_states._BATCH_TOKENS + 1, 8))
    assert streams.batches() == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_numpy_reads_the_file(streams: HiddenStates, tmp_path: Path) -> None:
    assert np.array_equal(np.load(tmp_path / "hidden-0.npy"), all_of(streams, 0).numpy())


def test_a_step(streams: HiddenStates, tmp_path: Path) -> None:
    before = all_of(streams, 0)
    streams.advance(0, lambda part: 2 * part + 1)
    assert streams.is_there(0)
    assert streams.is_there(1)
    assert torch.equal(all_of(streams, 1), 2 * before + 1)
    streams.forget(0)
    streams.forget(0)  # once is enough
    assert not streams.is_there(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hidden-1.npy"]


def test_what_is_read_is_a_copy(streams: HiddenStates) -> None:
    streams.read(0, slice(0, 1)).zero_()
    assert all_of(streams, 0).any()


def test_a_killed_step_leaves_the_one_before(streams: HiddenStates) -> None:
    before = all_of(streams, 0)

    def killed(part: torch.Tensor) -> torch.Tensor:
        if len(part) == 1:
            raise KeyboardInterrupt
        return part

    with pytest.raises(KeyboardInterrupt):
        streams.advance(0, killed)
    assert streams.is_there(0)
    assert not streams.is_there(1)
    streams.advance(0, lambda part: part)  # over what is left of it
    assert torch.equal(all_of(streams, 1), before)


def test_a_full_disk_is_an_error(streams: HiddenStates, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a signal, as writing to a mapped file with holes would be."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full on this system")
    monkeypatch.setattr(Path, "with_name", lambda self, name: Path("/dev/full"))
    with pytest.raises(OSError) as caught:
        streams.advance(0, lambda part: part)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("place", [0, 40, 128, -40, -1], ids=["magic", "header", "numbers", "last numbers", "hash"])
def test_a_damaged_file(streams: HiddenStates, tmp_path: Path, place: int) -> None:
    path = tmp_path / "hidden-0.npy"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert not streams.is_there(0)
    content[place] ^= 1
    path.write_bytes(content)
    assert streams.is_there(0)


@pytest.mark.parametrize("length", [0, 5, 128, 5000, -1])
def test_a_truncated_file(streams: HiddenStates, tmp_path: Path, length: int) -> None:
    path = tmp_path / "hidden-0.npy"
    path.write_bytes(path.read_bytes()[:length])
    assert not streams.is_there(0)


def test_a_file_of_another_shape(streams: HiddenStates, tmp_path: Path) -> None:
    other = HiddenStates(lambda layer: tmp_path / f"hidden-{layer}.npy", (7, 5, 64))
    assert streams.is_there(0)
    assert not other.is_there(0)


def test_no_file_and_a_folder_in_its_place(streams: HiddenStates, tmp_path: Path) -> None:
    assert not streams.is_there(1)
    (tmp_path / "hidden-2.npy").mkdir()
    assert not streams.is_there(2)
