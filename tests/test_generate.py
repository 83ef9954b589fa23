"""Generation: what is chosen, what ends a text, that batches change nothing, and the command."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import small_config

from transxssm_jax import generate
from transxssm_jax.data.tokenizer import ByteTokenizer
from transxssm_jax.inference.completion import NO_TOKEN, Row
from transxssm_jax.inference.generator import Generator, bucket
from transxssm_jax.inference.sampling import GREEDY, InputError, Sampling, choose
from transxssm_jax.model import parameters
from transxssm_jax.training import checkpoint

MAX_LENGTH = 32  # one size of cache and of prompts, so that little is compiled
RANDOM = Sampling(temperature=1.0)


@pytest.fixture(scope='module')
def config():
    """(ssd, attention) on bytes; the vocabulary is padded."""
    return small_config(
        model_vocab_size=264,
        model_d_model=32,
        model_num_layers=2,
        model_num_heads=2,
        model_d_mlp=32,
        model_attention_period=2,
        model_attention_offset=1,
        data_path='byte',
        data_seq_len=MAX_LENGTH,
        mesh_data=1,
    )


@pytest.fixture(scope='module')
def params(config):
    return jax.jit(functools.partial(parameters.init_params, config.model))(0)


@pytest.fixture(scope='module')
def generator(config, params):
    return Generator(params, config, ByteTokenizer(), batch=4)


@pytest.fixture(scope='module')
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(32, 127, length) for length in (5, 20, 1, 18, 9)]


@pytest.fixture(scope='module')
def completions(generator, prompts):
    return generator.generate(prompts, max_tokens=12, sampling=RANDOM, stop_tokens=(), seeds=range(5))


def test_greedy_takes_the_likeliest_token_of_the_forward_pass(config, params, generator, prompts):
    [completion] = generator.generate(prompts[4:5], max_tokens=10, stop_tokens=())
    row = np.concatenate([prompts[4], completion.tokens])
    logits = nnx.merge(parameters.split_model(config.model)[0], params).logits(row[None].astype(np.int32))[0]
    np.testing.assert_array_equal(completion.tokens, logits[len(prompts[4]) - 1 : -1, :257].argmax(-1))
    assert completion.finish == 'length'


def test_a_text_depends_on_its_prompt_and_seed_alone(generator, prompts, completions):
    assert [len(completion.tokens) for completion in completions] == [12] * 5
    [alone] = generator.generate(prompts[3:4], max_tokens=12, sampling=RANDOM, stop_tokens=(), seeds=3)
    np.testing.assert_array_equal(alone.tokens, completions[3].tokens)
    # Another order and other neighbours, in other batches:
    order = [4, 0, 3, 1]
    again = generator.generate([prompts[i] for i in order], max_tokens=12, sampling=RANDOM, stop_tokens=(), seeds=order)
    for i, completion in zip(order, again):
        np.testing.assert_array_equal(completion.tokens, completions[i].tokens)
    same_prompt = generator.generate(
        [prompts[0]] * 4, max_tokens=12, sampling=RANDOM, stop_tokens=(), seeds=[0, 7, 0, 8]
    )
    np.testing.assert_array_equal(same_prompt[0].tokens, completions[0].tokens)
    np.testing.assert_array_equal(same_prompt[2].tokens, completions[0].tokens)
    assert len({tuple(completion.tokens) for completion in same_prompt}) == 3


def test_stop_tokens_end_a_completion(generator, prompts, completions):
    whole = completions[1].tokens
    stop = int(whole[5])
    [completion] = generator.generate(prompts[1:2], max_tokens=12, sampling=RANDOM, stop_tokens=(stop, 300), seeds=1)
    np.testing.assert_array_equal(completion.tokens, whole[: list(whole).index(stop)])
    assert completion.finish == 'stop_token'


def test_stop_strings_cut_the_text_exactly(generator, prompts):
    printable = dict(max_tokens=12, sampling=Sampling(1.0, top_k=1), stop_tokens=())
    [whole] = generator.generate(prompts[1:2], **printable)
    stop = whole.text[3:5]
    [completion] = generator.generate(prompts[1:2], stop_strings=[whole.text[7:9], stop, 'never'], **printable)
    assert completion.text == whole.text[: whole.text.find(stop)] and completion.finish == 'stop_string'
    np.testing.assert_array_equal(completion.tokens, whole.tokens[: len(completion.tokens)])
    assert ByteTokenizer().decode(completion.tokens).startswith(completion.text)
    assert not ByteTokenizer().decode(completion.tokens[:-1]).startswith(completion.text) or not completion.text
    assert ''.join(generator.stream(prompts[1], stop_strings=[stop], **printable)) == completion.text


def test_max_length_ends_a_completion(generator, prompts):
    [completion] = generator.generate(prompts[1:2], max_tokens=100, stop_tokens=())
    assert len(completion.tokens) == MAX_LENGTH - len(prompts[1]) and completion.finish == 'length'


def test_a_stream_joins_to_the_text(generator, prompts, completions):
    pieces = list(generator.stream(prompts[1], max_tokens=12, sampling=RANDOM, stop_tokens=(), seed=1))
    assert ''.join(pieces) == completions[1].text and len(pieces) > 1


# ---- text ------------------------------------------------------------------


class SpaceDropping:
    """A tokenizer of words that, like many, writes no space before the first."""

    words = ['a', 'b', 'c']

    def decode(self, ids):
        return ' '.join(self.words[i] for i in ids)


def test_the_space_between_prompt_and_completion_is_kept():
    row = Row(SpaceDropping(), np.array([0, 1]), 3, (), (), 0)
    row.extend(np.array([2, 0, NO_TOKEN]))
    assert (row.text, row.finish) == (' c a', '')
    row.extend(np.array([1, NO_TOKEN, NO_TOKEN]))
    assert (row.text, row.finish) == (' c a b', 'length')


@pytest.mark.parametrize('text', ['é€😀!', 'plain', '\ufffd?'])
def test_characters_and_stop_strings_are_shown_whole(text):
    data = np.frombuffer(text.encode(), np.uint8)
    row = Row(ByteTokenizer(), np.array([65]), 100, (), ('STOP',), 0)
    shown = ['']
    for byte in data:
        row.extend(np.array([byte]))
        shown.append(row.settled_text())
    assert all(text.startswith(piece) for piece in shown) and shown[-1] == text
    for byte in b' ST':
        row.extend(np.array([byte]))
    assert row.settled_text() == text + ' '
    row.extend(np.frombuffer(b'OP more', np.uint8))
    assert row.settled_text() == row.text == text + ' ' and row.finish == 'stop_string'
    assert bytes(row.tokens) == text.encode() + b' '


def test_a_text_that_ends_within_a_character_says_so():
    row = Row(ByteTokenizer(), np.array([65]), 2, (), (), 0)
    row.extend(np.frombuffer('€'.encode()[:2], np.uint8))
    assert row.finish == 'length' and row.settled_text() == '\ufffd'


# ---- the choice ------------------------------------------------------------

V, PADDED = 40, 48
LOGITS = 2 * np.random.default_rng(3).standard_normal(PADDED).astype(np.float32)
LOGITS[V:] = 50.0  # rows that pad the vocabulary must never be chosen, however likely
SEEN = np.random.default_rng(4).random(PADDED) < 0.4


def oracle(sampling):
    """Probabilities of the tokens, by sorting."""
    logits = LOGITS[:V].astype(np.float64)
    if sampling.repetition_penalty != 1:
        penalty = np.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits = np.where(SEEN[:V], logits * penalty, logits)
    if sampling.temperature == 0:
        return np.eye(V)[logits.argmax()]
    logits = logits / sampling.temperature
    order = np.argsort(-logits)
    if sampling.top_k:
        order = order[: sampling.top_k]
    p = np.exp(logits[order])
    p /= p.sum()
    if sampling.top_p < 1:
        count = np.searchsorted(np.cumsum(p), sampling.top_p) + 1
        order, p = order[:count], p[:count]
    kept = p >= sampling.min_p * p[0]
    probabilities = np.zeros(V)
    probabilities[order[kept]] = p[kept] / p[kept].sum()
    return probabilities


@pytest.mark.parametrize(
    'sampling',
    [
        GREEDY,
        RANDOM,
        Sampling(0.5),
        Sampling(1.0, top_k=1),
        Sampling(1.5, top_k=7),
        Sampling(1.0, top_p=0.6),
        Sampling(0.7, top_p=1e-6),
        Sampling(1.0, min_p=0.1),
        Sampling(1.0, repetition_penalty=1.7),
        Sampling(0.0, repetition_penalty=2.5),
        Sampling(1.2, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
        Sampling(1.0, top_k=V),
    ],
    ids=str,
)
def test_tokens_are_chosen_with_the_probabilities_of_the_definition(sampling):
    draws = 6000
    plan, numbers = sampling.plan(V), sampling.numbers()
    keys = jax.random.split(jax.random.key(0), draws)
    run = jax.jit(
        lambda logits, keys, seen: choose(
            plan, numbers, jnp.broadcast_to(logits, (draws, PADDED)), keys, jnp.broadcast_to(seen, (draws, PADDED))
        )
    )
    counts = np.bincount(np.asarray(run(LOGITS, keys, SEEN)), minlength=PADDED)
    expected = oracle(sampling)
    assert not counts[V:].any() and not counts[:V][expected == 0].any()
    deviations = (counts[:V] - draws * expected) / np.sqrt(draws * expected * (1 - expected) + 1)
    assert np.abs(deviations).max() < 4.5, deviations


def test_a_threshold_takes_equals_too():
    sampling = Sampling(1.0, top_k=2)
    run = jax.jit(lambda logits, keys: choose(sampling.plan(4), sampling.numbers(), logits, keys, None))
    chosen = run(np.tile(np.float32([1, 3, 1, -2]), (500, 1)), jax.random.split(jax.random.key(0), 500))
    assert set(np.asarray(chosen).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    'settings',
    [
        dict(temperature=-1.0),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(min_p=1.0),
        dict(repetition_penalty=0.0),
        dict(temperature=float('nan')),
    ],
)
def test_settings_out_of_range_are_named(settings):
    [(name, value)] = settings.items()
    with pytest.raises(InputError, match=f'{name}={value} must be'):
        Sampling(**settings)


@pytest.mark.parametrize('length', [1, 31, 32, 33, 100, 128, 129, 1000, 4096, 4097])
def test_sizes_are_rounded_up_by_a_quarter_at_most(length):
    assert length <= bucket(length) <= max(32, 1.25 * length) and bucket(bucket(length)) == bucket(length)
    assert bucket(length) % 8 == 0


# ---- wrong input -----------------------------------------------------------


@pytest.mark.parametrize(
    'prompt, settings, message',
    [
        (np.zeros(0, np.int32), {}, 'the prompt is empty'),
        (np.ones(MAX_LENGTH, np.int32), {}, '32 tokens; at most 31'),
        (np.array([264]), {}, 'the model knows 0 to 263'),
        (np.array([-1]), {}, 'from -1'),
        (np.ones((2, 2), np.int32), {}, '1-D'),
        (np.ones(2), {}, 'of integers'),
        (np.ones(2, np.int32), dict(max_tokens=0), 'max_tokens=0'),
        (np.ones(2, np.int32), dict(seeds=[1, 2]), 'seeds must be'),
        (np.ones(2, np.int32), dict(seeds=-1), 'seeds must be'),
        (np.ones(2, np.int32), dict(stop_strings=['']), 'stop_strings'),
    ],
)
def test_wrong_requests_are_named(generator, prompt, settings, message):
    with pytest.raises(InputError, match=message):
        generator.generate([prompt], **dict(max_tokens=4) | settings)


def test_a_tokenizer_that_does_not_fit_is_refused(params):
    config = small_config(model_vocab_size=256)
    with pytest.raises(InputError, match='257 tokens, more than model.vocab_size=256'):
        Generator(params, config, ByteTokenizer())
    with pytest.raises(InputError, match='batch=0'):
        Generator(params, config, batch=0)


# ---- the command -----------------------------------------------------------


@pytest.fixture(scope='module')
def workdir(config, params, tmp_path_factory):
    path = tmp_path_factory.mktemp('run')
    checkpoint.open_workdir(path, config)
    checkpoints = checkpoint.Checkpoints(path, config)
    for number in (3, 7):
        scaled = jax.tree.map(lambda leaf: leaf * (number / 7), params)  # noqa: B023
        checkpoints.save(
            number,
            {'step': jnp.int32(number), 'params': scaled, 'opt_state': {'mu': scaled, 'nu': scaled}},
            {'next_step': 0},
        )
        checkpoints.wait()
    checkpoints.close()
    return path


def call(capsys, *arguments):
    code = generate.main(list(map(str, arguments)))
    return code, *capsys.readouterr()


def test_parameters_of_a_run_are_loaded(workdir, config, params):
    loaded, of_run = checkpoint.load_trained(workdir)
    assert of_run == config and checkpoint.load_config(workdir, 3) == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    loaded, _ = checkpoint.load_trained(workdir, step=3)
    np.testing.assert_allclose(loaded['embedding'], params['embedding'] * 3 / 7, rtol=1e-6)
    with pytest.raises(checkpoint.CheckpointError, match='no checkpoint of step 5; it has 3, 7'):
        checkpoint.load_trained(workdir, step=5)


def test_a_prompt_is_continued_on_the_terminal(workdir, generator, capsys):
    code, out, err = call(
        capsys, f'--workdir={workdir}', '--prompt=To be', '--max_tokens=9', '--seed=5', '--temperature=1'
    )
    [expected] = generator.generate([np.frombuffer(b'To be', np.uint8)], max_tokens=9, sampling=RANDOM, seeds=5)
    assert (code, err) == (0, '') and out == 'To be' + expected.text + '\n'


def test_prompts_of_a_file_are_continued_in_a_file(workdir, generator, tmp_path, capsys):
    (tmp_path / 'in.jsonl').write_text('{"prompt": "To be", "id": 1}\n{"prompt": "or not"}\n')
    code, out, err = call(
        capsys,
        f'--workdir={workdir}',
        f'--prompts={tmp_path / "in.jsonl"}',
        '--config.mesh.data=2',
        '--config.mesh.tensor=2',
        f'--output={tmp_path / "out.jsonl"}',
        '--max_tokens=9',
        '--temperature=1',
    )
    assert (code, err) == (0, '') and out.startswith('2 completions')
    written = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    prompts = ['To be', 'or not']
    expected = [
        generator.generate([np.frombuffer(prompt.encode(), np.uint8)], max_tokens=9, sampling=RANDOM)[0]
        for prompt in prompts
    ]
    assert written == [
        {'prompt': 'To be', 'id': 1, 'completion': expected[0].text, 'finish': 'length'},
        {'prompt': 'or not', 'completion': expected[1].text, 'finish': 'length'},
    ]
    # It is not written over:
    code, _, err = call(capsys, f'--workdir={workdir}', '--prompt=a', f'--output={tmp_path / "out.jsonl"}')
    assert code == 2 and 'exists' in err and err.count('\n') == 1


def test_a_conversation_goes_on_after_ctrl_c_and_mistakes(workdir, monkeypatch, capsys):
    def pieces(self, row, sampling):
        yield f'<{len(row.prompt)}'
        if row.prompt[0] == ord('!'):
            raise KeyboardInterrupt
        yield '>'

    monkeypatch.setattr(Generator, '_pieces', pieces)
    monkeypatch.setattr('sys.stdin', io.StringIO('! stop\n\n' + 'x' * MAX_LENGTH + '\nTo be\n'))
    code, out, err = call(capsys, f'--workdir={workdir}', '--interactive', '--max_tokens=9')
    assert code == 0 and out == '! stop<6 [stopped]\nTo be<5>\n'
    assert err.count('\n') == 1 and 'at most 31' in err


def test_a_terminal_is_told_how_to_leave(workdir, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(Generator, '_pieces', lambda self, row, sampling: iter(['.']))
    monkeypatch.setattr('sys.stdin', Terminal('To be\n'))
    code, out, err = call(capsys, f'--workdir={workdir}', '--interactive')
    assert (code, err) == (0, '')
    first, *rest = out.splitlines()
    assert 'Ctrl-D ends' in first and ''.join(rest) == '> To be.> '


def test_only_a_line_feed_ends_a_prompt(workdir, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Generator, '_pieces', lambda self, row, sampling: iter([f'<{len(row.prompt)}>']))
    text = 'a\u2028b'
    for name, content in (('in.jsonl', f'{{"prompt": "{text}"}}\r\n'), ('in.txt', f'\ufeff{text}\n')):
        (tmp_path / name).write_bytes(content.encode())
        code, out, err = call(capsys, f'--workdir={workdir}', f'--prompts={tmp_path / name}')
        assert (code, out, err) == (0, f'{text}<5>\n', '')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--prompt=a', '--workdir=/nowhere'], 'does not exist'),
        (['--prompt='], 'the prompt is empty'),
        (['--prompt=' + 'x' * MAX_LENGTH], '32 tokens; at most 31'),
        (['--prompt=a', '--step=5'], 'no checkpoint of step 5'),
        (['--prompt=a', '--tokenizer=/nowhere.json'], 'tokenizer /nowhere.json'),
        (['--prompt=a', '--temperature=-1'], 'temperature=-1.0 must be'),
        (['--prompt=a', '--max_tokens=0'], 'max_tokens=0'),
        (['--prompt=a', '--max_token=5'], 'unknown flag --max_token; did you mean --max_tokens?'),
        (['--prompt=a', '--top_k=many'], 'many'),
        (['--prompt=a', '--interactive'], 'give one of'),
        ([], 'give one of'),
        (['--interactive', '--output=x.jsonl'], '--output is for'),
        (['--prompts=/nowhere'], '/nowhere'),
        (['--prompt=a', '--config.mesh.tensor=16'], '8 devices'),
        (['--prompt=a', '--config.mesh.fsdp=2'], 'mesh.fsdp=2 must be 1'),
        (['--prompt=a', '--config.model.d_mlp=64'], 'model.d_mlp is '),
        (['--prompt=a', '--config.model.rope_scaling=long'], 'not one of the choices'),
        (['--prompt=a', '--config.model.d_modle=64'], 'did you mean model.d_model?'),
        (['--prompt=a', '--seed=4294967296'], 'must be at most 4294967295'),
        (['--prompt=a', '--config.mesh.tensor=4'], 'model.num_heads=2 must be divisible by mesh.tensor=4'),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(workdir, capsys, arguments, message):
    code, out, err = call(capsys, f'--workdir={workdir}', *arguments)
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1 and message in err, err
    assert out in ('', 'a')


@pytest.mark.parametrize(
    'lines, message',
    [
        ('', 'has no line'),
        ('{"prompt": "a"}\n{"text": "b"}\n', 'line 2'),
        ('not json\n', 'line 1'),
        ('{"prompt": "a"}\n{"prompt": ""}\n', 'line 2: the prompt is empty'),
        ('{"prompt": 3}\n', 'line 1'),
        (b'{"prompt": "\xff"}\n', 'is not UTF-8 (byte 12)'),
    ],
)
def test_wrong_files_of_prompts_are_named(workdir, tmp_path, capsys, lines, message):
    (tmp_path / 'in.jsonl').write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    code, _, err = call(capsys, f'--workdir={workdir}', f'--prompts={tmp_path / "in.jsonl"}')
    assert code == 2 and err.count('\n') == 1 and message in err
