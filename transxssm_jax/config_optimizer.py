"""Settings of the section `optimizer`: the optimizer, its schedule, and the groups of parameters that it tells apart."""

import dataclasses

from transxssm_jax import cli
from transxssm_jax.settings import ConfigError, Section, setting

# Every parameter is in one of these; `training/parameter_groups.py` tells in which.
GROUPS = ('matrices', 'embedding', 'dt', 'norms', 'residuals', 'convolution', 'biases')


@dataclasses.dataclass
class Optimizer(Section):
    name: str = setting(
        'adamw', 'Which optimizer of training/optimizer.py.', choices=('adamw', 'muon'), of_checkpoint=True
    )
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
    momentum: float = setting(0.95, 'Decay of the momentum of muon.', minimum=0.0)
    groups: str = setting(
        '',
        "Groups of parameters with a learning rate or a weight decay of their own, 'GROUP: FACTOR[, DECAY]' with semicolons "
        "between, e.g. 'embedding: 0.5; dt: 0.1, 0': the factor of the learning rate, and the weight decay of the group.",
    )
    ema_decay: float = setting(
        0.0,
        'Decay of the average of the weights over steps, which checkpoints keep; 0: there is none.',
        minimum=0.0,
        of_checkpoint=True,
    )
    updates_before: int = setting(
        0,
        "Updates that the optimizer's state had seen before step 0; set by the program, see train.init_what.",
        minimum=0,
        of_checkpoint=True,
    )

    @property
    def of_group(self) -> dict[str, tuple[float, float | None]]:
        """Group -> (factor of the learning rate, weight decay or None for the usual one), of those in `groups`.

        Raises:
          ConfigError: an unknown group, one that is there twice, or what is no number.
        """
        read = {}
        for part in filter(None, (part.strip() for part in self.groups.split(';'))):
            name, colon, numbers = (word.strip() for word in part.partition(':'))
            where = f'optimizer.groups: {cli.shorten(repr(part))}'
            if name not in GROUPS:
                near = cli.nearest(name, GROUPS) or f'; the groups are {", ".join(GROUPS)}'
                raise ConfigError(f'{where} names no group of parameters{near}')
            if name in read:
                raise ConfigError(f'{where} is a second entry of {name}; leave one')
            values = [number.strip() for number in numbers.split(',')]
            if not colon or len(values) > 2:
                raise ConfigError(f"{where} must be 'GROUP: FACTOR' or 'GROUP: FACTOR, DECAY'")
            factor, *decay = (cli.parse_value(where, value, float, ConfigError) for value in values)
            for value in (factor, *decay):
                cli.check_range(where, value, 0.0, None, ConfigError)
            read[name] = factor, (decay[0] if decay else None)
        return read
