"""
Inside trained Lorys: what the experts specialise in, how evenly they are used, and what segment 1 sees ahead.

    python experiments/inside.py                        the runs of claims.py: e8, e8 half (self), all seeds

A run that stands in experiments/inside.json is not measured again. In float32, as claims.py trains.

For each run, on held-out text: mean routing weights by layer and domain (Fig. 6, 11); how well the
weights alone tell the domain of an unseen document; what each domain loses when one expert is taken
away; the entropy of the weights and the experts in use within 10 training steps (App. G.1); and the
loss in segment 1 by position, as reported and honest, each prefix on its own. Writes
experiments/inside.json and assets/inside.png.
"""
import json
import math
import os
import sys
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import prepare
from claims import SEEDS, commit
from lory import LoryFFN, UserError, atomic_open, load_checkpoint, make_parser, run_script
from train import get_batch, to_xy, validation_windows

GROUPS = ('e8', 'e8-half', 'e8-half-self')


@torch.no_grad()
def nats(model, x, y):
    """(B, L) tokens -> loss of each, (B, L), and routing weights (B, n_layer, N, E)."""
    logits, _, e = model(x, return_routing=True)
    return F.cross_entropy(logits.transpose(1, 2), y, reduction='none'), e


def batches(windows, size=16):
    for i in range(0, len(windows), size):
        yield to_xy(windows[i:i + size], 'cpu')


def perplexity(model, windows):
    losses = [nats(model, x, y)[0].flatten() for x, y in batches(windows)]
    return torch.cat(losses).mean().exp().item()


def by_domain(model, windows):
    """Mean routing weights of the segments after the first, (n_domains, n_layer, E)."""
    weights = [[nats(model, x, y)[1][:, :, 1:].mean(2) for x, y in batches(w)] for w in windows]
    return torch.stack([torch.cat(w).mean(0) for w in weights])


def document_weights(model, split, limit, seed=0):
    """The routing weights that each of up to `limit` documents of at least a segment gets on its own,
    all layers side by side, (n_docs, n_layer * E), and their domains."""
    T, rows, domains = model.config.segment_len, [], []
    for d in np.random.default_rng(seed).permutation(len(split.domain)):
        tokens = split.tokens[split.start[d]:split.start[d + 1]][:model.config.block_size]
        if len(tokens) <= T:
            continue
        x = torch.from_numpy(tokens.astype(np.int64))[None]
        rows.append(nats(model, x, x)[1][0, :, 1:].mean(1).flatten().numpy())
        domains.append(split.domain[d])
        if len(rows) == limit:
            break
    return np.stack(rows), np.array(domains)


def domain_accuracy(model, data):
    """Logistic regression from routing weights to domain: fitted on training documents, scored on
    held-out ones. -> accuracy, mean over domains (chance is one in n_domains)"""
    x, y = document_weights(model, data.train, 1500)
    x_val, y_val = document_weights(model, data.val, 800)
    guess = LogisticRegression(max_iter=2000, class_weight='balanced').fit(x, y).predict(x_val)
    return float(np.mean([(guess[y_val == d] == d).mean() for d in np.unique(y_val)]))


def without_expert(model, windows):
    """Change of each domain's perplexity in percent when one expert's weight is set to zero and the
    others scaled up to sum to one, layer by layer and expert by expert. (n_layer, E, n_domains)"""
    base = [perplexity(model, w) for w in windows]
    rows = []
    for block in model.blocks:
        for i in range(model.config.n_experts):
            whole = block.ffn.route

            def route(x):
                e = whole(x).clone()
                e[..., i] = 0
                return e / e.sum(-1, keepdim=True)
            block.ffn.route = route
            rows.append([100 * (perplexity(model, w) / b - 1) for w, b in zip(windows, base)])
            del block.ffn.route  # the method of the class again
    return np.array(rows).reshape(len(model.blocks), -1, len(windows)).tolist()


def use(model, data):
    """-> mean entropy of the weights and entropy of the mean weights, both as a share of log E (uniform
    is 1, 1; collapse 0, 0; specialisation low, high), and the share of (layer, expert) pairs above 2/E
    within 10 training steps."""
    config, mean, every, seen = model.config, 0, [], False
    order = Namespace(block_size=config.block_size, seed=0)
    for step in range(10):
        x, y = get_batch(data.train.tokens, 4 * step, 4, order, 'cpu')
        e = nats(model, x, y)[1][:, :, 1:].double()  # (B, n_layer, N - 1, E)
        every.append(-(e * e.clamp(min=1e-30).log()).sum(-1).mean().item())
        mean = mean + e.mean((0, 2)) / 10
        seen = seen | (e > 2 / config.n_experts).any(2).any(0)
    flat, most = -(mean * mean.log()).sum(-1).mean().item(), math.log(config.n_experts)
    return dict(entropy=float(np.mean(every)) / most, entropy_of_mean=flat / most,
                in_use=seen.double().mean().item())


def segment_one(model, windows):
    """Mean loss at each position of segment 1, (T,) each: as the full pass reports it; honest, every
    prefix run on its own; and with the first segment's weights taken from another sequence."""
    T = model.config.segment_len
    x, y = to_xy([w[:T + 1] for w in windows if len(w) > T], 'cpu')
    reported = nats(model, x, y)[0].mean(0)
    honest = torch.stack([nats(model, x[:, :t + 1], y[:, :t + 1])[0][:, -1].mean() for t in range(T)])
    ours = LoryFFN.route
    LoryFFN.route = lambda self, h: torch.cat([ours(self, h)[:, :1].roll(1, 0), ours(self, h)[:, 1:]], 1)
    other = nats(model, x, y)[0].mean(0)
    LoryFFN.route = ours
    return {name: v.tolist() for name, v in (('reported', reported), ('honest', honest), ('other', other))}


def measure(model, ckpt, out):
    data = prepare.load_dataset(f'data/{ckpt["args"]["dataset"]}', model.config.block_size)
    domains = validation_windows(data.val, data.meta['domains'], model.config.block_size, 24)
    windows = list(domains.values())
    result = dict(run=out, commit=commit(), domains=list(domains), routing=by_domain(model, windows).tolist(),
                  domain_accuracy=domain_accuracy(model, data), **use(model, data),
                  segment_one=segment_one(model, sum(windows, [])))
    if 'half' not in out:
        result['without_expert'] = without_expert(model, windows)
    return result


def draw(results):
    """assets/inside.png: routing by domain, what a domain loses without an expert, and segment 1 by
    position."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    first = next(r for r in results if 'without_expert' in r)
    domains, layers = first['domains'], len(first['without_expert'])
    positions = any('self' in r['run'] for r in results)  # prior alone sees nothing ahead: three equal curves
    columns = layers + positions
    fig, ax = plt.subplots(2, columns, figsize=(4 * columns, 5.2), layout='constrained', squeeze=False)
    routing, loss = np.array(first['routing']), np.array(first['without_expert'])
    for layer in range(layers):  # routing (n_domains, n_layer, E), loss (n_layer, E, n_domains)
        for a, image, top, title in ((ax[0, layer], routing[:, layer], routing.max(), 'mean routing weight'),
                                     (ax[1, layer], loss[layer].T, loss.max(), 'perplexity without it, %')):
            shown = a.imshow(image, vmin=0, vmax=top, aspect='auto')
            a.set(title=f'layer {layer + 1}: {title}', xlabel='expert', xticks=range(image.shape[1]),
                  xticklabels=range(1, image.shape[1] + 1), yticks=range(len(domains)), yticklabels=domains)
            fig.colorbar(shown, ax=a)
    for a, kind in zip(ax[:, -1], ('prior', 'self') if positions else ()):
        runs = [r['segment_one'] for r in results
                if 'half' in r['run'] and ('self' in r['run']) == (kind == 'self')]
        for name, style in (('reported', '-'), ('honest', '--'), ('other', ':')):
            curve = np.mean([r[name] for r in runs], 0)
            a.plot(np.arange(4, len(curve), 8), curve.reshape(-1, 8).mean(1), style,
                   marker='.', label={'other': "another window's weights"}.get(name, name))
        a.set(title=f'{kind}: segment 1', xlabel='position', ylabel='nats a token', ylim=(3.2, 4.7))
        a.legend(fontsize=8)
    with atomic_open(f'{ROOT}/assets/inside.png') as f:
        fig.savefig(f, format='png', dpi=100)


def same_document(start, T):
    """Share of the text that routes a token, the segment before the token's own, that is of the token's
    document. With both places uniform in their segments, the distance k between them occurs T - |k - T|
    times, 0 < k < 2T."""
    k = np.arange(1, 2 * T)
    lengths = np.diff(start)
    # Tokens that have one of their document i before them.
    pairs = [np.maximum(lengths - i, 0).sum() for i in k]
    return np.average(pairs, weights=T - abs(k - T)) / lengths.sum()


def main():
    make_parser(__doc__).parse_args()
    path, results = f'{HERE}/inside.json', []
    if os.path.exists(path):
        with open(path) as f:
            results = json.load(f)
    for run in (f'{group}-{seed}' for group in GROUPS for seed in SEEDS):
        if not os.path.exists(f'runs/{run}/ckpt.pt') or run in [r['run'] for r in results]:
            continue
        model, ckpt = load_checkpoint(f'runs/{run}/ckpt.pt')
        if ckpt['step'] < ckpt['args']['max_iters']:
            print(f'{run} is not finished and was left out')
            continue
        results.append(measure(model, ckpt, run))
        with atomic_open(path, 'w') as f:
            json.dump(results, f, indent=1)
    if not any('without_expert' in r for r in results):
        raise UserError("no finished run in runs/: python experiments/claims.py --train e8 'e8 half' "
                        "'e8 half self' makes them.")
    for r in results:
        s = {name: np.mean(curve) for name, curve in r['segment_one'].items()}
        print(f'{r["run"]:14} domain told {r["domain_accuracy"]:.2f} | entropy {r["entropy"]:.2f}, '
              f'of the mean {r["entropy_of_mean"]:.2f} | in use {r["in_use"]:.2f} | segment 1 reported '
              f'{s["reported"]:.3f}, honest {s["honest"]:.3f}, another\'s {s["other"]:.3f}')
    draw(results)
    if os.path.exists('data/builtin/meta.json'):
        start = prepare.load_dataset('data/builtin', 1024).train.start
        print('routed by the same document: '
              + ', '.join(f'T={T} {same_document(start, T):.2f}' for T in (64, 256, 512)))


if __name__ == '__main__':
    run_script(main)
