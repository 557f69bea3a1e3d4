"""Ends a child process together with its parent, however the parent ends."""

import os
import signal
import threading

LIFELINE = "OPDLAB_LIFELINE"


def hold_lifeline() -> None:
    """Kill this process and its process group once its parent has ended.

    The parent keeps the writing end of a pipe, gives the number of the reading end in the environment variable
    ``OPDLAB_LIFELINE``, and makes this process the leader of a group. The system closes the writing end when the parent
    ends, also after SIGKILL, and on Linux and macOS alike; Linux's parent-death signal would come when the thread ends
    that started this process. Without the variable, nothing happens.
    """
    if (number := os.environ.pop(LIFELINE, None)) is not None:
        threading.Thread(target=_watch, args=(int(number),), daemon=True).start()


def _watch(pipe: int) -> None:
    os.set_inheritable(pipe, False)
    os.read(pipe, 1)  # nothing is ever written: it returns when the pipe is closed
    os.killpg(os.getpid(), signal.SIGKILL)
