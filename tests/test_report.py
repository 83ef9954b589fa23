"""Runs beside each other: what is read, what is refused, and that the page shows what the records hold."""

import html.parser
import json
import re

import pytest

from transxssm_jax import config as config_lib
from transxssm_jax import report
from transxssm_jax.config import Config, Model, Optimizer, Train
from transxssm_jax.evals import charts
from transxssm_jax.evals.run_evaluations import evaluations_of
from transxssm_jax.evals.run_records import RunError, read_run, read_runs, repeats

STEPS = 40


def write_run(folder, *, metrics=('loss', 'learning_rate', 'grad_norm', 'tokens_per_second', 'step_seconds'), height=4.0,
              steps=STEPS, fingerprint='', **settings):  # fmt: skip
    """A workdir as train leaves it."""
    config = config_lib.replace(
        Config(
            model=Model(num_layers=8),
            optimizer=Optimizer(warmup_steps=4),
            train=Train(steps=STEPS, eval_every_steps=20, log_every_steps=10),
        ),
        {name.replace('__', '.'): value for name, value in settings.items()},
    )
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(config_lib.to_json(config))
    lines = []
    for step in range(10, steps + 1, 10):
        values = dict.fromkeys(metrics, 2.0) | ({'loss': height - step / 100} if 'loss' in metrics else {})
        lines.append({'step': step, **values, 'tokens': step * config.tokens_per_step, 'seconds': step * 0.5})
        if step % 20 == 0 and 'loss' in metrics:
            loss = height + 0.1 - step / 100
            lines.append({'step': step, 'eval_loss': loss, 'eval_perplexity': 2.0**loss, 'eval/validation/loss': loss})
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + '{"step": 5, "lo')
    if fingerprint:
        (folder / 'checkpoints' / '40').mkdir(parents=True)
        (folder / 'checkpoints' / '40' / 'data.json').write_text(json.dumps({'fingerprint': fingerprint}))
    return folder


class Page(html.parser.HTMLParser):
    """Checks that elements are closed, and collects what would be loaded from elsewhere."""

    VOID = {'meta', 'line', 'rect', 'polyline', 'circle', 'link', 'img'}

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ('src', 'href') or 'http' in (value or '')]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def run(capsys, *arguments):
    code = report.main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def test_a_report_of_three_runs(tmp_path, capsys):
    write_run(tmp_path / 'a' / 'seed-0')
    write_run(tmp_path / 'a' / 'seed-1', height=4.1, train__seed=1, data__seed=1, model__remat='full')
    write_run(tmp_path / 'b' / 'seed-0', height=3.5, model__pattern='mamba2')
    runs = [tmp_path / 'a' / 'seed-0', tmp_path / 'a' / 'seed-1', tmp_path / 'b' / 'seed-0']
    code, out, err = run(capsys, f'--output={tmp_path / "out"}', '--title=A <b> & c', *runs)
    assert (code, err) == (0, '')
    text = (tmp_path / 'out' / 'report.html').read_text()
    page = Page(text)
    assert page.loads == [] and 'A &lt;b&gt; &amp; c' in text and 'url(http' not in text and '@import' not in text
    # Loss by tokens and by time, throughput, learning rate, gradient norm, one split; each with a line per run.
    assert text.count('role="img"') == 6 and text.count('<polyline') == 18
    assert {'a/seed-0', 'a/seed-1', 'b/seed-0'} <= set(re.findall(r'<td>([\w/-]+)</td>', text))
    assert 'model.pattern' in text and 'train.seed' in text
    # Repeats have one color, and another line.
    colors = re.findall(r'stroke="var\(--(c\d)\)"(?: stroke-dasharray="([\d ]+)")?', text)[:3]
    assert [color for color, _ in colors] == ['c0', 'c0', 'c1'] and colors[0][1] == '' != colors[1][1]
    made = {path.name for path in (tmp_path / 'out').iterdir()}
    assert {'report.html', 'report.md', 'loss_by_tokens.png', 'loss_by_time.png', 'learning_rate.png'} <= made
    assert (tmp_path / 'out' / 'loss_by_tokens.png').read_bytes().startswith(b'\x89PNG')
    table = (tmp_path / 'out' / 'report.md').read_text()
    assert '| b/seed-0 | 83,886,080 | 3.1000 | 3.2000 |' in table and table in table and '| model.pattern |' in table
    assert '| b/seed-0 |' in out


@pytest.mark.parametrize(
    'first, second, arguments, message',
    [
        ({}, dict(optimizer__learning_rate=1e-3), (), 'optimizer.learning_rate is 0.0002 in a and 0.001 in b'),
        ({}, dict(data__seq_len=2048), (), 'data.seq_len is 4096 in a and 2048 in b'),
        (dict(fingerprint='x'), dict(fingerprint='y'), (), "data.path is 'data x' in a and 'data y' in b"),
        ({}, {}, ('--compared=modle',), '--compared=modle is no setting and no section; did you mean model?'),
        (dict(metrics=('loss',)), dict(metrics=('other',)), (), 'a, b have no metric in common'),
        ({}, dict(model__d_mlp=64), ('--compared=optimizer',), 'model.d_mlp is 6144 in a and 64 in b'),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path, capsys, first, second, arguments, message):
    runs = write_run(tmp_path / 'a', **first), write_run(tmp_path / 'b', **second)
    code, out, err = run(capsys, f'--output={tmp_path / "out"}', *arguments, *runs)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and out == ''
    assert not (tmp_path / 'out').exists()


def test_other_differences_can_be_allowed(tmp_path, capsys):
    runs = write_run(tmp_path / 'a'), write_run(tmp_path / 'b', optimizer__learning_rate=1e-3)
    assert run(capsys, f'--output={tmp_path / "1"}', '--compared=optimizer.learning_rate', *runs)[0] == 0
    assert run(capsys, f'--output={tmp_path / "2"}', '--allow', *runs)[0] == 0
    page = (tmp_path / '2' / 'report.html').read_text()
    assert 'Not alike: optimizer.learning_rate is 0.0002 in a' in page and '--allow' not in page
    code, _, err = run(capsys, f'--output={tmp_path / "none"}', '--allow', '--compared=optimiser', *runs)
    assert code == 2 and '--compared=optimiser is no setting' in err
    # The same data from two places, and settings of speed, are no difference.
    alike = [
        write_run(tmp_path / name, fingerprint='x', data__path=f'/{name}', mesh__data=size)
        for name, size in (('c', 1), ('d', 2))
    ]
    assert run(capsys, f'--output={tmp_path / "3"}', *alike)[0] == 0
    # So is a run that has no checkpoint yet, on data that another run names.
    begun = write_run(tmp_path / 'e', data__path='/d')
    assert run(capsys, f'--output={tmp_path / "4"}', *alike, begun)[0] == 0
    assert len(repeats(read_runs([*alike, begun]))) == 1


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((), 'no RUN is given'),
        (('--workdir=a',), 'RUN is given without a flag'),
        (('nowhere',), 'nowhere is no run'),
        (('empty',), 'has no records in metrics.jsonl'),
        (('a', 'a'), 'is given twice'),
        (('a', '--output=a'), '--output=a exists'),
    ],
)
def test_wrong_input_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'a')
    write_run(tmp_path / 'empty', steps=0)
    code, out, err = run(capsys, '--output=out', *arguments)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and out == ''


def test_a_run_is_read_as_it_stands(tmp_path):
    write_run(tmp_path / 'a', steps=20)
    found = read_run(tmp_path / 'a')
    assert not found.is_finished and len(found.training) == 2 and found.last('loss') == pytest.approx(3.8)
    assert found.series('eval_loss', 'seconds') == [(10.0, pytest.approx(3.9))]
    assert read_run(write_run(tmp_path / 'b')).is_finished
    (tmp_path / 'a' / 'config.json').write_text('{"model": 3}')
    with pytest.raises(RunError, match='config.json'):
        read_run(tmp_path / 'a')


def test_evaluations_of_a_run_are_those_of_the_newest_step_of_each_command(tmp_path, capsys):
    folder = write_run(tmp_path / 'a') / 'evals'
    folder.mkdir()
    parts = [{'from': 0, 'to': 32, 'perplexity': 9.0}, {'from': 32, 'to': 64, 'perplexity': 8.0}]
    by_position = {'rope_scaling': 'none', 'length': 64, 'perplexity': 8.5, 'buckets': parts}
    other = by_position | {'rope_scaling': 'linear', 'length': 128}
    files = {
        'perplexity-step-9-2026-02.json': {'results': [by_position | {'perplexity': 1.0}]},
        'perplexity-step-40-2026-01.json': {'results': [by_position, other]},
        'perplexity-step-41-2026-01.json': {'other': 1},
        'harness-step-40-2025-01.json': {'results': {'piqa': {'acc,none': 0.5}, 'arc_easy': {'acc,none': 0.25}}},
        'harness-step-9-2026-01.json': {'results': {'lambada': {'acc,none': 0.5}}},
        'harness-step-40-2026-01.json': {
            'results': {'piqa': {'acc,none': 0.625, 'acc_stderr,none': 0.1, 'alias': 'piqa'}}
        },
        'needle-step-40-2026-01/results.json': {
            'cells': [{'context_length': 512, 'chosen': value} for value in (0.5, 1.0)]
        },
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    assert evaluations_of(read_run(tmp_path / 'a')) == {
        'perplexity, 64 tokens': 8.5,
        'perplexity, 0 to 32 of 64': 9.0,
        'perplexity, 32 to 64 of 64': 8.0,
        'needle chosen, 512 tokens': 0.75,
        'piqa, acc': 0.625,
        'arc_easy, acc': 0.25,
    }
    write_run(tmp_path / 'b')
    assert run(capsys, f'--output={tmp_path / "out"}', tmp_path / 'a', tmp_path / 'b')[0] == 0
    assert '| piqa, acc | 0.625 | - |' in (tmp_path / 'out' / 'report.md').read_text()
    Page((tmp_path / 'out' / 'report.html').read_text())


def test_repeats_and_names(tmp_path):
    for name, settings in {'x/1': {}, 'x/2': dict(data__seed=3), 'y/1': dict(model__d_mlp=64)}.items():
        write_run(tmp_path / name, **settings)
    runs = read_runs([str(tmp_path / name) for name in ('x/1', 'x/2', 'y/1')])
    assert [run.name for run in runs] == ['x/1', 'x/2', 'y/1']
    assert [[run.name for run in group] for group in repeats(runs)] == [['x/1', 'x/2'], ['y/1']]


@pytest.mark.parametrize('low, high', [(0, 1), (2.31, 2.38), (0, 1.3e9), (-3, 5), (1e-6, 3e-4), (7, 7.0001)])
def test_ticks_are_few_and_within(low, high):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 7 and low - 1e-9 <= found[0] and found[-1] <= high * (1 + 1e-9) + 1e-12
    assert len({charts.label(tick) for tick in found}) == len(found) or high - low < 1e-3


def test_a_chart_of_one_point():
    chart = charts.Chart('a', 'a', 'x', 'y', [charts.Curve('a', [(3.0, 2.0)])])
    assert '<circle' in charts.svg(chart)
