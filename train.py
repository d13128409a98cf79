"""
Train a Lory, or its dense baseline, from top to bottom of this file.

    python train.py                                    the built-in corpus, prepared if missing; ten minutes, two cores
    python train.py --n_experts=1 --out_dir=out-dense  the dense model of equal active size
    python train.py --init_from=resume                 go on where the last run stopped
    torchrun --nproc_per_node=8 train.py               data parallel, CUDA or CPU; --shard=True splits the model too

Leaves in out_dir: ckpt.pt (the latest), best.pt (the best validation), log.csv, loss.png and experts.png (routing
weights by layer and domain, Fig. 6). Ctrl-C saves; a run killed at any moment goes on from its latest ckpt.pt and ends
as if it had never stopped, bit for bit on a CPU.
"""
import argparse
import base64
import csv
import ctypes
import errno
import gc
import glob
import itertools
import math
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

try:
    import fcntl
except ImportError:                                                  # Windows
    fcntl = None

import prepare
from lory import Lory, LoryConfig, UserError, add_flags, atomic_open, boolean, load_checkpoint, \
    save_checkpoint, upcycle, usable_device

# The paper's models and schedule (Sec. 4.1, G.3): 1M tokens a step, 150B in all. With --n_experts=8, 16 or 32 they are
# its 0.3B/8E and so on. ffn_hidden and untied embeddings are read off its parameter counts.
PAPER = dict(block_size=4096, segment_len=256, first_segment='self', tie_embeddings=False, batch_size=256,
             max_iters=143_000, learning_rate=2e-4)
PRESETS = {
    '0.3b': dict(PAPER, n_layer=24, n_embd=1024, n_head=16, ffn_hidden=2816),
    '1.5b': dict(PAPER, n_layer=48, n_embd=1536, n_head=24, ffn_hidden=4096),
}

# Dense bf16 FLOP/s of cards whose data sheets we know, for the share of it that a run reaches (mfu in the log).
PEAK = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, usage='python train.py [--flag=value ...], see --help')

    def flag(name, default, help, **kw):
        parser.add_argument(f'--{name}', default=default, type=kw.pop('type', type(default)),
                            help=f'{help} (default: {default})', **kw)

    flag('preset', '', "start from a model of the paper, other flags override it", choices=['', *PRESETS])
    flag('dataset', 'builtin', 'folder under data/ that prepare.py made')
    flag('out_dir', 'out', 'where the run leaves its checkpoint, log and plots')
    flag('init_from', 'scratch', 'scratch; resume, to go on from out_dir/ckpt.pt; or a checkpoint file to start from')
    flag('max_iters', 6000, 'updates in the whole run')
    flag('batch_size', 4, 'sequences in an update, over all ranks and accumulation steps')
    flag('gradient_accumulation_steps', 1, "pieces that each rank cuts its share of the batch into, to save memory")
    flag('learning_rate', 3e-3, 'peak of the cosine schedule')
    flag('min_lr_ratio', 0.1, 'its end, as a share of the peak')
    flag('warmup', 0.05, 'share of the run in which the learning rate climbs (Sec. 4.1)')
    flag('dense_warmup', 0.05, 'share of the run trained dense before upcycling; 0 starts with experts (Sec. 4.1)')
    flag('weight_decay', 0.1, "AdamW's, on matrices")
    flag('beta1', 0.9, "AdamW's")
    flag('beta2', 0.95, "AdamW's")
    flag('grad_clip', 1.0, 'gradient norm above which the gradient is scaled down; 0: never')
    flag('eval_interval', 750, 'updates between validations, each of which saves ckpt.pt')
    flag('eval_windows', 0, 'validation windows of each domain, evenly spaced, the same ones every time; 0: all')
    flag('log_interval', 50, 'updates between log lines, over which experts in use are counted')
    flag('device', 'auto', 'auto, cpu, cuda, cuda:1, mps')
    flag('dtype', 'auto', 'of the matmuls; auto: bfloat16 where the processor has it',
         choices=['auto', 'float32', 'bfloat16', 'float16'])
    flag('compile', False, 'torch.compile the model', type=boolean)
    flag('shard', False, 'split parameters, gradients and optimiser state over the ranks (Sec. 4.1)', type=boolean)
    flag('seed', 1337, 'of the weights and of the order of the data')
    add_flags(parser, LoryConfig)
    return parser


def pick_device(args):
    """-> device, autocast dtype."""
    device = args.device
    if 'LOCAL_RANK' in os.environ and (device == 'cuda' or device == 'auto' and torch.cuda.is_available()):
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
    device = usable_device(device)
    dtype = args.dtype
    if dtype == 'auto':
        cpu = getattr(torch.cpu, 'get_capabilities', dict)()
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if 'cuda' in device else \
            device == 'cpu' and (cpu.get('avx512_bf16') or cpu.get('amx_bf16'))
        dtype = 'bfloat16' if fast else 'float32'
    return device, getattr(torch, dtype)


def keep_memory(device):
    """glibc hands large blocks back to the kernel and faults them in again, page by page, at each step. Told to keep
    them (M_MMAP_MAX = 0, M_TRIM_THRESHOLD = 2 GB), the default model trains 1.4 times as fast on a CPU."""
    if device == 'cpu' and sys.platform == 'linux' and hasattr(ctypes.CDLL(None), 'mallopt'):
        ctypes.CDLL(None).mallopt(-4, 0)
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Data: windows of L + 1 tokens over the stream, each a function of (seed, sequence number) alone, so that the position
# in the data is one integer, ranks read disjoint windows and a resumed run reads what it would have read.

@lru_cache(maxsize=2)
def window_starts(n_tokens, L, seed, epoch):
    """First token of each of an epoch's windows, shuffled: they tile the stream from a random offset. (n_windows,)"""
    n = max(1, (n_tokens - L) // L)
    rng = np.random.default_rng([seed, epoch])
    offset = rng.integers(min(L, n_tokens - n * L))
    return offset + L * rng.permutation(n)


def get_batch(tokens, first, count, L, seed, device):
    """Sequences number first .. first + count - 1 of the endless training stream. -> x, y, each (count, L) int64"""
    n = len(window_starts(len(tokens), L, seed, 0))
    starts = [window_starts(len(tokens), L, seed, i // n)[i % n] for i in range(first, first + count)]
    return to_xy([tokens[s:s + L + 1] for s in starts], device)


def to_xy(windows, device):
    xy = torch.from_numpy(np.stack(windows).astype(np.int64))        # (B, L + 1)
    xy = xy.pin_memory().to(device, non_blocking=True) if 'cuda' in device else xy.to(device)
    return xy[:, :-1], xy[:, 1:]


def validation_windows(split, n_domains, L, limit=0):
    """The non-overlapping windows of each domain's own text, or `limit` evenly spaced ones of them, if that is not 0.
    -> per domain a list of (L + 1,) token arrays"""
    windows = []
    for d in range(n_domains):
        docs = np.flatnonzero(split.domain == d)                     # contiguous: prepare.py writes domain by domain
        lo, hi = (split.start[docs[0]], split.start[docs[-1] + 1]) if len(docs) else (0, 0)
        starts = range(lo, hi - L, L) or range(lo, hi - 1, L)        # a domain shorter than a window is one short one
        if 0 < limit < len(starts):
            starts = [starts[i * len(starts) // limit] for i in range(limit)]
        windows.append([split.tokens[s:min(s + L + 1, hi)] for s in starts])
    return windows


@torch.no_grad()
def evaluate(model, windows, token_bytes, args, device, autocast):
    """Validation per domain, every time on the same windows.

    Returns a float64 tensor (n_domains, 2, 3) of nats, tokens and bytes, [:, 0] over all positions and [:, 1] after
    segment 1, and the routing weights averaged per domain (Sec. 5.4) over the segments after the first, (n_domains,
    n_layer, E).
    """
    model.eval()
    sums = torch.zeros(len(windows), 2, 3, dtype=torch.float64)      # on the CPU: mps has no float64
    routing = torch.zeros(len(windows), model.config.n_layer, model.config.n_experts, device=device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batch = max(1, args.batch_size // (world * args.gradient_accumulation_steps))
    for d, chosen in enumerate(windows):
        for i in range(0, len(chosen), world * batch):
            mine = chosen[i + rank * batch:][:batch]
            x, y = to_xy(mine or chosen[:1], device)                 # one without windows runs along: shards need all
            with autocast:
                logits, _, e = model(x, return_routing=True)
            if not mine:
                continue
            nats = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction='none').view(y.shape)
            size = token_bytes[y]                                    # (B, L); <|endoftext|> has no bytes: not counted
            terms = torch.stack([nats * (size > 0), (size > 0).float(), size.float()])   # (3, B, L)
            sums[d, 0] += terms.sum((1, 2)).cpu()
            sums[d, 1] += terms[:, :, args.segment_len:].sum((1, 2)).cpu()
            e = e[:, :, 1:] if e.shape[2] > 1 else e                 # (B, n_layer, N - 1, E)
            routing[d] += e.mean(2).sum(0) / len(chosen)             # (n_layer, E)
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
        dist.all_reduce(routing)
    model.train()
    return sums.cpu(), routing.cpu()


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind: one row of log.csv per log line, and two pictures drawn from it and from the last routing.

def write_log(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_open(path, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows(rows)


def plot(out_dir, rows, routing, domains):
    """loss.png from the log; experts.png from routing (n_domains, n_layer, E), as the paper's Fig. 6."""
    import matplotlib  # here, for it takes a second that --help should not
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(1, 2, figsize=(11, 3.8), layout='constrained')
    train, val = [r for r in rows if 'loss' in r], [r for r in rows if 'val_bpb' in r]
    ax[0].plot([r['step'] for r in train], [r['loss'] for r in train], color='0.3', lw=1.2)
    ax[0].set(xlabel='step', ylabel='training loss (nats per token)')
    for name in domains:
        ax[1].plot([r['step'] for r in val], [r[f'bpb_{name}'] for r in val], marker='.', label=name)
    ax[1].plot([r['step'] for r in val], [r['val_bpb'] for r in val], 'k--', label='mean')
    ax[1].set(xlabel='step', ylabel='validation (bits per byte)')
    ax[1].legend()
    with atomic_open(f'{out_dir}/loss.png') as f:
        fig.savefig(f, format='png', dpi=110)

    n_layer, E = routing.shape[1:]
    fig, axes = plt.subplots(1, n_layer, figsize=(1 + 3 * n_layer, 1.2 + 0.35 * len(domains)), squeeze=False,
                             layout='constrained')
    for layer, a in enumerate(axes[0]):
        image = a.imshow(routing[:, layer], vmin=0, vmax=max(2 / E, routing.max()), cmap='viridis', aspect='auto')
        a.set(title=f'layer {layer + 1}', xlabel='expert', xticks=range(0, E, max(1, E // 8)),
              xticklabels=range(1, E + 1, max(1, E // 8)), yticks=range(len(domains)), yticklabels=domains if layer == 0 else [])
    fig.colorbar(image, ax=axes, label='mean routing weight')
    with atomic_open(f'{out_dir}/experts.png') as f:
        fig.savefig(f, format='png', dpi=110)
    plt.close('all')


def learning_rate(step, args):
    """Linear warm-up, then a cosine from learning_rate to min_lr_ratio of it at max_iters (Sec. 4.1)."""
    warmup = args.warmup * args.max_iters
    if step < warmup:
        return args.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, args.max_iters - warmup)
    return args.learning_rate * (args.min_lr_ratio + (1 - args.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2)


# ----------------------------------------------------------------------------------------------------------------------
# One run among many processes: who may write to out_dir, and a model split over the ranks.

def claim(out_dir):
    """Make out_dir and keep it for this process as long as it lives and the returned file is open. UserError if another has
    it."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        if not os.access(out_dir, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        lock = open(f'{out_dir}/.lock', 'w')
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in ('ckpt.pt', 'best.pt', 'log.csv', 'loss.png', 'experts.png'):     # left half-written by a killed run
            for half in glob.glob(f'{glob.escape(out_dir)}/{name}.*.tmp'):
                os.remove(half)
    except BlockingIOError:
        raise UserError(f'another run is at work in {out_dir}: wait for it, or choose another --out_dir.') from None
    except OSError as e:
        raise UserError(f'cannot write to {out_dir!r} ({e.strerror}); choose another --out_dir.') from e
    return lock


def shard(model, optimizer):
    """Split both over the ranks, in place (FSDP2: ZeRO, stage 3). Of every parameter, gradient and average a rank keeps
    one part; a block's parameters are gathered while it runs. -> the optimiser of the parts"""
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    state = optimizer.state_dict()
    optimizer.param_groups.clear()                                   # it would keep the whole parameters in memory
    optimizer.state.clear()
    # Along the first dimension that the ranks divide; there may be fewer experts than ranks.
    evenly = lambda p: Shard(next((d for d, n in enumerate(p.shape) if n % mesh.size() == 0), 0))
    for part in (*model.blocks, model):                              # one by one to the device: all may not fit there
        fully_shard(part, mesh=mesh, shard_placement_fn=evenly)
    optimizer = model.optimizer(0.0, 0.0, (0.0, 0.0))                # the state below brings the true ones
    for i, p in enumerate(p for group in optimizer.param_groups for p in group['params']):
        for name, t in state['state'].get(i, {}).items():
            if t.dim():                                              # averages; Adam's count of steps is a scalar
                state['state'][i][name] = distribute_tensor(t, mesh, p.placements, src_data_rank=None)
    optimizer.load_state_dict(state)
    return optimizer


def gather(state):
    """A state dict with every tensor that `shard` split put together again. All ranks must call it; rank 0 gets it, on the
    CPU, the others a dict without them."""
    if isinstance(state, dict):
        return {name: gather(part) for name, part in state.items()}
    if not isinstance(state, DTensor):
        return state
    state = state.full_tensor()
    return state.cpu() if dist.get_rank() == 0 else None


def main(argv=None):
    # --- settings ---
    parser = make_parser()
    args = parser.parse_args(argv)
    checkpoint, best = f'{args.out_dir}/ckpt.pt', f'{args.out_dir}/best.pt'
    model_fields = LoryConfig.__dataclass_fields__
    if args.preset and args.init_from != 'scratch':
        raise UserError(f'init_from={args.init_from} brings its own settings: leave --preset out.')
    if args.preset:
        parser.set_defaults(**PRESETS[args.preset])
    if args.init_from == 'resume':
        # The run's own settings become the defaults, so that only what is to change need be said again.
        latest = best if os.path.exists(best) and not os.path.exists(checkpoint) else checkpoint
        model, ckpt = load_checkpoint(latest)
        if not {'optimizer', 'args', 'step', 'rows', 'since_line', 'rng', 'data'} <= ckpt.keys():      # --save_dense's
            raise UserError(f'{latest} is a model without a run: start from it with --init_from={latest}.')
        parser.set_defaults(**ckpt['args'] | dict(out_dir=args.out_dir))
    elif os.path.exists(checkpoint) or os.path.exists(best):
        raise UserError(f'{args.out_dir} holds a run: go on with --init_from=resume, or choose another --out_dir.')
    elif args.init_from != 'scratch':
        model, ckpt = load_checkpoint(args.init_from)
        parser.set_defaults(**{name: value for name, value in ckpt['config'].items() if name != 'vocab_size'})
    args = parser.parse_args(argv)
    if args.init_from == 'resume':
        for name, was in ckpt['args'].items():
            fixed = {*model_fields, 'dataset', 'batch_size', 'dense_warmup', 'seed', 'eval_windows'}
            if name in fixed and getattr(args, name) != was:
                raise UserError(f'the run in {args.out_dir} has {name}={was}, which cannot change: leave --{name} out, '
                                'or start another run with another --out_dir.')
        changed = [f'{name} {was} -> {getattr(args, name)}' for name, was in ckpt['args'].items()
                   if name not in ('init_from', 'out_dir') and getattr(args, name) != was]
        if args.max_iters < ckpt['step']:
            raise UserError(f'the run in {args.out_dir} is at step {ckpt["step"]}: raise --max_iters above it.')
    for names, low, top in (('max_iters batch_size gradient_accumulation_steps eval_interval log_interval', 1, 10**9),
                            ('learning_rate min_lr_ratio warmup dense_warmup beta1 beta2', 0, 1),
                            ('weight_decay grad_clip eval_windows seed', 0, 2**63)):
        for name in names.split():
            if not low <= getattr(args, name) < top:
                raise UserError(f'{name}={getattr(args, name)} must be at least {low} and below {top}.')
    config = LoryConfig(**{name: value for name, value in vars(args).items() if name in model_fields})

    # --- processes and device ---
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    share, rest = divmod(args.batch_size, world * args.gradient_accumulation_steps)
    if rest or not share:
        raise UserError(f'batch_size={args.batch_size} must be a multiple of {world} ranks x '
                        f'gradient_accumulation_steps={args.gradient_accumulation_steps}.')
    device, dtype = pick_device(args)
    if args.shard and world == 1:
        raise UserError('shard=True splits a model over several ranks: start it with torchrun, or say --shard=False.')
    if args.shard and (dtype == torch.float16 or args.compile):
        raise UserError('shard=True goes neither with float16 nor with compile: say --dtype=bfloat16 and --compile=False.')
    if 'cuda:' in device:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group('nccl' if 'cuda' in device else 'gloo')

    def say(text):
        if rank == 0:
            try:
                print(text, flush=True)
            except OSError:                                          # whoever read this is gone; the run goes on
                sys.stdout = open(os.devnull, 'w')

    autocast = torch.autocast(device.split(':')[0], dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.split(':')[0], enabled=dtype == torch.float16)
    torch.set_float32_matmul_precision('high')                       # TF32 for what autocast leaves in float32
    keep_memory(device)

    # --- data ---
    lock = claim(args.out_dir) if rank == 0 else None                # held as long as this name is
    wanted = args.dataset == 'builtin' and args.init_from != 'resume' and not os.path.exists('data/builtin/meta.json')
    if wanted and rank == 0:
        prepare.main([])
    if world > 1:
        dist.barrier()
    data = prepare.load_dataset(f'data/{args.dataset}', args.block_size)
    domains, vocab_size = data.meta['domains'], data.meta['vocab_size']
    windows = validation_windows(data.val, len(domains), args.block_size, args.eval_windows)
    size = [len(base64.b64decode(token)) for token in data.tokenizer['tokens']]
    token_bytes = torch.tensor(size + [0] * (vocab_size - len(size)), device=device)   # (V,), special tokens have none
    identity = data.meta['sha256']                                   # of tokenizer and bins: resuming needs the same

    # --- model and optimiser ---
    torch.manual_seed(args.seed)
    config = replace(config, vocab_size=vocab_size)
    dense_steps = int(args.dense_warmup * args.max_iters) if config.n_experts > 1 else 0
    # What a run carries on: its step, the rows of log.csv, and since the last log line, at step `since`, the sum of its
    # losses and which experts were in use.
    if args.init_from == 'resume':
        if ckpt['data'] != identity:
            raise UserError(f'data/{args.dataset} is not what the run in {args.out_dir} was trained on: prepare it as '
                            'before, or start another run with another --out_dir.')
        step, rows, since, loss_sum, in_use = ckpt['step'], ckpt['rows'], *ckpt['since_line']
    else:
        if args.init_from == 'scratch':
            model = Lory(replace(config, n_experts=1) if dense_steps else config)
        elif ckpt.get('tokenizer') != data.tokenizer or model.config not in (config, replace(config, n_experts=1)):
            # A dense one may become experts, as in upcycling.
            raise UserError(f'{args.init_from} has another tokenizer than data/{args.dataset} or another shape than '
                            'the flags say: prepare the data with its tokenizer, and leave out flags of its shape.')
        step, rows, since, loss_sum, in_use = 0, [], 0, 0.0, torch.zeros(config.n_layer, config.n_experts)
    optimizer = model.optimizer(args.learning_rate, args.weight_decay, (args.beta1, args.beta2))
    if args.init_from == 'resume':
        optimizer.load_state_dict(dict(optimizer.state_dict(), state=ckpt['optimizer']['state']))   # its flags may be new
        if scaler.is_enabled() and ckpt['scaler']:
            scaler.load_state_dict(ckpt['scaler'])
        torch.set_rng_state(ckpt['rng'])
    ckpt = None                                                      # all its weights and averages would stay in memory

    def distribute(model, optimizer):
        """-> optimiser, and the model as the loop runs it. `model` keeps its parameters' names: checkpoints know no
        wrappers."""
        split = args.shard and model.config.n_experts == config.n_experts   # a dense warm-up fits without
        if split:
            optimizer = shard(model, optimizer)
        else:
            model.to(device)
            optimizer.load_state_dict(optimizer.state_dict())        # its averages follow the parameters
        running = torch.compile(model) if args.compile else model
        if world > 1 and not split:
            running = DDP(running, device_ids=[device] if 'cuda' in device else None, gradient_as_bucket_view=True)
        return optimizer, running

    optimizer, running = distribute(model, optimizer)
    if args.init_from == 'resume':
        say(f'resumed   {latest} at step {step:,}' + ''.join(f'; {change}' for change in changed))
    tokens_per_step = args.batch_size * args.block_size
    say(f'data      {args.dataset}: {len(data.train.tokens):,} training tokens, {len(domains)} domains, '
        f'vocabulary {vocab_size:,}')
    say(f'model     {config.n_layer} layers, width {config.n_embd}, {config.n_experts} experts, segments of '
        f'{config.segment_len}, first segment {config.first_segment}')
    planned = args.max_iters * tokens_per_step
    say(f'training  {args.max_iters:,} steps x {args.batch_size} sequences x {args.block_size} tokens = '
        f'{planned:,} tokens, {planned / len(data.train.tokens):.2g} epochs, on {world} x {device} in '
        f'{str(dtype)[6:]}{", sharded" if args.shard else ""}')
    if step < dense_steps and model.config.n_experts == 1:
        say(f'          the first {dense_steps} steps dense: {model.num_params():,} parameters')
    seconds, timed = 0.0, 0                                          # seconds and steps since the last log line
    in_use = in_use.to(device)                                       # (n_layer, E), 1 for an expert in use
    # Of two experts neither can exceed 2/E; expert choice merges none; the only segment is routed by no text.
    counted = config.n_experts > 2 and config.routing != 'expert_choice' and config.segment_len < config.block_size
    # Under the paper's rule segment 1 sees ahead, so such a model is judged by what comes after it, if anything does.
    ahead = config.first_segment == 'self' and config.n_experts > 1 and config.routing != 'expert_choice'
    peak = next((flops for card, flops in PEAK.items() if 'cuda' in device and dtype != torch.float32
                 and card in torch.cuda.get_device_name(device)), None)
    batches = (get_batch(data.train.tokens, (i * world + rank) * share, share, args.block_size, args.seed, device)
               for i in itertools.count(step * args.gradient_accumulation_steps))
    x, y = next(batches)

    def save(is_best=False, routing=None):
        """Leave the run's state in out_dir. All ranks gather it, and wait until rank 0 has written it."""
        if world > 1:
            dist.all_reduce(in_use, dist.ReduceOp.MAX)
        # The ranks draw alike, so one random state serves them all.
        state = dict(config=model.config, state=gather(model.state_dict()), optimizer=gather(optimizer.state_dict()),
                     args=vars(args), step=step, rows=rows, since_line=(since, loss_sum, in_use.cpu()),
                     scaler=scaler.state_dict(), rng=torch.get_rng_state(), data=identity, tokenizer=data.tokenizer)
        if rank == 0:                                                # ckpt.pt comes last: killed before, all is made again
            if is_best:
                save_checkpoint(best, **state)
            write_log(f'{args.out_dir}/log.csv', rows)
            if routing is not None:
                plot(args.out_dir, rows, routing.numpy(), domains)
            save_checkpoint(checkpoint, **state)
        if world > 1:
            dist.barrier()

    asked, stop, signals = [], False, {signal.SIGINT, signal.SIGTERM}                # these stop the run at a step's end
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.add(signal.SIGHUP)                                   # the terminal was closed, and nohup not asked for
    for number in signals:
        signal.signal(number, lambda *_: asked.append(1))
    if args.compile and hasattr(signal, 'pthread_sigmask'):
        # Ctrl-C reaches the C++ compiler too and would fail the step. It inherits this mask; another thread hears for us.
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    while True:
        # --- dense warm-up ends (Sec. 4.1, G.3) ---
        if step >= dense_steps and model.config.n_experts < config.n_experts:
            if args.shard:                                           # all experts at once may fit on no device
                model.cpu()
                optimizer.load_state_dict(optimizer.state_dict())
            model, optimizer = upcycle(model, config.n_experts, optimizer)
            optimizer, running = distribute(model, optimizer)
            say(f'step {step:6d} | the dense FFN becomes {config.n_experts} experts: {model.num_params():,} parameters, '
                f'{model.num_params(active=True):,} active')

        # --- validate and save; a resumed run has done both for its first step ---
        last = step == args.max_iters
        done = bool(rows) and rows[-1]['step'] == step and 'val_bpb' in rows[-1]
        if (step % args.eval_interval == 0 or last) and not done:
            sums, routing = evaluate(model, windows, token_bytes, args, device, autocast)
            bpb = sums[..., 0] / sums[..., 2] / math.log(2)          # (n_domains, 2)
            ppl = (sums[..., 0] / sums[..., 1]).exp()                # (n_domains, 2)
            row = dict(step=step, val_bpb=bpb[:, 0].nanmean().item(), later_bpb=bpb[:, 1].nanmean().item())
            for d, name in enumerate(domains):
                row |= {f'bpb_{name}': bpb[d, 0].item(), f'ppl_{name}': ppl[d, 0].item(),
                        f'later_bpb_{name}': bpb[d, 1].item(), f'later_ppl_{name}': ppl[d, 1].item()}
            rows.append(row)
            later = f', {row["later_bpb"]:.4f} after segment 1' if args.segment_len < args.block_size else ''
            later += ', which sees ahead' if ahead and model.config.n_experts > 1 else ''
            say(f'step {step:6d} | validation {row["val_bpb"]:.4f} bits per byte{later} | ' +
                ', '.join(f'{name} {row[f"bpb_{name}"]:.3f}' for i, name in enumerate(domains) if windows[i]))
            if not math.isfinite(row['val_bpb']):
                raise UserError(f'step {step}: the validation loss is not finite; {checkpoint} was left as it was.')
            judged = 'later_bpb' if ahead and math.isfinite(row['later_bpb']) else 'val_bpb'
            save(row[judged] == min(r[judged] for r in rows if judged in r), routing)
        if last:
            break

        # --- one update ---
        t0 = time.time()
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, args)
        totals = torch.zeros(2, device=device)                       # loss, and whether this process was asked to stop
        for i in range(args.gradient_accumulation_steps):
            if isinstance(running, DDP):                             # ranks exchange gradients once, at the last piece
                running.require_backward_grad_sync = i == args.gradient_accumulation_steps - 1
            with autocast:
                piece, e = running(x, y, return_routing=True)[1:]    # (), (B, n_layer, N, E)
            x, y = next(batches)                                     # made ready while a GPU still computes
            scaler.scale(piece / args.gradient_accumulation_steps).backward()
            totals[0] += piece.detach() / args.gradient_accumulation_steps
            # In use: above 2/E for some routed segment (App. G.1). Before upcycling e is (B, n_layer, N, 1), all ones.
            if model.config.n_experts > 1:
                in_use = in_use.maximum((e[:, :, 1:] > 2 / config.n_experts).any(2).any(0).float())   # (n_layer, E)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        totals[1] = len(asked)
        if world > 1:                                                # so that all ranks report, fail and stop alike
            dist.all_reduce(totals)
        loss, stop = (totals / world).tolist()
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise UserError(f'step {step}: loss {loss:.4f}, gradient norm {norm:.4f}; {checkpoint} was left as it was: '
                            'go on from it with --init_from=resume and a lower --learning_rate, or start anew with one.')
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        seconds, timed, loss_sum, step = seconds + time.time() - t0, timed + 1, loss_sum + loss, step + 1

        # --- report ---
        if step % args.log_interval == 0:
            if world > 1:
                dist.all_reduce(in_use, dist.ReduceOp.MAX)
            per_step, loss = seconds / timed, loss_sum / (step - since)  # both are means since the last line
            rows.append(dict(step=step, loss=loss, lr=group['lr'], norm=norm, ms=1000 * per_step,
                             tok_s=tokens_per_step / per_step, experts=in_use.mean().item() if counted else ''))
            left = int(per_step * (args.max_iters - step))
            extra = f'experts in use {100 * in_use.mean():3.0f}% | ' if counted and model.config.n_experts > 1 else ''
            if 'cuda' in device:
                flops = tokens_per_step / per_step * model.flops_per_token(args.block_size) / world
                extra += f'mfu {f"{100 * flops / peak:.0f}%" if peak else "n/a"} | ' \
                         f'{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB | '
            say(f'step {step:6d} | loss {loss:.4f} | lr {group["lr"]:.2e} | norm {norm:5.2f} | {1000 * per_step:6.0f} ms'
                f' | {tokens_per_step / per_step:8,.0f} tok/s | {extra}{left // 60}:{left % 60:02d} left')
            seconds, timed, since, loss_sum, in_use = 0.0, 0, step, 0.0, torch.zeros_like(in_use)

        if stop:
            save()
            break

    for number in signals:                                           # all is saved; let it end in peace
        signal.signal(number, signal.SIG_IGN)
    command = f'{"torchrun ..." if world > 1 else "python"} train.py --init_from=resume --out_dir={args.out_dir}'
    say(f'stopped at step {step}, saved; go on with: {command}' if stop else
        f'done: {args.out_dir}/ has ckpt.pt, best.pt, log.csv, loss.png and experts.png; now try: python sample.py '
        f'--out_dir={args.out_dir}')
    if world > 1:
        model = optimizer = running = None                           # a wrapper that outlives its process group may abort
        gc.collect()
        dist.destroy_process_group()
    return 130 if stop else 0


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')                         # a terminal may lack a character
    speaker = os.environ.get('LOCAL_RANK', '0') == '0'               # one process of a machine reports what all run into
    try:
        sys.exit(main())
    except UserError as e:
        if speaker:
            print(f'train.py: {e}', file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e):
            print('train.py: out of memory: raise --gradient_accumulation_steps, or make the model smaller.', file=sys.stderr)
        elif 'closed by peer' in str(e) or 'reset by peer' in str(e):
            print('train.py: another process of this run has died; go on from the latest ckpt.pt with --init_from=resume.',
                  file=sys.stderr)
        elif type(e).__module__.startswith(('torch._inductor', 'torch._dynamo')):
            print(f'train.py: torch.compile failed ({type(e).__name__}): it needs a C++ compiler; or say --compile=False, and '
                  '--init_from=resume if the run has begun.', file=sys.stderr)
        else:
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        print('\ntrain.py: stopped before the first step.', file=sys.stderr)
        sys.exit(130)
