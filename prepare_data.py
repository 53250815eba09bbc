"""Turn raw sources into training files. The first argument is the job, the rest are its typed settings.

    python prepare_data.py arxiv --input=papers.jsonl --out_dir=data/arxiv     # labelled documents, any source
    python prepare_data.py arxiv                            # the same from the hub (pip install datasets)
    python prepare_data.py ergodic                          # synthetic: hidden Markov components with exact oracles
    python prepare_data.py inspect data/arxiv/train.h5      # what is in a file, and what is wrong with it
    python prepare_data.py arxiv --help                     # the settings of a job

Files are written beside their final place and renamed at the end: what exists is complete. N chunks, n tokens of a
chunk, K components.
"""

import base64
import contextlib
import csv
import difflib
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from configurator import configure, fail


class DataError(ValueError):
    """A source or a data file cannot be used; the message says which, why and what to do."""


def optional(module: str, package: str):
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"this needs the package {package}: pip install {package}") from None


# ---------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------
# Contractions, words, numbers of up to three digits, punctuation, white space: pieces that no merge may cross.
PATTERN = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"""
           r"""\s+(?!\S)|\s+""")


class Tokenizer:
    """Text to token ids and back. Kinds: bpe (ours), gpt2, huggingface (somebody's tokenizer.json).

    bpe and gpt2 work on bytes, so any text survives encode and decode; a foreign file may have unknown tokens.
    """

    def __init__(self, kind: str, engine, spec: dict):
        self.kind, self.engine, self.spec = kind, engine, spec

    @property
    def vocab_size(self) -> int:
        return self.engine.get_vocab_size() if self.kind == "huggingface" else self.engine.n_vocab

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Ids of every text; special tokens in a text are read as plain text."""
        if self.kind == "huggingface":
            return [found.ids for found in self.engine.encode_batch(texts, add_special_tokens=False)]
        if threads == 1:  # a pool of one thread costs a third of the speed
            return [self.engine.encode_ordinary(text) for text in texts]
        return self.engine.encode_ordinary_batch(texts, num_threads=threads)

    def decode(self, ids: Iterable[int]) -> str:
        return self.engine.decode([int(i) for i in ids])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.spec, ensure_ascii=False) + "\n", encoding="utf-8")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding of vocab_size tokens, the 256 bytes among them (Sennrich et al. 2016), trained by rustbpe.

    Raises DataError if vocab_size is below 256 or more than the texts support.
    """
    if vocab_size < 256:
        raise DataError(f"vocab_size = {vocab_size}: a byte-level vocabulary has at least 256 tokens")
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size, pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    if len(ranks) < vocab_size:
        raise DataError(f"vocab_size = {vocab_size}, but the training text supports only {len(ranks)} tokens: "
                        "use fewer, or more text")
    return _bpe([bytes(token) for token, _ in ranks], PATTERN)


def _bpe(tokens: list[bytes], pattern: str) -> Tokenizer:
    if len(set(tokens)) != len(tokens) or not {bytes([b]) for b in range(256)} <= set(tokens):
        raise ValueError("its tokens repeat, or do not hold all 256 bytes")
    engine = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(tokens)},
                               special_tokens={})
    listed = [base64.b64encode(t).decode() for t in tokens]
    return Tokenizer("bpe", engine, {"kind": "bpe", "pattern": pattern, "tokens": listed})


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json (ours, or a Hugging Face one: pip install tokenizers), or gpt2."""
    try:
        if str(source) == "gpt2":
            return Tokenizer("gpt2", tiktoken.get_encoding("gpt2"), {"kind": "gpt2"})
        spec = json.loads(Path(source).read_text(encoding="utf-8"))
        if spec.get("kind") == "bpe":
            return _bpe([base64.b64decode(t, validate=True) for t in spec["tokens"]], spec["pattern"])
        if spec.get("kind") == "gpt2":
            return load_tokenizer("gpt2")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise DataError(f"cannot read the tokenizer {source}: {e}") from e
    if "model" not in spec:
        raise DataError(f"{source} is no tokenizer.json of this repository or of Hugging Face tokenizers")
    try:
        return Tokenizer("huggingface", optional("tokenizers", "tokenizers").Tokenizer.from_str(json.dumps(spec)), spec)
    except Exception as e:  # the library raises a bare Exception
        raise e if isinstance(e, DataError) else DataError(f"cannot read the tokenizer {source}: {e}") from e


# ---------------------------------------------------------------------------------------------------------------
# Sources of labelled documents
# ---------------------------------------------------------------------------------------------------------------
CCDV_LABELS = ("math.AC", "cs.CV", "cs.AI", "cs.SY", "math.GR", "cs.CE", "cs.PL", "cs.IT", "cs.DS", "cs.NE", "math.ST")
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev":
               "validation", "test": "test"}


@dataclass
class ArxivConfig:
    # input
    input: str = "ccdv/arxiv-classification"  # hub data set; .jsonl, .csv, .parquet; folder of these or CATEGORY/*.txt
    hub_config: str = "no_ref"  # configuration of the hub data set
    text_column: str = "text"
    label_column: str = ""  # default: category if there is such a column, else label
    split_column: str = "split"  # train, validation or test; where missing, documents are dealt by their text
    categories: list[str] = field(default_factory=lambda: ["cs.DS", "math.ST", "math.GR", "cs.IT", "cs.PL"])
    max_documents: int | None = None  # most documents of a category and split
    validation_fraction: float = 0.05  # of documents without a split
    test_fraction: float = 0.05
    # tokens
    tokenizer: str = "bpe"  # bpe: train one | gpt2 | path of a tokenizer.json
    vocab_size: int = 8_192  # of a trained tokenizer
    tokenizer_chars: int = 20_000_000  # most characters to train it on, the same number of each category
    chunk_size: int = 100  # tokens
    # output
    out_dir: str = "data/arxiv"
    # system
    seed: int = 1337  # deals documents to splits
    threads: int = 0  # of encoding; 0: one a core

    def check(self) -> list[str]:
        counts = ("tokenizer_chars", "max_documents")
        wrong = [f"{k} = {getattr(self, k)}: must be at least 1" for k in counts
                 if getattr(self, k) is not None and getattr(self, k) < 1]
        if self.chunk_size < 2:
            wrong.append(f"chunk_size = {self.chunk_size}: must be at least 2, a token to read and one to predict")
        if not 0 < self.validation_fraction < 1 or not 0 <= self.test_fraction < 1 - self.validation_fraction:
            wrong.append("validation_fraction and test_fraction must leave something to train on")
        if not self.categories or len(set(self.categories)) != len(self.categories):
            wrong.append(f"categories = {self.categories}: name at least one, and each once")
        return wrong


def read_records(cfg: ArxivConfig) -> Iterator[tuple[str, dict]]:
    """(where it stands, record) of every document of cfg.input."""
    path = Path(cfg.input)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".csv", ".parquet", ".txt"))
        if not files:
            raise DataError(f"{path} holds no .jsonl, .csv, .parquet or CATEGORY/*.txt files")
        for file in files:
            yield from read_file(file, cfg)
    elif path.exists():
        yield from read_file(path, cfg)
    elif re.fullmatch(r"[\w-]+/[\w.-]+", cfg.input) and path.suffix not in (".jsonl", ".csv", ".parquet", ".txt"):
        yield from read_hub(cfg)
    else:
        raise DataError(f"input = {cfg.input}: no such file, folder or hub data set")


def read_file(path: Path, cfg: ArxivConfig) -> Iterator[tuple[str, dict]]:
    try:
        if path.suffix == ".txt":
            yield str(path), {cfg.text_column: path.read_text(encoding="utf-8"), "category": path.parent.name}
        elif path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        record = json.loads(line)
                        if not isinstance(record, dict):
                            raise DataError(f"{path}, line {number}: expected an object, not {line.strip()[:40]!r}")
                        yield f"{path}, line {number}", record
        elif path.suffix == ".csv":
            csv.field_size_limit(2**31 - 1)
            with open(path, encoding="utf-8", newline="") as file:
                for number, record in enumerate(csv.DictReader(file), 2):
                    yield f"{path}, row {number}", record
        elif path.suffix == ".parquet":
            parquet = optional("pyarrow.parquet", "pyarrow")
            for batch in parquet.ParquetFile(path).iter_batches(1_000):
                for record in batch.to_pylist():
                    yield str(path), record
        else:
            raise DataError(f"{path}: use .jsonl, .csv, .parquet, or a folder of CATEGORY/*.txt")
    except DataError:
        raise
    except json.JSONDecodeError as e:
        raise DataError(f"{path}, line {number}: not JSON ({e.msg})") from e
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as e:
        raise DataError(f"cannot read {path}: {e}") from e
    except Exception as e:  # pyarrow's own errors for damaged files
        if type(e).__module__.startswith("pyarrow"):
            raise DataError(f"cannot read {path}: {e}") from e
        raise


def read_hub(cfg: ArxivConfig) -> Iterator[tuple[str, dict]]:
    """Records of a hub data set, streamed, with their split and the names of integer labels."""
    datasets = optional("datasets", "datasets")
    try:
        found = datasets.load_dataset(cfg.input, cfg.hub_config or None, streaming=True)
    except Exception as e:  # the library raises what its transports raise
        raise DataError(f"cannot read {cfg.input} from the hub ({type(e).__name__}: {e}); local files work too: "
                        "--input=FILE.jsonl") from e
    column = cfg.label_column or "label"
    for split, rows in found.items():
        names = getattr((rows.features or {}).get(column), "names", None) or []
        for number, record in enumerate(rows):
            label = record.get(column)
            if isinstance(label, int) and 0 <= label < len(names):
                record = {**record, column: names[label]}
            yield f"{cfg.input}, {split}, row {number}", {cfg.split_column: split, **record}


def document(where: str, record: dict, cfg: ArxivConfig) -> tuple[str, str, str]:
    """(split, category, text) of a record; raises DataError for a missing column or an unknown split."""
    column = cfg.label_column or ("category" if "category" in record else "label")
    for name in (cfg.text_column, column):
        if record.get(name) is None:
            raise DataError(f"{where}: no column {name!r}; there are {', '.join(map(str, record))}. Name it with "
                            f"{'text_column' if name == cfg.text_column else 'label_column'}=NAME")
    text, label = record[cfg.text_column], record[column]
    if not isinstance(text, str):
        raise DataError(f"{where}: column {cfg.text_column!r} holds {type(text).__name__}, not text")
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair is no character
    if isinstance(label, int) or (isinstance(label, str) and label.isdigit()):  # ccdv's numbers
        label = CCDV_LABELS[int(label)] if 0 <= int(label) < len(CCDV_LABELS) else str(label)
    split = record.get(cfg.split_column)
    if split in (None, ""):
        place = int.from_bytes(hashlib.blake2b(f"{cfg.seed} {text}".encode(), digest_size=8).digest()) / 2**64
        return ("test" if place < cfg.test_fraction else "validation"
                if place < cfg.test_fraction + cfg.validation_fraction else "train"), str(label), text
    if str(split) not in SPLIT_NAMES:
        raise DataError(f"{where}: split {split!r} is none of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[str(split)], str(label), text


class Spool:
    """Documents on disk by (split, category), so that none of it need fit in memory."""

    def __init__(self, folder: Path):
        self.folder, self.counts, self.chars, self.files = folder, Counter(), Counter(), {}

    def add(self, split: str, category: str, text: str) -> None:
        key = split, category
        if key not in self.files:
            self.files[key] = open(self.path(*key), "w", encoding="utf-8", errors="surrogatepass")
        self.files[key].write(json.dumps(text) + "\n")
        self.counts[key] += 1
        self.chars[key] += len(text)

    def path(self, split: str, category: str) -> Path:
        return self.folder / f"{split}-{base64.urlsafe_b64encode(category.encode()).decode()}.jsonl"

    def texts(self, split: str, category: str) -> Iterator[str]:
        if (split, category) in self.files:
            self.files[split, category].flush()
            with open(self.path(split, category), encoding="utf-8") as file:
                yield from map(json.loads, file)

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def gather(cfg: ArxivConfig, spool: Spool) -> None:
    """Sort all documents of the wanted categories into the spool; each text once, in the first split it has."""
    wanted, others, seen, dropped = set(cfg.categories), Counter(), set(), 0
    with contextlib.closing(read_records(cfg)) as records:
        for where, record in progress(records, "documents read", "doc"):
            split, category, text = document(where, record, cfg)
            if category not in wanted:
                others[category] += 1
                continue
            print_of = hashlib.blake2b(text.encode(), digest_size=8).digest()
            if print_of in seen or not text.strip():
                dropped += 1
            elif cfg.max_documents is None or spool.counts[split, category] < cfg.max_documents:
                seen.add(print_of)
                spool.add(split, category, text)
    for category in cfg.categories:
        if not spool.counts["train", category]:
            known = sorted(others) + sorted({c for _, c in spool.counts})
            near = difflib.get_close_matches(category, known, n=1)
            raise DataError(f"{cfg.input} has no training document of category {category!r}"
                            + (f", did you mean {near[0]!r}?" if near else "")
                            + f" It has: {', '.join(known) or 'none'}")
    print(f"documents: {sum(spool.counts.values()):,} of {len(wanted)} categories; dropped {dropped:,} empty or "
          f"repeated, {sum(others.values()):,} of other categories")


def progress(things: Iterable, text: str, unit: str, total: int | None = None) -> Iterable:
    return tqdm(things, desc=text, unit=unit, total=total, disable=not sys.stderr.isatty(), leave=False)


def balanced_sample(spool: Spool, categories: list[str], most: int) -> Iterator[str]:
    """Training texts, as many characters of each category as the smallest has (and at most most / K)."""
    each = min(min(spool.chars["train", c] for c in categories), most // len(categories))
    for category in categories:
        left = max(1, each)
        for text in spool.texts("train", category):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


# ---------------------------------------------------------------------------------------------------------------
# Files of token chunks
# ---------------------------------------------------------------------------------------------------------------
class ChunkSpool:
    """Token chunks on disk, category after category, until their number is known; then an HDF5 file.

    The file has token_chunks [N, n] in one contiguous block (which can be mapped into memory), category_for_chunk [N]
    (names) and its codes category_code [N], doc_idx_for_chunk [N], and the attributes of the source.
    """

    BLOCK = 1 << 16  # chunks copied at once

    def __init__(self, folder: Path, name: str, chunk_size: int, vocab_size: int):
        self.dtype = np.min_scalar_type(vocab_size - 1)
        self.tokens, self.documents = open(folder / f"{name}.tokens", "w+b"), open(folder / f"{name}.documents", "w+b")
        self.chunk_size, self.vocab_size = chunk_size, vocab_size
        self.document, self.sizes, self.dropped = 0, Counter(), 0

    def add(self, category: str, ids: list[int] | np.ndarray) -> None:
        """Cut a document into chunks; the tail that fills none is dropped and counted."""
        count = len(ids) // self.chunk_size
        array = np.asarray(ids[: count * self.chunk_size], dtype=np.int64)
        if len(array) and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise DataError(f"a document of {category} has the token {array.max()}, but vocab_size = {self.vocab_size}")
        array.astype(self.dtype).tofile(self.tokens)
        np.full(count, self.document, dtype=np.int64).tofile(self.documents)
        self.dropped += len(ids) - count * self.chunk_size
        self.sizes[category] += count
        self.document += 1

    def write(self, path: Path, **attributes) -> None:
        """The HDF5 file; raises DataError if a category has no chunk."""
        for category, count in self.sizes.items():
            if not count:
                raise DataError(f"category {category!r} has no document of {self.chunk_size} tokens for {path.name}: "
                                "use a smaller chunk_size, more documents or fewer categories")
        names, N = list(self.sizes), sum(self.sizes.values())
        codes = np.repeat(np.arange(len(names)), [self.sizes[c] for c in names]).astype(np.uint16)
        with h5py.File(path, "w") as file:
            tokens = file.create_dataset("token_chunks", (N, self.chunk_size), dtype=self.dtype)
            documents = file.create_dataset("doc_idx_for_chunk", (N,), dtype=np.int64)
            encoded = np.array([c.encode() for c in names])  # of fixed length: a row costs no pointer
            labels = file.create_dataset("category_for_chunk", (N,), dtype=encoded.dtype)
            self.tokens.seek(0)
            self.documents.seek(0)
            for begin in range(0, N, self.BLOCK):
                rows = slice(begin, min(begin + self.BLOCK, N))
                size = rows.stop - rows.start
                tokens[rows] = np.fromfile(self.tokens, self.dtype, size * self.chunk_size).reshape(size, -1)
                documents[rows] = np.fromfile(self.documents, np.int64, size)
                labels[rows] = encoded[codes[rows]]
            file["category_code"] = codes
            file["category_code"].attrs["names"] = names
            file.attrs.update({
                "token_chunk_size": self.chunk_size, "selected_categories_in_file": names,
                "reference_chunk_budget_smallest_top_category": min(self.sizes.values()),
                "vocab_size": self.vocab_size, **attributes})

    def close(self) -> None:
        self.tokens.close()
        self.documents.close()


class Workshop:
    """A folder beside the final one; `finish` renames its files into place, leaving early removes it."""

    def __init__(self, out_dir: str):
        self.target = Path(out_dir)
        self.folder = self.target / f".saving-{os.getpid()}"

    def __enter__(self) -> "Workshop":
        try:
            self.folder.mkdir(parents=True)
        except OSError as e:
            raise DataError(f"out_dir = {self.target} cannot be made ({e.strerror}): use another folder") from e
        return self

    def finish(self, *names: str) -> None:
        """Put the files into place; what an earlier preparation left of the same set goes."""
        for name in {"tokenizer.json", *(f"{split}.h5" for split in SPLITS)} - set(names):
            (self.target / name).unlink(missing_ok=True)
        for name in names:
            os.replace(self.folder / name, self.target / name)

    def __exit__(self, kind, error, trace) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if kind and not any(self.target.iterdir()):
            self.target.rmdir()


def encode(spool: Spool, split: str, category: str, tokenizer: Tokenizer, threads: int, chunks: ChunkSpool) -> None:
    """Add the chunks of all documents of a category, 512 documents at a time."""
    with progress(None, f"{split} {category}", "doc", spool.counts[split, category]) as bar, \
            contextlib.closing(spool.texts(split, category)) as rest:
        while texts := list(islice(rest, 512)):
            for ids in tokenizer.encode_batch(texts, threads):
                chunks.add(category, ids)
            bar.update(len(texts))


def arxiv(cfg: ArxivConfig) -> dict:
    """Documents -> tokenizer.json, train.h5, validation.h5, test.h5. Returns chunks by split and category."""
    threads = cfg.threads or os.cpu_count() or 1
    tokenizer = None if cfg.tokenizer == "bpe" else load_tokenizer(cfg.tokenizer)
    with Workshop(cfg.out_dir) as shop, contextlib.closing(Spool(shop.folder)) as spool:
        gather(cfg, spool)
        if tokenizer is None:
            sample = balanced_sample(spool, cfg.categories, cfg.tokenizer_chars)
            tokenizer = train_bpe(progress(sample, "training the tokenizer", "doc"), cfg.vocab_size)
        tokenizer.save(shop.folder / "tokenizer.json")
        done, names = {}, ["tokenizer.json"]
        for split in SPLITS:
            present = [c for c in cfg.categories if spool.counts[split, c]]
            if not present:
                continue
            if missing := sorted(set(cfg.categories) - set(present)):
                raise DataError(f"{cfg.input}, {split}: no document of {', '.join(missing)}; use more documents")
            with contextlib.closing(ChunkSpool(shop.folder, split, cfg.chunk_size, tokenizer.vocab_size)) as chunks:
                for category in cfg.categories:
                    encode(spool, split, category, tokenizer, threads, chunks)
                chunks.write(shop.folder / f"{split}.h5", tokenizer="tokenizer.json", source=cfg.input, seed=cfg.seed)
            done[split], names = dict(chunks.sizes), [*names, f"{split}.h5"]
            sizes = ", ".join(f"{c} {n:,}" for c, n in chunks.sizes.items())
            print(f"{split}: {sum(chunks.sizes.values()):,} chunks of {cfg.chunk_size} tokens ({sizes}); "
                  f"{chunks.dropped:,} tail tokens dropped")
        if "train" not in done or "validation" not in done:
            raise DataError(f"{cfg.input} leaves no validation documents: raise validation_fraction or add documents")
        shop.finish(*names)
    print(f"vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind}); written to {cfg.out_dir}")
    return done


# ---------------------------------------------------------------------------------------------------------------
# Synthetic documents with exact oracles
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class ErgodicConfig:
    # components
    components: list[dict] = field(default_factory=lambda: [
        {"name": "sticky", "process": "mess3", "x": 0.05, "a": 0.85, "vocab_map": [0, 1, 2]},
        {"name": "restless", "process": "mess3", "x": 0.2, "a": 0.9, "vocab_map": [0, 1, 2]},
        {"name": "shifted", "process": "mess3", "x": 0.05, "a": 0.85, "vocab_map": [1, 2, 3]},
        {"name": "golden", "process": "no_consecutive_ones", "p": 0.5, "vocab_map": [0, 3]},
    ])  # hidden Markov processes of train_ghmm.py, with their tokens
    # documents
    train_documents: int = 10_000  # of each component
    validation_documents: int = 1_000
    test_documents: int = 0
    chunks_per_document: int = 2
    chunk_size: int = 100  # tokens
    # output
    out_dir: str = "data/ergodic"
    # system
    seed: int = 1337

    def check(self) -> list[str]:
        counts = ("train_documents", "validation_documents", "chunks_per_document", "chunk_size")
        wrong = [f"{k} = {getattr(self, k)}: must be at least 1" for k in counts if getattr(self, k) < 1]
        return wrong + ([f"test_documents = {self.test_documents}: must not be negative"] * (self.test_documents < 0))


def ergodic_components(components: list[dict]) -> tuple[list[str], list]:
    """Names and processes of train_ghmm, all over the same vocabulary; raises DataError for what cannot be."""
    import train_ghmm

    names, parts = [], []
    for i, component in enumerate(components):
        if not isinstance(component, dict):
            raise DataError(f"components[{i}] = {component!r}: expected {{'process': NAME, ...}}")
        if odd := {"initial_state", "add_bos"} & component.keys():
            raise DataError(f"components[{i}]: chunks begin anywhere in a document, so {odd.pop()} cannot be set")
        names.append(str(component.get("name", f"{component.get('process')}-{i}")))
        parts.append({k: v for k, v in component.items() if k not in ("name", "weight")})
    if len(set(names)) != len(names) or not names:
        raise DataError(f"components are named {names}: name at least one, and each differently")
    try:
        found = [train_ghmm.make_process("nonergodic", components=[part]) for part in parts]
    except train_ghmm.ProcessError as e:
        raise DataError(str(e)) from e
    top = max(process.vocab_size for process in found)

    def widen(p):
        T = torch.nn.functional.pad(p.transition_matrices, (0, 0, 0, 0, 0, top - p.vocab_size))  # tokens it never emits
        return train_ghmm.Process(T, p.initial_state, p.normalizing_eigenvector, p.stationary_state, p.name)

    return names, list(map(widen, found))


def oracle_xe(log_prob: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cross entropy by position of the exact predictors: (of the uniform mixture, of the known component), [K, n] each.

    The mixture predicts p(x_t | x_<t) = sum_k w_k p_k(x_t | x_<t) with w_k the posterior of component k given x_<t.

    Args:
        log_prob: log p_k(x_t | x_<t) in nats, [N, K, n]. owner: the true component [N].
    """
    mixture = mixture_log_prob(log_prob)
    known = np.take_along_axis(log_prob, owner[:, None, None], 1)[:, 0]
    return tuple(np.stack([-x[owner == k].mean(0) for k in range(log_prob.shape[1])]) for x in (mixture, known))


def mixture_log_prob(log_prob: np.ndarray) -> np.ndarray:
    """log p(x_t | x_<t) under the uniform mixture, [N, n], from log p_k(x_t | x_<t) [N, K, n]."""
    total = np.logaddexp.reduce(np.cumsum(log_prob, -1, dtype=np.float64), axis=1)  # log sum_k p_k(x_1 .. x_t)
    return np.diff(total, axis=-1, prepend=np.log(log_prob.shape[1]))


def draw(process, cfg: ErgodicConfig, count: int, counter: tuple, text: str) -> Iterator[torch.Tensor]:
    """count documents of a component, a thousand at a time, a pure function of (seed, counter)."""
    state = np.random.SeedSequence(cfg.seed, spawn_key=counter).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
    for begin in progress(range(0, count, 1_000), text, "kdoc"):
        yield process.sample(min(1_000, count - begin), cfg.chunks_per_document * cfg.chunk_size, generator)


def ergodic(cfg: ErgodicConfig) -> dict:
    """Documents of K components in the layout of `arxiv`, with the oracles of every chunk of validation and test.

    Each document is one sequence of its component. Oracles read a chunk from its first token on, as a model does:
    oracle_log_prob [N, K, n] is log p_k(x_t | x_<t), from which the optimum of any subset of components follows;
    oracle_xe_mixture and oracle_xe_component [K, n] are its averages for all components together.
    """
    names, processes = ergodic_components(cfg.components)
    n, vocab_size = cfg.chunk_size, processes[0].vocab_size
    done = {}
    with Workshop(cfg.out_dir) as shop:
        for s, split in enumerate(SPLITS):
            count = getattr(cfg, f"{split}_documents")
            if not count:
                continue
            log_prob, rows = [], []
            with contextlib.closing(ChunkSpool(shop.folder, split, n, vocab_size)) as chunks:
                for k, (name, process) in enumerate(zip(names, processes, strict=True)):
                    for documents in draw(process, cfg, count, (s, k), f"{split} {name}"):
                        for ids in documents.numpy():
                            chunks.add(name, ids)
                        if split != "train":
                            cut = documents.reshape(-1, n)
                            log_prob.append(torch.stack([p.log_prob(cut) for p in processes], 1).numpy())
                            rows += [k] * len(cut)
                chunks.write(shop.folder / f"{split}.h5", tokenizer="", source="ergodic", seed=cfg.seed,
                             components=json.dumps(cfg.components))
            if log_prob:
                log_prob, rows = np.concatenate(log_prob), np.array(rows)
                mixture, known = oracle_xe(log_prob, rows)
                with h5py.File(shop.folder / f"{split}.h5", "a") as file:
                    file["oracle_log_prob"] = log_prob.astype(np.float32)
                    file["oracle_xe_mixture"], file["oracle_xe_component"] = mixture, known
            done[split] = dict(chunks.sizes)
        shop.finish(*(f"{split}.h5" for split in done))
    print(f"{len(names)} components over {vocab_size} tokens: " + ", ".join(
        f"{split} {sum(sizes.values()):,} chunks" for split, sizes in done.items()) + f"; written to {cfg.out_dir}")
    return done


# ---------------------------------------------------------------------------------------------------------------
# Inspection
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class InspectConfig:
    tokens: int = 20  # most frequent tokens to show

    def check(self) -> list[str]:
        return [f"tokens = {self.tokens}: must be at least 1"] if self.tokens < 1 else []


def open_chunks(path: str | Path) -> tuple[h5py.File, list[str], np.ndarray]:
    """(file, category names, category code of every chunk) of an HDF5 file of this layout or of the source's.

    Raises DataError for a file that is missing, truncated or foreign, or lacks a dataset.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as e:
        reason = "no such file" if not Path(path).exists() else "damaged or no HDF5 file"
        raise DataError(f"{path}: {reason}; make it with python prepare_data.py arxiv or ergodic") from e
    for name, ndim in (("token_chunks", 2), ("category_for_chunk", 1), ("doc_idx_for_chunk", 1)):
        if name not in file or file[name].ndim != ndim:
            raise DataError(f"{path} has no dataset {name!r} of {ndim} dimensions; it has {', '.join(file) or 'none'}")
    N = file["token_chunks"].shape[0]
    if not N or any(len(file[name]) != N for name in ("category_for_chunk", "doc_idx_for_chunk")):
        raise DataError(f"{path}: token_chunks, category_for_chunk and doc_idx_for_chunk must have one length, above 0")
    if file["token_chunks"].dtype.kind not in "ui":
        raise DataError(f"{path}: token_chunks holds {file['token_chunks'].dtype}, not whole numbers")
    if "category_code" in file and "names" in file["category_code"].attrs:
        return file, [str(n) for n in file["category_code"].attrs["names"]], file["category_code"][:]
    if h5py.check_string_dtype(file["category_for_chunk"].dtype) is None:
        raise DataError(f"{path}: category_for_chunk holds {file['category_for_chunk'].dtype}, not names")
    labels = file["category_for_chunk"].asstr("utf-8")[:].astype(str)
    names, first, codes = np.unique(labels, return_index=True, return_inverse=True)
    order = first.argsort()  # as they come in the file
    return file, names[order].tolist(), order.argsort()[codes].astype(np.uint16)


def map_tokens(file: h5py.File) -> np.ndarray:
    """token_chunks [N, n] as a memory map, so that rows of a file of any size can be gathered at random.

    A file whose chunks are compressed or scattered (the source's may be) is first copied to an unnamed temporary file.
    """
    tokens = file["token_chunks"]
    if tokens.chunks is None and tokens.id.get_offset() is not None and tokens.dtype.isnative:
        return np.memmap(file.filename, tokens.dtype, "r", tokens.id.get_offset(), tokens.shape)
    with tempfile.TemporaryFile() as copy:
        mapped = np.memmap(copy, tokens.dtype.newbyteorder("="), "w+", shape=tokens.shape)
        for begin in range(0, len(tokens), 1 << 16):
            mapped[begin : begin + (1 << 16)] = tokens[begin : begin + (1 << 16)]
        return mapped


def hashes(tokens: h5py.Dataset, block: int = 1 << 16) -> np.ndarray:
    """A 64-bit hash of every chunk [N]."""
    odd = np.random.default_rng(0).integers(2**63, size=tokens.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    parts = []
    for begin in range(0, len(tokens), block):
        rows = tokens[begin : begin + block].astype(np.uint64) + np.uint64(1)
        mixed = (rows * odd) ^ ((rows * odd) >> np.uint64(29))
        parts.append((mixed * odd[::-1]).sum(1, dtype=np.uint64))
    return np.concatenate(parts)


def inspect(path: str, cfg: InspectConfig) -> dict:
    """Print what an HDF5 file holds; returns it with the list of problems found."""
    file, names, codes = open_chunks(path)
    with file:
        tokens, documents = file["token_chunks"], file["doc_idx_for_chunk"][:]
        N, n = tokens.shape
        vocab_size = int(file.attrs.get("vocab_size", 0))
        counts, negative = np.zeros(max(vocab_size, 1), dtype=np.int64), 0
        for begin in range(0, N, 1 << 16):
            block = tokens[begin : begin + (1 << 16)].ravel().astype(np.int64)
            negative += int((block < 0).sum())
            found = np.bincount(block[block >= 0])
            if len(found) > len(counts):
                counts = np.pad(counts, (0, len(found) - len(counts)))
            counts[: len(found)] += found
        problems, prints = [], hashes(tokens)
        if not vocab_size:
            problems.append("no attribute vocab_size: ranges cannot be checked")
        elif len(counts) > vocab_size:
            problems.append(f"{counts[vocab_size:].sum():,} tokens are beyond vocab_size = {vocab_size}")
        if negative:
            problems.append(f"{negative:,} tokens are negative")
        if repeated := N - len(np.unique(prints)):
            problems.append(f"{repeated:,} chunks repeat an earlier one")
        for other in sorted(Path(path).parent.glob("*.h5")):
            if other.resolve() != Path(path).resolve():
                second, _, _ = open_chunks(other)
                with second:
                    if second["token_chunks"].shape[1] == n and (
                            shared := int(np.isin(prints, hashes(second["token_chunks"])).sum())):
                        problems.append(f"{shared:,} chunks are in {other.name} too: the splits leak")
        rows = [(name, int((codes == k).sum()), len(np.unique(documents[codes == k]))) for k, name in enumerate(names)]
        print(f"{path}: {N:,} chunks of {n} tokens, {N * n:,} tokens, vocabulary {vocab_size or 'unknown'}")
        for name, size, docs in rows:
            print(f"  {name:<16} {size:>10,} chunks {size * n:>12,} tokens {docs:>9,} documents")
        speller = Path(path).parent / (str(file.attrs.get("tokenizer", "")) or "none")
        spelled = load_tokenizer(speller) if speller.exists() else None
        top = counts.argsort()[::-1][: cfg.tokens]
        words = [f"{spelled.decode([t])!r}" if spelled and t < spelled.vocab_size else str(t) for t in top if counts[t]]
        print(f"  most frequent: {', '.join(words)} (the first is {counts.max() / N / n:.1%} of all)")
    for problem in problems:
        print(f"  problem: {problem}")
    print("  no problem found" if not problems else f"  {len(problems)} problems")
    return {"chunks": {name: size for name, size, _ in rows}, "documents": {name: docs for name, _, docs in rows},
            "problems": problems}


# ---------------------------------------------------------------------------------------------------------------
JOBS = {"arxiv": (ArxivConfig, arxiv), "ergodic": (ErgodicConfig, ergodic), "inspect": (InspectConfig, inspect)}


def main(argv: list[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if argv else 2)
    if argv[0] not in JOBS:
        near = difflib.get_close_matches(argv[0], JOBS, n=1)
        fail(f"no job {argv[0]!r}" + (f", did you mean {near[0]!r}?" if near else "") + f" Jobs: {', '.join(JOBS)}")
    settings, work = JOBS[argv[0]]
    positional = list(islice((a for a in argv[1:] if not a.startswith("-")), 1)) if argv[0] == "inspect" else []
    if argv[0] == "inspect" and not positional and "--help" not in argv and "-h" not in argv:
        fail("inspect needs a file: python prepare_data.py inspect data/arxiv/train.h5")
    cfg = configure(settings, [a for a in argv[1:] if a not in positional])
    try:
        return work(*positional, cfg)
    except DataError as e:
        fail(str(e))


if __name__ == "__main__":
    main()
