"""
What E-fold parameters cost a rank, and which of torch's ways to share them out to take.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 experiments/shard.py

The same steps under plain DDP, DDP with ZeroRedundancyOptimizer (ZeRO, stage 1: the averages are split)
and FSDP2, which is what train.py --shard does (stage 3: parameters and gradients too). For each: what a
rank holds between the steps and at the end of a backward pass, the median time of a step, and the
losses. Writes experiments/shard.json.
"""
import json
import os
import statistics
import sys
import time
from argparse import Namespace

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from lory import Lory, LoryConfig, atomic_open, make_parser, run_script
from train import wrap

ADAM = dict(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))


def held(tensors):
    """Bytes of this rank's parts of tensors, in MB."""
    local = [t.to_local() if hasattr(t, 'to_local') else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local) / 1e6


def measure(way, n_experts, batch, steps=7):
    model = Lory(LoryConfig(n_experts=n_experts, n_layer=4, n_head=4, n_embd=256))
    torch.manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (batch, model.config.block_size + 1))
    mine = idx.chunk(dist.get_world_size())[dist.get_rank()]
    running = wrap(model, Namespace(shard=way == 'FSDP2', compile=False), 'cpu', dist.get_world_size())
    optimizer = model.optimizer(**ADAM)
    if way == 'ZeRO 1':
        groups = [dict(params=g['params'], weight_decay=g['weight_decay']) for g in optimizer.param_groups]
        optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, fused=True, lr=ADAM['lr'],
                                            betas=ADAM['betas'])
    times, losses = [], []
    for _ in range(steps):
        dist.barrier()
        began = time.perf_counter()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss = running(mine[:, :-1], mine[:, 1:])[1]
        loss.backward()
        gradients = held([p.grad for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    inner = optimizer.optim if way == 'ZeRO 1' else optimizer
    averages = held([t for state in inner.state.values() for t in state.values()])
    parameters = held(list(model.parameters()))
    return dict(way=way, n_experts=n_experts, params=model.num_params(), parameters_mb=parameters,
                gradients_mb=gradients, averages_mb=averages, total_mb=parameters + gradients + averages,
                step_ms=1000 * statistics.median(times[2:]), losses=losses)


def main():
    make_parser(__doc__).parse_args()
    dist.init_process_group('gloo')
    rows = [measure(way, E, batch=2) for E in (1, 8, 32) for way in ('DDP', 'ZeRO 1', 'FSDP2')]
    if dist.get_rank() == 0:
        print(f'{"experts":>7} {"params":>11} {"way":8} {"parameters":>10} {"gradients":>10} '
              f'{"averages":>10} {"MB a rank":>10} {"ms a step":>10} {"loss of the last step":>22}')
        for r in rows:
            print(f'{r["n_experts"]:7} {r["params"]:11,} {r["way"]:8} {r["parameters_mb"]:10.1f} '
                  f'{r["gradients_mb"]:10.1f} {r["averages_mb"]:10.1f} {r["total_mb"]:10.1f} '
                  f'{r["step_ms"]:10.0f} {r["losses"][-1]:22.5f}')
        result = dict(ranks=dist.get_world_size(), backend='gloo', torch=torch.__version__, rows=rows)
        with atomic_open(f'{HERE}/shard.json', 'w') as f:
            json.dump(result, f, indent=1)
    dist.destroy_process_group()


if __name__ == '__main__':
    run_script(main)
