"""Writes the tables of docs/testing.md from a log of pytest: the slowest tests, and seconds by folder.

sh scripts/test.sh --durations=0 --durations-min=0 2>&1 | tee LOG    # on a quiet machine
python scripts/test_times.py LOG
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "testing.md"
BEGIN, END = "<!-- times: scripts/test_times.py -->", "<!-- end of times -->"
SLOWEST = 20
_LINE = re.compile(r"^\s*([0-9.]+)s (?:setup|call|teardown)\s+(\S.*?)\s*$", re.MULTILINE)
_TOTAL = re.compile(r"^=*\s*(.*\bpassed\b.*? in .*?)\s*=*$", re.MULTILINE)


def read(log: str) -> Counter[str]:
    """Seconds by test: set-up, call and teardown together.

    Raises:
        SystemExit: the log has no durations.
    """
    seconds: Counter[str] = Counter()
    for amount, test in _LINE.findall(log):
        seconds[test] += float(amount)
    if not seconds:
        raise SystemExit("error: the log has no durations; run pytest with --durations=0")
    return seconds


def tables(seconds: Counter[str], total: str) -> str:
    """Markdown: the run's own last line, seconds by folder, and the slowest tests."""
    folders: Counter[str] = Counter()
    for test, amount in seconds.items():
        parts = Path(test.split("::")[0]).parts
        folders["/".join(parts[: min(3, len(parts) - 1)])] += amount
    lines = [f"{total}\n" if total else "", f"{sum(seconds.values()):.0f} s of {len(seconds)} tests.\n"]
    lines += ["| folder | s |", "| --- | ---: |"]
    lines += [f"| `{folder}` | {amount:.0f} |" for folder, amount in folders.most_common() if amount >= 1]
    lines += ["", "| test | s |", "| --- | ---: |"]
    lines += [f"| `{test.removeprefix('tests/')}` | {amount:.1f} |" for test, amount in seconds.most_common(SLOWEST)]
    return "\n".join(line for index, line in enumerate(lines) if line or index)


def replaced(document: str, text: str) -> str:
    """The document with `text` between its two marks.

    Raises:
        SystemExit: a mark is missing.
    """
    before, found_begin, rest = document.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found_begin or not found_end:
        raise SystemExit(f"error: {DOCUMENT.name} lacks the marks {BEGIN} and {END}; put them where the tables belong")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    """Reads the log that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="what pytest printed with --durations=0, or a file of --cpu-times")
    log = parser.parse_args().log.read_text(encoding="utf-8")
    totals = _TOTAL.findall(log)
    text = tables(read(log), totals[-1] if totals else "")
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
