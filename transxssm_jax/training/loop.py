"""One run in one workdir: restore or create, train, evaluate, save, stop."""

import contextlib
import functools
import hashlib
import math
import pathlib
import signal
import time

import jax

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.data.loader import check_vocab, make_loader
from transxssm_jax.data.manifest import read_index
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.model import costs, parameters
from transxssm_jax.parallel import mesh, processes
from transxssm_jax.training import checkpoint, lease, metrics, optimizer
from transxssm_jax.training import step as step_lib

FINISHED, CRASHED, WRONG_INPUT, NOT_FINITE, TERMINATED, INTERRUPTED = 0, 1, 2, 3, 75, 130


PROMPT_TOKENS = 128  # of the document that the sample at the end continues


class NotFiniteError(ArithmeticError):
    """The loss, gradient or update of a step is NaN or infinite."""


class StopRequest:
    """Remembers SIGTERM or Ctrl-C until the step in hand is done; a second Ctrl-C ends at once."""

    def __init__(self):
        self.exit_code = 0  # none

    def install(self) -> None:
        signal.signal(signal.SIGTERM, functools.partial(self._on_signal, TERMINATED))
        signal.signal(signal.SIGINT, functools.partial(self._on_signal, INTERRUPTED))

    def _on_signal(self, exit_code, signum, frame):
        self.exit_code = exit_code
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Run:
    """One run in one workdir: starts from its newest checkpoint, or anew, and trains to train.steps.

    Raises:
      ConfigError, DataError, checkpoint.CheckpointError: wrong input, said in one line.
    """

    def __init__(self, config: Config, workdir: pathlib.Path, stop: StopRequest, sample):
        self.config, self.workdir, self.stop, self.sample = config, workdir, stop, sample
        if not config.data.path:
            raise ConfigError(
                'data.path is empty; prepare data with python -m transxssm_jax.data.prepare and give '
                '--config.data.path=DIR'
            )
        self.mesh = mesh.build(config)
        check_vocab(config.data.path, config.model.vocab_size)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lease.hold(workdir))  # before anything is written there
            self._open(config, workdir)
            self._held = stack.pop_all()

    def _open(self, config: Config, workdir: pathlib.Path) -> None:
        checkpoint.open_workdir(workdir, config)
        self.checkpoints = checkpoint.Checkpoints(workdir, config)
        restored = self.checkpoints.restore(step_lib.abstract_state(config, self.mesh))
        self.step, self.state, position = restored or (0, None, None)
        self.loader = self._open_split(
            config.data.train_split,
            start_step=self.step,
            num_workers=config.data.num_workers,
            prefetch=config.data.prefetch_batches,
        )
        if position is not None and position != self._data_position():
            raise checkpoint.CheckpointError(
                f'data.path={config.data.path} is not what the run in {workdir} was trained on; '
                'point it to the same data or use another --workdir'
            )
        self._check_alike()
        if config.train.eval_every_steps and config.data.eval_split:
            self._open_split(config.data.eval_split, shuffle=False, repeat=False).close()  # a missing split is said now
        if self.state is None:
            self.state = step_lib.create_state(config, self.mesh)

        shardings, batch_sharding = step_lib.state_shardings(config, self.mesh), step_lib.batch_sharding(self.mesh)
        everywhere = mesh.sharding(self.mesh, ())  # numbers that every process reads
        self._train_step = jax.jit(
            step_lib.train_step(config),
            donate_argnums=0,
            in_shardings=(shardings, batch_sharding),
            out_shardings=(shardings, everywhere),
        )
        self._eval_step = jax.jit(
            step_lib.eval_step(config), in_shardings=(shardings['params'], batch_sharding), out_shardings=everywhere
        )
        self.writers = metrics.Writers(workdir, config, self.step)
        self.clock = metrics.Clock()
        self._attended = metrics.mean_attended(
            read_index(config.data.path, config.data.train_split), config.data.seq_len
        )
        self._unsettled = None  # (step, metrics) of the step that the devices may still be working on
        self._evaluated_at, self.eval_loss = -1, None
        self._preemption, self._stopping = processes.PreemptionSync(), 0  # exit code that all processes stop with

    def _open_split(self, split: str, **kwargs):
        rows = mesh.rows_of_this_process(self.mesh, self.config.data.global_batch)
        data = self.config.data
        return make_loader(
            data.path,
            split,
            **dict(seq_len=data.seq_len, global_batch=data.global_batch, seed=data.seed, rows=rows, verify=data.verify)
            | kwargs,
        )

    def _check_alike(self) -> None:
        """Every process must have been started with the same settings and see the same data."""
        own = {'settings': config_lib.to_json(self.config), 'data.path': self.loader.fingerprint}
        digests = {name: hashlib.sha256(str(value).encode()).hexdigest() for name, value in own.items()}
        everybody = processes.all_gather_json(digests)
        for name in own:
            others = [process for process, theirs in enumerate(everybody) if theirs[name] != everybody[0][name]]
            if others:
                raise ConfigError(
                    f'{name}: those of process {others[0]} are not those of process 0; start the same command '
                    'on every host, with the same files'
                )

    def _data_position(self) -> dict:
        return {'next_step': self.step, 'split': self.config.data.train_split, 'fingerprint': self.loader.fingerprint}

    # ---- the loop ----------------------------------------------------------

    def train(self) -> int:
        """Trains, evaluates and saves until train.steps or a stop request.

        Returns:
          The process's exit code.

        Raises:
          NotFiniteError: naming the step and the offending norms.
        """
        config, train = self.config, self.config.train
        if self.step >= train.steps:
            self.writers.say(f'already finished: step {self.step} of train.steps={train.steps}; raise it to go on')
        started, first = time.perf_counter(), self.step
        window_start = self.step
        with jax.set_mesh(self.mesh):
            self._compile_before_all_start()
            has_evaluation = processes.broadcast_from_0(self.writers.has_evaluation(self.step))
            if 0 < self.step < train.steps and self._evaluation_is_due() and not has_evaluation:
                self._evaluate()  # the run was stopped where this evaluation was due
                if self._evaluated_at == self.step:
                    self.checkpoints.evaluated(self.step, self.eval_loss)
            while self.step < train.steps and not self._told_to_stop():
                self.checkpoints.check(self._save_again)
                self._profile()
                with self.clock.input():
                    batch = next(self.loader)
                self.state, step_metrics = self._train_step(self.state, self._on_devices(batch))
                previous, self._unsettled = self._unsettled, (self.step + 1, step_metrics)
                self._check_finite(previous)  # while the devices work on the new step
                self.step += 1
                self.writers.advance()
                is_first = self.step == first + 1
                due = self.step % train.log_every_steps == 0 or self.step == train.steps
                if is_first or due:
                    step_metrics = self._settle()
                    if is_first:
                        self.writers.say(f'first step after {time.perf_counter() - started:.1f} s')
                    if due:
                        # The first step's time is compilation, which says nothing about speed.
                        self._log(step_metrics, 0 if is_first else self.step - window_start)
                    self.clock.restart()
                    window_start = self.step
                self._evaluate_and_save()
            self._finish_profile()
            if self._stopping:
                self._settle()
                if self.step:
                    self._save()
                    self.checkpoints.wait(self._save_again)
                    self.writers.say(f'stopped at step {self.step} and saved; the same command goes on from there')
                else:
                    self.writers.say('stopped before the first step; nothing was saved')
                return self._stopping
            self.checkpoints.wait(self._save_again)
            if config.data.eval_split and train.eval_every_steps and self._evaluated_at != self.step:
                self._evaluate()
                if self._stopping:
                    return self._stopping
            self._summarise()
        return FINISHED

    def _compile_before_all_start(self) -> None:
        """Where processes must start a program together, none starts before all have compiled it, which takes each its time."""
        if not processes.is_multiprocess():
            return
        data, state = self.config.data, step_lib.abstract_state(self.config, self.mesh)
        row = jax.ShapeDtypeStruct(
            (data.global_batch, data.seq_len), 'int32', sharding=step_lib.batch_sharding(self.mesh)
        )
        batch = dict.fromkeys(('tokens', 'targets', 'segment_ids', 'positions'), row)
        if self.step < self.config.train.steps:
            self._train_step = self._train_step.lower(state, batch).compile()
        if data.eval_split and self.config.train.eval_every_steps:
            self._eval_step = self._eval_step.lower(state['params'], batch).compile()
        processes.all_gather_json('compiled')

    def _told_to_stop(self) -> bool:
        """Whether all processes stop now. Called before every step and evaluation batch, as StopTogether asks."""
        self._stopping = self._stopping or self._preemption.should_stop(self.stop.exit_code)
        return bool(self._stopping)

    def _on_devices(self, batch: dict) -> dict:
        return mesh.global_batch(self.mesh, batch, self.config.data.global_batch)

    def _settle(self) -> dict:
        """Waits for the last step and returns its metrics."""
        unsettled, self._unsettled = self._unsettled, None
        self._check_finite(unsettled)
        return unsettled[1] if unsettled else {}

    def _check_finite(self, unsettled) -> None:
        if unsettled is None:
            return
        step, values = unsettled
        # The loss is of the parameters before the step; the update's norm tells whether they are still finite after it.
        watched = {name: float(values[name]) for name in ('loss', 'grad_norm', 'update_norm', 'param_norm')}
        if all(map(math.isfinite, watched.values())):
            return
        norms = {
            jax.tree_util.keystr(path, simple=True, separator='/'): jax.device_get(norm)
            for path, norm in jax.tree_util.tree_leaves_with_path(values['grad_norms'])
        }
        bad = [
            f'{name}{[list(map(int, i)) for i in zip(*(~jax.numpy.isfinite(norm)).nonzero())] if norm.ndim else ""}'
            for name, norm in norms.items()
            if not jax.numpy.isfinite(norm).all()
        ]
        raise NotFiniteError(
            f'step {step} is not finite: loss {watched["loss"]:.6g}, gradient norm {watched["grad_norm"]:.4g}, update norm '
            f'{watched["update_norm"]:.4g}, parameter norm before it {watched["param_norm"]:.4g}; gradients that are not '
            f'finite (module, layer): {"; ".join(bad) or "none"}; it was not saved: lower optimizer.learning_rate, or '
            'look at the data of this step'
        )

    def _evaluation_is_due(self) -> bool:
        train = self.config.train
        return bool(train.eval_every_steps and self.config.data.eval_split) and (
            self.step == train.steps or self.step % train.eval_every_steps == 0
        )

    def _evaluate_and_save(self) -> None:
        train = self.config.train
        evaluate = self._evaluation_is_due()
        save = self.step == train.steps or self.step % train.checkpoint_every_steps == 0
        if not (evaluate or save):
            return
        self._settle()
        with self.clock.away():
            if evaluate:
                self._evaluate()
            if save:
                self._save()

    def _evaluate(self) -> None:
        """Mean cross-entropy of the evaluation split, in nats a token; gives up when told to stop."""
        total, tokens = 0.0, 0.0
        # The first batches of a split in order would be of one source or book. Seed 0: the same sample whatever data.seed.
        loader = self._open_split(
            self.config.data.eval_split, shuffle=self.config.train.eval_batches > 0, seed=0, repeat=False
        )
        try:
            for count, batch in enumerate(loader, start=1):
                if self._told_to_stop():
                    return
                sums = self._eval_step(self.state['params'], self._on_devices(batch))
                total, tokens = total + float(sums['nll']), tokens + float(sums['tokens'])
                if count == self.config.train.eval_batches:
                    break
            self._evaluated_at, self.eval_loss = self.step, total / tokens
            self._eval_metrics = metrics.of_loss(self.eval_loss, metrics.targets_per_byte(loader), 'eval_')
            self.writers.write(self.step, self._eval_metrics)
            if self.step < self.config.train.steps:
                self.writers.say(f'step {self.step}: evaluation loss {self.eval_loss:.4f}')
        finally:
            loader.close()

    def _save(self) -> None:
        if self.step in processes.broadcast_from_0(
            self.checkpoints.steps()
        ):  # all save or none: a listing may come late to one
            return
        eval_loss = self.eval_loss if self._evaluated_at == self.step else None
        self.checkpoints.save(self.step, self.state, self._data_position(), eval_loss)

    def _save_again(self) -> None:
        self._settle()
        self._save()

    # ---- reporting ---------------------------------------------------------

    def announce(self) -> None:
        """Prints what this run is, before it starts."""
        say, config = self.writers.say, self.config
        changed = config_lib.differences(config, Config())
        say('settings that differ from the defaults:')
        for name, (value, default) in changed.items():
            say(f'  {name} = {value!r} (default {default!r})')
        devices = jax.devices()
        axes = ' x '.join(f'{name} {size}' for name, size in self.mesh.shape.items())
        say(
            f'{parameters.count_params(config.model):,} parameters; {config.tokens_per_step:,} tokens a step; '
            f'{len(devices)} x {devices[0].device_kind} as {axes}'
            + (f', {jax.process_count()} processes' if processes.is_multiprocess() else '')
        )
        say(
            f'{self.loader.num_documents:,} documents, {self.loader.num_tokens:,} tokens in '
            f'{config.data.path} ({config.data.train_split}); workdir {self.workdir}'
        )
        say(
            f'a token attends to {self._attended:,.0f} tokens on average, which mfu counts; mfu_packed_rows counts '
            f'{costs.row_attended(config.data.seq_len):,.0f}, as if one document filled every row'
        )
        if line := metrics.missing_mfu(devices[0]):
            say(line)
        if self.step:
            say(f'resuming from step {self.step}')
        if self.checkpoints.changed:
            say('changed since the checkpoint:')
            for name, (value, before) in self.checkpoints.changed.items():
                say(f'  {name} = {value!r} (was {before!r})')
            if self.step < config.train.steps:
                say(f'learning rate of the next step: {float(optimizer.schedule(config)(self.step)):.4g}')

    def _log(self, step_metrics: dict, steps: int) -> None:
        scalars = {
            name: float(value) for name, value in step_metrics.items() if name not in ('loss', 'tokens', 'grad_norms')
        }
        loss = metrics.of_loss(float(step_metrics['loss']), metrics.targets_per_byte(self.loader))
        rates = metrics.rates(self.config, steps, self.clock, self._attended) if steps else {}
        self.writers.write(self.step, {**loss, **scalars, **rates, **metrics.memory()})

    def _summarise(self) -> None:
        config = self.config
        self.writers.close()
        if config.train.sample_tokens and processes.is_multiprocess():
            self.writers.say(
                f'no sample: sampling takes one process; run python -m transxssm_jax.generate --workdir={self.workdir}'
            )
        elif config.train.sample_tokens:
            tokenizer = load_tokenizer(config.data.path)
            split = config.data.eval_split or config.data.train_split
            with self._open_split(split, shuffle=False, repeat=False) as loader:
                row = next(loader)
            prompt = tokenizer.decode(row['tokens'][0][row['segment_ids'][0] == 1][:PROMPT_TOKENS])
            text = self.sample(
                self.state['params'],
                config,
                tokenizer,
                prompt=prompt,
                seed=config.train.seed,
                num_tokens=config.train.sample_tokens,
            )
            print(
                f'--- from the {split} split ---\n{prompt}\n--- a sampled continuation ---\n{text[len(prompt) :]}\n---'
            )
        line = f'finished at step {self.step}'
        if self.eval_loss is not None:
            line += (
                f': evaluation loss {self.eval_loss:.4f} nats a token, '
                f'{self._eval_metrics["eval_bits_per_byte"]:.4f} bits a byte'
            )
        self.writers.say(line)

    def _profile(self) -> None:
        train = self.config.train
        if not processes.is_coordinator():
            return  # one host's trace shows what the others do too
        if train.profile_steps and self.step == train.profile_start_step:
            self._profiling = True
            jax.profiler.start_trace(str(self.workdir / 'profile'))
        elif train.profile_steps and self.step == train.profile_start_step + train.profile_steps:
            self._finish_profile()

    _profiling = False

    def _finish_profile(self) -> None:
        if self._profiling:
            self._settle()
            jax.profiler.stop_trace()
            self._profiling = False
            self.writers.say(f'profile written to {self.workdir / "profile"}')

    def close(self) -> None:
        """Ends threads and open files. A checkpoint that could not be written was said by wait or save."""
        self.writers.close()
        self.loader.close()
        with self._held, contextlib.suppress(checkpoint.CheckpointError):
            self.checkpoints.close()
