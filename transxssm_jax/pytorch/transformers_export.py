"""Export of a run as a directory that the transformers library loads.

layout 'transformers': with modeling_transxssm.py beside the weights, for AutoModelForCausalLM with trust_remote_code=True.
layout 'llama': as LlamaForCausalLM, which needs no code, of a model of attention alone whose learned residuals are 1.

One stacked array of ours is in memory at a time. Parameters have their bits, in float32; in bfloat16 matrices are rounded and
all else stays float32.
"""

import json
import pathlib

import numpy as np
import tqdm

from transxssm_jax import config as config_lib
from transxssm_jax.data.vocabulary import check_tokenizer
from transxssm_jax.pytorch import transformers_fields as fields_lib
from transxssm_jax.pytorch import transformers_tensors as tensors_lib
from transxssm_jax.pytorch.conversion import check_output, read_array
from transxssm_jax.pytorch.fields import ConvertError
from transxssm_jax.pytorch.files import Writer
from transxssm_jax.pytorch.model_card import write_card
from transxssm_jax.pytorch.tensors import shapes_of
from transxssm_jax.pytorch.tokenizer_files import CHAT_TEMPLATE, files_for_transformers, tokenizer_for_export
from transxssm_jax.training import checkpoint, run_reference

LAYOUTS = ('transformers', 'llama')
CODE = [pathlib.Path(__file__).with_name(f'{name}.py') for name in (fields_lib.MODELING, 'scan_transxssm')]
CARD, GENERATION = 'README.md', 'generation_config.json'


def export_transformers(
    workdir: pathlib.Path | str,
    out: pathlib.Path | str,
    *,
    layout: str = 'transformers',
    step: int = -1,
    weights: str = 'trained',
    tokenizer: str = '',
    max_shard_bytes: int = 5 * 10**9,
    dtype: str = 'float32',
    overrides: dict[str, str] | None = None,
) -> list[str]:
    """Writes the parameters of a checkpoint, with all that the transformers library reads.

    Args:
      layout: one of LAYOUTS.
      workdir, out, step, weights, tokenizer, max_shard_bytes, dtype, overrides: as of `conversion.export_pytorch`.

    Returns:
      Notes on what was left out.

    Raises:
      ConvertError, ConfigError, DataError, checkpoint.CheckpointError: one line.
    """
    (workdir, step), out = run_reference.resolve(workdir, step), pathlib.Path(out)
    is_llama = layout == 'llama'
    check_output(out, (CARD, GENERATION, CHAT_TEMPLATE, *(file.name for file in CODE)))
    params, config = checkpoint.find_params(workdir, step, weights)
    config = config_lib.replace(config, overrides or {})
    model, notes = config.model, []
    fields = (fields_lib.llama_fields_of if is_llama else fields_lib.fields_of)(config, dtype)
    tensors = (tensors_lib.llama_tensors if is_llama else tensors_lib.own_tensors)(model)
    if is_llama:
        _check_residuals(params, model)
    files, ids = {}, {}
    loaded = tokenizer_for_export(tokenizer, config, notes)
    if loaded:
        name = tokenizer or config.data.tokenizer_path
        check_tokenizer(loaded, model.vocab_size, f'tokenizer {name}')
        ids = {'bos_token_id': loaded.begin_id, 'eos_token_id': loaded.eos_id, 'pad_token_id': loaded.eos_id}
        files |= files_for_transformers(name, loaded, config.data.seq_len)
    files['config.json'] = _as_json(fields | ids)
    files[GENERATION] = _as_json({'_from_model_config': False, 'use_cache': True} | ids)
    # The number that a checkpoint's directory has, for step may be -1.
    taken = int(params.parent.name)
    card = write_card(workdir, out.absolute().name, config, taken, is_llama=is_llama, has_tokenizer=loaded is not None)
    files[CARD] = card.encode()
    if not is_llama:
        files |= {file.name: file.read_bytes() for file in CODE}
    out.mkdir(parents=True, exist_ok=True)
    with (
        Writer(out, list(tensors.values()), max_shard_bytes, dtype, 'float32') as writer,
        tqdm.tqdm(total=len(tensors), desc='export', unit=' tensors', disable=None) as bar,
    ):
        for path in shapes_of(model):
            own = [tensor for tensor in tensors.values() if tensor.path == path]
            array = read_array(params, path) if own else None
            for tensor in own:
                writer.write(tensor, tensor.from_ours(array[tensor.index]))
                bar.update()
            del array
    for name, content in files.items():
        (out / name).write_bytes(content)
    return notes


def _check_residuals(params: pathlib.Path, model: config_lib.Model) -> None:
    """Raises ConvertError where a learned residual is not 1: no matrix of a Llama can take its place behind the norm."""
    for path in shapes_of(model):
        if '/'.join(path[2:]) in tensors_lib.RESIDUALS and (off := np.abs(read_array(params, path) - 1).max()):
            raise ConvertError(
                f'{"/".join(path)} has learned residual weights (up to {off:.2g} away from 1), which have no place in Llama; '
                'leave --layout=llama out'
            )


def _as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + '\n').encode()
