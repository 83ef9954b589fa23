"""Import of Mamba-2 in the published format: names, shapes, logits, both kinds of files, and what is refused."""

import json
import pickle
import sys
import types
import zipfile

import jax
import make_transformers_logits
import mamba2_oracle as oracle
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from transxssm_jax import convert
from transxssm_jax.model import parameters
from transxssm_jax.pytorch import conversion
from transxssm_jax.pytorch.mamba_ssm import model_of
from transxssm_jax.pytorch.torch_files import TorchFile, TorchFileError
from transxssm_jax.training import checkpoint

SIZES = make_transformers_logits.MAMBA2
CONFIG = {
    'd_model': 32,
    'd_intermediate': 0,
    'n_layer': 2,
    'vocab_size': 43,
    'ssm_cfg': {'layer': 'Mamba2', 'headdim': 16, 'd_state': 16},
    'attn_layer_idx': [],
    'attn_cfg': {},
    'rms_norm': True,
    'residual_in_fp32': True,
    'fused_add_norm': True,
    'pad_vocab_size_multiple': 16,
    'tie_embeddings': True,
}


def write_torch(path, tensors):
    """A file as torch.save writes it; PyTorch's names are those of stand-ins while it is pickled."""
    torch, utils = types.ModuleType('torch'), types.ModuleType('torch._utils')
    storages = {np.dtype(np.float32): 'FloatStorage', np.dtype(ml_dtypes.bfloat16): 'BFloat16Storage'}
    for name in storages.values():
        setattr(torch, name, type(name, (), {'__module__': 'torch'}))

    def _rebuild_tensor_v2():
        """Only its name counts."""

    _rebuild_tensor_v2.__module__ = 'torch._utils'
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    keys = {}

    class Storage:
        def __init__(self, value):
            self.value, self.key = value, keys.setdefault(value.tobytes(), str(len(keys)))

    class Tensor:
        def __init__(self, value):
            self.value = value

        def __reduce__(self):
            strides = tuple(s // self.value.itemsize for s in self.value.strides)
            return _rebuild_tensor_v2, (Storage(self.value), 0, self.value.shape, strides, False, None)

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, Storage):
                kind = getattr(torch, storages[thing.value.dtype])
                return 'storage', kind, thing.key, 'cpu', thing.value.size

    modules = {'torch': torch, 'torch._utils': utils}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    _rebuild_tensor_v2.__qualname__ = '_rebuild_tensor_v2'
    try:
        with zipfile.ZipFile(path, 'w') as archive:
            with archive.open('model/data.pkl', 'w') as file:
                Pickler(file, protocol=2).dump({name: Tensor(value) for name, value in tensors.items()})
            for content, key in keys.items():
                archive.writestr(f'model/data/{key}', content)
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def write(folder, tensors=None, kind='safetensors', **changes):
    folder.mkdir(exist_ok=True)
    tensors = oracle.random_tensors(np.random.default_rng(0), **SIZES) if tensors is None else tensors
    (folder / 'config.json').write_text(json.dumps(CONFIG | changes))
    if kind == 'safetensors':
        save_file(tensors, folder / 'model.safetensors')
    else:
        write_torch(folder / 'pytorch_model.bin', tensors)
    return tensors


def logits_of(params, config, tokens):
    graph, _ = parameters.split_model(config.model)
    return np.asarray(jax.jit(lambda params, tokens: nnx.merge(graph, params).logits(tokens))(params, tokens))


def assert_gives_the_published_logits(folder, tensors, **sizes):
    params, config = conversion.load_pytorch(folder)
    tokens = np.random.default_rng(1).integers(0, 43, (2, 21))
    wanted = oracle.logits(tensors, tokens, **dict(head_dim=16, groups=1, state=16) | sizes)
    found = logits_of(params, config, tokens)
    assert found.shape == wanted.shape == (2, 21, 48)
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize('kind', ['safetensors', 'torch'])
def test_logits_are_those_of_the_published_model(tmp_path, kind):
    tensors = write(tmp_path, kind=kind)
    assert_gives_the_published_logits(tmp_path, tensors)


def test_logits_are_those_that_transformers_gave(tmp_path):
    """Its own implementation of Mamba-2, from the same weights."""
    write(tmp_path, make_transformers_logits.mamba2_tensors())
    params, config = conversion.load_pytorch(tmp_path)
    wanted = np.load(make_transformers_logits.PATH)['mamba2']
    found = logits_of(params, config, make_transformers_logits.MAMBA2_TOKENS)
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.torch
def test_logits_are_those_of_transformers():
    pytest.importorskip('transformers', reason='pip install torch transformers')
    tensors = make_transformers_logits.mamba2_tensors()
    wanted = make_transformers_logits.mamba2(tensors)
    stored = np.load(make_transformers_logits.PATH)['mamba2']
    assert np.linalg.norm(stored - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_a_file_of_torch_itself_is_read():
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    with TorchFile(make_transformers_logits.TORCH_FILE) as file:
        for name, wanted in {'a': a, 'turned': a.T, 'part': a[1:], 'half': a.astype(ml_dtypes.bfloat16)}.items():
            found = file.get_tensor(name)
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)


def test_other_sizes(tmp_path):
    sizes = dict(groups=2, expand=1, width=3, mlp=128)
    tensors = oracle.random_tensors(np.random.default_rng(2), **SIZES | sizes)
    tensors['lm_head.weight'] = np.random.default_rng(3).standard_normal((48, 32)).astype(np.float32)
    ssm = CONFIG['ssm_cfg'] | {'ngroups': 2, 'expand': 1, 'd_conv': 3}
    write(tmp_path, tensors, ssm_cfg=ssm, d_intermediate=100, tie_embeddings=False)
    assert_gives_the_published_logits(tmp_path, tensors, groups=2)


def test_the_published_sizes():
    """state-spaces/mamba2-130m and mamba2-2.7b: the parameters that their model cards name."""
    for d_model, layers, count in ((768, 24, 129e6), (2560, 64, 2.70e9)):
        published = {'d_model': d_model, 'n_layer': layers, 'vocab_size': 50277, 'ssm_cfg': {'layer': 'Mamba2'}}
        model, unused = model_of(published | {'pad_vocab_size_multiple': 16}, 'config.json')
        residuals = layers * d_model
        assert parameters.count_params(model) - residuals == pytest.approx(count, rel=0.005)
        assert (model.vocab_size, model.num_mamba_heads, unused) == (50288, 2 * d_model // 64, [])


def test_an_import_is_a_run(tmp_path, capsys):
    tensors = write(tmp_path / 'published')
    arguments = [f'--source={tmp_path / "published"}', f'--workdir={tmp_path / "run"}']
    assert convert.main(['import', *arguments]) == 0
    out = capsys.readouterr().out
    assert f'imported {len(tensors)} tensors' in out
    params, config, *_ = checkpoint.load_trained(tmp_path / 'run')
    tokens = np.random.default_rng(1).integers(0, 43, (1, 9))
    wanted = oracle.logits(tensors, tokens, head_dim=16, groups=1, state=16)
    np.testing.assert_allclose(logits_of(params, config, tokens), wanted, atol=1e-4)
    export = ['export', f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "out"}']
    assert convert.main([*export, '--layout=published']) == 2
    assert "a layer of kind 'mamba2' has no place in the published" in capsys.readouterr().err
    assert convert.main(export) == 0
    again, loaded = conversion.load_pytorch(tmp_path / 'out')
    assert loaded.model == config.model
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def without(name):
    return lambda tensors: tensors.pop(name)


def cut(name):
    return lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name][1:])})


@pytest.mark.parametrize(
    'changes, change, message',
    [
        ({}, without('backbone.layers.1.mixer.D'), 'lacks tensor backbone.layers.1.mixer.D'),
        ({}, cut('backbone.layers.0.mixer.in_proj.weight'), 'in_proj.weight has shape [163, 32], its'),
        ({}, cut('backbone.layers.1.mixer.conv1d.weight'), 'conv1d.weight has shape [95, 1, 4], its'),
        ({}, lambda tensors: tensors.update({'other': np.zeros(2, np.float32)}), 'unexpected tensor other'),
        ({'n_layer': 1}, None, 'unexpected tensor backbone.layers.1'),
        ({'ssm_cfg': {'layer': 'Mamba1'}}, None, 'ssm_cfg.layer="Mamba1" is another mixer; only Mamba2 is read'),
        ({'ssm_cfg': {}}, None, 'ssm_cfg.layer="Mamba1" is another mixer'),
        ({'ssm_cfg': 3}, None, 'ssm_cfg=3 must be an object'),
        ({'ssm_cfg': {'layer': 'Mamba2', 'headdim': 24}}, None, 'ssm_cfg.headdim=24 must divide d_model=32'),
        ({'ssm_cfg': {'layer': 'Mamba2', 'headdim': 16, 'd_state': 'x'}}, None, 'model.d_state='),
        ({'ssm_cfg': {'layer': 'Mamba2', 'norm_before_gate': True}}, None, 'ssm_cfg.norm_before_gate=true is not computed here'),
        ({'ssm_cfg': {'layer': 'Mamba2', 'dt_limit': [0, 1]}}, None, 'ssm_cfg.dt_limit=[0, 1] is not computed here'),
        ({'attn_layer_idx': [1]}, None, 'attn_layer_idx=[1] places attention'),
        ({'n_layer': 2.5}, None, 'n_layer=2.5 must be a whole number'),
        ({'rms_norm': False}, None, 'rms_norm=false is not computed here'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(tmp_path, capsys, changes, change, message):
    tensors = oracle.random_tensors(np.random.default_rng(0), **SIZES)
    if change:
        change(tensors)
    write(tmp_path / 'published', tensors, **changes)
    assert convert.main(['import', f'--source={tmp_path / "published"}', f'--workdir={tmp_path / "run"}']) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / 'run').exists()


# ---- files of torch.save -----------------------------------------------------


def test_a_torch_file_is_read_by_name(tmp_path):
    tensors = {
        'a': np.arange(6, dtype=np.float32).reshape(2, 3),
        'b': np.arange(4).astype(ml_dtypes.bfloat16),
        'turned': np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    }
    tensors['tied'] = tensors['a']
    write_torch(tmp_path / 'x.bin', tensors)
    with TorchFile(tmp_path / 'x.bin') as file:
        assert file.keys() == list(tensors)
        assert file.get_slice('b').get_dtype() == 'BF16' and file.get_slice('a').get_shape() == [2, 3]
        for name in ('a', 'b', 'tied'):
            np.testing.assert_array_equal(file.get_tensor(name), tensors[name])
        # Of a view: strides count elements of the storage.
        assert file.get_tensor('turned').shape == (2, 3)


class Evil:
    def __reduce__(self):
        return print, ('never',)


@pytest.mark.parametrize(
    'content, message',
    [
        (pickle.dumps({'a': Evil()}), 'it holds builtins.print, which is no tensor'),
        (pickle.dumps({'a': 3}), 'it holds more than a dictionary of tensors'),
        (b'', 'it is no file of torch.save'),
        (b'\x80\x02garbage', 'it is no file of torch.save'),
    ],
)
def test_a_torch_file_runs_nothing(tmp_path, capsys, content, message):
    with zipfile.ZipFile(tmp_path / 'x.bin', 'w') as archive:
        archive.writestr('x/data.pkl', content)
    with pytest.raises(TorchFileError, match=message):
        TorchFile(tmp_path / 'x.bin')
    assert 'never' not in capsys.readouterr().out
    (tmp_path / 'x.bin').write_bytes(b'not a zip')
    with pytest.raises(TorchFileError, match='no file of torch.save'):
        TorchFile(tmp_path / 'x.bin')
