"""The bench's rows of other people's scans in PyTorch, where these are installed; on an NVIDIA GPU.

  mamba_ssm   mamba_chunk_scan_combined (Triton): groups of B and C as ours, no rotation
  fla         chunk_simple_gla of flash-linear-attention (Triton): B and C of each head, no rotation

Neither rotates, so B and C are rotated before it, in float32 and compiled by torch.compile, and that
is in the time. So is what fla is given in place of dt and of groups. Inputs are those of the JAX
rows, handed over without a copy, and the results are judged by the same reference.

Legend: B batch, L length, H heads, G groups, P head width, N state width.
"""

import importlib
import importlib.util

import jax

# module -> what pip calls it
PEERS = {'mamba_ssm': 'mamba_ssm', 'fla': 'flash-linear-attention'}
MAMBA_CHUNK = 256  # its authors' default


def missing(name: str) -> str:
    """Why a peer cannot run here, or ''."""
    absent = [module for module in ('torch', name) if importlib.util.find_spec(module) is None]
    if absent:
        return f'not installed: pip install {" ".join(PEERS.get(module, module) for module in absent)}'
    if not importlib.import_module('torch').cuda.is_available():
        return 'PyTorch sees no GPU'
    return ''


def prepare(name: str, direction: str, sets, outputs, gradients):
    """Compiles a peer for one shape.

    Args:
      name: of PEERS.
      direction: 'forward' or 'forward+backward'.
      sets: list of ((x, dt, a, b, c), rope, dy), JAX arrays.
      outputs: names of y and the final state.
      gradients: names of the gradients of x, dt, a, b, c.

    Returns:
      timed(calls): milliseconds between CUDA events around so many calls, over rotating inputs.
      results(): of the first set, as JAX arrays: the outputs by name, or y and the gradients.
    """
    torch = importlib.import_module('torch')
    sets = [jax.tree.map(torch.from_dlpack, one) for one in sets]
    scan = scan_of(name)
    backward = direction != 'forward'
    for inputs, _, _ in sets:
        for v in inputs:
            v.requires_grad_(backward)

    def call(inputs, rope, dy):
        y, state = scan(*inputs, rope)
        return (y, *torch.autograd.grad(y, inputs, dy)) if backward else (y, state)

    def timed(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(calls):
            call(*sets[i % len(sets)])
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def results():
        names = (outputs[0], *gradients) if backward else outputs
        values = [v.detach().contiguous() for v in call(*sets[0])]
        torch.cuda.synchronize()
        return dict(zip(names, map(jax.dlpack.from_dlpack, values)))

    for one in sets:  # compilation, and the choice of their autotuners
        call(*one)
    torch.cuda.synchronize()
    return timed, results


def scan_of(name: str):
    """(x, dt, a, b, c, rope) -> (y [B, L, H, P], final state [B, H, P, N]), of torch tensors, as `rotary_ssd`."""
    rotated = importlib.import_module('torch').compile(rotation(), dynamic=False)
    if name == 'mamba_ssm':
        combined = importlib.import_module('mamba_ssm.ops.triton.ssd_combined').mamba_chunk_scan_combined

        def scan(x, dt, a, b, c, rope):
            return combined(x, dt, a, *rotated(b, c, *rope), MAMBA_CHUNK, return_final_states=True)
    else:
        chunk_simple_gla = importlib.import_module('fla.ops.simple_gla').chunk_simple_gla

        def scan(x, dt, a, b, c, rope):
            b, c = (v.repeat_interleave(x.shape[2] // b.shape[2], dim=2) for v in rotated(b, c, *rope))
            values = (dt[..., None] * x).to(x.dtype)
            y, state = chunk_simple_gla(c, b, values, dt * a, scale=1.0, output_final_state=True)
            return y, state.transpose(-1, -2)  # theirs is [N, P]

    return scan


def rotation():
    """(b, c, cos, sin) -> b, c [B, L, G, N] turned in float32 and rounded once; cos, sin [L, N/2]."""
    torch = importlib.import_module('torch')

    def rotate(b, c, cos, sin):
        cos, sin = cos[None, :, None], sin[None, :, None]

        def turned(v):
            first, second = v.float().chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(v.dtype)

        return turned(b), turned(c)

    return rotate
