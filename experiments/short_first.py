"""
Train with a short first segment: strictly causal, and only its T/8 tokens make do with the prior.

    python experiments/short_first.py --segment_len=256 --out_dir=out-short        any flag of train.py

The mean of these few tokens routes segment 2, and from there on all segments are T long. One more merge a sequence. What it is
worth stands in runs.csv, group `e8 half T256 short`. A model trained so is no Lory of lory.py, which would read its checkpoint
and cut its sequences at multiples of T.
"""
import math
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import lory
import train


class ShortFirstFFN(lory.LoryFFN):
    def forward(self, x):
        B, L, D = x.shape
        T, T1 = self.segment_len, self.segment_len // 8              # T1 tokens in segment 1
        if self.router is None or L <= T1:
            return super().forward(x)
        R = math.ceil((L - T1) / T)                                  # segments after it
        first, later = x[:, None, :T1], F.pad(x[:, T1:], (0, 0, 0, R * T - (L - T1))).view(B, R, T, D)
        prior = self.router.bias.softmax(-1).expand(B, 1, -1)
        e = torch.cat([prior, self.weights(torch.cat([first.mean(2), later[:, :-1].mean(2)], 1))], 1)   # (B, 1 + R, E)
        parts = self.run(first, e[:, :1]).flatten(1, 2), self.run(later, e[:, 1:]).flatten(1, 2)[:, :L - T1]
        return torch.cat(parts, 1), e


if __name__ == '__main__':
    lory.LoryFFN = ShortFirstFFN
    try:
        sys.exit(train.main())
    except lory.UserError as e:
        print(f'short_first.py: {e}', file=sys.stderr)
        sys.exit(2)
