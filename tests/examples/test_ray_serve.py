"""examples/ray_serve: several replicas, streams, a reader that leaves, an end in order, and where Ray listens."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_aot.runtime.generation.generator import Generator
from tests.examples.conftest import ROOT, other_python
from tests.examples.ray_session import MESSAGES, listening
from tests.tools import require_tool


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return bool((ip.ipv4_mapped or ip).is_loopback if isinstance(ip, ipaddress.IPv6Address) else ip.is_loopback)


@pytest.mark.tools
def test_the_example(bundle: Path) -> None:
    python = other_python("ray")
    alone = [require_tool("unshare", remedy="apt install util-linux"), "--map-root-user", "--net"]
    require_tool("ip", remedy="apt install iproute2")
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not have a network of his own (unshare --net)")
    session = [sys.executable, "-m", "tests.examples.ray_session", python, str(bundle)]
    done = subprocess.run(
        [*alone, "sh", "-c", 'ip link set lo up && exec "$0" "$@"', *session],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    with Generator.open(bundle, threads=1) as generator:
        expected = generator.chat(MESSAGES, max_new_tokens=12, ignore_eos=True).text
    listens = found.pop("listening")
    assert found == {
        "models": ["m"],
        "whole": expected,
        "streamed": expected,
        "last": "data: [DONE]",
        "events": found["events"],
        "refused": [404, "model_not_found"],
        "cancelled": True,
        "replicas": 2,
        "drained": ["data: [DONE]", True],
        "exit": 0,
    }
    assert found["events"] > 5  # several pieces
    # Ray gives each replica one port at every address, whatever it is told: docs/distributed.md says so.
    beyond = [name for name, addresses in listens.items() for address in addresses if not is_loopback(address)]
    assert beyond and all(name.startswith("ray::ServeReplica:") for name in beyond) and len(beyond) <= 2, listens
    assert any(name.startswith("ray::ProxyActor") for name in listens)


BUILT = """
import deployment
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as built
made = built(deployment.build, {"bundle": BUNDLE, "max_replicas": "3", "threads": "2"})
options = made._bound_deployment._deployment_config
print(options.max_ongoing_requests, options.autoscaling_config.max_replicas)
try:
    built(deployment.build, {"bundle": BUNDLE, "max_replica": "3"})
except ValueError as error:
    print("max_replica" in str(error))
"""


@pytest.mark.tools
def test_what_a_config_file_or_serve_run_says_is_read(bundle: Path) -> None:
    """As Ray hands it to the builder: texts, by the names of the settings, and no other names."""
    done = subprocess.run(
        [other_python("ray"), "-c", BUILT.replace("BUNDLE", repr(str(bundle)))],
        cwd=ROOT / "examples" / "ray_serve",
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["20", "3", "True"], done.stderr[-3000:]


def test_a_socket_at_every_address_would_be_seen() -> None:
    # The control of the last assertions.
    with socket.socket() as inside, socket.socket() as outside:
        for each, address in ((inside, "127.0.0.1"), (outside, "0.0.0.0")):
            each.bind((address, 0))
            each.listen()
        (addresses,) = (found for name, found in listening(os.getpid()).items() if found)
        assert sorted(is_loopback(address) for address in addresses if address in ("127.0.0.1", "0.0.0.0"))[0] is False
    assert not is_loopback("::") and is_loopback("::ffff:127.0.0.1") and not is_loopback("192.0.2.1")
