"""A baseline of equal size that is trained beside a planner of train_apelr.py: what its plans are held against."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from common.errors import InputError
from sources.equal_size import as_large

BESIDE = "baseline"  # the folder of the baseline's run in that of the planner's


def baseline_settings(cfg, build: Callable, trains: dict):
    """The settings cfg of a planner as those of a baseline of equal size in a folder of its own; all else is equal.

    build: (settings, vocabulary) -> model. trains: parameters, vocab_size and batch_size of the planner's run.
    """
    vocab_size = trains["vocab_size"]
    plain = replace(
        cfg,
        version="baseline",
        experts="full",
        plan_commitment="soft",
        out_dir=os.path.join(cfg.out_dir, BESIDE),  # of a URL, too
        resume=resume_beside(cfg.resume),
        load_checkpoint_step=None,
        compare_baseline=False,
        batch_size=trains["batch_size"],  # the same batches, also where the planner's memory decides about them
    )

    widths, parameters = as_large(build, plain, vocab_size, trains["parameters"], "compare_baseline")
    same_size = replace(plain, **widths)
    say(f"run 1 of 2: a baseline of {parameters:,} parameters (d_model={same_size.d_model}) for the planner of "
        f"{trains['parameters']:,} -> {plain.out_dir}")  # fmt: skip
    return same_size


def resume_beside(resume: str) -> str:
    """What a baseline goes on from where its planner does from `resume`: the baseline beside that, if there is one."""
    if resume in ("auto", "never"):
        return resume
    path = Path(resume)
    folder = path if path.is_dir() else path.parent
    twin = folder / BESIDE / "last.pt"
    return str(twin) if twin.exists() else "auto"


def train_beside(cfg, train: Callable, build: Callable) -> dict:
    """Train a baseline of equal size in out_dir/baseline, then what cfg says; the summary of the latter has both.

    Each is a run like any other: it resumes, and a signal stops it ({"stopped_at": step}), and what comes after it.

    Args:
        train: (settings, rehearsal_only, beside) -> summary, of the page. build: (settings, vocabulary) -> model.
    Raises InputError, before anything is trained or written, for what would refuse the planner, too.
    """
    # The planner is only rehearsed for now: whatever is wrong with it is said before the baseline has trained.
    trains = train(cfg, rehearsal_only=True)
    if "baseline_nll" in trains:  # all of it has been done before
        return trains
    if cfg.init_from:  # also of resume=FILE, where that is a checkpoint of the source
        raise InputError(
            f"compare_baseline: the planner would start from {cfg.init_from} and the baseline from nothing, "
            "which is no fair comparison: leave one of them out"
        )
    if "stopped_at" in trains:
        say("stopped by a signal before the baseline; the same command goes on from there")
        return {"stopped_at": trains["stopped_at"]}
    settings = baseline_settings(cfg, build, trains)
    baseline = train(settings)
    if "stopped_at" in baseline:
        say("stopped by a signal before the planner; the same command goes on from there")
        return {"stopped_at": 0}
    facts = {
        "baseline_nll": baseline["val_nll"],
        "baseline_ppl": baseline["val_ppl"],
        "baseline_parameters": baseline["parameters"],
        "baseline_d_model": settings.d_model,
        "baseline_steps": baseline["steps"],
    }
    say(f"run 2 of 2: the planner -> {cfg.out_dir}")
    return train(cfg, beside=facts)


def say(text: str) -> None:
    """A line for the console; of the processes that torchrun starts one prints."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
