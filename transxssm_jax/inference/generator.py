"""Prompts in, text out: batches of rows of similar length, decoded until each ends.

Shape legend: B rows, L length.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from transxssm_jax.config import Config
from transxssm_jax.inference.completion import Completion, Row
from transxssm_jax.inference.decode import Decoder
from transxssm_jax.inference.sampling import GREEDY, InputError, Sampling, check_tokenizer
from transxssm_jax.parallel import collectives

BLOCK = 32  # steps between looks at the text for stop strings

STREAM_BLOCK = 8  # the same when somebody watches

PREFILL_TOKENS = 1 << 17  # most prompt tokens a device reads at once, for the memory of their activations


class Generator:
    """A model made ready for decoding: weights in model.dtype, compiled functions.

    Makes its own copy of the weights; `params` can be dropped afterwards. Runs under the mesh in
    use (jax.set_mesh) at construction and at every call, or on one device without one. Shapes are
    rounded up to few sizes (`bucket`), so that few prompts compile anything.

    Args:
      params: nested dict of float32 arrays as in the state of step.py or from checkpoint.load_trained.
      config: of the run; only config.model is read, and data.seq_len for the default of max_length.
      tokenizer: of the training data (encode_batch, decode, vocab_size, eos_id); None: tokens only.
      max_length: most tokens of a row, prompt and completion; 0: config.data.seq_len.
      batch: rows decoded at once, at most; more prompts are worked on in batches of similar length.

    Raises:
      InputError: the tokenizer's vocabulary is larger than the model's, or a number below 1.
    """

    def __init__(self, params: dict, config: Config, tokenizer=None, *, max_length: int = 0, batch: int = 64):
        self.model, self.tokenizer = config.model, tokenizer
        self.max_length = max_length or config.data.seq_len
        self.batch = batch
        for name, value, least in (('max_length', self.max_length, 2), ('batch', batch, 1)):
            if value < least:
                raise InputError(f'{name}={value} must be at least {least}')
        self.vocab_size = self.model.vocab_size if tokenizer is None else tokenizer.vocab_size
        if tokenizer is not None:
            check_tokenizer(tokenizer, self.model)
        self._decoder = Decoder(params, config)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        seeds: int | Sequence[int] = 0,
    ) -> list[Completion]:
        """Continues every prompt; the order of the results is that of the prompts.

        Args:
          prompts: 1-D integer arrays of token ids, none empty, of any lengths up to max_length - 1.
          max_tokens: most tokens of a completion; it is shorter where max_length ends it.
          sampling: how tokens are chosen.
          stop_tokens: ids that end a completion; None: the tokenizer's eos_id (none without a tokenizer).
          stop_strings: texts that end a completion where they first appear in it; they need a tokenizer.
          seeds: one for all prompts or one a prompt, from 0. A prompt's text depends on its own seed and
            tokens alone, not on the batch or its place in it (logits differ by rounding between shapes of
            batches, which only matters between tokens that are equally likely to that precision).

        Under dynamic rope scaling a row's rotation is that of its prompt plus max_tokens (at most
        max_length) from the start, since what was rotated stays so.

        Raises:
          InputError: an empty prompt, one of max_length tokens or more, a token that the model
            lacks, a wrong setting. It is a ValueError of one line.
        """
        rows = self._rows(prompts, max_tokens, stop_tokens, stop_strings, seeds)
        # Longest first: rows of a batch then differ little, and what does not fit shows at once.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt))
        for first in range(0, len(order), self.batch):
            for _ in self._work([rows[i] for i in order[first : first + self.batch]], sampling, BLOCK):
                pass
        return [row.completion() for row in rows]

    def stream(
        self,
        prompt: np.ndarray,
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """The completion of one prompt in pieces of text as it grows; they join to generate's text.

        A piece never ends within a character or within what may become a stop string. Arguments
        and errors as `generate`; it needs a tokenizer.
        """
        if self.tokenizer is None:
            raise InputError('stream needs a tokenizer; give one to Generator')
        [row] = self._rows([prompt], max_tokens, stop_tokens, stop_strings, seed)
        return self._pieces(row, sampling)

    def _pieces(self, row: Row, sampling: Sampling) -> Iterator[str]:
        said = ''
        for _ in self._work([row], sampling, STREAM_BLOCK):
            text = row.settled_text()
            if len(text) > len(said) and text.startswith(said):
                yield text[len(said) :]
                said = text

    def _rows(self, prompts, max_tokens, stop_tokens, stop_strings, seeds) -> list[Row]:
        if max_tokens < 1:
            raise InputError(f'max_tokens={max_tokens} must be at least 1')
        if stop_tokens is None:
            stop_tokens = () if self.tokenizer is None else (self.tokenizer.eos_id,)
        stop_strings = tuple(stop_strings)
        if stop_strings and (self.tokenizer is None or '' in stop_strings):
            raise InputError('stop_strings must not be empty and need a tokenizer; give one to Generator')
        seeds = [seeds] * len(prompts) if isinstance(seeds, int | np.integer) else list(seeds)
        if len(seeds) != len(prompts) or any(not 0 <= seed < 1 << 32 for seed in seeds):
            raise InputError(
                f'seeds must be one number or {len(prompts)}, one a prompt, each from 0 to {(1 << 32) - 1}'
            )
        rows = []
        for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
            prompt, name = np.asarray(prompt), f'prompt {i + 1} of {len(prompts)}' if len(prompts) > 1 else 'the prompt'
            if not prompt.size:
                raise InputError(f'{name} is empty; give at least one token to continue')
            if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
                raise InputError(
                    f'{name} has shape {prompt.shape} and dtype {prompt.dtype}; it must be 1-D and of integers'
                )
            if len(prompt) >= self.max_length:
                raise InputError(
                    f'{name} has {len(prompt):,} tokens; at most {self.max_length - 1:,} fit a length of '
                    f'{self.max_length:,} with one more; shorten it or raise max_length'
                )
            if not 0 <= prompt.min() <= prompt.max() < self.model.vocab_size:
                raise InputError(
                    f'{name} has token ids from {prompt.min()} to {prompt.max()}; the model knows 0 to '
                    f'{self.model.vocab_size - 1}'
                )
            rows.append(
                Row(
                    self.tokenizer,
                    prompt.astype(np.int32),
                    min(max_tokens, self.max_length - len(prompt)),
                    tuple(stop_tokens),
                    stop_strings,
                    seed,
                )
            )
        return rows

    def _work(self, rows: list[Row], sampling: Sampling, steps: int) -> Iterator[None]:
        """Extends rows of one batch by up to `steps` tokens at a time until all are finished."""
        plan, numbers = sampling.plan(self.vocab_size), sampling.numbers()
        batch = self._batch_size(len(rows))
        filled = rows + rows[:1] * (batch - len(rows))
        length = bucket(max(len(row.prompt) + row.max_tokens for row in rows))
        state = self._decoder.empty(batch, length, with_seen=plan.repetition_penalty)
        totals_B = np.array([len(row.prompt) + row.max_tokens for row in filled], np.int32)
        state = self._prefill(state, filled, totals_B)
        settings = {
            'limit_B': totals_B,
            'rope_length_B': totals_B,
            'seed_B': np.array([row.seed for row in filled], np.uint32),
        }
        stop_T = np.array(rows[0].stop_tokens, np.int32)
        while not all(row.finish for row in rows):
            done_B = np.array([bool(row.finish) or i >= len(rows) for i, row in enumerate(filled)])
            state, tokens_BT = self._decoder.run(
                state, settings, stop_T, done_B, np.int32(steps), plan=plan, numbers=numbers, block=BLOCK
            )
            for row, tokens_T in zip(rows, np.asarray(tokens_BT)):
                row.extend(tokens_T)
            yield

    def _prefill(self, state, rows, totals_B):
        shards, count = collectives.num_shards('batch'), len(rows)
        longest = bucket(max(len(row.prompt) for row in rows))
        while count * longest > PREFILL_TOKENS * shards and count % 2 == 0 and count // 2 % shards == 0:
            count //= 2
        for first in range(0, len(rows), count):
            part = rows[first : first + count]
            tokens_BL = np.zeros((count, bucket(max(len(row.prompt) for row in part))), np.int32)
            for row, tokens_L in zip(part, tokens_BL):
                tokens_L[: len(row.prompt)] = row.prompt
            state = self._decoder.prefill(
                state,
                tokens_BL,
                np.array([len(row.prompt) for row in part], np.int32),
                totals_B[first : first + count],
                np.int32(first),
            )
        return state

    def _batch_size(self, num_rows: int) -> int:
        """Few sizes, and a multiple of the devices that split a batch."""
        shards = collectives.num_shards('batch')
        return math.ceil(min(1 << (num_rows - 1).bit_length(), max(num_rows, self.batch)) / shards) * shards


def bucket(length: int) -> int:
    """The least of 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, ... that is not below length."""
    step = max(8, 1 << max((length - 1).bit_length() - 3, 0))
    return max(32, math.ceil(length / step) * step)


def sample(
    params: dict, config: Config, tokenizer, *, prompt: str, num_tokens: int, temperature: float = 0.8, seed: int = 0
) -> str:
    """A prompt and its continuation, which ends early at the tokenizer's end-of-document token: a glance at a run.

    Args:
      params: parameters as in the state of step.py.
      tokenizer: of the training data.
      prompt: not empty: training never predicts a document's first token.
      num_tokens: most tokens to sample.
      temperature: >= 0; lower is less varied, 0 takes the likeliest token.
      seed: the same seed gives the same text.

    Raises:
      InputError: an empty prompt, num_tokens < 1 or temperature < 0.
    """
    [tokens] = tokenizer.encode_batch([prompt])
    generator = Generator(params, config, tokenizer, max_length=len(tokens) + max(num_tokens, 1) + 1, batch=1)
    [completion] = generator.generate([tokens], max_tokens=num_tokens, sampling=Sampling(temperature), seeds=seed)
    return prompt + completion.text
