"""Split GGUF files, as the gguf package splits them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import tiny_config, tiny_model
from tests.gguf_files import save_gguf

Writer = gguf.GGUFWriter


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in one file, and split: a first part without tensors, and four with some."""
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_model(tiny_config(layers=2, kv_heads=2, tied=True))
    save_gguf(folder / "whole.gguf", model, "llama", kind=gguf.GGMLQuantizationType.Q4_1)

    class Splitting(Writer):  # type: ignore[misc]
        def __init__(self, path: Path, arch: str) -> None:
            super().__init__(path, arch, split_max_tensors=6, small_first_shard=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Splitting)
        save_gguf(folder / "split.gguf", model, "llama", kind=gguf.GGMLQuantizationType.Q4_1)
    return folder


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("split-*.gguf"))


def copies(saved: Path, folder: Path) -> list[Path]:
    return [Path(shutil.copy(path, folder)) for path in parts(saved)]


@pytest.mark.parametrize("number", [0, 2, -1])
def test_any_part_opens_the_whole_model(number: int, saved: Path) -> None:
    assert len(parts(saved)) == 5
    with open_checkpoint(parts(saved)[number]) as split, open_checkpoint(saved / "whole.gguf") as whole:
        assert split.name == split.source["path"] == "split.gguf"
        assert split.config == whole.config
        assert set(split.tensors) == set(whole.tensors)
        for name in whole.tensors:
            assert split.read(name, slice(1, 9)).tobytes() == whole.read(name, slice(1, 9)).tobytes(), name
        assert len({info.span.path for info in split.tensors.values() if info.span}) > 1


def test_all_headers_are_hashed(saved: Path, tmp_path: Path) -> None:
    copied = copies(saved, tmp_path)
    with open_checkpoint(copied[0]) as first, open_checkpoint(parts(saved)[3]) as other:
        assert first.source["sha256"] == other.source["sha256"]
        before = first.source["sha256"]
    content = bytearray(copied[-1].read_bytes())
    position = content.index(b"blk.") + len("blk.")  # a tensor of another layer
    content[position : position + 1] = b"9"
    copied[-1].write_bytes(content)
    with open_checkpoint(copied[0]) as changed:
        assert changed.source["sha256"] != before


def test_missing_parts_are_named(saved: Path, tmp_path: Path) -> None:
    copied = copies(saved, tmp_path)
    copied[1].unlink()
    copied[3].unlink()
    with pytest.raises(
        CheckpointError, match=r"lacks 2 of 5 parts: split-00002-of-00005\.gguf, split-00004-of-00005\.gguf; download"
    ):
        open_checkpoint(copied[4])


def test_a_renamed_part_is_refused(saved: Path, tmp_path: Path) -> None:
    copied = copies(saved, tmp_path)
    with pytest.raises(CheckpointError, match=r"says that it is one of 5 parts, which its name doesn't; .*--merge"):
        open_checkpoint(copied[0].rename(tmp_path / "model.gguf"))


def test_parts_that_changed_places_are_refused(saved: Path, tmp_path: Path) -> None:
    copied = copies(saved, tmp_path)
    copied[1].rename(tmp_path / "x")
    copied[2].rename(copied[1])
    (tmp_path / "x").rename(copied[2])
    with pytest.raises(CheckpointError, match=r"split-00002-of-00005\.gguf: split\.no is 2, but .* say 1"):
        open_checkpoint(copied[0])


def part(path: Path, number: int, count: Any, total: int, *tensors: str, **facts: Any) -> None:
    writer = Writer(path, "llama")
    writer.add_uint16("split.no", number)
    if isinstance(count, str):
        writer.add_string("split.count", count)
    else:
        writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", total)
    for name in tensors:
        writer.add_tensor(name, np.zeros(32, np.float32))
    for key, value in facts.items():
        writer.add_string(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"total": 3, "tensors": ("b",)}, r"split\.tensors\.count is 3, but the name and the first part say 2"),
        ({"count": 3, "tensors": ("b",)}, r"split\.count is 3, but the name and the first part say 2"),
        ({"tensors": ("a",)}, "tensor 'a' is in two parts: m-00001-of-00002.gguf and m-00002-of-00002.gguf"),
        ({"tensors": ("b", "c")}, r"split\.tensors\.count is 2, but the 2 parts have 3 tensors"),
    ],
)
def test_parts_that_do_not_fit_are_refused(second: dict[str, Any], message: str, tmp_path: Path) -> None:
    part(tmp_path / "m-00001-of-00002.gguf", 0, 2, 2, "a")
    part(tmp_path / "m-00002-of-00002.gguf", 1, second.get("count", 2), second.get("total", 2), *second["tensors"])
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize("count", ["x", 60_000])
def test_a_count_that_is_none(count: Any, tmp_path: Path) -> None:
    part(tmp_path / "m-00001-of-00002.gguf", 0, count, 2, "a")
    with pytest.raises(CheckpointError, match=r"split\.count is .*; accepted: 1 to 1000"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


def test_a_name_like_a_parts_does_not_make_one(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    shutil.copy(saved / "whole.gguf", path)
    open_checkpoint(path).close()


def test_a_folder_names_the_first_parts(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"give one of them: split-00001-of-00005\.gguf, whole\.gguf$"):
        open_checkpoint(saved)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    part(tmp_path / "lora.gguf", 0, 1, 1, "a", general__type="adapter")
    with pytest.raises(CheckpointError, match=r"lora\.gguf: this is an adapter .*llama-export-lora"):
        open_checkpoint(tmp_path / "lora.gguf")
