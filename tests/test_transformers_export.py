"""Exports that the transformers library loads: against what PyTorch made of them once, and, with -m torch, makes of them now.

pip install torch transformers && python -m pytest -m torch tests/test_transformers_export.py
"""

import json

import exported_models
import jax
import numpy as np
import pytest
from data_fixtures import run_prepare, train_tokenizer
from exported_models import NEW_TOKENS, TOKENS, VARIANTS, config_of, export
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file
from small import small_config
from test_convert import our_logits, random_params, run, save_run

from transxssm_jax import config as config_lib
from transxssm_jax.config import Model
from transxssm_jax.inference.generator import Generator
from transxssm_jax.pytorch import conversion, model_card, tokenizer_files, transformers_fields, transformers_tensors
from transxssm_jax.pytorch.fields import ConvertError
from transxssm_jax.pytorch.transformers_checkpoint import TransformersCheckpoint
from transxssm_jax.training import checkpoint


def wide(config):
    return config_lib.replace(config, {'model.dtype': 'float32'})


def assert_same(params, others):
    others = nnx.traversals.flatten_mapping(others)
    for path, leaf in nnx.traversals.flatten_mapping(params).items():
        assert np.asarray(leaf).tobytes() == np.asarray(others[path]).tobytes(), path
    assert len(others) == len(nnx.traversals.flatten_mapping(params))


@pytest.mark.parametrize('name', VARIANTS)
def test_what_pytorch_computes_with_an_export_is_what_its_import_computes(tmp_path, name):
    stored = np.load(exported_models.PATH)
    directory = export(tmp_path, name)
    assert exported_models.digest(directory) == stored[f'{name}/sha256'], 'other weights than PyTorch had'
    params, config = conversion.load_pytorch(directory)
    assert config_lib.differences(config, config_of(name)) == {}
    assert_same(params, random_params(config))
    found = our_logits(params, wide(config), TOKENS)
    np.testing.assert_allclose(found, stored[f'{name}/logits'], atol=1e-4)


def test_greedy_text_is_that_of_pytorch():
    """Of one model; -m torch compares all."""
    assert ours_greedy('wide state', TOKENS) == np.load(exported_models.PATH)['wide state/greedy'].tolist()


def ours_greedy(name, rows):
    config = wide(config_of(name))
    generator = Generator(random_params(config), config, max_length=len(rows[0]) + NEW_TOKENS)
    return [completion.tokens.tolist() for completion in generator.generate(rows, max_tokens=NEW_TOKENS)]


# ---- files -------------------------------------------------------------------


def test_the_files_of_an_export(tmp_path, capsys):
    """By the command, in shards, with a card that has the run's figures; and the same model again, by import."""
    config = small_config(model_vocab_size=512, model_d_state=32, model_num_layers=4, train_steps=40)
    train_tokenizer(tmp_path / 'tokenizer.json', ['</s>', '<s>'])
    config = config_lib.replace(config, {'data.path': str(tmp_path / 'tokenizer.json')})
    save_run(tmp_path / 'run', config, {7: random_params(config)})
    records = [
        {'step': 5, 'loss': 4.5},
        {'step': 7, 'eval/validation/loss': 4.25},
        {'step': 7, 'loss': 4.0, 'learning_rate': 0.1},
        {'step': 9, 'loss': 3.0},
    ]
    (tmp_path / 'run' / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records) + '{"st')
    flags = ('--dtype=bfloat16', '--max_shard_size=100KB')
    assert run('export', f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "out"}', *flags) == 0
    out, text = tmp_path / 'out', capsys.readouterr().out
    code = ('modeling_transxssm.py', 'scan_transxssm.py')
    for name in (*code, 'generation_config.json', 'tokenizer.json', 'README.md', 'config.json'):
        assert (out / name).exists() and name in text
    index = json.loads((out / 'model.safetensors.index.json').read_text())
    tensors = {}
    for path in sorted(out.glob('*.safetensors')):
        with safe_open(path, 'numpy') as file:
            assert file.metadata() == {'format': 'pt'}
        tensors |= load_file(path)
    assert set(index['weight_map']) == set(tensors) and len(set(index['weight_map'].values())) > 2
    assert index['metadata']['total_size'] == sum(value.nbytes for value in tensors.values())
    assert {value.ndim: str(value.dtype) for value in tensors.values()} == {1: 'float32', 2: 'bfloat16'}
    fields = json.loads((out / 'config.json').read_text())
    assert (fields['torch_dtype'], fields['dtype'], fields['layer_kinds']) == (
        'bfloat16',
        'bfloat16',
        ['ssd'] * 2 + ['attention', 'ssd'],
    )
    generation = json.loads((out / 'generation_config.json').read_text())
    assert [generation[f'{name}_token_id'] for name in ('bos', 'eos', 'pad')] == [1, 0, 0]
    made = json.loads((out / 'tokenizer_config.json').read_text())
    assert (made['bos_token'], made['pad_token'], made['padding_side']) == ('<s>', '</s>', 'left')
    card = (out / 'README.md').read_text()
    assert f'| step | 7 of 40 |\n| tokens | {7 * 8 * 48:,} |' in card
    assert '| loss | 4 (step 7) |' in card and '| eval/validation/loss | 4.25 (step 7) |' in card
    assert '| `model.d_state` | `32` |' in card and str(tmp_path) not in card
    assert run('export', f'--workdir={tmp_path / "run"}', f'--output={out}') == 2
    assert 'holds weights already' in capsys.readouterr().err
    assert run('import', f'--source={out}', f'--workdir={tmp_path / "again"}') == 0
    assert 'not used' not in capsys.readouterr().out
    params, loaded = checkpoint.load_trained(tmp_path / 'again')
    assert config_lib.differences(loaded, config) == {
        'data.path': (str(tmp_path / 'again' / 'tokenizer.json'),) + (config.data.path,)
    }
    matrices = {'kernel', 'embedding'}
    for path, leaf in nnx.traversals.flatten_mapping(random_params(config)).items():
        expected = leaf.astype(jax.numpy.bfloat16).astype(np.float32) if path[-1] in matrices else leaf
        np.testing.assert_array_equal(nnx.traversals.flatten_mapping(params)[path], expected, err_msg='/'.join(path))
    # A run that began so is exported in both formats.
    for layout in ('transformers', 'published'):
        assert (
            run('export', f'--workdir={tmp_path / "again"}', f'--output={tmp_path / layout}', f'--layout={layout}')
            == (layout == 'published') * 2
        )


def test_a_byte_tokenizer_is_written_as_a_file_and_read_as_itself(tmp_path):
    import tokenizers

    content = tokenizer_files.byte_tokenizer()
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    text = 'a b\n\té語🙂'
    assert tokenizer.encode(text).ids == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
    assert tokenizer.token_to_id(tokenizer_files.BYTE_EOS) == 256 and tokenizer.get_vocab_size() == 257
    config = small_config(model_vocab_size=264, model_num_layers=4, data_path='byte')
    save_run(tmp_path / 'run', config, {5: random_params(config)})
    assert run('export', f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "out"}') == 0
    assert (tmp_path / 'out' / 'tokenizer.json').read_bytes() == content
    assert run('import', f'--source={tmp_path / "out"}', f'--workdir={tmp_path / "again"}') == 0
    assert checkpoint.load_config(tmp_path / 'again').data.path == 'byte'


@pytest.fixture
def chat_run(tmp_path):
    """A workdir whose data are conversations, in bytes."""
    template = '{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}'
    (tmp_path / 'template.jinja').write_text(template)
    turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    (tmp_path / 'chat.jsonl').write_text(json.dumps({'messages': turns}))
    flags = dict(format='chat', chat_template=tmp_path / 'template.jinja')
    assert run_prepare(tmp_path / 'chat', tmp_path / 'chat.jsonl', **flags) == 0
    config = small_config(model_vocab_size=264, model_num_layers=4, data_path=str(tmp_path / 'chat'))
    save_run(tmp_path / 'run', config, {5: random_params(config)})
    return tmp_path / 'run', template


def test_the_template_of_conversations_goes_with_them(tmp_path, chat_run):
    workdir, template = chat_run
    assert run('export', f'--workdir={workdir}', f'--output={tmp_path / "out"}') == 0
    assert (tmp_path / 'out' / 'chat_template.jinja').read_text() == template


@pytest.mark.torch
def test_pytorch_reads_the_template(tmp_path, transformers, chat_run):
    assert run('export', f'--workdir={chat_run[0]}', f'--output={tmp_path / "out"}') == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out', trust_remote_code=True)
    turns = [{'role': 'user', 'content': 'é'}, {'role': 'assistant', 'content': 'b'}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == '<user>é<assistant>b'


def test_every_setting_of_a_model_is_exported_or_without_effect():
    """A new setting is refused where it is not at its default, until it stands in one of the tables."""
    known = {*transformers_fields.SAME.values(), *transformers_fields.PLACED, *transformers_fields.WITHOUT_EFFECT}
    others = set(Model.__dataclass_fields__) - known
    for name in others:
        assert Model.__dataclass_fields__[name].default in (False, 0, 0.0, '', 'none'), f'model.{name} is on by default'
    computed = {*transformers_fields.SAME.values(), *transformers_fields.PLACED} - {'d_state'}
    with pytest.raises(ConvertError, match='model.d_state=32 has no place in the code'):
        transformers_fields.check_computed(small_config(model_d_state=32).model, computed, 'the code')


def test_a_parameter_that_the_code_does_not_compute_with_is_named(monkeypatch):
    model = small_config().model
    path = ('layers', 'attention', 'mixer', 'in_proj', 'x', 'kernel')
    shapes = transformers_tensors.shapes_of(model) | {path: (2, 1, 64, 64)}
    monkeypatch.setattr(transformers_tensors, 'shapes_of', lambda model: shapes)
    with pytest.raises(ConvertError, match=f'parameter {"/".join(path)} has no place in modeling_transxssm.py'):
        transformers_tensors.own_tensors(model)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'layer_kinds': ['ssd', 'moe']}, 'layer_kinds=["ssd", "moe"] must list kinds of layers'),
        ({'layer_kinds': 3}, 'layer_kinds=3 must list'),
        ({'state_size': None}, 'model.d_state=None must be int'),
        ({'num_hidden_layers': 5}, 'model.num_layers=5 must be divisible by layers per period=4'),
        ({'hidden_size': 128, 'num_attention_heads': 8}, 'has shape [96, 64], its config.json calls for [96, 128]'),
        ({'intermediate_size': 0}, 'has unexpected tensor model.layers.0.mlp'),
        ({'layer_kinds': ['ssd']}, 'model.layers.2.mixer'),
    ],
)
def test_fields_that_do_not_fit_are_refused(tmp_path, change, message, capsys):
    directory = export(tmp_path, 'wide state')
    fields = json.loads((directory / 'config.json').read_text()) | change
    (directory / 'config.json').write_text(json.dumps(fields))
    assert run('import', f'--source={directory}', f'--workdir={tmp_path / "again"}') == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error


def test_fields_count_more_than_the_saved_settings(tmp_path):
    directory = export(tmp_path, 'wide state')
    fields = json.loads((directory / 'config.json').read_text()) | {'rotary_base': 777.0}
    (directory / 'config.json').write_text(json.dumps(fields))
    config = TransformersCheckpoint(directory).config
    assert config_lib.differences(config, config_of('wide state')) == {'model.rope_theta': (777.0, 10000.0)}
    del fields['transxssm_jax']['model']['dtype'], fields['state_size']
    fields['transxssm_jax']['model']['color'] = 'blue'
    (directory / 'config.json').write_text(json.dumps(fields | {'state_size': 32}))
    source = TransformersCheckpoint(directory)
    assert len(source.unused) == 1 and 'unknown setting model.color' in source.unused[0]
    assert (source.config.model.d_state, source.config.data.seq_len, source.config.model.dtype) == (32, 48, 'float32')


# ---- Llama -------------------------------------------------------------------


def llama_run(tmp_path, residual=1.0, **settings):
    config = small_config(model_num_layers=4, **{'model_pattern': 'attention', 'model_use_bias': True} | settings)
    params = random_params(config)
    for kind in params['layers'].values():
        for name in {'mixer_residual', 'mlp_residual'} & set(kind):
            kind[name]['weight'] = np.full_like(kind[name]['weight'], residual)
    save_run(tmp_path / 'run', config, {5: params})
    return config, params


def test_a_llama_comes_back_exactly(tmp_path, capsys):
    config, params = llama_run(tmp_path, model_tie_embeddings=False, model_rope_scaling='linear', model_rope_factor=3.0)
    assert run('export', f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "out"}', '--layout=llama') == 0
    assert not (tmp_path / 'out' / 'modeling_transxssm.py').exists()
    fields = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert (fields['model_type'], fields['attention_bias'], fields['rope_scaling']) == (
        'llama',
        True,
        {'rope_type': 'linear', 'factor': 3.0},
    )
    read, loaded = conversion.load_pytorch(tmp_path / 'out')
    assert config_lib.differences(loaded, config) == {}
    assert_same(read, params)
    # One that knows nothing of us.
    del fields['transxssm_jax']
    (tmp_path / 'out' / 'config.json').write_text(json.dumps(fields))
    read, loaded = conversion.load_pytorch(tmp_path / 'out')
    assert_same(read, params)
    assert (loaded.model.rope_factor, loaded.model.layer_pattern, loaded.data.seq_len) == (3.0, ('attention',), 48)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(model_pattern='ssd,attention'), "a layer of kind 'ssd' has no place in Llama"),
        (dict(model_attention_encoding='none'), "model.attention_encoding='none' has no place in Llama"),
        (dict(model_d_mlp=0), 'model.d_mlp=0 has no place in Llama'),
        (dict(model_rope_scaling='length'), "model.rope_scaling='length' has no place in Llama"),
        (dict(residual=1.5), 'has learned residual weights (up to 0.5 away from 1), which have no place in Llama'),
    ],
)
def test_what_is_no_llama_is_refused(tmp_path, settings, message, capsys):
    llama_run(tmp_path, **settings)
    assert run('export', f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "out"}', '--layout=llama') == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / 'out').exists(), error


@pytest.mark.parametrize(
    'change, message',
    [
        ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'rope_scaling.rope_type="llama3" is not computed'),
        ({'rope_scaling': {'rope_type': 'linear'}}, "rope_scaling lacks 'factor'"),
        ({'rope_scaling': [1]}, 'rope_scaling=[1] must be an object'),
        ({'head_dim': 32}, 'head_dim=32 is not computed here; it must be 16'),
        ({'mlp_bias': False}, 'mlp_bias=false is not computed here'),
        ({'hidden_size': None}, 'hidden_size is missing'),
        ({'num_attention_heads': 0}, 'model.num_heads=0 must be at least 1'),
    ],
)
def test_a_llama_that_is_not_computed_here_is_refused(tmp_path, change, message, capsys):
    llama_run(tmp_path)
    run('export', f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "out"}', '--layout=llama')
    fields = json.loads((tmp_path / 'out' / 'config.json').read_text()) | change
    (tmp_path / 'out' / 'config.json').write_text(json.dumps(fields))
    capsys.readouterr()
    assert run('import', f'--source={tmp_path / "out"}', f'--workdir={tmp_path / "again"}') == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error


# ---- PyTorch -----------------------------------------------------------------

PROMPTS = [np.random.default_rng(seed).integers(0, 96, length) for seed, length in ((2, 150), (3, 131), (4, 9))]


@pytest.fixture(scope='module')
def transformers():
    pytest.importorskip('transformers', reason='pip install torch transformers')
    return exported_models.library()


def padded(rows):
    """(ids, attention mask) with padding on the left, of token 5."""
    length = max(map(len, rows))
    ids = np.stack([np.concatenate([np.full(length - len(row), 5), row]) for row in rows])
    return ids, np.stack([np.arange(length) >= length - len(row) for row in rows]).astype(np.int64)


@pytest.mark.torch
@pytest.mark.parametrize('name', VARIANTS)
def test_pytorch_computes_our_logits_and_our_text(tmp_path, transformers, name):
    """Rows longer than a chunk of the scan, batches with padding on the left, and 64 tokens that are decoded one by one."""
    import torch

    directory = export(tmp_path, name)
    model, report = exported_models.load(directory)
    assert not any(report.values()), report
    config = wide(config_of(name))
    params = random_params(config)
    rows = np.stack([np.resize(row, 150) for row in PROMPTS[:2]])
    found = exported_models.logits(model, rows)
    np.testing.assert_allclose(found, our_logits(params, config, rows), atol=1e-4)
    ids, mask = padded(PROMPTS)
    assert exported_models.greedy(model, ids, attention_mask=torch.from_numpy(mask)).tolist() == ours_greedy(
        name, PROMPTS
    )
    stored = np.load(exported_models.PATH)
    np.testing.assert_allclose(exported_models.logits(model, TOKENS), stored[f'{name}/logits'], atol=1e-5)
    assert exported_models.greedy(model, TOKENS).tolist() == stored[f'{name}/greedy'].tolist()
    if config.model.rope_scaling != 'dynamic':  # whose rotation is that of the whole row when its tokens are kept
        without = exported_models.greedy(model, TOKENS, use_cache=False)
        assert without.tolist() == stored[f'{name}/greedy'].tolist()
        beams = [exported_models.greedy(model, TOKENS, num_beams=3, use_cache=use) for use in (True, False)]
        assert beams[0].tolist() == beams[1].tolist()
    model.train()
    loss = model(torch.from_numpy(TOKENS), labels=torch.from_numpy(TOKENS)).loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    model.save_pretrained(tmp_path / 'saved')
    assert_same(conversion.load_pytorch(tmp_path / 'saved')[0], params)


@pytest.mark.torch
@pytest.mark.parametrize('name', ['wide state', 'jamba'])
def test_pytorch_goes_on_from_a_cache(tmp_path, transformers, name):
    import torch

    model, _ = exported_models.load(export(tmp_path, name))
    tokens = torch.from_numpy(PROMPTS[0][None])
    whole = model.generate(tokens, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    first = model.generate(tokens, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    key = 'cache' if 'cache' in first else 'past_key_values'
    again = model.generate(first.sequences, max_new_tokens=7, do_sample=False, **{key: first[key]})
    assert again.tolist() == whole.sequences.tolist()
    kept = first[key].layers[0].state.shape
    assert kept == whole[key].layers[0].state.shape, 'the state grows'


@pytest.mark.torch
def test_pytorch_keeps_vectors_float32_in_bfloat16(tmp_path, transformers):
    import torch

    directory = export(tmp_path, 'convolution, biases, untied', dtype='bfloat16')
    model, report = exported_models.load(directory, dtype='auto')
    assert not any(report.values()), report
    for name, parameter in model.named_parameters():
        if transformers.__version__.startswith('4.') and name.endswith('.bias') and '.conv.' not in name:
            continue  # which keeps no bias apart
        assert parameter.dtype == (torch.bfloat16 if parameter.ndim == 2 else torch.float32), name
    config = config_lib.replace(config_of('convolution, biases, untied'), {'model.dtype': 'bfloat16'})
    found, wanted = exported_models.logits(model, TOKENS), our_logits(random_params(config), config, TOKENS)
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.torch
@pytest.mark.parametrize('scaling', ['none', 'linear', 'dynamic'])
def test_pytorch_has_a_llama_of_its_own(tmp_path, transformers, scaling):
    """Which, saved by transformers without our settings, is the same model again."""
    config, params = llama_run(tmp_path, model_rope_scaling=scaling, model_rope_original_length=16)
    assert run('export', f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "out"}', '--layout=llama') == 0
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', output_loading_info=True)
    assert type(model).__name__ == 'LlamaForCausalLM' and not any(report.values()), report
    np.testing.assert_allclose(exported_models.logits(model, TOKENS), our_logits(params, config, TOKENS), atol=1e-4)
    model.save_pretrained(tmp_path / 'saved')
    fields = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    fields.pop('transxssm_jax')
    (tmp_path / 'saved' / 'config.json').write_text(json.dumps(fields))
    read, loaded = conversion.load_pytorch(tmp_path / 'saved')
    assert_same(read, params)
    np.testing.assert_allclose(our_logits(read, loaded, TOKENS), our_logits(params, config, TOKENS), atol=1e-6)


@pytest.mark.torch
def test_pytorch_loads_the_tokenizer(tmp_path, transformers):
    config = small_config(model_vocab_size=264, model_num_layers=4, data_path='byte')
    save_run(tmp_path / 'run', config, {5: random_params(config)})
    assert run('export', f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "out"}', '--max_shard_size=100KB') == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out', trust_remote_code=True)
    model, report = exported_models.load(tmp_path / 'out')
    assert not any(report.values()), report
    prompts = [tokenizer.bos_token + text for text in ('Once upon', 'Aé')]
    inputs = tokenizer(prompts, return_tensors='pt', padding=True, add_special_tokens=False)
    assert inputs['input_ids'][1, -4:].tolist() == [256, *'Aé'.encode()] and not inputs['attention_mask'][1, 0]
    rows = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs['input_ids'].shape[1] :].tolist()
    generator = Generator(random_params(config), config, max_length=64)
    given = [np.array([256, *text.encode()]) for text in ('Once upon', 'Aé')]
    for row, completion in zip(rows, generator.generate(given, max_tokens=16, stop_tokens=[256])):
        assert row[: len(completion.tokens)] == completion.tokens.tolist()


@pytest.mark.torch
def test_the_shapes_of_the_code_are_those_of_every_config(transformers):
    """Of every config in configs/, without their values: what is exported is what the code has."""
    import pathlib

    import torch

    from transxssm_jax.pytorch import modeling_transxssm

    paths = (pathlib.Path(__file__).parents[1] / 'configs').glob('**/*.py')
    for path in sorted(path for path in paths if path.parent.name != 'sweeps'):
        config = config_lib.load(path)
        fields = transformers_fields.fields_of(config, 'float32')
        with torch.device('meta'):
            model = modeling_transxssm.TransXSSMForCausalLM(modeling_transxssm.TransXSSMConfig(**fields))
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if config.model.tie_embeddings:
            del shapes['lm_head.weight']
        assert shapes == {name: t.shape for name, t in transformers_tensors.own_tensors(config.model).items()}, path


def test_the_card_of_a_run_without_records(tmp_path):
    assert model_card.measured(tmp_path, 3) == []
