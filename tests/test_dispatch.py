"""The dispatcher: what is tried in which order, what is logged, and one type of refusal."""

import logging

import jax
import pytest

from pallas_kernels import attention, device, dispatch, ssd


def implementation(name, serves=True, wanted=True, remedy=''):
    return dispatch.Implementation(
        run=lambda: name,
        unsupported=lambda device, call: None if serves else f'{name} cannot take {call}',
        unwanted=lambda device, call: None if wanted else f'{name} is slow at {call}',
        remedy=remedy,
    )


def log_line(device, call, chosen, passed_over):
    return f'{call}: {chosen} on {device.backend}, {passed_over}'


OPERATOR = dispatch.Operator(
    implementations={
        'never': implementation('never', serves=False, remedy='; use slow'),
        'slow': implementation('slow', wanted=False),
        'good': implementation('good'),
        'last': implementation('last'),
    },
    order={'rocket': ('never', 'slow', 'good'), 'boat': ('never', 'slow'), 'raft': ('good',)},
    everywhere=('last',),
    log_line=log_line,
)


@pytest.mark.parametrize(
    'backend, chosen, passed_over',
    [
        ('rocket', 'good', "not 'never': never cannot take apples; not 'slow': slow is slow at apples"),
        ('boat', 'last', "not 'never': never cannot take apples; not 'slow': slow is slow at apples"),
        ('raft', 'good', ''),
        ('unknown', 'last', ''),
    ],
)
def test_none_takes_the_first_that_serves_and_logs_it_once(backend, chosen, passed_over, caplog):
    dispatch.log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger='pallas_kernels'):
        for _ in range(2):
            assert OPERATOR.choose(None, 'apples', device.Device(backend)) == chosen
    assert caplog.messages == [f'apples: {chosen} on {backend}, {passed_over}']


def test_a_name_serves_or_raises():
    rocket = device.Device('rocket')
    assert OPERATOR.choose('slow', 'apples', rocket) == 'slow'  # None alone minds that it is slow
    with pytest.raises(dispatch.UnsupportedError) as raised:
        OPERATOR.choose('never', 'apples', rocket)
    assert str(raised.value) == "implementation='never' cannot serve this call: never cannot take apples; use slow"
    assert isinstance(raised.value, NotImplementedError)


def test_none_raises_where_nothing_serves():
    alone = OPERATOR._replace(everywhere=('never',))
    with pytest.raises(dispatch.UnsupportedError, match="^implementation='never' cannot serve this call: "):
        alone.choose(None, 'apples', device.Device('unknown'))


def test_the_device_is_that_of_the_process():
    assert device.current_device().backend == jax.default_backend()
    assert device.current_device().kind == jax.local_devices()[0].device_kind
    with jax.set_mesh(jax.make_mesh((1,), ('data',))):
        assert device.current_device() == device.Device(jax.default_backend(), jax.local_devices()[0].device_kind)


@pytest.mark.parametrize(
    'kind, platform, capability',
    [('TPU v5 lite', 'tpu', ''), ('NVIDIA H200', 'gpu', '9.0'), ('NVIDIA B200', 'gpu', '10.0'), ('a card', 'gpu', '')],
)
def test_or_that_of_the_mesh_that_is_set(kind, platform, capability):
    of_mesh = jax.sharding.AbstractDevice(kind, None, platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ('data',), abstract_device=of_mesh)):
        assert device.current_device() == device.Device(platform, kind, capability)
        assert OPERATOR._replace(order={platform: ('good',)}).choose(None, 'apples') == 'good'


@pytest.mark.parametrize(
    'operator', [ssd.api.OPERATOR, attention.api.OPERATOR, attention.ring.OPERATOR, attention.decode.OPERATOR]
)
def test_tables_name_what_they_try(operator):
    """And what is tried last refuses no call for its device, so that None works on every platform."""
    tried = {name for names in operator.order.values() for name in names} | set(operator.everywhere)
    assert tried <= set(operator.implementations)
    assert operator.everywhere == ('xla',)
