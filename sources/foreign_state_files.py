"""Runs of arc-state and SmolState as ours, from a checkpoint or a whole run folder, and ours laid out for their tools.

A run folder of theirs holds checkpoints/*.ckpt, config.yaml or config.json, data_module.torch (settings of the data),
var_dims.pkl (names of genes and perturbations), and for each kind of name a dict name -> one-hot vector:
pert_onehot_map.pt; of cell types and batches NAME_onehot_map.torch, .pt or .pkl. Names are str or numpy.str_.
"""

import io
import json
import math
import os
import pickle
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from common import checkpoint
from common.errors import CheckpointError, reason, replacing
from sources.foreign_checkpoints import check_sizes, converting, read_checkpoint, scalar, small
from sources.foreign_state import (
    SIZES_OF_DATA,
    complete_decoder,
    read_source_checkpoint,
    source_settings,
    source_weights,
    translate,
)
from sources.splits import TABLES, pattern_of, read_tables

# Settings of the source's data that are settings of ours, and what values of them may be.
OF_DATA = {
    "toml_config_path": str,
    "pert_col": str,
    "cell_type_key": str,
    "batch_col": str,
    "control_pert": str,
    "embed_key": str | None,
    "basal_mapping_strategy": str,
    "n_basal_samples": int,
    "should_yield_control_cells": bool,
    "map_controls": bool,
    "downsample_cells": int | None,
}
CONTEXTS = "cell_type_onehot_map", "batch_onehot_map"


# ---------------------------------------------------------------------------------------------------------------
# Pickles, of which nothing may run
# ---------------------------------------------------------------------------------------------------------------
def _storage(content: bytes) -> object:
    """The numbers of a tensor, which torch puts into a pickle as a file of its own."""
    return torch.load(io.BytesIO(content), weights_only=True)


def _empty(kind: str, shape: tuple, dtype: str) -> np.ndarray:
    """An array that gets its shape and numbers next; one of the shape that a file says may be of any size."""
    return np.zeros(0, "b")


BUFFER = np.zeros(1).__reduce_ex__(5)[0]
PLAIN = {  # all that a pickle may name
    "collections.OrderedDict": OrderedDict,
    "numpy.dtype": np.dtype,
    "numpy.ndarray": "ndarray",  # which nothing here calls
    "numpy.core.multiarray.scalar": scalar,
    "numpy._core.multiarray.scalar": scalar,
    "numpy.core.multiarray._reconstruct": _empty,
    "numpy._core.multiarray._reconstruct": _empty,
    "numpy.core.numeric._frombuffer": BUFFER,
    "numpy._core.numeric._frombuffer": BUFFER,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch.storage._load_from_bytes": _storage,
}


class Plain(pickle.Unpickler):
    """Reads containers, texts, numbers, arrays of numpy and tensors; refuses whatever else a pickle names."""

    def find_class(self, module: str, name: str):
        call = PLAIN.get(f"{module}.{name}")
        if call is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return call


def read_plain(path: Path) -> object:
    """What pickle.dump wrote into a .pkl, or torch.save into another file. No code of either runs.

    Raises CheckpointError for a file that is damaged, and for a pickle that holds more than plain data.
    """
    if path.suffix != ".pkl":
        return read_checkpoint(path)
    try:
        table = Plain(small(path.read_bytes())).load()
        check_sizes(table)
        return table
    except Exception as error:  # a torn pickle raises whatever its bytes happen to ask for
        raise CheckpointError(f"{path} is damaged, or holds more than names, numbers and tensors "
                              f"({reason(error)}): nothing of it was run") from error


def table_in(path: Path) -> dict:
    """A dict that a file holds; empty where there is no file. Raises CheckpointError for anything else."""
    if not path.is_file():
        return {}
    table = read_plain(path)
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} should hold a dict, not {type(table).__name__}")
    return table


# ---------------------------------------------------------------------------------------------------------------
# Their runs as ours
# ---------------------------------------------------------------------------------------------------------------
def run_of(path: Path) -> Path:
    """The run folder of a checkpoint of the source."""
    folder = path.parent
    return folder.parent if folder.resolve().name == "checkpoints" else folder


def convert(path: str | Path, attention: str = "auto") -> tuple[dict, dict, int, dict, list[str]]:
    """A .ckpt of arc-state, of the State of July 2025 or of SmolState, or a bare state dict, as ours.

    Args:
        attention: auto | bidirectional | causal | rotary, see `translate`.
    Returns: (settings of train_state.py, weights under its names, steps done, what its numbers mean, notes to tell).
    What they mean: dims, sizes of the data, and as far as the checkpoint or the files of its run folder say:
    genes, count_genes, perturbations and batches, lists of names.
    Settings are empty where the file does not say them, or says a part that is not here (the note is which): such
    weights can be trained from, but not be used by themselves.
    Raises CheckpointError if the file is missing, damaged or foreign. No code of it runs.
    """
    with converting(path, "State"):
        return as_ours(path, attention)


def as_ours(path: str | Path, attention: str) -> tuple[dict, dict, int, dict, list[str]]:
    """See convert."""
    weights, keywords, step = read_source_checkpoint(path)
    if not {"input_dim", "output_dim", "pert_dim", "hidden_dim"} <= keywords.keys():
        return {}, weights, step, {}, []
    notes = []
    if complete_decoder(keywords, weights):
        notes.append(f"the gene decoder of {path} is left out: its cells are genes already, so it was never trained")
        weights = {name: value for name, value in weights.items() if not name.startswith("gene_decoder.")}
    elif keywords.get("finetune_vci_decoder"):
        why = f"{path} makes genes by the decoder of an embedding model (finetune_vci_decoder)"
        return {}, weights, step, {}, [why]
    keywords.setdefault("compat_relu", True)  # as it computed
    # Older releases pass over the settings of parts that they have not.
    for name, part in (("lora", "lora_"), ("use_batch_token", "batch_token")):
        if not any(part in weight for weight in weights):
            keywords[name] = None
    try:
        settings, dims = translate(keywords, attention)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: its settings make no model ({reason(error)})") from error
    if not settings["bidirectional_attention"]:
        positions = " with rotary positions" if settings["rotary"] else ""
        notes.append(f"{path} is causal{positions}: the order of cells counts. If it was trained otherwise: "
                     "source_attention=bidirectional")
    folder = run_of(Path(path))
    of_data = data_settings(folder)
    if "embed_key" in settings:  # what the model was built for
        of_data.pop("embed_key", None)
    settings = {"toml_config_path": "", **settings, **of_data}
    known = names_known(folder, keywords, dims)
    if settings["batch_encoder"] and "batches" not in known:
        notes.append(f"{path} knows batches by number: those of other data, or in another order, are others to it")
    features = [file for file in (folder / "pert_onehot_map.pt", Path(path).parent / "pert_onehot_map.pt")
                if file.exists()]
    if features:
        settings["perturbation_features_file"] = str(features[0])
    elif "perturbations" not in known:
        notes.append(f"there is no pert_onehot_map.pt beside {path}: perturbations are numbered as sorted in the TOML")
    return settings, weights, step, {"dims": dims, **known}, notes


def convert_whole(path: str | Path, attention: str = "auto") -> tuple[dict, dict, int, dict]:
    """(settings, weights, steps done, what its numbers mean) of a checkpoint that can be used by itself; prints notes.

    Raises CheckpointError for one that holds weights only.
    """
    settings, weights, step, known, notes = convert(path, attention)
    if not settings:
        why = f"{path} has weights but not the settings of its model (input_dim, hidden_dim, ...)"
        raise CheckpointError(f"{notes[0] if notes else why}: it can be trained from, python train_state.py "
                              "--init_from=FILE --toml=my.toml with the sizes of its model, but not be used by itself")
    for note in notes:
        print(f"note: {note}")
    return settings, weights, step, known


def data_settings(folder: Path) -> dict:
    """What a run folder says of its data: of OF_DATA what is there, and of the type that it should be."""
    import yaml

    said = table_in(folder / "data_module.torch")
    config = folder / "config.yaml"
    if not said and config.is_file():
        try:
            said = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["kwargs"]
        except Exception as error:  # torn YAML raises whatever its text happens to ask for
            raise CheckpointError(f"{config} does not say data: kwargs: ({reason(error)})") from error
        if not isinstance(said, dict):
            raise CheckpointError(f"{config}: data: kwargs: should be settings, not {said!r:.80}")
    settings = {}
    for name, kind in OF_DATA.items():
        if isinstance(said, dict) and name in said and isinstance(said[name], kind):
            settings[name] = said[name]
    return settings


def names_known(folder: Path, keywords: dict, dims: dict) -> dict[str, list[str]]:
    """genes, count_genes, perturbations and batches of a run, as far as its checkpoint and folder name them."""
    said = table_in(folder / "var_dims.pkl")
    known = {}
    genes = names_in(keywords.get("gene_names")) or names_in(said.get("gene_names"))
    # Where X_hvg has as many columns as X, nobody knows whether the names are in the order of the one or the other.
    sure = keywords.get("output_space") == "all" or dims["hvg_dim"] != dims["gene_dim"]
    is_expression = keywords.get("embed_key", "") in ("X_hvg", None)
    if sure and is_expression and len(genes) == dims["input_dim"]:
        known["genes"] = genes
    if sure and dims["decodes"] and len(genes) == keywords["decoder_cfg"]["gene_dim"]:
        known["count_genes"] = genes
    perturbations = names_in(said.get("pert_names"))
    if len(perturbations) == dims["pert_dim"]:
        known["perturbations"] = perturbations
    for ending in ("torch", "pt", "pkl"):
        batches = in_order(folder / f"batch_onehot_map.{ending}")
        if batches and len(batches) == dims["batch_dim"]:
            known["batches"] = batches
    return known


def names_in(value) -> list[str]:
    """The names that a list, a tuple or an array of them holds; empty for anything else."""
    return list(map(str, value)) if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) == 1 else []


def in_order(path: Path) -> list[str]:
    """The names of a dict name -> one-hot vector, by their numbers; empty where there is no file."""
    numbered = {}
    for name, vector in table_in(path).items():
        number = one_hot(vector)
        if number is None:
            raise CheckpointError(f"{path} should hold names and one-hot vectors, but {str(name)!r:.80} has none")
        if number in numbered:
            raise CheckpointError(f"{path} is damaged: {numbered[number]!r:.80} and {str(name)!r:.80} have one vector")
        numbered[number] = str(name)
    return [numbered[number] for number in sorted(numbered)]


def one_hot(vector) -> int | None:
    """Where the one of a vector of zeros is; None for anything else."""
    if not isinstance(vector, torch.Tensor | np.ndarray) or vector.ndim != 1:
        return None
    try:
        values = torch.as_tensor(vector).double().numpy()
    except (TypeError, RuntimeError, ValueError):  # no numbers, or sparse ones
        return None
    places = np.flatnonzero(values)
    return int(places[0]) if len(places) == 1 and values[places[0]] == 1 else None


# ---------------------------------------------------------------------------------------------------------------
# Ours for their tools
# ---------------------------------------------------------------------------------------------------------------
def write_whole(path: Path, content: str | bytes) -> None:
    """A file, complete or not there. Raises OSError."""
    with replacing(path) as fresh:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)


def write_tensors(path: Path, content: dict) -> None:
    """What torch.save writes, complete or not there. Raises OSError."""
    with replacing(path) as fresh, open(fresh, "wb") as file:
        torch.save(content, file)


def write_maps(folder: Path, cells) -> None:
    """var_dims.json, pert_onehot_map.pt, cell_type_map.json and batch_map.json: what the model's numbers mean.

    cells: a Cells of sources.cells.
    """
    dims = cells.dims()
    names = {"gene_names": cells.count_genes if dims["decodes"] else cells.genes, "pert_names": cells.perturbations}
    write_whole(folder / "var_dims.json", json.dumps(dims | names, indent=1) + "\n")
    features = torch.as_tensor(cells.perturbation_features)
    write_tensors(folder / "pert_onehot_map.pt", dict(zip(cells.perturbations, features, strict=True)))
    for name, values in (("cell_type", cells.cell_types), ("batch", cells.batches)):
        codes = {value: code for code, value in enumerate(values)}
        write_whole(folder / f"{name}_map.json", json.dumps(codes, indent=1) + "\n")


def unlike_smolstate(cfg) -> list[str]:
    """What SmolState's model has not, a sentence each: its tools could not read a run of these settings."""
    wrong = []
    if not cfg.pert_norm:
        wrong.append("it normalises the encoded perturbation: set pert_norm = true")
    if cfg.lora:
        wrong.append("it has no lora")
    if cfg.use_batch_token:
        wrong.append("it has no use_batch_token")
    if cfg.rotary or not cfg.bidirectional_attention:
        wrong.append("its transformer is bidirectional and has no positions")
    return [f"source_files = smolstate: {sentence}" for sentence in wrong]


def write_source_files(run: Path, model: torch.nn.Module, cells, step: int) -> None:
    """A run in the layout of cfg.source_files, for the source's own tools.

    state (or true): in the run folder, for `state tx predict --output-dir RUN` and `state tx infer --model-dir RUN`:
    config.yaml, data_module.torch, var_dims.pkl, pert_onehot_map.pt, *_onehot_map.torch and checkpoints. smolstate: in
    RUN/smolstate, for its run_inference and --resume, with *_onehot_map.pkl and config.json, a name of ours too.
    checkpoints/: final.ckpt has the weights of `model`, those measured; last.ckpt and best.ckpt, or step_*.ckpt
    as SmolState has it, those of our .pt files. data.toml is the TOML with whole paths: theirs are not relative to it.

    Args:
        run: the run folder, which has pert_onehot_map.pt. cells: a Cells of sources.cells. step: of `model`.
    """
    cfg = model.cfg
    smol = cfg.source_files == "smolstate"
    folder = run / "smolstate" if smol else run
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    # Where their tools, on the same weights and cells, compute something else.
    if not model.clips and model.gene_decoder is None:
        print("note: the tools of the source clip embeddings at 0: with compat_relu = true this run would, too")
    if cfg.counts == "convert":
        print("note: the tools of the source read X as it is in its file, not normalised as here")
    if cfg.d_model % cfg.n_heads:
        print("note: the tools of the source need a transformers that lets d_model be no multiple of n_heads")

    tables = whole_tables(cells.toml)
    write_whole(folder / "data.toml", "\n".join(toml_lines(tables)) + "\n")
    keywords = source_settings(cfg, cells.dims())
    config = source_config(folder, cfg, keywords)
    of_data = config["data"]["kwargs"] | {
        "batch_size": config["training"]["batch_size"],
        "cell_sentence_len": cfg.cell_set_len,
        "random_seed": cfg.seed,
        "is_log1p": True,
    }
    if smol:
        config = as_smolstate(config, tables)
        write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
        of_data = {name: of_data[name] for name in OF_SMOLSTATE}
        shutil.copyfile(run / "pert_onehot_map.pt", folder / "pert_onehot_map.pt")
    else:
        write_yaml(folder / "config.yaml", config)
    write_tensors(folder / "data_module.torch", of_data)
    write_names(folder, cells, smol)

    files = [run / "last.pt", *run.glob("step_*.pt")] if smol else [run / "last.pt", run / "best.pt"]
    saved = {"final": (model.state_dict(), step)}
    for file in files:
        if file.is_file():
            state = checkpoint.load(file)
            saved[file.stem] = state["model"], state["step"]
    for name, (weights, done) in saved.items():
        content = of_lightning(weights, done, keywords, cfg)
        if smol:
            content = of_smolstate(weights, done, keywords, cfg, config)
        write_tensors(folder / "checkpoints" / f"{name}.ckpt", content)


def write_names(folder: Path, cells, smol: bool) -> None:
    """var_dims.pkl, and what the numbers of cell types and batches mean, as pickles if smol."""
    dims = cells.dims()
    genes = cells.genes if cells.count_genes is None else cells.count_genes
    sizes = {name: dims[name] for name in SIZES_OF_DATA}
    names = {"gene_names": list(map(str, genes)), "pert_names": cells.perturbations}
    write_whole(folder / "var_dims.pkl", pickle.dumps(sizes | names))
    for name, values in zip(CONTEXTS, (cells.cell_types, cells.batches), strict=True):
        vectors = dict(zip(values, map(torch.clone, torch.eye(len(values))), strict=True))
        if smol:
            write_whole(folder / f"{name}.pkl", pickle.dumps(vectors))
        else:
            write_tensors(folder / f"{name}.torch", vectors)


def whole_tables(toml: Path) -> dict:
    """The tables of the TOML of an experiment that mean something, with whole paths of files."""
    tables = read_tables(toml)
    tables = {name: tables[name] for name in TABLES if name in tables}
    for name, text in tables["datasets"].items():
        tables["datasets"][name] = os.path.abspath(pattern_of(toml, str(text)))
    return tables


def toml_lines(table: dict, names: tuple[str, ...] = ()) -> list[str]:
    """The lines of a TOML of texts, lists of texts and tables of these; names: of the tables around this one."""
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    lines = []
    if plain and names:
        lines.append(f"[{'.'.join(map(toml_key, names))}]")
    lines += [f"{toml_key(key)} = {quoted(value)}" for key, value in plain.items()]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += toml_lines(value, (*names, key))
    return lines


def toml_key(name: str) -> str:
    is_bare = re.fullmatch(r"[\w-]+", name, re.ASCII)
    return name if is_bare else quoted(name)


def quoted(value: str | list[str]) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


OF_SMOLSTATE = ("toml_config_path", "batch_size", "num_workers", "random_seed", "pert_col", "batch_col",
                "cell_type_key", "control_pert", "embed_key", "output_space", "cell_sentence_len")  # data_module.torch


def source_config(folder: Path, cfg, keywords: dict) -> dict:
    """config.yaml of arc-state for a run of settings cfg whose model has these keyword arguments."""
    whole = folder.resolve()
    of_data = {
        "toml_config_path": str(whole / "data.toml"),
        "embed_key": cfg.embed_key or None,
        "output_space": cfg.output_space,
        "pert_rep": "onehot",
        "basal_rep": "sample",
        "num_workers": 0,
        "n_basal_samples": cfg.n_basal_samples,
        "downsample_cells": cfg.downsample_cells,
        "basal_mapping_strategy": cfg.basal_mapping_strategy,
        "should_yield_control_cells": cfg.should_yield_control_cells,
        "pert_col": cfg.pert_col,
        "cell_type_key": cfg.cell_type_key,
        "batch_col": cfg.batch_col or cfg.cell_type_key,  # it cannot do without; such a model does not read it
        "control_pert": cfg.control_pert,
        "map_controls": cfg.map_controls,
        # With it the vectors are those of this run, whatever other names the data have.
        "perturbation_features_file": str(whole / "pert_onehot_map.pt"),
        "store_raw_basal": False,
        "barcode": True,
    }
    # A batch there is that of a micro-step, and validation counts these; SmolState accumulates nothing.
    micro_steps = 1 if cfg.source_files == "smolstate" else cfg.grad_accum
    training = {
        "batch_size": cfg.batch_size // micro_steps,
        "lr": cfg.lr,
        "weight_decay": cfg.weight_decay,
        "max_steps": cfg.max_steps,
        "train_seed": cfg.seed,
        "val_freq": cfg.eval_interval * micro_steps,
        "ckpt_every_n_steps": cfg.save_interval or cfg.eval_interval,
        "gradient_clip_val": cfg.grad_clip,
        "gradient_accumulation_steps": micro_steps,
        "loss_fn": "mse",
        "devices": 1,
        "strategy": "auto",
        "use_mfu": False,
    }
    return {
        "data": {"name": "PerturbationDataModule", "kwargs": of_data, "output_dir": None, "debug": True},
        "model": {"name": "state", "checkpoint": None, "device": "cuda", "kwargs": keywords},
        "training": training,
        # Where its tools look for the run.
        "output_dir": str(whole.parent),
        "name": whole.name,
        "use_wandb": False,
        "overwrite": False,
    }


def as_smolstate(config: dict, tables: dict) -> dict:
    """The same settings as SmolState keeps them: those of the data at the root, with the tables of the TOML."""
    return config["data"] | {
        "datasets": tables["datasets"],
        "training_spec": tables.get("training", {}),
        "zeroshot": tables.get("zeroshot", {}),
        "fewshot": tables.get("fewshot", {}),
        "model": config["model"],
        "training": config["training"],
        "overwrite": False,
    }


def of_lightning(weights: dict, step: int, keywords: dict, cfg) -> dict:
    """What a .ckpt of arc-state holds, without a state of the optimizer."""
    return {
        "state_dict": source_weights(weights, cfg),
        "hyper_parameters": keywords,
        "global_step": step,
        "epoch": 0,
        "pytorch-lightning_version": "2.5.0",
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }


def of_smolstate(weights: dict, step: int, keywords: dict, cfg, config: dict) -> dict:
    """What a .ckpt of SmolState holds: its --resume goes on from this step of its cosine, with fresh moments."""
    weights = source_weights(weights, cfg)
    progress = min(1.0, step / cfg.max_steps)
    lr = cfg.min_lr + (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    betas = cfg.beta1, cfg.beta2
    optimizer = torch.optim.AdamW(list(weights.values()), lr=lr, betas=betas, weight_decay=cfg.weight_decay)
    optimizer.param_groups[0]["initial_lr"] = cfg.lr
    schedule = {
        "T_max": cfg.max_steps,
        "eta_min": cfg.min_lr,
        "base_lrs": [cfg.lr],
        "last_epoch": step,
        "_step_count": step + 1,
        "_last_lr": [lr],
    }
    return {
        "model_state_dict": weights,
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": schedule,
        "step": step,
        "epoch": 0,
        "loss": math.nan,  # of this step nobody wrote it down
        "config": config,
        "hyper_parameters": keywords,
    }


def write_yaml(path: Path, content: dict) -> None:
    import yaml

    write_whole(path, yaml.safe_dump(content, sort_keys=False))
