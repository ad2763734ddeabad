#!/usr/bin/env bash
# Make the environment DIR from the lock: uv when it is there, else pip.   make_venv.sh DIR [extra]
set -euo pipefail
dir=$1; extra=${2:-dev}
say() { printf '%s\n' "$*" >&2; }

python=""
for candidate in python3.11 python3.12 python3.13 python3; do
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate; break
  fi
done
if [ -z "$python" ]; then
  say "bnml needs Python 3.11 or newer, and none was found. Install it with: sudo apt-get install python3.11 python3.11-venv"; exit 69
fi
if ! command -v git >/dev/null; then
  say "bnml needs git, and it was not found. Install it with: sudo apt-get install git"; exit 69
fi
# no pipe: grep -q leaves at its first match, and with pipefail ldconfig's broken pipe would read as "not found"
if command -v ldconfig >/dev/null && ! grep -q 'libgomp\.so\.1' <<<"$(ldconfig -p 2>/dev/null)"; then
  say "LightGBM needs the OpenMP library libgomp, and it was not found. Install it with: sudo apt-get install libgomp1"; exit 69
fi

if [ ! -x "$dir/bin/python" ]; then
  say "making $dir with $($python --version)"
  if command -v uv >/dev/null; then uv venv -q --python "$python" "$dir"
  elif ! "$python" -m venv "$dir"; then
    say "Python's venv module does not work here. Install it with: sudo apt-get install python3-venv"; exit 69
  fi
fi
say "installing bnml and the $extra extra from constraints.txt (the first time takes a few minutes)"
if command -v uv >/dev/null; then
  uv pip install -q --compile-bytecode --python "$dir/bin/python" -c constraints.txt -e ".[$extra]"
else
  "$dir/bin/python" -m pip --version >/dev/null 2>&1 || "$dir/bin/python" -m ensurepip >/dev/null  # an environment that uv made has no pip
  "$dir/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extra]"
fi
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
  say "note: no Chromium found, so pictures and browser tests are skipped. Install it with: sudo apt-get install chromium"
