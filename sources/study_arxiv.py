"""Studies of train_arxiv.py: which sets of categories are trained on, what their runs are called, their controls."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable
from types import ModuleType
from typing import Any
from urllib.parse import quote

from common.errors import DataError
from configurator import note
from sources.digests import fingerprint
from sources.shared import closest
from sources.studies import Variation

STUDIES = """\
studies of XE against K: a run a set of categories, each in a folder below out_dir, then report.html
  --study=all  every subset of the categories; all31: the same, of five
  --study=k=1,2  subsets of these sizes
  --study=nested:1,2,4  sets that grow, in several orders of the categories (--orders=N, by default as many as these)
  --study=NAME,NAME  runs by name, such as K2_restless_sticky
  --controls  beside them each category alone, at its share of the tokens: what less text costs
  --seed=1,2 --jobs=2  for each seed; two at a time. See also python sweep.py --help
  --report=FOLDER  the report again, of runs that there are"""  # for --help
LONGEST_NAME = 200  # of a run, without its seed: a folder's may have 255 bytes
PLAIN = re.compile(r"[\w.+-]+")  # a name that a command line has as it is


def plan(page: ModuleType, cfg: Any, words: Any) -> list[Variation]:
    """The runs of a study of XE against K, then their controls.

    Args:
        page: train_arxiv.py, or a copy of it. cfg: its Config, of what all runs have in common.
        words: settings of the sweep: study (see plan_study), orders (see nested_sets) and controls (see plan_controls).
    Raises DataError for a study that cannot be of these data.
    """
    train, validation = page.open_data(cfg)
    names = page.active_categories(train, validation, cfg)
    page.final_chunks(cfg, train, validation)  # damaged test data would fail every run, at its start
    sets = plan_study(words.study, names, words.orders)
    controls = plan_controls(sets, names, train, cfg) if words.controls else []
    runs = []
    for subset in sets:
        # A share that a category has not is found here, not after half of the study.
        page.training_rows(train, subset, cfg)
        values = {"K": str(len(subset)), "categories": ", ".join(subset)}
        if controls:
            values["control_of"] = ""  # all runs have the same columns
        runs.append(Variation(run_name(subset), {"categories": typed(subset)}, values))
    # A study that goes on is one on the same data, which the settings only name.
    data = {cfg.data: train.fingerprint + validation.fingerprint}
    return [run._replace(data=data) for run in runs + controls]


def plan_controls(sets: list[list[str]], names: list[str], train: Any, cfg: Any) -> list[Variation]:
    """For each K > 1 and each category in a set of that size: the category alone, at its share of the budget.

    It is trained on the same chunks as among the K, for as many epochs: beside the category at the whole budget it
    tells what less data cost, beside the category among the K what the company costs.

    Args:
        train: training chunks, with budget and size. cfg: the page's Config.
    Raises DataError where shares are not equal, or steps do not follow from epochs.
    """
    if cfg.budget == "proportional":
        raise DataError("controls = true: a control is of an equal share, which budget=proportional has not: leave one "
                        "of them out")
    if cfg.max_steps:
        raise DataError(f"controls = true: a control is of as many epochs, and max_steps = {cfg.max_steps} would give "
                        "it more: set epochs in its place")
    budget = train.budget if cfg.budget_tokens is None else cfg.budget_tokens // train.size
    runs = []
    for K in sorted({len(subset) for subset in sets} - {1}):
        inside = set(itertools.chain(*(subset for subset in sets if len(subset) == K)))
        for name in names:
            if name not in inside:
                continue
            settings = {
                "categories": typed([name]),
                "budget": "tokens",
                "budget_tokens": str(budget // K * train.size),
                "control_of": str(K),
            }
            values = {"K": "1", "categories": name, "control_of": str(K)}
            runs.append(Variation(shortened(f"control{K}_{escaped(name)}"), settings, values))
    if not runs:
        raise DataError("controls = true: they are of runs on several categories, and this study has none")
    steps = math.ceil(cfg.epochs * (budget // K) / cfg.batch_size)  # of those of the largest K
    if steps < 2 * cfg.warmup_steps:
        warmup = min(steps, cfg.warmup_steps)
        note(f"a control of K = {K} has {steps} steps, the first {warmup} of which warm up: it loses by too short a "
             "training more than by too little text; use more epochs or fewer warmup_steps")
    return runs


def typed(names: list[str]) -> str:
    """Names as a command line has them."""
    plain = all(PLAIN.fullmatch(name) for name in names) and names[0].lower() not in ("none", "null")
    return ",".join(names) if plain else repr(names)


# ---------------------------------------------------------------------------------------------------------------
# Names of runs
# ---------------------------------------------------------------------------------------------------------------
def run_name(categories: list[str], seed: int | None = None) -> str:
    """K3_cs.DS_cs.IT_cs.PL_seed7 for ["cs.PL", "cs.DS", "cs.IT"] and 7; without seed, what a study calls the set.

    "_" and what a folder cannot have are percent escapes in a category: no two sets of categories have one name. A name
    too long for a folder ends with a digest.
    """
    names = [escaped(category) for category in sorted(categories)]
    name = shortened("_".join([f"K{len(names)}", *names]))
    return name if seed is None else f"{name}_seed{seed}"


def escaped(category: str) -> str:
    """A category as part of a folder's name."""
    return quote(category, safe="").replace("_", "%5F")


def shortened(name: str) -> str:
    """The name; one too long for a folder ends with a digest of all of it."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 17]}-{fingerprint(name)}"


def older_name(categories: list[str]) -> str:
    """K3_csDS_csIT_csPL: what a study called the set before, which several sets may share."""
    names = sorted(category.replace(".", "") for category in categories)
    return "_".join([f"K{len(names)}", *names])


# ---------------------------------------------------------------------------------------------------------------
# Sets of categories
# ---------------------------------------------------------------------------------------------------------------
def plan_study(study: str, names: list[str], orders: int | None = None) -> list[list[str]]:
    """The sets of categories that a study trains on, the categories of each in the order of names.

    all31 (or all): every non-empty subset; k=1,2: all of these sizes; nested:1,2,4: the first 1, 2, 4 of several orders
    of the names; else run names. Raises DataError for anything else.
    """
    if study == "all31" and len(names) != 5:
        raise DataError(
            f"study=all31 is about five categories, but there are {len(names)}: use study=all, or choose "
            "five with categories=a,b,c,d,e"
        )
    if orders and not study.startswith("nested:"):
        raise DataError(f"orders = {orders} is of nested sets, as of --study=nested:1,2,4, not of study={study}")
    sizes = re.fullmatch(r"(k=|nested:)(\d+(?:,\d+)*)", study)
    if not sizes:
        every = subsets(names, range(1, len(names) + 1))
        return every if study in ("all", "all31") else named_runs(study, every, names)
    kind, numbers = sizes.groups()
    wanted = [int(K) for K in numbers.split(",")]
    for K in wanted:
        if not 1 <= K <= len(names):
            raise DataError(f"study={study}: {K} is not between 1 and the {len(names)} categories")
    wanted = list(dict.fromkeys(wanted))  # a size named twice is one
    if kind == "nested:":
        return nested_sets(wanted, names, orders)
    return subsets(names, wanted)


def nested_sets(sizes: list[int], names: list[str], orders: int | None = None) -> list[list[str]]:
    """The first K of several orders of the N names, for each size K; a set that several orders have comes once.

    The orders are rotations of the names, by default all N: each name is then in K of the N sets of size K, and the
    average over sets has the same composition whatever K (a cyclic design). Fewer are evenly spaced; where their sets
    of a size hold some names more often than others a note says so. Raises DataError for more than N.
    """
    N = len(names)
    orders = N if orders is None else orders
    if orders > N:
        raise DataError(f"orders = {orders}: {N} categories have {N} orders, each beginning with another")
    sets = []
    uneven = []
    for K in sizes:
        of_size = []
        for number in range(orders):
            first = number * N // orders
            inside = {names[place % N] for place in range(first, first + K)}
            subset = [name for name in names if name in inside]
            if subset not in of_size:
                of_size.append(subset)
        times = Counter(itertools.chain(*of_size))
        if len({times[name] for name in names}) > 1:
            uneven.append(str(K))
        sets += [subset for subset in of_size if subset not in sets]
    if uneven:
        note(f"orders = {orders} of {N}: the sets of K = {', '.join(uneven)} do not hold every category equally often, "
             f"so that K is not all that differs between sizes; --orders={N}, the default, has each as often")
    return sets


def subsets(names: list[str], sizes: Iterable[int]) -> list[list[str]]:
    """All subsets of these sizes, in that order."""
    sets = []
    for K in sizes:
        for subset in itertools.combinations(names, K):
            sets.append(list(subset))
    return sets


def named_runs(study: str, every: list[list[str]], names: list[str]) -> list[list[str]]:
    """The sets that are called by their names, K1_a,K2_a_b, or by their older ones.

    Raises DataError for a name that no set has, and for an older one that several have.
    """
    known = {}  # sets by name
    for subset in every:
        known.setdefault(older_name(subset), []).append(subset)
    for subset in every:
        known[run_name(subset)] = [subset]
    sets = []
    for name in study.split(","):
        size, *categories = name.split("_")
        ordered = "_".join([size, *sorted(categories)])
        meant = known.get(name) or known.get(ordered)
        if meant is None:
            hint = closest(name, known) or "."
            raise DataError(
                f"study={study}: no run is called {name!r}{hint} Use all, all31, k=1,2, nested:1,2,4, or "
                f"names like {run_name(names[:2])}"
            )
        if len(meant) > 1:
            choices = " or ".join(run_name(subset) for subset in meant)
            raise DataError(f"study={study}: {name} is not one set of categories: write {choices}")
        if meant[0] not in sets:
            sets += meant
    return sets
