"""The engine over TensorRT or TensorRT-RTX, past and present bound to one place in device memory."""

from __future__ import annotations

import weakref
from contextlib import ExitStack

import numpy as np

from qwen_aot.errors import EngineMismatchError
from qwen_aot.runtime.backends.cuda.runtime import find_device, load_cuda
from qwen_aot.runtime.backends.cuda.stream import CudaStream
from qwen_aot.runtime.backends.tensorrt.buffers import StepBuffers
from qwen_aot.runtime.backends.tensorrt.bundle_code import bundle_code
from qwen_aot.runtime.backends.tensorrt.cache import DeviceCache, fixed_capacity
from qwen_aot.runtime.backends.tensorrt.checks import check_device, tensorrt_facts
from qwen_aot.runtime.backends.tensorrt.context import Bindings
from qwen_aot.runtime.backends.tensorrt.graphs import DecodeGraphs
from qwen_aot.runtime.backends.tensorrt.library import load_library
from qwen_aot.runtime.backends.tensorrt.loaded_engine import LoadedEngine
from qwen_aot.runtime.backends.tensorrt.runtime_cache import RuntimeCache, cache_file
from qwen_aot.runtime.backends.tensorrt.step import WINDOW_STEP, TensorRtStep
from qwen_aot.runtime.bundle.load import Bundle
from qwen_aot.runtime.bundle.manifest import ROTARY_OFFSET, VERIFY, Manifest
from qwen_aot.runtime.engine.io_table import check_table, image_width
from qwen_aot.runtime.engine.rows import RowEngine

__all__ = ["TensorRtEngine"]


class TensorRtEngine(RowEngine[TensorRtStep, DeviceCache]):
    """`runtime.engine.protocol.Engine` for the targets whose engine file is a TensorRT engine.

    All memory is allocated when the engine is opened, and a step allocates none. One stream does everything, so a
    step's copies and kernels follow each other without further synchronization.
    """

    def __init__(self, bundle: Bundle, *, allow_bundle_code: bool = False) -> None:
        """Checks code, library, GPU and free memory, then loads the engine and allocates its cache.

        Args:
            bundle: checked.
            allow_bundle_code: let it run native code of its own; see `runtime.backends.tensorrt.bundle_code`.

        Raises:
            EngineMismatchError: a library is missing or of another version, there is no GPU or driver, or the GPU
                can't run this engine, or the bundle has code that isn't allowed.
            GenerationError: the GPU failed.
        """
        manifest = bundle.manifest
        facts = tensorrt_facts(manifest.engines.text)
        check_table(manifest)
        profiles = _profiles(manifest)
        limits = _limits(manifest, fixed_capacity(manifest))
        code = bundle_code(bundle, facts, is_allowed=allow_bundle_code)
        library = load_library(manifest, facts)
        cuda = load_cuda()
        device = find_device(cuda)
        check_device(manifest, facts, device)
        with ExitStack() as resources:  # ends graphs and contexts, engine, runtime, memory, stream
            stream = CudaStream(cuda)
            resources.callback(stream.close)
            runtime_cache = None
            if library.flavour.compiles_on_device:
                sha256 = manifest.files[manifest.engines.text.file].sha256
                path = cache_file(sha256, device.compute_capability, str(library.api.__version__))
                runtime_cache = RuntimeCache(library, cuda, path)
            engine = LoadedEngine(library, stream, runtime_cache)
            resources.callback(engine.close)
            engine.load(bundle.engine_path, code)
            engine.check_signature(manifest.engines.text, limits)
            cache = DeviceCache(cuda, stream, manifest)
            engine.allocate_activations()
            key_positions = _upload_positions(stream, cache.capacity)
            captures_graphs = library.flavour.captures_graphs
            graphs = None if captures_graphs else DecodeGraphs(engine, stream, profiles["decode"])
            steps = {}
            for name, profile in profiles.items():
                sizes = limits[profile]
                buffers = StepBuffers(
                    stream,
                    max_rows=sizes["B"][1],
                    max_tokens=sizes["S"][1],
                    vocab_size=manifest.model.vocab_size,
                    has_last_logits=VERIFY in profiles,
                    verifies=name == VERIFY,
                    image_width=image_width(manifest),
                    image_rows=sizes["I"][1],
                )
                steps[name] = TensorRtStep(
                    cuda,
                    stream,
                    cache,
                    buffers,
                    _bindings(manifest, buffers, key_positions, cache),
                    engine.make_context(profile, captures_graphs=captures_graphs and name == "decode"),
                    graphs if name == "decode" else None,
                )
            stream.synchronize()
            self._free = weakref.finalize(self, resources.pop_all().close)
        # The driver may have ended before Python runs what is left; the GPU's memory goes with the process.
        self._free.atexit = False
        super().__init__(manifest, cache, steps["prefill"], steps["decode"], steps.get(VERIFY))

    def _free_resources(self) -> None:
        self._free()


def _profiles(manifest: Manifest) -> dict[str, int]:
    """The index of each profile by its name: the engine has them in the manifest's order."""
    engine = manifest.engines.text
    names = [profile.name for profile in engine.profiles]
    needed = ["prefill", "decode"] if engine.logits_rows is None else ["prefill", "decode", VERIFY]
    if sorted(names) != sorted(needed):
        raise EngineMismatchError(
            f"the engine has the profiles {', '.join(names) or 'none'}; accepted: {' and '.join(needed)}. Rebuild "
            "the bundle"
        )
    return {name: names.index(name) for name in needed}


def _limits(manifest: Manifest, capacity: int) -> list[dict[str, tuple[int, int]]]:
    """For each profile, the smallest and largest sizes that steps will have."""
    window = (min(WINDOW_STEP, capacity), capacity)
    rows, logits_rows = (1, manifest.max_batch), manifest.engines.text.logits_rows
    sizes = {
        "prefill": {
            **{"B": (1, 1), "S": (1, manifest.prefill_chunk), "W": window, "T": (1, 1)},
            "I": (1, manifest.prefill_chunk),
        },
        "decode": {"B": rows, "S": (1, 1), "W": window, "T": (1, 1), "I": (1, 1)},
    }
    if logits_rows is not None:
        sizes[VERIFY] = {"B": rows, "S": (2, logits_rows), "W": window, "T": (2, logits_rows), "I": (1, 1)}
    return [sizes[profile.name] for profile in manifest.engines.text.profiles]


def _upload_positions(stream: CudaStream, capacity: int) -> int:
    """The address of 0 … C-1 in device memory: the input key_positions of every W."""
    host = stream.allocate_pinned(capacity * 8).view(np.int64)
    host[:] = np.arange(capacity)
    address = stream.allocate(host.nbytes)
    stream.copy_to_device(address, host)
    return address


def _bindings(manifest: Manifest, buffers: StepBuffers, key_positions: int, cache: DeviceCache) -> Bindings:
    engine = manifest.engines.text
    places = buffers.addresses | {"key_positions": key_positions}
    rotary_input = None if engine.rotary_input is None else engine.rotary_input.name
    if rotary_input is not None:
        places[rotary_input] = places[ROTARY_OFFSET]
    names = {tensor.name for tensor in (*engine.inputs, *engine.outputs)}
    bound = {name: place for name, place in places.items() if name in names}
    return Bindings(bound, cache.tensors, rotary_input, image_width(manifest) or 0)
