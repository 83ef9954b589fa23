"""Perplexity by position, within and beyond the training length, for each rope scaling.

    python -m transxssm_jax.evals.perplexity --workdir=DIR [--step=N] [--data=DIR] [--split=validation]
        [--lengths=1x,2x,4x,8x] [--rope_scaling=none,linear,dynamic,length] [--documents=long|joined]

Held-out text is cut into windows of each length, as rows of training are: each window starts with an empty state and
position 0, its first input is the tokenizer's begin token at the start of a document and the token before the window
elsewhere, and each of its tokens is scored. Every length scores the same text, so that a difference between two
lengths is one of context, not of text. 1x is the training length, data.seq_len of the run.

--documents=long, as in papers on long context, takes documents of at least the longest length and cuts each from its
start; the rest of the document is left out. --documents=joined joins all documents, each with its end-of-document
token, and cuts the joined text; state, attention and positions continue across the ends of documents, although the
model was never trained so. It shows whether a model stays stable where there are no long documents, not how well it
uses context.

Prints a table and writes JSON to --output, by default WORKDIR/evals/perplexity-step-STEP-TIME.json. Memory grows only
with the window's length: logits exist for train.loss_chunk_tokens tokens at a time.

Shape legend: B windows, L length, D model, V vocabulary, T tokens of a chunk.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.evals.perplexity')

import logging
import math
import pathlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from transxssm_jax import config as config_lib
from transxssm_jax.cli import Flag
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.data.loader import read_documents
from transxssm_jax.data.manifest import DataError, read_manifest
from transxssm_jax.evals import results as results_lib
from transxssm_jax.evals.scoring import log_likelihoods
from transxssm_jax.inference.trained_run import open_trained_run
from transxssm_jax.model import parameters
from transxssm_jax.model.loss import IGNORED
from transxssm_jax.parallel import collectives
from transxssm_jax.training import checkpoint, splits
from transxssm_jax.training.checkpoint import WEIGHTS

SCALINGS = ('none', 'linear', 'dynamic', 'length')

COMMAND = cli.Command(
    'transxssm_jax.evals.perplexity',
    __doc__,
    [
        Flag(
            'workdir',
            cli.REQUIRED,
            'Directory of the run, alone or with @STEP, @best or @latest.',
            example='runs/a',
            is_path=True,
            is_place=True,
        ),
        Flag('step', -1, 'Step of the checkpoint; -1: the newest.', minimum=-1),
        Flag('weights', 'trained', 'Which weights of it: the trained ones, or their average.', choices=WEIGHTS),
        Flag('data', '', 'Prepared directory; empty: data.path of the run.', is_path=True),
        Flag('split', '', 'Split of it; empty: the evaluation split of the run.'),
        Flag('lengths', ('1x', '2x', '4x', '8x'), 'Window lengths, in tokens or training lengths (2x).'),
        Flag('rope_scaling', SCALINGS, 'Rope scalings to compare.', choices=SCALINGS),
        Flag('rope_factor', 0.0, 'Stretch of linear and dynamic; 0: that of the run.', minimum=0.0),
        Flag('documents', 'long', 'How text becomes windows, see above.', choices=('long', 'joined')),
        Flag('windows', 16, 'Most windows of the longest length; 0: all there are.', minimum=0),
        Flag('batch', 1, 'Windows at once.', minimum=1),
        Flag('output', '', 'New JSON file; empty: one in WORKDIR/evals.', is_path=True),
    ],
)


def token_losses(
    hidden_BLD: jax.Array,
    head_VD: jax.Array,
    targets_BL: jax.Array,
    *,
    vocab_size: int,
    chunk_tokens: int,
    logit_soft_cap: float = 0.0,
) -> jax.Array:
    """Cross-entropy of every position in nats, float32 [B, L]; 0 where the target is IGNORED.

    Logits are computed for chunk_tokens tokens at a time from operands of hidden's dtype, as in loss.py. Within a
    shard_map hidden and targets are this device's rows, and head_VD its shard.
    """
    x_TD, target_T = hidden_BLD.reshape(-1, hidden_BLD.shape[-1]), targets_BL.reshape(-1)
    chunk = min(chunk_tokens, len(target_T))
    padding = -len(target_T) % chunk
    x_TD = jnp.pad(x_TD, ((0, padding), (0, 0)))
    target_T = jnp.pad(target_T, (0, padding), constant_values=IGNORED)
    weights_VD = head_VD.astype(hidden_BLD.dtype)

    def one_chunk(inputs):
        x_TD, target_T = inputs
        log_likelihood_T, _ = log_likelihoods(x_TD, weights_VD, jnp.maximum(target_T, 0), vocab_size, logit_soft_cap)
        return jnp.where(target_T == IGNORED, 0.0, -log_likelihood_T)

    nll_T = jax.lax.map(one_chunk, (x_TD.reshape(-1, chunk, x_TD.shape[-1]), target_T.reshape(-1, chunk)))
    return nll_T.reshape(-1)[: targets_BL.size].reshape(targets_BL.shape)


def losses_by_position(
    params: dict,
    config: Config,
    spans: tuple[np.ndarray, np.ndarray],
    length: int,
    *,
    batch: int = 1,
    advance=lambda tokens: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Loss at every position of windows of one length, on the mesh in use (jax.set_mesh) or one device without one.

    Args:
      params, config: of a run; config.model.rope_* are how positions are scaled.
      spans: tokens and targets of texts, as from `read_spans`, int32 [texts, at least length]; each text gives as many
        whole windows as it has.
      batch: windows at once; rounded up to a multiple of the devices that share the rows.
      advance: called with the number of tokens that are done.

    Returns:
      (nats, counts): float64 and int64 [length], sums over the windows.
    """
    shards = collectives.num_shards('batch')
    batch = -(-batch // shards) * shards
    covered = spans[0].shape[1] // length * length
    tokens_BL, targets_BL = (side[:, :covered].reshape(-1, length) for side in spans)
    padding = -len(tokens_BL) % batch
    tokens_BL = np.pad(tokens_BL, ((0, padding), (0, 0)))
    targets_BL = np.pad(targets_BL, ((0, padding), (0, 0)), constant_values=IGNORED)
    graph, _ = parameters.split_for_evaluation(config.model)

    def of_block(params, tokens_BL, targets_BL):
        model = nnx.merge(graph, params)
        return token_losses(
            model(tokens_BL),
            model.head_VD,
            targets_BL,
            vocab_size=config.model.vocab_size,
            chunk_tokens=config.train.loss_chunk_tokens,
            logit_soft_cap=config.model.logit_soft_cap,
        )

    rows = ('batch', None)
    losses = jax.jit(parameters.on_shards(of_block, config.model, (rows, rows), rows))

    nats_L, counts_L = np.zeros(length), np.zeros(length, np.int64)
    for start in range(0, len(tokens_BL), batch):
        part = slice(start, start + batch)
        nats_L += np.asarray(losses(params, tokens_BL[part], targets_BL[part]), np.float64).sum(axis=0)
        counts_L += (targets_BL[part] != IGNORED).sum(axis=0)
        advance(min(batch, len(tokens_BL) - padding - start) * length)
    return nats_L, counts_L


def bucket_edges(length: int, training_length: int) -> list[int]:
    """Positions between buckets: a quarter, a half and all of the training length, then doublings, from 0 to the length."""
    edges = [training_length // 4, training_length // 2, training_length]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [0, *(edge for edge in edges if 0 < edge < length), length]


def scaled(config: Config, scaling: str, factor: float) -> Config:
    """The config with another rope scaling, from the training length on."""
    return config_lib.replace(
        config,
        {
            'model.rope_scaling': scaling,
            'model.rope_factor': factor,
            'model.rope_original_length': config.data.seq_len,
        },
    )


def _summary(nats_L: np.ndarray, counts_L: np.ndarray, start: int, stop: int) -> dict:
    tokens = int(counts_L[start:stop].sum())
    nats = float(nats_L[start:stop].sum() / tokens) if tokens else math.nan
    return {'from': start, 'to': stop, 'tokens': tokens, 'nats_per_token': nats, 'perplexity': float(np.exp(nats))}


# ---- text ------------------------------------------------------------------------


def read_spans(
    path: pathlib.Path | str, split: str, length: int, *, begin: int, documents: str, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out text in spans of one length, in the order of the split.

    Args:
      path, split: prepared data.
      length: tokens of a span.
      begin: the input whose target is the first token of a document.
      documents: 'long' or 'joined', see the module's docstring.
      count: most spans; 0: all.

    Returns:
      (tokens, targets), each int32 [spans, length].

    Raises:
      DataError: the split has no such span.
    """
    lengths = read_manifest(path, split).lengths()
    if documents == 'long' and lengths.max() < length:
        raise DataError(
            f'{path} has no document of {length} tokens in split {split!r}, the longest has {lengths.max()}; lower '
            '--lengths, or give --documents=joined'
        )
    if documents == 'joined' and lengths.sum(dtype=np.int64) < length:
        raise DataError(
            f'{path} has {lengths.sum(dtype=np.int64)} tokens in split {split!r}, less than one window of {length}; '
            'lower --lengths'
        )
    texts = _shifted(path, split, begin, at_least=length if documents == 'long' else 1)
    if documents == 'joined':
        texts = _joined(texts, length)
    spans = []
    for text in texts:
        spans += [text[:, i : i + length] for i in range(0, text.shape[1] // length * length, length)]
        if count and len(spans) >= count:
            break
    tokens, targets = np.stack(spans[: count or None], axis=1)
    return tokens, targets


def _shifted(path, split: str, begin: int, *, at_least: int) -> Iterator[np.ndarray]:
    """Tokens and targets of each document, int32 [2, length]."""
    for targets in read_documents(path, split, at_least=at_least):
        yield np.stack([np.concatenate([[begin], targets[:-1]]), targets]).astype(np.int32)


def _joined(documents: Iterator[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Documents end to end, in multiples of `length` tokens; the last tokens that do not fill one are dropped."""
    held, size = [], 0
    for document in documents:
        held.append(document)
        size += document.shape[1]
        if size >= length:
            joined = np.concatenate(held, axis=1)
            whole = size // length * length
            yield joined[:, :whole]
            held, size = [joined[:, whole:]], size - whole


# ---- the command -----------------------------------------------------------------


def evaluate(
    params: dict,
    config: Config,
    spans: tuple[np.ndarray, np.ndarray],
    *,
    lengths: list[int],
    scalings: list[str],
    factor: float,
    batch: int,
) -> list[dict]:
    """One result for each scaling and length, with its buckets; shows a progress bar.

    Arguments as `losses_by_position`; factor is model.rope_factor of the scalings that have one.
    """
    training_length, results = config.data.seq_len, []
    total = len(scalings) * sum(spans[0].shape[0] * (spans[0].shape[1] // length * length) for length in lengths)
    with tqdm.tqdm(total=total, desc='perplexity', unit=' tokens', unit_scale=True, disable=None) as bar:
        for scaling in scalings:
            changed = scaled(config, scaling, factor)
            for length in lengths:
                bar.set_postfix_str(f'{scaling}, {length}')
                nats_L, counts_L = losses_by_position(params, changed, spans, length, batch=batch, advance=bar.update)
                edges = bucket_edges(length, training_length)
                total_of = _summary(nats_L, counts_L, 0, length)
                results.append(
                    {
                        'rope_scaling': scaling,
                        'length': length,
                        'windows': spans[0].shape[0] * (spans[0].shape[1] // length),
                        **{name: total_of[name] for name in ('tokens', 'nats_per_token', 'perplexity')},
                        'buckets': [_summary(nats_L, counts_L, *edges[i : i + 2]) for i in range(len(edges) - 1)],
                    }
                )
    return results


def table(results: list[dict], training_length: int) -> str:
    """One line for each bucket and each whole length of `evaluate`'s results."""
    lines = [
        f'{"rope scaling":>12} {"length":>8} {"positions":>17} {"tokens":>11} {"nats/token":>11} {"perplexity":>11}'
    ]
    for result in results:
        whole = {'from': 0, 'to': result['length'], **result}
        for bucket in [*result['buckets'], whole] if len(result['buckets']) > 1 else [whole]:
            what = 'all' if bucket is whole else f'{bucket["from"]}-{bucket["to"]}'
            beyond = '+' if bucket is not whole and bucket['from'] >= training_length else ''
            lines.append(
                f'{result["rope_scaling"]:>12} {result["length"]:>8} {what + beyond:>17} {bucket["tokens"]:>11,} '
                f'{bucket["nats_per_token"]:>11.4f} {bucket["perplexity"]:>11.4g}'
            )
    return '\n'.join([*lines, f'+ beyond the training length of {training_length}'])


def _parse_lengths(parts: tuple[str, ...], training_length: int) -> list[int]:
    lengths = set()
    for part in parts:
        match = re.fullmatch(r'(\d+)(x?)', part.strip())
        length = int(match[1]) * (training_length if match[2] else 1) if match else 0
        if length < 2:
            raise ConfigError(
                f'--lengths={",".join(parts)}: {part!r} must be a number of tokens of at least 2, or a multiple of the '
                f'training length ({training_length}) such as 2x'
            )
        lengths.add(length)
    return sorted(lengths)


def main(argv: list[str] | None = None) -> int:
    """The command; see the module's docstring. Returns its exit code."""
    return cli.run(COMMAND, _evaluate, argv)


def _evaluate(flags) -> None:
    logging.getLogger('absl').setLevel(logging.ERROR)
    if flags.rope_factor and flags.rope_factor < 1:
        raise ConfigError(f'--rope_factor={flags.rope_factor} must be at least 1')
    lengths = _parse_lengths(flags.lengths, checkpoint.load_config(flags.workdir, flags.step).data.seq_len)
    run = open_trained_run(flags.workdir, flags.step, flags.data, flag='--data', weights=flags.weights)
    config = run.config
    output = results_lib.choose_output(flags.output, run, 'perplexity')
    data, split = splits.locate(config, flags.split or next(iter(config.data.eval_split_names), 'validation'))
    data = flags.data or data
    spans = read_spans(
        data, split, lengths[-1], begin=run.tokenizer.begin_id, documents=flags.documents, count=flags.windows
    )
    scalings, factor = list(flags.rope_scaling), flags.rope_factor or config.model.rope_factor
    num_spans = len(spans[0])
    tokens = len(scalings) * sum(num_spans * (lengths[-1] // length * length) for length in lengths)
    print(
        f'perplexity of {flags.workdir} at step {run.step}: {len(scalings)} rope scalings x {len(lengths)} lengths over '
        f'{num_spans} texts of {lengths[-1]:,} tokens, {tokens:,} tokens to read; results go to {output}',
        flush=True,
    )
    results = evaluate(run.params, config, spans, lengths=lengths, scalings=scalings, factor=factor, batch=flags.batch)
    report = {
        **results_lib.of_run(run, COMMAND.module, flags.argv),
        'data': str(data),
        'split': split,
        'documents': flags.documents,
        'training_length': config.data.seq_len,
        'rope_factor': factor,
        'results': results,
    }
    results_lib.write_json(output, report)
    print(table(results, config.data.seq_len))
    print(f'results written to {output}')
