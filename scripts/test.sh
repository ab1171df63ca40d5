#!/bin/sh
# Installs what tests need and runs every check: format, lint, types, tests. Arguments go to pytest.
# docs/testing.md says what is left to .ci/deep.
. "$(dirname "$0")/setup.sh"
install dev
fetch_model
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
find examples plugins runtime tests -name '*.[ch]' -o -name '*.cpp' -o -name '*.hpp' | xargs .venv/bin/clang-format --dry-run --Werror
exec .venv/bin/python -m pytest -n 2 --dist worksteal -m "not gpu and not network and not deep" "$@"
