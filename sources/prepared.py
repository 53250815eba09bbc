"""Prepared text held against what somebody wants: the settings of prepare_data.py text that should have made it."""

import shlex
from pathlib import Path

from common.errors import DataError
from sources.corpus import folder_of
from sources.streams import read_meta
from sources.tokenizer import OURS, Tokenizer, load_tokenizer

DATA = Path("data")


def command(prepare: dict, folder: str | Path) -> str:
    """The command line that makes the folder."""
    words = ["python", "prepare_data.py", "text"]
    for name, value in (prepare | {"out_dir": str(folder)}).items():
        # A switch has no value.
        words.append(f"--{name}" if value is True else f"--{name}={value}")
    return shlex.join(words)


def words_for(source: str | None, kind: str, vocab_size: int | None, lowercase: bool) -> str:
    """A text, unless it may be any, and its vocabulary in a few words."""
    words = [source, "in"] if source else []
    if lowercase:
        words.append("lower case")
    words.append(kind)
    if vocab_size:
        words.append(f"of {vocab_size:,} tokens")
    return " ".join(words)


def kind_of(tokenizer: Tokenizer) -> str:
    """Byte-level BPE is that whoever trained it, and so are characters."""
    return {"huggingface": "bpe", "listed": "char"}.get(tokenizer.kind, tokenizer.kind)


def wanted(prepare: dict) -> str:
    """What the settings ask for, in words. Raises DataError for a tokenizer that cannot be read."""
    kind = prepare.get("tokenizer", "bpe")
    if kind not in OURS:  # a file
        kind = kind_of(load_tokenizer(kind))
    return words_for(prepare.get("input"), kind, prepare.get("vocab_size"), prepare.get("lowercase", False))


def found(folder: Path, prepare: dict) -> str:
    """What a folder holds in the words of `wanted`, and with no more than that tells. Raises DataError."""
    try:
        meta = read_meta(folder)
        if not meta["tokenizer"]:
            return f"{meta['kind']} tokens, and no text"
        tokenizer = load_tokenizer(folder / meta["tokenizer"])
        source = meta["source"] if "input" in prepare else None
    except DataError as error:
        raise DataError(f"{folder} is no folder of prepare_data.py text: {error}") from error
    # Where no size is asked for, as of characters, which are as many as the text has, none is told.
    size = tokenizer.vocab_size if prepare.get("vocab_size") else None
    return words_for(source, kind_of(tokenizer), size, bool(tokenizer.spec.get("lowercase")))


def fits(folder: Path, prepare: dict) -> bool:
    """Whether a folder is what the settings ask for: text, kind and size of the vocabulary, lower case."""
    try:
        return found(folder, prepare) == wanted(prepare)
    except DataError:
        return False


def place_for(prepare: dict) -> Path:
    """Where text of these settings is, or else may be put: a folder of data/ named after it."""
    name = Path(prepare["input"]).stem
    named = f"{name}_{Path(prepare.get('tokenizer', 'bpe')).stem}"
    folders = [DATA / name, DATA / named, DATA / f"{named}_{prepare.get('vocab_size', 'other')}"]
    for folder in folders:
        if folder.exists() and fits(folder, prepare):
            return folder
    for folder in folders:
        if not folder.exists():
            return folder
    return folders[-1]


def check_prepared(name: str, prepare: dict | None) -> None:
    """Raises DataError where the folder, or data/NAME, is missing or not what the settings ask for (None: anything).

    What it says ends with the command that makes it.
    """
    if not prepare:
        return
    folder = folder_of(name)
    if not folder.exists():
        raise DataError(f"there is no {name}: {command(prepare, name)}")
    holds, wants = found(folder, prepare), wanted(prepare)
    if holds == wants:
        return
    if "input" not in prepare:
        meta = read_meta(folder)
        prepare = {"input": meta["source"] if meta["tokenizer"] else "FILE.txt"} | prepare
    place = place_for(prepare)
    other = f"{folder}_new" if place.exists() and not fits(place, prepare) else place
    raise DataError(
        f"{folder} holds {holds}, but the settings ask for {wants}: {command(prepare, other)}, and --data={other}"
    )
