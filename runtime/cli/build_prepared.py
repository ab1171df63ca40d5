"""`build-engine FOLDER` of a build that another machine prepared: compiles it, with the options that go with that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qwen_aot.extras import EXTRA_OF, how_to_install
from qwen_aot.runtime.cli.build_shown import show_estimate, show_report
from qwen_aot.runtime.cli.console import progress_on_stderr, show_logs

__all__ = ["compile_folder"]

_ANYWHERE = ("checkpoint", "out", "dry_run", "as_json")
_OF_THE_COMPILER = (
    "compute_capability",
    "hardware_compatible",
    "optimization_level",
    "plugin_library",
    "strip_weights",
    "timing_cache",
    "version_compatible",
    "workspace_mib",
)


def compile_folder(context: click.Context, folder: Path, out: Path, *, dry_run: bool, as_json: bool) -> None:
    """Compiles a prepared build, with the options that were given.

    Raises:
        click.UsageError: one was given that was decided where the build was prepared.
    """
    show_logs()
    from qwen_aot.errors import BuildError

    changes = _changes(context, folder)
    try:
        from qwen_aot.engines.compile_prepared import compile_prepared, estimate_of, with_options
        from qwen_aot.engines.prepared_folder import read_prepared
    except (
        ModuleNotFoundError
    ) as error:  # the extra `build` would bring it too, and torch, which a device can do without
        if EXTRA_OF.get((error.name or "").partition(".")[0]) != "build":
            raise
        raise BuildError(
            f"compiling a prepared build needs the package {error.name!r}, which isn't installed; "
            f"{how_to_install('compile')}"
        ) from error
    prepared = read_prepared(folder)
    try:
        with_options(prepared.spec, changes)
    except BuildError as error:
        raise click.UsageError(str(error)) from None
    if dry_run:
        show_estimate(estimate_of(prepared), (), out, as_json=as_json)
        return
    with progress_on_stderr() as show:
        report = compile_prepared(folder, out, changes, on_progress=show)
    show_report(report, "compiled", as_json=as_json)


def _changes(context: click.Context, folder: Path) -> dict[str, Any]:
    """Options of TensorRT that the command line gives, by the names of `TensorRtOptions`' fields."""
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    options = {parameter.name: parameter.opts[-1] for parameter in context.command.params}
    if decided := sorted(str(options[name]) for name in given if name not in _ANYWHERE + _OF_THE_COMPILER):
        accepted = ", ".join(str(options[name]) for name in (*_ANYWHERE[1:], *_OF_THE_COMPILER))
        raise click.UsageError(
            f"{folder} was prepared by another build, which decided {', '.join(decided)}; accepted here: {accepted}"
        )
    changes = {name: context.params[name] for name in given if name in _OF_THE_COMPILER}
    if "workspace_mib" in changes:
        changes["workspace_bytes"] = changes.pop("workspace_mib") << 20
    if "compute_capability" in changes:
        changes["compute_capabilities"] = tuple(changes.pop("compute_capability").split(","))
    return changes
