"""The mixers by their word in model.layer_pattern."""

from transxssm_jax.model.attention import Attention
from transxssm_jax.model.mamba2 import Mamba2
from transxssm_jax.model.ssd import RotarySSD

MIXERS = {'ssd': RotarySSD, 'attention': Attention, 'mamba2': Mamba2}  # the words of config.KINDS


def mixer_of(kind: str):
    """The class of a mixer.

    Raises:
      NotImplementedError: no mixer has this word.
    """
    if kind not in MIXERS:
        raise NotImplementedError(
            f'no mixer is called {kind!r}, only {", ".join(MIXERS)} are; add it to MIXERS in transxssm_jax/model/mixers.py'
        )
    return MIXERS[kind]
