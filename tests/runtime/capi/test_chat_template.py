"""The C reader of chat.qtpl writes what Jinja writes, and encodes what the Python runtime encodes."""

from __future__ import annotations

import functools
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.engines.bundle import compiled_chat
from qwen_aot.engines.bundle.compiled_chat import ChatNotCompiledError, compile_chat
from qwen_aot.engines.bundle.compiled_tokenizer import compile_tokenizer
from qwen_aot.errors import GenerationError
from qwen_aot.exporter.checkpoint.bpe import byte_level_bpe
from qwen_aot.runtime.text.chat_encoder import ChatEncoder
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.chat_templates import CHATML, LLAMA2, PUBLISHED, QWEN3_WHOLE
from tests.gguf_files import smollm2_path
from tests.runtime.capi.native import Native, ask
from tests.runtime.texts import golden_tokenizer

INVALID_ARGUMENT, BUNDLE, UNSUPPORTED = 1, 4, 8
VOCAB = 200_000
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
OTHERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<|not_used|>")
TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
# What earlier answers are cut to, as in the templates of QwQ and of DeepSeek's distilled models.
CUTTING = "message['content'].split('</think>')[-1]"
QWQ = CHATML.replace(
    "message['content']", f"({CUTTING}.lstrip('\\n') if message.role == 'assistant' else message.content)"
)
DISTILLED = CHATML.replace("message['content']", f"({CUTTING} if message.role == 'assistant' else message['content'])")
STRIPPED = CHATML.replace(
    "message['content']", f"({CUTTING} | trim if message.role == 'assistant' else message.content)"
)
# What stands before the last message, as Mistral's newer templates have it.
LAST = CHATML.replace("message['content']", "('(last) ' if loop.last else '(one) ') + message['content']")

TEMPLATES = {name: source for name, source in PUBLISHED.items() if source != LLAMA2} | {
    "qwen3-whole": QWEN3_WHOLE,
    "trimming": TRIMMING,
    "qwq": QWQ,
    "distilled": DISTILLED,
    "stripped": STRIPPED,
    "last": LAST,
}
WITH_THINKING = ("qwen3", "qwen3-whole")
PIECES = (
    *("a", "words of a text", "é", "你好", "{{ messages }}", "{% endfor %}", "None", "'", '"', "\\n", "\x00", "\u200b"),
    *(" ", "\n", "\n\n", "\t", "\r", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\u00a0", "\u1680", "\u2003", "\u2028"),
    *("\u2029", "\u202f", "\u205f", "\u3000", "\ufeff", "\u180e"),
)
TAGS = (
    *("<think>", "</think>", "<think>\n", "\n</think>\n\n", "<tool_response>", "</tool_response>", "<tool_call>"),
    *("<|im_end|>", "<|im_start|>", "<|im_end|>\n<|im_start|>system\n", "<|endoftext|>", "<|not_used|>"),
    *("<|im_", "end|>", "<", ">", "|>", "</thi", "nk>", "[INST]", "assistant"),
)


def qwen_like() -> RustTokenizer:
    """Byte-level BPE with Qwen's split, its special tokens, and tokens for thoughts and tools that aren't special."""
    model = json.loads(golden_tokenizer().backend.to_str())["model"]
    vocab = {token: id_ for token, id_ in model["vocab"].items() if token not in CONTROL}
    merges = [tuple(merge) for merge in model["merges"]]
    first = max(vocab.values()) + 1
    added = {
        first + number: AddedToken(token, special=token in CONTROL, normalized=False)
        for number, token in enumerate((*CONTROL, *OTHERS))
    }
    return byte_level_bpe(vocab, merges, pre="qwen2", added=added)


def smollm2() -> RustTokenizer:
    from qwen_aot.exporter.checkpoint.open import open_checkpoint

    path = smollm2_path()
    assert path is not None
    with open_checkpoint(path) as checkpoint:
        return RustTokenizer.from_str(checkpoint.tokenizer.files["tokenizer.json"])


class Compiled:
    """A template and a tokenizer: the files for the C reader, and the Python runtime."""

    def __init__(self, folder: Path, backend: RustTokenizer, template: str, **config: Any) -> None:
        values = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": template, **config}
        tokenizer = Tokenizer(backend, values, vocab_size=VOCAB)
        self.encoder = ChatEncoder.from_tokenizer(tokenizer)
        self.template = folder / "chat.qtpl"
        self.template.write_bytes(compile_chat(tokenizer))

    def render(self, messages: Sequence[Sequence[str]], thinking: int = -1) -> str | None:
        """Jinja's text; None where it refuses."""
        try:
            return self.encoder.template.render(objects(messages), variables=variables(thinking))
        except GenerationError:
            return None

    def encode(self, messages: Sequence[Sequence[str]], thinking: int, *, allow: bool) -> list[int] | None:
        """The runtime's ids; None where it refuses."""
        try:
            return self.encoder.encode(objects(messages), variables=variables(thinking), allow_special_tokens=allow)
        except GenerationError:
            return None


def objects(messages: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def variables(thinking: int) -> dict[str, bool]:
    return {} if thinking < 0 else {"enable_thinking": bool(thinking)}


def content(chance: random.Random) -> str:
    kind = chance.random()
    if kind < 0.05:
        return ""
    pieces = [chance.choice(TAGS if chance.random() < 0.45 else PIECES) for _ in range(chance.randrange(1, 7))]
    if kind < 0.15:
        return f"<tool_response>{''.join(pieces)}</tool_response>"
    if kind < 0.25:
        return f"<think>{''.join(pieces[:3])}</think>{''.join(pieces[3:])}"
    return "".join(pieces)


def conversation(chance: random.Random) -> list[list[str]]:
    count = chance.choice((1, 1, 2, 3, 4, 5, 6, 9))
    if chance.random() < 0.5:
        roles = [chance.choice(("system", "user", "assistant")) for _ in range(count)]
    else:
        roles = [("user", "assistant")[number % 2] for number in range(count)]
        if chance.random() < 0.4:
            roles.insert(0, "system")
    return [[role, content(chance)] for role in roles]


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("chat_template")


@pytest.fixture(autouse=True)
def short_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a build proves is proven here of the C reader."""
    monkeypatch.setattr(compiled_chat, "_RENDERS", 300)
    monkeypatch.setattr(compiled_chat, "_ENCODED", 5)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compiled]:
    backend = qwen_like()

    @functools.cache
    def make(name: str) -> Compiled:
        return Compiled(tmp_path_factory.mktemp(name), backend, TEMPLATES[name])

    return make


@pytest.fixture(scope="module")
def qtok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.qtok"
    path.write_bytes(compile_tokenizer(qwen_like().to_str(), vocab_size=VOCAB))
    return path


def thinking_of(name: str, chance: random.Random) -> int:
    return chance.randrange(-1, 2) if name in WITH_THINKING else -1


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_the_text_that_jinja_makes_of_it(
    name: str, program: Path, compiled: Callable[[str], Compiled]
) -> None:
    chance = random.Random(name)
    asked = [(conversation(chance), thinking_of(name, chance)) for _ in range(400)]
    expected = [compiled(name).render(messages, thinking) for messages, thinking in asked]
    found = ask(
        program,
        [
            {"template": str(compiled(name).template), "messages": messages, "thinking": thinking}
            for messages, thinking in asked
        ],
    )
    for (messages, thinking), text, answer in zip(asked, expected, found, strict=True):
        wanted = {"status": UNSUPPORTED} if text is None else {"text": f"before:{text}"}
        assert {key: answer[key] for key in answer if key != "message"} == wanted, (messages, thinking)
    assert sum(text is not None for text in expected) > 100


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_the_ids_that_the_runtime_makes_of_it(
    name: str, program: Path, compiled: Callable[[str], Compiled], qtok: Path
) -> None:
    compare_ids(program, compiled(name), qtok, name, 150)


@pytest.mark.skipif(smollm2_path() is None, reason="needs the GGUF file of SmolLM2 in models/")
def test_so_it_is_with_a_real_tokenizer(program: Path, tmp_path: Path) -> None:
    backend = smollm2()
    qtok = tmp_path / "tokenizer.qtok"
    qtok.write_bytes(compile_tokenizer(backend.to_str(), vocab_size=VOCAB))
    compare_ids(program, Compiled(tmp_path, backend, PUBLISHED["smollm2"]), qtok, "smollm2", 400)


def compare_ids(program: Path, compiled: Compiled, qtok: Path, name: str, count: int) -> None:
    chance = random.Random(f"{name} ids")
    asked = [(conversation(chance), thinking_of(name, chance), chance.random() < 0.2) for _ in range(count)]
    found = ask(
        program,
        [
            {"template": str(compiled.template), "tokenizer": str(qtok), "encode": True}
            | {"messages": messages, "thinking": thinking, "allow": allow}
            for messages, thinking, allow in asked
        ],
    )
    with_control = 0
    for (messages, thinking, allow), answer in zip(asked, found, strict=True):
        expected = compiled.encode(messages, thinking, allow=allow)
        if expected is None:
            assert answer["status"] in (UNSUPPORTED, INVALID_ARGUMENT), (messages, answer)
            continue
        assert answer.get("ids") == expected, (messages, thinking, allow, answer.get("message"))
        if with_control <= count // 10:
            with_control += expected != compiled.encode(messages, thinking, allow=not allow)
    assert with_control > count // 10  # else nothing was told from nothing


def test_control_tokens_that_the_configuration_names_are_the_others(program: Path, qtok: Path, tmp_path: Path) -> None:
    compiled = Compiled(tmp_path, qwen_like(), CHATML, chat_control_tokens=["<|not_used|>", "<tool_call>"])
    compare_ids(program, compiled, qtok, "chatml", 150)


def test_a_text_on_which_the_template_acts_is_no_plain_text(
    program: Path, compiled: Callable[[str], Compiled], qtok: Path
) -> None:
    messages = [["user", "a"], ["assistant", "<think>b</think>c"], ["user", "<tool_response>d</tool_response>"]]
    request = {"template": str(compiled("qwen3-whole").template), "tokenizer": str(qtok), "encode": True}
    refused, allowed = ask(program, [request | {"messages": messages, "allow": allow} for allow in (False, True)])
    assert refused["status"] == INVALID_ARGUMENT
    assert "acts on '<tool_response>' in a text, so it is no plain text" in refused["message"]
    assert allowed["ids"] == compiled("qwen3-whole").encode(messages, -1, allow=True)
    with pytest.raises(GenerationError, match=r"acts on .*<tool_response>.* in a text, so it is no plain text"):
        compiled("qwen3-whole").encoder.encode(objects(messages))


GOLDEN = [
    case
    for case in json.loads((Path(__file__).parents[2] / "golden/chat.json").read_text(encoding="utf-8"))["cases"]
    if case["add_generation_prompt"] and not case.get("tools") and not case.get("variables")
]


def test_the_golden_cases(program: Path, tmp_path: Path) -> None:
    """Those that end with the opening of an answer, as all of this library's do; the others' templates are refused."""
    rendered, refused = 0, 0
    for number, case in enumerate(GOLDEN):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            compiled = Compiled(folder, qwen_like(), case["template"], **case["special_tokens"])
        except ChatNotCompiledError:
            refused += 1
            continue
        messages = [[message["role"], message["content"]] for message in case["messages"]]
        (answer,) = ask(program, [{"template": str(compiled.template), "messages": messages}])
        assert answer == {"text": f"before:{case['text']}"}
        rendered += 1
    assert (rendered, refused) == (3, len(GOLDEN) - 3)


def test_what_a_table_has_no_answer_for(program: Path, compiled: Callable[[str], Compiled]) -> None:
    def refusal(name: str, messages: list[list[str]], thinking: int = -1) -> tuple[int, str]:
        request = {"template": str(compiled(name).template), "messages": messages, "thinking": thinking}
        (answer,) = ask(program, [request])
        return answer["status"], answer["message"]

    assert refusal("chatml", []) == (
        INVALID_ARGUMENT,
        "the conversation has no messages; add one of the user's",
    )
    status, message = refusal("qwen3", [["user", "a"], ["tool", "b"]])
    assert status == UNSUPPORTED
    assert message.startswith(
        "message 1 has the role 'tool'; the compiled chat template takes system, user and assistant"
    )
    status, message = refusal("mistral", [["user", "a"], ["user", "b"]])
    assert status == UNSUPPORTED
    assert message.startswith("the bundle's chat template refuses this order of roles")
    status, message = refusal("chatml", [["user", "a"]], 1)
    assert status == UNSUPPORTED
    assert message.startswith("the bundle's chat template reads no enable_thinking")
    assert refusal("qwen3", [["user", "a"]], 2)[0] == INVALID_ARGUMENT


@pytest.mark.parametrize("how", ["flips", "truncations"])
def test_a_damaged_file_is_refused_by_name(how: str, program: Path, compiled: Callable[[str], Compiled]) -> None:
    path = compiled("alpaca").template
    (answer,) = ask(program, [{"template": str(path), "damage": how}])
    assert answer["opened"] == 0
    assert answer["refused"] == path.stat().st_size * (8 if how == "flips" else 1)


def test_numbers_that_a_checksum_covers_are_checked_all_the_same(
    program: Path, compiled: Callable[[str], Compiled], qtok: Path
) -> None:
    request = {"template": str(compiled("qwen3").template), "tokenizer": str(qtok), "damage": "rewritten"}
    (answer,) = ask(program, [request])
    assert answer["opened"] > 100  # texts, and literals in place of others
    assert answer["refused"] > 10_000
    assert {message.removeprefix("chat.qtpl is damaged: ").partition(";")[0] for message in answer["messages"]} >= {
        "it doesn't begin as a compiled chat template does",
        "it hasn't the size that it states",
        "it has a count that can't be",
        "its tables aren't as long as it is",
        "its control tokens aren't in order",
        "a control token's text isn't in it",
        "a role's name isn't in it",
        "a literal's pieces aren't in it",
        "a literal's text isn't in it",
        "a number of a literal or rule is beyond them",
        "it lacks what stands around thoughts",
    }


@pytest.mark.parametrize(("bytes_", "status"), [(1000, 0), (8 << 20, BUNDLE)])
def test_texts_that_pieces_share_are_bounded(
    bytes_: int, status: int, program: Path, compiled: Callable[[str], Compiled], tmp_path: Path
) -> None:
    """Else each piece of a file could be all of its texts: days to check, and a literal larger than memory."""
    content = bytearray(compiled("chatml").template.read_bytes())
    controls, roles, literals, pieces, _, text_bytes = struct.unpack_from("<6I", content, 24)
    first = 24 + 4 * (10 + 4 * controls + 3 * roles + 2 * literals)
    plain = [at for at in range(first, first + 12 * pieces, 12) if content[at + 8 : at + 12] == b"\xff" * 4]
    assert len(plain) > 2
    for at in plain:
        struct.pack_into("<2I", content, at, text_bytes, bytes_)
    content += b"x" * bytes_
    struct.pack_into("<I", content, 24 + 4 * 5, text_bytes + bytes_)
    struct.pack_into("<I", content, 12, len(content))
    struct.pack_into("<I", content, 16, zlib.crc32(content[24:]))
    (tmp_path / "chat.qtpl").write_bytes(content)
    (answer,) = ask(program, [{"template": str(tmp_path / "chat.qtpl"), "messages": [["user", "a"]], "thinking": -1}])
    assert answer.get("status", 0) == status, answer
    assert (status == 0) == (answer.get("text", "").count("x" * bytes_) > 0)


def test_a_file_of_another_version_says_so(program: Path, compiled: Callable[[str], Compiled], tmp_path: Path) -> None:
    content = bytearray(compiled("chatml").template.read_bytes())
    content[8] = 2
    (tmp_path / "chat.qtpl").write_bytes(content)
    (answer,) = ask(program, [{"template": str(tmp_path / "chat.qtpl")}])
    assert answer["status"] == BUNDLE
    assert answer["message"].startswith(
        "chat.qtpl is of version 2; this library reads version 1: build the bundle again"
    )
