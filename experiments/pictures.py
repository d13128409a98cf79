"""
Four pictures that the READMEs show, each computed, none drawn by hand.

    python experiments/pictures.py

    assets/loss.png       a dense run and one with experts, in bits per byte
    assets/causality.png  which logits move when a token is changed, under both first-segment rules
    assets/parting.png    how far the experts are apart after dense warm-up, with a random and a zero router
    assets/text.png       held-out text across the border of two domains, each segment in its expert's colour

The third trains two small models on data/builtin, which takes a minute. The others read runs of claims.py.
"""
import math
import os
import sys
from argparse import Namespace

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import prepare
from lory import (Lory, LoryConfig, add_flag, atomic_open, load_checkpoint, make_parser, read_checkpoint,
                  run_script)
from train import get_batch


def save(fig, name):
    with atomic_open(f'{ROOT}/assets/{name}.png') as f:
        fig.savefig(f, format='png', dpi=110)


def loss(data, runs):
    """Training loss, smoothed, and the mean over the domains' validations. runs: {label: checkpoint}"""
    fig, ax = plt.subplots(figsize=(8, 4), layout='constrained')
    bits = math.log(2) * data.meta['train']['bytes'] / data.meta['train']['tokens']  # nats a token
    for color, (label, ckpt) in zip(('0.45', '#1f77b4'), runs.items()):
        train = [(row['step'], row['loss'] / bits) for row in ckpt['rows'] if 'loss' in row]
        val = [(row['step'], row['val_bpb']) for row in ckpt['rows'] if 'val_bpb' in row]
        steps, losses = np.array(train).T
        smooth = np.convolve(losses, np.full(9, 1 / 9), 'valid')  # of 450 steps
        ax.plot(steps[4:-4], smooth, color=color, lw=1, alpha=0.6, label=f'{label}, training')
        ax.plot(*zip(*val), 'o-', color=color, label=f'{label}, validation')
        if ckpt['tied_until']:
            ax.axvline(ckpt['tied_until'], color='0.6', ls=':')
            ax.text(ckpt['tied_until'] + 60, 2.55, 'end of dense warm-up', fontsize=9)
    ax.set(title='seed 1337', xlabel='step of 4,096 tokens', ylabel='bits per byte', ylim=(1.6, 2.6))
    ax.legend(fontsize=9)
    save(fig, 'loss')


def causality():
    """A model of random weights, with routing far from uniform. Each token is changed in turn."""
    L, T = 32, 8
    fig, axes = plt.subplots(1, 2, figsize=(8, 4.7), layout='constrained', sharey=True)
    for ax, rule in zip(axes, ('prior', 'self')):
        torch.manual_seed(0)
        config = LoryConfig(50, block_size=L, n_embd=16, n_experts=4, segment_len=T, first_segment=rule)
        model = Lory(config).double()
        for name, p in model.named_parameters():
            if 'norm' not in name:
                torch.nn.init.normal_(p, std=4 if 'router.weight' in name else 0.3)
        idx = torch.randint(50, (1, L))
        other = idx.repeat(L, 1)  # row t has another token t
        other[range(L), range(L)] = (idx[0] + 1) % 50
        moved = (model(other)[0] - model(idx)[0]).abs().amax(-1) > 1e-9  # (token changed, logits moved)
        ax.imshow(moved, cmap='Blues', vmax=1.5, origin='lower', extent=(0.5, L + 0.5, 0.5, L + 0.5))
        for border in range(T, L, T):
            ax.axvline(border + 0.5, color='0.7', lw=0.6)
            ax.axhline(border + 0.5, color='0.7', lw=0.6)
        ax.set(title=f'first_segment={rule}, segments of {T}', xlabel='logits that move at position')
        ax.set(xticks=range(T, L + 1, T), yticks=range(T, L + 1, T))
    axes[0].set_ylabel('when the token at this position changes')
    axes[1].annotate('segment 1 sees ahead', (3, 6.5), (12, 5.5), color='w', va='center',
                     arrowprops=dict(arrowstyle='-|>', color='w'))
    save(fig, 'causality')


def parting(data, tied=60, steps=200):
    """Two models from equal weights but for their routers, tied for `tied` steps and then let go."""
    args = Namespace(block_size=256, seed=1337)
    fig, ax = plt.subplots(figsize=(6, 3.4), layout='constrained')
    for label, scale, color in (('random router', 1, '#1f77b4'), ('zero router', 0, '#c0392b')):
        model = Lory(LoryConfig(data.meta['vocab_size'], block_size=256, segment_len=64))
        for block in model.blocks:
            block.ffn.router.weight.data *= scale
        optimizer, distance = model.optimizer(3e-3, 0.1, (0.9, 0.95)), []
        for step in range(steps):
            x, y = get_batch(data.train.tokens, 8 * step, 8, args, 'cpu')  # (8, 256) both
            model(x, y)[1].backward()
            if step < tied:
                model.tie_gradients()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step < tied:
                model.tie_experts()
            stacked = [p.detach().flatten(1) for p in model.parameters() if p.dim() == 3]
            experts = torch.cat(stacked, 1)  # (E, all weights of an expert)
            centre = experts.mean(0)
            distance.append(100 * ((experts - centre).norm(dim=1).mean() / centre.norm()).item())
        ax.plot(range(1, steps + 1), distance, color=color, label=label)
    ax.axvline(tied, color='0.6', ls=':')
    ax.text(tied - 3, ax.get_ylim()[1] * 0.55, 'dense warm-up:\nexperts are equal', ha='right', fontsize=9)
    ax.set(xlabel='step', ylabel='distance of an expert\nfrom the mean expert, %')
    ax.legend()
    save(fig, 'parting')


def text(data, model, layer, segments=8, width=88):
    """The end of one domain of the held-out text and the beginning of the next, on the colour of the expert
    that its segment weighs most in `layer`. The darker the colour, the larger that weight."""
    T, E = model.config.segment_len, model.config.n_experts
    tokenizer = prepare.load_tokenizer(data.tokenizer)
    border = data.val.start[np.flatnonzero(np.diff(data.val.domain))[0] + 1]
    start = border - T * (segments // 2) + T // 2
    tokens = data.val.tokens[start:start + T * segments].astype(np.int64)
    e = model(torch.from_numpy(tokens)[None], return_routing=True)[2][0, layer]  # (N, E)
    colors, rows = plt.get_cmap('Set2').colors, []
    for k in range(segments):
        written = tokenizer.decode(tokens[k * T:(k + 1) * T].tolist()).replace('\n', ' ⏎ ')
        rows += [(k, written[i:i + width]) for i in range(0, len(written), width)]
    fig, ax = plt.subplots(figsize=(8.4, 0.2 * len(rows) + 0.3), layout='constrained')
    for y, (k, line) in enumerate(rows):
        best = e[k].argmax().item()
        ax.axhspan(y - 0.5, y + 0.5, color=colors[best % 8], alpha=0.3 + 0.7 * e[k, best].item(), lw=0)
        ax.text(0.005, y, line, family='monospace', fontsize=9, va='center',
                transform=ax.get_yaxis_transform())
        if not y or rows[y - 1][0] != k:
            label = f'segment {k + 1}: expert {best + 1}, {100 * e[k, best]:.0f}%'
            ax.text(-0.01, y, label, fontsize=9, va='center', ha='right',
                    transform=ax.get_yaxis_transform())
            ax.axhline(y - 0.5, color='0.3', lw=0.6)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xticks=[], yticks=[])
    save(fig, 'text')


def main():
    parser = make_parser(__doc__)
    add_flag(parser, 'dense', 'runs/dense-1337/ckpt.pt', 'the dense run in loss.png')
    add_flag(parser, 'experts', 'runs/e8-T256-1337/ckpt.pt', 'the run with experts in loss.png')
    add_flag(parser, 'checkpoint', 'runs/e8-1337/ckpt.pt', 'a model with experts, for text.png')
    add_flag(parser, 'layer', 2, 'whose routing weights colour the text')
    args = parser.parse_args()
    data = prepare.load_dataset('data/builtin', 1024)
    model, _ = load_checkpoint(args.checkpoint)
    loss(data, {'dense': read_checkpoint(args.dense), '8 experts, T = 256': read_checkpoint(args.experts)})
    causality()
    parting(data)
    text(data, model, args.layer - 1)


if __name__ == '__main__':
    run_script(main)
