"""
Kill a training run at 50 random moments and resume it each time: does it end as if nothing had happened?

    OMP_NUM_THREADS=1 python experiments/kill.py

Every start is a process of its own, ended by SIGKILL after a random time: while it imports, in a step, in validation,
while it writes. Small intervals make it save and validate often, and the run upcycles half-way. At the end weights,
optimiser, log and pictures are compared byte by byte with those of a run left alone. Writes experiments/kill.json.
"""
import argparse
import collections
import csv
import glob
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import prepare
from lory import atomic_open, load_checkpoint

KILLS = 50
FLAGS = ['--n_embd=32', '--block_size=256', '--segment_len=64', '--max_iters=3000', '--eval_interval=20', '--eval_windows=2',
         '--log_interval=5', '--dense_warmup=.5', '--device=cpu']


def start(*flags):
    with open('output', 'w') as f:
        return subprocess.Popen([sys.executable, f'{ROOT}/train.py', *flags], stdout=f, stderr=f)


def output():
    with open('output') as f:
        return f.read()


def state(out):
    """Everything of a run that no clock wrote."""
    with open(f'{out}/log.csv', newline='') as f:
        log = [{k: v for k, v in row.items() if k not in ('ms', 'tok_s')} for row in csv.DictReader(f)]
    pictures = [open(f'{out}/{name}', 'rb').read() for name in ('loss.png', 'experts.png')]
    parts = []
    for name in ('ckpt.pt', 'best.pt'):
        _, ckpt = load_checkpoint(f'{out}/{name}')
        averages = [t for s in ckpt['optimizer']['state'].values() for t in s.values()]
        parts += [ckpt['step'], *[t.numpy().tobytes() for t in (*ckpt['model'].values(), *averages, ckpt['rng'])]]
    return log, pictures, parts


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.chdir(tempfile.mkdtemp())
    prepare.main(['--mb_per_domain=0.5'])
    if start(*FLAGS, '--out_dir=whole').wait():
        sys.exit(output())
    random.seed(0)
    where = collections.Counter()
    for kill in range(KILLS):
        begun = os.path.exists('killed/ckpt.pt') or os.path.exists('killed/best.pt')
        for name in glob.glob('killed/*.tmp'):                       # of an earlier kill: what is there later is of this one
            os.remove(name)
        process = start('--out_dir=killed', *(['--init_from=resume'] if begun else FLAGS))
        if kill % 5 == 0:                                            # anywhere, most likely before the first step
            time.sleep(random.uniform(0, 8))
        else:                                                        # in steps, validations and writes
            while '| loss' not in output() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 3))
        if process.poll() is not None:
            sys.exit(f'the run ended before it was killed {KILLS} times:\n{output()}')
        process.kill()
        process.wait()
        lines = [line for line in output().splitlines() if line.startswith('step')]
        half = [name for name in os.listdir('killed') if name.endswith('.tmp')] if os.path.isdir('killed') else []
        moment = (f'while writing {half[0].rsplit(".", 2)[0]}' if half else 'before the first line' if not lines else
                  'after a validation' if 'validation' in lines[-1] else 'in steps')
        where[moment] += 1
        step = load_checkpoint('killed/ckpt.pt')[1]['step'] if os.path.exists('killed/ckpt.pt') else None
        print(f'kill {kill + 1} {moment}: ckpt.pt is at step {step}', flush=True)
    if start('--out_dir=killed', '--init_from=resume').wait():       # this one may finish
        sys.exit(output())
    same = state('whole') == state('killed')
    result = dict(kills=KILLS, where=dict(where), flags=FLAGS, torch=torch.__version__, same_bit_for_bit=same)
    print(result)
    with atomic_open(f'{HERE}/kill.json', 'w') as f:
        json.dump(result, f, indent=1)
    shutil.rmtree(os.getcwd())
    return 0 if same else 1


if __name__ == '__main__':
    sys.exit(main())
