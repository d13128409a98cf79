"""
Generation that routes again for every segment, as in training (App. G.2). The paper finds no difference.

    python experiments/reroute.py --out_dir=out --start=FILE:notes.txt        any flag of sample.py
"""
import os
import sys
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import sample
from lory import Lory, LoryFFN, run_script


class ReroutedFFN(LoryFFN):
    """Prompt and continuation are cut into segments of T tokens, counted from the first one. Needs no other
    weights than a LoryFFN, so it reads the same checkpoints."""

    def forward_cached(self, x, cache):
        """The prompt (B, L, D), then a token (B, 1, D). -> output, the prompt's routing weights (B, N, E)"""
        T = self.segment_len
        if cache.merged is None:
            y, cache.e = self(x)
            cache.merged = self.merge_experts(cache.e[:, -1])
            started = (x.shape[1] - 1) // T * T  # where the last segment begins
            cache.total = x[:, started:].sum(1)  # (B, D), sum of the inputs of the current segment
            return y, cache.e
        before = cache.pos - 1  # tokens read before this one
        if before % T == 0 and (self.routing == 'causal' or before == T):
            mean = cache.total[:, None] / T  # (B, 1, D), as if it were a segment of one token
            cache.merged = self.merge_experts(self.routing_weights(mean))
            cache.total = 0
        cache.total = cache.total + x[:, 0]
        return super().forward_cached(x, cache)


ReroutedFFN.__name__ = LoryFFN.__name__  # by which a checkpoint knows its FFN


def main(argv=None):
    return sample.main(argv, build=partial(Lory, ffn=ReroutedFFN))


if __name__ == '__main__':
    run_script(main)
