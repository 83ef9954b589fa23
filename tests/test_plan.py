"""Planning: what is read from compiled programs, what is computed, and the command.

Modules of XLA are read in the forms of the TPU compiler, written out here, and as the CPU compiler
makes them of known collectives. Only the tests of the last section need the TPU compiler.
"""

import functools
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from small import small_config
from test_costs import jaxpr_flops, without_kernels  # noqa: F401  a fixture

from pallas_kernels import chips, hlo
from transxssm_jax import config as config_lib
from transxssm_jax import plan
from transxssm_jax.cli import ExitCode
from transxssm_jax.model import costs, parameters
from transxssm_jax.parallel import mesh
from transxssm_jax.planning import estimate, plan_search, roofline
from transxssm_jax.planning import hlo as planning_hlo
from transxssm_jax.planning import report as report_lib
from transxssm_jax.planning import topology as topology_lib
from transxssm_jax.planning.hlo import Collective, collectives, kernels, step_hbm_bytes
from transxssm_jax.training import gradient, step

ROOT = pathlib.Path(__file__).parents[1]
SIZES = dict(data=2, fsdp=2, context=1, tensor=2)

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='needs libtpu (pip install -e .[tpu])'
)

# Forms of the TPU compiler: a loop whose trips stand in its condition, gathers cut into the steps of fusions, a
# reduction of which each device keeps its part, a transfer that starts and ends, groups by mesh axes.
TPU_MODULE = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_computation.1 (p0: bf16[8,128]) -> bf16[32,128] {
  %p0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[32,128]{1,0} all-gather(%p0), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
}

%async_collective_fusion.2 (p1: bf16[8,128]) -> bf16[32,128] {
  %p1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[32,128]{1,0} all-gather(%p1), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
}

%fused_computation.3 (p3: bf16[8,128]) -> bf16[32,128] {
  %p3 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.3 = bf16[32,128]{1,0} all-gather(%p3), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
}

%all-reduce-scatter.1 (p2: f32[32,128]) -> f32[8,128] {
  %p2 = f32[32,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[32,128]{1,0:T(8,128)} all-reduce(%p2), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[8,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,128}
}

%condition (state: (s32[], bf16[8,128], f32[32,128])) -> pred[] {
  %state = (s32[], bf16[8,128]{1,0}, f32[32,128]{1,0}) parameter(0)
  %trips = s32[] constant(7)
  %counter = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%counter, %trips), direction=LT
}

%body (state.1: (s32[], bf16[8,128], f32[32,128])) -> (s32[], bf16[8,128], f32[32,128]) {
  %state.1 = (s32[], bf16[8,128]{1,0}, f32[32,128]{1,0}) parameter(0)
  %counter.1 = s32[] get-tuple-element(%state.1), index=0
  %shard = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %sums = f32[32,128]{1,0:T(8,128)} get-tuple-element(%state.1), index=2
  %async-collective-start = bf16[32,128]{1,0} fusion(%shard), calls=%fused_computation.1, metadata={op_name="jit(step)/gate_proj"}
  %fusion.2 = bf16[32,128]{1,0} fusion(%shard), kind=kCustom, calls=%async_collective_fusion.2
  %async-collective-done = bf16[32,128]{1,0} fusion(%shard), kind=kCustom, calls=%fused_computation.3
  %async-collective-start.1 = bf16[32,128]{1,0} fusion(%shard), kind=kCustom, calls=%fused_computation.1
  %async-collective-done.1 = bf16[32,128]{1,0} fusion(%shard), kind=kCustom, calls=%fused_computation.3
  %fusion.3 = f32[8,128]{1,0} fusion(%sums), kind=kCustom, calls=%all-reduce-scatter.1
  %rotary_ssd_forward.4 = bf16[8,128]{1,0} custom-call(%shard), custom_call_target="tpu_custom_call"
  ROOT %next = (s32[], bf16[8,128]{1,0}, f32[32,128]{1,0}) tuple(%counter.1, %shard, %sums)
}

ENTRY %main (x: bf16[8,128], y: f32[32,128]) -> f32[32,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[32,128]{1,0:T(8,128)} parameter(1)
  %first = s32[] constant(1)
  %start = (s32[], bf16[8,128]{1,0}, f32[32,128]{1,0}) tuple(%first, %x, %y)
  %loop = (s32[], bf16[8,128]{1,0}, f32[32,128]{1,0}) while(%start), condition=%condition, body=%body
  %rotary_ssd_forward = bf16[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  %permute = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]) collective-permute-start(%x), source_target_pairs={{0,4},{4,0}}
  %done = bf16[8,128]{1,0:T(8,128)(2,1)} collective-permute-done(%permute)
  ROOT %total = f32[32,128]{1,0} all-reduce(%y), replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}, to_apply=%add
}
"""


def test_collectives_of_a_tpu_module():
    found = collectives(hlo.parse(TPU_MODULE))
    shape = dict(data=2, fsdp=4)
    assert [(c.kind, c.axes(shape), c.runs, c.arrays[0]) for c in found] == [
        ('collective-permute', ('data',), 1, ('bf16', (8, 128))),
        ('all-reduce', ('data', 'fsdp'), 1, ('f32', (32, 128))),
        ('all-gather', ('fsdp',), 6, ('bf16', (8, 128))),  # from 1 to 7
        ('all-gather', ('fsdp',), 6, ('bf16', (8, 128))),  # unrolled layers share the number of their channel
        ('reduce-scatter', ('fsdp',), 6, ('f32', (32, 128))),
    ]
    sent = {c.kind: c.comm_bytes for c in found}
    array = 32 * 128
    assert sent == {
        'collective-permute': array / 4 * 2,
        'all-reduce': 2 * 4 * array * 7 / 8,
        'all-gather': 2 * array * 3 / 4,
        'reduce-scatter': 4 * array * 3 / 4,
    }
    assert {c.source for c in found} == {'', 'jit(step)/gate_proj'}
    assert kernels(hlo.parse(TPU_MODULE)) == {'rotary_ssd_forward': 7}, 'six times in the loop, and once'
    assert hlo.unknown_loops(hlo.parse(TPU_MODULE)) == 0
    assert hlo.unknown_loops(hlo.parse(TPU_MODULE.replace('constant(7)', 'parameter(1)'))) == 1


@pytest.mark.parametrize(
    'attributes, groups',
    [
        ('replica_groups={{0,2},{1,3}}, x=1', [[0, 2], [1, 3]]),
        ('replica_groups=[2,2]<=[4]', [[0, 1], [2, 3]]),
        ('replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}', [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ('channel_id=1, source_target_pairs={{0,1},{1,0}}', [[0, 1], [1, 0]]),
        ('replica_groups={}, to_apply=%add', [[0]]),
    ],
)
def test_every_form_of_groups(attributes, groups):
    assert planning_hlo._groups(attributes).tolist() == groups


def test_groups_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match='not read'):
        planning_hlo._groups("replica_groups=mesh['a'=4], device_ids=([4]T(0)) {'a'}")
    with pytest.raises(ValueError, match='not read'):
        planning_hlo._groups('dimensions={0}')


@functools.cache
def cpu_module():
    """A loop of five over known collectives, on a mesh of 2 x 4."""
    device_mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def body(x, _):
        whole = jax.lax.all_gather(x, 'b', tiled=True)
        x = x + jax.lax.psum_scatter(jnp.sin(whole), 'b', tiled=True)
        x = jax.lax.ppermute(x, 'a', [(0, 1), (1, 0)])
        return x + jax.lax.psum(jnp.cos(x), ('a', 'b')), None

    def f(x):
        return jax.lax.scan(body, x, None, length=5)[0]

    sharded = jax.shard_map(
        f, mesh=device_mesh, in_specs=PartitionSpec(('a', 'b')), out_specs=PartitionSpec(('a', 'b')), check_vma=False
    )
    return jax.jit(sharded).lower(jax.ShapeDtypeStruct((8 * 16, 32), jnp.float32)).compile().as_text()


def test_collectives_of_a_cpu_module():
    found = {c.kind: c for c in collectives(hlo.parse(cpu_module()))}
    shape, block = dict(a=2, b=4), 16 * 32 * 4
    assert {kind: (c.axes(shape), c.runs, c.operand_bytes, c.comm_bytes) for kind, c in found.items()} == {
        'all-gather': (('b',), 5, block, 3 * block),
        'reduce-scatter': (('b',), 5, 4 * block, 3 * block),
        'collective-permute': (('a',), 5, block, block),
        'all-reduce': (('a', 'b'), 5, block, 2 * block * 7 / 8),
    }
    assert len(collectives(hlo.parse(cpu_module()))) == 4


def test_a_transfer_between_slices():
    text = """\
ENTRY %main (x: bf16[64,8]) -> bf16[64,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %t = token[] after-all()
  %send = (bf16[64,8]{1,0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, frontend_attributes={TARGET}
  ROOT %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
}
""".replace('TARGET', '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"')
    (found,) = collectives(hlo.parse(text))
    assert (found.kind, found.runs, found.comm_bytes) == ('all-reduce', 1, 64 * 8 * 2)
    assert found.groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]] and found.axes(dict(data=2, fsdp=4)) == ('data',)
    assert roofline.network_seconds(chips.TPUS['v5e'], fake_slices((2, 2), slices=2), [found]) == {
        'DCN': pytest.approx(64 * 8 * 2 / chips.TPUS['v5e'].dcn)
    }
    with pytest.raises(ValueError, match='between slices is not read'):
        collectives(hlo.parse(text.replace('{1,2}x{0:3}', '')))


def test_hbm_bytes_of_a_module():
    text = """\
HloModule m

%scale (p: f32[16,128]) -> f32[16,128] {
  %p = f32[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %twice = f32[16,128]{1,0:T(8,128)} add(%p, %p)
}

ENTRY %main (x: f32[16,128]) -> f32[16,128] {
  %x = f32[16,128]{1,0:T(8,128)} parameter(0)
  %fast = f32[16,128]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%scale
  ROOT %y = f32[16,128]{1,0:T(8,128)} fusion(%fast), kind=kLoop, calls=%scale
}
"""
    assert step_hbm_bytes(hlo.parse(text), {}) == 2 * 16 * 128 * 4, (
        'read once, written once; what stays in VMEM is not counted'
    )


# ---- what is computed ------------------------------------------------------


def test_min_bytes_of_fsdp_are_three_times_the_parameters():
    config = small_config(model_dtype='bfloat16', model_remat='matmuls')
    sizes = dict(data=1, fsdp=4, context=1, tensor=1)
    least = roofline.min_comm_bytes(config, sizes)
    split = sum(size for size, axes in roofline._leaves(config, sizes) if 'fsdp' in axes)
    whole = parameters.count_params(config.model) - split
    assert split > 0.9 * parameters.count_params(config.model)
    assert least['parameters'] == 2 * 2 * split * 3 / 4
    assert least['gradients'] == 2 * split * 3 / 4 + 2 * 4 * whole * 3 / 4, 'norms and the like in float32'
    assert least['activations'] == least['states'] == least['keys_values'] == 0
    kept = roofline.min_comm_bytes(small_config(model_dtype='bfloat16', model_remat='none'), sizes)
    assert kept == least | {'parameters': least['parameters'] / 2}, 'gathered weights stay for the backward pass'
    settings = dict(model_dtype='bfloat16', model_remat='matmuls', train_accumulation_steps=2)
    twice = roofline.min_comm_bytes(small_config(**settings), sizes)
    assert twice == least | {'parameters': 2 * least['parameters']}, 'gradients travel once a step'


def test_min_bytes_of_tensor_and_context():
    config = small_config(model_dtype='bfloat16')
    model, tokens = config.model, config.tokens_per_step
    tensor = roofline.min_comm_bytes(config, dict(data=1, fsdp=1, context=1, tensor=2))
    # Of S bytes, gathered or scattered over n devices, each sends S (n - 1) / n: mixer and MLP, both ways, forward and
    # backward; embedding and head. remat='none' sends nothing again.
    assert tensor['activations'] == (8 * model.num_layers + 4) * tokens * model.d_model * 2 / 2
    again = {'full': 3, 'hybrid': 3, 'dots': 3, 'matmuls': 2}
    for remat, more in again.items():
        changed = roofline.min_comm_bytes(
            small_config(model_dtype='bfloat16', model_remat=remat), dict(data=1, fsdp=1, context=1, tensor=2)
        )
        assert changed['activations'] == tensor['activations'] * (
            1 + more * model.num_layers / (8 * model.num_layers + 4)
        )
    context = roofline.min_comm_bytes(config, dict(data=1, fsdp=1, context=4, tensor=1))
    assert context['keys_values'] == 2 * 3 * (2 + 2 + 4) * 2 * tokens / 4 * model.num_kv_heads * model.head_dim
    assert (
        context['states'] == 6 * 2 * 2 * config.data.global_batch * model.num_heads * model.head_dim * model.d_state * 4
    )


@pytest.mark.parametrize('remat', [*costs.REMAT, '3xhybrid,5xnone', '3xfull,5xhybrid'])
def test_executed_work_is_that_of_the_traced_step(without_kernels, remat):  # noqa: F811
    config = small_config(model_remat=remat, optimizer_z_loss=0.0)
    params = jax.eval_shape(lambda: parameters.init_params(config.model, 0))
    shape = (config.data.global_batch, config.data.seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ('tokens', 'targets', 'segment_ids', 'positions')}
    jaxpr = jax.make_jaxpr(gradient.summed_gradient(config))(params, batch).jaxpr
    model, L = config.model, config.data.seq_len
    # The kernels are replaced by stubs without products: three runs of theirs, and those that remat adds.
    kernels = sum(
        (3 + (policy in ('full', 'dots'))) * costs.costs_of(model, kind).kernel_flops(costs.row_attended(L))
        for kind, policy in zip(model.layer_pattern * model.num_periods, model.remat_of_layers, strict=True)
    )
    executed = roofline.executed_flops_per_token(config, dict(data=1, fsdp=1, context=1, tensor=1)) - kernels
    assert jaxpr_flops(jaxpr) == pytest.approx(config.tokens_per_step * executed, rel=1e-6)


def test_min_memory_counts_the_state_of_a_shard():
    config = small_config()
    one = roofline.min_memory_bytes(config, dict.fromkeys(mesh.AXES, 1))
    assert one['state'] == 12 * parameters.count_params(config.model)
    eight = roofline.min_memory_bytes(config, dict(data=1, fsdp=8, context=1, tensor=1))
    assert one['state'] / 8 < eight['state'] < one['state'] / 7
    weights = {n: parameters.count_params(config.model) if n == 1 else 8 * eight['state'] / 12 for n in (1, 8)}
    assert eight['saved'] - 4 * weights[8] == (one['saved'] - 4 * weights[1]) / 8, "'none' keeps gathered weights"
    saved = [
        roofline.min_memory_bytes(small_config(model_remat=remat), dict.fromkeys(mesh.AXES, 1))['saved']
        for remat in ('full', 'hybrid', 'dots', 'matmuls', 'none')
    ]
    assert saved == sorted(saved) and len(set(saved)) == len(saved)


ONE = dict.fromkeys(mesh.AXES, 1)
SCAN, TWICE = dict(model_layer_loop='scan'), dict(train_accumulation_steps=2)
TRANSFORMER = dict(model_attention_period=1, model_attention_offset=0)


def measured(config, rows, length, **settings):
    changed = {'data.global_batch': rows, 'data.seq_len': length, 'train.accumulation_steps': 1}
    changed |= {name.replace('_', '.', 1): value for name, value in settings.items()}
    return config_lib.load(ROOT / 'configs' / f'{config}.py', changed)


@pytest.mark.parametrize(
    'config, chip, seconds',
    [
        (measured('1p3b', 8, 4096, **SCAN, model_remat='hybrid'), 'h200', 0.632),
        (measured('1p3b', 8, 4096, **SCAN, model_remat='dots'), 'h200', 0.588),
        (measured('1p3b', 8, 4096, **SCAN, model_remat='hybrid'), 'h100', 0.677),
        (measured('1p3b', 8, 4096, **SCAN, **TRANSFORMER, model_remat='hybrid'), 'h200', 0.690),
        (measured('320m', 32, 2048, **SCAN, model_remat='hybrid'), 'h200', 0.3855),
        (measured('1p3b', 8, 4096, **TWICE, model_remat='matmuls'), 'h100', 0.5506),
        (measured('1p3b', 32, 4096, model_remat='matmuls', train_accumulation_steps=8), 'h100', 2.147),
        (measured('1p3b', 8, 4096, **TWICE, **TRANSFORMER, model_remat='matmuls'), 'h100', 0.6337),
        (measured('320m', 32, 2048, **TWICE, model_remat='matmuls'), 'h100', 0.3254),
    ],
)
def test_expected_time_is_that_of_measured_steps(config, chip, seconds):
    expected = estimate.expected_seconds(config, ONE, chips.GPUS[chip], 0.0)
    assert sum(expected.values()) == pytest.approx(seconds, rel=0.06)


@pytest.mark.parametrize('devices, remat, seconds', [(2, 'none', 0.6206), (4, 'matmuls', 0.768)])
def test_expected_time_over_tensor_is_that_of_measured_steps(devices, remat, seconds):
    """Rows in two halves hide a part of what is sent; in one piece, nothing does."""
    chip, sizes = chips.GPUS['h100'], ONE | {'tensor': devices}
    config = measured('1p3b', 8 * devices, 4096, model_remat=remat)
    network = sum(roofline.min_comm_bytes(config, sizes).values()) / roofline.all_links(chip)
    expected = estimate.expected_seconds(config, sizes, chip, network)
    assert sum(expected.values()) == pytest.approx(seconds, rel=0.06)
    assert expected['network'] == pytest.approx(0.5 * network / estimate.NETWORK_EFFICIENCY)
    odd = estimate.expected_seconds(measured('1p3b', 1, 4096, model_remat=remat), sizes, chip, network)
    assert odd['network'] == network / estimate.NETWORK_EFFICIENCY


@pytest.mark.parametrize('axis, efficiency', [('data', 0.986), ('fsdp', 0.976)])
def test_expected_scaling_is_that_of_measured_meshes(axis, efficiency):
    """Four GPUs with 8 rows each, against one: the network's share."""
    chip, sizes = chips.GPUS['h100'], ONE | {axis: 4}
    alone = sum(estimate.expected_seconds(measured('1p3b', 8, 4096, **SCAN), ONE, chip, 0.0).values())
    config = measured('1p3b', 32, 4096, **SCAN)
    network = sum(roofline.min_comm_bytes(config, sizes).values()) / roofline.all_links(chip)
    assert alone / sum(estimate.expected_seconds(config, sizes, chip, network).values()) == pytest.approx(
        efficiency, abs=0.05
    )


@pytest.mark.parametrize(
    'loop, tensor, rows, length, remat, temporaries, tolerance',
    [
        ('scan', 1, 8, 4096, 'hybrid', 52, 0.05),
        ('scan', 1, 8, 4096, 'dots', 68, 0.05),
        ('scan', 1, 1, 65536, 'hybrid', 97, 0.05),
        ('scan', 1, 1, 65536, 'full', 55, 0.3),
        ('unrolled', 1, 8, 4096, 'hybrid', 28.0, 0.1),
        ('unrolled', 1, 8, 4096, 'matmuls', 50.2, 0.1),
        ('unrolled', 1, 8, 4096, 'none', 63.8, 0.1),
        ('unrolled', 1, 1, 65536, 'hybrid', 48.2, 0.1),
        ('unrolled', 1, 1, 65536, 'full', 19.4, 0.25),
        ('unrolled', 4, 32, 4096, 'matmuls', 45.3, 0.05),
        ('unrolled', 4, 32, 4096, 'none', 79.9, 0.05),
        ('unrolled', 4, 8, 4096, 'matmuls', 12.2, 0.05),
    ],
)
def test_expected_memory_is_that_of_measured_steps(loop, tensor, rows, length, remat, temporaries, tolerance):
    config, sizes = measured('1p3b', rows, length, model_remat=remat, model_layer_loop=loop), ONE | {'tensor': tensor}
    state = roofline.min_memory_bytes(config, sizes)['state']
    expected = (estimate.expected_memory_bytes(config, sizes, chips.GPUS['h200']) - state) / 1e9
    assert expected == pytest.approx(temporaries, rel=tolerance)


@pytest.mark.parametrize('path', sorted((ROOT / 'configs' / 'pods').glob('*v*.py')), ids=lambda path: path.stem)
def test_expected_memory_is_that_of_the_steps_compiled_for_tpus(path):
    config = config_lib.load(path)
    topology = re.search(r'--topology=(v\w+:\w+)', path.read_text())[1]
    sizes = mesh.axis_sizes(config, topology_lib.Topology(topology, 1).num_devices)
    peak = float(re.search(r'([\d.]+) of [\d.]+ GiB', path.read_text())[1])
    expected = estimate.expected_memory_bytes(config, sizes, chips.CHIPS[topology.partition(':')[0]])
    assert expected / chips.GIB == pytest.approx(peak, rel=0.07)


@pytest.mark.parametrize('name, topology, peak', [('1p3b_v5e_256', 'v5e:16x16', 7.50), ('1p3b_v6e_256', 'v6e:16x16', 7.88),
                                                  ('1p3b_v5p_128', 'v5p:4x4x4', 26.69),
                                                  ('1p3b_1m_v5p_128', 'v5p:4x4x4', 35.24)])  # fmt: skip
def test_and_that_of_scanned_layers(name, topology, peak):
    settings = {'model.layer_loop': 'scan', 'model.remat': 'hybrid', 'train.loss_chunk_tokens': 2048}
    config = config_lib.load(ROOT / 'configs' / 'pods' / f'{name}.py', settings)
    sizes = mesh.axis_sizes(config, topology_lib.Topology(topology, 1).num_devices)
    expected = estimate.expected_memory_bytes(config, sizes, chips.CHIPS[topology.partition(':')[0]])
    assert expected / chips.GIB == pytest.approx(peak, rel=0.07)


def fake_slices(shape, slices=1):
    """Stand-ins for the devices of TPU slices, in the order of their coordinates."""
    coords = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=1)
    return np.array(
        [
            types.SimpleNamespace(coords=(*map(int, c), *(0,) * (3 - len(shape))), slice_index=s)
            for s in range(slices)
            for c in coords
        ]
    )


def gather(groups, kind='all-gather'):
    return Collective(kind, (('bf16', (1000,)),), np.array(groups), 3, '')


def test_seconds_along_rings_lines_and_between_slices():
    chip = chips.TPUS['v5e']
    pod = fake_slices((16, 16)).reshape(16, 16)
    rows = np.arange(256).reshape(16, 16)
    # A ring of 16: both of its links at once. Half of it is a line, whose end has one.
    assert roofline.network_seconds(chip, pod, [gather(rows)]) == {
        'ICI y': pytest.approx(3 * 2000 * 15 / (2 * chip.link))
    }
    assert roofline.network_seconds(chip, pod, [gather(rows[:, :8])]) == {
        'ICI y': pytest.approx(3 * 2000 * 7 / chip.link)
    }
    both = roofline.network_seconds(chip, pod, [gather(rows.reshape(1, -1))])
    assert both == {f'ICI {axis}': pytest.approx(3 * 2000 * 255 / (4 * chip.link)) for axis in 'xy'}
    shift = gather([[i, (i + 16) % 256] for i in range(256)], 'collective-permute')
    assert roofline.network_seconds(chip, pod, [shift]) == {'ICI x': pytest.approx(3 * 2000 / chip.link)}
    # A small slice does not wrap around.
    assert roofline.network_seconds(chip, fake_slices((4, 4)), [gather(np.arange(16).reshape(4, 4))]) == {
        'ICI y': pytest.approx(3 * 2000 * 3 / chip.link)
    }
    # Two slices: gathered within each, so that a device's own share crosses once.
    two = roofline.network_seconds(chip, fake_slices((4, 4), slices=2), [gather([[0, 1, 2, 3, 16, 17, 18, 19]])])
    assert two['DCN'] == pytest.approx(3 * 2000 / chip.dcn)
    assert two['ICI y'] == pytest.approx(3 * 2000 * 8 * 3 / 4 / chip.link)
    alone = roofline.network_seconds(chip, fake_slices((4, 4), slices=2), [gather([[i, i + 16] for i in range(16)])])
    assert alone == {'DCN': pytest.approx(3 * 2000 / chip.dcn)}
    gpus = np.array([types.SimpleNamespace() for _ in range(8)])
    assert roofline.network_seconds(chips.GPUS['h200'], gpus, [gather([list(range(8))])]) == {
        'NVLink': pytest.approx(3 * 2000 * 7 / 450e9)
    }


def test_both_devices_of_a_chip_share_its_links():
    one, two = chips.TPUS['v5p'], chips.TPUS['tpu7x']
    pod, groups = fake_slices((4, 4, 4)), gather(np.arange(64).reshape(16, 4))
    assert one.link == two.link and two.chip_devices == 2
    assert (
        roofline.network_seconds(two, pod, [groups])['ICI z']
        == 2 * roofline.network_seconds(one, pod, [groups])['ICI z']
    )


# ---- chips -----------------------------------------------------------------


@pytest.mark.parametrize('name', chips.CHIPS)
def test_a_chip_is_plausible(name):
    chip = chips.CHIPS[name]
    assert 1e14 < chip.peak < 3e15 and 5e11 < chip.bandwidth < 1e13
    assert 10 * chips.GIB < chip.usable <= chip.hbm * 1.01
    assert all(chips.name_of(kind) == name for kind in chip.kinds)
    # A link of the pod is slower than memory, and the network of the data centre slower than that.
    assert chip.dcn < roofline.all_links(chip) < chip.bandwidth


def test_only_a_whole_kind_names_a_chip():
    kinds = [kind for chip in chips.CHIPS.values() for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)
    assert chips.name_of('NVIDIA H200') == 'h200' and chips.name_of('NVIDIA H200 NVL') == 'h200-nvl'
    assert chips.GPUS['h200-nvl'].peak < chips.GPUS['h200'].peak
    assert chips.name_of('NVIDIA H200 of another kind') == chips.name_of('NVIDIA') == chips.name_of('cpu') == ''


# ---- the command -----------------------------------------------------------


@pytest.mark.parametrize(
    'topology, message',
    [
        ('v9:2x2', 'not a known chip'),
        ('v5e', 'must be CHIP:SHAPE'),
        ('v5e:16', 'has 2 dimensions'),
        ('v5p:4x4', 'has 3 dimensions'),
        ('v5e:0x4', 'must be CHIP:SHAPE'),
        ('h200:2x4', 'has 1 dimensions'),
        ('h200:16', '--topology=h200:8 --slices=2'),
    ],
)
def test_wrong_topologies(topology, message, capsys):
    assert plan.main([f'--config={ROOT}/configs/1p3b.py', f'--topology={topology}']) == ExitCode.WRONG_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], '--topology=CHIP:SHAPE is missing'),
        (['--topology=h200:8', '--config.mesh.fsdp=3'], 'must multiply to the 8 devices'),
        (
            ['--topology=h200:8', '--config.mesh.data=1', '--config.mesh.fsdp=8', '--config.data.global_batch=12'],
            'divisible by 8',
        ),
        (['--topology=h200:8', '--config.model.depth=3'], 'unknown setting'),
    ],
)
def test_wrong_input(arguments, message, capsys):
    assert plan.main([f'--config={ROOT}/configs/1p3b.py', *arguments]) == ExitCode.WRONG_INPUT
    assert message in capsys.readouterr().err


def test_a_gpu_host_is_computed_and_labelled_so(capsys):
    arguments = [f'--config={ROOT}/configs/pods/1p3b_h200_8.py', '--topology=h200:8']
    assert plan.main(arguments) == ExitCode.FINISHED
    text = capsys.readouterr().out
    assert 'not compiled' in text and text.endswith('it may fit\n') and '8 devices, fsdp 8' in text
    assert 'no step can take less than' in text and 'efficiencies measured on H100 and H200' in text
    assert plan.main([*arguments, '--json']) == ExitCode.FINISHED
    result = json.loads(capsys.readouterr().out)
    assert result['compiled'] is False and result['parameters'] == pytest.approx(1.3e9, rel=0.01)
    work = 6 * result['parameters'] * result['tokens_per_step'] / 8
    assert work < result['model_flops'] < 1.12 * work and result['executed_flops'] == result['model_flops']
    assert result['bound_seconds'] == max(result['seconds'].values())
    assert result['bound_mfu'] == pytest.approx(result['model_flops'] / 989e12 / result['bound_seconds'])
    assert result['expected_seconds'] == pytest.approx(sum(result['expected_by'].values())) and 'nearest' not in result
    # One H100 alone ran smaller microbatches at 50% MFU; an H200 has faster memory.
    assert 0.5 < result['expected_mfu'] < 0.6 < result['bound_mfu'] <= 1


def test_hosts_are_slices(capsys):
    arguments = [f'--config={ROOT}/configs/pods/1p3b_h200_8.py', '--topology=h200:8']
    assert plan.main([*arguments, '--slices=2', '--config.mesh.data=2', '--json']) == ExitCode.FINISHED
    result = json.loads(capsys.readouterr().out)
    assert result['devices'] == 16 and result['slices'] == 2
    # An eighth of the gradients, there and back, half of which crosses, in float32 because of the microbatches.
    assert result['gradient_dtypes']['data'] == 'float32'
    assert result['seconds']['DCN'] == pytest.approx(2 * 4 * result['parameters'] / 8 / 2 / 50e9, rel=0.01)


def h200_plan(capsys, *settings):
    """(exit code, lines, result) of the plan of eight H200."""
    arguments = [f'--config={ROOT}/configs/pods/1p3b_h200_8.py', '--topology=h200:8', *settings]
    code = plan.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert plan.main([*arguments, '--json']) == code
    return code, lines, json.loads(capsys.readouterr().out)


def test_the_price_of_a_gradients_dtype_is_printed(capsys):
    arguments = [f'--config={ROOT}/configs/1p3b.py', '--topology=h200:8', '--slices=8', '--config.mesh.data=1']
    arguments += ['--config.mesh.fsdp=64']
    assert plan.main([*arguments, '--json']) == ExitCode.FINISHED
    result = json.loads(capsys.readouterr().out)
    assert result['gradient_dtypes']['fsdp'] == 'float32', '64 members'
    total = {dtype: sum(sizes.values()) for dtype, sizes in result['gradient_bytes_in'].items()}
    assert sum(result['gradient_bytes'].values()) == total['float32'] == result['min_comm_bytes']['gradients']
    assert total['bfloat16'] == pytest.approx(total['float32'] / 2, rel=1e-3)
    assert plan.main([*arguments, '--config.train.gradient_dtype_fsdp=bfloat16']) == ExitCode.FINISHED
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('  gradients'))
    assert f'{total["bfloat16"] / 1e6:,.0f} MB of it, summed over fsdp in bfloat16; over all axes in' in line
    assert f'float32 {total["float32"] / 1e6:,.0f}' in line


def test_what_cannot_fit_ends_with_3_and_with_the_nearest_that_fits(capsys):
    code, lines, result = h200_plan(capsys, '--config.train.accumulation_steps=1', '--config.model.remat=none')
    assert code == ExitCode.DOES_NOT_FIT and lines[-1] == 'it does not fit' and lines[-2].startswith('nearest fit ')
    overrides = result['nearest']['overrides']
    assert overrides in lines[-2] and len(overrides.split()) == 1, 'one setting is enough'
    code, lines, nearest = h200_plan(
        capsys, '--config.train.accumulation_steps=1', '--config.model.remat=none', overrides
    )
    assert code == ExitCode.FINISHED and lines[-1] == 'it may fit' and 'nearest' not in nearest
    assert nearest['expected_memory_bytes'] == pytest.approx(result['nearest']['expected_memory_bytes'])
    assert nearest['expected_seconds'] == pytest.approx(result['nearest']['expected_seconds'], rel=0.01)


def test_where_nothing_fits_a_larger_topology_is_asked_for(capsys):
    settings = ['--config.data.seq_len=4194304', '--config.data.global_batch=8', '--config.train.accumulation_steps=1']
    code, lines, result = h200_plan(capsys, *settings)
    assert code == ExitCode.DOES_NOT_FIT and result['nearest'] == {} and 'take a larger --topology' in lines[-2]


def test_what_fits_by_the_bound_alone_is_not_promised(capsys):
    code, lines, result = h200_plan(capsys, '--config.train.accumulation_steps=1', '--config.model.remat=hybrid')
    assert sum(result['min_memory_bytes'].values()) < result['usable_bytes'] < result['expected_memory_bytes']
    assert code == ExitCode.FINISHED and lines[-1] == 'it may fit by the lower bound, but it is not expected to'
    assert result['nearest']['overrides'] in lines[-2]


def test_a_refused_step_is_judged_by_the_memory_in_the_compilers_message():
    """The message names the memory that the step needs: 17.5 GiB fit after halving the microbatch, 400 never do."""
    settings = {'model.remat': 'full', 'model.layer_loop': 'scan'}
    config = config_lib.load(ROOT / 'configs' / 'pods' / '1p3b_v5e_256.py', settings)
    topology = topology_lib.Topology('v5e:16x16', 1)
    forms = (
        'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used {}G of 15.75G hbm.',
        'RESOURCE_EXHAUSTED: the total memory required for HLO temporaries ({}G) exceeds available HBM (15.75G).',
    )
    for form in forms:
        fits = []
        for used in ('17.5', '400.0'):
            error = topology_lib.DoesNotFitError(form.format(used), ['1.00 MiB  f32[512,512]'])
            result = report_lib.refused_report(config, topology, error)
            text = report_lib.show(result)
            assert not result['fits'] and used in text and 'f32[512,512]' in text and text.endswith('it does not fit')
            fits.append(result['nearest'])
        assert fits[0]['overrides'] == '--config.train.accumulation_steps=2' and fits[1] == {}
    unnumbered = topology_lib.DoesNotFitError('RESOURCE_EXHAUSTED: it does not fit', [])
    assert report_lib.refused_report(config, topology, unnumbered)['nearest']['overrides'] == fits[0]['overrides']


def test_the_table_of_chips(capsys):
    assert plan.main(['--chips']) == ExitCode.FINISHED
    text = capsys.readouterr().out
    assert all(any(line.startswith(name + ' ') for line in text.splitlines()) for name in chips.CHIPS)


def test_help_lists_flags_and_settings(capsys):
    assert plan.main(['--help']) == ExitCode.FINISHED
    text = capsys.readouterr().out
    assert '--budget_minutes=30.0  Time for --search.' in text and '--config.mesh.fsdp=1' in text


def test_the_devices_of_a_topology():
    assert topology_lib.Topology('v5e:4x4', 2).num_devices == 32
    assert topology_lib.Topology('tpu7x:2x2x1', 1).num_devices == 8


@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is not None, reason='libtpu is here; this is about where it is not'
)
def test_without_the_compiler(capsys):
    arguments = [f'--config={ROOT}/configs/pods/1p3b_v5e_256.py', '--topology=v5e:16x16']
    assert plan.main(arguments) == ExitCode.WRONG_INPUT
    assert 'pip install -e .[tpu]' in capsys.readouterr().err


def test_a_stage_that_takes_long_is_announced_again(monkeypatch):
    monkeypatch.setattr(topology_lib, 'REMINDER_SECONDS', 0.0)
    lines, reminded = [], threading.Event()

    def write(line):
        lines.append(line.split('] ')[1])
        if lines.count('still compiling') == 2:
            reminded.set()

    with topology_lib.Progress(write).stage('compiling'):
        assert reminded.wait(600)
    assert lines[0] == 'compiling' and set(lines[1:]) == {'still compiling'}


def test_largest_temporaries_are_what_the_forward_pass_keeps():
    config = small_config(data_global_batch=64)
    device_mesh = mesh.build(config)
    with jax.set_mesh(device_mesh):
        shape = (config.data.global_batch, config.data.seq_len)
        batch = {
            name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ('tokens', 'targets', 'segment_ids', 'positions')
        }
        traced = jax.jit(step.train_step(config)).trace(step.abstract_state(config, device_mesh), batch)
    largest = topology_lib.largest_temporaries(traced.jaxpr.jaxpr)
    # Two periods, two consecutive state-space layers, eight rows per device, what the MLP keeps of 48 tokens.
    assert largest[0].split() == [f'{2 * 2 * 8 * 48 * 96 * 4 / 2**20:.2f}', 'MiB', 'f32[2,2,8,48,96]'], largest
    sizes = [float(line.split()[0]) for line in largest]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 8


# ---- the search ------------------------------------------------------------


def large():
    return config_lib.load(ROOT / 'configs' / '1p3b.py')


def test_candidates_divide_what_they_must_and_may_fit():
    config, chip = large(), chips.TPUS['v5e']
    found = plan_search.candidates(config, chip, 256)
    assert len(found) > 20
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    for candidate in found[:: len(found) // 8]:
        tried = config_lib.load(ROOT / 'configs' / '1p3b.py', candidate.settings)
        sizes = mesh.axis_sizes(tried, 256)  # raises where something does not divide
        assert sum(roofline.min_memory_bytes(tried, sizes).values()) <= chip.usable
        assert (
            candidate.seconds
            >= tried.tokens_per_step / 256 * costs.train_flops_per_token(tried.model, 2048.5) / chip.peak
        )
    assert all(c.settings['mesh.fsdp'] <= 16 for c in found), 'shards of whole tiles'


def test_a_search_compiles_the_most_promising_first_and_stops(tmp_path):
    chip, log = chips.TPUS['v6e'], tmp_path / 'log'
    candidates = plan_search.candidates(large(), chip, 256)
    # The first does not fit; the others take as long as the least time of the third: nothing after it can be faster.
    bound, misfit = candidates[2].seconds, candidates[0].overrides
    script = (
        'import json, sys; line = " ".join(sys.argv[2:]); open(sys.argv[1], "a").write(line + "\\n")\n'
        f'sys.exit(3) if "{misfit}" in line else print(json.dumps(dict(bound_seconds={bound}, bound_mfu=0.5)))'
    )
    found = plan_search.search(
        large(), chip, 256, [sys.executable, '-c', script, str(log)], budget_minutes=1000.0, progress=False
    )
    assert log.read_text().splitlines() == [c.overrides + ' --json' for c in candidates[:2]]
    assert [(result['overrides'], result['bound_seconds']) for result in found] == [(candidates[1].overrides, bound)]
    assert plan_search.search(large(), chip, 256, ['false'], budget_minutes=0.0, progress=False) == []


# ---- with the TPU compiler -------------------------------------------------


@needs_compiler
def test_plan_of_a_small_model_on_a_small_slice():
    arguments = [
        '--config.mesh.data=2',
        '--config.mesh.fsdp=2',
        '--config.data.global_batch=8',
        '--config.data.seq_len=256',
        '--config.model.num_layers=8',
        '--config.model.d_model=256',
        '--config.model.num_heads=4',
        '--config.model.num_kv_heads=2',
        '--config.model.num_ssd_groups=2',
        '--config.model.d_mlp=512',
        '--config.model.vocab_size=1024',
    ]
    command = [
        sys.executable,
        '-m',
        'transxssm_jax.plan',
        f'--config={ROOT}/configs/1p3b.py',
        '--topology=v5e:2x2',
        '--json',
    ]
    run = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == ExitCode.FINISHED, run.stderr[-2000:]
    stages = [line for line in run.stderr.splitlines() if ' s] ' in line and 'still' not in line]
    assert [line.split('] ')[1].split()[0] for line in stages] == ['tracing', 'lowering', 'compiling', 'reading']
    result = json.loads(run.stdout.splitlines()[-1])
    assert result['compiled'] and result['fits'] and result['loops_without_trips'] == 0
    assert 0 < result['argument_bytes'] < result['peak_bytes'] < result['usable_bytes']
    assert {'all-gather', 'reduce-scatter', 'all-reduce'} <= {row['kind'] for row in result['collectives']}
    assert result['hbm_bytes'] > result['argument_bytes']
    assert result['expected_seconds'] > result['bound_seconds'] and 'nearest' not in result
