"""Opening a bundle's folder: every layout that readers must take or refuse, and what a refusal says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.layouts import lay_out, layouts
from tests.runtime.capi.native import Native, Session, ask
from tests.runtime.toys import ALL_INPUTS, checksum_model, io_tables, make_manifest, write_bundle

OK, IO, BUNDLE, INVALID = None, 3, 4, 1


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("bundle")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs)
    return write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest, {"notes.txt": "é"})


def open_(
    program: Path, path: Path | str, *, hash_limit: int | None = None, then: list[Any] | None = None
) -> list[Any]:
    """The answers to an opening and to what comes after it."""
    return ask(program, [{"open": str(path), "hash_limit": hash_limit}, *(then or [])])


def refused(
    program: Path, path: Path | str, message: str, *, status: int = BUNDLE, hash_limit: int | None = None
) -> None:
    (answer,) = open_(program, path, hash_limit=hash_limit)
    assert isinstance(answer, dict), answer
    assert message in answer["message"], answer
    assert answer["status"] == status, answer


def test_golden(program: Path, tmp_path: Path) -> None:
    cases = layouts()
    opened = [lay_out(case, tmp_path / str(index)) for index, case in enumerate(cases)]
    requests = [
        {"open": str(path), "hash_limit": case["skip_hash_above"]} for path, case in zip(opened, cases, strict=True)
    ]
    for case, path, answer in zip(cases, opened, ask(program, requests), strict=True):
        if case["accepted"]:
            assert answer == str(path), (case["what"], answer)
        else:
            assert isinstance(answer, dict) and answer["status"] in (IO, BUNDLE), case["what"]
            assert str(tmp_path) in answer["message"], (case["what"], answer)


def layout(what: str, root: Path) -> Path:
    return lay_out(next(case for case in layouts() if case["what"] == what), root)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("another model's blobs", "models--me--other/blobs"),
        ("a snapshot that was copied with its links", "of a hub's snapshot, links may lead to the same model's blobs"),
        ("a manifest linked from outside", "manifest.json is a link to "),
        ("a changed blob whose hash is skipped", "is damaged or was changed: its SHA-256 is"),
        (
            "a data file outside the folder",
            "names the data file '../model.onnx.data'; accepted: a file that manifest.json lists",
        ),
        ("a graph that is something else", "model.onnx isn't an ONNX model, or is damaged ("),
    ],
)
def test_what_a_refusal_says(program: Path, what: str, message: str, tmp_path: Path) -> None:
    refused(program, layout(what, tmp_path), message, hash_limit=0)


def test_a_sound_bundle_and_its_files(program: Path, path: Path) -> None:
    (path / "unlisted.txt").write_text("ignored")
    opened, notes, unlisted = open_(program, path, then=[{"file": "notes.txt"}, {"file": "unlisted.txt"}])
    assert opened == str(path)
    content = "é".encode().hex()
    located = os.path.realpath(path / "notes.txt").encode().hex()
    assert notes == {"has": True, "locate": located, "read": content, "map": content}
    assert unlisted["has"] is False
    for how in ("locate", "read", "map"):
        assert "has no file 'unlisted.txt'" in unlisted[how]["message"]


def test_damage(program: Path, path: Path) -> None:
    engine = path / "model.onnx"
    content = engine.read_bytes()
    engine.write_bytes(content[:-1])
    refused(program, path, f"is truncated: {len(content) - 1} bytes, manifest.json says {len(content)}; copy it again")
    engine.write_bytes(content + b"x")
    refused(program, path, "is too long")
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    engine.write_bytes(changed)
    for limit in (None, len(content)):
        refused(program, path, f"{engine} is damaged or was changed: its SHA-256 is", hash_limit=limit)
    assert open_(program, path, hash_limit=len(content) - 1) == [str(path)]
    engine.unlink()
    refused(program, path, f"{engine} is missing or not a file, though manifest.json lists it", status=IO)
    engine.mkdir()
    refused(program, path, "is missing or not a file")


def test_what_is_no_bundle(program: Path, path: Path, tmp_path: Path) -> None:
    refused(program, "", "path is empty", status=INVALID)
    refused(program, "a\0b", "holds a NUL", status=INVALID)
    refused(program, tmp_path / "none", "doesn't exist", status=IO)
    refused(program, path / "model.onnx", "is a file; accepted: a bundle's folder")
    refused(program, tmp_path, "has no manifest.json: it is not a bundle")
    (tmp_path / "config.json").write_text("{}")
    refused(program, tmp_path, "is a checkpoint, not a bundle")
    (path / "manifest.json").write_text("{}")
    refused(program, path, f"{path}: manifest.json has format_version none, this library reads 1 and 2")
    (path / "manifest.json").write_text('{"format_version": 2, "x": "' + "x" * (16 << 20) + '"}')
    refused(program, path, "manifest.json has more than 16777216 bytes, which no build writes")
    (path / "manifest.json").write_bytes(b'{"\xff": 1}')
    refused(program, path, "manifest.json is not UTF-8 text (at byte 2)")


def test_what_is_read_later_is_followed_and_hashed_again(program: Path, tmp_path: Path) -> None:
    """Neither another place nor another content comes in after the look."""
    folder = layout("a snapshot", tmp_path)
    weights = folder / "model.onnx.data"
    content = weights.read_bytes()
    (tmp_path / "w").write_bytes(content)
    with Session(program) as session:
        assert session.ask({"open": str(folder)}) == str(folder)
        assert session.ask({"file": weights.name})["read"] == content.hex()
        weights.unlink()
        weights.symlink_to(tmp_path / "w")
        for how in ("locate", "read", "map"):
            assert "outside the bundle" in session.ask({"file": weights.name})[how]["message"]
        weights.unlink()
        weights.write_bytes(content.upper())
        for how in ("read", "map"):
            assert "is damaged or was changed" in session.ask({"file": weights.name})[how]["message"]
        weights.unlink()
        assert session.ask({"file": weights.name})["map"]["status"] == IO


def test_skipped_hashes_are_skipped_when_it_is_mapped(program: Path, path: Path) -> None:
    """Not when it is read: what is read is small, and decides what the text says."""
    with Session(program) as session:
        assert session.ask({"open": str(path), "hash_limit": 0}) == str(path)
        (path / "notes.txt").write_text("e ")
        answer = session.ask({"file": "notes.txt"})
        assert answer["map"] == b"e ".hex()
        assert "notes.txt is damaged or was changed" in answer["read"]["message"]
        (path / "notes.txt").write_text("e")
        assert "is truncated" in session.ask({"file": "notes.txt"})["map"]["message"]
