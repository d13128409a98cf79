"""
From documents to training data: read, hold out, chain similar documents, tokenize, write `data/<dataset>/`.

Lory routes each segment by the segment before it, so neighbouring segments must have something to do with each other.
Random documents packed into one sequence would break that at every joint. The paper (Sec. 3.2, App. C) therefore orders
the documents by similarity, and so does this script. The longer segments are compared with documents, the more that adds to
what experts gain over a dense model; for short ones it adds nothing (experiments/README.md, "Chained or shuffled?").

    documents -> hold out whole files -> TF-IDF vectors -> drop near-duplicates -> nearest neighbours
              -> greedy walk from neighbour to unused neighbour -> one token stream, which train.py cuts into windows

The paper embeds with Contriever and searches with FAISS; TF-IDF and exact search need no model and no GPU. It writes,
little-endian and without pickle:

    train.bin, val.bin            token ids, uint16 (uint32 for a large vocabulary), <|endoftext|> before each document
    train_docs.npz, val_docs.npz  start int64 (n_docs + 1), offsets into the .bin; domain uint8 (n_docs)
    tokenizer.json                name, pattern, special_tokens, tokens (their bytes in base64, in rank order)
    meta.json                     written last: format, vocab_size, domains, arguments, and a sha256 of each other file

    python prepare.py                                     the built-in corpus: the text of the installed libraries
    python prepare.py --input essays/ notes.txt a.jsonl   your own: folders, text files, JSONL with "text" and "domain"
"""
import argparse
import ast
import base64
import hashlib
import heapq
import json
import os
import re
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict, namedtuple
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import regex
import tiktoken  # scikit-learn is imported where it is used: train.py and sample.py only want the readers, and quickly

from lory import UserError, atomic_open

FORMAT = 1              # of the dataset on disk; a reader refuses any other
EOT = '<|endoftext|>'   # stands before each document
PIECE = 4096            # characters in a piece of the built-in corpus, at most
TWIN = 0.8              # cosine from which two documents are near-duplicates
SHARD = 100_000         # documents compared with one another, at most
MAX_VAL = 5_000         # held-out documents, about: more would not sharpen a figure, and all are compared with each
LIBRARIES = 'joblib matplotlib mpmath networkx numpy scikit-learn scipy sympy torch'.split()  # pinned: all read alike
DOMAINS = ['prose', 'repl', 'python', 'tests', 'cpp']  # of the built-in corpus
Document = namedtuple('Document', 'text domain source')  # a source (a file) is held out as a whole, or not at all
Split = namedtuple('Split', 'tokens start domain')  # (n_tokens,) mapped from disk; (n_docs + 1,); (n_docs,)
Dataset = namedtuple('Dataset', 'meta tokenizer train val')  # two dicts, two Splits


def say(label, text, since=None):
    """One aligned line of the report, with the seconds since `since`."""
    try:
        print((f'{label:<18} {text:<72}' + (f'{time.time() - since:7.1f} s' if since else '')).rstrip(), flush=True)
    except OSError:  # whoever read this is gone; the work goes on
        sys.stdout = open(os.devnull, 'w')


def track(label, items):
    """Yields `items`; on a terminal, with a counter that overwrites itself."""
    for n, item in enumerate(items, 1):
        if sys.stderr.isatty():
            print(f'\r{label:<18} {n:,} / {len(items):,}', end='\r' if n < len(items) else '\r\033[K', file=sys.stderr)
        yield item


# ----------------------------------------------------------------------------------------------------------------------
# Documents. The built-in corpus is cut from the pinned libraries' files, which are neither imported nor passed on.

def cut(text, breaks=(r'(?<=\n\n)(?=\S)', r'(?<=\n\n)', r'(?<=\n)', '')):
    """Pieces of at most PIECE characters that join to `text`. Cuts at a blank line before unindented text (in code, the
    end of a function); only a longer block is cut at any blank line, then any line, then anywhere."""
    pieces = ['']
    for block in re.split(breaks[0], text):
        for part in [block] if len(block) <= PIECE else cut(block, breaks[1:]):
            if len(pieces[-1]) + len(part) > PIECE:
                pieces.append('')
            pieces[-1] += part
    return pieces


def split_python(source):
    """{'prose': docstrings without doctests, 'repl': the doctests, 'python': code without docstrings}."""
    with warnings.catch_warnings(action='ignore'):  # invalid escapes are not this reader's concern
        nodes = [ast.parse(source)]
    lines, prose, repl = source.split('\n'), [], []
    for node in nodes:  # statements only; ast.walk takes twice as long
        nodes += [child for field in ('body', 'orelse', 'handlers') for child in getattr(node, field, [])]
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if doc := ast.get_docstring(node):
                # A doctest goes from its prompt to the next blank line; the split alternates between, doctest, ...
                parts = re.split(r'^([ \t]*>>> .*(?:\n[ \t]*\S.*)*)', doc, flags=re.MULTILINE)
                prose += [part.strip('\n') for part in parts[::2] if part.strip()]
                repl += parts[1::2]
                first = node.body[0]
                lines[first.lineno - 1:first.end_lineno] = [None] * (first.end_lineno - first.lineno + 1)
                if len(node.body) == 1:  # the docstring was the whole body
                    lines[first.lineno - 1] = ' ' * first.col_offset + 'pass'
    return {'prose': '\n\n'.join(prose), 'repl': '\n\n'.join(repl),
            'python': '\n'.join(line for line in lines if line is not None)}


def read_builtin(mb_per_domain):
    """Documents of the built-in corpus, up to `mb_per_domain` MB of each of DOMAINS."""
    files, docs, room = [], [], dict.fromkeys(DOMAINS, mb_per_domain * 1e6)
    for library in LIBRARIES:
        try:
            files += [(str(f), f.locate()) for f in metadata.files(library)
                      if f.suffix in ('.py', '.h', '.hpp', '.cuh') and '/ATen/ops/' not in str(f)]  # generated twins
        except metadata.PackageNotFoundError:
            print(f'note: {library} is not installed, so its text is missing; see requirements.txt')
    # The same shuffle for everyone; salted, because a bare sha1 decides what is held out and must not correlate.
    files.sort(key=lambda f: hashlib.sha1(b'order of ' + f[0].encode()).digest())
    for name, path in track('reading', files):
        with suppress(OSError, SyntaxError, ValueError, RecursionError):  # not there, not text, not this Python's
            source = path.read_text(encoding='utf-8')
            domains = (['cpp'] if path.suffix != '.py' else
                       ['tests'] if re.search(r'(^|[/_])(test|tests|testing)[/_.]', name) else
                       ['prose', 'python', *['repl'] * ('>>> ' in source)])
            if all(room[domain] <= 0 for domain in domains):
                continue
            for domain, text in (split_python(source) if 'prose' in domains else {domains[0]: source}).items():
                pieces = [piece for piece in cut(re.sub(r'\n\s*\n+', '\n\n', text)) if len(piece) >= 512]
                for piece in pieces[:4]:  # no long file dominates
                    if room[domain] > 0:
                        docs.append(Document(piece.strip('\n'), domain, name))
                        room[domain] -= len(piece.encode())
    return docs


def read_inputs(paths):
    """Documents from folders, text files and .jsonl files. Raises UserError for a path or a JSONL line that is none."""
    files, docs, binary, empty = [], [], 0, 0
    for path in paths:
        try:
            root = Path(path or '\0').resolve(strict=True)  # an empty path would mean the current folder
        except (OSError, RuntimeError, ValueError):  # not there, a loop of links, not a path
            raise UserError(f'--input {path!r} does not exist; check the path.') from None
        for file in [root] if root.is_file() else sorted(root.rglob('*')):  # sorted: disks differ in their order
            inside = file.relative_to(root).parts
            if file.is_file() and not any(part.startswith('.') for part in inside):  # nothing hidden, such as .git
                files.append((file, '/'.join((root.name, *inside)), inside[0] if len(inside) > 1 else root.stem))
    for file, source, domain in track('reading', files):
        try:
            text = file.read_text(encoding='utf-8-sig')
        except (UnicodeDecodeError, OSError):
            text = '\0'
        found = [Document(text, domain, source)]
        if '\0' in text:
            found, binary = [], binary + 1
        elif file.suffix.lower() == '.jsonl':
            found = []
            for i, line in enumerate(text.split('\n'), 1):  # splitlines would also break inside JSON strings
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    record['text'].encode()  # fails for anything but text, lone surrogates too
                    label = str(record.get('domain') or domain)
                    found.append(Document(record['text'], label, f'{source}:{i}'))
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    raise UserError(f'{file}, line {i}: expected a JSON object with a string "text".') from None
        elif len(files) == 1:  # most likely a whole corpus, such as all of Shakespeare, and not one document
            found = [Document(piece, domain, f'{source}:{i}') for i, piece in enumerate(cut(text))]
        # Domains stand in log lines and legends: no line breaks, no half characters, no leading underscore.
        docs += [doc._replace(domain=re.sub(r'[^\w.+ -]', '', doc.domain).strip('_ ')[:40] or 'text')
                 for doc in found if doc.text.strip()]
        empty += sum(not doc.text.strip() for doc in found)
    if binary or empty:
        say('skipped', f'{binary:,} binary or unreadable files, {empty:,} empty documents')
    return docs


def hold_out(docs, val_fraction):
    """(validation, training) Documents. Whole sources are held out, by the sha1 of their name: whatever the seed, and
    text from one file never stands on both sides."""
    sources = defaultdict(set)  # of each domain, and of all
    for doc in docs:
        sources[doc.domain].add(doc.source)
        sources[None].add(doc.source)
    share = {name: int(hashlib.sha1(os.fsencode(name)).hexdigest(), 16) / 2**160 for name in sources[None]}  # in [0, 1)
    held = {name for name in share if share[name] < min(val_fraction, MAX_VAL / len(docs))}
    for group in sources.values():
        if len(group) > 1 and not group & held:  # a domain that has a source to spare does not go unmeasured
            held.add(min(group, key=share.get))
    return [doc for doc in docs if doc.source in held], [doc for doc in docs if doc.source not in held]


# ----------------------------------------------------------------------------------------------------------------------
# Similarity (Sec. 3.2, App. C): documents as vectors, near-duplicates out, nearest neighbours, one walk through all.

WORD = regex.compile(r'\p{Lu}?[\p{Ll}\p{M}]+|\p{Lu}+|\p{Han}|\p{L}+')  # parts camelCase and snake_case, and Han signs


def embed(texts):
    """TF-IDF vectors of length 1 (or 0), a sparse float32 matrix (n_docs, n_terms)."""
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfVectorizer
    # A term in one document relates it to none, a term in over 5% (in a small collection: over 100) relates too many.
    tfidf = TfidfVectorizer(analyzer=lambda text: [word.lower() for word in WORD.findall(text)], sublinear_tf=True,
                            min_df=2, max_df=max(100, len(texts) // 20), dtype=np.float32)
    try:
        return tfidf.fit_transform(texts)
    except ValueError:  # no term is left: these documents share no word
        return csr_matrix((len(texts), 1), dtype=np.float32)


def distinct(X, V):
    """(rows of X to keep, twins of V dropped, twins within X dropped): what resembles a held-out document V leaves the
    training data X, then of training documents that resemble each other the first one stays. Exact."""
    def twins(Y):  # pairs of a row of X and a row of Y
        YT = Y.T.tocsr()
        for a in track('near-duplicates', range(0, X.shape[0], 512)):
            close = (X[a:a + 512] @ YT >= TWIN).tocoo()  # (512, len(Y)), sparse
            yield from sorted(zip((a + close.row).tolist(), close.col.tolist()))

    leaked = {i for i, _ in twins(V)}
    dropped = set(leaked)
    for i, j in twins(X):
        if i < j and i not in dropped:  # i comes in order, so its own fate is settled
            dropped.add(j)
    return [i for i in range(X.shape[0]) if i not in dropped], len(leaked), len(dropped) - len(leaked)


def nearest(X, k):
    """The min(k, n_docs - 1) documents of highest cosine to each, best first, never itself: (n_docs, k). Exact."""
    import sklearn
    from sklearn.neighbors import NearestNeighbors
    k, rows = min(k, X.shape[0] - 1), []
    index = NearestNeighbors(n_neighbors=k + 1, metric='cosine', algorithm='brute').fit(X)
    for a in track('neighbours', range(0, X.shape[0], 2048)):
        with sklearn.config_context(working_memory=128):  # MB for a block of distances
            distance, neighbour = index.kneighbors(X[a:a + 2048])  # (2048, k + 1) both: k others and itself
        distance[neighbour == np.arange(a, a + len(neighbour))[:, None]] = np.inf
        best = np.lexsort((neighbour, distance.round(6)), axis=1)[:, :k]  # rounded: machines differ in the last digits
        rows.append(np.take_along_axis(neighbour, best, axis=1))
    return np.concatenate(rows)


def chain(neighbours, rng):
    """The greedy walk: from each document to its most similar neighbour not yet used; when all are used, on to a random
    unused document. Within a document a segment resembles the one that routes it anyway; the walk makes it so across joints.
    neighbours (n_docs, k), best first -> (order (n_docs,), number of restarts)."""
    neighbours, starts = neighbours.tolist(), rng.permutation(len(neighbours)).tolist()
    order, used, restarts = [], set(), -1  # the first start is no restart
    for start in starts:
        here = start
        restarts += start not in used
        while here not in used:
            order.append(here)
            used.add(here)
            here = next((j for j in neighbours[here] if j not in used), here)
    return np.array(order), restarts


def order_training(train, val, args):
    """Training Documents in the order they are written. Reports what was dropped and how alike adjacent ones are.

    Comparing all with all takes quadratic time. Above SHARD documents they are cut, in reading order, into equal
    shards, deduplicated and chained one by one: time grows linearly and the memory beside the text stays below 1 GB.
    The held-out documents are compared with every shard."""
    result, dropped, restarts, cosine, began = [], np.zeros(2, int), 0, np.zeros(2), time.time()
    shards = np.array_split(np.arange(len(train)), -(-len(train) // SHARD) or 1)
    for s, shard in enumerate(shards):
        X = embed([doc.text for doc in val + [train[i] for i in shard]])  # (n_val + n_shard, n_terms)
        keep, *twins = distinct(X[len(val):], X[:len(val)])
        dropped += twins
        if keep:
            X, rng = X[len(val):][keep], np.random.default_rng([args.seed, s])
            shuffled = rng.permutation(len(keep))
            order, jumps = chain(nearest(X, args.n_neighbors), rng) if args.order == 'similar' else (shuffled, 0)
            restarts += jumps
            cosine += [X[o[:-1]].multiply(X[o[1:]]).sum() for o in (order, shuffled)]  # X has rows of length 1
            result += [train[shard[keep[i]]] for i in order]
    say('near-duplicates', f'dropped {dropped[0]:,} of held-out documents, {dropped[1]:,} of other training documents')
    say('order', f'{args.order}, {len(result):,} documents, {len(shards)} shard(s), {restarts:,} restarts', began)
    cosine /= max(1, len(result) - len(shards))
    say('adjacent cosine', f'{cosine[0]:.3f} in this order, {cosine[1]:.3f} in a random one')
    return result


def order_validation(val, domains, args):
    """Validation Documents domain by domain, so that each domain's loss is measured on its own text alone, and chained
    within each. The same for every --order, so that both are judged on the same text."""
    result = []
    for d, domain in enumerate(domains):
        docs = [doc for doc in val if doc.domain == domain]
        if docs:
            neighbours = nearest(embed([doc.text for doc in docs]), args.n_neighbors)
            result += [docs[i] for i in chain(neighbours, np.random.default_rng([args.seed, d]))[0]]
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE. It starts from the 256 bytes, so any text can be written, and adds the most frequent pairs.

# What a token may span: a word with the space before it, up to three digits, a run of signs, a run of blanks but for
# the last one, which joins the word that follows. The shape of GPT-2's pattern.
PATTERN = r' ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+'


def train_bpe(texts, n_tokens):
    """Up to `n_tokens` tokens (bytes) in rank order: the 256 bytes, then one for each merge of the most frequent pair;
    of equal pairs the first in byte order. Fewer when no pair is left that occurs twice.

    A merge changes the counts of a few pairs only. A pair whose count grows is pushed onto the heap again; an entry
    whose count has shrunk is noticed when it comes up, and put back where it belongs."""
    counts = Counter()
    for text in texts[::-(-sum(map(len, texts)) // 50_000_000) or 1]:  # evenly spaced texts of at most 50 MB in all
        counts.update(regex.findall(PATTERN, text))
    counts = {word: n for word, n in counts.items() if len(word) <= 100}  # endless runs are slow and teach nothing
    words = [[bytes([b]) for b in word.encode()] for word in counts]  # each a list of its tokens so far
    number = list(counts.values())  # how often each word occurs
    tokens = {bytes([b]): b for b in range(256)}
    pairs, where = Counter(), defaultdict(set)  # pair -> its count, pair -> the words that hold it
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += number[w]
            where[pair].add(w)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap and heap[0][0] <= -2 and len(tokens) < n_tokens:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        tokens.setdefault(pair[0] + pair[1], len(tokens))
        change = Counter()
        for w in where.pop(pair):
            old, new = words[w], []
            for token in old:
                if new and (new[-1], token) == pair:
                    new[-1] += token
                else:
                    new.append(token)
            words[w] = new
            for gone in zip(old, old[1:]):
                change[gone] -= number[w]
            for made in zip(new, new[1:]):
                change[made] += number[w]
                where[made].add(w)
        for other, by in change.items():
            pairs[other] += by
            if by > 0:
                heapq.heappush(heap, (-pairs[other], other))
    return list(tokens)


def fetch_encoding(name, patience=60):
    """tiktoken's encoding of that name. UserError if there is none or it cannot be had within `patience` seconds."""
    if name not in (names := tiktoken.list_encoding_names()):
        raise UserError(f'--tokenizer={name} is not known; choose bpe, byte or one of {", ".join(names)}.')
    got = []

    def fetch():  # may download, and then has no time limit of its own; as a thread it can be left behind
        with suppress(Exception):
            got.append(tiktoken.get_encoding(name))

    (thread := threading.Thread(target=fetch, daemon=True)).start()
    thread.join(patience)
    if not got:
        raise UserError(f'the vocabulary of {name} could not be downloaded; --tokenizer=bpe needs no network.')
    return got[0]


def make_tokenizer(name, vocab_size, texts):
    """The content of tokenizer.json. `vocab_size` (with <|endoftext|>) and the training `texts` matter to bpe only."""
    if name in ('bpe', 'byte'):
        tokens = train_bpe(texts, vocab_size - 1) if name == 'bpe' else [bytes([b]) for b in range(256)]
        pattern, special = PATTERN, {EOT: len(tokens)}
    else:
        encoding = fetch_encoding(name)  # its underscored attributes are tiktoken's documented way to extend it
        pattern, special, ranks = encoding._pat_str, encoding._special_tokens, encoding._mergeable_ranks
        byte_of = {rank: token for token, rank in ranks.items()}
        tokens = [byte_of.get(rank, b'') for rank in range(max(byte_of) + 1)]  # p50k has a gap in its ranks
    return {'name': name, 'pattern': pattern, 'special_tokens': special,
            'tokens': [base64.b64encode(token).decode() for token in tokens]}


def load_tokenizer(d):
    """The tiktoken.Encoding of a parsed tokenizer.json. No file, no network, no cache."""
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(d['tokens']) if token}
    return tiktoken.Encoding(d['name'], pat_str=d['pattern'], mergeable_ranks=ranks, special_tokens=d['special_tokens'])


def token_bytes(tokenizer):
    """Bytes of each token id of a parsed tokenizer.json, 0 for special tokens: a list of vocab_size."""
    size = [len(base64.b64decode(token)) for token in tokenizer['tokens']]
    return size + [0] * (1 + max(tokenizer['special_tokens'].values()) - len(size))


def encode(encoding, text):
    """Token ids of `text`, in which <|endoftext|> means nothing special. tiktoken's regex engine overflows on a run of
    a million blanks, so long texts go in parts, which costs nothing but a merge at each joint."""
    return [token for a in range(0, len(text), 100_000) for token in encoding.encode_ordinary(text[a:a + 100_000])]


# ----------------------------------------------------------------------------------------------------------------------
# The dataset on disk: written whole or not at all, and refused unless whole.

def sha256(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def save_dataset(path, splits, tokenizer, meta):
    """Writes `splits` {'train': Documents, 'val': Documents} into the folder `path`; returns meta, completed.

    The old files stand until all new ones are on disk. Then each is renamed into place, meta.json last. Interrupted
    there, the checksums in the old meta.json do not fit the new files, and the reader refuses."""
    encoding, eot = load_tokenizer(tokenizer), tokenizer['special_tokens'][EOT]
    dtype = np.dtype('<u2' if encoding.n_vocab <= 2**16 else '<u4')
    meta = {'format': FORMAT, 'vocab_size': encoding.n_vocab, 'eot': eot, 'dtype': dtype.name, **meta}
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'cannot make the folder {path} ({e.strerror}); choose another --dataset.') from None
    names = ['meta.json', 'tokenizer.json', 'train.bin', 'train_docs.npz', 'val.bin', 'val_docs.npz']
    with ExitStack() as stack:  # leaves its files in reverse, so meta.json is renamed last
        files = {name: stack.enter_context(atomic_open(path / name)) for name in names}
        files['tokenizer.json'].write(json.dumps(tokenizer).encode())
        for split, docs in splits.items():
            start = np.zeros(len(docs) + 1, '<i8')
            for i, doc in track(f'{split}.bin', list(enumerate(docs))):
                tokens = np.array([eot] + encode(encoding, doc.text), dtype)
                files[f'{split}.bin'].write(tokens.tobytes())
                start[i + 1] = start[i] + len(tokens)
            domain = np.array([meta['domains'].index(doc.domain) for doc in docs], np.uint8)
            np.savez(files[f'{split}_docs.npz'], start=start, domain=domain)
            meta[split] = {'tokens': int(start[-1]), 'documents': len(docs),
                           'bytes': sum(len(doc.text.encode()) for doc in docs)}
        meta['sha256'] = {}
        for name in names[1:]:
            files[name].flush()
            meta['sha256'][name] = sha256(files[name].name)
        files['meta.json'].write(json.dumps(meta, indent=1).encode())
        for file in files.values():  # a full disk must show before the first rename
            file.flush()
            os.fsync(file.fileno())
    return meta


def load_dataset(path, block_size):
    """The Dataset in the folder `path`. UserError unless every file is the one that meta.json describes, all token ids
    are in the vocabulary, and each split holds block_size + 1 tokens."""
    path, splits, cure = Path(path), [], f'run prepare.py with --dataset={Path(path).name} again.'
    if not path.exists():
        raise UserError(f'there is no dataset in {path}; make it with prepare.py and --dataset={path.name}, or go to the folder '
                        'that holds data/.')
    try:
        meta = json.loads((path / 'meta.json').read_bytes())
        if meta['format'] != FORMAT:
            raise UserError(f'{path} has data format {meta["format"]}, this is format {FORMAT}; {cure}')
        for name, checksum in meta['sha256'].items():
            if sha256(path / name) != checksum:
                raise UserError(f'{path / name} is truncated or changed: its checksum is not that in meta.json; {cure}')
        _ = [meta[s]['tokens'] for s in ('train', 'val')], np.dtype(meta['dtype']), meta['vocab_size'], meta['domains']
    except OSError as e:
        raise UserError(f'{e.filename} cannot be read ({e.strerror}), so the dataset is incomplete; {cure}') from None
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f'{path}/meta.json is damaged; {cure}') from None
    for split in ('train', 'val'):
        n, file = meta[split]['tokens'], path / f'{split}.bin'
        if n < block_size + 1:
            raise UserError(f'{file} has {n} tokens, too few for --block_size={block_size}: lower it or add text.')
        tokens = np.memmap(file, np.dtype(meta['dtype']).newbyteorder('<'), 'r', shape=(n,))
        if max(tokens[a:a + 2**24].max() for a in range(0, n, 2**24)) >= meta['vocab_size']:
            raise UserError(f'{file} has token ids outside the vocabulary of {meta["vocab_size"]}; {cure}')
        docs = np.load(path / f'{split}_docs.npz')
        splits.append(Split(tokens, docs['start'], docs['domain']))
    return Dataset(meta, json.loads((path / 'tokenizer.json').read_bytes()), *splits)


# ----------------------------------------------------------------------------------------------------------------------

def one_domain_share(lengths, domain, window=1024):
    """Share of the non-overlapping windows that lie within one domain. lengths, domain (n_docs,)."""
    n = lengths.sum() // window
    labels = np.repeat(domain, lengths)[:n * window].reshape(n, window)  # the domain of each token
    return (labels == labels[:, :1]).all(1).mean() if n else 1.0


def main(argv=None):
    parser = argparse.ArgumentParser(description='Prepares data/<dataset>/ for train.py.', allow_abbrev=False,
                                     usage='python prepare.py [--input PATH ...] [--flag=value ...]; see --help',
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag('--dataset', help='folder in data/ for the result; None: builtin, or the name of the first input')
    flag('--input', nargs='+', metavar='PATH', help='folders (first-level subfolders are the domains), text files, '
         '.jsonl with "text" and perhaps "domain"; a lone text file is cut at blank lines; None: the built-in corpus')
    flag('--tokenizer', default='bpe', help='bpe, trained on (up to 50 MB of) the training text; byte; or a name that '
         'tiktoken knows, such as gpt2, which it downloads')
    flag('--vocab_size', type=int, default=2048, help='tokens of bpe, <|endoftext|> included')
    flag('--order', default='similar', choices=['similar', 'random'], help='order of the training documents')
    flag('--n_neighbors', type=int, default=32, help='neighbours that may follow a document')
    flag('--val_fraction', type=float, default=0.05, help='share of the source files that is held out')
    flag('--mb_per_domain', type=float, default=5.0, help='MB of each domain of the built-in corpus, at most')
    flag('--seed', type=int, default=1337, help='of the walk and the shuffle; what is held out does not depend on it')
    args, began = parser.parse_args(argv), time.time()
    if not (args.vocab_size > 256 and args.n_neighbors > 0 and args.seed >= 0 and 0 < args.val_fraction < 1
            and args.mb_per_domain > 0):
        raise UserError('--vocab_size must be above 256, --n_neighbors and --mb_per_domain above 0, --val_fraction '
                        'between 0 and 1, --seed not negative.')
    if args.tokenizer not in ('bpe', 'byte'):
        fetch_encoding(args.tokenizer)  # a failure should come before the work
    args.dataset = args.dataset or (Path(os.path.abspath(args.input[0])).stem if args.input else 'builtin')
    if Path(args.dataset).name != args.dataset or args.dataset in ('', '..'):
        raise UserError(f'--dataset={args.dataset} must be a plain name: it becomes a folder in data/.')

    docs = read_inputs(args.input) if args.input else read_builtin(args.mb_per_domain)
    say('read', f'{len(docs):,} documents, {sum(len(doc.text) for doc in docs) / 1e6:.2f} M characters', began)
    if len(docs) < 2:
        raise UserError(f'{len(docs)} usable document(s) in the input, and two are needed, one to hold out: give more.')
    domains = sorted({doc.domain for doc in docs}, key=None if args.input else DOMAINS.index)
    if len(domains) > 256:
        raise UserError(f'{len(domains)} domains in the input, and 256 is the most: use fewer subfolders or "domain"s.')

    val, train = hold_out(docs, args.val_fraction)
    train, val = order_training(train, val, args), order_validation(val, domains, args)
    if not train:
        raise UserError('nothing is left to train on beside the held-out documents and their twins: give more text.')
    for domain in domains:
        sizes = [[len(doc.text.encode()) for doc in side if doc.domain == domain] for side in (train, val)]
        say(f'  {domain}', '    '.join(f'{side:8} {len(size):7,} documents {sum(size) / 1e6:7.2f} MB'
                                       for side, size in zip(('train', 'held out'), sizes)))
    since = time.time()
    tokenizer = make_tokenizer(args.tokenizer, args.vocab_size, [doc.text for doc in train])
    say('tokenizer', f'{args.tokenizer}, {len(tokenizer["tokens"]) + 1:,} tokens', since)

    since, path = time.time(), Path('data', args.dataset)
    installed = {d.name: d.version for d in metadata.distributions()}
    meta = save_dataset(path, {'train': train, 'val': val}, tokenizer, {
        'domains': domains, 'arguments': vars(args), 'seed': args.seed,
        'versions': {name: installed.get(name) for name in (*LIBRARIES, 'tiktoken', 'regex')}})
    for split in ('train', 'val'):
        n = meta[split]['tokens']
        say(f'{split}.bin', f'{n:,} tokens, {meta[split]["bytes"] / n:.2f} bytes a token', since)
    docs = np.load(path / 'train_docs.npz')
    lengths, shuffled = np.diff(docs['start']), np.random.default_rng(args.seed).permutation(len(train))
    say('one-domain windows', f'{one_domain_share(lengths, docs["domain"]):.2f} of windows of 1024 tokens, '
        f'{one_domain_share(lengths[shuffled], docs["domain"][shuffled]):.2f} if shuffled')
    say(f'{path}/', 'is ready', began)


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')  # a terminal may lack a character
    try:
        main()
    except UserError as e:
        print(f'prepare.py: {e}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('\nprepare.py: stopped; to have a dataset, run it again.', file=sys.stderr)
        sys.exit(130)
