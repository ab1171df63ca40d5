from __future__ import annotations

import json
import logging
import mmap
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.safetensors import INDEX_NAME, SINGLE_NAME, SafetensorsFile, SafetensorsShards
from tests.checkpoints import save_tiny

GOOD_HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F16", "shape": [16, 4], "data_offsets": [32, 160]},
}
DATA = np.random.default_rng(0).integers(0, 256, 160, dtype=np.uint8).tobytes()


def file_bytes(header: Any = GOOD_HEADER, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(folder: Path, content: bytes) -> Path:
    path = folder / SINGLE_NAME
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard_size", [None, 20_000], ids=["single", "sharded"])
def test_reads_what_the_safetensors_library_reads(dtype: str, shard_size: int | None, tmp_path: Path) -> None:
    save_tiny(tmp_path, dtype=dtype, shard_size=shard_size, layers=1)
    reference: dict[str, torch.Tensor] = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        reference |= load_file(path)
    shards = SafetensorsShards(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shard_size is not None)
    assert set(shards.tensors) == set(reference)
    for name, tensor in reference.items():
        array = shards.read(name)
        assert array.shape == tuple(tensor.shape) == shards.tensors[name].shape
        assert array.dtype == shards.tensors[name].dtype
        assert array.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        assert array.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
    shards.close()


def test_rows_are_views_of_the_file(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path, file_bytes()))
    whole = file.read("c")
    part = file.read("c", slice(3, 7))
    assert part.shape == (4, 4)
    assert part.tobytes() == whole[3:7].tobytes()
    assert not part.flags.writeable
    assert np.shares_memory(whole, part)
    assert file.read("c", slice(14, 99)).shape == (2, 4)
    file.drop_pages()
    assert part.tobytes() == whole[3:7].tobytes()
    del whole, part
    file.close()


def test_span_points_at_the_bytes(tmp_path: Path) -> None:
    content = file_bytes()
    file = SafetensorsFile(write(tmp_path, content))
    span = file.tensors["b.weight"].span
    assert span is not None
    assert content[span.offset : span.offset + span.length] == DATA[24:32]
    assert span.path == tmp_path / SINGLE_NAME
    file.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and pages are dropped on Linux only")
def test_reading_much_does_not_stay_in_memory(tmp_path: Path) -> None:
    rows = 1 << 20  # 256 MiB of float32 in 16 tensors
    save_file({f"t{i}": torch.ones(rows * 4) for i in range(16)}, tmp_path / SINGLE_NAME)
    file = SafetensorsFile(tmp_path / SINGLE_NAME)
    before = resident_bytes()
    grown = 0
    for name in file.tensors:
        assert float(file.read(name).max()) == 1.0
        grown = max(grown, resident_bytes() - before)
    assert grown < 150 << 20  # 64 MiB of older pages and one tensor of 16 MiB, and the allocator's slack
    file.close()


def test_a_closed_file_keeps_living_views(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path, file_bytes()))
    view = file.read("a")
    file.close()
    assert view.tobytes() == DATA[:24]
    with pytest.raises(CheckpointError, match="was closed; open the checkpoint again"):
        file.read("a")


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return GOOD_HEADER | {name: GOOD_HEADER[name] | fields}


BROKEN = {
    "empty": (b"", "is empty"),
    "short": (b"\x00" * 7, "is not a safetensors file, or is truncated: of its 7 bytes"),
    "huge header": (struct.pack("<Q", 1 << 60) + b"{}", "the header would take 1152921504606846976"),
    "header of 0": (struct.pack("<Q", 0) + b"{}", "the header would take 0"),
    "truncated in header": (file_bytes()[:40], "or is truncated"),
    "not an object": (file_bytes(b"[1,2]"), "doesn't start with '{'"),
    "not JSON": (file_bytes(b"{'a': 1}"), "header is not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "header is not valid JSON"),
    "deep": (file_bytes(b'{"a":' * 100_000), "header is not valid JSON"),
    "twice": (file_bytes(b'{"a": {}, "a": {}}'), "'a' appears twice"),
    "entry": (file_bytes({"a": 1}), "entry 'a' must hold exactly dtype, shape and data_offsets"),
    "extra field": (file_bytes(changed("a", extra=1)), "entry 'a' must hold exactly"),
    "dtype": (
        file_bytes(changed("a", dtype="I32")),
        "tensor 'a' has dtype 'I32'; accepted: F64, F32, F16, BF16",
    ),
    "dtype type": (file_bytes(changed("a", dtype=["F32"])), r"has dtype \['F32'\]"),
    "shape": (
        file_bytes(changed("a", shape=[2, -3])),
        r"tensor 'a' has shape \[2, -3\]; accepted: a list of sizes",
    ),
    "bool shape": (file_bytes(changed("a", shape=[True, 6])), r"has shape \[True, 6\]"),
    "shape product": (
        file_bytes(changed("a", shape=[2, 4])),
        r"'a' of shape \[2, 4\] and float32 takes 32 bytes, but its span 0..24 has 24",
    ),
    "offsets": (
        file_bytes(changed("a", data_offsets=[0])),
        r"has data_offsets \[0\]; accepted: \[begin, end\]",
    ),
    "negative offset": (
        file_bytes(changed("a", data_offsets=[-24, 0])),
        r"has data_offsets \[-24, 0\]; accepted: \[begin, end\]",
    ),
    "huge offset": (
        file_bytes(changed("c", data_offsets=[32, 10**30])),
        "'c' lies at 32..1000000000000000000000000000000 of 160 data bytes",
    ),
    "digits": (file_bytes(b'{"a": ' + b"9" * 10_000 + b"}"), "header is not valid JSON"),
    "backwards": (
        file_bytes(changed("a", data_offsets=[24, 0])),
        "tensor 'a' lies at 24..0 of 160 data bytes",
    ),
    "outside": (file_bytes(changed("c", data_offsets=[40, 168])), "'c' lies at 40..168 of 160 data bytes"),
    "overlap": (file_bytes(changed("b.weight", data_offsets=[16, 24])), "'b.weight' at 16..24 overlaps"),
    "hole": (
        file_bytes(changed("c", data_offsets=[40, 168]), DATA + b"\0" * 8),
        "'c' at 40..168 leaves a hole before it",
    ),
    "trailing": (file_bytes(data=DATA + b"\0"), "has 1 bytes that no tensor owns"),
    "truncated data": (file_bytes()[:-1], "truncated or damaged"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_refuses_a_broken_file(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(write(tmp_path, content))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors can't be read: No such file"):
        SafetensorsFile(tmp_path / "gone.safetensors")


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is not a regular file"):
        SafetensorsShards(tmp_path)


def check_same_or_refused(content: bytes, folder: Path) -> None:
    """Every tensor that is still there under its name is the same, or the file is refused."""
    try:
        file = SafetensorsFile(write(folder, content))
    except CheckpointError:
        return
    for name in set(file.tensors) & set(GOOD_HEADER):
        begin, end = GOOD_HEADER[name]["data_offsets"]
        array = file.read(name)
        assert array.shape == tuple(GOOD_HEADER[name]["shape"])
        assert array.dtype == {"a": np.float32, "b.weight": ml_dtypes.bfloat16, "c": np.float16}[name]
        assert array.tobytes() == DATA[begin:end]
        del array
    file.close()


HEADER_BYTES = len(file_bytes()) - len(DATA)


@settings(deadline=None, max_examples=400)
@given(position=st.integers(0, HEADER_BYTES - 1), value=st.integers(0, 255))
def test_any_corrupt_header_byte(position: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(file_bytes())
    content[position] = value
    check_same_or_refused(bytes(content), tmp_path_factory.mktemp("corrupt"))


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-10, 200), st.integers(), st.floats(), st.text(max_size=4)),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=2),
    max_leaves=5,
)


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(["a", "b.weight", "c", "new"]),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "extra", None]),
    value=JSON_VALUES,
)
def test_any_corrupt_header_field(
    name: str, field: str | None, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header = dict(GOOD_HEADER)
    header[name] = value if field is None else dict(header.get(name, {})) | {field: value}
    if name in GOOD_HEADER and field == "shape" and isinstance(value, list):
        return  # [3, 2] for [2, 3] is a sound file; single bytes can't do that
    check_same_or_refused(file_bytes(header), tmp_path_factory.mktemp("corrupt"))


@settings(deadline=None, max_examples=100)
@given(length=st.integers(0, len(file_bytes()) - 1))
def test_any_truncation_is_refused(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(CheckpointError):
        SafetensorsFile(write(tmp_path_factory.mktemp("truncated"), file_bytes()[:length]))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_tiny(tmp_path, shard_size=40_000, layers=1)
    return tmp_path


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"shard {shard.name} is missing from .*Present: model-00001"):
        SafetensorsShards(sharded)


def test_a_tensor_the_index_puts_elsewhere_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0].name
    edit_index(sharded, lambda index: index["weight_map"].update({"ghost": shard}))
    with pytest.raises(CheckpointError, match=rf"tensor 'ghost' is not in {shard}, where {INDEX_NAME} says it is"):
        SafetensorsShards(sharded)


def test_a_tensor_the_index_forgot_is_named(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"tensor 'model\.norm\.weight' of .* is not listed in"):
        SafetensorsShards(sharded)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=rf"is in two shards: {first.name} and {second.name}"):
        SafetensorsShards(sharded)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", 3, None], ids=repr
)
def test_an_index_never_leaves_its_folder(shard: Any, sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": shard}))
    with pytest.raises(CheckpointError, match=r"puts tensor 'model\.norm\.weight' in .*; accepted: the plain name"):
        SafetensorsShards(sharded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"weight_map":' * 100_000, "is not valid JSON"),
        ("[]", 'no "weight_map" object'),
        ('{"weight_map": {}}', 'no "weight_map"'),
    ],
)
def test_a_broken_index(text: str, message: str, sharded: Path) -> None:
    (sharded / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsShards(sharded)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    with pytest.raises(CheckpointError, match=rf"and no {INDEX_NAME}; accepted: {SINGLE_NAME}, or shards"):
        SafetensorsShards(sharded)


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(file_bytes())
    shards = SafetensorsShards(tmp_path)
    assert set(shards.tensors) == {"a", "b.weight", "c"}
    shards.close()


def test_two_sets_of_weights_are_refused(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    (sharded / SINGLE_NAME).write_bytes(file_bytes())
    with pytest.raises(
        CheckpointError, match=rf"two sets of weights: {SINGLE_NAME}, and {shard.name}, .*move the other"
    ):
        SafetensorsShards(sharded)


def test_an_index_whose_shards_are_gone_is_named_and_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, file_bytes())
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with caplog.at_level(logging.WARNING):
        shards = SafetensorsShards(tmp_path)
    assert set(shards.tensors) == {"a", "b.weight", "c"}
    shards.close()
    assert f"{INDEX_NAME} names shards that aren't there and is not read: {SINGLE_NAME} is" in caplog.text


def test_an_index_of_one_file_is_checked(tmp_path: Path) -> None:
    write(tmp_path, file_bytes())
    index = {"weight_map": dict.fromkeys(("a", "b.weight", "c"), SINGLE_NAME)}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    SafetensorsShards(tmp_path).close()
    edit_index(tmp_path, lambda index: index["weight_map"].pop("a"))
    with pytest.raises(CheckpointError, match=r"tensor 'a' of .* is not listed in"):
        SafetensorsShards(tmp_path)


def test_an_index_of_another_name(sharded: Path) -> None:
    (sharded / INDEX_NAME).rename(sharded / "weights.safetensors.index.json")
    shards = SafetensorsShards(sharded)
    assert "model.norm.weight" in shards.tensors
    shards.close()
    (sharded / "more.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"several indexes: more\.safetensors\.index\.json, weights"):
        SafetensorsShards(sharded)


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        ("model-00009-of-00009.safetensors", "WARNING", "model-00009-of-00009.safetensors is not read, as in transf"),
        ("model.fp16.safetensors", "WARNING", "model.fp16.safetensors is not read, as in transformers"),
        ("consolidated.safetensors", "INFO", "consolidated.safetensors not read: the same weights by other names"),
    ],
)
def test_files_that_are_not_read_are_named(
    name: str, level: str, message: str, sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (sharded / name).write_bytes(file_bytes())
    with caplog.at_level(logging.INFO):
        shards = SafetensorsShards(sharded)
    assert "a" not in shards.tensors
    shards.close()
    (record,) = caplog.records
    assert record.levelname == level
    assert message in record.getMessage()


def test_mistrals_file_is_not_the_only_one_beside_another(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(file_bytes())
    (tmp_path / "consolidated.safetensors").write_bytes(file_bytes({"z": GOOD_HEADER["a"]}, DATA[:24]))
    shards = SafetensorsShards(tmp_path)
    assert set(shards.tensors) == {"a", "b.weight", "c"}
    shards.close()


def test_headers_are_hashed(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    again = tmp_path_factory.mktemp("again")
    save_tiny(again, shard_size=40_000, layers=1)
    other = tmp_path_factory.mktemp("other")
    save_tiny(other, shard_size=40_000, layers=2)
    hashes = []
    for folder in (sharded, again, other):
        shards = SafetensorsShards(folder)
        hashes.append(shards.header_sha256)
        shards.close()
    assert hashes[0] == hashes[1] != hashes[2]
