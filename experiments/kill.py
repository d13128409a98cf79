"""
Kill a training run at 50 random moments and resume it each time: does it end as if nothing had happened?

    OMP_NUM_THREADS=1 python experiments/kill.py

Every start is a process of its own, ended by SIGKILL after a random time: while it imports, in a step, in validation,
while it writes. Small intervals make it save and validate often, and the run upcycles half-way. At the end weights,
optimiser, log and pictures are compared byte by byte with those of a run left alone. Writes experiments/kill.json.
"""
import collections
import csv
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
FLAGS = ['--n_embd=32', '--block_size=256', '--segment_len=64', '--max_iters=2000', '--eval_interval=40', '--eval_windows=8',
         '--log_interval=10', '--dense_warmup=.5', '--device=cpu']


def start(*flags):
    return subprocess.Popen([sys.executable, f'{ROOT}/train.py', *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


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
    os.chdir(tempfile.mkdtemp())
    prepare.main(['--mb_per_domain=0.5'])
    began = time.time()
    assert start(*FLAGS, '--out_dir=whole').wait() == 0
    alone = time.time() - began
    random.seed(0)
    where, kills, waiting = collections.Counter(), 0, 0.0
    while True:
        fresh = not os.path.exists('killed/ckpt.pt')
        process = start('--out_dir=killed', *(FLAGS if fresh else ['--init_from=resume']))
        if kills == KILLS:
            break
        # Now and then before its first step, else so that all kills together spread over the run.
        time.sleep(random.uniform(0, 6) if kills % 5 == 0 else random.uniform(4, 4 + 3 * alone / KILLS))
        if process.poll() is not None:
            raise SystemExit(f'the run ended before it was killed {KILLS} times:\n{process.stdout.read()}')
        process.kill()
        output = process.stdout.read()
        process.wait()
        kills += 1
        half = [name for name in os.listdir('killed') if name.endswith('.tmp')] if os.path.isdir('killed') else []
        for name in half:
            where[f'while writing {name[:-4]}'] += 1
        if not half:
            lines = output.splitlines()
            where['before the first step' if not any(line.startswith('step') for line in lines) else
                  'after a log line' if 'loss' in lines[-1] else 'after a validation'] += 1
        print(f'kill {kills}: step {"-" if fresh else load_checkpoint("killed/ckpt.pt")[1]["step"]}', flush=True)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    same = state('whole') == state('killed')
    result = dict(kills=kills, where=dict(where), flags=FLAGS, torch=torch.__version__, same_bit_for_bit=same)
    print(result)
    with atomic_open(f'{HERE}/kill.json', 'w') as f:
        json.dump(result, f, indent=1)
    shutil.rmtree(os.getcwd())
    return 0 if same else 1


if __name__ == '__main__':
    sys.exit(main())
