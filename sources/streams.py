"""A folder of token streams, train.bin and val.bin, with their meta.json: written, read and held against digests."""

import json
import shlex
from pathlib import Path

import numpy as np

from common.errors import DataError, regular_file
from common.telling import doing, note
from sources.digests import CHECKED_WHOLE, check_file, of_file, sha256
from sources.plain_json import read_json
from sources.shared import counted, nearest, report
from sources.tokenizer import Tokenizer, load_tokenizer

PIECE = 1 << 22  # tokens of a stream that are looked at at once
MOST_TOKENS = 1 << 31  # of a vocabulary
MAKER = "make it with python prepare_data.py text or planted"
RAW = (".txt", ".jsonl", ".json", ".csv", ".parquet")  # names of files of text end so
KINDS = ("text", "planted")
DTYPES = ("uint16", "uint32")
SKIPPED = ("train_plans.npy", "tokenizer.json")  # when training starts: not read, and known by its own hash
COUNTS = ("vocab_size", "train_tokens", "val_tokens", "train_documents", "val_documents")  # 1 or more
WORDS = ("kind", "dtype", "tokenizer", "tokenizer_hash", "source")
IDS = ("eos_id", "bos_id", "pad_id", "unk_id")
LENGTHS = ("document_length", "chunk_size")  # of planted documents


def stream_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_meta(folder: Path, kind: str, vocab_size: int, special: dict, sizes: dict, files: list[str], **more) -> dict:
    """meta.json, from {split: {tokens, documents, bytes}}; ids of special tokens that there are not are null.

    files: names of all others in the folder, which must be complete, for their digests. A digest of itself comes last.
    """
    meta = {"kind": kind, "vocab_size": vocab_size, "dtype": stream_dtype(vocab_size).name}
    for name in ("eos", "bos", "pad", "unk"):
        meta[f"{name}_id"] = special.get(name)
    for what in ("tokens", "documents"):
        for split, facts in sizes.items():
            meta[f"{split}_{what}"] = facts[what]
    digests = {name: of_file(folder / name) for name in files}
    for split in sizes:
        meta[f"{split}_sha256"] = digests[f"{split}.bin"]["sha256"]
    meta["val_bytes"] = sizes["val"].get("bytes")
    meta |= {**more, "files": digests}
    meta["digest"] = sealed(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return meta


def sealed(meta: dict) -> str:
    """The digest of all that meta.json says but for this."""
    facts = {name: value for name, value in meta.items() if name != "digest"}
    return sha256([json.dumps(facts, sort_keys=True)])


def read_meta(folder: str | Path) -> dict:
    """What meta.json of a folder says, as it was written.

    Raises DataError for one that is missing, damaged or of something else, and for a tokenizer outside the folder.
    """
    path = Path(folder) / "meta.json"
    if not path.exists():
        raise DataError(f"{path}: no such file{how_to_make(Path(folder))}")
    meta = read_json(path)
    has_both = "digest" in meta and "files" in meta
    has_none = "digest" not in meta and "files" not in meta
    if not has_none and not (has_both and meta["digest"] == sealed(meta)):
        raise DataError(f"{path} is not as it was prepared, by its digest: prepare the folder again")
    wrong = wrong_fact(meta)
    if wrong:
        value = repr(meta[wrong]) if wrong in meta else "nothing"
        raise DataError(f"{path} is damaged or foreign: it says {value:.60} for {wrong}; {MAKER}")
    return meta


def how_to_make(folder: Path) -> str:
    """The end of a sentence about a folder of tokens that is none: which one may be meant, or what makes it."""
    if folder.is_file() or any(file.suffix in RAW for file in folder.glob("*")):
        place = Path("data") / (folder.resolve().stem or "text")
        if place.resolve() == folder.resolve():
            place = Path(f"{place}_tokens")
        making = shlex.join(["python", "prepare_data.py", "text", f"--input={folder}", f"--out_dir={place}"])
        return f". {folder} holds text, and data is a folder of tokens made of it: {making}, then data={place}"
    prepared = [meta.parent.name for meta in Path("data").glob("*/meta.json")]
    job = "planted" if folder.name.startswith("planted") else "text --input=FILE_OR_FOLDER"
    near = nearest(folder.name, prepared)
    meant = f"; did you mean {Path('data') / near}? Or" if near else ";"
    return f"{meant} make it with python prepare_data.py {job} --out_dir={folder}"


def wrong_fact(meta: dict) -> str:
    """The name of what cannot be, in what meta.json says; "" where all can."""
    planted = meta.get("kind") == "planted"
    for name in WORDS:
        if not isinstance(meta.get(name), str):
            return name
    counts = COUNTS + LENGTHS if planted else COUNTS
    for name in counts:
        if not is_whole(meta.get(name), 1):
            return name
    last = meta["vocab_size"] - 1
    for name in IDS:
        number = meta.get(name)
        if number is not None and not is_whole(number, 0, last):
            return name
    val_bytes = meta.get("val_bytes")
    possible = {
        "kind": meta["kind"] in KINDS,
        "dtype": meta["dtype"] in DTYPES,
        "vocab_size": meta["vocab_size"] <= MOST_TOKENS,
        "tokenizer": is_inside(meta["tokenizer"]),
        "val_bytes": val_bytes is None or is_whole(val_bytes, 0),
        "version": not planted or isinstance(meta.get("version"), str),
        "bos_id": not planted or meta.get("bos_id") is not None,
        "files": are_digests(meta.get("files", {})),
    }
    for name, is_possible in possible.items():
        if not is_possible:
            return name
    for split in ("train", "val"):
        if not is_digest_of(meta, split):
            return f"{split}_sha256"
    return ""


def is_whole(value, least: int, most: float = float("inf")) -> bool:
    """Whether a value is a whole number in a range; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_inside(name: str) -> bool:
    """Whether a name is that of a file in the folder itself; none is too."""
    return not name or name == Path(name).name and name != ".." and "\0" not in name


def are_digests(files) -> bool:
    """Whether a value is {name of a file: what `digests.of_file` says of it}."""
    from common.plain import fits  # which brings torch: who writes a folder does without

    return fits(files, {str: {"bytes": int, "sha256": str, "sample": str}}) and all(map(is_inside, files))


def is_digest_of(meta: dict, split: str) -> bool:
    """Whether the digest of a split's tokens, which is their identity, is that of its file; earlier ones have none."""
    digest = meta.get(f"{split}_sha256")
    if "files" in meta:
        return digest == meta["files"].get(f"{split}.bin", {}).get("sha256")
    return digest is None or isinstance(digest, str)


def read_stream(folder: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """open_stream, with the files that training reads held against their digests, of the large ones a sample."""
    meta, streams = open_stream(folder)
    verify(Path(folder), meta, whole=False)
    return meta, streams


def open_stream(folder: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(meta.json, {"train": tokens, "val": tokens} as memory maps) of a folder by `text` or `planted`.

    Raises DataError for files that are missing, cut short, or not of one preparation.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")  # on every machine
    streams = {}
    for split in ("train", "val"):
        path = regular_file(folder / f"{split}.bin")
        count = meta[f"{split}_tokens"]
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise DataError(f"{path} has {size:,} bytes, but meta.json says {count:,} tokens of {dtype.name}: "
                            "prepare the folder again")
        streams[split] = np.memmap(path, dtype, "r")
    return meta, streams


def verify(folder: Path, meta: dict, whole: bool) -> None:
    """Hold the files of a folder against the digests in its meta.json; raises DataError for one that has changed.

    Earlier versions wrote digests of the tokens alone, or none, which is told.
    """
    if "files" not in meta:
        for split in ("train", "val"):
            path = folder / f"{split}.bin"
            digest = meta.get(f"{split}_sha256")
            size = path.stat().st_size
            if digest and (whole or size <= CHECKED_WHOLE):
                check_file(path, {"bytes": size, "sha256": digest}, whole=True)
        note(f"{folder} was prepared by an earlier version, without checksums of all its files: prepared again by "
             "prepare_data.py it has them, and damage is found")
        return
    for name, facts in meta["files"].items():
        if whole or name not in SKIPPED:
            check_file(regular_file(folder / name), facts, whole)


def inspect_stream(folder: Path, tokens: int = 20) -> dict:
    """Print what train.bin and val.bin of a folder hold, the most frequent tokens too; returns it with the problems."""
    meta, streams = open_stream(folder)
    vocab_size = meta["vocab_size"]
    problems = []
    documents = {}
    print(f"{folder}: {meta['kind']} from {meta['source']}, vocabulary {vocab_size:,}, {meta['dtype']}")
    tokenizer = load_tokenizer(folder / meta["tokenizer"]) if meta["tokenizer"] else None
    if tokenizer and tokenizer.hash() != meta["tokenizer_hash"]:
        problems.append(f"{meta['tokenizer']} is not the tokenizer that made these tokens")
    for split, stream in streams.items():
        with doing(f"reading {split}.bin, {counted(len(stream), 'token')}"):
            counts = count_stream(stream, vocab_size)
        beyond = len(stream) - counts.sum()
        if beyond:
            those = counted(beyond, "token is", "tokens are")
            problems.append(f"{split}.bin: {those} beyond vocab_size = {vocab_size}")
        # A document of text ends with eos, a planted one begins with bos.
        planted = meta["kind"] == "planted"
        mark = meta["bos_id"] if planted else meta["eos_id"]
        edge = stream[0] if planted else stream[-1]
        documents[split] = int(counts[mark])
        if edge != mark or documents[split] != meta[f"{split}_documents"]:
            those = counted(documents[split], "document has", "documents have")
            problems.append(f"{split}.bin: {those} the token {mark} where they should, not "
                            f"the {meta[f'{split}_documents']:,} of meta.json")
        top = counts.argsort(kind="stable")[::-1][:tokens].tolist()
        words = [spelled(t, tokenizer, meta["bos_id"]) for t in top if counts[t]]
        tokens_held = counted(len(stream), "token")
        documents_held = counted(documents[split], "document")
        kinds = counted(np.count_nonzero(counts), "token occurs", "tokens occur")
        print(f"  {split:<5} {tokens_held:>20} {documents_held:>19}; {kinds}; most frequent: {', '.join(words)}")
    if problems:
        report(problems)
    with doing(f"taking checksums of {folder}"):
        verify(folder, meta, whole=True)
    known = meta.get("files") or {}
    if not known:  # of an earlier version
        for split in streams:
            known[f"{split}.bin"] = {"sha256": meta.get(f"{split}_sha256")}
    for name, facts in known.items():
        if facts["sha256"]:
            print(f"  {name} is as it was prepared: sha256 {facts['sha256']}")
        else:
            print(f"  {name} was prepared without a digest: whether it has changed cannot be said")
    if not problems:  # known only now
        report(problems)
    sizes = {split: len(stream) for split, stream in streams.items()}
    return {"tokens": sizes, "documents": documents, "problems": problems}


def count_stream(stream: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token of the vocabulary occurs [V]."""
    counts = np.zeros(vocab_size, np.int64)
    for begin in range(0, len(stream), PIECE):
        block = stream[begin : begin + PIECE]
        counts += np.bincount(block[block < vocab_size], minlength=vocab_size)
    return counts


def spelled(token: int, tokenizer: Tokenizer | None, bos: int) -> str:
    """A token as a reader wants to see it."""
    if tokenizer is None:
        return "<bos>" if token == bos else str(token)
    for name in ("eos", "bos", "unk", "pad"):  # one token may be several of them
        if tokenizer.special.get(name) == token:
            return f"<{name}>"
    return repr(tokenizer.decode([token]))
