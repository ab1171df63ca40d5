"""A bundle whose manifest is of format version 1 does what it did."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.manifest import Engines
from qwen_aot.runtime.generation.generator import Generator
from tests.checkpoints import save_tiny

# What version 1 had, by its own page: docs/bundle.md of that time.
OF_THE_BUNDLE = ("model", "target", "max_context", "max_batch", "prefill_chunk", "tool_versions", "files")
OF_THE_ENGINE = ("precision", "quantization", "cache_dtype", "inputs", "outputs", "profiles", "tensorrt")


def as_version_1(document: dict[str, Any]) -> dict[str, Any]:
    """The manifest as the builder of that time would have written it."""
    engine = document["engines"]["text"]
    return {
        "format_version": 1,
        **{key: document[key] for key in OF_THE_BUNDLE},
        **{key: engine[key] for key in OF_THE_ENGINE},
        "engine": engine["file"],
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("version_1")
    save_tiny(folder / "tiny-model", with_tokenizer=True)
    spec = BuildSpec(precision=Precision.INT4, block_size=16, max_context=128)
    return build_bundle(folder / "tiny-model", spec, folder / "bundle").out


def answers(bundle: Path, kernels: str | None = None) -> list[tuple[tuple[int, ...], str | None]]:
    with Generator.open(bundle, threads=1, kernels=kernels) as generator:
        config = generator.defaults.resolve(temperature=0, max_new_tokens=8, ignore_eos=True)
        return [(answer.token_ids, answer.text) for answer in generator.generate(["a b", "naïve"], config)]


def test_it_opens_and_generates_the_same(bundle: Path) -> None:
    path = bundle / "manifest.json"
    before, now = answers(bundle, "onnxruntime"), load_bundle(bundle).manifest
    written = path.read_text(encoding="utf-8")
    try:
        path.write_text(json.dumps(as_version_1(json.loads(written))), encoding="utf-8")
        text = dataclasses.replace(now.engines.text, weight_hashes=None, kernels=None)  # version 1 had none
        files = dataclasses.replace(now.text, compiled_tokenizer=None, compiled_chat_template=None)  # nor these
        assert load_bundle(bundle).manifest == dataclasses.replace(now, engines=Engines(text, None), text=files)
        assert answers(bundle) == before  # by the only kernels that it names
    finally:
        path.write_text(written, encoding="utf-8")
    assert all(len(ids) == 8 and text for ids, text in before)


@pytest.mark.parametrize("key", [*OF_THE_BUNDLE, *OF_THE_ENGINE, "engine"])
def test_every_key_of_it_is_needed(bundle: Path, key: str, tmp_path: Path) -> None:
    document = as_version_1(json.loads((bundle / "manifest.json").read_text(encoding="utf-8")))
    del document[key]
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=rf"\(format version 1\) has no keys \['{key}'\]; accepted: exactly"):
        load_bundle(tmp_path)
