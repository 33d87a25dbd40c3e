#!/usr/bin/env bash
# Set up .venv, make the demo checkpoint, and decode with it on two local Ray actors. Options are passed to launch.demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
set_up
exec .venv/bin/python -m launch.demo "$@"
