"""A worker for NVIDIA Dynamo: token ids in, token ids out, from a bundle; docs/distributed.md has the rest.

    python examples/dynamo/worker.py BUNDLE --discovery-backend file --event-plane zmq

Dynamo's frontend tokenizes, renders the chat template and routes; this answers with tokens, and tells the router which
beginnings its rows hold and how busy it is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import logging
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any

from dynamo._core import Context
from dynamo.common.backend.engine import EngineConfig, GenerateChunk, GenerateRequest, LLMEngine, LlmRegistration
from dynamo.common.backend.health_check import build_health_check_payload
from dynamo.common.backend.publisher import ComponentSnapshot, KvEventSource, PushSource
from dynamo.common.backend.run import run
from dynamo.common.backend.worker import WorkerConfig
from dynamo.common.utils.token_ids import token_ids_to_list
from dynamo.llm import KvEventPublisher
from dynamo.llm.exceptions import EngineShutdown, InvalidArgument, WorkerUnavailable
from kv_blocks import KvBlocks

from qwen_aot import GenerationConfig
from qwen_aot.errors import BundleError, GenerationError, QueueFullError, ServiceClosedError
from qwen_aot.runtime.bundle.load import Bundle, load_bundle
from qwen_aot.runtime.generation.config import GenerationDefaults
from qwen_aot.runtime.generation.constraint import ConstraintSource
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.generation.handle import RequestHandle
from qwen_aot.runtime.generation.request import Completion, FinishReason, Request, TokenEvent
from qwen_aot.runtime.generation.sampling import TokenLogprobs
from qwen_aot.runtime.generation.service import GenerationService

BLOCK = 16  # tokens of what the router is told as one
LOOK_SECONDS = 0.2  # between looks at what the rows hold
MAX_SALTS = 4096  # that are known beside those of the rows
REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.CANCELLED: "cancelled"}

# What the frontend may ask, by the setting that it is here.
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "n": "n",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
}
STOPPING = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "ignore_eos": "ignore_eos",
    "stop": "stop",  # the frontend looks for them too, and leaves them out of the text
}
# Others that have been seen, and the values that ask for nothing.
NOTHING: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "include_stop_str_in_output": (False,),
    "max_thinking_tokens": (),
}

log = logging.getLogger("qwen_aot.dynamo")


class BundleEngine(LLMEngine):
    """A bundle's rows, shared by the requests that a router sends."""

    def __init__(self, arguments: argparse.Namespace, folder: tempfile.TemporaryDirectory[str], name: str) -> None:
        """Opens nothing yet.

        Args:
            arguments: of the command line.
            folder: what the frontend reads of the model; deleted at the end.
            name: what clients call the model.
        """
        self._arguments = arguments
        self._folder = folder
        self._name = name
        self._generator: Generator | None = None
        self._service: GenerationService | None = None
        self._json: HeldToJson | None = None  # made for the first request that asks for it
        self._making = asyncio.Lock()
        self._at_work: dict[str, RequestHandle] = {}
        self._salts: dict[int, str] = {}  # by scope
        self._reporter: _Reporter | None = None
        self._snapshots: Any = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[BundleEngine, WorkerConfig]:
        """See `LLMEngine`."""
        arguments = _parser().parse_args(argv)
        bundle = load_bundle(arguments.bundle, skip_hash_above=1 << 20)  # the engine's files are hashed as it opens
        name = arguments.model_name or bundle.manifest.model.name
        folder = tempfile.TemporaryDirectory(prefix="qwen-aot-dynamo-")
        _write_model_folder(bundle, Path(folder.name))
        config = WorkerConfig(
            namespace=arguments.namespace,
            component=arguments.component,
            endpoint=arguments.endpoint,
            model_name=folder.name,
            served_model_name=name,
            discovery_backend=arguments.discovery_backend,
            request_plane=arguments.request_plane,
            event_plane=arguments.event_plane,
        )
        return cls(arguments, folder, name), config

    async def start(self, worker_id: int) -> EngineConfig:
        """Opens the bundle; then it takes requests."""
        arguments = self._arguments
        self._generator = await asyncio.to_thread(
            Generator.open,
            arguments.bundle,
            threads=arguments.threads,
            rows=arguments.rows,
            allow_bundle_code=arguments.allow_bundle_code,
        )
        manifest = self._generator.engine.manifest
        self._generator.engine.reserve(manifest.max_context)
        self._service = GenerationService(self._generator, max_waiting=arguments.max_queue)
        return EngineConfig(
            model=self._folder.name,
            served_model_name=self._name,
            llm=LlmRegistration(
                context_length=manifest.max_context,
                kv_cache_block_size=BLOCK,
                total_kv_blocks=manifest.max_batch * (manifest.max_context // BLOCK),
                max_num_seqs=manifest.max_batch,
                max_num_batched_tokens=manifest.max_batch * manifest.max_context,
            ),
        )

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateChunk, None]:
        """A chunk for each token; the last of each choice says why it ended."""
        service, generator = self._service, self._generator
        assert service is not None and generator is not None
        ids = token_ids_to_list(request["token_ids"])
        try:
            config = settings_of(request, generator)
            held = await self._held(request, generator)
            salt = salt_of(request)
            if salt is not None:
                self._salts[scope_of(salt)] = salt
            asked = Request(
                ids,
                config,
                keep_cache=True,
                cache_scope=scope_of(salt),
                is_chat=config.max_new_tokens is None,
                constraint=held,
            )
            handle = await asyncio.to_thread(service.submit, asked)
        except QueueFullError as error:
            raise WorkerUnavailable(str(error)) from error
        except ServiceClosedError as error:
            raise EngineShutdown(str(error)) from error
        except GenerationError as error:
            raise InvalidArgument(str(error)) from error
        self._at_work[context.id()] = handle
        try:
            if context.is_stopped():
                handle.cancel()
            generated = 0
            async for event in handle:
                if isinstance(event, TokenEvent):
                    generated += 1
                    yield _token_chunk(event)
                else:
                    yield _last_chunk(event, generated)
        except GenerationError as error:
            raise EngineShutdown(str(error)) from error
        finally:
            self._at_work.pop(context.id(), None)
            handle.cancel()

    async def _held(self, request: Mapping[str, Any], generator: Generator) -> ConstraintSource | None:
        """What an answer is held to: JSON by a schema, as `response_format` and required calls of functions ask for it.

        Raises:
            GenerationError: it can't be.
        """
        asked = (request.get("sampling_options") or {}).get("guided_decoding") or {}
        kinds = sorted(kind for kind, value in asked.items() if value is not None)
        if not kinds:
            return None
        if kinds != ["json"]:
            raise GenerationError(f"guided_decoding has {', '.join(kinds)}; this worker supports json alone")
        async with self._making:
            if self._json is None:
                self._json = await asyncio.to_thread(HeldToJson, generator)
        return await self._json.compile(asked["json"])

    async def abort(self, context: Context) -> None:
        """Ends a request whose client has gone; its row is free after the step at work."""
        handle = self._at_work.get(context.id())
        if handle is not None:
            handle.cancel()

    async def health_check_payload(self) -> dict[str, Any] | None:
        """One token, now and then."""
        return build_health_check_payload(bos_token_id=0)

    async def kv_event_sources(self) -> list[KvEventSource]:
        """What the rows hold is pushed by a thread of its own."""
        return [PushSource(on_ready=self._report, dp_rank=0)]

    def component_metrics_dp_ranks(self) -> list[int]:
        """One engine, one rank."""
        return [0]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        """Takes what load is told by."""
        self._snapshots = publisher

    async def cleanup(self) -> None:
        """Closes what `start` opened, as far as it came; a second time does nothing."""
        reporter, self._reporter = self._reporter, None
        if reporter is not None:
            await asyncio.to_thread(reporter.stop)
        held, self._json = self._json, None
        if held is not None:
            held.close()
        service, self._service = self._service, None
        if service is not None:
            await service.aclose()
        generator, self._generator = self._generator, None
        if generator is not None:
            await asyncio.to_thread(generator.close)
        self._folder.cleanup()

    def _report(self, publisher: KvEventPublisher) -> None:
        assert self._service is not None and self._generator is not None
        manifest = self._generator.engine.manifest
        blocks = manifest.max_batch * (manifest.max_context // BLOCK)
        self._reporter = _Reporter(self._service, blocks, publisher, lambda: self._snapshots, self._salts)


class HeldToJson:
    """Compiles JSON schemas for one tokenizer, as `qwen-aot serve` does and within its limits; needs its extra."""

    def __init__(self, generator: Generator) -> None:
        """Sorts the vocabulary, which takes a second.

        Raises:
            GenerationError: the extra isn't installed.
        """
        try:
            from qwen_aot.runtime.server.constraints.compile_queue import CompileQueue
            from qwen_aot.runtime.server.constraints.compiler import GrammarCompiler
        except ImportError as error:
            raise GenerationError(
                f"guided_decoding needs a package that isn't installed ({error.name}): install 'qwen-aot[serve]'"
            ) from error
        assert generator.tokenizer is not None
        self._compiler = GrammarCompiler(generator.tokenizer, generator.engine.manifest.model.vocab_size)
        self._queue = CompileQueue()

    async def compile(self, schema: Any) -> ConstraintSource:
        """What holds answers to a schema.

        Raises:
            GenerationError: it can't be taken.
        """
        from qwen_aot.runtime.server.constraints.grammar import HeldJson, json_grammar
        from qwen_aot.runtime.server.constraints.json_schema import check_schema
        from qwen_aot.runtime.server.errors import ApiError

        where = "guided_decoding.json"
        try:
            check_schema(schema, where)
            return await self._queue.compile(self._compiler, json_grammar(HeldJson(schema, where)))
        except ApiError as error:
            raise GenerationError(error.message) from error

    def close(self) -> None:
        """Lets its threads go."""
        self._queue.close()


class _Reporter:
    """A thread that tells the router what the rows hold, and how much of the cache is in use."""

    def __init__(
        self,
        service: GenerationService,
        blocks: int,
        publisher: KvEventPublisher,
        snapshots: Callable[[], Any],
        salts: dict[int, str],
    ) -> None:
        self._service = service
        self._salts = salts
        self._total = blocks
        self._publisher = publisher
        self._snapshots = snapshots
        self._blocks = KvBlocks(BLOCK)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qwen-aot-kv-events", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Waits for its last look."""
        self._stopped.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            with contextlib.suppress(TimeoutError):
                try:
                    self._look()
                except ServiceClosedError:
                    return
                except Exception:
                    log.exception("the router wasn't told what the rows hold")

    def _look(self) -> None:
        found = self._service.cached_sequences(timeout=30)
        rows = [(self._salts.get(scope), tokens) for scope, tokens in found]
        if len(self._salts) > MAX_SALTS:
            for scope in set(self._salts) - {scope for scope, _ in found}:
                self._salts.pop(scope, None)
        gone, stored = self._blocks.update(rows)
        if gone:
            self._publisher.publish_removed(gone)
        for new in stored:
            sizes = [BLOCK] * len(new.hashes)
            self._publisher.publish_stored(new.token_ids, sizes, new.hashes, new.parent, cache_salt=new.salt)
        publisher = self._snapshots()
        if publisher is not None:
            now = self._service.statistics()
            used = sum(len(tokens) for _, tokens in rows) // BLOCK
            rate = now.cached_tokens / now.prompt_tokens if now.prompt_tokens else None
            publisher.publish(0, ComponentSnapshot(used, self._total, used / self._total, 0, kv_cache_hit_rate=rate))


def salt_of(request: Mapping[str, Any]) -> str | None:
    """The `cache_salt` of `nvext`: requests of different ones share no cached beginnings."""
    for place in (request.get("nvext"), (request.get("extra_args") or {}).get("nvext")):
        if isinstance(place, dict) and place.get("cache_salt"):
            return str(place["cache_salt"])
    return None


def scope_of(salt: str | None) -> int:
    """The scope that a salt stands for; without one 0."""
    return 0 if salt is None else int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "big") or 1


def settings_of(request: Mapping[str, Any], generator: Generator) -> GenerationConfig:
    """A request's settings; what it leaves open the bundle decides.

    Raises:
        GenerationError: it asks for something that isn't there, by name.
    """
    found: dict[str, Any] = {}
    sampling, stopping = request.get("sampling_options") or {}, request.get("stop_conditions") or {}
    for given, names in ((sampling, SAMPLING), (stopping, STOPPING)):
        for name, value in given.items():
            if value is None or name in ("stop_token_ids", "stop_token_ids_hidden", "guided_decoding"):
                continue
            if name in names:
                found[names[name]] = value
            elif value not in NOTHING.get(name, ()):
                raise GenerationError(f"{name} is {str(value)[:60]!r}, which this worker doesn't support: leave it out")
    ids = [*(stopping.get("stop_token_ids") or ()), *(stopping.get("stop_token_ids_hidden") or ())]
    found["stop_token_ids"] = tuple(dict.fromkeys(ids))
    found["top_k"] = max(0, found.get("top_k", 0)) if "top_k" in found else None
    output = request.get("output_options") or {}
    for name in ("logprobs", "prompt_logprobs"):
        if output.get(name) is not None:
            found[name] = output[name]
    found = {name: value for name, value in found.items() if value is not None}
    if "stop" in found:
        found["stop"] = tuple(dict.fromkeys((*generator.defaults.stop, *found["stop"])))
    return generator.defaults.resolve(**found)


def _token_chunk(event: TokenEvent) -> GenerateChunk:
    chunk: GenerateChunk = {"token_ids": [event.token_id], "index": event.choice}
    if event.logprobs is not None:
        chunk["log_probs"] = [event.logprobs.token]
        chunk["top_logprobs"] = [_top(event.logprobs)]
    return chunk


def _top(logprobs: TokenLogprobs) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "token_id": token_id, "token": f"token_id:{token_id}", "logprob": value}
        for rank, (token_id, value) in enumerate(logprobs.top, 1)
    ]


def _last_chunk(completion: Completion, generated: int) -> GenerateChunk:
    if completion.error is not None:
        raise completion.error
    return {
        "token_ids": [],
        "index": completion.choice,
        "finish_reason": REASONS[completion.finish_reason],
        "completion_usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": completion.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": completion.cached_tokens},
        },
    }


def _write_model_folder(bundle: Bundle, folder: Path) -> None:
    """What the frontend reads of a model: its texts, and a config.json, which bundles have no need of."""
    if not bundle.has("tokenizer.json"):
        raise BundleError("the bundle has no tokenizer, which Dynamo's frontend needs: rebuild it with tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if bundle.has(name):
            (folder / name).write_text(bundle.read_text(name), encoding="utf-8")
    manifest = bundle.manifest
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "max_position_embeddings": manifest.max_context,
        "vocab_size": manifest.model.vocab_size,
        "eos_token_id": list(GenerationDefaults.from_bundle(bundle).eos_token_ids),
    }
    (folder / "config.json").write_text(json.dumps(config))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A worker for NVIDIA Dynamo that answers from a bundle.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model-name", help="What clients call the model (default: the bundle's name).")
    parser.add_argument("--namespace", default="dynamo")
    parser.add_argument("--component", default="backend")
    parser.add_argument("--endpoint", default="generate")
    parser.add_argument("--discovery-backend", default="etcd", help="etcd, file, kubernetes or mem.")
    parser.add_argument("--request-plane", default="tcp")
    parser.add_argument("--event-plane", default=None, help="nats or zmq.")
    parser.add_argument("--rows", type=int, help="Answers at once (default: all rows of the bundle).")
    parser.add_argument("--max-queue", type=int, default=16, help="Answers that may wait for a row.")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--allow-bundle-code", action="store_true", help="See docs/security.md.")
    return parser


if __name__ == "__main__":
    run(BundleEngine)
