"""The scan's bench: its table on this machine, the arithmetic of its columns, and its rows of peers."""

import importlib.util
import json

import numpy as np
import pytest

from pallas_kernels import bench, bench_peers

TINY = bench.Shape(1, 96, 2, 16, 32, 1)
LABELS = {'shape': '1p3b_g8', 'implementation': 'xla', 'direction': 'forward'}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, 'tiny', TINY)
    monkeypatch.setitem(bench.SHAPES, 'token', TINY._replace(L=1))


def test_table(tiny, tmp_path, capsys):
    """A row for each shape, direction and implementation, with the error against float32, printed and written."""
    out = tmp_path / 'bench.json'
    flags = ['--shapes=tiny,token', '--implementations=xla,mosaic_gpu', '--directions=forward+backward', '--seconds=0']
    bench.main(['--target=cpu', *flags, f'--output={out}'])
    rows = json.loads(out.read_text())['rows']
    assert [(r['shape'], r['direction'], r['implementation']) for r in rows] == [
        ('tiny', 'forward+backward', 'xla'), ('tiny', 'forward+backward', 'mosaic_gpu'), ('token', 'forward', 'step'),
    ]  # fmt: skip
    for row in rows:
        if row['implementation'] == 'mosaic_gpu':
            assert row['failed'].startswith("implementation='mosaic_gpu' cannot serve this call: P=16 and N=32")
            continue
        assert row['ms'] > 0 and 1e-5 < row['error'] < 1e-2, row  # bfloat16's
        least_bytes, flops = bench.least_work(bench.SHAPES[row['shape']], row['direction'])
        np.testing.assert_allclose(
            [row['gb_s'], row['tflop_s']], [least_bytes / row['ms'] / 1e6, flops / row['ms'] / 1e9]
        )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[1].split()[:3] == ['shape', 'implementation', 'direction'] and 'cannot serve' in lines[3]


def test_shares_of_both_rooflines(monkeypatch):
    """A time of twice what the bytes take at the bandwidth is half of it, whatever share of the peak that is."""
    bandwidth, peak = bench.ROOFLINE['gpu']
    least_bytes, flops = bench.least_work(bench.SHAPES['1p3b_g8'], 'forward')
    assert least_bytes / bandwidth > flops / peak
    out, ref = {'y': np.full(3, 1.5)}, {'y': np.full(3, 1.0)}
    row = bench.finish(LABELS, 'gpu', [2e3 * least_bytes / bandwidth] * 5, out, ref)
    np.testing.assert_allclose(
        [row['of_bandwidth'], row['of_peak'], row['error']], [0.5, 0.5 * flops / peak * bandwidth / least_bytes, 0.5]
    )
    assert ' 50.0% ' in bench.show(row) and row['worst'] == 'y'


def test_rounds():
    """As many calls as fill a round, but not more than MOST_CALLS; times are of one call."""
    asked = []

    def timed(calls, of_one):
        asked.append(calls)
        return calls * of_one

    for of_one, calls in ((bench.ROUND_MS / 7, 7), (1e-3, bench.MOST_CALLS), (5 * bench.ROUND_MS, 1)):
        asked.clear()
        times = bench.time_rounds(lambda n, of_one=of_one: timed(n, of_one), 0)
        assert asked == [1] + [calls] * 5
        np.testing.assert_allclose(times, of_one)


@pytest.mark.parametrize(
    'installed, reason',
    [
        ((), 'not installed: pip install torch {}'),
        (('torch',), 'not installed: pip install {}'),
        (('fla', 'mamba_ssm'), 'not installed: pip install torch'),
    ],
)
@pytest.mark.parametrize('name', bench_peers.PEERS)
def test_a_peer_that_is_not_installed(name, installed, reason, monkeypatch):
    """Has a row with the reason, and nothing of it is imported."""
    monkeypatch.setattr(importlib.util, 'find_spec', lambda module: module if module in installed else None)
    row = bench.measure_peer(LABELS | {'implementation': name}, 'gpu', 0, [], {})
    assert row['failed'] == reason.format(bench_peers.PEERS[name])
    assert bench.show(row).endswith('failed: ' + row['failed'])


def test_a_peer_that_fails(monkeypatch):
    """Costs its row and not the table."""

    def prepare(*arguments):
        raise ImportError('no kernel image\nis available')

    monkeypatch.setattr(bench_peers, 'missing', lambda name: '')
    monkeypatch.setattr(bench_peers, 'prepare', prepare)
    row = bench.measure_peer(LABELS | {'implementation': 'fla'}, 'gpu', 0, [], {})
    assert row['failed'] == 'ImportError: no kernel image'


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--target=cpu', '--shapes=huge'], "'huge' is unknown; use one of 1p3b_g32"),
        (
            ['--target=cpu', '--implementations=fla'],
            "'fla' is unknown; use one of reference, xla, mosaic_tpu, mosaic_gpu",
        ),
        (['--target=cpu', '--directions=back'], "'back' is unknown; use one of forward, forward+backward"),
        (['--target=gpu'], '--target=gpu, but JAX runs on cpu; set JAX_PLATFORMS or the target'),
    ],
)
def test_refuses(flags, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(flags)
    assert message in capsys.readouterr().err
