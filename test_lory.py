"""
The tests of Lory. Most compare the code with the same thing written once more, slowly and plainly. The first
of these, `naive_lory`, is the method itself as a plain loop.

    python -m pytest -q test_lory.py
"""
import base64
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import prepare
import sample
import train
from lory import (Lory, LoryConfig, LoryFFN, MergedLinear, UserError, atomic_open, draw, lean_swiglu,
                  load_checkpoint, rotation, save_checkpoint, swiglu)
from prepare import Document

torch.set_num_threads(1)
HERE = os.path.dirname(os.path.abspath(__file__))


def tiny_config(**changes):
    """4 experts of width 24 in 2 layers of width 16; sequences of up to 24 tokens in segments of 6."""
    return LoryConfig(**dict(dict(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16,
                                  ffn_hidden=24, n_experts=4, segment_len=6), **changes))


def randomize(module, scale=4.0):
    """Draw all weights anew, in float64. The router's are so large that what it reads drives it far from
    uniform, and no others are so small that their effect could hide."""
    torch.manual_seed(0)
    for name, p in module.named_parameters():
        if 'norm' not in name:
            nn.init.normal_(p, std=scale if 'router.weight' in name else 0.3)
    return module.double()


@contextmanager
def refused(word, error=UserError):
    """What is done here ends in a UserError of one line with `word`, or in argparse's SystemExit(2)."""
    with pytest.raises(error, match=word if error is UserError else '2') as raised:
        yield
    assert error is SystemExit or re.fullmatch('[^\n]+[.]', str(raised.value))


# --- lory.py: the layer. ---

def naive_lory(ffn, x):
    """Lory's FFN layer as a plain loop. Hidden states x (B, L, D) -> (B, L, D)"""
    rows = []
    for sequence in x:  # (L, D)
        segments = sequence.split(ffn.segment_len)  # of T tokens each; the last one may be shorter
        for k, segment in enumerate(segments):
            # What routes a segment? Not itself, for a token would hear those that follow it, but the one
            # before (causal segment routing, Sec. 3.1), or always the first (prefix routing, Sec. 5.1). The
            # first has none before it. The paper routes it by itself, but lets the router learn nothing from
            # that. The other rule routes it by the router's bias alone.
            heard = segment if k == 0 else segments[k - 1] if ffn.routing == 'causal' else segments[0]
            logits = ffn.router.weight @ (sum(heard) / len(heard)) + ffn.router.bias  # (E,)
            if k == 0:
                logits = logits.detach() if ffn.first_segment == 'self' else ffn.router.bias
            e = torch.exp(logits) / torch.exp(logits).sum()  # (E,), Eq. 3
            # Merge the experts, matrix by matrix (Sec. 2.2). All tokens of the segment go through the merged
            # FFN, a SwiGLU as in LLaMA.
            gate, up, down = (sum(e[i] * p[i] for i in range(len(e))) for p in (ffn.gate, ffn.up, ffn.down))
            for token in segment:  # (D,)
                g = token @ gate  # (H,)
                rows.append((g * torch.sigmoid(g) * (token @ up)) @ down)  # (D,)
    return torch.stack(rows).view(x.shape)


ROUTINGS = [dict(first_segment='prior'), dict(first_segment='self'), dict(routing='prefix')]


@pytest.mark.parametrize('how', ROUTINGS)
@pytest.mark.parametrize('L', [24, 20, 7, 4])
def test_layer_equals_naive_loop_in_output_and_every_gradient(how, L):
    ffn = randomize(LoryFFN(tiny_config(**how)), scale=2.0)
    x, probe = torch.randn(2, 3, L, 16, dtype=torch.float64)
    inputs = [x.requires_grad_(), *ffn.parameters()]
    ours, naive = ([y, *torch.autograd.grad((y * probe).sum(), inputs, materialize_grads=True)]
                   for y in (ffn(x)[0], naive_lory(ffn, x)))
    assert_close(ours, naive, rtol=1e-9, atol=1e-12)


def test_lean_merge_is_the_formula_in_output_and_every_gradient():
    """MergedLinear against finite differences, and lean_swiglu against swiglu of the merged FFNs."""
    ffn = randomize(LoryFFN(tiny_config()))
    x, e = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5, 16), (3, 4)))
    assert torch.autograd.gradcheck(MergedLinear.apply, (x[..., :4], e, ffn.gate[:, :4, :6]))
    inputs = [x, e, ffn.gate, ffn.up, ffn.down]
    assert_close(*([y, *torch.autograd.grad(y.square().sum(), inputs)]
                   for y in (lean_swiglu(*inputs), swiglu(x, *ffn.merged(e)))))


@pytest.mark.parametrize('apart', [1.0, 0.003])
def test_bfloat16_autocast_stays_near_the_float32_formula(apart):
    """Also just after warm-up, when experts differ by less than bfloat16 resolves, and the router's gradient
    is made of their difference."""
    torch.manual_seed(0)
    ffn = LoryFFN(tiny_config(n_embd=64, ffn_hidden=96))
    for p in ffn.parameters():
        nn.init.normal_(p, std=0.1)
        if p.dim() == 3:
            p.data.mul_(apart).add_(torch.randn_like(p[0]) * 0.1 * (1 - apart))
    x, probe = torch.randn(2, 2, 24, 64)
    results, routing, inputs = [], [], [x.requires_grad_(), *ffn.parameters()]
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast('cpu', dtype=dtype, enabled=dtype == torch.bfloat16):
            y, e = ffn(x)
        assert y.dtype == dtype
        routing.append(e)
        results.append([y.float(), *torch.autograd.grad((y.float() * probe).sum(), inputs)])
    assert_close(*routing)  # float32 in both
    errors = [((exact - rounded).norm() / exact.norm()).item() for exact, rounded in zip(*results)]
    assert max(errors) < 0.02, errors  # bfloat16 keeps 8 bits: 0.004 an operation


@pytest.mark.filterwarnings('ignore:.*script_method:DeprecationWarning')  # torch's own
@pytest.mark.parametrize('backend', [None, 'aot_eager_decomp_partition'])  # the latter needs no C++ compiler
def test_merged_weights_are_not_kept_for_backward(backend):
    """What autograd saves does not grow with the number of segments times the size of an expert."""
    ffn = randomize(LoryFFN(tiny_config(n_embd=32, ffn_hidden=512, block_size=64, segment_len=1)))
    run = torch.compile(ffn, backend=backend) if backend else ffn
    x, sizes = torch.randn(2, 64, 32, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        y = run(x)[0]
    assert max(sizes) < 2 * 64 * 32 * 512 / 10, 'a merged copy of the experts was saved for every segment'
    inputs = [x, *ffn.parameters()]
    assert_close(*(torch.autograd.grad(z.square().sum(), inputs) for z in (y, ffn(x)[0])))


def test_the_dense_model_against_a_second_implementation():
    """Rotary attention in complex numbers, LLaMA's FFN, RMSNorm, and the loss from log-probabilities."""
    model, (idx, targets) = randomize(Lory(tiny_config(n_experts=1, n_layer=1))), torch.randint(50, (2, 2, 9))
    attn, ffn, x = model.blocks[0].attn, model.blocks[0].ffn, model.embed.weight[idx]
    angle = torch.outer(torch.arange(9.), 10000.0 ** (-torch.arange(4) / 4)).double()

    def normed(x):
        return x / x.square().mean(-1, keepdim=True).sqrt()
    q, k, v = (normed(x) @ attn.qkv.weight.T).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = (torch.complex(t[..., :4], t[..., 4:]) * torch.exp(1j * angle) for t in (q, k))
    scores = ((q @ k.mH).real / math.sqrt(8)).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 16) @ attn.proj.weight.T
    x = x + (F.silu(normed(x) @ ffn.gate[0]) * (normed(x) @ ffn.up[0])) @ ffn.down[0]
    logp = (normed(x) @ model.embed.weight.T).log_softmax(-1)
    targets[0, 3] = -1  # ignored
    terms = [-logp[b, t, targets[b, t]].item() for b in range(2) for t in range(9) if targets[b, t] >= 0]
    logits, loss, routing = model(idx, targets, return_routing=True)
    assert_close(logits, normed(x) @ model.embed.weight.T, rtol=1e-6, atol=1e-6)  # its angles are float32
    assert loss.item() == pytest.approx(sum(terms) / 17, rel=1e-5)
    assert ffn.router is None and routing.shape == (2, 1, 2, 1)


# --- lory.py: what may depend on what. ---

def changed_positions(model, idx, t):
    """Where do the logits change with token t of sequence 1? (B, L) bool"""
    other = idx.clone()
    other[1, t] = (other[1, t] + 1 + torch.randint(48, ())) % 50
    return (model(idx)[0] - model(other)[0]).abs().amax(-1) > 1e-9


@pytest.mark.parametrize('how', [*ROUTINGS, dict(first_segment='self', segment_len=24)])
@pytest.mark.parametrize('L', [24, 21])
def test_a_token_is_felt_from_its_own_position_on_and_in_its_own_sequence(how, L):
    """Except where segment 1 routes itself, `self`: its tokens are felt in all of it. The last case, SMEAR,
    has no other segment, and the test sees every token look ahead."""
    model, idx = randomize(Lory(tiny_config(**how))), torch.randint(50, (3, L))
    weights = model(idx, return_routing=True)[2]  # (B, n_layer, N, E)
    assert weights.amax(-1).median() > 0.9, 'routing must be far from uniform'
    for t in range(L):
        start = 0 if model.config.first_segment == 'self' and t < model.config.segment_len else t
        felt = [[False] * L, [i >= start for i in range(L)], [False] * L]
        assert changed_positions(model, idx, t).tolist() == felt


# --- lory.py: how a model begins, and dense warm-up. ---

def test_models_of_one_seed_begin_as_the_same_function_with_1_and_with_8_experts():
    """Bit for bit: what a parameter begins with does not depend on those made before it."""
    dense, model, idx = *(Lory(tiny_config(n_experts=E)) for E in (1, 8)), torch.randint(50, (2, 24))
    for name, p in dense.named_parameters():
        assert torch.equal(p.expand_as(model.get_parameter(name)), model.get_parameter(name))
    assert_close(model(idx)[0], dense(idx)[0])
    with torch.device('meta'):
        later = Lory(tiny_config(tie_embeddings=False))
    later.to_empty(device='cpu').init_weights(1337)  # as a rank does under --shard
    assert_close(later.state_dict(), Lory(tiny_config(tie_embeddings=False)).state_dict(), rtol=0, atol=0)
    drawn = [p for seed in (1337, 1) for p in Lory(tiny_config(), seed=seed).parameters() if p.std() > 0]
    assert len({p.flatten()[0].item() for p in drawn}) == len(drawn) == 26, 'no two parameters begin alike'


def batch(i):
    """Batch i of a language in which each token decides the next. (4, 25) tokens"""
    first = torch.randint(50, (4, 1), generator=torch.Generator().manual_seed(i))
    return (first + 7 * torch.arange(25)) % 50


def update(model, optimizer, idx, tied=False):
    """One step of AdamW on idx (B, L + 1), without clipping. -> loss"""
    loss = model(idx[:, :-1], idx[:, 1:])[1]
    optimizer.zero_grad()
    loss.backward()
    if tied:
        model.tie_gradients()
    optimizer.step()
    if tied:
        model.tie_experts()
    return loss.item()


def spread(model):
    """How far the experts are apart: the largest difference from the first one."""
    return max((p - p[:1]).abs().max().item() for p in model.parameters() if p.dim() == 3)


def dense_of(model):
    """The dense Lory that has the first expert of each layer of `model`."""
    dense = Lory(replace(model.config, n_experts=1)).to(model.embed.weight.dtype)
    dense.fill({name: p[:1] if p.dim() == 3 else p for name, p in model.named_parameters()})
    return dense


@pytest.mark.parametrize('router, shape', [(1, {}), (200, {}), (0, {}), (  # scale of the router's weights
    200, dict(n_experts=3, n_embd=10, n_head=1, ffn_hidden=7))])
def test_dense_warmup_trains_the_dense_model_and_then_experts_part(router, shape):
    """Tied experts stay equal bit for bit. However they are routed, they make the dense model of one expert,
    and the one trained beside them up to rounding and Adam's epsilon, which meets dW / E here and dW there:
    3e-5 in the losses of 40 steps, 2e-3 in logits. Untied experts part, unless the router is zero."""
    model = Lory(tiny_config(**shape))
    for block in model.blocks:
        block.ffn.router.weight.data *= router
    dense = Lory(replace(model.config, n_experts=1))
    optimizer, beside = (m.optimizer(3e-3, 0.1, (0.9, 0.95)) for m in (model, dense))
    for i in range(40):
        loss = update(model, optimizer, batch(i), tied=True)
        assert loss == pytest.approx(update(dense, beside, batch(i)), abs=1e-4) and spread(model) == 0
    logits, _, routing = model(batch(40), return_routing=True)
    assert_close(logits, dense_of(model)(batch(40))[0], rtol=0, atol=1e-5)
    assert_close(logits, dense(batch(40))[0], rtol=0, atol=1e-2)
    assert (routing.max() > 0.9) == (router == 200) and loss < 3.3
    assert all(block.ffn.router.bias.norm() == 0 for block in model.blocks), 'the router waits'
    for i in range(40):
        update(model, optimizer, batch(i))
    assert spread(model) > 0.01 if router else spread(model) == 0


def test_paper_presets_have_the_papers_sizes():
    sizes = {'0.3b': {1: 0.3, 8: 1.8, 16: 3.5, 32: 6.8}, '1.5b': {1: 1.5, 8: 7.8, 16: 15.0, 32: 29.5}}
    for preset, n_experts, total in ((preset, E, n) for preset in sizes for E, n in sizes[preset].items()):
        shape = {k: v for k, v in train.PRESETS[preset].items() if k in LoryConfig.__dataclass_fields__}
        with torch.device('meta'):
            model = Lory(LoryConfig(vocab_size=32000, n_experts=n_experts, **shape))
        assert model.num_params() / 1e9 == pytest.approx(total, abs=0.08)
        assert model.num_params(active=True) / 1e9 == pytest.approx(float(preset[:-1]), abs=0.08)


# --- lory.py: generation, against passes over the whole text. ---

def test_prompt_routing_is_one_merge_by_the_prompts_mean(monkeypatch):
    """prefill, decode and specialize are the dense model of the experts averaged as the prompt says. Past
    block_size = 12 that model, which reads the whole text at once, has a sliding-window mask."""
    model = randomize(Lory(tiny_config(block_size=12)))
    idx, rope = torch.randint(50, (1, 30)), rotation(torch.arange(9), 8)
    x, dense = model.embed(idx[:, :9]), dense_of(model)
    for block, plain in zip(model.blocks, dense.blocks):
        h = block.ffn_norm(x + block.attn(block.attn_norm(x), rope))
        e = (h[0].mean(0) @ block.ffn.router.weight.T + block.ffn.router.bias).softmax(0)
        for name in ('gate', 'up', 'down'):
            getattr(plain.ffn, name).data = torch.einsum('e,eio->io', e, getattr(block.ffn, name))[None]
        x, _ = plain(x, rope)
    near, attend = torch.ones(30, 30).tril().triu(-11).bool(), F.scaled_dot_product_attention
    special = model.specialize(idx[:, :9])
    with monkeypatch.context() as patch:
        patch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, is_causal: attend(q, k, v, near))
        expected = dense(idx)[0]
        assert_close(special(idx)[0], expected)
    logits, weights, caches = model.prefill(idx[:, :9])
    assert_close(weights[:, -1], e[None, None])
    for t in range(9, 30):
        assert_close(logits, expected[:, t - 1])
        logits = model.decode(idx[:, t], caches)


def test_drawing_keeps_what_it_should():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])  # probabilities .64 .24 .09 .03
    p, first = logits.softmax(0), torch.tensor([1.0, 0, 0, 0])
    two, tempered = (F.pad((logits[:2] / t).softmax(0), (0, 2)) for t in (1, 2))
    torch.manual_seed(0)
    for expected, *how in ((first, 0, 0, 1.0), (p, 1.0, 0, 1.0), (p, 1.0, 99, 1.0), (tempered, 2.0, 2, 1.0),
                           (two, 1.0, 0, 0.7), (first, 1.0, 0, 0.6), (first, 1.0, 0, 0.0)):
        share = torch.bincount(draw(logits.repeat(4000, 1), *how), minlength=4) / 4000
        assert_close(share, expected, atol=0.03, rtol=0)
        assert all(share[expected == 0] == 0)


def test_a_model_sure_of_each_token_goes_on_with_the_known_text():
    """Trained on a sequence that repeats itself, until no other token comes near."""
    text, model = torch.tensor([3, 1, 4, 11, 5, 9, 2, 6, 35, 8, 7, 0, 13]).repeat(6), Lory(tiny_config())
    optimizer = model.optimizer(1e-2, 0.1, (0.9, 0.95))
    for i in range(60):
        update(model, optimizer, text.unfold(0, 25, 1)[i % 13::13], tied=i < 20)
    best = model(text[None, :24])[0][:, 12:].topk(2).values  # (1, 12, 2)
    assert (best[..., 0] - best[..., 1]).min() > 2
    new = model.generate(text[None, :24], 20, temperature=0)
    assert new.tolist() == [[0, 13, 3, 1, 4, 11, 5, 9, 2, 6, 35, 8, 7, 0, 13, 3, 1, 4, 11, 5]]


# --- lory.py: refusals and files. ---

def test_configs_and_prompts_that_cannot_be_are_refused():
    for name, value in (('n_experts', 0), ('segment_len', 0), ('segment_len', 25), ('n_head', 3),
                        ('n_layer', 0), ('first_segment', 'zero'), ('routing', 'token')):
        with refused(name):
            tiny_config(**{name: value})
    model, zeros = Lory(tiny_config()), partial(torch.zeros, dtype=torch.long)
    for wrong, word in ((zeros(1, 5) + 50, 'outside'), (zeros(1, 5) - 1, 'outside'),
                        (torch.empty(1, 5, device='meta'), 'is on meta')):
        with refused(word):
            model.generate(wrong, 3)
    for read, *shape in ((model.prefill, 1, 0), (model.prefill, 1, 25), (model.specialize, 2, 5)):
        with refused('block_size=24|one prompt'):
            read(zeros(shape))
    assert model.generate(zeros(2, 5), 0).shape == (2, 0), 'no new tokens are none'


def test_checkpoints_are_read_as_written_or_refused(tmp_path):
    """Refused: cut off, with one bit flipped, no checkpoint at all, of an older format, a folder, missing."""
    model, path = Lory(tiny_config(tie_embeddings=False)), tmp_path / 'ckpt.pt'
    save_checkpoint(path, model, note='kept')
    again, ckpt = load_checkpoint(path)
    assert ckpt['note'] == 'kept' and again.config == model.config and not again.training
    assert_close(dict(again.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)
    whole, weight = path.read_bytes(), model.embed.weight.detach().numpy().tobytes()
    at = whole.index(weight)
    for damaged in (whole[:1000], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:], b'', weight):
        path.write_bytes(damaged)
        with refused('damaged'):
            load_checkpoint(path)
    for other in (dict(ckpt, format=1), [1, 2]):
        torch.save(other, path)
        with refused('format 2'):
            load_checkpoint(path)
    for missing in (tmp_path, tmp_path / 'none'):
        with refused('cannot read'):
            load_checkpoint(missing)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def full(data):
        raise OSError(28, 'No space left on device')
    (tmp_path / 'f').write_text('old')
    for write in (full, lambda data: torch.save(data, SimpleNamespace(write=full))):  # which hides the cause
        with refused('No space left.*unchanged'), atomic_open(tmp_path / 'f') as f:
            f.write(b'half')
            write(b'')
    with pytest.raises(KeyboardInterrupt), atomic_open(tmp_path / 'f') as f:
        f.write(b'half')
        raise KeyboardInterrupt
    assert (tmp_path / 'f').read_text() == 'old' and os.listdir(tmp_path) == ['f']


# --- prepare.py: reading, holding out, chaining, tokenizing, writing. ---

OWN = ['--input', 'own', '--vocab_size=400', '--val_fraction=.2']


@pytest.fixture(scope='session')
def data_docs():
    """Some 200 real documents of five domains."""
    return prepare.read_builtin(mb_per_domain=0.12)


@pytest.fixture(scope='session')
def data_home(data_docs, tmp_path_factory):
    """A folder with `own/`, documents as files in two subfolders, and `data/own`, the dataset of it."""
    home = tmp_path_factory.mktemp('data_home')
    for i, doc in enumerate(data_docs):
        if doc.domain in ('prose', 'cpp'):
            write_files(home, {f'own/{doc.domain}/{i}.txt': doc.text})
    data_prepare(home, *OWN)
    return home


@pytest.fixture
def data_copy(data_home, tmp_path):
    """A folder with the same, to change."""
    return shutil.copytree(data_home, tmp_path / 'copy', ignore=shutil.ignore_patterns('whole', '*.pt'))


def data_prepare(home, *argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        prepare.main(list(argv))


def data_read(home, split, name='own'):
    """[(text, domain)] of a split, in stored order, decoded from the bins with nothing of prepare."""
    path = home / 'data' / name
    meta = json.loads((path / 'meta.json').read_text())
    tokens, docs = np.fromfile(path / f'{split}.bin', '<u2'), np.load(path / f'{split}_docs.npz')
    pieces = [base64.b64decode(t) for t in json.loads((path / 'tokenizer.json').read_text())['tokens']]
    out = []
    for a, b, domain in zip(docs['start'], docs['start'][1:], docs['domain']):
        assert tokens[a] == meta['eot'] and meta['eot'] not in tokens[a + 1:b]
        out.append((b''.join(pieces[t] for t in tokens[a + 1:b]).decode(), meta['domains'][domain]))
    assert docs['start'][-1] == len(tokens) == meta[split]['tokens']
    return out


def data_words(n, seed=0):
    """`n` words that nobody knows."""
    rng = random.Random(seed)
    letters = 'abcdefghijklmnopqrstuvw'
    return ' '.join(''.join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(n))


def write_files(home, files):
    """Write {name: text or bytes} below `home`."""
    for name, data in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def data_jsonl(path, records):
    records = [record if isinstance(record, dict) else {'text': record} for record in records]
    path.write_text('\n'.join(map(json.dumps, records)) + '\n\n')


def data_size(docs, domain):
    return prepare.count_bytes(doc for doc in docs if doc.domain == domain)


# --- The built-in corpus. ---

def test_pieces_join_to_the_text(data_docs):
    texts = [doc.text for doc in data_docs[:50]]
    texts += ['x' * 10_000, 'line\n' * 3000, '\n\n'.join(['  word ' * 90] * 20), ' ' * 9999]
    for text in [*texts, '\n\n'.join(texts)]:
        pieces = prepare.cut(text)
        assert ''.join(pieces) == text and max(map(len, pieces)) <= prepare.PIECE
    code = 'def f():\n    a = 1\n\n    return a\n\n\n' * 300
    assert all(piece.startswith('def f') for piece in prepare.cut(code))


def test_split_python():
    source = ('import os\n\n\ndef f(x):\n    """Says.\n\n    >>> f(1)\n    2\n\n    More.\n    """\n'
              '    return x\n\n\nclass A:\n    "\\d only"\n')
    parts = prepare.split_python(source)
    assert parts['prose'] == 'Says.\n\nMore.\n\n\\d only' and parts['repl'] == '>>> f(1)\n2'
    assert parts['python'] == 'import os\n\n\ndef f(x):\n    return x\n\n\nclass A:\n    pass\n'


def test_builtin_corpus(data_docs, tmp_path, capfd, monkeypatch):
    for domain in prepare.DOMAINS:
        mine = [doc for doc in data_docs if doc.domain == domain]
        assert 120_000 <= sum(len(doc.text) for doc in mine) + 4096 < 135_000
        assert max(Counter(doc.source for doc in mine).values()) <= 4
        assert all(500 < len(doc.text) <= prepare.PIECE for doc in mine)
    assert all('>>> ' in doc.text for doc in data_docs if doc.domain == 'repl')
    monkeypatch.setattr(prepare, 'read_builtin', lambda mb: data_docs[:])
    data_prepare(tmp_path, '--vocab_size=300')
    dataset = prepare.load_dataset(tmp_path / 'data/builtin', 64)
    assert dataset.meta['domains'] == prepare.DOMAINS and set(dataset.val.domain) == set(range(5))
    out, err = capfd.readouterr()
    assert err == '' and 'restarts' in out and 'adjacent cosine' in out


# --- A user's own text. ---

def test_input_kinds(tmp_path, capsys, monkeypatch):
    """Folders with links in a circle, text, JSONL, and what is no text. The text says its domain."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {
        'books/sea/deep/1.md': 'sea: a whale', 'books/sea/2.md': 'sea: a shark', 'books/3.txt': 'books: 3',
        'elsewhere/4.txt': 'link: from elsewhere', 'note.txt': '\ufeffnote.txt: two\r\nlines',
        'books/.git/config': 'hidden', 'books/empty.txt': ' \n', 'books/latin.txt': b'caf\xe9',
        'books/sea/picture.png': b'\x89PNG', 'books/sea/zeros.bin': b'\0\1\2'})
    for link, target in ('books/link', 'elsewhere'), ('elsewhere/loop', 'books'), ('books/broken', 'none'):
        Path(link).symlink_to(tmp_path / target)
    os.mkfifo('books/pipe')
    data_jsonl(Path('feed.JSONL'), [
        {'text': 'news: in \u2028 line', 'domain': 'news'}, {'text': 'feed.JSONL: null', 'domain': None},
        {'text': '0: <|endoftext|>', 'domain': 0}, ''])
    docs = prepare.read_inputs(['books', 'note.txt', 'feed.JSONL', 'books/sea'])
    assert [doc.domain for doc in docs] == [doc.text.split(':')[0] for doc in docs]
    assert len({doc.source for doc in docs}) == len({doc.text for doc in docs}) == len(docs) == 8
    assert docs[4].text == 'note.txt: two\nlines'
    assert regex.search('6 inputs .*: books/broken, books/empty.txt, books/lat.*', capsys.readouterr().out)


def test_one_label_is_one_domain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = ['C#', 'C', 'a/b', 'ab', 'news.2023', 'news.2024', 'naïve 中文', 'x' * 40, 'x' * 41]
    odd = [0, '00', 1.0, True, {'a': 1}, '', '_a', 'a', '<5f>a', '$x$', 'x', ' ', '\ud800', 'line\nbreak']
    labels = plain + odd
    data_jsonl(tmp_path / 'a.jsonl', [{'text': 'text', 'domain': label} for label in labels * 2])
    names = [doc.domain for doc in prepare.read_inputs(['a.jsonl'])]
    assert names[:len(labels)] == names[len(labels):] and len(set(names)) == len(labels)
    assert names[:len(plain)] == plain and all(name.isprintable() and '$' not in name for name in names)
    assert not any(name.startswith(('_', ' ')) for name in names)


@pytest.mark.parametrize('paths', [('en/text', 'fr/text'), ('n.2023', 'n.2024'), ('b.txt', 'b.md'),
                                   ('en/a.txt', 'fr/a.txt')])
def test_one_input_is_one_domain(paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in paths:
        write_files(tmp_path, {path if path.endswith(('.txt', '.md')) else f'{path}/c.txt': 'text'})
    docs = prepare.read_inputs(paths)
    assert tuple(doc.domain for doc in docs) == paths and len({doc.source for doc in docs}) == 2


# --- What is held out, and which documents count as the same. ---

def test_sources_are_held_out_whole(data_docs):
    val, train = prepare.hold_out(data_docs, .2)
    assert not {doc.source for doc in val} & {doc.source for doc in train}
    assert Counter(val + train) == Counter(data_docs)
    assert set(prepare.hold_out(data_docs[::-1], .2)[0]) == set(val)
    for domain in prepare.DOMAINS:
        assert .1 < data_size(val, domain) / data_size(data_docs, domain) < .35


@pytest.mark.parametrize('fraction', [.05, .2])
@pytest.mark.parametrize('sizes', [[25_000] * 4, [40_000, 9_000, 900], [60_000], [20_000, 300], [400] * 200,
                                   [1200] * 9 + [90_000]])
def test_a_share_of_the_bytes_is_held_out_of_few_files_or_many(sizes, fraction):
    docs = [Document(data_words(n // 3, i)[:n] + 'é中' * (i % 2) + '\nend', str(d), f'{d}/{i}')
            for d in range(2) for i, n in enumerate(sizes)]
    val, train = prepare.hold_out(docs, fraction)
    for domain in '01':
        goal = fraction * data_size(docs, domain)
        assert goal / 2 <= data_size(val, domain) <= goal + 3
        mine, held, kept = ([doc.text for doc in side if doc.domain == domain]
                            for side in (docs, val, train))
        tails, heads = ([text for text in side if text not in mine] for side in (held, kept))
        assert len(tails) == len(heads) <= 1 and all(heads[i] + tails[i] in mine for i in range(len(tails)))
        assert len(mine) == len(held) + len(kept) - len(tails)
        assert not tails or min(map(len, mine)) > goal / 2 or len(sizes) < 9


def test_the_cap_and_the_least(monkeypatch, tmp_path, capsys):
    docs = [Document(data_words(100, i), 'a', str(i)) for i in range(300)]
    monkeypatch.setattr(prepare, 'MAX_VAL', 5000)
    assert 4000 < data_size(prepare.hold_out(docs, .5)[0], 'a') <= 5000
    data_jsonl(tmp_path / 'own.jsonl', [doc.text for doc in docs] + [{'text': 'a line', 'domain': 'small'}])
    data_prepare(tmp_path, '--input', 'own.jsonl', '--tokenizer=byte')
    out = capsys.readouterr().out
    assert regex.search('small +6 bytes to train on +0 held out +not measured: too little', out)
    assert out.count('not measured') == 1


def test_equal_texts_are_one_whatever_their_words(tmp_path, capsys):
    """Digits, emoji and dashes have no words for TF-IDF, a page 101 times is too frequent for it."""
    rng = random.Random(0)
    kinds = [str(rng.random()) for _ in range(60)]
    kinds += [''.join(rng.choices('😀😁😂🤣😃', k=40)) for _ in range(60)]
    kinds += ['-' * i for i in range(3, 30)] + [data_words(30, 1)]
    records = kinds * 5 + [data_words(80, 7).replace(' ', ' ' * (1 + i % 3)) for i in range(101)]
    rng.shuffle(records)
    data_jsonl(tmp_path / 'own.jsonl', records)
    data_prepare(tmp_path, '--input', 'own.jsonl', '--tokenizer=byte', '--val_fraction=.3')
    train, val = ([' '.join(text.split()) for text, _ in data_read(tmp_path, s)] for s in ('train', 'val'))
    assert sorted(train + val) == sorted(kinds + [data_words(80, 7)]) and len(val) > 10
    out = capsys.readouterr().out
    assert f' {4 * len(kinds) + 100:,} documents equal to others' in out and 'more than half of' in out
    assert len(regex.findall(r' own\.jsonl:\d+', out)) == 2


def data_check_twins(texts, n_held):
    """near_duplicates against its definition. -> similarities (n, n), {dropped: its twin}, as numbers"""
    docs = [Document(text, 'd', str(i)) for i, text in enumerate(texts)]
    texts = [' '.join(text.split()) for text in texts]
    sets = [{text[i:i + 9] for i in range(len(text) - 8)} if len(text) >= 50 else {text} for text in texts]
    similarity = np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])
    expected = {}
    for i in range(n_held, len(docs)):
        found = [j for j in range(i) if j not in expected and similarity[i, j] >= .8]
        expected |= {i: found[0]} if found else {}
    train, twins = prepare.near_duplicates(docs[:n_held], docs[n_held:])
    assert twins == [(docs[i], docs[j]) for i, j in expected.items()]
    assert train == [doc for i, doc in enumerate(docs) if i >= n_held and i not in expected]
    return similarity, expected


def test_near_duplicates_equal_brute_force(data_docs):
    rng = random.Random(0)
    texts = [doc.text[:rng.randrange(45, 1500)] for doc in data_docs[::3]]
    for text in texts[:50]:  # edits that leave similarities on both sides of 0.8
        words = text.split(' ')
        for _ in range(rng.randrange(12)):
            words[rng.randrange(len(words))] = rng.choice(['', 'other', '\n', 'x1', rng.choice(words)])
        texts.append(' '.join(words))
    texts += [text[:48] + end for text in texts[:5] for end in 'ab']  # too short to be near
    words = data_words(150).split()
    for _ in range(25):  # all alike, and few of them twins
        texts.append(' '.join(rng.choice(words) if rng.random() < .04 else word for word in words))
    rng.shuffle(texts)
    similarity, expected = data_check_twins(texts, 40)
    assert len(expected) > 10 and min(expected.values()) < 40 < max(expected.values())
    assert ((similarity > .6) & (similarity < .8)).sum() > 10

    # A row of texts, each near the next. The held-out one takes along its neighbours, not the whole row.
    words = data_words(300).split()
    row = [' '.join(words[i * 8:i * 8 + 120]) for i in (6, 0, 1, 2, 3, 4, 5, 7, 8, 9, 10)]
    expected = data_check_twins(row, 1)[1]
    assert list(expected.values()).count(0) == 2 and len(row) - len(expected) >= 4


# --- Neighbours and chain. ---

def data_naive_chain(similarity, k, starts):
    """The walk of Sec. 3.2, O(n^2), from the full similarity matrix."""
    left, order = set(range(len(similarity))), []
    ranked = [[j for j in np.argsort(-row, kind='stable').tolist() if j != i and row[j]][:k]
              for i, row in enumerate(similarity)]
    while left:
        options = [j for j in ranked[order[-1]] if j in left] if order else []
        order.append(options[0] if options else [s for s in starts if s in left][0])
        left.remove(order[-1])
    return order


def test_neighbours_and_chain_agree_with_brute_force(data_docs):
    from sklearn.neighbors import NearestNeighbors
    X, n = prepare.embed([doc.text for doc in data_docs]), len(data_docs)
    similarity = X.toarray() @ X.toarray().T
    assert np.allclose(np.diag(similarity), 1, atol=1e-3)
    assert np.array_equal(similarity, X.toarray()[:, ::-1] @ X.toarray()[:, ::-1].T)  # exact, in any order
    neighbours = prepare.nearest(X, 5)
    assert all(len(row) == 5 and i not in row for i, row in enumerate(neighbours))
    index = NearestNeighbors(n_neighbors=6, metric='cosine', algorithm='brute').fit(X)
    best = np.take_along_axis(similarity, np.array(neighbours), 1)
    assert np.allclose(1 - index.kneighbors(X)[0][:, 1:], best, atol=1e-3)

    order, restarts = prepare.chain(neighbours, np.random.default_rng(7))
    assert sorted(order) == list(range(n)) and 0 < restarts < n / 3
    starts = np.random.default_rng(7).permutation(n).tolist()
    assert order.tolist() == data_naive_chain(similarity, 5, starts)
    shuffled = np.random.default_rng(0).permutation(n)
    assert similarity[order[:-1], order[1:]].mean() > 3 * similarity[shuffled[:-1], shuffled[1:]].mean()


def test_ties_go_to_the_lower_number_strangers_are_no_neighbours_and_a_walk():
    X = prepare.embed(['alpha beta'] * 2 + ['alpha gamma'] * 40 + ['delta epsilon'] * 2 + ['12'])
    neighbours = prepare.nearest(X, 3)
    assert neighbours[30] == [2, 3, 4] and neighbours[3] == [2, 4, 5] and neighbours[0] == [1, 2, 3]
    assert neighbours[42] == [43] and neighbours[44] == []
    assert prepare.nearest(prepare.embed(['one']), 3) == [[]]
    # 2 -> 0 -> 1, whose neighbour is used: on to 5, which has none, and to 4 -> 3.
    assert np.random.default_rng(3).permutation(6).tolist() == [2, 5, 4, 1, 3, 0]
    order, restarts = prepare.chain([[1], [2], [0], [4], [3], []], np.random.default_rng(3))
    assert restarts == 2 and order.tolist() == [2, 0, 1, 5, 4, 3]


def test_shards_are_a_permutation(data_docs, monkeypatch):
    monkeypatch.setattr(prepare, 'SHARD', 40)
    ordered, restarts, cosine = prepare.arrange(data_docs, 'similar', 8, [1])
    assert Counter(ordered) == Counter(data_docs) and ordered != data_docs and cosine[0] > 2 * cosine[1]
    for shard in np.array_split(np.arange(len(data_docs)), -(-len(data_docs) // 40)):
        assert {ordered[i] for i in shard} == {data_docs[i] for i in shard}  # each stays in its place


# --- The tokenizer. ---

@pytest.mark.parametrize('name, n_vocab', [('bpe', 500), ('byte', 257)])
def test_tokenizer_round_trip(name, n_vocab, data_docs):
    d = json.loads(json.dumps(prepare.make_tokenizer(name, 500, [doc.text for doc in data_docs[:100]])))
    encoding = prepare.load_tokenizer(d)
    assert encoding.n_vocab == n_vocab and encoding.eot_token == n_vocab - 1 == len(d['tokens'])
    sizes = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.eot_token)]
    assert prepare.token_bytes(d) == sizes + [0]
    rng = random.Random(0)
    points = [rng.randrange(rng.choice([0x110000, 0x3000, 128])) for _ in range(20_000)]
    anything = ''.join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
    for text in [anything, 'a<|endoftext|>b', '', ' ' * 10**6 + 'x', 'q' * 10**6, '\n \t' * 999]:
        tokens = prepare.encode(encoding, text)
        assert encoding.decode(tokens) == text and encoding.eot_token not in tokens


def data_naive_bpe(text, n_tokens):
    """Recount all pairs for every merge."""
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(prepare.PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < n_tokens:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        top = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if top is None or pairs[top] < 2:
            break
        if b''.join(top) not in tokens:
            tokens.append(b''.join(top))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == top:
                    word[i:i + 2] = [b''.join(top)]
                i += 1
    return tokens


@pytest.mark.parametrize('seed', range(3))
def test_bpe_merges_equal_a_naive_trainer(seed, data_docs):
    rng = random.Random(seed)
    soup = ''.join(rng.choice('aab ') for _ in range(2000))  # overlapping pairs such as aaaa
    clauses = ''.join(rng.choices('的一是不了人我在有，。他这', weights=range(13, 0, -1), k=1500))
    for text, n_tokens in [(data_docs[seed].text, 340), (soup, 300), (clauses, 320)]:
        assert prepare.train_bpe([text], n_tokens) == data_naive_bpe(text, n_tokens)
    assert prepare.train_bpe(['abc'], 1000) == [bytes([b]) for b in range(256)]  # no pair occurs twice


def test_bpe_of_text_without_blanks_is_not_slow(data_docs):
    rng = random.Random(0)
    signs = [chr(c) for c in range(0x4e00, 0x4e00 + 3000)]
    common = np.cumsum(1 / np.arange(1, 3001)).tolist()
    chinese = [''.join(rng.choices(signs, cum_weights=common, k=12)) + '，' for _ in range(80_000)]  # 3 MB
    chinese = [''.join(chinese[i:i + 100]) for i in range(0, len(chinese), 100)]
    spent = []
    for texts in ([doc.text for doc in data_docs], chinese):
        began = time.process_time()
        tokens = prepare.train_bpe(texts, 600)
        spent.append((time.process_time() - began) / sum(len(text.encode()) for text in texts))
    assert spent[1] < 3 * spent[0] and len(tokens) == 600


def test_a_tokenizer_from_a_file(data_copy):
    """A dataset with the tokenizer of another, or of a checkpoint."""
    file = data_copy / 'data/own/tokenizer.json'
    tokenizer = json.loads(file.read_text())
    model = Lory(LoryConfig(vocab_size=400, block_size=8, segment_len=4, n_layer=1, n_head=1, n_embd=8))
    save_checkpoint(data_copy / 'ckpt.pt', model, tokenizer=tokenizer)
    save_checkpoint(data_copy / 'bare.pt', model)
    write_files(data_copy, {'a.txt': data_words(900), 'hf.json': '{"model": {"vocab": {}}}'})
    for name in ('ckpt.pt', file):
        data_prepare(data_copy, '--input', 'a.txt', f'--tokenizer={name}')
        assert prepare.load_dataset(data_copy / 'data/a', 8).tokenizer == tokenizer
        stored = data_read(data_copy, 'train', 'a') + data_read(data_copy, 'val', 'a')
        assert ''.join(text for text, _ in stored) == data_words(900)
    for name in ('bare.pt', 'hf.json', 'a.txt'):
        with refused('no tokenizer'):
            data_prepare(data_copy, '--input', 'a.txt', f'--tokenizer={name}')


def test_other_tokenizers_and_large_vocabularies(data_copy, monkeypatch):
    """One of tiktoken's with a gap in its ranks, as p50k has, and an id above 16 bits."""
    ranks = {bytes([b]): b for b in range(256)} | {b'he': 257, b'th': 258}
    encoding = prepare.tiktoken.Encoding('gpt2', pat_str=prepare.PATTERN, mergeable_ranks=ranks,
                                         special_tokens={'<|endoftext|>': 256, '<|other|>': 70_000})
    monkeypatch.setattr('tiktoken.get_encoding', lambda name: encoding)
    data_prepare(data_copy, '--input', 'own', '--tokenizer=gpt2')
    dataset = prepare.load_dataset(data_copy / 'data/own', 32)
    assert dataset.meta['vocab_size'] == 70_001 and dataset.val.tokens.dtype == np.uint32
    assert dataset.val.tokens[0] == 256
    text = 'the other <|endoftext|>'
    assert prepare.load_tokenizer(dataset.tokenizer).encode_ordinary(text) == encoding.encode_ordinary(text)
    assert prepare.token_bytes(dataset.tokenizer) == [1] * 256 + [0, 2, 2] + [0] * (70_001 - 259)


def test_tiktoken_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr('tiktoken.registry.ENCODINGS', {})
    monkeypatch.setenv('HTTPS_PROXY', 'http://127.0.0.1:9')  # where nobody listens
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    with refused('--tokenizer=bpe'):
        prepare.make_tokenizer('gpt2')


# --- On disk. ---

def test_bins_decode_to_the_documents(data_home):
    files = {(path.read_text(), path.parent.name) for path in (data_home / 'own').rglob('*.txt')}
    train, val = data_read(data_home, 'train'), data_read(data_home, 'val')
    assert not set(train) & set(val) and set(train + val) <= files and len(train + val) > .9 * len(files)
    domains = [domain for _, domain in val]
    assert domains == sorted(domains) and set(domains) == {'prose', 'cpp'}  # contiguous

    dataset = prepare.load_dataset(data_home / 'data/own', 32)
    encoding = prepare.load_tokenizer(dataset.tokenizer)
    assert encoding.n_vocab == dataset.meta['vocab_size'] == 400
    for name, split, stored in (('train', dataset.train, train), ('val', dataset.val, val)):
        texts = [text for text, _ in stored]
        assert [part.dtype for part in split] == [np.uint16, np.int64, np.uint8]
        assert encoding.decode(split.tokens.tolist()) == ''.join('<|endoftext|>' + text for text in texts)
        info, file = dataset.meta[name], data_home / f'data/own/{name}.bin'
        assert (info['documents'], info['bytes']) == (len(texts), len(''.join(texts).encode()))
        assert dataset.meta['sha256'][f'{name}.bin'] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_same_seed_same_bytes_on_another_processor(data_home, data_copy):
    """A second process, without the vector instructions that decide how numpy sorts and adds."""
    shutil.rmtree(data_copy / 'data')
    optional = ' '.join(np._core._multiarray_umath.__cpu_dispatch__)
    subprocess.run([sys.executable, prepare.__file__, *OWN], cwd=data_copy, check=True, capture_output=True,
                   env={**os.environ, 'NPY_DISABLE_CPU_FEATURES': optional})
    assert {path.name for path in (data_copy / 'data/own').iterdir()} == prepare.FILES
    for name in prepare.FILES:
        here, there = (home / 'data/own' / name for home in (data_copy, data_home))
        assert here.read_bytes() == there.read_bytes(), name
    similar, held = data_read(data_copy, 'train'), data_read(data_copy, 'val')
    for flag in ('--seed=2', '--order=random'):
        data_prepare(data_copy, *OWN, flag)
        train = data_read(data_copy, 'train')
        assert train != similar and sorted(train) == sorted(similar)
    assert data_read(data_copy, 'val') == held  # --order=random is judged on the same text


@pytest.mark.parametrize('name, old, new, message', [
    ('meta.json', b'"format": 1', b'"format": 2', 'format 2'), ('meta.json', b'sha256', b'sha', 'damaged'),
    ('meta.json', b'{', b'', 'damaged'), ('train.bin', b'\0', b'\1', 'checksum of train.bin'),
    ('val.bin', b'\0', b'', 'checksum'), ('val_docs.npz', b'PK', b'pk', 'checksum'),
    ('tokenizer.json', b'bpe', b'bqe', 'checksum')])
def test_damaged_data_is_refused(name, old, new, message, data_copy):
    path = data_copy / 'data/own'
    n = len(prepare.load_dataset(path, 32).val.tokens)
    assert len(prepare.load_dataset(path, n - 1).val.tokens) == n
    with refused('too few'):
        prepare.load_dataset(path, n)
    (path / name).write_bytes((path / name).read_bytes().replace(old, new, 1))
    with refused(f'{message}.*prepare.py'):
        prepare.load_dataset(path, 32)
    (path / name).unlink()
    with refused('missing.*prepare.py'):
        prepare.load_dataset(path, 32)


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError(28, 'No space left on device')])
@pytest.mark.parametrize('module, name, number', [(np, 'savez', 2), (os, 'replace', 1), (os, 'replace', 4)])
def test_a_failed_prepare_leaves_the_old_data(module, name, number, error, data_copy, monkeypatch):
    """Wherever a crash or a full disk hits. Between two renames it leaves what is refused."""
    path, calls, real = data_copy / 'data/own', [], getattr(module, name)
    old = prepare.load_dataset(path, 32).meta

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise error
        real(*args, **kwargs)

    monkeypatch.setattr(module, name, fail)
    with pytest.raises((KeyboardInterrupt, UserError), match='|No space left'):
        data_prepare(data_copy, *OWN, '--seed=3')
    assert set(os.listdir(path)) == prepare.FILES
    with refused('checksum') if number == 4 else nullcontext():
        assert prepare.load_dataset(path, 32).meta == old


# --- The script. ---

@pytest.mark.parametrize('argv, message', [
    ('--input nowhere', 'does not exist'), ('--input void', 'no text'), ('--input one.txt', 'too little'),
    ('--input spaces.txt', 'no text'), ('--input bad.jsonl', 'line 2'), ('--input list.jsonl', 'line 1'),
    ('--input same.jsonl', 'too little text'), ('--input alike --val_fraction=.6', 'nothing is left'),
    ('--input one.txt --tokenizer=gpt22', 'not known'), ('--input many.jsonl', '300 domains'),
    ('--dataset=a/b', 'plain'), ('--dataset=..', 'plain')])
def test_bad_input(argv, message, tmp_path):
    records = [json.dumps({'text': 'text', 'domain': i}) for i in range(300)]
    write_files(tmp_path, {
        'one.txt': 'one document', 'spaces.txt': ' ' * 1_000_000, 'void/.hidden': 'text',
        'bad.jsonl': '{"text": "a"}\n{"txt": 1}', 'list.jsonl': '["text"]',
        'many.jsonl': '\n'.join(records), 'same.jsonl': '{"text": "same"}\n' * 99,
        'data/own/meta.json': 'old',
        'alike/0': data_words(400), 'alike/1': data_words(400) + ' end'})
    with refused(message):
        data_prepare(tmp_path, '--dataset=own', *argv.split(' '))
    assert (tmp_path / 'data/own/meta.json').read_text() == 'old'


def test_bad_flags(tmp_path, capsys):
    for flag in ('--order=best', '--vocab_size=256', '--val_fraction=0', '--n_neighbors=0', '--nonsense=1'):
        with refused('', SystemExit):
            data_prepare(tmp_path, flag)
        assert flag.split('=')[0] in capsys.readouterr().err


# --- train.py, on a small real dataset. ---

TINY = ['--dataset=own', '--block_size=64', '--segment_len=16', '--n_embd=32', '--n_head=2', '--n_experts=4',
        '--batch_size=4', '--max_iters=30', '--dense_warmup=.5', '--eval_interval=10', '--eval_windows=3',
        '--log_interval=5', '--dtype=float32', '--device=cpu']  # experts are tied up to step 15


@pytest.fixture(scope='session')
def run_home(data_home):
    """data_home with a finished run of TINY in `whole`."""
    assert run_script(train, data_home, *TINY, '--out_dir=whole') == 0
    return data_home


def run_script(script, home, *argv, **more):
    """A script's main(), in the folder `home`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return script.main(list(argv), **more)


@pytest.fixture(autouse=True)
def own_signals(monkeypatch):
    """Give Ctrl-C back to pytest, for train.main takes it. And draw no pictures but those of step 30."""
    monkeypatch.setattr(train, 'plot', lambda out_dir, rows, *a, real=train.plot:
                        rows[-1]['step'] == 30 and real(out_dir, rows, *a))
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


@pytest.fixture
def tied(monkeypatch):
    """A list that grows by one each time that a model's experts are tied."""
    calls = []
    monkeypatch.setattr(Lory, 'tie_experts', lambda m, real=Lory.tie_experts: calls.append(1) or real(m))
    return calls


def test_windows_tile_the_stream_once_an_epoch():
    starts = {(seed, epoch): train.window_starts(999, 64, seed, epoch) for seed in (5, 6) for epoch in (0, 1)}
    for order in starts.values():
        assert sorted(order) == [*range(min(order), min(order) + 14 * 64, 64)] != list(order)
        assert 0 <= min(order) < 999 - 14 * 64
    assert len({tuple(order) for order in starts.values()}) == 4
    assert train.window_starts(65, 64, 0, 0).tolist() == [0]  # the shortest stream there may be
    args = SimpleNamespace(block_size=64, seed=5)
    x, y = train.get_batch(np.arange(999), 10, 8, args, 'cpu')  # across the end of an epoch
    assert torch.equal(y, x + 1) and x[:, 0].tolist() == [*starts[5, 0][10:], *starts[5, 1][:4]]


@pytest.mark.parametrize('L, limit, starts', [(10, 0, [[0, 10, 20, 30, 40, 50], [70, 80]]),
                                              (10, 3, [[0, 20, 40], [70, 80]]), (35, 0, [[0], [70]])])
def test_validation_windows_of_long_short_and_empty_domains(L, limit, starts):
    split = SimpleNamespace(tokens=np.arange(99), start=np.array([0, 30, 70, 99]), domain=np.array([0, 0, 2]))
    windows = train.validation_windows(split, ['long', 'empty', 'short'], L, limit)
    assert list(windows) == ['long', 'short']
    for chosen, expected, end in zip(windows.values(), starts, (70, 99)):
        assert [w.tolist() for w in chosen] == [list(range(i, min(i + L + 1, end))) for i in expected]


def test_validation_sums_against_one_window_at_a_time(run_home):
    """Each domain on its own text, with bytes counted from the decoded text."""
    data = prepare.load_dataset(run_home / 'data/own', 64)
    model, tokenizer = load_checkpoint(run_home / 'whole/ckpt.pt')[0], prepare.load_tokenizer(data.tokenizer)
    windows = train.validation_windows(data.val, ['cpp', 'prose'], 64)
    size = torch.tensor(prepare.token_bytes(data.tokenizer))
    sums, routing, used = train.evaluate(model, windows, size, 3, nullcontext())
    row, in_use = train.summary(sums, windows), torch.zeros(2, 4, dtype=torch.bool)
    for d, name in enumerate(windows):
        own = np.repeat(data.val.domain, np.diff(data.val.start)) == d
        stream, terms, weights = data.val.tokens[own].astype(np.int64), [], []
        for w in range(0, len(stream) - 64, 64):
            logits, _, e = model(torch.from_numpy(stream[None, w:w + 64]), return_routing=True)
            weights.append(e[0, :, 1:])  # (n_layer, N - 1, E)
            in_use |= (e[0, :, 1:] > 2 / 4).any(1)
            logp = logits[0].double().log_softmax(-1)
            terms += [(t >= 16, -logp[t, target].item(), len(tokenizer.decode_single_token_bytes(target)))
                      for t, target in enumerate(stream[w + 1:w + 65]) if target != tokenizer.eot_token]
        assert_close(routing[d], torch.stack(weights).mean((0, 2)))
        for later, key in ((0, ''), (1, 'later_')):
            nats, n_bytes = zip(*(term[1:] for term in terms if term[0] >= later))
            nats, n, n_bytes = sum(nats), len(nats), sum(n_bytes)
            ours = [*sums[d, later].tolist(), row[f'{key}bpb_{name}'], row[f'{key}ppl_{name}']]
            expected = [nats, n, n_bytes, nats / n_bytes / math.log(2), math.exp(nats / n)]
            assert ours == pytest.approx(expected, rel=1e-5)
    assert row['later_bpb'] == pytest.approx((row['later_bpb_cpp'] + row['later_bpb_prose']) / 2)
    assert torch.equal(used, in_use)


def test_a_tiny_run_learns_and_leaves_what_it_should(run_home):
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    val = [row['val_bpb'] for row in ckpt['rows'] if 'val_bpb' in row]
    assert len(val) == 3 and val[-1] < val[0] - 0.25 and ckpt['losses'][-1] < ckpt['losses'][0] - 0.5
    assert (model.config.n_experts, ckpt['step'], ckpt['tied_until']) == (4, 30, 15) and spread(model) > 0
    assert set(os.listdir(run_home / 'whole')) == {'best.pt', 'ckpt.pt', 'experts.png', 'log.csv', 'loss.png'}
    names, *lines = (run_home / 'whole/log.csv').read_text().splitlines()
    assert names.startswith('step,loss,lr,norm,ms,tok_s,val_bpb,later_bpb') and len(lines) == 6 + 3


LOSSES = [3.92877, 3.89642, 3.78070, 3.73069, 3.66252, 3.65812, 3.62614, 3.57949, 3.53947, 3.56094,
          3.50844, 3.48600, 3.48202, 3.49063, 3.46039, 3.47421, 3.47653, 3.45975, 3.46062, 3.43733]


def test_the_losses_of_twenty_steps_are_those_on_record(tmp_path, monkeypatch):
    """On data from a formula, with dense warm-up to step 5 and clipping. Other losses mean other training."""
    i, bounds = np.arange(3000), np.array([0, 3000])
    text = SimpleNamespace(tokens=(i * i // 7 + 5 * (i % 4)) % 50, start=bounds, domain=np.array([0]))
    tokenizer = prepare.make_tokenizer('byte')
    tokenizer.update(tokens=tokenizer['tokens'][:49], special_tokens={'<|endoftext|>': 49})
    meta = dict(domains=['text'], sha256={}, train=dict(bytes=3000))
    data = SimpleNamespace(meta=meta, train=text, val=text, tokenizer=tokenizer)
    monkeypatch.setattr(prepare, 'load_dataset', lambda *a: data)
    run_script(train, tmp_path, *TINY, '--max_iters=20', '--dense_warmup=.25', '--learning_rate=.01',
               '--grad_clip=.5', '--out_dir=out')
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')[1]['losses'] == pytest.approx(LOSSES, rel=0, abs=1e-4)


def carried(path):
    """What a run carries: the figures of its log but for a clock's, its weights, its optimizer's averages."""
    _, ckpt = load_checkpoint(path)
    rows = [{key: row[key] for key in row if key not in ('ms', 'tok_s')} for row in ckpt['rows']]
    return [ckpt['step'], ckpt['tied_until'], ckpt['losses'], rows], ckpt['model'], ckpt['optimizer']['state']


def stop(patch, where, call, kill):
    """Ctrl-C or a crash at a call of train's function, or when a file is written but not yet in its place."""
    owner, name = (os, 'replace') if '.' in where else (train, where)
    real, seen = getattr(owner, name), []

    def reached(*args):
        seen.extend([1] * ('.' not in where or str(args[1]).endswith(where)))
        if len(seen) == call and kill:
            raise KeyboardInterrupt
        return len(seen) == call and os.kill(os.getpid(), signal.SIGINT) or real(*args)
    patch.setattr(owner, name, reached)


@pytest.mark.parametrize('where, call, kill, saved', [
    ('get_batch', 13, False, 13), ('get_batch', 15, False, 15), ('get_batch', 22, False, 22),
    ('get_batch', 14, True, 10), ('evaluate', 2, True, 10), ('best.pt', 2, True, 10),
    ('ckpt.pt', 2, True, 10), ('experts.png', 1, True, 20)])
def test_a_run_stopped_and_resumed_equals_one_never_stopped(run_home, monkeypatch, where, call, kill, saved):
    """Bit for bit, pictures included. Ctrl-C saves where it comes: before, at and after the end of dense
    warm-up, which is step 15. A run that is killed goes on from its last checkpoint."""
    whole, out = run_home / 'whole', run_home / f'stopped-{where}-{call}'
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if kill else nullcontext():
        stop(patch, where, call, kill)
        assert run_script(train, run_home, *TINY, f'--out_dir={out.name}') == 130
    assert load_checkpoint(out / 'ckpt.pt')[1]['step'] == saved
    (out / 'ckpt.pt.tmp').write_bytes(b'half')  # a process that is killed for good leaves this
    torch.randn(7)  # the random state of the process does not matter
    run_script(train, run_home, '--init_from=resume', f'--out_dir={out.name}')
    for name in ('ckpt.pt', 'best.pt'):
        assert_close(carried(out / name), carried(whole / name), rtol=0, atol=0)
        orders = [list(load_checkpoint(folder / name)[1]['optimizer']['state']) for folder in (out, whole)]
        assert orders[0] == orders[1]
    for name in ('loss.png', 'experts.png'):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert set(os.listdir(out)) == set(os.listdir(whole))


def test_a_run_made_longer_is_not_tied_for_longer(run_home, monkeypatch, tied):
    """Stopped in dense warm-up and resumed with a larger max_iters, it is tied up to step 10 as planned."""
    with monkeypatch.context() as patch:
        stop(patch, 'get_batch', 5, kill=False)
        assert run_script(train, run_home, *TINY, '--max_iters=20', '--out_dir=longer') == 130
    assert load_checkpoint(run_home / 'longer/ckpt.pt')[1]['step'] == len(tied) == 5
    run_script(train, run_home, '--init_from=resume', '--max_iters=40', '--out_dir=longer')
    model, ckpt = load_checkpoint(run_home / 'longer/ckpt.pt')
    assert ckpt['step'] == 40 and ckpt['tied_until'] == len(tied) == 10 and spread(model) > 0


@pytest.mark.parametrize('segment_len, judged', [(16, 1), (64, 0)])
def test_best_is_the_best_validation(run_home, monkeypatch, segment_len, judged):
    """By the loss after segment 1, or by all of it where no segment follows; also across a resumption."""
    seen, out = [], run_home / f'best-{judged}'

    def evaluate(*a, real=train.evaluate):
        seen.append(1)
        sums, *rest = real(*a)
        sums[:, judged, 0] *= {2: 0.5, 4: 0.6}.get(len(seen), 1.0)  # the second validation is the best ...
        sums[:, 0, 0] *= 0.1 if judged and len(seen) == 3 else 1.0  # ... even if the third is so in segment 1
        return sums, *rest
    monkeypatch.setattr(train, 'evaluate', evaluate)
    for latest, flags in ((25, [*TINY, f'--segment_len={segment_len}']), (28, ['--init_from=resume'])):
        run_script(train, run_home, *flags, f'--max_iters={latest}', f'--out_dir={out.name}')
        assert [load_checkpoint(out / f'{name}.pt')[1]['step'] for name in ('best', 'ckpt')] == [20, latest]
    assert math.isnan(load_checkpoint(out / 'ckpt.pt')[1]['rows'][-1]['later_bpb']) == (judged == 0)


def test_training_goes_on_from_a_dense_expert_or_from_experts(run_home, tied):
    """A specialized model is trained on as it is, or as the seed of equal experts; experts that have parted
    are not tied again. Other shapes are refused, and so is resuming a model without a run."""
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    os.mkdir(run_home / 'bare')
    dense, tokenizer = model.specialize(torch.arange(9)[None]), ckpt['tokenizer']
    save_checkpoint(run_home / 'bare/ckpt.pt', dense, tokenizer=tokenizer)
    flags = [flag for flag in TINY if not flag.startswith(('--n_', '--block', '--segment'))]
    for start, n_experts, until in (('bare', 1, 0), ('bare', 4, 5), ('whole', 4, 0)):
        tied.clear()
        run_script(train, run_home, *flags, f'--init_from={start}/ckpt.pt', f'--n_experts={n_experts}',
                   '--max_iters=10', f'--out_dir=from-{start}{n_experts}')
        again, onward = load_checkpoint(run_home / f'from-{start}{n_experts}/ckpt.pt')
        assert again.config == replace(model.config, n_experts=n_experts)
        assert len(tied) == onward['tied_until'] == until
        assert max(onward['losses']) < ckpt['losses'][0] - 0.3, 'it starts from scratch'
    for argv, word in ((['--init_from=bare/ckpt.pt', '--n_layer=3', '--out_dir=bad'], 'n_layer'),
                       (['--init_from=whole/ckpt.pt', '--n_experts=2', '--out_dir=bad'], 'n_experts'),
                       (['--init_from=resume', '--out_dir=bare'], 'without a run')):
        with refused(word):
            run_script(train, run_home, *argv)


def test_resume_takes_new_settings_of_the_optimizer_and_refuses_other_data(run_home, tmp_path):
    for folder in ('whole', 'own', 'data'):
        shutil.copytree(run_home / folder, tmp_path / folder)
    resume = partial(run_script, train, tmp_path, '--init_from=resume', '--out_dir=whole')
    for flag in ('--n_layer=3', '--n_experts=2', '--dataset=else', '--batch_size=8', '--seed=1',
                 '--eval_windows=1', '--dense_warmup=.1'):
        with refused(flag[2:].split('=')[0]):
            resume(flag)
    with refused('resume'):
        run_script(train, tmp_path, *TINY, '--out_dir=whole')  # would overwrite a finished run
    resume('--max_iters=31', '--beta1=.5', '--weight_decay=.3')
    groups = load_checkpoint(tmp_path / 'whole/ckpt.pt')[1]['optimizer']['param_groups']
    assert [(*group['betas'], group['weight_decay']) for group in groups] == [(.5, .95, .3), (.5, .95, 0)]
    run_script(prepare, tmp_path, '--input', 'own', '--vocab_size=400', '--val_fraction=.3')
    with refused('trained on'):
        resume('--max_iters=40')


class Nearer(LoryFFN):
    """A routing of one's own: a segment hears the last token before it, not a mean."""
    def route(self, x):
        heard = torch.cat([0 * x[:, :1, 0], x[:, :-1, -1]], 1)  # (B, N, D)
        return self.router(heard).softmax(-1)


class Plain(nn.Linear):
    """The least that a layer must be, and it pays for large outputs."""
    def __init__(self, config):
        super().__init__(config.n_embd, config.n_embd, bias=False)
        self.config = config

    def forward(self, x, cache=None):
        y, N = super().forward(x), math.ceil(x.shape[1] / self.config.segment_len)
        self.aux_loss = y.square().mean()
        return y, x.new_ones(len(x), N, self.config.n_experts)


@pytest.mark.parametrize('layer', [Nearer, Plain])
def test_a_layer_of_ones_own(run_home, layer):
    """It trains, is resumed and loaded with `build`, and its checkpoints are refused without."""
    build, out = partial(Lory, ffn=layer), f'--out_dir={layer.__name__}'
    run_script(train, run_home, *TINY, '--max_iters=10', out, build=build)
    run_script(train, run_home, '--init_from=resume', '--max_iters=20', out, build=build)
    model, ckpt = load_checkpoint(run_home / layer.__name__ / 'ckpt.pt', build=build)
    ffn, (x, y), z = model.blocks[0].ffn, torch.randint(400, (2, 2, 64)), torch.randn(2, 64, 32)
    assert type(ffn) is layer and ckpt['step'] == 20 and ckpt['losses'][-1] < ckpt['losses'][0] - 0.3
    if layer is Plain:
        plain, paid = model(x, y)[1], model.train()(x, y)[1]
        assert_close(paid - plain, sum(block.ffn.aux_loss for block in model.blocks), rtol=0, atol=1e-6)
        assert paid > plain
    else:
        assert_close(ffn(z)[1][:, 1], ffn.router(z[:, 15]).softmax(-1))
        assert spread(model) > 0
    for script, argv in ((train, ['--init_from=resume', '--max_iters=40']), (sample, [])):
        with refused(layer.__name__):
            run_script(script, run_home, *argv, out)


@contextmanager
def two_ranks(home, *runs):
    """Two processes that train together, one run after the other, started as torchrun would."""
    code = ('import os, sys, train\nfor run in sys.argv[1:]:\n'
            '    os.environ["MASTER_PORT"], *argv = run.split()\n    train.main(argv)')
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in runs]  # to find free ports
    runs = [f'{s.getsockname()[1]} {" ".join(run)}' for s, run in zip(sockets, runs)]
    for s in sockets:
        s.close()
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=HERE, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1')
    ranks = [subprocess.Popen([sys.executable, '-c', code, *runs], env=dict(env, RANK=rank, LOCAL_RANK=rank),
                              cwd=home, stdout=-1, stderr=-1, text=True) for rank in '01']
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


def assert_near(one, *others):
    """Runs agree to five digits in every loss and figure of the log, and in weights as float32 allows."""
    figures, weights, _ = carried(one / 'ckpt.pt')
    for figures2, weights2, _ in (carried(out / 'ckpt.pt') for out in others):
        assert_close(figures, figures2, rtol=1e-5, atol=0)
        assert_close(weights, weights2, rtol=1e-3, atol=1e-4)


def test_two_ranks_equal_one_step_by_step_and_end_when_one_dies(run_home):
    """Two gloo processes, under DDP with accumulation and with --shard, through dense warm-up and beyond.
    Then runs are resumed to step 12, those of two processes in one, and that of one process in two."""
    short = [*TINY, '--max_iters=8', '--dense_warmup=.4', '--log_interval=1', '--eval_interval=8']
    longer = ['--init_from=resume', '--max_iters=12']
    ddp = ['--shard=False', '--gradient_accumulation_steps=2']
    shard = ['--shard', '--activation_checkpointing']
    one, *others = (run_home / name for name in ('one', 'ddp', 'shard', 'one-ddp', 'one-shard'))
    run_script(train, run_home, *short, '--out_dir=one')
    for out in others[2:]:
        shutil.copytree(one, out)
    with two_ranks(run_home, [*short, *ddp, '--out_dir=ddp'], [*short, *shard, '--out_dir=shard'],
                   [*longer, *ddp, '--out_dir=one-ddp'], [*longer, *shard, '--out_dir=one-shard'],
                   [*short, '--max_iters=99999', '--eval_interval=99999', '--out_dir=endless']) as ranks:
        said = ''
        while '\nstep     20' not in said:  # until the endless run trains
            said += (line := ranks[0].stdout.readline())
            assert line, ranks[0].stderr.read()
        assert said.count('\nstep      3 | dense warm-up ends') == 2
        ranks[1].kill()
        ranks[0].communicate(timeout=60)
        assert ranks[0].returncode > 0
    assert_near(one, *others[:2])
    for name in ('one', 'ddp', 'shard'):
        run_script(train, run_home, *longer, *ddp, f'--out_dir={name}')
    assert_near(one, *others)
    assert load_checkpoint(one / 'ckpt.pt')[1]['step'] == 12


@pytest.mark.parametrize('error, flags', [
    *((UserError, flags) for flags in (
        '--segment_len=65', '--n_experts=0', '--block_size=9999999', '--device=gpu', '--shard',
        '--dataset=none', '--batch_size=3 --gradient_accumulation_steps=2', '--init_from=resum',
        '--init_from=resume', '--dataset=builtin --n_head=5')),
    *((SystemExit, flags) for flags in (
        '--seed=-1', '--log_interval=0', '--learning_rate=nan', '--beta1=1', '--routing=token', '--preset=7b',
        '--max_iter=3', '--compile=maybe'))])
def test_train_refuses_bad_values_before_it_works(run_home, monkeypatch, error, flags):
    monkeypatch.setattr(prepare, 'main', None)
    name, _, value = flags.split()[-1][2:].partition('=')
    with refused(f'{name}|{value or name}', error):
        run_script(train, run_home, *TINY, f'--out_dir=bad-{name}', *flags.split())
    assert not (run_home / f'bad-{name}').exists()


def test_a_loss_that_is_not_finite_stops_the_run(run_home, monkeypatch):
    steps = []

    def wild(self, *args, real=Lory.forward, **how):
        steps.extend([1] * self.training)
        logits, loss, *e = real(self, *args, **how)
        return logits, loss / 0 if self.training and len(steps) == 17 else loss, *e
    monkeypatch.setattr(Lory, 'forward', wild)
    with refused('step 17'):
        run_script(train, run_home, *TINY, '--out_dir=wild')
    model, ckpt = load_checkpoint(run_home / 'wild/ckpt.pt')
    assert ckpt['step'] == 10 and all(p.isfinite().all() for p in model.parameters())


# --- sample.py, and the scripts from the shell. ---

def test_sample_streams_what_generate_makes_and_stops(run_home, capsys, monkeypatch):
    def sampled(*flags):
        run_script(sample, run_home, '--out_dir=whole', '--device=cpu', *flags)
        return capsys.readouterr().out
    greedily = ['--start=The value', '--temperature=0', '--max_new_tokens=40']
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    tokenizer = prepare.load_tokenizer(ckpt['tokenizer'])
    prompt = torch.tensor([[tokenizer.eot_token] + tokenizer.encode_ordinary('The value')])
    text = tokenizer.decode(model.generate(prompt, 40, temperature=0)[0].tolist()).split('<|endoftext|>')[0]
    shown = sampled(*greedily, '--show_routing', '--save_dense=dense.pt')
    assert shown.count('\nlayer') == 2 and shown.endswith(f'\nThe value{text}\n')
    assert sampled(*greedily, '--checkpoint=dense.pt') == f'The value{text}\n'
    stopped = sampled(*greedily, f'--stop={text[3:6]}')[9:-1]
    assert text.startswith(stopped) and text[3:6] in stopped and len(stopped) < len(text)
    drawn = [sampled(f'--seed={seed}', '--num_samples=2', '--top_k=50', '--top_p=.95') for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0].count('-' * 80) == 1
    (run_home / 'prompt.txt').write_text('Füße 漢字', encoding='utf-8')
    assert sampled('--start=FILE:prompt.txt', '--max_new_tokens=3').startswith('Füße 漢字')
    # It also stops at the end of a document; half a character before that is shown as such.
    half = tokenizer.encode_single_token('é'.encode()[:1])
    tokens = torch.tensor([[*tokenizer.encode_ordinary(' end'), half, tokenizer.eot_token, 65]])
    monkeypatch.setattr(Lory, 'stream', lambda *a, **how: iter(tokens.T))
    assert sampled('--start=The') == 'The end\N{REPLACEMENT CHARACTER}\n'


@pytest.mark.parametrize('flag, word', [
    ('--out_dir=nowhere', 'nowhere'), ('--device=foo', 'device'), ('--start=' + 'word ' * 100, 'block_size'),
    ('--start=FILE:none', 'none'), ('--start=FILE:data/own/train.bin', 'UTF-8'), ('--start=\udcff', 'UTF-8'),
    ('--save_dense=whole/ckpt.pt', 'exists'), ('--checkpoint=bare.pt', 'tokenizer'), ('--temperature=-1', ''),
    ('--temperature=nan', ''), ('--top_k=x', ''), ('--top_p=-1', ''), ('--max_new_tokens=0', ''),
    ('--show_routing=maybe', '')])
def test_sample_refuses_bad_values(run_home, flag, word):
    save_checkpoint(run_home / 'bare.pt', Lory(tiny_config()))
    with refused(word, UserError if word else SystemExit):
        run_script(sample, run_home, '--out_dir=whole', '--device=cpu', flag)


def test_the_scripts_from_the_shell(data_home):
    """train and sample as a user starts them. A mistake is one sentence on stderr and exit code 2."""
    def shell(script, *flags):
        return subprocess.run([sys.executable, f'{HERE}/{script}', *flags], cwd=data_home, text=True,
                              capture_output=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    trained = shell('train.py', *TINY, '--max_iters=4', '--out_dir=shell')
    assert (trained.returncode, trained.stderr) == (0, '') and 'done' in trained.stdout
    sampled = shell('sample.py', '--out_dir=shell', '--max_new_tokens=5')
    assert sampled.returncode == 0 and re.fullmatch(r'\[\d tokens, \d+ tokens/s\]\n', sampled.stderr)
    failed = shell('sample.py', '--out_dir=nowhere')
    assert failed.returncode == 2
    assert re.fullmatch('sample.py: cannot read nowhere/ckpt.pt.*[.]\n', failed.stderr)
