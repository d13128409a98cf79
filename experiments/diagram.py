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

E, COLORS = 4, plt.get_cmap('Set2').colors
# Made up. Real ones are in a run's experts.png.
WEIGHTS = [[.25, .25, .25, .25], [.08, .60, .22, .10], [.62, .08, .10, .20]]
TEXTS = ['def area(r):        \n    return pi * r**2', '>>> area(1)\n3.141592653589793',
         'The area of a disc of\nradius r is πr².']
TOKENS = ['1 … T', 'T+1 … 2T', '2T+1 … 3T']


def box(ax, x, y, w, h, text, color='white', **kw):
    ax.add_patch(plt.Rectangle((x, y), w, h, fc=color, ec='0.25', lw=1.2))
    ax.text(x + w / 2, y + h / 2, text, ha='center', va='center', **dict(dict(fontsize=9), **kw))


def arrow(ax, start, end, color='0.25', **kw):
    ax.annotate('', end, start, arrowprops=dict(arrowstyle='-|>', color=color, lw=1.4, **kw))


def segment(ax, k):
    """Segment k: its tokens below, its weights as one bar, its merged FFN above, and how it routes the
    next."""
    x = 3 + 9.2 * k
    box(ax, x, 0.4, 7, 2.2, TEXTS[k], '#f4f1ea', family='monospace', fontsize=8.5, linespacing=1.4)
    ax.text(x + 3.5, 0, f'segment {k + 1}: tokens {TOKENS[k]}', ha='center', va='top', fontsize=8.5)
    box(ax, x + 3.4, 9.6, 3.6, 3, '', tuple(np.dot(WEIGHTS[k], COLORS[:E])))
    ax.text(x + 5.2, 11.1, f'merged FFN\n$\\sum_i\\, e_{{{k + 1},i}}\\,\\theta_i$', ha='center', va='center',
            fontsize=10)
    left = x + 3.4
    for share, color in zip(WEIGHTS[k], COLORS):
        ax.add_patch(plt.Rectangle((left, 8.1), 2.4 * share, 0.7, fc=color, ec='0.25', lw=0.8))
        left += 2.4 * share
    ax.text(x + 3.2, 8.45, f'$e_{k + 1}$', ha='right', va='center', fontsize=11)
    arrow(ax, (x + 4.6, 8.9), (x + 4.6, 9.5))
    arrow(ax, (x + 6.4, 2.7), (x + 6.4, 9.5), linestyle=':')  # the segment's own tokens run through its FFN
    arrow(ax, (x + 5.2, 12.7), (x + 5.2, 13.9))
    if k < 2:
        box(ax, x + 0.2, 4.2, 4.4, 1.5, 'mean → router\n→ softmax', '#dfe8f2')
        arrow(ax, (x + 2.4, 2.7), (x + 2.4, 4.1))
        arrow(ax, (x + 2.4, 5.8), (x + 9.2 + 3.3, 7.95), '#c0392b',
              connectionstyle='angle3,angleA=0,angleB=60')


def main():
    make_parser(__doc__).parse_args()
    fig, ax = plt.subplots(figsize=(10, 4.6), layout='constrained')
    ax.set(xlim=(0, 30), ylim=(0, 14))
    ax.axis('off')
    for k in range(3):
        segment(ax, k)
    box(ax, 0.1, 6.4, 2.7, 1.4, 'learned\nprior', '#dfe8f2')
    arrow(ax, (2.9, 7.2), (6.3, 8.1), '#c0392b')
    ax.text(7.3, 6.4, 'one segment later', color='#c0392b', fontsize=9, ha='center')
    ax.text(28.3, 6, 'its tokens', fontsize=9, ha='right', rotation=90, va='center')
    for i in range(E):
        box(ax, 0.1, 12.9 - 0.95 * i, 2.7, 0.75, f'expert $\\theta_{i + 1}$', COLORS[i])
    with atomic_open(f'{ROOT}/assets/lory.png') as f:
        fig.savefig(f, format='png', dpi=110)


if __name__ == '__main__':
    run_script(main)
