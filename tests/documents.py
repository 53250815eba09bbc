"""What the README, docs/, docstrings and config files say: their commands, code, links and times."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from commands import ROOT, SCRIPTS

DOORS = ("prepare_data", "sample", "sweep", "bench")
OURS = {f"{name}.py" for name in SCRIPTS + DOORS}
PYTHONS = ("python", "python3", ".venv/bin/python")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
COMMAND = re.compile(rf"(?:(?:{'|'.join(PYTHONS)}|torchrun [^|&`]*?) )?(?:{'|'.join(OURS)})(?: |$)")


def documents() -> list[Path]:
    """In the order in which one reads them."""
    names = ("ghmm", "arxiv", "apelr", "state", "runs", "sweeps", "sources", "speed", "trouble")
    known = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in names)]
    return known + sorted(set((ROOT / "docs").glob("*.md")) - set(known))


class Fence(NamedTuple):
    """A block of code of a document."""

    path: Path
    line: int  # of its first line
    language: str
    text: str
    inner: bool  # of a list: an edit of a page, not a program


def fences(path: Path) -> Iterator[Fence]:
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        indent, language, body = match.groups()
        lines = [line.removeprefix(indent) for line in body.splitlines()]
        yield Fence(path, text[:match.start()].count("\n") + 2, language, "\n".join(lines), bool(indent))


def prose(path: Path) -> str:
    """The document without its blocks of code, on the same lines."""
    text = path.read_text(encoding="utf-8")
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


class Command(NamedTuple):
    text: str
    comment: str  # behind it
    where: str  # file:line
    of_fence: bool = True  # a block of commands, which are typed as they stand; else a word of a sentence or table


def line_of(command: Command) -> int:
    return int(command.where.rpartition(":")[2])


def shell_lines(text: str) -> Iterator[tuple[int, str, str]]:
    """(number, command, comment) of the lines of a block; one that ends with a backslash goes on in the next."""
    number = 0
    for whole in text.replace("\\\n", "\\").splitlines():
        command, _, comment = re.sub(r"\\ *", "", whole).partition(" # ")
        if command.strip() and not command.lstrip().startswith("#"):
            yield number, " ".join(command.split()), comment.strip()
        number += 1 + whole.count("\\")


def commands_of_document(path: Path) -> Iterator[Command]:
    for fence in fences(path):
        if fence.language == "sh":
            for number, text, comment in shell_lines(fence.text):
                yield Command(text, comment, f"{path.name}:{fence.line + number}")
        elif not fence.language:  # what a command prints, below the command
            for number, line in enumerate(fence.text.splitlines()):
                if line.startswith("$ "):
                    yield Command(line.removeprefix("$ "), "", f"{path.name}:{fence.line + number}")
    text = prose(path)
    for match in SPAN.finditer(text):
        words = " ".join(match[1].replace("\\|", "|").split())
        if COMMAND.match(words) and " " in words:
            yield Command(words, "", f"{path.name}:{text[:match.start()].count(chr(10)) + 1}", False)


def commands_of_script(path: Path) -> Iterator[Command]:
    """Of the docstring of a page or a door: what stands four spaces in and begins with a program."""
    for number, line in enumerate(docstring(path).splitlines(), 1):
        if re.match(r"    (python|torchrun|echo|cp) ", line):
            for _, text, comment in shell_lines(line):
                yield Command(text, comment, f"{path.name}:{number}")


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""


def header(path: Path) -> str:
    """The comment at the top of a config file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def commands_of_config(path: Path) -> Iterator[Command]:
    """Of its header: after "Before:" or two spaces in."""
    for number, text, comment in shell_lines(header(path)):
        text = text.removeprefix("Before: ")
        if COMMAND.match(text) or text.startswith(("python ", "torchrun ")):  # also one whose script is not there
            text = re.split(r" (?:Then:|\()", text)[0]
            yield Command(text, comment, f"config/{path.name}:{number + 1}")


def all_commands() -> list[Command]:
    configs = [path for path in sorted((ROOT / "config").iterdir()) if path.is_file()]
    scripts = [ROOT / f"{name}.py" for name in SCRIPTS + DOORS]
    return [
        *(command for path in documents() for command in sorted(commands_of_document(path), key=line_of)),
        *(command for path in configs for command in commands_of_config(path)),
        *(command for path in scripts for command in commands_of_script(path)),
    ]  # fmt: skip


def steps(text: str) -> list[list[str]]:
    """The words of each program of a line, without variables that are set before it."""
    programs = []
    for part in re.split(r" (?:&&|\|) ", text):
        words = shlex.split(part)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        programs.append(words)
    return programs


def script_of(words: list[str]) -> tuple[str, list[str], bool] | None:
    """(the page or door, its words, whether torchrun starts it) of a program; None of another one."""
    if words[0] in PYTHONS:
        words = words[1:]
    ranks = words[0] == "torchrun"
    for number, word in enumerate(words):
        if word in OURS and (ranks or number == 0):
            return word.removesuffix(".py"), words[number + 1 :], ranks
    return None
