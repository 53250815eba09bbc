"""Turn raw sources into training files. The first argument is the job, the rest are its typed settings.

    python prepare_data.py text                             # plain text: the documentation in Python itself
    python prepare_data.py text --input=tinystories         # the same from the hub, or --input=FILE or FOLDER
    python prepare_data.py planted                          # synthetic: documents of known plans, with exact oracle
    python prepare_data.py arxiv --input=papers.jsonl --out_dir=data/arxiv     # labelled documents, any source
    python prepare_data.py arxiv                            # the same from the hub (pip install datasets)
    python prepare_data.py ergodic                          # synthetic: hidden Markov components with exact oracles
    python prepare_data.py state                            # synthetic: cell populations of known perturbation effects
    python prepare_data.py state preprocess --input=counts.h5ad     # counts of cells to log1p and X_hvg
    python prepare_data.py inspect data/arxiv/train.h5      # what is in a file, and what is wrong with it
    python prepare_data.py arxiv --help                     # the settings of a job

Files are written beside their final place and renamed at the end: what exists is complete. N chunks, n tokens of a
chunk, K components; in `planted` N documents of D tokens, K plans, S states, V tokens, chunks of C tokens.
"""

import ast
import base64
import contextlib
import csv
import difflib
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from configurator import configure, fail


class DataError(ValueError):
    """A source or a data file cannot be used; the message says which, why and what to do."""


def counter_rng(seed: int, *counters: int) -> np.random.Generator:
    """A generator that is a pure function of a seed and of counters such as the epoch: neighbours are unrelated."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=counters))


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
SPECIAL = ("bos", "eos", "unk", "pad")
ESCAPED = re.compile("([\udc80-\udcff])")  # a byte that is no UTF-8, as Python's surrogateescape writes it
HALVES = re.compile("([\ud800-\ud80f])([\ud800-\ud80f])?")  # half bytes, while Characters decodes


class Characters:
    """A vocabulary of characters, with those methods of tiktoken.Encoding that Tokenizer uses.

    Ids: bos, eos, unk, pad, then 16 half bytes, then the characters. A character that is not among them, or a byte
    that is no UTF-8, is spelled in half bytes, so that nothing is unknown: unk is for models that must have one.
    """

    class Spelling(dict):
        def __missing__(self, character: str) -> list[int]:
            halves = character.encode("utf-8", "surrogateescape").hex()
            return self.setdefault(character, [len(SPECIAL) + int(half, 16) for half in halves])

    def __init__(self, characters: str):
        self.texts = ["", "", "\ufffd", "", *map(chr, range(0xD800, 0xD810)), *characters]
        self.n_vocab, first = len(self.texts), len(self.texts) - len(characters)
        self.spelling = self.Spelling({c: [i] for i, c in enumerate(characters, first)})

    def encode_ordinary(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self.spelling.__getitem__, text)))

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The text of ids; for unk, and for a half byte without the other half, U+FFFD."""
        def byte(found: re.Match) -> str:
            value = 16 * (ord(found[1]) & 15) + (ord(found[2] or found[1]) & 15)
            return "\ufffd" if not found[2] else chr(value if value < 0x80 else 0xDC00 + value)

        return HALVES.sub(byte, "".join([self.texts[i] for i in ids])).encode("utf-8", "surrogateescape")


class Tokenizer:
    """Text to token ids and back. Kinds: char and bpe (ours), gpt2, huggingface (somebody's tokenizer.json).

    All but the foreign files lose nothing: decode(encode(text)) is the text and decode_bytes(encode(data)) the data,
    in lower case if the spec says "lowercase". `special` is {name: id}, of those of SPECIAL that there are.
    """

    def __init__(self, kind: str, engine, spec: dict, special: dict[str, int] | None = None):
        self.kind, self.engine, self.spec, self.special = kind, engine, spec, special or {}

    @property
    def vocab_size(self) -> int:
        return self.engine.get_vocab_size() if self.kind == "huggingface" else self.engine.n_vocab

    def hash(self) -> str:
        """The same for the same tokenizer only: sha256 of what its file says."""
        return hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str | bytes) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str | bytes], threads: int = 1) -> list[list[int]]:
        """Ids of every text; special tokens in a text are read as plain text."""
        texts = [readable(text) for text in texts]
        if self.spec.get("lowercase"):
            texts = [text.lower() for text in texts]
        if self.kind == "huggingface":
            texts = [ESCAPED.sub("\ufffd", text) for text in texts]
            return [found.ids for found in self.engine.encode_batch(texts, add_special_tokens=False)]
        if self.kind == "char":
            return [self.engine.encode_ordinary(text) for text in texts]
        if threads == 1 or not all(map(is_unicode, texts)):  # a pool of one thread costs a third of the speed
            return [self._encode(text) for text in texts]
        return self.engine.encode_ordinary_batch(texts, num_threads=threads)

    def _encode(self, text: str) -> list[int]:
        if is_unicode(text):
            return self.engine.encode_ordinary(text)
        return [i for part in ESCAPED.split(text) for i in (
            [self.engine.encode_single_token(part.encode("utf-8", "surrogateescape"))] if ESCAPED.match(part)
            else self.engine.encode_ordinary(part))]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; bos, eos and pad are none."""
        silent = {self.special[name] for name in ("bos", "eos", "pad") if name in self.special}
        ids = [int(i) for i in ids if int(i) not in silent]
        return self.engine.decode(ids).encode() if self.kind == "huggingface" else self.engine.decode_bytes(ids)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.spec, ensure_ascii=False) + "\n", encoding="utf-8")


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(text: str | bytes) -> str:
    """Text in which bytes that are no UTF-8 stand escaped; half a surrogate pair, which is no character, is U+FFFD."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "surrogateescape")
    return text if is_unicode(text) else re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)


def train_bpe(texts: Iterable[str], vocab_size: int, **more) -> Tokenizer:
    """Byte-pair encoding of vocab_size tokens, the 256 bytes among them (Sennrich et al. 2016), trained by rustbpe.

    more: special=[NAME, ...], which are the last of the vocab_size tokens, and lowercase=True.
    Raises DataError if vocab_size is below 256 and the special tokens, or more than the texts support.
    """
    merged = vocab_size - len(more.get("special", ()))
    if merged < 256:
        raise DataError(f"vocab_size = {vocab_size}: a byte-level vocabulary has at least 256 tokens"
                        + f" and {vocab_size - merged} special ones" * (merged < vocab_size))
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), merged, pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    if len(ranks) < merged:
        raise DataError(f"vocab_size = {vocab_size}, but the training text supports only "
                        f"{len(ranks) + vocab_size - merged} tokens: use fewer, or more text")
    listed = [base64.b64encode(bytes(token)).decode() for token, _ in ranks]
    return make_tokenizer({"kind": "bpe", "pattern": PATTERN, "tokens": listed, **more})


def train_char(texts: Iterable[str], vocab_size: int | None, min_frequency: int, **more) -> Tokenizer:
    """The characters that occur min_frequency times, most frequent first, at most vocab_size tokens in all."""
    counts = Counter()
    for text in texts:
        counts.update(text)
    most = None if vocab_size is None else vocab_size - len(SPECIAL) - 16
    kept = sorted((c for c in counts if counts[c] >= min_frequency), key=lambda c: (-counts[c], c))[:most]
    return make_tokenizer({"kind": "char", "characters": "".join(kept), **more})


def make_tokenizer(spec: dict) -> Tokenizer:
    """A tokenizer of ours from what its file says; raises ValueError, KeyError or TypeError for a damaged spec."""
    if spec["kind"] == "gpt2":
        engine = tiktoken.get_encoding("gpt2")
        return Tokenizer("gpt2", engine, spec, dict.fromkeys(("bos", "eos", "pad"), engine.eot_token))
    if spec["kind"] == "char":
        if len(set(spec["characters"])) < len(spec["characters"]) or not is_unicode(spec["characters"]):
            raise ValueError("its characters repeat, or are none")
        return Tokenizer("char", Characters(spec["characters"]), spec, {name: i for i, name in enumerate(SPECIAL)})
    tokens = [base64.b64decode(t, validate=True) for t in spec["tokens"]]
    if len(set(tokens)) != len(tokens) or not {bytes([b]) for b in range(256)} <= set(tokens):
        raise ValueError("its tokens repeat, or do not hold all 256 bytes")
    special = {name: i for i, name in enumerate(spec.get("special", ()), len(tokens))}
    if len(special) < len(spec.get("special", ())) or not special.keys() <= set(SPECIAL):
        raise ValueError(f"its special tokens are not of {', '.join(SPECIAL)}, each once")
    spelled = {"\ufffd" if name == "unk" else f"<{name}>": i for name, i in special.items()}
    engine = tiktoken.Encoding("bpe", pat_str=spec["pattern"], mergeable_ranks={t: i for i, t in enumerate(tokens)},
                               special_tokens=spelled)
    return Tokenizer("bpe", engine, spec, special)


FOREIGN = {"bos": ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]"), "unk": ("<unk>", "[UNK]"), "pad": ("<pad>", "[PAD]"),
           "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[SEP]")}  # names in Hugging Face's files


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json (ours, or a Hugging Face one: pip install tokenizers), or gpt2."""
    spec = {"kind": "gpt2"} if str(source) == "gpt2" else None
    try:
        spec = spec or json.loads(Path(source).read_text(encoding="utf-8"))
        if spec.get("kind") in ("char", "bpe", "gpt2"):
            return make_tokenizer(spec)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        if isinstance(spec, dict) and spec.get("kind") == "gpt2":
            raise DataError(f"tiktoken cannot fetch the vocabulary of gpt2 ({type(e).__name__}): go online once, or "
                            "set TIKTOKEN_CACHE_DIR to a folder that has it") from e
        raise DataError(f"cannot read the tokenizer {source}: {e}") from e
    if "model" not in spec:
        raise DataError(f"{source} is no tokenizer.json of this repository or of Hugging Face tokenizers")
    try:
        engine = optional("tokenizers", "tokenizers").Tokenizer.from_str(json.dumps(spec))
        engine.encode_special_tokens = True  # those in a text are plain text
        added = {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
    except Exception as e:  # the library raises a bare Exception
        raise e if isinstance(e, DataError) else DataError(f"cannot read the tokenizer {source}: {e}") from e
    special = {name: added[s] for name, spelled in FOREIGN.items() for s in reversed(spelled) if s in added}
    return Tokenizer("huggingface", engine, spec, special)


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
            yield from read_file(file, cfg.text_column, whole)
    elif path.exists():
        yield from read_file(path, cfg.text_column, whole)
    elif re.fullmatch(r"[\w-]+/[\w.-]+", cfg.input) and path.suffix not in (".jsonl", ".csv", ".parquet", ".txt"):
        yield from read_hub(cfg)
    else:
        raise DataError(f"input = {cfg.input}: no such file, folder or hub data set")


def read_file(path: Path, column: str, texts: Callable[[Path], Iterable[str | bytes]]) -> Iterator[tuple[str, dict]]:
    """(where it stands, record) of a file; `texts` cuts a .txt file. A .json is read whole, the others as a stream."""
    where = str(path)
    try:
        if path.suffix == ".txt":
            for text in texts(path):
                yield where, {column: text, "category": path.parent.name}
        elif path.suffix == ".json":
            for number, value in enumerate(list_in(json.loads(path.read_text(encoding="utf-8")), where), 1):
                yield f"{path}, item {number}", record_of(value, f"{path}, item {number}", column)
        elif path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    where = f"{path}, line {number}"
                    if line.strip():
                        yield where, record_of(json.loads(line), where, column)
        elif path.suffix == ".csv":
            csv.field_size_limit(2**31 - 1)
            with open(path, encoding="utf-8", newline="") as file:
                for number, record in enumerate(csv.DictReader(file), 2):
                    yield f"{path}, row {number}", record
        elif path.suffix == ".parquet":
            parquet = optional("pyarrow.parquet", "pyarrow")
            for batch in parquet.ParquetFile(path).iter_batches(1_000):
                for record in batch.to_pylist():
                    yield where, record
        else:
            raise DataError(f"{path}: use .txt, .json, .jsonl, .csv or .parquet, or a folder of such files")
    except DataError:
        raise
    except json.JSONDecodeError as e:
        raise DataError(f"{where}: not JSON ({e.msg})") from e
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as e:
        raise DataError(f"cannot read {path}: {e}") from e
    except Exception as e:  # pyarrow's own errors for damaged files
        if type(e).__module__.startswith("pyarrow"):
            raise DataError(f"cannot read {path}: {e}") from e
        raise


def list_in(value, where: str) -> list:
    """The list that a .json file is, or the only one in its object."""
    lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else [value]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise DataError(f"{where}: expected a list of documents, or an object with one list, not "
                        + (f"keys {', '.join(value)}" if isinstance(value, dict) else type(value).__name__))
    return lists[0]


def record_of(value, where: str, column: str) -> dict:
    if not isinstance(value, dict | str):
        raise DataError(f"{where}: expected an object or a text, not {json.dumps(value)[:40]!r}")
    return {column: value} if isinstance(value, str) else value


def whole(path: Path) -> Iterator[str]:
    yield path.read_text(encoding="utf-8")


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as e:  # the library raises what its transports raise
        raise DataError(f"cannot read {name} from the hub ({type(e).__name__}: {e}); local files work too: "
                        "--input=FILE.jsonl") from e


def open_hub(name: str, config: str) -> dict:
    """{split: rows}, streamed."""
    datasets = optional("datasets", "datasets")
    with hub_errors(name):
        return datasets.load_dataset(name, config or None, streaming=True)


def read_hub(cfg: ArxivConfig) -> Iterator[tuple[str, dict]]:
    """Records of a hub data set with their split and the names of integer labels."""
    column = cfg.label_column or "label"
    for split, rows in open_hub(cfg.input, cfg.hub_config).items():
        names = getattr((rows.features or {}).get(column), "names", None) or []
        with hub_errors(cfg.input):
            for number, record in enumerate(rows):
                label = record.get(column)
                if isinstance(label, int) and 0 <= label < len(names):
                    record = {**record, column: names[label]}
                yield f"{cfg.input}, {split}, row {number}", {cfg.split_column: split, **record}


def column_of(where: str, record: dict, column: str, setting: str):
    if record.get(column) is None:
        raise DataError(f"{where}: no column {column!r}; there are {', '.join(map(str, record))}. Name it with "
                        f"{setting}=NAME")
    return record[column]


def text_of(where: str, record: dict, column: str) -> str:
    text = column_of(where, record, column, "text_column")
    if not isinstance(text, str | bytes):
        raise DataError(f"{where}: column {column!r} holds {type(text).__name__}, not text")
    return readable(text) if isinstance(text, bytes) else ESCAPED.sub("\ufffd", readable(text))


def dealt(text: str, seed: int) -> float:
    """A number between 0 and 1 that only the text and the seed decide."""
    data = f"{seed} {text}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) / 2**64


def document(where: str, record: dict, cfg: ArxivConfig) -> tuple[str, str, str]:
    """(split, category, text) of a record; raises DataError for a missing column or an unknown split."""
    column = cfg.label_column or ("category" if "category" in record else "label")
    text, label = text_of(where, record, cfg.text_column), column_of(where, record, column, "label_column")
    if isinstance(label, int) or (isinstance(label, str) and label.isdigit()):  # ccdv's numbers
        label = CCDV_LABELS[int(label)] if 0 <= int(label) < len(CCDV_LABELS) else str(label)
    split = record.get(cfg.split_column)
    if split in (None, ""):
        place = dealt(text, cfg.seed)
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


# all that a job may leave in its folder
WRITTEN = ("meta.json", "tokenizer.json", "train.bin", "val.bin", "train_plans.npy", "val_plans.npy",
           "val_oracle_nll.npy", *(f"{split}.h5" for split in SPLITS))


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
        """Put the files into place; what an earlier preparation left goes, and first of all its last name.

        So a kill between two renames cannot leave a set that looks whole.
        """
        for name in [names[-1], *(name for name in WRITTEN if name not in names)]:
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
# Plain text: documents in one stream of tokens
# ---------------------------------------------------------------------------------------------------------------
# name: data set on the hub, configuration, does it have a validation split
HUB = {"tinystories": ("roneneldan/TinyStories", "", True), "c4_en": ("allenai/c4", "en", True),
       "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", True),
       "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", True),
       "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", False),
       "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", False),
       "wiki40b_en": ("google/wiki40b", "en", True), "cc_news": ("vblagoje/cc_news", "", False)}
TEXT_FILES = (".txt", ".json", ".jsonl", ".csv", ".parquet")
LEAST, MOST, BLOCK = 2_000, 1 << 16, 1 << 20  # bytes of a document cut from a running text; read at once


@dataclass
class TextConfig:
    # input
    input: str = ""  # default: the documentation in Python itself; .txt .json .jsonl .parquet .csv; folder; hub name
    text_column: str = "text"
    max_bytes: int | None = None  # of text, UTF-8; default: 1e9 from the hub, else no limit
    max_documents: int | None = None
    val_fraction: float = 0.05  # of documents, dealt by their text; of the limits for validation text of its own
    val_input: str = ""  # validation text of its own, as input; default: the hub's validation split if it has one
    # tokens
    tokenizer: str = "bpe"  # bpe, char: train one | gpt2 | path of a tokenizer.json that has an eos
    vocab_size: int | None = None  # of a trained one, 4 or 20 special tokens among them; default: bpe 4,096, char all
    min_frequency: int = 1  # char: how often a character occurs that gets a token; others are spelled in half bytes
    lowercase: bool = False  # char, bpe, gpt2
    tokenizer_chars: int = 20_000_000  # most characters to train it on, of documents all over the text
    # output
    out_dir: str = "data/text"
    # system
    seed: int = 1337  # deals documents to the splits
    threads: int = 0  # of encoding; 0: one a core

    def check(self) -> list[str]:
        counts = ("max_bytes", "max_documents", "min_frequency", "tokenizer_chars")
        wrong = [f"{k} = {getattr(self, k)}: must be at least 1" for k in counts
                 if getattr(self, k) is not None and getattr(self, k) < 1]
        if not 0 < self.val_fraction < 1:
            wrong.append(f"val_fraction = {self.val_fraction}: must lie between 0 and 1")
        if self.min_frequency > 1 and self.tokenizer != "char":
            wrong.append(f"min_frequency = {self.min_frequency} is for tokenizer=char: set vocab_size instead")
        if self.vocab_size is not None and self.tokenizer not in ("char", "bpe"):
            wrong.append(f"vocab_size = {self.vocab_size} is of a trained tokenizer; {self.tokenizer} has its own")
        least = {"char": len(SPECIAL) + 16 + 1, "bpe": len(SPECIAL) + 256}.get(self.tokenizer, 0)
        if self.vocab_size is not None and self.vocab_size < least:
            wrong.append(f"vocab_size = {self.vocab_size}: {self.tokenizer} needs at least {least}, special tokens too")
        if self.lowercase and self.tokenizer not in ("char", "bpe", "gpt2"):
            wrong.append(f"lowercase: {self.tokenizer} says itself whether it reads lower case")
        return wrong


def documentation() -> Iterator[tuple[str, str]]:
    """(where it stands, text) of the topics of Python's help and of the standard library's longer docstrings."""
    topics = optional("pydoc_data.topics", "pydoc_data, which a full Python has").topics
    yield from ((f"topic {name}", topics[name]) for name in sorted(topics))
    root = Path(sysconfig.get_paths()["stdlib"])
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if any(part.startswith(("test", "site-packages", "dist-packages")) for part in place.parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                nodes = ast.walk(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError, OSError):
            continue
        yield from ((str(place), found) for node in nodes if isinstance(node, kinds)
                    and len(found := ast.get_docstring(node) or "") >= 200)


def cut_text(path: Path) -> Iterator[bytes]:
    """The documents of a .txt file, read in blocks: between <|endoftext|> where it has that, else a cut at a blank line
    every 2,000 bytes or more (at a line's end, or a space, where the next 64 KiB have no blank line)."""
    mark, marked, rest = b"<|endoftext|>", False, b""
    with open(path, "rb") as file:
        while not marked and (block := file.read(BLOCK)):
            marked, rest = mark in rest + block, block[-len(mark) :]
        file.seek(0)
        rest = b""
        while block := file.read(BLOCK):
            *texts, rest = (rest + block).split(mark) if marked else cut_running(rest + block, MOST)
            yield from (text.strip(b"\r\n") for text in texts)
    yield from (text.strip(b"\r\n") for text in ([rest] if marked else cut_running(rest, LEAST)))


def cut_running(data: bytes, left: int) -> list[bytes]:
    """Pieces of a text without marks, until fewer than `left` bytes are left, which come last."""
    pieces, begin = [], 0
    while len(data) - begin >= left:
        places = (re.compile(p).search(data, begin + LEAST, begin + MOST) for p in (rb"\n\s*\n", rb"\n", rb"\s"))
        end, after = next((found.span() for found in places if found), [min(begin + MOST, len(data))] * 2)
        pieces.append(data[begin:end])
        begin = after
    return [*pieces, data[begin:]]


def articles(rows: Iterable[dict], column: str) -> Iterator[dict]:
    """WikiText has a row a line; an article begins at ' = Title = '."""
    lines = []
    for row in rows:
        line = text_of("WikiText", row, column)
        if lines and re.fullmatch(r" = [^=].* = \n?", line):
            yield {column: "".join(lines)}
            lines = []
        lines.append(line)
    yield {column: "".join(lines)}


def source_records(source: str, cfg: TextConfig, split: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, record) of every document of one source."""
    path = Path(source)
    if not source:
        yield from ((where, {cfg.text_column: text}) for where, text in documentation())
    elif source in HUB:
        name, config, has_validation = HUB[source]
        with hub_errors(name):
            rows = open_hub(name, config)[split if has_validation else "train"]
            joined = articles(rows, cfg.text_column) if source.startswith("wikitext") else rows
            yield from ((f"{name}, {split}, document {number}", record) for number, record in enumerate(joined))
    elif not path.exists():
        near = difflib.get_close_matches(source, HUB, n=1)
        raise DataError(f"{source}: no such file or folder" + (f", did you mean {near[0]!r}?" if near else ".")
                        + f" Names of the hub: {', '.join(HUB)}")
    else:
        files = [path]
        if path.is_dir():  # a hidden folder in it may be this preparation's own
            files = [p for p in sorted(path.rglob("*.*")) if p.suffix in TEXT_FILES
                     and not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not files:
            raise DataError(f"{path} holds no {', '.join(TEXT_FILES)} files")
        for file in files:
            yield from read_file(file, cfg.text_column, cut_text)


def documents_of(source: str, cfg: TextConfig, split: str) -> Iterator[str]:
    """The documents that are not empty, until a limit is reached; a limit for validation is val_fraction of it."""
    share = cfg.val_fraction if split == "validation" else 1
    bytes_left = share * (cfg.max_bytes or (1e9 if source in HUB else math.inf))
    documents_left = share * (cfg.max_documents or math.inf)
    with contextlib.closing(source_records(source, cfg, split)) as records:
        for where, record in progress(records, f"{split} documents read", "doc"):
            if cfg.text_column in record and record[cfg.text_column] is None:
                continue
            text = text_of(where, record, cfg.text_column)
            if not text.strip():
                continue
            yield text
            bytes_left, documents_left = bytes_left - size_of(text), documents_left - 1
            if bytes_left <= 0 or documents_left <= 0:
                return


def size_of(text: str) -> int:
    """Bytes in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def gather_text(cfg: TextConfig, spool: Spool) -> None:
    """Sort all documents into the spool; those that repeat, in whatever case, are all of one split."""
    own, held, both = cfg.val_input or (HUB.get(cfg.input, ("", "", False))[2] and cfg.input), set(), 0
    for text in documents_of(own, cfg, "validation") if own else ():
        held.add(dealt(text.strip().casefold(), cfg.seed))
        spool.add("val", "", text)
    for text in documents_of(cfg.input, cfg, "train"):
        place = dealt(text.strip().casefold(), cfg.seed)
        both += place in held
        if place not in held:
            spool.add("train" if own or place >= cfg.val_fraction else "val", "", text)
    source, counts = cfg.input or "Python's help", {split: spool.counts[split, ""] for split in ("train", "val")}
    if not counts["train"]:
        raise DataError(f"{source} leaves no training document: use more text, or a smaller val_fraction")
    if not counts["val"]:
        raise DataError(f"{own or source} leaves no validation document: use more text, raise val_fraction, or name a "
                        "val_input")
    print(f"documents: {counts['train']:,} for training, {counts['val']:,} for validation"
          + f"; left out {both:,} of training that are in validation too" * bool(both))


def sampled(spool: Spool, most: int) -> Iterator[str]:
    """Training texts from all over the corpus, at most `most` characters, without bytes that are no UTF-8."""
    stride, left = -(-spool.chars["train", ""] // most), most
    with contextlib.closing(spool.texts("train", "")) as texts:
        for text in islice(texts, 0, None, stride):
            yield text[:left].encode("utf-8", "ignore").decode()
            left -= len(text)
            if left <= 0:
                break


def batches(texts: Iterable[str], most: int = 1 << 22) -> Iterator[list[str]]:
    """512 texts at a time, fewer if they are long."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == 512 or size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_tokens(path: Path, spool: Spool, split: str, tokenizer: Tokenizer, threads: int) -> dict:
    """All documents of a split in one stream, each followed by eos; returns {tokens, documents, bytes}."""
    done, dtype = {"tokens": 0, "documents": 0, "bytes": 0}, stream_dtype(tokenizer.vocab_size)
    with open(path, "wb") as file, contextlib.closing(spool.texts(split, "")) as texts, \
            progress(None, f"{split} tokens", "doc", spool.counts[split, ""]) as bar:
        for batch in batches(texts):
            rows = tokenizer.encode_batch(batch, threads)
            ids = np.fromiter(chain.from_iterable((*row, tokenizer.special["eos"]) for row in rows), np.int64)
            if not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                raise DataError(f"the tokenizer gives the token {ids.max()}, but vocab_size = {tokenizer.vocab_size}")
            ids.astype(dtype).tofile(file)
            done["tokens"] += len(ids)
            done["documents"] += len(batch)
            done["bytes"] += sum(map(size_of, batch))
            bar.update(len(batch))
    return done


def stream_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def text_tokenizer(cfg: TextConfig, spool: Spool) -> Tokenizer:
    """Train the tokenizer that the settings ask for."""
    more = {"lowercase": True} if cfg.lowercase else {}
    texts = progress(sampled(spool, cfg.tokenizer_chars), "training the tokenizer", "doc")
    texts = (text.lower() if cfg.lowercase else text for text in texts)
    if cfg.tokenizer == "char":
        return train_char(texts, cfg.vocab_size, cfg.min_frequency, **more)
    return train_bpe(texts, cfg.vocab_size or 4_096, special=list(SPECIAL), **more)


def prepare_text(cfg: TextConfig) -> dict:
    """Documents -> train.bin, val.bin, tokenizer.json, meta.json. Returns what meta.json says."""
    tokenizer, threads = None, cfg.threads or os.cpu_count() or 1
    if cfg.tokenizer not in ("char", "bpe"):
        tokenizer = load_tokenizer(cfg.tokenizer)
        tokenizer.spec |= {"lowercase": True} if cfg.lowercase else {}
        if "eos" not in tokenizer.special:
            raise DataError(f"{cfg.tokenizer} has no eos, which ends every document: use one of this job, or gpt2")
    with Workshop(cfg.out_dir) as shop, contextlib.closing(Spool(shop.folder)) as spool:
        gather_text(cfg, spool)
        tokenizer = tokenizer or text_tokenizer(cfg, spool)
        tokenizer.save(shop.folder / "tokenizer.json")
        made = {s: write_tokens(shop.folder / f"{s}.bin", spool, s, tokenizer, threads) for s in ("train", "val")}
        meta = write_meta(shop.folder, "text", tokenizer.vocab_size, tokenizer.special, made,
                          tokenizer="tokenizer.json", tokenizer_hash=tokenizer.hash(),
                          source=cfg.input or f"documentation of Python {platform.python_version()}", seed=cfg.seed)
        shop.finish("tokenizer.json", "train.bin", "val.bin", "meta.json")
    print(f"tokens: {meta['train_tokens']:,} for training, {meta['val_tokens']:,} for validation, of "
          f"{meta['val_bytes'] / meta['val_tokens']:.2f} bytes; vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind}"
          f"); written to {cfg.out_dir}")
    return meta


def write_meta(folder: Path, kind: str, vocab_size: int, special: dict, made: dict, **more) -> dict:
    """meta.json, from {split: {tokens, documents, bytes}}; ids of special tokens that there are not are null."""
    meta = {"kind": kind, "vocab_size": vocab_size, "dtype": stream_dtype(vocab_size).name,
            **{f"{name}_id": special.get(name) for name in ("eos", "bos", "pad", "unk")},
            **{f"{split}_{what}": made[split][what] for what in ("tokens", "documents") for split in made},
            "val_bytes": made["val"].get("bytes"), **more}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return meta


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
# Planted plans: documents whose plan is known, with the exact filter over it
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class PlantedConfig:
    # plans
    num_plans: int = 4  # K
    num_states: int = 3  # S, hidden states of a plan's own process inside a chunk
    vocab_size: int = 32  # V; bos comes after them, with id V
    self_transition: float = 0.6  # probability that the next chunk keeps the plan; the others share the rest
    transition_matrix: list[list[float]] | None = None  # [K][K], in place of self_transition
    plan_sharpness: float = 1.5  # logit by which a plan prefers its half of the tokens
    state_sharpness: float = 2.0  # standard deviation of the logits by which a state differs from its plan
    state_persistence: float = 0.8  # probability that a state stays
    # documents
    version: Literal["v2_planner_required", "v1_filtered_mixture"] = "v2_planner_required"  # v2: bos is in chunk 0
    chunk_size: int = 16  # C, tokens
    document_chunks: int = 8
    train_documents: int = 20_000
    validation_documents: int = 1_000
    # output
    out_dir: str = "data/planted"
    # system
    seed: int = 1337

    def check(self) -> list[str]:
        least = {"num_plans": 1, "num_states": 1, "vocab_size": 2, "chunk_size": 2, "document_chunks": 1,
                 "train_documents": 1, "validation_documents": 1, "plan_sharpness": 0, "state_sharpness": 0}
        wrong = [f"{k} = {getattr(self, k)}: must be at least {n}" for k, n in least.items() if getattr(self, k) < n]
        wrong += [f"{k} = {getattr(self, k)}: must lie between 0 and 1" for k in (
            "self_transition", "state_persistence") if not 0 <= getattr(self, k) <= 1]
        K, rows = self.num_plans, self.transition_matrix
        if rows is not None and ([len(row) for row in rows] != [K] * K or any(
                min(row) < 0 or abs(sum(row) - 1) > 1e-6 for row in rows)):
            wrong.append(f"transition_matrix: needs {K} rows of {K} probabilities that sum to 1")
        return wrong


@dataclass
class Plans:
    """A chain of plans, each a hidden Markov model that starts anew with every chunk; all float64."""

    transition: np.ndarray  # [K, K] between chunks; the first plan is uniform
    stationary: np.ndarray  # [K, S] of the state at the start of a chunk
    switch: np.ndarray  # [K, S, S] between the tokens of a chunk
    emission: np.ndarray  # [K, S, V]
    lengths: list[int]  # emitted tokens of each chunk: C, but C - 1 in the first of v2, whose bos is consumed too

    def sample(self, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [N, D - 1], plan of every chunk [N, chunks])."""
        plan, tokens, plans = generator.integers(len(self.transition), size=count), [], []
        for c, length in enumerate(self.lengths):
            plan = drawn(self.transition[plan], generator) if c else plan
            state = drawn(self.stationary[plan], generator)
            plans.append(plan)
            for i in range(length):
                state = drawn(self.switch[plan, state], generator) if i else state
                tokens.append(drawn(self.emission[plan, state], generator))
        return np.stack(tokens, 1), np.stack(plans, 1)

    def filter(self, tokens: np.ndarray, plans: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(-log p(x_t | x_<t) in nats [N, D - 1], p(plan | tokens so far) at each chunk's end [N, chunks, K]).

        The forward algorithm over (plan, state), normalised at every token; exact. With `plans` [N, chunks] the
        predictor is told the plan of the chunk.
        """
        K = len(self.transition)
        belief, nll, posterior = np.full((len(tokens), K), 1 / K), [], []  # belief [N, K]
        column = iter(tokens.T)
        for c, length in enumerate(self.lengths):
            belief = belief @ self.transition if c else belief
            belief = belief if plans is None else np.eye(K)[plans[:, c]]
            joint = belief[:, :, None] * self.stationary  # [N, K, S]
            for i in range(length):
                joint = np.einsum("nks,kst->nkt", joint, self.switch) if i else joint
                joint = joint * self.emission[:, :, next(column)].transpose(2, 0, 1)
                evidence = joint.sum((1, 2))
                joint /= evidence[:, None, None]
                nll.append(-np.log(evidence))
            belief = joint.sum(2)
            posterior.append(belief)
        return np.stack(nll, 1), np.stack(posterior, 1)


def drawn(probabilities: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One index [N] of each row [N, n]."""
    edges = probabilities.cumsum(1)[:, :-1]
    return (generator.random((len(edges), 1)) >= edges).sum(1)


def make_plans(cfg: PlantedConfig) -> Plans:
    """Plan k prefers half of the tokens, neighbours on a ring of tokens sharing some, so that one token says little."""
    K, S, V, C = cfg.num_plans, cfg.num_states, cfg.vocab_size, cfg.chunk_size
    generator = np.random.default_rng([cfg.seed, 0])
    transition = np.full((K, K), (1 - cfg.self_transition) / max(K - 1, 1))
    np.fill_diagonal(transition, cfg.self_transition if K > 1 else 1)
    if cfg.transition_matrix is not None:
        transition = np.array(cfg.transition_matrix, dtype=np.float64)
    place = (generator.permutation(V) - V * np.arange(K)[:, None] // K) % V  # [K, V]
    logits = cfg.plan_sharpness * (place < V / 2)[:, None] + cfg.state_sharpness * generator.normal(size=(K, S, V))
    emission = np.exp(logits - logits.max(-1, keepdims=True))
    switch = cfg.state_persistence * np.eye(S) + (1 - cfg.state_persistence) * generator.dirichlet([1.0] * S, (K, S))
    stationary = np.linalg.matrix_power(switch, 1 << 20).mean(1)
    stationary /= stationary.sum(-1, keepdims=True)
    lengths = [C - (cfg.version == "v2_planner_required"), *[C] * (cfg.document_chunks - 1)]
    return Plans(transition, stationary, switch, emission / emission.sum(-1, keepdims=True), lengths)


def mutual_information(counts: np.ndarray) -> float:
    """I / sqrt(H H) of a table of counts; 1 if both sides are constant."""
    joint = counts / counts.sum()
    entropy = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (joint.sum(0), joint.sum(1), joint)]
    information, scale = entropy[0] + entropy[1] - entropy[2], math.sqrt(entropy[0] * entropy[1])
    return float(information / scale) if scale else float(entropy[0] == entropy[1])


def planted(cfg: PlantedConfig) -> dict:
    """Documents of planted plans -> train.bin, val.bin, their plans, the oracle, meta.json, which is returned."""
    process, made, K = make_plans(cfg), {}, cfg.num_plans
    chunks, length, dtype = cfg.document_chunks, 1 + sum(process.lengths), stream_dtype(cfg.vocab_size + 1)
    sums, table, unigram = np.zeros(2), np.zeros((K, K)), np.zeros(cfg.vocab_size)
    files = ["train.bin", "val.bin", "train_plans.npy", "val_plans.npy", "val_oracle_nll.npy", "meta.json"]
    with Workshop(cfg.out_dir) as shop:
        def array(name, kind, *shape):
            return np.lib.format.open_memmap(shop.folder / name, "w+", kind, shape)

        for s, (split, count) in enumerate((("train", cfg.train_documents), ("val", cfg.validation_documents)), 1):
            generator = np.random.default_rng([cfg.seed, s])
            plans = array(f"{split}_plans.npy", np.int64, count, chunks)
            oracle = array("val_oracle_nll.npy", np.float32, count, length - 1) if split == "val" else None
            with open(shop.folder / f"{split}.bin", "wb") as file:
                for begin in progress(range(0, count, 1_000), f"{split} documents", "kdoc"):
                    rows = slice(begin, min(begin + 1_000, count))
                    tokens, plans[rows] = process.sample(rows.stop - begin, generator)
                    np.pad(tokens, ((0, 0), (1, 0)), constant_values=cfg.vocab_size).astype(dtype).tofile(file)
                    if oracle is None:
                        continue
                    (nll, posterior), (known, _) = process.filter(tokens), process.filter(tokens, plans[rows])
                    oracle[rows], sums = nll, sums + (nll.sum(), known.sum())
                    np.add.at(table, (plans[rows], posterior.argmax(-1)), 1)
                    unigram += np.bincount(tokens.ravel(), minlength=cfg.vocab_size)
            made[split] = {"tokens": count * length, "documents": count}
        oracle_nll, known_plan_nll = (sums / (cfg.validation_documents * (length - 1))).tolist()
        share = unigram[unigram > 0] / unigram.sum()
        meta = write_meta(
            shop.folder, "planted", cfg.vocab_size + 1, {"bos": cfg.vocab_size}, made, tokenizer="", tokenizer_hash="",
            source="planted", seed=cfg.seed, document_length=length, chunk_size=cfg.chunk_size, version=cfg.version,
            num_plans=K, oracle_nll=oracle_nll, known_plan_nll=known_plan_nll,
            unigram_entropy=float(-(share * np.log(share)).sum()), oracle_nmi=mutual_information(table),
            transition_matrix=process.transition.tolist())
        shop.finish(*files)
    print(f"planted: {cfg.train_documents:,} and {cfg.validation_documents:,} documents of {length} tokens; nats a "
          f"token: unigram {meta['unigram_entropy']:.4f}, oracle {oracle_nll:.4f}, known plan {known_plan_nll:.4f}; "
          f"the oracle finds the plan with NMI {meta['oracle_nmi']:.4f}; written to {cfg.out_dir}")
    return meta


# ---------------------------------------------------------------------------------------------------------------
# Cells: h5ad files by h5py alone
# ---------------------------------------------------------------------------------------------------------------
def suggest(name: str, names: Iterable[str]) -> str:
    """"; did you mean 'x'? There are x, y, z": what follows a name that is none of names."""
    names = list(map(str, names))
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return (f"; did you mean {near[0]!r}? There are" if near else "; there are") + f" {listed or 'none'}"


def as_text(value) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def attribute(node, *names: str) -> str:
    """The first of these attributes that there is, as text."""
    return next((as_text(node.attrs[name]) for name in names if name in node.attrs), "")


def plain(values) -> np.ndarray:
    """A column as h5py reads it, at least one value: byte strings become text (dtype object), numbers stay."""
    values = np.atleast_1d(values)
    if values.dtype.kind not in "SO":
        return values
    return np.array([as_text(value) for value in values.tolist()], object)


def factor(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(codes int32, the values that occur as sorted text)."""
    distinct, codes = np.unique(values.astype(str) if values.dtype.kind == "O" else values, return_inverse=True)
    texts = list(map(str, distinct.tolist()))
    names = sorted(set(texts))
    return np.searchsorted(names, texts).astype(np.int32)[codes.reshape(-1)], names


class H5ad:
    """An h5ad file of any anndata, 0.1 to now, read by h5py alone. Opening checks structure, not values.

    Raises DataError for a file that is missing, cut short or no HDF5, lacks X, obs or var, or whose shapes disagree.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.file = h5py.File(path, "r")
        except OSError as e:
            reason = ("no such file" if not self.path.exists() else "it is a folder" if self.path.is_dir() else
                      "cut short, damaged or no HDF5 file: copy or make it again")
            raise DataError(f"{path}: {reason}") from e
        with self._guard("the list of its parts"):
            if missing := [part for part in ("X", "obs", "var") if part not in self.file]:
                raise DataError(f"{path} has no {missing[0]}, so it is no h5ad file of cells; it has "
                                f"{', '.join(self.file) or 'nothing'}")
        self.rows = {}
        self.obs_names, self.var_names = self._text("obs", None), self._text("var", None)
        self.n_obs, self.n_vars = len(self.obs_names), len(self.var_names)
        self.rows = {"obs": self.n_obs, "var": self.n_vars}
        if not self.n_obs or not self.n_vars:
            raise DataError(f"{path} has {self.n_obs} cells and {self.n_vars} genes: nothing to read")
        self.matrix(None)

    def __enter__(self) -> "H5ad":
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    @contextlib.contextmanager
    def _guard(self, what: str):
        """What HDF5 says of bytes that are not as they should be, as a DataError."""
        try:
            yield
        except DataError:
            raise
        except (OSError, KeyError, ValueError, TypeError, IndexError, RuntimeError) as e:
            raise DataError(f"{self.path}: {what} cannot be read ({type(e).__name__}: {e}): the file is damaged or of "
                            "an unknown layout") from e

    def _index(self, part: str) -> str:
        frame = self.file[part]
        names = list(frame) if isinstance(frame, h5py.Group) else frame.dtype.names
        return attribute(frame, "_index") or next(name for name in ("_index", "index", *names) if name in names)

    def _columns(self, part: str) -> list[str]:
        with self._guard(part):
            frame, index = self.file[part], self._index(part)
            there = list(frame) if isinstance(frame, h5py.Group) else frame.dtype.names
            order = map(as_text, frame.attrs.get("column-order", there))
            return [name for name in order if name not in (index, "__categories") and (name in there or name in frame)]

    def _parts(self, part: str, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(values, None), or (codes, categories) with code -1 for a missing value."""
        frame = self.file[part]
        if isinstance(frame, h5py.Dataset):  # one compound data set: anndata before 0.7
            values, where = frame.fields(name)[:], f"uns/{name}_categories"
            return (plain(values), plain(self.file[where][()])) if where in self.file else (plain(values), None)
        node = frame[name]
        if isinstance(node, h5py.Dataset):
            if isinstance(node.attrs.get("categories"), h5py.Reference):  # anndata 0.7
                return node[:], plain(self.file[node.attrs["categories"]][()])
            return plain(node[()]), None
        if "codes" in node:
            categories = node["categories"]
            return node["codes"][:], plain((categories["values"] if isinstance(categories, h5py.Group) else
                                            categories)[()])
        values, codes = np.unique(plain(node["values"][:]), return_inverse=True)  # nullable
        return np.where(node["mask"][:], -1, codes.reshape(-1)), values

    def _coded(self, part: str, name: str | None, missing: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """As _parts, checked: a value for each row, unless some may be missing. None is the index."""
        where = f"{part} column {name!r}" if name else f"the names of {part}"
        with self._guard(where):
            values, categories = self._parts(part, name or self._index(part))
            if values.shape != (rows := self.rows.get(part, len(values)),):
                raise DataError(f"{self.path}: {where} has shape {values.shape} for {rows:,} rows")
            if categories is not None and rows and (values.max() >= len(categories) or values.min() < -1):
                raise DataError(f"{self.path}: {where} has codes {values.min()} to {values.max()} for "
                                f"{len(categories)} categories")
            lost = values != values if categories is None else values < 0
            if lost.any() and not missing:
                raise DataError(f"{self.path}: {where} has no value for {lost.sum():,} of {rows:,} rows, first for row "
                                f"{lost.argmax()}: fill these in or leave them out")
        return values, categories

    def _text(self, part: str, name: str | None) -> np.ndarray:
        values, categories = self._coded(part, name)
        return (values if categories is None else categories[values]).astype(str)

    def frame(self, part: str) -> dict[str, np.ndarray]:
        """The columns of obs or var as write_h5ad takes them: numbers, or text with None for a missing value."""
        found = {}
        for name in self._columns(part):
            values, categories = self._coded(part, name, missing=True)
            if categories is not None and (values < 0).any():
                missing = np.nan if categories.dtype.kind in "iuf" else None
                categories = np.append(categories.astype(float if missing else object), missing)
            found[name] = values if categories is None else categories[values]
        return found

    @property
    def columns(self) -> list[str]:
        return self._columns("obs")

    def column(self, name: str) -> tuple[np.ndarray, list[str]]:
        """(codes int32 [n_obs], names) of an obs column; names are the text of the values that occur, sorted.

        Raises DataError if there is no such column, or it lacks the value of a cell.
        """
        if name not in self.columns:
            raise DataError(f"{self.path} has no obs column {name!r}{suggest(name, self.columns)}")
        values, categories = self._coded("obs", name)
        if categories is None:
            return factor(values)
        codes, names = factor(categories)
        occurring, codes = np.unique(codes[values], return_inverse=True)
        return codes.reshape(-1).astype(np.int32), [names[i] for i in occurring]

    @property
    def gene_names(self) -> np.ndarray:
        """var["gene_name"] where there is such a column, else the names of var, as they are, repeated or not."""
        return self._text("var", "gene_name") if "gene_name" in self._columns("var") else self.var_names

    @property
    def keys(self) -> list[str]:
        """"X", "obsm/NAME", "layers/NAME": what matrix takes."""
        found = ["X"]
        for part in ("obsm", "layers"):
            with self._guard(part):
                node = self.file.get(part, ())
                if isinstance(node, h5py.Dataset):
                    found += [f"{part}/{name}" for name in node.dtype.names or () if node.dtype[name].ndim == 1]
                    continue
                found += [f"{part}/{name}" for name in node if getattr(node[name], "ndim", 0) == 2 or
                          attribute(node[name], "encoding-type", "h5sparse_format")[:3] in ("csr", "csc")]
        return found

    def matrix(self, key: str | None) -> "Matrix":
        """The matrix of a key; a bare name is sought in obsm, then in layers. None is X."""
        found = next((k for k in (key or "X", f"obsm/{key}", f"layers/{key}") if k in self.keys), None)
        if found is None and f"obsm/{key}" in self.file:
            raise DataError(f"{self.path}: obsm/{key} is no matrix but a table or something else: write it as an array")
        if found is None:
            raise DataError(f"{self.path} has no matrix {key!r}"
                            + suggest(key, [k.rpartition("/")[2] for k in self.keys]))
        with self._guard(found):
            matrix = Matrix(self, found)
        columns = matrix.shape[1] if found.startswith("obsm/") else self.n_vars
        if matrix.shape != (self.n_obs, columns):
            raise DataError(f"{self.path}: {found} is {matrix.shape[0]:,} x {matrix.shape[1]:,}, but there are "
                            f"{self.n_obs:,} cells and {self.n_vars:,} genes: the file does not fit together")
        return matrix


class Matrix:
    """A matrix [rows, columns] of an h5ad file, read in blocks of rows. format: dense, csr or csc.

    A CSR block or matrix is (data float32 [nnz], indices int32 [nnz], indptr int64 [rows + 1]), columns ascending.
    """

    entries = 1 << 22  # most values of a block: 32 MB

    def __init__(self, source: H5ad, key: str):
        self.source, self.key, self.where = source, key, f"{source.path}: {key}"
        part, _, name = key.partition("/")
        node, self._by_rows = source.file[part], None
        self.node = node.fields(name) if isinstance(node, h5py.Dataset) and name else node[name] if name else node
        if not isinstance(self.node, h5py.Group):
            self.format = "dense"
            kind = node.dtype[name] if isinstance(node, h5py.Dataset) and name else self.node.dtype
            self.shape = (len(node), *kind.shape) if kind.shape else tuple(self.node.shape)
            self.nnz, kinds = math.prod(self.shape), [kind.base]
        else:
            self.format = attribute(self.node, "encoding-type", "h5sparse_format")[:3]
            if self.format not in ("csr", "csc"):
                raise DataError(f"{self.where} is {self.format or 'of no known encoding'}, not dense, CSR or CSC")
            shape = self.node.attrs["shape" if "shape" in self.node.attrs else "h5sparse_shape"]
            self.shape, self.nnz = tuple(map(int, shape)), len(self.node["data"])
            pointers, major = self.node["indptr"], self.shape[self.format == "csc"]
            if len(pointers) != major + 1 or len(self.node["indices"]) != self.nnz or (
                    pointers[0], pointers[-1]) != (0, self.nnz):
                raise DataError(f"{self.where}: its data, indices and indptr are not of one sparse matrix of "
                                f"{self.shape[0]:,} x {self.shape[1]:,}")
            kinds = [self.node[name].dtype for name in ("data", "indices", "indptr")]
        if len(self.shape) != 2 or kinds[0].kind not in "iufb" or any(kind.kind not in "iu" for kind in kinds[1:]):
            raise DataError(f"{self.where} holds {kinds[0]} of shape {self.shape}, not a table of numbers")

    def _pointers(self) -> np.ndarray:
        pointers = self.node["indptr"][:].astype(np.int64)
        if (np.diff(pointers) < 0).any():
            raise DataError(f"{self.where}: indptr falls, so the matrix is damaged")
        return pointers

    def _stretches(self, pointers: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of runs of rows (CSC: columns) of at most `most` rows and `entries` values, or of one row."""
        start, end = 0, len(pointers) - 1
        while start < end:
            stop = int(np.searchsorted(pointers, pointers[start] + self.entries, "right")) - 1
            stop = min(max(stop, start + 1), start + most, end)
            yield start, stop
            start = stop

    def _read(self, start: int, stop: int, pointers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(data, indices) of these rows (CSC: columns), indices in range."""
        part = slice(int(pointers[start]), int(pointers[stop]))
        data, indices = single(self.node["data"][part]), self.node["indices"][part]
        minor = self.shape[self.format == "csr"]
        if len(indices) and (indices.min() < 0 or indices.max() >= minor):
            raise DataError(f"{self.where} has indices {indices.min()} to {indices.max()} for {minor:,} "
                            f"{'columns' if self.format == 'csr' else 'rows'}: the matrix is damaged")
        return data, indices.astype(np.int32)

    def _ordered(self, start: int, data: np.ndarray, indices: np.ndarray, pointers: np.ndarray) -> tuple:
        """A block of rows with its columns ascending; DataError for a value that is there twice."""
        rows = np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))
        place = rows * self.shape[1] + indices
        if (place[1:] <= place[:-1]).any():
            order = place.argsort(kind="stable")
            data, indices, place = data[order], indices[order], place[order]
            if (twice := place[1:] == place[:-1]).any():
                row, column = divmod(int(place[twice.argmax()]), self.shape[1])
                raise DataError(f"{self.where} has two values for row {start + row}, column {column}")
        return data, indices, pointers

    def _transposed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """CSC to CSR through an unnamed file, in two passes over blocks of columns: count the rows, then fill them."""
        by_column, counts = self._pointers(), np.zeros(self.shape[0], np.int64)
        for start, stop in self._stretches(by_column, self.shape[1]):
            counts += np.bincount(self._read(start, stop, by_column)[1], minlength=self.shape[0])
        pointers = np.concatenate(([0], counts.cumsum()))
        with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as two:
            data = np.memmap(one, np.float32, "w+", shape=max(self.nnz, 1))
            indices, cursor = np.memmap(two, np.int32, "w+", shape=max(self.nnz, 1)), pointers[:-1].copy()
            for start, stop in self._stretches(by_column, self.shape[1]):
                values, rows = self._read(start, stop, by_column)
                columns = np.repeat(np.arange(start, stop, dtype=np.int32), np.diff(by_column[start : stop + 1]))
                order = rows.argsort(kind="stable")  # columns ascend within a row: earlier blocks have smaller ones
                here = np.bincount(rows, minlength=self.shape[0])
                place = np.repeat(cursor - (here.cumsum() - here), here) + np.arange(len(rows))
                data[place], indices[place] = values[order], columns[order]
                cursor += here
            return data, indices, pointers

    def blocks(self, rows: int = 8_192) -> Iterator[tuple[int, int, np.ndarray | tuple]]:
        """(start, stop, block) of all rows in order, at most `rows` and `entries` values at once.

        A block is an array float32 of a dense matrix, else CSR with indptr from 0.
        """
        with self.source._guard(self.key):
            if self.format == "dense":
                most = min(rows, max(1, self.entries // max(self.shape[1], 1)))
                chunk = (getattr(self.node, "chunks", None) or (1,))[0]
                most = most // chunk * chunk or most  # whole chunks, so that each is unpacked once
                for start in range(0, self.shape[0], most):
                    stop = min(start + most, self.shape[0])
                    yield start, stop, single(np.asarray(self.node[start:stop]))
                return
            if self.format == "csc" and self._by_rows is None:
                self._by_rows = self._transposed()
            pointers = self._by_rows[2] if self._by_rows else self._pointers()
            for start, stop in self._stretches(pointers, rows):
                part = slice(int(pointers[start]), int(pointers[stop]))
                data, indices = ((np.array(a[part]) for a in self._by_rows[:2]) if self._by_rows else
                                 self._read(start, stop, pointers))
                yield start, stop, self._ordered(start, data, indices, pointers[start : stop + 1] - pointers[start])

    def check(self) -> dict:
        """{min, max, integer, nnz, row_sums [rows], largest_row_sum} of the values, in one pass.

        Raises DataError for a value that is not finite and for a sparse matrix that is none.
        """
        low, high, integer, nnz, sums = np.inf, -np.inf, True, 0, np.zeros(self.shape[0])
        for start, stop, block in self.blocks():
            data = block if self.format == "dense" else block[0]
            if not np.isfinite(data).all():
                place = int((~np.isfinite(data)).ravel().argmax())
                dense, value = self.format == "dense", data.ravel()[place]
                row = start + int(place // self.shape[1] if dense else np.searchsorted(block[2], place, "right") - 1)
                raise DataError(f"{self.where} holds {value} for cell {row} ({self.source.obs_names[row]}): every "
                                "value must be a finite number")
            sums[start:stop], nnz = row_sums(block), nnz + int(np.count_nonzero(data))
            if data.size:
                low, high = min(low, float(data.min())), max(high, float(data.max()))
                integer = integer and bool((data == np.rint(data)).all())
            if self.format != "dense" and data.size < (stop - start) * self.shape[1]:
                low, high = min(low, 0.0), max(high, 0.0)
        return {"min": low, "max": high, "integer": integer, "nnz": nnz, "row_sums": sums,
                "largest_row_sum": float(sums.max())}

    def csr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The whole matrix in memory; zeros of a dense one are left out."""
        nnz = sum(np.count_nonzero(block) for _, _, block in self.blocks()) if self.format == "dense" else self.nnz
        data, indices, parts, filled = np.empty(nnz, np.float32), np.empty(nnz, np.int32), [[0]], 0
        for _, _, block in self.blocks():
            values, columns, inner = as_csr(block)
            data[filled : filled + len(values)], indices[filled : filled + len(values)] = values, columns
            parts.append(filled + inner[1:])
            filled += len(values)
        return data, indices, np.concatenate(parts)

    def dense(self) -> np.ndarray:
        """The whole matrix in memory, float32."""
        whole = np.empty(self.shape, np.float32)
        for start, stop, block in self.blocks():
            whole[start:stop] = as_dense(block, self.shape[1])
        return whole

    def mappable(self) -> tuple[np.memmap, ...] | None:
        """Memory maps onto the file's own bytes, (values,) or (data, indices, indptr), where they lie in one piece."""
        if self.format == "csc" or not isinstance(self.node, h5py.Dataset | h5py.Group):
            return None
        parts = [self.node] if self.format == "dense" else [self.node[name] for name in ("data", "indices", "indptr")]
        if any(part.id.get_offset() is None or not part.dtype.isnative for part in parts):  # None: chunks
            return None
        return tuple(np.memmap(self.source.path, part.dtype, "r", part.id.get_offset(), part.shape) for part in parts)


def single(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found so
        return values.astype(np.float32, copy=False)


def as_csr(block: np.ndarray | tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if isinstance(block, tuple):
        return block
    rows, columns = block.nonzero()
    return (block[rows, columns], columns.astype(np.int32),
            np.concatenate(([0], np.bincount(rows, minlength=len(block)).cumsum())))


def as_dense(block: np.ndarray | tuple, columns: int) -> np.ndarray:
    if not isinstance(block, tuple):
        return block
    data, indices, pointers = block
    whole = np.zeros((len(pointers) - 1, columns), np.float32)
    whole[np.repeat(np.arange(len(whole)), np.diff(pointers)), indices] = data
    return whole


def row_sums(block: np.ndarray | tuple) -> np.ndarray:
    """Sums over the columns of a block, float64 [rows]."""
    if not isinstance(block, tuple):
        return block.sum(1, dtype=np.float64)
    rows = len(block[2]) - 1
    return np.bincount(np.repeat(np.arange(rows), np.diff(block[2])), weights=block[0], minlength=rows)


def looks_log1p(found: "Matrix | dict") -> bool:
    """Whether a matrix, or what its check found, holds log(1 + x) rather than counts.

    Fractions, none negative, none above 15: exp(15) is three million molecules of one gene in one cell.
    """
    found = found.check() if isinstance(found, Matrix) else found
    return not found["integer"] and found["min"] >= 0 and found["max"] < 15


def encoded(node, kind: str, version: str = "0.2.0", **attributes):
    """Mark a group or data set as anndata does."""
    node.attrs.update({"encoding-type": kind, "encoding-version": version, **attributes})
    return node


def write_values(group: h5py.Group, name: str, value, categorical: bool = False) -> None:
    """A dict, text, number, array or column into a group, in anndata's encoding; text may have None for missing."""
    if isinstance(value, dict):
        inner = encoded(group.create_group(name), "dict", "0.1.0")
        for key, item in value.items():
            write_values(inner, key, item)
        return
    values = np.asarray(value)
    if not values.ndim:
        encoded(group.create_dataset(name, data=value), "string" if values.dtype.kind == "U" else "numeric-scalar")
    elif values.dtype.kind not in "UO":
        encoded(group.create_dataset(name, data=values), "array")
    elif not categorical and not any(v is None for v in values.ravel().tolist()):
        encoded(group.create_dataset(name, data=values.astype(object), dtype=h5py.string_dtype()), "string-array")
    else:
        known = np.array([v is not None for v in values.tolist()], bool)
        codes, (found, names) = np.full(len(values), -1, np.int32), factor(values[known].astype(object))
        codes[known] = found
        kind = np.int8 if len(names) < 128 else np.int16 if len(names) < 32_768 else np.int32
        inner = encoded(group.create_group(name), "categorical", ordered=False)
        encoded(inner.create_dataset("codes", data=codes.astype(kind)), "array")
        write_values(inner, "categories", np.array(names, object))


def write_frame(file: h5py.File, part: str, names: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    """obs (text as categoricals) or var (text as it is) with its index."""
    order = np.array(list(columns), dtype=h5py.string_dtype())
    frame = encoded(file.create_group(part), "dataframe", _index="_index", **{"column-order": order})
    for name, values in {"_index": np.asarray(names), **columns}.items():
        if len(values) != len(names):
            raise DataError(f"{part} column {name!r} has {len(values):,} values for {len(names):,} rows")
        write_values(frame, name, values, categorical=part == "obs" and name != "_index")


def matrix_space(group: h5py.Group, name: str, shape: tuple[int, int], nnz: int | None = None) -> h5py.Group:
    """Room for a dense matrix, or for a CSR one of nnz values, in one piece each, so that it can be memory-mapped."""
    if nnz is None:
        return encoded(group.create_dataset(name, shape, np.float32), "array")
    node = encoded(group.create_group(name), "csr_matrix", "0.1.0", shape=np.array(shape))
    for part, size, kind in (("data", nnz, np.float32), ("indices", nnz, np.int32), ("indptr", shape[0] + 1, np.int64)):
        node.create_dataset(part, (size,), kind)
    return node


@contextlib.contextmanager
def new_h5ad(path: str | Path, obs_names, obs: dict, uns: dict) -> Iterator[h5py.File]:
    """A new h5ad without X and var, for the caller to fill; it takes its name at the end, or is removed."""
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder: name the file to write")
    saving = path.with_name(f".saving-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"{path.parent} cannot be made ({e.strerror}): use another folder") from e
    try:
        with h5py.File(saving, "w") as file:
            encoded(file, "anndata", "0.1.0")
            write_frame(file, "obs", np.asarray(obs_names), obs)
            for name, content in (("obsm", {}), ("layers", {}), ("varm", {}), ("obsp", {}), ("varp", {}), ("uns", uns)):
                write_values(file, name, content)
            yield file
        os.replace(saving, path)
    except OSError as e:
        raise DataError(f"{path} cannot be written ({e}): free some space or choose another place") from e
    finally:
        saving.unlink(missing_ok=True)


def write_h5ad(path: str | Path, X, obs: dict, var_names, obsm: dict | None = None, obs_names=None,
               var: dict | None = None, layers: dict | None = None, uns: dict | None = None) -> None:
    """Write an h5ad that anndata opens, whole or not at all.

    X and the matrices of obsm and layers are arrays [n, d], or CSR (data, indices, indptr, shape); obs and var are
    {column: values}, text of obs as categoricals; uns nests dicts, text, numbers and arrays.
    """
    names = [str(i) for i in range(len(X[2]) - 1 if isinstance(X, tuple) else len(X))]
    with new_h5ad(path, names if obs_names is None else obs_names, obs, uns or {}) as file:
        write_frame(file, "var", np.asarray(var_names), var or {})
        for group, matrices in ((file, {"X": X}), (file["obsm"], obsm or {}), (file["layers"], layers or {})):
            for name, matrix in matrices.items():
                if not isinstance(matrix, tuple):
                    matrix_space(group, name, matrix.shape)[...] = matrix
                    continue
                node = matrix_space(group, name, matrix[3], len(matrix[0]))
                for part, values in zip(("data", "indices", "indptr"), matrix, strict=False):
                    node[part][...] = values


# ---------------------------------------------------------------------------------------------------------------
# Cells: counts to expression, and synthetic populations
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class StateConfig:
    # job
    action: Literal["synthetic", "preprocess"] = "synthetic"  # also a bare word: state preprocess --input=FILE.h5ad
    # preprocess
    input: str = ""  # an h5ad file of any anndata; its obs, var and obsm are kept
    layer: str = ""  # the matrix with the counts; default: X
    output: str = ""  # the file to write; default: OUT_DIR/NAME OF THE INPUT
    target_sum: float = 1e4  # counts a cell after normalisation, before log(1 + x)
    num_hvgs: int = 2_000  # most variable genes, for obsm X_hvg
    drop_empty: bool = False  # leave cells without any count out
    keep_counts: bool = False  # as layers/counts
    pert_col: str = ""  # obs columns that must be there, with a value for every cell
    cell_type_key: str = ""
    batch_col: str = ""
    control_pert: str = ""  # a value that pert_col (default: gene) must have
    # synthetic
    num_cell_types: int = 16  # c0, c1, ...; the last is for zero-shot prediction, of the one before some perturbations
    num_perturbations: int = 12  # p0, p1, ... and non-targeting
    num_genes: int = 200
    num_batches: int = 4
    cells_per_condition: int = 40  # of a cell type and perturbation
    controls_per_cell_type: int = 160
    depth: float = 5_000.0  # median counts of a cell
    dropout: float = 0.2  # probability that a gene is lost in a cell where its expected count is 1; at r: dropout**r
    effect: float = 0.7  # standard deviation of a perturbation's effects on log expression
    # output
    out_dir: str = "data/state"
    # system
    seed: int = 1337

    def check(self) -> list[str]:
        least = {"num_hvgs": 1, "num_cell_types": 4, "num_perturbations": 2, "num_genes": 20, "num_batches": 1,
                 "cells_per_condition": 2, "controls_per_cell_type": 2}
        wrong = [f"{k} = {getattr(self, k)}: must be at least {n}" for k, n in least.items() if getattr(self, k) < n]
        wrong += [f"{k} = {getattr(self, k)}: must be above 0" for k in ("target_sum", "depth", "effect")
                  if not 0 < getattr(self, k) < np.inf]
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout = {self.dropout}: must be at least 0 and below 1")
        if self.action == "preprocess" and not self.input:
            wrong.append("preprocess needs counts: --input=FILE.h5ad")
        return wrong


STATE_ALIASES = {"adata": "input"}  # the source's name


def log_normalized(data: np.ndarray, totals: np.ndarray, target_sum: float) -> np.ndarray:
    """log(1 + target_sum x / total), float32."""
    return np.log1p(data * (target_sum / totals)).astype(np.float32)


def variable_genes(sums: np.ndarray, squares: np.ndarray, cells: int, most: int, bins: int = 20) -> dict:
    """The genes of largest normalised dispersion (Seurat's, Satija et al. 2015, as scanpy does it), as columns of var.

    Dispersion is log(variance / mean) of the normalised counts, standardised within `bins` equal ranges of the log
    mean; a gene alone in its range gets 1, one that never varies is not taken, and ties are all taken.

    Args:
        sums, squares: of expm1(X) over the cells, float64 [genes].
    """
    mean = sums / cells
    spread = squares / cells - mean**2
    variance = np.where(spread > 1e-12 * mean**2, spread, 0) * cells / max(cells - 1, 1)  # below, it is rounding
    mean[mean == 0] = 1e-12
    ratio = variance / mean
    dispersion, level = np.log(np.where(ratio > 0, ratio, np.nan)), np.log1p(mean)
    edges = np.linspace(level.min(), level.max(), bins + 1)
    group, score = np.searchsorted(edges[1:-1], level), np.full(len(mean), np.nan)
    for b in range(bins):
        here = (group == b) & np.isfinite(dispersion)
        center, scale = (dispersion[here].mean(), dispersion[here].std(ddof=1)) if here.sum() > 1 else (0, 1)
        score[here] = (dispersion[here] - center) / (scale or np.nan) if here.sum() > 1 else 1
    known = np.sort(score[np.isfinite(score)])[::-1]
    chosen = score >= known[min(most, len(known)) - 1] if len(known) else np.zeros(len(mean), bool)
    return {"highly_variable": chosen, "means": level, "dispersions": dispersion, "dispersions_norm": score}


def checked_counts(cells: H5ad, cfg: StateConfig) -> tuple[Matrix, dict, bool]:
    """(matrix, its check, whether it is log1p already); DataError if it is neither that nor counts."""
    columns = {k: getattr(cfg, k) for k in ("pert_col", "cell_type_key", "batch_col") if getattr(cfg, k)}
    if cfg.control_pert:
        columns.setdefault("pert_col", "gene")
    names = {key: cells.column(column)[1] for key, column in columns.items()}
    if cfg.control_pert and cfg.control_pert not in names["pert_col"]:
        raise DataError(f"{cells.path}: no cell has {columns['pert_col']} = {cfg.control_pert!r}"
                        + suggest(cfg.control_pert, names["pert_col"]))
    matrix = cells.matrix(cfg.layer or None)
    if matrix.shape[1] != cells.n_vars:
        raise DataError(f"{matrix.where} has {matrix.shape[1]} columns for {cells.n_vars} genes: choose X or a layer")
    found = matrix.check()
    log1p = looks_log1p(found)
    if found["min"] < 0 or not (found["integer"] or log1p):
        raise DataError(f"{matrix.where} holds values from {found['min']:g} to {found['max']:g}"
                        + ", fractions among them" * (not found["integer"]) + ": neither counts nor log1p; if the "
                        f"counts are elsewhere, use --layer= one of {', '.join(cells.keys)}")
    return matrix, found, log1p


def expression(matrix: Matrix, totals: np.ndarray, target_sum: float | None, text: str) -> Iterator[tuple]:
    """(rows written, values, row of each within the block, indices, counts) of every block; no zeros, no empty cells.

    values are log1p of the normalised counts; with target_sum None, what the matrix holds.
    """
    done = 0
    for start, stop, block in progress(matrix.blocks(), text, "blocks"):
        data, indices, pointers = as_csr(block)
        solid = data != 0
        row = np.repeat(np.arange(start, stop), np.diff(pointers))[solid]
        data, indices, kept = data[solid], indices[solid], (totals[start:stop] > 0).cumsum()
        values = log_normalized(data, totals[row], target_sum) if target_sum else data
        yield slice(done, done + int(kept[-1])), values, kept[row - start] - 1, indices, data
        done += int(kept[-1])


def write_expression(file: h5py.File, blocks: Iterator[tuple], shape: tuple, nnz: int, keep_counts: bool) -> np.ndarray:
    """X, and layers/counts if kept, of a new file; returns sums over cells of expm1(X) and its squares [2, genes]."""
    nodes = [matrix_space(group, name, shape, nnz)
             for group, name in ((file, "X"), (file["layers"], "counts"))[: 1 + keep_counts]]
    pointers, moments, filled = np.zeros(shape[0] + 1, np.int64), np.zeros((2, shape[1])), 0
    for rows, values, row, indices, counts in blocks:
        part = slice(filled, filled + len(values))
        for node, data in zip(nodes, (values, counts), strict=False):
            node["data"][part], node["indices"][part] = data, indices
        pointers[rows.start + 1 : rows.stop + 1] = filled + np.bincount(row, minlength=rows.stop - rows.start).cumsum()
        rate, filled = np.expm1(values.astype(np.float64)), part.stop
        moments += [np.bincount(indices, rate**power, shape[1]) for power in (1, 2)]
    for node in nodes:
        node["indptr"][...] = pointers
    return moments


def write_obsm(file: h5py.File, cells: H5ad, blocks: Iterator[tuple], chosen: np.ndarray, keep: np.ndarray) -> None:
    """obsm of a new file: X_hvg, the chosen genes [genes] of the blocks, and the kept rows of what the input has."""
    place, shape = chosen.cumsum() - 1, (int(keep.sum()), int(chosen.sum()))
    space = matrix_space(file["obsm"], "X_hvg", shape)
    for rows, values, row, indices, _ in blocks:
        block, taken = np.zeros((rows.stop - rows.start, shape[1]), np.float32), chosen[indices]
        block[row[taken], place[indices[taken]]] = values[taken]
        space[rows] = block
    for key in (k for k in cells.keys if k.startswith("obsm/") and k != "obsm/X_hvg"):
        matrix, done = cells.matrix(key), 0
        space = matrix_space(file["obsm"], key[5:], (shape[0], matrix.shape[1]))
        for start, stop, block in matrix.blocks():
            part = as_dense(block, matrix.shape[1])[keep[start:stop]]
            space[done : done + len(part)], done = part, done + len(part)


def preprocess(cfg: StateConfig) -> dict:
    """Counts of an h5ad -> X log1p CSR, obsm X_hvg; returns numbers of cells and genes.

    Three passes over blocks of rows: check, write X and sum up the genes, write X_hvg; memory does not grow with cells
    but for obs. Raises DataError for what is neither counts nor log1p, and for cells without counts unless drop_empty.
    """
    path = Path(cfg.output or Path(cfg.out_dir) / Path(cfg.input).name)
    if path.exists() and Path(cfg.input).exists() and path.samefile(cfg.input):
        raise DataError(f"{path} is the input: give another --output")
    with H5ad(cfg.input) as cells:
        matrix, found, log1p = checked_counts(cells, cfg)
        totals, target_sum = found["row_sums"], None if log1p else cfg.target_sum
        keep = totals > 0
        if (empty := int((~keep).sum())) and (not cfg.drop_empty or empty == cells.n_obs):
            first = int(keep.argmin())
            raise DataError(f"{matrix.where} has {empty:,} cells without any count, first cell {first} "
                            f"({cells.obs_names[first]}): leave them out with --drop_empty")
        shape = (int(keep.sum()), cells.n_vars)
        obs = {name: values[keep] for name, values in cells.frame("obs").items()}
        with new_h5ad(path, cells.obs_names[keep], obs, {"log1p": {}}) as file:
            blocks = expression(matrix, totals, target_sum, "expression")
            moments = write_expression(file, blocks, shape, found["nnz"], cfg.keep_counts)
            genes = variable_genes(*moments, shape[0], cfg.num_hvgs)
            if not (width := int(genes["highly_variable"].sum())):
                raise DataError(f"{matrix.where}: no gene differs between cells, so there are none to choose")
            write_frame(file, "var", cells.var_names, {**cells.frame("var"), **genes})
            blocks = expression(matrix, totals, target_sum, "X_hvg")
            write_obsm(file, cells, blocks, genes["highly_variable"], keep)
    print(f"preprocess: {shape[0]:,} cells ({empty:,} empty ones left out), {shape[1]:,} genes; "
          + ("log1p already, so kept as they are; " if log1p else f"counts to {cfg.target_sum:g} a cell, log1p; ")
          + f"X_hvg has the {width:,} most variable genes"
          + f", all that vary: num_hvgs is {cfg.num_hvgs:,}" * (width < cfg.num_hvgs) + f"; written to {path}")
    return {"cells": shape[0], "genes": shape[1], "hvgs": width, "dropped": empty, "log1p": log1p, "path": str(path)}


CONTROL = "non-targeting"


def make_populations(cfg: StateConfig) -> dict[str, np.ndarray]:
    """What the synthetic populations are made of, on log expression; K types, M = 2 pathways, P perturbations, G genes.

    A type has an activity in each pathway, seen in its control cells through the pathway's genes. Perturbation p adds
    shared[p] + activity @ modulated[p]: what it does to a new type can be read from that type's control cells, and
    neither the mean over the other types nor its basal expression alone says it. The activities of the training types
    lie on a circle, so that their mean is no guide, and those of the last type inside the hull, between two of them.
    """
    K, P, G = cfg.num_cell_types, cfg.num_perturbations, cfg.num_genes
    draw = counter_rng(cfg.seed, 0)
    angle = 2 * np.pi * np.append(np.arange(K - 1), 0.5) / (K - 1)
    radius = np.append(np.ones(K - 1), 0.9 * np.cos(np.pi / (K - 1)))
    touched = draw.random((P + 1, 1, G)) < 0.3  # of the genes; row 0 is the control
    touched[0] = False
    effects = cfg.effect * draw.normal(size=(P + 1, 3, G)) * touched
    return {
        "base": draw.normal(0, 0.8, G), "activity": radius[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1),
        "program": draw.normal(0, 0.15, (K, G)), "batch": draw.normal(0, 0.08, (cfg.num_batches, G)),
        "pathways": draw.normal(0, 0.8, (2, G)) * (draw.random((2, G)) < 0.3), "shared": effects[:, 0],
        "modulated": 1.2 * effects[:, 1:], "variation": draw.normal(0, 0.15, (3, G))}


def simulate(parts: dict, cell_type: np.ndarray, pert: np.ndarray, draw: np.random.Generator, cfg: StateConfig
             ) -> tuple[np.ndarray, np.ndarray]:
    """(counts [n, G], batch [n]) of cells of these types and perturbations (0 is the control)."""
    n = len(cell_type)
    batch = draw.integers(0, cfg.num_batches, n)
    activity = parts["activity"][cell_type] + draw.normal(0, 0.25, (n, 2))  # cells of a type differ in it too
    log_rate = (parts["base"] + parts["program"][cell_type] + activity @ parts["pathways"] + parts["batch"][batch]
                + draw.normal(size=(n, 3)) @ parts["variation"] + parts["shared"][pert]
                + np.einsum("nm,nmg->ng", activity, parts["modulated"][pert]))
    rate = np.exp(log_rate)
    rate *= cfg.depth * np.exp(draw.normal(0, 0.3, (n, 1))) / rate.sum(1, keepdims=True)
    kept = draw.random(rate.shape) >= cfg.dropout**rate
    return draw.poisson(rate) * kept, batch


def true_deltas(parts: dict, cfg: StateConfig, cells: int = 600) -> np.ndarray:
    """Expected log1p expression of perturbed cells minus control cells [K, P, G], as a mean over simulated cells.

    Control and perturbed cells share their generator's draws, so that their difference has little noise.
    """
    means = np.empty((cfg.num_cell_types, cfg.num_perturbations + 1, cfg.num_genes))
    for k, p in np.ndindex(means.shape[:2]):
        counts, _ = simulate(parts, np.full(cells, k), np.full(cells, p), counter_rng(cfg.seed, 2, k), cfg)
        means[k, p] = log_normalized(counts, np.maximum(counts.sum(1, keepdims=True), 1), cfg.target_sum).mean(0)
    return means[:, 1:] - means[:, :1]


def mean_pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over rows of the Pearson correlation of a and b [n, G]."""
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    return float(((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))).mean())


def noise_report(X: np.ndarray, cell_type: np.ndarray, pert: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Pearson of deltas with the truth, for the last cell type: of half its cells, and of the mean over other types."""
    K, P, G = truth.shape

    def deltas(k: int, part: slice) -> np.ndarray:
        means = np.stack([X[(cell_type == k) & (pert == p)][part].mean(0) for p in range(P + 1)])
        return means[1:] - means[0]

    whole = np.mean([deltas(k, slice(None)) for k in range(K - 1)], axis=0)
    halves = [mean_pearson(deltas(K - 1, slice(start, None, 2)), truth[-1]) for start in (0, 1)]
    return {"noise_ceiling": sum(halves) / 2, "perturbation_mean": mean_pearson(whole, truth[-1])}


def synthetic(cfg: StateConfig) -> dict:
    """Populations of known effects -> synthetic.h5ad, synthetic.toml, truth.npz; returns the noise report.

    truth.npz: delta [K, P, G], expected log1p expression over control, with cell_types, perturbations and genes.
    """
    parts, K, P, G = make_populations(cfg), cfg.num_cell_types, cfg.num_perturbations, cfg.num_genes
    types, perts, genes = ([f"{letter}{i:0{len(str(n - 1))}}" for i in range(n)]  # as sorted as text as they are here
                           for letter, n in (("c", K), ("p", P), ("g", G)))
    sizes = np.tile([cfg.controls_per_cell_type, *[cfg.cells_per_condition] * P], K)
    cell_type, pert = (np.repeat(x.ravel(), sizes) for x in np.indices((K, P + 1)))
    counts, batch = simulate(parts, cell_type, pert, counter_rng(cfg.seed, 1), cfg)
    X = log_normalized(counts, np.maximum(counts.sum(1, keepdims=True), 1), cfg.target_sum)
    truth = true_deltas(parts, cfg)
    found = noise_report(X, cell_type, pert, truth)
    obs = {"gene": np.array([CONTROL, *perts])[pert], "cell_type": np.array(types)[cell_type],
           "gem_group": np.array([f"b{i}" for i in range(cfg.num_batches)])[batch]}
    toml = (f'[datasets]\nsynthetic = "synthetic.h5ad"\n\n[training]\nsynthetic = "train"\n\n[zeroshot]\n'
            f'"synthetic.{types[-1]}" = "test"\n\n[fewshot."synthetic.{types[-2]}"]\nval = {json.dumps(perts[1::4])}\n')
    with Workshop(cfg.out_dir) as shop:
        write_h5ad(shop.folder / "synthetic.h5ad", (*as_csr(X), X.shape), obs, genes, {"X_hvg": X},
                   var={"highly_variable": np.ones(len(genes), bool)}, uns={"log1p": {}, "seed": cfg.seed},
                   layers={"counts": (*as_csr(counts.astype(np.float32)), X.shape)})
        np.savez(shop.folder / "truth.npz", delta=truth, cell_types=types, perturbations=perts, genes=genes)
        (shop.folder / "synthetic.toml").write_text(toml, encoding="utf-8")
        shop.finish("synthetic.h5ad", "truth.npz", "synthetic.toml")
    print(f"synthetic: {len(X):,} cells, {K} cell types, {P} perturbations and {CONTROL}, {len(genes)} genes; Pearson "
          f"delta with the truth on {types[-1]}: {found['noise_ceiling']:.3f} of half its own cells (noise ceiling), "
          f"{found['perturbation_mean']:.3f} of the mean over the other types; written to {cfg.out_dir}")
    return {"cells": len(X), **found}


def state(cfg: StateConfig) -> dict:
    return preprocess(cfg) if cfg.action == "preprocess" else synthetic(cfg)


# ---------------------------------------------------------------------------------------------------------------
# Inspection
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class InspectConfig:
    tokens: int = 20  # most frequent tokens to show
    # of an experiment's .toml: settings of train_state.py
    pert_col: str = "gene"
    cell_type_key: str = "cell_type"
    batch_col: str | None = "gem_group"
    control_pert: str = "non-targeting"
    strict: bool = True
    zeroshot_controls: bool = True
    val_fraction: float = 0.1

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


def read_stream(folder: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(meta.json, {"train": tokens, "val": tokens} as memory maps) of a folder by `text` or `planted`.

    Raises DataError for files that are missing, cut short, or not of one preparation.
    """
    folder, maker = Path(folder), "make it with python prepare_data.py text or planted"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype, streams = np.dtype(meta["dtype"]).newbyteorder("<"), {}
        for split in ("train", "val"):
            path, count = folder / f"{split}.bin", meta[f"{split}_tokens"]
            if path.stat().st_size != count * dtype.itemsize:
                raise DataError(f"{path} has {path.stat().st_size:,} bytes, but meta.json says {count:,} tokens of "
                                f"{dtype.name}: prepare the folder again")
            streams[split] = np.memmap(path, dtype, "r")
    except DataError:
        raise
    except OSError as e:
        raise DataError(f"{e.filename}: {e.strerror}; {maker}") from e
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"{folder / 'meta.json'} is damaged or foreign ({type(e).__name__}: {e}); {maker}") from e
    return meta, streams


def inspect_stream(folder: Path, cfg: InspectConfig) -> dict:
    """Print what train.bin and val.bin of a folder hold; returns it with the list of problems found."""
    meta, streams = read_stream(folder)
    vocab_size, problems, documents = meta["vocab_size"], [], {}
    print(f"{folder}: {meta['kind']} from {meta['source']}, vocabulary {vocab_size:,}, {meta['dtype']}")
    spelled = load_tokenizer(folder / meta["tokenizer"]) if meta["tokenizer"] else None
    if spelled and spelled.hash() != meta["tokenizer_hash"]:
        problems.append(f"{meta['tokenizer']} is not the tokenizer that made these tokens")
    names = {i: f"<{name}>" for name, i in spelled.special.items()} if spelled else {meta["bos_id"]: "<bos>"}
    for split, tokens in streams.items():
        counts = np.zeros(vocab_size, np.int64)
        for begin in range(0, len(tokens), 1 << 22):
            block = tokens[begin : begin + (1 << 22)]
            counts += np.bincount(block[block < vocab_size], minlength=vocab_size)
        if beyond := len(tokens) - counts.sum():
            problems.append(f"{split}.bin: {beyond:,} tokens are beyond vocab_size = {vocab_size}")
        mark, edge = (meta["bos_id"], tokens[0]) if meta["kind"] == "planted" else (meta["eos_id"], tokens[-1])
        documents[split] = int(counts[mark])
        if edge != mark or documents[split] != meta[f"{split}_documents"]:
            problems.append(f"{split}.bin: {documents[split]:,} documents have the token {mark} where they should, not "
                            f"the {meta[f'{split}_documents']:,} of meta.json")
        top = counts.argsort(kind="stable")[::-1][: cfg.tokens].tolist()
        words = [names.get(t) or (repr(spelled.decode([t])) if spelled else str(t)) for t in top if counts[t]]
        print(f"  {split:<5} {len(tokens):>13,} tokens {documents[split]:>9,} documents; {np.count_nonzero(counts):,} "
              f"tokens occur; most frequent: {', '.join(words)}")
    report(problems)
    return {"tokens": {split: len(tokens) for split, tokens in streams.items()}, "documents": documents,
            "problems": problems}


def report(problems: list[str]) -> None:
    for problem in problems:
        print(f"  problem: {problem}")
    print("  no problem found" if not problems else f"  {len(problems)} problems")


def inspect_cells(path: str) -> dict:
    """Print what an h5ad file holds; returns it with the list of problems found."""
    problems, columns, matrices = [], {}, {}
    with H5ad(path) as cells:
        print(f"{path}: {cells.n_obs:,} cells, {cells.n_vars:,} genes")
        for name in cells.columns:
            try:
                columns[name] = cells.column(name)[1]
            except DataError as e:
                problems.append(str(e))
                continue
            shown = ", ".join(columns[name][:6]) + ", ..." * (len(columns[name]) > 6)
            print(f"  obs {name:<20} {len(columns[name]):>8,} values: {shown}")
        for kind, names in (("cells", cells.obs_names), ("genes", cells.gene_names)):
            if repeated := len(names) - len(set(names.tolist())):
                problems.append(f"{repeated:,} {kind} have the name of an earlier one")
        for key in cells.keys:
            try:
                matrix = cells.matrix(key)
                found = matrix.check()
            except DataError as e:
                problems.append(str(e))
                continue
            kind = ("log1p" if looks_log1p(found) else "negative values" if found["min"] < 0 else
                    "counts" if found["integer"] else "neither counts nor log1p")
            if key == "X" and not (found["min"] >= 0 and kind in ("log1p", "counts")):
                problems.append(f"X holds {kind}")
            if kind == "counts" and (empty := int((found["row_sums"] == 0).sum())):
                problems.append(f"{key}: {empty:,} cells have no count")
            matrices[key] = {"shape": matrix.shape, "format": matrix.format, "kind": kind}
            print(f"  {key:<24} {matrix.shape[0]:,} x {matrix.shape[1]:,} {matrix.format}, {kind}, "
                  f"{found['nnz'] / math.prod(matrix.shape):.1%} not 0, {found['min']:g} to {found['max']:g}")
    report(problems)
    return {"columns": columns, "matrices": matrices, "problems": problems}


def holds_cells(path: str) -> bool:
    """Whether an HDF5 file of any name is one of cells."""
    if not Path(path).is_file() or not h5py.is_hdf5(path):
        return False
    with contextlib.suppress(OSError), h5py.File(path) as file:
        return "obs" in file
    return False


def inspect(path: str, cfg: InspectConfig) -> dict:
    """Print what an HDF5 file, a folder of train.bin or an experiment on cells holds, and what is wrong with it."""
    if Path(path).suffix == ".toml":
        import train_state

        return train_state.inspect(path, **{k: v for k, v in vars(cfg).items() if k != "tokens"})
    if Path(path).suffix == ".h5ad" or holds_cells(path):
        return inspect_cells(path)
    if Path(path).is_dir() or Path(path).suffix in (".bin", ".json"):
        return inspect_stream(Path(path) if Path(path).is_dir() else Path(path).parent, cfg)
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
    report(problems)
    return {"chunks": {name: size for name, size, _ in rows}, "documents": {name: docs for name, _, docs in rows},
            "problems": problems}


# ---------------------------------------------------------------------------------------------------------------
JOBS = {"text": (TextConfig, prepare_text), "planted": (PlantedConfig, planted), "arxiv": (ArxivConfig, arxiv),
        "ergodic": (ErgodicConfig, ergodic), "state": (StateConfig, state), "inspect": (InspectConfig, inspect)}


def make_once(path: Path, *job: str) -> None:
    """Do a job whose last file is `path`, if that is not there: rank 0 does, the others wait, ten minutes at most."""
    if not path.exists() and int(os.environ.get("RANK", 0)) == 0:
        main(list(job))
    for _ in range(6_000):
        if path.exists():
            return
        time.sleep(0.1)


def main(argv: list[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if argv else 2)
    if argv[0] not in JOBS:
        near = difflib.get_close_matches(argv[0], JOBS, n=1)
        fail(f"no job {argv[0]!r}" + (f", did you mean {near[0]!r}?" if near else "") + f" Jobs: {', '.join(JOBS)}")
    if argv[0] == "state" and argv[1:] and re.fullmatch(r"\w+", argv[1]):  # the action as a bare word
        actions = ("synthetic", "preprocess", "inspect")
        if argv[1] not in actions:
            fail(f"no action {argv[1]!r} of state{suggest(argv[1], actions)}")
        argv = argv[1:] if argv[1] == "inspect" else ["state", f"--action={argv[1]}", *argv[2:]]
    settings, work = JOBS[argv[0]]
    positional = list(islice((a for a in argv[1:] if not a.startswith("-")), 1)) if argv[0] == "inspect" else []
    if argv[0] == "inspect" and not positional and "--help" not in argv and "-h" not in argv:
        fail("inspect needs a file: python prepare_data.py inspect data/arxiv/train.h5, or FILE.h5ad, or FILE.toml")
    cfg = configure(settings, [a for a in argv[1:] if a not in positional], STATE_ALIASES if work is state else None)
    try:
        return work(*positional, cfg)
    except DataError as e:
        fail(str(e))


if __name__ == "__main__":
    sys.modules["prepare_data"] = sys.modules["__main__"]  # a train script that imports this raises the same DataError
    main()
