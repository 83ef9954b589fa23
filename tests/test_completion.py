"""A completion on the host: its text, what ends it, and that its cost does not grow with its length."""

import numpy as np
import pytest
from data_fixtures import SHARED

from transxssm_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from transxssm_jax.inference.completion import NO_TOKEN, Request


class SpaceDropping:
    """A tokenizer of words that, like many, writes no space before the first."""

    words = ['a', 'b', 'c']

    def decode(self, ids):
        return ' '.join(self.words[i] for i in ids)


def test_the_space_between_prompt_and_completion_is_kept():
    request = Request(SpaceDropping(), np.array([0, 1]), 3)
    request.extend(np.array([2, 0, NO_TOKEN]))
    assert (request.text, request.finish_reason) == (' c a', '')
    request.extend(np.array([1, NO_TOKEN, NO_TOKEN]))
    assert (request.text, request.finish_reason) == (' c a b', 'length')


@pytest.mark.parametrize('text', ['é€😀!', 'plain', '\ufffd?'])
def test_characters_and_stop_strings_are_shown_whole(text):
    data = np.frombuffer(text.encode(), np.uint8)
    request = Request(ByteTokenizer(), np.array([65]), 100, (), ('STOP',))
    shown = ['']
    for byte in data:
        request.extend(np.array([byte]))
        shown.append(request.stable_text())
    assert all(text.startswith(piece) for piece in shown) and shown[-1] == text
    for byte in b' ST':
        request.extend(np.array([byte]))
    assert request.stable_text() == text + ' '
    request.extend(np.frombuffer(b'OP more', np.uint8))
    assert request.stable_text() == request.text == text + ' ' and request.finish_reason == 'stop_string'
    assert bytes(request.tokens) == text.encode() + b' '


def test_a_text_that_ends_within_a_character_says_so():
    request = Request(ByteTokenizer(), np.array([65]), 2)
    request.extend(np.frombuffer('€'.encode()[:2], np.uint8))
    assert request.finish_reason == 'length' and request.stable_text() == '\ufffd'


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.count = tokenizer, 0

    def decode(self, ids):
        self.count += len(ids)
        return self.tokenizer.decode(ids)


def neox():
    if not (SHARED / 'tokenizers').is_dir():
        pytest.skip('needs ../shared/tokenizers')
    return load_tokenizer(SHARED / 'tokenizers' / 'neox20b.json', eos='0')


def random_text(count):
    rng = np.random.default_rng(0)
    return [int(i) for i in rng.integers(32, 127, count)]


STREAMS = {
    'text': (ByteTokenizer, lambda: random_text(3000)),
    'characters of several bytes': (ByteTokenizer, lambda: list(('é€😀 x' * 250).encode())),
    'bytes of no character': (ByteTokenizer, lambda: np.random.default_rng(1).integers(0, 256, 3000).tolist()),
    'nothing but broken bytes': (ByteTokenizer, lambda: [255] * 3000),
    'begun characters': (ByteTokenizer, lambda: [0xE2, 0x82] * 1500),
    'tokens of a trained vocabulary': (neox, lambda: np.random.default_rng(2).integers(0, 50277, 3000).tolist()),
}


@pytest.mark.parametrize('stops', [(), ('a stop string that never comes',)], ids=['', 'stop'])
@pytest.mark.parametrize('name', STREAMS)
def test_a_stream_is_the_text_and_takes_time_in_proportion_to_its_length(name, stops):
    make, tokens = STREAMS[name]
    tokenizer, tokens = make(), tokens()

    def stream(count):
        counting, pieces = Counting(tokenizer), []
        request = Request(counting, np.array([65, 66]), count, stop_strings=stops)
        for first in range(0, count, 8):
            request.extend(np.array(tokens[first : min(first + 8, count)]))
            pieces.append(request.stable_text(sum(map(len, pieces))))
        assert request.finish_reason == 'length' and ''.join(pieces) == request.text == request.completion().text
        before = tokenizer.decode([65, 66])
        assert before + request.text == tokenizer.decode([65, 66, *tokens[:count]])
        return counting.count

    half, whole = stream(len(tokens) // 2), stream(len(tokens))
    assert whole < 2.5 * half, 'twice the length, about twice the tokens decoded'


def test_a_stop_string_is_found_wherever_blocks_end():
    stop = 'the stop'
    for before in range(100, 120):
        text = 'x' * before + 'the sto, the st' + stop + ' more'
        request = Request(ByteTokenizer(), np.array([65]), 1000, stop_strings=(stop, 'never, never, never'))
        shown = ''
        for first in range(0, len(text), 8):
            request.extend(np.frombuffer(text.encode()[first : first + 8], np.uint8))
            shown += request.stable_text(len(shown))
        assert shown == request.text == text[: text.index(stop)] and request.finish_reason == 'stop_string'
        assert bytes(request.tokens).decode() == request.text
