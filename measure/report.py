"""The report of a study's runs, each on a set of categories: tables, pictures, report.html."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.checkpoint import NO_SETTINGS
from common.telling import doing
from measure.curves import gain_definition, reported_positions
from measure.pages import Section
from measure.study_arrays import RESAMPLES, SEED, Arrays, arrays_of
from measure.study_pictures import (
    draw_categories,
    draw_context,
    draw_controls,
    draw_curves,
    draw_law,
    draw_slopes,
    draw_tradeoff,
)
from measure.study_rows import by_k_sentence, category_rows, row_of, run_row, write_csv
from measure.xe_by_k import (
    LAWS,
    Study,
    bars_by_kind,
    cell_means,
    cell_weights,
    growth_parts,
    interval,
    law_of_k,
    mean_and_error,
    mean_of,
    number,
    shared_errors,
    t_interval,
    told_apart,
    tradeoff,
)
from sources.outcomes import COUNT, NUMBER, NUMBERS, TABLE, TEXT, TEXTS, Kind, check, is_number, read_object
from sources.shared import counted

# Settings that runs of one study may differ in, and those of the measurements after training.
APART = (*NO_SETTINGS, "categories", "seed", "study", "study_seeds", "report", "data", "budget", "budget_tokens",
         "control_of", "final_split", "icl_early", "icl_late", "eval_chunks", "bootstrap", "probe", "precision",
         "matmul_precision", "wandb_project", "wandb_entity")  # fmt: skip
MOST_LINES = 7  # for a terminal; one more says where the report is
WORDS = "XE is the cross entropy of the next token, K the number of categories that a model is trained on."
NOT_SAID = "not said"  # by results of older runs


# ---------------------------------------------------------------------------------------------------------------
# What runs were trained on
# ---------------------------------------------------------------------------------------------------------------
def training_facts(config: dict, data: dict[str, str], chunks, steps: int, measured: dict | None = None) -> dict:
    """What a run was trained on and how much, for results.json: a report averages only what is alike in this.

    Args:
        config: the settings. data: the fingerprint of the data, by their path; own data may have none.
        chunks: of training: n_ctx, size and budget. steps: of the optimizer, up to the last.
        measured: the data that a look at the run measures on, as data; chunks are then of these.
    """
    path, fingerprint = next(iter(data.items()))
    tokens = config["budget_tokens"] or int(chunks.budget * chunks.size)
    other = {}
    name, content = next(iter((measured or data).items()))
    if content != fingerprint:
        tokens = config["budget_tokens"]  # that of the data trained on, which are not here
        other["measured_on"] = {"path": name, "fingerprint": content}
    return {
        "data": {"path": path, "fingerprint": fingerprint},
        **other,
        "budget": {"kind": config["budget"], "tokens": tokens},
        "steps": steps,
        "tokens": steps * config["batch_size"] * chunks.n_ctx,
        "settings": shared_settings(config),
    }

# What results.json of a run must hold where the report shows it.
POSITION = Kind("position", lambda value: type(value) is int and value > 0)
RESULT = {"K": POSITION, "seed": NUMBER, "categories": TEXTS, "control_of": POSITION, "steps": COUNT, "tokens": COUNT,
          "final_split": TEXT, "final_fingerprint": TEXT, "groups": TABLE, "data": TABLE, "measured_on": TABLE,
          "budget": TABLE, "settings": TABLE, "information": TABLE, "probe": TABLE}  # fmt: skip
TABLES = {
    "data": {"path": TEXT, "fingerprint": TEXT},
    "measured_on": {"path": TEXT, "fingerprint": TEXT},
    "budget": {"kind": TEXT},
    "settings": {"epochs": COUNT, "batch_size": COUNT, "patience": COUNT},
    "information": dict.fromkeys(("document", "predictions", "log_K"), NUMBER),
}
CURVES = ("xe_by_position", "oracle_xe_by_position", "known_xe_by_position", "excess_by_position")
GROUP = dict.fromkeys(CURVES, NUMBERS) | dict.fromkeys(
    ("xe", "icl_gain", "total_gain", "oracle_icl_gain", "largest_excess", "largest_relative_excess"), NUMBER
) | {"fit": TABLE, "icl_score": TABLE}
FIT = ("alpha", "xe_inf", "c")
ROWS = Kind("list of lists of numbers", lambda value: isinstance(value, list) and len(value) > 0 and all(
    isinstance(row, list) and all(each is None or is_number(each) for each in row) for row in value))  # fmt: skip
SCORE = {"value": NUMBER, "early": POSITION, "late": POSITION}


def shared_settings(config: dict) -> dict:
    """The settings that runs have in common where they may be averaged."""
    return {name: value for name, value in config.items() if name not in APART}


def terms_of(result: dict) -> dict:
    """What runs must agree in to be averaged, by name: data, budget, positions, settings."""
    data = result.get("data", {})
    budget = result.get("budget", {})
    terms = {
        "data": data.get("fingerprint") or data.get("path", NOT_SAID),  # the same data may lie elsewhere
        "budget": budget.get("kind", NOT_SAID),
        "budget_tokens": budget.get("tokens", NOT_SAID),
        "n_ctx": len(result["groups"]["seen"]["xe_by_position"]),
        "final_split": result.get("final_split", "validation"),  # of older runs, which knew no other
        "final_data": result.get("final_fingerprint") or NOT_SAID,
    }
    return terms | result.get("settings", {})


def alike(results: list[dict]) -> dict[str, list[dict]]:
    """Runs by group, "" where there is one alone: those that may be averaged, named by what other groups differ in."""
    groups = {}
    amounts = amounts_of(results)
    for result in results:
        terms = terms_of(result)
        if "tokens" in result:
            terms["tokens"] = amounts[result["tokens"]] if trained_to_the_end(result) else "by run"
        key = json.dumps(terms, sort_keys=True)
        groups.setdefault(key, []).append(result)
    terms = [json.loads(key) for key in groups]
    names = dict.fromkeys(name for term in terms for name in term)
    differing = []
    for name in names:
        values = {json.dumps(term.get(name, NOT_SAID)) for term in terms}
        if len(values) > 1:
            differing.append(name)
    labelled = {}
    for term, runs in zip(terms, groups.values(), strict=True):
        named = term | {"data": data_name(runs[0])}
        described = [f"{name}={named.get(name, NOT_SAID)}" for name in differing]
        labelled[", ".join(described)] = runs
    return labelled


def trained_to_the_end(result: dict) -> bool:
    """Whether a run says its tokens, and could not stop by its own loss before the last."""
    return "tokens" in result and result.get("settings", {}).get("patience") == 0


def amounts_of(results: list[dict]) -> dict[int, int]:
    """{tokens of a run: the most of those that are the same amount}, of runs that trained to the end.

    Equal shares are whole chunks, and the last batch is full: so much may equal budgets differ in.
    """
    ended = [result for result in results if trained_to_the_end(result)]
    rounding = 0
    for result in ended:
        settings = result["settings"]
        chunks = settings.get("epochs", 0) * result["K"] + settings.get("batch_size", 0)
        T = len(result["groups"]["seen"]["xe_by_position"])
        rounding = max(rounding, chunks * T)
    amounts = {}
    most = 0
    for tokens in sorted({result["tokens"] for result in ended}, reverse=True):
        if tokens < most - rounding or not amounts:
            most = tokens
        amounts[tokens] = most
    return amounts


def data_name(result: dict) -> str:
    """What a run was trained on, for people: the path, and what tells it from other data of the same path."""
    data = result.get("data", {})
    path = data.get("path", NOT_SAID)
    digest = data.get("fingerprint", "")  # 16 digits of training, then 16 of validation
    parts = [digest[begin : begin + 8] for begin in range(0, len(digest), 16)]
    return f"{path} ({'-'.join(parts)})" if digest else path


def once(results: list[dict]) -> tuple[list[dict], list[str]]:
    """(each run once, a line for each other): of results that agree in all but their place, the one nearest by."""
    kept = {}
    repeated = []
    for result in sorted(results, key=lambda result: result["run"].count("/")):
        what = [sorted(result["categories"]), result["seed"], result.get("control_of"), terms_of(result)]
        key = json.dumps(what, sort_keys=True)
        if key in kept:
            repeated.append(f"{result['run']} is {kept[key]['run']} again: counted once")
        kept.setdefault(key, result)
    return list(kept.values()), repeated


def tokens_sentence(results: list[dict]) -> str:
    """How many tokens the runs were trained on."""
    tokens = [result.get("tokens") for result in results]
    if None in tokens:
        return "Older runs do not say how many tokens they were trained on."
    low = min(tokens)
    high = max(tokens)
    if low == high:
        return f"Every run was trained on {low:,} tokens."
    return f"Runs were trained on {low:,} to {high:,} tokens, by run in the last table."


# ---------------------------------------------------------------------------------------------------------------
# Runs of a report
# ---------------------------------------------------------------------------------------------------------------
class Group(NamedTuple):
    """Runs that may be averaged, and the controls of their shares.

    label: what it differs from other groups in, "" where it is alone; short: what pictures call it.
    """

    label: str
    short: str
    runs: list[dict]
    controls: list[dict]

    @property
    def by_k(self) -> dict[int, list[dict]]:
        runs = {}
        for run in sorted(self.runs, key=lambda run: run["K"]):
            runs.setdefault(run["K"], []).append(run)
        return runs

    @property
    def equal_tokens(self) -> bool:
        """Whether all runs were trained on as many: to their end, of one budget; or by what they say."""
        if all(trained_to_the_end(run) for run in self.runs):
            return True
        tokens = {run.get("tokens") for run in self.runs}
        return len(tokens) == 1 and None not in tokens


def read_results(folders: list[Path], out: Path) -> tuple[list[dict], list[str]]:
    """(results.json of the run folders, a line for each that is damaged). A folder without one is a run at work.

    Each is given its folder, and the name of that as seen from `out`.
    """
    results = []
    notes = []
    for folder in folders:
        path = folder / "results.json"
        looked_at = folder.parent / path.name
        if not path.exists() or (folder.name == "analysis" and looked_at.exists()):  # a later look at a run that counts
            continue
        try:
            result = read_object(path)
            check_result(result)
        except (OSError, ValueError) as error:
            notes.append(f"{path} is damaged or foreign ({error}) and left out: --analyze that run again")
            continue
        if "settings" not in result:
            result |= older_facts(folder)
        result["folder"] = folder
        result["run"] = (folder.relative_to(out) if folder.is_relative_to(out) else folder).as_posix()
        results.append(result)
    return results, notes


def older_facts(folder: Path) -> dict:
    """What config.json and summary.json say of a run whose results.json does not say what it was trained on."""
    facts = {}
    try:
        config = read_object(folder / "config.json")
        facts["data"] = {"path": config["data"]}
        facts["budget"] = {"kind": config["budget"], "tokens": config["budget_tokens"] or NOT_SAID}
        facts["settings"] = shared_settings(config)
        facts["steps"] = read_object(folder / "summary.json")["steps"]
        check(facts, {"steps": COUNT}, "summary.json")
    except (OSError, ValueError, KeyError, TypeError):
        pass  # what there is has been taken
    return facts


def check_result(result: dict) -> None:
    """Raises ValueError where a result lacks what the report shows, or has something else in its place."""
    where = "results.json"
    check(result, RESULT, where, ("K", "seed", "categories", "groups"))
    if result["K"] != len(set(result["categories"])):
        raise ValueError(f"{where} says K = {result['K']} of {len(result['categories'])} categories")
    for table, kinds in TABLES.items():
        check(result.get(table) or {}, kinds, f"{where}, {table},")
    groups = result["groups"]
    names = ("seen", *result["categories"])
    check(groups, dict.fromkeys((*groups, *names), TABLE), where, names)
    T = len(groups["seen"].get("xe_by_position") or ())
    for name, group in groups.items():
        place = f"{where}, {name},"
        check(group, GROUP, place, ("xe_by_position", "xe", "icl_gain", "total_gain"))
        curves = [group[curve] for curve in CURVES if group.get(curve) is not None]
        if not T or any(len(curve) != T for curve in curves):
            raise ValueError(f"{place} has curves of other lengths than {T or 'one position'}")
        if group.get("fit") is not None:
            check(group["fit"], dict.fromkeys(FIT, TABLE), place, FIT)
            for parameter in FIT:
                check(group["fit"][parameter], {"value": NUMBER}, f"{place} {parameter}", ("value",))
        score = group.get("icl_score") or {}
        check(score, SCORE, place)
    if result.get("probe"):
        check(result["probe"], {"accuracy": ROWS}, f"{where}, probe,", ("accuracy",))


def grouped(results: list[dict]) -> tuple[list[Group], list[str]]:
    """(groups of runs that may be averaged, with their controls; a line for each control that is of no group)."""
    studied = [result for result in results if not result.get("control_of")]
    controls = [result for result in results if result.get("control_of")]
    groups = []
    labelled = alike(studied)
    for place, (label, runs) in enumerate(labelled.items(), 1):
        short = f"group {place}" if len(labelled) > 1 else ""
        groups.append(Group(label, short, runs, []))
    notes = []
    for control in controls:
        owners = [group for group in groups if is_control_of(control, group.runs)]
        for group in owners:
            group.controls.append(control)
        if not owners:
            notes.append(f"{control['run']} is a control of K = {control['control_of']} of no runs here: not used")
    return groups, notes


def is_control_of(control: dict, runs: list[dict]) -> bool:
    """Whether a run is alike but for its budget, and that is a share of theirs."""
    budget = ("budget", "budget_tokens")
    terms = terms_of(control)
    others = terms_of(runs[0])
    if any(terms.get(name) != others.get(name) for name in {*terms, *others} if name not in budget):
        return False
    K = control["control_of"]
    totals = [run["tokens"] for run in runs if run["K"] == K and "tokens" in run]
    if not totals or not trained_to_the_end(control):
        return True
    # A share is whole chunks, and the last batch is full.
    settings = control["settings"]
    chunks = settings.get("epochs", 0) + settings.get("batch_size", 0)
    return abs(control["tokens"] * K - max(totals)) <= K * chunks * len(control["groups"]["seen"]["xe_by_position"])


# ---------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------
def study_sections(runs: list[Path], out: Path) -> tuple[list[Section], list[str]]:
    """What the runs of a study of train_arxiv.py say of XE against K: sections of a page, lines for a terminal.

    Runs of one K are averaged where data, budget and settings are the same; others make groups of their own. Writes
    xe_by_k.csv, xe_by_category.csv, xe_law.csv, xe_controls.csv, xe_tradeoff.csv (those that there is something for)
    and plots/ below out. What cannot be said is said to be so.

    Args:
        runs: folders of runs; those without a results.json, which have not ended, do not count.
    """
    results, notes = read_results(runs, out)
    results, repeated = once(results)
    groups, unused = grouped(results)
    notes += repeated + unused
    if not groups:
        return [], [*notes, "no run has a results.json that says XE by K: train some with --study=all"]
    out.mkdir(parents=True, exist_ok=True)

    answers = []
    tables = {"xe_by_k": [], "xe_by_category": [], "xe_law": [], "xe_controls": [], "xe_tradeoff": []}
    sections = []
    lines = []
    for group in groups:
        with doing(f"reading the documents of {counted(len(group.runs) + len(group.controls), 'run')}"):
            arrays = arrays_of(group.runs, group.controls)
        with doing(f"fitting laws of XE in K, {RESAMPLES:,} draws"):
            found = law_of_k(arrays.study, RESAMPLES, SEED)
            optimum = law_of_k(arrays.optimum, RESAMPLES, SEED) if found and arrays.optimum else None
        named = {"group": group.label} if group.label else {}
        parts = [
            law_section(group, arrays, found, optimum, out),
            control_section(group, arrays, out),
            tradeoff_section(group, arrays, out),
            context_section(group, arrays, found, out),
        ]
        for part in parts:
            sections += part.sections
            for name, rows in part.tables.items():
                tables[name] += [named | row for row in rows]
            answers += [f"{group.short}: {line}" if group.short else line for line in part.lines]
        positions = reported_positions(min(len(run["groups"]["seen"]["xe_by_position"]) for run in results))
        bars = {row["K"]: row for row in bars_by_kind(arrays.study)}
        context = {row["K"]: row for row in parts[-1].rows}
        rows = []
        for K, runs_of_k in group.by_k.items():
            row = named | row_of(K, runs_of_k, positions)
            for key in ("sd_sets", "sd_seeds", "se_documents"):
                row[key] = bars[K][key]
            for key in ("icl_score", "information_document", "excess", "worst_excess"):
                row[key] = context[K].get(key)
            rows.append(row)
        tables["xe_by_k"] += rows
        sentence = by_k_sentence(rows)
        lines.append(f"{group.short}: {sentence}" if group.short else sentence)
        tables["xe_by_category"] += [named | row for row in category_rows(group.by_k)]
    for name, rows in tables.items():
        path = out / f"{name}.csv"
        path.unlink(missing_ok=True)  # of a report before
        if rows:
            write_csv(path, rows)
    sections += shared_sections(groups, results, tables, out)
    if notes:
        sections.append(Section("Notes", notes))
    named = [f"{group.short} is {group.label}" for group in groups if group.label]
    return sections, shortened([*named, *answers, *lines, *notes])


def shortened(lines: list[str]) -> list[str]:
    """What a terminal is told: the first lines, and how many more there are."""
    if len(lines) <= MOST_LINES:
        return lines
    kept = MOST_LINES - 1
    return [*lines[:kept], f"and {len(lines) - kept} lines more, in the report"]


class Part(NamedTuple):
    """Sections of a group, rows of tables by file, lines for a terminal, and rows by K."""

    sections: list[Section]
    tables: dict[str, list[dict]] = {}
    lines: list[str] = []
    rows: list[dict] = []


def titled(title: str, group: Group) -> str:
    """A title, with the group where there are several."""
    return f"{title} ({group.short})" if group.short else title


def picture_name(name: str, group: Group) -> str:
    """xe_against_k, xe_against_k_2: the name of a picture of a group."""
    return f"{name}_{group.short.removeprefix('group ')}" if group.short else name


# ---------------------------------------------------------------------------------------------------------------
# The law
# ---------------------------------------------------------------------------------------------------------------
def law_section(group: Group, arrays: Arrays, found: dict | None, optimum: dict | None, out: Path) -> Part:
    """The answer: how XE grows with K, by which law, and how well that is known."""
    title = titled("Cross entropy against K", group)
    if found is None:
        line = no_law(arrays.study)
        return Part([Section(title, [line])], lines=[line])
    sentences = [law_sentence(group, arrays, found)]
    if optimum:
        sentences.append(optimum_sentence(optimum))
    sentences.append(comparison_sentence(found))
    rows = law_rows("model", arrays, found)
    if optimum:
        rows += law_rows("exact optimum", arrays, optimum)
    of_mean = [row for row in rows if row["position"] == "mean"]
    of_model = [row for row in rows if row["law"] == LAWS[0] and row["of"] == "model"]
    laws = columns(of_mean, "of", "law", "b", "low", "high", "rms", "held_out_rms")
    by_position = columns(of_model, "position", "b", "low", "high", "held_out_rms")

    against, slopes = picture_name("xe_against_k", group), picture_name("law_by_position", group)
    categories = counted(int(in_law(found).sum()), "category", "categories")
    heading = f"XE against K: {categories}, {counted(len(group.runs), 'run')}"
    draw_law(out, against, found, optimum, heading)
    draw_slopes(out, slopes, found, optimum, arrays.positions, "What an e-fold of K costs after so many tokens")
    said = (
        "XE, a mean over positions and categories, against K on a linear and a logarithmic axis. Bars and band: 95%, "
        "without the level that documents have in common at all K."
    )
    pictures = [
        (out / "plots" / f"{against}.png", said),
        (out / "plots" / f"{slopes}.png", "b of a + b log K by the number of tokens read. Bars: 95%."),
    ]
    model, *errors = law_terms(arrays, found)
    tables = [laws, by_position, bars_by_kind(arrays.study)]
    said_first = f"{group.short}: " if group.short else ""
    answer = Section(title, [said_first + " ".join(sentences), WORDS, *errors], tables, pictures)
    return Part(
        [answer, Section(titled("How laws are fitted", group), [model], folded=True)], {"xe_law": rows}, sentences
    )


def columns(rows: list[dict], *names: str) -> list[dict]:
    """Some columns of a table."""
    return [{name: row[name] for name in names} for row in rows]


def no_law(study: Study) -> str:
    """Why the runs have no law."""
    sizes = np.unique(study.sizes)
    if len(sizes) == 1:
        return f"All runs are of K = {sizes[0]}: how XE grows with K takes runs of another K, too."
    return (
        "No category is in runs of two sizes K: what differs between these would be the categories as much as K, "
        "and no law is fitted."
    )


def law_sentence(group: Group, arrays: Arrays, found: dict) -> str:
    """At equal tokens XE grows by b nats per e-fold of K (its interval, and what that is of)."""
    law = found["laws"][LAWS[0]]
    b, low, high = (float(law[name][-1]) for name in ("b", "low", "high"))
    subject = "At equal tokens XE" if group.equal_tokens else "XE"
    verb = "grows"
    if b < 0:
        verb, b, low, high = "falls", -b, -high, -low
    sets = arrays.study.sets.max() + 1
    seeds = len(np.unique(arrays.study.seeds))
    inside = in_law(found)
    of = [
        counted(int(inside.sum()), "category", "categories"),
        counted(int(sets), "set"),
        counted(seeds, "seed"),
    ]
    if arrays.documents is not None:
        of.append(counted(int(arrays.documents[inside].sum()), "document"))
    known = "no interval: nothing here says how sets vary"
    if found["varied"]:
        known = f"95% interval {low:.4f} to {high:.4f} over {found['varied']}"
    if found["varied"] == "documents":
        known += " alone: how sets vary is not known"
    return f"{subject} {verb} by {b:.4f} nats per e-fold of K ({known}; {', '.join(of)})."


def in_law(found: dict) -> np.ndarray:
    """The categories that say something of the law, [C]: those that runs of several K have trained on."""
    return np.isfinite(found["means"][..., -1]).sum(1) > 1


def optimum_sentence(optimum: dict) -> str:
    """The same of the exact optimum."""
    law = optimum["laws"][LAWS[0]]
    b, low, high = (float(law[name][-1]) for name in ("b", "low", "high"))
    known = f" ({low:.4f} to {high:.4f} over sets)" if optimum["varied"] else ""
    return f"The exact optimum has {b:.4f}{known}."


def comparison_sentence(found: dict) -> str:
    """Which of the laws it is, or that the study cannot tell."""
    values = number_word(len(found["sizes"])).capitalize()
    if len(found["sizes"]) < 3:
        return f"{values} values of K fit every law of two parameters: laws cannot be compared."
    best, others = told_apart(found)
    laws = found["laws"]
    errors = ", ".join(f"{laws[law]['held_out'][-1]:.4f} of {law}" for law in LAWS)
    told = [law for law, apart in others.items() if apart]
    alike = [law for law, apart in others.items() if not apart]
    if not told:
        sentence = f"{values} values of K cannot tell {best} from {' or '.join(alike)}"
        known = "the 95% intervals of the differences include 0"
        if not found["varied"]:
            known = "nothing here says how these vary"
    else:
        sentence = f"Over {values.lower()} values of K {best} is a better law than {' and '.join(told)}"
        known = "the 95% interval of the difference is above 0"
        if alike:
            sentence += f", and cannot be told from {alike[0]}"
            known += f" for {told[0]} alone"
    return f"{sentence} (a K that is held out is missed by {errors}, rms in nats; {known})."


def number_word(number: int) -> str:
    """One to twelve in letters."""
    words = "zero one two three four five six seven eight nine ten eleven twelve".split()
    return words[number] if number < len(words) else str(number)


def law_terms(arrays: Arrays, found: dict) -> list[str]:
    """What the numbers of the law are of: paragraphs."""
    sets = arrays.study.sets.max() + 1
    model = (
        "Laws are fitted by least squares to the means of each category over the sets of each K, with a level of "
        "its own for each category: another composition of the sets is no effect of K. In a + b log K and a + b (1 "
        "- 1/K) b is in nats, in a K^b it is an exponent. held_out_rms is the error at a K by the law fitted "
        "without it, in turn. A law is told from the best where the 95% interval of the difference of the squared "
        "held-out errors, over documents and sets, is above 0."
    )
    documents = f"no documents ({arrays.why})"
    if arrays.documents is not None:
        many = int(arrays.documents[in_law(found)].sum())
        documents = f"documents ({many:,}, drawn with replacement within their category, the same in all runs)"
    if "sets" in found["varied"]:
        of_sets = (
            f"sets ({sets}, with their seeds, by a wild cluster bootstrap of what each set is off a law fitted "
            "without it). Sets overlap in their categories, so that they are less than as many independent ones"
        )
    else:
        of_sets = "no sets (without one of them there is no slope: train more sets of each K)"
    unit = (
        f"Intervals are over {documents} and {of_sets}; {counted(RESAMPLES, 'resample')}. Categories, and what "
        "some do to others, are those of the data: for a law of other categories an interval would be wider."
    )
    spreads = (
        "The last table has the spread at each K by kind: sd_sets over the sets (means over their seeds, each "
        "category's own level taken off), sd_seeds over seeds within a set, se_documents the error of the mean by "
        "drawing documents."
    )
    return [model, unit, spreads]


def law_rows(of: str, arrays: Arrays, found: dict) -> list[dict]:
    """Rows of xe_law.csv."""
    rows = []
    for law, numbers in found["laws"].items():
        for p, position in enumerate([*arrays.positions, "mean"]):
            rows.append(
                {
                    "of": of,
                    "law": law,
                    "position": position,
                    "b": number(numbers["b"][p]),
                    "low": number(numbers["low"][p]),
                    "high": number(numbers["high"][p]),
                    "rms": number(numbers["rms"][p]),
                    "held_out_rms": number(numbers["held_out"][p]),
                    "values_of_K": len(found["sizes"]),
                    "interval_over": found["varied"],
                }
            )
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Dilution and interference, what is gained elsewhere, the context
# ---------------------------------------------------------------------------------------------------------------
PARTS = ("growth", "dilution", "interference")
INFORMATION = ("information_document", "information_predictions", "information_model", "excess", "worst_excess")


def control_section(group: Group, arrays: Arrays, out: Path) -> Part:
    """The growth of XE from K = 1 in two parts, where there are controls."""
    title = titled("Dilution and interference", group)
    if not arrays.controls:
        if arrays.study.sizes.max() == 1:
            return Part([])
        text = (
            "A category among K reads less of its own, and reads others beside it. Which of the two costs how much "
            "is told by runs on it alone, at the share that it has among K: the same command with --controls "
            "trains them."
        )
        line = "Dilution is not told from interference: runs with --controls do that."
        return Part([Section(title, [text])], lines=[line])
    parts = growth_parts(arrays.study, arrays.controls)
    missing = without_parts(arrays, parts)
    if not parts:
        return Part([Section(title, [missing])], lines=[missing])
    by_category = [part_row(part, arrays) for part in parts]
    sizes = np.unique(arrays.study.sizes)
    errors = shared_errors(arrays.study, sizes)
    shared = dict(zip(sizes.tolist(), np.nan_to_num(errors).tolist(), strict=True))
    means = mean_rows(by_category, shared)
    for mean in means:
        mean["optimum_growth"] = optimum_growth(arrays, mean["K"])
    sentence = parts_sentence(means[-1])
    text = [sentence, parts_terms(bool(np.isfinite(errors).all()))]
    if missing:
        text.append(missing)
    name = picture_name("dilution", group)
    draw_controls(out, name, means, by_category, "What XE grows by from K = 1, by cause")
    caption = "Growth of XE from K = 1 and its parts. Bars: standard errors; small points: categories."
    shown = columns(means, "K", "categories", *(f"{name}{error}" for name in PARTS for error in ("", "_se")))
    if arrays.optimum:
        shown = [row | {"optimum_growth": mean["optimum_growth"]} for row, mean in zip(shown, means, strict=True)]
    section = Section(title, text, [shown, by_category], [(out / "plots" / f"{name}.png", caption)])
    return Part([section], {"xe_controls": control_table(by_category, means)}, [sentence])


def parts_terms(has_shared_errors: bool) -> str:
    """What growth and its parts are, and their errors: a paragraph."""
    shared = "too small: what a run adds to all of its categories takes two sets of a K, or two seeds."
    if has_shared_errors:
        shared = "also over what a run adds to all of its categories, by the spread of seeds and of sets."
    return (
        "growth is XE of a category among K less XE of it alone, at the same budget. dilution is what a run on it "
        "alone loses at the share that it has among K; interference is the rest: what the others cost, or give "
        "where it is below 0, with what not knowing the category costs any predictor (growth of the exact "
        "optimum). A control reads a K-th of the text as often as a run among K does, so it also makes a K-th of the "
        "steps: dilution is of too short a training as much as of too little text, and interference gives both back. "
        "Differences are paired by category and seed, and averaged over the sets of a category first. Errors (se) are "
        "over categories, of which there are few, and whose sets overlap; those of growth and interference are "
        f"{shared}"
    )


def part_row(part: dict, arrays: Arrays) -> dict:
    """Growth and its parts of a category at a K: a mean over positions, and at the last."""
    row = {"K": part["K"], "category": arrays.names[part["category"]], "seeds": part["seeds"]}
    for name in PARTS:
        row[name] = float(part[name][-1])
    for name in PARTS:
        row[f"{name}_at_{arrays.positions[-1]}"] = float(part[name][-2])
    return row


def mean_rows(by_category: list[dict], shared: dict[int, float]) -> list[dict]:
    """Means over categories by K, with standard errors and 95% by Student's t.

    shared: by K the error that its runs add to all categories; controls have no part in it, so dilution has not.
    """
    rows = []
    for K in sorted({row["K"] for row in by_category}):
        of_k = [row for row in by_category if row["K"] == K]
        mean = {"K": K, "categories": len(of_k)}
        for name in PARTS:
            values = [row[name] for row in of_k]
            error = 0.0 if name == "dilution" else shared[K]
            mean[name], mean[f"{name}_se"] = mean_and_error(values, error)
            mean[f"{name}_low"], mean[f"{name}_high"] = t_interval(values, error) or (None, None)
        rows.append(mean)
    return rows


def optimum_growth(arrays: Arrays, K: int) -> float | None:
    """What the exact optimum grows by from K = 1, a mean over categories; None where it is not known."""
    if arrays.optimum is None:
        return None
    sizes = np.array([1, K])
    m = cell_means(arrays.optimum.xe, cell_weights(arrays.optimum, sizes))[..., -1]
    return number(mean_of(m[:, 1] - m[:, 0], 0))


def parts_sentence(mean: dict) -> str:
    """What XE grows by to a K, and why."""
    words = []
    for name in PARTS:
        error = mean[f"{name}_se"]
        words.append(f"{mean[name]:+.4f}" + ("" if error is None else f" +- {error:.4f}"))
    units = f"means over {mean['categories']} categories, with standard errors"
    if mean["categories"] == 1:
        units = "of 1 category"
    sentence = (
        f"From K = 1 to {mean['K']} XE changes by {words[0]} nats: {words[1]} by dilution (a category alone with 1/"
        f"{mean['K']} of the tokens and of the steps), {words[2]} by interference (the rest; {units})."
    )
    if mean["optimum_growth"] is not None:
        sentence += f" That of the exact optimum changes by {mean['optimum_growth']:+.4f}."
    return sentence


def control_table(by_category: list[dict], means: list[dict]) -> list[dict]:
    """Rows of xe_controls.csv: each category, then the means over them, category "mean", with errors and intervals."""
    errors = [f"{name}{error}" for name in PARTS for error in ("_se", "_low", "_high")]
    errors.append("optimum_growth")
    rows = [row | dict.fromkeys(errors) for row in by_category]
    for mean in means:
        row = dict.fromkeys(rows[0]) | mean | {"category": "mean"}
        del row["categories"]
        rows.append(row)
    return rows


def without_parts(arrays: Arrays, parts: list[dict]) -> str:
    """Which controls have nothing beside them to be held against, a sentence; "" where all have."""
    have = {(part["K"], part["category"]) for part in parts}
    lacking = []
    for K, control in arrays.controls.items():
        for c in np.flatnonzero(control.seen.any(0)):
            if (K, c) not in have:
                lacking.append(f"{arrays.names[c]} at K = {K}")
    if not lacking:
        return ""
    return (
        f"The controls of {listed(lacking)} stand alone: growth needs a run on the category alone and one among K, "
        "of the same seed."
    )


def listed(names: list[str], most: int = 8) -> str:
    """a, b and 3 more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def tradeoff_section(group: Group, arrays: Arrays, out: Path) -> Part:
    """XE on categories trained on beside XE on the others."""
    rows = tradeoff(arrays.study)
    both = [row for row in rows if row["unseen_xe"] is not None]
    if not both:
        return Part([])
    text = []
    lines = []
    if len(both) > 1:
        first, last = both[0], both[-1]
        seen, unseen = (change(first, last, kind) for kind in ("seen", "unseen"))
        lines.append(
            f"From K = {first['K']} to {last['K']} XE changes by {seen} nats on categories trained on and by "
            f"{unseen} on the others."
        )
        text += lines
    text.append(
        "The same categories in runs that trained on them (seen) and in runs that did not (unseen), as means over "
        "categories. Errors are standard errors over categories with each one's own level taken off (Morey 2008), so "
        "that they are of differences between K and not between categories, and over what a run adds to all of its "
        "categories, where two sets of a K or two seeds tell. The last K may have no unseen category."
    )
    name = picture_name("tradeoff", group)
    draw_tradeoff(out, name, rows, "Specialisation against diversity")
    caption = "Left: XE on seen and unseen categories against K. Right: one against the other, a point for each K."
    section = Section(
        titled("Specialisation and diversity", group), text, [rows], [(out / "plots" / f"{name}.png", caption)]
    )
    return Part([section], {"xe_tradeoff": rows}, lines)


def change(first: dict, last: dict, kind: str) -> str:
    """What XE changes by between two K, with the standard error of the difference where it is known."""
    difference = f"{last[f'{kind}_xe'] - first[f'{kind}_xe']:+.4f}"
    errors = first[f"{kind}_se"], last[f"{kind}_se"]
    return difference if None in errors else f"{difference} +- {np.hypot(*errors):.4f}"


def context_section(group: Group, arrays: Arrays, found: dict | None, out: Path) -> Part:
    """The in-context score by K; on synthetic documents information and excess, too."""
    rows = context_rows(group, arrays, found)
    said = f"XE after {arrays.late} tokens less XE after {arrays.early}"
    text = [
        f"The in-context score is {said} (Olsson et al. 2022), a mean over categories: below 0 where the context "
        "helps. low and high are 95%, over what the intervals of the law are over."
    ]
    is_synthetic = rows[0]["information_predictions"] is not None
    if is_synthetic:
        text.append(
            "Information: what a document tells of its component, I = the sum over its tokens of XE of the exact "
            "mixture less XE with the component known, is at most log K; its predictions are without the first "
            "token, which nobody predicts. The model pays that and its excess over the optimum (information_model, "
            "summed over predictions). excess is a mean over positions, worst_excess the largest at any position, "
            "in nats."
        )
    name = picture_name("in_context", group)
    draw_context(out, name, rows, "What the context is worth, by K")
    caption = f"In-context score: {said}. On synthetic documents: information beside log K, excess over the optimum."
    score = columns(rows, "K", "runs", "icl_score", "icl_score_low", "icl_score_high", "optimum_icl_score")
    tables = [without_blanks(score)]
    if is_synthetic:
        tables.append(without_blanks(columns(rows, "K", "log_K", *INFORMATION)))
    section = Section(titled("In context", group), text, tables, [(out / "plots" / f"{name}.png", caption)])
    return Part([section], rows=rows)


def without_blanks(rows: list[dict]) -> list[dict]:
    """A table without the columns that no row has a value in."""
    kept = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return [{name: row[name] for name in kept} for row in rows]


def context_rows(group: Group, arrays: Arrays, found: dict | None) -> list[dict]:
    """By K: the in-context score with its interval, that of the optimum, information, excess."""
    sizes = np.unique(arrays.study.sizes)
    early, late = arrays.positions.index(arrays.early), arrays.positions.index(arrays.late)
    means = cell_means(arrays.study.xe, cell_weights(arrays.study, sizes))
    scores = mean_of(means[..., late] - means[..., early], 0)  # [J]
    limits = {}
    if found and found["varied"]:
        tables = found["tables"]
        low, high = interval(mean_of(tables[..., late] - tables[..., early], 1))
        limits = {int(K): (float(low[j]), float(high[j])) for j, K in enumerate(found["sizes"])}
    best = np.full(len(sizes), np.nan)
    if arrays.optimum:
        exact = cell_means(arrays.optimum.xe, cell_weights(arrays.optimum, sizes))
        best = mean_of(exact[..., late] - exact[..., early], 0)
    rows = []
    for j, K in enumerate(sizes):
        runs = group.by_k[int(K)]
        low, high = limits.get(int(K), (None, None))
        rows.append(
            {
                "K": int(K),
                "runs": len(runs),
                "icl_score": number(scores[j]),
                "icl_score_low": low,
                "icl_score_high": high,
                "optimum_icl_score": number(best[j]),
                "log_K": float(np.log(K)),
                **information_of(runs),
            }
        )
    return rows


def information_of(runs: list[dict]) -> dict:
    """Information and excess of runs of one K, means over runs; None on real documents.

    Of runs that do not say their information it is that of the predictions, from the curves of the optimum.
    """
    exact = [run for run in runs if "oracle_xe_by_position" in run["groups"]["seen"]]
    if not exact:
        return dict.fromkeys(INFORMATION)
    documents, predictions, excesses = [], [], []
    for run in exact:
        seen = run["groups"]["seen"]
        mixture = np.array(seen["oracle_xe_by_position"])
        told = run.get("information") or {}
        documents.append(told.get("document"))
        predictions.append(told.get("predictions", float((mixture - seen["known_xe_by_position"]).sum())))
        excesses.append(np.array(seen["xe_by_position"]) - mixture)
    excess = np.mean(excesses, 0)  # [T]
    total = float(np.mean(predictions))
    document = None if None in documents else float(np.mean(documents))
    values = (document, total, total + float(excess.sum()), float(excess.mean()), float(excess.max()))
    return dict(zip(INFORMATION, values, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Of all groups together
# ---------------------------------------------------------------------------------------------------------------
def shared_sections(groups: list[Group], results: list[dict], tables: dict, out: Path) -> list[Section]:
    """Curves, the tables by K and by category, the runs."""
    T = min(len(run["groups"]["seen"]["xe_by_position"]) for run in results)
    tokens = tokens_sentence([run for group in groups for run in group.runs])
    drawn = {group.short: group.by_k for group in groups}
    draw_curves(out, drawn, T, tokens)
    short = {group.label: group.short for group in groups}
    categories = tables["xe_by_category"]
    draw_categories(out, [row | {"group": short[row.get("group", "")]} for row in categories])
    plots = out / "plots"
    text = [
        f"{counted(len(results), 'run')}. {tokens} Cross entropies (XE) are in nats, on {split_words(results)} "
        f"documents of the categories trained on; unseen_xe is on the others. icl_gain is {gain_definition(T)}; "
        "total_gain is the sum over positions of XE less that after the last. alpha and xe_inf are of the fit "
        "XE(t) = xe_inf + c t^-alpha, a mean over the runs that have one (column fits): none has where the curve "
        "does not fall or the best exponent is at the bound of the search. What is undefined, such as the "
        "deviation (sd) of a single run, is left empty."
    ]
    if len(groups) > 1:
        named = "; ".join(f"{group.short} is {group.label}" for group in groups)
        text.append(
            "The runs differ in what the column group says: only those of one group are averaged. In the pictures "
            f"{named}."
        )
    spread = "standard deviation over sets and seeds"
    said = f"XE by tokens read, for every K. Bands: {spread}, without the levels that a set's categories have."
    curves = (plots / "xe_by_position.png", said)
    by_category = (plots / "xe_by_category.png", f"XE of each category against K. Bars: {spread}.")
    return [
        Section("By K", text, [tables["xe_by_k"]], [curves]),
        Section("By category", [], [categories], [by_category]),
        Section("Runs", [], [[run_row(result) for result in results]]),
    ]


def split_words(results: list[dict]) -> str:
    """What the final numbers are of."""
    return " or ".join(sorted({result.get("final_split", "validation") for result in results}))
