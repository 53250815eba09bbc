"""A copy of train_arxiv.py under another name, edited as its user would: own data, own model, own loss."""

import difflib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refusal

import prepare_data
import train_arxiv
from common import checkpoint
from common.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "train_arxiv.py").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
TINY = ("--n_layers=1", "--d_model=16", "--n_heads=2", "--d_mlp=32", "--batch_size=8", "--max_steps=6", "--lr=1e-2",
        "--warmup_steps=2", "--bootstrap=20", "--log_interval=5", "--device=cpu", "--precision=fp32")
PARTS = [{"name": "a", "process": "coin", "p": 0.9, "vocab_map": [0, 1]},
         {"name": "b", "process": "mess3", "vocab_map": [0, 1, 2]}]

# Documents that are rows of an integer array, with a label each, in place of HDF5 files.
DATA = ("""    train, validation = train_and_validation(cfg.data, cfg.validation_data, vocab_size)
    return Chunks(**train), Chunks(**validation)
""", """    splits = []
    for split in ("train", "validation"):
        arrays = np.load(Path(cfg.data) / f"{split}.npz")
        tokens, codes = arrays["tokens"], arrays["codes"]
        documents = np.arange(len(codes))
        budget = int(np.bincount(codes).min())
        splits.append(Chunks(tokens, codes, documents, ["up", "down"], 5, budget))
    return splits[0], splits[1]
""")

# A recurrent network in place of the transformer.
MODEL = ("""    return GPT(cfg, vocab_size, n_ctx)
""", """    return Recurrent(cfg, vocab_size)


class Recurrent(nn.Module):
    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, cfg.d_model)
        self.gru = nn.GRU(cfg.d_model, cfg.d_model, batch_first=True)
        self.head = nn.Linear(cfg.d_model, vocab_size)

    def forward(self, tokens, targets=None):
        x = self.embed(tokens)
        states, _ = self.gru(x)
        logits = self.head(states)
        xe = logits if targets is None else token_xe(logits, targets)
        return xe, [x, states]
""")

# Only what follows a few tokens of context is trained on.
LOSS = ("""                xe, _ = model(part[:, :-1], part[:, 1:])
""", """                logits, _ = model(part[:, :-1])
                xe = token_xe(logits, part[:, 1:])[:, 3:]
""")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "ergodic"
    prepare_data.main(["ergodic", f"--components={json.dumps(PARTS)}", "--train_documents=20", f"--out_dir={folder}",
                       "--validation_documents=6", "--chunk_size=12"])
    return folder


def edited(*edits: tuple[str, str], name: str = "train_mine.py") -> Path:
    """The page under another name in this folder, after these replacements."""
    text = PAGE
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    Path(name).write_text(text, encoding="utf-8")
    return Path(name).resolve()


def copied(monkeypatch, *edits: tuple[str, str]):
    """The edited copy as a module, without its pictures."""
    path = edited(*edits)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "draw_run", lambda *args: None)
    return module


def analysed(page) -> float:
    return page.main(["--analyze=out/mine", "--device=cpu"])["val_xe"]


def changed_lines(edit: tuple[str, str]) -> int:
    """Lines that a diff of the edit takes away and adds."""
    before, after = (text.splitlines() for text in edit)
    lines = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    return sum(line[0] in "+-" for line in lines)


def write_arrays(folder: Path) -> None:
    """Tokens that go up, or down, by one or two: a model that finds out which predicts them better."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 600), ("validation", 200)):
        codes = np.arange(count) % 2
        steps = draw.integers(1, 3, (count, 10)) * np.where(codes, -1, 1)[:, None]
        start = draw.integers(0, 5, (count, 1))
        np.savez(folder / split, tokens=(start + np.cumsum(steps, 1)) % 5, codes=codes)


def test_own_data_are_a_dozen_lines(monkeypatch):
    write_arrays(Path("arrays"))
    page = copied(monkeypatch, DATA)
    summary = page.main([*TINY, "--data=arrays", "--batch_size=32", "--max_steps=200", "--lr=2e-2"])
    assert (summary["categories"], len(summary["xe_by_position"])) == (["up", "down"], 9)
    assert "oracle_icl_gain" not in summary and summary["icl_gain"] > 0.1
    assert analysed(page) == pytest.approx(summary["val_xe"], rel=1e-5)
    assert changed_lines(DATA) <= 12


def test_an_own_model_is_one_class_and_is_analysed_like_the_first(monkeypatch, data):
    page = copied(monkeypatch, MODEL)
    summary = page.main([*TINY, f"--data={data}"])
    assert {"oracle_icl_gain", "largest_relative_excess"} <= summary.keys() and summary["steps"] == 6
    assert analysed(page) == pytest.approx(summary["val_xe"], rel=1e-5)
    probed = json.loads(Path("out/mine/results.json").read_text())["probe"]
    assert len(probed["accuracy"]) == 2 and changed_lines(MODEL) <= 20


def test_an_own_loss_trains_and_is_measured_by_the_same_cross_entropy(monkeypatch, data):
    page = copied(monkeypatch, LOSS)
    summary = page.main([*TINY, f"--data={data}"])
    original = train_arxiv.main([*TINY, f"--data={data}", "--probe=false"])
    assert summary["val_xe"] != original["val_xe"] and len(summary["xe_by_position"]) == 11
    assert changed_lines(LOSS) <= 3


def test_a_copy_leaves_the_original_s_run_alone(monkeypatch, data, capsys):
    first = train_arxiv.main([*TINY, f"--data={data}", "--probe=false"])
    before = {path: path.stat().st_mtime_ns for path in Path("out/arxiv").rglob("*")}
    page = copied(monkeypatch, LOSS)
    assert page.Config().out_dir == "out/mine"
    assert page.main([*TINY, f"--data={data}"])["val_xe"] != first["val_xe"]
    assert checkpoint.load(Path("out/mine"))["experiment"] == "train_mine"
    assert Path("out/mine/train_mine.py").read_bytes() == Path("train_mine.py").read_bytes()
    told = refusal(capsys, page.main, *TINY, f"--data={data}", "--out_dir=out/arxiv")
    assert "train_arxiv.py" in told and "train_mine.py" in told
    assert "train_arxiv.py" in refusal(capsys, page.main, "--analyze=out/arxiv")
    assert {path: path.stat().st_mtime_ns for path in Path("out/arxiv").rglob("*")} == before


BROKEN = {
    "logits alone": ("        return xe, [x, states]\n", "        return xe\n"),
    "the last layer alone": ("return xe, [x, states]", "return xe, states"),
    "a stream of the last token": ("return xe, [x, states]", "return xe, [x, states[:, -1]]"),
    "a mean where rows are asked for": ("else token_xe(logits, targets)", "else token_xe(logits, targets).mean()"),
    "one position less": ("else token_xe(logits, targets)", "else token_xe(logits, targets)[:, 1:]"),
    "a loss a chunk": ("loss = xe.mean() / cfg.grad_accum", "loss = xe.mean(1) / cfg.grad_accum"),
    "a loss without gradient": ("loss = xe.mean() / cfg.grad_accum", "loss = xe.mean().detach() / cfg.grad_accum"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_one_line_before_the_first_step(name, monkeypatch, data, capsys):
    page = copied(monkeypatch, MODEL, BROKEN[name])
    monkeypatch.setattr(page.Batches, "__call__", lambda *args: pytest.fail("it trained"))
    told = refusal(capsys, page.main, *TINY, f"--data={data}")
    assert "what the end of the run asks of model and data does not work" in told and not Path("out").exists()


def test_categories_of_own_data_that_lack_chunks_are_refused_before_the_first_step(monkeypatch, capsys):
    write_arrays(Path("arrays"))
    page = copied(monkeypatch, DATA, ('["up", "down"]', '["up", "down", "still"]'))
    assert "still has 0 chunks" in refusal(capsys, page.main, *TINY, "--data=arrays") and not Path("out").exists()


def test_a_training_step_runs_without_a_device_that_computes(data):
    """A tensor left behind on the CPU, or a number read in the middle, fails on the meta device."""
    cfg = train_arxiv.Config(n_layers=1, d_model=16, batch_size=4, grad_accum=2, dropout=0.1, device="cpu",
                             precision="fp32", compile="false")
    rt = Runtime(cfg)
    rt.device = torch.device("meta")
    with torch.device("meta"):
        model = train_arxiv.build_model(cfg, 7, 12)
    tokens = torch.zeros(4, 12, dtype=torch.int64, device="meta")
    loss = train_arxiv.train_step(model, tokens, rt, cfg)
    assert loss.device.type == "meta" and all(p.grad.shape == p.shape for p in model.parameters())
