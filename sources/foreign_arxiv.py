"""ICL-non-ergodic-arxiv, the source of train_arxiv.py: its settings and checkpoints as ours, and older ones of ours.

Its settings are Hydra's, of configs/ and src/main_hydra_app.py. An earlier train.py had another model and other data:
what its command lines are answered is here too.
"""

import math
import random
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

from common.errors import CheckpointError
from configurator import READ, Derived, convert, note
from sources.foreign_checkpoints import converting, read_checkpoint, system_of
from sources.given import value_of

CATEGORIES = ["cs.DS", "math.ST", "math.GR", "cs.IT", "cs.PL"]  # by their number of chunks, the most first
ELEVEN = ["cs.AI", "cs.CE", "cs.CV", "cs.DS", "cs.IT", "cs.NE", "cs.PL", "cs.SY", "math.AC", "math.GR", "math.ST"]
CHUNKS = "data/custom_tokenized_data_chunked_len100.hdf5"
NEVER = 10**9  # steps
# What changes nothing that a run finds, by the source's code: labels, paths of raw data, machinery of loaders, and
# numbers that it replaces by its own.
NO_EFFECT = (
    "project_name", "logging.log_file", "log_file", "wandb.run_name", "wandb.tags", "wandb.notes", "wandb.log_config",
    "wandb.log_code", "wandb.log_model", "wandb.enabled", "experiment.k_value", "k_value", "tokens_per_category",
    "experiment_id", "dataset.path", "path", "dataset.name", "model.name", "name", "subset", "cache_dir",
    "token_chunk_size", "target_split", "custom_tokenizer_path", "max_position_embeddings", "vocab_size",
    "pad_token_id", "training.optimizer", "training.learning_rate", "num_training_steps",
    "save_best_model_metric", "tokenization_batch_size", "validation_batch_size", "early_stopping_metric",
    "num_workers", "pin_memory",
)  # fmt: skip
TOGETHER = (  # what completed() turns into settings of ours, or refuses
    "wandb.mode", "num_top_categories", "custom_hdf5_chunked_output_path_base", "hidden_act",
    "attention_probs_dropout_prob", "tie_word_embeddings", "layer_norm_eps", "initializer_range", "betas", "eps",
    "amsgrad", "maximize", "num_cycles", "last_epoch", "effective_batch_size", "mixed_precision_enabled",
    "mixed_precision_dtype", "save_best_model_mode", "perform_validation", "early_stopping_enabled",
)  # fmt: skip
EARLY = (  # arguments of the earlier train.py, which earlier() reads or passes by
    "k", "token_budget", "model_name_or_path", "preprocessed_data_dir", "run_suffix", "lr_scheduler_type",
    "sequence_length", "adam_epsilon", "force_cpu", "checkpoint_interval_steps", "max_step_checkpoints",
    "disable_wandb", "wandb_run_name", "upload_results_to_s3", "s3_results_bucket", "s3_results_prefix", "s3_bucket",
    "s3_prefix", "delete_local_checkpoints_after_s3_upload", "steps_per_eval_epoch", "early_stopping_delta",
    "reduce_lr_factor", "reduce_lr_patience", "ema_val_loss_alpha", "geom_alpha", "geom_beta", "max_loss_ckpts",
    "num_best_ema_val_checkpoints", "eval_dataset_multiplier",
)  # fmt: skip


def positive(steps: float) -> float | None:
    """A number of steps; 0 and less are none, as in the source."""
    return steps if steps > 0 else None


ALIASES = {  # names of the source's settings, and those that older runs were saved with
    **dict.fromkeys(NO_EFFECT),
    **dict.fromkeys((*TOGETHER, *EARLY), READ),
    "learning_rate": "lr",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_embd": "d_model",
    "d_ff": "d_mlp",
    "hidden_dropout_prob": "dropout",
    "num_epochs": "epochs",
    "validation_interval_epochs": "eval_epochs",
    "max_global_steps": Derived("max_steps", lambda steps, settings: positive(steps)),
    "warmup": "warmup_steps",
    "num_warmup_steps": "warmup_steps",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "gradient_accumulation_steps": "grad_accum",
    "grad_accum_steps": "grad_accum",
    "selected_categories": "categories",
    "active_categories": "categories",
    "early_stopping_patience": "patience",
    "early_stopping_min_delta": "min_delta",
    "max_grad_norm": "grad_clip",
    "lr_schedule": "schedule",
    "output_dir": "out_dir",
    "checkpoint_dir": "out_dir",
    "resume_from_checkpoint": "resume",
    "save_checkpoint_interval_steps": Derived("save_interval", lambda steps, settings: positive(steps) or NEVER),
    "hdf5_chunked_output_path": "data",
    "validation_hdf5_path": "validation_data",
    "logging.level": "log_level",
    "wandb.project": "wandb_project",
    "wandb.entity": "wandb_entity",
    "_target_": READ,
    "optimizer": READ,  # in the file of the group `training`: a label, the optimizer is its _target_
    "hydra.run.dir": "out_dir",
    "min_lr_ratio": Derived("min_lr", lambda ratio, settings: round(ratio * settings["lr"], 12)),
    **dict.fromkeys(("study", "study_seeds", "report")),  # of older runs: the words of sweep.py now
}
MARKS = (  # of the newest settings: groups of Hydra's, and names in them for files that are one group
    "dataset.", "model.architecture.", "model.custom_tokenizer_path", "model.name", "model._target_", "architecture.",
    "experiment.", "training.", "optimizer.", "scheduler.", "logging.", "wandb.", "active_categories",
    "tokens_per_category", "hdf5_chunked_output_path", *TOGETHER,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------
def experiments() -> dict[str, dict]:
    """The group experiment=: k3_csDS_mathST_csIT and so on, in any order of the five categories."""
    found = {"default_experiment": {"experiment.active_categories": ["cs.DS"]}}
    for count in range(1, len(CATEGORIES) + 1):
        for names in permutations(CATEGORIES, count):
            short = "_".join(name.replace(".", "") for name in names)
            found[f"k{count}_{short}"] = {"experiment.active_categories": list(names)}
    return found


TARGETS = ("AdamW", "get_cosine_schedule_with_warmup", "MicroDecoderModel")  # what its files have Hydra make
# Settings of the source of which this page has one value: (name, kind, that value, what it is).
FIXED = (
    ("hidden_act", str, "gelu", "the activation of its MLP"),
    ("tie_word_embeddings", bool, True, "its head is the embedding read backwards"),
    ("layer_norm_eps", float, 1e-5, "nn.LayerNorm's own"),
    ("initializer_range", float, 0.02, "the standard deviation that matrices start with"),
    ("eps", float, 1e-8, "AdamW's own"),
    ("amsgrad", bool, False, "plain AdamW"),
    ("maximize", bool, False, "a loss falls"),
    ("num_cycles", float, 0.5, "one fall of the cosine"),
    ("last_epoch", int, -1, "a schedule starts at its start"),
    ("save_best_model_mode", str, "min", "the best checkpoint is that of the lowest cross entropy"),
)


def completed(given: dict[str, Any], values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """What several settings of the source mean together: see foreign.Dialect.completed."""
    for name, kind, value, why in FIXED:
        found = value_of(given, name, kind, value)
        if found != value:
            raise ValueError(f"{name} = {found}: the page has {value} alone ({why}): leave it out, or edit the page")
    for key in ("optimizer._target_", "scheduler._target_", "_target_"):  # the source does not look at a model's
        target = given.get(key)
        if target and str(target).rpartition(".")[2] not in TARGETS:
            raise ValueError(f"{key} = {target}: the page has AdamW and a cosine alone: leave it out, or edit the page")
    rate = value_of(given, "attention_probs_dropout_prob", float, values["dropout"])
    if rate != values["dropout"]:
        raise ValueError(
            f"attention_probs_dropout_prob = {rate} beside hidden_dropout_prob = {values['dropout']}: the "
            "page has one rate for both; give the same, as --dropout=RATE"
        )
    if values["resume"] not in ("auto", "never") and is_source_checkpoint(values["resume"]):
        raise ValueError(
            f"resume = {values['resume']} is of the source: python prepare_data.py import {values['resume']} "
            "--out_dir=out/there makes it ours, and --resume=out/there/last.pt goes on from it"
        )
    more = batches(given, values) | stopping(given, values)
    if "precision" not in fields:
        more |= precision(given, values)
    # A file of the group `training` has a rate that is not used: the optimizer's is.
    if "learning_rate" in given and fields.get("lr") != "command line" and value_of(given, "lr", float, None) is None:
        more["lr"] = 5e-4
    beta1, beta2 = value_of(given, "betas", tuple[float, float], (values["beta1"], values["beta2"]))
    more |= {"beta1": beta1, "beta2": beta2}
    # Its cosine ends at 0, whatever min_lr_ratio says.
    if fields.get("min_lr") and "min_lr" not in given:
        note("min_lr_ratio: the source's cosine ends at 0 whatever it says, and so it does here (else --min_lr=RATE)")
        more["min_lr"] = 0.0
    first = value_of(given, "num_top_categories", int, 0)
    if first and "categories" not in fields:
        if not 1 <= first <= len(CATEGORIES):
            raise ValueError(
                f"num_top_categories = {first} is not between 1 and {len(CATEGORIES)}; other categories "
                "by name: --categories=A,B"
            )
        more["categories"] = CATEGORIES[:first]
    stem = value_of(given, "custom_hdf5_chunked_output_path_base", str, "")
    if stem and "data" not in fields:
        more["data"] = f"{stem}.hdf5"
    # What is logged where is the user's to say: nothing is sent to W&B that did not ask for it.
    mode = value_of(given, "wandb.mode", str, "")
    if mode not in ("", "online", "offline", "disabled"):
        raise ValueError(f"wandb.mode = {mode}: it is online, offline or disabled")
    if mode:
        more["wandb"] = mode if mode != "disabled" else False
    elif any(key.startswith("wandb.") for key in given) and "wandb" not in given:
        note("W&B is off, as it is here where nobody asks: wandb.mode=online or offline does")
    return more


def batches(given: dict, values: dict) -> dict:
    """The source's batch is of a micro-step, its effective batch of a step; ours is of a step."""
    if any(key.rpartition(".")[2] == "grad_accum" for key in given):  # our own name: batch_size is ours too
        return {}
    steps = values["grad_accum"]
    effective = value_of(given, "effective_batch_size", int, 512)
    if effective > 0:
        steps = max(1, effective // values["batch_size"])
    return {"batch_size": steps * values["batch_size"], "grad_accum": steps}


def stopping(given: dict, values: dict) -> dict:
    """Without validation, or with early stopping off, a run goes to its end."""
    if not value_of(given, "perform_validation", bool, True):
        return {"patience": 0, "eval_interval": NEVER}  # the end is evaluated all the same
    if not value_of(given, "early_stopping_enabled", bool, True):
        return {"patience": 0}
    if values["patience"] == 0 and "patience" not in given:  # by our own name it never stops
        raise ValueError(
            "early_stopping_patience = 0 ends a run at its first validation there: epochs=1 does so here, "
            "early_stopping_enabled=false never stops"
        )
    return {}


def precision(given: dict, values: dict) -> dict:
    """Half precision where it is asked for and there is a GPU, as there."""
    on_gpu = values["device"] != "cpu" and torch.cuda.is_available()
    if not value_of(given, "mixed_precision_enabled", bool, False) or not on_gpu:
        return {"precision": "fp32"}
    kind = value_of(given, "mixed_precision_dtype", str, "bf16").lower()
    return {"precision": "bf16" if kind == "bf16" else "fp16"}


def earlier(given: dict[str, Any], values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """Raises ValueError: what to type for a command line of the earlier train.py, whose model this page has not."""
    k = value_of(given, "k", int, 1)
    if not 1 <= k <= len(ELEVEN):
        raise ValueError(f"k = {k} is not between 1 and {len(ELEVEN)}")
    # Its choice of K categories: the first K of a list that the seed shuffles.
    names = list(ELEVEN)
    random.Random(values["seed"]).shuffle(names)
    chosen = ",".join(sorted(names[:k]))
    words = [
        "--data=data/arxiv",
        f"--categories={chosen}",
        "--n_layers=6",
        "--d_model=512",
        "--n_heads=8",
        "--d_mlp=2048",
    ]
    batch = values["batch_size"] * values["grad_accum"]
    words += [f"--batch_size={batch}", f"--grad_accum={values['grad_accum']}", f"--lr={values['lr']:g}"]
    budget = value_of(given, "token_budget", int, 0)
    length = value_of(given, "sequence_length", int, 100)
    if budget:
        words.append(f"--max_steps={max(1, budget // (batch * length))}")
    else:
        words.append(f"--epochs={values['epochs']}")
    words += [
        f"--warmup_steps={values['warmup_steps']}",
        f"--weight_decay={values['weight_decay']:g}",
        f"--seed={values['seed']}",
    ]
    saves = value_of(given, "checkpoint_interval_steps", int, 0)
    if saves:
        kept = value_of(given, "max_step_checkpoints", int, 3)
        words += [f"--save_interval={saves}", f"--keep_last={kept or -1}"]
    raise ValueError(
        "that is a command line of the earlier train.py, whose model is Pythia's GPT-NeoX on windows "
        "drawn anew at every step: this page has neither. Nearest to it, after python prepare_data.py "
        f"arxiv --categories={','.join(ELEVEN)}: python train_arxiv.py {' '.join(words)}"
    )


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------
SAVED = (  # settings that a checkpoint tells, and that say how a run goes on
    "data", "validation_data", "categories", "epochs", "batch_size", "grad_accum", "lr", "weight_decay",
    "warmup_steps", "grad_clip", "patience", "min_delta", "seed",
)  # fmt: skip
BLOCK_NAMES = {  # parts of a block there and here; what it calls weight of c_* is stored [in, out]
    "ln_1": "attention_norm", "attn.c_attn": "qkv", "attn.c_proj": "attention_out",
    "ln_2": "mlp_norm", "mlp.c_fc": "mlp_in", "mlp.c_proj": "mlp_out",
}  # fmt: skip
NAMES = {
    "token_embeddings.weight": "embed.weight", "position_embeddings.weight": "position",
    "final_ln.weight": "final_norm.weight", "final_ln.bias": "final_norm.bias",
}  # fmt: skip


def is_source_checkpoint(path: str | Path) -> bool:
    """Whether a file is a checkpoint of the source rather than of this repository."""
    return system_of(Path(path)) == "arxiv"


def source_checkpoint(path: Path, defaults: dict[str, Any]) -> dict:
    """A checkpoint of the source, src/checkpoint_utils.py's, as one of ours without an optimizer; {} for other files.

    Its MicroDecoderModel, with GPT-2's attention and MLP of transformers, is the GPT of the page with the same names
    of sizes. It has a position more than it predicts from: see without_last_position.

    defaults: of the source, by our names, for what the checkpoint does not say.
    Raises CheckpointError for what it does not say, and for an architecture that the page has not.
    """
    if not is_source_checkpoint(path):
        return {}
    with converting(path, "the source"):
        return as_ours(read_checkpoint(path), path, defaults)


def as_ours(contents: dict, path: Path, defaults: dict[str, Any]) -> dict:
    """What a checkpoint of the source holds, under our keys; see source_checkpoint."""
    weights = {}
    for name, weight in contents.get("model_state_dict", contents).items():
        weights[str(name).replace("_orig_mod.", "").removeprefix("module.")] = weight
    saved = contents.get("hydra_config_resolved") or {}
    architecture = saved.get("model", {}).get("architecture", {})
    refuse_other_models(weights, architecture, path)
    vocab_size, width = weights["token_embeddings.weight"].shape
    # The last position predicts a token that no chunk has.
    n_ctx = min(len(weights["position_embeddings.weight"]), saved.get("dataset", {}).get("token_chunk_size", 100) - 1)
    model = translated(weights, path)
    model["position"] = model["position"][:n_ctx].clone()
    config = defaults | settings_of(saved)
    config |= {
        "n_layers": sum(name.endswith("qkv.weight") for name in model),
        "d_model": width,
        "n_heads": architecture["n_heads"],
        "d_mlp": len(model["blocks.0.mlp_in.weight"]),
        "dropout": architecture.get("hidden_dropout_prob", defaults["dropout"]),
    }
    categories = config["categories"]
    extra = {"vocab_size": vocab_size, "n_ctx": n_ctx, "chunk_size": n_ctx + 1, "categories": categories}
    extra["data"] = {config["data"]: ""}
    tokenizer = tokenizer_above(path, str(saved.get("model", {}).get("custom_tokenizer_path") or ""))
    if tokenizer:
        extra["tokenizer_file"] = str(tokenizer)
    return {"config": config, "model": model, "step": int(contents.get("step", 0)), "extra": extra}


def settings_of(saved: dict[str, Any]) -> dict[str, Any]:
    """The settings of training in a resolved configuration of the source, by our names, where it says them."""
    given = {}
    for group in ("dataset", "training", "optimizer", "scheduler", "experiment"):
        for name, value in (saved.get(group) or {}).items():
            given[f"{group}.{name}"] = value
    settings = {}
    for key, value in (given | {"seed": saved.get("seed")}).items():
        _, _, name = key.rpartition(".")
        ours = ALIASES.get(key, ALIASES.get(name, name))
        if isinstance(ours, str) and ours in SAVED and value is not None:
            settings[ours] = value
    beta1, beta2 = value_of(given, "betas", tuple[float, float], (0.9, 0.95))
    micro = {"batch_size": settings.get("batch_size", 32), "grad_accum": settings.get("grad_accum", 1)}
    limit = positive(value_of(given, "max_global_steps", int, -1))
    return settings | batches(given, micro) | {"beta1": beta1, "beta2": beta2, "max_steps": limit}


def refuse_other_models(weights: dict[str, torch.Tensor], architecture: dict, path: Path) -> None:
    """Raises CheckpointError for a model that the page's is not."""
    if "n_heads" not in architecture:
        raise CheckpointError(
            f"{path} does not say its number of heads (hydra_config_resolved.model.architecture): "
            "use the .pt file that the source saved, not the weights alone"
        )
    for name, kind, value, why in FIXED:
        found = convert(architecture.get(name, value), kind)
        if found != value:
            raise CheckpointError(f"{path} has {name} = {found}: the page has {value} alone ({why})")
    embedding = weights["token_embeddings.weight"]
    if embedding.shape[1] % architecture["n_heads"]:
        raise CheckpointError(f"{path} says n_heads = {architecture['n_heads']} of a width of {embedding.shape[1]}")
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite: its training diverged, an earlier file may be whole")
    if not torch.equal(weights.pop("lm_head.weight", embedding), embedding):
        raise CheckpointError(f"{path} has a head of its own: the page's is the embedding read backwards")


def training_state(path: Path, model: torch.nn.Module, groups: list[dict]) -> dict:
    """What a run goes on with from a checkpoint of the source: the optimizer's state, of our parameters, and patience.

    Args:
        model: of the page, with the weights of the checkpoint. groups: of its parameters, as for AdamW.
    Returns {} where the checkpoint has no state of AdamW. Its best loss is not carried over: it is of other chunks.
    """
    contents = read_checkpoint(path)
    saved = contents.get("optimizer_state_dict") or {}
    if not saved.get("state"):
        return {}
    # The source's optimizer counts its parameters in the order of its weights, of which the head is the embedding.
    names = [name for name in contents["model_state_dict"] if not name.endswith((".attn.bias", ".attn.masked_bias"))]
    names = [name for name in names if not name.endswith("lm_head.weight")]
    if saved["state"].keys() != set(range(len(names))):
        note(f"the optimizer's state in {path} is not of its weights: it is left out, and the run cannot go on")
        return {}
    moments = {kind: {} for kind in ("exp_avg", "exp_avg_sq")}
    steps = 0
    for number, name in enumerate(names):
        plain = name.replace("_orig_mod.", "").removeprefix("module.")
        for kind in moments:
            moments[kind][plain] = saved["state"][number][kind]
        steps = saved["state"][number]["step"]
    ours = {kind: translated(found, path) for kind, found in moments.items()}
    optimizer = torch.optim.AdamW(groups)
    for name, parameter in model.named_parameters():
        state = {"step": torch.tensor(float(steps))}
        for kind in ours:
            state[kind] = ours[kind][name][: len(parameter)].clone()  # of positions, those that predict
        optimizer.state[parameter] = state
    return {"optimizer": optimizer.state_dict(), "patience": {"reference": math.inf, "waited": 0, "ended": False}}


def tokenizer_above(path: Path, named: str) -> Path | None:
    """The tokenizer that a checkpoint names from the root of its project, a folder above it or where we are."""
    for folder in (*path.resolve().parents, Path()):
        if named and (folder / named).is_file():
            return folder / named
    return None


def translated(weights: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Weights of a MicroDecoderModel by our names; raises CheckpointError for a name that it has not."""
    model = {}
    for name, weight in weights.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # masks of older transformers
            continue
        if name in NAMES:
            model[NAMES[name]] = weight
            continue
        group, _, rest = name.partition(".")
        number, _, inside = rest.partition(".")
        part, _, kind = inside.rpartition(".")
        if group != "layers" or part not in BLOCK_NAMES:
            raise CheckpointError(f"{path} has a weight {name}, which its MicroDecoderModel has not")
        is_stored_backwards = kind == "weight" and weight.ndim == 2
        model[f"blocks.{number}.{BLOCK_NAMES[part]}.{kind}"] = weight.T.contiguous() if is_stored_backwards else weight
    return model


def without_last_position(state: dict, path: Path) -> dict:
    """The checkpoint with positions for the T = n - 1 predictions of a chunk of n tokens, where it has n.

    The last row of an older table was never trained: no prediction of training is made after n tokens. It goes, with
    its moments in the optimizer's state. Newer checkpoints say chunk_size and pass as they are, and so do the weights
    of an edited copy without such a table. Raises CheckpointError if the optimizer's state is not of this table.
    """
    extra = state["extra"]
    if "chunk_size" in extra:
        return state
    n = extra["n_ctx"]
    newer = dict(state)
    newer["extra"] = extra | {"n_ctx": n - 1, "chunk_size": n}
    table = state["model"].get("position")
    if table is None or len(table) != n:
        return newer
    newer["model"] = state["model"] | {"position": table[:-1].clone()}
    if state["optimizer"]:
        newer["optimizer"] = _without_last_moments(state, path)
    return newer


def _without_last_moments(state: dict, path: Path) -> dict:
    """The optimizer's state, whose first parameters are the matrices, in the order of the weights."""
    shape = state["model"]["position"].shape
    matrices = [name for name, weight in state["model"].items() if weight.ndim >= 2]
    number = matrices.index("position")
    by_number = dict(state["optimizer"]["state"])
    if number in by_number:  # it is not, before the first step
        moments = dict(by_number[number])
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape != shape:
                raise CheckpointError(
                    f"{path} is of an older train_arxiv.py, and its optimizer's state is not of the matrices in their "
                    "order: train anew in another out_dir, or here with resume=never"
                )
            moments[name] = moments[name][:-1].clone()
        by_number[number] = moments
    return state["optimizer"] | {"state": by_number}
