"""What no single setting of a config shows: the rules between settings."""

import dataclasses

from transxssm_jax import cli
from transxssm_jax.settings import ConfigError


def check(config) -> None:
    """Checks a `config.Config`.

    Raises:
      ConfigError: naming the setting, its value, the rule and a remedy.
    """
    _check_sizes(config.model)
    _check_layers(config.model)
    _check_optimizer(config.optimizer)
    _check_data(config.data)
    _check_training(config)
    _check_kept(config.train)
    _check_mesh(config.mesh)


def _check_sizes(model) -> None:
    # A head's width is a multiple of 16, so what is proposed is too.
    _divides('model.d_model', model.d_model, 'model.num_heads', model.num_heads, step=16 * model.num_heads)
    _divides('model.num_heads', model.num_heads, 'model.num_kv_heads', model.num_kv_heads)
    _divides('model.num_heads', model.num_heads, 'model.num_ssd_groups', model.num_ssd_groups)
    if model.head_dim % 16:
        raise ConfigError(
            f'model.d_model={model.d_model} / model.num_heads={model.num_heads} = {model.head_dim} '
            'must be a multiple of 16; change either'
        )
    if model.d_state % 16:
        raise ConfigError(
            f'model.d_state={model.d_state} must be a multiple of 16; try {model.d_state // 16 * 16 + 16}'
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


def _check_layers(model) -> None:
    _divides('model.num_layers', model.num_layers, 'layers per period', len(model.layer_pattern))
    if not model.pattern and 0 < model.attention_period <= model.attention_offset:
        raise ConfigError(
            f'model.attention_offset={model.attention_offset} must be below model.attention_period='
            f'{model.attention_period}; try {model.attention_period - 1}'
        )
    policies = model.remat_of_layers
    if 'auto' in policies:
        raise ConfigError(f"model.remat={model.remat!r}: 'auto' stands alone; it chooses for all layers")
    if len(policies) != model.num_layers:
        raise ConfigError(
            f'model.remat={model.remat!r} lists {len(policies)} layers, and model.num_layers={model.num_layers}; name one '
            'policy for all layers, or one for each'
        )
    if len(set(policies)) > 1 and model.layer_loop == 'scan':
        raise ConfigError(
            f"model.remat={model.remat!r} differs between layers, which model.layer_loop='scan' runs as one; set "
            "model.layer_loop to 'auto'"
        )
    if model.quantization != 'none' and not model.d_mlp:
        raise ConfigError(
            f"model.quantization='{model.quantization}' acts on the MLPs, and with model.d_mlp=0 there are none; "
            "set it to 'none', or set model.d_mlp"
        )


def _check_optimizer(optimizer) -> None:
    for name in ('b1', 'b2', 'momentum', 'ema_decay'):
        if getattr(optimizer, name) >= 1:
            usual = {'b1': 0.9, 'b2': 0.999, 'momentum': 0.95, 'ema_decay': 0.9999}[name]
            raise ConfigError(f'optimizer.{name}={getattr(optimizer, name)} must be below 1; try {usual}')
    _ = optimizer.of_group  # refuses what it cannot read


def _check_data(data) -> None:
    if data.path and data.directories:
        raise ConfigError(
            f'data.path={data.path} and data.sources={data.sources} both name the data; leave one of them empty'
        )
    for name in ('weights', 'max_epochs'):
        if getattr(data, name) and not data.directories:
            value = cli.shorten(repr(getattr(data, name)))
            raise ConfigError(f'data.{name}={value} belongs to data.sources, which is empty; set both')


def _check_training(config) -> None:
    data, optimizer, train = config.data, config.optimizer, config.train
    _ = train.tracker_names  # refuses what it cannot read
    if train.eval_weights == 'ema' and not optimizer.ema_decay:
        raise ConfigError(
            "train.eval_weights='ema' needs an average of the weights; set optimizer.ema_decay, e.g. 0.9999"
        )
    _divides('data.global_batch', data.global_batch, 'train.accumulation_steps', train.num_microbatches)
    decay_steps = optimizer.decay_steps if optimizer.schedule == 'wsd' else 0
    if optimizer.warmup_steps + decay_steps > train.steps:
        parts = 'optimizer.warmup_steps' + (' + optimizer.decay_steps' if decay_steps else '')
        raise ConfigError(
            f'{parts} = {optimizer.warmup_steps + decay_steps} must be at most '
            f'train.steps={train.steps}; lower {parts.split()[0]}'
        )
    if train.spike_action != 'none' and not train.max_spikes:
        does = 'skips step after step' if train.spike_action == 'skip' else 'goes back again and again'
        raise ConfigError(
            f'train.spike_action={train.spike_action!r} needs train.max_spikes of at least 1, so that a run that {does} '
            f'ends; try {train.spike_window // 8}'
        )


def _check_kept(train) -> None:
    if bool(train.checkpoint_local_dir) != bool(train.checkpoint_local_every_steps):
        raise ConfigError(
            f'train.checkpoint_local_dir={train.checkpoint_local_dir!r} and train.checkpoint_local_every_steps='
            f'{train.checkpoint_local_every_steps} need each other; set both, or neither'
        )
    if train.keep_every_steps % train.checkpoint_every_steps:
        raise ConfigError(
            f'train.keep_every_steps={train.keep_every_steps} must be a multiple of train.checkpoint_every_steps='
            f'{train.checkpoint_every_steps}, because only what is saved can be kept; try '
            f'{-(-train.keep_every_steps // train.checkpoint_every_steps) * train.checkpoint_every_steps}'
        )


def _check_mesh(mesh) -> None:
    sizes = dataclasses.asdict(mesh)
    if list(sizes.values()).count(-1) > 1 or 0 in sizes.values():
        raise ConfigError(f'mesh={sizes}: at most one axis may be -1 and none 0')


def _divides(name, value, by_name, by, step=0):
    """Raises unless by divides value; proposes the nearest multiples of step (default: of by)."""
    if value % by:
        step = step or by
        lower, upper = value // step * step, (value // step + 1) * step
        tries = ' or '.join(str(n) for n in (lower, upper) if n > 0)
        raise ConfigError(f'{name}={value} must be divisible by {by_name}={by}; try {tries}')
