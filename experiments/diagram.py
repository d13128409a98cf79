"""Draw assets/lory.png, the picture at the top of the README: python experiments/diagram.py"""
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

E, COLORS = 4, plt.get_cmap('Set2').colors
WEIGHTS = [[.25, .25, .25, .25], [.08, .60, .22, .10], [.62, .08, .10, .20]]   # made up; the real ones: experts.png
TEXTS = ['def area(r):        \n    return pi * r**2', '>>> area(1)\n3.141592653589793', 'The area of a disc of\nradius r is πr².']

fig, ax = plt.subplots(figsize=(10, 4.6), layout='constrained')
ax.set(xlim=(0, 30), ylim=(0, 14))
ax.axis('off')


def box(x, y, w, h, text, color='white', **kw):
    ax.add_patch(plt.Rectangle((x, y), w, h, fc=color, ec='0.25', lw=1.2))
    ax.text(x + w / 2, y + h / 2, text, ha='center', va='center', **dict(dict(fontsize=9), **kw))


def arrow(start, end, **kw):
    ax.annotate('', end, start, arrowprops=dict(arrowstyle='-|>', color=kw.pop('color', '0.25'), lw=1.4, **kw))


for k, (e, text) in enumerate(zip(WEIGHTS, TEXTS)):
    x = 3 + 9.2 * k
    box(x, 0.4, 7, 2.2, text, '#f4f1ea', family='monospace', fontsize=8.5, linespacing=1.4)
    ax.text(x + 3.5, 0, f'segment {k + 1}: tokens ' + ['1 … T', 'T+1 … 2T', '2T+1 … 3T'][k], ha='center', va='top', fontsize=8.5)
    box(x + 3.4, 9.6, 3.6, 3, '', tuple(np.dot(e, COLORS[:E])))
    ax.text(x + 5.2, 11.1, f'merged FFN\n$\\sum_i\\, e_{{{k + 1},i}}\\,\\theta_i$', ha='center', va='center', fontsize=10)
    left = x + 3.4
    for share, color in zip(e, COLORS):                              # the weights as one bar
        ax.add_patch(plt.Rectangle((left, 8.1), 2.4 * share, 0.7, fc=color, ec='0.25', lw=0.8))
        left += 2.4 * share
    ax.text(x + 3.2, 8.45, f'$e_{k + 1}$', ha='right', va='center', fontsize=11)
    arrow((x + 4.6, 8.9), (x + 4.6, 9.5))
    arrow((x + 6.4, 2.7), (x + 6.4, 9.5), linestyle=':')             # the segment's own tokens run through its FFN
    arrow((x + 5.2, 12.7), (x + 5.2, 13.9))
    if k < 2:
        box(x + 0.2, 4.2, 4.4, 1.5, 'mean → router\n→ softmax', '#dfe8f2')
        arrow((x + 2.4, 2.7), (x + 2.4, 4.1))
        arrow((x + 2.4, 5.8), (x + 9.2 + 3.3, 7.95), connectionstyle='angle3,angleA=0,angleB=60', color='#c0392b')
box(0.1, 6.4, 2.7, 1.4, 'learned\nprior', '#dfe8f2')
arrow((2.9, 7.2), (6.3, 8.1), color='#c0392b')
ax.text(7.3, 6.4, 'one segment later', color='#c0392b', fontsize=9, ha='center')
ax.text(28.3, 6, 'its tokens', fontsize=9, ha='right', rotation=90, va='center')
for i in range(E):
    box(0.1, 12.9 - 0.95 * i, 2.7, 0.75, f'expert $\\theta_{i + 1}$', COLORS[i])
fig.savefig(Path(__file__).parent.parent / 'assets/lory.png', dpi=110)
