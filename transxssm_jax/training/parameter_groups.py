"""The groups of parameters that `optimizer.groups` gives a learning rate and a weight decay of their own.

| group         | parameters                                                                          | decays |
| `matrices`    | kernels of linear maps, but for that of dt                                          | yes    |
| `embedding`   | the embedding, and the head where it is not tied                                    | yes    |
| `dt`          | the time scale of the state-space layers: the map of dt and its biases, and `a_log` | the map |
| `norms`       | scales of norms                                                                     | no     |
| `residuals`   | weights of the learned residuals                                                    | no     |
| `convolution` | kernels and biases of short convolutions                                            | the kernels |
| `biases`      | all other biases, and `d_skip`                                                      | no     |

Each parameter is in one group. Without an entry in `optimizer.groups`, its factor is 1, and what decays does so by
`optimizer.weight_decay`; an entry with a decay holds for every parameter of its group.
"""

import jax

from transxssm_jax.config_optimizer import Optimizer

DECAYED = ('kernel', 'embedding', 'head')  # matrices; never norms, biases, a_log, dt_bias or learned residuals

_BY_LAST_NAME = {
    'embedding': 'embedding',
    'head': 'embedding',
    'a_log': 'dt',
    'dt_bias': 'dt',
    'scale': 'norms',
    'weight': 'residuals',
    'bias': 'biases',
    'd_skip': 'biases',
}


def group_of(path) -> str:
    """The group of a parameter, from its path of DictKeys."""
    names = [key.key for key in path]
    if 'dt' in names:
        return 'dt'
    if 'conv' in names:
        return 'convolution'
    return _BY_LAST_NAME.get(names[-1], 'matrices')


def groups(params):
    """Tree like params of the names of their groups."""
    return jax.tree_util.tree_map_with_path(lambda path, _: group_of(path), params)


def decay_mask(params):
    """Tree of bool like params: whether the usual weight decay applies."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def without_parameters(optimizer: Optimizer, params) -> list[str]:
    """Groups of `optimizer.groups` to which no parameter of a model belongs."""
    return sorted(set(optimizer.of_group) - set(jax.tree.leaves(groups(params))))


def factors(optimizer: Optimizer, params):
    """Tree of float like params: what the learning rate of each is multiplied by."""
    of_group = optimizer.of_group
    return jax.tree.map(lambda group: of_group[group][0] if group in of_group else 1.0, groups(params))


def decays(optimizer: Optimizer, params):
    """Tree of float like params: the weight decay of each, before the learning rate."""
    of_group = optimizer.of_group

    def decay(group, is_decayed):
        usual = optimizer.weight_decay if is_decayed else 0.0
        own = of_group[group][1] if group in of_group else None
        return usual if own is None else own

    return jax.tree.map(decay, groups(params), decay_mask(params))
