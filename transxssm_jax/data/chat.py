"""Conversations: messages (role, content) to the text that a chat template writes, and which of it is learned.

A template is Jinja, as `chat_template` of a tokenizer_config.json, rendered in
Jinja's sandbox. What stands between {% generation %} and {% endgeneration %}, as
the transformers library has it, is what the assistant writes. Of a template
without these marks, an assistant's turn is what the text of the conversation up
to it lacks, with the generation prompt: that text must begin the text of the
whole, or the template does not mark turns and is refused.

A conversation becomes one document. Its tokens are those of the whole text, in
which special tokens that the template writes are special; a message that spells
one is bad. The mask of the document tells which tokens are learned as targets.
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from transxssm_jax import cli
from transxssm_jax.data.manifest import DataError, finished_splits, first_line, read_manifest
from transxssm_jax.data.tokenizer import replace_surrogates

ASSISTANT = 'assistant'
LOSS_ON = ('assistant', 'completion')  # every turn of the assistant, or the last one alone
TEMPLATE_FILE, TOKENIZER_CONFIG = 'chat_template.jinja', 'tokenizer_config.json'
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_MARKS = re.compile(r'\{%[-+]?\s*generation\s*[-+]?%\}')
_PROBE = 'conversation'  # content that tells what a template writes after it


class BadConversation(cli.UserError, ValueError):
    """A conversation that cannot be stored: `reason`, a few words by which it is counted, and what is wrong with it."""

    def __init__(self, reason: str, explanation: str):
        super().__init__(explanation)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The text of a conversation.

    Attributes:
      spans: (first character, past last character) of each part that is learned, in order.
      ends_with_answer: whether the assistant has the last word, so that the end of the document is learned too.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    ends_with_answer: bool

    def __len__(self) -> int:
        return len(self.text)


class Chat:
    """A chat template.

    Args:
      template: Jinja source.
      variables: what the template may read besides messages, such as bos_token and eos_token.
      special_tokens: texts that no message may hold.
      loss_on: one of LOSS_ON.
      name: what errors call the template.

    Raises DataError where the template is not one.
    """

    def __init__(self, template: str, variables: dict, special_tokens=(), *, loss_on: str = ASSISTANT, name: str):
        self.template, self.variables, self.loss_on, self.name = template, dict(variables), loss_on, name
        self._special = tuple(filter(None, special_tokens))
        self._has_marks = bool(_MARKS.search(template))
        self._compiled = _compile(template, name)

    def describe(self) -> dict:
        """What decides the tokens of a conversation, and what `from_description` makes the chat of again."""
        return {'template': self.template, 'variables': self.variables, 'loss_on': self.loss_on}

    def render(self, messages: list[dict], *, add_generation_prompt: bool = False) -> str:
        """The text of messages. Raises BadConversation where the template refuses them."""
        return self._render(messages, add_generation_prompt)[0]

    def conversation(self, messages) -> Conversation:
        """Raises BadConversation for what is no conversation, and DataError where the template does not mark turns."""
        check_messages(messages)
        messages = [message | {'content': replace_surrogates(message['content'])} for message in messages]
        self._check_special(messages)
        if not any(message['role'] == ASSISTANT for message in messages):
            raise BadConversation('no assistant turn', 'the conversation has no message of role assistant')
        text, spans = self._render(messages)
        if not self._has_marks:
            spans = self._spans_of_turns(messages, text)
        spans = [(start, stop) for start, stop in spans if start < stop]
        if not spans:
            raise BadConversation('nothing to learn', f'{self.name} writes nothing for the assistant')
        if self.loss_on == 'completion':
            spans = spans[-1:]
        return Conversation(text, tuple(spans), messages[-1]['role'] == ASSISTANT)

    def end_of_turn(self) -> str:
        """What the template writes after an answer, without spaces around it; '' where nothing ends a turn."""
        messages = [{'role': 'user', 'content': _PROBE}, {'role': ASSISTANT, 'content': _PROBE}]
        found = self.conversation(messages)
        start, stop = found.spans[-1]
        return found.text[start:stop].rpartition(_PROBE)[2].strip()

    def _check_special(self, messages: list[dict]) -> None:
        for message in messages:
            found = next((token for token in self._special if token in message['content']), None)
            if found:
                raise BadConversation(
                    'special token in a message', f'a message spells {found!r}, which would be the special token'
                )

    def _spans_of_turns(self, messages: list[dict], text: str) -> list[tuple[int, int]]:
        spans = []
        for i, message in enumerate(messages):
            if message['role'] == ASSISTANT:
                before = self.render(messages[:i], add_generation_prompt=True) if i else ''
                through = self.render(messages[: i + 1])
                if not (through.startswith(before) and text.startswith(through)):
                    raise DataError(
                        f'{self.name} does not mark the turns of the assistant: put {{% generation %}} before and '
                        '{% endgeneration %} after what the assistant writes'
                    )
                spans.append((len(before), len(through)))
        return spans

    def _render(self, messages: list[dict], add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        mark = _unused(list(_strings([messages, self.variables, self.template])))
        try:
            marked = self._compiled.render(
                **self.variables,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                mark_of_answers=mark,
            )
        except Exception as error:  # a template's raise_exception, and whatever an expression raises
            raise BadConversation('refused by the template', f'{self.name} refuses it ({first_line(error)})') from error
        parts = marked.split(mark)  # outside, within, outside, ...
        starts = np.cumsum([0, *map(len, parts)]).tolist()
        return ''.join(parts), [(starts[i], starts[i + 1]) for i in range(1, len(parts), 2)]


def check_messages(messages) -> None:
    """Raises BadConversation unless messages is a list of objects with a text `role` and a text `content`."""
    if not isinstance(messages, list) or not messages:
        kind = 'an empty list' if messages == [] else type(messages).__name__
        raise BadConversation('no messages', f'the messages are {kind}; they must be a list of objects (role, content)')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ('role', 'content')):
            raise BadConversation(
                'no messages', f'message {number} must be an object with a text role and a text content'
            )


def _strings(value) -> Iterator[str]:
    """Every text within lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _strings(part)


def _unused(texts: list[str]) -> str:
    """A short string that no text holds."""
    number = 0
    while any((mark := f'\x02{number}\x03') in text for text in texts):
        number += 1
    return mark


def _compile(template: str, name: str):
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}: the body, with a mark on both sides."""

        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(('name:endgeneration',), drop_needle=True)

            def mark():
                return jinja2.nodes.Output([jinja2.nodes.Name('mark_of_answers', 'load')]).set_lineno(line)

            return [mark(), *body, mark()]

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters['tojson'] = tojson
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.exceptions.TemplateError as error:
        raise DataError(
            f'{name} is no chat template ({first_line(error)}, line {getattr(error, "lineno", "?")})'
        ) from None


# ---- templates ---------------------------------------------------------------


def load_chat(tokenizer, path, template: str = '', *, loss_on: str = ASSISTANT) -> Chat:
    """The chat template of a tokenizer.

    Args:
      tokenizer: as `load_tokenizer` made it of `path`.
      path: 'byte' or the tokenizers json file, beside which chat_template.jinja or tokenizer_config.json may lie.
      template: a file of Jinja, or 'chatml'; '': that of the tokenizer, or ChatML where it has none.
      loss_on: one of LOSS_ON.

    Raises DataError where a file cannot be read or holds no template.
    """
    folder = Path(path).parent if str(path) != 'byte' else None
    config = _read_config(folder / TOKENIZER_CONFIG) if folder and (folder / TOKENIZER_CONFIG).exists() else {}
    variables = {
        name: _token(config.get(name)) or getattr(tokenizer, own, '')
        for name, own in (('bos_token', 'begin_token'), ('eos_token', 'eos_token'))
    }
    variables |= {name: _token(config[name]) for name in ('pad_token', 'unk_token') if _token(config.get(name))}
    name, source = 'the ChatML template', CHATML
    if template and template != 'chatml':
        name, source = f'--chat_template={template}', _read_text(Path(template))
    elif not template and folder and (folder / TEMPLATE_FILE).exists():
        name, source = str(folder / TEMPLATE_FILE), _read_text(folder / TEMPLATE_FILE)
    elif not template and config.get('chat_template'):
        name, source = f'chat_template of {folder / TOKENIZER_CONFIG}', _default(config['chat_template'], folder)
    return Chat(source, variables, getattr(tokenizer, 'special_ids', {}), loss_on=loss_on, name=name)


def of_directory(path, tokenizer) -> Chat | None:
    """The chat template that a prepared directory was made with; None where it holds no conversations."""
    description = read_manifest(path, finished_splits(path)[0]).chat
    if not description:
        return None
    special = getattr(tokenizer, 'special_ids', {})
    return Chat(
        description['template'],
        description['variables'],
        special,
        loss_on=description['loss_on'],
        name=f'the chat template of {path}',
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'it is not UTF-8'
        raise DataError(f'--chat_template={path}: {reason}; give a file of Jinja, or chatml') from None


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f'{path} cannot be read ({first_line(error)}); mend it, or give --chat_template') from None
    if not isinstance(config, dict):
        raise DataError(f'{path} must hold a JSON object; mend it, or give --chat_template')
    return config


def _token(value) -> str:
    """The text of a token of tokenizer_config.json, which may be an object with `content`."""
    value = value.get('content') if isinstance(value, dict) else value
    return value if isinstance(value, str) else ''


def _default(template, folder: Path) -> str:
    """The template, or the one of the name 'default' where there are several."""
    if isinstance(template, list):
        named = {entry.get('name'): entry.get('template') for entry in template if isinstance(entry, dict)}
        template = named.get('default')
    if not isinstance(template, str):
        raise DataError(f'chat_template of {folder / TOKENIZER_CONFIG} is no text; give --chat_template=FILE')
    return template


# ---- tokens ------------------------------------------------------------------


def encode(tokenizer, conversations: list[Conversation]) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """(tokens with eos at their end, uint8 mask of those that are learned, bytes of text that is learned) of each.

    The begin token at the start of a text is left out, for the loader puts it before every document. Where the text
    ends with eos, no other is added.
    """
    documents = []
    encoded = tokenizer.encode_with_offsets([conversation.text for conversation in conversations])
    for conversation, (ids, offsets) in zip(conversations, encoded):
        mask = np.zeros(len(ids), np.uint8)
        for start, stop in conversation.spans:
            first = np.searchsorted(offsets[:, 1], start, side='right')
            last = np.searchsorted(offsets[:, 0], stop, side='left')
            mask[first:last] = 1
        if len(ids) and ids[0] == tokenizer.begin_id:
            ids, mask = ids[1:], mask[1:]
        if not len(ids) or ids[-1] != tokenizer.eos_id:
            ids = np.append(ids, np.array(tokenizer.eos_id, ids.dtype))
            mask = np.append(mask, np.uint8(conversation.ends_with_answer))
        learned = sum(len(conversation.text[start:stop].encode()) for start, stop in conversation.spans)
        documents.append((ids, mask, learned))
    return documents
