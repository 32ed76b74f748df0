#!/usr/bin/env bash
# Proves the kernels on a machine that may have no network: bench/gpu.sh [--cpu] [results folder]
#
# Builds the extension, runs the tests and every benchmark in under nine minutes, and leaves in <folder>/<machine>:
# machine.txt (environment, then what passed), log.txt, and a .jsonl and .png a benchmark. Fails if a step did.
#
#   PYTHON   an interpreter that has torch and triton; python3
#   WHEELS   a folder of wheels to put beside what it has
#   TESTS, BENCHES   a part of the steps
#   --cpu, or DEVICE=cpu   the same steps on the CPU, the benchmarks at their smallest
set -euo pipefail

device=${DEVICE:-cuda}
if [[ ${1:-} == --cpu ]]; then device=cpu; shift; fi
results=$(realpath -m "${1:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
read -ra tests <<<"${TESTS-tests/kernels tests/sync tests/engine}"
read -ra benches <<<"${BENCHES-fp8_quantize fused_lora logprobs sync engine}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=$PWD:$PWD/kernels:$scratch/site XORL_TUNING=$scratch/tuning.json TRITON_DEFAULT_FP_FUSION=1
size=(--small)
if [[ $device == cuda ]]; then size=(); export TRITON_INTERPRET=0; fi

# Seconds that a step may take, on the CPU twice as many. They add up to more than the deadline, which cuts the last
# ones short.
declare -A budget=([install]=60 [build]=120 [tests/kernels]=120 [tests/sync]=60 [tests/engine]=100
  [fp8_quantize]=100 [fused_lora]=160 [logprobs]=60 [sync]=60)
deadline=525
failed=0

main() {
  name=$("$python" -c "import torch; print(torch.cuda.get_device_name() if '$device' == 'cuda' else 'cpu')")
  folder=$results/$(tr -cs '[:alnum:]\n' - <<<"${name,,}")
  mkdir -p "$folder"
  : >"$folder/log.txt"
  describe_machine >"$folder/machine.txt" 2>&1
  if [[ -n ${WHEELS:-} ]]; then
    step install "$python" -m pip install --no-index --no-deps --target "$scratch/site" "$WHEELS"/*.whl
  fi
  if ! "$python" -c "import torch, xorl._C" 2>/dev/null; then
    step build env XORL_REQUIRE_EXT=1 "$python" setup.py build_ext --inplace
  fi
  # A folder at a time: one whose conftest.py wants a package that isn't here does not stop the others.
  for tests_of in "${tests[@]}"; do
    step "$tests_of" "$python" -m pytest -q -p no:cacheprovider -m "not slow" --continue-on-collection-errors "$tests_of"
  done
  for bench in "${benches[@]}"; do
    step "$bench" "$python" -m "bench.$bench" --device "$device" "${size[@]}" \
      --json "$folder/$bench.jsonl" --png "$folder/$bench.png"
  done
  echo "results in $folder, $SECONDS s in all" | tee -a "$folder/machine.txt"
  exit $((failed > 0))
}

# step NAME COMMAND...: runs it within its budget; says how it ended, and its last line.
step() {
  local name=$1 started=$SECONDS outcome=passed code=0 limit=${budget[$1]:-60}
  shift
  if [[ $device == cpu ]]; then limit=$((2 * limit)); fi
  limit=$((limit < deadline - SECONDS ? limit : deadline - SECONDS))
  echo "== $name: $*" >>"$folder/log.txt"
  if ((limit <= 0)); then
    outcome="no time left"
  else
    timeout --kill-after=5 "$limit" "$@" >"$scratch/output" 2>&1 || code=$?
    cat "$scratch/output" >>"$folder/log.txt"
    case $code in 0) ;; 124 | 137) outcome="timed out" ;; *) outcome="failed ($code)" ;; esac
  fi
  [[ $outcome == passed ]] || failed=$((failed + 1))
  printf '%-14s %-12s %4d s  %s\n' "$name" "$outcome" $((SECONDS - started)) \
    "$(grep -v '^\s*$' "$scratch/output" 2>/dev/null | tail -1 | cut -c-120)" | tee -a "$folder/machine.txt"
}

describe_machine() {
  echo "$name, $(date -u +%F), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
  nvidia-smi || echo "no nvidia-smi"
  "$python" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

print("python", python_version())
for package in ("torch", "triton", "numpy", "transformers", "peft", "pytest", "hypothesis", "msgspec", "matplotlib"):
    try:
        print(package, version(package))
    except PackageNotFoundError:
        print(package, "is missing")
PYTHON
}

main
