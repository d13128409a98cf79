"""
Train with a third rule for the first segment, a geometric ramp: strictly causal, and no position waits T tokens for routing.

    python experiments/ramp.py --segment_len=256 --out_dir=out-ramp        any flag of train.py

Segment 1 is cut into pieces of T/8, T/8, T/4 and T/2. The prior routes the first piece, each later one is routed by the
mean of all tokens before it; three more merges a sequence. What it is worth stands in runs.csv, group `e8 half T256 ramp`. A
model trained so is no Lory of lory.py: sample.py would read its checkpoint and route segment 1 by the prior.
"""
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import lory
import train


class RampFFN(lory.LoryFFN):
    def forward(self, x):
        y, e = super().forward(x)                                    # right from segment 2 on
        B, L, D = x.shape
        T = self.segment_len
        if self.router is None or L < T:
            return y, e
        means = torch.stack([x[:, :end].mean(1) for end in (T // 8, T // 4, T // 2)], 1)   # (B, 3, D)
        e1 = torch.cat([e[:, :1], self.weights(means)], 1)           # (B, 4, E), one for each piece
        e1 = e1[:, [0, 1, 2, 2, 3, 3, 3, 3]]                         # (B, 8, E), one for each eighth of the segment
        first = self.run(x[:, :T].reshape(B, 8, T // 8, D), e1).view(B, T, D)
        return torch.cat([first, y[:, T:]], 1), e


if __name__ == '__main__':
    lory.LoryFFN = RampFFN
    try:
        sys.exit(train.main())
    except lory.UserError as e:
        print(f'ramp.py: {e}', file=sys.stderr)
        sys.exit(2)
