"""train_apelr.py and sample.py on it: data, batches, runs that stop and go on, ranks, pictures, and what is refused."""

import contextlib
import json
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from commands import Job, brought_in_by, ended, meanwhile, refusal, two_ranks, wait_for
from comparison import unequal

import prepare_data
import sample
import train_apelr
from common import checkpoint
from common.errors import InputError
from common.runtime import Runtime
from configurator import config_dict, configure, differences, from_dict
from measure import compare_baseline, plan_pictures, plans, speed
from measure.transcript import harmless
from sources import equal_size
from sources.corpus import Corpus, read_corpus
from sources.streams import sealed
from train_apelr import ALIASES, APELR, Batches, Config

ROOT = Path(__file__).resolve().parents[1]
V1, V2 = "v1_filtered_mixture", "v2_planner_required"
TINY = ("--num_plan_states=3", "--chunk_size=4", "--seq_len=15", "--token_dim=8", "--d_model=16", "--fusion_dim=12",
        "--n_layers=1", "--batch_size=8", "--lr=1e-2", "--warmup_steps=2", "--log_interval=2", "--eval_batches=1",
        "--final_eval_batches=2", "--preview_tokens=0", "--device=cpu", "--precision=fp32", "--out_dir=run")
RUN = (*TINY, "--max_steps=8", "--eval_interval=4", "--save_interval=3", "--dropout=0.2", "--keep_last=-1",
       "--loss_weights={'usage_balance': 0.1, 'plan_js_div': 0.1}", "--plan_commitment=gumbel_st")
PICTURES = ("draw_loss", "draw_plans")
draw_loss, draw_plans = plans.draw_loss, plans.draw_plans


@pytest.fixture(autouse=True)
def without_pictures(in_a_folder_of_its_own, monkeypatch):
    """Unless it asks, a test draws no pictures."""
    for name in PICTURES:
        monkeypatch.setattr(plans, name, lambda *args, **options: None)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict[str, Path]:
    """Documents of four chunks of four tokens over three plans, with the chunks of either version."""
    folder, found = tmp_path_factory.mktemp("planted"), {}
    for version in (V1, V2):
        found[version] = folder / version
        prepare_data.main(["planted", "--num_plans=3", "--vocab_size=9", "--chunk_size=4", "--document_chunks=4",
                           "--train_documents=300", "--validation_documents=20", f"--version={version}",
                           f"--out_dir={found[version]}"])
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A little text in characters."""
    folder = tmp_path_factory.mktemp("text")
    lines = [f"Once upon a time {name} found {thing} {count} times.<|endoftext|>\n" for count in range(40)
             for name, thing in (("Lily", "a needle"), ("Beep", "the fuel"), ("Fin", "a shore"))]
    (folder / "stories.txt").write_text("".join(lines))
    prepare_data.main(["text", f"--input={folder / 'stories.txt'}", "--tokenizer=char", "--val_fraction=0.2",
                       f"--out_dir={folder / 'data'}"])
    return folder / "data"


@pytest.fixture(scope="module", autouse=True)
def at_work(request, planted, tmp_path_factory):
    """What whole waits for."""
    yield from meanwhile(request, "whole", ROOT / "train_apelr.py", *RUN, f"--data={planted[V2]}",
                         folder=tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole(at_work) -> Path:
    """The RUN by the real script, which nothing disturbed. Tests leave the folder as it is."""
    process, folder = at_work
    done = ended(process)
    others = [line for line in done.stderr.splitlines() if " ..." not in line]  # but what takes long on a busy machine
    assert done.returncode == 0 and others == [], done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def writers(text, tmp_path_factory, one_thread) -> dict[str, Path]:
    """A short run of every version on text."""
    folder, found = tmp_path_factory.mktemp("writers"), {}
    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(plans, name, lambda *args, **options: None)
        for version in (V1, V2, "baseline"):
            found[version] = folder / version
            train_apelr.main([*TINY, f"--data={text}", f"--version={version}", f"--out_dir={found[version]}",
                              "--max_steps=3"])
    return found


def run(data: Path, *settings: str) -> dict:
    return train_apelr.main([*TINY, "--max_steps=4", f"--data={data}", *settings])


def quick(argv: list[str]) -> None:
    """main in another process, without pictures."""
    for name in PICTURES:
        setattr(plans, name, lambda *args, **options: None)
    speed.RATE_SECONDS = 0
    train_apelr.main(argv)


def refused(capsys, *argv: str, code: int = 2, main=train_apelr.main) -> str:
    return refusal(capsys, main, *argv, code=code)


def read(path: Path | str):
    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=pytest.fail)


def records(folder: Path | str) -> list[dict]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    clock = ("time_s", "tokens_per_s", "mfu")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def assert_as_if_uninterrupted(folder: Path, other: Path) -> None:
    ours, theirs = (checkpoint.load(path) for path in (folder, other))
    keys = ("step", "best", "model", "optimizer", "ranks", "extra")
    assert not unequal({k: ours[k] for k in keys}, {k: theirs[k] for k in keys})
    evals = [[r for r in records(path) if r["split"] == "eval"] for path in (folder, other)]
    assert evals[0] == evals[1]


# ---------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------
def runtime(rank: int = 0, world_size: int = 1) -> Runtime:
    rt = Runtime(SimpleNamespace(seed=7, device="cpu", precision="fp32", compile="false"))
    rt.rank, rt.world_size = rank, world_size
    return rt


def test_a_batch_is_a_pure_function_of_seed_and_step_and_ranks_share_it(text):
    cfg, corpus = Config(seq_len=15, chunk_size=4), read_corpus(str(text))
    batches = Batches(runtime(), corpus, cfg, 8)
    assert torch.equal(batches(3), Batches(runtime(), corpus, cfg, 8)(3)) and not torch.equal(batches(3), batches(4))
    halves = [Batches(runtime(rank, 2), corpus, cfg, 8)(3) for rank in range(2)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), batches(3))
    stream = "".join(map(chr, corpus.train))
    assert all("".join(map(chr, row)) in stream for row in batches(5).tolist())


def test_windows_of_planted_documents_begin_with_them_and_validation_windows_do_not_overlap(planted, text):
    cfg, corpus = Config(seq_len=15, chunk_size=4), read_corpus(str(planted[V2]))
    assert (Batches(runtime(), corpus, cfg, 8)(0)[:, 0] == corpus.first_id).all()
    assert np.array_equal(corpus.spread(99, cfg.seq_len, cfg.version), np.arange(20) * 16)
    starts = read_corpus(str(text)).spread(1000, cfg.seq_len, cfg.version)
    assert (np.diff(starts) == 15).all() and starts[-1] + 16 <= len(read_corpus(str(text)).val)
    few = read_corpus(str(text)).spread(5, cfg.seq_len, cfg.version)
    assert len(few) == 5 and few[0] == 0 and few[-1] == starts[-1] and set(few) <= set(starts)


def test_evaluation_agrees_with_the_losses_and_with_the_planted_truth(planted):
    cfg, corpus = configure(Config, [*TINY, f"--data={planted[V2]}"]), read_corpus(str(planted[V2]))
    torch.manual_seed(0)
    model, starts = train_apelr.build_model(cfg, corpus.vocab_size), corpus.spread(99, cfg.seq_len, cfg.version)
    found = train_apelr.evaluate(model, corpus, starts, runtime(), cfg, batch=7)
    tokens = corpus.windows("val", starts, 15)
    model.eval()

    def nll(*mode) -> float:
        return float(model.losses(tokens[:, :-1], tokens[:, 1:], *mode, terms=())["nll"].detach())

    forced = [nll("forced_state", k) for k in range(3)]
    assert found["val_nll"] == pytest.approx(nll(), rel=1e-5) and found["forced_nll"] == pytest.approx(forced, rel=1e-5)
    assert found["planner_mask_delta_loss"] == pytest.approx(nll("uniform_mask") - nll(), abs=3e-5)
    assert found["plan_gain"] == pytest.approx(min(forced) - nll(), abs=3e-5)
    assert found["oracle_nll"] == pytest.approx(read(planted[V2] / "meta.json")["oracle_nll"], rel=1e-5)
    beliefs = model.filter(*(lambda h: (model.look_up(h, tokens[:, 1:, None])[..., 0], model.contexts(h)))(
        model.read(tokens[:, :-1])[0]))
    true = np.load(planted[V2] / "val_plans.npy")
    nmi = plans.normalised_mutual_information(beliefs.end.argmax(2).numpy().ravel(), true.ravel())
    assert found["plan_nmi"] == pytest.approx(nmi)
    P = model.planner_transition_logits.detach().softmax(1)
    assert found["transition_mean_diagonal"] == pytest.approx(float(P.diagonal().mean()), rel=1e-5)
    assert found["transition_row_entropy"] == pytest.approx(float(-(P * P.log()).sum(1).mean()), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [V1, V2])
def test_a_planted_plan_is_found_and_the_loss_comes_near_its_optimum(version, planted):
    """Small, but the real thing: within 3% of the exact optimum, plans named almost as the exact filter would."""
    folder = Path("clear")
    prepare_data.main(["planted", "--num_plans=3", "--vocab_size=12", "--chunk_size=8", "--document_chunks=4",
                       "--num_states=1", "--plan_sharpness=2.5", "--train_documents=4000", "--validation_documents=200",
                       f"--version={version}", f"--out_dir={folder}"])
    length = read(folder / "meta.json")["document_length"] - 1
    result = run(folder, f"--version={version}", "--chunk_size=8", f"--seq_len={length}", "--d_model=24",
                 "--batch_size=64", "--max_steps=250", "--eval_interval=250", "--final_eval_batches=64", "--lr=2e-2",
                 "--loss_weights={'usage_balance': 0.1}", "--usage_balance_weight=0.1")
    truth = read(folder / "meta.json")
    assert result["oracle_nll"] == pytest.approx(truth["oracle_nll"], rel=1e-5)
    assert 0.999 < result["val_nll"] / result["oracle_nll"] < 1.03
    assert result["plan_nmi"] > 0.9 and result["plan_gain"] > 0.1


def test_a_run_leaves_the_promised_files_and_pictures(whole, planted):
    summary, metrics, planner = (read(whole / f"{n}.json") for n in ("summary", "metrics", "planner_eval"))
    for key in ("val_nll", "val_ppl", "planner_mask_delta_loss", "plan_gain", "oracle_nll", "plan_nmi", "seconds",
                "tokens_per_second", "config_hash", "torch", "device", "parameters"):
        assert key in summary
    assert metrics["val_nll"] == planner["val_nll"] == summary["val_nll"]
    for key in ("state_persistence", "expert_utilization", "forced_state_divergence", "transition_mean_diagonal"):
        assert key in metrics
    assert set(planner["top_tokens"]) == {"0", "1", "2"} and len(planner["typical_tokens"]["1"]) == 10
    assert {p.name for p in (whole / "plots").iterdir()} == {"loss.png", "plan_usage.png", "transition_matrix.png",
                                                              "belief.png"}
    assert "plan  share   alone  typical tokens" in (whole / "plans.txt").read_text()
    for picture in (whole / "plots").iterdir():
        image = matplotlib.image.imread(picture)
        assert min(image.shape[:2]) > 150 and image[..., :3].std() > 0.01
    for name in ("config.json", "metrics.jsonl", "train.log", "last.pt", "best.pt", "train_apelr.py", "step_6.pt"):
        assert (whole / name).exists()
    assert "done: loss" in (whole / "train.log").read_text()
    training = [r for r in records(whole) if r["split"] == "train"]
    assert [r["step"] for r in training] == [2, 4, 6, 8]
    assert {"loss", "nll", "usage_balance", "plan_js_div", "lr", "grad_norm"} <= training[0].keys()


def test_the_text_keeps_its_tokenizer_and_a_sample_is_shown(text, capsys):
    run(text, "--preview_tokens=5", "--preview_prompt=Once", "--eval_interval=2")
    written = read("run/planner_eval.json")["written"]
    assert [entry["plan"] for entry in written] == [None, 0, 1, 2] and all(entry["nll"] > 0 for entry in written)
    assert all(any(word in line for line in Path("run/plans.txt").read_text().splitlines())
               for entry in written for word in entry["text"].split())
    assert (Path("run/tokenizer.json")).read_bytes() == (text / "tokenizer.json").read_bytes()
    assert len(re.findall(r"^  it writes: 'Once", capsys.readouterr().out, re.M)) == 2
    assert "bits_per_byte" in read("run/metrics.json")


def test_a_preview_does_not_change_the_run(text):
    run(text, "--dropout=0.3", "--eval_interval=2", "--preview_tokens=6", "--out_dir=shown")
    run(text, "--dropout=0.3", "--eval_interval=2", "--out_dir=silent")
    assert not unequal(checkpoint.load(Path("shown"))["model"], checkpoint.load(Path("silent"))["model"])


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_run_stopped_and_started_again_ends_with_the_same_bits(step, planted, whole):
    settings = [*RUN, f"--data={planted[V2]}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "stopping", lambda self, now: now == step)
        assert train_apelr.main(settings) == {"stopped_at": step}
    assert not Path("run/summary.json").exists() and checkpoint.load(Path("run"))["step"] == step
    assert train_apelr.main(settings)["steps"] == 8
    assert_as_if_uninterrupted(Path("run"), whole)


def test_a_killed_run_started_again_ends_with_the_same_bits(planted):
    settings = [*RUN, f"--data={planted[V2]}", "--max_steps=80", "--log_interval=1", "--keep_last=0"]
    train_apelr.main([*settings, "--out_dir=alone"])
    job, metrics = Job("train_apelr", *settings), Path("run/metrics.jsonl")
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 20, job, "line 20 of metrics.jsonl")
    job.kill()
    assert job.wait() == -signal.SIGKILL and 0 < checkpoint.load(Path("run"))["step"] < 80
    assert train_apelr.main(settings)["steps"] == 80
    assert_as_if_uninterrupted(Path("run"), Path("alone"))


@pytest.mark.parametrize("version", [V1, V2])
def test_two_ranks_train_like_one(version, planted):
    """Terms that are means over tokens average over ranks exactly; the gradients are synchronised."""
    weights = "{'boundary_entropy': 0.1, 'plan_js_div': 0.05}"
    settings = [*TINY, "--max_steps=6", f"--data={planted[version]}", f"--version={version}", "--grad_accum=2",
                f"--loss_weights={weights}", "--aux_token_fraction=1", "--plan_mi_weight=0.1", "--chunk_bow_weight=0.1",
                "--chunk_post_kl_weight=0.1", "--entropy_reg_weight=0.1"]
    told = two_ranks("test_train_apelr", *settings, "--out_dir=two", function="quick")
    assert told.count("done: loss") == 1
    told = two_ranks("test_train_apelr", "--analyze=two", "--device=cpu", function="quick")
    assert told.count("step 6: loss") == 1
    alone, two = train_apelr.main(settings), read("two/summary.json")
    for key in ("val_nll", "planner_mask_delta_loss", "plan_gain", "oracle_nll", "plan_nmi"):
        assert two[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-4), key
    ours, theirs = (checkpoint.load(Path(folder))["model"] for folder in ("run", "two"))
    for name, weight in ours.items():  # of a gradient that is next to nothing Adam makes a whole step
        distance = (theirs[name] - weight).abs()
        assert distance.mean() < 2e-4 and distance.max() <= 2 * 6 * 1e-2, name


@pytest.mark.parametrize("settings", [
    (f"--version={V1}", "--usage_balance_weight=0.1", "--chunk_bow_weight=0.1", "--chunk_bow_warmup_steps=3"),
    (f"--version={V2}", "--experts=bias"), (f"--version={V2}", "--backbone=transformer", "--dropout=0.1"),
    ("--experts=lowrank", "--expert_rank=3", "--precision=bf16", "--loss_weights={'plan_js_div': 0.1}"),
    ("--version=baseline",), ("--version=baseline", "--backbone=transformer"), ("--num_plan_states=1",),
    ("--compat=source",), ("--precision=bf16",), ("--num_plan_states=1", f"--version={V1}"), ("--chunk_size=1",),
    ("--batch_size=auto", "--cpu_batch_size=6", "--grad_accum=2"), ("--schedule=constant",),
    ("--plan_commitment=gumbel_st", "--commitment_warmup_steps=1", "--commitment_ramp_steps=2",
     "--plan_temperature_start=2", "--plan_temperature_end=0.5"),
    ("--loss_weights={'rep_unlikelihood': 0.1, 'rep_window': 4, 'future_contrastive': 0.1}",),
])
def test_every_kind_of_model_trains(settings, text):
    result = run(text, "--max_steps=30", "--eval_interval=30", *settings)
    losses = [r["nll"] for r in records("run") if r["split"] == "train"]
    assert np.isfinite(result["val_nll"]) and losses[-1] < losses[0]


def test_a_run_that_is_finished_is_evaluated_again_or_refused(whole, planted, capsys):
    shutil.copytree(whole, "run")
    assert train_apelr.main([*RUN, f"--data={planted[V2]}"])["steps"] == 8
    assert "lr: 0.01 -> 0.02" in refused(capsys, *RUN, f"--data={planted[V2]}", "--lr=2e-2")


def test_analyze_repeats_the_numbers(whole, planted):
    shutil.copytree(whole, "run")
    found = train_apelr.main(["--analyze=run", "--device=cpu"])
    assert found["val_nll"] == pytest.approx(read(whole / "summary.json")["val_nll"], rel=1e-5)
    assert read("run/analysis/planner_eval.json")["val_nll"] == found["val_nll"]


def test_weights_to_start_from_come_from_ours_and_from_the_source(text, writers):
    best = checkpoint.load(writers[V2] / "best.pt")
    run(text, f"--init_from={writers[V2]}", "--lr=0", "--weight_decay=0")
    assert not unequal(checkpoint.load(Path("run"))["model"], best["model"])
    state = source_checkpoint(writers[V2])
    torch.save(state, "source.pt")
    for option in ("--init_from=source.pt", "--resume=source.pt"):
        run(text, option, "--lr=0", "--weight_decay=0", "--compat=source", "--max_steps=9", f"--out_dir={option[2:6]}")
        assert not unequal(checkpoint.load(Path(option[2:6]))["model"], best["model"])


def test_a_rank_comes_with_the_weights_that_have_it(text):
    run(text, "--experts=lowrank", "--expert_rank=3", "--max_steps=1")
    run(text, "--init_from=run", "--lr=0", "--weight_decay=0", "--max_steps=1", "--out_dir=next")
    config = read("next/config.json")
    assert (config["experts"], config["expert_rank"]) == ("lowrank", 3)
    first, second = (checkpoint.load(Path(folder))["model"] for folder in ("run", "next"))
    assert not unequal(second, first)


def source_checkpoint(folder: Path) -> dict:
    """What the source would have saved of a v2 run."""
    cfg, model, step, extra = train_apelr.load_run(folder, "cpu")
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("experts.")}
    for part in ("weight", "bias"):
        weights |= {f"expert_heads.{k}.{part}": v for k, v in enumerate(getattr(model.experts, part).detach())}
    names = {"num_plan_states": "num_plan_states", "chunk_size": "chunk_size", "token_dim": "token_dim",
             "hidden_dim": "d_model", "num_layers": "n_layers", "lookahead_horizon": "lookahead_horizon"}
    settings = {theirs: getattr(cfg, ours) for theirs, ours in names.items()}
    settings |= {"vocab_size": extra["vocab_size"], "dropout": 0.1}
    return {"model_state_dict": weights, "model_version": V2, "global_step": 7, "tokenizer_path": "tokenizer.json",
            "model_config": settings}


ON_META = {
    "v1": {"version": V1, "entropy_reg_weight": 0.1, "usage_balance_weight": 0.1, "chunk_bow_weight": 0.1,
           "plan_mi_weight": 0.1, "chunk_post_kl_weight": 0.1},
    "v2": {"plan_commitment": "gumbel_st", "loss_weights": dict.fromkeys(train_apelr.V2_TERMS, 0.1), "rep_window": 3},
    "v2-bias": {"experts": "bias"}, "v2-lowrank": {"experts": "lowrank", "loss_weights": {"plan_js_div": 0.1}},
    "v2-source": {"compat": "source", "planner_temperature": 0.8},
    "transformer": {"backbone": "transformer"}, "baseline": {"version": "baseline"},
    "transformer_lm": {"version": "transformer_lm", "token_dim": 128},
}


@pytest.mark.parametrize("settings", ON_META.values(), ids=ON_META)
def test_a_training_step_stays_on_its_device(settings, monkeypatch):
    """On meta no tensor has values: one left on the CPU, or a number read from the device, fails here."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # knows no meta device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    cfg = Config(**{"vocab_size": 11, "num_plan_states": 3, "chunk_size": 4, "seq_len": 14, "dropout": 0.1,
                    "grad_accum": 2, **settings})
    model = train_apelr.build_model(cfg).to("meta").train()
    tokens = torch.zeros(8, 15, dtype=torch.int64, device="meta")
    values = train_apelr.train_step(model, tokens, 5, runtime(), cfg)
    assert values["loss"].device.type == "meta" and all(value.ndim == 0 for value in values.values())
    assert set(cfg.weights()) < values.keys()
    assert all(p.grad.device.type == "meta" for p in model.parameters() if p.grad is not None)


def test_the_settings_of_older_runs_are_understood():
    """Names that have changed since, and a rate at the end that was told as a share of the first one."""
    old = {"hidden_dim": 24, "num_layers": 3, "num_heads": 2, "grad_accum_steps": 4, "lr": 2e-3, "min_lr_ratio": 0.5,
           "lr_schedule": "constant", "adam_beta1": 0.8, "adam_beta2": 0.9}
    cfg = from_dict(Config, old, "old", ALIASES)
    assert (cfg.d_model, cfg.n_layers, cfg.n_heads, cfg.grad_accum, cfg.schedule) == (24, 3, 2, 4, "constant")
    assert (cfg.min_lr, cfg.beta1, cfg.beta2) == (1e-3, 0.8, 0.9)
    assert Config(lr=3e-3).min_lr == pytest.approx(3e-4) and Config(lr=3e-3, min_lr=0.0).min_lr == 0


def test_idle_plans_are_warned_of(capsys):
    told = []
    plans.warn_of_idle_plans({"plan_gain": 0.001, "forced_state_divergence_all_pairs": 0.5}, told.append)
    plans.warn_of_idle_plans({"plan_gain": 0.1, "forced_state_divergence_all_pairs": 0.5}, told.append)
    plans.warn_of_idle_plans({"plan_gain": 0.001, "forced_state_divergence_all_pairs": 0.01}, told.append)
    plans.warn_of_idle_plans({"plan_gain": None, "forced_state_divergence_all_pairs": None}, told.append)
    assert len(told) == 1 and "one of them does as well alone" in told[0] and "lower" not in told[0]
    for term, advice in (("plan_js_div", "lower loss_weights.plan_js_div"), ("plan_mi", "lower plan_mi_weight")):
        plans.warn_of_idle_plans({"plan_gain": -1.0, "forced_state_divergence_all_pairs": 0.5}, told.append, {term})
        assert told[-1].endswith(advice)


def test_the_whole_default_run_needs_no_download_and_no_data(monkeypatch):
    """But shorter. The offline text is made on the way."""
    made, prepare = [], train_apelr.prepare_text

    def text(**settings):
        made.append(settings)
        return prepare(**{**settings, "input": "corpus.txt", "val_fraction": 0.3, "vocab_size": 270})

    Path("corpus.txt").write_text("".join(f"some words {i} of text<|endoftext|>\n" for i in range(200)))
    monkeypatch.setattr(train_apelr, "prepare_text", text)
    result = train_apelr.main(["--max_steps=2", "--final_eval_batches=1", "--d_model=8", "--token_dim=8",
                               "--device=cpu"])
    assert made[0]["out_dir"] == "data/text" and Path("out/apelr/summary.json").exists()
    assert np.isfinite(result["val_nll"])


# ---------------------------------------------------------------------------------------------------------------
# Weights, figures that are not defined, and what a run says of its plan
# ---------------------------------------------------------------------------------------------------------------
DEMO = {"usage_balance": 0.02, "future_contrastive": 0.02}


@pytest.mark.parametrize("argv, weights", [
    ([], DEMO), (["--usage_balance_weight=0.5"], DEMO | {"usage_balance": 0.5}),
    (["--usage_balance_weight=0"], {"future_contrastive": 0.02}),
    (["--entropy_reg_weight=0.5"], DEMO | {"boundary_entropy": 0.5}),
    (["--loss_weights={'plan_js_div': 0.1}"], {"plan_js_div": 0.1}), (["--loss_weights={}"], {}),
    (["--loss_weights={'plan_js_div': 0.1}", "--usage_balance_weight=0.3"], {"plan_js_div": 0.1, "usage_balance": 0.3}),
    (["--loss_weights={'usage_balance': 0.1}", "--usage_balance_weight=0.3"], {"usage_balance": 0.1}),
    ([f"--version={V1}", "--usage_balance_weight=0.5"], {"usage_kl": 0.5}), ([f"--version={V1}"], {}),
    ([f"--version={V1}", "--entropy_reg_weight=0.1", "--chunk_bow_weight=0.2", "--plan_mi_weight=0.3",
      "--chunk_post_kl_weight=0.4"], {"belief_entropy": 0.1, "chunk_bow": 0.2, "plan_mi": 0.3, "chunk_post_kl": 0.4}),
    (["--version=baseline", "--usage_balance_weight=0.5"], {}),
])
def test_a_weight_that_is_given_counts(argv, weights):
    cfg = configure(Config, argv)
    assert cfg.weights() == weights
    assert from_dict(Config, config_dict(cfg), "saved").weights() == weights


@pytest.mark.parametrize("argv, unused", [
    ([], ""), (["--usage_balance_weight=0.5"], ""), (["--loss_weights={'usage_balance': 0.1}"], ""),
    (["--loss_weights={'usage_balance': 0.1}", "--usage_balance_weight=0.3"], "usage_balance_weight"),
    (["--loss_weights={'boundary_entropy': 0}", "--entropy_reg_weight=0.3"], "entropy_reg_weight"),
    (["--chunk_bow_weight=0.1", "--plan_mi_weight=0.1"], "chunk_bow_weight, plan_mi_weight"),
    ([f"--version={V1}", "--chunk_bow_weight=0.1"], ""),
    ([f"--version={V1}", "--loss_weights={'usage_balance': 0.1}"], "loss_weights"),
    (["--version=baseline", "--entropy_reg_weight=0.1"], "entropy_reg_weight, num_plan_states, chunk_size"),
    (["--expert_rank=8", "--fusion_dim=64", "--n_heads=2"], "n_heads, expert_rank, fusion_dim"),
    (["--experts=lowrank", "--expert_rank=8", "--backbone=transformer", "--n_heads=2", "--d_ff=8"], ""),
    ([f"--version={V1}", "--fusion_dim=8", "--expert_rank=8", "--chunk_bow_warmup_steps=5"],
     "expert_rank, chunk_bow_warmup_steps"),
    (["--lookahead_horizon=3", "--schedule=constant", "--min_lr=0.1", "--batch_size_cap=64"],
     "lookahead_horizon, batch_size_cap, min_lr"),
    (["--lookahead_horizon=3", "--lookahead_feedback_scale=0.5", "--min_lr=0.1", "--schedule=constant", "--lr=1"], ""),
    (["--commitment_ramp_steps=5", "--rep_window=3", "--aux_token_fraction=0.5"],
     "rep_window, aux_token_fraction, commitment_ramp_steps"),
    (["--commitment_ramp_steps=5", "--plan_commitment=gumbel_st", "--rep_window=3", "--aux_token_fraction=0.5",
      "--loss_weights={'rep_unlikelihood': 0.1, 'plan_js_div': 0.1}", "--future_horizon_chunks=3"],
     "future_horizon_chunks"),
    (["--version=baseline", "--boundary=source", "--num_plan_states=3"], "num_plan_states, chunk_size, boundary"),
    (["--expert_rank=8", "--compat=source"], ""), (["--version=baseline", "--out_dir=run/baseline"], ""),
])
def test_a_setting_without_effect_is_named_when_a_run_starts(argv, unused, text):
    small = [word for word in TINY if "fusion_dim" not in word]
    cfg = configure(Config, [*small, f"--data={text}", *argv])
    corpus = read_corpus(str(text))
    told = plans.describe(train_apelr.build_model(cfg, corpus.vocab_size), corpus, 8, train_apelr.DEMO_WEIGHTS)
    note = f"  note: without effect on this run ({cfg.version}, {cfg.backbone}): {unused}"
    assert told.splitlines()[2:] == [note] * bool(unused)


def test_the_weights_of_an_older_run_stay_what_they_were():
    """It saved loss_weights whole, and 0 for a weight that was not given."""
    old = config_dict(Config()) | {"usage_balance_weight": 0.0, "loss_weights": DEMO}
    del old["compare_baseline"]
    assert from_dict(Config, old, "old").weights() == DEMO
    assert differences(old, Config()) == []


JUDGED = {"val_nll": 2.5, "val_ppl": 12.18, "plan_gain": 0.2, "planner_mask_delta_loss": 0.1, "parameters": 1000}


def verdict_in(told: str) -> str:
    """The verdict of the last run that said one."""
    return [line for line in told.splitlines() if line.startswith("done: ")][-1]


USED = "used: the loss rises by 0.1000 without the belief (planner_mask_delta_loss)"


@pytest.mark.parametrize("changes, words", [
    ({}, f"The plan is {USED} and by 0.2000 with the best plan alone (plan_gain)."),
    ({"plan_gain": -0.004}, "The plan is not used: one plan alone does as well (plan_gain -0.0040)."),
    ({"planner_mask_delta_loss": 0.0001},
     "The plan is not used: an even mixture of the plans does as well (planner_mask_delta_loss +0.0001)."),
    ({"plan_gain": 0.0099, "planner_mask_delta_loss": -0.3},
     "The plan is not used: an even mixture of the plans does better (planner_mask_delta_loss -0.3000) and one plan "
     "alone does as well (plan_gain +0.0099)."),
    ({"plan_gain": None}, f"The plan is {USED}."),
    ({"planner_mask_delta_loss": float("nan"), "plan_gain": -1.0},
     "The plan is not used: one plan alone does better (plan_gain -1.0000)."),
    ({"baseline_nll": 2.6, "baseline_ppl": 13.46, "baseline_parameters": 1010},
     "It beats the baseline of equal size: baseline_nll 2.6000 (+0.1000), perplexity 13.46, 1,010 parameters "
     "(here 1,000)."),
    ({"baseline_nll": 2.511}, "It beats the baseline of equal size: baseline_nll 2.5110 (+0.0110)."),
    ({"baseline_nll": 2.509}, "It is hardly better than the baseline of equal size: baseline_nll 2.5090 (+0.0090)."),
    ({"baseline_nll": 2.5}, "It DOES NOT BEAT the baseline of equal size: baseline_nll 2.5000 (+0.0000)."),
    ({"baseline_nll": 2.4}, "It DOES NOT BEAT the baseline of equal size: baseline_nll 2.4000 (-0.1000)."),
    ({"oracle_nll": 2.0, "excess_over_oracle": 0.25, "plan_nmi": 0.5},
     f" is 25.00% above the exact optimum 2.0000. The plan is found in part (plan_nmi 0.500 of 1) and {USED}"),
    ({"oracle_nll": 2.6, "excess_over_oracle": -0.04}, " is 4.00% BELOW the exact optimum 2.6000. "),
    ({"plan_nmi": 0.95}, "The plan is found (plan_nmi 0.950 of 1) and used"),
    ({"plan_nmi": 0.2, "plan_gain": 0.0}, "The plan is NOT found (plan_nmi 0.200 of 1) and not used"),
    ({"oracle_nll": 0.0, "excess_over_oracle": None}, ", exact optimum 0.0000. The plan is used"),
])
def test_the_verdict_says_whether_the_plan_is_found_and_used_and_beats_the_baseline(changes, words):
    line = plans.verdict(JUDGED | changes)
    assert line.startswith("loss 2.5000 nats a token (perplexity 12.18)") and words in f"{line}."


@pytest.mark.parametrize("undefined", [None, float("nan"), float("inf")])
def test_the_verdict_leaves_out_what_is_not_defined(undefined):
    names = ("val_ppl", "oracle_nll", "excess_over_oracle", "plan_nmi", "plan_gain", "planner_mask_delta_loss",
             "baseline_nll", "baseline_ppl")
    for metrics in (JUDGED | dict.fromkeys(names, undefined), {"val_nll": 2.5}):
        assert plans.verdict(metrics) == "loss 2.5000 nats a token"


def test_a_run_of_unused_plans_says_so_whatever_its_divergence(text, capsys):
    """After one step of no size the plans are what they started as: different, and of no use."""
    run(text, "--max_steps=1", "--lr=0")
    told = capsys.readouterr().out
    gain = read("run/summary.json")["plan_gain"]
    assert gain < 0.01 and "The plan is not used" in told and f"(plan_gain {gain:+.4f})" in told


@pytest.mark.parametrize("version", [V1, V2])
def test_what_one_plan_does_not_have_is_null(version, planted, capsys):
    run(planted[version], f"--version={version}", "--num_plan_states=1")
    verdict = verdict_in(capsys.readouterr().out)
    assert "plan" not in verdict and "nan" not in verdict
    summary, planner = read("run/summary.json"), read("run/planner_eval.json")
    for name in ("planner_mask_delta_loss", "plan_gain", "plan_nmi", "state_persistence", "expert_utilization",
                 "transition_mean_diagonal", "transition_row_entropy", "forced_state_divergence",
                 "forced_state_divergence_all_pairs"):
        assert summary[name] is None and planner[name] is None, name
    assert summary["forced_nll"] == pytest.approx([summary["val_nll"]]) and planner["typical_tokens"] is None
    assert set(planner["top_tokens"]) == {"0"}


def test_pictures_of_one_plan_and_of_undefined_figures_are_drawn(planted):
    cfg = configure(Config, [*TINY, f"--data={planted[V2]}", "--num_plan_states=1"])
    corpus = read_corpus(str(planted[V2]))
    model = train_apelr.build_model(cfg, corpus.vocab_size)
    Path("run").mkdir()
    lines = [{"step": 1, "split": "eval", "val_nll": 2.0, "oracle_nll": None, "usage": [1.0]},
             {"step": 2, "split": "eval", "val_nll": None, "usage": [1.0]}, {"step": 2, "split": "train", "nll": 2.0}]
    Path("run/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    draw_loss(Path("run"), "title")
    draw_plans(Path("run"), model, corpus, corpus.spread(2, 15, V2), [1.0])
    assert len(list(Path("run/plots").iterdir())) == 4


def test_plans_that_change_elsewhere_than_the_planted_ones_are_not_held_against_them(planted, capsys):
    """Chunks of 2 and 8 tokens on plans of 4: the same chunk is not the same text."""
    for chunk_size in (2, 8):
        result = run(planted[V2], f"--chunk_size={chunk_size}", f"--out_dir={chunk_size}")
        told = capsys.readouterr().out
        assert result.get("plan_nmi") is None and "nmi" not in verdict_in(told)
        assert f"chunk_size = {chunk_size}, and the planted plans change every 4 tokens" in told
    assert run(planted[V2])["plan_nmi"] is not None and "planted plans change" not in capsys.readouterr().out


def test_one_planted_plan_cannot_be_found(capsys):
    """Neither by the oracle, nor by a model of three plans."""
    meta = prepare_data.planted(num_plans=1, vocab_size=9, chunk_size=4, document_chunks=4, train_documents=30,
                                validation_documents=3, out_dir="one")
    assert meta["oracle_nmi"] is None and read("one/meta.json")["oracle_nmi"] is None
    assert "NMI" not in capsys.readouterr().out
    assert run(Path("one"))["plan_nmi"] is None and read("run/summary.json")["plan_nmi"] is None


def test_figures_beyond_what_a_number_holds_are_none():
    assert plans.perplexity(1.0) == pytest.approx(np.e) and plans.perplexity(710.0) is None
    nll, forced = 1.0, torch.tensor([[1.5, 2.0], [1.7, 1.0]])
    worth = plans.plan_worth(nll, torch.tensor([1.2, 1.4]), forced)
    assert worth["forced_nll"] == pytest.approx([1.6, 1.5])
    assert (worth["planner_mask_delta_loss"], worth["plan_gain"]) == pytest.approx((0.3, 0.5))
    corpus = Corpus(np.zeros(4), np.zeros(4), 2, document_length=2, oracle_nll=np.zeros((2, 1)))
    assert corpus.yardsticks(0.5, np.array([0]), 1) == {"oracle_nll": 0.0, "excess_over_oracle": None}


# ---------------------------------------------------------------------------------------------------------------
# A baseline of equal size
# ---------------------------------------------------------------------------------------------------------------
BESIDE = ("--compare_baseline", "--max_steps=6", "--eval_interval=3", "--dropout=0.2")


def test_a_baseline_of_equal_size_is_trained_on_the_same_batches(text, monkeypatch, capsys):
    batches, step_of_training = {}, train_apelr.train_step

    def seen(model, tokens, step, rt, cfg):
        batches.setdefault(cfg.version, []).append((step, tokens.clone()))
        return step_of_training(model, tokens, step, rt, cfg)

    monkeypatch.setattr(train_apelr, "train_step", seen)
    result = run(text, *BESIDE)
    told = capsys.readouterr().out
    summary, baseline = read("run/summary.json"), read("run/baseline/summary.json")
    assert [step for step, _ in batches[V2]] == [step for step, _ in batches["baseline"]] == list(range(6))
    for (_, ours), (_, theirs) in zip(batches[V2], batches["baseline"], strict=True):
        assert torch.equal(ours, theirs)
    assert summary["baseline_nll"] == baseline["val_nll"] == result["baseline_nll"] != summary["val_nll"]
    assert summary["baseline_ppl"] == pytest.approx(np.exp(baseline["val_nll"]))
    assert summary["baseline_parameters"] == baseline["parameters"] and summary["baseline_steps"] == 6
    assert abs(summary["baseline_parameters"] / summary["parameters"] - 1) < 0.03
    settings, theirs = read("run/config.json"), read("run/baseline/config.json")
    changed = {name for name in settings if settings[name] != theirs[name]}
    assert changed == {"version", "d_model", "out_dir", "compare_baseline"}
    assert theirs["d_model"] == summary["baseline_d_model"] and theirs["version"] == "baseline"
    assert plans.judge_baseline(summary)[0] in verdict_in(told)
    assert f"the planner of {summary['parameters']:,} -> run/baseline" in told


def test_the_baseline_beside_a_planner_is_the_run_that_its_settings_make(text):
    """And the planner is that which trains without a baseline."""
    run(text, *BESIDE)
    run(text, *BESIDE, "--no-compare_baseline", "--out_dir=alone")
    assert not unequal(checkpoint.load(Path("run"))["model"], checkpoint.load(Path("alone"))["model"])
    width = read("run/summary.json")["baseline_d_model"]
    run(text, *BESIDE, "--no-compare_baseline", "--version=baseline", f"--d_model={width}", "--out_dir=plain")
    assert not unequal(checkpoint.load(Path("run/baseline"))["model"], checkpoint.load(Path("plain"))["model"])


@pytest.mark.parametrize("stopped", ["baseline", V2])
def test_a_comparison_that_is_stopped_goes_on_with_the_same_bits(stopped, text):
    run(text, *BESIDE, "--out_dir=alone")
    versions, prepare = [], train_apelr.rehearse

    def rehearse(model, corpus, rt, cfg):
        versions.append(cfg.version)
        prepare(model, corpus, rt, cfg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_apelr, "rehearse", rehearse)
        patch.setattr(Runtime, "stopping", lambda self, now: now == 2 and versions[1:][-1:] == [stopped])
        assert run(text, *BESIDE)["stopped_at"] in ((0, 2) if stopped == "baseline" else (2,))
    assert not Path("run/summary.json").exists()
    assert Path("run/last.pt").exists() is (stopped == V2)
    again = run(text, *BESIDE)
    assert again["steps"] == again["baseline_steps"] == 6
    for folder in ("", "baseline"):
        ours, theirs = (checkpoint.load(Path(run_, folder))["model"] for run_ in ("run", "alone"))
        assert not unequal(ours, theirs)
    assert read("run/summary.json")["baseline_nll"] == read("alone/summary.json")["baseline_nll"]


def test_a_signal_while_the_baseline_is_measured_stops_what_comes_after_it(text, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "stopping", lambda self, now: now == 0 and Path("run/baseline/summary.json").exists())
        assert run(text, *BESIDE) == {"stopped_at": 0}
    assert "stopped by a signal before the planner" in capsys.readouterr().out
    assert not Path("run/last.pt").exists() and run(text, *BESIDE)["baseline_steps"] == 6


def test_a_signal_while_it_is_rehearsed_stops_a_comparison(text, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "stopping", lambda self, now: now == 0)
        assert run(text, *BESIDE) == {"stopped_at": 0}
    assert "stopped by a signal before the baseline" in capsys.readouterr().out
    assert not Path("run").exists()


def test_the_picture_of_a_comparison_has_the_baseline_in_an_analysis_too(text, monkeypatch):
    drawn = []
    monkeypatch.setattr(plans, "draw_loss", lambda folder, title, beside=None: drawn.append((folder, beside)))
    run(text, *BESIDE)
    train_apelr.main(["--analyze=run", "--device=cpu"])
    there = Path("run/baseline")
    assert drawn == [(there, None), (Path("run"), there), (Path("run/analysis"), there)]


def test_a_finished_comparison_is_not_repeated_and_a_finished_planner_gets_its_baseline(text, capsys):
    run(text, *BESIDE, "--no-compare_baseline")
    alone = read("run/summary.json")
    assert "baseline_nll" not in alone
    run(text, *BESIDE)
    both = read("run/summary.json")
    assert both["baseline_nll"] == read("run/baseline/summary.json")["val_nll"]
    assert both["val_nll"] == pytest.approx(alone["val_nll"], rel=1e-6) and both["tokens_per_second"]
    before = Path("run/summary.json").read_bytes()
    capsys.readouterr()
    assert run(text, *BESIDE)["baseline_nll"] == both["baseline_nll"]
    assert "nothing was left to train" in capsys.readouterr().out
    assert Path("run/summary.json").read_bytes() == before


def test_a_comparison_that_goes_on_for_longer_takes_both_along(text):
    settings = ("--schedule=constant", "--warmup_steps=0")
    run(text, *BESIDE, *settings)
    longer = run(text, *BESIDE, *settings, "--max_steps=12", "--resume=run/last.pt")
    whole = run(text, *BESIDE, *settings, "--max_steps=12", "--out_dir=whole")
    assert longer["steps"] == longer["baseline_steps"] == 12
    assert longer["baseline_nll"] == pytest.approx(whole["baseline_nll"], rel=1e-5)
    resumed = [r["step"] for r in records("run/baseline") if r["split"] == "train"]
    assert resumed == [2, 3, 4, 6, 8, 9, 10, 12]  # each once: it went on from 6


def test_a_planner_that_goes_back_a_step_leaves_its_finished_baseline(text):
    steps = ("--keep_last=-1", "--save_interval=3")
    before = run(text, *BESIDE, *steps)
    Path("run/baseline/step_3.pt").unlink()
    again = run(text, *BESIDE, *steps, "--load_checkpoint_step=3")
    assert again["val_nll"] == pytest.approx(before["val_nll"], rel=1e-6) and again["steps"] == 6
    assert again["baseline_nll"] == before["baseline_nll"]


def test_the_batch_size_of_a_baseline_is_that_which_its_planner_finds(text):
    result = run(text, *BESIDE, "--batch_size=auto", "--cpu_batch_size=6")
    assert read("run/config.json")["batch_size"] == "auto" and read("run/baseline/config.json")["batch_size"] == 6
    assert checkpoint.load(Path("run"))["extra"]["batch_size"] == 6 and result["baseline_steps"] == 6


def test_two_ranks_compare_like_one(text):
    settings = [*TINY, f"--data={text}", *BESIDE, "--dropout=0"]
    told = two_ranks("test_train_apelr", *settings, "--out_dir=two", function="quick")
    assert told.count("-> two/baseline") == 1 and told.count("done: loss") == 2
    alone, two = train_apelr.main(settings), read("two/summary.json")
    for key in ("val_nll", "baseline_nll", "baseline_parameters", "baseline_d_model", "plan_gain"):
        assert two[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("argv, words", [
    (["--version=baseline"], "compare_baseline is for a planner"),
    (["--init_from=somewhere.pt"], "the baseline has no weights to start from"),
    (["--backbone=transformer", "--n_heads=8"], "no width has within 3% of the"),
    (["--seq_len=5000"], "less than a window of"), (["--resume=nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["--batch_size=7", "--grad_accum=2"], "must be a multiple of"),
])
def test_a_comparison_that_cannot_be_is_refused_before_anything_is_written(argv, words, text, capsys):
    assert words in refused(capsys, *TINY, f"--data={text}", *BESIDE, *argv) and not Path("run").exists()


def test_weights_of_the_source_are_no_start_for_a_comparison(text, writers, capsys):
    torch.save(source_checkpoint(writers[V2]), "source.pt")
    assert "which is no fair comparison" in refused(
        capsys, *TINY, f"--data={text}", *BESIDE, "--resume=source.pt", "--compat=source")
    assert not Path("run").exists()


def test_a_baseline_of_other_settings_is_refused_before_the_planner_trains(text, capsys):
    run(text, *BESIDE)
    for name in ("last.pt", "best.pt", "summary.json"):
        Path("run", name).unlink()
    assert "run/baseline holds a finished run with other settings (lr: 0.01 -> 0.02; min_lr" in refused(
        capsys, *TINY, "--max_steps=4", f"--data={text}", *BESIDE, "--lr=0.02")
    assert not Path("run/last.pt").exists()


SIZES = {
    "v2": {}, "v1": {"version": V1}, "bias": {"experts": "bias"}, "deep": {"n_layers": 4},
    "lowrank": {"experts": "lowrank"},
    "transformer": {"backbone": "transformer"}, "transformer of v1": {"backbone": "transformer", "version": V1},
    "many plans": {"num_plan_states": 64}, "one plan": {"num_plan_states": 1}, "untied": {"n_heads": 1},
}


@pytest.mark.parametrize("settings", SIZES.values(), ids=SIZES)
def test_a_baseline_has_the_size_of_its_planner(settings):
    cfg = Config(**{"vocab_size": 1_000, "out_dir": "run", **settings})
    wanted = plans.size_of(train_apelr.build_model(cfg))
    trains = {"vocab_size": 1_000, "batch_size": 24, "parameters": wanted}
    plain = compare_baseline.baseline_settings(cfg, train_apelr.build_model, trains)
    size = plans.size_of(train_apelr.build_model(plain))
    assert abs(size / wanted - 1) < 0.03
    assert (plain.version, plain.out_dir, plain.batch_size) == ("baseline", str(Path("run/baseline")), 24)
    assert plain.check() == [] and cfg.version != "baseline"
    if cfg.backbone == "gru":
        D, H, V = cfg.token_dim, plain.d_model, 1_000
        layers = 3 * H * (D + H + 2) + (cfg.n_layers - 1) * 3 * H * (2 * H + 2)
        assert size == V * D + layers + V * H + V


def test_the_nearest_width_is_found_or_refused():
    for unit in (1, 3, 8):
        for wanted in (999, 5_000, 123_456):
            nearest = min(range(unit, 2_000, unit), key=lambda width: abs(width * width - wanted))
            if abs(nearest**2 - wanted) <= 0.03 * wanted:
                assert equal_size.equal_width(lambda width: width * width, wanted, unit) == (nearest, nearest**2)
            else:
                with pytest.raises(InputError, match=f"nearest has {nearest**2:,} at d_model={nearest} "):
                    equal_size.equal_width(lambda width: width * width, wanted, unit)
    with pytest.raises(InputError, match="within 3% of the 5 parameters"):
        equal_size.equal_width(lambda width: 100 * width, 5)


# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "config").glob("*.py") if re.match(
    r"tinystories|wikitext2|cc_news|v2_|planted", p.name)), ids=lambda p: p.stem)
def test_a_published_config_is_accepted(path):
    cfg = configure(Config, [str(path)])
    assert cfg.out_dir == f"out/{path.stem}" and cfg.data.startswith("data/")


def test_the_yaml_files_and_names_of_the_source_are_understood(tmp_path):
    (tmp_path / "source.yaml").write_text("""
seed: 42
device: cpu
data: {source: tinystories, max_train_examples: 1000, max_val_examples: 100, min_chars: 8, streaming: true}
tokenizer: {type: bpe, vocab_size: 4096, min_frequency: 2, lowercase: false}
model: {version: v2_planner_required, num_plan_states: 6, num_experts: 6, chunk_size: 8, token_dim: 64, hidden_dim: 96,
  num_layers: 2, dropout: 0.1, planner_context_scale: 1.0, planner_self_bias: 2.0, future_horizon_chunks: 3,
  plan_commitment: gumbel_st, commitment_warmup_steps: 10, plan_temperature_start: 1.5, plan_temperature_end: 0.7,
  token_filtering: true, lookahead_horizon: 3, lookahead_feedback_scale: 0.1, async_planner: true}
train: {out_dir: runs/x, seq_len: 64, batch_size: auto, cpu_batch_size: 4, grad_accum_steps: 2, lr: 6e-4,
  warmup_steps: 20, min_lr_ratio: 0.2, lr_schedule: cosine, weight_decay: 0.05, grad_clip: 0.5, max_steps: 500,
  eval_interval: 50, val_batches: 7, save_interval: 25, precision: bf16, chunk_bow_weight: 0.1, resume_from: old.pt,
  loss_weights: {future_contrastive: 0.2, plan_js_div: 0.05, boundary_entropy: 0.01, usage_balance: 0.03,
    rep_unlikelihood: 0.1, rep_window: 16}, compile: {enabled: true, mode: reduce-overhead}}
""")
    with pytest.warns(UserWarning, match="without effect here: .*max_train_examples"):
        cfg = configure(Config, [str(tmp_path / "source.yaml"), "train.loss_weights.usage_balance=0.07",
                                 "--dialect=none"], ALIASES, APELR)
    assert (cfg.data, cfg.num_plan_states, cfg.batch_size, cfg.lr, cfg.eval_batches) == (
        "tinystories", 6, "auto", 6e-4, 7)
    assert (cfg.compile, cfg.resume, cfg.precision, cfg.plan_temperature_end) == ("true", "old.pt", "bf16", 0.7)
    assert cfg.repetition_window() == 16 and cfg.feedback() == 0.1
    assert cfg.weights() == {"future_contrastive": 0.2, "plan_js_div": 0.05, "boundary_entropy": 0.01,
                             "usage_balance": 0.07, "rep_unlikelihood": 0.1}


@pytest.mark.parametrize("argv, words", [
    (["--num_experts=5"], "num_experts = 5 must equal num_plan_states = 3"),
    (["--chunk_size=15"], "chunk_size = 15 must be smaller than seq_len = 15"),
    (["--loss_weights={'plan_jsd': 1}"], "loss_weights has no 'plan_jsd'"),
    (["--loss_weights={'rep_unlikelihood': 1}"], "needs rep_window"),
    (["--planner_temperature=0"], "must be finite and above 0"),
    (["--version=v3"], "version"), (["--batch_size=some"], "batch_size"), (["--batch_size=0"], "must be at least 1"),
    (["--aux_token_fraction=0"], "must be in (0, 1]"), (["--num_plan_state=3"], "did you mean num_plan_states?"),
    (["--backbone=transformer", "--n_heads=3"], "no multiple of 2 * n_heads"),
    ([f"--version={V1}", "--experts=bias"], "settings of v2_planner_required"),
    (["--batch_size=7", "--grad_accum=2"], "must be a multiple of grad_accum * ranks = 2"),
    (["--seq_len=16"], "the planted documents predict only 15 tokens: use seq_len=15"),
    ([f"--version={V1}"], "prepare_data.py planted --version=v1_filtered_mixture"),
    (["--vocab_size=50"], "has 10: leave it out"), (["--data=nowhere"], "nowhere/meta.json"),
    (["--resume=nowhere.pt"], "no checkpoint at nowhere.pt"), (["--init_from=nowhere.pt"], "nowhere.pt"),
    (["--analyze=nowhere"], "nowhere"),
])
def test_bad_input_is_one_line_and_nothing_is_written(argv, words, planted, capsys):
    assert words in refused(capsys, *TINY, f"--data={planted[V2]}", *argv)
    assert not Path("run").exists()


def test_data_that_are_not_prepared_come_with_the_command_that_prepares_them(text, capsys):
    Path("notes.txt").write_text("some text")
    Path("letters").mkdir()
    Path("letters/first.jsonl").write_text("{}")
    Path("data/stories").mkdir(parents=True)
    shutil.copy(text / "meta.json", "data/stories")
    for data, command in (
        ("notes.txt", "python prepare_data.py text --input=notes.txt --out_dir=data/notes, then data=data/notes"),
        ("letters", "python prepare_data.py text --input=letters --out_dir=data/letters, then data=data/letters"),
        ("data/planted", "no such file; make it with python prepare_data.py planted --out_dir=data/planted"),
        ("data/storys", "; did you mean data/stories? Or make it with python prepare_data.py text --input="),
    ):
        assert command in refused(capsys, *TINY, f"--data={data}")


@pytest.mark.parametrize("damage, words", [
    ("cut", "prepare the folder again"), ("tokenizer", "is not the tokenizer that the tokens beside it were made with"),
    ("beyond", "beyond its vocabulary of"), ("meta", "meta.json is damaged"), ("short", "less than a window of"),
])
def test_damaged_data_are_refused_before_anything_is_written(damage, words, text, capsys):
    shutil.copytree(text, "data")
    meta, length = read("data/meta.json"), "15"
    if damage == "cut":
        Path("data/train.bin").write_bytes(Path("data/train.bin").read_bytes()[:-3])
    elif damage == "tokenizer":
        spec = read("data/tokenizer.json")
        spec["lowercase"] = not spec.get("lowercase", False)
        del spec["sha256"]  # a tokenizer of its own
        Path("data/tokenizer.json").write_text(json.dumps(spec))
    elif damage == "beyond":
        meta |= {"vocab_size": max(meta[f"{name}_id"] for name in ("bos", "eos", "unk", "pad")) + 1}
        Path("data/meta.json").write_text(json.dumps(meta | {"digest": sealed(meta)}))
    elif damage == "meta":
        Path("data/meta.json").write_text("{")
    else:
        length = str(meta["val_tokens"])
    assert words in refused(capsys, *TINY, "--data=data", f"--seq_len={length}") and not Path("run").exists()


def test_another_tokenizer_is_refused_on_resuming(text, writers, planted, capsys):
    assert "was trained with another tokenizer" in refused(
        capsys, *TINY, f"--data={planted[V2]}", f"--resume={writers[V2] / 'last.pt'}", "--max_steps=5")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_step(text, capsys, monkeypatch):
    monkeypatch.setattr(train_apelr, "learning_rate", lambda step, cfg: np.inf if step == 4 else 1e-3)
    settings = ("--max_steps=9", "--save_interval=2", "--grad_clip=0")
    assert "step" in refused(capsys, *TINY, f"--data={text}", *settings, code=1)
    assert checkpoint.load(Path("run"))["step"] == 4


def test_importing_the_script_starts_nothing_and_brings_no_other_experiment():
    brought = brought_in_by("train_apelr")
    assert "train_apelr" in brought and not {"train_ghmm", "train_arxiv", "matplotlib"} & brought
    assert "main" in runpy.run_path(str(ROOT / "train_apelr.py"), run_name="imported")


# ---------------------------------------------------------------------------------------------------------------
# sample.py
# ---------------------------------------------------------------------------------------------------------------
def sampled(folder: Path, *flags: str) -> dict:
    return sample.main([str(folder), "--device=cpu", "--max_new_tokens=12", "--prompt=Once upon", *flags])


@pytest.mark.parametrize("version", [V1, V2, "baseline"])
def test_a_text_goes_on_from_the_prompt_and_is_decided_by_the_seed(version, writers, capsys):
    found = sampled(writers[version], "--num_samples=3")["samples"]
    assert len(found) == 3 and all(s["text"].startswith("Once upon") and len(s["tokens"]) <= 21 for s in found)
    assert len({s["text"] for s in found}) > 1 and found == sampled(writers[version], "--num_samples=3")["samples"]
    assert found != sampled(writers[version], "--num_samples=3", "--seed=1")["samples"]
    told = "".join(capsys.readouterr().out.split())
    assert "".join(harmless(found[0]["text"]).split()) in told  # with other line ends


def test_every_plan_in_turn_makes_a_table(writers, capsys):
    for version in (V1, V2):
        found = sampled(writers[version], "--sweep_states", "--num_samples=1")["samples"]
        assert [s["state"] for s in found] == [None, 0, 1, 2]
        table = re.findall(r"^(belief|plan \d) +(\d+\.\d\d)  ", capsys.readouterr().out, re.M)
        assert [label for label, _ in table] == ["belief", "plan 0", "plan 1", "plan 2"]
        assert [float(nats) for _, nats in table] == pytest.approx([s["nll"] for s in found], abs=0.0051)
        for s in found[1:]:
            assert np.array(s["beliefs"]).tolist() == [[float(k == s["state"]) for k in range(3)]] * len(s["beliefs"])


def test_the_plan_is_shown_as_a_strip_and_a_picture(writers, capsys):
    written = sampled(writers[V2], "--show_plan", "--num_samples=1", "--seed=1")["samples"][0]
    count = len(written["beliefs"])
    begins = sum((9 + t) % 4 == 0 for t in range(1, count))  # v2: the 9 characters of the prompt fill two chunks
    told = capsys.readouterr().out
    marks = ["." if max(belief) < 0.5 else str(np.argmax(belief)) for belief in written["beliefs"]]
    strip = told.split("token written\n")[1].split("\n\n")[0].splitlines()[1].removeprefix("  ")  # one row of letters
    assert strip.replace("|", "") == "".join(marks) and strip.count("|") == begins and count > 4
    legend = re.findall(r"^plan (\d) +([\d.]+)%", told, re.M)
    shares = 100 * np.mean(written["beliefs"], 0)
    assert [k for k, _ in legend] == ["0", "1", "2"]
    assert [float(share) for _, share in legend] == pytest.approx(shares, abs=0.51)
    picture = matplotlib.image.imread(re.search(r"picture: (.*)", told)[1])
    assert picture[..., :3].std() > 0.01


def test_tokens_of_any_script_are_drawn_without_a_warning():
    labels = ["\x15", "\n", "$x$", "\u4e2d\u6587", "\u0627", "\U0001f600", "\ufffd", "", "a"]
    beliefs = np.full((len(labels), 2), 0.5)
    plan_pictures.draw_beliefs(Path("here"), "strip", beliefs, labels, [4], "title")
    assert matplotlib.image.imread("here/plots/strip.png")[..., :3].std() > 0.01


def test_planner_flags_of_version_two(writers, capsys):
    plain = sampled(writers[V2], "--num_samples=2")["samples"]
    frozen = sampled(writers[V2], "--num_samples=2", "--freeze_planner")["samples"]
    assert all(len(set(map(tuple, s["beliefs"]))) == 1 for s in frozen)
    assert all(len(set(map(tuple, s["beliefs"]))) > 1 for s in plain)
    ahead = sampled(writers[V2], "--lookahead_steps=2", "--num_samples=1")["samples"][0]
    behind = sampled(writers[V2], "--lookahead_steps=2", "--num_samples=1", "--async_planner")["samples"][0]
    assert ahead == behind and np.array(ahead["forecasts"]).shape == (len(ahead["beliefs"]), 2, 3)
    assert "forecast at the first token" in capsys.readouterr().out
    _, model, _, _ = train_apelr.load_run(writers[V2], "cpu")
    P = model.planner_transition_logits.detach().softmax(1).numpy()
    np.testing.assert_allclose(np.array(ahead["beliefs"]) @ P, np.array(ahead["forecasts"])[:, 0], atol=1e-5)
    forced = sampled(writers[V2], "--force_state=1", "--num_samples=1")["samples"][0]
    sharp = sampled(writers[V2], "--planner_temperature=0.01", "--num_samples=1")["samples"][0]
    assert forced["state"] == 1 and sharp["text"] != forced["text"]


def test_prompts_come_from_standard_input(writers, monkeypatch):
    Path("prompts.txt").write_text("Once\nFin found\n")
    with open("prompts.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        sample.main([str(writers[V2]), "--max_new_tokens=3", "--num_samples=1", "--device=cpu", "--json=found.json"])
    assert [s["prompt"] for s in read("found.json")["samples"]] == ["Once", "Fin found"]


def test_a_checkpoint_of_the_source_can_be_sampled(writers):
    Path("source").mkdir()
    torch.save(source_checkpoint(writers[V2]), "source/checkpoint.pt")
    shutil.copyfile(writers[V2] / "tokenizer.json", "source/tokenizer.json")
    found = sampled(Path("source/checkpoint.pt"), "--num_samples=1")
    assert found["step"] == 7 and found["samples"][0]["text"].startswith("Once upon")


@pytest.mark.parametrize("version, flags, words", [
    (V1, ["--freeze_planner"], "freeze_planner is a flag of v2_planner_required"),
    (V1, ["--planner_temperature=2"], "planner_temperature is a flag of v2_planner_required"),
    (V1, ["--async_planner"], "async_planner is a flag of v2"),
    ("baseline", ["--force_state=0"], "force_state needs a planner"), ("baseline", ["--show_plan"], "needs a planner"),
    (V2, ["--force_state=3"], "this model has the plans 0 to 2"), (V1, ["--force_state=-1"], "the plans 0 to 2"),
    (V2, ["--top_p=0"], "top_p: expected float in (0, 1]"), (V2, ["--force_state=1", "--sweep_states"], "choose one"),
    (V2, ["--repetition_penalty=0.5"], "must be at least 1"), (V2, ["--topk=3"], "did you mean top_k?"),
])
def test_a_flag_that_makes_no_sense_is_one_line(version, flags, words, writers, capsys):
    assert words in refused(capsys, str(writers[version]), "--prompt=Once", *flags, main=sample.main)
