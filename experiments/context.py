"""
Which tokens a model gains on, in held-out text and in training text, told apart by what stands before
them in their window of 1024 tokens.

    python experiments/context.py                       the finished runs of claims.py that PAIRS names

*Repeated* or *new*: has this token followed its predecessor before in the window? Then attention alone
can copy it (induction heads, arXiv:2209.11895). *Alone* or *after*: does another document stand before
its own in the window?

A run that stands in experiments/context.json is not measured again; others are looked for in runs/.
Prints nats a token of each kind, first model -> second, and writes experiments/context.json.
"""
import json
import os
import sys

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import prepare
from claims import commit, seeds_of
from inside import batches, nats
from lory import atomic_open, load_checkpoint, make_parser, run_script

PAIRS = {
    'dense -> 8 experts, 2.5 times the text': ('dense-big', 'e8-big'),
    'dense -> 8 experts, 4 layers, half as long': ('dense-half-4-layers', 'e8-half-4-layers'),
    'dense -> 8 experts, T = 256, 4 layers, half as long': ('dense-half-4-layers', 'e8-half-T256-4-layers'),
    'dense -> 8 experts, 4 layers': ('dense-4-layers', 'e8-4-layers'),
    'chained -> shuffled, 8 experts, T = 512': ('e8-T512', 'e8-T512-shuffled'),
}
KINDS = ('repeated', 'new', 'alone', 'after')


def repeated(x, y):
    """Which pairs (x, y) of a window stood earlier in it. (B, L), (B, L) -> (B, L)"""
    result = np.zeros(x.shape, bool)
    for row, pairs in enumerate(zip(x.tolist(), y.tolist())):
        seen = set()
        for t, pair in enumerate(zip(*pairs)):
            result[row, t] = pair in seen
            seen.add(pair)
    return torch.from_numpy(result)


def measure(model, ckpt):
    """-> nats a token of each of KINDS in held-out text, and in as much training text: {text: {kind:
    nats}}"""
    L = model.config.block_size
    data = prepare.load_dataset(f'data/{ckpt["args"]["dataset"]}', L)
    result, n = {}, (len(data.val.tokens) - 1) // L
    for text, tokens in (('held out', data.val.tokens), ('training', data.train.tokens)):
        losses, again, alone = [], [], []
        starts = np.linspace(0, len(tokens) - L - 1, n).astype(int)
        for x, y in batches([tokens[i:i + L + 1] for i in starts]):
            losses.append(nats(model, x, y)[0])
            again.append(repeated(x, y))
            begun = (x == data.meta['eot']).cumsum(1)  # documents that have begun in this window
            alone.append(begun == begun[:, :1])
        losses, again, alone = map(torch.cat, (losses, again, alone))  # (n, L) each
        result[text] = {kind: losses[chosen].mean().item()
                        for kind, chosen in zip(KINDS, (again, ~again, alone, ~alone))}
    return result


def main():
    make_parser(__doc__).parse_args()
    path, results = f'{HERE}/context.json', {}
    if os.path.exists(path):
        with open(path) as f:
            results = json.load(f)
    print('| | seed | text | ' + ' | '.join(KINDS) + ' |\n|' + '---|' * (len(KINDS) + 3))
    for name, pair in PAIRS.items():
        for seed in seeds_of(pair[0].replace('-', ' ')):
            runs = [f'{group}-{seed}' for group in pair]
            for run in runs:
                if run not in results and os.path.exists(f'runs/{run}/ckpt.pt'):
                    model, ckpt = load_checkpoint(f'runs/{run}/ckpt.pt')
                    if ckpt['step'] == ckpt['args']['max_iters']:
                        results[run] = measure(model, ckpt) | {'commit': commit()}
            # An older run names no commit, and is not compared with a present one.
            ages = ['commit' in results[run] for run in runs if run in results]
            for text in ('held out', 'training') if ages in ([False] * 2, [True] * 2) else ():
                cells = ' | '.join(' -> '.join(f'{results[run][text][kind]:.3f}' for run in runs)
                                   for kind in KINDS)
                print(f'| {name} | {seed} | {text} | {cells} |', flush=True)
    with atomic_open(path, 'w') as f:
        json.dump(results, f, indent=1)


if __name__ == '__main__':
    run_script(main)
