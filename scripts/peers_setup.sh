#!/usr/bin/env bash
# Makes .peers ready: a virtual environment with the products that `make bench-peers` compares with. About 2 GB
# and a few minutes; one line a step says what is installed and why.
# It may be interrupted at any step: the next run goes on with the first step that is not done.
#
# PYTHON and pip's own settings apply, as they do in scripts/setup.sh. The Python is that of .venv, unless PYTHON
# names another, so that both sides of the comparison run the same one.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
requirements=$root/benchmarks/peers/requirements.txt
venv=$root/.peers
log=$venv/setup.log

say() { printf 'peers: %s\n' "$*"; }
fail() { printf 'peers: %s\n' "$*" >&2; exit 1; }

quietly() {
    "$@" >"$log" 2>&1 </dev/null && return
    tail -n 40 "$log" >&2
    fail "failed: $*"
}

pip() { quietly "$venv/bin/python" -m pip --no-input --disable-pip-version-check "$@"; }

# Do a step (a name, the files that it depends on, a command) unless it was done with the same files.
step() {
    local name=$1 depends=$2 stamp=$venv/.done-$1 key
    shift 2
    # shellcheck disable=SC2086  # one word a file
    key=$(cat $depends <(printf '%s\n' "$root" "$*") | sha256sum)
    if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then return; fi
    "$@"
    printf '%s\n' "$key" >"$stamp"
}

make_venv() {
    local python=${PYTHON:-python3}
    if [[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]]; then
        python=$("$root/.venv/bin/python" -c 'import sys; print(sys._base_executable)')
    fi
    say "virtual environment: $venv"
    "$python" -m venv "$venv" || fail "$python cannot make virtual environments"
}

install_pip() {
    local pin
    pin=$(grep -m1 '^pip==' "$root/constraints.txt")
    say "$pin: the same installer whatever the Python came with"
    pip install --constraint "$root/constraints.txt" "$pin"
}

install_torch() {
    local pin
    pin=$(grep -m1 '^torch==' "$root/constraints.txt")
    say "$pin, numpy: the tensors (the first download, so that no product chooses another build)"
    pip install --constraint "$root/constraints.txt" "$pin" numpy
}

install_products() {
    say "$(grep -c == "$requirements") packages of ${requirements#"$root"/}: the products and what they import"
    pip install --no-deps --requirement "$requirements"
}

mkdir -p "$venv"
if command -v flock >/dev/null; then
    exec 9>"$venv/.lock"
    flock 9
fi
[[ -x $venv/bin/python ]] || make_venv
step pip "$root/constraints.txt" install_pip
step torch "$root/constraints.txt" install_torch
step products "$requirements" install_products
