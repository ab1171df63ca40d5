"""`inspect`: what a checkpoint, an ONNX file or a bundle holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from qwen_aot.runtime.bundle.manifest import MANIFEST_NAME
from qwen_aot.runtime.cli import inspect_plan
from qwen_aot.runtime.cli.command import EXIT_FAILED, VerbCommand, option
from qwen_aot.runtime.cli.console import busy, print_json, show_logs, size, stdout
from qwen_aot.runtime.cli.options import CONTEXT, GivenPath, json_option
from qwen_aot.runtime.cli.tables import print_facts, print_table


@click.command("inspect", cls=VerbCommand, context_settings=CONTEXT)
@click.argument("path", type=GivenPath(exists=True))
@option("--hash/--no-hash", "with_hash", default=True, help="Check a bundle's files against their SHA-256.")
@option("--tensors", "list_tensors", is_flag=True, help="List every tensor, and every layer's inputs and outputs.")
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

        with busy(f"{'checking' if with_hash else 'reading'} {path}"):
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
        show(facts, is_folded=not list_tensors)
    if any(file["status"] not in ("ok", "size ok") for file in facts.get("files", ())):
        click.get_current_context().exit(EXIT_FAILED)


def show(facts: Mapping[str, Any], *, is_folded: bool) -> None:
    """Prints scalars as one list of facts, and each list of objects as a table of its own.

    Args:
        facts: by name.
        is_folded: whether inputs and outputs that differ in the layer's number only are one row.
    """
    plan = facts.get("plan")
    if plan is not None:
        facts = {**{name: value for name, value in facts.items() if name != "plan"}, **inspect_plan.tables(plan)}
    console = stdout()
    print_facts(
        console,
        [
            (name, _cell(name, value))
            for name, value in facts.items()
            if name not in ("kind", "path") and not _is_table(value)
        ],
        title=f"{facts['kind']}: {facts['path']}",
    )
    for name, value in facts.items():
        if _is_table(value):
            rows = [[_cell(column, item) for column, item in row.items()] for row in value]
            headings = list(value[0])
            if name == "io" and is_folded:
                rows = _fold_layers(rows, headings.index("name"))
            console.print()
            print_table(console, headings, rows, title=name)


def _fold_layers(rows: Sequence[Sequence[str]], at: int) -> list[list[str]]:
    """Rows whose names differ in one number only, at the place of the first of them: `past.{0 … 23}.key`."""
    layers: dict[tuple[str, ...], list[int]] = {}
    plain: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        before, number, after = (*re.split(r"(?<=\.)(\d+)(?=\.)", row[at], maxsplit=1), "", "")[:3]
        key = (before, after, *row[:at], *row[at + 1 :])
        plain[key] = list(row)
        layers.setdefault(key, []).extend([int(number)] if number else [])
    folded = []
    for key, row in plain.items():
        found = layers[key]
        if len(found) > 1:
            is_whole = found == list(range(found[0], found[-1] + 1))
            row[at] = f"{key[0]}{{{f'{found[0]} … {found[-1]}' if is_whole else ', '.join(map(str, found))}}}{key[1]}"
        folded.append(row)
    return folded


def _is_table(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith(("bytes", "bytes_estimated")):
        return size(value) if value < 1000 else f"{size(value)} ({value:,})"
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(key, item)}" for key, item in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return str(value)
