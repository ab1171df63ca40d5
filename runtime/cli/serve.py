"""`serve`: a bundle behind OpenAI's API over HTTP."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_aot.errors import BundleError
from qwen_aot.runtime.cli.command import VerbCommand, option
from qwen_aot.runtime.cli.console import count, put_answer, tell
from qwen_aot.runtime.cli.options import (
    CONTEXT,
    GivenPath,
    allow_bundle_code_option,
    bundle_argument,
    kernels_option,
    no_speculate_option,
    threads_option,
)
from qwen_aot.runtime.server.settings import TOOL_FORMATS

if TYPE_CHECKING:
    from qwen_aot.runtime.generation.generator import Generator
    from qwen_aot.runtime.server.settings import ServerSettings
    from qwen_aot.runtime.server.state import Model

_LISTENING, _WHO, _MODEL, _HOW_MUCH = "Address", "Who may ask", "Model", "Limits"


@click.command("serve", cls=VerbCommand, context_settings=CONTEXT)
@bundle_argument
@option(
    "--host",
    default="127.0.0.1",
    help="Address or name to listen at; others than this machine's own need a key.",
    group=_LISTENING,
)
@option("--port", type=click.IntRange(0, 65535), default=8000, help="0: any free one.", group=_LISTENING)
@option("--ssl-certfile", type=GivenPath(exists=True), help="TLS certificate chain (PEM).", group=_LISTENING)
@option(
    "--ssl-keyfile",
    type=GivenPath(exists=True),
    help="Its private key, if it isn't in the same file.",
    group=_LISTENING,
)
@option(
    "--api-key-file",
    type=GivenPath(exists=True),
    help="File of keys, one a line, of which clients send one. Also: the variable QWEN_AOT_API_KEY.",
    group=_WHO,
)
@option("--no-auth", is_flag=True, help="Answer everybody who reaches the address, without a key.", group=_WHO)
@option(
    "--allowed-host",
    multiple=True,
    metavar="NAME",
    help="A name by which clients ask (Host header), besides addresses, localhost and --host; * for any; may be "
    "given again.",
    group=_WHO,
)
@option(
    "--cors-origin",
    multiple=True,
    metavar="ORIGIN",
    help="A site whose pages may ask, such as https://chat.example.com; * for any; may be given again.",
    group=_WHO,
)
@option(
    "--model-name",
    multiple=True,
    metavar="NAME",
    help="What clients call the model; may be given again.  [default: the bundle's name]",
    group=_MODEL,
)
@option(
    "--tool-format",
    type=click.Choice(TOOL_FORMATS),
    help="How the model is told functions and calls them.  [default: by its chat template]",
    group=_MODEL,
)
@option("--no-page", is_flag=True, help="No chat page at /, which needs no key itself.", group=_WHO)
@option("--rows", type=click.IntRange(1), help="Answers at once.  [default: all rows of the bundle]", group=_HOW_MUCH)
@option(
    "--max-queue", type=click.IntRange(0, 10_000), default=16, help="Answers that may wait for a row.", group=_HOW_MUCH
)
@option(
    "--no-prefix-cache",
    is_flag=True,
    help="Compute every prompt from its beginning, whatever earlier ones left in the cache.",
    group=_HOW_MUCH,
)
@option(
    "--grace-seconds",
    type=click.FloatRange(0, 3600),
    default=30.0,
    help="For requests at work to finish in after SIGTERM or Ctrl-C.",
    group=_HOW_MUCH,
)
@option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    help="Of the log on standard error.",
    group="Output",
)
@threads_option
@kernels_option
@allow_bundle_code_option
@no_speculate_option
def command(
    bundle: Path,
    host: str,
    port: int,
    ssl_certfile: Path | None,
    ssl_keyfile: Path | None,
    api_key_file: Path | None,
    no_auth: bool,
    allowed_host: tuple[str, ...],
    cors_origin: tuple[str, ...],
    model_name: tuple[str, ...],
    tool_format: str | None,
    no_page: bool,
    rows: int | None,
    max_queue: int,
    no_prefix_cache: bool,
    grace_seconds: float,
    log_format: str,
    threads: int | None,
    kernels: str | None,
    allow_bundle_code: bool,
    speculate: bool,
) -> int:
    """Serve a bundle over HTTP, as OpenAI's API.

    \b
    Examples:
      qwen-aot serve ./bundle
      qwen-aot serve ./bundle --host 0.0.0.0 --api-key-file keys --rows 8

    It is ready when standard output says its URL; requests that come before get 503. SIGTERM and Ctrl-C let requests
    finish (exit code 0), a second one cuts them (143, 130). docs/serving.md has the rest.
    """
    from qwen_aot.runtime.server.event_loop import run
    from qwen_aot.runtime.server.lifecycle import Lifecycle, bind, url_of
    from qwen_aot.runtime.server.logs import show_server_logs
    from qwen_aot.runtime.server.settings import ServerSettings, SettingsError

    try:
        settings = ServerSettings(
            host=host,
            port=port,
            max_queue=max_queue,
            keys=_keys(api_key_file),
            without_keys=no_auth,
            allowed_hosts=allowed_host,
            cors_origins=cors_origin,
            model_names=model_name,
            tool_format=tool_format,
            grace_seconds=grace_seconds,
            has_page=not no_page,
            has_prefix_cache=not no_prefix_cache,
            certificate=ssl_certfile,
            certificate_key=ssl_keyfile,
        )
        _require_certificate(settings)
        listener = bind(settings)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    # One text at a time: threads of the tokenizer's own would gain nothing, and complain when a process is forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    show_server_logs(log_format)

    def load() -> Generator:
        from qwen_aot.runtime.generation.generator import Generator

        generator = Generator.open(
            bundle,
            threads=threads,
            kernels=kernels,
            allow_bundle_code=allow_bundle_code,
            rows=rows,
            speculate=speculate,
        )
        if generator.tokenizer is None:
            generator.close()
            raise BundleError(
                "the bundle has no tokenizer, so it can't be served: rebuild it from a checkpoint with tokenizer.json"
            )
        generator.engine.reserve(generator.engine.manifest.max_context)
        if generator.takes_images:
            _ = generator.image_encoder  # opened now, and not with the first picture
        return generator

    def on_ready(model: Model) -> None:
        url = url_of(listener, settings)
        if log_format == "json":
            facts = {"ready": url, "models": model.names, "rows": model.rows, "max_context": model.max_context}
            put_answer(f"{json.dumps(facts)}\n")
        else:
            names = ", ".join(model.names)
            put_answer(f"{names} at {url} ({count(model.rows, 'row')}, context {model.max_context}); Ctrl-C stops it\n")

    with listener:
        if log_format == "text":
            tell(f"loading {bundle} ...")
        return run(Lifecycle(settings, listener, load, on_ready).run())


def _keys(file: Path | None) -> tuple[str, ...]:
    from qwen_aot.runtime.server.settings import KEY_VARIABLE, SettingsError, read_keys

    found: list[str] = []
    if file is not None:
        try:
            found += read_keys(file.read_text(encoding="utf-8"), f"--api-key-file {file}")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--api-key-file {file} can't be read ({error})") from error
    if (value := os.environ.get(KEY_VARIABLE)) is not None:
        found += read_keys(value, f"the variable {KEY_VARIABLE}")
    return tuple(dict.fromkeys(found))


def _require_certificate(settings: ServerSettings) -> None:
    """Refuses a certificate that can't be used, before anything is loaded."""
    if settings.certificate is None:
        return
    import ssl

    from qwen_aot.runtime.server.settings import SettingsError

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.certificate, settings.certificate_key, password=lambda: b"")
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"--ssl-certfile {settings.certificate} can't be used ({error}); accepted: a PEM certificate with its "
            "unencrypted private key, there or in --ssl-keyfile"
        ) from error
