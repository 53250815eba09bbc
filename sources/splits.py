"""The TOML of an experiment on cells: which files it names, and in which splits their cells are, as in cell-load.

    [datasets]                      # a data set: a file, the files of a folder, a glob, {a,b}
    kang = "data/kang.h5ad"
    [training]                      # all its cells train ...
    kang = "train"
    [zeroshot]                      # ... but this cell type, of which a test is all that is seen
    "kang.B cells" = "test"
    [fewshot."kang.NK cells"]       # ... and these perturbations of that one
    val = ["IL2"]
    test = ["IFNB"]

Control cells are never split: those of a cell type serve every split in which the type is. Where cell-load passes over
what is surely a mistake, ours refuses it; strict=False does as cell-load does, and tells.
"""

import glob
import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError, regular_file
from common.telling import note
from sources.shared import counter_rng, suggest

SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = 1, 2, 4  # bit s of a cell for SPLITS[s]: a control cell is in several
BRACES = re.compile(r"\{([^{}]+)\}")
MOST_PATTERNS = 10_000  # that braces may stand for
LONGEST_PATTERN = 20_000  # characters
TABLES = ("datasets", "training", "zeroshot", "fewshot")


def objection(strict: bool, message: str) -> None:
    """What cell-load passes over in silence: refused, or with strict=False told and passed over."""
    if strict:
        raise DataError(message)
    note(message)


# ---------------------------------------------------------------------------------------------------------------
# The TOML
# ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """A TOML as it was read: which files, and who trains. Pairs are (name of a data set, cell type)."""

    path: Path
    datasets: dict[str, list[Path]]  # those that training, zeroshot or fewshot name, in the order of the TOML
    training: set[str]
    zeroshot: dict[tuple[str, str], str]  # -> split
    fewshot: dict[tuple[str, str], dict[str, list[str]]]  # -> {val or test: perturbations}

    @property
    def files(self) -> list[Path]:
        """All files, data set after data set."""
        return [file for files in self.datasets.values() for file in files]

    @property
    def names(self) -> list[str]:
        """The data set of each file."""
        return [name for name, files in self.datasets.items() for _ in files]


def read_toml(path: str | Path, strict: bool = True) -> Plan:
    """Read the TOML of an experiment.

    Raises DataError for what is no such TOML and for a data set without files; if strict, also for anything in it
    that would have no effect (unknown tables, keys and values) and for a perturbation in val and test both.
    """
    path = Path(path)
    if not os.path.exists(path):  # which takes any text
        raise DataError(f"there is no file {path}: give the TOML of your data, or leave --toml out for synthetic cells")
    try:
        return plan_of(path, read_tables(path), strict)
    except RecursionError as error:  # of dotted keys, a hundred levels deep
        raise DataError(f"{path} nests its tables too deeply: it needs two levels at most") from error


def read_tables(path: Path) -> dict:
    """The tables of a TOML as they are. Raises DataError for what is none."""
    try:
        return tomllib.loads(regular_file(path).read_text(encoding="utf-8-sig"))
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as TOML: {error!s:.200}") from error


def plan_of(path: Path, tables: dict, strict: bool) -> Plan:
    """What the tables of a TOML mean, checked as of read_toml."""
    for name, table in tables.items():
        if name not in TABLES:
            objection(strict, f"{path} has a table [{name:.80}], which means nothing{suggest(name[:80], TABLES)}")
        elif not isinstance(table, dict):
            raise DataError(f"{path}: {name} = {table!r:.80} should be a table [{name}]")

    zeroshot = read_pairs(path, tables, "zeroshot", str, 'with "train", "val" or "test"', strict)
    fewshot = read_pairs(path, tables, "fewshot", dict, "with lists val and test", strict)
    trained = set()
    for name, value in tables.get("training", {}).items():
        if value == "train":
            trained.add(name)
        else:
            objection(strict, f'{path}: [training] {name:.80} = {value!r:.80}: only "train" counts')
    check_zeroshot(path, zeroshot)
    check_fewshot(path, fewshot, strict)
    datasets = find_datasets(path, tables, strict)
    return Plan(path, datasets, trained, zeroshot, fewshot)


def read_pairs(
    path: Path,
    tables: dict,
    title: str,
    kind: type,
    what: str,
    strict: bool,
) -> dict:
    """[zeroshot] or [fewshot], its keys "NAME.CELL TYPE" taken apart at the first dot: cell types may have others."""
    pairs = {}
    for key, value in tables.get(title, {}).items():
        name, dot, cell_type = key.partition(".")
        # An unquoted key makes a table of tables, of which the first has no dot in its name.
        if dot and (kind is str or isinstance(value, kind)):
            pairs[name, cell_type] = value
        else:
            objection(strict, f'{path}: [{title}] {key:.80} should be "{name:.80}.CELL TYPE" in quotes, {what}')
    return pairs


def check_zeroshot(path: Path, zeroshot: dict) -> None:
    """Raise DataError for a split that is none."""
    for pair, split in zeroshot.items():
        if split not in SPLITS:
            raise DataError(f'{path}: [zeroshot] "{".".join(pair):.80}" = {split!r:.80} is none of train, val, test')


def check_fewshot(path: Path, fewshot: dict, strict: bool) -> None:
    """Lists of perturbations for val and test, none in both: DataError, or a note where cell-load passes over it."""
    for pair, lists in fewshot.items():
        where = f'{path}: [fewshot."{".".join(pair)}"]'
        for split, names in lists.items():
            if split not in ("val", "test"):
                hint = suggest(split, ("val", "test"))
                objection(strict, f"{where} {split}: only val and test count, the rest trains{hint}")
            elif not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise DataError(f"{where} {split:.80} = {names!r:.80} should be a list of perturbations")
        validates = set(lists.get("val", ()))
        tests = set(lists.get("test", ()))
        both = sorted(validates & tests)
        if both:
            objection(strict, f"{where} has {', '.join(both)} in val and in test: a cell belongs to one")


def find_datasets(path: Path, tables: dict, strict: bool) -> dict[str, list[Path]]:
    """The files of the data sets that [training], [zeroshot] or [fewshot] name; a file in two of them is refused."""
    sources = tables.get("datasets", {})
    used = set(tables.get("training", {}))
    for title in ("zeroshot", "fewshot"):
        used |= {key.partition(".")[0] for key in tables.get(title, {})}
    unknown = sorted(used - set(sources))
    if unknown:
        hint = suggest(unknown[0], sources)
        raise DataError(f"{path} names the data set {unknown[0]!r}, which is none of [datasets]{hint}")

    datasets = {}
    dataset_of = {}  # of each file
    for name, text in sources.items():
        if name not in used:
            continue
        datasets[name] = find_files(path, name, text, strict)
        for file in datasets[name]:
            first = dataset_of.setdefault(os.path.realpath(file), name)
            if first != name:
                objection(
                    strict,
                    f"{path}: {file} is in the data sets {first} and {name}: "
                    "test cells of the one may train in the other",
                )
    if not datasets:
        raise DataError(f"{path} names no cells: it needs [datasets] name = path, and name in [training] or [zeroshot]")
    return datasets


def find_files(toml: Path, name: str, text: str, strict: bool) -> list[Path]:
    """The h5 and h5ad files of a text of [datasets], relative to the TOML: file, files of a folder, glob, {a,b}."""
    if not isinstance(text, str):
        raise DataError(f"{toml}: [datasets] {name:.80} = {text!r:.80} should be a path or a pattern in quotes")
    if "\0" in text:
        raise DataError(f"{toml}: [datasets] {name:.80} = {text!r:.80} holds a NUL character, which no file name has")
    by_stem: dict[str, Path] = {}
    for pattern in expand_braces(pattern_of(toml, text)):
        matches = match_files(pattern)
        if not matches:
            where = f"{toml}: [datasets] {name} = {text!r:.200}"
            objection(strict, f"{where}: there is no h5 or h5ad file at {pattern:.200}")
        for match in matches:
            file = Path(match)
            twin = by_stem.get(file.stem)
            if twin and os.path.realpath(twin) != os.path.realpath(file):
                objection(
                    strict,
                    f"{toml}: data set {name} has two files called {file.stem}: {twin} and {file}; "
                    "cell-load reads the last only, so rename one",
                )
            by_stem[file.stem] = file
    if not by_stem:
        raise DataError(f"{toml}: [datasets] {name} = {text!r:.200} has no file")
    return list(by_stem.values())


def pattern_of(toml: Path, text: str) -> str:
    """A text of [datasets] as a pattern of files: relative to its TOML, or where nothing is there, to the working
    directory, as cell-load has it."""
    here = os.path.expanduser(text)
    beside = os.path.join(toml.parent, here)
    for pattern in (beside, here):
        if any(match_files(part) for part in expand_braces(pattern)):
            return pattern
    return beside


def match_files(pattern: str) -> list[str]:
    """The files of one pattern. Without .h5 or .h5ad it stands for folders, *.h5 before *.h5ad, or else for names."""
    if os.path.isfile(pattern):  # False for a text that is no name
        return [pattern]
    if pattern.endswith((".h5", ".h5ad")):
        return sorted(glob.glob(pattern))
    folder = pattern.rstrip("/")
    inside = sorted(glob.glob(folder + "/*.h5")) + sorted(glob.glob(folder + "/*.h5ad"))
    if inside:
        return inside
    names = {
        *glob.glob(pattern),
        *glob.glob(pattern + ".h5"),
        *glob.glob(pattern + ".h5ad"),
    }
    h5 = sorted(name for name in names if name.endswith(".h5"))
    h5ad = sorted(name for name in names if name.endswith(".h5ad"))
    return h5 + h5ad


def expand_braces(pattern: str) -> list[str]:
    """a{b,c}d -> abd, acd; several groups give every combination, the first one slowest.

    Raises DataError for a pattern that is longer than LONGEST_PATTERN or stands for more than MOST_PATTERNS.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise DataError(f"{pattern:.80}... is longer than {LONGEST_PATTERN:,} characters: use * in it")
    texts = [pattern]
    while any(BRACES.search(text) for text in texts):
        expanded = []
        for text in texts:
            group = BRACES.search(text)
            if not group:
                expanded.append(text)
                continue
            for option in group[1].split(","):
                expanded.append(text[: group.start()] + option.strip() + text[group.end() :])
            if len(expanded) > MOST_PATTERNS:
                raise DataError(f"{pattern:.80} stands for more than {MOST_PATTERNS:,} names: use * in it")
        texts = expanded
    return texts


def pattern(files: list[Path]) -> str:
    """The files of a data set as [datasets] has them, wherever the TOML is. Raises DataError."""
    places = [os.path.abspath(file) for file in files]
    for place in places:
        # Braces stand for several files, which commas part.
        if set("{}") & set(place) or (len(places) > 1 and "," in place):
            raise DataError(f"{place}: [datasets] cannot name a path with braces, or with a comma beside other files: "
                            "rename it")
    return places[0] if len(places) == 1 else "{" + ",".join(places) + "}"


def literal(text: str) -> str:
    """A text in quotes, as TOML has it: JSON's, but that it escapes one sign more."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


# ---------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------
def grouped(rows: np.ndarray, *codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows sorted by these codes, the first one slowest, else as they were; where each group starts, and the end).

    Args:
        rows: numbers of cells [n]. codes: of all cells, [N] each.
    """
    fastest_first = [code[rows] for code in codes[::-1]]  # as lexsort takes them
    order = rows[np.lexsort(fastest_first)]
    change = np.zeros(len(order) + 1, bool)
    change[[0, -1]] = True
    for code in codes:
        sorted_code = code[order]
        change[1:-1] |= sorted_code[1:] != sorted_code[:-1]
    return order, np.flatnonzero(change)


def in_split(member: np.ndarray, split: str) -> np.ndarray:
    """Whether each cell is in a split, bool [N], of its bits."""
    bit = SPLITS.index(split)
    return (member >> bit & 1).astype(bool)


def assign_splits(plan: Plan, cells, strict: bool, zeroshot_controls: bool) -> np.ndarray:
    """The splits of every cell by the TOML, uint8 [N]: bit s for SPLITS[s], none for a cell that is left out.

    cells has file, cell_type, perturbation, is_control [N] and cell_types, perturbations, names. zeroshot_controls:
    controls of held-out types train too.
    """
    member = np.zeros(len(cells.file), np.uint8)
    fewshot = fewshot_codes(plan, cells)
    order, starts = grouped(np.arange(len(member)), cells.file, cells.cell_type)
    for rows in np.split(order, starts[1:-1]):  # the cells of one type in one file
        first = rows[0]
        dataset = cells.names[cells.file[first]]
        pair = (dataset, cells.cell_types[cells.cell_type[first]])
        # zeroshot comes before fewshot, and that before training
        if pair in plan.zeroshot:
            assign_zeroshot(member, cells, rows, plan.zeroshot[pair], zeroshot_controls)
        elif pair in fewshot:
            assign_fewshot(member, cells, rows, fewshot[pair])
        elif dataset in plan.training:
            member[rows] |= TRAIN
    check_named_cells(plan, cells, strict)
    return member


def assign_zeroshot(
    member: np.ndarray,
    cells,
    rows: np.ndarray,
    split: str,
    controls_train: bool,
) -> None:
    """All cells of a type to one split, its controls to train as well if they may."""
    member[rows] |= 1 << SPLITS.index(split)
    if controls_train or split == "train":
        controls = rows[cells.is_control[rows]]
        member[controls] |= TRAIN


def fewshot_codes(plan: Plan, cells) -> dict[tuple[str, str], dict[str, list[int]]]:
    """[fewshot] with the codes of those perturbations that there are."""
    number = {name: code for code, name in enumerate(cells.perturbations)}  # a list would be searched for each name
    codes = {}
    for pair, lists in plan.fewshot.items():
        codes[pair] = {split: [number[name] for name in names if name in number] for split, names in lists.items()}
    return codes


def assign_fewshot(member: np.ndarray, cells, rows: np.ndarray, codes: dict[str, list[int]]) -> None:
    """The listed perturbations, codes by split, validate and test, the rest trains; controls go where their type is."""
    is_control = cells.is_control[rows]
    controls = rows[is_control]
    perturbed = rows[~is_control]
    rest = np.ones(len(perturbed), bool)
    for split, bit in (("val", VAL), ("test", TEST)):
        chosen = np.isin(cells.perturbation[perturbed], codes.get(split, ()))
        member[perturbed[chosen]] |= bit
        if chosen.any():
            member[controls] |= bit
        rest &= ~chosen
    member[perturbed[rest]] |= TRAIN
    if len(perturbed):  # a type of controls alone gives nothing, as in cell-load
        member[controls] |= TRAIN


def check_named_cells(plan: Plan, cells, strict: bool) -> None:
    """Whether there are cells of what the TOML names."""
    control = cells.perturbations[cells.control]
    perturbed = perturbations_of(cells) if plan.zeroshot or plan.fewshot else {}
    for name, cell_type in [*plan.zeroshot, *plan.fewshot]:
        if (name, cell_type) not in perturbed:
            hint = suggest(cell_type, [of_set for other, of_set in perturbed if other == name])
            objection(strict, f"{plan.path}: data set {name:.80} has no cell type {cell_type!r:.80}{hint}")
            continue
        known = perturbed[name, cell_type]
        where = f'{plan.path}: [fewshot."{name}.{cell_type}"]'
        lists = plan.fewshot.get((name, cell_type), {})
        for perturbation in [*lists.get("val", ()), *lists.get("test", ())]:
            if perturbation == control:
                objection(strict, f"{where}: {perturbation!r} is the control, which is never split")
            elif perturbation not in known:
                hint = suggest(perturbation, known)
                objection(strict, f"{where}: {name} has no {cell_type} cells of {perturbation!r}{hint}")


def perturbations_of(cells) -> dict[tuple[str, str], dict[str, None]]:
    """{(data set, cell type): names of its perturbations, none of controls alone}, all in the order of their codes.

    One pass over the cells, however many types and files there are.
    """
    datasets = list(dict.fromkeys(cells.names))
    of_file = np.array([datasets.index(name) for name in cells.names])
    kind = of_file[cells.file] * len(cells.cell_types) + cells.cell_type
    found = {}
    for condition in np.unique(kind * len(cells.perturbations) + cells.perturbation).tolist():
        code, perturbation = divmod(condition, len(cells.perturbations))
        dataset, cell_type = divmod(code, len(cells.cell_types))
        names = found.setdefault((datasets[dataset], cells.cell_types[cell_type]), {})
        if perturbation != cells.control:
            names[cells.perturbations[perturbation]] = None
    return found


def with_validation(member: np.ndarray, cells, fraction: float, seed: int) -> np.ndarray:
    """The splits with a seeded fraction of the (cell type, perturbation) pairs of train as val: at least 1, never all.

    They stay as they are, uint8 [N], where some perturbed cells validate already.
    """
    validated = in_split(member, "val") & ~cells.is_control
    if validated.any() or fraction == 0:
        return member
    member = member.copy()
    train = np.flatnonzero(in_split(member, "train") & ~cells.is_control)
    cell_type = cells.cell_type[train].astype(np.int64)
    pairs = cell_type * len(cells.perturbations) + cells.perturbation[train]
    conditions = np.unique(pairs)
    count = max(1, round(fraction * len(conditions)))
    count = min(count, len(conditions) - 1)
    if count < 1:
        return member
    chosen = counter_rng(seed, 1).permutation(conditions)[:count]
    held_out = train[np.isin(pairs, chosen)]
    member[held_out] = VAL
    # The controls of their types validate too, and go on to train.
    controls = np.flatnonzero(cells.is_control)
    serve = np.isin(kind_of(cells, controls), kind_of(cells, held_out))
    member[controls[serve]] |= VAL
    return member


def kind_of(cells, which: np.ndarray) -> np.ndarray:
    """A number for the file and cell type of these cells, rows [n] or bool [N]; int64 [n]."""
    file = cells.file[which].astype(np.int64)
    return file * len(cells.cell_types) + cells.cell_type[which]


def types_of(cells, which: np.ndarray) -> set[tuple[int, int]]:
    """(file, cell type) of the cells that `which`, bool [N], marks."""
    kinds = np.unique(kind_of(cells, which))
    return {divmod(int(kind), len(cells.cell_types)) for kind in kinds}


def check_controls(cells, member: np.ndarray, strict: bool, embeds: bool, pert_col: str) -> None:
    """Perturbed cells need control cells of their file and type to start from.

    embeds: cells are embeddings, of which zeros may stand for no cell; expression of zeros is no cell.
    """
    used = member > 0
    perturbed_types = types_of(cells, used & ~cells.is_control)
    control_types = types_of(cells, used & cells.is_control)
    lonely = perturbed_types - control_types
    if lonely:
        texts = sorted(f"{cells.cell_types[t]} in {cells.files[f]}" for f, t in lonely)
        others = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
        control = cells.perturbations[cells.control]
        zeros = ", or with strict=False its input is zero" if embeds else ""
        objection(
            strict or not embeds,
            f"{texts[0]}{others} has perturbed cells but no control cells ({pert_col} = {control}) to start from: "
            "leave the cell type out, with a TOML that has its data set not under [training] but each other type, "
            f'"train", under [zeroshot]{zeros}',
        )
