"""
Train with a short first segment: strictly causal, and only its T/8 tokens make do with the prior.

    python experiments/short_first.py --segment_len=256 --out_dir=out-short        any flag of train.py

The mean of these few tokens routes segment 2, and from there on all segments are T long. That is one
more merge in a sequence. What it is worth stands in runs-c0966a5.csv, group `e8 half T256 short`. To load a
checkpoint, give load_checkpoint `build=functools.partial(Lory, ffn=ShortFirstFFN)`.
"""
import math
import os
import sys
from functools import partial

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train
from lory import Lory, LoryFFN, run_script, swiglu


class ShortFirstFFN(LoryFFN):
    def forward(self, x, cache=None):
        """(B, L, D) -> output (B, L, D), routing weights (B, 1 + R, E). Generation is LoryFFN's: the
        prompt routes."""
        B, L, D = x.shape
        T, T1 = self.segment_len, max(1, self.segment_len // 8)  # T1 tokens in segment 1
        if self.router is None or cache is not None or L <= T1:
            return super().forward(x, cache)
        R = math.ceil((L - T1) / T)  # segments after the first
        first = x[:, :T1]  # (B, T1, D)
        later = F.pad(x[:, T1:], (0, 0, 0, R * T - (L - T1))).view(B, R, T, D)
        second = self.routing_weights(first)[:, None]  # (B, 1, E)
        e = torch.cat([self.prior(x), second, self.routing_weights(later[:, :-1])], 1)  # (B, 1 + R, E)
        y_first = swiglu(first, *self.merge_experts(e[:, 0]))  # (B, T1, D)
        y_later = swiglu(later, *self.merge_experts(e[:, 1:]))  # (B, R, T, D)
        return torch.cat([y_first, y_later.flatten(1, 2)[:, :L - T1]], 1), e


def main(argv=None):
    return train.main(argv, build=partial(Lory, ffn=ShortFirstFFN))


if __name__ == '__main__':
    run_script(main)
