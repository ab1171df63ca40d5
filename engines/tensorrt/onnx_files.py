"""The ONNX that a TensorRT engine was compiled from: it isn't kept, so what it was is written down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen_aot.engines.bundle.versions import tool_versions
from qwen_aot.errors import BuildError
from qwen_aot.exporter.graph.save import MODEL_FILE, data_file_of
from qwen_aot.runtime.bundle.manifest import FileEntry, Manifest
from qwen_aot.whole_file import file_sha256


def onnx_entries(folder: Path, graph: str = MODEL_FILE) -> dict[str, FileEntry]:
    """Size and SHA-256 of a graph's file and of its weights' in a folder."""
    paths = [folder / name for name in (graph, data_file_of(graph))]
    return {path.name: FileEntry(bytes=path.stat().st_size, sha256=file_sha256(path)) for path in paths}


def require_same_onnx(manifest: Manifest, made_again: Mapping[str, FileEntry]) -> None:
    """Compares what was made again with what the engine was compiled from.

    Raises:
        BuildError: they aren't the same, byte for byte; names what differs, and versions of tools that do.
    """
    engine = manifest.engines.text
    assert engine.tensorrt is not None
    differing = [name for name, entry in engine.tensorrt.onnx.items() if made_again.get(name) != entry]
    if not differing:
        return
    here = tool_versions()
    versions = [
        f"{tool} {built} there, {here.get(tool, 'none')} here"
        for tool, built in manifest.tool_versions.items()
        if here.get(tool) != built
    ]
    raise BuildError(
        f"{' and '.join(differing)} made again from the checkpoint isn't what {engine.file} was compiled from, so "
        "that a comparison would say nothing of it: give the checkpoint that it was built from, on the same kind of "
        "CPU and with the tools that built it"
        + (f" (these differ: {'; '.join(versions)})" if versions else " (their versions are the same)")
    )
