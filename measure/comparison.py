"""Runs of one experiment side by side, by the files in their folders: what differs, what came out, a CSV and a page.

Runs that differ in their seed alone are a group: mean, standard deviation over seeds, n. What differs in anything else
(a setting, the content of the data or of the script, the number of steps) is never averaged.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import sqrt
from os.path import normpath
from pathlib import Path
from statistics import fmean, stdev
from textwrap import shorten
from typing import Any, NamedTuple

from common.checkpoint import NO_SETTINGS
from common.errors import DataError, InputError, replacing
from common.runlog import look_at_names, read_metrics
from measure import figures, holdouts, report
from measure.overlays import draw_curves, draw_results, labels, shorter
from measure.pages import HEADLINES, Cell, Section, command_line, typed, write_page
from measure.sweeps import HEADS, OBJECTIVES, SEED, Group, groups, objective, problems, table, with_spread
from sources.outcomes import COUNT, NUMBER, TABLE, TEXT, check, is_number, numbers, read_object
from sources.shared import closest, counted, from_here
from sources.sweeps import digest

ROOT = Path(__file__).resolve().parents[1]
FILES = ("config.json", "metrics.jsonl", "summary.json")  # a folder that has two of them is a run's
# Settings that do not tell what a run finds: those of how it is watched, and words of a sweep.
APART = {*NO_SETTINGS, SEED, "study", "study_seeds", "report"}
# What is drawn over steps: of lines of training, and of evaluations.
CURVES = {
    "ghmm": ("loss/ema", "excess_loss"),
    "arxiv": ("loss", "val_xe"),
    "apelr": ("loss", "val_nll"),
    "state": ("loss", "val_loss"),
}
MOST_LINES = 4  # for a terminal, beside the verdict and the table
BEST = "Best of"  # begins the verdict where there is a best
WHY = 120  # signs of what stopped a run
FEW = 3  # results of an experiment that is not known
FACTS = ("steps", "seconds", "tokens_per_second", "cells_per_second")  # numbers of a summary that are no results


class Term(NamedTuple):
    """What a run may differ in from others: as it is shown, and what must be equal in runs that are averaged."""

    text: str
    key: str


@dataclass
class Run:
    """A run by its files. script: file name of its copy. terms: all that runs must agree in to be averaged."""

    folder: Path
    script: str
    experiment: str
    config: dict
    summary: dict | None
    terms: dict[str, Term] = field(default_factory=dict)

    @property
    def seed(self) -> str:
        return typed(self.config.get(SEED))

    @property
    def device(self) -> str:
        """cpu or cuda, of whichever number."""
        return str(self.summary.get("device")).split(":")[0]

    @property
    def kind(self) -> str:
        """The experiment, which a copy of a page keeps; of a script without any its name."""
        return self.experiment or self.script

    @property
    def identity(self) -> frozenset:
        """What two runs of the same settings and seed have in common."""
        return frozenset({(SEED, self.seed), *((name, term.key) for name, term in self.terms.items())})


# ---------------------------------------------------------------------------------------------------------------
# Runs that there are
# ---------------------------------------------------------------------------------------------------------------
def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders at and below some folders, or beside some files, each once. Raises DataError if there is none."""
    paths = [Path(path) for path in paths]
    runs = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: there is no such folder: name folders of runs, or folders that hold them")
        top = path if path.is_dir() else path.parent
        for name in FILES:
            for file in top.rglob(name):
                if is_run(file.parent):
                    runs.setdefault(file.parent.resolve(), file.parent)
    if not runs:
        raise DataError(f"{', '.join(map(str, paths))}: no run here: a run's folder has config.json, and summary.json "
                        "once it has ended")  # fmt: skip
    return sorted(runs.values())


def is_run(folder: Path) -> bool:
    return sum((folder / name).is_file() for name in FILES) >= 2


def read_run(folder: Path) -> Run:
    """A run by the files in its folder. Raises ValueError or OSError where one is damaged."""
    config = read_object(folder / "config.json")
    summary = None
    if (folder / "summary.json").exists():
        summary = read_object(folder / "summary.json")
        check_summary(summary)
    copies = filter(Path.is_file, folder.glob("*.py"))
    scripts = sorted(copies, key=lambda path: (not path.name.startswith("train_"), path.name))
    if not scripts:
        raise ValueError("it has no copy of its script")
    text = scripts[0].read_text(encoding="utf-8", errors="replace")
    named = re.search(r'^EXPERIMENT = "(\w+)"', text, re.MULTILINE)
    run = Run(folder, scripts[0].name, named[1] if named else "", config, summary)
    if summary is not None:
        run.terms = terms_of(run, text)
    return run


def check_summary(summary: dict) -> None:
    """Raise ValueError where a summary has something else in the place of a number or a name."""
    results = {name: NUMBER for names, _ in OBJECTIVES.values() for name in names}
    results |= {name: NUMBER for headlines in HEADLINES.values() for name in headlines}
    kinds = results | dict.fromkeys(FACTS, COUNT) | dict.fromkeys(("torch", "device", "final_split", "verdict"), TEXT)
    check(summary | numbers(summary), kinds | {"data": TABLE}, "summary.json")
    data = summary.get("data") or {}
    check(data, dict.fromkeys(data, TEXT), "summary.json")


def terms_of(run: Run, script: str) -> dict[str, Term]:
    """What a run must have in common with those that it is averaged with."""
    terms = {}
    for name, value in run.config.items():
        if name not in APART:
            terms[name] = Term(setting_text(value), typed(value))
    terms["script"] = Term(f"{run.script} {digest(script)}", script)
    if not run.config.get("patience"):  # with it a run stops by its own loss, earlier or later by the seed
        terms["steps"] = same_text(typed(run.summary.get("steps")))
    if run.config.get("precision") == "auto":  # another one on another device
        terms["precision"] = same_text(f"auto on {run.device}")

    results = {}
    if (run.folder / "results.json").exists():
        results = read_object(run.folder / "results.json")
        check(results, {"data": TABLE, "final_fingerprint": TEXT}, "results.json")
        check(results.get("data") or {}, {"path": TEXT, "fingerprint": TEXT}, "results.json")
    if "final_split" in run.summary:
        split = run.summary["final_split"]
        terms["final_split"] = Term(split, f"{split} {results.get('final_fingerprint', '')}")
    data = run.summary.get("data")
    known = results.get("data")
    if data is None and isinstance(known, dict) and "path" in known:
        data = {known["path"]: known.get("fingerprint")}
    for path, fingerprint in (data or {}).items():
        if fingerprint:
            terms |= terms_of_data(terms, path, fingerprint)
    return terms


def terms_of_data(terms: dict[str, Term], path: str, fingerprint: str) -> dict[str, Term]:
    """The settings that name some data, by their content: the same may lie elsewhere, and others at the same place."""
    named = {}
    for name, term in terms.items():
        if normpath(term.text) == normpath(path):
            named[name] = Term(term.text, fingerprint)
    if named:
        return named
    # Parts of a setting name them: what else it says counts too.
    name = path if path in terms else "data"
    term = terms.get(name, same_text(path))
    return {name: Term(term.text, f"{term.key} {fingerprint}")}


def same_text(text: str) -> Term:
    return Term(text, text)


def setting_text(value: Any) -> str:
    """A setting to be read: of a list its parts alone."""
    if value and isinstance(value, list) and not any(isinstance(part, list | dict) for part in value):
        return ", ".join(map(typed, value))
    return typed(value)


# ---------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------
def compare(runs: list[Path], out: Path, wanted: str = "") -> list[str]:
    """Compare runs of one experiment: comparison.csv, plots/ and report.html in `out`.

    Returns lines for a terminal: the verdict, a table, what else is to be said, and last where all of it is.

    Args:
        runs: their folders. out: where to write; of a folder that is a run itself, report/ in it.
        wanted: what runs are compared by, of summary.json, in the words of sweeps.objective; "": the experiment's own.
    Raises DataError for runs of two experiments and where none has ended, InputError where nothing can be written.
    """
    ended, left_out = read_all(runs)
    experiment = ended[0].experiment
    told = tell(ended)
    settings = {name for run in ended for name in run.config}  # a summary may say one again
    results = [name for name in results_of(told) if name not in settings]
    shown, less_is_better = objective(experiment, wanted)
    sentence = ""
    ranked = groups(told, shown, less_is_better)
    if shown:
        sentence = verdict(ranked, shown[0], less_is_better)
    else:  # of an experiment that nobody knows here nothing is best
        shown = results[:FEW]
    notes = notes_on(ended, told)
    out = place_for(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        look_at_names(out, ("comparison.csv", "report.html"))
        studied, lines = study_part(experiment, ended, out)
        lead = sentence
        if studied and studied[0].text:  # its runs differ in what they are asked, so that the best of them is no answer
            lead, *text = studied[0].text
            studied, sentence = [replace(studied[0], text=text), *studied[1:]], ""
        write_csv(out / "comparison.csv", [csv_row(group, results) for group in ranked])
        draw_curves(out, ranked, CURVES.get(experiment, ("", "")))
        draw_results(out, [] if studied else ranked, shown[0], less_is_better)
        sections = sections_of(ranked, ended, shown, notes, out)
        if studied:
            sections = [*studied, *(replace(section, folded=True) for section in sections)]
        has_best = sentence.startswith(BEST) and ranked[0].values(shown[0])
        sections.append(commands(ended, ranked[0] if has_best else None, out, wanted))
        if left_out:
            sections.append(Section("Not compared", left_out))
        scripts = ", ".join(dict.fromkeys(run.script for run in ended))
        write_page(out / "report.html", f"{counted(len(told), 'run')} of {scripts}", lead, sections, experiment)
    except OSError as error:
        raise InputError(f"{error.filename or out} cannot be written ({error.strerror}): name another folder, "
                         "--out=FOLDER") from error  # fmt: skip
    lead = lead or f"{counted(len(told), 'run')}, and nothing here tells which is better."
    lines = [lead, *(line for line in lines if line not in lead)]  # a study says its verdict in several lines, too
    if not studied:  # a study has tables of its own
        lines += terminal_table(told, shown, less_is_better)
    return [*lines, *in_short([*notes, *left_out]), f"all of it in {out / 'report.html'}"]


def in_short(lines: list[str]) -> list[str]:
    """The first lines, and how many others report.html has."""
    if len(lines) <= MOST_LINES:
        return lines
    return [*lines[: MOST_LINES - 1], f"... and {len(lines) - MOST_LINES + 1} more of such lines there:"]


def terminal_table(told: list[dict], shown: list[str], less_is_better: bool) -> list[str]:
    """The table of a sweep, with long values cut."""
    short = []
    for line in told:
        settings = {name: shorter(text) for name, text in line["settings"].items()}
        short.append(line | {"settings": settings})
    return table(short, shown, less_is_better)


def place_for(out: Path) -> Path:
    """Where a comparison is written: a run's own files stay as they are."""
    return out / "report" if is_run(out) else out


def read_all(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """(the runs that have ended, a line for each other one and for what is counted once). Raises DataError."""
    ended, lines, first = [], [], None
    places = {}  # of the runs by their identity
    for folder in folders:
        try:
            run = read_run(folder)
        except (ValueError, OSError) as error:
            lines.append(f"{folder}: left out, for {getattr(error, 'strerror', None) or error}")
            continue
        first = first or run
        if run.script != first.script and run.kind != first.kind:
            raise DataError(f"{first.folder} is a run of {first.script} and {folder} one of {run.script}: compare runs "
                            "of one page and its copies")  # fmt: skip
        if run.summary is None:
            lines.append(f"{folder}: not ended, {progress(run)}")
            continue
        same = places.setdefault(run.identity, folder)
        if same == folder:
            ended.append(run)
        else:
            lines.append(f"{folder}: left out, for {same} has the same settings and seed")
    if not ended:
        raise DataError(f"no run has ended yet: {'; '.join(lines[:3])}{' ...' if len(lines) > 3 else ''}")
    return ended, lines


def progress(run: Run) -> str:
    """How far a run came, by its last line of metrics.jsonl, and what stopped it, by that of train.log."""
    records = read_metrics(run.folder)
    step = records[-1]["step"] if records else 0
    most = run.config.get("max_steps")
    text = f"step {step} of {most}" if most else f"step {step}"
    log = run.folder / "train.log"
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:] if log.is_file() else []
    return f"{text}, {shorten(last[0], WHY, placeholder=' ...')}" if last and last[0].startswith("stopped by") else text


def tell(runs: list[Run]) -> list[dict]:
    """The runs as lines of a sweep.jsonl, whose settings are what they differ in, and the seed if they have one."""
    terms = differing_terms(runs)
    told = []
    for run in runs:
        settings = {name: texts[run.terms.get(name)] for name, texts in terms.items()}
        if SEED in run.config:
            settings[SEED] = run.seed
        told.append({
            "run": run.folder.name,
            "status": "done",
            "settings": settings,
            "summary": {name: value for name, value in numbers(run.summary).items() if not is_lost(value)},
            "seconds": run.summary.get("seconds"),
            "folder": str(run.folder),
        })  # fmt: skip
    return told


def differing_terms(runs: list[Run]) -> dict[str, dict[Term | None, str]]:
    """{name of what runs differ in: {term: its text, with a digest where others look the same and are not}}."""
    names = dict.fromkeys(name for run in runs for name in run.terms)
    found = {}
    for name in names:
        terms = dict.fromkeys(run.terms.get(name) for run in runs)
        keys = {}  # the first text of each
        for term in terms:
            keys.setdefault(term and term.key, term.text if term else "")
        if len(keys) == 1:
            continue
        alike = Counter(keys.values())
        texts = {}
        for term in terms:
            key = term and term.key
            mark = f" ({digest(key)})" if key is not None and alike[keys[key]] > 1 else ""
            texts[term] = (keys[key] + mark).strip()
        found[name] = texts
    # Steps that follow from the other settings tell nothing.
    others = [name for name in found if name != "steps"]
    if others and len(keys_of(runs, others)) == len(keys_of(runs, [*found])):
        found.pop("steps", None)
    return found


def keys_of(runs: list[Run], names: list[str]) -> set[tuple]:
    """The sets of terms that there are."""
    return {tuple(run.terms[name].key if name in run.terms else None for name in names) for run in runs}


def is_lost(value: Any) -> bool:
    """Whether a number is none: JSON of other programs may have NaN."""
    return value is None or isinstance(value, float) and not is_number(value)


def results_of(told: list[dict]) -> list[str]:
    """The names of all numbers in the summaries that are results."""
    names = {}
    for line in told:
        for name, value in line["summary"].items():
            if is_number(value) and name not in FACTS:
                names[name] = None
    return list(names)


def study_part(experiment: str, ended: list[Run], out: Path) -> tuple[list[Section], list[str]]:
    """(sections, lines) of what the runs are a study of: XE against K, held-out cell types. Nothing, if of none."""
    studies = {"arxiv": report, "state": holdouts}
    if experiment not in studies or (experiment == "arxiv" and len({run.summary.get("K") for run in ended}) < 2):
        return [], []
    try:
        return studies[experiment].study_sections([run.folder for run in ended], out)
    except Exception as error:  # the comparison is of use without it
        if figures.STRICT and not isinstance(error, InputError):
            raise
        return [], [f"note: what the runs are a study of was left out: {error}"]


# ---------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------
def verdict(ranked: list[Group], name: str, less_is_better: bool) -> str:
    """The best group by a result, and how far ahead of the next it is; of runs on different data none is the best."""
    head = HEADS.get(name, name)
    known = [group for group in ranked if group.values(name)]
    if not known:
        known = {name for group in ranked for run in group.runs for name in run["summary"]}
        return f"No run has a {head} to compare by{closest(name, known)}."
    best = known[0]
    if len(ranked) == 1:
        return f"{'Runs of the same settings' if len(best.runs) > 1 else 'One run'}: {head} {spread(best, name)}."
    apart = problems(ranked)
    if apart:
        return f"The rows differ in {', '.join(apart)}: {head} tells how hard each is, and none is the best."
    better = "less" if less_is_better else "more"
    names = labels(ranked)
    text = f"{BEST} {len(ranked)} by {head} ({better} is better): {names[0]}, "
    if len(known) == 1:
        return f"{text}{spread(best, name)}; of the others none has a number there."
    second = known[1]
    if best.mean(name) == second.mean(name):
        same = f"{names[0]} and {names[1]} came to the same, {best.text(name)}"
        return f"None of {len(ranked)} is the best by {head}: {same}."
    is_alike = len(best.values(name)) == len(second.values(name))  # the spreads of both are said once
    text += best.text(name) if is_alike else spread(best, name)
    text += f"; next {names[1]}, {spread(second, name)}."
    samples = [best.values(name), second.values(name)]
    if min(map(len, samples)) < 2:
        return f"{text} Of a single run no spread is known: the order may be chance."
    # The standard error of a difference of two means, without assuming one spread for both.
    error = sqrt(sum(stdev(values) ** 2 / len(values) for values in samples))
    difference = abs(fmean(samples[0]) - fmean(samples[1]))
    return f"{text} They are {with_spread(difference, error)} (standard error) apart."


def spread(group: Group, name: str) -> str:
    """Mean, standard deviation and n of a group."""
    text, values = group.text(name), group.values(name)
    return f"{text} (mean ± standard deviation of {len(values)} seeds)" if len(values) > 1 else text


def notes_on(ended: list[Run], told: list[dict]) -> list[str]:
    """Sentences about what is averaged, or compared, and yet not quite alike."""
    notes = []
    places = {}
    for run in ended:
        place = f"torch {run.summary.get('torch')} on {run.device}"
        places[place] = places.get(place, 0) + 1
    if len(places) > 1:
        made = ", ".join(f"{place} ({counted(count, 'run')})" for place, count in places.items())
        notes.append(f"Not all runs were made with the same: {made}; their numbers differ by rounding too.")
    stopped = {}
    for run, line in zip(ended, told, strict=True):
        settings = tuple((name, text) for name, text in line["settings"].items() if name != SEED)
        stopped.setdefault(settings, set()).add(run.summary.get("steps"))
    if any(len(steps) > 1 for steps in stopped.values()):
        notes.append("Runs of one row stopped by their own loss (patience), after different numbers of steps.")
    for names in without_effect(told):
        notes.append(f"Runs that differ in {names} alone came to the same numbers: that had no effect.")
    return notes


def without_effect(told: list[dict]) -> list[str]:
    """The settings in which runs differ that came to the same numbers."""
    alike = {}
    for line in told:
        results = {name: value for name, value in line["summary"].items() if isinstance(value, float)}
        results = frozenset((name, value) for name, value in results.items() if name not in FACTS)
        alike.setdefault((results, line["settings"].get(SEED)), []).append(line["settings"])
    found = {}
    for (results, _), settings in alike.items():
        differing = [name for name in settings[0] if len({each[name] for each in settings}) > 1]
        if results and differing:
            found[", ".join(differing)] = None
    return list(found)


# ---------------------------------------------------------------------------------------------------------------
# The CSV and the page
# ---------------------------------------------------------------------------------------------------------------
def known_of(group: Group) -> dict:
    """The first columns of a group: settings, n, seeds."""
    row = group.settings | {"runs": len(group.runs)}
    seeds = [run["settings"][SEED] for run in group.runs if SEED in run["settings"]]
    if seeds:
        row["seeds"] = ", ".join(seeds)
    return row


def csv_row(group: Group, names: list[str]) -> dict:
    """A group with mean, standard deviation and n of each result; None where undefined."""
    row = known_of(group)
    for name in names:
        values = group.values(name)
        row[name] = fmean(values) if values else None
        row[f"{name} sd"] = stdev(values) if len(values) > 1 else None
        row[f"{name} n"] = len(values)
    return row


def write_csv(path: Path, rows: list[dict]) -> None:
    """A table whose columns are the keys of the rows; blank for None."""
    with replacing(path) as fresh, open(fresh, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, list({name: None for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)


def page_row(group: Group, shown: list[str]) -> dict:
    """A group as a row of the page: a result is its mean ± its standard deviation, sorted by the mean."""
    row = known_of(group)
    for name in shown:
        mean = group.mean(name)
        row[HEADS.get(name, name)] = None if mean is None else Cell(group.text(name), str(mean), True)
    return row


def run_row(run: dict, shown: list[str]) -> dict:
    """A run as a row of the page."""
    row = dict(run["settings"])
    for name in (*shown, "steps", "seconds"):
        row[HEADS.get(name, name)] = run["summary"].get(name)
    row["folder"] = run["folder"]
    return row


def sections_of(ranked: list[Group], ended: list[Run], shown: list[str], notes: list[str], out: Path) -> list[Section]:
    """The parts of the page: a row for each group, curves, a row for each run, what all have in common."""
    text = "A row is of runs that differ in their seed alone: mean ± standard deviation over seeds."
    if all(len(group.runs) == 1 for group in ranked):
        text = "No two runs differ in their seed alone, so no spread is known."
    dots = "Dots: single runs. Bars: mean and standard deviation over seeds, where there are several."
    lines = (
        "Thick lines: means over seeds. Thin lines: single runs. Bands: from the smallest to the largest. Where a loss "
        "starts far above, the top is cut off."
    )
    runs = [run_row(run, shown) for group in ranked for run in group.runs]
    return [
        Section(
            "By settings", [text, *notes], [[page_row(group, shown) for group in ranked]], drawn(out, "results", dots)
        ),
        Section("While training", [], [], drawn(out, "curves", lines)),
        Section("Single runs", [], [runs]),
        Section("What the runs share", [], [shared(ended)], folded=True),
    ]


def commands(ended: list[Run], best: Group | None, out: Path, wanted: str) -> Section:
    """What makes this page again, and the best run, where one is."""
    folders = [run.folder for run in ended]
    below = all(folder.is_relative_to(out) for folder in folders)
    words = [str(out)] if below else [*map(str, folders), f"--out={out}"]
    words += [f"--objective={wanted}"] if wanted else []
    text = ["The first command makes this page again, of the runs that have ended by then."]
    lines = [command_line(from_here(ROOT / "sweep.py"), ["report", *words])]
    script = ROOT / ended[0].script
    if best and script.exists():
        text.append("The second one repeats the best run beside it.")
        folder = best.runs[0]["folder"]
        lines.append(command_line(from_here(script), [f"{folder}/config.json", f"--out_dir={folder}_again"]))
    return Section("Again", text, commands=lines)


def drawn(out: Path, name: str, caption: str) -> list[tuple[Path, str]]:
    """A picture, if there is one."""
    path = out / "plots" / f"{name}.png"
    return [(path, caption)] if path.exists() else []


def shared(ended: list[Run]) -> list[dict]:
    """Rows of the settings that all runs have alike."""
    rows = []
    for name, value in ended[0].config.items():
        if name not in APART and all(name in run.config and run.config[name] == value for run in ended):
            rows.append({"setting": name, "value": typed(value)})
    return rows
