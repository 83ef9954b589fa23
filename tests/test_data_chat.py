"""Conversations: what templates write, which tokens are learned, and that the mask goes all the way to the loss."""

import gzip
import itertools
import json

import numpy as np
import pytest
from data_fixtures import digests, run_prepare, train_tokenizer
from train_fixtures import train, write_config

from transxssm_jax import generate
from transxssm_jax.data import chat as chat_lib
from transxssm_jax.data.chat import BadConversation, Chat, load_chat
from transxssm_jax.data.documents import Documents
from transxssm_jax.data.loader import make_loader, read_documents
from transxssm_jax.data.manifest import DataError, read_manifest
from transxssm_jax.data.tokenizer import ByteTokenizer, load_tokenizer

SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|begin_of_text|>', '<|eot_id|>', '<|head|>', '<|tail|>']
HEADERS = (
    '{{ bos_token }}{% for message in messages %}\n'
    "{{- '<|head|>' + message['role'] + '<|tail|>\\n\\n' }}\n"
    "    {%- if message['role'] == 'assistant' %}\n"
    "{% generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}\n"
    '    {%- else %}\n'
    "{{- message['content'] | trim + '<|eot_id|>' }}\n"
    '    {%- endif %}\n'
    '{%- endfor %}\n'
    "{%- if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\\n\\n' }}{% endif %}"
)
INSTRUCTIONS = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    '{% for message in rest %}'
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}[INST] {{ system if loop.first else '' }}{{ message['content'] }} [/INST]"
    "{% else %}{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
TEMPLATES = {'chatml': chat_lib.CHATML, 'headers': HEADERS, 'instructions': INSTRUCTIONS}
CONVERSATIONS = [
    [{'role': 'user', 'content': 'Hello.'}, {'role': 'assistant', 'content': 'Hi, é語🙂!'}],
    [
        {'role': 'system', 'content': 'Be brief'},
        {'role': 'user', 'content': 'One?\nOr two?'},
        {'role': 'assistant', 'content': 'Two. '},
        {'role': 'user', 'content': 'x'},
        {'role': 'assistant', 'content': ' and then\n\nsome more'},
    ],
    [
        {'role': 'user', 'content': 'a'},
        {'role': 'assistant', 'content': 'b'},
        {'role': 'user', 'content': 'c'},
    ],
]


@pytest.fixture(scope='module')
def tokenizer_file(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json', SPECIALS)


@pytest.fixture(scope='module')
def tokenizer(tokenizer_file):
    return load_tokenizer(tokenizer_file, '<|endoftext|>', '<|begin_of_text|>')


def chat_of(tokenizer, template, **settings):
    variables = {'bos_token': tokenizer.begin_token, 'eos_token': tokenizer.eos_token}
    return Chat(template, variables, tokenizer.special_ids, name='the template', **settings)


def spelled(tokenizer, ids):
    """Text of ids, special tokens included."""
    return tokenizer._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def learned(tokenizer, template, messages, **settings):
    """The text of each run of learned tokens, without the eos that ends the document."""
    conversation = chat_of(tokenizer, template, **settings).conversation(messages)
    [(ids, mask, _)] = chat_lib.encode(tokenizer, [conversation])
    assert ids[-1] == tokenizer.eos_id and len(ids) == len(mask)
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]).astype(int)))
    return [spelled(tokenizer, ids[start:stop]) for start, stop in bounds.reshape(-1, 2)]


# ---- what is learned -----------------------------------------------------------


@pytest.mark.parametrize(
    'template, expected',
    [
        ('chatml', ['Two. <|im_end|>', ' and then\n\nsome more<|im_end|>', '<|endoftext|>']),
        ('headers', ['Two.<|eot_id|>', 'and then\n\nsome more<|eot_id|><|endoftext|>']),
        ('instructions', [' Two. <|endoftext|>', '  and then\n\nsome more<|endoftext|>']),
    ],
)
def test_turns_of_the_assistant_are_learned(tokenizer, template, expected):
    assert learned(tokenizer, TEMPLATES[template], CONVERSATIONS[1]) == expected


def test_the_completion_alone_may_be_learned(tokenizer):
    found = learned(tokenizer, chat_lib.CHATML, CONVERSATIONS[1], loss_on='completion')
    assert found == [' and then\n\nsome more<|im_end|>', '<|endoftext|>']


def test_a_conversation_that_the_user_ends_does_not_teach_to_end(tokenizer):
    assert learned(tokenizer, chat_lib.CHATML, CONVERSATIONS[2]) == ['b<|im_end|>']


@pytest.mark.parametrize('template', TEMPLATES)
@pytest.mark.parametrize('number', range(3))
def test_masks_are_those_of_transformers(tokenizer, tokenizer_file, template, number):
    transformers = pytest.importorskip('transformers', reason='compares with transformers, where it is installed')
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), bos_token='<|begin_of_text|>', eos_token='<|endoftext|>'
    )
    messages = CONVERSATIONS[number]
    expected = theirs.apply_chat_template(
        messages, chat_template=TEMPLATES[template], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    conversation = chat_of(tokenizer, TEMPLATES[template]).conversation(messages)
    assert conversation.text == theirs.apply_chat_template(messages, chat_template=TEMPLATES[template], tokenize=False)
    [(ids, mask, _)] = chat_lib.encode(tokenizer, [conversation])
    start = int(expected['input_ids'][0] == tokenizer.begin_id)  # the loader puts it before every document
    count = len(expected['input_ids']) - start
    assert ids[:count].tolist() == expected['input_ids'][start:]
    assert mask[:count].tolist() == expected['assistant_masks'][start:] and mask[:count].any()
    prompt = theirs.apply_chat_template(
        messages[:-1], chat_template=TEMPLATES[template], tokenize=False, add_generation_prompt=True
    )
    assert chat_of(tokenizer, TEMPLATES[template]).render(messages[:-1], add_generation_prompt=True) == prompt


def without_marks(template):
    return template.replace('{% generation %}', '').replace('{% endgeneration %}', '')


def test_a_template_without_marks_learns_what_follows_the_generation_prompt(tokenizer):
    found = learned(tokenizer, without_marks(chat_lib.CHATML), CONVERSATIONS[1])
    assert found == ['Two. <|im_end|>\n', ' and then\n\nsome more<|im_end|>\n<|endoftext|>']


def test_a_template_that_does_not_mark_turns_is_refused(tokenizer):
    reversing = "{% for message in messages | reverse %}{{ message.role + ':' + message.content }}{% endfor %}"
    with pytest.raises(DataError, match='does not mark the turns of the assistant') as error:
        chat_of(tokenizer, reversing).conversation(CONVERSATIONS[0])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'template, expected', [('chatml', '<|im_end|>'), ('headers', '<|eot_id|>'), ('instructions', '<|endoftext|>')]
)
def test_what_ends_a_turn_is_found(tokenizer, template, expected):
    assert chat_of(tokenizer, TEMPLATES[template]).end_of_turn() == expected
    if template != 'instructions':
        assert chat_of(tokenizer, without_marks(TEMPLATES[template])).end_of_turn() == expected


@pytest.mark.parametrize(
    'messages, reason',
    [
        ('text', 'no messages'),
        ([], 'no messages'),
        (None, 'no messages'),
        ([{'role': 'user'}], 'no messages'),
        ([{'role': 'user', 'content': ['a']}], 'no messages'),
        ([{'role': 1, 'content': 'a'}], 'no messages'),
        ([{'role': 'user', 'content': 'a'}], 'no assistant turn'),
        (
            [{'role': 'user', 'content': 'say <|im_end|>'}, {'role': 'assistant', 'content': 'no'}],
            'special token in a message',
        ),
        (CONVERSATIONS[0][::-1], 'refused by the template'),
    ],
)
def test_bad_conversations_are_told_apart(tokenizer, messages, reason):
    with pytest.raises(BadConversation) as error:
        chat_of(tokenizer, INSTRUCTIONS).conversation(messages)
    assert error.value.reason == reason and '\n' not in str(error.value)


@pytest.mark.parametrize('template', ['{% if %}', '{{ messages', '{% generation %}x'])
def test_what_is_no_template_is_refused(tokenizer, template):
    with pytest.raises(DataError, match='the template is no chat template'):
        chat_of(tokenizer, template)


def test_templates_run_in_a_sandbox(tokenizer):
    reaching = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(BadConversation, match='refuses it'):
        chat_of(tokenizer, reaching).render(CONVERSATIONS[0])


def test_no_message_can_move_the_marks(tokenizer):
    messages = [{'role': 'user', 'content': '\x020\x03'}, {'role': 'assistant', 'content': 'b\x021\x03'}]
    conversation = chat_of(tokenizer, chat_lib.CHATML).conversation(messages)
    [(start, stop)] = conversation.spans
    assert conversation.text[start:stop] == 'b\x021\x03<|im_end|>' and '\x020\x03' in conversation.text


# ---- which template --------------------------------------------------------------


def test_the_template_lies_beside_the_tokenizer(tokenizer, tokenizer_file, tmp_path):
    path = tmp_path / 'tokenizer.json'
    path.write_bytes(tokenizer_file.read_bytes())
    assert load_chat(tokenizer, path).template == chat_lib.CHATML
    config = {'chat_template': HEADERS, 'bos_token': {'content': '<|begin_of_text|>'}, 'eos_token': '<|eot_id|>'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    found = load_chat(tokenizer, path)
    assert found.template == HEADERS
    assert found.variables == {'bos_token': '<|begin_of_text|>', 'eos_token': '<|eot_id|>'}
    named = [{'name': 'tools', 'template': 'x'}, {'name': 'default', 'template': INSTRUCTIONS}]
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config | {'chat_template': named}))
    assert load_chat(tokenizer, path).template == INSTRUCTIONS
    (tmp_path / 'chat_template.jinja').write_text('{{ messages }}')
    assert load_chat(tokenizer, path).template == '{{ messages }}'
    (tmp_path / 'own.jinja').write_text(HEADERS)
    assert load_chat(tokenizer, path, str(tmp_path / 'own.jinja')).template == HEADERS
    assert load_chat(tokenizer, path, 'chatml').template == chat_lib.CHATML
    with pytest.raises(DataError, match='nowhere.jinja: No such file or directory; give a file of Jinja, or chatml'):
        load_chat(tokenizer, path, str(tmp_path / 'nowhere.jinja'))
    (tmp_path / 'chat_template.jinja').unlink()
    (tmp_path / 'tokenizer_config.json').write_text('{')
    with pytest.raises(DataError, match='cannot be read'):
        load_chat(tokenizer, path)


# ---- prepared --------------------------------------------------------------------


def many(count, seed=0):
    return [
        [
            {'role': 'user', 'content': f'What is {i} and {i + seed}?'},
            {'role': 'assistant', 'content': f'{2 * i + seed}.'},
            *([{'role': 'user', 'content': 'Sure?'}, {'role': 'assistant', 'content': 'Yes.'}] if i % 3 == 0 else []),
        ]
        for i in range(count)
    ]


def write(path, conversations, field='messages'):
    lines = ''.join(json.dumps({field: messages}) + '\n' for messages in conversations)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == '.gz' else lines.encode())
    return path


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp('chat')
    for split, count, seed in (('train', 60, 0), ('validation', 20, 1)):
        source = write(root / f'{split}.jsonl', many(count, seed))
        assert run_prepare(root / 'data', source, split=split, format='chat') == 0
    return root / 'data'


def documents(directory, split='train'):
    """(tokens, mask) of every document as it is stored."""
    manifest = read_manifest(directory, split)
    lengths = manifest.lengths()
    reader = Documents(manifest, lengths)
    for number, length in enumerate(lengths.tolist()):
        [tokens] = reader.read([(number, 0, length)])
        yield np.where(tokens < 0, ~tokens, tokens)[1:], tokens[1:] >= 0


def test_bytes_are_learned_where_the_assistant_writes(prepared):
    found = list(documents(prepared))
    tokens, mask = found[3]
    text = bytes(tokens[:-1].astype(np.uint8)).decode()
    assert text == (
        '<|im_start|>user\nWhat is 3 and 3?<|im_end|>\n<|im_start|>assistant\n6.<|im_end|>\n'
        '<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n'
    )
    assert bytes(tokens[mask][:-1].astype(np.uint8)) == b'6.<|im_end|>Yes.<|im_end|>' and tokens[-1] == 256 and mask[-1]
    manifest = read_manifest(prepared, 'train')
    assert manifest.num_targets == sum(mask.sum() for _, mask in found) < manifest.num_tokens / 2
    assert manifest.num_bytes == manifest.num_targets - 60  # each document's eos has no text
    assert [ids.tolist() for ids in read_documents(prepared, 'train')] == [tokens.tolist() for tokens, _ in found]


def test_rows_predict_what_is_learned_and_nothing_else(prepared):
    with make_loader(prepared, 'train', seq_len=64, global_batch=8, seed=0, repeat=False) as loader:
        batches = list(loader)
        assert loader.num_targets < loader.num_tokens
    tokens, targets, segments, positions = (
        np.concatenate([batch[name] for batch in batches]) for name in ('tokens', 'targets', 'segment_ids', 'positions')
    )
    assert (targets >= 0).sum() == read_manifest(prepared, 'train').num_targets
    assert (segments > 0).sum() == read_manifest(prepared, 'train').num_tokens
    inner = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    counted = inner & (targets[:, :-1] >= 0)
    np.testing.assert_array_equal(targets[:, :-1][counted], tokens[:, 1:][counted])
    assert tokens.min() >= 0 and (positions[:, 1:][inner] == positions[:, :-1][inner] + 1).all()


def test_parquet_and_compressed_lines_hold_the_same_conversations(prepared, tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({'messages': many(60), 'n': list(range(60))}), tmp_path / 'train.parquet', row_group_size=25
    )
    assert run_prepare(tmp_path / 'a', tmp_path / 'train.parquet', format='chat') == 0
    assert run_prepare(tmp_path / 'b', write(tmp_path / 'train.jsonl.gz', many(60)), format='chat') == 0
    source = write(tmp_path / 'other.jsonl', many(60), field='turns')
    assert run_prepare(tmp_path / 'c', source, format='chat', text_field='turns', num_workers=2) == 0
    prints = {read_manifest(path, 'train').fingerprint() for path in (prepared, *(tmp_path / name for name in 'abc'))}
    assert len(prints) == 1


def test_a_second_call_has_nothing_to_do_and_another_template_is_refused(prepared, capsys):
    source = prepared.parent / 'train.jsonl'
    before = digests(prepared)
    assert run_prepare(prepared, source, format='chat') == 0 and 'nothing to do' in capsys.readouterr().out
    for flags, expected in (
        (dict(format='chat', loss_on='completion'), 'already holds split'),
        ({}, 'already holds split'),
        (dict(split='test'), "holds split 'train' of conversations"),
    ):
        assert run_prepare(prepared, source, **flags) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count('\n') == 1
    assert digests(prepared) == before


def test_tfds_reads_the_mask(prepared):
    import tensorflow_datasets as tfds

    data = tfds.builder_from_directory(prepared).as_data_source('train')
    tokens, mask = next(documents(prepared))
    example = data[0]
    np.testing.assert_array_equal(example['tokens'], tokens)
    np.testing.assert_array_equal(example['mask'], mask)


@pytest.mark.parametrize(
    'lines, flags, expected',
    [
        ([{'messages': [{'role': 'user', 'content': 'a'}]}], {}, 'no message of role assistant'),
        ([{'messages': 'a'}], {}, 'the messages are str'),
        ([{'text': 'a'}], {}, "has no field 'messages'"),
        ([{'messages': CONVERSATIONS[0]}], {'chat_template': 'nowhere'}, 'give a file of Jinja, or chatml'),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, capsys, lines, flags, expected):
    source = tmp_path / 'chat.jsonl'
    source.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert run_prepare(tmp_path / 'out', source, format='chat', **flags) == 2
    error = capsys.readouterr().err
    assert expected in error and len([line for line in error.splitlines() if line.startswith('error')]) == 1


def test_bad_conversations_may_be_left_out_and_are_counted(tmp_path):
    source = write(tmp_path / 'chat.jsonl', [*many(9), [{'role': 'user', 'content': 'a'}]])
    assert run_prepare(tmp_path / 'out', source, format='chat', skip_bad=0.2) == 0
    assert read_manifest(tmp_path / 'out', 'train').sources[0].skipped == {'no assistant turn': 1}


def test_flags_of_a_chat_are_refused_for_text_and_text_for_a_chat(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('text')
    assert run_prepare(tmp_path / 'out', tmp_path / 'a.txt', loss_on='completion') == 2
    assert '--loss_on is for --format=chat' in capsys.readouterr().err
    assert run_prepare(tmp_path / 'out', tmp_path / 'a.txt', format='chat') == 2
    assert 'conversations are read of jsonl, parquet' in capsys.readouterr().err


# ---- trained and used --------------------------------------------------------------


def test_a_model_learns_to_answer_and_generate_talks_to_it(tmp_path, capsys, monkeypatch):
    always = [[{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': 'Yes.'}] for i in range(100)]
    for split in ('train', 'validation'):
        source = write(tmp_path / f'{split}.jsonl', always)
        assert run_prepare(tmp_path / 'data', source, split=split, format='chat', chat_template='chatml') == 0
    config = write_config(tmp_path, tmp_path / 'data')
    result = train(
        config, tmp_path / 'run', train__steps=60, train__eval_every_steps=60, data__seq_len=64, data__global_batch=8
    )
    assert result.code == 0, result.err
    assert 'evaluation loss 0.' in result.out  # the answers alone: what users write is not to be guessed
    capsys.readouterr()
    flags = [f'--workdir={tmp_path / "run"}', '--chat', '--temperature=0', '--max_tokens=40', '--max_length=256']
    assert generate.main([*flags, '--prompt=7?']) == 0
    assert capsys.readouterr().out == 'Yes.\n'
    records = [{'prompt': '3?', 'id': 1}, {'messages': always[4][:1]}]
    (tmp_path / 'prompts.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    assert generate.main([*flags, f'--prompts={tmp_path / "prompts.jsonl"}', f'--output={tmp_path / "out.jsonl"}']) == 0
    capsys.readouterr()
    found = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    assert found == [record | {'completion': 'Yes.', 'finish_reason': 'stop_string'} for record in records]
    for line in ('["messages"]', '"messages"', '{"messages": "a"}', '{"messages": [], "prompt": 1}', '{"prompt": 1}'):
        (tmp_path / 'bad.jsonl').write_text(line)
        assert generate.main([*flags, f'--prompts={tmp_path / "bad.jsonl"}']) == 2
        assert capsys.readouterr().err.count('\n') == 1
    said = itertools.chain(['1?', '2?'])
    monkeypatch.setattr('builtins.input', lambda prompt='': next(said, None) or (_ for _ in ()).throw(EOFError))
    capsys.readouterr()
    assert generate.main([*flags, '--interactive', '--system=Be kind']) == 0
    assert capsys.readouterr().out.count('\n') == 2


def test_a_model_of_text_does_not_chat(tmp_path, capsys):
    from train_fixtures import prepare_bytes

    config = write_config(tmp_path, prepare_bytes(tmp_path))
    assert train(config, tmp_path / 'run', train__steps=2, train__eval_every_steps=0).code == 0
    capsys.readouterr()
    assert generate.main([f'--workdir={tmp_path / "run"}', '--chat', '--prompt=a']) == 2
    assert 'holds no conversations' in capsys.readouterr().err
    assert generate.main([f'--workdir={tmp_path / "run"}', '--system=b', '--prompt=a']) == 2
    assert '--system is for --chat' in capsys.readouterr().err


def test_offsets_are_those_of_characters():
    text = 'aé語🙂b'
    [(ids, offsets)] = ByteTokenizer().encode_with_offsets([text])
    assert bytes(ids.astype(np.uint8)) == text.encode()
    for character in range(len(text)):
        own = ids[(offsets[:, 0] <= character) & (offsets[:, 1] > character)]
        assert bytes(own.astype(np.uint8)).decode() == text[character]
