"""Settings of what watches over a run: spikes, stalls, the health of its layers, trackers, and checkpoints besides the usual.

They are settings of the section `train` (config.py).
"""

import dataclasses

from transxssm_jax.settings import Section, setting, words


@dataclasses.dataclass
class Watch(Section):
    spike_action: str = setting(
        'none',
        "What is done on a spike of the loss or the gradient norm: nothing but a warning, which names the step; 'skip': its "
        "update is not applied either, nor that of a step that is not finite; 'rollback': the run goes back "
        'train.rollback_steps steps and leaves their batches out.',
        choices=('none', 'skip', 'rollback'),
    )
    rollback_steps: int = setting(
        16, "Steps from a spike back to the state that spike_action='rollback' goes on from.", minimum=1
    )
    spike_threshold: float = setting(
        6.0,
        'Robust standard deviations of the logarithm above the median of the steps before at which a value is a spike.',
        minimum=1.0,
    )
    spike_window: int = setting(
        128, 'Steps whose median and spread a step is compared with.', minimum=8, maximum=1 << 12
    )
    max_spikes: int = setting(
        0, 'Most spikes among the last train.spike_window steps; one more ends the run. 0: any number.', minimum=0
    )
    health_every_steps: int = setting(
        0, 'Steps between records of the health of the layers in health.jsonl; 0: none.', minimum=0
    )
    watchdog_factor: float = setting(
        20.0,
        'A step, or a batch that is waited for, that takes longer than this times the median step, and than '
        'train.watchdog_seconds, is warned of, with the stacks of all threads. 0: no watchdog.',
        minimum=0.0,
    )
    watchdog_seconds: float = setting(
        60.0, 'Shortest time that the watchdog warns of; ten times this while there are few steps.', minimum=0.0
    )
    watchdog_action: str = setting(
        'warn',
        "What the watchdog does: it warns; 'stop': it ends the run too, after saving where that is possible.",
        choices=('warn', 'stop'),
    )
    checkpoint_local_dir: str = setting(
        '',
        'Directory on the own disk of every host for checkpoints beside those of the workdir; a restart prefers them where '
        'they are newer and every host has them whole. Empty: none.',
        is_path=True,
    )
    checkpoint_local_every_steps: int = setting(
        0, 'Steps between checkpoints in train.checkpoint_local_dir.', minimum=0
    )
    keep_every_steps: int = setting(
        0, 'A checkpoint whose step is a multiple of this is kept for good; 0: none is.', minimum=0
    )
    trackers: str = setting('', "Services that get the metrics too, of 'wandb' and 'mlflow', with commas between.")

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The services of `trackers`. ConfigError: an unknown one."""
        return words('train.trackers', self.trackers, ('wandb', 'mlflow'))
