#!/usr/bin/env bash
# Makes .rdma/ ready for `make test-rdma`: the kernel, the disk and the initramfs of virtual machines that have RDMA in
# software, from Debian's packages. One line a step says what is made and why. All of it is only unpacked, except what
# `tools` below installs. It may be interrupted at any step: the next run goes on with the first step that is not done.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/scripts/rdma
rdma=$root/.rdma
log=$rdma/setup.log

# A program that is needed, and the Debian package that has it.
tools=(qemu-system-x86_64=qemu-system-x86 busybox=busybox-static modprobe=kmod mke2fs=e2fsprogs gcc=gcc)
# Unpacked for the guest: the drivers of RDMA devices for user space, `rdma`, `ibv_rc_pingpong`, and their libraries.
packages=(ibverbs-providers ibverbs-utils iproute2 libibverbs-dev libibverbs1 libbsd0 libcap2 libmd0 libmnl0 libnl-3-200
    libnl-route-3-200)
# In the initramfs, with what they depend on. rdma_rxe asks for crc32 by name, so that crc32_generic is no dependency.
modules=(virtio_pci virtio_blk virtio_net virtio_rng ext4 crc32c_generic crc32_generic ib_uverbs rdma_rxe)

say() { printf 'rdma: %s\n' "$*"; }
fail() { printf 'rdma: %s\n' "$*" >&2; exit 1; }

quietly() {
    "$@" >"$log" 2>&1 </dev/null && return
    tail -n 40 "$log" >&2
    fail "failed: $*"
}

# Do a step (a name, the files that it depends on, a command) unless it was done with the same files.
step() {
    local name=$1 depends=$2 stamp=$rdma/.done-$1 key
    shift 2
    # shellcheck disable=SC2086  # one word a file
    key=$(cat $depends <(printf '%s\n' "$root" "$*") | sha256sum)
    if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then return; fi
    "$@"
    printf '%s\n' "$key" >"$stamp"
}

# modprobe and mke2fs are not on everybody's PATH.
PATH=$PATH:/usr/sbin:/sbin

install_tools() {
    local entry missing=() as_root=() apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=120)
    for entry in "${tools[@]}"; do
        command -v "${entry%%=*}" >/dev/null || missing+=("${entry##*=}")
    done
    [[ -e /usr/include/stdlib.h ]] || missing+=(libc6-dev)
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null || fail "this system has no apt-get: install what Debian calls ${missing[*]}"
    if ((EUID != 0)); then as_root=(sudo); fi
    say "Debian packages: ${missing[*]} (the emulator, and what makes its disk)"
    "${as_root[@]}" "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1 </dev/null && return
    quietly "${as_root[@]}" "${apt[@]}" update
    quietly "${as_root[@]}" "${apt[@]}" install -y --no-install-recommends "${missing[@]}"
}

unpack() {
    local kernel file
    kernel=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*-amd64\)$/\1/p' | head -n 1)
    [[ -n $kernel ]] || fail "apt knows no package linux-image-amd64: this needs Debian on x86-64 (apt-get update?)"
    say "$kernel, ${packages[*]}: unpacked, not installed (80 MB to download)"
    rm -rf "$rdma"/{debs,kernel,unpacked}
    mkdir -p "$rdma"/{debs,kernel,unpacked}
    (cd "$rdma/debs" && quietly apt-get -q download "$kernel" "${packages[@]}")
    for file in "$rdma"/debs/*.deb; do
        case ${file##*/} in
        linux-image*) dpkg-deb -x "$file" "$rdma/kernel" ;;
        *) dpkg-deb -x "$file" "$rdma/unpacked" ;;
        esac
    done
    rm -rf "$rdma/debs"
}

make_initramfs() {
    local version files file
    version=$(ls "$rdma/kernel/lib/modules")
    say "kernel $version, and an initramfs with its modules"
    quietly depmod -b "$rdma/kernel" "$version"
    files=$(modprobe -S "$version" -d "$rdma/kernel" --show-depends -a "${modules[@]}" | awk '$1 == "insmod" && !seen[$2]++ {print $2}')
    rm -rf "$rdma/initramfs"
    mkdir -p "$rdma"/initramfs/{bin,modules}
    cp "$(command -v busybox)" "$rdma/initramfs/bin/busybox"
    install -m 755 "$here/init" "$rdma/initramfs/init"
    for file in $files; do
        cp "$file" "$rdma/initramfs/modules/"
        printf '%s\n' "${file##*/}" >>"$rdma/initramfs/modules/order"
    done
    (cd "$rdma/initramfs" && find . | busybox cpio -o -H newc 2>"$log" | gzip -1) >"$rdma/initrd"
    cp "$rdma/kernel/boot/vmlinuz-$version" "$rdma/vmlinuz"
    rm -rf "$rdma/initramfs"
}

compile_shim() {
    say 'retry_count.so: lets reads from a process that has ended fail on rdma_rxe'
    quietly gcc -shared -fPIC -O2 -Wall -I "$rdma/unpacked/usr/include" -o "$rdma/retry_count.so" "$here/retry_count.c" -ldl
}

make_disk() {
    say "the guests' disk: this Python, and the packages that are imported there (1 GB)"
    rm -rf "$rdma"/root-*  # of a run that was killed
    (cd "$root" && quietly .venv/bin/python -m scripts.rdma.image "$rdma/unpacked" "$rdma/disk")
}

mkdir -p "$rdma"
if command -v flock >/dev/null; then
    exec 9>"$rdma/.lock"
    flock 9
fi
install_tools
step unpack "$here/setup.sh" unpack
step initramfs "$here/setup.sh $here/init" make_initramfs
step shim "$here/setup.sh $here/retry_count.c" compile_shim
step disk "$here/setup.sh $here/image.py $here/main.sh $here/retry_count.c $root/tests/rdma/agent.py $root/constraints.txt $root/pyproject.toml" make_disk
