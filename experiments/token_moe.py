"""
Train a mixture of experts that routes every token by itself: the sparse baselines for Lory.

    python experiments/token_moe.py --layer=switch --out_dir=out-switch        and any flag of train.py

--layer=expert_choice  experts choose tokens (Sec. 5.3; arXiv:2202.09368), with capacity factor 1
--layer=switch         each token goes to one of 8 experts (Switch Transformer, arXiv:2101.03961)
--layer=mixtral        each token goes to two of 16 experts of half the width (Mixtral, arXiv:2401.04088)

The model and the loop are Lory's, only the layer differs. Routers aside, each has as many parameters as a
Lory of n_experts, active and total. Nothing is merged, so segment_len, routing and first_segment do not
matter. To load a checkpoint, give load_checkpoint `build=functools.partial(Lory, ffn=SwitchFFN)`, or to train
it on a loop of your own, BalancedLory.
"""
import math
import os
import sys
import zlib
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train
from lory import Lory, LoryFFN, add_flag, make_parser, run_script, swiglu


class ExpertChoiceFFN(LoryFFN):
    """Experts choose tokens. An output is weighted by the share that the router's softmax gives the expert.

    In training each expert takes the L/E tokens of a sequence that want it most, so the load is even by
    construction. But whether a token is taken then depends on tokens after it. A language model must be
    judged without that, so in evaluation each token goes to its best expert. That also serves
    generation, which has nothing to remember here.

    `--dense_warmup` ties equal experts whose outputs are weighted by the share, about 1/E to begin
    with, and lets some tokens be taken twice and others not at all. So the model is not a dense one
    then, as a Lory is.
    """
    def forward(self, x, cache=None):
        """(B, L, D) -> output (B, L, D), mean share of each expert (B, 1, E)"""
        if self.router is None:
            return super().forward(x, cache)
        share = self.routing_weights(x[:, :, None])  # (B, L, E), each token by itself
        y = self.experts_choose(x, share) if self.training else self.tokens_choose(x, share)
        return y, share.mean(1, keepdim=True)

    def experts_choose(self, x, share):
        """Each expert takes C tokens of each sequence. (B, L, D), (B, L, E) -> (B, L, D)"""
        B, L, D = x.shape
        E = share.shape[2]
        C = max(1, L // E)  # capacity of an expert
        share, token = share.mT.topk(C)  # (B, E, C) both
        at = token.view(B, E * C, 1).expand(-1, -1, D)  # (B, E * C, D)
        taken = x.gather(1, at).view(B, E, C, D).transpose(0, 1).flatten(1, 2)  # (E, B * C, D)
        made = swiglu(taken, self.gate, self.up, self.down)  # (E, B * C, D)
        made = made.view(E, B, C, D).transpose(0, 1) * share[..., None]  # (B, E, C, D)
        return torch.zeros_like(x).scatter_add(1, at, made.flatten(1, 2).to(x.dtype))

    def tokens_choose(self, x, share):
        """Each token goes to its best expert. (B, L, D), (B, L, E) -> (B, L, D)"""
        share, best = share.max(-1)  # (B, L) both
        y = torch.zeros_like(x)
        for i in range(len(self.gate)):
            mine = best == i  # (B, L)
            made = swiglu(x[mine], self.gate[i], self.up[i], self.down[i])  # (tokens of expert i, D)
            y[mine] = (made * share[mine][:, None]).to(y.dtype)
        return y


class TokenChoiceFFN(LoryFFN):
    """Tokens choose experts: Switch for K = 1, Mixtral for K = 2.

    A token goes to K of K * E experts of width H/K, so it meets as many parameters as in a dense FFN. They
    are the E stacked experts, each cut into K parts along H; part p of stacked expert i is number p * E + i.
    Every token is served (dropless). So outputs are causal in training too, and generation has nothing to
    remember. In training two losses are added, as means over the tokens that the device holds:

        balance  K E Σ_i f_i P_i (arXiv:2101.03961, Eq. 4), 1 if all is even. f_i is the share of choices
                 that fell on expert i, P_i its mean probability.
        z        logsumexp(logits)² (ST-MoE, arXiv:2202.08906, Eq. 5). It keeps logits small.

    While all stacked experts are equal bit for bit, which `--dense_warmup` sees to, a token goes to its best
    copy of each part, with weight 1, and neither loss is added. One copy of each part is the whole FFN, so
    the model is the dense one. Once gradients are no longer tied, each copy hears its own tokens and they
    part. This is sparse upcycling (arXiv:2212.05055). From then on the weights are those of the papers, and
    nothing is rescaled to make up for them. Right after, a Switch layer puts out p, about 1/E, times what the
    dense FFN did. A Mixtral layer puts out two halves times about 1/2, perhaps the same half twice. So the
    loss jumps, and training has to recover.
    """
    K = 1
    aux_loss = 0.0  # of the last pass in training

    def __init__(self, config):
        super().__init__(config)
        if self.router is not None:
            self.router = nn.Linear(config.n_embd, self.K * config.n_experts)

    def forward(self, x, cache=None):
        """(B, L, D) -> output (B, L, D), load (B, 1, E). Load is the share of a sequence's choices that fell
        on a stacked expert, on any part of it. So train.py counts an expert as in use if some sequence sends
        it more than 2/E of its tokens, and experts.png shows the mean load."""
        if self.router is None:
            return super().forward(x, cache)
        B, L, D = x.shape
        E, K = len(self.gate), self.K
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x.to(self.router.weight.dtype)).flatten(0, 1)  # (B * L, K * E)
        equal = bool((self.down == self.down[:1]).all())  # some 0.1% of a step
        if equal:
            best = logits.view(B * L, K, E).argmax(-1)  # (B * L, K), a copy of each part
            chosen = best + E * torch.arange(K, device=x.device)  # (B * L, K)
            weight = torch.ones_like(logits[:, :K])  # (B * L, K)
        else:
            chosen = logits.topk(K).indices  # (B * L, K)
            weight = self.weights(logits, chosen)  # (B * L, K)
        sent = torch.stack([c.bincount(minlength=K * E) for c in chosen.view(B, L * K)])  # (B, K * E)
        if self.training:
            # While equal, the router gets a gradient of zeros: tie_gradients and DDP want one.
            self.aux_loss = 0 * logits.sum() if equal else self.losses(logits, sent.sum(0))
        y = self.run_experts(x.flatten(0, 1), chosen, weight, sent.sum(0).tolist())  # (B * L, D)
        return y.view(B, L, D), sent.view(B, 1, K, E).sum(2) / (L * K)

    def run_experts(self, x, chosen, weight, sent):
        """Sort the tokens by expert, run each expert on its own, and sort them back. x (M, D), chosen and
        weight (M, K), sent: a list of K * E, tokens of each expert -> (M, D)"""
        M, D = x.shape
        order = chosen.flatten().argsort(stable=True)  # (M * K,), places in `chosen`, sorted by expert
        rows = x.index_select(0, order // self.K).split(sent)  # K * E of (tokens of that expert, D)
        # gate, up and down of each of the K * E experts. (unbind, as gate[i] has a gradient of gate's size)
        thetas = [[theta for part in stack.chunk(self.K, dim) for theta in part.unbind()]
                  for stack, dim in ((self.gate, 2), (self.up, 2), (self.down, 1))]
        # On a CPU in bfloat16 oneDNN makes new code for every new number of rows, so few numbers are used.
        multiple = 64 if torch.is_autocast_enabled(x.device.type) else 1
        made = []
        for mine, *theta in zip(rows, *thetas):
            padded = F.pad(mine, (0, 0, 0, -len(mine) % multiple))
            made.append(swiglu(padded, *theta)[:len(mine)])
        made = torch.cat(made)  # (M * K, D)
        made = made.index_select(0, order.argsort()).view(M, self.K, D)  # as in `chosen`
        return (made * weight[..., None]).sum(1).to(x.dtype)

    def losses(self, logits, sent):
        """0.01 * balance + 0.001 * z. logits (M, K * E), sent (K * E,), choices of each expert -> scalar"""
        f, P = sent / sent.sum(), logits.softmax(-1).mean(0)  # (K * E,) both
        balance = len(f) * (f * P).sum()
        z = logits.logsumexp(-1).square().mean()
        return 0.01 * balance + 0.001 * z


class SwitchFFN(TokenChoiceFFN):
    """One of E experts, without capacity, jitter or expert dropout."""

    def weights(self, logits, chosen):
        """The chosen expert's probability among all (arXiv:2101.03961, Eq. 2). (M, E), (M, 1) -> (M, 1)"""
        return logits.softmax(-1).gather(1, chosen)


class MixtralFFN(TokenChoiceFFN):
    """Two of 2 * E experts of half the width."""
    K = 2

    def weights(self, logits, chosen):
        """softmax over the two chosen logits (arXiv:2401.04088, Sec. 2.1). (M, 2E), (M, 2) -> (M, 2)"""
        return logits.gather(1, chosen).softmax(-1)


LAYERS = {'expert_choice': ExpertChoiceFFN, 'switch': SwitchFFN, 'mixtral': MixtralFFN}


class BalancedLory(Lory):
    """In training the layers' own losses are added to that of the text."""

    def forward(self, idx, targets=None, return_routing=False):
        logits, loss, *routing = super().forward(idx, targets, return_routing)
        if self.training and targets is not None:
            loss = loss + sum(block.ffn.aux_loss for block in self.blocks)
        return logits, loss, *routing


class ApartLory(BalancedLory):
    """Each expert begins with numbers of its own, where in Lory all begin with the same."""

    @torch.no_grad()
    def init_weights(self, seed):
        super().init_weights(seed)
        for name, p in self.named_parameters():
            if p.dim() == 3:
                residual = name.endswith('down')
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02  # Lory's
                generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} {name} apart'.encode()))
                p.copy_(torch.empty(p.shape).normal_(std=std, generator=generator).to(p.device))


def main(argv=None):
    parser = make_parser(__doc__)
    add_flag(parser, 'layer', 'expert_choice', 'what routes, and how', choices=list(LAYERS))
    own, argv = parser.parse_known_args(argv)
    ffn, model = LAYERS[own.layer], Lory
    if issubclass(ffn, TokenChoiceFFN):
        # Without warm-up as in the papers. Later on, the run's checkpoints bring its weights.
        model = BalancedLory if train.flags().parse_args(argv).dense_warmup else ApartLory
    return train.main(argv, build=partial(model, ffn=ffn))


if __name__ == '__main__':
    run_script(main)
