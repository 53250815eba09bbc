"""A corpus: token streams of a folder by `text` or `planted`, mapped into memory and checked once."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.ahead import send
from common.errors import DataError
from sources.arrays import open_npy
from sources.digests import fingerprint, sample
from sources.streams import read_stream
from sources.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer

PIECE = 1 << 24  # tokens looked at at once
ROWS = 1 << 16  # documents looked at at once
ROUNDING = 1e-6  # nats a token that are no optimum but single precision


@dataclass
class Corpus:
    """Integer tokens for training and for validation, and what is known of them; only the first three are needed."""

    train: np.ndarray  # [tokens]
    val: np.ndarray
    vocab_size: int
    tokenizer: Tokenizer | None = None
    tokenizer_hash: str = ""  # of what made the tokens; a checkpoint keeps it
    fingerprint: str = ""  # 16 hex digits of the content, which a checkpoint keeps; default: of a sample of it
    document_length: int = 0  # of documents that are all as long and begin with bos, such as planted ones; 0: one text
    bytes_per_token: float = 0.0  # of the validation text; 0 where that is unknown
    first_id: int = 0  # what a document begins with, or comes after
    name: str = "arrays"  # for messages
    folder: Path | None = None
    version: str = ""  # planted: the model version whose chunks the documents have
    chunk_size: int = 0  # planted: tokens of a plan
    oracle_nll: np.ndarray | None = None  # planted: exact -log p of the validation tokens [documents, L]
    plans: np.ndarray | None = None  # planted: true plans of the validation chunks [documents, N]

    def __post_init__(self):
        if not self.fingerprint:
            self.fingerprint = fingerprint(sample(self.train), sample(self.val), self.tokenizer_hash)

    def places(self, split: str, seq_len: int, version: str) -> tuple[int, int]:
        """(number of places where a window of a split may start, distance between them); raises DataError for none.

        version: of the model, whose chunks must be where those of planted documents are.
        """
        distance = self.document_length or 1  # a window of a planted document begins where the document does
        if self.document_length and seq_len >= self.document_length:
            raise DataError(
                f"seq_len = {seq_len}, but the planted documents predict only {distance - 1} tokens: "
                f"use seq_len={distance - 1}"
            )
        if self.version and version not in (self.version, "baseline"):
            raise DataError(
                f"{self.name} has its chunks where {self.version} has them: make it anew by "
                f"prepare_data.py planted --version={version}"
            )
        tokens = len(self.tokens(split))
        count = (tokens - seq_len - 1) // distance + 1
        if count < 1:
            raise DataError(
                f"{self.name} has {tokens:,} {split} tokens, less than a window of "
                f"seq_len + 1 = {seq_len + 1}: use more text or a shorter seq_len"
            )
        return count, distance

    def spread(self, most: int, seq_len: int, version: str) -> np.ndarray:
        """Starts of at most `most` windows that do not overlap, spread evenly over the validation tokens."""
        count, distance = self.places("val", seq_len, version)
        stride = 1 if self.document_length else seq_len
        places = np.arange(0, count, stride)
        chosen = np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int)
        return places[np.unique(chosen)] * distance

    def tokens(self, split: str) -> np.ndarray:
        """All tokens of train or val."""
        return {"train": self.train, "val": self.val}[split]

    def windows(self, split: str, starts: np.ndarray, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Tokens [B, length + 1] int64 from the places `starts` [B] of train or val."""
        places = starts[:, None] + np.arange(length + 1)  # [B, length + 1]
        tokens = torch.from_numpy(self.tokens(split)[places].astype(np.int64))
        return send(tokens, device)

    def yardsticks(self, nll: float, starts: np.ndarray, length: int) -> dict[str, float]:
        """What a loss in nats a token on validation windows is held against: bits per byte; planted: the optimum,
        and the excess as a share of it, where it is not 0."""
        if self.oracle_nll is not None:
            documents = starts // self.document_length
            oracle = float(self.oracle_nll[documents, :length].mean(dtype=np.float64))
            # Documents without chance: no share of nothing.
            excess = nll / oracle - 1 if oracle > ROUNDING else None
            return {"oracle_nll": oracle, "excess_over_oracle": excess}
        if not self.bytes_per_token:
            return {}
        return {"bits_per_byte": nll / math.log(2) / self.bytes_per_token}

    def true_plans(self, starts: np.ndarray, chunk_size: int) -> np.ndarray | None:
        """Plans of the chunks of validation windows [B, N]; None where nobody knows them.

        chunk_size: of the model; chunks that are not those of the documents have no true plan.
        """
        if self.plans is None or chunk_size != self.chunk_size:
            return None
        return self.plans[starts // self.document_length]

    def spell(self, token: int) -> str:
        """A token as text, or as a number."""
        if self.tokenizer:
            return self.tokenizer.decode([token])
        return str(token)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt; of none, or without a tokenizer, what a document begins with."""
        if prompt and self.tokenizer:
            return self.tokenizer.encode(prompt)
        return [self.first_id]

    def same_tokenizer(self, extra: dict, path: Path) -> None:
        """Raises DataError where the checkpoint `path`, with extra state of this kind, is of another tokenizer."""
        if extra.get("tokenizer_hash", self.tokenizer_hash) != self.tokenizer_hash:
            raise DataError(f"{path} was trained with another tokenizer than {self.name} has")

    def copy_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer beside a run, so that its checkpoints can be sampled anywhere; none of other data stays."""
        if self.tokenizer and self.folder:
            copy_tokenizer(self.folder, folder)
        elif self.tokenizer:
            self.tokenizer.save(folder / "tokenizer.json")
        else:
            (folder / "tokenizer.json").unlink(missing_ok=True)

    def text(self, tokens: list[int]) -> str:
        """Tokens as quoted text, or as numbers."""
        if self.tokenizer:
            return repr(self.tokenizer.decode(tokens))
        return " ".join(str(token) for token in tokens)


def folder_of(name: str) -> Path:
    """The folder of that name, or data/NAME where there is none."""
    path = Path(name)
    below_data = Path("data") / name
    return below_data if not path.exists() and below_data.exists() else path


def read_corpus(folder: str) -> Corpus:
    """The corpus of a folder, or of data/FOLDER.

    Raises DataError for a folder that is missing, damaged, or whose tokenizer is not the one its tokens were made with.
    """
    path = folder_of(folder)
    meta, streams = read_stream(path)
    vocab_size = meta["vocab_size"]
    for name, tokens in streams.items():
        top = max(int(tokens[i : i + PIECE].max()) for i in range(0, len(tokens), PIECE))
        if top >= vocab_size:
            raise DataError(
                f"{path / name}.bin has the token {top}, beyond its vocabulary of {vocab_size}: "
                "prepare the folder again"
            )
    corpus = Corpus(
        streams["train"],
        streams["val"],
        vocab_size,
        tokenizer_hash=meta["tokenizer_hash"],
        name=str(path),
        folder=path,
    )
    if "train_sha256" in meta and "val_sha256" in meta:  # of all tokens, where they were prepared with a digest
        corpus.fingerprint = fingerprint(meta["train_sha256"], meta["val_sha256"], meta["tokenizer_hash"])
    if meta["tokenizer"]:
        file = path / meta["tokenizer"]
        corpus.tokenizer = load_tokenizer(file)
        if corpus.tokenizer.hash() != meta["tokenizer_hash"]:
            raise DataError(
                f"{file} is not the tokenizer that the tokens beside it were made with: prepare the folder again"
            )
    if meta["kind"] == "planted":
        corpus.document_length = meta["document_length"]
        corpus.version = meta["version"]
        corpus.chunk_size = meta["chunk_size"]
        corpus.first_id = meta["bos_id"]
        corpus.oracle_nll, corpus.plans = read_oracle(path, meta)
        return corpus
    if meta.get("val_bytes"):
        corpus.bytes_per_token = meta["val_bytes"] / meta["val_tokens"]
    corpus.first_id = meta.get("eos_id") or 0
    return corpus


def read_oracle(path: Path, meta: dict) -> tuple[np.ndarray, np.ndarray]:
    """(exact -log p of validation tokens [documents, L], true plans of their chunks [documents, N]) of planted ones.

    Raises DataError for arrays that are missing, damaged or not of these documents, and for what no oracle gives.
    """
    nll, plans = open_npy(path / "val_oracle_nll.npy"), np.array(open_npy(path / "val_plans.npy"))
    documents, rest = divmod(meta["val_tokens"], meta["document_length"])
    if rest or nll.shape != (documents, meta["document_length"] - 1) or plans.shape[:1] != (documents,):
        raise DataError(f"{path}: val_oracle_nll.npy {nll.shape} and val_plans.npy {plans.shape} are not of its "
                        f"{documents:,} documents of {meta['document_length']} tokens: prepare the folder again")
    is_plan = plans.ndim == 2 and plans.dtype.kind in "iu" and (plans >= 0).all()
    if not is_plan or plans.max() >= meta.get("num_plans", math.inf):
        raise DataError(f"{path / 'val_plans.npy'} holds what are no plans: prepare the folder again")
    is_nll = nll.dtype.kind == "f" and all(possible(nll[i : i + ROWS]) for i in range(0, len(nll), ROWS))
    if not is_nll:
        raise DataError(f"{path / 'val_oracle_nll.npy'} holds values that no -log p has (below 0, infinite, none): "
                        "prepare the folder again")
    return nll, plans


def possible(nll: np.ndarray) -> bool:
    """Whether all values may be -log p of something that came."""
    return bool((np.isfinite(nll) & (nll >= -ROUNDING)).all())
