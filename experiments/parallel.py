"""
What train.py does for speed and size: recomputing, compiling, DDP, FSDP2, and memory that is kept.

With `--shard` each rank keeps a slice of every parameter, of its gradient and of Adam's averages, as in the
paper (Sec. 4.1). That is PyTorch's FSDP2, or ZeRO stage 3 (arXiv:1910.02054): a block's parameters are
gathered only while it runs. shard.py measures what it saves; see "Many GPUs" in experiments/README.md.
"""
import ctypes
import platform
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from lory import UserError


def wrap(model, args, device, world):
    """-> the model as the loop runs it, on its device. DDP wraps it, the rest changes it in place."""
    if args.activation_checkpointing:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if args.compile:
        for part in model.blocks if args.shard else [model]:
            # Not part.compile(): inside FSDP2's hooks torch would not compile a checkpointed block.
            part.forward = torch.compile(part.forward)
    if args.shard:
        shard(model, device, world, args.seed)
        return model
    model.to(device)
    return DDP(model, gradient_as_bucket_view=True) if world > 1 else model


def shard(model, device, world, seed):
    """Split a model that was made on the meta device over `world` ranks, then draw its initial weights.
    UserError if it cannot be split evenly."""
    uneven = model.config.n_embd % world or model.config.ffn_hidden % world
    if uneven or not dist.is_initialized() or list(model.buffers()):
        raise UserError('--shard needs torchrun with two or more ranks, n_embd and ffn_hidden divisible by '
                        'their number, and FFNs without buffers: change these, or say --shard=False.')
    mesh = dist.init_device_mesh(device.split(':')[0], (world,))
    # Experts are not split along E: each rank holds a slice of all, so tie_gradients needs no other rank.
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, shard_placement_fn=lambda p: Shard(1 if p.dim() > 1 else 0))
    model.to_empty(device=device)
    with implicit_replication():  # each rank keeps its share of what is drawn
        model.init_weights(seed)


def keep_freed_memory():
    """glibc hands large freed blocks back to the kernel, which faults them in again at each step. Here it is
    told to keep them: M_MMAP_MAX = 0, M_TRIM_THRESHOLD = 2 GB. Other C libraries are left as they are."""
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).mallopt(-4, 0)
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)


def load_averages(model, optimizer, state):
    """Adam's averages from a checkpoint, one by one, for a sharded model or a whole one. torch's own function
    holds all of them twice."""
    params = dict(model.named_parameters())
    for name, averages in state.items():  # in the file's order, which the next file keeps
        p = params[name]
        for key, value in averages.items():  # exp_avg and exp_avg_sq have the shape of p, step has ()
            if isinstance(p, DTensor) and value.dim() > 0:
                value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
            optimizer.state[p][key] = value.to(p.device, copy=True)
