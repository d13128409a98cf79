"""
What the README tells a user to write, run as it stands there.

    python -m pytest -q experiments/test_readme.py
"""
import os
import re
import sys
from pathlib import Path

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import prepare
from lory import Lory, LoryConfig, load_checkpoint, save_checkpoint


def test_the_library_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    """Only the checkpoint and the batches are ours, and a loop of 1,000 steps has 60 here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    torch.manual_seed(0)
    tokenizer = prepare.make_tokenizer('byte')
    save_checkpoint('out/ckpt.pt', Lory(LoryConfig(257, n_embd=16, ffn_hidden=32)), tokenizer=tokenizer)
    text = torch.arange(257).repeat(2, 1) % 7 + 97
    readme = Path(ROOT, 'README.md').read_text(encoding='utf-8')
    blocks = re.findall(r'```python\n(.*?)```', readme, re.DOTALL)
    assert len(blocks) == 4
    names = dict(batches=iter(lambda: text, None))
    exec(blocks[0], names)
    assert names['new'].shape == (1, 100) and names['dense'].config.n_experts == 1
    exec(blocks[1].replace('range(1000)', 'range(60)'), names)
    gate = load_checkpoint('mine.pt')[0].blocks[0].ffn.gate
    assert names['loss'] < 2.5 and not torch.equal(gate[0], gate[1])
    exec(blocks[2], names)
    logits, _, routing = names['model'](text, return_routing=True)
    assert logits.shape == (2, 257, 257) and routing.shape == (2, 2, 5, 8)
    exec(blocks[3], names)
    assert names['y'].shape == (2, 256, 128) and names['routing'].shape == (2, 4, 8)
