"""
The tests of token_moe.py: each layer against a plain loop over tokens, and runs through its main().

    python -m pytest -q experiments/test_token_moe.py
"""
import os
import shutil
import signal
import sys
from collections import Counter
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]
import prepare
import sample
import token_moe
import train
from lory import Lory, UserError, load_checkpoint, save_checkpoint
from test_experiments import expert, moved, sharp, small
from token_moe import ApartLory, BalancedLory, ExpertChoiceFFN, MixtralFFN, SwitchFFN

TOKEN_CHOICE = pytest.mark.parametrize('layer', [SwitchFFN, MixtralFFN])


# --- Experts choose tokens. ---

@pytest.mark.parametrize('training', [True, False])
def test_expert_choice_equals_a_loop_over_tokens(training):
    """In training each expert takes its 5 best tokens of 20, in evaluation each token its best expert.
    Outputs and all gradients."""
    ffn = sharp(ExpertChoiceFFN(small()), scale=1.0).train(training)
    x = torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)
    share = (x @ ffn.router.weight.T + ffn.router.bias).softmax(-1)  # (2, 20, 4)
    rows = [[torch.zeros(16, dtype=torch.float64) for _ in range(20)] for _ in range(2)]
    for b in range(2):
        for i in range(4):
            best = share[b, :, i].argsort(descending=True)[:5]
            if not training:
                best = (share[b].argmax(-1) == i).nonzero()[:, 0]
            for t in best.tolist():
                rows[b][t] = rows[b][t] + share[b, t, i] * expert(ffn, i, x[b, t])
    naive = torch.stack([torch.stack(row) for row in rows])
    y, e = ffn(x)
    assert_close(y, naive)
    assert_close(e, share.mean(1, keepdim=True))
    probe = torch.randn_like(y)
    assert_close(*(torch.autograd.grad((out * probe).sum(), [x, *ffn.parameters()]) for out in (y, naive)))


def test_expert_choice_is_causal_in_evaluation_and_the_probe_sees_that_it_is_not_in_training():
    model, idx = sharp(Lory(small(), ffn=ExpertChoiceFFN)), torch.randint(50, (3, 24))

    def leaks():
        return any(moved(model, idx, 1, t)[1, :t].any() for t in range(1, 24))
    assert leaks()
    model.eval()
    assert not leaks()


# --- Tokens choose experts. ---

def naive_token_choice(ffn, x):
    """Hidden states x (B, L, D) -> output (B, L, D), auxiliary loss, load (B, 1, E)"""
    K, E, H = ffn.K, *ffn.down.shape[:2]
    rows, probabilities, z, chosen = [], [], [], []
    for h in x.flatten(0, 1):  # (D,), token by token
        logits = ffn.router.weight @ h + ffn.router.bias  # (K * E,)
        p = logits.exp() / logits.exp().sum()
        best = sorted(range(K * E), key=lambda i: -logits[i])[:K]
        total = 1 if K == 1 else sum(p[i] for i in best)  # Switch weights by the probability itself
        y = 0
        for i in best:
            part, stacked = divmod(i, E)
            own = slice(part * H // K, (part + 1) * H // K)  # this expert's share of the stacked one's H
            gate, up, down = ffn.gate[stacked][:, own], ffn.up[stacked][:, own], ffn.down[stacked][own]
            y = y + p[i] / total * (F.silu(h @ gate) * (h @ up)) @ down
        rows.append(y)
        probabilities.append(p)
        z.append(logits.exp().sum().log() ** 2)
        chosen.append(best)
    n, f, load = len(rows), Counter(sum(chosen, [])), torch.zeros(len(x), 1, E)
    balance = K * E * sum(f[i] / (n * K) * sum(p[i] for p in probabilities) / n for i in range(K * E))
    for t, best in enumerate(chosen):
        for i in best:
            load[t // x.shape[1], 0, i % E] += 1 / (K * x.shape[1])
    return torch.stack(rows).view_as(x), 0.01 * balance + 0.001 * sum(z) / n, load


@pytest.mark.parametrize('bias', [None, 60.0, -60.0])
@TOKEN_CHOICE
def test_token_choice_equals_a_loop_over_tokens(layer, bias):
    """Output, load, both losses and all gradients. `bias` sends all tokens to one expert, or none."""
    ffn = sharp(layer(small()), scale=1.0)
    ffn.down.data[1] = ffn.down.data[0]  # two equal experts are no dense warm-up: all have to be
    if bias:
        ffn.router.bias.data[1] = bias
    x, probe = torch.randn(2, 2, 15, 16, dtype=torch.float64)
    inputs, y, load = [x.requires_grad_(), *ffn.parameters()], *ffn(x)
    naive, aux, naive_load = naive_token_choice(ffn, x)
    assert_close(y, naive, rtol=1e-9, atol=1e-12)
    assert_close([ffn.aux_loss, load], [aux, naive_load], check_dtype=False, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
                    for loss in ((y * probe).sum() + ffn.aux_loss, (naive * probe).sum() + aux))
    assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    if layer is SwitchFFN and bias:
        assert (load > 0).any(0)[0].tolist() == [(i == 1) == (bias > 0) for i in range(4)]


@TOKEN_CHOICE
def test_the_layers_losses_count_in_training_alone(layer):
    model, (idx, targets) = sharp(BalancedLory(small(), ffn=layer)), torch.randint(50, (2, 2, 15))
    paid, plain = model.train()(idx, targets)[1], model.eval()(idx, targets)[1]
    added = sum(block.ffn.aux_loss for block in model.blocks)
    assert_close(paid - plain, added)
    assert added > 0 and model(idx)[1] is None and len(model(idx, targets, return_routing=True)) == 3


@TOKEN_CHOICE
def test_bfloat16_pads_the_rows_of_an_expert_and_changes_nothing_else(layer):
    """Output and gradients are those of float32 but for rounding."""
    ffn = sharp(layer(small()), scale=1.0).float()
    x, results = torch.randn(2, 15, 16), []
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            y = ffn(x)[0]
        results.append([y.float(), *torch.autograd.grad(y.float().square().sum(), ffn.parameters())])
    for exact, rounded in zip(*results):
        assert (exact - rounded).norm() < 0.05 * exact.norm()


@TOKEN_CHOICE
def test_token_choice_is_causal_at_every_position_in_training_too(layer):
    model, idx = sharp(Lory(small(), ffn=layer)), torch.randint(50, (3, 24))
    for t in range(24):
        where = moved(model, idx, 1, t)
        assert not where[0].any() and not where[2].any() and not where[1, :t].any() and where[1, t:].all()


@pytest.mark.parametrize('layer', [ExpertChoiceFFN, SwitchFFN, MixtralFFN])
def test_generation_computes_what_the_full_pass_does(layer):
    model, idx = sharp(Lory(small(), ffn=layer)).eval(), torch.randint(50, (2, 24))
    logits, _, caches = model.prefill(idx[:, :7])
    for t in range(7, 24):
        assert_close(logits, model(idx)[0][:, t - 1])
        logits = model.decode(idx[:, t], caches)


def apart(p, K=1):
    """The least distance between two of the experts whose parts are stacked in p (E, in, out)."""
    parts = [part.flatten(1) for part in p.detach().chunk(K, 2)]
    return min((part[i] - part[j]).norm().item() for part in parts
               for i, j in combinations(range(len(p)), 2))


@TOKEN_CHOICE
def test_in_warm_up_the_model_is_the_dense_one_and_then_experts_part(layer):
    dense, model = Lory(small(n_experts=1)), BalancedLory(small(), ffn=layer)
    steps = [m.optimizer(0.001, 0.1, (0.9, 0.95)) for m in (dense, model)]
    stacked = [p for p in model.parameters() if p.dim() == 3]
    for step in range(25):
        idx = torch.randint(50, (3, 25), generator=torch.Generator().manual_seed(step))
        losses = [m(idx[:, :-1], idx[:, 1:])[1] for m in (dense, model)]
        if step <= 20:  # at step 20 gradients are no longer tied, but experts are still equal
            assert_close(dense(idx)[0], model(idx)[0], rtol=0, atol=1e-5)
            assert_close(*losses, rtol=0, atol=1e-5)
        else:
            assert losses[1] > losses[0] + 0.01  # both layers pay for balance and z
        sum(losses).backward()
        if step < 20:
            assert all(not p.grad.any() for name, p in model.named_parameters() if '.router.' in name)
            model.tie_gradients()
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
        if step < 20:
            model.tie_experts()
            assert all(torch.equal(p, p[:1].expand_as(p)) for p in stacked)
    assert min(apart(p, layer.K) for p in stacked) > 1e-3


@TOKEN_CHOICE
def test_without_warm_up_experts_are_drawn_apart_and_nothing_else_changes(layer):
    ours, lory = (kind(small(n_embd=32), ffn=layer, seed=3) for kind in (ApartLory, Lory))
    for (name, p), q in zip(ours.named_parameters(), lory.parameters()):
        if p.dim() == 3:
            assert apart(p) > 0.5 * p[0].norm() and apart(q) == 0
            assert_close(p.std(), q.std(), rtol=0.1, atol=0)
        else:
            assert torch.equal(p, q), name
    again, other = (ApartLory(small(n_embd=32), ffn=layer, seed=seed).blocks[0].ffn.gate for seed in (3, 4))
    assert torch.equal(again, ours.blocks[0].ffn.gate) and (again - other).abs().mean() > 0.01


@pytest.mark.parametrize('flags, layer, drawn_apart', [
    (['--layer=switch'], SwitchFFN, False), (['--layer', 'mixtral', '--dense_warmup', '0'], MixtralFFN, True),
    (['--dense_warmup=0'], ExpertChoiceFFN, False)])
def test_the_flags_choose_the_layer_and_how_it_is_drawn(flags, layer, drawn_apart, monkeypatch):
    monkeypatch.setattr(train, 'main', lambda argv, build: (argv, build(small(), seed=3)))
    argv, model = token_moe.main([*flags, '--batch_size=7'])
    gate = model.blocks[0].ffn.gate
    assert type(model.blocks[0].ffn) is layer and (apart(gate) > 0) == drawn_apart
    assert argv[-1] == '--batch_size=7' and train.flags().parse_args(argv).batch_size == 7


# --- Files and runs. ---

@pytest.mark.parametrize('layer', [ExpertChoiceFFN, SwitchFFN, MixtralFFN])
def test_a_checkpoint_loads_with_build_and_only_then(layer, tmp_path):
    model, idx = ApartLory(small(), ffn=layer).eval(), torch.randint(50, (2, 24))
    save_checkpoint(tmp_path / 'ckpt.pt', model, None, step=3)
    again, ckpt = load_checkpoint(tmp_path / 'ckpt.pt', build=partial(Lory, ffn=layer))
    assert torch.equal(model(idx)[0], again(idx)[0]) and ckpt['step'] == 3
    with pytest.raises(UserError, match=layer.__name__) as refusal:
        load_checkpoint(tmp_path / 'ckpt.pt')
    assert '\n' not in str(refusal.value)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder with data/own, made of this repository's scripts, a byte a token."""
    home = tmp_path_factory.mktemp('home')
    (home / 'own').mkdir()
    for name in os.listdir(HERE):
        if name.endswith('.py'):
            shutil.copy(f'{HERE}/{name}', home / 'own')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        prepare.main(['--input', 'own', '--tokenizer=byte', '--val_fraction=.2'])
    return home


@pytest.mark.parametrize('layer, warmup', [('switch', 0.5), ('mixtral', 0.5), ('mixtral', 0)])
def test_a_run_stopped_twice_equals_one_never_stopped(layer, warmup, home, monkeypatch):
    """Bit for bit: losses and weights. It is stopped at step 4, in warm-up, and at step 9, after it."""
    before, real, calls = signal.getsignal(signal.SIGINT), train.get_batch, []

    def get_batch(*args):
        calls.append(1)
        if len(calls) in stops:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    monkeypatch.chdir(home)
    monkeypatch.setattr(train, 'get_batch', get_batch)
    monkeypatch.setattr(train, 'plot', lambda *args: None)  # slow, and tested elsewhere
    flags = ['--dataset=own', '--block_size=32', '--segment_len=32', '--n_embd=32', '--n_experts=4',
             '--max_iters=12', f'--dense_warmup={warmup}', '--learning_rate=.02', '--warmup=0',
             '--eval_windows=2', '--dtype=float32', '--device=cpu', '--layer', layer]
    runs = []
    for stops in ([], [4, 9]):
        out = f'--out_dir=out-{layer}-{warmup}-{len(stops)}'
        calls.clear()
        codes = [token_moe.main([*flags, out])]
        codes += [token_moe.main([f'--layer={layer}', '--init_from=resume', out]) for _ in stops]
        signal.signal(signal.SIGINT, before)
        assert codes == [130] * len(stops) + [0]
        runs.append(load_checkpoint(f'{out[10:]}/ckpt.pt', build=partial(Lory, ffn=token_moe.LAYERS[layer])))
    (model, whole), (_, resumed) = runs
    assert whole['losses'] == resumed['losses'] and len(whole['losses']) == 12
    assert all(torch.equal(p, resumed['model'][name]) for name, p in whole['model'].items())
    assert whole['tied_until'] == 12 * warmup and sum(whole['losses'][-3:]) < sum(whole['losses'][:3]) - 1
    assert apart(model.blocks[0].ffn.gate) > 0
    with pytest.raises(UserError, match='FFN'):
        token_moe.main(['--layer=expert_choice', '--init_from=resume', out])
    with pytest.raises(UserError, match='no dense model'):
        sample.specialize(model, torch.arange(9)[None])
