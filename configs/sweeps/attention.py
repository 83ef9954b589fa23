"""How often there is attention, and where: never, everywhere, and once per period of two sizes.

python -m transxssm_jax.sweep --sweep=attention --config=tiny --output=runs/attention --config.data.path=runs/demo/data
"""

from transxssm_jax.config_sweep import chain, vary

PLACE = ('model.attention_period', 'model.attention_offset')


def get_sweep():
    return chain(
        vary(PLACE, [(0, 0), (1, 0)]),
        vary(PLACE, [(2, offset) for offset in range(2)]),
        vary(PLACE, [(4, offset) for offset in range(4)]),
    )
