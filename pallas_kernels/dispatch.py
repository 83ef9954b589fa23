"""The choice among the implementations of an operator.

Every operator of this package (scan, attention, ring attention, decode attention, convolution, gated norm,
residual norm) has a table of named implementations and, per platform, the order in which they are tried:

  * A named implementation serves the call, or raises `UnsupportedError` with the reason.
  * None takes the first of the platform's order that can serve, and logs that choice once.

A further implementation is one more entry of its operator's table.
"""

import functools
import logging
import typing

import jax

from pallas_kernels.device import Device, current_device

_log = logging.getLogger(__name__)


class ImplementationError(Exception):
    """A named implementation does not exist, or cannot serve a call. The message is one line."""


class UnknownError(ImplementationError, ValueError):
    """No implementation of the operator has this name."""


class UnsupportedError(ImplementationError, NotImplementedError):
    """An implementation cannot serve a call, here or on the platform that the call is compiled for.

    The message is one line that begins with `implementation='...'` and names reason and remedy.
    """


def refusal(implementation: str, reason: str) -> UnsupportedError:
    """The error, not raised, of a call that the implementation cannot serve. The reason includes the remedy."""
    return UnsupportedError(f'implementation={implementation!r} cannot serve this call: {reason}')


def check_name(implementation: str | None, names: typing.Collection[str]) -> None:
    """Raises UnknownError unless the implementation is None or one of names."""
    if implementation is not None and implementation not in names:
        raise UnknownError(f'implementation={implementation!r} is unknown; use None or one of {tuple(names)}')


def asked_device(implementation: str | None, interpret: bool) -> Device | None:
    """`Operator.choose`'s device: an interpreted kernel asks nothing of that of the process."""
    return Device() if implementation is not None and interpret else None


def _never(device: Device, call: typing.Any) -> None:
    return None


def not_hopper(device: Device) -> str | None:
    """Why a kernel for Hopper cannot serve on this GPU, or None; Blackwell (10.x) is another target of the compiler."""
    if device.backend == 'gpu' and not device.compute_capability.startswith('9.'):
        return (f'{device.kind} has compute capability {device.compute_capability or "unknown"}, but it is for 9.x '
                "(Hopper); use implementation='xla'")  # fmt: skip
    return None


def computes_in_float32(array: str) -> typing.Callable:
    """`unsupported` of implementations that do; a call's dtype is that of the array of this name."""

    def unsupported(device: Device, call: typing.Any) -> str | None:
        if call.dtype == 'float64':
            return f"it computes in float32, but {array} is float64; use implementation='reference'"
        return None

    return unsupported


class Implementation(typing.NamedTuple):
    """One entry of an operator's table; `call` is the operator's own description of a call.

    run: computes the operator, with arguments that all implementations of the operator share.
    unsupported: (device, call) -> why it cannot serve the call, or None.
    unwanted: (device, call) -> why None passes it over although it can serve, or None.
    remedy: ends the error of a named implementation.
    """

    run: typing.Any
    unsupported: typing.Callable[[Device, typing.Any], str | None] = _never
    unwanted: typing.Callable[[Device, typing.Any], str | None] = _never
    remedy: str = ''


class Operator(typing.NamedTuple):
    """An operator's table.

    order: platform (as `jax.default_backend()`) -> names, in the order in which None tries them.
    everywhere: names that None tries after those, and on the platforms that `order` does not list.
    log_line: (device, call, chosen name, reasons of those passed over) -> the line that is logged.
    """

    implementations: dict[str, Implementation]
    order: dict[str, tuple[str, ...]]
    everywhere: tuple[str, ...]
    log_line: typing.Callable[[Device, typing.Any, str, str], str]

    def choose(self, name: str | None, call: typing.Any, device: Device | None = None) -> str:
        """The named implementation, or for None the first in order that can serve.

        Args:
          name: a key of the table, which the operator's own checks have let through, or None.
          call: what the table's functions take.
          device: None: `current_device()`. `Device()` leaves out what is asked of the device.

        Raises:
          UnsupportedError: the named implementation cannot serve, or for None no implementation can.
        """
        device = current_device() if device is None else device
        if name is not None:
            self._check(name, device, call)
            return name
        passed_over = []
        for name in (*self.order.get(device.backend, ()), *self.everywhere):
            entry = self.implementations[name]
            reason = entry.unsupported(device, call) or entry.unwanted(device, call)
            if reason is None:
                log_once(self.log_line(device, call, name, '; '.join(passed_over)))
                return name
            passed_over.append(f'not {name!r}: {reason}')
        self._check(name, device, call)
        raise AssertionError(f'None passes over {name!r}, the last one')

    def run(self, name: str | None, call: typing.Any, arrays, *static):
        """Computes a call with the named implementation, or for None the one that `choose` takes.

        Args:
          name: an implementation, or None.
          call: what the table's functions take; call.interpret tells whether Pallas kernels are interpreted.
          arrays: those of the call, which are made to vary alike over a shard_map's axes.
          static: what implementations take behind the arrays.

        Raises:
          UnknownError: no implementation has this name.
          UnsupportedError: as `choose`.
        """
        check_name(name, self.implementations)
        chosen = self.choose(name, call, asked_device(name, call.interpret))
        return self.implementations[chosen].run(call, *vary_alike(arrays), *static)

    def _check(self, name, device, call):
        entry = self.implementations[name]
        reason = entry.unsupported(device, call)
        if reason is not None:
            raise refusal(name, reason + entry.remedy)


def log_line(operator: str, describe: typing.Callable[[typing.Any], str]) -> typing.Callable:
    """`Operator.log_line` that says operator, device, call (as `describe` has it), choice, and who was passed over."""

    def line(device: Device, call: typing.Any, chosen: str, passed_over: str) -> str:
        return f'{operator} on {device.kind}, {describe(call)}: {chosen}' + (f', {passed_over}' if passed_over else '')

    return line


def in_32_bits(f: typing.Callable) -> typing.Callable:
    """f, traced as without `jax_enable_x64`; for functions of arrays of 32 bits or fewer that call Pallas kernels.

    Mosaic has integers of at most 32 bits. With `jax_enable_x64` every Python number of a kernel, of
    Pallas itself and of the kernels that JAX ships would become one of 64 bits.
    """

    @functools.wraps(f)
    def traced(*args, **kwargs):
        with jax.enable_x64(False):
            return f(*args, **kwargs)

    return traced


def vary_alike(tree):
    """Casts every array to vary over all the axes of a shard_map that any of them varies over.

    An array that is replicated over the shards of another varies over fewer axes, as zeros do. After the cast the carries
    of loops keep one type, and the transpose of the cast is the psum that the gradients of such arrays need.
    """

    def varying(v):
        return jax.typeof(v).manual_axis_type.varying

    axes = frozenset().union(*(varying(v) for v in jax.tree.leaves(tree)))

    def cast(v):
        missing = tuple(sorted(axes - varying(v)))
        return jax.lax.pcast(v, missing, to='varying') if missing else v

    return jax.tree.map(cast, tree)


@functools.cache
def log_once(message: str) -> None:
    """Logs a message the first time that the process has it."""
    _log.info(message)
