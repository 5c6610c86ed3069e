#!/usr/bin/env bash
# Everything to be measured on a GPU, in two windows of eight minutes each: bench/gpu.sh, then bench/gpu.sh --window 2
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench.gpu "$@"
