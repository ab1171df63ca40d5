"""A bundle of the tiny first-generation Qwen, made once a session, and what it must answer."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from tests.first_qwen import VOCAB, Statement, make_weights, save_folder
from tests.shared import once

TOKENS = 10  # of an answer
BOUND = 1e-3  # fp32 against float64, of logits up to 8


def shared_bundle(shared_folder: Path, speculate: int | None = None) -> Path:
    """Six rows of its whole context, in fp32, by chunks of 16 tokens."""

    def make(folder: Path) -> Path:
        spec = BuildSpec(precision=Precision("fp32"), max_batch=6, prefill_chunk=16, speculate=speculate)
        build_bundle(save_folder(folder / "checkpoint"), spec, folder / "bundle")
        return folder / "bundle"

    return once(shared_folder / f"first_qwen_{speculate}", make)


@functools.cache
def statement() -> Statement:
    """Of the checkpoint."""
    return Statement(make_weights())


@functools.cache
def wanted(prompt: tuple[int, ...], count: int = TOKENS) -> tuple[int, ...]:
    """The greedy answer."""
    return tuple(statement().greedy(prompt, count))


def ids(count: int, seed: int = 1) -> tuple[int, ...]:
    """A random text."""
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, count).tolist())
