"""
Inference as a user feels it: how good is the continuation of a prompt, and what does a token cost?

    python experiments/inference.py --runs dense=out-dense prior=out self=out-self

1. Loss of the 256 tokens after a prompt of 1 to 512 tokens, in bits per byte, for each run and both ways of
   routing (prompt: once, Sec. 3.1; segment: every T tokens, G.2), on the held-out text of each domain.
2. `specialize`: dense experts of a domain, each made by one call from 1024 tokens of its training text (the
   mean of eight such texts), and the uniform merge, each on the held-out text of every domain.
3. Tokens/s of decoding against dense and against recomputing the context; the cost of routing and merging
   once.

The first run is the baseline of 3, the second one is taken for 2 and 3. Writes experiments/inference.json.
"""
import json
import math
import os
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import prepare
from lory import Lory, add_flag, atomic_open, load_checkpoint, make_parser, run_script
from reroute import ReroutedFFN
from sample import specialize
from train import evaluate, validation_windows

PROMPTS, AFTER = (1, 16, 64, 256, 512), 256


@torch.no_grad()
def continuation(model, windows, token_bytes, P):
    """Bits per byte of tokens P to P + AFTER - 1 of each window (n, >= P + AFTER), read after its first
    P tokens."""
    logits, _, caches = model.prefill(windows[:, :P])
    nats, size = 0.0, 0
    for t in range(P, P + AFTER):
        target, bytes_ = windows[:, t], token_bytes[windows[:, t]]  # (n,) both
        nats += F.cross_entropy(logits, target, reduction='none')[bytes_ > 0].sum().item()
        size += bytes_.sum().item()
        logits = model.decode(target, caches)
    return nats / math.log(2) / size


def seconds(f, repeat):
    """Median time of a call."""
    times = []
    for _ in range(repeat):
        t0 = time.perf_counter()
        f()
        times.append(time.perf_counter() - t0)
    return statistics.median(times)


@torch.no_grad()
def speed(dense, model, rounds=9, n=64):
    """Medians over alternating rounds, one sequence, after a prompt of 512 tokens."""
    idx, x = torch.randint(dense.config.vocab_size, (1, 512)), torch.randn(1, 1, model.config.n_embd)
    models = dict(dense=dense, lory=model)
    times = {name: [] for name in models}

    def decode(name, caches):
        for _ in range(n):
            models[name].decode(idx[:, 0], caches)

    def route_and_merge():
        for block in model.blocks:
            block.ffn.merge_experts(block.ffn.routing_weights(x))
    for _ in range(rounds):
        for name in models:
            caches = models[name].prefill(idx)[2]
            times[name].append(seconds(lambda: decode(name, caches), 1) / n)
    token_s = {name: statistics.median(t) for name, t in times.items()}
    whole = seconds(lambda: model(idx)[0][:, -1], 15)
    return dict(dense_tok_s=1 / token_s['dense'], lory_tok_s=1 / token_s['lory'],
                lory_of_dense=statistics.median(d / m for d, m in zip(times['dense'], times['lory'])),
                recompute_s_over_decode_s=whole / token_s['lory'],
                route_and_merge_s_over_decode_s=seconds(route_and_merge, 50) / token_s['lory'])


def continuations(models, data, token_bytes, limit):
    """1. The table of prompts, printed. -> its rows"""
    held_out = validation_windows(data.val, data.meta['domains'], max(PROMPTS) + AFTER, limit)
    held_out = {d: torch.from_numpy(np.stack(w).astype(np.int64)) for d, w in held_out.items()}
    print(f'1. bits per byte of the {AFTER} tokens after a prompt of P tokens')
    print(f'{"model":8}{"routing":10}{"P":>4}  ' + ''.join(f'{d:>9}' for d in held_out) + f'{"mean":>9}')
    rows = []
    for name, model in models.items():
        ways = dict(prompt=model)
        if model.config.n_experts > 1:
            ways['segment'] = Lory(model.config, ffn=ReroutedFFN).eval()
            ways['segment'].load_state_dict(model.state_dict())
        for routing, m in ways.items():
            for P in PROMPTS:
                bpb = {d: continuation(m, w, token_bytes, P) for d, w in held_out.items()}
                bpb['mean'] = statistics.mean(bpb.values())
                rows.append(dict(model=name, routing=routing, P=P, **bpb))
                print(f'{name:8}{routing if model.config.n_experts > 1 else "-":10}{P:4}  '
                      + ''.join(f'{b:9.4f}' for b in bpb.values()))
    return rows


def specialized(dense, model, data, token_bytes):
    """2. The table of dense experts, printed. -> {expert: {domain: bits per byte}}"""
    windows = validation_windows(data.val, data.meta['domains'], 512, 32)

    def by_domain(m):
        figures = evaluate(m, windows, token_bytes, 16, torch.autocast('cpu', enabled=False))[0]
        return {d: figures[f'bpb_{d}'] for d in windows}
    experts = {}
    for domain in windows:
        each, docs = [], np.flatnonzero(data.train.domain == data.meta['domains'].index(domain))
        for first in docs[100:900:100]:  # eight texts of 1024 tokens
            start = data.train.start[first]
            prompt = torch.from_numpy(data.train.tokens[start:start + 1024].astype(np.int64))[None]
            each.append(by_domain(specialize(model, prompt)))
        experts[f'of {domain}'] = {d: statistics.mean(bpb[d] for bpb in each) for d in windows}
    uniform = specialize(model, prompt)
    mean = {name: p.mean(0, keepdim=True) if p.dim() == 3 else p for name, p in model.state_dict().items()}
    uniform.load_state_dict(uniform.fitted(mean), strict=False)
    experts |= {'uniform': by_domain(uniform), 'all, routed': by_domain(model), 'dense run': by_domain(dense)}
    print('\n2. dense experts: bits per byte on each domain')
    print(f'{"expert":14}' + ''.join(f'{d:>9}' for d in windows))
    for name, bpb in experts.items():
        print(f'{name:14}' + ''.join(f'{b:9.4f}' for b in bpb.values()))
    return experts


def main():
    parser = make_parser(__doc__)
    parser.add_argument('--runs', nargs='+', default=['dense=out-dense', 'prior=out', 'self=out-self'],
                        metavar='NAME=FOLDER', help='the runs to compare (default: %(default)s)')
    add_flag(parser, 'dataset', 'builtin', 'folder under data/ that prepare.py made')
    add_flag(parser, 'windows', 32, 'of each domain, evenly spaced', low=1)
    args = parser.parse_args()
    models = {name: load_checkpoint(f'{path}/ckpt.pt')[0] for name, path in (r.split('=') for r in args.runs)}
    data = prepare.load_dataset(f'data/{args.dataset}', 1024)
    token_bytes = torch.tensor(prepare.token_bytes(data.tokenizer))  # (V,)
    dense, model = list(models.values())[:2]
    result = dict(torch=torch.__version__, threads=torch.get_num_threads(), runs=args.runs,
                  continuation=continuations(models, data, token_bytes, args.windows),
                  specialize=specialized(dense, model, data, token_bytes), speed=speed(dense, model))
    print('\n3. speed, one sequence in float32')
    for name, value in result['speed'].items():
        print(f'{name:34}{value:10.3f}')
    with atomic_open(f'{HERE}/inference.json', 'w') as f:
        json.dump(result, f, indent=1)


if __name__ == '__main__':
    run_script(main)
