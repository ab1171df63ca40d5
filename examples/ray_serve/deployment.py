"""A bundle on Ray Serve: as many replicas as the load asks for, each with the API of `qwen-aot serve`.

docs/distributed.md has the rest.

    python examples/ray_serve/deployment.py BUNDLE --max-replicas 4

On a cluster of your own, from this folder: `serve run deployment:build bundle=/srv/bundles/rows max_replicas=4`.
"""

import argparse
import os
import signal
import threading
from pathlib import Path

if __name__ == "__main__":
    # A Ray of this machine alone: else it takes the machine's own address even where it is told 127.0.0.1.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
from pydantic import BaseModel
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen_aot.runtime.bundle.load import read_manifest
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.server.app import make_app
from qwen_aot.runtime.server.settings import KEY_VARIABLE, ServerSettings, read_keys
from qwen_aot.runtime.server.state import ServerState

DRAIN_SECONDS = 30.0  # for requests at work, when a replica is taken away


class Settings(BaseModel, extra="forbid"):
    """What `serve run` or a config file says; see `qwen-aot serve --help` for what has the same name there."""

    bundle: Path
    model_name: str | None = None
    threads: int = 1  # and CPUs that a replica asks Ray for
    rows: int | None = None
    max_queue: int = 16
    api_key_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    prefix_cache: bool = True
    min_replicas: int = 1
    max_replicas: int = 1
    upscale_delay_seconds: float = 10.0  # that rows have been busy before another replica starts


@serve.deployment
@serve.ingress()
class Replica:
    """One engine. Ray's proxy hands it each request as it came, and passes on what it streams."""

    def __init__(self, settings: Settings) -> None:
        """Opens the bundle; Ray sends requests afterwards."""
        names = () if settings.model_name is None else (settings.model_name,)
        self._state = ServerState(
            ServerSettings(
                keys=_keys(settings),
                without_keys=False,
                allowed_hosts=settings.allowed_hosts,
                model_names=names,
                max_queue=settings.max_queue,
                has_prefix_cache=settings.prefix_cache,
            )
        )
        generator = Generator.open(settings.bundle, threads=settings.threads, rows=settings.rows)
        generator.engine.reserve(generator.engine.manifest.max_context)
        self._model = self._state.start(generator)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The API, and an end in order: Ray asks for it once no request is at work, or `DRAIN_SECONDS` are over."""
        api = make_app(self._state)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "lifespan":
                await api(scope, receive, send)
                return
            while True:
                message = await receive()
                if message["type"] == "lifespan.shutdown":
                    self._state.drain()
                    self._state.cut()
                    await self._model.service.aclose()
                    self._model.generator.close()
                    self._state.close()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return

        return app

    async def check_health(self) -> None:
        """Ray starts another replica in the place of one whose engine has failed."""
        if not self._model.service.statistics().is_accepting:
            raise RuntimeError("the engine has failed; the log says how")


def build(settings: Settings) -> serve.Application:
    """The application, for `serve run` and for config files."""
    rows = read_manifest(settings.bundle).max_batch if settings.rows is None else settings.rows
    return Replica.options(
        # A replica is busy once its rows are; as many as may wait are sent beside.
        max_ongoing_requests=rows + settings.max_queue,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": rows,
            "upscale_delay_s": settings.upscale_delay_seconds,
            "metrics_interval_s": 1.0,
            "look_back_period_s": max(2.0, settings.upscale_delay_seconds),
        },
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        ray_actor_options={"num_cpus": settings.threads},
    ).bind(settings)


def _keys(settings: Settings) -> tuple[str, ...]:
    found: list[str] = []
    if settings.api_key_file is not None:
        found += read_keys(settings.api_key_file.read_text(encoding="utf-8"), str(settings.api_key_file))
    if (value := os.environ.get(KEY_VARIABLE)) is not None:
        found += read_keys(value, f"the variable {KEY_VARIABLE}")
    return tuple(dict.fromkeys(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve a bundle by a Ray of its own on this machine, at 127.0.0.1 alone."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model-name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--min-replicas", type=int, default=1)
    parser.add_argument("--max-replicas", type=int, default=2)
    parser.add_argument("--upscale-delay-seconds", type=float, default=10.0)
    arguments = vars(parser.parse_args())
    port = arguments.pop("port")
    settings = Settings(**arguments | {"bundle": arguments["bundle"].absolute()})

    ray.init(num_cpus=settings.threads * settings.max_replicas + 1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(settings), name="qwen-aot", route_prefix="/")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # behind Ray's own handlers
        signal.signal(number, lambda *_: stopped.set())
    print(f"ready at http://127.0.0.1:{port}", flush=True)
    stopped.wait()
    serve.delete("qwen-aot")  # what is at work finishes
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
