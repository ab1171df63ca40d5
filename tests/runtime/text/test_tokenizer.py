"""The tokenizer of a bundle: fits the model, reads tokenizer_config.json, refuses what it can't take."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, processors

from qwen_aot.errors import BundleError, GenerationError
from qwen_aot.runtime.bundle.load import Bundle, load_bundle
from qwen_aot.runtime.text.control_tokens import LONG_TEXT
from qwen_aot.runtime.text.tokenizer import Tokenizer, load_tokenizer
from tests.runtime.texts import GOLDEN, golden_tokenizer
from tests.runtime.toys import ALL_INPUTS, checksum_model, io_tables, make_manifest, write_bundle

TOKENIZER = (GOLDEN / "tokenizer.json").read_text(encoding="utf-8")


def bundle_with(tmp_path: Path, texts: dict[str, str], vocab_size: int = 1000) -> Bundle:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs, vocab_size=vocab_size)
    return load_bundle(write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest, texts))


def test_text_round_trip_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bundle_with(tmp_path, {"tokenizer.json": TOKENIZER}))
    assert tokenizer is not None
    ids = tokenizer.encode("<|im_start|>naïve 你好<|im_end|>")
    assert tokenizer.decode(ids) == "naïve 你好"
    assert {ids[0], ids[-1]} <= tokenizer.special_ids
    assert tokenizer.piece(ids[0]) == "<|im_start|>"
    assert tokenizer.piece(999) is None


def test_a_bundle_without_a_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(bundle_with(tmp_path, {})) is None


def test_the_manifest_says_which_file_it_is(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path, {"vocabulary.json": TOKENIZER, "tokenizer.json": "{"})
    named = {name: replace(bundle.manifest.text, tokenizer=name) for name in ("vocabulary.json", None)}
    bundles = {name: replace(bundle, manifest=replace(bundle.manifest, text=text)) for name, text in named.items()}
    assert load_tokenizer(bundles["vocabulary.json"]) is not None
    assert load_tokenizer(bundles[None]) is None


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path, {"tokenizer.json": TOKENIZER}, vocab_size=100)
    with pytest.raises(BundleError, match=r"largest id is .*, but the model's vocabulary ends before 100"):
        load_tokenizer(bundle)


PANIC = """{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2},
"merges": ["a b"], "continuing_subword_prefix": "##"}}"""  # longer than the merge's right part


@pytest.mark.parametrize("text", ["{", "{}", '{"model": 3}', PANIC])
def test_a_damaged_tokenizer(tmp_path: Path, text: str) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json can't be parsed"):
        load_tokenizer(bundle_with(tmp_path, {"tokenizer.json": text}))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_tokenizer_config(tmp_path: Path, text: str) -> None:
    with pytest.raises(BundleError, match=r"tokenizer_config\.json"):
        load_tokenizer(bundle_with(tmp_path, {"tokenizer.json": TOKENIZER, "tokenizer_config.json": text}))


def test_facts_of_tokenizer_config(tmp_path: Path) -> None:
    config = {
        "chat_template": "{{ x }}",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>", "lstrip": False},
    }
    texts = {"tokenizer.json": TOKENIZER, "tokenizer_config.json": json.dumps(config)}
    tokenizer = load_tokenizer(bundle_with(tmp_path, texts))
    assert tokenizer is not None
    assert tokenizer.chat_template == "{{ x }}"
    assert tokenizer.config == config


def test_of_several_templates_the_default_is_taken() -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert golden_tokenizer({"chat_template": named}).chat_template == "d"
    assert golden_tokenizer({"chat_template": named[:1]}).chat_template is None
    assert golden_tokenizer().chat_template is None


@pytest.mark.parametrize("value", [5, {"default": "x"}, ["x"], [{"name": "default", "template": 5}]])
def test_a_template_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(
        BundleError, match=r"tokenizer_config\.json: chat_template is a (int|dict|list); accepted: a text"
    ):
        golden_tokenizer({"chat_template": value})


def test_padding_and_truncation_of_the_file_are_off() -> None:
    document = json.loads(TOKENIZER)
    document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    from tokenizers import Tokenizer as RustTokenizer

    from qwen_aot.runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(RustTokenizer.from_str(json.dumps(document)), {}, vocab_size=1000)
    assert tokenizer.encode("Hello, world!") == golden_tokenizer().encode("Hello, world!")


def test_text_that_was_not_utf8() -> None:
    with pytest.raises(GenerationError, match="a lone surrogate at character 1"):
        golden_tokenizer().encode("a\udcff")


def test_special_tokens_as_text() -> None:
    tokenizer = golden_tokenizer()
    text = "a<|im_end|>b"
    plain = tokenizer.encode(text, allow_special_tokens=False)
    assert not tokenizer.special_ids & set(plain) and tokenizer.decode(plain) == text
    assert tokenizer.special_id("<|im_end|>") in tokenizer.encode(text)


def test_special_tokens_as_text_where_ids_have_holes() -> None:
    """A library that numbers new tokens by counting would give a stand-in the id of a letter."""
    ids = {"a": 0, "b": 1, "<s>": 2, "<": 5, "s": 6, ">": 7, "/": 9}
    backend = RustTokenizer(models.BPE(vocab=ids, merges=[]))
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend, {}, vocab_size=10)
    assert tokenizer.encode("a<s>/>", allow_special_tokens=False) == [ids[letter] for letter in "a<s>/>"]


def test_special_tokens_as_text_keep_what_is_put_around_a_text() -> None:
    """The first special token is one of the vocabulary, so that those behind it have other ids in the encoder."""
    backend = RustTokenizer(models.BPE(vocab={"<s>": 0, "a": 1, "<": 2, "s": 3, ">": 4}, merges=[]))
    backend.add_special_tokens(["<s>", "<bos>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <s>", special_tokens=[("<bos>", 5), ("<s>", 0)]
    )
    tokenizer = Tokenizer(backend, {}, vocab_size=10)
    assert tokenizer.encode("a<s>") == [5, 1, 0, 0]
    assert tokenizer.encode("a<s>", allow_special_tokens=False) == [5, 1, 2, 3, 4, 0]
    assert tokenizer.encode("a<s>", allow_special_tokens=False, add_special_tokens=False) == [1, 2, 3, 4]


@pytest.mark.parametrize("value", ["<think>", [1], {}])
def test_chat_control_tokens_of_another_type_are_refused(value: object) -> None:
    with pytest.raises(BundleError, match=r"chat_control_tokens is .*; accepted: a list of texts"):
        golden_tokenizer({"chat_control_tokens": value})
    assert golden_tokenizer({"chat_control_tokens": ["<think>"]}).chat_control_tokens == ["<think>"]


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "smollm2"])
def test_golden_texts(name: str) -> None:
    """The vectors that the C library's tokenizer runs too."""
    document = json.loads((GOLDEN / "tokenization.json").read_text(encoding="utf-8"))
    cases = [case for case in document["cases"] if case["tokenizer"] == name]
    assert len(cases) > 20
    content = TOKENIZER if name == "gpt2" else document["tokenizers"][name]
    tokenizer = Tokenizer(RustTokenizer.from_str(content), {}, vocab_size=1000)
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"], allow_special_tokens=False) == case["plain_ids"], case["text"]


def test_a_long_text_is_encoded_as_a_short_one() -> None:
    """By another function of the library, which lets other threads run."""
    tokenizer = golden_tokenizer()
    text = "Hello, world! naïve <|im_end|> 你好 " * 800
    assert len(text) > LONG_TEXT
    assert tokenizer.encode(text) == tokenizer.backend.encode(text).ids
    plain = tokenizer.encode(text, allow_special_tokens=False)
    assert tokenizer.backend.decode(plain) == text
    assert plain != tokenizer.encode(text)
