"""The command line: the group `qwen-aot`, and `build-engine`, which is its main job under its own name."""

from __future__ import annotations

from typing import NoReturn

import click

from qwen_aot.runtime.cli.command import LazyGroup, Verb, run_to_end
from qwen_aot.runtime.cli.options import CONTEXT
from qwen_aot.version import __version__

VERBS = {
    "build": Verb("qwen_aot.runtime.cli.build", "Build a bundle from a checkpoint (the same as build-engine)."),
    "quantize": Verb("qwen_aot.runtime.cli.quantize", "Quantize a checkpoint into a GPTQ or AWQ folder."),
    "export": Verb("qwen_aot.runtime.cli.export", "Write a model's ONNX graph with KV-cache inputs and outputs."),
    "generate": Verb("qwen_aot.runtime.cli.generate", "Continue a prompt with a bundle."),
    "chat": Verb("qwen_aot.runtime.cli.chat", "Talk with a bundle in the terminal."),
    "serve": Verb("qwen_aot.runtime.cli.serve", "Serve a bundle over HTTP, as OpenAI's API."),
    "verify": Verb("qwen_aot.runtime.cli.verify", "Compare a bundle with Hugging Face transformers in fp32."),
    "compare": Verb("qwen_aot.runtime.cli.compare", "Compare bundles of a checkpoint: size, loss and speed."),
    "bench": Verb("qwen_aot.runtime.cli.bench", "Measure a bundle's speed and memory, or a server's under load."),
    "inspect": Verb("qwen_aot.runtime.cli.inspect", "Show a checkpoint, an ONNX file or a bundle as a table."),
    "plan": Verb("qwen_aot.runtime.cli.plan", "Show which models fit which devices, and how fast at most."),
    "gpu-check": Verb("qwen_aot.runtime.cli.gpu_check", "Build, test, compare and measure on this machine's GPU."),
    "capi": Verb("qwen_aot.runtime.cli.capi", "Build the C library for programs in C and C++."),
    "doctor": Verb("qwen_aot.runtime.cli.doctor", "Show versions, hardware and what each target lacks here."),
}


@click.group(cls=LazyGroup, verbs=VERBS, no_args_is_help=True, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="qwen-aot")
def qwen_aot() -> None:
    """Ahead-of-time deployment for Qwen models: checkpoint in, bundle out, and a small runtime to serve it.

    \b
    Examples:
      qwen-aot build ./Qwen1.5-0.5B-Chat -o ./bundle
      qwen-aot generate ./bundle --prompt "The capital of France is"
    """


def main() -> NoReturn:
    """Entry point of `qwen-aot`."""
    run_to_end(qwen_aot, "qwen-aot")


def build_engine_main() -> NoReturn:
    """Entry point of `build-engine`."""
    from qwen_aot.runtime.cli.build import command

    run_to_end(command, "build-engine")
