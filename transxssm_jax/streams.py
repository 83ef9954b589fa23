"""What a command does about stdin, stdout and stderr that are closed or lack a character, and what is not to be printed."""

import os
import select
import sys


def stdout_is_gone(error: BaseException) -> bool:
    """Whether the error is that nobody reads stdout any more (as in `| head`), after which nothing can be printed there."""
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        stdout, poll = sys.stdout.fileno(), select.poll()
    except (AttributeError, OSError, ValueError):  # no stdout, or one that is no file
        return False
    poll.register(stdout, 0)  # errors are reported even so
    if not poll.poll(0):
        return False  # another pipe broke, e.g. that of a worker
    # What is still in the buffer must not raise again when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def prepare() -> None:
    """To be called before anything is printed.

    A stream that was closed (`>&-`) drops what is printed; what the terminal's encoding lacks is printed as '?'; and what
    `hide_late_callbacks` names is not printed.
    """
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  with its number, which a file would get otherwise
    sys.stdout.reconfigure(errors='replace')
    hide_late_callbacks()


def hide_late_callbacks() -> None:
    """From now on Python prints no traceback where a call comes to an event loop that is closed.

    Orbax closes its loop with the first file of a checkpoint that cannot be written or read, which a command reports in one
    line. TensorStore has other files in hand then, and calls the closed loop when it is done with each.
    """
    before = sys.unraisablehook

    def hook(unraisable):
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'):
            before(unraisable)

    sys.unraisablehook = hook
