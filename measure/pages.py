"""Pages of results: one self-contained html file of text, tables to sort and pictures, for a run, a sweep, a study."""

import base64
import filecmp
import json
import numbers
import os
import platform
import shlex
import struct
import sys
import typing
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.errors import DataError, reason, regular_file, replacing, system_sentence
from common.runlog import places, read_json
from common.telling import note
from configurator import Text, config_dict, convert, described_fields
from measure import figures
from measure.forced import plan_rows
from measure.glossary import caption, meaning
from sources.outcomes import is_number
from sources.shared import from_here

PNG = b"\x89PNG\r\n\x1a\n"
DOTS_PER_PIXEL = 1.5  # our pictures have 150 dots an inch; at 100 their letters are as large as the page's
LONG_CELL = 30  # signs
MOST_COLUMNS = 10  # of a table whose few rows need not stand on their side
LONGEST_LINE = 78  # signs of a line of a command

# What the page of a run shows first of its summary.json; the rest is folded away. In words: measure/glossary.py.
HEADLINES = {
    "ghmm": ("loss", "optimal_loss", "excess_loss", "r2_concat", "untrained_r2_concat"),
    "arxiv": ("test_xe", "val_xe", "perplexity", "icl_gain", "oracle_icl_gain", "icl_score", "largest_relative_excess",
              "K"),
    "apelr": ("val_nll", "val_ppl", "oracle_nll", "plan_gain", "planner_mask_delta_loss", "plan_nmi", "baseline_nll",
              "parameters"),
    "state": ("pearson_delta", "mae", "discrimination", "overlap_at_50", "energy_distance", "val_loss", "conditions"),
}  # fmt: skip
FIRST_FIGURES = 8  # of an experiment of the user's own


# ---------------------------------------------------------------------------------------------------------------
# A page
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class Section:
    """A part of a page: its paragraphs, commands, pictures and tables, in this order.

    text: paragraphs, plain. tables: lists of rows; the keys of the first row head the columns; None is blank. pictures:
    (PNG file, caption). commands: lines for a terminal. title: may be "". folded: shown when its title is clicked.
    """

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[list[dict]] = field(default_factory=list)
    pictures: list[tuple[Path, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    folded: bool = False


class Cell(NamedTuple):
    """Of a table: as it is shown, what it is sorted by, and whether it is a number. What is long has several lines."""

    text: str
    value: str
    is_number: bool

    @property
    def style(self) -> str:
        if self.is_number:
            return "number"
        return "long" if len(self.text) > LONG_CELL else ""


def write_page(path: Path, title: str, lead: str, sections: list[Section], experiment: str = "") -> None:
    """One html file with everything inside: complete, or not there. lead: what the page comes to, in a sentence.

    experiment: whose figures the columns of tables are; the page ends with a sentence on each. A picture that is not
    there or no PNG is a line that says so. Raises OSError where the file cannot be written.
    """
    parts = [filled(section, experiment) for section in sections]
    columns = [column for part in parts for table in part["tables"] for column in table["columns"]]
    named = {column["name"]: column["meaning"] for column in columns if column["meaning"]}
    if named:
        rows = [{"name": name, "what it is": said} for name, said in sorted(named.items())]
        parts.append(filled(Section("What the columns are", tables=[rows], folded=True)))
    text = template().render(title=title, lead=lead, sections=parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8", errors="replace")  # a file name may be no text


@lru_cache
def template():
    """page.html, beside this file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # slow to import, and only needed here

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html")


def filled(section: Section, experiment: str = "") -> dict:
    """What the template takes of a section."""
    text, pictures = list(section.text), []
    for path, said in section.pictures:
        picture = embedded(path)
        if picture:
            pictures.append(picture | {"caption": said})
        else:
            text.append(f"The picture {path.name} is not there: {said}")
    return {
        "title": section.title,
        "text": text,
        "commands": section.commands,
        "pictures": pictures,
        "tables": [filled_table(rows, experiment) for rows in section.tables if rows and rows[0]],
        "folded": section.folded,
    }


def filled_table(rows: list[dict], experiment: str = "") -> dict:
    """A table as cells, without columns in which nothing is known.

    A column is one of numbers if it has some, and nothing else but blanks. Few long rows stand on their side.
    """
    rows = [{name: cell_of(row.get(name)) for name in rows[0]} for row in rows]
    names = [name for name in rows[0] if any(row[name].text for row in rows)]
    heads = {row[names[0]].text for row in rows} if names else ()
    if len(names) > max(MOST_COLUMNS, 2 * len(rows)) and len(heads) == len(rows):
        rows = turned(rows, names)
        names = list(rows[0])
    columns, cells = [], []
    for name in names:
        column = [row[name] for row in rows]
        known = [cell.is_number for cell in column if cell.text]
        is_number = bool(known) and all(known)
        columns.append({"name": name, "is_number": is_number, "meaning": meaning(name, experiment)})
        cells.append(column)
    return {"columns": columns, "rows": list(zip(*cells, strict=True))}


def turned(rows: list[dict[str, Cell]], names: list[str]) -> list[dict[str, Cell]]:
    """The columns of a table as its rows; the first column, in which no two rows are alike, says what is across."""
    first, *others = names
    return [{first: cell_of(name)} | {f"{first} {row[first].text}": row[name] for row in rows} for name in others]


def cell_of(value: Any) -> Cell:
    """A value in a table; a Cell is as it is. What is undefined (None, nan, infinity) is blank."""
    if isinstance(value, Cell):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and not is_number(value):
        value = None
    if value is None:
        return Cell("", "", False)
    if isinstance(value, bool):
        return Cell(str(value).lower(), str(value).lower(), False)
    if isinstance(value, numbers.Real):  # numpy's too
        return Cell(digits(value), str(value), True)
    return Cell(str(value), str(value), False)


def digits(value: float) -> str:
    """A number to four digits, a large one whole: 0.01235, 12.35, 1,235, 123,457; a whole one as it is to 99,999."""
    if isinstance(value, numbers.Integral) and abs(value) < 100_000:
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def embedded(path: Path) -> dict | None:
    """A PNG file in base64, and the width in pixels at which it is shown; None where there is none."""
    try:
        data = regular_file(path).read_bytes()
    except (OSError, DataError):
        return None
    if not data.startswith(PNG) or len(data) < 24:
        return None
    dots = struct.unpack(">I", data[16:20])[0]  # of the header that every PNG begins with
    return {"base64": base64.b64encode(data).decode(), "width": round(dots / DOTS_PER_PIXEL)}


# ---------------------------------------------------------------------------------------------------------------
# The page of a run
# ---------------------------------------------------------------------------------------------------------------
def run_page(folder: Path, Config: type, result: dict | None = None) -> str:
    """Write report.html into a run folder that has its summary.json; returns where it is. For rank 0 alone.

    Args:
        Config: of the page that made the run, whose defaults tell which settings were chosen.
        result: of a look at a run that is there (folder is then its analysis/): what its summary.json would say.
    A page that cannot be written is a line on stderr: it ends no run.
    """
    page = folder / "report.html"
    try:
        if result is None:
            result = read_json(folder / "summary.json")
        verdict = result.get("verdict", "")
        write_page(page, title_of(folder, Config), verdict, run_sections(folder, Config, result), experiment_of(Config))
    except Exception as error:
        if figures.STRICT:
            raise
        note(f"{page} was not written ({system_sentence(error) or reason(error)})")
    return places(folder)


def script_of(Config: type) -> Path:
    """The file of the page that defines Config."""
    return Path(sys.modules[Config.__module__].__file__)


def title_of(folder: Path, Config: type) -> str:
    if folder.name == "analysis":
        return f"{folder.parent.name}: a look at a run of {script_of(Config).name}"
    return f"{folder.name}: a run of {script_of(Config).name}"


def experiment_of(Config: type) -> str:
    """What the page that defines Config calls its experiment, "" if nothing: a copy of a page keeps it."""
    return getattr(sys.modules[Config.__module__], "EXPERIMENT", "")


def run_sections(folder: Path, Config: type, result: dict) -> list[Section]:
    """The parts of a run's page: figures, pictures, settings and command, machine, and the rest folded away."""
    run = folder.parent if folder.name == "analysis" else folder  # what was trained, and how
    config = None  # of a checkpoint that lies alone
    if (run / "config.json").exists():
        config = read_json(run / "config.json")
    headlines, rest = figures_of(result, experiment_of(Config))
    return [
        Section("", tables=[headlines]),
        Section("", pictures=pictures_of(folder, experiment_of(Config))),
        *plans_section(folder),
        settings_section(run, Config, config),
        Section("Machine and time", tables=[machine(run / script_of(Config).name, result)]),
        Section("All that summary.json says", tables=rest, folded=True),
    ]


def plans_section(folder: Path) -> list[Section]:
    """What planner_eval.json says of each plan; nothing where the run has none, or only an earlier one had."""
    file = folder / "planner_eval.json"
    if not file.exists() or file.stat().st_mtime < begun(folder):
        return []
    return [Section("Plans, one by one", tables=[plan_rows(read_json(file))])]


def begun(folder: Path) -> float:
    """When the run of a folder began, or 0."""
    config = folder / "config.json"
    return config.stat().st_mtime if config.exists() else 0


def figures_of(result: dict, experiment: str) -> tuple[list[dict], list[list[dict]]]:
    """(rows of the main figures, tables of all the others)."""
    known = HEADLINES.get(experiment)
    if known is None:
        known = [name for name, value in result.items() if cell_of(value).is_number][:FIRST_FIGURES]
    headlines, rows, tables = [], [], []
    for name in known:
        if result.get(name) is not None:
            headlines.append({"figure": name, "value": result[name], "what it is": meaning(name, experiment)})
    for name, value in result.items():
        if name in known or name == "verdict":
            continue
        inner = list(value.values()) if isinstance(value, dict) else []
        if inner and all(isinstance(part, dict) for part in inner):
            tables.append([{name: key} | plain_values(part) for key, part in value.items()])
        else:
            for key, part in plain_values({name: value}).items():
                rows.append({"figure": key, "value": part, "what it is": meaning(key, experiment)})
    return headlines, [rows, *tables]


def plain_values(values: dict) -> dict:
    """Values that fit into a cell: those of a dict under dotted names, a list as a text."""
    plain = {}
    for name, value in values.items():
        if isinstance(value, dict):
            plain |= {f"{name}.{key}": part for key, part in plain_values(value).items()}
        elif isinstance(value, list):
            cells = [cell_of(part).text for part in value]
            plain[name] = ", ".join(cells)
            if len(cells) > FIRST_FIGURES:
                plain[name] = f"{len(cells)} values, the first {cells[0]}, the last {cells[-1]}"
        else:
            plain[name] = value
    return plain


def pictures_of(folder: Path, experiment: str) -> list[tuple[Path, str]]:
    """The pictures of a run in the order in which they were drawn; not those of an earlier run in its folder."""
    times = {path: path.stat().st_mtime for path in sorted((folder / "plots").glob("*.png"))}
    pictures = []
    for path in sorted(times, key=times.get):
        if times[path] >= begun(folder):
            pictures.append((path, caption(path.stem, experiment)))
    return pictures


def settings_section(run: Path, Config: type, config: dict | None) -> Section:
    """The settings that are not the default, and the command that trains the same."""
    script = script_of(Config)
    if config is None:
        return Section("Settings", [f"{run} has no config.json: its checkpoint knows the settings."])
    settings = chosen(config, Config)
    untold = [name for name, value in settings.items() if not can_be_typed(value, name, Config)]
    text = [f"All {len(config)} settings have their defaults."]
    if settings:
        text = [f"{len(settings)} of {len(config)} settings are not the default; all are in {run / 'config.json'}."]
    text.append(what_the_command_does(config.get("resume")))
    copy = run / script.name
    if copy.exists() and not filecmp.cmp(copy, script, shallow=False):
        text.append(f"{script.name} was edited since: {copy} is what the run began with.")
    words = [f"--{name}={typed(value)}" for name, value in settings.items()]
    if untold:
        text.append(f"What cannot be typed ({', '.join(untold)}) it takes from the file.")
        words = [str(run / "config.json")]
    defaults = config_dict(Config())
    said = {name: comment for name, group, comment in described_fields(Config)}  # as --help has it
    rows = []
    for name, value in settings.items():
        row = {"setting": name, "value": typed(value), "default": typed(defaults[name]), "what it is": said[name]}
        rows.append(row)
    return Section("Settings", text, tables=[rows], commands=[command_line(from_here(script), words)])


def what_the_command_does(resume: str | None) -> str:
    """In words, by how the run was begun."""
    if resume == "never":
        return "The command repeats the run, and replaces it: with another out_dir both are kept."
    if resume not in ("auto", None):
        return f"The command repeats the run, which goes on from {resume}: with another out_dir both are kept."
    return ("The command repeats the run. As it is, it says again what the run said; with another out_dir, or with "
            "resume=never, which replaces the run, it trains anew.")  # fmt: skip


def chosen(config: dict, Config: type) -> dict:
    """The settings of config.json without which the page would make others: those that are not the default.

    A default may follow from another setting, as a last learning rate does from the first.
    """

    def misses(settings: dict) -> list[str]:
        made = config_dict(Config(**settings))
        return [name for name, value in known.items() if value != made[name]]

    names = config_dict(Config())
    known = {name: value for name, value in config.items() if name in names}  # of another version, maybe
    settings = {}
    while missing := [name for name in misses(settings) if name not in settings]:
        settings |= {name: known[name] for name in missing}
    for name in list(settings):
        others = {other: value for other, value in settings.items() if other != name}
        if misses(others) == misses(settings):
            settings = others
    return {name: value for name, value in known.items() if name in settings}


def typed(value: Any) -> str:
    """A setting as it is typed on a command line."""
    if value is None:
        return "none"
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def can_be_typed(value: Any, name: str, Config: type) -> bool:
    """Whether a command line reads a setting as it is. It would read the text "none" as nothing."""
    try:
        read = convert(Text(typed(value)), typing.get_type_hints(Config, include_extras=True)[name])
    except ValueError:
        return False
    return (list(read) if isinstance(read, tuple) else read) == value


def command_line(script: str, words: list[str]) -> str:
    """A command to paste into a shell, in lines of some length."""
    lines = [shlex.join(["python", script])]
    for word in map(shlex.quote, words):
        if len(lines[-1]) + len(word) < LONGEST_LINE:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


def machine(copy: Path, result: dict) -> list[dict]:
    """Rows of what the run, or the look at it, was made on, and when. copy: of the script, made at step 0."""
    facts = {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": memory(),
        "device": result.get("device"),
        "ranks": os.environ.get("WORLD_SIZE"),
        "system": platform.platform(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    device = str(result.get("device", ""))
    if device.startswith("cuda"):
        facts["device"] = f"{device}, {torch.cuda.get_device_name(device)}"
    if "seconds" in result and copy.exists():
        facts["begun"] = clock(copy.stat().st_mtime)
    facts["ended" if "seconds" in result else "measured"] = clock(datetime.now().timestamp())
    for name, unit in (("seconds", "s"), ("tokens_per_second", "tokens/s"), ("cells_per_second", "cells/s")):
        if result.get(name) is not None:
            facts[name.replace("_", " ")] = f"{digits(float(result[name]))} {unit}"
    return [{"what": name, "value": value} for name, value in facts.items() if value is not None]


def clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def processor() -> str:
    """The model of the processor, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory() -> str | None:
    """The memory of the machine; None where it does not tell."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError, OSError):
        return None
