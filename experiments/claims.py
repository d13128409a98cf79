"""
The paper's claims in miniature: the runs behind the README's tables, three seeds each (four
layers half as long: six), and the tables.

    python experiments/claims.py                    train what the main table lacks, two runs at a time
    python experiments/claims.py --train e8 dense   train these groups
    python experiments/claims.py --train            train nothing, report, draw assets/claims.png
    python experiments/claims.py --train --table=runs-c0966a5.csv    the same from an older table

A run is the default of its script (train.py but where SCRIPTS says otherwise) with its group's flags, in
float32 where these name no dtype: some forty minutes of one core (half of that for groups called half), in
runs/<group>-<seed>. One that was stopped goes on where it was; one whose rows stand in experiments/runs.csv
is not made again. Each row names the commit and the data that made it. Everything is measured with
first_segment=prior, strictly causal at every position, but where a group says otherwise.
"""
import csv
import json
import math
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import prepare
from lory import UserError, add_flag, atomic_open, make_parser, run_script

SEEDS = (1337, 1, 2)
# Copying begins at random with four layers, and seeds differ most ("Four layers" in README.md).
MORE_SEEDS = dict.fromkeys(('dense half 4 layers', 'e8 half 4 layers', 'e8 half T256 4 layers'), (3, 4, 5))
GROUPS = {  # in the order in which they are made
    'dense': '--n_experts=1',
    'e8 T256': '--n_experts=8 --segment_len=256',
    'e8': '--n_experts=8 --segment_len=64',
    'e32': '--n_experts=32 --segment_len=64',
    'e8 T512': '--n_experts=8 --segment_len=512',
    # Training documents in random order; what is held out stays the same.
    'dense shuffled': '--n_experts=1 --dataset=shuffled',
    'e8 shuffled': '--n_experts=8 --segment_len=64 --dataset=shuffled',
    'e8 T256 shuffled': '--n_experts=8 --segment_len=256 --dataset=shuffled',
    'e8 T512 shuffled': '--n_experts=8 --segment_len=512 --dataset=shuffled',
    # 2.5 times as much text, so that 24.6M tokens are 1.2 epochs and not 3.
    'dense big': '--n_experts=1 --dataset=big',
    'e8 big': '--n_experts=8 --segment_len=64 --dataset=big',
    # Twice as deep.
    'dense 4 layers': '--n_experts=1 --n_layer=4',
    'e8 4 layers': '--n_experts=8 --segment_len=64 --n_layer=4',
    # Half as long: what each choice is worth, and where the gain begins at other sizes.
    'dense half': '--n_experts=1 --max_iters=3000',
    'e8 half': '--n_experts=8 --segment_len=64 --max_iters=3000',
    # 3000 / 0.904: as long as 8 experts at T = 64 took at c0966a5.
    'dense half longer': '--n_experts=1 --max_iters=3319',
    'e2 half': '--n_experts=2 --segment_len=64 --max_iters=3000',
    'e32 half': '--n_experts=32 --segment_len=64 --max_iters=3000',
    'e8 half prefix': '--n_experts=8 --segment_len=64 --routing=prefix --max_iters=3000',
    'e8 half expert choice': '--n_experts=8 --max_iters=3000',
    'e8 half no warm-up': '--n_experts=8 --segment_len=64 --dense_warmup=0 --max_iters=3000',
    'e8 half self': '--n_experts=8 --segment_len=64 --first_segment=self --max_iters=3000',
    'e8 half T32': '--n_experts=8 --segment_len=32 --max_iters=3000',
    'e8 half T128': '--n_experts=8 --segment_len=128 --max_iters=3000',
    'e8 half T256': '--n_experts=8 --segment_len=256 --max_iters=3000',
    'e8 half T512': '--n_experts=8 --segment_len=512 --max_iters=3000',
    'e8 half T256 short': '--n_experts=8 --segment_len=256 --max_iters=3000',
    'dense half width 32': '--n_experts=1 --n_embd=32 --max_iters=3000',
    'e8 half width 32': '--n_experts=8 --segment_len=64 --n_embd=32 --max_iters=3000',
    'dense half H 512': '--n_experts=1 --ffn_hidden=512 --max_iters=3000',
    'e8 half H 512': '--n_experts=8 --segment_len=64 --ffn_hidden=512 --max_iters=3000',
    'dense half 4 layers': '--n_experts=1 --n_layer=4 --max_iters=3000',
    'e8 half 4 layers': '--n_experts=8 --segment_len=64 --n_layer=4 --max_iters=3000',
    'e8 half T256 4 layers': '--n_experts=8 --segment_len=256 --n_layer=4 --max_iters=3000',
    # Domains further apart: manual pages in five languages.
    'dense half languages': '--n_experts=1 --dataset=languages --max_iters=3000',
    'e8 half languages': '--n_experts=8 --segment_len=64 --dataset=languages --max_iters=3000',
    # Each token goes to its best experts: one of 8, or two of 16 of half the width.
    'e8 half switch': '--n_experts=8 --max_iters=3000',
    'e8 half mixtral': '--n_experts=8 --max_iters=3000',
    'e8 half switch no warm-up': '--n_experts=8 --dense_warmup=0 --max_iters=3000',
    'e8 half mixtral no warm-up': '--n_experts=8 --dense_warmup=0 --max_iters=3000',
}
# A third length between those two, for the time to dense's loss.
for group in ('e8 T256', 'e8', 'e32'):
    GROUPS[f'{group} three quarters'] = f'{GROUPS[group]} --max_iters=4500'
# Order against batch: the same tokens, several learning rates for each, warm-ups of 150 updates.
for group in ('dense half', 'e8 half T256', 'e8 half T512'):
    GROUPS[f'{group} shuffled'] = f'{GROUPS[group]} --dataset=shuffled'
    for order in ('', ' shuffled'):
        flags = GROUPS[group + order]
        for rate in ('2e-3', '4.5e-3'):  # 3e-3 is the default
            GROUPS[f'{group}{order} lr {rate}'] = f'{flags} --learning_rate={rate}'
        for rate in ('4e-3', '6e-3', '9e-3'):
            GROUPS[f'{group}{order} batch 16 lr {rate}'] = (
                f'{flags} --batch_size=16 --max_iters=750 --warmup=0.2 --learning_rate={rate}')
# Each of them in bfloat16, too, for a processor that has it.
GROUPS |= {f'{group} bfloat16': f'{flags} --dtype=bfloat16' for group, flags in GROUPS.items()}
SCRIPTS = {  # what trains a group, if not train.py
    'e8 half expert choice': 'experiments/token_moe.py --layer=expert_choice',
    'e8 half switch': 'experiments/token_moe.py --layer=switch',
    'e8 half mixtral': 'experiments/token_moe.py --layer=mixtral',
    'e8 half switch no warm-up': 'experiments/token_moe.py --layer=switch',
    'e8 half mixtral no warm-up': 'experiments/token_moe.py --layer=mixtral',
    'e8 half T256 short': 'experiments/short_first.py',
}
DATASETS = {  # the flags of prepare.py that make each
    'builtin': '',
    'shuffled': '--order=random',
    'big': '--mb_per_domain=15',
    'languages': '--input languages',
}
TABLES = {  # title -> (baseline, groups compared with it)
    'Dense against experts': ('dense', ['e8 T512', 'e8 T256', 'e8', 'e32']),
    'Shuffled order': ('dense shuffled', ['e8 T512 shuffled', 'e8 T256 shuffled', 'e8 shuffled']),
    'More text': ('dense big', ['e8 big']),
    '4 layers': ('dense 4 layers', ['e8 4 layers']),
    'Half as long': ('dense half', ['dense half longer', 'e2 half', 'e8 half', 'e8 half prefix',
                                    'e8 half expert choice', 'e8 half no warm-up', 'e8 half self',
                                    'e8 half T32', 'e8 half T128', 'e8 half T256', 'e8 half T256 short']),
    'Token choice': ('dense half', ['e8 half', 'e8 half T256', 'e8 half expert choice', 'e8 half switch',
                                    'e8 half switch no warm-up', 'e8 half mixtral',
                                    'e8 half mixtral no warm-up']),
    'Half as long, bfloat16': ('dense half bfloat16', ['e8 half T256 bfloat16']),
    'Half as long, width 32': ('dense half width 32', ['e8 half width 32']),
    'Half as long, wider FFN': ('dense half H 512', ['e8 half H 512']),
    'Half as long, 4 layers': ('dense half 4 layers', ['e8 half 4 layers', 'e8 half T256 4 layers']),
    'Half as long, five languages': ('dense half languages', ['e8 half languages']),
}
LENGTHS = {  # of these models: runs of 3,000, 4,500 and 6,000 steps
    'e8 T256': ['e8 half T256', 'e8 T256 three quarters', 'e8 T256'],
    'e8': ['e8 half', 'e8 three quarters', 'e8'],
    'e32': ['e32 half', 'e32 three quarters', 'e32'],
}
SPEEDS = {'e8': 'E=8 T=64', 'e8 T256': 'E=8', 'e32': 'E=32 T=64'}  # their variants of bench.py
TABLE = 'runs.csv'


def train(group, seed):
    """Make one run, or go on with it. -> its rows"""
    out = f'runs/{group.replace(" ", "-")}-{seed}'
    script, *layer = SCRIPTS.get(group.removesuffix(' bfloat16'), 'train.py').split()
    command = [sys.executable, f'{ROOT}/{script}', *layer, f'--seed={seed}', '--eval_interval=1500',
               '--dtype=float32', *GROUPS[group].split(), f'--out_dir={out}']
    if os.path.exists(f'{out}/ckpt.pt'):
        command.append('--init_from=resume')  # train.py refuses if the run's flags are others
    with open(f'{out}.log', 'a') as output:
        code = subprocess.run(command, stdout=output, stderr=output,
                              env=os.environ | {'OMP_NUM_THREADS': '1'}).returncode
    if code:
        raise UserError(f'{out} ended with exit code {code}: see {out}.log.')
    return read(f'{out}/log.csv', group, seed)


def read(path, group, seed):
    """Every second line of a run's log and all its validations, a row for each step, to five digits."""
    with open(f'data/{dataset_of(group)}/meta.json', encoding='utf-8') as f:
        data = json.load(f)['sha256']['train.bin'][:12]
    made = dict(group=group, seed=seed, dtype=flag_of(group, 'dtype', 'float32'), commit=commit(), data=data)
    rows = {}
    with open(path, newline='', encoding='utf-8') as f:
        for line in csv.DictReader(f):
            if line['val_bpb'] or int(line['step']) % 100 == 0:
                row = rows.setdefault(line['step'], dict(made, step=line['step']))
                for name, value in line.items():
                    kept = name.startswith(('loss', 'experts', 'val', 'later', 'bpb_', 'ppl'))
                    if kept and (value or name not in row):
                        row[name] = f'{float(value):.5g}' if value else ''
    return list(rows.values())


def commit():
    """The commit of the code that runs. A result file that grew does not make it another."""
    git = ['git', '-C', ROOT]
    name = subprocess.run([*git, 'describe', '--always'], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, 'diff', '--quiet', 'HEAD', '--', '*.py']).returncode
    return name + '-dirty' if changed else name


def seeds_of(group):
    return SEEDS + MORE_SEEDS.get(group, ())


def flag_of(group, name, default):
    return f'{GROUPS[group]} --{name}={default}'.split(f'--{name}=')[1].split()[0]


def dataset_of(group):
    return flag_of(group, 'dataset', 'builtin')


def table(name=TABLE):
    """The rows of a result file in experiments/."""
    path = f'{HERE}/{name}'
    if name == TABLE and not os.path.exists(path):
        return []
    try:
        with open(path, newline='', encoding='utf-8') as f:
            rows = list(csv.DictReader(f))
        unknown = {f'{r["group"]} {r["seed"]}' for r in rows
                   if r['group'] not in GROUPS or int(r['seed']) not in seeds_of(r['group'])}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as e:
        raise UserError(f'{path} cannot be read ({type(e).__name__}): take it from git again.') from e
    if unknown:  # never dropped: they would be lost when it is written
        raise UserError(f'{path} holds {", ".join(sorted(unknown))}, which GROUPS and SEEDS do not: name '
                        'them there or move their rows.')
    return rows


def place(row):
    """Where a row stands in the table."""
    group = row['group']
    return list(GROUPS).index(group), seeds_of(group).index(int(row['seed'])), int(row['step'])


def last(group, rows):
    """seed -> the last validation of that run: rows stand in the order of their steps"""
    return {int(r['seed']): r for r in rows if r['group'] == group and r['val_bpb']}


def domains_of(group, rows):
    """The domains of that group's dataset: columns of others are empty."""
    some = next(iter(last(group, rows).values()), {})
    return [name[4:] for name, value in some.items() if name.startswith('ppl_') and value]


def show(values, form, unit=''):
    mean = f'{statistics.mean(values):{form}}{unit}'
    return f'{mean} ({min(values):{form}} to {max(values):{form}})' if len(values) > 1 else mean


def report(rows):
    """The tables, in Markdown: mean (lowest to highest of the seeds), and the change against the
    baseline, seed by seed."""
    for title, (base, groups) in TABLES.items():
        bases = last(base, rows)
        if not bases:
            continue
        domains = domains_of(base, rows)
        print(f'\n| {title} | ' + ' | '.join(domains) + ' | bits per byte | change |')
        print('|' + '---|' * (len(domains) + 3))
        # After segment 1 dense counts from token 257 on, so only T = 256 compares with it.
        for later in ('', 'later_') if any('T256' in group for group in groups) else ('',):
            print(f'| {base}, perplexity{", after segment 1" if later else ""} | '
                  + ' | '.join(show(numbers(bases, f'{later}ppl_{d}'), '.2f') for d in domains)
                  + f' | {show(numbers(bases, "later_bpb" if later else "val_bpb"), ".3f")} | |')
        for group in groups:
            runs = {seed: r for seed, r in last(group, rows).items() if seed in bases}
            if not runs:
                continue
            note = '' if len(runs) == len(seeds_of(group)) else f', seed {", ".join(map(str, runs))} only'
            for later in ('', 'later_') if 'T256' in group else ('',):
                bpb = 'later_bpb' if later else 'val_bpb'
                print(f'| {group}{note}{", after segment 1" if later else ""} | '
                      + ' | '.join(show(change(runs, bases, f'{later}ppl_{d}'), '+.1f', '%') for d in domains)
                      + f' | {show(numbers(runs, bpb), ".3f")} | '
                      + f'{show(change(runs, bases, bpb), "+.2f", "%")} |')


def report_time(rows):
    """In what share of dense's tokens and time a model ends at the final loss of dense, seed by seed. Between
    its runs of other lengths, each with a schedule of its own, loss falls as a line in the logarithm of the
    steps. Time is tokens over the median speed in bench-tries.txt."""
    tries = defaultdict(list)  # variant -> tokens/s as a share of dense's, in each try of bench.py
    with open(f'{HERE}/bench-tries.txt', encoding='utf-8') as f:
        for line in f:
            params, tok_s, ratio, *_ = line[18:].split()  # as bench.py prints them
            tries[line[:18].strip()].append(float(ratio))
    print('\n| To the final loss of dense | tokens | time |\n|---|---|---|')
    for group, lengths in LENGTHS.items():
        share = []
        for seed, goal in last('dense', rows).items():
            ends = [last(length, rows).get(seed) for length in lengths]
            points = sorted((float(r['val_bpb']), math.log(int(r['step']))) for r in ends if r)
            if len(points) > 1:
                steps = math.exp(np.interp(float(goal['val_bpb']), *zip(*points)))
                share.append(steps / int(goal['step']))
        if share:
            time = [s / statistics.median(tries[SPEEDS[group]]) for s in share]
            print(f'| {group} | {show(share, ".2f")} | {show(time, ".2f")} |')


def numbers(runs, name):
    return [float(r[name]) for r in runs.values()]


def change(runs, bases, name):
    """Percent by which `name` differs from the baseline's, seed by seed."""
    return [100 * (float(r[name]) / float(bases[seed][name]) - 1)
            for seed, r in runs.items() if seed in bases]


def draw(rows):
    """assets/claims.png, each seed by itself: change in perplexity by domain, and in bits per byte while
    training and by the order of documents and T."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    domains = domains_of('dense', rows)
    fig, (by_domain, by_tokens, by_order) = plt.subplots(1, 3, figsize=(13, 4), layout='constrained')
    by_name = {'8 experts, T = 256': 'e8 T256', '8 experts, T = 64': 'e8', '32 experts, T = 64': 'e32'}
    for k, (name, group) in enumerate(by_name.items()):
        for i, d in enumerate(domains):
            dots = change(last(group, rows), last('dense', rows), f'ppl_{d}')
            by_domain.plot([i + 0.2 * (k - 1)] * len(dots), dots, 'o', ms=5, color=f'C{k}',
                           label=name if i == 0 else None)
    by_domain.set(title='three seeds, 24.6M tokens', ylabel='perplexity against dense, %',
                  xticks=range(len(domains)), xticklabels=domains)
    for k, order in enumerate(('', ' shuffled')):
        for T in (64, 256, 512):
            runs = last((f'e8 T{T}' if T > 64 else 'e8') + order, rows)
            dots = change(runs, last('dense' + order, rows), 'val_bpb')
            by_order.plot([T * (1, 1.08)[k]] * len(dots), dots, 'o', ms=5, color=f'C{k}',
                          label=('chained', 'shuffled')[k] if T == 64 else None)
    by_order.set(title='by order of documents', xlabel='T (8 experts)', xscale='log',
                 ylabel='bits per byte against dense\nin the same order, %')
    by_order.set_xticks([64, 256, 512], ['64', '256', '512'], minor=False)
    by_order.minorticks_off()
    validations = {(r['group'], int(r['seed']), int(r['step'])): float(r['val_bpb'])
                   for r in rows if r['val_bpb']}
    for k, (name, group) in enumerate(by_name.items()):
        for seed in SEEDS:
            gains = {step: 100 * (v / validations['dense', seed, step] - 1)
                     for (g, s, step), v in validations.items()
                     if (g, s) == (group, seed) and ('dense', seed, step) in validations}
            by_tokens.plot([step * 4096 / 1e6 for step in gains], list(gains.values()), '.-', lw=1,
                           color=f'C{k}', label=name if seed == SEEDS[0] else None)
    by_tokens.set(title='while training', xlabel='million tokens', ylabel='bits per byte against dense, %')
    for a in (by_domain, by_tokens, by_order):
        a.legend(fontsize=8)
        a.axhline(0, color='0.7', lw=0.8)
    with atomic_open(f'{ROOT}/assets/claims.png') as f:
        fig.savefig(f, format='png', dpi=110)


def main():
    parser = make_parser(__doc__)
    base, groups = TABLES['Dense against experts']
    parser.add_argument('--train', nargs='*', default=[base, *groups], choices=GROUPS, metavar='GROUP',
                        help=', '.join(g for g in GROUPS if 'bfloat16' not in g)
                        + "; each also with ' bfloat16' behind its name")
    add_flag(parser, 'workers', 2, 'runs at a time, one thread each', low=1)
    add_flag(parser, 'table', TABLE, 'result file in experiments/ to report from; new rows go to runs.csv')
    args = parser.parse_args()
    rows = table()
    have = {(r['group'], int(r['seed'])) for r in rows}
    missing = [(group, seed) for group in GROUPS if group in args.train for seed in seeds_of(group)
               if (group, seed) not in have]
    if missing:
        os.makedirs('runs', exist_ok=True)
        wanted = {dataset_of(group) for group, _ in missing}
        for dataset, flags in DATASETS.items():
            if dataset in wanted and not os.path.exists(f'data/{dataset}/meta.json'):
                if dataset == 'languages' and not os.path.exists(dataset):
                    raise UserError('there is no languages/ here: the commands in experiments/README.md '
                                    'make it.')
                prepare.main([f'--dataset={dataset}', *flags.split()])
    failed = []
    with ThreadPoolExecutor(args.workers) as pool:
        try:
            for done in as_completed([pool.submit(train, *run) for run in missing]):
                if isinstance(done.exception(), UserError):
                    failed.append(str(done.exception()))  # the others go on
                    continue
                # Read anew: another claims.py may have added to it.
                rows = sorted(table() + done.result(), key=place)
                with atomic_open(f'{HERE}/{TABLE}', 'w', newline='', encoding='utf-8') as f:
                    writer = csv.DictWriter(f, dict.fromkeys(name for r in rows for name in r))
                    writer.writeheader()
                    writer.writerows(rows)
        except KeyboardInterrupt:  # the runs save and end by themselves
            pool.shutdown(cancel_futures=True)
            raise UserError('stopped; the same command goes on.') from None
    report(table(args.table))
    if args.table == TABLE:  # the speeds are those of the present code
        report_time(table())
    if not args.train:
        draw(table(args.table))
    if failed:
        raise UserError(' '.join(failed))


if __name__ == '__main__':
    run_script(main)
