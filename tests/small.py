"""A small config and random packed batches for tests."""

import numpy as np

from transxssm_jax import config as config_lib
from transxssm_jax.model.loss import IGNORED


def small_config(**overrides) -> config_lib.Config:
    """Two modules of (ssd, ssd, attention, ssd), float32; overrides by dotted name with _ for the first dot."""
    config = config_lib.Config(
        model=config_lib.Model(
            vocab_size=96,
            d_model=64,
            num_layers=8,
            num_heads=4,
            num_kv_heads=2,
            num_ssd_groups=2,
            d_state=16,
            d_mlp=96,
            attention_period=4,
            attention_offset=2,
            dtype='float32',
            remat='none',
            ssd_chunk_size=16,
        ),
        data=config_lib.Data(seq_len=48, global_batch=8),
        optimizer=config_lib.Optimizer(warmup_steps=2, learning_rate=1e-2, z_loss=1e-3),
        train=config_lib.Train(steps=20, loss_chunk_tokens=32),
    )
    for name, value in overrides.items():
        section, _, leaf = name.partition('_')
        setattr(getattr(config, section), leaf, value)
    return config_lib.resolve(config)


def packed_batch(config, seed=0, documents_per_row=3):
    """Rows of random documents, packed, as the loader makes them."""
    rng = np.random.default_rng(seed)
    B, L = config.data.global_batch, config.data.seq_len
    starts = np.sort(rng.integers(1, L, (B, documents_per_row - 1)), axis=1)
    segment_ids = 1 + (np.arange(L)[None, :, None] >= starts[:, None, :]).sum(-1)
    first = np.concatenate([np.ones((B, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    start_of = np.maximum.accumulate(np.where(first, np.arange(L), 0), axis=1)
    tokens = rng.integers(0, config.model.vocab_size, (B, L))
    targets = np.concatenate([np.where(first[:, 1:], IGNORED, tokens[:, 1:]), np.full((B, 1), IGNORED)], axis=1)
    batch = dict(tokens=tokens, targets=targets, segment_ids=segment_ids, positions=np.arange(L) - start_of)
    return {name: value.astype(np.int32) for name, value in batch.items()}
