"""The C library from Python: signatures are read from the header, so that a test can't hold another interface."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.runtime.capi.native import SOURCES

HEADER = SOURCES / "include" / "qwen_aot.h"
TO_NUL = ctypes.c_size_t(-1).value

_SCALARS: dict[str, Any] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "double": ctypes.c_double,
    "void": None,
}
Callback = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_char), ctypes.c_size_t)


@dataclass(frozen=True)
class Function:
    """A function of the header: its name, what it returns and takes, as C types."""

    name: str
    result: str
    parameters: tuple[str, ...]


def read_header(text: str) -> tuple[list[Function], dict[str, int]]:
    """Functions and named numbers of the header."""
    code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    functions = []
    for match in re.finditer(r"QWEN_AOT_API\s+([\w\s*]+?)\b(qwen_aot_\w+)\(([^)]*)\);", code):
        parameters = [] if match[3].strip() in ("", "void") else match[3].split(",")
        types = tuple(re.sub(r"\b\w+\s*$", "", parameter).strip() for parameter in parameters)
        functions.append(Function(match[2], match[1].strip(), types))
    numbers = {name: int(value) for name, value in re.findall(r"\b(QWEN_AOT_\w+)\s*=\s*(\d+)", code)}
    return functions, numbers


def _ctype(name: str) -> Any:
    """The type of ctypes for a C type; pointers to anything are addresses, but for text that comes out."""
    if "*" in name:
        return ctypes.c_void_p
    plain = name.replace("const", "").strip()
    if plain.endswith("_callback"):
        return ctypes.c_void_p
    return _SCALARS.get(plain, ctypes.c_int32)  # statuses and enumerations


class CallError(Exception):
    """A call that failed."""

    def __init__(self, status: int, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.status = status
        self.name = name
        self.message = message


class Library:
    """The loaded library; `lib.name(...)` calls `qwen_aot_name`."""

    def __init__(self, path: Path | str) -> None:
        self.dll = ctypes.CDLL(str(path))
        functions, self.numbers = read_header(HEADER.read_text(encoding="utf-8"))
        self._checked = set()
        for function in functions:
            native = getattr(self.dll, function.name)
            native.restype = _ctype(function.result)
            native.argtypes = [_ctype(parameter) for parameter in function.parameters]
            if function.result == "qwen_aot_status" and function.parameters[-1:] == ("qwen_aot_error**",):
                self._checked.add(function.name)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        full = f"qwen_aot_{name}"
        native = getattr(self.dll, full)
        if full not in self._checked:
            return native  # type: ignore[no-any-return]

        def call(*arguments: Any) -> None:
            error = ctypes.c_void_p()
            status = native(*arguments, ctypes.byref(error))
            if status:
                raise self._failure(status, error)
            assert not error.value, f"{full} gave an error object beside OK"

        return call

    def status(self, name: str, *arguments: Any) -> int:
        """A call's bare status, without an error object."""
        return int(getattr(self.dll, f"qwen_aot_{name}")(*arguments, None))

    def number(self, name: str) -> int:
        """A named number of the header."""
        return self.numbers[f"QWEN_AOT_{name}"]

    def _failure(self, status: int, error: ctypes.c_void_p) -> CallError:
        length = ctypes.c_size_t()
        pointer = self.dll.qwen_aot_error_message(error, ctypes.byref(length))
        message = ctypes.string_at(pointer, length.value).decode()
        assert self.dll.qwen_aot_error_status(error) == status
        self.dll.qwen_aot_error_free(error)
        return CallError(status, self.text(self.dll.qwen_aot_status_name(status)), message)

    @staticmethod
    def text(pointer: int, length: int | None = None) -> str:
        """A text that came out."""
        return (ctypes.string_at(pointer) if length is None else ctypes.string_at(pointer, length)).decode()

    def given(self, name: str, *arguments: Any) -> str:
        """The text that a function of `(…, size_t* length)` gives."""
        length = ctypes.c_size_t()
        pointer = getattr(self.dll, f"qwen_aot_{name}")(*arguments, ctypes.byref(length))
        assert ctypes.string_at(pointer + length.value, 1) == b"\0"
        return self.text(pointer, length.value)


@dataclass
class Output:
    """All of one choice."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    streamed: str = ""
    streamed_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    prompt_logprobs: list[tuple[float, list[tuple[int, float]]] | None] = field(default_factory=list)
    error: str = ""


class Model:
    """An open bundle."""

    def __init__(self, library: Library, path: Path, **options: Any) -> None:
        """Options: threads, kernels, onnxruntime and cpu_kernels (paths), hash_limit, log (a list of messages)."""
        self.library = library
        self.handle = ctypes.c_void_p()
        chosen = ctypes.c_void_p()
        library.options_create(ctypes.byref(chosen))
        self._log: Any = None
        try:
            if "threads" in options:
                library.options_set_threads(chosen, options["threads"])
            if "hash_limit" in options:
                library.options_set_hash_limit(chosen, options["hash_limit"])
            if "kernels" in options:
                library.options_set_kernels(chosen, options["kernels"])
            for kind in options.keys() & {"onnxruntime", "cpu_kernels"}:
                name = str(options[kind]).encode()
                library.options_set_library(chosen, library.number(f"LIBRARY_{kind.upper()}"), name, len(name))
            if "log" in options:
                messages = options["log"]
                self._log = LogCallback(
                    lambda user, level, text, length: messages.append((level, ctypes.string_at(text, length).decode()))
                )
                library.options_set_log(chosen, ctypes.cast(self._log, ctypes.c_void_p), None)
            encoded = str(path).encode()
            library.model_open(encoded, len(encoded), chosen, ctypes.byref(self.handle))
        finally:
            library.options_free(chosen)

    def close(self) -> None:
        self.library.model_free(self.handle)
        self.handle = ctypes.c_void_p()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fact(self, name: str) -> int:
        value = ctypes.c_int64()
        self.library.model_fact(self.handle, self.library.number(f"FACT_{name}"), ctypes.byref(value))
        return value.value

    def tokenize(self, text: str, *, flags: int = 0) -> list[int]:
        data = text.encode()
        return self._ids(lambda *buffer: self.library.tokenize(self.handle, data, len(data), flags, *buffer))

    def encode(self, messages: Sequence[tuple[str, str]], *, thinking: int = -1, flags: int = 0) -> list[int]:
        conversation = self.conversation(messages, thinking=thinking, flags=flags)
        try:
            return self._ids(lambda *buffer: self.library.encode_chat(self.handle, conversation, *buffer))
        finally:
            self.library.conversation_free(conversation)

    def conversation(self, messages: Sequence[tuple[str, str]], *, thinking: int = -1, flags: int = 0) -> Any:
        handle = ctypes.c_void_p()
        self.library.conversation_create(ctypes.byref(handle))
        for role, content in messages:
            name, text = role.encode(), content.encode()
            self.library.conversation_add(handle, name, len(name), text, len(text))
        self.library.conversation_set_thinking(handle, thinking)
        self.library.conversation_set_flags(handle, flags)
        return handle

    @staticmethod
    def _ids(fill: Callable[..., None]) -> list[int]:
        count = ctypes.c_size_t()
        try:
            fill(None, 0, ctypes.byref(count))
        except CallError as failure:
            if failure.name != "BUFFER_TOO_SMALL":
                raise
        ids = (ctypes.c_int32 * count.value)()
        fill(ids, count.value, ctypes.byref(count))
        return list(ids)


class Generator:
    """Requests on a model, stepped from Python."""

    def __init__(self, model: Model) -> None:
        self.library = model.library
        self.model = model
        self.handle = ctypes.c_void_p()
        self.library.generator_create(model.handle, ctypes.byref(self.handle))

    def close(self) -> None:
        self.library.generator_free(self.handle)
        self.handle = ctypes.c_void_p()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(
        self,
        prompt: str | Sequence[int] | Sequence[tuple[str, str]],
        *,
        keep_cache: bool = False,
        cache_scope: int = 0,
        **settings: Any,
    ) -> int:
        """Queues a prompt: text, ids, or messages; settings by the names of the config's setters."""
        lib = self.library
        request, config = ctypes.c_void_p(), ctypes.c_void_p()
        lib.request_create(ctypes.byref(request))
        try:
            if isinstance(prompt, str):
                data = prompt.encode()
                lib.request_set_text(request, data, len(data))
            elif prompt and isinstance(prompt[0], tuple):
                conversation = self.model.conversation(prompt)  # type: ignore[arg-type]
                lib.request_set_conversation(request, conversation)
                lib.conversation_free(conversation)
            else:
                ids = (ctypes.c_int32 * len(prompt))(*prompt)  # type: ignore[arg-type]
                lib.request_set_ids(request, ids, len(prompt))
            if settings:
                lib.config_create(ctypes.byref(config))
                set_config(lib, config, settings)
                lib.request_set_config(request, config)
            lib.request_set_keep_cache(request, int(keep_cache))
            lib.request_set_cache_scope(request, ctypes.c_uint64(cache_scope))
            number = ctypes.c_uint64()
            lib.generator_submit(self.handle, request, ctypes.byref(number))
            return number.value
        finally:
            lib.config_free(config)
            lib.request_free(request)

    def step(self) -> Iterator[int]:
        """The events of one step."""
        count = ctypes.c_size_t()
        self.library.generator_step(self.handle, ctypes.byref(count))
        for index in range(count.value):
            yield self.library.generator_event(self.handle, index)

    def run(self) -> dict[tuple[int, int], Output]:
        """Steps until nothing is left; outputs by request and choice."""
        lib, outputs = self.library, dict[tuple[int, int], Output]()
        while not lib.generator_is_idle(self.handle):
            for event in self.step():
                key = (lib.event_request(event), lib.event_choice(event))
                output = outputs.setdefault(key, Output())
                assert not output.finish, "an event behind the completion"
                output.streamed += lib.given("event_text", event)
                if lib.event_get_type(event) == lib.number("EVENT_TOKEN"):
                    output.streamed_ids.append(lib.event_token(event))
                    continue
                read_completion(lib, event, output)
        return outputs

    def generate(self, prompt: Any, **settings: Any) -> Output:
        """One prompt, to its end."""
        number = self.submit(prompt, **settings)
        return self.run()[number, 0]


def read_completion(lib: Library, event: int, output: Output) -> None:
    """Reads all that a completion says."""
    reasons = {lib.number(f"FINISH_{name}"): name.lower() for name in ("STOP", "LENGTH", "CANCELLED", "ERROR")}
    output.finish = reasons[lib.event_finish_reason(event)]
    output.text = lib.given("event_full_text", event)
    count = ctypes.c_size_t()
    pointer = lib.event_tokens(event, ctypes.byref(count))
    output.token_ids = list((ctypes.c_int32 * count.value).from_address(pointer)) if count.value else []
    output.prompt_tokens = lib.event_prompt_tokens(event)
    output.cached_tokens = lib.event_cached_tokens(event)
    output.error = lib.given("event_error", event)
    for position in range(count.value):
        found = _logprob(lib, "event", event, position)
        if found is not None:
            output.logprobs.append(found)
    for position in range(output.prompt_tokens):
        output.prompt_logprobs.append(_logprob(lib, "event_prompt", event, position))


def _logprob(lib: Library, kind: str, event: int, position: int) -> tuple[float, list[tuple[int, float]]] | None:
    value = ctypes.c_double()
    if not getattr(lib, f"{kind}_logprob")(event, position, ctypes.byref(value)):
        return None
    ids, values, count = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
    asked = (event, position, ctypes.byref(ids), ctypes.byref(values), ctypes.byref(count))
    assert getattr(lib, f"{kind}_top_logprobs")(*asked)
    if not count.value:
        return value.value, []
    assert ids.value is not None and values.value is not None
    top = zip(
        (ctypes.c_int32 * count.value).from_address(ids.value),
        (ctypes.c_double * count.value).from_address(values.value),
        strict=True,
    )
    return value.value, list(top)


def set_config(lib: Library, config: Any, settings: dict[str, Any]) -> None:
    """Calls the setters of a config by their names."""
    for name, value in settings.items():
        if name == "stop":
            if not value:
                lib.config_clear_stop(config)
            for text in value:
                lib.config_add_stop(config, text.encode(), len(text.encode()))
        elif name == "logit_bias":
            for token, bias in value.items():
                lib.config_set_logit_bias(config, token, bias)
        elif name in ("suppress_tokens", "stop_token_ids", "eos_token_ids"):
            getattr(lib, f"config_set_{name}")(config, (ctypes.c_int32 * len(value))(*value), len(value))
        else:
            getattr(lib, f"config_set_{name}")(config, value)
