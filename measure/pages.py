"""Pages of results: one self-contained html file of text, tables to sort and pictures, for a run, a sweep, a study."""

import base64
import math
import numbers
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PNG = b"\x89PNG\r\n\x1a\n"
DOTS_PER_PIXEL = 1.5  # our pictures have 150 dots an inch; at 100 their letters are as large as the page's


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
    """Of a table: as it is shown, what it is sorted by, and whether it is a number."""

    text: str
    value: str
    is_number: bool


def write_page(path: Path, title: str, lead: str, sections: list[Section]) -> None:
    """One html file with everything inside: complete, or not there. lead: what the page comes to, in a sentence.

    A picture that is not there or no PNG is a line that says so. Raises OSError where the file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # slow to import, and only needed here

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    template = environment.get_template("page.html")
    text = template.render(title=title, lead=lead, sections=[filled(section) for section in sections])
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".saving-{os.getpid()}-{path.name}")
    try:
        fresh.write_text(text, encoding="utf-8", errors="replace")  # a file name may be no text
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def filled(section: Section) -> dict:
    """What the template takes of a section."""
    text, pictures = list(section.text), []
    for path, caption in section.pictures:
        picture = embedded(path)
        if picture:
            pictures.append(picture | {"caption": caption})
        else:
            text.append(f"The picture {path.name} is not there: {caption}")
    return {
        "title": section.title,
        "text": text,
        "commands": section.commands,
        "pictures": pictures,
        "tables": [filled_table(rows) for rows in section.tables if rows],
        "folded": section.folded,
    }


def filled_table(rows: list[dict]) -> dict:
    """A table as cells. A column is one of numbers if it has some, and nothing else but blanks."""
    columns, cells = [], []
    for name in rows[0]:
        column = [cell_of(row.get(name)) for row in rows]
        known = [cell.is_number for cell in column if cell.text]
        columns.append({"name": name, "is_number": bool(known) and all(known)})
        cells.append(column)
    return {"columns": columns, "rows": list(zip(*cells, strict=True))}


def cell_of(value: Any) -> Cell:
    """A value in a table. What is undefined (None, nan, infinity) is blank."""
    if isinstance(value, float) and not math.isfinite(value):
        value = None
    if value is None:
        return Cell("", "", False)
    if isinstance(value, bool):
        return Cell(str(value).lower(), str(value).lower(), False)
    if isinstance(value, numbers.Real):  # numpy's too
        return Cell(digits(value), str(value), True)
    return Cell(str(value), str(value), False)


def digits(value: float) -> str:
    """A number to five digits, a large one in groups of three: 0.012346, 12.346, 1234.6, 123,457."""
    if abs(value) >= 100_000:
        return f"{value:,.0f}"
    return str(value) if isinstance(value, numbers.Integral) else f"{value:.5g}"


def embedded(path: Path) -> dict | None:
    """A PNG file in base64, and the width in pixels at which it is shown; None where there is none."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if not data.startswith(PNG) or len(data) < 24:
        return None
    dots = struct.unpack(">I", data[16:20])[0]  # of the header that every PNG begins with
    return {"base64": base64.b64encode(data).decode(), "width": round(dots / DOTS_PER_PIXEL)}
