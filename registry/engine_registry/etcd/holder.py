"""The shell that holds an etcd as its child, and ends it when our process dies, however it dies.
Used by `LocalEtcd`.
"""

from __future__ import annotations

import os
import subprocess
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
