"""prepare_data.py: what goes in comes out unharmed, in its split, in the promised layout, or is refused in one line."""

import base64
import contextlib
import csv
import errno
import gc
import gzip
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from commands import refusal

import prepare_data
import train_arxiv
from common.errors import DataError
from configurator import configure
from sources import chunks as chunks_source
from sources import ergodic as ergodic_source
from sources import shared
from sources.cells import Reading, open_cells
from sources.chunks import ChunkSpool, Shares, Source, document, prepare_chunks
from sources.ergodic import mixture_log_prob
from sources.planted import planted
from sources.populations import synthetic
from sources.preprocess import preprocess
from sources.processes import make_process
from sources.text import prepare_text
from sources.tokenizer import load_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["cs.DS", "math.ST", "cs.IT"]
SMALL = ("--categories=cs.DS,math.ST,cs.IT", "--vocab_size=300", "--chunk_size=16", "--threads=2", "--out_dir=out")
COINS = [{"name": "heads", "process": "coin", "p": 0.95}, {"name": "fair", "process": "coin"},
         {"name": "tails", "process": "coin", "p": 0.05}]
PARTS = [{"name": "a", "process": "coin", "p": 0.9}, {"name": "b", "process": "even_ones", "vocab_map": [1, 2]},
         {"name": "c", "process": "mess3", "x": 0.1, "vocab_map": [2, 0, 1]}]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def papers(each: int = 24, **more) -> list[dict]:
    """Documents of three categories in words of their own, every fourth for validation and for test."""
    draw, found = random.Random(5), []
    for category in NAMES:
        words = ["".join(draw.choices("abcdefgé北🜁", k=draw.randint(2, 6))) for _ in range(30)]
        found += [{"text": " ".join(draw.choices(words, k=draw.randint(20, 50))) + "\n", "category": category, **more,
                   "split": ("train", "train", "validation", "test")[i % 4]} for i in range(each)]
    return found


def without(records: list[dict], key: str) -> list[dict]:
    return [{k: v for k, v in record.items() if k != key} for record in records]


def write_jsonl(records: list[dict], path: str = "papers.jsonl") -> str:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return f"--input={path}"


def prepare(*settings: str) -> dict:
    return prepare_data.main(["arxiv", *SMALL, *settings])


def ergodic(components: list[dict], *settings: str) -> dict:
    prepare_data.main(["ergodic", f"--components={json.dumps(components)}", "--train_documents=4", "--out_dir=out",
                       "--validation_documents=30", "--chunk_size=6", *settings])
    return contents("out")


def contents(folder: str, *leave_out: str) -> dict:
    """{split: {dataset: array}} of the files of a folder."""
    found = {}
    for path in sorted(Path(folder).glob("*.h5")):
        with h5py.File(path) as file:
            found[path.stem] = {name: file[name][:] for name in file if name not in leave_out}
    return found


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[s].keys() == b[s].keys() for s in a) and all(
        a[s][k].dtype == b[s][k].dtype and np.array_equal(a[s][k], b[s][k]) for s in a for k in a[s])


def refused(capsys, *argv: str) -> str:
    told = refusal(capsys, prepare_data.main, *argv)
    gc.collect()  # a file left open is an error here, not in a later test
    return told


# --------------------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def bpe():
    return train_bpe((record["text"] for record in papers()), 400)


def any_texts(count: int = 300) -> list[str]:
    draw = random.Random(11)
    planes = [range(0x20), range(0x7F, 0x100), range(0x20, 0x7F), range(0x370, 0xD800), range(0xE000, 0x10000),
              range(0x1F300, 0x1FA00), range(0x10FFFE, 0x110000), [0x200D, 0xFE0F, 0x0D, 0x0A, 0x85, 0x2028, 0xFEFF]]
    mixed = ["".join(chr(draw.choice(draw.choice(planes))) for _ in range(draw.randint(0, 40))) for _ in range(count)]
    return [*mixed, *map(chr, range(256)), "", "👩🏽‍🚀🏴‍☠️", "a\r\n\r\n  b \t\n", "<|endoftext|>", "don't 1234567"]


def test_bpe_gives_back_any_text_before_and_after_a_save(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    loaded, texts = load_tokenizer(tmp_path / "tokenizer.json"), any_texts()
    ids = bpe.encode_batch(texts, threads=2)
    assert [bpe.decode(i) for i in ids] == texts and [loaded.decode(i) for i in ids] == texts
    assert ids == [bpe.encode(text) for text in texts] == loaded.encode_batch(texts)
    assert loaded.spec == bpe.spec and loaded.vocab_size == bpe.vocab_size == 400
    assert {i for row in ids for i in row} <= set(range(400))


def test_bpe_has_every_byte_and_merges_what_it_saw(bpe):
    tokens = [base64.b64decode(token) for token in bpe.spec["tokens"]]
    assert len(set(tokens)) == 400 and {bytes([b]) for b in range(256)} <= set(tokens)
    text = papers()[0]["text"]
    assert len(bpe.encode(text)) < 0.7 * len(text.encode())
    bytes_alone = train_bpe([text], 256)
    assert len(bytes_alone.encode(text)) == len(text.encode()) and bytes_alone.decode(bytes_alone.encode(text)) == text


def test_training_twice_gives_the_same_tokenizer(bpe):
    texts = [record["text"] for record in papers()]
    assert train_bpe(texts, 400).spec == bpe.spec != train_bpe([text[::-1] for text in texts], 400).spec


@pytest.mark.parametrize("size, words", [(255, "at least 256"), (100_000, "supports only")])
def test_a_vocabulary_that_cannot_be_is_refused(size, words):
    with pytest.raises(DataError, match=f"vocab_size = {size}.*{words}"):
        train_bpe(["hello hello"], size)


BYTES = [base64.b64encode(bytes([b])).decode() for b in range(256)]


@pytest.mark.parametrize("text", [
    "{", "[]", "", '{"kind": "bpe"}', '{"a": 1}', json.dumps({"kind": "bpe", "pattern": ".", "tokens": ["%"]}),
    json.dumps({"kind": "bpe", "pattern": "(", "tokens": BYTES}), '{"kind": "bpe", "pattern": ".", "tokens": 3}',
    json.dumps({"kind": "bpe", "pattern": ".", "tokens": BYTES[:-1]}),
    json.dumps({"kind": "bpe", "pattern": ".", "tokens": [*BYTES, BYTES[0]]})], ids=lambda text: text[-30:])
def test_a_damaged_or_foreign_tokenizer_is_refused(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_tokenizer_and_a_missing_package_are_named(capsys, monkeypatch):
    given = write_jsonl(papers())
    assert "nowhere.json" in refused(capsys, "arxiv", *SMALL, given, "--tokenizer=nowhere.json")
    Path("hf.json").write_text('{"model": {}}')
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in refused(capsys, "arxiv", *SMALL, given, "--tokenizer=hf.json")
    assert not Path("out").exists()


class Letters:
    """A stand-in for tokenizers.Tokenizer: a token a character, of the vocabulary size that its file claims."""

    def __init__(self, spec: str):
        self.spec = json.loads(spec)

    def get_vocab_size(self) -> int:
        return self.spec["model"]["size"]

    def get_vocab(self, with_added_tokens: bool) -> dict[str, int]:
        return {}

    def encode_batch(self, texts: list[str], add_special_tokens: bool):
        return [SimpleNamespace(ids=[*([0] if add_special_tokens else []), *map(ord, text)]) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize("size, accepted", [(200_000, True), (1_000, False)])
def test_a_hugging_face_tokenizer_is_used_and_held_to_its_vocabulary(size, accepted, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=SimpleNamespace(from_str=Letters)))
    given = write_jsonl(papers())
    Path("hf.json").write_text(json.dumps({"model": {"size": size}}))
    if not accepted:
        assert "vocab_size = 1000" in refused(capsys, "arxiv", *SMALL, given, "--tokenizer=hf.json")
        assert not Path("out").exists()
        return
    prepare(given, "--tokenizer=hf.json")
    first = next(record["text"] for record in papers() if record["split"] == "train")
    tokens = contents("out")["train"]["token_chunks"]
    assert tokens.dtype == np.uint32 and load_tokenizer("out/tokenizer.json").decode(tokens[0]) == first[:16]


def test_a_real_hugging_face_tokenizer_is_read(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"b": 0, "a": 1}, unk_token="b")).save(str(tmp_path / "hf.json"))
    found = load_tokenizer(tmp_path / "hf.json")
    assert (found.encode("a"), found.vocab_size, found.kind) == ([1], 2, "huggingface")


# ------------------------------------------------------------------------------------------------------------ sources


def write_csv(records: list[dict]) -> str:
    with open("papers.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(records[0]))
        table.writeheader()
        table.writerows(records)
    return "--input=papers.csv"


def write_folder(records: list[dict]) -> str:
    for i, record in enumerate(records):
        path = Path("papers", record["category"], f"{i:04}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record["text"], encoding="utf-8")
    return "--input=papers"


def write_parquet(records: list[dict]) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), "papers.parquet")
    return "--input=papers.parquet"


DEALT = ("--validation_fraction=0.25", "--test_fraction=0.25")


@pytest.mark.parametrize("write", [write_csv, write_folder, write_parquet])
def test_every_kind_of_file_gives_the_same_chunks(write):
    records = without(papers(), "split")
    prepare(write_jsonl(records), *DEALT)
    prepare(write(records), *DEALT, "--out_dir=other")
    assert same(contents("out"), contents("other")) and set(contents("out")) == {"train", "validation", "test"}
    assert Path("out/tokenizer.json").read_bytes() == Path("other/tokenizer.json").read_bytes()


class Rows(list):
    features = None


def hub(monkeypatch, records: list[dict], features: dict | None, name: str = "ccdv/arxiv-classification") -> None:
    """A stand-in for the package datasets that serves these records."""

    def load_dataset(path, config, streaming):
        assert (path, config, streaming) == (name, "no_ref", True)
        found = {split: Rows(without([r for r in records if r["split"] == split], "split"))
                 for split in ("train", "validation", "test")}
        for rows in found.values():
            rows.features = features
        return found

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize("column, names", [("label", ["math.ST", "cs.IT", "cs.DS"]), ("label", None),
                                           ("topic", ["math.ST", "cs.IT", "cs.DS"])])
def test_the_hub_gives_the_same_chunks_whether_labels_have_names_or_are_ccdvs_numbers(monkeypatch, column, names):
    prepare(write_jsonl(papers()))
    numbered = [{**r, column: (names or chunks_source.CCDV_LABELS).index(r["category"])} for r in papers()]
    features = {column: SimpleNamespace(names=names)} if names else {column: SimpleNamespace(dtype="int64")}
    hub(monkeypatch, without(numbered, "category"), features)
    prepare("--out_dir=other", *[f"--label_column={column}"] * (column != "label"))
    assert same(contents("out"), contents("other"))


@pytest.mark.parametrize("names", [NAMES, None])
def test_a_hub_document_of_unknown_label_is_of_no_category(monkeypatch, names):
    """-1 stands for a label that is withheld."""
    records = [{**r, "label": (names or chunks_source.CCDV_LABELS).index(r["category"])} for r in papers()]
    records += [{"text": f"{i} withheld " * 20, "label": -1, "split": "train"} for i in range(5)]
    hub(monkeypatch, without(records, "category"), {"label": SimpleNamespace(names=names)})
    prepare("--out_dir=other")
    prepare(write_jsonl(papers()))
    assert same(contents("out"), contents("other"))


def test_a_hub_that_cannot_be_had_is_one_line_with_the_way_round(capsys, monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    assert "no route" in (told := refused(capsys, "arxiv", *SMALL)) and "--input=FILE.jsonl" in told
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(capsys, "arxiv", *SMALL) and list(Path.cwd().iterdir()) == []


LABELLED = ("--vocab_size=280", "--chunk_size=8", "--threads=1", "--out_dir=out")


def label(*settings: str) -> dict:
    """Documents of papers.jsonl by category and split, prepared without naming the categories."""
    prepare_data.main(["arxiv", *LABELLED, "--input=papers.jsonl", *settings])
    return documents_of("out")


def labelled(labels: list) -> None:
    """papers.jsonl with twelve documents of each label, in all three splits."""
    rows = []
    splits = ("train", "train", "validation", "test")
    for i, name in enumerate(12 * labels):
        text = f"document {i} about " + " ".join(f"word{i * k % 97}" for k in range(30))
        rows.append({"text": text, "label": name, "split": splits[i // len(labels) % 4]})
    write_jsonl(rows)


@pytest.mark.parametrize("more", [[], ["--categories=0,1,2,10"]])
@pytest.mark.parametrize("labels", [[2, 10, 0, 1], ["2", "10", "0", "1"], [2.0, 10.0, 0.0, 1.0]], ids=str)
def test_numbers_of_a_file_are_its_own_labels_and_no_names_of_ccdvs(labels, more):
    labelled(labels)
    assert label(*more)["train"] == {"0": 6, "1": 6, "2": 6, "10": 6}
    with h5py.File("out/train.h5") as file:
        assert file["category_code"].attrs["names"].tolist() == ["0", "1", "2", "10"]  # as numbers are sorted


@pytest.mark.parametrize("names", [["c", "a", "b"], ["machine learning", "old news"], [True, False]], ids=str)
def test_without_categories_all_that_a_file_has_are_taken(names):
    labelled(names)
    found = {str(name): 6 for name in sorted(map(str, names))}
    assert label() == {"train": found, "validation": {k: 3 for k in found}, "test": {k: 3 for k in found}}
    assert label(f"--categories={names[0]}")["train"] == {str(names[0]): 6}


def test_without_categories_five_of_ccdvs_data_set_are_taken(monkeypatch):
    names = chunks_source.CCDV_LABELS
    draw = random.Random(3)
    words = [f"word{i}" for i in range(60)]
    records = [{"text": " ".join(draw.choices(words, k=20)), "label": i % len(names),
                "split": ("train", "validation", "test")[i // len(names) % 3]} for i in range(12 * len(names))]
    hub(monkeypatch, records, {"label": SimpleNamespace(names=None)})
    prepare_data.main(["arxiv", *LABELLED])
    assert documents_of("out")["train"] == dict.fromkeys(chunks_source.CATEGORIES, 4)


def test_numbers_of_another_data_set_of_the_hub_are_its_own_labels(monkeypatch):
    records = [{**record, "label": NAMES.index(record["category"])} for record in papers()]
    hub(monkeypatch, without(records, "category"), {"label": SimpleNamespace(names=None)}, "other/papers")
    prepare_data.main(["arxiv", "--input=other/papers", *LABELLED])
    assert documents_of("out")["train"] == {"0": 12, "1": 12, "2": 12}


SEVERAL = [["cs.DS", "math.CO"], ["math.CO", "cs.DS", "hep-th"], ["hep-th"]]


@pytest.mark.parametrize("spell", [list, " ".join, ", ".join, repr, json.dumps, lambda labels: [" ".join(labels)]],
                         ids=["list", "arxiv", "commas", "python", "json", "listed_arxiv"])
def test_a_document_of_several_labels_is_of_the_first_unless_any_counts(spell, capsys):
    labelled([spell(labels) for labels in SEVERAL])
    assert label()["train"] == {"cs.DS": 6, "hep-th": 6, "math.CO": 6}
    told = capsys.readouterr().out
    assert told.count("several labels") == 1 and "24 documents of several labels: the first counts" in told
    assert label("--categories=cs.DS,hep-th")["train"] == {"cs.DS": 6, "hep-th": 6}
    assert label("--categories=cs.DS,hep-th", "--several_labels=any")["train"] == {"cs.DS": 12, "hep-th": 6}
    assert "the first that categories names counts" in capsys.readouterr().out
    assert "any takes the first label that categories names" in refused(capsys, "arxiv", "--several_labels=any")


def test_what_is_no_list_of_arxivs_categories_is_one_label():
    for cell in ("machine learning", "cs", "a, b", "cs.DS and more", "[draft", "semi-supervised"):
        assert chunks_source.labels_of(cell) == [cell]
    for cell in (None, "", [], [None], float("nan"), "[]"):
        assert chunks_source.labels_of(cell) == []
    assert chunks_source.labels_of("cond-mat.str-el  math-ph q-bio.NC") == ["cond-mat.str-el", "math-ph", "q-bio.NC"]
    assert chunks_source.labels_of("a\ud83d") == ["a\ufffd"]


def test_documents_without_text_or_label_are_skipped_and_counted(capsys):
    records = papers()
    more = [{**records[0], "text": None}, {**records[0], "text": float("nan")}, {**records[1], "category": None},
            {**records[1], "category": "", "text": "other"}, {**records[1], "category": [], "text": "another"}]
    prepare(write_jsonl([*more, *records]))
    assert "documents: 72 of 3 categories, 24 of each; dropped 2 without text, 3 without a label\n" in (
        capsys.readouterr().out)
    prepare(write_jsonl(records), "--out_dir=other")
    assert same(contents("out"), contents("other"))


def test_a_split_that_a_table_leaves_empty_is_dealt():
    records = [{**record, "split": float("nan")} for record in papers()]
    prepare(write_jsonl(records), *DEALT)
    prepare(write_jsonl(without(records, "split")), *DEALT, "--out_dir=other")
    assert same(contents("out"), contents("other"))


@pytest.mark.parametrize("labels, words", [
    (range(300), "column 'label' has more than 256 labels, so it names no categories: use another label_column=NAME"),
    (["a", "long " * 60], "column 'label' has the label 'long long"),
    (["a", "b", "rare"], "validation: no document of rare; use more documents, deal them anew by --split_column='', or "
                         "name what to keep: categories=a,b"),
    (["a", "b", "untrained"], "train: no document of untrained")])
def test_labels_that_cannot_all_be_categories_are_refused(labels, words, capsys):
    labelled(list(labels))
    held_out = {"rare": "validation", "untrained": "train"}
    rows = [json.loads(line) for line in Path("papers.jsonl").read_text().splitlines()]
    write_jsonl([row for row in rows if held_out.get(row["label"]) != row["split"]])
    assert words in refused(capsys, "arxiv", *LABELLED, "--input=papers.jsonl") and not Path("out").exists()


def test_a_category_that_is_not_tested_is_said(capsys):
    labelled(["a", "b"])
    rows = [json.loads(line) for line in Path("papers.jsonl").read_text().splitlines()]
    write_jsonl([row for row in rows if (row["label"], row["split"]) != ("b", "test")])
    found = label()
    assert found["test"] == {"a": 3} and found["train"] == {"a": 6, "b": 6}
    assert "test: no document of b" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(3))
def test_of_few_documents_of_a_category_each_split_has_one_and_a_lone_document_is_left_out(seed, capsys):
    labelled(["a", "b"])
    rows = without([json.loads(line) for line in Path("papers.jsonl").read_text().splitlines()], "split")
    write_jsonl([*rows[:7], {**rows[9], "label": "lone"}])  # 4 of a, 3 of b
    found = label(f"--seed={seed}")
    assert [found[split]["b"] for split in ("train", "validation", "test")] == [1, 1, 1]
    assert sorted(found[split]["a"] for split in ("train", "validation", "test")) == [1, 1, 2]
    told = capsys.readouterr()
    assert "documents: 7 of 2 categories, 3 to 4 of each; dropped 1 alone in their categories ('lone')" in told.out
    assert "b has " in told.err and "to train on, and of each category as many are taken" in told.err
    write_jsonl(rows[:2])
    refused(capsys, "arxiv", *LABELLED, "--input=papers.jsonl")


def test_what_is_held_out_by_need_is_long_enough_for_a_chunk():
    texts = [f"{i} " + "word " * (2 + 40 * (i % 2)) for i in range(20)]
    order = Shares(validation=0.1, test=0.1, seed=3, long=100).order
    ranked = sorted(texts, key=order)
    assert [len(text) > 100 for text in ranked] == [True] * 10 + [False] * 10 and ranked[:10] != sorted(ranked[:10])


def test_arxivs_own_columns_are_found_and_what_was_found_is_said(capsys):
    records = without(papers(), "split")
    prepare(write_jsonl([{**record, "text": f"{i} title\n\n{record['text'].strip()}"}
                         for i, record in enumerate(records)]), *DEALT)
    with open("table.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "Title", "Abstract", "Categories"])
        table.writerows([7, f"{i}\n  title", f"  {record['text']}", f"{record['category']} math.CO"]
                        for i, record in enumerate(records))
    prepare("--input=table.csv", *DEALT, "--out_dir=other")
    assert "; text: Title and Abstract, label: Categories" in capsys.readouterr().out
    assert same(contents("out"), contents("other"))
    Path("table.csv").write_text("body,categry\n" + "a long text of many words and letters too,x\n" * 3)
    assert "--text_column=body" in refused(capsys, "arxiv", "table.csv")
    assert "--label_column=categry" in refused(capsys, "arxiv", "table.csv", "--text_column=body")


def test_the_folder_is_named_after_the_input_and_the_next_commands_train_on_it(capsys):
    write_jsonl(papers(), "my papers.json")
    prepare_data.main(["arxiv", "my papers.json", *SMALL[:-1]])
    out = capsys.readouterr().out.splitlines()
    assert len(out) <= 8 and out[-2].startswith("next: python train_arxiv.py --data=data/my_papers ")
    cfg = configure(train_arxiv.Config, out[-2].split()[3:])
    train, validation = train_arxiv.open_data(cfg)
    rows = train_arxiv.training_rows(train, NAMES, cfg)
    sizes = np.bincount(train.codes)
    assert np.bincount(train.codes[rows]).tolist() == [sizes.min()] * 3  # of each category as much as can be
    assert out[-1].split("train_arxiv.py ")[1] == (
        "--data=data/my_papers --study=nested:1,2,3 --out_dir=out/my_papers_study")


def test_a_label_of_a_repeated_text_alone_is_no_category():
    labelled(["a", "b"])
    rows = [json.loads(line) for line in Path("papers.jsonl").read_text().splitlines()]
    write_jsonl([*rows, {**rows[0], "label": "c"}, {**rows[0], "label": "d", "text": " "}])
    assert set(label()["train"]) == {"a", "b"}


def test_tables_with_a_byte_order_mark_and_packed_files_and_json_of_a_folder_are_read(capsys):
    records = papers()
    write_csv(records[:24])
    Path("in").mkdir()
    Path("in/A.CSV").write_text(Path("papers.csv").read_text(), encoding="utf-8-sig")
    write_jsonl(records[24:48])
    Path("in/b.jsonl.gz").write_bytes(gzip.compress(Path("papers.jsonl").read_bytes()))
    Path("in/c.json").write_text(json.dumps(records[48:60]))
    Path("in/d.json").write_text("".join(json.dumps(record) + "\n" for record in records[60:]))
    Path("in/notes.md").write_text("none")
    prepare("--input=in")
    assert "in: 4 files read, 1 skipped" in (told := capsys.readouterr().out) and "notes.md" in told
    prepare(write_jsonl(records), "--out_dir=other")
    assert same(contents("out"), contents("other"))


def test_a_folder_of_texts_in_utf_16_is_read():
    for i, record in enumerate(records := without(papers(), "split")):
        path = Path("papers", record["category"], f"{i:04}.TXT")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record["text"], encoding="utf-16")
    prepare("--input=papers", *DEALT)
    prepare(write_jsonl(records), *DEALT, "--out_dir=other")
    assert same(contents("out"), contents("other"))


def documents_of(folder: str) -> dict[str, Counter]:
    """{split: how many documents of each category}."""
    return {split: Counter(np.array(data["category_for_chunk"])[np.unique(data["doc_idx_for_chunk"], return_index=True)[
        1]].astype(str).tolist()) for split, data in contents(folder).items()}


def test_given_splits_are_kept_by_any_of_their_names():
    records = [{**r, "split": {"validation": ("val", "dev", "valid")[i % 3]}.get(r["split"], r["split"])}
               for i, r in enumerate(papers())]
    prepare(write_jsonl(records))
    assert documents_of("out") == {split: dict.fromkeys(NAMES, n) for split, n in
                                   (("train", 12), ("validation", 6), ("test", 6))}


def test_documents_without_a_split_are_dealt_by_their_text_and_the_seed_alone():
    source = Source("papers.jsonl", "", "text", "", "split")
    one, other = (Shares(validation=0.2, test=0.1, seed=seed) for seed in (1, 2))
    texts = [f"document {i}" for i in range(3_000)]
    dealt = [document("here", {"text": text, "label": "a"}, source, one)[0] for text in texts]
    again = [document("there", {"category": "b", "text": text}, source, one)[0] for text in texts]
    shares = Counter(dealt)
    assert dealt == again and shares["validation"] == pytest.approx(600, abs=80)  # 3.6 standard deviations
    assert shares["test"] == pytest.approx(300, abs=60)
    assert dealt != [document("here", {"text": text, "label": "a"}, source, other)[0] for text in texts]


def test_a_document_that_repeats_in_any_split_or_category_is_dropped(capsys):
    records = papers()
    twins = [{**records[0], "split": "test"}, records[1], {**records[0], "category": "cs.IT"}, {**records[5],
             "split": "validation"}, {**records[0], "text": " \n"}]
    prepare(write_jsonl([*records, *twins, {**records[0], "category": "cs.CV"}]))
    assert "dropped 5 empty or repeated, 1 of other categories" in capsys.readouterr().out
    prepare(write_jsonl(records), "--out_dir=other")
    assert same(contents("out"), contents("other"))
    assert prepare_data.inspect("out/train.h5")["problems"] == []


def test_half_an_emoji_in_a_document_is_no_reason_to_fail():
    records = papers()
    records[0]["text"] += "\ud83d"  # as JSON cut in the middle of a pair has it
    prepare(write_jsonl(records))
    assert documents_of("out")["train"]["cs.DS"] == 12


def broken(name: str) -> list[str]:
    """Settings for a source with one defect."""
    records, path = papers(), Path("papers.jsonl")
    write_jsonl(records)
    if name == "json":
        path.write_text(path.read_text().replace('{"text"', '{"text', 3).replace('{"text', '{"text"', 2))
    elif name == "array":
        path.write_text("[1]\n" + path.read_text())
    elif name == "bytes":
        path.write_bytes(path.read_bytes() + b'{"text": "\xff"}')
    elif name in ("split", "text"):
        records[4] |= {"split": {"split": "holdout"}, "text": {"text": 5}}[name]
        write_jsonl(records)
    elif name == "text_missing":
        del records[4]["text"]
        write_jsonl(records)
    elif name == "empty":
        path.write_text("")
    elif name == "no_validation":
        write_jsonl([r for r in records if r["split"] == "train"])
    elif name == "category_without_validation":
        write_jsonl([r for r in records if r["split"] != "validation" or r["category"] != "cs.IT"])
    elif name == "folder":
        Path("papers").mkdir()
    return ["--input=papers" if name in ("folder", "no_such_folder") else "--input=papers.jsonl"]


@pytest.mark.parametrize("defect, more, words", [
    ("", "--categories=cs.DQ,math.ST", "'cs.DQ', did you mean 'cs.DS'"),
    ("", "--text_column=body", "Name it: --text_column=text"),
    ("", "--label_column=labels", "no column 'labels'; there are 'text', 'category', 'split'"),
    ("empty", "", "papers.jsonl is empty"),
    ("json", "", "papers.jsonl, line 3: not JSON"), ("array", "", "line 1: expected an object"),
    ("bytes", "", "papers.jsonl"), ("split", "", "line 5: split 'holdout' is none of train, validation"),
    ("text", "", "line 5: column 'text' holds int"),
    ("text_missing", "", "line 5: no column 'text'; there are 'category', 'split'"),
    ("no_validation", "", "no validation documents"), ("category_without_validation", "", "no document of cs.IT"),
    ("folder", "", "holds no .txt"), ("no_such_folder", "", "no such file"), ("", "--chunk_size=5000", "chunk_size"),
    ("", "--vocab_size=9000", "supports only"), ("", "--vocab_size=90", "at least 256"),
    ("", "--chunk_size=0", "at least 2"),
    ("", "--categories=cs.DS,cs.DS", "each once"), ("", "--categoris=a", "did you mean categories"),
    ("", "--out_dir=papers.jsonl", "another folder"), ("", "--test_fraction=0.99", "test_fraction")])
def test_bad_input_is_one_line_and_leaves_nothing(defect, more, words, capsys):
    settings = [*SMALL, *broken(defect), *more.split()]
    before = sorted(Path.cwd().rglob("*"))
    assert words in refused(capsys, "arxiv", *settings)
    assert sorted(Path.cwd().rglob("*")) == before


# ---------------------------------------------------------------------------------------------- files of token chunks


def test_chunks_are_cut_from_one_document_each_and_a_categorys_lie_together(capsys):
    prepare(write_jsonl(papers()))
    printed, tokenizer = capsys.readouterr().out, load_tokenizer("out/tokenizer.json")
    for split in ("train", "validation", "test"):
        chunks, owners, documents, tails, number = [], [], [], 0, 0
        for category, record in itertools.product(NAMES, papers()):
            if (category, split) == (record["category"], record["split"]):
                ids = tokenizer.encode(record["text"])
                cut = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
                chunks, owners = chunks + cut, owners + [category] * len(cut)
                documents, number = documents + [number] * len(cut), number + 1
                tails += len(ids) - 16 * len(cut)
        with h5py.File(f"out/{split}.h5") as file:
            assert file["token_chunks"][:].tolist() == chunks and file["token_chunks"].dtype == np.uint16
            assert file["doc_idx_for_chunk"][:].tolist() == documents
            assert file["category_for_chunk"].asstr()[:].tolist() == owners
            assert file["category_code"][:].tolist() == [NAMES.index(name) for name in owners]
            assert file["category_code"].attrs["names"].tolist() == NAMES
            attributes = {k: v if isinstance(v, str) else v.tolist() for k, v in file.attrs.items()}
        assert len(attributes.pop("sha256")) == 64 and attributes.pop("checksums")
        assert attributes == {
            "token_chunk_size": 16, "selected_categories_in_file": NAMES, "vocab_size": 300, "seed": 1337,
            "reference_chunk_budget_smallest_top_category": min(Counter(owners).values()),
            "tokenizer": "tokenizer.json", "source": "papers.jsonl"}
        assert f"{split}: {len(chunks):,} chunks" in printed and f"{tails:,} tail tokens dropped" in printed


@pytest.mark.parametrize("vocab_size, kind", [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"),
                                              (65_537, "uint32")])
def test_tokens_are_of_the_smallest_type_that_holds_them(vocab_size, kind):
    spool = ChunkSpool(Path(), "train", 3, vocab_size)
    spool.add("a", [0, 1, vocab_size - 1, 1])
    with pytest.raises(DataError, match=f"has the token {vocab_size}"):
        spool.add("a", [vocab_size] * 3)
    spool.write(Path("train.h5"))
    spool.close()
    found = contents(".")["train"]["token_chunks"]
    assert (found.dtype, found.tolist(), spool.dropped) == (kind, [[0, 1, vocab_size - 1]], 1)


def test_a_full_disk_midway_keeps_the_older_files_and_leaves_nothing_else(monkeypatch, capsys):
    prepare(write_jsonl(papers()))
    before, write = {path: path.read_bytes() for path in Path("out").rglob("*")}, ChunkSpool.write

    def full(self, path, **attributes):
        write(self, path, **attributes)
        if path.name == "validation.h5":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(ChunkSpool, "write", full)
    for folder in ("out", "new"):
        told = refusal(capsys, prepare_data.main, "arxiv", *SMALL, "--input=papers.jsonl", "--chunk_size=20",
                       f"--out_dir={folder}")
        assert "validation.h5: no space left on device: free some space" in told
    assert {path: path.read_bytes() for path in Path("out").rglob("*")} == before and not Path("new").exists()


def test_a_new_preparation_leaves_no_file_of_the_older_one():
    prepare(write_jsonl(papers()))
    prepare(write_jsonl([record for record in papers() if record["split"] != "test"]), "--vocab_size=280")
    assert {path.name for path in Path("out").iterdir()} == {"tokenizer.json", "train.h5", "validation.h5"}


# ------------------------------------------------------------------------------------- synthetic documents and oracles


@pytest.mark.parametrize("members", [[0, 1, 2], [0, 2], [1]])
def test_the_oracle_of_any_mixture_is_that_of_the_nonergodic_process_and_of_brute_force(members):
    data = ergodic(PARTS)["validation"]
    log_prob, rows = data["oracle_log_prob"], np.isin(data["category_code"], members)
    words = torch.from_numpy(data["token_chunks"][rows].astype(np.int64))
    parts = [{k: v for k, v in PARTS[m].items() if k != "name"} for m in members]
    found = mixture_log_prob(log_prob[rows][:, members])
    exact = make_process("nonergodic", components=parts).log_prob(words).numpy()
    assert np.abs(found - exact).max() < 1e-5 and len(words) == 60 * len(members)

    def word_probability(part: dict, word: list[int]) -> float:  # a sum over all hidden paths
        process, tokens = make_process(part["process"], **{k: v for k, v in part.items() if k in "xpa"}), \
            part.get("vocab_map", [0, 1, 2][: 2 if part["process"] == "coin" else 3])
        state = process.stationary_state.numpy()
        for token in word:
            if token not in tokens:
                return 0.0
            state = state @ process.transition_matrices[tokens.index(token)].numpy()
        return float(state.sum())

    for word, total in zip(words[:5].tolist(), found[:5].sum(1), strict=True):
        assert math.exp(total) == pytest.approx(np.mean([word_probability(p, word) for p in parts]), rel=1e-4)
    if len(members) == 3:
        for k in range(3):
            mine = data["category_code"] == k
            assert np.abs(data["oracle_xe_mixture"][k] + found[mine].mean(0)).max() < 1e-5
            assert np.abs(data["oracle_xe_component"][k] + log_prob[mine, k].mean(0)).max() < 1e-5


def test_what_the_component_is_worth_is_at_most_log_k_and_nearly_that_in_a_long_context():
    data = ergodic(COINS, "--chunk_size=100", "--validation_documents=100")["validation"]
    worth = (data["oracle_xe_mixture"] - data["oracle_xe_component"]).mean(0).cumsum()
    assert worth[0] < 0.5 * math.log(3) and 0.98 * math.log(3) < worth[-1] <= math.log(3) + 1e-9


@pytest.mark.parametrize("start", [{"initial_state": [1, 0, 0]}, {"add_bos": True}], ids=str)
def test_a_component_with_a_special_start_is_refused_or_has_finite_oracles_in_later_chunks_too(start):
    with contextlib.suppress(SystemExit):
        data = ergodic([{"process": "zero_one_random", **start}, {"process": "coin"}], "--chunk_size=4")["validation"]
        assert np.isfinite(data["oracle_xe_component"]).all() and np.isfinite(data["oracle_xe_mixture"]).all()


def test_synthetic_documents_follow_the_seed_go_on_over_their_chunks_and_differ_between_splits():
    parts = [{"process": "zero_one_random"}, {"process": "mess3"}]
    settings = ("--chunk_size=10", "--train_documents=30")
    one, two = (ergodic(parts, *settings) for _ in range(2))
    assert same(one, two) and not same(one, ergodic(parts, *settings, "--seed=2"))
    data = one["train"]
    assert data["doc_idx_for_chunk"].tolist() == np.repeat(range(60), 2).tolist()
    whole = torch.from_numpy(data["token_chunks"][:60].reshape(30, 20).astype(np.int64))
    assert make_process("zero_one_random").log_prob(whole).isfinite().all()
    assert not np.array_equal(data["token_chunks"][60:], one["validation"]["token_chunks"][60:])


# --------------------------------------------------------------------------------------------- inspection and reading


def change(path: str, name: str, edit) -> None:
    with h5py.File(path, "a") as file:
        values = edit(file[name][:])
        attributes = dict(file[name].attrs)
        del file[name]
        file[name] = values
        file[name].attrs.update(attributes)


def without_digest(path: str) -> None:
    """Make a file what an older preparation wrote."""
    with h5py.File(path, "a") as file:
        del file.attrs["sha256"], file.attrs["checksums"]


def identity(path: str) -> str:
    return chunks_source.chunk_arrays(Path(path))["fingerprint"]


def other_layout(path: str, copy: str) -> None:
    """The same chunks as a file of other types, compressed and in pieces."""
    with h5py.File(path) as file, h5py.File(copy, "w") as other:
        other.create_dataset("token_chunks", data=file["token_chunks"][:].astype(">i8"), chunks=(7, 6),
                             compression="gzip")
        labels = file["category_for_chunk"][:].astype(str).astype(object)
        other.create_dataset("category_for_chunk", dtype=h5py.string_dtype(), data=labels)
        other["doc_idx_for_chunk"] = file["doc_idx_for_chunk"][:].astype(np.int32)
        other.attrs.update(file.attrs)


@pytest.mark.parametrize("job", ["arxiv", "ergodic"])
def test_inspect_holds_all_chunks_against_the_digest_of_their_preparation(job, capsys):
    prepare(write_jsonl(papers())) if job == "arxiv" else ergodic(PARTS)
    capsys.readouterr()
    found = prepare_data.main(["inspect", "out"])
    assert set(found) == {"train", "validation", "test"}
    assert capsys.readouterr().out.count("are as they were prepared: sha256 ") == 3
    other_layout("out/train.h5", "copy.h5")
    assert identity("copy.h5") == identity("out/train.h5") != identity("out/validation.h5")
    prepare_data.main(["inspect", "copy.h5"])  # the digest is that of the content
    for name, edit in (("token_chunks", spoil(3, 1)), ("category_code", lambda codes: codes[::-1])):
        before = Path("out/train.h5").read_bytes()
        change("out/train.h5", name, edit)
        wrong = "is not what was prepared" if name == "token_chunks" else "disagree about chunk 0"
        assert wrong in refused(capsys, "inspect", "out")
        Path("out/train.h5").write_bytes(before)
    with h5py.File("out/train.h5", "a") as file:
        codes, labels = file["category_code"], file["category_for_chunk"]
        codes.attrs["names"] = [f"{name}".swapcase() for name in codes.attrs["names"]]
        labels[:] = np.char.swapcase(labels[:])
    assert "out/train.h5 is not what was prepared" in refused(capsys, "inspect", "out/train.h5")
    with pytest.raises(SystemExit):
        prepare_data.main(["inspect", "out/train.h5"])
    assert "no problem found" not in capsys.readouterr().out
    without_digest("out/train.h5")
    prepare_data.main(["inspect", "out/train.h5"])
    assert "prepared without a digest" in capsys.readouterr().out


def test_the_fingerprint_of_chunks_is_that_of_their_content():
    prepare(write_jsonl(papers()))
    one = identity("out/train.h5")
    assert len(one) == 16 and int(one, 16) >= 0
    prepare(write_jsonl(papers(), "elsewhere.jsonl"), "--out_dir=other", "--threads=1")
    assert identity("other/train.h5") == one
    found = [one, identity("out/validation.h5")]
    for settings in (["--chunk_size=8"], ["--vocab_size=290"], ["--categories=cs.DS,cs.IT,math.ST"],
                     ["--max_documents=9"]):
        prepare("--input=papers.jsonl", *settings)
        found.append(identity("out/train.h5"))
    ergodic(PARTS)
    found.append(identity("out/train.h5"))
    assert len(set(found)) == len(found) == 7
    train, validation = chunks_source.train_and_validation(Path("out"))
    assert train["fingerprint"] == identity("out/train.h5") and validation["fingerprint"] == identity(
        "out/validation.h5")


def test_chunks_prepared_without_a_digest_are_known_by_a_sample():
    prepare(write_jsonl(papers()))
    without_digest("out/train.h5")
    one = identity("out/train.h5")
    other_layout("out/train.h5", "copy.h5")
    assert identity("copy.h5") == one == identity("out/train.h5")
    change("out/train.h5", "token_chunks", spoil(3, 1))
    changed = identity("out/train.h5")
    found = [one, changed]
    for edit in (lambda labels: labels[::-1], lambda labels: np.array([b"x" + label for label in labels], object)):
        change("copy.h5", "category_for_chunk", edit)
        found.append(identity("copy.h5"))
    assert len(set(found)) == 4


def spoil(row: int, value: int):
    def edit(tokens: np.ndarray) -> np.ndarray:
        tokens = tokens.astype(np.int64)
        tokens[row] = tokens[row + 1] if value == 0 else value
        return tokens

    return edit


def test_inspect_counts_and_finds_nothing_wrong_in_a_good_file(capsys):
    sizes = prepare(write_jsonl(papers()))
    capsys.readouterr()
    found = prepare_data.main(["inspect", "out/train.h5", "--tokens=3"])
    assert found == {"chunks": sizes["train"], "documents": dict.fromkeys(NAMES, 12), "problems": []}
    printed = capsys.readouterr().out
    assert all(f"{name:<16} {n:>10,} chunks {16 * n:>12,} tokens" in printed for name, n in sizes["train"].items())
    counts = np.bincount(contents("out")["train"]["token_chunks"].ravel())
    assert f"most frequent: {load_tokenizer('out/tokenizer.json').decode([counts.argmax()])!r}, " in printed
    assert f"(the first is {counts.max() / counts.sum():.1%} of all)" in printed


@pytest.mark.parametrize("value, words", [(300, "16 tokens are beyond vocab_size = 300"), (-1, "16 tokens"),
                                          (0, "1 chunk repeats an earlier one"),
                                          (None, "2 chunks are in validation.h5 too")])
def test_inspect_finds_what_is_wrong(value, words):
    prepare(write_jsonl(papers()))
    without_digest("out/train.h5")  # with it a changed token is no problem among others
    if value is None:
        stolen = contents("out")["validation"]["token_chunks"][:2]
        change("out/train.h5", "token_chunks", lambda tokens: np.concatenate([stolen, tokens[2:]]))
    else:
        change("out/train.h5", "token_chunks", spoil(3, value))
    found = prepare_data.main(["inspect", "out/train.h5", "--tokens=400"])
    assert len(found["problems"]) == 1 and words in found["problems"][0]


def test_the_files_of_the_source_load_unchanged():
    prepare(write_jsonl(papers()))
    ours = contents("out")["train"]
    with h5py.File("source.h5", "w") as file:
        file.create_dataset("token_chunks", data=ours["token_chunks"].astype(">i4"), chunks=(7, 16), compression="gzip")
        file.create_dataset("category_for_chunk", dtype=h5py.string_dtype(),
                            data=ours["category_for_chunk"].astype(str).astype(object))
        file["doc_idx_for_chunk"] = ours["doc_idx_for_chunk"]
        file.attrs["vocab_size"] = 300
    for path, mapped in (("out/train.h5", True), ("source.h5", False)):
        file, names, codes = chunks_source.open_chunks(path)
        with file:
            tokens = chunks_source.map_tokens(file)
            assert isinstance(tokens, np.memmap) and (Path(tokens.filename or "") == Path(path).resolve()) == mapped
            assert np.array_equal(tokens, ours["token_chunks"]) and names == NAMES
            assert np.array_equal(codes, ours["category_code"])
    source, ours = (prepare_data.main(["inspect", path]) for path in ("source.h5", "out/train.h5"))
    assert source == ours


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.unlink(), "no such file"), (lambda path: path.write_text("text"), "no HDF5 file"),
    (lambda path: path.write_bytes(path.read_bytes()[:-2_000]), "damaged"),
    (lambda path: change(path, "token_chunks", lambda a: a[:, 0]), "'token_chunks' of 2 dimensions"),
    (lambda path: change(path, "token_chunks", lambda a: a / 2), "float64"),
    (lambda path: change(path, "doc_idx_for_chunk", lambda a: a[1:]), "one length"),
    (lambda path: [change(path, name, lambda a: a[:0]) for name in contents("out")["train"]], "above 0"),
    (lambda path: [h5py.File(path, "a").pop("category_code"), change(path, "category_for_chunk", lambda a: np.arange(
        len(a)))], "category_for_chunk")], ids=range(8))
def test_a_damaged_or_foreign_data_file_is_one_clear_line(damage, words, capsys):
    ergodic(PARTS)
    damage(Path("out/train.h5"))
    told = refused(capsys, "inspect", "out/train.h5")
    assert words in told and "out/train.h5" in told


# --------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("line, words", [
    ("arxv", "no job 'arxv', did you mean 'arxiv'?"), ("inspect", "inspect needs a file"), ("inspect x.h5", "no such"),
    ("state counts.h5ad", "for yours: state preprocess --input=FILE.h5ad"), ("help", "no job 'help'. Jobs: text, "),
    ("ergodic --chunk_size=0", "chunk_size: expected"), ("ergodic --components=[{\"process\":\"mes3\"}]", "'mess3'"),
    ("ergodic --components=[3]", "components: expected list[dict]"), ("ergodic --sede=1", "did you mean seed"),
    ("ergodic --components=[{\"process\":\"sns\",\"name\":\"a\"},{\"process\":\"sns\",\"name\":\"a\"}]",
     "differently")])
def test_a_bad_command_is_one_line_and_writes_nothing(line, words, capsys):
    assert words in refused(capsys, *line.split()) and list(Path.cwd().iterdir()) == []


def test_the_script_ends_with_code_2_and_one_line_and_helps_with_code_0(capsys):
    done = subprocess.run([sys.executable, ROOT / "prepare_data.py", "inspct"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "did you mean 'inspect'" in done.stderr
    for argv, code in ((["--help"], 0), (["arxiv", "--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as exit_:
            prepare_data.main(argv)
        assert (exit_.value.code or 0) == code and "prepare_data.py" in capsys.readouterr().out


@pytest.mark.parametrize("job", prepare_data.JOBS)
def test_the_help_of_a_job_is_about_that_job(job, capsys):
    with pytest.raises(SystemExit):
        prepare_data.main([job, "--help"])
    told = capsys.readouterr().out
    commands = re.findall(r"prepare_data\.py (\w+)", told)
    assert set(commands) == {job} and len(commands) > 1
    settings = prepare_data.JOBS[job].settings
    assert all(f"--{name}=" in told for name in settings.__annotations__)
    assert max(map(len, told.splitlines())) <= 100
    with pytest.raises(SystemExit):
        prepare_data.main(["--help"])
    overview = capsys.readouterr().out
    assert f"  {job:<9} {settings.__doc__.splitlines()[0]}\n" in overview
    assert max(map(len, overview.splitlines())) <= 100


def test_what_is_not_there_to_inspect_is_suggested_and_h5ad_files_of_a_folder_are_inspected(capsys):
    prepare_data.main(["state", "--num_cell_types=4", "--num_perturbations=3", "--num_genes=20", "--num_batches=2",
                       "--cells_per_condition=4", "--controls_per_cell_type=4", "--out_dir=cells"])
    assert "next: python train_state.py --toml=cells/synthetic.toml --out_dir=out/cells" in capsys.readouterr().out
    assert "did you mean 'cells'?" in refused(capsys, "inspect", "cell")
    assert list(prepare_data.main(["inspect", "cells"])) == ["synthetic.h5ad"]
    Path("a.txt").write_text("text")
    assert "a.txt is text, and inspect reads what is made of it" in refused(capsys, "inspect", "a.txt")
    Path("b.json").write_text('["text"]')
    assert "b.json is text, and inspect" in refused(capsys, "inspect", "b.json")
    Path("run").mkdir()
    Path("run/last.pt").touch()
    Path("run/plans.txt").write_text("no text to train on")
    assert "run is a run, which its report.html shows" in refused(capsys, "inspect", "run")
    Path("data/tales").mkdir(parents=True)
    Path("data/tales/a.txt").write_text("text")  # whose tokens are not put among them
    assert "--out_dir=data/tales_tokens, then data=data/tales_tokens" in refused(capsys, "inspect", "data/tales")


@pytest.mark.parametrize("job, function, left_out", [
    ("text", prepare_text, ()), ("planted", planted, ()), ("arxiv", prepare_chunks, ()),
    ("ergodic", ergodic_source.ergodic, ()), ("state", synthetic, ()), ("state", preprocess, ()),
    ("cells", open_cells, ()),
    ("cells", Reading, ("zeroshot_controls", "val_fraction", "seed", "perturbation_features_file")),
    ("inspect", prepare_data.inspect, ()), ("import", prepare_data.import_run, ())])
def test_settings_of_a_job_have_the_defaults_of_the_function_that_does_it(job, function, left_out):
    settings = vars(prepare_data.JOBS[job][0]())
    defaults = {name: p.default for name, p in signature(function).parameters.items() if p.default is not p.empty}
    assert {name: settings[name] for name in defaults if name not in left_out} == {
        name: value for name, value in defaults.items() if name not in left_out}


def test_data_are_made_by_the_first_rank_and_awaited_by_the_others(monkeypatch):
    path, made = Path("data"), []

    def make():
        made.append(path.write_text("done"))

    monkeypatch.setattr(shared, "WAIT_S", 0.01)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DataError, match="did not come into .*make it there first, with one process"):
        shared.make_once(path, make)
    monkeypatch.setenv("RANK", "0")
    shared.make_once(path, make)
    shared.make_once(path, make)
    monkeypatch.setenv("RANK", "1")
    shared.make_once(path, make)
    assert len(made) == 1
