"""Cells that a model of train_state.py predicts: of what a TOML holds out, or from control cells of a file.

page: the module of the run's page; cfg: what sample.py was asked for. Dimensions: D features.
"""

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from common import checkpoint, store
from common.errors import InputError
from common.runtime import Runtime
from common.telling import bar, doing, note
from measure.effects import table_of, verdict
from measure.predictions import draw_controls, predict_cells
from measure.sampling import Show, run_folder
from measure.transcript import sentence, table
from sources.controls import Controls, control_expression, find_controls, gene_order, matrix_to_read, names_in
from sources.h5ad import H5ad, write_h5ad
from sources.shared import counted


def sample_state(page: ModuleType, path: Path, cfg, show: Show) -> dict:
    """Predicted cells as h5ad: of what a TOML holds out, with the measured ones and metrics, or from given controls."""
    run, model, step, extra = page.load_run(path, cfg.device, cfg.source_attention)
    for name, value in cfg.columns.items():
        setattr(run, name, value)
    run.drop_unlabelled = run.drop_unlabelled or cfg.drop_unlabelled
    if cfg.toml:
        run.toml_config_path = cfg.toml
    folder = store.on_disk(cfg.out or run_folder(path) / "predictions", setting="out")
    checkpoint.try_place(folder)
    with Runtime(run) as rt:
        model.to(rt.device)
        if cfg.adata:
            return predict_adata(page, run, model, extra, folder, cfg, rt, show) | {"step": step}
        cells = page.open_run_data(run, extra)
        conditions = []  # what was predicted and measured of each
        result = page.finish(model, cells, run, rt, folder, conditions.append)
    rows = joined(conditions, "rows", "controls")
    columns = {
        run.cell_type_key: np.array(cells.cell_types)[cells.cell_type[rows]],
        run.pert_col: np.array(cells.perturbations)[cells.perturbation[rows]],
    }
    if run.batch_col:
        columns[run.batch_col] = np.array(cells.batches)[cells.batch[rows]]
    if len(cells.files) > 1:  # a cell type of one file is no other's, and its control cells are not
        columns = origins_of(cells, rows) | columns
    genes = cells.genes if model.gene_decoder is None else cells.count_genes
    size = counted(len(rows), "cell")
    for name in ("pred", "real"):  # control cells are as measured in both
        expression = joined(conditions, name, "control")
        with doing(f"writing {folder / name}.h5ad, {size}"):
            write_h5ad(folder / f"{name}.h5ad", expression, columns, genes, obs_names=names_of(cells, rows))
    show(sentence(f"after {counted(step, 'step')} {verdict(result)}"))
    show(f"\n{table_of(result)}\n")
    files = f"pred.h5ad, real.h5ad ({size}, with controls), metrics.csv, results.json, plots"
    show(sentence(f"written to {folder}: {files}"))
    places = [folder / name for name in ("pred.h5ad", "real.h5ad", "metrics.csv", "results.json", "plots")]
    written = [str(place) for place in places if place.exists()]
    return {"experiment": "state", "step": step, **result, "written": written}


def joined(conditions: list[dict], cells: str, controls: str) -> np.ndarray:
    """Of each condition these arrays of its perturbed and of its control cells, one after another."""
    arrays = []
    for condition in conditions:
        arrays += [condition[cells], condition[controls]]
    return np.concatenate(arrays)


def origins_of(cells, rows: np.ndarray) -> dict[str, np.ndarray]:
    """obs columns dataset and file of these cells."""
    file = cells.file[rows]
    names = [path.name for path in cells.files]
    return {"dataset": np.array(cells.names)[file], "file": np.array(names)[file]}


def names_of(cells, rows: np.ndarray) -> np.ndarray:
    """What the files call these cells; -1, -2 ... tell those of the second file and later ones apart."""
    names = np.empty(len(rows), object)
    for f, path in enumerate(cells.files):
        here = cells.file[rows] == f
        with H5ad(path) as file:
            known = file.obs_names[cells.row[rows[here]]]
        ending = f"-{f}" if f else ""
        names[here] = [f"{name}{ending}" for name in known]
    return names.astype(str)


class Given(NamedTuple):
    """Control cells of a file, as a model reads them."""

    controls: Controls
    expression: torch.Tensor  # [cells, D]
    batches: np.ndarray | None  # codes [cells], where the model reads batches
    wanted: list[str]  # perturbations
    genes: np.ndarray | None


def read_given(page: ModuleType, run, model, extra: dict, known: dict, cfg) -> Given:
    """The control cells of cfg.adata, and what is wanted of them: cfg.perturbations, or those of the file's own
    perturbed cells, or else all that the model knows. Raises InputError.
    """
    reads_batches = hasattr(model, "batch_encoder")
    batch_col = run.batch_col if reads_batches else None
    with H5ad(cfg.adata) as file:
        columns = (run.cell_type_key, run.pert_col, batch_col, run.control_pert)
        controls = find_controls(file, *columns, drop_unlabelled=run.drop_unlabelled)
        key = matrix_to_read(file, run.embed_key, extra.get("genes"))
        if key != run.embed_key:
            note(f"{cfg.adata} has no X_hvg of this model's genes: they are read from X, by name")
        genes, order = gene_order(file, key, extra.get("genes"))
        everything = sorted({*known, *controls.perturbations})
        wanted = names_in(cfg.perturbations, everything, f"the model or {cfg.adata}") or controls.perturbations
        if not wanted:
            wanted = [name for name in known if name != run.control_pert]
        page.codes_of(wanted, list(known), "perturbation", cfg.adata)
        batches = None
        if reads_batches and "batches" not in extra:
            raise InputError(f"{cfg.adata}: this model reads batches, and its checkpoint does not name them: it needs "
                             "the batch_onehot_map of its run folder beside it")
        if reads_batches:
            codes = page.codes_of(controls.batches, extra["batches"], "batch", cfg.adata)
            batches = np.array(codes)[controls.batch]
        expression = torch.from_numpy(control_expression(file, controls, key, run.counts, order))
    return Given(controls, expression, batches, wanted, genes)


def predict_adata(page: ModuleType, run, model, extra: dict, folder: Path, cfg, rt: Runtime, show: Show
                  ) -> dict:
    """What the control cells of cfg.adata become under the wanted perturbations: predicted.h5ad.

    Of a condition as many cells are predicted as the file has of it, or as it has control cells. Each has a control
    cell of its type for input (the mean of n_basal_samples, if the model was trained so): each once as far as they go,
    in an order drawn from the seed.
    """
    known = page.known_perturbations(run, extra)
    given = read_given(page, run, model, extra, known, cfg)
    controls = given.controls

    def express(batch: dict) -> torch.Tensor:
        return page.expressed(model, model.predict(batch)["cells"])

    model.eval()
    predicted = []
    types = []
    perturbations = []
    rows = []  # of what is printed
    conditions = [(t, p) for t in range(len(controls.cell_types)) for p in range(len(given.wanted))]
    for t, p in bar(conditions, f"predicting {counted(len(conditions), 'condition')}", unit="condition"):
        cell_type = controls.cell_types[t]
        name = given.wanted[p]
        places = controls.of_type(cell_type)
        n = cfg.cells or controls.perturbed[cell_type, name] or len(places)
        draws = np.random.default_rng([cfg.seed, t, p])  # of this condition alone
        chosen = draw_controls(len(places), n, run.n_basal_samples, draws)
        predicted += predict_cells(
            express,
            given.expression,
            given.batches,
            places[chosen],
            known[name],
            run.cell_set_len,
            rt.device,
        )
        types += [cell_type] * n
        perturbations += [name] * n
        rows.append((cell_type, name, f"{len(places):,}", f"{n:,}"))

    genes = given.genes
    if model.gene_decoder is not None:
        width = predicted[0].shape[1]
        genes = extra.get("count_genes") or [f"feature_{i}" for i in range(width)]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "predicted.h5ad"
    columns = {
        run.cell_type_key: np.array(types),
        run.pert_col: np.array(perturbations),
    }
    cells = counted(len(types), "cell")
    with doing(f"writing {target}, {cells}"):
        write_h5ad(target, np.concatenate(predicted), columns, np.array(genes))
    cell_types = counted(len(controls.cell_types), "cell type")
    show(sentence(f"{cells} of {cell_types} under {counted(len(given.wanted), 'perturbation')} written to {target}"))
    show(table(("cell type", "perturbation", "control cells", "predicted"), rows))
    return {
        "experiment": "state",
        "cells": len(types),
        "cell_types": controls.cell_types,
        "perturbations": given.wanted,
        "written": [str(target)],
    }
