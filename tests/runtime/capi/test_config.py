"""Settings of the C library: the ranges and the bundle's defaults are those of the Python runtime."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.errors import BundleError, GenerationError
from qwen_aot.runtime.bundle.strict_json import parse_object
from qwen_aot.runtime.generation.checkpoint_settings import _UNSUPPORTED
from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults
from tests.runtime.capi.native import Native, ask
from tests.runtime.toys import make_manifest

EPSILON = 1e-9
# Values at each range's ends, within and without.
BOUNDARIES: dict[str, list[Any]] = {
    "max_new_tokens": [-(2**63), -1, 0, 1, 2, 2**63 - 1],
    "min_new_tokens": [-1, 0, 1, 2**62],
    "temperature": [-1e-3, -0.0, 0, 1e-320, 1e-3 - EPSILON, 1e-3, 1, 1000, 1000 + EPSILON, 1e300],
    "top_k": [-1, 0, 1, 2**63 - 1],
    "top_p": [-EPSILON, 0, 1e-320, 0.5, 1, 1 + EPSILON],
    "min_p": [-EPSILON, 0, 0.5, 1, 1 + EPSILON],
    "repetition_penalty": [-1, 0, 1e-3 - EPSILON, 1e-3, 1, 1000, 1000 + EPSILON],
    "presence_penalty": [-2 - EPSILON, -2, 0, 2, 2 + EPSILON],
    "frequency_penalty": [-2 - EPSILON, -2, 0, 2, 2 + EPSILON],
    "logit_bias": [{}, {0: 100}, {0: 100 + EPSILON}, {0: -100}, {0: -100 - EPSILON}, {-1: 0}, {2**31 - 1: 1}],
    "suppress_tokens": [[], [0, 5], [-1], [3, -2]],
    "n": [-1, 0, 1, 128, 129],
    "stop": [[], ["a", "b"], [""], ["a", ""], ["\0"]],
    "stop_token_ids": [[], [0], [-1]],
    "eos_token_ids": [[], [0], [-1]],
    "ignore_eos": [True, False],
    "logprobs": [-2, 0, 100, 101],
    "prompt_logprobs": [-2, 0, 100, 101],
}
NOT_NUMBERS = ["nan", "inf", "-inf"]
FLOATS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
INVALID_ARGUMENT, BUNDLE = 1, 4


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("generation")


def request_of(given: dict[str, Any], document: Any = None, **more: Any) -> dict[str, Any]:
    if "logit_bias" in given:
        given = given | {"logit_bias": list(given["logit_bias"].items())}
    if given.get("seed") is not None:
        given = given | {"seed": str(given["seed"])}
    return {
        "what": "complete",
        "document": document if document is None or isinstance(document, str) else json.dumps(document),
        "manifest_eos": [],
        "manifest_length": None,
        "given": given,
        "is_chat": False,
        "room": 5000,
        **more,
    }


def test_every_setting_has_its_boundaries() -> None:
    assert {*BOUNDARIES, "seed"} == {each.name for each in dataclasses.fields(GenerationConfig)}


def test_ranges_are_the_python_ones(program: Path) -> None:
    cases = [{name: value} for name, values in BOUNDARIES.items() for value in values]
    cases += [{"min_new_tokens": 6, "max_new_tokens": 5}, {"min_new_tokens": 5, "max_new_tokens": 5}]
    cases += [{"seed": 0}, {"seed": 2**64 - 1}]
    refusals = 0
    for case, answer in zip(cases, ask(program, [request_of(case) for case in cases]), strict=True):
        try:
            GenerationConfig(**case)
        except GenerationError:
            refusals += 1
            assert answer["status"] == INVALID_ARGUMENT, case
            assert next(iter(case)) in answer["message"] and "accepted: " in answer["message"]
        else:
            assert "status" not in answer, (case, answer)
    assert refusals > 30


def test_what_is_no_number_is_refused(program: Path) -> None:
    cases = [{name: value} for name in FLOATS for value in NOT_NUMBERS]
    for answer in ask(program, [request_of(case) for case in cases]):
        assert answer["status"] == INVALID_ARGUMENT


QWEN = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "suppress_tokens": [4, 4, 2],
    "stop_strings": ["é", "x"],
    "min_new_tokens": 3,
}
GIVEN: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1.5},
    {"top_k": 0},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"max_new_tokens": 2},
    {"max_new_tokens": 9, "min_new_tokens": 2},
    {"stop": []},
    {"stop": ["y"], "stop_token_ids": [5, 4, 5]},
    {"eos_token_ids": [7], "ignore_eos": True},
    {"suppress_tokens": []},
    {"suppress_tokens": [1], "seed": 2**64 - 1, "n": 7, "logprobs": 0, "prompt_logprobs": 3},
    {"logit_bias": {7: 1.5, 3: -2.25, 100: 100}, "presence_penalty": 0.5, "frequency_penalty": -0.5},
]
DOCUMENTS: list[Any] = [
    None,
    {},
    QWEN,
    QWEN | {"do_sample": False},
    QWEN | {"do_sample": None, "temperature": None, "top_k": None, "eos_token_id": None, "stop_strings": None},
    {"eos_token_id": 7, "stop_strings": "end", "max_new_tokens": 40, "min_new_tokens": 50},
    {"temperature": 1, "top_k": 10**30, "max_new_tokens": 10**30, "min_p": 0.25},
]


def python_answer(given: dict[str, Any], document: Any, request: dict[str, Any]) -> dict[str, Any]:
    manifest = dataclasses.replace(
        make_manifest(eos_token_ids=tuple(request["manifest_eos"])), default_max_new_tokens=request["manifest_length"]
    )
    defaults = (
        GenerationDefaults.from_manifest(manifest)
        if document is None
        else GenerationDefaults.from_document(document, manifest)
    )
    settings = defaults.complete(defaults.resolve(**given), is_chat=request["is_chat"], room=request["room"])
    found = dataclasses.asdict(settings)
    found["logit_bias"] = [list(pair) for pair in sorted(settings.logit_bias.items())]
    found["seed"] = None if settings.seed is None else str(settings.seed)
    found["top_k"] = min(settings.top_k, 2**63 - 1)
    for name in ("logprobs", "prompt_logprobs"):
        found[name] = -1 if found[name] is None else found[name]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def test_settings_are_completed_as_the_python_ones(program: Path) -> None:
    cases = [
        (given, document, request_of(given, document, manifest_eos=eos, manifest_length=length, is_chat=is_chat))
        for given in GIVEN
        for document in DOCUMENTS
        for eos, length, is_chat in [([], None, False), ([9, 200], 77, False), ([9], None, True)]
    ]
    for (given, document, request), answer in zip(cases, ask(program, [r for _, _, r in cases]), strict=True):
        for name in ("ending_ids", "warnings"):
            answer.pop(name)
        answer["eos_token_ids"] = list(dict.fromkeys(answer["eos_token_ids"]))
        assert answer == python_answer(given, document, request), (given, document)


BAD_DOCUMENTS: list[Any] = [
    "[]",
    "{",
    '{"top_k": 1, "top_k": 2}',
    *(
        {key: value}
        for key, values in {
            "do_sample": [1, "true", []],
            "max_new_tokens": [0, -3, 5.0, "5", True, -(10**30)],
            "min_new_tokens": [-1, 0.5, -(10**30)],
            "temperature": [0.0001, 2000, "1", True, 10**400],
            "top_k": [-1, 2.0],
            "top_p": [0, 1.5, []],
            "min_p": [-0.1, 1.1],
            "repetition_penalty": [0, 1001],
            "suppress_tokens": [5, [-1], ["a"], [True], [1.0]],
            "stop_strings": [5, [""], [5], "", {}],
            "eos_token_id": ["a", [-1], -1, [None], True, 1.5],
        }.items()
        for value in values
    ),
]


def test_documents_are_refused_as_the_python_ones(program: Path) -> None:
    for document, answer in zip(
        BAD_DOCUMENTS, ask(program, [request_of({}, each) for each in BAD_DOCUMENTS]), strict=True
    ):
        text = document if isinstance(document, str) else json.dumps(document)
        with pytest.raises(BundleError):
            GenerationDefaults.from_document(
                parse_object(text, "generation_config.json", is_from_checkpoint=True), make_manifest()
            )
        assert answer.get("status") == BUNDLE, (document, answer)
        assert "generation_config.json" in answer["message"]


def test_keys_that_we_lack_are_named(program: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Each key of the Python list, with what turns it off and what doesn't.
    values = [None, False, True, 0, 1, 0.0, 1.0, 2, 0.5, "x", [], [1], {}, {"a": 1}]
    documents: list[dict[str, Any]] = [{key: value} for key in _UNSUPPORTED for value in values]
    documents += [{"max_length": 5}, {"max_length": 5, "max_new_tokens": 3}, {"max_length": None}]
    documents += [{"cache_implementation": "quantized"}, {"cache_implementation": "static"}]
    documents += [{key: "x" for key in _UNSUPPORTED} | {"max_length": 5, "cache_implementation": "quantized"}]
    named = 0
    for document, answer in zip(documents, ask(program, [request_of({}, each) for each in documents]), strict=True):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            GenerationDefaults.from_document(document)
        assert answer["warnings"] == "".join(caplog.messages), document
        named += bool(answer["warnings"])
    assert 100 < named < len(documents)
