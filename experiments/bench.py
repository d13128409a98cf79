"""
What do merged experts cost? Training steps of Lory against its dense baseline, alternating in one
process, medians.

    python experiments/bench.py                           the default size and width 256, CPU or GPU
    python experiments/bench.py --size paper --compile    the paper's 0.3B shape, for a GPU: bf16, L 4096

Then it profiles the matrix products in a step of dense and of 8 experts, to tell what the difference is
made of. Writes experiments/bench-<size>-<device>-<dtype>.json (with --compile fewer variants, and -compiled
at the end of the name) and draws assets/bench.png from the two sizes' bfloat16 files; with --variants it
only prints.
"""
import json
import os
import platform
import statistics
import sys
import time
from contextlib import contextmanager

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import lory
from lory import Lory, LoryConfig, LoryFFN, add_flag, atomic_open, make_parser, run_script
from token_moe import BalancedLory, ExpertChoiceFFN, MixtralFFN, SwitchFFN, TokenChoiceFFN
from train import PRESETS, pick_device

HERE = os.path.dirname(os.path.abspath(__file__))
VARIANTS = {  # name -> what differs from the size's config
    'dense': dict(n_experts=1),
    **{f'E={E}': dict(n_experts=E) for E in (2, 8, 16, 32)},
    **{f'E=8 T={T}': dict(n_experts=8, segment_len=T) for T in (64, 128, 512)},
    'E=32 T=64': dict(n_experts=32, segment_len=64),
    'E=8 kept': dict(n_experts=8),
    'E=8 expert choice': dict(n_experts=8),
    'E=8 switch': dict(n_experts=8),
    'E=8 mixtral': dict(n_experts=8),
}
LAYERS = {  # of variants that have no LoryFFN
    'E=8 expert choice': ExpertChoiceFFN,
    'E=8 switch': SwitchFFN,
    'E=8 mixtral': MixtralFFN,
}
PAPER = {name: value for name, value in PRESETS['0.3b'].items() if hasattr(LoryConfig, name)}
SIZES = {  # name -> config, sequences a step
    'default': (dict(), 4),
    'width256': (dict(n_layer=4, n_head=4, n_embd=256), 16),
    'paper': (PAPER | dict(vocab_size=32000), 4),
}
PEAK = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12}  # bfloat16 FLOP/s, by the cards' data sheets
FEW = ['dense', 'E=8', 'E=32', 'E=8 kept']  # at the paper's size and compiled, where each takes long


@contextmanager
def formula(name):
    """'E=8 kept' runs the plain formula, whose merged weights autograd keeps until the backward pass."""
    ours = lory.merged_linear
    if name.endswith('kept'):
        lory.merged_linear = lambda x, e, theta: x @ lory.merge(e, theta)
    try:
        yield
    finally:
        lory.merged_linear = ours


def clock(device):
    if 'cuda' in device:
        torch.cuda.synchronize()
    return time.perf_counter()


class Subject:
    """One variant: model, optimiser, and the times of its steps."""

    def __init__(self, name, config, batch, device, dtype, compiled):
        self.name, self.device, self.times = name, device, []
        ffn = LAYERS.get(name, LoryFFN)
        build = BalancedLory if issubclass(ffn, TokenChoiceFFN) else Lory
        self.model = build(LoryConfig(**config), ffn=ffn).to(device)
        self.running = torch.compile(self.model) if compiled else self.model
        self.optimizer = self.model.optimizer(1e-3, 0.1, (0.9, 0.95))
        self.autocast = torch.autocast(device.split(':')[0], dtype=dtype, enabled=dtype != torch.float32)
        torch.manual_seed(0)
        shape = self.model.config
        self.idx = torch.randint(shape.vocab_size, (batch, shape.block_size + 1), device=device)

    def step(self):
        with formula(self.name):
            t = [clock(self.device)]
            with self.autocast:
                loss = self.running(self.idx[:, :-1], self.idx[:, 1:])[1]
            t.append(clock(self.device))
            loss.backward()
            t.append(clock(self.device))
            self.optimizer.step()
            with torch.profiler.record_function('updated'):
                self.optimizer.zero_grad(set_to_none=True)
            t.append(clock(self.device))
        self.times.append([b - a for a, b in zip(t, t[1:])])  # forward, backward, optimiser

    def peak_memory(self):
        """Bytes a step holds at most, beyond parameters, optimiser state and the gradients that are
        finished by then. (On CUDA beyond all gradients, finished or not, so a little less.)"""
        if 'cuda' in self.device:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            gradients = sum(p.numel() * p.element_size() for p in self.model.parameters())
            return torch.cuda.max_memory_allocated() - before - gradients

        def finished(p):
            with torch.profiler.record_function(f'gradient {p.numel() * p.element_size()}'):
                pass
        hooks = [p.register_post_accumulate_grad_hook(finished) for p in self.model.parameters()]
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            self.step()
        for hook in hooks:
            hook.remove()
        held = gradients = peak = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == '[memory]':
                held += event.nbytes()
                peak = max(peak, held - gradients)
            elif event.name().startswith('gradient '):
                gradients += int(event.name().split()[1])
            elif event.name() == 'updated':  # from here on gradients are released
                break
        return peak


def products(subject, steps=5):
    """Matrix product -> what it takes in a step, ms, amid the rest of the step. On CUDA the kernels'
    own time."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if 'cuda' in subject.device:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        for _ in range(steps):
            subject.step()
    times = {}
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key in ('aten::mm', 'aten::bmm'):
            name = ' x '.join(str(tuple(shape)) for shape in event.input_shapes[:2])
            own = event.self_device_time_total if 'cuda' in subject.device else event.self_cpu_time_total
            times[name] = round(own / 1000 / steps, 3)
    return times


def flops_per_token(model, L):
    """FLOPs of a training step per token: two for a multiply-add, six with the backward pass. Merging and
    recomputation do not count as useful work."""
    lookup = 0 if model.config.tie_embeddings else model.embed.weight.numel()
    attention = model.config.n_layer * model.config.n_embd * L  # causal scores and sums
    return 6 * (model.num_params(active=True) - lookup + attention)


def merging(model, L):
    """FLOPs that merging adds to a training step, per token: E/T of the FFN's (App. B)."""
    E, T = model.config.n_experts, min(model.config.segment_len, L)
    if E == 1 or model.ffn_name != 'LoryFFN':
        return 0
    return 6 * E / T * sum(p[0].numel() for p in model.parameters() if p.dim() == 3)


def measure(names, config, batch, device, dtype, rounds, compiled):
    """Alternating steps of these variants, dense the first of them. -> a row each"""
    subjects = [Subject(name, config | VARIANTS[name], batch, device, dtype, compiled) for name in names]
    for subject in subjects:  # warm up, and compile
        subject.step()
        subject.step()
        subject.times.clear()
    for _ in range(rounds):  # alternating, so that drift hits all alike
        for subject in subjects:
            subject.step()
    dense, L = subjects[0], subjects[0].model.config.block_size
    card = torch.cuda.get_device_name() if 'cuda' in device else ''
    peak = next((flops for name, flops in PEAK.items() if name in card), None)
    rows = []
    for subject in subjects:
        total = [sum(t) for t in subject.times]
        ratios = [sum(d) / t for d, t in zip(dense.times, total)]  # round by round, then the median
        quartiles = statistics.quantiles(ratios, n=4)
        parts = [statistics.median(t) * 1000 for t in zip(*subject.times)]
        flops = flops_per_token(subject.model, L)
        speed = batch * L / statistics.median(total)
        rows.append(dict(variant=subject.name, params=subject.model.num_params(), tok_s=speed,
                         ratio=statistics.median(ratios), ratio_q1=quartiles[0], ratio_q3=quartiles[2],
                         bound=flops_per_token(dense.model, L) / (flops + merging(subject.model, L)),
                         forward_ms=parts[0], backward_ms=parts[1], optimizer_ms=parts[2],
                         flops_per_token=flops, utilization=peak and speed * flops / peak))
    for subject, row in zip(subjects, rows):  # last, for dense's times must stay as they are
        row['peak_mb'] = subject.peak_memory() / 1e6
        if subject.name in ('dense', 'E=8'):
            row['products'] = products(subject)
    return rows


def report(rows):
    """Print a row for each variant, and what the extra time is made of."""
    print(f'{"variant":18} {"params":>12} {"tok/s":>9} {"of dense":>8} {"quartiles":>13} {"bound":>6} '
          f'{"forward":>8} {"backward":>8} {"optim":>6} {"peak MB":>8} {"util":>5}')
    for r in rows:
        print(f'{r["variant"]:18} {r["params"]:12,} {r["tok_s"]:9,.0f} {r["ratio"]:8.3f}  '
              f'{r["ratio_q1"]:.3f}-{r["ratio_q3"]:.3f} {r["bound"]:6.3f} {r["forward_ms"]:8.1f} '
              f'{r["backward_ms"]:8.1f} {r["optimizer_ms"]:6.1f} {r["peak_mb"]:8.1f} '
              f'{r["utilization"] or float("nan"):5.2f}')
    # Extra time a step, E experts over dense, as a fixed part and a part per expert: least squares over E.
    by = {r['variant']: sum(r[k] for k in ('forward_ms', 'backward_ms', 'optimizer_ms')) for r in rows}
    E = [E for E in (2, 8, 16, 32) if f'E={E}' in by]
    if len(E) > 1:
        slope, fixed = statistics.linear_regression(E, [by[f'E={e}'] - by['dense'] for e in E])
        print(f'extra time over dense: {fixed:.2f} ms fixed + {slope:.3f} ms an expert, '
              f'of {by["dense"]:.1f} ms')
    for r in rows:
        for name, ms in r.get('products', {}).items():
            print(f'{r["variant"]:8} {name:40} {ms:8.2f} ms')


def main():
    parser = make_parser(__doc__)
    parser.add_argument('--size', nargs='+', default=['default', 'width256'], choices=SIZES,
                        help='shapes of the model (default: %(default)s)')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS,
                        help="beside dense (default: the size's own)")
    add_flag(parser, 'rounds', 11, 'timed steps of each variant', low=2)
    add_flag(parser, 'batch', 0, "sequences a step; 0: the size's own")
    add_flag(parser, 'device', 'auto', 'auto, cpu, cuda')
    add_flag(parser, 'dtype', 'auto', 'of the matmuls', choices=['auto', 'float32', 'bfloat16', 'float16'])
    add_flag(parser, 'compile', False, 'torch.compile the models')
    args = parser.parse_args()
    device, dtype = pick_device(args)
    torch._dynamo.config.recompile_limit = 64  # every variant is a shape of its own
    for size in args.size:
        config, batch = SIZES[size]
        batch = args.batch or batch
        own = FEW if args.compile or size == 'paper' else VARIANTS
        names = list(dict.fromkeys(['dense', *(args.variants or own)]))
        rows = []
        # All side by side, but at the paper's size, where 32 experts leave room for dense alone.
        for group in [['dense', name] for name in names[1:]] if size == 'paper' else [names]:
            rows += measure(group, config, batch, device, dtype, args.rounds, args.compile)[bool(rows):]
        shape = LoryConfig(**config)
        print(f'\n{size}: {config}, {batch} x {shape.block_size} tokens a step, {device}, {dtype}, '
              f'{torch.get_num_threads()} threads, compiled {args.compile}, medians of {args.rounds} rounds')
        report(rows)
        if args.variants:
            continue
        machine = f'{platform.machine()}, {torch.get_num_threads()} threads'
        result = dict(size=size, config=config, batch=batch,
                      device=torch.cuda.get_device_name() if 'cuda' in device else machine, dtype=str(dtype),
                      compiled=args.compile, torch=torch.__version__, rounds=args.rounds, rows=rows)
        compiled = '-compiled' if args.compile else ''
        name = f'bench-{size}-{device.split(":")[0]}-{str(dtype)[6:]}{compiled}.json'
        with atomic_open(f'{HERE}/{name}', 'w') as f:
            json.dump(result, f, indent=1)
    if not args.variants:
        draw()


def draw():
    """assets/bench.png: tokens/s as a share of dense, against E and against T, beside the arithmetic
    bound."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained', sharey=True)
    for size, color in (('default', 'C0'), ('width256', 'C1')):
        path = f'{HERE}/bench-{size}-cpu-bfloat16.json'
        if not os.path.exists(path):
            return
        with open(path) as f:
            rows = {r['variant']: r for r in json.load(f)['rows']}
        for a, names in zip(ax, ({E: f'E={E}' for E in (2, 8, 16, 32)},
                                 {T: 'E=8' if T == 256 else f'E=8 T={T}' for T in (64, 128, 256, 512)})):
            got = [rows[name] for name in names.values()]
            middle = [r['ratio'] for r in got]
            spread = [[r['ratio'] - r['ratio_q1'] for r in got], [r['ratio_q3'] - r['ratio'] for r in got]]
            a.errorbar(list(names), middle, spread, marker='o', capsize=3, color=color, label=size)
            a.plot(list(names), [r['bound'] for r in got], ':', color=color,
                   label=f'{size}, arithmetic bound')
            a.set_xscale('log', base=2)
            a.set_xticks(list(names), [str(n) for n in names])
    ax[0].set(xlabel='experts (T = 256)', ylabel='tokens/s, share of dense', ylim=(0.5, 1.05))
    ax[1].set(xlabel='segment length (8 experts)')
    ax[0].legend(fontsize=8)
    for a in ax:
        a.axhline(1, color='0.7', lw=0.8)
    with atomic_open(f'{os.path.dirname(HERE)}/assets/bench.png') as f:
        fig.savefig(f, format='png', dpi=110)


if __name__ == '__main__':
    run_script(main)
