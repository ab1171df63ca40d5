"""A wrong value of any option of any verb is exit code 2, with what is accepted, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import click
import pytest

from qwen_aot.runtime.cli.main import VERBS, qwen_aot
from tests.runtime.cli.conftest import Run

# What each verb needs besides: a bundle, a checkpoint and a folder stand in the test's own.
NEEDED = {
    "build": ("tiny-model", "-o", "out"),
    "quantize": ("tiny-model", "-o", "out"),
    "export": ("tiny-model", "-o", "out"),
    "generate": ("bundle", "--prompt", "x"),
    "chat": ("bundle",),
    "serve": ("bundle",),
    "verify": ("bundle", "--reference", "tiny-model"),
    "compare": ("bundle", "--reference", "tiny-model"),
    "bench": ("bundle",),
    "inspect": ("bundle",),
    "plan": ("qwen1.5-0.5b",),
    "gpu-check": (),
    "capi": ("--prefix", "out"),
    "doctor": (),
}
RTX, TENSORRT, BLOCKS = ("--target", "tensorrt-rtx"), ("--target", "tensorrt"), ("--precision", "int4")
FITTING = ("--prompt-tokens", "8", "--gen-tokens", "8")
AWQ, RTN, SMOOTHQUANT = ("--format", "awq"), ("--algorithm", "rtn"), ("--algorithm", "smoothquant")
GENERATION = [
    ("--max-new-tokens", "0", "0 is not in the range x>=1"),
    ("--max-new-tokens", "many", "'many' is not a valid integer range"),
    ("--temperature", "1e9", "temperature is 1000000000.0; accepted: 0 (greedy) or 0.001 to 1000"),
    ("--temperature", "-1", "-1.0 is not in the range x>=0."),
    ("--temperature", "1e-9", "temperature is 1e-09"),
    ("--temperature", "nan", "temperature is nan"),
    ("--top-k", "-1", "-1 is not in the range x>=0"),
    ("--top-p", "0", "0.0 is not in the range 0<x<=1."),
    ("--top-p", "2", "2.0 is not in the range 0<x<=1."),
    ("--top-p", "nan", "top_p is nan"),
    ("--repetition-penalty", "0", "0.0 is not in the range x>0."),
    ("--repetition-penalty", "1e9", "repetition_penalty is 1000000000.0"),
    ("--min-p", "1.5", "1.5 is not in the range 0<=x<=1."),
    ("--min-p", "nan", "min_p is nan"),
    ("--presence-penalty", "2.1", "2.1 is not in the range -2<=x<=2."),
    ("--frequency-penalty", "-3", "-3.0 is not in the range -2<=x<=2."),
    ("--logit-bias", "5", "'5' isn't a token id, = and a number of -100 to 100"),
    ("--logit-bias", "5=101", "'5=101' isn't a token id"),
    ("--seed", "-1", "-1 is not in the range x>=0"),
    ("--seed", "1.5", "'1.5' is not a valid integer range"),
    ("--stop", "", "stop is ('',); accepted: a list of texts that aren't empty"),
]
THREADS = [
    ("--threads", "0", "0 is not in the range 1<=x<=1024"),
    ("--threads", "100000", "100000 is not in the range 1<=x<=1024"),
    ("--threads", "two", "'two' is not a valid integer range"),
]
KERNELS = [("--kernels", "fast", "'fast' is not one of 'auto', 'own', 'onnxruntime'")]
WRONG: dict[str, list[tuple[str, str, str] | tuple[str, str, str, tuple[str, ...]]]] = {
    "build": [
        ("--output", "", "it is empty"),
        ("--target", "npu", "target 'npu' doesn't exist; what exists: cpu"),
        ("--precision", "fp7", "precision 'fp7' doesn't exist; what exists: cpu: fp32, int8, int4"),
        ("--precision", "int8-sq", "precision int8-sq is made by algorithm smoothquant, and algorithm is rtn", RTN),
        ("--precision", "fp8-sq", "precision fp8-sq is made by algorithm gptq-fp8, and algorithm is rtn", RTN),
        ("--max-context", "0", "max_context is 0; it must be at least 1"),
        ("--max-batch", "-3", "max_batch is -3; it must be at least 1"),
        ("--prefill-chunk", "0", "prefill_chunk is 0; it must be at least 1"),
        ("--speculate", "1", "speculate is 1; accepted: 2 to 16 tokens that a step checks"),
        ("--speculate", "4", "speculate doesn't exist for target cuda", ("--target", "cuda")),
        ("--speculate", "few", "'few' is not a valid integer"),
        ("--block-size", "7", "block_size 7 doesn't exist for cpu int4"),
        ("--sensitive-bits", "5", "sensitive_bits 5 doesn't exist for cpu int4"),
        ("--compute-capability", "8.9", "target cpu takes no TensorRT options"),
        ("--compute-capability", "", "accepted: numbers like", RTX),
        ("--workspace-mib", "0", "0 is not in the range x>=1"),
        ("--optimization-level", "6", "6 is not in the range 0<=x<=5"),
        ("--timing-cache", ".", "File '.' is a directory", TENSORRT),
        ("--attention", "fast", "attention 'fast' doesn't exist; accepted: plugin, native", TENSORRT),
        ("--moe", "fast", "moe 'fast' doesn't exist; accepted: plugin, native", TENSORRT),
        ("--linear", "fast", "linear 'fast' doesn't exist; accepted: plugin, native", TENSORRT),
        ("--linear", "plugin", "linear plugin doesn't read weights of fp16", (*TENSORRT, "--precision", "fp16")),
        ("--kv-precision", "int2", "kv_precision 'int2' doesn't exist; accepted: auto, fp32, fp16, bf16, int8"),
        ("--plugin-library", "no.so", "File 'no.so' does not exist", TENSORRT),
        ("--algorithm", "nearest", "algorithm is 'nearest'; accepted: rtn, awq, gptq, awq-gptq, smoothquant"),
        ("--keep-quantized", "", "it is empty", ("--algorithm", "rtn")),
        ("--keep-quantized", "kept", "--keep-quantized goes with --algorithm"),
        ("--seed", "-1", "-1 is not in the range x>=0"),
        *THREADS,
    ],
    "quantize": [
        ("--output", "", "it is empty"),
        ("--algorithm", "nearest", "algorithm is 'nearest'; accepted: rtn, awq, gptq, awq-gptq, smoothquant"),
        ("--format", "gguf", "format is 'gguf'; accepted: compressed-tensors, gptq, awq"),
        ("--bits", "3", "bits is 3; accepted: 4, 8"),
        ("--bits", "8", "format awq has 4 bits with zero points in one size of groups, and bits is 8", AWQ),
        ("--bits", "four", "'four' is not a valid integer"),
        ("--group-size", "48", "group_size is 48; accepted: 16, 32, 64, 128, 256"),
        ("--sensitive-bits", "5", "sensitive_bits is 5; accepted: 4, 8"),
        ("--sensitive-bits", "8", "and sensitive_bits is 8; accepted: 4, or another format", AWQ),
        ("--table-bits", "2", "table_bits is 2; accepted: 16, 8, 4"),
        ("--table-bits", "8", "format gptq has no codes of an embedding, and table_bits is 8", ("--format", "gptq")),
        ("--plain-share", "0.1", "plain_share is of algorithms that round inputs too (smoothquant, gptq-fp8)"),
        ("--plain-share", "0.6", "plain_share is 0.6; accepted: 0 to 0.5", SMOOTHQUANT),
        ("--plain-share", "some", "'some' is not a valid float"),
        ("--bits", "4", "algorithm smoothquant rounds to 8 bits with a scale a row, and bits is 4", SMOOTHQUANT),
        ("--bits-per-weight", "4", "bits_per_weight is 4.0; accepted: more than 4"),
        ("--bits-per-weight", "9.5", "bits_per_weight is 9.5; accepted: more than 4"),
        ("--bits-per-weight", "nan", "bits_per_weight is nan; accepted: more than 4"),
        ("--bits-per-weight", "4.5", "and bits_per_weight is 4.5; accepted: None, or another format", AWQ),
        ("--bits-per-weight", "4.5", "chosen by what texts show, and algorithm rtn looks at none", RTN),
        ("--text", "nowhere.txt", "File 'nowhere.txt' does not exist"),
        ("--text", ".", "File '.' is a directory"),
        ("--text", "tiny-model/model.safetensors", "isn't UTF-8"),
        ("--text", "keys", "--text goes with an algorithm that looks at texts, and rtn doesn't", RTN),
        ("--text", "keys", "--text and --random-weights exclude each other", ("--random-weights",)),
        ("--tokens", "255", "tokens is 255; it must be at least 256"),
        ("--tokens", "1000000000000", "tokens is 1000000000000; accepted: at most 16777216"),
        ("--tokens", "512", "--tokens goes with an algorithm that looks at texts, and rtn doesn't", RTN),
        ("--sequence-length", "15", "sequence_length is 15; it must be at least 16"),
        ("--sequence-length", "128", "--sequence-length goes with an algorithm that looks at texts", RTN),
        ("--seed", "-1", "-1 is not in the range x>=0"),
        *THREADS,
    ],
    "export": [
        ("--output", "", "it is empty"),
        ("--lowering", "fast", "'fast' is not one of 'standard', 'plugin', 'ort'"),
        ("--precision", "fp7", "lowering standard has no precision 'fp7'; what exists: standard: fp32"),
        ("--max-context", "0", "max_context is 0; it must be at least 1"),
        ("--block-size", "32", "the standard lowering is symmetric and chooses its blocks"),
        ("--block-size", "7", "block_size 7 doesn't exist for cpu int4", ("--lowering", "ort", *BLOCKS)),
        *THREADS,
    ],
    "generate": [
        ("--prompt", "", "the prompt is empty"),
        ("--prompt", " \n", "the prompt is empty", ("--chat",)),
        ("--prompt-ids", "1,2", "--prompt and --prompt-ids exclude each other"),
        ("--system", "x", "--system goes with --chat"),
        ("--image", "", "it is empty"),
        ("--draw-boxes", "boxes.png", "--draw-boxes draws onto a picture; give one with --image"),
        ("--draw-boxes", "boxes.jpg", "accepted: a file that ends in .png", ("--image", "it.png")),
        *GENERATION,
        *THREADS,
        *KERNELS,
    ],
    "chat": [*GENERATION, *THREADS, *KERNELS],
    "serve": [
        ("--host", "0.0.0.0", "at 0.0.0.0 other machines reach this server, and it has no key"),
        ("--host", "no such name", "--no-auth", ("--no-auth", "--api-key-file", "keys")),
        ("--host", "192.0.2.1", "can't listen at 192.0.2.1 port 8000", ("--no-auth",)),
        ("--port", "65536", "65536 is not in the range 0<=x<=65535"),
        ("--port", "http", "'http' is not a valid integer range"),
        ("--ssl-certfile", "none.pem", "'none.pem' does not exist"),
        ("--ssl-certfile", "keys", "--ssl-certfile keys can't be used"),
        ("--ssl-keyfile", "keys", "--ssl-keyfile goes with --ssl-certfile"),
        ("--ssl-keyfile", "", "it is empty"),
        ("--api-key-file", "none", "'none' does not exist"),
        ("--api-key-file", "tiny-model", "--api-key-file tiny-model can't be read"),
        ("--api-key-file", "short-keys", "key 2 isn't 16 or more visible ASCII characters"),
        ("--allowed-host", "http://a", "--allowed-host is 'http://a'; accepted: a name such as llm.example.com, or *"),
        ("--cors-origin", "example.com", "--cors-origin is 'example.com'; accepted: such as https://chat.example.com"),
        ("--model-name", "", "a name isn't empty"),
        ("--tool-format", "xml", "'xml' is not one of 'hermes', 'qwen', 'react'"),
        ("--rows", "0", "0 is not in the range x>=1"),
        ("--max-queue", "-1", "-1 is not in the range 0<=x<=10000"),
        ("--grace-seconds", "-1", "-1.0 is not in the range 0<=x<=3600"),
        ("--grace-seconds", "nan", "nan"),
        ("--log-format", "xml", "'xml' is not one of 'text', 'json'"),
        *THREADS,
        *KERNELS,
    ],
    "bench": [
        ("--prompt-tokens", "0", "0 is not in the range x>=1"),
        ("--prompt-tokens", "256", "--prompt-tokens 256 and --gen-tokens 128 exceed the bundle's context of 256"),
        ("--gen-tokens", "1", "1 is not in the range x>=2"),
        ("--rounds", "0", "0 is not in the range x>=1"),
        ("--concurrency", "", "'' isn't up to 64 numbers of 1 to 4096, such as 1,4,8"),
        ("--concurrency", "1,,2", "'1,,2' isn't up to 64 numbers"),
        ("--concurrency", "0", "'0' isn't up to 64 numbers of 1 to 4096"),
        ("--concurrency", "1.5", "'1.5' isn't up to 64 numbers"),
        ("--concurrency", "4,1,4", "'4,1,4' has a number twice; give each once"),
        ("--concurrency", ",".join(map(str, range(1, 66))), "isn't up to 64 numbers of 1 to 4096"),
        ("--concurrency", "2", "--concurrency 2 is more than the bundle's 1 row; give at most that", FITTING),
        ("--rate", "0", "'0' isn't up to 64 numbers of 0.001 to 10000, such as 0.5,1,2"),
        ("--rate", "nan", "'nan' isn't up to 64 numbers"),
        ("--rate", "fast", "'fast' isn't up to 64 numbers"),
        ("--requests", "0", "0 is not in the range 1<=x<=100000"),
        ("--url", "http://a", "give a BUNDLE, or a server's --url, not both"),
        ("--model", "x", "--model goes with --url"),
        ("--api-key-file", "none", "'none' does not exist"),
        ("--timeout", "0", "0.0 is not in the range 0.1<=x<=86400"),
        ("--timeout", "nan", "nan is not in the range 0.1<=x<=86400"),
        ("--plot", "load.pdf", "load.pdf isn't a .png or .svg file"),
        *THREADS,
        *KERNELS,
    ],
    "compare": [
        ("--reference", "", "the checkpoint's name is empty"),
        ("--reference", "nowhere", "nowhere doesn't exist and isn't a variant's name"),
        ("--seed", "-1", "-1 is not in the range x>=0"),
        ("--text", "nowhere.txt", "File 'nowhere.txt' does not exist"),
        ("--text", ".", "File '.' is a directory"),
        ("--text", "tiny-model/config.json", "is given twice; give each once", ("--text", "tiny-model/config.json")),
        ("--text", "tiny-model/model.safetensors", "isn't UTF-8"),
        ("--tokens", "3", "3 is not in the range x>=4"),
        ("--window", "3", "3 is not in the range x>=4"),
        ("--window", "257", "--window 257 is longer than the context of 256 tokens of bundle"),
        ("--plot", "", "it is empty"),
        ("--plot", "loss.pdf", "loss.pdf isn't a .png or .svg file"),
        ("--plot", "loss", "loss isn't a .png or .svg file"),
        ("--plot", "nowhere/loss.png", "nowhere/loss.png can't be written: there is no folder nowhere"),
        *THREADS,
        *KERNELS,
    ],
    "plan": [
        ("--device", "rtx-4091", "device 'rtx-4091' isn't known; accepted: orin-nano-8gb"),
        ("--target", "npu", "target 'npu' doesn't exist"),
        ("--precision", "fp7", "precision 'fp7' doesn't exist"),
        ("--precision", "int8-sq", "made by `build-engine --precision int8-sq` alone; elsewhere it counts as int8"),
        ("--precision", "fp8-sq", "made by `build-engine --precision fp8-sq` alone; elsewhere it counts as fp8"),
        ("--context", "0", "max_context is 0; it must be at least 1"),
        ("--batch", "0", "max_batch is 0; it must be at least 1"),
        ("--kv-precision", "int2", "kv_precision 'int2' doesn't exist"),
        ("--kernels", "auto", "'auto' is not one of 'own', 'onnxruntime'"),
        ("--speculate", "99", "speculate is 99; accepted: 2 to 16"),
    ],
    "gpu-check": [("--output", "", "it is empty")],
    "capi": [
        ("--prefix", "", "it is empty"),
        ("--processor", "riscv64", "'riscv64' is not one of 'x86_64', 'aarch64'"),
        ("--jobs", "0", "0 is not in the range x>=1"),
        ("--tensorrt-include", "nowhere", "'nowhere' does not exist"),
        ("--tensorrt-include", "", "it is empty"),
    ],
}
# What only the model can judge, or what takes any text.
FREE = {("chat", "--system"), ("gpu-check", "--model")}
ELSEWHERE = {"verify"}  # tests/runtime/cli/test_verify.py


def cases() -> Iterator[object]:
    for verb, wrong in WRONG.items():
        for option, value, message, *besides in wrong:
            rest = besides[0] if besides else ()
            yield pytest.param(verb, (*rest, option, value), message, id=f"{verb} {option} {value!r}")


@pytest.fixture
def place(checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which nothing may be loaded."""

    def explode(*arguments: object, **options: object) -> NoReturn:
        raise AssertionError("something was loaded")

    (tmp_path / "tiny-model").symlink_to(checkpoint)
    (tmp_path / "bundle").symlink_to(bundle)
    (tmp_path / "keys").write_text("the-key-0123456789\n")
    (tmp_path / "short-keys").write_text("the-key-0123456789\nshort\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qwen_aot.runtime.generation.generator.Generator.open", explode)
    for name in ("build.build_bundle", "build.plan_build", "quantize.quantize_checkpoint", "export.export_graph"):
        monkeypatch.setattr(f"qwen_aot.engines.{name}", explode)
    monkeypatch.setattr("qwen_aot.exporter.checkpoint.open.open_checkpoint", explode)
    monkeypatch.setattr("qwen_aot.runtime.cli.gpu_check.run_steps", explode)
    return tmp_path


@pytest.mark.parametrize(("verb", "given", "message"), list(cases()))
def test_a_wrong_value(run: Run, place: Path, verb: str, given: tuple[str, ...], message: str) -> None:
    result = run(verb, *NEEDED[verb], *given)
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert {path.name for path in place.iterdir()} == {"tiny-model", "bundle", "keys", "short-keys"}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "--url is ''; accepted: http:// or https:// with a host"),
        ("127.0.0.1:8000", "accepted: http:// or https:// with a host, such as http://127.0.0.1:8000/v1, and nothing"),
        ("ftp://a/v1", "--url is 'ftp://a/v1'; accepted"),
        ("http://", "--url is 'http://'; accepted"),
        ("http://a:port/v1", "Port could not be cast"),
        ("http://a:70000/v1", "Port out of range"),
        ("http://[::1/v1", "Invalid IPv6 URL"),
        ("http://me:word@a/v1", "and nothing else"),
        ("http://a/v1?x=1", "and nothing else"),
        ("http://a/v1#x", "and nothing else"),
        ("http://a b/v1", "and nothing else"),
        ("http://ä/v1", "and nothing else"),
    ],
)
def test_a_url_that_is_none(run: Run, place: Path, url: str, said: str) -> None:
    result = run("bench", "--url", url, "--concurrency", "1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize("content", [b"", b"\nthe-key-0123456789", b"two words", "schl\u00fcssel".encode(), b"\xff"])
def test_a_file_without_a_key(run: Run, place: Path, content: bytes) -> None:
    (place / "keys").write_bytes(content)
    result = run("bench", "--url", "http://127.0.0.1:1", "--concurrency", "1", "--api-key-file", "keys")
    assert (result.exit_code, result.stdout) == (2, "")
    said = " ".join(result.stderr.split())
    assert "its first line isn't a key, of visible ASCII characters" in said or "keys can't be read" in said
    assert "words" not in said and "schl" not in said


@pytest.mark.parametrize("ids", ["", " , ", "1,x", "1.5", "-1", "١", "1_0"])
def test_token_ids_of_another_form(run: Run, place: Path, ids: str) -> None:
    result = run("generate", "bundle", "--prompt-ids", ids)
    assert result.exit_code == 2
    assert ("the prompt is empty" if not ids.strip(" ,") else "whole numbers of 0 or more") in result.stderr


@pytest.mark.parametrize("text", ["", "\n"])
def test_empty_standard_input(run: Run, place: Path, text: str) -> None:
    result = run("generate", "bundle", input=text)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the prompt is empty; give text with --prompt or on standard input" in " ".join(result.stderr.split())


@pytest.mark.parametrize("verb", ["generate", "chat", "serve", "bench", "inspect", "verify", "compare"])
def test_a_bundle_that_is_nowhere(run: Run, place: Path, verb: str) -> None:
    result = run(verb, "nowhere", *NEEDED[verb][1:])
    assert result.exit_code == 2
    assert "'nowhere' does not exist" in result.stderr


@pytest.mark.parametrize("verb", ["build", "quantize", "export", "plan"])
def test_a_checkpoint_that_is_nowhere(run: Run, place: Path, verb: str) -> None:
    result = run(verb, "nowhere", *NEEDED[verb][1:])
    assert result.exit_code == 2
    assert "nowhere doesn't exist and isn't a variant's name; accepted: a folder" in " ".join(result.stderr.split())


def test_the_needed_arguments_are_right(run: Run, place: Path) -> None:
    """Or the tests above would see another refusal."""
    for verb in ("build", "quantize", "export", "generate", "chat", "bench"):
        assert str(run(verb, *NEEDED[verb], *(["--gen-tokens", "2", "--prompt-tokens", "2"] if verb == "bench" else []))
                   .exception) == "something was loaded"  # fmt: skip


def test_every_option_that_takes_a_value_is_tried() -> None:
    context = click.Context(qwen_aot)
    for verb in set(VERBS) - ELSEWHERE:
        command = qwen_aot.get_command(context, verb)
        assert command is not None
        takes = {p.opts[-1] for p in command.params if isinstance(p, click.Option) and not p.is_flag}
        tried = {option for option, *_ in WRONG.get(verb, [])} | {"--prompt-ids"} & takes
        assert takes - tried == {option for of, option in FREE if of == verb}, verb
