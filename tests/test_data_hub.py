"""Data sets of a hub: against a server on this machine that speaks the hub's paths, as a mirror does."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse

import pyarrow
import pyarrow.parquet
import pytest
from data_fixtures import ROOT, run_prepare, texts
from huggingface_hub import constants

from transxssm_jax.data import hub
from transxssm_jax.data.manifest import DataError, read_manifest
from transxssm_jax.data.source import list_files, parse_source, read_documents

COMMIT = 'c0ffee' * 6 + 'cafe'


class Server(http.server.ThreadingHTTPServer):
    """/api/datasets/NAME/revision/REV lists files, /datasets/NAME/resolve/COMMIT/PATH gives one, with ranges.

    Attributes:
      data: (name, branch) -> path -> content.
      asked: (method, path, Range) of every request.
      cut: bytes after which the connection is lost, once; 0: never.
      fail: path -> status of the answer.
    """

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.data, self.asked, self.cut, self.fail = {}, [], 0, {}
        self.endpoint = f'http://127.0.0.1:{self.server_port}'

    def commit(self, branch):
        return COMMIT if branch == 'main' else COMMIT[::-1]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        server.asked.append((self.command, path, self.headers.get('Range')))
        for (name, branch), files in server.data.items():
            if path == f'/api/datasets/{name}/revision/{branch}':
                siblings = [{'rfilename': file} for file in files]
                return self.answer(
                    json.dumps({'id': name, 'sha': server.commit(branch), 'siblings': siblings}).encode()
                )
            prefix = f'/datasets/{name}/resolve/{server.commit(branch)}/'
            if path.startswith(prefix) and path.removeprefix(prefix) in files:
                if path.rpartition('/')[2] in server.fail:
                    return self.answer(b'', server.fail[path.rpartition('/')[2]])
                return self.answer(files[path.removeprefix(prefix)], commit=server.commit(branch))
        known = any(path == f'/api/datasets/{name}/revision/{hub.CONVERTED}' for name, _ in server.data)
        self.answer(b'{}', 404, code='RevisionNotFound' if known else 'RepoNotFound')

    def answer(self, content, status=200, commit='', code=''):
        etag, start = f'"{hashlib.sha256(content).hexdigest()}"', 0
        if status == 200 and (given := self.headers.get('Range')):
            start, status = int(given.removeprefix('bytes=').partition('-')[0]), 206
        self.send_response(status)
        headers = {'ETag': etag, 'X-Repo-Commit': commit, 'X-Error-Code': code, 'Accept-Ranges': 'bytes'}
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        if status == 206:
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        body = content[start:]
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.server.cut and commit and len(body) > self.server.cut:
            body, self.server.cut = body[: self.server.cut], 0
            self.close_connection = True
        self.wfile.write(body)


def parquet(documents, field='text') -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({field: documents}), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv('HF_ENDPOINT', server.endpoint)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def read(spec, **arguments):
    return [
        text for piece in list_files(spec, 'train') for text in read_documents(piece_of(piece), 'text', **arguments)
    ]


def piece_of(file):
    from transxssm_jax.data.source import cut

    (piece,) = cut(file, 1 << 30)
    return piece


def test_names_of_files_tell_config_and_split(server):
    server.data['me/books', 'main'] = {
        'README.md': b'# Books\n',
        'data/train-00000-of-00002.parquet': parquet(['a', 'b']),
        'data/train-00001-of-00002.parquet': parquet(['c']),
        'data/validation-00000-of-00001.parquet': parquet(['v']),
        'data/train_sft-00000-of-00001.parquet': parquet(['s']),
    }
    assert read('hf:me/books:train') == ['a', 'b', 'c']
    assert read('hf:me/books:dev') == ['v'], 'another word for it'
    assert read('hf:me/books:train_sft') == ['s']
    server.data['me/wiki', 'main'] = {
        'en/test/0000.parquet': parquet(['e']),
        'de/test/0000.parquet': parquet(['d']),
        'de/test/0001.parquet': parquet(['D']),
    }
    assert read('hf:me/wiki/de:test') == ['d', 'D']
    with pytest.raises(DataError, match=r'me/wiki has several configs \(de, en\); name one, as in hf:NAME/de:test'):
        read('hf:me/wiki:test')
    server.data['plain', 'main'] = {'corpus.parquet': parquet(['p'])}
    assert read('hf:plain:train') == ['p'], 'a file that names no split is of train'
    server.data['squad', 'main'] = {'plain_text/train-00000-of-00001.parquet': parquet(['q'])}
    assert read('hf:squad/plain_text:train') == read('hf:squad:train') == ['q'], (
        'a name without an owner, with a config'
    )


def test_the_readme_tells_config_and_split(server):
    readme = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: parts/1-*.parquet
  - split: held
    path: [parts/2-*.parquet, 'more/**/x?.parquet']
- config_name: all
  default: true
  data_files: 'parts/*.parquet'
- config_name: dir
  data_dir: more
  data_files: {train: 'deep/*.parquet'}
- config_name: none
---
"""
    server.data['me/a', 'main'] = {
        'README.md': readme.encode(),
        'more/deep/x1.parquet': parquet(['x']),
        'parts/1-a.parquet': parquet(['1a']),
        'parts/1-b.parquet': parquet(['1b']),
        'parts/2-a.parquet': parquet(['2a']),
    }
    assert read('hf:me/a/small:train') == ['1a', '1b']
    assert read('hf:me/a/small:held') == ['x', '2a']
    assert read('hf:me/a:train') == read('hf:me/a/all:train') == ['1a', '1b', '2a']
    assert read('hf:me/a/dir:train') == ['x']
    with pytest.raises(DataError, match=r"me/a has no config 'smal'; did you mean small\?"):
        read('hf:me/a/smal:train')
    with pytest.raises(DataError, match=r"me/a has no parquet files of split 'test'; it has held, train"):
        read('hf:me/a/small:test')


def test_what_has_no_parquet_is_read_from_the_converted_branch(server):
    server.data['me/json', 'main'] = {'README.md': b'', 'train.jsonl': b'{}'}
    with pytest.raises(DataError, match='me/json has no parquet files, on its main branch or on refs/convert/parquet'):
        read('hf:me/json:train')
    server.data['me/json', hub.CONVERTED] = {'default/partial-train/0000.parquet': parquet(['j'])}
    assert read('hf:me/json:train') == ['j']


def test_a_download_that_broke_off_goes_on_and_is_made_once(server, monkeypatch):
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 1 << 16)  # of 10 MB nothing is kept before it is whole
    content = parquet(texts(2000, longest=900))
    server.data['me/a', 'main'] = {'train.parquet': content}
    server.cut = len(content) // 2
    documents = read('hf:me/a:train')
    assert documents == texts(2000, longest=900)
    ranges = [given for method, path, given in server.asked if method == 'GET' and path.endswith('train.parquet')]
    assert ranges[0] is None and any(given and given.startswith('bytes=') for given in ranges[1:]), ranges
    server.asked.clear()
    assert read('hf:me/a:train') == documents
    assert not [path for method, path, _ in server.asked if method == 'GET' and path.endswith('.parquet')]


def test_weights_and_a_prepared_split(server, tmp_path):
    assert parse_source('hf:me/a/b:train@0.7') == ('hf:me/a/b:train', '0.7')
    server.data['me/a', 'main'] = {'train.parquet': parquet(texts(20)), 'test.parquet': parquet(texts(9, seed=1))}
    assert run_prepare(tmp_path / 'out', 'hf:me/a:train@3', 'hf:me/a:test@1') == 0
    manifest = read_manifest(tmp_path / 'out', 'train')
    assert [(source.spec, source.documents) for source in manifest.sources] == [
        ('hf:me/a:train', 20),
        ('hf:me/a:test', 9),
    ]


def test_by_the_command_with_the_environment_of_a_mirror(server, tmp_path):
    server.data['me/a', 'main'] = {'train.parquet': parquet(texts(20))}
    environment = os.environ | {'HF_HOME': str(tmp_path / 'home'), 'PYTHONPATH': str(ROOT)}
    flags = (
        '--tokenizer=byte',
        '--split=train',
        '--source=hf:me/a:train',
        f'--output={tmp_path / "out"}',
        '--num_workers=1',
    )
    command = [sys.executable, '-m', 'transxssm_jax.data.prepare', *flags]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert read_manifest(tmp_path / 'out', 'train').num_documents == 20
    assert list((tmp_path / 'home').glob('hub/datasets--me--a/snapshots/*/train.parquet'))


@pytest.mark.parametrize(
    'source, message',
    [
        ('hf:me/b:train', 'has no data set me/b, or none that may be read without a token'),
        ('hf:me/a:train', "has no column 'text' (it has body); name the text with --text_field"),
        ('hf:me/a:test', "me/a has no parquet files of split 'test'; it has train"),
        ('hf:me/a', 'must be hf:NAME:SPLIT or hf:NAME/CONFIG:SPLIT'),
        ('hf::train', 'must be hf:NAME:SPLIT'),
        ('hf:../a:train', 'must be hf:NAME:SPLIT'),
        ('hf:me/broken:train', 'the README of me/broken has metadata that cannot be read'),
        ('hf:me/gone:train', 'does not give train.parquet of me/gone (Client error'),
    ],
)
def test_refused(server, tmp_path, capsys, source, message):
    server.data['me/a', 'main'] = {'train.parquet': parquet(['a'], field='body')}
    server.data['me/broken', 'main'] = {'README.md': b'---\na: [\n---\n', 'train.parquet': b''}
    server.data['me/gone', 'main'] = {'train.parquet': b'gone'}
    server.fail['train.parquet'] = 403 if 'gone' in source else 200
    if 'gone' not in source:
        server.fail.clear()
    assert run_prepare(tmp_path / 'out', source) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1], error


def test_an_endpoint_that_is_not_there_or_is_no_hub(server, tmp_path, capsys, monkeypatch):
    def refused(message):
        assert run_prepare(tmp_path / 'out', 'hf:me/a:train') == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and message in error[0], error

    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    refused('http://127.0.0.1:9 cannot be asked for me/a ([Errno 111] Connection refused); check HF_ENDPOINT')
    monkeypatch.setenv('HF_ENDPOINT', server.endpoint)
    monkeypatch.setattr(Handler, 'do_GET', lambda self: self.answer(b'<html>welcome</html>'))
    refused('cannot be asked for me/a (')
    monkeypatch.setattr(Handler, 'do_GET', lambda self: self.answer(b'', 503))
    refused('cannot be asked for me/a (')
