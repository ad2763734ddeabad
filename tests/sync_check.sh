#!/usr/bin/env bash
# The notebook is the source: delete the generated modules, export, clean, and nothing may have changed.
set -euo pipefail
cd "$(dirname "$0")/.."
echo "== sync: bnml/ is what the notebooks export"
state() { { git status --porcelain; git diff HEAD -- bnml nbs; git ls-files -o --exclude-standard -- bnml nbs | sort | xargs -r sha256sum; } | sha256sum; }
before=$(state); clean_before=$(git status --porcelain)
find bnml -name '*.py' -delete
nbdev_export
nbdev_clean
if [ "$(state)" != "$before" ] || { [ -z "$clean_before" ] && [ -n "$(git status --porcelain)" ]; }; then
  echo "The exported package or the notebooks differ from what is committed. Run 'nbdev_export && nbdev_clean', look at:" >&2
  git status --porcelain >&2
  exit 1
fi
[ -z "$clean_before" ] || echo "note: the checkout has uncommitted changes; exporting added none"
