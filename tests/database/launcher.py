"""A process that forks the writers of `tests.database.writers`, because starting one anew takes seconds.

Reads a JSON list from each line of its input (the writer's name and arguments), prints the new
process's id, and "<id> <status>" when it ended.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
from typing import Any

import django


def main() -> None:
    django.setup()
    from tests.database import writers

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    watch = selectors.DefaultSelector()
    watch.register(sys.stdin.fileno(), selectors.EVENT_READ)
    watch.register(reader, selectors.EVENT_READ)
    while True:
        for event, _ in watch.select():
            if event.fd == reader:
                os.read(reader, 4096)
                report_ended()
            else:
                line = sys.stdin.buffer.raw.readline()
                if not line:
                    return
                print(fork(writers, *json.loads(line)), flush=True)


def fork(writers: Any, name: str, *arguments: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        getattr(writers, name)(*arguments)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(status)


def report_ended() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        print(pid, os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
