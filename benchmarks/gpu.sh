#!/usr/bin/env bash
# Everything that needs an accelerator, in one command: what is here, tests, correctness, then figures.
#
#   benchmarks/gpu.sh                                # 1.1 B parameters, within 12 minutes on one device
#   benchmarks/gpu.sh --shape 8b --rows 4 --accumulate 2
#   benchmarks/gpu.sh --tiny --device cpu            # does it run at all?
#   PYTHONPATH=tests benchmarks/gpu.sh --tiny --plugin simulated_device    # a rehearsal, on the device of the tests
#
# What matters most comes first, each part has a limit of its own, and each writes its result as it ends: a run that is
# cut off keeps what it had. Arguments go to gpu.py. PYTHON chooses the interpreter, OUT the folder for results.
# Nothing is downloaded.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results}"
mkdir -p "$out"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
status=0

part() {  # part NAME SECONDS COMMAND...
    local name="$1" limit="$2" begin=$SECONDS code=0
    shift 2
    echo "--- $name"
    timeout --kill-after=10 "$limit" "$@" || code=$?
    [ "$code" -eq 124 ] && echo "    cut off after $limit s"
    [ "$code" -ne 0 ] && status=1
    printf '{"part": "%s", "status": %d, "seconds": %d}\n' "$name" "$code" "$((SECONDS - begin))" >> "$out/gpu-parts.jsonl"
}

plugin=()
device=()
tiny=()
previous=""
for argument in "$@"; do
    [ "$previous" = "--device" ] && device=(--device "$argument")
    [ "$previous" = "--plugin" ] && plugin=(--plugin "$argument")
    [ "$argument" = "--tiny" ] && tiny=(--tiny)
    previous="$argument"
done
: > "$out/gpu-parts.jsonl"

part environment 60 "$python" benchmarks/environment.py "${plugin[@]}" --out "$out"
if "$python" -c "import pytest" 2>/dev/null; then
    part tests 150 "$python" -m pytest -q -m gpu tests
else
    echo "--- tests: pytest is not installed"
fi
part correctness 120 "$python" benchmarks/gpu.py --check --out "$out" "${device[@]}" "${plugin[@]}"
part figures 360 "$python" benchmarks/gpu.py --out "$out" --loops 2 --steps 4 \
    --arms sw-device,sw-cpu,fsdp-cpu,sw-cpu-all,fsdp-device,sw-nvme,sw-cpu-backward,sw-cpu-all-backward "$@"
if [ "${device[*]}" != "--device cpu" ]; then
    part inference 90 "$python" benchmarks/gpu_inference.py --out "$out" "${plugin[@]}" "${tiny[@]}"
    part planner 150 "$python" benchmarks/gpu_planner.py --out "$out" "${plugin[@]}" "${tiny[@]}"
    part two-ranks 130 "$python" benchmarks/gpu_two_ranks.py --out "$out" "${plugin[@]}"
fi
exit "$status"
