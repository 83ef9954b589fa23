"""Eight virtual CPU devices for every test; must be set before jax starts.

Most of the suite's time is LLVM's: the expensive passes are left out, which
halves compilation and changes no result beyond rounding.
"""

import os
import signal

# A shell's background jobs ignore Ctrl-C, and processes inherit that: tests send it to the processes that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + (
    ' --xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0'
)
