"""How a run is asked to stop: by signals, and by the other processes of the run."""

import signal

from transxssm_jax.cli import ExitCode
from transxssm_jax.parallel import preemption

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

    Attributes:
      exit_code: what the run should stop with; 0: nobody asked.
    """

    def __init__(self):
        self.exit_code = 0
        self._installed = False

    def install(self) -> None:
        """Takes the signals over. A SIGHUP that is ignored (nohup) stays ignored."""
        self._installed = True
        for number in SIGNALS:
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self._on_signal)

    def request(self, exit_code: int) -> None:
        self.exit_code = self.exit_code or exit_code

    def finish(self) -> None:
        """Ignores the signals from here on: all is saved and the exit code is decided, also while the program ends."""
        for number in SIGNALS if self._installed else ():
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number, frame):
        del frame
        if number == signal.SIGINT and self.exit_code:
            raise KeyboardInterrupt
        self.request(SIGNALS[number])


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
