"""A newcomer's copy of train_apelr.py: own data, own backbone, own loss term, each by a few changed lines."""

import difflib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import refusal

import train_apelr
from common import checkpoint
from measure import plans

PAGE = Path(train_apelr.__file__)
TINY = ("--num_plan_states=3", "--chunk_size=4", "--seq_len=15", "--token_dim=8", "--d_model=16", "--n_layers=1",
        "--batch_size=8", "--max_steps=6", "--warmup_steps=2", "--eval_interval=3", "--eval_batches=1",
        "--final_eval_batches=1", "--preview_tokens=3", "--device=cpu", "--precision=fp32")
OWN_DATA = [(
    '''    if cfg.data == OFFLINE:
        make_once(Path(OFFLINE) / "meta.json", lambda: prepare_text(out_dir=OFFLINE, vocab_size=1_024))
    corpus = read_corpus(cfg.data)
''',
    '''    steps = np.random.default_rng(0).integers(3, size=(2, 2_000))
    walks = steps.cumsum(1) % 12
    corpus = Corpus(walks[0], walks[1], vocab_size=12)
''')]
OWN_BACKBONE = [
    ('Literal["gru", "transformer"] = "gru"', 'Literal["gru", "transformer", "window"] = "window"'),
    ('''BACKBONES = {"gru": GRU, "transformer": Transformer}
''', '''class Window(nn.Module):
    """Reads the four newest tokens."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.mix = nn.Linear(4 * cfg.token_dim, cfg.d_model)

    def forward(self, x: Tensor):
        padded = F.pad(x, (0, 0, 3, 0))
        return torch.tanh(self.mix(padded.unfold(1, 4, 1).flatten(2))), padded[:, -3:]

    def step(self, x: Tensor, state: Tensor):
        newest = torch.cat([state, x[:, None]], 1)  # [B, 4, D]
        return torch.tanh(self.mix(newest.transpose(1, 2).flatten(1))), newest[:, 1:]


BACKBONES = {"gru": GRU, "transformer": Transformer, "window": Window}
''')]
OWN_TERM = [
    ('"rep_unlikelihood")', '"rep_unlikelihood", "leaving")'),
    ('DEMO_WEIGHTS = {"usage_balance": 0.02,', 'DEMO_WEIGHTS = {"leaving": 0.1, "usage_balance": 0.02,'),
    ('''        # rep_unlikelihood = mean_t mean''',
     '''        # leaving = mean_k -log P[k, k]: small where a plan stays
        if "leaving" in terms:
            values["leaving"] = -self.planner_transition_logits.log_softmax(1).diagonal().mean()
        # rep_unlikelihood = mean_t mean''')]
EDITS = {"own data": (OWN_DATA, 6), "own backbone": (OWN_BACKBONE, 22), "own loss term": (OWN_TERM, 8)}
ONLY_THE_LAST = [("padded.unfold(1, 4, 1).flatten(2))), padded[:, -3:]", "padded[:, -4:].flatten(1))), padded[:, -3:]")]
NLL_A_WINDOW = [('{"nll": beliefs.nll.mean()}\n        # boundary', '{"nll": beliefs.nll.mean(1)}\n        # boundary')]
A_VECTOR = [(".log_softmax(1).diagonal().mean()\n        # rep", ".log_softmax(1).diagonal()\n        # rep")]
NO_STEP = [("    def step(self, x: Tensor, state: Tensor):", "    def one_more(self, x: Tensor, state: Tensor):")]


def copied(*edits: list) -> str:
    """The page with edits."""
    text = PAGE.read_text(encoding="utf-8")
    for edit in edits:
        for old, new in edit:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
    return text


def imported(monkeypatch, text: str):
    """The copy train_mine.py of this folder, as a module."""
    Path("train_mine.py").write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("train_mine", Path("train_mine.py").resolve())
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_mine", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def without_pictures(in_a_folder_of_its_own, monkeypatch):
    for name in ("draw_loss", "draw_plans"):
        monkeypatch.setattr(plans, name, lambda *args, **options: None)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_takes_few_lines(name):
    edit, most = EDITS[name]
    before = PAGE.read_text(encoding="utf-8").splitlines()
    lines = difflib.ndiff(before, copied(edit).splitlines())
    changed = [line for line in lines if line[0] in "+-" and line[1:].strip()]
    assert len(changed) <= most, changed


@pytest.mark.parametrize("edits", [[OWN_DATA], [OWN_DATA, OWN_BACKBONE], [OWN_DATA, OWN_TERM],
                                   [OWN_DATA, OWN_BACKBONE, OWN_TERM]], ids=["data", "backbone", "loss", "all three"])
def test_a_copy_trains_and_is_analysed(edits, monkeypatch):
    page = imported(monkeypatch, copied(*edits))
    result = page.main(list(TINY))
    assert np.isfinite(result["val_nll"]) and result["steps"] == 6
    assert Path("out/mine/summary.json").exists() and not Path("out/apelr").exists()
    assert checkpoint.load(Path("out/mine"))["experiment"] == "train_mine"
    assert page.main(["--analyze=out/mine", "--device=cpu"])["val_nll"] == pytest.approx(result["val_nll"])
    lines = Path("out/mine/metrics.jsonl").read_text().splitlines()
    assert all(("leaving" in json.loads(line)) == (OWN_TERM in edits) for line in lines if '"split": "train"' in line)


def test_a_copy_is_held_against_a_baseline_of_its_own(monkeypatch):
    page = imported(monkeypatch, copied(OWN_DATA, OWN_BACKBONE, OWN_TERM))
    result = page.main([*TINY, "--compare_baseline"])
    assert checkpoint.load(Path("out/mine/baseline"))["experiment"] == "train_mine"
    assert abs(result["baseline_parameters"] / result["parameters"] - 1) < 0.03
    assert json.loads(Path("out/mine/baseline/config.json").read_text())["backbone"] == "window"


def test_a_copy_beside_a_finished_run_of_the_original_is_a_run_of_its_own(monkeypatch):
    monkeypatch.setattr(train_apelr, "open_data", imported(monkeypatch, copied(OWN_DATA)).open_data)
    original = train_apelr.main([*TINY, "--out_dir=out/apelr"])
    page = imported(monkeypatch, copied(OWN_DATA, OWN_TERM))
    assert page.main(list(TINY))["val_nll"] != original["val_nll"]
    assert json.loads(Path("out/apelr/summary.json").read_text())["val_nll"] == original["val_nll"]
    started = page.main([*TINY, "--out_dir=out/third", "--init_from=out/apelr", "--max_steps=1", "--lr=0"])
    assert started["val_nll"] == pytest.approx(original["val_nll"], rel=1e-5)


@pytest.mark.parametrize("edits, words", [
    ([OWN_DATA, OWN_BACKBONE, ONLY_THE_LAST], "does not work"), ([OWN_DATA, OWN_TERM, A_VECTOR], "does not work"),
    ([OWN_DATA, NLL_A_WINDOW], "does not work"),
    ([OWN_DATA, OWN_BACKBONE, NO_STEP], "step"),
], ids=["a backbone that returns its last state alone", "a loss that is no number", "a loss a window",
        "a backbone without step"])
def test_a_broken_edit_fails_before_the_first_step(edits, words, monkeypatch, capsys):
    page = imported(monkeypatch, copied(*edits))
    monkeypatch.setattr(page, "train_step", lambda *args: pytest.fail("it trained"))
    assert words in refusal(capsys, page.main, *TINY) and not Path("out").exists()


def test_a_copy_refuses_the_run_of_the_original(monkeypatch, capsys):
    monkeypatch.setattr(train_apelr, "open_data", imported(monkeypatch, copied(OWN_DATA)).open_data)
    train_apelr.main([*TINY, "--out_dir=out/apelr"])
    page = imported(monkeypatch, copied(OWN_DATA))
    assert "is a checkpoint of train_apelr.py, not of train_mine.py" in refusal(
        capsys, page.main, *TINY, "--out_dir=out/apelr")
