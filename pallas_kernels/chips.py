"""Vendors' figures of each accelerator: the one place for peaks, memory and links.

All figures are those of one JAX device. A tpu7x chip is two devices, so its figures are halves; both
cores of a v4 or v5p chip are one device (v4: the compiler's 'megacore' arrangement, as Cloud TPU runs it).

Sources. TPU: Google Cloud's page of each version (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e,
tpu7x), read for peak, HBM bandwidth, ICI and DCN bandwidth per chip, torus dimensions, chips per
host; link and DCN of v4: Jouppi et al., TPU v4 (ISCA 2023), table 4 (50 GB/s per link and direction),
and no published DCN figure, for which v5p's is taken. VMEM: jax/_src/tpu_info.py. `usable`: what the
compiler names as available when a program does not fit ('exceeds available HBM (15.75G)'). The
scoped limit is what it names when it refuses a kernel. GPU: NVIDIA's data sheets (A100, H100, H200,
H200 NVL, GH200, B200), dense bfloat16 without sparsity, NVLink in one direction; NIC: 400 Gb/s per GPU
as in DGX H100 and B200, 200 Gb/s in DGX A100.
"""

import dataclasses

GB, GIB, MIB = 10**9, 2**30, 2**20

# Environment in which libtpu compiles for TPUs that are not attached; otherwise it would ask the cloud for this machine's.
COMPILE_ONLY = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
SMALL, LARGE = 2 * 128**2, 4 * 256**2  # bf16 FLOPs of one MXU in a cycle; a large one takes two rows


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device.

    Attributes:
      kinds: every `device_kind` that it reports, whole.
      peak: dense bfloat16 FLOP/s.
      bandwidth: HBM bytes/s.
      hbm: bytes of HBM.
      usable: bytes of it that a program can have.
      dcn: bytes/s that a device sends over the data centre's network (one direction).
      host_devices: devices of one host.
    """

    kinds: tuple[str, ...]
    peak: float
    bandwidth: float
    hbm: int
    usable: int
    dcn: float
    host_devices: int


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
    """One GPU.

    Attributes:
      nvlink: bytes/s that it sends to the others of its host together (one direction).
      compute_capability: as JAX's devices have it.
    """

    nvlink: float
    compute_capability: str


@dataclasses.dataclass(frozen=True)
class Tpu(Chip):
    """One device of a TPU slice.

    Attributes:
      chip_devices: devices of one chip.
      link: bytes/s of one ICI link in one direction; a chip has two links for each torus dimension.
      torus: dimensions of the torus.
      ring: a slice wraps around in a dimension whose size this divides (2D: a whole pod's side).
      topology: the smallest slice that the compiler takes.
      arrangement: of the cores in devices, the compiler's `chip_config_name`.
      cores: TensorCores that share the grids of one device.
      vmem: bytes per core.
      scoped_vmem: default limit of one kernel, bytes.
      mxu_flop: bf16 FLOPs of one MXU in a cycle.
      mxus: MXUs per core.
    """

    chip_devices: int
    link: float
    torus: int
    ring: int
    topology: str
    arrangement: str
    cores: int
    vmem: int
    scoped_vmem: int
    mxu_flop: int
    mxus: int

    @property
    def clock(self) -> float:
        """Hz: the peak over the FLOPs of a cycle."""
        return self.peak / (self.cores * self.mxus * self.mxu_flop)


# fmt: off
TPUS = {
    'v4': Tpu(
        kinds=('TPU v4',), peak=275e12, bandwidth=1228e9, hbm=32 * GIB, usable=int(30.75 * GIB),
        dcn=6.25e9, host_devices=4, chip_devices=1, link=50e9, torus=3, ring=4, topology='v4:2x2x1',
        arrangement='megacore', cores=2, vmem=16 * MIB, scoped_vmem=16 * MIB, mxu_flop=SMALL, mxus=4),
    'v5e': Tpu(
        kinds=('TPU v5 lite', 'TPU v5e'), peak=197e12, bandwidth=819e9, hbm=16 * GIB, usable=int(15.75 * GIB),
        dcn=3.125e9, host_devices=8, chip_devices=1, link=50e9, torus=2, ring=16, topology='v5e:2x2',
        arrangement='default', cores=1, vmem=128 * MIB, scoped_vmem=16 * MIB, mxu_flop=SMALL, mxus=4),
    'v5p': Tpu(
        kinds=('TPU v5p', 'TPU v5'), peak=459e12, bandwidth=2765e9, hbm=int(95.73 * GIB), usable=int(95.73 * GIB),
        dcn=6.25e9, host_devices=4, chip_devices=1, link=100e9, torus=3, ring=4, topology='v5p:2x2x1',
        arrangement='default', cores=2, vmem=64 * MIB, scoped_vmem=16 * MIB, mxu_flop=SMALL, mxus=4),
    'v6e': Tpu(
        kinds=('TPU v6 lite', 'TPU v6e'), peak=918e12, bandwidth=1638e9, hbm=32 * GIB, usable=int(31.24 * GIB),
        dcn=12.5e9, host_devices=8, chip_devices=1, link=100e9, torus=2, ring=16, topology='v6e:2x2',
        arrangement='default', cores=1, vmem=128 * MIB, scoped_vmem=32 * MIB, mxu_flop=LARGE, mxus=2),
    'tpu7x': Tpu(
        kinds=('TPU7x',), peak=2307e12 / 2, bandwidth=7380e9 / 2, hbm=96 * GIB, usable=int(94.74 * GIB),
        dcn=12.5e9 / 2, host_devices=8, chip_devices=2, link=100e9, torus=3, ring=4, topology='tpu7x:2x2x1',
        arrangement='default', cores=1, vmem=64 * MIB, scoped_vmem=32 * MIB, mxu_flop=LARGE, mxus=2),
}
# fmt: on


# JAX takes three quarters of a GPU's memory unless it is told otherwise; a training step wants more, and commands give it
# this share (XLA_PYTHON_CLIENT_MEM_FRACTION, transxssm_jax/cli.py). 94% and up were not tried.
GPU_MEMORY_SHARE = 0.93


def _gpu(kinds, peak, bandwidth, hbm, nvlink, dcn=50e9, compute_capability='9.0'):
    return Gpu(kinds, peak, bandwidth, hbm, int(GPU_MEMORY_SHARE * hbm), dcn, 8, nvlink, compute_capability)


_A100 = dict(dcn=25e9, compute_capability='8.0')
GPUS = {
    'a100': _gpu(('NVIDIA A100-SXM4-80GB',), 312e12, 2039e9, 80 * GB, 300e9, **_A100),
    'a100-40g': _gpu(('NVIDIA A100-SXM4-40GB',), 312e12, 1555e9, 40 * GB, 300e9, **_A100),
    'a100-pcie': _gpu(('NVIDIA A100 80GB PCIe',), 312e12, 1935e9, 80 * GB, 300e9, **_A100),
    'h100': _gpu(('NVIDIA H100 80GB HBM3',), 989e12, 3350e9, 80 * GB, 450e9),
    'h100-pcie': _gpu(('NVIDIA H100 PCIe',), 756e12, 2000e9, 80 * GB, 300e9),
    'h100-nvl': _gpu(('NVIDIA H100 NVL',), 835e12, 3900e9, 94 * GB, 300e9),
    'h200': _gpu(('NVIDIA H200',), 989e12, 4800e9, 141 * GB, 450e9),
    'h200-nvl': _gpu(('NVIDIA H200 NVL',), 835e12, 4800e9, 141 * GB, 450e9),
    'gh200': _gpu(('NVIDIA GH200 480GB',), 990e12, 4000e9, 96 * GB, 450e9),
    'b200': _gpu(('NVIDIA B200',), 2250e12, 8000e9, 180 * GB, 900e9, compute_capability='10.0'),
}
CHIPS: dict[str, Chip] = {**TPUS, **GPUS}


def name_of(device_kind: str) -> str:
    """The chip of a JAX `device_kind` ('TPU v5 lite', 'NVIDIA H100 PCIe'), '' for one that is not listed.

    Only the whole kind names a chip: cards whose names begin alike differ in peak by a quarter.
    """
    return next((name for name, chip in CHIPS.items() if device_kind in chip.kinds), '')


def peak_flops(device_kind: str) -> float:
    """bfloat16 FLOP/s of a device, 0.0 where it is not known (a CPU, a card that is not listed)."""
    name = name_of(device_kind)
    return CHIPS[name].peak if name else 0.0
