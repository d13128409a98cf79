"""
The tests of to_llama.py: what the exported folder says is what the Lory says, token by token.

    python -m pytest -q experiments/test_to_llama.py
"""
import base64
import os
import random
import runpy
import sys

import pytest
import torch

pytest.importorskip('transformers', reason='to_llama.py needs transformers, which is not installed')
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import prepare
import to_llama
from lory import Lory, LoryConfig, UserError, save_checkpoint

torch.set_num_threads(1)
PROMPT = 'def mean(values):\n    """The average."""\n    return'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A small dataset of the built-in corpus, made by prepare.py."""
    folder = tmp_path_factory.mktemp('data')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare.main(['--mb_per_domain=0.05', '--vocab_size=700', '--val_fraction=0.3'])
    return prepare.load_dataset(folder / 'data' / 'builtin', 64)


def write_checkpoint(path, tokenizer, **changes):
    """A Lory of large random weights: routing far from uniform, norms not 1. -> the model"""
    vocab_size = prepare.load_tokenizer(tokenizer).n_vocab
    shape = dict(block_size=96, n_layer=3, n_head=2, n_embd=48, ffn_hidden=80, n_experts=4, segment_len=16)
    model = Lory(LoryConfig(vocab_size, **(shape | changes))).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'norm' in name:
                p.uniform_(0.5, 2)
            else:
                p.normal_(std=1.0 if 'router' in name else 0.2)
    save_checkpoint(path, model, tokenizer=tokenizer)
    return model


def export(tmp_path, start=PROMPT):
    """What main() makes of tmp_path's checkpoint, loaded from the folder. -> LlamaForCausalLM, tokenizer"""
    to_llama.main([f'--checkpoint={tmp_path}/ckpt.pt', f'--start={start}', f'--out={tmp_path}/expert'])
    loaded = [auto.from_pretrained(tmp_path / 'expert') for auto in (AutoModelForCausalLM, AutoTokenizer)]
    assert type(loaded[0]).__name__ == 'LlamaForCausalLM'
    return loaded


def check_continuation(lory, llama, ids):
    """40 greedy tokens after the prompt ids (1, L), and the logits that led to each, are the same."""
    logits, _, caches = lory.prefill(ids)
    ours = [logits]  # (1, V) each
    new = lory.generate(ids, 40, temperature=0)  # (1, 40)
    for token in new[0, :-1]:
        ours.append(lory.decode(token[None], caches))
    ours = torch.cat(ours)  # (40, V)
    with torch.no_grad():
        theirs = llama(torch.cat([ids, new], 1)).logits[0, ids.shape[1] - 1:-1]  # (40, V)
    assert ours.abs().max() > 5 and len(set(new[0].tolist())) > 10  # a model with something to say
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    llama.generation_config.eos_token_id = None  # go on after <|endoftext|>, as Lory.generate does
    greedy = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert torch.equal(greedy[:, ids.shape[1]:], new)


@pytest.mark.parametrize('changes', [{}, dict(tie_embeddings=False, n_head=3, routing='prefix')])
def test_the_llama_continues_the_prompt_as_the_lory_does(data, tmp_path, changes):
    lory = write_checkpoint(tmp_path / 'ckpt.pt', data.tokenizer, **changes)
    llama, tokenizer = export(tmp_path)
    ids = tokenizer(PROMPT, return_tensors='pt').input_ids  # (1, L)
    check_continuation(lory, llama, ids)
    other = ids.flip(1)
    routing = lory.prefill(ids)[1]  # (1, n_layer, 1, E)
    assert routing.amax(-1).min() > 0.4 and (routing - lory.prefill(other)[1]).abs().amax() > 0.3
    with torch.no_grad():  # the experts are those of this prompt, not of another
        assert (llama(other).logits[:, -1] - lory.prefill(other)[0]).abs().max() > 1


def test_a_dense_checkpoint_needs_no_prompt(data, tmp_path):
    lory = write_checkpoint(tmp_path / 'ckpt.pt', data.tokenizer, n_experts=1)
    llama, tokenizer = export(tmp_path, start='')
    check_continuation(lory, llama, tokenizer(PROMPT, return_tensors='pt').input_ids)


def test_the_pipeline_takes_the_prompt_and_gives_the_text_that_the_lory_writes(data, tmp_path):
    lory = write_checkpoint(tmp_path / 'ckpt.pt', data.tokenizer)
    encoding = prepare.load_tokenizer(data.tokenizer)
    export(tmp_path)
    (tmp_path / 'prompt.txt').write_text(PROMPT)
    to_llama.main([f'--checkpoint={tmp_path}/ckpt.pt', f'--start=FILE:{tmp_path}/prompt.txt',
                   f'--out={tmp_path}/again'])
    ids = torch.tensor([[encoding.eot_token] + prepare.encode(encoding, PROMPT)])
    text = PROMPT + encoding.decode(lory.generate(ids, 20, temperature=0)[0].tolist())
    for folder in ('expert', 'again'):
        llama = pipeline('text-generation', str(tmp_path / folder))
        assert llama(PROMPT, max_new_tokens=20, do_sample=False)[0]['generated_text'] == text


# --- Tokens. ---

def random_texts(n):
    """Strings from small alphabets, where merges compete, and from more and more of Unicode."""
    r = random.Random(0)
    small = ['ab', ' a', ' \n\t\r', 'etaoin ', '0123456789 .,', '()=-_#*"\'', '\0\x07\x1b\x7f\x85\xa0 x',
             'e\u0301\u0308a\u200d\u20e3 ', '🙂👩🏽\u200d🚀\ufe0f ', '混合专家语言模型。 ', '١٢٣४५Ⅷ½ ', 'ÄßÐğıſ ']
    large = [[chr(c) for c in range(end) if not 0xd800 <= c < 0xe000] for end in (0x250, 0x3000, 0x110000)]
    texts = [''.join(r.choices(r.choice(alphabets), k=r.randrange(60))) for alphabets in (small, large)
             for _ in range(n)]
    return texts + ['', ' ', 'a' * 1000, ' ' * 1000, '<|endoftext|>', 'x <|endoftext|><|endoftext|>\n']


def compare(d, texts, tmp_path):
    """The tokenizer that is loaded from a folder makes the ids of prepare.encode, and the text of those."""
    to_llama.to_tokenizer(d, 64).save_pretrained(tmp_path)
    tokenizer, encoding = AutoTokenizer.from_pretrained(tmp_path), prepare.load_tokenizer(d)
    eot = d['special_tokens'][prepare.EOT]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == eot
    for text, ids in zip(texts, tokenizer(texts).input_ids):
        assert ids == [eot] + prepare.encode(encoding, text), ascii(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_token_ids_are_those_of_every_held_out_document(data, tmp_path):
    to_llama.to_tokenizer(data.tokenizer, 64).save_pretrained(tmp_path)
    tokenizer, encoding = AutoTokenizer.from_pretrained(tmp_path), prepare.load_tokenizer(data.tokenizer)
    starts = data.val.start
    docs = [data.val.tokens[a:b].tolist() for a, b in zip(starts, starts[1:])]  # <|endoftext|> first
    texts = [encoding.decode(doc[1:]) for doc in docs]
    assert len(docs) > 20 and tokenizer(texts).input_ids == docs


def test_token_ids_are_the_same_on_random_unicode(data, tmp_path):
    """<|endoftext|> written out in a text is no special token in either."""
    compare(data.tokenizer, random_texts(1500), tmp_path)


def test_token_ids_of_bytes(tmp_path):
    compare(prepare.make_tokenizer('byte'), random_texts(100), tmp_path)


def test_token_ids_of_a_foreign_tokenizer(data, tmp_path):
    """Like tiktoken's own: bytes in another order, a gap in the ranks, <|endoftext|> in it, one more special
    token. Ranks in any order, so that some tokens cannot be reached by merges."""
    r = random.Random(0)
    tokens = [bytes([b]) for b in r.sample(range(256), 256)]
    tokens += r.sample([base64.b64decode(token) for token in data.tokenizer['tokens'][256:]], 443)
    tokens.insert(600, b'')
    d = dict(data.tokenizer, tokens=[base64.b64encode(token).decode() for token in tokens],
             special_tokens={prepare.EOT: 600, '<|more|>': 705})
    words = [token.decode(errors='ignore') for token in tokens]
    compare(d, random_texts(300) + words + ['<|more|>'], tmp_path)


def test_byte_alphabet_is_that_of_the_library():
    assert sorted(to_llama.byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())


# --- Errors: one sentence each. ---

def refused(match, *argv):
    with pytest.raises(UserError, match=match) as refusal:
        to_llama.main([*argv])
    assert '\n' not in str(refusal.value)


def test_refusals(data, tmp_path):
    checkpoint, out = f'--checkpoint={tmp_path}/ckpt.pt', f'--out={tmp_path}/expert'
    model = write_checkpoint(tmp_path / 'ckpt.pt', data.tokenizer)
    refused('block_size', checkpoint, out, '--start=' + 'x' * 500)
    refused('prompt', checkpoint, out)
    refused('cannot write', checkpoint, f'--out={tmp_path}/ckpt.pt/expert', '--start=x')
    refused('no empty folder', checkpoint, f'--out={tmp_path}', '--start=x')
    refused('no empty folder', checkpoint, f'--out={tmp_path}/ckpt.pt', '--start=x')
    assert [file.name for file in tmp_path.iterdir()] == ['ckpt.pt']


@pytest.mark.parametrize('library', ['tokenizers', 'transformers'])
def test_a_missing_library_is_one_sentence_and_exit_code_2(library, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(sys, 'argv', [to_llama.__file__])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(to_llama.__file__, run_name='__main__')
    assert ended.value.code == 2
    assert capsys.readouterr().err == f'to_llama.py: {library} is not installed: pip install transformers\n'
