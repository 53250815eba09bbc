"""A first TOML of an h5ad file: which cells train and which test, with comments that say what to change."""

import re
import shlex
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import DataError, replacing
from common.telling import note
from sources.digests import fingerprint
from sources.h5ad import H5ad
from sources.labels import Labels, check_labels, find_labels
from sources.shared import counted, from_here, quoted
from sources.splits import literal, pattern
from sources.sweeps import safe

FOLDER = Path("data/starters")  # of those that a start writes for itself, where --toml names an h5ad file
SHARE = 5  # one perturbation of so many is held out, where there is one cell type
MOST_NAMED = 40  # cell types or perturbations that a comment lists


# ---------------------------------------------------------------------------------------------------------------
# What is held out
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class Split:
    """A cell type that is held out as a whole, or some perturbations of the only one."""

    cell_type: str
    perturbations: list[str]  # empty: all of them
    cells: int  # perturbed ones that are held out
    left_out: list[str] = field(default_factory=list)  # cell types with perturbed cells and no control cells


def split_of(cells: np.ndarray, cell_types: list[str], perturbations: list[str], control: str) -> Split:
    """What to hold out, of the numbers of cells [types, perturbations].

    Of several types: among those with the most perturbations that another type has too, the middle one by its cells.
    Raises DataError where nothing can be held out.
    """
    is_control = np.array([name == control for name in perturbations])
    controls = cells[:, is_control].sum(1)
    perturbed = np.where(is_control, 0, cells)
    total = perturbed.sum(1)
    usable = (controls > 0) & (total > 0)
    left_out = [cell_types[t] for t in np.flatnonzero((controls == 0) & (total > 0))]
    if not usable.any():
        raise DataError("no cell type has both control cells and perturbed ones")
    if usable.sum() > 1:
        in_several = (perturbed[usable] > 0).sum(0) > 1
        shared = np.where(usable, (perturbed[:, in_several] > 0).sum(1), -1)
        candidates = np.flatnonzero(shared == shared.max())
        by_size = candidates[np.argsort(total[candidates], kind="stable")]
        chosen = by_size[len(by_size) // 2]
        return Split(cell_types[chosen], [], int(total[chosen]), left_out)
    only = int(usable.argmax())
    places = np.flatnonzero(perturbed[only])
    if len(places) < 2:
        raise DataError(
            f"{cell_types[only]} is the only cell type, and {perturbations[places[0]]} its only perturbation, so "
            "nothing can be held out: name a column that parts the cells, such as donors, by --cell_type_key"
        )
    held = places[min(SHARE, len(places)) - 1 :: SHARE]
    names = [perturbations[p] for p in held]
    return Split(cell_types[only], names, int(perturbed[only, held].sum()), left_out)


# ---------------------------------------------------------------------------------------------------------------
# The TOML
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class Starter:
    """The text of a first TOML, what the columns are, and what is held out, in words."""

    text: str
    labels: Labels
    held_out: str
    words: str  # settings of train_state.py beside --toml


def make_starter(path: Path, beside: bool, key: str = "", **given: str | None) -> Starter:
    """The starter of an h5ad file.

    Args:
        beside: the TOML will be in the folder of the file. key: a matrix that must be there, or empty.
        given: fields of Labels that are known; the rest are found.
    Raises DataError for columns that are not there or cannot be told, and where nothing can be held out.
    """
    given = {name: value for name, value in given.items() if value}
    with H5ad(path) as cells:
        columns = {name: given.get(name) for name in ("pert_col", "cell_type_key", "batch_col")}
        control = given.get("control_pert", "") if columns["pert_col"] else ""
        check_labels(cells, columns, control, key)
        labels = find_labels(cells, **given)
        check_found(path, labels, cells.columns)
        has_hvg = cells.place("X_hvg") is not None
    comment = take_replicates(labels) if "cell_type_key" not in given else []
    table, cell_types, perturbations, lost = count_cells(labels)
    try:
        split = split_of(table, cell_types, perturbations, labels.control_pert)
    except DataError as error:
        raise DataError(f"{path}: {error}; its columns are {quoted(labels.read)}") from None
    if split.perturbations:
        where = f"of the only cell type, {split.cell_type}"
        if not labels.cell_type_key:
            rest = [name for name in labels.read if name not in (labels.pert_col, labels.batch_col)]
            hint = f" (is it --cell_type_key= one of {quoted(rest)}?)" if rest else ""
            where = f"of all cells alike, as no column is called as one of cell types{hint}"
        held_out = f"{len(split.perturbations)} of {counted(len(perturbations) - 1, 'perturbation')} {where}"
        unknown = ", of which names alone tell a model nothing: give it --perturbation_features_file"
    else:
        kinds = counted(len(cell_types), "cell type")
        if comment:
            kinds = f"{len(cell_types)} of {labels.cell_type_key}"
        held_out = f"{split.cell_type}, 1 of {kinds}"
        unknown = ""
    held_out += f" ({counted(split.cells, 'perturbed cell')}){unknown}"
    words = labels.words()
    if lost:
        words += " --drop_unlabelled"
    if not has_hvg:
        words += " --embed_key=none --output_space=all"
    others = [name for name in perturbations if name != labels.control_pert]
    lines = toml_lines(path, beside, split, cell_types, others)
    return Starter("\n".join([*comment, *lines]) + "\n", labels, held_out, words)


def check_found(path: Path, labels: Labels, columns: list[str]) -> None:
    """Raises DataError where perturbations or the control cannot be told."""
    if labels.pert_col and labels.control_pert:
        return
    text = f"{path}: no column of obs tells which cells are perturbed by what: say --pert_col=NAME --control_pert=VALUE"
    if labels.pert_col in labels.read:
        values = labels.read[labels.pert_col][1]
        text = (f"{path}: no value of {labels.pert_col} looks like the control: say --pert_col={labels.pert_col} "
                f"--control_pert= one of {quoted(values)}, or another column")
    raise DataError(f"{text}; its columns are {quoted(columns)}")


def take_replicates(labels: Labels) -> list[str]:
    """Where all cells are of one type, let their batches take the place of types; lines that say so.

    A model that knows perturbations by name cannot predict one that it never saw, but one in another batch.
    """
    if not labels.are_of_one_type() or not labels.batch_col:
        return []
    labels.cell_type_key, labels.batch_col = labels.batch_col, ""
    return [f"# All cells are of one type, so {labels.cell_type_key} takes the place of types: one of its values is",
            "# held out, and the question is whether effects are found again there."]


def count_cells(labels: Labels) -> tuple[np.ndarray, list[str], list[str], bool]:
    """(cells [types, perturbations], names of types, of perturbations, whether some cells lack a value)."""
    perts, perturbations = labels.read[labels.pert_col]
    types, cell_types = np.zeros(len(perts), int), ["all"]
    if labels.cell_type_key:
        types, cell_types = labels.read[labels.cell_type_key]
    known = (types >= 0) & (perts >= 0)
    table = np.zeros((len(cell_types), len(perturbations)), int)
    np.add.at(table, (types[known], perts[known]), 1)
    lost = not known.all()
    if labels.batch_col:
        lost |= bool((labels.read[labels.batch_col][0] < 0).any())
    return table, cell_types, perturbations, lost


def toml_lines(path: Path, beside: bool, split: Split, cell_types: list[str], perturbations: list[str]) -> list[str]:
    """The TOML of a split of the cells of one file."""
    name = re.sub(r"\W", "_", path.stem, flags=re.ASCII)  # of the data set: a key of TOML; a dot would end it
    place = pattern([path])  # or why a TOML cannot name it
    file = path.name if beside else place
    held = literal(f"{name}.{split.cell_type}")
    lines = [
        "# Which cells train, and which are held out to test; cell types and perturbations as obs names them.",
        "[datasets]",
        f'{name} = {literal(file)}  # as seen from here; a folder or a pattern ("*.h5ad") takes several files',
        "",
    ]
    if split.left_out:
        # Each type by itself, as a data set under [training] trains with all of its types.
        lines += ["# Left out, for they have no control cells:", *named(split.left_out), "[zeroshot]"]
        trained = [kind for kind in cell_types if kind not in (*split.left_out, split.cell_type)]
        lines += [f'{literal(f"{name}.{kind}")} = "train"' for kind in trained]
    else:
        lines += ["[training]", f'{name} = "train"  # all cells but those named below', ""]
    if split.perturbations:
        return [
            *lines,
            f'[fewshot.{held}]',
            "# Perturbations that are held out, of the only cell type. A model that knows them by name alone cannot",
            "# predict what it never saw: give it vectors, --perturbation_features_file=FILE.npz. There are",
            *named(perturbations),
            f"test = [{', '.join(map(literal, split.perturbations))}]",
        ]
    if not split.left_out:
        lines += ["[zeroshot]"]
    lines += [
        "# What is held out as a whole: only its control cells train. Put another in its place, or add a line:",
        *named(kind for kind in cell_types if kind not in split.left_out),
        f'{held} = "test"',
        "",
    ]
    if len(perturbations) > 1:
        lines += [
            "# To hold out only some perturbations of a type, take its line above away, and these marks:",
            f"# [fewshot.{held}]",
            f"# test = [{', '.join(map(literal, perturbations[:2]))}]",
        ]
    return [*lines, "# What validates is drawn of what trains (--val_fraction=0.1), unless a line above says \"val\"."]


def named(names: Iterable[str]) -> list[str]:
    """Lines of comment that list names."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    joined = [literal(name).replace(" ", "\0") for name in names[:MOST_NAMED]]  # no line breaks within a name
    lines = textwrap.wrap(", ".join(joined) + more, 100, initial_indent="# ", subsequent_indent="# ",
                          break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


# ---------------------------------------------------------------------------------------------------------------
# Written
# ---------------------------------------------------------------------------------------------------------------
def put(path: Path, text: str) -> None:
    """Write a TOML, whole or not at all; left alone where it is as it should be, as a run may read it."""
    try:
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as fresh:
            fresh.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): runs read from it who trains") from error


def write_starter(
    *,
    input: str,
    pert_col: str = "",
    control_pert: str = "",
    cell_type_key: str = "",
    batch_col: str = "",
) -> dict:
    """Write FILE.toml beside FILE.h5ad unless there is one; say what it holds out, and the next command.

    A TOML that is there keeps the command of its first line, as its cell types are of the columns named in it.
    Raises DataError, as of make_starter.
    """
    path = Path(input)
    starter = make_starter(
        path,
        beside=True,
        pert_col=pert_col,
        control_pert=control_pert,
        cell_type_key=cell_type_key,
        batch_col=batch_col,
    )
    toml = path.with_suffix(".toml")
    shown = from_here(toml)
    command = f"python train_state.py --toml={shlex.quote(shown)} {starter.words} --out_dir=out/{safe(path.stem)}"
    if toml.exists():
        print(f"{shown} is there already and stays as it is: remove it for a new one")
        first_line = toml.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        if first_line.startswith(f"# python train_state.py --toml={shlex.quote(shown)} "):
            command = first_line.removeprefix("# ")
    else:
        put(toml, f"# {command}\n#\n{starter.text}")
        print(f"{shown} says which cells train: held out is {starter.held_out}; edit it as you like")
    print(f"next: {command}")
    return {"toml": str(toml), "next": command}


def toml_of(path: str | Path, key: str, **labels: str | None) -> Path:
    """The TOML that --toml means: itself, or for an h5ad file its starter, which is put into FOLDER and said.

    Args:
        key: the matrix that is read. labels: the settings of train_state.py that are fields of Labels.
    """
    path = Path(path)
    if path.suffix not in (".h5ad", ".h5") or not path.is_file():
        return path
    starter = make_starter(path, False, key, **labels)
    toml = FOLDER / f"{safe(path.stem)}-{fingerprint(starter.text)[:12]}.toml"
    put(toml, starter.text)
    note(f"{path} is cells and no TOML: held out is {starter.held_out}; for another split copy {toml}")
    return toml
