"""
Where experts gain and where they do not: on what is new in a window, and on what can be copied from earlier in it.

    python experiments/copying.py                       the finished runs of claims.py with two layers (big) and with four

A run that stands in experiments/copying.json is not measured again; others are looked for in runs/.

A held-out token counts as *repeated* if it has followed its predecessor before in its window of 1024 tokens: attention
alone can copy it (induction heads, arXiv:2209.11895). All others are *new*. Prints nats a token of each kind, and writes
experiments/copying.json.
"""
import argparse
import json
import os
import sys

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
sys.path.insert(0, HERE)
import prepare
from claims import SEEDS
from inside import batches, nats
from lory import UserError, atomic_open, load_checkpoint

PAIRS = {'2 layers': ('dense-big', 'e8-big'), '4 layers': ('dense-half-4-layers', 'e8-half-4-layers')}


def repeated(x, y):
    """Which pairs (x, y) of a window stood earlier in it. (B, L), (B, L) -> (B, L)"""
    result = np.zeros(x.shape, bool)
    for row, pairs in enumerate(zip(x.tolist(), y.tolist())):
        seen = set()
        for t, pair in enumerate(zip(*pairs)):
            result[row, t] = pair in seen
            seen.add(pair)
    return torch.from_numpy(result)


def measure(run):
    """-> nats of repeated tokens, of new ones, and the share of the repeated"""
    model, ckpt = load_checkpoint(f'runs/{run}/ckpt.pt')
    if ckpt['step'] < ckpt['args']['max_iters']:
        raise UserError(f'runs/{run} is not finished: python experiments/claims.py goes on with it.')
    L = model.config.block_size
    tokens = prepare.load_dataset(f'data/{ckpt["args"]["dataset"]}', L).val.tokens
    losses, again = [], []
    for x, y in batches([tokens[i:i + L + 1] for i in range(0, len(tokens) - L, L)]):
        losses.append(nats(model.eval(), x, y)[0])
        again.append(repeated(x, y))
    losses, again = torch.cat(losses), torch.cat(again)              # (n, L) both
    return dict(repeated=losses[again].mean().item(), new=losses[~again].mean().item(), share=again.float().mean().item())


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path, results = f'{HERE}/copying.json', {}
    if os.path.exists(path):
        with open(path) as f:
            results = json.load(f)
    print('| | seed | repeated: dense | 8 experts | new: dense | 8 experts |\n|---|---|---|---|---|---|')
    for name, pair in PAIRS.items():
        for seed in SEEDS:
            runs = [f'{kind}-{seed}' for kind in pair]
            for run in runs:
                if run not in results and os.path.exists(f'runs/{run}/ckpt.pt'):
                    results[run] = measure(run)
            if all(run in results for run in runs):
                cells = ' | '.join(f'{results[run][part]:.3f}' for part in ('repeated', 'new') for run in runs)
                print(f'| {name} | {seed} | {cells} |', flush=True)
    with atomic_open(path, 'w') as f:
        json.dump(results, f, indent=1)


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        print(f'copying.py: {e}', file=sys.stderr)
        sys.exit(2)
