"""The device that a program is traced for, by which kernels and the form of the layer loop are chosen."""

import typing

import jax

from pallas_kernels import chips


class Device(typing.NamedTuple):
    """What a program computes on. '' where it is not known."""

    backend: str = ''  # as `jax.default_backend()`
    kind: str = ''
    compute_capability: str = ''  # of an NVIDIA GPU, such as '9.0'


def current_device() -> Device:
    """The device of the mesh that is set (`jax.set_mesh`), which need not be attached; without one, that of the process."""
    attached = jax.local_devices()[0]
    meshed = jax.sharding.get_abstract_mesh().abstract_device
    if meshed is None or meshed.device_kind == attached.device_kind:
        return Device(jax.default_backend(), attached.device_kind, getattr(attached, 'compute_capability', ''))
    chip = chips.CHIPS.get(chips.name_of(meshed.device_kind))
    return Device(meshed.platform, meshed.device_kind, getattr(chip, 'compute_capability', ''))
