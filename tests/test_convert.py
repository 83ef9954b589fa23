"""Weights in the published format: there and back, values, names, shapes, refusals, and what a run makes of them.

The published mathematics is written out here once more, in float64 and token by
token; it is itself checked against outputs of the published code.
"""

import json
import shutil
import weakref

import golden
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import train_fixtures
from data_fixtures import train_tokenizer
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small import small_config

from transxssm_jax import config as config_lib
from transxssm_jax import convert
from transxssm_jax.model.parameters import split_model
from transxssm_jax.parallel import mesh
from transxssm_jax.pytorch import arrays, conversion, files
from transxssm_jax.pytorch import fields as fields_lib
from transxssm_jax.pytorch import tensors as tensors_lib
from transxssm_jax.training import checkpoint, lease, optimizer, run_directory
from transxssm_jax.training.step import abstract_state

FIELDS = {
    'model_type': 'TransXSSM',
    'vocab_size': 264,
    'hidden_size': 64,
    'intermediate_size': 48,
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'attn_layer_period': 2,
    'attn_layer_offset': 1,
    'hidden_bias': False,
    'rope_scaling': None,
    'rope_theta': 500.0,
    'max_position_embeddings': 32,
    'hidden_act': 'silu',
    'rms_norm_eps': 1e-5,
}
VARIANTS = {
    'grouped': {},
    'biases, untied, dynamic': {
        'hidden_bias': True,
        'tie_word_embeddings': False,
        'rope_scaling': {'rope_type': 'dynamic', 'factor': 4.0, 'original_max_position_embeddings': 32},
    },
    'linear, attention first': {'attn_layer_offset': 0, 'rope_scaling': {'type': 'linear', 'factor': 3.0}},
}


def shapes(fields):
    """Name -> shape of every tensor that the published code has for a config."""
    D, F, H = fields['hidden_size'], fields['intermediate_size'], fields['num_attention_heads']
    kv = D // H * fields['num_key_value_heads']
    found = {'model.word_embed.weight': (fields['vocab_size'], D), 'model.final_layernorm.weight': (D,)}
    if not fields.get('tie_word_embeddings', True):
        found['lm_head.weight'] = (fields['vocab_size'], D)
    for i in range(fields['num_hidden_layers']):
        layer = f'model.layers.{i}.'
        for name in ('pre_sequence_layernorm', 'post_sequence_residual', 'pre_state_layernorm', 'post_state_residual'):
            found[f'{layer}{name}.weight'] = (D,)
        linear = {'feed_forward.gate_proj': (F, D), 'feed_forward.up_proj': (F, D), 'feed_forward.down_proj': (D, F)}
        if i % fields['attn_layer_period'] == fields['attn_layer_offset']:
            linear |= {'attn.q_proj': (D, D), 'attn.k_proj': (kv, D), 'attn.v_proj': (kv, D), 'attn.o_proj': (D, D)}
        else:
            linear |= {f'ssd.{name}': (D, D) for name in ('x_proj', 'b_proj', 'c_proj', 'out_proj')}
            linear['ssd.dt_proj'] = (H, D)
            found[f'{layer}ssd.A'] = (H,)
        for name, shape in linear.items():
            found[f'{layer}{name}.weight'] = shape
            if fields['hidden_bias']:
                found[f'{layer}{name}.bias'] = shape[:1]
    return found


def write(directory, dtype=np.float32, files=1, seed=0, changes=(), **fields):
    """A published checkpoint of random values; changes: name -> array, or '' to leave the tensor out."""
    directory.mkdir(exist_ok=True)
    fields = FIELDS | fields
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(fields).items():
        values = 0.12 * rng.standard_normal(shape)
        if name.endswith('.A'):
            values = -rng.uniform(0.1, 16, shape)
        elif len(shape) == 1 and 'bias' not in name:
            values += 1
        tensors[name] = values.astype(dtype)
    tensors = {name: value for name, value in (tensors | dict(changes)).items() if isinstance(value, np.ndarray)}
    (directory / 'config.json').write_text(json.dumps(fields))
    if files == 1:
        save_file(tensors, directory / 'model.safetensors', {'format': 'pt'})
        return tensors
    weight_map = {
        name: f'model-{1 + i % files:05d}-of-{files:05d}.safetensors' for i, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file, {'format': 'pt'}
        )
    (directory / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
    return tensors


def published_logits(fields, tensors, ids_L):
    """float64 logits [L, V] of one row by the published formulas."""
    fields = FIELDS | fields
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
    H, G = fields['num_attention_heads'], fields['num_key_value_heads']
    L, K = len(ids_L), fields['hidden_size'] // H
    theta, stretch, scaling = fields['rope_theta'], 1.0, fields['rope_scaling'] or {}
    if scaling.get('type') == 'linear':
        stretch = scaling['factor']
    elif scaling:
        length, base = max(L, fields['max_position_embeddings']), fields['max_position_embeddings']
        theta *= (scaling['factor'] * length / base - (scaling['factor'] - 1)) ** (K / (K - 2))
    angle = np.arange(L)[:, None] / stretch * theta ** -(np.arange(0, K, 2) / K)
    cos, sin = (np.concatenate([f(angle)] * 2, axis=-1)[:, None] for f in (np.cos, np.sin))

    def rotate(x_LHK):
        first, second = np.split(x_LHK, 2, axis=-1)
        return x_LHK * cos + np.concatenate([-second, first], axis=-1) * sin

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + fields['rms_norm_eps']) * tensors[name]

    x = tensors['model.word_embed.weight'][ids_L]
    for i in range(fields['num_hidden_layers']):
        layer = f'model.layers.{i}.'

        def linear(u, name, layer=layer):
            bias = tensors[f'{layer}{name}.bias'] if fields['hidden_bias'] else 0
            return u @ tensors[f'{layer}{name}.weight'].T + bias

        u = norm(x, layer + 'pre_sequence_layernorm.weight')
        if i % fields['attn_layer_period'] == fields['attn_layer_offset']:
            q, k, v = (linear(u, f'attn.{name}_proj').reshape(L, -1, K) for name in 'qkv')
            k, v = (np.repeat(part, H // G, axis=1) for part in (rotate(k), v))
            scores = np.einsum('lhk,mhk->hlm', rotate(q), k) / np.sqrt(K)
            scores = np.where(np.tril(np.ones((L, L), bool)), scores, -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            y = np.einsum('hlm,mhk->lhk', scores / scores.sum(-1, keepdims=True), v)
            y = linear(y.reshape(L, -1), 'attn.o_proj')
        else:
            c, b, v = (linear(u, f'ssd.{name}_proj').reshape(L, H, K) for name in 'cbx')
            dt = np.logaddexp(0, linear(u, 'ssd.dt_proj'))
            c, b, state, y = rotate(c), rotate(b), np.zeros((H, K, K)), np.empty((L, H, K))
            for t in range(L):
                state = np.exp(dt[t] * tensors[layer + 'ssd.A'])[:, None, None] * state
                state = state + np.einsum('h,hp,hn->hpn', dt[t], v[t], b[t])
                y[t] = np.einsum('hpn,hn->hp', state, c[t])
            y = linear(y.reshape(L, -1), 'ssd.out_proj')
        x = tensors[layer + 'post_sequence_residual.weight'] * x + y
        u = norm(x, layer + 'pre_state_layernorm.weight')
        gate = linear(u, 'feed_forward.gate_proj')
        y = linear(gate / (1 + np.exp(-gate)) * linear(u, 'feed_forward.up_proj'), 'feed_forward.down_proj')
        x = tensors[layer + 'post_state_residual.weight'] * x + y
    head = 'model.word_embed.weight' if fields.get('tie_word_embeddings', True) else 'lm_head.weight'
    return norm(x, 'model.final_layernorm.weight') @ tensors[head].T


def our_logits(params, config, ids_BL):
    model = nnx.merge(split_model(config.model)[0], params)
    return jax.jit(lambda ids_BL: model.logits(ids_BL))(ids_BL)


def random_params(config):
    """Parameters of a model of ours, none of them at its initial value."""
    rng = np.random.default_rng(0)
    return nnx.traversals.unflatten_mapping(
        {
            path: np.float32(path[-1] in ('scale', 'weight')) + 0.12 * rng.standard_normal(shape, np.float32)
            for path, shape in tensors_lib.shapes_of(config.model).items()
        }
    )


def save_run(workdir, config, params):
    """A workdir with a checkpoint of params[step] for each step."""
    run_directory.open_workdir(workdir, config)
    checkpoints = checkpoint.Checkpoints(workdir, config)
    for step, values in params.items():
        checkpoints.save(step, {'step': np.int32(step), 'params': values, 'opt_state': {'m': np.zeros(1)}}, {})
    checkpoints.close()


def run(*argv):
    return convert.main([*map(str, argv)])


def publish(*argv):
    """An export in the published format."""
    return run('export', '--layout=published', *argv)


def same_bytes(tensors, others):
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert value.dtype == others[name].dtype and value.shape == others[name].shape, name
        assert value.tobytes() == others[name].tobytes(), name


@pytest.mark.skipif(not golden.DIRECTORY.exists(), reason=f'{golden.DIRECTORY} is absent')
def test_the_formulas_here_are_those_of_the_published_code():
    fields = json.loads((golden.DIRECTORY / 'config.json').read_text())
    expected = np.load(golden.DIRECTORY / 'expected.npz')
    logits = published_logits(fields, load_file(golden.DIRECTORY / 'model.safetensors'), expected['input_ids'][0])
    np.testing.assert_allclose(logits, expected['logits'][0], atol=1e-4)


@pytest.mark.parametrize('name', VARIANTS)
def test_logits(tmp_path, name):
    tensors = write(tmp_path / 'published', **VARIANTS[name])
    ids_L = np.random.default_rng(1).integers(0, FIELDS['vocab_size'], 48)  # beyond max_position_embeddings
    params, config = conversion.load_pytorch(tmp_path / 'published')
    np.testing.assert_allclose(
        our_logits(params, config, ids_L[None])[0], published_logits(VARIANTS[name], tensors, ids_L), atol=1e-4
    )


@pytest.mark.parametrize('name', VARIANTS)
def test_import_then_export_gives_the_same_bytes(tmp_path, name, capsys):
    tensors = write(tmp_path / 'published', files=3, num_attention_heads=4, seed=5, **VARIANTS[name])
    assert run('import', f'--source={tmp_path / "published"}', f'--workdir={tmp_path / "run"}') == 0
    assert publish(f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "single"}') == 0
    same_bytes(tensors, load_file(tmp_path / 'single' / 'model.safetensors'))
    assert publish(f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "sharded"}', '--max_shard_size=50KB') == 0
    index = json.loads((tmp_path / 'sharded' / 'model.safetensors.index.json').read_text())
    paths = sorted((tmp_path / 'sharded').glob('*.safetensors'))
    assert len(paths) > 3 and {path.name for path in paths} == set(index['weight_map'].values())
    read = {}
    for path in paths:
        content = load_file(path)
        assert all(index['weight_map'][name] == path.name for name in content)
        assert len(content) == 1 or sum(value.nbytes for value in content.values()) <= 50_000
        read |= content
        with safe_open(path, 'numpy') as handle:
            assert handle.metadata() == {'format': 'pt'}
    same_bytes(tensors, read)
    assert index['metadata']['total_size'] == sum(value.nbytes for value in tensors.values())
    before, after = (files.PytorchCheckpoint(tmp_path / name) for name in ('published', 'sharded'))
    assert before.config.model == after.config.model
    assert {field: after.fields[field] for field in before.fields} | {'rope_scaling': 0} == before.fields | {
        'rope_scaling': 0
    }


def test_not_every_decay_rate_is_an_exponential():
    """Why an import keeps A beside the checkpoint: without it some would come back changed."""
    a = -np.random.default_rng(0).uniform(1, 16, 1000).astype(np.float32)
    assert (-np.exp(np.log(-a.astype(np.float64)).astype(np.float32).astype(np.float64)).astype(np.float32) != a).any()


def test_a_bfloat16_checkpoint_comes_back_as_it_was(tmp_path):
    tensors = write(tmp_path / 'published', dtype=ml_dtypes.bfloat16, torch_dtype='bfloat16')
    conversion.import_pytorch(tmp_path / 'published', tmp_path / 'run')
    conversion.export_pytorch(tmp_path / 'run', tmp_path / 'out', dtype='bfloat16')
    same_bytes(tensors, load_file(tmp_path / 'out' / 'model.safetensors'))
    fields = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert (
        fields['torch_dtype'] == 'bfloat16'
        and files.PytorchCheckpoint(tmp_path / 'out').config.model.dtype == 'bfloat16'
    )
    conversion.export_pytorch(tmp_path / 'run', tmp_path / 'wide')
    same_bytes(
        {name: value.astype(np.float32) for name, value in tensors.items()},
        load_file(tmp_path / 'wide' / 'model.safetensors'),
    )


def test_an_imported_run_holds_what_is_loaded(tmp_path):
    write(tmp_path / 'published', files=2, hidden_dropout=0.1, something='else')
    source = conversion.import_pytorch(tmp_path / 'published', tmp_path / 'run', overrides={'model.remat': 'none'})
    assert source.unused == ['hidden_dropout=0.1', 'something="else"']
    params, config = conversion.load_pytorch(tmp_path / 'published')
    restored, saved = checkpoint.load_trained(tmp_path / 'run')
    assert config_lib.differences(saved, config) == {'model.remat': ('none', 'auto')}
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), restored, params))


def test_a_model_trained_here_computes_the_same_after_export_and_import(tmp_path):
    """With groups of B and C, of K and V, and a dt bias, which the published format spells out."""
    config = small_config(data_seq_len=32)
    params = random_params(config)
    save_run(tmp_path / 'run', config, {3: jax.tree.map(lambda leaf: 2 * leaf, params), 7: params})
    notes = conversion.export_pytorch(tmp_path / 'run', tmp_path / 'out')
    assert notes == [
        'B and C of 2 groups are repeated for each of 4 heads',
        'the dt bias is dt_proj.bias; hidden_bias gives every other map a bias of 0',
    ]
    read, loaded = conversion.load_pytorch(tmp_path / 'out')
    ids_BL = np.random.default_rng(1).integers(0, config.model.vocab_size, (2, 32))
    np.testing.assert_allclose(our_logits(read, loaded, ids_BL), our_logits(params, config, ids_BL), atol=1e-4)
    fields = json.loads((tmp_path / 'out' / 'config.json').read_text())
    tensors = load_file(tmp_path / 'out' / 'model.safetensors')
    np.testing.assert_allclose(
        our_logits(params, config, ids_BL)[0], published_logits(fields, tensors, ids_BL[0]), atol=1e-4
    )
    conversion.export_pytorch(tmp_path / 'run', tmp_path / 'earlier', step=3)
    earlier = load_file(tmp_path / 'earlier' / 'model.safetensors')
    assert np.array_equal(earlier['model.word_embed.weight'], 2 * tensors['model.word_embed.weight'])


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    return train_fixtures.prepare_bytes(tmp_path_factory.mktemp('data'))


def test_training_goes_on_from_imported_weights(tmp_path, prepared):
    write(tmp_path / 'published', num_hidden_layers=2)
    workdir = tmp_path / 'run'
    settings = {
        'data.path': prepared,
        'data.seq_len': 32,
        'data.global_batch': 8,
        'train.steps': 2,
        'model.remat': 'none',
        'optimizer.warmup_steps': 0,
        'optimizer.learning_rate': 0.01,
        'train.tensorboard': False,
        'train.progress': False,
        'train.eval_every_steps': 0,
        'optimizer.schedule': 'constant',
    }
    assert (
        run(
            'import',
            f'--source={tmp_path / "published"}',
            f'--workdir={workdir}',
            *(f'--config.{name}={value}' for name, value in settings.items()),
        )
        == 0
    )
    start, _ = checkpoint.load_trained(workdir)
    result = train_fixtures.call(['train', f'--config={workdir / "config.py"}', f'--workdir={workdir}'])
    assert result.code == 0, result.err
    assert train_fixtures.checkpoint_steps(workdir) == [0, 2]
    end, config = checkpoint.load_trained(workdir)
    # Two steps of Adam at 0.01 from moments of 0 move a weight by 0.02 at most, so they began at the imported ones.
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start, end)
    assert all(0 < move < 0.021 for move in jax.tree.leaves(moved)), moved
    conversion.export_pytorch(workdir, tmp_path / 'out')
    trained = load_file(tmp_path / 'out' / 'model.safetensors')
    np.testing.assert_allclose(
        trained['model.layers.0.ssd.A'], -np.exp(end['layers']['ssd']['mixer']['a_log'][0, 0]), rtol=1e-6
    )
    np.testing.assert_array_equal(trained['model.word_embed.weight'], end['embedding'])


def test_tokenizer_files(tmp_path, capsys):
    write(tmp_path / 'published', vocab_size=512)
    train_tokenizer(tmp_path / 'tokenizer.json', ['<|endoftext|>'])
    shutil.copy(tmp_path / 'tokenizer.json', tmp_path / 'published')
    (tmp_path / 'published' / 'tokenizer_config.json').write_text(
        '{"eos_token": "<|endoftext|>", "chat_template": "x"}'
    )
    workdir = tmp_path / 'run'
    assert run('import', f'--source={tmp_path / "published"}', f'--workdir={workdir}') == 0
    _, config = checkpoint.load_trained(workdir)
    assert config.data.path == str(workdir / 'tokenizer.json')
    assert 'data.path' not in (workdir / 'config.py').read_text()
    assert (
        publish(
            f'--workdir={workdir}',
            f'--output={tmp_path / "out"}',
            f'--tokenizer={workdir / "tokenizer.json"}',
        )
        == 0
    )
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        assert (tmp_path / 'out' / name).read_bytes() == (tmp_path / 'published' / name).read_bytes()
    assert (
        publish(
            f'--workdir={workdir}',
            f'--output={tmp_path / "made"}',
            f'--tokenizer={tmp_path / "tokenizer.json"}',
        )
        == 0
    )
    made = json.loads((tmp_path / 'made' / 'tokenizer_config.json').read_text())
    assert made['eos_token'] == '<|endoftext|>' and made['tokenizer_class'] == 'PreTrainedTokenizerFast'
    assert json.loads((tmp_path / 'made' / 'config.json').read_text())['eos_token_id'] == 0
    assert (
        run('import', f'--source={tmp_path / "published"}', f'--workdir={tmp_path / "bytes"}', '--tokenizer=byte') == 0
    )
    assert checkpoint.load_trained(tmp_path / 'bytes')[1].data.path == 'byte'
    capsys.readouterr()
    write(tmp_path / 'small', vocab_size=264)
    assert (
        run(
            'import',
            f'--source={tmp_path / "small"}',
            f'--workdir={tmp_path / "no"}',
            f'--tokenizer={tmp_path / "tokenizer.json"}',
        )
        == 2
    )
    assert 'has 400 ids, more than model.vocab_size=264' in capsys.readouterr().err
    assert not (tmp_path / 'no').exists()


A, GATE = 'model.layers.0.ssd.A', 'model.layers.1.feed_forward.gate_proj.weight'
REFUSED = {
    'missing tensor': (dict(changes={GATE: ''}), f'lacks tensor {GATE}'),
    'missing tensors': (dict(changes={GATE: '', A: ''}), f'lacks tensor {A} (and 1 more)'),
    'unexpected tensor': (
        dict(changes={'model.layers.1.attn.q_norm.weight': np.ones(4, np.float32)}),
        'unexpected tensor model.layers.1.attn.q_norm.weight',
    ),
    'shape': (
        dict(changes={GATE: np.ones((48, 63), np.float32)}),
        f'{GATE} has shape [48, 63], its config.json calls for [48, 64]',
    ),
    'integers': (dict(changes={GATE: np.ones((48, 64), np.int32)}), f'{GATE} is of type I32'),
    'growing state': (
        dict(changes={A: np.ones(4, np.float32), 'model.layers.2.ssd.A': np.array([-1, -1, 0, -1], np.float32)}),
        'A >= 0 in layers 0 (to 1), 2 (to 0)',
    ),
    'A is no number': (dict(changes={A: np.full(4, np.nan, np.float32)}), 'layers 0 (to nan)'),
    'tied head that differs': (
        dict(changes={'lm_head.weight': np.ones((264, 64), np.float32)}),
        'lm_head.weight differs from model.word_embed.weight',
    ),
    'another model': (dict(model_type='gpt2'), 'model_type="gpt2" is another model'),
    'a number for a model': (dict(model_type=3), 'model_type=3 is another model'),
    'absurd depth': (dict(num_hidden_layers=2**63), 'model.num_layers=9223372036854775808 must be at most 4096'),
    'absurd period': (dict(num_hidden_layers=10**10, attn_layer_period=10**10), 'must be at most 4096'),
    'a list for a kind': (dict(rope_scaling={'type': ['linear']}), 'rope_scaling.rope_type=["linear"] is not computed'),
    'activation': (dict(hidden_act='gelu'), 'hidden_act="gelu" is not computed here'),
    'scaling': (
        dict(rope_scaling={'rope_type': 'yarn', 'factor': 2.0}),
        'rope_scaling.rope_type="yarn" is not computed here',
    ),
    'scaling without factor': (dict(rope_scaling={'rope_type': 'dynamic'}), "rope_scaling lacks 'factor'"),
    'head width': (dict(head_dim=32), 'head_dim=32 is not computed here; it must be 16'),
    'partial rotation': (dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
    'layers': (dict(num_hidden_layers=5), 'num_hidden_layers=5 must be a multiple of attn_layer_period=2'),
    'layers beyond any machine': (
        dict(num_hidden_layers=2**63, attn_layer_period=2**62, attn_layer_offset=0),
        'model.num_layers=9223372036854775808 must be at most 4096',
    ),
    'a number of layers that is none': (dict(num_hidden_layers='4'), 'num_hidden_layers="4" must be a whole number'),
    'period': (dict(attn_layer_period=0), 'attn_layer_period=0 must be at least 1'),
    'type of model': (dict(model_type=['llama']), 'model_type=["llama"] is another model'),
    'scaling of no kind': (dict(rope_scaling={'type': [1]}), 'rope_scaling.rope_type=[1] is not computed here'),
    'type': (dict(hidden_size='64'), "model.d_model='64' must be int"),
    'heads': (dict(num_key_value_heads=3), 'model.num_heads=4 must be divisible by model.num_kv_heads=3'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(tmp_path, name, capsys):
    changes, message = REFUSED[name]
    changes = dict(changes)
    files = {key: changes.pop(key) for key in ('changes',) if key in changes}
    write(tmp_path / 'published', **files)
    (tmp_path / 'published' / 'config.json').write_text(json.dumps(FIELDS | changes))
    assert run('import', f'--source={tmp_path / "published"}', f'--workdir={tmp_path / "run"}') == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / 'run').exists()


def test_files_that_are_not_there_or_broken_are_refused(tmp_path, capsys):
    def refused(message, *argv):
        assert run(*argv) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error

    source, workdir = tmp_path / 'published', tmp_path / 'run'
    imports = ('import', f'--source={source}', f'--workdir={workdir}')
    refused('config.json: No such file or directory', *imports)
    write(source, files=2)
    refused('unknown flag --sauce; did you mean --source?', *imports, '--sauce=1')
    refused('unknown setting data.seqlen; did you mean data.seq_len?', *imports, '--config.data.seqlen=4')
    refused('--config.model.*: sizes and kinds of layers are those of the weights', *imports, '--config.model.d_mlp=32')
    refused('tokenizer no.json: No such file', *imports, '--tokenizer=no.json')
    file = source / 'model-00002-of-00002.safetensors'
    content = file.read_bytes()
    file.write_bytes(content[:100])
    refused('cannot be read', *imports)
    file.unlink()
    refused(f'{file}: no such file', *imports)
    file.write_bytes(content)
    index = source / 'model.safetensors.index.json'
    listed = index.read_text()
    index.write_text('{"weight_map": {"model.word_embed.weight": 3}}')
    refused('must hold a weight_map of names of files', *imports)
    index.write_text(listed.replace('model.word_embed.weight', 'model.word_embed.wait'))
    refused('lacks tensor model.word_embed.wait, which model.safetensors.index.json lists in it', *imports)
    (source / 'config.json').write_text('{')
    refused('is not JSON', *imports)
    assert not workdir.exists()
    shutil.rmtree(source)
    write(source)
    refused('does not exist', 'export', '--layout=published', f'--workdir={workdir}', f'--output={tmp_path / "out"}')
    assert run(*imports) == 0
    refused('holds checkpoints already', *imports)
    export = ('export', f'--workdir={workdir}', '--layout=published', f'--output={tmp_path / "out"}')
    refused('has no checkpoint of step 5; it has 0', *export, '--step=5')
    refused('--max_shard_size=much', *export, '--max_shard_size=much')
    refused('byte tokenizer', *export, '--tokenizer=byte')
    refused("model.rope_scaling='length' has no place", *export, '--config.model.rope_scaling=length')
    assert not (tmp_path / 'out').exists()
    assert run(*export) == 0
    refused('holds weights already', *export)
    for path in (workdir / 'checkpoints' / '0' / 'params').rglob('*'):
        if path.is_file() and path.parent.name == 'd':
            path.write_bytes(b'')
    refused('can be read', *export[:3], f'--output={tmp_path / "damaged"}')
    assert not (tmp_path / 'damaged').exists()


def test_rope_settings_as_transformers_5_writes_them():
    fields = {name: value for name, value in FIELDS.items() if not name.startswith('rope')}
    rope = {'rope_theta': 123.0, 'rope_type': 'dynamic', 'factor': 2.0, 'original_max_position_embeddings': 16}
    model, unused = fields_lib.model_of(fields | {'rope_parameters': rope}, 'config.json')
    assert (model.rope_theta, model.rope_scaling, model.rope_factor, model.rope_original_length) == (
        123.0,
        'dynamic',
        2.0,
        32,
    )
    assert len(unused) == 1 and 'original_max_position_embeddings=16 (the published code' in unused[0]
    config = config_lib.Config(model=model, data=config_lib.Data(seq_len=64))
    written = fields_lib.fields_of(config, fields | {'rope_parameters': rope, 'dtype': 'float16'}, 'float32')
    assert fields_lib.model_of(written, 'config.json') == (model, [])
    # Without either setting the published code has its default.
    model, _ = fields_lib.model_of(fields, 'config.json')
    assert (model.rope_scaling, model.rope_factor, model.rope_theta) == ('dynamic', 4.0, 10000.0)


def test_a_state_wider_than_a_head_is_not_exported():
    model = small_config(model_d_state=32).model
    with pytest.raises(
        fields_lib.ConvertError, match=r'model.d_state=32 has no place .*/model.num_heads=16 can be exported'
    ):
        fields_lib.pytorch_model(model)


def test_a_failed_write_is_reported_in_one_line_and_leaves_no_checkpoint(tmp_path, monkeypatch, capsys):
    write(tmp_path / 'published')

    def full(*args):
        raise RuntimeError('RESOURCE_EXHAUSTED: No space left on device\nmore')

    monkeypatch.setattr(files.PytorchCheckpoint, 'layers', full)
    arguments = ('import', f'--source={tmp_path / "published"}', f'--workdir={tmp_path / "run"}')
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert 'could not be written' in error and 'No space left on device; run the same command again' in error
    assert len(error.splitlines()) == 1
    monkeypatch.undo()
    assert run(*arguments) == 0, 'the same command goes through once there is space'


def test_layers_of_one_kind_only(tmp_path):
    for name, offset, kinds in (('ssd', 7, ('ssd',)), ('attention', 0, ('attention',))):
        fields = dict(attn_layer_period=8 if offset else 1, attn_layer_offset=offset, num_hidden_layers=3)
        tensors = write(tmp_path / name, **fields)
        conversion.import_pytorch(tmp_path / name, tmp_path / f'{name} run')
        assert checkpoint.load_trained(tmp_path / f'{name} run')[1].model.layer_pattern == kinds
        conversion.export_pytorch(tmp_path / f'{name} run', tmp_path / f'{name} out')
        same_bytes(tensors, load_file(tmp_path / f'{name} out' / 'model.safetensors'))
        assert files.PytorchCheckpoint(tmp_path / f'{name} out').config.model.layer_pattern == kinds


def test_what_fails_while_it_is_written_leaves_no_file(tmp_path):
    tensors = list(tensors_lib.tensors_of(small_config(model_use_dt_bias=False).model).values())
    with pytest.raises(ZeroDivisionError), files.Writer(tmp_path, tensors, 10**6, 'float32', 'float32') as writer:
        writer.write(tensors[0], np.zeros(tensors[0].shape, np.float32))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_an_import_and_an_export_hold_one_tensor_or_array_at_a_time(tmp_path, monkeypatch):
    """What was read is gone when the next is: the memory of a conversion does not grow with the model."""
    alive, most = weakref.WeakValueDictionary(), {'import': 0, 'export': 0}

    def watch(name, array):
        most[name] = max(most[name], 1 + len(alive))
        alive[id(array)] = array
        return array

    def layers(*args, original=files.PytorchCheckpoint.layers):
        for index, layer in original(*args):
            yield index, watch('import', layer)
            del layer

    def read(*args, original=conversion.read_array):
        return watch('export', original(*args))

    write(tmp_path / 'published', files=2)
    monkeypatch.setattr(files.PytorchCheckpoint, 'layers', layers)
    monkeypatch.setattr(conversion, 'read_array', read)
    conversion.import_pytorch(tmp_path / 'published', tmp_path / 'run')
    assert not alive
    conversion.export_pytorch(tmp_path / 'run', tmp_path / 'out')
    # The one in hand is held until the next is there.
    assert most == {'import': 2, 'export': 2}


# ---- an export of ours comes back as it was --------------------------------

TRAINED = {
    'groups and a dt bias, bfloat16': dict(model_dtype='bfloat16', model_remat='dots'),
    'one group, untied, dynamic': dict(
        model_num_ssd_groups=1,
        model_tie_embeddings=False,
        model_rope_scaling='dynamic',
        model_rope_original_length=24,
        model_use_dt_bias=False,
    ),
    'biases everywhere': dict(model_use_bias=True, model_use_dt_bias=False, model_num_ssd_groups=4),
    'attention only': dict(model_attention_period=1, model_attention_offset=0, model_num_kv_heads=1),
    'attention by pattern': dict(model_pattern='attention'),
    'a pattern': dict(model_pattern='ssd,attention,2xssd'),
}


@pytest.mark.parametrize('name, dtype', [*((name, 'float32') for name in TRAINED), (list(TRAINED)[0], 'bfloat16')])
def test_export_then_import_gives_the_same_config_parameters_and_logits(tmp_path, name, dtype):
    config = small_config(**TRAINED[name], optimizer_b2=0.95, train_seed=3)
    params = random_params(config)
    if dtype == 'bfloat16':
        params = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    save_run(tmp_path / 'run', config, {5: params})
    conversion.export_pytorch(tmp_path / 'run', tmp_path / 'out', dtype=dtype)
    source = conversion.import_pytorch(tmp_path / 'out', tmp_path / 'again')
    assert source.unused == []
    read, loaded = checkpoint.load_trained(tmp_path / 'again')
    assert config_lib.differences(loaded, config) == {}
    assert jax.tree.structure(read) == jax.tree.structure(params)
    for path, leaf in nnx.traversals.flatten_mapping(read).items():
        expected = nnx.traversals.flatten_mapping(params)[path]
        if path[-1] == 'a_log':  # the file holds A, in float32 or bfloat16
            np.testing.assert_allclose(np.exp(leaf), np.exp(expected), rtol=2**-8 if dtype == 'bfloat16' else 1e-6)
        else:
            np.testing.assert_array_equal(leaf, expected, err_msg='/'.join(path))
    if dtype == 'float32':
        ids_BL = np.random.default_rng(1).integers(0, config.model.vocab_size, (2, 48))
        wide = config_lib.replace(config, {'model.dtype': 'float32'})
        np.testing.assert_allclose(our_logits(read, wide, ids_BL), our_logits(params, wide, ids_BL), atol=1e-5)
        conversion.export_pytorch(tmp_path / 'again', tmp_path / 'out again')
        same_bytes(*(load_file(tmp_path / out / 'model.safetensors') for out in ('out', 'out again')))
        assert (tmp_path / 'out' / 'config.json').read_text() == (tmp_path / 'out again' / 'config.json').read_text()


@pytest.mark.parametrize('name', ['[' * 20_000, 'a\0b', '\ud800', '', '../x'])
def test_an_index_that_lists_an_impossible_file_is_refused(tmp_path, name):
    write(tmp_path / 'published', files=2)
    path = tmp_path / 'published' / 'model.safetensors.index.json'
    listed = json.loads(path.read_text())['weight_map']
    path.write_text(json.dumps({'weight_map': listed | {next(iter(listed)): name}}))
    with pytest.raises(fields_lib.ConvertError, match='no such file') as error:
        files.PytorchCheckpoint(tmp_path / 'published')
    assert len(str(error.value)) < 600


def test_no_file_of_a_run_or_of_a_source_is_overwritten(tmp_path, capsys):
    write(tmp_path / 'published')
    before = (tmp_path / 'published' / 'config.json').read_bytes()
    assert run('import', f'--source={tmp_path / "published"}', f'--workdir={tmp_path / "published"}') == 2
    assert 'holds a config.json that is not of a run' in capsys.readouterr().err
    assert (tmp_path / 'published' / 'config.json').read_bytes() == before
    assert run('import', f'--source={tmp_path / "published"}', f'--workdir={tmp_path / "run"}') == 0
    before = (tmp_path / 'run' / 'config.json').read_bytes()
    capsys.readouterr()
    assert publish(f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "run"}') == 2
    assert 'holds a config.json already, which would be overwritten' in capsys.readouterr().err
    assert (tmp_path / 'run' / 'config.json').read_bytes() == before
    assert not list((tmp_path / 'run').glob('*.safetensors'))


def test_both_biases_of_dt_come_back_as_their_sum(tmp_path):
    config = small_config(model_use_bias=True)
    params = random_params(config)
    save_run(tmp_path / 'run', config, {5: params})
    conversion.export_pytorch(tmp_path / 'run', tmp_path / 'out')
    read, loaded = conversion.load_pytorch(tmp_path / 'out')
    assert config_lib.differences(loaded, config) == {}
    old, new = (tree['layers']['ssd']['mixer'] for tree in (params, read))
    np.testing.assert_array_equal(new['dt_bias'], old['dt_bias'] + old['in_proj']['dt']['bias'])
    assert not new['in_proj']['dt']['bias'].any()
    ids_BL = np.random.default_rng(1).integers(0, config.model.vocab_size, (2, 48))
    np.testing.assert_allclose(our_logits(read, loaded, ids_BL), our_logits(params, config, ids_BL), atol=1e-4)


@pytest.fixture
def exported(tmp_path):
    """(directory of an export with groups and a dt bias, its config)"""
    config = small_config()
    save_run(tmp_path / 'run', config, {5: random_params(config)})
    conversion.export_pytorch(tmp_path / 'run', tmp_path / 'out')
    return tmp_path / 'out', config


def check_logits(directory, length=48):
    """The parameters that are read compute what the tensors mean."""
    fields, tensors = json.loads((directory / 'config.json').read_text()), load_file(directory / 'model.safetensors')
    params, config = conversion.load_pytorch(directory)
    ids_L = np.random.default_rng(1).integers(0, config.model.vocab_size, length)
    np.testing.assert_allclose(
        our_logits(params, config, ids_L[None])[0], published_logits(fields, tensors, ids_L), atol=1e-4
    )


@pytest.mark.parametrize(
    'tensor, changes, unused',
    [
        ('model.layers.1.ssd.b_proj.weight', {'model.num_ssd_groups': 4}, 'model.num_ssd_groups=2 (heads of a group'),
        (
            'model.layers.5.ssd.c_proj.bias',
            {'model.use_bias': True, 'model.use_dt_bias': False},
            'model.use_bias=False',
        ),
    ],
)
def test_tensors_that_another_program_has_changed_are_not_folded(exported, tensor, changes, unused):
    directory, config = exported
    tensors = load_file(directory / 'model.safetensors')
    tensors[tensor] = tensors[tensor].copy()
    tensors[tensor][1] += 0.5
    save_file(tensors, directory / 'model.safetensors', {'format': 'pt'})
    source = files.PytorchCheckpoint(directory)
    found = {name: now for name, (now, _) in config_lib.differences(source.config, config).items()}
    # A bias of B that differs between heads of one group is both.
    assert found == changes | ({'model.num_ssd_groups': 4} if tensor.endswith('c_proj.bias') else {})
    assert any(unused in phrase for phrase in source.unused)
    check_logits(directory)


def test_fields_that_another_program_has_changed_count(exported):
    directory, config = exported
    fields = json.loads((directory / 'config.json').read_text())
    scaling = {'rope_type': 'linear', 'factor': 2.0}
    changed = fields | {'rope_scaling': scaling, 'rms_norm_eps': 1e-3, 'torch_dtype': 'bfloat16'}
    (directory / 'config.json').write_text(json.dumps(changed))
    source = files.PytorchCheckpoint(directory)
    assert source.unused == [] and {
        name: now for name, (now, _) in config_lib.differences(source.config, config).items()
    } == {'model.rope_scaling': 'linear', 'model.rope_factor': 2.0, 'model.norm_epsilon': 1e-3}


@pytest.mark.parametrize(
    'change, reason',
    [
        (
            {'attention_period': 8, 'attention_offset': 0},
            'model.attention_period=8 there is not that of the other fields, 4',
        ),
        ({'d_state': 32}, 'model.d_state=32 has no place'),
        ({'color': 'blue'}, 'unknown setting model.color'),
        ({'num_heads': 2**70}, 'must be at most'),
    ],
)
def test_settings_that_do_not_fit_are_reported_and_left_out(exported, change, reason):
    directory, _ = exported
    fields = json.loads((directory / 'config.json').read_text())
    fields['transxssm_jax']['model'] |= change
    (directory / 'config.json').write_text(json.dumps(fields))
    source = files.PytorchCheckpoint(directory)
    assert len(source.unused) == 1 and reason in source.unused[0], source.unused
    model = source.config.model
    assert (model.num_ssd_groups, model.use_bias, model.use_dt_bias) == (4, True, False)
    check_logits(directory)


def test_an_export_names_no_path_and_no_mesh(exported):
    settings = json.loads((exported[0] / 'config.json').read_text())['transxssm_jax']
    assert settings.keys() == {'model', 'data', 'optimizer', 'train'} and 'path' not in settings['data']


# ---- what an import makes --------------------------------------------------


def test_the_optimizer_begins_as_its_own_init_says(tmp_path, monkeypatch):
    """Also one whose state is not zeros, and depends on parameters."""

    def init(params):
        size = sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(params))
        slow = jax.tree.map(lambda leaf: 2 * leaf, params)
        return {
            'slow': slow,
            'ones': jax.tree.map(jnp.ones_like, params),
            'size': size,
            'steps': jnp.zeros(3, jnp.int32),
        }

    tx = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    monkeypatch.setitem(optimizer.OPTIMIZERS, 'adamw', lambda config: tx)
    write(tmp_path / 'published')
    conversion.import_pytorch(tmp_path / 'published', tmp_path / 'run')
    params, config = checkpoint.load_trained(tmp_path / 'run')
    device_mesh = mesh.build(config, jax.devices()[:1])
    step, state, position = checkpoint.Checkpoints(tmp_path / 'run', config).restore(
        abstract_state(config, device_mesh)
    )
    assert (step, int(state['step']), position) == (0, 0, None)
    expected = optimizer.init(tx, params)
    assert jax.tree.structure(state['opt_state']) == jax.tree.structure(expected)
    for found, value in zip(jax.tree.leaves(state['opt_state']), jax.tree.leaves(expected), strict=True):
        assert found.dtype == value.dtype and found.shape == value.shape
        np.testing.assert_allclose(found, value, rtol=1e-6)


def test_a_function_is_cut_into_one_for_each_output():
    table = jnp.arange(2.0)

    def function(tree):
        product = tree['a'] * tree['b']
        return [jnp.zeros_like(tree['c']), product + table, tree['c'], jax.jit(jnp.sin)(tree['b']), 3.0]

    tree = {name: np.full(2, i + 1.0, np.float32) for i, name in enumerate('abc')}
    outputs = arrays.each_output(function, jax.eval_shape(lambda tree: tree, tree))
    assert [keys for keys, _ in outputs] == [[], ['a', 'b'], ['c'], ['b'], []]
    for (keys, compute), expected in zip(outputs, function(tree), strict=True):
        np.testing.assert_array_equal(compute(*(tree[key] for key in keys)), expected)


def test_an_import_takes_the_lease_of_the_workdir(tmp_path, capsys):
    write(tmp_path / 'published')
    arguments = ('import', f'--source={tmp_path / "published"}', f'--workdir={tmp_path / "run"}')
    with lease.hold(tmp_path / 'run'):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert 'is in use by another run' in error and len(error.splitlines()) == 1
        assert [path.name for path in (tmp_path / 'run').iterdir()] == [lease.NAME]
    assert run(*arguments) == 0
    assert not (tmp_path / 'run' / lease.NAME).exists()


# ---- what an export refuses ------------------------------------------------


@pytest.mark.parametrize(
    'settings, message',
    [
        (
            dict(model_pattern='mamba2,attention'),
            "a layer of kind 'mamba2' has no place in the published PyTorch format",
        ),
        (dict(model_ssd_encoding='decay_only'), "model.ssd_encoding='decay_only' has no place in the published format"),
        (dict(model_ssd_encoding='conv1d_d'), "model.ssd_encoding='conv1d_d' has no place in the published format"),
        (dict(model_attention_encoding='none'), "model.attention_encoding='none' has no place in the published format"),
        (dict(model_qk_norm=True), 'model.qk_norm=True has no place in the published format'),
        (dict(model_bc_norm=True), 'model.bc_norm=True has no place in the published format'),
        (dict(model_logit_soft_cap=30.0), 'model.logit_soft_cap=30.0 has no place in the published format'),
        (dict(model_d_mlp=0), 'model.d_mlp=0 has no place in the published format'),
        (dict(model_pattern='2xssd,2xattention'), "model.pattern='2xssd,2xattention' has no place in the published"),
    ],
)
def test_a_model_that_the_format_has_not_is_named(tmp_path, capsys, settings, message):
    config = small_config(**settings)
    save_run(tmp_path / 'run', config, {5: random_params(config)})
    assert publish(f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "out"}') == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1 and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'path',
    [
        ('layers', 'ssd', 'mixer', 'd'),
        ('layers', 'ssd', 'mixer', 'conv', 'kernel'),
        ('layers', 'attention', 'mixer', 'in_proj', 'x', 'kernel'),
        ('layers', 'attention', 'mixer', 'a_log'),
        ('layers', 'ssd', 'mixer', 'in_proj', 'x', 'scale'),
        ('positions',),
    ],
)
def test_a_parameter_that_the_format_has_not_is_named(monkeypatch, path):
    model = fields_lib.pytorch_model(small_config().model)
    shapes = tensors_lib.shapes_of(model) | {path: (2, 2, 64)}
    monkeypatch.setattr(tensors_lib, 'shapes_of', lambda model: shapes)
    with pytest.raises(fields_lib.ConvertError, match=f'parameter {"/".join(path)} has no place'):
        tensors_lib.tensors_of(model)


def test_tokens_of_the_tokenizer_go_with_an_export(tmp_path, prepared, capsys):
    """Of the run's own tokenizer where none is named; bos is the token that documents begin with."""
    config = small_config(model_vocab_size=512)
    params = random_params(config)

    def exported(name, *arguments, **settings):
        save_run(tmp_path / name, config_lib.replace(config, settings), {5: params})
        assert publish(f'--workdir={tmp_path / name}', f'--output={tmp_path / name}/out', *arguments) == 0
        fields = json.loads((tmp_path / name / 'out' / 'config.json').read_text())
        return fields['bos_token_id'], fields['eos_token_id'], (tmp_path / name / 'out' / 'tokenizer.json').exists()

    train_tokenizer(tmp_path / 'tokenizer.json', ['</s>', '<s>'])
    assert exported('none') == (None, None, False)
    assert exported('named', f'--tokenizer={tmp_path / "tokenizer.json"}') == (1, 0, True)
    made = json.loads((tmp_path / 'named' / 'out' / 'tokenizer_config.json').read_text())
    assert (made['bos_token'], made['eos_token']) == ('<s>', '</s>')
    assert exported('own', **{'data.path': str(tmp_path / 'tokenizer.json')}) == (1, 0, True)
    assert exported('bytes', **{'data.path': str(prepared)}) == (256, 256, False)
    capsys.readouterr()
    assert exported('gone', **{'data.path': str(tmp_path / 'gone.json')}) == (None, None, False)
    assert 'no tokenizer is exported (tokenizer ' in capsys.readouterr().out


def test_a_damaged_memory_of_the_import_is_refused(tmp_path, capsys):
    write(tmp_path / 'published')
    conversion.import_pytorch(tmp_path / 'published', tmp_path / 'run')
    (tmp_path / 'run' / 'published.json').write_text('[]')
    assert publish(f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "out"}') == 2
    error = capsys.readouterr().err
    assert 'published.json is damaged' in error and len(error.splitlines()) == 1
