"""The control cells of one h5ad file, to predict from, which perturbed cells stand beside them, and names as typed."""

import ast
import json
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from common.errors import DataError
from sources.cell_store import read_rows
from sources.h5ad import H5ad
from sources.labels import check_labels
from sources.shared import counted, nearest, suggest
from sources.survey import align, column_names


@dataclass
class Controls:
    """n control cells of a file."""

    rows: np.ndarray  # in the file, ascending [n]
    cell_type: np.ndarray  # codes [n]
    cell_types: list[str]  # what they mean
    batch: np.ndarray | None  # codes [n], if a batch column was asked for
    batches: list[str]
    perturbed: Counter  # {(cell type, perturbation): cells}, names

    @property
    def perturbations(self) -> list[str]:
        """Those that cells of the file have, but for the control."""
        return sorted({name for _, name in self.perturbed})

    def of_type(self, name: str) -> np.ndarray:
        """Places among the control cells."""
        return np.flatnonzero(self.cell_type == self.cell_types.index(name))


def find_controls(
    file: H5ad,
    cell_type_key: str,
    pert_col: str,
    batch_col: str | None,
    control_pert: str,
    drop_unlabelled: bool = False,
) -> Controls:
    """Raises DataError for a column that is not there, and for a cell type without control cells.

    drop_unlabelled: leave cells without a value in a column out, which else is a DataError.
    """
    asked = {"pert_col": pert_col, "cell_type_key": cell_type_key, "batch_col": batch_col}
    check_labels(file, asked, control_pert, spell=lambda settings: f"--columns='{json.dumps(settings)}'")
    types, cell_types = file.column(cell_type_key, missing=drop_unlabelled)
    perts, perturbations = file.column(pert_col, missing=drop_unlabelled)
    batch, batches = None, []
    if batch_col:
        batch, batches = file.column(batch_col, missing=drop_unlabelled)
    is_known = (types >= 0) & (perts >= 0)  # -1: without a value
    if batch is not None:
        is_known &= batch >= 0
    is_control = is_known & (perts == perturbations.index(control_pert))
    for code, name in enumerate(cell_types):
        of_type = types == code
        if not (is_control & of_type).any():
            raise DataError(f"{file.path}: cell type {name} has no control cells to start from")
    perturbed = Counter()
    kinds = types[is_known].astype(np.int64) * len(perturbations) + perts[is_known]
    for kind, count in zip(*map(np.ndarray.tolist, np.unique(kinds, return_counts=True)), strict=True):
        t, p = divmod(kind, len(perturbations))
        if perturbations[p] != control_pert:
            perturbed[cell_types[t], perturbations[p]] = count
    rows = np.flatnonzero(is_control)
    return Controls(
        rows=rows,
        cell_type=types[rows],
        cell_types=cell_types,
        batch=None if batch is None else batch[rows],
        batches=batches,
        perturbed=perturbed,
    )


def matrix_to_read(file: H5ad, embed_key: str | None, genes: list[str] | None) -> str | None:
    """The matrix of the file that has a model's genes: that of embed_key, or X where X_hvg is missing or has others.

    genes: names of the columns that the model reads, None where its run does not say.
    """
    if embed_key != "X_hvg" or not genes:
        return embed_key
    if "obsm/X_hvg" in file.keys:
        names = column_names(file, embed_key)
        is_named = not isinstance(names, int)
        if is_named and set(genes) <= set(names):
            return embed_key
    elif "X" in file.keys:  # there or nowhere: gene_order says what is missing
        return None
    if "X" in file.keys and set(genes) <= set(file.gene_names):
        return None
    return embed_key


def gene_order(file: H5ad, embed_key: str | None, genes: list[str] | None) -> tuple[list[str], np.ndarray]:
    """(names of the columns that a model reads, where they are in the file); without a list, all as they are.

    Raises DataError for a gene that the file lacks, and for one that either has twice: which is which is not told.
    """
    names, _, _ = align([file.path], [column_names(file, embed_key)], embed_key or "X")
    genes = genes or names
    if genes == names:
        return genes, np.arange(len(names))  # as they are, repeated or not
    places = {name: i for i, name in enumerate(names)}
    in_file = Counter(names)
    in_model = Counter(genes)
    for gene in genes:
        if gene not in places:
            raise DataError(f"{file.path} has no gene {gene!r}, which this model reads{suggest(gene, names)}")
        if in_file[gene] > 1 or in_model[gene] > 1:
            raise DataError(
                f"{file.path}: {counted(in_file[gene], 'gene')} of the name {gene!r}, "
                f"and {in_model[gene]} in the model's data: make the names unique, so that they can be found"
            )
    return genes, np.array([places[gene] for gene in genes])


def control_expression(file: H5ad, controls: Controls, embed_key: str | None, counts: str, order: np.ndarray
                       ) -> np.ndarray:
    """[n, D] float32, checked."""
    return read_rows(file, embed_key, counts, controls.rows, order)


# ---------------------------------------------------------------------------------------------------------------
# Names of perturbations as typed
# ---------------------------------------------------------------------------------------------------------------
def names_in(texts: list[str], known: Collection[str], where: str) -> list[str]:
    """The names that texts hold: a text that is known is a name, whatever is in it; any other a list of them.

    Args:
        texts: such as STAT1, or [('Drug, (R)-x', 5.0, 'uM')]; lists such as a,b or ["a", "b"]. known: all names there
            are. where: who knows them, for the message.
    Raises DataError for a name that is not known.
    """
    names = []
    for text in texts:
        if text in known:
            names.append(text)
            continue
        listed = quoted_names(text) or separated_names(text, known)
        for name in listed:
            if name not in known:
                if nearest(text, known, cutoff=0.9):
                    name = text  # one name, misspelt, and not the pieces between its commas
                raise DataError(
                    f"perturbations = {text}: {name!r} is not known to {where} (quote names that have commas or "
                    f"brackets: --perturbations='[\"NAME\", \"NAME\"]'){suggest(name, known)}"
                )
        names += listed
    return names


def quoted_names(text: str) -> list[str] | None:
    """The names of ["a", "b"] or 'a', 'b', in JSON or Python; None for anything else."""
    for candidate in (text, f"[{text}]"):
        for parse in (json.loads, ast.literal_eval):
            try:
                names = parse(candidate)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return list(names)
    return None


def separated_names(text: str, known: Collection[str]) -> list[str]:
    """The names of a,b or [a, b]; where a name that is known has commas, it stays whole."""
    if re.fullmatch(r"\[[^\[\]()'\"]*\]", text):
        text = text[1:-1]
    parts = text.split(",")
    names = []
    while parts:
        count = len(parts)  # the longest name first
        while count > 1 and ",".join(parts[:count]).strip() not in known:
            count -= 1
        name = ",".join(parts[:count]).strip()
        if name:
            names.append(name)
        parts = parts[count:]
    return names
