"""A bundle's `plan` as tables for `inspect`: what the compiler made of each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {"matrix_products": "matrix products", "copies": "copies", "weight_scratch": "weight-sized scratch"}


def tables(plan: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Title -> rows, each with its step; without those that have no row."""
    kernels = [
        {"step": step, "kernels": facts["kernels"], "kernels of a layer": _range(facts["layer_kernels"])}
        for step, facts in plan.items()
    ]
    found = {
        title: [{"step": step, **_readable(item)} for step, facts in plan.items() for item in facts[key]]
        for key, title in _KINDS.items()
    }
    return {"kernels": kernels, **{title: rows for title, rows in found.items() if rows}}


def _range(counts: list[int]) -> str:
    if not counts:
        return "not told"
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"


def _readable(item: Mapping[str, Any]) -> dict[str, Any]:
    if "left" in item:
        types = f"{item['left']} × {item['right']} → {item['output']}"
        return {"name": item["name"], "types": types, "count": item["count"]}
    return dict(item)
