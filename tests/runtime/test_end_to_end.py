"""A bundle from disk to text over ONNX Runtime, and memory over many generations."""

import gc
import hashlib
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from qwen_aot.errors import BundleError, EngineMismatchError, GenerationError
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.bundle.load import Bundle, load_bundle
from qwen_aot.runtime.bundle.manifest import FileEntry, IoTensor, VisionEngine, WeightEncodings
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.generator import Generator, _with_rows
from qwen_aot.runtime.generation.request import Request
from tests.runtime.fakes import FakeEngine
from tests.runtime.texts import GOLDEN, golden_tokenizer
from tests.runtime.toys import (
    ALL_INPUTS,
    VOCAB_SIZE,
    checksum,
    checksum_model,
    io_tables,
    make_manifest,
    with_text_engine,
    write_bundle,
)

VOCABULARY = 400  # of the model; the tokenizer has fewer, as in Qwen


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The checksum model with a tokenizer whose ids fit its vocabulary, and greedy defaults."""
    inputs, outputs = io_tables(ALL_INPUTS, "float32", vocab_size=VOCABULARY)
    document = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    document["added_tokens"] = []
    texts = {"tokenizer.json": json.dumps(document), "generation_config.json": '{"max_new_tokens": 12}'}
    manifest = make_manifest(inputs=inputs, outputs=outputs, vocab_size=VOCABULARY, max_batch=2)
    model = checksum_model(inputs, outputs, VOCABULARY)
    return write_bundle(tmp_path / "bundle", model, manifest, texts)


def continuation(prompt: list[int], count: int) -> list[int]:
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(checksum(sequence))
    return sequence[len(prompt) :]


def test_text_from_a_bundle(path: Path) -> None:
    tokenizer = golden_tokenizer()
    prompts = ["Hello, world!", "naïve", "a", "b c d"]
    with Generator.open(path, threads=1) as generator:
        completions = generator.generate(prompts)
        streamed = list(generator.stream([Request("naïve", generator.defaults.resolve())]))
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.token_ids) == continuation(tokenizer.encode(prompt), 12)
        assert completion.text == tokenizer.decode(completion.token_ids)
    assert len(streamed) == 13 and streamed[-1].token_ids == completions[1].token_ids  # type: ignore[union-attr]


def test_fewer_rows_than_the_bundle_has(path: Path) -> None:
    with Generator.open(path, threads=1) as generator:
        expected = [completion.token_ids for completion in generator.generate(["Hello", "naïve", "a"])]
    with Generator.open(path, threads=1, rows=1) as generator:
        assert generator.engine.manifest.max_batch == 1 and len(generator.engine.cache_length) == 1
        assert [completion.token_ids for completion in generator.generate(["Hello", "naïve", "a"])] == expected
    for wrong in (0, 3, True, 1.5):
        with pytest.raises(GenerationError, match=r"rows is .*; accepted: 1 to 2, the bundle's own"):
            Generator.open(path, rows=wrong)  # type: ignore[arg-type]


def test_rows_of_an_engine_that_was_compiled_for_them(path: Path) -> None:
    bundle = load_bundle(path)
    files = {**bundle.manifest.files, "engine.plan": FileEntry(0, "0" * 64)}
    compiled = with_text_engine(replace(bundle.manifest, files=files), file="engine.plan")
    with pytest.raises(GenerationError, match="rows is 1, and this engine was compiled for 2"):
        _with_rows(Bundle(path, compiled), 1)
    assert _with_rows(Bundle(path, compiled), 2).manifest.max_batch == 2


def as_snapshot(path: Path, cache: Path) -> Path:
    """The bundle in a hub's cache, its weights in a data file of their own: a folder of links to blobs."""
    manifest = load_bundle(path).manifest
    onnx.save(
        onnx.load(path / "model.onnx"),
        path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=256,  # shapes must stay in the graph
    )
    assert (path / "model.onnx.data").stat().st_size > 0
    contents = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    files = {name: FileEntry(len(content), hashes[name]) for name, content in contents.items()}
    contents["manifest.json"] = replace(manifest, files=files).to_json().encode()
    blobs, snapshot = cache / "models--me--tiny/blobs", cache / "models--me--tiny/snapshots/0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, content in contents.items():
        blob = hashlib.sha256(content).hexdigest()
        (blobs / blob).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_a_hubs_snapshot_gives_the_same_text(path: Path, tmp_path: Path) -> None:
    with Generator.open(path, threads=1) as generator:
        expected = generator.generate(["naïve"])[0]
    snapshot = as_snapshot(path, tmp_path / "cache")
    with Generator.open(snapshot, threads=1, skip_hash_above=0) as generator:
        found = generator.generate(["naïve"])[0]
    assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
    blob = (snapshot / "model.onnx.data").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(BundleError, match=r"model\.onnx\.data is damaged or was changed"):
        Generator.open(snapshot, skip_hash_above=0)


def test_a_bundle_with_a_vision_engine_runs_text_alone(path: Path) -> None:
    with Generator.open(path, threads=1) as generator:
        expected = generator.generate(["naïve"])[0].token_ids
    manifest = load_bundle(path).manifest
    (path / "vision.onnx").write_bytes(b"nobody opens it")
    entry = FileEntry(15, hashlib.sha256(b"nobody opens it").hexdigest())
    pixels = IoTensor("pixel_values", "float16", ("B", 3, 448, 448))
    rows = IoTensor("image_embeddings", "float16", ("B", 256, 16))
    encodings = WeightEncodings(kept={}, requantized={})
    vision = VisionEngine("vision.onnx", "fp16", {}, encodings, None, (pixels,), (rows,), None, None, max_batch=2)
    engines, files = replace(manifest.engines, vision=vision), {**manifest.files, "vision.onnx": entry}
    written = replace(manifest, engines=engines, files=files)
    (path / "manifest.json").write_text(written.to_json(), encoding="utf-8")
    assert load_bundle(path).manifest.engines.vision == vision
    with Generator.open(path, threads=1) as generator:
        assert generator.generate(["naïve"])[0].token_ids == expected


def test_a_generator_that_was_closed_says_so(path: Path) -> None:
    with Generator.open(path, threads=1) as generator:
        *_, answer = generator.stream([Request([1, 2, 3], generator.defaults.resolve(), keep_cache=True)])
        request = Request([1, 2, 3, *answer.token_ids, 4], generator.defaults.resolve(), keep_cache=True)  # type: ignore[union-attr]
    for _ in range(2):  # the second finds nothing kept
        with pytest.raises(GenerationError, match="the engine is closed; open the bundle again"):
            list(generator.stream([request]))


def test_an_engine_of_an_unknown_kind(path: Path) -> None:
    bundle = load_bundle(path)
    manifest = make_manifest(files={"engine.xyz": FileEntry(0, "0" * 64), "model.onnx": FileEntry(0, "0" * 64)})
    other = Bundle(bundle.path, with_text_engine(manifest, file="engine.xyz"))
    with pytest.raises(EngineMismatchError, match=r"engine is 'engine\.xyz' for target 'cpu'"):
        open_engine(other)


def test_python_memory_is_flat_over_a_thousand_generations() -> None:
    engine = FakeEngine(make_manifest(max_batch=2, max_context=60))
    generator = Generator(engine)
    config = GenerationConfig(max_new_tokens=4, temperature=1.0, repetition_penalty=1.1, seed=1, logprobs=2, n=2)

    def generate(times: int) -> None:
        for i in range(times):
            prompts = [[i % VOCAB_SIZE], [1, 2, 3]]
            list(generator.stream([Request(prompt, config, keep_cache=i % 2 == 0) for prompt in prompts]))
            engine.prefills.clear()
            engine.decodes.clear()

    generate(50)
    gc.collect()
    tracemalloc.start()
    generate(500)
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 64 << 10  # bytes: 64 a request, less than any object
