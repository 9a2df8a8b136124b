#!/usr/bin/env bash
# The tests on a fresh machine: installs into .venv, then checks and tests.
#   tools/test.sh            the default suite, under 5 minutes on two cores
#   tools/test.sh --all      everything, with types and the browser, under 25 minutes
#   tools/test.sh --soak     memory over 20,000 decoded samples with each decoder, and runs killed at 20 random moments
#                            each on 1, 2 and 3 processes: an hour
#   tools/test.sh [--all] -k NAME …   further arguments go to pytest
set -euo pipefail
. "$(dirname "$0")/environment.sh"
all=false
if [ "${1:-}" = "--all" ]; then
  all=true
  shift
fi
if [ "${1:-}" = "--soak" ]; then
  shift
  ensure_environment dev
  .venv/bin/python tools/bench/soak.py "$@"
  exec .venv/bin/python tools/bench/chaos.py
fi
ensure_environment dev
parallel=(-n 2 --dist worksteal) # much of a test's time is spent waiting for processes to start
say "ruff"
.venv/bin/ruff check --quiet . && .venv/bin/ruff format --quiet --check .
if $all; then
  say "mypy --strict mmcl"
  .venv/bin/mypy --strict mmcl
  exec .venv/bin/python -m pytest "${parallel[@]}" "$@"
fi
exec .venv/bin/python -m pytest "${parallel[@]}" -m "not slow" "$@"
