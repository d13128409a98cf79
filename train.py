"""
Train a Lory, or its dense baseline.

    python train.py                                    on the built-in corpus, prepared if missing
    python train.py --n_experts=1 --out_dir=out-dense  the dense model of equal active size
    python train.py --init_from=resume                 go on where the run in out/ stopped
    torchrun --nproc_per_node=4 train.py               data parallel, GPUs or CPUs; --shard splits the model

A run leaves in out_dir: ckpt.pt (latest), best.pt (least validation loss, segment 1 not counted), log.csv,
loss.png and, after dense warm-up, experts.png (Fig. 6). Ctrl-C saves and stops. A killed run goes on from
ckpt.pt as if never stopped, on a CPU bit for bit.
"""
import gc
import math
import os
import signal
import statistics
import time
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import timedelta
from functools import lru_cache, partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

import prepare
from experiments.parallel import keep_freed_memory, load_averages, wrap
from experiments.report import plot, write_log
from lory import (Lory, LoryConfig, UserError, add_flag, make_parser, read_checkpoint, run_script,
                  save_checkpoint, usable_device)

# Two of the paper's models, with its schedule (Sec. 4.1, G.3). With --n_experts=1 they are its dense ones.
PAPER = dict(block_size=4096, segment_len=256, first_segment='self', tie_embeddings=False, batch_size=256,
             max_iters=143_000, learning_rate=2e-4)
PRESETS = {'': {},
           '0.3b': dict(PAPER, n_layer=24, n_embd=1024, n_head=16, ffn_hidden=2816),
           '1.5b': dict(PAPER, n_layer=48, n_embd=1536, n_head=24, ffn_hidden=4096)}
MODEL = {f.name: f for f in fields(LoryConfig) if 'help' in f.metadata}  # the fields that have a flag
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)  # unsharded, on the CPU


def flags():
    parser = make_parser(__doc__)
    flag = partial(add_flag, parser)
    flag('preset', '', 'start from a model of the paper; other flags override it', choices=list(PRESETS))
    flag('dataset', 'builtin', 'folder under data/ that prepare.py made')
    flag('out_dir', 'out', 'where the run leaves its checkpoints, log and pictures; one run at a time')
    flag('init_from', 'scratch', 'scratch; resume: go on from out_dir/ckpt.pt; or a checkpoint to start from')
    flag('max_iters', 6000, 'updates in the whole run; resuming with more stretches the schedule', low=1)
    flag('batch_size', 4, 'sequences in an update, all ranks and accumulation steps together', low=1)
    flag('gradient_accumulation_steps', 1, 'forward passes of an update on each rank, to save memory', low=1)
    flag('learning_rate', 3e-3, 'peak of the cosine schedule', below=1)
    flag('min_lr_ratio', 0.1, 'final learning rate, as a share of learning_rate')
    flag('warmup', 0.05, 'share of the run in which the learning rate climbs', below=1)
    flag('dense_warmup', 0.05, 'share of the run in which all experts are kept equal (Sec. 4.1)', below=1)
    flag('weight_decay', 0.1, "AdamW's weight decay, on matrices")
    flag('beta1', 0.9, "decay of AdamW's mean gradient", below=1)
    flag('beta2', 0.95, "decay of AdamW's mean squared gradient", below=1)
    flag('grad_clip', 1.0, 'gradient norm above which gradients are scaled down; 0: never')
    flag('eval_interval', 750, 'updates between validations; a validation saves ckpt.pt', low=1)
    flag('eval_windows', 0, 'validation windows of each domain, evenly spaced; 0: all')
    flag('log_interval', 50, 'updates between log lines, which give the mean loss and the median time', low=1)
    flag('device', 'auto', 'auto, cpu, cuda, cuda:1, mps')
    flag('dtype', 'auto', 'number type of the matmuls; auto: bfloat16 on a CUDA GPU or x86 CPU that has it',
         choices=['auto', 'float32', 'bfloat16', 'float16'])
    flag('compile', False, 'torch.compile the model')
    flag('activation_checkpointing', False, 'run each block again in the backward pass, to save memory')
    flag('shard', False, 'split parameters, gradients and optimiser state over the ranks (Sec. 4.1)')
    flag('seed', 1337, 'random seed of the weights and of the order of the data', below=2**32)
    for name, f in MODEL.items():
        flag(name, f.default, **f.metadata)
    return parser


def main(argv=None, build=Lory):
    """One run -> its exit code. With build=partial(Lory, ffn=MyFFN) it trains an FFN of your own. What it
    calls stands below it, by topic: settings, an update, validation."""
    # --- settings ---
    args, config, saved = read_settings(argv)  # saved: the checkpoint that the run starts from, or None
    device, dtype = pick_device(args)  # dtype: of the matmuls; weights and Adam's averages are float32
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    pieces = args.gradient_accumulation_steps
    # An update is made of `pieces` forward passes on each rank, each of `micro` sequences.
    micro, left_over = divmod(args.batch_size, world * pieces)
    if left_over:
        raise UserError(f'batch_size must be a multiple of {world * pieces}, ranks times accumulation steps.')
    if world > 1:
        # The timeout is long enough for one rank to prepare the corpus or write a checkpoint.
        gpu = torch.device(device) if 'cuda' in device else None
        dist.init_process_group('nccl' if gpu else 'gloo', device_id=gpu, timeout=timedelta(days=7))
    autocast = torch.autocast(device.split(':')[0], dtype=dtype, enabled=dtype != torch.float32)
    # Small gradients are zero in float16. The scaler multiplies the loss, and divides the gradients again.
    scaler = torch.amp.GradScaler(device.split(':')[0], enabled=dtype == torch.float16)

    def say(text):
        if rank == 0:
            with suppress(OSError):  # stdout may be closed: Ctrl-C ends the tee of `train.py | tee`, too
                print(text)

    # --- data ---
    # Rank 0 prepares what is missing while the others wait. Then all map the same files.
    if args.dataset == 'builtin' and rank == 0 and not os.path.exists('data/builtin/meta.json'):
        say('preparing the built-in corpus, for about a minute')
        prepare.main([])
    if world > 1:
        dist.barrier()
    data = prepare.load_dataset(f'data/{args.dataset}', args.block_size)
    if args.init_from == 'resume' and saved['data'] != data.meta['sha256']:
        raise UserError(f'the run was not on data/{args.dataset}: prepare its text, or give its --dataset.')
    if saved and saved['tokenizer'] != data.tokenizer:
        raise UserError(f'the data has another tokenizer: prepare it with --tokenizer={args.init_from}.')
    # domain -> its validation windows
    windows = validation_windows(data.val, data.meta['domains'], args.block_size, args.eval_windows)
    token_bytes = torch.tensor(prepare.token_bytes(data.tokenizer), device=device)  # (V,)

    # --- model and optimiser ---
    config.vocab_size = len(token_bytes)
    with torch.device('meta' if args.shard else 'cpu'):  # on 'meta' a model takes no memory
        model = build(config, seed=args.seed)  # all experts begin equal, so it begins as the dense model
    wrapped = wrap(model, args, device, world)  # on its device; compiled, under DDP or FSDP2
    if saved:
        set_model_state_dict(model, model.fitted(saved['model'], saved['layer']), options=WHOLE)
    # Dense warm-up needs equal experts: new ones, or those filled from a dense checkpoint.
    equal = config.n_experts > 1 and (saved is None or saved['config']['n_experts'] == 1)
    tied_until = int(args.dense_warmup * args.max_iters) if equal else 0
    # Made after sharding, the optimizer holds averages of this rank's share alone.
    optimizer = model.optimizer(args.learning_rate, args.weight_decay, (args.beta1, args.beta2))
    # A run carries model, optimizer, scaler, tied_until and these three. A checkpoint holds all of it.
    step, losses, rows = 0, [], []
    if args.init_from == 'resume':
        step, losses, rows, tied_until = saved['step'], saved['losses'], saved['rows'], saved['tied_until']
        load_averages(model, optimizer, saved['optimizer']['state'])
        scaler.load_state_dict(saved['scaler'] or scaler.state_dict())  # {} if the run was not in float16
        say(f'resumed   at step {step:,} of {args.max_iters:,}, lr {learning_rate(step, args):.2e}')
    saved = None  # free its memory
    epochs = args.max_iters * args.batch_size * args.block_size / len(data.train.tokens)
    say(f'model     {config.n_layer} layers, width {config.n_embd}, {config.n_experts} experts, segments of '
        f'{config.segment_len}: {model.num_params():,} parameters, {model.num_params(active=True):,} active')
    say(f'training  {args.max_iters:,} steps of {args.batch_size} x {args.block_size} tokens, {epochs:,.1f} '
        f'epochs of {args.dataset}, on {world} x {device} in {str(dtype)[6:]}, dense until step {tied_until}')
    if rank == 0:
        write_log(f'{args.out_dir}/log.csv', rows)  # if the folder cannot be written, fail now
    signals, stop = catch_signals(rank), False  # a list of the signals that asked to stop
    times = []  # seconds that each update took

    while step < args.max_iters and not stop:
        # --- one update ---
        began = time.perf_counter()
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group['lr'] = lr
        total = torch.zeros((), device=device)
        for i in range(pieces):
            # Sequences are numbered over the whole run and ranks take turns, so resuming needs `step` alone.
            first = ((step * pieces + i) * world + rank) * micro
            x, y = get_batch(data.train.tokens, first, micro, args, device)  # (micro, L) both
            # This tells DDP to exchange gradients after the last piece only. FSDP2 does so after each.
            wrapped.require_backward_grad_sync = i == pieces - 1
            with autocast:
                micro_loss = wrapped(x, y)[1] / pieces
            scaler.scale(micro_loss).backward()
            total += micro_loss.detach()
        scaler.unscale_(optimizer)
        tied = step < tied_until
        if tied:
            model.tie_gradients()  # dense warm-up (Sec. 4.1): equal experts get equal gradients
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if tied:
            model.tie_experts()
        step += 1
        # Of all ranks: the mean loss, the gradient norm, and whether one of them was asked to stop.
        loss, norm, stop = over_ranks(total, norm, len(signals), world)
        # In float16 gradients may overflow: the scaler has seen it, and has skipped the step.
        if not (math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())):
            raise UserError(f'loss or gradient of step {step} is not finite, and was not saved: use a lower '
                            '--learning_rate, with --init_from=resume if there is a checkpoint.')
        losses.append(loss)
        times.append(time.perf_counter() - began)

        # --- report ---
        if step % args.log_interval == 0:
            mean = statistics.fmean(losses[-args.log_interval:])
            # The loss counts <|endoftext|>, which a validation leaves out.
            bpb = mean / math.log(2) * len(data.train.tokens) / data.meta['train']['bytes']
            seconds = statistics.median(times[-args.log_interval:])
            tok_s = args.batch_size * args.block_size / seconds
            left = timedelta(seconds=round((args.max_iters - step) * seconds))
            memory = f'{torch.cuda.max_memory_allocated() / 1e9:.1f} GB | ' if 'cuda' in device else ''
            rows.append(dict(step=step, loss=mean, bpb=bpb, lr=lr, norm=norm, ms=1000 * seconds, tok_s=tok_s))
            say(f'step {step:6d} | loss {mean:.4f}, {bpb:.3f} bpb | lr {lr:.2e} | norm {norm:5.2f} | '
                f'{1000 * seconds:6.0f} ms | {tok_s:8,.0f} tok/s | {memory}{left} left')

        # --- validate ---
        validate = step % args.eval_interval == 0 or step == args.max_iters
        if validate:
            # figures: name -> value, where "later" means after segment 1. routing: for experts.png, or None.
            figures, routing = evaluate(model, windows, token_bytes, micro, autocast, tied)
            rows.append(dict(step=step, **figures))
            used = f' | experts in use {figures["experts"]:.0%}' if 'experts' in figures else ''
            domains = ', '.join(f'{name} {figures[f"bpb_{name}"]:.3f}' for name in windows)
            say(f'step {step:6d} | validation {figures["val_bpb"]:.4f} bits per byte, '
                f'{figures["later_bpb"]:.4f} after segment 1{used} | {domains}')

        # --- save ---
        if validate or stop:
            weights, averages = get_state_dict(model, optimizer, options=WHOLE)  # all ranks take part
            run = dict(step=step, losses=losses, rows=rows, tied_until=tied_until, args=vars(args),
                       optimizer=averages, scaler=scaler.state_dict(), data=data.meta['sha256'])
            if rank == 0:
                # best.pt first: after a crash between the two, resuming from the older ckpt.pt repeats this
                # validation and writes both. Segment 1 does not count: with first_segment=self it sees ahead.
                if validate and figures['later_bpb'] == min(row.get('later_bpb', math.inf) for row in rows):
                    save_checkpoint(f'{args.out_dir}/best.pt', model, data.tokenizer, weights, **run)
                save_checkpoint(f'{args.out_dir}/ckpt.pt', model, data.tokenizer, weights, **run)
                write_log(f'{args.out_dir}/log.csv', rows)
                if validate:
                    plot(args.out_dir, rows, list(windows), routing)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # for whoever called main
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if dist.is_initialized():
        wrapped = optimizer = None  # DDP may abort the process at exit if it outlives the process group
        gc.collect()
        dist.destroy_process_group()
    if step < args.max_iters:
        say(f'stopped at step {step}, saved; go on with --init_from=resume --out_dir={args.out_dir}')
        return 130
    hint = f'; now try: python sample.py --out_dir={args.out_dir}' if build is Lory else ''
    say(f'done at step {step:,}{hint}')
    return 0


# --- Settings. ---
# Flags that must equal the checkpoint's: SHAPE with --init_from=FILE, FIXED with --init_from=resume.
SHAPE = MODEL.keys() - {'block_size', 'n_experts', 'segment_len', 'routing', 'first_segment'}
FIXED = MODEL.keys() | {'preset', 'batch_size', 'dense_warmup', 'seed', 'eval_windows'}


def read_settings(argv):
    """-> flags, config, and the checkpoint that the run starts from or None. Parses twice: first to find the
    checkpoint or the preset, then with its settings as defaults."""
    parser, saved, known, fixed = flags(), None, {}, set()
    args = parser.parse_args(argv)
    if not args.out_dir:
        raise UserError('--out_dir is empty: name a folder.')
    latest, preset = f'{args.out_dir}/ckpt.pt', PRESETS[args.preset]
    if args.init_from == 'resume':
        saved, fixed = read_checkpoint(latest), FIXED
        if 'args' not in saved:
            raise UserError(f'{latest} holds no run: use --init_from={latest} and another --out_dir.')
        known, preset = saved['args'] | saved['config'] | dict(out_dir=args.out_dir), {}
    elif os.path.exists(latest):
        raise UserError(f'{args.out_dir} holds a run: use --init_from=resume, or choose another --out_dir.')
    elif args.init_from != 'scratch':
        saved, fixed = read_checkpoint(args.init_from), SHAPE
        known = saved['config']
    parser.set_defaults(**known | preset)
    args = parser.parse_args(argv)
    if args.init_from == 'resume' and args.max_iters < saved['step']:
        raise UserError(f'the run is at step {saved["step"]} already: give a higher --max_iters.')
    config = LoryConfig(**{name: getattr(args, name) for name in MODEL})
    settings = vars(args) | asdict(config)  # where ffn_hidden is no longer 0, but the width it means
    for name in sorted(fixed & known.keys()):  # an older run may lack a flag
        if settings[name] != known[name]:
            raise UserError(f'{name}={known[name]!r} of the checkpoint cannot change: leave out --{name}, or '
                            'the --preset that sets it.')
    return args, config, saved


def pick_device(args):
    """-> device, dtype of autocast. Makes the process ready for them."""
    device, dtype = args.device, args.dtype
    if device in ('auto', 'cuda') and torch.cuda.is_available():
        device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    device = usable_device(device)
    has_bfloat16 = device == 'cpu' and torch.cpu.get_capabilities().get('avx512_bf16')
    if 'cuda' in device:
        torch.cuda.set_device(device)
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == 'auto':
        dtype = 'bfloat16' if has_bfloat16 else 'float32'
    if device == 'cpu':
        keep_freed_memory()  # saves a fifth of a default step
    return device, getattr(torch, dtype)


# --- An update. Which L + 1 tokens form window i depends on the data, the seed and i alone. ---

def learning_rate(step, args):
    """Linear warm-up, then a cosine (Sec. 4.1), from learning_rate to min_lr_ratio of it at max_iters."""
    warmup = args.warmup * args.max_iters
    if step < warmup:
        return args.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / (args.max_iters - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return args.learning_rate * (args.min_lr_ratio + (1 - args.min_lr_ratio) * cosine)


@lru_cache(maxsize=3)  # get_batch asks for epoch 0, and for two where one ends
def window_starts(n_tokens, L, seed, epoch):
    """First token of each window of an epoch, (n_windows,): tiles from a random offset, shuffled."""
    # Each epoch cuts at another offset. One window is given up to make room for it.
    n_windows = max(1, (n_tokens - L) // L)
    rng = np.random.default_rng([seed, epoch])
    return rng.integers(min(L, n_tokens - n_windows * L)) + L * rng.permutation(n_windows)


def get_batch(tokens, first, count, args, device):
    """Sequences first, first + 1, ... of the endless training stream. -> x, y, (count, L) int64 both"""
    L, windows = args.block_size, []
    n_windows = len(window_starts(len(tokens), L, args.seed, 0))
    for i in range(first, first + count):
        epoch, place = divmod(i, n_windows)
        start = window_starts(len(tokens), L, args.seed, epoch)[place]
        windows.append(tokens[start:start + L + 1])
    return to_xy(windows, device)


def to_xy(windows, device):
    """Windows of L + 1 tokens -> inputs and targets, (B, L) int64 both"""
    xy = torch.from_numpy(np.stack(windows).astype(np.int64)).to(device)  # (B, L + 1)
    return xy[:, :-1], xy[:, 1:]


def catch_signals(rank):
    """-> a list that grows when Ctrl-C or SIGTERM asks the run to end. A second is KeyboardInterrupt."""
    signals = []

    def note(which, frame):
        signals.append(which)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)
        if rank == 0:
            with suppress(OSError):  # stderr may be closed; and print is unsafe in a signal handler
                os.write(2, b'\nstopping after this step, to save; once more stops without\n')
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, note)
    return signals


def over_ranks(loss, norm, n_signals, world):
    """-> mean loss, gradient norm, whether any rank was asked to stop. Waits for the device, once a step."""
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    totals = torch.stack([loss, norm, torch.full_like(loss, n_signals)])  # (3,)
    if world > 1:
        dist.all_reduce(totals)
    loss, norm, n_signals = (totals / world).tolist()
    return loss, norm, n_signals > 0


# --- Validation, always on the same windows, each domain on its own text. ---

def validation_windows(split, domains, L, limit=0):
    """Domain -> its windows of L + 1 tokens, or `limit` evenly spaced ones. A short domain is one window."""
    windows = {}
    for d, name in enumerate(domains):
        # prepare.py writes domain by domain: domain d ends where the first document of d + 1 begins.
        lo, hi = split.start[np.searchsorted(split.domain, [d, d + 1])]
        starts = range(lo, hi - L, L) or range(lo, hi - 1, L)  # up to L tokens are one short window
        if 0 < limit < len(starts):
            starts = [starts[i * len(starts) // limit] for i in range(limit)]
        if starts:
            windows[name] = [split.tokens[start:min(start + L + 1, hi)] for start in starts]
    return windows


@torch.no_grad()
@torch.compiler.set_stance('force_eager')  # shapes vary, and each would be compiled
def evaluate(model, windows, token_bytes, micro, autocast, tied=False):
    """Every rank evaluates all windows, since FSDP2 needs all ranks in a forward pass.
    -> a row for log.csv: bits per byte and perplexity of each domain, and the mean bits per byte of all
       domains, over all positions and after segment 1 ("later"). With E > 2 and unless tied, the share of
       experts in use, those whose weight exceeds 2/E in any of these windows (App. G.1: in 10 steps).
    -> mean routing weights (Sec. 5.4), (n_domains, n_layer, E), or None if dense or tied.
    Experts in use and routing weights leave out segment 1, unless there is no other."""
    n_layer, E, T = model.config.n_layer, model.config.n_experts, model.config.segment_len
    device = token_bytes.device
    figures, routing = {}, torch.zeros(len(windows), n_layer, E, device=device)
    used = torch.zeros(n_layer, E, dtype=torch.bool, device=device)
    model.eval()
    for d, (name, chosen) in enumerate(windows.items()):
        L = len(chosen[0]) - 1  # the same in all windows of a domain
        # Summed position by position, so that segment 1 can be left out at the end.
        totals = torch.zeros(3, L, device=device)  # nats, bytes and tokens
        for i in range(0, len(chosen), micro):
            x, y = to_xy(chosen[i:i + micro], device)  # (B, L) both
            with autocast:
                logits, _, e = model(x, return_routing=True)  # (B, L, V), (B, n_layer, N, E)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction='none')  # (B * L,)
            n_bytes = token_bytes[y]  # (B, L)
            counts = n_bytes > 0  # <|endoftext|> has no bytes and does not count
            totals += torch.stack([loss.view_as(y) * counts, n_bytes, counts]).sum(1)  # (3, L)
            e = e[:, :, 1:] if e.shape[2] > 1 else e  # (B, n_layer, N - 1, E), or (B, n_layer, 1, E)
            routing[d] += e.mean(2).sum(0) / len(chosen)  # (n_layer, E)
            used |= (e > 2 / E).any(2).any(0)  # (n_layer, E)
        totals = totals.cpu().double()
        for when, start in ('', 0), ('later_', T if T < L else 0):
            nats, n_bytes, n_tokens = totals[:, start:].sum(1)
            figures[f'{when}bpb_{name}'] = (nats / n_bytes / math.log(2)).item()
            figures[f'{when}ppl_{name}'] = (nats / n_tokens).exp().item()
    model.train()
    means = dict(val_bpb=statistics.fmean(figures[f'bpb_{name}'] for name in windows),
                 later_bpb=statistics.fmean(figures[f'later_bpb_{name}'] for name in windows))
    if E > 2 and not tied:  # with two experts no weight can exceed 2/E
        figures['experts'] = used.float().mean().item()
    return means | figures, None if tied or E == 1 else routing.cpu()


if __name__ == '__main__':
    run_script(main)
