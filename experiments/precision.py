"""
What does bfloat16 cost, and which operation is to blame?

    python experiments/precision.py runs/dense-half-1337/ckpt.pt runs/e8-half-T256-1337/ckpt.pt

For each checkpoint, the loss on held-out text and the gradient of one batch of its training text, under
autocast and with one operation at a time put back to float32, against float32 throughout. The last row is
the gradient of another batch in float32: what training has to live with anyway. Writes
experiments/precision.json. (claims.py trains in both: its groups that end in bfloat16.)
"""
import json
import os
import sys
from argparse import Namespace

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import lory
import prepare
from lory import atomic_open, load_checkpoint, make_parser, run_script
from train import evaluate, get_batch, validation_windows

PARTS = {  # row -> the modules of a model that compute in float32
    'bfloat16': lambda model: [],
    'output head in float32': lambda model: [model.head],
    'attention in float32': lambda model: [block.attn for block in model.blocks],
    'FFN in float32': lambda model: [block.ffn for block in model.blocks],
    'rotary embedding in float32': lambda model: [],  # no module, see `rotate_in_float32`
}


def in_float32(module):
    """Let a module compute in float32, even under autocast."""
    forward = module.forward

    def plain(x, *args):
        with torch.autocast('cpu', enabled=False):
            return forward(x.float(), *args)
    module.forward = plain


def rotate_in_float32(x, cos, sin):
    return ROTATE(x.float(), cos, sin).to(x.dtype)


ROTATE = lory.rotate


def gradient(model, x, y, autocast):
    """All of it in one vector, float64."""
    model.train()
    with autocast:
        loss = model(x, y)[1]
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, model.parameters())])


def compare(path):
    """-> row -> [change of bits per byte in %, distance of the gradient as a share of its norm]"""
    _, ckpt = load_checkpoint(path)
    args = Namespace(**ckpt['args'])
    data = prepare.load_dataset(f'data/{args.dataset}', args.block_size)
    windows = validation_windows(data.val, data.meta['domains'], args.block_size, 24)
    token_bytes = torch.tensor(prepare.token_bytes(data.tokenizer))
    batches = [get_batch(data.train.tokens, first, args.batch_size, args, 'cpu')
               for first in (0, args.batch_size)]

    def measure(parts, enabled, batch=0):
        model, _ = load_checkpoint(path)
        for module in parts(model):
            in_float32(module)
        autocast = torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled)
        bpb = evaluate(model, windows, token_bytes, args.batch_size, autocast)[0]['val_bpb']
        return bpb, gradient(model, *batches[batch], autocast)
    exact, reference = measure(PARTS['bfloat16'], enabled=False)
    rows = {}
    for name, parts in PARTS.items():
        lory.rotate = rotate_in_float32 if name.startswith('rotary') else ROTATE
        bpb, grad = measure(parts, enabled=True)
        rows[name] = [100 * (bpb / exact - 1), ((grad - reference).norm() / reference.norm()).item()]
    lory.rotate = ROTATE
    other = measure(PARTS['bfloat16'], enabled=False, batch=1)[1]
    rows['another batch, float32'] = [0.0, ((other - reference).norm() / reference.norm()).item()]
    return rows


def main():
    parser = make_parser(__doc__)
    parser.add_argument('checkpoints', nargs='+', help='as claims.py leaves them in runs/')
    results = {}
    for path in parser.parse_args().checkpoints:
        results[path] = compare(path)
        print(f'{path:28}  bits per byte  gradient')
        for name, (bpb, grad) in results[path].items():
            print(f'{name:28} {bpb:+13.4f}% {100 * grad:8.2f}%', flush=True)
    with atomic_open(f'{HERE}/precision.json', 'w') as f:
        json.dump(results, f, indent=1)


if __name__ == '__main__':
    run_script(main)
