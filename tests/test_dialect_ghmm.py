"""Simplexity's command lines, configuration files and checkpoints: train_ghmm.py takes them for what they are there."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import configurator
import prepare_data
import sample
import train_ghmm
from common.errors import CheckpointError
from configurator import configure
from sources.foreign import SIMPLEXITY
from sources.foreign_ghmm import ALIASES
from train_ghmm import Config

BUILD = "simplexity.generative_processes.builder.build_"
GRU = "simplexity.predictive_models.gru_rnn.build_gru_rnn"
OWN = "simplexity.predictive_models.pytorch_transformer.build_pytorch_transformer"


@pytest.fixture(autouse=True)
def without_pictures(in_a_folder_of_its_own, monkeypatch):
    monkeypatch.setattr(train_ghmm, "plot_run", lambda *args, **options: None)


def read(*words: str) -> Config:
    """The settings of a command line; what it says has no effect is no error here."""
    with warnings.catch_warnings(action="ignore"):
        return configure(Config, list(words), ALIASES, SIMPLEXITY)


def refused(capsys, *words: str) -> str:
    """The error line of a command line, behind what it is read as."""
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings(action="ignore"):
        train_ghmm.main(list(words))
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not line.startswith("note: ")]
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: "), lines
    assert not Path("out").exists()
    return errors[0]


def has(cfg: Config, **expected) -> bool:
    found = {name: getattr(cfg, name) for name in expected}
    assert found == expected
    return True


# ------------------------------------------------------------------------------------------------- command lines


def test_what_is_left_out_has_the_default_of_the_source(capsys):
    cfg = read("--dialect=simplexity")
    assert has(cfg, process="mess3", x=0.15, a=0.6, model="gru", one_hot=True, n_layers=4, d_model=64, batch_size=4)
    assert has(cfg, n_ctx=7, max_steps=10, lr=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.0, beta1=0.9)
    assert has(cfg, beta2=0.999, grad_clip=0.0, log_interval=1, eval_interval=2, save_interval=5, keep_last=-1, seed=0)
    assert has(cfg, carry_state=True, add_bos=False, init_scale=1.0, precision="fp32")
    assert capsys.readouterr().err.startswith("note: read as Simplexity (")
    assert read("--model=gru") == Config(model="gru") and read("predictive_model.x=1", "--dialect=none") == Config(x=1)


LINES = {  # of its READMEs and its documentation
    "training.num_steps=100 training.optimizer.instance.learning_rate=1e-2": {"max_steps": 100, "lr": 0.01},
    "training.num_train_steps=50000": {"max_steps": 50_000},
    "training.num_steps=500 training.optimizer.instance.lr=0.0005 device=cpu seed=42":
        {"max_steps": 500, "lr": 5e-4, "device": "cpu", "seed": 42},
    "train.num_steps=20000 train.optimizer.instance.learning_rate=0.0005": {"max_steps": 20_000, "lr": 5e-4},
    "training_data_generator=zero_one_random": {"process": "zero_one_random", "p": 0.5, "x": None, "a": None},
    "generative_process=rrxor": {"process": "rrxor", "p1": 0.5, "p2": 0.5, "x": None},
    "generative_process=rrxor generative_process.instance.pR1=0.25": {"p1": 0.25, "p2": 0.5},
    "training_data_generator=even_ones training_data_generator.instance.p=0.6": {"process": "even_ones", "p": 0.6},
    "generative_process=tom_quantum": {"process": "tom_quantum", "alpha": 1.0, "beta": 1.0},
    "generative_process=post_quantum": {"log_alpha": 1.0, "beta": 0.5},
    "generative_process=fanizza": {"alpha": 2000.0, "lamb": 0.49},
    "predictive_model.instance.num_layers=3 predictive_model.instance.hidden_size=128":
        {"model": "gru", "n_layers": 3, "d_model": 128},
    "predictive_model=small_rnn": {"model": "gru", "n_layers": 2, "d_model": 16},
    "training=medium": {"n_ctx": 63, "batch_size": 128, "max_steps": 10_000, "eval_interval": 1_000},
    "training=large training.batch_size=64": {"n_ctx": 99, "batch_size": 64, "max_steps": 1_000_000},
    "training=test": {"n_ctx": 15, "save_interval": 100, "keep_last": 0},
    "training=minimal predictive_model=tiny_transformer optimizer=pytorch_adam":
        {"n_ctx": 1, "batch_size": 1, "d_model": 1, "n_heads": 1, "act": "relu", "carry_state": False},
    "training=phase_change": {"save_interval": 1, "keep_last": -1, "max_steps": 120, "n_ctx": 99, "batch_size": 512},
    "training=full": {"n_ctx": 64, "batch_size": 64, "max_steps": 100_000, "eval_interval": 100, "log_interval": 10},
    "training.num_steps=3 --carry_state=false": {"carry_state": False},
    "predictive_model.instance.embedding_size=8": {"one_hot": False, "d_model": 8},
    "sequence_len=8 use_bos=true --dialect=none": {"n_ctx": 8, "add_bos": True, "model": "transformer"},
    "training/optimizer=adamw": {"weight_decay": 1e-4, "lr": 1e-3},
    "--config-name=experiment": {"model": "gru", "max_steps": 10_000, "batch_size": 128, "process": "mess3"},
    "--config-name=train_rnn": {"process": "nonergodic", "add_bos": True, "d_model": 16, "n_ctx": 100},
    "training.batch_size=7 --config-name=experiment": {"batch_size": 7, "max_steps": 10_000},
    "--config-name=transformerlens_mess3 training.num_steps=1000 training.batch_size=64": {
        "process": "mess3", "x": 0.05, "a": 0.85, "add_bos": True, "n_ctx": 6, "model": "transformer", "n_layers": 2,
        "n_heads": 2, "d_head": 32, "d_mlp": 256, "act": "gelu", "normalization": "LN", "max_steps": 1_000,
        "batch_size": 64, "seed": 42, "init_scale": 0.8, "writer_scale": 1.0, "carry_state": False},
    "training_data_generator=mess3_085 training_data_generator.use_bos=false": {"add_bos": False, "n_ctx": 7},
    "training_data_generator=mess3_085 training_data_generator.bos_token=null": {"add_bos": False, "n_ctx": 7},
    "training.sequence_len=12": {"n_ctx": 11},
    "training.sequence_len=12 generative_process.bos_token=3": {"n_ctx": 12, "add_bos": True},
    "training.sequence_len=12 generative_process.instance.add_bos_token=true": {"n_ctx": 11, "add_bos": True},
    "training.sequence_len=12 --n_ctx=5": {"n_ctx": 5},
    "predictive_model.instance.cfg.n_ctx=9": {"n_ctx": 9},
    "predictive_model=transformer_lens_2L2H predictive_model.instance.cfg.n_heads=4": {"n_heads": 4, "d_head": 32},
    "predictive_model=transformer_lens_2L2H predictive_model.instance.cfg.d_head=16 "
    "predictive_model.instance.cfg.n_heads=-1": {"n_heads": 4, "d_head": 16},
    "training.optimizer.instance.betas=[0.8,0.95]": {"beta1": 0.8, "beta2": 0.95},
    "training.optimizer.instance.b1=0.7 training.optimizer.instance.b2=0.98": {"beta1": 0.7, "beta2": 0.98},
    "training.optimizer.instance._target_=torch.optim.AdamW": {"weight_decay": 0.01},
    "training=medium training.optimizer.instance._target_=torch.optim.AdamW": {"weight_decay": 0.01},
    "training/optimizer=adamw training.optimizer.instance._target_=torch.optim.AdamW": {"weight_decay": 1e-4},
    "training.optimizer.instance._target_=optax.adamw training.optimizer.instance.weight_decay=0.3":
        {"weight_decay": 0.3},
    "training.validate_every=null training.log_every=null training.checkpoint_every=null training.num_steps=77":
        {"eval_interval": 77, "log_interval": 77, "save_interval": 77, "keep_last": 0},
    "training.validate_every=0": {"eval_interval": 10},
    "persistence.instance.directory=elsewhere": {"out_dir": "elsewhere"},
    "persistence.instance.base_dir=elsewhere": {"out_dir": "elsewhere"},
    "persister=local logging=print_logger": {"out_dir": "out/ghmm"},
    "predictive_model.load_checkpoint_step=10": {"load_checkpoint_step": 10},
    "training_data_generator.instance.initial_state=[1,0,0]": {"initial_state": [1.0, 0.0, 0.0], "carry_state": False},
    "validation.num_steps=3 validation.sequence_len=99 training.num_steps=4": {"max_steps": 4, "n_ctx": 7},
    "validation_data_generator.instance.process_name=rrxor predictive_model=gru_rnn": {"process": "mess3"},
    "logging.instance.tracking_uri=file:./mlruns logging.instance.experiment_name=x": {"model": "gru"},
    "predictive_model.instance.hidden_sizes=[32,32,32]": {"n_layers": 3, "d_model": 32},
    "generative_process@training_data_generator=rrxor": {"process": "rrxor", "x": None},
    "generative_process@validation_data_generator=rrxor training.num_steps=5": {"process": "mess3", "max_steps": 5},
    "evaluation@validation=medium training.num_steps=5": {"max_steps": 5, "n_ctx": 7},
    "logging=null persistence=null validation=null training.num_steps=5": {"max_steps": 5, "out_dir": "out/ghmm"},
    "--config-name=experiment.yaml": {"max_steps": 10_000},
    "optimizer=pytorch_adam generative_process=mess3": {"add_bos": True, "n_ctx": 8, "carry_state": False},
    "optimizer=pytorch_adam generative_process=mess3 generative_process.bos_token=null": {"add_bos": False, "n_ctx": 7},
    "predictive_model=transformer_lens_2L2H predictive_model.instance.cfg.normalization_type=null":
        {"normalization": "none"},
    "lr_scheduler=null training.num_steps=5": {"max_steps": 5, "schedule": "constant"},
    "predictive_model=pytorch_transformer": {"normalization": "none", "d_model": 128, "n_ctx": 16, "init_scale": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_of_the_source_means_what_it_means_there(line):
    assert has(read(*line.split()), **LINES[line])


HOOKED = "predictive_model=transformer_lens_2L2H "
REFUSALS = {
    "training_data_generator=my_custom_data": "Simplexity (configs/train_model.yaml: mess3, a GRU, Adam) has no",
    "training_data_generator=rpn_arithmetic": "arithmetic is no process of this page: choose",
    "training_data_generator=product_mess3x2": "products of processes is no process of this page",
    "predictive_model=medium_transformer":
        "Penzai's transformer (gated MLP, grouped heads) is no model of this page: choose",
    "predictive_model=gruformer": "choose predictive_model=gru_rnn or predictive_model=transformer_lens_2L2H",
    "predictive_model=gru_rn": "did you mean gru_rnn?",
    "predictive_model.instance._target_=my.Net": "my.Net is no model of this page",
    "generative_process.instance._target_=my.Process": "my.Process is no process of this page",
    "generative_process.eos_token=4": "eos_token=null",
    "generative_process.use_eos=true": "use_eos=false",
    "generative_process.bos_token=2": "the process has the tokens 0 to 2, so that its BOS is 3",
    HOOKED + "predictive_model.instance.cfg.d_vocab=9": "d_vocab = 9: the process has 3 tokens",
    HOOKED + "training.sequence_len=9": "n_ctx = 6 of the model, but sequence_len = 9 makes it read 8 tokens",
    HOOKED + "predictive_model.instance.cfg.attn_only=true": "attn_only=false",
    HOOKED + "predictive_model.instance.cfg.positional_embedding_type=shortformer": "only standard and rotary",
    HOOKED + "predictive_model.instance.cfg.init_mode=muP": "init_mode=gpt2",
    HOOKED + "predictive_model.instance.cfg.act_fn=solu_ln": "expected relu|gelu|silu",
    "predictive_model.instance.hidden_sizes=[32,16]": "all layers are as wide as each other",
    "training.optimizer.instance._target_=torch.optim.SGD": "torch.optim.SGD is not built here: Adam and AdamW are",
    "training.optimizer.instance._target_=torch.optim.Adam training.optimizer.instance.weight_decay=0.1":
        "added to the gradient",
    "training=medium training.optimizer.instance._target_=torch.optim.SGD": "torch.optim.SGD is not built here",
    "predictive_model=gru_rnn predictive_model.instance._target_=my.Net": "my.Net is no model of this page",
    "training.optimizer.instance.betas=0.9": "betas = 0.9: needs 2 values",
    "training.optimizer.instance.betas=[0.9,1]": "beta2 = 1.0: must be in [0, 1)",
    "generative_process.use_eos=maybe": "use_eos = maybe: not one of",
    "training.optimizer.instance.nesterov=true": "nesterov=false is plain Adam",
    "training.optimizer.instance.amsgrad=true": "amsgrad=false",
    "training.optimizer.instance.eps=1e-3": "eps = 1e-3: it is 1e-08 here",
    "lr_scheduler.instance.factor=0.5 training.num_steps=1": "schedule=cosine and warmup_steps instead",
    "lr_scheduler=linear_warmup training.num_steps=1": "lr_scheduler: not built here",
    "optimizer=pytorch_adam predictive_model=transformer": "of the newest layout bring a run's config.yaml",
    "generative_process.instance.process_names=[coin] generative_process.instance.process_kwargs=x":
        "process_kwargs = x: neither JSON nor a Python literal",
    "generative_process.instance.process_params={x:0.3}": "write each by its name, as process_params.x=0.15",
    "training.num_epochs=3": "training.num_epochs: no such setting",
    "training.sequence_len=1": "must be at least 1",
    "generative_process.instance.process_names=[coin,coin] generative_process.instance.process_weights=[1]":
        "not 2, 2, 1, 2",
    "--betas=0.9,0.99": "betas: no setting of ours; --dialect=simplexity",
    "--config-name=my_experiment": "has no 'my_experiment', did you mean experiment?",
    "--config-name=transformerlens_mess predictive_model=gru_rnn": "did you mean transformerlens_mess3?",
    "--config=x.yaml": "files go bare",
    "--cfg job": "--print_config prints all settings",
    "predictive_model.load_checkpoint_step=10": "step_10.pt",
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSALS)
def test_what_cannot_be_what_it_is_there_is_one_sentence(line, capsys):
    assert REFUSALS[line] in refused(capsys, *line.split())


def test_every_name_of_a_group_is_settings_or_a_sentence(capsys):
    for group, names in SIMPLEXITY[0].groups.items():
        for name in names:
            word = f"--config-name={name}" if group == "config_name" else f"{group}={name}"
            if names[name] == {} and group in ("training_data_generator", "generative_process", "predictive_model"):
                assert "of this page: choose" in refused(capsys, word)
            elif "@" not in group:
                assert read(word).batch_size >= 1


def test_several_runs_are_left_to_sweep(monkeypatch):
    called = []

    def call(program: str, command: list[str]) -> None:  # never returns
        called.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(configurator.os, "execv", call)
    with pytest.raises(SystemExit):
        train_ghmm.main(["--config-name=experiment", "--multirun", "training.batch_size=32,64"])
    assert called[0][2:] == [train_ghmm.__file__, "--config-name=experiment", "training.batch_size=32,64"]


def test_what_is_kept_elsewhere_is_told(capsys):
    read("persister=s3", "logging=mlflow_logger", "predictive_model.instance.seed=5")
    told = capsys.readouterr().err
    assert "checkpoints are written to out_dir on this machine, as no config.ini here names a bucket" in told
    assert "--tensorboard and --wandb log as well" in told and "one seed is for model and data: seed = 0" in told
    read("seed=3", "training.seed=5")
    assert "one seed is for model and data: seed = 5" in capsys.readouterr().err
    read("persister=local", "logging=print_logger", "predictive_model.instance.seed=0")
    assert capsys.readouterr().err.count("\n") == 1  # what it is read as


@pytest.mark.parametrize(("words", "s3_config"), [
    ("persister=s3", "config.ini"),
    ("persister=s3_eqx_persister persister.instance.config_filename=my.ini", "my.ini"),
    ("persistence=s3_persister persistence.instance.filename=older.ini", "older.ini"),
    ("persister=s3 persister.config_filename=my.ini s3_config=", ""),
    ("persister=local persister.filename=model.eqx", ""),
])  # fmt: skip
def test_a_persister_to_s3_is_the_bucket_of_its_file(capsys, words, s3_config):
    Path("config.ini").write_text("[aws]\nprofile_name = default\n[s3]\nbucket = b\nprefix = p\n")
    assert read(*words.split()).s3_config == s3_config
    told = f"note: s3_config = {s3_config}: out_dir is copied to s3://BUCKET/PREFIX/{{out_dir}}"
    assert (told in capsys.readouterr().err) == bool(s3_config)


# ------------------------------------------------------------------------------------------ configuration files

RESOLVED = f"""
training_data_generator:
  name: mess3
  vocab_size: 3
  instance:
    _target_: {BUILD}hidden_markov_model
    process_name: mess3
    x: 0.1
    a: 0.7
validation_data_generator:
  instance: {{process_name: rrxor, pR1: 0.1, pR2: 0.2}}
predictive_model:
  name: gru_rnn
  instance:
    _target_: {GRU}
    vocab_size: ${{training_data_generator.vocab_size}}
    num_layers: 2
    hidden_size: 8
    seed: ${{seed}}
  load_checkpoint_step: null
persistence:
  instance: {{_target_: simplexity.persistence.s3_persister.S3Persister.from_config, prefix: "${{run_name}}"}}
training:
  optimizer:
    name: adamw
    instance: {{_target_: optax.adamw, learning_rate: 0.002, b1: 0.8, b2: 0.99, eps: 1e-8, nesterov: false}}
  seed: ${{seed}}
  sequence_len: 8
  batch_size: 4
  num_steps: 3
  log_every: 1
  validate_every: null
  checkpoint_every: 2
validation: {{seed: 1, sequence_len: 99, batch_size: 9, num_steps: 5, log_every: -1}}
hydra:
  sweeper:
    params: {{training.batch_size: "choice(1, 2)", training.optimizer.instance.learning_rate: "interval(0, 1)"}}
seed: 3
experiment_name: ${{predictive_model.name}}_${{seed}}
run_name: ${{now:%Y}}_${{experiment_name}}
"""


def test_a_resolved_file_is_the_run_that_it_was(capsys):
    Path("config.yaml").write_text(RESOLVED)
    cfg = read("config.yaml")
    assert has(cfg, process="mess3", x=0.1, a=0.7, model="gru", n_layers=2, d_model=8, lr=2e-3, beta1=0.8, beta2=0.99)
    assert has(cfg, weight_decay=1e-4, n_ctx=7, batch_size=4, max_steps=3, eval_interval=3, save_interval=2, seed=3)
    assert "written to out_dir on this machine, as no config.ini here names a bucket" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="without effect here: .*validation_data_generator.*hydra"):
        found = train_ghmm.main(["config.yaml", "--max_words=100", "--eval_sequences=16", "--out_dir=run"])
    assert found["steps"] == 3 and math.isfinite(found["loss"])
    assert {path.name for path in Path("run").glob("step_*.pt")} == {"step_2.pt", "step_3.pt"}
    ours = train_ghmm.main(["--process=mess3", "--x=0.1", "--a=0.7", "--model=gru", "--one_hot", "--n_layers=2",
                            "--d_model=8", "--lr=2e-3", "--beta1=0.8", "--beta2=0.99", "--weight_decay=1e-4",
                            "--n_ctx=7", "--batch_size=4", "--max_steps=3", "--seed=3", "--schedule=constant",
                            "--warmup_steps=0", "--grad_clip=0", "--carry_state", "--precision=fp32",
                            "--max_words=100", "--eval_sequences=16", "--out_dir=ours"])  # fmt: skip
    assert found["loss_by_position"] == ours["loss_by_position"]


def test_a_group_on_the_command_line_replaces_that_of_a_file():
    Path("config.yaml").write_text(RESOLVED)
    assert has(read("config.yaml", "training_data_generator=rrxor"), process="rrxor", p1=0.5, x=None, a=None, lr=2e-3)
    cfg = read("config.yaml", "predictive_model=transformer_lens_2L2H", "training.sequence_len=7")
    assert has(cfg, model="transformer", n_layers=2, d_model=64, d_head=32, n_ctx=6, max_steps=3)


def test_the_defaults_list_of_a_file_is_followed():
    Path("config.yaml").write_text("defaults:\n  - _self_\n  - generative_process@training_data_generator: mess3_085\n"
                                   "  - predictive_model: small_rnn\n  - logging: print_logger\n"
                                   "  - override hydra/sweeper: optuna\n  - training: medium\nseed: 9\n")
    assert has(read("config.yaml"), x=0.05, a=0.85, d_model=16, batch_size=128, seed=9, add_bos=True, n_ctx=64)


def test_sections_of_a_file_of_ours_are_ours(capsys):
    Path("ours.yaml").write_text("training: {lr: 0.1, batch_size: 64}\nnetwork: {model: gru}\n")
    assert read("ours.yaml") == Config(lr=0.1, batch_size=64, model="gru") and not capsys.readouterr().err
    Path("theirs.yaml").write_text("training: {batch_size: 64, seed: 1}\n")
    assert has(read("theirs.yaml"), batch_size=64, max_steps=10, seed=1)


def test_what_hydra_alone_knows_is_left_to_the_default():
    text = "directory: ${oc.env:CHECKPOINT_DIR,${hydra:runtime.output_dir}/checkpoints}"
    Path("config.yaml").write_text(f"persistence:\n  instance:\n    {text}\ntraining:\n  num_steps: 3\n")
    with pytest.warns(UserWarning, match="without effect here: persistence.instance.directory"):
        assert has(configure(Config, ["config.yaml"], ALIASES, SIMPLEXITY), out_dir="out/ghmm", max_steps=3)


def test_parts_that_a_file_goes_without_are_null():
    Path("config.yaml").write_text("training: {num_steps: 3}\nlogging: null\npersistence: null\nvalidation: null\n"
                                   "predictive_model: {instance: {_target_: null}}\nlr_scheduler: null\n")  # fmt: skip
    assert has(read("config.yaml"), max_steps=3, model="gru", schedule="constant")


ODD = {
    "defaults: [5, {training: [a]}]\ntraining: {num_steps: 4}": "has no ['a'], there is small, medium",
    "defaults: [{predictive_model: gru_rnn}, {lr_scheduler: linear_warmup}]": "lr_scheduler: not built here",
    "generative_process: {instance: {components: [{process_name: mess3, process_params: 5}]}}":
        "process_params = [5]: not a dict",
    "generative_process: {instance: {process_names: [coin], process_weights: [x]}}":
        "process_weights = ['x']: not a number",
    "predictive_model: {instance: {_target_: 5}}": "5 is no model of this page",
    "training: {batch_size: [1, 2]}": "training.batch_size (batch_size): expected int >= 1",
    "training: 5": "training: no such setting",
}  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_a_file_of_odd_values_is_one_sentence(text, capsys):
    Path("config.yaml").write_text(text)
    assert ODD[text] in refused(capsys, "config.yaml")


NEWEST = f"""
generative_process:
  instance:
    {{_target_: {BUILD}hidden_markov_model, process_name: mess3, process_params: {{x: 0.2, a: 0.5}}, device: cpu}}
  base_vocab_size: ???
  bos_token: ???
  eos_token: null
  vocab_size: ???
predictive_model:
  name: hooked_transformer
  instance:
    _target_: transformer_lens.HookedTransformer
    cfg:
      _target_: transformer_lens.HookedTransformerConfig
      d_model: 12
      d_head: 4
      n_layers: 1
      n_ctx: 128
      d_vocab: ???
      act_fn: silu
      normalization_type: NORM
      positional_embedding_type: rotary
      device: cpu
      seed: ${{seed}}
optimizer:
  instance: {{_target_: torch.optim.Adam, lr: 0.01, betas: [0.8, 0.9], weight_decay: 0.0}}
training: {{num_steps: 20, batch_size: 6, sequence_len: 5, log_cheap_every: 2, log_expensive_every: 9,
           evaluate_every: 4, checkpoint_every: 10}}
tags: {{retention: temp}}
device: auto
seed: 0
"""


def test_the_newest_layout_starts_its_process_anew_for_each_batch(capsys):
    Path("config.yaml").write_text(NEWEST.replace("NORM", "LNPre"))
    cfg = read("config.yaml")
    assert has(cfg, x=0.2, a=0.5, add_bos=True, n_ctx=5, carry_state=False, model="transformer", n_layers=1, n_heads=3)
    assert has(cfg, d_model=12, d_head=4, d_mlp=48, act="silu", normalization="LNPre", positional="rope", lr=0.01)
    assert has(cfg, beta1=0.8, beta2=0.9, log_interval=2, eval_interval=4, save_interval=10, device="auto", seed=0)
    assert "anew" not in capsys.readouterr().err
    Path("config.yaml").write_text(NEWEST.replace("NORM", "null").replace("bos_token: ???", "bos_token: null"))
    assert has(read("config.yaml"), add_bos=False, n_ctx=4, normalization="none", carry_state=False)


@pytest.mark.parametrize("text", [
    "_target_: BUILDnonergodic_hidden_markov_model\n    process_names: [rrxor, coin]\n    process_weights: [1, 3]\n"
    "    process_kwargs: [{pR1: 0.25, pR2: 0.5}, {p: 0.9}]\n    vocab_maps: [[0, 1], [1, 2]]\n",
    "_target_: BUILDnonergodic_process_from_spec\n    component_weights: [1, 3]\n    vocab_maps: [[0, 1], [1, 2]]\n"
    "    components:\n      - {component_type: hmm, process_name: rrxor, process_params: {pR1: 0.25, pR2: 0.5}}\n"
    "      - {component_type: hmm, process_name: coin, process_params: {p: 0.9}}\n"])  # fmt: skip
def test_a_mixture_of_the_source_is_the_mixture_here(text):
    Path("config.yaml").write_text("generative_process:\n  instance:\n    " + text.replace("BUILD", BUILD))
    cfg = read("config.yaml")
    assert cfg.process == "nonergodic" and cfg.components == [
        {"process": "rrxor", "weight": 1.0, "vocab_map": [0, 1], "p1": 0.25, "p2": 0.5},
        {"process": "coin", "weight": 3.0, "vocab_map": [1, 2], "p": 0.9}]  # fmt: skip
    process = train_ghmm.build_process(cfg)
    # 0 is rrxor's first bit, from any of its six phases; 1 is shared; 2 is the coin's tail alone.
    assert process.vocab_size == 3 and math.isclose(process.word_probability([2]), 0.75 * 0.1, rel_tol=1e-9)


def test_a_mixture_s_lists_may_be_typed():
    cfg = read("training_data_generator=dursley_wonka", "training_data_generator.instance.process_weights=[0.3,0.7]")
    assert [part["weight"] for part in cfg.components] == [0.3, 0.7] and cfg.components[1]["vocab_map"] == [0, 1, 2, 4]
    assert train_ghmm.build_process(cfg).vocab_size == 6  # five words and a BOS


def test_matrices_of_a_file_are_the_process():
    target = "simplexity.generative_processes.hidden_markov_model.HiddenMarkovModel"
    Path("config.yaml").write_text(f"generative_process:\n  instance:\n    _target_: {target}\n"
                                   "    transition_matrices: [[[0.3]], [[0.7]]]\n")
    process = train_ghmm.build_process(read("config.yaml"))
    assert math.isclose(process.word_probability([1]), 0.7, rel_tol=1e-9)


@pytest.mark.parametrize("there", [False, True])
def test_a_device_of_the_model_that_is_not_there_is_no_demand(there, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    Path("config.yaml").write_text("predictive_model: {instance: {cfg: {device: cuda}}}")
    assert read("config.yaml").device == ("cuda" if there else "auto")


# ------------------------------------------------------------------------------------------------------ the model


def test_initial_weights_of_a_transformer_are_those_of_the_source():
    cfg = read("predictive_model=transformer_lens_2L2H")
    torch.manual_seed(0)
    model = train_ghmm.build_model(cfg, 3)
    for name, weight in model.state_dict().items():
        if weight.ndim == 2 and weight.numel() > 2_000:
            assert abs(float(weight.std()) / (0.8 / 8) - 1) < 0.1, name
    cfg = read("predictive_model=transformer_lens_2L2H", "predictive_model.instance.cfg.initializer_range=0.02")
    weight = train_ghmm.build_model(cfg, 3).blocks[0].mlp_out.weight.detach()
    assert abs(float(weight.std()) / 0.02 - 1) < 0.1


@pytest.mark.parametrize("kind", ["LNPre", "RMSPre"])
def test_a_pre_normalization_learns_no_scale(kind):
    norm = train_ghmm.build_norm(Config(normalization=kind, d_model=6, norm_eps=0.5))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    centred = x - x.mean(-1, keepdim=True) if kind == "LNPre" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt()
    assert not list(norm.parameters()) and torch.allclose(norm(x), expected, atol=1e-6)


def test_the_first_layer_of_a_one_hot_network_reads_tokens_alone():
    model = train_ghmm.build_model(Config(model="gru", one_hot=True, n_layers=2, d_model=5), 3)
    assert model.layers[0].weight_ih_l0.shape == (15, 3)
    assert sum(p.numel() for p in model.parameters()) == 15 * (3 + 5 + 2) + 15 * (5 + 5 + 2) + 3 * 5 + 3
    _, activations = model(torch.tensor([[2, 0]]))
    assert activations[0].tolist() == [[[0, 0, 1], [1, 0, 0]]] and activations[2].shape == (1, 2, 5)


# --------------------------------------------------------------------------------------------------- checkpoints


def hooked_weights(V=4, D=8, H=2, C=4, M=12, layers=2, n_ctx=9, norm="LN", rotary=False, seed=0) -> dict:
    """A state dict as HookedTransformer names and shapes it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator) / 2

    weights = {"embed.W_E": draw(V, D), "unembed.W_U": draw(D, V), "unembed.b_U": draw(V)}
    if not rotary:
        weights["pos_embed.W_pos"] = draw(n_ctx, D)
    parts = {"LN": "wb", "RMS": "w"}.get(norm, "")
    norms = ["ln_final"]
    for i in range(layers):
        block = f"blocks.{i}."
        for kind in "QKV":
            weights[f"{block}attn.W_{kind}"] = draw(H, D, C)
            weights[f"{block}attn.b_{kind}"] = draw(H, C)
        weights |= {f"{block}attn.W_O": draw(H, C, D), f"{block}attn.b_O": draw(D), f"{block}mlp.W_in": draw(D, M),
                    f"{block}mlp.b_in": draw(M), f"{block}mlp.W_out": draw(M, D), f"{block}mlp.b_out": draw(D),
                    f"{block}attn.mask": torch.ones(n_ctx, n_ctx).tril().bool()}  # fmt: skip
        if rotary:
            weights[f"{block}attn.rotary_sin"] = draw(n_ctx, C)
        norms += [f"{block}ln1", f"{block}ln2"]
    for name in norms:
        for part in parts:
            weights[f"{name}.{part}"] = 1 + draw(D)
    return weights


def hooked_logits(weights: dict, tokens: torch.Tensor, norm: str, act) -> torch.Tensor:
    """What a HookedTransformer makes of tokens [B, T], in einsums over its own matrices."""
    w = {name: value.double() for name, value in weights.items()}
    T = tokens.shape[1]
    x = w["embed.W_E"][tokens]
    if "pos_embed.W_pos" in w:
        x = x + w["pos_embed.W_pos"][:T]

    def normed(x, name):
        if norm.startswith("LN"):
            x = x - x.mean(-1, keepdim=True)
        if norm != "none":
            x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w.get(f"{name}.w", 1) + w.get(f"{name}.b", 0)

    def turned(x):  # [B, T, H, C]: the halves of a head turn together
        C = x.shape[-1]
        if "pos_embed.W_pos" in w:
            return x
        angle = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, C, 2) / C)
        turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)[:, None]
        z = torch.complex(x[..., : C // 2], x[..., C // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    for i in range(2):
        a, m = f"blocks.{i}.attn.", f"blocks.{i}.mlp."
        y = normed(x, f"blocks.{i}.ln1")
        q, k, v = (torch.einsum("btd,hdc->bthc", y, w[f"{a}W_{kind}"]) + w[f"{a}b_{kind}"] for kind in "QKV")
        scores = torch.einsum("bqhc,bkhc->bhqk", turned(q), turned(k)) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
        z = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v)
        x = x + torch.einsum("bqhc,hcd->bqd", z, w[f"{a}W_O"]) + w[f"{a}b_O"]
        y = normed(x, f"blocks.{i}.ln2")
        x = x + act(y @ w[f"{m}W_in"] + w[f"{m}b_in"]) @ w[f"{m}W_out"] + w[f"{m}b_out"]
    return normed(x, "ln_final") @ w["unembed.W_U"] + w["unembed.b_U"]


def put(weights, norm: str = "LN", positional: str = "standard", act: str = "gelu", folder: str = "run") -> Path:
    """A checkpoint where the source puts it, STEP/model.pt, under the config.yaml of its run."""
    path = Path(folder, "40", "model.pt")
    path.parent.mkdir(parents=True)
    torch.save(weights, path)
    path.parents[1].joinpath("config.yaml").write_text(
        "generative_process: {instance: {process_name: mess3, x: 0.1, a: 0.7}, bos_token: 3}\npredictive_model:\n"
        f"  instance: {{_target_: transformer_lens.HookedTransformer, cfg: {{act_fn: {act}, n_ctx: 9, "
        f"normalization_type: {norm}, positional_embedding_type: {positional}, n_layers: 2, d_model: 8, d_head: 4, "
        "d_mlp: 12}}\n"
        "training: {sequence_len: 6}\n")
    return path


@pytest.mark.parametrize("norm, positional, act", [
    ("LN", "standard", "gelu"), ("LNPre", "rotary", "silu"), ("RMS", "rotary", "relu"), ("RMSPre", "standard", "silu"),
    ("none", "standard", "relu")])  # fmt: skip
def test_a_hooked_transformer_gives_the_same_logits_here(norm, positional, act):
    weights = hooked_weights(norm=norm, rotary=positional == "rotary")
    path = put(weights, "null" if norm == "none" else norm, positional, act)
    cfg, process, model, step = train_ghmm.load_run(path, "cpu")
    assert has(cfg, n_layers=2, n_heads=2, d_head=4, d_mlp=12, n_ctx=6, normalization=norm, act=act, add_bos=True)
    assert step == 40 and process.vocab_size == 4
    tokens = torch.randint(4, (5, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits, _ = model.double()(tokens)
    expected = hooked_logits(weights, tokens, norm, getattr(F, act))
    assert float(expected.std()) > 0.5 and float((logits - expected).abs().max()) < 1e-5


def test_weights_are_found_inside_of_what_wraps_them():
    plain = hooked_weights(norm="LN", rotary=False)
    path = put(plain, "LN", "standard", "relu")
    expected = train_ghmm.load_run(path, "cpu")[2].state_dict()
    wrapped = {f"_orig_mod.module.model.{name}": weight for name, weight in plain.items()}
    for contents in ({"model_state_dict": plain}, {"state_dict": plain}, wrapped):
        torch.save(contents, path)
        found = train_ghmm.load_run(path, "cpu")[2].state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_hooked_transformer_of_transformer_lens_gives_the_same_logits_here():
    lens = pytest.importorskip("transformer_lens", reason="pip install 'transformer-lens<4'")
    settings = {"n_layers": 2, "d_model": 8, "d_head": 4, "n_heads": 2, "d_mlp": 12, "n_ctx": 9, "d_vocab": 4}
    with warnings.catch_warnings(action="ignore"):
        theirs = lens.HookedTransformer(lens.HookedTransformerConfig(act_fn="gelu", device="cpu", seed=1, **settings))
    for parameter in theirs.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    _, _, model, _ = train_ghmm.load_run(put(theirs.state_dict()), "cpu")
    tokens = torch.randint(4, (5, 6))
    with torch.no_grad():
        assert torch.allclose(model(tokens)[0], theirs(tokens), atol=1e-5)


def test_a_checkpoint_of_the_source_s_own_transformer_is_read(capsys):
    hooked = {name: value for name, value in hooked_weights(norm="none").items() if "mask" not in name}
    own = {}
    for name, value in hooked.items():
        weight = name.rsplit(".", 1)[1]
        if weight.startswith("b_") and "mlp" not in name:
            continue  # it has none
        if weight == "W_O":
            value = value.flatten(0, 1)  # [H C, D]
        own[name] = value.mT.contiguous() if weight[2:] in ("Q", "K", "V", "O", "E", "in", "out") and value.ndim > 1 \
            else value
    path = put(own, "null", act="relu")
    text = Path("run/config.yaml").read_text().replace("transformer_lens.HookedTransformer", OWN)
    Path("run/config.yaml").write_text(text)
    _, _, model, _ = train_ghmm.load_run(path, "cpu")
    tokens = torch.randint(4, (5, 6), generator=torch.Generator().manual_seed(2))
    without = {name: value * (".b_" not in name or "mlp" in name) for name, value in hooked.items()}
    with torch.no_grad():
        logits, _ = model.double()(tokens)
    assert float((logits - hooked_logits(without, tokens, "none", F.relu)).abs().max()) < 1e-5


def test_an_imported_checkpoint_is_sampled_and_analysed_as_a_run(capsys):
    path = put(hooked_weights())
    told = prepare_data.main(["import", str(path), "--out_dir=imported"])
    assert told["experiment"] == "ghmm" and told["step"] == 40
    assert "python train_ghmm.py --analyze=imported" in capsys.readouterr().out
    theirs = sample.main([str(path), "--num_samples=2"])
    ours = sample.main(["imported", "--num_samples=2"])
    assert ours == theirs
    assert math.isfinite(train_ghmm.main(["--analyze=imported", "--max_words=100"])["loss"])
    assert configure(Config, ["imported/config.json"], ALIASES, SIMPLEXITY).n_ctx == 6


def gru_leaves(V=3, H=5, layers=2, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = []
    width = V
    for _ in range(layers):
        shapes += [(3 * H, width), (3 * H, H), (3 * H,), (H,)]
        width = H
    return [rng.normal(size=shape).astype(np.float32) for shape in [*shapes, (V, H), (V,)]]


def gru_logits(leaves: list[np.ndarray], tokens: list[int]) -> np.ndarray:
    """What Equinox's cells make of one-hot tokens."""
    *cells, W, b = leaves
    xs = list(np.eye(W.shape[0])[tokens])
    for i in range(0, len(cells), 4):
        W_i, W_h, bias, bias_n = cells[i : i + 4]
        h = np.zeros(len(bias_n))
        for t, x in enumerate(xs):
            i_r, i_z, i_n = np.split(W_i @ x + bias, 3)
            h_r, h_z, h_n = np.split(W_h @ h, 3)
            r, z = 1 / (1 + np.exp(-(i_r + h_r))), 1 / (1 + np.exp(-(i_z + h_z)))
            n = np.tanh(i_n + r * (h_n + bias_n))
            h = n + z * (h - n)
            xs[t] = h
    return np.stack([W @ x + b for x in xs])


def put_leaves(leaves: list[np.ndarray], config: bool = True) -> Path:
    path = Path("run/7/model.eqx")
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        for leaf in leaves:
            np.save(file, leaf)
    if config:
        Path("run/.hydra").mkdir()
        Path("run/.hydra/config.yaml").write_text(
            "training_data_generator: {instance: {process_name: mess3, x: 0.1, a: 0.7}}\ntraining: {sequence_len: 6}\n")
    return path


def test_a_gru_of_equinox_gives_the_same_logits_here():
    leaves = gru_leaves()
    path = put_leaves(leaves)
    cfg, _, model, step = train_ghmm.load_run(path, "cpu")
    assert step == 7 and has(cfg, model="gru", one_hot=True, n_layers=2, d_model=5, n_ctx=5)
    tokens = [2, 0, 1, 1, 0]
    with torch.no_grad():
        logits = model(torch.tensor([tokens]))[0][0].numpy()
    assert np.abs(logits - gru_logits(leaves, tokens)).max() < 1e-5
    assert prepare_data.main(["import", str(path), "--out_dir=imported"])["step"] == 7


class Evil:
    def __reduce__(self):
        return (Path("was_here").touch, ())


def test_an_eqx_file_runs_nothing():
    path = put_leaves(gru_leaves())
    with open(path, "ab") as file:
        np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        train_ghmm.load_run(path, "cpu")
    assert not Path("was_here").exists()


def damaged(what: str) -> Path:
    """A checkpoint that is not what it should be."""
    if what in ("config", "torn"):
        path = put_leaves(gru_leaves(), config=what != "config")
        if what == "torn":
            path.write_bytes(path.read_bytes()[:-9])
        return path
    if what == "leaves":
        return put_leaves(gru_leaves()[:-1])
    if what == "tokens":
        return put_leaves(gru_leaves(V=4))
    if what == "attention":
        return put({name: value for name, value in hooked_weights().items() if "mlp" not in name})
    return put(hooked_weights(norm="RMS" if what == "RMS" else "none", n_ctx=3 if what == "rows" else 9),
               "LNPre" if what == "rows" else "LN")  # fmt: skip


@pytest.mark.parametrize("what, words", [
    ("config", "without the config.yaml of its run"), ("torn", "is damaged or no checkpoint"),
    ("leaves", "leaves of a model that is not built here"), ("tokens", "a process of 3 tokens, the weights 4"),
    ("attention", "no weights blocks.0.mlp.W_in"), ("RMS", "normalization = LN, the weights RMS"),
    ("none", "normalization = LN, the weights none that is learned"), ("rows", "n_ctx = 6, the weights 3"),
])
def test_a_checkpoint_that_does_not_fit_is_one_sentence_and_nothing_is_written(what, words, capsys):
    path = damaged(what)
    for main, line in ((prepare_data.main, ["import", str(path), "--out_dir=new"]), (sample.main, [str(path)])):
        with pytest.raises(SystemExit) as stop:
            main(line)
        errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
        assert stop.value.code == 2 and len(errors) == 1 and words in errors[0]
    assert not Path("new").exists()


def test_a_folder_of_penzai_is_refused(capsys):
    Path("7").mkdir()
    Path("7/_METADATA").write_text("{}")
    with pytest.raises(SystemExit):
        prepare_data.main(["import", "7"])
    assert "is a checkpoint of Penzai (Orbax), whose networks are not built here" in capsys.readouterr().err
