"""GenerationConfig: a bundle's defaults, a request's settings, and their rules."""

import dataclasses
import inspect
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.errors import BundleError, GenerationError
from qwen_aot.runtime.bundle.load import Bundle, load_bundle
from qwen_aot.runtime.bundle.manifest import Manifest
from qwen_aot.runtime.generation.checkpoint_settings import read_settings
from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults
from tests.runtime.toys import checksum_model, io_tables, make_manifest, write_bundle

# As Qwen1.5's chat checkpoints carry it.
QWEN = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}


def test_the_bundle_decides_where_nothing_is_given() -> None:
    config = GenerationDefaults.from_document(QWEN).resolve()
    assert config == GenerationConfig(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1)
    assert not config.is_greedy


def test_settings_of_a_thinking_model() -> None:
    """As Qwen3's checkpoints carry them."""
    document = {**QWEN, "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.51.0"}
    del document["repetition_penalty"]
    config = GenerationDefaults.from_document(document).resolve()
    assert config == GenerationConfig(temperature=0.6, top_k=20, top_p=0.95)


def test_what_is_given_goes_first() -> None:
    config = GenerationDefaults.from_document(QWEN).resolve(
        max_new_tokens=9,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        seed=3,
        stop=["x"],
        logprobs=2,
        min_new_tokens=2,
        min_p=0.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={3: 1},
        suppress_tokens=[4],
        n=2,
        stop_token_ids=[5],
        eos_token_ids=[6],
        ignore_eos=True,
        prompt_logprobs=1,
    )
    assert config == GenerationConfig(
        max_new_tokens=9,
        temperature=1.0,
        seed=3,
        stop=("x",),
        logprobs=2,
        min_new_tokens=2,
        min_p=0.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={3: 1.0},
        suppress_tokens=(4,),
        n=2,
        stop_token_ids=(5,),
        eos_token_ids=(6,),
        ignore_eos=True,
        prompt_logprobs=1,
    )


def test_every_knob_is_a_keyword_of_resolve() -> None:
    # What the Python face, the command line and a server pass through.
    keywords = inspect.signature(GenerationDefaults.resolve).parameters.keys() - {"self"}
    assert keywords == {field.name for field in dataclasses.fields(GenerationConfig)}


def test_temperature_zero_turns_the_bundles_penalty_off() -> None:
    defaults = GenerationDefaults.from_document(QWEN)
    config = defaults.resolve(temperature=0)
    assert config.is_greedy and config.repetition_penalty == 1
    assert defaults.resolve(temperature=0, repetition_penalty=1.2).repetition_penalty == 1.2


@pytest.mark.parametrize("document", [{"do_sample": False, "temperature": 0.6}, {"temperature": 0.6}, {}])
def test_without_do_sample_it_is_greedy(document: dict[str, Any]) -> None:
    assert GenerationDefaults.from_document(document).resolve().is_greedy


def test_a_given_sampling_option_turns_sampling_on() -> None:
    defaults = GenerationDefaults.from_document({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.2})
    assert defaults.resolve().repetition_penalty == 1.2
    assert defaults.resolve(top_p=0.9).temperature == 0.6
    assert defaults.resolve(temperature=0.9).temperature == 0.9
    assert defaults.resolve(seed=1).is_greedy


def manifest_with(eos: tuple[int, ...] = (), length: int | None = None) -> Manifest:
    manifest = make_manifest(eos_token_ids=eos)
    return dataclasses.replace(manifest, default_max_new_tokens=length)


def ends(defaults: GenerationDefaults, config: GenerationConfig | None = None) -> tuple[int, ...] | None:
    return defaults.complete(config, is_chat=False, room=9).eos_token_ids


def test_the_ids_that_end_a_text_are_everybodys() -> None:
    # A fine-tune whose generation_config.json says <|endoftext|> alone, and whose template ends turns with another.
    from_document = GenerationDefaults.from_document
    assert ends(from_document({"eos_token_id": 5}, manifest_with((7, 5)))) == (5, 7)
    assert ends(from_document({"eos_token_id": [5, 6]}, manifest_with((6, 7)))) == (5, 6, 7)
    assert ends(from_document({}, manifest_with((7,)))) == (7,)
    assert ends(from_document({"eos_token_id": 5})) == (5,)
    assert ends(GenerationDefaults.from_manifest(manifest_with((7,)))) == (7,)


def test_settings_made_without_the_bundle_end_where_its_own_do() -> None:
    defaults = GenerationDefaults(eos_token_ids=(1, 2), stop=("END",), max_new_tokens=6)
    for config in (None, GenerationConfig(), defaults.resolve(), defaults.resolve(stop=None, eos_token_ids=None)):
        complete = defaults.complete(config, is_chat=False, room=9)
        assert (complete.eos_token_ids, complete.stop, complete.max_new_tokens) == ((1, 2), ("END",), 6)
    given = GenerationConfig(eos_token_ids=(), stop=(), max_new_tokens=2)
    assert defaults.complete(given, is_chat=False, room=9) == given


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; accepted: at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0; accepted: 0 \\(greedy\\) or 0.001 to 1000"),
        ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; accepted: 0 \\(off\\) or more"),
        ({"top_p": 0.0}, "top_p is 0.0; accepted: above 0, up to 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; accepted: 0.001 to 1000"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ("a", "")}, "stop is \\('a', ''\\); accepted: a list of texts that aren't empty"),
        ({"stop": "END"}, "stop is 'END'; accepted: a list of texts"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; accepted: a list of ids of 0 or more"),
        ({"stop_token_ids": (1.5,)}, "stop_token_ids is \\(1.5,\\)"),
        ({"stop": (1,)}, "stop is \\(1,\\); accepted: a list of texts"),
        ({"stop": 5}, "stop is 5; accepted: a list of texts"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; accepted: at least 1 \\(a whole number\\)"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": "9"}, "max_new_tokens is '9'"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": None}, "temperature is None"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": None}, "top_k is None"),
        ({"top_p": True}, "top_p is True"),
        ({"repetition_penalty": "1"}, "repetition_penalty is '1'"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"ignore_eos": 1}, "ignore_eos is 1; accepted: True or False"),
        ({"logprobs": True}, "logprobs is True"),
        ({"logprobs": 101}, "logprobs is 101; accepted: 0 to 100"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1; accepted: 0 to 100"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1; accepted: 0 \\(off\\) or more"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens is 5; accepted: at most max_new_tokens, 4"),
        ({"min_p": 1.01}, "min_p is 1.01; accepted: 0 \\(off\\) to 1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": None}, "min_p is None"),
        ({"presence_penalty": 2.01}, "presence_penalty is 2.01; accepted: -2 to 2"),
        ({"frequency_penalty": -2.01}, "frequency_penalty is -2.01; accepted: -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"logit_bias": [(1, 2.0)]}, "logit_bias is \\[\\(1, 2.0\\)\\]; accepted: a mapping of ids to biases"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias is {-1: 0.0}; accepted: ids of 0 or more"),
        ({"logit_bias": {"5": 0.0}}, "logit_bias is {'5': 0.0}; accepted: ids of 0 or more"),
        ({"logit_bias": {5: 100.5}}, "logit_bias is {5: 100.5}; accepted: biases of -100 to 100"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias is {5: inf}"),
        ({"logit_bias": {5: None}}, "logit_bias is {5: None}"),
        ({"suppress_tokens": (-1,)}, "suppress_tokens is \\(-1,\\); accepted: a list of ids of 0 or more"),
        ({"suppress_tokens": None}, "suppress_tokens is None"),
        ({"stop_token_ids": None}, "stop_token_ids is None"),
        ({"eos_token_ids": (0.5,)}, "eos_token_ids is \\(0.5,\\)"),
        ({"n": 0}, "n is 0; accepted: 1 to 128"),
        ({"n": 129}, "n is 129; accepted: 1 to 128"),
        ({"n": True}, "n is True"),
    ],
)
def test_values_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        GenerationConfig(**settings)
    with pytest.raises(GenerationError, match=message):
        GenerationDefaults().resolve(**settings)


def test_numbers_of_numpy_are_numbers() -> None:
    config = GenerationDefaults().resolve(top_k=np.int64(4), temperature=np.float32(0.5), stop_token_ids=np.arange(2))  # type: ignore[arg-type]
    assert (config.top_k, config.temperature, config.stop_token_ids) == (4, 0.5, (0, 1))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; accepted: int or float; rebuild"),
        ({"top_k": True}, "top_k is True; accepted: int"),
        ({"do_sample": 1}, "do_sample is 1; accepted: bool"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"eos_token_id": ["x"]}, "eos_token_id is \\['x'\\]"),
        ({"top_p": 7}, "top_p is 7; accepted: above 0, up to 1 .*repair the checkpoint's own and rebuild the bundle"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; accepted: at least 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; accepted: 0.001 to 1000"),
        ({"min_p": 2}, "min_p is 2; accepted: 0 \\(off\\) to 1.*repair"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"suppress_tokens": 5}, "suppress_tokens is 5; accepted: a list of ids; rebuild"),
        ({"suppress_tokens": [True]}, "suppress_tokens is \\[True\\]"),
        ({"stop_strings": 5}, "stop_strings is 5; accepted: a text or a list of texts"),
        ({"stop_strings": [""]}, "stop is \\('',\\); accepted: a list of texts that aren't empty"),
        ({"eos_token_id": -1}, "eos_token_ids is \\(-1,\\)"),
    ],
)
def test_a_wrong_value_in_the_document(document: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        GenerationDefaults.from_document(document)


def test_keys_that_change_the_output_and_are_not_supported_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        GenerationDefaults.from_document(QWEN | {"num_beams": 1})
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        GenerationDefaults.from_document({"num_beams": 4, "no_repeat_ngram_size": 3})
    assert "generation_config.json sets no_repeat_ngram_size, num_beams" in caplog.text


# Keys of transformers' GenerationConfig that change neither which tokens are chosen nor when they end, for the models
# and the inputs that we have.
WITHOUT_EFFECT = {
    # how it computes
    "use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile", "low_memory",
    "prefill_chunk_size", "continuous_batching_config", "use_mtp",
    # what it gives back beside the tokens, or does to their scores at the end
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "renormalize_logits", "remove_invalid_values",
    # of beams alone; num_beams is named
    "early_stopping", "length_penalty",
    # of encoders and decoders, of padding, of a prompt without tokens
    "decoder_start_token_id", "pad_token_id", "bos_token_id",
    # speculation, whose tokens are the model's
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    # of the file
    "transformers_version", "_from_model_config",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_every_key_of_transformers_is_taken_named_or_without_effect() -> None:
    from transformers import GenerationConfig as Theirs

    read: set[str] = set()

    class Document(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

    read_settings(Document())
    theirs = set(vars(Theirs()))
    assert theirs >= {"min_p", "typical_p", "stop_strings"}
    assert theirs - read == WITHOUT_EFFECT & theirs
    assert not read & WITHOUT_EFFECT


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"typical_p": 0.9}, "typical_p"),
        ({"bad_words_ids": [[1]], "guidance_scale": 2.0}, "bad_words_ids, guidance_scale"),
        ({"max_length": 20}, "max_length"),
        ({"cache_implementation": "quantized"}, "cache_implementation"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_what_is_not_supported_is_named(document: dict[str, Any], names: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        GenerationDefaults.from_document(document)
    assert f"generation_config.json sets {names}, which this runtime doesn't have" in caplog.text


@pytest.mark.parametrize(
    "document",
    [
        {"typical_p": 1.0, "num_beams": 1, "guidance_scale": 1, "bad_words_ids": None, "top_h": None},
        {"max_length": 4096, "max_new_tokens": 20},
        {"cache_implementation": "static"},
        {"min_p": 0.05, "suppress_tokens": [3], "min_new_tokens": 2, "stop_strings": "END"},
    ],
)
def test_what_is_off_or_supported_is_not_named(document: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        GenerationDefaults.from_document(document)
    assert not caplog.records


def test_what_the_bundle_asks_at_least_is_no_reason_to_refuse_a_shorter_request() -> None:
    defaults = GenerationDefaults.from_document({"min_new_tokens": 5, "suppress_tokens": [3]})
    assert defaults.resolve().min_new_tokens == 5 and defaults.resolve().suppress_tokens == (3,)
    assert defaults.resolve(max_new_tokens=2).min_new_tokens == 2
    assert defaults.complete(None, is_chat=False, room=3).min_new_tokens == 3
    with pytest.raises(GenerationError, match="min_new_tokens is 4; accepted: at most max_new_tokens, 2"):
        defaults.resolve(max_new_tokens=2, min_new_tokens=4)


def test_settings_keep_their_own_copy_of_a_bias() -> None:
    biases = {5: 1}
    config = GenerationConfig(logit_bias=biases)
    biases[5] = 7
    assert config.logit_bias == {5: 1.0}
    assert hash(config) == hash(GenerationConfig(logit_bias={5: 1.0}))


@pytest.mark.parametrize("name", ["suppress_tokens", "stop_token_ids", "eos_token_ids", "stop"])
def test_settings_keep_their_own_copy_of_a_list(name: str) -> None:
    given: list[Any] = ["end"] if name == "stop" else [5]
    expected = tuple(given)
    config = GenerationConfig(**{name: given})
    given.append(given[0])
    assert getattr(config, name) == expected
    assert hash(config) == hash(GenerationConfig(**{name: expected}))


def bundle_with(tmp_path: Path, texts: dict[str, str]) -> Bundle:
    inputs, outputs = io_tables(("input_ids",), "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs, eos_token_ids=(7,))
    names = ("input_ids", "position_ids", "cache_length", "new_tokens", "key_positions")
    return load_bundle(write_bundle(tmp_path / "b", checksum_model(*io_tables(names, "float32")), manifest, texts))


def test_from_a_bundle(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path, {"generation_config.json": json.dumps(QWEN)})
    assert GenerationDefaults.from_bundle(bundle) == GenerationDefaults.from_document(QWEN, bundle.manifest)
    assert GenerationDefaults.from_bundle(bundle).eos_token_ids == (151645, 151643, 7)


def test_from_a_bundle_without_the_file(tmp_path: Path) -> None:
    defaults = GenerationDefaults.from_bundle(bundle_with(tmp_path, {}))
    assert defaults.resolve() == GenerationConfig(top_k=50)
    assert defaults.eos_token_ids == (7,)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_from_a_bundle_whose_file_is_damaged(tmp_path: Path, text: str) -> None:
    with pytest.raises(BundleError, match=r"generation_config\.json"):
        GenerationDefaults.from_bundle(bundle_with(tmp_path, {"generation_config.json": text}))
