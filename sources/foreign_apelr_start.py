"""Training by train_apelr.py that starts or goes on from a checkpoint: of a run of ours, or of APEL-R, its source.

What such a run takes over, and how the state of the source's AdamW becomes one of ours. Settings (cfg) are the page's
Config, of which only fields are read and replaced.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from common import checkpoint
from common.errors import CheckpointError, DataError, InputError
from configurator import config_dict, from_dict
from sources.foreign_apelr import (
    ALIASES,
    convert,
    fill,
    fill_in,
    is_source_checkpoint,
    known_beside,
    our_names,
    plain_weights,
    read,
    steps,
    to_resume,
    tokenizer_file,
    trained_with,
)
from sources.foreign_checkpoints import checkpoint_in, converting

SIZES = ("version", "backbone", "experts", "expert_rank", "n_layers", "d_model", "n_heads", "token_dim",
         "num_plan_states", "num_experts", "fusion_dim", "d_ff", "max_seq_len")  # settings that weights' shapes follow
ADAMW = ("exp_avg", "exp_avg_sq", "step")  # what it knows of a weight
RULES = ("compat", "boundary", "chunk_size", "carry_posterior", "token_filtering", "planner_context_scale",
         "planner_temperature", "lookahead_horizon", "lookahead_feedback_scale")  # and how a model computes with them


def opened(path: Path, script: str, default, build: Callable) -> tuple:
    """(settings, model, steps done, extra state) of a run folder, a checkpoint or a source checkpoint.

    script: the page's file. default: settings, of which the device is kept and, for a checkpoint of the source, what
    that does not tell. build: (settings, vocabulary) -> model. Raises CheckpointError.
    """
    if is_source_checkpoint(path):
        model = converted(path, default, build)
        return model.cfg, model, convert(path)[2], {"vocab_size": model.cfg.vocab_size, **known_beside(path)}
    state = checkpoint.load(checkpoint.best_of(path), script, vocab_size=int)
    cfg = from_dict(type(default), state["config"] | {"device": default.device}, str(path), ALIASES)
    model = checkpoint.build_with(state["model"], path, lambda: build(cfg, state["extra"]["vocab_size"]))
    return cfg, model, state["step"], state["extra"]


def converted(source: str | Path | dict, default, build: Callable) -> torch.nn.Module:
    """A model with the weights of an APEL-R checkpoint or state dict; settings that it does not tell are the default.

    Weights that are missing keep their start and unknown ones are left out; both are printed. Raises CheckpointError.
    """
    settings, weights, _ = convert(source)
    cfg = type(default)(**config_dict(default) | settings)
    kind = weights["token_emb.weight"].dtype  # the precision that it was saved in
    return checkpoint.build_with(weights, "the source checkpoint", lambda: build(cfg).to(kind), fill_in).eval()


def to_go_on(cfg):
    """(cfg, checkpoint): where resume names a checkpoint of the source, cfg starts from it instead, with the settings
    of its AdamW; else cfg as it is and "".

    Raises InputError where the run would write over one of the source.
    """
    path = to_resume(cfg.resume, cfg.out_dir)
    if path:
        path = str(path)
        return replace(cfg, init_from=path, resume="auto", **optimizer_settings(path)), path
    folder = Path(cfg.out_dir)
    if is_source_checkpoint(folder / "checkpoint.pt") and not (folder / "last.pt").exists():
        raise InputError(
            f"{folder} is a run folder of APEL-R, of which this run would replace tokenizer.json and metrics.json: "
            f"--resume={folder} goes on with that run, --out_dir=FOLDER trains another"
        )
    return cfg, ""


def start_from(cfg, default, is_main: bool = True):
    """(cfg with the sizes of the checkpoint cfg.init_from, its weights by our names); {} where there is none.

    default: settings that nobody gave. Raises CheckpointError where the file cannot be read, InputError where its sizes
    do not go with other settings.
    """
    if not cfg.init_from:
        return cfg, {}
    path = str(checkpoint_in(cfg.init_from))
    cfg = replace(cfg, init_from=path)
    if is_source_checkpoint(path):
        saved, weights, _ = convert(path)
    else:
        state = checkpoint.load(checkpoint.best_of(path))
        saved, weights = state["config"], state["model"]
    taken = taken_over(saved, vars(cfg), vars(default))
    if taken and is_main:
        print(f"note: taken over from {path}: {', '.join(f'{name} = {value}' for name, value in taken.items())}")
    known = cfg.check()
    cfg = replace(cfg, **taken)
    wrong = [sentence for sentence in cfg.check() if sentence not in known]
    if wrong:
        raise InputError(f"init_from={path}: {'; '.join(wrong)}")
    return cfg, weights


def put_in(model: torch.nn.Module, weights: dict[str, torch.Tensor], cfg, corpus) -> None:
    """Weights of start_from into a model; of the source some may be missing, which keep their start.

    Raises CheckpointError where they do not fit, DataError where the corpus has another vocabulary.
    """
    if not weights:
        return
    check_vocabulary(weights, corpus.vocab_size, cfg.init_from, cfg.data)
    if is_source_checkpoint(cfg.init_from):
        weights = fill(model.state_dict(), weights)
    checkpoint.load_weights(model, weights, cfg.init_from)


def taken_over(saved: dict, current: dict, default: dict) -> dict:
    """{setting: value} that a run takes over from the checkpoint whose weights it starts from, where they differ.

    Sizes, which the weights have; of a model that computes as the source does also its rules, unless the run was given
    another one than the default.
    """
    names = [*SIZES]
    if saved.get("compat"):
        names += [name for name in RULES if current[name] == default[name]]
    taken = {name: saved[name] for name in names if name in saved and saved[name] != current.get(name)}
    if current.get("num_experts") == saved.get("num_plan_states"):
        taken.pop("num_experts", None)  # as many as plans, which None says too
    return taken


def check_vocabulary(weights: dict[str, torch.Tensor], vocab_size: int, path: str | Path, data: str) -> None:
    """Raises DataError where the weights of a checkpoint are not of the vocabulary of the data."""
    known = len(weights["token_emb.weight"])
    if known == vocab_size:
        return
    file = tokenizer_file(path) if is_source_checkpoint(path) else Path(path) / "tokenizer.json"
    raise DataError(
        f"{path} knows {known:,} tokens, and {data} has {vocab_size:,}: prepare the text with its tokenizer, by "
        f"python prepare_data.py text --tokenizer={file or 'FILE'} --out_dir=data/own"
    )


def optimizer_settings(path: str | Path) -> dict:
    """weight_decay, beta1, beta2 of the AdamW in a checkpoint, which the source goes on with whatever its YAML says."""
    state = adamw_of(read(path))
    if not state:
        return {}
    with converting(path, "APEL-R"):
        group = state["param_groups"][0]
        beta1, beta2 = map(float, group["betas"])
        return {"weight_decay": float(group["weight_decay"]), "beta1": beta1, "beta2": beta2}


def go_on(
    path: str | Path,
    corpus,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    max_steps: int,
) -> tuple[int, str]:
    """Put the state of AdamW of a checkpoint into an optimizer of ours; returns (steps done, what a run says of it).

    The source has one group of parameters, ours has two and stacked heads: moments are renamed and stacked as weights
    are. Raises InputError where the checkpoint is of max_steps or more, CheckpointError where its state does not fit,
    DataError where the corpus has another tokenizer.
    """
    source = read(path)
    if known_beside(path).get("tokenizer_hash", corpus.tokenizer_hash) != corpus.tokenizer_hash:
        raise DataError(f"{path} was trained with the tokenizer {tokenizer_file(path)}, and {corpus.name} has another")
    done = steps(source)
    if done >= max_steps:
        raise InputError(
            f"{path} has done {done} steps already, and max_steps = {max_steps}: ask for more of them, or for "
            f"init_from={path}, which begins at step 0 with its weights, or analyze={path}, which measures them"
        )
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    with converting(path, "APEL-R"):
        carried = put_moments(path, source, model, optimizer)
    adam = f"AdamW's moments of {carried} of {count} tensors" if carried else "no state of AdamW, which starts anew"
    said = (
        f"resumed from {path} of APEL-R at step {done}: its weights, {adam}, the rate of that step; it keeps no random "
        "numbers and no loss scale, and batches are ours"
    )
    before, now = trained_with(source, "train", "lr"), optimizer.defaults["lr"]
    if before not in (None, now):
        said += f". It was trained with lr = {before} and goes on with {now}: name its YAML file to train as there"
    return done, said


def put_moments(path: str | Path, source: dict, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The state of AdamW of go_on; returns of how many parameters there was one."""
    settings, _, _ = convert(source)
    moments = {part: our_names(found, settings) for part, found in adam_state(source).items()}
    state = {}
    carried = 0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = optimizer.state_dict()["param_groups"]
    for group, numbers in zip(optimizer.param_groups, ours, strict=True):
        for parameter, number in zip(group["params"], numbers["params"], strict=True):
            name = names[id(parameter)]
            if name not in moments["exp_avg"]:
                continue
            known = {part: values[name].clone() for part, values in moments.items()}  # of the file in memory
            if known["exp_avg"].shape != parameter.shape or known["exp_avg_sq"].shape != parameter.shape:
                raise CheckpointError(f"{path}: the optimizer's state of {name} does not have the shape of the weight")
            state[number] = known | {"step": known["step"].max()}  # of stacked heads all are the same
            carried += 1
    optimizer.load_state_dict({"state": state, "param_groups": ours})
    return carried


def adam_state(source: dict) -> dict[str, dict[str, torch.Tensor]]:
    """{exp_avg, exp_avg_sq or step: {weight by its name in the source: value}} of a checkpoint of the source.

    Raises CheckpointError where there are not as many parameters as weights.
    """
    found = {part: {} for part in ADAMW}
    state = adamw_of(source)
    if not state:
        return found
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    # A state dict has the order of parameters() here: no weight of the source is shared, and none is a buffer.
    weights = plain_weights(source)
    if len(numbers) != len(weights):
        raise CheckpointError(
            f"the optimizer of the source checkpoint is of {len(numbers)} parameters, and its model has {len(weights)}"
        )
    for number, name in zip(numbers, weights, strict=True):
        for part, value in state["state"].get(number, {}).items():
            if part in found:
                # A step a weight, so that heads can be stacked as their moments are.
                found[part][name] = torch.as_tensor(value, dtype=torch.float32) if part == "step" else value
    return found


def adamw_of(source: dict) -> dict | None:
    """The state of AdamW in a checkpoint of the source; None where there is none, by save_optimizer_state: false.

    Raises CheckpointError where it is of another optimizer, or no such state.
    """
    state = source.get("optimizer_state_dict") if "model_state_dict" in source else None
    if not state:
        return None
    try:
        groups = [group[name] for group in state["param_groups"] for name in ("params", "weight_decay", "betas")]
        moments = [known[part] for known in state["state"].values() for part in ADAMW]
    except (KeyError, TypeError, AttributeError):
        groups = moments = None
    if not groups or moments is None:
        raise CheckpointError(
            "the optimizer_state_dict of the source checkpoint is not of AdamW, with which alone a run goes on: "
            "init_from=CHECKPOINT starts from its weights"
        )
    return state
