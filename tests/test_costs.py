"""Analytic operations against independent counts.

Two counts, because the work of the kernels is by definition what the mask keeps
and not what an implementation does:
- everything but the kernels: the products in the jaxpr of the model, with the
  two kernels replaced by stubs without products, must be exactly the formula
  less its kernel terms;
- the kernels: every product of every (query, key) pair or (query, source) pair
  within a chunk, counted one by one.
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import small_config

from pallas_kernels import chips
from transxssm_jax import config as config_lib
from transxssm_jax import layer_pattern
from transxssm_jax.config import Model
from transxssm_jax.data.packing import Epochs, pack_row
from transxssm_jax.model import attention, costs, mamba2, parameters, ssd
from transxssm_jax.model.ssd import SCAN_CHUNK
from transxssm_jax.parallel import collectives, mesh

L = 64


def jaxpr_flops(jaxpr) -> int:
    """Multiplications and additions of every product in a jaxpr, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            (contracted, _), _ = equation.params['dimension_numbers']
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            continue
        assert equation.primitive.name not in ('conv_general_dilated', 'ragged_dot', 'while', 'pallas_call'), (
            equation.primitive
        )
        inner = []
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, 'jaxpr', part)  # a closed jaxpr's
                if hasattr(part, 'eqns'):
                    inner.append(jaxpr_flops(part))
        if equation.primitive.name == 'cond':
            total += max(inner)
        else:
            total += sum(inner) * (equation.params['length'] if equation.primitive.name == 'scan' else 1)
    return total


def test_the_count_of_a_jaxpr():
    def f(x, w):
        x = jax.lax.scan(lambda x, w: (jax.jit(jnp.matmul)(x, w), None), x, w)[0]  # 5 products
        x = jax.checkpoint(lambda x: x @ w[0])(x)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w[0] @ w[1], lambda x: x, x)

    jaxpr = jax.make_jaxpr(f)(jnp.ones((3, 4)), jnp.ones((5, 4, 4))).jaxpr
    assert jaxpr_flops(jaxpr) == (5 + 1 + 2) * 2 * 3 * 4 * 4


@pytest.fixture
def without_kernels(monkeypatch):
    """Kernels that take part in differentiation but have no products."""

    def scan(x, dt, a, b, c, rope=None, **kwargs):
        rest = sum(jnp.mean(v) for v in (dt, a, b, c))
        return x * rest

    def attend(q, k, v, **kwargs):
        return q * (jnp.mean(k) + jnp.mean(v))

    monkeypatch.setattr(ssd, 'rotary_ssd_in_context', scan)
    monkeypatch.setattr(mamba2, 'rotary_ssd_in_context', scan)
    monkeypatch.setattr(attention, 'ring_attention', attend)


SIZES = [
    {},
    dict(attention_period=1, attention_offset=0),
    dict(attention_period=0),
    dict(num_kv_heads=4, num_ssd_groups=1),
    dict(pattern='mamba2,attention', attention_encoding='none', num_ssd_groups=1),
    dict(pattern='mamba2', d_mlp=0, mamba_expand=3),
    dict(ssd_encoding='conv1d_d'),
    dict(d_state=32, d_mlp=80, tie_embeddings=False, use_bias=True, use_dt_bias=False),
]


def kernel_flops_per_token(model, attended):
    """Forward FLOPs of all sequence kernels per token."""
    return sum(count * layer.kernel_flops(attended) for _, count, layer in costs.layer_costs(model))


def outside_kernels(model: Model) -> int:
    """The formula's forward work per token, less its kernel terms."""
    attended = costs.row_attended(L)
    return costs.forward_flops_per_token(model, attended) - kernel_flops_per_token(model, attended)


def model_function(model: Model):
    graph, _ = parameters.split_model(model)
    params = jax.eval_shape(lambda: parameters.init_params(model, 0))
    tokens = jax.ShapeDtypeStruct((2, L), jnp.int32)
    return lambda params, tokens: nnx.merge(graph, params).logits(tokens), params, tokens


@pytest.mark.parametrize('settings', SIZES, ids=str)
def test_forward_work_outside_of_the_kernels(without_kernels, settings):
    model = small_config(**{f'model_{name}': value for name, value in settings.items()}).model
    jaxpr = jax.make_jaxpr(model_function(model)[0])(*model_function(model)[1:]).jaxpr
    assert jaxpr_flops(jaxpr) == 2 * L * outside_kernels(model)


def test_training_is_three_times_forward(without_kernels):
    model = small_config().model
    forward, params, tokens = model_function(model)
    gradient = jax.grad(lambda params, tokens: jnp.sum(jnp.square(forward(params, tokens))))
    assert jaxpr_flops(jax.make_jaxpr(gradient)(params, tokens).jaxpr) == 3 * 2 * L * outside_kernels(model)
    assert costs.train_flops_per_token(model, 7.5) == 3 * costs.forward_flops_per_token(model, 7.5)


def test_attention_by_enumeration():
    model = small_config().model
    H, K = model.num_heads, model.head_dim
    work = 0
    for query in range(L):
        for key in range(L):
            if key <= query:
                work += H * 2 * K  # q . k
                work += H * 2 * K  # p v
    assert costs.costs_of(model, 'attention').kernel_flops(costs.row_attended(L)) * L == work


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_scan_by_enumeration(groups):
    model = small_config(model_num_ssd_groups=groups).model
    H, P, N, G, Q = model.num_heads, model.head_dim, model.d_state, groups, SCAN_CHUNK
    work = 0
    for token in range(Q):  # one chunk; the others are alike
        for _source in range(token + 1):
            work += G * 2 * N  # c . b
            work += H * 2 * P  # score times x
        work += H * 2 * P * N  # x b^T into the state
        work += H * 2 * P * N  # the state times c
    # The formula leaves out half of the diagonal: one Q-th of the first two terms.
    flops = costs.costs_of(model, 'ssd').kernel_flops(1.0)
    assert flops * Q == work - Q * (G * N + H * P)
    assert flops == pytest.approx(work / Q, rel=0.01)
    assert flops == costs.costs_of(model, 'ssd').kernel_flops(1e6), 'the scan does not grow with length'


@pytest.mark.parametrize('groups, gigaflops', [(32, 60), (8, 47), (1, 43)])
def test_scan_at_the_contract_shape(groups, gigaflops):
    # B 8, L 4096, H 32, P 64, N 128: "least work" of the kernel contract.
    model = Model(d_model=2048, num_heads=32, num_ssd_groups=groups, d_state=128)
    assert costs.costs_of(model, 'ssd').kernel_flops(1.0) * 8 * 4096 / 1e9 == pytest.approx(gigaflops, rel=0.02)


def test_the_large_config():
    model = config_lib.load(pathlib.Path(__file__).parents[1] / 'configs' / '1p3b.py').model
    # The rule of thumb: 6 operations per parameter and token, embedding look-up aside (tied: it is the head).
    matrices = parameters.count_params(model)
    row, twice = (costs.train_flops_per_token(model, costs.row_attended(length)) for length in (4096, 8192))
    assert 6 * matrices < row == pytest.approx(6 * matrices, rel=0.12)
    assert twice - row == 3 * 3 * 2 * 2048 * 4096, 'only the three attention layers grow with length'


# ---- what a layer states ---------------------------------------------------


def test_an_unknown_kind_is_an_error_that_names_the_file():
    with pytest.raises(
        NotImplementedError, match=r"no mixer is called 'mamba3', only ssd, attention, .*model/mixers.py"
    ):
        costs.costs_of(small_config().model, 'mamba3')


def test_every_remat_policy_states_its_costs():
    assert set(costs.REMAT) == set(layer_pattern.POLICIES)


# Settings of a model that has layers of one kind only.
ALONE = {
    'ssd': dict(model_attention_period=0),
    'attention': dict(model_attention_period=1),
    'mamba2': dict(model_pattern='mamba2'),
}


def test_layers_are_counted_by_kind():
    counted = [(kind, count) for kind, count, _ in costs.layer_costs(small_config().model)]
    assert counted == [('ssd', 6), ('attention', 2)]
    transformer = small_config(model_attention_period=1, model_attention_offset=0).model
    assert [(kind, count) for kind, count, _ in costs.layer_costs(transformer)] == [('attention', 8)]


@pytest.mark.parametrize('remat', costs.REMAT)
@pytest.mark.parametrize('kind', ALONE)
def test_saved_bytes_are_those_of_the_traced_step(kind, remat):
    """They are all that a traced layer keeps; but the chunked scan keeps more states than it must."""
    config = small_config(
        **ALONE[kind],
        model_attention_offset=0,
        model_remat=remat,
        model_dtype='bfloat16',
        model_attention_implementation='xla',
        model_ssd_implementation='xla',
    )
    model = config.model
    graph, _ = parameters.split_model(model)
    params = jax.eval_shape(lambda: parameters.init_params(model, 0))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def pull(params, tokens):
        return jax.vjp(lambda params: nnx.merge(graph, params)(tokens), params)[1]

    # Residuals of the layer loop carry its axis of 8 layers. So do parameters, which are not counted.
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    residuals = jax.tree.leaves(jax.eval_shape(pull, params, tokens))
    stacked = [leaf for leaf in residuals if math.prod(leaf.shape[:2]) == 8 and leaf.shape not in shapes]
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in stacked)
    stated = costs.saved_bytes(model, kind) * 2 * 128 * 8
    if kind != 'attention' and remat != 'full':
        assert 0.8 * kept < stated < kept
    else:
        assert stated == kept


def test_layers_of_several_policies_keep_what_each_says():
    """Unrolled: all that the backward pass gets, less the parameters and what no policy changes; and so it is stated."""

    def kept(remat):
        model = small_config(
            **ALONE['ssd'], model_num_layers=4, model_layer_loop='unrolled', model_remat=remat, model_dtype='bfloat16'
        ).model  # fmt: skip
        graph, _ = parameters.split_model(model)
        params = jax.eval_shape(lambda: parameters.init_params(model, 0))
        tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
        pull = jax.eval_shape(
            lambda params, tokens: jax.vjp(lambda p: nnx.merge(graph, p)(tokens), params)[1], params, tokens
        )
        found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
        return found, 4 * costs.saved_bytes(model, 'ssd') * tokens.size

    of_full, of_both, of_none = (np.array(kept(remat)) for remat in ('full', '3xfull,none', 'none'))
    found, stated = of_both - of_full
    of_all, all_stated = of_none - of_full
    assert found == of_all / 4 > 0
    assert stated == all_stated / 4


@pytest.mark.parametrize('remat', costs.REMAT)
def test_saved_bytes_of_a_tensor_shard_are_those_of_its_trace(remat):
    """Of its heads, and of its part of the residual stream."""
    config = small_config(
        **ALONE['attention'],
        model_attention_offset=0,
        model_remat=remat,
        model_dtype='bfloat16',
        model_attention_implementation='xla',
        mesh_data=4,
        mesh_tensor=2,
    )
    model = config.model
    graph, _ = parameters.split_model(model)
    params = jax.eval_shape(lambda: parameters.init_params(model, 0))
    found = []

    def of_block(params, tokens):
        with collectives.sequence_parallel(*tokens.shape):
            pull = jax.vjp(lambda params: nnx.merge(graph, params)(tokens), params)[1]
        shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
        stacked = [
            leaf for leaf in jax.tree.leaves(pull) if math.prod(leaf.shape[:2]) == 8 and leaf.shape not in shapes
        ]
        found.append(sum(leaf.size * leaf.dtype.itemsize for leaf in stacked))
        return tokens

    rows = ('batch', 'length')
    with jax.set_mesh(mesh.build(config)):
        whole = parameters.on_shards(of_block, model, (rows,), rows)
        jax.eval_shape(whole, params, jax.ShapeDtypeStruct((8, 128), jnp.int32))
    assert costs.saved_bytes(model, 'attention', tensor=2) * 2 * 128 * 8 == found[0]


# ---- the tokens that documents leave ---------------------------------------


def brute_mean_attended(lengths, seq_len):
    """Over every offset of the row grid, documents in order, with wrap-around so that each begins anywhere equally often."""
    ends = np.cumsum(lengths)
    total = 0
    for offset in range(seq_len):
        start, row_start = 0, 0
        for end in ends:
            for token in range(start, end):
                row_start = (token + offset) // seq_len * seq_len - offset
                total += token - max(start, row_start) + 1
            start = end
    return total / (seq_len * ends[-1])


@pytest.mark.parametrize('seq_len', [1, 4, 16, 100])
def test_mean_attended_against_every_offset(seq_len):
    lengths = np.array([3, 1, 40, 16, 7, 2, 33], np.uint32)
    assert costs.mean_attended(lengths, seq_len) == pytest.approx(brute_mean_attended(lengths, seq_len))


def test_mean_attended_of_long_and_of_short_documents():
    assert costs.mean_attended(np.array([10**9]), 4096) == pytest.approx(costs.row_attended(4096), rel=1e-5)
    # Where rows are long, a document of n tokens is whole: (n + 1) / 2.
    assert costs.mean_attended(np.full(100, 1000), 10**9) == pytest.approx(500.5, rel=1e-5)


def test_mean_attended_in_blocks(monkeypatch):
    lengths = np.arange(1, 1000, dtype=np.uint32)
    whole = costs.mean_attended(lengths, 64)
    monkeypatch.setattr(costs, '_BLOCK', 100)
    assert costs.mean_attended(lengths, 64) == pytest.approx(whole, rel=1e-12)


def test_mean_attended_is_that_of_the_packed_rows():
    """Counted in the segments of the rows that the packing makes of the same documents."""
    rng = np.random.default_rng(0)
    lengths, seq_len = rng.integers(2, 300, 400).astype(np.uint32), 128
    epochs = Epochs(lengths, seq_len, key=(0,), shuffle=True)
    attended = []
    for row in range(epochs.rows):
        slots = [stop - start for _, start, stop in epochs.spans(row)]
        packed = pack_row(np.zeros(sum(slots) + len(slots), np.int32), slots, seq_len)
        attended.append(packed['positions'][packed['segment_ids'] > 0] + 1)
    assert costs.mean_attended(lengths, seq_len) == pytest.approx(np.concatenate(attended).mean(), rel=0.02)


# ---- rates -----------------------------------------------------------------


@pytest.mark.parametrize(
    'device_kind, tflops',
    [
        ('NVIDIA H200', 989),
        ('NVIDIA H100 80GB HBM3', 989),
        ('NVIDIA A100-SXM4-40GB', 312),
        ('NVIDIA A100-SXM4-80GB', 312),
        ('NVIDIA B200', 2250),
        ('NVIDIA H100 PCIe', 756),
        ('NVIDIA H100 NVL', 835),
        ('NVIDIA H200 NVL', 835),
        ('NVIDIA GH200 480GB', 990),
        ('TPU v4', 275),
        ('TPU v5 lite', 197),
        ('TPU v5e', 197),
        ('TPU v5', 459),
        ('TPU v5p', 459),
        ('TPU v6 lite', 918),
        ('TPU v6e', 918),
        ('TPU7x', 1153.5),
        ('cpu', 0),
        ('NVIDIA GeForce RTX 4090', 0),
        ('NVIDIA H200 of another kind', 0),
        ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', 0),
    ],
)
def test_peak_of_a_device(device_kind, tflops):
    assert chips.peak_flops(device_kind) == tflops * 1e12
