"""One run of qemu with the kernel and the disk that `scripts/rdma/setup.sh` has made.

A guest that has imported everything is saved once. Each run of the tests begins with as many copies
of it as there are hosts, which takes seconds, not the minutes of the imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

AGENT_PORT = 7000
_MEMORY_MIB = 2048
_KVM_S = 20.0  # a kernel that comes up at all under KVM does so in less
_BOOT_S = 900.0  # under emulation, with the imports
_QMP_S = 60.0
_READ_S = 120.0
_CONSOLE = "console=ttyS0 panic=-1 mitigations=off quiet loglevel=4 net.ifnames=0"


class Emulator:
    """Ends with `close`. `port` of 127.0.0.1 leads to the guest's agent."""

    def __init__(
        self, folder: Path, accelerator: str, port: int, wire: tuple[Path, Path], state: Path | None
    ) -> None:
        """`folder` gets the console and the sockets. `wire` are the sockets of its second network
        card and of the switch. With `state` the guest goes on from there; else it boots.
        """
        folder.mkdir(parents=True, exist_ok=True)
        rdma = rdma_folder()
        self.port = port
        self._console = folder / "console"
        self._log = folder / "log"
        self._qmp_path = folder / "qmp"
        for path in (self._console, self._qmp_path, wire[0]):
            path.unlink(missing_ok=True)
        card, switch = wire
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-M", "q35"),
                    *("-accel", accelerator, "-cpu", "max,la57=off"),
                    *("-m", str(_MEMORY_MIB), "-smp", "2", "-display", "none", "-nodefaults"),
                    *("-no-user-config", "-no-reboot", "-device", "virtio-rng-pci"),
                    *("-qmp", f"unix:{self._qmp_path},server=on,wait=off"),
                    *("-serial", f"file:{self._console}"),
                    *("-drive", f"if=virtio,file={rdma / 'disk'},format=raw,readonly=on"),
                    "-netdev",
                    f"user,id=control,ipv6=off,hostfwd=tcp:127.0.0.1:{port}-:{AGENT_PORT}",
                    *("-device", "virtio-net-pci,netdev=control"),
                    "-netdev",
                    f"dgram,id=wire,local.type=unix,local.path={card},"
                    f"remote.type=unix,remote.path={switch}",
                    *("-device", "virtio-net-pci,id=card,netdev=wire"),
                    *("-kernel", str(rdma / "vmlinuz"), "-initrd", str(rdma / "initrd")),
                    *("-append", _CONSOLE),
                    *(("-incoming", f"exec:cat {state}") if state is not None else ()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def console(self) -> str:
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return text + self._log.read_text()

    def wait_for(self, text: str, timeout_s: float) -> bool:
        """Whether the console has it in time. AssertionError if the emulator ends."""
        return self._wait(lambda: text in self.console(), timeout_s)

    def go_on(self) -> None:
        """From the state, when it has been read."""
        if not self._wait(lambda: self.ask("query-status")["status"] == "paused", _READ_S):
            raise AssertionError(f"the saved guest is not read in time: {self.console()}")
        self.ask("cont")

    def _wait(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while not holds():
            if self._process.poll() is not None:
                raise AssertionError(f"the emulator has ended: {self.console()}")
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    def ask(self, command: str, **arguments: Any) -> Any:
        """QEMU's machine protocol: what a command returns."""
        deadline = time.monotonic() + _QMP_S
        with socket.socket(socket.AF_UNIX) as qmp:
            qmp.settimeout(_QMP_S)
            while True:
                try:
                    qmp.connect(str(self._qmp_path))
                    break
                except OSError:
                    if time.monotonic() > deadline or self._process.poll() is not None:
                        raise AssertionError(f"no emulator answers: {self.console()}") from None
                    time.sleep(0.05)
            with qmp.makefile("rw") as stream:
                stream.readline()  # the greeting
                self._say(stream, "qmp_capabilities", {})
                return self._say(stream, command, arguments)

    @staticmethod
    def _say(stream: Any, command: str, arguments: dict[str, Any]) -> Any:
        stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        stream.flush()
        for line in stream:
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise AssertionError(f"{command}: {answer['error']['desc']}")
        raise AssertionError(f"{command}: no answer")

    def save(self, state: Path) -> None:
        """Stops the guest and writes it to a file."""
        unfinished = state.with_suffix(".unfinished")
        self.ask("stop")
        self.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.ask("migrate", uri=f"exec:cat >{unfinished}")
        ends = ("completed", "failed")
        if not self._wait(lambda: self.ask("query-migrate").get("status") in ends, 300.0):
            raise AssertionError("the guest is not saved in time")
        if (status := self.ask("query-migrate")["status"]) != "completed":
            raise AssertionError(f"the guest is not saved: {status}; {self.console()}")
        unfinished.rename(state)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


def rdma_folder() -> Path:
    return Path(__file__).parents[2] / ".rdma"


def saved_guest(folder: Path, port: int, say: Callable[[str], None]) -> tuple[Path, str]:
    """The state of a guest that has imported everything, and the accelerator it was made with.

    Made anew if the disk, qemu or this file has changed.
    """
    rdma = rdma_folder()
    state, key_file = rdma / "state", rdma / "state.key"
    version = subprocess.run(
        ["qemu-system-x86_64", "--version"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()[0]
    disk = (rdma / "disk").stat()
    wanted = {
        "qemu": version,
        "disk": [disk.st_mtime_ns, disk.st_size],
        "emulator": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    if state.exists() and key_file.exists():
        key = json.loads(key_file.read_text())
        accelerator = str(key.pop("accelerator"))
        if key == wanted:
            return state, accelerator
    key_file.unlink(missing_ok=True)
    start = time.monotonic()
    emulator, accelerator = _boot(folder, port, say)
    try:
        if not emulator.wait_for("guest: ready", _BOOT_S):
            raise AssertionError(f"the guest is not ready in time: {emulator.console()}")
        emulator.save(state)
    finally:
        emulator.close()
    key_file.write_text(json.dumps({**wanted, "accelerator": accelerator}))
    say(f"a guest booted, imported and saved ({accelerator}) in {time.monotonic() - start:.0f} s")
    return state, accelerator


def _boot(folder: Path, port: int, say: Callable[[str], None]) -> tuple[Emulator, str]:
    """Under KVM if the kernel comes up there, else emulated."""
    wire = folder / "wire", folder / "nobody"
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        emulator = Emulator(folder, "kvm", port, wire, None)
        with suppress(AssertionError):
            if emulator.wait_for("guest: up", _KVM_S):
                return emulator, "kvm"
        emulator.close()
        say(f"the kernel does not come up under KVM within {_KVM_S:.0f} s: it is emulated")
    accelerator = "tcg,thread=multi,tb-size=512"
    return Emulator(folder, accelerator, port, wire, None), accelerator
