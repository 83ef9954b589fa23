"""Decoding is the forward pass, token by token: logits at every position, for every pattern, rope scaling and mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import small_config

from pallas_kernels.attention.decode import decode_attention, write_token
from transxssm_jax.inference.decode import Decoder
from transxssm_jax.inference.sampling import GREEDY, Sampling
from transxssm_jax.model import parameters
from transxssm_jax.parallel import mesh

L = 32
LENGTHS = np.array([5, 20, 1, 16], np.int32)  # of prompts; one is a single token, one ends with a chunk of the scan
TOKENS = np.random.default_rng(0).integers(0, 96, (4, L)).astype(np.int32)
WHOLE = np.full(4, L, np.int32)


def tiny(**settings):
    """(ssd, attention), float32, 96 tokens; settings of the model by name."""
    settings = (
        dict(
            num_layers=2,
            d_model=32,
            num_heads=2,
            num_kv_heads=1,
            num_ssd_groups=2,
            d_mlp=32,
            attention_period=2,
            attention_offset=1,
            rope_original_length=8,
        )
        | settings
    )
    mesh_sizes = {name: settings.pop(name) for name in list(settings) if name.startswith('mesh_')}
    return small_config(**{f'model_{name}': value for name, value in settings.items()}, **mesh_sizes)


def init(config):
    """Parameters with everything away from its special initial value, so that each matters."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(parameters.init_params, config.model), 0)

    def leaf(path, shape):
        middle = 1.0 if path[-1].key in ('scale', 'weight') else 0.0
        return jnp.asarray(middle + 0.1 * rng.standard_normal(shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def decoder_of(**settings):
    config = tiny(**settings)
    return Decoder(init(config), config)


def forward(config, params, rope_length_B=None):
    graph, _ = parameters.split_model(config.model)
    run = jax.jit(lambda params, tokens, length: nnx.merge(graph, params).logits(tokens, rope_length_B=length))
    return np.asarray(run(params, TOKENS, rope_length_B))


def decode(decoder, rope_length_B=WHOLE, padding=0):
    """Logits [4, L, V] after every token from each row's prompt on; NaN before."""
    tokens = np.where(np.arange(L) < LENGTHS[:, None], TOKENS, padding)[:, : LENGTHS.max()]
    state = decoder.prefill(decoder.empty(4, L), tokens, LENGTHS, rope_length_B)
    logits = np.full((4, L, decoder.model.vocab_size), np.nan, np.float32)
    rows = np.arange(4)
    logits[rows, LENGTHS - 1] = state['logits_BV']
    for more in range(L - LENGTHS.min()):
        at = np.minimum(LENGTHS + more, L - 1)  # a row that is over takes its last token again, to no avail
        state = decoder.step(state | {'position_B': jnp.asarray(at)}, TOKENS[rows, at], rope_length_B)
        going = LENGTHS + more < L
        logits[rows[going], at[going]] = np.asarray(state['logits_BV'])[going]
    return logits


VARIANTS = {
    'two modules': dict(num_layers=4),
    'attention first, linear': dict(attention_offset=0, rope_scaling='linear'),
    'attention everywhere, length': dict(attention_period=1, attention_offset=0, rope_scaling='length'),
    'attention nowhere, length': dict(attention_period=0, num_layers=1, num_ssd_groups=1, rope_scaling='length'),
    'mamba2': dict(pattern='mamba2', num_layers=2),
    'mamba2 and attention without an encoding, with biases': dict(
        pattern='2xmamba2,attention', num_layers=3, num_ssd_groups=1, attention_encoding='none', use_bias=True
    ),
    'mamba2 alone, without MLP': dict(pattern='mamba2', num_layers=1, d_mlp=0, mamba_expand=1, conv_width=2),
    'conv1d_d': dict(ssd_encoding='conv1d_d'),
    'decay_only, length': dict(ssd_encoding='decay_only', rope_scaling='length'),
    'qk_norm, bc_norm, soft cap': dict(num_layers=4, qk_norm=True, bc_norm=True, logit_soft_cap=2.0),
    'bc_norm behind convolutions': dict(
        pattern='mamba2,ssd', num_layers=2, ssd_encoding='conv1d_d', bc_norm=True, rope_scaling='length'
    ),
    'other settings': dict(num_kv_heads=2, use_bias=True, tie_embeddings=False, use_dt_bias=False),
}


@pytest.mark.parametrize('name', VARIANTS)
def test_logits_are_those_of_the_forward_pass(name):
    config = tiny(**VARIANTS[name])
    logits, expected = decode(decoder_of(**VARIANTS[name])), forward(config, init(config))
    known = np.isfinite(logits)
    assert known.all(-1).sum() == (L - LENGTHS + 1).sum()
    np.testing.assert_allclose(logits[known], expected[known], atol=3e-5)


@pytest.mark.parametrize('name', ['two modules', 'other settings', 'mamba2', 'conv1d_d', 'qk_norm, bc_norm, soft cap'])
def test_a_row_alone_decodes_as_among_others(name):
    # A single vector takes other forms of the products and norms.
    decoder = decoder_of(**VARIANTS[name])
    tokens, length = TOKENS[:, :3], np.full(4, 3, np.int32)
    whole = decoder.prefill(decoder.empty(4, L), tokens, length, WHOLE)
    alone = decoder.prefill(decoder.empty(1, L), tokens[:1], length[:1], WHOLE[:1])
    for i in range(3, 6):
        whole = decoder.step(whole, TOKENS[:, i], WHOLE)
        alone = decoder.step(alone, TOKENS[:1, i], WHOLE[:1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:1], atol=3e-5), alone, whole)


def test_dynamic_scaling_goes_by_the_length_that_is_given():
    config = tiny(rope_scaling='dynamic')
    params, decoder = init(config), decoder_of(rope_scaling='dynamic')
    of_length = {}
    for length_B in (WHOLE, np.array([40, 50, 60, 70], np.int32)):
        # The forward pass alone takes the length of its row, which is L.
        logits, expected = decode(decoder, length_B), forward(config, params, None if length_B is WHOLE else length_B)
        known = np.isfinite(logits)
        np.testing.assert_allclose(logits[known], expected[known], atol=3e-5)
        of_length[length_B[0]] = expected
    assert np.abs(of_length[L] - of_length[40])[known].max() > 1e-2


def test_bfloat16_is_as_close_as_its_rounding():
    config = tiny(dtype='bfloat16')
    params = init(config)
    logits, rounded, exact = decode(Decoder(params, config)), forward(config, params), forward(tiny(), params)
    known = np.isfinite(logits)
    error = np.linalg.norm((logits - exact)[known]) / np.linalg.norm(exact[known])
    assert error < 1.5 * np.linalg.norm((rounded - exact)[known]) / np.linalg.norm(exact[known]) < 0.1


def test_what_fills_up_a_prompt_is_never_seen():
    decoder = decoder_of()
    np.testing.assert_array_equal(decode(decoder, padding=0), decode(decoder, padding=77))


def test_prompts_may_be_read_a_few_rows_at_a_time():
    decoder = decoder_of()
    width = LENGTHS.max()
    at_once = decoder.prefill(decoder.empty(4, L), TOKENS[:, :width], LENGTHS, WHOLE)
    state = decoder.empty(4, L)
    for first in (2, 0):
        part = slice(first, first + 2)
        state = decoder.prefill(state, TOKENS[part, :width], LENGTHS[part], WHOLE[part], first)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), state, at_once)


def test_on_a_mesh_too_prompts_may_be_read_a_few_rows_at_a_time():
    """Each device reads its share of the prompts into rows of its own; prompt_order names the rows."""
    config = tiny(num_heads=4, num_kv_heads=2, d_model=64, mesh_data=4, mesh_tensor=2)
    params, tokens = init(config), np.tile(TOKENS, (2, 1))[:, :20]
    tokens[4:] = tokens[4:, ::-1]
    lengths, whole = np.tile(LENGTHS, 2), np.tile(WHOLE, 2)
    expected = Decoder(params, config)
    expected = expected.prefill(expected.empty(8, L), tokens, lengths, whole)
    with jax.set_mesh(mesh.build(config)):
        decoder = Decoder(params, config)
        state = decoder.empty(8, L)
        orders = [decoder.prompt_order(8, 4, first) for first in (0, 1)]
        for first, order in enumerate(orders):
            state = decoder.prefill(state, tokens[order], lengths[order], whole[order], first)
    assert orders == [[0, 2, 4, 6], [1, 3, 5, 7]]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5), state, expected)


def test_an_empty_state_is_compiled_once_for_a_size():
    decoder = decoder_of()
    decoder.empty(2, L)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, 'jit', lambda *_, **__: pytest.fail('compiled again'))
        assert decoder.empty(2, L)['position_B'].shape == (2,)


def settings_of(seeds, limit):
    count = len(seeds)
    return {
        'limit_B': np.full(count, limit, np.int32),
        'rope_length_B': np.full(count, limit, np.int32),
        'seed_B': np.array(seeds, np.uint32),
    }


def run(decoder, state, sampling, steps, stop=(), limit=L):
    flags, values = sampling.flags(decoder.model.vocab_size), sampling.values()
    state, tokens = decoder.run(
        state,
        settings_of(range(4), limit),
        np.array(stop, np.int32),
        np.zeros(4, bool),
        np.int32(steps),
        flags=flags,
        values=values,
        block=16,
    )
    return state, np.asarray(tokens)


@pytest.mark.parametrize('sizes', [dict(mesh_fsdp=2, mesh_tensor=2), dict(mesh_context=4)], ids=str)
def test_a_mesh_changes_nothing(sizes):
    """Nor where the mesh of training splits rows, which decoding does not."""
    config = tiny(num_heads=4, num_kv_heads=2, d_model=64, mesh_data=2, **sizes)
    params = init(config)
    sampling = Sampling(1.0, top_p=0.95, repetition_penalty=1.1)

    def generate():
        decoder = Decoder(params, config)
        state = decoder.prefill(decoder.empty(4, L, with_seen=True), TOKENS[:, :20], LENGTHS, WHOLE)
        return decoder, *run(decoder, state, sampling, 12)

    _, whole, tokens = generate()
    device_mesh = mesh.build(config)
    with jax.set_mesh(device_mesh):
        decoder, state, sharded_tokens = generate()
    np.testing.assert_array_equal(sharded_tokens, tokens)
    assert (tokens[:, :12] >= 0).all() and (tokens[:, 12:] == -1).all()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5), state, whole)

    def is_split(x, *logical_axes):
        return x.sharding.is_equivalent_to(mesh.sharding(device_mesh, logical_axes), x.ndim)

    assert all(is_split(cache, 'batch', 'heads') for cache in (state['caches'][0], *state['caches'][1]))
    assert is_split(decoder.weights['layers']['0000']['mixer']['in_proj']['kernel'], 'groups', None, 'embed')


def test_a_mesh_changes_nothing_for_mamba2():
    """Its convolution's state is sharded by groups, its norm's scale by heads; one row has fewer tokens than the convolution."""
    settings = dict(num_heads=4, num_kv_heads=2, d_model=64, pattern='mamba2,attention', attention_encoding='none')
    tokens = np.where(np.arange(L) < LENGTHS[:, None], TOKENS, 0)[:, : LENGTHS.max()]

    def after_steps(config):
        decoder = Decoder(init(config), config)
        state = decoder.prefill(decoder.empty(4, L), tokens, LENGTHS, WHOLE)
        for i in range(5):
            state = decoder.step(state, TOKENS[:, i], WHOLE)
        return jax.device_get(state), state

    whole, _ = after_steps(tiny(**settings))
    config = tiny(**settings, mesh_data=2, mesh_fsdp=2, mesh_tensor=2)
    device_mesh = mesh.build(config)
    with jax.set_mesh(device_mesh):
        sharded, state = after_steps(config)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5), sharded, whole)
    conv_state = state['caches'][0][1]
    assert conv_state.sharding.is_equivalent_to(mesh.sharding(device_mesh, ('batch', None, 'groups', None)), 4)


def test_blocks_of_steps_stop_where_rows_do():
    decoder = decoder_of()
    prefilled = functools.partial(decoder.prefill, tokens_BL=TOKENS[:, :20], length_B=LENGTHS, rope_length_B=WHOLE)
    state, tokens = run(decoder, prefilled(decoder.empty(4, L)), GREEDY, 11)
    assert (tokens[:, :11] >= 0).all() and (tokens[:, 11:] == -1).all()
    np.testing.assert_array_equal(state['position_B'], LENGTHS + 11)
    state, rest = run(decoder, state, GREEDY, 16, limit=24)  # each row ends at 24 tokens; two are there already
    assert [(row >= 0).sum() for row in rest] == [8, 1, 12, 1]
    assert np.asarray(state['done_B']).all() and run(decoder, state, GREEDY, 16)[1].max() == -1

    stop = tokens[0, 4]
    first = [list(row).index(stop) if stop in row else 10 for row in tokens]
    state, stopped = run(decoder, prefilled(decoder.empty(4, L)), GREEDY, 11, stop=[stop, 95])
    for row, whole, end in zip(stopped, tokens, first):
        np.testing.assert_array_equal(row[: end + 1], whole[: end + 1])
        assert (row[end + 1 :] == -1).all()


def test_a_step_neither_copies_caches_nor_weights():
    decoder, rows, length = decoder_of(num_layers=4), 4, 4096
    state = decoder.empty(rows, length)
    flags, values = GREEDY.flags(96), GREEDY.values()
    memory = (
        decoder.run_function(state, flags, 16)
        .lower(
            decoder.weights,
            state,
            settings_of(range(rows), length),
            np.zeros(1, np.int32),
            np.zeros(rows, bool),
            np.int32(8),
            values,
        )
        .compile()
        .memory_analysis()
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    smallest = min(cache.nbytes for layer in (1, 3) for cache in state['caches'][layer])
    assert memory.alias_size_in_bytes >= size, 'the state is changed in place'
    assert memory.temp_size_in_bytes < smallest, 'no cache is copied'


# ---- attention over a cache ------------------------------------------------


def test_attention_over_a_cache_is_softmax_over_its_first_keys():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4, 16), (3, 2, 10, 16), (3, 2, 10, 16)))
    lengths = np.array([1, 10, 6], np.int32)
    got = decode_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(lengths))
    assert got.dtype == jnp.float32
    for row, length in enumerate(lengths):
        for head in range(4):
            keys, values = k[row, head // 2, :length], v[row, head // 2, :length]
            weights = np.exp(keys @ q[row, head] / 4)
            np.testing.assert_allclose(got[row, head], weights @ values / weights.sum(), rtol=1e-5, atol=1e-6)
    rounded = decode_attention(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), jnp.asarray(lengths))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), got, atol=3e-2)


def test_a_token_is_written_at_its_own_place():
    cache, x = jnp.zeros((3, 2, 5, 16)), jnp.arange(96.0).reshape(3, 2, 16) + 1
    after = np.array(write_token(cache, x, jnp.array([0, 4, 9])))
    for row, place in enumerate((0, 4, 4)):
        np.testing.assert_array_equal(after[row, :, place], x[row])
        after[row, :, place] = 0
    assert not after.any()


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(q=(3, 5, 16)), 'dividing its 5 heads'),
        (dict(k=(3, 2, 10, 8)), 'must be'),
        (dict(v=(3, 2, 9, 16)), 'both must be'),
        (dict(q=(3, 16)), 'must be'),
        (dict(length=(2,)), 'length has shape'),
        (dict(implementation='fast'), "implementation='fast'"),
    ],
)
def test_wrong_arguments_of_attention_are_named(change, message):
    shapes = dict(q=(3, 4, 16), k=(3, 2, 10, 16), v=(3, 2, 10, 16), length=(3,)) | change
    implementation = shapes.pop('implementation', 'xla')
    arrays = [jnp.ones(shape, jnp.int32 if name == 'length' else jnp.float32) for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=message):
        decode_attention(*arrays, implementation=implementation)
