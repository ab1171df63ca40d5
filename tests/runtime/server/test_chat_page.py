"""The chat page as it is served: its headers, that nothing comes from elsewhere, and that no text becomes markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qwen_aot.runtime.server import chat_page
from qwen_aot.runtime.server.chat_page import PAGE_PATHS
from qwen_aot.runtime.server.json_body import MAX_BODY_BYTES
from qwen_aot.runtime.vision.pictures import FORMATS, MAX_BYTES
from tests.runtime.server.servers import App

FOLDER = Path(chat_page.__file__).parent / "page"
TYPES = {
    "/": "text/html; charset=utf-8",
    "/page/chat.css": "text/css; charset=utf-8",
    "/page/chat.js": "text/javascript; charset=utf-8",
    "/page/images.js": "text/javascript; charset=utf-8",
}
KEY = "the-key-0123456789"
# What makes markup or code of a text, or keeps something beyond the tab.
SINKS = (
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|setHTML|srcdoc|\beval\b"
    r"|new Function|javascript:|localStorage|indexedDB|document\.cookie|importScripts|Worker\("
    r"|set(?:Timeout|Interval)\([\"'`]"
)


class Page(HTMLParser):
    """What a page refers to, by which ids, and its inline code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.labelled: set[str] = set()
        self.fields: set[str] = set()
        self.hidden_labels: set[str] = set()
        self.hidden_fields: set[str] = set()
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.references += [given[name] or "" for name in ("href", "src", "action") if name in given]
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        if tag == "label":
            self.labelled.add(given.get("for") or "")
            self.hidden_labels |= {given.get("for") or ""} if "hidden" in given else set()
        if tag in ("input", "select", "textarea"):
            self.fields.add(given.get("id") or "")
            self.hidden_fields |= {given.get("id") or ""} if "hidden" in given else set()
        if (tag == "script" and "src" not in given) or tag == "style":
            self.inline.append(tag)


def page() -> Page:
    return Page((FOLDER / "index.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", TYPES)
def test_each_file(path: str) -> None:
    with App(keys=(KEY,)) as app:
        response = app.ask("GET", path)
        assert (response.status_code, response.headers["content-type"]) == (200, TYPES[path])
        assert response.content == (FOLDER / (path.rpartition("/")[2] or "index.html")).read_bytes()
        policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
        assert policy.pop("img-src") == "data:"
        assert policy.pop("require-trusted-types-for") == "'script'"
        assert {name: policy.pop(name) for name in ("script-src", "style-src", "connect-src")} == dict.fromkeys(
            ("script-src", "style-src", "connect-src"), "'self'"
        )
        assert set(policy) == {"default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"}
        assert set(policy.values()) == {"'none'"}
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        assert KEY not in response.text
        head = app.ask("HEAD", path)
        assert (head.status_code, head.content) == (200, b"")
        assert app.ask("POST", path).status_code == 405


def test_every_path_is_tried() -> None:
    assert set(TYPES) == PAGE_PATHS


@pytest.mark.parametrize("path", TYPES)
def test_without_the_page(path: str) -> None:
    with App(has_page=False) as app:
        assert app.ask("GET", path).json()["error"]["code"] == "unknown_url"
    with App(has_page=False, keys=(KEY,)) as app:
        assert app.ask("GET", path).status_code == 401


@pytest.mark.parametrize("state", ["loading", "stopping"])
def test_it_is_there_whatever_the_server_does(state: str) -> None:
    with App(is_loaded=state == "stopping") as app:
        if state == "stopping":
            app.state.drain()
        assert app.ask("GET", "/").status_code == 200


def test_pages_of_other_names_get_it_as_little_as_anything_else() -> None:
    with App() as app:
        assert app.ask("GET", "/", headers={"host": "evil.example"}).status_code == 421
        assert app.ask("GET", "/page/chat.js", headers={"origin": "https://evil.example"}).status_code == 403


def test_nothing_comes_from_elsewhere_and_nothing_is_inline() -> None:
    found = page()
    assert set(found.references) == {"data:,", "/page/chat.css", "/page/chat.js", "/page/images.js"}
    assert found.inline == []
    for name in ("chat.css", "chat.js", "images.js"):
        text = (FOLDER / name).read_text(encoding="utf-8")
        without_comments = re.sub(r"//.*|/\*.*?\*/", "", text, flags=re.DOTALL if name == "chat.css" else 0)
        assert re.findall(r"https?:|url\(|@import|import\b", without_comments) == []


def test_every_field_has_a_label() -> None:
    found = page()
    assert found.fields and found.fields <= found.labelled <= set(found.ids)
    assert found.hidden_labels == found.hidden_fields == {"files"}  # a screen reader reads what isn't hidden
    assert len(set(found.ids)) == len(found.ids)


def test_the_script_uses_ids_that_are_there_and_no_sink() -> None:
    script = "".join((FOLDER / name).read_text(encoding="utf-8") for name in ("chat.js", "images.js"))
    used = set(re.findall(r'\bat\("([a-z_-]+)"\)', script))
    assert len(used) > 8 and used <= set(page().ids)
    numbers = re.search(r"NUMBERS = (\[.*?\])", script)
    assert numbers is not None and set(re.findall(r'"(\w+)"', numbers[1])) <= set(page().ids)
    assert re.findall(SINKS, script) == []


def test_the_script_knows_the_servers_limits() -> None:
    script = (FOLDER / "images.js").read_text(encoding="utf-8")
    said = {name: int(number) << int(bits) for name, number, bits in re.findall(r"(\w+) = (\d+) << (\d+);", script)}
    assert said["MAX_BODY_BYTES"] == MAX_BODY_BYTES and said["MAX_FILE_BYTES"] == MAX_BYTES
    written = re.findall(r'toDataURL\("image/(\w+)"', script)
    assert written and {each.upper() for each in written} <= set(FORMATS)
    told = re.search(r"can't be read as an image: ([\w, ]+) can", script)
    assert told is not None and {each.upper() for each in re.findall(r"[A-Z]\w+", told[1])} == set(FORMATS)
    assert f"at most {MAX_BODY_BYTES * 7 / 8 / 2**20:g} MiB" in script


@pytest.mark.parametrize(
    "line", ["a.innerHTML = b", "document.write(x)", 'eval("1")', "localStorage.x = 1", 'setTimeout("x()", 1)']
)
def test_a_sink_is_found(line: str) -> None:
    assert re.findall(SINKS, line)
