"""Whatever a file that somebody else wrote holds, a reader gives what it reads or an error that a user can act on.

Files that are right, damaged at a few places: bytes of binary ones, keys and values of JSON. .ci/deep tries many more.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qwen_aot.errors import DeployError
from qwen_aot.exporter.checkpoint.hf.config import parse
from qwen_aot.exporter.checkpoint.hf.tokenizer import read_tokenizer_files
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.bundle.manifest import Manifest
from qwen_aot.runtime.generation.config import GenerationDefaults
from qwen_aot.runtime.text.chat_template import ChatTemplate
from tests.checkpoints import CHATML, save_tiny, tiny_config, tiny_model
from tests.gguf_files import save_gguf
from tests.quantized_files import (
    awq,
    awq_config,
    compressed_tensors,
    compressed_tensors_config,
    gptq,
    gptq_config,
    random_codes,
    save_quantized,
)
from tests.runtime.toys import make_manifest
from tests.shared import once

pytestmark = pytest.mark.fuzz

Json = Any
VOCAB = 300

junk: st.SearchStrategy[Json] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30])
    | st.floats()
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(document: Json) -> list[tuple[Json, Any]]:
    """(container, key) of every value below a document."""
    found: list[tuple[Json, Any]] = []
    keys = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in keys:
        found += [(document, key), *places(value)]
    return found


@st.composite
def changed(draw: st.DrawFn, document: Json) -> Json:
    """A copy with one to three values replaced, removed, moved or added."""
    result = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        found = places(result)
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        change = draw(st.sampled_from(["replace", "remove", "move", "add"]))
        if change == "replace":
            container[key] = draw(junk)
        elif change == "remove":
            del container[key]
        elif change == "move":
            source, name = draw(st.sampled_from(found))
            container[key] = copy.deepcopy(source[name]) if name in keys_of(source) else None
        elif isinstance(container, dict):
            container[draw(st.text(max_size=6))] = draw(junk)
        else:
            container.append(draw(junk))
    return result


def keys_of(container: Json) -> Any:
    return container.keys() if isinstance(container, dict) else range(len(container))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes, one to four times overwritten, cut out, inserted or cut short, more often near the beginning."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = draw(st.sampled_from([min(64, len(result)), min(4096, len(result)), len(result)]))
        at = draw(st.integers(0, end))
        few = draw(st.binary(max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff" * 4, b"\0" * 4, b"\x7f"]))
        change = draw(st.sampled_from(["overwrite", "remove", "insert", "truncate"]))
        if change == "overwrite":
            result[at : at + len(few)] = few
        elif change == "remove":
            del result[at : at + draw(st.integers(1, 64))]
        elif change == "insert":
            result[at:at] = few
        else:
            del result[at:]
    return bytes(result)


def survives(read: Callable[[], object]) -> None:
    """What a user can act on is raised, or nothing; anything else is a fault of the reader."""
    try:
        read()
    except DeployError as error:
        assert str(error).strip()


quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
MANIFEST = json.loads((Path(__file__).parent / "golden" / "manifests.json").read_text())
VALID = [json.loads(case["text"]) for case in MANIFEST["cases"] if case["accepted"]]


@pytest.fixture(scope="module")
def checkpoint(shared_folder: Path) -> Mapping[str, bytes]:
    """The files of a tiny model with experts and a tokenizer, and of the same model as GGUF."""

    def make(folder: Path) -> dict[str, bytes]:
        save_tiny(folder / "model", with_tokenizer=True, layers=1, hidden=16, heads=2, kv_heads=1, vocab=VOCAB, moe={})
        save_gguf(folder / "model.gguf", tiny_model(tiny_config(layers=1, hidden=32, vocab=8)), "qwen2")
        return {path.name: path.read_bytes() for path in [*(folder / "model").iterdir(), folder / "model.gguf"]}

    return once(shared_folder / "hostile_input", make)


def open_whole(path: Path) -> None:
    with open_checkpoint(path) as opened:
        for name, info in opened.tensors.items():
            opened.read(name)
            if info.encoding is not None and info.encoding.form is not None:
                opened.read_encoded(name)


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@quick
@given(data=st.data())
def test_gguf(data: st.DataObject, checkpoint: Mapping[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data.draw(damaged(checkpoint["model.gguf"])))
    survives(lambda: open_whole(path))


@quick
@given(data=st.data())
def test_safetensors(data: st.DataObject, checkpoint: Mapping[str, bytes], tmp_path: Path) -> None:
    content = data.draw(damaged(checkpoint["model.safetensors"]))
    write(tmp_path, {"config.json": checkpoint["config.json"], "model.safetensors": content})
    survives(lambda: open_whole(tmp_path))


@quick
@given(data=st.data())
def test_safetensors_header(data: st.DataObject, checkpoint: Mapping[str, bytes], tmp_path: Path) -> None:
    whole = checkpoint["model.safetensors"]
    size = int.from_bytes(whole[:8], "little")
    header = json.dumps(data.draw(changed(json.loads(whole[8 : 8 + size])))).encode()
    content = len(header).to_bytes(8, "little") + header + whole[8 + size :]
    write(tmp_path, {"config.json": checkpoint["config.json"], "model.safetensors": content})
    survives(lambda: open_whole(tmp_path))


@quick
@given(data=st.data())
def test_config(data: st.DataObject, checkpoint: Mapping[str, bytes]) -> None:
    config, generation = (json.loads(checkpoint[name]) for name in ("config.json", "generation_config.json"))
    survives(lambda: parse(data.draw(changed(config)), data.draw(changed(generation))))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, bytes]]:
    """The files of a tiny quantized model of each format."""
    small: dict[str, Any] = {"hidden": 16, "heads": 2, "kv_heads": 1, "intermediate": 16, "vocab": 8}
    formats: dict[str, tuple[Any, Any]] = {
        "gptq": (gptq_config(group_size=8, sym=False, dynamic={"x": {"bits": 8}}, meta={"quantizer": "x:1"}), gptq),
        "awq": (awq_config(group_size=8, modules_to_not_convert=["lm_head"]), awq),
        "compressed-tensors": (
            compressed_tensors_config({"group_size": 8, "symmetric": False, "actorder": "group"}),
            partial(compressed_tensors, symmetric=False, act_order=True),
        ),
    }
    files = {}
    for name, (config, pack) in formats.items():
        make = partial(random_codes, group_size=8, symmetric=False)
        folder = tmp_path_factory.mktemp(name)
        save_quantized(folder, config, pack, make=make, zero_biases=name == "gptq", **small)
        open_whole(folder)
        files[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files


FORMATS = ["gptq", "awq", "compressed-tensors"]


@quick
@given(data=st.data())
@pytest.mark.parametrize("name", FORMATS)
def test_quantization_config(
    name: str, data: st.DataObject, quantized: Mapping[str, Mapping[str, bytes]], tmp_path: Path
) -> None:
    """In config.json, and in a file beside it that may say something else."""
    config = json.loads(quantized[name]["config.json"])
    beside = data.draw(st.none() | changed(config["quantization_config"]))
    config["quantization_config"] = data.draw(changed(config["quantization_config"]))
    files = dict(quantized[name]) | {"config.json": json.dumps(config).encode()}
    other = tmp_path / "quantize_config.json"
    other.unlink(missing_ok=True)
    if beside is not None:
        other.write_text(json.dumps(beside))
    write(tmp_path, files)
    survives(lambda: open_whole(tmp_path))


@quick
@given(data=st.data())
@pytest.mark.parametrize("name", FORMATS)
def test_shapes_of_quantized_tensors(
    name: str, data: st.DataObject, quantized: Mapping[str, Mapping[str, bytes]], tmp_path: Path
) -> None:
    """Tensors of other shapes and types, under their own names and others', or none: a sound file of a wrong model."""
    (tmp_path / "sound.safetensors").write_bytes(quantized[name]["model.safetensors"])
    tensors: dict[str, Any] = load_file(tmp_path / "sound.safetensors")
    (tmp_path / "sound.safetensors").unlink()
    for _ in range(data.draw(st.integers(1, 3))):
        chosen = data.draw(st.sampled_from(sorted(tensors)))
        change = data.draw(st.sampled_from(["remove", "replace", "swap", "rename", "content"]))
        array = tensors[chosen]
        if change == "remove":
            del tensors[chosen]
        elif change == "replace":
            shape = data.draw(st.lists(st.integers(0, 20), max_size=3))
            dtype = data.draw(st.sampled_from([np.int32, np.int64, np.float16, np.float32, np.uint8]))
            tensors[chosen] = np.zeros(shape, dtype)
        elif change == "swap":
            other = data.draw(st.sampled_from(sorted(tensors)))
            tensors[chosen], tensors[other] = tensors[other], array
        elif change == "rename":
            tensors[data.draw(st.sampled_from(sorted(tensors))) + data.draw(st.sampled_from(["", ".x"]))] = array
        elif array.size:
            bits = np.iinfo(np.int8)
            filled = np.full(array.nbytes, data.draw(st.integers(bits.min, bits.max)), np.int8)
            tensors[chosen] = filled.view(array.dtype).reshape(array.shape)
        if not tensors:
            return
    save_file(tensors, tmp_path / "model.safetensors")
    write(tmp_path, {"config.json": quantized[name]["config.json"]})
    survives(lambda: open_whole(tmp_path))


@quick
@given(data=st.data())
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_of_quantized_tensors(
    name: str, data: st.DataObject, quantized: Mapping[str, Mapping[str, bytes]], tmp_path: Path
) -> None:
    content = data.draw(damaged(quantized[name]["model.safetensors"]))
    write(tmp_path, {"config.json": quantized[name]["config.json"], "model.safetensors": content})
    survives(lambda: open_whole(tmp_path))


@quick
@given(data=st.data())
def test_tokenizer_files(data: st.DataObject, checkpoint: Mapping[str, bytes], tmp_path: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    files = {name: json.dumps(data.draw(changed(json.loads(checkpoint[name])))).encode() for name in names}
    write(tmp_path, files)
    survives(lambda: read_tokenizer_files(tmp_path, vocab_size=VOCAB))


@quick
@given(data=st.data())
def test_generation_config_of_a_bundle(data: st.DataObject, checkpoint: Mapping[str, bytes]) -> None:
    document = data.draw(changed(json.loads(checkpoint["generation_config.json"])))
    survives(lambda: GenerationDefaults.from_document(document, make_manifest()))


@quick
@given(data=st.data())
def test_manifest(data: st.DataObject) -> None:
    document = data.draw(st.sampled_from(VALID))
    survives(lambda: Manifest.from_json(json.dumps(data.draw(changed(document)))))


@quick
@given(data=st.data())
def test_chat_template(data: st.DataObject) -> None:
    source = data.draw(damaged(CHATML.encode())).decode("utf-8", "replace")
    messages = [{"role": data.draw(st.text(max_size=4)), "content": data.draw(st.text(max_size=9))}]
    survives(lambda: ChatTemplate(source, {"eos_token": "</s>"}).render(messages))


def test_a_reader_with_a_fault_is_noticed() -> None:
    """What is judged here is the class of the error."""

    def read() -> None:
        raise KeyError("hidden_size")

    with pytest.raises(KeyError):
        survives(read)
