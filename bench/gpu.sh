#!/usr/bin/env bash
# All that a GPU must show, in under nine minutes, with PyTorch and NumPy alone: bench/gpu.sh [--out FILE.json]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu.py "$@"
