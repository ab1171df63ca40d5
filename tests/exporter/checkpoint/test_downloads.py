from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.downloads import why_missing
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import save_tiny, tiny_config, tiny_model
from tests.gguf_files import save_gguf

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 988097824\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", with_tokenizer=True, layers=1, shard_size=60_000)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "model-00001-of-*.safetensors",
    ],
)
def test_a_git_lfs_pointer_is_called_one(name: str, folder: Path) -> None:
    path = next(iter(folder.glob(name)), folder / name)
    path.write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{path.name} is a Git LFS pointer, .*git lfs pull` in .*model"):
        open_checkpoint(folder)


def test_a_gguf_file_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"a\.gguf is a Git LFS pointer"):
        open_checkpoint(tmp_path / "a.gguf")


def test_a_file_that_aria2_still_writes_looks_whole_and_is_refused(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    control = folder / f"{shard.name}.aria2"
    control.touch()
    with pytest.raises(CheckpointError, match=rf"{shard.name} isn't downloaded yet: {control.name} lies beside it"):
        open_checkpoint(folder)
    control.unlink()
    open_checkpoint(folder).close()


def test_the_same_of_a_gguf_file(tmp_path: Path) -> None:
    save_gguf(tmp_path / "a.gguf", tiny_model(tiny_config(layers=1)), "qwen2")
    (tmp_path / "a.gguf.aria2").touch()
    with pytest.raises(CheckpointError, match=r"a\.gguf isn't downloaded yet"):
        open_checkpoint(tmp_path / "a.gguf")


def missing_shard(folder: Path) -> Path:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    return shard


@pytest.mark.parametrize("place", ["", ".cache/huggingface/download"])
def test_a_missing_shard_and_its_unfinished_download(place: str, folder: Path) -> None:
    shard = missing_shard(folder)
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / place / f"{shard.name}.0123.incomplete").touch()
    with pytest.raises(
        CheckpointError, match=rf"shard {shard.name} is missing.*unfinished downloads: {shard.name}\.0123\.incomplete:"
    ):
        open_checkpoint(folder)


def test_a_snapshot_whose_blob_is_not_whole(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir()
    (blobs / "00ff.incomplete").touch()
    shard = missing_shard(snapshot)
    with pytest.raises(CheckpointError, match=r"unfinished downloads: 00ff\.incomplete"):
        open_checkpoint(snapshot)
    shard.symlink_to("../../blobs/00ff")
    with pytest.raises(CheckpointError, match=r"it is a link to \.\./\.\./blobs/00ff, which doesn't exist"):
        open_checkpoint(snapshot)


def test_downloads_of_others_are_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/x.incomplete").touch()
    (tmp_path / "a/b").mkdir(parents=True)
    assert why_missing(tmp_path / "a/b", "model.safetensors") == ""


def test_weights_that_are_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.part").touch()
    with pytest.raises(
        CheckpointError, match=r"no \.safetensors files; .*unfinished downloads: model\.safetensors\.part"
    ):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.part is an unfinished download; run the same"):
        open_checkpoint(tmp_path / "model.safetensors.part")


@pytest.mark.parametrize("name", ["big.gguf-split-a", "big.gguf.part1", "big.Q4.gguf.part02"])
def test_a_piece_of_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"is a piece of big.*\.gguf; join the pieces in order \(`cat`\) into"):
        open_checkpoint(tmp_path / name)


def test_a_finished_folder_may_hold_leftovers(folder: Path) -> None:
    (folder / "other.bin.incomplete").touch()
    with open_checkpoint(folder) as checkpoint:
        facts: Any = json.loads(checkpoint.tokenizer.files["tokenizer_config.json"])
        assert facts["eos_token"] == "<|im_end|>"
