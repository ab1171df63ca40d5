"""What TensorRT-RTX compiled on the device is there at the next start; whatever the file is, an engine starts."""

import errno
import gc
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.backends.tensorrt.engine import TensorRtEngine
from qwen_aot.runtime.backends.tensorrt.runtime_cache import MAX_FILES, cache_file
from qwen_aot.runtime.bundle.load import load_bundle
from tests.doubles.gpu import Gpu
from tests.doubles.install import installed
from tests.runtime.backends.tensorrt.engines import ids, opened, write_checksum_bundle
from tests.runtime.toys import checksum


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checksum_bundle(tmp_path_factory.mktemp("b") / "checksum", "tensorrt_rtx")


def compiled(bundle: Path, home: Path, gpu: Gpu | None = None, prompt: tuple[int, ...] = (1, 2)) -> list[str]:
    """Kernels that one start, a prompt and two tokens compile; the text is right in any case."""
    with opened(bundle, gpu, cache_home=home) as (engine, device):
        assert engine.prefill(0, ids(*prompt)).argmax() == checksum([*prompt])
        for count in (1, 2):
            assert engine.decode(0, ids(7))[0].argmax() == checksum([*prompt, *[7] * count])
    return device.compiled


def files(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


def test_a_second_start_compiles_nothing(bundle: Path, tmp_path: Path) -> None:
    assert len(compiled(bundle, tmp_path)) == 2  # prefill and decode
    (file,) = files(tmp_path)
    written = file.stat()
    assert file.parent == tmp_path / "qwen-aot" / "tensorrt-rtx"
    assert written.st_mode & 0o077 == 0
    assert compiled(bundle, tmp_path) == []
    assert file.stat().st_mtime_ns == written.st_mtime_ns  # nothing to add, nothing written
    assert len(compiled(bundle, tmp_path, prompt=(1, 2, 3))) == 1  # another length is another kernel
    assert compiled(bundle, tmp_path, prompt=(1, 2, 3)) == compiled(bundle, tmp_path) == []
    assert files(tmp_path) == [file]


def test_full_tensorrt_has_no_file(tmp_path: Path) -> None:
    bundle = write_checksum_bundle(tmp_path / "bundle", "tensorrt")
    compiled(bundle, tmp_path / "home")
    assert not (tmp_path / "home").exists()


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _not_ours(file: Path) -> None:
    file.write_bytes(b"something else")


@pytest.mark.parametrize("damage", [_flip, _cut, _empty, _not_ours])
def test_a_damaged_file_never_reaches_the_library(bundle: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    compiled(bundle, tmp_path)
    damage(files(tmp_path)[0])
    assert len(compiled(bundle, tmp_path)) == 2
    assert compiled(bundle, tmp_path) == []  # it was replaced


def test_what_the_library_refuses_is_replaced(bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its own checks know more than a file's name: here the file of another kind of GPU was copied."""
    compiled(bundle, tmp_path, Gpu(capability=(8, 6)))
    (other,) = files(tmp_path)
    compiled(bundle, tmp_path)
    (own,) = set(files(tmp_path)) - {other}
    own.write_bytes(other.read_bytes())
    with caplog.at_level(logging.INFO):
        assert len(compiled(bundle, tmp_path)) == 2
    assert "will be replaced: the runtime cache is of another version or GPU" in caplog.text
    assert compiled(bundle, tmp_path) == []


def test_each_gpu_version_and_engine_has_its_own_file(bundle: Path, tmp_path: Path) -> None:
    rebuilt = write_checksum_bundle(tmp_path / "rebuilt", "tensorrt_rtx", decode_tokens=2)
    home = tmp_path / "home"
    for path, gpu in ((bundle, Gpu()), (bundle, Gpu(capability=(8, 6))), (rebuilt, Gpu())):
        assert len(compiled(path, home, gpu)) == 2
    assert len(files(home)) == 3
    sha256 = load_bundle(bundle).manifest.files["engine.rtx"].sha256
    assert cache_file(sha256, "8.9", "1.7.1.116") != cache_file(sha256, "8.9", "1.8.0.1")


def _of_another_user(path: Path) -> None:
    os.chown(path, 65534, -1)


def _for_the_group(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o020)


def _for_all(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


def _a_link(path: Path) -> None:
    """To a file of this user's own, in a folder that others may write: `path` itself tells nothing of who made it."""
    target = path.with_name("target")
    path.rename(target)
    path.symlink_to(target)
    os.chown(path, 65534, -1, follow_symlinks=False)


@pytest.mark.parametrize("open_to_others", [_of_another_user, _for_the_group, _for_all, _a_link])
@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_kernels_that_others_could_write_are_not_run(
    bundle: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    open_to_others: Callable[[Path], None],
    is_folder: bool,
) -> None:
    if os.geteuid() != 0 and open_to_others in (_of_another_user, _a_link):
        pytest.skip("giving a file away needs root")
    compiled(bundle, tmp_path)
    (file,) = files(tmp_path)
    open_to_others(file.parent if is_folder else file)
    assert len(compiled(bundle, tmp_path)) == 2
    assert f"{file} isn't read: others may write it" in caplog.text


def test_a_folder_that_cannot_be_made(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "qwen-aot").write_text("a file stands there")
    assert len(compiled(bundle, tmp_path)) == 2


@pytest.mark.parametrize(
    ("module", "call", "number"), [(tempfile, "mkstemp", errno.EROFS), (os, "fdopen", errno.ENOSPC)]
)
def test_a_read_only_folder_and_a_full_disk(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, call: str, number: int
) -> None:
    compiled(bundle, tmp_path)
    (file,) = files(tmp_path)
    before = file.read_bytes()

    def refuse(*handle: int, **_: object) -> None:
        if handle:
            os.close(handle[0])
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(module, call, refuse)
        assert len(compiled(bundle, tmp_path, prompt=(1, 2, 3))) == 1  # decode's kernel was kept before
    assert files(tmp_path) == [file] and file.read_bytes() == before


def test_a_relative_cache_folder_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        found = cache_file("0" * 64, "8.9", "1.7")
        assert found is not None and found.is_relative_to(tmp_path / ".cache" / "qwen-aot")


def test_a_user_without_a_home(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    with opened(bundle) as (engine, _), monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "")
        patch.setattr(Path, "home", classmethod(homeless))
        assert cache_file("0" * 64, "8.9", "1.7") is None
        assert engine.decode(0, ids(1))[0].argmax() == checksum([1])


def test_the_oldest_files_go(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "qwen-aot" / "tensorrt-rtx"
    folder.mkdir(parents=True)
    for age in range(MAX_FILES + 3):
        (folder / f"{age}.bin").touch()
        os.utime(folder / f"{age}.bin", (1000 - age, 1000 - age))
    compiled(bundle, tmp_path)
    kept = {file.name for file in files(tmp_path)}
    assert len(kept) == MAX_FILES
    assert {f"{age}.bin" for age in range(MAX_FILES - 1)} < kept


@pytest.mark.parametrize("refuses", ["made", "taken", "serialized"])
def test_a_library_without_a_cache_runs_all_the_same(bundle: Path, tmp_path: Path, refuses: str) -> None:
    gpu = Gpu()
    gpu.refuses_cache = refuses
    assert len(compiled(bundle, tmp_path, gpu)) == 2
    assert compiled(bundle, tmp_path) != []


def test_a_lost_gpu_keeps_no_kernels(bundle: Path, tmp_path: Path) -> None:
    with opened(bundle, cache_home=tmp_path) as (engine, gpu):
        engine.prefill(0, ids(1))
        gpu.fail("kernel", "cudaErrorIllegalAddress")
        with pytest.raises(GenerationError, match="cudaErrorIllegalAddress"):
            engine.decode(0, ids(1))
    assert not files(tmp_path)


def test_an_engine_that_is_dropped_keeps_its_kernels(bundle: Path, tmp_path: Path) -> None:
    with installed(Gpu(), cache_home=tmp_path):
        engine = TensorRtEngine(load_bundle(bundle))
        engine.prefill(0, ids(1))
        del engine
        gc.collect()
        assert len(files(tmp_path)) == 1
