"""
Continue a prompt from a checkpoint alone: the tokenizer is inside.

    python sample.py                                           a few hundred tokens from the last run
    python sample.py --start='def main(' --temperature=0       your own prompt, greedy
    python sample.py --start=FILE:notes.txt --show_routing     a prompt from a file, and the experts that it chose

The prompt routes once: each layer merges its experts into one FFN, and from there on this is a plain dense model
(Sec. 3.1). `--save_dense=FILE` keeps that dense model, a checkpoint like any other.
"""
import argparse
import codecs
import os
import sys
import time

import torch

from lory import UserError, atomic_open, load_checkpoint, save_checkpoint, usable_device
from prepare import encode, load_tokenizer


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, usage='python sample.py [--flag=value ...], see --help')

    def flag(name, default, help, **kw):
        parser.add_argument(f'--{name}', default=default, help=f'{help} (default: {default!r})',
                            **({} if 'action' in kw else dict(type=type(default))), **kw)

    flag('out_dir', 'out', 'folder of the run, whose ckpt.pt is read')
    flag('checkpoint', '', 'or a checkpoint file, such as --save_dense makes')
    flag('start', '\n', 'the prompt, or FILE:path to read it from')
    flag('num_samples', 1, 'continuations')
    flag('max_new_tokens', 300, 'tokens in each, at most')
    flag('temperature', 0.8, 'below 1 favours likely tokens, 0 is greedy')
    flag('top_k', 0, 'draw from the k likeliest tokens only; 0: from all')
    flag('top_p', 1.0, 'draw from the likeliest tokens that hold this share of the probability')
    flag('stop', '', 'end a sample where this text appears, besides at the end of a document')
    flag('reroute', False, 'merge the experts again every T tokens, as in training, not once for all', action='store_true')
    flag('show_routing', False, "print each expert's share in each layer, as the prompt chose", action='store_true')
    flag('routing_picture', '', 'draw those shares into this PNG file')
    flag('save_dense', '', 'write the dense model that the prompt makes of the experts to this file')
    flag('seed', 1337, 'of the draws')
    flag('device', 'auto', 'auto, cpu, cuda, mps')
    return parser


def check(args, vocab_size):
    """UserError for a value that cannot be meant."""
    for wrong, cure in [
        (not (args.temperature == 0 or 1e-3 <= args.temperature < float('inf')),
         f'temperature={args.temperature} must be 0, which is greedy, or at least 0.001.'),
        (not 0 <= args.top_k <= vocab_size, f'top_k={args.top_k} must be 0 to the vocabulary size, {vocab_size}.'),
        (not 0 < args.top_p <= 1, f'top_p={args.top_p} must be above 0 and at most 1.'),
        (args.max_new_tokens < 1, f'max_new_tokens={args.max_new_tokens} must be at least 1.'),
        (args.num_samples < 1, f'num_samples={args.num_samples} must be at least 1.'),
        (not 0 <= args.seed < 2**63, f'seed={args.seed} must be 0 to 2**63 - 1.'),
        (args.start == '', 'the prompt is empty; give --start some text, or a newline.'),
        (os.path.exists(args.save_dense), f'{args.save_dense} exists and may be a run: choose another --save_dense.'),
        (args.routing_picture and not args.routing_picture.endswith('.png'),
         f'routing_picture={args.routing_picture} must end in .png.'),
    ]:
        if wrong:
            raise UserError(cure)


def read_prompt(start):
    if start.startswith('FILE:'):
        try:
            with open(start[5:], encoding='utf-8-sig') as f:
                start = f.read()
        except OSError as e:
            raise UserError(f'cannot read the prompt from {start[5:]} ({e.strerror}); check the path.') from e
        except UnicodeDecodeError as e:
            raise UserError(f'{start[5:]} is not UTF-8 text; convert it first.') from e
    try:
        start.encode()
    except UnicodeEncodeError as e:
        raise UserError('the prompt is not UTF-8 text; convert it first, or give it as --start=FILE:path.') from e
    return start


def show_routing(e):
    """Print routing weights (n_layer, E) as percentages, the largest share of each layer marked."""
    print('experts     ' + ''.join(f'{i + 1:6d}' for i in range(e.shape[1])))
    for layer, shares in enumerate(e.tolist()):
        cells = (f'{100 * share:5.0f}' + ('*' if share == max(shares) else ' ') for share in shares)
        print(f'layer {layer + 1:<3d}   ' + ''.join(cells))
    print()


def draw_routing(e, path):
    """Draw routing weights (n_layer, E), a numpy array, as a heat map."""
    import matplotlib  # here, for it takes a second that most calls should not
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    n_layer, E = e.shape
    fig, ax = plt.subplots(figsize=(2 + 0.4 * E, 1.2 + 0.4 * n_layer), layout='constrained')
    image = ax.imshow(e, vmin=0, cmap='viridis', aspect='auto')
    ax.set(xlabel='expert', xticks=range(E), xticklabels=range(1, E + 1), ylabel='layer', yticks=range(n_layer),
           yticklabels=range(1, n_layer + 1))
    fig.colorbar(image, label='routing weight')
    with atomic_open(path) as f:
        fig.savefig(f, format='png', dpi=110)


def main(argv=None):
    args = make_parser().parse_args(argv)
    device = usable_device(args.device)
    model, ckpt = load_checkpoint(args.checkpoint or f'{args.out_dir}/ckpt.pt', device)
    model.eval()
    args.start = read_prompt(args.start)
    check(args, model.config.vocab_size)
    if 'tokenizer' not in ckpt:
        raise UserError('this checkpoint has no tokenizer: store one with it, save_checkpoint(..., tokenizer=...).')
    tokenizer = load_tokenizer(ckpt['tokenizer'])
    prompt = torch.tensor([tokenizer.eot_token] + encode(tokenizer, args.start), device=device)
    if len(prompt) > model.config.block_size:
        raise UserError(f'the prompt has {len(prompt)} tokens and block_size={model.config.block_size} is the most: '
                        'shorten it.')

    if args.show_routing or args.routing_picture:
        e = model.prefill(prompt[None], args.reroute)[1][0, :, -1]   # (n_layer, E)
        if args.show_routing:
            show_routing(e)
        if args.routing_picture:
            draw_routing(e.cpu().numpy(), args.routing_picture)
    if args.save_dense:
        dense = model.specialize(prompt[None])
        save_checkpoint(args.save_dense, dense.config, dense.state_dict(), tokenizer=ckpt['tokenizer'])
        print(f'dense model written to {args.save_dense}; try: python sample.py --checkpoint={args.save_dense}\n')

    torch.manual_seed(args.seed)
    for number in range(args.num_samples):
        if number:
            print('-' * 80)
        print(args.start, end='', flush=True)
        decoder = codecs.getincrementaldecoder('utf-8')('replace')       # a character may span tokens
        text, shown, end, n_tokens, t0 = '', 0, -1, 0, time.time()
        for token in model.stream(prompt[None], args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                                  args.reroute):
            n_tokens += 1
            if token.item() == tokenizer.eot_token:
                break
            text += decoder.decode(tokenizer.decode_single_token_bytes(token.item()))
            end = text.find(args.stop) if args.stop else -1
            # What may turn out to be the beginning of --stop is held back.
            ready = end if end >= 0 else max(shown, len(text) - max(0, len(args.stop) - 1))
            print(text[shown:ready], end='', flush=True)
            shown = ready
            if end >= 0:
                break
        text += decoder.decode(b'', True)                                # half a character, if it ended in one
        print(text[shown:end if end >= 0 else None])
        seconds = time.time() - t0
        print(f'[{n_tokens} tokens, {n_tokens / seconds:.0f} tokens/s]', file=sys.stderr)


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')                         # a terminal may lack a character
    try:
        main()
    except UserError as e:
        print(f'sample.py: {e}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except BrokenPipeError:                                          # the reader, such as head, has had enough
        os._exit(0)
