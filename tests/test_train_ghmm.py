"""train_ghmm.py, sample.py and bench.py as they are used: what a run leaves, learns, accepts and refuses."""

import io
import itertools
import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import brought_in_by, colours, ended, meanwhile, refusal, two_ranks
from comparison import apart

import sample
import train_ghmm
from common import checkpoint
from common.runtime import Runtime
from configurator import config_hash, configure
from sources.processes import make_process
from train_ghmm import ALIASES, Config

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--n_layers=1", "--d_model=16", "--d_mlp=32", "--n_ctx=6", "--batch_size=16", "--max_words=800",
        "--eval_sequences=64", "--warmup_steps=2", "--device=cpu", "--precision=fp32")
FEW = (*TINY, "--max_steps=3", "--log_interval=1", "--out_dir=run")
WHOLE = (*TINY, "--n_layers=2", "--max_steps=20", "--log_interval=5", "--eval_interval=10", "--save_interval=10",
         "--keep_last=-1", "--out_dir=run")
CHEAP = set("loss/step loss/ma loss/ema loss/min loss/progress_to_optimal lr/step step/tokens step/tokens_per_second "
            "cum/tokens cum/tokens_per_second step/lr_weighted_tokens cum/lr_weighted_tokens step/gradient_signal "
            "cum/gradient_signal step/fisher_proxy cum/fisher_proxy grads/l2_norm/step params/update_l2_norm/step "
            "params/update_l2_norm/cum".split())
COSTLY = {"params/l2_norm", "params/distance_from_init", "model/max_params_distance"}
EVALUATED = {"loss", "optimal_loss", "excess_loss", "loss_by_position", "optimal_loss_by_position", "kl_by_position"}
PICTURES = {"beliefs.png", "excess_loss.png", "loss_by_position.png", "r2_by_layer.png"}
draw_pictures = train_ghmm.plot_run


@pytest.fixture(autouse=True)
def without_pictures(in_a_folder_of_its_own, monkeypatch):
    """Unless it asks, a test draws no pictures."""
    monkeypatch.setattr(train_ghmm, "plot_run", lambda *args, **options: None)


@pytest.fixture(scope="module", autouse=True)
def at_work(request, tmp_path_factory):
    """What whole waits for."""
    yield from meanwhile(request, "whole", ROOT / "train_ghmm.py", *WHOLE,
                         folder=tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole(at_work) -> SimpleNamespace:
    """The WHOLE run by the real script: its folder, and what it printed. Tests leave the folder as it is."""
    process, folder = at_work
    done = ended(process)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder / "run", out=done.stdout, err=done.stderr)


@pytest.fixture
def copied(whole) -> Path:
    return Path(shutil.copytree(whole.folder, "run"))


def read(path: Path | str):
    """A JSON file; NaN and infinity are no JSON."""
    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=pytest.fail)


def lines(folder: Path | str, split: str) -> list[dict]:
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert all({"step", "time_s", "split"} < record.keys() for record in records)
    return [record for record in records if record["split"] == split]


def numbers(value) -> list[float]:
    if isinstance(value, (dict, list)):
        return [x for part in (value.values() if isinstance(value, dict) else value) for x in numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def close(value, rel: float = 1e-6):
    return pytest.approx(value, rel=rel, abs=1e-9)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def assert_drawn(folder: Path) -> None:
    assert {path.name for path in (folder / "plots").iterdir()} == PICTURES
    for path in (folder / "plots").iterdir():
        image = matplotlib.image.imread(path)
        assert path.stat().st_size > 5_000 and min(image.shape[:2]) >= 400 and colours(image) > 50, path


def test_a_run_leaves_the_promised_files_and_no_others(whole):
    assert {path.name for path in whole.folder.iterdir()} == {
        "config.json", "metrics.jsonl", "train.log", "summary.json", "analysis.json", "train_ghmm.py", "plots",
        "report.html", "last.pt", "best.pt", "step_10.pt", "step_20.pt"}
    assert (whole.folder / "train_ghmm.py").read_bytes() == (ROOT / "train_ghmm.py").read_bytes()
    assert read(whole.folder / "config.json") == checkpoint.load(whole.folder)["config"]
    assert read(whole.folder / "config.json")["n_layers"] == 2
    assert_drawn(whole.folder)


def test_metrics_hold_the_keys_of_the_source_and_the_loss_by_position(whole):
    train, evaluated = lines(whole.folder, "train"), lines(whole.folder, "eval")
    assert [r["step"] for r in train] == [5, 10, 15, 20] and [r["step"] for r in evaluated] == [10, 20]
    for record in train:
        assert record.keys() - {"step", "time_s", "split"} == (CHEAP if record["step"] % 10 else CHEAP | COSTLY)
        assert all(map(math.isfinite, numbers(record))) and record["cum/tokens"] == 96 * record["step"]
    for record in evaluated:
        assert record.keys() - {"step", "time_s", "split"} == EVALUATED
        parts = zip(record["optimal_loss_by_position"], record["kl_by_position"], strict=True)
        assert record["loss_by_position"] == close([floor + kl for floor, kl in parts])
        assert record["loss"] == close(record["optimal_loss"] + record["excess_loss"])
        assert record["loss"] == close(np.mean(record["loss_by_position"])) and len(record["kl_by_position"]) == 6


def test_the_summary_holds_the_loss_of_the_saved_weights_and_agrees_with_the_analysis(whole):
    summary, analysis = read(whole.folder / "summary.json"), read(whole.folder / "analysis.json")
    assert EVALUATED | {"r2_concat", "r2_by_layer", "config_hash", "seconds", "tokens_per_second", "torch", "device"} \
        <= summary.keys() and all(map(math.isfinite, numbers(summary)))
    process = make_process("mess3", x=0.05, a=0.85)
    assert summary["optimal_loss"] == close(float(process.optimal_loss(6).mean()))
    assert summary["loss"] == close(summary["optimal_loss"] + summary["excess_loss"])
    cfg, _, model, step = train_ghmm.load_run(whole.folder, "cpu")
    words = torch.tensor(list(itertools.product(range(3), repeat=7)))
    with torch.no_grad():
        log_q = F.log_softmax(model(words[:, :-1])[0].double(), -1).gather(2, words[:, 1:, None])[..., 0]
    assert summary["loss"] == close(-float(process.log_prob(words).sum(1).exp() @ log_q.mean(1)), 1e-5)
    assert (summary["steps"], step) == (20, 20) and summary["seconds"] > 0 and summary["tokens_per_second"] > 0
    cfg = configure(Config, list(WHOLE), ALIASES)
    assert (summary["config_hash"], summary["torch"], summary["device"]) == (config_hash(cfg), torch.__version__, "cpu")
    layers = analysis["layers"]
    assert list(layers) == ["embed", "layer_1", "layer_2", "concat"]
    for layer in layers.values():
        assert {"r2", "rmse", "mae", "dist", "rcond", "shuffled_r2"} <= layer.keys()
        assert {"explained", "components_80", "components_90", "components_95", "components_99"} == layer["pca"].keys()
    assert summary["r2_concat"] == analysis["r2_concat"] == layers["concat"]["r2"] != layers["layer_2"]["r2"]
    assert summary["r2_by_layer"] == {name: layers[name]["r2"] for name in ("embed", "layer_1", "layer_2")}
    for control in ("shuffled_r2_concat", "untrained_r2_concat"):
        assert summary[control] == analysis[control] < 1


def test_the_console_is_quiet_beside_the_log_and_ends_with_the_result_in_words(whole):
    summary = read(whole.folder / "summary.json")
    notes = [line for line in whole.err.splitlines() if " ..." not in line]  # how far it is, on a busy machine
    assert not notes and "\r" not in whole.out
    first, *logged = whole.out.splitlines(keepends=True)
    assert first == "train_ghmm: mess3, transformer, 20 steps -> run\n"
    assert "".join(logged) == (whole.folder / "train.log").read_text()
    told = [line.rstrip() for line in logged[logged.index(f"done: {summary['verdict']}\n"):]]
    assert f"{summary['loss']:.5f}" in told[0] and f"{summary['r2_concat']:.4f}" in told[0]
    assert len(told) <= 8 and f"excess_loss: {summary['excess_loss']:.6g}" in told
    assert str(Path("run/plots")) in told[-1]


def test_the_progress_bar_shows_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    train_ghmm.main([*FEW])
    assert "\r" in terminal.getvalue() and "/3" in terminal.getvalue()


# A transformer learns even_ones too, but in so few steps now better, now worse, as the rounding has it.
@pytest.mark.parametrize("process, model, excess, r2", [("mess3", "transformer", 0.006, 0.97),
                                                        ("even_ones", "gru", 0.004, 0.9)])
def test_a_small_training_nears_the_floor_and_finds_the_belief(process, model, excess, r2):
    found = train_ghmm.main([*TINY, f"--process={process}", f"--model={model}", "--n_layers=2", "--d_model=32",
                             "--d_mlp=64", "--n_ctx=8", "--batch_size=64", "--max_steps=250", "--lr=1e-2",
                             "--warmup_steps=20", "--max_words=7000", "--eval_interval=50", "--seed=1",
                             "--out_dir=run"])
    history = [record["excess_loss"] for record in lines("run", "eval")]
    assert 0 < found["excess_loss"] < excess < history[0]
    assert found["r2_concat"] > max(r2, found["untrained_r2_concat"] + 0.03)
    assert found["shuffled_r2_concat"] < 0.1


MODELS = [(f"--model={name}",) for name in ("transformer", "rnn", "gru", "lstm")] + [
    (f"--positional={p}", f"--normalization={n}") for p in ("learned", "rope", "none") for n in ("LN", "RMS", "none")]


@pytest.mark.parametrize("settings", MODELS, ids=" ".join)
def test_every_model_trains_towards_the_floor_and_its_summary_is_finite(settings):
    found = train_ghmm.main([*FEW, *settings, "--max_steps=30", "--lr=1e-2"])
    assert len(numbers(found)) > 20 and all(map(math.isfinite, numbers(found)))
    assert found["excess_loss"] < 0.1 < math.log(3) - found["optimal_loss"]  # which knowing nothing costs


PARTS = [{"process": "coin", "p": 0.9}, {"process": "even_ones", "vocab_map": [1, 2], "weight": 3}]


@pytest.mark.parametrize("settings, process, tokens", [
    (["--process=nonergodic", f"--components={json.dumps(PARTS)}"], {"name": "nonergodic", "components": PARTS}, 3),
    (["--add_bos"], {"add_bos": True}, 4), (["--add_eos=true"], {"add_eos": True}, 4),
    (["--add_bos", "--add_eos", "--eos_prob=0.3"], {"add_bos": True, "add_eos": True, "eos_prob": 0.3}, 5),
    (["--process=tom_quantum", "--alpha=1", "--beta=3"], {"name": "tom_quantum", "alpha": 1, "beta": 3}, 4),
    (["--initial_state=1,0,0"], {"initial_state": [1, 0, 0]}, 3)], ids=lambda value: str(value)[:40])
def test_a_process_of_any_kind_runs_to_its_end(settings, process, tokens):
    found = train_ghmm.main([*FEW, *settings])
    assert all(map(math.isfinite, numbers(found))) and found["excess_loss"] > 0
    assert found["optimal_loss_by_position"] == close(make_process(**process).optimal_loss(6).tolist())
    assert len(checkpoint.load(Path("run"))["model"]["unembed.bias"]) == tokens


@pytest.mark.parametrize("form", ["T.npy", "T.npz", "list"])
def test_matrices_alone_train_like_the_process_they_are_of(form, capsys):
    stack = [[[0.7, 0], [0, 0]], [[0, 0.3], [1, 0]]]
    np.save("T.npy", np.array(stack))
    np.savez("T.npz", anything=np.array(stack))
    named = train_ghmm.main([*FEW, "--process=even_ones", "--p=0.3"])
    given = json.dumps(stack) if form == "list" else form
    found = train_ghmm.main([*FEW, f"--matrices={given}", "--out_dir=own"])
    assert found["loss_by_position"] == close(named["loss_by_position"], 1e-4)
    assert read("own/config.json")["process"] == "custom"
    called = "custom" if form == "list" else form
    assert f"process {called}: 2 tokens, 2 states" in capsys.readouterr().out


def test_components_alone_are_a_mixture_and_neither_is_the_default_process():
    assert configure(Config, ["--components=[{'process': 'coin'}]"]).process == "nonergodic"
    assert configure(Config, []).process == "mess3"
    assert configure(Config, ["--process=sns"]).process == "sns"


def test_carry_state_goes_on_with_the_sequences_of_the_first_batch():
    for name, carries in (("anew", "false"), ("run", "true")):
        train_ghmm.main([*FEW, f"--carry_state={carries}", f"--out_dir={name}"])
    anew, carried = ([record["loss/step"] for record in lines(name, "train")] for name in ("anew", "run"))
    assert anew[0] == carried[0] and anew[1] != carried[1]


def test_carried_sequences_go_on_through_one_two_and_one_ranks():
    settings = [*TINY, "--log_interval=1", "--schedule=constant", "--carry_state", "--process=zero_one_random"]
    train_ghmm.main([*settings, "--max_steps=6", "--out_dir=whole"])
    anew = [record["loss/step"] for record in lines("whole", "train")]
    settings += ["--out_dir=run", "--resume=run/last.pt"]
    train_ghmm.main([*settings[:-1], "--max_steps=2"])
    two_ranks("train_ghmm", *settings, "--max_steps=4")
    train_ghmm.main([*settings, "--max_steps=6"])
    assert [record["loss/step"] for record in lines("run", "train")] == pytest.approx(anew, rel=1e-3)
    # Other sequences would have shown: the same run that starts each batch anew.
    train_ghmm.main([*settings[:-3], "--no-carry_state", "--process=zero_one_random", "--max_steps=6",
                     "--out_dir=other"])
    other = [record["loss/step"] for record in lines("other", "train")]
    told = two_ranks("train_ghmm", "--analyze=run", "--device=cpu")
    assert told.count("step 6: ") == told.count("held-out r2") == 1  # one rank speaks: it alone knows of the belief
    assert max(abs(a - b) / a for a, b in zip(anew, other, strict=True)) > 5e-3


def test_a_run_without_chance_or_without_beliefs_to_tell_apart_claims_nothing(capsys):
    found = train_ghmm.main([*FEW, "--process=coin", "--p=1"])
    told = capsys.readouterr().out
    assert "%" not in told and "nats a token; the belief is the same after every context, so there is none" in told
    assert "1 state |" in told and "floor 0" in told
    assert found["r2_concat"] is None and found["untrained_r2_concat"] is None
    assert read("run/analysis.json")["layers"]["concat"]["r2"] is None and read("run/summary.json")["r2_concat"] is None


def test_the_verdict_has_the_untrained_network_beside_and_the_deals_have_a_seed_of_their_own(capsys):
    first = train_ghmm.main([*FEW, "--max_steps=1", "--lr=0"])
    last = capsys.readouterr().out
    assert f"is no gain over the untrained network's {first['untrained_r2_concat']:.4f}" in last
    assert first["r2_concat"] == close(first["untrained_r2_concat"])
    assert train_ghmm.main(["--analyze=run", "--device=cpu"])["r2_concat"] == close(first["r2_concat"])
    other = train_ghmm.main(["--analyze=run", "--device=cpu", "--deal_seed=1"])
    assert other["r2_concat"] != first["r2_concat"]
    assert abs(other["r2_concat"] - first["r2_concat"]) < 4 * first["r2_concat_spread"]


def test_scaled_matrices_are_said_in_the_first_lines(capsys):
    train_ghmm.main([*FEW, "--process=custom", "--matrices=[[[1.0]],[[3.0]]]"])
    assert capsys.readouterr().out.count("custom: matrices divided by 4, ") == 1


CONFIGS = sorted((ROOT / "config").glob("ghmm_*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_published_config_is_accepted_and_trains(path):
    chosen = {key: value for key, value in runpy.run_path(str(path)).items() if not key.startswith("_")}
    cfg = configure(Config, [str(path)], ALIASES)
    assert len(chosen) > 3 and {key: getattr(cfg, key) for key in chosen} == chosen
    assert all(type(getattr(cfg, key)) is type(value) for key, value in chosen.items())
    found = train_ghmm.main([str(path), *TINY, "--max_steps=2", "--out_dir=run"])
    assert found["steps"] == 2 and all(map(math.isfinite, numbers(found)))
    kept = chosen.keys() & {"process", "model", "alpha", "beta", "components", "x", "a", "d_head", "p1"}
    assert {key: read("run/config.json")[key] for key in kept} == {key: chosen[key] for key in kept}


def test_published_configs_do_not_write_over_each_other():
    folders = [configure(Config, [str(path)], ALIASES).out_dir for path in CONFIGS] + [Config().out_dir]
    assert len(CONFIGS) >= 5 and len({Path(folder) for folder in folders}) == len(folders)


@pytest.mark.parametrize("theirs, ours", [pair.split(" -> ") for pair in """learning_rate=0.1 -> lr=0.1
num_steps=7 -> max_steps=7, num_train_steps=7 -> max_steps=7, sequence_len=7 -> n_ctx=6, hidden_size=24 -> d_model=24
embedding_dim=24 -> d_model=24, embedding_size=24 -> d_model=24, num_layers=7 -> n_layers=7, num_heads=2 -> n_heads=2
process_name=rrxor -> process=rrxor, process_params.x=0.1 -> x=0.1, +process_params.p1=0.2 -> p1=0.2
act_fn=gelu -> act=gelu, normalization_type=RMS -> normalization=RMS, positional_embedding_type=none -> positional=none
log_every=7 -> log_interval=7, validate_every=7 -> eval_interval=7, checkpoint_every=7 -> save_interval=7
mlp_hidden_dim=7 -> d_mlp=7, training.optimizer.learning_rate=0.1 -> lr=0.1""".replace("\n", ", ").split(", ")])
def test_a_name_of_the_source_means_ours(theirs, ours):
    assert configure(Config, [theirs], ALIASES) == configure(Config, [f"--{ours}"], ALIASES) != Config()


def test_a_run_in_the_words_of_the_source_is_the_same_run():
    Path("source.yaml").write_text("process_name: mess3\nprocess_params: {x: 0.1, a: 0.7}\nmodel: {hidden_size: 12}\n"
                                   "loop: {learning_rate: 1e-2, num_steps: 3, sequence_len: 6, log_every: 1}\n")
    theirs = train_ghmm.main([*FEW, "source.yaml", "process_params.a=0.8", "num_layers=2", "sequence_len=5",
                              "hidden_size=12", "num_steps=3"])  # TINY's own flags come after a file
    ours = train_ghmm.main([*FEW, "--x=0.1", "--a=0.8", "--n_layers=2", "--n_ctx=4", "--d_model=12", "--lr=1e-2",
                            "--out_dir=ours"])
    assert theirs["loss_by_position"] == ours["loss_by_position"] and len(ours["loss_by_position"]) == 4
    assert read("run/config.json") | {"out_dir": "ours"} == read("ours/config.json")


@pytest.mark.parametrize("line, words", [
    ("--process=mes3", "'mes3', did you mean 'mess3'"), ("--x=0.7", "x = 0.7"), ("--p=0.5", "'p'"),
    ("--grad_accum=3", "batch_size = 16"), ("--n_heads=3", "n_heads = 3"), ("--positional=rope --d_head=3", "rope"),
    ("--lr=-1", "lr: expected float >= 0"), ("--max_steps=0", "max_steps: expected int >= 1"),
    ("--n_ctx=1.5", "n_ctx"), ("--model=mamba", "'mamba'"),
    ("--process=custom --matrices=../absent.npy", "absent.npy"), ("--process=custom", "needs matrices"),
    ("--process=custom --matrices=../odd.npy", "[2, 3, 4]"), ("--process=nonergodic", "needs components"),
    ("--process=mess3 --matrices=[[[0.5]],[[0.5]]]", "process=custom takes matrices"),
    ("--matrices=[[[0.5]],[[0.5]]] --components=[{'process':'coin'}]", "process=nonergodic takes components"),
    ("--process=custom --matrices=[[[0,1],[-1,0]]]", "no process"), ("--wandb=true", "wandb"),
    ("--process=fanizza --lamb=0.7", "fanizza is no process: after [0] the token 0 has the negative weight"),
    ("--initial_state=1,0", "initial_state"), ("--add_eos --eos_prob=2", "eos_prob = 2"), ("--precision=fp16", "fp16"),
    ("--device=gpu", "device=gpu"), ("--nonsense=1", "nonsense"), ("--max_step=3", "did you mean max_steps"),
    ("--learnig_rate=1", "did you mean learning_rate"), ("config/ghmm_mes3.py", "config/ghmm_mess3.py"),
    ("--out_dir=../file", "file"), ("--out_dir=../file/run", "file"), ("--adam_beta1=1", "beta1"),
    ("--beta2=-0.1", "beta2"), ("--d_head=0", "d_head: expected int >= 1"), ("--d_head=-2", "must be at least 1"),
    (f"--seed={2**70}", "seed"), ("--process=coin --n_ctx=1", "n_ctx"), ("--analyze=..", "last.pt"),
    pytest.param("--device=cuda", "device=cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA"))])
def test_bad_input_is_one_line_that_names_it_and_nothing_is_written(line, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    np.save(tmp_path / "odd.npy", np.ones((2, 3, 4)))
    (tmp_path / "file").write_text("mine")
    before = files(tmp_path)
    assert words in refusal(capsys, train_ghmm.main, *FEW, *line.split())
    assert files(tmp_path) == before


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_costs_no_earlier_run(copied, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(package, package), None)
    before = files(copied)
    assert f"pip install {package}" in refusal(capsys, train_ghmm.main, *WHOLE, "--resume=never", f"--{package}")
    assert files(copied) == before


# save_interval=1, lr=1e300: the step before the loss shows it has already broken the weights
@pytest.mark.parametrize("every, lr", [(10, "1e30"), (1, "1e300")])
def test_a_loss_that_is_not_finite_names_its_step_and_spares_the_last_good_checkpoint(capsys, every, lr):
    settings = (*FEW, "--max_steps=30", f"--save_interval={every}", "--schedule=constant")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "stopping", lambda self, step: step == 10)
        train_ghmm.main([*settings])
    error = refusal(capsys, train_ghmm.main, *settings, f"--lr={lr}", code=1)
    named = re.search(r"the (?:loss was not finite at|weights are not finite after) step (\d+)", error)
    assert named and 10 < int(named[1]) <= 13
    saved = checkpoint.load(Path("run"))
    assert saved["step"] == 10 and all(value.isfinite().all() for value in saved["model"].values())
    assert named[0] in Path("run/train.log").read_text() and not Path("run/summary.json").exists()
    assert train_ghmm.main([*settings])["steps"] == 30


def test_analyze_repeats_the_analysis_of_the_run_and_draws_again(copied, whole, monkeypatch, capsys):
    expected = read(copied / "analysis.json")
    monkeypatch.setattr(train_ghmm, "plot_run", draw_pictures)
    train_ghmm.main(["--analyze=run", "--device=cpu"])
    found = read(copied / "analysis" / "analysis.json")
    assert apart(found, expected) == []
    assert_drawn(copied / "analysis")
    out = capsys.readouterr().out
    assert "\nstep 20: mess3, transformer, 20 steps: loss " in out and f"{expected['r2_concat']:.4f}" in out
    assert read(copied / "summary.json") == read(whole.folder / "summary.json")


def test_analyze_takes_a_checkpoint_file(copied):
    halfway, last = (train_ghmm.main([f"--analyze=run/{name}.pt", "--device=cpu"]) for name in ("step_10", "last"))
    assert halfway["loss"] == close(lines(copied, "eval")[0]["loss"], 0.02) and halfway["loss"] > last["loss"]
    assert halfway["r2_concat"] != last["r2_concat"] == close(read(copied / "summary.json")["r2_concat"])


@pytest.mark.parametrize("setting", ["--max_words=100", "--last_token_only"])
def test_analyze_keeps_the_settings_of_the_run_unless_told_otherwise(setting):
    summary = train_ghmm.main([*FEW, setting])
    found = train_ghmm.main(["--analyze=run", "--device=cpu"])
    assert (found["loss"], found["r2_concat"]) == close((summary["loss"], summary["r2_concat"]))


@pytest.mark.parametrize("left", ["without its metrics", "killed in a line"])
def test_analyze_takes_a_checkpoint_whose_metrics_are_gone_or_torn(copied, left):
    metrics = copied / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 21, "split": "tra')
    if left == "without its metrics":
        metrics.unlink()
    found = train_ghmm.main(["--analyze=run/last.pt", "--device=cpu"])
    assert found["r2_concat"] == close(read(copied / "summary.json")["r2_concat"])


def test_importing_the_scripts_starts_nothing():
    assert {"train_ghmm", "sample", "bench"} <= brought_in_by("train_ghmm", "sample", "bench")
    assert all(hasattr(train_ghmm, name) for name in ("MetricTracker", "make_process", "train"))


def test_samples_are_printed_with_their_true_log_probabilities_and_the_kl_by_position(whole, capsys):
    sample.main([str(whole.folder), "--num_samples=3", "--device=cpu", "--json=samples.json"])
    out, found = capsys.readouterr().out, read("samples.json")
    tokens = [[int(x) for x in line.split()[1:]] for line in out.splitlines() if line.startswith("  token ")]
    printed = [[float(x) for x in line.split()[1:]] for line in out.splitlines() if line.startswith("  process ")]
    sums = [float(x) for x in re.findall(r"log p (-[\d.]+) nats by the process", out)]
    assert out.index("from the model") < out.index("from the process") and [len(row) for row in tokens] == [6] * 6
    true = make_process("mess3", x=0.05, a=0.85).log_prob(torch.tensor(tokens)).tolist()
    for row, total, log_probs in zip(printed, sums, true, strict=True):
        assert [*row, total] == pytest.approx([*log_probs, sum(log_probs)], abs=0.0051)
    assert [entry["tokens"] for entry in found["samples"] + found["process"]] == tokens
    _, _, model, _ = train_ghmm.load_run(whole.folder, "cpu")
    with torch.no_grad():
        believed = model(torch.tensor(tokens[:1]))[0].log_softmax(-1)[0]
    xe = [-float(believed[t, tokens[0][t + 1]]) for t in range(5)]
    assert found["samples"][0]["xe"] == pytest.approx(xe, abs=1e-5)
    kl = next(line.split()[1:] for line in out.splitlines() if line.startswith("  KL "))
    assert [float(x) for x in kl] == pytest.approx(read(whole.folder / "summary.json")["kl_by_position"], rel=0.06)


def test_samples_follow_the_prompt_and_the_predictions_of_the_model_and_of_the_process(whole):
    best = whole.folder / "best.pt"
    found = sample.main([str(best), "--prompt=0,1", "--num_samples=4000", "--length=8", "--device=cpu"])
    _, process, model, _ = train_ghmm.load_run(best, "cpu")
    with torch.no_grad():
        believed = F.softmax(model(torch.tensor([[0, 1]]))[0][0, -1].double(), -1)
    true = process.next_token_probs(process.beliefs([[0, 1]])[0, -1])
    assert (believed - true).abs().max() > 0.05  # 4,000 samples can tell the one from the other
    for name, probs in (("samples", believed), ("process", true)):
        drawn = np.array([entry["tokens"] for entry in found[name]])
        assert drawn.shape == (4_000, 8) and (drawn[:, :2] == [0, 1]).all()
        assert np.bincount(drawn[:, 2], minlength=3) / 4_000 == pytest.approx(probs.numpy(), abs=0.04)
    cold = sample.main([str(best), "--prompt=0", "--temperature=1e-4", "--num_samples=50", "--device=cpu"])
    kinds = [len({tuple(entry["tokens"]) for entry in cold[name]}) for name in ("samples", "process")]
    assert kinds[0] == 1 < kinds[1]


def test_impossible_tokens_of_a_model_are_null_in_the_json():
    train_ghmm.main([*FEW, "--process=zero_one_random"])
    sample.main(["run", "--num_samples=50", "--device=cpu", "--json=samples.json"])
    found = read("samples.json")
    drawn, true = ([x for entry in found[name] for x in entry["log_prob"]] for name in ("samples", "process"))
    assert None in drawn and None not in true


@pytest.mark.parametrize("line, words", [
    ("nowhere", "no run or checkpoint nowhere"), ("{run}/config.json", "config.json"), ("--length=3", "first argument"),
    ("{run} --length=0", "length: expected int >= 1"), ("{run} --temperature=-1", "0 or at least 1e-6"),
    ("{run} --num_samples=0", "num_samples: expected int >= 1"), ("{run} --prompt=a", "prompt"),
    ("{run} --prompt=7", "prompt: '7' is no token id"), ("{run} --seed=-1", "seed: expected int >= 0"),
    ("{run} --temprature=1", "did you mean temperature"), ("{run} --json=absent/samples.json", "absent")])
def test_sample_tells_bad_input_in_one_line(whole, capsys, line, words):
    argv = line.replace("{run}", str(whole.folder)).split()
    assert words in refusal(capsys, sample.main, *argv)
