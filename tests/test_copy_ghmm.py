"""A copy of train_ghmm.py that its user edits: own process, own data, own model, own loss, and edits that are wrong."""

import difflib
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from commands import refusal

import train_ghmm
from common import checkpoint

PAGE = Path(train_ghmm.__file__).read_text(encoding="utf-8")
TINY = ("--n_layers=1", "--d_model=16", "--d_mlp=32", "--n_ctx=6", "--batch_size=16", "--max_words=300",
        "--eval_sequences=64", "--warmup_steps=2", "--device=cpu", "--precision=fp32", "--max_steps=4",
        "--log_interval=1", "--eval_interval=2")

OWN_PROCESS = [('''@dataclass
class Config:
''', '''def pairs(theta: float = 0.5, phi: float = 0.3):
    """Zeros and ones come in pairs."""
    return [[[0, theta, 0], [1, 0, 0], [0, 0, 0]], [[0, 0, 1 - theta], [0, 0, 0], [1, 0, 0]]]


PROCESSES["pairs"] = pairs


@dataclass
class Config:
'''), ('''    n_ctx: Count = 10''', '''    theta: float | None = None  # pairs: probability of a zero
    n_ctx: Count = 10''')]

OWN_MODEL = [('''def build_model(cfg: Config, vocab_size: int) -> nn.Module:
''', '''class Window(nn.Module):
    """An MLP over the last two tokens."""

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, cfg.d_model)
        self.mix = nn.Linear(2 * cfg.d_model, cfg.d_model)
        self.unembed = nn.Linear(cfg.d_model, vocab_size)

    def forward(self, tokens):
        x = self.embed(tokens)
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        hidden = self.mix(torch.cat([before, x], -1)).relu()
        return self.unembed(hidden), [x, hidden]


def build_model(cfg: Config, vocab_size: int) -> nn.Module:
'''), ('''Transformer(cfg, vocab_size) if cfg.model == "transformer" else Recurrent(cfg, vocab_size)''',
       '''Window(cfg, vocab_size)''')]

OWN_LOSS = [('''    logits, _ = model(tokens[:, :-1])
    return next_token_loss(logits, tokens[:, 1:])
''', '''    logits, activations = model(tokens[:, :-1])
    return next_token_loss(logits, tokens[:, 1:]) + 0.1 * activations[-1].square().mean()
''')]


def body(function: str) -> str:
    """The statements of a function of the page, below its docstring."""
    after = PAGE[PAGE.index(f"def {function}("):]
    lines = after.split('"""\n', 1)[1].splitlines(keepends=True)
    indent = len(lines[0]) - len(lines[0].lstrip())
    kept = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            break
        kept.append(line)
    return "".join(kept).rstrip() + "\n"


OWN_DATA = [('''class Batches:
''', '''class Text:
    """The bytes of a file; the last tenth is held out."""

    vocab_size, num_states = 256, 0

    def __init__(self, path: str, n_ctx: int):
        self.name = path
        windows = torch.tensor(list(Path(path).read_bytes())).unfold(0, n_ctx + 1, 1)  # [N, T + 1]
        begin = len(windows) * 9 // 10
        self.train, self.held_out = windows[:begin], windows[begin + n_ctx :]

    def to(self, device):
        return self


class Batches:
'''), ('''    process: str | None = None''', '''    data: str = "mine.txt"  # own text
    process: str | None = None'''), (body("build_process"), '''    return Text(cfg.data, cfg.n_ctx)
'''), (body("entropy_floor"), '''    return torch.zeros(n_ctx, dtype=torch.float64), 0.0
'''), (body("__call__"), '''        generator = self.rt.generator(step, device="cpu")
        rows = torch.randint(len(self.process.train), (self.cfg.batch_size,), generator=generator)
        return self.process.train[self.rt.share(rows)].to(self.rt.device)
'''), (body("make_contexts"), '''    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(process.held_out), generator=generator)[:samples]
    weights = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    windows = process.held_out[rows]
    return Contexts(windows[:, :-1], weights, windows[:, 1:], None, False)
'''), (PAGE[PAGE.index("        # The model's predictions q beside"):PAGE.index("    model.train()\n")],
       '''        losses = F.cross_entropy(logits.double().transpose(1, 2), optimal[rows], reduction="none")  # [B, T]
        divergence += weights[rows] @ losses
''')]


def edited(edits: list[tuple[str, str]]) -> str:
    text = PAGE
    for old, new in edits:
        assert text.count(old) == 1, f"the page has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


def changed_lines(text: str) -> tuple[int, int]:
    """How many lines of code are new, and how many are gone."""
    lines = [line for line in difflib.ndiff(PAGE.splitlines(), text.splitlines())
             if line[1:].strip() and not line[1:].lstrip().startswith("#")]
    return sum(line[0] == "+" for line in lines), sum(line[0] == "-" for line in lines)


@pytest.fixture(autouse=True)
def without_pictures(in_a_folder_of_its_own, monkeypatch):
    monkeypatch.setattr(train_ghmm, "plot_run", lambda *args: None)


@pytest.fixture
def copy_of(monkeypatch):
    """edits -> the module train_mine, in this folder."""
    monkeypatch.syspath_prepend(str(Path.cwd()))

    def copied(edits):
        Path("train_mine.py").write_text(edited(edits), encoding="utf-8")
        importlib.invalidate_caches()
        module = importlib.import_module("train_mine")
        monkeypatch.setattr(module, "plot_run", lambda *args: None)
        return module

    known = dict(train_ghmm.PROCESSES)
    yield copied
    sys.modules.pop("train_mine", None)
    train_ghmm.PROCESSES.clear()
    train_ghmm.PROCESSES.update(known)


def run(page, *settings: str) -> dict:
    """A few steps, and the same result when the run is analysed again."""
    found = page.main([*TINY, *settings])
    again = page.main(["--analyze=out/mine", "--device=cpu"])
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-6)
    return found


@pytest.mark.parametrize("edits, added, deleted", [
    (OWN_PROCESS, 5, 0), (OWN_MODEL, 13, 1), (OWN_LOSS, 2, 2), (OWN_DATA, 25, 35)],
    ids=["process", "model", "loss", "data"])
def test_an_edit_is_short(edits, added, deleted):
    new, gone = changed_lines(edited(edits))
    assert new <= added and gone <= deleted, f"{new} lines are new, {gone} gone"


def test_a_copy_has_runs_of_its_own_beside_those_of_the_original(copy_of):
    original = train_ghmm.main([*TINY])
    page = copy_of(OWN_LOSS)
    assert page.Config().out_dir == "out/mine"
    found = run(page)
    assert found["loss"] != original["loss"] and found["steps"] == 4
    assert checkpoint.load(Path("out/mine"))["experiment"] == "train_mine"
    assert checkpoint.load(Path("out/ghmm"))["experiment"] == "train_ghmm"
    assert Path("out/mine/train_mine.py").read_text() == Path("train_mine.py").read_text()


def test_a_copy_does_not_take_up_a_run_of_the_original(copy_of, capsys):
    train_ghmm.main([*TINY])
    error = refusal(capsys, copy_of(OWN_LOSS).main, *TINY, "--out_dir=out/ghmm")
    assert "checkpoint of train_ghmm.py, not of train_mine.py" in error


def test_a_process_of_ones_own_takes_its_parameters_from_its_signature(copy_of, capsys):
    page = copy_of(OWN_PROCESS)
    found = run(page, "--process=pairs", "--theta=0.2")
    expected = page.make_process("pairs", theta=0.2, phi=0.3)  # phi is no setting: its default
    assert found["optimal_loss_by_position"] == pytest.approx(expected.optimal_loss(6).tolist())
    assert found["optimal_loss"] != pytest.approx(float(page.make_process("pairs").optimal_loss(6).mean()))
    assert "process mess3 has no parameter 'theta': it takes x, a" in refusal(capsys, page.main, *TINY, "--theta=0.2")
    assert "  pairs(theta=0.5, phi=0.3)  Zeros and ones come in pairs." in page.Config.more_help()
    assert "pairs has no parameter 'p'" in refusal(capsys, page.main, *TINY, "--process=pairs", "--p=0.2")


def test_a_process_may_share_a_setting_with_the_page(copy_of):
    """A random process wants the seed; other processes do not mind that there is one."""
    edits = [(old, new.replace("phi: float = 0.3", "seed: int = 0")) for old, new in OWN_PROCESS]
    page = copy_of(edits)
    assert page.build_process(page.Config(process="pairs", theta=0.2)).name == "pairs"
    assert page.build_process(page.Config(seed=3)).name == "mess3"


def test_a_model_of_ones_own_trains_and_is_analysed(copy_of):
    found = run(copy_of(OWN_MODEL))
    assert found["r2_by_layer"].keys() == {"embed", "layer_1"} and 0 < found["r2_concat"] < 1
    assert set(json.loads(Path("out/mine/analysis.json").read_text())["layers"]) == {"embed", "layer_1", "concat"}


def test_data_that_are_no_process_train_without_a_floor_and_without_beliefs(copy_of, capsys):
    Path("mine.txt").write_text("the cat sat on the mat. " * 100)
    page = copy_of(OWN_DATA)
    capsys.readouterr()
    found = run(page, "--max_steps=60", "--lr=1e-2", "--eval_interval=20")
    out = capsys.readouterr().out
    assert "%" not in out and "belief" not in out and not Path("out/mine/analysis.json").exists()
    assert found["loss"] < 2 < page.main([*TINY, "--max_steps=1", "--out_dir=untrained"])["loss"]
    assert "r2_concat" not in found and found["loss"] == found["excess_loss"]
    _, data, model, _ = page.load_run(Path("out/mine"), "cpu")
    contexts = page.make_contexts(data, 6, 300, 101, 1338)
    with torch.no_grad():
        log_q = model(contexts.words)[0].log_softmax(-1).gather(2, contexts.optimal[..., None])
    assert found["loss"] == pytest.approx(-float(log_q.mean()), rel=1e-4)


WRONG = {
    "a model that returns its last layer only": (
        "return logits.view(B, T, -1), [activation.view(B, T, -1) for activation in activations]",
        "return logits.view(B, T, -1), x.view(B, T, -1)", "last activation alone"),
    "a model that returns no activations": (
        "return logits.view(B, T, -1), [activation.view(B, T, -1) for activation in activations]",
        "return logits.view(B, T, -1)", "ValueError: too many values to unpack"),
    "activations of another shape": (
        "[activation.view(B, T, -1) for activation in activations]", "activations", "activation 0 of the model"),
    "logits of another shape": (
        "return logits.view(B, T, -1), [", "return logits.view(B, T, -1)[:, -1:], [", "before it trains"),
    "a loss that cannot be": (
        "next_token_loss(logits, tokens[:, 1:])", "next_token_loss(logits, tokens)", "train_mine.py, line"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_edit_that_is_wrong_fails_in_one_line_before_the_first_step(copy_of, capsys, what):
    old, new, words = WRONG[what]
    page = copy_of([(old, new)])
    assert words in refusal(capsys, page.main, *TINY)
    assert not Path("out").exists()


def test_a_run_that_its_page_no_longer_fits_is_told_in_one_line(copy_of, capsys):
    copy_of([]).main([*TINY])
    sys.modules.pop("train_mine")
    error = refusal(capsys, copy_of(OWN_MODEL).main, "--analyze=out/mine", "--device=cpu")
    assert "does not fit the model as its script builds it now" in error
