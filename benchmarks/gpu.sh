#!/usr/bin/env bash
# Everything that needs an accelerator, in one command: what is here, tests, correctness, then figures.
#
#   benchmarks/gpu.sh                                # 1.1 B parameters
#   benchmarks/gpu.sh --shape 8b --rows 4 --accumulate 2
#   benchmarks/gpu.sh --tiny --device cpu            # does it run at all?
#
# Arguments go to gpu.py. PYTHON chooses the interpreter. Nothing is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"

echo "--- environment"
nvidia-smi --query-gpu=name,driver_version,memory.total,pcie.link.gen.max --format=csv 2>/dev/null || echo "no nvidia-smi"
"$python" - <<'PYTHON'
import os, platform, torch
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
      f"{torch.cuda.device_count()} device(s), {os.cpu_count()} cores, {memory:.0f} GiB")
PYTHON

echo "--- tests that need a device"
if "$python" -c "import pytest" 2>/dev/null; then
    "$python" -m pytest -m gpu tests
else
    echo "pytest is not installed: skipped"
fi

device=cuda
previous=""
for argument in "$@"; do
    if [ "$previous" = "--device" ]; then device="$argument"; fi
    previous="$argument"
done
echo "--- correctness"
"$python" benchmarks/gpu.py --check --device "$device"

echo "--- figures"
"$python" benchmarks/gpu.py "$@"
