"""What a worker process does before anything else."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading


def exit_with_parent() -> None:
    """Makes this worker process live exactly as long as its parent wants it.

    Ctrl-C and a scheduler's SIGTERM reach every process of a job. The parent
    decides what they mean (save first, say); a worker that died of them would
    break the parent's last steps. And it ends when the parent was killed by
    SIGKILL: neither `concurrent.futures` nor grain see to that, their workers
    would wait on a queue for ever and hold memory, and files that the next run
    writes.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name='exit-with-parent', daemon=True).start()
