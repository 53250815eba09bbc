"""Prompts: what texts and sequences of a trained model begin with; typed, in a file, or from standard input."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError, regular_file
from common.telling import doing, note
from sources.plain_json import in_words, once
from sources.tokenizer import Tokenizer

WHOLE_FILE = "FILE:"  # before the name of a file that is one prompt, as nanoGPT has it


class Prompt(NamedTuple):
    text: str  # as it was given; "" where none was
    ids: list[int]
    place: str  # what it is called in messages


def written_prompts(prompt: str, prompts: str, reads_pipe: bool = False) -> list[tuple[str, str | list]]:
    """(place, text or list of token ids) of every prompt, in order; none where nothing was given.

    Args:
        prompt: one, or FILE:NAME. prompts: the name of a file of several, or - for standard input.
        reads_pipe: take the lines of standard input where that is a pipe or file and there is no prompt.
    Raises InputError.
    """
    if prompts:
        return prompts_in(prompts)
    if prompt.startswith(WHOLE_FILE):
        name = prompt.removeprefix(WHOLE_FILE)
        return [(name, text_of(name).removesuffix("\n").removesuffix("\r"))]
    if prompt.strip():
        return [("prompt", prompt)]
    if reads_pipe and sys.stdin is not None and not sys.stdin.isatty():
        return lines_of(text_of("-"), "standard input")
    return []


def prompts_in(name: str) -> list[tuple[str, str | list]]:
    """Those of a file, a line each: of .jsonl {"prompt": text or [token ids]}, else a line as it is; empty ones none.
    """
    text = text_of(name)
    if name == "-":
        name = "standard input"
    found = lines_of(text, name)
    if not found:
        raise InputError(f"{name} has no prompt: write one on a line")
    if Path(name).suffix == ".jsonl":
        return [(place, prompt_of(line, place)) for place, line in found]
    return found


def text_of(name: str) -> str:
    """What a file holds, or for - standard input."""
    if name == "-":
        with doing("reading prompts from standard input, to its end (of --prompt=TEXT none is read)"):
            return sys.stdin.read()
    content = regular_file(name, InputError).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}, line {line}: no UTF-8: save it as UTF-8") from error


def lines_of(text: str, name: str) -> list[tuple[str, str]]:
    """(place, line) of the lines that have something on them."""
    lines = text.removeprefix("\ufeff").split("\n")
    return [(f"{name}, line {i}", line.removesuffix("\r")) for i, line in enumerate(lines, 1) if line.strip()]


def prompt_of(line: str, place: str) -> str | list:
    """What a line of .jsonl holds."""
    try:
        entry = json.loads(line, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: no JSON ({in_words(error)}): write {{\"prompt\": \"...\"}}") from error
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str | list) or not prompt:
        raise InputError(f"{place}: no prompt in it: write {{\"prompt\": \"...\"}}, a text or a list of token ids")
    return prompt


def read_prompt(written: str | list, place: str, tokenizer: Tokenizer | None, vocab_size: int) -> Prompt:
    """A prompt as token ids: of a text by the tokenizer; without one they are written themselves, as 0,1,2 or 0 1 2.

    Raises InputError for what are no ids of the vocabulary. Characters that the tokenizer does not know are noted.
    """
    if isinstance(written, str) and tokenizer:
        ids = tokenizer.encode(written)
        unknown = tokenizer.special.get("unk")
        if unknown in ids:
            strange = sorted({c for c in written if unknown in tokenizer.encode(c)})
            note(f"{place}: the tokenizer does not know {' '.join(map(repr, strange)) or 'some of it'}, and the model "
                 "reads <unk> instead")
        return Prompt(written, ids, place)
    parts = written if isinstance(written, list) else written.replace(",", " ").split()
    ids = []
    for part in parts:
        digits = str(part)  # of JSON it may be a number, also one that is no id, or anything
        is_id = digits.isdecimal() and digits.isascii() and len(digits) < 19 and int(digits) < vocab_size
        if not is_id:
            is_number = digits.lstrip("-").isdecimal()
            why = "" if tokenizer or is_number or isinstance(written, list) else ", as this run has no tokenizer"
            raise InputError(f"{place}: {part!r:.60} is no token id: expected those from 0 to {vocab_size - 1}, "
                             f"like 0,1{why}")
        ids.append(int(digits))
    text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
    return Prompt(text, ids, place)
