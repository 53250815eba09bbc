"""What sample.py prints, in the columns of a console: texts wrapped at words, numbers under their tokens, plans under
their text."""

import shutil
import textwrap
import unicodedata
from collections.abc import Sequence

MOST_COLUMNS = 100  # longer lines read badly; also what is assumed where there is no console
MOST_NUMBERED = 1_000  # tokens of a sample that get numbers under them: who wants more reads them from a file
INDENT = "  "
FILLER = "\ufdd0"  # while lines are cut: the second column of a wide letter, a mark of no width; no text has it
MARKS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of plans
UNSURE = "."  # where no plan has half of the belief
OF_STRIP = (
    f"Under the text: the likeliest plan before each token, {UNSURE} where none has half of the belief; | begins a "
    "chunk, \u21b5 ends a line. Of each plan: its share of the belief over what was written, and tokens that it "
    "predicts more than the plans do on average."
)


def console_columns() -> int:
    """Characters a line."""
    width = shutil.get_terminal_size((MOST_COLUMNS, 24)).columns
    return max(40, min(MOST_COLUMNS, width))


def columns_of(text: str) -> int:
    """The width of a text in a console: letters of Chinese and its like are as wide as two, accents have none."""
    width = 0
    for letter in text:
        if unicodedata.category(letter) not in ("Mn", "Me"):
            width += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
    return width


def filled_up(text: str) -> str:
    """A text with a FILLER behind each letter that is as wide as two, so that its length is its width."""
    return text if text.isascii() else "".join(letter + FILLER * (columns_of(letter) - 1) for letter in text)


def fill(text: str, width: int, first: str, rest: str) -> list[str]:
    """The lines of a text, broken at words where it has them; first, rest: what stands before the first and others."""
    text = filled_up(text)
    width -= FILLER in text  # a line may end in the middle of a letter
    lines = textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return [line.replace(FILLER, "") for line in lines]


def harmless(text: str) -> str:
    """A text without what a console would obey: dots for control characters, spaces for tabs; line ends stay."""
    text = text.replace("\t", "    ")
    return "".join(c if c.isprintable() or c == "\n" else "\u00b7" for c in text)


def on_one_line(text: str) -> str:
    return harmless(text).replace("\n", "\u21b5")


def wrapped(text: str) -> str:
    """A text indented, its own line ends kept and longer lines broken at words."""
    lines = []
    for line in harmless(text).split("\n"):
        lines += fill(line, console_columns(), INDENT, INDENT) or [""]
    return "\n".join(lines)


def sentence(text: str) -> str:
    """A line of our own, broken at words; what goes on is indented."""
    width = console_columns()
    return textwrap.fill(text, width, subsequent_indent=INDENT, break_on_hyphens=False, break_long_words=False)


def title(kind: str, number: int, count: int, prompt: str, *figures: str) -> str:
    """The line above a sample: "sample 1 of 4, after 'Once upon a time': 2.31 nats a token"."""
    told = f"{kind} {number} of {count}" if count > 1 else kind
    if prompt:
        shown = repr(on_one_line(prompt))
        told += f", after {shown}" if len(shown) <= 60 else f", after {shown[:40]} ... {shown[-15:]}"
    return sentence(": ".join([told, ", ".join(figures)]) if figures else told + ":")


def beneath(rows: dict[str, Sequence[str]]) -> str:
    """Rows of cells {label: cells} in columns of equal width, in blocks of lines that fit the console.

    Of more than MOST_NUMBERED columns the first are shown, and a line says so.
    """
    label = max(map(len, rows))
    count = len(next(iter(rows.values())))
    shown = min(count, MOST_NUMBERED)
    widths = [max(map(len, cells)) for cells in zip(*(row[:shown] for row in rows.values()), strict=True)]
    room = console_columns() - len(INDENT) - label
    blocks = []
    begin = 0
    while begin < shown:
        end = begin
        used = 0
        while end < shown and (end == begin or used + 1 + widths[end] <= room):
            used += 1 + widths[end]
            end += 1
        lines = []
        for name, row in rows.items():
            cells = [f" {cell:>{width}}" for cell, width in zip(row[begin:end], widths[begin:end], strict=True)]
            lines.append(f"{INDENT}{name:<{label}}{''.join(cells)}".rstrip())
        blocks.append("\n".join(lines))
        begin = end
    if shown < count:
        blocks.append(f"{INDENT}... and {count - shown:,} more, which --json=FILE writes all")
    between = "\n\n" if len(rows) > 1 and len(blocks) > 1 else "\n"
    return between.join(blocks)


def likeliest_plans(beliefs: Sequence[Sequence[float]]) -> str:
    """A mark of the likeliest plan for each belief [n, K], UNSURE where none has half of it."""
    marks = ""
    for belief in beliefs:
        most = max(belief)
        marks += mark(belief.index(most)) if most >= 0.5 else UNSURE
    return marks


def mark(plan: int) -> str:
    return MARKS[plan] if plan < len(MARKS) else "+"


def strip(words: Sequence[str], marks: str, begins: Sequence[int]) -> str:
    """A text on lines of the console, and under each token its mark for as long as the token is; | at `begins`."""
    text = ""
    under = ""
    begins = set(begins)
    for t, (word, sign) in enumerate(zip(words, marks, strict=True)):
        if t in begins:
            text += "|"
            under += "|"
        word = on_one_line(word) or "\u00b7"
        text += filled_up(word)
        for letter in word:
            under += sign * columns_of(letter) or FILLER  # under an accent stands nothing
    room = console_columns() - len(INDENT)
    lines = []
    while text:
        cut = len(text)
        if cut > room:
            cut = text.rfind(" ", 1, room) + 1 or room  # after a word, where there is one
            cut -= text[cut] == FILLER  # not within a letter
        above, below = text[:cut].replace(FILLER, ""), under[:cut].replace(FILLER, "")
        lines += [(INDENT + above).rstrip(), INDENT + below, ""]
        text = text[cut:]
        under = under[cut:]
    return "\n".join(lines[:-1])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], most: int = 20) -> str:
    """Rows under a head, texts of the first column to the left and the others to the right; of more rows the first."""
    shown = [head, *rows[:most]]
    widths = [max(map(len, cells)) for cells in zip(*shown, strict=True)]
    lines = []
    for first, *others in shown:
        cells = [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))]
        lines.append(INDENT + "  ".join(cells).rstrip())
    if len(rows) > most:
        lines.append(f"{INDENT}... and {len(rows) - most:,} more")
    return "\n".join(lines)
