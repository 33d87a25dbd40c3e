#!/usr/bin/env bash
# Run the benchmarks of docs/benchmarks.md: bash launch/bench.sh [cpu|cuda] [PART ...]; without parts, all parts.
# Parts: kernels layer decode ttft serve; on a CPU also tensor_parallel and step. Each writes results/PART-NAME*.json, and
# a plot if matplotlib is installed.
# NAME is the machine's name in these files (default: cpu, or the GPU's name). BENCH_PYTHON is an interpreter that has the
# packages installed, used instead of .venv. Run nothing else on the machine meanwhile.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=${1:-cpu}
shift $(($# > 0))

case $device in
  cpu) parts="kernels layer decode tensor_parallel ttft serve step" ;;
  cuda) parts="kernels layer decode ttft serve" ;;
  *)
    echo "error: unknown device $device; use cpu or cuda" >&2
    exit 2
    ;;
esac
for part in ${@:-$parts}; do
  if [[ " $parts " != *" $part "* ]]; then
    echo "error: $part is not measured on $device; parts are: $parts" >&2
    exit 2
  fi
done

if [ -n "${BENCH_PYTHON:-}" ]; then
  python=$BENCH_PYTHON
else
  source launch/setup.sh
  set_up eval || exit 1
  python=.venv/bin/python
fi
if "$python" -c "import matplotlib" 2>/dev/null; then plots=yes; else plots=; fi
of_gpu='import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))'
if [ "$device" = cpu ]; then name=${NAME:-cpu}; else name=${NAME:-$("$python" -c "$of_gpu")} || exit 1; fi

# measure FILE ARGUMENTS...: run launch.bench once. @ in FILE is replaced by NAME. After a failure the other runs continue, and
# the script exits with the last failure's status.
status=0
measure() {
  local file=results/${1/@/$name}
  shift
  echo "== python -m launch.bench $* --device $device --json $file.json"
  "$python" -m launch.bench "$@" --device "$device" --json "$file.json" ${plots:+--plot "$file.png"} || status=$?
}

kernels() { measure kernels-@ kernels; }
decode_cpu() { measure decode-@ decode; }
tensor_parallel_cpu() { measure decode-@-tp decode --tensor-parallel-size 1,2 --threads 1 --peer none --rounds 9; }
ttft_cpu() { measure ttft-@ decode --context= --ttft 8192 --method dense; }
serve_cpu() { measure serve-@ serve --request-rate 0.25,0.5,inf --max-num-batched-tokens 512; }
layer_cpu() {
  measure layer-@-2-threads layer --threads 2 --repeats 31
  measure layer-@-2-threads-defaults layer --threads 2 --top-k-fraction 0.05 --base-fraction 0.02 --heavy-tokens 16 --heavy-logit 10
  measure layer-@-1-thread layer --threads 1 --repeats 15
}
step_cpu() {
  for ranks in 2 4; do measure "step-@-tp$ranks" step --tensor-parallel-size $ranks --batch 8; done
}

llama=(--model llama-3.1-8b --dtype bfloat16)
methods=dense,quest,twilight,vattention
layer_cuda() {
  for batch in 8 16 64; do measure "layer-@-batch-$batch" layer --dtype bfloat16 --batch $batch --context 32768; done
  measure layer-@-128k layer --dtype bfloat16 --batch 8 --context 131072
}
decode_cuda() { measure decode-@ decode "${llama[@]}" --context 32768 --batch 1,8 --method $methods --peer transformers,flashinfer; }
ttft_cuda() { measure ttft-@ decode "${llama[@]}" --context= --ttft 32768 --method dense; }
serve_cuda() { measure serve-@ serve "${llama[@]}" --method $methods --request-rate 4,inf --num-prompts 64 --random-input-len 8192 --random-output-len 128; }

for part in ${@:-$parts}; do
  if declare -F "${part}_$device" > /dev/null; then "${part}_$device"; else "$part"; fi
done
exit $status
