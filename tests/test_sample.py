"""sample.py on copies of the pages, and prepare_data.py import: whose page a run is of, foreign checkpoints as ours."""

import ast
import importlib
import json
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
import train_state
from common import checkpoint
from common.errors import CheckpointError
from sources import foreign_checkpoints
from sources.h5ad import H5ad, as_dense
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


# -------------------------------------------------------------------------------------------------------------- copies


def test_sample_py_imports_no_page_until_it_knows_which():
    tree = ast.parse((ROOT / "sample.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("train_") for name in imported)


@pytest.mark.parametrize("experiment, settings, key", [
    ("ghmm", ["--num_samples=2"], "model"), ("arxiv", ["--num_samples=2"], "xe"),
    ("apelr", ["--num_samples=2", "--max_new_tokens=5", "--prompt=9,1"], "samples"), ("state", [], "pearson_delta")])
def test_a_copy_of_each_page_is_sampled_like_the_page(experiment, settings, key, repository, data):
    train_copy(experiment, repository, data)
    assert checkpoint.experiment_of(Path("run")) == "train_mine"
    result = sample.main(["run", "--device=cpu", "--json=found.json", *settings])
    assert result["experiment"] == experiment and result["step"] == 2
    assert json.loads(Path("found.json").read_text())[key] is not None and result[key]


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
    for path, words in (("run/last.pt", "is a checkpoint of train_mine.py already"), ("run", "is a folder"),
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
