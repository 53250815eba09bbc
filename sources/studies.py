"""Which runs a question asks for: XE against K, a cell type held out, models of one size. Each has its own file."""

from types import ModuleType
from typing import Any, NamedTuple

from common.errors import DataError


class Variation(NamedTuple):
    """What one run of a study changes.

    name: of the run's folder, as in K2_cs.DS_cs.PL; its seed and what else is listed come behind.
    settings: {setting of the page: value as typed on a command line}, in the place of what was typed for all runs.
    values: {column of the table: value}. data: {what names the data: fingerprint of their content}, where it is known.
    """

    name: str
    settings: dict[str, str]
    values: dict[str, str]
    data: dict[str, str] | None = None


# The page of each word, by its EXPERIMENT.
PAGES = {"study": "arxiv", "orders": "arxiv", "controls": "arxiv", "holdout": "state"}


def variations(page: ModuleType, cfg: Any, words: Any) -> list[Variation]:
    """The runs of the study that was asked for; none where none was.

    Args:
        cfg: the page's Config of what was typed for all runs.
        words: settings of the sweep: study, orders, controls, holdout.
    Raises DataError for a page that has no such study, and for one that cannot be made of these data.
    """
    asked = [name for name in PAGES if getattr(words, name)]
    for name in asked:
        if getattr(page, "EXPERIMENT", "") != PAGES[name]:
            raise DataError(f"--{name} is of the study of train_{PAGES[name]}.py, which {page.__name__}.py has not: "
                            "list values of a setting instead")
    if words.holdout:
        from sources.holdouts import plan
    elif words.study:
        from sources.study_arxiv import plan
    elif asked:
        raise DataError(f"--{asked[0]} is of a study: name it too, as in --study=nested:1,2,4")
    else:
        return []
    return plan(page, cfg, words)


def resized(page: ModuleType, reference: Any, cfgs: list) -> list[dict[str, str]]:
    """For each Config of runs {setting: value as typed} that makes its model as large as that of the reference.

    Raises InputError where there is no such size.
    """
    from sources.equal_size import resize

    return resize(page, reference, cfgs)
