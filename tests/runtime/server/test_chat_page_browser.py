"""The chat page in a real browser, against a whole server: by keyboard and mouse, light and dark, wide and narrow."""

from __future__ import annotations

import base64
import io
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.vision.pictures import open_picture
from tests.browser import ENTER, ESCAPE, SHIFT, TAB, Browser, browser, until
from tests.runtime.server.servers import Running, letters, rendered, running
from tests.runtime.server.test_reasoning import THINKS
from tests.vl_checkpoints import SeeingModel, noise, png

pytestmark = [pytest.mark.tools, pytest.mark.slow]
CUT = "The answer was cut at its longest"
KEY = "the-key-0123456789"
PICTURES = Path(__file__).parents[3] / "docs" / "images"
HOSTILE = (
    "Look: <img src=x onerror=alert(1)> <script>alert(2)</script> & **bold**\n"
    "```html\n<b>code</b>\n    indented\n```\n[link](javascript:alert(3))"
)


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as made:
        yield made


@pytest.fixture
def page(window: Browser) -> Iterator[Browser]:
    """At 800 by 600, light; at the end its console must be empty but for what HTTP answered."""
    window.size(800, 600)
    window.scheme("light")
    yield window
    errors = [line for line in window.log() if not re.search(r"the server responded with a status of 4\d\d", line)]
    window.open("about:blank")
    assert errors == []


def opened(page: Browser, server: Running, path: str = "/") -> None:
    page.open(server.url + path)
    page.wait("document.getElementById('status').innerText === 'Ready'")


def asked(page: Browser, text: str, end: str = "Done") -> None:
    """Sends a message by the Enter key, and waits for the end of its answer."""
    page.type("#message", text + ENTER)
    page.wait("document.getElementById('status').innerText === arguments[0]", end)


def said(page: Browser, role: str) -> list[str]:
    return page.text(f"article.{role} > div")


def test_a_conversation_by_keyboard(page: Browser) -> None:
    with running(max_context=2000, end_after=300) as server:
        opened(page, server)
        assert page.run("return document.activeElement.id") == "message"
        assert page.text("#model option") == ["toy"]
        page.type("#message", f"Hello{SHIFT}{ENTER}{SHIFT}there")
        assert page.run("return document.getElementById('message').value") == "Hello\nthere"
        page.run("document.getElementById('max_tokens').value = '20'")
        asked(page, "", CUT)
        first = letters(rendered(("user", "Hello\nthere")), 20)
        assert (said(page, "user"), said(page, "assistant")) == (["Hello\nthere"], [first])
        assert re.fullmatch(r"20 tokens, [\d.]+ tokens/s", *page.text("#speed"))  # the server's count
        asked(page, "x", CUT)
        whole = rendered(("user", "Hello\nthere"), ("assistant", first), ("user", "x"))
        assert said(page, "assistant")[1:] == [letters(whole, 20)]
        asked(page, "x" * 300, "The model answered nothing")  # it ends at once
        assert len(said(page, "user")) == 2 and page.run("return document.getElementById('message').value") == "x" * 300
        page.run("document.getElementById('message').value = ''")
        page.click("#clear")
        assert page.text("article") == [] and page.text("#speed") == [""]
        asked(page, "Again", CUT)
        assert said(page, "assistant") == [letters(rendered(("user", "Again")), 20)]


def test_settings_are_sent(page: Browser) -> None:
    with running(max_context=400) as server:
        opened(page, server)
        page.click("#settings summary")
        page.type("#system", "Be brief")
        page.type("#max_tokens", "7")
        page.type("#temperature", "0")
        asked(page, "Hi", CUT)
        assert said(page, "assistant") == [letters(rendered(("system", "Be brief"), ("user", "Hi")), 7)]
        assert page.text("#speed")[0].startswith("7 tokens")
        page.type("#temperature", "9")  # 09: beyond its range
        page.type("#message", f"More{ENTER}")
        assert page.run("return document.getElementById('temperature').matches(':invalid')")
        assert len(said(page, "user")) == 1 and page.run("return document.getElementById('message').value") == "More"


def test_what_a_model_writes_is_text(page: Browser) -> None:
    with running(max_context=2000, script=HOSTILE) as server:
        opened(page, server)
        asked(page, "Hi")
        assert page.text("article.assistant pre") == ["<b>code</b>\n    indented"]
        assert page.text("article.assistant p") == [HOSTILE.partition("\n```")[0], HOSTILE.rpartition("\n")[2]]
        inside = page.run("return [...document.querySelectorAll('article *')].map(e => e.tagName)")
        assert set(inside) == {"H2", "DIV", "P", "PRE", "CODE"}
        asked(page, "<b>I</b>", "Done")
        assert said(page, "user")[1] == "<b>I</b>"


@pytest.mark.parametrize("by", ["Escape", "the button"])
def test_stop(page: Browser, by: str) -> None:
    with running(max_context=4000) as server:
        opened(page, server)
        server.engine.gate.clear()
        page.type("#message", f"Hi{ENTER}")
        page.wait("!document.getElementById('stop').hidden && document.getElementById('send').hidden")
        assert page.run("return document.getElementById('conversation').getAttribute('aria-busy')") == "true"
        server.engine.gate.set()
        until(lambda: server.engine.steps > 20, "some tokens")
        server.engine.gate.clear()  # in the middle of the answer
        page.wait("document.querySelectorAll('article.assistant p').length && "
                  "document.querySelector('article.assistant p').innerText.length > 3")  # fmt: skip
        assert page.text("#speed")[0].startswith("about ")
        page.press(ESCAPE) if by == "Escape" else page.click("#stop")
        server.engine.gate.set()
        page.wait("document.getElementById('status').innerText === 'Stopped'")
        (kept,) = said(page, "assistant")
        assert kept and letters(rendered(("user", "Hi")), len(kept)) == kept
        model = server.lifecycle.state.loaded
        assert model is not None
        until(lambda: model.service.statistics().running == 0, "the row is free")
        assert page.run("return document.getElementById('conversation').getAttribute('aria-busy')") == "false"
        assert page.run("return document.activeElement.id") == "message"


def test_errors_are_shown_as_they_are(page: Browser) -> None:
    with running(max_context=60) as server:
        opened(page, server)
        page.type("#message", "x" * 80 + ENTER)
        page.wait("document.querySelector('article.error')")
        (shown,) = said(page, "error")
        assert "context" in shown and shown.endswith("(context_length_exceeded, HTTP 400)")
        assert page.run("return document.querySelector('article.error').getAttribute('role')") == "alert"
        assert said(page, "user") == [] and page.run("return document.getElementById('message').value") == "x" * 80
        page.run("document.getElementById('message').value = ''")
        page.run("document.getElementById('message').value = '\\u0001'")  # which this engine can't compute
        page.type("#message", ENTER)
        page.wait("document.querySelectorAll('article.error').length === 2")
        assert said(page, "error")[1].endswith("(engine_error)")  # in the stream, behind a 200


def test_a_server_that_asks_for_a_key(page: Browser) -> None:
    with running(keys=(KEY,), max_context=400) as server:
        page.open(server.url)
        page.wait("!document.getElementById('key-form').hidden")
        assert page.run("return document.activeElement.id") == "key"
        assert "(invalid_api_key, HTTP 401)" in said(page, "error")[0]
        page.type("#key", f"wrong{ENTER}")
        page.wait("document.querySelectorAll('article.error').length === 2")
        page.type("#key", KEY + ENTER)
        page.wait("document.getElementById('status').innerText === 'Ready'")
        assert page.run("return document.getElementById('key-form').hidden")
        assert page.run("return document.getElementById('key').value") == ""
        kept = page.run("return [JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]")
        assert KEY in kept[0] and kept[1:] == ["{}", ""] and KEY not in page.run("return location.href")
        page.open(server.url + "/")  # the same tab has it still
        page.wait("document.getElementById('status').innerText === 'Ready'")


def test_nothing_is_asked_of_another_place(page: Browser) -> None:
    with running(max_context=300, end_after=60) as server:
        opened(page, server)
        asked(page, "Hi")
        names = page.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert {name.removeprefix(server.url) for name in names} == {
            "/page/chat.css",
            "/page/chat.js",
            "/page/images.js",
            "/v1/models",
            "/v1/chat/completions",
        }


def test_the_policy_refuses_markup_and_code(page: Browser) -> None:
    """The negative control of the tests above: what the script doesn't do couldn't be done."""
    with running() as server:
        opened(page, server)
        refused = page.run(
            "const found = [];"
            "for (const sink of [() => { document.body.innerHTML = '<b>x</b>' }, () => document.write('x'),"
            " () => { document.createElement('script').text = '1' }]) {"
            "  try { sink(); found.push('done') } catch (error) { found.push(error.name) }"
            "}"
            "return found"
        )
        assert page.log() and refused == ["TypeError"] * 3


def test_a_thought_is_folded_above_its_answer(page: Browser) -> None:
    said = "<think>\nLet me <b>see</b>.\n\nYes.\n</think>\n\nThree."
    with running(max_context=2000, script=said, template=THINKS) as server:
        opened(page, server)
        record_requests(page)
        asked(page, "Hi")
        assert page.text("article.assistant > div") == ["Three."] and page.text("article.assistant summary") == [
            "Thought"
        ]
        assert not page.run("return document.querySelector('article.assistant details').open")
        page.click("article.assistant summary")
        assert page.text("article.assistant details p") == ["Let me <b>see</b>.\n\nYes."]
        asked(page, "And?")
        assert sent(page)[-1]["messages"][1] == {
            "role": "assistant",
            "content": "Three.",
            "reasoning_content": "Let me <b>see</b>.\n\nYes.",
        }
        page.run("document.getElementById('max_tokens').value = '12'")
        asked(page, "Cut", CUT)  # in the thought
        assert page.text("article.assistant summary") == ["Thought"] * 3
        assert page.text("article.assistant > div")[-1] == "" and not page.run(
            "return document.querySelector('article:last-child details').open"
        )


# Files in a page: what a paste or a drop brings.
FILES = """
const transfer = new DataTransfer();
for (const [name, type, bytes] of arguments[0])
  transfer.items.add(new File([Uint8Array.from(atob(bytes), c => c.charCodeAt(0))], name, {type}));
"""
PASTE = FILES + (
    "return document.getElementById('message').dispatchEvent("
    "new ClipboardEvent('paste', {clipboardData: transfer, bubbles: true, cancelable: true}))"
)
DROP = FILES + (
    "return ['dragover', 'drop'].map(kind => document.body.dispatchEvent("
    "new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true})))"
)
SMALL, LARGE = png(noise(40, 60, 1)), png(noise(900, 1300, 2))


def files(*given: tuple[str, bytes], kind: str = "image/png") -> list[list[str]]:
    return [[name, kind, base64.b64encode(content).decode()] for name, content in given]


@pytest.fixture
def seeing_server(seeing: tuple[SeeingModel, Path]) -> Iterator[Running]:
    with (
        Generator.open(seeing[1], threads=1) as generator,
        running(generator=generator, model_names=("toy",)) as server,
    ):
        yield server


def chosen(page: Browser, names: list[str]) -> None:
    """Waits until these are shown, each with a button that names it."""
    shown = "[...document.querySelectorAll('#images img')].map(e => e.complete && e.naturalWidth > 0 && e.alt).join()"
    page.wait(f"{shown} === arguments[0]", ",".join(names))
    labels = "return [...document.querySelectorAll('#images button')].map(e => e.getAttribute('aria-label'))"
    assert page.run(labels) == [f"Remove {name}" for name in names]


def test_images(page: Browser, seeing_server: Running, tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    file.write_bytes(SMALL)
    opened(page, seeing_server)
    record_requests(page)
    assert page.run("return document.getElementById('add-images').checkVisibility()")
    page.type("#files", str(file))
    chosen(page, ["cat.png"])
    assert page.run("return document.activeElement.id") == "message"
    page.run(PASTE, files(("pasted.png", SMALL)))
    chosen(page, ["cat.png", "pasted.png"])
    assert page.run(DROP, files(("large.png", LARGE))) == [False, False]  # the browser doesn't leave the page
    page.wait("document.querySelectorAll('#images img').length === 3")
    assert page.text("#images-note")[0].startswith("3 of at most ")
    assert page.text("#status") == ["1 image added"]
    page.click("#images button")
    chosen(page, ["pasted.png", "large.png"])
    assert page.text("#status") == ["cat.png removed"]
    page.run("document.getElementById('max_tokens').value = '3'")
    page.run("document.getElementById('temperature').value = '0'")
    page.type("#message", f"Which?{ENTER}")
    page.wait("!document.getElementById('send').hidden && document.querySelectorAll('article').length >= 2")
    (request,) = sent(page)
    small, large, text = request["messages"][0]["content"]
    assert text == {"type": "text", "text": "Which?"}
    kind, _, content = small["image_url"]["url"].partition(";base64,")
    exact, given = (
        np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in (base64.b64decode(content), SMALL)
    )
    assert kind == "data:image/png" and np.array_equal(exact, given)
    kind, _, content = large["image_url"]["url"].partition(";base64,")
    assert kind == "data:image/webp" and open_picture(base64.b64decode(content)).size == (1024, 709)
    assert page.text("article.error") == [] and page.text("#images li") == []
    assert page.run("return [...document.querySelectorAll('article.user img')].map(e => e.alt)") == [
        "pasted.png",
        "large.png",
    ]


def test_images_that_cant_be_sent_are_told_before(page: Browser, seeing_server: Running) -> None:
    opened(page, seeing_server)
    most = page.run("return images.most")
    assert most > 1
    given = files(("a.txt", b"text"), kind="text/plain") + files(("b.png", b"no image")) + files(("c.png", SMALL))
    page.run(DROP, given)
    chosen(page, ["c.png"])
    assert page.text("#status") == [
        "1 image added; a.txt: isn't an image; b.png: can't be read as an image: JPEG, PNG, WebP, GIF and BMP can"
    ]
    page.run(PASTE, files(*[(f"{n}.png", SMALL) for n in range(most)]))
    chosen(page, ["c.png", *(f"{n}.png" for n in range(most - 1))])
    why = f"at most {most} images fit this model's context, earlier ones included"
    wanted = f"{most - 1} images added; {most - 1}.png: {why}"
    assert page.text("#status") == [wanted]
    page.run("images.chosen = [{name: 'x', note: '', url: 'data:,' + 'a'.repeat(3.4 * 2 ** 20)}]; images.draw()")
    page.run("images.most = 99")
    page.run(PASTE, files(("more.png", png(noise(256, 300, 3)))))
    page.wait("document.getElementById('status').innerText.startsWith('more.png: the images of a conversation are')")
    page.run("images.restore([])")
    page.type("#message", "x" + ENTER)  # and without any it is a plain text
    page.wait("document.querySelector('article.user')")
    page.press(ESCAPE)


def test_a_text_that_is_copied_as_an_image_too_is_pasted_as_text(page: Browser, seeing_server: Running) -> None:
    """Office programs put both on the clipboard: the browser has to paste the text."""
    opened(page, seeing_server)
    assert page.run(PASTE, files(("c.png", SMALL))) is False  # an image alone
    chosen(page, ["c.png"])
    both = PASTE.replace("return ", "transfer.setData('text/plain', 'Table'); return ")
    assert page.run(both, files(("d.png", SMALL))) is True
    chosen(page, ["c.png"])


def test_a_message_waits_for_an_image_that_is_read(page: Browser, seeing_server: Running) -> None:
    """Two pastes, and only one of them is decoded at a time."""
    opened(page, seeing_server)
    page.run(
        "window.goOn = []; window.begun = 0; const real = window.createImageBitmap;"
        "window.createImageBitmap = file => { window.begun += 1;"
        " return new Promise(go => window.goOn.push(go)).then(() => real(file)) }"
    )
    page.run(PASTE, files(("c.png", SMALL)))
    page.run(PASTE, files(("d.png", SMALL)))
    page.wait("window.begun === 1")
    page.type("#message", f"Which?{ENTER}")
    page.wait("document.getElementById('status').innerText.startsWith('An image is still being read')")
    assert page.text("article") == [] and page.run("return document.getElementById('message').value") == "Which?"
    assert page.run("return window.begun") == 1
    page.run("window.goOn[0]()")
    page.wait("window.begun === 2")
    page.run("window.goOn[1]()")
    chosen(page, ["c.png", "d.png"])
    page.wait("!images.reading")
    page.type("#message", ENTER)
    page.wait("document.querySelectorAll('article.user img').length === 2")
    page.press(ESCAPE)


@pytest.mark.parametrize(
    "kind", ["JPEG", "JPEG upright", "PNG", "WEBP", "WEBP lossless", "WEBP with EXIF", "GIF", "BMP"]
)
def test_what_a_camera_notes_is_not_sent(page: Browser, seeing_server: Running, kind: str) -> None:
    """Where and when a picture was made isn't sent, however small it is; its sides are read from its header."""
    opened(page, seeing_server)
    name = kind.partition(" ")[0]
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "JPEG upright" else 1  # 6: turned
    exif[0x010F] = "The maker of the camera"
    options = {"exif": exif} if name in ("JPEG", "PNG") or kind == "WEBP with EXIF" else {}
    made = io.BytesIO()
    Image.fromarray(noise(30, 50, 4)).save(made, name, **options, **({"lossless": True} if "less" in kind else {}))
    assert (b"maker of the camera" in made.getvalue()) == bool(options)
    given = files(("c", made.getvalue()), kind=f"image/{name.lower()}")
    size = "return sizeOf(new DataView(Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0)).buffer))"
    assert page.run(size, given[0][2]) == [50, 30]
    assert page.run(size, base64.b64encode(made.getvalue()[:9]).decode()) is None
    page.run(PASTE, given)
    chosen(page, ["c"])
    content = base64.b64decode(page.run("return images.chosen[0].url").partition(",")[2])
    assert b"maker of the camera" not in content
    assert open_picture(content).size == ((30, 50) if kind == "JPEG upright" else (50, 30))


def test_a_picture_of_too_many_pixels_is_not_decoded(page: Browser, seeing_server: Running) -> None:
    opened(page, seeing_server)
    page.run("window.createImageBitmap = () => { throw new Error('decoded') }")
    huge = bytearray(SMALL)
    huge[16:24] = struct.pack(">II", 40_000, 40_000)
    page.run(PASTE, files(("huge.png", bytes(huge))))
    said = "huge.png: has 40000 x 40000 pixels, and at most 64 Mi are read"
    page.wait("document.getElementById('status').innerText === arguments[0]", said)


def test_a_context_that_holds_no_image(page: Browser, seeing_server: Running) -> None:
    """A button that could only lead to a refusal isn't there."""
    opened(page, seeing_server)
    entry = "{input_modalities: ['text', 'image'], image_tokens: 300, max_model_len: arguments[0]}"
    shown = "document.getElementById('add-images').checkVisibility()"
    for context, most in ((300 + 64, 1), (300 + 63, 0), (200, 0)):
        page.run(f"images.setModel({entry})", context)
        assert page.run(f"return [images.most, {shown}]") == [most, most > 0]
    page.run(PASTE, files(("c.png", SMALL)))
    page.wait("document.getElementById('status').innerText.startsWith('An image and a question are longer')")


def test_a_question_that_fails_gives_its_images_back(page: Browser, seeing_server: Running) -> None:
    opened(page, seeing_server)
    page.run(PASTE, files(("c.png", SMALL)))
    chosen(page, ["c.png"])
    page.run("images.chosen[0].url = 'data:image/png;base64,AAAA'")
    page.type("#message", f"Which?{ENTER}")
    page.wait("document.querySelector('article.error')")
    assert page.run("return images.chosen.map(each => each.name)") == ["c.png"]
    assert page.run("return document.getElementById('message').value") == "Which?"


def test_a_model_that_takes_no_images(page: Browser) -> None:
    with running(max_context=400) as server:
        opened(page, server)
        assert not page.run("return document.getElementById('add-images').checkVisibility()")
        assert page.run(DROP, files(("c.png", SMALL))) == [False, False]
        page.wait("document.getElementById('status').innerText === 'This model takes no images'")
        assert page.text("#images li") == []
        assert page.run(PASTE, files(("c.png", SMALL))) is True  # nothing is taken from the browser


def record_requests(page: Browser) -> None:
    page.run(
        "window.sent = []; const real = window.fetch;"
        "window.fetch = (path, options) => { if (options.body) window.sent.push(JSON.parse(options.body));"
        " return real(path, options); }"
    )


def sent(page: Browser) -> list[dict[str, Any]]:
    """The bodies of the requests since then."""
    found: list[dict[str, Any]] = page.run("return window.sent")
    return found


def contrast(one: list[float], other: list[float]) -> float:
    """Of two colours, as WCAG has it: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""

    def luminance(colour: list[float]) -> float:
        parts = [value / 255 for value in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_formula_of_contrast() -> None:
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast([118, 118, 118], [255, 255, 255]) == pytest.approx(4.54, abs=0.01)  # the well-known least grey


COLOURS = """
const number = text => text.match(/[\\d.]+/g).map(Number);
const back = element => {
  for (; element; element = element.parentElement) {
    const [r, g, b, a = 1] = number(getComputedStyle(element).backgroundColor);
    if (a === 1) return [r, g, b];
  }
  return [255, 255, 255];
};
return [...document.querySelectorAll('h1, label, summary, button, select, textarea, p, code, h2')]
  .filter(element => element.checkVisibility() && !element.disabled && element.className !== 'unseen')
  .map(element => [element.tagName, element.id, number(getComputedStyle(element).color).slice(0, 3), back(element)]);
"""


# What a page has whose model takes images, with some that were chosen.
PRETEND = """
images.most = 9;
const url = document.createElement('canvas').toDataURL();
images.chosen = [1, 2, 3, 4, 5].map(number => ({name: `cat${number}.png`, url, note: ''}));
document.getElementById('add-images').hidden = false;
images.draw();
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(page: Browser, scheme: str) -> None:
    with running(max_context=2000, script=f"<think>Hm.</think>{HOSTILE}", template=THINKS) as server:
        page.scheme(scheme)
        opened(page, server)
        page.click("#settings summary")
        asked(page, "Hi")
        page.click("article details summary")
        page.run(PRETEND)
        page.run("document.getElementById('key-form').hidden = false")
        found: list[Any] = page.run(COLOURS)
        assert len(found) > 15 and {"add-images", "images-note"} <= {each[1] for each in found}
        assert [each for each in found if contrast(each[2], each[3]) < 4.5] == []
        is_dark = (
            sum(page.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")) < 384
        )
        assert is_dark == (scheme == "dark")


@pytest.mark.parametrize("width", [360, 800])
def test_it_fits_and_every_control_is_reached_by_keyboard(page: Browser, width: int) -> None:
    with running(max_context=2000, script=f"<think>{'W' * 80}</think>{HOSTILE}", template=THINKS) as server:
        page.size(width, 640)
        opened(page, server)
        page.click("#settings summary")
        asked(page, "W" * 60)
        page.click("article details summary")
        page.run(PRETEND)
        assert page.run("return document.documentElement.scrollWidth") <= width
        assert page.run("return document.documentElement.scrollHeight") <= 640
        box = "const box = document.getElementById('conversation');"
        assert page.run(f"{box} return box.scrollWidth <= box.clientWidth")  # a long word is broken
        sizes = page.run(
            "return [...document.querySelectorAll('button, input, select, textarea')].filter(e => e.checkVisibility())"
            ".map(e => { const box = e.getBoundingClientRect(); return [e.id, box.left, box.right] })"
        )
        assert [each for each in sizes if each[1] < 0 or each[2] > width] == []
        reached = []
        page.run("document.activeElement.blur()")
        for _ in range(24):
            page.press(TAB)
            reached.append(page.run("return document.activeElement.id || document.activeElement.tagName"))
            outline = "return getComputedStyle(document.activeElement).outlineStyle"
            assert reached[-1] == "BODY" or page.run(outline) != "none", reached[-1]
        wanted = {"model", "clear", "SUMMARY", "system", "temperature", "top_p", "max_tokens", "conversation", "PRE"}
        assert wanted | {"message", "send", "add-images", "BUTTON"} <= set(reached)  # BUTTON removes an image


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(page: Browser, scheme: str, tmp_path: Path) -> None:
    """Those in docs/ with QWEN_AOT_WRITE_SCREENS=1."""
    answer = 'To print a line in Python:\n```python\nprint("Hello")\n```\nThe text stands between quotation marks.'
    with running(max_context=2000, script=answer, model_names=("SmolLM2-135M-Instruct",)) as server:
        page.size(640, 480)
        page.scheme(scheme)
        opened(page, server)
        asked(page, "How do I print a line?")
        page.run(
            "document.getElementById('speed').textContent = '94 tokens, 51.3 tokens/s'; document.activeElement.blur()"
        )
        picture = page.screenshot()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and 5_000 < len(picture) < 150_000
        if os.environ.get("QWEN_AOT_WRITE_SCREENS"):
            PICTURES.mkdir(exist_ok=True)
            (PICTURES / f"chat-{scheme}.png").write_bytes(picture)
