"""Perplexity by position, within and beyond the training length, for each rope scaling.

    python -m transxssm_jax.evals.perplexity --workdir=DIR [--step=N] [--data=DIR] [--split=validation]
        [--lengths=1x,2x,4x,8x] [--rope_scaling=none,linear,dynamic,length] [--documents=long|joined]

Held-out text is cut into windows of each length, which start with an empty
state and position 0. Every length scores the same text, so that a difference
between two lengths is one of context, not of text. 1x is the training length,
data.seq_len of the run.

--documents=long, as in papers on long context, takes documents of at least the
longest length and cuts each from its start; the rest of it is left out.
--documents=joined lays all documents end to end, each with its end-of-document
token, and cuts that; state, attention and positions run on over the ends,
although a model trained here has never seen that. It tells whether a model
stays stable where there are no long documents, not what it makes of context.

Prints a table and writes JSON (--output). Memory grows with the window's
length alone: logits exist for train.loss_chunk_tokens tokens at a time.

Shape legend: B windows, L length, D model, V vocabulary, T tokens of a chunk.
"""

import argparse
import dataclasses
import json
import logging
import math
import pathlib
import re
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from transxssm_jax.config import Config, ConfigError, Model
from transxssm_jax.data.loader import check_vocab, make_loader
from transxssm_jax.data.manifest import DataError, read_manifest
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.evals.scoring import log_likelihoods
from transxssm_jax.model.loss import IGNORED
from transxssm_jax.model.parameters import split_model
from transxssm_jax.training import checkpoint

FINISHED, WRONG_INPUT = 0, 2
SCALINGS = ('none', 'linear', 'dynamic', 'length')
ROW_TOKENS = 8192  # read at a time


def token_losses(hidden_BLD: jax.Array, head_VD: jax.Array, targets_BL: jax.Array, chunk_tokens: int) -> jax.Array:
    """Cross-entropy of every position in nats, float32 [B, L]; 0 where the target is IGNORED.

    Logits are made for chunk_tokens tokens at a time from operands of hidden's dtype, as in loss.py.
    """
    x_TD, target_T = hidden_BLD.reshape(-1, hidden_BLD.shape[-1]), targets_BL.reshape(-1)
    chunk = min(chunk_tokens, len(target_T))
    padding = -len(target_T) % chunk
    x_TD = jnp.pad(x_TD, ((0, padding), (0, 0)))
    target_T = jnp.pad(target_T, (0, padding), constant_values=IGNORED)
    weights_VD = head_VD.astype(hidden_BLD.dtype)

    def one_chunk(inputs):
        x_TD, target_T = inputs
        log_likelihood_T, _ = log_likelihoods(x_TD, weights_VD, jnp.maximum(target_T, 0), len(weights_VD))
        return jnp.where(target_T == IGNORED, 0.0, -log_likelihood_T)

    nll_T = jax.lax.map(one_chunk, (x_TD.reshape(-1, chunk, x_TD.shape[-1]), target_T.reshape(-1, chunk)))
    return nll_T.reshape(-1)[: targets_BL.size].reshape(targets_BL.shape)


def losses_by_position(
    params: dict, config: Config, spans: np.ndarray, length: int, *, batch: int = 1, advance=lambda tokens: None
) -> tuple[np.ndarray, np.ndarray]:
    """Loss at every position of windows of one length.

    Args:
      params, config: from checkpoint.load_trained; config.model.rope_* say how positions are scaled.
      spans: int32 [texts, at least length] tokens; each text gives as many whole windows as it has.
      batch: windows at once.
      advance: called with the number of tokens that are done.

    Returns:
      (nats, counts): float64 and int64 [length], sums over the windows. A window's last token is
      counted where its text goes on.
    """
    windows, rest = spans.shape[1] // length, spans.shape[1] % length
    tokens_BL = spans[:, : windows * length].reshape(-1, length)
    targets = np.concatenate([spans[:, 1:], np.full_like(spans[:, :1], IGNORED)], axis=1)
    targets_BL = targets[:, : spans.shape[1] - rest].reshape(-1, length)
    padding = -len(tokens_BL) % batch
    tokens_BL = np.pad(tokens_BL, ((0, padding), (0, 0)))
    targets_BL = np.pad(targets_BL, ((0, padding), (0, 0)), constant_values=IGNORED)
    graph, _ = split_model(dataclasses.replace(config.model, remat='none'))

    @jax.jit
    def losses(params, tokens_BL, targets_BL):
        model = nnx.merge(graph, params)
        return token_losses(model(tokens_BL), model.head_VD, targets_BL, config.train.loss_chunk_tokens)

    nats_L, counts_L = np.zeros(length), np.zeros(length, np.int64)
    for start in range(0, len(tokens_BL), batch):
        part = slice(start, start + batch)
        nats_L += np.asarray(losses(params, tokens_BL[part], targets_BL[part]), np.float64).sum(axis=0)
        counts_L += (targets_BL[part] != IGNORED).sum(axis=0)
        advance(min(batch, len(tokens_BL) - padding - start) * length)
    return nats_L, counts_L


def bucket_edges(length: int, training_length: int) -> list[int]:
    """Positions at which buckets begin and the last ends: quarters and halves of the training length, then doublings."""
    edges = [training_length // 4, training_length // 2, training_length]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [0, *(edge for edge in edges if 0 < edge < length), length]


def scaled(model: Model, scaling: str, factor: float, training_length: int) -> Model:
    """The model's settings with another rope scaling."""
    return dataclasses.replace(model, rope_scaling=scaling, rope_factor=factor, rope_original_length=training_length)


def _summary(nats_L: np.ndarray, counts_L: np.ndarray, start: int, stop: int) -> dict:
    tokens = int(counts_L[start:stop].sum())
    nats = float(nats_L[start:stop].sum() / tokens) if tokens else math.nan
    return {'from': start, 'to': stop, 'tokens': tokens, 'nats_per_token': nats, 'perplexity': float(np.exp(nats))}


# ---- text ------------------------------------------------------------------------


def read_spans(path: pathlib.Path | str, split: str, length: int, *, documents: str, count: int) -> np.ndarray:
    """Held-out text in spans of one length, in the order of the split.

    Args:
      path, split: prepared data.
      documents: 'long' or 'joined', see above.
      count: most spans; 0: all.

    Returns:
      int32 [spans, length].

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
    spans = []
    for document in _documents(path, split) if documents == 'long' else _joined(path, split, length):
        spans += [document[i * length : (i + 1) * length] for i in range(len(document) // length)]
        if count and len(spans) >= count:
            break
    return np.stack(spans[: count or None])


def _rows(path, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(stored tokens, whether the document ends with it) of the split, a row after another."""
    with make_loader(path, split, seq_len=ROW_TOKENS, global_batch=1, seed=0, shuffle=False, repeat=False) as loader:
        for batch in loader:
            kept = batch['segment_ids'][0] > 0
            tokens = batch['targets'][0][kept]  # the inputs hold the begin token in place of eos
            yield tokens, tokens == loader.eos_id


def _documents(path, split: str) -> Iterator[np.ndarray]:
    held = []
    for tokens, ends in _rows(path, split):
        start = 0
        for stop in np.flatnonzero(ends) + 1:
            yield np.concatenate([*held, tokens[start:stop]])
            held, start = [], stop
        held.append(tokens[start:])


def _joined(path, split: str, length: int) -> Iterator[np.ndarray]:
    """All tokens, in pieces of `length`; a rest is dropped."""
    held = np.zeros(0, np.int32)
    for tokens, _ in _rows(path, split):
        held = np.concatenate([held, tokens])
        whole = len(held) // length * length
        if whole:
            yield held[:whole]
            held = held[whole:]


# ---- the command -----------------------------------------------------------------


def evaluate(
    params: dict,
    config: Config,
    spans: np.ndarray,
    *,
    lengths: list[int],
    scalings: list[str],
    factor: float,
    batch: int,
) -> list[dict]:
    """One result for each scaling and length, with its buckets; shows a progress bar."""
    training_length, results = config.data.seq_len, []
    total = len(scalings) * sum(spans.shape[0] * (spans.shape[1] // length * length) for length in lengths)
    with tqdm.tqdm(total=total, desc='perplexity', unit=' tokens', unit_scale=True, disable=None) as bar:
        for scaling in scalings:
            model = scaled(config.model, scaling, factor, training_length)
            for length in lengths:
                bar.set_postfix_str(f'{scaling}, {length}')
                nats_L, counts_L = losses_by_position(
                    params, dataclasses.replace(config, model=model), spans, length, batch=batch, advance=bar.update
                )
                edges = bucket_edges(length, training_length)
                total_of = _summary(nats_L, counts_L, 0, length)
                results.append(
                    {
                        'rope_scaling': scaling,
                        'length': length,
                        'windows': spans.shape[0] * (spans.shape[1] // length),
                        **{name: total_of[name] for name in ('tokens', 'nats_per_token', 'perplexity')},
                        'buckets': [_summary(nats_L, counts_L, *edges[i : i + 2]) for i in range(len(edges) - 1)],
                    }
                )
    return results


def table(results: list[dict], training_length: int) -> str:
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


def _parse_lengths(text: str, training_length: int) -> list[int]:
    lengths = set()
    for part in text.split(','):
        match = re.fullmatch(r'(\d+)(x?)', part.strip())
        length = int(match[1]) * (training_length if match[2] else 1) if match else 0
        if length < 2:
            raise ConfigError(
                f'--lengths={text}: {part!r} must be a number of tokens of at least 2, or a multiple of the '
                f'training length ({training_length}) such as 2x'
            )
        lengths.add(length)
    return sorted(lengths)


def _parse_scalings(text: str) -> list[str]:
    scalings = [part.strip() for part in text.split(',')]
    for scaling in scalings:
        if scaling not in SCALINGS:
            raise ConfigError(f'--rope_scaling={text}: {scaling!r} is not one of {", ".join(SCALINGS)}')
    return scalings


def _check_tokenizer(path: str, split: str, config: Config) -> None:
    check_vocab(path, config.model.vocab_size)
    if not config.data.path:
        return
    try:
        trained = load_tokenizer(config.data.path).describe()
    except DataError:
        return  # what it was trained on is not here
    given = read_manifest(path, split).tokenizer
    if (given['kind'], given['sha256']) != (trained['kind'], trained['sha256']):
        raise DataError(
            f'{path} was prepared with another tokenizer than the one of the run ({config.data.path}); prepare the '
            'text with that one'
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m transxssm_jax.evals.perplexity',
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--workdir', required=True, help='directory of the run')
    parser.add_argument('--step', type=int, default=-1, help='which checkpoint; default: the newest')
    parser.add_argument('--data', default='', help="prepared data; default: the run's")
    parser.add_argument('--split', default='', help="split of it; default: the run's evaluation split")
    parser.add_argument('--lengths', default='1x,2x,4x,8x', help='window lengths, in tokens or training lengths (2x)')
    parser.add_argument('--rope_scaling', default=','.join(SCALINGS), help='scalings to compare')
    parser.add_argument(
        '--rope_factor', type=float, default=0.0, help="stretch of linear and dynamic; default: the run's"
    )
    parser.add_argument('--documents', choices=('long', 'joined'), default='long', help='see above')
    parser.add_argument('--windows', type=int, default=16, help='most windows of the longest length; 0: all there are')
    parser.add_argument('--batch', type=int, default=1, help='windows at once')
    parser.add_argument('--output', default='', help='JSON file; default: perplexity.json in the workdir')
    return parser


def main(argv: list[str] | None = None) -> int:
    logging.getLogger('absl').setLevel(logging.ERROR)
    arguments = _parser().parse_args(argv)
    try:
        if arguments.batch < 1 or arguments.windows < 0:
            raise ConfigError(
                f'--batch={arguments.batch} must be at least 1 and --windows={arguments.windows} at least 0'
            )
        if arguments.rope_factor and not 1 <= arguments.rope_factor < math.inf:
            raise ConfigError(f'--rope_factor={arguments.rope_factor} must be at least 1')
        scalings = _parse_scalings(arguments.rope_scaling)
        params, config = checkpoint.load_trained(arguments.workdir, arguments.step)
        lengths = _parse_lengths(arguments.lengths, config.data.seq_len)
        data = arguments.data or config.data.path
        if not data:
            raise ConfigError('the run names no data; give --data=DIR (python -m transxssm_jax.data.prepare)')
        split = arguments.split or config.data.eval_split or 'validation'
        _check_tokenizer(data, split, config)
        spans = read_spans(data, split, lengths[-1], documents=arguments.documents, count=arguments.windows)
        factor = arguments.rope_factor or config.model.rope_factor
        results = evaluate(
            params, config, spans, lengths=lengths, scalings=scalings, factor=factor, batch=arguments.batch
        )
        report = {
            'workdir': str(arguments.workdir),
            'data': str(data),
            'split': split,
            'documents': arguments.documents,
            'training_length': config.data.seq_len,
            'rope_factor': factor,
            'results': results,
        }
        output = pathlib.Path(arguments.output or pathlib.Path(arguments.workdir) / 'perplexity.json')
        output.write_text(json.dumps(report, indent=1) + '\n')
    except (ConfigError, DataError, checkpoint.CheckpointError, OSError) as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return WRONG_INPUT
    print(table(results, config.data.seq_len))
    print(f'written to {output}')
    return FINISHED


if __name__ == '__main__':
    sys.exit(main())
