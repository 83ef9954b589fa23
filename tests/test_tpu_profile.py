"""The reader of the TPU compiler's dumps, against work that is known beforehand."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import bench, bench_tpu, hlo, tpu_profile
from pallas_kernels.chips import TPUS
from pallas_kernels.ssd import rotary_ssd

ROWS, INNER, COLUMNS = 512, 256, 256  # a block of the matmuls below


def matmul_case(kind='plain', M=2048, N=512, dtype='bfloat16'):
    """A matmul of M / ROWS x N / COLUMNS grid steps: whole in each step, or in a loop of four."""

    def plain(a_ref, b_ref, out_ref):
        out_ref[...] = jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32).astype(out_ref.dtype)

    def looped(a_ref, b_ref, out_ref):
        def body(i, _):
            rows = pl.ds((i - 1) * (ROWS // 4), ROWS // 4)
            part = jnp.dot(a_ref[rows], b_ref[...], preferred_element_type=jnp.float32)
            out_ref[rows] = part.astype(out_ref.dtype)

        jax.lax.fori_loop(1, 5, body, None)

    order = 'parallel' if kind == 'parallel' else 'arbitrary'
    call = pl.pallas_call(
        looped if kind == 'looped' else plain,
        grid=(M // ROWS, N // COLUMNS),
        in_specs=[
            pl.BlockSpec((ROWS, INNER), lambda i, j: (i, 0)),
            pl.BlockSpec((INNER, COLUMNS), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((ROWS, COLUMNS), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((M, N), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(order, 'arbitrary')),
        name='known_matmul',
    )
    return call, (jax.ShapeDtypeStruct((M, INNER), dtype), jax.ShapeDtypeStruct((INNER, N), dtype))


def refused_case():
    """40 MiB of blocks: more than a kernel gets that asks for no more, less than there is."""

    def kernel(a_ref, out_ref):
        out_ref[...] = a_ref[...]

    spec = pl.BlockSpec((2560, 1024), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((4 * 2560, 1024), 'float32')
    return pl.pallas_call(kernel, grid=(4,), in_specs=[spec], out_specs=spec, out_shape=shape), (shape,)


# ---- with the real compiler ----


@pytest.fixture
def compiler():
    if importlib.util.find_spec('libtpu') is None:
        pytest.skip('libtpu is not installed: pip install jax[tpu]')


@pytest.mark.tpu_compile_full
@pytest.mark.parametrize('chip', TPUS)
@pytest.mark.parametrize('kind', ['plain', 'looped', 'parallel'])
def test_matmul_of_known_work(chip, kind, compiler):
    device = TPUS[chip]
    profile = tpu_profile.profile(chip, 'test_tpu_profile:matmul_case', kind)
    (kernel,) = [k for k in profile.kernels if k.name.startswith('known_matmul')]
    cores = device.cores if kind == 'parallel' else 1
    assert kernel.steps == 8 // cores
    # The MXU works off exactly the matmul's FLOPs at its peak rate.
    flops = 2 * ROWS * INNER * COLUMNS
    np.testing.assert_allclose(kernel.mxu, kernel.steps * flops / device.mxu_flop, rtol=1e-6)
    np.testing.assert_allclose(
        kernel.busy['MXU'] * kernel.step_cycles * device.mxus, flops / device.mxu_flop, rtol=1e-6
    )
    # Steps are most of the cycles; what fills the pipeline is not counted in.
    assert kernel.steps * kernel.step_cycles <= kernel.cycles < kernel.steps * kernel.step_cycles + 500
    assert (kernel.spills, kernel.fills) == (0, 0)
    # Blocks of a change with i, those of b at every step; the compiler may have moved them to VMEM beforehand, whole.
    a, b, out = 2048 * INNER * 2, INNER * COLUMNS * 2, 2048 * 512 * 2
    assert profile.hbm in (a + 8 * b + out, a + 2 * b + out)
    assert kernel.vmem >= ROWS * COLUMNS * 2
    assert profile.total_seconds >= max(kernel.cycles / device.clock, profile.hbm / device.bandwidth)


@pytest.mark.tpu_compile_full
@pytest.mark.parametrize('chip', ['v5e', 'v5p', 'v6e', 'tpu7x'])
def test_refusal_carries_the_compilers_message(chip, compiler):
    limit = TPUS[chip].scoped_vmem >> 20
    with pytest.raises(
        RuntimeError, match=rf'refused_case\(\) does not compile for {chip}: .* 40.00M and limit {limit}.00M'
    ):
        tpu_profile.profile(chip, 'test_tpu_profile:refused_case')


@pytest.mark.tpu_compile_full
def test_table_of_the_scan(compiler, capsys):
    shape = bench.Shape(1, 512, 4, 64, 128, 2)
    rows = bench_tpu.run('v5e', {'tiny': shape}, ['xla'], ['forward', 'backward', 'state'], bench.least_work, False, '')
    both = rows.pop()
    sums = {row['direction']: row for row in rows if row['kernel'].startswith('all')}
    np.testing.assert_allclose(both['ms'], sums['forward']['ms'] + sums['backward']['ms'])
    np.testing.assert_allclose(both['least'], both['hbm_mb'] / (bench.least_work(shape, 'forward+backward')[0] / 1e6))
    for direction, row in sums.items():
        kernels = [r for r in rows if r['direction'] == direction and r is not row]
        np.testing.assert_allclose(sum(r['hbm_mb'] for r in kernels), row['hbm_mb'])
        assert row['least'] > 1 and 0 < row['busy']['MXU'] < 1
    assert sums['state']['ms'] < sums['forward']['ms'] < sums['backward']['ms']
    assert capsys.readouterr().out.count('tiny') == len(rows) + 1


# ---- without it ----

# A loop of 2 steps of 6 bundles of its own and 3 x 7 of an inner loop, which counts from 8 by 4 to 20.
BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %s5_s5 = smov 8 }
   0x1   :  { %s2_s2 = smov 0 /* a comment
over lines { } */ }
   0x2 LB: > { %s3_s3 = sphi %s2_s2, %s4_s4  ;;  %v1_v1 = vld [vmem:[#allocation2] sm:$0xff] }
   0x3 LB: >> { %s7_s7 = sadd.s32 4, %s6_s6 /* iteration */  ;;  %s6_s6 = sphi %s5_s5, %s7_s7 }
   0x4   : >> { %p2_p2 = scmp.ge.s32.totalorder %s7_s7, 20 /* loop exit test */ }
   0x5   : >> { %17 = sbr.rel (!%p2_p2) target bundleno = 3 (0x3), region = 9 }
   0x6   : >> { %18 = vmatmul.bf16.gmra.mxu0 %v1_v1 }
   0x7   : > {}
   0x8   : > { %s4_s4 = sadd.s32 1, %s3_s3 }
   0x9   : > { %p1_p1 = scmp.ge.s32.totalorder %s4_s4, 2 /* loop exit test */ }
   0xa   : > { %19 = sbr.rel (!%p1_p1) target bundleno = 2 (0x2) ;; %20 = sbr.rel (%p3) target bundleno = 16 (0x10) }
   0xb   : > {}
   0xc   :  {}
   0xd   :  {}
   0xe   :  {}
   0xf   :  { %21 = vst [vmem:[#allocation3] sm:$0xff] %v1_v1 }
  0x10 PF:  {} /* exit bundle */
"""
BUSY = {2: (0, 1, 0), 6: (4, 0, 0), 15: (0, 0, 1)}  # bundle -> MXU, VLOAD, VSTORE
UTILIZATION = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
""" + ''.join('{} 0 0 0 0 {} 0 {} 0 0\n'.format(*BUSY.get(i, (0, 0, 0))) for i in range(17))


def test_bundles_loops_and_trips():
    code = tpu_profile.parse_code(BUNDLES, UTILIZATION)
    assert code.loops == [(2, 15, 2), (3, 10, 3)]
    assert code.outer == [(2, 15, 2)]
    cycles, *slots = code.work(2, 15)
    assert cycles == 6 + 3 * 7  # the inner loop reaches over its branch's delay slots
    assert dict(zip(tpu_profile.UNITS, slots))['MXU'] == 3 * 4
    cycles, *slots = code.work(0, 17)
    assert cycles == 2 + 2 * 27 + 2
    busy = dict(zip(tpu_profile.UNITS, slots))
    assert (busy['MXU'], busy['VLOAD'], busy['VSTORE'], busy['XLU']) == (24, 2, 1, 0)
    assert code.capacity.tolist() == [4, 3, 4, 2, 1, 3, 3, 1, 1, 2]


def test_dumps_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match='17 bundles but 16 rows'):
        tpu_profile.parse_code(BUNDLES, UTILIZATION[: UTILIZATION.rindex('0 0 0')].rsplit('\n', 1)[0] + '\n')
    with pytest.raises(ValueError, match='0x5 stands where 0x4'):
        tpu_profile.parse_code('\n'.join(l for l in BUNDLES.splitlines() if not l.startswith('   0x4')), UTILIZATION)
    with pytest.raises(ValueError, match='names the units'):
        tpu_profile.parse_code(BUNDLES, UTILIZATION.replace('XLU', 'XYZ'))


HLO = """HloModule jit_f, is_scheduled=true

%fused (p.0: f32[64,128], p.1: s32[], p.2: f32[8,128]) -> f32[8,128] {
  %p.0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  %p.2 = f32[8,128]{1,0:T(8,128)} parameter(2)
  %slice.1 = f32[8,128]{1,0:T(8,128)} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={8,128}
  ROOT %add.1 = f32[8,128]{1,0:T(8,128)} add(%slice.1, %p.2)
}

ENTRY %main (a.1: f32[64,128], b.1: bf16[3,5]) -> f32[8,128] {
  %a.1 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %b.1 = bf16[3,5]{0,1:T(8,128)(2,1)} parameter(1)
  %i.1 = s32[]{:T(128)S(6)} constant(0)
  %copy.1 = bf16[3,5]{1,0:T(8,128)(2,1)} copy(%b.1)
  %copy-start.1 = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a.1)
  %copy-done.1 = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((f32[64,128]{1,0:T(8,128)}), f32[16,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a.1)
  %two.1 = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) fusion(%copy-done.1, %i.1), kind=kLoop, calls=%fused
  %gte.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%two.1), index=0
  ROOT %fusion.1 = f32[8,128]{1,0:T(8,128)} fusion(%a.1, %i.1, %gte.1), kind=kLoop, calls=%fused, backend_config={"x":"T(1)"}
}
"""


def test_traffic_of_hlo():
    computations = hlo.parse(HLO)
    ops = {op.name: op for op in computations['ENTRY']}
    shapes = {name: op.shape for name, op in ops.items()}
    counted = {name: hlo.op_bytes(op, shapes, computations) for name, op in ops.items()}
    row = 128 * 4
    assert {name: size for name, size in counted.items() if size} == {
        'copy.1': 2 * (8 * 128 * 2),  # both layouts are padded to one tile
        'copy-start.1': 64 * row,  # the other side is VMEM
        'slice-start.1': 16 * row,
        'two.1': 8 * row,  # the operand and the second result are in VMEM
        'fusion.1': 3 * 8 * row,  # a slice of a, all of the second operand, the result
    }
    assert hlo.array_bytes('f32', [4, 32, 64], '1,2,0:T(8,128)') == 4 * 128 * 64 * 4
    assert hlo.array_bytes('pred', [5], '0:T(512)') == 512
    assert hlo.array_bytes('s32', []) == 4


GATHERS = """HloModule jit_f, is_scheduled=true

%look_up (p.0: f32[64,128], p.1: s32[8]) -> f32[8,128] {
  %p.0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[8]{0:T(1024)} parameter(1)
  ROOT %gather.1 = f32[8,128]{1,0:T(8,128)} gather(%p.0, %p.1), slice_sizes={1,128}
}

%add_up (p.0: f32[64,128], p.1: s32[8], p.2: f32[8,128]) -> f32[64,128] {
  %p.0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[8]{0:T(1024)} parameter(1)
  %p.2 = f32[8,128]{1,0:T(8,128)} parameter(2)
  ROOT %scatter.1 = f32[64,128]{1,0:T(8,128)} scatter(%p.0, %p.1, %p.2), to_apply=%sum
}

ENTRY %main (a.1: f32[64,128], i.1: s32[8]) -> f32[64,128] {
  %a.1 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %i.1 = s32[8]{0:T(1024)} parameter(1)
  %gather.2 = f32[8,128]{1,0:T(8,128)} gather(%a.1, %i.1), slice_sizes={1,128}
  %fusion.1 = f32[8,128]{1,0:T(8,128)} fusion(%a.1, %i.1), kind=kLoop, calls=%look_up
  %gather_offload.1 = ((), (), (s32[9]{0})) custom-call-start(), async_execution_thread="sparsecore"
  %gather_offload.2 = ((f32[64,128]{1,0:T(8,128)}, s32[8]{0:T(1024)}), f32[8,128]{1,0:T(8,128)}, (s32[9]{0})) \
custom-call-update(%gather_offload.1, %a.1, %i.1)
  %gather_offload.3 = f32[8,128]{1,0:T(8,128)} custom-call-done(%gather_offload.2)
  %sort.1 = ((s32[8]{0:T(1024)}), (s32[8]{0:T(1024)}, s32[8]{0:T(1024)}), (s32[9]{0})) custom-call-update(%i.1)
  ROOT %fusion.2 = f32[64,128]{1,0:T(8,128)} fusion(%a.1, %i.1, %gather_offload.3), kind=kLoop, calls=%add_up
}
"""


def test_traffic_of_gathers_and_scatters():
    """They touch 8 rows of 64, and what is added to is read and written."""
    computations = hlo.parse(GATHERS)
    ops = {op.name: op for op in computations['ENTRY']}
    shapes = {name: op.shape for name, op in ops.items()}
    counted = {name: hlo.op_bytes(op, shapes, computations) for name, op in ops.items()}
    rows, indices = 8 * 128 * 4, 1024 * 4
    assert {name: size for name, size in counted.items() if size} == {
        'gather.2': 2 * rows + indices,
        'fusion.1': 2 * rows + indices,
        'gather_offload.2': 2 * rows + indices,
        'sort.1': 3 * indices,
        'fusion.2': 3 * rows + indices,
    }


def test_traffic_of_blocks():
    """B 2, 3 chunks of 4 rows of which the last is cut, 2 heads: blocks move where their index changes."""

    def kernel(a_ref, b_ref, c_ref, raw_ref, out_ref, state_ref):
        out_ref[...] = a_ref[...] + b_ref[...] + c_ref[0]
        state_ref[...] = a_ref[...]

    def f(a, b, c, raw):
        return pl.pallas_call(
            kernel,
            grid=(2, 3, 2),
            in_specs=[
                pl.BlockSpec((None, 4, 128), lambda i, j, h: (i, j, 0)),  # anew for each (i, j)
                pl.BlockSpec((4, 128), lambda i, j, h: (0, 0)),  # once
                pl.BlockSpec((1, 4, 128), lambda i, j, h: (h, j, 0)),  # anew at every step
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[
                pl.BlockSpec((None, 4, 128), lambda i, j, h: (i, 2 - j, 0)),
                pl.BlockSpec((None, 4, 128), lambda i, j, h: (i, 0, 0)),  # once for each i
            ],
            out_shape=[jax.ShapeDtypeStruct((2, 10, 128), 'float32')] * 2,
            name='blocks',
        )(a, b, c, raw)

    def outer(a, b, c, raw):
        return jax.lax.scan(lambda carry, _: (carry, jax.jit(f)(carry, b, c, raw)), a, None, length=2)

    sizes = ((2, 10, 128), (4, 128), (2, 10, 128), (7, 128))
    grids = hlo.pallas_grids(jax.make_jaxpr(outer)(*(jnp.zeros(s) for s in sizes)).jaxpr)
    cut, whole = [1, 2, 128], [1, 4, 128]
    assert grids == {
        'blocks': {
            'steps': 12,
            'blocks': [
                [[2, cut], [4, whole]],
                [[1, [4, 128]]],
                [[4, cut], [8, whole]],
                [[1, [7, 128]]],
                [[2, cut], [4, whole]],
                [[2, whole]],
            ],
        }
    }
    array, tiles = 'f32[2,10,128]{2,1,0:T(8,128)}', ':T(8,128)}'
    shapes = {'a': array, 'b': 'f32[4,128]{1,0' + tiles, 'c': array, 'raw': 'f32[7,128]{1,0' + tiles}
    op = hlo.Op('blocks.1', 'custom-call', f'({array}, {array})', '(%a, %b, %c, %raw)', '')
    tile = 8 * 128 * 4  # blocks of 4 rows are padded to it too
    assert hlo.op_bytes(op, shapes, {}, grids['blocks']) == tile * (6 + 1 + 12 + 1 + 6 + 2)


def test_prefetched_scalars_are_refused():
    def kernel(s_ref, a_ref, out_ref):
        out_ref[...] = a_ref[...]

    spec = pl.BlockSpec((8, 128), lambda i, s: (s[i], 0))
    grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(2,), in_specs=[spec], out_specs=spec)
    call = pl.pallas_call(kernel, grid_spec=grid, out_shape=jax.ShapeDtypeStruct((16, 128), 'float32'))
    jaxpr = jax.make_jaxpr(call)(jnp.zeros(2, jnp.int32), jnp.zeros((16, 128))).jaxpr
    with pytest.raises(NotImplementedError, match='prefetched'):
        hlo.pallas_grids(jaxpr)


def test_cases_pass_only_the_boundary_states_on():
    s = bench.Shape(1, 512, 4, 64, 128, 2)
    forward, args = bench_tpu.scan_case('xla', 'forward', *s)
    y, (states,) = jax.eval_shape(forward, *args)
    assert y.shape == (1, 512, 256)
    assert states.dtype == jnp.bfloat16 and states.size == 512 // 128 * 4 * 64 * 128
    backward, args = bench_tpu.scan_case('xla', 'backward', *s)
    (gradients,) = jax.eval_shape(backward, *args)
    assert [g.shape for g in gradients] == [(1, 512, 256), (1, 512, 4), (4,), (1, 512, 256), (1, 512, 256)]
    # It starts from what was kept: it has no products but those of the plain backward pass.
    inputs, rope = bench_tpu.scan_case('xla', 'forward', *s)[1]

    def scan(x, dt, a, b, c):
        x, b, c = x.reshape(1, 512, 4, 64), b.reshape(1, 512, 2, 128), c.reshape(1, 512, 2, 128)
        return rotary_ssd(x, dt, a, b, c, rope, implementation='xla', chunk_size=128)[0]

    def plain(inputs):
        return jax.vjp(lambda v: scan(*v), inputs)

    rope = tuple(jnp.zeros(table.shape) for table in rope)
    dy, pull = jax.eval_shape(plain, inputs)
    products = [
        str(jax.make_jaxpr(f)(*a)).count('dot_general[') for f, a in ((backward, args), (lambda p, g: p(g), (pull, dy)))
    ]
    assert 0 < products[0] <= products[1]
    state, args = bench_tpu.scan_case('xla', 'state', *s)
    assert [v.shape for v in jax.eval_shape(state, *args)] == [(1, 4), (1, 4, 64, 128)]
    step, args = bench_tpu.step_case(8, 4, 64, 128, 2, 'bfloat16')
    assert [v.shape for v in jax.eval_shape(step, *args)] == [(8, 4, 64, 128), (8, 4, 64)]


def test_least_bytes():
    """The parts of a training step are those of the contract at the 1.3B shape, in MB."""
    s = bench.SHAPES['1p3b_g8']
    forward, backward, state = (bench_tpu.least_bytes(s, d, bench.least_work) / 1e6 for d in bench_tpu.DIRECTIONS)
    assert (round(forward), round(backward)) == (541, 814)
    assert round(state) == 214  # x 134, dt 4.2, b 67, state 8.4


@pytest.mark.parametrize('chip', TPUS)
def test_clocks_are_plausible(chip):
    assert 1e9 < TPUS[chip].clock < 2.3e9


def test_bench_without_the_compiler(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit):
        bench.main(['--target=v5p'])
    assert 'pip install jax[tpu]' in capsys.readouterr().err
