"""Prepared text and chunks, tokenizers, matrices and texts that are damaged or made to harm: one sentence, or what was
there."""

import bz2
import contextlib
import io
import json
import lzma
import os
import random
import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiktoken
from commands import refusal

import prepare_data
import train_apelr
import train_arxiv
from common.errors import DataError, InputError
from sources import arrays, chunk_checks, digests, files, tokenizer
from sources.arrays import read_array
from sources.chunks import chunk_arrays
from sources.corpus import read_corpus
from sources.digests import ChunkDigest
from sources.plain_json import read_json
from sources.processes import ProcessError, make_process
from sources.streams import sealed
from sources.text import read_file, whole
from sources.tokenizer import load_tokenizer, train_bpe, train_char

COINS = [{"name": name, "process": "coin", "p": p} for name, p in (("a", 0.2), ("b", 0.9))]
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.fixture(scope="module")
def goods(tmp_path_factory) -> Path:
    """Folders text/, planted/ and ergodic/, each by its job."""
    root = tmp_path_factory.mktemp("goods")
    draw = random.Random(2)
    stories = [" ".join(draw.choices(["sun", "moon", "fell", "rose", "é"], k=40)) for _ in range(40)]
    (root / "a.json").write_text(json.dumps(stories))
    with contextlib.chdir(root), contextlib.redirect_stdout(io.StringIO()):
        prepare_data.main(["text", "--input=a.json", "--tokenizer=char", "--val_fraction=0.3", "--out_dir=text"])
        prepare_data.main(["planted", "--train_documents=20", "--validation_documents=10", "--out_dir=planted"])
        prepare_data.main(["ergodic", f"--components={json.dumps(COINS)}", "--train_documents=8", "--chunk_size=70",
                           "--validation_documents=6", "--test_documents=0", "--out_dir=ergodic"])
    return root


@pytest.fixture
def data(goods) -> Path:
    for name in ("text", "planted", "ergodic"):
        shutil.copytree(goods / name, name)
    return Path()


def read(folder: str) -> list:
    """All that a page reads of a folder."""
    if folder == "ergodic":
        found = chunk_arrays(Path("ergodic/validation.h5"))
        return [np.asarray(value).tolist() for value in found.values()]
    corpus = read_corpus(folder)
    arrays = (corpus.train, corpus.val, corpus.oracle_nll, corpus.plans)
    return [*(None if array is None else np.asarray(array).tolist() for array in arrays), corpus.vocab_size,
            corpus.fingerprint, corpus.document_length, corpus.bytes_per_token, corpus.first_id, corpus.version,
            corpus.tokenizer and corpus.tokenizer.encode("sun and moon")]


@pytest.mark.parametrize("name", ["text/train.bin", "text/val.bin", "text/meta.json", "text/tokenizer.json",
                                  "planted/meta.json", "planted/val_plans.npy", "planted/val_oracle_nll.npy",
                                  "ergodic/validation.h5"])
def test_a_flipped_bit_is_told_or_changes_nothing(name, data):
    folder, whole_file = name.split("/")[0], Path(name).read_bytes()
    good, draw, told = read(folder), random.Random(name), 0
    for _ in range(25):
        damaged = bytearray(whole_file)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        Path(name).write_bytes(damaged)
        try:
            assert read(folder) == good
        except InputError:
            told += 1
    assert told > 5


@pytest.mark.parametrize("name", ["planted/train_plans.npy", "text/tokenizer.json"])
def test_inspect_reads_what_training_does_not(name, data, capsys):
    path = Path(name)
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    read(path.parent.name)
    assert f"{path} is not what was prepared" in refusal(capsys, prepare_data.main, "inspect", path.parent.name)


def test_of_a_large_file_training_reads_a_sample_and_inspect_all(data, capsys, monkeypatch):
    monkeypatch.setattr(digests, "CHECKED_WHOLE", 100)
    monkeypatch.setattr(chunk_checks, "CHECKED_WHOLE", 100)
    monkeypatch.setattr(digests, "SAMPLES", 2)  # both ends
    monkeypatch.setattr(digests, "SAMPLE_TOKENS", 64)
    prepare_data.main(["planted", "--train_documents=20", "--validation_documents=10", "--out_dir=planted"])
    stream = np.memmap("planted/train.bin", "<u2", "r+")
    for place, is_told in ((len(stream) // 2, False), (1, True)):
        stream[place] = (stream[place] + 1) % 32
        stream.flush()
        if is_told:
            with pytest.raises(DataError, match="its sample is"):
                read_corpus("planted")
        else:
            read_corpus("planted")
        assert "its sha256 is" in refusal(capsys, prepare_data.main, "inspect", "planted")
        stream[place] = (stream[place] - 1) % 32


def test_data_of_an_earlier_version_are_read_with_a_note_and_the_same_fingerprint(data, capsys):
    one, chunks = read_corpus("text").fingerprint, chunk_arrays(Path("ergodic/train.h5"))["fingerprint"]
    meta = json.loads(Path("text/meta.json").read_text())
    Path("text/meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k not in ("files", "digest")}))
    spec = json.loads(Path("text/tokenizer.json").read_text())
    del spec["sha256"]
    Path("text/tokenizer.json").write_text(json.dumps(spec))
    with h5py.File("ergodic/train.h5", "a") as file:
        del file.attrs["checksums"]
    capsys.readouterr()
    assert read_corpus("text").fingerprint == one and chunk_arrays(Path("ergodic/train.h5"))["fingerprint"] == chunks
    told = capsys.readouterr().err
    assert "text was prepared by an earlier version" in told and "train.h5 was prepared by an earlier version" in told
    tokens = np.fromfile("text/train.bin", "<u2")
    tokens[:2] = tokens[1::-1]
    tokens.tofile("text/train.bin")
    with pytest.raises(DataError, match="is not what was prepared"):  # their digest of tokens counts as before
        read_corpus("text")


@pytest.mark.parametrize("fact, value", [
    ("tokenizer", "../../etc/passwd"), ("tokenizer", "/etc/passwd"), ("vocab_size", 10**30), ("vocab_size", True),
    ("train_tokens", "9"), ("dtype", "O"), ("dtype", "float64"), ("kind", []), ("eos_id", -1), ("source", None),
    ("files", {"../x": {}}), ("val_bytes", 1.5), ("train_sha256", [[]]), ("val_sha256", "0" * 64),
    *(("files", {"train.bin": {"bytes": 4, "sha256": "0", "sample": "0"} | odd})
      for odd in ({"bytes": None}, {"bytes": 1.5}, {"sha256": 3}, {"sample": []}))])
def test_meta_that_cannot_be_is_told_even_with_a_digest_of_its_own(fact, value, data, capsys):
    meta = json.loads(Path("text/meta.json").read_text()) | {fact: value}
    Path("text/meta.json").write_text(json.dumps(meta | {"digest": sealed(meta)}))
    told = refusal(capsys, train_apelr.main, "--data=text", "--max_steps=1", "--out_dir=run")
    assert f"for {fact}" in told and "meta.json is damaged or foreign" in told


@pytest.mark.parametrize("text, words", [
    (b"\xff\xfe", "not UTF-8"), (b'{"a": 1, "a": 2}', "'a' comes twice"), (b"[" * 100_000, "nested too deeply"),
    (b'{"a": NaN}', "NaN"), (b'{"a": ' + b"9" * 9_000 + b"}", "4300 digits"), (b'{"a": "\0"}', "control character"),
    (b"[1]", "no object"), (b"", "is empty")])
def test_json_that_is_none_is_one_sentence(text, words):
    Path("a.json").write_bytes(text)
    with pytest.raises(DataError, match=words):
        read_json("a.json")


def contradict(file):
    labels = file["category_for_chunk"]
    labels[0] = labels[len(labels) - 1]


def reach_out(file, kind):
    tokens = file["token_chunks"][:]
    del file["token_chunks"]
    if kind == "link":
        file["token_chunks"] = h5py.ExternalLink("train.h5", "token_chunks")
    else:
        tokens.tofile("secret.bin")
        outside = [("secret.bin", 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("token_chunks", tokens.shape, tokens.dtype, external=outside)


def predict(value, is_sealed=True):
    """Put a log-probability into a file; is_sealed: with the checksums of a file that has it."""
    def edit(file):
        file["oracle_log_prob"][0, 0, 0] = value
        if is_sealed:
            names, codes = chunk_checks.layout(file)
            del file.attrs["checksums"]
            chunk_checks.seal(file, codes, names)
    return edit


def grow(file):
    del file["token_chunks"]
    file.create_dataset("token_chunks", (1 << 40, 70), np.uint8, chunks=(1 << 10, 70))


@pytest.mark.parametrize("edit, words", [
    (contradict, "disagree about chunk 0"), (lambda file: reach_out(file, "link"), "link to another file"),
    (lambda file: reach_out(file, "external"), "stored in another file"), (grow, "token_chunks"),
    (predict(0.5), "no log-probability"), (predict(np.nan), "no log-probability"),
    (predict(-np.inf), "no log-probability"), (predict(-0.25, is_sealed=False), "oracle_log_prob changed"),
    (lambda file: file.attrs.update(vocab_size=-3), "vocab_size"),
    (lambda file: file.attrs.update(seed=5), "its attribute seed changed"),
    (lambda file: file["category_code"].attrs.update(names=["a", "a"]), "one twice"),
    (lambda file: file.attrs.update(checksums="{}"), "checksums"),
    (lambda file: file.attrs.update(tokenizer_name_or_path="../../etc/passwd", vocab_size=0), "vocab_size")])
def test_chunks_that_cannot_be_are_refused(edit, words, data, capsys):
    with h5py.File("ergodic/validation.h5", "a") as file:
        edit(file)
    assert words in refusal(capsys, train_arxiv.main, "--data=ergodic", "--max_steps=1", "--out_dir=run")
    assert words in refusal(capsys, prepare_data.main, "inspect", "ergodic/validation.h5")


def test_a_tokenizer_outside_the_project_of_a_file_is_not_read(data):
    for name in ("train", "validation"):
        with h5py.File(f"ergodic/{name}.h5", "a") as file:
            for attribute in ("vocab_size", "sha256", "checksums"):
                del file.attrs[attribute]
            file.attrs["tokenizer_name_or_path"] = "../../etc/passwd"
    with pytest.raises(DataError, match="outside its project"):
        chunk_arrays(Path("ergodic/train.h5"))


def test_the_order_of_rows_changes_a_digest():
    tokens, digests_of = np.arange(12).reshape(3, 4), []
    for rows in ([0, 1, 2], [1, 0, 2]):
        digest = ChunkDigest()
        digest.add(tokens[rows], np.zeros(3))
        digests_of.append(digest.hexdigest(4, ["a"]))
    assert digests_of[0] != digests_of[1]


# --------------------------------------------------------------------------------------------------------- tokenizers


def test_a_changed_token_of_a_saved_tokenizer_is_told():
    for made in (train_bpe(["the sun and the moon " * 50], 262), train_char(["sun and moon"], None, 1)):
        made.save(Path("tokenizer.json"))
        assert load_tokenizer("tokenizer.json").hash() == made.hash()
        text = Path("tokenizer.json").read_text()
        for old, new in (('"tokens": ["AA==', '"tokens": ["AB=='), ("sun", "snu"), ('"kind"', '"king"'),
                         ('"sha256"', '"sha255"'), ("dW4=", "bnU=")):
            if old in text:
                Path("tokenizer.json").write_text(text.replace(old, new))
                with pytest.raises(DataError, match=r"tokenizer\.json"):
                    load_tokenizer("tokenizer.json")


@pytest.mark.parametrize("pattern", [r"(?:a|a)*(?!a)b", r"((a|aa)+)+(?<=b)c|\S", r"x", r"(", "[", ""])
def test_a_pattern_that_loses_text_or_never_ends_is_one_sentence(pattern, capfd):
    spec = train_bpe(["the sun and the moon"], 258).spec | {"pattern": pattern}
    Path("tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer("tokenizer.json")


def test_a_tokenizer_that_takes_too_long_is_left_behind(monkeypatch):
    made = train_char(["sun"], None, 1)
    waits = tokenizer.threading.Event()
    monkeypatch.setattr(tokenizer, "PROBE_S", 0.05)
    monkeypatch.setattr(made.engine, "encode_ordinary", lambda text: waits.wait(5) and [])
    with pytest.raises(DataError, match="back and forth without end"):
        tokenizer.probe(made, "x.json")
    waits.set()


class PanicException(BaseException):
    """As pyo3 names its own."""


def test_a_panic_of_rust_is_a_sentence_when_gpt2_is_loaded_and_when_text_is_encoded(monkeypatch):
    def panic(*_):
        raise PanicException("called `Option::unwrap()` on a `None` value")

    made = train_bpe(["the sun and the moon"], 258)
    monkeypatch.setattr(made, "engine", type("Engine", (), {"encode_ordinary": panic, "decode_bytes": panic})())
    for work in (lambda: made.encode("sun"), lambda: made.decode([1])):
        with pytest.raises(DataError, match="gave up on a text"):
            work()
    monkeypatch.setattr(tiktoken, "get_encoding", panic)
    with pytest.raises(DataError, match="gpt2"):
        load_tokenizer("gpt2")


def test_ids_of_a_foreign_tokenizer_are_each_of_one_token():
    check = tokenizer.check_ids
    check({"model": {"vocab": {"a": 0, "b": 1}}}, {"</s>": 2, "a": 0}, {"a": 0, "b": 1, "</s>": 2})
    check({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}, {}, {"a": 0, "b": 1})
    for vocabulary, added, known in (({"a": 0, "b": 0}, {}, {"a": 0, "b": 0}),
                                     ({"a": 0, "b": 1}, {"</s>": 1}, {"a": 0, "b": 1, "</s>": 2}),
                                     ([["a", -1.0], ["a", -2.0]], {}, {"a": 1})):
        with pytest.raises(ValueError, match="the id"):
            check({"model": {"vocab": vocabulary}}, added, known)


# ----------------------------------------------------------------------------------------------------- texts, matrices

ROWS = b'{"text": "sun"}\n' * 50


@pytest.mark.parametrize("kind, pack", [("bz2", bz2.compress), ("xz", lzma.compress)])
def test_what_follows_the_first_packed_stream_is_read_or_told(kind, pack):
    path, first = Path(f"a.jsonl.{kind}"), pack(ROWS)
    padding = b"\0" * 4 if kind == "xz" else b""
    path.write_bytes(first + padding + pack(ROWS) + padding)
    assert len(list(read_file(path, "text", whole))) == 100
    for damaged in (first + pack(ROWS)[:2] + b"?" + pack(ROWS)[3:], first + b"rubbish", first + pack(ROWS)[:-5]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot read"):
            list(read_file(path, "text", whole))


@pytest.mark.parametrize("name, content", [
    ("a.txt", b"a"), ("a.jsonl", b"a"), ("a.json", b"a"), ("a.csv", b"text\n" + b"a")])
def test_a_small_file_that_unpacks_to_a_large_one_is_refused_before_memory_is_full(name, content, monkeypatch):
    monkeypatch.setattr(files, "MOST_CHARACTERS", 1 << 16)
    Path(f"{name}.xz").write_bytes(lzma.compress(content + b"a" * (1 << 22)))
    with pytest.raises(DataError, match="65,536 characters"):
        list(read_file(Path(f"{name}.xz"), "text", whole))


@pytest.mark.parametrize("job", ["text", "arxiv"])
def test_a_pipe_or_a_device_is_not_waited_for(job, capsys):
    os.mkfifo("a.txt")
    Path("b.txt").symlink_to("/dev/zero")
    for name, kind in (("a.txt", "pipe"), ("b.txt", "device")):
        assert f"{name} is a {kind}" in refusal(capsys, prepare_data.main, job, f"--input={name}", "--out_dir=out")
        with pytest.raises(DataError, match=f"is a {kind}"):
            load_tokenizer(name)
        with pytest.raises(ProcessError, match=f"is a {kind}"):
            make_process("custom", matrices=name)


def test_matrices_of_anybody_take_no_more_memory_than_they_are_and_keep_their_size(monkeypatch):
    monkeypatch.setattr(arrays, "MOST_BYTES", 1 << 20)
    stack = np.array([[[0.3]], [[0.7]]])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1, 30_000, 30_000)})
    Path("huge.npy").write_bytes(header.getvalue() + bytes(80))
    with zipfile.ZipFile("bomb.npz", "w", zipfile.ZIP_DEFLATED) as packed, packed.open("matrices.npy", "w") as file:
        file.write(header.getvalue())
        file.write(bytes(3 << 20))
    np.save("longer.npy", stack)
    with open("longer.npy", "ab") as file:
        file.write(b"12345678")
    for name, words in (("huge.npy", "huge.npy is damaged"), ("bomb.npz", "unpacks to"),
                        ("longer.npy", "has 8 bytes more")):
        with pytest.raises(ProcessError, match=words):
            make_process("custom", matrices=name)
    np.savez("good.npz", other=np.array([{}], object), matrices=stack)  # the other is not read
    assert (read_array("good.npz", "matrices") == stack).all()


def test_settings_nested_too_deeply_are_a_sentence():
    part = {"process": "coin"}
    for _ in range(2_000):
        part = {"process": "nonergodic", "components": [part]}
    with pytest.raises(ProcessError, match="nested too deeply"):
        make_process("nonergodic", components=[part])
