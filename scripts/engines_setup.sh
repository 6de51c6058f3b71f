#!/usr/bin/env bash
# Makes .engines/<engine> ready: a virtual environment with a real inference engine (its build for CPUs) and this
# checkout, for `make test-engines`. About 3 GB and ten minutes each; one line a step says what is installed and why.
# It may be interrupted at any step: the next run goes on with the first step that is not done.
#
#   scripts/engines_setup.sh vllm|sglang
#
# PYTHON and pip's own settings apply, as they do in scripts/setup.sh.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
engine=${1:?name an engine: vllm or sglang}
requirements=$root/tests/engines/requirements-$engine.txt
venv=$root/.engines/$engine
log=$venv/setup.log

say() { printf 'engines: %s\n' "$*"; }
fail() { printf 'engines: %s\n' "$*" >&2; exit 1; }
[[ -f $requirements ]] || fail "unknown engine: $engine ($requirements does not exist)"

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
    say "virtual environment: $venv"
    "${PYTHON:-python3}" -m venv "$venv" || fail "${PYTHON:-python3} cannot make virtual environments"
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
    say "$pin: the tensors (the first download, so that no other package chooses another build)"
    pip install --constraint "$root/constraints.txt" "$pin"
}

install_engine() {
    say "$(grep -c == "$requirements") packages of ${requirements#"$root"/}: $engine and what it imports (2 GB, minutes)"
    pip install --no-deps --requirement "$requirements"
}

install_ours() {
    say 'engine-registry, editable: the entry points that the engine finds'
    pip install --no-deps --build-constraint "$root/constraints.txt" --editable "$root"
}

mkdir -p "$venv"
if command -v flock >/dev/null; then
    exec 9>"$venv/.lock"
    flock 9
fi
[[ -x $venv/bin/python ]] || make_venv
step pip "$root/constraints.txt" install_pip
step torch "$root/constraints.txt" install_torch
step engine "$requirements" install_engine
step ours "$root/pyproject.toml" install_ours
