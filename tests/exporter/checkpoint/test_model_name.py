from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.exporter.checkpoint.model_name import file_name, folder_name, hub_snapshot, located, origin
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import save_tiny, tiny_config, tiny_model
from tests.gguf_files import save_gguf

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Qwen1.5-0.5B-Chat", "Qwen1.5-0.5B-Chat"),
        (f"hub/models--Qwen--Qwen1.5-0.5B-Chat/snapshots/{REVISION}", "Qwen1.5-0.5B-Chat"),
        (f"hub/models--gpt2/snapshots/{REVISION}", "gpt2"),
        (f"hub/models--a--b/snapshots/{REVISION}/checkpoint-500", "b-checkpoint-500"),
        (f"hub/models--a--b/snapshots/{REVISION}/bf16", "bf16"),
        ("my-sft/checkpoint-500", "my-sft-checkpoint-500"),
        ("my-sft/global_step120/checkpoint-500", "my-sft-global_step120-checkpoint-500"),
        ("qwen/transformers/0.5b-chat/1", "0.5b-chat-1"),
        (f"mine/{REVISION}", "mine"),
        ("modelscope/hub/Qwen/Qwen1___5-0___5B-Chat", "Qwen1.5-0.5B-Chat"),
        ("mine/a___b", "a___b"),
        ("checkpoint-best", "checkpoint-best"),
    ],
)
def test_a_folders_model(folder: str, name: str, tmp_path: Path) -> None:
    assert folder_name(tmp_path / folder) == name


def test_the_folder_one_stands_in_has_its_name_and_a_link_the_one_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / f"models--Qwen--Qwen1.5-0.5B/snapshots/{REVISION}"
    (snapshot / "sub").mkdir(parents=True)
    (tmp_path / "mine").symlink_to(snapshot)
    (tmp_path / "7").symlink_to(snapshot)
    (tmp_path / "deep").symlink_to(snapshot / "sub")
    monkeypatch.chdir(snapshot)
    assert folder_name(Path(".")) == folder_name(Path("sub/..")) == "Qwen1.5-0.5B"
    assert folder_name(tmp_path / "mine") == "mine"
    assert folder_name(tmp_path / "7") == "Qwen1.5-0.5B"  # a link whose name says nothing
    assert folder_name(tmp_path / "deep" / "..") == "Qwen1.5-0.5B"  # as the file system goes, not as it is spelled
    assert located(tmp_path / "deep" / "..") == snapshot
    assert origin(tmp_path / "mine") == {"repository": "Qwen/Qwen1.5-0.5B", "revision": REVISION}


def test_the_root_has_a_name_too() -> None:
    assert folder_name(Path("/")) == "model"
    assert folder_name(Path("/7")) == "7"
    assert hub_snapshot(Path("/")) is None


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a/Qwen1.5-Q8_0.gguf", "Qwen1.5-Q8_0.gguf"),
        ("a/Qwen1.5-00001-of-00003.gguf", "Qwen1.5.gguf"),
        ("a/Qwen1.5-1-of-3.gguf", "Qwen1.5-1-of-3.gguf"),
    ],
)
def test_a_files_model(file: str, name: str, tmp_path: Path) -> None:
    assert file_name(tmp_path / file) == name


def cache(folder: Path, source: Path) -> Path:
    """A hub's cache with a snapshot whose files are links to blobs."""
    repository = folder / "models--Qwen--Qwen1.5-tiny"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.mark.parametrize("shard_size", [None, 40_000], ids=["single", "sharded"])
def test_a_snapshot_of_links_is_read_and_called_after_its_repository(shard_size: int | None, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "saved", shard_size=shard_size, with_tokenizer=True, layers=1)
    config = tmp_path / "saved" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "/elsewhere/somebody/elses"}))
    snapshot = cache(tmp_path, tmp_path / "saved")
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.name == checkpoint.source["path"] == "Qwen1.5-tiny"
        assert checkpoint.source["repository"] == "Qwen/Qwen1.5-tiny"
        assert checkpoint.source["revision"] == REVISION
        assert "tokenizer.json" in checkpoint.tokenizer.files
        norm = checkpoint.read("model.norm.weight")
        assert norm.tobytes() == model.model.norm.weight.detach().numpy().tobytes()
        del norm


def test_a_gguf_file_of_a_snapshot(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    save_gguf(tmp_path / "saved" / "tiny-Q8_0.gguf", tiny_model(tiny_config(layers=1)), "qwen2")
    path = cache(tmp_path, tmp_path / "saved") / "tiny-Q8_0.gguf"
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.name == "tiny-Q8_0.gguf"
        assert checkpoint.source["repository"] == "Qwen/Qwen1.5-tiny"


def test_elsewhere_nothing_is_said_of_an_origin(tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", layers=1)
    with open_checkpoint(tmp_path / "plain") as checkpoint:
        source: Any = checkpoint.source
        assert set(source) == {"format", "path", "sha256"}
