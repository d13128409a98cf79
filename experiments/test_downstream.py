"""
The tests of downstream.py: its scores against loops over single continuations, its questions, its figures.

    python -m pytest -q experiments/test_downstream.py
"""
import json
import os
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.testing import assert_close

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]
import downstream
import prepare
from downstream import PROMPTS, make_questions, models, scores, share_right, wilson
from lory import Lory, LoryFFN, UserError, save_checkpoint
from test_experiments import sharp, small
from token_moe import ExpertChoiceFFN, MixtralFFN, SwitchFFN

torch.set_num_threads(1)
EOT = 0


def checkpoint(ffn=LoryFFN, **changes):
    """What read_checkpoint would return of a random model."""
    config = small(**dict(dict(block_size=320, segment_len=50), **changes))
    return dict(config=asdict(config), layer=ffn.__name__, model=sharp(Lory(config, ffn=ffn)).state_dict())


def documents(length, domain=None, tokens=None):
    """A Split of documents as long as `length` says. Its tokens are their own places, EOT at each start."""
    start = np.concatenate([[0], np.cumsum(length)])
    tokens = np.arange(start[-1]).astype('<u2') if tokens is None else tokens
    tokens[start[:-1]] = EOT
    return prepare.Split(tokens, start, np.zeros(len(length), np.uint8) if domain is None else domain)


# --- Scores against slow loops. ---

def by_decoding(model, prompt, text):
    """Log-likelihood of a text, token by token with the FFN that the prompt has made."""
    logits, _, caches = model.prefill(prompt[None])
    total = 0
    for token in text:
        total += logits[0].log_softmax(-1)[token].item()
        logits = model.decode(token[None], caches)
    return total


def by_forward(model, prompt, text):
    """The same from a forward pass of one prompt and one text, without a target, a batch or a cut."""
    predicted = model(torch.cat([prompt, text])[None])[0][0].log_softmax(-1)  # (L, V)
    return sum(predicted[len(prompt) + t - 1, token].item() for t, token in enumerate(text))


@pytest.mark.parametrize('P, way, slow, ckpt', [
    *[(P, 'prompt', by_decoding, checkpoint()) for P in PROMPTS],
    *[(P, 'rerouted', by_forward, checkpoint()) for P in PROMPTS],
    (128, '-', by_forward, checkpoint(n_experts=1)),
    *[(128, '-', by_forward, checkpoint(layer)) for layer in (SwitchFFN, MixtralFFN, ExpertChoiceFFN)]])
@torch.no_grad()
def test_scores_equal_a_loop(P, way, slow, ckpt):
    """Five questions fill a batch and begin another; the first and the last one are looked at."""
    torch.manual_seed(0)
    questions, token_bytes = torch.randint(50, (5, 4, 320)), torch.randint(1, 6, (50,))
    fast = scores(models(ckpt)[way].double(), questions, P, token_bytes)
    assert fast.shape == (5, 4)
    model = models(ckpt)['-' if way == '-' else 'rerouted'].double()  # a plain Lory
    for i in (0, 4):
        for k, window in enumerate(questions[i]):
            prompt, text = window[256 - P:256], window[256:]
            assert_close(fast[i, k].item(), slow(model, prompt, text) / token_bytes[text].sum().item())


def test_the_ways_differ_and_a_self_model_has_one():
    torch.manual_seed(0)
    ckpt, asked = checkpoint(), torch.randint(50, (1, 4, 320))
    ways = [scores(model, asked, 128, torch.ones(50)) for model in models(ckpt).values()]
    assert (ways[0] - ways[1]).abs().min() > 1e-3
    assert list(models(checkpoint(first_segment='self'))) == ['prompt']
    with pytest.raises(UserError, match='MyFFN'):
        models(ckpt | {'layer': 'MyFFN'})


# --- The questions. ---

def test_questions_are_what_the_docstring_says():
    rng = np.random.default_rng(0)
    length, domain = rng.integers(100, 1500, 40), rng.integers(0, 2, 40).astype(np.uint8)
    split = documents(length, domain)
    asked = make_questions(split, 1, 100, 7)
    assert asked.shape == (100, 4, 320)
    assert torch.equal(asked, make_questions(split, 1, 100, 7))
    assert not torch.equal(asked, make_questions(split, 1, 100, 8))
    prompt, texts = asked[..., :256], asked[..., 256:]
    assert (prompt == prompt[:, :1]).all()
    assert (texts != EOT).all()
    assert (texts.diff() == 1).all()  # each is a piece of one document
    assert (texts[:, 0, 0] == prompt[:, 0, -1] + 1).all()  # the first one follows the prompt
    doc = np.searchsorted(split.start, texts[..., 0].numpy(), 'right') - 1  # (100, 4)
    assert (domain[doc] == 1).all()
    assert all(len(set(row)) == 4 for row in doc)
    place = texts[..., 0] - torch.from_numpy(split.start[doc])  # (100, 4)
    assert (place == place[:, :1]).all()
    assert len(texts[:, 0, 0].unique()) == 100


def test_no_question_where_texts_are_equal_or_documents_too_few():
    assert len(make_questions(documents([500] * 5, tokens=np.ones(2500, '<u2')), 0, 10, 0)) == 0
    assert len(make_questions(documents([500] * 3), 0, 10, 0)) == 0
    assert len(make_questions(documents([500] * 5), 1, 10, 0)) == 0
    assert len(make_questions(documents([319] * 5), 0, 10, 0)) == 0
    assert len(make_questions(documents([320] * 5), 0, 10, 0)) == 5  # each document, once


@pytest.mark.parametrize('sign', [1, -1])
def test_length_in_bytes_tells_nothing(sign):
    """Documents have very different lengths, and tokens of very different sizes."""
    rng = np.random.default_rng(0)
    split = documents(rng.integers(320, 2000, 50))
    token_bytes = torch.from_numpy(np.repeat(rng.random(50), np.diff(split.start)))  # (V,)
    asked = make_questions(split, 0, 10_000, 0)
    assert len(asked) > 500
    assert share_right(sign * token_bytes[asked[..., 256:]].sum(-1)) == pytest.approx(0.25, abs=0.03)


# --- The figures. ---

def test_a_model_that_knows_the_text_answers_and_random_weights_guess():
    """Each document goes round a circle of eight tokens of its own."""
    tokens = np.concatenate([1 + 8 * doc + np.arange(450) % 8 for doc in range(6)]).astype('<u2')
    split = documents([450] * 6, tokens=tokens)
    asked = make_questions(split, 0, 100, 0)
    assert len(asked) == 18
    model = Lory(small(block_size=320, segment_len=50))
    optimizer = model.optimizer(1e-2, 0.0, (0.9, 0.95))
    texts = torch.from_numpy(split.tokens.astype(np.int64)).view(6, 450)
    for _ in range(60):
        loss = model(texts[:, :150], texts[:, 1:151])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ckpt = checkpoint() | {'model': model.state_dict()}
    for way in models(ckpt).values():
        assert share_right(scores(way, asked, 64, torch.ones(50))) > 0.9

    rng = np.random.default_rng(0)
    split = documents([1000] * 30, tokens=rng.integers(1, 50, 30_000).astype('<u2'))
    asked = make_questions(split, 0, 120, 0)
    for way in models(checkpoint()).values():
        assert share_right(scores(way, asked, 64, torch.ones(50))) == pytest.approx(0.25, abs=0.12)


def test_a_tie_is_no_answer():
    assert share_right(torch.tensor([[1.0, 1, 0, 0], [2, 1, 0, 0], [0, 1, 0, 0], [3, 2, 2, 2]])) == 0.5


@pytest.mark.parametrize('right, n, low, high', [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_equals_newcombe_1998(right, n, low, high):
    """Statistics in Medicine 17, p. 857, Table I, method 3."""
    assert wilson(right / n, n) == pytest.approx((low, high), abs=1e-4)


def test_main(tmp_path, monkeypatch, capsys):
    """Two seeds of a finished run, one unfinished, one given by name; and all stay when it runs again."""
    monkeypatch.chdir(tmp_path)
    rng, tokenizer = np.random.default_rng(0), prepare.make_tokenizer('byte')
    docs = [prepare.Document(''.join(map(chr, rng.integers(97, 123, 400))), domain, '')
            for domain in 'ab' for _ in range(5)]
    prepare.save_dataset(tmp_path / 'data' / 'builtin', {'train': docs, 'val': docs}, tokenizer,
                         {'domains': ['a', 'b']})
    for run, E, seed, step in (('runs/dense-1', 1, 1, 9), ('runs/dense-2', 1, 2, 9), ('runs/e8-1', 4, 1, 8),
                               ('mine', 4, 1, 8)):
        model = Lory(small(vocab_size=257, n_experts=E, block_size=320), seed=seed)
        save_checkpoint(f'{run}/ckpt.pt', model, tokenizer, step=step, args=dict(seed=seed, max_iters=9))
    argv = ['--questions=6', '--result=r.json', '--checkpoint', 'mine/ckpt.pt']
    downstream.main(argv)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / 'r.json').read_text())
    assert list(result['runs']) == ['runs/dense-1/ckpt.pt', 'runs/dense-2/ckpt.pt', 'mine/ckpt.pt']
    assert {'torch', 'dtype', 'data', 'seed'} < set(result)
    assert result['questions'] == {'a': 6, 'b': 6}
    accuracy = result['runs']['mine/ckpt.pt']['accuracy']
    assert list(accuracy) == ['prompt', 'rerouted']
    for way in accuracy.values():
        assert list(way) == ['64', '64, gained', '128', '128, gained', '256', '256, gained']
        assert all(of['all'] == pytest.approx((of['a'] + of['b']) / 2) for of in way.values())
    lines = [line for line in printed.splitlines() if line.startswith('|')]
    assert len(lines) == 2 + 6 + 12
    assert len({line.count('|') for line in lines}) == 1
    assert all(line.endswith('(2) |') for line in lines[2:8])  # dense, both seeds

    monkeypatch.setattr(downstream, 'measure', None)
    downstream.main(argv)
    assert capsys.readouterr().out == printed
    with pytest.raises(UserError, match='r.json'):
        downstream.main(['--questions=5', '--result=r.json'])
