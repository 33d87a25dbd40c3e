#!/usr/bin/env bash
# Set up .venv and run the tests: all of them, or what pytest makes of the arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
set_up test

if [ $# -gt 0 ]; then
  exec .venv/bin/python -m pytest "$@"
fi
# the Triton kernels in the interpreter: the variable must be set before triton is imported, hence a process of its own
interpreted=$(mktemp)
TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/kernels tests/test_step_guards.py tests/shard/test_emulated_graphs.py >"$interpreted" 2>&1 &
interpreter=$!
trap 'kill "$interpreter" 2>/dev/null || true; rm -f "$interpreted"' EXIT
status=0
# two processes, whose threads sleep while they wait: most tests use one core, or wait for other processes
OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -n 2 --max-worker-restart 0 --dist loadgroup --no-loadscope-reorder || status=$?
wait "$interpreter" || status=$?
echo "The Triton kernels in the interpreter:"
cat "$interpreted"
exit "$status"
