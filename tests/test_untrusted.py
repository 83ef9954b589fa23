"""What is read is data: no pickle, no eval and no unsafe YAML anywhere; a config file is the only code that runs."""

import ast
import json
import pathlib
import struct

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = [path for package in ('transxssm_jax', 'pallas_kernels') for path in sorted((ROOT / package).rglob('*.py'))]

# Modules whose readers run what they read. torch_files.py reads PyTorch's archives with an unpickler of its own that knows
# nothing but tensors; settings.py runs config files.
UNSAFE_MODULES = {
    'pickle',
    'cPickle',
    '_pickle',
    'dill',
    'cloudpickle',
    'marshal',
    'shelve',
    'joblib',
    'yaml',
    'jsonpickle',
}
UNSAFE_CALLS = {'eval', 'exec', 'compile', '__import__'}
ALLOWED = {
    ('transxssm_jax/pytorch/torch_files.py', 'pickle'): 'an Unpickler whose find_class knows tensors alone',
    ('transxssm_jax/settings.py', 'run_path'): 'a config file is Python by design, named by the user',
}


def findings(path, text=None):
    """(name) of everything in a file that could run what is read."""
    found = set()
    for node in ast.walk(ast.parse(text if text is not None else path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or '']
            found |= {name for name in names if name.partition('.')[0] in UNSAFE_MODULES}
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in UNSAFE_CALLS:
                found.add(function.id)
            if isinstance(function, ast.Attribute) and function.attr in ('exec_module', 'load_module', 'run_path'):
                found.add(function.attr)
            for keyword in node.keywords:
                if keyword.arg == 'allow_pickle' and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    found.add('allow_pickle')
                if keyword.arg == 'shell' and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value):
                    found.add('shell')
                if (
                    keyword.arg == 'weights_only'
                    and isinstance(keyword.value, ast.Constant)
                    and not keyword.value.value
                ):
                    found.add('weights_only')
    return found


@pytest.mark.parametrize(
    'text, name',
    [
        ('import pickle', 'pickle'),
        ('def f():\n    from yaml import load', 'yaml'),
        ('eval(x)', 'eval'),
        ('np.load(p, allow_pickle=True)', 'allow_pickle'),
        ('spec.loader.exec_module(m)', 'exec_module'),
        ('subprocess.run(c, shell=True)', 'shell'),
    ],
)
def test_the_walk_sees(text, name):
    assert findings(None, text) == {name}


def test_the_walk_passes_what_is_safe():
    assert not findings(None, 'np.load(p, allow_pickle=False)\nre.compile(x)\njit(f).lower(x).compile()\nmodel.eval()')


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path):
    name = path.relative_to(ROOT).as_posix()
    assert {found for found in findings(path) if (name, found) not in ALLOWED} == set()


def test_what_is_allowed_is_there():
    assert {(name, found) for name, found in ALLOWED if found in findings(ROOT / name)} == ALLOWED.keys()


# ---- safetensors headers ---------------------------------------------------------


def safetensors(header, body=b'', length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + body


ENTRY = {'dtype': 'F32', 'shape': [2, 2], 'data_offsets': [0, 16]}
BAD = {
    'a header longer than the file': safetensors({'a': ENTRY}, bytes(16), 1 << 40),
    'a header of 2**63 bytes': safetensors({'a': ENTRY}, bytes(16), (1 << 63) + 1),
    'no header': b'',
    'a length alone': struct.pack('<Q', 8),
    'an end beyond the file': safetensors({'a': ENTRY | {'data_offsets': [0, 1 << 40]}}, bytes(16)),
    'a beginning behind the end': safetensors({'a': ENTRY | {'data_offsets': [16, 0]}}, bytes(16)),
    'a negative offset': safetensors({'a': ENTRY | {'data_offsets': [-16, 0]}}, bytes(16)),
    'a shape that is too large': safetensors({'a': ENTRY | {'shape': [1 << 40, 1 << 40]}}, bytes(16)),
    'a shape that is negative': safetensors({'a': ENTRY | {'shape': [-2, -2]}}, bytes(16)),
    'a shape that is no list': safetensors({'a': ENTRY | {'shape': 4}}, bytes(16)),
    'a dtype that is none': safetensors({'a': ENTRY | {'dtype': '__class__'}}, bytes(16)),
    'tensors that overlap': safetensors({'a': ENTRY, 'b': ENTRY}, bytes(16)),
    'a hole between tensors': safetensors({'a': ENTRY, 'b': ENTRY | {'data_offsets': [32, 48]}}, bytes(48)),
    'bytes behind the last': safetensors({'a': ENTRY}, bytes(64)),
    'a header that is a list': safetensors([ENTRY], bytes(16)),
    'a header of deep lists': safetensors(b'[' * 100_000, bytes(16)),
    'no UTF-8': safetensors(b'{"\xff": 1}', bytes(16)),
}


@pytest.mark.parametrize('content', BAD.values(), ids=BAD)
def test_a_safetensors_header_is_checked_against_the_file(content, tmp_path):
    """Of a published model, by the reader of `convert`; and of a local checkpoint."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from transxssm_jax.pytorch import files
    from transxssm_jax.pytorch.fields import ConvertError

    (tmp_path / 'config.json').write_text('{}')
    (tmp_path / 'model.safetensors').write_bytes(content)

    def read_all():
        checkpoint = files.PytorchCheckpoint(tmp_path)
        return [checkpoint.read(name) for name in checkpoint.tensors]

    with pytest.raises(ConvertError) as caught:
        read_all()
    assert '\n' not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises((SafetensorError, OSError, ValueError, KeyError)):
        load_file(tmp_path / 'model.safetensors')


def test_lengths_with_objects_are_not_read(tmp_path):
    """numpy's format can hold pickles."""
    from data_fixtures import run_prepare, texts, write_jsonl

    from transxssm_jax.data.loader import make_loader
    from transxssm_jax.data.manifest import DataError

    data = tmp_path / 'data'
    assert run_prepare(data, write_jsonl(tmp_path / 'train.jsonl', texts(20)), split='train') == 0
    np.save(data / 'train.lengths.npy', np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match='lengths'):
        make_loader(data, 'train', seq_len=16, global_batch=2, seed=0)
