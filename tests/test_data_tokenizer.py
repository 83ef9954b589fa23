import numpy as np
import pytest
import tokenizers
from data_fixtures import SHARED, run_prepare, texts, train_tokenizer, write_jsonl

from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.tokenizer import load_tokenizer


def test_bytes():
    tokenizer = load_tokenizer('byte')
    encoded = tokenizer.encode_batch(['aé', ''])
    assert [ids.tolist() for ids in encoded] == [[97, 195, 169], []]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.begin_id) == (257, 256, 256)
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


def test_begin_is_bos_where_there_is_one(tmp_path):
    with_bos = load_tokenizer(train_tokenizer(tmp_path / 'bos.json', ['<s>', '</s>']))
    assert (with_bos.begin_token, with_bos.begin_id, with_bos.eos_id) == ('<s>', 0, 1)
    without = load_tokenizer(train_tokenizer(tmp_path / 'none.json', ['<pad>', '</s>']))
    assert (without.begin_token, without.begin_id) == ('</s>', 1)
    several = train_tokenizer(tmp_path / 'several.json', ['<s>', '<bos>', '</s>'])
    with pytest.raises(DataError, match='has <s>, <bos>, so the token that begins .* --bos=TOKEN or --bos=ID'):
        load_tokenizer(several)
    assert load_tokenizer(several, bos='<bos>').begin_id == 1
    assert load_tokenizer(several, bos='2').begin_token == '</s>'
    with pytest.raises(DataError, match='--bos=<end> is neither a token nor an id'):
        load_tokenizer(several, bos='<end>')
    with pytest.raises(DataError, match='leave --bos out'):
        load_tokenizer('byte', bos='<s>')
    # A word of the vocabulary that is no special token is no bos.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<s>': 0, '</s>': 1, 'a': 2}, unk_token='a'))
    words.add_special_tokens(['</s>'])
    words.save(str(tmp_path / 'words.json'))
    assert load_tokenizer(tmp_path / 'words.json').begin_id == 1


def test_eos_and_bos_in_a_text_stay_plain_text(tmp_path):
    tokenizer = load_tokenizer(train_tokenizer(tmp_path / 't.json', ['<s>', '</s>', '<|user|>']))
    for text in ('a </s> b<s>', '</s>', '<s></s></s>', '</</s>s>', 'x\0</s>\0'):
        (ids,) = tokenizer.encode_batch([text])
        assert not set(ids.tolist()) & {0, 1} and tokenizer.decode(ids) == text
    # Not so other control tokens, nor a prompt that asks for all of them.
    assert tokenizer.encode_batch(['<|user|>'])[0].tolist() == [2]
    assert tokenizer.encode_batch(['<s><|user|></s>'], special_tokens=True)[0].tolist() == [0, 2, 1]

    # eos is an ordinary word of the vocabulary here, so that it is found without being a special token.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0, '</s>': 1, '?': 2}, unk_token='?'))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / 'words.json'))
    assert load_tokenizer(tmp_path / 'words.json').encode_batch(['a </s> a'])[0].tolist() == [0, 2, 2, 0]
    words.model = tokenizers.models.WordLevel({'a': 0, '</s>': 1}, unk_token='</s>')
    words.save(str(tmp_path / 'words.json'))
    with pytest.raises(DataError, match="makes </s> .* of the plain text 'a b'; name other tokens with --eos"):
        load_tokenizer(tmp_path / 'words.json').encode_batch(['a b'])


def test_halves_of_surrogate_pairs(tmp_path):
    for tokenizer in (load_tokenizer('byte'), load_tokenizer(train_tokenizer(tmp_path / 't.json', ['</s>']))):
        encoded = tokenizer.encode_batch(['a\ud800b', '\ud83d\ude42', 'é\ude00'])
        assert [tokenizer.decode(ids) for ids in encoded] == ['a\ufffdb', '\U0001f642', 'é\ufffd']


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
    other = train_tokenizer(tmp_path / 'other.json', ['<pad>', '</s>', '<|endoftext|>'])
    (tmp_path / 'json/tokenizer.json').write_bytes(other.read_bytes())
    with pytest.raises(DataError, match='tokenizer.json is not the tokenizer that .* was prepared with'):
        load_tokenizer(tmp_path / 'json')


@pytest.mark.parametrize('name, vocab_size, eos, begin', [('neox20b', 50277, 0, 0), ('doge32k', 32768, 1, 0)])
def test_shared_tokenizers(name, vocab_size, eos, begin):
    path = SHARED / f'tokenizers/{name}.json'
    if not path.exists():
        pytest.skip(f'{path} is not here')
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.begin_id) == (vocab_size, eos, begin)
    (ids,) = tokenizer.encode_batch(['The quick brown fox'])
    assert eos not in ids and tokenizer.decode(ids) == 'The quick brown fox'
    text = f'One {tokenizer.eos_token} and {tokenizer.begin_token}.'
    (ids,) = tokenizer.encode_batch([text])
    assert not set(ids.tolist()) & {eos, begin} and tokenizer.decode(ids) == text
