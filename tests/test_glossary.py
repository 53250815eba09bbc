"""What figures are, in words: every name that is shown has its sentence, found by the name as it stands in tables."""

import re
from pathlib import Path

import pytest

from measure import pages
from measure.effects import METRICS
from measure.glossary import FIGURES, PICTURES, caption, meaning, table
from measure.plans import USED
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


@pytest.mark.parametrize("experiment", SHOWN)
def test_the_documents_say_the_same(experiment):
    lines = (Path(__file__).parent.parent / "docs" / f"{experiment}.md").read_text().splitlines()
    assert len(table(experiment)) == len(FIGURES[experiment]) > 10
    assert [line for line in table(experiment) if line not in lines] == []


def test_a_plan_is_said_to_be_used_where_the_verdict_says_so():
    assert f"{USED:g} or more" in meaning("plan_gain", "apelr")


def test_every_picture_of_a_run_has_a_caption():
    drawn = set()
    for path in (Path(__file__).parent.parent / "measure").glob("*.py"):
        if path.name not in ("figures.py", "study_pictures.py"):  # a study says on its page what is on them
            drawn |= set(re.findall(r'(?:figure|panels)\(folder, "(\w+)"', path.read_text()))
    assert len(drawn) >= 10 and not drawn - PICTURES.keys()
    assert caption("mse_by_perturbation", "state").startswith(f"mse: {FIGURES['state']['mse']}. A line")
    assert caption("of_my_own", "state") == "Of my own."
