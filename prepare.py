"""
From documents to training data: read, hold out, chain similar documents, tokenize, write data/<dataset>/.

    python prepare.py                                  the built-in corpus: text of the installed libraries
    python prepare.py --input essays/ a.txt b.jsonl    your own: folders, text files, JSONL with "text"
    python prepare.py --input new/ --tokenizer=out/ckpt.pt    text on which to train that checkpoint further

Lory routes each segment by the one before it, which tells nothing if the next document is unrelated. So the
paper puts similar documents next to each other (Sec. 3.2, App. C). (At our size, models of shuffled text
are mostly better: experiments/README.md.) TF-IDF and exact search stand for the paper's Contriever and
FAISS: they need no model and no GPU, and find the same order on every machine.

    train.bin, val.bin            token ids, little-endian uint16 or uint32, <|endoftext|> before a document
    train_docs.npz, val_docs.npz  start int64 (n_docs + 1), offsets into the .bin; domain uint8 (n_docs)
    tokenizer.json                name, pattern, special_tokens, tokens (bytes in base64, in rank order)
    meta.json                     format, vocab_size, eot, dtype, domains, arguments, seed, versions; tokens,
                                  documents and bytes of train and val; sha256 of each other file
"""
import ast
import base64
import hashlib
import heapq
import io
import json
import os
import sys
import warnings
from collections import Counter, defaultdict, namedtuple
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import regex
import tiktoken

from lory import UserError, add_flag, atomic_open, make_parser, read_checkpoint, run_script

FORMAT = 1              # of the dataset on disk; a reader refuses any other
EOT = '<|endoftext|>'   # stands before each document
PIECE = 4096            # characters in a piece of the built-in corpus, at most
SHARD = 100_000         # documents chained together, at most
MAX_VAL = 10_000_000    # bytes held out, at most: more would not sharpen a figure
MIN_VAL = 64            # bytes of a domain held out, at least; domains below 4 * MIN_VAL hold out none
PATTERN = r' ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+'  # what a token may span
HASH = np.random.default_rng(0).integers(2**64, size=9, dtype=np.uint64)  # for 9-grams
LIBRARIES = 'joblib matplotlib mpmath networkx numpy scikit-learn scipy sympy torch'.split()  # pinned
DOMAINS = ['prose', 'repl', 'python', 'tests', 'cpp']  # of the built-in corpus
Document = namedtuple('Document', 'text domain source')  # a source is a file, or a record of a .jsonl
Split = namedtuple('Split', 'tokens start domain')  # (n_tokens,) mapped from disk; (n_docs + 1,); (n_docs,)
Dataset = namedtuple('Dataset', 'meta tokenizer train val')  # two dicts, two Splits


def track(label, items):
    """Yield `items`; on a terminal, with a counter that overwrites itself."""
    for n, item in enumerate(items, 1):
        if sys.stderr.isatty():
            print(f'{label} {n:,} / {len(items):,}', end='\033[K\r', file=sys.stderr)
        yield item


def count_bytes(docs):
    return sum(len(doc.text.encode()) for doc in docs)


# --- Reading: the built-in corpus, cut from files of the pinned libraries, or a user's own text. ---

def cut(text, breaks=(r'(?<=\n\n)(?=\S)', r'(?<=\n\n)', r'(?<=\n)', '')):
    """Pieces of at most PIECE characters that join to `text`. Cuts at blank lines before unindented text (in
    code, the end of a function). Blocks still too long are cut at blank lines, lines, then anywhere."""
    pieces = ['']
    for block in regex.split(breaks[0], text):
        for part in [block] if len(block) <= PIECE else cut(block, breaks[1:]):
            if len(pieces[-1]) + len(part) > PIECE:
                pieces.append('')
            pieces[-1] += part
    return pieces


def split_python(source):
    """{'prose': docstrings without doctests, 'repl': the doctests, 'python': code without docstrings}."""
    with warnings.catch_warnings(action='ignore'):  # invalid escapes are not this reader's concern
        tree = ast.parse(source)
    lines, prose, repl = source.split('\n'), [], []
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and (doc := ast.get_docstring(node)):
            # A doctest goes from its prompt to the next blank line. split returns text, doctest, text, ...
            parts = regex.split(r'^([ \t]*>>> .*(?:\n[ \t]*\S.*)*)', doc, flags=regex.MULTILINE)
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
    docs, room = [], dict.fromkeys(DOMAINS, mb_per_domain * 1e6)
    files = [file for library in LIBRARIES for file in metadata.files(library) or ()
             if file.suffix in ('.py', '.h', '.hpp', '.cuh')
             and '/ATen/ops/' not in str(file)]  # that folder is generated
    # The same shuffle for everyone. It is salted so as not to be the order in which hold_out takes files.
    files.sort(key=lambda file: hashlib.sha1(b'order of ' + str(file).encode()).digest())
    for file in track('reading', files):
        texts = {}
        with suppress(OSError, ValueError, SyntaxError, RecursionError):  # missing, not UTF-8, not for ast
            source = file.locate().read_text(encoding='utf-8')
            if file.suffix != '.py':
                texts = {'cpp': source}
            elif regex.search(r'(^|[/_])(test|tests|testing)[/_.]', str(file)):
                texts = {'tests': source}
            elif max(room['prose'], room['python'], room['repl'] if '>>> ' in source else 0) > 0:
                texts = split_python(source)  # takes time
        for domain, text in texts.items():
            pieces = [piece for piece in cut(regex.sub(r'\n\s*\n+', '\n\n', text)) if len(piece) >= 512]
            for piece in pieces[:4]:  # no long file dominates
                if room[domain] > 0:
                    docs.append(Document(piece.strip('\n'), domain, str(file)))
                    room[domain] -= len(piece.encode())
    return docs


def find_files(path, seen):
    """The files at or below `path`, none of them hidden and none twice. Links are followed. A folder that is
    empty, unreadable, or made by prepare.py or train.py is returned as a file: read_inputs reports it."""
    place, children = os.path.realpath(path), sorted(path.glob('[!.]*'))
    if place in seen:
        return []
    seen.add(place)
    if not children or {path / 'train_docs.npz', path / 'ckpt.pt'} & set(children):
        return [path]
    return [file for child in children for file in find_files(child, seen)]


def read_jsonl(text, source, domain):
    """Yield a Document for each line of `text`. UserError for a line that is no record."""
    for i, line in enumerate(text.split('\n'), 1):
        try:
            record = json.loads(line.strip() or '{"text": ""}')
            record['text'].encode()  # fails for anything but text, half a surrogate pair too
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f'{source}, line {i}: expected a JSON object with a string "text".') from None
        label = record.get('domain')
        yield Document(record['text'], domain if label in (None, '') else str(label), f'{source}:{i}')


def read_inputs(paths):
    """Documents from folders, text files and .jsonl files. A domain is the label of a record, else the
    first-level subfolder, else the name of the input."""
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f'--input {path!r} does not exist; check the path.')
    names = [os.path.basename(os.path.abspath(path)) for path in paths]
    if len(set(names)) < len(names):
        names = paths  # two of one name go by their paths as given
    seen, docs, skipped = set(), [], []
    files = [(file, path, name) for path, name in zip(paths, names) for file in find_files(Path(path), seen)]
    for file, path, name in track('reading', files):
        inside = (name, *file.relative_to(path).parts)
        source, domain = '/'.join(inside), inside[1] if len(inside) > 2 else name
        text = ''
        with suppress(OSError, UnicodeDecodeError):
            if file.is_file():  # a pipe never ends
                text = file.read_text(encoding='utf-8-sig')
        if not text.strip() or '\0' in text:
            skipped.append(source)
        elif file.suffix.lower() in ('.jsonl', '.ndjson'):
            docs += read_jsonl(text, source, domain)
        else:
            docs.append(Document(text, domain, source))
    if skipped:
        print(f'skipped {len(skipped):,} inputs, empty, not UTF-8 text or made by these scripts:',
              ', '.join(skipped[:5]))
    # Legends hide a name that begins with _ and read $ as mathematics, and a line break would split a log
    # line. Such characters become <their number in hex>, so two labels stay two names.
    odd = regex.compile(r'^[_ ]|[^\w .,:;+#&@!/()-]')
    return [doc._replace(domain=odd.sub(lambda c: f'<{ord(c[0]):x}>', doc.domain))
            for doc in docs if doc.text.strip()]


# --- What is held out, and which documents are twins. ---

def hold_out(docs, val_fraction):
    """About `val_fraction` of the bytes of each domain, but at most MAX_VAL in all. -> validation, training

    Sources are held out whole as long as they fit, in the order of the sha1 of their names, whatever the
    seed. If that gives less than half of a domain's goal, the end of its longest document is cut off and held
    out, too. No other file is on both sides."""
    docs, held, domains = list(docs), set(), defaultdict(Counter)  # domain -> source -> its bytes
    for doc in docs:
        domains[doc.domain][doc.source] += len(doc.text.encode())
    share = min(val_fraction, MAX_VAL / max(1, count_bytes(docs)))
    for domain, size in sorted(domains.items()):
        goal = max(share * size.total(), MIN_VAL) if size.total() >= 4 * MIN_VAL else 0
        room = goal - sum(size[source] for source in held)  # a file may serve several domains
        for source in sorted(size.keys() - held, key=lambda name: hashlib.sha1(os.fsencode(name)).digest()):
            if size[source] <= room:
                held.add(source)
                room -= size[source]
        if room > goal / 2:
            rest = [i for i, doc in enumerate(docs) if doc.domain == domain and doc.source not in held]
            i = max(rest, key=lambda i: len(docs[i].text))
            text = docs[i].text
            at = max(1, int(len(text) * (1 - room / len(text.encode()))))
            docs[i] = docs[i]._replace(text=text[:at])
            docs.append(Document(text[at:], domain, f'end of {docs[i].source}'))
            held.add(docs[-1].source)
    return [doc for doc in docs if doc.source in held], [doc for doc in docs if doc.source not in held]


def ngrams(text, shortest):
    """Sorted hashes (n_grams,) uint64 of the different 9-grams of characters in a text, white space
    collapsed. One hash of the whole, if it has fewer than `shortest` characters or too many for memory."""
    text = ' '.join(text.split())
    if not shortest <= len(text) <= 10_000_000:
        return np.frombuffer(hashlib.sha1(text.encode()).digest()[:8], '<u8')
    code = np.frombuffer(text.encode('utf-32-le'), '<u4').astype(np.uint64)
    return np.unique(np.convolve(code, HASH, 'valid'))  # modulo 2^64


def drop_twins(docs, shortest, held=()):
    """Drop each document that is a twin of a held-out one, or of an earlier one that stays. Texts are twins
    if the Jaccard similarity of their 9-grams is 0.8 or more. Texts of fewer than `shortest` characters must
    be equal but for white space. -> Documents that stay, [(dropped, twin), ...]

    MinHash proposes pairs, and misses few. Each of 64 fixed numbers picks the next hash above it in a text.
    Two texts share the pick with a probability equal to their similarity. Four such hashes make a band.
    Texts of similarity 0.8 share 6.5 of 16 bands on average, of similarity 0.2 hardly ever one. A band
    remembers the first text that had it. So each is compared with 16 others at most, in linear time."""
    docs, kept, twins, first = [*held, *docs], [], [], {}  # first: band -> the number of a document
    points = np.arange(64, dtype=np.uint64) << np.uint64(58)
    for i, doc in enumerate(track('comparing', docs)):
        grams = ngrams(doc.text, shortest)
        mins = grams.take(np.searchsorted(grams, points), mode='wrap')  # (64,)
        bands = mins.reshape(16, 4).sum(1).tolist()  # (16,)
        likely = {first[band] for band in bands if band in first}
        others = {j: ngrams(docs[j].text, shortest) for j in likely}
        near = [j for j, other in others.items()
                if len(np.intersect1d(grams, other)) / len(np.union1d(grams, other)) >= 0.8]
        if near and i >= len(held):
            twins.append((doc, docs[min(near)]))
        else:
            kept.append(doc)
            for band in bands:
                first.setdefault(band, i)
    return kept[len(held):], twins


# --- Similarity (Sec. 3.2, App. C): documents as vectors, nearest neighbours, one walk through all. ---

def embed(texts):
    """TF-IDF vectors of length 1 (or 0), a sparse matrix (n_docs, n_terms). Weights are multiples of 2^-16:
    float64 holds their products and sums exactly, so every machine finds the same neighbours and ties."""
    from scipy.sparse import csr_matrix  # here, because they take a second that train.py can do without
    from sklearn.feature_extraction.text import TfidfVectorizer
    word = regex.compile(r'\p{Lu}?[\p{Ll}\p{M}]+|\p{Lu}+|\p{Han}|\p{L}+')  # camelCase is two words
    # A term of one document links it to no other. A term of over 5% of them (and over 100) says too little.
    tfidf = TfidfVectorizer(analyzer=lambda text: map(str.lower, word.findall(text)),
                            sublinear_tf=True, min_df=2, max_df=max(100, len(texts) // 20))
    try:
        X = tfidf.fit_transform(texts)
    except ValueError:  # no term is left: these documents share no word
        X = csr_matrix((len(texts), 1))
    X.data = np.round(X.data * 2**16) / 2**16
    return X


def nearest(X, n_neighbors):
    """For each document the n_neighbors others of highest cosine, best first. Ties go to the lower number.
    Documents of cosine 0 are left out. The search is exact. -> n_docs lists"""
    XT, lists, n_docs = X.T.tocsr(), [], X.shape[0]
    for block in track('neighbours', np.array_split(np.arange(n_docs), n_docs**2 // 4_000_000 + 1)):
        cosine = (X[block] @ XT).toarray()  # (n_rows, n_docs), multiples of 2^-32; a block takes 130 MB
        cosine[range(len(block)), block] = 0  # a document is no neighbour of itself
        # Sorts by falling cosine, then by number, key % n_docs. A key is negative if the cosine is not 0.
        key = np.arange(n_docs) - (cosine * 2**32).astype(np.int64) * n_docs
        best = np.sort(np.partition(key, min(n_neighbors, n_docs) - 1)[:, :n_neighbors])
        lists += [[k % n_docs for k in row if k < 0] for row in best.tolist()]
    return lists


def chain(neighbours, rng):
    """The greedy walk (App. C): from a document to its most similar unused neighbour, or when all of them are
    used, to a random unused document. n_docs lists, best first -> order, a list of n_docs"""
    order = {}  # a dict keeps its keys in order
    for here in rng.permutation(len(neighbours)).tolist():
        while here not in order:
            order[here] = True
            here = next((j for j in neighbours[here] if j not in order), here)
    return list(order)


def arrange(docs, order, n_neighbors, seed):
    """-> Documents in the order they are written; mean cosine with the next one, and in a random order (2,).
    At most SHARD are compared with each other: time grows linearly, memory beside the text is below 1 GB."""
    s, result, cosine = 0, [], np.zeros(2)
    for s, a in enumerate(range(0, len(docs), SHARD)):
        shard = docs[a:a + SHARD]
        X, rng = embed([doc.text for doc in shard]), np.random.default_rng([*seed, s])
        shuffled = rng.permutation(len(shard))
        walked = chain(nearest(X, n_neighbors), rng) if order == 'similar' else shuffled
        result += [shard[i] for i in walked]
        cosine += [X[o[:-1]].multiply(X[o[1:]]).sum() for o in (walked, shuffled)]
    return result, cosine / max(1, len(docs) - s - 1)  # pairs: each shard has one fewer than documents


# --- Tokenizer: byte-level BPE. 256 bytes can write any text; frequent pairs become tokens too. ---

def in_parts(text):
    """tiktoken's regex engine overflows on a million blanks. No token spans a cut."""
    return [text[a:a + 100_000] for a in range(0, len(text), 100_000)]


def count_words(texts, room):
    """word -> how often it occurs. Reads the texts in random order, and stops when the different words of
    over 16 bytes add up to `room` bytes. Text without blanks gets there early, English after 50 MB.
    A word of over 100 characters is data, and does not count."""
    parts, counts = [part for text in texts for part in in_parts(text)], Counter()
    for i in track('counting words', np.random.default_rng(0).permutation(len(parts))):
        found = Counter(word for word in regex.findall(PATTERN, parts[i]) if len(word) <= 100)
        new = [word.encode() for word in found if word not in counts]
        counts.update(found)
        room -= sum(len(word) for word in new if len(word) > 16)
        if room < 0:
            break
    return counts


def train_bpe(texts, n_tokens):
    """Up to `n_tokens` tokens (bytes) in rank order: the 256 bytes, then one for each merge of the most
    frequent pair; of equal pairs the first in byte order. Fewer when no pair is left that occurs twice."""
    counts = count_words(texts, 150 * n_tokens)
    # A word is a string with one character for each token, so that str.replace merges a pair.
    words, times = [''] * len(counts), list(counts.values())
    tokens = {bytes([b]): chr(b) for b in range(256)}  # token -> its character
    spelled = {c: token for token, c in tokens.items()}
    pairs, where, heap = Counter(), defaultdict(set), []  # where: the words with a pair

    def rewrite(new):
        """Replace words, {w: word}. Each pair whose count changes is pushed (again)."""
        change = Counter()
        for w in new:
            for word, n in ((words[w], -times[w]), (new[w], times[w])):
                for a, b in zip(word, word[1:]):
                    change[a + b] += n
                    where[a + b].add(w)
            words[w] = new[w]
        pairs.update(change)
        for pair in change:
            heapq.heappush(heap, (-pairs[pair], spelled[pair[0]], spelled[pair[1]], pair))

    rewrite({w: word.encode().decode('latin-1') for w, word in enumerate(counts)})
    progress = track('merging pairs', range(256, n_tokens))
    while heap and len(tokens) < n_tokens:
        count, left, right, pair = heapq.heappop(heap)
        if 1 < -count == pairs[pair]:  # else it is outdated
            c = tokens.setdefault(left + right, chr(len(tokens)))
            spelled[c] = left + right
            rewrite({w: words[w].replace(pair, c) for w in where.pop(pair)})
            next(progress, None)
    return list(tokens)


def make_tokenizer(name, vocab_size=0, texts=()):
    """The content of tokenizer.json. `name` is bpe, trained on `texts`; byte; one that tiktoken knows; or a
    file: a checkpoint or a tokenizer.json."""
    if name in ('bpe', 'byte'):
        tokens = train_bpe(texts, vocab_size - 1 if name == 'bpe' else 256)  # byte is BPE without a merge
        pattern, special = PATTERN, {EOT: len(tokens)}
    elif os.path.isfile(name):
        is_json = name.endswith('.json')
        ckpt = None if is_json else read_checkpoint(name)  # if it is damaged, that says so
        try:
            tokenizer = json.loads(Path(name).read_bytes()) if is_json else ckpt['tokenizer']
            load_tokenizer(tokenizer).encode_single_token(EOT)
            return tokenizer
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise UserError(f'{name} holds no tokenizer; give a checkpoint or a tokenizer.json.') from None
    else:
        try:
            encoding = tiktoken.get_encoding(name)  # downloads, unless it has before
        except (OSError, ValueError):
            raise UserError(f'--tokenizer={name} is no file, and not known to tiktoken or not to be had; '
                            '--tokenizer=bpe needs no network.') from None
        pattern, special, ranks = encoding._pat_str, encoding._special_tokens, encoding._mergeable_ranks
        byte_of = {rank: token for token, rank in ranks.items()}
        tokens = [byte_of.get(rank, b'') for rank in range(max(byte_of) + 1)]  # p50k has a gap in its ranks
    return {'name': name, 'pattern': pattern, 'special_tokens': special,
            'tokens': [base64.b64encode(token).decode() for token in tokens]}


def load_tokenizer(tokenizer):
    """The tiktoken.Encoding of a parsed tokenizer.json. No file, no network, no cache."""
    try:
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(tokenizer['tokens']) if token}
        return tiktoken.Encoding(tokenizer['name'], pat_str=tokenizer['pattern'], mergeable_ranks=ranks,
                                 special_tokens=tokenizer['special_tokens'])
    except (KeyError, TypeError, ValueError):
        raise UserError('no tokenizer here: give a tokenizer.json or a checkpoint saved with one.') from None


def token_bytes(tokenizer):
    """The bytes in each token id of a parsed tokenizer.json, 0 for special tokens. (vocab_size,)"""
    sizes = [len(base64.b64decode(token)) for token in tokenizer['tokens']]
    return sizes + [0] * (max(tokenizer['special_tokens'].values()) + 1 - len(sizes))


def encode(encoding, text):
    """Token ids of `text`, in which <|endoftext|> means nothing special."""
    return [token for part in in_parts(text) for token in encoding.encode_ordinary(part)]


# --- The dataset on disk. Whoever reads it checks every file that meta.json names. ---

def save_dataset(path, splits, tokenizer, meta):
    """Write `splits` {'train': Documents, 'val': Documents} to the folder `path`. -> meta, completed

    A crash while the files take their places leaves a mixture, which load_dataset knows by the checksums."""
    encoding, files = load_tokenizer(tokenizer), {'tokenizer.json': json.dumps(tokenizer).encode()}
    dtype = 'uint16' if encoding.n_vocab <= 2**16 else 'uint32'
    meta = dict(format=FORMAT, vocab_size=encoding.n_vocab, eot=encoding.eot_token, dtype=dtype, **meta)
    for split, docs in splits.items():
        tokens = [np.array([meta['eot'], *encode(encoding, doc.text)], dtype) for doc in track(split, docs)]
        start = np.cumsum([0, *map(len, tokens)])
        domain = np.array([meta['domains'].index(doc.domain) for doc in docs], np.uint8)
        np.savez(npz := io.BytesIO(), start=start, domain=domain)
        files |= {f'{split}.bin': np.concatenate(tokens), f'{split}_docs.npz': npz.getvalue()}
        meta[split] = {'tokens': int(start[-1]), 'documents': len(docs), 'bytes': count_bytes(docs)}
    meta['sha256'] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files['meta.json'] = json.dumps(meta, indent=1).encode()
    with ExitStack() as stack:  # at its end files are renamed in reverse order, meta.json last
        for name, data in sorted(files.items()):
            file = stack.enter_context(atomic_open(path / name))
            file.write(data)
            file.flush()  # so that a full disk shows before the first file takes its place
    return meta


def load_dataset(path, block_size):
    """The Dataset in the folder `path`. UserError unless each file has the checksum that meta.json says and
    each split block_size + 1 tokens."""
    try:
        meta = json.loads(Path(path, 'meta.json').read_bytes())
        if meta['format'] != FORMAT:
            raise ValueError(f'it has format {meta["format"]}, this is format {FORMAT}')
        verify = os.environ.get('LOCAL_RANK', '0') == '0'  # once on each machine: it may take minutes
        for name, sha256 in meta['sha256'].items():
            with open(Path(path, name), 'rb') as f:
                if verify and hashlib.file_digest(f, 'sha256').hexdigest() != sha256:
                    raise ValueError(f'meta.json has another checksum of {name}')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'no dataset: {path} is missing or damaged ({error}); make it with prepare.py and '
                        f'--dataset={Path(path).name}, in the folder that holds data/.') from None
    splits = []
    for split in ('train', 'val'):
        tokens = np.memmap(f'{path}/{split}.bin', meta['dtype'], 'r')
        if len(tokens) <= block_size:
            raise UserError(f'{path}/{split}.bin has {len(tokens)} tokens, too few for '
                            f'--block_size={block_size}: lower it or add text.')
        splits.append(Split(tokens, **np.load(f'{path}/{split}_docs.npz')))
    return Dataset(meta, json.loads(Path(path, 'tokenizer.json').read_bytes()), *splits)


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument('--input', nargs='+', action='extend', metavar='PATH', help='text files; .jsonl '
                        'with "text", "domain"; folders of these, subfolders are domains (default: built-in)')
    add_flag(parser, 'dataset', '', 'folder in data/ to write; empty: builtin, or the first input\'s name')
    add_flag(parser, 'tokenizer', 'bpe', 'bpe, trained on the training text; byte; one of tiktoken\'s, '
             'such as gpt2, which it downloads; or a checkpoint or tokenizer.json, to use the same')
    add_flag(parser, 'vocab_size', 2048, 'tokens of bpe, <|endoftext|> included', low=257, below=10**6)
    add_flag(parser, 'order', 'similar', 'order of the training documents', choices=['similar', 'random'])
    add_flag(parser, 'n_neighbors', 32, 'neighbours that may follow a document', low=1)
    add_flag(parser, 'val_fraction', 0.05, 'share of each domain to hold out', low=1e-6, below=1)
    add_flag(parser, 'mb_per_domain', 5.0, 'MB of each domain of the built-in corpus', low=1e-6)
    add_flag(parser, 'seed', 1337, 'of the walk and the shuffle, not of what is held out')
    args = parser.parse_args(argv)

    first = Path(os.path.abspath((args.input or ['builtin'])[0]))
    args.dataset = args.dataset or (first.stem if first.is_file() else first.name)
    if args.dataset != os.path.basename(os.path.abspath(args.dataset)):
        raise UserError(f'--dataset={args.dataset} must be a plain name: it becomes a folder in data/.')
    if os.path.exists(f'data/{args.dataset}'):
        print(f'what is in data/{args.dataset}/ now will be replaced')
    # A tokenizer that cannot be had should fail before the work. bpe is trained after it.
    tokenizer = None if args.tokenizer == 'bpe' else make_tokenizer(args.tokenizer)

    docs = read_inputs(args.input) if args.input else read_builtin(args.mb_per_domain)
    print(f'read {len(docs):,} documents, {count_bytes(docs) / 1e6:.2f} MB')
    domains = sorted({doc.domain for doc in docs}, key=None if args.input else DOMAINS.index)
    if len(domains) > 256:
        raise UserError(f'the input has {len(domains)} domains, 256 is the most: use fewer labels or inputs.')

    originals, copies = drop_twins(docs, shortest=np.inf)  # equal texts only
    val, train = hold_out(originals, args.val_fraction)
    train, twins = drop_twins(train, shortest=50, held=val)
    print(f'dropped {len(copies):,} documents equal to others, {len(twins):,} near-duplicates')
    if len(copies + twins) > len(docs) / 2:
        dropped, twin = (copies + twins)[0]
        print(f'warning: that is more than half of the input: {dropped.source} counts as {twin.source}')
    if not train or not val:
        raise UserError(f'too little text, nothing is left to {"train on" if val else "hold out"}: give more '
                        f'in UTF-8, {4 * MIN_VAL} bytes of a domain at least, and not all of it alike.')

    # Validation is the same for every --order, and goes domain by domain: each is measured on its own text.
    val_ordered = []
    for d, domain in enumerate(domains):
        trained, held = ([doc for doc in side if doc.domain == domain] for side in (train, val))
        why = '' if trained and held else ' (too little, or too much alike, for both)'
        print(f'{domain}: {count_bytes(trained):,} bytes to train on, {count_bytes(held):,} held out{why}')
        val_ordered += arrange(held, 'similar', args.n_neighbors, [args.seed, d])[0]
    train, cosine = arrange(train, args.order, args.n_neighbors, [args.seed])
    print(f'order {args.order}: cosine with the next document {cosine[0]:.3f}, at random {cosine[1]:.3f}')

    tokenizer = tokenizer or make_tokenizer('bpe', args.vocab_size, [doc.text for doc in train])
    meta = save_dataset(Path('data', args.dataset), {'train': train, 'val': val_ordered}, tokenizer, {
        'domains': domains, 'arguments': vars(args), 'seed': args.seed,
        'versions': {name: metadata.version(name) for name in (*LIBRARIES, 'tiktoken', 'regex')}})
    for split in ('train', 'val'):
        print(f'data/{args.dataset}/{split}.bin: {meta[split]["tokens"]:,} tokens')


if __name__ == '__main__':
    run_script(main)
