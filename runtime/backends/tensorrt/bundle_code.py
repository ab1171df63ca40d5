"""Which native code of a bundle may run: this machine's own plugin library, or what the user allowed by name.

A bundle brings code for the host in three forms: the file of the plugin library; a copy of it inside the engine; and
the lean runtime inside a version-compatible engine. Only the first can be compared before it runs. What lies inside an
engine is unpacked by TensorRT, which runs either all of it or none, so that one sound library found there would say
nothing of what else is there. `docs/security.md` says what is left: an engine also is code for the GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qwen_aot.errors import EngineMismatchError
from qwen_aot.runtime.bundle.load import Bundle
from qwen_aot.runtime.bundle.manifest import PluginFacts, TensorRtFacts
from qwen_aot.runtime.bundle.plugin_library import PLUGIN_LIBRARY_VARIABLE, named_plugin_library
from qwen_aot.whole_file import file_sha256

__all__ = ["ALLOW_BUNDLE_CODE_VARIABLE", "BundleCode", "bundle_code"]

ALLOW_BUNDLE_CODE_VARIABLE = "QWEN_AOT_ALLOW_BUNDLE_CODE"  # of the environment; "1" is the option's yes


@dataclass(frozen=True, slots=True)
class BundleCode:
    """What an engine may load and run on the host.

    Attributes:
        plugin_library: to be loaded before the engine; None: there is none, or the engine holds it.
        runs_engine_code: whether TensorRT may run what the engine itself carries.
    """

    plugin_library: Path | None = None
    runs_engine_code: bool = False


@dataclass(frozen=True, slots=True)
class _Installed:
    """This machine's own plugin library.

    Attributes:
        path: None: there is none to compare with.
        text: its SHA-256, or why there is none.
    """

    path: Path | None
    text: str


def bundle_code(bundle: Bundle, facts: TensorRtFacts, *, is_allowed: bool) -> BundleCode:
    """What of a bundle's code may run; asked before TensorRT is imported.

    The plugin library is hashed however large it is, and whether or not the bundle's files were. Where it equals this
    machine's own, that one is loaded and not the bundle's: so nothing can be exchanged between the look and the load.

    Args:
        bundle: checked.
        facts: of its engine.
        is_allowed: the caller lets the bundle run code of its own; so does QWEN_AOT_ALLOW_BUNDLE_CODE=1.

    Raises:
        EngineMismatchError: it has code that is neither this machine's own nor allowed, or a damaged library.
    """
    is_allowed = is_allowed or os.environ.get(ALLOW_BUNDLE_CODE_VARIABLE) == "1"
    plugins = facts.plugins
    if facts.version_compatible or (plugins is not None and plugins.in_engine):
        if not is_allowed:
            why = "it can't be looked at before it runs; an engine built without --version-compatible has none"
            raise _refused(*_inside(bundle, plugins), _installed(), why)
        if plugins is None or plugins.in_engine:
            return BundleCode(runs_engine_code=True)
        return BundleCode(_library(bundle, plugins, is_allowed=True), runs_engine_code=True)
    return BundleCode() if plugins is None else BundleCode(_library(bundle, plugins, is_allowed=is_allowed))


def _library(bundle: Bundle, plugins: PluginFacts, *, is_allowed: bool) -> Path:
    """This machine's own library where it is the bundle's too, else the bundle's, if that is allowed."""
    path = bundle.path / plugins.file
    try:
        found = file_sha256(path)
    except OSError as error:
        raise EngineMismatchError(
            f"the plugin library {path} can't be read ({error.strerror}): copy the whole bundle again, or delete it "
            "and build it anew"
        ) from error
    if found != plugins.sha256:
        raise EngineMismatchError(
            f"the plugin library {path} has the SHA-256 {found}, and the engine was built with {plugins.sha256}: copy "
            "the bundle again, or delete it and build it anew"
        )
    installed = _installed()
    if installed.path is not None and installed.text == found:
        return installed.path
    if is_allowed:
        return path
    why = f"it isn't this machine's own: if you built it, name it in {PLUGIN_LIBRARY_VARIABLE}"
    raise _refused(f"the plugin library {path}", found, installed, why)


def _inside(bundle: Bundle, plugins: PluginFacts | None) -> tuple[str, str]:
    """What an engine carries, and the hash that stands for it."""
    engine = bundle.manifest.engines.text.file
    where = f"code inside the engine {bundle.path / engine}"
    if plugins is not None and plugins.in_engine:
        return f"{where}: a copy of the plugin library", f"{plugins.sha256} (so the manifest claims)"
    return f"{where}: TensorRT's lean runtime", f"{bundle.manifest.files[engine].sha256} (the engine's)"


def _installed() -> _Installed:
    path = named_plugin_library()
    if path is None:
        return _Installed(None, f"none installed ({PLUGIN_LIBRARY_VARIABLE} names none)")
    try:
        return _Installed(path, file_sha256(path))
    except OSError as error:
        return _Installed(None, f"none installed ({PLUGIN_LIBRARY_VARIABLE} names {path}: {error.strerror})")


def _refused(what: str, sha256: str, installed: _Installed, why: str) -> EngineMismatchError:
    given = os.environ.get(ALLOW_BUNDLE_CODE_VARIABLE, "")
    remark = f" (the variable is {given!r}; accepted: 1)" if given else ""
    return EngineMismatchError(
        f"the bundle brings native code, which would run with your rights: {what}; {why}.\n"
        f"  SHA-256 in the bundle: {sha256}\n"
        f"  of the installed plugin library: {installed.text}\n"
        "If you trust whoever built it as you would trust a program of theirs, allow it: --allow-bundle-code, "
        f"{ALLOW_BUNDLE_CODE_VARIABLE}=1{remark}, or allow_bundle_code=True in Python"
    )
