"""
Downstream in miniature (Sec. 5.2, Table 9): which of four continuations is the true one?

    python experiments/downstream.py                           the finished runs of claims.py, GROUPS below
    python experiments/downstream.py --checkpoint out/ckpt.pt  these checkpoints as well

A question is a place in a held-out document. The model reads the 64, 128 or 256 tokens before it and scores
four texts of 64 tokens: the document's continuation, and what stands at the same place, counted in tokens, in
three other held-out documents of its domain. It chooses the highest log-likelihood per byte. That often
picks the text which is easy in itself. So a second figure, *gained*, first subtracts from each text's
log-likelihood the one that it has after <|endoftext|> alone. Places lie 64 tokens apart, from token 256 on,
so no continuation is asked for twice, and all prompt lengths have the same answers. Only a document's first
place has its beginning for a prompt.

What a figure means: by its prompt the model tells how one text goes on from how others of its kind do, by
topic, names and style. At each place all documents are equally likely to be the one asked about, so a guess
that ignores the prompt is right one time in four, whatever it goes by. What it does not mean: no knowledge is
tested and no reasoning, all four texts are of one domain, and figures of real benchmarks do not compare.

Models with experts answer in two ways. *prompt*: the prompt routes once, and its FFN scores the continuation
(Sec. 3.1). *rerouted*: each segment is routed as in training (App. G.2); at T = 256 this means by the prior
alone, unless the prompt has 256 tokens. Dense models and layers that route single tokens have one way.

Intervals are Wilson's, 95%, for independent questions. They are too narrow, since a document serves several.
But all models answer the same questions, and that makes differences between models surer than they suggest.
A checkpoint that stands in experiments/downstream.json is not measured again.
"""
import json
import math
import os
import statistics
import sys

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import prepare
from claims import SEEDS, commit
from lory import (Lory, LoryConfig, LoryFFN, UserError, add_flag, atomic_open, make_parser,
                  read_checkpoint, run_script, swiglu)
from token_moe import LAYERS

GROUPS = ('dense', 'e8-T256', 'e8', 'e32')
PROMPTS, AFTER = (64, 128, 256), 64  # tokens
LONGEST = max(PROMPTS)


class PromptFFN(LoryFFN):
    """The first `prompt` tokens route once, for themselves and for all that follow. On a prompt with a
    continuation it gives in one pass what Lory.prefill and Lory.decode give token by token."""
    prompt = None

    def forward(self, x, cache=None):  # (B, L, D) -> (B, L, D), routing weights (B, 1, E)
        e = self.route_prompt(x[:, :self.prompt])  # (B, 1, E)
        return swiglu(x, *self.merge_experts(e[:, 0])), e


def models(ckpt):
    """-> {way: model}, the ways in which a checkpoint's model can answer"""
    config, layer = LoryConfig(**ckpt['config']), ckpt['layer']
    known = {ffn.__name__: ffn for ffn in (LoryFFN, *LAYERS.values())}
    if layer not in known:
        raise UserError(f'layers of type {layer} are not known here: add them to LAYERS in token_moe.py.')
    ways = {'-': known[layer]}
    if layer == 'LoryFFN' and config.n_experts > 1:
        ways = {'prompt': PromptFFN, 'rerouted': LoryFFN}
        if config.first_segment == 'self':
            del ways['rerouted']  # the continuation would route segment 1, by which it is scored
    result = {way: Lory(config, ffn=ffn).eval() for way, ffn in ways.items()}
    for model in result.values():
        model.load_state_dict(ckpt['model'])  # a PromptFFN has a LoryFFN's weights
    return result


def make_questions(split, domain, n, seed):
    """Up to n questions on documents of domain number `domain`. (n, 4, LONGEST + AFTER) tokens: a prompt with
    each continuation, the true one first"""
    rng = np.random.default_rng([seed, domain])
    length, docs = np.diff(split.start), np.flatnonzero(split.domain == domain)
    places = [(doc, at) for doc in docs for at in range(LONGEST, length[doc] - AFTER + 1, AFTER)]
    found = []
    for doc, at in rng.permutation(places) if places else ():
        others = docs[(docs != doc) & (length[docs] >= at + AFTER)]
        if len(found) == n or len(others) < 3:
            continue
        # A document's only <|endoftext|> is its first token, so continuations have none.
        here = split.start[[doc, *rng.choice(others, 3, replace=False)]] + at
        prompt = split.tokens[here[0] - LONGEST:here[0]]
        texts = [split.tokens[i:i + AFTER] for i in here]
        if len({text.tobytes() for text in texts}) == 4:
            found.append([np.concatenate([prompt, text]) for text in texts])
    return torch.from_numpy(np.array(found, np.int64).reshape(-1, 4, LONGEST + AFTER))


@torch.no_grad()
def scores(model, questions, P, token_bytes):
    """Log-likelihood per byte, in nats, of continuations after prompts of P tokens, in one pass for each.
    (n, 4, LONGEST + AFTER) -> (n, 4)"""
    for block in model.blocks:
        block.ffn.prompt = P  # PromptFFN reads it
    result = []
    for windows in questions[..., LONGEST - P:].split(4):
        idx = windows.flatten(0, 1)  # (B, P + AFTER)
        x = model.trunk(idx[:, :-1])[0][:, P - 1:]  # (B, AFTER, D), where the continuation is predicted
        text = idx[:, P:]  # (B, AFTER)
        nats = F.cross_entropy(model.head(x).flatten(0, 1), text.flatten(), reduction='none')  # (B * AFTER,)
        result.append(-nats.view(-1, 4, AFTER).sum(2) / token_bytes[text].view(-1, 4, AFTER).sum(2))
    return torch.cat(result)


def share_right(scores):
    """(n, 4) -> share of questions in which the true continuation beats all others; a tie is wrong"""
    return (scores[:, 0] > scores[:, 1:].amax(1)).double().mean().item()


def measure(ckpt, questions, token_bytes, eot):
    """-> {way: {prompt length, also with 'gained': {domain or 'all': accuracy}}}"""
    result = {}
    for way, model in models(ckpt).items():
        result[way], alone = {}, {}
        for domain, asked in questions.items():
            bare = asked.clone()  # (n, 4, LONGEST + AFTER)
            bare[..., LONGEST - 1] = eot
            alone[domain] = scores(model, bare, 1, token_bytes)  # (n, 4)
        for P in PROMPTS:
            answers = {domain: scores(model, asked, P, token_bytes) for domain, asked in questions.items()}
            gained = {domain: answers[domain] - alone[domain] for domain in questions}
            for name, kind in ((str(P), answers), (f'{P}, gained', gained)):
                kind['all'] = torch.cat(list(kind.values()))
                result[way][name] = {domain: share_right(s) for domain, s in kind.items()}
    return result


def wilson(share, n, z=1.96):
    """The 95% interval of a probability, after n independent trials of which this share came out."""
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def report(results):
    """One table in Markdown. Means over seeds; other seeds answer the same questions, so they do not narrow
    the interval."""
    domains, n, runs = list(results['questions']), sum(results['questions'].values()), results['runs']
    print(f'| accuracy, % (chance 25) | routed by | prompt | {" | ".join(domains)} | all '
          '| 95% interval | lowest to highest (seeds) |\n|' + '---|' * (len(domains) + 6))
    for group in dict.fromkeys(run['group'] for run in runs.values()):
        seeds = [run['accuracy'] for run in runs.values() if run['group'] == group]
        for way in seeds[0]:
            for P in seeds[0][way]:
                of = {d: [accuracy[way][P][d] for accuracy in seeds] for d in (*domains, 'all')}
                low, high = wilson(statistics.mean(of['all']), n)
                cells = ' | '.join(f'{100 * statistics.mean(values):.1f}' for values in of.values())
                print(f'| {group} | {way} | {P} | {cells} | {100 * low:.1f} to {100 * high:.1f} '
                      f'| {100 * min(of["all"]):.1f} to {100 * max(of["all"]):.1f} ({len(seeds)}) |')


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument('--checkpoint', nargs='+', default=[], metavar='FILE', help='measure these as well')
    add_flag(parser, 'dataset', 'builtin', 'folder under data/ whose held-out text is asked about')
    add_flag(parser, 'questions', 300, 'of each domain and prompt length', low=1)
    add_flag(parser, 'seed', 1337, 'of the questions')
    add_flag(parser, 'result', f'{HERE}/downstream.json', 'file to write')
    args = parser.parse_args(argv)
    data = prepare.load_dataset(f'data/{args.dataset}', LONGEST + AFTER)
    token_bytes = torch.tensor(prepare.token_bytes(data.tokenizer))  # (V,)
    questions = {name: make_questions(data.val, i, args.questions, args.seed)
                 for i, name in enumerate(data.meta['domains'])}
    for name, asked in questions.items():
        n_docs = (data.val.domain == data.meta['domains'].index(name)).sum()
        print(f'{name}: {len(asked)} questions, {n_docs} held-out documents')
        if len(asked) == 0:
            raise UserError(f'{name} has no four held-out documents of {LONGEST + AFTER} tokens: give more.')
    results = dict(torch=torch.__version__, dtype='float32', data=data.meta['sha256']['val.bin'][:12],
                   seed=args.seed, questions={name: len(asked) for name, asked in questions.items()}, runs={})
    if os.path.exists(args.result):
        with open(args.result) as f:
            before = json.load(f)
        if before | {'runs': {}} != results:
            raise UserError(f'{args.result} was made of other questions or with another torch: remove it or '
                            'choose another --result.')
        results = before
    paths = [f'runs/{group}-{seed}/ckpt.pt' for group in GROUPS for seed in SEEDS]
    for path in [path for path in paths if os.path.exists(path)] + args.checkpoint:
        if path in results['runs']:
            continue
        ckpt = read_checkpoint(path)
        if path not in args.checkpoint and ckpt['step'] < ckpt['args']['max_iters']:
            continue  # it is still being trained
        if ckpt['tokenizer'] != data.tokenizer:
            raise UserError(f'{path} has another tokenizer than data/{args.dataset}: choose its --dataset.')
        seed = ckpt['args']['seed']
        results['runs'][path] = dict(
            group=os.path.dirname(path).removeprefix('runs/').removesuffix(f'-{seed}'), seed=seed,
            commit=commit(), accuracy=measure(ckpt, questions, token_bytes, data.meta['eot']))
        with atomic_open(args.result, 'w') as f:
            json.dump(results, f, indent=1)
    report(results)


if __name__ == '__main__':
    run_script(main)
