"""`chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.cli.command import VerbCommand, option
from qwen_aot.runtime.cli.console import show_logs, stdout
from qwen_aot.runtime.cli.generate import speeds
from qwen_aot.runtime.cli.options import (
    CONTEXT,
    allow_bundle_code_option,
    allow_special_tokens_option,
    bundle_argument,
    generation_config,
    generation_options,
    threads_option,
)
from qwen_aot.whole_file import write_whole

if TYPE_CHECKING:
    from qwen_aot.runtime.generation.config import GenerationConfig
    from qwen_aot.runtime.generation.generator import Generator
    from qwen_aot.runtime.generation.request import Completion

COMMANDS = {
    "/help": "these lines",
    "/clear": "forget the conversation",
    "/system TEXT": "set the system prompt and start anew (without TEXT: the template's own)",
    "/save FILE": "write the conversation as JSON",
    "/exit": "leave (also Ctrl-D)",
}
MULTILINE_MARK = '"""'


@click.command("chat", cls=VerbCommand, context_settings=CONTEXT)
@bundle_argument
@option("--system", help="System prompt.  [default: the chat template's]", group="Conversation")
@allow_special_tokens_option
@generation_options
@threads_option
@allow_bundle_code_option
def command(
    bundle: Path,
    system: str | None,
    allow_special_tokens: bool,
    threads: int | None,
    allow_bundle_code: bool,
    **settings: Any,
) -> None:
    """Talk with a bundle in the terminal.

    \b
    Examples:
      qwen-aot chat ./bundle
      qwen-aot chat ./bundle --system "Answer in one sentence." --temperature 0.7 --top-p 0.8

    Ctrl-C stops an answer, Ctrl-D leaves. A line that opens with three quotes goes on until the closing three.
    """
    show_logs()
    from qwen_aot.runtime.generation.generator import Generator

    console = stdout()
    with console.status("loading"):  # it redraws itself over whatever is typed, so it ends before the conversation
        opened = Generator.open(bundle, threads=threads, allow_bundle_code=allow_bundle_code)
    with opened as generator:
        config = generation_config(generator.defaults, settings)
        conversation = Conversation(generator, config, system, console, allow_special_tokens=allow_special_tokens)
        console.print(f"[bold]{escape(generator.engine.manifest.model.name)}[/] - /help for commands, Ctrl-D to leave")
        for text in _inputs(console):
            if not conversation.take(text):
                break


class Conversation:
    """What the terminal shows of a `runtime.generation.chat.Chat`."""

    def __init__(
        self,
        generator: Generator,
        config: GenerationConfig,
        system: str | None,
        console: Console,
        *,
        allow_special_tokens: bool,
    ) -> None:
        self._generator = generator
        self._config = config
        self._console = console
        self._allow_special_tokens = allow_special_tokens
        self._start(system)

    def take(self, text: str) -> bool:
        """Runs a command or answers a message. False: leave."""
        word, _, rest = text.partition(" ")
        if not word.startswith("/"):
            self._answer(text)
        elif word == "/exit":
            return False
        elif word == "/clear":
            self._chat.reset()
            self._note("the conversation is forgotten")
        elif word == "/system":
            self._start(rest.strip() or None)
            self._note("a new conversation")
        elif word == "/save":
            self._save(rest.strip())
        else:
            if word != "/help":
                self._note(f"there is no command {word}")
            for name, help_ in COMMANDS.items():
                self._console.print(f"  [bold]{name:<14}[/] {help_}", highlight=False)
        return True

    def _start(self, system: str | None) -> None:
        from qwen_aot.runtime.generation.chat import Chat

        self._chat = Chat(self._generator, self._config, system=system, allow_special_tokens=self._allow_special_tokens)

    def _answer(self, text: str) -> None:
        from qwen_aot.runtime.generation.request import Completion

        cancel = threading.Event()
        try:
            with _ctrl_c_sets(cancel):
                for event in self._chat.send(text, cancel=cancel):
                    if isinstance(event, Completion):
                        self._console.out(event.last_text, highlight=False)
                        self._finish(event)
                    else:
                        self._console.out(event.text, end="", highlight=False)
        except GenerationError as error:  # the conversation is as it was before
            self._note(str(error))

    def _finish(self, completion: Completion) -> None:
        _, decode = speeds(completion)
        speed = f", {decode:.1f} tokens/s" if decode else ""
        self._note(f"[{len(completion.token_ids)} tokens{speed}, ended by {completion.finish_reason}]")

    def _save(self, name: str) -> None:
        if not name:
            self._note("give a file: /save chat.json")
            return
        path = Path(name).expanduser()
        try:
            if path.exists() and not (path.is_file() and _is_conversation(path)):
                self._note(f"{name} is there and is no saved conversation; give another name")
                return
            text = json.dumps([dict(message) for message in self._chat.messages], indent=2, ensure_ascii=False)
            write_whole(path, f"{text}\n".encode())
        except OSError as error:
            self._note(f"{name} can't be written: {error.strerror}")
        else:
            self._note(f"{len(self._chat.messages)} messages in {name}")

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False)


def _is_conversation(path: Path) -> bool:
    """Whether a file holds what /save writes: a list of messages."""
    try:
        messages = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(messages, list) and all(
        isinstance(message, dict) and message.keys() == {"role", "content"} for message in messages
    )


@contextlib.contextmanager
def _ctrl_c_sets(event: threading.Event) -> Iterator[None]:
    """Within it Ctrl-C ends the answer and not the program."""

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        event.set()

    with _on_ctrl_c(on_interrupt):
        yield


def _ctrl_c_raises() -> contextlib.AbstractContextManager[None]:
    """Within it Ctrl-C is a KeyboardInterrupt and nothing else: the program doesn't take it for its end."""
    return _on_ctrl_c(signal.default_int_handler)


@contextlib.contextmanager
def _on_ctrl_c(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _inputs(console: Console) -> Iterator[str]:
    """What the user types, until Ctrl-D; Ctrl-C drops a line."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for input()
    while True:
        try:
            with _ctrl_c_raises():
                text = _ask(console, "> ")
                if text.lstrip().startswith(MULTILINE_MARK):
                    text = _multiline(console, text.lstrip().removeprefix(MULTILINE_MARK))
        except UnicodeDecodeError as error:
            raise click.UsageError(f"standard input isn't UTF-8 ({error.reason} at byte {error.start})") from None
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            continue
        if text.strip():
            yield text.strip()


def _ask(console: Console, prompt: str) -> str:
    """A line of input. Readline is given the prompt: one that it didn't print it erases when it draws a line anew."""
    if not console.is_terminal:
        return console.input(prompt)
    bold_green, reset = "\x1b[1;32m", "\x1b[0m"
    return input(f"\x01{bold_green}\x02{prompt}\x01{reset}\x02")  # between 1 and 2: takes no room on the line


def _multiline(console: Console, line: str) -> str:
    lines = []
    while MULTILINE_MARK not in line:
        lines.append(line)
        line = _ask(console, ". ")
    return "\n".join([*lines, line.partition(MULTILINE_MARK)[0]])
