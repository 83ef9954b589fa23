"""Eight virtual CPU devices for every test, and quick compilation; both must be set before jax starts."""

import os
import signal

import quick_compile

# Background jobs of a shell ignore Ctrl-C, those of nohup SIGHUP, and processes inherit that: tests send both to the
# processes that they start, and to themselves.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = ' '.join(
    [os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8', quick_compile.XLA_FLAGS]
)


def pytest_addoption(parser):
    parser.addoption('--fuzz_examples', type=int, default=10_000, help='examples of each reader with -m fuzz')
    parser.addoption('--fault_kills', type=int, default=100, help='kills of runs with -m faults')
    parser.addoption('--fault_tries', type=int, default=1800, help='damaged files of each kind with -m faults')
