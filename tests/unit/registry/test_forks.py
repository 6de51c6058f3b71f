"""In processes of their own: this one's children would have all of its threads' locks."""

import subprocess
import sys

FORK_WHILE_PREVENTED = """
import os, threading
from engine_registry import forks

made, forked = threading.Event(), threading.Event()
ends = []


def make():
    with forks.prevented():
        pipe = os.fdopen(os.pipe()[1], "w")
        made.set()
        ends.append(forked.wait(0.5))  # no fork comes
        ends.append(forks.closed_in_child(pipe, type(pipe).close))


thread = threading.Thread(target=make)
thread.start()
made.wait()
child = os.fork()
if not child:
    os._exit(0 if ends[1].closed else 1)
forked.set()
thread.join()
print(ends[0], ends[1].closed, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

FORK_WITHIN = """
import os
from engine_registry import forks

with forks.prevented():
    child = os.fork()
    if not child:
        with forks.prevented():
            os._exit(0)
child and print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
grandchild = os.fork()
if not grandchild:
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
"""

FORK_WITH_ONE_THAT_IS_GONE = """
import gc, os, socket
from engine_registry import forks

closed = []
kept = forks.closed_in_child(socket.socket(), closed.append)
forks.closed_in_child(socket.socket(), closed.append).close()
gc.collect()
if child := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), closed)
else:
    os._exit(0 if closed == [kept] else 1)
"""


def said_by(program: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],  # of threads that are there at a fork
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    return ended.stdout


def test_a_fork_waits_until_it_is_known_what_its_child_has_to_close() -> None:
    assert said_by(FORK_WHILE_PREVENTED) == "False False 0\n"


def test_a_thread_that_prevents_forks_may_fork_itself() -> None:
    assert said_by(FORK_WITHIN) == "0\n0\n"


def test_what_is_gone_is_not_closed_again() -> None:
    assert said_by(FORK_WITH_ONE_THAT_IS_GONE) == "0 []\n"
