"""What a machine must have for a TensorRT bundle, told before anything is allocated."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_aot.errors import EngineMismatchError
from qwen_aot.runtime.backends.cuda.runtime import _available_host_bytes
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.backends.tensorrt import library as _tensorrt_library
from qwen_aot.runtime.backends.tensorrt.engine import TensorRtEngine
from qwen_aot.runtime.bundle.load import Bundle, load_bundle
from qwen_aot.runtime.bundle.manifest import IoTensor, Profile
from tests.doubles.bundles import write_tensorrt_bundle
from tests.doubles.gpu import Gpu
from tests.doubles.install import VERSIONS, installed
from tests.doubles.tensorrt import make_tensorrt
from tests.runtime.backends.tensorrt.engines import FLAVOURS, opened, write_checksum_bundle
from tests.runtime.toys import ALL_INPUTS, checksum_model, io_tables, make_manifest, with_text_engine
from tests.tools import require_package

MIB = 1 << 20


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def refused(bundle: Path | Bundle, message: str, gpu: Gpu | None = None, **versions: str) -> None:
    """Opening fails with this message, and nothing had been asked of the GPU but what it is."""
    with installed(gpu or Gpu(), VERSIONS | versions) as device:
        with pytest.raises(EngineMismatchError, match=message):
            open_engine(bundle if isinstance(bundle, Bundle) else load_bundle(bundle))
        assert not device.allocations
        assert not device.calls.keys() & {"cudaMalloc", "cudaMallocHost", "cudaStreamCreateWithFlags"}
        assert device.calls["deserialize_cuda_engine"] == 0


@pytest.mark.parametrize(
    ("capability", "facts", "accepted"),
    [
        ((7, 5), {}, "8.6, 8.9"),
        ((12, 0), {}, "8.6, 8.9"),
        ((7, 5), {"hardware_compatible": True}, "8.0 and later"),
    ],
)
def test_another_gpu(
    tmp_path: Path, flavour: str, capability: tuple[int, int], facts: dict[str, Any], accepted: str
) -> None:
    bundle = write_checksum_bundle(tmp_path / "bundle", flavour, facts=facts)
    found = ".".join(map(str, capability))
    remedy = rf"with --compute-capability {found}" if flavour == "tensorrt_rtx" else "on this machine"
    refused(
        bundle,
        rf"GPU Double RTX has compute capability {found}; the bundle's engine runs on {accepted}.*"
        rf"rebuild the bundle {remedy}$",
        Gpu(capability=capability),
    )


@pytest.mark.parametrize(
    ("capability", "facts"),
    [
        ((8, 6), {}),
        ((12, 0), {"hardware_compatible": True}),
        ((12, 1), {"compute_capabilities": ()}),  # the GPU that built it: TensorRT compares
    ],
)
def test_a_gpu_that_fits(tmp_path: Path, flavour: str, capability: tuple[int, int], facts: dict[str, Any]) -> None:
    with opened(write_checksum_bundle(tmp_path / "bundle", flavour, facts=facts), Gpu(capability=capability)):
        pass


def test_too_little_memory(tmp_path: Path, flavour: str) -> None:
    bundle = write_checksum_bundle(tmp_path / "bundle", flavour, facts={"activation_bytes_estimated": 64 * MIB})
    gpu = Gpu(total_bytes=100 * MIB, others_bytes=50 * MIB)
    refused(bundle, "has 50 MiB of 100 MiB free, and the bundle needs about 66 MiB: weights 1 MiB", gpu)


def test_the_builders_own_figure_counts_and_not_the_estimate(tmp_path: Path, flavour: str) -> None:
    gpu = {"total_bytes": 100 * MIB, "others_bytes": 50 * MIB}
    more = {"activation_bytes_estimated": 0, "builder_activation_bytes": 64 * MIB}
    bundle = write_checksum_bundle(tmp_path / "more", flavour, facts=more)
    refused(bundle, r"needs about 66 MiB: .*, activations 64 MiB \(as TensorRT told when it was built\)", Gpu(**gpu))
    less = {"activation_bytes_estimated": 64 * MIB, "builder_activation_bytes": 1 * MIB}
    with opened(write_checksum_bundle(tmp_path / "less", flavour, facts=less), Gpu(**gpu)):
        pass


def test_memory_that_the_host_can_give_counts_on_a_jetson(tmp_path: Path) -> None:
    # There the page cache, which just took in the engine file, is not free to CUDA, and is given up when asked for.
    bundle = write_checksum_bundle(tmp_path / "bundle", facts={"activation_bytes_estimated": 64 * MIB})
    with opened(bundle, Gpu(total_bytes=20 * MIB, is_integrated=True)):
        pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [("MemTotal: 9 kB\nMemAvailable:   3 kB\n", 3072), ("MemTotal: 9 kB\n", 0), (None, 0)],
)
def test_what_the_host_says_it_has(tmp_path: Path, text: str | None, expected: int) -> None:
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    assert _available_host_bytes(tmp_path / "meminfo") == expected


def test_no_driver(tmp_path: Path, flavour: str) -> None:
    bundle = write_checksum_bundle(tmp_path / "bundle", flavour)
    refused(bundle, "no GPU can be used.*no NVIDIA driver was found; run this bundle on a machine", Gpu(driver=0))


def test_a_driver_that_is_too_old(tmp_path: Path) -> None:
    bundle = write_checksum_bundle(tmp_path / "bundle")
    refused(bundle, r"the driver supports CUDA 12\.4 and the bindings are of 13\.0; update", Gpu(driver=12040))


def test_no_gpu(tmp_path: Path) -> None:
    bundle = write_checksum_bundle(tmp_path / "bundle")
    refused(bundle, r"\(cudaErrorNoDevice\): the driver \(CUDA 13\.0\) shows none; check nvidia-smi", Gpu(count=0))


@pytest.mark.parametrize("call", ["cudaGetDeviceCount", "cudaGetDevice", "cudaGetDeviceProperties", "cudaMemGetInfo"])
def test_a_gpu_that_does_not_answer(tmp_path: Path, call: str) -> None:
    gpu = Gpu()
    gpu.fail(call)
    refused(write_checksum_bundle(tmp_path / "bundle"), r"no GPU can be used \(cudaErrorUnknown\)", gpu)


@pytest.mark.parametrize(
    ("flavour", "found"),
    [
        ("tensorrt_rtx", "1.6.9"),
        ("tensorrt_rtx", "1.7.0.5"),  # a patch apart: neither library loads it
        ("tensorrt_rtx", "1.8.0.1"),
        ("tensorrt", "10.13.2.6"),
        ("tensorrt", "11.0.0.1"),
    ],
)
def test_another_version(tmp_path: Path, flavour: str, found: str) -> None:
    built = VERSIONS[flavour]
    refused(
        write_checksum_bundle(tmp_path / "bundle", flavour),
        rf"is {found}, and the bundle's engine was built by {built}; accepted: version {built}\. "
        rf"Install it \(pip install tensorrt[-a-z0-9]*=={built}",
        **{flavour: found},
    )


@pytest.mark.parametrize(
    ("found", "compatible", "is_accepted"),
    [
        ("10.13.3.9.post1", False, True),
        ("10.13.3", False, True),  # a package that leaves the build number out
        ("10.14.1.1", True, True),
        ("11.0.0.0", True, True),
        ("10.12.9.9", True, False),
        ("10.13.2.6", True, False),
    ],
)
def test_versions_that_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str, compatible: bool, is_accepted: bool
) -> None:
    monkeypatch.setenv("QWEN_AOT_ALLOW_BUNDLE_CODE", "1")  # which a version-compatible engine brings
    bundle = write_checksum_bundle(tmp_path / "bundle", "tensorrt", facts={"version_compatible": compatible})
    if not is_accepted:
        refused(bundle, r"accepted: version 10\.13\.3\.9 or later\. Install", tensorrt=found)
        return
    with installed(Gpu(), VERSIONS | {"tensorrt": found}):
        open_engine(load_bundle(bundle)).close()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            "tensorrt",
            r"TensorRT can't be imported .*install version 10\.13\.3\.9, which built this bundle: pip install",
        ),
        ("cuda.bindings", "CUDA's Python bindings can't be imported .*install them with pip install cuda-bindings"),
    ],
)
def test_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, message: str) -> None:
    bundle = load_bundle(write_checksum_bundle(tmp_path / "bundle", "tensorrt"))
    with installed(Gpu()), monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, None)
        with pytest.raises(EngineMismatchError, match=message):
            open_engine(bundle)


def test_bindings_without_their_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str) -> None:
    """The index has TensorRT's bindings alone: their import fails to open libnvinfer."""
    bundle = load_bundle(write_checksum_bundle(tmp_path / "bundle", flavour))

    def import_module(name: str) -> None:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(_tensorrt_library, "importlib", SimpleNamespace(import_module=import_module))
    with pytest.raises(EngineMismatchError, match=r"can't be imported \(libnvinfer.so.10: cannot open .*pip install"):
        TensorRtEngine(bundle)


def test_an_engine_without_weights(tmp_path: Path) -> None:
    bundle = write_checksum_bundle(tmp_path / "bundle", facts={"has_weights": False})
    refused(bundle, "built without its weights .*refit it with .* or rebuild the bundle without --strip-weights")


def changed(path: Path, **fields: Any) -> Bundle:
    """The bundle with these fields of its text engine's entry."""
    return Bundle(path, with_text_engine(load_bundle(path).manifest, **fields))


def test_a_manifest_without_tensorrts_facts(tmp_path: Path) -> None:
    bundle = changed(write_checksum_bundle(tmp_path / "bundle", "tensorrt"), tensorrt=None)
    refused(bundle, r"'engine\.plan', but its manifest has no `tensorrt` section; rebuild")


def test_a_manifest_without_a_decode_profile(tmp_path: Path) -> None:
    bundle = changed(write_checksum_bundle(tmp_path / "bundle"), profiles=(Profile("prefill", 1, 8),))
    refused(bundle, "the engine has the profiles prefill; accepted: prefill and decode")


def test_a_capacity_that_is_not_fixed(tmp_path: Path) -> None:
    path = write_checksum_bundle(tmp_path / "bundle")
    manifest = load_bundle(path).manifest
    inputs = tuple(
        replace(t, shape=(*t.shape[:2], "C", t.shape[3])) if len(t.shape) == 4 else t
        for t in manifest.engines.text.inputs
    )
    refused(changed(path, inputs=inputs), "capacity is 'C'; accepted: a number of tokens, fixed when")


@pytest.mark.parametrize(
    "tensor",
    [IoTensor("mask", "int64", ("B", "W")), IoTensor("image_rows", "float16", ("I", 8))],
    ids=lambda tensor: tensor.name,
)
def test_an_input_that_the_runtime_cannot_feed(tmp_path: Path, tensor: IoTensor) -> None:
    path = write_checksum_bundle(tmp_path / "bundle")
    inputs = (*load_bundle(path).manifest.engines.text.inputs, tensor)
    message = f"input '{tensor.name}' of dtype {tensor.dtype}, which this runtime can't feed"
    refused(changed(path, inputs=inputs), message)


def test_an_output_that_the_runtime_cannot_take(tmp_path: Path) -> None:
    path = write_checksum_bundle(tmp_path / "bundle")
    manifest = load_bundle(path).manifest
    hidden = IoTensor("hidden_states", "float32", ("B", "S", 16))
    bundle = changed(path, outputs=(*manifest.engines.text.outputs, hidden))
    refused(bundle, r"has the outputs \['hidden_states', 'logits', .*; accepted: logits \(")


@pytest.mark.parametrize("missing", ["verify", "decode"])
def test_a_profile_that_is_missing(tmp_path: Path, missing: str) -> None:
    path = write_checksum_bundle(tmp_path / "bundle", names=(*ALL_INPUTS, "logits_positions"), logits_rows=3)
    profiles = load_bundle(path).manifest.engines.text.profiles
    bundle = changed(path, profiles=tuple(profile for profile in profiles if profile.name != missing))
    refused(bundle, "accepted: prefill and decode and verify. Rebuild the bundle")


class TestAnEngineThatIsNotTheManifests:
    """Found once it is loaded: no cache is allocated then, and everything is freed."""

    def refused(self, bundle: Bundle, message: str) -> None:
        with installed(Gpu()) as gpu:
            with pytest.raises(EngineMismatchError, match=message):
                open_engine(bundle)
            assert gpu.calls["deserialize_cuda_engine"] == 1 and gpu.calls["cudaMalloc"] == 0

    def test_another_input(self, tmp_path: Path) -> None:
        path = write_checksum_bundle(tmp_path / "bundle")
        inputs = load_bundle(path).manifest.engines.text.inputs[1:]
        self.refused(changed(path, inputs=inputs), r"only in the engine \['input_ids'\], only in the manifest \[\]")

    def test_another_shape(self, tmp_path: Path) -> None:
        path = write_checksum_bundle(tmp_path / "bundle")
        inputs = load_bundle(path).manifest.engines.text.inputs
        larger = tuple(replace(t, shape=("B", 2, 2048, 8)) if t.name.startswith("past") else t for t in inputs)
        bundle = changed(path, inputs=larger)
        self.refused(bundle, r"'past_key_values.0.key' is FLOAT \[-1, 2, 1024, 8\] in the engine, FLOAT .*2048")

    def test_another_dtype(self, tmp_path: Path) -> None:
        path = write_checksum_bundle(tmp_path / "bundle")
        manifest = load_bundle(path).manifest
        inputs = tuple(
            replace(t, dtype="float16") if t.name.startswith("past") else t for t in manifest.engines.text.inputs
        )
        bundle = changed(path, inputs=inputs, cache_dtype="float16")
        self.refused(bundle, r"'past_key_values.0.key' is FLOAT .* in the engine, HALF .* as an input in the manifest")

    def test_a_profile_that_is_too_small(self, tmp_path: Path) -> None:
        path = write_checksum_bundle(tmp_path / "bundle")
        bundle = Bundle(path, replace(load_bundle(path).manifest, max_batch=8))
        self.refused(bundle, r"profile 1 of the engine takes B of 1 to 4 in 'input_ids'; needed: 1 to 8")

    def test_a_verify_profile_of_too_few_tokens(self, tmp_path: Path) -> None:
        path = write_checksum_bundle(tmp_path / "bundle", names=(*ALL_INPUTS, "logits_positions"), logits_rows=3)
        message = "profile 2 of the engine takes S of 2 to 3 in 'input_ids'; needed: 2 to 4"
        self.refused(changed(path, logits_rows=4), message)


def test_rows_that_do_not_begin_where_kernels_need(tmp_path: Path) -> None:
    inputs, outputs = io_tables(ALL_INPUTS, "float32", capacity=50)  # 2 heads of 50 tokens of 32 bytes
    manifest = make_manifest(inputs=inputs, outputs=outputs, max_context=40, max_batch=2)
    path = write_tensorrt_bundle(tmp_path / "two", checksum_model(inputs, outputs), manifest, "tensorrt")
    with installed(Gpu()), pytest.raises(EngineMismatchError, match="has 3200 bytes; accepted: multiples of 256"):
        open_engine(load_bundle(path))
    manifest = replace(manifest, max_batch=1)
    path = write_tensorrt_bundle(tmp_path / "one", checksum_model(inputs, outputs), manifest, "tensorrt")
    with opened(path) as (engine, _):
        assert engine.cache.capacity == 50


def test_a_file_that_the_library_refuses(tmp_path: Path) -> None:
    bundle = load_bundle(write_checksum_bundle(tmp_path / "bundle", "tensorrt_rtx"))
    gpu = Gpu()
    gpu.fail("deserialize_cuda_engine")
    with (
        installed(gpu),
        pytest.raises(EngineMismatchError, match=r"RTX 1\.7\.1\.116 can't load .*told to fail.*Rebuil"),
    ):
        open_engine(bundle)


def test_bundles_of_the_double_are_whole(tmp_path: Path) -> None:
    path = write_checksum_bundle(tmp_path / "bundle", "tensorrt_rtx")
    document = json.loads((path / "manifest.json").read_text())
    engine = document["engines"]["text"]
    assert engine["file"] == "engine.rtx" and document["target"] == "tensorrt-rtx"
    assert engine["tensorrt"]["cache_bytes"] == 2 * 4 * 2 * 1024 * 8 * 4


@pytest.mark.tools
@pytest.mark.skipif(sys.platform != "linux", reason="a driver is looked for where Linux has it")
def test_the_real_bindings_on_a_machine_without_a_driver(tmp_path: Path) -> None:
    cuda = require_package("cuda.bindings.runtime", "pip install cuda-bindings")
    if cuda.cudaDriverGetVersion()[1] != 0:
        pytest.skip("this machine has a driver")
    bundle = load_bundle(write_checksum_bundle(tmp_path / "bundle", "tensorrt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", make_tensorrt(Gpu(), "tensorrt", VERSIONS["tensorrt"]))
        with pytest.raises(EngineMismatchError, match=r"cudaErrorInsufficientDriver\): no NVIDIA driver was found"):
            open_engine(bundle)
