"""prepare_data.py text and planted: no byte is lost, no document leaks, and the oracle is exact."""

import bz2
import csv
import gc
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import shlex
import sys
from collections import Counter
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from commands import refusal

import prepare_data
import train_apelr
from common.errors import DataError
from configurator import configure
from measure.plans import verdict
from prepare_data import PlantedConfig, TextConfig
from sources import streams as stream_source
from sources import text as text_source
from sources.corpus import Corpus, read_corpus
from sources.digests import sample
from sources.planted import Plans, chunk_lengths, make_plans, mutual_information
from sources.tokenizer import MOST_SPACE, SPECIAL, load_tokenizer, train_bpe, train_char

CACHE = Path(__file__).resolve().parents[2] / "shared/data/tiktoken_cache"
FILES = {"train.bin", "val.bin", "meta.json", "tokenizer.json"}
SMALL = ("--vocab_size=300", "--val_fraction=0.3", "--out_dir=out", "--threads=2")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if CACHE.exists():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))


def stories(count: int = 60, seed: int = 3) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgéß北🜁", k=draw.randint(2, 6))) for _ in range(60)]
    return [" ".join(draw.choices(words, k=draw.randint(20, 60))) + f" {i}." for i in range(count)]


def write(path: str, text: str | bytes | list) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(text) if isinstance(text, list) else text
    Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"--input={path}"


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def prepare(*settings: str) -> dict:
    return prepare_data.main(["text", *SMALL, *settings])


def refused(capsys, *argv: str) -> str:
    told = refusal(capsys, prepare_data.main, *argv)
    gc.collect()  # a file left open is an error here, not in a later test
    return told


def contents(folder: str = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def documents(split: str, folder: str = "out") -> list[bytes]:
    """The documents of a stream, after every promise about it has been checked."""
    meta, streams = stream_source.read_stream(folder)
    tokens, tokenizer = streams[split], load_tokenizer(Path(folder, "tokenizer.json"))
    assert tokens.max() < meta["vocab_size"] == tokenizer.vocab_size and tokens[-1] == meta["eos_id"]
    ends = np.flatnonzero(tokens == meta["eos_id"])
    assert len(ends) == meta[f"{split}_documents"] and len(tokens) == meta[f"{split}_tokens"]
    return [tokenizer.decode_bytes(part[:-1]) for part in np.split(tokens, ends + 1)[:-1]]


def everything(folder: str = "out") -> list[bytes]:
    return sorted(documents("train", folder) + documents("val", folder))


def encoded(texts: list[str]) -> list[bytes]:
    return sorted(text.encode() for text in texts)


# --------------------------------------------------------------------------------------------------------- tokenizers


def make(kind: str):
    if kind == "gpt2":
        if not CACHE.exists():
            pytest.skip(f"needs {CACHE}")
        return load_tokenizer("gpt2")
    if kind == "char":
        return train_char(stories(), 60, 2)
    return train_bpe(stories(), 300, special=list(SPECIAL))


def any_bytes(count: int = 300) -> list[bytes]:
    draw = random.Random(11)
    planes = [range(0x80), range(0x80, 0x800), range(0x800, 0xD800), range(0x1F300, 0x1FA00), range(0x10FFFE, 0x110000)]
    found = ["".join(chr(draw.choice(draw.choice(planes))) for _ in range(draw.randint(0, 40))).encode()
             for _ in range(count)]
    broken = [bytes(draw.choices(row + bytes(range(256)), k=draw.randint(0, 40))) for row in found]
    return [*found, *broken, b"", b"\xff", "é".encode()[:1], "🜁".encode()[:3], b"<|endoftext|>\x00<eos>", b"a\r\n\n "]


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
def test_any_bytes_survive_before_and_after_a_save(kind):
    tokenizer, data = make(kind), any_bytes()
    tokenizer.save(Path("tokenizer.json"))
    loaded = load_tokenizer("tokenizer.json")
    ids = tokenizer.encode_batch(data, threads=2)
    assert [tokenizer.decode_bytes(row) for row in ids] == data == [loaded.decode_bytes(row) for row in ids]
    assert ids == [loaded.encode(row) for row in data] == [tokenizer.encode(row) for row in data]
    assert [tokenizer.decode(row) for row in ids] == [row.decode("utf-8", "replace") for row in data]
    texts = [row.decode("utf-8", "surrogateescape") for row in data]
    assert ids == tokenizer.encode_batch(texts, threads=1) and tokenizer.hash() == loaded.hash()
    assert all(0 <= i < tokenizer.vocab_size for row in ids for i in row)
    assert not {i for row in ids for i in row} & set(tokenizer.special.values())
    assert tokenizer.special == loaded.special and tokenizer.vocab_size == loaded.vocab_size


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
def test_special_tokens_are_silent_and_unk_is_the_replacement_character(kind):
    tokenizer = make(kind)
    special = tokenizer.special
    assert set(special) == (set(SPECIAL) - {"unk"} if kind == "gpt2" else set(SPECIAL))
    assert tokenizer.decode([special["bos"], *tokenizer.encode("ab"), special["pad"], special["eos"]]) == "ab"
    if kind == "gpt2":
        assert set(special.values()) == {50_256} and tokenizer.vocab_size == 50_257
        return
    assert tokenizer.decode([special["unk"], *tokenizer.encode("\ufffd")]) == "\ufffd\ufffd"
    assert sorted(special.values()) == list(range(4) if kind == "char" else range(296, 300))


def test_half_a_surrogate_pair_is_no_character():
    for kind in ("char", "bpe"):
        assert make(kind).decode(make(kind).encode("a\ud83db")) == "a\ufffdb"


def test_half_bytes_without_the_other_half_are_replaced():
    tokenizer = make("char")
    (a,), high, low = tokenizer.encode("a"), 4 + 12, 4 + 3
    assert tokenizer.decode([high]) == tokenizer.decode([high, low]) == "\ufffd"
    assert tokenizer.decode([high, a, high, low, *tokenizer.encode(b"\xa9")][:4]) == "\ufffda\ufffd"
    assert tokenizer.decode([*tokenizer.encode(b"\xc3"), *tokenizer.encode(b"\xa9")]) == "é"


def test_a_character_has_a_token_if_it_is_frequent_enough_and_there_is_room():
    tokenizer = train_char(["aaaa bbb cc d"], None, 2)
    assert tokenizer.spec == {"kind": "char", "characters": "a bc"} and tokenizer.vocab_size == 24
    assert train_char(["aaaa bbb cc d"], 22, 1).spec["characters"] == "a "
    assert [len(tokenizer.encode(text)) for text in ("abc", "d", "é", "北")] == [3, 2, 4, 6]


def test_the_hash_changes_with_anything_that_changes_the_tokens():
    found = [train_char(["ab"], None, 1), train_char(["ba b"], None, 1), train_char(["ab"], None, 1, lowercase=True),
             train_bpe(stories(), 300), make("bpe"), train_bpe(stories(), 301, special=list(SPECIAL))]
    assert len({tokenizer.hash() for tokenizer in found}) == len(found)
    assert make("bpe").hash() == found[4].hash() and len(found[0].hash()) == 64


def test_without_special_tokens_the_bpe_of_arxiv_is_as_it_was():
    tokenizer = train_bpe(stories(), 300)
    assert tokenizer.special == {} and set(tokenizer.spec) == {"kind", "pattern", "tokens"}


@pytest.mark.parametrize("change", [
    {"special": ["bos", "bos"]}, {"special": ["end"]}, {"special": 3}, {"kind": "char", "characters": "aa"},
    {"kind": "char", "characters": "\ud800"}, {"kind": "char"}, {"kind": "char", "characters": None}], ids=str)
def test_a_damaged_tokenizer_is_refused(change):
    Path("tokenizer.json").write_text(json.dumps({**make("bpe").spec, **change}))
    with pytest.raises(DataError, match="tokenizer.json"):
        load_tokenizer("tokenizer.json")


def test_a_gpt2_that_cannot_be_fetched_is_one_line(capsys, monkeypatch):
    def offline(name):
        raise ConnectionError("HTTPSConnectionPool")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    told = refused(capsys, "text", "--tokenizer=gpt2", "--out_dir=out", write("a.json", stories()))
    assert "TIKTOKEN_CACHE_DIR" in told and not Path("out").exists()


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
@pytest.mark.parametrize("space", [" ", "\t", "\n", "\r\n", "\u3000", " \n"], ids=repr)
def test_a_million_white_characters_in_a_row_are_encoded_and_lost_nowhere(kind, space):
    tokenizer = make(kind)
    text = "a" + space * (1_000_000 // len(space)) + "é"
    for given, threads in ((text, 2), (text.encode() + b"\xff", 1)):  # a byte that is no UTF-8 takes another way
        ids, short = tokenizer.encode_batch([given, "a b"], threads)
        assert tokenizer.decode_bytes(ids) == (given if isinstance(given, bytes) else given.encode())
        assert short == tokenizer.encode("a b")


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_text_with_less_white_space_is_encoded_as_a_whole(kind):
    tokenizer = make(kind)
    for gap in ("  ", " " * 5_000 + "\n", " " * MOST_SPACE):
        text = gap.join(["ab cde"] * (3 + 70_000 // len(gap)))
        assert tokenizer.encode(text) == tokenizer.engine.encode_ordinary(text)
        assert tokenizer.encode_batch([text, text], threads=2) == [tokenizer.engine.encode_ordinary(text)] * 2


def test_a_tokenizer_is_trained_on_text_with_a_million_spaces():
    texts = stories()
    trained = train_bpe([*texts, "a" + " " * 1_000_000 + "b"], 300)
    assert trained.vocab_size == 300 and trained.decode(trained.encode(texts[0])) == texts[0]


# ------------------------------------------------------------------------------------------------------------ sources


def table(texts: list[str]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    return file.getvalue()


def parquet(texts: list[str]) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([{"text": text} for text in texts])
    pytest.importorskip("pyarrow.parquet").write_table(table, "a.parquet")
    return "--input=a.parquet"


def hub(monkeypatch, expected: tuple, **splits: list[dict]) -> None:
    """A stand-in for the package datasets that serves these splits."""
    def load_dataset(path, name, streaming):
        assert (path, name, streaming) == (*expected, True)
        return splits

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


PATHS = {
    "txt": lambda texts: write("a.txt", "\n<|endoftext|>\n".join(texts)),
    "txt_inline": lambda texts: write("a.txt", "<|endoftext|>".join(texts) + "<|endoftext|>"),
    "jsonl": lambda texts: write("a.jsonl", jsonl([{"id": 1, "text": text} for text in texts])),
    "jsonl_texts": lambda texts: write("a.jsonl", jsonl(texts)),
    "json": lambda texts: write("a.json", texts),
    "json_objects": lambda texts: write("a.json", [{"text": text} for text in texts]),
    "json_key": lambda texts: write("a.json", json.dumps({"version": 1, "data": texts})),
    "folder": lambda texts: [write("in/a.txt", "\n<|endoftext|>\n".join(texts[:20])),
                             write("in/b/c.json", texts[20:40]), write("in/d.jsonl", jsonl(texts[40:])),
                             write("in/.x/e.txt", "hidden"), write("in/README.md", "no")] and "--input=in",
    "csv": lambda texts: write("a.csv", table(texts)),
    "csv_names_in_upper_case": lambda texts: write("in/A.CSV", table(texts)),
    "json_lines": lambda texts: write("a.json", "\n" + jsonl([{"id": 1, "text": text} for text in texts])),
    "json_document_a_file": lambda texts: [write(f"in/{i}.json", json.dumps({"id": 1, "text": text}, indent=1))
                                           for i, text in enumerate(texts)] and "--input=in",
    "gz": lambda texts: write("a.txt.gz", gzip.compress("<|endoftext|>".join(texts).encode())),
    "bz2": lambda texts: write("A.JSONL.BZ2", bz2.compress(jsonl(texts).encode())),
    "xz": lambda texts: write("a.csv.xz", lzma.compress(table(texts).encode())),
    "folder_of_packed": lambda texts: [write("in/a.jsonl.gz", gzip.compress(jsonl(texts[:30]).encode())),
                                       write("in/B.TXT", "<|endoftext|>".join(texts[30:40])),
                                       write("in/c.jsonl", jsonl(texts[40:]))] and "--input=in",
    "parquet": parquet,
}


@pytest.mark.parametrize("way", [*PATHS, "hub"])
def test_every_document_of_every_source_comes_back_with_an_eos_after_it(way, monkeypatch):
    texts = stories()
    if way == "hub":
        hub(monkeypatch, ("vblagoje/cc_news", None), train=[{"text": text, "title": "t"} for text in texts])
    prepare("--input=cc_news" if way == "hub" else PATHS[way](texts))
    assert everything() == encoded(texts) and set(contents()) == FILES


MARKED = {"a.txt": "<|endoftext|>".join, "a.jsonl": jsonl, "a.json": json.dumps, "a.csv": table}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", MARKED)
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(name, encoding, monkeypatch):
    monkeypatch.setattr(text_source, "READ_BYTES", 1_001)  # which cuts characters
    texts = stories()
    prepare(write(name, MARKED[name](texts).encode(encoding)))
    assert everything() == encoded(texts)


def test_utf_16_in_the_other_byte_order_is_read_by_its_mark():
    texts = stories()
    prepare(write("a.jsonl", b"\xfe\xff" + jsonl(texts).encode("utf-16-be")))
    assert everything() == encoded(texts)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", MARKED)
def test_utf_16_without_its_mark_is_refused_with_the_way_out(name, encoding, capsys):
    told = refused(capsys, "text", *SMALL, write(name, MARKED[name](stories()).encode(encoding)))
    assert f"{name} seems to be UTF-16 or UTF-32 without a byte order mark: save it as UTF-8" in told


def test_what_is_skipped_in_a_folder_is_counted_and_named(capsys):
    texts = stories()
    write("in/a.jsonl", jsonl(texts))
    for name in ("README", "a.md", "b.md", "c.parquet.gz", "d.tsv", "e.zip", "f.docx", "g.pdf", ".hidden", ".x/h.txt"):
        write(f"in/{name}", "no text")
    Path("in/zz").symlink_to("nowhere")
    prepare("--input=in")
    told = capsys.readouterr().out
    assert "in: 1 file read, 9 skipped: 2 without an ending (README, zz), 2 .md (a.md, b.md), 1 " in told
    assert told.splitlines()[1].endswith(", 1 .docx (f.docx), 1 of 1 other kind") and everything() == encoded(texts)


def test_where_documents_are_cut_is_said_with_how_many_files(capsys):
    texts, long = stories(), "\n\n".join(stories(200, seed=5))
    for i in range(3):
        write(f"in/{i}.txt", texts[i])
    write("in/marked.txt", "<|endoftext|>".join(texts[3:9]))
    write("in/long.txt", long)
    write("in/a.jsonl", jsonl(texts[9:]))
    prepare("--input=in")
    told = capsys.readouterr().out
    for line in ("3 files are a document each", "1 file is cut at <|endoftext|>",
                 "1 file has a document a line, row or item",
                 "1 file is cut at blank lines, every 2,000 bytes or more; --whole_files does not cut"):
        assert f"\n  {line}\n" in told
    assert max(map(len, told.splitlines())) <= 100
    pieces = [text for text in everything() if text.decode() in long]
    assert len(pieces) > 5 and b"".join(documents("train") + documents("val")).count(b"<|") == 0
    prepare("--input=in", "--whole_files")
    assert "  5 files are a document each" in capsys.readouterr().out
    assert everything() == encoded([*texts[:3], "<|endoftext|>".join(texts[3:9]), long, *texts[9:]])


@pytest.mark.parametrize("end", ["", "\n", "<|endoftext|>", "<|endoftext|>\n\n"])
def test_what_stands_behind_the_last_cut_of_a_file_is_no_document(end, capsys):
    texts = stories()
    write("a.txt", "<|endoftext|>".join(texts) + end)
    write("b.txt", " ".join(texts) * 60 + end.replace("<|endoftext|>", ""))  # no line to cut at
    for name in ("a.txt", "b.txt"):
        prepare(f"--input={name}")
        assert "without text" not in capsys.readouterr().out


def test_a_folder_that_may_not_be_read_is_refused_by_its_name(capsys, monkeypatch):
    write("in/a.txt", stories()[0])
    write("in/locked/b.txt", stories()[1])
    may = os.access
    for locked in ("in", "in/locked"):
        monkeypatch.setattr(os, "access", lambda path, mode, locked=locked: str(path) != locked and may(path, mode))
        assert f"the folder {locked} may not be read" in refused(capsys, "text", "--input=in", *SMALL)


def test_a_file_that_calls_itself_held_out_among_others_is_pointed_at(capsys):
    write("in/wiki.valid.txt", stories(3)[0])
    write("in/wiki.train.txt", "<|endoftext|>".join(stories()))
    write("in/latest.txt", "a story")
    prepare("--input=in")
    told = capsys.readouterr().err
    assert told.count("note: ") == 1 and "--val_input=in/wiki.valid.txt" in told
    prepare("--input=in/wiki.valid.txt", "--val_input=in/latest.txt")
    assert "note" not in capsys.readouterr().err


def test_text_that_is_not_utf_8_is_kept_and_the_first_file_is_named(capsys):
    for i in range(3):
        write(f"in/{i}.txt", f"gr\xfc\xdfe {i}".encode("latin-1") if i else "gr\xfc\xdfe")
    prepare("--input=in", "--vocab_size=none")
    told = capsys.readouterr()
    assert "note: in/1.txt is not UTF-8" in told.err and "; 2 not UTF-8" in told.out
    assert sorted(everything()) == sorted([b"gr\xfc\xdfe 1", b"gr\xfc\xdfe 2", "gr\xfc\xdfe".encode()])


@pytest.mark.parametrize("seed", range(4))
def test_of_few_documents_one_is_held_out_whatever_chance_says(seed):
    texts = stories(3)
    for settings in ([], ["--val_fraction=0.99"]):
        prepare(write("a.json", [*texts, texts[0].upper()]), "--vocab_size=none", f"--seed={seed}", *settings)
        assert documents("train") and documents("val") and len(everything()) == 4
        train, val = ({text.decode().casefold() for text in documents(split)} for split in ("train", "val"))
        assert not train & val


@pytest.mark.parametrize("spell", [str, str.upper])
def test_title_and_abstract_are_a_document_and_columns_may_be_in_upper_case(spell):
    texts = stories()
    prepare(write("a.jsonl", jsonl([{spell("text"): f"{text}\n\n{text[::-1]}"} for text in texts])))
    before = everything()
    prepare(write("a.jsonl", jsonl([{spell("title"): "\n  ".join(text.split(" ", 1)), "id": 1,
                                     spell("abstract"): f"\n  {text[::-1]}\n"} for text in texts])))
    assert everything() == before


@pytest.mark.parametrize("characters, tokens", [(0, 512), (600_000, 512), (1_024_000, 1_024), (2_047_999, 1_024),
                                                (2_048_000, 2_048), (10**9, 4_096)])
def test_a_vocabulary_that_nobody_names_has_a_token_for_a_thousand_characters(characters, tokens):
    assert text_source.likely_vocabulary(characters, 4_096) == tokens


def test_the_folder_is_named_after_the_input_and_the_next_command_trains_on_it(capsys):
    write("My stories/a.txt", "<|endoftext|>".join(stories()))
    prepare_data.main(["text", "My stories", "--vocab_size=300"])
    *_, last = capsys.readouterr().out.splitlines()
    start, words = last.split(".py ")
    assert start == "next: python train_apelr" and words.split()[:1] == ["--data=data/My_stories"]
    cfg = configure(train_apelr.Config, shlex.split(words))
    corpus = read_corpus(cfg.data)
    for split in ("train", "val"):
        assert corpus.places(split, cfg.seq_len, cfg.version)[0] >= 1
    write("data/mine/b.txt", "one")
    assert prepare_data.folder_for("data/mine/", "x") == "data/mine_tokens"
    assert prepare_data.folder_for("/a/b.Jsonl.GZ", "x") == "data/b" and prepare_data.folder_for("", "x") == "x"


def test_the_files_of_an_earlier_preparation_are_no_text(capsys):
    texts = stories()
    write("in/a.jsonl", jsonl(texts))
    for _ in range(2):  # tokenizer.json has a list of texts
        prepare("--input=in", "--out_dir=in/out")
        assert everything("in/out") == encoded(texts)
    assert "out/meta.json, out/tokenizer.json" in capsys.readouterr().out


@pytest.mark.parametrize("name, data", [
    ("a.jsonl.gz", b"{}"), ("a.jsonl.gz", gzip.compress(jsonl(stories()).encode())[:-9]),
    ("a.txt.gz", gzip.compress(b"word " * 999)[:30] + b"x" * 30), ("a.csv.bz2", b"text"), ("a.json.xz", b"text"),
    ("a.json.xz", lzma.compress(json.dumps(stories()).encode())[:-20]), ("a.txt", "ab".encode("utf-16") + b"a")])
def test_a_damaged_packed_file_is_one_line(name, data, capsys):
    told = refused(capsys, "text", *SMALL, write(name, data))
    assert f"cannot read {name}" in told and not Path("out").exists()


ROWS = table([text.replace(" ", ", ", 1) for text in stories()]).split("\r\n")  # each in quotes, for its comma


@pytest.mark.parametrize("row, change, words", [
    (8, lambda row: row[:-1], "a.csv, row 8, from line 8 on: ',' expected after '\"'; a quote that is not closed"),
    (61, lambda row: row[:-1], "a.csv, row 61, from line 61 on: unexpected end of data"),
    (5, lambda row: row.replace(", ", ', "so" ', 1), "a.csv, row 5, from line 5 on: ',' expected after '\"'"),
    (1, lambda row: f"{row},{row}", "a.csv, row 1: two columns are called 'id'"),
    (5, lambda row: row.replace('"', ""), "a.csv, row 5, line 5: 3 cells under 2 names; a text that has a comma")])
def test_a_table_that_only_a_guess_could_read_is_refused_with_the_row(row, change, words, capsys):
    rows = ROWS.copy()
    rows[row - 1] = change(rows[row - 1])
    assert words in refused(capsys, "text", *SMALL, write("a.csv", "\r\n".join(rows)))


def test_a_row_may_end_early_or_be_empty_and_lines_in_quotes_are_counted():
    write("a.csv", '\nid,text\n\n1,"a\nb"\n2\n3,c,\n"4","d ""e"""\n')
    found = [(where, record["text"]) for where, record in text_source.csv_records(Path("a.csv"))]
    assert found == [("a.csv, row 2", "a\nb"), ("a.csv, row 3", None), ("a.csv, row 4", "c"), ("a.csv, row 5", 'd "e"')]


@pytest.mark.parametrize("delimiter", ",;\t")
def test_a_table_may_have_semicolons_or_tabs_between_its_columns(delimiter):
    write("a.csv", f'\nid{delimiter}"text"\n1{delimiter}"a, b; c\td"\n')
    assert [record for _, record in text_source.csv_records(Path("a.csv"))] == [{"id": "1", "text": "a, b; c\td"}]


def test_a_quote_that_takes_in_the_rest_of_a_large_file_is_not_held_in_memory(capsys, monkeypatch):
    monkeypatch.setattr(text_source, "MOST_CHARACTERS", 1_000)
    told = refused(capsys, "text", *SMALL, write("a.csv", 'text\na\n"b\n' + "more of it\n" * 1_000))
    assert "a.csv, row 3, from line 3 on: field larger than field limit (1000)" in told


def test_documents_without_text_are_skipped_and_counted(capsys):
    texts = stories()
    rows = [{"text": text} for text in [*texts, None, float("nan"), "", " \n"]]
    prepare(write("a.jsonl", jsonl(rows)))
    assert "skipped 4 without text" in capsys.readouterr().out and everything() == encoded(texts)
    prepare(write("a.jsonl", jsonl(rows[: len(texts) + 1])))
    assert "skipped 1 without text" in capsys.readouterr().out


def test_all_ways_and_any_number_of_threads_give_the_same_bytes():
    prepare(PATHS["txt"](stories()))
    before = contents()
    for way in ("jsonl", "json"):
        prepare(PATHS[way](stories()), "--threads=1")
        after = contents()
        assert {name for name in before if before[name] != after[name]} == {"meta.json"}  # its source
    prepare(PATHS["json"](stories()), "--seed=2")
    assert contents()["val.bin"] != after["val.bin"]


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_invalid_bytes_of_a_text_file_survive(tokenizer):
    data = [row.replace(b"\n", b"").replace(b"\r", b"") + b" %d" % i for i, row in enumerate(any_bytes())
            if b"<|" not in row]
    prepare(write("a.txt", b"<|endoftext|>".join(data)), f"--tokenizer={tokenizer}")
    assert everything() == sorted(data)


@pytest.mark.parametrize("gap, most", [("\n\n", 2_600), ("\r\n \r\n", 2_600), ("\n", 2_600), (" ", 2_600),
                                       ("", 65_536)])
def test_a_running_text_is_cut_where_it_has_gaps(gap, most, monkeypatch):
    monkeypatch.setattr(text_source, "READ_BYTES", 1 << 17)
    parts = ["x" * random.Random(i).randint(1, 500) for i in range(2_000)]
    write("a.txt", gap.join(parts))
    found = list(text_source.cut_text(Path("a.txt")))
    assert b"".join(found).replace(gap.encode(), b"") == "".join(parts).encode()
    assert all(2_000 <= len(text) <= most for text in found[:-1]) and len(found[-1]) <= most
    monkeypatch.setattr(text_source, "READ_BYTES", 1 << 20)
    assert list(text_source.cut_text(Path("a.txt"))) == found


def test_a_mark_across_two_blocks_is_found(monkeypatch):
    monkeypatch.setattr(text_source, "READ_BYTES", 100)
    for before in range(85, 102):
        write("a.txt", "a" * before + "<|endoftext|>\n" + "b\n\n" * 1_000)
        assert list(text_source.cut_text(Path("a.txt"))) == [b"a" * before, b"b\n\n" * 999 + b"b"]
    assert write("a.txt", "") and list(text_source.cut_text(Path("a.txt"))) == [b""]


def test_the_hubs_own_validation_split_is_used_and_what_it_shares_with_training_is_left_out(monkeypatch, capsys):
    texts = stories()
    hub(monkeypatch, ("roneneldan/TinyStories", None), train=[{"text": text} for text in texts[:40]],
        validation=[{"text": text} for text in ["", None, *texts[38:58]]])
    meta = prepare("--input=tinystories", "--max_documents=39")  # and 0.3 times as many for validation
    assert sorted(documents("val")) == encoded(texts[38:50]) and meta["source"] == "tinystories"
    assert sorted(documents("train")) == encoded(texts[:38]) and "left out 1 that are in" in capsys.readouterr().out


def test_the_lines_of_wikitext_are_joined_to_articles(monkeypatch):
    def rows(name: str, number: int) -> list[dict]:
        lines = ["", f" = {name} {number} = \n", "", f" Text of {number} . \n", " = = History = = \n", " More . \n"]
        return [{"text": line} for line in lines]

    hub(monkeypatch, ("Salesforce/wikitext", "wikitext-2-raw-v1"), test=[], validation=[*rows("W", 1), *rows("W", 2)],
        train=[row for i in range(9) for row in rows("V", i)])
    prepare("--input=wikitext2", "--tokenizer=char", "--vocab_size=100")
    assert len(documents("val")) == 2 and len(documents("train")) == 9
    assert documents("val")[1] == b" = W 2 = \n Text of 2 . \n = = History = = \n More . \n"


def test_a_hub_that_breaks_off_is_one_line_and_leaves_nothing(monkeypatch, capsys):
    def rows():
        yield {"text": "one"}
        raise TimeoutError("too slow")

    hub(monkeypatch, ("HuggingFaceFW/fineweb", "sample-10BT"), train=rows())
    assert "too slow" in refused(capsys, "text", *SMALL, "--input=fineweb") and list(Path.cwd().iterdir()) == []
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(capsys, "text", *SMALL, "--input=fineweb")


def test_a_limit_stops_the_reading_and_validation_is_still_not_the_head(monkeypatch):
    texts = stories(400)
    assert prepare(write("a.json", texts), "--max_documents=100")["train_documents"] == 100 - len(documents("val"))
    assert set(everything()) == set(encoded(texts[:100]))
    meta = prepare(write("a.json", texts), "--max_bytes=20_000")
    read = len(documents("train") + documents("val"))
    sizes = np.cumsum([len(text.encode()) for text in texts])
    assert sizes[read - 2] < 20_000 <= sizes[read - 1] and meta["val_bytes"] == sum(map(len, documents("val")))
    places = [texts.index(text.decode()) for text in documents("val")]
    assert 0.1 * read < np.mean(places) - 0.2 * read < 0.5 * read


def test_documents_that_repeat_stay_and_are_on_one_side():
    texts = stories(80)
    prepare(write("a.json", [*texts, *texts, *(text.upper() + "\n" for text in texts)]), "--tokenizer=char")
    train, val = documents("train"), documents("val")
    assert len(train) + len(val) == 240
    count = Counter(text.decode().casefold().strip() for text in val)
    assert set(count.values()) == {3} and not count.keys() & {text.decode().casefold().strip() for text in train}
    assert 0.1 < len(count) / 80 < 0.5


def test_validation_text_of_its_own_is_all_the_validation_there_is():
    texts = stories(80)
    write("v.json", texts[:20])
    prepare(write("a.json", texts[10:]), "--val_input=v.json")
    assert documents("val") == [text.encode() for text in texts[:20]]
    assert documents("train") == [text.encode() for text in texts[20:]]


def test_the_offline_corpus_is_large():
    texts = [text for _, text in text_source.documentation()]
    assert 1_000_000 < sum(map(len, texts)) < 5_000_000 and len(texts) > 1_000


def test_the_offline_corpus_is_the_same_every_time_and_imports_nothing_of_it(monkeypatch):
    folder = Path(json.__file__).parents[1]
    monkeypatch.setattr(text_source.sysconfig, "get_paths", lambda: {"stdlib": folder / "asyncio"})  # a part of it
    before, found = set(sys.modules), []
    for _ in range(2):
        meta = prepare("--val_fraction=0.05", "--tokenizer=char", "--vocab_size=120")
        found.append(contents())
    assert found[0] == found[1]
    assert set(sys.modules) <= before | {"pydoc_data", "pydoc_data.topics", "multiprocessing.synchronize"}  # of tqdm
    assert meta["source"].startswith("documentation of Python 3.") and sorted(everything()) == sorted(
        text.encode() for _, text in text_source.documentation())
    assert 0.01 < meta["val_documents"] / meta["train_documents"] < 0.12


# ----------------------------------------------------------------------------------------------------- what is written


def test_meta_says_what_the_files_hold():
    texts = stories()
    meta = prepare(write("a.json", texts), "--seed=7")
    tokenizer, val = load_tokenizer("out/tokenizer.json"), documents("val")
    assert meta == json.loads(Path("out/meta.json").read_text())
    files, _ = meta.pop("files"), meta.pop("digest")
    assert {name: facts["sha256"] for name, facts in files.items()} == {
        name: hashlib.sha256(Path("out", name).read_bytes()).hexdigest() for name in FILES - {"meta.json"}}
    assert meta == {
        "kind": "text", "vocab_size": 300, "dtype": "uint16", "bos_id": 296, "eos_id": 297, "unk_id": 298,
        "pad_id": 299, "tokenizer": "tokenizer.json", "tokenizer_hash": tokenizer.hash(),
        "train_documents": 60 - len(val), "val_documents": len(val), "val_bytes": sum(map(len, val)),
        "source": "a.json", "seed": 7, "train_tokens": Path("out/train.bin").stat().st_size // 2,
        "val_tokens": Path("out/val.bin").stat().st_size // 2,
        "train_sha256": hashlib.sha256(Path("out/train.bin").read_bytes()).hexdigest(),
        "val_sha256": hashlib.sha256(Path("out/val.bin").read_bytes()).hexdigest()}


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
def test_lower_case_is_kept_in_the_tokenizer_and_bytes_are_of_the_text_as_it_was(kind):
    make(kind)
    texts = [text.upper() + " İ" for text in stories()]
    size = [] if kind == "gpt2" else ["--vocab_size=270"]
    meta = prepare_data.main(["text", *SMALL[1:], *size, write("a.json", texts), f"--tokenizer={kind}", "--lowercase"])
    assert everything() == encoded([text.lower() for text in texts])
    assert load_tokenizer("out/tokenizer.json").decode(load_tokenizer("out/tokenizer.json").encode("ABÉ")) == "abé"
    lower = {text.lower(): text for text in texts}
    assert meta["val_bytes"] == sum(len(lower[text.decode()].encode()) for text in documents("val"))


def test_tokens_are_wide_enough_for_the_vocabulary(monkeypatch):
    characters = "".join(map(chr, itertools.chain(range(0x20, 0xD800), range(0xE000, 0x1_4000))))
    texts = [characters[i : i + 600] for i in range(0, len(characters), 600)]
    meta = prepare_data.main(["text", "--tokenizer=char", "--out_dir=out", write("a.json", texts)])
    assert meta["dtype"] == "uint32" and meta["vocab_size"] > 1 << 16
    assert everything() == encoded([text for text in texts if text.strip()])


def test_an_older_tokenizer_is_used_as_it_is_and_one_without_an_eos_is_refused(capsys):
    make("bpe").save(Path("old.json"))
    given = ["text", *SMALL[1:], write("a.json", stories(seed=4))]
    prepare_data.main([*given, "--tokenizer=old.json"])
    assert Path("old.json").read_bytes() == contents()["tokenizer.json"]
    train_bpe(stories(), 300).save(Path("old.json"))
    assert "has no eos" in refused(capsys, *given, "--tokenizer=old.json")


def test_a_new_preparation_of_any_job_leaves_no_file_of_the_older_one():
    prepare_data.main(["planted", "--out_dir=out", "--train_documents=3", "--validation_documents=2"])
    assert set(contents()) == {"train.bin", "val.bin", "meta.json", "train_plans.npy", "val_plans.npy",
                               "val_oracle_nll.npy"}
    Path("out/notes.md").write_text("mine")
    prepare(write("a.json", stories()))
    assert set(contents()) == {*FILES, "notes.md"}


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (OSError("no space left"), 2)])
def test_an_interruption_leaves_the_older_files_and_nothing_else(error, code, monkeypatch):
    prepare(write("a.json", stories()))
    before, write_tokens = contents(), text_source.write_tokens

    def full(path, *rest):
        if path.name == "val.bin":
            raise error
        return write_tokens(path, *rest)

    monkeypatch.setattr(text_source, "write_tokens", full)
    for folder in ("out", "new"):
        with pytest.raises(SystemExit) as end:
            prepare("--input=a.json", "--seed=5", f"--out_dir={folder}")
        assert end.value.code == code
    assert contents() == before and not Path("new").exists()


def test_a_kill_between_two_renames_leaves_no_set_that_looks_whole(monkeypatch):
    prepare(write("a.json", stories()))
    replace = os.replace

    def once(source, target):
        if Path(target).name == "val.bin":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(SystemExit):
        prepare("--input=a.json", "--seed=5")
    assert "meta.json" not in contents()


@pytest.mark.parametrize("name, text, more, words", [
    ("a.json", [], "", "leaves no training document"), ("a.json", ["", " \n"], "", "leaves no training document"),
    ("a.txt", "", "", "is empty"), ("a.json", ["one"], "", "a.json is one document"),
    ("a.json", stories(), "--val_input=b.json", "b.json: no such file"),
    ("a.json", [{"body": "b", "id": 1}], "", "no column 'text'; there are 'body', 'id'. Name it: --text_column=NAME"),
    ("a.jsonl", '{"text": "a"}\n{"body": "b"}\n', "", "a.jsonl, line 2: no column 'text'; there are 'body'"),
    ("a.jsonl", '{"text": 5}\n', "", "line 1: column 'text' holds int, not text"),
    ("a.jsonl", '{"text"\n', "", "a.jsonl, line 1: not JSON"), ("a.jsonl", "[1]\n", "", "line 1: expected an object"),
    ("a.jsonl", b'{"text": "\xff"}\n', "", "a.jsonl: it is not utf-8 (byte 0xff: invalid"),
    ("a.json", "{", "", "a.json: not JSON"),
    ("a.json", '{"a": [], "b": []}', "", "object with one list, not keys a, b"), ("a.json", "3", "", "not int"),
    ("a.json", [3], "", "item 1: expected an object or a text"), ("a.md", "a", "", "use .txt"),
    ("a.json", stories(), "--vocab_size=9000", "supports only"),
    ("a.json", stories(), "--vocab_size=259", "at least 260"),
    ("a.json", stories(), "--tokenizer=char --vocab_size=20", "at least 21"),
    ("a.json", stories(), "--tokenizer=gpt2", "vocab_size = 300 is of a trained"),
    ("a.json", stories(), "--tokenizer=x.json --vocab_size=none", "x.json"),
    ("a.json", stories(), "--tokenizer=x.json --vocab_size=none --lowercase", "lowercase"),
    ("a.json", stories(), "--min_frequency=2", "tokenizer=char"), ("a.json", stories(), "--val_fraction=0", "between"),
    ("a.json", stories(), "--max_bytes=0", "max_bytes: expected int >= 1"),
    ("a.json", stories(), "--vocabsize=3", "did you mean"),
    ("a.json", stories(), "--input=tinystory", "did you mean 'tinystories'?"),
    ("in/a.md", "a", "--input=in", "in holds no .txt"), ("a.json", stories(), "--out_dir=a.json", "another folder")])
def test_bad_input_is_one_line_and_leaves_nothing(name, text, more, words, capsys):
    settings = [*SMALL, write(name, text), *more.split()]
    before = sorted(Path.cwd().rglob("*"))
    assert words in refused(capsys, "text", *settings)
    assert sorted(Path.cwd().rglob("*")) == before


def test_ids_beyond_the_vocabulary_of_a_foreign_tokenizer_are_refused(capsys, monkeypatch):
    class Letters(SimpleNamespace):
        def encode_batch(self, texts, add_special_tokens):
            return [SimpleNamespace(ids=list(map(ord, text))) for text in texts]

        def get_vocab_size(self):
            return 200

        def get_vocab(self, with_added_tokens):
            return {"</s>": 0}

        def decode(self, ids):
            return "".join(map(chr, ids))

    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=SimpleNamespace(
        from_str=lambda spec: Letters())))
    write("hf.json", json.dumps({"model": {}, "added_tokens": [{"content": "</s>", "id": 0}]}))
    told = refused(capsys, "text", *SMALL[1:], write("a.json", stories()), "--tokenizer=hf.json")
    assert "vocab_size = 200" in told and not Path("out").exists()


LONG = [f"{i} " + "word " * 40 for i in range(60)]


class Words:
    """A stand-in for tokenizers.Tokenizer: a token a word, with the truncation and padding that its file asks for."""

    def __init__(self, spec: str):
        spec = json.loads(spec)
        self.most = spec["truncation"]["max_length"] if spec["truncation"] else None
        self.pads = spec["padding"] is not None
        self.dropout = spec["model"].get("dropout")

    def get_vocab_size(self) -> int:
        return 100

    def get_vocab(self, with_added_tokens: bool) -> dict[str, int]:
        return {"</s>": 0}

    def decode(self, ids: list[int]) -> str:
        return " ".join("x" * (i - 1) for i in ids)

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list:
        assert not self.dropout
        rows = [[1 + len(word) for word in text.split()][: self.most] for text in texts]
        longest = max(map(len, rows)) if self.pads else 0
        return [SimpleNamespace(ids=row + [0] * (longest - len(row))) for row in rows]


@pytest.mark.parametrize("saved", [{"truncation": {"max_length": 16}}, {"padding": {"strategy": "BatchLongest"}},
                                   {"model": {"dropout": 0.1}}], ids=str)
def test_what_training_left_in_a_tokenizer_file_changes_no_token(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=SimpleNamespace(from_str=Words)))
    texts = [*LONG, "short"]
    spec = {"truncation": None, "padding": None, "model": {}, "added_tokens": [{"content": "</s>", "id": 0}], **saved}
    write("hf.json", json.dumps(spec))
    meta = prepare_data.main(["text", *SMALL[1:], write("a.json", texts), "--tokenizer=hf.json"])
    assert meta["train_tokens"] + meta["val_tokens"] == sum(len(text.split()) + 1 for text in texts)
    assert meta["val_tokens"] == Path("out/val.bin").stat().st_size // 2


def test_truncation_and_padding_of_a_real_hugging_face_tokenizer_are_off():
    tokenizers = pytest.importorskip("tokenizers")
    real = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "word": 1, "?": 2}, unk_token="?"))
    real.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    real.add_special_tokens(["</s>"])
    real.enable_truncation(16)
    real.enable_padding(length=64)
    real.save("hf.json")
    found = load_tokenizer("hf.json")
    assert [len(ids) for ids in found.encode_batch([*LONG, "short"])] == [41] * 60 + [1]


def test_a_tokenizer_file_may_begin_with_a_byte_order_mark():
    make("bpe").save(Path("tokenizer.json"))
    text = Path("tokenizer.json").read_text()
    Path("tokenizer.json").write_text(text, encoding="utf-8-sig")
    assert load_tokenizer("tokenizer.json").hash() == make("bpe").hash()


def test_a_real_hugging_face_tokenizer_is_read_with_its_eos():
    tokenizers = pytest.importorskip("tokenizers")
    real = tokenizers.Tokenizer(tokenizers.models.WordLevel({"b": 0, "a": 1}, unk_token="b"))
    real.add_special_tokens(["</s>", "<unk>"])
    real.save("hf.json")
    found = load_tokenizer("hf.json")
    assert found.special == {"eos": 2, "unk": 3} and 2 not in found.encode("</s>") and found.encode(b"\xff") == [0]


# ----------------------------------------------------------------------------------------------------------- inspection


def test_inspect_counts_and_finds_what_is_wrong(capsys):
    meta = prepare(write("a.json", stories()), "--tokenizer=char", "--vocab_size=40")
    for path in ("out", "out/train.bin", "out/meta.json"):
        found = prepare_data.main(["inspect", path, "--tokens=3"])
        assert found == {"problems": [], **{what: {s: meta[f"{s}_{what}"] for s in ("train", "val")}
                                            for what in ("tokens", "documents")}}
    printed = capsys.readouterr().out
    assert "vocabulary 40" in printed and "no problem found" in printed and "most frequent: ' ', " in printed
    without_digests("out")  # with them a changed token is no problem among others
    tokens = np.fromfile("out/train.bin", "<u2")
    tokens[[3, 9]], tokens[-1] = 40, 8
    tokens.tofile("out/train.bin")
    make("char").save(Path("out/tokenizer.json"))
    problems = prepare_data.main(["inspect", "out/val.bin"])["problems"]
    assert len(problems) == 3 and "not the tokenizer" in problems[0] and "2 tokens are beyond" in problems[1]
    assert "documents have the token 1" in problems[2]
    for damage, words in ((lambda: tokens[:-1].tofile("out/train.bin"), "train.bin has"),
                          (lambda: Path("out/meta.json").write_text("{}"), "damaged or foreign"),
                          (lambda: Path("out/meta.json").unlink(), "no such file")):
        damage()
        assert words in refused(capsys, "inspect", "out")


# --------------------------------------------------------------------------------------------------- identity of data


def without_digests(folder: str) -> None:
    """Make a folder what an older preparation wrote."""
    path = Path(folder, "meta.json")
    meta = json.loads(path.read_text())
    later = ("train_sha256", "val_sha256", "files", "digest")
    path.write_text(json.dumps({name: value for name, value in meta.items() if name not in later}))


def put(path: str, place: int, value: int) -> None:
    tokens = np.fromfile(path, "<u2")
    tokens[place] = value
    tokens.tofile(path)


def small_planted(folder: str, *settings: str) -> dict:
    return prepare_data.main(["planted", f"--out_dir={folder}", "--train_documents=40", "--validation_documents=20",
                              *settings])


@pytest.mark.parametrize("job", ["text", "planted"])
@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_inspect_holds_all_tokens_against_the_digest_of_their_preparation(job, name, capsys):
    prepare(write("a.json", stories())) if job == "text" else small_planted("out")
    capsys.readouterr()
    assert prepare_data.main(["inspect", "out"])["problems"] == []
    digest = hashlib.sha256(Path("out", name).read_bytes()).hexdigest()
    assert f"{name} is as it was prepared: sha256 {digest}" in capsys.readouterr().out
    tokens = np.fromfile(f"out/{name}", "<u2")
    place = len(tokens) // 2
    put(f"out/{name}", place, (tokens[place] + 1) % 30)
    assert f"out/{name} is not what was prepared" in refused(capsys, "inspect", "out")
    with pytest.raises(SystemExit):
        prepare_data.main(["inspect", "out"])
    assert "no problem found" not in capsys.readouterr().out
    without_digests("out")
    prepare_data.main(["inspect", "out"])
    assert f"{name} was prepared without a digest" in capsys.readouterr().out


def test_the_fingerprint_of_a_corpus_is_that_of_its_content():
    texts = stories()
    prepare(write("a.json", texts))
    one = read_corpus("out").fingerprint
    assert len(one) == 16 and int(one, 16) >= 0
    prepare(write("b/other.jsonl", jsonl(texts)), "--out_dir=elsewhere", "--threads=1")
    assert read_corpus("elsewhere").fingerprint == one
    others = [one]
    for settings in ([write("a.json", [*texts, "one more"])], ["--input=a.json", "--seed=3"],
                     ["--input=a.json", "--vocab_size=301"]):
        prepare(*settings)
        others.append(read_corpus("out").fingerprint)
    small_planted("out")
    others.append(read_corpus("out").fingerprint)
    small_planted("out", "--seed=2")
    others.append(read_corpus("out").fingerprint)
    assert len(set(others)) == len(others) == 6


def test_the_same_tokens_of_another_tokenizer_are_other_data():
    found = []
    for letters in ("abc", "xyz"):
        write("val.json", [letters * 3])
        prepare(write("a.json", [letters * i for i in range(4, 40)]), "--val_input=val.json", "--tokenizer=char",
                "--vocab_size=none")
        found.append((Path("out/train.bin").read_bytes(), read_corpus("out").fingerprint))
        without_digests("out")
        found.append((Path("out/val.bin").read_bytes(), read_corpus("out").fingerprint))
    (train, one), (val, older), (other_train, other), (other_val, other_older) = found
    assert (train, val) == (other_train, other_val) and len({one, older, other, other_older}) == 4


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_prepared_without_digests_are_known_by_a_sample(split):
    small_planted("out")
    without_digests("out")
    one = read_corpus("out").fingerprint
    assert read_corpus("out").fingerprint == one and len(one) == 16
    put(f"out/{split}.bin", 1_000, 31 - np.fromfile(f"out/{split}.bin", "<u2")[1_000])
    assert read_corpus("out").fingerprint != one


def test_a_sample_sees_the_length_both_ends_and_64_places_between_whatever_the_type():
    tokens = np.resize(np.arange(60_000, dtype=np.uint16), 10_000_000)  # of which 64 blocks are a fifth
    one = sample(tokens)
    assert one == sample(tokens.astype(">i4")) != sample(tokens[:-1])
    blocks = []
    for place in (0, len(tokens) - 1, *range(0, len(tokens), 100_000)):
        tokens[place] += 1
        blocks.append(sample(tokens) != one)
        tokens[place] -= 1
    assert blocks[:2] == [True, True] and 10 < sum(blocks) < 40
    few = np.arange(100_000)
    for place in (0, 7, 99_999):
        changed = few.copy()
        changed[place] += 1
        assert sample(changed) != sample(few)


def test_arrays_of_ones_own_have_an_identity_too():
    train, val = np.arange(100), np.arange(50)
    one = Corpus(train, val, 100).fingerprint
    assert len(one) == 16 and one == Corpus(train.astype(np.uint16), val, 100).fingerprint
    assert one != Corpus(train, val[:-1], 100).fingerprint and one != Corpus(val, train, 100).fingerprint


# -------------------------------------------------------------------------------------------------------- planted plans

TINY = {"num_plans": 2, "num_states": 2, "vocab_size": 3, "chunk_size": 2, "document_chunks": 3}


def planted_plans(cfg: PlantedConfig) -> Plans:
    """The plans that the job makes of these settings."""
    given = {name: getattr(cfg, name) for name in signature(make_plans).parameters if name != "lengths"}
    return make_plans(**given, lengths=chunk_lengths(cfg.version, cfg.chunk_size, cfg.document_chunks))


def brute_force(process, tokens: list[int], plans: list[int] | None = None) -> np.ndarray:
    """p(x_1 .. x_t, plan of the chunk of x_t) for every t, [D - 1, K]: a sum over all plan paths and hidden paths."""
    K, S, _ = process.emission.shape
    owner = [c for c, length in enumerate(process.lengths) for _ in range(length)]
    total = np.zeros((len(tokens), K))
    for path in itertools.product(range(K), repeat=len(process.lengths)):
        if plans is not None and path != tuple(plans):
            continue
        weight = 1 if plans is not None else np.prod([1 / K, *(process.transition[a, b] for a, b in itertools.pairwise(
            path))])
        for t in range(len(tokens)):
            for states in itertools.product(range(S), repeat=t + 1):
                p = weight
                for i, state in enumerate(states):
                    k, begins = path[owner[i]], i == 0 or owner[i] != owner[i - 1]
                    p *= process.stationary[k, state] if begins else process.switch[k, states[i - 1], state]
                    p *= process.emission[k, state, tokens[i]]
                total[t, path[owner[t]]] += p
    return total


@pytest.mark.parametrize("version, lengths", [("v2_planner_required", [1, 2, 2]), ("v1_filtered_mixture", [2, 2, 2])])
@pytest.mark.parametrize("K", [1, 2])
def test_the_oracle_equals_a_sum_over_all_plan_paths_and_hidden_paths(version, lengths, K):
    rows = [[0.9, 0.1], [0.35, 0.65]] if K == 2 else [[1.0]]
    process = planted_plans(PlantedConfig(**{**TINY, "num_plans": K}, version=version, transition_matrix=rows))
    assert process.lengths == lengths
    tokens, plans = process.sample(4, np.random.default_rng(1))
    (nll, posterior), (known, _) = process.filter(tokens), process.filter(tokens, plans)
    for n in range(4):
        joint = brute_force(process, tokens[n].tolist())
        totals = joint.sum(1)
        assert np.abs(np.exp(-nll[n].cumsum()) / totals - 1).max() < 1e-10
        ends = np.cumsum(lengths) - 1
        assert np.abs(posterior[n] - joint[ends] / totals[ends, None]).max() < 1e-10
        told = brute_force(process, tokens[n].tolist(), plans[n].tolist()).sum(1)
        assert np.abs(np.exp(-known[n].cumsum()) / told - 1).max() < 1e-10


def test_all_documents_of_a_length_have_probability_one_together():
    process = planted_plans(PlantedConfig(**TINY))
    tokens = np.array(list(itertools.product(range(3), repeat=5)))
    assert np.exp(-process.filter(tokens)[0].sum(1)).sum() == pytest.approx(1, abs=1e-12)


def planted(*settings: str) -> dict:
    return prepare_data.main(["planted", "--out_dir=out", *settings])


@pytest.mark.parametrize("version, length", [("v2_planner_required", 128), ("v1_filtered_mixture", 129)])
def test_the_chain_and_the_chunks_are_as_planted(version, length):
    ring = [[0.6, 0.4, 0, 0], [0, 0.6, 0.4, 0], [0, 0, 0.6, 0.4], [0.4, 0, 0, 0.6]]
    meta = planted(f"--version={version}", "--train_documents=4000", f"--transition_matrix={ring}")
    assert meta["transition_matrix"] == ring
    process = planted_plans(PlantedConfig(version=version))
    plans = np.load("out/train_plans.npy")
    tokens = stream_source.read_stream("out")[1]["train"].reshape(-1, length)
    assert plans.shape == (4_000, 8) and plans.dtype == np.int64 and (tokens[:, 0] == 32).all()
    assert tokens[:, 1:].max() < 32 and meta["document_length"] == length
    assert np.bincount(plans[:, 0]) / 4_000 == pytest.approx([0.25] * 4, abs=0.03)
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (plans[:, :-1], plans[:, 1:]), 1)
    assert pairs / pairs.sum(1, keepdims=True) == pytest.approx(np.array(ring), abs=0.03)
    expected = np.einsum("ks,ksv->kv", process.stationary, process.emission)
    first = 16 if version.startswith("v2") else 17  # of chunk 1
    for position, chunk in ((1, 0), (first - 1, 0), (first, 1), (length - 1, 7)):
        for k in range(4):
            found = np.bincount(tokens[plans[:, chunk] == k, position], minlength=32)
            assert np.abs(found / found.sum() - expected[k]).max() < 0.06, (position, chunk)


def test_planted_meta_and_oracle_files_agree():
    meta = planted("--train_documents=10", "--validation_documents=300", "--seed=4")
    assert meta == json.loads(Path("out/meta.json").read_text())
    wanted = {"kind": "planted", "vocab_size": 33, "dtype": "uint16", "bos_id": 32, "eos_id": None, "pad_id": None,
              "unk_id": None, "tokenizer": "", "train_tokens": 1_280, "val_tokens": 38_400, "train_documents": 10,
              "val_documents": 300, "document_length": 128, "chunk_size": 16, "num_plans": 4, "seed": 4,
              "version": "v2_planner_required"}
    assert wanted.items() <= meta.items()
    oracle, plans = np.load("out/val_oracle_nll.npy"), np.load("out/val_plans.npy")
    assert (oracle.shape, oracle.dtype, plans.shape, plans.dtype) == ((300, 127), np.float32, (300, 8), np.int64)
    tokens = stream_source.read_stream("out")[1]["val"].reshape(300, 128)[:, 1:].astype(np.int64)
    process = planted_plans(PlantedConfig(seed=4))
    nll, posterior = process.filter(tokens)
    assert np.abs(oracle - nll).max() < 1e-5 and meta["oracle_nll"] == pytest.approx(nll.mean(), abs=1e-9)
    assert meta["known_plan_nll"] == pytest.approx(process.filter(tokens, plans)[0].mean(), abs=1e-9)
    counts = np.zeros((4, 4))
    np.add.at(counts, (plans, posterior.argmax(-1)), 1)
    assert meta["oracle_nmi"] == pytest.approx(mutual_information(counts), abs=1e-12)
    assert prepare_data.main(["inspect", "out"])["problems"] == []


def test_by_default_the_plan_is_worth_knowing_and_can_be_known():
    meta = planted("--train_documents=10", "--validation_documents=400")
    assert meta["known_plan_nll"] * 1.025 < meta["oracle_nll"] < 0.85 * meta["unigram_entropy"]
    assert 0.96 < meta["oracle_nmi"] < 0.995


def test_an_optimum_of_zero_has_no_excess_in_shares():
    small_planted("out", "--num_plans=1", "--num_states=1", "--state_sharpness=5000", "--plan_sharpness=0")
    corpus = read_corpus("out")
    metrics = {"val_nll": 0.5, "val_ppl": 1.6, **corpus.yardsticks(0.5, corpus.spread(4, 127, corpus.version), 127)}
    assert metrics["oracle_nll"] == 0 and metrics["excess_over_oracle"] is None
    assert verdict(metrics).endswith(", exact optimum 0.0000")
    small_planted("out")
    corpus = read_corpus("out")
    metrics |= corpus.yardsticks(5.0, corpus.spread(4, 127, corpus.version), 127)
    assert metrics["excess_over_oracle"] == pytest.approx(5 / metrics["oracle_nll"] - 1)
    assert f" is {metrics['excess_over_oracle']:.2%} above the exact optimum" in verdict(metrics)


def test_planted_documents_follow_the_seed_and_splits_differ():
    settings = ("--train_documents=40", "--validation_documents=40")
    planted(*settings)
    one = contents()
    planted(*settings)
    assert contents() == one and one["train.bin"] != one["val.bin"]
    planted(*settings, "--seed=2")
    assert contents()["train.bin"] != one["train.bin"]


def test_mutual_information_is_that_of_the_counts():
    assert mutual_information(np.eye(3)) == pytest.approx(1) and mutual_information(np.ones((2, 2))) == pytest.approx(0)
    assert mutual_information(np.array([[3.0]])) == pytest.approx(1)
    assert mutual_information(np.array([[1.0, 1.0], [0, 0]])) == pytest.approx(0)
    for counts in np.random.default_rng(0).integers(1, 60, (200, 1, 6)):  # shares that round to more than 1 among them
        assert mutual_information(counts) == pytest.approx(0, abs=1e-6)
    joint = np.array([[0.4, 0.1], [0.2, 0.3]])
    rows, columns = joint.sum(1), joint.sum(0)
    information = sum(joint[a, b] * np.log(joint[a, b] / rows[a] / columns[b]) for a in range(2) for b in range(2))
    scale = np.sqrt((rows * np.log(rows)).sum() * (columns * np.log(columns)).sum())
    assert mutual_information(50 * joint) == pytest.approx(information / scale, rel=1e-12)


@pytest.mark.parametrize("settings, words", [
    ("--num_plans=0", "num_plans: expected int >= 1"), ("--chunk_size=1", "must be at least 2"),
    ("--self_transition=1.1", "must be in [0, 1]"),
    ("--transition_matrix=[[1,0],[0,1]]", "needs 4 rows of 4"), ("--version=v3", "version"),
    ("--num_plans=1 --transition_matrix=[[0.5]]", "sum to 1"),
    ("--validation_documents=0", "documents: expected int >= 1")])
def test_bad_planted_settings_are_one_line_and_write_nothing(settings, words, capsys):
    assert words in refused(capsys, "planted", *settings.split()) and list(Path.cwd().iterdir()) == []


def test_settings_have_the_defaults_that_the_help_tells(capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(["text", "--help"])
    assert "--val_fraction" in capsys.readouterr().out and TextConfig().check() == [] and PlantedConfig().check() == []
