"""Which ONNX Runtime a target needs, and what is said where it isn't there."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen_aot.errors import EngineMismatchError
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.backends.ort.devices import DEVICES, import_onnxruntime, preload_libraries, require_provider
from qwen_aot.runtime.bundle.load import load_bundle
from tests.runtime.toys import ALL_INPUTS, checksum_model, io_tables, make_manifest, write_bundle

CUDA = DEVICES["cuda"]


def with_installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def version(name: str) -> str:
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.32"

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (
            ("onnxruntime",),
            r"has no CUDAExecutionProvider: run `pip uninstall onnxruntime`, then `\S+ -m pip install -e \S+\[cuda\]'`",
        ),
        (
            ("onnxruntime", "onnxruntime-gpu"),
            r"are both installed and share one folder.*run `pip uninstall onnxruntime onnxruntime-gpu`",
        ),
    ],
)
def test_an_onnxruntime_without_cuda(monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], message: str) -> None:
    import onnxruntime

    with_installed(monkeypatch, *installed)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineMismatchError, match=message):
        import_onnxruntime(CUDA)


def test_the_gpus_onnxruntime_may_be_older_than_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    assert import_onnxruntime(CUDA) is onnxruntime
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.0")
    with pytest.raises(EngineMismatchError, match=r"1\.31 or newer: \S+ -m pip install -e \S+\[cuda\]' --upgrade"):
        import_onnxruntime(CUDA)


def test_a_session_that_fell_back_to_the_cpu_is_refused() -> None:
    # What onnxruntime-gpu 1.31.1 does on a machine without a driver: no exception, and the other provider.
    library = SimpleNamespace(__version__="1.31.1", cuda_version="13.0")
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineMismatchError, match=r"CUDAExecutionProvider of onnxruntime 1\.31\.1 didn't start.*13\.0"):
        require_provider(session, CUDA, library)
    session.get_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    require_provider(session, CUDA, library)


def test_what_preloading_prints_stays_off_stdout(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    preload_libraries(SimpleNamespace(preload_dlls=lambda directory: print("Failed to load libcudart")))
    assert capsys.readouterr().out == ""
    assert "Failed to load libcudart" in caplog.text


def test_a_target_that_this_backend_does_not_run(tmp_path: Path) -> None:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs)
    object.__setattr__(manifest, "target", "npu")
    path = write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest)
    with pytest.raises(EngineMismatchError, match=r"target is 'npu' .*accepted: cpu, cuda"):
        open_engine(load_bundle(path))
