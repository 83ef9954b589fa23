"""EleutherAI's evaluation harness on a trained model, without PyTorch.

    python -m transxssm_jax.evals.harness --workdir=DIR --tasks=hellaswag,piqa [--num_fewshot=5] [--limit=100]

Prints the harness's table and writes its results as JSON to WORKDIR/evals/. Tasks go by
the harness's names ('mmlu*' takes all that match); --include_path=DIR adds
task files of one's own. In Python, `TransXSSMLM` is a model for
`lm_eval.simple_evaluate`, which knows it as 'transxssm' once this module is imported.

Exit codes: 0 finished; 2 wrong input, with one line.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.evals.harness')

import difflib
import json
import logging
import pathlib
import time

import numpy as np
from tqdm import tqdm

from transxssm_jax.cli import Flag
from transxssm_jax.config import Config
from transxssm_jax.evals.scoring import Scorer, load_run
from transxssm_jax.inference.generator import Generator
from transxssm_jax.inference.sampling import InputError, Sampling
from transxssm_jax.model import parameters

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
    raise cli.MissingPackageError(f'{error.name} is not installed; pip install -e .[eval]', name=error.name) from error

GENERATED_TOGETHER = 64  # rows that are decoded at once
SAMPLING = ('top_k', 'top_p', 'min_p', 'repetition_penalty')  # settings of a task that are passed on by name

COMMAND = cli.Command(
    'transxssm_jax.evals.harness',
    __doc__,
    [
        Flag('workdir', cli.REQUIRED, 'Directory of the run.', example='runs/a', is_path=True),
        Flag(
            'tasks',
            cli.REQUIRED,
            'Names or patterns of tasks and groups, with commas.',
            is_list=True,
            example='hellaswag,piqa',
        ),
        Flag('include_path', (), 'Directories with task files of your own, with commas.', is_path=True),
        Flag('num_fewshot', -1, "Examples before each question; -1: the task's own number.", minimum=-1),
        Flag('limit', 0, 'Questions per task, for a quick look; 0: all.', minimum=0),
        Flag('step', -1, 'Step of the checkpoint; -1: the newest.', minimum=-1),
        Flag('tokenizer', '', 'byte, a JSON file or a prepared directory; empty: that of the run.', is_path=True),
        Flag('max_length', 0, 'Most tokens shown at once; 0: data.seq_len.', minimum=0),
        Flag('batch_tokens', 32768, 'Tokens per batch, with padding.', minimum=1),
        Flag('log_samples', False, 'Whether the JSON holds every question and answer.'),
        Flag('output', '', 'JSON file; empty: WORKDIR/evals/harness_TIME.json.', is_path=True),
    ],
)


@register_model('transxssm')
class TransXSSMLM(TemplateLM):
    """A model for lm_eval, from the workdir of a run; `of` makes one from parameters.

    Args:
      workdir: directory of the run.
      step: which checkpoint; -1: the newest.
      tokenizer: `byte`, a tokenizers json file or a prepared directory; '': that of the training data.
      max_length: most tokens shown at once, prompt and completion; 0: data.seq_len.
      batch_tokens: tokens a batch, padding included.
      max_gen_toks: most tokens to generate where a task does not say.
      ignored: what lm_eval passes to every model: batch_size, device, ... Batches are made by batch_tokens,
        devices are those of jax.

    Raises:
      CheckpointError, DataError: no such run or tokenizer.
      InputError: the tokenizer has more tokens than the model, or a number is below 1.
    """

    def __init__(
        self,
        workdir: str,
        *,
        step: int = -1,
        tokenizer: str = '',
        max_length: int = 0,
        batch_tokens: int = 32768,
        max_gen_toks: int = 256,
        **ignored,
    ):
        self._start(*load_run(workdir, step, tokenizer), max_length, batch_tokens, max_gen_toks)

    @classmethod
    def of(
        cls,
        params: dict,
        config: Config,
        tokenizer,
        *,
        max_length: int = 0,
        batch_tokens: int = 32768,
        max_gen_toks: int = 256,
    ) -> 'TransXSSMLM':
        """A model from parameters as `checkpoint.load_trained` gives them; the rest as above."""
        lm = cls.__new__(cls)
        lm._start(params, config, tokenizer, max_length, batch_tokens, max_gen_toks)
        return lm

    def _start(self, params, config, tokenizer, max_length, batch_tokens, max_gen_toks):
        super().__init__()
        self.params, self.config, self.tokenizer = params, config, tokenizer
        self.max_length, self.max_gen_toks = max_length or config.data.seq_len, max_gen_toks
        self.scorer = Scorer(params, config, tokenizer, max_length=self.max_length, batch_tokens=batch_tokens)
        self._generator = None

    @property
    def generator(self) -> Generator:
        """Made when a task first generates: it holds weights of its own."""
        if self._generator is None:
            self._generator = Generator(
                self.params, self.config, self.tokenizer, max_length=self.max_length, batch=GENERATED_TOGETHER
            )
        return self._generator

    # ---- what lm_eval asks of a model --------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        about = self.tokenizer.describe()
        return f'{about["kind"]}-{about["sha256"][:16]}'

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        """Token ids; special tokens are never added (`loglikelihood` puts the end-of-document token before an empty context)."""
        return self.tokenizer.encode_batch([string])[0].tolist()

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is_greedy) of each request's (context, continuation)."""
        texts = [request.args for request in requests]
        pairs = encode_pairs(self.tokenizer, texts)
        return self._loglikelihood_tokens(
            [(text, *pair) for text, pair in zip(texts, pairs)], disable_tqdm=disable_tqdm
        )

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc='loglikelihood', disable=disable_tqdm, smoothing=0) as bar:
            results = self.scorer.score([(context, continuation) for _, context, continuation in requests], bar.update)
        for (text, _, _), result in zip(requests, results):
            self.cache_hook.add_partial('loglikelihood', text, result)
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each request's (text,), the end-of-document token before it; long texts by windows."""
        texts = [request.args[0] for request in requests]
        pairs = [([self.prefix_token_id], ids.tolist()) for ids in self.tokenizer.encode_batch(texts)]
        with tqdm(total=len(requests), desc='loglikelihood_rolling', disable=disable_tqdm, smoothing=0) as bar:
            totals = [total for total, _ in self.scorer.score(pairs, bar.update)]
        for text, total in zip(texts, totals):
            self.cache_hook.add_partial('loglikelihood_rolling', (text,), total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The completion of each request's (context, settings): `until`, `max_gen_toks`, `temperature`, ...

        A context too long to leave room for max_gen_toks loses its beginning.

        Raises:
          InputError: a task asks for as many tokens as max_length or more.
        """
        contexts = self.tokenizer.encode_batch([request.args[0] for request in requests])
        groups = {}  # settings -> requests that can be decoded together
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [''] * len(requests)
        with tqdm(total=len(requests), desc='generate_until', disable=disable_tqdm, smoothing=0) as bar:
            for key, members in groups.items():
                settings = normalize_gen_kwargs(json.loads(key), self.max_gen_toks)
                room = self.max_length - settings['max_gen_toks']
                if room < 1:
                    raise InputError(
                        f'a task generates {settings["max_gen_toks"]} tokens, which must be below '
                        f'--max_length={self.max_length}; raise it'
                    )
                members.sort(key=lambda index: -len(contexts[index]))
                for first in range(0, len(members), GENERATED_TOGETHER):
                    batch = members[first : first + GENERATED_TOGETHER]
                    completions = self.generator.generate(
                        [contexts[i][-room:] if len(contexts[i]) else np.array([self.prefix_token_id]) for i in batch],
                        max_tokens=settings['max_gen_toks'],
                        sampling=_sampling(settings),
                        stop_strings=[stop for stop in settings['until'] if stop],
                        seeds=batch,
                    )
                    for index, completion in zip(batch, completions):
                        texts[index] = completion.text
                        self.cache_hook.add_partial('generate_until', requests[index].args, completion.text)
                    bar.update(len(batch))
        return texts

    def get_model_info(self) -> dict:
        """What lm_eval records of the model."""
        return {
            'model_num_parameters': parameters.count_params(self.config.model),
            'model_dtype': self.config.model.dtype,
            'max_length': self.max_length,
            'tokenizer': self.tokenizer_name,
        }


def encode_pairs(tokenizer, texts: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of (context, continuation), as lm_eval's own models divide them.

    Spaces that end a context begin the continuation; context and continuation are
    encoded as one text, and the continuation is what comes after as many tokens as the
    context has alone. Before an empty context stands the end-of-document token.
    """
    moved = []
    for context, continuation in texts:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    # Contexts come as often as they have continuations: each text is encoded once.
    distinct = list({text for kept, rest in moved for text in (kept, kept + rest, rest)})
    ids = dict(zip(distinct, tokenizer.encode_batch(distinct)))
    pairs = []
    for kept, rest in moved:
        if kept:
            context, continuation = ids[kept], ids[kept + rest][len(ids[kept]) :]
            # Where the continuation melts into the context's last token there is nothing to divide.
            continuation = continuation if len(continuation) or not rest else ids[rest]
        elif len(ids[rest]) and ids[rest][0] == tokenizer.eos_id:
            context, continuation = ids[rest][:1], ids[rest][1:]
        else:
            context, continuation = [tokenizer.eos_id], ids[rest]
        pairs.append(([int(i) for i in context], [int(i) for i in continuation]))
    return pairs


def _sampling(settings: dict) -> Sampling:
    chosen = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    return Sampling(temperature=float(settings.get('temperature', 0.0)) if settings['do_sample'] else 0.0, **chosen)


# ---- the command -----------------------------------------------------------


def load_tasks(names: list[str], include_path: list[str]) -> dict:
    """Tasks and groups by name or pattern, with their data.

    Returns:
      'tasks' and 'task_manager', as lm_eval.simple_evaluate takes them.

    Raises:
      InputError: an unknown name, with the nearest ones, or data that cannot be read or fetched.
    """
    from lm_eval.tasks import TaskManager

    for path in include_path:
        if not pathlib.Path(path).is_dir():
            raise InputError(f'--include_path={path}: no such directory')
    # The harness's own index is of thousands of files: it is read only where a name is not found without it.
    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=include_path or None)
    found = []
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=4, cutoff=0.6)
            hint = f'; nearest: {", ".join(near)}' if near else '; --include_path=DIR adds task files'
            raise InputError(f'--tasks={name}: no such task{hint}')
        found += [match for match in matching if match not in found]
    try:
        loaded = manager.load(found)
    except Exception as error:  # the data sets' library raises whatever the network, the files and the task's code do
        raise InputError(f'--tasks={",".join(found)}: cannot be loaded ({type(error).__name__}: {error})') from error
    groups = loaded.get('groups', {})
    inner = {child for children in loaded.get('group_map', {}).values() for child in children}
    whole = [group for name, group in groups.items() if name not in inner]
    covered = {task.task_name for group in whole for task in group.get_all_tasks()}
    tasks = whole + [task for name, task in loaded['tasks'].items() if name not in covered]
    return {'tasks': tasks, 'task_manager': manager}


def tables(results: dict) -> str:
    """The harness's table of tasks and, where there are groups, of groups."""
    from lm_eval.utils import make_table

    parts = [make_table(results)]
    if results.get('groups'):
        parts.append(make_table(results, 'groups'))
    return '\n'.join(parts)


def main(argv: list[str] | None = None) -> int:
    """The command; see the module's docstring. Returns its exit code."""
    return cli.run(COMMAND, _evaluate, argv)


def _evaluate(flags) -> None:
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    from lm_eval.evaluator import simple_evaluate

    path = pathlib.Path(flags.output or time.strftime(f'{flags.workdir}/evals/harness_%Y-%m-%dT%H-%M-%S.json'))
    if flags.output and not path.absolute().parent.is_dir():
        raise InputError(f'--output={flags.output}: its directory does not exist; make it first')
    lm = TransXSSMLM(
        flags.workdir,
        step=flags.step,
        tokenizer=flags.tokenizer,
        max_length=flags.max_length,
        batch_tokens=flags.batch_tokens,
    )
    results = simple_evaluate(
        lm,
        **load_tasks(list(flags.tasks), list(flags.include_path)),
        limit=flags.limit or None,
        log_samples=flags.log_samples,
        num_fewshot=None if flags.num_fewshot < 0 else flags.num_fewshot,
    )
    print(tables(results))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results_json(results))
    print(f'results written to {path}')


def results_json(results: dict) -> str:
    """Results as the harness writes them to its own files."""
    from lm_eval.utils import handle_non_serializable

    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + '\n'
