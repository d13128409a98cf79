"""
Compare finished runs: last validation per domain, mean over seeds and their spread.

    for s in 1337 1 2; do
        python train.py --seed=$s --out_dir=out-lory-$s
        python train.py --seed=$s --out_dir=out-dense-$s --n_experts=1
    done
    python experiments/compare.py dense=out-dense-1337,out-dense-1,out-dense-2 lory=out-lory-1337,out-lory-1,out-lory-2

Every group is compared with the first one, run by run in the order given, so that seeds meet their like. Writes
experiments/compare.csv, a row for each run.
"""
import csv
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from lory import atomic_open

HERE = os.path.dirname(os.path.abspath(__file__))


def last_validation(out_dir):
    with open(f'{out_dir}/log.csv', newline='') as f:
        row = [r for r in csv.DictReader(f) if r['val_bpb']][-1]
    return {name: float(value) for name, value in row.items() if value and name.startswith(('step', 'bpb', 'ppl', 'later'))}


def main():
    groups = dict(argument.split('=') for argument in sys.argv[1:])
    runs = {name: [last_validation(d) for d in dirs.split(',')] for name, dirs in groups.items()}
    first = next(iter(runs))
    domains = [name[4:] for name in runs[first][0] if name.startswith('bpb_')]
    for measure, title in (('ppl_', 'perplexity, all positions'), ('later_ppl_', 'perplexity, after segment 1'),
                           ('bpb_', 'bits per byte, all positions'), ('later_bpb_', 'bits per byte, after segment 1')):
        print(f'\n{title}: mean (lowest to highest of the seeds); below it the change against {first}, seed by seed')
        print(f'{"":10}' + ''.join(f'{d:>22}' for d in domains))
        for name, group in runs.items():
            values = [[run[measure + d] for run in group] for d in domains]
            print(f'{name:10}' + ''.join(f'{statistics.mean(v):8.3f} ({min(v):.3f}-{max(v):.3f})'.rjust(22) for v in values))
            if name != first:
                change = [[100 * (run[measure + d] / base[measure + d] - 1) for run, base in zip(group, runs[first])]
                          for d in domains]
                print(f'{"":10}' + ''.join(f'{statistics.mean(c):+.1f}% ({min(c):+.1f} to {max(c):+.1f})'.rjust(22)
                                           for c in change))
    with atomic_open(f'{HERE}/compare.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, ['group', 'run', *runs[first][0]])
        writer.writeheader()
        writer.writerows(dict(row, group=name, run=os.path.basename(d)) for name, group in runs.items()
                         for d, row in zip(groups[name].split(','), group))


if __name__ == '__main__':
    main()
