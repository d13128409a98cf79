"""
Expert-wise model parallelism (paper, Sec. 6 and Fig. 7; proposed there, never tried), in two collectives.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 experiments/expert_parallel.py

Every rank keeps a slice of the hidden width H of *every* expert. Merging is elementwise in H, so it
stays local, and so does the merged SwiGLU up to its last sum:

    rank r:   x (B, L, D)  --all-gather-->  all ranks' x (W B, L, D)  --its H/W of the FFN-->
              y (B, L, D)  <--reduce-scatter--  the ranks' parts (W B, L, D), summed

Attention stays data parallel (each rank has its own sequences) and what travels is activations, whose
size knows nothing of E. Plain data parallelism instead sends every expert's gradient. It is not in
lory.py because one device needs none of it, and a reader should not have to read past it.

The script trains the same step both ways for several E, compares loss and gradients with a single
process, counts the bytes that cross the loopback interface, and writes
experiments/expert_parallel.json.
"""
import copy
import json
import os
import sys

import torch
import torch.distributed as dist
# Not left to DDP: first loaded after init_process_group, its defaults keep the group alive past
# destroy_process_group, and gloo's threads can abort the interpreter's exit.
import torch.distributed.nn
import torch.nn as nn

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from lory import Lory, LoryConfig, add_flag, atomic_open, make_parser, run_script


HIDDEN = dict(gate=2, up=2, down=1)  # the dimension of each matrix that is H


class AllGather(torch.autograd.Function):
    """(B, ...) of each rank -> (W B, ...) of all; what each rank's slice makes of them sums up in the
    gradient."""
    @staticmethod
    def forward(ctx, x):
        everyone = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather(list(everyone.split(len(x))), x.contiguous())
        return everyone

    @staticmethod
    def backward(ctx, g):
        return ReduceScatter.forward(ctx, g)


class ReduceScatter(torch.autograd.Function):
    """(W B, ...), a part from each rank -> this rank's (B, ...) of their sum."""
    @staticmethod
    def forward(ctx, parts):
        mine = parts.new_empty(len(parts) // dist.get_world_size(), *parts.shape[1:])
        dist.reduce_scatter(mine, list(parts.contiguous().split(len(mine))))
        return mine

    @staticmethod
    def backward(ctx, g):
        return AllGather.forward(ctx, g)


class ExpertParallel(nn.Module):
    """Stands in for a LoryFFN: the same output for this rank's sequences, from H/W of every expert on
    each rank."""

    def __init__(self, ffn):
        super().__init__()
        self.ffn = ffn
        for name, axis in HIDDEN.items():
            part = getattr(ffn, name).chunk(dist.get_world_size(), axis)[dist.get_rank()]
            setattr(ffn, name, nn.Parameter(part.clone()))

    def forward(self, x, cache=None):  # (B, L, D), and no cache: this is for training
        y, e = self.ffn(AllGather.apply(x))  # (W B, L, D), (W B, N, E): all ranks route alike
        mine = slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))
        return ReduceScatter.apply(y), e[mine]


def shard_experts(model):
    """Make the model expert-parallel, in place. Its H must be a multiple of the ranks, which ask for
    equal batches."""
    for block in model.blocks:
        block.ffn = ExpertParallel(block.ffn)


def average_gradients(model):
    """After backward. A slice of an expert has met all ranks' sequences, and is only scaled to the mean
    of their losses. All else, the router too (each rank has what its slice of H tells it), is summed
    over the ranks."""
    for name, p in model.named_parameters():
        if name.split('.')[-1] not in HIDDEN:
            dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def sent():
    """Bytes that crossed the loopback interface since the machine started (Linux)."""
    with open('/proc/net/dev') as f:
        return next(int(line.split()[1]) for line in f if line.lstrip().startswith('lo:'))


def step(model, idx):
    """Forward and backward of a mean loss. -> the loss"""
    loss = model(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    return loss.detach()


def bytes_a_step(work, steps=5):
    """What all ranks together send in one call of `work`, and not in a barrier."""
    work()
    dist.barrier()
    before = sent()
    for _ in range(steps):
        work()
    dist.barrier()
    return (sent() - before) / steps


def measure(n_experts, config, batch):
    """One row: how far the parallel step is from the single process's, and the bytes of it and of plain
    DDP."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    single = Lory(LoryConfig(n_experts=n_experts, **config))
    with torch.no_grad():  # equal experts, or routing near uniform, and E would not matter
        for block in single.blocks:
            block.ffn.router.weight.mul_(100)
            for name in HIDDEN:
                getattr(block.ffn, name).normal_(std=0.02)
    parallel, ddp = copy.deepcopy(single), copy.deepcopy(single)
    idx = torch.randint(single.config.vocab_size, (batch, single.config.block_size + 1))
    mine = idx.chunk(world)[rank]
    single_loss = step(single, idx)

    shard_experts(parallel)
    loss = step(parallel, mine) / world
    dist.all_reduce(loss)
    average_gradients(parallel)
    far = torch.zeros(1)
    grads = {name.replace('.ffn.ffn.', '.ffn.'): p.grad for name, p in parallel.named_parameters()}
    for name, p in single.named_parameters():
        axis = HIDDEN.get(name.split('.')[-1])
        true = p.grad if axis is None else p.grad.chunk(world, axis)[rank]
        far = far.maximum((grads[name] - true).norm() / true.norm())
    dist.all_reduce(far, dist.ReduceOp.MAX)

    def in_parallel():
        step(parallel, mine)
        average_gradients(parallel)
        parallel.zero_grad()
    replicated = nn.parallel.DistributedDataParallel(ddp)
    return dict(n_experts=n_experts, params=single.num_params(),
                params_a_rank=sum(p.numel() for p in parallel.parameters()),
                loss_difference=abs(loss - single_loss).item(), gradient_difference=far.item(),
                mb_expert_parallel=bytes_a_step(in_parallel) / 1e6,
                mb_data_parallel=bytes_a_step(lambda: step(replicated, mine)) / 1e6)


def main():
    parser = make_parser(__doc__)
    add_flag(parser, 'quick', False, 'a tiny size, as the tests run it; nothing is written')
    quick = parser.parse_args().quick
    dist.init_process_group('gloo')
    torch.set_num_threads(1)
    batch = 4
    tiny = dict(n_embd=32, block_size=64, segment_len=16, vocab_size=256)
    rows = [measure(4, tiny, batch)] if quick else [measure(E, dict(), batch) for E in (2, 8, 32)]
    if dist.get_rank() == 0:
        print(f'{"experts":>7} {"params":>10} {"on a rank":>10} {"loss off":>9} {"grads off":>9} '
              f'{"MB a step":>9} {"DDP":>6}')
        for r in rows:
            print(f'{r["n_experts"]:7} {r["params"]:10,} {r["params_a_rank"]:10,} '
                  f'{r["loss_difference"]:9.1e} {r["gradient_difference"]:9.1e} '
                  f'{r["mb_expert_parallel"]:9.2f} {r["mb_data_parallel"]:6.2f}')
        if not quick:
            result = dict(ranks=dist.get_world_size(), batch=batch, backend='gloo', torch=torch.__version__,
                          rows=rows)
            with atomic_open(f'{HERE}/expert_parallel.json', 'w') as f:
                json.dump(result, f, indent=1)
    dist.destroy_process_group()


if __name__ == '__main__':
    run_script(main)
