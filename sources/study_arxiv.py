"""Studies of train_arxiv.py: which sets of categories are trained on, and what their runs are called."""

import itertools
import re
from collections.abc import Iterable
from urllib.parse import quote

from common.errors import DataError
from sources.digests import fingerprint
from sources.shared import closest

LONGEST_NAME = 200  # of a run, without its seed: a folder's may have 255 bytes


def run_name(categories: list[str], seed: int | None = None) -> str:
    """K3_cs.DS_cs.IT_cs.PL_seed7 for ["cs.PL", "cs.DS", "cs.IT"] and 7; without seed, what a study calls the set.

    "_" and what a folder cannot have are percent escapes in a category: no two sets of categories have one name. A name
    too long for a folder ends with a digest.
    """
    names = []
    for category in sorted(categories):
        names.append(quote(category, safe="").replace("_", "%5F"))
    name = "_".join([f"K{len(names)}", *names])
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 17]}-{fingerprint(name)}"  # of all of it
    return name if seed is None else f"{name}_seed{seed}"


def older_name(categories: list[str]) -> str:
    """K3_csDS_csIT_csPL: what a study called the set before, which several sets may share."""
    names = sorted(category.replace(".", "") for category in categories)
    return "_".join([f"K{len(names)}", *names])


def plan_study(study: str, names: list[str]) -> list[list[str]]:
    """The sets of categories that a study trains on.

    all31 (or all): every non-empty subset; k=1,2: all of these sizes; nested:1,2,4: the first 1, 2, 4; else run names.
    Raises DataError for anything else.
    """
    if study == "all31" and len(names) != 5:
        raise DataError(
            f"study=all31 is about five categories, but there are {len(names)}: use study=all, or choose "
            "five with categories=a,b,c,d,e"
        )
    sizes = re.fullmatch(r"(k=|nested:)(\d+(?:,\d+)*)", study)
    if not sizes:
        every = subsets(names, range(1, len(names) + 1))
        return every if study in ("all", "all31") else named_runs(study, every, names)
    kind, numbers = sizes.groups()
    wanted = [int(K) for K in numbers.split(",")]
    for K in wanted:
        if not 1 <= K <= len(names):
            raise DataError(f"study={study}: {K} is not between 1 and the {len(names)} categories")
    if kind == "nested:":
        return [names[:K] for K in wanted]
    return subsets(names, wanted)


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
        if name not in known:
            hint = closest(name, known) or "."
            raise DataError(
                f"study={study}: no run is called {name!r}{hint} Use all, all31, k=1,2, nested:1,2,4, or "
                f"names like {run_name(names[:2])}"
            )
        if len(known[name]) > 1:
            meant = " or ".join(run_name(subset) for subset in known[name])
            raise DataError(f"study={study}: {name} is not one set of categories: write {meant}")
        sets += known[name]
    return sets
