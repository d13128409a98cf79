"""
A run on a card that is not there: no tensor on a wrong device, and no needless waiting.

    python -m pytest -q experiments/card.py

torch without CUDA cannot differentiate fake tensors on 'cuda', but it lets a device be made in Python. Under
FakeTensorMode its tensors have a shape and a device and no numbers, and an operation that mixes devices
raises. A process that has made such a device is good for nothing else, so test_scale.py runs this in its own.
"""
import os
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import prepare
import train
from lory import Lory, LoryConfig, draw

SHAPE = dict(block_size=24, n_layer=2, n_head=2, n_embd=16, ffn_hidden=24, n_experts=4, segment_len=6)


class Card(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


@pytest.fixture(scope='module')
def card():
    _setup_privateuseone_for_python_backend('card', Card())
    library = torch.library.Library('_', 'IMPL', 'AutocastPrivateUse1')
    library.fallback(torch.library.fallthrough_kernel)  # autocast reaches our code, and torch's stays float32
    yield 'card'
    library._destroy()


def on_card(model):
    """Module.to cannot move fake tensors."""
    moved = {p: torch.nn.Parameter(p.detach().to('card')) for p in model.parameters()}
    for module in model.modules():
        module._parameters.update({name: moved[p] for name, p in module._parameters.items() if p is not None})
    model.to = lambda device: model
    return model


class Synchronizations(TorchDispatchMode):
    """Counts by function of the repository where the host waits for the card: a number is read, or a tensor
    moves to main memory. Each number read is 1."""

    def __init__(self):
        super().__init__()
        self.where = Counter()

    def note(self):
        frame = sys._getframe(2)
        while os.path.basename(frame.f_code.co_filename) not in ('train.py', 'lory.py'):
            frame = frame.f_back
        self.where[frame.f_code.co_name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        on_card = isinstance(args[0] if args else None, torch.Tensor) and args[0].device.type == 'card'
        if func is torch.ops.aten._local_scalar_dense.default:
            if on_card:
                self.note()
            return True if args[0].dtype == torch.bool else 1
        out = func(*args, **(kwargs or {}))
        if on_card and isinstance(out, torch.Tensor) and out.device.type == 'cpu':
            self.note()
        return out


@pytest.fixture
def fake_run(monkeypatch, card):
    """Runs train.main on the card, with random tokens and no files. -> where it waited for the card"""
    tokens = np.random.default_rng(0).integers(50, size=800, dtype=np.uint16)
    text = SimpleNamespace(tokens=tokens, start=np.array([0, 300, 800]), domain=np.array([0, 1]))
    data = SimpleNamespace(train=text, val=text, tokenizer=None,
                           meta=dict(domains=['a', 'b'], sha256={}, train=dict(bytes=900)))
    waits = Synchronizations()

    def as_list(tensor):  # one copy to main memory; FakeTensor itself would read number by number
        if tensor.device.type == card:
            waits.note()
        return np.zeros(tensor.shape).tolist()
    tensor = torch.tensor  # it copies to the device below the level of fake tensors
    for owner, name, value in (
            (torch, 'tensor', lambda numbers, device=None, **kw: tensor(numbers, **kw).to(device)),
            (prepare, 'load_dataset', lambda path, L: data),
            (prepare, 'token_bytes', lambda tokenizer: [1] * 50),
            (prepare, 'load_tokenizer', lambda tokenizer: SimpleNamespace(decode=str)),
            (train, 'plot', lambda *a: None), (train, 'write_log', lambda *a: None),
            (train, 'save_checkpoint', lambda *a, **kw: None), (FakeTensor, 'tolist', as_list),
            (FakeTensor, 'numpy', lambda tensor: np.ones(tensor.shape))):
        monkeypatch.setattr(owner, name, value)

    def run(*flags):
        waits.where.clear()
        with FakeTensorMode(allow_non_fake_inputs=True), waits:
            shape = [f'--{name}={n}' for name, n in SHAPE.items()]
            assert train.main([*shape, '--dataset=fake', '--device=card', '--out_dir=nowhere', *flags],
                              build=lambda config, seed: on_card(Lory(config, seed=seed))) == 0
        return dict(waits.where)
    return run


def test_a_run_on_a_card_mixes_no_devices_and_waits_once_an_update(fake_run):
    """Through dense warm-up, validation, generation and saving. Twice as long, and validated on twice as many
    windows, a run waits once more for each update and no more for each window."""
    flags = ['--dense_warmup=.5', '--eval_interval=99', '--dtype=bfloat16', '--n_layer=1']
    short = fake_run(*flags, '--max_iters=2', '--eval_windows=4')
    long = fake_run(*flags, '--max_iters=4', '--eval_windows=8')
    print(short, long)
    assert short['over_ranks'] == 2 and short['evaluate'] == 4  # once for each of two domains, and twice
    assert long == short | dict(over_ranks=4)


def test_decoding_on_a_card_mixes_no_devices_and_never_waits(card):
    with FakeTensorMode(), Synchronizations() as waits:
        model = on_card(Lory(LoryConfig(50, **SHAPE | dict(block_size=12))))
        idx = torch.zeros(2, 9, dtype=torch.int64, device=card)
        logits, _, caches = model.prefill(idx)
        for _ in range(8):  # past block_size
            logits = model.decode(draw(logits, 1.0, 5, 0.9), caches)
        assert logits.device.type == card and waits.where.total() == 0
