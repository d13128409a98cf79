"""
The tests of experiments/: its layers against plain loops, its parallelism against one process, its tables
against its READMEs.

    python -m pytest -q experiments/test_experiments.py
"""
import importlib
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]
import claims
from lory import Lory, LoryConfig, UserError, load_checkpoint, save_checkpoint
from reroute import ReroutedFFN
from short_first import ShortFirstFFN

torch.set_num_threads(1)


def small(**changes):
    return LoryConfig(**dict(dict(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16, ffn_hidden=24,
                                  n_experts=4, segment_len=6), **changes))


def sharp(module, scale=4.0):
    """Draw all weights anew: experts differ, routing is far from uniform, no effect is too small to see."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if 'norm' not in name:
                p.normal_(std=scale if 'router.weight' in name else 0.3)
    return module.double()


def expert(ffn, i, h):
    """Expert i on one token. (D,) -> (D,)"""
    return (F.silu(h @ ffn.gate[i]) * (h @ ffn.up[i])) @ ffn.down[i]


def moved(model, idx, b, t):
    """Change token t of sequence b. -> where the logits moved, (B, L)"""
    other = idx.clone()
    other[b, t] = (other[b, t] + 1) % 50
    return (model(idx)[0] - model(other)[0]).abs().amax(-1) > 1e-9


def test_every_script_finds_what_it_takes_from_the_others():
    """Names that are imported, and attributes of prepare and train."""
    modules = {name: importlib.import_module(name) for name in ('prepare', 'train')}
    for path in Path(HERE).glob('*.py'):
        if not path.name.startswith(('test_', 'card')):  # these run as tests
            importlib.import_module(path.stem)
        for module, name in re.findall(r"(?<![\w/.'])(prepare|train)\.(\w+)", path.read_text()):
            assert name == 'py' or hasattr(modules[module], name), f'{path.name}: {module}.{name}'


@pytest.mark.parametrize('how', [{}, dict(first_segment='self'), dict(routing='prefix')])
def test_rerouted_decoding_computes_what_the_full_pass_does(how, monkeypatch):
    """At every position, after prompts of every length modulo T = 6. Past block_size = 12 the full pass has a
    sliding-window mask, and segments are still counted from token 0."""
    model = sharp(Lory(small(block_size=12, **how), ffn=ReroutedFFN))
    idx, near = torch.randint(50, (2, 40)), torch.ones(40, 40).tril().triu(-11).bool()
    attend = F.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, is_causal: attend(q, k, v, near))
        full = model(idx)[0]
    for L in range(6 if 'first_segment' in how else 1, 13):  # `self` needs the whole of segment 1
        logits, _, caches = model.prefill(idx[:, :L])
        for t in range(L, 40):
            torch.testing.assert_close(logits, full[:, t - 1])
            logits = model.decode(idx[:, t], caches)
        torch.testing.assert_close(logits, full[:, -1])


@pytest.mark.parametrize('L', [24, 21, 3, 2])
def test_short_first_equals_a_loop_over_tokens(L):
    """T = 16, so segment 1 has 2 tokens. The mean of each segment routes the next."""
    ffn = sharp(ShortFirstFFN(small(segment_len=16)), scale=2.0)
    x = torch.randn(2, L, 16, dtype=torch.float64)
    starts, y = [0, 2, 18, L], ffn(x)[0]
    for b in range(2):
        for k in range(3):
            logits = ffn.router.bias
            if k:
                logits = logits + x[b, starts[k - 1]:starts[k]].mean(0) @ ffn.router.weight.T
            e = logits.softmax(0)
            gate, up, down = (torch.einsum('e,eio->io', e, w) for w in (ffn.gate, ffn.up, ffn.down))
            for t in range(starts[k], min(starts[k + 1], L)):
                torch.testing.assert_close(y[b, t], (F.silu(x[b, t] @ gate) * (x[b, t] @ up)) @ down)


@pytest.mark.parametrize('L', [24, 21])
def test_short_first_is_causal_at_every_position(L):
    model = sharp(Lory(small(segment_len=16), ffn=ShortFirstFFN))
    idx = torch.randint(50, (3, L))
    for t in range(L):
        where = moved(model, idx, 1, t)
        assert not where[0].any() and not where[2].any() and not where[1, :t].any() and where[1, t:].all()


def test_a_checkpoint_of_another_layer_loads_with_build_and_only_then(tmp_path):
    model, idx = Lory(small(), ffn=ShortFirstFFN).eval(), torch.randint(50, (2, 24))
    save_checkpoint(tmp_path / 'ckpt.pt', model, None, step=3)
    again, ckpt = load_checkpoint(tmp_path / 'ckpt.pt', build=partial(Lory, ffn=ShortFirstFFN))
    assert torch.equal(model(idx)[0], again(idx)[0]) and ckpt['step'] == 3
    with pytest.raises(UserError, match='ShortFirstFFN') as refusal:
        load_checkpoint(tmp_path / 'ckpt.pt')
    assert '\n' not in str(refusal.value)


def test_expert_wise_parallelism_equals_the_single_process(tmp_path):
    """Sec. 6, on two ranks with routing far from uniform: loss, and the gradient of every parameter."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone',
               f'{HERE}/expert_parallel.py', '--quick']
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                           env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert ended.returncode == 0, ended.stderr
    _, params, on_a_rank, loss_off, gradients_off, *_ = ended.stdout.splitlines()[-1].split()
    assert float(loss_off) < 1e-6 and float(gradients_off) < 1e-5
    assert int(on_a_rank.replace(',', '')) < 0.75 * int(params.replace(',', ''))


def test_the_figures_in_the_readmes_are_those_of_the_runs(capsys):
    """Each "mean (lowest to highest)" of perplexity and bits per byte is one that claims.py prints from
    its result files, and each row of the two tables of perplexity stands there as a whole, and once."""
    for name in ('runs.csv', 'runs-c0966a5.csv'):
        claims.report(claims.table(name))
    claims.report_time(claims.table())
    printed = capsys.readouterr().out
    ours = Path(HERE, 'README.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| (?:dense|\d+ experts), .*? \| (.*%.*|.*\d\d\.\d\d .*) \|$', ours, re.MULTILINE)
    assert len(set(rows)) == len(rows) == 8 and [row for row in rows if row not in printed] == []
    text = ours + Path(ROOT, 'README.md').read_text(encoding='utf-8')
    figures = re.findall(r'(?:[-+][\d.]+%|1\.\d{3}|\d\d\.\d\d) \([-+\d.]+ to [-+\d.]+\)', text)
    assert len(figures) > 50 and [figure for figure in figures if figure not in printed] == []
