"""Needle in a haystack: python -m transxssm_jax.evals.needle --workdir=DIR --haystack=FILE --lengths=1024,2048,4096.

Sentences that give secret numbers are put into a long text at several depths, and the model is asked for the numbers
at the end of the text. An answer is scored twice: 'generated' is whether the model's completion contains the number as
a whole, and 'chosen' is whether the number is the likeliest of several candidates, some of which are in the text too;
a small base model shows something in the second long before the first.

Every haystack is read once; question, candidates and completion continue from the state after it. Writes results.json
(every question, the means of each length and depth, and what made them) and a heat map of each score, generated.png
and chosen.png (pip install -e .[eval] brings matplotlib), to a new directory: --output, by default
WORKDIR/evals/needle-step-STEP-TIME.

Exit codes: 0 finished; 2 wrong input, reported in one line.

Shape legend: B rows, C candidate answers, V vocabulary.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.evals.needle')

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from transxssm_jax.cli import Flag
from transxssm_jax.data import source
from transxssm_jax.data.manifest import DataError
from transxssm_jax.evals import results as results_lib
from transxssm_jax.evals.heat_map import heat_map, table
from transxssm_jax.inference.completion import Request
from transxssm_jax.inference.decode import Decoder
from transxssm_jax.inference.padding import padded_length
from transxssm_jax.inference.prompt import with_begin
from transxssm_jax.inference.sampling import InputError
from transxssm_jax.inference.trained_run import open_trained_run
from transxssm_jax.training.checkpoint import WEIGHTS

CITIES = [
    'Lisbon',
    'Nairobi',
    'Oslo',
    'Lima',
    'Osaka',
    'Toronto',
    'Cairo',
    'Hanoi',
    'Vienna',
    'Dublin',
    'Havana',
    'Perth',
    'Warsaw',
    'Quito',
    'Riga',
    'Tunis',
    'Seoul',
    'Naples',
    'Dakar',
    'Geneva',
    'Bergen',
    'Kyoto',
    'Malaga',
    'Denver',
]
NEEDLE = ' The secret number of {city} is {number}.'
QUESTION = '\n\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of {city} is'
ANSWER = ' {number}'
DIGITS = 5
ROOM = DIGITS + 3  # tokens for an answer: at most one per byte, and two to see what follows it
ENDS_OF_SENTENCES = ('.', '!', '?', '\n')

COMMAND = cli.Command(
    'transxssm_jax.evals.needle',
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
        Flag(
            'haystack',
            cli.REQUIRED,
            'Text: a file (text, jsonl, parquet), directory or pattern.',
            example='book.txt',
            is_path=True,
        ),
        Flag('lengths', (1024, 2048, 4096), 'Tokens of haystack, question and answer.', minimum=1, maximum=1 << 30),
        Flag(
            'depths', (0.0, 25.0, 50.0, 75.0, 100.0), 'Depths of the first needle, in percent.', minimum=0, maximum=100
        ),
        Flag('needles', 1, 'Needles per haystack.', minimum=1, maximum=len(CITIES)),
        Flag('ask', 'one', "'one' asks for the first needle, 'all' for each.", choices=('one', 'all')),
        Flag('samples', 5, 'Haystacks of each length and depth.', minimum=1),
        Flag(
            'candidates',
            10,
            'Numbers that the answer is ranked among; those of the other needles are among them.',
            minimum=2,
            maximum=9 * 10 ** (DIGITS - 1),  # numbers of so many digits
        ),
        Flag('step', -1, 'Step of the checkpoint; -1: the newest.', minimum=-1),
        Flag('weights', 'trained', 'Which weights of it: the trained ones, or their average.', choices=WEIGHTS),
        Flag('tokenizer', '', 'byte, a JSON file or a prepared directory; empty: that of the run.', is_path=True),
        Flag('seed', 0, 'Seed of haystacks and numbers.', minimum=0),
        Flag('output', '', 'New directory; empty: one in WORKDIR/evals.', is_path=True),
    ],
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about one needle.

    Attributes:
      tokens: to read after the haystack.
      needle: the sentence that answers the question.
      depth: of the needle, in percent of the haystack.
      answer: the number.
      candidates: numbers to rank, the answer first.
    """

    tokens: list[int]
    needle: str
    depth: float
    answer: str
    candidates: list[str]


@dataclasses.dataclass(frozen=True)
class Case:
    """A haystack with its needles, int32 tokens that begin with the begin token, and the questions about it."""

    length: int
    depth: float
    sample: int
    tokens: np.ndarray
    questions: list[Question]


class Haystack:
    """Text that needles are hidden in: the documents of a source, one after another.

    Args:
      spec: a text, jsonl or parquet file, a directory or a pattern, as data.prepare reads it.
      tokenizer: of the model.
      num_tokens: most tokens to read; a shorter text is repeated.

    Raises:
      DataError: no such source, or it has no text.
    """

    def __init__(self, spec: str, tokenizer, num_tokens: int):
        self.tokenizer = tokenizer
        parts, count = [], 0
        try:
            for text in _documents(spec):
                parts.append(tokenizer.encode_batch([text + '\n\n'])[0].astype(np.int32))
                count += len(parts[-1])
                if count >= num_tokens:
                    break
        except DataError as error:
            raise DataError(str(error).replace('--source=', '--haystack=')) from error
        if not parts:
            raise DataError(f'--haystack={spec} has no text')
        self.tokens = np.concatenate(parts)
        ends = {
            int(token)
            for token in np.unique(self.tokens)
            if tokenizer.decode([token]).rstrip(' "\'').endswith(ENDS_OF_SENTENCES)
        }
        self._is_end = np.isin(self.tokens, list(ends))

    def case(
        self, length: int, depth: float, sample: int, *, needles: int, ask: str, candidates: int, seed: int
    ) -> Case:
        """One haystack with its needles: a pure function of its arguments.

        The first needle stands at `depth` (percent), the others at even steps from there to the end; each is moved back
        to the end of a sentence. With begin token, the longest question and ROOM tokens for the answer, the whole is
        `length` tokens.

        Raises:
          InputError: length is too short for needles and question.
        """
        rng = np.random.default_rng([seed, length, round(100 * depth), sample])
        encode = self._encode
        cities = [str(city) for city in rng.choice(CITIES, needles, replace=False)]
        numbers = rng.choice(np.arange(10 ** (DIGITS - 1), 10**DIGITS), max(candidates, needles), replace=False)
        numbers = [str(number) for number in numbers]
        sentences = [NEEDLE.format(city=city, number=number) for city, number in zip(cities, numbers)]
        encoded = [encode(sentence) for sentence in sentences]
        asked = [encode(QUESTION.format(city=city)) for city in cities]
        fill = length - 1 - sum(map(len, encoded)) - max(map(len, asked)) - ROOM
        if fill < needles:
            raise InputError(
                f'--lengths={length} is too short for {needles} needle(s), question and answer, which take '
                f'{length - fill} tokens; try --lengths={2 ** (length - fill).bit_length()}'
            )
        first = int(rng.integers(len(self.tokens)))
        index = np.arange(first, first + fill) % len(self.tokens)
        depths = [depth + (100 - depth) * i / needles for i in range(needles)]
        ends = np.concatenate([[0], 1 + np.flatnonzero(self._is_end[index])])
        positions = [
            fill if d == 100 else int(ends[np.searchsorted(ends, fill * d / 100, side='right') - 1]) for d in depths
        ]
        parts, previous = [], 0
        for position, needle in zip(positions, encoded):
            parts += [self.tokens[index[previous:position]], needle]
            previous = position
        parts.append(self.tokens[index[previous:]])
        questions = [
            Question(
                asked[i],
                sentences[i].strip(),
                depths[i],
                numbers[i],
                ([numbers[i]] + numbers[:i] + numbers[i + 1 :])[: max(candidates, needles)],
            )
            for i in range(needles if ask == 'all' else 1)
        ]
        return Case(length, depth, sample, with_begin(self.tokenizer, np.concatenate(parts)), questions)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode_batch([text])[0].tolist()


def _documents(spec):
    for file in source.list_files(spec, 'train'):
        for piece in source.cut(file, 1 << 24):
            yield from filter(None, map(str.strip, source.read_documents(piece, 'text')))


class Reader:
    """A model that reads a text once and answers several questions from its state.

    Args:
      decoder: of the model.
      tokenizer: of its training data.
    """

    def __init__(self, decoder: Decoder, tokenizer):
        self.decoder, self.tokenizer = decoder, tokenizer
        self._log_softmax = jax.jit(
            lambda logits_CV, token_C: jnp.take_along_axis(jax.nn.log_softmax(logits_CV), token_C[:, None], axis=1)[
                :, 0
            ]
        )
        self._likeliest = jax.jit(lambda logits_BV: jnp.argmax(logits_BV[:, : tokenizer.vocab_size], axis=-1))
        self._copies = jax.jit(
            lambda state, count: jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), state), static_argnums=1
        )

    def read(self, case: Case) -> dict:
        """The decoder's state after a haystack."""
        state = self.decoder.empty(1, padded_length(case.length))
        tokens_BL = np.zeros((1, padded_length(len(case.tokens))), np.int32)
        tokens_BL[0, : len(case.tokens)] = case.tokens
        return self.decoder.prefill(
            state, tokens_BL, np.array([len(case.tokens)], np.int32), np.array([case.length], np.int32)
        )

    def answer(self, state: dict, case: Case, question: Question) -> dict:
        """The model's answer to a question after a haystack; the haystack's state is not changed.

        Returns:
          'response' (text of the likeliest tokens), 'generated' (1.0 if it contains the answer),
          'log_likelihoods' (nats, of each candidate), 'rank' (of the answer among them, from 1),
          'chosen' (1.0 if the rank is 1).
        """
        length = np.array([case.length], np.int32)
        state = self._copies(state, 1)
        for token in question.tokens:
            state = self.decoder.step(state, np.array([token], np.int32), length)
        candidates = [
            ids.tolist()
            for ids in self.tokenizer.encode_batch([ANSWER.format(number=number) for number in question.candidates])
        ]
        scores = self._score(self._copies(state, len(candidates)), candidates, length)
        text = self._generate(state, question, length)
        rank = 1 + sum(score >= scores[0] for score in scores[1:])
        return {
            'response': text,
            'generated': float(contains_number(text, question.answer)),
            'log_likelihoods': scores,
            'rank': rank,
            'chosen': float(rank == 1),
        }

    def _score(self, state, candidates, length):
        longest = max(map(len, candidates))
        token_CT = np.array([ids + [0] * (longest - len(ids)) for ids in candidates], np.int32)
        length_C = np.repeat(length, len(candidates))
        totals_C = np.zeros(len(candidates))
        for i in range(longest):
            log_p_C = np.asarray(self._log_softmax(state['logits_BV'], token_CT[:, i]))
            totals_C += np.where([i < len(ids) for ids in candidates], log_p_C, 0.0)
            if i + 1 < longest:
                state = self.decoder.step(state, token_CT[:, i], length_C)
        return totals_C.tolist()

    def _generate(self, state, question, length):
        request = Request(self.tokenizer, np.array(question.tokens, np.int32), ROOM, (self.tokenizer.eos_id,))
        while not request.finish_reason:
            token_B = np.asarray(self._likeliest(state['logits_BV']))
            request.extend(token_B)
            state = self.decoder.step(state, token_B, length)
        return request.text


def contains_number(text: str, number: str) -> bool:
    """Whether a text contains a number that is not part of a longer one: 12345, but not 123456."""
    return bool(re.search(rf'(?<!\d){number}(?!\d)', text))


def means(results: list[dict]) -> list[dict]:
    """The mean of 'generated', 'chosen' and 'rank' over the questions of each length and depth, in order."""
    cells = {}
    for result in results:
        cells.setdefault((result['context_length'], result['depth_percent']), []).append(result)
    return [
        {
            'context_length': length,
            'depth_percent': depth,
            'questions': len(members),
            **{name: float(np.mean([member[name] for member in members])) for name in ('generated', 'chosen', 'rank')},
        }
        for (length, depth), members in cells.items()
    ]


# ---- the command -----------------------------------------------------------


def run(
    reader: Reader, haystack: Haystack, cases: list[tuple[int, float, int]], settings: dict, progress: bool
) -> list[dict]:
    """Results of every question of (length, depth, sample) cases, a dict each with the names of results.json."""
    results = []
    for length, depth, sample in tqdm(cases, desc='haystacks', disable=not progress, file=sys.stderr, smoothing=0):
        case = haystack.case(length, depth, sample, **settings)
        state = reader.read(case)
        for question in case.questions:
            answer = reader.answer(state, case, question)
            results.append(
                {
                    'context_length': length,
                    'depth_percent': depth,
                    'sample': sample,
                    'needle': question.needle,
                    'needle_depth_percent': question.depth,
                    'expected': question.answer,
                    'model_response': answer['response'],
                    'score': answer['generated'],
                    'generated': answer['generated'],
                    'chosen': answer['chosen'],
                    'rank': answer['rank'],
                    'candidates': question.candidates,
                    'log_likelihoods': answer['log_likelihoods'],
                }
            )
    return results


def main(argv: list[str] | None = None) -> int:
    """The command; see the module's docstring. Returns its exit code."""
    return cli.run(COMMAND, _evaluate, argv)


def _evaluate(flags) -> None:
    lengths, depths = sorted(set(flags.lengths)), sorted(set(flags.depths))
    opened = open_trained_run(flags.workdir, flags.step, flags.tokenizer, weights=flags.weights)
    folder = results_lib.choose_output(flags.output, opened, 'needle', suffix='')
    haystack = Haystack(flags.haystack, opened.tokenizer, 4 * max(lengths))
    cases = [(length, depth, sample) for length in lengths for depth in depths for sample in range(flags.samples)]
    settings = dict(needles=flags.needles, ask=flags.ask, candidates=flags.candidates, seed=flags.seed)
    for length in lengths:
        haystack.case(length, 0, 0, **settings)  # refuses one that is too short before the work
    made_by = results_lib.of_run(opened, COMMAND.module, flags.argv)
    model = f'{flags.workdir} at step {opened.step}'
    print(
        f'needle in a haystack for {model}: {len(cases)} haystacks ({len(lengths)} lengths x '
        f'{len(depths)} depths x {flags.samples} samples) of {lengths[0]:,} to {lengths[-1]:,} tokens, '
        f'{sum(case[0] for case in cases):,} in all; results go to {folder}',
        flush=True,
    )
    reader = Reader(Decoder(opened.params, opened.config), opened.tokenizer)
    del opened
    results = run(reader, haystack, cases, settings, progress=sys.stderr.isatty())
    cells = means(results)
    for score in ('generated', 'chosen'):
        print(table(cells, score))
    count = max(flags.candidates, flags.needles)
    print(f'chosen: the answer is the likeliest of {count} candidates, by chance {1 / count:.2f}')
    record = {
        **made_by,
        'model': model,
        'haystack': flags.haystack,
        'settings': settings,
        'chance': {'generated': 0.0, 'chosen': 1 / count},
        'cells': cells,
        'results': results,
    }
    folder.mkdir()
    results_lib.write_json(folder / 'results.json', record)
    try:
        for score, meaning, chance in (
            ('generated', 'the completion contains the answer', None),
            ('chosen', f'the answer is the likeliest of {count} candidates', 1 / count),
        ):
            by_chance = f' (by chance {chance:.2f})' if chance else ' (by chance 0)'
            title = f'{model}\n{meaning}{by_chance}\nmean of {cells[0]["questions"]} questions per cell'
            heat_map(folder / f'{score}.png', cells, score, title, chance)
    except ModuleNotFoundError as error:
        print(f'no heat maps: {error.name} is not installed; pip install -e .[eval]', file=sys.stderr)
    print(f'results written to {folder}')
