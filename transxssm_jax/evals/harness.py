"""EleutherAI's evaluation harness on a trained model, without PyTorch.

    python -m transxssm_jax.evals.harness --workdir=DIR --tasks=hellaswag,piqa [--num_fewshot=5] [--limit=100]

Prints the harness's table and writes its results, and what made them, as JSON to --output, by default
WORKDIR/evals/harness-step-STEP-TIME.json. Tasks have the harness's names ('mmlu*' takes all that match);
--include_path=DIR adds task files of your own. In Python, `TransXSSMLM` is a model for `lm_eval.simple_evaluate`, where
its name is 'transxssm' once this module is imported.

Every context begins with the tokenizer's begin token, as rows of training do. A context longer than --max_length loses
tokens after that; the row `cut_contexts` of the table counts them.

Exit codes: 0 finished; 2 wrong input, reported in one line.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.evals.harness')

import collections
import difflib
import json
import logging
import pathlib

from tqdm import tqdm

from transxssm_jax.cli import Flag
from transxssm_jax.config import Config
from transxssm_jax.evals import results as results_lib
from transxssm_jax.evals.scoring import Scorer
from transxssm_jax.inference.generator import Generator
from transxssm_jax.inference.prompt import encode_prompts, with_begin
from transxssm_jax.inference.sampling import InputError, Sampling, fold_seed
from transxssm_jax.inference.trained_run import TrainedRun, open_trained_run
from transxssm_jax.model import parameters
from transxssm_jax.training.checkpoint import WEIGHTS

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
    raise cli.MissingPackageError(f'{error.name} is not installed; pip install -e .[eval]', name=error.name) from error

GENERATED_TOGETHER = 64  # rows decoded at once
SAMPLING = ('top_k', 'top_p', 'min_p', 'repetition_penalty')  # settings of a task that are passed on by name
SEED = 0  # of tasks that sample

COMMAND = cli.Command(
    'transxssm_jax.evals.harness',
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
        Flag('weights', 'trained', 'Which weights of it: the trained ones, or their average.', choices=WEIGHTS),
        Flag('tokenizer', '', 'byte, a JSON file or a prepared directory; empty: that of the run.', is_path=True),
        Flag('max_length', 0, 'Most tokens shown at once; 0: data.seq_len.', minimum=0),
        Flag('batch_tokens', 32768, 'Tokens per batch, with padding.', minimum=1),
        Flag('log_samples', False, 'Whether the JSON holds every question and answer.'),
        Flag('output', '', 'New JSON file; empty: one in WORKDIR/evals.', is_path=True),
        Flag('confirm_run_unsafe_code', False, 'Whether tasks may run code that the model writes.'),
    ],
)


@register_model('transxssm')
class TransXSSMLM(TemplateLM):
    """A model for lm_eval, from the workdir of a run; `of` makes one from parameters.

    Args:
      workdir: directory of the run.
      step: which checkpoint; -1: the newest.
      weights: of it, 'trained' or 'ema'.
      tokenizer: 'byte', a tokenizers json file or a prepared directory; '': that of the training data.
      max_length: most tokens shown at once, prompt and completion; 0: data.seq_len.
      batch_tokens: tokens per batch, padding included.
      max_gen_toks: most tokens to generate for a task that does not set it.
      ignored: what lm_eval passes to every model: batch_size, device, ... The size of a batch follows from
        batch_tokens, devices are those of jax.

    Attributes:
      run: the checkpoint; None for a model made by `of`.
      cut_contexts: task -> number of requests whose context did not fit in max_length.

    Raises:
      CheckpointError, DataError: no such run or tokenizer, or the tokenizer is another one than that of the run.
      InputError: a number is below 1.
    """

    def __init__(
        self,
        workdir: str,
        *,
        step: int = -1,
        tokenizer: str = '',
        weights: str = 'trained',
        max_length: int = 0,
        batch_tokens: int = 32768,
        max_gen_toks: int = 256,
        **ignored,
    ):
        run = open_trained_run(workdir, step, tokenizer, weights=weights)
        self._start(run.params, run.config, run.tokenizer, max_length, batch_tokens, max_gen_toks)
        self.run = run

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
        """A model from parameters as `checkpoint.load_trained` returns them; the rest as above."""
        lm = cls.__new__(cls)
        lm._start(params, config, tokenizer, max_length, batch_tokens, max_gen_toks)
        return lm

    def _start(self, params, config, tokenizer, max_length, batch_tokens, max_gen_toks):
        super().__init__()
        self.params, self.config, self.tokenizer = params, config, tokenizer
        self.max_length, self.max_gen_toks = max_length or config.data.seq_len, max_gen_toks
        self.scorer = Scorer(params, config, tokenizer, max_length=self.max_length, batch_tokens=batch_tokens)
        self.run: TrainedRun | None = None
        self.cut_contexts = collections.Counter()
        self._generator = None

    @property
    def generator(self) -> Generator:
        """Made when a task first generates, because it has its own copy of the weights."""
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
    def prefix_token_id(self) -> int:
        """The begin token of the tokenizer, which every row of training begins with."""
        return self.tokenizer.begin_id

    @property
    def tokenizer_name(self) -> str:
        about = self.tokenizer.describe()
        return f'{about["kind"]}-{about["sha256"][:16]}'

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        """Token ids of a text, with none added; a special token that the text spells becomes its id."""
        return self.tokenizer.encode_batch([string], special_tokens=True)[0].tolist()

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is_greedy) of each request's (context, continuation)."""
        texts = [request.args for request in requests]
        pairs = [
            (self._fit(context, len(continuation) - 1, request.task_name), continuation)
            for request, (context, continuation) in zip(requests, encode_pairs(self.tokenizer, texts))
        ]
        return self._loglikelihood_tokens(
            [(text, *pair) for text, pair in zip(texts, pairs)], disable_tqdm=disable_tqdm
        )

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc='loglikelihood', disable=disable_tqdm or None, smoothing=0) as bar:
            results = self.scorer.score([(context, continuation) for _, context, continuation in requests], bar.update)
        for (text, _, _), result in zip(requests, results):
            self.cache_hook.add_partial('loglikelihood', text, result)
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each request's (text,) after the begin token; long texts are scored in windows."""
        texts = [request.args[0] for request in requests]
        rows = [with_begin(self.tokenizer, ids).tolist() for ids in self.tokenizer.encode_batch(texts)]
        pairs = [(row[:1], row[1:]) for row in rows]
        with tqdm(total=len(requests), desc='loglikelihood_rolling', disable=disable_tqdm or None, smoothing=0) as bar:
            totals = [total for total, _ in self.scorer.score(pairs, bar.update)]
        for text, total in zip(texts, totals):
            self.cache_hook.add_partial('loglikelihood_rolling', (text,), total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The completion of each request's (context, settings): `until`, `max_gen_toks`, `temperature`, ...

        A context too long to leave room for max_gen_toks loses its first tokens, the begin token excepted.

        Raises:
          InputError: a task asks for so many tokens that no context fits in max_length.
        """
        rows = encode_prompts(self.tokenizer, [request.args[0] for request in requests])
        groups = {}  # settings -> requests that can be decoded together
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [''] * len(requests)
        with tqdm(total=len(requests), desc='generate_until', disable=disable_tqdm or None, smoothing=0) as bar:
            for key, members in groups.items():
                settings = normalize_gen_kwargs(json.loads(key), self.max_gen_toks)
                self.check_max_gen_toks(requests[members[0]].task_name, settings['max_gen_toks'])
                prompts = {i: self._fit(rows[i], settings['max_gen_toks'], requests[i].task_name) for i in members}
                members.sort(key=lambda index: -len(prompts[index]))
                for first in range(0, len(members), GENERATED_TOGETHER):
                    batch = members[first : first + GENERATED_TOGETHER]
                    completions = self.generator.generate(
                        [prompts[i] for i in batch],
                        max_tokens=settings['max_gen_toks'],
                        sampling=_sampling(settings),
                        stop_strings=[stop for stop in settings['until'] if stop],
                        seeds=[fold_seed(SEED, i) for i in batch],
                    )
                    for index, completion in zip(batch, completions):
                        texts[index] = completion.text
                        self.cache_hook.add_partial('generate_until', requests[index].args, completion.text)
                    bar.update(len(batch))
        return texts

    def check_max_gen_toks(self, task: str | None, max_gen_toks: int) -> None:
        """Raises InputError if a task generates so many tokens that no context fits before them."""
        if max_gen_toks > self.max_length - 2:
            raise InputError(
                f'task {task} generates max_gen_toks={max_gen_toks} tokens, which must be at most '
                f'--max_length={self.max_length} - 2; raise --max_length or leave the task out'
            )

    def _fit(self, context, room: int, task: str | None):
        """The context, without its first tokens (but with the begin token) if it and `room` tokens exceed max_length."""
        most = max(self.max_length - max(room, 0), 1)
        if len(context) <= most:
            return context
        self.cut_contexts[task] += 1
        return with_begin(self.tokenizer, context[len(context) - most + 1 :]) if most > 1 else context[-1:]

    def get_model_info(self) -> dict:
        """What lm_eval records of the model."""
        return {
            'model_num_parameters': parameters.count_params(self.config.model),
            'model_dtype': self.config.model.dtype,
            'max_length': self.max_length,
            'tokenizer': self.tokenizer_name,
        }


def encode_pairs(tokenizer, texts: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of (context, continuation), as lm_eval's own models divide them, after the begin token.

    Spaces that end a context begin the continuation; context and continuation are
    encoded as one text, and the continuation is what follows as many tokens as the
    context alone has.
    """
    moved = []
    for context, continuation in texts:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    # A context is repeated for each of its continuations: each text is encoded once.
    distinct = list({text for kept, rest in moved for text in (kept, kept + rest, rest)})
    ids = dict(zip(distinct, tokenizer.encode_batch(distinct, special_tokens=True)))
    pairs = []
    for kept, rest in moved:
        if kept:
            context, continuation = ids[kept], ids[kept + rest][len(ids[kept]) :]
            # If the continuation merges into the context's last token, there is nothing to divide.
            continuation = continuation if len(continuation) or not rest else ids[rest]
        elif len(ids[rest]) and ids[rest][0] == tokenizer.begin_id:
            context, continuation = ids[rest][:1], ids[rest][1:]
        else:
            context, continuation = [], ids[rest]
        pairs.append((with_begin(tokenizer, context).tolist(), [int(i) for i in continuation]))
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
    # The harness's own index has thousands of files: it is read only if a name is not found without it.
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


def check_tasks(tasks: list, lm: TransXSSMLM, confirm_run_unsafe_code: bool) -> None:
    """Refuses tasks that the harness or the model would refuse after others have been evaluated.

    Raises:
      InputError: a task runs code that the model writes and that was not confirmed, or generates too many tokens.
    """
    singles = [
        task for member in tasks for task in (member.get_all_tasks() if hasattr(member, 'get_all_tasks') else [member])
    ]
    for task in singles:
        name = task.task_name if hasattr(task, 'task_name') else task.config.task
        if getattr(task, 'UNSAFE_CODE', False) and not confirm_run_unsafe_code:
            raise InputError(
                f'--tasks: {name} runs code that the model writes (unsafe_code); give --confirm_run_unsafe_code to allow it'
            )
        if task.OUTPUT_TYPE == 'generate_until':
            settings = normalize_gen_kwargs(task.config.generation_kwargs or {}, lm.max_gen_toks)
            lm.check_max_gen_toks(name, settings['max_gen_toks'])


def add_cut_contexts(results: dict, cut_contexts: dict[str, int]) -> None:
    """Records how many contexts were cut: for every task in 'cut_contexts', and as a row of the table where any was."""
    results['cut_contexts'] = {task: cut_contexts.get(task, 0) for task in results['n-samples']}
    for task, count in results['cut_contexts'].items():
        if count:
            results['results'][task]['cut_contexts,none'] = count


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

    check_transformers()
    lm = TransXSSMLM(
        flags.workdir,
        step=flags.step,
        weights=flags.weights,
        tokenizer=flags.tokenizer,
        max_length=flags.max_length,
        batch_tokens=flags.batch_tokens,
    )
    path = results_lib.choose_output(flags.output, lm.run, 'harness')
    loaded = load_tasks(list(flags.tasks), list(flags.include_path))
    check_tasks(loaded['tasks'], lm, flags.confirm_run_unsafe_code)
    print(
        f'harness for {flags.workdir} at step {lm.run.step}: tasks {",".join(flags.tasks)}, '
        f'{flags.limit or "all"} questions each, at most {lm.max_length:,} tokens at once; results go to {path}',
        flush=True,
    )
    results = simple_evaluate(
        lm,
        **loaded,
        confirm_run_unsafe_code=flags.confirm_run_unsafe_code,
        limit=flags.limit or None,
        log_samples=flags.log_samples,
        num_fewshot=None if flags.num_fewshot < 0 else flags.num_fewshot,
    )
    add_cut_contexts(results, lm.cut_contexts)
    print(tables(results))
    made_by = results_lib.of_run(lm.run, COMMAND.module, flags.argv, packages=('lm_eval', 'datasets'))
    write_results(path, results | {'made_by': made_by})
    print(f'results written to {path}')


def check_transformers() -> None:
    """Raises MissingPackageError where transformers is installed and cannot be imported.

    The harness imports it for its version once all questions are answered, and answers would be lost.
    """
    from lm_eval.utils import is_transformers_available

    if is_transformers_available():
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise cli.MissingPackageError(
                f'the evaluation harness records the version of transformers, which cannot be imported here '
                f'({cli.one_line(error)}); mend or uninstall transformers'
            ) from error


def write_results(path: pathlib.Path, results: dict) -> None:
    """Writes results as the harness writes them to its own files."""
    from lm_eval.utils import handle_non_serializable

    results_lib.write_json(path, results, default=handle_non_serializable)
