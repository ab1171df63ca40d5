"""What whoever starts a server may decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_aot.runtime.server.settings import ServerSettings, SettingsError, is_loopback, read_keys

KEYS = ("the-key-0123456789",)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.3", "::", "example.com", "localhost.example.com"])
def test_an_address_that_others_reach_needs_a_key_or_a_word(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(SettingsError, match=r"it has no key: give one with --api-key-file .* or say --no-auth"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, keys=KEYS).keys == KEYS
    assert ServerSettings(host=host, without_keys=True).without_keys


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_an_address_of_this_machine_alone_needs_none(host: str) -> None:
    assert ServerSettings(host=host).keys == ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"keys": KEYS, "without_keys": True}, "leave one of them out"),
        ({"certificate_key": Path("x")}, "goes with --ssl-certfile"),
        ({"host": "", "keys": KEYS}, "--host is empty"),
        ({"model_names": ("a", "")}, "--model-name is empty"),
        ({"grace_seconds": float("nan")}, "--grace-seconds is nan"),
        ({"tool_format": "xml"}, "--tool-format is 'xml'; accepted: hermes, qwen, react"),
        ({"allowed_hosts": ("a b",)}, "--allowed-host is 'a b'"),
        ({"allowed_hosts": ("http://x",)}, "--allowed-host is"),
        ({"cors_origins": ("example.com",)}, "--cors-origin is 'example.com'"),
        ({"cors_origins": ("https://example.com/",)}, "--cors-origin is"),
        ({"cors_origins": ("https://",)}, "--cors-origin is"),
    ],
)
def test_what_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        ServerSettings(**given)


def test_keys() -> None:
    text = "# old\nfirst-key-0123456789\n\n  second-key-0123456789\r\nfirst-key-0123456789\n"
    assert read_keys(text, "x") == ("first-key-0123456789", "second-key-0123456789")
    for wrong, said in (
        ("", "has no key"),
        ("# only\n", "has no key"),
        ("short", "key 1 isn't 16"),
        ("a b" * 9, "key 1"),
    ):
        with pytest.raises(SettingsError, match=said) as raised:
            read_keys(wrong, "file")
        assert "token_urlsafe" in str(raised.value) and "short" not in str(raised.value)
