"""What figures are, in words: every name that is shown has its sentence, found by the name as it stands in tables."""

import re

import pytest

from measure import pages
from measure.effects import METRICS
from measure.glossary import FIGURES, meaning, table
from measure.report import INFORMATION, PARTS
from measure.sweeps import OBJECTIVES

SHOWN = {experiment: set(names) for experiment, (names, _) in OBJECTIVES.items()}
SHOWN["arxiv"] |= {*PARTS, *INFORMATION, "alpha", "xe_inf", "total_gain", "K"}
SHOWN["state"] |= set(METRICS)


@pytest.mark.parametrize("experiment", SHOWN)
def test_every_figure_that_is_shown_has_a_sentence(experiment):
    for name in SHOWN[experiment] | set(pages.HEADLINES[experiment]):
        assert meaning(name, experiment), name


@pytest.mark.parametrize(("name", "experiment", "said"), [
    ("xe_sd", "arxiv", "standard deviation over seeds (and sets) of xe"),
    ("growth_se", "arxiv", "standard error of growth"),
    ("overlap_at_100", "state", "share of the 100 genes that change most which are among the 100 predicted to"),
    ("steps", "apelr", FIGURES[""]["steps"]),
    ("lr", "ghmm", ""),  # a setting says what it is in --help
    ("plan_gain", "ghmm", ""),  # of another experiment
])  # fmt: skip
def test_a_name_is_found_as_it_stands_in_tables(name, experiment, said):
    assert meaning(name, experiment) == said
    nested = meaning("baselines.perturbation_mean.mae", "state")
    assert nested == f"mae of perturbation_mean: {FIGURES['state']['mae']}"


def test_sentences_are_plain_and_short():
    for figures in FIGURES.values():
        for name, said in figures.items():
            assert len(said) < 170 and not said.endswith(".") and "  " not in said, name
            assert not re.search(r"[|<>`]", said), name  # of Markdown and of HTML


def test_the_table_for_the_documents_has_a_line_for_each_figure():
    lines = table("apelr")
    assert len(lines) == len(FIGURES["apelr"])
    assert f"| `plan_nmi` | {FIGURES['apelr']['plan_nmi']} |" in lines
