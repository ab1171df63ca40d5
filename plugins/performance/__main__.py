"""`python -m qwen_aot.plugins.performance`: prints the model's tables, or makes files from it anew."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen_aot.errors import BuildError
from qwen_aot.plugins.performance import resources, tables


def main() -> int:
    """The command line. Exit codes: 0 ok, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_aot.plugins.performance",
        description="Print the tables of docs/plugins-performance.md.",
        epilog="Examples:\n  python -m qwen_aot.plugins.performance\n"
        "  python -m qwen_aot.plugins.performance --update build/kernels --document docs/plugins-performance.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--update", type=Path, metavar="FOLDER", help="first read resources that plugins.aot compiled")
    parser.add_argument("--document", type=Path, help="write the tables into this file instead of printing them")
    arguments = parser.parse_args()
    try:
        if arguments.update is not None:
            resources.write(arguments.update)
        if arguments.document is not None:
            arguments.document.write_text(tables.filled_in(arguments.document.read_text()))
        else:
            print("\n\n".join(f"## {name}\n\n{table}" for name, table in tables.tables().items()))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
