"""Generation: what ends a text, that batches change nothing, and the command."""

import functools
import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import small_config

from transxssm_jax import config as config_lib
from transxssm_jax import generate
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.tokenizer import ByteTokenizer
from transxssm_jax.inference import generator as generator_lib
from transxssm_jax.inference.generator import Generator
from transxssm_jax.inference.padding import padded_length
from transxssm_jax.inference.prompt import encode_prompts, with_begin
from transxssm_jax.inference.sampling import InputError, Sampling, fold_seed
from transxssm_jax.model import parameters
from transxssm_jax.parallel import mesh
from transxssm_jax.training import checkpoint, run_directory

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


def tokens_of(text):
    return encode_prompts(ByteTokenizer(), [text])[0]


def test_greedy_takes_the_likeliest_token_of_the_forward_pass(config, params, generator, prompts):
    [completion] = generator.generate(prompts[4:5], max_tokens=10, stop_tokens=())
    row = np.concatenate([prompts[4], completion.tokens])
    logits = nnx.merge(parameters.split_model(config.model)[0], params).logits(row[None].astype(np.int32))[0]
    np.testing.assert_array_equal(completion.tokens, logits[len(prompts[4]) - 1 : -1, :257].argmax(-1))
    assert completion.finish_reason == 'length'


def test_a_text_depends_on_its_prompt_and_seed_alone(generator, prompts, completions):
    assert [len(completion.tokens) for completion in completions] == [12] * 5
    [alone] = generator.generate(prompts[3:4], max_tokens=12, sampling=RANDOM, stop_tokens=(), seeds=[3])
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


def test_a_mesh_that_reads_prompts_in_parts_changes_no_text(config, params, prompts, completions, monkeypatch):
    monkeypatch.setattr(generator_lib, 'PREFILL_TOKENS', 40)  # per device: one prompt of 32 at a time
    device_mesh = mesh.build(config_lib.replace(config, {'mesh.data': 2}), jax.devices()[:2])
    with jax.set_mesh(device_mesh):
        sharded = Generator(params, config, ByteTokenizer(), batch=4)
        again = sharded.generate(prompts[:4], max_tokens=12, sampling=RANDOM, stop_tokens=(), seeds=range(4))
    for ours, expected in zip(again, completions):
        np.testing.assert_array_equal(ours.tokens, expected.tokens)


def test_prompts_and_samples_share_no_random_numbers(generator, prompts):
    settings = dict(max_tokens=12, sampling=RANDOM, stop_tokens=())
    same = generator.generate([prompts[0]] * 4, seeds=7, **settings)
    assert len({tuple(completion.tokens) for completion in same}) == 4
    # The text of a prompt depends on its index, not on the prompts around it.
    others = generator.generate([prompts[3], prompts[0], prompts[1]], seeds=7, **settings)
    np.testing.assert_array_equal(others[1].tokens, same[1].tokens)
    [second] = generator.generate([prompts[0]], seeds=[fold_seed(7, 1)], **settings)
    np.testing.assert_array_equal(second.tokens, same[1].tokens)


def test_completions_come_as_they_end(generator, prompts):
    came = generator.completions(prompts, max_tokens=20, stop_tokens=())
    order, lengths = zip(*((i, len(completion.tokens)) for i, completion in came))
    assert sorted(order) == [0, 1, 2, 3, 4] and order[-1] == 2, 'the shortest prompt is in the last batch'
    assert dict(zip(order, lengths)) == {i: min(20, MAX_LENGTH - len(prompt)) for i, prompt in enumerate(prompts)}


def test_rows_begin_with_the_begin_token_once():
    begin = ByteTokenizer().eos_id
    np.testing.assert_array_equal(tokens_of('ab'), [begin, 97, 98])
    np.testing.assert_array_equal(tokens_of(''), [begin])
    np.testing.assert_array_equal(with_begin(ByteTokenizer(), tokens_of('ab')), tokens_of('ab'))
    np.testing.assert_array_equal(tokens_of('a\ud800b'), [begin, *'a\ufffdb'.encode()])


class Marked(ByteTokenizer):
    """Bytes, one of which is a special token that texts leave out."""

    def __init__(self, special):
        self.special_ids = {'<|eot_id|>': special}

    def decode(self, ids):
        return super().decode([i for i in ids if i not in self.special_ids.values()])


def test_a_stop_string_that_is_a_special_token_stops(config, params, prompts, generator, monkeypatch):
    [whole] = generator.generate(prompts[1:2], max_tokens=12, stop_tokens=())
    stop = int(whole.tokens[5])
    monkeypatch.setattr(generator, 'tokenizer', Marked(stop))
    [completion] = generator.generate(prompts[1:2], max_tokens=12, stop_strings=['<|eot_id|>', 'never'])
    np.testing.assert_array_equal(completion.tokens, whole.tokens[: whole.tokens.tolist().index(stop)])
    assert completion.finish_reason == 'stop_token'
    with pytest.raises(InputError, match=r"stop_strings: 'a<\|eot_id\|>' joins the special token"):
        generator.generate(prompts[1:2], max_tokens=12, stop_strings=['a<|eot_id|>'])


def test_stop_tokens_end_a_completion(generator, prompts, completions):
    whole = completions[1].tokens
    stop = int(whole[5])
    [completion] = generator.generate(prompts[1:2], max_tokens=12, sampling=RANDOM, stop_tokens=(stop, 300), seeds=[1])
    np.testing.assert_array_equal(completion.tokens, whole[: list(whole).index(stop)])
    assert completion.finish_reason == 'stop_token'


def test_stop_strings_cut_the_text_exactly(generator, prompts):
    printable = dict(max_tokens=12, sampling=Sampling(1.0, top_k=1), stop_tokens=())
    [whole] = generator.generate(prompts[1:2], **printable)
    stop = whole.text[3:5]
    [completion] = generator.generate(prompts[1:2], stop_strings=[whole.text[7:9], stop, 'never'], **printable)
    assert completion.text == whole.text[: whole.text.find(stop)] and completion.finish_reason == 'stop_string'
    np.testing.assert_array_equal(completion.tokens, whole.tokens[: len(completion.tokens)])
    assert ByteTokenizer().decode(completion.tokens).startswith(completion.text)
    assert not ByteTokenizer().decode(completion.tokens[:-1]).startswith(completion.text) or not completion.text
    assert ''.join(generator.stream(prompts[1], stop_strings=[stop], **printable)) == completion.text


def test_max_length_ends_a_completion(generator, prompts):
    [completion] = generator.generate(prompts[1:2], max_tokens=100, stop_tokens=())
    assert len(completion.tokens) == MAX_LENGTH - len(prompts[1]) and completion.finish_reason == 'length'


def test_a_stream_joins_to_the_text(generator, prompts, completions):
    pieces = list(generator.stream(prompts[1], max_tokens=12, sampling=RANDOM, stop_tokens=(), seed=1))
    assert ''.join(pieces) == completions[1].text and len(pieces) > 1


@pytest.mark.parametrize('length', [1, 31, 32, 33, 100, 128, 129, 1000, 4096, 4097])
def test_lengths_are_padded_to_few_sizes(length):
    assert length <= padded_length(length) <= max(48, 1.5 * length)
    assert padded_length(padded_length(length)) == padded_length(length) and padded_length(length) % 16 == 0
    assert len({padded_length(i) for i in range(1, length + 1)}) <= max(1, 2 * (length.bit_length() - 5) + 1)


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
    with pytest.raises(DataError, match='the tokenizer has 257 ids, more than model.vocab_size=256; give the tok'):
        Generator(params, config, ByteTokenizer())
    with pytest.raises(InputError, match='batch=0'):
        Generator(params, config, batch=0)


# ---- the command -----------------------------------------------------------


@pytest.fixture(scope='module')
def workdir(config, params, tmp_path_factory):
    path = tmp_path_factory.mktemp('run')
    run_directory.open_workdir(path, config)
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
    [expected] = generator.generate([tokens_of('To be')], max_tokens=9, sampling=RANDOM, seeds=5)
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
    expected = generator.generate([tokens_of('To be'), tokens_of('or not')], max_tokens=9, sampling=RANDOM)
    assert written == [
        {'prompt': 'To be', 'id': 1, 'completion': expected[0].text, 'finish_reason': 'length'},
        {'prompt': 'or not', 'completion': expected[1].text, 'finish_reason': 'length'},
    ]
    # It is not written over:
    code, _, err = call(capsys, f'--workdir={workdir}', '--prompt=a', f'--output={tmp_path / "out.jsonl"}')
    assert code == 2 and 'exists' in err and err.count('\n') == 1


def test_samples_of_the_same_prompt_differ_and_are_written_in_order(workdir, generator, tmp_path, capsys):
    (tmp_path / 'in.jsonl').write_text('{"prompt": "a"}\n{"prompt": "longer \\ud800", "note": "\\ud800"}\n')
    code, out, err = call(
        capsys,
        f'--workdir={workdir}',
        f'--prompts={tmp_path / "in.jsonl"}',
        f'--output={tmp_path / "out.jsonl"}',
        '--max_tokens=9',
        '--num_samples=3',
        '--seed=4',
        '--batch=4',
        '--temperature=1',
    )
    assert (code, err) == (0, '') and out.startswith('6 completions')
    written = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    assert [(line['prompt'], line['sample']) for line in written] == [
        (prompt, sample) for prompt in ('a', 'longer \ufffd') for sample in range(3)
    ]
    assert len({line['completion'] for line in written}) == 6 and written[3]['note'] == '\ud800'
    [expected] = generator.generate([tokens_of('a')], max_tokens=9, sampling=RANDOM, seeds=[fold_seed(4, 0, 2)])
    assert written[2]['completion'] == expected.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in.jsonl', 'out.jsonl']


def test_an_error_loses_no_completion_that_had_ended(workdir, monkeypatch, tmp_path, capsys):
    of_generator = Generator.completions

    def failing(self, prompts, **settings):
        yield from itertools.islice(of_generator(self, prompts, **settings), 1)
        raise OSError('the power is gone')

    monkeypatch.setattr(Generator, 'completions', failing)
    (tmp_path / 'in').write_text('a\nb\n')
    code, _, err = call(
        capsys, f'--workdir={workdir}', f'--prompts={tmp_path / "in"}', f'--output={tmp_path / "out"}', '--max_tokens=9'
    )
    assert code == 2 and 'the power is gone' in err
    [line] = (tmp_path / 'out').read_text().splitlines()
    assert json.loads(line)['prompt'] == 'a'


def test_an_empty_prompt_begins_a_document(workdir, generator, capsys):
    code, out, err = call(capsys, f'--workdir={workdir}', '--prompt=', '--max_tokens=9', '--temperature=0')
    [expected] = generator.generate([np.array([ByteTokenizer().eos_id])], max_tokens=9)
    assert (code, err, out) == (0, '', expected.text + '\n')


def test_a_conversation_goes_on_after_ctrl_c_and_mistakes(workdir, monkeypatch, capsys):
    def pieces(self, request, sampling):
        yield f'<{len(request.prompt)}'
        if request.prompt[1] == ord('!'):
            raise KeyboardInterrupt
        yield '>'

    monkeypatch.setattr(Generator, '_pieces', pieces)
    monkeypatch.setattr('sys.stdin', io.StringIO('! stop\n\n' + 'x' * MAX_LENGTH + '\nTo be\n'))
    code, out, err = call(capsys, f'--workdir={workdir}', '--interactive', '--max_tokens=9')
    assert code == 0 and out == '! stop<7 [stopped]\nTo be<6>\n'
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
        assert (code, out, err) == (0, f'{text}<6>\n', '')  # the begin token and five bytes


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--prompt=a', '--workdir=/nowhere'], 'does not exist'),
        (['--prompt=' + 'x' * (MAX_LENGTH - 1)], '32 tokens; at most 31'),
        (['--prompt=a', '--num_samples=0'], '--num_samples=0'),
        (['--prompt=a', '--seed=-1'], 'seed=-1'),
        (['--prompt=a', '--step=5'], 'no checkpoint of step 5'),
        (['--prompt=a', '--tokenizer=/nowhere.json'], 'tokenizer /nowhere.json'),
        (['--prompt=a', '--temperature=-1'], 'temperature=-1.0 must be'),
        (['--prompt=a', '--max_tokens=0'], '--max_tokens=0 must be at least 1'),
        (['--prompt=a', '--stop='], '--stop is empty'),
        (['--prompt=a', '--config.data.path=/nowhere'], '(--config.data.path)'),
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
        ('{"prompt": 3}\n', 'line 1'),
        ('[' * 100_000, 'line 1'),
        (b'{"prompt": "\xff"}\n', 'is not UTF-8 (byte 12)'),
    ],
)
def test_wrong_files_of_prompts_are_named(workdir, tmp_path, capsys, lines, message):
    (tmp_path / 'in.jsonl').write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    code, _, err = call(capsys, f'--workdir={workdir}', f'--prompts={tmp_path / "in.jsonl"}')
    assert code == 2 and err.count('\n') == 1 and message in err
