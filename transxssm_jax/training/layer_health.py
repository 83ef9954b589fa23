"""The health of the layers every train.health_every_steps: how long state-space heads remember, and gradients by layer.

A record of WORKDIR/health.jsonl holds, each by the name of its layers (`layers/ssd/mixer`):

- `half_life_tokens`, [periods, layers, heads]: tokens after which a head's state has lost half, ln 2 / (dt * -a), at the
  dt that its bias alone gives, softplus(dt_bias); tokens whose projection is not 0 make it longer or shorter;
- `dt_outside`: the share of heads whose dt at the bias is below model.dt_min or above model.dt_max, where it started within;
- `grad_norms`: of each parameter, before clipping, [periods, layers] where it is stacked.

TensorBoard has the same as histograms in WORKDIR/tensorboard/layers, of half-lives and norms the decimal logarithms.
"""

import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from transxssm_jax.config import Config
from transxssm_jax.parallel import mesh, processes
from transxssm_jax.training.metrics import JsonLines

FILE = 'health.jsonl'
_TOLERANCE = 1e-3  # of dt beside its limits: initial values are rounded on their way through softplus


class LayerHealth:
    """Writes the records; nothing where train.health_every_steps is 0.

    Args:
      workdir, config: of the run.
      device_mesh: on which the parameters are.
      first_step: records of steps after it, left by an earlier start of the run, are dropped.
    """

    def __init__(self, workdir: pathlib.Path, config: Config, device_mesh: jax.sharding.Mesh, first_step: int):
        self._every, self._records, self._directory = config.train.health_every_steps, None, None
        if not self._every:
            return
        limits = config.model.dt_min, config.model.dt_max
        self._measure = jax.jit(
            lambda params: memory_of_heads(params, *limits), out_shardings=mesh.sharding(device_mesh, ())
        )
        if processes.is_coordinator():
            self._records = JsonLines(workdir / FILE, first_step)
            self._directory = workdir / 'tensorboard' / 'layers' if config.train.tensorboard else None
            self._first_step, self._events = first_step, None

    def write_if_due(self, step: int, params: dict, grad_norms: dict) -> None:
        """Waits for the step and writes its record, where it is due; called by all processes.

        Args:
          step: that was taken.
          params: after it.
          grad_norms: of it, see `step.train_step`.

        Raises:
          OSError: naming the file that cannot be written.
        """
        if not self._every or step % self._every:
            return
        measured, norms = jax.device_get((self._measure(params), grad_norms))
        if self._records is None:
            return
        values = {name: _by_name(tree) for name, tree in [*measured.items(), ('grad_norms', norms)]}
        self._records.write(step, {name: _finite(of_layers) for name, of_layers in values.items()})
        if self._directory:
            self._write_histograms(step, values)

    def _write_histograms(self, step: int, values: dict[str, dict[str, np.ndarray]]) -> None:
        # Imported here: it costs a second that a run without it need not pay.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._events is None:
            self._events = EventFileWriter(str(self._directory))
            start = SessionLog(status=SessionLog.START)  # TensorBoard forgets what earlier files hold beyond it
            self._events.add_event(Event(step=self._first_step + 1, wall_time=time.time(), session_log=start))
        for name in ('half_life_tokens', 'grad_norms'):
            for layer, array in values[name].items():
                logs = np.log10(np.maximum(array[np.isfinite(array)], 1e-30))
                summary = histogram_pb(f'{name}_log10/{layer}', logs)
                self._events.add_event(Event(step=step, wall_time=time.time(), summary=summary))
        self._events.flush()


def memory_of_heads(params: dict, dt_min: float, dt_max: float) -> dict[str, dict]:
    """{'half_life_tokens', 'dt_outside'}: each a dict by the name of the layers, see the top of this file.

    Args:
      params: the parameters of a model.
      dt_min, dt_max: the limits within which dt started.
    """
    half_lives, outside = {}, {}
    arrays = _by_name(params)
    for path, a_log in arrays.items():
        name, _, leaf = path.rpartition('/')
        if leaf != 'a_log':
            continue
        dt = jax.nn.softplus(arrays.get(f'{name}/dt_bias', jnp.zeros_like(a_log)))
        half_lives[name] = jnp.log(2.0) / (dt * jnp.exp(a_log))
        is_outside = (dt < dt_min * (1 - _TOLERANCE)) | (dt > dt_max * (1 + _TOLERANCE))
        outside[name] = jnp.mean(is_outside.astype(jnp.float32))
    return {'half_life_tokens': half_lives, 'dt_outside': outside}


def _by_name(tree: dict) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def _finite(values: dict[str, np.ndarray]) -> dict[str, list]:
    """Nested lists for JSON; None where a number is not finite, as in a step that was skipped."""
    return {name: np.where(np.isfinite(array), array, None).tolist() for name, array in values.items()}
