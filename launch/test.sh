#!/usr/bin/env bash
# Set up .venv and run the tests: all of them, or what pytest makes of the arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
set_up test

if [ $# -gt 0 ]; then
  exec .venv/bin/python -m pytest "$@"
fi
status=0
# Two processes for two cores; their threads sleep while they wait. The Triton kernels run in the interpreter, whose variable must
# be set before triton is imported: processes of their own, and first, so that the tests that start Ray have the cores.
export OMP_WAIT_POLICY=passive
two="-n 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder"
echo "The Triton kernels in the interpreter:"
TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest $two \
  tests/kernels tests/test_step_guards.py tests/shard/test_emulated_graphs.py || status=$?
echo "All other tests:"
.venv/bin/python -m pytest $two || status=$?
exit "$status"
