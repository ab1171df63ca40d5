"""Runs before any test module is imported: the environment of the tests and of every process that they start.

Without a GPU, the plugins' kernels run in Triton's interpreter, which triton decides when it is imported. Nothing else
in the tests runs a Triton kernel. Processes import this checkout's package and its tests, whatever is installed.
No test depends on how long an example takes: a busy machine isn't a fault.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import budget, tools
from tests.order import long_first
from tests.shared import once, session_folder

if TYPE_CHECKING:
    from tests.vl_checkpoints import SeeingModel

os.environ.setdefault("TRITON_INTERPRET", "1")
_ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(_ROOT / "src"), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

budget.register()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with tools.running(item):
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts long tests first where there are several workers; after pytest's own, which leaves out what isn't asked."""
    workers = getattr(config, "workerinput", {"workercount": 1})["workercount"]
    if workers > 1:
        items[:] = long_first(items, workers, lambda item: item.get_closest_marker("slow") is not None)


def pytest_collection_finish() -> None:
    """Takes what importing made (torch, transformers: it lives to the end) out of the garbage collector's sight.

    Else each `gc.collect()`, with which the doubles of a GPU find what was left on it, takes a second.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Lets it be collected, as the interpreter does when it ends: libraries there report what is left of theirs."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of this session."""
    return session_folder(pytestconfig, tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def _traces_are_shared(shared_folder: Path) -> Iterator[None]:
    """Builds and exports get torch's part of a trace from tests/traces.py; tests of tracing take `real_trace`."""
    from qwen_aot.exporter.graph import trace
    from tests.traces import CachedExport

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_export", CachedExport(shared_folder / "traces"))
        yield


@pytest.fixture
def real_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing as it is, without the cache."""
    from qwen_aot.exporter.graph import trace
    from tests.traces import REAL

    monkeypatch.setattr(trace, "_export", REAL)


@pytest.fixture(scope="session")
def seeing(shared_folder: Path) -> tuple[SeeingModel, Path]:
    """A small random Qwen-VL, and its fp32 bundle of two rows and 1,024 tokens."""
    from qwen_aot.engines.build import build_bundle
    from qwen_aot.engines.spec.build_spec import BuildSpec
    from tests.vl_checkpoints import make_seeing_model, read_seeing_model

    def make(folder: Path) -> str:
        model = make_seeing_model(folder / "Qwen-VL-tiny")
        build_bundle(model.folder, BuildSpec(precision="fp32", max_context=1024, max_batch=2), folder / "bundle")  # type: ignore[arg-type]
        return str(folder)

    folder = Path(once(shared_folder / "seeing", make))
    return read_seeing_model(folder / "Qwen-VL-tiny"), folder / "bundle"
