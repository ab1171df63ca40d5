"""Images over the doubles of CUDA and TensorRT: both engines side by side, against the statements."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from qwen_aot.errors import EngineMismatchError, GenerationError
from qwen_aot.runtime.backends.tensorrt.vision import TensorRtVision
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.vision.pictures import open_picture
from tests.doubles.bundles import add_vision, export_tensorrt_bundle
from tests.doubles.gpu import Gpu
from tests.doubles.install import installed
from tests.vl_checkpoints import SMALL, SeeingModel, noise, png

FIRST, SECOND = png(noise(90, 130, 1)), png(noise(112, 112, 2))
FLAVOURS = ("tensorrt_rtx", "tensorrt")


@pytest.fixture(scope="module")
def bundles(seeing: tuple[SeeingModel, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("seeing")
    made = {}
    for flavour in FLAVOURS:
        out = folder / flavour
        export_tensorrt_bundle(
            seeing[0].folder, out, flavour, max_context=700, max_batch=2, prefill_chunk=100, logits_rows=3
        )
        add_vision(out, seeing[0].folder, flavour)
        made[flavour] = out
    return made


def square(content: bytes) -> np.ndarray:
    return open_picture(content).square(SMALL.image_size)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_answers_are_the_statements(seeing: tuple[SeeingModel, Path], bundles: dict[str, Path], flavour: str) -> None:
    parts = [{"type": "image", "image": FIRST}, {"type": "image", "image": SECOND}, {"type": "text", "text": "cat"}]
    with installed(Gpu()), Generator.open(bundles[flavour]) as generator:
        text = generator.generate([3, 4, 5], max_new_tokens=4, temperature=0, ignore_eos=True)
        request = generator.chat_request(
            [{"role": "user", "content": parts}], max_new_tokens=6, temperature=0, ignore_eos=True
        )
        completions = [generator._run([request])[0][0] for _ in range(2)]
        blind = generator.generate([3, 4, 5], max_new_tokens=4, temperature=0, ignore_eos=True)
    images = [(image.start, square(content)) for image, content in zip(request.images, (FIRST, SECOND), strict=True)]
    expected = seeing[0].greedy(list(request.prompt), images, 6)  # type: ignore[arg-type]
    assert [list(completion.token_ids) for completion in completions] == [expected, expected]
    assert completions[1].cached_tokens > 500
    assert list(text.token_ids) == list(blind.token_ids) == seeing[0].greedy([3, 4, 5], [], 4)


def test_runs_of_several_images(seeing: tuple[SeeingModel, Path], bundles: dict[str, Path]) -> None:
    pixels = np.stack([square(FIRST), square(SECOND)])
    with installed(Gpu()):
        vision = TensorRtVision(load_bundle(bundles["tensorrt_rtx"]))
        assert (vision.image_size, vision.rows, vision.width, vision.max_images) == (112, 256, 128, 2)
        both, second, first = vision.encode(pixels), vision.encode(pixels[1:]), vision.encode(pixels[:1])
        np.testing.assert_allclose(both, seeing[0].rows(list(pixels)), atol=1e-4)
        np.testing.assert_allclose(np.concatenate([first, second]), both, atol=1e-5)
        for wrong in (np.zeros((3, 112, 112, 3), np.uint8), pixels[:0], pixels[:, 1:]):
            with pytest.raises(GenerationError, match=r"accepted: 1 to 2 images of \[112, 112, 3\]"):
                vision.encode(wrong)
        vision.close()
        vision.close()
        with pytest.raises(GenerationError, match="the engine is closed"):
            vision.encode(pixels)


def test_every_failing_call_is_an_error_and_leaves_nothing(bundles: dict[str, Path]) -> None:
    """Each call of a run of the engine fails once; the GPU is empty at the end, which `installed` looks at."""
    bundle = load_bundle(bundles["tensorrt_rtx"])
    pixels = square(FIRST)[None]
    for call in ("execute_async_v3", "cudaMemcpyAsync", "cudaStreamSynchronize", "set_input_shape"):
        gpu = Gpu()
        with installed(gpu):
            vision = TensorRtVision(bundle)
            gpu.fail(call)
            with pytest.raises(GenerationError):
                vision.encode(pixels)
            vision.close()


def test_a_table_that_the_decoder_doesnt_take(bundles: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundles["tensorrt_rtx"], copy)
    text = (copy / "manifest.json").read_text(encoding="utf-8")
    (copy / "manifest.json").write_text(text.replace('"pixels"', '"voxels"'), encoding="utf-8")
    with installed(Gpu()), Generator.open(copy) as generator:
        with pytest.raises(EngineMismatchError, match=r"the vision engine has voxels float32 .*; accepted: pixels"):
            _ = generator.image_encoder
        assert generator.generate([3, 4], max_new_tokens=1).token_ids
