"""modeling_transxssm.py in PyTorch, with -m torch: padding, caches, and what other libraries hand to a model.

pip install torch transformers && python -m pytest -m torch tests/test_transformers_model.py
"""

import exported_models
import numpy as np
import pytest
from exported_models import TOKENS, export


@pytest.fixture(scope='module')
def transformers():
    pytest.importorskip('transformers', reason='pip install torch transformers')
    return exported_models.library()


@pytest.mark.torch
@pytest.mark.parametrize('name', ['convolution, biases, untied', 'jamba'])
def test_padding_anywhere_moves_nothing_in_pytorch(tmp_path, transformers, name):
    """Before, between and behind tokens of a row that comes in two calls with one cache: logits are those without it."""
    import torch

    model, _ = exported_models.load(export(tmp_path, name))
    row = TOKENS[0]
    is_token = np.ones((3, 36), np.int64)
    is_token[0, 24:] = is_token[1, :12] = is_token[2, [0, 1, 5, 6, 7, 16, 17, 18, 19, 20, 30, 35]] = 0
    ids = np.full(is_token.shape, 5)
    for padded_row, mask in zip(ids, is_token):
        padded_row[mask == 1] = row
    wanted = exported_models.logits(model, TOKENS)[0]
    mask = torch.from_numpy(is_token)
    whole = exported_models.logits(model, ids, attention_mask=mask)
    with torch.no_grad():
        first = model(torch.from_numpy(ids[:, :19]), attention_mask=mask[:, :19], use_cache=True)
        cache = first.get('cache') or first.past_key_values
        second = model(torch.from_numpy(ids[:, 19:]), attention_mask=mask, cache=cache)
    for found in (whole, torch.cat([first.logits, second.logits], dim=1).numpy()):
        for logits, of_row in zip(found, is_token):
            np.testing.assert_allclose(logits[of_row == 1], wanted, atol=1e-4)


@pytest.mark.torch
def test_pytorch_keeps_its_cache_where_hooks_copy_what_a_layer_is_given(tmp_path, transformers):
    """As those of accelerate do, which move the inputs of a layer to its device: a dict among them becomes another."""
    model, _ = exported_models.load(export(tmp_path, 'jamba'))
    wanted = exported_models.greedy(model, TOKENS).tolist()

    def copied(value):
        return {name: copied(entry) for name, entry in value.items()} if isinstance(value, dict) else value

    for module in model.modules():
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (tuple(map(copied, args)), copied(kwargs)), with_kwargs=True
        )
    assert exported_models.greedy(model, TOKENS).tolist() == wanted


@pytest.mark.torch
def test_pytorch_takes_what_peft_passes_and_refuses_what_is_not_computed(tmp_path, transformers):
    import torch

    model, _ = exported_models.load(export(tmp_path, 'wide state'))
    tokens = torch.from_numpy(TOKENS)
    passed = dict(inputs_embeds=None, output_attentions=None, output_hidden_states=False)
    assert torch.equal(model(tokens, **passed).logits, model(tokens).logits)
    with pytest.raises(ValueError, match='output_hidden_states is not computed by this model; leave it out'):
        model(tokens, output_hidden_states=True)
    whole = model(tokens).logits
    for keep, places in ((2, [22, 23]), (torch.tensor([3, 7]), [3, 7])):
        torch.testing.assert_close(model(tokens, logits_to_keep=keep).logits, whole[:, places])
