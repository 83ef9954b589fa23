"""Every setting of a run: its name, its default and its meaning, in one tree.

A config file is Python with a function `get_config()` that builds a `Config`
and changes what differs from the defaults. `load(path, overrides)` reads it,
applies overrides by dotted name, checks everything that can be checked without
a device, and locks the tree. This module imports no jax.
"""

import dataclasses
import pathlib
import runpy
import traceback
import types
from typing import Any

from transxssm_jax import cli, settings
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
        'Heads H of both mixers; the head width is d_model / num_heads.',
        minimum=1,
        maximum=1 << 14,
        of_checkpoint=True,
    )
    num_kv_heads: int = setting(
        8, 'Groups of K and V in attention; divides num_heads.', minimum=1, maximum=1 << 14, of_checkpoint=True
    )
    num_ssd_groups: int = setting(
        8,
        'Groups of B and C in the state-space layer; divides num_heads.',
        minimum=1,
        maximum=1 << 14,
        of_checkpoint=True,
    )
    d_state: int = setting(
        128, 'State size N of the state-space layer; a multiple of 16.', minimum=16, maximum=1 << 14, of_checkpoint=True
    )
    d_mlp: int = setting(6144, 'Inner width F of the SwiGLU MLP.', minimum=1, maximum=1 << 22, of_checkpoint=True)
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
    norm_epsilon: float = setting(1e-6, 'Added to the mean square in RMSNorm.', minimum=0.0)
    init_std: float = setting(0.02, 'Standard deviation of every initial matrix.', minimum=0.0)
    dtype: str = setting('bfloat16', 'Type of activations and matmul operands.', choices=('bfloat16', 'float32'))
    remat: str = setting(
        'hybrid',
        'What the backward pass recomputes: nothing, whole layers, all but matmul outputs, or all but those that are dear.',
        choices=('none', 'full', 'dots', 'hybrid'),
    )
    ssd_implementation: str = setting('auto', "Scan implementation; 'auto' picks the fastest that serves.")
    ssd_chunk_size: int = setting(0, 'Tokens per chunk of the scan; 0 picks by device.', minimum=0, maximum=1 << 16)
    attention_implementation: str = setting('auto', "Attention implementation; 'auto' picks the fastest that serves.")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def layer_pattern(self) -> tuple[str, ...]:
        """Kind of each layer of one period."""
        if self.attention_period == 0:
            return ('ssd',)
        return tuple('attention' if i == self.attention_offset else 'ssd' for i in range(self.attention_period))

    @property
    def num_periods(self) -> int:
        """How often the pattern repeats."""
        return self.num_layers // len(self.layer_pattern)


@dataclasses.dataclass
class Data(Section):
    path: str = setting('', 'Directory that python -m transxssm_jax.data.prepare wrote.', is_path=True)
    train_split: str = setting('train', 'Split to train on.', of_checkpoint=True)
    eval_splits: str = setting(
        'validation',
        'Splits to evaluate on, separated by commas; the loss of the first decides which checkpoints are best. '
        'Empty: no evaluation.',
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
    def eval_split_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for name in self.eval_splits.split(',') if name.strip()))


@dataclasses.dataclass
class Optimizer(Section):
    name: str = setting('adamw', 'Which optimizer of training/optimizer.py.', choices=('adamw',), of_checkpoint=True)
    learning_rate: float = setting(2e-4, 'Peak learning rate.', minimum=0.0)
    schedule: str = setting(
        'cosine', 'Shape of the learning rate after warmup.', choices=('cosine', 'linear', 'wsd', 'constant')
    )
    warmup_steps: int = setting(1000, 'Steps of linear warmup from 0.', minimum=0)
    decay_steps: int = setting(1000, 'Steps of the final decay under wsd.', minimum=0)
    final_fraction: float = setting(0.1, 'Last learning rate divided by the peak.', minimum=0.0)
    b1: float = setting(0.9, 'Decay of the first moment.', minimum=0.0)
    b2: float = setting(0.999, 'Decay of the second moment.', minimum=0.0)
    epsilon: float = setting(1e-8, 'Added to the square root of the second moment.', minimum=0.0)
    weight_decay: float = setting(
        0.01, 'Decoupled weight decay of matrices, multiplied by the learning rate.', minimum=0.0
    )
    clip_norm: float = setting(1.0, 'Global gradient norm to clip to; 0: no clipping.', minimum=0.0)
    z_loss: float = setting(0.0, 'Weight of the squared log-partition in the loss.', minimum=0.0)


@dataclasses.dataclass
class Train(Section):
    steps: int = setting(10000, 'Steps of the whole run.', minimum=1)
    accumulation_steps: int = setting(1, 'Microbatches per step, one after another.', minimum=1, maximum=1 << 16)
    loss_chunk_tokens: int = setting(2048, 'Tokens per device whose logits exist at a time.', minimum=1)
    seed: int = setting(0, 'Seed of the initial parameters.', minimum=0, maximum=LARGEST_SEED, of_checkpoint=True)
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
    tensorboard: bool = setting(True, 'Whether to write TensorBoard files to the workdir.')
    progress: bool = setting(True, 'Whether to show a progress bar.')
    profile_start_step: int = setting(0, 'First step of the profiler window.', minimum=0)
    profile_steps: int = setting(0, 'Steps in the profiler window; 0: no profile.', minimum=0)
    sample_tokens: int = setting(0, 'Tokens to sample when the run ends; 0: none.', minimum=0)


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
        sections; its name may start with a digit.
      overrides: dotted name -> value, e.g. {'model.d_model': 512}; text is read as on a command line.

    Raises:
      ConfigError: no such file, unknown name, wrong type, or a combination
        that cannot work. The message is one line and names the remedy.
    """
    return replace(_read_file(str(path)), overrides or {})


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
    return resolve(changed)


def _read_file(path: str) -> Config:
    file = pathlib.Path(path).expanduser()
    try:
        found = file.is_file()
        if file.is_dir():
            inside = ', '.join(sorted(str(p) for p in file.glob('*.py'))[:5])
            raise ConfigError(
                f'--config={path} is a directory; name a config file{f", such as {inside}" * bool(inside)}'
            )
    except OSError as error:
        raise ConfigError(f'--config={cli.shorten(path)}: {error.strerror}') from None
    if not found:
        near = [str(p) for folder in {file.parent, pathlib.Path('configs')} for p in folder.glob('*.py')]
        raise ConfigError(f'--config={path}: no such file{cli.nearest(path, near) if near else ""}')
    path = str(file)
    try:
        config = runpy.run_path(path).get('get_config', lambda: None)()
        if hasattr(config, 'to_dict'):
            config = settings.from_tree(Config, config.to_dict())
    except (Exception, SystemExit) as error:  # whatever a file with a mistake raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        kind = '' if isinstance(error, ConfigError | SyntaxError) else f'{type(error).__name__}: '
        where = f'{path}, line {lines[-1]}' if lines else path
        raise ConfigError(f'{where}: {kind}{cli.one_line(error)}') from error
    if not isinstance(config, Config):
        raise ConfigError(f'{path}: must have a function get_config() that returns a transxssm_jax.config.Config')
    return config


def start_from(asking_file: str, path: str) -> Config:
    """The config of another file, to change: `config = start_from(__file__, '../1p3b.py')` in a file of configs/pods/.

    Args:
      asking_file: where path is relative to.
      path: a config file.
    """
    return settings.copy(_read_file(str(pathlib.Path(asking_file).parent / path)))


def describe() -> str:
    """Every setting with its default and its meaning, one per line."""
    return settings.describe(Config)


def resolve(config: Config) -> Config:
    """Checks what no single setting shows, and locks the tree.

    Raises:
      ConfigError: naming the setting, its value, the rule and a remedy.
    """
    model, data, optimizer, train = config.model, config.data, config.optimizer, config.train
    # A head's width is a multiple of 16, so what is proposed is too.
    _divides('model.d_model', model.d_model, 'model.num_heads', model.num_heads, step=16 * model.num_heads)
    _divides('model.num_heads', model.num_heads, 'model.num_kv_heads', model.num_kv_heads)
    _divides('model.num_heads', model.num_heads, 'model.num_ssd_groups', model.num_ssd_groups)
    _divides('model.num_layers', model.num_layers, 'layers per period', len(model.layer_pattern))
    if model.head_dim % 16:
        raise ConfigError(
            f'model.d_model={model.d_model} / model.num_heads={model.num_heads} = {model.head_dim} '
            'must be a multiple of 16; change either'
        )
    if model.d_state % 16:
        raise ConfigError(
            f'model.d_state={model.d_state} must be a multiple of 16; try {model.d_state // 16 * 16 + 16}'
        )
    if 0 < model.attention_period <= model.attention_offset:
        raise ConfigError(
            f'model.attention_offset={model.attention_offset} must be below model.attention_period='
            f'{model.attention_period}; try {model.attention_period - 1}'
        )
    if not 0 < model.dt_min <= model.dt_max:
        raise ConfigError(f'model.dt_min={model.dt_min} must be positive and at most model.dt_max={model.dt_max}')
    if not 0 < model.a_min <= model.a_max:
        raise ConfigError(f'model.a_min={model.a_min} must be positive and at most model.a_max={model.a_max}')
    if model.ssd_chunk_size % 16:
        raise ConfigError(
            f'model.ssd_chunk_size={model.ssd_chunk_size} must be a multiple of 16; try '
            f'{model.ssd_chunk_size // 16 * 16 + 16}, or 0 to leave it to the device'
        )
    for name in ('b1', 'b2'):
        if getattr(optimizer, name) >= 1:
            raise ConfigError(
                f'optimizer.{name}={getattr(optimizer, name)} must be below 1; try 0.9 for b1, 0.999 for b2'
            )
    _divides('data.global_batch', data.global_batch, 'train.accumulation_steps', train.accumulation_steps)
    decay_steps = optimizer.decay_steps if optimizer.schedule == 'wsd' else 0
    if optimizer.warmup_steps + decay_steps > train.steps:
        parts = 'optimizer.warmup_steps' + (' + optimizer.decay_steps' if decay_steps else '')
        raise ConfigError(
            f'{parts} = {optimizer.warmup_steps + decay_steps} must be at most '
            f'train.steps={train.steps}; lower {parts.split()[0]}'
        )
    mesh = dataclasses.asdict(config.mesh)
    if list(mesh.values()).count(-1) > 1 or 0 in mesh.values():
        raise ConfigError(f'mesh={mesh}: at most one axis may be -1 and none 0')
    settings.lock(config)
    return config


def _divides(name, value, by_name, by, step=0):
    """Raises unless by divides value; proposes the nearest multiples of step (default: of by)."""
    if value % by:
        step = step or by
        lower, upper = value // step * step, (value // step + 1) * step
        tries = ' or '.join(str(n) for n in (lower, upper) if n > 0)
        raise ConfigError(f'{name}={value} must be divisible by {by_name}={by}; try {tries}')


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
