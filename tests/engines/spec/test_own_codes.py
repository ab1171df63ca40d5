"""What a checkpoint that fixes its precision makes of a request, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.own_codes import settled
from qwen_aot.engines.spec.precisions import judged_as
from qwen_aot.engines.spec.targets import Target
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, Encoding
from qwen_aot.exporter.checkpoint.storage import Storage

HALF = np.dtype(np.float16)
TABLES = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), HALF)
FOUR = Encoding("gptq", CodeForm(4, 128, HALF), fixes_precision=True)
EIGHT = Encoding("gptq", CodeForm(8, 128, HALF), fixes_precision=True)
AWQ = Encoding("awq", CodeForm(4, 128, HALF, has_zero_points=True), fixes_precision=True)
GGUF = Encoding("gguf-q4_0", CodeForm(4, 32, HALF))
Q4_1 = Encoding("gguf-q4_1", CodeForm(4, 32, HALF, has_offsets=True))
Q8_0 = Encoding("gguf-q8_0", CodeForm(8, 32, HALF))


def storage(*encodings: Encoding, dtypes: Any = TABLES) -> Storage:
    return Storage({f"t{i}": encoding for i, encoding in enumerate(encodings)}, {}, dtypes)


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize(
    ("encodings", "precision"),
    [((FOUR,), "int4"), ((EIGHT,), "int8"), ((AWQ, FOUR, EIGHT), "int4"), ((FOUR, EIGHT, EIGHT), "int8")],
)
def test_without_flags_it_keeps_its_codes(target: Target, encodings: tuple[Encoding, ...], precision: str) -> None:
    found = settled(BuildSpec(target=target), storage(*encodings))
    assert (found.precision, found.own_codes) == (precision, True)
    assert found.quantization["own_codes"] is True
    assert "block_size" not in found.quantization and "symmetric" not in found.quantization


@pytest.mark.parametrize("encodings", [(), (GGUF,)])
@pytest.mark.parametrize("asked", [{}, {"precision": "int8", "block_size": 64}])
def test_another_checkpoint_changes_nothing(encodings: tuple[Encoding, ...], asked: dict[str, Any]) -> None:
    spec = BuildSpec(**asked)
    assert settled(spec, storage(*encodings)) is spec


def test_its_own_precision_and_floats_may_be_named() -> None:
    own = storage(FOUR)
    assert settled(BuildSpec(precision="int4"), own).own_codes  # type: ignore[arg-type]
    for target, precision in (("cpu", "fp32"), ("cuda", "fp16"), ("tensorrt", "bf16")):
        spec = BuildSpec(target=target, precision=precision)  # type: ignore[arg-type]
        assert settled(spec, own) is spec


@pytest.mark.parametrize("target", Target)
def test_a_gguf_files_codes_are_kept_on_request(target: Target) -> None:
    found = settled(BuildSpec(target=target, own_codes=True), storage(GGUF, Q4_1, Q8_0))
    assert (found.precision, found.own_codes) == ("int4", True)
    assert settled(BuildSpec(target=target, own_codes=True), storage(Q8_0, Q8_0, GGUF)).precision == "int8"


def test_own_codes_and_floats_exclude_each_other() -> None:
    with pytest.raises(BuildError, match="own_codes doesn't go with precision fp32; accepted: int4, int8"):
        BuildSpec(own_codes=True, precision="fp32")  # type: ignore[arg-type]


CONFLICTS: dict[str, tuple[dict[str, Any], Storage, str]] = {
    "int8": (
        {"precision": "int8"},
        storage(FOUR, FOUR),
        r"int8 would round .* 2 tensors of gptq \(4 bits in groups of 128\).* accepted: int4 .*; or fp32, floats",
    ),
    "int4": ({"precision": "int4"}, storage(EIGHT), "accepted: int8"),
    "fp8": ({"precision": "fp8", "target": "tensorrt-rtx"}, storage(FOUR), "accepted: int4 .*; or fp16, bf16, floats"),
    "blocks": (
        {"block_size": 32},
        storage(FOUR),
        "block_size 32 conflicts with the checkpoint, .*; leave block_size out",
    ),
    "the same blocks": ({"block_size": 128}, storage(FOUR), "block_size 128 conflicts"),
    "asymmetric": ({"symmetric": False}, storage(FOUR), "symmetric False conflicts"),
    "symmetric": ({"symmetric": True}, storage(AWQ), r"groups of 128 with zero points.*leave symmetric out"),
    "sensitive bits": ({"sensitive_bits": 8}, storage(FOUR, dtypes={}), "sensitive_bits 8 conflicts"),
    "a GGUF file's own codes in another precision": (
        {"own_codes": True, "precision": "int8"},
        storage(Q4_1, Q4_1),
        r"int8 would round .* 2 tensors of gguf-q4_1 \(4 bits in groups of 32 with minimums\).* accepted: int4",
    ),
    "nothing to keep": ({"own_codes": True}, storage(), "own_codes has nothing to keep"),
}


@pytest.mark.parametrize(("asked", "own", "message"), CONFLICTS.values(), ids=CONFLICTS)
def test_what_conflicts_is_refused_with_what_is_accepted(asked: dict[str, Any], own: Storage, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        settled(BuildSpec(**asked), own)


def test_bits_of_embedding_and_head_are_free_where_these_are_numbers() -> None:
    assert settled(BuildSpec(sensitive_bits=8), storage(FOUR)).quantization == {
        "own_codes": True,
        "sensitive_bits": 8,
        "fast_prefill": False,
    }


def test_a_gguf_file_keeps_its_codes_where_that_is_asked_for() -> None:
    assert settled(BuildSpec(own_codes=True), storage(GGUF)).own_codes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp32"}, "doesn't go with precision fp32; accepted: int4, int8"),
        ({"block_size": 32}, "takes blocks and zero points from the checkpoint"),
        ({"symmetric": False}, "takes blocks and zero points from the checkpoint"),
    ],
)
def test_own_codes_have_no_form_of_their_own(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        BuildSpec(own_codes=True, **options)


def test_own_codes_are_held_to_what_rounded_activations_lose() -> None:
    assert judged_as("int4", {"own_codes": True}) == "int8"
    assert judged_as("int4", {"own_codes": True, "sensitive_bits": 4}) == "int4"
    assert judged_as("int4", {"block_size": 64}) == "int4"
