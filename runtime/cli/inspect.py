"""`inspect`: what a checkpoint, an ONNX file or a bundle holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from qwen_aot.runtime.bundle.manifest import MANIFEST_NAME
from qwen_aot.runtime.cli.command import EXIT_FAILED, VerbCommand, option
from qwen_aot.runtime.cli.console import print_json, show_logs, size, stdout
from qwen_aot.runtime.cli.options import CONTEXT, GivenPath, json_option


@click.command("inspect", cls=VerbCommand, context_settings=CONTEXT)
@click.argument("path", type=GivenPath(exists=True))
@option("--hash/--no-hash", "with_hash", default=True, help="Check a bundle's files against their SHA-256.")
@option("--tensors", "list_tensors", is_flag=True, help="List every tensor.")
@json_option
def command(path: Path, with_hash: bool, list_tensors: bool, as_json: bool) -> None:
    """Show a checkpoint, an ONNX file or a bundle as a table.

    \b
    Examples:
      qwen-aot inspect ./bundle
      qwen-aot inspect ./Qwen1.5-0.5B-Chat --tensors --json

    Exits with 1 if a bundle's file is missing or damaged.
    """
    show_logs()
    if (path / MANIFEST_NAME).is_file():
        from qwen_aot.runtime.cli import inspect_bundle

        facts = inspect_bundle.facts(path, with_hash=with_hash)
    elif path.suffix == ".onnx" or (path / "model.onnx").is_file():
        from qwen_aot.runtime.cli import inspect_onnx

        facts = inspect_onnx.facts(path if path.suffix == ".onnx" else path / "model.onnx", list_tensors=list_tensors)
    else:
        from qwen_aot.runtime.cli import inspect_checkpoint

        facts = inspect_checkpoint.facts(path, list_tensors=list_tensors)
    if as_json:
        print_json(facts)
    else:
        show(facts)
    if any(file["status"] not in ("ok", "size ok") for file in facts.get("files", ())):
        click.get_current_context().exit(EXIT_FAILED)


def show(facts: Mapping[str, Any]) -> None:
    """Prints scalars as one table of facts, and each list of objects as a table of its own."""
    from rich.table import Table

    console = stdout()
    table = Table(title=f"{facts['kind']}: {facts['path']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if name not in ("kind", "path") and not _is_table(value):
            table.add_row(name, _cell(name, value))
    console.print(table)
    for name, value in facts.items():
        if _is_table(value):
            rows = Table(title=name)
            for column in value[0]:
                rows.add_column(column, overflow="fold")
            for row in value:
                rows.add_row(*(_cell(column, item) for column, item in row.items()))
            console.print(rows)


def _is_table(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith(("bytes", "bytes_estimated")):
        return f"{size(value)} ({value:,})"
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(key, item)}" for key, item in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return str(value)
