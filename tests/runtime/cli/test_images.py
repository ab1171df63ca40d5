"""Images on the command line: `generate --image`, boxes, `/image` of a chat, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_aot.runtime.cli import generate as module
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.vision.boxes import find_boxes
from tests.runtime.cli.conftest import Run
from tests.vl_checkpoints import SeeingModel, noise, png

Seeing = tuple[SeeingModel, Path]
GREEDY = ("--temperature", 0, "--max-new-tokens", 5, "--ignore-eos")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    path.write_bytes(png(noise(90, 130, 1)))
    return path


def test_answers_are_the_generators(run: Run, seeing: Seeing, picture: Path) -> None:
    given = ("generate", seeing[1], "--image", picture, "--image", picture, "--prompt", "the cat", *GREEDY, "--json")
    plain, chat = run(*given), run(*given, "--chat")
    assert plain.exit_code == chat.exit_code == 0, plain.stderr + chat.stderr
    with Generator.open(seeing[1]) as generator:
        options = {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True}
        request = generator.picture_request([picture, picture], "the cat", **options)
        expected = generator._run([request])[0][0]
        parts = [{"type": "image", "image": picture}] * 2 + [{"type": "text", "text": "the cat"}]
        answered = generator.chat([{"role": "user", "content": parts}], **options)
    for result, completion in ((plain, expected), (chat, answered)):
        report = json.loads(result.stdout)
        assert report["token_ids"] == list(completion.token_ids) and report["boxes"] == []
        assert report["prompt_tokens"] == completion.prompt_tokens > 512


def test_boxes_are_drawn(
    run: Run, seeing: Seeing, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small model names none; what an answer with some gives is shown with the same functions."""
    out = tmp_path / "boxes.png"
    given = ("generate", seeing[1], "--image", picture, "--prompt", "x", *GREEDY, "--draw-boxes", out)
    result = run(*given)
    assert result.exit_code == 0 and "the answer names no boxes" in result.stderr and not out.exists()
    answer = "<ref>cat</ref><box>(100,100),(900,900)</box>"
    monkeypatch.setattr("qwen_aot.runtime.vision.boxes.find_boxes", lambda _: find_boxes(answer))
    result = run(*given)
    assert result.exit_code == 0 and f"[boxes drawn onto {out}: 1]" in result.stderr
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (90, 130, 3) and not np.array_equal(drawn, np.asarray(Image.open(picture)))
    report = json.loads(run(*given, "--json").stdout)
    assert report["boxes"] == [
        {"label": "cat", "left": 100, "top": 100, "right": 900, "bottom": 900, "pixels": [13, 9, 116, 80]}
    ]
    result = run(*given[:-1], tmp_path / "nowhere" / "boxes.png")
    assert result.exit_code == 1 and "can't be written: No such file or directory" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt-ids", "1", "--image", "x.png"), "--image takes text behind it"),
        (("--prompt", "x", "--draw-boxes", "out.png"), "--draw-boxes draws onto a picture; give one with --image"),
        (("--prompt", "x", "--image", "x.png", "--draw-boxes", "out.jpg"), "accepted: a file that ends in .png"),
    ],
)
def test_options_that_dont_go_together(run: Run, seeing: Seeing, arguments: tuple[str, ...], message: str) -> None:
    result = run("generate", seeing[1], *arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_images_that_are_none(run: Run, seeing: Seeing, bundle: Path, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for name, message in (("text.png", "is no image that is known here"), ("nowhere.png", "doesn't exist")):
        result = run("generate", seeing[1], "--image", tmp_path / name, "--prompt", "x")
        assert result.exit_code == 1 and message in result.stderr
    for more in ((), ("--chat",)):
        result = run("generate", bundle, "--image", picture, "--prompt", "x", *more)
        assert result.exit_code == 1 and "has no vision engine (a bundle of Qwen-VL has one)" in result.stderr


def test_a_chat_with_pictures(run: Run, seeing: Seeing, picture: Path, tmp_path: Path) -> None:
    lines = (
        f"/image {picture}\nthe cat\n/image\n/image {tmp_path}/nowhere.png\nand\n/save {tmp_path}/chat.json\n"
        f"/image {picture}\n/clear\nthe\n"
    )
    result = run("chat", seeing[1], *GREEDY, input=lines)
    assert result.exit_code == 0, result.stderr
    for said in (f"picture 1 of the next message: {picture}, 130 x 90", "give a file: /image cat.jpg", "doesn't exist"):
        assert said.replace("\n", "") in result.stdout.replace("\n", ""), result.stdout
    messages = json.loads((tmp_path / "chat.json").read_text())
    assert messages[0]["content"] == [
        {"type": "image", "image": str(picture)},
        {"type": "text", "text": "the cat"},
    ]
    assert [type(message["content"]) for message in messages] == [list, str, str, str]


def test_a_chat_that_sees_nothing(run: Run, bundle: Path, picture: Path) -> None:
    result = run("chat", bundle, *GREEDY, input=f"/image {picture}\n")
    assert result.exit_code == 0 and "takes no images (a bundle of Qwen-VL does)" in result.stdout.replace("\n", " ")


def test_an_exported_graph_of_both_engines(run: Run, seeing: Seeing, tmp_path: Path) -> None:
    out = tmp_path / "graph"
    for source in ("qwen-vl", str(seeing[0].folder), str(seeing[0].folder)):  # each replaces the last
        result = run("export", source, "-o", out, "--json")
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["vision_graph"] == str(out / "vision.onnx") and (out / "vision.onnx").is_file()
    assert {path.name for path in out.iterdir()} == {
        *("model.onnx", "model.onnx.data", "vision.onnx", "vision.onnx.data")
    }
    (out / "vision.onnx").write_bytes((out / "vision.onnx").read_bytes() + b"\0")
    result = run("export", seeing[0].folder, "-o", out)
    assert result.exit_code == 1 and "vision.onnx" in result.stderr
    result = run("export", "qwen-vl-max", "-o", out)
    assert result.exit_code == 2 and "qwen-vl-max has no open weights" in result.stderr


def test_the_module_imports_no_pillow() -> None:
    assert "PIL" not in vars(module)
