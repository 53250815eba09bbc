"""Checkpoints: one file of plain dicts, tensors, numbers and strings, written atomically, read without pickled code.

A run folder holds last.pt (newest), best.pt (lowest evaluation loss) and, on demand, step_N.pt. Each has a digest of
its values, without which torch would load a flipped bit in silence.
"""

import contextlib
import filecmp
import math
import os
import re
import shutil
import tempfile
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common import store
from common.errors import CheckpointError, InputError, RunError, reason, replacing, writing
from common.plain import digest, fits
from common.runtime import Meter, Runtime, tensors_at_most
from common.telling import note, note_once

FORMAT_VERSION = 2  # 1 had no digest
# Settings that change how a run is started or watched, not what it finds. Evaluations choose the best weights, and may
# end a run: when they come is no matter of watching.
NO_SETTINGS = (
    "out_dir", "s3_config", "resume", "load_checkpoint_step", "analyze", "out", "compare_baseline", "prepare",
    "ram_budget_gb", "log_interval", "log_level", "save_interval", "keep_last", "preview_prompt", "preview_tokens",
    "wandb", "wandb_project", "wandb_entity", "tensorboard", "device", "compile",
)  # fmt: skip
FIRST_NAMES = ("ghmm", "arxiv", "state", "apelr")
METER = {"seconds": float, "units": int, "since": {str: torch.Tensor}, "elapsed": float}
# What is in a checkpoint, as fits() has it (meter: not in the oldest); and in its extra, where it is there.
KINDS = {
    "format_version": int, "experiment": str, "config": dict, "step": int, "best": float, "model": dict,
    "optimizer": dict, "scaler": dict, "ranks": [dict], "extra": dict, "meter": METER,
}  # fmt: skip
EXTRA = {"data": {str: str}, "ended": bool}


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


def restore(rt: Runtime, state: dict, path: Path, model, optimizer) -> tuple[int, float, dict, dict]:
    """Put the state of start_from back; returns (step, best, extra, this rank's rank_extra)."""
    try:
        load_weights(model, state["model"], path)
    except CheckpointError as e:
        raise CheckpointError(f"{e}, or here with resume=never, which replaces the checkpoints that are there") from e
    _restore_optimizer(optimizer, state["optimizer"], path)
    ranks, mine = len(state["ranks"]), {}
    try:
        if rt.scaler.is_enabled() and state["scaler"]:
            rt.scaler.load_state_dict(state["scaler"])
        if ranks == rt.world_size:
            mine = _restore_random(rt, state["ranks"][rt.rank])
    except Exception as e:  # another torch may have another kind of generator
        raise CheckpointError(f"{path} has random numbers or a loss scale that torch {torch.__version__} cannot go on "
                              f"with ({reason(e)}): use the torch that it was trained with, or init_from") from e
    if ranks != rt.world_size:
        note(f"{path} was written with ranks {ranks}, now {rt.world_size}: the data stay the same, random "
              "numbers of dropout do not")
    return state["step"], state["best"], state["extra"], mine


def _restore_optimizer(optimizer, saved: dict, path: Path) -> None:
    """Its state, but the settings (betas, weight decay and so on) as they are configured now."""
    asked = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        # Before they are loaded: where the number of steps belongs, on the device or on the CPU, is for this machine's
        # optimizer to say, fused or not, and not for that of the machine that wrote the checkpoint.
        groups = [known | options for known, options in zip(saved["param_groups"], asked, strict=True)]
        optimizer.load_state_dict({**saved, "param_groups": groups})
        is_whole = all(_are_moments(known, parameter, optimizer) for parameter, known in optimizer.state.items())
    except Exception as e:  # whatever values of another optimizer make torch raise
        raise CheckpointError(_no_optimizer(path, reason(e))) from e
    if not is_whole:
        raise CheckpointError(_no_optimizer(path, "it is of other parameters, or of another kind"))


def _are_moments(known: dict, parameter, optimizer) -> bool:
    """Whether what an optimizer knows of a parameter is of its shape, and all of it there."""
    moments = [known[name] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
               if known.get(name) is not None]
    is_adam = isinstance(optimizer, torch.optim.Adam)  # AdamW is one
    return (isinstance(parameter, torch.Tensor) and all(moment.shape == parameter.shape for moment in moments)
            and (not is_adam or len(moments) >= 2 and isinstance(known["step"], torch.Tensor)))


def _restore_random(rt: Runtime, mine: dict) -> dict:
    """Put the random numbers of this rank back; returns what else it had."""
    mine = dict(mine)
    torch.set_rng_state(mine.pop("torch_rng"))
    key = mine.pop("numpy_rng")
    if not 0 <= key["pos"] <= 624:  # numpy would read beyond its numbers
        raise ValueError(f"the place {key['pos']} in 624 numbers")
    np.random.set_state(("MT19937", key["keys"].numpy().astype(np.uint32), key["pos"], key["gauss"], key["cached"]))
    cuda_rng = mine.pop("cuda_rng")
    if rt.device.type == "cuda" and cuda_rng is not None:
        torch.cuda.set_rng_state(cuda_rng, rt.device)
    return mine


def _no_optimizer(path: Path, reason: str) -> str:
    return (f"{path} holds no state of this optimizer ({reason}): start from its weights with init_from where the "
            "script has it, or anew with resume=never, which replaces what is there")


def load_weights(model, weights: dict, path: Path) -> None:
    """Put weights into a model; raises CheckpointError where it is not of these shapes and names."""
    try:
        model.load_state_dict(weights)
    except Exception as e:  # whatever values that are no weights make torch raise
        why = textwrap.shorten(" ".join(str(e).split()), 300, placeholder=" ...")
        raise CheckpointError(f"{path} does not fit the model as its script builds it now: {why}. Use the settings "
                              "and the code it was trained with, or train anew in another out_dir") from e


def build_with(weights: dict, path: Path, build: Callable[[], torch.nn.Module], put=load_weights) -> torch.nn.Module:
    """The model that build() makes of the settings of a checkpoint, with its weights.

    It is built without memory first: settings that are not of these weights may ask for more than there is.
    put(model, weights, path) gives a model its weights.
    Raises CheckpointError where settings make no model, or not that of the weights.
    """
    too_large = CheckpointError(f"{path}: its settings make a larger model than its weights are of")
    with tensors_at_most(1_000 + 10 * len(weights), too_large):
        for place in ("meta", "cpu"):
            try:
                with torch.device(place):
                    model = build()
            except InputError:
                raise
            except Exception as e:  # an edited model may not know meta tensors
                if place == "cpu":
                    raise CheckpointError(f"{path}: its settings make no model ({reason(e)})") from e
            else:
                with warnings.catch_warnings(action="ignore"):  # of what a meta tensor is told to hold
                    put(model, weights, path)
    return model


def load_best(rt: Runtime, folder: Path, script: str, model, older: Callable[[dict, Path], dict] | None = None) -> None:
    """After training: put the weights of best.pt into the model, which stays as it is where there is no such file.

    Args:
        older: makes what the page reads now of a checkpoint of an older version, (state, path) -> state.
    Collective. Raises RunError where the file is damaged.
    """
    path = folder / "best.pt"
    try:
        state = rt.from_main(lambda: load(path, script) if path.exists() else None)
        if state:
            load_weights(model, (older(state, path) if older else state)["model"], path)
    except CheckpointError as e:
        raise RunError(f"training is over, but its best weights cannot be measured: {e}. {folder / 'last.pt'} is "
                       f"kept: move {path} away, and the same command measures the last weights") from e


def _random_state(rt: Runtime) -> dict:
    _, keys, pos, gauss, cached = np.random.get_state()
    return {
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(rt.device) if rt.device.type == "cuda" else None,
        "numpy_rng": {"keys": torch.from_numpy(keys.astype(np.int64)), "pos": pos, "gauss": gauss, "cached": cached},
    }


def seal(state: dict) -> dict:
    """A state with this code's version and the digest of its values. Raises CheckpointError for what is not plain."""
    state = {**state, "format_version": FORMAT_VERSION}
    state.pop("digest", None)
    try:
        return state | {"digest": digest(state)}
    except ValueError as e:  # of a page that keeps what cannot be read again
        raise CheckpointError(f"no checkpoint can be written: {e}") from e


def save(state: dict, folder: Path, is_best: bool = False, keep_step: bool = False, keep_last: int = 0) -> None:
    """Write last.pt, and best.pt and step_N.pt where asked; the newest keep_last step files stay (0 or less: all).

    Each name changes from one complete file to the next in one rename, whenever the process dies. The folder is not
    made: where it was moved away while a run was at work, another would grow in its place. Raises OSError.
    """
    state = seal(state)
    fresh = folder / f".saving-{os.getpid()}.pt"
    try:
        with writing(folder / "last.pt"), open(fresh, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if is_best:
            _link(fresh, folder / "best.pt")
        if keep_step:
            _link(fresh, folder / f"step_{state['step']}.pt")
        with writing(folder / "last.pt"):
            os.replace(fresh, folder / "last.pt")
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # make the renames themselves durable, where folders can be synced
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    _prune(folder, keep_last)
    store.mirror(folder, state["step"])


def _prune(folder: Path, keep_last: int) -> None:
    if keep_last > 0:
        for old in _step_files(folder)[keep_last:]:
            old.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, atomically. Checkpoints are replaced, never written over, so sharing is safe."""
    twin = source.with_suffix(".twin")
    with writing(target):
        twin.unlink(missing_ok=True)
        try:
            try:
                os.link(source, twin)
            except OSError:  # a file system without hard links
                shutil.copyfile(source, twin)
            os.replace(twin, target)
        finally:
            with contextlib.suppress(OSError):
                twin.unlink(missing_ok=True)


def _step_files(folder: Path) -> list[Path]:
    """step_N.pt files, newest first."""
    found = [(int(m[1]), p) for p in folder.glob("step_*.pt") if (m := re.fullmatch(r"step_(\d+)\.pt", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def clear(folder: Path, after: int = 0, best: float = math.inf, keep_last: int = 0) -> None:
    """Remove what no longer belongs to a run that starts from step `after`; call it once its input is known to be good.

    A fresh run (after=0) keeps no checkpoint of an earlier one; a run that goes back loses the future it abandons.
    best: that of restore, without which best.pt is not this run's. What a killed run left to prune goes too.
    """
    stale = [path for path in _step_files(folder) if int(path.stem[5:]) > after]
    stale += [path for path in folder.glob(".saving-*") if not path.is_dir()]
    stale += [folder / "last.pt"] if after == 0 else []
    stale += [folder / "best.pt"] if math.isinf(best) else []
    for path in stale:
        path.unlink(missing_ok=True)
    _prune(folder, keep_last)


def load(path: Path, script: str | None = None, **kinds) -> dict:
    """Read a checkpoint (or a run folder's last.pt) to the CPU, checked: its digest, and every value's kind.

    Args:
        script: the page's __file__. kinds: what it reads of `extra`, name=type: int (a count), float, bool, str, dict,
            list (of str), and X | None where it may be absent.
    Raises CheckpointError if it is missing, damaged, foreign, newer than this code or of another page; it names the
    newest good checkpoint beside a damaged one where there is one.
    """
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: name a run folder or a checkpoint file (resume also takes "
                              "auto and never)")
    state, problem = _read(path)
    if problem:
        steps = {other: found["step"] for other in sorted(path.parent.glob("*.pt"))
                 if other != path and not other.name.startswith(".") and (found := _read(other)[0])}
        good = max(steps, key=steps.get, default=None)
        raise CheckpointError(f"{path} {problem}. " + (
            f"The newest good checkpoint is {good}: use it (in training, use resume={good})" if good else
            "There is no other good checkpoint beside it: copy it again, or train anew in another out_dir"))
    if script and state["experiment"] != identity(script):
        raise CheckpointError(f"{path} is a checkpoint of {state['experiment']}.py, not of {identity(script)}.py: use "
                              "another out_dir, or that script")
    _check_extra(state, path, kinds)
    if state["format_version"] == 1:
        note_once(f"{path} is of an older version, without a digest of its values: whether they are as they were "
              "written is checked less well")
    return state


def _check_extra(state: dict, path: Path, kinds: dict) -> None:
    wrong = [name for name, kind in kinds.items() if not fits(state["extra"].get(name), kind)]
    if wrong:
        raise CheckpointError(f"{path} is no whole checkpoint of {state['experiment']}.py: look at {', '.join(wrong)} "
                              "in its extra state")


def best_of(path: str | Path) -> Path:
    """The best checkpoint of a run folder, where there is one; any other path as it is."""
    best = Path(path) / "best.pt"
    return best if best.exists() else Path(path)


def analysis_of(path: Path, cfg) -> Path:
    """Where a look at a run or checkpoint writes: analysis/ of the run folder, whose own results stay as they are.

    With cfg.out there, beside a copy of what a report needs of the run. Raises InputError where that cannot be written.
    """
    run = path if path.is_dir() else path.parent
    folder = store.on_disk(cfg.out, setting="out") if cfg.out else run / "analysis"
    if os.environ.get("RANK", "0") != "0":
        return folder
    if (folder / "last.pt").exists() or folder.resolve() == run.resolve():
        raise InputError(f"out = {folder} holds a run, whose files stay as they are: name another folder")
    try_place(folder)
    for name in ("config.json", "metrics.jsonl") if cfg.out else ():
        if (run / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / name) as fresh:
                shutil.copyfile(run / name, fresh)
    return folder


def try_place(folder: Path) -> None:
    """Raises InputError, naming --out, where nothing can be written to a folder, which need not be there yet."""
    new = []
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as e:
        raise InputError(f"{folder} cannot be written ({getattr(e, 'strerror', e)}): name another folder, "
                         "--out=FOLDER") from e
    finally:
        store.remove(new)


def experiment_of(path: Path) -> str:
    """The page that made a checkpoint or run folder, by its stem; "" for a file that is not ours or cannot be read."""
    return _read(path / "last.pt" if path.is_dir() else path, peeks=True)[0].get("experiment", "")


def step_of(folder: Path) -> int | None:
    """The step of a run folder's last.pt, at a glance; None where there is no such file, or none that can be read."""
    return _read(folder / "last.pt", peeks=True)[0].get("step")


def check_archive(path: Path, reads_all: bool = True) -> None:
    """Raise an error unless a file is a zip file as torch.save writes it, by its checksums, which torch does not read.

    Nothing in it is packed, so what it holds is no larger than the file.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("its parts are larger than the file")
        damaged = archive.testzip() if reads_all else None
    if damaged:
        raise ValueError(f"the checksum of its part {damaged} is another")


def read_archive(path: Path, peeks: bool = False) -> object:
    """What torch.save wrote, on the CPU, without running code in it; peeks: without reading tensors and checksums."""
    check_archive(path, not peeks)
    with warnings.catch_warnings(action="ignore"):  # of torch, on what damaged files seem to be
        return torch.load(path, map_location="cpu", weights_only=True, mmap=peeks)


def damage(error: Exception) -> str:
    """What an error in reading a checkpoint says of the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    why = str(error)[:200] if type(error) is ValueError else type(error).__name__
    return f"is damaged or no checkpoint ({why})"


def _read(path: Path, peeks: bool = False) -> tuple[dict, str]:
    """(state, "") or ({}, what is wrong with the file); peeks: without reading its tensors, and unchecked."""
    if not path.is_file():
        return {}, "is no file"
    try:
        state = read_archive(path, peeks)
        is_ours = isinstance(state, dict) and not KINDS.keys() - state.keys() - {"meter"}
        problem = _problem(state) if is_ours and not peeks else ""
    except Exception as e:  # torch raises a dozen kinds for torn files; each means the same here
        return {}, damage(e)
    if not is_ours:
        return {}, "is no checkpoint of this repository (prepare_data.py import makes one of another system's)"
    version = state["format_version"]
    if fits(version, int) and version > FORMAT_VERSION:
        return {}, f"has format {version}, newer than this code ({FORMAT_VERSION}): update the code"
    if problem:
        return {}, f"is damaged ({problem})"
    if peeks and not (fits(state["experiment"], str) and fits(state["step"], int)):
        return {}, "is damaged"
    if state["experiment"] in FIRST_NAMES:
        state["experiment"] = f"train_{state['experiment']}"  # written before a run was known by its script
    return state, ""


def _problem(state: dict) -> str:
    """Takes the digest out of a state. "" where it is that of the values, which are all of the kinds written here."""
    told, found = state.pop("digest", None), digest(state)
    version = state["format_version"]
    if not fits(version, int) or told != {1: None, FORMAT_VERSION: found}.get(version, ""):
        return "its values and format_version are not those of its digest"
    wrong = [name for name, kind in KINDS.items() if name in state and not fits(state[name], kind)]
    if wrong:
        return f"look at {', '.join(wrong)} in it"
    extra, columns = state["extra"], list(state.get("meter", {}).get("since", {}).values())
    wrong = [f"extra.{name}" for name, kind in EXTRA.items() if name in extra and not fits(extra[name], kind)]
    # What a module adds to its state_dict may be anything plain.
    wrong += [f"model.{name}" for name, weight in state["model"].items()
              if not isinstance(weight, torch.Tensor) and not name.endswith("_extra_state")]
    if not all(c.ndim == 1 and c.is_floating_point() and len(c) == len(columns[0]) for c in columns):
        wrong.append("meter.since")
    return f"look at {', '.join(wrong)} in it" if wrong else ""


def is_over(state: dict) -> bool:
    """Whether the run of a checkpoint has ended, by its last step or by what stops it early."""
    steps = state["config"].get("max_steps")
    return state["extra"].get("ended", type(steps) in (int, float) and 0 < steps <= state["step"])


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
        if before is None:
            note(f"{name} is other data than {path} was trained on ({', '.join(then)})")
        elif before:
            raise CheckpointError(f"{path} is of other data: {name} had the fingerprint {before} in training and has "
                                  f"{fingerprint} now. Bring those data back, or train in another out_dir (or with "
                                  "resume=never, which replaces the checkpoints)")


def start_from(rt: Runtime, cfg, folder: Path, script: str, differences, data: dict, **kinds
               ) -> tuple[Path | None, dict | None, list]:
    """Decide what a run starts from: (path, state, changed settings), or (None, None, []) for a fresh one. Collective.

    Under resume=auto an unfinished run goes on, telling what changed. A finished run whose settings or script changed
    is neither evaluated as if it were the new one nor overwritten: that is a CheckpointError with the choices.

    Args:
        script: the page's __file__. differences: (saved config, path) -> list of lines "field: old -> new".
        data: see same_data. kinds: see load.
    """
    rt.agree(**{"the fingerprint of the data": data, Path(script).name: zlib.crc32(Path(script).read_bytes())})
    return rt.from_main(lambda: _start(cfg, folder, script, differences, data, kinds))


def _start(cfg, folder: Path, script: str, differences, data: dict, kinds: dict) -> tuple:
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
    _check_extra(state, path, kinds)
    same_data(state["extra"], data, path)
    changes = [line for line in differences(state["config"], path) if line.split(":")[0] not in NO_SETTINGS]
    copy = path.parent / Path(script).name
    if copy.exists() and not filecmp.cmp(copy, script, shallow=False):
        changes = [*changes, f"{copy.name}: edited since"]
    if cfg.resume == "auto" and changes and path.name == "last.pt" and is_over(state):
        raise CheckpointError(f"{folder} holds a finished run with other settings ({'; '.join(changes)}): "
                              f"{_going_on(path, state, cfg)}; another --out_dir trains a run beside it, and "
                              "--resume=never anew, which replaces the checkpoints that are there")
    if path.parent.resolve() != folder.resolve() or not _goes_on_with_best(folder / "best.pt", path, state["step"]):
        state["best"] = math.inf
    return path, state, changes


def _going_on(path: Path, state: dict, cfg) -> str:
    """How a finished run goes on, and what a longer one makes of the learning rate."""
    here = f"goes on from step {state['step']}"
    for name in ("max_steps", "epochs"):
        end, before = getattr(cfg, name, None), state["config"].get(name)
        if end and before and end > before:
            line = f"the same command with --resume={path} {here}"
            if cfg.schedule == "cosine" and state["step"] > cfg.warmup_steps:
                line += (f" to {name} = {end}, first with a higher learning rate again: that of the cosine that ends "
                         "there")
            return line
    return f"with more steps and --resume={path} it {here}, where the model is the same"


def _goes_on_with_best(best: Path, path: Path, step: int) -> bool:
    """Whether best.pt is there, and not of a future that a run which goes on from `path` abandons."""
    if not best.exists():
        return False
    state, problem = _read(best)
    if problem:
        raise CheckpointError(f"{best} {problem}. Move it away: the run goes on from {path}, and its next evaluation "
                              "writes another")
    return state["step"] <= step
