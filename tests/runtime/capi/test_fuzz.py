"""Fuzzers of what reads files and texts: no input ends the process, and none is taken that breaks a promise.

Each `src/fuzz_NAME.cpp` is a fuzzer as clang's libFuzzer takes it; here `fuzz_main.cpp` drives it, with mutants of a
corpus that is made of valid inputs. A new fuzzer needs its seeds in SEEDS.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from qwen_aot.engines.bundle import compiled_chat
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.chat_templates import CHATML, QWEN3_WHOLE
from tests.golden import make_manifests
from tests.golden.make_layouts import graph
from tests.manifests import manifest_cases
from tests.runtime.bundle.test_onnx_file import PLACES
from tests.runtime.capi.native import PROGRAMS, Native
from tests.runtime.compiled_texts import VOCAB_SIZE, compiled, reference

pytestmark = pytest.mark.fuzz

FUZZERS = sorted(path.stem for path in PROGRAMS.glob("fuzz_*.cpp") if path.stem != "fuzz_main")
SOME, MANY = 20_000, 400_000  # runs
SLOW = {"fuzz_tokenizer": 40}  # a run of it opens a file of 100 KB: how many of another's it takes


def json_seeds() -> Iterable[bytes]:
    yield b'{"a": [1, -2.5e3, true, false, null, "x", "\\u00e9\\ud83d\\ude00\\n\\"", {}], "b": {"c": [[[]]]}}'
    yield '{"": "é€😀", "numbers": [0, -0, 9223372036854775807, 1e308, 0.1e-10], "x": {"y": 1, "z": 2}}'.encode()
    yield json.dumps(make_manifests.VERSION_1).encode()
    yield b'{"wide": {' + b",".join(b'"k%d": %d' % (i, i) for i in range(50)) + b"}}"


def manifest_seeds() -> Iterable[bytes]:
    for case in manifest_cases():
        if case["accepted"]:
            yield case["text"].encode()


def onnx_seeds() -> Iterable[bytes]:
    for place in PLACES:
        yield graph("model.onnx.data", place)


def tokenizer_seeds() -> Iterable[bytes]:
    text = "Hello é e\u0301 한국어 \u1112\u1161\u11ab <|im_end|> 123 a\u0323\u0307 é你  \n x".encode() + b"ab" * 40
    for name in ("gpt2", "qwen2"):
        content = compiled(name)
        assert len(content) % 8 == 0 and len(content) < 8 << 16  # as it stands in a seed, which then opens
        for choices in (1, 3):
            yield bytes([choices]) + (len(content) // 8).to_bytes(2, "little") + content + text


def chat_seeds() -> Iterable[bytes]:
    backend = reference("qwen2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_chat, "_RENDERS", 50)  # what a build proves is no matter here
        patch.setattr(compiled_chat, "_ENCODED", 5)
        for template in (CHATML, QWEN3_WHOLE):
            config = {"eos_token": "<|im_end|>", "chat_template": template}
            yield compiled_chat.compile_chat(Tokenizer(backend, config, vocab_size=VOCAB_SIZE))


def generation_config_seeds() -> Iterable[bytes]:
    for document in (
        {},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1, "min_p": 0.05},
        {"eos_token_id": [151645, 151643], "bos_token_id": 1, "stop_strings": ["é", "x"], "suppress_tokens": [4, 2]},
        {"eos_token_id": 7, "stop_strings": "end", "max_new_tokens": 40, "min_new_tokens": 50, "do_sample": None},
        {"num_beams": 1, "temperature": 1, "top_k": 10**30, "max_length": 20, "typical_p": 1.0},
    ):
        yield json.dumps(document).encode()


# Of each fuzzer: valid inputs.
SEEDS: dict[str, Callable[[], Iterable[bytes]]] = {
    "fuzz_chat_template": chat_seeds,
    "fuzz_generation_config": generation_config_seeds,
    "fuzz_json": json_seeds,
    "fuzz_manifest": manifest_seeds,
    "fuzz_onnx_file": onnx_seeds,
    "fuzz_tokenizer": tokenizer_seeds,
}


def fuzz(native: Native, fuzzer: str, corpus: Path, runs: int, seed: int = 1) -> subprocess.CompletedProcess[str]:
    program = native.program(fuzzer, sources=["fuzz_main.cpp"])
    files = sorted(map(str, corpus.iterdir()))
    return subprocess.run([str(program), str(runs), str(seed), *files], capture_output=True, text=True, check=False)


def write_corpus(folder: Path, seeds: Iterable[bytes]) -> Path:
    folder.mkdir()
    for index, seed in enumerate(seeds):
        (folder / f"{index:04}").write_bytes(seed)
    return folder


def test_every_fuzzer_has_seeds() -> None:
    assert sorted(SEEDS) == FUZZERS


@pytest.mark.parametrize("fuzzer", FUZZERS)
def test_fuzz(native: Native, fuzzer: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", SEEDS[fuzzer]())
    runs = SOME // SLOW.get(fuzzer, 1)
    done = fuzz(native, fuzzer, corpus, runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{runs + len(list(corpus.iterdir()))} runs\n"


@pytest.mark.deep
@pytest.mark.parametrize("fuzzer", FUZZERS)
def test_fuzz_with_sanitizers(native_folder: Path, fuzzer: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", SEEDS[fuzzer]())
    done = fuzz(Native(native_folder, "address"), fuzzer, corpus, MANY // SLOW.get(fuzzer, 1), seed=2)
    assert done.returncode == 0, done.stderr


def test_a_fault_is_found_and_its_input_told(native: Native, tmp_path: Path) -> None:
    """Negative control: one byte in 256 at one place, which no seed has."""
    corpus = write_corpus(tmp_path / "corpus", [b"abcd", b"efghij"])
    done = fuzz(native, "planted_fault", corpus, SOME)
    assert done.returncode != 0
    assert "failed in run " in done.stderr and " bytes: 21" in done.stderr
    assert fuzz(native, "planted_fault", corpus, 0).stdout == "2 runs\n"
