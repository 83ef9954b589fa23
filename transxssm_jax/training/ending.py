"""What a run that is finished says: a sample, its goodput, and its last line; and how any run is closed."""

import contextlib
from collections.abc import Callable

from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.parallel import processes
from transxssm_jax.training import checkpoint, splits

PROMPT_TOKENS = 128  # of the document that the sample continues


def summarise(run, sample: Callable) -> None:
    """Prints a sampled continuation, where settings ask for one, the goodput, and the last line.

    Args:
      run: a `loop.Run`, of which all is saved.
      sample: as `loop.train` takes it.
    """
    run.phases.begin('end')
    run.local.remove()
    run.writers.close()
    if run.config.train.sample_tokens and processes.is_multiprocess():
        run.writers.print(
            f'no sample: sampling takes one process; run python -m transxssm_jax.generate --workdir={run.workdir}'
        )
    elif run.config.train.sample_tokens:
        print_sample(run, sample)
    run.goodput.write()
    run.writers.print(run.goodput.describe())
    line = f'finished at step {run.step}'
    if 'eval_loss' in run.evaluation:
        line += (
            f': evaluation loss {run.evaluation["eval_loss"]:.4f} nats a token, '
            f'{run.evaluation["eval_bits_per_byte"]:.4f} bits a byte'
        )
    run.writers.print(line)


def print_sample(run, sample: Callable) -> None:
    """Continues the beginning of a split's first document."""
    config = run.config
    tokenizer = load_tokenizer(config.data.tokenizer_path)
    split = next(iter(splits.eval_splits(config)), config.data.train_split)
    with splits.open_split(config, run.mesh, split, seed=0, shuffle=False, repeat=False) as loader:
        row = next(loader)
    prompt = tokenizer.decode(row['tokens'][0][row['segment_ids'][0] == 1][:PROMPT_TOKENS])
    text = sample(
        run.state['params'],
        config,
        tokenizer,
        prompt=prompt,
        seed=config.train.seed,
        max_tokens=config.train.sample_tokens,
    )
    print(f'--- from the {split} split ---\n{prompt}\n--- a sampled continuation ---\n{text[len(prompt) :]}\n---')


def close(run) -> None:
    """Ends threads and open files. `wait` or `save` has reported a checkpoint that could not be written."""
    run.watchdog.close()
    run.writers.close()
    if run.ledger:
        run.ledger.close()
    if not run.watchdog.has_interrupted:  # its threads may never end
        run.loader.close()
    run.local.wait()
    with contextlib.suppress(checkpoint.CheckpointError):
        run.checkpoints.close()
