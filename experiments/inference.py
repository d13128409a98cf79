"""
Inference as a user feels it: how good is the continuation of a prompt, and what does a token cost?

    python experiments/inference.py --runs dense=out-dense prior=out self=out-self

1. Loss of the 256 tokens after a prompt of 1 to 512 tokens, in bits per byte, for each run and both ways of routing
   (prompt: once, Sec. 3.1; segment: every T tokens, G.2), on the held-out text of each domain.
2. `specialize`: dense experts of a domain, each made by one call from 1024 tokens of its training text (the mean of eight
   such texts), and the uniform merge, each on the held-out text of every domain.
3. Tokens/s of decoding against dense and against recomputing the context; the cost of routing and merging once.

The first run is the baseline of 3, the second one is taken for 2 and 3. Writes experiments/inference.json.
"""
import argparse
import base64
import json
import math
import os
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import prepare
from lory import UserError, atomic_open, load_checkpoint
from train import evaluate, validation_windows

HERE = os.path.dirname(os.path.abspath(__file__))
PROMPTS, AFTER = (1, 16, 64, 256, 512), 256


@torch.no_grad()
def continuation(model, windows, token_bytes, P, routing):
    """Bits per byte of tokens P .. P + AFTER - 1 of each window (n, >= P + AFTER), read after its first P tokens."""
    logits, _, cache = model.prefill(windows[:, :P], routing == 'segment')
    nats, size = 0.0, 0
    for t in range(P, P + AFTER):
        target, bytes_ = windows[:, t], token_bytes[windows[:, t]]
        nats += F.cross_entropy(logits, target, reduction='none')[bytes_ > 0].sum().item()
        size += bytes_.sum().item()
        logits = model.decode(target, torch.full_like(target, t), cache)
    return nats / math.log(2) / size


def seconds(f, repeat):
    times = []
    for _ in range(repeat):
        t0 = time.perf_counter()
        f()
        times.append(time.perf_counter() - t0)
    return statistics.median(times)


@torch.no_grad()
def speed(dense, model, rounds=9, n=64):
    """Medians over alternating rounds, one sequence, after a prompt of 512 tokens."""
    idx, one = torch.randint(dense.config.vocab_size, (1, 512)), torch.tensor([512])
    caches = {name: m.prefill(idx)[2] for name, m in (('dense', dense), ('lory', model))}
    token = idx[:, 0]
    steps = dict(dense=lambda: [dense.decode(token, one + i, caches['dense']) for i in range(n)],
                 lory=lambda: [model.decode(token, one + i, caches['lory']) for i in range(n)])
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, f in steps.items():
            times[name].append(seconds(f, 1) / n)
    x = torch.randn(1, 512, model.config.n_embd)

    def route_and_merge():
        for block in model.blocks:
            block.ffn.merged(block.ffn.weights(x.mean(1)))
    token_s = {name: statistics.median(t) for name, t in times.items()}
    whole = seconds(lambda: model(idx)[0][:, -1], 15)
    return dict(dense_tok_s=1 / token_s['dense'], lory_tok_s=1 / token_s['lory'],
                lory_of_dense=statistics.median(d / m for d, m in zip(times['dense'], times['lory'])),
                recompute_s_over_decode_s=whole / token_s['lory'],
                route_and_merge_s_over_decode_s=seconds(route_and_merge, 50) / token_s['lory'])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', nargs='+', default=['dense=out-dense', 'prior=out', 'self=out-self'])
    parser.add_argument('--dataset', default='builtin')
    parser.add_argument('--windows', type=int, default=32, help='of each domain, evenly spaced')
    args = parser.parse_args()
    models = {name: load_checkpoint(f'{path}/ckpt.pt')[0].eval() for name, path in (r.split('=') for r in args.runs)}
    data = prepare.load_dataset(f'data/{args.dataset}', 1024)
    size = [len(base64.b64decode(t)) for t in data.tokenizer['tokens']]
    token_bytes = torch.tensor(size + [0] * (data.meta['vocab_size'] - len(size)))
    domains = data.meta['domains']
    held_out = validation_windows(data.val, len(domains), max(PROMPTS) + AFTER, args.windows)
    batches = [torch.from_numpy(np.stack(w).astype(np.int64)) for w in held_out]
    result = dict(torch=torch.__version__, threads=torch.get_num_threads(), runs=args.runs, continuation=[])

    print(f'1. bits per byte of the {AFTER} tokens after a prompt of P tokens')
    print(f'{"model":8}{"routing":10}{"P":>4}  ' + ''.join(f'{d:>9}' for d in domains) + f'{"mean":>9}')
    for name, model in models.items():
        for routing in ['prompt', 'segment'] if model.config.n_experts > 1 else ['prompt']:
            for P in PROMPTS:
                bpb = [continuation(model, b, token_bytes, P, routing) for b in batches]
                result['continuation'].append(dict(model=name, routing=routing, P=P, **dict(zip(domains, bpb)),
                                                   mean=statistics.mean(bpb)))
                print(f'{name:8}{routing if model.config.n_experts > 1 else "-":10}{P:4}  '
                      + ''.join(f'{b:9.4f}' for b in [*bpb, statistics.mean(bpb)]))

    dense, model = list(models.values())[:2]
    windows = validation_windows(data.val, len(domains), 512, 32)
    settings = argparse.Namespace(batch_size=16, gradient_accumulation_steps=1, segment_len=256)

    def by_domain(m):
        s = evaluate(m, windows, token_bytes, settings, 'cpu', torch.autocast('cpu', enabled=False))[0][:, 0]
        return (s[:, 0] / s[:, 2] / math.log(2)).tolist()
    print('\n2. dense experts: bits per byte on each domain')
    experts = {}
    for d, domain in enumerate(domains):
        each = []
        for first in np.flatnonzero(data.train.domain == d)[100:900:100]:              # eight texts of 1024 tokens
            start = data.train.start[first]
            prompt = torch.from_numpy(data.train.tokens[start:start + 1024].astype(np.int64))[None]
            each.append(by_domain(model.specialize(prompt)))
        experts[f'of {domain}'] = [statistics.mean(bpb) for bpb in zip(*each)]
    uniform = model.specialize(prompt)
    for ours, theirs in zip(uniform.blocks, model.blocks):
        for part in ('gate', 'up', 'down'):
            getattr(ours.ffn, part).data = getattr(theirs.ffn, part).data.mean(0, keepdim=True)
    experts |= {'uniform': by_domain(uniform), 'all, routed': by_domain(model), 'dense run': by_domain(dense)}
    print(f'{"expert":14}' + ''.join(f'{d:>9}' for d in domains))
    for name, bpb in experts.items():
        print(f'{name:14}' + ''.join(f'{b:9.4f}' for b in bpb))
    result['specialize'] = {name: dict(zip(domains, bpb)) for name, bpb in experts.items()}

    result['speed'] = speed(dense, model)
    print('\n3. speed, one sequence in float32')
    for name, value in result['speed'].items():
        print(f'{name:34}{value:10.3f}')
    with atomic_open(f'{HERE}/inference.json', 'w') as f:
        json.dump(result, f, indent=1)


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        print(f'inference.py: {e}', file=sys.stderr)
        sys.exit(2)
