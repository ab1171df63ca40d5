"""Whatever happens to a build, what stood before stands after, or the whole new bundle does."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_aot import whole_folder
from qwen_aot.engines.bundle.writer import BundleWriter
from qwen_aot.errors import BuildError, BundleError
from qwen_aot.runtime.bundle.load import load_bundle
from tests.engines.bundles import assert_whole, manifest_for

ROOT = Path(__file__).parents[3]


def write(out: Path, text: str) -> None:
    with BundleWriter(out) as writer:
        writer.write_text("model.onnx", text)
        writer.write_text("tokenizer.json", "{}")
        writer.seal(manifest_for)
        writer.commit()


def neighbours(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path != out)


def test_writes_a_whole_bundle_and_nothing_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "models" / "bundle"
    write(out, "new")
    assert assert_whole(out) == "new"
    assert neighbours(out) == []


def test_without_a_commit_the_parents_it_made_are_gone(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with BundleWriter(tmp_path / "there/one/two/bundle") as writer:
        writer.write_text("model.onnx", "x")
    assert list((tmp_path / "there").iterdir()) == []
    too_long = tmp_path / "there/one" / ("x" * 300) / "bundle"
    with pytest.raises(BuildError, match="File name too long"), BundleWriter(too_long):
        pass
    assert list((tmp_path / "there").iterdir()) == []
    with BundleWriter(tmp_path / "there/one/bundle"):
        (tmp_path / "there/one/note").write_text("someone else's")
    assert [path.name for path in (tmp_path / "there/one").iterdir()] == ["note"]


def test_replaces_a_bundle(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write(out, "old")
    write(out, "new")
    assert assert_whole(out) == "new"
    assert neighbours(out) == []


def test_seals_again_without_reading_what_it_hashed(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    read: list[int] = []
    with BundleWriter(out) as writer:
        writer.write_text("model.onnx", "x" * 1000)
        writer.seal(manifest_for)
        writer.write_text("report.json", "{}")
        writer.seal(manifest_for, lambda done, total: read.append(total))
        writer.commit()
    assert read == [2]
    assert assert_whole(out) == "x" * 1000


def test_follows_a_link_to_the_bundle(tmp_path: Path) -> None:
    write(tmp_path / "v1", "old")
    (tmp_path / "current").symlink_to("v1")
    write(tmp_path / "current", "new")
    assert (tmp_path / "current").is_symlink()
    assert assert_whole(tmp_path / "v1") == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, BuildError, SystemExit])
def test_an_error_leaves_what_stood_before(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "bundle"
    write(out, "old")
    with pytest.raises(error), BundleWriter(out) as writer:
        writer.write_text("model.onnx", "half")
        raise error
    assert assert_whole(out) == "old"
    assert neighbours(out) == []


def test_a_failed_first_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "bundle") as writer:
        writer.write_text("model.onnx", "half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda out: out.write_text("mine"), "is a file", id="file"),
        pytest.param(lambda out: (out.mkdir(), (out / "a").touch()), "isn't a bundle", id="other folder"),
        pytest.param(
            lambda out: (out.mkdir(), (out / "manifest.json").write_text('{"name": "web app"}')),
            "isn't a bundle's manifest",
            id="other manifest",
        ),
        pytest.param(
            lambda out: (write(out, "old"), (out / "notes.txt").touch()),
            r"doesn't list \(notes.txt\)",
            id="own file",
        ),
    ],
)
def test_refuses_to_replace_what_is_not_a_bundle(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "bundle"
    make(out)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BuildError, match=message), BundleWriter(out):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write(tmp_path / "bundle", "new")
    assert assert_whole(tmp_path / "bundle") == "new"


def test_a_second_build_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with BundleWriter(out) as first:
        first.write_text("model.onnx", "first")
        with pytest.raises(BuildError, match=f"process {os.getpid()}.*wait for it"), BundleWriter(out):
            pass
        first.seal(manifest_for)
        first.commit()
    assert assert_whole(out) == "first"
    write(out, "second")
    assert assert_whole(out) == "second"


def test_builds_that_race_each_leave_a_whole_bundle(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    refused: list[str] = []

    def build(text: str) -> None:
        for _ in range(20):
            try:
                write(out, text)
            except BuildError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=build, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert assert_whole(out) in {"0", "1", "2", "3"}
    assert all("another build" in message for message in refused)
    assert neighbours(out) == []


# The child dies at its n-th file operation (audit events of the interpreter), or says how many there were.
CHILD = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from qwen_aot import whole_folder as write_folder
    from qwen_aot.engines.bundle import writer as write_bundle
    from tests.engines.bundles import manifest_for

    out, point, can_exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchange"
    if not can_exchange:
        write_folder._exchange = lambda one, other: False
    events = 0

    def count(event, arguments):
        global events
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock", "os.truncate"):
            events += 1
            if events == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    with write_bundle.BundleWriter(out) as writer:
        writer.write_text("model.onnx", "new")
        writer.write_text("tokenizer.json", "{}")
        writer.seal(manifest_for)
        writer.commit()
    print(events)
    """
)


def run_child(out: Path, point: int, mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(out), str(point), mode],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("mode", ["exchange", "two renames"])
def test_killed_at_any_point(tmp_path: Path, mode: str) -> None:
    out = tmp_path / "bundle"
    write(out, "old")
    clean = run_child(out, -1, mode)
    assert clean.returncode == 0, clean.stderr
    points = int(clean.stdout)
    assert points >= 12  # lock, folder, two files, their hashes, manifest, syncs, deletion of the old
    seen = set()
    for point in range(1, points + 1):
        write(out, "old")
        assert run_child(out, point, mode).returncode == -signal.SIGKILL
        if mode == "exchange":
            seen.add(assert_whole(out))  # at no moment is there less than one whole bundle
        with BundleWriter(out):  # the next build recovers, even one that then gives up
            pass
        seen.add(assert_whole(out))
        assert neighbours(out) == []
    assert seen == {"old", "new"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(small_disk: Path) -> None:
    out = small_disk / "bundle"
    write(out, "old")
    with pytest.raises(BuildError, match=r"no space left while writing .*--dry-run"):
        write(out, "x" * (2 << 20))
    assert assert_whole(out) == "old"
    assert neighbours(out) == []


def test_read_only_file_system(small_disk: Path) -> None:
    out = small_disk / "bundle"
    write(out, "old")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(BuildError, match=r"can't write .*Read-only file system; give a folder that you may write"):
        write(out, "new")
    assert assert_whole(out) == "old"


def test_write_that_the_system_cuts_short(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write(out, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(BuildError, match="File too large"):
            write(out, "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert assert_whole(out) == "old"
    assert neighbours(out) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; the read-only file system test covers it")
def test_read_only_folder(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write(out, "old")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(BuildError, match="Permission denied"):
            write(out, "new")
    finally:
        tmp_path.chmod(0o755)
    assert assert_whole(out) == "old"


def replaced(out: Path) -> str:
    """Why a build over this is refused; all that is there stays as it was."""
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    with pytest.raises(BuildError) as caught:
        write(out, "new")
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before
    return str(caught.value)


def test_a_manifest_of_others_that_lists_its_files_is_no_bundle(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "photo.jpg").write_text("mine")
    (out / "manifest.json").write_text('{"files": {"photo.jpg": {}}}')
    assert "isn't a bundle's manifest" in replaced(out)


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", '{"edited": 1}'), ("tokenizer.json", "[]"), ("model.onnx", "")]
)
def test_a_file_that_someone_changed_is_not_replaced(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path / "bundle", "old")
    (tmp_path / "bundle" / name).write_text(content)
    assert f"{name} isn't as it was written" in replaced(tmp_path / "bundle")


@pytest.mark.parametrize("later", [0, 1])
def test_a_large_file_is_read_again_only_where_it_is_newer_than_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: int
) -> None:
    monkeypatch.setattr(whole_folder, "_HASHED_BYTES", 2)
    out = tmp_path / "bundle"
    write(out, "old")
    sealed = (out / "manifest.json").stat().st_mtime_ns
    os.utime(out / "model.onnx", ns=(sealed, sealed + later))
    write(out, "nex")  # as it was written, though a copy may be newer
    sealed = (out / "manifest.json").stat().st_mtime_ns
    (out / "model.onnx").write_text("own")
    os.utime(out / "model.onnx", ns=(sealed, sealed + later))
    if later:
        assert "model.onnx isn't as it was written" in replaced(out)
    else:
        write(out, "new")


def test_a_damaged_bundle_is_built_anew_once_it_is_deleted(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write(out, "old")
    (out / "model.onnx").write_text("cut")
    with pytest.raises(BundleError, match="delete the bundle and build it anew"):
        load_bundle(out)
    assert "delete it, if nothing in it is yours" in replaced(out)
    shutil.rmtree(out)
    write(out, "new")
    assert assert_whole(out) == "new"


def test_a_folder_of_a_files_name_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write(out, "old")
    (out / "model.onnx").unlink()
    (out / "model.onnx").mkdir()
    (out / "model.onnx" / "mine").touch()
    assert "model.onnx isn't as it was written" in replaced(out)


def test_a_file_that_is_gone_is_no_reason(tmp_path: Path) -> None:
    write(tmp_path / "bundle", "old")
    (tmp_path / "bundle" / "tokenizer.json").unlink()
    write(tmp_path / "bundle", "new")
    assert assert_whole(tmp_path / "bundle") == "new"


def test_what_comes_there_during_the_build_is_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write(out, "old")
    with pytest.raises(BuildError, match=r"doesn't list \(notes\.txt\)"), BundleWriter(out) as writer:
        writer.write_text("model.onnx", "new")
        writer.write_text("tokenizer.json", "{}")
        writer.seal(manifest_for)
        (out / "notes.txt").write_text("mine")
        writer.commit()
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert assert_whole(out) == "old"
    assert neighbours(out) == []


@pytest.mark.parametrize("name", [".bundle.building", ".bundle.old"])
def test_a_folder_that_no_build_left_is_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()
    assert f"{name} is in the way, and no build left it" in replaced(tmp_path / "bundle")
    assert neighbours(tmp_path / "bundle") == [name]


def test_a_lock_file_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / ".bundle.lock").write_text("my own notes")
    assert ".bundle.lock is in the way, and no build left it" in replaced(tmp_path / "bundle")


def test_leftovers_that_could_not_be_deleted_are_told_by_their_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    write(out, "old")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, BundleWriter(out) as writer:
        writer.write_text("model.onnx", "half")
        patch.setattr("shutil.rmtree", refuse)
    assert neighbours(out) == [".bundle.building", ".bundle.lock"]
    write(out, "new")
    assert assert_whole(out) == "new"
    assert neighbours(out) == []
