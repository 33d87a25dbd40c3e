#!/usr/bin/env bash
# Set up .venv and run all tests, or pytest with the given arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
set_up test

if [ $# -gt 0 ]; then
  exec .venv/bin/python -m pytest "$@"
fi
status=0
# Two pytest processes for two cores; idle OpenMP threads sleep. TRITON_INTERPRET must be set before triton is imported, so the
# tests of the Triton kernels in the interpreter have their own processes. They run first, to leave the cores to the Ray tests.
export OMP_WAIT_POLICY=passive
two="-n 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder"
echo "Tests of the Triton kernels in the interpreter:"
TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest $two \
  tests/kernels tests/test_step_guards.py tests/shard/test_emulated_graphs.py || status=$?
echo "All other tests:"
.venv/bin/python -m pytest $two || status=$?
exit "$status"
