"""What a run asks of XLA's compiler."""

import jax
import pytest

from transxssm_jax.training import compilation


def test_the_compiler_knows_the_options():
    """Options are read on every platform, so that one which a version of XLA does not know is found here."""
    options = compilation.compiler_options('gpu')
    assert 'CONDITIONAL' in options['xla_gpu_enable_command_buffer'].split(',')
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert lowered.compile(compiler_options=options)(1.0) == 2
    with pytest.raises(Exception, match='not a valid enum value'):
        lowered.compile(compiler_options={'xla_gpu_enable_command_buffer': 'CONDITIONALS'})


def test_a_flag_of_the_user_is_left_alone(monkeypatch):
    assert compilation.compiler_options('cpu') == compilation.compiler_options('tpu') == {}
    monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_autotune_level=2')
    assert compilation.compiler_options('gpu')
    monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_autotune_level=2 --xla_gpu_enable_command_buffer=')
    assert compilation.compiler_options('gpu') == {}
