"""The rotary scan's TPU kernels through the real TPU compiler, on any machine.

The compiler must take them for every generation, with what the default tables choose, and spill
no more registers than is known. Needs libtpu (pip install -e .[tpu]), no TPU. After a change of
the kernels or of libtpu,

  python tests/test_ssd_tpu_compile.py [CHIP ..]

prints the counts as they are, to be put into SPILLS.

Legend: B batch, L length, H heads, G groups, P head width, N state width.
"""

import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tpu_compiler import run_alone

from pallas_kernels import tpu_profile
from pallas_kernels.chips import TPUS
from pallas_kernels.ssd import rotary_ssd, rotary_ssd_state, tpu
from pallas_kernels.ssd.api import STATES_NAME

# name: (B, L, H, P, G, N)
SHAPES = {
    '320m_g12': (16, 2048, 12, 64, 12, 128),
    '320m_g4': (16, 2048, 12, 64, 4, 128),
    '320m_g1': (16, 2048, 12, 64, 1, 128),
    '1p3b_g32': (8, 4096, 32, 64, 32, 128),
    '1p3b_g8': (8, 4096, 32, 64, 8, 128),
    '1p3b_g1': (8, 4096, 32, 64, 1, 128),
    'long_1p3b_g32': (2, 16384, 32, 64, 32, 128),
    'long_1p3b_g8': (2, 16384, 32, 64, 8, 128),
    'long_1p3b_g1': (2, 16384, 32, 64, 1, 128),
    'wide_heads': (2, 4096, 16, 128, 2, 128),
    'wide_states': (2, 4096, 32, 64, 8, 256),
    'ragged': (2, 300, 12, 64, 4, 128),
    'padded': (2, 1024, 12, 48, 4, 80),
}
KERNELS = ('rotary_ssd_forward', 'rotary_ssd_backward', 'rotary_ssd_state')
# chip -> shape (but long ones, which have the same code) -> instructions of each of KERNELS that
# spill or fill a vector register, at most: some 15% above what they were, for they move by as much
# with every edit of the kernels. What is not here has none. Grid steps are straight-line programs,
# for in loops over heads the same work takes 1.7 times the cycles; the compiler's scheduler then
# runs ahead of the 64 registers. What it spills fills a fifth of the store slots forward.
SPILLS = {
    'v4': {
        '320m_g12': (5200, 16100, 1000),
        '320m_g4': (3300, 10800, 600),
        '320m_g1': (2500, 8300, 400),
        '1p3b_g32': (7300, 21300, 1300),
        '1p3b_g8': (3900, 12300, 800),
        '1p3b_g1': (5700, 20500, 1200),
        'wide_heads': (4100, 18400, 1000),
        'wide_states': (2600, 7400, 400),
        'ragged': (3400, 11300, 800),
        'padded': (3100, 10800, 600),
    },
    'v5e': {
        '320m_g12': (3000, 10100, 100),
        '320m_g4': (1400, 7400, 100),
        '320m_g1': (1000, 6400, 100),
        '1p3b_g32': (3600, 14000, 400),
        '1p3b_g8': (5200, 18300, 600),
        '1p3b_g1': (2700, 15900, 200),
        'wide_heads': (2600, 13600, 300),
        'wide_states': (600, 4800, 100),
        'ragged': (2100, 8000, 100),
        'padded': (1600, 7400, 100),
    },
    'v5p': {
        '320m_g12': (3000, 10100, 100),
        '320m_g4': (1600, 7400, 100),
        '320m_g1': (1000, 6400, 100),
        '1p3b_g32': (3600, 14000, 400),
        '1p3b_g8': (5200, 18300, 600),
        '1p3b_g1': (2400, 15900, 200),
        'wide_heads': (2600, 13600, 300),
        'wide_states': (600, 4800, 100),
        'ragged': (2100, 8000, 100),
        'padded': (1600, 7400, 100),
    },
    'v6e': {
        '320m_g12': (3000, 9900, 400),
        '320m_g4': (1300, 8000, 100),
        '320m_g1': (1100, 6400, 100),
        '1p3b_g32': (4800, 13700, 800),
        '1p3b_g8': (5600, 19400, 700),
        '1p3b_g1': (3800, 15800, 300),
        'wide_heads': (3500, 15100, 100),
        'wide_states': (1400, 5200, 200),
        'ragged': (1800, 8600, 300),
        'padded': (1500, 8000, 100),
    },
    'tpu7x': {
        '320m_g12': (3600, 9500, 200),
        '320m_g4': (1300, 7000, 200),
        '320m_g1': (1100, 5300, 200),
        '1p3b_g32': (4000, 13200, 600),
        '1p3b_g8': (4600, 18700, 600),
        '1p3b_g1': (3700, 14700, 300),
        'wide_heads': (2800, 13700, 200),
        'wide_states': (1100, 4800, 200),
        'ragged': (1900, 7600, 300),
        'padded': (1500, 7000, 200),
    },
}

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed: pip install -e .[tpu]'
)


def scan_case(B, L, H, P, G, N):
    """(f, args) for tpu_profile.profile: the three kernels in one program, every feature in use, bfloat16."""

    def array(*shape, dtype='float32'):
        return jax.ShapeDtypeStruct(shape, dtype)

    x, bc, state = array(B, L, H, P, dtype='bfloat16'), array(B, L, G, N, dtype='bfloat16'), array(B, H, P, N)
    table = array(B, L, N // 2)

    def f(values, rope, segments, cotangents):
        def scan(x, dt, a, b, c, initial):
            return rotary_ssd(
                x, dt, a, b, c, rope, segment_ids=segments, initial_state=initial, implementation='mosaic_tpu'
            )

        outputs, pull = jax.vjp(scan, *values)
        shard = rotary_ssd_state(*values[:4], rope, segment_ids=segments, implementation='mosaic_tpu')
        return outputs, pull(cotangents), shard

    values = (x, array(B, L, H), array(H), bc, bc, state)
    return f, (values, (table, table), array(B, L, dtype='int32'), (x, state))


def layers_case(saves):
    """(f, args): gradients through a scan over three rematerialised layers, with their boundary states saved or not."""
    policy = jax.checkpoint_policies.save_only_these_names(STATES_NAME) if saves else None

    def loss(x, *rest):
        @functools.partial(jax.checkpoint, policy=policy)
        def layer(x, _):
            return x + rotary_ssd(x, *rest, implementation='mosaic_tpu')[0], None

        return jnp.sum(jax.lax.scan(layer, x, None, length=3)[0].astype(jnp.float32))

    (x, dt, a, b, c, _), *_ = scan_case(*SHAPES['ragged'])[1]
    return jax.grad(loss, argnums=range(5)), (x, dt, a, b, c)


def spills_of(chip, shape):
    """Spills and fills of each of KERNELS."""
    profile = tpu_profile.profile(chip, 'test_ssd_tpu_compile:scan_case', *shape)
    found = {name: [k for k in profile.kernels if name in k.name] for name in KERNELS}
    assert all(len(kernels) == 1 for kernels in found.values()), [k.name for k in profile.kernels]
    for (kernel,) in found.values():
        # With operands that XLA keeps in VMEM; a kernel's own beyond its limit is refused by the compiler.
        assert 0 < kernel.vmem <= TPUS[chip].vmem
    return tuple(kernel.spills + kernel.fills for (kernel,) in found.values())


def check(chip, name, shape):
    known = SPILLS.get(chip, {}).get(name.removeprefix('long_'), (0, 0, 0))
    counts = spills_of(chip, shape)
    more = {k: f'{count}, known are {limit}' for k, count, limit in zip(KERNELS, counts, known) if count > limit}
    assert not more, f'{chip}, {name}: more spills and fills than known: {more}'


@needs_compiler
@pytest.mark.timeout(600)
def test_compiles_for_v5e():
    check('v5e', 'ragged', SHAPES['ragged'])


@needs_compiler
@pytest.mark.tpu_compile_full
@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('chip', TPUS)
def test_compiles(chip, name):
    check(chip, name, SHAPES[name])


@needs_compiler
@pytest.mark.tpu_compile_full
@pytest.mark.parametrize('saves', [True, False])
def test_saved_states_spare_a_forward_pass(saves):
    kernels = tpu_profile.profile('v5e', 'test_ssd_tpu_compile:layers_case', saves).kernels
    assert sum('rotary_ssd_forward' in k.name for k in kernels) == (1 if saves else 2)
    assert sum('rotary_ssd_backward' in k.name for k in kernels) == 1


@needs_compiler
@pytest.mark.tpu_compile_full
@pytest.mark.parametrize('groups', [32, 8, 1])
def test_compiles_on_a_pod(groups):
    assert run_alone(__file__, f'--pod={groups}') == 'generation v5e, kernels 2, other devices asked for: all-reduce\n'


def compile_for_pod(groups):
    """v5e:16x16, rows over 32 devices and heads over 8: forward and backward, 4 heads a device."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:16x16').devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(32, 8), ('data', 'tensor'))
    p = PartitionSpec
    heads, vectors, states = p('data', None, 'tensor'), p('tensor'), p('data', 'tensor')
    of_groups = heads if groups > 1 else p('data')
    f, (values, rope, segments, cotangents) = scan_case(32, 4096, 32, 64, groups, 128)
    generations = []

    @functools.partial(
        jax.shard_map, mesh=mesh, out_specs=(heads, states),
        in_specs=((heads, heads, vectors, of_groups, of_groups, states), (p('data'), p('data')), p('data')),
    )  # fmt: skip
    def scan(values, rope, segments):
        generations.append(tpu.generation())
        *inputs, initial = values
        return rotary_ssd(*inputs, rope, segment_ids=segments, initial_state=initial, implementation='mosaic_tpu')

    def both(values, rope, segments, cotangents):
        outputs, pull = jax.vjp(lambda v: scan(v, rope, segments), values)
        return outputs, pull(cotangents)

    def place(v, spec):
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, spec))

    specs = ((heads, heads, vectors, of_groups, of_groups, states), (p('data'), p('data')), p('data'), (heads, states))
    args = jax.tree.map(place, (values, rope, segments, cotangents), specs)
    text = jax.jit(both).trace(*args).lower(lowering_platforms=('tpu',)).compile().as_text()
    collectives = [c for c in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute') if f' {c}' in text]
    kernels = text.count('custom_call_target="tpu_custom_call"')
    print(f'generation {generations[0]}, kernels {kernels}, other devices asked for: {", ".join(collectives)}')


def main(argv):
    if argv and argv[0].startswith('--pod='):
        return compile_for_pod(int(argv[0].removeprefix('--pod=')))
    print('SPILLS = {')
    for chip in argv or TPUS:
        print(f'    {chip!r}: {{')
        for name, shape in SHAPES.items():
            if name.startswith('long_'):
                continue
            try:
                counts = spills_of(chip, shape)
            except RuntimeError as error:
                print(f'        # {name!r}: {str(error).splitlines()[0]}', flush=True)
                continue
            if any(counts):
                print(f'        {name!r}: {counts},', flush=True)
        print('    },')
    print('}')


if __name__ == '__main__':
    main(sys.argv[1:])
