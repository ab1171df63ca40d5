"""Only what an export wrote is replaced by the next one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from qwen_aot.engines.export import export_graph
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import save_tiny
from tests.golden.make_layouts import DATA, graph


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "checkpoint"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    """Of two exports: with weights, and the graph alone."""
    with open_checkpoint(checkpoint) as source:
        export_graph(source.config, checkpoint.with_name("whole"), checkpoint=source)
        export_graph(source.config, checkpoint.with_name("bare"))
    return checkpoint.parent


def again(checkpoint: Path, out: Path) -> None:
    with open_checkpoint(checkpoint) as source:
        export_graph(source.config, out, checkpoint=source)


def _foreign(out: Path, exported: Path) -> None:
    out.mkdir()
    (out / "model.onnx").write_bytes(graph())
    (out / "model.onnx.data").write_bytes(DATA)


def _foreign_graph(out: Path, exported: Path) -> None:
    shutil.copytree(exported / "whole", out)
    (out / "model.onnx").write_bytes(graph())


def _of_a_bundle(out: Path, exported: Path) -> None:
    """A graph of ours that no export wrote: of a bundle whose other files were moved."""
    shutil.copytree(exported / "whole", out)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    kept = [item for item in model.metadata_props if item.key != "qwen_aot.export_data_bytes"]
    assert len(kept) == len(model.metadata_props) - 1
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    (out / "model.onnx").write_bytes(model.SerializeToString())


def _changed_graph(out: Path, exported: Path) -> None:
    """As a tool saves it that keeps producer and properties."""
    shutil.copytree(exported / "whole", out)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    model.graph.node[0].doc_string = "mine"
    onnx.save(model, out / "model.onnx")


def _changed_weights(out: Path, exported: Path) -> None:
    shutil.copytree(exported / "whole", out)
    written = (out / "model.onnx").stat().st_mtime_ns
    with (out / "model.onnx.data").open("r+b") as file:
        file.write(b"mine")
    os.utime(out / "model.onnx.data", ns=(written, written + 1))


def _others_data(out: Path, exported: Path) -> None:
    """Weights that someone made for a graph that was exported without."""
    shutil.copytree(exported / "bare", out)
    shutil.copyfile(exported / "whole" / "model.onnx.data", out / "model.onnx.data")


def _longer_data(out: Path, exported: Path) -> None:
    shutil.copytree(exported / "whole", out)
    with (out / "model.onnx.data").open("ab") as file:
        file.write(b"x")


def _data_alone(out: Path, exported: Path) -> None:
    out.mkdir()
    (out / "model.onnx.data").write_bytes(DATA)


def _folder_as_graph(out: Path, exported: Path) -> None:
    (out / "model.onnx").mkdir(parents=True)
    (out / "model.onnx" / "mine").touch()


def _folder_as_data(out: Path, exported: Path) -> None:
    shutil.copytree(exported / "bare", out)
    (out / "model.onnx.data").mkdir()


def _text(out: Path, exported: Path) -> None:
    out.mkdir()
    (out / "model.onnx").write_text("not a model")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_foreign, r"model\.onnx wasn't written by an export \(its producer is 'any'\)"),
        (_foreign_graph, r"model\.onnx wasn't written by an export"),
        (_of_a_bundle, r"model\.onnx wasn't written by an export \(its producer is 'qwen-aot'\)"),
        (_changed_graph, r"model\.onnx was changed since an export wrote it"),
        (_changed_weights, r"model\.onnx\.data is newer than the graph beside it: changed since the export"),
        (_others_data, r"model\.onnx\.data wasn't written by the export beside it, which wrote 0 bytes of data"),
        (_longer_data, r"model\.onnx\.data wasn't written by the export beside it, which wrote \d{4,} bytes"),
        (_data_alone, r"holds no graph that an export wrote \(.*No such file"),
        (_folder_as_graph, r"holds no graph that an export wrote \(.*Is a directory"),
        (_folder_as_data, r"model\.onnx\.data wasn't written by the export"),
        (_text, r"holds no graph that an export wrote \(.*isn't an ONNX model"),
    ],
)
def test_what_an_export_did_not_write_is_left_alone(
    checkpoint: Path, exported: Path, tmp_path: Path, make: Callable[[Path, Path], None], message: str
) -> None:
    out = tmp_path / "graph"
    make(out, exported)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(BuildError, match=message):
        again(checkpoint, out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_export_without_weights_is_replaced(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    out = shutil.copytree(exported / "bare", tmp_path / "graph")
    again(checkpoint, out)
    assert (out / "model.onnx").read_bytes() == (exported / "whole" / "model.onnx").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]
