"""A bundle that takes images, in C: text alone, and it is said so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.capi.client import Generator, Library, Model
from tests.runtime.capi.engines import Dialog, NativeEngine
from tests.runtime.capi.native import Native
from tests.vl_checkpoints import VOCAB, SeeingModel

Seeing = tuple[SeeingModel, Path]


@pytest.fixture
def model(library: Library, onnxruntime: Path, seeing: Seeing) -> Iterator[Model]:
    with Model(library, seeing[1], threads=1, onnxruntime=onnxruntime) as opened:
        yield opened


def test_text_is_the_statements(model: Model, seeing: Seeing) -> None:
    prompts = [[3, 4, 5], [(7 * place) % 256 for place in range(300)]]  # the second one beyond seq_length
    with Generator(model) as generator:
        numbers = [generator.submit(prompt, temperature=0.0, ignore_eos=1, max_new_tokens=6) for prompt in prompts]
        outputs = generator.run()
    for number, prompt in zip(numbers, prompts, strict=True):
        assert list(outputs[number, 0].token_ids) == seeing[0].greedy(prompt, [], 6)


def test_it_says_that_the_bundle_sees(model: Model) -> None:
    assert model.fact("HAS_VISION") == 1


def test_steps_of_all_shapes(native: Native, onnxruntime: Path, seeing: Seeing) -> None:
    """No token of any step stands for an image: each is as wide as its own table says."""
    text = np.array([(5 * place) % 256 for place in range(60)])
    with Dialog(native.program("engine")) as dialog:
        dialog.want("open", engines=1, threads=1, bundle=str(seeing[1]), onnxruntime=str(onnxruntime))
        engine = NativeEngine(dialog, 2, VOCAB)
        engine.prefill(0, text[:50])
        engine.prefill(1, text[:3])
        for place in range(50, 60):
            logits = engine.decode(0, np.array([text[place], -1]))
        np.testing.assert_allclose(
            logits[0], seeing[0]._as_text(list(text), [])[0].logits(list(text), 50)[-1], atol=2e-3
        )
