"""The evaluation harness on our models: how texts are divided, and that the paper's tasks are wired."""

import copy
import gzip
import json
import pathlib
import runpy
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from data_fixtures import SHARED
from eval_fixtures import SMALLER, random_params, save_run
from small import small_config

from transxssm_jax.cli import ExitCode
from transxssm_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from transxssm_jax.evals import scoring

ROOT = pathlib.Path(__file__).parents[1]
TASKS = SHARED / 'eval' / 'tasks'


# ---- as a model of the harness ---------------------------------------------


@pytest.fixture(scope='module')
def harness(tmp_path_factory):
    pytest.importorskip('lm_eval', reason='needs pip install -e .[eval]')
    datasets = pytest.importorskip('datasets', reason='needs pip install -e .[eval]')
    from transxssm_jax.evals import harness

    cache = str(tmp_path_factory.mktemp('datasets'))
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, cache
    yield harness
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope='module')
def lm(harness):
    """An untrained byte model that is shown 64 tokens at most."""
    config = small_config(**SMALLER, model_vocab_size=264, data_seq_len=64)
    return harness.TransXSSMLM.of(random_params(config), config, ByteTokenizer())


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i, metadata=('a_task', i, 1))
        for i, args in enumerate(arguments)
    ]


class Letters:
    """A tokenizer that joins 'th', to show what happens at the boundary; documents begin and end with 1."""

    vocab_size, eos_id, begin_id = 264, 1, 1

    def encode_batch(self, texts, *, special_tokens=False):
        return [np.frombuffer(text.replace('th', '\x02').encode(), np.uint8) for text in texts]


def test_texts_are_divided_as_the_harness_divides_them(harness, lm):
    def ids(text):
        return list(Letters().encode_batch([text])[0])

    cases = [
        ('one', ' two'),
        ('one ', 'two'),
        ('one \n ', 'two'),
        ('', 'two'),
        ('', '\x01two'),
        (' ', 'two'),
        ('t', 'he'),
        ('t', 'h'),
        ('one', ''),
    ]
    found = harness.encode_pairs(Letters(), cases)
    assert found == [
        ([1, *ids('one')], ids(' two')),
        ([1, *ids('one')], ids(' two')),
        ([1, *ids('one')], ids(' \n two')),
        ([1], ids('two')),
        ([1], ids('two')),
        ([1], ids(' two')),
        ([1, *ids('t')], ids('e')),
        ([1, *ids('t')], ids('h')),
        ([1, *ids('one')], []),
    ]
    # The same as the harness's own models, where these serve the case.
    for case in [('one', ' two'), ('one \n', 'two é'), ('a', 'b')]:
        context, continuation = lm._encode_pair(*case)
        assert harness.encode_pairs(ByteTokenizer(), [case]) == [([256, *context], continuation)]


@pytest.mark.skipif(not (SHARED / 'tokenizers').is_dir(), reason='needs ../shared/tokenizers')
@pytest.mark.parametrize('name', ['neox20b', 'doge32k'])
def test_real_tokens_are_divided_as_the_harness_divides_them(harness, name):
    tokenizer = load_tokenizer(SHARED / 'tokenizers' / f'{name}.json', eos='0' if name == 'neox20b' else '1')

    class Dividing(harness.TemplateLM):
        def tok_encode(self, string, add_special_tokens=None):
            return tokenizer.encode_batch([string], special_tokens=True)[0].tolist()

        eot_token_id = generate_until = loglikelihood_rolling = _loglikelihood_tokens = None

    cases = [
        (doc['ctx_a'] + end, rest)
        for doc in read('hellaswag/validation.jsonl.gz', 50)
        for end, rest in (('', ' ' + doc['endings'][0]), (' ', doc['endings'][1]), ('\n\n', doc['endings'][2]))
    ]
    divided = [Dividing()._encode_pair(*case) for case in cases]
    assert harness.encode_pairs(tokenizer, cases) == [
        ([tokenizer.begin_id, *context], continuation) for context, continuation in divided
    ]


def test_the_model_is_registered_and_scores_texts(harness, lm):
    from lm_eval.api.registry import get_model

    assert get_model('transxssm') is harness.TransXSSMLM
    text = 'Rolling over the hills, one window after the other, until the text is at its end.'
    ids = [256, *text.encode()]
    (rolling,) = lm.loglikelihood_rolling(requests('loglikelihood_rolling', (text,)), disable_tqdm=True)
    ((whole, _),) = lm.scorer.score([(ids[:1], ids[1:])])
    assert rolling == whole and len(ids) > 64
    pair, empty = lm.loglikelihood(requests('loglikelihood', ('one ', 'two'), ('', 'two')), disable_tqdm=True)
    for (total, greedy), ids in [(pair, ([256, *b'one'], list(b' two'))), (empty, ([256], list(b'two')))]:
        ((expected, expected_greedy),) = lm.scorer.score([ids])
        assert (total, greedy) == (pytest.approx(expected, rel=1e-5), expected_greedy)


def test_completions_stop_where_they_are_told(harness, lm):
    context = 'The first question'

    def completion(context, **settings):
        return lm.generate_until(requests('generate_until', (context, settings)), disable_tqdm=True)[0]

    free = completion(context, until=[], max_gen_toks=14, do_sample=False)
    assert free and completion(context, until=['', free[3:5]], max_gen_toks=14) == free[: free.index(free[3:5])]
    assert free.startswith(completion(context, until=[], max_gen_toks=6))
    long = 'x' * 500 + context
    assert completion(long, until=[], max_gen_toks=14) == completion(long[-49:], until=[], max_gen_toks=14)
    (after_nothing,) = lm.generator.generate([np.array([256])], max_tokens=14)
    assert completion('', until=[], max_gen_toks=14) == after_nothing.text
    settings = dict(until=[], max_gen_toks=12, do_sample=True, temperature=1.0, top_k=50)
    together = lm.generate_until(
        requests('generate_until', (context, settings), ('a', settings), (context, settings)), True
    )
    again = lm.generate_until(
        requests('generate_until', (context, settings), ('b', settings), (context, settings)), True
    )
    assert together[0] == again[0] != together[2] == again[2], 'a request has a seed of its own'
    with pytest.raises(harness.InputError, match='max_gen_toks=63 tokens, which must be at most --max_length=64 - 2'):
        completion(context, until=[], max_gen_toks=63)


def test_contexts_that_do_not_fit_keep_their_end_and_are_counted(harness, lm):
    lm.cut_contexts.clear()
    long = 'The beginning is lost. ' * 5 + 'The end stays'
    kept = [256, *long.encode()[-60:]]
    found = lm.loglikelihood(
        requests('loglikelihood', (long, ' two'), (long[-60:], ' two'), (long[-59:], ' two')), True
    )
    expected = lm.scorer.score([(kept, list(b' two'))])
    assert found[0] == found[1] == expected[0]
    assert lm.cut_contexts == {'a_task': 1}
    results = {'n-samples': {'a_task': {}, 'other': {}}, 'results': {'a_task': {'acc,none': 0.5}, 'other': {}}}
    harness.add_cut_contexts(results, lm.cut_contexts)
    assert results['cut_contexts'] == {'a_task': 1, 'other': 0}
    assert results['results'] == {'a_task': {'acc,none': 0.5, 'cut_contexts,none': 1}, 'other': {}}


class TaskOf:
    """What check_tasks reads of a task."""

    def __init__(self, output_type, unsafe=False, **generation_kwargs):
        self.task_name, self.OUTPUT_TYPE, self.UNSAFE_CODE = f'{output_type}_task', output_type, unsafe
        self.config = types.SimpleNamespace(generation_kwargs=generation_kwargs)


def test_tasks_that_cannot_finish_are_refused_before_the_first_pass(harness, lm):
    harness.check_tasks([TaskOf('multiple_choice'), TaskOf('generate_until', max_gen_toks=62)], lm, False)
    with pytest.raises(harness.InputError, match='task generate_until_task generates max_gen_toks=63 tokens'):
        harness.check_tasks([TaskOf('multiple_choice'), TaskOf('generate_until', max_gen_toks=63)], lm, False)
    with pytest.raises(harness.InputError, match='generates max_gen_toks=256 tokens'):
        harness.check_tasks([TaskOf('generate_until')], lm, False)  # the model's default
    unsafe = TaskOf('generate_until', unsafe=True, max_gen_toks=9)
    with pytest.raises(harness.InputError, match='generate_until_task runs code .* give --confirm_run_unsafe_code'):
        harness.check_tasks([unsafe], lm, False)
    harness.check_tasks([unsafe], lm, True)


# ---- the paper's tasks -----------------------------------------------------


class Oracle(scoring.Scorer):
    """A model that has read the answers: it continues a text that holds a question with the question's answer.

    It is asked through the scorer's own batches and log-likelihoods, a byte at a time: its hidden state
    is the byte it expects. It knows nothing of where contexts end or which choices there are.
    """

    def __init__(self, facts, max_length):
        self.facts, self.params, self.max_length, self.batch_tokens = facts, {}, max_length, 1 << 16

    def _hidden(self, params, tokens_BL, positions_BL):
        expected_BL = np.zeros(tokens_BL.shape, int)
        for i, (tokens, positions) in enumerate(zip(tokens_BL, positions_BL)):
            text = bytes(int(token) % 256 for token in tokens[: positions.max() + 1])
            answers = [answer for question, answer in self.facts if question in text]
            if answers:
                expected_BL[i, : len(text)] = [next_byte(text[: end + 1], answers[0]) for end in range(len(text))]
        return jnp.asarray(np.eye(257, dtype=np.float32)[expected_BL])

    def _read(self, params, hidden_BLD, at_R, target_R):
        return scoring.log_likelihoods(hidden_BLD.reshape(-1, 257)[at_R], 20 * jnp.eye(257), target_R, 257, cap=0.0)


def next_byte(text, answer):
    """What follows a text that ends with the beginning of the answer; the answer's first byte otherwise."""
    said = max(length for length in range(len(answer)) if text.endswith(answer[:length]))
    return answer[said]


class OracleGenerator:
    """Answers prompts that hold a question, then goes on with another line."""

    def __init__(self, facts):
        self.facts = facts

    def generate(self, prompts, *, max_tokens, sampling, stop_strings, seeds):
        from transxssm_jax.inference.completion import Completion

        texts = []
        for prompt in prompts:
            answers = [
                answer for question, answer in self.facts if question in bytes(int(token) % 256 for token in prompt)
            ]
            text = (answers[0] if answers else b' unknown').decode() + '\nQuestion: and so on?'
            texts.append(text[: min(text.index(stop) for stop in stop_strings if stop in text)])
        assert max_tokens == 256 and sampling.temperature == 0 and len(seeds) == len(prompts)
        return [Completion(np.zeros(0, np.int32), text, 'stop_string') for text in texts]


def read(path, limit):
    with gzip.open(SHARED / 'eval' / path, 'rt') as file:
        return [json.loads(line) for line, _ in zip(file, range(limit))]


def by_label(doc):
    return doc['choices']['text'][doc['choices']['label'].index(doc['answerKey'].strip())]


def winogrande(doc):
    before, _, after = doc['sentence'].partition('_')
    return before + doc['option' + doc['answer']], after


# Task -> file, and (question, answer) of a document of it, from the raw data.
FACTS = {
    'arc_easy_local': ('arc_easy/test.jsonl.gz', lambda doc: (doc['question'], ' ' + by_label(doc))),
    'arc_challenge_local': ('arc_challenge/test.jsonl.gz', lambda doc: (doc['question'], ' ' + by_label(doc))),
    'openbookqa_local': ('openbookqa/test.jsonl.gz', lambda doc: (doc['question_stem'], ' ' + by_label(doc))),
    'piqa_local': (
        'piqa/validation.jsonl.gz',
        lambda doc: (doc['goal'], ' ' + doc['sol1' if doc['label'] == 0 else 'sol2']),
    ),
    'hellaswag_local': (
        'hellaswag/validation.jsonl.gz',
        lambda doc: (doc['ctx_a'], ' ' + doc['endings'][int(doc['label'])]),
    ),
    'winogrande_local': ('winogrande/validation.jsonl.gz', winogrande),
    'lambada_openai_local': (
        'lambada/lambada_test.jsonl.gz',
        lambda doc: (doc['text'].rpartition(' ')[0], ' ' + doc['text'].rpartition(' ')[2]),
    ),
    'triviaqa_local': (
        'triviaqa_rc_wikipedia_nocontext/validation.jsonl.gz',
        lambda doc: (doc['question'], ' ' + doc['answer']['aliases'][0]),
    ),
    **{
        f'mmlu_{subject}_local': (
            f'mmlu/{subject}/test.jsonl.gz',
            lambda doc: (doc['question'].strip(), ' ABCD'[0] + 'ABCD'[doc['answer']]),
        )
        for subject in ('anatomy', 'astronomy')
    },
}
SAMPLES = 3


def evaluated(harness, lm, facts, tasks, monkeypatch):
    from lm_eval.evaluator import simple_evaluate

    monkeypatch.chdir(ROOT)  # the task files name their data from here
    lm = copy.copy(lm)
    lm.max_length, lm.scorer, lm._generator = 8192, Oracle(facts, 8192), OracleGenerator(facts)
    return simple_evaluate(lm, **harness.load_tasks(tasks, [str(TASKS)]), limit=SAMPLES, bootstrap_iters=0)


needs_tasks = pytest.mark.skipif(not TASKS.is_dir(), reason='needs ../shared/eval')


@needs_tasks
def test_an_oracle_scores_one_on_every_task_of_the_paper(harness, lm, monkeypatch, tmp_path):
    facts = [tuple(text.encode() for text in fact(doc)) for path, fact in FACTS.values() for doc in read(path, SAMPLES)]
    results = evaluated(harness, lm, facts, list(FACTS), monkeypatch)
    scores = {
        (task, metric): value
        for task, values in results['results'].items()
        for metric, value in values.items()
        if metric.partition(',')[0] in ('acc', 'acc_norm', 'exact_match')
    }
    assert {task for task, _ in scores} == set(FACTS)
    assert scores == dict.fromkeys(scores, 1.0)
    assert results['results']['lambada_openai_local']['perplexity,none'] == pytest.approx(1, abs=1e-3)
    assert 'hellaswag_local' in harness.tables(results)
    harness.write_results(tmp_path / 'results.json', results)
    written = json.loads((tmp_path / 'results.json').read_text())
    assert written['results']['piqa_local']['acc,none'] == 1 and len(written['samples']['piqa_local']) == SAMPLES


@needs_tasks
def test_an_oracle_of_wrong_answers_scores_nothing(harness, lm, monkeypatch):
    facts = [
        (doc['goal'].encode(), b' ' + doc['sol2' if doc['label'] == 0 else 'sol1'].encode())
        for doc in read('piqa/validation.jsonl.gz', SAMPLES)
    ]
    results = evaluated(harness, lm, facts, ['piqa_local'], monkeypatch)
    assert results['results']['piqa_local']['acc,none'] == 0


# ---- the command -----------------------------------------------------------


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp('run') / 'run')


def large_tokenizer(path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({'</s>': 0} | {f'word{i}': i for i in range(1, 300)}, unk_token='</s>')).save(str(path))
    return path


@needs_tasks
def test_the_command_prints_a_table_and_writes_results(harness, workdir, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert (
        harness.main(
            [
                f'--workdir={workdir}',
                '--tasks=openbookqa_local',
                f'--include_path={TASKS}',
                '--tokenizer=byte',
                '--limit=2',
                '--batch_tokens=1024',
            ]
        )
        == ExitCode.FINISHED
    )
    out = capsys.readouterr().out
    assert '|openbookqa_local|' in out.replace(' ', '') and 'acc_norm' in out
    (path,) = (workdir / 'evals').glob('harness-step-3-*.json')
    assert 'at step 3: tasks openbookqa_local, 2 questions each' in out and f'results go to {path}' in out
    results = json.loads(path.read_text())
    made_by = results['made_by']
    assert (made_by['workdir'], made_by['step'], len(made_by['config_digest'])) == (str(workdir), 3, 64)
    assert '--tasks=openbookqa_local' in made_by['command'] and made_by['versions']['lm_eval'][0].isdigit()
    assert results['cut_contexts'] == {'openbookqa_local': 0} and 'cut_contexts' not in out
    assert results['n-samples']['openbookqa_local'] == {'original': 500, 'effective': 2}
    assert results['config']['max_length'] == 320 and results['config']['model_num_parameters'] > 1000
    assert 'samples' not in results


def test_the_harness_makes_the_model_from_its_own_arguments(harness, workdir):
    from lm_eval.api.registry import get_model

    made = get_model('transxssm').create_from_arg_string(
        f'workdir={workdir},tokenizer=byte,max_length=48,step=3', {'batch_size': 4, 'device': None}
    )
    assert (made.max_length, made.eot_token_id, made.config.model.vocab_size) == (48, 256, 264)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--tasks=piqa'], '--workdir is missing, e.g. --workdir=runs/a'),
        (['--workdir={run}'], '--tasks is missing'),
        (['--workdir={tmp}/none', '--tasks=piqa'], 'does not exist'),
        (['--workdir={run}', '--tasks=piqa'], 'data.path is empty'),
        (['--workdir={run}', '--tasks=piqa', '--tokenizer={tmp}/none.json'], 'none.json'),
        (
            ['--workdir={run}', '--tasks=piqa', '--tokenizer={tmp}/large.json'],
            'large.json has 300 ids, more than model.vocab_size=264',
        ),
        (['--workdir={run}', '--tasks=piqa', '--tokenizer=byte', '--step=4'], 'has no checkpoint of step 4'),
        (['--workdir={run}', '--tasks=piqa', '--tokenizer=byte', '--include_path={tmp}/none'], 'no such directory'),
        (
            ['--workdir={run}', '--tasks=piqua,hellaswag', '--tokenizer=byte'],
            '--tasks=piqua: no such task; nearest: piqa',
        ),
        (
            ['--workdir={run}', '--tasks=qqqqqqq', '--tokenizer=byte'],
            '--tasks=qqqqqqq: no such task; --include_path=DIR adds',
        ),
        (['--workdir={run}', '--tasks=piqa', '--tokenizer=byte', '--output={tmp}/large.json'], 'large.json exists'),
        (['--workdir={run}', '--tasks=piqa', '--taks=1'], 'unknown flag --taks; did you mean --tasks?'),
        (
            ['--workdir={run}', '--tasks=broken', '--tokenizer=byte', '--include_path={tmp}/broken'],
            '--tasks=broken: cannot be loaded',
        ),
    ],
)
def test_wrong_input_is_reported_in_one_line(harness, workdir, tmp_path, monkeypatch, capsys, arguments, message):
    import lm_eval.tasks

    folder = pathlib.Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager
    # The harness's index of all its tasks takes a quarter of a minute to read; two of its folders stand for it.
    monkeypatch.setattr(
        lm_eval.tasks,
        'TaskManager',
        lambda include_path=None, include_defaults=True: manager(
            include_path=(include_path or []) + [folder / name for name in ('piqa', 'hellaswag') if include_defaults],
            include_defaults=False,
        ),
    )
    large_tokenizer(tmp_path / 'large.json')
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'broken.yaml').write_text(
        'task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\ntest_split: test\n'
        'output_type: loglikelihood\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{text}}"\n'
    )
    assert harness.main([*(argument.format(run=workdir, tmp=tmp_path) for argument in arguments)]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert len(err) == 1 and message in err[0]


@pytest.mark.slow
def test_the_papers_tasks_have_their_usual_names(harness):
    from lm_eval.tasks import TaskManager

    names = (
        'mmlu',
        'triviaqa',
        'piqa',
        'hellaswag',
        'openbookqa',
        'winogrande',
        'arc_easy',
        'arc_challenge',
        'lambada_openai',
    )
    assert set(names) <= set(TaskManager().all_tasks)


def test_a_transformers_that_cannot_be_imported_is_reported_before_the_first_question(
    harness, workdir, tmp_path, monkeypatch, capsys
):
    import lm_eval.utils

    (tmp_path / 'transformers').mkdir()
    (tmp_path / 'transformers' / '__init__.py').write_text("raise ImportError('huggingface-hub<2.0 is required')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'transformers', raising=False)
    monkeypatch.setattr(lm_eval.utils, 'is_transformers_available', lambda: True)
    assert harness.main([f'--workdir={workdir}', '--tasks=piqa', '--tokenizer=byte']) == 2
    assert 'cannot be imported here (huggingface-hub<2.0 is required); mend' in capsys.readouterr().err


def test_without_the_harness_the_command_reports_what_to_install(monkeypatch, capsys):
    for name in ('lm_eval', 'lm_eval.api.model', 'lm_eval.api.registry', 'lm_eval.models.utils'):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, 'transxssm_jax.evals.harness', raising=False)
    with pytest.raises(SystemExit) as exit:
        runpy.run_module('transxssm_jax.evals.harness', run_name='__main__')
    assert exit.value.code == 2
    assert capsys.readouterr().err.endswith('is not installed; pip install -e .[eval]\n')
