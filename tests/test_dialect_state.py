"""Commands and files of arc-state and SmolState: what they mean there is what they mean here."""

import importlib.util
import json
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train_state
from common import checkpoint
from configurator import configure
from sources.foreign import STATE
from sources.foreign_state import source_settings, source_state_dict
from sources.foreign_state_settings import ALIASES, command
from sources.h5ad import write_h5ad
from train_state import Config

ROOT = Path(__file__).resolve().parents[1]
TOML = "data.kwargs.toml_config_path=x.toml"
pytestmark = [pytest.mark.usefixtures("quickly"), pytest.mark.filterwarnings("ignore:settings without effect")]


def read(*words: str) -> Config:
    """The settings that a command line means."""
    return configure(Config, command(" ".join(words).split()), ALIASES, STATE)


def refused(capsys, line: str) -> str:
    """The one error line of a command, beside which there may be notes."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train_state.main(shlex.split(line))
    told = [row for row in capsys.readouterr().err.splitlines() if not row.startswith("note: ")]
    assert exit_.value.code == 2 and len(told) == 1 and told[0].startswith("error: "), told
    return told[0]


def differs(cfg: Config, expected: dict) -> dict:
    """{setting: (what it is, what it should be)} of those that differ."""
    return {name: (getattr(cfg, name), value) for name, value in expected.items() if getattr(cfg, name) != value}


# ---------------------------------------------------------------------------------------------------- absent keys

# By reading State's configs/config.yaml and what its code and cell-load add.
OF_STATE = {
    "pert_col": "gene", "cell_type_key": "cell_type", "batch_col": "gem_group", "control_pert": "DMSO_TF",
    "embed_key": None, "output_space": "all", "strict": False, "basal_mapping_strategy": "random", "n_basal_samples": 1,
    "should_yield_control_cells": True, "map_controls": True, "downsample_cells": None, "val_fraction": 0.0,
    "zeroshot_controls": True, "cell_set_len": 512, "d_model": 768, "n_layers": 8, "n_heads": 12, "n_kv_heads": 12,
    "d_head": 64, "d_mlp": 3072, "n_encoder_layers": 1, "n_decoder_layers": 1, "use_basal_projection": True,
    "transformer_backbone_key": "llama", "bidirectional_attention": True, "rotary": False, "dropout": 0.1,
    "attention_dropout": 0.0, "predict_residual": True, "pert_norm": False, "batch_encoder": False, "loss": "energy",
    "distributional_loss": "energy", "blur": 0.05, "decoder_hidden_dims": [1024, 1024, 512], "lora": False,
    "optimizer": "adam", "schedule": "constant", "warmup_steps": 0, "lr": 1e-4, "batch_size": 16, "grad_accum": 1,
    "grad_clip": 10.0, "max_steps": 400_000, "eval_interval": 2000, "log_interval": 50, "seed": 42,
    "confidence_weight": 0.01, "confidence_per_set": True, "compat_relu": True, "precision": "fp32",
    "matmul_precision": "medium", "out_dir": "debugging/debug", "wandb": False, "resume": "auto",
    "save_interval": 2000, "eval_sentences": 1_000_000,
}  # fmt: skip
OF_SMOLSTATE = OF_STATE | {
    "pert_col": "target_gene", "batch_col": "batch_var", "control_pert": "non-targeting", "output_space": "gene",
    "zeroshot_controls": False, "toml_config_path": "starter.toml", "cell_set_len": 256, "d_model": 672, "n_layers": 6,
    "d_head": 84, "d_mlp": 2688, "n_encoder_layers": 4, "n_decoder_layers": 4, "use_basal_projection": False,
    "gene_decoder_bool": False, "pert_norm": True, "optimizer": "adamw", "schedule": "cosine", "min_lr": 1e-6,
    "weight_decay": 5e-4, "batch_size": 8, "max_steps": 10_000, "log_interval": 100, "confidence_weight": 0.1,
    "confidence_per_set": False, "out_dir": "out/smolstate_run", "matmul_precision": "highest",
}  # fmt: skip


@pytest.mark.parametrize("line", [f"tx train {TOML}", f"state tx train {TOML}", TOML, f"--dialect=state {TOML}",
                                  f"train --dialect=state {TOML}", f"model=state training=default {TOML}",
                                  f"data=perturbation wandb=default {TOML}"])
def test_what_a_command_of_state_leaves_out_is_states_default(line, capsys):
    assert differs(read(line), OF_STATE | {"toml_config_path": "x.toml"}) == {}
    told = capsys.readouterr().err
    assert "note: read as State (arc-state 0.11.1): absent keys take its defaults" in told
    assert "note: matmul_precision = medium, as State sets it" in told
    assert read(f"{line} matmul_precision=highest").matmul_precision == "highest"
    assert "matmul_precision" not in capsys.readouterr().err


@pytest.mark.parametrize("line", ["train", "smolstate train", "--dialect=smolstate", "train --model state_sm"])
def test_what_a_command_of_smolstate_leaves_out_is_smolstates_default(line, capsys):
    assert differs(read(line), OF_SMOLSTATE) == {}
    assert "note: read as SmolState: absent keys" in capsys.readouterr().err


def test_our_own_settings_stay_ours(capsys):
    ours = {name: getattr(Config(), name) for name in Config.__dataclass_fields__}
    assert differs(read("--d_model=64", "n_layers=2"), ours | {"d_model": 64, "n_layers": 2}) == {}
    # Our own files too, whatever names of the source follow them.
    cfg = read(str(ROOT / "config/state_sm.py"), "training.max_steps=7", TOML)
    assert (cfg.control_pert, cfg.embed_key, cfg.max_steps, cfg.val_fraction) == ("non-targeting", "X_hvg", 7, 0.1)
    cfg = read("--dialect=none", TOML, "training.lr=1e-5")
    assert (cfg.d_model, cfg.lr, cfg.optimizer) == (Config.d_model, 1e-5, "adamw")
    assert "read as" not in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- models

SPEC = {  # hidden, layers, d_mlp, heads, head_dim, set, MLP layers
    "state": (768, 8, 3072, 12, 64, 512, 1), "tahoe_llama_62089464": (696, 8, 2784, 12, 58, 512, 4),
    "state_sm": (672, 4, 2688, 8, 84, 128, 4), "state_lg": (1488, 6, 5952, 12, 124, 512, 4),
    "tahoe_llama_212693232": (1488, 6, 5952, 12, 124, 512, 4), "tahoe_best": (1440, 4, 4416, 12, 120, 512, 4),
    "tahoe_llama_58562784": (1104, 4, 4416, 12, 92, 512, 4), "pertsets": (328, 8, 1312, 8, None, 512, 4),
    "replogle_llama_21712320": (672, 4, 2688, 12, 56, 64, 4), "replogle_llama_best": (672, 4, 2688, 8, 84, 64, 4),
}  # fmt: skip
SMOL = (672, 6, 2688, 12, 84, 256, 4)


def sizes(cfg: Config) -> tuple:
    assert cfg.n_decoder_layers == cfg.n_encoder_layers and cfg.n_kv_heads in (None, cfg.n_heads)
    assert cfg.attention_dropout == 0 and not cfg.lora and cfg.bidirectional_attention and not cfg.rotary
    return (cfg.d_model, cfg.n_layers, cfg.d_mlp, cfg.n_heads, cfg.d_head, cfg.cell_set_len, cfg.n_encoder_layers)


def model_file(hidden=48, layers=3, wide=96, heads=4, head_dim=12, length=32, deep=3, gpt2=False, **more) -> dict:
    """A file of a model of State: nested, with references and keys without effect."""
    shape = {"bidirectional_attention": True, "hidden_size": "${model.kwargs.hidden_dim}",
             "max_position_embeddings": "${model.kwargs.cell_set_len}", "intermediate_size": wide,
             "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
             "head_dim": head_dim, "use_cache": False, "attention_dropout": 0.0, "rotary_dim": 0}
    if gpt2:
        shape = {"n_positions": "${model.kwargs.cell_set_len}", "n_embd": "${model.kwargs.hidden_dim}",
                 "n_layer": layers, "n_head": heads, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    kwargs = {"cell_set_len": length, "hidden_dim": hidden, "n_encoder_layers": deep, "n_decoder_layers": deep,
              "loss": "energy", "softplus": True, "confidence_head": False, "transformer_decoder": False,
              "use_effect_gating_token": False, "init_from": None, "finetune_vci_decoder": False,
              "transformer_backbone_key": "GPT2" if gpt2 else "llama", "transformer_backbone_kwargs": shape}
    return {"name": "state", "checkpoint": None, "device": "cuda", "kwargs": kwargs | more}


def write(name: str, content: dict) -> str:
    Path(name).write_text(yaml.safe_dump(content))
    return name


@pytest.mark.parametrize("name", SPEC)
def test_a_model_of_state_can_be_named(name):
    cfg = read(f"tx train model={name} {TOML}")
    assert sizes(cfg) == SPEC[name] and cfg.max_steps == 400_000
    whole = {"state", "tahoe_llama_62089464", "tahoe_llama_58562784", "tahoe_best", "replogle_llama_21712320",
             "replogle_llama_best"}
    assert cfg.use_basal_projection == (name in whole)
    assert cfg.gene_decoder_bool == (False if name == "state_sm" else None)
    # The model is chosen before single settings of it, wherever it stands; its references follow.
    cfg = read(f"tx train model.kwargs.hidden_dim=144 {TOML} model={name} training.lr=1e-3")
    wide = 4 * 144 if name == "pertsets" else SPEC[name][2]
    assert (cfg.d_model, cfg.d_mlp, cfg.cell_set_len, cfg.lr) == (144, wide, SPEC[name][5], 1e-3)


def test_a_model_of_smolstate_can_be_named():
    assert sizes(read("train --model=state_sm")) == SMOL
    assert sizes(read("train --model state_sm_128")) == (*SMOL[:5], 128, 4)
    # It looks for what it has not among State's.
    cfg = read("train --model state_lg training=state_default")
    assert sizes(cfg) == SPEC["state_lg"] and cfg.pert_norm and (cfg.batch_size, cfg.max_steps) == (16, 40_000)


def test_a_file_of_a_model_means_what_it_says(capsys):
    cfg = read(write("m.yaml", model_file(blur=0.1, mask_attn=True)), TOML)
    assert sizes(cfg) == (48, 3, 96, 4, 12, 32, 3) and (cfg.blur, cfg.mask_attn) == (0.1, True)
    assert cfg.out_dir == "debugging/debug"  # its name is no run's
    assert read("m.yaml", TOML, "name=x").out_dir == "debugging/x"
    # On the command line a setting changes the model of the file.
    cfg = read("m.yaml", TOML, "model.kwargs.transformer_backbone_kwargs.num_hidden_layers=2")
    assert sizes(cfg) == (48, 2, 96, 4, 12, 32, 3)
    assert "assumption" not in capsys.readouterr().err


def test_what_a_file_of_a_model_leaves_out_is_the_default_of_the_code_and_not_of_the_default_model():
    content = model_file()
    for name in ("n_encoder_layers", "n_decoder_layers", "cell_set_len"):
        del content["kwargs"][name]
    for name in ("num_hidden_layers", "intermediate_size", "head_dim", "num_key_value_heads"):
        del content["kwargs"]["transformer_backbone_kwargs"][name]
    content["kwargs"]["transformer_backbone_kwargs"]["max_position_embeddings"] = 9
    expected = {"n_encoder_layers": 2, "n_decoder_layers": 2, "cell_set_len": 256, "n_layers": 32, "d_mlp": 11_008,
                "d_head": None, "n_kv_heads": None, "n_heads": 4, "use_basal_projection": True}
    assert differs(read(write("m.yaml", content), TOML), expected) == {}
    # A few settings in a file are no model: they change the default one.
    cfg = read(write("few.yaml", {"model": {"kwargs": {"hidden_dim": 96, "mask_attn": True}}}), TOML)
    assert differs(cfg, OF_STATE | {"d_model": 96, "mask_attn": True}) == {}


def test_a_llama_that_does_not_say_so_is_causal_in_this_state_and_bidirectional_in_the_first(capsys):
    content = model_file()
    del content["kwargs"]["transformer_backbone_kwargs"]["bidirectional_attention"]
    cfg = read(write("m.yaml", content), TOML)
    assert (cfg.bidirectional_attention, cfg.rotary) == (False, True)
    assert "causal" in capsys.readouterr().err
    old = [content | {"name": "PertSets"}, content | {"kwargs": content["kwargs"] | {"freeze_pert": False}},
           content | {"kwargs": content["kwargs"] | {"nb_decoder": False}}]
    for i, file in enumerate(old):
        for whole in (file, {"model": file}):
            cfg = read(write(f"old{i}.yaml", whole), TOML)
            assert (cfg.bidirectional_attention, cfg.rotary) == (True, False)
    cfg = read("train", "m.yaml")  # as SmolState has it always
    assert (cfg.bidirectional_attention, cfg.rotary) == (True, False)
    assert "causal" not in capsys.readouterr().err
    cfg = read(TOML, "model.kwargs.transformer_backbone_kwargs.bidirectional_attention=false")
    assert (cfg.bidirectional_attention, cfg.rotary) == (False, True)


@pytest.mark.parametrize("inner, wide", [({}, 192), ({"n_inner": None}, 192), ({"n_inner": 40}, 40)])
def test_the_inner_width_of_a_gpt2_is_four_times_its_own_unless_it_is_named(inner, wide):
    content = model_file(gpt2=True)
    content["kwargs"]["transformer_backbone_kwargs"] |= inner
    cfg = read(write("m.yaml", content), TOML)
    assert sizes(cfg) == (48, 3, wide, 4, None, 32, 3) and cfg.transformer_backbone_key == "GPT2"
    # What its dropouts are where the file does not name them, as transformers has it; and on top of the default model.
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        del content["kwargs"]["transformer_backbone_kwargs"][name]
    for words in ([write("n.yaml", content)], ["model.kwargs.transformer_backbone_key=GPT2"]):
        cfg = read(*words, TOML)
        assert (cfg.residual_dropout, cfg.embedding_dropout, cfg.attention_dropout) == (0.1, 0.1, 0.1)
    assert (cfg.d_mlp, cfg.d_head, cfg.n_heads, cfg.n_layers) == (4 * 768, None, 12, 8)


def test_a_gpt2_has_what_a_gpt2_has_whatever_the_llama_before_it_had():
    cfg = read("tx train model.kwargs.transformer_backbone_key=GPT2", TOML,
               "model.kwargs.transformer_backbone_kwargs.bidirectional_attention=false")
    assert (cfg.n_kv_heads, cfg.d_head, cfg.bidirectional_attention, cfg.rotary) == (None, None, True, False)


def test_adapters_without_a_table_of_them_have_no_dropout():
    assert read("model=state", TOML, "model.kwargs.lora.enable=true").lora_dropout == 0.05
    assert read("model=tahoe_best", TOML, "model.kwargs.lora.enable=true").lora_dropout == 0.0


# ------------------------------------------------------------------------------------------------ training and data

TRAINING = {"wandb_track": True, "weight_decay": 0.002, "batch_size": 8, "lr": "3e-4", "max_steps": 700,
            "train_seed": 7, "val_freq": 30, "ckpt_every_n_steps": 20, "gradient_clip_val": 3, "loss_fn": "mse",
            "gradient_accumulation_steps": 1, "devices": 1, "strategy": "auto", "use_mfu": False,
            "mfu_kwargs": {"available_flops": "60e12", "window_size": 2}}  # fmt: skip
DATA = {"name": "PerturbationDataModule", "kwargs": {
    "toml_config_path": "x.toml", "embed_key": "X_hvg", "output_space": "all", "pert_rep": "onehot", "num_workers": 12,
    "n_basal_samples": 2, "downsample": None, "downsample_cells": None, "basal_mapping_strategy": "batch",
    "should_yield_control_cells": False, "batch_col": "plate", "pert_col": "drug", "cell_type_key": "line",
    "control_pert": "none of them", "map_controls": False, "perturbation_features_file": None, "barcode": True},
    "output_dir": None, "debug": True}  # fmt: skip
MEANT = {"weight_decay": 0.002, "batch_size": 8, "lr": 3e-4, "max_steps": 700, "seed": 7, "eval_interval": 30,
         "save_interval": 20, "grad_clip": 3.0, "grad_accum": 1, "toml_config_path": "x.toml", "embed_key": "X_hvg",
         "output_space": "all", "n_basal_samples": 2, "basal_mapping_strategy": "batch", "batch_col": "plate",
         "should_yield_control_cells": False, "pert_col": "drug", "cell_type_key": "line", "map_controls": False,
         "control_pert": "none of them", "downsample_cells": None, "loss": "energy", "optimizer": "adam",
         "schedule": "constant", "warmup_steps": 0, "val_fraction": 0.0}  # fmt: skip
RUN = {"name": "n", "output_dir": "o", "use_wandb": False, "overwrite": False, "return_adatas": False,
       "pred_adata_path": None, "true_adata_path": None,
       "wandb": {"entity": "e", "project": "p", "local_wandb_dir": "w", "tags": ["x"]}}  # fmt: skip


def test_files_of_training_and_data_mean_what_they_say():
    words = [write("t.yaml", TRAINING), write("d.yaml", DATA)]
    assert differs(read(*words), MEANT | {"out_dir": "debugging/debug", "d_model": 768}) == {}
    assert differs(read(*words, write("m.yaml", model_file())), MEANT | {"d_model": 48, "cell_set_len": 32}) == {}


def test_the_config_of_a_run_folder_means_what_it_says():
    whole = write("config.yaml", RUN | {"training": TRAINING, "data": DATA, "model": model_file()})
    cfg = read(whole)
    assert differs(cfg, MEANT | {"out_dir": "o/n", "wandb_entity": "e", "wandb_project": "p"}) == {}
    assert sizes(cfg) == (48, 3, 96, 4, 12, 32, 3)
    assert read(whole, "training.max_steps=9", "name=m", "output_dir=q").out_dir == "q/m"
    assert read(whole, "--out_dir=mine").out_dir == "mine"
    assert read(whole, "overwrite=true").resume == "never" and read(whole, "overwrite=false").resume == "auto"


def test_the_template_of_state_is_read_with_its_list_of_defaults():
    template = RUN | {"defaults": [{"data": "perturbation"}, {"model": "state_sm"}, {"training": "default"},
                                   {"wandb": "default"}, "_self_"], "output_dir": "${oc.env:PLACE,here}",
                      "hydra": {"output_subdir": None, "run": {"dir": "."}, "job_logging": {"root": {"level": "INFO"}}}}
    cfg = read(write("config.yaml", template), TOML)
    assert sizes(cfg) == SPEC["state_sm"] and differs(cfg, {"out_dir": "here/n", "max_steps": 400_000}) == {}
    # Of the model that another takes the place of nothing is left.
    for name in ("tahoe_best", "pertsets"):
        alone = read(TOML, f"model={name} output_dir=here name=x wandb.entity=e wandb.project=p")
        assert read("config.yaml", TOML, f"model={name}", "name=x") == alone


@pytest.mark.parametrize("listed", [{"training": {"a": "b"}}, {"model": ["state"]}, {"model": "nope"}])
def test_a_list_of_defaults_that_names_no_file_is_one_sentence(listed, capsys):
    Path("config.yaml").write_text(yaml.safe_dump({"defaults": ["_self_", listed, {"data": None}]}))
    assert "State (arc-state 0.11.1) has no" in refused(capsys, f"config.yaml {TOML}")


def test_references_are_filled_in():
    content = {"output_dir": "/runs", "name": "${model.name}_${training.train_seed}", "model": model_file(),
               "training": {"train_seed": 7}, "data": {"kwargs": {"toml_config_path": "${output_dir}/${name}.toml"}}}
    cfg = read(write("a.yaml", content))
    expected = {"out_dir": "/runs/state_7", "toml_config_path": "/runs/state_7.toml", "cell_set_len": 32, "seed": 7}
    assert differs(cfg, expected) == {}


def test_a_null_never_stands_for_a_value():
    content = {"data": {"kwargs": {"embed_key": None}, "output_dir": None}, "output_dir": "o", "name": "n",
               "kwargs": {"embed_key": "X_state"}, "training": {"lr": None, "val_freq": None}}
    cfg = read(write("a.yaml", content), TOML)
    assert differs(cfg, {"embed_key": "X_state", "lr": 1e-4, "eval_interval": 2000, "out_dir": "o/n"}) == {}


def test_a_batch_is_that_of_all_micro_steps_and_devices(capsys):
    """Lightning takes batch_size sentences a micro-step and device, and counts micro-steps to validation."""
    t = write("t.yaml", TRAINING | {"gradient_accumulation_steps": 4})
    assert differs(read(t, TOML), {"batch_size": 32, "grad_accum": 4, "eval_interval": 8, "max_steps": 700}) == {}
    cfg = read(t, TOML, "training.batch_size=3", "training.devices=2")
    assert differs(cfg, {"batch_size": 24, "grad_accum": 4, "save_interval": 20}) == {}
    assert "devices = 2: torchrun --nproc_per_node" in capsys.readouterr().err
    # Our own words mean ours.
    cfg = read(TOML, "--grad_accum=2", "--batch_size=6", "--eval_interval=50")
    assert differs(cfg, {"batch_size": 6, "grad_accum": 2, "eval_interval": 50}) == {}


def test_how_a_training_file_of_july_trains_is_said_to_be_an_assumption(capsys):
    july = {name: value for name, value in TRAINING.items() if "mfu" not in name and "accumulation" not in name}
    cfg = read(write("t.yaml", july), TOML)
    assert (cfg.optimizer, cfg.schedule, cfg.warmup_steps, cfg.lr) == ("adam", "constant", 0, 3e-4)
    told = capsys.readouterr().err
    assert "t.yaml" in told and "Adam" in told and "assumption" in told and "--dialect=smolstate" in told
    cfg = read("t.yaml", "--dialect=smolstate")
    assert (cfg.optimizer, cfg.schedule, cfg.warmup_steps, cfg.lr) == ("adamw", "cosine", 0, 3e-4)
    assert (read("t.yaml", TOML, "--optimizer=adamw", "--schedule=cosine").schedule) == "cosine"
    assert "assumption" not in capsys.readouterr().err
    read(write("t.yaml", TRAINING), TOML)
    assert "assumption" not in capsys.readouterr().err


def test_what_state_switches_off_or_sets_itself(capsys):
    cfg = read(TOML, "model.kwargs.use_batch_token=true")
    assert not cfg.use_batch_token
    cfg = read(TOML, "model.kwargs.use_batch_token=true", "data.kwargs.basal_mapping_strategy=batch")
    assert cfg.use_batch_token
    cfg = read(TOML, "data.kwargs.pert_col=drugname_drugconc", "data.kwargs.control_pert=DMSO")
    assert cfg.control_pert == "[('DMSO_TF', 0.0, 'uM')]"
    assert read(TOML, "model.kwargs.decoder_loss_weight=0.5").decoder_weight == 1.0  # which its model does not read
    assert read(TOML, "model.kwargs.freeze_pert=true").freeze_pert_backbone
    told = capsys.readouterr().err
    assert "use_batch_token = false" in told and "DMSO_TF" in told
    read(TOML, "data.kwargs.embed_key=X_state", "data.kwargs.output_space=embedding")
    assert "compat_relu=false" in capsys.readouterr().err


def test_what_smolstate_passes_over(capsys):
    content = {"kwargs": DATA["kwargs"] | {"toml_config_path": None}, "training_spec": {"d": "train"},
               "datasets": {"d": "/x"}, "zeroshot": {}, "fewshot": {}, "output_dir": "out", "name": "smolstate_run",
               "training": TRAINING | {"gradient_accumulation_steps": 4}, "overwrite": False,
               "model": model_file(freeze_pert=True, lora={"enable": True}, mmd_num_chunks=3, decoder_cfg=None)}
    content["model"]["kwargs"] |= {"input_dim": 9, "n_perts": 3, "decoder_cfg": {"latent_dim": 9, "hidden_dims": [7]}}
    Path("config.json").write_text(json.dumps(content))
    cfg = read("config.json")
    # Columns are overwritten, and there is no accumulation; of State's parts some are missing.
    expected = {"pert_col": "target_gene", "batch_col": "batch_var", "control_pert": "non-targeting",
                "output_space": "gene", "cell_type_key": "line", "batch_size": 8, "grad_accum": 1, "lora": False,
                "freeze_pert_backbone": False, "mmd_num_chunks": 1, "optimizer": "adamw", "eval_interval": 30,
                "toml_config_path": "starter.toml", "out_dir": "out/smolstate_run", "decoder_hidden_dims": [7]}
    assert differs(cfg, expected) == {} and sizes(cfg)[:4] == (48, 3, 96, 4)
    # Its README says that data.kwargs count, and so they do here.
    capsys.readouterr()
    cfg = read("train data.kwargs.pert_col=gene data.kwargs.batch_col=gem_group")
    assert (cfg.pert_col, cfg.batch_col) == ("gene", "gem_group")
    assert "passes over data.kwargs" in capsys.readouterr().err
    Path("few.toml").write_text('[datasets]\nd = "d.h5ad"\n[fewshot."d.k562"]\ntest = ["AARS"]\n')
    read("train --toml-config-path few.toml --name=x")
    assert "SmolState passes over [fewshot]" in capsys.readouterr().err


def test_what_smolstate_writes_for_the_tools_of_state_is_smolstates(capsys):
    files = {"kwargs": {"toml_config_path": "x.toml", "pert_col": "gene", "control_pert": "DMSO_TF"}}
    wandb = {"entity": "your_entity_name", "project": "smolstate", "local_wandb_dir": "./wandb_logs"}
    content = {"data": files, "model": model_file(), "wandb": wandb, "name": "smolstate_run", "output_dir": "out"}
    Path("config.yaml").write_text(yaml.safe_dump(content))
    cfg = read("config.yaml")
    assert (cfg.pert_col, cfg.control_pert, cfg.optimizer, cfg.pert_norm) == ("target_gene", "non-targeting", "adamw",
                                                                              True)
    told = capsys.readouterr().err
    assert "read as SmolState" in told and "command line" not in told  # its data.kwargs are those of a file
    wandb["project"] = "mine"
    Path("config.yaml").write_text(yaml.safe_dump(content))
    assert read("config.yaml").optimizer == "adam"
    assert read("wandb.project=smolstate", TOML).optimizer == "adam"  # a command line of State may call its project so


def test_a_null_as_the_limit_of_gradients_is_no_limit():
    assert read("tx train training.gradient_clip_val=null", TOML).grad_clip == 0
    Path("a.yaml").write_text("training:\n  gradient_clip_val: null\n")
    assert read("a.yaml", TOML).grad_clip == 0
    assert read("a.yaml", "training.gradient_clip_val=3", TOML).grad_clip == 3
    assert read("tx train", TOML).grad_clip == 10


def test_use_wandb_is_honoured_where_wandb_is(monkeypatch, capsys):
    found = importlib.util.find_spec
    for there, expected in ((True, True), (False, False)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a, there=there: there if name == "wandb" else
                            found(name, *a))
        cfg = read(TOML, "use_wandb=true", "wandb.entity=your_entity_name", "wandb.project=p")
        assert (cfg.wandb, cfg.wandb_entity, cfg.wandb_project) == (expected, "", "p")
    assert "not installed" in capsys.readouterr().err
    monkeypatch.undo()
    assert read(TOML, "use_wandb=false").wandb is False


def test_a_value_without_effect_is_no_reason_to_refuse():
    cfg = read(TOML, "data.kwargs.downsample=1.0", "model.kwargs.lora.target=auto", "model.kwargs.lora.bias=none",
               "model.kwargs.log1p_from_raw_counts=false", "model.kwargs.counts_target_sum=10000",
               "data.kwargs.barcode=false")
    assert differs(cfg, OF_STATE) == {}


def test_what_has_no_effect_is_listed_and_what_has_is_not():
    with pytest.warns(UserWarning, match="without effect") as told:
        read(write("config.yaml", RUN | {"training": TRAINING, "data": DATA, "model": model_file()}))
    text = str(told[0].message)
    for name in ("softplus", "use_effect_gating_token", "num_workers", "mfu_kwargs", "wandb_track", "hidden_size"):
        assert name in text
    assert not re.search(r"\bname\b|overwrite|use_wandb|devices", text)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("line, words", [
    ("model=cpa", "model cpa"), ("model=perturb_mean", "baselines"), ("model=scgpt-chemical", "scgpt-chemical"),
    ("model=state_s", "did you mean state"), ("model=enormous", "there is state"), ("model.name=rnn", "rnn"),
    ("data.name=OldModule", "OldModule"), ("data=default", "data=perturbation"),
    ("data=multidataset", "multidataset"), ("training=cpa", "cpa"),
    ("data.kwargs.downsample=0.5", "downsample = 0.5"), ("model.kwargs.finetune_vci_decoder=true", "embedding model"),
    ("model.kwargs.nb_decoder=True", "nb_decoder"), ("model.kwargs.log1p_from_raw_counts=true", "preprocess"),
    ("data.kwargs.int_counts=true", "int_counts"), ("model.kwargs.lora.target=custom", "adapt_mlp"),
    ("model.kwargs.transformer_backbone_key=qwen", "llama|GPT2"), ("model.kwargs.hidden_dimm=3", "did you mean"),
    ("data.kwargs.output_space=latent", "gene|all|embedding"), ("--config=m.yaml", "bare"),
    ("--config-name=config", "bare"), ("model.kwargs.loss=huber", "energy|sinkhorn|se|mse")])
def test_what_is_not_here_is_one_sentence(line, words, capsys):
    assert words in refused(capsys, f"tx train {TOML} {line}")
    assert list(Path.cwd().iterdir()) == []


OTHER_FILES = {
    "module": {"name": "MultiDatasetPerturbationDataModule", "kwargs": {"data_dir": "/x", "dtype": "${precision}"}},
    "cpa": {"name": "CPA", "kwargs": {"n_latent": 84, "recon_loss": "gauss", "n_hidden_adv": 128, "seed": 1}},
    "scgpt": {"name": "scGPT-genetic", "kwargs": {"pad_token": "<pad>", "embsize": 512, "nlayers": 12}},
    "embedsum": {"name": "EmbedSum", "kwargs": {"cell_set_len": 512, "hidden_dim": 512, "embed_key": "X_uce"}},
    "means": {"name": "context_mean", "kwargs": {"cell_set_len": 512, "transformer_backbone_key": "GPT2"}},
    "training": {"max_steps": 9, "train_seed": 42, "n_epochs_kl_warmup": "1e4", "step_size_lr": 25},
    "data": {"name": None, "kwargs": {"embed_key": "X_uce", "k562_rpe1_name": "x", "esm_perts_only": False}},
    "embedding": {"embeddings": {"current": "a"}, "model": {"emsize": 512}, "wandb": {"enable": True}},
}  # fmt: skip


@pytest.mark.parametrize("name, words", [
    ("cpa", "CPA"), ("scgpt", "scGPT-genetic"), ("embedsum", "EmbedSum"), ("means", "baselines"),
    ("training", "scVI"), ("data", "data=perturbation"), ("module", "MultiDataset"),
    ("embedding", "embed_key")])
def test_a_file_of_what_is_not_here_is_one_sentence_and_not_one_a_key(name, words, capsys):
    path = write(f"{name}.yaml", OTHER_FILES[name])
    force = "--dialect=state " if name == "embedding" else ""
    assert words in refused(capsys, f"{force}{path} {TOML}")


def test_a_command_of_state_has_no_data_unless_it_names_them(capsys):
    assert "toml_config_path is empty" in refused(capsys, "tx train model=state_sm")
    assert "starter.toml" in refused(capsys, "train")


@pytest.mark.parametrize("line, words", [
    ("tx predict --output-dir out/test --checkpoint final.ckpt",
     "type python sample.py out/test/checkpoints/final.ckpt"),
    ("tx predict --output_dir out/test/ --toml other.toml", "type python sample.py out/test/ --toml=other.toml"),
    ("state tx infer --model-dir m --checkpoint m/checkpoints/final.ckpt --adata c.h5ad --pert-col gene --embed-key "
     "X_hvg --output o.h5ad", "type python sample.py m/checkpoints/final.ckpt --adata=c.h5ad --columns.pert_col=gene "
                              "--columns.embed_key=X_hvg --out=o"),
    ("tx preprocess_train --adata raw.h5ad --output p.h5ad --num_hvgs 2000",
     "type python prepare_data.py state preprocess --input=raw.h5ad --output=p.h5ad --num_hvgs=2000 --target_sum=N"),
    ("tx preprocess_infer --adata a.h5ad --output b.h5ad --control_condition x --pert_col gene", "sample.py"),
    ("tx infer --model-dir m --adata c.h5ad --quiet --celltypes k562,rpe1 --tsv pad.tsv",
     "--adata=c.h5ad --out=predictions (of which --celltypes, --tsv is not here)"),
    ("state-sets sets predict --output_dir 'a run' --checkpoint last.ckpt", "sample.py 'a run/checkpoints/last.ckpt'"),
    ("state-sets state train --conf my.yaml", "embed_key"), ("state state embed --input a.h5ad", "embed_key"),
    ("tx", "python train_state.py tx train"), ("state tx kmeans --k 3", "tx kmeans: of its commands there are"),
    ("emb fit --conf my.yaml", "embed_key"), ("emb transform --model-folder SE --input a.h5ad", "embed_key"),
    ("emb query --lancedb x --k 3", "embed_key"), ("infer --adata a.h5ad", "type python sample.py"),
    ("info", "bench.py")])
def test_the_other_verbs_name_the_command_to_type(line, words, capsys):
    assert words in refused(capsys, line)


def test_what_predict_takes_without_being_told_is_the_last_checkpoint(capsys):
    Path("run/checkpoints").mkdir(parents=True)
    assert refused(capsys, "tx predict --output-dir run").endswith("type python sample.py run")
    Path("run/checkpoints/last.ckpt").write_bytes(b"")
    assert refused(capsys, "tx predict --output-dir run").endswith("type python sample.py run/checkpoints/last.ckpt")
    assert "sample.py run --adata=a.h5ad" in refused(capsys, "tx infer --model-dir run --adata a.h5ad")


# ----------------------------------------------------------------------------- commands of the READMEs, in small


def cells(name: str, pert: str, batch: str, control: str) -> None:
    """NAME.h5ad and NAME.toml: 3 cell types, 3 perturbations, 20 genes of which 12 vary most; one type is held out."""
    rng = np.random.default_rng(0)
    n = 180
    X = rng.gamma(1.0, 1.0, (n, 20)).astype(np.float32)
    names = [control, "AARS", "TUFM", "NUP107"]
    obs = {pert: np.array(names)[np.arange(n) % 4], batch: np.array(["x", "y"])[np.arange(n) // 4 % 2],
           "cell_type": np.array(["k562", "rpe1", "jurkat"])[np.arange(n) // 60]}
    write_h5ad(f"{name}.h5ad", X, obs, [f"g{i}" for i in range(20)], {"X_hvg": X[:, :12]},
               var={"highly_variable": np.arange(20) < 12})
    Path(f"{name}.toml").write_text(f'[datasets]\nd = "{name}.h5ad"\n[training]\nd = "train"\n'
                                    '[zeroshot]\n"d.jurkat" = "test"\n[fewshot]\n')


SMALL = (" model.kwargs.transformer_backbone_kwargs.num_hidden_layers=1 model.kwargs.hidden_dim=16 "
         "model.kwargs.transformer_backbone_kwargs.intermediate_size=16 model.kwargs.cell_set_len=4 "
         "model.kwargs.transformer_backbone_kwargs.head_dim=4 model.kwargs.decoder_hidden_dims=[8] --device=cpu")


@pytest.mark.parametrize("line, name, expected", [
    # The newest README, then that of July 2025, then that of state-sets.
    ("tx train data.kwargs.toml_config_path=a.toml data.kwargs.embed_key=X_hvg data.kwargs.pert_col=target_gene "
     "data.kwargs.cell_type_key=cell_type training.max_steps=1 training.batch_size=2 model=state output_dir=o "
     "name=test",
     ("target_gene", "gem_group", "DMSO_TF"), {"output_space": "all", "n_encoder_layers": 1, "batch_size": 2}),
    ("tx train data.kwargs.toml_config_path=a.toml data.kwargs.embed_key=X_hvg data.kwargs.num_workers=12 "
     "data.kwargs.batch_col=batch_var data.kwargs.pert_col=target_gene data.kwargs.cell_type_key=cell_type "
     "data.kwargs.control_pert=TARGET1 training.max_steps=1 training.val_freq=1 training.ckpt_every_n_steps=1 "
     "training.batch_size=2 training.lr=1e-4 model=pertsets wandb.tags=[test] output_dir=o name=test",
     ("target_gene", "batch_var", "TARGET1"), {"transformer_backbone_key": "GPT2", "d_mlp": 64, "eval_interval": 1}),
    ("sets train data.kwargs.toml_config_path=a.toml data.kwargs.embed_key=X_hvg data.kwargs.output_space=gene "
     "data.kwargs.batch_col=gem_group data.kwargs.pert_col=gene data.kwargs.cell_type_key=cell_type "
     "data.kwargs.control_pert=non-targeting training.max_steps=1 training.batch_size=2 model=pertsets output_dir=o "
     "name=test", ("gene", "gem_group", "non-targeting"), {"output_space": "gene"})])
def test_the_training_commands_of_states_readmes(line, name, expected):
    cells("a", *name)
    small = SMALL
    if "pertsets" in line:
        small = re.sub(r"\S+(intermediate_size|head_dim|num_hidden_layers)=\S+", "", SMALL)
        small += " model.kwargs.transformer_backbone_kwargs.n_layer=1"
    done = train_state.main((line + small).split())
    saved = checkpoint.load(Path("o/test/last.pt"), train_state.__file__)
    assert saved["step"] == done["steps"] == 1 and done["mae"] > 0
    cfg = Config(**saved["config"])
    assert differs(cfg, {"optimizer": "adam", "schedule": "constant", "lr": 1e-4, "d_model": 16} | expected) == {}
    assert len(saved["optimizer"]["param_groups"]) == 1 and saved["optimizer"]["param_groups"][0]["weight_decay"] == 0


@pytest.mark.parametrize("line", ["train", "smolstate train --overwrite", "train --no-resume --name smolstate_run",
                                  "train data.kwargs.toml_config_path=starter.toml training.max_steps=1 "
                                  "training.batch_size=2 model.kwargs.hidden_dim=16"])
def test_the_training_commands_of_smolstates_readme(line):
    cells("starter", "target_gene", "batch_var", "non-targeting")
    done = train_state.main(f"{line} training.max_steps=1 training.batch_size=2 {SMALL}".split())
    saved = checkpoint.load(Path("out/smolstate_run/last.pt"), train_state.__file__)
    assert done["steps"] == 1 and "pert_norm.weight" in saved["model"] and saved["config"]["embed_key"] is None
    assert saved["optimizer"]["param_groups"][0]["weight_decay"] == 5e-4
    assert saved["config"]["resume"] == ("never" if "--no-resume" in line else "auto")
    assert list(saved["model"]["pert_encoder.0.weight"].shape) == [16, 4]


def smolstate_folder(folder: Path) -> Path:
    """A run folder as SmolState leaves it: checkpoints/last.ckpt of a small model, pert_onehot_map.pt beside."""
    train_state.main(f"train training.max_steps=1 training.batch_size=2 --out_dir=ours {SMALL}".split())
    cfg, model, _, extra = train_state.load_run("ours", "cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) / 8)
    (folder / "checkpoints").mkdir(parents=True)
    kwargs = source_settings(cfg, extra["dims"])
    torch.save({"model_state_dict": source_state_dict(model), "optimizer_state_dict": {}, "step": 7, "epoch": 0,
                "loss": 1.0, "config": {"model": {"kwargs": kwargs}}, "hyper_parameters": kwargs},
               folder / "checkpoints" / "last.ckpt")
    # Perturbations in an order of their own.
    names = ["non-targeting", "TUFM", "NUP107", "AARS"]
    torch.save(dict(zip(names, torch.eye(4), strict=True)), folder / "pert_onehot_map.pt")
    return folder / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("line, place", [("train --resume {}", "elsewhere"), ("train", "out/smolstate_run"),
                                         ("train --overwrite", "out/smolstate_run")])
def test_a_checkpoint_of_the_source_to_resume_from_is_where_training_starts(line, place, capsys):
    cells("starter", "target_gene", "batch_var", "non-targeting")
    path = smolstate_folder(Path(place))
    words = f"{line.format(path)} training.max_steps=1 training.batch_size=2 training.lr=0 {SMALL}"
    capsys.readouterr()
    assert train_state.main(words.split())["steps"] == 1
    told = capsys.readouterr().err
    assert f"{path} is a checkpoint of another system" in told and "starts from its weights, at step 0" in told
    saved = checkpoint.load(Path("out/smolstate_run/last.pt"), train_state.__file__)
    theirs = torch.load(path, weights_only=True)["model_state_dict"]
    # With lr = 0 the weights are the source's, the encoder of perturbations among them.
    assert all(torch.equal(value, theirs[name]) for name, value in saved["model"].items())
    assert saved["config"]["perturbation_features_file"] == f"{place}/pert_onehot_map.pt"
    # And the same command goes on from what it left itself.
    longer = words.replace("max_steps=1", "max_steps=2")
    Path("out/smolstate_run/summary.json").unlink()
    assert train_state.main(words.split())["steps"] == 1
    assert "another system" not in capsys.readouterr().err
    assert "finished run with other settings (max_steps: 1 -> 2" in refused(capsys, longer)


def test_no_resume_starts_anew_beside_a_checkpoint_of_the_source(capsys):
    cells("starter", "target_gene", "batch_var", "non-targeting")
    smolstate_folder(Path("out/smolstate_run"))
    capsys.readouterr()
    train_state.main(f"train --no-resume training.max_steps=1 training.batch_size=2 {SMALL}".split())
    assert "another system" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- files that are elsewhere


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_in_a_file_of_the_source_is_no_demand_but_on_the_command_line_it_is(capsys):
    cells("a", "gene", "gem_group", "DMSO_TF")
    write("m.yaml", {"device": "cuda", "kwargs": {"softplus": True, "cell_set_len": 4}})
    small = "m.yaml --toml=a.toml training.max_steps=1 training.batch_size=2" + SMALL.replace("--device=cpu", "")
    assert train_state.main(small.split())["device"] == "cpu"
    assert "device = cuda of m.yaml is not there" in capsys.readouterr().err
    assert "CUDA" in refused(capsys, f"{small} --device=cuda --out_dir=other")
    assert not Path("other").exists()


def test_the_files_of_arc_state_give_the_sizes_of_the_spec():
    found = importlib.util.find_spec("state")
    if found is None or not (folder := Path(found.origin or "/").parent / "configs").exists():
        pytest.skip("arc-state is not installed")
    names = [path.stem for path in (folder / "model").glob("*.yaml") if path.stem in SPEC]
    assert len(names) >= 7
    for name in names:
        parts = [folder / part for part in ("data/perturbation.yaml", "training/default.yaml")]
        files = [*map(str, parts), str(folder / f"model/{name}.yaml"), TOML]
        assert sizes(read(*files)) == SPEC[name]


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("state*.py")), ids=lambda path: path.stem)
def test_a_published_config_is_accepted(path):
    chosen = {ALIASES.get(k, k): v for k, v in runpy.run_path(str(path)).items() if not k.startswith("_")}
    cfg = read(str(path))
    assert len(chosen) >= 4 and differs(cfg, chosen) == {}
    spec = {"state": "state", "state_sm": "state_sm", "state_lg": "state_lg", "state_tahoe": "tahoe_llama_62089464"}
    if path.stem in spec:
        assert sizes(cfg) == SPEC[spec[path.stem]]
    if path.stem == "state_smol":
        assert sizes(cfg) == SMOL
