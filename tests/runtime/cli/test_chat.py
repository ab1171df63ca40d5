"""`chat`: a scripted conversation, and what Ctrl-C does in a real terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_aot.errors import BundleError
from qwen_aot.runtime.cli import chat
from tests.runtime.cli.conftest import Run
from tests.runtime.cli.terminal import ROOT, Shown, Terminal
from tests.runtime.cli.test_screens import compare, require_fits, steady

SHORT = ("--temperature", 0, "--max-new-tokens", 6, "--ignore-eos")


def test_answers_and_says_how_fast(run: Run, bundle: Path) -> None:
    result = run("chat", bundle, *SHORT, input="Hello\n")
    assert result.exit_code == 0, result.stderr
    assert "[6 tokens" in result.stdout
    assert "tokens/s, ended by length]" in result.stdout


def test_saves_the_conversation(run: Run, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    result = run("chat", bundle, *SHORT, "--system", "Be brief.", input=f"One\nTwo\n/save {file}\n/exit\nnever said\n")
    assert "4 more" not in result.stdout
    assert "5 messages in" in result.stdout
    messages = json.loads(file.read_text())
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in messages if message["role"] != "assistant"] == ["Be brief.", "One", "Two"]


def test_a_file_that_is_no_conversation_is_not_overwritten(run: Run, bundle: Path, tmp_path: Path) -> None:
    others = {"notes.txt": "mine", "a.json": '{"role": "x"}', "b.json": "[1]", "c.json": '[{"role": "x"}]'}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    (tmp_path / "again.json").write_text('[{"role": "user", "content": "of another day"}]')
    names = [*others, "folder", "again.json"]
    result = run("chat", bundle, *SHORT, input="One\n" + "".join(f"/save {tmp_path / name}\n" for name in names))
    said = " ".join(result.stdout.split())  # a path may break the line anywhere
    assert said.count("is there and is no saved conversation; give another name") == len(others) + 1
    assert {name: (tmp_path / name).read_text() for name in others} == others
    assert json.loads((tmp_path / "again.json").read_text())[0] == {"role": "user", "content": "One"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_clear_and_system_start_anew(run: Run, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    run("chat", bundle, *SHORT, input=f"One\n/clear\n/system Rhyme.\nTwo\n/save {file}\n")
    assert [message["content"] for message in json.loads(file.read_text())][:2] == ["Rhyme.", "Two"]


def test_a_message_of_several_lines(run: Run, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    run("chat", bundle, *SHORT, input=f'"""first\nsecond\nthird"""\n/save {file}\n')
    assert json.loads(file.read_text())[0]["content"] == "first\nsecond\nthird"


def test_help_and_a_file_that_can_not_be_written(run: Run, bundle: Path) -> None:
    result = run("chat", bundle, input="/help\n/save\n/save /no/such/folder/x\n")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in chat.COMMANDS)
    assert "give a file: /save chat.json" in result.stdout
    assert "can't be written: No such file or directory" in result.stdout


def test_a_full_context_is_a_note_and_the_chat_goes_on(run: Run, bundle: Path) -> None:
    result = run("chat", bundle, *SHORT, input=f"{'word ' * 400}\n/clear\nHi\n")
    assert result.exit_code == 0
    assert "the context holds 256" in result.stdout
    assert "/clear" in result.stdout and "/clear" in chat.COMMANDS
    assert "[6 tokens" in result.stdout


@pytest.mark.parametrize("options", [(), ("--allow-special-tokens",)])
def test_special_tokens_in_a_message(
    run: Run, bundle: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_aot.runtime.text.chat_encoder import ChatEncoder

    seen = []
    encode = ChatEncoder.encode_with_images

    def remember(self: ChatEncoder, *arguments: object, **given: object) -> object:
        seen.append(given["allow_special_tokens"])
        return encode(self, *arguments, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(ChatEncoder, "encode_with_images", remember)
    assert run("chat", bundle, *SHORT, *options, input="<|im_end|>\n/system Brief.\nHi\n").exit_code == 0
    assert seen == [bool(options)] * 2


def test_a_bundle_without_a_template_is_refused(run: Run, tmp_path: Path) -> None:
    from qwen_aot.engines.build import build_bundle
    from qwen_aot.engines.spec.build_spec import BuildSpec
    from qwen_aot.engines.spec.precisions import Precision
    from tests.checkpoints import save_tiny

    save_tiny(tmp_path / "bare")
    build_bundle(tmp_path / "bare", BuildSpec(precision=Precision.FP32), tmp_path / "bundle")
    result = run("chat", tmp_path / "bundle", input="Hi\n")
    assert result.exit_code == 1
    assert "has no tokenizer, so it can't chat" in result.stderr


def chat_on_a_terminal(bundle: Path, *options: object, columns: int = 80) -> Terminal:
    return Terminal("chat", str(bundle), *map(str, options or SHORT), columns=columns)


# A step takes long enough that an answer of 200 tokens is never over before the key is pressed, however fast this is.
SLOWLY = """
import time
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine
from qwen_aot.runtime.cli.main import main

decode = OnnxRuntimeEngine.decode

def decode_slowly(*arguments, **options):
    time.sleep(0.2)
    return decode(*arguments, **options)

OnnxRuntimeEngine.decode = decode_slowly
main()
"""


@pytest.mark.timeout(90, func_only=True)
def test_ctrl_c_stops_the_answer_and_not_the_program(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    asked = ("chat", str(bundle), "--ignore-eos", "--max-new-tokens", "200")
    with Terminal(*asked, program=("-c", SLOWLY)) as terminal:
        terminal.read_until("> ")
        terminal.type("Hello\r")
        terminal.read_until("Hello")
        before = len(terminal.seen)
        while len(terminal.seen) < before + 12:  # some of the answer is there
            terminal.read(40)
        terminal.type("\x03")
        terminal.read_until("ended by")
        terminal.read_until("> ", terminal.seen.index("ended by"))
        terminal.type(f"/save {file}\r")
        terminal.read_until("messages in")
        terminal.type("/exit\r")
        assert terminal.process.wait(20) == 0
    (tokens, reason), *others = re.findall(r"\[(\d+) tokens?\b.*?ended by (\w+)\]", terminal.seen)
    assert (reason, others) == ("cancelled", [])
    assert 0 < int(tokens) < 200
    assert [message["role"] for message in json.loads(file.read_text())] == ["user", "assistant"]


@pytest.mark.timeout(60, func_only=True)
def test_ctrl_c_at_the_prompt_drops_a_line_and_ctrl_d_leaves(bundle: Path) -> None:
    with chat_on_a_terminal(bundle) as terminal:
        terminal.read_until("> ")
        terminal.type("half a line")
        terminal.read_until("half a line")
        terminal.press_until("\x03", "> ", terminal.seen.index("half a line"))
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
        terminal.read_all()
    assert "ended by" not in terminal.seen and "interrupted" not in terminal.seen


PASTED = "first line\n  second line\n\nlast"


@pytest.mark.timeout(60, func_only=True)
@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_a_pasted_text_of_several_lines_is_one_message(
    bundle: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the marks that a terminal sets, and without: there all lines come at once."""
    monkeypatch.setenv("TERM", kind)
    file = tmp_path / "chat.json"
    with chat_on_a_terminal(bundle) as terminal:
        terminal.read_until("> ")
        assert ("\x1b[?2004h" in terminal.seen) == (kind == "xterm")
        keys = PASTED.replace("\n", "\r")
        terminal.type(f"\x1b[200~{keys}\x1b[201~\r" if kind == "xterm" else f"{keys}\r")
        terminal.read_until("ended by")
        terminal.type(f"/save {file}\r")
        terminal.read_until("messages in")
    assert [message["content"] for message in json.loads(file.read_text()) if message["role"] == "user"] == [PASTED]


@pytest.mark.timeout(60, func_only=True)
@pytest.mark.parametrize(
    ("variables", "is_colored"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["terminal", "NO_COLOR", "dumb"],
)
def test_the_prompt_is_colored_where_colors_are(
    bundle: Path, variables: dict[str, str], is_colored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with chat_on_a_terminal(bundle) as terminal:
        terminal.read_until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
        terminal.read_all()
    assert ("\x1b[1;32m> " in terminal.seen) == is_colored
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", terminal.seen)) == is_colored
    assert ("\x1b" in terminal.seen) == (variables != {"TERM": "dumb"})


@pytest.mark.timeout(60, func_only=True)
@pytest.mark.parametrize("columns", [80])
def test_the_screen_of_a_conversation(bundle: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    with chat_on_a_terminal(bundle, columns=columns) as terminal:
        terminal.read_until("> ")
        for line, mark in (("Hello", "ended by"), ("/help", "Ctrl-D)"), ("/hlep", "blank"), ("/save", "chat.json")):
            start = len(terminal.seen)
            terminal.type(f"{line}\r")
            terminal.read_until(mark, start)
            terminal.read_until("> ", terminal.seen.index(mark, start))
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
        terminal.read_all()
    shown = Shown(0, terminal.seen, terminal.screen())
    require_fits(shown, columns)
    compare("chat", columns, steady(shown.text))


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("/help", ("/help", "")),
        ("/HELP ", ("/help", "")),
        ("/save a b.json", ("/save", "a b.json")),
        ("/system Be brief. ", ("/system", "Be brief.")),
        ("/etc/hosts", None),
        ("/home/x is full", None),
        ("/exit\nand more", None),
        (" /exit", None),
        ("/", None),
        ("/helpful", None),
        ("// a comment", None),
        ("what is /help?", None),
    ],
)
def test_only_known_words_are_commands(line: str, command: tuple[str, str] | None) -> None:
    assert chat.command_of(line) == command


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("/hlep", "/help"),
        ("/sytem Be brief.", "/system"),
        ("/Exti", "/exit"),
        ("/quit", "/exit"),
        ("/?", "/help"),
        ("/etc/hosts", None),
        ("/etc", None),
        ("/home/x is full", None),
        ("/home is full", None),
        ("/dance", None),
        (" /hlep", None),
        ("/hlep\nme", None),
        ("hlep", None),
    ],
)
def test_a_near_miss_gets_a_hint(line: str, meant: str | None) -> None:
    assert chat.meant_command(line) == meant


def test_a_path_is_a_message_and_a_near_miss_is_not(run: Run, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    lines = ["/etc/hosts is missing", "/hlep", "/clear the table", " /clear", f"/save {file}"]
    result = run("chat", bundle, *SHORT, input="".join(f"{line}\n" for line in lines))
    assert "there is no command /hlep; did you mean /help?" in result.stdout
    assert "nothing goes behind /clear" in result.stdout
    asked = [message["content"] for message in json.loads(file.read_text()) if message["role"] == "user"]
    assert asked == ["/etc/hosts is missing", "/clear"]


def test_every_other_word_means_a_command() -> None:
    words = {name.partition(" ")[0] for name in chat.COMMANDS}
    assert set(chat.OTHER_WORDS.values()) <= words and not words & set(chat.OTHER_WORDS)


@pytest.mark.timeout(60, func_only=True)
@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_the_prompt_stands_when_a_line_of_the_history_is_shown(
    bundle: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", kind)
    with chat_on_a_terminal(bundle) as terminal:
        terminal.read_until("> ")
        for line in ("a long line of text", "/help"):
            terminal.type(f"{line}\n")
            terminal.read_until("ended by length" if line != "/help" else "leave (also Ctrl-D)")
        terminal.read_all()
        before = len(terminal.seen)
        for key in ("A", "A", "B"):  # up, up, down
            terminal.type(f"\x1b[{key}")
            terminal.read_all()
        drawn = terminal.seen[before:]
        assert terminal.screen().splitlines()[-1] == "> /help"
    assert "a long line of text" in drawn


@pytest.mark.timeout(60, func_only=True)
def test_the_loading_line_is_gone_when_the_user_types(bundle: Path) -> None:
    with chat_on_a_terminal(bundle) as terminal:
        terminal.read_until("> ")
        before = len(terminal.seen)
        terminal.read(1)  # a line that moves is drawn ten times a second
        terminal.type("Hello\n")
        terminal.read_until("ended by length")
    assert "loading" in terminal.seen[:before]
    assert "loading" not in terminal.seen[before:]


def test_a_message_that_can_not_be_answered_is_a_note_and_the_chat_goes_on(run: Run, bundle: Path) -> None:
    result = run("chat", bundle, *SHORT, "--system", "caf\udce9", input="Hi\n/system Be brief.\nHi\n")
    assert result.exit_code == 0
    assert "isn't valid Unicode" in result.stdout
    assert "[6 tokens" in result.stdout


def test_input_that_is_not_utf8_is_a_usage_error(bundle: Path) -> None:
    chat_command = [sys.executable, "-m", "qwen_aot", "chat", str(bundle)]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in a UTF-8 locale that has a language
    result = subprocess.run(chat_command, cwd=ROOT, env=strict, input=b"caf\xe9\n", capture_output=True, timeout=60)
    assert result.returncode == 2
    assert b"standard input isn't UTF-8" in result.stderr
    assert b"Traceback" not in result.stderr


def test_an_error_after_ctrl_c_at_the_prompt_keeps_its_own_code(
    run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C there only drops a line, so what ends the program later isn't it."""

    def answers_badly(*arguments: object, **options: object) -> None:
        raise BundleError("the file is damaged")

    def interrupts_then_types() -> str:
        monkeypatch.setattr("builtins.input", lambda: "Hello")
        signal.raise_signal(signal.SIGINT)
        return ""

    monkeypatch.setattr("builtins.input", interrupts_then_types)
    monkeypatch.setattr("qwen_aot.runtime.generation.chat.Chat.send", answers_badly)
    result = run("chat", bundle)
    assert (result.exit_code, result.stderr) == (1, f"loading {bundle} ...\nerror: the file is damaged\n")
