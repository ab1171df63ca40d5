"""The kernels as they are compiled: the library's `enqueue`, whose launches execute the PTX of its cubins.

tests/plugins/ptx has the interpreter. It executes every thread of every block, and refuses each access outside of a
tensor or of shared memory, each read of what nobody wrote, and each race between two barriers. The PTX is what the
embedded cubin was assembled from: the assembler makes the same bytes of it again (tests/plugins/driver/compiled.py).
What the assembler makes of it isn't executed.
"""

import functools
import itertools
import re
import shutil
from collections.abc import Callable

import pytest
import torch

from qwen_aot.plugins.library import FILE_NAME
from qwen_aot.plugins.variants import TACTICS, linear_tactics, variants
from tests.pairs import identifier, swept
from tests.plugins.any_step import Step
from tests.plugins.conftest import IS_INTERPRETED, kept_library
from tests.plugins.device import check
from tests.plugins.driver.execution import Gpu
from tests.plugins.enqueue import Enqueue, Outcome, Paths
from tests.plugins.gqa_cases import GqaStep
from tests.plugins.linear_cases import LinearStep
from tests.plugins.moe_cases import MoeStep
from tests.plugins.ptx.assembler import assemble
from tests.plugins.test_enqueue import (
    CPU,
    DECODE,
    MOE,
    PREFILL,
    Enqueuer,
    assert_clean,
    assert_same_as_launch,
    enqueuer_at,
    make_enqueuer,
)

if not IS_INTERPRETED:
    pytest.skip("launches are executed on the CPU only", allow_module_level=True)

EXECUTED_SMS = ("8.0", "8.7", "8.9", "12.0")
SAME_TEXT = ("8.6", "8.9")  # each variant of the first has the text of the second's, but for the line that names the SM
MULTIPROCESSORS = 64  # so that a long row is decoded in several parts

# Steps that together launch every variant of an SM.
ATTENTION_STEPS = {
    "prefill": {"lengths": [(47, 9), (1, 8), (130, 1), (9, 0)], "steps": 9, "group": 3},
    "decode-one": {"lengths": [(63, 1), (5, 0), (700, 1)], "steps": 1, "group": 1},
    "decode-group": {"lengths": [(63, 1), (5, 0), (700, 1)], "steps": 1, "group": 5},
    "head-norms": {"lengths": [(3, 2), (0, 1)], "steps": 2, "group": 2, "has_norms": True},  # as Qwen3 has
}
EXPERT_STEPS = {"few": {"num_tokens": 3}, "many": {"num_tokens": 33}}
# Of two shapes, so that K is in parts in one of them, and rows beyond a program's are in both.
LINEAR_STEPS = {
    "few": {"num_tokens": 3, "rows": 80, "columns": 1152},
    "many": {"num_tokens": 70, "rows": 144, "columns": 256, "has_bias": True},
}
LINEAR_WEIGHTS = (("8", -1), ("8", 128), ("4", -1), ("4", 128), ("4z", 128), ("4", 32), ("4z", 64))


def steps_of(sm: str) -> dict[str, Callable[[], Step]]:
    """By name, what makes each step."""
    result: dict[str, Callable[[], Step]] = {}
    for dtype, (name, step) in itertools.product(("fp16", "bf16"), ATTENTION_STEPS.items()):
        for is_int8, head_dim in itertools.product((False, True), (64, 128)):
            facts = {"dtype": dtype, "is_int8": is_int8, "head_dim": head_dim, "sm": sm, "sm_count": MULTIPROCESSORS}
            cache = "int8" if is_int8 else "same"
            result[f"{name}-{dtype}-{cache}-d{head_dim}"] = functools.partial(GqaStep, **step, **facts)
            if name == "prefill" and not is_int8:  # the other kernels are the same with each tactic
                result[f"{name}-{dtype}-{cache}-d{head_dim}-t2"] = functools.partial(GqaStep, **step, **facts, tactic=2)
    for dtype, (name, step) in itertools.product(("fp16", "bf16"), EXPERT_STEPS.items()):
        for form in ("16", "8", "4", "4z"):
            for tactic in TACTICS:
                facts = {"dtype": dtype, "form": form, "sm": sm, "hidden_size": 256, "tactic": tactic}
                result[f"{name}-{dtype}-w{form}-t{tactic}"] = functools.partial(MoeStep, **step, **facts)
    for dtype, (name, step) in itertools.product(("fp16", "bf16"), LINEAR_STEPS.items()):
        for tactic, (form, group_size) in itertools.product(TACTICS, LINEAR_WEIGHTS):
            if tactic > linear_tactics(int(form[0]), "small" if 0 < group_size < 128 else "large", form == "4z"):
                continue
            facts = {"dtype": dtype, "form": form, "group_size": group_size, "tactic": tactic, "sm": sm}
            name_of_step = f"linear-{name}-{dtype}-w{form}-k{group_size}-t{tactic}"
            result[name_of_step] = functools.partial(LinearStep, **step, **facts, sm_count=MULTIPROCESSORS)
    # As the builder times them: lengths and ids that mean nothing, which two more kernels replace.
    far, timed = 2**40, {"is_timed": True, "sm": sm}
    result["timed-decode"] = functools.partial(GqaStep, [(far, 1), (far, 0)], 1, capacity=1200, **timed)
    result["timed-prefill"] = functools.partial(GqaStep, [(far, 9)], 9, capacity=40, **timed)
    result["timed-experts"] = functools.partial(MoeStep, 3, expert_ids=torch.full((3, 2), 2**30).int(), **timed)
    return result


@pytest.fixture(scope="module")
def enqueuer_of(plugin_build, driver_files, ptx_interpreter, other_process, pytestconfig) -> Callable[[str], Enqueuer]:
    """Of the library for an SM; each but 8.9 is built when it is first asked for."""

    @functools.cache
    def enqueuer(sm: str) -> Enqueuer:
        name = f"plugin_library_sm{sm.replace('.', '')}_all"
        library = plugin_build / FILE_NAME if sm == "8.9" else kept_library(pytestconfig, plugin_build, name, sm)
        return make_enqueuer(library, driver_files, other_process, ptx_interpreter)

    return enqueuer


def check_compiled(outcome: Outcome, step: Step, target: str) -> None:
    """The result is the reference's, every launch is what it should be, and its PTX was executed."""
    assert_clean(outcome)
    check(step, outcome.tensors)
    assert_same_as_launch(outcome.launches, *reversed(step.prepare(CPU)))
    for launch in outcome.launches:
        assert launch.target == target
        assert launch.counts is not None and launch.counts.executed("ret") > 0


def enqueue_compiled(enqueuer: Enqueuer, step: Step, sm: str, *, batch: int = 1, phase: str = "runtime"):
    multiprocessors = MULTIPROCESSORS if isinstance(step, MoeStep) else step.sm_count
    gpu = Gpu(sm=sm, multiprocessors=multiprocessors)
    is_timed = not isinstance(step, LinearStep) and step.is_timed
    enqueue = Enqueue(step, batch=batch, code="ptx", is_copied=is_timed)
    (outcome,) = enqueuer([enqueue], gpus=[gpu], phase="build" if is_timed else phase)
    return outcome


@pytest.mark.parametrize("sm", EXECUTED_SMS)
def test_the_steps_launch_every_variant(sm):
    launched = {launch.variant.name for make in steps_of(sm).values() for launch in make().prepare(CPU)[1]}
    assert launched == {variant.name for variant in variants(sm)}


@pytest.mark.parametrize(
    ("sm", "name"),
    [
        pytest.param(sm, name, marks=[] if sm == "8.9" else pytest.mark.deep, id=f"{sm}-{name}")
        for sm in EXECUTED_SMS
        for name in steps_of(sm)
    ],
)
def test_every_variant(sm, name, enqueuer_of):
    step = steps_of(sm)[name]()
    check_compiled(enqueue_compiled(enqueuer_of(sm), step, sm), step, f"sm_{sm.replace('.', '')}")


def without_target(text: bytes) -> list[bytes]:
    return [line for line in text.splitlines() if not line.startswith(b".target ")]


@pytest.mark.deep
def test_the_text_of_sm86_is_what_sm89_executes(enqueuer_of, plugin_build, pytestconfig):
    """And what its own cubins are assembled from, of which a step of each plugin is executed through the library."""
    own, other = SAME_TEXT
    library = kept_library(pytestconfig, plugin_build, "plugin_library_sm86_all", own)
    folder, executed = library.parent / "build" / "kernels" / "sm_86", plugin_build / "build" / "kernels" / "sm_89"
    texts = {variant.name: (folder / f"{variant.name}.ptx").read_bytes() for variant in variants(own)}
    for name, text in texts.items():
        assert without_target(text) == without_target((executed / f"{name}.ptx").read_bytes()), name
        assert text != (executed / f"{name}.ptx").read_bytes(), name
        assert assemble(text, "sm_86") == (folder / f"{name}.cubin").read_bytes(), name
    assert set(texts) == {variant.name for variant in variants(other)}
    assert len({tuple(without_target(text)) for text in texts.values()}) == len(
        texts
    )  # the comparison tells them apart
    for name in ("decode-group-bf16-int8-d128", "many-fp16-w4-t2", "linear-few-fp16-w8-k128-t2"):
        step = steps_of(own)[name]()
        check_compiled(enqueue_compiled(enqueuer_of(own), step, own), step, "sm_86")


@pytest.mark.parametrize(("sm", "target"), [("8.0", "sm_80"), ("12.0", "ptx")])
@pytest.mark.parametrize("name", ["prefill-fp16-same-d64", "prefill-fp16-same-d128", "decode-group-fp16-same-d64"])
def test_sm80s_own_code_and_the_text_that_later_gpus_compile(
    name, sm, target, sm80_library, driver_files, ptx_interpreter, other_process
):
    step = steps_of("8.0")[name]()
    enqueuer = make_enqueuer(sm80_library, driver_files, other_process, ptx_interpreter)
    check_compiled(enqueue_compiled(enqueuer, step, sm), step, target)


@pytest.mark.deep
@pytest.mark.parametrize("case", swept(PREFILL), ids=identifier)
def test_prefill_of_sm80(case, enqueuer_of):
    (steps, lengths), phase = case["rows"], case["phase"]
    rest = {name: value for name, value in case.items() if name not in ("rows", "phase")}
    step = GqaStep(lengths=lengths, steps=steps, sm="8.0", **rest)
    check_compiled(enqueue_compiled(enqueuer_of("8.0"), step, "8.0", phase=phase), step, "sm_80")


@pytest.mark.deep
@pytest.mark.parametrize("case", swept(DECODE), ids=identifier)
def test_decode_of_sm80(case, enqueuer_of):
    rest = {name: value for name, value in case.items() if name not in ("multiprocessors", "phase")}
    step = GqaStep(steps=1, sm="8.0", sm_count=case["multiprocessors"], **rest)
    check_compiled(enqueue_compiled(enqueuer_of("8.0"), step, "8.0", phase=case["phase"]), step, "sm_80")


@pytest.mark.deep
@pytest.mark.parametrize("case", swept(MOE), ids=identifier)
def test_experts_of_sm80(case, enqueuer_of):
    (num_experts, k), (hidden_size, inner_size) = case["experts"], case["sizes"]
    batch, steps = case["tokens"]
    step = MoeStep(
        num_tokens=batch * steps,
        num_experts=num_experts,
        k=k,
        hidden_size=hidden_size,
        inner_size=inner_size,
        dtype=case["dtype"],
        form=case["form"],
        sm="8.0",
        tactic=case["tactic"],
        is_timed=case["phase"] == "build",
    )
    outcome = enqueue_compiled(enqueuer_of("8.0"), step, "8.0", batch=batch, phase=case["phase"])
    check_compiled(outcome, step, "sm_80")


STEP = "decode-group-fp16-same-d64"
DECODE_VARIANT = "gqa_decode-fp16-same-d64-g2_16"


@pytest.mark.parametrize(
    ("other", "edit"),
    [
        ("gqa_decode-bf16-same-d64-g2_16", None),  # the same parameters, block and shared memory
        ("gqa_decode-fp16-same-d64-g1_1", None),
        (DECODE_VARIANT, lambda text: text.replace("0fFF800000", "0fFF7FFFFF")),  # -inf
        (DECODE_VARIANT, lambda text: re.sub(r"bar\.sync \t0;\n", "", text, count=1)),
    ],
    ids=["another type", "another group", "a constant", "a barrier less"],
)
def test_no_other_ptx_is_executed_for_a_cubin(
    other, edit, tmp_path, plugin_build, driver_files, ptx_interpreter, other_process
):
    """Whatever the records beside it say."""
    kernels = tmp_path / "kernels"
    shutil.copytree(plugin_build / "build" / "kernels", kernels)
    beside = kernels / "sm_89" / f"{DECODE_VARIANT}.ptx"
    text = (kernels / "sm_89" / f"{other}.ptx").read_text()
    changed = edit(text) if edit else text
    assert changed != beside.read_text()
    beside.write_text(changed)
    paths = Paths(*driver_files, plugin_build / FILE_NAME, kernels, ptx_interpreter)
    with pytest.raises(AssertionError, match=f"{DECODE_VARIANT} of sm_89: the PTX beside it isn't what it was assem"):
        enqueue_compiled(enqueuer_at(paths, other_process), steps_of("8.9")[STEP](), "8.9")
