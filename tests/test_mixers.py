"""Every registered mixer on meshes of tensor, fsdp, data and context: the block's values and gradients are one device's.

A mixer contains no collective: it gets them from the layers that it is built of. One that uses a parameter past them
fails here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import small_config

from transxssm_jax.layer_pattern import KINDS
from transxssm_jax.model import costs, rope
from transxssm_jax.model.language_model import Block
from transxssm_jax.model.mixers import MIXERS
from transxssm_jax.parallel import collectives, mesh

B, L, D = 4, 32, 64
# On those in STREAMED the block gets the part of the residual stream that it has in training.
STREAMED = ('tensor', 'all')
MESHES = {
    'tensor': dict(mesh_data=2, mesh_tensor=4),
    'fsdp and tensor': dict(mesh_data=1, mesh_fsdp=4, mesh_tensor=2),
    'context': dict(mesh_data=1, mesh_fsdp=2, mesh_context=4),
    'all': dict(mesh_data=1, mesh_fsdp=2, mesh_context=2, mesh_tensor=2),
}


def config_of(**settings):
    usual = dict(
        model_d_model=D,
        model_num_heads=4,
        model_num_kv_heads=4,
        model_num_ssd_groups=4,
        model_use_bias=True,
        data_seq_len=L,
        data_global_batch=B,
    )
    return small_config(**usual | settings)


def block_and_axes(config, kind, mixer=None):
    """Graph definition, parameters away from their special initial values, and their logical axes."""
    with pytest.MonkeyPatch.context() as patch:
        if mixer:
            patch.setitem(MIXERS, kind, mixer)
        graph, state = nnx.split(Block(config.model, kind, rngs=nnx.Rngs(0)))
    axes = jax.tree.map(
        lambda param: tuple(param.get_metadata('axes')), state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    params, axes = nnx.to_pure_dict(state), nnx.to_pure_dict(axes)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return graph, jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), params), axes


def value_and_gradients(config, kind, device_mesh=None, mixer=None, is_streamed=False):
    """(sum of weighted outputs, gradients of the input and of every parameter), on a mesh or one device."""
    graph, params, axes = block_and_axes(config, kind, mixer)
    rope_width = (mixer or MIXERS[kind]).rope_width(config.model)
    keys = jax.random.split(jax.random.key(2), 2)
    x_BLD, weight_BLD = (jax.random.normal(key, (B, L, D)) for key in keys)
    segment_ids_BL = jnp.asarray(np.repeat([[1, 2, 3]], B, 0).repeat([11, 9, 12], axis=1), jnp.int32)
    positions_BL = jnp.asarray(np.concatenate([np.arange(n) for n in (11, 9, 12)])[None].repeat(B, 0), jnp.int32)

    def loss(params, x_BLD, weight_BLD, segment_ids_BL, positions_BL):
        side_inputs = rope.side_inputs(config.model, rope_width, positions_BL)
        block = nnx.merge(graph, params)
        if not is_streamed:
            return jnp.sum(block(x_BLD, segment_ids_BL=segment_ids_BL, **side_inputs) * weight_BLD)
        with collectives.sequence_parallel(*x_BLD.shape[:2]):
            x_TD = collectives.reduce_to_stream(x_BLD)
            assert x_TD.size < x_BLD.size
            y_TD = block(x_TD, segment_ids_BL=segment_ids_BL, **side_inputs)
            return jnp.sum(collectives.gather_from_stream(y_TD) * weight_BLD)

    def of_block(params, x_BLD, *arrays):
        value, (d_params, d_x_BLD) = jax.value_and_grad(loss, argnums=(0, 1))(params, x_BLD, *arrays)

        def reduce(grad, axes):
            scattered = mesh.RULES['embed'] if 'embed' in axes else ()
            return collectives.all_reduce_over_tokens(grad, scattered_over=scattered)

        return collectives.all_reduce_over_tokens(value), jax.tree.map(reduce, d_params, axes), d_x_BLD

    rows = ('batch', 'length', None)
    in_axes = (axes, rows, rows, mesh.BATCH, mesh.BATCH)
    function = jax.jit(collectives.shard_map(of_block, in_axes, ((), axes, rows)))
    arguments = params, x_BLD, weight_BLD, segment_ids_BL, positions_BL
    if device_mesh is None:
        return jax.device_get(function(*arguments))
    with jax.set_mesh(device_mesh):
        return jax.device_get(function(*arguments))


# Name -> (kind, its settings): every registered mixer, and the position encodings that a mixer has besides its first.
CASES = {kind: (kind, {}) for kind in MIXERS} | {
    'ssd, conv1d_d': ('ssd', dict(model_ssd_encoding='conv1d_d')),
    'ssd, decay_only': ('ssd', dict(model_ssd_encoding='decay_only')),
    'ssd, bc_norm': ('ssd', dict(model_bc_norm=True)),
    'mamba2, bc_norm': ('mamba2', dict(model_bc_norm=True)),
    'attention, qk_norm': ('attention', dict(model_qk_norm=True)),
    # Without biases: that of K adds the same to all scores of a query, and its gradient is nothing but rounding.
    'attention, none': ('attention', dict(model_attention_encoding='none', model_use_bias=False)),
}


@functools.cache
def on_one_device(case):
    kind, settings = CASES[case]
    return value_and_gradients(config_of(**settings), kind)


def differences(found, expected):
    """Relative differences by the name of the array."""
    leaves = dict(jax.tree_util.tree_leaves_with_path(found))
    return {
        jax.tree_util.keystr(path): np.abs(leaves[path] - wanted).max() / np.abs(wanted).max()
        for path, wanted in jax.tree_util.tree_leaves_with_path(expected)
    }


@pytest.mark.parametrize('name', MESHES)
@pytest.mark.parametrize('case', CASES)
def test_a_mesh_changes_nothing(case, name):
    kind, settings = CASES[case]
    config = config_of(**MESHES[name], **settings)
    found = value_and_gradients(config, kind, mesh.build(config), is_streamed=name in STREAMED)
    found = differences(found, on_one_device(case))
    assert max(found.values()) < 2e-5, found


class Forgetful(MIXERS['attention']):
    """A mixer with a gate of its own that reads the residual stream past the layers: a partial sum without all-reduce."""

    def __init__(self, model, *, rngs):
        super().__init__(model, rngs=rngs)
        self.gate = nnx.Param(jnp.ones((model.d_model, model.num_heads), jnp.float32), axes=(None, 'heads'))

    def __call__(self, u_BLD, **side_inputs):
        y_BLD = super().__call__(u_BLD, **side_inputs)
        return y_BLD * jnp.mean(jax.nn.sigmoid(u_BLD @ self.gate[...]), axis=-1, keepdims=True)


def test_a_mixer_that_forgets_a_collective_is_caught():
    config = config_of(**MESHES['tensor'])
    expected = value_and_gradients(config_of(), 'attention', mixer=Forgetful)
    for is_streamed in (False, True):
        found = value_and_gradients(config, 'attention', mesh.build(config), Forgetful, is_streamed)
        assert max(differences(found, expected).values()) > 1e-2


def test_every_mixer_states_its_costs_and_its_form_for_decoding():
    from transxssm_jax.inference.packed import PACKED

    assert set(KINDS) == MIXERS.keys() == PACKED.keys()
    for kind in MIXERS:
        assert costs.costs_of(config_of().model, kind).in_proj_flops > 0
