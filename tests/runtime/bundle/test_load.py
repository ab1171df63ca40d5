"""Loading a bundle: damage of every kind is refused with what to do about it."""

import re
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle import load
from qwen_aot.runtime.bundle.load import load_bundle, read_manifest
from tests.layouts import lay_out, layouts
from tests.runtime.toys import ALL_INPUTS, checksum_model, io_tables, make_manifest, write_bundle


@pytest.fixture
def path(tmp_path: Path) -> Path:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs)
    return write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest, {"notes.txt": "é"})


def test_a_sound_bundle(path: Path) -> None:
    (path / "unlisted.txt").write_text("ignored")
    bundle = load_bundle(path)
    assert bundle.engine_path == path / "model.onnx"
    assert bundle.has("notes.txt") and not bundle.has("unlisted.txt")
    assert bundle.read_text("notes.txt") == "é"
    with pytest.raises(BundleError, match=r"has no unlisted\.txt \(it has: model\.onnx, notes\.txt\)"):
        bundle.read_text("unlisted.txt")


def test_a_missing_file(path: Path) -> None:
    (path / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx is missing, though manifest\.json lists it"):
        load_bundle(path)


def test_a_truncated_and_a_longer_file(path: Path) -> None:
    content = (path / "model.onnx").read_bytes()
    (path / "model.onnx").write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"is truncated: {len(content) - 1} bytes, manifest.json says {len(content)}"):
        load_bundle(path)
    (path / "model.onnx").write_bytes(content + b"x")
    with pytest.raises(BundleError, match="is too long"):
        load_bundle(path)


def test_a_flipped_bit_is_found_unless_large_files_are_skipped(path: Path) -> None:
    content = bytearray((path / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="is damaged or was changed: its SHA-256 is"):
        load_bundle(path)
    with pytest.raises(BundleError, match="is damaged"):
        load_bundle(path, skip_hash_above=len(content))
    assert load_bundle(path, skip_hash_above=len(content) - 1).has("model.onnx")


@pytest.mark.parametrize("case", layouts(), ids=lambda case: case["what"])
def test_golden(case: dict[str, Any], tmp_path: Path) -> None:
    opened = lay_out(case, tmp_path)
    if case["accepted"]:
        assert load_bundle(opened, skip_hash_above=case["skip_hash_above"]).path == opened
        return
    with pytest.raises(BundleError):
        load_bundle(opened, skip_hash_above=case["skip_hash_above"])


def layout(what: str, root: Path) -> Path:
    return lay_out(next(case for case in layouts() if case["what"] == what), root)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "another model's blobs",
            r"model\.onnx\.data is a link to .*models--me--other/blobs.*, outside the bundle; .*cp -rL",
        ),
        ("a snapshot that was copied with its links", "of a hub's snapshot, links may lead to the same model's blobs"),
        ("a manifest linked from outside", r"manifest\.json is a link to .*/m/manifest\.json, outside the bundle"),
        ("a changed blob whose hash is skipped", "is damaged or was changed: its SHA-256 is"),
        (
            "a data file outside the folder",
            r"names the data file '\.\./model\.onnx\.data'; accepted: a file that manifest\.json lists",
        ),
        ("a graph that is something else", r"model\.onnx isn't an ONNX model, or is damaged \("),
    ],
)
def test_what_a_refusal_says(what: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=message):
        load_bundle(layout(what, tmp_path), skip_hash_above=0)


def test_a_link_that_is_swapped_after_the_look(tmp_path: Path) -> None:
    """What is read later is followed and hashed again: neither another place nor another content comes in."""
    folder = layout("a snapshot", tmp_path)
    bundle = load_bundle(folder)
    weights = folder / "model.onnx.data"
    assert bundle.read_text("model.onnx.data") == "weights of a model"
    (tmp_path / "w").write_bytes(weights.read_bytes())
    weights.unlink()
    weights.symlink_to(tmp_path / "w")
    with pytest.raises(BundleError, match="outside the bundle"):
        bundle.read_text("model.onnx.data")
    weights.unlink()
    weights.write_text("WEIGHTS OF A MODEL")
    with pytest.raises(BundleError, match="is damaged or was changed"):
        bundle.read_text("model.onnx.data")


def test_text_is_checked_when_it_is_read_though_it_was_skipped(path: Path) -> None:
    bundle = load_bundle(path, skip_hash_above=0)
    (path / "notes.txt").write_text("e ")
    with pytest.raises(BundleError, match=r"notes\.txt is damaged or was changed"):
        bundle.read_text("notes.txt")
    (path / "notes.txt").write_text("longer than it was")
    with pytest.raises(BundleError, match=r"notes\.txt is too long"):
        bundle.read_text("notes.txt")


def test_a_manifest_without_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (path / "manifest.json").stat().st_size
    monkeypatch.setattr(load, "MAX_MANIFEST_BYTES", size)
    assert read_manifest(path).model.name
    monkeypatch.setattr(load, "MAX_MANIFEST_BYTES", size - 1)
    with pytest.raises(BundleError, match=rf"manifest\.json has more than {size - 1} bytes"):
        load_bundle(path)


def test_a_link_out_of_the_folder(path: Path, tmp_path: Path) -> None:
    (path / "notes.txt").rename(tmp_path / "notes.txt")
    (path / "notes.txt").symlink_to(tmp_path / "notes.txt")
    with pytest.raises(BundleError, match="outside the bundle; a bundle is self-contained"):
        load_bundle(path)


def test_a_link_to_itself(path: Path) -> None:
    (path / "notes.txt").unlink()
    (path / "notes.txt").symlink_to(path / "notes.txt")
    with pytest.raises(BundleError, match=r"notes\.txt (is a link that leads to itself|is missing)"):
        load_bundle(path)


def test_a_folder_that_may_not_be_looked_into(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(BundleError, match=r"bundle can't be read \(Permission denied\): check its permissions"):
        load_bundle(path)


def test_a_name_too_long_for_the_file_system(path: Path) -> None:
    text = (path / "manifest.json").read_text(encoding="utf-8")
    (path / "manifest.json").write_text(text.replace("notes.txt", "n" * 300), encoding="utf-8")
    with pytest.raises(BundleError, match=r"n can't be read \(File name too long\)"):
        load_bundle(path)


def test_a_folder_that_is_read_only(path: Path) -> None:
    for file in path.iterdir():
        file.chmod(0o444)
    path.chmod(0o555)
    try:
        assert load_bundle(path).has("notes.txt")
    finally:
        path.chmod(0o755)


def test_a_link_to_the_bundle_itself_is_fine(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    assert load_bundle(tmp_path / "link").has("model.onnx")


def test_a_file_that_is_a_folder(path: Path) -> None:
    (path / "notes.txt").unlink()
    (path / "notes.txt").mkdir()
    with pytest.raises(BundleError, match=r"notes\.txt is missing"):
        load_bundle(path)


def test_a_text_file_that_is_not_utf8(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="is not UTF-8 text"):
        load_bundle(path)


def test_what_is_not_a_bundle(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=re.escape(f"{tmp_path / 'none'} doesn't exist")):
        load_bundle(tmp_path / "none")
    with pytest.raises(BundleError, match=r"model\.onnx is a file; .*\(the folder it stands in is one\)"):
        load_bundle(path / "model.onnx")
    (tmp_path / "m.gguf").touch()
    with pytest.raises(BundleError, match=r"m\.gguf is a checkpoint, not a bundle: .*build-engine"):
        load_bundle(tmp_path / "m.gguf")
    with pytest.raises(BundleError, match=r"has no manifest\.json: it is not a bundle, or its build did not end"):
        load_bundle(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="is a checkpoint, not a bundle"):
        load_bundle(tmp_path)
