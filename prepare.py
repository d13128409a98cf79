"""
From documents to training data: read, hold out, chain similar documents, tokenize, write data/<dataset>/.

    python prepare.py                                  the built-in corpus: text of the installed libraries
    python prepare.py --input essays/ a.txt b.jsonl    your own: folders, text files, JSONL with "text"
    python prepare.py --input new/ --tokenizer=out/ckpt.pt    text on which to train that checkpoint further

Lory routes each segment by the one before it. Where a document ends and a random one begins, the segment
before says nothing about the one after. So the paper puts similar documents next to each other (Sec. 3.2,
App. C), and so does this script. (At our small size, models of shuffled text are as good or better:
experiments/README.md measures it.) The paper embeds with Contriever and searches with FAISS. TF-IDF and
exact search need no model and no GPU, and find the same order on every machine.

    documents -> equal ones out -> hold out -> near-duplicates out -> TF-IDF vectors -> nearest neighbours
              -> greedy walk from neighbour to unused neighbour -> one stream of tokens for train.py to cut

    train.bin, val.bin            token ids, little-endian uint16 or uint32, documents after <|endoftext|>
    train_docs.npz, val_docs.npz  start int64 (n_docs + 1), offsets into the .bin; domain uint8 (n_docs)
    tokenizer.json                name, pattern, special_tokens, tokens (bytes in base64, in rank order)
    meta.json                     format, vocab_size, eot, dtype, domains, arguments, seed, versions; tokens,
                                  documents and bytes of train and val; sha256 of each other file
"""
import ast
import base64
import hashlib
import heapq
import json
import os
import sys
import warnings
from collections import Counter, defaultdict, namedtuple
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

import numpy as np
import regex
import tiktoken

from lory import UserError, add_flag, atomic_open, make_parser, read_checkpoint, run_script, tell

FORMAT = 1              # of the dataset on disk; a reader refuses any other
FILES = {'meta.json', 'tokenizer.json', 'train.bin', 'train_docs.npz', 'val.bin', 'val_docs.npz'}
EOT = '<|endoftext|>'   # stands before each document
PIECE = 4096            # characters in a piece of the built-in corpus, at most
TWIN = 0.8              # Jaccard similarity from which two documents are near-duplicates
SHARD = 100_000         # documents chained together, at most
MAX_VAL = 10_000_000    # bytes held out, at most: more would not sharpen a figure
MIN_VAL = 64            # bytes of a domain held out, at least; a domain below 4 * MIN_VAL holds out none
HASH = np.random.default_rng(0).integers(2**64, size=9, dtype=np.uint64)  # for 9-grams
LIBRARIES = 'joblib matplotlib mpmath networkx numpy scikit-learn scipy sympy torch'.split()  # pinned
DOMAINS = ['prose', 'repl', 'python', 'tests', 'cpp']  # of the built-in corpus
Document = namedtuple('Document', 'text domain source')  # a source is a file, or a record of a .jsonl
Split = namedtuple('Split', 'tokens start domain')  # (n_tokens,) mapped from disk; (n_docs + 1,); (n_docs,)
Dataset = namedtuple('Dataset', 'meta tokenizer train val')  # two dicts, two Splits


def report(label, text):
    tell(f'{label:<18} {text}')


def track(label, items):
    """Yield `items`; on a terminal, with a counter that overwrites itself."""
    for n, item in enumerate(items, 1):
        if sys.stderr.isatty():
            print(f'{label:<18} {n:,} / {len(items):,}', end='\033[K\r', file=sys.stderr)
        yield item


def count_bytes(docs):
    return sum(len(doc.text.encode()) for doc in docs)


# --- The built-in corpus, cut from files of the pinned libraries. They are read, not imported. ---

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
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if doc := ast.get_docstring(node):
                # A doctest goes from its prompt to the next blank line. split alternates: text, doctest.
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
    files, docs, room = [], [], dict.fromkeys(DOMAINS, mb_per_domain * 1e6)
    for library in LIBRARIES:
        files += [file for file in metadata.files(library) or ()
                  if file.suffix in ('.py', '.h', '.hpp', '.cuh')
                  and '/ATen/ops/' not in str(file)]  # that folder is generated
    # The same shuffle for everyone, salted because hold_out takes files in the order of their plain sha1.
    files.sort(key=lambda file: hashlib.sha1(b'order of ' + str(file).encode()).digest())
    for file in track('reading', files):
        try:
            source = file.locate().read_text(encoding='utf-8')
            if file.suffix != '.py':
                texts = {'cpp': source}
            elif regex.search(r'(^|[/_])(test|tests|testing)[/_.]', str(file)):
                texts = {'tests': source}
            elif max(room['prose'], room['python'], room['repl'] if '>>> ' in source else 0) > 0:
                texts = split_python(source)
            else:  # parsing takes time
                continue
        except (OSError, SyntaxError, ValueError, RecursionError):  # missing, not UTF-8, or another syntax
            continue
        for domain, text in texts.items():
            pieces = [piece for piece in cut(regex.sub(r'\n\s*\n+', '\n\n', text)) if len(piece) >= 512]
            for piece in pieces[:4]:  # no long file dominates
                if room[domain] > 0:
                    docs.append(Document(piece.strip('\n'), domain, str(file)))
                    room[domain] -= len(piece.encode())
    return docs


# --- A user's own text. ---

def find_files(path, seen):
    """The files at or below `path`, but no hidden ones. A folder that prepare.py or train.py made is returned
    unopened, and read_inputs reports it as skipped. Links are followed, and nothing is visited twice."""
    place = os.path.realpath(path)
    if place in seen:
        return []
    seen.add(place)
    if os.path.exists(path / 'train_docs.npz') or os.path.exists(path / 'ckpt.pt'):
        return [path]
    try:
        children = sorted(path.iterdir())
    except OSError:  # a file, or a folder that may not be opened
        return [path]
    return [file for child in children if not child.name.startswith('.') for file in find_files(child, seen)]


def read_jsonl(text, source, domain):
    """One Document for each line of `text` that is not empty. UserError for a line that is no record."""
    docs = []
    for i, line in enumerate(text.split('\n'), 1):
        try:
            record = json.loads(line.strip() or '{"text": ""}')
            record['text'].encode()  # fails for anything but text, half a surrogate pair too
            label = record.get('domain')
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f'{source}, line {i}: expected a JSON object with a string "text".') from None
        if record['text'].strip():
            label = domain if label in (None, '') else str(label)
            docs.append(Document(record['text'], label, f'{source}:{i}'))
    return docs


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
        try:
            text = file.read_text(encoding='utf-8-sig') if file.is_file() else ''  # a pipe never ends
        except (OSError, UnicodeDecodeError):
            text = ''
        if not text.strip() or '\0' in text:
            skipped.append(source)
        elif file.suffix.lower() in ('.jsonl', '.ndjson'):
            docs += read_jsonl(text, source, domain)
        else:
            docs.append(Document(text, domain, source))
    if skipped:
        examples = ', '.join(skipped[:5])
        report('skipped', f'{len(skipped):,} inputs, not readable UTF-8 or of these scripts: {examples}')
    # A domain's name gets into log lines and legends, where matplotlib hides what begins with _ and reads
    # mathematics between dollars. Odd characters become numbers, so that two labels stay two names.
    odd = regex.compile(r'^[_ ]|[^\w .,:;+#&@!/()-]')
    return [doc._replace(domain=odd.sub(lambda c: f'<{ord(c[0]):x}>', doc.domain)) for doc in docs]


# --- What is held out, and which documents count as the same. ---

def unique(docs):
    """Of texts that differ in white space only, the first stays. -> Documents, [(dropped, twin), ...]"""
    first, copies = {}, []
    for doc in docs:
        key = hashlib.sha1(' '.join(doc.text.split()).encode()).digest()
        twin = first.setdefault(key, doc)
        if twin is not doc:
            copies.append((doc, twin))
    return list(first.values()), copies


def hold_out(docs, val_fraction):
    """About `val_fraction` of the bytes of each domain, but at most MAX_VAL in all. -> validation, training

    The goal of a domain is a number of bytes. Its sources are held out whole as long as they fit, in the
    order of the sha1 of their names, whatever the seed: so no file stands on both sides. Where they give less
    than half of the goal, the end of the domain's longest document is cut off and held out, too."""
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
            text, data = docs[i].text, docs[i].text.encode()
            at = len(data[:max(1, len(data) - int(room))].decode(errors='ignore'))
            at = text.find('\n', at, at + (len(text) - at) // 4) + 1 or at  # the next line's start, if near
            docs[i] = docs[i]._replace(text=text[:at])
            docs.append(Document(text[at:], domain, f'end of {docs[i].source}'))
            held.add(docs[-1].source)
    return [doc for doc in docs if doc.source in held], [doc for doc in docs if doc.source not in held]


def ngrams(text):
    """Sorted hashes (n,) uint64 of the different 9-grams of characters in a text, white space collapsed. Very
    short and, for memory, very long texts get one hash of the whole: only equal ones match."""
    text = ' '.join(text.split())
    if not 50 <= len(text) <= 10_000_000:
        return np.frombuffer(hashlib.sha1(text.encode()).digest()[:8], '<u8')
    code = np.frombuffer(text.encode('utf-32-le'), '<u4').astype(np.uint64)
    return np.unique(np.convolve(code, HASH, 'valid'))  # modulo 2^64


def jaccard(a, b):
    return len(np.intersect1d(a, b)) / len(np.union1d(a, b))


def near_duplicates(val, train):
    """A training document that resembles a held-out one goes. Of others that resemble each other the first
    stays. -> training Documents, [(dropped, twin), ...]

    The texts decide, by the Jaccard similarity of their 9-grams. MinHash proposes which to compare. At each
    of 64 fixed numbers a document takes its smallest hash from there on. Two documents take the same one
    with a probability equal to their similarity. Four such hashes make a band. Of 16 bands, documents of
    similarity 0.8 share 6.5 on average, of similarity 0.2 hardly ever one. At most 16 documents are
    remembered for a band's value, and 16 are compared. So however alike documents are, time grows with
    their number only, and memory by 3 KB each."""
    docs, kept, twins, members = val + train, [], [], defaultdict(list)
    points = np.arange(64, dtype=np.uint64) << np.uint64(58)
    for i, doc in enumerate(track('near-duplicates', docs)):
        grams = ngrams(doc.text)
        bands = grams.take(np.searchsorted(grams, points), mode='wrap').reshape(16, 4).sum(1).tolist()
        likely = Counter(j for band in bands for j in members[band]).most_common(16)
        near = [j for j, _ in likely if jaccard(grams, ngrams(docs[j].text)) >= TWIN]
        if near and i >= len(val):
            twins.append((doc, docs[min(near)]))  # a held-out one if there is one
            continue
        kept.append(doc)
        for band in bands:
            if len(members[band]) < 16:
                members[band].append(i)
    return kept[len(val):], twins


# --- Similarity (Sec. 3.2, App. C): documents as vectors, nearest neighbours, one walk through all. ---

WORD = regex.compile(r'\p{Lu}?[\p{Ll}\p{M}]+|\p{Lu}+|\p{Han}|\p{L}+')  # parts camelCase, Chinese into signs


def embed(texts):
    """TF-IDF vectors of length 1 (or 0), a sparse matrix (n_docs, n_terms). Weights are multiples of 2^-16:
    float64 holds their products and sums exactly, so every machine finds the same neighbours and ties."""
    # Imported here, because it takes a second: train.py and sample.py only want the readers of this file.
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfVectorizer
    # A term of one document relates it to none. A term of over 5% of them (and over 100) says too little.
    tfidf = TfidfVectorizer(analyzer=lambda text: [word.lower() for word in WORD.findall(text)],
                            sublinear_tf=True, min_df=2, max_df=max(100, len(texts) // 20))
    try:
        X = tfidf.fit_transform(texts)
    except ValueError:  # no term is left: these documents share no word
        return csr_matrix((len(texts), 1))
    X.data = np.round(X.data * 2**16) / 2**16
    return X


def nearest(X, n_neighbors):
    """For each document the n_neighbors others of highest cosine, best first. Ties go to the lower number.
    Documents of cosine 0 are left out. The search is exact. -> n_docs lists"""
    XT, lists, n_docs = X.T.tocsr(), [], X.shape[0]
    for block in track('neighbours', np.array_split(np.arange(n_docs), n_docs**2 // 4_000_000 + 1)):
        cosine = (X[block] @ XT).toarray()  # (n_rows, n_docs), multiples of 2^-32; a block takes 130 MB
        # One integer to sort by: high cosines come first, then low numbers. It is negative unless the cosine
        # is 0, and modulo n_docs it is the number.
        key = np.arange(n_docs) - (cosine * 2**32).astype(np.int64) * n_docs
        # One more than asked for, because a document is its own neighbour.
        best = np.partition(key, min(n_neighbors, n_docs - 1))[:, :n_neighbors + 1]
        for i, row in zip(block, np.sort(best).tolist()):
            others = [r % n_docs for r in row if r < 0 and r % n_docs != i]
            lists.append(others[:n_neighbors])
    return lists


def chain(neighbours, rng):
    """The greedy walk (App. C): from a document to its most similar unused neighbour, or when all of them are
    used, to a random unused document. n_docs lists, best first -> order (n_docs,), number of restarts"""
    order, restarts = {}, -1  # a dict keeps its keys in order; the first start is no restart
    for here in rng.permutation(len(neighbours)).tolist():
        restarts += here not in order
        while here not in order:
            order[here] = True
            here = next((j for j in neighbours[here] if j not in order), here)
    return np.array(list(order), int), restarts


def arrange(docs, order, n_neighbors, seed):
    """-> Documents in the order they are written, number of restarts, mean cosine of adjacent documents in
    that order and in a random one (2,)

    Comparing all with all takes quadratic time. More than SHARD documents are cut, as they were read, into
    equal shards that are chained in turn: time grows linearly, memory beside the text stays below 1 GB."""
    result, restarts, cosine = [], 0, np.zeros(2)
    shards = np.array_split(np.arange(len(docs)), -(-len(docs) // SHARD) or 1)
    for s, shard in enumerate(shards):
        X, rng = embed([docs[i].text for i in shard]), np.random.default_rng([*seed, s])
        shuffled = rng.permutation(len(shard))
        walked, jumps = chain(nearest(X, n_neighbors), rng) if order == 'similar' else (shuffled, 0)
        result += [docs[i] for i in shard[walked]]
        restarts += jumps
        cosine += [X[o[:-1]].multiply(X[o[1:]]).sum() for o in (walked, shuffled)]
    return result, restarts, cosine / max(1, len(docs) - len(shards))


# --- Tokenizer: byte-level BPE. 256 bytes can write any text; frequent pairs become tokens too. ---

# What a token may span, much as in GPT-2: a word with the space before it, up to three digits, a run of
# signs, a run of blanks but for the last one, which joins the word that follows.
PATTERN = r' ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+'


def in_parts(text):
    """tiktoken's regex engine overflows on a million blanks. No token spans a cut."""
    return [text[a:a + 100_000] for a in range(0, len(text), 100_000)]


def count_words(texts, room):
    """word -> how often it occurs, up to `room` bytes of long words, from texts in random order.

    In text without blanks a clause counts as one word, long and new, so there is no end of words to merge.
    Enough of them tell which pairs are frequent. English has as many in some 50 MB."""
    parts, counts = [part for text in texts for part in in_parts(text)], Counter()
    for i in track('counting words', np.random.default_rng(0).permutation(len(parts))):
        found = [word for word in regex.findall(PATTERN, parts[i]) if len(word) <= 100]  # the rest is data
        new = [word.encode() for word in set(found) if word not in counts]
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
    words, times = [word.encode().decode('latin-1') for word in counts], list(counts.values())
    tokens = {bytes([b]): chr(b) for b in range(256)}  # token -> its character
    spelled = {c: token for token, c in tokens.items()}
    pairs, change, where, heap = Counter(), Counter(), defaultdict(set), []  # where: the words with a pair

    def count(w, n):
        for a, b in zip(words[w], words[w][1:]):
            change[a + b] += n
            where[a + b].add(w)

    for w, n in enumerate(times):
        count(w, n)
    progress = track('merging pairs', range(256, n_tokens))
    while len(tokens) < n_tokens:
        pairs.update(change)
        for pair in change:  # a pair is pushed again whenever its count changes
            heapq.heappush(heap, (-pairs[pair], spelled[pair[0]], spelled[pair[1]], pair))
        change.clear()
        while heap and -heap[0][0] != pairs[heap[0][3]]:  # outdated
            heapq.heappop(heap)
        if not heap or heap[0][0] > -2:
            break
        _, left, right, pair = heapq.heappop(heap)
        c = tokens.setdefault(left + right, chr(len(tokens)))
        spelled[c] = left + right
        for w in where.pop(pair):
            count(w, -times[w])
            words[w] = words[w].replace(pair, c)
            count(w, times[w])
        next(progress, None)
    return list(tokens)


def make_tokenizer(name, vocab_size=0, texts=()):
    """The content of tokenizer.json. `name` is bpe, trained on `texts`; byte; one that tiktoken knows; or a
    file: a checkpoint or a tokenizer.json."""
    if name in ('bpe', 'byte'):
        tokens = train_bpe(texts, vocab_size - 1 if name == 'bpe' else 256)  # byte is BPE without a merge
        pattern, special = PATTERN, {EOT: len(tokens)}
    elif os.path.isfile(name):
        try:
            is_json = name.endswith('.json')
            tokenizer = json.loads(Path(name).read_bytes()) if is_json else read_checkpoint(name)['tokenizer']
            load_tokenizer(tokenizer).encode_single_token(EOT)
            return tokenizer
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise UserError(f'{name} holds no tokenizer; give a checkpoint or a tokenizer.json.') from None
    else:
        try:
            encoding = tiktoken.get_encoding(name)  # downloads, unless it has before
        except (OSError, ValueError):
            names = ', '.join(tiktoken.list_encoding_names())
            raise UserError(f'--tokenizer={name} is not known or could not be had; --tokenizer=bpe needs '
                            f'no network, others are byte, a file, {names}.') from None
        # Its underscored attributes are tiktoken's documented way to extend it.
        pattern, special, ranks = encoding._pat_str, encoding._special_tokens, encoding._mergeable_ranks
        byte_of = {rank: token for token, rank in ranks.items()}
        tokens = [byte_of.get(rank, b'') for rank in range(max(byte_of) + 1)]  # p50k has a gap in its ranks
    return {'name': name, 'pattern': pattern, 'special_tokens': special,
            'tokens': [base64.b64encode(token).decode() for token in tokens]}


def load_tokenizer(tokenizer):
    """The tiktoken.Encoding of a parsed tokenizer.json. No file, no network, no cache."""
    if tokenizer is None:
        raise UserError('this checkpoint has no tokenizer: give save_checkpoint that of the training data.')
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(tokenizer['tokens']) if token}
    return tiktoken.Encoding(tokenizer['name'], pat_str=tokenizer['pattern'], mergeable_ranks=ranks,
                             special_tokens=tokenizer['special_tokens'])


def token_bytes(tokenizer):
    """The bytes in each token id of a parsed tokenizer.json, 0 for special tokens. (vocab_size,)"""
    sizes = [len(base64.b64decode(token)) for token in tokenizer['tokens']]
    return sizes + [0] * (max(tokenizer['special_tokens'].values()) + 1 - len(sizes))


def encode(encoding, text):
    """Token ids of `text`, in which <|endoftext|> means nothing special."""
    return [token for part in in_parts(text) for token in encoding.encode_ordinary(part)]


# --- The dataset on disk. Whoever reads it checks every file, so a damaged one is never used. ---

def sha256(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def save_dataset(path, splits, tokenizer, meta):
    """Write `splits` {'train': Documents, 'val': Documents} to the folder `path`. -> meta, completed

    All files are finished before the first of them takes its place. If a crash hits between two renames,
    load_dataset refuses the mixture: the checksums in meta.json do not match."""
    encoding, eot = load_tokenizer(tokenizer), tokenizer['special_tokens'][EOT]
    dtype = np.dtype('<u2' if encoding.n_vocab <= 2**16 else '<u4')
    meta = {'format': FORMAT, 'vocab_size': encoding.n_vocab, 'eot': eot, 'dtype': dtype.name, **meta}
    with ExitStack() as stack:  # the files take their places at its end
        files = {name: stack.enter_context(atomic_open(path / name)) for name in sorted(FILES)}
        files['tokenizer.json'].write(json.dumps(tokenizer).encode())
        for split, docs in splits.items():
            start = [0]
            for doc in track(f'{split}.bin', docs):
                tokens = [eot, *encode(encoding, doc.text)]
                files[f'{split}.bin'].write(np.array(tokens, dtype))
                start.append(start[-1] + len(tokens))
            domain = np.array([meta['domains'].index(doc.domain) for doc in docs], np.uint8)
            np.savez(files[f'{split}_docs.npz'], start=np.array(start, '<i8'), domain=domain)
            meta[split] = {'tokens': start[-1], 'documents': len(docs), 'bytes': count_bytes(docs)}
        for file in files.values():
            file.flush()
        meta['sha256'] = {name: sha256(file.name) for name, file in files.items() if name != 'meta.json'}
        files['meta.json'].write(json.dumps(meta, indent=1).encode())
    return meta


def load_dataset(path, block_size):
    """The Dataset in the folder `path`. UserError unless each file has the checksum that meta.json says and
    each split block_size + 1 tokens."""
    path = Path(path)
    try:
        meta = json.loads((path / 'meta.json').read_bytes())
        if meta['format'] != FORMAT:
            raise ValueError(f'it has format {meta["format"]}, this is format {FORMAT}')
        verify = os.environ.get('LOCAL_RANK', '0') == '0'  # once on each machine: it may take minutes
        for name in FILES - {'meta.json'}:
            if verify and sha256(path / name) != meta['sha256'][name]:
                raise ValueError(f'meta.json has another checksum of {name}')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'no dataset: {path} is missing or damaged ({error}); make it with prepare.py and '
                        f'--dataset={path.name}, in the folder that holds data/.') from None
    splits = []
    for split in ('train', 'val'):
        tokens = np.memmap(path / f'{split}.bin', np.dtype(meta['dtype']).newbyteorder('<'), 'r')
        if len(tokens) <= block_size:
            raise UserError(f'{path}/{split}.bin has {len(tokens)} tokens, too few for '
                            f'--block_size={block_size}: lower it or add text.')
        splits.append(Split(tokens, **np.load(path / f'{split}_docs.npz')))
    return Dataset(meta, json.loads((path / 'tokenizer.json').read_bytes()), *splits)


# --- The script. ---

def flags():
    parser = make_parser(__doc__)
    parser.add_argument('--input', nargs='+', action='extend', metavar='PATH', help='folders, whose '
                        'first-level subfolders are domains; text files; .jsonl with "text", "domain" '
                        '(default: built-in corpus)')
    add_flag(parser, 'dataset', '', 'folder in data/ to write; empty: builtin, or the first input\'s name')
    add_flag(parser, 'tokenizer', 'bpe', 'bpe, trained on the training text; byte; one of tiktoken\'s, '
             'such as gpt2, which it downloads; or a checkpoint or tokenizer.json, to use the same')
    add_flag(parser, 'vocab_size', 2048, 'tokens of bpe, <|endoftext|> included', low=257, below=10**6)
    add_flag(parser, 'order', 'similar', 'order of the training documents', choices=['similar', 'random'])
    add_flag(parser, 'n_neighbors', 32, 'neighbours that may follow a document', low=1)
    add_flag(parser, 'val_fraction', 0.05, 'share of each domain to hold out', low=1e-6, below=1)
    add_flag(parser, 'mb_per_domain', 5.0, 'MB of each domain of the built-in corpus', low=1e-6)
    add_flag(parser, 'seed', 1337, 'of the walk and the shuffle, not of what is held out')
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    if not args.dataset:
        first = Path(os.path.abspath(args.input[0])) if args.input else Path('builtin')
        args.dataset = first.stem if first.is_file() else first.name
    path = Path('data', args.dataset)
    if path.name != args.dataset or args.dataset == '..':
        raise UserError(f'--dataset={args.dataset} must be a plain name: it becomes a folder in data/.')
    if path.exists():
        report('note', f'what is in {path}/ now will be replaced')
    # A tokenizer that cannot be had should fail before the work. bpe is trained after it.
    tokenizer = None if args.tokenizer == 'bpe' else make_tokenizer(args.tokenizer)

    docs = read_inputs(args.input) if args.input else read_builtin(args.mb_per_domain)
    report('read', f'{len(docs):,} documents, {count_bytes(docs) / 1e6:.2f} MB')
    domains = sorted({doc.domain for doc in docs}, key=None if args.input else DOMAINS.index)
    if len(domains) > 256:
        raise UserError(f'the input has {len(domains)} domains, 256 is the most: use fewer labels, or one '
                        'folder in place of many files.')

    originals, copies = unique(docs)
    val, train = hold_out(originals, args.val_fraction)
    if not val:
        raise UserError(f'no domain has {4 * MIN_VAL} bytes, too little to hold out: give more UTF-8 text.')
    train, twins = near_duplicates(val, train)
    report('dropped', f'{len(copies):,} documents equal to others, {len(twins):,} near-duplicates')
    if len(copies + twins) > len(docs) / 2:
        dropped, twin = (copies + twins)[0]
        report('warning', f'that is more than half of the input: {dropped.source} counts as {twin.source}')
    if not train:
        raise UserError('nothing is left to train on: all text is held out or resembles what is held out.')
    for domain in domains:
        trained, held = (count_bytes(doc for doc in side if doc.domain == domain) for side in (train, val))
        why = ('not measured: too little text' if not held else
               'not trained: the rest resembles what is held out' if not trained else '')
        report(f'  {domain}', f'{trained:13,} bytes to train on {held:11,} held out  {why}'.rstrip())

    train, restarts, cosine = arrange(train, args.order, args.n_neighbors, [args.seed])
    report('order', f'{args.order}, {len(train):,} training documents, {restarts:,} restarts')
    report('adjacent cosine', f'{cosine[0]:.3f} in this order, {cosine[1]:.3f} in a random one')
    # Validation is the same for every --order, and goes domain by domain: each is measured on its own text.
    held_out, val = val, []
    for d, domain in enumerate(domains):
        mine = [doc for doc in held_out if doc.domain == domain]
        val += arrange(mine, 'similar', args.n_neighbors, [args.seed, d])[0]

    tokenizer = tokenizer or make_tokenizer('bpe', args.vocab_size, [doc.text for doc in train])
    meta = save_dataset(path, {'train': train, 'val': val}, tokenizer, {
        'domains': domains, 'arguments': vars(args), 'seed': args.seed,
        'versions': {name: metadata.version(name) for name in (*LIBRARIES, 'tiktoken', 'regex')}})
    report('tokenizer', f'{args.tokenizer}, {meta["vocab_size"]:,} tokens')
    for split in ('train', 'val'):
        n = meta[split]['tokens']
        report(f'{split}.bin', f'{n:,} tokens, {meta[split]["bytes"] / n:.2f} bytes a token')
    report(f'{path}/', 'is ready')


if __name__ == '__main__':
    run_script(main)
