"""The tokenizer of an export: the files that transformers' AutoTokenizer reads."""

import json
import pathlib

from transxssm_jax.config import Config
from transxssm_jax.data import manifest
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer
from transxssm_jax.pytorch.fields import ConvertError

TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json')
CHAT_TEMPLATE = 'chat_template.jinja'
BYTE_EOS = (
    '<|endoftext|>'  # what the end of a document is called where the tokenizer is bytes, which have no text for it
)


def tokenizer_for_export(tokenizer: str, config: Config, notes: list[str]) -> ByteTokenizer | JsonTokenizer | None:
    """The tokenizer that is named, or that of the run; None where the run has none that can be read, which is noted."""
    if tokenizer:
        loaded = load_tokenizer(tokenizer)
        if not isinstance(loaded, JsonTokenizer):
            raise ConvertError(
                f'--tokenizer={tokenizer} is the byte tokenizer, which has no file to export; leave it out'
            )
        return loaded
    if not config.data.tokenizer_path:
        return None
    try:
        return load_tokenizer(config.data.tokenizer_path)
    except DataError as error:
        notes.append(f'no tokenizer is exported ({error}); name one with --tokenizer')
        return None


def tokenizer_files(path: str, tokenizer: JsonTokenizer, **settings) -> dict[str, bytes]:
    """The tokenizer, and the settings that stand beside it or, where none do, are made here.

    Args:
      path: of the tokenizer, or a directory that has one.
      settings: more of what is made.
    """
    place = pathlib.Path(path)
    beside = (place if place.is_dir() else place.parent) / TOKENIZER_FILES[1]
    made = _settings(tokenizer.begin_token, tokenizer.eos_token) | settings
    content = beside.read_bytes() if beside.exists() else _as_json(made)
    return dict(zip(TOKENIZER_FILES, (tokenizer.content, content)))


def files_for_transformers(path: str, tokenizer: ByteTokenizer | JsonTokenizer, length: int) -> dict[str, bytes]:
    """`tokenizer_files`, with padding on the left, as generate() wants it, and the chat template of the run's data.

    Args:
      path: as of `tokenizer_files`.
      length: tokens of a row in training.
    """
    settings: dict = {'padding_side': 'left', 'model_max_length': length}
    settings['model_input_names'] = ['input_ids', 'attention_mask']  # transformers 4 would add token types
    if isinstance(tokenizer, ByteTokenizer):
        made = _settings(BYTE_EOS, BYTE_EOS) | settings | {'pad_token': BYTE_EOS}
        files = dict(zip(TOKENIZER_FILES, (byte_tokenizer(), _as_json(made))))
    else:
        files = tokenizer_files(path, tokenizer, pad_token=tokenizer.eos_token, **settings)
    template = _chat_template(path)
    if template and 'chat_template' not in json.loads(files[TOKENIZER_FILES[1]]):
        files[CHAT_TEMPLATE] = template.encode()
    return files


def byte_tokenizer() -> bytes:
    """tokenizer.json of ByteTokenizer: a vocabulary of single bytes in the characters of GPT-2, and BYTE_EOS with id 256."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are written as their own character
    others = [byte for byte in range(256) if byte not in plain]
    character = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    model = {
        'type': 'BPE',
        'dropout': None,
        'unk_token': None,
        'continuing_subword_prefix': None,
        'end_of_word_suffix': None,
        'fuse_unk': False,
        'byte_fallback': False,
        'vocab': {character[byte]: byte for byte in range(256)} | {BYTE_EOS: 256},
        'merges': [],
    }
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    eos = {'id': 256, 'content': BYTE_EOS, **flags, 'special': True}
    return _as_json(
        {
            'version': '1.0',
            'truncation': None,
            'padding': None,
            'added_tokens': [eos],
            'normalizer': None,
            'pre_tokenizer': level,
            'post_processor': None,
            'decoder': level,
            'model': model,
        }
    )


def _settings(begin_token: str, eos_token: str) -> dict:
    return {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': begin_token,
        'eos_token': eos_token,
        'clean_up_tokenization_spaces': False,
    }


def _chat_template(path: str) -> str:
    """The template of a directory of prepared conversations; '' where it is none."""
    if not pathlib.Path(path).is_dir():
        return ''
    splits = manifest.finished_splits(pathlib.Path(path))
    return manifest.read_manifest(pathlib.Path(path), splits[0]).chat.get('template', '')


def _as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + '\n').encode()
