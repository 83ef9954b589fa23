"""The same model in PyTorch, measured: bench --peers starts this program once for every case.

    echo '{"config": ..., "mode": "train", "length": 4096, "rows": 8, "calls": 8, "repeats": 5}' |
        python -m transxssm_jax.evals.pytorch_peer

The model is the one that exports are loaded with, pytorch/modeling_transxssm.py, with random weights: float32 parameters,
bfloat16 products (autocast), fused attention, mamba_ssm's Triton scan where that package is installed, torch.compile, fused
AdamW, gradients clipped by their norm, nothing computed again in the backward pass. It is a process of its own, because
PyTorch and JAX each take the GPU's memory. Needs torch and transformers.

Prints one line of JSON: 'ms', 'least_ms', 'most_ms', 'tokens_per_second', 'compile_seconds', 'memory_gib' (the most that
was allocated), 'scan' ('mamba_ssm' or 'plain') and 'torch' (its version); or 'does_not_fit'.
"""

import json
import statistics
import sys

from transxssm_jax import children
from transxssm_jax import config as config_lib
from transxssm_jax.cli import MissingPackageError, UserError
from transxssm_jax.evals import speed

MODES = ('train', 'forward')


class PeerError(UserError):
    """PyTorch could not run the model."""


def measure(case: dict) -> dict:
    """Runs the program for one case and returns what it printed.

    Raises:
      MissingPackageError: torch or transformers is not installed.
      PeerError: it failed, with its last line.
    """
    done = children.run([sys.executable, '-m', 'transxssm_jax.evals.pytorch_peer'], input=json.dumps(case))
    if done.returncode == MissingPackageError.exit_code:
        raise MissingPackageError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
        raise PeerError(f'--peers: PyTorch could not run the model ({last}); leave the flag out')
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    case = json.load(sys.stdin)
    try:
        import torch
        import transformers  # noqa: F401, which the model's file needs
    except ImportError as error:
        print(f'--peers needs torch and transformers ({error}): pip install torch transformers', file=sys.stderr)
        return MissingPackageError.exit_code
    try:
        result = _measure(torch, case)
    except torch.cuda.OutOfMemoryError as error:
        result = {'does_not_fit': str(error).splitlines()[0]}
    print(json.dumps(result))
    return 0


def _measure(torch, case: dict) -> dict:
    from transxssm_jax.pytorch import modeling_transxssm as modeling
    from transxssm_jax.pytorch import scan_transxssm
    from transxssm_jax.pytorch.transformers_fields import fields_of

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    config = config_lib.from_json(case['config'].encode())
    torch.manual_seed(0)
    model = modeling.TransXSSMForCausalLM(modeling.TransXSSMConfig(**fields_of(config, 'float32'))).to(device)
    compiled = torch.compile(model)
    ids = speed.random_ids(config.model.vocab_size, (case['rows'], case['length']))
    tokens = torch.from_numpy(ids).to(device, torch.int64)
    call = _training(torch, model, compiled, tokens) if case['mode'] == 'train' else _forward(torch, compiled, tokens)

    def synchronize():
        if device == 'cuda':
            torch.cuda.synchronize()

    first, times = speed.times_of(call, case['calls'], case['repeats'], wait=lambda _: synchronize())
    found = speed.rates(times, tokens.numel()) | {
        'compile_seconds': first - statistics.median(times),
        'scan': 'plain' if device == 'cpu' or scan_transxssm.mamba_chunk_scan_combined is None else 'mamba_ssm',
        'torch': torch.__version__,
    }
    return found | ({'memory_gib': torch.cuda.max_memory_allocated() / 2**30} if device == 'cuda' else {})


def _training(torch, model, compiled, tokens):
    device = tokens.device.type
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=device == 'cuda'
    )
    model.train()

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _forward(torch, compiled, tokens):
    def forward():
        with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16):
            return compiled(tokens, labels=tokens, use_cache=False).loss

    return forward


if __name__ == '__main__':
    children.stop_with_parent()
    sys.exit(main())
