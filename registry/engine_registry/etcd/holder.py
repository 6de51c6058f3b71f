"""The shell that holds an etcd as its child, and ends it when our process dies, however it dies;
and how such an etcd is stopped for a while. Used by `LocalEtcd`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

# The holder prints etcd's pid, so that etcd alone can be paused or killed, and ends when etcd does.
# The reader sees the end of standard input when our process is gone.
_HOLD = """
exec 3<&0
log=$1
shift
"$@" >"$log" 2>&1 </dev/null 3<&- &
etcd=$!
echo $etcd
{ read -r _ <&3; kill -9 $etcd; } >/dev/null 2>&1 &
reader=$!
exec 2>/dev/null
wait $etcd
kill $reader
"""


def hold(command: Sequence[str], log_path: Path) -> subprocess.Popen[str]:
    """Starts the command. The process that is returned prints its pid, and ends it when standard
    input is closed.
    """
    return subprocess.Popen(
        ["/bin/sh", "-c", _HOLD, "etcd-holder", str(log_path), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # ETCD_… are meant for another etcd.
        env={name: text for name, text in os.environ.items() if not name.startswith("ETCD_")},
    )


def stop_threads(pid: int) -> None:
    """SIGSTOP. Returns when all threads of the process have stopped: each does when it next runs,
    so on a busy machine it goes on for a while. Returns also if the process ends.
    """
    os.kill(pid, signal.SIGSTOP)
    while not all(_has_stopped(thread) for thread in Path(f"/proc/{pid}/task").glob("*/stat")):
        time.sleep(0.001)


def _has_stopped(thread: Path) -> bool:
    try:
        return thread.read_text().rpartition(")")[2].split()[0] in ("T", "Z", "X")
    except OSError:  # it has ended
        return True
