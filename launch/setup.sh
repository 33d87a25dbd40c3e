# Sourced by the launch scripts. `set_up [EXTRA]` installs this checkout into .venv, with the versions of constraints.txt.
# PYTHON is the interpreter that creates .venv; default: the first of python3, python3.X and python that is 3.11 or newer.

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.{14,13,12,11} python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    if [ "$candidate" = "${PYTHON:-}" ]; then break; fi  # the user chose this interpreter: try no other
  done
  echo "error: ${PYTHON:-python3} is not Python 3.11 or newer; install one, or set PYTHON: PYTHON=/path/to/python $0" >&2
  return 1
}

set_up() {
  local extra=${1:-} python stamp hash
  if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    python=$(find_python)
    echo "Creating .venv with $("$python" --version)" >&2
    "$python" -m venv .venv || {
      echo "error: $python cannot create a virtual environment; install its venv and pip modules (python3-venv on Debian)" >&2
      return 1
    }
  fi
  if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: .venv has $(.venv/bin/python --version), but 3.11 or newer is needed; remove .venv and run this again" >&2
    return 1
  fi

  stamp=.venv/.set-up${extra:+-$extra}
  # the hash includes the folder: a virtual environment does not work after it is moved
  hash=$(.venv/bin/python - <<'PY'
import hashlib, os, sys
files = (open(name, "rb").read() for name in ("pyproject.toml", "constraints.txt"))
print(hashlib.sha256(b"\0".join([*files, os.getcwd().encode(), sys.version.encode()])).hexdigest())
PY
  )
  if [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]; then return; fi

  echo "Installing into .venv (takes some minutes the first time)" >&2
  .venv/bin/python -m pip install --quiet -c constraints.txt -e ".${extra:+[$extra]}"
  echo "$hash" > "$stamp"
  echo "$hash" > .venv/.set-up  # an install with an extra includes the base install
}
