"""Whether a step's numbers are finite."""

import math

import jax
import numpy as np

from transxssm_jax import cli


class NotFiniteError(cli.UserError, ArithmeticError):
    """The loss, gradient or update of a step is NaN or infinite."""

    exit_code = cli.ExitCode.NOT_FINITE


WATCHED = ('loss', 'grad_norm', 'update_norm', 'param_norm')


def check_finite(step: int, values: dict[str, float], grad_norms: dict) -> None:
    """
    Args:
      step: number of the step.
      values: its scalars. The loss is that of the parameters before the step; the norm of the update tells
        whether they are still finite after it.
      grad_norms: norm of each parameter's gradient, [periods, layers] where stacked; read only on failure.

    Raises:
      NotFiniteError: naming the step, the norms, and the parameters whose gradients are not finite.
    """
    if all(math.isfinite(values[name]) for name in WATCHED):
        return
    bad = []
    for path, norm in jax.tree_util.tree_leaves_with_path(jax.device_get(grad_norms)):
        if not np.isfinite(norm).all():
            layers = [list(map(int, index)) for index in zip(*(~np.isfinite(norm)).nonzero())] if norm.ndim else ''
            bad.append(f'{jax.tree_util.keystr(path, simple=True, separator="/")}{layers}')
    raise NotFiniteError(
        f'step {step} is not finite: loss {values["loss"]:.6g}, gradient norm {values["grad_norm"]:.4g}, update norm '
        f'{values["update_norm"]:.4g}, parameter norm before it {values["param_norm"]:.4g}; gradients that are not '
        f'finite (period, layer): {"; ".join(bad) or "none"}; it was not saved: lower optimizer.learning_rate, or '
        'look at the data of this step'
    )
