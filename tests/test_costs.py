"""Analytic operations against independent counts.

Two counts, because the work of the kernels is by definition what the mask keeps
and not what an implementation does:
- everything but the kernels: the products in the jaxpr of the model, with the
  two kernels replaced by stubs without products, must be exactly the formula
  less its kernel terms;
- the kernels: every product of every (query, key) pair or (query, source) pair
  within a chunk, counted one by one.
"""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from small import small_config

from transxssm_jax import config as config_lib
from transxssm_jax.config import Model
from transxssm_jax.model import attention, costs, parameters, ssd

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
    monkeypatch.setattr(attention, 'ring_attention', attend)


SIZES = [
    {},
    dict(attention_period=1, attention_offset=0),
    dict(attention_period=0),
    dict(num_kv_heads=4, num_ssd_groups=1),
    dict(d_state=32, d_mlp=80, tie_embeddings=False, use_bias=True, use_dt_bias=False),
]


def outside_kernels(model: Model) -> int:
    """The formula's forward work a token, less its kernel terms."""
    modules = model.num_layers // len(model.layer_pattern)
    kernels = modules * sum(
        costs.scan_flops_per_token(model) if kind == 'ssd' else 2 * model.num_heads * model.head_dim * (L + 1)
        for kind in model.layer_pattern
    )
    return costs.forward_flops_per_token(model, L) - kernels


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
    assert costs.train_flops_per_token(model, L) == 3 * costs.forward_flops_per_token(model, L)


def test_attention_by_enumeration():
    model = small_config().model
    H, K = model.num_heads, model.head_dim
    work = 0
    for query in range(L):
        for key in range(L):
            if key <= query:
                work += H * 2 * K  # q . k
                work += H * 2 * K  # p v
    formula = costs.mixer_flops_per_token(model, 'attention', L)
    D, G = model.d_model, model.num_kv_heads
    assert formula * L - work == L * 2 * D * (2 * H * K + 2 * G * K)


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_scan_by_enumeration(groups):
    model = small_config(model_num_ssd_groups=groups).model
    H, P, N, G, Q = model.num_heads, model.head_dim, model.d_state, groups, costs.SCAN_CHUNK
    work = 0
    for token in range(Q):  # one chunk; the others are alike
        for _source in range(token + 1):
            work += G * 2 * N  # c . b
            work += H * 2 * P  # score times x
        work += H * 2 * P * N  # x b^T into the state
        work += H * 2 * P * N  # the state times c
    # The formula leaves out half of the diagonal: 1 part in Q of the first two terms.
    assert costs.scan_flops_per_token(model) * Q == work - Q * (G * N + H * P)
    assert costs.scan_flops_per_token(model) == pytest.approx(work / Q, rel=0.01)


@pytest.mark.parametrize('groups, gigaflops', [(32, 60), (8, 47), (1, 43)])
def test_scan_at_the_contract_shape(groups, gigaflops):
    # B 8, L 4096, H 32, P 64, N 128: "least work" of the kernel contract.
    model = Model(d_model=2048, num_heads=32, num_ssd_groups=groups, d_state=128)
    assert costs.scan_flops_per_token(model) * 8 * 4096 / 1e9 == pytest.approx(gigaflops, rel=0.02)


def test_the_large_config():
    model = config_lib.load(pathlib.Path(__file__).parents[1] / 'configs' / '1p3b.py').model
    # The rule of thumb: 6 operations a parameter and token, embedding look-up aside (tied: it is the head).
    matrices = parameters.count_params(model)
    assert costs.train_flops_per_token(model, 4096) == pytest.approx(6 * matrices, rel=0.12)
    assert costs.train_flops_per_token(model, 4096) > 6 * matrices
    longer = costs.train_flops_per_token(model, 8192) - costs.train_flops_per_token(model, 4096)
    assert longer == 3 * 3 * 2 * 2048 * 4096, 'only the three attention layers grow with length'


@pytest.mark.parametrize(
    'device_kind, tflops',
    [
        ('NVIDIA H200', 989),
        ('NVIDIA H100 80GB HBM3', 989),
        ('NVIDIA A100-SXM4-40GB', 312),
        ('NVIDIA B200', 2250),
        ('NVIDIA H100 PCIe', 756),
        ('NVIDIA H100 NVL', 835),
        ('NVIDIA GH200 480GB', 990),
        ('NVIDIA A100-SXM4-80GB', 312),
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
    ],
)
def test_peak_of_a_device(device_kind, tflops):
    assert costs.peak_flops(device_kind) == tflops * 1e12


def test_rates_use_the_analytic_work(monkeypatch):
    from transxssm_jax.training import metrics

    config = small_config()
    clock = metrics.Clock()
    now = iter([100.0, 104.0] + [106.0] * 10)
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: next(now))
    clock.restart()
    clock._away_seconds = 1.0
    clock.input_seconds = 0.6
    rates = metrics.rates(config, steps=6, clock=clock)  # 104 - 100 - 1: three seconds of training
    assert rates['tokens_per_second'] == pytest.approx(6 * config.tokens_per_step / 3)
    assert rates['step_seconds'] == pytest.approx(0.5) and rates['input_fraction'] == pytest.approx(0.2)
    work = 6 * config.tokens_per_step * costs.train_flops_per_token(config.model, config.data.seq_len)
    assert rates['model_tflops_per_second'] == pytest.approx(work / 3 / jax.device_count() / 1e12)
    assert 'mfu' not in rates, 'a CPU has no known peak'
    monkeypatch.setattr(costs, 'peak_flops', functools.partial(lambda kind: 1e12))
    now = iter([104.0] * 10)
    assert metrics.rates(config, 6, clock)['mfu'] == pytest.approx(rates['model_tflops_per_second'])


def test_time_away_does_not_count(monkeypatch):
    from transxssm_jax.training import metrics

    now = iter([10.0, 12.0, 17.0, 20.0])
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: next(now))
    clock = metrics.Clock()
    with clock.away():
        pass
    assert clock.seconds == 20.0 - 10.0 - 5.0
