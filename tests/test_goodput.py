"""Where the time of a run went, what it is doing, and what is noticed when it does not get on."""

import json

import pytest
from small import small_config

from transxssm_jax.config import ConfigError, replace
from transxssm_jax.training import goodput, phases, watchdog


@pytest.fixture
def clock(monkeypatch):
    """A time that passes when a test says so; time.time() and time.monotonic() go alike."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(phases.time, 'monotonic', clock)
    monkeypatch.setattr(goodput.time, 'time', clock)
    return clock


def spend(clock, seconds):
    clock.now += seconds


# ---- phases --------------------------------------------------------------------


def test_every_second_is_of_one_phase(clock):
    doing = phases.Phases()
    spend(clock, 3)
    with doing.within('compile'):
        spend(clock, 10)
    doing.begin('steps')
    for step in range(1, 11):
        with doing.within('input'):
            spend(clock, 1)
        spend(clock, 4)
        doing.took_step(step)
        if step == 5:
            with doing.within('evaluation'):
                spend(clock, 100)
                with doing.within('save'):
                    spend(clock, 7)
    seconds = doing.seconds()
    assert {name: value for name, value in seconds.items() if value} == {
        'start': 3,
        'compile': 10,
        'steps': 40,
        'input': 10,
        'evaluation': 100,
        'save': 7,
    }
    assert doing.usual_step_seconds() == 5 and doing.name == 'steps' and doing.step == 10
    doing.forget_steps()
    assert doing.usual_step_seconds() is None


def test_a_phase_that_fails_ends(clock):
    doing = phases.Phases()
    with pytest.raises(ZeroDivisionError), doing.within('save'):
        1 / 0  # noqa: B018
    assert doing.name == 'start'


# ---- goodput -------------------------------------------------------------------


def one_start(clock, tmp_path, step, steps, saves_at=(), seconds_each=10.0):
    doing = phases.Phases()
    spend(clock, 20)
    found = goodput.Goodput(tmp_path, doing, step)
    doing.begin('steps')
    for number in range(step + 1, step + steps + 1):
        spend(clock, seconds_each)
        doing.took_step(number)
        if number in saves_at:
            found.mark(number)
    found.record()
    return found, doing


def test_steps_that_are_taken_again_are_lost(clock, tmp_path):
    one_start(clock, tmp_path, 0, 7, saves_at=[4])  # killed after step 7
    spend(clock, 50)  # nobody starts it
    found, doing = one_start(clock, tmp_path, 4, 6, saves_at=[8])
    assert found.starts == 2
    assert {name: value for name, value in found.seconds().items() if value} == {
        'steps': 100,
        'lost': 30,
        'start': 40,
        'waiting': 50,
    }
    assert found.record()['goodput'] == pytest.approx(100 / 220) and found.record()['time/lost'] == 30
    assert found.describe() == 'goodput 45.5% of 220 s in 2 starts: waiting 22.7%, start 18.2%, lost 13.6%'
    found.went_back(8)  # within a start
    assert found.seconds()['steps'] == 80 and found.seconds()['lost'] == 50
    found.went_back(0)
    assert found.seconds()['steps'] == 0 and found.seconds()['lost'] == 130


@pytest.mark.parametrize(
    'content', [b'', b'{', b'[]', b'{"seconds": {}}', b'\xff', b'[' * 100_000, b'{"seconds": {"steps": NaN}}']
)
def test_a_damaged_file_counts_anew(clock, tmp_path, content, caplog):
    (tmp_path / goodput.FILE).write_bytes(content)
    found, _ = one_start(clock, tmp_path, 4, 2)
    assert found.seconds()['steps'] == 20 and found.seconds()['lost'] == 0 and found.starts == 1
    assert 'goodput counts from here' in caplog.messages[0]
    assert json.loads((tmp_path / goodput.FILE).read_text())['seconds']['steps'] == 20


def test_a_file_that_cannot_be_written_is_no_reason_to_end(clock, tmp_path, caplog):
    found, _ = one_start(clock, tmp_path / 'gone', 0, 2)
    found.record()
    assert [message for message in caplog.messages if 'cannot be written' in message] == caplog.messages[:1]


# ---- watchdog ------------------------------------------------------------------


class Told:
    """What a watchdog asks for."""

    def __init__(self, clock, **settings):
        self.phases, self.asked, self.ended = phases.Phases(), [], []
        self.dog = watchdog.Watchdog(
            small_config(**settings), self.phases, self.asked.append, lambda *end: self.ended.append(end)
        )
        self.phases.begin('steps')
        for step in range(1, 21):
            spend(clock, 2.0)
            self.phases.took_step(step)


@pytest.fixture(autouse=True)
def dumps(monkeypatch):
    made = []
    monkeypatch.setattr(watchdog.faulthandler, 'dump_traceback', lambda **how: made.append(how))
    return made


def test_a_step_of_many_times_the_median_is_warned_of_once(clock, caplog, dumps):
    told = Told(clock, train_watchdog_seconds=1.0)
    assert told.dog.limit_seconds() == 40
    for seconds in (39, 41, 60, 200):
        told.dog.look(clock.now + seconds)
    [message] = caplog.messages
    assert message.startswith('step 21: waiting for the devices to finish step 21, or a collective of it that another')
    assert 'for 41.0 s; a step takes 2 s as a rule' in message
    assert dumps == [dict(file=2, all_threads=True)] and not told.asked and not told.ended
    spend(clock, 200)
    told.phases.took_step(21)  # it went on, and the next one hangs too
    told.dog.look(clock.now + 41)
    assert len(caplog.messages) == 2


def test_what_takes_as_long_as_it_takes_is_not_watched(clock, caplog):
    told = Told(clock, train_watchdog_seconds=1.0)
    for name in ('compile', 'restore', 'save', 'end', 'start'):
        with told.phases.within(name):
            told.dog.look(clock.now + 10_000)
    assert not caplog.messages
    with told.phases.within('evaluation'):
        told.dog.look(clock.now + 41)
        assert 'a batch of the evaluation after step 20' in caplog.messages[0]
        spend(clock, 41)
        told.phases.beat()
        told.dog.look(clock.now + 39)
    assert len(caplog.messages) == 1


def test_short_steps_have_a_least_limit_and_the_first_ones_a_wide_one(clock, caplog):
    told = Told(clock)
    assert told.dog.limit_seconds() == 60
    told.phases.forget_steps()
    assert told.dog.limit_seconds() == 600


def test_a_hung_step_is_asked_to_stop_and_then_ended(clock):
    told = Told(clock, train_watchdog_action='stop')
    told.dog.look(clock.now + 61)
    assert told.asked == [75] and not told.ended
    told.dog.look(clock.now + 119)
    assert not told.ended
    told.dog.look(clock.now + 121)
    [(code, message)] = told.ended
    assert code == 69 and message.startswith('step 21: waiting for the devices') and '\n' not in message


def test_a_straggling_host_is_named_once(caplog):
    pace = watchdog.Pace()
    assert pace.slowest({0: 0.1, 1: 0.12, 2: 0.11}, 1.0) == ''
    line = pace.slowest({0: 0.1, 1: 0.8, 2: 0.11}, 1.0)
    assert line.startswith('process 1 keeps the others waiting: of a step of 1 s it spends 0.8 s on its input')
    assert pace.slowest({0: 0.1, 1: 0.8, 2: 0.11}, 1.0) == '', 'not at every record'
    assert 'process 2' in pace.slowest({0: 0.1, 1: 0.1, 2: 0.9}, 1.0)
    assert pace.slowest({0: 0.5}, 1.0) == ''
    assert pace.compare(0.5, 1.0, 2) == '', 'one process keeps nobody waiting'


def test_settings_that_need_each_other():
    with pytest.raises(ConfigError, match='need each other'):
        replace(small_config(), {'train.checkpoint_local_dir': '/scratch'})
    with pytest.raises(ConfigError, match="'rollback' needs train.max_spikes of at least 1.*goes back again and again"):
        replace(small_config(), {'train.spike_action': 'rollback'})


def test_no_watchdog_where_it_is_off(clock):
    dog = watchdog.Watchdog(small_config(train_watchdog_factor=0.0), phases.Phases(), None)
    dog.start()
    dog.close()
