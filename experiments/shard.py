"""
What a sharded model needs: measured on CPU ranks, and by a formula for the paper's models on GPUs.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 experiments/shard.py   measures, with 2 ranks or with 4
    python experiments/shard.py                                          prints the formula's table

The first trains a small model with the functions of train.py, each part in fresh processes: sharded from its
first number through warm-up, its end and a save; resumed from that file; and under DDP for comparison. It
takes the peak of each rank's resident memory in each part. The second checks the activations of the formula
against fake tensors. Both write to experiments/shard.json.
"""
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from dataclasses import replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import train
from experiments.parallel import load_averages, wrap
from lory import Lory, LoryConfig, atomic_open, make_parser, read_checkpoint, run_script, save_checkpoint

RESULTS, FILE = f'{HERE}/shard.json', 'ckpt.pt'
# As many layers as the paper's largest has, so that a block is as small a share. Few tokens leave activations
# small.
SMALL = dict(n_layer=48, n_head=4, n_embd=256, ffn_hidden=640, n_experts=8, block_size=8, segment_len=2)


# --- The formula. ---

def activations(config, micro, word=2, fused=True):
    """Bytes that a forward pass keeps for the backward pass, under autocast with words of 2 bytes.
    A fused RMSNorm, as on a GPU, keeps its float32 input; torch's on a CPU also what it makes of it.
    -> a block's, those of the last norm, head and loss"""
    D, H, E, V = config.n_embd, config.ffn_hidden, config.n_experts, config.vocab_size
    tokens, nh = micro * config.block_size, config.n_head
    norm = 4 * D + 4 if fused else 8 * D + 4
    # Its input, qkv, q and k turned, the output twice; the softmax's sums; sines and cosines.
    attention = word * 8 * D + 4 * nh + word * 2 * D // nh
    # Its input, which `checkpoint` keeps in float32; gate, silu(gate), up, their product.
    ffn = 4 * D + word * 4 * H if E > 1 else word * (2 * D + 4 * H)
    weights = 4 * D * D + (0 if E > 1 else 3 * D * H)  # rounded by autocast. Merged weights are not kept
    block = tokens * (2 * norm + attention + ffn) + (word * weights if word < 4 else 0)
    rest = tokens * (norm + word * D + 4 * V + 8) + (word * V * D if word < 4 else 0)
    return block, rest


known = {}


def sizes(config):
    """-> parameters of the model, of a block"""
    if str(config) not in known:
        with torch.device('meta'):
            model = Lory(replace(config, n_layer=1))
        block = sum(p.numel() for p in model.blocks[0].parameters())
        known[str(config)] = model.num_params() + (config.n_layer - 1) * block, block
    return known[str(config)]


def needs(config, world, micro=1, word=2, fused=True, recompute=False):
    """Bytes of a rank while it trains with gradient accumulation, by what they are for. `recompute`: blocks
    keep their input alone, and run again in the backward pass."""
    P, block = sizes(config)
    root = P - config.n_layer * block  # embedding, last norm and head, gathered throughout
    kept, rest = activations(config, micro, word, fused)
    layers = config.n_layer * kept
    if recompute:
        layers = config.n_layer * 4 * micro * config.block_size * config.n_embd + kept
    # When a block's gradients are sent, there are four whole copies in float32: the gradients, these with the
    # sharded dimension in front, these in order of rank, and the next block's parameters. And the result.
    sent = 4 * block * 4 + 4 * block // world
    # The loss: log-softmax, its gradient and that of the logits. Blocks are not gathered then.
    loss = 2 * micro * config.block_size * 4 * config.vocab_size
    return dict(parameters=4 * P // world, gradients=4 * P // world, averages=8 * P // world,
                gathered=2 * 4 * root + max(0, sent - loss), activations=layers + rest, loss=loss)


def moved(P, world):
    """Bytes that a rank receives for a micro-batch when sharded, and for an update under DDP."""
    return 3 * 4 * P * (world - 1) // world, 2 * 4 * P * (world - 1) // world


def kept_by_fake_tensors(config, micro):
    """Bytes of the distinct storages that autograd saves in a forward pass, without the parameters."""
    with FakeTensorMode():
        model, saved = Lory(config), {}
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(t):
            saved[t.untyped_storage()._cdata] = t  # held, so that no address is used twice
            return t
        idx = torch.zeros(micro, config.block_size, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with torch.autocast('cpu', torch.bfloat16):
                model(idx, idx)
        return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)


def paper(preset, n_experts):
    shape = {k: v for k, v in train.PRESETS[preset].items() if k in LoryConfig.__dataclass_fields__}
    return LoryConfig(vocab_size=32_000, n_experts=n_experts, **shape)


def table(card=80e9):
    """-> rows for the paper's models on 8, 16 and 64 GPUs of 80 GB, eight to a machine"""
    rows = []
    for preset, n_experts in ((preset, E) for preset in ('0.3b', '1.5b') for E in (1, 8, 16, 32)):
        config = paper(preset, n_experts)
        for world in (8, 16, 64):
            row = dict(preset=preset, n_experts=n_experts, gpus=world, **needs(config, world))
            row['host'] = 12 * sizes(config)[0]  # on the machine that writes the file
            for name, recompute in (('most', False), ('most_recomputed', True)):
                row[name] = 0
                while sum(needs(config, world, row[name] + 1, recompute=recompute).values()) <= card:
                    row[name] += 1
            row['recomputed'] = sum(needs(config, world, recompute=True).values())
            rows.append(row)
    return rows


# --- The measurement. ---

def resident():
    """Bytes of this process in main memory, without pages of mapped files."""
    with open('/proc/self/status') as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith('RssAnon'))


def peak(work):
    """-> the peak of resident() while work() runs, looked at each 5 ms, and what it returns"""
    most, ended = [resident()], threading.Event()

    def look():
        while not ended.wait(0.005):
            most[0] = max(most[0], resident())
    looker = threading.Thread(target=look)
    looker.start()
    try:
        result = work()
    finally:
        ended.set()
        looker.join()
    return most[0], result


def update(model, running, optimizer, idx, tied):
    """One update as train.py makes it. idx (B, L + 1) -> loss"""
    loss = running(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    if tied:
        model.tie_gradients()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if tied:
        model.tie_experts()
    return loss.detach()


def train_and_measure(part, config, folder):
    """One part on one rank: 'sharded', 'resumed' or 'ddp'.
    -> {phase: peak}, seconds of the quickest update"""
    world, peaks, base = dist.get_world_size(), {}, resident()
    args = Namespace(shard=part != 'ddp', compile=False, activation_checkpointing=False, seed=1337)
    idx = torch.randint(config.vocab_size, (1, config.block_size + 1))

    def phase(name, work):
        dist.barrier()
        peaks[name], result = peak(work)
        peaks[name] -= base
        return result

    def start():
        with torch.device('meta' if args.shard else 'cpu'):
            model = Lory(config)
        running = wrap(model, args, 'cpu', world)
        return model, running, model.optimizer(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))

    def resume():
        saved = read_checkpoint(f'{folder}/{FILE}')
        set_model_state_dict(model, model.fitted(saved['model']), options=train.WHOLE)
        load_averages(model, optimizer, saved['optimizer']['state'])

    def save():
        weights, averages = get_state_dict(model, optimizer, options=train.WHOLE)
        if dist.get_rank() == 0:
            save_checkpoint(f'{folder}/{FILE}', model, None, weights, optimizer=averages)

    def timed_update(tied):
        began = time.perf_counter()
        update(model, running, optimizer, idx, tied)
        return time.perf_counter() - began

    model, running, optimizer = phase('start', start)
    if part == 'resumed':
        phase('resume', resume)
    seconds = [phase('warm-up', lambda: timed_update(True)), phase('after', lambda: timed_update(False))]
    if part == 'sharded':
        phase('save', save)
    return peaks, min(seconds)


def one_part(part, folder, n_layer):
    """In a fresh process. glibc is told to hand back what is freed, so that resident is what is held."""
    rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    dist.init_process_group('gloo', init_method=f'file://{folder}/{part}', rank=rank, world_size=world)
    tiny = LoryConfig(n_layer=2, n_embd=16, block_size=8, segment_len=2)
    for first in ('ddp',) if part == 'ddp' else ('sharded', 'resumed'):  # what code and libraries take
        train_and_measure(first, tiny, f'{folder}/tiny-{part}')
    config = LoryConfig(**SMALL | dict(n_layer=n_layer))
    found = [None] * world
    dist.all_gather_object(found, train_and_measure(part, config, folder))
    if rank == 0:
        with open(f'{folder}/{part}.json', 'w') as f:
            json.dump(found, f)
    gc.collect()  # gloo may abort the process at exit if a model outlives the process group
    dist.destroy_process_group()


def store(name, value):
    results = {}
    if os.path.exists(RESULTS):
        with open(RESULTS) as f:
            results = json.load(f)
    git = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=HERE, capture_output=True, text=True)
    results[name] = dict(machine=f'{platform.machine()}, {os.cpu_count()} cores', torch=torch.__version__,
                         commit=git.stdout.strip(), rows=value)
    with atomic_open(RESULTS, 'w') as f:
        json.dump(results, f, indent=1)


def measured(n_layer):
    rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    folder = f'{tempfile.gettempdir()}/shard-{os.getppid()}'  # torchrun's process, the parent of all ranks
    os.makedirs(folder, exist_ok=True)
    for part in ('sharded', 'resumed', 'ddp'):
        command = [sys.executable, __file__, f'--part={part}', f'--folder={folder}', f'--n_layer={n_layer}']
        subprocess.run(command, env=dict(os.environ, MALLOC_MMAP_THRESHOLD_='262144'), check=True)
    if rank > 0:
        return
    config = LoryConfig(**SMALL | dict(n_layer=n_layer))
    parts = {part: json.load(open(f'{folder}/{part}.json')) for part in ('sharded', 'resumed', 'ddp')}
    need = needs(config, world, word=4, fused=False)
    P, block = sizes(config)
    sharded_moves, ddp_moves = moved(P, world)
    row = dict(ranks=world, params=P, share=16 * P / world, block=4 * block,
               limit=1.1 * (16 * P / world + 4 * block),
               formula=sum(need.values()),
               peaks={part: [p for p, _ in found] for part, found in parts.items()},
               step_against_ddp=parts['sharded'][0][1] / parts['ddp'][0][1],
               received_a_piece=sharded_moves, received_an_update_ddp=ddp_moves)
    print(f'{world} ranks, {P:,} parameters. MB: share {row["share"] / 1e6:,.0f}, '
          f'block {4 * block / 1e6:,.0f}, '
          f'share + block + 10% {row["limit"] / 1e6:,.0f}, formula {row["formula"] / 1e6:,.0f}')
    for part, found in parts.items():
        for name in found[0][0]:
            print(f'{part:8} {name:8}', *(f'{peaks[name] / 1e6:9,.0f}' for peaks, _ in found), 'MB by rank')
    print(f'an update takes {row["step_against_ddp"]:.2f} of the time under DDP')
    store(f'measured, {world} ranks', row)


def main():
    parser = make_parser(__doc__)
    parser.add_argument('--n_layer', type=int, default=SMALL['n_layer'], help='of the measured model')
    parser.add_argument('--part', help='for the processes that this script starts')
    parser.add_argument('--folder', help='likewise')
    args = parser.parse_args()
    if args.part:
        return one_part(args.part, args.folder, args.n_layer)
    if 'RANK' in os.environ:
        return measured(args.n_layer)
    rows = table()
    print(f'{"model":>8} {"GPUs":>4} ' + ' '.join(f'{name:>11}' for name in (
        'state', 'gathered', 'activations', 'loss', 'GB a GPU', 'micro-batch', 'recomputed', 'micro-batch',
        'host, save')))
    for r in rows:
        state = r['parameters'] + r['gradients'] + r['averages']
        total = state + r['gathered'] + r['activations'] + r['loss']
        figures = [state, r['gathered'], r['activations'], r['loss'], total]
        figures = ' '.join(f'{n / 1e9:11.1f}' for n in figures)
        print(f'{r["preset"]:>4}/{r["n_experts"]:2}E {r["gpus"]:4} {figures}'
              f' {r["most"]:11} {r["recomputed"] / 1e9:11.1f} {r["most_recomputed"]:11} '
              f'{r["host"] / 1e9:11.1f}')
    store('formula', rows)
    checks = []
    for preset, n_experts in (('0.3b', 1), ('0.3b', 8), ('1.5b', 32)):
        config = paper(preset, n_experts)
        config.n_layer = 2
        block, rest = activations(config, 1, fused=False)
        checks.append(dict(preset=preset, n_experts=n_experts, n_layer=2, formula=2 * block + rest,
                           fake_tensors=kept_by_fake_tensors(config, 1)))
        print('activations of 2 layers, GB: {preset}/{n_experts}E'.format(**checks[-1]),
              f'{checks[-1]["formula"] / 1e9:.4f}, by fake tensors {checks[-1]["fake_tensors"] / 1e9:.4f}')
    store('activations', checks)


if __name__ == '__main__':
    run_script(main)
