"""Measures the speed of a model with random weights on random tokens: training, forward, prefill and decoding.

Every measurement of the project that is quoted comes from here (`python -m transxssm_jax.bench`). Times are medians over
blocks of calls that follow each other without waiting, as in a run; the first calls are not counted.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chips
from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.evals import charts, decode_speed, op_table, run_report
from transxssm_jax.inference.decode import Decoder
from transxssm_jax.model import costs, parameters
from transxssm_jax.parallel import mesh
from transxssm_jax.planning import fitting, roofline
from transxssm_jax.training import compilation
from transxssm_jax.training import step as step_lib

MODES = ('train', 'forward', 'prefill', 'decode')
WARM_UP_CALLS = 2
PROFILED_CALLS = 3
MANDELBROT_SHIFT = 2.7  # the id of rank r, from 0, is as frequent as 1 / (r + 2.7); 'the' of English text is 4 in 100


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
      model: name of the model in the table.
      config: its settings; rows and length replace data.global_batch and data.seq_len.
      mode: of MODES.
      length: tokens per row; of decoding, tokens in the cache.
      rows: over all devices.
      documents: per row, of equal length.
    """

    model: str
    config: Config
    mode: str
    length: int
    rows: int
    documents: int = 1


def measure(case: Case, calls: int, repeats: int, profile: bool = False) -> dict:
    """Measures one case on the devices that are here.

    Args:
      case: what is measured.
      calls: of a timed block.
      repeats: timed blocks.
      profile: whether the ops of train and forward are measured too.

    Returns:
      The case, and 'ms' (median of a call over the blocks), 'least_ms', 'most_ms', 'tokens_per_second' (all devices),
      'compile_seconds', 'first_seconds' (the first call, compiled already), 'memory_gib' (what the compiler counts per
      device; absent for prefill and decoding); for train and forward also 'model_tflops_per_second' (per device), 'mfu' and
      'hfu' (with what is computed again) where the device's peak is known, and the settings 'remat' and 'microbatches'; with
      profile, 'ops' of `op_table.measure`.
      Where the case does not fit the memory: the case and 'does_not_fit', one line.
    """
    result = {
        'model': case.model,
        'mode': case.mode,
        'length': case.length,
        'rows': case.rows,
        'documents': case.documents,
        'devices': jax.device_count(),
    }
    try:
        if case.mode in ('train', 'forward'):
            return result | _measure_step(case, calls, repeats, profile)
        if case.mode == 'prefill':
            return result | _measure_prefill(case, calls, repeats)
        return result | _measure_decoding(case, calls, repeats)
    except fitting.DoesNotFitError as error:
        return result | {'does_not_fit': str(error)}
    except jax.errors.JaxRuntimeError as error:
        if not cli.is_out_of_memory(error):
            raise
        return result | {'does_not_fit': str(error).splitlines()[0]}


def random_batch(config: Config, documents: int = 1) -> dict[str, np.ndarray]:
    """A global batch of `random_ids`, in rows of `documents` documents of equal length (the last one longer)."""
    rows, length = config.data.global_batch, config.data.seq_len
    tokens = random_ids(config.model.vocab_size, (rows, length + 1))
    size = max(length // documents, 1)
    document_L = np.minimum(np.arange(length) // size, documents - 1)
    position_L = np.arange(length) - document_L * size
    return {
        'tokens': tokens[:, :-1],
        'targets': tokens[:, 1:],
        'segment_ids': np.broadcast_to(1 + document_L, (rows, length)).astype(np.int32),
        'positions': np.broadcast_to(position_L, (rows, length)).astype(np.int32),
    }


def random_ids(vocab_size: int, shape: tuple[int, ...]) -> np.ndarray:
    """int32 ids, each as frequent as the word of its rank in text (Zipf's law in Mandelbrot's form).

    How often ids repeat decides what the gradient of an embedding costs; equally frequent ones had hidden a tenfold cost.
    """
    weight_V = 1 / (np.arange(vocab_size) + MANDELBROT_SHIFT)
    return np.random.default_rng(0).choice(vocab_size, shape, p=weight_V / weight_V.sum()).astype(np.int32)


def _measure_step(case: Case, calls: int, repeats: int, profile: bool) -> dict:
    config = config_lib.replace(case.config, {'data.seq_len': case.length, 'data.global_batch': case.rows})
    device_mesh = mesh.build(config)
    with jax.set_mesh(device_mesh):
        started = time.perf_counter()

        def compile_step(config):
            compile_one = compilation.compile_train_step if case.mode == 'train' else compilation.compile_eval_step
            return compile_one(config, device_mesh)

        fitted = fitting.fit(config, device_mesh, compile_step)
        compile_seconds = time.perf_counter() - started
        batch = mesh.global_batch(device_mesh, random_batch(config, case.documents), case.rows)
        state = step_lib.create_state(config, device_mesh)
        if case.mode == 'train':
            # By which no step is skipped, so that every call does the whole work.
            limits = [np.full(2, np.inf, np.float32)] if config.train.spike_action == 'skip' else []

            def call():
                nonlocal state
                state, metrics = fitted.step(state, batch, *limits)
                return metrics['loss']

        else:

            def call():
                return fitted.step(state['params'], batch)

        first, times = times_of(call, calls, repeats)
        ops = {'ops': op_table.measure(call, PROFILED_CALLS)} if profile else {}
    config, sizes = fitted.config, dict(device_mesh.shape)
    attended = costs.row_attended(case.length // case.documents)
    per_token = costs.forward_flops_per_token(config.model, attended)
    executed = per_token
    if case.mode == 'train':
        again = roofline.executed_flops_per_token(config, sizes) - costs.train_flops_per_token(
            config.model, costs.row_attended(case.length)
        )
        per_token *= 3
        executed = per_token + again
    result = rates(times, case.rows * case.length) | {
        'compile_seconds': compile_seconds,
        'first_seconds': first,
        'memory_gib': fitting.memory_of(fitted.step) / 2**30,
        'remat': config.model.remat,
        'microbatches': config.train.num_microbatches,
        **ops,
    }
    flops = result['tokens_per_second'] / jax.device_count() * per_token
    result['model_tflops_per_second'] = flops / 1e12
    if peak := chips.peak_flops(jax.devices()[0].device_kind):
        result |= {'mfu': flops / peak, 'hfu': flops / peak * executed / per_token}
    return result


def _measure_prefill(case: Case, calls: int, repeats: int) -> dict:
    decoder = _decoder(case)
    tokens = random_ids(case.config.model.vocab_size, (case.rows, case.length))
    length_B = np.full(case.rows, case.length, np.int32)
    held = [decoder.empty(case.rows, case.length)]

    def call():
        held[0] = decoder.prefill(held[0], jnp.asarray(tokens), length_B, length_B)
        return held[0]['position_B']

    started = time.perf_counter()
    jax.block_until_ready(call())
    compile_seconds = time.perf_counter() - started
    first, times = times_of(call, calls, repeats)
    return rates(times, case.rows * case.length) | {'compile_seconds': compile_seconds, 'first_seconds': first}


def _measure_decoding(case: Case, calls: int, repeats: int) -> dict:
    times = decode_speed.measure(_decoder(case), case.rows, case.length, calls, repeats)
    seconds = [times[name] / 1e3 for name in ('least', 'ms', 'most')]
    return rates(seconds, case.rows) | {'compile_seconds': times['compile_s']}


def _decoder(case: Case) -> Decoder:
    params = jax.jit(lambda seed: parameters.init_params(case.config.model, seed))(0)
    return Decoder(params, case.config)


def times_of(call: Callable, calls: int, repeats: int, wait=jax.block_until_ready) -> tuple[float, list[float]]:
    """(seconds of the first call, seconds of a call in each timed block). wait: blocks until a call's result is there."""
    started = time.perf_counter()
    wait(call())
    first = time.perf_counter() - started
    for _ in range(WARM_UP_CALLS):
        wait(call())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            last = call()
        wait(last)
        times.append((time.perf_counter() - started) / calls)
    return first, times


def rates(times: list[float], tokens: int) -> dict:
    """'ms', 'least_ms', 'most_ms' and 'tokens_per_second' of calls of `tokens` tokens that took so many seconds each."""
    median = statistics.median(times)
    return {
        'ms': 1e3 * median,
        'least_ms': 1e3 * min(times),
        'most_ms': 1e3 * max(times),
        'tokens_per_second': tokens / median,
    }


# ---- tables ------------------------------------------------------------------

_COLUMNS = {
    'model': ('model', '{}'),
    'mode': ('mode', '{}'),
    'length': ('tokens per row', '{:,}'),
    'rows': ('rows', '{:,}'),
    'remat': ('remat', '{}'),
    'microbatches': ('microbatches', '{}'),
    'ms': ('ms', '{:,.2f}'),
    'least_ms': ('least', '{:,.2f}'),
    'most_ms': ('most', '{:,.2f}'),
    'tokens_per_second': ('tokens/s', '{:,.0f}'),
    'mfu': ('MFU', '{:.1%}'),
    'hfu': ('HFU', '{:.1%}'),
    'memory_gib': ('GiB', '{:.1f}'),
    'compile_seconds': ('compile s', '{:.0f}'),
    'first_seconds': ('first s', '{:.2f}'),
}


def markdown_table(results: list[dict]) -> str:
    """One row per result; what does not fit says so in place of its time."""
    used = [name for name in _COLUMNS if any(name in result for result in results)]
    rows = []
    for result in results:
        cells = {name: _COLUMNS[name][1].format(result[name]) for name in used if name in result}
        if 'does_not_fit' in result:
            cells['ms'] = 'does not fit'
        rows.append([cells.get(name, '') for name in used])
    return run_report.markdown([_COLUMNS[name][0] for name in used], rows)


def ratios(results: list[dict], model: str, other: str) -> list[tuple[str, int, float]]:
    """(mode, length, tokens/s of `model` over those of `other`) wherever both had equal rows and as many devices."""
    speed = {
        (r['mode'], r['length'], r['rows'], r['devices'], r['model']): r['tokens_per_second']
        for r in results
        if 'does_not_fit' not in r
    }
    return [
        (mode, length, value / speed[mode, length, rows, devices, other])
        for (mode, length, rows, devices, name), value in speed.items()
        if name == model and (mode, length, rows, devices, other) in speed
    ]


def chart(results: list[dict], title: str) -> charts.Chart:
    """tokens/s by tokens per row, whose axis is logarithmic: a color for each model, a style of line for each mode."""
    measured = [r for r in results if 'does_not_fit' not in r]
    models, modes = (list(dict.fromkeys(r[of] for r in measured)) for of in ('model', 'mode'))
    curves = [
        charts.Curve(
            f'{model}, {mode}',
            sorted(
                (math.log2(r['length']), r['tokens_per_second'])
                for r in measured
                if (r['model'], r['mode']) == (model, mode)
            ),
            color=models.index(model),
            dash=modes.index(mode),
        )
        for model, mode in dict.fromkeys((r['model'], r['mode']) for r in measured)
    ]
    places = tuple((math.log2(length), f'{length:,}') for length in sorted({r['length'] for r in measured}))
    return charts.Chart('bench', title, 'tokens per row', 'tokens/s', curves, x_ticks=places)
