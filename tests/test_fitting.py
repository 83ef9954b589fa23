"""Remat and microbatches are chosen by what fits into the devices' memory."""

import types

import jax
import numpy as np
import pytest

from pallas_kernels.chips import CHIPS
from tests.small import small_config
from transxssm_jax import config as config_lib
from transxssm_jax.model import language_model
from transxssm_jax.parallel import mesh
from transxssm_jax.planning import fitting
from transxssm_jax.training import compilation

OPEN = {'model.remat': 'auto', 'train.accumulation_steps': 0}
ONE = dict(data=1, fsdp=1, context=1, tensor=1)
TWO_LAYERS = dict(model_num_layers=2, model_attention_period=2, model_attention_offset=1)  # of what is compiled


def fit(config, monkeypatch, limit):
    """What `fit` makes of config where a device has `limit` bytes, and the settings that were compiled for it."""
    device_mesh, compiled = mesh.build(config, jax.devices()[:1]), []

    def compile_step(config):
        compiled.append((config.model.remat, config.train.accumulation_steps))
        return compilation.compile_train_step(config, device_mesh)

    monkeypatch.setattr(fitting, 'usable_bytes', lambda device_mesh: limit)
    with jax.set_mesh(device_mesh):
        return fitting.fit(config, device_mesh, compile_step), compiled


def test_the_fastest_is_taken_where_there_is_room(monkeypatch):
    fitted, compiled = fit(
        small_config(**TWO_LAYERS, **{name.replace('.', '_'): v for name, v in OPEN.items()}), monkeypatch, 1e12
    )
    assert compiled == [('none', 1)] and fitted.step is not None
    assert fitted.config.model.remat == 'none' and fitted.config.train.accumulation_steps == 1
    assert 'model.remat=none train.accumulation_steps=1' in fitted.lines[0]


def test_what_the_compiler_needs_decides(monkeypatch):
    """Less room than the fastest needs: a slower policy or more microbatches, which need less by the compiler's count."""
    config = small_config(
        **TWO_LAYERS, model_remat='auto', train_accumulation_steps=0, data_global_batch=16, data_seq_len=256
    )
    roomy, _ = fit(config, monkeypatch, 1e12)
    most = fitting.memory_of(roomy.step)
    fitted, _ = fit(config, monkeypatch, 0.8 * most)
    assert fitting.memory_of(fitted.step) <= 0.8 * most
    settings = fitted.config.model.remat, fitted.config.train.accumulation_steps
    assert settings != ('none', 1)


@pytest.mark.parametrize('loop', ['scan', 'unrolled'])
def test_a_compiler_that_refuses_is_asked_for_less(loop, monkeypatch):
    """As a TPU's does, without a figure: the fastest of what needs less than anything refused is taken."""
    config = small_config(model_remat='auto', train_accumulation_steps=0, model_layer_loop=loop)
    device_mesh, asked = mesh.build(config, jax.devices()[:1]), []
    found = fitting.choices(config, ONE, CHIPS['h100'], loop == 'unrolled')
    room = sorted(choice.memory for choice in found)[len(found) // 2]

    def compile_step(closed):
        (choice,) = (choice for choice in found if choice.config == closed)
        asked.append(choice.memory)
        if choice.memory > room:
            raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.')

        class Step:
            memory_analysis = staticmethod(lambda: None)

        return Step()

    monkeypatch.setattr(fitting, 'usable_bytes', lambda device_mesh: 1e12)
    fitted = fitting.fit(config, device_mesh, compile_step)
    fits = [choice for choice in found if choice.memory <= room]
    assert asked[:-1] == sorted(asked[:-1], reverse=True) and fitted.config == fits[0].config


def test_layers_differ_where_memory_lies_between_two_policies(monkeypatch):
    """Unrolled; in a scan all layers are alike, and one policy serves all."""
    settings = dict(model_num_layers=4, model_attention_period=2, model_attention_offset=1, data_seq_len=256)
    config = small_config(**settings, model_remat='auto', model_layer_loop='unrolled', train_accumulation_steps=1)
    found = fitting.choices(config, ONE, CHIPS['h100'], True)
    assert [choice.config.model.remat for choice in found[:5]] == [
        'none', 'matmuls,3xnone', '2xmatmuls,2xnone', '3xmatmuls,none', 'matmuls'
    ]  # fmt: skip
    memory = [choice.memory for choice in found]
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == len(found) == 13

    def needed(config, remat):
        return fitting.memory_of(fit(config_lib.replace(config, {'model.remat': remat}), monkeypatch, 1e12)[0].step)

    fitted, _ = fit(config, monkeypatch, (needed(config, 'none') + needed(config, 'matmuls')) / 2)
    assert fitted.config.model.remat in ('matmuls,3xnone', '2xmatmuls,2xnone', '3xmatmuls,none')
    assert f'model.remat={fitted.config.model.remat} ' in fitted.lines[0]
    scanned = config_lib.replace(config, {'model.layer_loop': 'auto'})
    fitted, compiled = fit(scanned, monkeypatch, (needed(scanned, 'none') + needed(scanned, 'full')) / 2)
    assert len(compiled) > 1 and {remat for remat, _ in compiled} <= {'none', 'matmuls', 'hybrid', 'full'}


def test_a_run_that_compiles_no_step_has_alike_layers_in_a_scan(monkeypatch):
    """Of a finished run, by the estimate alone; whatever memory there is, a CPU's layers stay a scan."""
    config = small_config(model_remat='auto', train_accumulation_steps=1)
    device_mesh = mesh.build(config, jax.devices()[:1])
    for choice in fitting.choices(config, ONE, CHIPS['h100'], True):
        monkeypatch.setattr(fitting, 'usable_bytes', lambda device_mesh: choice.memory)  # noqa: B023
        model = fitting.fit(config, device_mesh, None).config.model
        assert len(set(model.remat_of_layers)) == 1 and not language_model.is_unrolled(model, 'cpu')


def test_nothing_fits(monkeypatch):
    with pytest.raises(fitting.DoesNotFitError) as error:
        fit(small_config(**TWO_LAYERS, model_remat='auto', train_accumulation_steps=0), monkeypatch, 1000)
    message = str(error.value)
    assert '\n' not in message and 'mesh.fsdp' in message and 'GiB' in message
    assert 'model.remat=full' in message


def test_settings_that_do_not_fit_name_the_remedy(monkeypatch):
    with pytest.raises(fitting.DoesNotFitError, match=r'--config.model.remat=auto --config.train.accumulation_steps=0'):
        fit(small_config(**TWO_LAYERS, model_remat='none', train_accumulation_steps=1), monkeypatch, 1000)


def test_settings_that_are_set_are_kept(monkeypatch):
    fitted, compiled = fit(
        small_config(**TWO_LAYERS, model_remat='full', train_accumulation_steps=2), monkeypatch, 1e12
    )
    assert compiled == [('full', 2)]
    [line] = fitted.lines  # no time is expected of a device that is in no table
    assert line.startswith('a step needs 0.0 of 931.3 GiB')


def test_the_time_that_a_run_should_take_is_told(monkeypatch):
    config = small_config(train_steps=1000, train_accumulation_steps=1)
    choice = fitting.Choice(config, 0.0, 0.0)

    class Device:
        device_kind, platform = 'NVIDIA H100 80GB HBM3', 'gpu'

    class Mesh:
        devices, shape = np.array([[[[Device()]]]]), {'data': 1, 'fsdp': 1, 'context': 1, 'tensor': 1}

    [memory, time] = fitting._describe(config, choice, 2**30, 2**33, Mesh)
    assert memory == 'a step needs 1.0 of 8.0 GiB per device'
    assert time.startswith('expected: ') and 'for 1,000 steps' in time and 'measured on H100' in time


@pytest.mark.parametrize('path', ['configs/320m.py', 'configs/1p3b.py'])
@pytest.mark.parametrize('chip, devices', [('h100', 1), ('h200', 1), ('h200', 8), ('h100', 8)])
def test_the_shipped_configs_are_expected_to_fit(path, chip, devices):
    config = config_lib.load(path)
    sizes = mesh.axis_sizes(config, devices)
    found = [c for c in fitting.choices(config, sizes, CHIPS[chip], True) if c.memory <= CHIPS[chip].usable]
    assert found
    assert all(c.config.data.global_batch == config.data.global_batch for c in found)
    # No matmul is computed again where a microbatch can be smaller instead.
    assert set(found[0].config.model.remat_of_layers) <= {'none', 'matmuls'}


def mesh_of(platform, **shape):
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]), shape=shape)


FENCE, TRITON = 'xla_gpu_experimental_scheduler_memory_fencing_threshold_bytes', 'xla_gpu_enable_triton_gemm'


def test_what_the_compiler_is_told_on_gpus():
    """Without the fence a step over context needs nearly twice the memory. XLA refuses a name that it does not know."""
    options = compilation.compiler_options(mesh_of('gpu', context=4))
    assert options.keys() == {TRITON, FENCE}
    jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options)
    with pytest.raises(jax.errors.JaxRuntimeError, match='No such compile option'):
        jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options={'xla_gpu_unheard_of': 1})
    for other in (mesh_of('gpu', context=1, tensor=4), mesh_of('gpu')):
        assert compilation.compiler_options(other) == {TRITON: False}
    assert compilation.compiler_options(mesh_of('tpu', context=4)) == {}


def test_flags_of_the_user_stand(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', f'--{TRITON}=true --xla_gpu_autotune_level=0')
    assert compilation.compiler_options(mesh_of('gpu', context=4)).keys() == {FENCE}
    monkeypatch.setenv('XLA_FLAGS', f'--{FENCE}=1')
    assert compilation.compiler_options(mesh_of('gpu', context=4)) == {TRITON: False}
