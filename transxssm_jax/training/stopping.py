"""How a run is asked to stop: by signals, and by the other processes of the run."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

from transxssm_jax.cli import ExitCode
from transxssm_jax.parallel import preemption, processes

SIGNALS = {  # -> exit code, once the state is saved
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.TERMINATED,
    signal.SIGUSR1: ExitCode.TERMINATED,
    signal.SIGUSR2: ExitCode.TERMINATED,
    signal.SIGINT: ExitCode.INTERRUPTED,
}


class StopRequest:
    """Remembers the first request to stop until the step under way is done and saved.

    SIGTERM, and SIGHUP, SIGUSR1 and SIGUSR2, which schedulers send, ask for exit
    code 75; Ctrl-C asks for 130. A Ctrl-C after the first request raises
    KeyboardInterrupt at once.

    Outside `saves_first` there is nothing to save: before the first step, while it is compiled, say, and once all is
    saved, while a sample is made. After `watch` a signal ends the process there at once, from a thread: the main thread
    may be in a compiler for minutes, during which Python's handlers do not run.

    Attributes:
      exit_code: what the run should stop with; 0: nobody asked.
      last_acts: called before the process ends so.
    """

    def __init__(self):
        self.exit_code = 0
        self.last_acts: list[Callable[[], None]] = []
        self._installed = self._finished = False
        self._lock, self._saves_first, self._has_begun = threading.RLock(), False, False
        self._remembered = 0  # signals that the main thread took up while it saves first; the thread may see them later

    def install(self) -> None:
        """Takes the signals over; to be called in the main thread. A SIGHUP that is ignored (nohup) stays ignored."""
        self._installed = True
        for number in SIGNALS:
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def watch(self):
        """While the block runs, a signal ends the process at once where there is nothing to save."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._act_at_once, args=[reader], name='signals', daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writer)

    def request(self, exit_code: int) -> None:
        self.exit_code = self.exit_code or exit_code

    @contextlib.contextmanager
    def saves_first(self):
        """While the block runs, a request waits until the run has saved. A block may be within another."""
        with self._lock:
            before, self._saves_first, self._has_begun = self._saves_first, True, True
        try:
            yield
        finally:
            with self._lock:
                self._saves_first = before

    def finish(self) -> None:
        """Ignores the signals from here on: all is saved and the exit code is decided, also while the program ends."""
        with self._lock:
            self._finished = True
        for number in SIGNALS if self._installed else ():
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number, frame):
        del frame
        self._remembered += self._saves_first
        if number == signal.SIGINT and self.exit_code:
            raise KeyboardInterrupt
        self.request(SIGNALS[number])

    def _act_at_once(self, reader: int) -> None:
        """A thread that gets the number of every signal, whatever the main thread does."""
        seen = 0
        while received := os.read(reader, 1):
            code = SIGNALS.get(received[0])
            seen += code is not None
            with self._lock:
                if code and seen > self._remembered and not (self._saves_first or self._finished):
                    self._end(code)
        os.close(reader)

    def _end(self, exit_code: int) -> None:
        line = 'stopped before the first step; nothing was saved'
        if self._has_begun:
            line = 'stopped with nothing left to save; the same command goes on from there'
        finish = threading.Thread(
            target=self._finish, args=[line], daemon=True
        )  # it may wait for a reader, or for a lock
        finish.start()
        finish.join(5)
        processes.abort_all(exit_code, line)
        os._exit(exit_code)

    def _finish(self, line: str) -> None:
        for act in [*self.last_acts, sys.stdout.flush, sys.stderr.flush, lambda: os.write(1, f'{line}\n'.encode())]:
            with contextlib.suppress(Exception):
                act()


class Stop:
    """Whether all processes of the run stop now.

    Attributes:
      exit_code: what all of them stop with; 0: the run goes on.
    """

    def __init__(self, request: StopRequest):
        self.request, self.exit_code = request, 0
        self._sync = preemption.PreemptionSync()

    def is_due(self) -> bool:
        """To be called before every step and every batch of an evaluation, as `preemption.PreemptionSync` demands."""
        self.exit_code = self.exit_code or self._sync.should_stop(self.request.exit_code)
        return bool(self.exit_code)
