#!/usr/bin/env bash
# The notebook is the source: delete the generated modules, export, clean, and nothing may have changed.
set -euo pipefail
cd "$(dirname "$0")/.."
echo "== sync: bnml/ is what the notebooks export"
state() { { git status --porcelain; git diff HEAD -- bnml nbs; git ls-files -o --exclude-standard -- bnml nbs | sort | xargs -r sha256sum; } | sha256sum; }
before=$(state); clean_before=$(git status --porcelain)
kept=$(mktemp -d) && trap 'rm -rf "$kept"' EXIT
find bnml -name '*.py' -exec cp -p --parents -t "$kept" {} +
find bnml -name '*.py' -delete
nbdev_export
nbdev_clean
# what came out the same keeps its time: else numba would compile every kernel again
while read -r file; do if cmp -s "$kept/$file" "$file"; then touch -r "$kept/$file" "$file"; fi; done < <(cd "$kept" && find bnml -name '*.py')
if [ "$(state)" != "$before" ] || { [ -z "$clean_before" ] && [ -n "$(git status --porcelain)" ]; }; then
  echo "The exported package or the notebooks differ from what is committed. Run 'nbdev_export && nbdev_clean', look at:" >&2
  git status --porcelain >&2
  exit 1
fi
[ -z "$clean_before" ] || echo "note: the checkout has uncommitted changes; exporting added none"
