"""Conversations with a model: the text that its chat template makes of messages, and what ends an answer."""

from pathlib import Path

from transxssm_jax.data.chat import ASSISTANT, BadConversation, Chat, check_messages, of_directory
from transxssm_jax.data.manifest import DataError
from transxssm_jax.inference.sampling import InputError
from transxssm_jax.inference.trained_run import TrainedRun


def open_chat(run: TrainedRun, tokenizer: str = '') -> Chat:
    """The chat template that a run was trained with.

    Args:
      tokenizer: a prepared directory to take it of; else that of the run's training data.

    Raises InputError where there is none.
    """
    data = run.config.data
    places = [tokenizer] if tokenizer and Path(tokenizer).is_dir() else [data.path, *data.directories.values()]
    problem = ''
    for place in filter(None, places):
        try:
            if chat := of_directory(place, run.tokenizer):
                return chat
        except DataError as error:
            problem = f' ({error})'
    raise InputError(
        f'--chat: {" and ".join(filter(None, places)) or "the run"} holds no conversations{problem}; train on data of '
        'prepare --format=chat, or leave --chat out'
    )


class Dialogue:
    """One conversation.

    Args:
      chat: the template of the training data.
      system: the message that it begins with; '' for none.

    Attributes:
      stop_strings: texts that end an answer; where there are none the end of the document does.
    """

    def __init__(self, chat: Chat, system: str = ''):
        self._chat = chat
        self._start = [{'role': 'system', 'content': system}] if system else []
        self._messages = list(self._start)
        self.stop_strings = tuple(filter(None, [chat.end_of_turn()]))

    def hear(self, text: str) -> None:
        """Takes what the user writes; it takes the place of a message that got no answer."""
        if self._messages and self._messages[-1]['role'] == 'user':
            self._messages.pop()
        self._messages.append({'role': 'user', 'content': text})

    def answer(self, text: str) -> None:
        """Takes what the model answered."""
        self._messages.append({'role': ASSISTANT, 'content': text})

    def text(self) -> str:
        """The conversation up to where the next answer begins. Raises InputError where the template refuses it."""
        return self._render(self._messages)

    def text_of(self, record: dict) -> str:
        """The same of a record of its own, with `messages` or a `prompt` of the user."""
        given = record.get('messages', [{'role': 'user', 'content': record.get('prompt')}])
        try:
            check_messages(given)
        except BadConversation as error:
            raise InputError(f'--prompts: {error}') from error
        return self._render(given if given[0]['role'] == 'system' else self._start + given)

    def _render(self, messages: list[dict]) -> str:
        try:
            return self._chat.render(messages, add_generation_prompt=True)
        except BadConversation as error:
            raise InputError(f'--chat: {error}') from error
