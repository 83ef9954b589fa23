import numpy as np
import pytest
from data_fixtures import SHARED, run_prepare, texts, train_tokenizer, write_jsonl

from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.tokenizer import load_tokenizer


def test_bytes():
    tokenizer = load_tokenizer('byte')
    encoded = tokenizer.encode_batch(['aé', ''])
    assert [ids.tolist() for ids in encoded] == [[97, 195, 169], []]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.decode([97, 195, 169, 256]) == 'aé'
    with pytest.raises(DataError, match='leave --eos out'):
        load_tokenizer('byte', eos='</s>')


def test_json(tmp_path):
    tokenizer = load_tokenizer(train_tokenizer(tmp_path / 't.json', ['<pad>', '</s>']))
    assert (tokenizer.eos_token, tokenizer.eos_id) == ('</s>', 1)
    for text in texts(20, seed=1):
        (ids,) = tokenizer.encode_batch([text])
        assert ids.dtype == np.uint16 and ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(list(ids) + [tokenizer.eos_id]) == text


def test_eos_must_be_clear(tmp_path):
    both = train_tokenizer(tmp_path / 'both.json', ['</s>', '<|endoftext|>'])
    with pytest.raises(DataError, match=r'has <\|endoftext\|>, </s>, so .* --eos=TOKEN'):
        load_tokenizer(both)
    assert load_tokenizer(both, eos='</s>').eos_id == 0
    assert load_tokenizer(both, eos='1').eos_token == '<|endoftext|>'
    with pytest.raises(DataError, match='neither a token nor an id'):
        load_tokenizer(both, eos='<end>')
    with pytest.raises(DataError, match='has none of'):
        load_tokenizer(train_tokenizer(tmp_path / 'none.json', []))


def test_errors_of_files(tmp_path):
    with pytest.raises(DataError, match='No such file'):
        load_tokenizer(tmp_path / 'none.json')
    (tmp_path / 'bad.json').write_text('{}')
    with pytest.raises(DataError, match='no tokenizers json file'):
        load_tokenizer(tmp_path / 'bad.json')


def test_from_a_prepared_directory(tmp_path):
    write_jsonl(tmp_path / 'd.jsonl', texts(5))
    path = train_tokenizer(tmp_path / 't.json', ['</s>', '<|endoftext|>'])
    assert run_prepare(tmp_path / 'json', tmp_path / 'd.jsonl', tokenizer=path, eos='</s>') == 0
    assert run_prepare(tmp_path / 'byte', tmp_path / 'd.jsonl') == 0
    path.unlink()
    assert load_tokenizer(tmp_path / 'json').eos_token == '</s>'
    assert load_tokenizer(tmp_path / 'byte').vocab_size == 257


@pytest.mark.parametrize('name, vocab_size, eos', [('neox20b', 50277, 0), ('doge32k', 32768, 1)])
def test_shared_tokenizers(name, vocab_size, eos):
    path = SHARED / f'tokenizers/{name}.json'
    if not path.exists():
        pytest.skip(f'{path} is not here')
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (vocab_size, eos)
    (ids,) = tokenizer.encode_batch(['The quick brown fox'])
    assert eos not in ids and tokenizer.decode(ids) == 'The quick brown fox'
