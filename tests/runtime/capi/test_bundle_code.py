"""Native code of a bundle runs only where it is this machine's own, or allowed by name: the Python side's rules."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.runtime.bundle.manifest import PluginFacts
from tests.doubles.bundles import PLUGIN_CONTENT, PLUGIN_LIBRARY
from tests.runtime.backends.tensorrt.engines import write_checksum_bundle
from tests.runtime.capi.native import Native, Session

ALLOW = "QWEN_AOT_ALLOW_BUNDLE_CODE"
INSTALLED = "QWEN_AOT_PLUGIN_LIBRARY"
SHA256 = hashlib.sha256(PLUGIN_CONTENT.encode()).hexdigest()
BUNDLE, IO = 4, 3


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("bundle")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Brings the plugin library as a file."""
    return write_checksum_bundle(tmp_path / "bundle", plugins=True)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """This machine's own library, the same as the bundle's."""
    path = tmp_path / "own.so"
    path.write_text(PLUGIN_CONTENT)
    return path


def decide(
    program: Path,
    bundle: Path,
    *,
    is_allowed: bool = False,
    installed: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """[library, whether the engine's own code runs], or the refusal."""
    with Session(program, {ALLOW: "", INSTALLED: ""} | dict(environment or {})) as session:
        assert session.ask({"open": str(bundle)}) == str(bundle)
        return session.ask({"is_allowed": is_allowed, "installed": str(installed or "")})


def refused(answer: Any, *parts: str, status: int = BUNDLE) -> None:
    assert isinstance(answer, dict), answer
    assert answer["status"] == status, answer
    for part in parts:
        assert part in answer["message"], answer["message"]


def lean_bundle(folder: Path) -> Path:
    """Carries TensorRT's lean runtime inside the engine, and no plugins."""
    return write_checksum_bundle(folder, host_code="", facts={"version_compatible": True})


def copy_bundle(folder: Path) -> Path:
    """Carries the plugin library inside the engine too, as a version-compatible build does."""
    plugins = PluginFacts(PLUGIN_LIBRARY, SHA256, in_engine=True, ops=("QwenGQA",))
    facts = {"version_compatible": True, "plugins": plugins}
    return write_checksum_bundle(folder, plugins=True, host_code=PLUGIN_CONTENT, facts=facts)


def test_a_library_that_is_not_this_machines_own(program: Path, bundle: Path, tmp_path: Path) -> None:
    library = f"the plugin library {bundle / PLUGIN_LIBRARY};"
    refused(decide(program, bundle), library, f"in the bundle: {SHA256}\n", f"none installed ({INSTALLED} names none)")
    none = {INSTALLED: str(tmp_path / "none.so")}
    refused(
        decide(program, bundle, environment=none), f"none installed ({INSTALLED} names it: ", "none.so", "No such file"
    )
    refused(decide(program, bundle, installed=tmp_path), "none installed (the option names it: ", "not a regular file")
    other = tmp_path / "other.so"
    other.write_text("what plugins were")
    digest = hashlib.sha256(b"what plugins were").hexdigest()
    for answer in (
        decide(program, bundle, installed=other),
        decide(program, bundle, environment={INSTALLED: str(other)}),
    ):
        refused(answer, f"in the bundle: {SHA256}\n", f"of the installed plugin library: {digest}\n")
        refused(answer, f"allow it: qwen_aot_options_set_allow_bundle_code, or {ALLOW}=1")


def test_this_machines_own_library_is_named_and_not_the_bundles(
    program: Path, bundle: Path, own: Path, tmp_path: Path
) -> None:
    for is_allowed in (False, True):  # allowed, and still needless
        assert decide(program, bundle, installed=own, is_allowed=is_allowed) == [str(own), False]
        assert decide(program, bundle, environment={INSTALLED: str(own)}, is_allowed=is_allowed) == [str(own), False]
    # The option comes before the environment.
    other = tmp_path / "other.so"
    other.write_text("what plugins were")
    refused(decide(program, bundle, installed=other, environment={INSTALLED: str(own)}), "it isn't this machine's own")
    # It is followed at once: a link that is turned later brings nothing in.
    link = tmp_path / "link.so"
    link.symlink_to(own)
    assert decide(program, bundle, installed=link) == [str(own), False]


@pytest.mark.parametrize(("is_allowed", "environment"), [(True, {}), (False, {ALLOW: "1"})])
def test_an_allowed_library(program: Path, bundle: Path, is_allowed: bool, environment: Mapping[str, str]) -> None:
    answer = decide(program, bundle, is_allowed=is_allowed, environment=environment)
    assert answer == [str((bundle / PLUGIN_LIBRARY).resolve()), False]


@pytest.mark.parametrize("value", ["", "0", "2", "true", "yes", "11", "1 "])
def test_another_value_of_the_variable_allows_nothing(program: Path, bundle: Path, tmp_path: Path, value: str) -> None:
    remark = f"{ALLOW}=1 (the variable is '{value}'; accepted: 1)" if value else f"{ALLOW}=1"
    for path in (bundle, lean_bundle(tmp_path / "lean")):
        refused(decide(program, path, environment={ALLOW: value}), remark)


def test_a_changed_library_is_not_named_though_its_hash_was_skipped(program: Path, bundle: Path, own: Path) -> None:
    library = bundle / PLUGIN_LIBRARY
    with Session(program, {ALLOW: "", INSTALLED: str(own)}) as session:
        assert session.ask({"open": str(bundle), "hash_limit": 1}) == str(bundle)
        library.write_text(PLUGIN_CONTENT.upper())
        for is_allowed in (False, True):
            refused(
                session.ask({"is_allowed": is_allowed}),
                "has the SHA-256 ",
                f"and the engine was built with {SHA256}: copy the bundle again",
            )
        library.unlink()
        refused(session.ask({"is_allowed": True}), "the plugin library: ", "No such file", status=IO)


def test_a_copy_inside_the_engine_is_never_this_machines_own(program: Path, own: Path, tmp_path: Path) -> None:
    """What else lies beside an honest copy can't be seen: so the same hash isn't enough here."""
    bundle = copy_bundle(tmp_path / "bundle")
    refused(
        decide(program, bundle, installed=own),
        "code inside the engine",
        "engine.plan: a copy of the plugin library;",
        f"in the bundle: {SHA256} (so the manifest claims)\n",
        f"of the installed plugin library: {SHA256}\n",
    )
    assert decide(program, bundle, is_allowed=True) == ["", True]


def test_the_lean_runtime_of_a_version_compatible_engine(program: Path, tmp_path: Path) -> None:
    bundle = lean_bundle(tmp_path / "bundle")
    digest = hashlib.sha256((bundle / "engine.plan").read_bytes()).hexdigest()
    refused(
        decide(program, bundle),
        "engine.plan: TensorRT's lean runtime; ",
        "an engine built without --version-compatible has none",
        f"in the bundle: {digest} (the engine's)\n",
    )
    assert decide(program, bundle, is_allowed=True) == ["", True]


def test_a_version_compatible_engine_with_its_library_beside_it(program: Path, own: Path, tmp_path: Path) -> None:
    bundle = write_checksum_bundle(tmp_path / "bundle", plugins=True, host_code="", facts={"version_compatible": True})
    refused(decide(program, bundle, installed=own), "lean runtime")
    library = str((bundle / PLUGIN_LIBRARY).resolve())
    assert decide(program, bundle, is_allowed=True) == [library, True]
    assert decide(program, bundle, is_allowed=True, installed=own) == [str(own), True]


def test_a_bundle_without_code_asks_for_nothing(program: Path, tmp_path: Path) -> None:
    assert decide(program, write_checksum_bundle(tmp_path / "plain")) == ["", False]
