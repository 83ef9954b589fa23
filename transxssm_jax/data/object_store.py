"""Object stores (s3://, gs://) without a mount: files below a URL, and copies of them in a local cache.

Of prepared data, what a split is opened with (dataset_info.json, the manifest) is fetched at every start, because a split
may have been added. The lengths, the tokenizer and the shards are fetched once, when they are first read, under a name
that begins with their sha256: data that was prepared anew at the same place is another copy. The cache is
~/.cache/transxssm_jax, or what TRANSXSSM_JAX_CACHE names, and grows to what a host reads; nothing there is missed when
it is deleted between runs.

The store is reached through fsspec with s3fs or gcsfs, which find keys and endpoints where their command-line tools do
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws; GOOGLE_APPLICATION_CREDENTIALS).
"""

import contextlib
import hashlib
import os
import re
import secrets
from pathlib import Path

from transxssm_jax import cli

PACKAGES = {'s3': 's3fs', 'gs': 'gcsfs'}  # by the scheme of a URL


class StoreError(cli.UserError, ValueError):
    """An object store refuses, or what is wanted is not there; the message is one line."""


def is_url(path) -> bool:
    """Whether a path is on an object store."""
    return bool(re.match(r'(s3|gs)://', str(path)))


def cache_of(url: str) -> Path:
    """The local directory for copies of what is below a URL; made."""
    root = os.environ.get('TRANSXSSM_JAX_CACHE') or os.path.join('~', '.cache', 'transxssm_jax')
    name = re.sub(r'\W+', '-', url.partition('://')[2]).strip('-')[-40:]
    directory = Path(root).expanduser() / f'{name}-{hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]}'
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f'the cache {directory} for {url} cannot be made ({error.strerror}); name another with TRANSXSSM_JAX_CACHE'
        ) from error
    return directory


class Files:
    """The files below a URL, by their names relative to it. All methods raise StoreError where the store refuses."""

    def __init__(self, url: str):
        self.url = url.rstrip('/')

    def _at(self, name: str) -> str:
        return f'{self.url}/{name}'

    def names(self) -> list[str]:
        """Names of all files, in order; [] where there is nothing."""
        root = self.url.partition('://')[2]
        with _named(self.url):
            try:
                return sorted(path.removeprefix(root).lstrip('/') for path in _filesystem(self.url).find(self.url))
            except FileNotFoundError:
                return []

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError where there is none."""
        with _named(self.url):
            return int(_filesystem(self.url).info(self._at(name))['size'])

    def read(self, name: str) -> bytes:
        """A file's content. Raises FileNotFoundError where there is none."""
        with _named(self.url):
            return _filesystem(self.url).cat_file(self._at(name))

    def fetch(self, name: str, copy: Path) -> Path:
        """Copies a file here, all of it or nothing, and makes directories for it. Returns copy.

        Raises FileNotFoundError where there is none.
        """
        copy.parent.mkdir(parents=True, exist_ok=True)
        temporary = copy.with_name(f'.{copy.name}.{secrets.token_hex(4)}.tmp')  # other processes fetch it too
        with _named(self.url):
            try:
                _filesystem(self.url).get_file(self._at(name), str(temporary))
                os.replace(temporary, copy)
            finally:
                temporary.unlink(missing_ok=True)
        return copy

    def put(self, file: Path, name: str) -> None:
        """Copies a local file there. Raises FileNotFoundError where there is none here."""
        with _named(self.url, 'written'):
            _filesystem(self.url).put_file(str(file), self._at(name))

    def write(self, name: str, content: bytes) -> None:
        with _named(self.url, 'written'):
            _filesystem(self.url).pipe_file(self._at(name), content)

    def remove(self, names: list[str]) -> None:
        """Removes files; those that are not there are none to it."""
        with _named(self.url, 'written'), contextlib.suppress(FileNotFoundError):
            if names:
                _filesystem(self.url).rm([self._at(name) for name in names])


def fetch(url: str, name: str, copy: Path) -> Path:
    """`Files.fetch`."""
    return Files(url).fetch(name, copy)


def _filesystem(url: str):
    import fsspec

    scheme = url.partition('://')[0]
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False)  # others write there too
    except ImportError:
        package = PACKAGES[scheme]
        raise StoreError(f'{url} needs the package {package}, which is not installed; pip install {package}') from None


@contextlib.contextmanager
def _named(url: str, what: str = 'read'):
    """Turns whatever a store raises, but a missing file, into a StoreError that names the URL."""
    try:
        yield
    except (FileNotFoundError, StoreError):
        raise
    except Exception as error:  # of the store's package, the network, the disk
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise StoreError(f'{url} cannot be {what}: {cli.shorten(reason, 200)}') from error
