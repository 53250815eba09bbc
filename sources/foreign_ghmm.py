"""Simplexity, the source of train_ghmm.py: its names of settings, what they mean together, and its checkpoints.

Its settings are Hydra's: `training.optimizer.instance.lr`, `_target_` for the class that is built. The source reads
sequences of sequence_len tokens as inputs and labels: it predicts from one token fewer, or from as many behind a BOS.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import CheckpointError
from configurator import READ, Derived, convert, note
from sources.foreign_checkpoints import converting, is_equinox, read_checkpoint, system_of
from sources.given import is_null, is_on
from sources.processes import all_parameters, make_process, parameters


def tokens_read(sequence_len: float, settings: dict[str, Any]) -> float:
    """n_ctx: the last token is only predicted, and a BOS stands before the first."""
    return sequence_len - 1 + settings["add_bos"]


def every(steps: float, settings: dict[str, Any]) -> float:
    """An interval in steps; 0 is never, which is at the end here. -1 divides every number of steps."""
    return abs(steps) or settings["max_steps"]


NO_EFFECT = (  # names, sizes that follow from others, what is judged and written elsewhere
    "name", "experiment_name", "run_name", "checkpoint_name", "tags", "vocab_size", "base_vocab_size", "in_size",
    "out_size", "num_observations", "weights_filename", "load_weights", "load_checkpoint_name", "validation",
    "evaluation", "validation_data_generator", "validation.num_steps", "validation.sequence_len",
    "validation.log_every", "evaluation.num_steps", "evaluation.sequence_len", "evaluation.log_every",
    "validation_data_generator.instance.process_name", "validation_data_generator.instance.pR1",
    "validation_data_generator.instance.pR2", "validation_data_generator.use_bos", "num_validation_steps",
    "log_expensive_every", "logging", "mlflow", "tracking", "metric_tracker", "training_metric_tracker",
    "eval_metric_tracker", "activation_tracker", "state_sampler", "training_state_sampler",
    "validation_state_sampler", "lr_scheduler", "learning_rate_scheduler", "hydra", "prefix", "bucket",
    "bucket_name", "model_framework", "tracking_uri", "registry_uri", "artifact_path",
    "registered_model_name", "downgrade_unity_catalog", "file_path", "use_cache", "use_hook_tokens")  # fmt: skip
TOGETHER = (  # what `complete` reads
    "_target_", "_partial_", "_recursive_", "_convert_", "process_names", "process_kwargs", "process_params",
    "process_weights", "component_weights", "vocab_maps", "add_bos_token", "bos_token", "eos_token", "use_eos",
    "d_vocab", "cfg.n_heads", "cfg.n_ctx", "instance.n_ctx", "cfg.seed", "instance.seed", "cfg.device",
    "instance.device", "cfg.positional_embedding_type", "attn_only", "act_type", "use_ln", "hidden_sizes",
    "init_mode", "initializer_range", "betas", "eps", "eps_root", "nesterov", "amsgrad", "filename",
    "config_filename")  # fmt: skip
ALIASES = {  # names of the source's command lines and YAML files, then those that a setting had here before
    "process_name": "process",
    "pR1": "p1",
    "pR2": "p2",
    "transition_matrices": "matrices",
    "use_bos": "add_bos",
    "sequence_len": Derived("n_ctx", tokens_read),
    "num_layers": "n_layers",
    "hidden_size": "d_model",
    "embedding_dim": "d_model",
    "embedding_size": "d_model",
    "num_heads": "n_heads",
    "mlp_hidden_dim": "d_mlp",
    "act_fn": "act",
    "positional_embedding_type": "positional",
    "normalization_type": "normalization",
    "cfg.eps": "norm_eps",
    "learning_rate": "lr",
    "b1": "beta1",
    "b2": "beta2",
    "num_train_steps": "max_steps",
    "num_steps": "max_steps",
    "log_every": Derived("log_interval", every),
    "log_cheap_every": Derived("log_interval", every),
    "validate_every": Derived("eval_interval", every),
    "evaluate_every": Derived("eval_interval", every),
    "checkpoint_every": Derived("save_interval", every),
    "base_dir": "out_dir",
    "directory": "out_dir",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    **dict.fromkeys(TOGETHER, READ),
    **dict.fromkeys(NO_EFFECT),
}


# ---------------------------------------------------------------------------------------------------------------
# What settings mean together
# ---------------------------------------------------------------------------------------------------------------
MISSING = "???"  # of OmegaConf: to be set by the program, where nobody has
PROCESS, MODEL = ("training_data_generator", "generative_process"), ("predictive_model",)
LOOP = ("training", "train")
OF_LOOP = {"seed", "sequence_len", "batch_size", "num_steps", "num_train_steps", "log_every", "validate_every",
           "checkpoint_every", "checkpoint_name", "optimizer", "log_cheap_every", "log_expensive_every",
           "evaluate_every"}  # fmt: skip
OPTIMIZER = (*LOOP, "optimizer")
BUILDERS = {  # _target_ of a process: ours; "" is that of process_name
    "simplexity.generative_processes.builder.build_hidden_markov_model": "",
    "simplexity.generative_processes.builder.build_generalized_hidden_markov_model": "",
    "simplexity.generative_processes.builder.build_nonergodic_hidden_markov_model": "nonergodic",
    "simplexity.generative_processes.builder.build_nonergodic_process_from_spec": "nonergodic",
    "simplexity.generative_processes.hidden_markov_model.HiddenMarkovModel": "custom",
    "simplexity.generative_processes.generalized_hidden_markov_model.GeneralizedHiddenMarkovModel": "custom",
}
MODELS = {  # _target_ of a model: ours
    "simplexity.predictive_models.gru_rnn.build_gru_rnn": "gru",
    "simplexity.predictive_models.rnn.build_rnn": "gru",
    "simplexity.predictive_models.rnn.RNN": "gru",
    "simplexity.predictive_models.pytorch_transformer.build_pytorch_transformer": "transformer",
    "transformer_lens.HookedTransformer": "transformer",
}
PLAIN = "pytorch_transformer"
DECAY = {  # _target_ of an optimizer: its weight decay where none is given
    "optax.adam": 0.0,
    "optax.adamw": 1e-4,
    "torch.optim.Adam": 0.0,
    "torch.optim.AdamW": 1e-2,
}
NOT_BUILT = {  # group=NAME of what has no like here
    "rpn_arithmetic": "arithmetic", "binary_tree_arithmetic": "arithmetic", "single_addition": "arithmetic",
    "product_mess3x2": "products of processes", "product_mess3_zero_one": "products of processes",
    "product_mess3_tom_quantum": "products of processes", "product_even_ones_rrxor": "products of processes",
    "transformer": "Penzai's transformer (gated MLP, grouped heads; of the newest layout bring a run's config.yaml)",
    "small_transformer": "Penzai's transformer (gated MLP, grouped heads)",
    "medium_transformer": "Penzai's transformer (gated MLP, grouped heads)",
    "gruformer": "the GRU in a transformer",
}  # fmt: skip
OTHER_PROCESS = "choose training_data_generator=mess3 or another of python train_ghmm.py --help"
S3_CONFIG = "config.ini"
OTHER_MODEL = "choose predictive_model=gru_rnn or predictive_model=transformer_lens_2L2H"


def speaks(given: dict[str, Any]) -> bool:
    """Whether a file's list of defaults is of the source's parts, or all of a section on training is the source's.

    A section of that name in a file of ours has an lr or max_steps as well.
    """
    if any(group.split("@")[0] in PROCESS + MODEL for group in defaults_of(given)):
        return True
    for section in LOOP:
        keys = {key.split(".")[1] for key in given if key.startswith(f"{section}.")}
        if keys and keys <= OF_LOOP:
            return True
    return False


def defaults_of(given: dict[str, Any]) -> dict[str, Any]:
    """{group: name} of a file's list of defaults."""
    groups = {}
    items = given.get("defaults")
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict):
            groups |= {str(group).removeprefix("override "): name for group, name in item.items()}
    return groups


def complete(given: dict[str, Any], values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """What all settings of the source together make of ours; see sources.foreign.Dialect.completed."""
    names = by_name(given)
    more = of_process(given, names, values, fields)
    more |= of_tokens(given, names, values | more, fields)
    more |= of_model(given, names, values | more, fields)
    more |= of_optimizer(given, names, values, fields)
    more |= of_intervals(names, values, fields)
    more |= of_persister(given, names, fields)
    say_what_differs(given, names, values)
    return more


def by_name(given: dict[str, Any]) -> dict[str, Any]:
    """{last part, and last two parts, of a key: its value, None for null}; nothing of what is about validation.

    Of two keys the longer counts: groups are written without what is before the name.
    """
    names = {}
    for key in sorted(given, key=lambda key: key.count(".")):
        path = key.split(".")
        if path[0].startswith(("validation", "evaluation")):
            continue
        value = None if is_null(given[key]) else given[key]
        names[path[-1]] = value
        names[".".join(path[-2:])] = value
    return names


def chosen(given: dict[str, Any], fields: dict[str, str], groups: tuple[str, ...]) -> tuple[str, str]:
    """(NAME of group=NAME, "") or ("", `_target_`) of a part of the configuration.

    A NAME replaces what a file has in its place, and a `_target_` on the command line what NAME has.
    """
    name = target = ""
    for key, value in given.items():
        first, _, rest = key.partition(".")
        part = first.split("@")[-1]
        if rest.endswith("instance._target_") and part in groups and not is_null(value):
            target = str(value)
            if fields.get(key) == "command line":
                return "", target
        elif not rest and part.split("/")[0] in groups and isinstance(value, str):
            name = value
    return (name, "") if name else ("", target)


def of_process(given: dict, names: dict, values: dict, fields: dict) -> dict[str, Any]:
    """process, its parameters and components."""
    name, target = chosen(given, fields, PROCESS)
    if name in NOT_BUILT or target and target not in BUILDERS:
        what = NOT_BUILT.get(name, target)
        raise ValueError(f"{PROCESS[0]}: {what} is no process of this page: {OTHER_PROCESS}")
    process = BUILDERS.get(target) or values["process"]
    more = {}
    components = components_of(names)
    for setting in ("process_params", "process_kwargs"):
        if components is None and names.get(setting):
            raise ValueError(f"{setting} = {names[setting]}: write each by its name, as {setting}.x=0.15")
    if components:
        process = "nonergodic"
        more["components"] = components
    elif process == "custom" or "matrices" in fields:
        process = "custom"
    more["process"] = process
    # The default process's parameters are nobody's but its, and a process chosen by name replaces another's.
    for parameter in all_parameters() - set(parameters(process)):
        if parameter in values and (parameter not in fields or name) and fields.get(parameter) != "command line":
            more[parameter] = None
    return more


def components_of(names: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Components of a mixture, from lists of their names, parameters, weights and vocabularies, or from dicts."""
    if names.get("process_names") is not None:
        kinds = listed(names, "process_names", list[str])
        params = listed(names, "process_kwargs", list[dict[str, Any]])
        params = params or listed(names, "process_params", list[dict[str, Any]]) or [{}] * len(kinds)
    elif isinstance(names.get("components"), list | str):
        parts = listed(names, "components", list[dict[str, Any]])
        if any("process_name" not in part for part in parts):
            return None  # as this page writes them
        kinds = [part["process_name"] for part in parts]
        params = [part.get("process_params") or {} for part in parts]
        params = listed({"process_params": params}, "process_params", list[dict[str, Any]])
    else:
        return None
    weights = listed(names, "process_weights", list[float]) or listed(names, "component_weights", list[float])
    weights = weights or [1.0] * len(kinds)
    maps = listed(names, "vocab_maps", list[list[int]]) or [None] * len(kinds)
    if not len(kinds) == len(params) == len(weights) == len(maps):
        raise ValueError("process_names, process_params (or process_kwargs), process_weights and vocab_maps must be "
                         f"as long as each other, not {len(kinds)}, {len(params)}, {len(weights)}, {len(maps)}")
    components = []
    for kind, own, weight, vocab_map in zip(kinds, params, weights, maps, strict=True):
        component = {"process": kind, "weight": weight}
        if vocab_map is not None:
            component["vocab_map"] = vocab_map
        for parameter, value in own.items():
            component[ALIASES.get(parameter, parameter)] = value
        components.append(component)
    return components


def is_newest_layout(given: dict, names: dict) -> bool:
    """Whether the optimizer has a part of its own, and the loop evaluates instead of validating."""
    return any(key.split(".")[0] == "optimizer" for key in given) or "evaluate_every" in names


def listed(names: dict[str, Any], name: str, kind: Any) -> list:
    """A setting that is a list, empty where it is not there. Raises ValueError, which names it."""
    try:
        return convert(names.get(name) or [], kind)
    except ValueError as error:
        raise ValueError(f"{name} = {names[name]}: {error}") from error


def of_tokens(given: dict, names: dict, values: dict, fields: dict) -> dict[str, Any]:
    """add_bos, n_ctx and carry_state."""
    more = {}
    if names.get("eos_token") is not None or is_on(names, "use_eos"):
        raise ValueError("eos_token: a token after the last of every sequence says nothing of the process and is not "
                         "built here: leave it out (eos_token=null, use_eos=false)")
    newer = is_newest_layout(given, names)
    # A BOS of the data stands before sequence_len tokens; one of the builder is the first of them.
    outside = values["add_bos"] if "add_bos" in fields else names.get("bos_token") is not None
    if newer and "bos_token" not in names and chosen(given, fields, PROCESS)[0] == "mess3":
        outside = True  # the newest layout's file of this name has one
    bos = outside or is_on(names, "add_bos_token")
    more["add_bos"] = bos
    check_vocabulary(names, values, bos)
    room = names.get("cfg.n_ctx") or names.get("instance.n_ctx")
    length = names.get("sequence_len")
    if "n_ctx" in given:
        pass  # in our words
    elif is_number(length):
        more["n_ctx"] = int(length) - 1 + outside
        if is_number(room) and int(room) < more["n_ctx"]:
            raise ValueError(f"n_ctx = {room} of the model, but sequence_len = {length} makes it read "
                             f"{more['n_ctx']} tokens: set the one or the other")
    elif is_number(room):
        more["n_ctx"] = int(room)
    elif "n_ctx" not in fields:
        more["n_ctx"] = values["n_ctx"] + outside
    # Its loop goes on with the process where the batch before ended; the newer one starts it anew for each.
    if "carry_state" not in fields:
        more["carry_state"] = not (bos or newer or values["initial_state"])
        if bos and not newer:
            note("a BOS starts its sequence anew here; Simplexity's process goes on behind it from batch to batch")
    return more


def check_vocabulary(names: dict, values: dict, bos: bool) -> None:
    """Raises ValueError where bos_token or d_vocab is not what the process makes it; ProcessError is one too."""
    told, size = names.get("bos_token"), names.get("d_vocab")
    if not is_number(told) and not is_number(size):
        return
    own = {name: values[name] for name in parameters(values["process"]) if values.get(name) is not None}
    V = make_process(values["process"], **own).vocab_size
    if is_number(told) and bos and int(told) != V:
        raise ValueError(f"bos_token = {told}: the process has the tokens 0 to {V - 1}, so that its BOS is {V}")
    if is_number(size) and int(size) != V + bos:
        raise ValueError(f"d_vocab = {size}: the process has {V + bos} tokens, a BOS among them; leave it out")


def of_model(given: dict, names: dict, values: dict, fields: dict) -> dict[str, Any]:
    """Which network, its sizes and initial weights."""
    name, target = chosen(given, fields, MODEL)
    if name in NOT_BUILT or target and target not in MODELS:
        what = NOT_BUILT.get(name, target)
        raise ValueError(f"{MODEL[0]}: {what} is no model of this page: {OTHER_MODEL}")
    model = MODELS.get(target, values["model"])
    more = {"model": model}
    if names.get("hidden_sizes") is not None:
        sizes = convert(names["hidden_sizes"], list[int])
        if len(set(sizes)) != 1:
            raise ValueError(f"hidden_sizes = {sizes}: all layers are as wide as each other here")
        more |= {"n_layers": len(sizes), "d_model": sizes[0]}
    if "embedding_size" in names:
        more["one_hot"] = False  # the one version whose GRU had an embedding
    if model == "transformer":
        own = PLAIN in (name, target.rsplit(".build_")[-1])
        more |= of_transformer(names, values | more, fields, 1.0 if own else 0.8)
        if own:
            note("attention and unembedding of pytorch_transformer have no biases; here they have, 0 at first, and the "
                 "unembedding begins with 1 / sqrt(d_model), not with 1 / sqrt(vocabulary)")
    device = names.get("cfg.device") or names.get("instance.device")
    if device and "device" not in fields:
        there = not str(device).startswith("cuda") or torch.cuda.is_available()
        more["device"] = device if there else "auto"
    return more


def of_transformer(names: dict, values: dict, fields: dict, scale: float) -> dict[str, Any]:
    """Sizes and initial weights of a HookedTransformer (or of the like of it) where they are not given.

    scale: all matrices have the standard deviation scale / sqrt(d_model), those that write to the stream as well.
    """
    if is_on(names, "attn_only"):
        raise ValueError("attn_only: a transformer without MLPs is not built here: attn_only=false")
    if names.get("init_mode") not in (None, "gpt2"):
        raise ValueError(f"init_mode = {names['init_mode']}: initial weights are normal here, as in init_mode=gpt2")
    more = {}
    D = values["d_model"]
    if "d_mlp" not in fields:
        more["d_mlp"] = 4 * D
    heads = names.get("cfg.n_heads")  # -1: as many as fit
    if is_number(heads) and int(heads) > 0 and fields.get("n_heads") != "command line":
        more["n_heads"] = int(heads)
    elif is_number(heads) or "n_heads" not in fields:
        more["n_heads"] = max(1, D // (values["d_head"] or D))
    kinds = {"standard": "learned", "learned": "learned", "rotary": "rope", "rope": "rope", "none": "none"}
    kind = names.get("cfg.positional_embedding_type")
    if kind is not None:
        if kind not in kinds:
            raise ValueError(f"positional_embedding_type = {kind}: only standard and rotary are built here")
        more["positional"] = kinds[kind]
    if names.get("act_type") is not None:
        more["act"] = str(names["act_type"]).lower()
    if is_number(names.get("initializer_range")) and float(names["initializer_range"]) > 0:
        scale = float(names["initializer_range"]) * D**0.5
    for setting, value in (("init_scale", scale), ("writer_scale", 1.0), ("norm_eps", 1e-5)):
        if setting not in fields:
            more[setting] = value
    return more


def of_optimizer(given: dict, names: dict, values: dict, fields: dict) -> dict[str, Any]:
    """Both betas and the weight decay; refused is what is neither Adam nor AdamW."""
    name, target = chosen(given, fields, OPTIMIZER)
    if target and target not in DECAY:
        raise ValueError(f"optimizer: {target} is not built here: Adam and AdamW are, as _target_={list(DECAY)[2]}")
    everything = defaults_of(given) | given
    for schedule in ("lr_scheduler", "learning_rate_scheduler"):
        if any(key.split(".")[0] == schedule and not is_null(value) for key, value in everything.items()):
            raise ValueError(f"{schedule}: not built here: leave it out, and set schedule=constant or schedule=cosine "
                             "and warmup_steps instead")
    for switch in ("nesterov", "amsgrad"):
        if is_on(names, switch):
            raise ValueError(f"optimizer: {switch} is not built here: {switch}=false is plain Adam")
    for number, usual in (("eps", 1e-8), ("eps_root", 0.0)):
        if f"cfg.{number}" not in names and is_number(names.get(number)) and float(names[number]) != usual:
            raise ValueError(f"optimizer: {number} = {names[number]}: it is {usual:g} here and no setting")
    more = {}
    if names.get("betas") is not None:
        try:
            more["beta1"], more["beta2"] = convert(names["betas"], tuple[float, float])
        except ValueError as error:
            raise ValueError(f"betas = {names['betas']}: {error}") from error
    # No file of Adam names a weight decay: that of a group is ours, to replace what was there.
    of_group = "=" in fields.get("weight_decay", "") and not values["weight_decay"]
    if target and (of_group or "weight_decay" not in fields):
        more["weight_decay"] = DECAY[target]
    elif target.endswith(("adam", "Adam")) and values["weight_decay"]:
        raise ValueError(f"weight_decay = {values['weight_decay']:g} of {target} is added to the gradient; here it is "
                         "decoupled, as in AdamW: use weight_decay=0, or the _target_ of AdamW")
    return more


def of_intervals(names: dict, values: dict, fields: dict) -> dict[str, Any]:
    """Intervals that are null, which is never: at the end, when this page looks in any case; all checkpoints stay."""
    more = {}
    for setting, theirs in (
        ("log_interval", ("log_every", "log_cheap_every")),
        ("eval_interval", ("validate_every", "evaluate_every")),
        ("save_interval", ("checkpoint_every",)),
    ):
        if any(name in names and names[name] is None for name in theirs):
            more[setting] = values["max_steps"]
    if "keep_last" not in fields and "save_interval" in more:
        more["keep_last"] = 0
    return more


def of_persister(given: dict, names: dict, fields: dict) -> dict[str, Any]:
    """s3_config, where checkpoints go to S3: the persister's file has bucket, prefix and profile as ours has."""
    kind = "".join(chosen(given, {}, ("persistence", "persister"))).lower()
    if "mlflow" in kind:
        note("checkpoints are written to out_dir on this machine, not to MLflow")
    if "s3" not in kind or "s3_config" in fields:
        return {}
    file = names.get("config_filename") or names.get("filename")
    if not file and Path(S3_CONFIG).is_file():  # where the source looks if it is not told
        file = S3_CONFIG
    if not file:
        note(f"checkpoints are written to out_dir on this machine, as no {S3_CONFIG} here names a bucket: "
             "--s3_config=FILE.ini copies them to S3")
        return {}
    note(f"s3_config = {file}: out_dir is copied to s3://BUCKET/PREFIX/{{out_dir}}, of bucket and prefix in that file")
    return {"s3_config": file}


def say_what_differs(given: dict, names: dict, values: dict) -> None:
    """A line for each choice that changes no result, but where it is found."""
    logger, logs = chosen(given, {}, ("logging",))
    if "mlflow" in f"{logger}{logs}".lower():
        note("nothing is sent to MLflow: metrics go to metrics.jsonl in out_dir; --tensorboard and --wandb log as well")
    elsewhere = ("hydra", "validation", "evaluation")
    seeds = {str(value) for key, value in given.items()
             if key.split(".")[-1] == "seed" and not key.startswith(elsewhere) and not is_null(value)}
    if seeds and seeds != {str(values["seed"])} and not any("${" in seed for seed in seeds):
        note(f"one seed is for model and data: seed = {values['seed']}")


def is_number(value: Any) -> bool:
    try:
        return value is not None and convert(value, float) is not None
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: state dicts of HookedTransformer and pytorch_transformer (.pt), leaves of the GRU (.eqx of Equinox)
# ---------------------------------------------------------------------------------------------------------------
HOOKED = "blocks.0.attn.W_Q"  # a weight that every HookedTransformer has
Weights = dict[str, torch.Tensor]


def is_source_checkpoint(path: str | Path) -> bool:
    """Whether a file is a checkpoint of the source rather than of this repository."""
    return system_of(Path(path)) == "ghmm"


def convert_checkpoint(path: str | Path) -> tuple[dict[str, Any], Weights, int]:
    """(settings that the weights tell, weights by our names, steps done) of a checkpoint of the source.

    "vocab_size" and "rows" (of the table of positions) are told as well. The steps are those of the folder that it is
    in, as the source names it: STEP/model.pt, step_STEP/model.pt.
    Raises CheckpointError where the file is damaged or of another model.
    """
    path = Path(path)
    step = re.fullmatch(r"(?:step_)?(\d+)", path.resolve().parent.name)
    with converting(path, "Simplexity"):
        if is_equinox(path):
            settings, weights = from_gru(read_leaves(path), path)
        else:
            settings, weights = from_hooked(plain_weights(read_checkpoint(path)), path)
    return settings, weights, int(step[1]) if step else 0


def config_beside(path: str | Path) -> Path:
    """The config.yaml of a checkpoint's run: beside it, or in the folders above, where Hydra's .hydra may hold it.

    Raises CheckpointError where there is none: weights do not tell the process, nor the nonlinearity.
    """
    for folder in list(Path(path).resolve().parents)[:3]:
        for place in (folder / "config.yaml", folder / ".hydra" / "config.yaml"):
            if place.is_file():
                note(f"{path} is read as of the run of {place}")
                return place
    raise CheckpointError(
        f"{path} is a checkpoint of Simplexity without the config.yaml of its run, which says the process and the "
        "nonlinearity: put it beside the checkpoint"
    )


def agree(told: dict[str, Any], config: dict[str, Any], vocab_size: int, path: str | Path) -> dict[str, Any]:
    """Settings with what the weights tell of them. vocab_size: of the process of the settings.

    Raises CheckpointError where the weights are not of a model of these settings.
    """
    told = dict(told)
    size = told.pop("vocab_size")
    rows = told.pop("rows", None)
    wrong = [f"{name} = {config[name]}, the weights {told[name]}" for name in ("model", "normalization", "positional")
             if told.get(name, config[name]) != config[name]]  # fmt: skip
    if size != vocab_size:
        wrong.append(f"a process of {vocab_size} tokens, the weights {size}")
    if rows is not None and rows < config["n_ctx"]:
        wrong.append(f"n_ctx = {config['n_ctx']}, the weights {rows}")
    if told["model"] == "transformer" and "normalization" not in told and config["normalization"] in ("LN", "RMS"):
        wrong.append(f"normalization = {config['normalization']}, the weights none that is learned")
    if wrong:
        raise CheckpointError(f"{path} is not of the run that its config.yaml is of: it says {'; '.join(wrong)}")
    return config | told


def plain_weights(contents: dict) -> Weights:
    """A state dict without what torch.compile, DistributedDataParallel and a wrapper put before its names."""
    if not isinstance(contents, dict):
        return {}
    for key in ("model_state_dict", "state_dict"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
    weights = {}
    for name, value in contents.items():
        if isinstance(value, torch.Tensor):
            plain = str(name).replace("_orig_mod.", "").removeprefix("module.").removeprefix("model.")
            weights[plain] = value
    return weights


def from_hooked(source: Weights, path: Path) -> tuple[dict[str, Any], Weights]:
    """(settings, weights) of a HookedTransformer: ours has its matrices transposed, and its heads side by side."""
    if "blocks.0.attn.b_Q" not in source:
        source = as_hooked(source)
    heads, D, C = source[HOOKED].shape
    layers = {name.split(".")[1] for name in source if name.startswith("blocks.")}
    settings = {"model": "transformer", "n_layers": len(layers), "n_heads": heads, "d_model": D, "d_head": C}
    norms = {"attention_norm": "ln1", "mlp_norm": "ln2"}
    learned = [part for part in ("w", "b") if f"ln_final.{part}" in source]
    if learned:
        settings["normalization"] = "LN" if "b" in learned else "RMS"
    ours = {}
    try:
        settings["vocab_size"] = len(source["embed.W_E"])
        settings["d_mlp"] = source["blocks.0.mlp.W_in"].shape[1]
        ours["embed.weight"] = source["embed.W_E"]
        if "pos_embed.W_pos" in source:
            settings |= {"positional": "learned", "rows": len(source["pos_embed.W_pos"])}
            ours["position"] = source["pos_embed.W_pos"]
        else:
            settings["positional"] = "rope" if "blocks.0.attn.rotary_sin" in source else "none"
        for i in range(len(layers)):
            block = f"blocks.{i}."
            attention = block + "attn."
            # [H, D, C] of each to [3 H C, D] of all three.
            matrices = [source[f"{attention}W_{kind}"].transpose(1, 2).flatten(0, 1) for kind in "QKV"]
            ours[block + "qkv.weight"] = torch.cat(matrices)
            ours[block + "qkv.bias"] = torch.cat([source[f"{attention}b_{kind}"].flatten() for kind in "QKV"])
            ours[block + "attention_out.weight"] = source[attention + "W_O"].flatten(0, 1).T.contiguous()
            ours[block + "attention_out.bias"] = source[attention + "b_O"]
            for layer in ("in", "out"):
                ours[f"{block}mlp_{layer}.weight"] = source[f"{block}mlp.W_{layer}"].T.contiguous()
                ours[f"{block}mlp_{layer}.bias"] = source[f"{block}mlp.b_{layer}"]
            for norm, theirs in norms.items():
                for part in learned:
                    ours[f"{block}{norm}.{'weight' if part == 'w' else 'bias'}"] = source[f"{block}{theirs}.{part}"]
        for part in learned:
            ours["final_norm." + ("weight" if part == "w" else "bias")] = source[f"ln_final.{part}"]
        ours["unembed.weight"] = source["unembed.W_U"].T.contiguous()
        ours["unembed.bias"] = source["unembed.b_U"]
    except KeyError as error:
        raise CheckpointError(
            f"{path} is a HookedTransformer that is not built here: it has no weights {error.args[0]}"
        ) from error
    return settings, ours


def as_hooked(source: Weights) -> Weights:
    """Weights of the source's own pytorch_transformer as a HookedTransformer has them: transposed, with biases of 0."""
    hooked = {}
    for name, value in source.items():
        part, weight = name.rsplit(".", 1)
        if weight in ("W_Q", "W_K", "W_V"):
            hooked[name] = value.transpose(1, 2)
            hooked[f"{part}.b_{weight[-1]}"] = torch.zeros_like(value[..., 0])
        elif weight == "W_O":
            heads, C, _ = source[f"{part}.W_Q"].shape
            hooked[name] = value.T.unflatten(0, (heads, C))
            hooked[f"{part}.b_O"] = torch.zeros_like(value[:, 0])
        elif weight in ("W_E", "W_in", "W_out"):
            hooked[name] = value.T
        else:
            hooked[name] = value
    if "unembed.W_U" in source:
        hooked["unembed.b_U"] = torch.zeros_like(source["unembed.W_U"][0])
    return hooked


def read_leaves(path: Path) -> list[torch.Tensor]:
    """The arrays of an .eqx file in their order; nothing in it is executed. Raises CheckpointError if it is damaged."""
    leaves = []
    try:
        with open(path, "rb") as file:
            while file.peek(1):
                leaves.append(torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False)))
    except Exception as error:  # numpy evaluates a header that may hold anything
        raise CheckpointError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from error
    if not all(leaf.is_floating_point() and leaf.isfinite().all() for leaf in leaves):
        raise CheckpointError(f"{path} is damaged, or its training diverged: it holds what are no finite numbers")
    return leaves


def from_gru(leaves: list[torch.Tensor], path: Path) -> tuple[dict[str, Any], Weights]:
    """(settings, weights) of the source's GRU: for each layer weight_ih, weight_hh, bias, bias_n, then the last layer.

    Gates are in the order r, z, n, as here. Its bias has no part of its own for the hidden state but that of n.
    """
    *cells, W, b = leaves if len(leaves) > 5 else [None] * 3
    layers = [cells[i : i + 4] for i in range(0, len(cells), 4)]
    ours = {}
    H = 0 if W is None or W.ndim != 2 else W.shape[1]
    width = len(b) if H else 0  # V: tokens are read as one-hot vectors
    for i, layer in enumerate(layers):
        shapes = [tuple(leaf.shape) for leaf in layer if leaf is not None]
        if not H or shapes != [(3 * H, width), (3 * H, H), (3 * H,), (H,)]:
            raise CheckpointError(
                f"{path} holds the leaves of a model that is not built here; the GRU of Simplexity is, whose layers "
                f"are as wide as each other"
            )
        weight_ih, weight_hh, bias, bias_n = layer
        zeros = torch.zeros(2 * H, dtype=bias.dtype)
        ours |= {
            f"layers.{i}.weight_ih_l0": weight_ih,
            f"layers.{i}.weight_hh_l0": weight_hh,
            f"layers.{i}.bias_ih_l0": bias,
            f"layers.{i}.bias_hh_l0": torch.cat([zeros, bias_n]),
        }
        width = H
    ours |= {"unembed.weight": W, "unembed.bias": b}
    return {"model": "gru", "one_hot": True, "n_layers": len(layers), "d_model": H, "vocab_size": len(b)}, ours
