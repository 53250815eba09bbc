"""Which column of obs says what of a cell, found by what columns hold and are called; what is asked for, and is not
there, is answered with what may have been meant."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field

import h5py
import numpy as np

from common.errors import DataError
from sources.h5ad import H5ad
from sources.shared import nearest, quoted

# Letters and digits of names that the field uses, the surest first. A column may also have one of them within its name.
CONTROLS = (
    "nontargeting", "nontargetingcontrol", "control", "ctrl", "ctl", "negativecontrol", "negctrl", "nt", "ntc", "dmso",
    "dmsotf", "vehicle", "unperturbed", "untreated", "unstimulated", "mock", "pbs", "scramble", "scrambled",
    "safetargeting", "sham", "noperturbation", "wildtype", "wt",
)  # fmt: skip
COLUMNS = {
    "pert_col": ("perturbation", "targetgene", "genetarget", "target", "gene", "pert", "condition", "treatment", "drug",
                 "compound", "cytokine", "stimulation", "stim", "knockout", "guideidentity", "guide", "sgrna", "label"),
    "cell_type_key": ("celltype", "celltypes", "cellline", "annotation", "cellontologyclass", "cluster", "louvain",
                      "leiden", "tissue"),
    "batch_col": ("gemgroup", "batch", "plate", "lane", "biorep", "replicate", "rep", "donor", "donorid", "patient",
                  "library", "sample", "sampleid"),
}  # fmt: skip
LABELS = ("pert_col", "control_pert", "cell_type_key", "batch_col")  # settings that say what obs says
LONG = 4  # letters of a name that is sought within others
MOST_VALUES = 20_000  # of a column that tells cells apart by kind: more are names of cells, or measurements


def letters(name: str) -> str:
    """Letters and digits of a name, small."""
    return "".join(sign for sign in str(name).casefold() if sign.isalnum())


def rank_of(name: str, known: tuple[str, ...]) -> int | None:
    """How far from the first of the known names a name stands, first those that are one, then those that hold one."""
    spelled = letters(name)
    if spelled in known:
        return known.index(spelled)
    within = [place for place, each in enumerate(known) if len(each) >= LONG and each in spelled]
    return len(known) + within[0] if within else None


def likely_control(values: list[str]) -> str:
    """The value that most likely names the control; "" where none does."""
    known = [value for value in values if letters(value) in CONTROLS]
    return min(known, key=lambda value: CONTROLS.index(letters(value)), default="")


@dataclass
class Labels:
    """Columns of obs, and the value of pert_col that is the control; "" for what was not found."""

    pert_col: str = ""
    control_pert: str = ""
    cell_type_key: str = ""
    batch_col: str = ""
    read: dict[str, tuple[np.ndarray, list[str]]] = field(default_factory=dict)  # column -> (codes [cells], values)

    def are_of_one_type(self) -> bool:
        """Whether the cells are of one type, as far as a column says."""
        return not self.cell_type_key or len(self.read[self.cell_type_key][1]) == 1

    def words(self) -> str:
        """What a command says of them. An empty batch_col or cell_type_key: all cells are of one."""
        return in_words({name: getattr(self, name) for name in LABELS})


def in_words(settings: dict[str, str]) -> str:
    """Settings as they are typed."""
    return " ".join(f"--{name}={shlex.quote(value) if value else ''}" for name, value in settings.items())


def find_labels(cells: H5ad, **given: str) -> Labels:
    """What the columns of obs are, by what they hold and are called.

    A perturbation is a column that names a control, or is called so. A batch is one only if each has control cells: of
    another, cells would be predicted from none.

    Args:
        given: fields of Labels that are known; empty ones are sought.
    """
    found = Labels(**given)
    for name in columns_of_kinds(cells) + [name for name in given.values() if name in cells.columns]:
        codes, values = cells.column(name, missing=True)
        if 0 < len(values) <= MOST_VALUES:
            found.read[name] = codes, values
    if not found.pert_col:
        several = [name for name, (_, values) in found.read.items() if len(values) > 1]
        naming = [name for name in several if likely_control(found.read[name][1])]
        found.pert_col = best(naming, "pert_col") or (naming or [""])[0] or best(several, "pert_col")
    if found.pert_col in found.read and not found.control_pert:
        found.control_pert = likely_control(found.read[found.pert_col][1])
    others = [name for name in found.read if name != found.pert_col]
    if not found.cell_type_key:
        found.cell_type_key = best(others, "cell_type_key")
    if not found.batch_col:
        several = [name for name in others if name != found.cell_type_key and len(found.read[name][1]) > 1]
        found.batch_col = best([name for name in several if has_controls(found, name)], "batch_col")
    return found


def columns_of_kinds(cells: H5ad) -> list[str]:
    """Columns of obs that hold text or categories, or are called as one that does: a batch may be a number."""
    frame = cells.file["obs"]
    names = []
    for name in cells.columns:
        is_text = False
        if isinstance(frame, h5py.Dataset):  # anndata before 0.7
            is_text = frame.dtype[name].kind in "SO" or f"uns/{name}_categories" in cells.file
        elif isinstance(frame[name], h5py.Group):
            is_text = "codes" in frame[name]
        else:
            is_text = frame[name].dtype.kind in "SO" or "categories" in frame[name].attrs
        if is_text or any(rank_of(name, known) is not None for known in COLUMNS.values()):
            names.append(name)
    return names


def best(names: list[str], role: str) -> str:
    """The column whose name says most clearly that it is a role of COLUMNS; "" where none does."""
    ranks = {name: rank_of(name, COLUMNS[role]) for name in names}
    ranked = [name for name in names if ranks[name] is not None]
    return min(ranked, key=lambda name: ranks[name], default="")


def has_controls(found: Labels, column: str) -> bool:
    """Whether each value of a column has control cells, or it is not known which these are."""
    if not found.control_pert:
        return True
    codes, values = found.read[found.pert_col]
    if found.control_pert not in values:
        return True
    batches = found.read[column][0]
    is_control = codes == values.index(found.control_pert)
    return len(np.setdiff1d(batches[batches >= 0], batches[is_control])) == 0


# ---------------------------------------------------------------------------------------------------------------
# What is asked for and is not there
# ---------------------------------------------------------------------------------------------------------------
def check_labels(
    cells: H5ad,
    columns: dict[str, str | None],
    control_pert: str = "",
    key: str = "",
    spell: Callable[[dict[str, str]], str] = in_words,
) -> None:
    """Raise one DataError for all names that the file does not have, with what may have been meant.

    Args:
        columns: setting -> column of obs, or empty. control_pert: value of the column of pert_col, or empty.
        key: matrix to be read, or empty. spell: how settings are written on the command line.
    """
    there = cells.columns
    wrong = {name: column for name, column in columns.items() if column and column not in there}
    pert_col, values = columns.get("pert_col"), []
    if control_pert and pert_col in there:
        values = cells.column(pert_col, missing=True)[1]
    lacks_control = bool(values) and control_pert not in values
    lacks_matrix = bool(key) and not cells.place(key)
    if not wrong and not lacks_control and not lacks_matrix:
        return

    # What is right is a hint to what is not.
    found = find_labels(cells, **{name: column for name, column in columns.items() if column in there})
    told, settings = [], {}
    for name, column in wrong.items():
        likely = nearest(column, found.read, cutoff=0.8) or getattr(found, name)
        told.append(f"no column {column!r} in obs{guess(likely)}")
        if likely:
            settings[name] = likely
        elif name != "pert_col":
            told[-1] += ", nor one like it (empty: all cells are of one)"
            settings[name] = ""
    if control_pert and "pert_col" in wrong and found.pert_col:
        pert_col, values = found.pert_col, found.read[found.pert_col][1]
        lacks_control = control_pert not in values
    if lacks_control:
        text, settings["control_pert"] = no_control(pert_col, control_pert, values)
        told.append(text)
    if lacks_matrix:
        told.append(cells.no_matrix(key))
    if wrong:
        told.append(f"its columns are {quoted(there)}")
    settings = {name: value for name, value in settings.items() if value or name != "control_pert"}
    if settings:
        told.append(f"try {spell(settings)}")
    raise DataError(f"{cells.path}: {'; '.join(told)}")


def no_control(pert_col: str, control_pert: str, values: list[str]) -> tuple[str, str]:
    """(what is wrong where no cell is of the control, the value that may be meant or "")."""
    likely = likely_control(values) or nearest(control_pert, values, cutoff=0.5) or ""
    told = f"no control cells: none has {pert_col} = {control_pert!r}{guess(likely)}"
    return told + f", but {quoted(values)}", likely


def guess(likely: str) -> str:
    return f" (did you mean {likely!r}?)" if likely else ""
