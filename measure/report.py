"""The report of a study's runs, each on a set of categories: tables, pictures, report.html."""

import base64
import csv
import json
from pathlib import Path

import numpy as np

from common.checkpoint import NO_SETTINGS
from common.errors import DataError
from measure.curves import binned, blank, gain_definition, is_fit, perplexity
from measure.figures import figure
from sources.shared import counted

# Settings that runs of one study may differ in, and those of the measurements after training.
APART = (*NO_SETTINGS, "categories", "seed", "study", "study_seeds", "report", "data", "budget", "budget_tokens",
         "control_of", "final_split", "icl_early", "icl_late", "eval_chunks", "bootstrap", "probe", "precision",
         "wandb_project", "wandb_entity")  # fmt: skip
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


def once(results: list[dict]) -> list[dict]:
    """Each run once: of results that agree in everything but where they lie, the one nearest to the folder."""
    kept = {}
    for result in sorted(results, key=lambda result: result["run"].count("/")):
        key = json.dumps([sorted(result["categories"]), result["seed"], terms_of(result)], sort_keys=True)
        if key in kept:
            print(f"{result['run']} is {kept[key]['run']} again: counted once")
        kept.setdefault(key, result)
    return list(kept.values())


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
# The report
# ---------------------------------------------------------------------------------------------------------------
def make_report(folder: Path) -> list[dict]:
    """XE against K over the runs of a folder: xe_by_k.csv, xe_by_category.csv, plots/, a self-contained report.html.

    Runs of one K are averaged where data, budget and settings are the same; others make groups of their own, which the
    first column then names. Error bars are standard deviations over subsets and seeds. Returns the rows of xe_by_k.csv.
    """
    results = once(read_results(folder))
    T = min(len(result["groups"]["seen"]["xe_by_position"]) for result in results)
    positions = sorted({position for position in (1, 2, 5, 10, 20, 50, T) if position <= T})
    table = []
    categories = []
    by_group = {}  # of groups, of K: their runs
    for group, runs in alike(results).items():
        by_k = {}
        for run in sorted(runs, key=lambda run: run["K"]):
            by_k.setdefault(run["K"], []).append(run)
        by_group[group] = by_k
        named = {"group": group} if group else {}
        for K, runs_of_k in by_k.items():
            table.append(named | row_of(K, runs_of_k, positions))
        for row in category_rows(by_k):
            categories.append(named | row)

    write_csv(folder / "xe_by_k.csv", table)
    write_csv(folder / "xe_by_category.csv", categories)
    tokens = tokens_sentence(results)
    # What groups differ in may be long: in pictures they have numbers.
    short = {}
    for number, group in enumerate(by_group, 1):
        short[group] = f"group {number}" if group else ""
    drawn = {short[group]: by_k for group, by_k in by_group.items()}
    # A folder that is a run itself has pictures of these names.
    place = folder / "report" if (folder / "results.json").exists() else folder
    draw_curves(place, drawn, T, tokens)
    draw_against_k(place, drawn, positions)
    draw_categories(place, [row | {"group": short[row.get("group", "")]} for row in categories])
    rows = [run_row(result) for result in results]
    pictures = place / "plots"
    write_html(folder, pictures, table, categories, rows, groups=short, tokens=tokens, definition=gain_definition(T))
    return table


def read_results(folder: Path) -> list[dict]:
    """results.json of every run below a folder. Raises DataError if there is none or one is damaged."""
    results = []
    for path in sorted(folder.glob("**/results.json")):
        looked_at = path.parent.parent / path.name
        if path.parent.name == "analysis" and looked_at.exists():  # a later look at a run that counts by itself
            continue
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            check_result(result)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged or foreign ({error}): --analyze that run again") from error
        if "settings" not in result:
            result |= older_facts(path.parent)
        result["run"] = path.parent.relative_to(folder).as_posix()
        results.append(result)
    if not results:
        raise DataError(f"{folder} holds no run with a results.json: train some with --study=all --out_dir={folder}")
    return results


def older_facts(folder: Path) -> dict:
    """What config.json and summary.json say of a run whose results.json does not say what it was trained on."""
    facts = {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts["data"] = {"path": config["data"]}
        facts["budget"] = {"kind": config["budget"], "tokens": config["budget_tokens"] or NOT_SAID}
        facts["settings"] = shared_settings(config)
        facts["steps"] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # what there is has been taken
    return facts


def check_result(result: dict) -> None:
    """Raises KeyError or TypeError where a result lacks what the report shows."""
    _ = result["K"] + result["seed"]  # adding fails for what is no number
    for name in ("seen", *result["categories"]):
        group = result["groups"][name]
        losses = group["xe_by_position"][0] + group["xe"]
        _ = losses + group["icl_gain"] + group["total_gain"]
        fit = group["fit"]
        if fit is not None:
            _ = fit["alpha"]["value"] + fit["xe_inf"]["value"] + fit["c"]["value"]


def fit_of(group: dict) -> dict[str, float] | None:
    """The fit of a group of categories; None where there is none, or where that of an older run is at its bound."""
    if group["fit"] is None:
        return None
    values = {name: parameter["value"] for name, parameter in group["fit"].items()}
    T = len(group["xe_by_position"])
    return values if is_fit([values["xe_inf"], values["c"], values["alpha"]], T) else None


def spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None of a single value, which has none."""
    deviation = None
    if len(values) > 1:
        deviation = float(np.std(values, ddof=1))
    return float(np.mean(values)), deviation


def mean_of(values: list[float]) -> float | None:
    """The mean; None of nothing."""
    return float(np.mean(values)) if values else None


def row_of(K: int, runs: list[dict], positions: list[int]) -> dict:
    """A row of xe_by_k.csv: the runs of one K in a group. None where a figure is undefined."""
    seen = [run["groups"]["seen"] for run in runs]
    xe, xe_sd = spread([group["xe"] for group in seen])
    gain, gain_sd = spread([group["icl_gain"] for group in seen])
    fits = [fit for group in seen if (fit := fit_of(group))]
    tokens = mean_of([run["tokens"] for run in runs if "tokens" in run])
    row = {
        "K": K,
        "runs": len(runs),
        "tokens": None if tokens is None else round(tokens),
        "xe": xe,
        "xe_sd": xe_sd,
        "perplexity": perplexity(xe),
        "icl_gain": gain,
        "icl_gain_sd": gain_sd,
        "total_gain": mean_of([group["total_gain"] for group in seen]),
        "fits": len(fits),
        "alpha": mean_of([fit["alpha"] for fit in fits]),
        "xe_inf": mean_of([fit["xe_inf"] for fit in fits]),
    }
    for position in positions:
        row[f"xe_at_{position}"] = mean_of([group["xe_by_position"][position - 1] for group in seen])
    # Real documents have no oracle, and a run on all categories has seen them all.
    oracle = []
    unseen = []
    for run in runs:
        groups = run["groups"]
        if "oracle_xe_by_position" in groups["seen"]:
            oracle.append(np.mean(groups["seen"]["oracle_xe_by_position"]))
        if "unseen" in groups:
            unseen.append(groups["unseen"]["xe"])
    row["oracle_xe"] = mean_of(oracle)
    row["unseen_xe"] = mean_of(unseen)
    return row


def row_key(row: dict) -> int | str:
    """What the mean of a row of xe_by_k.csv is returned by: K, with the group where there are several."""
    return f"{row['group']}: K = {row['K']}" if "group" in row else row["K"]


def row_sentence(row: dict) -> str:
    """A row of xe_by_k.csv for the console."""
    name = row_key(row) if "group" in row else f"K = {row['K']}"
    text = f"{name}: XE {row['xe']:.4f}"
    if row["xe_sd"] is not None:
        text += f" +- {row['xe_sd']:.4f}"
    return f"{text} nats over {run_count([row])}"


def run_count(table: list[dict]) -> str:
    """"1 run", "2 runs": of all rows of xe_by_k.csv."""
    return counted(sum(row["runs"] for row in table), "run")


def category_rows(by_k: dict[int, list[dict]]) -> list[dict]:
    """Rows of xe_by_category.csv: each category in the runs of each K that trained on it."""
    rows = []
    for K, runs in by_k.items():
        values = {}  # XE by category
        for run in runs:
            for category in set(run["categories"]):
                values.setdefault(category, []).append(run["groups"][category]["xe"])
        for category in sorted(values):
            xe, xe_sd = spread(values[category])
            rows.append({
                "K": K,
                "category": category,
                "runs": len(values[category]),
                "xe": xe,
                "xe_sd": xe_sd,
            })
    return rows


def run_row(result: dict) -> dict:
    """A row of the table of runs: the probe's best position in the last layer stands for the probe."""
    seen = result["groups"]["seen"]
    fit = fit_of(seen)
    probe_accuracy = None
    if result.get("probe"):  # not of one component, nor of very few documents
        accuracy = result["probe"]["accuracy"][-1]
        probe_accuracy = max((value for value in accuracy if value is not None), default=None)
    return {
        "run": result["run"],
        "K": result["K"],
        "seed": result["seed"],
        "data": result.get("data", {}).get("path"),
        "steps": result.get("steps"),
        "tokens": result.get("tokens"),
        "xe": seen["xe"],
        "icl_gain": seen["icl_gain"],
        "total_gain": seen["total_gain"],
        "alpha": fit["alpha"] if fit else "no fit",
        "probe_accuracy": probe_accuracy,
    }


def write_csv(path: Path, rows: list[dict]) -> None:
    """A table whose columns are the keys of the first row; empty cells for None."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(rows[0])
        for row in rows:
            table.writerow([blank(value) for value in row.values()])


def write_html(
    folder: Path, place: Path, by_k: list[dict], by_category: list[dict], runs: list[dict], **said
) -> None:
    """report.html by the template of that name beside this file: one file, with the pictures inside.

    Args:
        place: the folder of the pictures.
        said: groups (what each is called in pictures, by what it differs in), tokens and definition (sentences).
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # slow to import, and only needed here

    pictures = {}
    for path in place.glob("*.png"):
        pictures[path.stem] = base64.b64encode(path.read_bytes()).decode()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    page = environment.get_template("report.html")
    text = page.render(by_k=by_k, by_category=by_category, runs=runs, pictures=pictures, **said)
    (folder / "report.html").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------
BARS = {"fmt": "o", "markersize": 4, "capsize": 3}  # of error bars
STYLES = ("-", "--", ":", "-.")  # of groups


def stack(runs: list[dict], key: str, T: int) -> np.ndarray:
    """Curves of the runs that have them, to T positions, [runs, T]."""
    curves = []
    for run in runs:
        seen = run["groups"]["seen"]
        if key in seen:
            curves.append(seen[key][:T])
    return np.array(curves)


def shade(name: str, i: int, count: int, top: float):
    """Colour i of count, in the order of a colour map."""
    from matplotlib import colormaps

    return colormaps[name](top * i / max(1, count - 1))


def bars(deviations: list[float | None]) -> np.ndarray:
    """Error bars; none where there is no deviation."""
    return np.array(deviations, dtype=np.float64)  # nan, which is not drawn, for None


def draw_curves(folder: Path, by_group: dict, T: int, tokens: str) -> None:
    """XE by position for every group and K, beside the exact optimum where it is known."""
    ks = sorted({K for by_k in by_group.values() for K in by_k})
    labelled = False  # the optimum comes once in the legend
    with figure(folder, "xe_by_position", title=f"In-context cross entropy. {tokens}") as axes:
        for g, (group, by_k) in enumerate(by_group.items()):
            for K, runs in by_k.items():
                colour = shade("viridis", ks.index(K), len(ks), 0.9)
                positions, xe = binned(stack(runs, "xe_by_position", T))
                mean = xe.mean(0)
                label = f"{group}: K = {K}" if group else f"K = {K}"
                if len(runs) > 1:
                    label += f" ({len(runs)} runs)"
                    sd = xe.std(0, ddof=1)
                    axes.fill_between(positions, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
                axes.plot(positions, mean, color=colour, linestyle=STYLES[g % 4], label=label)
                oracle = stack(runs, "oracle_xe_by_position", T)
                if len(oracle):
                    _, optimum = binned(oracle)
                    label = None if labelled else "exact optimum"
                    labelled = True
                    axes.plot(positions, optimum.mean(0), color="k", linestyle="--", linewidth=0.8, label=label)
        axes.set_title(f"icl_gain: {gain_definition(T)}", fontsize=8)
        axes.set(xscale="log", xlabel="tokens read", ylabel="cross entropy of the next token (nats)")
        axes.legend(fontsize=8)


def draw_against_k(folder: Path, by_group: dict, positions: list[int]) -> None:
    """XE against K at some positions, a line for each group and position."""
    title = "cross entropy against K (bars: s.d. over subsets and seeds)"
    ks = sorted({K for by_k in by_group.values() for K in by_k})
    with figure(folder, "xe_against_k", title=title) as axes:
        for g, (group, by_k) in enumerate(by_group.items()):
            for i, position in enumerate(positions):
                means = []
                deviations = []
                for runs in by_k.values():
                    curves = [run["groups"]["seen"]["xe_by_position"] for run in runs]
                    mean, sd = spread([curve[position - 1] for curve in curves])
                    means.append(mean)
                    deviations.append(sd)
                colour = shade("plasma", i, len(positions), 0.85)
                label = f"{group}: {position} read" if group else f"{position} read"
                axes.errorbar(
                    list(by_k), means, bars(deviations), color=colour, linestyle=STYLES[g % 4], label=label, **BARS
                )
        axes.set(xlabel="components K", ylabel="cross entropy (nats)", xticks=ks)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="tokens")


def draw_categories(folder: Path, rows: list[dict]) -> None:
    """XE of each category against K in every group, from the rows of xe_by_category.csv."""
    ks = sorted({row["K"] for row in rows})
    lines = {}
    for row in rows:
        lines.setdefault((row.get("group", ""), row["category"]), []).append(row)
    with figure(folder, "xe_by_category", title="cross entropy of each category against K") as axes:
        for (group, category), points in lines.items():
            K = [row["K"] for row in points]
            means = [row["xe"] for row in points]
            deviations = [row["xe_sd"] for row in points]
            label = f"{group}: {category}" if group else category
            axes.errorbar(K, means, bars(deviations), linestyle="-", label=label, **BARS)
        axes.set(xlabel="components K", ylabel="cross entropy (nats)", xticks=ks)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
