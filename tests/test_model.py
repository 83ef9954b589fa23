"""Properties of the model and its loss: causality, packing, patterns, settings that must mean nothing, rope scaling."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import packed_batch, small_config

from transxssm_jax.config import Model
from transxssm_jax.model import layers, loss, parameters, rope
from transxssm_jax.model.language_model import Block
from transxssm_jax.model.loss import IGNORED, next_token_loss

L = 32


def tiny(**settings):
    """(ssd, attention), float32; settings of the model by name."""
    settings = (
        dict(
            num_layers=2,
            d_model=32,
            num_heads=2,
            num_kv_heads=2,
            num_ssd_groups=2,
            d_mlp=32,
            attention_period=2,
            attention_offset=1,
        )
        | settings
    )
    return small_config(
        data_seq_len=L, data_global_batch=2, **{f'model_{name}': value for name, value in settings.items()}
    )


@functools.cache
def _logits_function(model_json):
    config = tiny(**dict(model_json))
    graph, _ = parameters.split_model(config.model)
    return jax.jit(lambda params, tokens, **where: nnx.merge(graph, params).logits(tokens, **where))


def logits(params, tokens, settings, **where):
    return np.asarray(_logits_function(tuple(sorted(settings.items())))(params, jnp.asarray(tokens), **where))


def init(settings, seed=0):
    """Parameters with everything away from its special initial value, so that each matters."""
    params = parameters.init_params(tiny(**settings).model, seed)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), params)


def tokens_of(shape=(2, L), seed=0):
    return np.random.default_rng(seed).integers(0, 96, shape).astype(np.int32)


VARIANTS = {
    'hybrid': {},
    'attention first': dict(attention_offset=0),
    'attention everywhere': dict(attention_period=1, attention_offset=0),
    'attention nowhere': dict(attention_period=0),
    'mamba2': dict(pattern='mamba2'),
    'jamba': dict(pattern='mamba2,attention', attention_encoding='none'),
    'other': dict(num_kv_heads=1, num_ssd_groups=1, use_bias=True, tie_embeddings=False, use_dt_bias=False),
}


@pytest.mark.parametrize('name', VARIANTS)
def test_causality(name):
    settings = VARIANTS[name]
    params, tokens = init(settings), tokens_of()
    before = logits(params, tokens, settings)
    assert before.shape == (2, L, 96) and before.dtype == np.float32 and np.isfinite(before).all()
    for place in (0, 15, 16, L - 1):  # chunks of the scan are 16 long
        changed = tokens.copy()
        changed[:, place] = (changed[:, place] + 1) % 96
        after = logits(params, changed, settings)
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        later = np.abs(after - before)[:, place:].max(axis=(0, 2))
        assert (later > 1e-4).all(), 'every later position sees it'


def loss_and_gradients(config):
    graph, _ = parameters.split_model(config.model)

    def loss(params, batch):
        model = nnx.merge(graph, params)
        hidden = model(batch['tokens'], segment_ids_BL=batch['segment_ids'], positions_BL=batch['positions'])
        objective, sums = next_token_loss(hidden, model.head_VD, batch['targets'], z_loss=1e-3, chunk_tokens=32)
        return objective, sums

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(
    'settings',
    [
        dict(num_kv_heads=1, num_ssd_groups=1),
        dict(pattern='attention'),
        dict(pattern='mamba2', num_ssd_groups=1),
        dict(pattern='mamba2,attention', attention_encoding='none'),
        dict(ssd_encoding='conv1d_d'),
    ],
    ids=str,
)
def test_packed_documents_are_separate_documents(settings):
    config, params = tiny(**settings), init(settings)
    packed = packed_batch(config)
    names = list(packed)
    separate = {name: [] for name in names}
    for row in range(2):
        for segment in np.unique(packed['segment_ids'][row]):
            mine = packed['segment_ids'][row] == segment
            for name in names:
                values = np.full(L, IGNORED if name == 'targets' else 0, np.int32)
                values[: mine.sum()] = packed[name][row][mine]
                separate[name].append(values)
    separate = {name: np.stack(rows) for name, rows in separate.items()}
    assert len(separate['tokens']) > 4 and (separate['positions'][:, 0] == 0).all()

    run = loss_and_gradients(config)
    (objective, sums), gradients = run(params, packed)
    (expected, expected_sums), expected_gradients = run(params, separate)
    assert sums['tokens'] == expected_sums['tokens'] == (packed['targets'] != IGNORED).sum()
    np.testing.assert_allclose(objective, expected, rtol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        reference = functools.reduce(lambda tree, key: tree[key.key], path, expected_gradients)
        assert np.abs(reference).max() > 0, path
        np.testing.assert_allclose(leaf, reference, atol=2e-5 * np.abs(reference).max(), err_msg=str(path))
    # And the boundaries do matter:
    joined = packed | {'segment_ids': np.ones_like(packed['segment_ids'])}
    assert abs(float(run(params, joined)[0][0]) - float(expected)) > 1e-2


def test_a_document_is_the_same_wherever_it_stands():
    params, tokens = init({}), tokens_of()
    shifted = logits(params, tokens, {}, positions_BL=jnp.broadcast_to(jnp.arange(L) + 9, (2, L)))
    # One rotary embedding for both kinds of layer: only distances count.
    np.testing.assert_allclose(shifted, logits(params, tokens, {}), atol=2e-4)
    stretched = logits(params, tokens, {}, positions_BL=jnp.broadcast_to(2 * jnp.arange(L), (2, L)))
    assert np.abs(stretched - shifted).max() > 1e-2


def test_parameters_follow_the_pattern():
    def kinds(**settings):
        params = parameters.init_params(tiny(**settings).model, 0)
        return {kind: tree['mixer']['in_proj']['norm']['scale'].shape[:2] for kind, tree in params['layers'].items()}

    assert kinds(num_layers=8, attention_period=4, attention_offset=2) == {'ssd': (2, 3), 'attention': (2, 1)}
    assert kinds(num_layers=4, attention_period=1, attention_offset=0) == {'attention': (4, 1)}
    assert kinds(num_layers=4, attention_period=0) == {'ssd': (4, 1)}


@pytest.mark.parametrize('offset', [0, 2])
def test_scanned_layers_are_the_blocks_in_order(offset):
    settings = dict(num_layers=8, attention_period=4, attention_offset=offset)
    config, params, tokens = tiny(**settings), init(settings), tokens_of()
    positions = jnp.broadcast_to(jnp.arange(L), tokens.shape)
    kinds = config.model.layer_pattern
    graphs = {
        kind: nnx.split(nnx.eval_shape(lambda kind=kind: Block(config.model, kind, rngs=nnx.Rngs(0))))[0]
        for kind in set(kinds)
    }

    @jax.jit
    def one(graph_params, x, kind_is_ssd):
        kind = 'ssd' if kind_is_ssd else 'attention'
        tables = rope.tables(positions, 16, config.model)  # both kinds are 16 wide here
        return nnx.merge(graphs[kind], graph_params)(
            x, rope=tables, scale_BL=None, segment_ids_BL=jnp.ones_like(positions)
        )

    one = jax.jit(one.__wrapped__, static_argnums=2)
    x = params['embedding'][tokens]
    for module in range(2):
        for i, kind in enumerate(kinds):
            place = kinds[:i].count(kind)
            x = one(jax.tree.map(lambda leaf: leaf[module, place], params['layers'][kind]), x, kind == 'ssd')  # noqa: B023
    scale = params['final_norm']['scale']
    x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + config.model.norm_epsilon) * scale
    np.testing.assert_allclose(logits(params, tokens, settings), x @ params['embedding'].T, atol=1e-3)


# ---- settings that are equal to others -------------------------------------


def test_groups_are_heads_that_share():
    few, many = dict(num_kv_heads=1, num_ssd_groups=1), {}
    params = init(few)
    shared = jax.tree.map(lambda leaf: leaf, params)
    for kind, names in (('ssd', 'bc'), ('attention', 'kv')):
        for name in names:
            kernel = shared['layers'][kind]['mixer']['in_proj'][name]['kernel']  # [modules, layers, D, G, width]
            shared['layers'][kind]['mixer']['in_proj'][name]['kernel'] = jnp.repeat(kernel, 2, axis=3)
    np.testing.assert_allclose(logits(params, tokens_of(), few), logits(shared, tokens_of(), many), atol=1e-4)


def test_switches_that_add_parameters_change_nothing_at_zero():
    more = dict(use_bias=True, tie_embeddings=False)
    plain = init(dict(use_dt_bias=False))
    params = jax.tree.map(jnp.zeros_like, init(more))
    filled = nnx.traversals.flatten_mapping(params) | nnx.traversals.flatten_mapping(plain)
    filled[('head',)] = plain['embedding']
    added = set(filled) - set(nnx.traversals.flatten_mapping(plain))
    assert {path[-1] for path in added} == {'bias', 'dt_bias', 'head'}
    params = nnx.traversals.unflatten_mapping(filled)
    expected = logits(plain, tokens_of(), dict(use_dt_bias=False))
    np.testing.assert_allclose(logits(params, tokens_of(), more), expected, atol=1e-5)
    for path in sorted(added):  # and each of them is in use; K's bias shifts all scores of a query alike, without rope
        changed = filled | {path: filled[path] + 0.5 * jax.random.normal(jax.random.key(0), filled[path].shape)}
        got = logits(nnx.traversals.unflatten_mapping(changed), tokens_of(), more)
        assert np.abs(got - expected).max() > 1e-4, path


def test_bfloat16_is_close_to_float32():
    params, tokens = init({}), tokens_of()
    exact, rounded = logits(params, tokens, {}), logits(params, tokens, dict(dtype='bfloat16'))
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 3e-2
    graph, _ = parameters.split_model(tiny(dtype='bfloat16').model)
    hidden = jax.eval_shape(lambda params: nnx.merge(graph, params)(tokens), params)
    assert hidden.dtype == jnp.bfloat16 and hidden.shape == (2, L, 32)


# ---- initialisation --------------------------------------------------------


def test_initial_values():
    model = Model(
        vocab_size=256,
        d_model=1024,
        num_layers=8,
        num_heads=64,
        num_kv_heads=2,
        num_ssd_groups=2,
        d_state=16,
        d_mlp=16,
        use_bias=True,
    )
    params = parameters.init_params(model, 0)
    mixer = params['layers']['ssd']['mixer']
    a, dt = -np.exp(mixer['a_log']), np.asarray(jax.nn.softplus(mixer['dt_bias']))
    assert a.shape == dt.shape == (1, 7, 64)
    assert -16 <= a.min() < -14 and -3 < a.max() <= -1
    assert abs(a.mean() + 8.5) < 1, 'uniform'
    assert 0.001 * 0.999 <= dt.min() < 0.0015 and 0.07 < dt.max() <= 0.1 * 1.001
    assert abs(np.log10(dt).mean() + 2) < 0.1, 'uniform in the logarithm'
    assert len(np.unique(a)) == a.size, 'every layer and head has its own'
    for path, leaf in nnx.traversals.flatten_mapping(params).items():
        if path[-1] in ('kernel', 'embedding'):
            assert abs(np.std(leaf) / 0.02 - 1) < 0.05 and abs(np.mean(leaf)) < 1e-3, path
        elif path[-1] in ('scale', 'weight'):
            assert (leaf == 1).all(), path
        elif path[-1] == 'bias':
            assert not leaf.any(), path
        assert leaf.dtype == jnp.float32, path
    narrow = parameters.init_params(tiny(a_min=2.0, a_max=3.0, dt_min=0.02, dt_max=0.03).model, 0)['layers']['ssd'][
        'mixer'
    ]
    assert np.exp(narrow['a_log']).min() >= 2 and np.exp(narrow['a_log']).max() <= 3.0001
    assert jax.nn.softplus(narrow['dt_bias']).min() > 0.0199 and jax.nn.softplus(narrow['dt_bias']).max() < 0.0301


def test_inverse_softplus():
    y = jnp.asarray([1e-6, 1e-3, 0.1, 1.0, 30.0])
    np.testing.assert_allclose(jax.nn.softplus(layers.inverse_softplus(y)), y, rtol=1e-5)


def test_another_seed_gives_other_parameters():
    first, second = (parameters.init_params(tiny().model, seed)['embedding'] for seed in (0, 1))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, parameters.init_params(tiny().model, 0)['embedding'])


# ---- rope scaling ----------------------------------------------------------


def angles(positions, width=16, **settings):
    cos, sin = rope.tables(jnp.asarray(positions), width, Model(**settings))
    return np.asarray(cos), np.asarray(sin)


def written_out(positions, theta=10000.0, width=16):
    angle = np.asarray(positions, np.float64)[..., None] * theta ** (-np.arange(0, width, 2) / width)
    return np.cos(angle), np.sin(angle)


POSITIONS = np.stack([np.arange(40), np.arange(40) % 20])


def assert_tables(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_unscaled_tables():
    assert_tables(angles(POSITIONS), written_out(POSITIONS))
    assert_tables(angles(POSITIONS, rope_theta=500.0), written_out(POSITIONS, 500.0))
    for scaling in ('none', 'length'):
        assert_tables(angles(POSITIONS, rope_scaling=scaling, rope_original_length=8), written_out(POSITIONS))


@pytest.mark.parametrize('scaling', ['none', 'linear', 'length'])
def test_angles_are_exact_at_any_position(scaling):
    positions = np.array([[4095, 131_071, 1_000_000, 16_777_217, 2**31 - 1]])
    got = angles(positions, width=128, rope_scaling=scaling, rope_factor=3.0)
    expected = written_out(positions / (3.0 if scaling == 'linear' else 1.0), width=128)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_dynamic_scaling_rotates_by_the_difference_of_positions_at_any_position():
    """Its frequencies are float32 numbers, but the angles of two positions differ by exactly their distance."""
    settings = dict(width=128, rope_scaling='dynamic', rope_original_length=4096)
    cos, sin = angles(np.array([[7, 1_000_000, 1_000_007]]), **settings)
    difference = (cos[0, 2] * cos[0, 1] + sin[0, 2] * sin[0, 1], sin[0, 2] * cos[0, 1] - cos[0, 2] * sin[0, 1])
    for ours, theirs in zip(difference, (cos[0, 0], sin[0, 0]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_linear_scaling_divides_positions():
    assert_tables(angles(POSITIONS, rope_scaling='linear', rope_factor=4.0), written_out(POSITIONS / 4))


def test_dynamic_scaling_starts_beyond_the_training_length():
    settings = dict(rope_scaling='dynamic', rope_factor=3.0)
    assert_tables(angles(POSITIONS, **settings, rope_original_length=40), written_out(POSITIONS))
    cos, sin = angles(POSITIONS, **settings, rope_original_length=20)
    # The second row's longest document fits, so the row is left as it is.
    assert_tables((cos[1], sin[1]), written_out(POSITIONS[1]))
    # transformers' _compute_dynamic_ntk_parameters, written out.
    theta = 10000 * (3.0 * 40 / 20 - (3.0 - 1)) ** (16 / 14)
    assert_tables((cos[0], sin[0]), written_out(POSITIONS[0], theta))


def test_length_scale_is_1_up_to_the_training_length():
    assert rope.length_scale(jnp.asarray(POSITIONS), Model()) is None
    model = Model(rope_scaling='length', rope_original_length=8)
    scale = np.asarray(rope.length_scale(jnp.asarray(POSITIONS), model))
    assert (scale[:, :8] == 1).all() and (scale[0, 8:] > 1).all()
    np.testing.assert_allclose(scale, np.maximum(1, np.log(POSITIONS + 1) / np.log(8)), rtol=1e-6)


def test_scaling_within_the_whole_model():
    params, tokens = init({}), tokens_of()
    plain = logits(params, tokens, {})

    def scaled(kind, original=16, tokens=tokens, **settings):
        return logits(params, tokens, dict(rope_scaling=kind, rope_original_length=original, **settings))

    for kind in ('linear', 'dynamic', 'length'):
        assert np.isfinite(scaled(kind)).all()
        assert np.abs(scaled(kind) - plain)[:, 16:].max() > 1e-4, kind
    np.testing.assert_allclose(scaled('length')[:, :16], plain[:, :16], atol=1e-6)
    np.testing.assert_allclose(scaled('dynamic', original=L), plain, atol=1e-5)
    doubled = jnp.broadcast_to(2 * jnp.arange(L), tokens.shape)
    halved = logits(
        params, tokens, dict(rope_scaling='linear', rope_original_length=16, rope_factor=2.0), positions_BL=doubled
    )
    np.testing.assert_allclose(halved, plain, atol=1e-4)


def test_rotation_keeps_lengths_and_turns_by_the_difference():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 40, 3, 16))
    cos_sin = rope.tables(jnp.arange(40)[None], 16, Model())
    turned = rope.rotate(x, cos_sin)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(turned[:, 0], x[:, 0], atol=1e-6)
    same = jnp.broadcast_to(x[:, :1], x.shape), jnp.broadcast_to(y[:, :1], y.shape)
    products = jnp.einsum('BLHK,BSHK->HLS', *(rope.rotate(v, cos_sin) for v in same))
    np.testing.assert_allclose(products[:, 5, 3], products[:, 35, 33], atol=1e-4)
    assert rope.rotate(x.astype(jnp.bfloat16), cos_sin).dtype == jnp.bfloat16


# ---- loss ------------------------------------------------------------------


def dense_loss(hidden, head, targets, z_loss, cap=0.0):
    logits = hidden @ head.T
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    counted = targets != IGNORED
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(counted, lse - target + z_loss * lse**2, 0.0)), jnp.sum(
        jnp.where(counted, lse - target, 0.0)
    )


def loss_inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    targets = jax.random.randint(keys[2], (2, 24), 0, 50)
    targets = jnp.where(jax.random.bernoulli(keys[3], 0.3, targets.shape), IGNORED, targets)
    return 2 * jax.random.normal(keys[0], (2, 24, 16)), jax.random.normal(keys[1], (50, 16)), targets


@pytest.mark.parametrize('chunk', [48, 16, 7, 1000], ids='chunk{}'.format)
@pytest.mark.parametrize('z_loss, cap', [(0.0, 0.0), (1e-2, 0.0), (1e-2, 5.0)])
def test_chunked_loss_is_the_dense_loss(chunk, z_loss, cap):
    hidden, head, targets = loss_inputs()

    def ours(hidden, head):
        settings = dict(z_loss=z_loss, chunk_tokens=chunk, logit_soft_cap=cap)
        objective, sums = next_token_loss(hidden, head, targets, **settings)
        return 3.0 * objective, sums  # a cotangent other than 1

    def dense(hidden, head):
        objective, nll = dense_loss(hidden, head, targets, z_loss, cap)
        return 3.0 * objective, nll

    (objective, sums), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(hidden, head)
    (expected, nll), expected_gradients = jax.value_and_grad(dense, argnums=(0, 1), has_aux=True)(hidden, head)
    np.testing.assert_allclose(objective, expected, rtol=1e-5)
    np.testing.assert_allclose(sums['nll'], nll, rtol=1e-5)
    assert sums['tokens'] == (targets != IGNORED).sum()
    np.testing.assert_allclose(ours(hidden, head)[0], expected, rtol=1e-5)  # also where no gradient is asked for
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max() + 1e-6)


def test_ignored_positions_count_for_nothing():
    hidden, head, targets = loss_inputs()
    ignored = (targets == IGNORED)[..., None]
    kwargs = dict(z_loss=1e-2, chunk_tokens=16)
    objective, sums = next_token_loss(hidden, head, targets, **kwargs)
    other, _ = next_token_loss(jnp.where(ignored, 100.0, hidden), head, targets, **kwargs)
    assert objective == other
    gradient = jax.grad(lambda hidden: next_token_loss(hidden, head, targets, **kwargs)[0])(hidden)
    assert not gradient[np.broadcast_to(ignored, gradient.shape)].any()
    assert gradient[~np.broadcast_to(ignored, gradient.shape)].all()
    objective, sums = next_token_loss(hidden, head, jnp.full_like(targets, IGNORED), **kwargs)
    assert objective == 0 and sums == {'nll': 0, 'tokens': 0}


def test_large_logits_do_not_overflow():
    hidden, head, targets = loss_inputs()
    value, gradient = jax.value_and_grad(
        lambda hidden: next_token_loss(hidden, head, targets, z_loss=1e-4, chunk_tokens=16)[0]
    )(1e3 * hidden)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize('scale', [1.0, 1e4])
def test_one_pass_finds_the_maximum_and_the_sum(scale):
    """What GPUs compute, on a CPU."""
    logits = scale * jax.random.normal(jax.random.key(0), (16, 1000))
    top, total = jax.jit(loss._top_and_sum_in_one_pass)(logits)
    np.testing.assert_array_equal(top, logits.max(axis=-1))
    wide = np.asarray(logits, np.float64)
    np.testing.assert_allclose(total, np.exp(wide - wide.max(axis=-1, keepdims=True)).sum(axis=-1), rtol=1e-5)
    for broken in (np.nan, np.inf):
        top, total = loss._top_and_sum_in_one_pass(logits.at[3, 500].set(broken))
        assert np.isnan(total[3]) and np.isfinite(total[:3]).all()


@pytest.mark.parametrize('platform, reductions_of_pairs', [('cuda', 1), ('tpu', 0), ('cpu', 0)])
def test_a_gpu_reads_the_logits_once_for_both(platform, reductions_of_pairs):
    hidden, head, targets = loss_inputs()
    value = jax.jit(lambda hidden: next_token_loss(hidden, head, targets, z_loss=0.0, chunk_tokens=16)[0])
    text = value.trace(hidden).lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(r'stablehlo\.reduce\(%\S+ init: %\S+\), \(%\S+ init', text)) == reductions_of_pairs


def test_bfloat16_operands_give_a_float32_loss():
    hidden, head, targets = loss_inputs()
    exact = next_token_loss(hidden, head, targets, z_loss=0.0, chunk_tokens=16)[0]
    objective, sums = next_token_loss(hidden.astype(jnp.bfloat16), head, targets, z_loss=0.0, chunk_tokens=16)
    assert objective.dtype == sums['nll'].dtype == jnp.float32
    np.testing.assert_allclose(objective, exact, rtol=2e-2)
