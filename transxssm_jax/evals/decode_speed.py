"""Decoding speed against the Transformer of the same sizes, with random weights and random caches.

    python -m transxssm_jax.evals.decode_speed --config=configs/1p3b.py [--contexts=4096,16384,65536] [--batches=1,64]
        [--models=config,transformer] [--out=FILE.json] [--config.a.b=value]

'transformer' is the config with attention in every layer. Where rows of a context do not fit the device's memory for
every model, all are measured with the most rows that do, and a line above the table reports it. Columns:

  ms        median time of a step (one token per row), of --repeats blocks of --steps steps; spread: least and most
  tokens/s  rows over that time
  GB        least bytes of a step: weights once, states read and written, keys and values of the context read
  bound     those bytes at the bandwidth that a plain sum reaches on this device, and its share of the step's time
  weights   the step's time over that of reading the weights alone

Exit codes: 0 finished; 2 wrong input, with one line.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.evals.decode_speed')

import dataclasses
import functools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from transxssm_jax import config as config_lib
from transxssm_jax.cli import Flag
from transxssm_jax.config import Config, ConfigError, Model
from transxssm_jax.inference.decode import Decoder
from transxssm_jax.inference.sampling import Sampling
from transxssm_jax.model import costs, parameters

MEMORY_SHARE = 0.94  # of the device's memory, for weights, caches and a step's temporaries
MODELS = ('config', 'transformer')

COMMAND = cli.Command(
    'transxssm_jax.evals.decode_speed',
    __doc__,
    [
        Flag('contexts', (4096, 16384, 65536), 'Tokens in the cache.', minimum=1),
        Flag('batches', (1, 64), 'Rows at once.', minimum=1),
        Flag('models', MODELS, "Models to measure: 'config' and 'transformer'.", choices=MODELS),
        Flag('steps', 32, 'Tokens per row in a timed block.', minimum=1),
        Flag('repeats', 5, 'Timed blocks.', minimum=1),
        Flag('output', '', 'JSON file to write the lines to; empty: none.', is_path=True),
    ],
    settings=config_lib.describe,
)
ROWS_STEP = 8  # reduced batches are multiples of this


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of decoding: all weights, the states of one row, and the cache of one row per token."""

    weights: int
    states: int
    cache_per_token: int

    @classmethod
    def of(cls, model: Model) -> 'Sizes':
        layers = costs.layer_costs(model)
        return cls(
            weights=parameters.count_params(model) * costs.dtype_bytes(model),
            states=sum(count * layer.state_bytes for _, count, layer in layers),
            cache_per_token=sum(count * layer.cache_bytes for _, count, layer in layers),
        )

    def held(self, rows: int, context: int, model: Model) -> int:
        """Bytes in memory: weights, states and caches, scores of one layer and logits, both float32 with a copy or two."""
        scores = rows * model.num_heads * context * 4
        return self.weights + rows * (self.states + context * self.cache_per_token + 16 * model.vocab_size) + 3 * scores

    def moved(self, rows: int, context: int) -> int:
        """Least bytes of a step."""
        return self.weights + rows * (2 * self.states + context * self.cache_per_token)


def transformer_of(config: Config) -> Config:
    """The same sizes with attention in every layer."""
    return config_lib.replace(config, {'model.pattern': 'attention'})


def rows_that_fit(models: list[Model], rows: int, context: int, memory: float) -> int:
    """The most rows, up to `rows`, with which the decoding of every model fits the memory; 0: none."""
    sizes = [Sizes.of(model) for model in models]

    def fits(count):
        return all(size.held(count, context, model) <= memory for size, model in zip(sizes, models))

    tries = [rows, *range((rows - 1) // ROWS_STEP * ROWS_STEP, 0, -ROWS_STEP), 1]
    return next((count for count in tries if count <= rows and fits(count)), 0)


def bandwidth(gibibytes: float = 4.0, repeats: int = 7) -> float:
    """Bytes/s that a plain sum of bfloat16 reads on this device."""
    x = jnp.zeros(int(gibibytes * 2**29), jnp.bfloat16)
    total = jax.jit(functools.partial(jnp.sum, dtype=jnp.float32))
    return x.nbytes / statistics.median(_times(lambda: total(x), repeats))


def random_state(decoder: Decoder, rows: int, context: int) -> dict:
    """A state with room for `context` tokens whose caches hold noise."""
    state = decoder.empty(rows, context)

    def noise(i, leaf):
        # One row of at most 1,024 tokens, repeated: noise for the whole cache would take as much memory again.
        period = (1, *leaf.shape[1:2], min(leaf.shape[2], 1024), *leaf.shape[3:])
        values = jax.random.normal(jax.random.key(i), period, leaf.dtype)
        rows, _, tokens, *_ = [jnp.arange(size) % repeat for size, repeat in zip(leaf.shape, period)]
        return values[rows][:, :, tokens]

    leaves, tree = jax.tree.flatten(state['caches'])
    for i in range(len(leaves)):
        leaves[i] = jax.jit(noise, static_argnums=0, donate_argnums=1, keep_unused=True)(i, leaves[i])
    return state | {'caches': jax.tree.unflatten(tree, leaves)}


def runner(decoder: Decoder, rows: int, context: int, steps: int, blocks: int):
    """A function that decodes `steps` tokens per row near the end of the context; it can be called `blocks` times."""
    sampling = Sampling(temperature=1.0)
    start = context - steps * blocks
    settings = {
        'limit_B': np.full(rows, context, np.int32),
        'rope_length_B': np.full(rows, context, np.int32),
        'seed_B': np.arange(rows, dtype=np.uint32),
    }
    held = [
        random_state(decoder, rows, context)
        | {'position_B': jnp.full(rows, start, jnp.int32), 'done_B': jnp.zeros(rows, bool)}
    ]
    stop_T, done_B = np.zeros(0, np.int32), np.zeros(rows, bool)

    def run():
        held[0], tokens_BT = decoder.run(
            held[0],
            settings,
            stop_T,
            done_B,
            np.int32(steps),
            flags=sampling.flags(decoder.model.vocab_size),
            values=sampling.values(),
            block=steps,
        )
        return tokens_BT

    return run


def measure(decoder: Decoder, rows: int, context: int, steps: int, repeats: int) -> dict:
    """Times of a step in ms: 'ms' (median), 'least', 'most'; 'compile_s': seconds to compile and run the first block."""
    if context < steps * (repeats + 1) + 1:
        raise ConfigError(
            f'--contexts={context} must be above --steps={steps} x (--repeats={repeats} + 1); lower those'
        )
    run = runner(decoder, rows, context, steps, repeats + 1)
    started = time.perf_counter()
    jax.block_until_ready(run())
    compile_s = time.perf_counter() - started
    times = [1e3 * seconds / steps for seconds in _times(run, repeats, warm=False)]
    return dict(ms=statistics.median(times), least=min(times), most=max(times), compile_s=compile_s)


def _times(function, repeats, warm=True):
    if warm:
        jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - started)
    return times


def memory_of_device() -> float:
    """Bytes of the first device that JAX may use; infinity where there is no such limit (a CPU)."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get('bytes_limit', float('inf'))


def table(
    configs: dict[str, Config], contexts: list[int], batches: list[int], steps: int, repeats: int, write
) -> list[dict]:
    """Measures every model at every context and batch; passes each line to `write` as it comes and returns them."""
    memory, speed = MEMORY_SHARE * memory_of_device(), bandwidth()
    device = jax.devices()[0]
    write(f'{device.device_kind}, jax {jax.__version__}: a sum reads {speed / 1e9:,.0f} GB/s')
    cases = []
    for context in contexts:
        for batch in batches:
            rows = rows_that_fit([config.model for config in configs.values()], batch, context, memory)
            if rows != batch:
                needs = ', '.join(
                    f'{name} {Sizes.of(config.model).held(batch, context, config.model) / 1e9:.0f} GB'
                    for name, config in configs.items()
                )
                write(
                    f'{batch} rows of {context} tokens need {needs} of {memory / 1e9:.0f} GB: '
                    + (f'measured with {rows} rows' if rows else 'not measured')
                )
            if rows:
                cases.append((context, rows))
    write(
        f'{"model":12} {"context":>7} {"rows":>4} {"ms":>8} {"spread":>15} {"tokens/s":>9} {"GB":>7} {"bound ms":>8} '
        f'{"share":>6} {"weights":>7} {"compile s":>9}'
    )
    lines = []
    for name, config in configs.items():
        sizes = Sizes.of(config.model)
        decoder = Decoder(jax.jit(functools.partial(parameters.init_params, config.model))(0), config)
        for context, rows in dict.fromkeys(cases):
            times = measure(decoder, rows, context, steps, repeats)
            moved = sizes.moved(rows, context)
            bound = 1e3 * moved / speed
            line = dict(
                model=name,
                context=context,
                rows=rows,
                **times,
                tokens_per_s=1e3 * rows / times['ms'],
                bytes=moved,
                bound_ms=bound,
                over_weights=times['ms'] / (1e3 * sizes.weights / speed),
            )
            lines.append(line)
            write(
                f'{name:12} {context:7} {rows:4} {line["ms"]:8.3f} {line["least"]:7.3f}-{line["most"]:7.3f} '
                f'{line["tokens_per_s"]:9.0f} {moved / 1e9:7.2f} {bound:8.3f} {bound / line["ms"]:6.0%} '
                f'{line["over_weights"]:7.2f} {line["compile_s"]:9.1f}'
            )
        del decoder
    for context, rows in dict.fromkeys(cases):
        of = {line['model']: line['ms'] for line in lines if (line['context'], line['rows']) == (context, rows)}
        if set(of) == set(MODELS):
            write(f'{context} tokens, {rows} rows: {of["transformer"] / of["config"]:.2f}x the Transformer')
    return lines


def main(argv: list[str] | None = None) -> int:
    """The command; see the module's docstring. Returns its exit code."""
    return cli.run(COMMAND, _measure, argv)


def _measure(flags) -> None:
    config = config_lib.from_flags(flags)
    configs = {'config': config, 'transformer': transformer_of(config)}
    lines = table(
        {name: configs[name] for name in flags.models},
        list(flags.contexts),
        list(flags.batches),
        flags.steps,
        flags.repeats,
        functools.partial(print, flush=True),
    )
    if flags.output:
        pathlib.Path(flags.output).write_text(json.dumps(lines, indent=2) + '\n')
