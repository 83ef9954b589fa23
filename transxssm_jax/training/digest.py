"""Digests of files, so that a changed bit is noticed wherever a checkpoint is read.

Array files carry no checksum of their own. A file's digest is XXH3-128 over the
XXH3-128 digests of its 64 MiB blocks: the blocks are read and hashed by several
threads, whatever the number of files. It detects accidents, not forgery.
"""

import concurrent.futures
import hashlib
import itertools
import json
import os
import pathlib

import xxhash

from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.data.manifest import write_file

BLOCK_BYTES = 64 << 20
PIECE_BYTES = 4 << 20  # read at a time
_BLANK = '0' * 32  # stands for a digest in the text that the digest is of


class DamagedError(cli.UserError, ValueError):
    """A file is not what was written; the message is one line and names the file."""


def of_bytes(content: bytes) -> list:
    """[size in bytes, digest in hexadecimal] of a file with this content."""
    blocks = [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]
    return [len(content), _of_blocks(xxhash.xxh3_128_digest(block) for block in blocks)]


def of_files(directory: pathlib.Path, names: list[str]) -> dict[str, list]:
    """Digests of files.

    Args:
      directory: where `names` are relative to.
      names: paths with '/'.

    Returns:
      name -> [size in bytes, digest in hexadecimal].

    Raises:
      OSError: a file cannot be read.
    """
    sizes = {name: (directory / name).stat().st_size for name in names}
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        blocks = {
            name: [pool.submit(_of_block, directory / name, start) for start in range(0, size, BLOCK_BYTES)]
            for name, size in sizes.items()
        }
        return {name: [sizes[name], _of_blocks(block.result() for block in blocks[name])] for name in names}


def check(directory: pathlib.Path, expected: dict[str, list], part: int = 0, parts: int = 1) -> None:
    """Raises unless the files are those that the digests were made of.

    Args:
      directory: where the names are relative to.
      expected: name -> [size in bytes, digest], as `of_files` returned it.
      part, parts: check only every `parts`-th file, from `part` on; the processes of a run divide the work so.

    Raises:
      DamagedError: a file is missing, or has another size or content.
      OSError: a file cannot be read.
    """
    wanted = dict(itertools.islice(sorted(expected.items()), part, None, parts))
    for name, (size, _) in wanted.items():
        try:
            found = (directory / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedError(f'{directory / name} is missing') from error
        if found != size:
            raise DamagedError(f'{directory / name} has {found} bytes instead of {size}')
    for name, found in of_files(directory, list(wanted)).items():
        _check_equal(directory / name, found, wanted[name])


def read_checked(directory: pathlib.Path, name: str, expected: dict[str, list]) -> bytes:
    """The content of a small file, which is checked. Errors as those of `check`."""
    if name not in expected:
        raise DamagedError(f'{directory / name} has no digest')
    try:
        content = (directory / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedError(f'{directory / name} is missing') from error
    _check_equal(directory / name, of_bytes(content), expected[name])
    return content


def of_config(config: Config) -> str:
    """sha256 of a config's settings and values, in hexadecimal digits."""
    return of_config_text(config_lib.to_json(config))


def of_config_text(text: str) -> str:
    """`of_config` of a config that `config.to_json` wrote, perhaps in another version. ValueError: it is not JSON."""
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a JSON file that carries its own digest; it appears under its name only when it is complete."""
    text = json.dumps({'digest': _BLANK, **content}, indent=1) + '\n'
    text = text.replace(_BLANK, xxhash.xxh3_128_hexdigest(text.encode()), 1)
    write_file(path, text.encode())


def read_json(path: pathlib.Path) -> dict:
    """The content of a file of `write_json`.

    Raises:
      DamagedError: it is not what was written.
      OSError: it cannot be read.
    """
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        digest = content.pop('digest')
        genuine = xxhash.xxh3_128_hexdigest(raw.replace(digest.encode(), _BLANK.encode(), 1)) == digest
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f'{path} is damaged: it is not the JSON that was written') from error
    if not genuine:
        raise DamagedError(f'{path} is damaged: its content does not have its digest')
    return content


def _check_equal(path: pathlib.Path, found: list, expected: list) -> None:
    if found != expected:
        raise DamagedError(f'{path} is damaged: its content does not have the digest that was saved with it')


def _of_blocks(digests) -> str:
    return xxhash.xxh3_128_hexdigest(b''.join(digests))


def _of_block(path: pathlib.Path, start: int) -> bytes:
    # Plain reads: an error while a mapped file is read would be a signal that ends the process.
    hasher, piece, left = xxhash.xxh3_128(), memoryview(bytearray(PIECE_BYTES)), BLOCK_BYTES
    with path.open('rb', buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(piece[: min(left, PIECE_BYTES)])):
            hasher.update(piece[:count])
            left -= count
    return hasher.digest()
