"""What a run is, on all four pages: the same command again, the same data, the same log lines after an interruption."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import python, refusal
from comparison import unequal

import prepare_data
import sample
from common import checkpoint
from common.runlog import read_metrics
from configurator import config_dict, configure, from_dict

EXPERIMENTS = ("ghmm", "arxiv", "apelr", "state")
# Lines every 5 steps, saves every 4: a run that goes on from step 4 has one step of the second line only.
COMMON = ("--batch_size=8", "--max_steps=12", "--warmup_steps=0", "--log_interval=5", "--eval_interval=12",
          "--save_interval=4", "--keep_last=-1", "--device=cpu", "--precision=fp32", "--out_dir=run")
TIMED = ("time_s", "tokens_per_s", "cells_per_s", "mfu", "step/tokens_per_second", "cum/tokens_per_second")


@pytest.fixture(autouse=True)
def without_pictures(quickly, monkeypatch):
    for page, name in (("ghmm", "plot_run"), ("arxiv", "draw_run")):
        monkeypatch.setattr(importlib.import_module(f"train_{page}"), name, lambda *args, **options: None)


def make_data(experiment: str, seed: int = 0) -> list[str]:
    """Data of this seed, at the same place for every seed; returns the settings of a small run on them."""
    if experiment == "ghmm":
        p = 0.6 + seed / 10
        matrices = [[[p / 2, 0.5 - p / 2], [0.25, 0.25]], [[0.5 - p / 2, p / 2], [0.25, 0.25]]]
        Path("data").mkdir(exist_ok=True)
        np.save("data/matrices.npy", np.array(matrices))
        return ["--process=custom", "--matrices=data/matrices.npy", "--n_layers=1", "--d_model=16", "--d_mlp=16",
                "--n_ctx=5", "--max_words=300"]
    if experiment == "arxiv":
        parts = [{"name": "a", "process": "coin", "p": 0.9}, {"name": "b", "process": "coin", "p": 0.1}]
        prepare_data.main(["ergodic", f"--components={json.dumps(parts)}", "--train_documents=10", "--chunk_size=8",
                           "--validation_documents=5", "--out_dir=data/ergodic", f"--seed={seed}"])
        return ["--n_layers=1", "--d_model=16", "--n_heads=2", "--d_mlp=16", "--bootstrap=5", "--data=data/ergodic"]
    if experiment == "apelr":
        prepare_data.main(["planted", "--num_plans=2", "--vocab_size=9", "--chunk_size=4", "--document_chunks=4",
                           "--train_documents=50", "--validation_documents=10", "--out_dir=data/planted",
                           f"--seed={seed}"])
        return ["--num_plan_states=2", "--chunk_size=4", "--seq_len=15", "--token_dim=8", "--d_model=8", "--n_layers=1",
                "--eval_batches=1", "--final_eval_batches=1", "--preview_tokens=0", "--data=data/planted"]
    prepare_data.main(["state", "--num_cell_types=4", "--num_perturbations=3", "--num_genes=20", "--num_batches=1",
                       "--cells_per_condition=8", "--controls_per_cell_type=8", "--out_dir=data", f"--seed={seed}"])
    return ["--n_layers=1", "--d_model=16", "--n_heads=2", "--d_mlp=16", "--cell_set_len=4", "--eval_sentences=4",
            "--toml=data/synthetic.toml"]


def main(experiment: str):
    return importlib.import_module(f"train_{experiment}").main


def lines() -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    return [{key: value for key, value in record.items() if key not in TIMED} for record in read_metrics(Path("run"))]


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_run_in_all_its_lives(experiment, capsys):
    """One run a script: trained, asked again, looked at, killed at its end, and interrupted."""
    settings = [*COMMON, *make_data(experiment)]
    summary = main(experiment)(settings)
    whole, made = lines(), contents("run")
    speed_name = "cells_per_second" if experiment == "state" else "tokens_per_second"
    assert summary[speed_name] > 0

    # The same command again: nothing is trained, measured or written. Both end with the verdict, then few figures.
    ends = capsys.readouterr().out.rpartition("\ndone: ")[2].splitlines()
    assert ends[0] == summary["verdict"] and len(ends) <= 9 and f"seconds: {summary['seconds']:.6g}" in ends
    assert ends[-1].endswith("all of it in run/report.html")
    again = main(experiment)(settings)
    said = capsys.readouterr().out
    assert "ended at step 12" in said and "nothing was left to train" in said
    assert said.rpartition("\ndone: ")[2].splitlines() == ends
    assert again == json.loads(Path("run/summary.json").read_text())
    assert contents("run") == made

    # A look at it writes into a folder of its own.
    main(experiment)(["--analyze=run", "--device=cpu"])
    looked = capsys.readouterr().out.rpartition(f"step {summary['steps']}: ")[2].splitlines()
    assert looked[-1].endswith("all of it in run/analysis/report.html") and len(looked) <= 8
    after = contents("run")
    assert {name: after[name] for name in made} == made
    assert all(name.startswith("run/analysis/") for name in set(after) - set(made)) and len(after) > len(made)

    # Killed between its last step and its summary: measured again, with the speed of its training.
    Path("run/summary.json").unlink()
    measured = main(experiment)(settings)
    assert measured[speed_name] == pytest.approx(summary[speed_name])
    assert measured["seconds"] > summary["seconds"]

    # Interrupted at step 4, between two lines of the log: the next line is the mean of all five steps.
    for name in ("last", "best"):
        shutil.copyfile("run/step_4.pt", f"run/{name}.pt")
    Path("run/summary.json").unlink()
    main(experiment)(settings)
    assert [(record["step"], record["split"]) for record in lines()] == [(r["step"], r["split"]) for r in whole]
    assert lines() == whole


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_finished_run_goes_on_to_more_steps_when_asked(experiment, capsys):
    """At a constant rate it ends as a run of so many steps does; the way it is watched is no other setting."""
    settings = [*COMMON, *make_data(experiment), "--schedule=constant"]
    page = main(experiment)
    page([*settings, "--out_dir=whole"])
    page([*settings, "--max_steps=8"])
    capsys.readouterr()
    watched = ["--log_interval=3", "--save_interval=2", "--keep_last=0", "--tensorboard=false"]
    page([*settings, "--max_steps=8", *watched])
    assert "ended at step 8, nothing was left to train" in capsys.readouterr().out
    told = refusal(capsys, page, *settings)
    assert "finished run with other settings (max_steps: 8 -> 12)" in told and "--resume=never" in told
    assert "with --resume=run/last.pt goes on from step 8;" in told
    assert "goes on from step 8 to max_steps = 12, first with a higher learning rate" in refusal(
        capsys, page, *settings[:-1])  # of a cosine
    assert "goes on from step 8;" in refusal(capsys, page, *settings[:-1], "--warmup_steps=8")  # that has not begun
    assert "with more steps and --resume=run/last.pt it goes on from step 8" in refusal(
        capsys, page, *settings, "--max_steps=7")
    page([*settings, "--resume=run/last.pt"])
    assert "max_steps: 8 -> 12" in capsys.readouterr().out
    run, whole = (checkpoint.load(Path(folder)) for folder in ("run", "whole"))
    assert run["step"] == 12 and unequal(run["model"], whole["model"]) == []
    page(settings)
    assert "ended at step 12, nothing was left to train" in capsys.readouterr().out


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("words, value", [([], False), (["--wandb"], True), (["--no-wandb"], False),
                                          (["--wandb=offline"], "offline"), (["--wandb="], False)])
def test_wandb_is_a_switch_and_a_mode_on_every_page(experiment, words, value):
    page = importlib.import_module(f"train_{experiment}")
    assert configure(page.Config, words, page.ALIASES).wandb == value
    older = config_dict(page.Config()) | {"wandb": ""}  # as checkpoints of before have it
    assert from_dict(page.Config, older, "last.pt", page.ALIASES).wandb is False


@pytest.mark.parametrize("backend", ["module://of.a.notebook", "inline_where_it_is_not_installed"])
def test_the_backend_of_a_notebook_costs_no_run_its_pictures(backend, tmp_path):
    """With a name that it does not know matplotlib cannot be imported at all."""
    code = ("import os, matplotlib_free as f; f.draw(); import matplotlib; "
            "print(os.environ['MPLBACKEND'], matplotlib.rcParams['backend'])")
    (tmp_path / "matplotlib_free.py").write_text(
        f"import os\nos.environ['MPLBACKEND'] = '{backend}'\nfrom pathlib import Path\n"
        "from measure.figures import figure\n"
        "def draw():\n    with figure(Path('.'), 'line', title='a line') as axes:\n        axes.plot([1, 2])\n")
    done = python("-c", code, folder=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "plots" / "line.png").stat().st_size > 1_000
    assert done.stdout.split()[0] == backend  # the environment is as it was


def test_a_picture_that_cannot_be_drawn_is_a_line_and_no_end(tmp_path, monkeypatch, capsys):
    from measure import figures

    monkeypatch.setattr(figures, "STRICT", False)
    with figures.figure(tmp_path, "wrong") as axes:
        axes.plot([1, 2], [1, 2, 3])
    (tmp_path / "plots").write_text("in the way")
    with figures.figure(tmp_path, "nowhere") as axes:
        axes.plot([1, 2])
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all("was not drawn" in line for line in told)
    assert "wrong" in told[0] and "nowhere" in told[1]
    monkeypatch.setattr(figures, "STRICT", True)
    with pytest.raises(ValueError):
        with figures.figure(tmp_path, "wrong") as axes:
            axes.plot([1, 2], [1, 2, 3])


# ------------------------------------------------------------------------------------------------------------- samples


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """experiment -> a short run, trained once; of apelr and arxiv the data have no tokenizer."""
    folders = {}

    def run(experiment: str) -> str:
        if experiment not in folders:
            settings = [*COMMON, *make_data(experiment)]
            main(experiment)(settings)
            folders[experiment] = tmp_path_factory.mktemp(experiment) / "here"
            shutil.copytree(".", folders[experiment])
        if not Path("run").exists():
            shutil.copytree(folders[experiment], ".", dirs_exist_ok=True)
        return "run"

    return run


def lengths(result: dict) -> set[int]:
    return {len(entry["tokens"]) for entry in result["samples"]}


@pytest.mark.parametrize("experiment", ["ghmm", "arxiv", "apelr"])
def test_samples_have_the_length_that_was_asked_for_and_greedy_ones_are_the_likeliest(experiment, trained):
    run, prompt = trained(experiment), ["--prompt=1,0,1", "--device=cpu"]
    assert lengths(sample.main([run, *prompt, "--max_new_tokens=20"])) == {23}
    assert lengths(sample.main([run, *prompt, "--length=20"])) == {20}
    greedy = [sample.main([run, *prompt, "--max_new_tokens=6", "--temperature=0", *words])["samples"]
              for words in (["--seed=1"], ["--seed=2"], ["--num_samples=3", "--top_k=2", "--top_p=0.5"])]
    assert greedy[0] == greedy[1] == greedy[2] and len(greedy[0]) == 1  # more of them would be the same
    cold = sample.main([run, *prompt, "--max_new_tokens=6", "--top_k=1"])["samples"]
    assert [entry["tokens"] for entry in cold] == [greedy[0][0]["tokens"]] * 4


def test_a_single_token_has_no_mean(trained, capsys):
    result = sample.main([trained("arxiv"), "--length=1", "--num_samples=1", "--device=cpu"])
    assert result["samples"][0]["xe"] == [] and "mean" not in capsys.readouterr().out


@pytest.mark.parametrize("experiment, option, owner", [
    ("ghmm", "--force_state=2", "apelr"), ("arxiv", "--show_plan", "apelr"), ("apelr", "--adata=x.h5ad", "state"),
    ("state", "--prompt=0,1", "ghmm and arxiv and apelr"), ("state", "--temperature=0.5", "ghmm and arxiv and apelr"),
    ("arxiv", "--precision=bf16", "apelr")])
def test_an_option_of_another_experiment_is_refused(experiment, option, owner, trained, capsys):
    told = refusal(capsys, sample.main, trained(experiment), option, "--device=cpu")
    assert f"is an option of {owner}, not of {experiment}" in told


def test_every_option_of_sample_py_is_of_some_experiment():
    names = set(vars(sample.Config()))
    owned = {name for options in sample.OPTIONS.values() for name in options} | set(sample.SHARED)
    assert owned == names
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_other_data_under_the_same_name_are_refused(experiment, capsys):
    """By a finished run, by one that would go on, and by a look; with the first data again all goes on."""
    settings = [*COMMON, *make_data(experiment)]
    main(experiment)(settings)
    whole = lines()
    make_data(experiment, seed=1)
    for unfinished in (False, True):
        if unfinished:
            shutil.copyfile("run/step_4.pt", "run/last.pt")
        made = contents("run")
        told = refusal(capsys, main(experiment), *settings)
        name = next(setting for setting in settings if "data/" in setting).split("=", 1)[1]
        assert f"{name} had the fingerprint" in told and "resume=never" in told
        assert "had the fingerprint" in refusal(capsys, main(experiment), *settings, "--resume=run/step_8.pt")
        assert "had the fingerprint" in refusal(capsys, main(experiment), "--analyze=run", "--device=cpu")
        assert contents("run") == made
    if experiment in ("ghmm", "state"):  # whose samples need the data
        assert "had the fingerprint" in refusal(capsys, sample.main, "run", "--device=cpu")

    if experiment in ("arxiv", "apelr"):  # a folder is the same with a slash at its end
        assert "had the fingerprint" in refusal(capsys, main(experiment), *settings, f"--data=./{name}/")
    # The first data again: what was refused goes on.
    make_data(experiment)
    main(experiment)(settings)
    assert lines() == whole


def test_matrices_of_components_are_refused_by_a_name(capsys):
    part = {"process": "custom", "matrices": "data/matrices.npy"}
    settings = [*COMMON, *make_data("ghmm")]  # later ones count
    settings += ["--matrices=none", "--process=nonergodic", f"--components={json.dumps([part])}"]
    main("ghmm")(settings)
    make_data("ghmm", seed=1)
    assert "components had the fingerprint" in refusal(capsys, main("ghmm"), *settings)


def test_a_look_at_other_data_says_so_and_one_at_the_same_elsewhere_does_not(capsys):
    settings = [*COMMON, *make_data("arxiv")]
    main("arxiv")(settings)
    shutil.copytree("data/ergodic", "copy")
    make_data("arxiv", seed=1)
    capsys.readouterr()
    main("arxiv")(["--analyze=run", "--data=copy", "--bootstrap=5", "--device=cpu"])
    assert "note: " not in capsys.readouterr().err
    trained = json.loads(Path("run/results.json").read_text())
    looked = json.loads(Path("run/analysis/results.json").read_text())
    assert looked["data"] == trained["data"] and looked["budget"] == trained["budget"] and "measured_on" not in looked
    shutil.move("data/ergodic", "other")
    main("arxiv")(["--analyze=run", "--data=other", "--bootstrap=5", "--device=cpu"])
    assert "note: other is other data than run was trained on (data/ergodic)" in capsys.readouterr().err
    looked = json.loads(Path("run/analysis/results.json").read_text())
    assert looked["data"] == trained["data"] and looked["measured_on"]["path"] == "other"
    assert looked["measured_on"]["fingerprint"] != trained["data"]["fingerprint"]
    assert looked["budget"]["tokens"] is None


@pytest.mark.parametrize("experiment", ["arxiv", "apelr"])
def test_a_run_on_data_without_a_tokenizer_keeps_none_of_an_earlier_run(experiment):
    settings = [*COMMON, *make_data(experiment)]
    Path("run").mkdir()
    Path("run/tokenizer.json").write_text(json.dumps({"kind": "char", "characters": "abcdefghij"}))
    main(experiment)(settings)
    assert not Path("run/tokenizer.json").exists()
    sample.main(["run", "--prompt=1,0", "--num_samples=1", "--device=cpu"])  # prompts are numbers again


def test_results_of_an_earlier_run_do_not_outlive_the_start_of_another(monkeypatch):
    settings = [*COMMON, *make_data("arxiv")]
    main("arxiv")(settings)
    assert Path("run/results.json").exists()

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("train_arxiv"), "train_step", stopped)
    monkeypatch.setattr(importlib.import_module("train_arxiv"), "rehearse", lambda *args: None)
    with pytest.raises(BaseException):  # noqa: B017
        main("arxiv")([*settings, "--resume=never"])
    assert not Path("run/results.json").exists() and not Path("run/summary.json").exists()


