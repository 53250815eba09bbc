"""Leave one cell type out: for each type a TOML of the same cells, of which it is the test and all others train."""

import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

from common.errors import DataError
from sources.digests import fingerprint
from sources.shared import quoted, suggest
from sources.splits import literal, pattern, types_of
from sources.studies import Variation
from sources.sweeps import safe, split_list, unquoted

FOLDER = Path("data/holdouts")  # of the TOMLs, beside data/cells, which they share
LONGEST_NAME = 180  # of a run, without its seed and what else differs: a folder's may have 255 bytes


def plan(page: ModuleType, cfg: Any, words: Any) -> list[Variation]:
    """A run for each cell type that words.holdout names, or for "each" that has perturbed cells.

    What the TOML of cfg holds out is not held out here: all cells that it has in any split train, but those of the
    type; what it leaves out stays out. In its place may be an h5ad file, which is the only data set then. The new TOMLs
    are in FOLDER/NAME-HASH; the hash is that of the paths of the cells and of what is left out, so that the same
    command finds them again.

    Args:
        page: train_state.py or a copy. cfg: its Config.
    Raises DataError for another page, for a type that is not there or has nothing to test, for cells of one type only,
    and what opening the cells does.
    """
    if getattr(page, "EXPERIMENT", "") != "state":
        raise DataError("holdout leaves cell types out, which only train_state.py has: leave it out")
    source = Path(cfg.toml_config_path)
    if source.suffix in (".h5ad", ".h5"):
        if not source.is_file():
            raise DataError(f"there is no file {source}: give an h5ad file, or the TOML of your data")
        whole = write_toml({source.stem.replace(".", "_"): [source]}, source.stem)
        cfg = replace(cfg, toml_config_path=str(whole))
    cells = page.open_data(cfg)
    dotted = [name for name in cells.names if "." in name]
    if dotted:
        raise DataError(f"{source}: of the data set {dotted[0]!r} no type can be named, for its name has a dot: rename "
                        "it")
    variations = []
    for name in chosen_types(cells, source, words.holdout):
        toml = write_toml(files_of(cells), source.stem, name, types_by_dataset(cells))
        variations.append(Variation(folder_name(name), {"toml_config_path": str(toml)}, {"held_out": name}))
    return variations


def chosen_types(cells, source: Path, holdout: str) -> list[str]:
    """The cell types that `holdout` names, separated by commas, or of "each" those with perturbed cells, by name.

    source: of the cells, for errors. Raises DataError.
    """
    used = types_of(cells, ~cells.is_control & (cells.member > 0))
    perturbed = {cells.cell_types[code] for _, code in used}
    if len(perturbed) < 2:
        raise DataError(f"{source} has perturbed cells of {quoted(sorted(perturbed))} alone: without that type nothing "
                        "is left to learn an effect from")
    if holdout == "each":
        return sorted(perturbed)
    names = [holdout] if holdout in cells.cell_types else [unquoted(name) for name in split_list(holdout)]
    for name in names:
        if name not in cells.cell_types:
            hint = suggest(name, cells.cell_types)
            raise DataError(f"holdout: {source} has no cell type {name!r}{hint}; --holdout=each takes all in turn")
        if name not in perturbed:
            raise DataError(f"holdout: {source} has no perturbed cells of {name!r} in any split, so there is nothing "
                            f"to test; it has some of {quoted(sorted(perturbed))}")
        if names.count(name) > 1:
            raise DataError(f"holdout names {name!r} twice: name it once")
    return names


def files_of(cells) -> dict[str, list[Path]]:
    """The files of each data set."""
    datasets = {}
    for name, file in zip(cells.names, cells.files, strict=True):
        datasets.setdefault(name, []).append(Path(file))
    return datasets


def types_by_dataset(cells) -> dict[str, dict[str, bool]]:
    """{data set: {cell type: whether it has cells in any split}}, by the numbers of files and types."""
    used = types_of(cells, cells.member > 0)
    types = {}
    for file, code in sorted(types_of(cells, cells.member >= 0)):
        of_dataset = types.setdefault(cells.names[file], {})
        name = cells.cell_types[code]
        of_dataset[name] = of_dataset.get(name, False) or (file, code) in used
    return types


def folder_name(cell_type: str) -> str:
    """A cell type as a part of a path: "_" and what a folder cannot have are percent escapes, so that no two have one
    name; one that is too long ends with a digest."""
    name = quote(cell_type, safe="").replace("_", "%5F")
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 17]}-{fingerprint(name)}"  # of all of it
    return name


def write_toml(
    datasets: dict[str, list[Path]],
    stem: str,
    cell_type: str | None = None,
    types: dict[str, dict[str, bool]] | None = None,
) -> Path:
    """A TOML of these data sets, all of which train but for the cell type; its path. Raises DataError.

    It is complete or not there, and left alone where it is as it should be: a run may be reading it.

    Args:
        datasets: files by name. stem: what the path begins with. types: of types_by_dataset; default all train.
    """
    sources, training, zeroshot = [], [], []
    for dataset, files in datasets.items():
        sources.append(f"{literal(dataset)} = {literal(pattern(files))}")
        of_dataset = types[dataset] if types else {}
        whole = all(of_dataset.values())
        if whole:
            training.append(f'{literal(dataset)} = "train"')
        else:  # some are left out: those that train are named one by one
            sources.append("# left out: " + ", ".join(literal(name) for name, used in of_dataset.items() if not used))
        for name, used in of_dataset.items():
            key = literal(f"{dataset}.{name}")
            if used and name == cell_type:
                zeroshot.append(f'{key} = "test"')
            elif used and not whole:
                zeroshot.append(f'{key} = "train"')
    title = "# all cells train" if cell_type is None else f"# all cells train but those of {literal(cell_type)}"
    lines = [title, "[datasets]", *sources, "", "[training]", *training, "", "[zeroshot]", *zeroshot]
    text = "\n".join(lines) + "\n"

    name = f"{safe(stem)}-{fingerprint(*sources)[:12]}"
    path = FOLDER / f"{name}.toml"
    if cell_type is not None:
        path = FOLDER / name / f"{folder_name(cell_type)}.toml"
    try:
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".saving-{os.getpid()}.toml")
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): runs read from it who trains") from error
    return path
