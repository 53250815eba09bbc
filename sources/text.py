"""Text: documents from files, the hub or Python's own documentation, and streams of tokens with their meta.json."""

import ast
import base64
import contextlib
import csv
import difflib
import hashlib
import json
import math
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common.errors import DataError
from sources.shared import Workshop, optional, progress, report
from sources.tokenizer import ESCAPED, SPECIAL, Tokenizer, load_tokenizer, readable, train_bpe, train_char


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


HUB = {"tinystories": ("roneneldan/TinyStories", "", True), "c4_en": ("allenai/c4", "en", True),
       "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", True),
       "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", True),
       "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", False),
       "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", False),
       "wiki40b_en": ("google/wiki40b", "en", True), "cc_news": ("vblagoje/cc_news", "", False)}
TEXT_FILES = (".txt", ".json", ".jsonl", ".csv", ".parquet")
LEAST, MOST, BLOCK = 2_000, 1 << 16, 1 << 20  # bytes of a document cut from a running text; read at once


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


def source_records(source: str, cfg, split: str) -> Iterator[tuple[str, dict]]:
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


def documents_of(source: str, cfg, split: str) -> Iterator[str]:
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


def gather_text(cfg, spool: Spool) -> None:
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


def text_tokenizer(cfg, spool: Spool) -> Tokenizer:
    """Train the tokenizer that the settings ask for."""
    more = {"lowercase": True} if cfg.lowercase else {}
    texts = progress(sampled(spool, cfg.tokenizer_chars), "training the tokenizer", "doc")
    texts = (text.lower() if cfg.lowercase else text for text in texts)
    if cfg.tokenizer == "char":
        return train_char(texts, cfg.vocab_size, cfg.min_frequency, **more)
    return train_bpe(texts, cfg.vocab_size or 4_096, special=list(SPECIAL), **more)


def prepare_text(*, input: str = "", text_column: str = "text", max_bytes: int | None = None, max_documents: int |
                 None = None, val_fraction: float = 0.05, val_input: str = "", tokenizer: str = "bpe", vocab_size: int
                 | None = None, min_frequency: int = 1, lowercase: bool = False, tokenizer_chars: int = 20_000_000,
                 out_dir: str = "data/text", seed: int = 1337, threads: int = 0) -> dict:
    """Documents -> train.bin, val.bin, tokenizer.json, meta.json. Returns what meta.json says."""
    cfg = SimpleNamespace(**locals())
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


def inspect_stream(folder: Path, cfg) -> dict:
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
