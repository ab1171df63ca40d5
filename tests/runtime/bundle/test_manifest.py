"""manifest.json: strict in, the same out."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.manifest import (
    DTYPES,
    FORMAT_VERSION,
    Engines,
    FileEntry,
    IoTensor,
    Manifest,
    MatrixProduct,
    ModelFacts,
    PlanTensor,
    PluginFacts,
    Profile,
    StepPlan,
    TensorRtFacts,
    TextEngine,
    TextFiles,
    VisionEngine,
    WeightEncodings,
)
from qwen_aot.runtime.bundle.step_plan import PRODUCT_DTYPES
from tests.manifests import manifest_cases
from tests.runtime.toys import io_tables, make_manifest

LAYERS = 2
words = st.text(max_size=5)
names = st.text(min_size=1, max_size=5)
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
    name=words,
    model_type=words,
    num_parameters=positive,
    vocab_size=positive,
    num_hidden_layers=st.just(LAYERS),
    num_attention_heads=positive,
    num_key_value_heads=positive,
    head_dim=positive,
    max_position_embeddings=positive,
    bos_token_id=st.none() | st.just(0),  # in any vocabulary
    eos_token_ids=st.lists(st.just(0), max_size=3).map(tuple),
    pad_token_id=st.none() | st.just(0),
    source=st.dictionaries(words, words, max_size=3),
)


sizes = st.integers(0, 2**63 - 1)
tensorrt_facts = st.builds(
    TensorRtFacts,
    version=words,
    compute_capabilities=st.lists(st.from_regex(r"[1-9][0-9]?\.[0-9]", fullmatch=True), max_size=3).map(tuple),
    hardware_compatible=st.booleans(),
    version_compatible=st.booleans(),
    has_weights=st.booleans(),
    layers=st.dictionaries(words, st.integers(1, 99), max_size=3),
    weight_bytes=sizes,
    cache_bytes=sizes,
    activation_bytes_estimated=sizes,
    builder_activation_bytes=st.none() | sizes,
    onnx=st.dictionaries(safe_names, entries, max_size=2),
    plugins=st.none(),
)
encodings = st.dictionaries(words, positive, max_size=2)
plan_tensors = st.lists(st.builds(PlanTensor, words, words, st.none() | sizes, positive), max_size=2).map(tuple)
dtype = st.sampled_from(PRODUCT_DTYPES)
products = st.lists(st.builds(MatrixProduct, words, dtype, dtype, dtype, positive), max_size=2).map(tuple)


def unique(of: st.SearchStrategy[IoTensor]) -> st.SearchStrategy[tuple[IoTensor, ...]]:
    return st.lists(of, max_size=3, unique_by=lambda tensor: tensor.name).map(tuple)


tables = unique(tensors)
images = unique(st.builds(lambda name, shape: IoTensor(name, "float16", ("B", *shape)), names, st.tuples(positive)))
quantizations = st.dictionaries(words, st.integers(-(2**63), 2**63 - 1) | words | st.booleans(), max_size=3)
weight_encodings = st.builds(WeightEncodings, encodings, encodings)
weight_hashes = st.none() | st.dictionaries(words, st.text("0123456789abcdef", min_size=64, max_size=64), max_size=3)
of_layers = st.sampled_from([0, LAYERS]).flatmap(lambda n: st.lists(st.integers(0, 99), min_size=n, max_size=n))
step_plans = st.builds(
    lambda layers, others, *rest: StepPlan(sum(layers) + others, tuple(layers), *rest),
    of_layers,
    st.integers(0, 99),
    products,
    plan_tensors,
    plan_tensors,
)
file_lists = st.dictionaries(safe_names, entries, min_size=1, max_size=4)


@st.composite
def texts(draw: st.DrawFn, files: Mapping[str, FileEntry], vocab_size: int, prefill_chunk: int) -> TextEngine:
    """Without a cache: what its inputs must be has tests of its own."""
    file = draw(st.sampled_from(sorted(files)))
    facts = draw(st.none() | tensorrt_facts)
    if facts is not None and draw(st.booleans()):
        facts = replace(facts, plugins=PluginFacts(file, files[file].sha256, draw(st.booleans()), ("QwenGQA",)))
    profile_list = draw(st.lists(profiles, max_size=3, unique_by=lambda profile: profile.name).map(tuple))
    plan = {profile.name: draw(step_plans) for profile in profile_list[:1]}
    rows = draw(st.none() | st.integers(2, prefill_chunk)) if prefill_chunk > 1 else None
    last_logits = () if rows is None else (IoTensor("last_logits", "float32", ("B", "T", vocab_size)),)
    positions = () if rows is None else (IoTensor("logits_positions", "int64", ("T",)),)
    return TextEngine(
        file=file,
        precision=draw(words),
        quantization=draw(quantizations),
        weight_encodings=draw(weight_encodings),
        weight_hashes=draw(weight_hashes),
        inputs=(*draw(tables), *positions),
        outputs=(*draw(tables), *last_logits),
        tensorrt=facts,
        plan=draw(st.sampled_from([None, plan])),
        profiles=profile_list,
        cache_dtype=draw(words),
        logits_rows=rows,
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    files = draw(file_lists)
    model = draw(models)
    listed = st.none() | st.sampled_from(sorted(files))
    vision = VisionEngine(
        file=draw(st.sampled_from(sorted(files))),
        precision="fp16",
        quantization={},
        weight_encodings=WeightEncodings({}, {}),
        weight_hashes=None,
        inputs=draw(images),
        outputs=draw(images),
        tensorrt=None,
        plan=draw(st.none() | step_plans.map(lambda step: {"encode": step})),
        max_batch=draw(positive),
    )
    chunk = draw(positive)
    return Manifest(
        format_version=FORMAT_VERSION,
        model=model,
        target=draw(words),
        engines=Engines(draw(texts(files, model.vocab_size, chunk)), draw(st.sampled_from([None, vision]))),
        max_context=draw(positive),
        max_batch=draw(positive),
        prefill_chunk=chunk,
        text=TextFiles(draw(listed), draw(listed), draw(listed)),
        default_max_new_tokens=draw(st.none() | positive),
        tool_versions=draw(st.dictionaries(words, words, max_size=3)),
        files=files,
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])  # large documents, on machines under load
@given(manifest=manifests())
def test_json_round_trip(manifest: Manifest) -> None:
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    quantization = manifest.engines.text.quantization  # in which Python takes True for 1
    assert {k: type(v) for k, v in again.engines.text.quantization.items()} == {
        k: type(v) for k, v in quantization.items()
    }
    assert again.to_json() == manifest.to_json()


def document() -> dict[str, Any]:
    inputs, outputs = io_tables(("input_ids", "cache_length"), "float16")
    parsed = json.loads(make_manifest(inputs=inputs, outputs=outputs, cache_dtype="float16").to_json())
    assert isinstance(parsed, dict)
    return parsed


def text(document: dict[str, Any]) -> dict[str, Any]:
    """The text engine's entry."""
    entry = document["engines"]["text"]
    assert isinstance(entry, dict)
    return entry


KERNELS = {"file": "model.onnx", "version": 1, "cache_dtype": "float16"}
STEP = {"kernels": 3, "layer_kernels": [3], "matrix_products": [], "copies": [], "weight_scratch": []}
PRODUCT = {"name": "qkv", "left": "float16", "right": "int4", "output": "float16", "count": 1}
VISION: dict[str, Any] = {
    "file": "model.onnx",
    "precision": "fp16",
    "quantization": {},
    "weight_encodings": {"kept": {}, "requantized": {}},
    "weight_hashes": None,
    "inputs": [],
    "outputs": [],
    "tensorrt": None,
    "plan": None,
    "max_batch": 1,
}

Edit = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format_version=3), "format_version 3, this runtime reads 1 and 2: rebuild the bundle"),
        (lambda d: d.update(format_version=True), "format_version True"),
        (lambda d: d.pop("format_version"), "format_version None"),
        (lambda d: d.update(format_version=1), r"manifest.json \(format version 1\) has unknown keys \['default_max"),
        (lambda d: d.update(flavour=1), r"manifest.json has unknown keys \['flavour'\]"),
        (lambda d: d.pop("target"), r"manifest.json has no keys \['target'\]"),
        (lambda d: d["model"].update(size=3), r"manifest.json: model has unknown keys \['size'\]"),
        (lambda d: d.update(target=5), "manifest.json: target is 5; accepted: a string"),
        (lambda d: d.update(max_batch="4"), "max_batch is '4'; accepted: an integer"),
        (lambda d: d.update(max_batch=True), "max_batch is True; accepted: an integer"),
        (lambda d: d.update(max_batch=4.0), "max_batch is 4.0; accepted: an integer"),
        (lambda d: d.update(max_batch=0), "max_batch is 0; accepted: 1 to 2147483647"),
        (lambda d: d.update(default_max_new_tokens=0), "default_max_new_tokens is 0; accepted: 1 to 2147483647"),
        (lambda d: d.update(default_max_new_tokens="1"), "is '1'; accepted: an integer or null"),
        (lambda d: text(d).update(inputs={}), "inputs is {}; accepted: a list of an object"),
        (lambda d: text(d)["inputs"].append(3), r"engines: text: inputs\[4\] is 3; accepted: an object"),
        (
            lambda d: text(d)["inputs"][0].update(dtype="int4"),
            r"inputs\[0\]: I/O tensor 'input_ids' has dtype 'int4'",
        ),
        (
            lambda d: text(d)["inputs"][0].update(shape=["X"]),
            "has dimension 'X'; accepted: a size of 1 to 2147483647 or one of B",
        ),
        (lambda d: text(d)["inputs"][0].update(shape=[0]), "has dimension 0"),
        (
            lambda d: text(d)["inputs"][0].update(shape=[1.5]),
            r"shape\[0\] is 1.5; accepted: an integer or a string",
        ),
        (lambda d: text(d)["inputs"].append(text(d)["inputs"][0]), "input is listed twice among input_ids"),
        (lambda d: d["model"].update(bos_token_id="x"), "bos_token_id is 'x'; accepted: an integer or null"),
        (lambda d: d["model"].update(source=[]), r"source is \[\]; accepted: an object"),
        (lambda d: text(d)["quantization"].update(a=None), r"quantization\['a'\] is None"),
        (lambda d: text(d)["profiles"][0].update(min_tokens=9), "allows 9 to 8 tokens"),
        (lambda d: d["files"]["model.onnx"].update(sha256="AB"), "sha256 'AB'; accepted: .*64 lower-case"),
        (lambda d: d["files"]["model.onnx"].update(bytes=-1), "file entry has bytes -1"),
        (lambda d: text(d).update(cache_dtype="int8"), "cache_dtype is 'int8', but 'past_key_values.0.key' is float16"),
        (
            lambda d: text(d)["inputs"][2].update(shape=["B"]),
            r"'past_key_values.0.key' is float16 \['B'\]; accepted: .*C",
        ),
        (lambda d: text(d)["inputs"][2]["shape"].__setitem__(2, 1007), r"max_context \+ prefill_chunk = 1008"),
        (lambda d: text(d)["inputs"][2]["shape"].__setitem__(2, 1008), "the cache inputs have the capacities"),
        (lambda d: text(d).update(file="other.onnx"), "engine file 'other.onnx' is not among the bundle's files"),
        (
            lambda d: d["text"].update(compiled_tokenizer="tokenizer.qtok"),
            r"the compiled tokenizer 'tokenizer.qtok' is not among the bundle's files \(model.onnx\)",
        ),
        (
            lambda d: text(d)["weight_encodings"]["kept"].update(gptq=0),
            r"weight_encodings: kept\['gptq'\] is 0; accepted: 1 to 2147483647",
        ),
        (
            lambda d: text(d).update(logits_rows=8),
            r"logits_rows is 8, and the output 'last_logits' is absent; accepted: float32 \[B, T, 211\] with",
        ),
        (lambda d: text(d).update(logits_rows=0), "logits_rows is 0; accepted: 1 to 2147483647"),
        (lambda d: text(d).update(plan=[]), r"text: plan is \[\]; accepted: an object or null"),
        (
            lambda d: text(d).update(plan={"verify": STEP}),
            r"plan has the steps \['verify'\]; accepted: prefill, decode",
        ),
        (
            lambda d: text(d).update(plan={"decode": STEP | {"layer_kernels": [1, 1]}}),
            "layer_kernels of the step 'decode' are of 2 layers; accepted: 1, or none",
        ),
        (
            lambda d: text(d).update(plan={"decode": STEP | {"layer_kernels": [4]}}),
            "kernels is 3, and layer_kernels are 4 together; accepted: at least as many",
        ),
        (
            lambda d: text(d).update(plan={"decode": STEP | {"matrix_products": [PRODUCT | {"right": "half"}]}}),
            r"\['decode'\]: matrix_products\[0\]: right of the matrix product 'qkv' is 'half'; accepted: float32, ",
        ),
        (
            lambda d: d["engines"].update(vision=VISION | {"inputs": text(d)["inputs"][:1]}),
            r"vision engine's 'input_ids' has the shape \['B', 'S'\]; accepted: B, then sizes",
        ),
        (
            lambda d: (d.update(target="cuda"), text(d).update(kernels=KERNELS)),
            "target is 'cuda', and its text engine has kernels, .*; accepted: with target 'cpu' alone",
        ),
        (lambda d: d["engines"].pop("vision"), r"manifest.json: engines has no keys \['vision'\]"),
    ],
)
def test_what_is_wrong_is_named(edit: Edit, message: str) -> None:
    changed = document()
    edit(changed)
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(changed))


@pytest.mark.parametrize("case", manifest_cases(), ids=lambda case: case["what"])
def test_golden(case: dict[str, Any]) -> None:
    if case["accepted"]:
        expected = case.get("upgraded") or json.loads(case["text"])
        if expected["engines"]["text"].get("kernels", ...) is None:
            del expected["engines"]["text"]["kernels"]  # null is read, and the key left out when written
        assert json.loads(Manifest.from_json(case["text"]).to_json()) == expected
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
        (r'{"format_version": 1, "x": ["\ud83d"]}', r"holds \\ud83d, half of a character; accepted: pairs of them"),
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
