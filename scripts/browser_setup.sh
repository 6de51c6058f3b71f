#!/usr/bin/env bash
# What `make test-browser` needs beside .venv; says what it installs and why, and nothing where all is there.
#
#   chromium     Debian's package: the browser itself, so that none is downloaded
#   playwright   drives it; in .browser/ and not in .venv, as no other target needs it
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/extras.sh"
folder=$root/.browser
playwright='playwright==1.65.2'

if ! command -v chromium >/dev/null; then
    command -v apt-get >/dev/null || fail 'no chromium and no apt-get: install chromium'
    install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends chromium fonts-dejavu-core)
    say 'Debian packages: chromium fonts-dejavu-core (the browser, and a font for it)'
    quietly "${install[@]}" || { quietly "${as_root[@]}" apt-get -q update && quietly "${install[@]}"; } || fail 'chromium cannot be installed'
fi
if [[ $(cat "$folder/stamp" 2>/dev/null) != "$playwright" ]]; then
    say "$playwright in .browser (drives the browser; downloads none)"
    python_package "$folder" "$playwright" "$folder/stamp"
fi
