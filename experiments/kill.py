"""
Kill a training run at 50 random moments and resume it each time: does it end as if nothing had happened?

    OMP_NUM_THREADS=1 python experiments/kill.py

Every start is a process of its own, ended by SIGKILL: while it imports, in a step, in validation, while
it writes. The moments are spread over the whole run, which saves and validates often; its first half is
dense warm-up. At the end weights, optimiser, log and pictures are compared byte by byte with those of a
run left alone. Writes experiments/kill.json.
"""
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
from lory import UserError, atomic_open, make_parser, read_checkpoint, run_script

KILLS, STEPS = 50, 3000
FLAGS = ['--n_embd=32', '--block_size=256', '--segment_len=64', f'--max_iters={STEPS}', '--eval_interval=20',
         '--eval_windows=2', '--log_interval=5', '--dense_warmup=.5', '--device=cpu']


def start(*flags):
    with open('output', 'w') as f:
        return subprocess.Popen([sys.executable, f'{ROOT}/train.py', *flags], stdout=f, stderr=f)


def output():
    with open('output') as f:
        return f.read()


def step_lines():
    return [line for line in output().splitlines() if line.startswith('step')]


def at_step(goal):
    """Has the process reported a step of at least `goal`?"""
    lines = step_lines()
    return bool(lines) and int(lines[-1].split()[1]) >= goal


def moment():
    """What the killed process was at."""
    half, lines = glob.glob('killed/*.tmp'), step_lines()
    if half:
        return f'while writing {os.path.basename(half[0])[:-4]}'
    if not lines:
        return 'before the first line'
    return 'after a validation' if 'validation' in lines[-1] else 'in steps'


def state(out):
    """Everything of a run that no clock wrote."""
    with open(f'{out}/log.csv', newline='') as f:
        log = [{k: v for k, v in row.items() if k not in ('ms', 'tok_s')} for row in csv.DictReader(f)]
    pictures = [open(f'{out}/{name}', 'rb').read() for name in ('loss.png', 'experts.png')]
    parts = []
    for name in ('ckpt.pt', 'best.pt'):
        ckpt = read_checkpoint(f'{out}/{name}')
        parts += [ckpt['step'], ckpt['losses']]
        for tensors in (ckpt['model'], *ckpt['optimizer']['state'].values()):  # of Adam one dict a parameter
            parts += [t.numpy().tobytes() for t in tensors.values()]
    return log, pictures, parts


def main():
    make_parser(__doc__).parse_args()
    os.chdir(tempfile.mkdtemp())
    prepare.main(['--mb_per_domain=0.5'])
    if start(*FLAGS, '--out_dir=whole').wait():
        raise UserError(f'the run left alone failed:\n{output()}')
    tied_until = read_checkpoint('whole/ckpt.pt')['tied_until']
    random.seed(0)
    where, inside = collections.Counter(), 0
    # Steps to be killed near: in order, as each start gets further, and not so late that one finishes.
    for kill, goal in enumerate(sorted(random.sample(range(STEPS * 9 // 10), KILLS))):
        saved = os.path.exists('killed/ckpt.pt')
        for name in glob.glob('killed/*.tmp'):  # of an earlier kill: what is there later is of this one
            os.remove(name)
        process = start('--out_dir=killed', *(['--init_from=resume'] if saved else FLAGS))
        if kill % 5 == 0:  # anywhere, most likely before the first step
            time.sleep(random.uniform(0, 8))
        else:  # in steps, validations and writes
            while not at_step(goal) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 1.5))
        if process.poll() is not None:
            raise UserError(f'the run ended before it was killed {KILLS} times:\n{output()}')
        process.kill()
        process.wait()
        at = moment()
        where[at] += 1
        step = read_checkpoint('killed/ckpt.pt')['step'] if os.path.exists('killed/ckpt.pt') else 0
        inside += step < tied_until  # what goes on from here goes on inside warm-up
        print(f'kill {kill + 1} {at}: the next start is at step {step}', flush=True)
    if start('--out_dir=killed', '--init_from=resume').wait():  # this one may finish
        raise UserError(f'the last start failed:\n{output()}')
    same = state('whole') == state('killed')
    result = dict(kills=KILLS, inside_warmup=inside, where=dict(where), flags=FLAGS, torch=torch.__version__,
                  same_bit_for_bit=same)
    print(result)
    with atomic_open(f'{HERE}/kill.json', 'w') as f:
        json.dump(result, f, indent=1)
    shutil.rmtree(os.getcwd())
    return 0 if same else 1


if __name__ == '__main__':
    run_script(main)
