"""What a manifest says about each engine of a bundle: its file, its I/O table, and what is compiled into it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.checks import MAX_COUNT, require_counts, require_one_of, require_sha256, require_within
from qwen_aot.runtime.bundle.step_plan import StepPlan
from qwen_aot.runtime.bundle.tensorrt_facts import TensorRtFacts

__all__ = [
    "CACHE_DTYPES",
    "CACHE_PREFIX",
    "DIMENSIONS",
    "DTYPES",
    "LAST_LOGITS",
    "LOGITS_POSITIONS",
    "ROTARY_OFFSET",
    "VERIFY",
    "VISION_STEP",
    "EngineEntry",
    "Engines",
    "IoTensor",
    "KernelGraph",
    "Profile",
    "TextEngine",
    "VisionEngine",
    "WeightEncodings",
    "rotary_table",
]

DTYPES = ("int64", "int32", "float32", "float16", "bfloat16", "int8")
CACHE_DTYPES = ("float32", "float16", "bfloat16", "int8")
DIMENSIONS = ("B", "S", "C", "W", "T", "I")
CACHE_PREFIX = "past_key_values."  # of the cache inputs' names
PRESENT_PREFIX = "present."  # of the outputs that share their memory
LAST_LOGITS = "last_logits"  # the output that `logits_rows` bounds
LOGITS_POSITIONS = "logits_positions"  # the input that says of how many tokens it is
ROTARY_OFFSET = "rotary_offset."  # the input of the first row of each row's rotary table; a number of tokens follows
VERIFY = "verify"  # the profile of the steps that want it
_COUNT = re.compile("[1-9][0-9]{0,8}")
VISION_STEP = "encode"  # the one step of a vision engine


@dataclass(frozen=True, slots=True)
class IoTensor:
    """One engine input or output. A dimension is a size or a letter (B, S, C, W, T, I)."""

    name: str
    dtype: str  # one of DTYPES
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BundleError(f"I/O tensor {self.name!r} has dtype {self.dtype!r}; accepted: {', '.join(DTYPES)}")
        for dim in self.shape:
            if dim not in DIMENSIONS and not (isinstance(dim, int) and 0 < dim <= MAX_COUNT):
                raise BundleError(
                    f"I/O tensor {self.name!r} has dimension {dim!r}; accepted: a size of 1 to {MAX_COUNT} or one of "
                    f"{', '.join(DIMENSIONS)}"
                )


@dataclass(frozen=True, slots=True)
class Profile:
    """Allowed new tokens per row and step (S)."""

    name: str  # prefill | decode
    min_tokens: int
    max_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_tokens <= self.max_tokens <= MAX_COUNT:
            raise BundleError(
                f"profile {self.name!r} allows {self.min_tokens} to {self.max_tokens} tokens; "
                f"accepted: 1 <= min_tokens <= max_tokens <= {MAX_COUNT}"
            )


@dataclass(frozen=True, slots=True)
class WeightEncodings:
    """What became of checkpoint tensors that were quantized already: encoding -> tensors, "gguf-q8_0" for example.

    Attributes:
        kept: the engine has the checkpoint's own codes and scales.
        requantized: decoded to floats, and stored in the engine's own precision.
    """

    kept: Mapping[str, int]
    requantized: Mapping[str, int]

    def __post_init__(self) -> None:
        for field, counts in (("kept", self.kept), ("requantized", self.requantized)):
            require_within({f"{field}[{encoding!r}]": count for encoding, count in counts.items()}, 1)


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """What every engine has.

    Attributes:
        file: one of the bundle's files; its suffix says which backend runs it.
        precision: of the weights, by the name that `--precision` has for it.
        quantization: block_size, symmetric, ...; empty where weights aren't quantized.
        weight_encodings: of the checkpoint's quantized tensors.
        weight_hashes: SHA-256 of each weight as the engine was made of it, by the name of its initializer: of its
            bytes with the rows of its checkpoint tensors outermost (docs/bundle.md). None: nothing is recorded.
        inputs: in the engine's order.
        outputs: in the engine's order.
        tensorrt: of TensorRT engines.
        plan: what the compiler made of each step, by its name; None: nothing is known.
    """

    file: str
    precision: str
    quantization: Mapping[str, int | str | bool]
    weight_encodings: WeightEncodings
    weight_hashes: Mapping[str, str] | None
    inputs: tuple[IoTensor, ...]
    outputs: tuple[IoTensor, ...]
    tensorrt: TensorRtFacts | None
    plan: Mapping[str, StepPlan] | None

    def __post_init__(self) -> None:
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            names = [tensor.name for tensor in tensors]
            if len(set(names)) != len(names):
                raise BundleError(f"an {kind} is listed twice among {', '.join(names)}")
        for name, digest in (self.weight_hashes or {}).items():
            require_sha256(f"weight_hashes[{name!r}]", digest)

    def _check_plan(self, steps: Collection[str]) -> None:
        unknown = [name for name in self.plan or () if name not in steps]
        if unknown:
            raise BundleError(f"the plan has the steps {unknown}; accepted: {', '.join(steps)}")


@dataclass(frozen=True, slots=True)
class KernelGraph:
    """The same decoder for the project's own CPU kernels, over the data files of the other graph (docs/cpu-kernels.md).

    Its inputs and outputs are those of the engine, but for the type of the cache.

    Attributes:
        file: one of the bundle's files.
        version: of the ops' interface, which the library must have.
        cache_dtype: element type of keys and values in the cache.
    """

    file: str
    version: int
    cache_dtype: str

    def __post_init__(self) -> None:
        require_counts(self, "version")
        require_one_of("cache_dtype of the kernels", self.cache_dtype, CACHE_DTYPES)


@dataclass(frozen=True, slots=True)
class TextEngine(EngineEntry):
    """The decoder, with a KV cache.

    Attributes:
        profiles: new tokens of the steps it takes, by name.
        cache_dtype: element type of keys and values in the cache.
        logits_rows: the largest T of the output `last_logits` [B, T, V]; None: it has none.
        kernels: the graph for own CPU kernels; None: there is none, and the key may be absent.
    """

    profiles: tuple[Profile, ...]
    cache_dtype: str
    logits_rows: int | None
    kernels: KernelGraph | None = None

    def __post_init__(self) -> None:
        EngineEntry.__post_init__(self)  # super() doesn't know a class with slots
        names = [profile.name for profile in self.profiles]
        if len(set(names)) != len(names):
            raise BundleError(f"a profile is listed twice among {', '.join(names)}")
        self._check_plan(names)
        require_counts(self, "logits_rows")

    def for_kernels(self) -> TextEngine:
        """What the manifest would say if the graph for own CPU kernels, which there must be, were the engine."""
        assert self.kernels is not None
        dtype = self.kernels.cache_dtype

        def stored(tensor: IoTensor) -> IoTensor:
            is_cache = tensor.name.startswith((CACHE_PREFIX, PRESENT_PREFIX))
            return replace(tensor, dtype=dtype) if is_cache and tensor.dtype == self.cache_dtype else tensor

        return replace(
            self,
            file=self.kernels.file,
            cache_dtype=dtype,
            inputs=tuple(map(stored, self.inputs)),
            outputs=tuple(map(stored, self.outputs)),
        )

    @property
    def rotary_input(self) -> IoTensor | None:
        """The input `rotary_offset.N`; None: all rows have one rotary table."""
        return next((tensor for tensor in self.inputs if tensor.name.startswith(ROTARY_OFFSET)), None)

    @property
    def rotary_length(self) -> int | None:
        """N of `rotary_input`: the first table is of first steps of up to N tokens, the next of up to 2 N, and on."""
        tensor = self.rotary_input
        return None if tensor is None else int(tensor.name.removeprefix(ROTARY_OFFSET))

    def check_rotary(self) -> None:
        """The name of an input `rotary_offset.N` has a number of tokens.

        Raises:
            BundleError: it hasn't.
        """
        tensor = self.rotary_input
        if tensor is not None and not _COUNT.fullmatch(tensor.name.removeprefix(ROTARY_OFFSET)):
            raise BundleError(
                f"the input {tensor.name!r} names no number of tokens; accepted: {ROTARY_OFFSET}N, N from 1 to "
                "999999999"
            )

    def check_cache(self, slots: int) -> None:
        """The cache inputs are [B, Hkv, C, D], scales [B, Hkv, C], all with one C of at least `slots`.

        Raises:
            BundleError: names the input that isn't.
        """
        cache = [tensor for tensor in self.inputs if tensor.name.startswith(CACHE_PREFIX)]
        for tensor in cache:
            if tensor.dtype not in CACHE_DTYPES or not _is_cache_shape(tensor.shape, slots):
                raise BundleError(
                    f"the cache input {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}; accepted: "
                    f"{', '.join(CACHE_DTYPES)} of shape [B, heads, C, size] or [B, heads, C], C the letter or at "
                    f"least max_context + prefill_chunk = {slots}"
                )
            if not tensor.name.endswith("_scale") and tensor.dtype != self.cache_dtype:
                raise BundleError(f"cache_dtype is {self.cache_dtype!r}, but {tensor.name!r} is {tensor.dtype}")
        capacities = {tensor.shape[2] for tensor in cache}
        if len(capacities) > 1:
            raise BundleError(f"the cache inputs have the capacities {capacities}; accepted: one for all")

    def check_logits(self, vocab_size: int, prefill_chunk: int) -> None:
        """The output `last_logits` and its input are there exactly if `logits_rows` is, with their shapes.

        A row of the cache has room for a prefill chunk more than its context: so many tokens may be checked at once.

        Raises:
            BundleError: names the one that isn't, and shows it; or more rows than that.
        """
        rows = self.logits_rows
        if rows is not None and not 2 <= rows <= prefill_chunk:
            raise BundleError(f"logits_rows is {rows}; accepted: 2 to prefill_chunk = {prefill_chunk}")
        for kind, tensors, wanted in (
            ("output", self.outputs, IoTensor(LAST_LOGITS, "float32", ("B", "T", vocab_size))),
            ("input", self.inputs, IoTensor(LOGITS_POSITIONS, "int64", ("T",))),
        ):
            found = [tensor for tensor in tensors if tensor.name == wanted.name]
            if found != ([] if rows is None else [wanted]):
                shown = [_shown(tensor) for tensor in found] or ["absent"]
                raise BundleError(
                    f"logits_rows is {rows}, and the {kind} {wanted.name!r} is {shown[0]}; accepted: {_shown(wanted)} "
                    "with logits_rows, or neither"
                )

    def check_layers(self, num_hidden_layers: int) -> None:
        """A plan that counts kernels by layer counts those of all layers.

        Raises:
            BundleError: it has another number of layers.
        """
        for name, step in (self.plan or {}).items():
            if len(step.layer_kernels) not in (0, num_hidden_layers):
                raise BundleError(
                    f"layer_kernels of the step {name!r} are of {len(step.layer_kernels)} layers; accepted: "
                    f"{num_hidden_layers}, or none"
                )


@dataclass(frozen=True, slots=True)
class VisionEngine(EngineEntry):
    """The tower that turns images into what the text engine takes: sizes are fixed but for the number of images.

    Attributes:
        max_batch: images of a run.
    """

    max_batch: int

    def __post_init__(self) -> None:
        EngineEntry.__post_init__(self)
        self._check_plan([VISION_STEP])
        require_counts(self, "max_batch")
        for tensor in (*self.inputs, *self.outputs):
            if tensor.shape[:1] != ("B",) or any(isinstance(dim, str) for dim in tensor.shape[1:]):
                raise BundleError(
                    f"the vision engine's {tensor.name!r} has the shape {list(tensor.shape)}; accepted: B, then sizes"
                )


@dataclass(frozen=True, slots=True)
class Engines:
    """The bundle's engines. A reader that can't run `vision` runs `text` alone."""

    text: TextEngine
    vision: VisionEngine | None

    @property
    def all(self) -> tuple[EngineEntry, ...]:
        """Those that there are."""
        return (self.text,) if self.vision is None else (self.text, self.vision)


def rotary_table(rotary_length: int | None, tokens: int) -> int:
    """The index of the rotary table of a row whose first step has so many tokens (`TextEngine.rotary_length`)."""
    return 0 if rotary_length is None else (-(-tokens // rotary_length) - 1).bit_length()


def _shown(tensor: IoTensor) -> str:
    return f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def _is_cache_shape(shape: tuple[int | str, ...], slots: int) -> bool:
    if len(shape) not in (3, 4):
        return False
    rows, heads, capacity, *rest = shape
    has_room = capacity >= slots if isinstance(capacity, int) else capacity == "C"
    return rows == "B" and has_room and all(isinstance(size, int) for size in (heads, *rest))
