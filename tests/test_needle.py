"""Needle in a haystack: where needles are put, what is measured, and what is written."""

import contextlib
import io
import json

import numpy as np
import pytest
from eval_fixtures import random_params, save_run
from small import small_config

from transxssm_jax.cli import ExitCode
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.tokenizer import ByteTokenizer
from transxssm_jax.evals import heat_map, needle, scoring
from transxssm_jax.inference.decode import Decoder
from transxssm_jax.inference.generator import Generator
from transxssm_jax.inference.sampling import InputError

SETTINGS = dict(needles=1, ask='one', candidates=4, seed=0)


@pytest.fixture(scope='module')
def haystack(tmp_path_factory):
    path = tmp_path_factory.mktemp('text') / 'story.txt'
    path.write_text(' '.join(f'Sentence number {i} says nothing new.' for i in range(200)))
    return needle.Haystack(str(path), ByteTokenizer(), 4000)


def text_of(case):
    assert case.tokens[0] == ByteTokenizer().eos_id, 'the begin token'
    return bytes(case.tokens[1:].tolist()).decode()


@pytest.mark.parametrize('depth', [0, 30, 100])
def test_a_needle_stands_at_its_depth_after_a_sentence(haystack, depth):
    case = haystack.case(1000, depth, 0, **SETTINGS)
    (question,) = case.questions
    text, sentence = text_of(case), ' ' + question.needle
    assert text.count(sentence) == 1 and question.answer in sentence
    before = text.index(sentence)
    assert not before or text[:before].rstrip().endswith('.') or depth == 100
    assert abs(before / (len(text) - len(sentence)) - depth / 100) < 0.06, 'a sentence early at most'
    assert len(case.tokens) + len(question.tokens) + needle.ROOM == 1000
    city = question.needle.split()[4]
    assert bytes(question.tokens).decode().endswith(f'The secret number of {city} is')
    assert question.candidates[0] == question.answer and len(set(question.candidates)) == 4
    # Without needle and question it is the haystack, whole.
    around = np.concatenate([case.tokens[1 : 1 + before], case.tokens[1 + before + len(sentence) :]])
    assert bytes(around.tolist()) in bytes(np.tile(haystack.tokens, 2).tolist())


def test_cases_are_a_function_of_seed_length_depth_and_sample(haystack):
    case = haystack.case(600, 50, 0, **SETTINGS)
    same = haystack.case(600, 50, 0, **SETTINGS)
    assert (case.tokens == same.tokens).all() and case.questions == same.questions
    for other in (haystack.case(600, 50, 1, **SETTINGS), haystack.case(600, 50, 0, **{**SETTINGS, 'seed': 1})):
        assert other.questions[0].answer != case.questions[0].answer


def test_several_needles_are_spread_from_the_first_to_the_end_and_asked_for_each(haystack):
    case = haystack.case(1500, 20, 0, needles=4, ask='all', candidates=3, seed=0)
    assert [question.depth for question in case.questions] == [20, 40, 60, 80]
    places = [text_of(case).index(question.needle) / len(case.tokens) for question in case.questions]
    assert places == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=0.06)
    answers = {question.answer for question in case.questions}
    assert len(answers) == 4 and all(set(question.candidates) == answers for question in case.questions)
    one = haystack.case(1500, 20, 0, needles=4, ask='one', candidates=6, seed=0)
    assert [question.depth for question in one.questions] == [20]
    assert (
        len(one.questions[0].candidates) == 6
        and sum(number in text_of(one) for number in one.questions[0].candidates) == 4
    ), 'numbers of other needles are candidates'


def test_a_short_text_is_repeated(tmp_path):
    (tmp_path / 'short.txt').write_text('One sentence. Two.')
    short = needle.Haystack(str(tmp_path / 'short.txt'), ByteTokenizer(), 1000)
    assert len(short.case(500, 50, 0, **SETTINGS).tokens) > 300


def test_what_a_haystack_refuses(haystack, tmp_path):
    with pytest.raises(
        InputError, match=r'--lengths=100 is too short for 1 needle\(s\), .* which take 1\d\d tokens; try .*=256'
    ):
        haystack.case(100, 50, 0, **SETTINGS)
    with pytest.raises(DataError, match='--haystack=.*none.txt: no such file'):
        needle.Haystack(str(tmp_path / 'none.txt'), ByteTokenizer(), 10)
    (tmp_path / 'empty.txt').write_text('')
    with pytest.raises(DataError, match='has no text'):
        needle.Haystack(str(tmp_path / 'empty.txt'), ByteTokenizer(), 10)


@pytest.fixture(scope='module')
def model():
    config = small_config(
        model_vocab_size=264, model_num_layers=2, model_attention_period=2, model_attention_offset=1, data_seq_len=320
    )
    return random_params(config), config


def test_scores_are_those_of_the_whole_text(haystack, model):
    params, config = model
    case = haystack.case(320, 40, 0, needles=2, ask='all', candidates=3, seed=1)
    reader = needle.Reader(Decoder(params, config), ByteTokenizer())
    state = reader.read(case)
    answers = [reader.answer(state, case, question) for question in case.questions]
    assert reader.answer(state, case, case.questions[0]) == answers[0], 'the state of the haystack stays'
    scorer = scoring.Scorer(params, config, ByteTokenizer(), max_length=320, batch_tokens=2048)
    generator = Generator(params, config, ByteTokenizer())
    for question, answer in zip(case.questions, answers):
        prompt = [*case.tokens.tolist(), *question.tokens]
        expected = [
            total
            for total, _ in scorer.score([(prompt, list(f' {number}'.encode())) for number in question.candidates])
        ]
        np.testing.assert_allclose(answer['log_likelihoods'], expected, rtol=1e-4)
        assert answer['rank'] == 1 + sum(score > expected[0] for score in expected)
        (completion,) = generator.generate([np.array(prompt)], max_tokens=needle.ROOM)
        assert answer['response'] == completion.text


def test_means_tables_and_heat_maps(tmp_path):
    results = [
        {
            'context_length': length,
            'depth_percent': depth,
            'generated': float(depth == 50),
            'chosen': 1.0,
            'rank': 1 + i,
        }
        for length in (512, 1024)
        for depth in (0.0, 50.0)
        for i in range(2)
    ]
    cells = needle.means(results)
    assert cells[1] == {
        'context_length': 512,
        'depth_percent': 50.0,
        'questions': 2,
        'generated': 1.0,
        'chosen': 1.0,
        'rank': 1.5,
    }
    assert needle.table(cells, 'generated').splitlines() == [
        ' generated      512    1,024',
        '        0%     0.00     0.00',
        '       50%     1.00     1.00',
    ]
    pytest.importorskip('matplotlib', reason='needs pip install -e .[eval]')
    heat_map.heat_map(tmp_path / 'map.png', cells, 'generated', 'title', chance=0.1)
    from PIL import Image

    pixels = np.asarray(Image.open(tmp_path / 'map.png').convert('RGB')).reshape(-1, 3).astype(int)
    dark, bright, white, red = (
        (np.abs(pixels - color).sum(1) < 12).sum() for color in ((68, 1, 84), (253, 231, 37), (255,) * 3, (255, 0, 0))
    )
    assert dark > 0.05 * len(pixels) and bright > 0.05 * len(pixels), 'the two ends of the scale'
    assert white > 0.1 * len(pixels) and red > 30, 'the margin and the mark of chance'


def test_numbers_in_the_cells_can_be_read():
    matplotlib = pytest.importorskip('matplotlib', reason='needs pip install -e .[eval]')
    for value in np.linspace(0, 1, 50):
        luminance = heat_map.luminance(matplotlib.colormaps['viridis'](value))
        text = 1.0 if luminance < 0.18 else 0.0
        contrast = (max(luminance, text) + 0.05) / (min(luminance, text) + 0.05)
        assert contrast > 4.4, (value, contrast)


@pytest.mark.parametrize(
    'text, found',
    [
        (' 12345.', True),
        ('12345', True),
        ('is 12345 and', True),
        (' 123456', False),
        ('012345', False),
        ('1234', False),
    ],
)
def test_an_answer_is_a_whole_number(text, found):
    assert needle.contains_number(text, '12345') == found


# ---- the command -----------------------------------------------------------


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp('run') / 'run', data_path='byte')


def run(workdir, *arguments):
    """(exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = needle.main([f'--workdir={workdir}', '--tokenizer=byte', *arguments])
    return code, out.getvalue(), err.getvalue()


def test_the_command_writes_every_question_and_a_heat_map_of_each_score(workdir, tmp_path):
    (tmp_path / 'story.txt').write_text('Nothing happens here. ' * 40)
    code, out, _ = run(
        workdir,
        f'--haystack={tmp_path}/story.txt',
        '--lengths=320',
        '--depths=0,100',
        '--needles=2',
        '--ask=all',
        '--candidates=3',
        '--samples=2',
        f'--output={tmp_path}/results',
    )
    assert code == ExitCode.FINISHED
    record = json.loads((tmp_path / 'results' / 'results.json').read_text())
    assert [(cell['context_length'], cell['depth_percent'], cell['questions']) for cell in record['cells']] == [
        (320, 0, 4),
        (320, 100, 4),
    ]
    assert len(record['results']) == 8
    assert (record['workdir'], record['step'], record['chance']['chosen']) == (str(workdir), 3, pytest.approx(1 / 3))
    assert record['command'].endswith(f'--output={tmp_path}/results') and len(record['config_digest']) == 64
    for result in record['results']:
        assert (
            result['expected'] in result['needle'] and len(result['log_likelihoods']) == len(result['candidates']) == 3
        )
        assert 1 <= result['rank'] <= 3 and result['chosen'] == (result['rank'] == 1)
        assert result['score'] == needle.contains_number(result['model_response'], result['expected'])
    assert 'by chance 0.33' in out and 'generated      320' in out
    assert f'{workdir} at step 3: 4 haystacks (1 lengths x 2 depths x 2 samples) of 320 to 320 tokens' in out
    pytest.importorskip('matplotlib', reason='needs pip install -e .[eval]')
    assert all((tmp_path / 'results' / f'{score}.png').stat().st_size > 5000 for score in ('generated', 'chosen'))


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--haystack='], '--haystack is missing, e.g. --haystack=book.txt'),
        (['--haystack={tmp}/none.txt'], '--haystack={tmp}/none.txt: no such file'),
        (['--haystack={tmp}/a.txt', '--lengths=1024,ten'], "--lengths='ten' must be int (a whole number)"),
        (['--haystack={tmp}/a.txt', '--lengths=64'], '--lengths=64 is too short for 1 needle(s)'),
        (['--haystack={tmp}/a.txt', '--depths=110'], '--depths=110.0 must be at most 100'),
        (['--haystack={tmp}/a.txt', '--needles=0'], '--needles'),
        (['--haystack={tmp}/a.txt', '--depths='], '--depths is empty'),
        (['--haystack={tmp}/a.txt', '--candidates=90001'], '--candidates=90001 must be at most 90000'),
        (['--haystack={tmp}/a.txt', '--step=4'], 'has no checkpoint of step 4'),
        (['--haystack={tmp}/a.txt', '--output={tmp}'], 'exists; name a new directory'),
    ],
)
def test_wrong_input_is_reported_in_one_line(workdir, tmp_path, arguments, message):
    (tmp_path / 'a.txt').write_text('Some text. ' * 50)
    code, _, err = run(workdir, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == ExitCode.WRONG_INPUT
    assert err.startswith('error: ') and message.format(tmp=tmp_path) in err and len(err.splitlines()) == 1
