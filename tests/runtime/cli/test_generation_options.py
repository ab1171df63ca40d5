"""The options of `generate` and `chat`, without a bundle: what they give, and what they refuse at once."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from qwen_aot.runtime.cli.options import generation_config, generation_options
from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults

BUNDLE = GenerationDefaults(do_sample=True, temperature=0.6, top_k=20, max_new_tokens=9)


def given(*arguments: str) -> tuple[GenerationConfig | None, click.testing.Result]:
    found: list[GenerationConfig] = []

    @click.command()
    @generation_options
    def command(**settings: Any) -> None:
        found.append(generation_config(BUNDLE, settings))

    result = CliRunner().invoke(command, arguments)
    return (found[0] if found else None), result


def test_nothing_given_is_the_bundles() -> None:
    assert given()[0] == BUNDLE.resolve() == GenerationConfig(temperature=0.6, top_k=20)


def test_every_option_reaches_the_request() -> None:
    config, result = given(
        "--max-new-tokens", "7", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.9", "--min-p", "0.25",
        "--repetition-penalty", "1.25", "--presence-penalty", "-0.5", "--frequency-penalty", "2",
        "--logit-bias", "5=-100", "--logit-bias", "17=2.5", "--seed", "4", "--stop", "a", "--stop", "b", "--ignore-eos",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert config == GenerationConfig(
        max_new_tokens=7,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.25,
        repetition_penalty=1.25,
        presence_penalty=-0.5,
        frequency_penalty=2.0,
        logit_bias={5: -100.0, 17: 2.5},
        seed=4,
        stop=("a", "b"),
        ignore_eos=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--min-p", "1.5"), "--min-p"),
        (("--presence-penalty", "2.1"), "--presence-penalty"),
        (("--frequency-penalty", "-3"), "--frequency-penalty"),
        (("--logit-bias", "5"), "'5' isn't a token id, = and a number of -100 to 100, such as 1234=-5"),
        (("--logit-bias", "5=101"), "'5=101' isn't"),
        (("--logit-bias", "5=nan"), "'5=nan' isn't"),
        (("--logit-bias", "-5=1"), "'-5=1' isn't"),
        (("--logit-bias", "a=1"), "'a=1' isn't"),
        (("--logit-bias", "5=1", "--logit-bias", "5=2"), "the token id 5 twice"),
    ],
)
def test_a_wrong_value_is_refused_at_once(arguments: tuple[str, ...], message: str) -> None:
    config, result = given(*arguments)
    assert (config, result.exit_code) == (None, 2)
    assert message in result.output
