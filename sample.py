"""
Continue a prompt from a checkpoint alone: the tokenizer is inside.

    python sample.py                                           a few hundred tokens from out/ckpt.pt
    python sample.py --start='def main(' --temperature=0       your own prompt, greedy
    python sample.py --start=FILE:notes.txt --show_routing     a prompt from a file; its expert weights

The prompt routes once: each layer merges its experts into one FFN, and from there on the model is dense
(Sec. 3.1). `--save_dense=FILE` keeps that dense model, as a checkpoint like any other.
"""
import codecs
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace

import torch

from lory import (Lory, UserError, add_flag, load_checkpoint, make_parser, run_script, save_checkpoint,
                  usable_device)
from prepare import encode, load_tokenizer, token_bytes


def flags():
    parser = make_parser(__doc__)
    add_flag(parser, 'out_dir', 'out', 'folder of the run, whose ckpt.pt is read')
    add_flag(parser, 'checkpoint', '', 'a checkpoint file to read instead')
    add_flag(parser, 'start', '', 'the prompt, or FILE:path to read it from; empty: begin a document')
    add_flag(parser, 'num_samples', 1, 'continuations', low=1)
    add_flag(parser, 'max_new_tokens', 300, 'tokens in each, at most', low=1)
    add_flag(parser, 'temperature', 0.8, 'below 1 favours likely tokens, 0 is greedy')
    add_flag(parser, 'top_k', 0, 'draw from the k likeliest tokens only; 0: from all')
    add_flag(parser, 'top_p', 1.0, 'draw from the likeliest tokens that hold this share of the probability')
    add_flag(parser, 'stop', '', 'end a sample once it holds this text; it always ends with the document')
    add_flag(parser, 'show_routing', False, "print each expert's share in each layer")
    add_flag(parser, 'save_dense', '', 'write the dense model that the prompt makes to this file')
    add_flag(parser, 'seed', 1337, 'of the draws', below=2**63)
    add_flag(parser, 'device', 'auto', 'auto, cpu, cuda, mps')
    return parser


def read_prompt(start):
    """The text that --start means. UserError unless it is UTF-8."""
    try:
        if start.startswith('FILE:'):
            with open(start[5:], encoding='utf-8-sig') as f:
                start = f.read()
        start.encode()
    except OSError as error:
        raise UserError(f'cannot read {start[5:]} ({error.strerror}): check the path.') from error
    except UnicodeError as error:
        raise UserError('the prompt is not UTF-8 text: convert it first.') from error
    return start


def show_routing(e):
    """Print routing weights (n_layer, E) as percentages, the largest of each layer marked."""
    print('experts     ' + ''.join(f'{i + 1:6d}' for i in range(e.shape[1])))
    for layer, shares in enumerate(e.tolist()):
        cells = (f'{100 * share:5.0f}' + ('*' if share == max(shares) else ' ') for share in shares)
        print(f'layer {layer + 1:<3d}   ' + ''.join(cells))
    print()


def specialize(model, prompt):
    """The dense model (n_experts=1) that a Lory is after reading the prompt (1, L), in eval mode. UserError
    if it does not predict the same, as with an FFN that merges no experts."""
    logits, _, caches = model.prefill(prompt)
    state = model.state_dict()
    for layer, cache in enumerate(caches):
        for name, weight in zip(('gate', 'up', 'down'), cache.merged or ()):  # a dense layer has none
            state[f'blocks.{layer}.ffn.{name}'] = weight  # (1, in, out)
    dense = Lory(replace(model.config, n_experts=1)).to(model.embed.weight)  # its device and dtype
    with suppress(KeyError, RuntimeError):  # an FFN of one's own may have other names and shapes
        dense.load_state_dict({name: state[name] for name in dense.state_dict()})  # without the router
        if torch.allclose(dense.prefill(prompt)[0], logits, atol=1e-3):
            return dense.eval()
    raise UserError(f'no dense model predicts what this {model.ffn_name} does: leave out --save_dense.')


def main(argv=None, build=Lory):
    """`build` makes the model from its config: partial(Lory, ffn=MyFFN) for an FFN of your own."""
    args = flags().parse_args(argv)
    if os.path.exists(args.save_dense):
        raise UserError(f'{args.save_dense} exists: choose another --save_dense.')
    device = usable_device(args.device)
    model, ckpt = load_checkpoint(args.checkpoint or f'{args.out_dir}/ckpt.pt', device, build)
    tokenizer, size = load_tokenizer(ckpt['tokenizer']), token_bytes(ckpt['tokenizer'])
    text = read_prompt(args.start)
    prompt = torch.tensor([[tokenizer.eot_token] + encode(tokenizer, text)], device=device)  # (1, L)

    routing = model.prefill(prompt)[1]  # (1, n_layer, 1, E); a prompt too long is refused here
    if args.show_routing:
        show_routing(routing[0, :, -1])
    if args.save_dense:
        save_checkpoint(args.save_dense, specialize(model, prompt), ckpt['tokenizer'])
        print(f'dense model written; now try: python sample.py --checkpoint={args.save_dense}\n')

    torch.manual_seed(args.seed)
    for i in range(args.num_samples):
        print('-' * 80 + '\n' if i else '', text, sep='', end='', flush=True)
        began, count, sample = time.perf_counter(), 0, ''
        decoder = codecs.getincrementaldecoder('utf-8')('replace')  # a character may span tokens
        for token in model.stream(prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p):
            count += 1
            if not size[token.item()]:  # <|endoftext|>, or an unused id
                break
            new = decoder.decode(tokenizer.decode_single_token_bytes(token.item()))
            print(new, end='', flush=True)
            sample += new
            if args.stop and args.stop in sample:
                break
        print(decoder.decode(b'', True))  # an incomplete character shows as such
        seconds = max(time.perf_counter() - began, 1e-9)
        print(f'[{count} tokens, {count / seconds:.0f} tokens/s]', file=sys.stderr)


if __name__ == '__main__':
    run_script(main)
