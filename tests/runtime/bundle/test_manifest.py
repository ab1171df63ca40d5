"""manifest.json: strict in, the same out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.manifest import (
    DTYPES,
    FORMAT_VERSION,
    FileEntry,
    IoTensor,
    Manifest,
    ModelFacts,
    PluginFacts,
    Profile,
    TensorRtFacts,
)
from tests.runtime.toys import io_tables, make_manifest

GOLDEN = Path(__file__).parents[2] / "golden" / "manifests.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]

names = st.text(min_size=1, max_size=12)
positive = st.integers(1, 2**31 - 1)
safe_names = st.from_regex(r"[a-z0-9_]{1,8}(/[a-z0-9_]{1,8})?(\.[a-z]{1,4})?", fullmatch=True)
entries = st.builds(FileEntry, st.integers(0, 2**50), st.from_regex(r"[0-9a-f]{64}", fullmatch=True))
tensors = st.builds(
    IoTensor,
    names,
    st.sampled_from(DTYPES),
    st.lists(st.one_of(st.integers(1, 4096), st.sampled_from("BSCW")), max_size=4).map(tuple),
)
profiles = st.tuples(names, st.integers(1, 99), st.integers(0, 99)).map(lambda t: Profile(t[0], t[1], t[1] + t[2]))
models = st.builds(
    ModelFacts,
    name=st.text(),
    model_type=st.text(),
    num_parameters=positive,
    vocab_size=positive,
    num_hidden_layers=positive,
    num_attention_heads=positive,
    num_key_value_heads=positive,
    head_dim=positive,
    max_position_embeddings=positive,
    bos_token_id=st.none() | st.integers(0, 10**6),
    eos_token_ids=st.lists(st.integers(0, 10**6), max_size=3).map(tuple),
    pad_token_id=st.none() | st.integers(0, 10**6),
    source=st.dictionaries(st.text(), st.text(), max_size=3),
)


tensorrt_facts = st.builds(
    TensorRtFacts,
    version=st.text(),
    compute_capabilities=st.lists(st.from_regex(r"[1-9][0-9]?\.[0-9]", fullmatch=True), max_size=3).map(tuple),
    hardware_compatible=st.booleans(),
    version_compatible=st.booleans(),
    has_weights=st.booleans(),
    layers=st.dictionaries(st.text(), st.integers(0, 99), max_size=3),
    weight_bytes=st.integers(0, 2**63 - 1),
    cache_bytes=st.integers(0, 2**63 - 1),
    activation_bytes_estimated=st.integers(0, 2**63 - 1),
    builder_activation_bytes=st.none() | st.integers(0, 2**63 - 1),
    onnx=st.dictionaries(st.text(), entries, max_size=2),
    plugins=st.none(),
)


def unique_tensors() -> st.SearchStrategy[tuple[IoTensor, ...]]:
    return st.lists(tensors, max_size=4, unique_by=lambda tensor: tensor.name).map(tuple)


@given(
    model=models,
    quantization=st.dictionaries(st.text(), st.integers(-(2**63), 2**63 - 1) | st.text() | st.booleans(), max_size=3),
    files=st.dictionaries(safe_names, entries, min_size=1, max_size=4),
    sizes=st.tuples(positive, positive, positive),
    inputs=unique_tensors(),
    outputs=unique_tensors(),
    profile_list=st.lists(profiles, max_size=3).map(tuple),
    tensorrt=st.none() | tensorrt_facts,
    in_engine=st.none() | st.booleans(),
    versions=st.dictionaries(st.text(), st.text(), max_size=3),
)
def test_json_round_trip(
    model: ModelFacts,
    quantization: dict[str, int | str | bool],
    files: dict[str, FileEntry],
    sizes: tuple[int, int, int],
    inputs: tuple[IoTensor, ...],
    outputs: tuple[IoTensor, ...],
    profile_list: tuple[Profile, ...],
    tensorrt: TensorRtFacts | None,
    in_engine: bool | None,
    versions: dict[str, str],
) -> None:
    if tensorrt is not None and in_engine is not None:
        name, entry = next(iter(files.items()))
        tensorrt = replace(tensorrt, plugins=PluginFacts(name, entry.sha256, in_engine, ("QwenGQA",)))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model=model,
        target="cpu",
        precision="int4",
        quantization=quantization,
        engine=next(iter(files)),
        max_context=sizes[0],
        max_batch=sizes[1],
        prefill_chunk=sizes[2],
        cache_dtype="float16",
        inputs=inputs,
        outputs=outputs,
        profiles=profile_list,
        tensorrt=tensorrt,
        tool_versions=versions,
        files=files,
    )
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert {k: type(v) for k, v in again.quantization.items()} == {k: type(v) for k, v in quantization.items()}
    assert again.to_json() == manifest.to_json()


def document() -> dict[str, Any]:
    inputs, outputs = io_tables(("input_ids", "cache_length"), "float16")
    parsed = json.loads(make_manifest(inputs=inputs, outputs=outputs, cache_dtype="float16").to_json())
    assert isinstance(parsed, dict)
    return parsed


Edit = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format_version=2), "format_version 2, this runtime reads 1: rebuild the bundle"),
        (lambda d: d.update(format_version=True), "format_version True"),
        (lambda d: d.pop("format_version"), "format_version None"),
        (lambda d: d.update(flavour=1), r"manifest.json has unknown keys \['flavour'\]"),
        (lambda d: d.pop("target"), r"manifest.json has no keys \['target'\]"),
        (lambda d: d["model"].update(size=3), r"manifest.json: model has unknown keys \['size'\]"),
        (lambda d: d.update(target=5), "manifest.json: target is 5; accepted: a string"),
        (lambda d: d.update(max_batch="4"), "max_batch is '4'; accepted: an integer"),
        (lambda d: d.update(max_batch=True), "max_batch is True; accepted: an integer"),
        (lambda d: d.update(max_batch=4.0), "max_batch is 4.0; accepted: an integer"),
        (lambda d: d.update(max_batch=0), "max_batch is 0; accepted: 1 to 2147483647"),
        (lambda d: d.update(inputs={}), "inputs is {}; accepted: a list of an object"),
        (lambda d: d["inputs"].append(3), r"inputs\[4\] is 3; accepted: an object"),
        (
            lambda d: d["inputs"][0].update(dtype="int4"),
            r"inputs\[0\]: I/O tensor 'input_ids' has dtype 'int4'",
        ),
        (
            lambda d: d["inputs"][0].update(shape=["X"]),
            "has dimension 'X'; accepted: a size of 1 to 2147483647 or one of B",
        ),
        (lambda d: d["inputs"][0].update(shape=[0]), "has dimension 0"),
        (
            lambda d: d["inputs"][0].update(shape=[1.5]),
            r"shape\[0\] is 1.5; accepted: an integer or a string",
        ),
        (lambda d: d["inputs"].append(d["inputs"][0]), "input is listed twice among input_ids"),
        (lambda d: d["model"].update(bos_token_id="x"), "bos_token_id is 'x'; accepted: an integer or null"),
        (lambda d: d["model"].update(source=[]), r"source is \[\]; accepted: an object"),
        (lambda d: d["quantization"].update(a=None), r"quantization\['a'\] is None"),
        (lambda d: d["profiles"][0].update(min_tokens=9), "allows 9 to 8 tokens"),
        (lambda d: d["files"]["model.onnx"].update(sha256="AB"), "sha256 'AB'; accepted: .*64 lower-case"),
        (lambda d: d["files"]["model.onnx"].update(bytes=-1), "file entry has bytes -1"),
        (lambda d: d.update(cache_dtype="int8"), "cache_dtype is 'int8', but 'past_key_values.0.key' is float16"),
        (lambda d: d["inputs"][2].update(shape=["B"]), r"'past_key_values.0.key' is float16 \['B'\]; accepted: .*C"),
        (lambda d: d["inputs"][2]["shape"].__setitem__(2, 1007), r"max_context \+ prefill_chunk = 1008"),
        (lambda d: d["inputs"][2]["shape"].__setitem__(2, 1008), "the cache inputs have the capacities"),
        (lambda d: d.update(engine="other.onnx"), "'other.onnx' is not among the bundle's files"),
    ],
)
def test_what_is_wrong_is_named(edit: Edit, message: str) -> None:
    changed = document()
    edit(changed)
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(changed))


@pytest.mark.parametrize("case", CASES, ids=[case["what"] for case in CASES])
def test_golden(case: dict[str, Any]) -> None:
    if case["accepted"]:
        assert json.loads(Manifest.from_json(case["text"]).to_json()) == json.loads(case["text"])
    else:
        with pytest.raises(BundleError, match=r"manifest\.json"):
            Manifest.from_json(case["text"])


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "C:x", "a\\b"])
def test_a_file_name_that_could_leave_the_folder_is_refused(name: str) -> None:
    changed = document()
    changed["files"][name] = changed["files"]["model.onnx"]
    with pytest.raises(BundleError, match="accepted: a relative path"):
        Manifest.from_json(json.dumps(changed))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[]", "holds a list; accepted: a JSON object"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ('{"format_version": 1, "x": {"b": 1, "b": 1}}', "has the key 'b' twice"),
        ('{"format_version": NaN}', "holds NaN"),
        ('{"format_version": ' + "1" * 5000 + "}", "holds the number 1{24}...; accepted: integers of 64 bits"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_text_that_is_not_a_manifest(text: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(text)


def test_every_truncation_is_refused() -> None:
    text = make_manifest().to_json().rstrip()
    for length in range(0, len(text), 37):
        with pytest.raises(BundleError, match="is not JSON"):
            Manifest.from_json(text[:length])
