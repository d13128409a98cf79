"""Tests of prepare.py, in the order of the file."""
import base64
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex

import prepare
from lory import Lory, LoryConfig, UserError, save_checkpoint
from prepare import Document


@pytest.fixture(scope='session')
def data_docs():
    """Some 200 real documents of five domains."""
    return prepare.read_builtin(mb_per_domain=0.12)


@pytest.fixture(scope='session')
def data_home(data_docs, tmp_path_factory):
    """A folder with `own/`, documents as files in two subfolders, and `data/own`, the dataset made of it."""
    home = tmp_path_factory.mktemp('data_home')
    for i, doc in enumerate(data_docs):
        if doc.domain in ('prose', 'cpp'):
            (home / 'own' / doc.domain).mkdir(parents=True, exist_ok=True)
            (home / 'own' / doc.domain / f'{i}.txt').write_text(doc.text, encoding='utf-8')
    data_prepare(home, *OWN)
    return home


OWN = ['--input', 'own', '--vocab_size=400', '--val_fraction=.2']


def data_prepare(home, *argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        prepare.main(list(argv))


def data_read(home, split, name='own'):
    """[(text, domain)] of a split, in stored order, decoded from the bins with nothing of prepare."""
    path = home / 'data' / name
    meta = json.loads((path / 'meta.json').read_text())
    tokens, docs = np.fromfile(path / f'{split}.bin', '<u2'), np.load(path / f'{split}_docs.npz')
    pieces = [base64.b64decode(t) for t in json.loads((path / 'tokenizer.json').read_text())['tokens']]
    out = []
    for a, b, domain in zip(docs['start'], docs['start'][1:], docs['domain']):
        assert tokens[a] == meta['eot'] and meta['eot'] not in tokens[a + 1:b]
        out.append((b''.join(pieces[t] for t in tokens[a + 1:b]).decode(), meta['domains'][domain]))
    assert docs['start'][-1] == len(tokens) == meta[split]['tokens']
    return out


def data_words(n, seed=0):
    """`n` words that nobody knows."""
    rng = random.Random(seed)
    return ' '.join(''.join(rng.choices('abcdefghijklmnopqrstuvw', k=rng.randrange(2, 9))) for _ in range(n))


def data_jsonl(path, records):
    records = [record if isinstance(record, dict) else {'text': record} for record in records]
    path.write_text('\n'.join(map(json.dumps, records)) + '\n\n')


def data_size(docs, domain=None):
    return sum(len(doc.text.encode()) for doc in docs if domain in (None, doc.domain))


# --- The built-in corpus. ---

def test_pieces_join_to_the_text(data_docs):
    texts = [doc.text for doc in data_docs[:50]]
    texts += ['x' * 10_000, 'line\n' * 3000, '\n\n'.join(['  word ' * 90] * 20), ' ' * 9999]
    for text in [*texts, '\n\n'.join(texts)]:
        pieces = prepare.cut(text)
        assert ''.join(pieces) == text and max(map(len, pieces)) <= prepare.PIECE
    code = 'def f():\n    a = 1\n\n    return a\n\n\n' * 300
    assert all(piece.startswith('def f') for piece in prepare.cut(code))


def test_split_python():
    source = ('import os\n\n\ndef f(x):\n    """Says.\n\n    >>> f(1)\n    2\n\n    More.\n    """\n'
              '    return x\n\n\nclass A:\n    "\\d only"\n')
    parts = prepare.split_python(source)
    assert parts['prose'] == 'Says.\n\nMore.\n\n\\d only' and parts['repl'] == '>>> f(1)\n2'
    assert parts['python'] == 'import os\n\n\ndef f(x):\n    return x\n\n\nclass A:\n    pass\n'


def test_builtin_corpus(data_docs, tmp_path, capfd):
    for domain in prepare.DOMAINS:
        mine = [doc for doc in data_docs if doc.domain == domain]
        assert 120_000 <= sum(len(doc.text) for doc in mine) + 4096 < 135_000
        assert max(Counter(doc.source for doc in mine).values()) <= 4
        assert all(500 < len(doc.text) <= prepare.PIECE for doc in mine)
    assert all('>>> ' in doc.text for doc in data_docs if doc.domain == 'repl')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, 'read_builtin', lambda mb: data_docs[:])
        data_prepare(tmp_path, '--vocab_size=300')
    dataset = prepare.load_dataset(tmp_path / 'data/builtin', 64)
    assert dataset.meta['domains'] == prepare.DOMAINS and set(dataset.val.domain) == set(range(5))
    out, err = capfd.readouterr()
    assert err == '' and 'restarts' in out and 'adjacent cosine' in out


# --- A user's own text. ---

def test_input_kinds(data_docs, tmp_path, capsys, monkeypatch):
    """Folders with links in a circle, text, JSONL, and what is no text, beside a dataset of ours."""
    monkeypatch.chdir(tmp_path)
    texts = [doc.text for doc in data_docs[:40]]
    files = {f'books/sea/deep/{i}.md': texts[i] for i in range(8)}
    files |= {f'books/{i}.txt': texts[i] for i in range(8, 18)}
    files |= {'elsewhere/a.txt': texts[21], 'books/.git/config': 'hidden', 'books/data/old/meta.json': 'ours',
              'books/data/old/train_docs.npz': '', 'books/empty.txt': ' \n', 'books/latin.txt': b'caf\xe9',
              'books/sea/picture.png': b'\x89PNG\0', 'note.txt': '\ufeff' + texts[20].replace('\n', '\r\n')}
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for link, target in ('books/link', 'elsewhere'), ('elsewhere/loop', 'books'), ('books/broken', 'nowhere'):
        Path(link).symlink_to(tmp_path / target)
    os.mkfifo('books/pipe')
    data_jsonl(Path('feed.JSONL'), [{'text': text, 'domain': 'news'} for text in texts[30:]] + [
        {'text': 'in \u2028 line', 'domain': None}, {'text': '<|endoftext|>', 'domain': 0}, ''])
    docs = prepare.read_inputs(['books', 'note.txt', 'feed.JSONL', 'books/'])
    expected = {texts[20]: 'note.txt', texts[21]: 'link', 'in \u2028 line': 'feed.JSONL', '<|endoftext|>': '0'}
    for part, domain in (texts[:8], 'sea'), (texts[8:18], 'books'), (texts[30:], 'news'):
        expected |= dict.fromkeys(part, domain)
    assert {doc.text: doc.domain for doc in docs} == expected and len(docs) == len(expected)
    assert len({doc.source for doc in docs}) == len(docs)
    assert regex.search('6 files, .*: books/broken, books/data/old, books/em.*, ...', capsys.readouterr().out)


def test_one_label_is_one_domain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = ['C#', 'C', 'a/b', 'ab', 'news.2023', 'news.2024', 'naïve 中文', 0, 'x' * 40 + '1', 'x' * 40 + '2',
              '_a', 'a', '<5f>a', '$x$', 'x', ' ', '\ud800', 'line\nbreak', '00', 1.0, True, {'a': 1}]
    data_jsonl(tmp_path / 'a.jsonl', [{'text': 'text', 'domain': label} for label in labels * 2])
    names = [doc.domain for doc in prepare.read_inputs(['a.jsonl'])]
    assert names[:len(labels)] == names[len(labels):] and len(set(names)) == len(labels)
    assert names[:8] == labels[:7] + ['0']
    assert all(name.isprintable() and name[0] not in '_ ' and '$' not in name for name in names)
    for paths in ('en/text', 'fr/text'), ('n.2023', 'n.2024'), ('b.txt', 'b.md'), ('en/a.txt', 'fr/a.txt'):
        for path in map(Path, paths):
            path = path if path.suffix in ('.txt', '.md') else path / 'c.txt'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('text')
        docs = prepare.read_inputs(paths)
        assert tuple(doc.domain for doc in docs) == paths and len({doc.source for doc in docs}) == 2


# --- What is held out, and which documents count as the same. ---

def test_sources_are_held_out_whole(data_docs):
    val, train = prepare.hold_out(data_docs, .2)
    assert not {doc.source for doc in val} & {doc.source for doc in train}
    assert Counter(val + train) == Counter(data_docs)
    assert set(prepare.hold_out(data_docs[::-1], .2)[0]) == set(val)
    assert all(.1 < data_size(val, domain) / data_size(data_docs, domain) < .35 for domain in prepare.DOMAINS)


@pytest.mark.parametrize('fraction', [.05, .2])
@pytest.mark.parametrize('sizes', [[25_000] * 4, [40_000, 9_000, 900], [60_000], [20_000, 300], [400] * 200,
                                   [1200] * 9 + [90_000]])
def test_a_share_of_the_bytes_is_held_out_of_few_files_or_many(sizes, fraction):
    docs = [Document(data_words(n // 3, i)[:n] + 'é中' * (i % 2) + '\nend', str(d), f'{d}/{i}')
            for d in range(2) for i, n in enumerate(sizes)]
    val, train = prepare.hold_out(docs, fraction)
    for domain in '01':
        goal = fraction * data_size(docs, domain)
        assert goal / 2 <= data_size(val, domain) <= goal + 3
        mine, held, kept = ([doc.text for doc in docs if doc.domain == domain] for docs in (docs, val, train))
        tails, heads = ([text for text in side if text not in mine] for side in (held, kept))
        assert len(tails) == len(heads) <= 1 and all(heads[i] + tails[i] in mine for i in range(len(tails)))
        assert len(mine) == len(held) + len(kept) - len(tails)
        assert not tails or min(map(len, mine)) > goal / 2 or len(sizes) < 9


def test_the_cap_and_the_least(monkeypatch, tmp_path, capsys):
    docs = [Document(data_words(100, i), 'a', str(i)) for i in range(300)]
    monkeypatch.setattr(prepare, 'MAX_VAL', 5000)
    assert 4000 < data_size(prepare.hold_out(docs, .5)[0]) <= 5000
    records = [doc.text for doc in docs] + [{'text': 'but a line', 'domain': 'small'}]
    data_jsonl(tmp_path / 'own.jsonl', records)
    data_prepare(tmp_path, '--input', 'own.jsonl', '--tokenizer=byte')
    out = capsys.readouterr().out
    assert regex.search('small +train +1 documents +10 bytes +held out +0 .*not measured: too little', out)
    assert out.count('not measured') == 1


def test_equal_texts_are_one_whatever_their_words(tmp_path, capsys):
    """Digits, emoji and dashes have no words for TF-IDF, a page 101 times is too frequent for it."""
    rng = random.Random(0)
    kinds = [str(rng.random()) for _ in range(60)] + [''.join(rng.choices('😀😁😂🤣😃', k=40)) for _ in range(60)]
    kinds += ['-' * i for i in range(3, 30)] + [data_words(30, 1)]
    records = kinds * 5 + [data_words(80, 7).replace(' ', ' ' * (1 + i % 3)) for i in range(101)]
    rng.shuffle(records)
    data_jsonl(tmp_path / 'own.jsonl', records)
    data_prepare(tmp_path, '--input', 'own.jsonl', '--tokenizer=byte', '--val_fraction=.3', '--dataset=own')
    train, val = ([' '.join(text.split()) for text, _ in data_read(tmp_path, s)] for s in ('train', 'val'))
    assert sorted(train + val) == sorted(kinds + [data_words(80, 7)]) and len(val) > 10
    out = capsys.readouterr().out
    assert f' {4 * len(kinds) + 100:,} documents dropped: their text' in out and 'more than half of' in out
    assert len(regex.findall(r'^ +own\.jsonl:\d+: ', out, regex.M)) == 2


def data_similarities(docs):
    """Jaccard similarity of all pairs, from its definition."""
    texts = [' '.join(doc.text.split()) for doc in docs]
    sets = [{text[i:i + 9] for i in range(len(text) - 8)} if len(text) >= 50 else {text} for text in texts]
    return np.array([[(n := len(a & b)) / (len(a) + len(b) - n) for b in sets] for a in sets])


def data_twins(similarity, n_held):
    twins = {}
    for i in range(n_held, len(similarity)):
        found = [j for j in range(i) if j not in twins and similarity[i, j] >= .8]
        twins |= {i: found[0]} if found else {}
    return twins


def test_near_duplicates_equal_brute_force(data_docs):
    rng = random.Random(0)
    texts = [doc.text[:rng.randrange(45, 1500)] for doc in data_docs[::3]]
    for text in texts[:50]:  # edits that leave similarities on both sides of 0.8
        words = text.split(' ')
        for _ in range(rng.randrange(12)):
            words[rng.randrange(len(words))] = rng.choice(['', 'other', '\n', 'x1', rng.choice(words)])
        texts.append(' '.join(words))
    rng.shuffle(texts)
    docs = [Document(text, 'd', str(i)) for i, text in enumerate(texts)]
    similarity = data_similarities(docs)
    expected = data_twins(similarity, 40)
    assert len(expected) > 10 and min(expected.values()) < 40 < max(expected.values())
    assert ((similarity > .6) & (similarity < .8)).sum() > 10
    assert prepare.near_duplicates(docs, 40) == expected


def test_records_of_a_template_and_unrelated_texts_are_kept(data_docs, tmp_path):
    rng, words = random.Random(0), data_words(3000).split()
    records = [f'The customer {" ".join(rng.choices(words, k=5))} has ordered {rng.random()} pieces and paid '
               f'{rng.random()} euros. Thank you for your order.' for _ in range(1000)]
    docs = [Document(text, 'd', str(i)) for i, text in enumerate(records)]
    assert not prepare.near_duplicates(docs, 100)
    (tmp_path / 'own').mkdir()
    for i in (0, 1):  # two texts share each term that TF-IDF keeps, but are not the same
        (tmp_path / f'own/{i}.txt').write_text(data_docs[i].text)
    data_prepare(tmp_path, '--input', 'own', '--tokenizer=byte')
    assert sum(len(text) for text, _ in data_read(tmp_path, 'train') + data_read(tmp_path, 'val')) == sum(
        len(doc.text) for doc in data_docs[:2])


def test_a_cluster_goes_only_as_far_as_it_resembles_the_held_out_document():
    """A row of texts, each near the next. The held-out one takes along its neighbours, not the whole row."""
    words = data_words(300).split()
    texts = [' '.join(words[i * 8:i * 8 + 120]) for i in (6, 0, 1, 2, 3, 4, 5, 7, 8, 9, 10)]
    docs = [Document(text, 'd', str(i)) for i, text in enumerate(texts)]
    twins = prepare.near_duplicates(docs, 1)
    assert twins == data_twins(data_similarities(docs), 1)
    assert list(twins.values()).count(0) == 2 and len(docs) - len(twins) >= 4


# --- Neighbours and chain. ---

def data_cosine(X):
    X = X.toarray()
    return X @ X.T


def data_naive_chain(similarity, k, starts):
    """The walk of Sec. 3.2, O(n^2), from the full similarity matrix."""
    n, left, order = len(similarity), set(range(len(similarity))), []
    ranked = [[j for j in np.argsort(-similarity[i], kind='stable').tolist() if j != i and similarity[i, j]][:k]
              for i in range(n)]
    while left:
        options = [j for j in ranked[order[-1]] if j in left] if order else []
        order.append(options[0] if options else [s for s in starts if s in left][0])
        left.remove(order[-1])
    return order


def test_neighbours_and_chain_agree_with_brute_force(data_docs):
    from sklearn.neighbors import NearestNeighbors
    X = prepare.embed([doc.text for doc in data_docs])
    similarity, n = data_cosine(X), len(data_docs)
    assert np.allclose(np.diag(similarity), 1, atol=1e-3)
    assert np.array_equal(similarity, X.toarray()[:, ::-1] @ X.toarray()[:, ::-1].T)  # exact, so in any order
    neighbours = prepare.nearest(X, 5)
    assert all(len(row) == 5 and i not in row for i, row in enumerate(neighbours))
    index = NearestNeighbors(n_neighbors=6, metric='cosine', algorithm='brute').fit(X)
    best = np.take_along_axis(similarity, np.array(neighbours), 1)
    assert np.allclose(1 - index.kneighbors(X)[0][:, 1:], best, atol=1e-3)

    order, restarts = prepare.chain(neighbours, np.random.default_rng(7))
    assert sorted(order) == list(range(n)) and 0 < restarts < n / 3
    assert order.tolist() == data_naive_chain(similarity, 5, np.random.default_rng(7).permutation(n).tolist())
    shuffled = np.random.default_rng(0).permutation(n)
    assert similarity[order[:-1], order[1:]].mean() > 3 * similarity[shuffled[:-1], shuffled[1:]].mean()


def test_ties_go_to_the_lower_number_strangers_are_no_neighbours_and_a_walk():
    X = prepare.embed(['alpha beta'] * 2 + ['alpha gamma'] * 40 + ['delta epsilon'] * 2 + ['12'])
    neighbours = prepare.nearest(X, 3)
    assert neighbours[30] == [2, 3, 4] and neighbours[3] == [2, 4, 5] and neighbours[0] == [1, 2, 3]
    assert neighbours[42] == [43] and neighbours[44] == []
    assert prepare.nearest(prepare.embed(['one']), 3) == [[]]
    # 2 -> 0 -> 1, whose neighbour is used: on to 5, which has none, and to 4 -> 3.
    assert np.random.default_rng(3).permutation(6).tolist() == [2, 5, 4, 1, 3, 0]
    order, restarts = prepare.chain([[1], [2], [0], [4], [3], []], np.random.default_rng(3))
    assert restarts == 2 and order.tolist() == [2, 0, 1, 5, 4, 3]


def test_shards_are_a_permutation(data_docs, monkeypatch):
    monkeypatch.setattr(prepare, 'SHARD', 40)
    ordered, restarts, cosine = prepare.arrange(data_docs, 'similar', 8, [1])
    assert Counter(ordered) == Counter(data_docs) and ordered != data_docs and cosine[0] > 2 * cosine[1]
    for shard in np.array_split(np.arange(len(data_docs)), -(-len(data_docs) // 40)):  # each in its own place
        assert {ordered[i] for i in shard} == {data_docs[i] for i in shard}


# --- The tokenizer. ---

def data_unicode(n, seed=0):
    rng = random.Random(seed)
    points = [rng.randrange(rng.choice([0x110000, 0x3000, 128])) for _ in range(n)]
    return ''.join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


@pytest.mark.parametrize('name', ['bpe', 'byte'])
def test_tokenizer_round_trip(name, data_docs):
    d = json.loads(json.dumps(prepare.make_tokenizer(name, 500, [doc.text for doc in data_docs[:100]])))
    encoding = prepare.load_tokenizer(d)
    assert encoding.n_vocab == (500 if name == 'bpe' else 257) == len(d['tokens']) + 1
    assert d['special_tokens'] == {'<|endoftext|>': encoding.eot_token} == {'<|endoftext|>': len(d['tokens'])}
    sizes = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.eot_token)]
    assert prepare.token_bytes(d) == sizes + [0]
    for text in [data_unicode(20_000), 'a<|endoftext|>b', '', ' ' * 10**6 + 'x', 'q' * 10**6, '\n \t' * 999]:
        tokens = prepare.encode(encoding, text)
        assert encoding.decode(tokens) == text and encoding.eot_token not in tokens


def data_naive_bpe(text, n_tokens):
    """Recount all pairs for every merge."""
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(prepare.PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < n_tokens:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        top = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if top is None or pairs[top] < 2:
            break
        if b''.join(top) not in tokens:
            tokens.append(b''.join(top))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == top:
                    word[i:i + 2] = [b''.join(top)]
                i += 1
    return tokens


@pytest.mark.parametrize('seed', range(3))
def test_bpe_merges_equal_a_naive_trainer(seed, data_docs):
    rng = random.Random(seed)
    soup = ''.join(rng.choice('aab ') for _ in range(2000))  # overlapping pairs such as aaaa
    clauses = ''.join(rng.choices('的一是不了人我在有，。他这', weights=range(13, 0, -1), k=1500))
    for text, n_tokens in [(data_docs[seed].text, 340), (soup, 300), (clauses, 320)]:
        assert prepare.train_bpe([text], n_tokens) == data_naive_bpe(text, n_tokens)
    assert prepare.train_bpe(['abc'], 1000) == [bytes([b]) for b in range(256)]  # no pair occurs twice


def test_bpe_of_text_without_blanks_is_not_slow(data_docs):
    rng = random.Random(0)
    signs, common = [chr(c) for c in range(0x4e00, 0x4e00 + 3000)], np.cumsum(1 / np.arange(1, 3001)).tolist()
    chinese = [''.join(rng.choices(signs, cum_weights=common, k=12)) + '，' for _ in range(80_000)]  # 3 MB
    spent = []
    chinese = [''.join(chinese[i:i + 100]) for i in range(0, len(chinese), 100)]
    for texts in ([doc.text for doc in data_docs], chinese):
        began = time.process_time()
        tokens = prepare.train_bpe(texts, 600)
        spent.append((time.process_time() - began) / sum(len(text.encode()) for text in texts))
    assert spent[1] < 3 * spent[0] and '的' not in tokens and len(tokens) == 600


def test_a_tokenizer_from_a_file(data_home, tmp_path):
    """A dataset with the tokenizer of another, or of a checkpoint."""
    tokenizer = json.loads((data_home / 'data/own/tokenizer.json').read_text())
    model = Lory(LoryConfig(vocab_size=400, block_size=8, segment_len=4, n_layer=1, n_head=1, n_embd=8))
    save_checkpoint(tmp_path / 'ckpt.pt', model, tokenizer=tokenizer)
    save_checkpoint(tmp_path / 'bare.pt', model)
    (tmp_path / 'hf.json').write_text('{"model": {"vocab": {}}}')
    (tmp_path / 'a.txt').write_text(data_words(900))
    for file in (tmp_path / 'ckpt.pt', data_home / 'data/own/tokenizer.json'):
        data_prepare(tmp_path, '--input', 'a.txt', f'--tokenizer={file}', '--dataset=own')
        assert prepare.load_dataset(tmp_path / 'data/own', 8).tokenizer == tokenizer
        stored = data_read(tmp_path, 'train') + data_read(tmp_path, 'val')
        assert ''.join(text for text, _ in stored) == data_words(900)
    for file in ('bare.pt', 'hf.json', 'a.txt'):
        with pytest.raises(UserError, match='tokenizer|damaged'):
            data_prepare(tmp_path, '--input', 'a.txt', f'--tokenizer={file}')


def test_other_tokenizers_and_large_vocabularies(data_home, tmp_path, monkeypatch):
    """One of tiktoken's with a gap in its ranks, as p50k has, and an id above 16 bits."""
    ranks = {bytes([b]): b for b in range(256)} | {b'he': 257, b'th': 258}
    encoding = prepare.tiktoken.Encoding('gpt2', pat_str=prepare.PATTERN, mergeable_ranks=ranks,
                                         special_tokens={'<|endoftext|>': 256, '<|other|>': 70_000})
    monkeypatch.setattr('tiktoken.get_encoding', lambda name: encoding)
    shutil.copytree(data_home / 'own', tmp_path / 'own')
    data_prepare(tmp_path, '--input', 'own', '--tokenizer=gpt2')
    dataset = prepare.load_dataset(tmp_path / 'data/own', 32)
    assert dataset.meta['vocab_size'] == 70_001 and dataset.val.tokens.dtype == np.uint32
    assert dataset.val.tokens[0] == 256
    text = 'the other <|endoftext|>'
    assert prepare.load_tokenizer(dataset.tokenizer).encode_ordinary(text) == encoding.encode_ordinary(text)
    assert prepare.token_bytes(dataset.tokenizer) == [1] * 256 + [0, 2, 2] + [0] * (70_001 - 259)


def test_tiktoken_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr('tiktoken.registry.ENCODINGS', {})
    with socket.socket() as deaf:
        deaf.bind(('127.0.0.1', 0))  # and does not listen: a proxy that refuses
        for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
            monkeypatch.setenv(name, f'http://127.0.0.1:{deaf.getsockname()[1]}')
        with pytest.raises(UserError, match='--tokenizer=bpe'):
            data_prepare(tmp_path, '--tokenizer=gpt2')


# --- On disk. ---

def test_bins_decode_to_the_documents(data_home):
    files = {(path.read_text(), path.parent.name) for path in (data_home / 'own').rglob('*.txt')}
    train, val = data_read(data_home, 'train'), data_read(data_home, 'val')
    assert not set(train) & set(val) and set(train + val) <= files and len(train + val) > .9 * len(files)
    domains = [domain for _, domain in val]
    assert domains == sorted(domains) and set(domains) == {'prose', 'cpp'}  # contiguous

    dataset = prepare.load_dataset(data_home / 'data/own', 32)
    encoding = prepare.load_tokenizer(dataset.tokenizer)
    assert encoding.n_vocab == dataset.meta['vocab_size'] == 400
    for name, split, stored in (('train', dataset.train, train), ('val', dataset.val, val)):
        assert [part.dtype for part in split] == [np.uint16, np.int64, np.uint8]
        assert encoding.decode(split.tokens.tolist()) == ''.join('<|endoftext|>' + text for text, _ in stored)
        info, file = dataset.meta[name], data_home / f'data/own/{name}.bin'
        assert info['documents'] == len(stored)
        assert info['bytes'] == sum(len(text.encode()) for text, _ in stored)
        assert dataset.meta['sha256'][f'{name}.bin'] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_same_seed_same_bytes_on_another_processor(data_home, tmp_path):
    """A second process, without the vector instructions that decide how numpy sorts and adds."""
    shutil.copytree(data_home / 'own', tmp_path / 'own')
    optional = ' '.join(np._core._multiarray_umath.__cpu_dispatch__)
    subprocess.run([sys.executable, prepare.__file__, *OWN], cwd=tmp_path, check=True, capture_output=True,
                   env={**os.environ, 'NPY_DISABLE_CPU_FEATURES': optional})
    assert {path.name for path in (tmp_path / 'data/own').iterdir()} == prepare.FILES
    for name in prepare.FILES:
        here, there = (home / 'data/own' / name for home in (tmp_path, data_home))
        assert here.read_bytes() == there.read_bytes(), name
    similar, held = data_read(tmp_path, 'train'), data_read(tmp_path, 'val')
    for flag in ('--seed=2', '--order=random'):
        data_prepare(tmp_path, *OWN, flag)
        train = data_read(tmp_path, 'train')
        assert train != similar and sorted(train) == sorted(similar)
    assert data_read(tmp_path, 'val') == held  # --order=random is judged on the same text


@pytest.mark.parametrize('name, damage, message', [
    ('meta.json', lambda data: None, 'no dataset'), ('meta.json', lambda data: data[:20], 'damaged'),
    ('meta.json', lambda data: b'{}', 'damaged'), ('val.bin', lambda data: None, 'no dataset'),
    ('meta.json', lambda data: data.replace(b'"format": 1', b'"format": 2'), 'format 2'),
    ('train.bin', lambda data: data[:-2], 'checksum'), ('val.bin', lambda data: data[:-1] + b'\xff', 'check'),
    ('val_docs.npz', lambda data: data[:-1] + b'\1', 'checksum'),
    ('tokenizer.json', lambda data: data.replace(b'bpe', b'bqe'), 'checksum')])
def test_damaged_data_is_refused(name, damage, message, data_home, tmp_path):
    path = shutil.copytree(data_home / 'data/own', tmp_path / 'data/own')
    n = len(prepare.load_dataset(path, 32).val.tokens)
    assert len(prepare.load_dataset(path, n - 1).val.tokens) == n
    with pytest.raises(UserError, match='too few'):
        prepare.load_dataset(path, n)
    data = damage((path / name).read_bytes())
    (path / name).unlink() if data is None else (path / name).write_bytes(data)
    for folder in (path, tmp_path / 'data/absent'):
        with pytest.raises(UserError, match=message if folder == path else 'no dataset') as error:
            prepare.load_dataset(folder, 32)
        assert '\n' not in str(error.value) and 'prepare.py' in str(error.value)


@pytest.mark.parametrize('call, number, whole', [('fsync', 6, 1), ('rename', 1, 1), ('rename', 2, 0)])
@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError(28, 'No space left on device')])
def test_a_failed_prepare_leaves_the_old_data_or_none(call, number, whole, error, data_home, tmp_path):
    """Wherever a crash or a full disk hits: the reader sees the old dataset whole, or refuses."""
    path = shutil.copytree(data_home / 'data/own', tmp_path / 'data/own')
    shutil.copytree(data_home / 'own', tmp_path / 'own')
    old, calls, real = prepare.load_dataset(path, 32).meta, [], getattr(os, call)

    def fail(*args):
        calls.append(args)
        if len(calls) == number:
            raise error
        real(*args)

    failure = pytest.raises((KeyboardInterrupt, UserError), match='|No space left')
    with pytest.MonkeyPatch.context() as patch, failure:
        patch.setattr(os, call, fail)
        data_prepare(tmp_path, *OWN, '--seed=3')
    if whole:
        assert prepare.load_dataset(path, 32).meta == old
    else:
        with pytest.raises(UserError, match='no dataset'):
            prepare.load_dataset(path, 32)
    assert os.listdir(tmp_path / 'data') == ['own'] * whole


def test_two_processes_that_write_one_dataset_do_not_meet(data_home, tmp_path, monkeypatch, capsys):
    """As two runs begun side by side on a fresh machine do: both prepare the built-in corpus."""
    shutil.copytree(data_home / 'own', tmp_path / 'own')
    fsync, calls = os.fsync, []

    def meanwhile(file):
        calls.append(file)
        if len(calls) == 3:
            data_prepare(tmp_path, *OWN, '--seed=3')
            assert prepare.load_dataset(tmp_path / 'data/own', 32).meta['seed'] == 3
        fsync(file)

    monkeypatch.setattr(os, 'fsync', meanwhile)
    data_prepare(tmp_path, *OWN)
    expected = prepare.load_dataset(data_home / 'data/own', 32).meta
    assert prepare.load_dataset(tmp_path / 'data/own', 32).meta == expected
    assert os.listdir(tmp_path / 'data') == ['own'] and 'will be replaced' not in capsys.readouterr().out
    data_prepare(tmp_path, *OWN)
    assert 'the dataset that is in data/own/ now will be replaced' in capsys.readouterr().out
    (tmp_path / 'data/own/essay.txt').write_text('a user keeps this here')
    with pytest.raises(UserError, match='holds essay.txt'):
        data_prepare(tmp_path, '--input', 'data/own')
    assert (tmp_path / 'data/own/essay.txt').exists() and prepare.load_dataset(tmp_path / 'data/own', 32)


# --- The script. ---

def test_a_million_spaces_and_friends(tmp_path):
    texts = ['word' + ' ' * 10**6 + 'end', 'z' * 300_000, 'plain words here', '!?' * 1000, data_words(99_000)]
    data_jsonl(tmp_path / 'own.jsonl', texts)
    for flag in ('--tokenizer=byte', '--vocab_size=300'):
        data_prepare(tmp_path, '--input', 'own.jsonl', flag)
        stored = [text for text, _ in data_read(tmp_path, 'train') + data_read(tmp_path, 'val')]
        assert sorted(stored) == sorted(texts[:4] + [text for text in stored if text in texts[4]])
        assert sum(map(len, stored)) == sum(map(len, texts))


@pytest.mark.parametrize('argv, message', [
    ('--input nowhere', 'does not exist'), ('--input void', 'no text'), ('--input one.txt', 'too little'),
    ('--input spaces.txt', 'no text'), ('--input binary', 'no text'), ('--input bad.jsonl', 'line 2'),
    ('--input same.jsonl', 'too little text'), ('--input alike --val_fraction=.6', 'nothing is left'),
    ('--input one.txt --tokenizer=gpt22', 'not known'), ('--dataset=a/b', 'plain'), ('--dataset=..', 'plain')])
def test_bad_input(argv, message, data_home, tmp_path):
    for name, data in (('one.txt', b'one document'), ('spaces.txt', b' ' * 1_000_000), ('binary', b'\0\1\2'),
                       ('bad.jsonl', b'{"text": "a"}\n{"txt": 1}'), ('same.jsonl', b'{"text": "same"}\n' * 99),
                       ('void/.hidden', b'text'), ('alike/0', data_words(400).encode()),
                       ('alike/1', data_words(400).encode() + b' end')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    path = shutil.copytree(data_home / 'data/own', tmp_path / 'data/own')
    with pytest.raises(UserError, match=message) as error:
        data_prepare(tmp_path, '--dataset=own', *argv.split(' '))
    assert '\n' not in str(error.value) and prepare.load_dataset(path, 32)


def test_exit_codes(tmp_path, capsys):
    for flag in ('--order=best', '--vocab_size=256', '--val_fraction=0', '--n_neighbors=0', '--nonsense=1'):
        with pytest.raises(SystemExit, match='2'):
            data_prepare(tmp_path, flag)
        assert flag.split('=')[0] in capsys.readouterr().err
    argv = [sys.executable, prepare.__file__, '--input', 'nowhere']
    run = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == '' and run.stderr.startswith('prepare.py: --input')
    assert len(run.stderr.strip().split('\n')) == 1 and not list(tmp_path.iterdir())
