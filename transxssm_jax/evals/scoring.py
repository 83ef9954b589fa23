"""Log-likelihoods of continuations, in batches of similar length.

Shape legend: B rows, L length, D model, V vocabulary, R tokens whose probability is read.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transxssm_jax.config import Config
from transxssm_jax.data.vocabulary import check_tokenizer
from transxssm_jax.inference.padding import padded_count, padded_length
from transxssm_jax.inference.sampling import InputError
from transxssm_jax.model import parameters
from transxssm_jax.model.language_model import to_logits
from transxssm_jax.parallel import collectives, mesh

READS = (64, 512)  # logits made at a time, [R, V]: all of a batch would not fit


class Scorer:
    """A model that tells how likely given continuations are; it has no part that generates.

    Runs under the mesh in use (jax.set_mesh), its batches split over it, or on one device without one.

    Args:
      params: nested dict of float32 arrays as in the state of step.py or from checkpoint.load_trained.
      config: of the run; only config.model is read.
      max_length: most tokens that the model is shown at once.
      batch_tokens: B x L of a batch, padding included.
      tokenizer: of the training data; rows of the embedding beyond its vocab_size are never the likeliest token.

    Raises:
      InputError: a number is below 1.
      DataError: the tokenizer has more ids than the model.
    """

    def __init__(self, params: dict, config: Config, tokenizer, *, max_length: int, batch_tokens: int):
        for name, value in (('max_length', max_length), ('batch_tokens', batch_tokens)):
            if value < 1:
                raise InputError(f'{name}={value} must be at least 1')
        check_tokenizer(tokenizer, config.model.vocab_size)
        self.params, self.max_length, self.batch_tokens = params, max_length, batch_tokens
        self._begin_id = tokenizer.begin_id
        graph, _ = parameters.split_for_evaluation(config.model)
        rows = ('batch', None)

        def hidden(params, tokens_BL, positions_BL):
            return nnx.merge(graph, params)(tokens_BL, positions_BL=positions_BL)

        def read(params, hidden_RD, target_R):
            head_VD = nnx.merge(graph, params).head_VD
            return log_likelihoods(hidden_RD, head_VD, target_R, tokenizer.vocab_size, config.model.logit_soft_cap)

        hidden = parameters.on_shards(hidden, config.model, (rows, rows), ('batch', None, None))
        read = parameters.on_shards(read, config.model, ((None, None), (None,)), ((None,), (None,)))

        @jax.jit
        def read_at(params, hidden_BLD, at_R, target_R):
            return read(params, hidden_BLD.reshape(-1, hidden_BLD.shape[-1])[at_R], target_R)

        self._hidden, self._read = jax.jit(hidden), read_at

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        advance: Callable[[int], object] = lambda count: None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context.

        A context too long for max_length loses its beginning; so does what stands
        before each part of a continuation that is too long itself. What is left begins in the midst of a text, and has no
        begin token, as a row of training that begins in the midst of a document: the token before the first target is
        its first input. The begin token stands for the start of a document alone. Continuations that are
        read from the same row of tokens, as single-token answers to one question, share it.

        Args:
          pairs: token ids (context, continuation); an empty context stands for the begin token.
          advance: is told how many pairs are done, now and then; they add up to len(pairs).

        Returns:
          (log-likelihood in nats, whether every token was the likeliest) of each pair;
          (0.0, True) for an empty continuation.
        """
        rows = {}  # tokens shown -> [(pair, its place in the row, token that should follow)]
        for index, (context, continuation) in enumerate(pairs):
            context = context if len(context) else [self._begin_id]
            for shown, targets in windows(context, continuation, self.max_length):
                reads = rows.setdefault(np.asarray(shown, np.int32).tobytes(), [])
                reads += [(index, len(shown) - len(targets) + i, target) for i, target in enumerate(targets)]
        totals, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        pending = np.zeros(len(pairs), int)
        for reads in rows.values():
            np.add.at(pending, [index for index, _, _ in reads], 1)
        advance(int(np.sum(pending == 0)))
        for batch in self._batches(rows):
            log_likelihood_R, likeliest_R = self._score_batch(
                [np.frombuffer(key, np.int32) for key in batch], [rows[key] for key in batch]
            )
            index_R = np.array([index for key in batch for index, _, _ in rows[key]])
            np.add.at(totals, index_R, log_likelihood_R)
            np.logical_and.at(greedy, index_R, likeliest_R)
            np.subtract.at(pending, index_R, 1)
            advance(int(np.sum(pending[np.unique(index_R)] == 0)))
        return [(float(total), bool(flag)) for total, flag in zip(totals, greedy)]

    def _batches(self, rows):
        """Yields keys of rows, the longest first, so that what does not fit is known at once."""
        keys, first = sorted(rows, key=len, reverse=True), 0
        while first < len(keys):
            count = max(self.batch_tokens // padded_length(len(np.frombuffer(keys[first], np.int32))), 1)
            yield keys[first : first + count]
            first += count

    def _score_batch(self, rows, reads):
        shards = collectives.num_shards('batch')
        length = padded_length(len(rows[0]))
        # As many rows as a full batch has, or a power of two: a batch of a new size is a compilation.
        count = padded_count(len(rows), max(self.batch_tokens // length, 1))
        count = -(-count // shards) * shards
        tokens_BL = np.zeros((count, length), np.int32)
        # Positions of padding stay at the last: with dynamic rope scaling the angles depend on a row's largest.
        positions_BL = np.zeros((count, length), np.int32)
        for i, row in enumerate(rows):
            tokens_BL[i, : len(row)] = row
            positions_BL[i] = np.minimum(np.arange(length), len(row) - 1)
        hidden_BLD = self._hidden(self.params, *self._on_devices(tokens_BL, positions_BL))
        at_R = np.array([i * length + place for i, row in enumerate(reads) for _, place, _ in row], np.int32)
        target_R = np.array([target for row in reads for _, _, target in row], np.int32)
        size = next((size for size in READS if len(at_R) <= size), READS[-1])
        padding = -len(at_R) % size
        pieces = [
            self._read(self.params, hidden_BLD, at, target)
            for at, target in zip(
                np.pad(at_R, (0, padding)).reshape(-1, size), np.pad(target_R, (0, padding)).reshape(-1, size)
            )
        ]
        log_likelihood_R, likeliest_R = (np.concatenate(parts)[: len(at_R)] for parts in zip(*jax.device_get(pieces)))
        return log_likelihood_R.astype(np.float64), likeliest_R

    def _on_devices(self, *arrays):
        device_mesh = jax.sharding.get_mesh()
        return arrays if device_mesh.empty else jax.device_put(arrays, mesh.sharding(device_mesh, ('batch', None)))


def log_likelihoods(hidden_RD: jax.Array, head_VD: jax.Array, target_R: jax.Array, vocab_size: int, cap: float):
    """(float32 [R] log-probability of each target, bool [R] whether it is the likeliest of the first vocab_size).

    `cap` is model.logit_soft_cap.
    """
    logits_RV = to_logits(hidden_RD[None], head_VD, cap)[0]
    target_logit_R = jnp.take_along_axis(logits_RV, target_R[:, None], axis=1)[:, 0]
    log_likelihood_R = target_logit_R - jax.nn.logsumexp(logits_RV, axis=-1)
    return log_likelihood_R, jnp.argmax(logits_RV[:, :vocab_size], axis=-1) == target_R


def windows(context: Sequence[int], continuation: Sequence[int], max_length: int):
    """Yields (tokens shown, tokens to predict): the last of the shown predict them, each once, from all that fits before."""
    whole = [*context, *continuation]
    start = len(context)
    while start < len(whole):
        stop = min(start + max_length, len(whole))
        yield whole[max(0, stop - 1 - max_length) : stop - 1], whole[start:stop]
        start = stop
