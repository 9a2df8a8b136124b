#!/usr/bin/env bash
# The whole main job on a fresh machine: installs into .venv, then runs `mmcl demo` with the arguments given here.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
ensure_environment demo
exec .venv/bin/mmcl demo "$@"
