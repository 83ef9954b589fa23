"""Prompts in, text out: batches of rows of similar length, decoded until each row ends.

Shape legend: B rows, L length, T tokens.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from transxssm_jax.config import Config
from transxssm_jax.data.vocabulary import check_tokenizer
from transxssm_jax.inference.completion import Completion, Request
from transxssm_jax.inference.decode import Decoder
from transxssm_jax.inference.padding import padded_count, padded_length
from transxssm_jax.inference.prompt import encode_prompts
from transxssm_jax.inference.sampling import GREEDY, InputError, Sampling, fold_seed
from transxssm_jax.parallel import collectives

BLOCK = 32  # steps per call of the device, after which the text is searched for stop strings

STREAM_BLOCK = 8  # the same for a stream

PREFILL_TOKENS = 1 << 17  # most prompt tokens per device and prefill; bounds the memory of activations


class Generator:
    """A model made ready for decoding: weights in model.dtype, compiled functions.

    Makes its own copy of the weights; `params` can be dropped afterwards. Runs under the mesh in
    use (jax.set_mesh) at construction and at every call, or on one device without one. Shapes are
    padded to few sizes (see padding.py), so that few shapes are compiled.

    Args:
      params: nested dict of float32 arrays as in the state of step.py or from checkpoint.load_trained.
      config: of the run; only config.model is read, and data.seq_len for the default of max_length.
      tokenizer: of the training data (encode_batch, decode, vocab_size, eos_id); None: tokens only.
      max_length: most tokens of a row, prompt and completion; 0: config.data.seq_len.
      batch: most rows decoded at once; more prompts are decoded in batches of similar length.

    Raises:
      DataError: the tokenizer's vocabulary is larger than the model's.
      InputError: a number is below 1.
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
            check_tokenizer(tokenizer, self.model.vocab_size)
        self._decoder = Decoder(params, config)

    def generate(self, prompts: Sequence[np.ndarray], **settings) -> list[Completion]:
        """Continues every prompt; the order of the results is that of the prompts. See `completions`."""
        completions = dict(self.completions(prompts, **settings))
        return [completions[i] for i in range(len(prompts))]

    def completions(
        self,
        prompts: Sequence[np.ndarray],
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        seeds: int | Sequence[int] = 0,
    ) -> Iterator[tuple[int, Completion]]:
        """Continues every prompt; yields (index of the prompt, its completion) as soon as each has ended.

        Args:
          prompts: 1-D integer arrays of token ids, none empty, of any lengths up to max_length - 1;
            `prompt.encode_prompts` makes them from text.
          max_tokens: most tokens of a completion; it is shorter where max_length ends it.
          sampling: how tokens are chosen.
          stop_tokens: ids that end a completion; None: the tokenizer's eos_id (none without a tokenizer).
          stop_strings: texts that end a completion where they first appear in it; they need a tokenizer. The text of
            a special token, which the completion's text never contains, stands for the token.
          seeds: one number, which is folded with each prompt's index (`fold_seed`), or one number per prompt, from 0
            to 2^32 - 1. A prompt's text depends on its tokens and its seed only, not on the batch (logits differ by
            rounding between shapes of batches, which only matters between tokens that are equally likely to that
            precision).

        Under dynamic rope scaling a row's rotation is that of its prompt plus max_tokens (at most
        max_length) from the start, because rotated keys are kept.

        Raises:
          InputError: an empty prompt, one of max_length tokens or more, a token that the model
            lacks, or a setting out of its range, before anything is decoded. It is a ValueError of one line.
        """
        requests = self._requests(prompts, max_tokens, stop_tokens, stop_strings, seeds)
        return self._completions(requests, sampling)

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
        """Yields the completion of one prompt in pieces of text as it grows; joined they are the text of `generate`.

        A piece never ends within a character or within what may become a stop string. Arguments
        and errors as `completions`; `seed` is the prompt's own. It needs a tokenizer.
        """
        if self.tokenizer is None:
            raise InputError('stream needs a tokenizer; give one to Generator')
        [request] = self._requests([prompt], max_tokens, stop_tokens, stop_strings, [seed])
        return self._pieces(request, sampling)

    def _completions(self, requests, sampling):
        # Longest first: the rows of a batch then differ little, and a batch that does not fit fails at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt))
        for first in range(0, len(order), self.batch):
            growing = order[first : first + self.batch]
            for _ in self._decode([requests[i] for i in growing], sampling, BLOCK):
                yield from ((i, requests[i].completion()) for i in growing if requests[i].finish_reason)
                growing = [i for i in growing if not requests[i].finish_reason]

    def _pieces(self, request: Request, sampling: Sampling) -> Iterator[str]:
        shown = 0
        for _ in self._decode([request], sampling, STREAM_BLOCK):
            piece = request.stable_text(shown)
            if piece:
                yield piece
                shown += len(piece)

    def _requests(self, prompts, max_tokens, stop_tokens, stop_strings, seeds) -> list[Request]:
        if max_tokens < 1:
            raise InputError(f'max_tokens={max_tokens} must be at least 1')
        if stop_tokens is None:
            stop_tokens = () if self.tokenizer is None else (self.tokenizer.eos_id,)
        stop_tokens, stop_strings = self._split_stops(stop_tokens, stop_strings)
        is_one = isinstance(seeds, int | np.integer)
        given = [seeds] if is_one else list(seeds)
        if (not is_one and len(given) != len(prompts)) or any(not 0 <= seed < 1 << 32 for seed in given):
            raise InputError(
                f'seeds must be one number or {len(prompts)}, one per prompt, each from 0 to {(1 << 32) - 1}'
            )
        requests = []
        for i, prompt in enumerate(prompts):
            prompt = self._check_prompt(
                prompt, f'prompt {i + 1} of {len(prompts)}' if len(prompts) > 1 else 'the prompt'
            )
            limit = min(max_tokens, self.max_length - len(prompt))
            seed = fold_seed(seeds, i) if is_one else given[i]
            requests.append(Request(self.tokenizer, prompt, limit, stop_tokens, stop_strings, seed))
        return requests

    def _split_stops(self, stop_tokens, stop_strings) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Stop tokens, those that stop strings stand for included, and the other stop strings."""
        if stop_strings and (self.tokenizer is None or '' in stop_strings):
            raise InputError('stop_strings must not be empty and need a tokenizer; give one to Generator')
        special = getattr(self.tokenizer, 'special_ids', {})
        for stop in stop_strings:
            inside = [token for token in special if token in stop and token != stop]
            if stop not in special and inside:
                raise InputError(
                    f'stop_strings: {stop!r} joins the special token {inside[0]!r} and text; give them as two stop strings'
                )
        tokens = [special[stop] for stop in stop_strings if stop in special]
        return (*stop_tokens, *tokens), tuple(stop for stop in stop_strings if stop not in special)

    def _check_prompt(self, prompt, name: str) -> np.ndarray:
        prompt = np.asarray(prompt)
        if not prompt.size:
            raise InputError(f'{name} is empty; give at least the begin token')
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
        return prompt.astype(np.int32)

    def _decode(self, requests: list[Request], sampling: Sampling, steps: int) -> Iterator[None]:
        """Extends the rows of one batch by up to `steps` tokens at a time until all have ended."""
        flags, values = sampling.flags(self.vocab_size), sampling.values()
        batch = self._batch_size(len(requests))
        rows = requests + requests[:1] * (batch - len(requests))  # the first fills the batch up
        length = padded_length(max(len(request.prompt) + request.max_tokens for request in requests))
        state = self._decoder.empty(batch, length, with_seen=flags.repetition_penalty)
        totals_B = np.array([len(row.prompt) + row.max_tokens for row in rows], np.int32)
        state = self._prefill(state, rows, totals_B)
        settings = {
            'limit_B': totals_B,
            'rope_length_B': totals_B,
            'seed_B': np.array([row.seed for row in rows], np.uint32),
        }
        stop_T = np.array(requests[0].stop_tokens, np.int32)
        while not all(request.finish_reason for request in requests):
            done_B = np.array([bool(row.finish_reason) or i >= len(requests) for i, row in enumerate(rows)])
            state, tokens_BT = self._decoder.run(
                state, settings, stop_T, done_B, np.int32(steps), flags=flags, values=values, block=BLOCK
            )
            for request, tokens_T in zip(requests, np.asarray(tokens_BT)):
                request.extend(tokens_T)
            yield

    def _prefill(self, state, rows: list[Request], totals_B: np.ndarray):
        """Reads the prompts, in as many parts as PREFILL_TOKENS needs."""
        shards, count = collectives.num_shards('batch'), len(rows)
        longest = padded_length(max(len(row.prompt) for row in rows))
        while count * longest > PREFILL_TOKENS * shards and count % 2 == 0 and count // 2 % shards == 0:
            count //= 2
        for first in range(0, len(rows) // shards, count // shards):
            order = self._decoder.prompt_order(len(rows), count, first)
            part = [rows[i] for i in order]
            tokens_BL = np.zeros((count, padded_length(max(len(row.prompt) for row in part))), np.int32)
            for row, tokens_L in zip(part, tokens_BL):
                tokens_L[: len(row.prompt)] = row.prompt
            state = self._decoder.prefill(
                state,
                tokens_BL,
                np.array([len(row.prompt) for row in part], np.int32),
                totals_B[order],
                np.int32(first),
            )
        return state

    def _batch_size(self, num_rows: int) -> int:
        """One of few sizes, and a multiple of the devices that split a batch."""
        shards = collectives.num_shards('batch')
        return math.ceil(padded_count(num_rows, self.batch) / shards) * shards


def sample(
    params: dict, config: Config, tokenizer, *, prompt: str, max_tokens: int, temperature: float = 0.8, seed: int = 0
) -> str:
    """A prompt and its continuation, which ends early at the tokenizer's end-of-document token: a glance at a run.

    Args:
      params: parameters as in the state of step.py.
      tokenizer: of the training data.
      prompt: text to continue; '' begins a document.
      max_tokens: most tokens to sample.
      temperature: >= 0; lower is less varied, 0 takes the likeliest token.
      seed: the same seed gives the same text.

    Raises:
      InputError: max_tokens < 1 or temperature < 0.
    """
    [tokens] = encode_prompts(tokenizer, [prompt])
    generator = Generator(params, config, tokenizer, max_length=len(tokens) + max(max_tokens, 1) + 1, batch=1)
    [completion] = generator.generate([tokens], max_tokens=max_tokens, sampling=Sampling(temperature), seeds=[seed])
    return prompt + completion.text
