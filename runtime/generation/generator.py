"""Generator: prompts and conversations in, tokens and text out, over one engine."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from qwen_aot.errors import ContextFullError, GenerationError
from qwen_aot.runtime.backends.open import open_engine, open_vision_engine
from qwen_aot.runtime.bundle.load import Bundle, load_bundle
from qwen_aot.runtime.engine.protocol import Engine
from qwen_aot.runtime.engine.vision import VisionRunner
from qwen_aot.runtime.generation.arguments import Configs, Prompt, is_one_prompt, make_requests
from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults
from qwen_aot.runtime.generation.driver import Driver
from qwen_aot.runtime.generation.images import PlacedImage
from qwen_aot.runtime.generation.options import OPTION_NAMES, GenerationOptions, check_names, resolve_each
from qwen_aot.runtime.generation.pending import PendingRequest
from qwen_aot.runtime.generation.request import Completion, Event, Request
from qwen_aot.runtime.generation.speculation import SpeculationStatistics
from qwen_aot.runtime.text.chat_encoder import ChatEncoder
from qwen_aot.runtime.text.chat_template import Message
from qwen_aot.runtime.text.image_tokens import ImageTokens, picture_label
from qwen_aot.runtime.text.tokenizer import Tokenizer, load_tokenizer
from qwen_aot.runtime.vision.encoder import ImageEncoder
from qwen_aot.runtime.vision.message_parts import take_pictures
from qwen_aot.runtime.vision.pictures import Picture, open_picture

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EventStream", "Generator"]

EventStream: TypeAlias = abc.Generator[Event, None, None]  # an iterator that can be closed

_STREAMING = "another stream of this generator isn't finished: end it or close it first"


class Generator:
    """Generates from prompts; a context manager. One stream at a time; `close` may come from any thread.

    `GenerationService` shares one between threads.

    Example:
        >>> with Generator.open("bundle") as generator:
        ...     print(generator.generate("The capital of France is", max_new_tokens=32).text)
        ...     print(generator.chat([{"role": "user", "content": "Hello"}]).text)
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        defaults: GenerationDefaults | None = None,
        *,
        speculate: bool = True,
        open_vision: Callable[[], VisionRunner] | None = None,
    ) -> None:
        """Takes over an engine; `close` closes it.

        Args:
            engine: nothing else may drive it meanwhile.
            tokenizer: None: prompts are token ids and there is no text.
            defaults: None: greedy, with the manifest's ends and length.
            speculate: see `open`.
            open_vision: opens the bundle's vision engine, once a picture is given; None: there is none.
        """
        self._open_vision = open_vision
        self._vision: ImageEncoder | None = None
        self._vision_lock = threading.RLock()  # a signal handler may close in the middle of an opening
        self._engine = engine
        self._tokenizer = tokenizer
        self._defaults = defaults or GenerationDefaults.from_manifest(engine.manifest)
        self._driver = Driver(engine, tokenizer, self._defaults, speculate=speculate)
        self._chat_encoder: ChatEncoder | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        skip_hash_above: int | None = None,
        allow_bundle_code: bool = False,
        rows: int | None = None,
        speculate: bool = True,
        kernels: str | None = None,
    ) -> Generator:
        """Opens a bundle.

        Args:
            path: the bundle's folder.
            threads: CPU threads; None: see `machine.usable_cores`.
            skip_hash_above: see `runtime.bundle.load.load_bundle`.
            allow_bundle_code: let the bundle run native code that isn't this machine's own; for bundles of people whose
                programs you would run. Also: the variable QWEN_AOT_ALLOW_BUNDLE_CODE=1.
            rows: use no more of the bundle's rows than so many, for less memory; None: all of them.
            speculate: draft tokens from the text itself and check several in a step, where the bundle can
                (`build-engine --speculate`) and measurements say that it pays. Answers are the same.
            kernels: whose run it on the CPU: "own" (this project's), "onnxruntime", or "auto", which None is too: own
                ones where this machine has them and the bundle a graph for them.

        Raises:
            BundleError: the bundle is damaged.
            EngineMismatchError: this machine can't run it, it has code that isn't allowed, or own kernels can't be had.
            GenerationError: the bundle has fewer rows, or an engine whose rows are fixed.
        """
        bundle = load_bundle(path, skip_hash_above=skip_hash_above)
        if rows is not None:
            bundle = _with_rows(bundle, rows)
        tokenizer = load_tokenizer(bundle)
        defaults = GenerationDefaults.from_bundle(bundle)
        engine = open_engine(bundle, threads=threads, allow_bundle_code=allow_bundle_code, kernels=kernels)
        open_vision = functools.partial(
            open_vision_engine, bundle, threads=threads, allow_bundle_code=allow_bundle_code
        )
        return cls(engine, tokenizer, defaults, speculate=speculate, open_vision=open_vision)

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if the bundle has one."""
        return self._tokenizer

    @property
    def defaults(self) -> GenerationDefaults:
        """What the bundle says about generation."""
        return self._defaults

    @property
    def driver(self) -> Driver:
        """What steps the engine; to be borrowed."""
        return self._driver

    @property
    def speculation(self) -> SpeculationStatistics | None:
        """What became of drafted tokens since the bundle was opened; None: none are drafted."""
        return self._driver.batch.speculation

    @property
    def takes_images(self) -> bool:
        """Whether the bundle has a vision engine."""
        return self._engine.manifest.engines.vision is not None

    @property
    def image_encoder(self) -> ImageEncoder:
        """The vision engine, opened when it is first asked for.

        Raises:
            GenerationError: the bundle takes no images, or the generator was closed.
            EngineMismatchError: this machine can't run the engine.
        """
        if not self.takes_images:
            name = self._engine.manifest.model.name
            raise GenerationError(
                f"the bundle takes no images: {name} has no vision engine (a bundle of Qwen-VL has one)"
            )
        with self._vision_lock:
            if self._vision is None:
                opened = None if self._open_vision is None else ImageEncoder(self._open_vision())
                if opened is not None and self._open_vision is None:  # closed meanwhile
                    opened.close()
                    opened = None
                if opened is None:
                    raise GenerationError("the vision engine is closed; open the bundle again")
                self._vision = opened
            return self._vision

    @property
    def chat_encoder(self) -> ChatEncoder:
        """The chat template with the tokenizer.

        Raises:
            GenerationError: the bundle has no tokenizer or template.
        """
        if self._chat_encoder is None:
            self._chat_encoder = ChatEncoder.from_tokenizer(self._tokenizer)
        return self._chat_encoder

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is one prompt, though it is a sequence of texts
        self,
        prompts: Prompt,
        config: GenerationConfig | None = None,
        *,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = True,
        **options: Unpack[GenerationOptions],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        config: Configs = None,
        *,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = True,
        **options: Unpack[GenerationOptions],
    ) -> list[Completion]: ...

    @overload
    def generate(  # type: ignore[overload-overlap]  # as above
        self,
        prompts: Prompt,
        config: GenerationConfig | None = None,
        *,
        n: int,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = True,
        **options: Unpack[GenerationOptions],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        config: Configs = None,
        *,
        n: int,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = True,
        **options: Unpack[GenerationOptions],
    ) -> list[list[Completion]]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        config: Configs = None,
        *,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = True,
        **options: Any,
    ) -> Completion | list[Completion] | list[list[Completion]]:
        """Goes on from one prompt or from several, as many at once as the engine has rows.

        Args:
            prompts: a text or a list of token ids; or a list of those.
            config: the settings, or a list with those of each prompt; None: the bundle's defaults.
            cancel: set it to end all of them.
            allow_special_tokens: special tokens that a text spells are those tokens; False: they are plain text.
            options: `max_new_tokens=64`, `temperature=0.7`, ...: those of `GenerationDefaults.resolve`. Each replaces
                what the config says.

        Returns:
            Of one prompt its completion, of several a list in their order. Where `n` is given as an option, even 1,
            each prompt has a list of n completions instead.

        Raises:
            GenerationError: a prompt or option can't be taken (nothing has run), or a request failed; `stream` gives
                the results of the others.
            TypeError: there is no such option.
        """
        is_one, requests = self._requests("generate()", prompts, config, cancel, allow_special_tokens, options)
        if "n" in options:
            groups = self._run(requests)
            return groups[0] if is_one else groups
        completions = self._run_single(requests)
        return completions[0] if is_one else completions

    def stream(
        self,
        prompts: Prompt | Request | Sequence[Prompt | Request],
        config: Configs = None,
        *,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = True,
        **options: Any,
    ) -> EventStream:
        """Generates token by token; each request's last event is its Completion (each choice's, with `n`).

        All requests are checked before any runs. Closing the stream cancels what isn't finished. A request that
        fails by itself gets a Completion with the error; when the others are done, the first such error is
        raised.

        Args:
            prompts: as for `generate`, or Requests, which hold their own settings.
            config: see `generate`.
            cancel: see `generate`.
            allow_special_tokens: see `generate`.
            options: see `generate`.

        Raises:
            GenerationError: a request can't be taken or failed, a step failed, or another stream isn't finished.
            ContextFullError: a prompt is longer than the context.
            TypeError: there is no such option.
        """
        if isinstance(prompts, Request):
            prompts = [prompts]
        if isinstance(prompts, Sequence) and any(isinstance(each, Request) for each in prompts):
            requests = [each for each in prompts if isinstance(each, Request)]
            if len(requests) < len(prompts) or config is not None or cancel is not None or options:
                raise GenerationError("a Request holds its own settings: give only Requests, or prompts with options")
        else:
            _, requests = self._requests("stream()", prompts, config, cancel, allow_special_tokens, options)
        prompt_ids = [self._driver.batch.tokenize(request) for request in requests]
        return self._stream(requests, prompt_ids)

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        config: GenerationConfig | None = None,
        *,
        n: int,
        stream: Literal[False] = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[Completion]: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        config: GenerationConfig | None = None,
        *,
        stream: Literal[False] = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        config: GenerationConfig | None = None,
        *,
        stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] | None = None,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> EventStream: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        config: GenerationConfig | None = None,
        *,
        stream: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Completion | EventStream: ...

    def chat(
        self,
        messages: Sequence[Message],
        config: GenerationConfig | None = None,
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Completion | list[Completion] | EventStream:
        """Answers a conversation, of which only the cache remembers anything: a beginning in it isn't computed again.

        Args:
            messages: see `chat_request`.
            config: the settings; None: the bundle's defaults.
            stream: give the events as they come, as `stream` does, and not the completion.
            tools: see `chat_request`.
            cancel: set it to end the answer.
            allow_special_tokens: see `chat_request`.
            template_variables: see `chat_request`.
            options: see `chat_request`.

        Returns:
            The completion; with `n` among the options a list of n; with `stream` the events.

        Raises:
            GenerationError: see `chat_request` and `stream`.
            TypeError: there is no such option.
        """
        request = self.chat_request(
            messages,
            config,
            tools=tools,
            cancel=cancel,
            allow_special_tokens=allow_special_tokens,
            template_variables=template_variables,
            **options,
        )
        if stream:
            return self.stream(request)
        return self._run([request])[0] if "n" in options else self._run_single([request])[0]

    def chat_request(
        self,
        messages: Sequence[Message],
        config: GenerationConfig | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Request:
        """The request that answers a conversation, to be streamed or submitted.

        Args:
            messages: as in OpenAI's API: `role`, `content` (a text, or parts of type `text`, and of a user's message
                `image` and `image_url`: see `runtime.vision.message_parts.take_pictures`), and what else the template
                reads of one (`name`, `tool_calls`, `reasoning_content`, ...).
            config: the settings; None: the bundle's defaults.
            tools: JSON schemas of functions, for a template that takes them.
            cancel: set it to end the answer.
            allow_special_tokens: control tokens that the texts spell are control tokens; False: they are plain text.
            template_variables: what else the template gets, whether it reads it or not.
            options: those of `generate`, and variables that the template reads (`enable_thinking=False`, ...).

        Raises:
            ContextFullError: the conversation doesn't fit the context.
            GenerationError: the bundle has no tokenizer or template, or see `ChatEncoder.encode`.
            TypeError: there is no such option.
        """
        return self.encode_images(
            self.pending_chat_request(
                messages,
                config,
                tools=tools,
                cancel=cancel,
                allow_special_tokens=allow_special_tokens,
                template_variables=template_variables,
                **options,
            )
        )

    def pending_chat_request(
        self,
        messages: Sequence[Message],
        config: GenerationConfig | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> PendingRequest:
        """The same before its pictures are decoded: its tokens and settings are known, and nothing was run.

        Args:
            messages: see `chat_request`.
            config: see `chat_request`.
            tools: see `chat_request`.
            cancel: see `chat_request`.
            allow_special_tokens: see `chat_request`.
            template_variables: see `chat_request`.
            options: see `chat_request`.

        Raises:
            ContextFullError: see `chat_request`.
            GenerationError: see `chat_request`.
            TypeError: see `chat_request`.
        """
        encoder = self.chat_encoder
        check_names(options, "chat()", others=encoder.template.variables)
        knobs = {name: value for name, value in options.items() if name in OPTION_NAMES}
        variables = {name: value for name, value in options.items() if name not in OPTION_NAMES}
        (settings,) = resolve_each(self._defaults, config, knobs, 1)
        plain, pictures = take_pictures(_listed(messages))
        encode = functools.partial(
            encoder.encode_with_images,
            plain if pictures else messages,
            tools=tools,
            allow_special_tokens=allow_special_tokens,
            variables=variables | dict(template_variables or {}),
        )
        if pictures:
            rows = self.image_encoder.rows
            self._check_fits(len(pictures) * (rows + 2), "at least ")  # before any of these tokens is made
            encoded = encode(image_rows=rows)
        else:
            encoded = encode()
        ids = encoded.ids
        self._check_fits(len(ids))
        request = Request(ids, settings, cancel, keep_cache=True, is_chat=True)
        return PendingRequest(request, encoded.image_starts, tuple(pictures))

    def encode_images(self, pending: PendingRequest, *, is_cancelled: Callable[[], bool] = lambda: False) -> Request:
        """Decodes and encodes a request's pictures, one after the other; from any thread.

        Where the request says `keep_cache`, what they became is kept for others of its `cache_scope`.

        Args:
            pending: the request.
            is_cancelled: asked between pictures and between runs of the vision engine.

        Raises:
            GenerationError: see `open_picture` and `ImageEncoder.encode`.
        """
        request = pending.request
        if not pending.pictures:
            return request
        encoded = self.image_encoder.encode(
            (open_one() for open_one in pending.pictures),
            scope=request.cache_scope if request.keep_cache else None,
            is_cancelled=is_cancelled,
        )
        pairs = zip(pending.image_starts, encoded, strict=True)
        return replace(request, images=tuple(PlacedImage(start, image.rows, image.digest) for start, image in pairs))

    def picture_request(
        self,
        pictures: Sequence[Picture | Path | bytes],
        prompt: str = "",
        config: GenerationConfig | None = None,
        *,
        cancel: threading.Event | None = None,
        allow_special_tokens: bool = True,
        **options: Any,
    ) -> Request:
        """The request that goes on from pictures and a text behind them, without a chat template.

        The published form: a line "Picture 1: " with the picture's tokens for each, then the text.

        Args:
            pictures: decoded ones, files, or the content of files.
            prompt: the text.
            config: the settings; None: the bundle's defaults.
            cancel: set it to end the output.
            allow_special_tokens: see `generate`.
            options: see `generate`.

        Raises:
            GenerationError: the bundle takes no images or has no tokenizer, or see `open_picture`.
            ContextFullError: they don't fit the context.
            TypeError: there is no such option.
        """
        check_names(options, "picture_request()")
        (settings,) = resolve_each(self._defaults, config, options, 1)
        rows = self.image_encoder.rows
        self._check_fits(len(pictures) * (rows + 2), "at least ")
        span = ImageTokens.of(self._tokenizer).span(rows)
        tokenizer = self._tokenizer
        assert tokenizer is not None  # it has the images' tokens
        ids: list[int] = []
        starts = []
        for number in range(1, len(pictures) + 1):
            newline = "\n" if number > 1 else ""
            ids += tokenizer.encode(f"{newline}{picture_label(number)}", add_special_tokens=number == 1)
            starts.append(len(ids) + 1)
            ids += span
        text = f"\n{prompt}" if pictures else prompt
        ids += tokenizer.encode(text, add_special_tokens=not pictures, allow_special_tokens=allow_special_tokens)
        self._check_fits(len(ids))
        opening = tuple(functools.partial(open_picture, picture) for picture in pictures)
        return self.encode_images(PendingRequest(Request(ids, settings, cancel), tuple(starts), opening))

    def _check_fits(self, tokens: int, at_least: str = "") -> None:
        max_context = self._engine.manifest.max_context
        if tokens > max_context:
            raise ContextFullError(
                f"the conversation has {at_least}{tokens} tokens with this turn, the context holds {max_context}: "
                "start a new conversation (/clear in the terminal), say less at once, or rebuild the bundle with a "
                "larger --max-context"
            )

    def _requests(
        self,
        function: str,
        prompts: object,
        config: Configs,
        cancel: threading.Event | None,
        allow_special_tokens: bool,
        options: Mapping[str, Any],
    ) -> tuple[bool, list[Request]]:
        """Whether there is one prompt and no list, and the requests."""
        check_names(options, function)
        is_one = is_one_prompt(prompts)
        several: Any = [prompts] if is_one else prompts
        requests = make_requests(
            several,
            config,
            options,
            defaults=self._defaults,
            tokenizer=self._tokenizer,
            cancel=cancel,
            allow_special_tokens=allow_special_tokens,
        )
        return is_one, requests

    def _run(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The completions of each request, by choice."""
        groups: list[list[Completion]] = [[] for _ in requests]
        with contextlib.closing(self.stream(requests)) as events:
            for event in events:
                if isinstance(event, Completion):
                    groups[event.index].append(event)
        return [sorted(group, key=lambda completion: completion.choice) for group in groups]

    def _run_single(self, requests: Sequence[Request]) -> list[Completion]:
        """The completion of each request."""
        for request in requests:
            if request.config is not None and request.config.n > 1:
                raise GenerationError(
                    f"the config has n={request.config.n}: give n={request.config.n} as an option too, for a list of "
                    "completions of each prompt"
                )
        return [completion for (completion,) in self._run(requests)]

    def _stream(self, requests: Sequence[Request], prompt_ids: list[list[int]]) -> EventStream:
        errors: list[GenerationError] = []
        driver = self._driver
        driver.borrow(_STREAMING)
        try:
            for request, ids in zip(requests, prompt_ids, strict=True):
                driver.batch.add(request, ids)
            while not driver.batch.is_idle:
                for event in driver.step():
                    if isinstance(event, Completion) and event.error is not None:
                        errors.append(event.error)
                    yield event
        except GeneratorExit:  # closed between two steps, when all rows are whole
            driver.batch.abandon()
            raise
        finally:
            driver.give_back()
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Closes the engine once no step runs; a stream that isn't finished fails at its next one.

        From a signal handler that interrupted a step, it is done when that step ends.
        """
        with self._vision_lock:
            self._open_vision, vision = None, self._vision
        if vision is not None:
            vision.close()
        self._driver.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _listed(messages: object) -> Sequence[Any]:
    """Messages to look for pictures in; what is no list of them has none, and is refused by the encoder."""
    return messages if isinstance(messages, Sequence) and not isinstance(messages, str | bytes) else ()


def _with_rows(bundle: Bundle, rows: int) -> Bundle:
    """The bundle with some of its rows."""
    manifest = bundle.manifest
    if isinstance(rows, bool) or not isinstance(rows, int) or not 1 <= rows <= manifest.max_batch:
        raise GenerationError(
            f"rows is {rows!r}; accepted: 1 to {manifest.max_batch}, the bundle's own (--max-batch of its build)"
        )
    if rows != manifest.max_batch and PurePosixPath(manifest.engines.text.file).suffix != ".onnx":
        raise GenerationError(
            f"rows is {rows}, and this engine was compiled for {manifest.max_batch}: leave it out, or build the bundle "
            f"with --max-batch {rows}"
        )
    return replace(bundle, manifest=replace(manifest, max_batch=rows))
