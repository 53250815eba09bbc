"""sample.py: prompts, what it prints and its JSON; copies of the pages, and prepare_data.py import: whose page a run is
of, foreign checkpoints as ours."""

import ast
import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import python, refusal

import prepare_data
import sample
import train_apelr
import train_ghmm
import train_state
from common import checkpoint
from common.errors import CheckpointError, InputError
from measure import plans, sequences, transcript
from measure.sequences import continue_sequences, first_largest
from measure.writing import advance, predict, prefill
from sources import foreign_checkpoints, prompts
from sources.h5ad import H5ad, as_dense
from sources.processes import make_process
from sources.tokenizer import train_char

ROOT = Path(__file__).resolve().parents[1]
COMMON = ("--batch_size=8", "--max_steps=2", "--warmup_steps=0", "--device=cpu", "--precision=fp32", "--out_dir=run")
PICTURES = {"ghmm": "plot_run", "arxiv": "draw_run"}  # functions of a page that take long


pytestmark = pytest.mark.usefixtures("quickly")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list[str]]:
    """Settings of a small run of each experiment."""
    folder = tmp_path_factory.mktemp("data")
    parts = [{"name": "a", "process": "coin", "p": 0.9}, {"name": "b", "process": "coin", "p": 0.1}]
    prepare_data.main(["ergodic", f"--components={json.dumps(parts)}", "--train_documents=10", "--chunk_size=8",
                       "--validation_documents=5", f"--out_dir={folder / 'ergodic'}"])
    prepare_data.main(["planted", "--num_plans=2", "--vocab_size=9", "--chunk_size=4", "--document_chunks=4",
                       "--train_documents=50", "--validation_documents=10", f"--out_dir={folder / 'planted'}"])
    prepare_data.main(["state", "--num_cell_types=4", "--num_perturbations=3", "--num_genes=20", "--num_batches=1",
                       "--cells_per_condition=8", "--controls_per_cell_type=8", f"--out_dir={folder}"])
    return {
        "ghmm": ["--n_layers=1", "--d_model=16", "--d_mlp=16", "--n_ctx=5", "--max_words=300"],
        "arxiv": ["--n_layers=1", "--d_model=16", "--n_heads=2", "--d_mlp=16", "--bootstrap=5",
                  f"--data={folder / 'ergodic'}"],
        "apelr": ["--num_plan_states=2", "--chunk_size=4", "--seq_len=15", "--token_dim=8", "--d_model=8",
                  "--n_layers=1", "--eval_batches=1", "--final_eval_batches=1", "--preview_tokens=0",
                  f"--data={folder / 'planted'}"],
        "state": ["--n_layers=1", "--d_model=16", "--n_heads=2", "--d_mlp=16", "--cell_set_len=4", "--eval_sentences=4",
                  f"--toml={folder / 'synthetic.toml'}"],
    }


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A folder that stands for the repository: pages are imported from it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.setattr(sample, "HERE", folder)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name, module in sys.modules.items() if str(folder) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def copy(experiment: str, folder: Path, *edits: tuple[str, str], name: str = "train_mine") -> None:
    """The page under another name, after these replacements."""
    text = (ROOT / f"train_{experiment}.py").read_text(encoding="utf-8")
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    sys.modules.pop(name, None)
    importlib.invalidate_caches()


def train_copy(experiment: str, folder: Path, data: dict, *edits: tuple[str, str], name: str = "train_mine") -> None:
    """A short run of a copy, in ./run."""
    copy(experiment, folder, *edits, name=name)
    page = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        if experiment in PICTURES:
            patch.setattr(page, PICTURES[experiment], lambda *args, **options: None)
        page.main([*COMMON, *data[experiment]])


def refused(capsys, *argv: str, main=sample.main) -> str:
    return refusal(capsys, main, *argv)


# ------------------------------------------------------------------------------------------------------------- prompts


def read_all(prompt: str = "", file: str = "", vocab_size: int = 9, tokenizer=None, **options) -> list:
    written = prompts.written_prompts(prompt, file, **options)
    return [prompts.read_prompt(text, place, tokenizer, vocab_size) for place, text in written]


@pytest.mark.parametrize("name, text, expected", [
    ("p.txt", "0,1\n\n 2 3\r\n0\n", [([0, 1], 1), ([2, 3], 3), ([0], 4)]),
    ("p.jsonl", '{"prompt": "0,1"}\n{"prompt": [8], "id": 3}\n', [([0, 1], 1), ([8], 2)]),
    ("p.txt", "\ufeff1", [([1], 1)])])
def test_prompts_of_a_file_keep_their_order_and_lines(name, text, expected):
    Path(name).write_text(text, encoding="utf-8")
    found = read_all(file=name)
    assert [(prompt.ids, prompt.place) for prompt in found] == [(ids, f"{name}, line {i}") for ids, i in expected]


def test_prompts_are_typed_or_a_whole_file_or_piped(monkeypatch):
    tokenizer = train_char(["abc\n"], None, 1)
    Path("p.txt").write_text("ab\nc\n")
    assert [tokenizer.decode(prompt.ids) for prompt in read_all("FILE:p.txt", tokenizer=tokenizer)] == ["ab\nc"]
    assert [prompt.text for prompt in read_all("a b", tokenizer=tokenizer)] == ["a b"]
    for options in ({"file": "-"}, {"reads_pipe": True}):
        monkeypatch.setattr(sys, "stdin", io.StringIO("ab\nc\n"))
        assert [prompt.text for prompt in read_all(tokenizer=tokenizer, **options)] == ["ab", "c"]
    assert read_all() == [] == read_all("  ")


@pytest.mark.parametrize("name, content, words", [
    ("p.txt", b"\n \n", "p.txt has no prompt: write one on a line"), ("p.txt", b"", "p.txt is empty"),
    ("p.txt", b"0\n1\n9,1\n", "p.txt, line 3: '9' is no token id: expected those from 0 to 8"),
    ("p.txt", b"0\nword\n", "p.txt, line 2: 'word' is no token id"), ("p.txt", b"0\n\xff\n", "p.txt, line 2: no UTF-8"),
    ("p.jsonl", b'{"prompt": "0"}\n{"text": "0"}\n', "p.jsonl, line 2: no prompt in it"),
    ("p.jsonl", b'{"prompt": "0"\n', "p.jsonl, line 1: no JSON"), ("p.jsonl", b'[0]', "p.jsonl, line 1: no prompt"),
    ("p.jsonl", b'{"prompt": [0, 1.5]}', "p.jsonl, line 1: 1.5 is no token id"),
    ("p.jsonl", b'{"prompt": [true]}', "True is no token id"), ("p.jsonl", b'{"prompt": [-1]}', "-1 is no token id"),
    ("p.txt", b"1" * 30, "is no token id"), (".", None, ". is a folder"), ("gone.txt", None, "gone.txt: no such file")])
def test_a_file_of_prompts_that_cannot_be_read_is_one_sentence_with_its_line(name, content, words):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_all(file=name)
    assert words in str(error.value)


def test_characters_that_a_tokenizer_does_not_know_are_noted(capsys):
    class Known:
        special = {"unk": 0}

        def encode(self, text):
            return ["?abc".find(c) if c in "abc" else 0 for c in text]

    assert read_all("aéb", tokenizer=Known())[0].ids == [1, 0, 2]
    assert "note: prompt: the tokenizer does not know 'é'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- temperature 0, top_p


def test_of_equal_ones_the_lowest_id_is_the_likeliest():
    values = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-torch.inf, -torch.inf, 0.0, -torch.inf]])
    assert first_largest(values).tolist() == [1, 0, 2]


def test_at_temperature_0_nothing_is_drawn():
    def model(tokens):  # the next token is one more, of three
        return torch.nn.functional.one_hot((tokens + 1) % 3, 3).float(), None

    start = torch.tensor([[0, 1], [2, 2]])
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    found = continue_sequences(model, start, 5, 2, generator, torch.device("cpu"), 0, 2, 0.5)
    assert found.tolist() == [[0, 1, 2, 0, 1], [2, 2, 0, 1, 2]] and torch.equal(before, generator.get_state())
    assert torch.equal(continue_sequences(model, start, 2, 2, generator, torch.device("cpu")), start)


@pytest.mark.parametrize("name", ["mess3", "tom_quantum"])
def test_a_process_gives_the_same_in_pieces(name, monkeypatch):
    process = make_process(name)
    found = []
    for piece in (4_096, 3):
        monkeypatch.setattr(sequences, "PIECE", piece)
        draws = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        found.append(sequences.process_sequences(process, torch.tensor([[0], [1]]), 20, *draws))
    assert found[0].shape == (2, 20) and torch.equal(*found)


def test_top_p_keeps_the_fewest_tokens_that_have_the_share():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    for share, kept in ((0.6, [[1, 3], [0]]), (0.76, [[1, 2, 3], [0]]), (0.1, [[1], [0]])):
        found = ~sequences.beyond_share(p, share)
        assert [row.nonzero()[:, 0].tolist() for row in found] == kept


# ----------------------------------------------------------------------------------------------------- what is printed


@pytest.fixture(params=[100, 80, 45])
def width(request, monkeypatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def test_a_text_is_wrapped_at_words_and_keeps_its_own_lines(width):
    words = "\n\n    def f(x):\n" + "many words of a long line " * 9 + "\nend"
    found = transcript.wrapped(words)
    assert found.split() == words.split() and max(map(len, found.splitlines())) <= width
    assert found.startswith("\n\n      def f(x):\n") and found.endswith("\n  end")
    assert transcript.wrapped("a\x1b[31mb\tc") == "  a·[31mb    c"


def test_numbers_stand_under_their_tokens_in_blocks_that_fit(width):
    tokens = [str(i) * (1 + i % 4) for i in range(60)]
    numbers = ["", *(f"{-i / 7:.2f}" for i in range(1, 60))]
    found = transcript.beneath({"token": tokens, "log p": numbers})
    blocks = [block.splitlines() for block in found.split("\n\n")]
    assert max(map(len, found.splitlines())) <= width and all(len(block) == 2 for block in blocks)
    assert [x for above, _ in blocks for x in above.split()[1:]] == tokens
    for above, below in blocks[1:]:
        ends = [[i for i in range(1, len(line) + 1) if line[i - 1] != " " and line[i:i + 1] in ("", " ")]
                for line in (above, below)]
        assert ends[0][1:] == ends[1][2:]  # of "token" and "log p"


def test_more_numbers_than_one_reads_are_left_to_the_file():
    found = transcript.beneath({"token": ["1"] * 5000})
    assert found.count(" 1") == 1000 and found.endswith("... and 4,000 more, which --json=FILE writes all")


def test_a_strip_has_the_mark_of_a_token_under_all_of_it_and_nothing_is_cut(width):
    words = [" once", " upon", "\n", "a", "", " time"] * 20
    marks = "0011.a" * 20
    lines = transcript.strip(words, marks, [3, 90]).splitlines()
    assert max(map(len, lines)) <= width and lines[2::3] == [""] * (len(lines) // 3)
    above, below = ("".join(line[2:].ljust(len(lines[i - i % 3 + 1]) - 2) for i, line in enumerate(lines) if i % 3 == k)
                    for k in (0, 1))
    shown = [word.replace("\n", "\u21b5") or "\u00b7" for word in words]
    expected = ["".join(("|" if t in (3, 90) else "") + part for t, part in enumerate(parts))
                for parts in (shown, [mark * len(word) for mark, word in zip(marks, shown, strict=True)])]
    assert [above, below] == expected


def test_marks_stand_under_letters_that_are_as_wide_as_two(width):
    words = ["\u4e2d\u6587", "a", "e\u0301", "\u5b57" * 30, " b"] * 6
    lines = transcript.strip(words, "01234" * 6, []).splitlines()
    above, below = lines[::3], lines[1::3]
    assert max(map(transcript.columns_of, lines)) <= width
    assert "".join(line[2:] for line in below) == ("0000" + "1" + "2" + "3" * 60 + "44") * 6
    for text, marks in zip(above, below, strict=True):
        assert transcript.columns_of(text) in (len(marks), len(marks) - 1)  # a blank at the end is not written


def test_the_likeliest_plan_is_a_letter_from_ten_on():
    beliefs = [[0.0] * 10 + [0.9, 0.1], [0.5] + [0.5] + [0.0] * 10, [0.4, 0.3, 0.3] + [0.0] * 9]
    assert transcript.likeliest_plans(beliefs) == "a0."


# ------------------------------------------------------------------------------------------------------- small runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_thread) -> dict[str, str]:
    """Runs of two steps: a process of three tokens, and texts in characters with two plans."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("<|endoftext|>".join(f"the cat number {i} sat on a mat" for i in range(99)))
    prepare_data.main(["text", f"--input={folder / 'text.txt'}", "--tokenizer=char", "--val_fraction=0.2",
                       f"--out_dir={folder / 'text'}"])
    shared = ["--max_steps=2", "--warmup_steps=0", "--batch_size=8", "--device=cpu", "--precision=fp32"]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((train_ghmm, "plot_run"), (plans, "draw_loss"), (plans, "draw_plans")):
            patch.setattr(module, name, lambda *args, **options: None)
        train_ghmm.main([*shared, "--n_layers=1", "--d_model=16", "--d_mlp=16", "--n_ctx=5", "--max_words=300",
                         f"--out_dir={folder / 'out/ghmm'}"])
        train_apelr.main([*shared, "--num_plan_states=2", "--chunk_size=4", "--seq_len=15", "--token_dim=8",
                          "--d_model=8", "--n_layers=1", "--eval_batches=1", "--final_eval_batches=1",
                          "--preview_tokens=0", f"--data={folder / 'text'}", f"--out_dir={folder / 'out/apelr'}"])
    return {name: str(folder / "out" / name) for name in ("ghmm", "apelr")}


def test_json_alone_is_all_of_standard_output(runs, capsys):
    for words in (["--json"], ["--json=-"], ["--json", "--seed=0"]):
        found = sample.main([runs["ghmm"], "--device=cpu", "--num_samples=2", *words])
        told = capsys.readouterr()
        assert json.loads(told.out) == json.loads(json.dumps(found)) and "reading" in told.err
    plain = sample.main([runs["ghmm"], "--device=cpu", "--num_samples=2", "--json", "found.json"])
    assert json.loads(Path("found.json").read_text()) == plain == found


def test_entries_of_all_experiments_have_the_same_keys(runs):
    ghmm, apelr = (sample.main([runs[name], "--device=cpu", f"--prompt={prompt}"])
                   for name, prompt in (("ghmm", "0 1"), ("apelr", "the cat")))
    for result, prompt in ((ghmm, "0 1"), (apelr, "the cat")):
        assert result["step"] == 2 and len(result["samples"]) == 4
        assert all(entry["prompt"] == prompt and len(entry["tokens"]) > 2 for entry in result["samples"])
    assert set(ghmm["samples"][0]) == set(ghmm["process"][0]) == {"prompt", "tokens", "log_prob", "xe"}
    assert set(apelr["samples"][0]) == {"prompt", "state", "tokens", "text", "nll", "beliefs"}


@pytest.mark.parametrize("name, lines", [("ghmm", ["0,1", "2"]), ("apelr", ["the cat", "a mat"])])
def test_a_prompt_in_a_file_gives_what_it_gives_alone(name, lines, runs, capsys):
    Path("prompts.txt").write_text("\n".join(lines))
    settings = [runs[name], "--device=cpu", "--max_new_tokens=3", "--num_samples=2"]
    together = sample.main([*settings, "--prompts=prompts.txt"])["samples"]
    told = capsys.readouterr().out
    alone = [sample.main([*settings, f"--prompt={line}"])["samples"] for line in lines]
    assert together == alone[0] + alone[1]
    places = [told.index(f"after {line.replace(',', ' ')!r}") for line in lines]
    assert places == sorted(places)


def test_what_a_text_costs_is_what_the_page_says_of_it(runs):
    entry = sample.main([runs["apelr"], "--device=cpu", "--prompt=the cat", "--num_samples=1"])["samples"][0]
    _, model, _, _ = train_apelr.load_run(Path(runs["apelr"]))
    ids = torch.tensor([entry["tokens"]])
    begin = len(entry["tokens"]) - len(entry["beliefs"])
    with torch.no_grad():
        state = prefill(model.eval(), ids[:, :begin])
        costs = []
        for t in range(begin, ids.shape[1]):
            log_p, logs = predict(model, state)
            costs.append(-float(log_p[0, ids[0, t]]))
            state = advance(model, state, ids[:, t], logs)
    assert entry["nll"] == pytest.approx(np.mean(costs), abs=1e-4)


def test_plans_under_a_text_are_explained_and_pictures_are_of_every_prompt(runs, capsys):
    Path("prompts.txt").write_text("the cat\na mat")
    sample.main([runs["apelr"], "--device=cpu", "--prompts=prompts.txt", "--show_plan", "--num_samples=1",
                 "--max_new_tokens=9", "--out=here"])
    told = capsys.readouterr().out
    assert "Under the text: the likeliest plan before each token" in told
    assert re.search(r"^plan 0 +[\d.]+%  typical: \S", told, re.M) and re.search(r"^plan 1 ", told, re.M)
    assert {path.name for path in Path("here/plots").iterdir()} == {"sampled_belief_0_prompt_1.png",
                                                                    "sampled_belief_0_prompt_2.png"}


@pytest.mark.parametrize("words, told", [
    (["--prompt=0,1,2,0,1"], "prompt has 5 tokens, and length = 5 counts it: to go on from it, use --max_new_tokens=N"),
    (["--prompts=p.txt"], "p.txt, line 2 has 6 tokens"), (["--prompts=p.txt", "--length=6"], "p.txt, line 2 has 6"),
    (["--length=10000000000"], "more than 1,000,000,000"), (["--prompt=0", "--prompts=p.txt"], "choose one"),
    (["--start=9"], "prompt: '9' is no token id"), (["--show_plan"], "show_plan is an option of apelr, not of ghmm")])
def test_what_cannot_be_gone_on_from_is_one_sentence(words, told, runs, capsys):
    Path("p.txt").write_text("0\n0 1 2 0 1 2\n")
    assert told in refused(capsys, runs["ghmm"], "--device=cpu", *words)


def test_a_name_that_is_no_run_brings_those_that_are_near(runs, capsys, monkeypatch):
    monkeypatch.chdir(Path(runs["ghmm"]).parents[1])
    told = refused(capsys, "out/gmm")
    assert "no run or checkpoint out/gmm, did you mean out/ghmm? There are out/apelr, out/ghmm" in told
    assert refused(capsys, "x").endswith("no run or checkpoint x: there are out/apelr, out/ghmm")
    assert refused(capsys, "out/ghmm", "--prompt=9").endswith("expected those from 0 to 2, like 0,1")
    assert refused(capsys, "out/ghmm", "--prompt=a").endswith("like 0,1, as this run has no tokenizer")
    Path("out/ghmm/folder").mkdir()
    for name in ("config.json", "folder"):
        told = f"out/ghmm/{name} is no checkpoint, but lies in the run out/ghmm: name that"
        assert told in refused(capsys, f"out/ghmm/{name}")
    assert refused(capsys, "--prompt", "0", "out/ghmm").endswith(": python sample.py out/ghmm --prompt 0")
    assert "out is a folder of 2 runs: name one of out/apelr, out/ghmm" in refused(capsys, "out")
    assert "no checkpoint at text/last.pt" in refused(capsys, "text")


def test_help_is_of_the_console_and_of_a_run_about_its_experiment(runs, capsys):
    for words in (["--help"], [], [runs["ghmm"], "--help"]):
        with pytest.raises(SystemExit) as end:
            sample.main(words)
        told = capsys.readouterr().out
        assert end.value.code == 0 and max(map(len, told.splitlines())) <= 100
        settings = set(re.findall(r"^  (--\w+)=", told, re.M))
        assert {"--prompts", "--json", "--seed"} <= settings
        assert ("--adata" in settings) == (len(words) < 2) == ("--show_plan" in settings)


# -------------------------------------------------------------------------------------------------------------- copies


def test_sample_py_imports_no_page_until_it_knows_which():
    tree = ast.parse((ROOT / "sample.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("train_") for name in imported)


@pytest.mark.parametrize("experiment, settings, key", [
    ("ghmm", ["--num_samples=2"], "process"), ("arxiv", ["--num_samples=2"], "samples"),
    ("apelr", ["--num_samples=2", "--max_new_tokens=5", "--prompt=9,1"], "samples"), ("state", [], "pearson_delta")])
def test_a_copy_of_each_page_is_sampled_like_the_page(experiment, settings, key, repository, data):
    train_copy(experiment, repository, data)
    assert checkpoint.experiment_of(Path("run")) == "train_mine"
    result = sample.main(["run", "--device=cpu", "--json=found.json", *settings])
    assert result["experiment"] == experiment and result["step"] == 2
    assert json.loads(Path("found.json").read_text())[key] is not None and result[key]


def test_cells_are_told_verdict_first_then_a_table_then_the_files(repository, data, capsys):
    train_copy("state", repository, data)
    capsys.readouterr()
    result = sample.main(["run", "--device=cpu", "--out=here"])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "sample: reading run" and told[1].startswith("after 2 steps the model ")
    row = next(line.split() for line in told if line.startswith("model "))
    assert float(row[1].rstrip("*")) == pytest.approx(result["pearson_delta"], rel=1e-3)
    assert told[-1].startswith("written to here: pred.h5ad, real.h5ad (") and max(map(len, told)) <= 100
    assert all(Path(name).exists() for name in result["written"])
    given = sample.main(["run", "--device=cpu", "--adata=here/real.h5ad", "--cells=3", "--out=here"])
    assert given["written"] == ["here/predicted.h5ad"] and given["step"] == 2
    count = given["cells"] // 3
    told = capsys.readouterr().out.splitlines()
    assert told[2].split() == ["cell", "type", "perturbation", "control", "cells", "predicted"]
    assert [line.split()[-1] for line in told[3:]] == ["3"] * count


def test_a_copy_in_a_repository_of_its_own_is_sampled_by_the_script(repository, data):
    """As a user starts it: sample.py finds the page in its own folder."""
    train_copy("ghmm", repository, data)
    shutil.copy(ROOT / "sample.py", repository)
    done = python(repository / "sample.py", "run", "--device=cpu", "--num_samples=1", folder=Path.cwd())
    assert done.returncode == 0 and "from the model" in done.stdout, done.stderr


def test_a_page_that_is_gone_is_named_and_that_in_the_run_folder_is_never_run(repository, data, capsys, monkeypatch):
    train_copy("ghmm", repository, data)
    (repository / "train_mine.py").unlink()
    del sys.modules["train_mine"]
    marker = 'open("it_ran", "w").close()\n'
    Path("run/train_mine.py").write_text(marker + Path("run/train_mine.py").read_text())
    for folder in ("run", "."):
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(Path.cwd())  # even where Python would find it
        assert "train_mine.py, which is not in" in refused(capsys, str(Path("last.pt").absolute()), "--device=cpu")
    copy("ghmm", repository)
    monkeypatch.syspath_prepend(Path.cwd())
    assert "Python finds another module" in refused(capsys, str(Path("last.pt").absolute()), "--device=cpu")
    assert not Path("it_ran").exists()


@pytest.mark.parametrize("stem", ["../train_ghmm", "os", "sources.text", "", "train ghmm", "json"])
def test_a_checkpoint_cannot_name_what_is_no_page(stem, repository, data, capsys):
    train_copy("ghmm", repository, data)
    state = checkpoint.load(Path("run/last.pt"))
    torch.save(state | {"experiment": stem, "format_version": 1}, "odd.pt")
    assert "which is not in" in refused(capsys, "odd.pt")


END = 'if __name__ == "__main__":'
WIDER = """
build_narrow = build_model


def build_model(cfg, *sizes):
    cfg.d_model *= 2
    return build_narrow(cfg, *sizes)


"""
FEWER = """
load_all = load_run


def load_run(*arguments):
    return load_all(*arguments)[1:]


"""


@pytest.mark.parametrize("old, new, words", [
    ("def load_run(", "def load_run_no_more(", "has no load_run, which sample.py asks"),
    ("def make_contexts(", "def contexts_of(", "has no make_contexts"),
    ('EXPERIMENT = "ghmm"', 'EXPERIMENT = "mine"', "it needs a line EXPERIMENT"),
    ("EXPERIMENT =", "KIND =", "it needs a line EXPERIMENT"),
    ("import math\n", "import math, no_such_package\n", "cannot be imported (ModuleNotFoundError"),
    ("import math\n", "import math\n!\n", "cannot be imported (SyntaxError"),
    (END, WIDER + END, "does not fit the model as its script builds it"),
    (END, FEWER + END, "sampling run by train_mine.py does not work (ValueError: not enough values")])
def test_a_page_that_no_longer_fits_is_one_sentence(old, new, words, repository, data, capsys):
    train_copy("ghmm", repository, data)
    copy("ghmm", repository, (old, new))
    assert words in refused(capsys, "run", "--device=cpu")


# ------------------------------------------------------------------------------------------------------------- imports


def source_of_apelr(path: str = "source.pt", **more) -> Path:
    """What APEL-R would have saved of a model of version 2."""
    torch.manual_seed(0)
    cfg = train_apelr.Config(num_plan_states=2, chunk_size=4, token_dim=8, d_model=8, n_layers=1, vocab_size=10,
                             compat="source", dropout=0.0)
    model = train_apelr.build_model(cfg)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("experts.")}
    for part in ("weight", "bias"):
        for k, head in enumerate(getattr(model.experts, part).detach()):
            weights[f"expert_heads.{k}.{part}"] = head
    config = {"vocab_size": 10, "num_plan_states": 2, "chunk_size": 4, "token_dim": 8, "hidden_dim": 8,
              "num_layers": 1, "lookahead_horizon": cfg.lookahead_horizon, "dropout": 0.0}
    torch.save({"model_state_dict": weights, "model_version": "v2_planner_required", "model_config": config,
                "global_step": 7} | more, path)
    return Path(path)


def test_an_imported_apelr_checkpoint_is_a_run_that_writes_the_same_and_is_started_from(data, capsys):
    source, asked = source_of_apelr(), ("--prompt=9,1,2", "--max_new_tokens=20", "--num_samples=2", "--device=cpu",
                                        "--temperature=0.8", "--top_k=5", "--lookahead_steps=2")
    done = prepare_data.main(["import", str(source), "--out_dir=out/x"])
    assert (done["experiment"], done["step"], done["out_dir"]) == ("apelr", 7, "out/x")
    assert {path.name for path in Path("out/x").iterdir()} == {"config.json", "last.pt", "best.pt"}
    config = json.loads(Path("out/x/config.json").read_text())
    assert (config["num_plan_states"], config["compat"], config["d_model"]) == (2, "source", 8)
    from_source = sample.main([str(source), *asked])
    for name in ("out/x", "out/x/last.pt"):
        assert sample.main([name, *asked]) == from_source
    settings = [*COMMON, *data["apelr"], "--compat=source", "--max_steps=1"]
    found = train_apelr.main([*settings, "--analyze=out/x"])
    assert found["val_nll"] > 0
    losses = [train_apelr.main([*settings, f"--init_from={start}", f"--out_dir=tuned{i}"])["val_nll"]
              for i, start in enumerate((source, "out/x"))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    told = refused(capsys, *settings, "--out_dir=out/x", main=train_apelr.main)
    assert "holds no state of this optimizer" in told and "init_from" in told
    assert "out/x holds a run" in refused(capsys, "import", str(source), "--out_dir=out/x", main=prepare_data.main)


def test_an_imported_run_brings_its_tokenizer():
    tokenizer = train_char(["abcdef"], None, 1)
    tokenizer.save(Path("tokenizer.json"))
    prepare_data.main(["import", str(source_of_apelr())])
    assert Path("out/source/tokenizer.json").read_bytes() == Path("tokenizer.json").read_bytes()
    assert checkpoint.load(Path("out/source"))["extra"]["tokenizer_hash"] == tokenizer.hash()


def cells_of(path: str) -> np.ndarray:
    with H5ad(path) as file:
        return np.concatenate([as_dense(block) for _, _, block in file.matrix(None).blocks()])


def test_an_imported_state_checkpoint_is_a_run_that_predicts_the_same_and_is_started_from(data, capsys):
    train_state.main([*COMMON, *data["state"], "--source_files"])
    source = Path("run/checkpoints/final.ckpt")
    assert prepare_data.main(["import", str(source), "--out_dir=out/x"])["experiment"] == "state"
    files = {path.name for path in Path("out/x").iterdir()}
    assert files == {"config.json", "last.pt", "best.pt", "pert_onehot_map.pt"}
    toml = data["state"][-1]
    shutil.move("run", "elsewhere")  # nothing of the source is needed any more
    sample.main(["out/x", toml, "--device=cpu", "--out=ours"])
    sample.main(["elsewhere/checkpoints/final.ckpt", toml, "--device=cpu", "--out=theirs"])
    assert np.array_equal(cells_of("ours/pred.h5ad"), cells_of("theirs/pred.h5ad"))
    settings = [*COMMON, *data["state"]]
    assert train_state.main([*settings, "--analyze=out/x"])["conditions"] > 0
    train_state.main([*settings, "--init_from=out/x", "--out_dir=tuned"])
    assert checkpoint.load(Path("tuned"))["config"]["d_model"] == 16
    told = refused(capsys, *settings, "--out_dir=out/x", main=train_state.main)
    assert "holds no state of this optimizer" in told


def test_what_cannot_be_imported_is_refused_in_one_sentence(repository, data, capsys):
    train_copy("ghmm", repository, data)
    Path("text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    torch.save({"model_state_dict": {"token_emb.weight": torch.zeros(3, 4)}, "model_version": "v9"}, "future.pt")
    for path, words in (("run/last.pt", "is of train_mine.py already"), ("run", "is of train_mine.py already"),
                        ("text.pt", "is damaged or no checkpoint"), ("nowhere.pt", "there is no checkpoint nowhere.pt"),
                        ("foreign.pt", "is no checkpoint of APEL-R"), ("future.pt", "v9")):
        assert words in refused(capsys, "import", path, main=prepare_data.main)
    assert "import needs a file" in refused(capsys, "import", main=prepare_data.main)
    assert not Path("out").exists()


@pytest.mark.parametrize("contents, system", [
    ({"state_dict": {"module.pert_encoder.0.weight": torch.zeros(2)}}, "state"),  # arc-state
    ({"model_state_dict": {"_orig_mod.pert_encoder.0.weight": torch.zeros(2)}, "config": {}}, "state"),  # SmolState
    ({"model_state_dict": {"token_emb.weight": torch.zeros(2)}}, "apelr"),
    ({"token_emb.weight": torch.zeros(2)}, "apelr"),
    ({"embed.W_E": torch.zeros(2), "blocks.0.attn.W_Q": torch.zeros(2)}, "ghmm"),  # Simplexity
    ({"state_dict": {"fc.weight": torch.zeros(2)}}, ""), ([1, 2], "")])
def test_a_checkpoint_is_known_by_the_names_of_its_weights(contents, system):
    torch.save(contents, "found.pt")
    assert foreign_checkpoints.system_of(Path("found.pt")) == system


def test_no_code_of_a_foreign_checkpoint_runs():
    class Evil:
        def __reduce__(self):
            return open, ("it_ran", "w")

    torch.save({"state_dict": {"pert_encoder.0.weight": torch.zeros(2)}, "hyper_parameters": Evil()}, "evil.ckpt")
    assert foreign_checkpoints.system_of(Path("evil.ckpt")) == "state" and not Path("it_ran").exists()
    with pytest.raises(CheckpointError):
        foreign_checkpoints.importable(Path("nowhere.ckpt"))


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["checkpoints/step=10.ckpt", "checkpoints/last.ckpt", "checkpoints/final.ckpt"], "checkpoints/final.ckpt"),
        (["checkpoint.pt", "metrics.json"], "checkpoint.pt"),  # APEL-R
        (["checkpoints/latest.pt", "checkpoints/best_model.pt"], "checkpoints/best_model.pt"),  # ICL-non-ergodic-arxiv
        (["checkpoints/900/model.pt", "checkpoints/1000/model.pt"], "checkpoints/1000/model.pt"),  # Simplexity
        (["9/model.eqx", "10/model.eqx"], "10/model.eqx"),
        (["checkpoint.pt", "last.pt"], ""),  # ours
        (["metrics.json"], ""),
    ],
)
def test_a_run_folder_of_a_source_stands_for_its_checkpoint(files, chosen):
    folder = Path("there")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert foreign_checkpoints.checkpoint_in(folder) == folder / chosen
