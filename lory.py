"""
Lory: a fully differentiable mixture-of-experts language model (Zhong et al., COLM 2024, arXiv:2405.03133).

Where a transformer has one feed-forward network, a mixture of experts has E of them, and a small linear map, the
router, that says how much each counts. The usual kind sends each token to its few best experts. That choice has no
gradient, and without a balancing loss some experts get no tokens. Lory makes no choice: it averages the experts *in
parameter space* and runs the one averaged FFN,

    merged FFN = e_1 θ_1 + ... + e_E θ_E,    e = softmax(router(x)),        (Sec. 2.2; from SMEAR, arXiv:2306.03745)

so everything is differentiable and no balancing loss is needed. One merge per token would cost E FFNs a token. Lory
merges once per *segment* of T tokens, and stays autoregressive by *causal segment routing*: the weights of a segment
are read from the segment before it (Sec. 3.1, Eq. 3). Training starts with a dense model; *upcycling* then copies its
FFNs into every expert (Sec. 4.1).

           segment 1            segment 2            segment 3
        x_1  ...  x_T       x_T+1 ... x_2T      x_2T+1 ... x_3T      hidden states entering the FFN   (B, N, T, D)
              |                    |
            mean                 mean                                one summary a segment            (B, N, D)
              |                    |
            router               router                              softmax                          (B, N, E)
              `---------.          `---------.
   first_segment        |                    |                       shifted by one segment
         |              |                    |
        e_1            e_2                  e_3                      routing weights                  (B, N, E)
         |              |                    |
     FFN Σ e_1i θ_i   FFN Σ e_2i θ_i      FFN Σ e_3i θ_i             merged experts, one FFN a segment

Nothing precedes segment 1: a learned prior routes it, or as in the paper its own mean (`LoryFFN.route`).

One letter, one meaning, here and in every shape comment:

    B  sequences in the batch      D  n_embd, model width (paper: d)          V  vocab_size
    L  tokens in a sequence        H  ffn_hidden, FFN width (paper: d')       nh  n_head
    T  segment_len                 E  n_experts                               hs  head size, D / nh
    N  segments, ceil(L / T)       θ  the stacked expert weights (E, ., .)    S  merged FFNs at work, B * N in training
    e  routing weights (Eq. 3)     C  tokens an expert takes (Sec. 5.3)       in, out  D and H, or H and D

Where it departs from the paper it says so: a prior routes segment 1, from a bias that the paper's router lacks
(`LoryFFN.route`), the last segment may be short (`LoryFFN.forward`), embeddings are tied by default.

Read it top to bottom: config, merging, routing, the LLaMA-style decoder around them, what generation remembers, the
model, dense warm-up, and last what the scripts share.
"""
import math
import os
import secrets
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(ValueError):
    """A mistake the user can mend, told in one sentence that names the cure. The scripts print it and exit with 2."""


# ----------------------------------------------------------------------------------------------------------------------
# Config. A field is defined on one line and nowhere else: train.py makes its flag from it, the checkpoint stores it.

def option(default, help, choices=None):
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass
class LoryConfig:
    """Shape of the model. Raises UserError when the fields do not fit together."""
    vocab_size: int = 2048  # no flag: the data's tokenizer decides it
    block_size: int = option(1024, 'L, tokens in a training sequence, and how far back generation looks')
    n_layer: int = option(2, 'transformer blocks')
    n_head: int = option(2, 'attention heads')
    n_embd: int = option(64, 'D, width of the model')
    ffn_hidden: int = option(0, "H, hidden width of one expert's SwiGLU; 0: 8/3 of n_embd, rounded up to 32's multiple")
    n_experts: int = option(8, 'E, experts in each layer; 1 is the dense model of equal active size')
    segment_len: int = option(256, 'T, tokens that share one merged FFN')
    routing: str = option('causal', 'causal: by the segment before (Lory); prefix: all but the first by segment 1 (Sec. 5.1); '
                                    'expert_choice: experts pick tokens, the sparse baseline (Sec. 5.3)',
                          ('causal', 'prefix', 'expert_choice'))
    first_segment: str = option('prior', 'what routes segment 1: prior, a learned constant (strictly causal), or self, '
                                         'its own mean behind a stop-gradient (the paper)', ('prior', 'self'))
    tie_embeddings: bool = option(True, 'one matrix for token embedding and output head')

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata.get('choices')
            if choices and value not in choices:
                raise UserError(f'{f.name}={value} is not known; choose one of {", ".join(choices)}.')
            if f.type is int and f.name != 'ffn_hidden' and value < 1:
                raise UserError(f'{f.name}={value} must be at least 1.')
        if self.segment_len > self.block_size:
            raise UserError(f'segment_len={self.segment_len} must not exceed block_size={self.block_size}.')
        if self.n_embd % (2 * self.n_head):
            raise UserError(f'n_embd={self.n_embd} must be a multiple of twice n_head={self.n_head} '
                            '(rotary embeddings turn pairs of channels in each head).')
        if self.ffn_hidden < 0:
            raise UserError(f'ffn_hidden={self.ffn_hidden} must not be negative.')
        if self.ffn_hidden == 0:
            self.ffn_hidden = 32 * math.ceil(self.n_embd * 8 / 3 / 32)


# ----------------------------------------------------------------------------------------------------------------------
# Merging experts (Sec. 2.2), a matrix product, and a derivative that does not keep what it made.

def merge(e, theta):
    """Σ_i e_i θ_i for S sets of routing weights at once, one matrix product. (S, E), (E, in, out) -> (S, in, out)
    Averaging the outputs of E FFNs would mean running all E; averaging their weights leaves one to run."""
    return (e @ theta.flatten(1)).view(-1, *theta.shape[1:])


class MergedLinear(torch.autograd.Function):
    """y = x @ merge(e, θ) in x's dtype, with the merged matrix W = merge(e, θ) made again in the backward pass, not kept.

    If kept, every segment's merged FFN would lie in memory until the backward pass: 6.6 GB a 4096-token sequence at the
    paper's 0.3B in bf16. Made again, it costs E/T of the matmul's arithmetic (App. B; more in time, see
    experiments/README.md), and memory for one W. The chain rule of y = x W, W = e θ:
        dx = dy Wᵀ,   dW = xᵀ dy,   dθ = eᵀ dW,   de = dW θᵀ
    """
    @staticmethod
    def forward(ctx, x, e, theta):                                   # (S, T, in), (S, E), (E, in, out)
        ctx.save_for_backward(x, e, theta)
        return x @ merge(e.to(x.dtype), theta.to(x.dtype))           # (S, T, out)

    @staticmethod
    def backward(ctx, dy):                                           # (S, T, out)
        x, e, theta = ctx.saved_tensors
        e_low = e.to(x.dtype)                                        # (S, E), in bfloat16 under autocast
        # Wᵀ from θᵀ, not W turned: torch.compile would know that product from the forward pass, and keep it after all.
        dx = dy @ merge(e_low, theta.mT.to(x.dtype))                 # (S, T, in)
        dW = (x.mT @ dy).flatten(1)                                  # (S, in * out)
        # de = dW θᵀ. Softmax passes on only how this differs from expert to expert, and soon after upcycling experts differ
        # by less than bfloat16 resolves: so θ_1 is subtracted before rounding, dW (θ_i - θ_1)ᵀ, and its dW θ_1ᵀ added after.
        parts = theta - theta[:1]                                    # (E, in, out)
        parts[0] = theta[0]                                          # θ_1, θ_2 - θ_1, θ_3 - θ_1, ...
        de = (parts.to(x.dtype).flatten(1) @ dW.mT).mT.to(e.dtype)   # (S, E), in the order that CPUs do faster
        de[:, 1:] += de[:, :1]
        return dx, de, (e_low.mT @ dW).view_as(theta)


# ----------------------------------------------------------------------------------------------------------------------
# The idea, on one screen: route each segment by the one before (Sec. 3.1, Algorithm 1), merge, run.

def swiglu(x, gate, up, down):
    """The FFN (arXiv:2002.05202). x (..., D), gate and up (..., D, H), down (..., H, D) -> (..., D)"""
    return (F.silu(x @ gate) * (x @ up)) @ down


class LoryFFN(nn.Module):
    """E expert FFNs, their router, and the merge. With E = 1 it is the plain SwiGLU FFN of the dense baseline."""

    def __init__(self, config):
        super().__init__()
        E, D, H = config.n_experts, config.n_embd, config.ffn_hidden
        self.segment_len, self.routing, self.first_segment = config.segment_len, config.routing, config.first_segment
        self.gate = nn.Parameter(torch.empty(E, D, H))               # filled by Lory.init_weights
        self.up = nn.Parameter(torch.empty(E, D, H))
        self.down = nn.Parameter(torch.empty(E, H, D))
        self.router = nn.Linear(D, E) if E > 1 else None

    def weights(self, x):
        """Routing weights softmax(R(x)), in float32 at least whatever autocast does to the rest. (..., D) -> (..., E)"""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x.to(self.router.weight.dtype))
            return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def route(self, x):
        """Causal segment routing (Eq. 3): e_k = softmax(R(mean of segment k-1)). (B, N, T, D) -> (B, N, E)"""
        e = self.weights(x.mean(2))                                  # (B, N, E), what each segment says of itself
        if self.first_segment == 'self':
            # The paper's rule. The stop-gradient keeps the router from learning to look ahead, but the forward pass
            # still shows token 1 the mean of tokens 2..T: a loss over segment 1 comes out too good
            # (by how much: experiments/README.md).
            first = e[:, :1].detach()                                # (B, 1, E)
        else:
            # Ours: the router's bias alone, which also shifts every later segment's logits: a learned prior that has seen
            # no token. Causal at every position.
            first = self.router.bias.softmax(-1, dtype=e.dtype).expand(len(e), 1, -1)   # (B, 1, E)
        # Moved by one segment: what the last one says routes nothing. Prefix, the ablation of Sec. 5.1, listens to the
        # first one only (which itself is routed as above).
        later = e[:, :-1] if self.routing == 'causal' else e[:, :1].expand(-1, e.shape[1] - 1, -1)   # (B, N - 1, E)
        return torch.cat([first, later], 1)                          # (B, N, E)

    def merged(self, e):
        """The FFNs that e (S, E) makes of the experts: [gate (S, D, H), up (S, D, H), down (S, H, D)]."""
        return [merge(e.to(w.dtype), w) for w in (self.gate, self.up, self.down)]

    def run(self, x, e):
        """Each segment through its own merged FFN, swiglu(x, *merged(e)) with less to remember for the backward pass, in
        autocast's dtype. (B, N, T, D), (B, N, E) -> (B, N, T, D)"""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        xs, e = x.flatten(0, 1).to(dtype), e.flatten(0, 1)           # (S, T, D), (S, E)
        inner = F.silu(MergedLinear.apply(xs, e, self.gate)) * MergedLinear.apply(xs, e, self.up)   # (S, T, H)
        return MergedLinear.apply(inner, e, self.down).view(x.shape)

    def forward(self, x):
        """Algorithm 1. (B, L, D) -> output (B, L, D), routing weights (B, N, E)."""
        B, L, D = x.shape
        T = min(self.segment_len, L)
        N = math.ceil(L / T)
        if self.router is None:
            return swiglu(x, self.gate[0], self.up[0], self.down[0]), x.new_ones(B, N, 1)
        # Only the last segment can be short, and only when N > 1, where its mean routes nothing: padding is harmless.
        if N * T > L:
            x = F.pad(x, (0, 0, 0, N * T - L))                       # (B, N * T, D)
        x = x.view(B, N, T, D)
        e = self.route(x)                                            # (B, N, E)
        return self.run(x, e).view(B, N * T, D)[:, :L], e


class ExpertChoiceFFN(LoryFFN):
    """The sparse baseline: token-level Expert Choice (Sec. 5.3; arXiv:2202.09368), capacity factor 1. No merging.

    In training each expert takes the L/E tokens of a sequence that want it most, so the load is even by construction.
    But whether a token is taken then depends on tokens after it. A language model must be judged without that, so in
    evaluation each token goes to its own best expert. Outputs are weighted by the softmax share, so experts made of a dense
    FFN (`upcycle`) start at about 1/E of what it was; E times the share, which avoids that, learned worse when tried.
    """
    def forward(self, x):
        B, L, D = x.shape
        score = self.weights(x)                                      # (B, L, E)
        E = score.shape[-1]
        y = torch.zeros_like(x)
        if self.training:
            C = max(1, L // E)                                       # capacity of an expert
            share, token = score.mT.topk(C)                          # (B, E, C) both
            at = token.view(B, E * C, 1).expand(-1, -1, D)           # (B, E * C, D)
            taken = x.gather(1, at).view(B, E, C, D).transpose(0, 1).flatten(1, 2)    # (E, B * C, D)
            made = swiglu(taken, self.gate, self.up, self.down).view(E, B, C, D).transpose(0, 1)   # (B, E, C, D)
            y = y.scatter_add(1, at, (made * share[..., None]).flatten(1, 2).to(y.dtype))       # adds (B, E * C, D)
        else:
            share, best = score.max(-1)                              # (B, L) both
            for i in range(E):
                mine = best == i                                     # (B, L)
                y[mine] = (swiglu(x[mine], self.gate[i], self.up[i], self.down[i]) * share[mine][:, None]).to(y.dtype)
        return y, score.mean(1, keepdim=True)                        # (B, L, D), (B, 1, E)


# ----------------------------------------------------------------------------------------------------------------------
# The decoder around it (Sec. 4.1): a LLaMA-style block, pre-RMSNorm, rotary positions, no biases.

def rotation(pos, hs):
    """Rotary position embedding (arXiv:2104.09864): channel pair i at position pos turns by the angle
    pos * 10000^(-2i/hs), so that the product of a query and a key depends on their distance alone.
    pos (L,), or (B, 1) in decoding -> cos, sin, which broadcast to (B, nh, L, hs/2)."""
    freq = 10000.0 ** (-torch.arange(0, hs, 2, device=pos.device) / hs)               # (hs/2,)
    angle = (pos[..., None] * freq).unsqueeze(-3)                    # (1, L, hs/2), or (B, 1, 1, hs/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs (i, i + hs/2) of x (B, nh, L, hs)."""
    a, b = x.chunk(2, -1)                                            # (B, nh, L, hs/2) both
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None):                          # cache: None in training, in generation a Cache, below
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)   # each (B, nh, L, hs)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)               # (B, nh, L, hs)
        else:
            y = cache.attend(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, L, D))         # (B, L, D)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.n_embd)
        self.attn = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.n_embd)
        self.ffn = (ExpertChoiceFFN if config.routing == 'expert_choice' and config.n_experts > 1 else LoryFFN)(config)

    def forward(self, x, rope, cache=None):
        x = x + self.attn(self.attn_norm(x), rope, cache)
        z = self.ffn_norm(x)                                         # (B, L, D)
        y, e = self.ffn(z) if cache is None else cache.feed(self.ffn, z)
        return x + y, e                                              # (B, L, D), (B, N, E)


# ----------------------------------------------------------------------------------------------------------------------
# What generation remembers. After its prompt a Lory is a plain dense model: keys, values, and one merged FFN a layer.

class Cache:
    """One layer's memory of B sequences, each at a position of its own: the keys and values of the last `slots` tokens
    in a ring, the merged FFN in use, and the sum of the FFN's inputs since the current segment began."""

    def __init__(self, slots, reroute):
        self.slots, self.reroute = slots, reroute                    # reroute: merge anew for every segment?
        self.pos = None                                              # (L,), then (B, 1): set by Lory.trunk at each call
        self.k = self.v = None                                       # (B, nh, slots, hs)
        self.ffn = self.total = None                                 # three of (B, ., .), (B, D)

    @classmethod
    def stack(cls, caches):
        """The memories of single sequences as one batch."""
        batch = cls(caches[0].slots, caches[0].reroute)
        batch.k, batch.v = torch.cat([c.k for c in caches]), torch.cat([c.v for c in caches])
        if caches[0].ffn:
            batch.ffn = [torch.cat(w) for w in zip(*(c.ffn for c in caches))]
            batch.total = torch.cat([c.total for c in caches])
        return batch

    def attend(self, q, k, v):
        """Attention: of the prompt (B, nh, L, hs) at the first call, then of one token (B, nh, 1, hs)."""
        B, nh, L, hs = k.shape
        if self.k is None:
            self.k, self.v = (F.pad(t, (0, 0, 0, self.slots - L)) for t in (k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        row, slot = torch.arange(B, device=k.device), self.pos[:, 0] % self.slots
        self.k[row, :, slot], self.v[row, :, slot] = k[:, :, 0], v[:, :, 0]           # the oldest token makes room
        filled = torch.arange(self.slots, device=k.device) <= self.pos                # (B, slots)
        return F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=filled[:, None, None])

    def feed(self, ffn, x):
        """The layer's FFN: on the prompt (B, L, D) at the first call, then on one token (B, 1, D).
        -> y like x, and of the prompt its routing weights (B, N, E), N = 1 unless `reroute`"""
        if ffn.router is None or ffn.routing == 'expert_choice':
            return ffn(x)                                            # dense, or token by token: nothing to remember
        T = ffn.segment_len
        if self.ffn is None:
            if not self.reroute:
                e = ffn.weights(x.mean(1))[:, None]                  # (B, 1, E), the prompt routes once (Sec. 3.1)
                self.ffn = ffn.merged(e[:, 0])
                y = swiglu(x, *self.ffn)                             # (B, L, D)
            else:
                y, e = ffn(x)                                        # (B, L, D), (B, N, E), each segment anew (G.2)
                self.ffn = ffn.merged(e[:, -1])
            self.total = x[:, (x.shape[1] - 1) // T * T:].sum(1)     # (B, D), over the prompt's last segment
            return y, e
        if self.reroute:
            # (B,) sequences that begin a segment; from prefix routing's second on, weights stay as they are
            new = self.pos[:, 0] % T == 0 if ffn.routing == 'causal' else self.pos[:, 0] == T
            if new.any():
                for w, fresh in zip(self.ffn, ffn.merged(ffn.weights(self.total[new] / T))):
                    w[new] = fresh
                self.total[new] = 0
            self.total += x[:, 0]
        return swiglu(x, *self.ffn), None


def sample(logits, temperature, top_k, top_p):
    """Draw the next token of each row. (B, V) -> (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        # Keep the likeliest tokens until they hold top_p of the probability, the one that reaches it included.
        likely, order = logits.softmax(-1).sort(-1, descending=True)                  # (B, V) both
        drop = likely.cumsum(-1) - likely >= top_p
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# The model.

class Lory(nn.Module):
    """The language model. `logits, loss = model(idx, targets)`; LoryConfig(n_experts=1) is the dense baseline."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's: normal of std 0.02, less for what writes into the residual stream. Router biases start at zero, so
        the prior starts uniform; router weights must not be zero, or upcycled experts would stay equal (`upcycle`)."""
        for name, p in self.named_parameters():
            if name.endswith('router.bias'):
                p.zero_()
            elif p.dim() > 1:
                residual = name.endswith(('proj.weight', 'ffn.down'))
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    def trunk(self, idx, pos, caches=None):
        """Everything below the output head. (B, L) tokens -> (B, L, D), routing weights (B, N, E) of each layer."""
        x, weights = self.embed(idx), []                             # (B, L, D)
        rope = rotation(pos, self.config.n_embd // self.config.n_head)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            if cache is not None:
                cache.pos = pos
            x, e = block(x, rope, cache)                             # (B, L, D), (B, N, E)
            weights.append(e)
        return self.norm(x), weights                                 # (B, L, D), n_layer of (B, N, E)

    def forward(self, idx, targets=None, return_routing=False):
        """idx, targets (B, L) int64 with any L >= 1; targets of -1 are not counted.
        Returns logits (B, L, V), the mean loss in nats per token (None without targets) and, if return_routing, also
        the routing weights (B, n_layer, N, E), detached."""
        x, e = self.trunk(idx, torch.arange(idx.shape[1], device=idx.device))
        logits = self.head(x)                                        # (B, L, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return (logits, loss, torch.stack(e, 1).detach()) if return_routing else (logits, loss)

    def optimizer(self, lr, weight_decay, betas):
        """AdamW (Sec. 4.1). Only matrices decay: norms and the router's bias are pulled nowhere."""
        params = list(self.parameters())
        groups = [dict(params=[p for p in params if p.dim() > 1], weight_decay=weight_decay),
                  dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)

    def num_params(self, active=False):
        """Parameters, or the active ones: what one token meets, its merged FFN counted once and the router left out."""
        of = self.config.n_experts if active else 1                  # only experts are stacked, (E, ., .)
        return sum(p.numel() // (of if p.dim() == 3 else 1) for name, p in self.named_parameters()
                   if not (active and '.router.' in name))

    def flops_per_token(self, L):
        """Model FLOPs of a training step: a multiply-add counts two and the backward pass twice the forward, so 6 for
        each parameter the token meets (the embedding is a look-up), 6 D L a layer for causal attention, and 6 E/T for
        each parameter of the FFN for the merge (App. B). As usual, what is computed again is not counted."""
        c, ffn = self.config, 3 * self.config.n_embd * self.config.ffn_hidden
        merging = ffn * c.n_experts / min(c.segment_len, L) if c.n_experts > 1 and c.routing != 'expert_choice' else 0
        return 6 * (c.n_layer * (4 * c.n_embd**2 + ffn + merging + c.n_embd * L) + c.n_embd * c.vocab_size)

    # Generation. Everything below runs on what Cache remembers.

    @torch.no_grad()
    def prefill(self, idx, reroute=False):
        """Read prompts of one length, (B, L) with 1 <= L <= block_size. Experts are merged once, by the mean of the
        whole prompt (Sec. 3.1), or with `reroute` anew for every segment, as in training (G.2; under first_segment=self
        a prompt shorter than T is routed by the tokens it has). In eval mode: expert choice trains differently.
        -> logits of the next token (B, V), routing weights (B, n_layer, N, E), one Cache a layer."""
        L = idx.shape[1]
        if not 1 <= L <= self.config.block_size:
            raise UserError(f'the prompt has {L} tokens; this model reads 1 to block_size={self.config.block_size}.')
        caches = [Cache(self.config.block_size, reroute) for _ in self.blocks]
        x, e = self.trunk(idx, torch.arange(L, device=idx.device), caches)
        return self.head(x[:, -1]), torch.stack(e, 1), caches

    @torch.no_grad()
    def decode(self, token, pos, caches):
        """Read one more token (B,) of each sequence, at positions pos (B,). -> logits of the next token (B, V)"""
        return self.head(self.trunk(token[:, None], pos[:, None], caches)[0][:, -1])

    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, reroute=False):
        """Continue `prompts`, a tensor (B, L) or a list of B one-dimensional tensors of any lengths; yields the next
        token of each, (B,), max_new_tokens times. temperature 0 is greedy; top_k 0 and top_p 1 keep every token.

        There is no end: positions go on past block_size, each token attends to the block_size last ones, and the
        segment grid stays where it is.
        """
        # Prompts are read one by one, so that no padding enters a mean; decoding, where the time goes, is batched.
        logits, _, single = zip(*(self.prefill(p[None], reroute) for p in prompts))
        logits, caches = torch.cat(logits), [Cache.stack(layer) for layer in zip(*single)]   # (B, V), one a layer
        pos = torch.tensor([len(p) for p in prompts], device=logits.device)           # (B,)
        for i in range(max_new_tokens):
            token = sample(logits, temperature, top_k, top_p)
            yield token
            if i < max_new_tokens - 1:
                logits, pos = self.decode(token, pos, caches), pos + 1

    def generate(self, prompts, max_new_tokens, **how):
        """The tokens of `stream` in one tensor, (B, max_new_tokens)."""
        return torch.stack(list(self.stream(prompts, max_new_tokens, **how)), 1)

    def specialize(self, idx):
        """The dense model that this one is after reading a prompt (1, L): same class, n_experts = 1, the experts of
        each layer merged as the prompt routes them. Its logits are those of prompt-only routing."""
        if self.config.routing == 'expert_choice' and self.config.n_experts > 1:
            raise UserError('a model with routing=expert_choice merges no experts, so it cannot specialize.')
        _, _, caches = self.prefill(idx)
        dense = Lory(replace(self.config, n_experts=1)).to(self.embed.weight)
        merged = {f'blocks.{i}.ffn.{name}': w for i, cache in enumerate(caches)
                  for name, w in zip(('gate', 'up', 'down'), cache.ffn or ())}
        dense.load_state_dict({n: merged.get(n, w) for n, w in self.state_dict().items() if '.router.' not in n})
        return dense


# ----------------------------------------------------------------------------------------------------------------------
# Dense warm-up (Sec. 4.1, G.3): train the dense model first, then copy its FFN into every expert and go on as a MoE.

def upcycle(dense, n_experts, optimizer=None):
    """A Lory of n_experts experts that computes what `dense` does (`ExpertChoiceFFN` says where not), and its optimiser (None
    without one).

    Why the router must not start at zero: de_i = <dW, θ_i> is the same for all i while experts are equal, and softmax
    ignores what is the same, so the router learns nothing yet. dθ_i = Σ_s e_si dW_s is the same for all i if e is uniform:
    then experts stay E copies of one dense model for ever. A random router makes each hear some segments s louder than
    its siblings do; they part, and from then on there is something to route.
    """
    model = Lory(replace(dense.config, n_experts=n_experts)).to(dense.embed.weight)
    old, new = dict(dense.named_parameters()), dict(model.named_parameters())
    with torch.no_grad():
        for name, p in old.items():
            new[name].copy_(p)                                       # (1, in, out) fills (E, in, out)
    if optimizer is None:
        return model, None
    group = optimizer.param_groups[0]
    moved = model.optimizer(group['lr'], group['weight_decay'], group['betas'])
    for name, p in old.items():
        # With weights near 1/E an expert hears 1/E of the dense gradient g. Adam's averages of g and g² follow suit,
        # so that the first steps after upcycling are neither too long nor too short.
        share = 1 / n_experts if new[name].shape != p.shape else 1
        if state := optimizer.state.get(p):                          # none before the first step
            moved.state[new[name]] = dict(step=state['step'].clone(),
                                          exp_avg=state['exp_avg'].expand_as(new[name]) * share,
                                          exp_avg_sq=state['exp_avg_sq'].expand_as(new[name]) * share**2)
    return model, moved


# ----------------------------------------------------------------------------------------------------------------------
# Flags and checkpoints, shared by the scripts.

def boolean(text):
    if text.lower() not in ('true', 'false'):
        raise ValueError
    return text.lower() == 'true'


def add_flags(parser, config_class):
    """A --flag for each field of the dataclass that was given a help text."""
    for f in fields(config_class):
        if 'help' in f.metadata:
            parser.add_argument(f'--{f.name}', type=boolean if f.type is bool else f.type, default=f.default,
                                choices=f.metadata['choices'], help=f'{f.metadata["help"]} (default: {f.default})')


@contextmanager
def atomic_open(path, mode='wb', **kw):
    """Write a file whole or not at all: to a .tmp of its own beside it, then fsync, then rename over path. Whatever
    goes wrong, what was at path before is still there. Raises UserError when the disk is full or the folder cannot be
    written."""
    tmp = f'{path}.{secrets.token_hex(4)}.tmp'
    try:
        with open(tmp, mode, **kw) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(tmp)
        # torch.save hides a full disk behind another error.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise UserError(f'cannot write {path} ({cause.strerror}): free some space or choose another folder; '
                            'what was there before is unchanged.') from error
        raise


FORMAT = 1  # of checkpoints; train.py adds what a run needs to go on


def save_checkpoint(path, config, state, **rest):
    """Write a model's config, its state_dict() and plain values in `rest` to path, atomically. `state` is that of the
    bare Lory, without the prefixes of DDP or compile, every tensor whole."""
    with atomic_open(path) as f:
        torch.save(dict(rest, format=FORMAT, config=asdict(config), model=state), f)


def load_checkpoint(path, device='cpu'):
    """-> the Lory stored at path, on `device`, and the dict it was stored in. UserError if there is no such model."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():                                    # torch.load does not look at the checksums
                raise ValueError('damaged')
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
        if ckpt['format'] != FORMAT:
            raise ValueError(f'format {ckpt["format"]}')
        model = Lory(LoryConfig(**ckpt['config']))
        model.load_state_dict(ckpt['model'])
    except FileNotFoundError as error:
        raise UserError(f'there is no checkpoint at {path}; train one with: python train.py') from error
    except OSError as error:
        raise UserError(f'cannot read {path} ({error.strerror}); mend that or choose another.') from error
    except Exception as error:
        raise UserError(f'{path} is not a whole Lory checkpoint of format {FORMAT} ({type(error).__name__}); choose another. '
                        "If it is a run's ckpt.pt, move it away: --init_from=resume then takes best.pt.") from error
    return model.to(device), ckpt


def usable_device(name):
    """The device called `name`, or for 'auto' the fastest there is. UserError if it cannot be used here."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:              # torch raises all three
        raise UserError(f'device={name} cannot be used here; try --device=auto.') from error
    return name
