"""The rotary scan's Hopper kernels: lowered for CUDA and interpreted on any machine, and on the GPU itself.

Three kinds of tests run without a GPU: the choice and its errors; Pallas's whole lowering for CUDA of
every form of the kernels; and JAX's interpreter of GPU kernels (threads, barriers, copies,
uninitialised memory) on small shapes, with plain products in place of the accumulating products of
gpu_chunk.py. The marker gpu is on the tests that need a GPU: of the machine code, the layouts, the
asynchronous products and copies.

  JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu tests/test_ssd_gpu.py

Legend: B batch, L length, H heads, G groups, P head width, N state width.
"""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from ssd_oracle import GRADIENTS, relative_error, with_gradients
from test_ssd_kernels import DECAYS, assert_close, draw, needs_8_devices

from pallas_kernels import dispatch
from pallas_kernels.device import Device
from pallas_kernels.ssd import api, gpu, rotary_ssd, rotary_ssd_state, rotary_ssd_step

TOLERANCE = 5e-3
KERNEL = {'implementation': 'mosaic_gpu'}


# ---- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'change, chosen, reason',
    [
        ({}, 'mosaic_gpu', 'the fused kernel'),
        ({'chunk_size': 64}, 'mosaic_gpu', 'the fused kernel'),
        ({'P': 128, 'N': 64}, 'mosaic_gpu', 'the fused kernel'),
        ({'H': 7, 'G': 7}, 'mosaic_gpu', 'the fused kernel'),
        ({'chunk_size': 128}, 'xla', 'chunk_size=128, but its chunks are of 64; leave chunk_size to None'),
        ({'dtype': 'float32'}, 'xla', 'x is float32, but it is for bfloat16; cast x, b and c'),
        ({'P': 96}, 'xla', 'P=96 and N=128, but it is for P a multiple of 64 and N of 64 or 128'),
        ({'N': 256}, 'xla', 'P=64 and N=256'),
        ({'capability': '8.0'}, 'xla', 'has compute capability 8.0, but it is for 9.x (Hopper)'),
        ({'capability': '10.0'}, 'xla', 'has compute capability 10.0'),
        ({'capability': 'gfx942'}, 'xla', 'has compute capability gfx942'),
        ({'capability': ''}, 'xla', 'has compute capability unknown'),
    ],
    ids=str,
)  # fmt: skip
def test_choice(change, chosen, reason, caplog):
    v = {'dtype': 'bfloat16', 'chunk_size': None, 'H': 32, 'P': 64, 'G': 8, 'N': 128, 'capability': '9.0', **change}
    device = Device('gpu', f'kind {change}', v['capability'])
    with caplog.at_level(logging.INFO, logger='pallas_kernels'):
        for _ in range(2):
            shape = (8, 4096, v['H'], v['P'], v['G'], v['N'])
            assert api.OPERATOR.choose(None, api.Call(v['dtype'], v['chunk_size'], shape), device) == chosen
    (record,) = caplog.records  # once
    assert f': {chosen}, ' in record.getMessage() and reason in record.getMessage()


def inputs_of(B=1, L=64, H=2, P=64, G=1, N=128, dtype='bfloat16'):
    """Shapes of (x, dt, a, b, c)."""
    bc = jax.ShapeDtypeStruct((B, L, G, N), dtype)
    x, dt = jax.ShapeDtypeStruct((B, L, H, P), dtype), jax.ShapeDtypeStruct((B, L, H), 'float32')
    return x, dt, jax.ShapeDtypeStruct((H,), 'float32'), bc, bc


class JaxDevice:
    """What the choice asks of a device of JAX."""

    def __init__(self, compute_capability):
        self.device_kind, self.compute_capability = f'GPU {compute_capability}', compute_capability


@pytest.mark.parametrize('capability, kernels', [('9.0', 1), ('8.0', 0), ('10.0', 0)])
def test_none_picks_it_on_hopper(capability, kernels, monkeypatch):
    monkeypatch.setattr(jax, 'local_devices', lambda: [JaxDevice(capability)])
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert count_kernels(rotary_ssd, *inputs_of()) == kernels
    assert count_kernels(rotary_ssd, *inputs_of(N=32)) == 0
    if not kernels:
        with pytest.raises(
            dispatch.UnsupportedError, match=f"'mosaic_gpu' cannot serve.* compute capability {capability}, but"
        ):
            jax.eval_shape(functools.partial(rotary_ssd, **KERNEL), *inputs_of())


def test_refuses():
    """By name, at the call where the arguments show it, at lowering where the platform does."""
    for change, keywords, message in (
        ({'dtype': 'float32'}, {}, 'x is float32, but it is for bfloat16; cast'),
        ({'P': 48}, {}, 'P=48 and N=128, but it is for P a multiple of 64 and N of 64 or 128; use'),
        ({'N': 80}, {}, 'P=64 and N=80, but'),
        ({}, {'chunk_size': 128}, 'chunk_size=128, but its chunks are of 64; leave'),
    ):
        for f, n in ((rotary_ssd, 5), (rotary_ssd_state, 4)):
            with pytest.raises(
                dispatch.UnsupportedError, match="implementation='mosaic_gpu' cannot serve this call: " + message
            ):
                jax.eval_shape(functools.partial(f, **KERNEL, **keywords), *inputs_of(**change)[:n])
    values = [jnp.ones(v.shape, v.dtype) for v in inputs_of(L=4)]
    named = functools.partial(rotary_ssd, **KERNEL)
    for call in (named, jax.jit(named), jax.grad(lambda *v: jnp.sum(named(*v)[1]))):
        with pytest.raises(dispatch.UnsupportedError, match='it is lowered for cpu and runs on NVIDIA GPUs only; use'):
            call(*values)
    with pytest.raises(dispatch.UnsupportedError, match='it is lowered for tpu and runs on NVIDIA GPUs only; use'):
        jax.jit(named).trace(*inputs_of()).lower(lowering_platforms=('tpu',))


def test_refuses_another_platforms_interpreter():
    for implementation, interpret in (
        ('mosaic_gpu', pltpu.InterpretParams()),
        ('mosaic_tpu', plgpu.InterpretGPUParams()),
    ):
        with pytest.raises(
            dispatch.UnsupportedError, match=f"{implementation}' cannot be interpreted with .*; use True or Int"
        ):
            jax.eval_shape(
                functools.partial(rotary_ssd, implementation=implementation, interpret=interpret), *inputs_of()
            )


def test_refuses_to_hang(monkeypatch):
    """JAX's interpreter of GPU kernels waits forever where its warpgroups do not all get a thread."""
    monkeypatch.setenv('NPROC', '7')
    monkeypatch.setattr(jax, 'local_device_count', lambda: 1)
    with pytest.raises(
        dispatch.UnsupportedError, match='CPU client has 7 threads and its warpgroups need 8; set .*NPROC=8'
    ):
        jax.eval_shape(functools.partial(rotary_ssd, **KERNEL, interpret=True), *inputs_of())
    monkeypatch.setenv('NPROC', '8')
    jax.eval_shape(functools.partial(rotary_ssd, **KERNEL, interpret=True), *inputs_of())


# ---- lowered for CUDA ------------------------------------------------------------------------------


def count_kernels(f, *values):
    text = jax.jit(lambda *v: f(*v)).trace(*values).lower(lowering_platforms=('cuda',)).as_text()
    return len(re.findall('custom_call @mosaic_gpu', text))


@functools.partial(jax.jit, static_argnames=('plan', 'interpret', 'implementation'))
def both_ways(arguments, rope, segments, dy, dfinal, *, plan=None, interpret=False, implementation='mosaic_gpu'):
    """Outputs and gradients by name, like `with_gradients` of the oracle. plan: how the work is cut."""

    def f(x, dt, a, b, c, state):
        if plan is None:
            more = {'implementation': implementation, 'interpret': interpret}
            return rotary_ssd(x, dt, a, b, c, rope, segment_ids=segments, initial_state=state, **more)
        run = (
            None if segments is None else jnp.cumsum(jnp.diff(segments, prepend=segments[:, :1]) != 0, 1, dtype='int32')
        )
        tables = None if rope is None else tuple(t if t.ndim == 3 else t[None] for t in rope)
        return gpu.scan_chunks(plan, x, dt, a, b, c, tables, run, state, interpret)

    (y, final), pull = jax.vjp(f, *(arguments[name] for name in GRADIENTS))
    return {'y': y, 'final_state': final, **{'d' + n: g for n, g in zip(GRADIENTS, pull((dy, dfinal)))}}


# name: (row of SHAPES as in test_ssd_kernels.py, kernels forward and backward together)
LOWERED = {
    'pairs of heads of a group': ((2, 130, 4, 64, 1, 128, 2, True), 2),
    'pairs across groups': ((1, 64, 6, 64, 2, 64, 3, False), 2),
    'an odd number of heads': ((1, 64, 3, 64, 3, 128, None, True), 2),
    'wide heads in spans': ((1, 1024, 2, 128, 1, 64, 2, True), 4),
}  # fmt: skip


@pytest.mark.parametrize('name', LOWERED)
def test_lowers_without_a_gpu(name):
    shape, kernels = LOWERED[name]
    assert gpu.default_plan(shape[:6]).spans == kernels // 2
    assert count_kernels(both_ways, *jax.eval_shape(lambda: draw(shape, 'bfloat16'))) == kernels


def scan_loss(*values, f=rotary_ssd, **keywords):
    return sum(jnp.sum(v.astype(jnp.float32)) for v in f(*values, **KERNEL, **keywords))


def test_saved_states_spare_a_second_forward_walk():
    """Under a policy that saves them by name; the loss is linear in y, so that nothing else asks for y again."""
    for policy, kernels in ((jax.checkpoint_policies.save_only_these_names(api.STATES_NAME), 2), (None, 3)):
        loss = jax.checkpoint(scan_loss, policy=policy)
        assert count_kernels(jax.value_and_grad(loss, argnums=range(5)), *inputs_of()) == kernels


def test_states_lower_without_a_gpu():
    """What a shard of a sequence passes on, and its gradient: no y, no c; with spans one walk more."""
    values = inputs_of(H=3, G=1)[:4]
    f = functools.partial(scan_loss, f=rotary_ssd_state)
    assert count_kernels(f, *values) == 1
    assert count_kernels(jax.grad(f, argnums=range(4)), *values) == 2
    assert count_kernels(jax.grad(f, argnums=range(4)), *inputs_of(L=1024)[:4]) == 3


def test_vmap_lowers_without_a_gpu():
    stacked = [jax.ShapeDtypeStruct((3, *v.shape), v.dtype) for v in inputs_of()]
    assert count_kernels(jax.vmap(jax.grad(scan_loss, argnums=range(5))), *stacked) == 2


@needs_8_devices
@pytest.mark.parametrize('check_vma', [True, False])
@pytest.mark.parametrize('groups', [1, 4])
def test_shard_map_lowers_without_a_gpu(groups, check_vma):
    """Rows and heads over devices; one group goes to all of its heads' devices, and its gradient is summed."""
    mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    p = PartitionSpec
    heads = p('data', None, 'tensor')
    of_groups = heads if groups > 1 else p('data')
    specs = (heads, heads, p('tensor'), of_groups, of_groups)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=p(), check_vma=check_vma)
    def sharded(*values):
        return jax.lax.psum(scan_loss(*values), ('data', 'tensor'))

    assert count_kernels(jax.grad(sharded, argnums=range(5)), *inputs_of(B=4, H=8, G=groups)) == 2


# ---- interpreted -----------------------------------------------------------------------------------

# The interpreter's threads wait for each other; where one never comes, end the run rather than hang.
ends = pytest.mark.timeout(400, method='thread')

# name: (row of SHAPES as in test_ssd_kernels.py, spans, decays); da of a few heads: see SEEDS there
INTERPRETED = {
    'two heads a CTA, ragged, segments across chunks': ((1, 130, 2, 64, 1, 128, 2, True), 1, ('usual', 'mixed', 'strong')),
    # Spans of one chunk; a segment starts at the border of two of them.
    'an odd number of heads, spans': ((1, 250, 1, 64, 1, 64, 3, True), 4, ('mixed',)),
    'two groups a CTA, no table': ((1, 60, 2, 64, 2, 64, None, False), 1, ('usual',)),
}  # fmt: skip


@ends
@pytest.mark.parametrize('name', INTERPRETED)
def test_conforms_interpreted(name):
    """Outputs and every gradient. Memory that was never written is NaN, and reads out of bounds raise.

    Races are not looked for: JAX 0.11.2's detector reports one wherever a warpgroup fetches for another, however they wait.
    """
    shape, spans, decays = INTERPRETED[name]
    for decay in decays:
        inputs = draw(shape, 'bfloat16', decay)
        out = both_ways(*inputs, plan=gpu.Plan(spans), interpret=plgpu.InterpretGPUParams())
        assert_close(out, with_gradients(*inputs), TOLERANCE, f'{name}, {decay}')


def passed_on(x, dt, a, b, state, rope, segments, **keywords):
    """The last state, from the results of `rotary_ssd_state` for the row."""
    decay, own = rotary_ssd_state(x, dt, a, b, rope, segment_ids=segments, **KERNEL, **keywords)
    return decay[..., None, None] * state + own


@ends
def test_states_conform_interpreted():
    """Wide heads, through the public function: values and gradients of what a shard passes on."""
    arguments, rope, segments, dy, dfinal = draw((1, 70, 1, 128, 1, 64, 2, False), 'bfloat16', 'usual')
    names = [name for name in GRADIENTS if name != 'c']

    @jax.jit
    def run(values):
        final, pull = jax.vjp(lambda *v: passed_on(*v, rope, segments, interpret=True), *values)
        return {'final_state': final, **{'d' + n: g for n, g in zip(names, pull(dfinal))}}

    ref = with_gradients(arguments, rope, segments, 0 * dy, dfinal)
    out = run([arguments[name] for name in names])
    assert_close(out, {name: ref[name] for name in out}, TOLERANCE)


# ---- on a GPU ----------------------------------------------------------------------------------------


@pytest.fixture
def hopper():
    if jax.default_backend() != 'gpu' or not jax.devices()[0].compute_capability.startswith('9.'):
        pytest.skip('needs an NVIDIA Hopper GPU and JAX_PLATFORMS=cuda')


# name: (row of SHAPES as in test_ssd_kernels.py, seed); da of a few heads: see SEEDS there
ON_GPU = {
    'two heads a CTA': ((2, 300, 8, 64, 2, 128, 2, True), 0),
    'one group': ((1, 128, 8, 64, 1, 128, None, False), 0),
    'a group a head': ((2, 203, 4, 64, 4, 64, 3, True), 1),
    'three heads a group': ((1, 130, 6, 64, 2, 128, 3, True), 1),
    'an odd number of heads': ((2, 150, 7, 64, 1, 64, 2, True), 3),
    'wide heads': ((2, 260, 4, 128, 1, 128, 2, True), 3),
    'very wide heads': ((2, 70, 4, 192, 2, 64, 2, True), 1),
    'one token': ((2, 1, 4, 64, 2, 128, 2, False), 0),
    'below one chunk': ((1, 23, 4, 64, 2, 128, 2, True), 0),
    'spans': ((1, 1100, 4, 64, 1, 128, 2, True), 3),
}  # fmt: skip


def poison(gib=4):
    """Leaves NaN in freed device memory, where the next outputs and temporaries will lie."""
    jax.block_until_ready([jnp.full(2**28, jnp.nan) for _ in range(gib)])


@pytest.mark.gpu
@pytest.mark.parametrize('name', ON_GPU)
def test_conforms_on_gpu(name, hopper):
    """Outputs and every gradient, all decays through one compiled function; runs repeat bit for bit, whatever memory held."""
    shape, seed = ON_GPU[name]
    assert gpu.default_plan(shape[:6]).spans == (2 if name == 'spans' else 1)
    for decay in DECAYS:
        inputs = draw(shape, 'bfloat16', decay, seed)
        out = both_ways(*inputs)
        assert_close(out, with_gradients(*inputs), TOLERANCE, f'{name}, {decay}')
        poison()
        again = both_ways(*inputs)
        for key in out:
            assert np.array_equal(out[key], again[key]), f'{name}, {decay}: {key} changed between two runs'


@pytest.mark.gpu
@pytest.mark.parametrize('spans', [1, 2, 4, 8])
def test_spans_conform_on_gpu(spans, hopper):
    """However rows are cut, ragged and with segments across the cuts."""
    for decay in ('usual', 'mixed', 'weak'):
        inputs = draw((2, 700, 4, 64, 2, 128, 2, True), 'bfloat16', decay, 2)
        out = both_ways(*inputs, plan=gpu.Plan(spans))
        assert_close(out, with_gradients(*inputs), TOLERANCE, f'{spans} spans, {decay}')


@pytest.mark.gpu
@pytest.mark.parametrize('H, G', [(32, 8), (32, 32), (32, 1), (12, 4), (7, 7)])
def test_long_rows_on_gpu(H, G, hopper):
    """Against the float32 xla form, which is tested against the oracle: full multiprocessors, many chunks."""
    inputs = draw((2, 16384, H, 64, G, 128, 2, True), 'bfloat16', 'usual', 0)
    arguments, rope, segments, dy, dfinal = inputs
    wide = {k: v.astype(jnp.float32) for k, v in arguments.items()}
    ref = both_ways(wide, rope, segments, dy.astype(jnp.float32), dfinal, implementation='xla')
    out = both_ways(*inputs)
    assert_close(out, {k: np.asarray(v) for k, v in ref.items()}, TOLERANCE, f'H={H} G={G}')
    again = both_ways(*inputs)
    for key in out:
        assert np.array_equal(out[key], again[key]), f'{key} changed between two runs'


@pytest.mark.gpu
def test_states_conform_on_gpu(hopper):
    """What a shard of a sequence passes on, in one span and in several, with and without segments."""
    names = [name for name in GRADIENTS if name != 'c']
    for L, segmented in ((130, True), (1100, False), (1100, True)):
        arguments, rope, segments, dy, dfinal = draw((2, L, 6, 64, 2, 128, 2, segmented), 'bfloat16', 'usual', 1)

        @jax.jit
        def run(values, rope=rope, segments=segments, dfinal=dfinal):
            final, pull = jax.vjp(lambda *v: passed_on(*v, rope, segments), *values)
            return {'final_state': final, **{'d' + n: g for n, g in zip(names, pull(dfinal))}}

        ref = with_gradients(arguments, rope, segments, 0 * dy, dfinal)
        out = run([arguments[name] for name in names])
        assert_close(out, {name: ref[name] for name in out}, TOLERANCE, f'L={L} segments {segmented}')


@pytest.mark.gpu
def test_transformed_on_gpu(hopper):
    """vmap, shard_map of one device and rematerialisation."""
    arguments, rope, segments, _, _ = draw((4, 200, 4, 64, 2, 128, 2, True), 'bfloat16', 'usual', 0)
    values = [arguments[name] for name in GRADIENTS[:5]]
    along = (0, 0, None, 0, 0)

    def loss(*values, segments=segments):
        y, final = rotary_ssd(*values, rope, segment_ids=segments, **KERNEL)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(final)

    gradient = jax.grad(loss, argnums=(0, 1, 3, 4))
    expected = jax.jit(gradient)(*values)
    rows = [v[:, None] if axis == 0 else v for v, axis in zip(values, along)]
    of_a_row = jax.vmap(lambda *v: gradient(*v[:-1], segments=v[-1]), in_axes=(*along, 0))
    p = PartitionSpec
    mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    specs = [p('data') if axis == 0 else p() for axis in along]
    sharded = jax.shard_map(lambda *v: gradient(*v), mesh=mesh, in_specs=tuple(specs), out_specs=p('data'))
    policy = jax.checkpoint_policies.save_only_these_names(api.STATES_NAME)
    kept = jax.grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 3, 4))
    results = {
        'vmap': [v[:, 0] for v in jax.jit(of_a_row)(*rows, segments[:, None])],
        'shard_map': jax.jit(sharded)(*values), 'remat': jax.jit(kept)(*values),
    }  # fmt: skip
    for what, result in results.items():
        for name, g, e in zip(('x', 'dt', 'b', 'c'), result, expected):
            # XLA's own sums, around the kernels, may take another order.
            assert relative_error(g.astype(jnp.float32), e.astype(jnp.float32)) < 1e-3, f'{what}: d{name}'


@pytest.mark.gpu
def test_decoding_continues_on_gpu(hopper):
    """None picks the kernel; steps from its final state are what it makes of the whole row."""
    arguments, rope, _, _, _ = draw((2, 200, 4, 64, 2, 128, 2, False), 'bfloat16', 'usual', 0)
    x, dt, a, b, c, state = (arguments[name] for name in GRADIENTS)
    y, final = jax.jit(functools.partial(rotary_ssd, **KERNEL))(x, dt, a, b, c, rope, initial_state=state)
    chosen, _ = jax.jit(rotary_ssd)(x, dt, a, b, c, rope, initial_state=state)
    assert np.array_equal(y, chosen)
    cut = 150
    first = [v[:, :cut] for v in (x, dt, b, c)]
    _, h = rotary_ssd(first[0], first[1], a, *first[2:], tuple(t[:cut] for t in rope), initial_state=state, **KERNEL)
    for t in range(cut, 200):
        h, y_t = rotary_ssd_step(h, x[:, t], dt[:, t], a, b[:, t], c[:, t], tuple(v[t] for v in rope))
        assert relative_error(y_t.astype(jnp.float32), y[:, t].astype(jnp.float32)) < 2 * TOLERANCE
    assert relative_error(h, final) < TOLERANCE
