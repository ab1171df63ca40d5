"""The library's `enqueue`, proven by numbers: under the double of the driver, each launch runs in the interpreter.

Every result here is also a proof that each pointer lies where it may, that grids, blocks and shared memory are those of
the variant, and that the workspace is as large as was said (tests/plugins/enqueue.py).
"""

import dataclasses
import functools
import multiprocessing
import pickle
import re
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from qwen_aot.plugins.launch import Launch, is_linear_decode, is_moe_decode
from qwen_aot.plugins.library import cuda_headers, tensorrt_headers
from qwen_aot.plugins.signatures import KERNELS
from tests.pairs import identifier, swept
from tests.plugins.any_step import Step
from tests.plugins.bounds import assert_close, assert_same_cache
from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.driver.execution import LAUNCH_FAILED, Gpu, Recorded
from tests.plugins.enqueue import Enqueue, Fault, Outcome, Paths, compile_driver, destroy_during_capture, run
from tests.plugins.gqa_cases import CACHE, GqaStep
from tests.plugins.linear_cases import LinearStep
from tests.plugins.moe_cases import MoeStep

if not IS_INTERPRETED:
    pytest.skip("launches are executed in Triton's interpreter only", allow_module_level=True)

CPU = torch.device("cpu")
Enqueuer = Callable[..., list[Outcome]]

PREFILL = {
    "dtype": ["fp16", "bf16"],
    "is_int8": [False, True],
    "head_dim": [64, 128],
    "group": [1, 3],
    "rows": [(2, [(0, 2)]), (9, [(47, 9), (1, 8), (30, 1), (9, 0)]), (66, [(3, 66)])],
    "tactic": [1, 2],
    "phase": ["build", "runtime"],
}
DECODE = {
    "dtype": ["fp16", "bf16"],
    "is_int8": [False, True],
    "head_dim": [64, 128],
    "group": [1, 2, 5, 16],
    "lengths": [[(0, 1)], [(63, 1), (5, 0), (300, 1)], [(767, 1), (0, 1)]],
    "multiprocessors": [1, 64],  # one part a row, or several
    "tactic": [1, 2],
    "phase": ["build", "runtime"],
}
MOE = {
    "dtype": ["fp16", "bf16"],
    "form": ["16", "8", "4", "4z"],
    "experts": [(2, 1), (5, 3)],
    "tokens": [(1, 1), (3, 2), (1, 17)],  # B, S
    "sizes": [(128, 128), (256, 128), (128, 256)],
    "tactic": [1, 2],
    "phase": ["build", "runtime"],
}
LINEAR = {
    "dtype": ["fp16", "bf16"],
    "weights": [("8", 128), ("8", -1), ("4", 32), ("4", 128), ("4", -1), ("4z", 64), ("4z", 128)],
    "tokens": [(1, 1), (3, 2), (1, 17)],  # B, S
    "sizes": [(16, 128), (80, 1152), (208, 256)],
    "has_bias": [False, True],
    "tactic": [1, 2],
    "multiprocessors": [1, 64],  # one part of K, or several
    "phase": ["build", "runtime"],
}


def enqueuer_at(paths: Paths, pool: Executor) -> Enqueuer:
    """Runs enqueues in the other process, which loads `paths`."""

    def enqueue(
        enqueues: Sequence[Enqueue], *, gpus: Sequence[Gpu] = (Gpu(),), phase: str = "runtime"
    ) -> list[Outcome]:
        pickled = pickle.dumps((list(enqueues), list(gpus), phase))
        return pickle.loads(pool.submit(run, paths, pickled).result())

    return enqueue


def make_enqueuer(
    library: Path, driver_files: tuple[Path, Path], pool: Executor, ptx_interpreter: Path | None = None
) -> Enqueuer:
    """Of a library that was built, with its kernels beside it."""
    return enqueuer_at(Paths(*driver_files, library, library.parent / "build" / "kernels", ptx_interpreter), pool)


@pytest.fixture(scope="module")
def enqueuer(plugin_library, driver_files, other_process) -> Enqueuer:
    return make_enqueuer(plugin_library, driver_files, other_process)


@pytest.fixture(scope="module")
def enqueuer_of_sm80(sm80_library, driver_files, other_process) -> Enqueuer:
    return make_enqueuer(sm80_library, driver_files, other_process)


def assert_clean(outcome: Outcome) -> None:
    assert outcome.status == 0 and outcome.misuses == [] and outcome.log == ""


def assert_same_as_launch(
    launches: list[Recorded], twin: list[Launch], tensors: dict[str, torch.Tensor | None]
) -> None:
    """Variants, grids and arguments are those of `plugins.launch`; pointers by the name of what they point to."""
    names = {tensor.data_ptr(): name for name, tensor in tensors.items() if tensor is not None}
    assert [launch.variant for launch in launches] == [launch.variant.name for launch in twin]
    for launch, other in zip(launches, twin, strict=True):
        grid = other.variant.grid(other.sizes)
        assert launch.grid == grid + (1,) * (3 - len(grid))
        assert list(launch.arguments) == [argument.name for argument in KERNELS[other.variant.kernel].arguments]
        for name, value in launch.arguments.items():
            expected = other.arguments[name]
            if isinstance(expected, torch.Tensor):
                expected = names[expected.data_ptr()]
            elif isinstance(expected, float):
                expected = struct.unpack("f", struct.pack("f", expected))[0]
            assert value == expected, f"{launch.variant}: {name}"


def check_gqa(outcome: Outcome, step: GqaStep) -> None:
    assert_clean(outcome)
    expected = step.expected()
    assert_close(outcome.tensors["output"], expected["output"])
    for name in CACHE:
        if expected[name] is not None:
            assert_same_cache(outcome.tensors[name], expected[name], is_exact=not step.has_norms)
    assert_same_as_launch(outcome.launches, *reversed(step.prepare(CPU)))


def check_product(outcome: Outcome, step: MoeStep | LinearStep) -> None:
    assert_clean(outcome)
    assert_close(outcome.tensors["output"], step.expected())
    assert_same_as_launch(outcome.launches, *reversed(step.prepare(CPU)))


def check_step(outcome: Outcome, step: Step) -> None:
    if isinstance(step, GqaStep):
        check_gqa(outcome, step)
    else:
        check_product(outcome, step)


@pytest.mark.parametrize("case", swept(PREFILL), ids=identifier)
def test_gqa_prefill(case, enqueuer):
    (steps, lengths), phase = case["rows"], case["phase"]
    rest = {name: value for name, value in case.items() if name not in ("rows", "phase")}
    step = GqaStep(lengths=lengths, steps=steps, **rest)
    (outcome,) = enqueuer([Enqueue(step)], phase=phase)
    check_gqa(outcome, step)


@pytest.mark.parametrize("case", swept(DECODE), ids=identifier)
def test_gqa_decode(case, enqueuer):
    multiprocessors, phase = case["multiprocessors"], case["phase"]
    rest = {name: value for name, value in case.items() if name not in ("multiprocessors", "phase")}
    step = GqaStep(steps=1, sm_count=multiprocessors, **rest)
    (outcome,) = enqueuer([Enqueue(step)], gpus=[Gpu(multiprocessors=multiprocessors)], phase=phase)
    check_gqa(outcome, step)


@pytest.mark.parametrize(
    ("capacity", "kernels"),
    [(511, ["gqa_rotate", "gqa_decode"]), (512, ["gqa_rotate", "gqa_decode", "gqa_reduce"])],
)
def test_parts_are_joined_only_where_a_row_can_have_several(capacity, kernels, enqueuer):
    """A part has 256 slots or more. The output of the idle row is zeros either way."""
    step = GqaStep(lengths=[(300, 1), (5, 0)], steps=1, group=2, capacity=capacity)
    (outcome,) = enqueuer([Enqueue(step)])
    check_gqa(outcome, step)
    assert [launch.variant.split("-")[0] for launch in outcome.launches] == kernels


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("is_int8", [False, True], ids=["same", "int8"])
def test_gqa_with_norms_of_heads(is_int8, steps, enqueuer):
    """Their gains are the last inputs, whatever stands before them; launches carry the very numbers."""
    step = GqaStep(lengths=[(7, steps), (3, 0)], steps=steps, is_int8=is_int8, group=2, has_norms=True)
    (outcome,) = enqueuer([Enqueue(step)])
    check_gqa(outcome, step)


@pytest.mark.parametrize("case", swept(MOE), ids=identifier)
def test_moe(case, enqueuer):
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
        tactic=case["tactic"],
        is_timed=case["phase"] == "build",
    )
    (outcome,) = enqueuer([Enqueue(step, batch=batch)], phase=case["phase"])
    check_product(outcome, step)
    assert any("decode" in launch.variant for launch in outcome.launches) == is_moe_decode(step.num_tokens, k)


@pytest.mark.parametrize("case", swept(LINEAR), ids=identifier)
def test_linear(case, enqueuer):
    (form, group_size), (rows, columns), (batch, steps) = case["weights"], case["sizes"], case["tokens"]
    step = LinearStep(
        num_tokens=batch * steps,
        rows=rows,
        columns=columns,
        dtype=case["dtype"],
        form=form,
        group_size=group_size,
        has_bias=case["has_bias"],
        tactic=case["tactic"],
        sm_count=case["multiprocessors"],
    )
    gpus = [Gpu(multiprocessors=case["multiprocessors"])]
    (outcome,) = enqueuer([Enqueue(step, batch=batch)], gpus=gpus, phase=case["phase"])
    check_product(outcome, step)
    assert any("decode" in launch.variant for launch in outcome.launches) == is_linear_decode(step.num_tokens)


TIMED = {
    "gqa": functools.partial(GqaStep, lengths=[(2**40, 3)], steps=3, capacity=90, is_timed=True),
    "moe": functools.partial(MoeStep, num_tokens=3, form="4", is_timed=True),
    "linear": functools.partial(LinearStep, num_tokens=3),
}


def tactics_of(outcome: Outcome) -> set[str]:
    """Those that the launched variants are of, where they have one."""
    return {launch.variant[-1] for launch in outcome.launches if launch.variant[-3:-1] == "-t"}


@pytest.mark.parametrize("tactic", [1, 2])
@pytest.mark.parametrize("make", TIMED.values(), ids=TIMED)
def test_a_clone_has_the_tactic_of_its_original(make, tactic, enqueuer):
    step = make(tactic=tactic)
    (outcome,) = enqueuer([Enqueue(step, is_copied=isinstance(step, GqaStep), is_cloned=True)], phase="build")
    check_step(outcome, step)
    assert tactics_of(outcome) == {str(tactic)}


@pytest.mark.parametrize("make", TIMED.values(), ids=TIMED)
def test_a_tactic_is_taken_from_the_next_step_on(make, enqueuer):
    """As the builder does when it times one after the other, with no change of shape between them."""
    steps = [make(tactic=tactic) for tactic in (1, 2, 2, 1)]
    outcomes = enqueuer([Enqueue(step, is_copied=isinstance(step, GqaStep)) for step in steps], phase="build")
    for outcome, step in zip(outcomes, steps, strict=True):
        check_step(outcome, step)
        assert tactics_of(outcome) == {str(step.tactic)}


def test_linear_workspace_of_any_gpu_and_shape_fits_what_the_profile_gave(enqueuer):
    gpus = [Gpu(multiprocessors=count) for count in (1, 7, 200, 1000)]
    enqueues = [
        Enqueue(
            LinearStep(num_tokens=tokens, columns=4096, tactic=tactic, sm_count=of.multiprocessors), gpu=gpu, code=None
        )
        for gpu, of in enumerate(gpus)
        for tactic in (1, 2)
        for tokens in (1, 16, 17, 100)
    ]
    for outcome, enqueue in zip(enqueuer(enqueues, gpus=gpus), enqueues, strict=True):
        assert_clean(outcome)
        assert_same_as_launch(outcome.launches, *reversed(enqueue.step.prepare(CPU)))


def test_one_plugin_takes_prefill_and_decode_in_turn(enqueuer):
    """As in one engine, in a workspace for both."""
    make = functools.partial(GqaStep, group=2, capacity=600)
    steps = [
        make(lengths=[(0, 4), (3, 3)], steps=4),
        make(lengths=[(520, 1), (7, 1), (0, 1)], steps=1),
        make(lengths=[(5, 2)], steps=2),
    ]
    outcomes = enqueuer([Enqueue(step) for step in steps])
    for outcome, step in zip(outcomes, steps, strict=True):
        check_gqa(outcome, step)
    tokens = [MoeStep(num_tokens=number) for number in (3, 17, 16)]
    outcomes = enqueuer([Enqueue(step) for step in tokens])
    for outcome, step in zip(outcomes, tokens, strict=True):
        check_product(outcome, step)


@pytest.mark.parametrize("is_int8", [False, True], ids=["same", "int8"])
def test_workspace_of_any_gpu_and_shape_fits_what_the_profile_gave(is_int8, enqueuer):
    """Parts of decode follow the number of multiprocessors, which isn't known when the size is asked for."""
    gpus = [Gpu(multiprocessors=count) for count in (1, 2, 200)]
    make = functools.partial(GqaStep, group=5, num_kv_heads=1, capacity=2100, is_int8=is_int8)
    enqueues = [
        Enqueue(
            make(lengths=[(7, steps)] * batch, steps=steps, sm_count=gpus[gpu].multiprocessors, tactic=tactic),
            gpu=gpu,
            code=None,
        )
        for tactic in (1, 2)
        for batch in (1, 2, 5)
        for steps, gpu in ((1, 0), (1, 1), (1, 2), (2, 0), (5, 0))
    ]
    for outcome, enqueue in zip(enqueuer(enqueues, gpus=gpus), enqueues, strict=True):
        assert_clean(outcome)
        assert_same_as_launch(outcome.launches, *reversed(enqueue.step.prepare(CPU)))


def test_moe_workspace_of_each_shape_fits_what_the_profile_gave(enqueuer):
    for num_experts, k in ((60, 4), (3, 2), (40, 9)):
        sizes = {"num_experts": num_experts, "k": k}
        steps = [
            MoeStep(num_tokens=number, tactic=tactic, **sizes)
            for tactic in (1, 2)
            for number in (1, 16, 17, 64, 65, 300)
        ]
        for outcome, step in zip(enqueuer([Enqueue(step, code=None) for step in steps]), steps, strict=True):
            assert_clean(outcome)
            assert_same_as_launch(outcome.launches, *reversed(step.prepare(CPU)))


@pytest.mark.parametrize(
    "step",
    [GqaStep(lengths=[(7, 0)], steps=0), MoeStep(num_tokens=0), LinearStep(num_tokens=0)],
    ids=["gqa", "moe", "linear"],
)
@pytest.mark.parametrize("phase", ["build", "runtime"])
def test_a_step_without_tokens_launches_nothing(step, phase, enqueuer):
    (outcome,) = enqueuer([Enqueue(step)], phase=phase)
    assert_clean(outcome)
    assert outcome.launches == []


def test_the_second_enqueue_only_launches(enqueuer):
    """Modules are loaded once a context: a step costs its launches, and a CUDA graph can be captured."""
    step = GqaStep(lengths=[(300, 1)], steps=1)
    first, second = enqueuer([Enqueue(step, code=None)] * 2)
    assert first.calls.count("cuLaunchKernel") == second.calls.count("cuLaunchKernel") == 2  # one part: no reduction
    assert any(call.startswith("cuModuleLoadData") for call in first.calls)
    assert set(second.calls) <= {"cuCtxGetCurrent", "cuCtxGetId", "cuLaunchKernel"}


CAPTURED = {
    "decode": GqaStep(lengths=[(1000, 1), (7, 1)], steps=1, sm_count=64),
    "prefill": GqaStep(lengths=[(47, 9), (9, 0)], steps=9, is_int8=True),
    "few": MoeStep(num_tokens=3, form="4z"),
    "many": MoeStep(num_tokens=33),
    "linear, few": LinearStep(num_tokens=3, columns=1152, sm_count=64),
    "linear, many": LinearStep(num_tokens=33, form="8", tactic=2),
}


@pytest.mark.parametrize("name", CAPTURED)
@pytest.mark.parametrize("phase", ["build", "runtime"])
def test_the_first_enqueue_of_all_may_be_captured(name, phase, enqueuer):
    """As TensorRT does when it times tactics: code is loaded without harm to the capture, and the replay is right."""
    step = CAPTURED[name]
    if isinstance(step, MoeStep) and phase == "build":
        step = dataclasses.replace(step, is_timed=True)
    gpus = [Gpu(multiprocessors=64)]
    first, second = enqueuer([Enqueue(step, is_captured=True)] * 2, gpus=gpus, phase=phase)
    for outcome in (first, second):
        check_step(outcome, step)
    assert first.calls.count("cuThreadExchangeStreamCaptureMode") == 2 * first.calls.count("cuModuleLoadData") > 0
    assert set(second.calls) <= {"cuCtxGetCurrent", "cuCtxGetId", "cuLaunchKernel"}


def test_kernels_of_a_context_that_is_gone_are_replaced_during_a_capture(enqueuer):
    step = GqaStep(lengths=[(300, 1)], steps=1)
    enqueues = [Enqueue(step), Enqueue(step, in_new_context=True, is_captured=True)]
    for outcome in enqueuer(enqueues):
        check_gqa(outcome, step)


def test_a_plugin_goes_during_a_capture(plugin_library, driver_files):
    """And unloads what nothing else needs, in a process of its own, where no other plugin holds it."""
    paths = Paths(*driver_files, plugin_library, plugin_library.parent / "build" / "kernels")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        captured, misuses = pool.submit(destroy_during_capture, paths).result()
    assert captured == 0 and misuses == []


def test_what_fails_while_it_is_captured_leaves_no_graph(enqueuer):
    step = GqaStep(lengths=[(7, 1)], steps=1)
    faults = [Fault("cuModuleLoadData"), Fault("cuThreadExchangeStreamCaptureMode", 2)]
    enqueues = [Enqueue(step, fault=fault, is_captured=True) for fault in faults]
    *failed, last = enqueuer([*enqueues, Enqueue(step)])
    for outcome in failed:
        assert outcome.status != 0 and outcome.launches == [] and f"error {LAUNCH_FAILED}" in outcome.log
    check_gqa(last, step)


def test_two_contexts(enqueuer):
    """A module belongs to a context: each has its own, and the launches of its GPU."""
    step = GqaStep(lengths=[(1000, 1)], steps=1, sm_count=1)
    other = dataclasses.replace(step, sm_count=64)
    enqueues = [Enqueue(step, gpu=0), Enqueue(other, gpu=1), Enqueue(step, gpu=0)]
    outcomes = enqueuer(enqueues, gpus=[Gpu(multiprocessors=1), Gpu(multiprocessors=64)])
    for outcome, enqueue in zip(outcomes, enqueues, strict=True):
        check_gqa(outcome, enqueue.step)


@pytest.mark.parametrize(
    "step",
    [GqaStep(lengths=[(300, 1)], steps=1), MoeStep(num_tokens=3), LinearStep(num_tokens=3)],
    ids=["gqa", "moe", "linear"],
)
def test_a_new_context_where_another_one_was(step, enqueuer):
    """Its kernels went with it, though a plugin that used them stands."""
    first, second, third = enqueuer([Enqueue(step), Enqueue(step, in_new_context=True), Enqueue(step)])
    for outcome in (first, second, third):
        check_step(outcome, step)
    assert second.calls.count("cuModuleLoadData") == first.calls.count("cuModuleLoadData") > 0
    assert "cuModuleUnload" not in second.calls and "cuModuleLoadData" not in third.calls


def test_a_driver_that_does_not_number_contexts(plugin_library, plugin_build, tmp_path):
    """As those before CUDA 12, in a process of its own."""
    headers = [tensorrt_headers(plugin_build / "build"), cuda_headers()]
    driver_files = compile_driver(tmp_path, headers, "WITHOUT_CONTEXT_IDS")
    step = GqaStep(lengths=[(7, 1)], steps=1)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        outcomes = make_enqueuer(plugin_library, driver_files, pool)([Enqueue(step), Enqueue(step)])
    for outcome in outcomes:
        check_gqa(outcome, step)
        assert "cuCtxGetId" not in outcome.calls


@pytest.mark.parametrize(("sm", "target"), [("8.0", "sm_80"), ("8.9", "sm_80"), ("9.0", "ptx"), ("12.0", "ptx")])
def test_more_shared_memory_than_every_kernel_gets_and_ptx_on_later_gpus(sm, target, enqueuer_of_sm80):
    step = GqaStep(lengths=[(7, 3)], steps=3, head_dim=128)
    (outcome,) = enqueuer_of_sm80([Enqueue(step)], gpus=[Gpu(sm=sm)])
    assert_clean(outcome)
    assert_close(outcome.tensors["output"], step.expected()["output"])
    assert {launch.target for launch in outcome.launches} == {target}
    assert "cuFuncSetAttribute" in outcome.calls


def test_a_driver_that_cannot_be_initialised(plugin_library, driver_files):
    """In a process of its own, because one that can be is kept."""
    step = GqaStep(lengths=[(7, 1)], steps=1)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        enqueuer = make_enqueuer(plugin_library, driver_files, pool)
        failed, next_one = enqueuer([Enqueue(step, fault=Fault("cuInit")), Enqueue(step)])
    assert failed.status != 0 and failed.calls == ["cuInit"]
    assert f"cuInit failed with error {LAUNCH_FAILED}" in failed.log
    check_gqa(next_one, step)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("is_int8", [False, True], ids=["same", "int8"])
def test_present_elsewhere_than_past_is_refused(steps, is_int8, enqueuer):
    step = GqaStep(lengths=[(7, steps)], steps=steps, is_int8=is_int8)
    refused, accepted = enqueuer([Enqueue(step, is_copied=True), Enqueue(step)])
    assert refused.status != 0 and refused.launches == [] and refused.misuses == []
    assert "error: " in refused.log and "present" in refused.log and "past" in refused.log
    check_gqa(accepted, step)


@pytest.mark.parametrize("capacity", [3, 40, 1200], ids=lambda slots: f"c{slots}")
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("is_int8", [False, True], ids=["same", "int8"])
def test_the_builder_times_attention_with_past_and_present_apart(is_int8, steps, capacity, enqueuer):
    """On memory of its own, with lengths that mean nothing: those of a conversation, or of a small cache, are taken."""
    lengths = [(2**40, steps), (-(2**62), 0), (7, -1)]
    step = GqaStep(lengths=lengths, steps=steps, is_int8=is_int8, capacity=capacity, is_timed=True, sm_count=64)
    for name in CACHE:
        if step.tensors[name] is not None:  # each of which is read, for the row's length is another one
            step.tensors[name] = GqaStep(
                lengths=[(capacity, 0)] * 3, steps=steps, is_int8=is_int8, capacity=capacity
            ).tensors[name]
    (timed,) = enqueuer([Enqueue(step, is_copied=True)], gpus=[Gpu(multiprocessors=64)], phase="build")
    check_gqa(timed, step)
    assert timed.launches[0].variant == "gqa_timed_lengths"
    assert timed.launches[0].arguments["cached"] == min(1024, capacity - min(steps, capacity))


@pytest.mark.parametrize("form", ["16", "8", "4z"])
@pytest.mark.parametrize("tokens", [3, 33])
def test_the_builder_times_experts_with_any_ids(tokens, form, enqueuer):
    """Ids that mean something are taken, others make way for some that spread over the experts."""
    shape = (tokens, 3)
    given = [torch.full(shape, value, dtype=torch.int32) for value in (0, 4, -(2**31), 2**31 - 1)]
    given.append(torch.randint(-3, 9, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0)))
    given.append(torch.tensor([4, 2, 3], dtype=torch.int32).repeat(tokens, 1))
    make = functools.partial(MoeStep, num_tokens=tokens, num_experts=5, k=3, form=form, is_timed=True)
    steps = [make(expert_ids=ids) for ids in given]
    for outcome, step in zip(enqueuer([Enqueue(step) for step in steps], phase="build"), steps, strict=True):
        check_product(outcome, step)
        assert outcome.launches[0].variant == "moe_timed_ids"
    is_replaced = [not torch.equal(step.used_ids, step.tensors["expert_ids"]) for step in steps]
    assert is_replaced == [True] * 5 + [False]


def test_an_engine_takes_its_ids_as_they_are(enqueuer):
    """What the builder replaces counts as zero there."""
    step = MoeStep(num_tokens=3, expert_ids=torch.tensor([[0, 7], [-1, 2], [1, 4]], dtype=torch.int32))
    (outcome,) = enqueuer([Enqueue(step)])
    check_product(outcome, step)
    assert not any(launch.variant == "moe_timed_ids" for launch in outcome.launches)


@pytest.mark.parametrize(
    "step",
    [GqaStep(lengths=[(7, 1)], steps=1), MoeStep(num_tokens=3, form="4"), LinearStep(num_tokens=3)],
    ids=["gqa", "moe", "linear"],
)
@pytest.mark.parametrize("sm", ["7.5", "8.6", "9.0"])
def test_a_gpu_that_no_variant_is_for(step, sm, enqueuer):
    refused, accepted = enqueuer([Enqueue(step, gpu=1), Enqueue(step)], gpus=[Gpu(), Gpu(sm=sm)])
    assert refused.status != 0 and refused.launches == [] and refused.misuses == []
    assert re.search(rf"error: .*no kernels for SM {sm}; this library has them for 8\.9", refused.log)
    assert_clean(accepted)


@pytest.mark.parametrize(
    ("step", "asked"),
    [
        (GqaStep(lengths=[(7, 1)], steps=1, group=17), "head_dim=64, group=17"),
        (GqaStep(lengths=[(7, 5)], steps=5, head_dim=96), "head_dim=96, group=1"),
    ],
)
def test_a_request_that_no_variant_serves_is_printed(step, asked, enqueuer):
    with pytest.raises(AssertionError, match=f"no variant of gqa_.* for SM 8.9 serves dtype=fp16, .*{asked}; there"):
        enqueuer([Enqueue(step)])


@pytest.mark.parametrize("result", [200, 209, 218, 222])  # invalid image, no binary, invalid PTX, unsupported PTX
def test_code_that_the_driver_does_not_take(result, enqueuer):
    step = GqaStep(lengths=[(7, 1)], steps=1)
    refused, other = enqueuer(
        [Enqueue(step, fault=Fault("cuModuleLoadData", result=result)), Enqueue(step, fault=Fault("cuModuleLoadData"))]
    )
    words = rf"loading gqa_.*CUDA error {result}\); this driver is for CUDA 1\d\.\d, .*: update the driver"
    assert re.search(words, refused.log)
    assert other.status != 0 and "update" not in other.log


def calls_of(outcome: Outcome) -> list[Fault]:
    """A fault for each driver call of an enqueue."""
    return [Fault(name, outcome.calls[: at + 1].count(name)) for at, name in enumerate(outcome.calls)]


@pytest.mark.parametrize(
    "step",
    [
        GqaStep(lengths=[(7, 1)], steps=1),
        GqaStep(lengths=[(7, 5)], steps=5, is_int8=True),
        MoeStep(num_tokens=3),
        MoeStep(num_tokens=20, form="8"),
        LinearStep(num_tokens=3, columns=1152, sm_count=4),
    ],
    ids=["decode", "prefill", "few", "many", "linear"],
)
def test_a_driver_that_fails_at_any_call(step, enqueuer):
    """The error is logged and returned, nothing is launched after it, and the next enqueue works."""
    (whole,) = enqueuer([Enqueue(step, code=None)])
    assert_clean(whole)
    faults = calls_of(whole)
    enqueues, gpus = [], []
    for fault in faults:  # in a context of its own, where the calls are those of a first enqueue
        gpus.append(Gpu())
        at = {"gpu": len(gpus) - 1, "code": None}
        enqueues += [Enqueue(step, fault=fault, **at), Enqueue(step, **at)]
    outcomes = enqueuer(enqueues, gpus=gpus)
    for fault, failed, next_one in zip(faults, outcomes[::2], outcomes[1::2], strict=True):
        assert failed.status != 0, fault
        assert "error: " in failed.log and f"error {LAUNCH_FAILED}" in failed.log, fault
        assert failed.calls[-1] == fault.function or failed.calls.count("cuLaunchKernel") == 0, fault
        assert_clean(next_one)
        assert next_one.launches == whole.launches
