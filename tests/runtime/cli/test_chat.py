"""`chat`: a scripted conversation, and what Ctrl-C does in a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_aot.errors import BundleError
from qwen_aot.runtime.cli import chat
from tests.runtime.cli.conftest import Run

ROOT = Path(__file__).parents[3]
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


def test_help_and_unknown_commands(run: Run, bundle: Path) -> None:
    result = run("chat", bundle, input="/help\n/dance\n/save\n/save /no/such/folder/x\n")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in chat.COMMANDS)
    assert "there is no command /dance" in result.stdout
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
    encode = ChatEncoder.encode

    def remember(self: ChatEncoder, *arguments: object, **given: object) -> list[int]:
        seen.append(given["allow_special_tokens"])
        return encode(self, *arguments, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(ChatEncoder, "encode", remember)
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


class Terminal:
    """`chat` in a pseudo terminal, as a user sits at it.

    Attributes:
        seen: everything that the terminal has shown.
    """

    def __init__(self, *arguments: str) -> None:
        self._parent, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qwen_aot", "chat", *arguments],
            cwd=ROOT,
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
        )
        os.close(child)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._parent, text.encode())

    def read(self, seconds: float) -> None:
        if select.select([self._parent], [], [], seconds)[0]:
            self.seen += os.read(self._parent, 65536).decode(errors="replace")

    def read_all(self) -> None:
        """Reads until nothing has come for a second."""
        seen = -1
        while seen != len(self.seen):
            seen = len(self.seen)
            self.read(1)

    def read_until(self, mark: str) -> None:
        deadline = time.monotonic() + 40
        while mark not in self.seen and time.monotonic() < deadline:
            self.read(0.5)
        assert mark in self.seen, self.seen[-500:]

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._parent)


@pytest.mark.timeout(60)
def test_ctrl_c_stops_the_answer_and_not_the_program(bundle: Path) -> None:
    with Terminal(str(bundle), "--ignore-eos", "--max-new-tokens", "100000") as terminal:
        terminal.read_until("> ")
        before = len(terminal.seen)
        terminal.type("Hello\n")
        while len(terminal.seen) < before + 20:  # some of the answer is there
            terminal.read(40)
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.read_until("ended by")
        terminal.type("/exit\n")
        assert terminal.process.wait(20) == 0
    assert "ended by cancelled" in terminal.seen or "ended by length" in terminal.seen


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_the_prompt_stands_when_a_line_of_the_history_is_shown(
    bundle: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", kind)
    with Terminal(str(bundle), *map(str, SHORT)) as terminal:
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
    assert "a long line of text" in drawn
    assert on_screen("> ", drawn) == "> /help"


def on_screen(line: str, drawn: str) -> str:
    """What a terminal's line shows after some output: text, colours, moves and erasures, as readline writes them.

    Where TERM names no terminal, readline draws the whole line again, prompt and its colour included.
    """
    cells, at = list(line), len(line)
    for part in re.findall(r"\x1b\[([\d;]*)([A-Za-z])|(\x1b.|[\x00-\x1f])|(.)", drawn):
        count, letter, control, character = part
        if letter == "K":
            del cells[at:]
        elif letter == "P":
            del cells[at : at + int(count or 1)]
        elif letter == "C":
            at += int(count or 1)
        elif control == "\b":
            at -= 1
        elif control == "\r":
            at = 0
        elif character:
            cells[at : at + 1] = character
            at += 1
    return "".join(cells).rstrip()


@pytest.mark.timeout(60)
def test_the_loading_line_is_gone_when_the_user_types(bundle: Path) -> None:
    with Terminal(str(bundle), *map(str, SHORT)) as terminal:
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

    def interrupts_then_types(console: object, prompt: str) -> str:
        monkeypatch.setattr("rich.console.Console.input", lambda console, prompt: "Hello")
        signal.raise_signal(signal.SIGINT)
        return ""

    monkeypatch.setattr("rich.console.Console.input", interrupts_then_types)
    monkeypatch.setattr("qwen_aot.runtime.generation.chat.Chat.send", answers_badly)
    result = run("chat", bundle)
    assert (result.exit_code, result.stderr) == (1, "error: the file is damaged\n")
