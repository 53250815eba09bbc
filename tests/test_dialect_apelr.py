"""Settings of APEL-R: its files and command lines train here what they train there, or are refused in one sentence."""

import json
import math
import random
import re
import shlex
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from commands import two_ranks

import prepare_data
import train_apelr
from common.errors import DataError
from configurator import config_dict, configure
from measure.speed import fitting_batch_size
from sources import foreign_plans, prepared
from sources import text as text_source
from sources.foreign import APELR
from train_apelr import ALIASES, Config, build_model, commitment

ROOT = Path(__file__).resolve().parents[1]
V1, V2 = "v1_filtered_mixture", "v2_planner_required"
# The least that the source reads: what it has no default for, and the sections it must have.
LEAST = {
    "data": {"source": "tinystories", "max_train_examples": 40, "max_val_examples": 10},
    "model": {"num_plan_states": 3, "chunk_size": 4, "token_dim": 8, "hidden_dim": 16, "num_layers": 1, "dropout": 0.0,
              "fusion_dim": 12},
    "train": {"out_dir": "runs/x", "seq_len": 16, "lr": 0.001, "max_steps": 2, "usage_balance_weight": 0.1},
}


@pytest.fixture(autouse=True)
def alone(quickly, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def merged(base: dict, more: dict) -> dict:
    """Two levels of settings; None takes one away."""
    both = {section: dict(values) if isinstance(values, dict) else values for section, values in base.items()}
    for section, values in more.items():
        if isinstance(values, dict):
            both[section] = both.get(section, {}) | values
            both[section] = {name: value for name, value in both[section].items() if value is not None}
        else:
            both[section] = values
    return both


def written(more: dict | None = None, base: dict = LEAST) -> str:
    """A file of the source with these settings."""
    Path("theirs.yaml").write_text(yaml.safe_dump(merged(base, more or {})))
    return "theirs.yaml"


def read(more: dict | None = None, *words: str, base: dict = LEAST) -> Config:
    with warnings.catch_warnings(action="ignore"):
        return configure(Config, [written(more, base), *words], ALIASES, APELR)


def refused(capsys, *argv: str, main=train_apelr.main) -> str:
    """The one error line, which notes may come before."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, warnings.catch_warnings(action="ignore"):
        main(list(argv))
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---------------------------------------------------------------------------------------------------------------
# Whose settings they are, and what they leave out
# ---------------------------------------------------------------------------------------------------------------
DEFAULTS = dict(  # of the source's training and of its model classes
    version=V2, backbone="gru", compat="source", schedule="constant", warmup_steps=0, min_lr=0.0001, weight_decay=0.01,
    beta1=0.9, beta2=0.95, grad_clip=1.0, grad_accum=1, batch_size=1, seed=42, log_interval=20, eval_interval=200,
    eval_batches=20, final_eval_batches=20, preview_prompt="Once upon a time", preview_tokens=120, precision="fp32",
    matmul_precision="highest", compile="false", device="auto", entropy_reg_weight=0.0,
    chunk_bow_weight=0.0, chunk_bow_warmup_steps=0,
    plan_mi_weight=0.0, chunk_post_kl_weight=0.0, loss_weights={}, rep_window=0, planner_context_scale=1.0,
    planner_self_bias=None, planner_temperature=1.0, plan_temperature_start=None, plan_temperature_end=None,
    token_filtering=True, carry_posterior=True, future_horizon_chunks=2, lookahead_horizon=2, plan_commitment="soft",
    commitment_warmup_steps=0, commitment_ramp_steps=0, commitment_max_hard_fraction=1.0, aux_token_fraction=1.0,
    batch_size_min=1, batch_size_cap=1024, batch_size_safety=0.85, experts="full", num_experts=None)  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_absent_key_has_the_default_of_the_source(name):
    assert getattr(read(), name) == DEFAULTS[name]


def test_what_is_given_is_kept_and_the_gate_looks_ahead_by_a_quarter(capsys):
    cfg = read()
    assert (cfg.out_dir, cfg.d_model, cfg.n_layers, cfg.seq_len, cfg.lr) == ("runs/x", 16, 1, 16, 0.001)
    assert cfg.feedback() == 0.25 and cfg.boundary_rule() == "source" and not cfg.include_current()
    assert cfg.weights() == {"usage_balance": 0.1}
    told = capsys.readouterr().err
    assert "note: read as APEL-R, newest commit: absent keys take its defaults" in told
    assert "note: model.version is absent: v2_planner_required (v1 before February 15: --dialect=apelr_early" in told
    read({"model": {"version": V2}})
    assert "is absent" not in capsys.readouterr().err


def test_the_commit_before_february_15_trains_version_one_where_none_is_named(capsys):
    cfg = read({}, "--dialect=apelr_early")
    assert (cfg.version, cfg.feedback(), cfg.compat) == (V1, 0.0, "source")
    assert "read as APEL-R, commit before February 15: absent keys take its defaults" in capsys.readouterr().err


def test_version_two_of_that_commit_neither_looks_ahead_nor_carries_nor_ramps():
    more = {"model": {"version": V2, "lookahead_feedback_scale": 0.5, "commitment_ramp_steps": 7,
                      "token_filtering": False, "commitment_max_hard_fraction": 0.5, "plan_temperature_start": 1.3},
            "train": {"entropy_reg_weight": 0.2, "usage_balance_weight": 0.3}}  # fmt: skip
    cfg = read(more, "--dialect=apelr_early")
    assert (cfg.carry_posterior, cfg.feedback(), cfg.commitment_ramp_steps, cfg.token_filtering) == (False, 0, 0, True)
    assert cfg.commitment_max_hard_fraction == 1 and cfg.planner_temperature == 1.3
    assert cfg.weights() == {"usage_balance": 0.3}  # boundary entropy has a weight of its own there, which is 0
    assert read(more).weights() == {"usage_balance": 0.3, "boundary_entropy": 0.2}


def test_ours_stay_ours(capsys):
    cfg = configure(Config, ["--lr=0.5", "train.loss_weights.usage_balance=0.07"], ALIASES, APELR)
    assert cfg.warmup_steps == Config().warmup_steps and cfg.compat == "" and cfg.loss_weights["usage_balance"] == 0.07
    Path("ours.yaml").write_text("d_model: 32\nloss_weights: {usage_balance: 0.5}\n")
    cfg = configure(Config, ["ours.yaml"], ALIASES, APELR)
    assert (cfg.d_model, cfg.schedule, cfg.seed) == (32, "cosine", 1337)
    assert configure(Config, [str(ROOT / "config/v2_fast.py")], ALIASES, APELR).seed == 1337
    # Sections alone are no sign: a file of the source names its data too.
    Path("ours.yaml").write_text("model: {d_model: 32, num_plan_states: 3}\ntrain: {lr: 0.5}\n")
    assert configure(Config, ["ours.yaml"], ALIASES, APELR).seed == 1337
    assert configure(Config, ["train.lr=0.5", "model.d_model=16"], ALIASES, APELR).d_model == 16
    assert "read as" not in capsys.readouterr().err
    assert read({}, "--dialect=none").seed == 1337
    # Nor is what a run of the source leaves behind here: its settings are all said, by our names.
    cfg = read({"tokenizer": {"type": "bpe"}})
    Path("config.json").write_text(json.dumps(config_dict(cfg)))
    capsys.readouterr()
    assert configure(Config, ["config.json"], ALIASES, APELR) == cfg
    assert "read as" not in capsys.readouterr().err


@pytest.mark.parametrize("key", ["tokenizer.type=bpe", "data.source=tinystories", "model.hidden_dim=8"])
def test_a_key_that_only_the_source_has_is_enough(key, capsys):
    told = refused(capsys, key)
    assert "no default for it" in told


@pytest.mark.parametrize("section, key", [("train", "seq_len"), ("train", "lr"), ("train", "max_steps"),
                                          ("data", "source")])  # fmt: skip
def test_what_the_source_has_no_default_for_is_asked_for(section, key, capsys):
    told = refused(capsys, written({section: {key: None}}))
    assert f"{section}.{key} is missing, and the source has no default for it" in told


def test_a_checkpoint_to_go_on_from_says_the_version(capsys):
    weights = {"token_emb.weight": torch.zeros(5, 8), "planner_init_logits": torch.zeros(3)}
    for version in (V1, V2):
        torch.save({"model_state_dict": weights, "model_version": version}, f"{version}.pt")
        assert read({"train": {"resume_from": f"{version}.pt"}}).version == version
        assert read({}, f"--resume={version}.pt").version == version
    # Another than that of the file is refused, as there; an empty name is none.
    told = refused(capsys, written({"model": {"architecture": V2}, "train": {"resume_from": f"{V1}.pt"}}))
    assert f"model.version = {V2}, and {V1}.pt is of {V1}, which the source refuses" in told
    assert read({"model": {"version": V2}, "train": {"resume_from": f"{V2}.pt"}}).version == V2
    assert read({"train": {"resume_from": ""}}).resume == "auto"


# ---------------------------------------------------------------------------------------------------------------
# Settings that mean something else there
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more, ranks, sizes", [
    ({"batch_size": 4}, 1, (4, 1)), ({"batch_size": 4, "grad_accum_steps": 2}, 1, (8, 2)),
    ({"batch_size": 4, "grad_accum_steps": 3}, 2, (24, 3)),
    ({"batch_size": "auto", "cpu_batch_size": 4, "grad_accum_steps": 2}, 1, ("auto", 2)),
    ({"batch_size": 6, "cpu_batch_size": 2, "adaptive_batch": {"enabled": True}}, 1, (2, 1)),
    ({"batch_size": 6, "adaptive_batch": {"enabled": True}}, 1, (6, 1)),
    ({"batch_size": 6, "adaptive_batch": True, "cpu_batch_size": 3}, 1, (3, 1)),
    ({"batch_size": 6, "adaptive_batch": False, "cpu_batch_size": 3}, 1, (6, 1)),
])  # fmt: skip
def test_the_batch_of_a_step_is_that_of_all_its_parts(more, ranks, sizes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    cfg = read({"train": more})
    assert (cfg.batch_size, cfg.grad_accum) == sizes
    if "auto" in sizes:
        assert cfg.cpu_batch_size == 8  # two micro-steps of four
    assert read({"train": more}, "--batch_size=96").batch_size == 96  # without a section the name is ours


def test_a_measured_batch_of_a_given_size_is_refused_where_there_is_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train = {"batch_size": 6, "adaptive_batch": {"enabled": True}}
    assert "train.batch_size=auto to fill the GPU" in refused(capsys, written({"train": train}))
    assert read({"train": train, "device": "cpu"}).batch_size == 6


@pytest.mark.parametrize("names", [
    {"batch_size_min": 2, "batch_size_cap": 12, "batch_size_safety": 0.5, "batch_size_probe": 1},
    {"adaptive_batch": {"enabled": True, "min_batch_size": 2, "max_batch_size": 12, "safety_factor": 0.5,
                        "probe_batch_size": 1, "reprobe_interval_steps": 0}},
])  # fmt: skip
def test_the_bounds_of_an_automatic_batch_have_two_names(names):
    cfg = read({"train": {"batch_size": "auto"} | names})
    assert (cfg.batch_size_min, cfg.batch_size_cap, cfg.batch_size_safety) == (2, 12, 0.5)


def fitting(monkeypatch, bytes_a_window: int, **settings) -> tuple[int, list[int]]:
    """(what batch_size=auto comes to on a GPU of 1,000 bytes, sizes tried)."""
    tried = []
    gpu = SimpleNamespace(total_memory=1_000)
    for name, value in dict(get_device_properties=lambda device: gpu, reset_peak_memory_stats=lambda device: None,
                            max_memory_allocated=lambda device: tried[-1] * bytes_a_window,
                            empty_cache=lambda: None).items():
        monkeypatch.setattr(torch.cuda, name, value)

    def loss_of(size: int):
        tried.append(size)
        if size * bytes_a_window > 1_000:
            raise torch.cuda.OutOfMemoryError
        return torch.zeros((), requires_grad=True)

    rt = SimpleNamespace(device=torch.device("cuda"), world_size=1, gather=lambda value: [value])
    cfg = Config(batch_size="auto", **settings)
    return fitting_batch_size(rt, torch.nn.Identity(), cfg, loss_of), tried


@pytest.mark.parametrize("settings, size, tried", [
    ({}, 64, [2, 4, 8, 16, 32, 64, 128]), ({"batch_size_safety": 0.5}, 32, [2, 4, 8, 16, 32, 64]),
    ({"batch_size_cap": 12}, 12, [2, 4, 8, 12]), ({"batch_size_cap": 8, "grad_accum": 3}, 24, [2, 4, 8]),
    ({"batch_size_min": 5, "batch_size_cap": 30}, 30, [10, 20, 30]),
    ({"batch_size_min": 9, "batch_size_cap": 3}, 9, []),
])  # fmt: skip
def test_an_automatic_batch_stays_within_its_bounds(settings, size, tried, monkeypatch):
    assert fitting(monkeypatch, 10, **settings) == (size, tried)


def test_a_batch_that_no_longer_fits_is_not_taken(monkeypatch):
    assert fitting(monkeypatch, 300) == (2, [2, 4])


def test_the_warm_up_is_that_of_the_cosine():
    assert read({"train": {"warmup_steps": 7}}).warmup_steps == 0
    cfg = read({"train": {"warmup_steps": 7, "lr_schedule": "cosine", "min_lr_ratio": 0.25}})
    assert (cfg.schedule, cfg.warmup_steps, cfg.min_lr) == ("cosine", 7, 0.00025)


def test_half_precision_is_for_a_gpu(capsys, monkeypatch):
    assert read({"train": {"precision": "bf16"}}).precision == "fp32"
    assert "precision = bf16 of theirs.yaml is for CUDA alone: precision = fp32" in capsys.readouterr().err
    assert read({"train": {"precision": "bf16"}}, "--precision=bf16").precision == "bf16"  # asked for here
    for device in ("cuda", "cuda:1"):
        cfg = read({"device": device})
        assert (cfg.device, cfg.precision) == ("auto", "fp32")
        assert f"note: device = {device} of theirs.yaml is not there: device = auto" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [read(more).precision for more in ({}, {"device": "cpu"}, {"train": {"precision": "bf16"}})] == [
        "fp16", "fp32", "bf16"]
    assert read({"device": "cuda"}).device == "cuda"


def test_less_precise_products_are_for_a_gpu(capsys, monkeypatch):
    """As there: matmul_precision is read where there is CUDA, and is high there where it is absent."""
    asked = {"train": {"matmul_precision": "medium"}}
    assert read(asked).matmul_precision == "highest"
    assert "matmul_precision = medium of theirs.yaml is for CUDA alone: matmul_precision = highest" in \
        capsys.readouterr().err
    assert read(asked, "--matmul_precision=medium").matmul_precision == "medium"  # asked for here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [read(more).matmul_precision for more in ({}, {"device": "cpu"}, asked)] == ["high", "highest", "medium"]
    assert read({}, "--dialect=apelr_early").matmul_precision == "highest"  # which does not know it


def test_version_one_has_neither_temperature_nor_samples_nor_a_look_ahead():
    cfg = read({"model": {"version": V1, "plan_temperature": 2.0, "plan_temperature_end": 0.5, "token_filtering": False,
                          "plan_commitment": "gumbel_st", "num_experts": 7,
                          "lookahead_feedback_scale": 0.5}})  # fmt: skip
    assert cfg.num_experts is None
    assert (cfg.planner_temperature, cfg.plan_temperature_end, cfg.token_filtering) == (1.0, None, True)
    assert commitment(1, cfg) == (1.0, 0.0) and cfg.feedback() == 0
    assert read({"model": {"version": V1}, "train": {"entropy_reg_weight": -0.1}}).entropy_reg_weight == -0.1


def test_the_temperature_of_version_two_starts_where_its_checkpoints_say():
    assert read({"model": {"plan_temperature": 0.7}}).planner_temperature == 0.7
    cfg = read({"model": {"plan_temperature": 0.7, "plan_temperature_start": 1.5, "plan_temperature_end": 0.5},
                "train": {"max_steps": 11}})  # fmt: skip
    assert cfg.planner_temperature == 1.5
    assert [commitment(step, cfg)[0] for step in (0, 5, 10)] == pytest.approx([1.5, 1.0, 0.5])


@pytest.mark.parametrize("train, weights", [
    ({"usage_balance_weight": 0.0, "entropy_reg_weight": 0.3}, {"boundary_entropy": 0.3}),
    ({"loss_weights": {"usage_balance": 0.5, "plan_js_div": 0.2}}, {"usage_balance": 0.5, "plan_js_div": 0.2}),
    ({"loss_weights": {"boundary_entropy": 0.0, "future_contrastive": 0.1}, "entropy_reg_weight": 0.3},
     {"usage_balance": 0.1, "future_contrastive": 0.1}),
    ({"loss_weights": {"rep_unlikelihood": 0.4}}, {"usage_balance": 0.1}),  # of a window of no tokens
    ({"loss_weights": {"rep_unlikelihood": 0.4, "rep_window": 8}}, {"usage_balance": 0.1, "rep_unlikelihood": 0.4}),
])  # fmt: skip
def test_the_weights_of_version_two(train, weights):
    assert read({"train": train}).weights() == weights


def test_a_version_two_without_a_reason_to_plan_is_refused_as_there(capsys):
    none = {"usage_balance_weight": None, "loss_weights": {"rep_unlikelihood": 1.0, "rep_window": 4}}
    told = refused(capsys, written({"train": none}))
    assert "which the source refuses: set one, or train.allow_zero_v2_planner_losses=true" in told
    assert read({"train": none | {"allow_zero_v2_planner_losses": True}}).weights() == {"rep_unlikelihood": 1.0}
    assert read({"train": none}, "--dialect=apelr_early", "model.version=" + V2).weights() == {"rep_unlikelihood": 1.0}
    assert read({"train": none, "model": {"version": V1}}).weights() == {}


def test_its_transformer_is_a_baseline_of_its_sizes(capsys):
    base = {"data": LEAST["data"], "model": {"version": "transformer_lm"},
            "train": {"out_dir": "runs/t", "seq_len": 96, "lr": 0.001, "max_steps": 3}}  # fmt: skip
    cfg = read(base=base)
    assert (cfg.version, cfg.backbone, cfg.weights()) == ("baseline", "transformer_lm", {})
    assert (cfg.d_model, cfg.token_dim, cfg.n_layers, cfg.n_heads, cfg.d_ff, cfg.dropout) == (512, 512, 6, 8, None, 0.1)
    assert cfg.max_seq_len == 1_024
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 3, "d_ff": 40, "max_seq_len": 96, "token_dim": 7,
             "plan_commitment": "gumbel_st", "num_experts": 7}  # fmt: skip
    cfg = read({"model": sizes}, base=base)
    model = build_model(cfg, 11)
    assert model.token_emb.weight.shape == (11, 24) and len(model.backbone.layers) == 2
    assert model.backbone.pos_emb.weight.shape == (96, 24)
    assert model.backbone.blocks[0].mlp.fc1.weight.shape == (40, 24)
    assert model.backbone.blocks[0].mlp.fc2.weight.shape == (24, 40)
    ours = read({"model": {"version": "baseline"}, "train": {"seq_len": 2000}}, base=base)
    assert (ours.backbone, ours.n_layers, ours.token_dim) == ("gru", 2, 256)
    told = refused(capsys, written({"model": {"max_seq_len": 95}}, base))
    assert "train.seq_len = 96 is more than model.max_seq_len = 95, which the source refuses" in told
    assert Config(version="transformer_lm").backbone == "transformer_lm"
    assert build_model(Config(backbone="transformer", d_model=16), 5).backbone.layers[0].mlp_in.weight.shape == (64, 16)


@pytest.mark.parametrize("tokenizer, data, words", [
    ({"type": "wordpiece"}, {}, "tokenizer.type = wordpiece: the source has char and bpe"),
    ({"type": "bpe", "byte_level": False}, {}, "the BPE here is of bytes"),
    ({"type": "bpe", "special_tokens": ["<s>", "</s>"]}, {}, "has <pad>, <bos>, <eos> and <unk>"),
    ({"type": "bpe", "vocab_size": "many"}, {}, "tokenizer.vocab_size = many: not a number"),
    ({"type": "bpe", "special_tokens": math.inf}, {}, "has <pad>, <bos>, <eos> and <unk>"),
    ({}, {"max_train_examples": math.inf}, "data.max_train_examples = inf: not a whole number"),
    ({}, {"val_split": "test"}, "data.val_split = test: of tinystories prepare_data.py text reads validation"),
    ({}, {"val_split": "train"}, "data.val_split = train: of tinystories prepare_data.py text reads validation"),
    ({}, {"train_token_file": "x.bin", "token_cache": True},
     "data.train_token_file = x.bin: prepare_data.py text makes the tokens here"),
])  # fmt: skip
def test_what_has_no_place_here_is_refused(tokenizer, data, words, capsys):
    assert words in refused(capsys, written({"tokenizer": tokenizer, "data": data}))


def test_what_changes_nothing_is_listed_and_what_makes_the_data_is_not():
    train = {"num_workers": 2, "pin_memory_device": "cuda", "stride": 16, "distributed": {"backend": "nccl"}}
    path = written({"tokenizer": {"type": "bpe", "min_frequency": 3}, "train": train})
    with pytest.warns(UserWarning, match="without effect here: ") as caught:
        configure(Config, [path, "tokenizer.vocab_size=300"], ALIASES, APELR)
    listed = str(caught[0].message).split(": ")[1].split(", ")
    assert sorted(listed) == ["tokenizer.min_frequency", "train.distributed", "train.num_workers",
                              "train.pin_memory_device", "train.stride"]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The text and its vocabulary
# ---------------------------------------------------------------------------------------------------------------
def stories(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(40)]
    return [" ".join(draw.choices(words, k=30)) + f" {seed} {i}." for i in range(count)]


@pytest.fixture
def hub(monkeypatch):
    """TinyStories, as far as this machine knows."""
    rows = {"train": stories(60), "validation": ["short", *stories(30, seed=1)]}
    streams = {split: [{"text": text} for text in texts] for split, texts in rows.items()}
    monkeypatch.setattr(text_source, "open_hub", lambda name, config: streams)


@pytest.mark.parametrize("more, prepare", [
    ({}, {"tokenizer": "char", "min_chars": 8, "max_documents": 40, "val_fraction": 0.25}),
    ({"tokenizer": {"type": "bpe"}, "data": {"min_chars": 16}},
     {"tokenizer": "bpe", "vocab_size": 4096, "min_chars": 16, "max_documents": 40, "val_fraction": 0.25}),
    ({"tokenizer": {"type": "BPE", "vocab_size": 300, "lowercase": True, "min_frequency": 2}},
     {"tokenizer": "bpe", "vocab_size": 300, "lowercase": True, "min_chars": 8, "max_documents": 40,
      "val_fraction": 0.25}),
    ({"data": {"max_val_examples": 90}},
     {"tokenizer": "char", "min_chars": 8, "max_documents": 40, "val_fraction": 0.5}),  # the most there is
    ({"data": {"source": "wikitext2"}}, {"tokenizer": "char", "min_chars": 8}),  # lines there, articles here
    ({"data": {"source": "fineweb_edu", "max_train_examples": -10, "min_chars": -3, "max_train_chars": -1}},
     {"tokenizer": "char", "min_chars": 0}),  # no limits
    ({"data": {"source": "fineweb_edu", "max_train_examples": 90, "max_train_tokens": 1000, "max_val_tokens": 50,
               "tokenizer_fit_max_chars": 400, "token_cache": True, "val_split": "train"}},
     {"tokenizer": "char", "min_chars": 8, "max_documents": 100, "val_fraction": 0.1, "max_bytes": 8000,
      "max_tokens": 1000, "max_val_tokens": 50, "tokenizer_chars": 400}),
    ({"data": {"max_train_tokens": 1000, "tokenizer_fit_max_chars": 400, "train_token_file": "x.bin", "min_chars": 0}},
     {"tokenizer": "char", "min_chars": 0, "max_documents": 40, "val_fraction": 0.25}),  # of a token_cache
    ({"data": {"max_train_chars": 5000, "max_train_examples": 18_000, "max_val_examples": 1_200}},
     {"tokenizer": "char", "min_chars": 8, "max_documents": 18_000, "val_fraction": 0.066666, "max_bytes": 5000}),
])  # fmt: skip
def test_the_settings_that_make_the_text(more, prepare):
    cfg = read(more)
    source = more.get("data", {}).get("source", "tinystories")
    assert cfg.prepare == {"input": source} | prepare and cfg.data == f"data/{source}"


def test_limits_that_count_lines_are_said_to_say_nothing_of_articles(capsys):
    read({"data": {"source": "wikitext2"}})
    assert "count lines of wikitext2, of which articles are read here" in capsys.readouterr().err
    read()
    assert "articles" not in capsys.readouterr().err


def asked_for(told: str) -> list[str]:
    """The words of the command that a refusal ends with."""
    command = re.search(r"python (prepare_data\.py text .*?)(?:, and |$)", told, re.M)[1]
    return shlex.split(command)[1:]


def test_a_file_runs_after_the_command_that_its_refusal_names(hub, capsys):
    path = written({"tokenizer": {"type": "bpe", "vocab_size": 300}, "data": {"min_chars": 16}})
    told = refused(capsys, path)
    assert told.endswith("there is no data/tinystories: python prepare_data.py text --input=tinystories "
                         "--tokenizer=bpe --vocab_size=300 --min_chars=16 --max_documents=40 --val_fraction=0.25 "
                         "--out_dir=data/tinystories")  # fmt: skip
    assert not Path("runs").exists()
    meta = prepare_data.main(asked_for(told))
    assert (meta["train_documents"], meta["val_documents"], meta["vocab_size"]) == (40, 10, 300)
    with warnings.catch_warnings(action="ignore"):
        summary = train_apelr.main([path])
    assert summary["steps"] == 2 and math.isfinite(summary["val_nll"]) and summary["version"] == V2
    saved = json.loads(Path("runs/x/config.json").read_text())
    assert saved["prepare"]["vocab_size"] == 300 and saved["data"] == "data/tinystories"


def test_another_vocabulary_is_refused_with_the_command_for_a_folder_of_its_own(hub, capsys):
    prepare_data.main(["text", "--input=tinystories", "--vocab_size=290", "--out_dir=data/tinystories"])
    chars, bpe = written(), {"tokenizer": {"type": "bpe", "vocab_size": 300}}
    # A folder that does not fit is left alone: the text goes, and is looked for, beside it.
    told = refused(capsys, chars)
    assert "there is no data/tinystories_char: " in told and "--tokenizer=char" in told
    prepare_data.main(asked_for(told))
    assert read().data == "data/tinystories_char" and read(bpe).data == "data/tinystories_bpe"
    # Where the folder is named, it is held against the file.
    told = refused(capsys, written(bpe), "--data=data/tinystories")
    assert told.endswith("data/tinystories holds bpe of 290 tokens, but the settings ask for bpe of 300 tokens: python "
                         "prepare_data.py text --input=tinystories --tokenizer=bpe --vocab_size=300 "
                         "--out_dir=data/tinystories_bpe, and --data=data/tinystories_bpe")  # fmt: skip
    assert read(bpe, "tokenizer.vocab_size=290").data == "data/tinystories"
    assert not Path("runs").exists()


def test_another_text_is_refused(hub, capsys):
    Path("a.jsonl").write_text("\n".join(map(json.dumps, stories(40))))
    prepare_data.main(["text", "--input=a.jsonl", "--tokenizer=char", "--val_fraction=0.3",
                       "--out_dir=data/tinystories"])  # fmt: skip
    assert "there is no data/tinystories_char: " in refused(capsys, written())
    cfg = read()
    wants = {"data": "data/tinystories", "prepare": cfg.prepare}
    with pytest.raises(ValueError, match="holds a.jsonl in char, but the settings ask for tinystories in char: python"):
        prepared.check_prepared(**{"name": wants["data"], "prepare": wants["prepare"]})
    # A text of one's own choice is one's own business, its vocabulary is not.
    with warnings.catch_warnings(action="ignore"):
        assert train_apelr.main([written(), "--data=data/tinystories"])["steps"] == 2
        told = refused(capsys, written({"tokenizer": {"type": "bpe", "vocab_size": 300}}), "--data=tinystories")
    assert "data/tinystories holds char of 40 tokens, but" in told and "--input=a.jsonl" in told


def test_a_folder_as_source_and_other_tokens_than_text(hub, capsys):
    prepare_data.main(["text", "--input=tinystories", "--tokenizer=char", "--out_dir=data/mine"])
    cfg = read({"data": {"source": "mine"}})
    assert (cfg.data, cfg.prepare) == ("mine", {"tokenizer": "char"})
    prepare_data.main(["planted", "--num_plans=2", "--vocab_size=5", "--train_documents=5", "--validation_documents=2",
                       "--out_dir=data/planted"])  # fmt: skip
    chars = {"tokenizer": {"type": "char"}}
    assert "data/planted holds planted tokens, and no text" in refused(capsys, written(chars), "--data=data/planted")
    Path("data/odd").mkdir()
    assert "data/odd is no folder of prepare_data.py text" in refused(capsys, written(chars), "--data=data/odd")
    assert read({}, "--data=data/planted").prepare is None  # where no tokenizer is asked for, any vocabulary is right
    assert read({"data": {"source": None}}, "--data=data/planted").data == "data/planted"


@pytest.mark.parametrize("prepare, words", [
    ({"input": "a.jsonl"}, ""), ({"tokenizer": "bpe", "vocab_size": 300}, ""),
    ({"vocab_size": 299}, "bpe of 299 tokens"),
    ({"tokenizer": "data/a/tokenizer.json"}, ""), ({"lowercase": True}, "ask for lower case bpe:"),
    ({"tokenizer": "char"}, "holds bpe, but the settings ask for char: python prepare_data.py text --input=a.jsonl "
     "--tokenizer=char --out_dir=data/a_char, and --data=data/a_char"),
])  # fmt: skip
def test_a_config_of_ours_may_say_how_its_text_is_prepared(prepare, words):
    Path("a.jsonl").write_text("\n".join(map(json.dumps, stories(40))))
    prepare_data.main(["text", "--input=a.jsonl", "--vocab_size=300", "--val_fraction=0.3", "--out_dir=data/a"])
    if not words:
        return prepared.check_prepared("a", prepare)
    with pytest.raises(DataError, match=re.escape(words)):
        prepared.check_prepared("a", prepare)


def test_short_documents_are_left_out_and_the_tokens_end_with_a_document(capsys):
    texts = ["a" * 10, "  bb  bbbbb  ", *(f"{i} cccccccc " for i in range(4))]  # of 10, 9 and 10 characters
    Path("a.jsonl").write_text("\n".join(map(json.dumps, texts)))
    Path("v.jsonl").write_text("\n".join(json.dumps(text) for text in ["a" * 12, "c" * 11]))
    words = ["text", "--input=a.jsonl", "--val_input=v.jsonl", "--tokenizer=char", "--out_dir=out"]
    meta = prepare_data.main([*words, "--min_chars=10"])
    assert (meta["train_documents"], meta["train_tokens"], meta["val_documents"]) == (5, 11 + 4 * 12, 2)
    assert "skipped 1 of less than 10 characters" in capsys.readouterr().out
    meta = prepare_data.main([*words, "--min_chars=10", "--max_tokens=35", "--max_val_tokens=25"])
    assert (meta["train_documents"], meta["train_tokens"]) == (3, 35)
    assert (meta["val_documents"], meta["val_tokens"], meta["val_bytes"]) == (2, 25, 23)
    meta = prepare_data.main([*words, "--max_tokens=34", "--max_val_tokens=24"])
    assert (meta["train_documents"], meta["train_tokens"]) == (2, 25)
    assert (meta["val_documents"], meta["val_tokens"]) == (1, 13)
    assert prepare_data.main(["inspect", "out"])["problems"] == []
    told = refused(capsys, *words, "--max_tokens=3", main=prepare_data.main)
    assert "max_tokens = 3: the first document of training has more tokens" in told


# ---------------------------------------------------------------------------------------------------------------
# Its files and command lines
# ---------------------------------------------------------------------------------------------------------------
OF_A_RUN = {"log_interval": 10, "preview_prompt": "Once upon a time", "weight_decay": 0.01, "grad_clip": 1.0}
STORIES = {"source": "tinystories", "train_split": "train", "val_split": "validation", "min_chars": 16,
           "streaming": True}  # fmt: skip
PUBLIC = {  # config/NAME.py, and what the source's file of that name says beside STORIES and OF_A_RUN
    "tinystories_smoke": (
        {"max_train_examples": 2000, "max_val_examples": 300}, {"num_plan_states": 6, "token_dim": 192,
         "hidden_dim": 512, "fusion_dim": 384}, {"seq_len": 96, "batch_size": 12, "lr": 0.0008, "max_steps": 80,
         "eval_interval": 40, "val_batches": 10, "preview_tokens": 100, "usage_balance_weight": 0.2}),
    "tinystories_selfbias_smoke": (
        {"max_train_examples": 2500, "max_val_examples": 400}, {"num_plan_states": 6, "token_dim": 192,
         "hidden_dim": 512, "fusion_dim": 384, "planner_self_bias": 1.8}, {"seq_len": 96, "batch_size": 12,
         "lr": 0.0008, "max_steps": 80, "eval_interval": 40, "val_batches": 10, "preview_tokens": 100,
         "usage_balance_weight": 0.2}),
    "tinystories_iter": (
        {"max_train_examples": 10000, "max_val_examples": 1000}, {"num_plan_states": 8, "token_dim": 224,
         "hidden_dim": 640, "fusion_dim": 448}, {"seq_len": 128, "batch_size": 14, "lr": 0.0007, "max_steps": 200,
         "eval_interval": 100, "val_batches": 20, "preview_tokens": 120, "usage_balance_weight": 0.1}),
    "tinystories_small": (
        {"max_train_examples": 18000, "max_val_examples": 1200}, {"num_plan_states": 8, "token_dim": 256,
         "hidden_dim": 768, "fusion_dim": 512}, {"seq_len": 128, "batch_size": 16, "lr": 0.0006, "max_steps": 400,
         "eval_interval": 100, "val_batches": 20, "preview_tokens": 120, "usage_balance_weight": 0.1}),
}  # fmt: skip
NEVER_PUBLIC = ("tinystories_bpe_smoke", "tinystories_bpe_ident_iter", "tinystories_bpe_ident_cpk_scale",
                "tinystories_bpe_ident_resume_sharp", "wikitext2_bpe_ident_cpk", "wikitext2_bpe_ident_cpk_smoke",
                "cc_news_bpe_ident_cpk", "v2_fast", "v2_wikitext2_fast")  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_a_config_of_a_public_name_trains_what_the_file_of_that_name_trains(name):
    data, model, train = PUBLIC[name]
    model = {"version": V2, "num_experts": model["num_plan_states"], "chunk_size": 16, "num_layers": 2, "dropout": 0.1,
             "lookahead_horizon": 2, "lookahead_feedback_scale": 0.25, "async_planner": True} | model  # fmt: skip
    train = {"stride": train["seq_len"], "preview_interval": train["eval_interval"], "entropy_reg_weight": 0.01,
             "out_dir": f"out/{name}"} | OF_A_RUN | train  # fmt: skip
    file = {"seed": 42, "device": "cpu", "data": STORIES | data, "model": model, "train": train}
    theirs = config_dict(read(base=file)) | {"data": f"data/{name}"}
    assert config_dict(configure(Config, [str(ROOT / f"config/{name}.py")], ALIASES, APELR)) == theirs
    # The command in its comment makes that text.
    command = (ROOT / f"config/{name}.py").read_text().split("# Before: python ")[1].split("\n\n")[0]
    words = shlex.split(re.split(r"\n(?!#)", command)[0].replace("\\\n#", ""))
    assert prepared.command(theirs["prepare"], theirs["data"]) == shlex.join(["python", *words])


def test_a_config_whose_file_was_never_public_says_so():
    others = {path.stem for path in (ROOT / "config").glob("*.py")
              if re.match("tinystories|wikitext2|cc_news|v2_", path.stem)} - set(PUBLIC)  # fmt: skip
    assert {name for name in others if not name.endswith("_ours")} == set(NEVER_PUBLIC)
    for name in others:
        first = (ROOT / f"config/{name}.py").read_text().splitlines()[0]
        assert first.startswith("# Ours, beside APEL-R's" if name.endswith("_ours") else "# The name is that of a file")


V1_FILE = {
    "seed": 7, "device": "cpu", "data": STORIES | {"max_train_examples": 500, "max_val_examples": 100},
    "tokenizer": {"type": "bpe", "vocab_size": 512, "min_frequency": 2, "byte_level": True, "lowercase": False,
                  "special_tokens": ["<pad>", "<bos>", "<eos>", "<unk>"]},
    "model": {"version": V1, "num_plan_states": 5, "chunk_size": 8, "token_dim": 12, "hidden_dim": 20, "fusion_dim": 14,
              "num_layers": 2, "dropout": 0.1, "planner_context_scale": 1.0, "planner_self_bias": 2.1},
    "train": {"out_dir": "runs/one", "seq_len": 32, "stride": 32, "batch_size": 3, "lr": 0.0009,
              "lr_schedule": "cosine", "warmup_steps": 2, "min_lr_ratio": 0.1, "max_steps": 5, "eval_interval": 2,
              "val_batches": 3, "save_interval": 2,
              "preview_interval": 2, "preview_tokens": 9, "entropy_reg_weight": 0.02,
              "usage_balance_weight": 0.3, "chunk_bow_weight": 0.2, "chunk_bow_warmup_steps": 4, "plan_mi_weight": 0.04,
              "chunk_post_kl_weight": 0.06} | OF_A_RUN,
}  # fmt: skip
V2_FILE = {
    "seed": 7, "device": "cuda", "data": {"source": "fineweb_edu", "max_train_examples": 900, "max_val_examples": 100,
                                          "token_cache": True, "token_cache_dir": "runs/two/cache"},
    "tokenizer": {"type": "bpe", "vocab_size": 512},
    "model": {"version": V2, "num_plan_states": 5, "num_experts": 5, "chunk_size": 8, "token_dim": 12, "hidden_dim": 20,
              "num_layers": 2, "dropout": 0.1, "planner_self_bias": 2.0, "planner_context_scale": 1.0,
              "future_horizon_chunks": 3, "plan_commitment": "gumbel_st", "commitment_warmup_steps": 4,
              "commitment_ramp_steps": 10, "commitment_max_hard_fraction": 0.8, "plan_temperature_start": 1.4,
              "plan_temperature_end": 0.6, "token_filtering": True, "lookahead_horizon": 3,
              "lookahead_feedback_scale": 0.3, "async_planner": True},
    "train": {"out_dir": "runs/two", "seq_len": 32, "stride": 32, "batch_size": "auto", "cpu_batch_size": 3,
              "adaptive_batch": {"enabled": True, "probe_batch_size": 2, "min_batch_size": 1, "max_batch_size": 12,
                                 "safety_factor": 0.9, "reprobe_interval_steps": 0},
              "grad_accum_steps": 2, "precision": "bf16", "lr": 0.0003, "lr_schedule": "cosine", "warmup_steps": 500,
              "min_lr_ratio": 0.1, "max_steps": 50, "eval_interval": 25, "val_batches": 8,
              "eval_planner_diagnostics": False, "final_eval_planner_diagnostics": True, "save_interval": 20,
              "loss_weights": {"usage_balance": 0.05, "boundary_entropy": 0.02, "future_contrastive": 0.12,
                               "plan_js_div": 0.1, "rep_unlikelihood": 0.0, "rep_window": 64},
              "save_optimizer_state": True, "max_nonfinite_steps": 5, "fused_adamw": True, "allow_tf32": True,
              "matmul_precision": "high", "distributed": {"backend": "nccl", "zero_optimizer": True},
              "compile": {"enabled": True, "mode": "reduce-overhead", "fullgraph": False, "dynamic": False},
              "num_workers": 8, "prefetch_factor": 4, "persistent_workers": True, "pin_memory": True} | OF_A_RUN,
}  # fmt: skip


def test_a_file_of_version_one_as_a_whole():
    cfg = read(base=V1_FILE)
    assert (cfg.version, cfg.num_plan_states, cfg.fusion_dim, cfg.planner_self_bias) == (V1, 5, 14, 2.1)
    assert (cfg.schedule, cfg.warmup_steps, cfg.lr, cfg.min_lr) == ("cosine", 2, 0.0009, pytest.approx(9e-5))
    assert (cfg.batch_size, cfg.eval_batches, cfg.save_interval, cfg.device) == (3, 3, 2, "cpu")
    assert cfg.weights(9) == {"belief_entropy": 0.02, "usage_kl": 0.3, "chunk_bow": 0.2, "plan_mi": 0.04,
                              "chunk_post_kl": 0.06}  # fmt: skip
    assert cfg.weights(0)["chunk_bow"] == 0.05


def test_a_file_of_version_two_as_a_whole():
    cfg = read(base=V2_FILE)
    assert (cfg.batch_size, cfg.cpu_batch_size, cfg.grad_accum, cfg.batch_size_cap) == ("auto", 6, 2, 12)
    assert (cfg.device, cfg.precision, cfg.compile, cfg.feedback()) == ("auto", "fp32", "true", 0.3)
    assert [commitment(step, cfg)[1] for step in (3, 9, 40)] == [0, 0.5, 0.8]
    assert commitment(49, cfg)[0] == pytest.approx(0.6)
    assert cfg.weights() == {"usage_balance": 0.05, "boundary_entropy": 0.02, "future_contrastive": 0.12,
                             "plan_js_div": 0.1}  # fmt: skip
    assert cfg.data == "data/fineweb_edu" and cfg.prepare["max_documents"] == 1000


@pytest.mark.parametrize("file", [V1_FILE, V2_FILE], ids=["v1", "v2"])
def test_what_print_config_prints_is_that_run_again(file, capsys):
    with pytest.raises(SystemExit) as end, warnings.catch_warnings(action="ignore"):
        train_apelr.main([written(base=file), "--print_config"])
    assert end.value.code == 0
    Path("again.py").write_text(capsys.readouterr().out)
    assert configure(Config, ["again.py"], ALIASES, APELR) == read(base=file)


def test_a_file_goes_bare_and_so_do_its_overrides(capsys):
    """python -m apelr.train --config FILE [--set KEY=VALUE ...] is python train_apelr.py FILE [KEY=VALUE ...]."""
    path = written()
    assert f"config: files go bare, without --config: python train_apelr.py {path}" in refused(capsys, "--config", path)
    assert "set: settings go bare too, without --set: train.lr=0.5" in refused(capsys, path, "--set", "train.lr=0.5")
    cfg = read({}, "train.lr=0.5", "model.num_layers=2", "train.loss_weights.plan_js_div=0.25")
    assert (cfg.lr, cfg.n_layers, cfg.weights()["plan_js_div"]) == (0.5, 2, 0.25)


def test_its_command_for_many_gpus_trains_on_ranks(hub, capsys):
    """torchrun --nproc_per_node=8 -m apelr.train --config FILE is torchrun ... train_apelr.py FILE."""
    train = {"batch_size": 2, "grad_accum_steps": 2, "distributed": {"backend": "gloo"}}
    path = written({"train": train, "device": "cpu"})
    prepare_data.main(asked_for(refused(capsys, path)))
    told = two_ranks("train_apelr", path, "--preview_tokens=0")
    assert "8 x 16 tokens a step" in told and "ranks 2" in told


# ---------------------------------------------------------------------------------------------------------------
# What the settings do
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("most, ramp, fractions", [
    (1.0, 4, [0, 0, 0.25, 0.5, 0.75, 1, 1]), (0.6, 4, [0, 0, 0.25, 0.5, 0.6, 0.6, 0.6]), (0.6, 0, [0, *[0.6] * 6]),
    (0.0, 4, [0] * 7)])  # fmt: skip
def test_the_share_of_a_hard_sample_ends_where_it_must(most, ramp, fractions):
    cfg = Config(plan_commitment="gumbel_st", commitment_warmup_steps=10, commitment_ramp_steps=ramp,
                 commitment_max_hard_fraction=most)  # fmt: skip
    assert [commitment(step, cfg)[1] for step in (9, *range(10, 16))] == pytest.approx(fractions, abs=1e-12)


def test_the_share_reaches_the_chunk():
    """Of three plans one gets the share, and what is left is dealt by the belief."""
    model = build_model(Config(num_plan_states=3, d_model=8, token_dim=8, n_layers=1), 5)
    belief = torch.tensor([[0.2, 0.3, 0.5]]).log()
    state = model.commit(belief, 1.0, 0.75).exp()
    for chosen in range(3):
        expected = 0.25 * belief.exp() + 0.75 * F.one_hot(torch.tensor([chosen]), 3)
        if torch.allclose(state, expected, atol=1e-5):
            return
    raise AssertionError(state)


def test_a_sample_of_the_source_is_noise_where_it_is_not_hard():
    belief = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log().requires_grad_()

    def drawn(hard_fraction: float, function=foreign_plans.commit_source):
        torch.manual_seed(3)
        return function(belief, 0.7, hard_fraction).exp().double()

    soft = drawn(0.0, lambda b, tau, share: F.gumbel_softmax(b.detach().float(), tau, dim=1).log())
    hard = F.one_hot(soft.argmax(1), 3).double()
    for share in (0.0, 0.4, 1.0):
        torch.testing.assert_close(drawn(share).detach(), share * hard + (1 - share) * soft, atol=1e-6, rtol=0)
    # Straight through: backward it is the soft sample, whatever the share.
    grads = [torch.autograd.grad(drawn(share)[0, 0], belief)[0] for share in (0.0, 1.0)]
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-4)
    # From the first step of the ramp on, when the share is 0.
    cfg = Config(compat="source", plan_commitment="gumbel_st", commitment_ramp_steps=4, num_plan_states=3, d_model=8,
                 token_dim=8, n_layers=1)  # fmt: skip
    tau, share = commitment(0, cfg)
    assert 0 < share < 1e-6
    model = build_model(cfg, 5)
    torch.manual_seed(3)
    torch.testing.assert_close(model.commit(belief, 0.7, share).exp().detach(), soft, atol=1e-6, rtol=0)
    assert torch.equal(model.commit(belief, 0.7, 0.0), belief)


@pytest.mark.parametrize("version, experts", [(V1, "full"), (V2, "full"), (V2, "bias"), (V2, "lowrank"),
                                              ("baseline", "full")])
def test_the_start_is_that_of_the_source(version, experts):
    sizes = dict(version=version, experts=experts, d_model=64, token_dim=50, fusion_dim=40, num_plan_states=3)
    started = {}
    for compat in ("", "source"):
        torch.manual_seed(0)
        started[compat] = build_model(Config(compat=compat, **sizes), 400)
    ours, theirs = started[""].requires_grad_(False), started["source"].requires_grad_(False)
    assert float(theirs.token_emb.weight.std()) == pytest.approx(0.02, rel=0.03)
    width = 40 if version == V1 else 64
    bound = math.sqrt(6 / (400 + width))  # Xavier's, for a head [V, H]
    head, _ = theirs.experts.table()
    assert float(head.abs().max()) == pytest.approx(bound, rel=0.01)
    assert float(ours.experts.table()[0].abs().max()) == pytest.approx(4 * bound, rel=0.01)
    assert float(ours.token_emb.weight.std()) == pytest.approx(1, rel=0.03)
    for name, weight in ours.state_dict().items():
        if name.startswith(("backbone", "planner", "chunk_post", "future")):
            assert torch.equal(weight, theirs.state_dict()[name]), name


def test_all_weights_decay_as_in_the_source():
    sizes = dict(d_model=8, token_dim=8, num_plan_states=3, n_layers=1, weight_decay=0.3)
    model = build_model(Config(compat="source", **sizes), 5)
    decays, stays = train_apelr.parameter_groups(model, model.cfg)
    assert len(decays["params"]) == len(list(model.parameters())) and decays["weight_decay"] == 0.3
    assert stays["params"] == []
    ours = build_model(Config(**sizes), 5)
    assert len(train_apelr.parameter_groups(ours, ours.cfg)[1]["params"]) > 5


def nll(model, x, y, **options) -> float:
    return float(model.losses(x, y, terms=(), **options)["nll"].detach())


def test_evaluation_is_at_the_temperature_that_training_ends_with():
    sizes = dict(d_model=8, token_dim=8, num_plan_states=3, n_layers=1, chunk_size=4)
    torch.manual_seed(0)
    cooled = build_model(Config(plan_temperature_start=2.0, plan_temperature_end=0.5, **sizes), 7)
    still = build_model(Config(planner_temperature=0.5, **sizes), 7)
    still.load_state_dict(cooled.state_dict())
    x, y = torch.randint(7, (2, 3, 14)).unbind()
    assert nll(cooled, x, y) == pytest.approx(nll(still, x, y), rel=1e-6)
    assert nll(cooled, x, y, tau=2.0) == pytest.approx(nll(still, x, y, tau=2.0), rel=1e-6)
    assert nll(cooled, x, y, tau=2.0) != pytest.approx(nll(still, x, y), rel=1e-5)


@pytest.mark.parametrize("carry", [True, False])
def test_the_contrast_has_the_temperature_of_the_step_but_for_the_older_version_two(carry):
    model = build_model(Config(d_model=8, token_dim=8, num_plan_states=3, n_layers=1, chunk_size=4, compat="source",
                               carry_posterior=carry, planner_temperature=1.5, dropout=0.0), 7)  # fmt: skip
    x, y = torch.randint(7, (2, 3, 14), generator=torch.Generator().manual_seed(0)).unbind()
    model.requires_grad_(False)
    contrast = [float(model.losses(x, y, terms=("future_contrastive",), tau=tau)["future_contrastive"])
                for tau in (None, 1.5, 0.1)]  # fmt: skip
    assert contrast[0] == pytest.approx(contrast[1], rel=1e-6)
    assert (contrast[0] == pytest.approx(contrast[2], rel=1e-6)) != carry


def test_an_interval_of_zero_saves_with_the_evaluations(hub, capsys):
    path = written({"train": {"max_steps": 4, "eval_interval": 2, "save_interval": 0}, "device": "cpu"})
    prepare_data.main(asked_for(refused(capsys, path)))
    with warnings.catch_warnings(action="ignore"):
        train_apelr.main([path, "--keep_last=-1", "--preview_tokens=0"])
    assert sorted(p.name for p in Path("runs/x").glob("step_*.pt")) == ["step_2.pt", "step_4.pt"]
