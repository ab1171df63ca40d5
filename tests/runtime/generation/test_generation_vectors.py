"""tests/golden/generation.json: what the knobs make of whole texts, and where a request ends that doesn't say."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from qwen_aot.runtime.generation.batch import Batch
from qwen_aot.runtime.generation.config import UNSET, GenerationConfig, GenerationDefaults
from qwen_aot.runtime.generation.request import Completion, Request
from qwen_aot.runtime.generation.sampling import random_numbers
from qwen_aot.runtime.generation.stopping import ending_ids
from tests.golden.rows import row_of
from tests.runtime.fakes import FakeEngine
from tests.runtime.texts import GOLDEN
from tests.runtime.toys import make_manifest

VECTORS = json.loads((GOLDEN / "generation.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", VECTORS["numbers"], ids=lambda case: f"{case['seed']}-{case['choice']}")
def test_the_numbers_of_a_choice(case: dict[str, Any]) -> None:
    random = random_numbers(int(case["seed"]), case["choice"])
    assert [random.random() for _ in case["numbers"]] == case["numbers"]


class RowsEngine(FakeEngine):
    """Answers with the rows of a case: of the number of tokens after the prompt, whatever they are."""

    case: dict[str, Any]

    def _logits(self, row: int) -> np.ndarray:
        output = len(self.rows[row]) - len(self.case["prompt"])
        logits = np.zeros(self.manifest.model.vocab_size, np.float32)
        if output >= 0:
            made = row_of({"size": 50, "seed": self.case["row_seed"] + output})
            logits = np.full(self.manifest.model.vocab_size, -100, np.float32)
            logits[: len(made)] = made
        return logits


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("case", VECTORS["texts"], ids=lambda case: case["name"])
def test_the_choices_of_a_text(case: dict[str, Any], rows: int) -> None:
    engine = RowsEngine(make_manifest(max_batch=rows, max_context=200))
    engine.case = case
    settings = case["settings"] | {"logit_bias": dict(case["settings"].get("logit_bias", ()))}
    config = GenerationConfig(seed=int(case["seed"]), n=case["n"], max_new_tokens=case["max_new_tokens"], **settings)
    batch = Batch(engine, None, GenerationDefaults(eos_token_ids=tuple(case["ending_ids"])))
    batch.add(Request(case["prompt"], config))
    ends = {}
    while not batch.is_idle:
        ends |= {event.choice: event for event in batch.step() if isinstance(event, Completion)}
    found = [
        {"token_ids": list(ends[choice].token_ids), "finish_reason": str(ends[choice].finish_reason)}
        for choice in range(case["n"])
    ]
    assert found == case["choices"]
    assert sum(len(ids) for _, ids in engine.prefills) == len(case["prompt"])  # once, whatever n


@pytest.mark.parametrize("case", VECTORS["ends"], ids=lambda case: case["name"])
def test_where_a_request_ends(case: dict[str, Any]) -> None:
    manifest = make_manifest(eos_token_ids=tuple(case["manifest_eos"]))
    manifest = dataclasses.replace(manifest, default_max_new_tokens=case["manifest_length"])
    document = case["generation_config"]
    defaults = (
        GenerationDefaults.from_manifest(manifest)
        if document is None
        else GenerationDefaults.from_document(document, manifest)
    )
    complete = defaults.complete(defaults.resolve(**case["given"]), is_chat=case["is_chat"], room=case["room"])
    assert complete.max_new_tokens == case["max_new_tokens"]
    assert complete.stop is not None and list(complete.stop) == case["stop"]
    assert sorted(ending_ids(complete, None)) == case["ending_ids"]
    assert {name: getattr(complete, name) for name in case["draws"]} == case["draws"]
    # Settings made by hand, without the bundle, end there too.
    by_hand = GenerationConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in case["given"].items()})
    completed = defaults.complete(by_hand, is_chat=case["is_chat"], room=case["room"])
    for name in ("max_new_tokens", "stop", "eos_token_ids"):
        assert getattr(completed, name) == getattr(complete, name)


def test_unset_is_not_given() -> None:
    assert GenerationDefaults().resolve(temperature=UNSET, n=UNSET) == GenerationDefaults().resolve()
