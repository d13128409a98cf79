"""
Train a mixture of experts that routes every token by itself, the sparse baseline that Lory is compared with.

    python experiments/token_moe.py --n_experts=8 --out_dir=out-choice        any flag of train.py

It is Expert Choice (Sec. 5.3; arXiv:2202.09368) with capacity factor 1: the model and the loop are
Lory's, only the layer differs. Nothing is merged, so segment_len, routing and first_segment do not
matter. To load a checkpoint, give load_checkpoint `build=functools.partial(Lory, ffn=ExpertChoiceFFN)`.
"""
import os
import sys
from functools import partial

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train
from lory import Lory, LoryFFN, run_script, swiglu


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
        share = self.routing_weights(x)  # (B, L, E)
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


def main(argv=None):
    return train.main(argv, build=partial(Lory, ffn=ExpertChoiceFFN))


if __name__ == '__main__':
    run_script(main)
