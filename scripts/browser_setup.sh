#!/usr/bin/env bash
# What `make test-browser` needs beside .venv; says what it installs and why, and nothing where all is there.
#
#   chromium     Debian's package: the browser itself, so that none is downloaded
#   playwright   drives it; in .browser/ and not in .venv, as no other target needs it
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$root/.browser
playwright='playwright==1.65.2'

say() { printf 'set-up: %s\n' "$*"; }
fail() { printf 'set-up: %s\n' "$*" >&2; exit 1; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
quietly() {
    "$@" >"$scratch/log" 2>&1 </dev/null && return
    tail -n 20 "$scratch/log" >&2
    return 1
}

if ! command -v chromium >/dev/null; then
    command -v apt-get >/dev/null || fail 'no chromium and no apt-get: install chromium'
    as_root=()
    if ((EUID != 0)); then as_root=(sudo -n); fi
    install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends chromium fonts-dejavu-core)
    say 'Debian packages: chromium fonts-dejavu-core (the browser, and a font for it)'
    quietly "${install[@]}" || { quietly "${as_root[@]}" apt-get -q update && quietly "${install[@]}"; } || fail 'chromium cannot be installed'
fi
if [[ $(cat "$folder/stamp" 2>/dev/null) != "$playwright" ]]; then
    say "$playwright in .browser (drives the browser; downloads none)"
    rm -rf "$folder"
    quietly "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --target "$folder" "$playwright" ||
        fail 'playwright cannot be installed'
    echo "$playwright" >"$folder/stamp"
fi
