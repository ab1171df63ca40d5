"""One compilation: model.onnx in, the engine's file and its facts out.

TensorRT maps the graph's weights itself and, from 10.13 on, hands the engine over in pieces, so that no step of ours
holds a copy.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from qwen_aot.engines.builders import EngineFacts
from qwen_aot.engines.profiles import Ranges
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.tensorrt.config import TimingCache, make_config
from qwen_aot.engines.tensorrt.gpu import own_capabilities
from qwen_aot.engines.tensorrt.graph_names import GraphNames
from qwen_aot.engines.tensorrt.messages import failure, make_logger
from qwen_aot.engines.tensorrt.network import (
    Contract,
    allow_decomposed_attention,
    io_tables,
    layer_counts,
    parse,
)
from qwen_aot.engines.tensorrt.onnx_files import onnx_entries
from qwen_aot.engines.tensorrt.plugin_library import is_serialized
from qwen_aot.engines.tensorrt.program_text import read_programs
from qwen_aot.engines.tensorrt.progress import make_monitor
from qwen_aot.engines.tensorrt.sizes import cache_bytes, require_stored_once
from qwen_aot.engines.tensorrt.step_plans import step_plans, stored_bytes
from qwen_aot.errors import BuildError, DeployError
from qwen_aot.exporter.graph.plugin_ops import is_plugin
from qwen_aot.runtime.bundle.flavours import Flavour
from qwen_aot.runtime.bundle.manifest import PluginFacts, StepPlan, TensorRtFacts
from qwen_aot.whole_file import file_sha256
from qwen_aot.whole_folder import explained

logger = logging.getLogger(__name__)

# What reading a text that nobody documents may end in.
_UNREADABLE = (DeployError, LookupError, ValueError, TypeError, AssertionError, RecursionError, OSError)
_PIECE_BYTES = 16 << 20  # of an engine that is in memory as a whole
_COMPILE_PERCENT = 80  # of the time; the rest is writing (0.5B fp16 on 2 cores: 20 of 24 s)


@dataclass(frozen=True, slots=True)
class Source:
    """What is compiled: one engine of a bundle.

    Attributes:
        folder: that has the graph's file, and its weights' beside it.
        graph_file, engine_file: their names, of what is read and of what is written.
        graph: what the first of them holds.
        contract: what its inputs and outputs must be.
        steps: the ranges of input shapes of each of its optimization profiles, by the step's name.
        num_layers: of the model, or of the tower.
        weight_bytes: of all weights as they are stored, without the padding of their file.
        activation_bytes: that a step will take, estimated.
    """

    folder: Path
    graph_file: str
    engine_file: str
    graph: ir.Graph
    contract: Contract
    steps: Mapping[str, Ranges]
    num_layers: int
    weight_bytes: int
    activation_bytes: int


class Compilation:
    """Runs the builder, in whichever thread; `percent` and `cancel` are for another one.

    Args:
        trt: the library's module.
        flavour: its row.
        spec: the request.
        source: what is compiled.
        folder: where the engine is written.
        plugin_library: that the graph's plugin nodes need; None: it has none.
    """

    def __init__(
        self,
        trt: Any,
        flavour: Flavour,
        spec: BuildSpec,
        source: Source,
        folder: Path,
        plugin_library: Path | None = None,
    ) -> None:
        self._trt = trt
        self._spec = spec
        self._source = source
        self._folder = folder
        self._plugin_library = plugin_library
        self._title = f"{flavour.title} {trt.__version__}"
        self._logger = make_logger(trt)
        self._monitor = make_monitor(trt)
        self._writer: Any = None

    @property
    def percent(self) -> int:
        """Of the whole, below 100; never falls."""
        written = 0.0 if self._writer is None else self._writer.written / (self._source.weight_bytes + 1)
        done = _COMPILE_PERCENT * self._monitor.fraction + (100 - _COMPILE_PERCENT) * written
        return min(99, int(done))

    def cancel(self) -> None:
        """Ends the run at TensorRT's next callback."""
        self._monitor.is_cancelled = True

    def run(self) -> EngineFacts:
        """Parses, configures, compiles, writes.

        Raises:
            BuildError: TensorRT refuses, or the file can't be written.
        """
        spec, source = self._spec, self._source
        builder = self._make_builder()
        if self._plugin_library is not None:
            self._load_plugins(builder, self._plugin_library)
        network = parse(self._trt, builder, self._logger, source.folder / source.graph_file, self._title)
        allow_decomposed_attention(self._trt, network)
        inputs, outputs = io_tables(network, source.contract, self._title)
        layers = layer_counts(network)  # before the build, which may take the network apart
        timing_cache = TimingCache(spec.tensorrt.timing_cache)
        build_config = make_config(self._trt, builder, spec, self._plugin_library)
        build_config.progress_monitor = self._monitor
        timing_cache.load(build_config, self._logger, self._title)
        largest = {
            name: self._add_profile(builder, build_config, network, name, ranges)
            for name, ranges in source.steps.items()
        }
        # Beside TensorRT, in the time that it leaves a core idle: on Linux a niceness is the thread's own.
        with ThreadPoolExecutor(1, "hash", initializer=os.nice, initargs=(19,)) as pool:
            entries = pool.submit(onnx_entries, source.folder, source.graph_file)
            self._write_engine(builder, network, build_config)
        timing_cache.save(build_config)
        return EngineFacts(
            inputs=inputs,
            outputs=outputs,
            tensorrt=TensorRtFacts(
                version=self._trt.__version__,
                compute_capabilities=spec.compute_capabilities or own_capabilities(),
                hardware_compatible=spec.tensorrt.hardware_compatible,
                version_compatible=spec.tensorrt.version_compatible,
                has_weights=not spec.tensorrt.strip_weights,
                layers=layers,
                weight_bytes=source.weight_bytes,
                cache_bytes=cache_bytes(inputs, spec.max_batch),
                activation_bytes_estimated=source.activation_bytes,
                builder_activation_bytes=max(self._logger.activation_bytes, default=None),
                onnx=entries.result(),
                plugins=self._plugin_facts(),
            ),
            plan=self._read_plan(largest),
        )

    def _make_builder(self) -> Any:
        try:
            return self._trt.Builder(self._logger)
        except TypeError as error:  # what the bindings make of a null pointer
            raise failure(self._title, "start", self._logger.errors or [str(error)]) from error

    def _load_plugins(self, builder: Any, library: Path) -> None:
        """Into the builder's own registry, where the parser looks, and which ends with the builder."""
        self._logger.clear()
        if builder.get_plugin_registry().load_library(str(library)) is None:
            said = " | ".join(self._logger.errors) or "nothing"
            raise BuildError(
                f"{self._title} couldn't load the plugin library {library.name}: build it on a machine of this kind "
                f"with `python -m qwen_aot.plugins.library -o FOLDER`. It said: {said}"
            )

    def _plugin_facts(self) -> PluginFacts | None:
        if self._plugin_library is None:
            return None
        return PluginFacts(
            file=self._plugin_library.name,
            sha256=file_sha256(self._plugin_library),
            in_engine=is_serialized(self._spec),
            ops=tuple(sorted({node.op_type for node in self._source.graph if is_plugin(node)})),
        )

    def _add_profile(
        self, builder: Any, config: Any, network: Any, step: str, ranges: Ranges
    ) -> dict[str, tuple[int, ...]]:
        """Gives the largest shape of each input that has no fixed one."""
        present = {network.get_input(index).name for index in range(network.num_inputs)}
        shapes = builder.create_optimization_profile()
        for name, (least, typical, most) in ranges.items():
            if name in present:
                shapes.set_shape(name, least, typical, most)
        if config.add_optimization_profile(shapes) < 0:
            raise failure(self._title, f"take the {step} profile", self._logger.errors)
        return {name: most for name, (_, _, most) in ranges.items()}

    def _read_plan(self, largest: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Mapping[str, StepPlan] | None:
        """What the engine says about itself, if it does: TensorRT-RTX's has its program as text.

        Raises:
            BuildError: it stores weights more than once.
        """
        try:
            programs = read_programs(self._folder / self._source.engine_file)
            if not programs:
                return None
            plan = step_plans(programs, GraphNames(self._source.graph), self._source.num_layers, largest)
        except _UNREADABLE as error:  # nothing at run time depends on it
            logger.warning("what %s compiled can't be told: %s", self._title, error)
            return None
        require_stored_once(stored_bytes(programs), self._source.weight_bytes)
        return plan

    def _write_engine(self, builder: Any, network: Any, config: Any) -> None:
        self._logger.clear()
        path = self._folder / self._source.engine_file
        with explained(path), path.open("wb") as file:
            self._writer = _make_writer(self._trt, file)
            is_built = _build(builder, network, config, self._writer)
            if self._writer.error is not None:
                raise self._writer.error
        if not is_built:
            raise failure(self._title, "compile the graph", self._logger.errors)
        for text in self._logger.warnings:
            logger.info("%s: %s", self._title, text)


def _build(builder: Any, network: Any, config: Any, writer: Any) -> bool:
    """Compiles the network and gives the engine to the writer; in pieces, where TensorRT can (from 10.13 on)."""
    if hasattr(builder, "build_serialized_network_to_stream"):
        return bool(builder.build_serialized_network_to_stream(network, config, writer))
    engine = builder.build_serialized_network(network, config)  # in host memory, as large as the engine
    if engine is None:
        return False
    content = np.frombuffer(engine, np.uint8)  # not a memoryview: the bindings call the bytes floats
    for start in range(0, len(content), _PIECE_BYTES):
        writer.write(content[start : start + _PIECE_BYTES].data)
    return True


def _make_writer(trt: Any, file: BinaryIO) -> Any:
    """An `IStreamWriter` into a file. TensorRT takes no notice of a failed write, so `error` must be looked at."""

    class Writer(getattr(trt, "IStreamWriter", object)):  # type: ignore[misc]  # the class is of 10.13
        def __init__(self) -> None:
            super().__init__()
            self.written = 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.error is not None:
                return 0
            try:
                file.write(data)
            except OSError as error:
                self.error = error
                return 0
            self.written += len(data)
            return len(data)

    return Writer()
