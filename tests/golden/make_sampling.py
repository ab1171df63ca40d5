"""Remakes sampling.json from transformers' logits processors: `python -m tests.golden.make_sampling`.

A case is a row of logits, the prompt and output so far, and settings (those left out are off). Its answer is the logits
as changed by bias, penalties and tokens that may not come, and the likeliest of them; the ids that are left after
temperature, top-k, top-p and min-p; and what is drawn at some u: the first id, ascending, at which the cumulative
probability passes u. No u lies within MARGIN of such a place, and no cut within it of another result.

The processors and their order are those that transformers builds for a `generate` with these settings. It has no
presence and frequency penalty: `OutputPenalties` states OpenAI's formula, token by token, at the place where `generate`
puts a caller's own processors. tests/golden/rows.py makes the logits of a whole vocabulary from a number.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMixin

from tests.golden.rows import row_of

MARGIN = 1e-5
DRAWS = [0.0, 0.1, 0.37, 0.5, 0.82, 0.999]
WHOLE = 151_936


class OutputPenalties(LogitsProcessor):  # type: ignore[misc]
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c[j] of the tokens after the prompt.

    Source: OpenAI, https://platform.openai.com/docs/api-reference/parameter-details.
    """

    def __init__(self, prompt_tokens: int, frequency: float, presence: float) -> None:
        self._prompt_tokens, self._frequency, self._presence = prompt_tokens, frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        output = input_ids[0, self._prompt_tokens :].tolist()
        for j in set(output):
            scores[0, j] -= output.count(j) * self._frequency
            scores[0, j] -= self._presence
        return scores


def processors(settings: dict[str, Any], prompt_tokens: int, ending: list[int], *, sample: bool) -> LogitsProcessorList:
    """The chain of transformers' `generate`."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    left_out = {"presence_penalty", "frequency_penalty", "logit_bias"}
    if not sample:  # `generate` has no use for these, and says so
        off, left_out = {}, left_out | {"temperature", "top_k", "top_p", "min_p"}
    known = off | {key: value for key, value in settings.items() if key not in left_out}
    config = GenerationConfig(do_sample=sample, **known)
    if settings.get("logit_bias"):
        config.sequence_bias = [[[token_id], float(bias)] for token_id, bias in settings["logit_bias"]]
    config._eos_token_tensor = torch.tensor(ending) if ending else None
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    model._merge_criteria_processor_list = MethodType(GenerationMixin._merge_criteria_processor_list, model)
    penalties = settings.get("frequency_penalty", 0.0), settings.get("presence_penalty", 0.0)
    custom = LogitsProcessorList([OutputPenalties(prompt_tokens, *penalties)] if any(penalties) else [])
    return GenerationMixin._get_logits_processor(
        model, config, input_ids_seq_length=prompt_tokens, logits_processor=custom
    )


def scores_of(case: dict[str, Any], *, sample: bool) -> np.ndarray:
    """The logits [V] that the chain leaves, -inf where a token can't come."""
    chain = processors(case["settings"], len(case["prompt"]), case["ending_ids"], sample=sample)
    ids = torch.tensor([case["prompt"] + case["output"]], dtype=torch.int64)
    scores: np.ndarray = chain(ids, torch.tensor(row_of(case["logits"])[None]))[0].numpy()
    return scores


def drawn(scores: np.ndarray, u: float) -> int | None:
    """The id at which the cumulative probability passes u; None: too near to the next one's."""
    weights = np.exp(scores.astype(np.float64) - scores.max())
    cumulative = np.cumsum(weights) / weights.sum()
    found = [int(np.searchsorted(cumulative, max(0.0, u + shift), side="right")) for shift in (-MARGIN, MARGIN)]
    return found[0] if found[0] == found[1] else None


def make_case(name: str, logits: Any, settings: dict[str, Any], **text: list[int]) -> dict[str, object]:
    """One case with its answer."""
    case = {"name": name, "logits": logits, "settings": settings, "ending_ids": [], "prompt": [], "output": []} | text
    raw = row_of(logits)
    changed, scores = scores_of(case, sample=False), scores_of(case, sample=True)
    for key in ("top_p", "min_p"):
        for shift in (-MARGIN, MARGIN):
            if 0 < settings.get(key, 0.0) < 1 and settings[key] + shift > 0:
                shifted = scores_of(case | {"settings": settings | {key: settings[key] + shift}}, sample=True)
                assert (np.isfinite(shifted) == np.isfinite(scores)).all(), f"{name}: {key} cuts at a margin"
    ids = np.flatnonzero(np.isfinite(scores))
    shown = ids if len(ids) <= 64 else ids[:: len(ids) // 16]
    probabilities = torch.softmax(torch.tensor(scores).double(), dim=-1).numpy()
    log_probabilities = torch.log_softmax(torch.tensor(raw).double(), dim=-1).numpy()
    likeliest = np.argsort(-raw, kind="stable")[:5].tolist()
    draws = [[u, drawn(scores, u)] for u in DRAWS]
    is_small = len(raw) <= 64
    return case | {
        "changed": [float(f"{v:.9g}") if np.isfinite(v) else None for v in changed] if is_small else None,
        "greedy": int(changed.argmax()),
        "ids": ids.tolist() if len(ids) <= 64 else None,
        "id_count": len(ids),
        "id_sum": int(ids.sum()),
        "probabilities": [[int(i), float(f"{probabilities[i]:.9g}")] for i in shown],
        "draws": [draw for draw in draws if draw[1] is not None],
        "log_probabilities": [
            [int(i), float(f"{log_probabilities[i]:.9g}")] for i in sorted({*likeliest, 0, len(raw) - 1})
        ],
        "likeliest": likeliest,
    }


OLD = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "temperature": 0.5},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 0.2, "top_p": 0.3},
    {"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"repetition_penalty": 1.05, "temperature": 2.0, "top_k": 1, "top_p": 0.5},
    {"top_k": 40, "top_p": 0.05},
]
# Every one alone, at its edges, and together; ids are of the smallest vocabulary.
NEW: list[dict[str, Any]] = [
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.02, "temperature": 1.7},
    {"min_p": 0.3, "top_k": 4},
    {"min_p": 0.05, "top_p": 0.85, "temperature": 1.3},
    {"presence_penalty": 0.6},
    {"presence_penalty": -2.0},
    {"presence_penalty": 2.0, "top_k": 3},
    {"frequency_penalty": 0.4},
    {"frequency_penalty": -2.0},
    {"frequency_penalty": 2.0, "presence_penalty": 2.0},
    {"frequency_penalty": 0.3, "presence_penalty": -0.7, "repetition_penalty": 1.2},
    {"logit_bias": [[2, 1.5]]},
    {"logit_bias": [[0, -100.0], [1, -100.0]]},
    {"logit_bias": [[5, 100.0]]},
    {"logit_bias": [[3, -4.25], [6, 3.5]], "repetition_penalty": 1.4},
    {"logit_bias": [[3, 2.5]], "temperature": 0.4, "top_p": 0.7},
    {"suppress_tokens": [2]},
    {"suppress_tokens": [0, 1, 2, 3, 5, 6]},
    {"suppress_tokens": [1, 4], "top_k": 7, "top_p": 0.95},
    {"suppress_tokens": [2], "logit_bias": [[2, 100.0]], "min_p": 0.2},
    {"min_new_tokens": 4},
    {"min_new_tokens": 3},
    {"min_new_tokens": 9, "suppress_tokens": [0], "top_k": 3},
    {
        "logit_bias": [[1, 1.25], [4, -2.0]],
        "repetition_penalty": 1.15,
        "frequency_penalty": 0.25,
        "presence_penalty": 0.5,
        "min_new_tokens": 5,
        "suppress_tokens": [6],
        "temperature": 0.8,
        "top_k": 6,
        "top_p": 0.97,
        "min_p": 0.01,
    },
]
TEXT = {"prompt": [4, 0, 4, 6], "output": [2, 2, 5], "ending_ids": [1, 2]}
LARGE: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 50, "min_p": 0.05},
    {"top_k": 2000},
    {"temperature": 0.6, "top_p": 0.95},
    {"min_p": 0.1},
    {"presence_penalty": 1.5, "frequency_penalty": 0.75, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    {"logit_bias": [[WHOLE - 1, 100.0], [0, 90.0]], "suppress_tokens": [70_000], "min_new_tokens": 4, "top_k": 3},
]


def main() -> None:
    """Writes sampling.json beside this script."""
    rng = np.random.default_rng(20)
    cases = []
    for size in (7, 60):
        for number, settings in enumerate(OLD):
            logits = [float(v) for v in np.round(rng.standard_normal(size) * 3, 3).astype(np.float32)]
            prompt = sorted({int(i) for i in rng.integers(0, size, size // 3)})
            cases.append(make_case(f"{size} tokens, {number}", logits, settings, prompt=prompt))
    for number, settings in enumerate(NEW):
        logits = [float(v) for v in np.round(rng.standard_normal(7) * 2, 3).astype(np.float32)]
        cases.append(make_case(f"knobs, {number}", logits, settings, **TEXT))
    tied = [1.0, 5.0, 5.0, 5.0, 0.0, 2.0]
    cuts: list[dict[str, Any]] = [{"top_k": 2}, {"min_p": 1.0}, {"top_k": 2, "min_p": 0.5, "suppress_tokens": [1]}]
    cases += [make_case(f"ties, {settings}", tied, settings, prompt=[0]) for settings in cuts]
    cases.append(make_case("a tie that a penalty breaks", tied, {"presence_penalty": 0.5}, output=[1, 1, 3]))
    cases.append(make_case("one token", [0.25], {"min_p": 1.0, "top_k": 1, "presence_penalty": 2.0}, output=[0]))
    spread = [float(f"{np.log(p):.6g}") for p in (0.5, 0.3, 0.1, 0.06, 0.04)]
    # Min-p first would leave 0.9 of the probability, of which the first two are 0.85.
    cases.append(make_case("top_p goes before min_p", spread, {"top_p": 0.85, "min_p": 0.15}))
    cases.append(make_case("weights that are 0", [0.0, -200.0, -3.0], {"top_p": 0.99, "suppress_tokens": [2]}))
    for number, settings in enumerate(LARGE):
        row = {"size": WHOLE, "seed": number, "peaks": [[70_000, 17.5], [11, 16.0], [151_000, 14.25], [9000, 12.0]]}
        text = {"prompt": [11, 5], "output": [70_000, 9000, 70_000], "ending_ids": [11]}
        cases.append(make_case(f"a whole vocabulary, {number}", row, settings, **text))
    lines = ",\n".join(json.dumps(case) for case in cases)
    Path(__file__).with_name("sampling.json").write_text(f'{{"cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
