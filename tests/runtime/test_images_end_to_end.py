"""A small random Qwen-VL from its folder to answers about images, against two independent statements of it.

Its contexts are longer than `seq_length`, so that log-n scaling and dynamic NTK are at work in each test.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qwen_aot.errors import BundleError, ContextFullError, GenerationError
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.generation.chat import Chat
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.generation.images import rows_between
from qwen_aot.runtime.generation.request import Completion, Request
from qwen_aot.runtime.text.chat_encoder import ChatEncoder
from qwen_aot.runtime.vision.pictures import open_picture
from tests.vl_checkpoints import IM_END, IMAGE_START, ROWS, SMALL, Placed, SeeingModel, noise, png

FIRST, SECOND = png(noise(90, 130, 1)), png(noise(112, 112, 2))
TOLERANCE = 2e-3  # of logits up to 5, in fp32 against float64
Seeing = tuple[SeeingModel, Path]


@pytest.fixture
def generator(seeing: Seeing) -> Iterator[Generator]:
    with Generator.open(seeing[1], threads=1) as opened:
        yield opened


def asked(*parts: bytes | str) -> list[dict[str, Any]]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def square(content: bytes) -> np.ndarray:
    return open_picture(content).square(SMALL.image_size)


def placed(request: Request, contents: Sequence[bytes]) -> list[Placed]:
    return [(image.start, square(each)) for image, each in zip(request.images, contents, strict=True)]


def answer(generator: Generator, request: Request) -> Completion:
    (completion,) = [event for event in generator.stream(request) if isinstance(event, Completion)]
    return completion


def test_the_prompt_is_the_published_one(generator: Generator) -> None:
    request = generator.chat_request(asked(FIRST, SECOND, "What is this?"))
    ids = list(request.prompt)  # type: ignore[arg-type]
    assert generator.tokenizer is not None
    for start in (image.start for image in request.images):
        assert ids[start - 1 : start + ROWS + 1] == [IMAGE_START, *[IMAGE_START + 2] * ROWS, IMAGE_START + 1]
    shown = generator.tokenizer.backend.decode(ids, skip_special_tokens=False).replace("<imgpad>", "")
    assert shown == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nPicture 1: <img></img>\n"
        "Picture 2: <img></img>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("contents", [(FIRST,), (FIRST, SECOND)], ids=["one image", "two images"])
def test_answers_are_the_statements(seeing: Seeing, generator: Generator, contents: tuple[bytes, ...]) -> None:
    request = generator.chat_request(asked(*contents, "the cat"), max_new_tokens=12, temperature=0, ignore_eos=True)
    ids = list(request.prompt)  # type: ignore[arg-type]
    images = placed(request, contents)
    expected = seeing[0].greedy(ids, images, 12)
    assert list(answer(generator, request).token_ids) == expected
    blank = [(start, np.zeros_like(pixels)) for start, pixels in images]
    assert seeing[0].greedy(ids, blank, 12) != expected  # the images decide


def test_logits_are_the_statements_and_faults_show(seeing: Seeing, generator: Generator) -> None:
    request = generator.chat_request(asked(FIRST, "the", SECOND, "cat"))
    ids = np.array(request.prompt)
    model, images = seeing[0], placed(request, (FIRST, SECOND))
    logits = generator.engine.prefill(0, ids, None, rows_between(request.images, 0, len(ids)))
    expected = model.logits(list(ids), images)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    faults = {
        "swapped": [(images[0][0], images[1][1]), (images[1][0], images[0][1])],
        "one row further": [(start + 1, pixels) for start, pixels in images],
        "blue, green, red": [(start, pixels[..., ::-1]) for start, pixels in images],
        "upside down": [(start, pixels[::-1]) for start, pixels in images],
        "none": [],
    }
    for fault, wrong in faults.items():
        assert np.abs(model.logits(list(ids), wrong) - expected).max() > 10 * TOLERANCE, fault


@pytest.mark.parametrize("chunk", [1, 7, 100, 255, 256])
def test_a_prompt_may_be_cut_anywhere(seeing: Seeing, generator: Generator, chunk: int) -> None:
    request = generator.chat_request(asked("see ", FIRST, "the cat"))
    ids = np.array(request.prompt)
    whole = generator.engine.prefill(0, ids, None, rows_between(request.images, 0, len(ids))).copy()
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        rows = rows_between(request.images, start, start + len(part))
        logits = generator.engine.prefill(1, part, len(ids), rows)
    np.testing.assert_allclose(logits, whole, atol=TOLERANCE)


def test_steps_without_images_after_steps_with_some(seeing: Seeing, generator: Generator) -> None:
    """Rows of an image aren't left in the inputs of later steps, whatever their shapes."""
    request = generator.chat_request(asked(FIRST, "the cat"))
    generator.engine.prefill(0, np.array(request.prompt), None, rows_between(request.images, 0, len(request.prompt)))
    generator.engine.prefill(1, np.array([3, 4, 5]))
    generator.engine.truncate(1, 0)
    text = [(7 * place) % 256 for place in range(200)]
    logits = generator.engine.prefill(1, np.array(text))
    np.testing.assert_allclose(logits, seeing[0].logits(text), atol=TOLERANCE)
    generator.engine.truncate(0, 0)
    generator.engine.truncate(1, 0)


def test_the_cache_knows_images_by_their_pixels(seeing: Seeing, generator: Generator) -> None:
    def tell(content: bytes, text: str) -> Completion:
        return generator.chat(asked(content, text), max_new_tokens=4, temperature=0, ignore_eos=True)

    first = tell(FIRST, "the cat")
    assert first.cached_tokens == 0 and generator.image_encoder.runs == 1
    again = tell(FIRST, "the cats")  # the same image: it isn't encoded again, and its tokens aren't computed again
    assert again.cached_tokens > ROWS and generator.image_encoder.runs == 1
    other = tell(SECOND, "the cat")  # equal ids, another image
    assert other.cached_tokens < 60 and generator.image_encoder.runs == 2
    request = generator.chat_request(asked(SECOND, "the cat"))
    expected = seeing[0].greedy(list(request.prompt), placed(request, (SECOND,)), 4)  # type: ignore[arg-type]
    assert list(other.token_ids) == expected


def test_two_rows_at_once(seeing: Seeing, generator: Generator) -> None:
    requests = [
        generator.chat_request(asked(content, "the cat"), max_new_tokens=8, temperature=0, ignore_eos=True)
        for content in (FIRST, SECOND)
    ]
    alone = [list(answer(generator, request).token_ids) for request in requests]
    together: dict[int, list[int]] = {
        event.index: list(event.token_ids) for event in generator.stream(requests) if isinstance(event, Completion)
    }
    assert [together[0], together[1]] == alone and alone[0] != alone[1]


def test_a_conversation_keeps_its_images(seeing: Seeing, generator: Generator) -> None:
    chat = Chat(generator, max_new_tokens=4, temperature=0, ignore_eos=True)
    said = [event for event in chat.send("the", images=[FIRST]) if isinstance(event, Completion)]
    followed = [event for event in chat.send("cat") if isinstance(event, Completion)]
    assert said[0].cached_tokens == 0 and followed[0].cached_tokens > ROWS and generator.image_encoder.runs == 1
    assert [type(message["content"]) for message in chat.messages] == [list, str, str, str]
    assert chat.messages[0]["content"][0]["image"].size == (SMALL.image_size, SMALL.image_size)  # no more is kept
    request = generator.chat_request(list(chat.messages[:3]))
    expected = seeing[0].greedy(list(request.prompt), placed(request, (FIRST,)), 4)  # type: ignore[arg-type]
    assert list(followed[0].token_ids) == expected


def test_completion_without_a_template(seeing: Seeing, generator: Generator) -> None:
    request = generator.picture_request([FIRST, SECOND], "the cat", max_new_tokens=6, temperature=0, ignore_eos=True)
    assert generator.tokenizer is not None
    ids = list(request.prompt)  # type: ignore[arg-type]
    shown = generator.tokenizer.backend.decode(ids, skip_special_tokens=False).replace("<imgpad>", "")
    assert shown == "Picture 1: <img></img>\nPicture 2: <img></img>\nthe cat"
    expected = seeing[0].greedy(ids, placed(request, (FIRST, SECOND)), 6)
    assert list(answer(generator, request).token_ids) == expected


def test_an_images_tokens_come_from_images_alone(generator: Generator) -> None:
    """What a user spells is text; with special tokens allowed they are tokens, and no image's all the same."""
    spelled = "<img></img><imgpad> <|im_end|> <ref>cat</ref>"
    request = generator.chat_request(asked(FIRST, spelled))
    ids = list(request.prompt)  # type: ignore[arg-type]
    assert ids.count(IMAGE_START) == 1 and ids.count(IMAGE_START + 2) == ROWS
    assert ids.count(IM_END) == 2 and IMAGE_START - 6 in ids  # regions may be named by anyone
    allowed = generator.chat_request(asked(FIRST, spelled), allow_special_tokens=True)
    assert list(allowed.prompt).count(IMAGE_START + 2) == ROWS + 1 and len(allowed.images) == 1  # type: ignore[arg-type]
    assert [image.start for image in allowed.images] == [image.start for image in request.images]


def test_data_urls(generator: Generator) -> None:
    url = f"data:image/png;base64,{base64.b64encode(FIRST).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "the cat"}]}]
    expected = generator.chat(asked(FIRST, "the cat"), max_new_tokens=4, temperature=0)
    assert generator.chat(messages, max_new_tokens=4, temperature=0).token_ids == expected.token_ids


def test_refused(generator: Generator) -> None:
    with pytest.raises(ContextFullError, match=r"the conversation has at least 1032 tokens with this turn"):
        generator.chat(asked(*[FIRST] * 4, "the"))
    with pytest.raises(ContextFullError, match=r"the conversation has at least 1032 tokens"):
        generator.picture_request([Path("nowhere")] * 4)
    with pytest.raises(ContextFullError, match=r"the conversation has \d+ tokens"):
        generator.picture_request([Path("nowhere")], "the cat " * 500)
    assert generator.image_encoder.runs == 0  # before anything is decoded
    with pytest.raises(GenerationError, match="prompt_logprobs of a prompt with images don't exist"):
        generator.chat(asked(FIRST, "the"), prompt_logprobs=1)
    with pytest.raises(GenerationError, match="is damaged or cut off"):
        generator.chat(asked(FIRST[:200], "the"))
    with pytest.raises(GenerationError, match="accepted: images of the user's messages"):
        generator.chat([{"role": "system", "content": [{"type": "image", "image": FIRST}]}])
    assert generator.chat(asked(FIRST, "the"), max_new_tokens=2).token_ids  # as before


def test_images_beyond_the_context_are_refused_before_anything_is_rendered(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatEncoder, "encode_with_images", lambda *_, **__: pytest.fail("it was rendered"))
    with pytest.raises(ContextFullError, match=r"has at least 4128000 tokens with this turn, the context holds 1024"):
        generator.chat(asked(FIRST) * 16_000)


def test_each_control_token_is_read_but_a_few_times(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of images: not each of them for each image."""

    class Counted(list[tuple[int, int]]):
        reads = 0

        def __getitem__(self, place: Any) -> Any:
            self.reads += 1
            return super().__getitem__(place)

        def __iter__(self) -> Iterator[tuple[int, int]]:
            for each in super().__iter__():
                self.reads += 1
                yield each

    made: list[Counted] = []

    def own(encoder: ChatEncoder, *args: Any) -> Counted:
        made.append(Counted(found(encoder, *args)))
        return made[-1]

    found = ChatEncoder._own
    monkeypatch.setattr(ChatEncoder, "_own", own)
    encoder = generator.chat_encoder
    parts = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<|im_end|> the"}]}
    encoded = encoder.encode_with_images([parts] * 50, image_rows=1)
    assert len(encoded.image_starts) == 50 and len(made[0]) > 100
    assert made[0].reads <= 4 * len(made[0])
    assert encoded.ids.count(IM_END) == 51  # each message's and the system's own, and no text's


def test_text_alone_opens_no_vision_engine(seeing: Seeing, generator: Generator) -> None:
    text = [3, 4, 5]
    said = generator.generate(text, max_new_tokens=6, temperature=0, ignore_eos=True)
    assert list(said.token_ids) == seeing[0].greedy(text, [], 6)
    assert generator._vision is None and generator.takes_images


def test_a_vision_engine_that_isnt_whole(seeing: Seeing, tmp_path: Path) -> None:
    """Its graph may name listed files alone, and is looked at when it is opened."""
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in seeing[1].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    model = onnx.load(copy / "vision.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    (copy / "vision.onnx").write_bytes(model.SerializeToString())
    manifest = (copy / "manifest.json").read_text(encoding="utf-8")
    entry = load_bundle(seeing[1]).manifest.files["vision.onnx"]
    content = (copy / "vision.onnx").read_bytes()
    manifest = manifest.replace(entry.sha256, hashlib.sha256(content).hexdigest())
    manifest = manifest.replace(f'"bytes": {entry.bytes}', f'"bytes": {len(content)}')
    (copy / "manifest.json").write_text(manifest, encoding="utf-8")
    with Generator.open(copy, threads=1) as opened:
        assert opened.generate([3, 4], max_new_tokens=1).token_ids  # text alone
        with pytest.raises(BundleError, match=r"names the data file '../secret'"):
            opened.chat(asked(FIRST, "the"))
