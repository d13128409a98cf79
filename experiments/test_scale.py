"""
Tests for large models that need no GPU: devices, synchronisations, graphs, and a model that is born sharded.

    python -m pytest -q experiments/test_scale.py
"""
import gc
import os
import subprocess
import sys
from argparse import Namespace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import train
from experiments.parallel import load_averages, shard, wrap
from lory import Lory, LoryConfig, UserError, read_checkpoint, save_checkpoint
from shard import update

ADAM = dict(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
SHAPE = dict(block_size=24, n_layer=2, n_head=2, n_embd=16, ffn_hidden=24, n_experts=4, segment_len=6)


def config(**changes):
    return LoryConfig(**{**SHAPE, 'vocab_size': 50, **changes})


def test_a_run_on_a_card_in_a_process_of_its_own():
    command = [sys.executable, '-m', 'pytest', '-q', f'{HERE}/card.py']
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


# --- One graph. ---

@pytest.mark.parametrize('n_experts', [1, 4])
def test_forward_compiles_as_one_graph_once(n_experts):
    """Through updates in and after dense warm-up."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    model, idx = Lory(config(n_experts=n_experts)), torch.randint(50, (2, 25))
    running = torch.compile(model, backend=graphs, fullgraph=True)
    plain, optimizer = Lory(config(n_experts=n_experts)), model.optimizer(**ADAM)
    other = plain.optimizer(**ADAM)
    for i in range(6):
        loss = update(model, running, optimizer, idx, tied=i < 3)
        assert_close(loss, update(plain, plain, other, idx, tied=i < 3))
    assert graphs.frame_count == 1


@pytest.mark.parametrize('shard', [False, True])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_wrapped_model_is_compiled(shard, checkpointing, tmp_path, monkeypatch):
    """What torch.compile skips is no error, only slower. The blocks of a sharded model share one graph."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=graphs))
    plain, idx = Lory(config(), seed=1), torch.randint(50, (2, 25))
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        with torch.device('meta' if shard else 'cpu'):
            model = Lory(config(), seed=1)
        args = Namespace(compile=True, shard=shard, activation_checkpointing=checkpointing, seed=1)
        running = wrap(model, args, 'cpu', 1)
        loss = update(model, running, model.optimizer(**ADAM), idx, tied=False)
    finally:
        dist.destroy_process_group()
    assert_close(loss, update(plain, plain, plain.optimizer(**ADAM), idx, tied=False))
    assert graphs.frame_count == 1


# --- Born sharded, and filled from a file. ---

def rank_of_four(rank, folder):
    """A rank of a sharded model, from its first number to its file and back; fewer experts than ranks."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=4)
    with pytest.raises(UserError, match='divisible'), torch.device('meta'):
        shard(Lory(config(n_embd=18, n_head=1)), 'cpu', 4, seed=1)
    for tied in (True, False):
        shape, name = config(tie_embeddings=tied, n_experts=3), f'{folder}/tied-{tied}.pt'
        with torch.device('meta'):
            model = Lory(shape)
        args = Namespace(shard=True, compile=False, activation_checkpointing=False, seed=1337)
        wrap(model, args, 'cpu', 4)
        assert (model.head.weight is model.embed.weight) == tied
        whole = Lory(shape)
        same(model.state_dict(), whole.state_dict())
        # The file is of one process that has trained.
        optimizer, idx = whole.optimizer(**ADAM), torch.arange(25)[None]
        for i in range(3):
            update(whole, whole, optimizer, idx, tied=False)
        if rank == 0:
            weights, averages = get_state_dict(whole, optimizer, options=train.WHOLE)
            save_checkpoint(name, whole, None, weights, optimizer=averages)
        dist.barrier()
        saved = read_checkpoint(name)
        set_model_state_dict(model, model.fitted(saved['model']), options=train.WHOLE)
        sharded = model.optimizer(**ADAM)
        load_averages(model, sharded, saved['optimizer']['state'])
        same(model.state_dict(), whole.state_dict())
        for p, q in zip(model.parameters(), whole.parameters()):
            assert isinstance(p, DTensor) and p.to_local().numel() < p.numel()
            same(sharded.state[p], optimizer.state[q])
        weights, averages = get_state_dict(model, sharded, options=train.WHOLE)
        if rank == 0:  # what it would write is what it has read
            saved = read_checkpoint(name)
            same(weights, saved['model'])
            same(averages['state'], saved['optimizer']['state'])
    model = sharded = None  # gloo may abort the process at exit if they outlive the process group
    gc.collect()
    dist.destroy_process_group()


def same(found, expected):
    """Bit for bit, wherever the pieces lie."""
    gather = lambda t: t.full_tensor() if isinstance(t, DTensor) else t
    whole = torch.utils._pytree.tree_map(gather, dict(found))
    assert_close(whole, dict(expected), rtol=0, atol=0)


def test_a_model_is_born_sharded_and_resumes_bit_for_bit(tmp_path):
    mp.spawn(rank_of_four, args=(str(tmp_path),), nprocs=4)
