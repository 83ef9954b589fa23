"""Every setting of a run: its name, its default and its meaning, in one tree.

A config file is Python with a function `get_config()` that builds a `Config`
and changes what differs from the defaults. `load(path, overrides)` reads it,
applies overrides by dotted name, checks everything that can be checked without
a device, and locks the tree. This module imports no jax.
"""

import dataclasses
import pathlib
import types
from typing import Any

from transxssm_jax import config_rules, settings
from transxssm_jax.config_optimizer import Optimizer
from transxssm_jax.config_watch import Watch
from transxssm_jax.layer_pattern import parse_pattern, parse_remat
from transxssm_jax.settings import LARGEST_SEED, ConfigError, Section, setting

GRADIENT_DTYPES = ('auto', 'bfloat16', 'float32')


@dataclasses.dataclass
class Model(Section):
    vocab_size: int = setting(
        50304, 'Rows of the embedding; a multiple of 128 tiles well.', minimum=1, maximum=1 << 24, of_checkpoint=True
    )
    d_model: int = setting(2048, 'Width D of the residual stream.', minimum=1, maximum=1 << 18, of_checkpoint=True)
    num_layers: int = setting(24, 'Layers; each is a mixer and an MLP.', minimum=1, maximum=1 << 12, of_checkpoint=True)
    num_heads: int = setting(
        32,
        'Heads H of attention and ssd; the head width is d_model / num_heads. mamba2 has mamba_expand times as many.',
        minimum=1,
        maximum=1 << 14,
        of_checkpoint=True,
    )
    num_kv_heads: int = setting(
        8, 'Groups of K and V in attention; divides num_heads.', minimum=1, maximum=1 << 14, of_checkpoint=True
    )
    num_ssd_groups: int = setting(
        8, 'Groups of B and C in ssd and mamba2; divides num_heads.', minimum=1, maximum=1 << 14, of_checkpoint=True
    )
    d_state: int = setting(
        128, 'State size N of the state-space layer; a multiple of 16.', minimum=16, maximum=1 << 14, of_checkpoint=True
    )
    d_mlp: int = setting(
        6144, 'Inner width F of the SwiGLU MLP; 0: layers have none.', minimum=0, maximum=1 << 22, of_checkpoint=True
    )
    pattern: str = setting(
        '',
        "Layers of a period, e.g. '7xmamba2,attention'; empty: ssd, with attention where attention_period and "
        'attention_offset place it.',
        of_checkpoint=True,
        parse=parse_pattern,
    )
    attention_period: int = setting(
        8,
        'Layers in a period, one of them attention; 1: attention everywhere, 0: nowhere.',
        minimum=0,
        maximum=1 << 12,
        of_checkpoint=True,
    )
    attention_offset: int = setting(
        7, 'Index of the attention layer within its period.', minimum=0, maximum=1 << 12, of_checkpoint=True
    )
    attention_encoding: str = setting(
        'rope', 'Position encoding of attention.', choices=('rope', 'none'), of_checkpoint=True
    )
    ssd_encoding: str = setting(
        'rope',
        'Position encoding of the state-space layer: rotation of B and C; a short convolution and a D skip; the decay alone.',
        choices=('rope', 'conv1d_d', 'decay_only'),
        of_checkpoint=True,
    )
    conv_width: int = setting(
        4, 'Tokens that the convolution of mamba2 and conv1d_d sees.', minimum=2, maximum=1 << 8, of_checkpoint=True
    )
    mamba_expand: int = setting(
        2,
        'Width of mamba2 inside over d_model; its heads are as wide as others.',
        minimum=1,
        maximum=64,
        of_checkpoint=True,
    )
    rope_theta: float = setting(10000.0, 'Base of the rotary frequencies.', minimum=1.0, of_checkpoint=True)
    rope_scaling: str = setting(
        'none', 'What to do beyond the training length.', choices=('none', 'linear', 'dynamic', 'length')
    )
    rope_factor: float = setting(4.0, 'Stretch of positions under linear and dynamic scaling.', minimum=1.0)
    rope_original_length: int = setting(4096, 'Training length in tokens that rope scaling starts from.', minimum=2)
    tie_embeddings: bool = setting(True, 'Whether the head is the embedding, transposed.', of_checkpoint=True)
    use_bias: bool = setting(False, 'Whether linear maps have biases.', of_checkpoint=True)
    use_dt_bias: bool = setting(
        True,
        'Whether dt = softplus(u W + bias) has a bias per head, which alone can start dt in [dt_min, dt_max].',
        of_checkpoint=True,
    )
    dt_min: float = setting(0.001, 'Least step size at initialisation (with a dt bias).')
    dt_max: float = setting(0.1, 'Largest step size at initialisation (with a dt bias).')
    a_min: float = setting(1.0, 'Least decay rate -a at initialisation.')
    a_max: float = setting(16.0, 'Largest decay rate -a at initialisation.')
    qk_norm: bool = setting(
        False, 'Whether attention has an RMSNorm of every head of Q and K, before they rotate.', of_checkpoint=True
    )
    bc_norm: bool = setting(
        False,
        'Whether ssd and mamba2 have an RMSNorm of B and C of every group, before they rotate.',
        of_checkpoint=True,
    )
    logit_soft_cap: float = setting(
        0.0, 'Logits are cap * tanh(logits / cap); 0: they are as they are.', minimum=0.0, of_checkpoint=True
    )
    norm_epsilon: float = setting(1e-6, 'Added to the mean square in RMSNorm.', minimum=0.0)
    init_std: float = setting(0.02, 'Standard deviation of every initial matrix.', minimum=0.0)
    dtype: str = setting('bfloat16', 'Type of activations and matmul operands.', choices=('bfloat16', 'float32'))
    quantization: str = setting(
        'none',
        "8-bit operands of the MLPs' linear maps in training and evaluation: 'fp8' on Hopper, 'int8' on TPU v5e and v6e.",
        choices=('none', 'fp8', 'int8'),
    )
    remat: str = setting(
        'auto',
        "What the backward pass recomputes: 'none': nothing; 'matmuls': all but products ('dots': but what XLA calls so); "
        "'hybrid': the MLP too; 'full': layers. Or a word for each layer, '6xmatmuls,18xnone'. 'auto': the fastest that fits.",
        parse=parse_remat,
    )
    layer_loop: str = setting(
        'auto',
        "Whether layers are one 'scan' or 'unrolled'. Unrolled, a GPU's step is a fifth faster, a TPU's needs less memory, and "
        "both compile for longer; 'auto' unrolls on GPUs and TPUs, and where model.remat differs between layers.",
        choices=('auto', 'scan', 'unrolled'),
    )
    ssd_implementation: str = setting('auto', "Scan implementation; 'auto' picks the fastest that serves.")
    ssd_chunk_size: int = setting(0, 'Tokens per chunk of the scan; 0 picks by device.', minimum=0, maximum=1 << 16)
    attention_implementation: str = setting('auto', "Attention implementation; 'auto' picks the fastest that serves.")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def num_mamba_heads(self) -> int:
        return self.mamba_expand * self.num_heads

    @property
    def layer_pattern(self) -> tuple[str, ...]:
        """Kind of each layer of one period."""
        if self.pattern:
            return parse_pattern(self.pattern)
        if self.attention_period == 0:
            return ('ssd',)
        return tuple('attention' if i == self.attention_offset else 'ssd' for i in range(self.attention_period))

    @property
    def remat_of_layers(self) -> tuple[str, ...]:
        """Remat policy of each layer, in order. model.remat 'auto', where nobody has looked at the devices, is 'hybrid'."""
        words = parse_remat('hybrid' if self.remat == 'auto' else self.remat)
        return words * self.num_layers if len(words) == 1 else words

    @property
    def num_periods(self) -> int:
        """How often the pattern repeats."""
        return self.num_layers // len(self.layer_pattern)


@dataclasses.dataclass
class Data(Section):
    path: str = setting(
        '',
        'Directory that python -m transxssm_jax.data.prepare wrote; s3://... or gs://... is read without a mount.',
        is_path=True,
        is_place=True,
    )
    sources: str = setting(
        '',
        'In place of data.path, several prepared directories with commas between, each DIR or NAME=DIR (the name is by '
        'default the last part of DIR): a row comes from one of them by data.weights.',
    )
    weights: str = setting(
        '',
        "Weights of data.sources, '0.8, 0.2', or by step, '0: 0.8, 0.2; 9000: 0.5, 0.5'; with 'to 9000: 0.5, 0.5' they "
        'move there along a line. Empty: in proportion to their tokens.',
    )
    max_epochs: str = setting(
        '',
        'Most epochs of each of data.sources, with commas between; 0: any number. A source that has given them ends, '
        'and the others share its rows.',
    )
    train_split: str = setting('train', 'Split to train on.', of_checkpoint=True)
    eval_splits: str = setting(
        'validation',
        'Splits to evaluate on, separated by commas; the loss of the first decides which checkpoints are best. Of '
        'data.sources SPLIT is that of every source that has it, and NAME/SPLIT that of one. Empty: no evaluation.',
    )
    seq_len: int = setting(4096, 'Tokens per row.', minimum=1, of_checkpoint=True)
    global_batch: int = setting(
        512, 'Rows per step, over all hosts and accumulation steps.', minimum=1, maximum=1 << 24, of_checkpoint=True
    )
    seed: int = setting(
        0, 'Seed of the order of documents and of rows.', minimum=0, maximum=LARGEST_SEED, of_checkpoint=True
    )
    num_workers: int = setting(0, 'Loader processes per host; 0: threads in this process.', minimum=0, maximum=1 << 10)
    prefetch_batches: int = setting(4, 'Batches read ahead.', minimum=1, maximum=1 << 16)
    verify: str = setting(
        'sizes',
        'Check of the shards at opening: their sizes, or their full contents (sha256).',
        choices=('sizes', 'full'),
    )

    @property
    def directories(self) -> dict[str, str]:
        """Name -> directory of data.sources, in order; empty without them. ConfigError: a name is there twice."""
        return settings.named_paths('data.sources', self.sources)

    @property
    def tokenizer_path(self) -> str:
        """A directory with the tokenizer of the data; '' where no data is named."""
        return self.path or next(iter(self.directories.values()), '')

    @property
    def eval_split_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for name in self.eval_splits.split(',') if name.strip()))


@dataclasses.dataclass
class Train(Watch):
    steps: int = setting(10000, 'Steps of the whole run.', minimum=1)
    accumulation_steps: int = setting(
        0,
        'Microbatches per step, one after another; 0 takes as few as fit into the memory of the devices.',
        minimum=0,
        maximum=1 << 16,
    )
    loss_chunk_tokens: int = setting(2048, 'Tokens per device whose logits exist at a time.', minimum=1)
    seed: int = setting(0, 'Seed of the initial parameters.', minimum=0, maximum=LARGEST_SEED, of_checkpoint=True)
    init_from: str = setting(
        '',
        'What a new run starts from: a workdir, alone or with @STEP, @best or @latest behind it, or a directory of '
        'published weights. Empty: from train.seed. A run with checkpoints goes on from its own.',
        is_path=True,
    )
    init_what: str = setting(
        'params',
        'What is taken of train.init_from: the parameters, or the state of the optimizer too. The step starts at 0.',
        choices=('params', 'params+optimizer'),
    )
    gradient_dtype_data: str = setting(
        'auto',
        "Dtype in which gradients are summed over mesh.data; 'auto': model.dtype for up to 16 devices and without "
        'microbatches, else float32.',
        choices=GRADIENT_DTYPES,
    )
    gradient_dtype_fsdp: str = setting(
        'auto',
        "Dtype in which gradients are summed over mesh.fsdp; 'auto': model.dtype for up to 16 devices, else float32.",
        choices=GRADIENT_DTYPES,
    )
    gradient_dtype_context: str = setting(
        'auto',
        "Dtype in which gradients are summed over mesh.context; 'auto': as for mesh.data, with which it counts together.",
        choices=GRADIENT_DTYPES,
    )
    gradient_dtype_tensor: str = setting(
        'auto',
        "Dtype in which activations' gradients are summed over mesh.tensor; 'auto': as for mesh.fsdp.",
        choices=GRADIENT_DTYPES,
    )
    log_every_steps: int = setting(10, 'Steps between metrics records.', minimum=1)
    eval_every_steps: int = setting(1000, 'Steps between evaluations; one more comes at the end. 0: none.', minimum=0)
    eval_batches: int = setting(
        0, 'Global batches per evaluation, a fixed sample of the split; 0: the whole split.', minimum=0
    )
    checkpoint_every_steps: int = setting(1000, 'Steps between checkpoints; one more comes at the end.', minimum=1)
    keep_last: int = setting(2, 'Newest checkpoints to keep.', minimum=1)
    keep_best: int = setting(
        1,
        'Checkpoints with the lowest evaluation loss to keep; an evaluation that is among the lowest is saved at once.',
        minimum=0,
    )
    eval_weights: str = setting(
        'trained', 'Weights that are evaluated: the trained ones, or their average.', choices=('trained', 'ema')
    )
    tensorboard: bool = setting(True, 'Whether to write TensorBoard files to the workdir.')
    compilation_cache: bool = setting(
        True, 'Whether what is compiled is kept in the workdir, so that a resumed run starts sooner.'
    )
    progress: bool = setting(True, 'Whether to show a progress bar.')
    profile_start_step: int = setting(0, 'First step of the profiler window.', minimum=0)
    profile_steps: int = setting(0, 'Steps in the profiler window; 0: no profile.', minimum=0)
    sample_tokens: int = setting(0, 'Tokens to sample when the run ends; 0: none.', minimum=0)

    @property
    def num_microbatches(self) -> int:
        """accumulation_steps, or 1 where it is left open and nobody has looked at the devices."""
        return max(self.accumulation_steps, 1)


@dataclasses.dataclass
class Mesh(Section):
    data: int = setting(
        -1, 'Replicas of the state; -1: all devices that the other axes leave.', minimum=-1, maximum=1 << 20
    )
    fsdp: int = setting(
        1,
        'Devices over which parameters and optimizer state are sharded; they shard the batch too.',
        minimum=-1,
        maximum=1 << 20,
    )
    context: int = setting(1, 'Devices over which the tokens of a row are sharded.', minimum=-1, maximum=1 << 20)
    tensor: int = setting(
        1, 'Devices over which heads, MLP width and vocabulary are sharded.', minimum=-1, maximum=1 << 20
    )
    slices: int = setting(
        1, 'TPU slices, or GPU hosts, that the devices belong to; the data axis spans them.', minimum=1, maximum=1 << 20
    )


@dataclasses.dataclass
class Config(Section):
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    train: Train = dataclasses.field(default_factory=Train)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)

    @property
    def tokens_per_step(self) -> int:
        return self.data.global_batch * self.data.seq_len


# ---- reading ---------------------------------------------------------------


def load(path, overrides: dict[str, Any] | None = None) -> Config:
    """Reads a config file by path, applies overrides, checks and locks.

    Args:
      path: a Python file with `get_config()`, which returns a Config or an ml_collections.ConfigDict of the same
        sections; its name may start with a digit. Or the name of a shipped one: '1p3b', 'pods/1p3b_v5e_256'.
      overrides: dotted name -> value, e.g. {'model.d_model': 512}; text is read as on a command line.

    Raises:
      ConfigError: no such file, unknown name, wrong type, or a combination
        that cannot work. The message is one line and names the remedy.
    """
    return replace(settings.read_file(Config, str(path)), overrides or {})


def from_flags(flags: types.SimpleNamespace) -> Config:
    """The config of a command line (cli.Command.parse): --config=PATH and --config.a.b=VALUE, in any order.

    Raises:
      ConfigError: see `load`; also where --config is missing.
    """
    if not flags.config_file:
        raise ConfigError('--config=PATH is missing, e.g. --config=configs/tiny.py')
    return load(flags.config_file, flags.overrides)


def replace(config: Config, changes: dict[str, Any]) -> Config:
    """A new config, checked and locked, in which some settings differ: replace(config, {'model.remat': 'full'}).

    Args:
      config: is not changed.
      changes: dotted name -> value of the setting's type, or text as on a command line.

    Raises:
      ConfigError: unknown name, wrong type, or a combination that cannot work.
    """
    changed = settings.copy(config)
    settings.change(changed, changes)
    placed = [name for name in ('model.attention_period', 'model.attention_offset') if name in changes]
    if placed and changed.model.pattern:
        raise ConfigError(
            f'{placed[0]} places no layer beside model.pattern={changed.model.pattern!r}; change model.pattern, or '
            "empty it with model.pattern=''"
        )
    return resolve(changed)


def start_from(asking_file: str, path: str) -> Config:
    """The config of another file, to change: `config = start_from(__file__, '../1p3b.py')` in a file of configs/pods/.

    Args:
      asking_file: where path is relative to.
      path: a config file.
    """
    return settings.copy(settings.read_file(Config, str(pathlib.Path(asking_file).parent / path)))


def describe() -> str:
    """Every setting with its default and its meaning, one per line."""
    return settings.describe(Config)


def resolve(config: Config) -> Config:
    """Checks what no single setting shows, and locks the tree.

    Raises:
      ConfigError: naming the setting, its value, the rule and a remedy.
    """
    config_rules.check(config)
    settings.lock(config)
    return config


# ---- writing and comparing -------------------------------------------------


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by dotted name."""
    return settings.flatten(config)


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: dotted name -> (value in config, value in other)."""
    ours, theirs = flatten(config), flatten(other)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def to_json(config: Config) -> str:
    return settings.to_json(config)


def from_json(text: str | bytes) -> Config:
    """The config of a saved run, locked; settings that have since been added take their defaults.

    Raises:
      ConfigError: not UTF-8, not JSON, or it holds a section, a setting or a value that this version does not take.
    """
    return resolve(settings.from_json(Config, text))


def to_config_dict(config: Config):
    """The settings as an ml_collections.ConfigDict, for programs that take one; `load` reads a file that returns one."""
    import ml_collections

    return ml_collections.ConfigDict(dataclasses.asdict(config))


def unfit_for_checkpoint(saved: Config, wanted: Config) -> list[str]:
    """What keeps a checkpoint of `saved` from being resumed with `wanted`, a phrase a setting."""
    fixed = {name for name, field in settings.walk(Config) if field.metadata['of_checkpoint']}
    return [
        f'{name} is {was!r} in the checkpoint and {now!r} in this config'
        for name, (was, now) in differences(saved, wanted).items()
        if name in fixed
    ]
