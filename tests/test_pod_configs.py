"""What the compiled step sends between devices and needs of their memory, held against the lower bounds.

On eight virtual CPU devices with every push; small and with the real TPU compiler where it is installed
(tests/test_plan.py); every file of configs/pods with the real TPU compiler behind a marker:

  pip install -e .[tpu] && python -m pytest -m tpu_compile_full tests/test_pod_configs.py
"""

import collections
import functools
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from small import small_config

from pallas_kernels.hlo import parse
from transxssm_jax import config as config_lib
from transxssm_jax.parallel import mesh
from transxssm_jax.planning import roofline
from transxssm_jax.planning.hlo import collectives
from transxssm_jax.training import step

ROOT = pathlib.Path(__file__).parents[1]
BUDGET = 1.15  # bytes sent, over the least
PODS = {
    '1p3b_v5e_256': 'v5e:16x16',
    '1p3b_v6e_256': 'v6e:16x16',
    '1p3b_v5p_128': 'v5p:4x4x4',
    '1p3b_1m_v5p_128': 'v5p:4x4x4',
    '1p3b_h200_8': 'h200:8',
}


@functools.cache
def compiled(**overrides):
    """(config, mesh sizes, collectives) of the train step on eight CPU devices."""
    small = dict(model_num_layers=4, model_attention_period=2, model_attention_offset=1, model_remat='full')
    config = small_config(**small | overrides)
    device_mesh = mesh.build(config)
    shardings, batch_sharding = step.state_shardings(config, device_mesh), step.batch_sharding(device_mesh)
    shape = (config.data.global_batch, config.data.seq_len)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding)
        for name in ('tokens', 'targets', 'segment_ids', 'positions')
    }
    with jax.set_mesh(device_mesh):
        lowered = jax.jit(
            step.train_step(config),
            donate_argnums=0,
            in_shardings=(shardings, batch_sharding),
            out_shardings=(shardings, None),
        ).lower(step.abstract_state(config, device_mesh), batch)
    return config, dict(device_mesh.shape), collectives(parse(lowered.compile().as_text()))


def sent(found, sizes):
    """Bytes sent per step by (kind, axes)."""
    total = collections.Counter()
    for c in found:
        total[c.kind, c.axes(sizes)] += c.runs * c.comm_bytes
    return total


MESHES = [
    dict(mesh_data=2, mesh_fsdp=4),
    dict(mesh_data=1, mesh_fsdp=4, mesh_context=2),
    dict(mesh_data=2, mesh_fsdp=4, train_accumulation_steps=2, data_global_batch=16),
]


@pytest.mark.parametrize('axes', MESHES, ids=str)
def test_only_parameters_are_gathered(axes):
    """Twice a microbatch, in the model's dtype (float32 here): no activations, and no optimizer state, whatever its dtype."""
    config, sizes, found = compiled(**axes)
    split = [size for size, names in roofline._leaves(config, sizes) if 'fsdp' in names]
    f = sizes['fsdp']
    gathers = sent(found, sizes)['all-gather', ('fsdp',)]
    everything = config.train.num_microbatches * 2 * 4 * sum(split) * (f - 1) / f
    # The embedding is looked up and is the head; the compiler may gather it for both, and all microbatches, once.
    embedding = 4 * config.model.vocab_size * config.model.d_model * (f - 1) / f
    assert everything - (2 * config.train.num_microbatches - 1) * embedding <= gathers <= everything
    # Along other axes nothing is gathered but the decays and ids at the borders of a row's shards.
    others = sum(
        size for (kind, names), size in sent(found, sizes).items() if kind == 'all-gather' and names != ('fsdp',)
    )
    assert others <= 0.01 * gathers


def test_kept_parameters_are_gathered_once():
    config, sizes, found = compiled(mesh_data=2, mesh_fsdp=4, model_remat='none')
    in_bfloat16 = roofline.min_comm_bytes(config, sizes)['parameters']
    assert sent(found, sizes)['all-gather', ('fsdp',)] == 2 * in_bfloat16  # the model's dtype is float32


@pytest.mark.parametrize('axes', MESHES, ids=str)
def test_gradients_are_scattered_and_summed_over_the_rest_once(axes):
    config, sizes, found = compiled(**axes)
    split = sum(size for size, names in roofline._leaves(config, sizes) if 'fsdp' in names)
    f, others = sizes['fsdp'], sizes['data'] * sizes['context']
    total = sent(found, sizes)
    scatters = total['reduce-scatter', ('fsdp',)]
    # Of the embedding once as a table and once as the head.
    embedding = config.model.vocab_size * config.model.d_model
    assert scatters == pytest.approx(config.train.num_microbatches * 4 * (split + embedding) * (f - 1) / f, rel=1e-6)
    sums = [c for c in found if c.kind == 'all-reduce' and {'data', 'context'} & set(c.axes(sizes))]
    big = sum(c.runs * c.comm_bytes for c in sums if c.operand_bytes > 4096)
    assert big == pytest.approx(2 * 4 * split / f * (others - 1) / others, rel=0.15)
    assert all(c.runs == 1 for c in sums if c.operand_bytes > 4096), 'once a step, also under accumulation'


def test_what_travels_along_a_row_is_states_keys_and_values():
    config, sizes, found = compiled(**MESHES[1])
    permuted = sum(c.runs * c.comm_bytes for c in found if c.kind == 'collective-permute')
    assert {c.axes(sizes) for c in found if c.kind == 'collective-permute'} == {('context',)}
    model, tokens = config.model, config.tokens_per_step // 8
    activations = tokens * model.d_model * 4
    # A shard of one row of a layer's activations would be sent for every layer; the states and K, V are less.
    assert 0 < permuted < 2 * model.num_layers * activations * 3


# ---- every pod, with the TPU compiler --------------------------------------


def test_every_pod_has_its_test():
    assert {path.stem for path in (ROOT / 'configs' / 'pods').glob('*.py')} == set(PODS)


@pytest.mark.parametrize('name', PODS)
def test_a_pod_takes_its_sizes_from_the_run(name):
    config = config_lib.load(ROOT / 'configs' / 'pods' / f'{name}.py')
    base = config_lib.load(ROOT / 'configs' / '1p3b.py')
    changed = set(config_lib.differences(config, base))
    assert {name for name in changed if not name.startswith('mesh.')} <= {
        'model.remat',
        'train.accumulation_steps',
        'train.loss_chunk_tokens',
        'data.seq_len',
        'data.global_batch',
    }
    assert config.tokens_per_step == 2**21
    devices = {'h200:8': 8}.get(PODS[name], math.prod(map(int, PODS[name].partition(':')[2].split('x'))))
    sizes = mesh.axis_sizes(config, devices)
    assert config.model.d_model // sizes['fsdp'] % 128 == 0, 'shards of whole tiles'


@pytest.mark.parametrize('name', PODS)
def test_the_page_says_what_the_file_says(name):
    page, text = (ROOT / 'docs' / 'pods.md').read_text(), (ROOT / 'configs' / 'pods' / f'{name}.py').read_text()
    needed, usable = re.search(r'([\d.]+) of ([\d.]+) GiB', text).groups()
    assert f'| {needed} | {usable} |' in page or f'{needed} of {usable} GiB' in page


def test_a_config_starts_from_another(tmp_path):
    (tmp_path / 'pods').mkdir()
    (tmp_path / 'base.py').write_text(
        'from transxssm_jax.config import Config\ndef get_config():\n    return Config()\n'
    )
    pod = tmp_path / 'pods' / '8.py'
    pod.write_text(
        "from transxssm_jax.config import start_from\ndef get_config():\n    c = start_from(__file__, '../base.py')\n"
        '    c.mesh.data = 8\n    return c\n'
    )
    assert config_lib.load(pod).mesh.data == 8
    pod.write_text(pod.read_text().replace('base', 'bass'))
    with pytest.raises(config_lib.ConfigError, match=r'8.py, line 3: .*bass.py: no such file'):
        config_lib.load(pod)


@pytest.mark.tpu_compile_full
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu (pip install -e .[tpu])')
@pytest.mark.parametrize('name', [name for name, topology in PODS.items() if not topology.startswith('h200')])
def test_a_pod_fits_and_sends_little_more_than_the_least(name):
    path = ROOT / 'configs' / 'pods' / f'{name}.py'
    command = [sys.executable, '-m', 'transxssm_jax.plan', f'--config={path}', f'--topology={PODS[name]}', '--json']
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result['fits'] and result['peak_bytes'] < result['usable_bytes'] and result['loops_without_trips'] == 0
    assert result['comm_bytes'] <= BUDGET * sum(result['min_comm_bytes'].values())
    rows = result['collectives']
    least = result['min_comm_bytes']
    gathered = sum(row['bytes'] for row in rows if row['kind'] == 'all-gather')
    assert gathered <= 1.02 * least['parameters'], 'parameters, in bfloat16, and nothing else'
    assert {row['dtype'] for row in rows if row['kind'] == 'all-gather' and row['bytes'] > 1e8} <= {'bf16'}
    assert {row['kind'] for row in rows} <= {'all-gather', 'reduce-scatter', 'all-reduce', 'collective-permute'}
    # What plan printed is in the file.
    written = re.search(r'([\d.]+) of ([\d.]+) GiB', path.read_text())
    assert result['peak_bytes'] / 2**30 == pytest.approx(float(written[1]), rel=0.05)
    assert result['usable_bytes'] / 2**30 == pytest.approx(float(written[2]), abs=0.01)
