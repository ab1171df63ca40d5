"""`chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.cli.command import VerbCommand, option
from qwen_aot.runtime.cli.console import count, is_terminal, put_answer, show_logs, stdout
from qwen_aot.runtime.cli.generate import speeds
from qwen_aot.runtime.cli.opening import open_generator
from qwen_aot.runtime.cli.options import (
    CONTEXT,
    allow_bundle_code_option,
    allow_special_tokens_option,
    bundle_argument,
    generation_config,
    generation_options,
    kernels_option,
    no_speculate_option,
    require_generation,
    threads_option,
)
from qwen_aot.runtime.cli.tables import print_facts, say
from qwen_aot.runtime.cli.visible import visible, visible_line
from qwen_aot.whole_file import write_whole

if TYPE_CHECKING:
    from qwen_aot.runtime.generation.config import GenerationConfig
    from qwen_aot.runtime.generation.generator import Generator
    from qwen_aot.runtime.generation.request import Completion
    from qwen_aot.runtime.vision.pictures import Picture

COMMANDS = {
    "/help": "these lines",
    "/clear": "forget the conversation",
    "/image FILE": "put a picture in front of the next message (again for more)",
    "/system TEXT": "set the system prompt and start anew (without TEXT: the template's own)",
    "/save FILE": "write the conversation as JSON",
    "/exit": "leave (also Ctrl-D)",
}
OTHER_WORDS = {  # what other programs call them
    "/?": "/help",
    "/bye": "/exit",
    "/new": "/clear",
    "/q": "/exit",
    "/quit": "/exit",
    "/reset": "/clear",
}
PASTE_SECONDS = 0.02  # in which a terminal hands over the next line of a pasted text
SIMILAR = 0.75  # of difflib: /hlep is meant for /help, and /etc for no command
MULTILINE_MARK = '"""'


@click.command("chat", cls=VerbCommand, context_settings=CONTEXT)
@bundle_argument
@option("--system", help="System prompt.  [default: the chat template's]", group="Conversation")
@allow_special_tokens_option
@generation_options
@threads_option
@kernels_option
@allow_bundle_code_option
@no_speculate_option
def command(
    bundle: Path,
    system: str | None,
    allow_special_tokens: bool,
    threads: int | None,
    kernels: str | None,
    allow_bundle_code: bool,
    speculate: bool,
    **settings: Any,
) -> None:
    """Talk with a bundle in the terminal.

    \b
    Examples:
      qwen-aot chat ./bundle
      qwen-aot chat ./bundle --system "Answer in one sentence." --temperature 0.7

    Ctrl-C stops an answer, Ctrl-D leaves. Pasted text of several lines is one message; so is what begins with three
    quotes, until the closing three.
    """
    show_logs()
    require_generation(settings)
    console = stdout()
    opening = open_generator(
        bundle, threads=threads, kernels=kernels, allow_bundle_code=allow_bundle_code, speculate=speculate
    )
    with opening as generator:
        config = generation_config(generator.defaults, settings)
        conversation = Conversation(generator, config, system, console, allow_special_tokens=allow_special_tokens)
        name = visible_line(generator.engine.manifest.model.name)
        say(console, Text.assemble((name, "bold"), " - /help for commands, Ctrl-D to leave"))
        for text in Keyboard(console):
            if not conversation.take(text):
                break


def command_of(text: str) -> tuple[str, str] | None:
    """The command that a line is, and what follows it; None: a message, as everything but a command's word is."""
    line = text.rstrip()
    word, _, rest = line.partition(" ")
    return (word.lower(), rest.strip()) if word.lower() in _WORDS and "\n" not in line else None


def meant_command(text: str) -> str | None:
    """The command that a line is meant for by its first word, which isn't one; None: it is a message."""
    word = text.rstrip().partition(" ")[0].lower()
    if "\n" in text.rstrip() or not re.fullmatch(r"/([a-z]+|\?)", word):
        return None
    return OTHER_WORDS.get(word) or next(iter(difflib.get_close_matches(word, _WORDS, 1, SIMILAR)), None)


_WORDS = tuple(name.partition(" ")[0] for name in COMMANDS)
_WORDS_ALONE = tuple(name for name in COMMANDS if " " not in name)


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
        self._images: list[Picture] = []  # of the next message
        self._start(system)

    def take(self, text: str) -> bool:
        """Runs a command or answers a message. False: leave."""
        command = command_of(text)
        if command is None:
            meant = meant_command(text)
            if meant is None:
                self._answer(text.strip())
            else:
                word = text.split()[0]
                self._note(f"there is no command {word}; did you mean {meant}? A message may begin so after a blank")
            return True
        word, rest = command
        if word in _WORDS_ALONE and rest:
            self._note(f"nothing goes behind {word}; a message may begin so after a blank")
        elif word == "/exit":
            return False
        elif word == "/clear":
            self._chat.reset()
            self._images = []
            self._note("the conversation is forgotten")
        elif word == "/system":
            self._start(rest or None)
            self._note("a new conversation")
        elif word == "/save":
            self._save(rest)
        elif word == "/image":
            self._add_image(rest)
        else:
            print_facts(self._console, COMMANDS.items())
        return True

    def _start(self, system: str | None) -> None:
        from qwen_aot.runtime.generation.chat import Chat

        self._chat = Chat(self._generator, self._config, system=system, allow_special_tokens=self._allow_special_tokens)

    def _answer(self, text: str) -> None:
        from qwen_aot.runtime.generation.request import Completion

        cancel = threading.Event()
        try:
            with _ctrl_c_sets(cancel):
                for event in self._chat.send(text, images=self._images, cancel=cancel):
                    if isinstance(event, Completion):
                        put_answer(f"{event.last_text}\n")
                        self._finish(event)
                    else:
                        put_answer(event.text)
            self._images = []
        except GenerationError as error:  # the conversation is as it was before
            self._note(str(error))

    def _add_image(self, name: str) -> None:
        from qwen_aot.runtime.vision.pictures import open_picture

        if not name:
            self._note("give a file: /image cat.jpg")
            return
        try:
            if not self._generator.takes_images:
                model = self._generator.engine.manifest.model.name
                raise GenerationError(f"{model} takes no images (a bundle of Qwen-VL does)")
            picture = open_picture(Path(name).expanduser())
            self._images.append(picture.reduced(self._generator.image_encoder.image_size))
        except GenerationError as error:
            self._note(str(error))
            return
        width, height = picture.size
        self._note(f"picture {len(self._images)} of the next message: {name}, {width} x {height}")

    def _finish(self, completion: Completion) -> None:
        _, decode = speeds(completion)
        speed = f", {decode:.1f} tokens/s" if decode else ""
        self._note(f"[{count(len(completion.token_ids), 'token')}{speed}, ended by {completion.finish_reason}]")

    def _save(self, name: str) -> None:
        if not name:
            self._note("give a file: /save chat.json")
            return
        path = Path(name).expanduser()
        try:
            if path.exists() and not (path.is_file() and _is_conversation(path)):
                self._note(f"{name} is there and is no saved conversation; give another name")
                return
            messages = [{**message, "content": _saved(message["content"])} for message in self._chat.messages]
            text = json.dumps(messages, indent=2, ensure_ascii=False)
            write_whole(path, f"{text}\n".encode())
        except OSError as error:
            self._note(f"{name} can't be written: {error.strerror}")
        else:
            self._note(f"{count(len(self._chat.messages), 'message')} in {name}")

    def _note(self, text: str) -> None:
        say(self._console, Text(visible(text), style="dim"))


def _saved(content: Any) -> Any:
    """A message's content as /save writes it: of a picture, where it came from."""
    if isinstance(content, str):
        return content
    return [{**part, "image": part["image"].name} if part["type"] == "image" else part for part in content]


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


class Keyboard:
    """What the user types, message by message, until Ctrl-D; Ctrl-C drops a line.

    Text that is pasted is one message, whatever lines it has: GNU readline tells it from typed text by the marks that
    a terminal sets around it (bracketed paste). Without them (another readline, TERM=dumb), lines that are there
    already when one is read came together with it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._has_user = is_terminal(sys.stdin) and is_terminal(sys.stdout)
        self._has_marks = self._has_user and _set_up_readline(with_marks=not console.is_dumb_terminal)

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                with _ctrl_c_raises():
                    text = self._read()
            except UnicodeDecodeError as error:
                raise click.UsageError(f"standard input isn't UTF-8 ({error.reason} at byte {error.start})") from None
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print()
                continue
            if text.strip():
                yield text

    def _read(self) -> str:
        lines = [self._ask("> ")]
        while self._has_user and not self._has_marks and select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
            lines.append(self._ask(". "))
        text = "\n".join(lines)
        if text.lstrip().startswith(MULTILINE_MARK):
            return self._multiline(text.lstrip().removeprefix(MULTILINE_MARK))
        return text

    def _multiline(self, line: str) -> str:
        lines = []
        while MULTILINE_MARK not in line:
            lines.append(line)
            line = self._ask(". ")
        return "\n".join([*lines, line.partition(MULTILINE_MARK)[0]])

    def _ask(self, prompt: str) -> str:
        """A line. Readline is given the prompt: one that it didn't print it erases when it draws a line anew."""
        if not self._has_user:
            return input()
        if self._console.color_system is None or self._console.no_color:
            return input(prompt)
        bold_green, reset = "\x1b[1;32m", "\x1b[0m"
        return input(f"\x01{bold_green}\x02{prompt}\x01{reset}\x02")  # between 1 and 2: takes no room on the line


def _set_up_readline(*, with_marks: bool) -> bool:
    """Gives `input` line editing and history; whether it knows pasted text by its marks from then on."""
    try:
        import readline
    except ImportError:
        return False
    if not with_marks or "libedit" in (readline.__doc__ or ""):
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off
    return True
