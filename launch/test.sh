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
.venv/bin/python -m pytest || status=$?
# the Triton kernels in the interpreter: the variable must be set before triton is imported, hence a process of its own
TRITON_INTERPRET=1 .venv/bin/python -m pytest tests/kernels || status=$?
exit "$status"
