"""Texts that a model of train_apelr.py writes, by its belief over plans or by one plan, and what it believed.

page: the module of the run's page; cfg: what sample.py was asked for. Dimensions: B samples, L tokens, K plans.
"""

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from common import checkpoint, store
from common.errors import DataError
from common.runtime import Runtime
from configurator import fail
from measure.forced import plan_legend, plan_table, written_nll
from measure.plan_pictures import draw_beliefs
from measure.sampling import (
    PLAIN,
    Show,
    lengths_of,
    manner,
    nats,
    prompts_of,
    run_folder,
    settled,
    spell,
    tokenizer_of,
)
from measure.transcript import (
    OF_STRIP,
    beneath,
    console_columns,
    likeliest_plans,
    mark,
    sentence,
    strip,
    title,
    wrapped,
)
from measure.writing import generate
from sources.foreign_apelr import is_source_checkpoint, untold
from sources.plain_json import read_json
from sources.prompts import Prompt
from sources.shared import counted
from sources.tokenizer import Tokenizer

OF_SOURCE = {"num_samples": 1, "temperature": 0.9, "top_k": 40}  # by APEL-R's sampler, of its checkpoints
V2_ONLY = ("freeze_planner", "planner_temperature", "lookahead_feedback_scale", "async_planner")
OF_PLANNER = (*V2_ONLY, "force_state", "sweep_states", "show_plan", "lookahead_steps")
SOURCE_PROMPT = "Once upon a time"  # of APEL-R's sampler
SOURCE_FORECAST = 2  # chunks ahead that it prints
NEW_TOKENS = 200


def sample_apelr(page: ModuleType, path: Path, cfg, show: Show) -> dict:
    """Texts that go on from the prompts, by the belief over plans or by one plan, with beliefs and forecasts."""
    run, model, step, extra = page.load_run(path, cfg.device)
    run.seed = cfg.seed
    run.precision = "fp32"
    is_source = is_source_checkpoint(path)
    tokenizer = tokenizer_of(path, extra.get("tokenizer_file"))
    if tokenizer and extra.get("tokenizer_hash", tokenizer.hash()) != tokenizer.hash():
        raise DataError(f"{run_folder(path) / 'tokenizer.json'} is not the tokenizer that {path} was trained with")
    check_planner(run, cfg)
    cfg = settled(cfg, OF_SOURCE if is_source else PLAIN)
    if is_source:
        check_tokenizer(tokenizer, path, extra, cfg)
        for line in (untold(path), source_note(run, getattr(model, "tau", 1.0), cfg)):
            if line:
                show(sentence(line))
    folder = store.on_disk(cfg.out or run_folder(path), setting="out")
    if cfg.show_plan:
        checkpoint.try_place(folder / "plots")
    prompts = [begun(p, tokenizer, extra["vocab_size"], is_source)
               for p in prompts_of(cfg, tokenizer, extra["vocab_size"], reads_pipe=True)]
    lengths = lengths_of(cfg, prompts, 0, NEW_TOKENS)
    plans = run.plans()
    told = f", {plans} plans" if plans > 1 else ""
    show(sentence(f"{run.version} after {counted(step, 'step')}{told}; {manner(cfg)}"))
    states = [None, *range(plans)] if cfg.sweep_states else [cfg.force_state]  # None: by the belief
    result = {"experiment": "apelr", "step": step, "version": run.version, "samples": []}
    with Runtime(run) as rt:
        model.to(rt.device).eval()
        for prompt, length in zip(prompts, lengths, strict=True):
            by_state = []
            for state in states:
                written = write_texts(model, run, prompt, length, tokenizer, state, cfg, rt, is_source)
                by_state.append(entries_of(written, model, prompt, tokenizer, state))
                result["samples"] += by_state[-1]
            if cfg.sweep_states:
                show_sweep(by_state, len(prompt.ids), tokenizer, show)
            else:
                show_texts(by_state[0], model, run, prompt, tokenizer, cfg, show)
    if cfg.show_plan and not cfg.sweep_states:
        beliefs = np.concatenate([entry["beliefs"] for entry in result["samples"]])
        beside = [f"({mark(k)})" for k in range(plans)] if plans > 10 else ()
        names = plan_legend(beliefs.mean(0), typical_tokens(run_folder(path)), beside, console_columns())
        show("\n".join(["", sentence(OF_STRIP), *names]))
        draw_plans(folder, model, run, prompts, result["samples"], tokenizer, cfg, names, show)
    return result


def begun(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, is_source: bool) -> Prompt:
    """A prompt with what a text begins with: of a source with bos, and where there is none with that of its sampler."""
    special = tokenizer.special if tokenizer else {}
    if is_source and tokenizer:
        text = prompt.text or SOURCE_PROMPT
        ids = prompt.ids or tokenizer.encode(text)
        return Prompt(text, [special["bos"], *ids], prompt.place)
    start = special.get("eos", special.get("bos", vocab_size - 1))  # planted documents begin with their last token
    return prompt._replace(ids=prompt.ids or [start])


def check_tokenizer(tokenizer: Tokenizer | None, path: Path, extra: dict, cfg) -> None:
    """Raises DataError where the prompt of a source checkpoint cannot be read, or only by another tokenizer."""
    if tokenizer is None and not cfg.prompts and not cfg.prompt.replace(",", "").strip().isdigit():
        raise DataError(
            f"the tokenizer of {path} is neither where it says nor beside it: put its tokenizer.json beside it, or "
            "give token ids as the prompt, like --prompt=1,17,5"
        )
    if tokenizer and tokenizer.vocab_size != extra["vocab_size"]:
        raise DataError(
            f"{extra['tokenizer_file']} has {tokenizer.vocab_size:,} tokens and {path} knows {extra['vocab_size']:,}: "
            "put the tokenizer that it was trained with beside it"
        )
    if tokenizer and "bos" not in tokenizer.special:
        raise DataError(f"{extra['tokenizer_file']} has no <bos>, with which APEL-R begins a prompt")


def source_note(run, tau: float, cfg) -> str:
    """What a checkpoint of APEL-R is sampled with: its sampler's defaults, but the planner as it was trained."""
    line = f"read as APEL-R: temperature {cfg.temperature}, top_k {cfg.top_k}, bos before a prompt of words"
    if run.version != "v2_planner_required":
        return line
    # APEL-R's own sampler has 1 and 2 here, whatever the checkpoint was trained with.
    if cfg.planner_temperature is None and tau != 1:
        line += f"; planner_temperature {tau:g} as trained (APEL-R's sampler: 1)"
    if cfg.lookahead_steps is None and run.lookahead_horizon != SOURCE_FORECAST:
        line += f"; lookahead_steps {run.lookahead_horizon} as trained (APEL-R's sampler: {SOURCE_FORECAST})"
    return line


def check_planner(run, cfg) -> None:
    """Exits with code 2 where a flag asks for what this model has not."""
    asked = []
    for name in OF_PLANNER:
        value = getattr(cfg, name)
        # Plan 0, a temperature or a share of 0 are asked for: only None and False are not.
        if value is not None and value is not False:
            asked.append(name)
    of_v2 = [name for name in asked if name in V2_ONLY]
    if run.version == "baseline" and asked:
        fail(f"{asked[0]} needs a planner, and this is a baseline model: use a run of v1 or v2")
    if run.version == "v1_filtered_mixture" and of_v2:
        fail(f"{of_v2[0]} is a flag of v2_planner_required, and this is a run of {run.version}: leave it out")
    if cfg.force_state is not None and not 0 <= cfg.force_state < run.plans():
        fail(f"force_state = {cfg.force_state}: this model has the plans 0 to {run.plans() - 1}")


def write_texts(
    model,
    run,
    prompt: Prompt,
    length: int,
    tokenizer: Tokenizer | None,
    state: int | None,
    cfg,
    rt: Runtime,
    is_source: bool = False,
):
    """num_samples texts that go on from one prompt, by one plan if there is a state; is_source: as APEL-R writes."""
    planner = {}
    forecast_steps = cfg.lookahead_steps or 0
    if run.version != "baseline":
        if is_source and cfg.lookahead_steps is None:
            forecast_steps = SOURCE_FORECAST
        planner["tau"] = cfg.planner_temperature
        planner["feedback"] = cfg.lookahead_feedback_scale
    if run.version == "v2_planner_required" and cfg.lookahead_steps is not None:
        planner["horizon"] = cfg.lookahead_steps
    told = f"writing {counted(cfg.num_samples, 'text')} of {length - len(prompt.ids):,} tokens"
    if state is not None:
        planner["planner_mode"] = "forced_state"
        planner["forced_state"] = state
        told += f" by plan {state}"
    return generate(
        model,
        torch.tensor([prompt.ids], device=rt.device).expand(cfg.num_samples, -1),
        length - len(prompt.ids),
        rt.generator(0, device="cpu"),
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        repetition_penalty=cfg.repetition_penalty,
        no_repeat_ngram_size=cfg.no_repeat_ngram_size,
        eos_id=tokenizer.special.get("eos") if tokenizer else None,
        frozen=cfg.freeze_planner,
        unread=cfg.freeze_planner and is_source,
        tempers_plans=is_source and run.version == "v1_filtered_mixture",
        forecast_steps=forecast_steps,
        background=cfg.async_planner,
        head_type=torch.bfloat16 if cfg.precision == "bf16" else None,
        told=told,
        **planner,
    )


def entries_of(written, model, prompt: Prompt, tokenizer: Tokenizer | None, state: int | None) -> list[dict]:
    """Texts as plain data; one that ended before others of its batch up to its end."""
    begin = len(prompt.ids)
    eos = tokenizer.special.get("eos") if tokenizer else None
    entries = []
    for row, tokens in enumerate(written.tokens.tolist()):
        end = tokens.index(eos, begin) + 1 if eos in tokens[begin:] else len(tokens)
        count = end - begin
        entry = {
            "prompt": prompt.text,
            "state": state,
            "tokens": tokens[:end],
            "text": spell(tokens[:end], tokenizer),
            "nll": None,
        }
        if end <= readable_at_once(model.cfg):
            nll = written_nll(model, written.tokens[row : row + 1, :end], begin)
            entry["nll"] = float(nll[0])
        if written.beliefs.numel():
            entry["beliefs"] = written.beliefs[row, :count].exp().tolist()
        if written.forecasts.numel():
            entry["forecasts"] = written.forecasts[row, :count].tolist()
        entries.append(entry)
    return entries


def readable_at_once(cfg) -> float:
    """Tokens of a text that a model of these settings has positions for; it writes on beyond them by its last ones."""
    return cfg.max_seq_len if cfg.backbone == "transformer_lm" else math.inf


def show_texts(entries: list[dict], model, run, prompt: Prompt, tokenizer: Tokenizer | None, cfg, show: Show
               ) -> None:
    """Texts, and what is asked for of their plans."""
    for i, entry in enumerate(entries, 1):
        figures = [] if entry["nll"] is None else [f"{entry['nll']:.2f} nats a token written"]
        if cfg.force_state is not None:
            figures.insert(0, f"by plan {cfg.force_state}")
        show("\n" + title("sample", i, len(entries), prompt.text, *figures))
        if cfg.show_plan:
            words, begins = words_of(entry, len(prompt.ids), model, run, tokenizer)
            show(strip(words, likeliest_plans(entry["beliefs"]), begins))
        else:
            show(wrapped(entry["text"]))
        if "forecasts" in entry:
            show("  forecast at the first token: the plan's probability so many chunks ahead")
            rows = {"plan": [str(k) for k in range(run.plans())]}
            for n, belief in enumerate(entry["forecasts"][0], 1):
                rows[f"in {n}"] = nats(belief)
            show(beneath(rows))


def show_sweep(by_state: list[list[dict]], prompt_length: int, tokenizer: Tokenizer | None, show: Show) -> None:
    """What the belief and each plan in turn write, side by side: a table for each sample."""
    samples = list(zip(*by_state, strict=True))
    for i, entries in enumerate(samples, 1):
        rows = []
        for entry in entries:
            label = "belief" if entry["state"] is None else f"plan {entry['state']}"
            rows.append((label, spell(entry["tokens"][prompt_length:], tokenizer), entry["nll"]))
        show("\n" + title("sample", i, len(samples), entries[0]["prompt"]))
        show(plan_table(rows, console_columns()))
    show("\nnats: -log p a token by the model and its own belief, whoever wrote it.")


def words_of(entry: dict, prompt_length: int, model, run, tokenizer: Tokenizer | None) -> tuple[list[str], list[int]]:
    """(the tokens written as words, which of them begin a chunk)."""
    new = entry["tokens"][prompt_length:]
    words = [spell([token], tokenizer) if tokenizer else f"{token} " for token in new]
    begins = []
    for t in range(1, len(new)):
        place = prompt_length - 1 + t + model.offset  # in the text, as the model cuts it into chunks
        if place % run.chunk_size == 0:
            begins.append(t)
    return words, begins


def typical_tokens(folder: Path) -> dict | None:
    """Of each plan, as the end of its run has measured it; None where it has not."""
    file = folder / "planner_eval.json"
    return read_json(file).get("typical_tokens") if file.is_file() else None


def draw_plans(folder: Path, model, run, prompts: list[Prompt], entries: list[dict], tokenizer: Tokenizer | None,
               cfg, names: list[str], show: Show) -> None:
    """Draw the belief of the first sample of every prompt into plots/ of a folder; names: a line for each plan."""
    for i, prompt in enumerate(prompts):
        name = f"sampled_belief_{cfg.seed}" + (f"_prompt_{i + 1}" if len(prompts) > 1 else "")
        entry = entries[i * cfg.num_samples]
        words, begins = words_of(entry, len(prompt.ids), model, run, tokenizer)
        told = f"Belief over {counted(run.plans(), 'plan')} before each token written; a line: a chunk begins."
        draw_beliefs(folder, name, np.array(entry["beliefs"]), words, begins, told, names=names)
        show(f"picture: {folder / 'plots' / name}.png")
