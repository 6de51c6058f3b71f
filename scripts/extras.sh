# shellcheck shell=bash
# What the set-ups of extra targets share, such as `make test-browser`. They source it.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf 'set-up: %s\n' "$*"; }
fail() { say "$@" >&2; exit 1; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
quietly() {
    "$@" >"$scratch/log" 2>&1 </dev/null && return
    tail -n 20 "$scratch/log" >&2
    return 1
}

as_root=()
if ((EUID != 0)); then as_root=(sudo -n); fi

# The requirement $2 into folder $1, which it has for itself; then notes it in the file $3.
python_package() {
    rm -rf "$1"
    quietly "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --target "$1" "$2" ||
        fail "${2%%=*} cannot be installed"
    echo "$2" >"$3"
}
