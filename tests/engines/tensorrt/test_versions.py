"""Which releases of TensorRT have what we call, and builds on doubles of those that JetPack brings."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.targets import Target
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.errors import BuildError
from qwen_aot.runtime.bundle.flavours import FLAVOURS
from qwen_aot.runtime.bundle.load import load_bundle
from tests.checkpoints import save_tiny
from tests.engines.tensorrt.builder_double import API, LIBRARY_HEADER, make_module, numbers

ROOT = Path(__file__).parents[3]
FOLDERS = ("engines/tensorrt", "runtime/backends/tensorrt")  # all that calls the library
# TensorRT of JetPack 6.1 and 6.2, of 7.0 and 7.1, and of 7.2.
JETPACKS = ("10.3.0", "10.13.3", "10.16.2")

# What is called and isn't in the oldest release that is accepted, and what stands in for it there.
GUARDED: Mapping[str, str] = {
    "ATTENTION_INPUT": "native attention alone: `require_standard_layers` refuses a library without it",
    "KV_CACHE_UPDATE": "the same",
    "ROTARY_EMBEDDING": "the same",
    "IAttentionInputLayer": "met only where ATTENTION_INPUT is",
    "attention": "the same",
    "decomposable": "the same",
    "IStreamWriter": "a plain object",
    "build_serialized_network_to_stream": "build_serialized_network",
    "create_runtime_config": "of TensorRT-RTX alone: `Flavour.captures_graphs`, `compiles_on_device`",
    "set_execution_context_allocation_strategy": "the same",
    "get_aliased_input_tensor": "not asked",
    "write": "a method of our own writer",
    "seek": "of files, not of IStreamReaderV2",
}


def release_of(name: str) -> str | None:
    """The first release that has a name in any class; None: it isn't TensorRT's."""
    found = [since for call, since in API["calls"].items() if call.rpartition(".")[2] == name]
    return min(found, key=numbers, default=None)


def names_in(source: str) -> set[str]:
    """Attributes and strings of one identifier, which may be names for getattr."""
    nodes = list(ast.walk(ast.parse(source)))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return attributes | {text for text in texts if text.isidentifier()}


def later_than_the_oldest(sources: Mapping[Path, str]) -> dict[str, str]:
    """Names that the oldest accepted release lacks -> the first release that has them."""
    oldest = FLAVOURS["tensorrt"].at_least
    releases = {name: release_of(name) for source in sources.values() for name in names_in(source)}
    return {name: since for name, since in releases.items() if since is not None and numbers(since) > oldest}


def sources() -> dict[Path, str]:
    return {path: path.read_text() for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))}


def test_what_the_oldest_release_lacks_has_a_stand_in() -> None:
    assert set(later_than_the_oldest(sources())) == set(GUARDED)


def test_a_new_call_would_be_noticed() -> None:
    text = "engine.get_engine_stat(0)"
    assert later_than_the_oldest({Path("it.py"): text}) == {"get_engine_stat": release_of("get_engine_stat")}
    assert later_than_the_oldest({Path("it.py"): "builder.create_network(0)"}) == {}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_tiny(folder / "dense")
    save_tiny(folder / "mixture", layers=1, hidden=128, moe={"moe_intermediate_size": 128})
    return {"dense": folder / "dense", "mixture": folder / "mixture"}


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    path = tmp_path / "plugins.so"
    path.write_bytes(LIBRARY_HEADER)
    return path


def spec(plugins: Path, precision: str, attention: str = "plugin", **options: bool) -> BuildSpec:
    return BuildSpec(
        target=Target.TENSORRT,
        precision=precision,  # type: ignore[arg-type]  # names are taken
        max_context=192,
        prefill_chunk=64,
        tensorrt=TensorRtOptions(attention=attention, plugin_library=plugins, **options),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("version", JETPACKS)
@pytest.mark.parametrize(
    ("model", "precision"), [("dense", "fp16"), ("dense", "int8"), ("dense", "int4"), ("mixture", "int4")]
)
def test_builds_with_plugins(
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: Mapping[str, Path],
    plugins: Path,
    tmp_path: Path,
    version: str,
    model: str,
    precision: str,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(version=version))
    build_bundle(checkpoints[model], spec(plugins, precision), tmp_path / "bundle")
    engine = load_bundle(tmp_path / "bundle").manifest.engines.text
    assert engine.tensorrt is not None and engine.tensorrt.version == version
    assert (tmp_path / "bundle" / engine.file).stat().st_size == engine.tensorrt.weight_bytes


def test_a_whole_engine_in_memory_is_the_one_in_pieces(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Mapping[str, Path], plugins: Path, tmp_path: Path
) -> None:
    """With code of its own behind the weights: two pieces in one, one buffer in the other."""
    monkeypatch.setattr("qwen_aot.engines.tensorrt.compile._PIECE_BYTES", 1000)
    for version in ("10.3.0", "10.16.2"):
        monkeypatch.setitem(sys.modules, "tensorrt", make_module(version=version))
        build_bundle(checkpoints["dense"], spec(plugins, "fp16", version_compatible=True), tmp_path / version)
    older, newer = ((tmp_path / version / "engine.plan").read_bytes() for version in ("10.3.0", "10.16.2"))
    assert older == newer and older.endswith(LIBRARY_HEADER)


def test_a_failure_without_a_stream(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Mapping[str, Path], plugins: Path, tmp_path: Path
) -> None:
    errors = ("10: Could not find any implementation for node head.",)
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(version="10.3.0", errors=errors))
    with pytest.raises(BuildError, match=r"TensorRT 10.3.0 couldn't compile the graph: it has no kernel for head"):
        build_bundle(checkpoints["dense"], spec(plugins, "fp16"), tmp_path / "bundle")


@pytest.mark.parametrize("version", [version for version in JETPACKS if numbers(version) < (10, 15)])
def test_native_attention_is_refused_before(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Mapping[str, Path], plugins: Path, tmp_path: Path, version: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(version=version))
    with pytest.raises(BuildError, match=r"lacks the layers .* from 10\.15 on"):
        build_bundle(checkpoints["dense"], spec(plugins, "fp16", "native"), tmp_path / "bundle")


def test_the_double_refuses_what_an_older_parser_does() -> None:
    module = make_module(version="10.14.1")
    parser = module.OnnxParser(None, None)
    assert parser._takes("Attention") and not parser._takes("RMSNormalization") and parser._takes("MatMul")
    assert not make_module(version="10.3.0").OnnxParser(None, None)._takes("Attention")
    assert not hasattr(make_module(version="10.3.0").Builder, "build_serialized_network_to_stream")
