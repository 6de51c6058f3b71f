#!/usr/bin/env bash
# What `make test-prometheus` needs beside .venv; says what it installs and why, and nothing where all is there.
#
#   prometheus               Debian's package, unpacked into .prometheus/ and not installed, which would start a service
#   grafana-foundation-sdk   Grafana's own types of a dashboard; beside it, as no other target needs them
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/extras.sh"
folder=$root/.prometheus
types='grafana-foundation-sdk==1769699998!10.1.0'

download() { (cd "$scratch" && quietly apt-get -q download prometheus); }

if [[ ! -x $folder/usr/bin/prometheus || ! -x $folder/usr/bin/promtool ]]; then
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        fail 'no apt-get: put prometheus and promtool into .prometheus/usr/bin, then run this again'
    fi
    say 'Debian package prometheus, unpacked into .prometheus (the server, and promtool)'
    download 2>/dev/null || { quietly "${as_root[@]}" apt-get -q update && download; } || fail 'prometheus cannot be had here'
    quietly dpkg-deb -x "$scratch"/prometheus_*.deb "$scratch/unpacked" || fail 'the package cannot be unpacked'
    rm -rf "$folder"
    mkdir "$folder"
    mv "$scratch/unpacked/usr" "$folder/usr"
fi
if [[ $(cat "$folder/stamp" 2>/dev/null) != "$types" ]]; then
    say "$types in .prometheus (checks the dashboard)"
    python_package "$folder/python" "$types" "$folder/stamp"
fi
