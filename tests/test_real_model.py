"""A real trained model, from GGUF file to answers: verify within the stated bounds, sensible English, README's code."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import numpy as np
import onnx
import openai
import pydantic
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.verify.bundle_report import BundleReport
from qwen_aot.engines.verify.reference import Reference
from qwen_aot.engines.verify.scores import scored_positions, windows
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.quantize.blockwise import BlockFormat, dequantize, quantize
from qwen_aot.runtime.cli.verify import verify_bundle
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.generation.request import TokenEvent
from qwen_aot.runtime.server.app import make_app
from qwen_aot.runtime.server.settings import ServerSettings
from qwen_aot.runtime.server.state import ServerState
from tests.cpu_kernels import named_kernels
from tests.exporter.stepper import Stepper
from tests.kept_reference import KeptReference
from tests.real_model import ROOT, qwen_aot, real_bundle, real_model

MODEL = real_model()
pytestmark = pytest.mark.slow
DEEP = pytest.mark.deep
LICENSE = (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bundle(shared_folder: Path) -> Callable[[str], Path]:
    """A precision's bundle, built once a session."""
    return lambda precision: real_bundle(shared_folder, precision)


@pytest.fixture(scope="module")
def reference(shared_folder: Path) -> KeptReference:
    """transformers, which answers each question once a session."""

    def load() -> Reference:
        with open_checkpoint(MODEL) as checkpoint:
            return Reference(checkpoint)

    return KeptReference(load, shared_folder / "real" / "answers")


def scored(bundle: Path, reference: KeptReference, **options: Any) -> BundleReport:
    """What `verify` finds of the answers, in this process and with that reference; the weights are left out.

    With one thread: those of two workers would wait for each other.
    """
    with open_checkpoint(MODEL) as checkpoint, pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen_aot.engines.verify.reference.Reference", lambda _, **__: reference)
        return verify_bundle(bundle, checkpoint, skip_weights=True, threads=1, on_progress=lambda _: None, **options)


@pytest.mark.parametrize("precision", ["int8", pytest.param("fp32", marks=DEEP), pytest.param("int4", marks=DEEP)])
def test_verify_passes_with_the_stated_bounds(precision: str, bundle: Callable[[str], Path]) -> None:
    """As users run it: every weight by its bytes, and the answers."""
    result = qwen_aot("verify", bundle(precision), "--reference", MODEL, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout)["weights"]["compared"] == "bytes"


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_answers_are_within_the_stated_bounds(
    precision: str, bundle: Callable[[str], Path], reference: KeptReference
) -> None:
    found = scored(bundle(precision), reference).scores
    assert found is not None and found.verdict is Verdict.PASSED, found


MOST_LOST_BY_INT8 = 0.0075  # KL divergence in nats

# Greedy texts cost the reference most; those of int8 are compared in the test above.
NO_TEXT = {"greedy_tokens": 1, "greedy_agreement": 0.0}


@pytest.mark.parametrize("kernels", ["onnxruntime", "own"])
@pytest.mark.parametrize(("count", "options"), [(4, NO_TEXT), pytest.param(8, {}, marks=DEEP)], ids=["4", "8"])
def test_int8_loses_little_whatever_the_cpu_and_the_kernels(
    count: int, options: dict[str, Any], kernels: str, bundle: Callable[[str], Path], reference: KeptReference
) -> None:
    """On 776 positions, where KL is known to 0.0003 and the ratio, whose logarithm it foretells, to 0.0043.

    All CPUs' kernels round alike (tests/exporter/lowering/ort/test_contrib.py) and add in different orders, after which
    activations halfway between two codes fall to either side. Norm weights moved by their last bit do the same on one
    CPU: ten times, on 1552 positions, KL was 0.0060 to 0.0063 and the ratio 1.004 to 1.012. On 776, KL was 0.0055.
    With scales as fp16 holds them KL is 0.0061 and 0.0060 by the two kernels on 1552, which is one more such draw.
    """
    with named_kernels():
        report = scored(bundle("int8"), reference, text=LICENSE, windows=count, kernels=kernels, **options)
    found = report.scores
    assert report.kernels == kernels
    assert found is not None and found.verdict is Verdict.PASSED, found
    assert found.scores.positions == 194 * count
    assert found.scores.kl_divergence <= MOST_LOST_BY_INT8
    (ratio,) = (check for check in found.checks if check.name == "perplexity_ratio")
    # Two standard errors, which the verdict allows. A few positions make most of them: on 1552, 0.0061 to 0.0071.
    assert ratio.bound == 1.01 and ratio.uncertainty < 0.008 * math.sqrt(8 / count)


@pytest.mark.deep
def test_coarser_blocks_lose_more(tmp_path: Path, reference: KeptReference) -> None:
    """The negative control of the bound: blocks of 64, where 32 are the default, have KL 0.0103 on 1552 positions."""
    result = qwen_aot("build", MODEL, "-o", tmp_path / "bundle", "--precision", "int8", "--block-size", 64)
    assert result.returncode == 0, result.stderr
    for count in (4, 8):
        found = scored(tmp_path / "bundle", reference, text=LICENSE, windows=count, **NO_TEXT).scores
        assert found is not None and found.scores.kl_divergence > MOST_LOST_BY_INT8


def test_int8_weights_alone_lose_a_third_of_it_on_every_cpu(
    bundle: Callable[[str], Path], reference: KeptReference
) -> None:
    """Without rounded activations nothing depends on a CPU. Seen: KL 0.00225, ratio 1.0035."""
    tokenizer = Tokenizer.from_file(str(bundle("int8") / "tokenizer.json"))
    ids = tokenizer.encode(LICENSE, add_special_tokens=False).ids
    with open_checkpoint(MODEL) as checkpoint:
        rounded = SimpleNamespace(
            path=Path("rounded"),  # not a file, which the reference would read itself
            config=checkpoint.config,
            tensors=checkpoint.tensors,
            read=lambda name: through_int8(checkpoint.read(name)),
        )
        model = Reference(rounded)  # type: ignore[arg-type]
    divergence, losses = [], []
    for window in windows(ids, 256, 8):
        first = scored_positions(len(window))[0]  # as `verify` asks, so that half of it was computed
        scored_logits = (torch.from_numpy(each.logits(window, first)[64 - first :]) for each in (reference, model))
        exact, found = (logits.double().log_softmax(1) for logits in scored_logits)
        divergence.append((exact.exp() * (exact - found)).sum(1))
        targets = torch.from_numpy(window[65:])[:, None]
        losses.append((exact - found)[:-1].gather(1, targets))
    assert torch.cat(divergence).mean() <= 0.0025
    assert torch.cat(losses).mean().exp() <= 1.004


@pytest.mark.deep
def test_own_codes_are_the_files_numbers(tmp_path: Path, reference: KeptReference) -> None:
    """As exact as fp32 where activations aren't rounded; where they are, less is lost than by int8."""
    build_bundle(MODEL, BuildSpec(own_codes=True), tmp_path / "own")
    found = scored(tmp_path / "own", reference).scores
    assert found is not None and found.verdict is Verdict.PASSED
    assert found.scores.kl_divergence < MOST_LOST_BY_INT8
    graph = onnx.load(tmp_path / "own" / "model.onnx", load_external_data=False)
    levels = [each for node in graph.graph.node for each in node.attribute if each.name == "accuracy_level"]
    for level in levels:
        level.i = 1
    onnx.save(graph, tmp_path / "own" / "exact.onnx")
    ids = np.random.default_rng(0).integers(0, 49_000, 24)
    stepper = Stepper(tmp_path / "own" / "exact.onnx", rows=1, capacity=32)
    want = reference.logits(ids, 22)[0]
    got = stepper.step([ids[:23].tolist()])[0]
    assert len(levels) == 121 and np.abs(got - want).max() / want.std() < 1e-3


def through_int8(weight: NDArray[np.generic]) -> NDArray[np.float32]:
    """A matrix as a build at int8 stores it, in blocks of 32; what isn't a matrix stays."""
    rows, layout = weight.astype(np.float32), BlockFormat(8, 32)
    return rows if rows.ndim != 2 else dequantize(quantize(rows, layout), layout, rows.shape[1])


def test_verify_fails_and_names_the_bound(bundle: Callable[[str], Path]) -> None:
    asked = ("--kl-divergence", "1e-9", "--windows", 1, "--window", 64, "--greedy-tokens", 1, "--skip-weights")
    result = qwen_aot("verify", bundle("int8"), "--reference", MODEL, *asked)
    assert result.returncode == 1
    assert "failed: kl_divergence is " in result.stdout


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_chat_answer_is_sensible_english(precision: str, bundle: Callable[[str], Path]) -> None:
    result = qwen_aot(
        "generate", bundle(precision), "--chat", "--prompt", "What is the capital of France? Answer briefly.",
        "--temperature", 0, "--max-new-tokens", 24,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: str
    unit: Literal["celsius", "fahrenheit"]


@pytest.mark.parametrize("tool_format", ["qwen", *(pytest.param(name, marks=DEEP) for name in ("hermes", "react"))])
def test_a_client_gets_the_object_and_the_call_that_it_asks_for(
    tool_format: str, bundle: Callable[[str], Path]
) -> None:
    """OpenAI's own client; the model was never trained to call functions, so the form is the grammar's doing."""
    question: list[Any] = [{"role": "user", "content": "How is the weather in London, in celsius?"}]
    tool = openai.pydantic_function_tool(Weather, name="get_weather")

    async def ask(state: ServerState, model: str) -> None:
        url = "http://127.0.0.1:8000"
        transport = httpx.ASGITransport(make_app(state))
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", http_client=httpx.AsyncClient(transport=transport), max_retries=0
        ) as client:
            asked: dict[str, Any] = {"model": model, "messages": question, "temperature": 0, "max_tokens": 150}
            answer = await client.chat.completions.parse(**asked, response_format=Weather)
            assert isinstance(answer.choices[0].message.parsed, Weather)
            asked |= {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
            called = await client.chat.completions.parse(**asked)
            async with client.chat.completions.stream(**asked) as stream:
                streamed = await stream.get_final_completion()
        for choice in (called.choices[0], streamed.choices[0]):
            assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
            (call,) = choice.message.tool_calls
            assert call.function.parsed_arguments == Weather(city="London", unit="celsius")

    with Generator.open(bundle("int8"), threads=1) as generator:
        state = ServerState(ServerSettings(tool_format=tool_format))
        model = state.start(generator)
        try:
            asyncio.run(ask(state, model.names[0]))
        finally:
            assert model.service.close(30)
            state.close()


# Chosen before any answer was seen. One question says little of a 4-bit model this small: a near tie decides it.
QUESTIONS = {
    "What is the capital of France? Answer briefly.": ("Paris",),
    "What is the capital of Germany?": ("Berlin",),
    "What is the capital of Japan?": ("Tokyo",),
    "What is the capital of Italy?": ("Rome",),
    "What is the capital of Spain?": ("Madrid",),
    "What color is the sky on a clear day?": ("blue",),
    "What do bees make?": ("honey",),
    "How many days are in a week?": ("seven", "7"),
    "What is the largest planet in the solar system?": ("jupiter",),
    "Who wrote Romeo and Juliet?": ("shakespeare",),
    "What is the opposite of hot?": ("cold",),
    "What gas do plants absorb from the air?": ("carbon dioxide",),
    "What is the chemical formula of water?": ("h2o", "h₂o"),
    "What language is spoken in Brazil?": ("portuguese",),
    "On which continent is Egypt?": ("africa",),
    "How many legs does a spider have?": ("eight", "8"),
}


def is_right(generator: Generator, question: str, words: tuple[str, ...]) -> bool:
    """Whether one of the words stands in the first 32 tokens of the answer; what follows it isn't generated."""
    prompt = generator.chat_encoder.encode([{"role": "user", "content": question}])
    text = ""
    with contextlib.closing(generator.stream([prompt], temperature=0, max_new_tokens=32)) as events:
        for event in events:
            text = text + event.text.lower() if isinstance(event, TokenEvent) else (event.text or "").lower()
            if any(word.lower() in text for word in words):
                return True
    return False


def right_answers(bundle: Path) -> int:
    with Generator.open(bundle, threads=1) as generator:
        return sum(is_right(generator, question, words) for question, words in QUESTIONS.items())


def test_quantized_models_still_know_what_the_fp32_one_knows(bundle: Callable[[str], Path]) -> None:
    """Seen: fp32 11 of 16; int8 11 and 12, by ONNX Runtime's kernels and by own ones; int4 10 and 8 (of 40: 20 and 22).

    Two answers are one standard deviation of 16, and each kernel's order of sums draws anew: int4 may lose two of them.
    KL tells kernels apart far better (`test_verify_passes_with_the_stated_bounds`).
    """
    known = right_answers(bundle("fp32"))
    assert known >= 9
    assert right_answers(bundle("int8")) >= known - 1
    assert right_answers(bundle("int4")) >= known - 4


def test_the_readmes_python_runs(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    shutil.copytree(bundle("int8"), tmp_path / "bundles" / "smollm2")
    for block in blocks:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{block}"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert result.returncode == 0, result.stderr
        assert "Paris" in result.stdout
