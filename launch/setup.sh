# Sourced by the launch scripts: `set_up [EXTRA]` leaves this checkout installed in .venv, with the tested versions.
# PYTHON names the interpreter that makes .venv; without it the first of python3 and python3.X that is new enough is taken.

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.{14,13,12,11} python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    if [ "$candidate" = "${PYTHON:-}" ]; then break; fi  # asked for by name: no other will do
  done
  echo "error: ${PYTHON:-python3} is not Python 3.11 or newer; install one, or name it: PYTHON=/path/to/python $0" >&2
  return 1
}

set_up() {
  local extra=${1:-} python stamp hash
  if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    python=$(find_python)
    echo "Making .venv with $("$python" --version)" >&2
    "$python" -m venv .venv || {
      echo "error: $python cannot make a virtual environment; install its venv and pip modules (python3-venv on Debian)" >&2
      return 1
    }
  fi
  if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: .venv has $(.venv/bin/python --version), but 3.11 or newer is needed; remove .venv and run this again" >&2
    return 1
  fi

  stamp=.venv/.set-up${extra:+-$extra}
  # the folder too: an environment does not work after it was moved
  hash=$(.venv/bin/python - <<'PY'
import hashlib, os, sys
files = (open(name, "rb").read() for name in ("pyproject.toml", "constraints.txt"))
print(hashlib.sha256(b"\0".join([*files, os.getcwd().encode(), sys.version.encode()])).hexdigest())
PY
  )
  if [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]; then return; fi

  echo "Installing into .venv (the first time takes some minutes)" >&2
  .venv/bin/python -m pip install --quiet -c constraints.txt -e ".${extra:+[$extra]}"
  echo "$hash" > "$stamp"
  echo "$hash" > .venv/.set-up  # what an extra adds comes on top of the rest
}
