"""Training, sampling and measuring from Python: a config, and a Trainer that holds everything else.

    import transxssm_jax as tx

    config = tx.load_config('tiny', {'data.path': 'runs/demo/data', 'train.steps': 20, 'optimizer.warmup_steps': 5})
    trainer = tx.Trainer(config)
    losses = [metrics['loss'] for metrics in trainer.train()]
    print(trainer.evaluate()['loss'], trainer.sample('def '))

Nothing here is global: any number of trainers live side by side in one process. docs/library.md shows more.
"""

import contextlib
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from transxssm_jax import cli, settings
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.data import prepare as prepare_lib
from transxssm_jax.data.loader import Loader
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.inference.generator import Generator
from transxssm_jax.inference.generator import sample as sample_text
from transxssm_jax.parallel import mesh
from transxssm_jax.planning.fitting import fit
from transxssm_jax.training import checkpoint, compilation, elastic, health, lease, run_directory, splits
from transxssm_jax.training import step as step_lib
from transxssm_jax.training.batch_order import BatchOrder
from transxssm_jax.training.checkpoint_files import CheckpointError
from transxssm_jax.training.evaluators import HeldOutLoss


def load_config(path: str | pathlib.Path, overrides: dict[str, Any] | None = None) -> Config:
    """A config file's settings, changed, checked and locked.

    Args:
      path: a config file, or the name of one that comes with this project: 'tiny', '30m', 'pods/1p3b_v5e_256'.
      overrides: dotted name -> value, e.g. {'model.d_model': 512}.

    Raises:
      ConfigError: no such file, an unknown name, a wrong type, or a combination that cannot work.
    """
    return config_lib.load(path, overrides)


def prepare(
    output: str | pathlib.Path,
    *sources: str | pathlib.Path,
    split: str = 'train',
    tokenizer: str | pathlib.Path = 'byte',
    **flags: Any,
) -> pathlib.Path:
    """Prepares one split of text, as `python -m transxssm_jax.data.prepare` does, and returns its directory.

    A split that is there already is left alone.

    Args:
      output: directory of the prepared data; other splits that it holds stay.
      sources: text, jsonl or parquet files, directories and patterns.
      split: 'train', 'validation', ...
      tokenizer: 'byte', or a tokenizers JSON file.
      flags: further flags of the command by name, e.g. text_field='body'.

    Raises:
      DataError: a source that is not there or not what it should be, or a split of other text in the same place.
      UsageError: a flag that the command does not have, or a value that it does not take.
    """
    given = {'output': output, 'split': split, 'tokenizer': tokenizer, 'num_workers': 1} | flags
    words = [f'--{name}={value}' for name, value in given.items()] + [f'--source={source}' for source in sources]
    prepare_lib.prepare_split(prepare_lib.COMMAND.parse(words))
    return pathlib.Path(output).expanduser()


class Trainer:
    """A model in training on the devices of this process: its state, its data, and what is done with them.

    It takes the same steps on the same batches as `python -m transxssm_jax.train` with the same config, and a workdir that one
    of them saved is one that the other goes on with. It writes nothing of its own accord, and watches for no spikes.

    Args:
      config: settings; data.path or data.sources names prepared data.
      batches: dicts of int32 arrays [global_batch, seq_len] to train on in place of prepared data: tokens, targets
        (loss.IGNORED where none is learned), segment_ids and positions.

    Attributes:
      config: settings. Once a step is compiled, they leave nothing open (model.remat='auto' and the like).
      mesh: of all devices, as config.mesh asks for.
      state: {'step', 'params', 'opt_state'}, nested dicts of arrays. A step reuses its memory: copy what is to be kept.
      step: steps taken.

    Raises:
      ConfigError, DataError: data that is not there, or settings that do not fit it or the devices.
    """

    def __init__(self, config: Config, batches: Iterable[dict[str, np.ndarray]] | None = None):
        self._begin(config, batches)
        self.state = step_lib.create_state(config, self.mesh)

    def _begin(self, config: Config, batches) -> None:
        self.config, self.mesh, self.step = config, mesh.build(config), 0
        if batches is None:
            splits.check_data(config)
        self._batches: Iterator[dict] | None = None if batches is None else iter(batches)
        self._loader: Loader | None = None
        self._order = BatchOrder()
        self._train_step: Callable | None = None
        self._eval_step: Callable | None = None
        self._eval_loss: tuple[int, float] | None = None  # the newest, and the step of it

    @classmethod
    def open(
        cls,
        workdir: str | pathlib.Path,
        changes: dict[str, Any] | None = None,
        batches: Iterable[dict[str, np.ndarray]] | None = None,
    ) -> 'Trainer':
        """The run in a workdir at its newest checkpoint.

        Args:
          workdir: of `save` or of the train command.
          changes: dotted name -> value of settings that the checkpoint is not bound to, e.g. {'train.steps': 2000}.
          batches: see the class.

        Raises:
          CheckpointError: there is no checkpoint that can be read, or the changes do not fit it, or the data is other data.
        """
        workdir = pathlib.Path(workdir).expanduser()
        config = config_lib.replace(checkpoint.load_config(workdir), changes or {})
        trainer = cls.__new__(cls)
        trainer._begin(config, batches)
        checkpoints = checkpoint.Checkpoints(workdir, config)
        with contextlib.closing(checkpoints):
            restored = checkpoints.restore(step_lib.abstract_state(config, trainer.mesh))
        if restored is None:
            raise CheckpointError(f'{workdir} has no checkpoint')
        trainer.step, trainer.state, position = restored
        trainer._order = BatchOrder.of(position)
        if batches is None:
            loader = trainer._opened_loader()
            splits.check_position(config, loader, trainer.step, position, workdir)
        return trainer

    @property
    def params(self) -> dict:
        """The parameters: nested dicts of float32 arrays, those of the layers stacked [periods, layers of a kind, ...]."""
        return self.state['params']

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer of the training data."""
        return load_tokenizer(self.config.data.tokenizer_path)

    def train(self, steps: int = 0) -> Iterator[dict[str, float]]:
        """Takes steps, and yields the metrics of each once it is taken.

        Args:
          steps: how many; 0: all that train.steps leaves. Fewer are taken where the loop over them ends, or the batches.

        Yields:
          'step'; 'loss' (nats per token); 'tokens' (counted); 'grad_norm', 'update_norm' and 'param_norm';
          'learning_rate'.

        Raises:
          ConfigError: steps is less than 0.
          DoesNotFitError: a step needs more memory than the devices have.
          NotFiniteError: the loss or a gradient is not finite.
        """
        cli.check_range('steps', steps, 0, error=config_lib.ConfigError)
        last = self.step + steps if steps else self.config.train.steps
        batches = self._opened_loader() if self._batches is None else self._batches
        train_step = self._train_step or self._compiled()
        for batch in itertools.islice(batches, max(last - self.step, 0)):
            with jax.set_mesh(self.mesh):
                self.state, metrics = train_step(self.state, self._on_devices(batch))
            self.step += 1
            norms = metrics.pop('grad_norms')
            scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
            health.check_finite(self.step, scalars, norms)
            yield {'step': self.step, **scalars}

    def evaluate(self, split: str = '', batches: int = 0) -> dict[str, float]:
        """The held-out loss now.

        Args:
          split: of the prepared data; '': the first of data.eval_splits.
          batches: most batches to read; 0: train.eval_batches, and all where that is 0 too.

        Returns:
          'loss' (nats per token), 'perplexity' and 'bits_per_byte'.

        Raises:
          ConfigError: batches is less than 0.
          DataError: there is no such split.
        """
        cli.check_range('batches', batches, 0, error=config_lib.ConfigError)
        chosen = split or next(iter(splits.eval_splits(self.config)), 'validation')
        with jax.set_mesh(self.mesh):
            eval_step = self._eval_step or compilation.jit_eval_step(self.config, self.mesh)
        self._eval_step = eval_step
        evaluator = HeldOutLoss(
            functools.partial(splits.open_eval_split, self.config, self.mesh, chosen),
            lambda params, batch: eval_step(params, self._on_devices(batch)),
            max_batches=batches or self.config.train.eval_batches,
            prefixes=[''],
        )
        with jax.set_mesh(self.mesh):
            values = dict(evaluator.run(step_lib.evaluated_weights(self.config, self.state)))
        if not split and not batches:  # one that can be compared with those of other steps
            self._eval_loss = self.step, values['loss']
        return values

    def sample(self, prompt: str = '', max_tokens: int = 100, *, temperature: float = 0.8, seed: int = 0) -> str:
        """The prompt and its continuation. For many prompts, see `generator`.

        Raises:
          InputError: max_tokens < 1 or temperature < 0.
        """
        with jax.set_mesh(self.mesh):
            return sample_text(
                self.params,
                self.config,
                self.tokenizer,
                prompt=prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
            )

    def generator(self, **settings: Any) -> Generator:
        """A `Generator` of the parameters as they are now, on the first device; settings are its own."""
        params = jax.device_get(self.params)
        return Generator(params, self.config, self.tokenizer, **settings)

    def save(self, workdir: str | pathlib.Path) -> pathlib.Path:
        """Writes a checkpoint into a workdir, new or of this run, for `open` and for every command.

        The loss of `evaluate()`, where it was called after the last step and without arguments, goes with it.

        Raises:
          CheckpointError: the workdir holds another run, or another checkpoint of this step, is in use by a run, or cannot be
            written.
        """
        workdir = pathlib.Path(workdir).expanduser()
        with lease.hold(workdir):
            run_directory.open_workdir(workdir, self.config)
            checkpoints = checkpoint.Checkpoints(workdir, self.config)
            with contextlib.closing(checkpoints):
                if self.step not in checkpoints.steps():
                    loss = self._eval_loss[1] if self._eval_loss and self._eval_loss[0] == self.step else None
                    checkpoints.save(self.step, self.state, self._position(), loss)
                    checkpoints.wait()
                elif not self._is_saved(workdir):
                    raise CheckpointError(
                        f'{workdir} has a checkpoint of step {self.step} with other parameters; name another workdir'
                    )
        return workdir

    def _is_saved(self, workdir: pathlib.Path) -> bool:
        """Whether the checkpoint of this step holds these parameters: that of a run on other batches, say, does not."""
        abstract = {'params': step_lib.abstract_state(self.config, self.mesh)['params']}
        saved, _, _ = checkpoint.read_whole(workdir / 'checkpoints' / str(self.step), self.config, abstract)
        pairs = zip(jax.tree.leaves(saved['params']), jax.tree.leaves(self.params), strict=True)
        return all(bool(jax.numpy.array_equal(a, b)) for a, b in pairs)

    def close(self) -> None:
        """Ends the threads that read ahead. A trainer that is dropped needs no call."""
        if self._loader is not None:
            self._loader.close()
            self._loader = self._batches = None

    def _opened_loader(self) -> Loader:
        if self._loader is None:
            self._loader = self._open_loader()
            self._batches = self._loader
        return self._loader

    def _compiled(self) -> Callable:
        config = config_lib.replace(self.config, {'train.spike_action': 'none'})
        compile_step = functools.partial(compilation.compile_train_step, device_mesh=self.mesh)
        with jax.set_mesh(self.mesh):
            fitted = fit(config, self.mesh, compile_step)
        assert fitted.step is not None
        self.config, self._train_step = fitted.config, fitted.step
        return fitted.step

    def _on_devices(self, batch: dict) -> dict:
        return mesh.global_batch(self.mesh, batch, self.config.data.global_batch)

    def _open_loader(self) -> Loader:
        return splits.open_train_split(self.config, self.mesh, self._order.batch(self.step + 1))

    def _position(self) -> dict:
        with contextlib.ExitStack() as stack:
            loader = self._loader
            if loader is None and self.config.data.tokenizer_path:
                loader = stack.enter_context(contextlib.closing(self._open_loader()))
            if loader is None:  # batches of the caller's own, which stand nowhere
                return {'next_step': self.step, 'split': self.config.data.train_split}
            position = splits.data_position(self.config, loader, self.step, self._order)
        return position | self._order.saved() | elastic.saved(self.config, self.mesh)


def shipped_configs() -> list[str]:
    """Names of the configs that come with this project, for `load_config`."""
    folder = settings.shipped()
    return sorted(
        str(path.relative_to(folder).with_suffix('')) for path in folder.rglob('*.py') if 'sweeps' not in path.parts
    )
