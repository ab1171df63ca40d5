"""A real trained model in C: answers are the Python runtime's on the same bundle, and at fp32 those of transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.engines.verify.reference import Reference
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.generation.generator import Generator as PythonGenerator
from tests.cpu_kernels import named_kernels
from tests.real_model import ROOT, real_bundle, real_model
from tests.runtime.capi.client import Generator, Library, Model

MODEL = real_model()
pytestmark = pytest.mark.slow
LENGTH = 8  # tokens of an answer


@dataclass(frozen=True)
class Asked:
    """A prompt with its settings.

    Attributes:
        prompt: a text, or messages of (role, content).
        settings: by names that both runtimes have.
    """

    prompt: str | tuple[tuple[str, str], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


# What is known of an answer: ids, text, reason, tokens of the prompt.
Answer = tuple[list[int], str | None, str, int]

SUBJECTS = (
    "the sea", "a small robot", "bread", "winter in Norway", "my grandfather's clock", "electric cars",
    "prime numbers", "a cat on the roof", "the moon", "two friends", "old maps", "a quiet library", "green tea",
    "the last train", "honey bees", "a broken window", "the first computer", "a red bicycle", "the river Nile",
    "paper boats",
)  # fmt: skip
FORMS = ("Once there was {},", "The best thing about {} is", "Q: What do you know of {}?\nA:", "{} and")
SCRIPTS = (
    "Où est la gare\u00a0? Elle est", "Größe und Maß sind", "El niño corre por", "Čeština má háčky a",
    "Привет, как", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم", "हिन्दी में नमस्ते", "สวัสดีชาวโลก",
    "こんにちは、世界", "안녕하세요 세계", "你好，世界。今天", "通义千问是", "e\u0301 and é are",
    "a\u0323\u0302 or \u1ead", "\u1100\u1161\u11a8 is 각", "👩‍👩‍👧‍👦 is a", "🙂🙃🙂🙃", "🇫🇷🇩🇪🇯🇵",
    "x² + y² = z², so", "∑ᵢ aᵢ ≤ ∞", "\ufefftext behind a mark", "zero\u200bwidth\u200dspace",
    "tab\tand\r\nline", "\n\n\n", "   leading spaces", "trailing   ", "𝒜𝓁𝓅𝒽𝒶 is", "ｆｕｌｌｗｉｄｔｈ",
    "ﬁne ligatures", "№ 5 ½ ¾", "\u0000nul\u0001", "\U0010ffff\ue000", "İstanbul ışık", "ǅ ǆ Ǆ",
    "<|im_end|> inside", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "don't can't we'll I'VE",
    "1234567890 3.14159 1,000,000",
)  # fmt: skip
STOPS: tuple[Mapping[str, Any], ...] = (
    {"stop": ["."]}, {"stop": ["\n", ","]}, {"stop": [" the", " a ", "e"]},
    {"stop": ["ing", "nowhere to be found"]}, {"stop_token_ids": list(range(200, 400))},
    {"repetition_penalty": 1.3}, {"presence_penalty": 0.8, "frequency_penalty": 0.4},
)  # fmt: skip
MESSAGES = (
    "Hi",
    "",
    "What is the capital of France?",
    "Écris un mot 🙂",
    "2+2?\n",
    "<|im_end|>",
    "日本の首都は？",
    "Answer: yes or no",
)


def asked() -> list[Asked]:
    """Over 200, of every kind; the kinds are spread evenly."""
    texts = [form.format(subject) for subject in SUBJECTS for form in FORMS] + list(SCRIPTS)
    found = [Asked(text) for text in ["", *texts]]
    found += [Asked(texts[(7 * n) % len(texts)], STOPS[n % len(STOPS)]) for n in range(49)]
    found += [Asked((("user", text),)) for text in MESSAGES]
    found += [
        Asked((("system", "Be brief."), ("user", text), ("assistant", "Ok."), ("user", "Go on."))) for text in MESSAGES
    ]
    found += [Asked((("user", text),), STOPS[n % len(STOPS)]) for n, text in enumerate(MESSAGES)]
    text_of_license = (ROOT / "LICENSE").read_text(encoding="utf-8")
    found += [Asked(text_of_license[start : start + 900 + 300 * n]) for n, start in enumerate(range(0, 6000, 1000))]
    found += [Asked(SCRIPTS[n] * 25) for n in (12, 14, 17, 25)]
    return found[::2] + found[1::2]


def settings_of(each: Asked, length: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_new_tokens": length, **each.settings}


def python_answers(
    bundle: Path, cases: Sequence[Asked], length: int = LENGTH, kernels: str = "onnxruntime"
) -> list[Answer]:
    """By the Python runtime, on as many rows as the bundle has."""
    with PythonGenerator.open(bundle, threads=1, kernels=kernels) as generator:
        prompts: list[Any] = []
        for each in cases:
            if isinstance(each.prompt, str):
                prompts.append(each.prompt)
            else:
                messages = [{"role": role, "content": content} for role, content in each.prompt]
                prompts.append(generator.chat_encoder.encode(messages))
        configs = [generator.defaults.resolve(**settings_of(each, length)) for each in cases]
        completions = generator.generate(prompts, configs)
    return [(list(each.token_ids), each.text, each.finish_reason.value, each.prompt_tokens) for each in completions]


def c_answers(
    library: Library,
    onnxruntime: Path,
    bundle: Path,
    cases: Sequence[Asked],
    length: int = LENGTH,
    cpu_kernels: Path | None = None,
) -> list[Answer]:
    """By the C library, with own kernels if their library is given; what it streams is what it gives in the end."""
    kernels = {"kernels": library.number("KERNELS_ONNXRUNTIME")}
    if cpu_kernels is not None:
        kernels = {"kernels": library.number("KERNELS_OWN"), "cpu_kernels": cpu_kernels}
    options = {"onnxruntime": onnxruntime, "threads": 1, **kernels}
    with Model(library, bundle, **options) as model, Generator(model) as generator:
        assert model.fact("HAS_OWN_KERNELS") == (cpu_kernels is not None)
        numbers = [generator.submit(each.prompt, **settings_of(each, length)) for each in cases]
        outputs = generator.run()
    found = []
    for number in numbers:
        output = outputs[number, 0]
        assert output.streamed == output.text and output.streamed_ids[: len(output.token_ids)] == output.token_ids
        found.append((output.token_ids, output.text, output.finish, output.prompt_tokens))
    return found


def assert_equal(found: Sequence[Answer], expected: Sequence[Answer], cases: Sequence[Asked]) -> None:
    wrong = [case for case, a, b in zip(cases, found, expected, strict=True) if a != b]
    assert not wrong, f"{len(wrong)} of {len(cases)} answers differ, the first of {wrong[0]}"


def test_some_answers_are_the_python_runtimes(library: Library, onnxruntime: Path, shared_folder: Path) -> None:
    """A few of every kind; all of them are the next test's."""
    cases = asked()[::18]
    assert len(cases) >= 12
    bundle = real_bundle(shared_folder, "int8")
    expected = python_answers(bundle, cases, 4)
    assert_equal(c_answers(library, onnxruntime, bundle, cases, 4), expected, cases)
    # The control: answers to other prompts aren't taken for these.
    with pytest.raises(AssertionError, match="answers differ"):
        assert_equal(expected[1:] + expected[:1], expected, cases)


@pytest.mark.parametrize(("precision", "step"), [("int4", 24), pytest.param("int8", 6, marks=pytest.mark.deep)])
def test_own_kernels_answers_are_the_python_runtimes(
    library: Library, onnxruntime: Path, cpu_kernels: Path, shared_folder: Path, precision: str, step: int
) -> None:
    cases = asked()[::step]
    assert len(cases) >= 9
    bundle = real_bundle(shared_folder, precision)
    with named_kernels():
        expected = python_answers(bundle, cases, kernels="own")
    found = c_answers(library, onnxruntime, bundle, cases, cpu_kernels=cpu_kernels)
    assert_equal(found, expected, cases)
    with pytest.raises(AssertionError, match="answers differ"):
        assert_equal(expected[1:] + expected[:1], expected, cases)


@pytest.mark.deep
@pytest.mark.parametrize("rows", [1, 4])
def test_all_answers_are_the_python_runtimes(
    rows: int, library: Library, onnxruntime: Path, shared_folder: Path
) -> None:
    """Each on one row or on four: the schedule is the same, so that rows that share a step do so in both."""
    everything = asked()
    assert len(everything) >= 200
    cases = everything[rows == 4 :: 2]
    bundle = real_bundle(shared_folder, "int8", max_batch=rows)
    expected = python_answers(bundle, cases)
    assert_equal(c_answers(library, onnxruntime, bundle, cases), expected, cases)
    # Equality says something: most answers are different ones, and they end in both ways.
    assert len({tuple(ids) for ids, *_ in expected}) > 0.7 * len(cases)
    reasons = Counter(reason for _, _, reason, _ in expected)
    assert reasons["stop"] >= 8 and reasons["length"] >= 40


@pytest.mark.deep
def test_fp32_answers_are_those_of_transformers(library: Library, onnxruntime: Path, shared_folder: Path) -> None:
    texts = ["The capital of France is", *SCRIPTS[:3], "def main():\n", "Water is made of"]
    bundle = real_bundle(shared_folder, "fp32")
    with open_checkpoint(MODEL) as checkpoint:
        reference = Reference(checkpoint)
    options = {"onnxruntime": onnxruntime, "threads": 1, "kernels": library.number("KERNELS_ONNXRUNTIME")}
    with Model(library, bundle, **options) as model, Generator(model) as generator:
        for text in texts:
            ids = model.tokenize(text)
            found = generator.generate(ids, temperature=0.0, max_new_tokens=12, ignore_eos=True)
            assert found.token_ids == reference.greedy(np.array(ids, np.int64), 12), text
