"""
Lory: a fully differentiable mixture-of-experts language model (Zhong et al., COLM 2024, arXiv:2405.03133).

A transformer block has one feed-forward network (FFN). A mixture of experts has E of them and a *router*, a
small linear map that says how much each expert counts. Most mixtures send a token to its best experts, a
choice that has no gradient. Lory averages the *weights* of all experts and runs the one averaged FFN:

    merged FFN = e_1 θ_1 + ... + e_E θ_E,   e = softmax(router(h))    (Sec. 2.2; SMEAR, arXiv:2306.03745)

Merging once per token would cost as much as running E FFNs, so Lory merges once per *segment* of T tokens.
It stays autoregressive by *causal segment routing*: the mean hidden state of segment n-1 routes segment n
(Sec. 3.1, Eq. 3). During *dense warm-up* (Sec. 4.1) all experts are kept equal: the model is a dense one.

                 segment 1            segment 2            segment 3
               x_1  ...  x_T       x_T+1 ... x_2T     x_2T+1 ... x_3T    entering the FFN        (B, N, T, D)
                     |                    |                   |
                   mean                 mean           (routes nothing)  h, of all but the last  (B, N-1, D)
                     |                    |
                   router               router                           softmax                 (B, N-1, E)
    prior or         `---------.          `---------.
    own mean                   |                    |                    shifted by one segment
        |                      |                    |
      e(1)                   e(2)                 e(3)                   routing weights         (B, N, E)
        |                      |                    |
  FFN Σ e(1)_i θ_i     FFN Σ e(2)_i θ_i     FFN Σ e(3)_i θ_i             one merged FFN per segment

Nothing comes before segment 1. It is routed by a learned prior, or by its own mean (the paper's rule).

One letter, one meaning, in every shape comment:

    B  sequences in a batch        D  n_embd, model width (paper: d)         V   vocab_size
    L  tokens in a sequence        H  ffn_hidden, FFN width (paper: d')      nh  n_head
    T  segment_len, at most L      E  n_experts                              hs  head size, D / nh
    N  segments, ceil(L / T)       e  routing weights (..., E)               i   an expert
    h  mean of a segment (..., D)                                            n   a segment (paper: k)
    θ  weights of all experts, stacked (E, in, out) for each of an FFN's three matrices
    W  merged weights of a matrix (..., in, out); in and out are D and H, or H and D

Ours, not the paper's: the learned prior, which is the router's bias; experts that begin equal, and dense
warm-up by tying their gradients; merging again in the backward pass; tied embeddings. (README.md has what
differs elsewhere.) `naive_lory` in test_lory.py is this layer as a plain loop.
"""
import argparse
import math
import os
import re
import sys
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """A user's mistake. The message is one sentence, which says what to do."""


# --- Config. Each field is defined once, here: train.py makes its flag from it, the checkpoint stores it. ---

def option(default, help, choices=None):
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass
class LoryConfig:
    """Shape of the model. Raises UserError when the fields do not fit together."""
    vocab_size: int = 2048  # no flag: the tokenizer of the data decides
    block_size: int = option(1024, 'L, tokens in a training sequence; in generation a layer sees the last L')
    n_layer: int = option(2, 'transformer blocks')
    n_head: int = option(2, 'attention heads')
    n_embd: int = option(64, 'D, width of the model')
    ffn_hidden: int = option(0, 'H, width of an expert; 0: 8/3 of n_embd, rounded up to a multiple of 32')
    n_experts: int = option(8, 'E, experts in each layer; 1 is the dense model of equal active size')
    segment_len: int = option(256, 'T, tokens that share one merged FFN')
    routing: str = option('causal', 'causal: each segment is routed by the one before it (Sec. 3.1); prefix: '
                          'segment 1 routes all later ones (Sec. 5.1)', ('causal', 'prefix'))
    first_segment: str = option('prior', 'what routes segment 1; prior: a learned constant, strictly causal; '
                                'self: its own mean behind a stop-gradient (the paper)', ('prior', 'self'))
    tie_embeddings: bool = option(True, 'use one matrix for token embedding and output head')

    def __post_init__(self):
        if self.ffn_hidden == 0:
            self.ffn_hidden = 32 * math.ceil(self.n_embd * 8 / 3 / 32)
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata.get('choices')
            if choices and value not in choices:
                raise UserError(f'{f.name}={value} is not known; choose one of {", ".join(choices)}.')
            if f.type is int and value < 1:
                raise UserError(f'{f.name}={value} must be at least 1.')
        if self.segment_len > self.block_size:
            raise UserError(f'lower segment_len={self.segment_len}: it exceeds block_size={self.block_size}.')
        if self.n_embd % (2 * self.n_head):
            raise UserError(f'n_embd={self.n_embd} must be a multiple of 2 * n_head = {2 * self.n_head}: '
                            'rotary embeddings turn pairs of channels in each head.')


# --- The idea: route each segment by the one before it, merge the experts, run the result. ---

def merge(e, theta):
    """Average experts in parameter space, Σ_i e_i θ_i (Sec. 2.2). (..., E), (E, in, out) -> (..., in, out)"""
    return (e @ theta.flatten(1)).unflatten(-1, theta.shape[1:])  # (..., in * out) -> (..., in, out)


def swiglu(x, gate, up, down):
    """SwiGLU FFNs (arXiv:2002.05202), one for each segment. x (..., T, D), gate and up (..., D, H),
    down (..., H, D) -> (..., T, D)"""
    inner = F.silu(x @ gate) * (x @ up)  # (..., T, H)
    return inner @ down


class LoryFFN(nn.Module):
    """E expert FFNs and their router. With E = 1 it is the plain FFN of the dense baseline."""

    def __init__(self, config):
        super().__init__()
        E, D, H = config.n_experts, config.n_embd, config.ffn_hidden
        self.segment_len = config.segment_len
        self.routing, self.first_segment = config.routing, config.first_segment
        # This initialisation serves a layer used alone. `Lory.init_weights` overwrites it.
        self.gate = nn.Parameter(0.02 * torch.randn(E, D, H))
        self.up = nn.Parameter(0.02 * torch.randn(E, D, H))
        self.down = nn.Parameter(0.02 * torch.randn(E, H, D))
        self.router = nn.Linear(D, E) if E > 1 else None

    def routing_weights(self, x):
        """softmax(router(h)), where h is the mean of a segment or a prompt. (..., T, D) -> (..., E)"""
        h = x.mean(-2, dtype=self.router.weight.dtype)  # (..., D)
        with torch.autocast(h.device.type, enabled=False):  # float32, even where matmuls are bfloat16
            return self.router(h).softmax(-1)

    def prior(self, x):
        """Ours: the softmax of the router's bias, which depends on no token. x (B, ...) -> (B, 1, E)"""
        return self.router.bias.softmax(-1).expand(len(x), 1, -1)

    def route(self, x):
        """Causal segment routing (Sec. 3.1, Eq. 3). Segments (B, N, T, D) -> routing weights (B, N, E)"""
        # Segment n-1 routes segment n, so the last one is not needed here.
        before = x[:, :-1]  # (B, N - 1, T, D); empty if N = 1
        if self.routing == 'prefix':
            before = x[:, :1].expand_as(before)  # prefix routing (Sec. 5.1): segment 1 routes all later ones
        if self.first_segment == 'prior':
            first = self.prior(x)  # (B, 1, E)
        else:
            # The paper's rule. The stop-gradient keeps the router from learning to look ahead, but token 1
            # still sees the mean of tokens 2 to T, so the loss on segment 1 comes out too low.
            first = self.routing_weights(x[:, :1]).detach()  # (B, 1, E)
        return torch.cat([first, self.routing_weights(before)], 1)  # (B, N, E)

    def merge_experts(self, e):
        """The FFNs that e (..., E) makes: gate and up (..., D, H), down (..., H, D)"""
        return [merge(e, theta) for theta in (self.gate, self.up, self.down)]

    def forward(self, x, cache=None):
        """Algorithm 1. (B, L, D) -> output (B, L, D), routing weights (B, N, E), or (B, 1, 1) in a dense
        model. With a cache (generation) the prompt routes once, and the FFN that it makes is kept."""
        if self.router is None:  # E = 1: one FFN for all of x, and its weight is 1
            return swiglu(x, self.gate[0], self.up[0], self.down[0]), x.new_ones(len(x), 1, 1)
        if cache is not None:
            return self.forward_cached(x, cache)
        B, L, D = x.shape
        T = min(self.segment_len, L)
        N = math.ceil(L / T)
        # Zeros may fill up the last segment. It routes nothing, and what comes out for them is cut off.
        x = F.pad(x, (0, 0, 0, N * T - L)).reshape(B, N, T, D)  # (B, N, T, D)
        e = self.route(x)  # (B, N, E)
        # This is swiglu(x, *self.merge_experts(e)), without keeping merged weights for the backward pass.
        inner = F.silu(merged_linear(x, e, self.gate)) * merged_linear(x, e, self.up)  # (B, N, T, H)
        y = merged_linear(inner, e, self.down)  # (B, N, T, D)
        return y.flatten(1, 2)[:, :L], e  # (B, N * T, D) -> (B, L, D)

    def route_prompt(self, x):
        """Generation (Sec. 3.1): the mean of the prompt routes it and all that follows. The prompt may route
        itself: its tokens are given, not predicted. (B, L, D) -> (B, 1, E)"""
        if x.shape[1] == 1 and self.first_segment == 'prior':
            return self.prior(x)  # ours: <|endoftext|> alone is nothing like the mean of a text
        return self.routing_weights(x)[:, None]

    def forward_cached(self, x, cache):
        """Generation: the prompt (B, L, D), then one token (B, 1, D) per call. `cache` keeps e, the
        prompt's routing weights, and the FFN they make; both are None at first. Returns forward's two."""
        if cache.merged is None:  # x is the prompt
            cache.e = self.route_prompt(x)  # (B, 1, E)
            cache.merged = self.merge_experts(cache.e[:, 0])  # of (B, E): one merged FFN per sequence
        return swiglu(x, *cache.merged), cache.e


# --- The lean merge: the same formula, without keeping the merged FFNs until the backward pass. ---

def merged_linear(x, e, theta):
    """x W with W = merge(e, θ). x (B, N, T, in), e (B, N, E), θ (E, in, out) -> (B, N, T, out)

    Autograd would keep every W: 6.6 GB for a sequence of 4096 tokens at the paper's 0.3B in bfloat16. So,
    unlike the paper, `checkpoint` merges once more in the backward pass. That costs E/T of the multiply-adds
    of x W, which is not repeated. From y = x W and W = Σ_i e_i θ_i autograd then computes:

        dx = dy Wᵀ,   dW = xᵀ dy,   dθ = eᵀ dW,   de = dW θᵀ   (the last two with W and θ_i as rows)
    """
    return checkpoint(lambda: x @ merge(e, theta), use_reentrant=False, preserve_rng_state=False)


# --- The decoder around it (Sec. 4.1): a LLaMA-style block, pre-RMSNorm, rotary positions, no biases. ---

def rotation(pos, hs):
    """Rotary position embedding (arXiv:2104.09864): at position pos, channel pair j turns by the angle
    pos * 10000^(-2j/hs). pos (L,) -> cos and sin, (L, hs/2)"""
    freq = 10000.0 ** (-torch.arange(0, hs, 2, device=pos.device) / hs)  # (hs/2,)
    angle = pos[:, None] * freq  # (L, hs/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs (j, j + hs/2) of x (B, nh, L, hs) by cos and sin (L, hs/2)."""
    a, b = x.chunk(2, -1)  # (B, nh, L, hs/2) both
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Cache:
    """What one layer keeps of the B equally long sequences that it is generating."""

    def __init__(self, slots):
        self.slots = slots  # the most tokens that attention can see
        self.pos = 0  # tokens read
        self.k = self.v = None  # (B, nh, tokens kept, hs)
        self.e = None  # (B, 1, E), the prompt's routing weights
        self.merged = None  # the FFN they make: gate and up (B, D, H), down (B, H, D)

    def remember(self, k, v):
        """Append keys and values (B, nh, L, hs). -> the last `slots` of each"""
        self.pos += k.shape[2]
        if self.k is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.k, self.v = k[:, :, -self.slots:], v[:, :, -self.slots:]
        return self.k, self.v


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None):  # (B, L, D) -> (B, L, D)
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.n_head, -1)  # (B, L, 3, nh, hs)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, L, hs) each
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.remember(k, v)  # (B, nh, tokens kept, hs) both
        # L > 1: a text or a prompt, with the causal mask. L = 1: a new token, which sees all that is kept.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=L > 1)  # (B, nh, L, hs)
        return self.proj(y.transpose(1, 2).reshape(B, L, D))  # (B, L, D)


class Block(nn.Module):
    def __init__(self, config, ffn):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.n_embd)
        self.attn = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.n_embd)
        self.ffn = ffn(config)

    def forward(self, x, rope, cache=None):  # (B, L, D) -> (B, L, D), routing weights (B, N, E)
        x = x + self.attn(self.attn_norm(x), rope, cache)
        y, e = self.ffn(self.ffn_norm(x), cache)
        return x + y, e


# --- The model. ---

class Lory(nn.Module):
    """The language model: `logits, loss = model(idx, targets)`. LoryConfig(n_experts=1) is the dense model.

    An FFN of your own takes LoryFFN's place with Lory(config, ffn=MyFFN). For another routing, derive from
    LoryFFN and override `routing_weights`, or `route` and `route_prompt`. Any module works that is built from
    a config, takes (x, cache) and returns (output, routing weights). `init_weights` sets its parameters. A
    parameter of three dimensions counts as stacked experts (E, in, out). A submodule called `router` gets no
    gradient in dense warm-up."""

    def __init__(self, config, ffn=LoryFFN, seed=1337):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, ffn) for _ in range(config.n_layer))
        self.ffn_name = type(self.blocks[0].ffn).__name__  # a checkpoint stores it
        self.norm = nn.RMSNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """As GPT-2: normal with std 0.02, less for the matrices that write into the residual stream. Each
        parameter is drawn from (seed, name) alone, and all experts get the same numbers. So models of 1 and
        of 8 experts begin as the same function.

        The router must not begin at zero, or experts would stay equal for ever. A router of zero gives them
        equal gradients. Equal experts give the router none: where all de_i are equal, the gradient through
        the softmax is zero. With a random router the dθ_i = Σ_n e(n)_i dW(n) differ, experts part, and it
        learns. (dθ is the gradient of θ, dW that of W.)"""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(0 if name.endswith('bias') else 1)  # norms are 1; a bias of 0 is a uniform prior
                continue
            residual = name.endswith(('attn.proj.weight', 'ffn.down'))
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
            generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} {name}'.encode()))
            drawn = torch.empty(p.shape[-2:]).normal_(std=std, generator=generator)  # one expert's
            p.copy_(drawn.to(p.device))

    def trunk(self, idx, caches=None):
        """All but the output head. Tokens (B, L) -> (B, L, D), a list of routing weights (B, N, E), one for
        each layer"""
        x = self.embed(idx)  # (B, L, D)
        routing, L = [], idx.shape[1]
        start = caches[0].pos if caches else 0
        pos = torch.arange(start, start + L, device=idx.device)  # (L,)
        rope = rotation(pos, self.config.n_embd // self.config.n_head)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x, e = block(x, rope, cache)
            routing.append(e)
        return self.norm(x), routing

    def forward(self, idx, targets=None, return_routing=False):
        """idx, targets (B, L) int64, any L >= 1; targets of -1 are ignored.
        -> logits (B, L, V)
        -> mean loss in nats per token, or None without targets
        -> only if return_routing: routing weights (B, n_layer, N, E), detached"""
        x, routing = self.trunk(idx)
        logits, loss = self.head(x), None  # (B, L, V)
        if targets is not None:
            flat = logits.flatten(0, 1)  # (B * L, V)
            loss = F.cross_entropy(flat, targets.flatten(), ignore_index=-1)  # targets (B * L,)
        return (logits, loss, torch.stack(routing, 1).detach()) if return_routing else (logits, loss)

    # Dense warm-up (Sec. 4.1, G.3). The paper trains a dense model, then copies its FFN into every expert.
    # Here the experts exist from the start. Equal experts with equal gradients stay equal, and merge to one
    # FFN however they are routed. A training loop calls the next two methods in each step of warm-up. When
    # the calls stop, experts part: the paper's upcycling.

    def tie_gradients(self):
        """After backward, before clipping: every expert's gradient becomes the mean of all experts', the
        router's becomes zero. (Its weights still decay.) The mean is 1/E of a dense FFN's gradient, a factor
        that Adam's step ignores. When warm-up ends e_i is about 1/E, so expert i's own gradient is as large,
        and Adam's averages keep their scale. (Clipping sees a norm of all experts √E times too small.)"""
        for name, p in self.named_parameters():
            if p.dim() == 3:
                p.grad.copy_(p.grad.mean(0, keepdim=True))  # in place: DDP keeps a view of it
            elif '.router.' in name:
                p.grad.zero_()  # of equal experts it is a rounding error, which Adam would scale up

    @torch.no_grad()
    def tie_experts(self):
        """After the step: copy the first expert over the others. Fused AdamW rounds the last few elements of
        a tensor differently, so experts would drift 1e-8 apart."""
        for p in self.parameters():
            if p.dim() == 3:
                p.copy_(p[:1].clone())

    # Generation, with one Cache per layer.

    @torch.no_grad()
    def prefill(self, idx):
        """Read prompts (B, L), 1 <= L <= block_size.
        -> logits of the next token (B, V), routing weights (B, n_layer, 1, E), one Cache per layer"""
        L, most = idx.shape[1], self.config.block_size
        if not 1 <= L <= most:
            raise UserError(f'the prompt has {L:,} tokens: give 1 to block_size={most}.')
        caches = [Cache(most) for _ in self.blocks]
        x, routing = self.trunk(idx, caches)
        return self.head(x[:, -1]), torch.stack(routing, 1), caches

    @torch.no_grad()
    def decode(self, token, caches):
        """Read one more token (B,) of each sequence. -> logits of the next token (B, V)"""
        x, _ = self.trunk(token[:, None], caches)  # (B, 1, D)
        return self.head(x[:, -1])

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0):
        """Continue prompts (B, L). They are of equal length: padding would count in the mean that routes.
        Yields the next tokens (B,). temperature 0 is greedy; top_k 0 and top_p 1 leave out none."""
        logits, _, caches = self.prefill(idx)
        for made in range(1, max_new_tokens + 1):
            token = draw(logits, temperature, top_k, top_p)
            yield token
            if made < max_new_tokens:
                logits = self.decode(token, caches)

    def generate(self, idx, max_new_tokens, **how):
        """All tokens of `stream` at once. (B, L) -> (B, max_new_tokens)"""
        new = [token[:, None] for token in self.stream(idx, max_new_tokens, **how)]
        return torch.cat([idx[:, :0], *new], 1)

    # For a training loop.

    def optimizer(self, lr, weight_decay, betas):
        """AdamW (Sec. 4.1). Matrices and experts decay, the norms and the router's bias do not."""
        params = list(self.parameters())
        groups = [dict(params=[p for p in params if p.dim() > 1], weight_decay=weight_decay),
                  dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)

    def fitted(self, state, ffn_name=None):
        """What this model takes from a state dict, for load_state_dict(..., strict=False). A dense FFN fills
        every expert. A router that only one of the two has is skipped. UserError if they do not fit."""
        if ffn_name not in (None, self.ffn_name):
            raise UserError(f'its FFNs are {ffn_name}s: use its script, or build=partial(Lory, ffn=...).')
        mine, whole = self.state_dict(), {}
        for name in mine | state:
            if '.router.' in name and not (name in mine and name in state):
                continue  # one of the two is dense and has no router
            try:
                whole[name] = state[name].expand(mine[name].shape)  # (1, in, out) fills (E, in, out)
            except (KeyError, RuntimeError) as error:
                raise UserError(f'{name} is missing or does not fit: give the model the n_layer, n_experts '
                                'and sizes of these weights.') from error
        return whole

    def num_params(self, active=False):
        """Parameters, or only the active ones: one expert of each layer, and no router."""
        return sum(p[0].numel() if active and p.dim() == 3 else p.numel()
                   for name, p in self.named_parameters() if not (active and '.router.' in name))


def draw(logits, temperature, top_k, top_p):
    """Draw the next token of each sequence. (B, V) -> (B,)"""
    if temperature < 1e-5:  # 0 is greedy
        return logits.argmax(-1)
    share, token = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)  # (B, V) both
    if top_k > 0:
        share = share[:, :top_k]  # (B, top_k), the likeliest
    share = share / share.sum(-1, keepdim=True)
    if top_p < 1:  # keep a token if the likelier ones before it sum to top_p or less
        share = share * (share.cumsum(-1) - share <= top_p)
    return token.gather(-1, torch.multinomial(share, 1))[:, 0]


# --- Flags, files and errors, shared by the scripts. ---

def add_flag(parser, name, default, help, low=0, below=math.inf, choices=None):
    """Add --name=value to the parser, of the type of the default and, if a number, in low <= value < below.
    A bool may stand alone, which means True."""
    kind = type(default)

    def parse(text):
        # argparse expects a ValueError for bad text. int, float and index raise it.
        value = bool(['false', 'true'].index(text.lower())) if kind is bool else kind(text)
        if kind is not str and not low <= value < below:
            raise argparse.ArgumentTypeError(f'{text} is not in {low} <= {name} < {below}')
        return value
    parse.__name__ = kind.__name__  # as in argparse's "invalid int value"
    alone = dict(nargs='?', const=True) if kind is bool else {}
    parser.add_argument(f'--{name}', default=default, type=parse, choices=choices,
                        help=f'{help} (default: {default})', **alone)


def make_parser(doc):
    """A parser whose --help begins with a script's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   usage='python %(prog)s [--flag=value ...], see --help', allow_abbrev=False)


def run_script(main):
    """Run a script's main(). What a user can mend becomes one sentence on stderr and exit code 2."""
    sys.stdout.reconfigure(errors='replace', line_buffering=True)  # a terminal may lack a character
    try:
        sys.exit(main())
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
    except UserError as error:
        sentence = str(error)
    except (OSError, RuntimeError, MemoryError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save on a full disk
        if isinstance(cause, OSError):
            sentence = f'{cause}: check the path, the rights and the free space.'
        elif re.search('allocate|out of memory|MemoryError', repr(error)):
            sentence = 'out of memory: use less text, a smaller model or more gradient_accumulation_steps.'
        elif re.search(r'C(\+\+)? compiler', str(error)):  # inductor's and Triton's messages
            sentence = '--compile needs a compiler of C and C++: install gcc and g++, or leave it out.'
        else:
            raise
    print(f'{os.path.basename(sys.argv[0])}: {sentence}', file=sys.stderr)
    sys.exit(2)


def usable_device(name):
    """The device called `name`, or for 'auto' the fastest there is. UserError if it cannot be used here."""
    if name == 'auto':
        name = str(torch.accelerator.current_accelerator(check_available=True) or 'cpu')
    with suppress(Exception):  # torch raises many kinds
        torch.zeros(1, device=name).item()
        return name
    raise UserError(f'device={name} cannot be used here; try --device=cpu.')


@contextmanager
def atomic_open(path, mode='wb', **kw):
    """Write a file whole or not at all: to path.tmp, fsync, rename. Its folder is made if missing."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(f'{path}.tmp', mode, **kw) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(f'{path}.tmp', path)


FORMAT = 2  # of checkpoints


def save_checkpoint(path, model, tokenizer, weights=None, **rest):
    """Write a Lory, its tokenizer (the content of tokenizer.json) and the plain values in `rest`, atomically.
    `weights` is its state dict, if the caller has it already."""
    rest |= dict(format=FORMAT, layer=model.ffn_name, config=asdict(model.config), tokenizer=tokenizer)
    with atomic_open(path) as f:
        torch.save(dict(rest, model=weights or model.state_dict()), f)


def read_checkpoint(path):
    """-> the dict that save_checkpoint wrote. UserError unless it is whole and of this format.
    Under torchrun each rank maps the file instead of reading it, and one on each machine verifies it."""
    try:
        open(path, 'rb').close()
    except OSError as error:
        raise UserError(f'cannot read {path} ({error.strerror}): check it, or run train.py first.') from None
    rank = os.environ.get('LOCAL_RANK')
    with suppress(Exception):  # zipfile and torch raise many kinds
        with zipfile.ZipFile(path) as archive:
            # testzip looks at the checksums, which torch.load does not, and returns what is damaged.
            damaged = archive.testzip() if rank in (None, '0') else None
        ckpt = torch.load(path, map_location='cpu', weights_only=True, mmap=rank is not None)
        if not damaged and ckpt['format'] == FORMAT:
            return ckpt
    raise UserError(f'choose another file: {path} is damaged, larger than memory or not of format {FORMAT}.')


def load_checkpoint(path, device='cpu', build=Lory):
    """-> the model stored at path (float32, on `device`, in eval mode), and the dict that it was stored in.
    `build` makes a model from a config: functools.partial(Lory, ffn=MyFFN) for an FFN of your own."""
    ckpt = read_checkpoint(path)
    model = build(LoryConfig(**ckpt['config']))
    model.load_state_dict(model.fitted(ckpt['model'], ckpt['layer']), strict=False)
    return model.eval().to(device), ckpt
