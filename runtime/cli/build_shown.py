"""What a build, or a part of one, shows at its end: its sizes before anything is written, or what it took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_aot.machine import available_memory_bytes, free_disk_bytes
from qwen_aot.runtime.cli.console import count, duration, print_json, size, stdout
from qwen_aot.runtime.cli.tables import print_facts, print_table, say

if TYPE_CHECKING:
    from qwen_aot.engines.bundle.build_report import BuildReport
    from qwen_aot.engines.bundle.resources import Estimate


def show_estimate(estimate: Estimate, warnings: Sequence[str], out: Path, *, as_json: bool) -> None:
    """Of `--dry-run`."""
    facts = {
        "bundle": str(out),
        "bundle_bytes": estimate.bundle_bytes,
        "disk_bytes": estimate.disk_bytes,
        "free_disk_bytes": free_disk_bytes(out),
        "peak_memory_bytes": estimate.peak_memory_bytes,
        "available_memory_bytes": available_memory_bytes(),
        "seconds": estimate.seconds,
        "threads": estimate.threads,
        "warnings": list(warnings),
    }
    if as_json:
        print_json(facts)
        return
    console = stdout()
    print_facts(
        console,
        [
            (
                "bundle",
                f"{size(estimate.bundle_bytes)} ({size(estimate.disk_bytes)} on disk meanwhile, "
                f"{size(free_disk_bytes(out))} free)",
            ),
            ("memory", f"about {size(estimate.peak_memory_bytes)} ({size(available_memory_bytes())} available)"),
            ("time", f"about {duration(estimate.seconds)} from here, {count(estimate.threads, 'thread')}"),
        ],
    )
    say(console, "nothing was written (--dry-run)")


def show_report(report: BuildReport, done: str, *, as_json: bool) -> None:
    """Of what was done, "built" for example."""
    if as_json:
        print_json({"bundle": str(report.out), **report.to_json()})
        return
    console = stdout()
    costs = [(cost.stage, duration(cost.seconds), size(cost.peak_memory_bytes)) for cost in report.stages]
    print_table(console, ("stage", "time", "peak memory"), costs, numbers=("time", "peak memory"))
    manifest = report.manifest
    say(
        console,
        f"{report.out}: {manifest.target} {manifest.engines.text.precision}, "
        f"{size(sum(entry.bytes for entry in manifest.files.values()))}, {done} in {duration(report.seconds)}, "
        f"peak memory {size(report.peak_memory_bytes)}",
    )
