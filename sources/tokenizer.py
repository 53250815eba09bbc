"""Tokenizers: byte-level BPE and characters of our own, and those of tiktoken and Hugging Face, behind one class."""

import base64
import contextlib
import hashlib
import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import tiktoken

from common.errors import DataError, reason
from sources.plain_json import read_json
from sources.shared import optional

PATTERN = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"""
           r"""\s+(?!\S)|\s+""")  # how text is split before BPE: GPT-4's
SPECIAL = ("bos", "eos", "unk", "pad")
OURS = {  # kinds that a tokenizer.json of this repository may be of, and what each says
    "char": {"characters": str},
    "bpe": {"pattern": str, "tokens": list},
    "gpt2": {},
}
EXTRA = {"kind": str, "lowercase": bool, "special": list}  # said by some
PROBES = (  # that every tokenizer must take; long runs are what patterns that go back and forth die of
    "The quick brown fox doesn't jump over 1234567 lazy dogs: \u00e4\u00df \u4e2d\u6587 \U0001f600\r\n\n\tx  y\n ",
    *(f"{run * 2_000}!{run * 40}" for run in ("a", "A", "7", " ", ".", "\n", "ab ", "\u00e4")),
)
PROBE_S = 30  # seconds that all of them may take; they take a hundredth of one
HALF_BYTES = 16  # tokens that spell what has none of its own, two a byte
FIRST_HALF = 0xD800  # they are decoded to surrogates from here on, which no text holds
ESCAPED = re.compile("([\udc80-\udcff])")  # a byte that is no UTF-8, as Python's surrogateescape writes it
HALVES = re.compile("([\ud800-\ud80f])([\ud800-\ud80f])?")  # half bytes, while Characters decodes
MOST_SPACE = 1 << 16  # characters: the regular expressions of tiktoken and rustbpe die of about 500,000 in a row
LONG_SPACE = re.compile(rf"(?<!\s)\s{{{MOST_SPACE + 1},}}")  # the look back keeps the search linear
FOREIGN = {  # special tokens in Hugging Face's files, the first of them that there is
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]"),
    "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[SEP]"),
    "unk": ("<unk>", "[UNK]"),
    "pad": ("<pad>", "[PAD]"),
}


class Characters:
    """A vocabulary of characters, with those methods of tiktoken.Encoding that Tokenizer uses.

    Ids: bos, eos, unk, pad, then 16 half bytes, then the characters. A character that is not among them, or a byte
    that is no UTF-8, is spelled in half bytes, so that nothing is unknown: unk is for models that must have one.
    """

    class Spelling(dict):
        """{character: its ids}; a character that is asked for and not there is spelled, once."""

        def __missing__(self, character: str) -> list[int]:
            halves = character.encode("utf-8", "surrogateescape").hex()
            self[character] = [len(SPECIAL) + int(half, 16) for half in halves]
            return self[character]

    def __init__(self, characters: str):
        special = ["", "", "\ufffd", ""]  # of SPECIAL only unk is seen
        halves = [chr(FIRST_HALF + half) for half in range(HALF_BYTES)]
        self.texts = [*special, *halves, *characters]
        self.n_vocab = len(self.texts)
        first = len(special) + len(halves)
        self.spelling = self.Spelling({c: [i] for i, c in enumerate(characters, first)})

    def encode_ordinary(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self.spelling.__getitem__, text)))

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The text of ids; for unk, and for a half byte without the other half, U+FFFD."""
        text = HALVES.sub(joined_halves, "".join([self.texts[i] for i in ids]))
        return text.encode("utf-8", "surrogateescape")


class ListedCharacters:
    """A vocabulary of APEL-R's files: characters by their place in a list, and unk for all others."""

    def __init__(self, texts: list[str], special: dict[str, int]):
        silent = set(special.values())
        self.texts = ["" if i in silent else text for i, text in enumerate(texts)]
        self.n_vocab = len(texts)
        self.places = {text: i for i, text in enumerate(self.texts) if text}
        self.unk = special["unk"]

    def encode_ordinary(self, text: str) -> list[int]:
        return [self.places.get(character, self.unk) for character in text]

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The text of ids; special tokens, unk too, have none."""
        return "".join([self.texts[i] for i in ids]).encode()


def joined_halves(match: re.Match) -> str:
    """The byte of two half bytes, escaped where it is no ASCII."""
    high, low = match.groups()
    if not low:
        return "\ufffd"
    value = 16 * (ord(high) - FIRST_HALF) + ord(low) - FIRST_HALF
    return chr(value) if value < 0x80 else chr(0xDC00 + value)


class Tokenizer:
    """Text to token ids and back. Kinds: char and bpe (ours), gpt2, huggingface (somebody's tokenizer.json), listed
    (APEL-R's characters).

    All but the foreign files lose nothing: decode(encode(text)) is the text and decode_bytes(encode(data)) the data,
    in lower case if the spec says "lowercase". `special` is {name: id}, of those of SPECIAL that there are.
    """

    def __init__(self, kind: str, engine, spec: dict, special: dict[str, int] | None = None):
        self.kind = kind
        self.engine = engine  # what encodes: tiktoken's, Characters, or that of Hugging Face
        self.spec = spec  # what the file says
        self.special = special or {}

    @property
    def vocab_size(self) -> int:
        return self.engine.get_vocab_size() if self.kind == "huggingface" else self.engine.n_vocab

    def hash(self) -> str:
        """The same for the same tokenizer only: sha256 of what its file says."""
        return hash_of(self.spec)

    def encode(self, text: str | bytes) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str | bytes], threads: int = 1) -> list[list[int]]:
        """Ids of every text; special tokens in a text are read as plain text."""
        texts = [readable(text) for text in texts]
        if self.spec.get("lowercase"):
            texts = [text.lower() for text in texts]
        with no_panic(f"the {self.kind} tokenizer"):
            return self._encode_batch(texts, threads)

    def _encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        if self.kind == "huggingface":
            texts = [ESCAPED.sub("\ufffd", text) for text in texts]
            return [row.ids for row in self.engine.encode_batch(texts, add_special_tokens=False)]
        if self.kind in ("char", "listed"):
            return [self.engine.encode_ordinary(text) for text in texts]
        plain = all(map(is_unicode, texts)) and not any(map(has_long_space, texts))
        if threads == 1 or not plain:  # a pool of one thread costs a third of the speed
            return [self._encode(text) for text in texts]
        return self.engine.encode_ordinary_batch(texts, num_threads=threads)

    def _encode(self, text: str) -> list[int]:
        """By tiktoken, which takes no escaped bytes, each of which is a token, and no endless white space."""
        if is_unicode(text) and not has_long_space(text):
            return self.engine.encode_ordinary(text)
        ids = []
        for part in ESCAPED.split(text):
            if ESCAPED.match(part):
                ids.append(self.engine.encode_single_token(part.encode("utf-8", "surrogateescape")))
                continue
            for piece in cut_space(part):
                ids += self.engine.encode_ordinary(piece)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; bos, eos and pad are none."""
        silent = {self.special.get(name) for name in ("bos", "eos", "pad")}
        heard = [int(i) for i in ids if int(i) not in silent]
        with no_panic(f"the {self.kind} tokenizer"):
            if self.kind == "huggingface":
                return self.engine.decode(heard).encode()
            return self.engine.decode_bytes(heard)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, path: Path) -> None:
        """A tokenizer.json; one of ours ends with its hash, by which damage is found."""
        spec = {**self.spec, "sha256": self.hash()} if self.kind in OURS else self.spec
        path.write_text(json.dumps(spec, ensure_ascii=False) + "\n", encoding="utf-8")


def hash_of(spec: dict) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def no_panic(what: str) -> Iterator[None]:
    """Make a panic of the Rust in tiktoken and tokenizers, which is no Exception of Python, a DataError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what} gave up on a text ({reason(error)}): its pattern or vocabulary is damaged, or goes "
                        "back and forth without end; use another") from error


def probe(tokenizer: Tokenizer, source: str | Path) -> Tokenizer:
    """The tokenizer, once it has taken some texts there and back. Raises DataError where it fails, or takes too long.
    """
    is_lossless = tokenizer.kind in OURS
    trouble = []

    def there_and_back() -> None:
        try:
            for text in PROBES:
                back = tokenizer.decode(tokenizer.encode(text))
                if is_lossless and back != (text.lower() if tokenizer.spec.get("lowercase") else text):
                    raise DataError(f"{text[:20]!r} comes back as {back[:20]!r}")
        except Exception as error:
            trouble.append(error)

    # A pattern may take forever inside the library, which no signal stops: a thread of its own can be left behind.
    thread = threading.Thread(target=there_and_back, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    if thread.is_alive():
        raise DataError(f"the tokenizer {source} takes more than {PROBE_S} s for a short text: its pattern goes back "
                        "and forth without end; use another")
    if trouble:
        raise DataError(f"the tokenizer {source} is damaged: {trouble[0]}") from trouble[0]
    return tokenizer


def has_long_space(text: str) -> bool:
    return len(text) > MOST_SPACE and LONG_SPACE.search(text) is not None


def cut_space(text: str) -> list[str]:
    """The text in pieces, cut within white space alone, none of which has more than MOST_SPACE of it in a row."""
    pieces, begin = [], 0
    if has_long_space(text):
        for match in LONG_SPACE.finditer(text):
            for end in range(match.start() + MOST_SPACE, match.end(), MOST_SPACE):
                pieces.append(text[begin:end])
                begin = end
    pieces.append(text[begin:])
    return pieces


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


# ------------------------------------------------------------------------------------------------------------ training


def train_bpe(texts: Iterable[str], vocab_size: int, exactly: bool = True, **more) -> Tokenizer:
    """Byte-pair encoding of vocab_size tokens, the 256 bytes among them (Sennrich et al. 2016), trained by rustbpe.

    exactly: else it has fewer where the texts support no more.
    more: special=[NAME, ...], which are the last of the vocab_size tokens, and lowercase=True.
    Raises DataError if vocab_size is below 256 and the special tokens, or more than the texts support.
    """
    special = len(more.get("special", ()))
    merged = vocab_size - special
    if merged < 256:
        least = f"256 tokens and {special} special ones" if special else "256 tokens"
        raise DataError(f"vocab_size = {vocab_size}: a byte-level vocabulary has at least {least}")
    import rustbpe

    trainer = rustbpe.Tokenizer()
    pieces = chain.from_iterable(map(cut_space, texts))
    trainer.train_from_iterator(pieces, merged, pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    if exactly and len(ranks) < merged:
        raise DataError(f"vocab_size = {vocab_size}, but the training text supports only {len(ranks) + special} "
                        "tokens: use fewer, or more text")
    listed = [base64.b64encode(bytes(token)).decode() for token, _ in ranks]
    return make_tokenizer({"kind": "bpe", "pattern": PATTERN, "tokens": listed, **more})


def train_char(texts: Iterable[str], vocab_size: int | None, min_frequency: int, **more) -> Tokenizer:
    """The characters that occur min_frequency times, most frequent first, at most vocab_size tokens in all."""
    counts = Counter()
    for text in texts:
        counts.update(text)
    frequent = [c for c in counts if counts[c] >= min_frequency]
    frequent.sort(key=lambda c: (-counts[c], c))  # a tie is the alphabet's
    if vocab_size is not None:
        frequent = frequent[: vocab_size - len(SPECIAL) - HALF_BYTES]
    return make_tokenizer({"kind": "char", "characters": "".join(frequent), **more})


# --------------------------------------------------------------------------------------------------------------- files


def copy_tokenizer(data: Path, folder: Path) -> None:
    """That of the data into a run folder, where sample.py reads prompts with it; one of other data does not stay."""
    target = folder / "tokenizer.json"
    if (data / target.name).exists():
        shutil.copyfile(data / target.name, target)
    else:
        target.unlink(missing_ok=True)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or gpt2. Raises DataError.

    Such a file is ours, APEL-R's {"itos": [...]}, or one of Hugging Face (pip install tokenizers).
    """
    if str(source) == "gpt2":
        return gpt2_tokenizer({"kind": "gpt2"})
    spec = read_spec(source)
    if "model" in spec:
        return probe(foreign_tokenizer(spec, source), source)
    if "kind" not in spec and "itos" not in spec:
        raise DataError(f"{source} is no tokenizer.json of this repository, of APEL-R or of Hugging Face tokenizers")
    try:
        if "itos" in spec:
            return probe(listed_tokenizer(spec), source)
        check_spec(spec)
        with no_panic(f"the tokenizer {source}"):
            return probe(make_tokenizer(spec), source)
    except DataError:
        raise
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, OverflowError) as error:
        raise DataError(f"cannot read the tokenizer {source}: {error}") from error


def read_spec(source: str | Path) -> dict:
    """What a tokenizer.json says, of whatever kind; of ours without the hash that it ends with. Raises DataError."""
    try:
        spec = read_json(source)
    except DataError as error:
        raise DataError(f"cannot read the tokenizer {source}: {error}") from error
    digest = spec.pop("sha256", None) if "kind" in spec else None
    if digest is not None and digest != hash_of(spec):
        raise DataError(f"the tokenizer {source} is damaged: it is not what was saved, by the sha256 in it; copy or "
                        "make it again")
    return spec


def check_spec(spec: dict) -> None:
    """Raises ValueError for what no tokenizer.json of ours says."""
    kinds = EXTRA | OURS.get(spec["kind"], {}) if isinstance(spec["kind"], str) else {}
    if not kinds or spec["kind"] not in OURS:
        raise ValueError(f"its kind {spec['kind']!r:.40} is none of {', '.join(OURS)}")
    for name, value in spec.items():
        if name not in kinds or not isinstance(value, kinds[name]):
            raise ValueError(f"{name!r:.40} is not known here, or of another type")


def make_tokenizer(spec: dict) -> Tokenizer:
    """A tokenizer of ours from what its file says; raises ValueError, KeyError or TypeError for a damaged spec."""
    if spec["kind"] == "gpt2":
        return gpt2_tokenizer(spec)
    if spec["kind"] == "char":
        characters = spec["characters"]
        if len(set(characters)) < len(characters) or not is_unicode(characters):
            raise ValueError("its characters repeat, or are none")
        return Tokenizer("char", Characters(characters), spec, {name: i for i, name in enumerate(SPECIAL)})
    tokens = [base64.b64decode(t, validate=True) for t in spec["tokens"]]
    every_byte = {bytes([b]) for b in range(256)}
    if len(set(tokens)) != len(tokens) or not every_byte <= set(tokens):
        raise ValueError("its tokens repeat, or do not hold all 256 bytes")
    names = spec.get("special", ())
    special = {name: i for i, name in enumerate(names, len(tokens))}
    if len(special) < len(names) or not special.keys() <= set(SPECIAL):
        raise ValueError(f"its special tokens are not of {', '.join(SPECIAL)}, each once")
    spelled = {"\ufffd" if name == "unk" else f"<{name}>": i for name, i in special.items()}
    ranks = {token: i for i, token in enumerate(tokens)}
    engine = tiktoken.Encoding("bpe", pat_str=spec["pattern"], mergeable_ranks=ranks, special_tokens=spelled)
    return Tokenizer("bpe", engine, spec, special)


def listed_tokenizer(spec: dict) -> Tokenizer:
    """That of APEL-R's characters; raises ValueError, KeyError or TypeError for a damaged list."""
    texts = spec["itos"]
    special = {name: texts.index(f"<{name}>") for name in SPECIAL}
    others = [text for i, text in enumerate(texts) if i not in special.values()]
    if len(set(texts)) < len(texts) or any(len(text) != 1 or not is_unicode(text) for text in others):
        raise ValueError("its itos must list <pad>, <bos>, <eos>, <unk> and characters, each once")
    return Tokenizer("listed", ListedCharacters(texts, special), spec, special)


def gpt2_tokenizer(spec: dict) -> Tokenizer:
    """That of GPT-2, whose one special token is bos, eos and pad."""
    try:
        with no_panic("the tokenizer gpt2"):
            engine = tiktoken.get_encoding("gpt2")
    except DataError:
        raise
    except Exception as error:  # the library raises what its transport raises
        raise DataError(f"tiktoken cannot fetch the vocabulary of gpt2 ({type(error).__name__}): go online once, or "
                        "set TIKTOKEN_CACHE_DIR to a folder that has it") from error
    return Tokenizer("gpt2", engine, spec, dict.fromkeys(("bos", "eos", "pad"), engine.eot_token))


def foreign_tokenizer(spec: dict, source: str | Path) -> Tokenizer:
    """That of a tokenizer.json of Hugging Face, without what the file asks for beyond the tokens of a text."""
    library = optional("tokenizers", "tokenizers")
    # Saved truncation drops the rest of a document, saved padding counts as its tokens, and dropout of merges makes a
    # text other tokens every time. All three are of somebody's training, not of the vocabulary.
    plain = {**spec, "truncation": None, "padding": None}
    try:
        if spec["model"].get("dropout"):
            plain["model"] = {**spec["model"], "dropout": None}
        with no_panic(f"the tokenizer {source}"):
            engine = library.Tokenizer.from_str(json.dumps(plain))
        engine.encode_special_tokens = True  # those in a text are plain text
        added = {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
        check_ids(spec, added, engine.get_vocab(with_added_tokens=True))
    except DataError:
        raise
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"cannot read the tokenizer {source}: {error}") from error
    special = {}
    for name, spellings in FOREIGN.items():
        ids = [added[spelling] for spelling in spellings if spelling in added]
        if ids:
            special[name] = ids[0]
    return Tokenizer("huggingface", engine, spec, special)


def check_ids(spec: dict, added: dict[str, int], known: dict[str, int]) -> None:
    """Raises ValueError where a token of a foreign file has two ids, or an id two tokens.

    added: {text: id} of the tokens beside the vocabulary, as the file says. known: {text: id} of all, as the library
    reads the file, which gives an id of its own to a token whose id is taken.
    """
    vocabulary = spec["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: [[text, score], ...], ids by place
        texts = [text for text, _ in vocabulary]
        vocabulary = {text: i for i, text in enumerate(texts)}
        if len(vocabulary) < len(texts):
            raise ValueError(f"{len(texts) - len(vocabulary):,} tokens come twice, so that the id is not certain")
    for text, number in [*vocabulary.items(), *added.items()]:
        if known.get(text) != number:
            raise ValueError(f"the token {text!r:.40} has the id {number} in the file, and another of that id or text "
                             "is there too")
    owners = Counter(known.values())
    twice = next((number for number, times in owners.items() if times > 1), None)
    if twice is not None:
        names = [text for text, number in known.items() if number == twice]
        raise ValueError(f"the id {twice} is that of {len(names)} tokens, {names[0]!r:.40} and {names[1]!r:.40}")
