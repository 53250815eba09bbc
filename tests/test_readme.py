"""Every command of the README, of docs/, of docstrings and of config files runs, in small and in the order in which one
reads them; and what stands there about files, settings and minutes is so."""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import ROOT, SCRIPTS, Job, two_ranks
from documents import DOORS, all_commands, documents, fences, script_of, steps

import bench
import sweep
import train_arxiv
import train_ghmm
import train_state
from measure import effects, plans
from measure.glossary import FIGURES
from sources import hdf5, jobs, text
from sources.ergodic import ergodic
from sources.h5ad import write_h5ad
from sources.populations import synthetic

MAINS = {name: importlib.import_module(name).main for name in SCRIPTS + DOORS}
COMMANDS = all_commands()
FIRST = {}  # each once, where it stands first; what config files say must be done before them goes first
for command in sorted(COMMANDS, key=lambda it: not (it.where.startswith("config/") and "prepare_data.py" in it.text)):
    FIRST.setdefault(command.text, command)

# What makes a run small, behind the words of its command. A setting that the command lists values of stays.
SIZE = "--max_steps=2 --warmup_steps=0 --n_layers=1 --d_model=16 --batch_size=4"
SMALL = {
    "train_ghmm": f"{SIZE} --d_mlp=16 --max_words=100 --eval_sequences=8",
    "train_arxiv": "--epochs=1 --warmup_steps=0 --n_layers=1 --d_model=16 --batch_size=64 --d_mlp=16 --n_heads=2 "
                   "--bootstrap=5 --grad_accum=1",
    "train_apelr": f"{SIZE} --token_dim=8 --fusion_dim=8 --seq_len=32 --eval_batches=1 --final_eval_batches=1 "
                   "--preview_tokens=2 --n_heads=2",
    "train_state": f"{SIZE} --d_mlp=16 --n_heads=2 --d_head=8 --cell_set_len=8 --eval_sentences=4 "
                   "--n_encoder_layers=1 --n_decoder_layers=1",
    "sample": "--device=cpu",
    "text": "--vocab_size=300",
    "arxiv": "--vocab_size=300 --chunk_size=40",
    "planted": "--train_documents=50 --validation_documents=10",
    "ergodic": "--train_documents=10 --validation_documents=5 --chunk_size=10",
    "state preprocess": "",
    "state inspect": "",
    "state toml": "",
    "state": "--num_cell_types=4 --num_perturbations=12 --num_genes=20 --num_batches=1 --cells_per_condition=8 "
             "--controls_per_cell_type=8",
}  # fmt: skip
# Words that make many runs, and those of fewer.
FEWER = {
    "--seed=0,1,2": "--seed=0",
    "--seed=42,1337,0": "--seed=42",
    "seed=0,1,2": "seed=0",
    "seed=range(3)": "seed=range(1)",
    "--study=nested:1,2,4": "--study=k=4",
    "--study=nested:1,2": "--study=k=5",
    "--budget_tokens=369600": "--budget_tokens=2000",
    "--study=all31": "--study=k=5",
    "--process=mess3,even_ones,rrxor": "--process=mess3,rrxor",
    "--num_plan_states=1,2,4,8": "--num_plan_states=1,2",
    "--holdout=each": "--holdout=c0",
    "--trials=20": "--trials=2",
    "--max_steps=3000": "--max_steps=3",
}
# Placeholders, and what is run for them.
FILLED = {
    "prepare_data.py JOB": "prepare_data.py planted",
    "prepare_data.py JOB --help": "prepare_data.py text --help",
    "sample.py RUN": "sample.py out/ghmm",
    "sweep.py PAGE": "sweep.py train_ghmm.py --seed=0,1 --print_config",
    "sweep.py report": "sweep.py report out/ghmm",
    "python sweep.py report out/ghmm_sweep_1a2b3c": "sweep.py report out/ghmm out/sns",
    "python sweep.py report out/ghmm_sweep_1a2b3c --open": "sweep.py report out/ghmm out/sns --open",
    "python train_ghmm.py --dialect=simplexity": "train_ghmm.py --dialect=simplexity --out_dir=out/simplexity",
    "python train_ghmm.py --config-name=experiment": "train_ghmm.py --config-name=experiment --out_dir=out/experiment",
    "sweep.py report FOLDER_OR_RUNS...": "sweep.py report out/ghmm out/sns",
    "sample.py out/mine": "sample.py out/ghmm",
    "sample.py RUN --help": "sample.py out/ghmm --help",
    "python sample.py out/x --json | python -m json.tool": "sample.py out/ghmm --json | python -m json.tool",
    "prepare_data.py state toml --input=FILE.h5ad": "prepare_data.py state toml --input=cells.h5ad",
    'python sample.py out/arxiv_small/K1_cs.DS_seed0 --prompt="We give a faster algorithm" --top_k=50':
        'sample.py out/papers --prompt="We" --top_k=50',
    "prepare_data.py cells --toml=...": "prepare_data.py cells --toml=data/state/synthetic.toml",
    "prepare_data.py inspect data/cells/NAME-HASH": "prepare_data.py inspect data/cells/synthetic-*",
    "python prepare_data.py inspect FOLDER": "prepare_data.py inspect data/ergodic",
}
# Only planned (--print_config), and why.
PLANNED = {
    "python train_arxiv.py config/arxiv_small.py --study=all31 --controls --seed=0,1 --jobs=2": "102 runs",
    "python train_arxiv.py config/arxiv.py --study=all31 --controls": "46 runs",
    'python sweep.py train_ghmm.py --seed=0,1 --launcher="torchrun --standalone --nproc_per_node=2"':
        "torchrun starts interpreters, and each reads torch",
    "python sweep.py train_arxiv.py --study=nested:1,2,4 --seed=0,1": "as another line of the README, twice",
    "python train_ghmm.py --dialect=simplexity -m train.batch_size=16,32": "runs of another line",
    "python train_ghmm.py --config-name=experiment -m": "a search of 20 runs",
}  # fmt: skip
# Commands on files of other systems, which other tests make: {that test: {command: what is in its text}}.
ELSEWHERE = {
    "test_dialect_apelr.py": {
        "python train_apelr.py X.yaml train.lr=3e-4": "theirs.yaml",
        "python train_apelr.py X.yaml": "theirs.yaml",
        "python train_apelr.py theirs.yaml": "theirs.yaml",
        "torchrun --nproc_per_node=8 train_apelr.py X.yaml": 'two_ranks("train_apelr", path',
        "python prepare_data.py text ...": "prepare_data.main(asked_for(told))",
    },
    "test_foreign_apelr.py": {
        "python train_apelr.py X.yaml --resume=runs/x": '["theirs.yaml", f"--data={text}", "--resume=runs/x"]',
        "python train_apelr.py --init_from=runs/x --data=FOLDER": '"--init_from=runs/x"',
        "python train_apelr.py --analyze=runs/x --data=FOLDER": '"--analyze=runs/x"',
        'python sample.py runs/x --prompt "..."': '"--prompt", "Once upon a time"',
        "python prepare_data.py import runs/x --out_dir=out/x": 'prepare_data.main, "import", "runs/x"',
        "python prepare_data.py text --tokenizer=runs/x/tokenizer.json --input=...": "--tokenizer={itos}",
    },
    "test_dialect_state.py": {
        "python train_state.py tx train ...": '"tx train data.kwargs.toml_config_path=a.toml',
        "python train_state.py tx train model=state_sm data.kwargs.toml_config_path=data/my.toml":
            '"tx train data.kwargs.toml_config_path=a.toml',
        "python train_state.py train ...": '"train data.kwargs.toml_config_path=starter.toml',
        "python train_state.py train": '["train", "smolstate train',
        "python train_state.py train --resume ...": "checkpoints/last.ckpt of a small model",
        "python train_state.py FILE.yaml ... --toml=a.toml": 'read("m.yaml", TOML',
        "python train_state.py training.yaml ...": 'write(f"old{i}.yaml", whole)',
        "python prepare_data.py state preprocess ...": "tx preprocess_train",
    },
    "test_foreign_state.py": {
        "python train_state.py ... --source_files": 'runs("--source_files")',
        "python train_state.py --init_from=RUN ...": 'f"--init_from={folder}"',
        "python sample.py RUN": "sample.main([str(path)",
        "python sample.py RUN --adata=FILE": '"--adata=other.h5ad"',
        "python prepare_data.py import RUN --out_dir=out/x": '["import", str(folder), "--out_dir=out/x"]',
        "python prepare_data.py import FILE_OR_FOLDER --out_dir=out/x": '"import", str(folder), "--out_dir=out/x"',
    },
    "test_prepare_state.py": {
        "prepare_data.py state preprocess": "def test_preprocess_is_the_same_in_blocks",
    },
    "test_dialect_ghmm.py": {
        "python prepare_data.py import STEP/model.pt --out_dir=out/x": '["import", str(path), "--out_dir=imported"]',
        "train_ghmm.py --analyze=": '"--analyze=imported"',
        "python train_ghmm.py config.yaml": 'train_ghmm.main(["config.yaml"',
    },
    "test_dialect_arxiv.py": {
        "python prepare_data.py import FILE": '["import", str(file), "--out_dir=out/x"]',
        "python prepare_data.py arxiv --input=preprocessed_arxiv": '"--input=papers", "--chunk_size=10"',
        "train_arxiv.py --analyze=FILE --data=data": '[f"--analyze={file}", "--data=data"',
        "python train_arxiv.py WORDS --resume=out/x/last.pt": "out/there/last.pt",
        "python train_arxiv.py config.yaml": 'read("config.yaml", "effect")',
        "python train_arxiv.py --data=FOLDER": 'write_chunks(Path(f"data/s_',
        "python train_arxiv.py --dialect=icl --study=nested:1,2,3,4,5 --orders=1 "
        "--categories=cs.DS,cs.IT,cs.PL,math.GR,math.ST training.epochs=20":
            '["--study=nested:1,2", "--orders=1"',
        "python prepare_data.py inspect data": 'prepare_data.main(["inspect", f"data/',
    },
}  # fmt: skip


class Forked:
    """What sweep.py starts its runs by: Popen, of a process that has imported the pages already."""

    def __new__(cls, command: list, stdout, **options) -> Job:
        script = next(number for number, word in enumerate(command) if str(word).endswith(".py"))
        words = [Path(command[script]).stem, *command[script + 1 :]]
        return Job("test_readme", *words, console=stdout.name, function="run_quickly")


TAKE = jobs.take


def handed_over(python: str, words: list[str]) -> None:
    """What os.execv does with a command line for sweep.py."""
    sweep.main(words[2:])
    raise SystemExit(0)


def nothing(*args, **options) -> None:
    pass


# Pictures have their own tests, and the machine is not measured.
QUICK = [(train_ghmm, "plot_run", nothing), (train_arxiv, "draw_run", nothing),
         (plans, "draw_loss", nothing), (plans, "draw_plans", nothing), (effects, "plot_metrics", nothing)]


def run_quickly(words: list[str]) -> None:
    """For a Job: a page, without the measurement of the machine."""
    for place, name, value in QUICK:
        setattr(place, name, value)
    hdf5.probe = lambda file, path: None
    MAINS[words[0]](words[1:])


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory, one_thread):
    """A folder with config/ and all that the commands name and do not make, in which all of them run."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "100")
        for place, name, value in QUICK:
            patch.setattr(place, name, value)
        patch.setattr(jobs, "LOOK_SECONDS", 0.05)
        patch.setattr(jobs, "take", lambda folder: TAKE(folder) or pytest.fail(f"{folder} is in use"))  # and no waiting
        patch.setattr(jobs, "subprocess", SimpleNamespace(Popen=Forked, DEVNULL=None))
        patch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=from_the_hub))
        patch.setattr(sweep, "comparison", lambda *args: [])
        patch.setattr("webbrowser.open", lambda url: True)
        patch.setattr(os, "execv", handed_over)
        patch.setattr("benchmarks.ghmm.check_jax", nothing)
        patch.setattr(text, "documentation", lambda: [(f"story {i}", story) for i, story in enumerate(stories())])
        patch.setattr(train_arxiv, "ergodic", functools.partial(ergodic, train_documents=20, validation_documents=5))
        patch.setattr(train_state, "synthetic", functools.partial(synthetic, **CELLS))
        shutil.copytree(ROOT / "config", "config")
        make_files()
        yield folder


CELLS = {"num_cell_types": 4, "num_perturbations": 12, "num_genes": 20, "num_batches": 1, "cells_per_condition": 8,
         "controls_per_cell_type": 8}  # fmt: skip
CATEGORIES = ("cs.DS", "math.ST", "math.GR", "cs.IT", "cs.PL")


def stories(number: int = 60, seed: int = 0) -> list[str]:
    """Texts of as many different words as a tokenizer of 1,024 tokens needs."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, 5)) for _ in range(2_000)]
    return ["Once upon a time " + " ".join(rng.choice(words, 40)) + "." for _ in range(number)]


@functools.cache
def papers(seed: int = 0) -> list[dict]:
    """Documents of five categories, enough of each for three splits."""
    return [{"text": text, "category": CATEGORIES[i % 5], "label": i % 5} for i, text in enumerate(stories(300, seed))]


def from_the_hub(name: str, config: str | None = None, streaming: bool = True) -> dict:
    """What the package datasets would give: a few documents of any name."""

    class Rows(list):
        features = {"label": SimpleNamespace(names=list(CATEGORIES))}

    splits = enumerate(("train", "validation", "test"))
    return {split: Rows({"text": paper["text"], "label": paper["label"]} for paper in papers(i)) for i, split in splits}


def make_files() -> None:
    for name in ("papers.jsonl", "FOLDER/papers.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("".join(json.dumps(record) + "\n" for record in papers()))
    Path("stories").mkdir()
    for i, story in enumerate(stories()):
        Path(f"stories/{i}.txt").write_text(story)
    Path("stories.txt").write_text("\n<|endoftext|>\n".join(stories()))
    Path("shakespeare.txt").write_text("\n\n".join(stories()))
    synthetic(out_dir="data/state", **CELLS)
    write_cells("controls.h5ad", "gene", ["non-targeting"], ["c0", "c1"])
    write_cells("counts.h5ad", "gene", ["non-targeting", "p1", "p2"], ["B", "NK", "T"], counts=True)
    write_cells("cells.h5ad", "gene", ["non-targeting", "p1", "p2"], ["B", "NK", "T"])
    write_cells("kang.h5ad", "condition", ["control", "p1"], ["c0", "c1"], counts=True)
    for name in ("k562", "rpe1", "jurkat", "hepg2"):
        perturbations = ["non-targeting", "AARS", "TUFM", "NUP107", "RPUSD4"]
        write_cells(f"data/replogle/{name}.h5", "target_gene", perturbations, [name], "batch_var")
    for name, column, batch in (("my", "gene", "gem_group"), ("data/my", "gene", "gem_group"),
                                ("starter", "target_gene", "batch_var")):  # fmt: skip
        write_cells(f"{name}.h5ad", column, ["non-targeting", "p1"], ["B", "NK", "T"], batch)
        Path(f"{name}.toml").write_text(f'[datasets]\nmine = "{Path(name).name}.h5ad"\n[training]\nmine = "train"\n'
                                        '[zeroshot]\n"mine.NK" = "test"\n')  # fmt: skip
    np.savez("my.npz", transition_matrices=np.array([[[0.9, 0.0], [0.0, 0.4]], [[0.0, 0.1], [0.6, 0.0]]]))
    Path("prompts.txt").write_text("Once upon a time\nA cat\n")
    for peer in ("NANOGPT", "APELR", "SIMPLEXITY", "PATH"):
        for file in ("model.py", "src/apelr/model_v2.py", "simplexity/generative_processes/hidden_markov_model.py"):
            Path(peer, file).parent.mkdir(parents=True, exist_ok=True)
            Path(peer, file).touch()


def write_cells(path: str, column: str, perturbations: list[str], types: list[str], batch: str = "gem_group",
                counts: bool = False) -> None:  # fmt: skip
    """An h5ad of ten cells of each perturbation and type, 20 genes, with these columns of obs."""
    pert, kind = np.divmod(np.repeat(np.arange(len(perturbations) * len(types)), 10), len(types))
    X = np.random.default_rng(0).poisson(3, (len(pert), 20)).astype(np.float32)
    X = X if counts else np.log1p(X)
    obs = {column: np.array(perturbations)[pert], "cell_type": np.array(types)[kind], batch: np.full(len(pert), "b0")}
    genes = [f"g{i:02}" for i in range(20)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_h5ad(path, X, obs, genes, {} if counts else {"X_hvg": X}, var={"highly_variable": np.ones(20, bool)})


# ---------------------------------------------------------------------------------------------------------------
# Python
# ---------------------------------------------------------------------------------------------------------------
PROGRAMS = [fence for path in documents() for fence in fences(path) if fence.language == "python" and not fence.inner]


@pytest.mark.parametrize("fence", PROGRAMS, ids=lambda fence: f"{fence.path.name}:{fence.line}")
def test_every_program_runs(fence):
    exec(compile(fence.text, str(fence.path), "exec"), {})  # noqa: S102


# ---------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------
SETUP = ("python3 -m venv .venv", ".venv/bin/pip install -r requirements.txt", ".venv/bin/python -m pytest -q",
         "python -m json.tool")  # fmt: skip


def named(word: str) -> str:
    """The setting of a word."""
    return word.lstrip("-").partition("=")[0]


def small(name: str, words: list[str]) -> list[str]:
    """The words of a page or door with those that make it small; what is listed stays, and what FEWER has said."""
    kept = {named(word) for word in words if word in FEWER or "," in word or ".." in word}
    words = [FEWER.get(word, word) for word in words]
    if any(named(word) == "report" for word in words):  # trains nothing, and takes no settings
        return words
    job = " ".join(words[:2]) if " ".join(words[:2]) in SMALL else words[0] if words else ""
    kind = {"sweep": job.removesuffix(".py"), "prepare_data": job}.get(name, name)
    return words + [word for word in SMALL.get(kind, "").split() if named(word) not in kept]


def run(name: str, words: list[str], ranks: bool = False) -> None:
    """A page or a door, which must end with 0."""
    words = [path for word in words for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    if ranks:
        two_ranks(name, *words)
        return
    said = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if name == "bench" and words:  # minutes, and peers
                bench.check(bench.parse(words))
            else:
                MAINS[name](words)
        except SystemExit as end:
            code = end.code
    assert not code, f"{name}.py {' '.join(words)}\n{said.getvalue()}"


SEVERAL = ("study", "controls", "holdout", "equal_parameters", "trials")
RAN = set()


def kind_of(name: str, words: list[str], ranks: bool) -> tuple | None:
    """What kind of several processes a command starts, and of which page; None of one. One of a kind is run."""
    if ranks:
        return "torchrun", name
    names = {named(word) for word in words if word.startswith("-")} & {*SEVERAL}
    if name == "sweep" and words[0] != "report":
        return words[0].removesuffix(".py"), *sorted(names)
    return (name, *sorted(names)) if name in SCRIPTS and (names or "-m" in words) else None


@pytest.mark.parametrize("command", FIRST.values(), ids=lambda command: f"{command.where} {command.text[:60]}")
def test_every_command_runs(command, monkeypatch):
    for file, commands in ELSEWHERE.items():
        if command.text in commands:
            told = f"{file} has no {commands[command.text]} any more, which was {command.text}: correct ELSEWHERE"
            assert commands[command.text] in (ROOT / "tests" / file).read_text(encoding="utf-8"), told
            return
    for words in steps(FILLED.get(command.text, command.text)):
        found = script_of(words)
        if found is None:
            if words[0] == "echo":
                monkeypatch.setattr("sys.stdin", io.StringIO(" ".join(words[1:])))
            else:
                assert " ".join(words) in SETUP, f"{command.where}: {words}: put it into SETUP"
            continue
        name, words, ranks = found
        kind = kind_of(name, words, ranks)
        if kind:
            run(name, [*words, "--print_config"])  # all that the words as they stand would run
        if kind not in RAN and command.text not in PLANNED:
            run(name, small(name, words), ranks)
        RAN.update([kind] if kind and command.text not in PLANNED else [])


def test_the_tables_here_name_no_command_that_stands_nowhere():
    known = {command.text for command in COMMANDS}
    named_here = [*FILLED, *PLANNED, *(text for commands in ELSEWHERE.values() for text in commands)]
    assert [text for text in named_here if text not in known] == []


# ---------------------------------------------------------------------------------------------------------------
# Names of results
# ---------------------------------------------------------------------------------------------------------------
def names_in(value) -> set[str]:
    """The keys of what a JSON file holds, at any depth."""
    if isinstance(value, list):
        return set().union(*map(names_in, value))
    return set(value).union(*map(names_in, value.values())) if isinstance(value, dict) else set()


@pytest.mark.parametrize("experiment", [name for name in FIGURES if name])
def test_every_name_of_a_glossary_is_in_a_file_of_a_run(experiment):
    """Of the runs above: summary.json and the other files of a run, tables of a study."""
    found = set()
    for folder in {path.parent for path in Path("out").rglob("summary.json")}:
        if (folder / f"train_{experiment}.py").exists():
            for path in folder.rglob("*.json"):
                found |= names_in(json.loads(path.read_text()))
    for path in (ROOT / "measure").glob("*.py"):  # and tables of several runs
        if path.name != "glossary.py":
            found |= set(re.findall(r'"(\w+)"', path.read_text(encoding="utf-8")))
    assert sorted(set(FIGURES[experiment]) - found) == []
