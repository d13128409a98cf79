"""Draw assets/lory.png, the picture at the top of the README: python experiments/diagram.py"""
import os
import sys

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from lory import atomic_open, make_parser, run_script

COLORS = ['#66c2a5', '#fc8d62', '#8da0cb', '#e78ac3']  # of the four experts
WEIGHTS = [[.25, .25, .25, .25], [.08, .66, .18, .08], [.10, .62, .20, .08], [.66, .08, .08, .18]]  # made up
TEXTS = ['def area(r):\n    return pi * r**2', 'def ring(a, b):\n    return area(b) \\\n        - area(a)',
         'A disc of radius r\nhas the area πr².', 'A ring is what is\nleft of a disc when\none is cut out.']
KINDS = ['code', 'code', 'prose', 'prose']
STEP, LEFT, WIDTH = 8.2, 4.2, 7.2  # from segment to segment; of the first; of each
LAG = '#c0392b'


def box(ax, x, y, w, h, text='', color='white', **kw):
    ax.add_patch(plt.Rectangle((x, y), w, h, fc=color, ec='0.25', lw=1.1))
    ax.text(x + w / 2, y + h / 2, text, ha='center', va='center', **dict(dict(fontsize=9), **kw))


def arrow(ax, start, end, color='0.25', **kw):
    ax.annotate('', end, start, arrowprops=dict(arrowstyle='-|>', color=color, lw=1.4, **kw))


def segment(ax, k):
    """Segment k from its text up: attention, hidden states, its FFN; and how it routes the next one."""
    x = LEFT + STEP * k
    mix, tokens = x + 3.2, x + 6.4  # where the weights stand, where the hidden states run
    box(ax, x, 0.6, WIDTH, 2.5, TEXTS[k], '#f4f1ea', family='monospace', fontsize=8, linespacing=1.4,
        ma='left')
    ax.text(x + WIDTH / 2, 0.2, f'segment {k + 1}: {KINDS[k]}', ha='center', va='top', fontsize=9)
    for up in (mix - 1.6, tokens):
        arrow(ax, (up, 3.1), (up, 3.9))
    arrow(ax, (tokens, 5.1), (tokens, 11.4), linestyle=':')
    ax.text(tokens - 0.2, 8.3, 'tokens', ha='right', va='center', fontsize=8.5, color='0.4')

    left = mix - 0.4
    for share, color in zip(WEIGHTS[k], COLORS):
        ax.add_patch(plt.Rectangle((left, 9.6), 2.8 * share, 0.8, fc=color, ec='0.25', lw=0.8))
        left += 2.8 * share
    ax.text(mix - 0.6, 10, f'$e({k + 1})$', ha='right', va='center', fontsize=11)
    arrow(ax, (mix + 1, 10.4), (mix + 1, 11.4))
    box(ax, mix - 0.4, 11.5, 4.3, 2.1, f'merged FFN\n$\\Sigma_i\\; e({k + 1})_i\\, \\theta_i$',
        tuple(np.dot(WEIGHTS[k], [matplotlib.colors.to_rgb(color) for color in COLORS])))
    arrow(ax, (mix + 0.6, 15.2), (mix + 0.6, 13.7), '0.55')  # all experts come down into the mix
    arrow(ax, (tokens - 1.2, 13.6), (tokens - 1.2, 16.2))

    if k == len(TEXTS) - 1:
        ax.text(mix - 1.6, 6, 'routes\nnothing', ha='center', va='center', fontsize=8.5, color=LAG)
    else:
        arrow(ax, (mix - 1.6, 5.1), (mix - 1.6, 6))
        box(ax, x, 6, 3.4, 1.7, 'mean, router,\nsoftmax', '#dfe8f2', fontsize=8.5)
        arrow(ax, (x + 1.7, 7.7), (mix + STEP - 0.5, 9.5), LAG, connectionstyle='angle3,angleA=0,angleB=60')


def main():
    make_parser(__doc__).parse_args()
    fig, ax = plt.subplots(figsize=(9.8, 4.9), layout='constrained')
    ax.set(xlim=(0, LEFT + 4 * STEP), ylim=(-1.1, 17.2))
    ax.axis('off')
    right = LEFT + 4 * STEP - 1
    box(ax, LEFT, 3.9, right - LEFT, 1.2, 'attention to all earlier tokens, and norm: the hidden states that '
        'enter the FFN', '#eeeeee')
    for k in range(len(TEXTS)):
        segment(ax, k)
    for i, color in enumerate(COLORS):
        box(ax, 0.1, 14.7 - 1.1 * i, 3, 0.85, f'expert $\\theta_{i + 1}$', color)
        ax.plot([3.1, 3.4], [15.1 - 1.1 * i] * 2, color='0.55', lw=1.4)
    ax.plot([3.4, 3.4, 3.4, LEFT + 3 * STEP + 3.8], [11.8, 15.1, 15.2, 15.2], color='0.55', lw=1.4)
    ax.text(3.6, 15.4, 'all, into every mix', fontsize=8.5, color='0.4')
    ax.text(right, 16.4, 'to the next block (n_layer in all)', ha='right', fontsize=9)
    box(ax, 0.1, 9.2, 3, 1.6, 'learned\nprior', '#dfe8f2')
    arrow(ax, (3.2, 10), (LEFT + 1.3, 10), LAG)
    ax.text(LEFT + 3.6, 6.85, 'routes the\nnext one', va='center', fontsize=8.5, color=LAG)
    ax.text(LEFT + 2 * STEP + 2.5, 12.5, 'prose, but still\nrouted by code', va='center', ha='right',
            fontsize=8.5, color=LAG)
    ax.text(right, -1, 'the weights are made up', ha='right', fontsize=7.5, color='0.5')
    with atomic_open(f'{ROOT}/assets/lory.png') as f:
        fig.savefig(f, format='png', dpi=110)


if __name__ == '__main__':
    run_script(main)
