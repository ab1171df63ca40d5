"""Remakes sampling.json from transformers' logits processors: `python -m tests.golden.make_sampling`.

A case is a row of logits and settings; its answer is the ids that are left after penalty, temperature, top-k
and top-p, their probabilities, and the ids drawn at some u: the first id, ascending, at which the cumulative
probability passes u.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

SETTINGS = [
    {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"repetition_penalty": 1.3, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"repetition_penalty": 0.7, "temperature": 0.5, "top_k": 0, "top_p": 1.0},
    {"repetition_penalty": 1.0, "temperature": 0.7, "top_k": 5, "top_p": 1.0},
    {"repetition_penalty": 1.0, "temperature": 1.5, "top_k": 0, "top_p": 0.9},
    {"repetition_penalty": 1.0, "temperature": 0.2, "top_k": 0, "top_p": 0.3},
    {"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"repetition_penalty": 1.05, "temperature": 2.0, "top_k": 1, "top_p": 0.5},
    {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 40, "top_p": 0.05},
]
DRAWS = [0.0, 0.1, 0.37, 0.5, 0.82, 0.999]


def processors(settings: dict[str, float], seen: list[int]) -> LogitsProcessorList:
    """The chain that transformers builds for these settings."""
    chain = LogitsProcessorList()
    if settings["repetition_penalty"] != 1 and seen:
        chain.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if settings["temperature"] != 1:
        chain.append(TemperatureLogitsWarper(settings["temperature"]))
    if settings["top_k"]:
        chain.append(TopKLogitsWarper(int(settings["top_k"])))
    if settings["top_p"] < 1:
        chain.append(TopPLogitsWarper(settings["top_p"]))
    return chain


def make_case(logits: np.ndarray, seen: list[int], settings: dict[str, float]) -> dict[str, object]:
    """One case with its answer."""
    scores = processors(settings, seen)(torch.tensor([seen], dtype=torch.int64), torch.tensor(logits[None]))
    probabilities = torch.softmax(scores[0].double(), dim=-1).numpy()
    ids = np.flatnonzero(np.isfinite(scores[0].numpy()))
    cumulative = np.cumsum(probabilities[ids])
    raw = torch.log_softmax(torch.tensor(logits).double(), dim=-1).numpy()
    return {
        "logits": [float(value) for value in logits],
        "seen": seen,
        "settings": settings,
        "ids": ids.tolist(),
        "probabilities": [float(f"{value:.9g}") for value in probabilities[ids]],
        "draws": [[u, int(ids[min(int((cumulative <= u).sum()), len(ids) - 1)])] for u in DRAWS],
        "greedy": int(scores[0].argmax()),
        "raw_log_probabilities": [float(f"{value:.9g}") for value in raw],
    }


def main() -> None:
    """Writes sampling.json beside this script."""
    rng = np.random.default_rng(20)
    cases = []
    for size in (7, 60):
        for settings in SETTINGS:
            logits = np.round(rng.standard_normal(size) * 3, 3).astype(np.float32)
            seen = sorted({int(i) for i in rng.integers(0, size, size // 3)})
            cases.append(make_case(logits, seen, settings))
    tied = np.array([1, 5, 5, 5, 0, 2], np.float32)
    cases.append(make_case(tied, [], SETTINGS[3] | {"top_k": 2}))
    document = json.dumps({"cases": cases}, indent=1)
    Path(__file__).with_name("sampling.json").write_text(document + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
