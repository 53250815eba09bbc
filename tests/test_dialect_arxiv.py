"""Settings, chunks and checkpoints of ICL-non-ergodic-arxiv on train_arxiv.py, against what its code makes of them."""

import contextlib
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import refusal

import prepare_data
import sample
import sweep
import train_arxiv
from common import checkpoint, runlog
from common.errors import CheckpointError, DataError
from common.runtime import Runtime
from configurator import configure
from measure.curves import draw_history
from sources.chunks import chunk_arrays, split_paths, train_and_validation
from sources.foreign import ICL, ICL_NEWEST
from sources.foreign_arxiv import ALIASES, CATEGORIES, source_checkpoint, translated
from train_arxiv import Config

STEM = "custom_tokenized_data_chunked_len100"
TINY = (
    "--dialect=icl",
    "architecture.d_model=16",
    "architecture.n_layers=1",
    "training.batch_size=4",
    "training.effective_batch_size=8",
    "training.epochs=2",
    "scheduler.num_warmup_steps=3",
    "--bootstrap=10",
    "--device=cpu",
    "--out_dir=run",
    "--no-probe",
)


@pytest.fixture(autouse=True)
def quick(in_a_folder_of_its_own, monkeypatch):
    monkeypatch.setattr(train_arxiv, "draw_run", lambda *args: None)


def read(*words: str) -> Config:
    """What the words of a command line come to; "effect" among them: with a warning of what has none."""
    warns = "effect" in words
    context = pytest.warns(UserWarning, match="without effect here") if warns else contextlib.nullcontext()
    with context:
        return configure(Config, [word for word in words if word != "effect"], ALIASES, ICL)


def refused(capsys, *words: str) -> str:
    """The one error line of a command line that ends with code 2; before it may be what it was read as."""
    with pytest.raises(SystemExit) as end:
        train_arxiv.main(list(words))
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert end.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ")
    return errors[0]


def differing(cfg: Config, *names: str) -> dict:
    """What differs from the source's defaults, but for these names."""
    start = read("--dialect=icl")
    return {name: value for name, value in vars(cfg).items() if value != getattr(start, name) and name not in names}


# ---------------------------------------------------------------------------------------------------------- settings


def test_absent_settings_have_the_source_s_defaults(capsys):
    cfg = read("--dialect=icl")
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_mlp, cfg.dropout) == (2, 128, 2, 512, 0.1)
    assert (cfg.batch_size, cfg.grad_accum, cfg.epochs, cfg.seed) == (512, 16, 20, 42)
    assert (cfg.lr, cfg.min_lr, cfg.warmup_steps, cfg.schedule, cfg.schedule_over) == (
        5e-4,
        0.0,
        1000,
        "cosine",
        "epochs",
    )
    assert (cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.decay, cfg.grad_clip) == (0.9, 0.95, 0.1, "all", 1.0)
    assert (cfg.patience, cfg.min_delta, cfg.max_steps, cfg.categories) == (10, 1e-3, None, ["cs.DS"])
    assert (cfg.choice, cfg.allow_short, cfg.init, cfg.precision, cfg.wandb) == ("first", True, "normal", "fp32", False)
    assert cfg.data == f"data/{STEM}.hdf5"
    assert (cfg.log_interval, cfg.save_interval, cfg.eval_chunks, cfg.eval_epochs) == (100, 1_000, 10**9, 1)
    assert "note: read as ICL-non-ergodic-arxiv: absent keys take its defaults" in capsys.readouterr().err
    assert read("--lr=1e-2") == Config(lr=1e-2)  # ours stay where nothing is of the source


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "dataset.num_top_categories=3 training.batch_size=64",
            {"categories": ["cs.DS", "math.ST", "math.GR"], "grad_accum": 8},
        ),
        ("dataset.num_top_categories=3 experiment.active_categories=[cs.IT]", {"categories": ["cs.IT"]}),
        ("wandb.mode=disabled", {}),
        ("wandb.mode=offline", {"wandb": "offline"}),
        ("wandb.mode=online", {"wandb": "online"}),
        ("model=micro_decoder", {"n_layers": 6, "d_model": 256, "n_heads": 4, "d_mlp": 1024}),
        ("model=default_model dataset=arxiv_custom_filtered optimizer=adamw scheduler=cosine_warmup", {}),
        ("training=default_training dataset=default_dataset experiment=default_experiment", {}),
        ("experiment=k3_csDS_mathST_csIT", {"categories": ["cs.DS", "math.ST", "cs.IT"]}),
        ("experiment=k2_csIT_csDS", {"categories": ["cs.IT", "cs.DS"]}),
        ("experiment=k5_csDS_mathST_mathGR_csIT_csPL", {"categories": CATEGORIES}),
        ("training.effective_batch_size=100 training.batch_size=16", {"batch_size": 96, "grad_accum": 6}),
        ("training.effective_batch_size=8", {"batch_size": 32, "grad_accum": 1}),
        ("training.effective_batch_size=0 training.gradient_accumulation_steps=3", {"batch_size": 96, "grad_accum": 3}),
        ("training.gradient_accumulation_steps=3", {}),  # it is computed anew there
        ("training.early_stopping_enabled=False", {"patience": 0}),
        ("training.early_stopping_patience=3 training.early_stopping_min_delta=0.5", {"patience": 3, "min_delta": 0.5}),
        ("training.perform_validation=False", {"patience": 0, "eval_interval": 10**9}),
        ("training.validation_interval_epochs=4", {"eval_epochs": 4}),
        ("training.max_global_steps=-1", {}),
        ("training.max_global_steps=7", {"max_steps": 7}),
        ("training.save_checkpoint_interval_steps=0", {"save_interval": 10**9}),
        (
            "optimizer.betas=[0.8,0.9] optimizer.lr=1e-3 optimizer.weight_decay=0",
            {"beta1": 0.8, "beta2": 0.9, "lr": 1e-3, "weight_decay": 0.0},
        ),
        ("scheduler.num_warmup_steps=5 training.max_grad_norm=0", {"warmup_steps": 5, "grad_clip": 0.0}),
        ("scheduler.min_lr_ratio=0.1", {}),  # its cosine ends at 0 all the same
        ("scheduler.min_lr_ratio=0.1 --min_lr=1e-5", {"min_lr": 1e-5}),
        ("training.mixed_precision_enabled=True --device=cpu", {"device": "cpu"}),
        ("log_level=DEBUG dataset.target_split=all effect", {"log_level": "DEBUG"}),
        ("logging.level=WARNING", {"log_level": "WARNING"}),
        ("logging.level=debug", {"log_level": "DEBUG"}),  # in capitals there
        ("optimizer._target_=torch.optim.AdamW model._target_=any.Model", {}),
        ("training.precision=bf16", {"precision": "bf16"}),
        ("training.grad-accum=2 training.batch_size=64", {"batch_size": 64, "grad_accum": 2}),
        ("training.learning_rate=1 effect", {}),
        ("learning_rate=1 model=micro_decoder", {"lr": 1.0}),
        (
            "model.architecture.hidden_dropout_prob=0 model.architecture.attention_probs_dropout_prob=0.0",
            {"dropout": 0.0},
        ),
        ("dataset.custom_hdf5_chunked_output_path_base=my/stem", {"data": "my/stem.hdf5"}),
        (
            "dataset.custom_hdf5_chunked_output_path_base=my/stem dataset.hdf5_chunked_output_path=a.hdf5",
            {"data": "a.hdf5"},
        ),
        (
            "dataset.hdf5_chunked_output_path=a.hdf5 dataset.validation_hdf5_path=b.hdf5",
            {"data": "a.hdf5", "validation_data": "b.hdf5"},
        ),
        ("++training.epochs=3 hydra.job.chdir=x effect", {"epochs": 3}),
        ("training.epochs=3 hydra.run.dir=x", {"epochs": 3, "out_dir": "x"}),
        ("--config-name=config training.num_workers=4 training.pin_memory=true effect", {}),
        # The inner command of scripts/run_k_experiments.py.
        (
            "experiment=default_experiment experiment.k_value=2 experiment.active_categories=['cs.DS','cs.IT'] "
            "experiment.experiment_id=k2_csDS_csIT training.epochs=20 training.max_global_steps=-1 logging.level=INFO "
            "training.perform_validation=True training.early_stopping_enabled=True effect",
            {"categories": ["cs.DS", "cs.IT"]},
        ),
    ],
)
def test_a_command_line_of_the_source_means_what_it_means_there(words, expected):
    sizes = ("n_layers", "d_model", "n_heads", "d_mlp") if "micro" in words and "lr" in expected else ()
    assert differing(read(*words.split()), *sizes) == expected


def test_half_precision_is_taken_where_there_is_a_gpu_as_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    asked = "training.mixed_precision_enabled=True"
    assert read(asked).precision == "bf16"
    assert read(asked, "training.mixed_precision_dtype=fp16").precision == "fp16"
    assert read(asked, "--device=cpu").precision == "fp32"
    assert read(asked, "--precision=fp32").precision == "fp32"
    assert read("model=micro_decoder").precision == "fp32"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("optimizer.eps=1e-6", "eps = 1e-06: the page has 1e-08 alone"),
        ("optimizer.amsgrad=true", "amsgrad = True: the page has False alone"),
        ("architecture.hidden_act=relu", "hidden_act = relu: the page has gelu alone"),
        ("architecture.tie_word_embeddings=False", "tie_word_embeddings = False: the page has True alone"),
        ("architecture.layer_norm_eps=1e-6", "layer_norm_eps = 1e-06: the page has 1e-05 alone"),
        ("architecture.initializer_range=0.1", "initializer_range = 0.1: the page has 0.02 alone"),
        ("scheduler.num_cycles=1", "num_cycles = 1.0: the page has 0.5 alone"),
        ("training.save_best_model_mode=max", "save_best_model_mode = max: the page has min alone"),
        ("architecture.attention_probs_dropout_prob=0.5", "one rate for both"),
        ("dataset.num_top_categories=6", "num_top_categories = 6 is not between 1 and 5"),
        ("dataset.num_top_categories=x", "num_top_categories = x: not a number"),
        ("training.early_stopping_patience=0", "epochs=1 does so here"),
        ("wandb.mode=shared", "wandb.mode = shared: it is online, offline or disabled"),
        ("experiment=k3_csDS_mathST", "experiment: ICL-non-ergodic-arxiv has no 'k3_csDS_mathST', did you mean k"),
        ("model=gpt3", "model: ICL-non-ergodic-arxiv has no 'gpt3'"),
        ("experiment=k1_csDS --config-dir=configs", "name the configuration file itself, bare: FOLDER/NAME.yaml"),
        ("optimizer._target_=torch.optim.SGD", "optimizer._target_ = torch.optim.SGD: the page has AdamW and a cosine"),
        ("scheduler._target_=torch.optim.lr_scheduler.StepLR", "_target_ = torch.optim.lr_scheduler.StepLR: the page"),
        ("training.epoch=3", "training.epoch: no such setting, did you mean epochs?"),
    ],
)
def test_what_cannot_be_as_there_is_refused_in_one_sentence(words, sentence, capsys):
    assert sentence in refused(capsys, *words.split())


WHOLE = """
project_name: mine
logging: {level: ERROR, log_file: logs/x.log}
hydra:
  run: {dir: "outputs/${now:%Y-%m-%d}"}
  sweep: {subdir: "${hydra.job.num}"}
seed: 7
wandb: {project: exp, entity: me, run_name: "${now:%H-%M-%S}", tags: [a], enabled: true, mode: disabled}
dataset:
  token_chunk_size: 100
  path: data/raw
  name: some/set
  custom_hdf5_chunked_output_path_base: data/stem
  hdf5_chunked_output_path: ${dataset.custom_hdf5_chunked_output_path_base}.hdf5
  validation_hdf5_path: ${dataset.custom_hdf5_chunked_output_path_base}_validation.hdf5
model:
  _target_: src.models.micro_decoder_model.MicroDecoderModel
  name: Mine
  custom_tokenizer_path: tok.json
  architecture: {max_position_embeddings: 100, d_model: 64, n_layers: 3, n_heads: 4, d_ff: 96, hidden_act: gelu,
                 hidden_dropout_prob: 0.2, attention_probs_dropout_prob: 0.2, layer_norm_eps: 1.0e-5}
training:
  epochs: 5
  batch_size: 16
  effective_batch_size: 64
  learning_rate: 5e-5
  optimizer: AdamW
  max_global_steps: -1
  checkpoint_dir: null
  resume_from_checkpoint: null
  validation_batch_size: ${training.batch_size}
optimizer: {_target_: torch.optim.AdamW, lr: 1.0e-3, betas: [0.8, 0.9], eps: 1.0e-8}
scheduler:
  num_warmup_steps: 11
  num_training_steps: ???
  num_cycles: 0.5
  last_epoch: -1
  min_lr_ratio: 0.1
experiment: {k_value: 2, active_categories: [cs.DS, math.ST], tokens_per_category: 25088000, experiment_id: K2}
"""


def test_a_whole_file_of_a_run_means_what_it_means_there():
    Path("config.yaml").write_text(WHOLE)
    expected = {
        "log_level": "ERROR",
        "seed": 7,
        "wandb_project": "exp",
        "wandb_entity": "me",
        "data": "data/stem.hdf5",
        "validation_data": "data/stem_validation.hdf5",
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "d_mlp": 96,
        "dropout": 0.2,
        "epochs": 5,
        "batch_size": 64,
        "grad_accum": 4,
        "lr": 1e-3,
        "beta1": 0.8,
        "beta2": 0.9,
        "warmup_steps": 11,
        "categories": ["cs.DS", "math.ST"],
    }
    assert differing(read("config.yaml", "effect")) == expected
    # What is typed wins, groups too.
    typed = read(
        "config.yaml",
        "model=micro_decoder",
        "training.effective_batch_size=32",
        "optimizer.betas=[0.9,0.95]",
        "experiment=k1_csPL",
        "effect",
    )
    assert (typed.d_model, typed.batch_size, typed.beta2, typed.categories) == (256, 32, 0.95, ["cs.PL"])


def test_the_list_of_defaults_of_a_file_chooses_groups_and_a_group_may_be_a_file():
    Path("config.yaml").write_text(
        "defaults:\n  - _self_\n  - model: micro_decoder\n  - experiment: k1_csPL\nseed: 3\n"
    )
    cfg = read("config.yaml", "--dialect=icl")
    assert differing(cfg) == {
        "n_layers": 6,
        "d_model": 256,
        "n_heads": 4,
        "d_mlp": 1024,
        "categories": ["cs.PL"],
        "seed": 3,
    }
    Path("mine.yaml").write_text("name: Mine\narchitecture:\n  d_model: 32\n  d_ff: 64\n  hidden_act: gelu\n")
    Path("adamw.yaml").write_text("lr: 5.0e-4\nbetas: [0.7, 0.8]\neps: 1.0e-8\n")
    cfg = read("mine.yaml", "adamw.yaml", "effect")
    assert differing(cfg) == {"d_model": 32, "d_mlp": 64, "beta1": 0.7, "beta2": 0.8}
    # The rate of training's file is not used there.
    Path("training.yaml").write_text("epochs: 3\nlearning_rate: 5e-5\noptimizer: AdamW\neffective_batch_size: 64\n")
    assert differing(read("training.yaml")) == {"epochs": 3, "batch_size": 64, "grad_accum": 2}


def test_a_file_of_another_optimizer_or_schedule_is_refused(capsys):
    Path("a.yaml").write_text("optimizer: {_target_: torch.optim.SGD, lr: 0.1}\n")
    assert "optimizer._target_ = torch.optim.SGD: the page has AdamW" in refused(capsys, "a.yaml")
    Path("b.yaml").write_text("_target_: transformers.get_constant_schedule_with_warmup\nnum_warmup_steps: 3\n")
    assert "_target_ = transformers.get_constant" in refused(capsys, "b.yaml", "--dialect=icl")


def test_sections_of_ours_are_not_of_the_source(capsys):
    Path("a.yaml").write_text("model: {d_model: 32, n_layers: 1}\nseed: 3\n")
    assert read("a.yaml") == Config(d_model=32, n_layers=1, seed=3)
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------- the earlier train.py


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--k 1 --epochs 1 --batch_size 4 --seed 42", ["--epochs=1", "--batch_size=4", "--seed=42"]),
        ("--k 1 --token_budget 1000000 --batch_size 4 --seed 42", ["--max_steps=2500"]),
        (
            "--k 3 --token_budget 1000000 --checkpoint_interval_steps 10000 --max_step_checkpoints 12 --disable_wandb",
            [
                "--max_steps=1250",
                "--batch_size=8",
                "--save_interval=10000",
                "--keep_last=12",
                "--seed=42",
                "--lr=5e-05",
            ],
        ),
        # The training plan of its scripts.
        (
            "--model_name_or_path EleutherAI/pythia-70m-deduped --k 11 --seed 0 --batch_size 256 --learning_rate 5e-5 "
            "--lr_scheduler_type cosine --num_warmup_steps 2000 --weight_decay 0.1 --gradient_accumulation_steps 8 "
            "--token_budget 2600000000 --epochs 1000 --wandb_project p --run_suffix s --upload_results_to_s3 "
            "--s3_results_bucket b --s3_results_prefix x",
            ["--batch_size=2048", "--grad_accum=8", "--max_steps=12695", "--warmup_steps=2000", "--weight_decay=0.1"],
        ),
    ],
)
def test_the_earlier_train_py_is_answered_by_what_to_type(words, parts, capsys):
    answer = refused(capsys, *words.split())
    assert "GPT-NeoX" in answer and all(part in answer.split() for part in parts)
    # What it says can be typed as it is.
    command = re.search(r"python train_arxiv\.py (.*)", answer)[1].split()
    cfg = configure(Config, command, ALIASES, ICL)
    k = int(words.split("--k ")[1].split()[0])
    assert (len(cfg.categories), cfg.d_model, cfg.data) == (k, 512, "data/arxiv")


def test_the_earlier_choice_of_categories_is_that_of_its_seed(capsys):
    # The first of the eleven names in order, after random.Random(seed).shuffle, by hand.
    for seed, first in ((42, "cs.SY"), (0, "math.AC")):
        assert f"--categories={first} " in refused(capsys, "--k=1", f"--seed={seed}")


PAPERS = {
    "train_0": ("cs.DS", 25),
    "train_1": ("cs.PL", 19),
    "validation_0": ("cs.DS", 11),
    "validation_1": ("cs.PL", 30),
}


def write_papers(folder: Path) -> np.ndarray:
    folder.mkdir()
    lengths = [length for _, length in PAPERS.values()]
    tokens = np.arange(sum(lengths), dtype=np.uint16) + 50_000
    tokens.tofile(folder / "tokens.bin")
    starts = np.cumsum([0, *lengths])
    records = [
        {"paper_id": name, "cat": cat, "offset": int(start), "length": length}
        for (name, (cat, length)), start in zip(PAPERS.items(), starts, strict=False)
    ]
    (folder / "index.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    splits = {split: [name for name in PAPERS if name.startswith(split)] for split in ("train", "validation", "test")}
    (folder / "splits.json").write_text(json.dumps(splits))
    return tokens


def test_documents_of_the_earlier_fetch_arxiv_py_are_cut_into_chunks(capsys):
    tokens = write_papers(Path("papers"))
    sizes = prepare_data.main(["arxiv", "--input=papers", "--chunk_size=10", "--out_dir=out"])
    assert sizes == {"train": {"cs.DS": 2, "cs.PL": 1}, "validation": {"cs.DS": 1, "cs.PL": 3}}
    assert "train: 3 chunks of 10 tokens; 14 tail tokens dropped" in capsys.readouterr().out  # 5 of 25, 9 of 19
    train, validation = train_and_validation("out")
    assert np.array_equal(train["tokens"], [tokens[:10], tokens[10:20], tokens[25:35]])
    assert (train["vocab_size"], train["names"]) == (50_304, ["cs.DS", "cs.PL"])
    with pytest.raises(DataError, match="holds whole documents .* prepare_data.py arxiv --input=papers"):
        train_and_validation("papers")
    assert "tokens already" in refusal(capsys, prepare_data.main, "arxiv", "--input=papers", "--tokenizer=gpt2")
    assert "'cs.DL', did you mean" in refusal(
        capsys, prepare_data.main, "arxiv", "--input=papers", "--categories=cs.DL"
    )
    (Path("papers") / "tokens.bin").write_bytes(b"1234")
    assert "speaks of 85 tokens" in refusal(capsys, prepare_data.main, "arxiv", "--input=papers", "--out_dir=no")
    assert "aws s3 cp" in refusal(capsys, prepare_data.main, "arxiv", "--download_from_s3", "--s3_bucket", "b")


def test_words_of_its_scripts_of_preparation_are_understood():
    text = " ".join(f"word{i % 7}" for i in range(60))
    documents = []
    for name in "ab":
        for split in ("train", "validation"):
            documents.append({"text": f"{name} {split} {text}", "label": name, "split": split})
    Path("docs.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    words = "dataset=arxiv_custom_filtered model=micro_decoder training.tokenization_batch_size=64 seed=42"
    small = ("arxiv", "--input=docs.jsonl", "--vocab_size=260", "--chunk_size=10")
    with pytest.warns(UserWarning, match="dataset, model, training.tokenization_batch_size"):
        prepare_data.main([*small, *words.split(), "dataset.target_split=train"])
    with pytest.warns(UserWarning, match="without effect here: full_dataset"):
        sizes = prepare_data.main([*small, "--output_dir=fetched", "--full_dataset"])
    assert sizes.keys() == {"train", "validation"} and Path("fetched/train.h5").exists()
    with h5py.File("data/docs/train.h5") as file:
        assert file.attrs["seed"] == 42


# ------------------------------------------------------------------------------------------------------------ chunks


def write_chunks(
    path: Path, rows: dict[str, int], size: int = 8, vocab: int = 50, budget: int | None = None
) -> np.ndarray:
    """A file as src/batch_tokenize_dataset.py writes it; every chunk counts up from its number."""
    path.parent.mkdir(exist_ok=True)
    names = [name for name, count in rows.items() for _ in range(count)]
    tokens = (np.arange(len(names))[:, None] + np.arange(size)) % vocab
    with h5py.File(path, "w") as file:
        file["token_chunks"] = tokens.astype(np.int32)
        file["doc_idx_for_chunk"] = np.arange(len(names), dtype=np.int32)
        file.create_dataset("category_for_chunk", data=names, dtype=h5py.string_dtype("utf-8"))
        file.attrs["selected_categories_in_file"] = sorted(rows)
        file.attrs["tokenizer_name_or_path"] = "models/tok.json"
        file.attrs["reference_chunk_budget_smallest_top_category"] = budget or min(rows.values())
    return tokens


def write_tokenizer(size: int) -> None:
    Path("models").mkdir(exist_ok=True)
    vocabulary = {f"t{i}": i for i in range(size - 1)}
    added = [{"content": "t0", "id": 0}, {"content": "<more>", "id": size - 1}]
    Path("models/tok.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": added})
    )


def files(*names: str) -> None:
    Path("d").mkdir(exist_ok=True)
    for name in names:
        Path("d", name).touch()


@pytest.mark.parametrize(
    ("there", "data", "train", "validation"),
    [
        (["train.h5", "validation.h5", "x_validation.hdf5"], "d", "train.h5", "validation.h5"),
        (["train.h5", "validation.h5"], "d/train.h5", "train.h5", "validation.h5"),
        (["train.h5", "validation.h5"], "d/validation.h5", "train.h5", "validation.h5"),
        ([f"{STEM}_train.hdf5", f"{STEM}_validation.hdf5"], "d", f"{STEM}_train.hdf5", f"{STEM}_validation.hdf5"),
        (
            [f"{STEM}_train.hdf5", f"{STEM}_validation.hdf5", f"{STEM}.hdf5"],
            "d",
            f"{STEM}_train.hdf5",
            f"{STEM}_validation.hdf5",
        ),
        ([f"{STEM}.hdf5", f"{STEM}_validation.hdf5"], "d", f"{STEM}.hdf5", f"{STEM}_validation.hdf5"),
        ([f"{STEM}.hdf5", f"{STEM}_train.hdf5"], f"d/{STEM}.hdf5", f"{STEM}.hdf5", f"{STEM}_validation.hdf5"),
        ([f"{STEM}_train.hdf5"], f"d/{STEM}.hdf5", f"{STEM}_train.hdf5", f"{STEM}_validation.hdf5"),
        ([f"{STEM}_train.hdf5"], f"d/{STEM}_test.hdf5", f"{STEM}_train.hdf5", f"{STEM}_validation.hdf5"),
        ([], "d", "train.h5", "validation.h5"),
    ],
)
def test_files_of_the_source_are_found_by_their_names(there, data, train, validation):
    files(*there)
    assert split_paths(Path(data)) == (Path("d", train), Path("d", validation))
    assert split_paths(Path(data), "elsewhere.hdf5")[1] == Path("elsewhere.hdf5")


def test_a_folder_with_several_preparations_of_the_source_asks_which():
    files("a_validation.hdf5", "b_validation.hdf5")
    with pytest.raises(DataError, match="a_validation.hdf5, b_validation.hdf5.*--data=FILE"):
        split_paths(Path("d"))


def test_the_vocabulary_of_a_file_of_the_source_is_its_tokenizer_s(capsys):
    for split in ("train", "validation"):
        write_chunks(Path(f"data/s_{split}.hdf5"), {"cs.DS": 3})
    train, validation = train_and_validation("data")
    assert train["vocab_size"] == validation["vocab_size"] == 10  # what the tokens need
    assert capsys.readouterr().err.count("names the tokenizer models/tok.json, which is not there") == 1
    write_tokenizer(33)
    assert [part["vocab_size"] for part in train_and_validation("data")] == [33, 33]
    assert chunk_arrays(Path("data/s_train.hdf5"))["vocab_size"] == 33 and capsys.readouterr().err == ""
    Path("models/tok.json").write_text("[]")
    with pytest.raises(DataError, match="cannot read the tokenizer models/tok.json, which"):
        train_and_validation("data")


def train_small(*words: str) -> dict:
    return train_arxiv.main([*TINY, *words])


def small_data() -> None:
    """Twenty and thirty chunks to train on, of which the budget is 20; a file of all splits, as is the default."""
    write_tokenizer(60)
    write_chunks(Path(f"data/{STEM}.hdf5"), {"cs.DS": 30, "math.ST": 20})
    write_chunks(Path(f"data/{STEM}_validation.hdf5"), {"cs.DS": 4, "math.ST": 4})


def metrics(split: str) -> list[dict]:
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def test_a_run_of_the_source_s_settings_on_its_files(capsys):
    small_data()
    result = train_small("experiment=k2_csDS_mathST", "log_level=DEBUG", "training.max_global_steps=4")
    out = capsys.readouterr()
    assert (result["K"], result["train_chunks"], result["steps"]) == (2, 20, 4)
    assert f"data/{STEM}.hdf5 may hold the documents of validation too" in out.err
    # The rate of a cosine over the 2 epochs of 20 / 8 steps, 5 in all, which max_global_steps stops before their end.
    rates = [record["lr"] for record in metrics("train")]
    expected = [5e-4 / 3, 1e-3 / 3, 5e-4, 5e-4]
    expected[3] = 5e-4 * 0.5 * (1 + math.cos(math.pi * 0 / 2))
    assert rates == pytest.approx(expected)
    assert [record["step"] for record in metrics("train")] == [1, 2, 3, 4]  # DEBUG: each
    assert "weight_decay = 0.1" in out.out
    assert checkpoint.load(Path("run"))["model"]["embed.weight"].shape == (60, 16)
    assert json.loads(Path("run/tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_it_trains_on_the_first_chunks_of_each_category_as_there():
    small_data()
    cfg = read(*TINY, "experiment=k2_mathST_csDS")
    train, validation = train_arxiv.open_data(cfg)
    rows = train_arxiv.training_rows(train, train_arxiv.active_categories(train, validation, cfg), cfg)
    assert rows.tolist() == [*range(10), *range(30, 40)]
    # Of a category with less than its share all it has.
    write_chunks(Path(f"data/{STEM}.hdf5"), {"cs.DS": 30, "math.ST": 4}, budget=20)
    train, validation = train_arxiv.open_data(cfg)
    assert train_arxiv.training_rows(train, ["math.ST", "cs.DS"], cfg).tolist() == [*range(10), *range(30, 34)]


def test_warm_up_is_no_longer_than_all_epochs_where_the_source_s_is_not():
    small_data()
    train_small("scheduler.num_warmup_steps=1000", "log_level=DEBUG")
    assert [record["lr"] for record in metrics("train")] == pytest.approx([5e-4 * i / 5 for i in range(1, 6)])


def test_its_script_of_experiments_is_a_study_of_nested_sets(capsys):
    small_data()
    words = ["--study=nested:1,2", "--orders=1", "--categories=math.ST,cs.DS", "training.epochs=1", "--out_dir=study"]
    sweep.main(["train_arxiv.py", *TINY, *words, "--print_config"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("/")[2] for line in lines] == ["K1_math.ST_seed42", "K2_cs.DS_math.ST_seed42"]


def test_its_numbers_are_of_validation_and_its_test_file_is_found_when_asked_for():
    small_data()
    write_chunks(Path(f"data/{STEM}_test.hdf5"), {"cs.DS": 3, "math.ST": 3})
    assert train_small("training.epochs=1")["final_split"] == "validation"
    summary = train_small("training.epochs=1", "final_split=test", "out_dir=other")
    assert summary["final_split"] == "test" and summary["test_xe"] != summary["val_xe"]
    with np.load("other/documents.npz") as file:
        assert file["counts"].sum() == 6  # chunks of the test


def test_inspect_finds_documents_of_validation_in_a_file_of_all_splits(capsys):
    small_data()
    with pytest.raises(DataError):
        prepare_data.inspect("data/nothing.hdf5")
    found = prepare_data.main(["inspect", f"data/{STEM}_validation.hdf5"])
    assert f"8 chunks are in {STEM}.hdf5 too: the splits leak" in found["problems"]
    assert list(prepare_data.main(["inspect", "data"])) == [STEM, f"{STEM}_validation"]
    assert "the splits leak" in capsys.readouterr().out


def test_without_validation_a_run_is_measured_at_its_end_alone():
    small_data()
    train_small("training.perform_validation=False", "training.epochs=3")
    assert [record["step"] for record in metrics("eval")] == [8]  # 3 epochs of 20 / 8


def test_its_weights_start_and_decay_as_there():
    cfg = read("--dialect=icl")
    torch.manual_seed(0)
    model = train_arxiv.build_model(cfg, 500, 99)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05), name
    groups = train_arxiv.parameter_groups(model, cfg)
    assert {group["weight_decay"] for group in groups} == {0.1}
    ours = train_arxiv.parameter_groups(model, Config())
    assert [group["weight_decay"] for group in ours] == [0.1, 0.0]


def test_a_quiet_run_writes_its_results_and_says_nothing(capsys):
    small_data()
    train_small("logging.level=WARNING", f"--data=data/{STEM}.hdf5")
    assert capsys.readouterr().out == "" and Path("run/train.log").read_text() == ""
    assert json.loads(Path("run/summary.json").read_text())["K"] == 1 and metrics("eval")


# ------------------------------------------------------------------------------------------------------- W&B and .env


@pytest.fixture
def board(monkeypatch) -> list[dict]:
    """A package wandb that notes what it is started with."""
    started = []

    def init(**options):
        environment = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
        started.append(options | {"environment": environment})
        return SimpleNamespace(id="abc")

    fake = SimpleNamespace(init=init, log=lambda *args, **options: None, finish=lambda **options: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    small_data()
    return started


DOTENV = """\ufeff# keys
WANDB_API_KEY = "secret # no comment"  # mine
export WANDB_PROJECT=from_file # not this
WANDB_ENTITY='team'
WANDB_MODE=offline   # for now
OTHER=a#b
EMPTY=   # nothing
"""


def test_dotenv_lines_have_quotes_comments_spaces_and_export(monkeypatch):
    monkeypatch.setattr(os, "environ", {"WANDB_ENTITY": "environment"})
    Path(".env").write_text(DOTENV, encoding="utf-8")
    names = ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "OTHER", "EMPTY", "ABSENT")
    expected = ["secret # no comment", "from_file", "environment", "offline", "a#b", "", None]
    assert [runlog._dotenv(name) for name in names] == expected
    Path(".env").write_bytes(b"OTHER=\xff\nWANDB_MODE=offline\n")  # of another encoding
    assert runlog._dotenv("WANDB_MODE") == "offline"
    Path(".env").unlink()
    Path(".env").mkdir()  # a virtual environment
    assert runlog._dotenv("WANDB_MODE") is None


def test_wandb_takes_its_key_mode_project_and_entity_from_the_file(board):
    Path(".env").write_text(DOTENV, encoding="utf-8")
    train_small("--wandb")
    started = board[0]
    assert (started["project"], started["entity"], started["mode"]) == ("from_file", "team", None)
    assert started["environment"] == {"WANDB_API_KEY": "secret # no comment", "WANDB_MODE": "offline"}
    train_small("wandb.mode=online", "wandb.project=typed", "--resume=never")
    assert (board[1]["project"], board[1]["mode"]) == ("typed", "online")


def test_a_file_that_speaks_of_wandb_and_does_not_turn_it_on_is_told(board, capsys):
    train_small("wandb.project=typed")
    assert board == [] and "note: W&B is off" in capsys.readouterr().err


def test_the_environment_wins_over_the_file_and_disabled_over_all(board, capsys):
    Path(".env").write_text(DOTENV, encoding="utf-8")
    os.environ["WANDB_MODE"] = "disabled"
    train_small("wandb.mode=online")
    assert board == [] and "W&B is off: WANDB_MODE=disabled" in capsys.readouterr().out
    train_small("wandb.mode=disabled", "--resume=never")
    train_small("--resume=never")
    assert board == []


# ------------------------------------------------------------------------------------------------------- checkpoints

SIZES = {"d_model": 24, "n_layers": 2, "n_heads": 3, "d_ff": 40, "max_position_embeddings": 12}


def source_weights(vocab_size: int = 17, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a MicroDecoderModel; GPT-2's matrices are stored [in, out]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    width, inner = SIZES["d_model"], SIZES["d_ff"]
    weights = {
        "token_embeddings.weight": draw(vocab_size, width),
        "position_embeddings.weight": draw(SIZES["max_position_embeddings"], width),
    }
    shapes = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, inner),
        "mlp.c_proj": (inner, width),
    }
    for layer in range(SIZES["n_layers"]):
        for norm in ("ln_1", "ln_2"):
            weights[f"layers.{layer}.{norm}.weight"] = draw(width) + 1
            weights[f"layers.{layer}.{norm}.bias"] = draw(width)
        for name, shape in shapes.items():
            weights[f"layers.{layer}.{name}.weight"] = draw(*shape)
            weights[f"layers.{layer}.{name}.bias"] = draw(shape[1])
        weights[f"layers.{layer}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()  # a mask of older transformers
    weights |= {"final_ln.weight": draw(width) + 1, "final_ln.bias": draw(width)}
    return weights | {"lm_head.weight": weights["token_embeddings.weight"]}


def plain_logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The source's decoder for one sequence [T], written out: [T, V]."""
    heads, width = SIZES["n_heads"], SIZES["d_model"]
    size = width // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(1, keepdim=True)
        spread = (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["token_embeddings.weight"][tokens] + weights["position_embeddings.weight"][: len(tokens)]
    for layer in range(SIZES["n_layers"]):
        block = f"layers.{layer}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        heard = []
        for head in range(heads):
            q, k, v = (qkv[:, part * width + head * size :][:, :size] for part in range(3))
            scores = q @ k.T / math.sqrt(size)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            heard.append(scores.softmax(1) @ v)
        x = x + linear(torch.cat(heard, 1), f"{block}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x, "final_ln") @ weights["token_embeddings.weight"].T


def parameters_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those that an optimizer has: no masks, and the head is the embedding."""
    return {name: w for name, w in weights.items() if ".attn.bias" not in name and name != "lm_head.weight"}


def write_source(
    path: str = "latest.pt",
    weights: dict | None = None,
    optimizer: dict | None = None,
    step: int | str = 77,
    training: dict | None = None,
    **architecture,
) -> dict[str, torch.Tensor]:
    weights = source_weights() if weights is None else weights
    settings = {
        "seed": 5,
        "model": {"architecture": SIZES | architecture, "custom_tokenizer_path": "models/tok.json"},
        "dataset": {"token_chunk_size": 12, "hdf5_chunked_output_path": f"data/{STEM}.hdf5"},
        "training": training or {"batch_size": 4, "effective_batch_size": 9, "epochs": 3},
        "optimizer": {"lr": 2e-3, "betas": [0.8, 0.9]},
        "scheduler": {"num_warmup_steps": 5},
        "experiment": {"active_categories": ["cs.DS", "math.ST"]},
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "epoch": 1,
            "step": step,
            "model_state_dict": weights,
            "optimizer_state_dict": optimizer or {},
            "metrics": {"val_loss": 3.0},
            "hydra_config_resolved": settings,
            "best_metric_value_at_save": math.inf,
        },
        path,
    )
    return weights


def test_a_checkpoint_of_the_source_predicts_what_it_predicts_there():
    weights = write_source()
    cfg, model, step, extra = train_arxiv.load_run(Path("latest.pt"), "cpu")
    assert (step, extra["vocab_size"], extra["n_ctx"], extra["categories"]) == (77, 17, 11, ["cs.DS", "math.ST"])
    assert (cfg.d_model, cfg.n_layers, cfg.n_heads, cfg.d_mlp) == (24, 2, 3, 40)
    assert (cfg.batch_size, cfg.grad_accum, cfg.lr, cfg.epochs, cfg.seed) == (8, 2, 2e-3, 3, 5)
    tokens = torch.randint(17, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, _ = model.eval()(tokens)
    for row, sequence in zip(logits, tokens, strict=True):
        expected = plain_logits(weights, sequence)
        assert float(expected.std()) > 0.5 and float((row - expected).abs().max()) < 1e-5


def test_of_a_run_without_a_history_no_losses_are_drawn():
    draw_history(Path("plots"), "imported", [])
    assert not Path("plots").exists()


def test_a_compiled_checkpoint_reads_the_same():
    write_source("plain.pt")
    write_source("compiled.pt", {f"_orig_mod.{name}": weight for name, weight in source_weights().items()})
    plain, compiled = (
        source_checkpoint(Path(name), ICL_NEWEST.defaults)["model"] for name in ("plain.pt", "compiled.pt")
    )
    assert plain.keys() == compiled.keys() and all(torch.equal(plain[name], compiled[name]) for name in plain)


def test_a_checkpoint_of_a_run_that_was_to_stop_early_says_when():
    for limit, expected in ((9, 9), (-1, None)):
        write_source("x.pt", training={"batch_size": 4, "max_global_steps": limit})
        assert source_checkpoint(Path("x.pt"), ICL_NEWEST.defaults)["config"]["max_steps"] == expected


def test_a_checkpoint_of_the_source_is_imported_sampled_and_measured(capsys):
    write_tokenizer(17)
    write_source("outputs/runs/day/checkpoints/best_model.pt")
    file = Path("outputs/runs/day/checkpoints/best_model.pt")
    result = prepare_data.main(["import", str(file), "--out_dir=out/x"])
    said = capsys.readouterr().out
    assert (result["experiment"], result["step"]) == ("arxiv", 77) and "--analyze=out/x --data=FOLDER" in said
    assert Path("out/x/tokenizer.json").read_bytes() == Path("models/tok.json").read_bytes()
    foreign, ours = (train_arxiv.load_run(path, "cpu")[1].state_dict() for path in (file, Path("out/x")))
    assert foreign.keys() == ours.keys() and all(torch.equal(foreign[name], ours[name]) for name in ours)
    drawn = sample.main([str(file), "--length=6", "--num_samples=1", "--device=cpu"])
    assert drawn["step"] == 77 and len(drawn["samples"][0]["tokens"]) == 6
    for split in ("train", "validation"):
        write_chunks(Path(f"data/s_{split}.hdf5"), {"cs.DS": 4, "math.ST": 4, "cs.PL": 4}, size=12, vocab=15)
    measured = train_arxiv.main([f"--analyze={file}", "--data=data", "--bootstrap=5", "--no-probe", "--device=cpu"])
    results = json.loads((file.parent / "analysis/results.json").read_text())
    assert measured["val_xe"] > 1 and results["data"]["path"] == f"data/{STEM}.hdf5"
    assert results["measured_on"]["path"] == "data"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda weights: write_source("x.pt", weights, hidden_act="gelu_new"),
            "hidden_act = gelu_new: the page has gelu alone",
        ),
        (
            lambda weights: write_source("x.pt", weights | {"lm_head.weight": weights["lm_head.weight"] + 1}),
            "a head of its own",
        ),
        (lambda weights: torch.save(weights, "x.pt"), "does not say its number of heads"),
        (lambda weights: write_source("x.pt", weights, n_heads=5), "says n_heads = 5 of a width of 24"),
        (
            lambda weights: write_source("x.pt", {name: w * math.nan for name, w in weights.items()}),
            "token_embeddings.weight is not finite: its training diverged",
        ),
        (lambda weights: write_source("x.pt", weights, step="last"), "no whole checkpoint of the source .ValueError"),
        (
            lambda weights: write_source("x.pt", weights, training={"batch_size": 0}),
            "no whole checkpoint of the source .ZeroDivisionError",
        ),
        (
            lambda weights: write_source("x.pt", {name: w for name, w in weights.items() if "mlp" not in name}),
            "no whole checkpoint of the source .KeyError: 'blocks.0.mlp_in.weight'",
        ),
        (
            lambda weights: write_source("x.pt", weights | {"layers.0.adapter.weight": torch.ones(2, 2)}),
            "layers.0.adapter",
        ),
    ],
)
def test_a_checkpoint_that_the_page_cannot_be_is_refused(spoil, sentence):
    spoil(source_weights())
    with pytest.raises(CheckpointError, match=sentence):
        train_arxiv.load_run(Path("x.pt"))


def test_a_run_of_the_source_goes_on_from_what_is_imported(capsys):
    """Two of its steps there and one here, against three with its parameters, all of one group of AdamW."""
    start = source_weights()
    plain = {name: weight.clone().requires_grad_() for name, weight in parameters_of(start).items()}
    optimizer = torch.optim.AdamW(plain.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(9)
    gradients = [{name: torch.randn(w.shape, generator=generator) for name, w in plain.items()} for _ in range(3)]
    for gradient in gradients[:2]:
        for name, weight in plain.items():
            weight.grad = gradient[name]
        optimizer.step()
    saved = {name: weight.detach().clone() for name, weight in plain.items()}
    saved["lm_head.weight"] = saved["token_embeddings.weight"]
    write_source(weights=saved, optimizer=optimizer.state_dict())
    told = refused(capsys, "training.resume_from_checkpoint=latest.pt")
    assert "prepare_data.py import latest.pt --out_dir=out/there makes it ours, and --resume=out/there/last.pt" in told
    prepare_data.main(["import", "latest.pt", "--out_dir=out/there"])
    assert "--resume=out/there/last.pt" in capsys.readouterr().out
    cfg, model, _, _ = train_arxiv.load_run(Path("out/there/last.pt"), "cpu")
    with Runtime(cfg) as rt:
        ours = rt.adamw(train_arxiv.parameter_groups(model, cfg), lr=1e-2, betas=(cfg.beta1, cfg.beta2))
    ours.load_state_dict(checkpoint.load(Path("out/there"))["optimizer"])
    for group in ours.param_groups:
        group.update(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for name, weight in model.named_parameters():
        weight.grad = translated(gradients[2], Path("x"))[name][: len(weight)].clone()
    ours.step()
    for name, weight in plain.items():
        weight.grad = gradients[2][name]
    optimizer.step()
    expected = translated({name: weight.detach() for name, weight in plain.items()}, Path("x"))
    for name, weight in model.named_parameters():
        assert float((weight.detach() - expected[name][: len(weight)]).abs().max()) < 1e-6, name


def test_an_imported_run_has_the_settings_it_had_and_trains_on():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(weight) for weight in parameters_of(source_weights()).values()])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    write_source(optimizer=optimizer.state_dict())
    prepare_data.main(["import", "latest.pt", "--out_dir=there"])
    for split in ("train", "validation"):
        write_chunks(Path(f"data/s_{split}.hdf5"), {"cs.DS": 400, "math.ST": 400}, size=12, vocab=17)
    words = ("--resume=there/last.pt", "--data=data", "--out_dir=run", "--bootstrap=5", "--no-probe", "--max_steps=79")
    result = train_arxiv.main(["there/config.json", *words, "--validation_data=", "--log_level=DEBUG", "--device=cpu"])
    saved = json.loads(Path("run/config.json").read_text())
    names = ("lr", "batch_size", "warmup_steps", "decay", "schedule_over", "min_lr", "beta1", "epochs", "choice")
    assert [saved[name] for name in names] == [2e-3, 8, 5, "all", "epochs", 0.0, 0.8, 3, "first"]
    assert result["steps"] == 79 and [record["step"] for record in metrics("train")] == [78, 79]


def test_every_subset_of_the_five_categories_is_an_experiment_in_any_order():
    assert len(ICL_NEWEST.groups["experiment"]) == 1 + 5 + 20 + 60 + 120 + 120
