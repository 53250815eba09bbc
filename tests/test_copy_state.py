"""Copies of train_state.py under another name: own data, own model, own loss by a few edited lines; broken ones."""

import difflib
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from commands import refusal

import prepare_data

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--d_model=16", "--n_layers=1", "--n_heads=2", "--d_mlp=32", "--cell_set_len=8", "--batch_size=4",
         "--max_steps=4", "--warmup_steps=0", "--device=cpu", "--precision=fp32"]
DATA = [
    ('SYNTHETIC = "data/state/synthetic.toml"', 'SYNTHETIC = "data/mine/mine.toml"'),
    ("from sources.populations import synthetic", "from sources.h5ad import write_h5ad"),
    ("class Sentences:", '''def synthetic(out_dir: str) -> None:
    """Counts of 6 genes, of which each drug lowers one."""
    rng, folder = np.random.default_rng(0), Path(out_dir)
    folder.mkdir(parents=True)
    cell_type, drug = rng.integers(0, 3, 900), rng.integers(0, 4, 900)
    level = np.array([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [3, 3, 3, 3, 3, 3]])[cell_type].astype(float)
    for d in (1, 2, 3):
        level[drug == d, d] *= 0.2
    expression = np.log1p(rng.poisson(level)).astype(np.float32)
    obs = {"gene": np.array(["non-targeting", "a", "b", "c"])[drug], "cell_type": np.array(["x", "y", "z"])[cell_type],
           "gem_group": np.full(900, "one")}
    write_h5ad(folder / "mine.h5ad", expression, obs, [f"gene{i}" for i in range(6)], {"X_hvg": expression})
    (folder / "mine.toml").write_text('[datasets]\\nmine = "mine.h5ad"\\n[training]\\nmine = "train"\\n'
                                      '[zeroshot]\\n"mine.z" = "test"\\n')


class Sentences:'''),
]
MODEL = [
    ('Literal["llama", "GPT2"] = "llama"', 'Literal["llama", "GPT2", "pool"] = "pool"'),
    ('BACKBONES = {"llama": Llama, "GPT2": GPT2}', '''class Pool(nn.Module):
    """Each cell reads the mean of its sentence (deep sets, Zaheer et al. 2017)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2 * cfg.d_model, cfg.d_model) for _ in range(cfg.n_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + F.gelu(layer(torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], -1)))
        return x


BACKBONES = {"llama": Llama, "GPT2": GPT2, "pool": Pool}'''),
]
LOSS = [
    ('loss: Literal["energy", "sinkhorn", "se", "mse"] = "energy"',
     'loss: Literal["energy", "sinkhorn", "se", "mse", "sorted"] = "sorted"'),
    ('        if loss == "se":', '''        if loss == "sorted":
            return (pred.sort(1).values - target.sort(1).values).abs().mean((1, 2))
        if loss == "se":'''),
]
BROKEN = {
    "the last cell only": ("self.project_out(x + control)", "self.project_out((x + control)[:, -1:])"),
    "too few genes": ("cells.relu() if self.clips", "cells[..., :3].relu() if self.clips"),
    "no loss": ('return terms | {"loss": total}', "return {}"),
    "a loss a sentence": ('return terms | {"loss": total}', 'return terms | {"loss": per_set}'),
    "a loss without gradient": ('return terms | {"loss": total}', 'return terms | {"loss": total.detach()}'),
    "no cells": ('out["cells"] = cells.relu()', 'out["cell"] = cells.relu()'),
}


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Path:
    """A folder with a few synthetic cells in data/state."""
    folder = tmp_path_factory.mktemp("cells")
    prepare_data.main(["state", "--num_cell_types=5", "--num_perturbations=4", "--num_genes=24", "--num_batches=2",
                       "--cells_per_condition=10", "--controls_per_cell_type=16", f"--out_dir={folder}/data/state"])
    return folder / "data"


@pytest.fixture
def copy(cells, in_a_folder_of_its_own, monkeypatch):
    """copy(edits, name): the module of an edited copy in a folder of its own, and the lines that the edits changed."""
    monkeypatch.syspath_prepend(str(Path.cwd()))
    shutil.copytree(cells, "data")
    made = []

    def edited(edits: list[tuple[str, str]], name: str = "train_mine") -> tuple:
        before = after = (ROOT / "train_state.py").read_text(encoding="utf-8")
        for old, new in edits:
            assert after.count(old) == 1, old  # the edit has its place
            after = after.replace(old, new)
        Path(f"{name}.py").write_text(after, encoding="utf-8")
        made.append(name)
        lines = difflib.ndiff(before.splitlines(), after.splitlines())
        importlib.invalidate_caches()
        page = importlib.import_module(name)
        monkeypatch.setattr(page.effects, "plot_metrics", lambda *args: None)
        return page, sum(line[0] in "+-" for line in lines)

    before = dict(sys.modules)
    yield edited
    for name in made:
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]


@pytest.mark.parametrize("edits, most", [(DATA, 25), (MODEL, 20), (LOSS, 6), (DATA + MODEL + LOSS, 50)],
                         ids=["data", "model", "loss", "all"])
def test_an_edited_copy_trains_and_is_analysed(edits, most, copy, capsys):
    page, lines = copy(edits)
    assert lines <= most
    result = page.main(SHORT)
    assert result["steps"] == 4 and result["conditions"] == (3 if DATA[0] in edits else 4)
    saved = json.loads(Path("out/mine/summary.json").read_text())
    again = page.main(["--analyze=out/mine", "--device=cpu"])
    assert again["mae"] == saved["mae"] and "step 4: the model" in capsys.readouterr().out


def test_a_copy_beside_a_finished_run_of_the_original_trains_by_itself(copy):
    page, _ = copy([], "train_state")
    assert page.main(SHORT)["steps"] == 4
    before = Path("out/state/last.pt").read_bytes()
    mine, _ = copy(LOSS)
    assert mine.main(SHORT)["steps"] == 4 and Path("out/mine/last.pt").exists()
    assert Path("out/state/last.pt").read_bytes() == before


@pytest.mark.parametrize("edit", BROKEN.values(), ids=BROKEN)
def test_a_broken_copy_fails_before_it_trains(edit, copy, capsys):
    page, _ = copy([edit])
    assert "mend that before it trains" in refusal(capsys, page.main, *SHORT)
    assert not Path("out").exists()
