"""What whoever starts a server decides, checked before anything is opened."""

from __future__ import annotations

import ipaddress
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from qwen_aot.errors import DeployError

__all__ = ["TOOL_FORMATS", "ServerSettings", "SettingsError", "is_loopback", "read_keys"]

LOOPBACK = "127.0.0.1"
PORT = 8000
MAX_QUEUE = 16
GRACE_SECONDS = 30.0
MAX_GRACE_SECONDS = 3600
MIN_KEY_CHARACTERS = 16
KEY_VARIABLE = "QWEN_AOT_API_KEY"
TOOL_FORMATS = ("hermes", "qwen", "react")  # names of those in `tool_formats`
_KEY = re.compile(r"[\x21-\x7e]+")


class SettingsError(DeployError):
    """Settings that no server is started with."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How a server listens, whom it answers, and how much it takes.

    Attributes:
        host: address or name to listen at.
        port: 0: any free one.
        max_queue: choices that may wait for a row, beside those that have one.
        keys: whoever has one of them is answered; empty: everybody.
        without_keys: answer everybody, at an address that others reach.
        allowed_hosts: names in a request's Host header that are this server's, besides addresses, `localhost` and
            `host`; "*": any.
        cors_origins: origins whose pages a browser lets read answers; "*": any.
        model_names: names that clients may give the model; empty: the bundle's own.
        tool_format: in which the model is told functions and calls them; None: see `choose_format`.
        grace_seconds: that requests at work get to finish once the server is told to stop.
        has_page: the chat page is at `/`.
        has_prefix_cache: prompts start from what the cache holds of earlier ones that came with the same key.
        certificate: PEM file of a TLS certificate chain; None: no TLS.
        certificate_key: PEM file of its private key; None: it is in `certificate`.
    """

    host: str = LOOPBACK
    port: int = PORT
    max_queue: int = MAX_QUEUE
    keys: tuple[str, ...] = ()
    without_keys: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    model_names: tuple[str, ...] = ()
    tool_format: str | None = None
    grace_seconds: float = GRACE_SECONDS
    has_page: bool = True
    has_prefix_cache: bool = True
    certificate: Path | None = None
    certificate_key: Path | None = None

    def __post_init__(self) -> None:
        if not self.host:
            raise SettingsError("--host is empty; give an address or a name, such as 127.0.0.1")
        if self.keys and self.without_keys:
            raise SettingsError("--no-auth answers everybody, and a key was given: leave one of them out")
        if not self.keys and not self.without_keys and not is_loopback(self.host):
            raise SettingsError(
                f"at {self.host} other machines reach this server, and it has no key: give one with --api-key-file or "
                f"{KEY_VARIABLE}, or say --no-auth to answer everybody"
            )
        if self.certificate_key is not None and self.certificate is None:
            raise SettingsError("--ssl-keyfile goes with --ssl-certfile")
        if not all(self.model_names):
            raise SettingsError("--model-name is empty; a name isn't empty")
        if self.tool_format is not None and self.tool_format not in TOOL_FORMATS:
            raise SettingsError(f"--tool-format is {self.tool_format!r}; accepted: {', '.join(TOOL_FORMATS)}")
        if not 0 <= self.grace_seconds <= MAX_GRACE_SECONDS:
            raise SettingsError(f"--grace-seconds is {self.grace_seconds}; accepted: 0 to {MAX_GRACE_SECONDS}")
        for name in self.allowed_hosts:
            if name != "*" and not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", name):
                raise SettingsError(f"--allowed-host is {name!r}; accepted: a name such as llm.example.com, or *")
        for origin in self.cors_origins:
            parts = urllib.parse.urlsplit(origin)
            if origin != "*" and (f"{parts.scheme}://{parts.netloc}" != origin or not parts.netloc):
                raise SettingsError(f"--cors-origin is {origin!r}; accepted: such as https://chat.example.com, or *")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(text: str, where: str) -> tuple[str, ...]:
    """The keys in a file or variable, one a line; empty lines and those that begin with # are none.

    Raises:
        SettingsError: there is none, or one is too short to be one; no message shows a key.
    """
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    how = 'make one with `python -c "import secrets; print(secrets.token_urlsafe(32))"`'
    if not keys:
        raise SettingsError(f"{where} has no key; {how}")
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY_CHARACTERS or not _KEY.fullmatch(key):
            raise SettingsError(
                f"{where}: key {number} isn't {MIN_KEY_CHARACTERS} or more visible ASCII characters; {how}"
            )
    return keys
