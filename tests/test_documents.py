"""What the README and docs/ say of files, settings and minutes is so; tests/test_readme.py runs their commands."""

import dataclasses
import importlib
import math
import re
from functools import cache
from pathlib import Path

import pytest
from commands import ROOT, SCRIPTS
from documents import (
    COMMAND,
    DOORS,
    SPAN,
    all_commands,
    docstring,
    documents,
    fences,
    header,
    prose,
    shell_lines,
)

from measure.glossary import FIGURES, table

DOCUMENTS = [*documents(), ROOT / "CONTRIBUTING.md"]
CONFIGS = sorted(path for path in (ROOT / "config").iterdir() if path.is_file())


def named(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


# ---------------------------------------------------------------------------------------------------------------
# Files and links
# ---------------------------------------------------------------------------------------------------------------
def anchors(path: Path) -> set[str]:
    """Of the headings of a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)) if not re.match(r"\w+:", target)]


@named(DOCUMENTS)
def test_every_link_and_picture_is_there(path):
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: there is no {link}"
        assert not anchor or anchor in anchors(target), f"{path.name}: {target.name} has no heading #{anchor}"


def test_every_picture_is_shown_somewhere():
    shown = {(path.parent / link.partition("#")[0]).resolve() for path in DOCUMENTS for link in links(path)}
    assert [path.name for path in sorted((ROOT / "assets").iterdir()) if path not in shown] == []


def test_every_config_file_is_named_in_a_document():
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert [path.name for path in CONFIGS if path.name not in text] == []


@named(DOCUMENTS)
def test_every_file_of_ours_that_a_document_names_is_there(path):
    """config/x.py, sources/x.py, tests/test_x.py and the like, in code."""
    text = " ".join(match[1] for match in SPAN.finditer(prose(path)))
    names = re.findall(r"\b((?:config|sources|measure|kernels|common|tests|benchmarks|docs)/[\w/]+\.\w+)", text)
    assert [name for name in names if not (ROOT / name).exists()] == []


THEIR_SCRIPTS = {"main.py", "simplexity/train_model.py", "simplexity/run_experiment.py", "src/main_hydra_app.py",
                 "train_mine.py"}  # of other systems, and the copy of a page  # fmt: skip


@named(documents())
def test_every_script_that_a_sentence_starts_is_there(path):
    spans = " ".join(f"`{match[1]}`" for match in SPAN.finditer(prose(path)))
    names = re.findall(r"`(?:python3?|torchrun)(?: --[^ `]*)* ([\w/]+\.py)", spans)
    assert [name for name in names if name not in THEIR_SCRIPTS and not (ROOT / name).exists()] == []


@named(DOCUMENTS)
def test_a_block_of_commands_is_marked_as_one(path):
    """Else nothing runs them."""
    assert {fence.language for fence in fences(path)} <= {"", "python", "sh", "toml"}
    lines = [line for fence in fences(path) if not fence.language for line in fence.text.splitlines()]
    assert [line for line in lines if COMMAND.match(line)] == []


@named(documents())
def test_nothing_is_left_to_be_filled_in(path):
    assert re.findall(r"@[A-Z_]+@", path.read_text(encoding="utf-8")) == []


# ---------------------------------------------------------------------------------------------------------------
# Code
# ---------------------------------------------------------------------------------------------------------------
EDITS = [(path.stem, fence) for path in documents() for fence in fences(path)
         if fence.inner and fence.language == "python"]  # fmt: skip


def bare(code: str) -> str:
    """Code without comments and blanks."""
    return re.sub(r"  #.*|\s", "", code)


@pytest.mark.parametrize("page, fence", EDITS, ids=[f"{page}:{fence.line}" for page, fence in EDITS])
def test_an_edit_of_a_page_is_one_that_a_test_makes(page, fence):
    """Line by line: tests/test_copy_*.py has it, with more around it."""
    made = bare((ROOT / f"tests/test_copy_{page}.py").read_text(encoding="utf-8"))
    assert [line for line in fence.text.splitlines() if bare(line) not in made] == []


# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------
OTHERS = {
    "sweep.py, which a page asks": {"multirun", "report", "out", "open"},
    "every page and door": {"help", "print_config", "dialect"},
    "torchrun": {"nproc_per_node", "nnodes", "max_restarts", "standalone", "rdzv_backend", "rdzv_endpoint"},
    "bench.py": {"json", "peer", "peer_python", "full", "only", "device", "short"},
    "tests/faults.py": {"jobs", "most", "seed", "only", "kinds", "json", "folder"},
    "pytest": {"durations"},
}
OF_EDITS = {"theta"}  # of the processes that the documents add
# Settings of other systems, which docs/sources.md has in its sentences.
THEIRS = {"config", "checkpoint", "set", "config_name", "cfg", "lookahead_steps", "prompt", "no_async_planner", "k",
          "token_budget", "epochs", "output_dir", "model_dir", "planner_temperature"}  # fmt: skip


@cache
def settings_of(script: str) -> set[str]:
    """The names of the settings that a page or door knows, other spellings and those of its jobs too."""
    module = importlib.import_module(script)
    kinds = [kind for name, kind in vars(module).items() if name.endswith("Config")]
    names = {field.name for kind in kinds if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)}
    return names | {name for name in getattr(module, "ALIASES", {}) if "." not in name}


def known(path: Path) -> set[str]:
    """What may stand in a document: its page's settings, those of the doors, and those of OTHERS."""
    pages = [f"train_{path.stem}"] if f"train_{path.stem}" in SCRIPTS else SCRIPTS
    names = set().union(*OTHERS.values(), *(settings_of(script) for script in (*pages, *DOORS)))
    return names | (THEIRS if path.name == "sources.md" else set()) | OF_EDITS


@named(DOCUMENTS)
def test_every_setting_that_a_document_names_is_one(path):
    ours = prose(path)
    if "| there |" in ours:  # in the first column
        ours = re.sub(r"^\|.*?\|", "|", ours, flags=re.MULTILINE)
    spans = [match[1] for match in SPAN.finditer(ours) if not COMMAND.match(match[1])]
    names = {name for span in spans for name in re.findall(r"(?<!\S)--(?:no-)?([a-zA-Z][\w-]*)", span)}
    names = {name.replace("-", "_") for name in names}
    assert sorted(names - known(path)) == []


@pytest.mark.parametrize("experiment", [name for name in FIGURES if name])
def test_the_document_of_a_page_has_its_glossary(experiment):
    text = (ROOT / f"docs/{experiment}.md").read_text(encoding="utf-8")
    assert [line for line in table(experiment) if line not in text] == []


# ---------------------------------------------------------------------------------------------------------------
# Times
# ---------------------------------------------------------------------------------------------------------------
NUMBERS = {"a": 1, "an": 1, "half a": 0.5, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "ten": 10,
           "some": math.nan, "a few": math.nan, "few": math.nan}  # fmt: skip
UNITS = {"s": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
DURATION = re.compile(rf"(?<![\w.])(\d[\d.,]*|{'|'.join(sorted(NUMBERS, key=len, reverse=True))}) "
                      r"(s|min|h|seconds?|minutes?|hours?)\b", re.IGNORECASE)  # fmt: skip


def durations(text: str) -> list[tuple[str, float]]:
    """(as it stands, seconds) of each time in a text; of "some minutes" nobody knows."""
    found = []
    for match in DURATION.finditer(" ".join(text.split())):
        number = match[1].lower()
        number = NUMBERS[number] if number in NUMBERS else float(number.replace(",", "").rstrip("."))
        found.append((match[0], number * UNITS[match[2].lower().rstrip("s") or "s"]))
    return found


@cache
def times() -> dict[str, float]:
    """{command: seconds} of the one table, First minutes in the README."""
    table = prose(ROOT / "README.md").split("## First minutes", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(python [^`]+)` \| ([^|]+) \|", table, re.MULTILINE)
    return {command: durations(time)[0][1] for command, time in rows}


def agrees(seconds: float, measured: float) -> bool:
    """The table's time, or that rounded up to minutes."""
    return seconds == pytest.approx(measured) or seconds == 60 * math.ceil(measured / 60 - 1e-9)


def wrong(text: str, commands: list[str]) -> list[str]:
    """The times in a text that are of none of these commands."""
    measured = [times()[command] for command in commands if command in times()]
    return [said for said, seconds in durations(text) if not any(agrees(seconds, time) for time in measured)]


def test_the_table_has_the_default_runs():
    assert {f"python {name}.py" for name in SCRIPTS} <= times().keys()
    assert all(0 < seconds < 3600 for seconds in times().values())


@pytest.mark.parametrize("command", [command for command in all_commands() if durations(command.comment)],
                         ids=lambda command: command.where)  # fmt: skip
def test_a_time_behind_a_command_is_that_of_the_table(command):
    assert wrong(command.comment, command.text.split(" && ")) == []


def test_a_time_in_the_docstring_of_a_page_is_that_of_its_default_run():
    for name in SCRIPTS:
        text = re.sub(r"^    .*$", "", docstring(ROOT / f"{name}.py"), flags=re.MULTILINE)
        assert wrong(text, [f"python {name}.py"]) == [], name


@named(CONFIGS)
def test_a_time_in_a_config_file_is_that_of_its_run(path):
    commands = [command for command in times() if path.name in command]
    assert wrong(header(path), commands) == []


@named(documents())
def test_a_time_of_a_default_run_or_before_commands_is_that_of_the_table(path):
    """Of a paragraph that says "the default run", or that a block of commands follows."""
    text = path.read_text(encoding="utf-8")
    found = []
    paragraphs = re.compile(r"((?:^(?![`|\n])[^\n]+\n)+)(?:\n```sh\n(.*?)```)?", re.MULTILINE | re.DOTALL)
    for match in paragraphs.finditer(text):
        paragraph, block = match.groups()
        commands = [command for _, line, _ in shell_lines(block or "") for command in line.split(" && ")]
        commands = [command.removeprefix(".venv/bin/") for command in commands]
        if "default run" in paragraph:
            commands += [f"python train_{path.stem}.py"]
        if commands and not paragraph.startswith("- 20"):  # the lab book
            found += wrong(paragraph, commands)
    assert found == []
