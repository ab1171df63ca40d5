"""Which chat templates are compiled, and what is found in those that aren't."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.engines.bundle import chat_rules, compiled_chat, compiled_text
from qwen_aot.engines.bundle.chat_rules import Query, Rule
from qwen_aot.engines.bundle.chat_table import ROLES, ChatTable, Refused
from qwen_aot.engines.bundle.compiled_chat import ChatNotCompiledError, chat_table
from qwen_aot.engines.bundle.compiled_text import compile_text
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.chat_templates import CHATML, LLAMA2, PUBLISHED, QWEN3, QWEN3_WHOLE
from tests.checkpoints import save_tokenizer
from tests.runtime.texts import golden_tokenizer

VOCAB = 200_000


@pytest.fixture(autouse=True)
def short_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a build's conversations is enough to see what each of these templates does."""
    monkeypatch.setattr(compiled_chat, "_RENDERS", 600)
    monkeypatch.setattr(compiled_chat, "_ENCODED", 40)


def tokenizer_of(template: str, *added: AddedToken, **config: Any) -> Tokenizer:
    backend = RustTokenizer.from_str(golden_tokenizer().backend.to_str())
    backend.add_tokens(list(added))
    return Tokenizer(backend, {"chat_template": template, **config}, vocab_size=VOCAB)


def compiled(template: str, *added: AddedToken, **config: Any) -> ChatTable:
    return chat_table(tokenizer_of(template, *added, **config))


def refusal(template: str, *added: AddedToken, **config: Any) -> str:
    with pytest.raises(ChatNotCompiledError) as refused:
        compiled(template, *added, **config)
    return str(refused.value)


def token(text: str, **flags: bool) -> AddedToken:
    return AddedToken(text, **{"normalized": False, **flags})


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "llama2"])
def test_published_templates_are_compiled(name: str) -> None:
    table = compiled(PUBLISHED[name], bos_token="<s>", eos_token="</s>")
    assert len(table.variants) == (3 if name == "qwen3" else 1)
    assert len(set(table.literals())) <= 9


def test_a_default_system_prompt_depends_on_the_first_role() -> None:
    table = compiled(PUBLISHED["qwen2.5"])
    assert table.render([("user", "a")]) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
    assert table.render([("system", "b"), ("user", "a")]) == (
        "<|im_start|>system\nb<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen3_keeps_thoughts_behind_the_last_question_alone() -> None:
    table = compiled(QWEN3_WHOLE)
    assert table.query is Query.LAST_USER_SPEAKING
    assert compiled(QWEN3).query is Query.LAST_USER
    thought = "<think>\nt\n</think>\n\n"
    messages = [("user", "a"), ("assistant", f"{thought}b"), ("user", "c"), ("assistant", f"{thought}d")]
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    whole = f"{start}<|im_start|>assistant\n{thought}d<|im_end|>\n<|im_start|>assistant\n"
    assert [table.render(messages, variant) for variant in (0, 1, 2)] == [
        whole,
        f"{whole}<think>\n\n</think>\n\n",
        whole,
    ]
    response = [messages[0], messages[1], ("user", "<tool_response>c</tool_response>")]
    assert f"assistant\n{thought}b" in table.render(response)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ strftime_now('%Y') }}" + CHATML, "it reads strftime_now"),
        ("{{ strftime_now }}" + CHATML, "it reads strftime_now"),
        ("{{ lipsum }}" + CHATML, "it reads lipsum"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "it has the filter upper"),
        (CHATML.replace("message['content']", "message['content'].upper()"), "it calls upper()"),
        (CHATML.replace("message['content']", "message['content'] * 2"), "it has a multiplication"),
        (CHATML + "{% if messages[0].content | length > 9 %}{% endif %}", "it reads the length of something else"),
        (CHATML + "{% set c = messages[0].content %}{{ '' if c | count }}", "it reads the length of something else"),
        (CHATML + "{% set messages = 'a' %}{{ '' if messages | length }}", "it reads the length of something else"),
        (CHATML + "{% for m in messages %}{% if loop.index0 is odd %}{% endif %}{% endfor %}", "it has the test odd"),
        (
            CHATML + "{% for m in messages %}{% if loop.index > 65 %}!{% endif %}{% endfor %}",
            "numbers are more than 64",
        ),
        (CHATML + "{{ '' if 0.5 > messages | length }}", "it has a number that isn't whole"),
        (CHATML + "{{ [messages][0](1) }}", "it calls what an expression gives"),
        (CHATML + "{% include 'other' %}", "it has an include"),
        (CHATML + "{% filter trim %}a{% endfilter %}", "it has a filter block"),
    ],
)
def test_what_could_say_something_new_is_refused(template: str, reason: str) -> None:
    assert reason in refusal(template)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LLAMA2, "it doesn't write each content once, in order"),
        (CHATML.replace("message['content']", "message['content'] + message['content']"), "each content once"),
        ("{% for message in messages[::-1] %}" + CHATML.partition("%}")[2], "each content once, in order"),
        ("{{ raise_exception('no') }}", "it refuses every conversation"),
        (CHATML.replace("message['content']", "message['content'].split('a')[0]"), "none of the known rules"),
        (CHATML.replace("message['content']", "message['content'].lstrip()"), "none of the known rules"),
        # What no probe says, and the proof does.
        (CHATML + "{% if 'xyzzy' in messages[-1].content %}!{% endif %}", "it isn't literals and known rules"),
        (CHATML + "{% if messages[0].content == 'xy' ~ 'zzy' %}!{% endif %}", "it isn't literals and known rules"),
        (CHATML + "{% if not messages[0].content %}!{% endif %}", "it isn't literals and known rules"),
        (
            CHATML + "{% for m in messages %}{% if loop.index > 60 %}!{% endif %}{% endfor %}",
            "isn't literals and known",
        ),
        (CHATML.replace("message['content']", "message['content'][:60]"), "isn't literals and known rules"),
        (
            CHATML + "{% if messages[0].content == 'xyzzy' %}{{ raise_exception('no') }}{% endif %}",
            "it refuses some conversations for what they say",
        ),
        (CHATML + "{% if messages[-1].content.endswith('\n') %}!{% endif %}", "none of the known rules"),
        (CHATML + "{% if messages[2].role == 'user' %}!{% endif %}", "depends on more than neighbors"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", "it writes nothing between two messages"),
    ],
)
def test_what_isnt_literals_and_rules_is_refused(template: str, reason: str) -> None:
    assert reason in refusal(template)


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        (token("<b>", special=True, lstrip=True), "its control token '<b>' takes or looks at what stands beside it"),
        (token("<b>", special=True, single_word=True), "its control token '<b>' takes or looks at"),
        (token("<b> ", special=True), "its control token '<b> ' has whitespace at its ends"),
        (token("<|im_end|>x", special=True), "the tokens '<|im_end|>' and '<|im_end|>x' overlap"),
        (token("x<|im_"), "the tokens '<|im_start|>' and 'x<|im_' overlap"),
        (token("aba", special=True), "the token 'aba' overlaps itself"),
        (token("\nb", special=True), "it writes a part of '\\nb' beside a message"),
    ],
)
def test_tokens_that_cant_be_told_from_text_beside_them(added: AddedToken, reason: str) -> None:
    if added.content == "\nb":  # no whitespace at its ends, and a beginning that literals end in
        added = token("user\nb", special=True)
        reason = "it writes a part of 'user\\nb' beside a message"
    assert reason in refusal(CHATML, added)
    compiled(CHATML, token("<b>", special=True))


def test_a_template_that_would_run_for_years_is_refused_at_once() -> None:
    loops = "".join(f"{{% for {name} in messages %}}" for name in "abcdefghijkl")
    slow = CHATML + loops + "{% endfor %}" * 12
    assert refusal(slow) == "it takes more than 5000 rounds of loops and calls"


def test_tables_are_the_same_in_every_process() -> None:
    program = (
        "import hashlib, sys\n"
        "from tokenizers import Tokenizer as RustTokenizer\n"
        "from qwen_aot.engines.bundle.compiled_chat import compile_chat\n"
        "from qwen_aot.runtime.text.tokenizer import Tokenizer\n"
        "template, tokenizer = sys.stdin.read().split(chr(0))\n"
        "tokenizer = Tokenizer(RustTokenizer.from_str(tokenizer), {'chat_template': template}, vocab_size=200000)\n"
        "sys.stdout.write(hashlib.sha256(compile_chat(tokenizer)).hexdigest())\n"
    )
    here = tokenizer_of(CHATML)
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=f"{CHATML}\0{here.backend.to_str()}",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert done.stdout == hashlib.sha256(compiled_chat.compile_chat(here)).hexdigest()


def test_the_header_says_what_it_is() -> None:
    content = compiled(CHATML).to_bytes()
    magic, version, size, checksum, nothing = struct.unpack_from("<8sIIII", content)
    assert (magic, version, size, nothing) == (b"QAOTQTPL", 1, len(content), 0)
    assert checksum == zlib.crc32(content[24:])
    assert len(compiled_chat.compile_chat(tokenizer_of(CHATML))) == len(content)


def test_whitespace_is_pythons() -> None:
    assert set(chat_rules.WHITESPACE) == {chr(code) for code in range(0x110000) if chr(code).isspace()}


def test_each_rule_is_told_from_the_others_by_the_probes() -> None:
    made = {
        rule: tuple("".join(part.text for part in chat_rules.apply(rule, probe)) for probe in chat_rules.PROBES)
        for rule in Rule
    }
    assert len(set(made.values())) == len(Rule)


def test_a_difference_in_the_table_is_found_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof judges: with a rule that is almost right, it refuses."""
    almost = dict(chat_rules._APPLY)
    almost[Rule.TRIM] = lambda content: [chat_rules.Part(content.strip(" \t\n\u00a0"), is_own=False)]
    trimming = CHATML.replace("message['content']", "message['content'] | trim")
    compiled(trimming)
    monkeypatch.setattr(chat_rules, "_APPLY", almost)
    assert "it isn't literals and known rules" in refusal(trimming)


def test_a_role_that_no_table_has() -> None:
    table = compiled(PUBLISHED["mistral"], bos_token="<s>", eos_token="</s>")
    assert table.render([("user", "a")]) == "<s>[INST] a [/INST]"
    for roles in (["assistant"], ["user", "user"], ["system", "user"]):
        with pytest.raises(Refused):
            table.render([(role, "a") for role in roles])
    assert ROLES == ("system", "user", "assistant")


def test_where_control_tokens_are_another_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids are compared too: a table that forgets a control token says the same text, and other ids."""
    real = compiled_chat._controls

    def forgetful(*arguments: Any) -> Any:
        return tuple(dataclasses.replace(each, is_special=False) for each in real(*arguments))

    monkeypatch.setattr(compiled_chat, "_controls", forgetful)
    assert "control tokens in texts aren't told from its own" in refusal(CHATML)


class TestCompileText:
    @pytest.fixture
    def files(self, tmp_path: Path) -> dict[str, str]:
        save_tokenizer(tmp_path, 320)
        return {name: (tmp_path / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}

    def test_both_are_compiled_once(self, files: dict[str, str]) -> None:
        found = compile_text(files, vocab_size=320)
        assert [name for name, _ in found.files] == ["tokenizer.qtok", "chat.qtpl"]
        assert found.warnings == ()
        assert compile_text(dict(files), vocab_size=320) is found

    def test_what_isnt_is_a_warning(self, files: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
        config = json.loads(files["tokenizer_config.json"]) | {"chat_template": "{{ strftime_now('%Y') }}"}
        files["tokenizer_config.json"] = json.dumps(config)
        document = json.loads(files["tokenizer.json"])
        document["normalizer"] = {"type": "Lowercase"}
        files["tokenizer.json"] = json.dumps(document)
        for _ in range(2):  # from the cache too
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                found = compile_text(files, vocab_size=320)
            assert found.files == ()
            assert [record.message for record in caplog.records] == list(found.warnings)
        tokenizer, template = found.warnings
        assert tokenizer.startswith("the tokenizer isn't compiled: ")
        assert "the bundle has no tokenizer.qtok, so that the C library takes and gives token ids only" in tokenizer
        assert template.startswith(
            "the chat template isn't compiled: it reads strftime_now; the bundle has no chat.qtpl"
        )

    def test_without_a_template_or_a_tokenizer(self, files: dict[str, str]) -> None:
        files["tokenizer_config.json"] = "{}"
        assert [name for name, _ in compile_text(files, vocab_size=320).files] == ["tokenizer.qtok"]
        assert compile_text({}, vocab_size=320) == compiled_text.CompiledText()
