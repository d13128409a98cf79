"""
The paper's claims in miniature: the runs behind the README's tables, three seeds each, and the tables.

    python experiments/claims.py                        train what is missing, two runs at a time on one thread each; report
    python experiments/claims.py --train e8 dense       train these groups only
    python experiments/claims.py --train                train nothing, report

A run is the default of train.py with its group's flags, so each line below is also the command that makes it: a quarter of
an hour of one core, in runs/<group>-<seed>. One that was stopped goes on where it was; one whose rows stand in
experiments/runs.csv is not made again. Everything is measured with first_segment=prior, strictly causal at every position,
but where a group says otherwise. Draws assets/claims.png.
"""
import argparse
import csv
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import prepare
from lory import UserError, atomic_open

SEEDS = (1337, 1, 2)
GROUPS = {                                                           # in the order in which they are made
    'dense': '--n_experts=1',
    'e8': '--n_experts=8 --segment_len=64',
    'e32': '--n_experts=32 --segment_len=64',
    'dense shuffled': '--n_experts=1 --dataset=shuffled',
    'e8 shuffled': '--n_experts=8 --segment_len=64 --dataset=shuffled',
    'e2': '--n_experts=2 --segment_len=64',
    'e8 prefix': '--n_experts=8 --segment_len=64 --routing=prefix',
    'e8 expert choice': '--n_experts=8 --routing=expert_choice',
    'e8 no warm-up': '--n_experts=8 --segment_len=64 --dense_warmup=0',
    'e8 T128': '--n_experts=8 --segment_len=128',
    'e8 T256': '--n_experts=8 --segment_len=256',
    'e8 T512': '--n_experts=8 --segment_len=512',
    'e8 self': '--n_experts=8 --segment_len=64 --first_segment=self',
    # Other sizes, for half as long: where does the gain begin?
    'dense half': '--n_experts=1 --max_iters=3000',
    'e8 half': '--n_experts=8 --segment_len=64 --max_iters=3000',
    'e8 half T32': '--n_experts=8 --segment_len=32 --max_iters=3000',
    'dense half width 32': '--n_experts=1 --n_embd=32 --max_iters=3000',
    'e8 half width 32': '--n_experts=8 --segment_len=64 --n_embd=32 --max_iters=3000',
    'dense half H 512': '--n_experts=1 --ffn_hidden=512 --max_iters=3000',
    'e8 half H 512': '--n_experts=8 --segment_len=64 --ffn_hidden=512 --max_iters=3000',
    'dense half 4 layers': '--n_experts=1 --n_layer=4 --max_iters=3000',
    'e8 half 4 layers': '--n_experts=8 --segment_len=64 --n_layer=4 --max_iters=3000',
}
TABLES = {                                                           # title -> (baseline, groups compared with it)
    'Dense against 2, 8 and 32 experts': ('dense', ['e2', 'e8', 'e32']),
    'The same in shuffled order': ('dense shuffled', ['e8 shuffled']),
    'Routing, warm-up': ('dense', ['e8', 'e8 prefix', 'e8 expert choice', 'e8 no warm-up', 'e8 self']),
    'Segment length': ('dense', ['e8', 'e8 T128', 'e8 T256', 'e8 T512']),
    'Half as long': ('dense half', ['e8 half', 'e8 half T32']),
    'Half as long, width 32': ('dense half width 32', ['e8 half width 32']),
    'Half as long, wider FFN': ('dense half H 512', ['e8 half H 512']),
    'Half as long, 4 layers': ('dense half 4 layers', ['e8 half 4 layers']),
}
TABLE = f'{HERE}/runs.csv'


def train(group, seed):
    """Make one run, or go on with it. -> a row for each of its validations"""
    out = f'runs/{group.replace(" ", "-")}-{seed}'
    flags = ['--init_from=resume'] if os.path.exists(f'{out}/ckpt.pt') else \
        [*GROUPS[group].split(), f'--seed={seed}', '--eval_interval=1500']
    with open(f'{out}.log', 'a') as output:
        code = subprocess.run([sys.executable, f'{ROOT}/train.py', f'--out_dir={out}', *flags], stdout=output, stderr=output,
                              env=os.environ | {'OMP_NUM_THREADS': '1'}).returncode
    if code:
        raise UserError(f'{out} ended with exit code {code}: see {out}.log.')
    with open(f'{out}/log.csv', newline='') as f:
        return [dict(group=group, seed=seed) | {k: v for k, v in row.items() if k.startswith(('step', 'val', 'bpb', 'ppl'))}
                for row in csv.DictReader(f) if row['val_bpb']]


def last(group, rows):
    """seed -> the last validation of that run"""
    return {int(r['seed']): r for r in rows if r['group'] == group}  # rows stand in the order of their steps


def show(values, form):
    return f'{statistics.mean(values):{form}}' + (f' ({min(values):{form}} to {max(values):{form}})' if len(values) > 1 else '')


def report(rows):
    """The tables, in Markdown: mean (lowest to highest of the seeds), and the change against the baseline, seed by seed."""
    domains = [name[4:] for name in rows[0] if name.startswith('ppl_')]
    for title, (base, groups) in TABLES.items():
        bases = last(base, rows)
        if not bases:
            continue
        print(f'\n| {title} | ' + ' | '.join(domains) + ' | bits per byte |\n|' + '---|' * (len(domains) + 2))
        print(f'| {base}, perplexity | ' + ' | '.join(show([float(r[f'ppl_{d}']) for r in bases.values()], '.2f') for d in domains)
              + f' | {show([float(r["val_bpb"]) for r in bases.values()], ".3f")} |')
        for group in groups:
            runs = {seed: r for seed, r in last(group, rows).items() if seed in bases}
            if runs:
                change = [[100 * (float(r[f'ppl_{d}']) / float(bases[seed][f'ppl_{d}']) - 1) for seed, r in runs.items()]
                          for d in domains]
                note = '' if len(runs) == len(SEEDS) else f', seed {", ".join(map(str, runs))} only'
                print(f'| {group}{note} | ' + ' | '.join(f'{show(c, "+.1f")}%' for c in change)
                      + f' | {show([float(r["val_bpb"]) for r in runs.values()], ".3f")} |')


def draw(rows):
    """assets/claims.png: change in perplexity by domain, a dot for each seed; and in bits per byte against tokens, by size."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    domains = [name[4:] for name in rows[0] if name.startswith('ppl_')]
    fig, ax = plt.subplots(1, 2, figsize=(11, 3.8), layout='constrained')
    bases = last('dense', rows)
    for k, (group, name) in enumerate([('e8 T256', '8 experts, T = 256'), ('e8', '8 experts, T = 64'), ('e32', '32 experts, T = 64')]):
        for i, d in enumerate(domains):
            change = [100 * (float(r[f'ppl_{d}']) / float(bases[seed][f'ppl_{d}']) - 1) for seed, r in last(group, rows).items()]
            ax[0].plot([i + 0.25 * (k - 1)] * len(change), change, 'o', color=f'C{k}', label=name if i == 0 else None)
    ax[0].set(xticks=range(len(domains)), xticklabels=domains, ylabel='perplexity against dense, %')
    ax[0].legend(fontsize=8)
    for size, name in (('', '2 layers, width 64'), (' width 32', 'width 32'), (' H 512', 'H = 512'), (' 4 layers', '4 layers')):
        dense, experts = ({(r['seed'], int(r['step'])): float(r['val_bpb']) for r in rows if r['group'] == f'{kind} half{size}'}
                          for kind in ('dense', 'e8'))
        steps = sorted({step for seed, step in experts if (seed, step) in dense})
        gain = [statistics.mean(100 * (v / dense[key] - 1) for key, v in experts.items() if key[1] == step and key in dense)
                for step in steps]
        ax[1].plot([step * 4096 / 1e6 for step in steps], gain, marker='.', label=name)
    ax[1].set(xlabel='million tokens', ylabel='bits per byte against dense, %')
    ax[1].legend(fontsize=8)
    for a in ax:
        a.axhline(0, color='0.7', lw=0.8)
    with atomic_open(f'{ROOT}/assets/claims.png') as f:
        fig.savefig(f, format='png', dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--train', nargs='*', default=list(GROUPS), choices=GROUPS, metavar='GROUP', help=', '.join(GROUPS))
    parser.add_argument('--workers', type=int, default=2, help='runs at a time, one thread each')
    args = parser.parse_args()
    rows = []
    if os.path.exists(TABLE):
        with open(TABLE, newline='') as f:
            rows = list(csv.DictReader(f))
    have = {(r['group'], int(r['seed'])) for r in rows}
    missing = [(group, seed) for group in GROUPS if group in args.train for seed in SEEDS if (group, seed) not in have]
    if missing:
        os.makedirs('runs', exist_ok=True)
        for dataset, order in (('builtin', 'similar'), ('shuffled', 'random')):
            if not os.path.exists(f'data/{dataset}/meta.json'):
                prepare.main([f'--dataset={dataset}', f'--order={order}'])
    with ThreadPoolExecutor(args.workers) as pool:
        for done in as_completed([pool.submit(train, *run) for run in missing]):
            rows += done.result()
            rows.sort(key=lambda r: (list(GROUPS).index(r['group']), SEEDS.index(int(r['seed'])), int(r['step'])))
            with atomic_open(TABLE, 'w', newline='') as f:
                writer = csv.DictWriter(f, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    report(rows)
    draw(rows)


if __name__ == '__main__':
    main()
