"""Manifests: the C reader takes what the Python reader takes, and reads the same from it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.engine_entry import IoTensor, TextEngine
from qwen_aot.runtime.bundle.files import check_file_name
from qwen_aot.runtime.bundle.manifest import DTYPES, Manifest
from tests.golden import make_manifests as golden
from tests.manifests import manifest_cases
from tests.runtime.capi.native import Native, ask


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("manifest")


def read(program: Path, texts: Sequence[str | bytes]) -> list[dict[str, Any]]:
    encoded = (text.encode() if isinstance(text, str) else text for text in texts)
    return ask(program, [{"hex": text.hex()} for text in encoded])


def dimension(value: int | str) -> int:
    """A size, or the negative of a letter."""
    return -ord(value) if isinstance(value, str) else value


def tensors(table: Sequence[IoTensor]) -> list[Any]:
    return [[tensor.name, tensor.dtype, [dimension(value) for value in tensor.shape]] for tensor in table]


def or_none(value: int | None) -> int:
    return -1 if value is None else value


def kept(manifest: Manifest, format_version: int) -> dict[str, Any]:
    """What the C library keeps of a manifest, of the Python reader's."""
    text, facts, model = manifest.engines.text, manifest.engines.text.tensorrt, manifest.model
    plugins = None if facts is None else facts.plugins
    return {
        "format_version": format_version,
        "model_name": model.name,
        "num_parameters": model.num_parameters,
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.num_hidden_layers,
        "bos_token_id": or_none(model.bos_token_id),
        "pad_token_id": or_none(model.pad_token_id),
        "eos_token_ids": list(model.eos_token_ids),
        "target": manifest.target,
        "file": text.file,
        "precision": text.precision,
        "has_fast_prefill": int(bool(text.quantization.get("fast_prefill"))),
        "inputs": tensors(text.inputs),
        "outputs": tensors(text.outputs),
        "profiles": [[profile.name, profile.min_tokens, profile.max_tokens] for profile in text.profiles],
        "logits_rows": or_none(text.logits_rows),
        # Any name is taken where no input is of the cache, and means nothing there.
        "cache_dtype": text.cache_dtype if text.cache_dtype in DTYPES else "int64",
        "tensorrt": None
        if facts is None
        else {
            "version": facts.version,
            "compute_capabilities": list(facts.compute_capabilities),
            "version_compatible": int(facts.version_compatible),
            "cache_bytes": facts.cache_bytes,
            "plugins": None if plugins is None else [plugins.file, plugins.sha256, int(plugins.in_engine)],
        },
        "kernels": None if text.kernels is None else shown_kernels(text),
        "has_vision": int(manifest.engines.vision is not None),
        "max_context": manifest.max_context,
        "max_batch": manifest.max_batch,
        "prefill_chunk": manifest.prefill_chunk,
        "max_capacity": manifest.max_capacity,
        "compiled_tokenizer": manifest.text.compiled_tokenizer or "",
        "compiled_chat_template": manifest.text.compiled_chat_template or "",
        "default_max_new_tokens": or_none(manifest.default_max_new_tokens),
        "files": [[name, manifest.files[name].bytes, manifest.files[name].sha256] for name in sorted(manifest.files)],
    }


def shown_kernels(text: TextEngine) -> list[Any]:
    """What is said of the graph for own kernels, and the types of the inputs and outputs that it has."""
    assert text.kernels is not None
    chosen = text.for_kernels()
    types = [[tensor.dtype for tensor in table] for table in (chosen.inputs, chosen.outputs)]
    return [text.kernels.version, chosen.file, chosen.cache_dtype, *types]


def compare(program: Path, texts: Sequence[str]) -> list[bool]:
    """Both readers agree on each text; returns which are taken."""
    taken = []
    for text, found in zip(texts, read(program, texts), strict=True):
        try:
            manifest = Manifest.from_json(text)
        except BundleError as error:
            assert found.get("status") == 4, (text, str(error), found)
            assert found["message"].startswith("manifest.json"), found
            taken.append(False)
        else:
            assert found == kept(manifest, json.loads(text)["format_version"]), (text, found)
            taken.append(True)
    return taken


def test_golden(program: Path) -> None:
    cases = manifest_cases()
    assert compare(program, [case["text"] for case in cases]) == [case["accepted"] for case in cases]


def rich() -> dict[str, Any]:
    """A manifest in which nothing is null or empty that may be something."""
    document = copy.deepcopy(golden.BASE)
    document["files"] |= {"tokenizer.qtok": golden.FILE, "chat.qtpl": golden.FILE, "tokenizer.json": golden.FILE}
    document["files"]["model.kernels.onnx"] = golden.FILE
    document["text"] = {
        "tokenizer": "tokenizer.json",
        "compiled_tokenizer": "tokenizer.qtok",
        "compiled_chat_template": "chat.qtpl",
    }
    text = document["engines"]["text"]
    text["quantization"]["fast_prefill"] = True
    text["weight_encodings"] = {"kept": {"gguf-q8_0": 1}, "requantized": {"fp8": 2}}
    text["weight_hashes"] = {"w": golden.SHA256}
    text["tensorrt"] = golden.TENSORRT | {"plugins": golden.PLUGINS}
    text["plan"] = {"prefill": golden.STEP | {"weight_scratch": [golden.COPY]}}
    text["profiles"] = [*golden.PROFILES, {"name": "decode", "min_tokens": 1, "max_tokens": 1}]
    text["logits_rows"] = 8
    text["kernels"] = {"file": "model.kernels.onnx", "version": 1, "cache_dtype": "float32"}
    text["inputs"] = [
        *golden.INPUTS,
        {"name": "past_key_values.0.value", "dtype": "float16", "shape": ["B", 16, "C", 64]},
        {"name": "past_key_values.0.key_scale", "dtype": "float32", "shape": ["B", 16, "C"]},
        golden.POSITIONS,
    ]
    present = [{**text["inputs"][i], "name": f"present.0.{part}"} for i, part in ((1, "key"), (2, "value"))]
    text["outputs"] = [golden.LOGITS, golden.LAST_LOGITS, *present]
    document["engines"]["vision"] = golden.VISION | {
        "plan": {"encode": golden.STEP},
        "tensorrt": golden.TENSORRT | {"plugins": golden.PLUGINS},
        "weight_hashes": {"v": golden.SHA256},
    }
    document["default_max_new_tokens"] = 100
    document["model"]["bos_token_id"] = 0
    return json.loads(json.dumps(document))  # type: ignore[no-any-return]  # no part is shared with another


def fixed_capacity() -> dict[str, Any]:
    document = rich()
    for tensor in document["engines"]["text"]["inputs"][1:4]:
        tensor["shape"][2] = 33280
    return document


def without_cache() -> dict[str, Any]:
    document = rich()
    del document["engines"]["text"]["inputs"][1:4]
    return document


VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    8,
    33280,
    33279,
    151935,
    151936,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63),
    1.0,
    "",
    "x",
    "B",
    "C",
    "S",
    "BS",
    "int8",
    "float16",
    "int4",
    "8.9",
    "10.10",
    "model.onnx",
    "../x",
    "prefill",
    golden.SHA256,
    "F" * 64,
    [],
    [1],
    {},
    {"x": 1},
]
KEYS = ["", "x", "format_version", "prefill", "past_key_values.1", "a/../b", "a/b", "é", "\x00"]


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all values in a document."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*path, index))


def edits_at(value: Any) -> Iterator[tuple[str, Any]]:
    """What `edited` can do at a place with this value."""
    yield "drop", None
    for other in VALUES:
        yield "set", other
    if type(value) is int:
        yield "set", value - 1
        yield "set", value + 1
    for key in KEYS:
        yield "rename", key
        yield "copy", key
    yield "reverse", None


def edited(text: str, path: tuple[str | int, ...], edit: str, argument: Any) -> str:
    """A document with one value dropped, renamed, moved, doubled or of another type or size."""
    document = json.loads(text)
    parent = at(document, path[:-1])
    if edit == "set":
        parent[path[-1]] = argument
    elif edit == "drop":
        del parent[path[-1]]
    elif isinstance(parent, list):
        parent.reverse() if edit == "reverse" else parent.append(parent[path[-1]])
    elif edit != "reverse":
        parent[argument] = parent.pop(path[-1]) if edit == "rename" else parent[path[-1]]
    return json.dumps(document)


def at(document: Any, path: tuple[str | int, ...]) -> Any:
    """The value at a place."""
    for key in path:
        document = document[key]
    return document


def mutants(text: str, number: int, seed: int) -> list[str]:
    """So many of a document's mutants, at all places, each with some edits."""
    document = json.loads(text)
    all_edits = [(path, *edit) for path in places(document) for edit in edits_at(at(document, path))]
    return [edited(text, *edit) for edit in random.Random(seed).sample(all_edits, number)]


@pytest.mark.parametrize("number", [800, pytest.param(6000, marks=pytest.mark.deep)])
def test_every_key_mutated(program: Path, number: int) -> None:
    """At each of some 200 places what could stand there, and what couldn't."""
    for seed, base in enumerate((rich, fixed_capacity, without_cache)):
        text = json.dumps(base())
        assert compare(program, [text]) == [True]
        taken = compare(program, mutants(text, number if seed == 0 else number // 4, seed))
        assert len(taken) / 20 < sum(taken) < len(taken) / 2


def test_version_1_mutated(program: Path) -> None:
    document = golden.VERSION_1 | {"tensorrt": golden.TENSORRT | {"plugins": golden.PLUGINS}}
    assert sum(compare(program, mutants(json.dumps(document), 500, 4))) > 20


def test_two_mutations_at_once(program: Path) -> None:
    """Rules between keys: what one change breaks another may mend."""
    once = mutants(json.dumps(fixed_capacity()), 100, 5)
    sound = [text for text, is_taken in zip(once, compare(program, once), strict=True) if is_taken]
    assert any(compare(program, [twice for text in sound for twice in mutants(text, 20, 6)]))


def test_rules_between_keys(program: Path) -> None:
    """Each by the least change that breaks it, and the change beside that which doesn't."""
    text: tuple[str, ...] = ("engines", "text")
    edits: list[tuple[tuple[str | int, ...], Any, bool]] = [
        (("model", "eos_token_ids"), [0, 151935], True),
        (("model", "eos_token_ids"), [0, 151936], False),
        (("model", "bos_token_id"), -1, False),
        ((*text, "plan", "prefill", "kernels"), 12, True),
        ((*text, "plan", "prefill", "kernels"), 11, False),
        ((*text, "plan", "prefill", "layer_kernels"), [], True),
        ((*text, "plan", "prefill", "layer_kernels"), [1, 1], False),
        (("engines", "vision", "plan", "encode", "layer_kernels"), [1, 1], True),
        ((*text, "tensorrt", "plugins", "sha256"), "0" * 64, False),
        (("engines", "vision", "tensorrt", "plugins", "file"), "none", False),
        ((*text, "cache_dtype"), "float32", False),
        ((*text, "inputs", 3, "dtype"), "float16", True),
        ((*text, "inputs", 3, "dtype"), "int64", False),
        ((*text, "inputs", 1, "shape", 2), 33280, False),
        ((*text, "inputs", 4, "shape", 0), "B", False),
        ((*text, "outputs", 1, "shape", 1), 8, False),
        ((*text, "logits_rows"), 512, True),
        ((*text, "logits_rows"), 513, False),
        ((*text, "logits_rows"), 1, False),
        ((*text, "quantization", "fast_prefill"), "", True),
        (("engines", "vision", "file"), "none", False),
        (("engines", "vision", "inputs", 0, "shape"), ["B"], True),
        (("engines", "vision", "inputs", 0, "shape"), [], False),
        (("engines", "vision", "inputs", 0, "shape"), ["B", "I"], False),
        (("prefill_chunk",), 2**31 - 1, True),
        ((*text, "kernels"), None, True),
        ((*text, "kernels", "file"), "model.onnx", True),
        ((*text, "kernels", "file"), "none", False),
        ((*text, "kernels", "version"), 2**31 - 1, True),
        ((*text, "kernels", "version"), 0, False),
        ((*text, "kernels", "cache_dtype"), "int8", True),
        ((*text, "kernels", "cache_dtype"), "int64", False),
    ]
    texts = []
    for path, value, _ in edits:
        document = rich()
        at(document, path[:-1])[path[-1]] = value
        texts.append(json.dumps(document))
    assert compare(program, texts) == [accepted for _, _, accepted in edits]


def test_the_comparison_sees_a_difference(program: Path) -> None:
    """Negative control: another manifest than the one that was read."""
    (found,) = read(program, [json.dumps(rich())])
    for path, value in [(("max_batch",), 2), (("files", "chat.qtpl", "bytes"), 11), (("model", "name"), "y")]:
        document = rich()
        at(document, path[:-1])[path[-1]] = value
        assert found != kept(Manifest.from_json(json.dumps(document)), 2)


def test_file_names(program: Path) -> None:
    rng = random.Random(6)
    parts = [
        "a",
        ".",
        "..",
        "...",
        "",
        " ",
        "/",
        "/",
        "/",
        "b.onnx",
        ".onnx",
        "C:",
        "\\",
        "\x01",
        "é",
        "*",
        "\x7f",
        ".",
    ]
    names = ["".join(rng.choices(parts, k=rng.randrange(6))) for _ in range(3000)] + [
        "manifest.json",
        "a/manifest.json",
    ]
    taken = 0
    for name, (is_accepted, suffix) in zip(names, ask(program, [{"file_name": name} for name in names]), strict=True):
        try:
            check_file_name(name)
        except BundleError:
            assert not is_accepted, name
        else:
            assert is_accepted, name
            assert suffix == Path(name).suffix
            taken += 1
    assert taken > 300


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("max_batch",), "4", 'manifest.json: max_batch is "4"; accepted: an integer'),
        (("max_batch",), 0, "manifest.json: max_batch is 0; accepted: 1 to 2147483647"),
        (("default_max_new_tokens",), "1", "accepted: an integer or null"),
        (
            ("flavour",),
            1,
            "manifest.json has an unknown key 'flavour'; accepted: exactly format_version, model, target",
        ),
        (
            ("engines", "text", "inputs", 0, "dtype"),
            "int4",
            "engines: text: inputs[0]: dtype is 'int4'; accepted: int64,",
        ),
        (
            ("engines", "text", "inputs", 0, "shape", 1),
            "X",
            "inputs[0]: shape[1] is 'X'; accepted: one of B, S, C, W, T, I",
        ),
        (
            ("engines", "text", "inputs", 0, "shape", 1),
            0,
            "[1] is 0; accepted: 1 to 2147483647 or one of B, S, C, W, T, I",
        ),
        (("engines", "text", "quantization", "a"), None, "quantization['a'] is null; accepted: an integer, a string"),
        (("files", "../x"), {"bytes": 1}, "files has the key '../x'; accepted: a relative path with '/' inside"),
        (("files", "chat.qtpl", "sha256"), "AB", "['chat.qtpl']: sha256 is 'AB'; accepted: 64 lower-case hex digits"),
        (("engines", "text", "file"), "y", "engines: text: the engine file 'y' is not among the bundle's 5 files"),
        (("engines", "text", "cache_dtype"), "int8", "cache_dtype is 'int8', but 'past_key_values.0.key' is float16"),
        (
            ("engines", "text", "kernels", "cache_dtype"),
            "int64",
            "kernels: cache_dtype is 'int64'; accepted: float32, f",
        ),
        (
            ("engines", "text", "kernels", "file"),
            "y",
            "engines: text: the graph for own kernels 'y' is not among the b",
        ),
        (
            ("engines", "text", "kernels", "more"),
            1,
            "kernels has an unknown key 'more'; accepted: exactly file, version,",
        ),
        (("engines", "text", "more"), 1, "has an unknown key 'more'; accepted: exactly file, precision, quantization,"),
        (
            ("target",),
            "cuda",
            "text: the bundle's target is 'cuda', and there are kernels, a graph for own CPU kernels; accepted: with ",
        ),
        (("max_context",), 1.5, "manifest.json: max_context is 1.5; accepted: an integer"),
        (("format_version",), 3, "manifest.json has format_version '3', this library reads 1 and 2: rebuild"),
        (
            ("engines", "text", "logits_rows"),
            None,
            "logits_rows is -1 (-1: null), and the output last_logits is float32[B, T, 151936]; accepted: float32[B, ",
        ),
        (("engines", "text", "outputs", 1, "name"), "logits", "engines: text: the output 'logits' is listed twice"),
    ],
)
def test_what_a_refusal_says(program: Path, path: tuple[str | int, ...], value: Any, message: str) -> None:
    document = rich()
    at(document, path[:-1])[path[-1]] = value
    (found,) = read(program, [json.dumps(document)])
    assert message in found["message"], found
