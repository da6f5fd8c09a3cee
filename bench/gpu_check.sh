#!/usr/bin/env bash
# What is checked and measured on a GPU, in stages that each end within minutes:
#   bench/gpu_check.sh STAGE...
#     smoke      the library loads; every tier on a few small problems
#     tests      pytest, what wants a GPU, with the stamp that bench wants: a minute on 14 cores
#                                                             ($PYTEST_ARGS instead)
#     sanitize   compute-sanitizer on small problems, each tool and tier a process of its own, all
#                at once                                     ($SANITIZERS, $TARGETS, $SECONDS_EACH)
#     bench      times and ratios                             ($BENCH_ARGS of bench.run)
#     sweep      the figure: time over length, over state size
#     around     the kernels around the scan                  ($AROUND_ARGS of bench.around)
#     model      mixer, training step, generation             ($MODEL_ARGS of bench.model)
#     accuracy   errors beside the rival's                    ($ACCURACY_ARGS of bench.accuracy)
#     ranks      one sequence on two GPUs
#     recall     associative recall, a grid of models         ($RECALL_SECONDS)
#     ncu        every kernel once, by the hardware counters  ($SHAPE)
# Stages with commas between them run at once, a GPU each: tests bench,model,accuracy,recall.
# What draws on rows wants tests before it, and $MAMBA_SSM, a folder with the rival, to compare.
# Wants mamba2_cuda/_ops*.so, and builds at most _C for this Python (seconds). Logs, rows and tables
# go under $OUT (default out).
# The exit status says whether every stage passed; the last lines say which did.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/out} PYTHONUNBUFFERED=1
PY=${PY:-python3}
mkdir -p "$OUT"

$PY -c 'import mamba2_cuda._C' 2>/dev/null ||
  MAMBA2_MODULES=_C $PY setup.py build_ext --inplace >"$OUT/build_C.log" 2>&1 ||
  echo "_C is not built: $OUT/build_C.log"

smoke() { $PY -m bench.smoke; }

tests() {
  $PY -m pytest -p bench.stamp -q --tb=short ${PYTEST_ARGS:---ignore tests/emulation -m gpu -n 14}
}

# One run of one tool: its log, and a line that says how it ended.
sanitize_one() {
  local tool=$1 target=$2 begin=$SECONDS status log="$OUT/sanitize_$1_$2.log"
  local what="--tier $target --run-only"
  # initcheck does not see what bulk copies (TMA) write: tier sm90's y and states, and what cuBLAS
  # multiplies in 16 bits.
  case "$tool $target" in
    "initcheck 3") what+=" --cases model packed seq_idx fp32" ;;
    "initcheck layers") what="--layers fp32 --tier 2" ;;
    *" layers") what=--layers ;;
  esac
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${SECONDS_EACH:-170}" compute-sanitizer \
    --tool "$tool" --error-exitcode 9 --print-limit 5 $PY -m bench.smoke $what >"$log" 2>&1
  status=$?
  echo "$tool, $target: exit status $status, $((SECONDS - begin)) s, $(grep SUMMARY "$log")"
  return $status
}

sanitize() {
  local status=0 tool target one runs=()
  for tool in ${SANITIZERS:-memcheck racecheck initcheck synccheck}; do
    for target in ${TARGETS:-1 2 3 layers}; do
      sanitize_one "$tool" "$target" &
      runs+=($!)
    done
  done
  for one in "${runs[@]}"; do wait "$one" || status=1; done
  [ $status = 0 ] || grep -hE -A 3 "=========.*(Error|error detected|Warning|hazard)" \
    "$OUT"/sanitize_*.log | grep -v "Host Frame" | head -40
  return $status
}

bench() { $PY -m bench.run ${BENCH_ARGS:-}; }
sweep() { $PY -m bench.run --sweep; }
around() { $PY -m bench.around ${AROUND_ARGS:-}; }
model() { $PY -m bench.model ${MODEL_ARGS:-}; }
accuracy() { $PY -m bench.accuracy ${ACCURACY_ARGS:-}; }
ranks() { $PY -m bench.ranks; }
recall() {
  $PY -m examples.mqar --grid --budget-seconds "${RECALL_SECONDS:-178}" --out "$OUT/mqar"
}

ncu_() {
  ncu --clock-control none --profile-from-start off --kernel-name-base demangled \
    -k 'regex:mamba2' --set full --csv --page raw --log-file "$OUT/ncu.csv" \
    $PY -m bench.once --shape "${SHAPE:-2.7b_b8_l4k}" &&
    $PY -m bench.ncu_table "$OUT/ncu.csv" "$OUT/ncu.json" | tee "$OUT/ncu.md"
}

# One stage: its log, and how it ended.
stage() {
  local name=$1 begin=$SECONDS status
  case $name in
    smoke | tests | sanitize | bench | sweep | around | model | accuracy | ranks | recall) ;;
    ncu) name=ncu_ ;;
    *) echo "unknown stage $name" >&2; return 2 ;;
  esac
  "$name" > >(tee "$OUT/$1.log" | tail -n "${TAIL:-60}") 2>&1
  status=$?
  echo "$1: $([ $status = 0 ] && echo passed || echo "FAILED ($status)"), $((SECONDS - begin)) s" \
    >>"$OUT/summary"
  return $status
}

failed=0
: >"$OUT/summary"
for group in "$@"; do
  gpu=0 runs=()
  if [[ $group != *,* ]]; then
    stage "$group" || failed=1
    continue
  fi
  for name in ${group//,/ }; do
    CUDA_VISIBLE_DEVICES=$gpu stage "$name" &
    runs+=($!)
    gpu=$((gpu + 1))
  done
  for one in "${runs[@]}"; do wait "$one" || failed=1; done
done
sleep 0.2
echo
cat "$OUT/summary"
exit $failed
