#!/usr/bin/env bash
# What `make test-compose` needs beside .venv, from Debian's packages; says what it installs and why, and nothing where all is there.
#
#   docker.io, docker-compose    a daemon to start where none runs, and a compose: 1.29 in Debian 12, v2 from Debian 13 on
#   debootstrap                  makes the stand-in for the Python base image where no image registry can be reached
#   iproute2                     the loopback of the network namespace in which that daemon runs
#   docker-compose of Debian 13  a compose v2 beside the 1.29 of Debian 12; unpacked into .venv and not installed
#
# Where something cannot be had the tests that want it are skipped and say so.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
v2=$root/.venv/compose-v2

say() { printf 'set-up: %s\n' "$*"; }

if ! command -v apt-get >/dev/null; then
    say 'no apt-get: docker and a compose are used if they are there'
    exit
fi
as_root=()
if ((EUID != 0)); then as_root=(sudo -n); fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# A docker that works is left as it is: it may be from elsewhere, and Debian's would take its place.
missing=()
if ! docker info >/dev/null 2>&1; then
    if ! command -v dockerd >/dev/null; then missing+=(docker.io); fi
    if ! command -v ip >/dev/null; then missing+=(iproute2); fi
fi
if ! docker compose version >/dev/null 2>&1 && ! command -v docker-compose >/dev/null; then missing+=(docker-compose); fi
if ! command -v debootstrap >/dev/null; then missing+=(debootstrap); fi

apt_install() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@" \
        >"$scratch/log" 2>&1 </dev/null
}
if ((${#missing[@]})); then
    say "Debian packages: ${missing[*]} (containers, and what makes base images where no registry can be reached)"
    if ! apt_install "${missing[@]}" && ! { "${as_root[@]}" apt-get -q update >"$scratch/log" 2>&1 && apt_install "${missing[@]}"; }; then
        tail -n 5 "$scratch/log" >&2
        say 'they cannot be had here'
    fi
fi

is_v2() { [[ $("$@" version --short 2>/dev/null) == *[2-9].*.* && $("$@" version --short) != 1.* ]]; }
if is_v2 docker compose || is_v2 docker-compose || [[ -x $v2/usr/libexec/docker/cli-plugins/docker-compose ]]; then exit; fi

# Debian 13's lists in a separate folder, from where this machine's apt has its packages.
mirror=$(apt-get indextargets --format '$(REPO_URI) $(ORIGIN) $(COMPONENT)' | sed -n 's/ Debian main$//p' | grep -v security | head -n 1)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
say 'Debian package docker-compose of Debian 13, unpacked into .venv: a compose v2 beside 1.29'
mkdir -p "$scratch"/lists/partial "$scratch"/cache/archives/partial
echo "deb [signed-by=$keyring] $mirror trixie main" >"$scratch/sources.list"
elsewhere=(-o "Dir::Etc::SourceList=$scratch/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$scratch/lists"
    -o "Dir::Cache=$scratch/cache" -o APT::Sandbox::User=)
if (cd "$scratch" && apt-get -q "${elsewhere[@]}" update && apt-get -q "${elsewhere[@]}" download docker-compose) >"$scratch/log" 2>&1; then
    dpkg-deb -x "$scratch"/docker-compose_*.deb "$v2"
else
    say 'it cannot be had here; the tests run with 1.29 alone'
fi
