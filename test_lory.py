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
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import chdir, nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.testing import assert_close

import lory
import prepare
import sample
import train
from lory import Lory, LoryConfig, LoryFFN, UserError, load_checkpoint, save_checkpoint
from prepare import Document

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore:.*script_method:DeprecationWarning')  # of torch.compile


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
            torch.nn.init.normal_(p, std=scale if 'router.weight' in name else 0.3)
    return module.double()


def refused(word, call, *args, **more):
    """The call ends in a UserError: one line with `word` in it."""
    with pytest.raises(UserError, match=word) as raised:
        call(*args, **more)
    assert regex.fullmatch('[^\n]+[.]', str(raised.value))


def run(script, home, *argv, **more):
    """A script's main(), in the folder `home`, without pictures. Ctrl-C is pytest's again afterwards."""
    with chdir(home), mock.patch.object(train, 'plot'):
        try:
            return script.main(list(argv), **more)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def shell(script, home, *argv, **environment):
    """The same in a process of its own. -> its returncode, stdout, stderr"""
    return subprocess.run([sys.executable, script.__file__, *argv], cwd=home, text=True, capture_output=True,
                          env=dict(os.environ, OMP_NUM_THREADS='1', **environment))


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
ROUTINGS = [dict(first_segment='prior'), dict(first_segment='self'), dict(routing='prefix')]
OWN = ['--input', 'own', '--vocab_size=400', '--val_fraction=.2']  # what prepares data/own
TINY = ['--dataset=own', '--block_size=64', '--segment_len=16', '--n_embd=32', '--n_head=2',
        '--n_experts=4', '--batch_size=4', '--max_iters=30', '--dense_warmup=.5', '--eval_interval=10',
        '--eval_windows=3', '--log_interval=5', '--dtype=float32', '--device=cpu']  # tied up to step 15


# --- lory.py: the layer and the model. ---

def naive_lory(ffn, x):
    """Lory's FFN layer as a plain loop. Hidden states x (B, L, D) -> (B, L, D)"""
    rows = []
    for sequence in x:  # (L, D)
        segments = sequence.split(ffn.segment_len)  # of T tokens each; the last one may be shorter
        for n, segment in enumerate(segments):  # (T, D)
            # What routes a segment? Not itself, for then a token would depend on those that follow it. The
            # one before does (causal segment routing, Sec. 3.1), or always the first (prefix routing, Sec.
            # 5.1). The first has none before it. The router's bias alone routes it, or, in the paper, its
            # own mean, with the gradient stopped.
            if n > 0:
                before = segments[n - 1] if ffn.routing == 'causal' else segments[0]
                logits = ffn.router.weight @ (sum(before) / len(before)) + ffn.router.bias  # (E,)
            elif ffn.first_segment == 'self':
                logits = (ffn.router.weight @ (sum(segment) / len(segment)) + ffn.router.bias).detach()
            else:
                logits = ffn.router.bias
            e = torch.exp(logits) / torch.exp(logits).sum()  # (E,), Eq. 3
            # Merge the experts (Sec. 2.2), matrix by matrix: gate and up (D, H), down (H, D). All tokens of
            # the segment go through the merged FFN, a SwiGLU as in LLaMA.
            gate, up, down = (sum(e[i] * p[i] for i in range(len(e))) for p in (ffn.gate, ffn.up, ffn.down))
            for token in segment:  # (D,)
                g = token @ gate  # (H,)
                rows.append((g * torch.sigmoid(g) * (token @ up)) @ down)  # (D,)
    return torch.stack(rows).view(x.shape)


def with_gradients(y, inputs):
    """[y, then the gradient of each input], of y's sum of squares."""
    return [y, *torch.autograd.grad(y.square().sum(), inputs, materialize_grads=True)]


@pytest.mark.parametrize('how', ROUTINGS)
@pytest.mark.parametrize('L', [24, 20, 7, 4])
def test_layer_equals_naive_loop_in_output_and_every_gradient(how, L):
    ffn = randomize(LoryFFN(tiny_config(**how)), scale=2.0)
    x = torch.randn(3, L, 16, dtype=torch.float64, requires_grad=True)
    inputs = [x, *ffn.parameters()]
    ours = with_gradients(ffn(x)[0], inputs)
    assert_close(ours, with_gradients(naive_lory(ffn, x), inputs), rtol=1e-9, atol=1e-11)


def test_lean_merge_against_finite_differences():
    shapes = (2, 3, 5, 4), (2, 3, 2), (2, 4, 6)  # x (B, N, T, in), e (B, N, E), θ (E, in, out)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lory.merged_linear, inputs)


def test_bfloat16_stays_near_the_float32_formula():
    """In output and gradients. Routing stays in float32."""
    ffn = randomize(LoryFFN(tiny_config(n_embd=64, ffn_hidden=96)), scale=0.1).float()
    x = torch.randn(4, 24, 64, requires_grad=True)
    inputs, (y, e) = [x, *ffn.parameters()], ffn(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        (y16, e16), (_, e_rounded) = ffn(x), ffn(x.bfloat16())
    assert y16.dtype == torch.bfloat16
    assert_close(e16, e)
    assert_close(e_rounded, ffn(x.bfloat16().float())[1])  # only the input was rounded, not its mean
    for exact, rounded in zip(with_gradients(y, inputs), with_gradients(y16.float(), inputs)):
        assert (exact - rounded).norm() < 0.02 * exact.norm()  # bfloat16 keeps 8 bits: 0.004 an operation


def test_merged_weights_are_not_kept_for_the_backward_pass():
    """They are merged once more there. Under torch.compile, too: 12 merged FFNs would have the size of 12
    experts, and the largest tensor kept has that of all 4."""
    ffn, x = LoryFFN(tiny_config(segment_len=2)), torch.randn(4, 6, 16)
    with mock.patch.object(lory, 'merge', wraps=lory.merge) as merges:
        y, _ = ffn(x)
        assert merges.call_count == 3
        y.sum().backward()
        assert merges.call_count == 6
    sizes, compiled = [], torch.compile(ffn, backend='aot_eager_decomp_partition')  # needs no C++ compiler
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        compiled(x)
    assert max(sizes) == ffn.gate.numel()


def test_the_dense_model_against_a_second_implementation():
    """Rotary attention in complex numbers, LLaMA's FFN, RMSNorm, and the loss from log-probabilities."""
    model = randomize(Lory(tiny_config(n_experts=1, n_layer=1)))
    idx, targets = torch.randint(50, (2, 2, 9))
    attn, ffn, x = model.blocks[0].attn, model.blocks[0].ffn, model.embed.weight[idx]
    angle = torch.outer(torch.arange(9.), 10000.0 ** (-torch.arange(4) / 4)).double()

    def normed(x):
        return x / x.square().mean(-1, keepdim=True).sqrt()
    q, k, v = (normed(x) @ attn.qkv.weight.T).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)  # (B, nh, L, hs)
    q, k = (torch.complex(t[..., :4], t[..., 4:]) * torch.exp(1j * angle) for t in (q, k))
    scores = ((q @ k.mH).real / math.sqrt(8)).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 16)  # (B, nh, L, hs) -> (B, L, D)
    x = x + y @ attn.proj.weight.T
    x = x + (F.silu(normed(x) @ ffn.gate[0]) * (normed(x) @ ffn.up[0])) @ ffn.down[0]
    logp = (normed(x) @ model.embed.weight.T).log_softmax(-1)
    targets[0, 3] = -1  # ignored
    terms = [-logp[b, t, targets[b, t]].item() for b in range(2) for t in range(9) if targets[b, t] >= 0]
    logits, loss, routing = model(idx, targets, return_routing=True)
    assert_close(logits, normed(x) @ model.embed.weight.T, rtol=1e-6, atol=1e-6)  # its angles are float32
    assert loss.item() == pytest.approx(sum(terms) / 17, rel=1e-5)
    assert ffn.router is None and routing.shape == model.prefill(idx)[1].shape == (2, 1, 1, 1)


@pytest.mark.parametrize('how', [*ROUTINGS, dict(first_segment='self', segment_len=24)])
@pytest.mark.parametrize('L', [24, 21])
def test_a_token_is_felt_from_its_own_position_on_and_in_its_own_sequence(how, L):
    """Except where segment 1 routes itself, `self`: its tokens are felt in all of it. In the last case,
    SMEAR, segment 1 is all there is, so every token looks ahead, and the test must see that."""
    model, idx = randomize(Lory(tiny_config(**how))), torch.randint(50, (3, L))
    logits, _, weights = model(idx, return_routing=True)
    assert weights.amax(-1).median() > 0.9, 'routing must be far from uniform'
    for t in range(L):
        other = idx.clone()
        other[1, t] = (other[1, t] + 1 + torch.randint(48, ())) % 50
        changed = (model(other)[0] - logits).abs().amax(-1) > 1e-9  # (B, L)
        start = 0 if model.config.first_segment == 'self' and t < model.config.segment_len else t
        assert changed.tolist() == [[False] * L, [i >= start for i in range(L)], [False] * L]


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
    """Tied experts begin and stay equal bit for bit. However they are routed, they make the dense model of
    one expert. That equals the dense model trained beside them, but for rounding and Adam's epsilon, which
    weighs more against dW / E than against dW. Untied experts part, unless the router is zero."""
    model, dense = Lory(tiny_config(**shape)), Lory(tiny_config(**shape | dict(n_experts=1)))
    for name, p in dense.named_parameters():
        assert torch.equal(model.get_parameter(name), p.expand_as(model.get_parameter(name)))
    drawn = [p for m in (model, Lory(model.config, seed=1)) for p in m.parameters() if p.std() > 0]
    assert len({p.flatten()[0].item() for p in drawn}) == len(drawn) == 26, 'no two parameters begin alike'
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
    one = {name: p[:1] if p.dim() == 3 else p for name, p in model.state_dict().items()}
    dense.load_state_dict(dense.fitted(one), strict=False)
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
    assert Lory(LoryConfig()).num_params(active=True) == Lory(LoryConfig(n_experts=1)).num_params()


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
        dense = sample.specialize(model, idx[b:b + 1, :P])
        for i, (block, merged) in enumerate(zip(model.blocks, dense.blocks)):
            by_prior = P == 1 and first_segment == 'prior'
            e = (block.ffn.router.bias if by_prior else block.ffn.router(means[i][b])).softmax(0)
            assert_close(weights[b, i, 0], e)
            for name in ('gate', 'up', 'down'):
                average = (e[:, None, None] * block.ffn.get_parameter(name)).sum(0)  # (in, out)
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
        share = torch.bincount(lory.draw(logits.repeat(4000, 1), *how), minlength=4) / 4000
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
    for name, value in dict(n_experts=0, segment_len=25, n_head=3, first_segment='zero').items():
        refused(name, tiny_config, **{name: value})
    model = Lory(tiny_config())
    for L in (0, 25):
        refused('block_size=24', model.generate, torch.full((1, L), 0), 3)
    state = {name: p for name, p in model.state_dict().items() if name != 'norm.weight'}
    refused('norm.weight is missing', model.fitted, state)
    for other in (dict(n_layer=3), dict(n_layer=1), dict(n_experts=2), dict(ffn_hidden=8)):
        refused('does not fit', model.fitted, Lory(tiny_config(**other)).state_dict())
    assert model.generate(torch.full((2, 5), 0), 0).shape == (2, 0), 'no new tokens are none'


def test_checkpoints_are_read_as_written_or_refused(tmp_path):
    """Refused if cut off, one bit flipped, of an older format or no checkpoint."""
    model, path = Lory(tiny_config(tie_embeddings=False)), tmp_path / 'ckpt.pt'
    save_checkpoint(path, model, None, note='kept')
    again, ckpt = load_checkpoint(path)
    assert ckpt['note'] == 'kept' and again.config == model.config and not again.training
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    whole, weight = path.read_bytes(), model.embed.weight.detach().numpy().tobytes()
    at = whole.index(weight)
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
    for damaged in (whole[:1000], flipped, b'', weight):
        path.write_bytes(damaged)
        refused('damaged', load_checkpoint, path)
    for other in (dict(ckpt, format=1), [1, 2]):
        torch.save(other, path)
        refused('format 2', load_checkpoint, path)
    refused('cannot read.*directory', load_checkpoint, tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / 'f').write_text('old')
    with pytest.raises(KeyboardInterrupt), lory.atomic_open(tmp_path / 'f') as f:
        f.write(b'half')
        raise KeyboardInterrupt
    assert (tmp_path / 'f').read_text() == 'old'


def test_a_known_error_of_torch_is_a_sentence_and_no_other_is_hidden(capsys):
    said = ['tried to allocate 2 GiB', 'CUDA error: out of memory', 'No working C++ compiler found',
            'Failed to find C compiler.', 'else']
    torchs = RuntimeError('enforce fail')
    torchs.__context__ = OSError(28, 'No space left')
    for error in (MemoryError(), *map(RuntimeError, said), OSError(28, 'No space left'), torchs):
        with pytest.raises(RuntimeError if 'else' in error.args else SystemExit, match='else|2'):
            lory.run_script(mock.Mock(side_effect=error))
    assert regex.fullmatch('(.*: out of memory: .*[.]\n){3}(.*install gcc and g[+][+].*[.]\n){2}'
                           '(.*No space left: .*[.]\n){2}', capsys.readouterr().err)


# --- prepare.py: what it reads and holds out. ---

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
    meta, tokenizer = (json.loads((path / f'{file}.json').read_text()) for file in ('meta', 'tokenizer'))
    tokens, docs = np.fromfile(path / f'{split}.bin', meta['dtype']), np.load(path / f'{split}_docs.npz')
    pieces, stored = [base64.b64decode(token) for token in tokenizer['tokens']], []
    for (eot, *text), domain in zip(np.split(tokens, docs['start'][1:-1]), docs['domain']):
        assert eot == meta['eot'] and eot not in text
        stored.append((b''.join(pieces[t] for t in text).decode(), meta['domains'][domain]))
    assert docs['start'][-1] == len(tokens) == meta[split]['tokens']
    return stored


def data_words(n, seed=0):
    """`n` words that nobody knows, of two to eight letters."""
    rng = random.Random(seed)
    return ' '.join(''.join(rng.choices('abcdefghijklmnopqrstuvw', k=rng.randrange(2, 9))) for _ in range(n))


def write_files(home, files):
    """Write {name: text, bytes, or a list of records for a .jsonl} below `home`."""
    for name, data in files.items():
        if isinstance(data, list):
            data = ''.join(json.dumps(record) + '\n' for record in data)
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def test_builtin_corpus(data_docs, tmp_path, monkeypatch):
    """Sources are split by kind and cut into pieces. If the corpus is missing, train.py prepares it."""
    source = ('import os\n\n\ndef f(x):\n    """Says.\n\n    >>> f(1)\n    2\n\n    More.\n    """\n'
              '    return x\n\n\nclass A:\n    "\\d only"\n')
    assert prepare.split_python(source) == dict(
        prose='Says.\n\nMore.\n\n\\d only', repl='>>> f(1)\n2',
        python='import os\n\n\ndef f(x):\n    return x\n\n\nclass A:\n    pass\n')
    code = 'def f():\n    a = 1\n\n    return a\n\n\n' * 300
    for text in ('\n\n'.join(['  word ' * 90] * 20), 'line\n' * 3000, ' ' * 9999, 'x' * 10_000, code):
        pieces = prepare.cut(text)
        assert ''.join(pieces) == text and max(map(len, pieces)) <= prepare.PIECE
    assert all(piece.startswith('def f') for piece in pieces)
    for domain in prepare.DOMAINS:
        mine = [doc for doc in data_docs if doc.domain == domain]
        assert 120_000 <= sum(len(doc.text) for doc in mine) + prepare.PIECE < 135_000
        assert max(Counter(doc.source for doc in mine).values()) <= 4
    monkeypatch.setattr(prepare, 'read_builtin', lambda mb: data_docs)
    run(train, tmp_path, *TINY, '--dataset=builtin', '--max_iters=1')
    dataset = prepare.load_dataset(tmp_path / 'data/builtin', 64)
    assert dataset.meta['domains'] == prepare.DOMAINS and set(dataset.val.domain) == set(range(5))


def test_inputs_and_their_domains(tmp_path, capsys, monkeypatch):
    """Folders with links in a circle, text, JSONL, and what is no text. Each text begins with its domain."""
    monkeypatch.chdir(tmp_path)
    labels = {'news': 'news', 'C#': 'C#', 'naïve 中文': 'naïve 中文', 'x' * 41: 'x' * 41, 0: '0', '00': '00',
              None: 'feed.JSONL', '': 'feed.JSONL', '_a': '<5f>a', '<5f>a': '<3c>5f<3e>a', ' ': '<20>',
              '$x$': '<24>x<24>', '\ud800': '<d800>', 'line\nbreak': 'line<a>break'}
    write_files(tmp_path, {
        'books/sea/deep/1.md': 'sea: a whale', 'books/sea/2.md': 'sea: a shark', 'books/3.txt': 'books: 3',
        'elsewhere/4.txt': 'link: from elsewhere', 'note.txt': '\ufeffnote.txt: two\r\nlines',
        'books/.git/config': 'hidden', 'books/empty.txt': ' \n', 'books/latin.txt': b'caf\xe9',
        'books/sea/picture.png': b'\x89PNG', 'books/sea/zeros.bin': b'\0\1\2',
        'books/out/ckpt.pt': '', 'books/out/log.csv': 'a run', 'books/data/train_docs.npz': '',
        'books/data/meta.json': 'a dataset', 'books/raw.ndjson': '{"text": "books: \u2028"}\n\n{"text": ""}',
        'feed.JSONL': [dict(text=f'{name}: {label!r}', domain=label) for label, name in labels.items()],
        **dict.fromkeys(['en/a.txt', 'fr/a.txt', 'n.2023/a', 'n.2024/a', 'b.txt', 'b.md'], 'text')})
    for link, target in ('books/link', 'elsewhere'), ('elsewhere/loop', 'books'), ('books/broken', 'none'):
        os.symlink(tmp_path / target, link)
    os.mkfifo('books/pipe')
    docs = prepare.read_inputs(['books', 'note.txt', 'feed.JSONL', 'books/sea'])
    assert [doc.domain for doc in docs] == [doc.text.split(':')[0] for doc in docs]
    assert len({doc.source for doc in docs}) == len({doc.text for doc in docs}) == len(docs) == 20
    assert docs[5].text == 'note.txt: two\nlines'
    assert regex.search('8 inputs.*: books/broken, books/data, books/empty.txt,', capsys.readouterr().out)
    for inputs in (['en/a.txt', 'fr/a.txt'], ['n.2023', 'n.2024'], ['b.txt', 'b.md']):  # called alike
        docs = prepare.read_inputs(inputs)
        assert [doc.domain for doc in docs] == inputs and docs[0].source != docs[1].source


def test_sources_are_held_out_whole_up_to_a_cap(data_docs, monkeypatch):
    val, train = prepare.hold_out(data_docs, .2)
    assert not {doc.source for doc in val} & {doc.source for doc in train}
    assert Counter(val + train) == Counter(data_docs)
    assert set(prepare.hold_out(data_docs[::-1], .2)[0]) == set(val)
    equal = [Document('.' * 99, 'd', str(i)) for i in range(50)]
    by_hash = sorted(equal, key=lambda doc: hashlib.sha1(doc.source.encode()).digest())
    assert set(prepare.hold_out(equal, .2)[0]) == set(by_hash[:10])
    monkeypatch.setattr(prepare, 'MAX_VAL', 5000)
    val, train = prepare.hold_out([*data_docs, Document('.' * 255, 'small', '')], .5)
    assert 2500 <= prepare.count_bytes(val) <= 5015 and train[-1].text == '.' * 255


@pytest.mark.parametrize('fraction', [.05, .2])
@pytest.mark.parametrize('sizes', [
    [25_000] * 4, [40_000, 9_000, 900], [60_000], [20_000, 300], [400] * 200, [1200] * 9 + [90_000]])
def test_a_share_of_the_bytes_is_held_out_of_few_files_or_many(sizes, fraction):
    docs = [Document(data_words(n // 3, i)[:n] + 'é中' * (i % 2) + '\nend', str(d), f'{d}/{i}')
            for d in range(2) for i, n in enumerate(sizes)]
    for domain in '01':
        mine, held, kept = ([doc for doc in side if doc.domain == domain]
                            for side in (docs, *prepare.hold_out(docs, fraction)))
        goal = fraction * prepare.count_bytes(mine)
        assert goal / 2 <= prepare.count_bytes(held) <= goal + 3
        texts = [doc.text for doc in mine]
        tails, heads = ([doc.text for doc in side if doc.text not in texts] for side in (held, kept))
        assert len(tails) == len(heads) == len(held) + len(kept) - len(mine) <= 1
        assert all(head + tail == max(texts, key=len) for head, tail in zip(heads, tails))
        assert not tails or min(map(len, texts)) > goal / 2 or len(sizes) < 9


def test_texts_that_differ_in_white_space_only_count_once(tmp_path, capsys):
    """Three of five are dropped here. Their dataset is called like the first input."""
    files = {f'v1.1/{i}': data_words(400).replace(' ', ' ' + i * '\n') for i in range(4)}
    write_files(tmp_path, files | {'notes.txt': data_words(400, 1)})
    run(prepare, tmp_path, '--input', 'v1.1/', '--input', 'notes.txt', '--tokenizer=byte')
    assert {domain for _, domain in data_read(tmp_path, 'train', 'v1.1')} == {'v1.1', 'notes.txt'}
    said = r'3 documents equal to others(.*\n)+.*more than half of the input: v1.1/1 counts as v1.1/0'
    assert regex.search(said, capsys.readouterr().out)


def test_near_duplicates_equal_brute_force():
    rng, words, texts = random.Random(0), data_words(400).split(), []
    for i in range(200):  # slices that overlap more or less, with none to four words changed
        start = 10 * rng.randrange(20)
        chosen = words[start:start + rng.randrange(8, 150)]
        for _ in range(rng.randrange(5)):
            chosen[rng.randrange(len(chosen))] = rng.choice(words)
        texts.append(rng.choice(' \n').join(chosen))
    texts += [text[:48] + end for text in texts[:5] for end in 'ab']  # too short to be near
    docs, n_held = [Document(text, 'd', str(i)) for i, text in enumerate(texts)], 40
    texts = [' '.join(text.split()) for text in texts]
    sets = [{text[i:i + 9] for i in range(len(text) - 8)} if len(text) >= 50 else {text} for text in texts]
    similarity = np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])
    twin_of = {}
    for i in range(n_held, len(docs)):
        near = [j for j in range(i) if j not in twin_of and similarity[i, j] >= .8]
        if near:
            twin_of[i] = near[0]
    kept = [i for i in range(n_held, len(docs)) if i not in twin_of]
    assert len(twin_of) > 10 and sum(j < n_held for j in twin_of.values()) > 2
    assert ((similarity > .6) & (similarity < .8)).sum() > 10
    assert any(similarity[i, j] >= .8 for i in kept for j in twin_of if j < i), 'near a dropped one only'
    train, twins = prepare.drop_twins(docs[n_held:], 50, docs[:n_held])
    assert [dropped for dropped, _ in twins] == [docs[i] for i in twin_of]
    assert all(similarity[docs.index(dropped), docs.index(twin)] >= .8 for dropped, twin in twins)
    assert train == [docs[i] for i in kept]


# --- prepare.py: chain and tokenizer. ---

def naive_chain(neighbours, starts):
    """The walk of Sec. 3.2, O(n^2)."""
    left, order = list(starts), []
    while left:
        near = [j for j in neighbours[order[-1]] if j in left] if order else []
        order.append((near or left)[0])
        left.remove(order[-1])
    return order


def test_neighbours_and_chain_agree_with_brute_force(data_docs, monkeypatch):
    """Where many tie, two are strangers to the rest and one has no words; of one text; of real ones."""
    ties = ['alpha beta'] * 2 + ['alpha gamma'] * 40 + ['delta epsilon'] * 2 + ['12']
    for texts in (ties, ['one'], [doc.text for doc in data_docs]):
        n, X = len(texts), prepare.embed(texts).toarray()
        similarity = X @ X.T
        assert np.array_equal(similarity, X[:, ::-1] @ X[:, ::-1].T), 'sums are exact, in any order'
        ranked = [[j for j in np.argsort(-row, kind='stable').tolist() if j != i and row[j]][:5]
                  for i, row in enumerate(similarity)]  # ties go to the lower number
        assert prepare.nearest(prepare.embed(texts), 5) == ranked
        starts = np.random.default_rng(7).permutation(n).tolist()
        assert prepare.chain(ranked, np.random.default_rng(7)) == naive_chain(ranked, starts)
    assert np.allclose(np.diag(similarity), 1, atol=1e-3)
    monkeypatch.setattr(prepare, 'SHARD', 40)
    ordered, cosine = prepare.arrange(data_docs, 'similar', 8, [1])
    assert ordered != data_docs and cosine[0] > 2 * cosine[1]
    for i in range(0, n, 40):
        assert set(ordered[i:i + 40]) == set(data_docs[i:i + 40])  # each shard stays in its place


@pytest.mark.parametrize('name, n_vocab', [('bpe', 500), ('byte', 257)])
def test_tokenizer_round_trip(name, n_vocab, data_docs):
    tokenizer = prepare.make_tokenizer(name, 500, [doc.text for doc in data_docs[:100]])
    encoding = prepare.load_tokenizer(tokenizer)
    assert encoding.n_vocab == n_vocab and encoding.eot_token == n_vocab - 1
    sizes = [len(encoding.decode_single_token_bytes(i)) for i in range(n_vocab - 1)]
    assert prepare.token_bytes(tokenizer) == sizes + [0]
    rng = random.Random(0)
    points = [rng.randrange(rng.choice([0x110000, 0x3000, 128])) for _ in range(20_000)]
    anything = ''.join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
    for text in [anything, 'a<|endoftext|>b', '', ' ' * 10**6 + 'x', 'q' * 10**6, '\n \t' * 999]:
        tokens = prepare.encode(encoding, text)
        assert encoding.decode(tokens) == text and encoding.eot_token not in tokens


def naive_bpe(text, n_tokens):
    """Recount all pairs for every merge."""
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(prepare.PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < n_tokens:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        top = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[top] < 2:
            break
        if b''.join(top) not in tokens:
            tokens.append(b''.join(top))
        for word in words:
            for i in range(len(word)):  # a word gets shorter, so its last slices may be empty
                if tuple(word[i:i + 2]) == top:
                    word[i:i + 2] = [b''.join(top)]
    return tokens


@pytest.mark.parametrize('seed', range(3))
def test_bpe_merges_equal_a_naive_trainer(seed, data_docs):
    rng = random.Random(seed)
    soup = ''.join(rng.choice('aab ') for _ in range(2000))  # overlapping pairs such as aaaa
    clauses = ''.join(rng.choices('的一是不了人我在有，。他这', weights=range(13, 0, -1), k=1500))
    for text, n_tokens in [(data_docs[seed].text, 340), (soup, 300), (clauses, 320), ('abc', 1000)]:
        assert prepare.train_bpe([text], n_tokens) == naive_bpe(text, n_tokens)
    # Text without blanks is all long words, each of them new. Merging all would take long.
    long = [''.join(rng.choices('abc', k=20)) for _ in range(1000)]
    assert len(prepare.count_words(long, room=2000)) == 101
    assert len(prepare.count_words([data_words(999)], room=0)) > 900


def test_tokenizers_made_elsewhere(data_copy, monkeypatch):
    """That of another dataset, of a checkpoint, and one of tiktoken's: with a gap in its ranks, as p50k has,
    and an id above 16 bits. A file called `byte` does not hide the tokenizer of that name."""
    ranks = {bytes([b]): b for b in range(256)} | {b'he': 257, b'th': 258}
    encoding = prepare.tiktoken.Encoding('gpt2', pat_str=prepare.PATTERN, mergeable_ranks=ranks,
                                         special_tokens={'<|endoftext|>': 256, '<|other|>': 70_000})
    monkeypatch.setattr('tiktoken.get_encoding', mock.Mock(side_effect=[encoding] * 2 + [ConnectionError]))
    byte, gpt2 = prepare.make_tokenizer('byte'), prepare.make_tokenizer('gpt2')
    assert prepare.token_bytes(gpt2) == [1] * 256 + [0, 2, 2] + [0] * (70_001 - 259)
    file, text = data_copy / 'data/own/tokenizer.json', data_words(900)
    assert prepare.load_tokenizer(gpt2).encode_ordinary(text) == encoding.encode_ordinary(text)
    own = json.loads(file.read_text())
    save_checkpoint(data_copy / 'ckpt.pt', Lory(tiny_config()), own)
    save_checkpoint(data_copy / 'bare.pt', Lory(tiny_config()), None)
    write_files(data_copy, {'a.txt': text, 'hf.json': '{"model": {"vocab": {}}}', 'byte': 'a file',
                            'list.json': '[]', 'bad.json': 'x', 'deep.json': '[' * 10**5})
    prepared = partial(run, prepare, data_copy, '--input', 'a.txt')
    for name, tokenizer in ((file, own), ('ckpt.pt', own), ('byte', byte), ('gpt2', gpt2)):
        prepared(f'--tokenizer={name}')
        assert prepare.load_dataset(data_copy / 'data/a', 8).tokenizer == tokenizer
        stored = data_read(data_copy, 'train', 'a') + data_read(data_copy, 'val', 'a')
        assert ''.join(piece for piece, _ in stored) == text
    assert prepare.load_dataset(data_copy / 'data/a', 8).val.tokens.dtype == np.uint32
    for name in ('bare.pt', 'hf.json', 'list.json', 'bad.json', 'deep.json'):
        refused('no tokenizer', prepared, f'--tokenizer={name}')
    refused('damaged', prepared, '--tokenizer=a.txt')
    refused('no tokenizer', run, sample, data_copy, '--checkpoint=bare.pt')
    refused('--tokenizer=bpe', prepared, '--tokenizer=gpt2')  # the third download fails


# --- prepare.py: the dataset. ---

def test_bins_decode_to_the_documents(data_home):
    files = {(path.read_text(), path.parent.name) for path in (data_home / 'own').rglob('*.txt')}
    train, val = data_read(data_home, 'train'), data_read(data_home, 'val')
    assert not set(train) & set(val) and set(train + val) <= files and len(train + val) > .9 * len(files)
    assert [domain for _, domain in val] == sorted(domain for _, domain in val), 'domain by domain'
    dataset = prepare.load_dataset(data_home / 'data/own', 32)
    for name, split, stored in (('train', dataset.train, train), ('val', dataset.val, val)):
        assert [part.dtype for part in split] == [np.uint16, np.int64, np.uint8]
        text = prepare.load_tokenizer(dataset.tokenizer).decode(split.tokens.tolist())
        assert text == ''.join('<|endoftext|>' + text for text, _ in stored)
        assert dataset.meta[name]['documents'] == len(stored)
        assert dataset.meta[name]['bytes'] == sum(len(text.encode()) for text, _ in stored)


def test_same_seed_same_bytes_on_another_processor(data_home, data_copy):
    """A second process, without the vector instructions that decide how numpy sorts and adds."""
    shutil.rmtree(data_copy / 'data')
    optional = ' '.join(np._core._multiarray_umath.__cpu_dispatch__)
    done = shell(prepare, data_copy, *OWN, NPY_DISABLE_CPU_FEATURES=optional)
    assert (done.returncode, done.stderr) == (0, '')
    for name in os.listdir(data_home / 'data/own'):
        here, there = (home / 'data/own' / name for home in (data_copy, data_home))
        assert here.read_bytes() == there.read_bytes(), name
    similar, held = data_read(data_copy, 'train'), data_read(data_copy, 'val')
    for flag in ('--seed=2', '--order=random'):
        run(prepare, data_copy, *OWN, flag)
        train = data_read(data_copy, 'train')
        assert train != similar and sorted(train) == sorted(similar)
    assert data_read(data_copy, 'val') == held  # --order=random is judged on the same text


def test_damaged_data_is_refused(data_copy, monkeypatch):
    """By the first rank of each machine. The others would read as long."""
    path = data_copy / 'data/own'
    n = len(prepare.load_dataset(path, 32).val.tokens)
    assert len(prepare.load_dataset(path, n - 1).val.tokens) == n
    refused('too few', prepare.load_dataset, path, n)
    for name, old, new in (('meta.json', b'"format": 1', b'"format": 2'), ('meta.json', b'sha256', b'sha'),
                           ('meta.json', b'{', b''), ('train.bin', b'\0', b'\1'), ('val.bin', b'\0', b''),
                           ('val_docs.npz', b'PK', b'pk'), ('tokenizer.json', b'bpe', b'bqe')):
        whole = (path / name).read_bytes()
        for damage in ((path / name).unlink, partial((path / name).write_bytes, whole.replace(old, new, 1))):
            damage()
            refused('missing or damaged.*prepare.py', prepare.load_dataset, path, 32)
        (path / name).write_bytes(whole)
    (path / 'train.bin').write_bytes(bytes(1000))
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert not prepare.load_dataset(path, 32).train.tokens.any()


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError(28, 'No space left on device')])
@pytest.mark.parametrize('name, number', [('makedirs', 2), ('replace', 1), ('replace', 4)])
def test_a_failed_prepare_leaves_the_old_data(name, number, error, data_copy):
    """Wherever a crash or a full disk hits. Between two renames it leaves what is refused."""
    path = data_copy / 'data/own'
    old = prepare.load_dataset(path, 32).meta
    with pytest.raises((KeyboardInterrupt, OSError), match='^$|No space left'):
        with at_call(os, name, number, mock.Mock(side_effect=error)):
            run(prepare, data_copy, *OWN, '--seed=3')
    with pytest.raises(UserError, match='checksum') if number == 4 else nullcontext():
        assert prepare.load_dataset(path, 32).meta == old


# --- train.py, on a small real dataset. ---

@pytest.fixture(scope='session')
def run_home(data_home):
    """data_home with a finished run of TINY in `whole`."""
    assert run(train, data_home, *TINY, '--out_dir=whole') == 0
    return data_home


def test_training_windows_tile_the_stream_in_another_order_in_each_epoch():
    orders = []
    for seed in (5, 6):
        args = SimpleNamespace(block_size=64, seed=seed)
        x, y = train.get_batch(np.arange(999), 0, 28, args, 'cpu')
        assert torch.equal(y, x + 1)
        assert torch.equal(x[10:18], train.get_batch(np.arange(999), 10, 8, args, 'cpu')[0])
        orders += x[:, 0].view(2, 14).tolist()  # the first tokens of two epochs
    assert len({tuple(order) for order in orders}) == 4
    for order in orders:
        assert sorted(order) == [min(order) + 64 * i for i in range(14)] != order


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
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    counted = [row['step'] for row in ckpt['rows'] if 'experts' in row]
    assert counted == [20, 30], 'tied experts are not in use'
    tokenizer = prepare.load_tokenizer(data.tokenizer)
    windows = train.validation_windows(data.val, ['cpp', 'prose'], 64)
    for name, chosen in windows.items():  # windows with the end of a document first
        windows[name] = sorted(chosen, key=lambda w: tokenizer.eot_token not in w[1:])[:20]
        assert tokenizer.eot_token in windows[name][0][1:]
    size = torch.tensor(prepare.token_bytes(data.tokenizer))
    for block in model.blocks:
        block.ffn.router.weight.data *= 30  # so that batches differ in the experts they use
    figures, routing = train.evaluate(model.eval(), windows, size, 3, nullcontext())
    assert model.training
    in_use = torch.zeros(2, 4, dtype=torch.bool)
    for d, name in enumerate(windows):
        rows, weights = [], []
        for tokens in windows[name]:
            tokens = torch.tensor(tokens.astype(int))
            logits, _, e = model(tokens[None, :64], return_routing=True)
            weights.append(e[0, :, 1:])  # (n_layer, N - 1, E), without segment 1
            in_use |= (weights[-1] > 2 / 4).any(1)
            for t, target in enumerate(tokens[1:].tolist()):
                if target != tokenizer.eot_token:
                    n_bytes = len(tokenizer.decode_single_token_bytes(target))
                    rows.append((t, -logits[0, t].log_softmax(-1)[target].item(), n_bytes))
        assert_close(routing[d], torch.stack(weights).mean((0, 2)))
        for key, start in (('', 0), ('later_', 16)):
            _, nats, n_bytes = np.array([row for row in rows if row[0] >= start]).T
            found = figures[f'{key}bpb_{name}'] * math.log(2), math.log(figures[f'{key}ppl_{name}'])
            assert found == pytest.approx((nats.sum() / n_bytes.sum(), nats.mean()), rel=1e-5)
    for mean, key in (('val_bpb', 'bpb'), ('later_bpb', 'later_bpb')):
        assert figures[mean] == pytest.approx((figures[f'{key}_cpp'] + figures[f'{key}_prose']) / 2)
    assert figures['experts'] == pytest.approx(in_use.float().mean())
    figures, routing = train.evaluate(model, windows, size, 3, nullcontext(), tied=True)
    assert 'experts' not in figures and routing is None
    short, _ = train.evaluate(model, dict(a=[np.full(9, 5)]), size, 1, nullcontext())
    assert short['later_bpb'] == short['val_bpb'], 'of a single segment all counts'


def test_the_losses_of_twenty_steps_are_those_on_record(tmp_path, monkeypatch):
    """On data from a formula, with dense warm-up to step 5 and clipping."""
    record = [3.92877, 3.89642, 3.78070, 3.73069, 3.66252, 3.65812, 3.62614, 3.57949, 3.53947, 3.56094,
              3.50844, 3.48600, 3.48202, 3.49063, 3.46039, 3.47421, 3.47653, 3.45975, 3.46062, 3.43733]
    i, bounds = np.arange(3000), np.array([0, 3000])
    text = SimpleNamespace(tokens=(i * i // 7 + 5 * (i % 4)) % 50, start=bounds, domain=np.array([0]))
    tokenizer = prepare.make_tokenizer('byte')
    tokenizer.update(tokens=tokenizer['tokens'][:49], special_tokens={'<|endoftext|>': 49})
    meta = dict(domains=['text'], sha256={}, train=dict(bytes=3000))
    data = SimpleNamespace(meta=meta, train=text, val=text, tokenizer=tokenizer)
    monkeypatch.setattr(prepare, 'load_dataset', lambda *a: data)
    run(train, tmp_path, *TINY, '--max_iters=20', '--dense_warmup=.25', '--learning_rate=.01',
        '--grad_clip=.5', '--out_dir=out')
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')[1]['losses'] == pytest.approx(record, rel=0, abs=1e-4)


def carried(path):
    """What a run carries: its figures, but for those of a clock, its weights, its optimizer's averages."""
    ckpt = load_checkpoint(path)[1]
    rows = [{key: row[key] for key in row if key not in ('ms', 'tok_s')} for row in ckpt['rows']]
    figures = [ckpt['step'], ckpt['tied_until'], ckpt['losses'], rows]
    return figures, ckpt['model'], ckpt['optimizer']['state']


def test_a_run_stopped_and_resumed_equals_one_never_stopped(run_home):
    """Bit for bit. Ctrl-C saves where it comes: before, at and after the end of dense warm-up, which is
    step 15, even if nobody reads what it prints. A second one ends the run at once. A run that is killed goes
    on from its last checkpoint."""
    whole, out, flags = run_home / 'whole', run_home / 'stopped', TINY
    with at_call(train, 'save_checkpoint', 2, crash), suppress(MemoryError):
        run(train, run_home, *flags, '--out_dir=stopped')
    with at_call(train, 'get_batch', 3, lambda: (ctrl_c(), ctrl_c())), pytest.raises(KeyboardInterrupt):
        run(train, run_home, *flags, '--out_dir=stopped')
    assert set(os.listdir(out)) == {'best.pt', 'log.csv'}  # with no state to go on from, it begins again
    for name, number, action, saved in (('get_batch', 7, ctrl_c, 7),
                                        ('save_checkpoint', 1, crash, 7),  # in step 10, before best.pt
                                        ('save_checkpoint', 2, crash, 7),  # in step 10, after best.pt
                                        ('get_batch', 8, ctrl_c, 15),
                                        ('get_batch', 7, ctrl_c, 22)):
        with at_call(train, name, number, action), suppress(MemoryError):
            assert run(train, run_home, *flags, '--out_dir=stopped') == 130
        assert load_checkpoint(out / 'ckpt.pt')[1]['step'] == saved
        (out / 'ckpt.pt.tmp').write_bytes(b'half')  # a process that is killed in a write leaves this
        flags = ['--init_from=resume']
    gone = mock.Mock(side_effect=BrokenPipeError)
    with mock.patch('builtins.print', gone), mock.patch('os.write', gone), \
            at_call(train, 'get_batch', 8, ctrl_c):  # in the last step, which ends the run anyway
        assert run(train, run_home, *flags, '--out_dir=stopped') == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, 'a handler is left behind'
    for name in ('ckpt.pt', 'best.pt'):
        resumed, expected = carried(out / name), carried(whole / name)
        assert_close(resumed, expected, rtol=0, atol=0)
        assert list(resumed[2]) == list(expected[2]), 'the optimizer names parameters in another order'
    assert set(os.listdir(out)) == {'best.pt', 'ckpt.pt', 'log.csv'}


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
    are not tied again."""
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    dense = sample.specialize(model, torch.arange(9)[None])
    save_checkpoint(run_home / 'bare/ckpt.pt', dense, ckpt['tokenizer'])
    refused('holds no run', run, train, run_home, '--init_from=resume', '--out_dir=bare')
    flags = ['--dataset=own', '--max_iters=10', '--dense_warmup=.5', '--eval_windows=3', '--dtype=float32']
    for start, n_experts, tied_until in (('whole', 4, 0), ('bare', 1, 0), ('bare', 4, 5)):
        run(train, run_home, *flags, f'--init_from={start}/ckpt.pt', f'--n_experts={n_experts}',
            f'--out_dir={start}{n_experts}')
        again, onward = load_checkpoint(run_home / f'{start}{n_experts}/ckpt.pt')
        assert vars(again.config) == vars(model.config) | dict(n_experts=n_experts)
        assert onward['tied_until'] == tied_until
        assert max(onward['losses']) < ckpt['losses'][0] - 0.3, 'it starts from scratch'


def test_resume_keeps_its_settings_takes_those_named_and_refuses_other_data(data_copy):
    """What a run changed of its preset stays, with or without its flags. Dense warm-up ends at step 2 as
    planned, not at half of the new max_iters. The data and the run may move, and the checkpoint may lack a
    new field."""
    command = ['--preset=0.3b', *TINY, '--n_layer=1', '--ffn_hidden=96', '--beta1=.8', '--max_iters=4']
    resume, path = partial(run, train, data_copy, '--init_from=resume'), data_copy / 'out/ckpt.pt'
    with at_call(train, 'get_batch', 1, ctrl_c):
        run(train, data_copy, *command, '--out_dir=before')
    (data_copy / 'before').rename(data_copy / 'out')
    for step, repeated in ((2, []), (3, command[:1]), (4, command)):
        with at_call(train, 'get_batch', 1, ctrl_c):
            resume(*repeated, '--max_iters=8')
        model, ckpt = load_checkpoint(path)
        assert ckpt['step'] == step and (spread(model) > 0) == (step > 2)
        assert dict(n_layer=1, ffn_hidden=96, beta1=.8, first_segment='self').items() <= ckpt['args'].items()
    for fields in (ckpt['args'], ckpt['config']):
        del fields['routing']
    torch.save(ckpt, path)
    (data_copy / 'data/own').rename(data_copy / 'data/moved')
    resume('--max_iters=5', '--beta1=.5', '--weight_decay=.3', '--ffn_hidden=0', '--dataset=moved')
    groups = load_checkpoint(path)[1]['optimizer']['param_groups']
    assert [(*group['betas'], group['weight_decay']) for group in groups] == [(.5, .95, .3), (.5, .95, 0)]
    run(prepare, data_copy, *OWN, '--val_fraction=.3')
    refused('not on data', resume, '--max_iters=6', '--dataset=own')
    refused('higher --max_iters', resume, '--max_iters=1')


class Nearer(LoryFFN):
    """A routing of one's own: by the last token, not the mean. It has a buffer, too."""
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer('calls', torch.zeros(()))

    def routing_weights(self, x):
        self.calls += 1
        return super().routing_weights(x[..., -1:, :])


def test_a_layer_of_ones_own_trains_and_is_refused_without_build(run_home):
    build, out = partial(Lory, ffn=Nearer), '--out_dir=nearer'
    run(train, run_home, *TINY, '--max_iters=10', out, build=build)
    run(train, run_home, '--init_from=resume', '--max_iters=20', out, build=build)
    model, ckpt = load_checkpoint(run_home / 'nearer/ckpt.pt', build=build)
    ffn, x = model.blocks[0].ffn, torch.randn(2, 9, 32)
    assert ckpt['losses'][-1] < ckpt['losses'][0] - 0.3 and ffn.calls > 20  # in both runs
    assert_close(ffn(x, lory.Cache(64))[1][:, 0], ffn.router(x[:, 8]).softmax(-1))  # in generation, too
    run(sample, run_home, out, '--max_new_tokens=2', '--save_dense=nearest.pt', build=build)
    refused('Nearer', run, sample, run_home, out)

    class Half(LoryFFN):
        def forward(self, x, cache=None):
            y, e = super().forward(x, cache)
            return y / 2, e
    halved = randomize(Lory(tiny_config(), ffn=Half))
    refused('no dense.*Half', sample.specialize, halved, torch.arange(9)[None])
    refused('Nearer', run, train, run_home, out, '--init_from=resume', '--max_iters=40')
    refused('buffers', train.wrap, model, train.flags().parse_args(['--shard']), 'cpu', 2)


def rank_main(rank, home, runs):
    """One of two ranks, as torchrun would start it, for one run of train.py after the other."""
    for port, argv in runs:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                          MASTER_PORT=str(port))
        run(train, home, *argv)


def test_two_ranks_equal_one(run_home):
    """Two gloo processes, under DDP with accumulation and with --shard, also in float16 with its scaler, in
    dense warm-up and after it. Runs of two are resumed by one for the last steps, and that of one by two."""
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
        scaler = load_checkpoint(run_home / name / 'ckpt.pt')[1]['scaler']
        assert scaler.get('_growth_tracker') == {'half': 12, 'one-half': 4}.get(name)  # steps in float16


@pytest.mark.parametrize('name, result', [('over_ranks', (math.inf, 1.0, False)),  # the loss of an update
                                          ('over_ranks', (3.0, math.nan, True))])  # its gradient, at Ctrl-C
def test_a_run_that_is_not_finite_stops_before_it_saves(name, result, run_home, monkeypatch):
    monkeypatch.setattr(train, name, lambda *args: result)
    refused('step 1 is not finite', run, train, run_home, *TINY, '--eval_interval=1', '--out_dir=wild')
    assert os.listdir(run_home / 'wild') == ['log.csv']


# --- sample.py, and the scripts from the shell. ---

def test_sample_prints_what_generate_makes_and_stops(run_home, capsys, monkeypatch):
    def sampled(*flags):
        run(sample, run_home, '--out_dir=whole', '--device=cpu', '--max_new_tokens=40', *flags)
        return capsys.readouterr().out
    model, ckpt = load_checkpoint(run_home / 'whole/ckpt.pt')
    tokenizer = prepare.load_tokenizer(ckpt['tokenizer'])
    prompt = torch.tensor([[tokenizer.eot_token] + tokenizer.encode_ordinary('The value')])
    text = tokenizer.decode(model.generate(prompt, 40, temperature=0)[0].tolist()).split('<|endoftext|>')[0]
    (run_home / 'prompt.txt').write_text('The value', encoding='utf-8-sig')
    greedily = ['--start=FILE:prompt.txt', '--temperature=0']
    shown = sampled(*greedily, '--show_routing', '--save_dense=dense.pt')
    assert shown.count('\nlayer') == 2 and shown.endswith(f'\nThe value{text}\n')
    assert sampled(*greedily, '--checkpoint=dense.pt') == f'The value{text}\n'
    stopped = sampled(*greedily, f'--stop={text[3:6]}')[9:-1]
    assert text.startswith(stopped) and text[3:6] in stopped and len(stopped) < len(text)
    drawn = ['--start=Füße 漢字', '--num_samples=2', '--top_k=50', '--top_p=.95']
    first, again, other = (sampled(*drawn, f'--seed={seed}') for seed in (1, 1, 2))
    assert first == again != other
    assert first.startswith('Füße 漢字') and first.count('-' * 80 + '\nFüße 漢字') == 1
    # A sample ends with the document, and shows half a character as such.
    half = tokenizer.encode_single_token('é'.encode()[:1])
    tokens = torch.tensor([*tokenizer.encode_ordinary(' end'), half, tokenizer.eot_token, 65])
    monkeypatch.setattr(Lory, 'stream', lambda *args: iter(tokens[:, None]))
    assert sampled('--start=The') == 'The end\N{REPLACEMENT CHARACTER}\n'
    ckpt['tokenizer']['tokens'][half] = ''  # an id that stands for nothing, as cl100k has, ends it, too
    save_checkpoint(run_home / 'gap.pt', model, ckpt['tokenizer'])
    assert sampled('--start=The', '--checkpoint=gap.pt') == 'The end\n'


MISTAKES = {  # The sentence names the last flag, or says what stands after the arrow.
    prepare: ['--input nowhere -> not exist', '--input void -> too little', '--input bad.jsonl -> line 2',
              '--input same.jsonl -> too little', '--input many.jsonl -> 300 domains', '--order=best',
              '--input list.jsonl -> line 1', '--input alike --val_fraction=.6 -> left to train on',
              '--dataset=a/b', '--dataset=..', '--tokenizer=gpt22', '--vocab_size=256', '--val_fraction=0',
              '--n_neighbors=0', '--nonsense=1'],
    train: ['--out_dir=', '--device=gpu', '--block_size=9999999', '--shard', '--dataset=none', '--seed=-1',
            '--dataset=builtin --n_head=5', '--gradient_accumulation_steps=2 --batch_size=3', '--beta1=1',
            '--log_interval=0', '--learning_rate=nan', '--routing=token', '--preset=7b', '--max_iter=3',
            '--compile=maybe', '--init_from=resum -> read resum', '--init_from=resume -> refused/ckpt.pt',
            '--init_from=whole/ckpt.pt --n_layer=3', '--init_from=whole/ckpt.pt --n_experts=2',
            '--init_from=whole/ckpt.pt --preset=0.3b -> ffn_hidden', '--out_dir=whole -> holds a run',
            *(f'--out_dir=whole --init_from=resume --{flag}' for flag in (
                'n_layer=3', 'n_experts=2', 'batch_size=8', 'seed=1', 'eval_windows=1', 'dense_warmup=.1',
                'preset=0.3b -> preset=', 'ffn_hidden=64 -> ffn_hidden=96'))],
    sample: ['--start=FILE:none -> read none', '--start=FILE:data/own/val.bin -> UTF-8', '--temperature=nan',
             '--start=\udcff -> UTF-8', '--start=' + 'word,' * 100 + ' -> block_size', '--temperature=-1',
             '--device=foo', '--out_dir=nowhere -> read nowhere', '--save_dense=whole/ckpt.pt', '--top_k=x',
             '--top_p=-1', '--max_new_tokens=0', '--show_routing=maybe']}


@pytest.mark.parametrize('script, row', [(script, row) for script in MISTAKES for row in MISTAKES[script]])
def test_a_mistake_is_a_sentence_and_exit_code_2_before_any_work(script, row, run_home, capsys, monkeypatch):
    monkeypatch.setattr(prepare, 'read_builtin', None)
    write_files(run_home, {
        'void/.hidden': 'text', 'bad.jsonl': [dict(text='a'), dict(txt=1)], 'list.jsonl': [['text']],
        'same.jsonl': [dict(text='same')] * 99, 'many.jsonl': [dict(text='a', domain=i) for i in range(300)],
        'alike/0': data_words(400), 'alike/1': data_words(400) + ' end'})
    base = {prepare: ['--dataset=refused'], train: [*TINY, '--out_dir=refused'], sample: ['--out_dir=whole']}
    flags, _, word = row.partition(' -> ')
    with pytest.raises(SystemExit, match='2'):
        lory.run_script(partial(run, script, run_home, *base[script], *flags.split()))
    *usage, sentence = capsys.readouterr().err.splitlines()
    assert (word or flags.split('--')[-1].split('=')[0]) in sentence
    assert len(usage) == 1 or usage == [] and sentence.endswith('.')  # argparse says the usage first
    assert not list(run_home.rglob('refused'))


def test_the_scripts_from_the_shell(data_home):
    """As a user starts them. A mistake is one sentence on stderr and exit code 2."""
    done = shell(train, data_home, *TINY, '--max_iters=1', '--log_interval=1', '--out_dir=shell')
    assert (done.returncode, done.stderr) == (0, '') and 'done' in done.stdout
    files = set(os.listdir(data_home / 'shell'))
    assert files == {'best.pt', 'ckpt.pt', 'experts.png', 'log.csv', 'loss.png'}
    names, *lines = (data_home / 'shell/log.csv').read_text().splitlines()
    assert names.startswith('step,loss,bpb,lr,norm,ms,tok_s,val_bpb,later_bpb') and len(lines) == 2
    failed = shell(sample, data_home, '--out_dir=nowhere')
    assert failed.returncode == 2 and failed.stderr.startswith('sample.py: cannot read nowhere/ckpt.pt')
