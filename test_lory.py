"""
The tests of Lory. Most compare the code with the same thing written once more, slowly and plainly. The
first of these, `naive_lory`, is the method itself as a plain loop.

    python -m pytest -q test_lory.py
"""
import base64
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import chdir, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.testing import assert_close

import lory
import prepare
import sample
import train
from lory import (Cache, Lory, LoryConfig, LoryFFN, MergedLinear, UserError, atomic_open, draw, lean_swiglu,
                  load_checkpoint, save_checkpoint, swiglu, tell)
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
def refused(word):
    """What is done here ends in a UserError: one line with `word` in it."""
    with pytest.raises(UserError, match=word) as raised:
        yield
    assert re.fullmatch('[^\n]+[.]', str(raised.value))


def run(script, home, *argv, **more):
    """A script's main(), in the folder `home`. Ctrl-C is pytest's again afterwards."""
    with chdir(home):
        try:
            return script.main(list(argv), **more)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def at_call(module, name, number, action):
    """A context in which call `number` of the module's function first does `action`."""
    real, calls = getattr(module, name), itertools.count(1)

    def counted(*args, **more):
        if next(calls) == number:
            action()
        return real(*args, **more)
    return mock.patch.object(module, name, counted)


ctrl_c = partial(signal.raise_signal, signal.SIGINT)
crash = mock.Mock(side_effect=MemoryError)  # a function that raises it


# --- lory.py: the layer. ---

def naive_lory(ffn, x):
    """Lory's FFN layer as a plain loop. Hidden states x (B, L, D) -> (B, L, D)"""
    rows = []
    for sequence in x:  # (L, D)
        segments = sequence.split(ffn.segment_len)  # of T tokens each; the last one may be shorter
        for k, segment in enumerate(segments):  # (T, D)
            # What routes a segment? Not itself, for then a token would depend on those that follow it. The
            # one before does (causal segment routing, Sec. 3.1), or always the first (prefix routing, Sec.
            # 5.1). The first has none before it. The router's bias alone routes it, or, in the paper, its own
            # mean, with the gradient stopped.
            if k > 0:
                before = segments[k - 1] if ffn.routing == 'causal' else segments[0]
                logits = ffn.router.weight @ (sum(before) / len(before)) + ffn.router.bias  # (E,)
            elif ffn.first_segment == 'self':
                logits = (ffn.router.weight @ (sum(segment) / len(segment)) + ffn.router.bias).detach()
            else:
                logits = ffn.router.bias
            e = torch.exp(logits) / torch.exp(logits).sum()  # (E,), Eq. 3
            # Merge the experts, matrix by matrix (Sec. 2.2). All tokens of the segment go through the
            # merged FFN, a SwiGLU as in LLaMA.
            # gate and up (D, H), down (H, D)
            gate, up, down = (sum(e[i] * p[i] for i in range(len(e))) for p in (ffn.gate, ffn.up, ffn.down))
            for token in segment:  # (D,)
                g = token @ gate  # (H,)
                rows.append((g * torch.sigmoid(g) * (token @ up)) @ down)  # (D,)
    return torch.stack(rows).view(x.shape)


def with_gradients(y, inputs):
    """[y, then the gradient of each input], of y's sum of squares."""
    return [y, *torch.autograd.grad(y.square().sum(), inputs, materialize_grads=True)]


ROUTINGS = [dict(first_segment='prior'), dict(first_segment='self'), dict(routing='prefix')]


@pytest.mark.parametrize('how', ROUTINGS)
@pytest.mark.parametrize('L', [24, 20, 7, 4])
def test_layer_equals_naive_loop_in_output_and_every_gradient(how, L):
    ffn = randomize(LoryFFN(tiny_config(**how)), scale=2.0)
    x = torch.randn(3, L, 16, dtype=torch.float64, requires_grad=True)
    inputs = [x, *ffn.parameters()]
    ours = with_gradients(ffn(x)[0], inputs)
    assert_close(ours, with_gradients(naive_lory(ffn, x), inputs), rtol=1e-9, atol=1e-11)


def test_lean_merge_is_the_formula_in_output_and_every_gradient():
    """MergedLinear against finite differences, and lean_swiglu against swiglu of the merged FFNs."""
    ffn = randomize(LoryFFN(tiny_config()))
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    e = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(MergedLinear.apply, (x[..., :4], e, ffn.gate[:, :4, :6]))
    inputs = [x, e, ffn.gate, ffn.up, ffn.down]
    lean = with_gradients(lean_swiglu(*inputs), inputs)
    assert_close(lean, with_gradients(swiglu(x, *ffn.merge_experts(e)), inputs))


BACKENDS = [None, 'aot_eager_decomp_partition']  # of torch.compile; this one needs no C++ compiler


@pytest.mark.filterwarnings('ignore:.*script_method:DeprecationWarning')  # torch's own
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('apart', [1.0, 0.003])
def test_bfloat16_autocast_stays_near_the_float32_formula(apart, backend):
    """Also just after warm-up, when experts differ by less than bfloat16 resolves, and the router's
    gradient is made of their difference."""
    ffn = randomize(LoryFFN(tiny_config(n_embd=64, ffn_hidden=96)), scale=0.1).float()
    for p in (ffn.gate, ffn.up, ffn.down):
        p.data = torch.lerp(p[:1], p, apart)
    x = torch.randn(2, 24, 64, requires_grad=True)
    inputs = [x, *ffn.parameters()]
    y, e = ffn(x)
    running = torch.compile(ffn, backend=backend) if backend else ffn
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y16, e16 = running(x)
    assert y16.dtype == torch.bfloat16
    assert_close(e16, e)  # float32 in both
    for exact, rounded in zip(with_gradients(y, inputs), with_gradients(y16.float(), inputs)):
        assert (exact - rounded).norm() < 0.02 * exact.norm()  # bfloat16 keeps 8 bits: 0.004 an operation


@pytest.mark.filterwarnings('ignore:.*script_method:DeprecationWarning')  # torch's own
@pytest.mark.parametrize('backend', BACKENDS)
def test_merged_weights_are_not_kept_for_backward(backend):
    """What autograd saves does not grow with the number of segments times the size of an expert."""
    ffn = randomize(LoryFFN(tiny_config(n_embd=32, ffn_hidden=512, block_size=64, segment_len=1)))
    running = torch.compile(ffn, backend=backend) if backend else ffn
    x, sizes = torch.randn(2, 64, 32, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        y = running(x)[0]
    assert max(sizes) < 2 * 64 * 32 * 512 / 10, 'a merged copy of the experts was saved for every segment'
    inputs = [x, *ffn.parameters()]
    assert_close(with_gradients(y, inputs), with_gradients(ffn(x)[0], inputs))


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
    assert model.prefill(idx)[1].shape == (2, 1, 1, 1), 'a prompt of two segments is routed once'


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

def test_models_of_one_seed_begin_with_the_same_weights_with_1_and_with_8_experts():
    """Bit for bit: what a parameter begins with does not depend on those made before it."""
    dense, model = Lory(tiny_config(n_experts=1)), Lory(tiny_config(n_experts=8))
    for name, p in dense.named_parameters():
        mine = model.get_parameter(name)
        assert torch.equal(mine, p.expand_as(mine))
    drawn = [p for seed in (1337, 1) for p in Lory(tiny_config(), seed=seed).parameters() if p.std() > 0]
    assert len({p.flatten()[0].item() for p in drawn}) == len(drawn) == 26, 'no two parameters begin alike'


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


@pytest.mark.parametrize('router, shape', [  # the scale of the router's weights, and odd sizes
    (1, {}), (0, {}), (200, dict(n_experts=3, n_embd=10, n_head=1, ffn_hidden=7))])
def test_dense_warmup_trains_the_dense_model_and_then_experts_part(router, shape):
    """Tied experts stay equal bit for bit. However they are routed, they make the dense model of one
    expert. That equals the dense model trained beside them, but for rounding and Adam's epsilon, which
    meets dW / E here and dW there. Untied experts part, unless the router is zero."""
    model, dense = Lory(tiny_config(**shape)), Lory(tiny_config(**shape | dict(n_experts=1)))
    for block in model.blocks:
        block.ffn.router.weight.data *= router
    optimizer, beside = (m.optimizer(3e-3, 0.1, (0.9, 0.95)) for m in (model, dense))
    batches = torch.randint(50, (60, 4, 1)) + 7 * torch.arange(25)  # each token decides the next
    for idx in batches[:40] % 50:
        loss = update(model, optimizer, idx, tied=True)
        assert loss == pytest.approx(update(dense, beside, idx), abs=1e-4)
        assert spread(model) == 0
    logits, _, routing = model(idx, return_routing=True)
    assert (routing.max() > 0.9) == (router == 200) and loss < 3.3
    dense.fill({name: p[:1] if p.dim() == 3 else p for name, p in model.state_dict().items()})
    assert_close(logits, dense(idx)[0], rtol=0, atol=1e-5)
    assert all(block.ffn.router.bias.norm() == 0 for block in model.blocks), 'the router waits'
    for idx in batches[40:] % 50:
        update(model, optimizer, idx)
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

@pytest.mark.parametrize('n_layer, block_size, P, first_segment', [
    (2, 30, 9, 'prior'), (1, 12, 9, 'prior'), (2, 30, 1, 'prior'), (2, 30, 1, 'self')])
def test_generation_is_one_merge_by_the_prompts_mean(n_layer, block_size, P, first_segment):
    """prefill and decode are the dense model of the experts averaged as the mean of the prompt says, each
    sequence its own. A single token is no text: the prior, if there is one, goes before its mean. In one
    layer, tokens beyond block_size = 12 see what a pass over the last 12 sees."""
    model = randomize(Lory(tiny_config(n_layer=n_layer, block_size=block_size, first_segment=first_segment)))
    idx, entered = torch.randint(50, (2, 30)), []
    for block in model.blocks:
        block.ffn.register_forward_pre_hook(lambda ffn, args: entered.append(args[0]))
    logits, weights, caches = model.prefill(idx[:, :P])
    means = [x.mean(1) for x in entered]  # (B, D), one for each layer
    decoded = [logits] + [model.decode(idx[:, t], caches) for t in range(P, 30)]
    for b in range(2):
        dense = model.specialize(idx[b:b + 1, :P])
        for i, (block, merged) in enumerate(zip(model.blocks, dense.blocks)):
            by_prior = P == 1 and first_segment == 'prior'
            e = (block.ffn.router.bias if by_prior else block.ffn.router(means[i][b])).softmax(0)
            assert_close(weights[b, i, 0], e)
            for name in ('gate', 'up', 'down'):
                average = torch.einsum('e,eio->io', e, block.ffn.get_parameter(name))
                assert_close(merged.ffn.get_parameter(name)[0], average)
        for n, logits in enumerate(decoded, P):  # after n tokens
            whole_pass = dense(idx[b:b + 1, max(0, n - block_size):n])[0]  # (1, L, V)
            assert_close(logits[b], whole_pass[0, -1], rtol=1e-5, atol=1e-6)


def test_drawing_keeps_what_it_should():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])  # probabilities .64 .24 .09 .03
    p, first = logits.softmax(0), torch.tensor([1.0, 0, 0, 0])
    two, tempered = (F.pad((logits[:2] / t).softmax(0), (0, 2)) for t in (1, 2))
    torch.manual_seed(0)
    for expected, *how in ((first, 0, 0, 1.0), (p, 1.0, -1, 1.0), (p, 1.0, 99, 1.0), (tempered, 2.0, 2, 1.0),
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
    for wrong in (dict(n_experts=0), dict(segment_len=25), dict(n_head=3), dict(first_segment='zero')):
        with refused(*wrong):
            tiny_config(**wrong)
    model = Lory(tiny_config())
    for prompt, word in ((torch.full((1, 5), 50), 'outside'), (torch.full((1, 5), -1), 'outside'),
                         (torch.full((1, 0), 0), 'block_size=24'), (torch.full((1, 25), 0), 'block_size'),
                         (torch.full((5,), 0), '[(]B, L[)]')):
        with refused(word):
            model.generate(prompt, 3)
    with refused('one prompt'):
        model.specialize(torch.full((2, 5), 0))
    with refused('norm.weight is missing'):
        model.fill({name: p for name, p in model.state_dict().items() if name != 'norm.weight'})
    assert model.generate(torch.full((2, 5), 0), 0).shape == (2, 0), 'no new tokens are none'


@pytest.mark.filterwarnings('ignore:.*script_method:DeprecationWarning')  # torch's own
def test_checkpoints_are_read_as_written_or_refused(tmp_path, monkeypatch):
    """Refused: cut off, one bit flipped, no checkpoint at all, of an older format, a folder, missing. What
    would be refused is not even written."""
    model, path = Lory(tiny_config(tie_embeddings=False)), tmp_path / 'ckpt.pt'
    save_checkpoint(path, torch.compile(model), None, note='kept')
    for tokenizer, step in ((object(), 1), ({}, np.float32(1))):
        with refused('plain values'):
            save_checkpoint(path, model, tokenizer, step=step)
    again, ckpt = load_checkpoint(path)
    assert ckpt['note'] == 'kept' and again.config == model.config and not again.training
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    whole, weight = path.read_bytes(), model.embed.weight.detach().numpy().tobytes()
    at = whole.index(weight)
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
    for damaged in (whole[:1000], flipped, b'', weight):
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
    monkeypatch.setattr(torch, 'load', lambda *a, **more: torch.empty(2**60))
    with pytest.raises(RuntimeError, match='allocate'):  # too large for this machine is not damaged
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def write(data):
        if f.tell() > 0:
            raise OSError(28, 'No space left on device')
        return f.write(data)
    (tmp_path / 'f').write_text('old')
    with refused('No space left.*unchanged'), atomic_open(tmp_path / 'f') as f:
        torch.save('', SimpleNamespace(write=write))  # raises a RuntimeError that hides the cause
    for other in (KeyboardInterrupt, RuntimeError):  # not of the disk
        with pytest.raises(other), atomic_open(tmp_path / 'f') as f:
            f.write(b'half')
            raise other
    assert (tmp_path / 'f').read_text() == 'old' and os.listdir(tmp_path) == ['f']


@pytest.mark.parametrize('error, word', [
    (RuntimeError('CUDA: tried to allocate 2 GiB'), 'out of memory'), (MemoryError(), 'out of memory'),
    (RuntimeError('CUDA error: out of memory'), 'smaller'),
    (RuntimeError('No working C++ compiler found'), 'g[+][+]'),
    (RuntimeError('Failed to find C compiler.'), 'gcc'), (RuntimeError('else'), '')])
def test_a_known_error_of_torch_is_a_sentence_and_no_other_is_hidden(error, word, capsys):
    with pytest.raises(SystemExit if word else RuntimeError, match='2' if word else 'else'):
        lory.run_script(mock.Mock(side_effect=error))
    assert re.fullmatch(f'[^\n]*{word}[^\n]*[.]\n' if word else '', capsys.readouterr().err)


def test_what_is_said_to_nobody_is_no_error(monkeypatch):
    """As after Ctrl-C with `| tee`, which ends first, or with `| head`, or on a full disk."""
    read, write = os.pipe()
    os.close(read)
    for file in (write, '/dev/full'):
        with open(file, 'w') as gone, monkeypatch.context() as patch:
            patch.setattr(sys, 'stdout', gone)
            tell('one')
            tell('two')


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
    write_files(home, {f'own/{doc.domain}/{i}.txt': doc.text
                       for i, doc in enumerate(data_docs) if doc.domain in ('prose', 'cpp')})
    run(prepare, home, *OWN)
    return home


@pytest.fixture
def data_copy(data_home, tmp_path):
    """A folder with the same, to change."""
    return shutil.copytree(data_home, tmp_path / 'copy', ignore=shutil.ignore_patterns('whole', '*.pt'))


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
    """Write {name: text, bytes, or a list of records for a .jsonl} below `home`."""
    for name, data in files.items():
        if isinstance(data, list):
            data = ''.join(json.dumps(record) + '\n' for record in data)
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data if isinstance(data, bytes) else data.encode())


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
    run(prepare, tmp_path, '--vocab_size=300')
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
        'books/sea/picture.png': b'\x89PNG', 'books/sea/zeros.bin': b'\0\1\2',
        'books/out/ckpt.pt': '', 'books/out/log.csv': 'a run', 'books/data/train_docs.npz': '',
        'books/data/meta.json': 'a dataset', 'books/raw.ndjson': '{"text": "books: in \u2028 line"}',
        'feed.JSONL': [dict(text='news: one', domain='news'), dict(text='feed.JSONL: null', domain=None),
                       dict(text='0: <|endoftext|>', domain=0), dict(text='')]})
    for link, target in ('books/link', 'elsewhere'), ('elsewhere/loop', 'books'), ('books/broken', 'none'):
        Path(link).symlink_to(tmp_path / target)
    os.mkfifo('books/pipe')
    docs = prepare.read_inputs(['books', 'note.txt', 'feed.JSONL', 'books/sea'])
    assert [doc.domain for doc in docs] == [doc.text.split(':')[0] for doc in docs]
    assert len({doc.source for doc in docs}) == len({doc.text for doc in docs}) == len(docs) == 9
    assert docs[5].text == 'note.txt: two\nlines'
    assert regex.search('8 inputs.*: books/broken, books/data, books/empty.txt,', capsys.readouterr().out)


def test_one_label_is_one_domain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = ['C#', 'C', 'a/b', 'ab', 'news.2023', 'news.2024', 'naïve 中文', 'x' * 40, 'x' * 41]
    odd = [0, '00', 1.0, True, {'a': 1}, '', '_a', 'a', '<5f>a', '$x$', 'x', ' ', '\ud800', 'line\nbreak']
    labels = plain + odd
    write_files(tmp_path, {'a.jsonl': [dict(text='text', domain=label) for label in labels * 2]})
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
    alike = [Document('x' * 1000, 'd', str(i)) for i in range(20)]
    by_hash = sorted(alike, key=lambda doc: hashlib.sha1(doc.source.encode()).digest())
    assert set(prepare.hold_out(alike, .2)[0]) == set(by_hash[:4])
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
    short, long = prepare.hold_out([Document('a' * 1001, 'a', 'A0'), Document('b' * 8999, 'a', 'B0')], .1)[1]
    assert len(short.text) == 1001 and len(long.text) > 7000  # of two large ones the longer is cut
    docs.append(Document('a line', 'small', 'last'))
    write_files(tmp_path, {'own.jsonl': [doc._asdict() for doc in docs]})
    run(prepare, tmp_path, '--input', 'own.jsonl', '--tokenizer=byte')
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
    write_files(tmp_path, {'own.jsonl': [dict(text=text) for text in records]})
    run(prepare, tmp_path, '--input', 'own.jsonl', '--tokenizer=byte', '--val_fraction=.3')
    train, val = ([' '.join(text.split()) for text, _ in data_read(tmp_path, s)] for s in ('train', 'val'))
    assert sorted(train + val) == sorted(kinds + [data_words(80, 7)]) and len(val) > 10
    out = capsys.readouterr().out
    assert f' {4 * len(kinds) + 100:,} documents equal to others' in out and 'more than half of' in out
    assert len(regex.findall(r' own\.jsonl:\d+', out)) == 2


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
    # Each near the next only. What is held out takes along its neighbours, not the whole row.
    words = data_words(300).split()
    row = [' '.join(words[i * 8:i * 8 + 120]) for i in (6, 0, 1, 2, 3, 4, 5, 7, 8, 9, 10)]

    docs = [Document(text, 'd', str(i)) for i, text in enumerate([row[0], *texts, *row[1:]])]
    texts, n_held = [' '.join(doc.text.split()) for doc in docs], 40
    sets = [{text[i:i + 9] for i in range(len(text) - 8)} if len(text) >= 50 else {text} for text in texts]
    similarity = np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])
    twin_of = {}
    for i in range(n_held, len(docs)):
        near = [j for j in range(i) if j not in twin_of and similarity[i, j] >= .8]
        if near:
            twin_of[i] = near[0]
    held = [j for j in twin_of.values() if j < n_held]
    assert held.count(0) == 2, 'the row loses the two neighbours of its held-out text'
    assert len(held) > 2 and len(twin_of) > len(held) + 5
    assert ((similarity > .6) & (similarity < .8)).sum() > 10
    train, twins = prepare.near_duplicates(docs[:n_held], docs[n_held:])
    assert twins == [(docs[i], docs[j]) for i, j in twin_of.items()]
    assert train == [doc for i, doc in enumerate(docs) if i >= n_held and i not in twin_of]


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
    save_checkpoint(data_copy / 'ckpt.pt', model, tokenizer)
    save_checkpoint(data_copy / 'bare.pt', model, None)
    write_files(data_copy, {'a.txt': data_words(900), 'hf.json': '{"model": {"vocab": {}}}'})
    for name in ('ckpt.pt', file):
        run(prepare, data_copy, '--input', 'a.txt', f'--tokenizer={name}')
        assert prepare.load_dataset(data_copy / 'data/a', 8).tokenizer == tokenizer
        stored = data_read(data_copy, 'train', 'a') + data_read(data_copy, 'val', 'a')
        assert ''.join(text for text, _ in stored) == data_words(900)
    write_files(data_copy, {'byte': 'a file of that name'})
    run(prepare, data_copy, '--input', 'a.txt', '--tokenizer=byte')
    for name in ('bare.pt', 'hf.json', 'a.txt'):
        with refused('no tokenizer'):
            run(prepare, data_copy, '--input', 'a.txt', f'--tokenizer={name}')


def test_other_tokenizers_and_large_vocabularies(data_copy, monkeypatch):
    """One of tiktoken's with a gap in its ranks, as p50k has, and an id above 16 bits."""
    ranks = {bytes([b]): b for b in range(256)} | {b'he': 257, b'th': 258}
    encoding = prepare.tiktoken.Encoding('gpt2', pat_str=prepare.PATTERN, mergeable_ranks=ranks,
                                         special_tokens={'<|endoftext|>': 256, '<|other|>': 70_000})
    monkeypatch.setattr('tiktoken.get_encoding', lambda name: encoding)
    run(prepare, data_copy, '--input', 'own', '--tokenizer=gpt2')
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
        run(prepare, data_copy, *OWN, flag)
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
def test_a_failed_prepare_leaves_the_old_data(module, name, number, error, data_copy):
    """Wherever a crash or a full disk hits. Between two renames it leaves what is refused."""
    path = data_copy / 'data/own'
    old = prepare.load_dataset(path, 32).meta
    with pytest.raises((KeyboardInterrupt, UserError), match='^$|No space left'):
        with at_call(module, name, number, mock.Mock(side_effect=error)):
            run(prepare, data_copy, *OWN, '--seed=3')
    assert set(os.listdir(path)) == prepare.FILES
    with refused('checksum') if number == 4 else nullcontext():
        assert prepare.load_dataset(path, 32).meta == old


# --- The script. ---

@pytest.mark.parametrize('argv, message', [
    ('--input nowhere', 'does not exist'), ('--input void', 'too little'), ('--input one.txt', 'too little'),
    ('--input spaces.txt', 'too little'), ('--input bad.jsonl', 'line 2'), ('--input list.jsonl', 'line 1'),
    ('--input same.jsonl', 'too little'), ('--input alike --val_fraction=.6', 'nothing is left'),
    ('--input one.txt --tokenizer=gpt22', 'not known'), ('--input many.jsonl', '300 domains'),
    ('--dataset=a/b', 'plain'), ('--dataset=..', 'plain')])
def test_bad_input(argv, message, tmp_path):
    write_files(tmp_path, {
        'one.txt': 'one document', 'spaces.txt': ' ' * 1_000_000, 'void/.hidden': 'text',
        'bad.jsonl': [dict(text='a'), dict(txt=1)], 'list.jsonl': [['text']],
        'same.jsonl': [dict(text='same')] * 99,
        'many.jsonl': [dict(text='text', domain=i) for i in range(300)],
        'data/own/meta.json': 'old',
        'alike/0': data_words(400), 'alike/1': data_words(400) + ' end'})
    with refused(message):
        run(prepare, tmp_path, '--dataset=own', *argv.split(' '))
    assert (tmp_path / 'data/own/meta.json').read_text() == 'old'


def test_a_dataset_is_called_like_its_folder_or_its_file(tmp_path):
    write_files(tmp_path, {'corpus-v1.1/a.txt': data_words(400), 'notes.txt': data_words(400, 1)})
    for path in ('corpus-v1.1/', 'notes.txt'):
        run(prepare, tmp_path, '--input', path, '--tokenizer=byte')
    assert set(os.listdir(tmp_path / 'data')) == {'corpus-v1.1', 'notes'}
    run(prepare, tmp_path, '--input', 'corpus-v1.1', '--input', 'notes.txt', '--tokenizer=byte')
    domains = {domain for _, domain in data_read(tmp_path, 'train', 'corpus-v1.1')}
    assert domains == {'corpus-v1.1', 'notes.txt'}


# --- train.py, on a small real dataset. ---

TINY = ['--dataset=own', '--block_size=64', '--segment_len=16', '--n_embd=32', '--n_head=2',
        '--n_experts=4', '--batch_size=4', '--max_iters=30', '--dense_warmup=.5', '--eval_interval=10',
        '--eval_windows=3', '--log_interval=5', '--dtype=float32', '--device=cpu']  # tied up to step 15


@pytest.fixture(scope='session')
def run_home(data_home):
    """data_home with a finished run of TINY in `whole`."""
    assert run(train, data_home, *TINY, '--out_dir=whole') == 0
    return data_home


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take long. The last test draws them."""
    monkeypatch.setattr(train, 'plot', lambda *args: None)


def test_training_windows_tile_the_stream_in_another_order_in_each_epoch():
    orders = []
    for seed in (5, 6):
        args = SimpleNamespace(block_size=64, seed=seed)
        x, y = train.get_batch(np.arange(999), 0, 28, args, 'cpu')
        assert torch.equal(y, x + 1)
        assert torch.equal(x[10:18], train.get_batch(np.arange(999), 10, 8, args, 'cpu')[0])
        orders += x[:, 0].view(2, 14).tolist()  # the first tokens of two epochs
    for order in orders:
        assert sorted(order) == [min(order) + 64 * i for i in range(14)] != order
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize('L, limit, starts', [
    (10, 0, [[0, 10, 20, 30, 40, 50], [70, 80]]), (10, 3, [[0, 20, 40], [70, 80]]), (35, 0, [[0], [70]])])
def test_validation_windows_of_long_short_and_empty_domains(L, limit, starts):
    start, domain = np.array([0, 30, 70, 99]), np.array([0, 0, 2])  # of three documents
    split = SimpleNamespace(tokens=np.arange(99), start=start, domain=domain)
    windows = train.validation_windows(split, ['long', 'empty', 'short'], L, limit)
    assert list(windows) == ['long', 'short']
    for chosen, expected, end in zip(windows.values(), starts, (70, 99)):
        assert [w.tolist() for w in chosen] == [list(range(i, min(i + L + 1, end))) for i in expected]


def test_validation_against_one_token_at_a_time(run_home):
    """With bytes counted from the decoded text, in which the end of a document has none."""
    data = prepare.load_dataset(run_home / 'data/own', 64)
    model, _ = load_checkpoint(run_home / 'whole/ckpt.pt')
    tokenizer = prepare.load_tokenizer(data.tokenizer)
    windows = train.validation_windows(data.val, ['cpp', 'prose'], 64, limit=20)
    size = torch.tensor(prepare.token_bytes(data.tokenizer))
    figures, routing = train.evaluate(model.eval(), windows, size, 3, nullcontext())
    assert model.training
    in_use = torch.zeros(2, 4, dtype=torch.bool)
    for d, name in enumerate(windows):
        expected, weights = np.zeros((2, 3)), []
        for tokens in windows[name]:
            tokens = torch.tensor(tokens.astype(int))
            logits, _, e = model(tokens[None, :64], return_routing=True)
            nats = -logits[0].log_softmax(-1)
            for t, target in enumerate(tokens[1:].tolist()):
                if target != tokenizer.eot_token:
                    n_bytes = len(tokenizer.decode_single_token_bytes(target))
                    expected[:2 if t >= 16 else 1] += nats[t, target].item(), 1, n_bytes
            weights.append(e[0, :, 1:])  # (n_layer, N - 1, E), without segment 1
            in_use |= (weights[-1] > 2 / 4).any(1)
        assert_close(routing[d], torch.stack(weights).mean((0, 2)))
        for key, (nats, n, n_bytes) in zip(('', 'later_'), expected):
            assert figures[f'{key}bpb_{name}'] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)
            assert figures[f'{key}ppl_{name}'] == pytest.approx(math.exp(nats / n), rel=1e-5)
    for key in ('', 'later_'):
        mean = (figures[f'{key}bpb_cpp'] + figures[f'{key}bpb_prose']) / 2
        assert figures[f'{key or "val_"}bpb'] == pytest.approx(mean)
    assert figures['experts'] == pytest.approx(in_use.float().mean())
    assert 'experts' not in train.evaluate(model, windows, size, 3, nullcontext(), tied=True)[0]
    lost = Lory(tiny_config(tie_embeddings=False))
    lost.embed.weight.data[6] = math.nan
    windows = dict(a=[np.full(25, 5)], b=[np.full(25, 6)])
    figures = train.evaluate(lost, windows, torch.ones(50), 1, nullcontext())[0]
    assert math.isfinite(figures['bpb_a']) and math.isnan(figures['val_bpb']), 'a lost domain is not hidden'
    short = train.evaluate(lost, dict(a=[np.full(7, 5)]), torch.ones(50), 1, nullcontext())[0]
    assert short['later_bpb'] == short['val_bpb'], 'of a single segment all counts'


LOSSES = [3.92877, 3.89642, 3.78070, 3.73069, 3.66252, 3.65812, 3.62614, 3.57949, 3.53947, 3.56094,
          3.50844, 3.48600, 3.48202, 3.49063, 3.46039, 3.47421, 3.47653, 3.45975, 3.46062, 3.43733]


def test_the_losses_of_twenty_steps_are_those_on_record(tmp_path, monkeypatch):
    """On data from a formula, with dense warm-up to step 5 and clipping."""
    i, bounds = np.arange(3000), np.array([0, 3000])
    text = SimpleNamespace(tokens=(i * i // 7 + 5 * (i % 4)) % 50, start=bounds, domain=np.array([0]))
    tokenizer = prepare.make_tokenizer('byte')
    tokenizer.update(tokens=tokenizer['tokens'][:49], special_tokens={'<|endoftext|>': 49})
    meta = dict(domains=['text'], sha256={}, train=dict(bytes=3000))
    data = SimpleNamespace(meta=meta, train=text, val=text, tokenizer=tokenizer)
    monkeypatch.setattr(prepare, 'load_dataset', lambda *a: data)
    run(train, tmp_path, *TINY, '--max_iters=20', '--dense_warmup=.25', '--learning_rate=.01',
        '--grad_clip=.5', '--out_dir=out')
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')[1]['losses'] == pytest.approx(LOSSES, rel=0, abs=1e-4)


def carried(path):
    """What a run carries: its figures, but for those of a clock, its weights, its optimizer's averages."""
    ckpt = load_checkpoint(path)[1]
    rows = [{key: row[key] for key in row if key not in ('ms', 'tok_s')} for row in ckpt['rows']]
    figures = [ckpt['step'], ckpt['tied_until'], ckpt['losses'], rows]
    return figures, ckpt['model'], ckpt['optimizer']['state']


def test_a_run_stopped_and_resumed_equals_one_never_stopped(run_home):
    """Bit for bit. Ctrl-C saves where it comes: before, at and after the end of dense warm-up, which is
    step 15. A run that is killed goes on from its last checkpoint."""
    whole, out, flags = run_home / 'whole', run_home / 'stopped', TINY
    with at_call(train, 'save_checkpoint', 2, crash), suppress(MemoryError):
        run(train, run_home, *flags, '--out_dir=stopped')
    assert set(os.listdir(out)) == {'best.pt', 'log.csv'}  # with no state to go on from, it begins again
    for name, number, action, saved in (('get_batch', 7, ctrl_c, 7),
                                        ('get_batch', 2, crash, 7),
                                        ('save_checkpoint', 1, crash, 7),  # in step 10, before best.pt
                                        ('save_checkpoint', 2, crash, 7),  # in step 10, after best.pt
                                        ('get_batch', 8, ctrl_c, 15),
                                        ('get_batch', 7, ctrl_c, 22),
                                        ('save_checkpoint', 2, crash, 22)):  # in step 30
        with at_call(train, name, number, action), suppress(MemoryError):
            assert run(train, run_home, *flags, '--out_dir=stopped') == 130
        assert load_checkpoint(out / 'ckpt.pt')[1]['step'] == saved
        (out / 'ckpt.pt.tmp').write_bytes(b'half')  # a process that is killed in a write leaves this
        flags = ['--init_from=resume']
    run(train, run_home, *flags, '--out_dir=stopped')
    for name in ('ckpt.pt', 'best.pt'):
        resumed, expected = carried(out / name), carried(whole / name)
        assert_close(resumed, expected, rtol=0, atol=0)
        assert list(resumed[2]) == list(expected[2]), 'the optimizer names parameters in another order'
    assert set(os.listdir(out)) == {'best.pt', 'ckpt.pt', 'log.csv'}


def test_a_second_ctrl_c_ends_the_run_at_once(run_home, capfd):
    with at_call(train, 'get_batch', 3, lambda: (ctrl_c(), ctrl_c())), pytest.raises(KeyboardInterrupt):
        run(train, run_home, *TINY, '--out_dir=twice')
    assert 'once more' in capfd.readouterr().err
    assert os.listdir(run_home / 'twice') == ['log.csv']


def test_the_time_left_counts_steps_and_validations_still_to_come():
    args = SimpleNamespace(max_iters=30, eval_interval=20)  # validations at 20 and 30, each of 5 s
    left = [train.time_left(step, 2.0, 5.0, args).seconds for step in (1, 19, 20, 21, 30)]
    assert left == [29 * 2 + 10, 11 * 2 + 10, 10 * 2 + 10, 9 * 2 + 5, 5]  # logged before the step's own


def test_a_run_made_longer_is_not_tied_for_longer(run_home):
    """Stopped in dense warm-up and resumed with a larger max_iters, it is tied up to step 10 as planned."""
    flags = [*TINY, '--max_iters=20']
    for number, step, parted in ((5, 5, False), (5, 10, False), (1, 11, True)):
        with at_call(train, 'get_batch', number, ctrl_c):
            assert run(train, run_home, *flags, '--out_dir=longer') == 130
        model, ckpt = load_checkpoint(run_home / 'longer/ckpt.pt')
        assert ckpt['step'] == step and (spread(model) > 0) == parted
        flags = ['--init_from=resume', '--max_iters=40']


def test_best_is_the_best_validation(run_home, monkeypatch):
    """Step 2, judged after segment 1, also when a run is resumed."""
    results = [(dict(val_bpb=val, later_bpb=later, bpb_cpp=val, bpb_prose=val), torch.zeros(1))
               for val, later in ((3, 3), (2, 1), (1, 2), (2, 2))]
    monkeypatch.setattr(train, 'evaluate', mock.Mock(side_effect=results))
    out, flags = run_home / 'best', [*TINY, '--eval_interval=1']
    for latest in (3, 4):
        run(train, run_home, *flags, f'--max_iters={latest}', f'--out_dir={out}')
        flags = ['--init_from=resume']
        assert [load_checkpoint(out / f'{name}.pt')[1]['step'] for name in ('best', 'ckpt')] == [2, latest]


def test_training_goes_on_from_a_dense_expert_or_from_experts(run_home):
    """A specialized model is trained on as it is, or as the seed of equal experts; experts that have parted
    are not tied again. A model without a run cannot be resumed."""
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    dense = model.specialize(torch.arange(9)[None])
    save_checkpoint(run_home / 'bare/ckpt.pt', dense, ckpt['tokenizer'])
    flags = ['--max_iters=10', '--dense_warmup=.5', '--eval_windows=3', '--dtype=float32']
    for start, n_experts, tied_until in (('whole', 4, 0), ('bare', 1, 0), ('bare', 4, 5)):
        out = f'from-{start}{n_experts}'
        run(train, run_home, *flags, f'--init_from={start}/ckpt.pt', f'--n_experts={n_experts}',
            f'--out_dir={out}')
        flags.append('--dataset=own')  # the whole run knows its own
        again, onward = load_checkpoint(run_home / out / 'ckpt.pt')
        assert again.config == replace(model.config, n_experts=n_experts)
        assert onward['tied_until'] == tied_until
        assert max(onward['losses']) < ckpt['losses'][0] - 0.3, 'it starts from scratch'
    with refused('without a run'):
        run(train, run_home, '--init_from=resume', '--out_dir=bare')


def test_resume_takes_new_settings_of_the_optimizer_and_refuses_other_data(run_home, tmp_path):
    for folder in ('whole', 'own', 'data'):
        shutil.copytree(run_home / folder, tmp_path / folder)
    resume = partial(run, train, tmp_path, '--init_from=resume', '--out_dir=whole')
    for flag in ('--n_layer=3', '--n_experts=2', '--dataset=else', '--batch_size=8', '--seed=1',
                 '--eval_windows=1', '--dense_warmup=.1', '--preset=0.3b'):
        with refused(flag[2:].split('=')[0]):
            resume(flag)
    with refused('resume'):
        run(train, tmp_path, *TINY, '--out_dir=whole')  # would overwrite a finished run
    ckpt = load_checkpoint(tmp_path / 'whole/ckpt.pt')[1]
    for fields in (ckpt['args'], ckpt['config']):  # as if the checkpoint were older than this field
        del fields['first_segment']
    torch.save(ckpt, tmp_path / 'whole/ckpt.pt')
    with refused('step 30 already'):
        resume('--max_iters=29')
    with refused('ffn_hidden=96'):
        resume('--ffn_hidden=64')
    (tmp_path / 'data/own').rename(tmp_path / 'data/moved')
    resume('--max_iters=31', '--beta1=.5', '--weight_decay=.3', '--ffn_hidden=0', '--dataset=moved')
    groups = load_checkpoint(tmp_path / 'whole/ckpt.pt')[1]['optimizer']['param_groups']
    assert [(*group['betas'], group['weight_decay']) for group in groups] == [(.5, .95, .3), (.5, .95, 0)]
    run(prepare, tmp_path, '--input', 'own', '--vocab_size=400', '--val_fraction=.3')
    with refused('trained on'):
        resume('--max_iters=40', '--dataset=own')


@pytest.mark.parametrize('repeated', [0, 1, 99])
def test_resume_keeps_what_a_run_changed_of_its_preset(run_home, repeated):
    """With no flag named again, with the preset only, or with the whole command."""
    command = ['--preset=0.3b', *TINY, '--n_layer=1', '--ffn_hidden=32', '--learning_rate=.01',
               '--max_iters=1']
    out = f'--out_dir=paper-{repeated}'
    run(train, run_home, *command, out)
    run(train, run_home, *command[:repeated], out, '--init_from=resume', '--max_iters=2')
    args = load_checkpoint(run_home / out[10:] / 'ckpt.pt')[1]['args']
    assert (args['n_layer'], args['ffn_hidden'], args['learning_rate'], args['max_iters']) == (1, 32, .01, 2)
    assert args['first_segment'] == 'self'


class Nearer(LoryFFN):
    """A routing of one's own: the last token speaks for a segment, not the mean. It has a loss and a buffer,
    too."""
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer('calls', torch.zeros(()))

    def routing_weights(self, x):
        self.calls += 1
        self.aux_loss = x[..., -1, :].square().mean()
        return super().routing_weights(x[..., -1:, :])


def test_a_layer_of_ones_own_trains_and_is_refused_without_build(run_home):
    build, out = partial(Lory, ffn=Nearer), '--out_dir=nearer'
    run(train, run_home, *TINY, '--max_iters=10', out, build=build)
    run(train, run_home, '--init_from=resume', '--max_iters=20', out, build=build)
    model, ckpt = load_checkpoint(run_home / 'nearer/ckpt.pt', build=build)
    assert ckpt['step'] == 20 and ckpt['losses'][-1] < ckpt['losses'][0] - 0.3
    assert model.blocks[0].ffn.calls > 20  # which the resumed run and the loaded model went on from
    idx, targets = torch.randint(400, (2, 2, 64))
    plain, paid = model(idx, targets)[1], model.train()(idx, targets)[1]
    assert_close(paid - plain, sum(block.ffn.aux_loss for block in model.blocks))
    ffn, x = model.blocks[0].ffn, torch.randn(2, 64, 32)
    assert_close(ffn(x)[1][:, 1], ffn.router(x[:, 15]).softmax(-1))
    assert_close(ffn(x[:, :9], Cache(64))[1][:, 0], ffn.router(x[:, 8]).softmax(-1))  # in generation, too
    for script, argv in ((train, ['--init_from=resume', '--max_iters=40']), (sample, [])):
        with refused('Nearer'):
            run(script, run_home, *argv, out)
    flags = SimpleNamespace(shard=True, compile=False, activation_checkpointing=False)
    with refused('buffers'):
        train.wrap(model, flags, 'cpu', 2)


def rank_main(rank, home, runs):
    """One of two ranks, as torchrun would start it, for one run of train.py after the other."""
    for port, argv in runs:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        run(train, home, *argv)


def test_two_ranks_equal_one(run_home):
    """Two gloo processes, under DDP with accumulation and with --shard, also in float16 with its scaler,
    through dense warm-up and beyond. All runs are resumed for their last steps: those of two processes in
    one, that of one process in two."""
    short = [*TINY, '--max_iters=8', '--dense_warmup=.4', '--log_interval=1', '--eval_interval=8']
    longer = ['--init_from=resume', '--max_iters=12']
    ways = dict(ddp=['--shard=False', '--gradient_accumulation_steps=2'],
                shard=['--shard', '--activation_checkpointing'], half=['--shard', '--dtype=float16'])
    run(train, run_home, *short, '--out_dir=one')
    runs = []
    for name, how in ways.items():
        shutil.copytree(run_home / 'one', run_home / f'one-{name}')
        runs += [*short, *how, f'--out_dir={name}'], [*longer, *how, f'--out_dir=one-{name}']
    torch.multiprocessing.spawn(rank_main, (run_home, [(get_free_port(), argv) for argv in runs]), nprocs=2)
    for name in ('one', *ways):
        run(train, run_home, *longer, *ways['ddp'], f'--out_dir={name}')
    figures, weights, _ = carried(run_home / 'one/ckpt.pt')
    assert figures[:2] == [12, 3]
    for name in ('ddp', 'shard', 'one-ddp', 'one-shard', 'half', 'one-half'):
        others, other_weights, _ = carried(run_home / name / 'ckpt.pt')
        rtol, atol = (2e-3, 1e-2) if 'half' in name else (1e-5, 5e-5)
        assert_close(others, figures, rtol=rtol, atol=0)  # every loss and figure of the log
        assert_close(other_weights, weights, rtol=0, atol=atol)  # Adam scales rounding up


@pytest.mark.parametrize('flags, word', [
    ('--segment_len=65', 'segment_len'), ('--n_experts=0', 'n_experts'), ('--out_dir=', 'out_dir'),
    ('--device=gpu', 'gpu'), ('--block_size=9999999', '9999999'), ('--shard', 'torchrun'),
    ('--dataset=none', 'none'), ('--init_from=resum', 'resum'), ('--init_from=resume', 'ckpt.pt'),
    ('--batch_size=3 --gradient_accumulation_steps=2', 'batch_size'),
    ('--dataset=builtin --n_head=5', 'n_head'), ('--init_from=whole/ckpt.pt --n_layer=3', 'n_layer'),
    ('--init_from=whole/ckpt.pt --preset=0.3b', 'ffn_hidden.*preset'),
    ('--init_from=whole/ckpt.pt --n_experts=2', 'n_experts')])
def test_train_refuses_bad_values_before_it_works(run_home, monkeypatch, flags, word):
    monkeypatch.setattr(prepare, 'main', None)
    with refused(word):
        run(train, run_home, *TINY, '--out_dir=refused', *flags.split())
    assert not (run_home / 'refused').exists()


def test_a_run_that_is_not_finite_stops_before_it_saves(run_home, monkeypatch):
    """In its loss, in validation, in its gradient when Ctrl-C asks for a save."""
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    model.embed.weight.data.fill_(math.inf)
    save_checkpoint(run_home / 'wild.pt', model, ckpt['tokenizer'])
    wild = partial(run, train, run_home, *TINY, '--max_iters=1', '--out_dir=wild')
    with refused('step 1 is not finite'):
        wild('--init_from=wild.pt')
    monkeypatch.setattr(train, 'evaluate', lambda *args: (dict(val_bpb=math.nan), None))
    with refused('step 1 is not finite'):
        wild()
    monkeypatch.setattr(Lory, 'tie_gradients', lambda model: model.norm.weight.grad.fill_(math.nan))
    with refused('step 1 is not finite'), at_call(train, 'get_batch', 1, ctrl_c):
        wild('--max_iters=2')  # step 1 is tied, and not validated
    assert os.listdir(run_home / 'wild') == ['log.csv']


# --- sample.py, and the scripts from the shell. ---

@pytest.fixture
def sampled(run_home, capsys):
    """A function: what sample.py prints, given these flags."""
    def printed(*flags):
        run(sample, run_home, '--out_dir=whole', '--device=cpu', '--max_new_tokens=40', *flags)
        return capsys.readouterr().out
    return printed


def test_sample_prints_what_generate_makes_and_stops(run_home, sampled):
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    tokenizer = prepare.load_tokenizer(ckpt['tokenizer'])
    prompt = torch.tensor([[tokenizer.eot_token] + tokenizer.encode_ordinary('The value')])
    text = tokenizer.decode(model.generate(prompt, 40, temperature=0)[0].tolist()).split('<|endoftext|>')[0]
    greedily = ['--start=The value', '--temperature=0']
    shown = sampled(*greedily, '--show_routing', '--save_dense=dense.pt')
    assert shown.count('\nlayer') == 2 and shown.endswith(f'\nThe value{text}\n')
    assert sampled(*greedily, '--checkpoint=dense.pt') == f'The value{text}\n'
    assert load_checkpoint(run_home / 'dense.pt')[1]['args']['dataset'] == 'own', 'to train on from it'
    stopped = sampled(*greedily, f'--stop={text[3:6]}')[9:-1]
    assert text.startswith(stopped) and text[3:6] in stopped and len(stopped) < len(text)


def test_sample_draws_by_seed_after_a_prompt_from_a_file(run_home, sampled):
    (run_home / 'prompt.txt').write_text('Füße 漢字', encoding='utf-8')
    flags = ['--start=FILE:prompt.txt', '--num_samples=2', '--top_k=50', '--top_p=.95']
    first, again, other = (sampled(*flags, f'--seed={seed}') for seed in (1, 1, 2))
    assert first == again != other
    assert first.startswith('Füße 漢字') and first.count('-' * 80 + '\nFüße 漢字') == 1


def test_a_sample_ends_with_the_document_and_shows_half_a_character(run_home, sampled, monkeypatch):
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    tokenizer = prepare.load_tokenizer(ckpt['tokenizer'])
    half = tokenizer.encode_single_token('é'.encode()[:1])
    tokens = torch.tensor([*tokenizer.encode_ordinary(' end'), half, tokenizer.eot_token, 65])
    monkeypatch.setattr(Lory, 'stream', lambda *args: iter(tokens[:, None]))
    assert sampled('--start=The') == 'The end\N{REPLACEMENT CHARACTER}\n'
    # An id that stands for nothing, as cl100k has, ends it, too.
    ckpt['tokenizer']['tokens'][half] = ''
    save_checkpoint(run_home / 'gap.pt', model, ckpt['tokenizer'])
    assert sampled('--start=The', '--checkpoint=gap.pt') == 'The end\n'


@pytest.mark.parametrize('flag, word', [
    ('--start=FILE:none', 'none'), ('--start=FILE:data/own/train.bin', 'UTF-8'), ('--device=foo', 'device'),
    ('--start=\udcff', 'UTF-8'), ('--start=' + 'word ' * 100, 'size'), ('--out_dir=nowhere', 'nowhere'),
    ('--save_dense=whole/ckpt.pt', 'exists'), ('--checkpoint=plain.pt', 'no tokenizer')])
def test_sample_refuses_bad_values(run_home, sampled, flag, word):
    save_checkpoint(run_home / 'plain.pt', Lory(tiny_config()), None)
    with refused(word):
        sampled(flag)


@pytest.mark.parametrize('script, flag', [
    *((prepare, flag) for flag in ('--order=best', '--vocab_size=256', '--val_fraction=0', '--n_neighbors=0',
                                   '--nonsense=1')),
    *((train, flag) for flag in ('--seed=-1', '--log_interval=0', '--learning_rate=nan', '--beta1=1',
                                 '--routing=token', '--preset=7b', '--max_iter=3', '--compile=maybe')),
    *((sample, flag) for flag in ('--temperature=-1', '--temperature=nan', '--top_k=x', '--top_p=-1',
                                  '--max_new_tokens=0', '--show_routing=maybe'))])
def test_flags_with_wrong_values_end_in_argparses_exit_code(tmp_path, capsys, script, flag):
    with pytest.raises(SystemExit, match='2'):
        run(script, tmp_path, flag)
    assert flag.split('=')[0] in capsys.readouterr().err


def test_the_scripts_from_the_shell(data_home):
    """As a user starts them. A mistake is one sentence on stderr and exit code 2."""
    def shell(script, *flags):
        return subprocess.run([sys.executable, f'{HERE}/{script}', *flags], cwd=data_home, text=True,
                              capture_output=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    trained = shell('train.py', *TINY, '--max_iters=1', '--log_interval=1', '--out_dir=shell')
    assert (trained.returncode, trained.stderr) == (0, '') and 'done' in trained.stdout
    files = set(os.listdir(data_home / 'shell'))
    assert files == {'best.pt', 'ckpt.pt', 'experts.png', 'log.csv', 'loss.png'}
    names, *lines = (data_home / 'shell/log.csv').read_text().splitlines()
    assert names.startswith('step,loss,lr,norm,ms,tok_s,val_bpb,later_bpb') and len(lines) == 2
    failed = shell('sample.py', '--out_dir=nowhere')
    assert failed.returncode == 2
    assert re.fullmatch('sample.py: cannot read nowhere/ckpt.pt.*[.]\n', failed.stderr)
