#!/usr/bin/env bash
# All that a GPU must show, in two windows of eight minutes each: bench/gpu.sh, then bench/gpu.sh --window 2
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu.py "$@"
