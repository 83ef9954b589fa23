"""Muon: the update is that of optax written for whole matrices, on any mesh, in the way that sends less."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib
from small import packed_batch, small_config

from pallas_kernels.hlo import parse
from transxssm_jax import config as config_lib
from transxssm_jax.config_optimizer import GROUPS
from transxssm_jax.model.parameters import init_params
from transxssm_jax.parallel import collectives, mesh, whole_matrices
from transxssm_jax.planning import hlo, roofline
from transxssm_jax.training import muon, optimizer, parameter_groups
from transxssm_jax.training import step as step_lib

MESHES = {
    'fsdp': dict(mesh_data=2, mesh_fsdp=4),
    'tensor': dict(mesh_data=4, mesh_tensor=2),
    'all': dict(mesh_data=2, mesh_fsdp=2, mesh_tensor=2),
}


SMALLER = dict(model_num_layers=4, model_attention_period=2, model_attention_offset=1, data_seq_len=16)


def muon_config(**settings):
    return small_config(**SMALLER | dict(optimizer_name='muon', optimizer_weight_decay=0.1) | settings)


def random_like(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves])


def updated(config, grads, params, step):
    tx = optimizer.make_optimizer(config)

    def update(grads, params):
        return optimizer.update(tx, grads, optimizer.init(tx, params), params, jnp.int32(step))[0]

    return jax.jit(update)(grads, params)


def flat(tree):
    return {'/'.join(path): leaf for path, leaf in nnx.traversals.flatten_mapping(tree).items()}


def test_updates_are_those_of_optax_for_kernels_seen_as_matrices():
    """Three steps of optax.contrib.muon, to which the stack and the heads are spelled out."""
    config = muon_config(optimizer_warmup_steps=0, optimizer_schedule='constant')
    o, params = config.optimizer, init_params(config.model, 0)
    outputs_last = {'x', 'b', 'c', 'q', 'k', 'v', 'gate', 'up'}

    def dimensions(params):
        def of(path, leaf):
            names = [key.key for key in path]
            if names[0] != 'layers' or names[-1] != 'kernel' or 'dt' in names:
                return None
            if names[-2] in outputs_last:
                return contrib.MuonDimensionNumbers(2, tuple(range(3, leaf.ndim)))
            return contrib.MuonDimensionNumbers(tuple(range(2, leaf.ndim - 1)), leaf.ndim - 1)

        return jax.tree_util.tree_map_with_path(of, params)

    reference = optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.contrib.muon(
            o.learning_rate,
            beta=o.momentum,
            weight_decay=o.weight_decay,
            adam_b1=o.b1,
            adam_b2=o.b2,
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=muon.RMS,
        ),
    )
    tx = optimizer.make_optimizer(config)
    state, opt_state = reference.init(params), optimizer.init(tx, params)
    run = jax.jit(functools.partial(optimizer.update, tx))
    for step in range(3):
        grads = random_like(params, step)
        expected, state = jax.jit(reference.update)(grads, state, params)
        updates, opt_state = run(grads, opt_state, params, jnp.int32(step))
        matrices = 0
        for (path, ours), theirs in zip(
            jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(expected), strict=True
        ):
            if muon.is_matrix(path):
                np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5, err_msg=str(path))
                matrices += 1
        assert matrices == 2 * 4 + 2 * 3, 'in_proj and out_proj of both mixers, and of both MLPs'


def test_the_rest_is_adamw():
    config, plain = muon_config(), small_config(**SMALLER, optimizer_weight_decay=0.1)
    params = init_params(config.model, 0)
    grads = random_like(params, 0)
    updates = [updated(config, grads, params, 1) for config in (config, plain)]
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(updates[0]), jax.tree.leaves(updates[1])):
        if not muon.is_matrix(path):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9, err_msg=str(path))


def test_a_head_split_kernel_is_one_matrix_and_a_layer_is_its_own():
    """Singular values of each layer's whole matrix are near 1, before the scale."""
    config = muon_config()
    params = init_params(config.model, 0)
    kernel = params['layers']['ssd']['mixer']['in_proj']['x']['kernel']
    # A layer of large gradients beside one of small ones: each is normalised by itself.
    kernel *= jnp.asarray([1.0, 1e3])[:, None, None, None, None]
    kernels = {'layers': {'ssd': {'mixer': {'in_proj': {'x': {'kernel': kernel}}}}}}
    (result,) = jax.tree.leaves(muon.orthogonalize(config.model, kernels))
    for layer in np.asarray(result).reshape(-1, 64, 64):
        values = np.linalg.svd(layer / (muon.RMS * math.sqrt(64)), compute_uv=False)
        assert 0.5 < np.median(values) < 1.3 and values.max() < 1.3
        assert math.isclose(np.sqrt(np.mean(layer**2)), muon.RMS, rel_tol=0.15), 'an element moves as with AdamW'


@functools.cache
def states(name):
    """(state after two steps, metrics) on a mesh; None: on one device."""
    settings = MESHES[name] if name else dict(mesh_data=1)
    config = muon_config(
        optimizer_ema_decay=0.9, model_qk_norm=True, model_bc_norm=True, model_logit_soft_cap=3.0, **settings
    )
    device_mesh = mesh.build(config, None if name else jax.devices()[:1])
    state = step_lib.create_state(config, device_mesh)
    with jax.set_mesh(device_mesh):
        step = jax.jit(step_lib.train_step(config), out_shardings=(step_lib.state_shardings(config, device_mesh), None))
        for seed in (0, 1, 2):
            batch = jax.device_put(packed_batch(config, seed), step_lib.batch_sharding(device_mesh))
            state, metrics = step(state, batch)
    return jax.device_get((state, metrics))


@pytest.mark.parametrize('name', ['fsdp', 'all'])
def test_sharded_is_one_device(name):
    """With an average, head norms and a soft cap too: after three steps everything is as on one device."""
    (state, metrics), (expected, expected_metrics) = states(name), states('')
    np.testing.assert_allclose(metrics['loss'], expected_metrics['loss'], rtol=1e-5)
    found = flat(state)
    for path, wanted in flat(expected).items():
        scale = np.abs(wanted).max()
        # An orthogonalised gradient of rounding is as large as any, which the smallest singular values are made of.
        np.testing.assert_allclose(found[path], wanted, atol=2e-3 * scale + 1e-9, err_msg=path)


# ---- how matrices become whole -------------------------------------------------


@pytest.mark.parametrize('count', [1, 2, 3, 8, 11])
@pytest.mark.parametrize('name', ['fsdp', 'tensor', 'all'])
def test_a_function_of_whole_matrices_is_one_on_shards(name, count):
    device_mesh = mesh.build(small_config(**MESHES[name]))
    axes = (None, 'embed', 'heads', None)
    stack = jax.random.normal(jax.random.key(0), (count, 8, 4, 3))

    def function(stack):  # mixes everything of a matrix, and nothing of two
        assert stack.shape[1:] == (8, 4, 3)
        return stack * jnp.cumsum(stack.reshape(len(stack), -1), axis=1).reshape(stack.shape)

    with jax.set_mesh(device_mesh):
        of_block = functools.partial(whole_matrices.on_whole, function, axes=axes[1:])
        found = jax.jit(collectives.shard_map(of_block, (axes,), axes))(stack)
    np.testing.assert_allclose(found, function(stack), rtol=1e-5, atol=1e-5)


def test_the_way_that_sends_less_is_taken():
    choose = whole_matrices.choose
    assert choose(24, 24 * 100, 1) == ('local', 0.0, 24)
    assert choose(24, 2400, 8) == ('distribute', 2 * 300 * 7 / 8, 3)
    assert choose(1, 100, 8) == ('gather', 12.5 * 7, 1)
    assert choose(2, 200, 2).way == 'distribute', 'as many bytes, half of the work'
    for count in range(1, 40):
        for devices in (2, 4, 8, 32):
            block = count * 64 / devices
            padded = 64 * -(-count // devices)  # a device's share, whole matrices
            least = min(block * (devices - 1), 2 * padded * (devices - 1) / devices)
            assert choose(count, count * 64, devices).sent == pytest.approx(least), (count, devices)


@pytest.mark.parametrize('name', ['fsdp', 'all'])
def test_plan_counts_the_bytes_that_the_compiled_program_sends(name):
    """The collectives of the compiled orthogonalisation are those that the roofline counts, to the byte."""
    config = muon_config(**MESHES[name])
    device_mesh = mesh.build(config)
    shapes = step_lib.abstract_state(config, device_mesh)['opt_state']['inner_states']['muon']['inner_state'][
        'momentum'
    ]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    with jax.set_mesh(device_mesh):
        run = jax.jit(functools.partial(muon.orthogonalize, config.model), out_shardings=shardings)
        compiled = run.lower(shapes).compile()
    found = hlo.collectives(parse(compiled.as_text()))
    sent = sum(c.runs * c.comm_bytes for c in found)
    expected = roofline.min_comm_bytes(config, dict(device_mesh.shape))['muon']
    assert {c.kind for c in found} <= {'all-to-all', 'all-gather'} and expected > 0
    np.testing.assert_allclose(sent, expected)


def test_plan_counts_state_and_work():
    ours, plain = muon_config(), small_config(**SMALLER)
    one, eight = dict.fromkeys(mesh.AXES, 1), dict(data=1, fsdp=8, context=1, tensor=1)
    shapes = jax.eval_shape(functools.partial(step_lib.init_state, ours), 0)
    for config in (ours, plain, muon_config(optimizer_ema_decay=0.9)):
        state = jax.eval_shape(functools.partial(step_lib.init_state, config), 0)
        size = sum(4 * leaf.size for leaf in jax.tree.leaves(state)) - 4  # but for the step
        assert roofline.min_memory_bytes(config, one)['state'] == size
    matrices = sum(
        leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(shapes['params']) if muon.is_matrix(path)
    )
    assert sum(stack.elements for stack in muon.stacks(ours.model, eight)) == matrices
    more = roofline.executed_flops_per_token(ours, eight) - roofline.executed_flops_per_token(plain, eight)
    work = sum(muon.flops(stack) for stack in muon.stacks(ours.model, eight))
    assert math.isclose(more, work * 8 / ours.tokens_per_step, rel_tol=1e-6)
    assert 'muon' not in roofline.min_comm_bytes(plain, eight)


# ---- groups and averages -------------------------------------------------------


def test_every_parameter_is_in_one_group():
    config = small_config(
        model_use_bias=True, model_tie_embeddings=False, model_pattern='ssd,mamba2,attention', model_num_layers=3
    )
    params = jax.eval_shape(lambda: init_params(config.model, 0))
    names = {}
    for name, group in flat(parameter_groups.groups(params)).items():
        names.setdefault(group, set()).add(name)
    assert set(names) == set(GROUPS)
    assert names['embedding'] == {'embedding', 'head'}
    dt = {'in_proj/dt/kernel', 'in_proj/dt/bias', 'a_log', 'dt_bias'}
    assert names['dt'] == {f'layers/{kind}/mixer/{name}' for kind in ('ssd', 'mamba2') for name in dt}
    assert all(name.endswith('/scale') for name in names['norms']) and 'final_norm/scale' in names['norms']
    assert all(name.endswith('residual/weight') for name in names['residuals'])
    assert all('/conv/' in name for name in names['convolution'])
    assert all(name.endswith('/kernel') for name in names['matrices'])


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_group_has_its_own_rate_and_decay(name):
    settings = dict(
        optimizer_name=name, optimizer_warmup_steps=0, optimizer_schedule='constant', optimizer_weight_decay=0.3
    )
    plain, ours = (
        small_config(**settings),
        small_config(**settings, optimizer_groups='embedding: 0.5; dt: 0.1, 0; norms: 2, 0.7'),
    )
    params = random_like(init_params(plain.model, 0), 1)
    grads = random_like(params, 2)
    free = small_config(**settings | dict(optimizer_weight_decay=0.0))
    before, after, without = (updated(config, grads, params, 0) for config in (plain, ours, free))
    rate = plain.optimizer.learning_rate
    for path, update in jax.tree_util.tree_leaves_with_path(after):
        leaf = functools.partial(functools.reduce, lambda node, key: node[key.key], path)
        group = parameter_groups.group_of(path)
        expected = {
            'embedding': 0.5 * leaf(before),
            'dt': 0.1 * leaf(without),
            'norms': 2 * (leaf(without) - rate * 0.7 * leaf(params)),
        }.get(group, leaf(before))
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-7, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    'groups, message',
    [
        ('embeding: 1', "'embeding: 1' names no group of parameters; did you mean embedding"),
        ('dt: 1; dt: 2', "'dt: 2' is a second entry of dt"),
        ('dt', "must be 'GROUP: FACTOR' or 'GROUP: FACTOR, DECAY'"),
        ('dt: x', 'must be float'),
        ('dt: 1, 2, 3', "must be 'GROUP: FACTOR'"),
        ('dt: -1', 'must be at least 0'),
    ],
)
def test_groups_that_are_none(groups, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        small_config(optimizer_groups=groups)


def test_the_average_is_that_of_the_weights():
    config = small_config(**SMALLER, optimizer_ema_decay=0.9, mesh_data=1)
    device_mesh = mesh.build(config, jax.devices()[:1])
    state = step_lib.create_state(config, device_mesh)
    expected, step = jax.device_get(state['params']), jax.jit(step_lib.train_step(config))
    for i in range(3):
        state, _ = step(state, packed_batch(config, i))
        decay = min(0.9, (1 + i) / (10 + i))
        expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * np.asarray(new), expected, state['params'])  # noqa: B023
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state['ema'], expected)
    limits = jnp.asarray([0.0, 0.0])  # nothing is below them: the step is skipped
    after, metrics = step(state, packed_batch(config, 3), limits)
    assert metrics['skipped'] == 1
    jax.tree.map(np.testing.assert_array_equal, after['ema'], state['ema'])
