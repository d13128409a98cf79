"""
The tests of Lory. The model's compare the code with something written another way; most have been seen to fail when
the code under them was broken on purpose.

    python -m pytest -q test_lory.py
"""
import base64
import csv
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
import types
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F

import prepare
import sample as sample_script
import train
from lory import (ExpertChoiceFFN, Lory, LoryConfig, LoryFFN, MergedLinear, UserError, atomic_open, load_checkpoint,
                  rotation, sample, save_checkpoint, upcycle)

torch.set_num_threads(1)
HERE = os.path.dirname(os.path.abspath(__file__))


def small(**changes):
    return LoryConfig(**dict(dict(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16, ffn_hidden=24,
                                  n_experts=4, segment_len=6), **changes))


def sharp(module, scale=4.0, seed=0):
    """Push the routing far from uniform, by what the router reads more than by its bias, and everything else far enough
    from zero that no effect can hide. Float64."""
    torch.manual_seed(seed)
    for name, p in module.named_parameters():
        with torch.no_grad():
            if 'norm' not in name:
                p.normal_(std=scale if 'router.weight' in name else 0.3)
    return module.double()


# ----------------------------------------------------------------------------------------------------------------------
# The layer against a loop that knows no batches, no merging in advance and no padding.

def naive_lory(ffn, x):
    """Algorithm 1 token by token: average the experts' matrices one by one, for each segment of each sequence."""
    B, L, D = x.shape
    T = ffn.segment_len
    rows = []
    for b in range(B):
        for t in range(L):
            k = t // T
            if k > 0:
                previous = x[b, (k - 1) * T:k * T]
                logits = sum(previous) / T @ ffn.router.weight.T + ffn.router.bias
            elif ffn.first_segment == 'self':
                logits = (sum(x[b, :T]) / min(T, L) @ ffn.router.weight.T + ffn.router.bias).detach()
            else:
                logits = ffn.router.bias
            e = torch.exp(logits) / torch.exp(logits).sum()
            gate, up, down = (sum(e[i] * w[i] for i in range(len(e))) for w in (ffn.gate, ffn.up, ffn.down))
            g = x[b, t] @ gate
            rows.append((g * torch.sigmoid(g) * (x[b, t] @ up)) @ down)
    return torch.stack(rows).view(B, L, D)


@pytest.mark.parametrize('first_segment', ['prior', 'self'])
@pytest.mark.parametrize('L', [24, 20, 7, 4])
def test_layer_equals_naive_loop_in_output_and_every_gradient(first_segment, L):
    ffn = sharp(LoryFFN(small(first_segment=first_segment)), scale=2.0)
    x = torch.randn(3, L, 16, dtype=torch.float64)
    probe = torch.randn(3, L, 16, dtype=torch.float64)
    results = []
    for forward in (lambda z: ffn(z)[0], lambda z: naive_lory(ffn, z)):
        z = x.clone().requires_grad_()
        y = forward(z)
        grads = torch.autograd.grad((y * probe).sum(), [z, *ffn.parameters()], allow_unused=True)
        results.append([y, *(torch.zeros(1) if g is None else g for g in grads)])
    names = ['output', 'x', *(n for n, _ in ffn.named_parameters())]
    for name, ours, naive in zip(names, *results):
        torch.testing.assert_close(ours, naive.to(ours).expand_as(ours), rtol=1e-9, atol=1e-12,
                                   msg=lambda m: f'{name}: {m}')


def test_merged_linear_against_finite_differences_and_autograd():
    torch.manual_seed(0)
    x, e, theta = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5, 4), (3, 2), (2, 4, 6)))
    assert torch.autograd.gradcheck(MergedLinear.apply, (x, e, theta))
    dy = torch.randn(3, 5, 6, dtype=torch.float64)
    ours = torch.autograd.grad(MergedLinear.apply(x, e, theta), (x, e, theta), dy)
    plain = torch.autograd.grad(torch.einsum('sti,se,eio->sto', x, e, theta), (x, e, theta), dy)
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('apart', [1.0, 0.003])
def test_bfloat16_autocast_stays_near_the_float32_formula(apart):
    """The merge in autocast's dtype, forward and backward, against a float32 reference that rounds nothing; also just after
    upcycling, when experts differ by less than bfloat16 resolves and the router's gradient is all in the difference."""
    torch.manual_seed(0)
    ffn = LoryFFN(small(n_embd=64, ffn_hidden=96))
    for p in ffn.parameters():
        torch.nn.init.normal_(p, std=0.1)
    for p in (ffn.gate, ffn.up, ffn.down):
        p.data.mul_(apart).add_(torch.randn_like(p[0]) * 0.1 * (1 - apart))
    x = torch.randn(2, 24, 64)
    probe = torch.randn(2, 24, 64)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        z = x.clone().requires_grad_()
        with torch.autocast('cpu', dtype=dtype, enabled=dtype == torch.bfloat16):
            y, e = ffn(z)
        assert y.dtype == dtype and e.dtype == torch.float32
        results.append([y, *torch.autograd.grad((y.float() * probe).sum(), [z, *ffn.parameters()])])
    for name, exact, rounded in zip(['y', 'x', *dict(ffn.named_parameters())], *results):
        error = (exact - rounded).norm() / exact.norm()
        assert error < 0.02, f'{name}: {error:.4f}'                  # bfloat16 keeps 8 bits: 0.004 an operation
        assert rounded.dtype == (torch.bfloat16 if name == 'y' else torch.float32)


@pytest.mark.filterwarnings('ignore:.*script_method:DeprecationWarning')   # torch's own
@pytest.mark.parametrize('backend', [None, 'aot_eager_decomp_partition'])   # the latter: torch.compile without a C++ compiler
def test_merged_weights_are_not_kept_for_backward(backend):
    """The saved tensors of a merged layer must not grow with the number of segments times the expert size."""
    torch._dynamo.reset()
    ffn = sharp(LoryFFN(small(n_embd=32, ffn_hidden=512, block_size=64, segment_len=1)))
    run = torch.compile(ffn, backend=backend) if backend else ffn
    x = torch.randn(2, 64, 32, dtype=torch.float64, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        y = run(x)[0]
    assert max(sizes) < 2 * 64 * 32 * 512 / 10, 'a merged copy of the experts was saved for every segment'
    ours, plain = (torch.autograd.grad(z.square().sum(), [x, *ffn.parameters()]) for z in (y, ffn(x)[0]))
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b)


def test_duplicated_experts_equal_dense_for_any_weights():
    dense = sharp(Lory(small(n_experts=1)))
    moe = sharp(upcycle(dense, 4)[0])                                # routing sharp ...
    for name, p in moe.named_parameters():
        if 'router' not in name:
            p.data.copy_(dict(dense.named_parameters())[name])       # ... experts equal
    idx = torch.randint(50, (3, 20))
    logits, _, routing = moe(idx, return_routing=True)
    assert routing.max() > 0.9
    torch.testing.assert_close(logits, dense(idx)[0])


def test_one_expert_is_a_plain_llama_ffn():
    model = sharp(LoryFFN(small(n_experts=1)))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    plain = F.linear(F.silu(F.linear(x, model.gate[0].T)) * F.linear(x, model.up[0].T), model.down[0].T)
    torch.testing.assert_close(model(x)[0], plain)
    assert model.router is None and model(x)[1].shape == (2, 2, 1)


def test_attention_and_loss_against_a_second_implementation():
    """Rotary attention in complex numbers with an explicit mask and softmax; loss from log-probabilities by hand."""
    model = sharp(Lory(small(n_experts=1, n_layer=1)))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    attn, nh, hs = model.blocks[0].attn, 2, 8
    q, k, v = (t.view(2, 9, nh, hs).transpose(1, 2) for t in F.linear(x, attn.qkv.weight).split(16, -1))
    turn = torch.polar(torch.ones(9, hs // 2, dtype=torch.float64),
                       torch.outer(torch.arange(9.), 10000.0 ** (-torch.arange(4) / 4)).double())
    q, k = (torch.complex(t[..., :4], t[..., 4:]) * turn for t in (q, k))
    scores = (q @ k.mH).real / math.sqrt(hs)
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 16)
    ours = attn(x, rotation(torch.arange(9), hs))
    torch.testing.assert_close(ours, F.linear(y, attn.proj.weight), rtol=1e-6, atol=1e-6)

    idx, targets = torch.randint(50, (2, 9)), torch.randint(50, (2, 9))
    targets[0, 3] = -1
    logits, loss = model(idx, targets)
    logp = logits - logits.exp().sum(-1, keepdim=True).log()
    terms = [-logp[b, t, targets[b, t]] for b in range(2) for t in range(9) if targets[b, t] >= 0]
    assert loss.item() == pytest.approx((sum(terms) / 17).item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# What may depend on what.

def moved(model, idx, b, t):
    """Change token t of sequence b; -> (B, L) bool, where the logits moved."""
    other = idx.clone()
    other[b, t] = (other[b, t] + 1 + torch.randint(48, ())) % 50
    return ((model(idx)[0] - model(other)[0]).abs().amax(-1) > 1e-9)


@pytest.mark.parametrize('L', [24, 21])
def test_prior_is_causal_at_every_position_and_across_rows(L):
    model = sharp(Lory(small(first_segment='prior')))
    idx = torch.randint(50, (3, L))
    assert model(idx, return_routing=True)[2][:, :, 1:].amax(-1).median() > 0.9, 'routing must be far from uniform'
    for t in range(L):
        where = moved(model, idx, 1, t)
        assert not where[0].any() and not where[2].any(), 'a sequence sees its neighbour in the batch'
        assert not where[1, :t].any(), f'token {t} reaches back'
        assert where[1, t:].all(), f'token {t} must be felt from its own position on'


def test_self_leaks_within_the_first_segment_and_nowhere_else():
    model = sharp(Lory(small(first_segment='self')))
    idx = torch.randint(50, (3, 24))
    for t in range(24):
        where = moved(model, idx, 1, t)
        assert not where[0].any() and not where[2].any()
        if t < 6:
            assert where[1].all(), 'under the paper\'s rule every token of segment 1 moves all its weights'
        else:
            assert not where[1, :t].any()


def test_where_gradients_flow():
    """Segment 1 teaches experts but (under the paper's rule) no router; segment k's router learns from k-1 only."""
    ffn = sharp(LoryFFN(small(first_segment='self')), scale=1.0)
    x = torch.randn(2, 24, 16, dtype=torch.float64, requires_grad=True)
    y = ffn(x)[0].view(2, 4, 6, 16)
    router, gate = torch.autograd.grad(y[:, 0].sum(), [ffn.router.weight, ffn.gate], retain_graph=True,
                                       materialize_grads=True)
    assert router.abs().max() == 0 and gate.abs().min() > 0
    for k in range(1, 4):
        dx, router = torch.autograd.grad(y[:, k].sum(), [x, ffn.router.weight], retain_graph=True)
        felt = dx.view(2, 4, 6, 16).abs().amax((0, 2, 3)) > 0
        assert felt.tolist() == [j in (k - 1, k) for j in range(4)] and router.abs().max() > 0

    ffn = sharp(LoryFFN(small(first_segment='prior')), scale=1.0)
    y = ffn(x)[0].view(2, 4, 6, 16)
    weight, bias = torch.autograd.grad(y[:, 0].sum(), [ffn.router.weight, ffn.router.bias], materialize_grads=True)
    assert weight.abs().max() == 0 and bias.abs().min() > 0, 'the prior is learned, from the bias alone'


@pytest.mark.parametrize('L', [24, 20, 4])
def test_prefix_routing_equals_naive_loop(L):
    """Sec. 5.1: segment 1 routes every segment after it."""
    ffn = sharp(LoryFFN(small(routing='prefix')), scale=2.0)
    x, T = torch.randn(2, L, 16, dtype=torch.float64), 6
    y = ffn(x)[0]
    for b in range(2):
        for t in range(L):
            logits = x[b, :T].mean(0) @ ffn.router.weight.T + ffn.router.bias if t >= T else ffn.router.bias
            gate, up, down = (torch.einsum('e,eio->io', logits.softmax(0), w) for w in (ffn.gate, ffn.up, ffn.down))
            torch.testing.assert_close(y[b, t], (F.silu(x[b, t] @ gate) * (x[b, t] @ up)) @ down)


def test_expert_choice_equals_naive_loop_in_training_and_evaluation():
    """Sec. 5.3: each expert takes its k best tokens of a sequence; in evaluation each token takes its best expert."""
    ffn = sharp(ExpertChoiceFFN(small(routing='expert_choice')), scale=1.0)
    x = torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)

    def expert(i, h):
        return (F.silu(h @ ffn.gate[i]) * (h @ ffn.up[i])) @ ffn.down[i]
    probe = torch.randn(2, 20, 16, dtype=torch.float64)
    for training in (True, False):
        ffn.train(training)
        rows = [[torch.zeros(16, dtype=torch.float64) for _ in range(20)] for _ in range(2)]
        for b in range(2):
            score = (x[b] @ ffn.router.weight.T + ffn.router.bias).softmax(-1)
            for i in range(4):
                best = score[:, i].argsort(descending=True)[:5] if training else (score.argmax(-1) == i).nonzero()[:, 0]
                for t in best.tolist():
                    rows[b][t] = rows[b][t] + score[t, i] * expert(i, x[b, t])
        naive = torch.stack([torch.stack(r) for r in rows])
        y = ffn(x)[0]
        torch.testing.assert_close(y, naive)
        params = [x, *ffn.parameters()]
        ours, theirs = (torch.autograd.grad((out * probe).sum(), params) for out in (y, naive))
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)


def test_what_is_causal_and_what_is_not():
    """prefix and expert_choice are causal where they are judged. The positive controls, expert choice as it trains and
    SMEAR's mean over the whole sequence, must be caught by the same probe."""
    torch.manual_seed(0)
    idx = torch.randint(50, (3, 24))

    def leaks(model):
        return any(moved(model, idx, 1, t)[1, :t].any() for t in range(1, 24))
    choice = sharp(Lory(small(routing='expert_choice')))
    smear = sharp(Lory(small(segment_len=24, first_segment='self')))
    assert not leaks(sharp(Lory(small(routing='prefix'))))
    assert not leaks(choice.eval()) and leaks(choice.train()) and leaks(smear)


# ----------------------------------------------------------------------------------------------------------------------
# Dense warm-up.

def train_steps(model, optimizer, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        idx = torch.randint(50, (4, 25), generator=g)
        idx[:, 1:] = torch.where(torch.rand(4, 24, generator=g) < 0.7, (idx[:, :-1] * 7 + idx[:, :1]) % 50, idx[:, 1:])
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize('router', ['random', 'zero'])
def test_upcycling_changes_nothing_and_then_the_experts_part_if_the_router_differs(router):
    torch.manual_seed(0)
    dense = Lory(small(n_experts=1))
    optimizer = dense.optimizer(1e-2, 0.1, (0.9, 0.95))
    train_steps(dense, optimizer, 20)
    model, moved_optimizer = upcycle(dense, 4, optimizer)
    idx = torch.randint(50, (2, 24))
    torch.testing.assert_close(model(idx)[0], dense(idx)[0])

    if router == 'zero':
        for block in model.blocks:
            torch.nn.init.zeros_(block.ffn.router.weight)

    def distance():
        w = model.blocks[0].ffn.gate
        return (w - w[:1]).norm().item() / w.norm().item()
    assert distance() == 0
    train_steps(model, moved_optimizer, 60, seed=1)
    assert distance() > 0.01 if router == 'random' else distance() == 0


def test_upcycled_optimizer_takes_the_step_the_dense_one_would():
    """With uniform routing a step of the upcycled model, merged again, is the dense model's step: state was carried."""
    torch.manual_seed(0)
    dense = Lory(small(n_experts=1))
    optimizer = dense.optimizer(1e-2, 0.1, (0.9, 0.95))
    train_steps(dense, optimizer, 20)
    model, moved_optimizer = upcycle(dense, 4, optimizer)
    for block in model.blocks:
        torch.nn.init.zeros_(block.ffn.router.weight)
    train_steps(dense, optimizer, 1, seed=5)
    train_steps(model, moved_optimizer, 1, seed=5)
    old = dict(dense.named_parameters())
    for name, p in model.named_parameters():
        if 'router' not in name:
            torch.testing.assert_close(p, old[name].expand_as(p), rtol=1e-4, atol=2e-5)


def test_paper_presets_have_the_papers_sizes():
    for preset, n_experts, total in [('0.3b', 1, 0.3), ('0.3b', 8, 1.8), ('0.3b', 16, 3.5), ('0.3b', 32, 6.8),
                                     ('1.5b', 1, 1.5), ('1.5b', 8, 7.8), ('1.5b', 16, 15.0), ('1.5b', 32, 29.5)]:
        shape = {k: v for k, v in train.PRESETS[preset].items() if k in LoryConfig.__dataclass_fields__}
        with torch.device('meta'):
            model = Lory(LoryConfig(vocab_size=32000, n_experts=n_experts, **shape))
        assert model.num_params() / 1e9 == pytest.approx(total, abs=0.08)
        assert model.num_params(active=True) / 1e9 == pytest.approx(float(preset[:-1]), abs=0.08)


# ----------------------------------------------------------------------------------------------------------------------
# Generation: the cache against recomputing everything, batches against single prompts.

def naive_greedy(model, prompt, n):
    """Segment routing without a cache: the full forward pass again for every token."""
    idx = prompt.clone()
    for _ in range(n):
        idx = torch.cat([idx, model(idx[None])[0][0, -1:].argmax(-1)])
    return idx[len(prompt):]


@pytest.mark.parametrize('routing, first_segment, lengths', [
    ('causal', 'prior', range(1, 15)), ('causal', 'self', range(6, 15)),      # self sees the prompt's segment 1 only
    ('prefix', 'prior', range(1, 15)),
    ('expert_choice', 'prior', (1, 9))])
def test_segment_routing_decodes_what_the_full_pass_computes_at_every_position(routing, first_segment, lengths):
    model = sharp(Lory(small(routing=routing, first_segment=first_segment))).eval()
    idx = torch.randint(50, (2, 24))
    full = model(idx)[0]
    for L in lengths:                                                # any prompt length modulo T = 6
        logits, _, cache = model.prefill(idx[:, :L], reroute=True)
        for t in range(L, 24):
            torch.testing.assert_close(logits, full[:, t - 1])
            logits = model.decode(idx[:, t], torch.tensor([t, t]), cache)
        torch.testing.assert_close(logits, full[:, -1])


def test_prompt_routing_is_one_merge_by_the_prompts_mean():
    """Prefill and decoding equal the dense model made by averaging experts with the weights the prompt gives."""
    model = sharp(Lory(small()))
    prompt, rest = torch.randint(50, (1, 9)), torch.randint(50, (1, 8))
    x, dense = model.embed(prompt), Lory(small(n_experts=1)).double()
    for block, plain in zip(model.blocks, dense.blocks):
        x = x + block.attn(block.attn_norm(x), rotation(torch.arange(9), 8))
        h = block.ffn_norm(x)
        e = (h[0].mean(0) @ block.ffn.router.weight.T + block.ffn.router.bias).softmax(0)
        for name in ('gate', 'up', 'down'):
            getattr(plain.ffn, name).data = torch.einsum('e,eio->io', e, getattr(block.ffn, name))[None]
        plain.attn, plain.attn_norm, plain.ffn_norm = block.attn, block.attn_norm, block.ffn_norm
        x = x + plain.ffn(h)[0]
    dense.embed, dense.head, dense.norm = model.embed, model.head, model.norm
    expected = dense(torch.cat([prompt, rest], 1))[0][0]

    logits, _, cache = model.prefill(prompt)
    torch.testing.assert_close(logits[0], expected[8])
    for t in range(8):
        logits = model.decode(rest[:, t], torch.tensor([9 + t]), cache)
        torch.testing.assert_close(logits[0], expected[9 + t])

    special = model.specialize(prompt)
    assert special.config.n_experts == 1
    torch.testing.assert_close(special(torch.cat([prompt, rest], 1))[0][0], expected)


@pytest.mark.parametrize('reroute', [False, True])
def test_ragged_batch_equals_one_by_one(reroute):
    model = sharp(Lory(small()))
    prompts = [torch.randint(50, (n,)) for n in (1, 5, 6, 7, 13)]
    together = model.generate(prompts, 10, temperature=0, reroute=reroute)
    for prompt, row in zip(prompts, together):
        assert row.tolist() == model.generate(prompt[None], 10, temperature=0, reroute=reroute)[0].tolist()
        if reroute:
            assert row.tolist() == naive_greedy(model, prompt, 10).tolist()


def test_generation_past_block_size_attends_to_the_last_tokens_and_keeps_the_grid(monkeypatch):
    """Against a full pass under a sliding-window mask: same attention span, segments still counted from token 0."""
    model = sharp(Lory(small(block_size=12, n_layer=2)))
    idx = torch.randint(50, (1, 40))
    plain = F.scaled_dot_product_attention

    def windowed(q, k, v, is_causal=False, attn_mask=None):
        L = q.shape[2]
        near = torch.ones(L, L, dtype=torch.bool).tril() & ~torch.ones(L, L, dtype=torch.bool).tril(-12)
        return plain(q, k, v, attn_mask=near)
    with monkeypatch.context() as m:
        m.setattr(F, 'scaled_dot_product_attention', windowed)
        full = model(idx)[0]
    logits, _, cache = model.prefill(idx[:, :8], reroute=True)
    for t in range(8, 40):
        torch.testing.assert_close(logits, full[:, t - 1])
        logits = model.decode(idx[:, t], torch.tensor([t]), cache)


def test_sampling_keeps_what_it_should():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    torch.manual_seed(0)
    share = lambda *how: torch.bincount(sample(logits, *how), minlength=4) / 4000
    assert share(0, 0, 1.0).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(share(1.0, 0, 1.0), logits[0].softmax(0), atol=0.03, rtol=0)
    torch.testing.assert_close(share(2.0, 2, 1.0), F.pad((logits[0, :2] / 2).softmax(0), (0, 2)), atol=0.03, rtol=0)
    # probabilities are .64 .24 .09 .03: .7 needs two tokens, .6 one
    assert (share(1.0, 0, 0.7) > 0).tolist() == [True, True, False, False]
    assert share(1.0, 0, 0.6).tolist() == [1, 0, 0, 0]


def test_prompts_of_no_or_too_many_tokens_are_refused():
    model = Lory(small())
    for n in (0, 25):
        with pytest.raises(UserError, match='block_size=24'):
            model.prefill(torch.zeros(1, n, dtype=torch.long))


# ----------------------------------------------------------------------------------------------------------------------
# Config and checkpoints.

@pytest.mark.parametrize('wrong', [dict(n_experts=0), dict(segment_len=0), dict(segment_len=25), dict(n_head=3),
                                   dict(first_segment='zero'), dict(n_layer=0)])
def test_config_refuses_what_does_not_fit(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        small(**wrong)


def test_checkpoint_round_trip_and_refusals(tmp_path):
    model, path = Lory(small(tie_embeddings=False)), tmp_path / 'ckpt.pt'
    save_checkpoint(path, model.config, model.state_dict(), note='kept')
    again, ckpt = load_checkpoint(path)
    assert ckpt['note'] == 'kept' and again.config == model.config
    for a, b in zip(model.parameters(), again.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match='no checkpoint'):
        load_checkpoint(tmp_path / 'none.pt')
    whole, at = path.read_bytes(), path.read_bytes().index(model.embed.weight.detach().numpy().tobytes())
    for damaged in (whole[:1000], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]):     # cut off; one bit of a weight
        path.write_bytes(damaged)
        with pytest.raises(UserError, match='not a whole'):
            load_checkpoint(path)
    with pytest.raises(UserError, match='cannot read'):              # nobody should be told to throw this one away
        load_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'f'
    path.write_text('old')
    with pytest.raises(UserError, match='unchanged'):
        with atomic_open(path) as f:
            f.write(b'half')
            raise OSError(28, 'No space left on device')
    class Full:                                                      # a disk that fills up under torch.save
        def write(self, data):
            raise OSError(28, 'No space left on device')
    with pytest.raises(UserError, match='No space'):
        with atomic_open(path) as f:
            torch.save(torch.zeros(1000), Full())
    with pytest.raises(KeyboardInterrupt):
        with atomic_open(path) as f:
            f.write(b'half')
            raise KeyboardInterrupt
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['f']


# ----------------------------------------------------------------------------------------------------------------------
# prepare.py: reading, holding out, chaining, tokenizing, writing, and refusing what is not whole.

@pytest.fixture(scope='session')
def data_docs():
    """Some 200 real documents of five domains."""
    return prepare.read_builtin(mb_per_domain=0.12)


@pytest.fixture(scope='session')
def data_home(data_docs, tmp_path_factory):
    """A folder with `own/`, documents as files in two subfolders, and `data/own`, the dataset prepared from it."""
    home = tmp_path_factory.mktemp('data_home')
    for i, doc in enumerate(data_docs):
        if doc.domain in ('prose', 'cpp'):
            (home / 'own' / doc.domain).mkdir(parents=True, exist_ok=True)
            (home / 'own' / doc.domain / f'{i}.txt').write_text(doc.text, encoding='utf-8')
    data_prepare(home, '--input', 'own', '--vocab_size=400', '--val_fraction=.2')
    return home


def data_prepare(home, *argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        prepare.main(list(argv))


def data_folder(home, argv=(), **texts):
    """home/own with one file per item, prepared with `argv`."""
    (home / 'own').mkdir()
    for name, text in texts.items():
        (home / 'own' / name.replace('__', '.')).write_bytes(text if isinstance(text, bytes) else text.encode())
    data_prepare(home, '--input', 'own', '--tokenizer=byte', *argv)


def data_read(home, split):
    """[(text, domain)] of a split, in stored order, decoded from the bins of home/data/own with nothing of prepare."""
    meta = json.loads((home / 'data/own/meta.json').read_text())
    tokens = np.fromfile(home / f'data/own/{split}.bin', '<u2')
    docs = np.load(home / f'data/own/{split}_docs.npz')
    pieces = [base64.b64decode(t) for t in json.loads((home / 'data/own/tokenizer.json').read_text())['tokens']]
    out = []
    for a, b, domain in zip(docs['start'], docs['start'][1:], docs['domain']):
        assert tokens[a] == meta['eot'] and meta['eot'] not in tokens[a + 1:b]
        out.append((b''.join(pieces[t] for t in tokens[a + 1:b]).decode(), meta['domains'][domain]))
    assert docs['start'][-1] == len(tokens) == meta[split]['tokens']
    return out


def data_cosine(X):
    X = X.toarray().astype(np.float64)
    return X @ X.T


# ----------------------------------------------------------------------------------------------------------------------
# Neighbours and chain.

def data_naive_chain(similarity, k, starts):
    """The walk of Sec. 3.2, O(n^2), from the full similarity matrix."""
    n, left, order = len(similarity), set(range(len(similarity))), []
    ranked = [sorted((j for j in range(n) if j != i), key=lambda j: (-round(similarity[i, j], 6), j))[:k]
              for i in range(n)]
    while left:
        options = [j for j in ranked[order[-1]] if j in left] if order else []
        here = options[0] if options else [s for s in starts if s in left][0]
        order.append(here)
        left.remove(here)
    return order


def test_neighbours_and_chain_agree_with_brute_force(data_docs):
    X = prepare.embed([doc.text for doc in data_docs])
    similarity = data_cosine(X)
    assert np.allclose(np.diag(similarity), 1, atol=1e-5)
    np.fill_diagonal(similarity, -1)
    neighbours = prepare.nearest(X, 5)
    n = len(data_docs)
    assert neighbours.shape == (n, 5) and all(i not in row for i, row in enumerate(neighbours))
    best = -np.sort(-similarity, axis=1)[:, :5]
    assert np.allclose(np.take_along_axis(similarity, neighbours, 1), best, atol=2e-6)

    order, restarts = prepare.chain(neighbours, np.random.default_rng(7))
    assert sorted(order) == list(range(n)) and 0 < restarts < n / 3
    assert order.tolist() == data_naive_chain(similarity, 5, np.random.default_rng(7).permutation(n).tolist())


def test_chain_by_hand():
    # 0 -> 1 -> 2, then every neighbour of 2 is used: restart at whichever of 3 and 4 comes first, then its neighbour.
    neighbours = np.array([[1], [2], [0], [4], [3]])
    order, restarts = prepare.chain(neighbours, np.random.default_rng(0))
    assert restarts == 1 and order.tolist() == [2, 0, 1, 4, 3]       # this seed starts at 2, then at 4


def test_ties_go_to_the_lower_number():
    X = prepare.embed(['alpha beta'] * 2 + ['alpha gamma'] * 4)
    assert prepare.nearest(X, 3)[5].tolist() == [2, 3, 4]


def test_chain_beats_random_order(data_docs):
    X = prepare.embed([doc.text for doc in data_docs])
    order, _ = prepare.chain(prepare.nearest(X, 32), np.random.default_rng(0))
    similarity = data_cosine(X)
    shuffled = np.random.default_rng(0).permutation(len(order))
    assert similarity[order[:-1], order[1:]].mean() > 3 * similarity[shuffled[:-1], shuffled[1:]].mean()
    lengths = np.full(len(order), 300)
    domain = np.array([prepare.DOMAINS.index(doc.domain) for doc in data_docs])
    assert prepare.one_domain_share(lengths[order], domain[order]) > prepare.one_domain_share(
        lengths[shuffled], domain[shuffled]) + .1


def test_one_domain_share():
    share = prepare.one_domain_share(np.array([4, 4, 3, 5]), np.array([0, 0, 1, 0]), window=4)
    assert share == 3 / 4  # 0000 0000 1110 0000: the third is mixed
    assert prepare.one_domain_share(np.array([1, 7]), np.array([0, 1]), window=4) == 1 / 2


def test_shards_are_a_permutation(data_docs, monkeypatch):
    monkeypatch.setattr(prepare, 'SHARD', 40)
    args = prepare.argparse.Namespace(seed=1, order='similar', n_neighbors=8)
    val, train = prepare.hold_out(data_docs, .05)
    ordered = prepare.order_training(train, val, args)
    monkeypatch.setattr(prepare, 'TWIN', 2)  # nothing is dropped
    everything = prepare.order_training(train, val, args)
    assert Counter(everything) == Counter(train) and set(ordered) <= set(train) and everything != train
    for s, shard in enumerate(np.array_split(np.arange(len(train)), -(-len(train) // 40))):  # each in its own place
        assert {everything[i].text for i in shard} == {train[i].text for i in shard}


# ----------------------------------------------------------------------------------------------------------------------
# Holding out, twins.

def test_sources_are_held_out_whole(data_docs):
    val, train = prepare.hold_out(data_docs, .05)
    assert not {doc.source for doc in val} & {doc.source for doc in train}
    assert len(val) + len(train) == len(data_docs) and 0 < len(val) < .2 * len(data_docs)
    assert {doc.domain for doc in val} == {doc.domain for doc in data_docs}
    again, _ = prepare.hold_out(list(reversed(data_docs)), .05)
    assert set(again) == set(val)


def test_no_held_out_twin_in_training(data_docs, capsys):
    rng = random.Random(0)
    val, train = prepare.hold_out(data_docs, .2)
    planted = [doc._replace(text=doc.text + f'\nchanged {i}', source=f'twin{i}') for i, doc in enumerate(val[:20])]
    planted += [doc._replace(text='again ' + doc.text, source='other') for doc in train[:10]]
    train = train + planted
    rng.shuffle(train)
    train.insert(1, train[0]._replace(text=train[0].text + ' beside', source='beside'))
    kept = prepare.order_training(train, val, prepare.argparse.Namespace(seed=1, order='similar', n_neighbors=32))
    similarity = data_cosine(prepare.embed([doc.text for doc in val + train]))
    at = {doc: len(val) + i for i, doc in enumerate(train)}
    rows = [at[doc] for doc in kept]
    assert similarity[np.ix_(range(len(val)), rows)].max() < prepare.TWIN
    among = similarity[np.ix_(rows, rows)] - np.eye(len(rows))
    assert among.max() < prepare.TWIN
    dropped = [i for i in at.values() if i not in rows]  # and nothing was dropped without reason
    assert len(dropped) >= 25 and (similarity[dropped] >= prepare.TWIN).sum(1).min() >= 2
    leaked = sum(similarity[:len(val), i].max() >= prepare.TWIN for i in at.values())
    assert f'dropped {leaked} of held-out documents, {len(dropped) - leaked} of other' in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer.

def data_unicode(n, seed=0):
    rng = random.Random(seed)
    points = [rng.choice([rng.randrange(0x110000), rng.randrange(0x3000), rng.randrange(128)]) for _ in range(n)]
    return ''.join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


@pytest.mark.parametrize('name', ['bpe', 'byte'])
def test_tokenizer_round_trip(name, data_docs):
    d = json.loads(json.dumps(prepare.make_tokenizer(name, 500, [doc.text for doc in data_docs[:100]])))
    encoding = prepare.load_tokenizer(d)
    assert encoding.n_vocab == (500 if name == 'bpe' else 257) == len(d['tokens']) + 1
    assert d['special_tokens'] == {'<|endoftext|>': encoding.n_vocab - 1} == {'<|endoftext|>': encoding.eot_token}
    for text in [data_unicode(20_000), 'a<|endoftext|>b', '', ' ' * 1_000_000 + 'x', 'q' * 1_000_000, '\n \t' * 999]:
        tokens = prepare.encode(encoding, text)
        assert encoding.decode(tokens) == text
        assert encoding.eot_token not in tokens


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
    for text, n_tokens in [(data_docs[seed].text, 340), (soup, 300)]:
        assert prepare.train_bpe([text], n_tokens) == data_naive_bpe(text, n_tokens)


def test_bpe_stops_when_no_pair_occurs_twice():
    assert prepare.train_bpe(['abc'], 1000) == [bytes([b]) for b in range(256)]


# ----------------------------------------------------------------------------------------------------------------------
# The built-in corpus.

def test_pieces_join_to_the_text(data_docs):
    texts = [doc.text for doc in data_docs[:50]]
    texts += ['x' * 10_000, 'line\n' * 3000, '\n\n'.join(['  word ' * 90] * 20), ' ' * 9999]
    for text in [*texts, '\n\n'.join(texts)]:
        pieces = prepare.cut(text)
        assert ''.join(pieces) == text and max(map(len, pieces)) <= prepare.PIECE
    code = 'def f():\n    a = 1\n\n    return a\n\n\n' * 300
    assert all(piece.startswith('def f') for piece in prepare.cut(code))


def test_split_python():
    source = 'import os\n\n\ndef f(x):\n    """Says.\n\n    >>> f(1)\n    2\n\n    More.\n    """\n    return x\n\n\n' \
             'class A:\n    "\\d only"\n'
    parts = prepare.split_python(source)
    assert parts['prose'] == 'Says.\n\nMore.\n\n\\d only' and parts['repl'] == '>>> f(1)\n2'
    assert parts['python'] == 'import os\n\n\ndef f(x):\n    return x\n\n\nclass A:\n    pass\n'


def test_builtin_corpus(data_docs, tmp_path, capfd):
    for domain in prepare.DOMAINS:
        mine = [doc for doc in data_docs if doc.domain == domain]
        assert 120_000 <= sum(len(doc.text) for doc in mine) + 4096 < 135_000
        assert max(Counter(doc.source for doc in mine).values()) <= 4
        assert all(500 < len(doc.text) <= prepare.PIECE for doc in mine)
    assert all('>>> ' in doc.text for doc in data_docs if doc.domain == 'repl')
    data_prepare(tmp_path, '--mb_per_domain=.05', '--vocab_size=300')
    dataset = prepare.load_dataset(tmp_path / 'data/builtin', 64)
    assert dataset.meta['domains'] == prepare.DOMAINS and set(dataset.val.domain) == set(range(5))
    out, err = capfd.readouterr()
    assert err == '' and 'restarts' in out and 'adjacent cosine' in out


# ----------------------------------------------------------------------------------------------------------------------
# On disk.

def test_bins_decode_to_the_documents(data_home):
    files = {(path.read_text(), path.parent.name) for path in (data_home / 'own').rglob('*.txt')}
    train, val = data_read(data_home, 'train'), data_read(data_home, 'val')
    assert not set(train) & set(val) and set(train) | set(val) <= files and len(train) + len(val) > .8 * len(files)
    domains = [domain for _, domain in val]
    assert domains == sorted(domains) and set(domains) == {'prose', 'cpp'}  # contiguous

    dataset = prepare.load_dataset(data_home / 'data/own', 32)
    encoding = prepare.load_tokenizer(dataset.tokenizer)
    assert encoding.n_vocab == dataset.meta['vocab_size'] == 400
    for split, stored in ((dataset.train, train), (dataset.val, val)):
        assert split.start.dtype == np.int64 and split.domain.dtype == np.uint8 and split.tokens.dtype == np.uint16
        text = ''.join('<|endoftext|>' + text for text, _ in stored)
        assert encoding.decode(split.tokens.tolist()) == text
    for split, stored in (('train', train), ('val', val)):
        info = dataset.meta[split]
        assert info['documents'] == len(stored) and info['bytes'] == sum(len(text.encode()) for text, _ in stored)
        assert dataset.meta['sha256'][f'{split}.bin'] == hashlib.sha256(
            (data_home / f'data/own/{split}.bin').read_bytes()).hexdigest()


def test_same_seed_same_bytes(data_home, tmp_path):
    shutil.copytree(data_home / 'own', tmp_path / 'own')
    flags = ['--input', 'own', '--vocab_size=400', '--val_fraction=.2']
    subprocess.run([sys.executable, Path(prepare.__file__), *flags], cwd=tmp_path, check=True, capture_output=True)
    names = sorted(path.name for path in (data_home / 'data/own').iterdir())
    assert names == ['meta.json', 'tokenizer.json', 'train.bin', 'train_docs.npz', 'val.bin', 'val_docs.npz']
    for name in names:
        assert (tmp_path / 'data/own' / name).read_bytes() == (data_home / 'data/own' / name).read_bytes(), name
    data_prepare(tmp_path, *flags, '--seed=2')
    assert (tmp_path / 'data/own/train.bin').read_bytes() != (data_home / 'data/own/train.bin').read_bytes()


def test_random_order_keeps_the_documents(data_home, tmp_path):
    shutil.copytree(data_home / 'own', tmp_path / 'own')
    data_prepare(tmp_path, '--input', 'own', '--vocab_size=400', '--val_fraction=.2', '--order=random')
    similar, shuffled = data_read(data_home, 'train'), data_read(tmp_path, 'train')
    assert sorted(similar) == sorted(shuffled) and similar != shuffled
    assert data_read(data_home, 'val') == data_read(tmp_path, 'val')


def data_rewrite(path, **changes):
    meta = json.loads((path / 'meta.json').read_text())
    (path / 'meta.json').write_text(json.dumps({**meta, **changes}))


def data_flip(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


DATA_DAMAGE = {
    'no meta': (lambda p: (p / 'meta.json').unlink(), 'incomplete'),
    'no folder': (lambda p: shutil.rmtree(p), 'no dataset'),
    'half a meta': (lambda p: (p / 'meta.json').write_text('{"format": 1,'), 'damaged'),
    'empty meta': (lambda p: (p / 'meta.json').write_text('{}'), 'damaged'),
    'version': (lambda p: data_rewrite(p, format=2), 'format 2'),
    'no bin': (lambda p: (p / 'val.bin').unlink(), 'incomplete'),
    'truncated': (lambda p: (p / 'train.bin').write_bytes((p / 'train.bin').read_bytes()[:-2]), 'truncated or changed'),
    'flipped': (lambda p: data_flip(p / 'val.bin', 5), 'truncated or changed'),
    'flipped npz': (lambda p: data_flip(p / 'val_docs.npz', -1), 'truncated or changed'),
    'other tokenizer': (lambda p: data_flip(p / 'tokenizer.json', 40), 'truncated or changed'),
    'vocabulary': (lambda p: data_rewrite(p, vocab_size=300), 'outside the vocabulary'),
}


@pytest.mark.parametrize('damage', DATA_DAMAGE)
def test_damaged_data_is_refused(damage, data_home, tmp_path):
    path = shutil.copytree(data_home / 'data/own', tmp_path / 'data/own')
    prepare.load_dataset(path, 32)
    do, message = DATA_DAMAGE[damage]
    do(path)
    with pytest.raises(UserError, match=message) as error:
        prepare.load_dataset(path, 32)
    assert '\n' not in str(error.value) and 'prepare.py' in str(error.value)


def test_block_size_above_the_data_is_refused(data_home):
    path = data_home / 'data/own'
    n = json.loads((path / 'meta.json').read_text())['val']['tokens']
    assert len(prepare.load_dataset(path, n - 1).val.tokens) == n
    with pytest.raises(UserError, match='too few'):
        prepare.load_dataset(path, n)


@pytest.mark.parametrize('failing', range(6))
def test_interrupted_prepare_leaves_old_or_refused(failing, data_home, tmp_path, monkeypatch):
    """Whichever rename a crash hits: the reader sees the old dataset whole, or refuses. Never a mixture."""
    path = shutil.copytree(data_home / 'data/own', tmp_path / 'data/own')
    shutil.copytree(data_home / 'own', tmp_path / 'own')
    old = prepare.load_dataset(path, 32).meta
    replace, calls = os.replace, []

    def crash(source, target):
        calls.append(target)
        if len(calls) > failing:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr('os.replace', crash)
    with pytest.raises(KeyboardInterrupt):
        data_prepare(tmp_path, '--input', 'own', '--vocab_size=300')
    if failing == 0:
        assert prepare.load_dataset(path, 32).meta == old
    else:
        with pytest.raises(UserError):
            prepare.load_dataset(path, 32)
    assert not list(path.glob('*.tmp'))


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_two_processes_that_write_one_file_do_not_meet(tmp_path):
    """As two runs begun side by side on a fresh machine do: both prepare the built-in corpus."""
    path = tmp_path / 'x'
    with atomic_open(path) as f:
        f.write(b'mine')
        pid = os.fork()
        if pid == 0:
            try:
                with atomic_open(path) as g:
                    g.write(b'theirs')
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert path.read_bytes() == b'theirs'
    assert path.read_bytes() == b'mine' and os.listdir(tmp_path) == ['x']


def test_full_disk_leaves_the_old_data(data_home, tmp_path, monkeypatch):
    path = shutil.copytree(data_home / 'data/own', tmp_path / 'data/own')
    shutil.copytree(data_home / 'own', tmp_path / 'own')
    old, calls, fsync = prepare.load_dataset(path, 32).meta, [], os.fsync

    def full(file):
        calls.append(file)
        if len(calls) == 6:
            raise OSError(28, 'No space left on device')
        fsync(file)

    monkeypatch.setattr('os.fsync', full)
    with pytest.raises(UserError, match='No space left'):
        data_prepare(tmp_path, '--input', 'own', '--vocab_size=300')
    assert prepare.load_dataset(path, 32).meta == old and not list(path.glob('*.tmp'))


def test_other_tokenizers_and_large_vocabularies(data_home, tmp_path, monkeypatch):
    """One of tiktoken's with a gap in its ranks, as p50k has, and an id above 16 bits."""
    ranks = {bytes([b]): b for b in range(256)} | {b'he': 257, b'th': 258}
    encoding = prepare.tiktoken.Encoding('gapped', pat_str=prepare.PATTERN, mergeable_ranks=ranks,
                                         special_tokens={'<|endoftext|>': 256, '<|other|>': 70_000})
    monkeypatch.setattr(prepare, 'fetch_encoding', lambda name: encoding)
    shutil.copytree(data_home / 'own', tmp_path / 'own')
    data_prepare(tmp_path, '--input', 'own', '--tokenizer=gapped')
    dataset = prepare.load_dataset(tmp_path / 'data/own', 32)
    assert dataset.meta['vocab_size'] == 70_001 and dataset.val.tokens.dtype == np.uint32
    assert dataset.val.tokens[0] == 256
    text = 'the other <|endoftext|>'
    assert prepare.load_tokenizer(dataset.tokenizer).encode_ordinary(text) == encoding.encode_ordinary(text)


# ----------------------------------------------------------------------------------------------------------------------
# A user's own input.

def test_input_kinds(data_docs, tmp_path, capsys):
    texts = [doc.text for doc in data_docs]
    (tmp_path / 'books/sea/deep').mkdir(parents=True)
    (tmp_path / 'books/.git').mkdir()
    (tmp_path / 'books/.git/config').write_text('hidden')
    for i in range(8):
        (tmp_path / f'books/sea/deep/{i}.md').write_text(texts[i])
        (tmp_path / f'books/{i}.txt').write_text(texts[10 + i])
    (tmp_path / 'books/sea/picture.png').write_bytes(b'\x89PNG\0\xff')
    (tmp_path / 'books/latin.txt').write_bytes('caf\xe9'.encode('latin-1'))
    (tmp_path / 'books/empty.txt').write_text(' \n')
    (tmp_path / 'note.txt').write_bytes(b'\xef\xbb\xbf' + texts[20].replace('\n', '\r\n').encode())
    rows = [{'text': text, 'domain': 'news'} for text in texts[30:36]]
    rows += [{'text': 'in \u2028 line', 'domain': None}, {'text': '<|endoftext|>'}]
    (tmp_path / 'feed.JSONL').write_text('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows) + '\n\n')
    data_prepare(tmp_path, '--dataset=own', '--tokenizer=byte', '--input', 'books', 'note.txt', 'feed.JSONL')
    out = capsys.readouterr().out
    assert '2 binary or unreadable files' in out and 'empty documents' in out
    stored = dict(data_read(tmp_path, 'train') + data_read(tmp_path, 'val'))
    expected = {text: 'sea' for text in texts[:8]} | {text: 'books' for text in texts[10:18]} | {texts[20]: 'note'} | {
        text: 'news' for text in texts[30:36]} | {'in \u2028 line': 'feed', '<|endoftext|>': 'feed'}
    assert set(stored.items()) <= set(expected.items()) and len(stored) >= len(expected) - 3  # without near-duplicates
    assert stored['<|endoftext|>'] == 'feed'


def test_a_lone_text_file_is_cut(data_docs, tmp_path):
    text = '\n\n'.join(doc.text for doc in data_docs[:60])
    (tmp_path / 'own.txt').write_text(text)
    data_prepare(tmp_path, '--input', 'own.txt', '--tokenizer=byte')
    train, val = data_read(tmp_path, 'train'), data_read(tmp_path, 'val')
    assert len(train) > 20 and len(val) >= 1 and sum(len(t) for t, _ in train + val) > .8 * len(text)


def test_a_million_spaces_and_friends(tmp_path):
    data_folder(tmp_path, a__txt='word' + ' ' * 1_000_000 + 'end', b__txt='z' * 300_000, c__txt='plain words here',
                d__txt='!?' * 1000)
    stored = dict(data_read(tmp_path, 'train') + data_read(tmp_path, 'val'))
    assert 'word' + ' ' * 1_000_000 + 'end' in stored and len(stored) == 4
    data_prepare(tmp_path, '--input', 'own', '--vocab_size=300')


DATA_BAD = {
    'missing': (['--input', 'nowhere'], 'does not exist'),
    'empty folder': (['--input', 'void'], 'usable'),
    'one document': (['--input', 'one.txt'], 'usable'),
    'spaces only': (['--input', 'spaces.txt'], 'usable'),
    'binary only': (['--input', 'binary'], 'usable'),
    'bad jsonl': (['--input', 'bad.jsonl'], 'line 2'),
    'all the same': (['--input', 'same.jsonl'], 'nothing is left'),
    'unknown tokenizer': (['--input', 'one.txt', '--tokenizer=gpt22'], 'not known'),
    'small vocabulary': (['--vocab_size=256'], 'vocab_size'),
    'val_fraction': (['--val_fraction=0'], 'val_fraction'),
    'dataset': (['--dataset=a/b'], 'plain name'),
    'parent': (['--dataset=..'], 'plain name'),
}


@pytest.mark.parametrize('bad', DATA_BAD)
def test_bad_input(bad, data_home, tmp_path):
    (tmp_path / 'void').mkdir()
    (tmp_path / 'one.txt').write_text('one document')
    (tmp_path / 'spaces.txt').write_text(' ' * 1_000_000)
    (tmp_path / 'binary').write_bytes(b'\0\1\2')
    (tmp_path / 'bad.jsonl').write_text('{"text": "a"}\n{"txt": 1}\n')
    (tmp_path / 'same.jsonl').write_text('{"text": "same words"}\n' * 5)
    path = shutil.copytree(data_home / 'data/own', tmp_path / 'data/own')
    argv, message = DATA_BAD[bad]
    with pytest.raises(UserError, match=message) as error:
        data_prepare(tmp_path, '--dataset=own', *argv)
    assert '\n' not in str(error.value)
    prepare.load_dataset(path, 32)


def test_exit_codes(tmp_path):
    with pytest.raises(SystemExit, match='2'):
        data_prepare(tmp_path, '--order=best')
    for argv in (['--input', 'nowhere'], ['--nonsense=1']):
        run = subprocess.run([sys.executable, prepare.__file__, *argv], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 2 and run.stdout == '' and 'Traceback' not in run.stderr
        assert len(run.stderr.strip().split('\n')) <= 2 and not list(tmp_path.iterdir())


def test_tiktoken_without_network(tmp_path, monkeypatch):
    """A proxy that refuses and one that never answers; both end in one sentence, and soon."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr('tiktoken.registry.ENCODINGS', {})
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        for listening in (False, True):
            if listening:
                silent.listen()
            for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
                monkeypatch.setenv(name, f'http://127.0.0.1:{silent.getsockname()[1]}')
            began = time.time()
            with pytest.raises(UserError, match='--tokenizer=bpe'):
                prepare.fetch_encoding('gpt2', patience=1)
            assert time.time() - began < 5


# ----------------------------------------------------------------------------------------------------------------------
# train.py and sample.py, on a small real dataset.

TINY = ['--dataset=own', '--block_size=64', '--segment_len=16', '--n_embd=32', '--n_head=2', '--n_experts=4',
        '--batch_size=4', '--max_iters=30', '--eval_interval=10', '--eval_windows=3', '--log_interval=5',
        '--dense_warmup=.5', '--dtype=float32', '--device=cpu']


@pytest.fixture(scope='session')
def run_home(data_home):
    """data_home with a finished run of TINY in `whole`."""
    run_script(train, data_home, *TINY, '--out_dir=whole')
    return data_home


def run_script(script, home, *argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return script.main(list(argv))


def test_windows_tile_the_stream_once_an_epoch():
    n, L = 1000, 64
    for epoch in range(3):
        starts = train.window_starts(n, L, 5, epoch)
        covered = np.concatenate([np.arange(s, s + L) for s in starts])
        assert len(set(covered)) == len(covered) and covered.min() >= 0 and covered.max() < n - 1 and len(starts) == 14
        assert starts.tolist() != sorted(starts), 'not shuffled'
    orders = [train.window_starts(n, L, seed, epoch).tolist() for seed in (5, 6) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert train.window_starts(L + 1, L, 0, 0).tolist() == [0]       # the shortest stream there may be
    tokens = np.arange(n)
    together = train.get_batch(tokens, 10, 8, L, 5, 'cpu')
    parts = [train.get_batch(tokens, first, 4, L, 5, 'cpu') for first in (10, 14)]
    assert torch.equal(together[0], torch.cat([p[0] for p in parts])) and torch.equal(together[1], together[0] + 1)


def test_validation_is_each_domains_own_text_and_its_sums_are_right(run_home):
    """evaluate() against one window at a time and bytes counted from the decoded text."""
    data = prepare.load_dataset(run_home / 'data/own', 64)
    tokenizer = prepare.load_tokenizer(data.tokenizer)
    windows = train.validation_windows(data.val, 2, 64)
    model, _ = load_checkpoint(run_home / 'whole/ckpt.pt')
    size = torch.tensor([len(base64.b64decode(t)) for t in data.tokenizer['tokens']] + [0])
    args = types.SimpleNamespace(batch_size=3, gradient_accumulation_steps=1, segment_len=16)
    sums, routing = train.evaluate(model, windows, size, args, 'cpu', nullcontext())
    for d in range(2):
        inside = np.repeat(data.val.domain, np.diff(data.val.start)) == d
        stream = np.asarray(data.val.tokens)[inside].astype(np.int64)
        assert len(windows[d]) == (len(stream) - 1) // 64
        nats, n, n_bytes, late, mean = 0.0, 0, 0, 0.0, 0
        for w in range(len(windows[d])):
            window = torch.from_numpy(stream[w * 64:w * 64 + 65])
            assert window.tolist() == windows[d][w].tolist()
            logits, _, e = model(window[None, :-1], return_routing=True)
            mean = mean + e[0, :, 1:].mean(1) / len(windows[d])
            logp = logits[0].double().log_softmax(-1)
            for t, target in enumerate(window[1:].tolist()):
                if target != tokenizer.eot_token:
                    nats, n = nats - logp[t, target].item(), n + 1
                    n_bytes += len(tokenizer.decode_single_token_bytes(target))
                    late -= logp[t, target].item() if t >= 16 else 0
        assert sums[d, 0].tolist() == pytest.approx([nats, n, n_bytes], rel=1e-5)
        assert sums[d, 1, 0].item() == pytest.approx(late, rel=1e-5)
        torch.testing.assert_close(routing[d], mean)


def test_a_tiny_run_learns_and_leaves_what_it_should(run_home):
    rows = list(csv.DictReader(open(run_home / 'whole/log.csv')))
    val = [float(r['val_bpb']) for r in rows if r['val_bpb']]
    assert len(val) == 4 and val[-1] < val[0] - 0.5
    assert sorted(os.listdir(run_home / 'whole')) == ['.lock', 'best.pt', 'ckpt.pt', 'experts.png', 'log.csv', 'loss.png']
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    assert model.config.n_experts == 4 and ckpt['step'] == 30


@pytest.fixture(autouse=True)
def own_signals():
    """train.main takes these for itself; give them back to pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def same_run(a, b):
    """Two finished out_dirs, bit for bit but for what a clock wrote."""
    (model, ckpt), (model2, ckpt2) = load_checkpoint(a / 'ckpt.pt'), load_checkpoint(b / 'ckpt.pt')
    for (name, p), q in zip(model.named_parameters(), model2.parameters()):
        assert torch.equal(p, q), name
    for p, q in zip(ckpt['optimizer']['state'].values(), ckpt2['optimizer']['state'].values()):
        assert p.keys() == q.keys() and all(torch.equal(p[k], q[k]) for k in p)
    rows, rows2 = ([{k: v for k, v in row.items() if k not in ('ms', 'tok_s')} for row in c['rows']] for c in (ckpt, ckpt2))
    assert rows == rows2
    for out in (a, b):
        with open(out / 'log.csv') as f:
            assert len(list(csv.DictReader(f))) == len(rows)
    for picture in ('loss.png', 'experts.png'):
        assert (a / picture).read_bytes() == (b / picture).read_bytes()
    best, best2 = (load_checkpoint(out / 'best.pt')[1] for out in (a, b))
    assert best['step'] == best2['step'] and all(torch.equal(best['model'][k], best2['model'][k]) for k in best['model'])


class Killed(BaseException):
    pass


# Saved dense at 10; upcycled at 15; saved at 20. Killed in a step before and after upcycling; in the midst of writing
# best.pt, ckpt.pt and a picture; in validation. Asked to stop by Ctrl-C on either side of upcycling.
@pytest.mark.parametrize('where, call', [('get_batch', 14), ('get_batch', 22), ('write best.pt', 3), ('write ckpt.pt', 3),
                                         ('write experts.png', 3), ('evaluate', 3), ('Ctrl-C', 13), ('Ctrl-C', 20)])
def test_a_run_killed_anywhere_and_resumed_equals_one_that_was_not(run_home, monkeypatch, where, call):
    out, seen = f'stopped-{where}-{call}'.replace(' ', '-'), []
    target = {'get_batch': 'get_batch', 'evaluate': 'evaluate', 'Ctrl-C': 'get_batch'}.get(where)

    def reached():
        seen.append(1)
        if len(seen) == call:
            if where != 'Ctrl-C':
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as m:
        if target:
            real = getattr(train, target)
            m.setattr(train, target, lambda *a: reached() or real(*a))
        else:
            fsync = os.fsync                                         # the file is written, but not yet in its place

            def half(fd):
                if f'/{where.split()[1]}.' in os.readlink(f'/proc/self/fd/{fd}'):
                    reached()
                fsync(fd)
            m.setattr(os, 'fsync', half)
        if where == 'Ctrl-C':
            assert run_script(train, run_home, *TINY, f'--out_dir={out}') == 130
        else:
            with pytest.raises(Killed):
                run_script(train, run_home, *TINY, f'--out_dir={out}')
    assert len(seen) >= call
    _, ckpt = load_checkpoint(run_home / out / 'ckpt.pt')
    assert ckpt['step'] == (call - 1 if where == 'Ctrl-C' else 20 if call == 22 else 10 if where != 'get_batch' or call == 14 else 0)
    torch.randn(7)                                                   # disturb the random state of this process
    run_script(train, run_home, '--init_from=resume', f'--out_dir={out}')
    same_run(run_home / 'whole', run_home / out)


@pytest.mark.parametrize('rule, judged', [('prior', 0), ('self', 1)])
def test_best_is_the_best_validation(run_home, monkeypatch, rule, judged):
    """ckpt.pt is the latest, best.pt the best, also of what stood before a resumption; under the paper's rule, where
    segment 1 sees ahead, the best after segment 1."""
    real, seen, out = train.evaluate, [], f'--out_dir=best-{rule}'

    def evaluate(*a):
        seen.append(1)
        sums, routing = real(*a)
        sums[:, judged, 0] *= {2: 0.5, 4: 0.6}.get(len(seen), 1.0)
        return sums, routing
    monkeypatch.setattr(train, 'evaluate', evaluate)

    def steps():
        return [load_checkpoint(run_home / f'best-{rule}/{name}.pt')[1]['step'] for name in ('best', 'ckpt')]
    run_script(train, run_home, *TINY, out, '--max_iters=25', f'--first_segment={rule}')
    assert steps() == [10, 25]
    run_script(train, run_home, out, '--init_from=resume', '--max_iters=30')
    assert len(seen) == 5 and steps() == [10, 30]
    os.remove(run_home / f'best-{rule}/ckpt.pt')                     # lost: nothing overwrites the run, best.pt takes it up
    with pytest.raises(UserError, match='resume'):
        run_script(train, run_home, *TINY, out)
    run_script(train, run_home, out, '--init_from=resume', '--max_iters=12')
    assert steps()[1] == 12


def test_best_where_no_segment_follows_the_first(run_home):
    """Validation windows of 64 tokens, segments of 64: `self` cannot be judged after segment 1, so it is by all positions."""
    run_script(train, run_home, *TINY, '--out_dir=single', '--first_segment=self', '--segment_len=64', '--max_iters=10')
    rows = load_checkpoint(run_home / 'single/best.pt')[1]['rows']
    assert all(math.isnan(row['later_bpb']) and row['val_bpb'] > 0 for row in rows if 'val_bpb' in row) and len(rows) == 4


def test_resume_takes_new_settings_of_the_optimizer(run_home, tmp_path):
    shutil.copytree(run_home / 'whole', tmp_path / 'whole')
    os.symlink(run_home / 'data', tmp_path / 'data')
    run_script(train, tmp_path, '--init_from=resume', '--out_dir=whole', '--max_iters=31', '--beta1=.5', '--weight_decay=.3')
    matrices, vectors = load_checkpoint(tmp_path / 'whole/ckpt.pt')[1]['optimizer']['param_groups']
    assert matrices['betas'] == vectors['betas'] == (0.5, 0.95)
    assert (matrices['weight_decay'], vectors['weight_decay']) == (0.3, 0.0)


def test_a_closed_pipe_does_not_stop_a_run(run_home):
    """As in `python train.py | head`, with the terminal closed after that, and Ctrl-C."""
    run = subprocess.Popen([sys.executable, f'{HERE}/train.py', *TINY, '--out_dir=pipe', '--max_iters=100000',
                            '--eval_interval=50000'], cwd=run_home, stdout=-1, stderr=-1, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    while not run.stdout.readline().startswith(b'step      5'):
        assert run.poll() is None
    run.stdout.close()
    time.sleep(0.5)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
        run.send_signal(number)
    assert run.wait() == 130 and run.stderr.read() == b''
    assert load_checkpoint(run_home / 'pipe/ckpt.pt')[1]['step'] > 5


def test_two_runs_do_not_share_a_folder(run_home):
    held = subprocess.Popen([sys.executable, '-c', 'import sys, train; lock = train.claim(sys.argv[1]); print(1, flush=True); '
                             'sys.stdin.read()', str(run_home / 'whole')], cwd=HERE, stdin=-1, stdout=-1)
    assert held.stdout.readline()
    try:
        with pytest.raises(UserError, match='another run'):
            run_script(train, run_home, '--init_from=resume', '--out_dir=whole', '--max_iters=31')
    finally:
        held.communicate(b'')                                        # it ends, and so does its claim
    half = run_home / 'whole/ckpt.pt.12ab.tmp'                       # what a killed run leaves goes with the next one's claim
    half.touch()
    train.claim(str(run_home / 'whole')).close()
    assert not half.exists()


def test_training_goes_on_from_a_dense_expert_and_can_upcycle_it(run_home):
    """A specialized model is trained on, as it is or as the seed of experts; other shapes are refused."""
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    fresh, dense = ckpt['rows'][0]['val_bpb'], model.specialize(torch.arange(9)[None])
    save_checkpoint(run_home / 'expert.pt', dense.config, dense.state_dict(), tokenizer=ckpt['tokenizer'])
    flags = [f for f in TINY if not f.startswith(('--n_', '--block', '--segment', '--dense'))] + ['--init_from=expert.pt']
    for n_experts in (1, 4):
        out = f'onward{n_experts}'
        run_script(train, run_home, *flags, f'--out_dir={out}', f'--n_experts={n_experts}', '--dense_warmup=0')
        again, ckpt = load_checkpoint(run_home / out / 'ckpt.pt')
        assert again.config == replace(model.config, n_experts=n_experts)
        val = [row['val_bpb'] for row in ckpt['rows'] if 'val_bpb' in row]
        assert val[-1] < val[0] < fresh - 0.5                        # it did not start from scratch
    with pytest.raises(UserError, match='shape'):
        run_script(train, run_home, *flags, '--out_dir=onward', '--n_layer=3')
    with pytest.raises(UserError, match='without a run'):
        os.makedirs(run_home / 'bare')
        shutil.copy(run_home / 'expert.pt', run_home / 'bare/ckpt.pt')
        run_script(train, run_home, '--init_from=resume', '--out_dir=bare')


def test_resume_refuses_what_cannot_change_and_other_data(run_home, tmp_path):
    for flag in ('--n_layer=3', '--n_experts=2', '--dataset=else', '--batch_size=8', '--seed=1', '--max_iters=20', '--eval_windows=1'):
        with pytest.raises(UserError, match=flag[2:].split('=')[0]):
            run_script(train, run_home, '--init_from=resume', '--out_dir=whole', flag)
    with pytest.raises(UserError, match='resume'):
        run_script(train, run_home, *TINY, '--out_dir=whole')        # would overwrite a finished run
    shutil.copytree(run_home / 'whole', tmp_path / 'whole')
    shutil.copytree(run_home / 'own', tmp_path / 'own')
    run_script(prepare, tmp_path, '--input', 'own', '--vocab_size=401')
    with pytest.raises(UserError, match='trained on'):
        run_script(train, tmp_path, '--init_from=resume', '--out_dir=whole', '--max_iters=40')


def torchrun(home, *flags):
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', *flags],
                            cwd=home, stdout=-1, stderr=-1, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def near(a, b):
    """Two runs to float32's tolerance: every figure of the log, every weight."""
    (model, ckpt), (model2, ckpt2) = load_checkpoint(a / 'ckpt.pt'), load_checkpoint(b / 'ckpt.pt')
    assert model.config == model2.config and len(ckpt['rows']) == len(ckpt2['rows'])
    for row, row2 in zip(ckpt['rows'], ckpt2['rows']):
        assert row.keys() == row2.keys()
        for name in row.keys() - {'ms', 'tok_s'}:
            assert row[name] == pytest.approx(row2[name], rel=1e-4), name
    for (name, p), q in zip(model.named_parameters(), model2.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


RANKS = [*TINY, '--max_iters=8', '--dense_warmup=.4', '--log_interval=1', '--eval_interval=4']


@pytest.mark.parametrize('how', [['--gradient_accumulation_steps=2'], ['--shard=True']])
def test_two_ranks_equal_one_step_by_step(run_home, how):
    """Two gloo processes with dense warm-up and upcycling, DDP with accumulation or sharded, against one process; and
    what either has saved is taken up by the other."""
    one, two = f'one-{how[0][2:7]}', f'two-{how[0][2:7]}'
    started = torchrun(run_home, f'{HERE}/train.py', *RANKS, *how, f'--out_dir={two}')
    run_script(train, run_home, *RANKS, f'--out_dir={one}')
    assert started.wait() == 0, started.stderr.read()
    assert 'step      3 | the dense FFN becomes 4 experts' in started.stdout.read()
    assert load_checkpoint(run_home / one / 'ckpt.pt')[0].config.n_experts == 4
    near(run_home / one, run_home / two)
    shutil.copytree(run_home / one, run_home / f'{one}-on-two')
    longer = ['--init_from=resume', '--max_iters=12']
    started = torchrun(run_home, f'{HERE}/train.py', *longer, *how, f'--out_dir={one}-on-two')
    run_script(train, run_home, *longer, '--shard=False', '--gradient_accumulation_steps=1', f'--out_dir={two}')
    assert started.wait() == 0, started.stderr.read()
    run_script(train, run_home, *longer, f'--out_dir={one}')
    near(run_home / one, run_home / two)
    near(run_home / one, run_home / f'{one}-on-two')


def test_expert_wise_parallelism_equals_the_single_process(tmp_path):
    """Sec. 6, on two ranks with routing far from uniform: loss, and the gradient of every parameter."""
    started = torchrun(tmp_path, f'{HERE}/experiments/expert_parallel.py', '--quick')
    out, errors = started.communicate()
    assert started.returncode == 0, errors
    n_experts, params, on_a_rank, loss_off, gradients_off, *_ = out.splitlines()[-1].split()
    assert float(loss_off) < 1e-6 and float(gradients_off) < 1e-5
    assert int(on_a_rank.replace(',', '')) < 0.75 * int(params.replace(',', ''))


def test_a_text_of_one_token_and_a_short_domain_train(tmp_path):
    """Windows that hold one token alone, and a domain whose validation text is shorter than a window."""
    rng = random.Random(0)
    for name, n, tail in (('same', 12, 'a' * 20_000), ('short', 4, '')):
        (tmp_path / 'own' / name).mkdir(parents=True)
        for i in range(n):                                           # words of its own, or it would be a twin
            words = ' '.join(''.join(rng.choices('bcdefghi', k=6)) for _ in range(20))
            (tmp_path / 'own' / name / f'{i}.txt').write_text(words + tail)
    run_script(prepare, tmp_path, '--input', 'own', '--tokenizer=byte', '--val_fraction=.2')
    run_script(train, tmp_path, *TINY, '--out_dir=out', '--max_iters=10', '--block_size=256')
    _, ckpt = load_checkpoint(tmp_path / 'out/ckpt.pt')
    assert ckpt['rows'][-1]['bpb_same'] < ckpt['rows'][0]['bpb_same'] - 1 and math.isfinite(ckpt['rows'][-1]['bpb_short'])


def test_a_rank_that_dies_ends_the_others(run_home):
    started = torchrun(run_home, f'{HERE}/train.py', *TINY, '--max_iters=100000', '--eval_interval=50000', '--out_dir=dies')
    while not started.stdout.readline().startswith('step      5'):   # it trains
        assert started.poll() is None
    children = (Path(f'/proc/{started.pid}/task/{started.pid}/children').read_text().split())
    began = time.time()
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = started.communicate(timeout=60)
    assert time.time() - began < 60 and started.returncode != 0
    assert 'another process of this run has died' in errors
    assert load_checkpoint(run_home / 'dies/ckpt.pt')[1]['step'] == 0


@pytest.mark.parametrize('flags, word', [(['--segment_len=65'], 'segment_len'), (['--segment_len=0'], 'segment_len'),
                                         (['--n_experts=0'], 'n_experts'), (['--block_size=9999999'], 'block_size'),
                                         (['--log_interval=0'], 'log_interval'), (['--seed=-1'], 'seed'),
                                         (['--learning_rate=nan'], 'learning_rate'), (['--beta1=1'], 'beta1'),
                                         (['--device=gpu'], 'device'), (['--shard=True'], 'torchrun'), (['--init_from=resum'], 'no checkpoint'),
                                         (['--batch_size=3', '--gradient_accumulation_steps=2'], 'batch_size'),
                                         (['--init_from=resume'], 'no checkpoint'), (['--dataset=none'], 'prepare.py'),
                                         (['--init_from=whole/ckpt.pt', '--preset=0.3b'], 'preset')])
def test_train_refuses_bad_values(run_home, flags, word):
    with pytest.raises(UserError, match=word):
        run_script(train, run_home, *TINY, '--out_dir=bad', *flags)
    assert not {f.name for f in (run_home / 'bad').glob('*')} - {'.lock'}


def test_a_loss_that_is_not_finite_stops_the_run(run_home, monkeypatch):
    forward = Lory.forward

    def wild(self, idx, targets=None, **kw):                         # training, not validation, goes wrong at some step
        logits, loss, *e = forward(self, idx, targets, **kw)
        return logits, loss if loss is None or torch.is_grad_enabled() and idx[0, 0] % 5 else loss / 0, *e
    monkeypatch.setattr(Lory, 'forward', wild)
    with pytest.raises(UserError, match='learning_rate'):
        run_script(train, run_home, *TINY, '--out_dir=wild')
    model, ckpt = load_checkpoint(run_home / 'wild/ckpt.pt')
    assert ckpt['step'] < 30 and all(p.isfinite().all() for p in model.parameters())


def test_sample_streams_what_generate_makes_and_stops(run_home, capsys):
    def sampled(*flags):
        run_script(sample_script, run_home, '--out_dir=whole', '--device=cpu', *flags)
        return capsys.readouterr().out
    greedy = sampled('--start=The value', '--temperature=0', '--max_new_tokens=40')
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    tokenizer = prepare.load_tokenizer(ckpt['tokenizer'])
    prompt = torch.tensor([[tokenizer.eot_token] + tokenizer.encode_ordinary('The value')])
    new = model.generate(prompt, 40, temperature=0)[0].tolist()
    new = new[:new.index(tokenizer.eot_token)] if tokenizer.eot_token in new else new
    text = tokenizer.decode(new)
    assert greedy == f'The value{text}\n'
    stop = text[len(text) // 2:len(text) // 2 + 3]
    assert sampled('--start=The value', '--temperature=0', '--max_new_tokens=40', f'--stop={stop}') == \
        f'The value{text[:text.index(stop)]}\n'
    drawn = [sampled(f'--seed={s}', '--num_samples=2', '--top_k=50', '--top_p=.95') for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    (run_home / 'prompt.txt').write_text('Füße 漢字', encoding='utf-8')
    assert sampled('--start=FILE:prompt.txt', '--max_new_tokens=3').startswith('Füße 漢字')

    out = sampled('--start=The value', '--show_routing', '--routing_picture=e.png', '--save_dense=dense.pt',
                  '--temperature=0', '--max_new_tokens=40')
    assert (run_home / 'e.png').read_bytes().startswith(b'\x89PNG')
    assert out.count('layer') == 2 and out.endswith(f'The value{text}\n')
    assert sampled('--checkpoint=dense.pt', '--start=The value', '--temperature=0', '--max_new_tokens=40') == greedy


def test_sample_ends_at_the_end_of_a_document(run_home, capsys, monkeypatch):
    tokenizer = prepare.load_tokenizer(load_checkpoint(run_home / 'whole/ckpt.pt')[1]['tokenizer'])
    half = 'é'.encode()[0]                                           # and half a character before it is shown as such
    tokens = [*tokenizer.encode_ordinary(' end'), tokenizer.encode_single_token(bytes([half])), tokenizer.eot_token, 65]
    monkeypatch.setattr(Lory, 'stream', lambda *a, **kw: iter([torch.tensor([t]) for t in tokens]))
    run_script(sample_script, run_home, '--out_dir=whole', '--start=The', '--device=cpu')
    assert capsys.readouterr().out == 'The end\N{REPLACEMENT CHARACTER}\n'


@pytest.mark.parametrize('flags, word', [(['--out_dir=nowhere'], 'checkpoint'), (['--temperature=-1'], 'temperature'),
                                         (['--temperature=nan'], 'temperature'), (['--device=foo'], 'device'),
                                         (['--start=FILE:empty.txt'], 'empty'),
                                         (['--top_k=100000'], 'top_k'), (['--top_p=0'], 'top_p'), (['--start='], 'prompt'),
                                         (['--start=' + 'word ' * 100], 'block_size'), (['--start=FILE:none'], 'none'),
                                         (['--start=FILE:data/own/train.bin'], 'UTF-8'), (['--start=\udcff'], 'UTF-8'),
                                         (['--max_new_tokens=0'], 'max_new_tokens'),
                                         (['--save_dense=whole/ckpt.pt'], 'exists'), (['--routing_picture=whole/best.pt'], 'png'),
                                         (['--checkpoint=bare.pt'], 'tokenizer')])
def test_sample_refuses_bad_values(run_home, flags, word):
    (run_home / 'empty.txt').write_text('')
    save_checkpoint(run_home / 'bare.pt', small(), Lory(small()).state_dict())
    with pytest.raises(UserError, match=word):
        run_script(sample_script, run_home, '--out_dir=whole', *flags)


def test_the_scripts_from_the_shell(data_home):
    """prepare, train, sample as a user starts them; a mistake is one sentence on stderr and exit code 2."""
    def shell(script, *flags):
        return subprocess.run([sys.executable, f'{HERE}/{script}', *flags], cwd=data_home, capture_output=True, text=True,
                              env={**os.environ, 'OMP_NUM_THREADS': '1'})
    trained = shell('train.py', *TINY, '--out_dir=shell', '--max_iters=4')
    assert trained.returncode == 0 and trained.stderr == '' and 'done' in trained.stdout
    sampled = shell('sample.py', '--out_dir=shell', '--max_new_tokens=5')
    assert sampled.returncode == 0 and 'tokens/s' in sampled.stderr
    for script, flag in [('train.py', '--n_experts=0'), ('train.py', '--no_such_flag=1'), ('train.py', '--compile=maybe'),
                         ('sample.py', '--out_dir=nowhere'), ('prepare.py', '--input=nowhere')]:
        failed = shell(script, flag)
        assert failed.returncode == 2 and 'Traceback' not in failed.stderr
        assert len([line for line in failed.stderr.splitlines() if not line.startswith('usage:')]) == 1


def test_the_figures_in_the_readmes_are_those_of_the_runs(capsys, monkeypatch):
    """Each "mean (lowest to highest)" of perplexity and bits per byte is one that claims.py prints from runs.csv, and each row
    of the two tables in README.md stands there as a whole."""
    monkeypatch.syspath_prepend(f'{HERE}/experiments')
    import claims
    claims.report(claims.table())
    printed = capsys.readouterr().out
    readme = Path(HERE, 'README.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| (?:dense|\d+ experts), .*? \| (.*) \|$', readme, re.MULTILINE)
    assert len(rows) == 8 and [row for row in rows if row not in printed] == []
    text = readme + Path(HERE, 'experiments/README.md').read_text(encoding='utf-8')
    figures = re.findall(r'(?:[-+][\d.]+%|1\.\d{3}|\d\d\.\d\d) \([-+\d.]+ to [-+\d.]+\)', text)
    assert len(figures) > 50 and [figure for figure in figures if figure not in printed] == []
