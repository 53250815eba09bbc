"""Checkpoints: one file of plain dicts, tensors, numbers and strings, written atomically, read without pickled code.

A run folder holds last.pt (newest), best.pt (lowest evaluation loss) and, on demand, step_N.pt.
"""

import contextlib
import math
import os
import re
import shutil
import textwrap
from pathlib import Path

import numpy as np
import torch

from common import store
from common.errors import CheckpointError
from common.runtime import Meter, Runtime

FORMAT_VERSION = 1
# Settings that change how a run is started or watched, not what it finds.
NO_SETTINGS = ("out_dir", "s3_config", "resume", "load_checkpoint_step", "analyze", "compare_baseline", "log_interval",
               "log_level", "save_interval", "keep_last", "wandb", "tensorboard", "device", "compile")
FIRST_NAMES = ("ghmm", "arxiv", "state", "apelr")
KEYS = ("format_version", "experiment", "config", "step", "best", "model", "optimizer", "scaler", "ranks", "extra")


def identity(script: str) -> str:
    """Who made a run: the stem of the page's file. A renamed copy is another experiment, with runs of its own."""
    return Path(script).stem


def default_out_dir(script: str) -> str:
    """Where a page's runs go by default: train_ghmm.py to out/ghmm, its copy train_mine.py to out/mine."""
    return f"out/{identity(script).removeprefix('train_')}"


def capture(rt: Runtime, script: str, config: dict, step: int, model, optimizer, best: float, meter: Meter, extra: dict,
            rank_extra: dict) -> dict:
    """Everything a run needs to go on to the bit. Collective: call it on every rank.

    Args:
        script: the page's __file__, whose stem is the run's identity.
        step: optimizer steps done. best: lowest evaluation loss so far.
        extra: further plain state, the same on all ranks; rank_extra: further plain state of each rank.
    """
    return weights_alone(script, config, step, model, extra) | {
        "best": best, "optimizer": optimizer.state_dict(), "scaler": rt.scaler.state_dict(), "meter": meter.state(),
        "ranks": rt.gather({**_random_state(rt), **rank_extra}),
    }  # fmt: skip


def weights_alone(script: str, config: dict, step: int, model, extra: dict) -> dict:
    """A checkpoint without a training state, such as an imported one: to sample, analyse and start from, not to resume.
    """
    return {
        "format_version": FORMAT_VERSION, "experiment": identity(script), "config": config, "step": step,
        "best": math.inf, "model": model.state_dict(), "optimizer": {}, "scaler": {}, "ranks": [], "extra": extra,
    }  # fmt: skip


def restore(rt: Runtime, state: dict, path: Path, folder: Path, model, optimizer) -> tuple[int, float, dict, dict]:
    """Put a captured state back; returns (step, best, extra, this rank's rank_extra).

    best is infinite where the run goes on in a folder that the checkpoint is not from: its best.pt is not there.
    """
    asked = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        load_weights(model, state["model"], path)
    except CheckpointError as e:
        raise CheckpointError(f"{e}, or here with resume=never, which replaces the checkpoints that are there") from e
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as e:
        raise CheckpointError(_no_optimizer(path, str(e))) from e
    for group, options in zip(optimizer.param_groups, asked, strict=True):
        group.update(options)  # betas, weight decay and so on as now configured
    if rt.scaler.is_enabled() and state["scaler"]:
        rt.scaler.load_state_dict(state["scaler"])
    best = state["best"] if path.parent.resolve() == folder.resolve() else math.inf
    if len(state["ranks"]) != rt.world_size:
        if rt.is_main:
            print(f"note: {path} was written with ranks {len(state['ranks'])}, now {rt.world_size}: the data stay "
                  "the same, random numbers of dropout do not")
        return state["step"], best, state["extra"], {}
    mine = dict(state["ranks"][rt.rank])
    torch.set_rng_state(mine.pop("torch_rng"))
    key = mine.pop("numpy_rng")
    np.random.set_state(("MT19937", key["keys"].numpy().astype(np.uint32), key["pos"], key["gauss"], key["cached"]))
    cuda_rng = mine.pop("cuda_rng")
    if rt.device.type == "cuda" and cuda_rng is not None:
        torch.cuda.set_rng_state(cuda_rng, rt.device)
    return state["step"], best, state["extra"], mine


def _no_optimizer(path: Path, reason: str) -> str:
    return (f"{path} holds no state of this optimizer ({reason}): start from its weights with init_from where the "
            "script has it, or anew with resume=never, which replaces what is there")


def load_weights(model, weights: dict, path: Path) -> None:
    """Put weights into a model; raises CheckpointError where it is not of these shapes and names."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, KeyError) as e:
        reason = textwrap.shorten(" ".join(str(e).split()), 300, placeholder=" ...")
        raise CheckpointError(f"{path} does not fit the model as its script builds it now: {reason}. Use the settings "
                              "and the code it was trained with, or train anew in another out_dir") from e


def _random_state(rt: Runtime) -> dict:
    _, keys, pos, gauss, cached = np.random.get_state()
    return {
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(rt.device) if rt.device.type == "cuda" else None,
        "numpy_rng": {"keys": torch.from_numpy(keys.astype(np.int64)), "pos": pos, "gauss": gauss, "cached": cached},
    }


def save(state: dict, folder: Path, is_best: bool = False, keep_step: bool = False, keep_last: int = 0) -> None:
    """Write last.pt, and best.pt and step_N.pt where asked; the newest keep_last step files stay (0 or less: all).

    Each name changes from one complete file to the next in one rename, whenever the process dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".saving-{os.getpid()}.pt"
    try:
        with open(fresh, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if is_best:
            _link(fresh, folder / "best.pt")
        if keep_step:
            _link(fresh, folder / f"step_{state['step']}.pt")
        os.replace(fresh, folder / "last.pt")
    finally:
        fresh.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # make the renames themselves durable, where folders can be synced
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if keep_last > 0:
        for old in _step_files(folder)[keep_last:]:
            old.unlink(missing_ok=True)
    store.mirror(folder, state["step"])


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, atomically. Checkpoints are replaced, never written over, so sharing is safe."""
    twin = source.with_suffix(".twin")
    twin.unlink(missing_ok=True)
    try:
        try:
            os.link(source, twin)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, twin)
        os.replace(twin, target)
    finally:
        twin.unlink(missing_ok=True)


def _step_files(folder: Path) -> list[Path]:
    """step_N.pt files, newest first."""
    found = [(int(m[1]), p) for p in folder.glob("step_*.pt") if (m := re.fullmatch(r"step_(\d+)\.pt", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def clear(folder: Path, after: int = 0) -> None:
    """Remove what no longer belongs to a run that starts from step `after`; call it once its input is known to be good.

    A fresh run (after=0) keeps no checkpoint of an earlier one; a run that goes back loses the future it abandons.
    """
    stale = [path for path in _step_files(folder) if int(path.stem[5:]) > after] + [*folder.glob(".saving-*")]
    if after == 0:
        stale += [folder / "last.pt"]
    if after == 0 or ((folder / "best.pt").exists() and _read(folder / "best.pt")[0].get("step", math.inf) > after):
        stale += [folder / "best.pt"]
    for path in stale:
        path.unlink(missing_ok=True)


def load(path: Path, script: str | None = None) -> dict:
    """Read a checkpoint (or a run folder's last.pt) to the CPU, checked.

    Raises CheckpointError if it is missing, torn, foreign, newer than this code or, given a page's __file__, of another
    page; it names the newest good checkpoint beside a damaged one where there is one.
    """
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    state, problem = _read(path)
    if problem:
        others = [p for p in sorted(path.parent.glob("*.pt")) if p != path and not p.name.startswith(".")]
        good = max((p for p in others if not _read(p)[1]), key=lambda p: _read(p)[0]["step"], default=None)
        raise CheckpointError(f"{path} {problem}. " + (f"The newest good checkpoint is {good}: use resume={good}"
                                                       if good else "There is no other good checkpoint beside it"))
    if script and state["experiment"] != identity(script):
        raise CheckpointError(f"{path} is a checkpoint of {state['experiment']}.py, not of {identity(script)}.py: use "
                              "another out_dir, or that script")
    return state


def best_of(path: str | Path) -> Path:
    """The best checkpoint of a run folder, where there is one; any other path as it is."""
    best = Path(path) / "best.pt"
    return best if best.exists() else Path(path)


def analysis_of(path: Path) -> Path:
    """Where a look at a run or checkpoint writes: analysis/ of the run folder, whose own results stay as they are."""
    return (path if path.is_dir() else path.parent) / "analysis"


def experiment_of(path: Path) -> str:
    """The page that made a checkpoint or run folder, by its stem; "" for a file that is not ours or cannot be read."""
    return _read(path / "last.pt" if path.is_dir() else path, mmap=True)[0].get("experiment", "")


def _read(path: Path, mmap: bool = False) -> tuple[dict, str]:
    """(state, "") or ({}, what is wrong with the file); mmap: without reading its tensors."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # torch raises a dozen kinds for torn files; each means the same here
        return {}, f"is damaged or no checkpoint ({type(e).__name__})"
    if not isinstance(state, dict) or any(key not in state for key in KEYS):
        return {}, "is no checkpoint of this repository (prepare_data.py import makes one of another system's)"
    if state["experiment"] in FIRST_NAMES:  # written before a run was known by its script
        state["experiment"] = f"train_{state['experiment']}"
    if state["format_version"] > FORMAT_VERSION:
        return {}, f"has format {state['format_version']}, newer than this code ({FORMAT_VERSION}): update the code"
    return state, ""


def is_over(state: dict) -> bool:
    """Whether the run of a checkpoint has ended, by its last step or by what stops it early."""
    return state["extra"].get("ended", state["step"] >= (state["config"]["max_steps"] or math.inf))


def same_data(extra: dict, data: dict, path: Path) -> None:
    """Raise CheckpointError if a checkpoint's data have been replaced by others of the same name; of data of another
    name say so, unless they are the same.

    Args:
        extra: of the checkpoint. data: {what names the data: fingerprint of their content} now, as extra["data"] has
            it from then. Where a name or fingerprint is missing on one side nothing is known, and nothing refused.
    """
    # A folder is the same with a slash at its end, or ./ before it.
    then = {os.path.normpath(name): fingerprint for name, fingerprint in extra.get("data", {}).items()}
    for name, fingerprint in data.items():
        before = then.get(os.path.normpath(name))
        if not fingerprint or not any(then.values()) or fingerprint in then.values():
            continue
        if before is None and os.environ.get("RANK", "0") == "0":
            print(f"note: {name} is other data than {path} was trained on ({', '.join(then)})")
        elif before:
            raise CheckpointError(f"{path} is of other data: {name} had the fingerprint {before} in training and has "
                                  f"{fingerprint} now. Bring those data back, or train in another out_dir (or with "
                                  "resume=never, which replaces the checkpoints)")


def start_from(cfg, folder: Path, script: str, differences, data: dict) -> tuple[Path | None, dict | None, list]:
    """Decide what a run starts from: (path, state, changed settings), or (None, None, []) for a fresh one.

    Under resume=auto an unfinished run goes on, telling what changed. A finished run whose settings or script changed
    is neither evaluated as if it were the new one nor overwritten: that is a CheckpointError with the choices.

    Args:
        script: the page's __file__. differences: saved config (a dict) -> list of lines "field: old -> new".
        data: see same_data.
    """
    if getattr(cfg, "load_checkpoint_step", None) is not None:
        path = folder / f"step_{cfg.load_checkpoint_step}.pt"
    elif cfg.resume in ("auto", "never"):
        path = folder / "last.pt"
        if cfg.resume == "never" or not path.exists():
            return None, None, []
    else:
        path = store.local(cfg.resume)
    state = load(path, script)
    path = path / "last.pt" if path.is_dir() else path
    if not state["optimizer"]:
        raise CheckpointError(_no_optimizer(path, "it was imported"))
    same_data(state["extra"], data, path)
    changes = [line for line in differences(state["config"]) if line.split(":")[0] not in NO_SETTINGS]
    copy = path.parent / Path(script).name
    if copy.exists() and copy.read_bytes() != Path(script).read_bytes():
        changes = [*changes, f"{copy.name}: edited since"]
    if cfg.resume == "auto" and changes and path.name == "last.pt" and is_over(state):
        raise CheckpointError(f"{folder} holds a finished run with other settings ({'; '.join(changes)}): use another "
                              f"out_dir, or resume={path} to go on from it, or resume=never to train anew, which "
                              "replaces the checkpoints that are there")
    return path, state, changes
