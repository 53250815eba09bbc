"""Faults on purpose: kill, damage, fill the disk, type nonsense, and count what comes of it.

    python tests/faults.py                     # all kinds, as often as COUNTS says: 25 minutes on two cores
    python tests/faults.py --short             # a few of each kind, as tests/test_faults.py does
    python tests/faults.py --only=last.pt,toml --seed=7 --json=found.json
    python tests/faults.py --only=toml:31      # one trial again, with what it printed and where its files are

A trial is a pure function of (seed, kind, number). It runs the scripts as they are, in a forked process: their exit
code, what they print and what they compute is all that counts. It ends in one of these columns:

    clear       exit code 1 or 2 and one `error:` line that names what is wrong; or a line that names the file left out
    right       exit code 0, and what was computed is what the undisturbed run computes, or for a text file what an
                independent parser says that the damaged text means
    traceback   a traceback or a crash of the process
    hang        it did not end
    silent      exit code 0 and something else was computed, without a word
    vague       an error line that does not say which file
    unnoticed   other values in a file that has no checksum and reads as a file of those values: nobody could tell
"""

import argparse
import ast
import contextlib
import gzip
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import h5py  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import tqdm  # noqa: E402
import yaml  # noqa: E402
from commands import server  # noqa: E402

COLUMNS = ("clear", "right", "traceback", "hang", "silent", "vague", "unnoticed")
GOOD = ("clear", "right", "unnoticed")
PATIENCE_S = 100  # a trial that takes longer hangs: the slowest takes 10 on two busy cores
MEMORY = 12 << 30  # bytes of address space of a trial: what asks for more is refused by the system
TIMED = {
    "time_s",
    "seconds",
    "step/tokens_per_second",
    "cum/tokens_per_second",
    "tokens_per_second",
    "cells_per_second",
    "cells_per_s",
    "tokens_per_s",
    "out_dir",
    "mfu",
    "torch",
}

# ---------------------------------------------------------------------------------------------------------------
# Small runs of the four scripts, and the files that they read
# ---------------------------------------------------------------------------------------------------------------
COMMON = [
    "--batch_size=8",
    "--max_steps=6",
    "--warmup_steps=0",
    "--log_interval=1",
    "--eval_interval=2",
    "--save_interval=2",
    "--device=cpu",
    "--precision=fp32",
]
SIZES = ["--n_layers=1", "--d_model=8"]
TINY = {
    "ghmm": [*COMMON, *SIZES, "--d_mlp=8", "--n_ctx=4", "--max_words=100", "--eval_sequences=16"],
    "arxiv": [*COMMON, *SIZES, "--n_heads=2", "--d_mlp=8", "--bootstrap=5", "--no-probe", "--data=data/ergodic"],
    "apelr": [
        *COMMON,
        *SIZES,
        "--num_plan_states=2",
        "--chunk_size=4",
        "--seq_len=15",
        "--token_dim=4",
        "--eval_batches=1",
        "--final_eval_batches=1",
        "--preview_tokens=0",
        "--data=data/text",
    ],
    "state": [
        *COMMON,
        *SIZES,
        "--n_heads=2",
        "--d_mlp=8",
        "--cell_set_len=4",
        "--eval_sentences=4",
        "--toml=data/cells.toml",
    ],
}


def training(page: str, *words: str, out: str = "new") -> list[str]:
    """The command of a small run."""
    return [f"train_{page}", *TINY[page], f"--out_dir={out}", *words]


def make_goods(_) -> None:
    """Fill the current folder: data/ (files to read), out/ (a run of each script, at step 4 of 6), ended/ (the whole
    runs), foreign/ (checkpoints of the source systems), config/ (settings in every notation)."""
    import prepare_data
    from sources.h5ad import H5ad, as_dense, write_h5ad

    write_texts()
    parts = [{"name": "a", "process": "coin", "p": 0.9}, {"name": "b", "process": "coin", "p": 0.1}]
    prepare_data.main(
        [
            "ergodic",
            f"--components={json.dumps(parts)}",
            "--train_documents=12",
            "--chunk_size=8",
            "--validation_documents=5",
            "--test_documents=0",
            "--out_dir=data/ergodic",
        ]
    )
    prepare_data.main(
        ["text", "--input=data/stories.jsonl.gz", "--tokenizer=char", "--val_fraction=0.3", "--out_dir=data/text"]
    )
    prepare_data.main(
        [
            "state",
            "--num_cell_types=4",
            "--num_perturbations=3",
            "--num_genes=20",
            "--num_batches=2",
            "--cells_per_condition=8",
            "--controls_per_cell_type=8",
            "--out_dir=data",
        ]
    )
    with H5ad("data/synthetic.h5ad") as file:
        dense = np.concatenate([as_dense(block) for _, _, block in file.matrix(None).blocks()])
        columns = {}
        for name in ("gene", "cell_type", "gem_group"):
            codes, names = file.column(name)
            columns[name] = np.array(names)[codes]
        genes = file.gene_names
    import scipy.sparse

    for name, X in (("cells", dense), ("sparse", scipy.sparse.csr_array(dense))):
        write_h5ad(f"data/{name}.h5ad", X, columns, genes, {"X_hvg": X}, var={"highly_variable": [True] * len(genes)})
        text = Path("data/synthetic.toml").read_text().replace("synthetic", name)
        Path(f"data/{name}.toml").write_text(text)
    write_configs()
    write_foreign()
    for page in TINY:
        main = importlib.import_module(f"train_{page}").main
        main(training(page, "--keep_last=-1", out=f"out/{page}")[1:])
        shutil.copytree(f"out/{page}", f"ended/{page}")
        for file in Path(f"out/{page}").iterdir():
            if file.name not in ("step_4.pt", "config.json", "metrics.jsonl", "tokenizer.json", f"train_{page}.py"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        Path(f"out/{page}/step_4.pt").rename(f"out/{page}/last.pt")
        for file in Path(f"ended/{page}").glob("step_*"):
            file.unlink()


def write_texts() -> None:
    """data/stories.jsonl.gz, data/papers.jsonl.gz and data/matrices.npz."""
    Path("data").mkdir()
    lines = [
        {"text": f"Once upon a time {who} found {what} {n} times.", "category": what.split()[1]}
        for n in range(9)
        for who in ("Lily", "Beep")
        for what in ("a needle", "the fuel")
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for name in ("stories", "papers"):
        Path(f"data/{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        Path(f"data/{name}.jsonl").write_text(text)
    T = np.array([[[0.5, 0.1], [0.2, 0.3]], [[0.1, 0.3], [0.3, 0.2]]])
    np.savez("data/matrices.npz", matrices=T)


SETTINGS = {
    "model": "gru",
    "lr": 3e-3,
    "n_layers": 1,
    "d_model": 8,
    "n_ctx": 4,
    "process": "mess3",
    "x": 0.15,
    "a": 0.6,
    "act": "gelu",
    "schedule": "cosine",
    "carry_state": False,
    "seed": 3,
}


def write_configs() -> None:
    """config/tiny.json .yaml .py, for train_ghmm.py."""
    Path("config").mkdir()
    settings = {name: value for name, value in SETTINGS.items() if name not in ("x", "a")}
    Path("config/tiny.json").write_text(json.dumps(settings, indent=1))
    Path("config/tiny.yaml").write_text("# a comment\n" + yaml.safe_dump(settings))
    lines = [f"{name} = {value!r}  # a comment\n" for name, value in settings.items()]
    Path("config/tiny.py").write_text('"""A small run."""\n' + "".join(lines))


def write_foreign() -> None:
    """foreign/ghmm foreign/arxiv foreign/apelr: checkpoints in the forms of the source systems."""
    import test_dialect_arxiv
    import test_dialect_ghmm
    import test_foreign_apelr

    import prepare_data

    Path("foreign/apelr").parent.mkdir()
    Path("foreign/itos.json").write_text(json.dumps({"itos": test_foreign_apelr.ITOS}))
    test_foreign_apelr.source_run("foreign/apelr", Path("foreign/itos.json"))
    prepare_data.main(
        [
            "text",
            "--input=data/stories.jsonl",
            "--tokenizer=foreign/itos.json",
            "--val_fraction=0.3",
            "--out_dir=foreign/own",
        ]
    )
    test_dialect_ghmm.put(test_dialect_ghmm.hooked_weights(), folder="foreign/ghmm")
    test_dialect_arxiv.write_source("foreign/arxiv/latest.pt")


# ---------------------------------------------------------------------------------------------------------------
# A command in a process of its own
# ---------------------------------------------------------------------------------------------------------------
class Ending(NamedTuple):
    """How a command ended: exit code (negative: the signal that ended it; None: it did not end), what it printed, and
    a digest of what it computed."""

    code: int | None
    text: str
    finding: str

    def verdict(self) -> str:
        """A column, or "" where it ended with 0 and its finding decides."""
        if self.code is None:
            return "hang"
        if "Traceback (most recent" in self.text or self.code < 0 or self.code not in (0, 1, 2, 130):
            return "traceback"
        if self.code == 0:
            return ""
        errors = [line for line in self.text.splitlines() if line.startswith("error: ")]
        return "clear" if errors and min(map(len, errors)) > 20 else "vague"


class Process:
    """A command that runs in the current folder; hooks are called in it before it starts."""

    def __init__(self, words: list[str], *hooks: Callable[[], None], **environment: str):
        self.console, self.finding = Path("..", f"console.{time.monotonic_ns()}"), Path("..", "finding")
        self.finding = self.console.with_name(self.console.name.replace("console", "finding"))
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.environ.update(environment)
                code = perform(words, hooks, self.console, self.finding)
            finally:
                os._exit(code)
        self.code: int | None = None
        self.is_over = False

    def poll(self) -> bool:
        if not self.is_over:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.is_over, self.code = True, os.waitstatus_to_exitcode(status)
        return self.is_over

    def wait(self, seconds: float = PATIENCE_S) -> Ending:
        """Its end, within so many seconds, after which it is killed."""
        deadline, pause = time.monotonic() + seconds, 0.001
        while not self.poll() and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        if not self.is_over:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.is_over = True
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        finding = self.finding.read_text() if self.finding.exists() else ""
        return Ending(self.code, text, finding)


def run(words: list[str], *hooks: Callable[[], None], seconds: float = PATIENCE_S, **environment: str) -> Ending:
    return Process(words, *hooks, **environment).wait(seconds)


def perform(words: list[str], hooks, console: Path, finding: Path) -> int:
    """What a forked process does: main of a script, as the interpreter would; returns the exit code."""
    descriptor = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)
    finding = finding.resolve()
    here = os.getcwd()
    value = None
    code = 0
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        without_pictures()
        for hook in hooks:
            hook()
        value = importlib.import_module(words[0]).main(words[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if code == 0:
        os.chdir(here)
        printed = "" if value is not None and "inspect" not in words else Path(console).read_text(errors="replace")
        if isinstance(value, dict):
            value.pop("data", None)  # in summary.json only, from where a second call returns it
        parts = {"returned": value, "printed": printed, **written(words)}
        finding.write_text("\n".join(f"{name} {fingerprint(part)}" for name, part in flat(parts)))
    return code


def without_pictures() -> None:
    """Pictures take a second and are not what is asked about; nor need anything survive a power cut."""
    import train_arxiv
    import train_ghmm
    from measure import effects, plans, speed

    train_ghmm.plot_run = train_arxiv.draw_run = nothing
    for module, name in ((plans, "draw_loss"), (plans, "draw_plans"), (effects, "plot_metrics")):
        setattr(module, name, nothing)
    speed.RATE_SECONDS = 0
    os.fsync = nothing


def holds(finding: str, expected: str) -> bool:
    """Whether all that is expected was found; a run that was stopped has a step_N.pt more."""
    return set(expected.split("\n")) <= set(finding.split("\n"))


def differing(finding: str, expected: str) -> str:
    """The names of what is not as expected."""
    return "differ: " + ", ".join(
        sorted({line.split()[0] for line in set(finding.split("\n")) ^ set(expected.split("\n")) if line})
    )


def nothing(*args, **options) -> None:
    """Takes the place of what a trial does without."""


def written(words: list[str]) -> dict:
    """What a command left in its out_dir, but for what depends on the clock."""
    folders = [word.partition("=")[2] for word in words if re.match(r"--out(_dir)?=", word)]
    found = {}
    for file in sorted(Path(folders[-1]).rglob("*")) if folders else ():
        if file.suffix == ".pt":
            state = torch.load(file, weights_only=True)
            found[file.name] = {k: v for k, v in state.items() if k not in ("meter", "config", "digest")}
        elif file.name == "metrics.jsonl":
            found[file.name] = records_of(file)
        elif file.suffix in (".bin", ".npy"):
            found[file.name] = file.read_bytes()
    return found


def records_of(file: Path) -> list:
    """The lines of metrics.jsonl that can be read."""
    found = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def flat(parts: dict, depth: int = 2) -> Iterator[tuple[str, Any]]:
    """(name, value) of the values of nested dicts, so that a difference has a name."""
    for name, value in parts.items():
        if isinstance(value, dict) and depth and value:
            yield from ((f"{name}/{key}", part) for key, part in flat(value, depth - 1))
        elif name not in TIMED:
            yield str(name), value


def fingerprint(value: Any) -> str:
    """A digest of plain values, arrays and tensors, but for times: equal to the bit or another."""
    digest = hashlib.sha256()

    def add(part) -> None:
        if isinstance(part, dict):
            for key in sorted(part, key=str):
                if key not in TIMED:
                    digest.update(str(key).encode())
                    add(part[key])
        elif isinstance(part, (list, tuple)):
            digest.update(str(len(part)).encode())
            for item in part:
                add(item)
        elif isinstance(part, torch.Tensor):
            array = part.detach().cpu().contiguous()
            digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes() if array.numel() else b"")
        elif isinstance(part, bytes):
            digest.update(part)
        else:  # what is not finite is null in files
            digest.update(repr(None if isinstance(part, float) and not math.isfinite(part) else part).encode())

    add(value)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Damage to bytes, to lines, to values
# ---------------------------------------------------------------------------------------------------------------
def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """The content of a file after one accident of a disk or of a copy."""
    at = draw.randrange(max(1, len(data)))
    to = min(len(data), at + draw.choice([1, 2, 8, 64, 512]))
    kind = draw.choice(["bit"] * 4 + ["noise", "zeros", "cut", "cut", "lost", "twice", "more", "swap"])
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :] if data else b"\0"
    if kind == "noise":
        return data[:at] + draw.randbytes(to - at) + data[to:]
    if kind == "zeros":
        return data[:at] + bytes(to - at) + data[to:]
    if kind == "cut":
        return data[:at]
    if kind == "lost":
        return data[:at] + data[to:]
    if kind == "twice":
        return data[:to] + data[at:]
    if kind == "more":
        return data + draw.randbytes(to - at)
    half = (at + to) // 2
    return data[:at] + data[half:to] + data[at:half] + data[to:]


ODD_WORDS = [
    "",
    "-1",
    "0",
    "1e400",
    "-1e400",
    "nan",
    "NaN",
    "inf",
    "null",
    "None",
    "true",
    "'",
    '"',
    "[",
    "]",
    "{",
    "}",
    "[" * 3_000,
    "{" * 3_000,
    "\0",
    "\ud7ff",
    "é",
    "\u2028",
    "9" * 400,
    "1" * 5_000,
    "0x10",
    "1_0",
    "~",
    "!!python/none",
    "&a [*a]",
    "<<: *x",
    "\t",
    "\r",
    "\x1b",
    "#",
    "=",
    ":",
    ",",
    "...",
    "../..",
    "/",
    "/dev/null",
    "%s",
    "{0}",
    "x" * 70_000,
    "1e-400",
    "18446744073709551616",
    "-9223372036854775809",
    "0.1.2",
    "2024-01-01",
    "\ufeff",
]


def damaged_text(data: bytes, draw: random.Random) -> bytes:
    """The content of a text file after a slip of an editor; one in four as after an accident."""
    if draw.random() < 0.25:
        return damaged_bytes(data, draw)
    try:
        text = data.decode()
    except ValueError:  # no text
        return damaged_bytes(data, draw)
    lines = text.splitlines(keepends=True)
    at = draw.randrange(max(1, len(lines)))
    words = list(re.finditer(r"[\w.+-]+|[^\w\s]", text))
    kind = draw.choice(["word"] * 6 + ["drop", "drop", "line out", "line twice", "line swap", "join", "bytes"])
    if kind in ("word", "drop") and words:
        word = draw.choice(words)
        return (text[: word.start()] + ("" if kind == "drop" else draw.choice(ODD_WORDS)) + text[word.end() :]).encode(
            errors="surrogatepass"
        )
    if kind == "line out":
        lines[at : at + 1] = []
    elif kind == "line twice":
        lines[at:at] = lines[at : at + 1]
    elif kind == "line swap":
        other = draw.randrange(max(1, len(lines)))
        lines[at : at + 1], lines[other : other + 1] = lines[other : other + 1], lines[at : at + 1]
    elif kind == "join":
        lines[at] = lines[at].strip() if lines else ""
    else:
        lines.insert(at, draw.choice(["\xff\xfe", "\udc80"]))
    return "".join(lines).encode("utf-8", "surrogatepass" if kind == "bytes" else "strict")


def odd_values(draw: random.Random) -> Any:
    """A plain value that is out of place anywhere."""
    return draw.choice(
        [
            None,
            -1,
            0,
            1,
            2**63,
            -(2**63),
            10**30,
            0.5,
            -0.5,
            math.nan,
            math.inf,
            -math.inf,
            "",
            "x",
            "../x",
            "\0",
            True,
            [],
            {},
            [[]],
            [None],
            {"x": 1},
            {"": {}},
            [1, "a"],
            "9" * 50,
            [0] * 50,
            1e308,
        ]
    )


def places(value: Any, way: tuple = ()) -> Iterator[tuple]:
    """The way to every value in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, part in list(items)[:200]:
        yield (*way, key)
        yield from places(part, (*way, key))


def damage_values(value: Any, draw: random.Random, odd: Callable = odd_values) -> Any:
    """Nested plain data with one value gone, doubled or replaced."""
    way = draw.choice(list(places(value)) or [()])
    if not way:
        return odd(draw)
    holder = value
    for key in way[:-1]:
        holder = holder[key]
    kind = draw.choice(["odd"] * 4 + ["gone", "more", "near"])
    old = holder[way[-1]]
    if isinstance(holder, tuple):
        return value
    if kind == "gone":
        del holder[way[-1]]
    elif kind == "more" and isinstance(holder, dict):
        holder[draw.choice(["x", "", "step ", 3])] = old
    elif kind == "near" and isinstance(old, (int, float)) and not isinstance(old, bool):
        holder[way[-1]] = old + draw.choice([1, -1, 0.5])
    elif kind == "near" and isinstance(old, torch.Tensor):
        holder[way[-1]] = odd_tensor(old, draw)
    else:
        holder[way[-1]] = odd(draw)
    return value


def odd_tensor(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """A tensor of another shape, kind or content."""
    if not tensor.numel():
        return torch.ones(3)
    wrong = tensor.clone()
    if tensor.is_floating_point() and draw.random() < 0.5:
        wrong.view(-1)[draw.randrange(tensor.numel())] = draw.choice([math.nan, math.inf, 1e30, 0.0])
        return wrong
    return draw.choice(
        [
            tensor[None],
            tensor.flatten()[:-1],
            tensor.double(),
            tensor.int(),
            tensor.bool(),
            torch.zeros(0),
            tensor.to(torch.complex64),
            tensor.to_sparse(),
            tensor.to("meta"),
            torch.zeros(1).expand(1 << 20),
            tensor.half(),
        ]
    )


class Bomb:
    """A pickle that makes the file `exploded` when its code is run."""

    def __reduce__(self):
        return open, (str(Path("../exploded").resolve()), "w")


def damage_torch(file: Path, draw: random.Random, sealed: bool) -> bool:
    """A checkpoint with other contents; returns whether nobody may read it.

    sealed: with the digest that belongs to them, so that only what the values mean can be wrong.
    """
    state = torch.load(file, weights_only=False)
    if draw.random() < 0.05:
        torch.save(Bomb() if draw.random() < 0.5 else state | {"extra": Bomb()}, file)
        return True
    if draw.random() < 0.1:
        state = draw.choice([[1, 2], torch.ones(2), "text", {}, None, {"model": state.get("model")}])
    else:
        state = damage_values(state, draw)
    if sealed and isinstance(state, dict):
        seal(state)
    torch.save(state, file, _use_new_zipfile_serialization=draw.random() > 0.05)
    return False


def seal(state: dict) -> None:
    """Give a state the digest that common/checkpoint.py would give it."""
    from common import checkpoint

    if hasattr(checkpoint, "digest"):
        with contextlib.suppress(Exception):
            state["digest"] = checkpoint.digest(state)


def damage_hdf5(file: Path, draw: random.Random) -> bool:
    """An HDF5 file with one object replaced, or with a link or storage that leads elsewhere; returns whether nobody may
    read it."""
    with h5py.File(file, "r+") as f:
        names = []
        f.visit(names.append)
        name = draw.choice(names)
        old = f[name]
        is_data = isinstance(old, h5py.Dataset)
        attributes = dict(old.attrs)
        kind = draw.choice(
            [
                "gone",
                "group",
                "scalar",
                "null",
                "shape",
                "type",
                "values",
                "values",
                "values",
                "huge",
                "soft",
                "circle",
                "dead",
                "external",
                "dead external",
                "storage",
                "virtual",
                "attribute",
                "attribute",
                "text",
            ]
        )
        if kind == "attribute" and attributes:
            key = draw.choice(list(attributes))
            draw.choice(
                [
                    lambda: old.attrs.pop(key),
                    lambda: old.attrs.__setitem__(
                        key, draw.choice([-1, 0, 10**6, "x", "", np.nan, [1, 2, 3], np.void(b"xx"), h5py.Empty("f4")])
                    ),
                ]
            )()
            return False
        content = old[()] if is_data else None
        if kind == "values" and is_data:
            return damage_dataset(old, content, draw)
        del f[name]
        array = np.asarray(content) if is_data else np.zeros(3)
        if kind == "group":
            f.create_group(name)
        elif kind == "scalar":
            f[name] = draw.choice([3, 0.5, "x", np.void(b"x")])
        elif kind == "null":
            f[name] = h5py.Empty("f4")
        elif kind == "shape":
            f[name] = draw.choice(
                [array[:-1] if array.ndim else array, array[None], array.flatten()[:0], array.flatten()]
            )
        elif kind == "type":
            f.create_dataset(
                name,
                array.shape,
                draw.choice(
                    [
                        "f8",
                        "i1",
                        "S3",
                        "u8",
                        "c8",
                        "?",
                        h5py.string_dtype(),
                        np.dtype([("x", "i4")]),
                        h5py.vlen_dtype("i4"),
                        h5py.ref_dtype,
                    ]
                ),
            )
        elif kind == "huge":
            f.create_dataset(
                name,
                draw.choice([(1 << 40,), (1 << 33, 1 << 20), (1 << 62,)]),
                array.dtype.str if array.dtype.kind in "iuf" else "f4",
                chunks=True,
            )
        elif kind == "soft":
            f[name] = h5py.SoftLink(draw.choice(["/" + n for n in names]))
        elif kind == "circle":
            f[name] = h5py.SoftLink("/" + name)
        elif kind == "dead":
            f[name] = h5py.SoftLink("/nowhere")
        elif kind == "external":
            f[name] = h5py.ExternalLink(secret_of(file, name), "/" + name)
        elif kind == "dead external":
            f[name] = h5py.ExternalLink("nowhere.h5", "/x")
        elif kind == "storage":
            Path("../secret").write_bytes(b"\1" * max(1, array.nbytes))
            f.create_dataset(
                name,
                array.shape or (1,),
                array.dtype if array.dtype.kind in "iuf" else "u1",
                external=[(str(Path("../secret").resolve()), 0, h5py.h5f.UNLIMITED)],
            )
        elif kind == "virtual":
            layout = h5py.VirtualLayout(array.shape or (1,), array.dtype if array.dtype.kind in "iuf" else "f4")
            if array.ndim:
                layout[:] = h5py.VirtualSource(secret_of(file, name), name, array.shape)
            f.create_virtual_dataset(name, layout)
        elif kind == "text":
            f[name] = draw.choice(["", "é" * 50, b"\xff\xfe", "x" * 70_000])
        return kind in ("external", "storage", "virtual")


def secret_of(file: Path, name: str) -> str:
    """Another file with this object in it, of other content: who reads that computes something else."""
    secret = Path("../secret.h5").resolve()
    shutil.copyfile(file.with_name("whole"), secret)
    with h5py.File(secret, "r+") as f:
        if isinstance(f[name], h5py.Group):
            f[name].clear()
        elif f[name].dtype.kind in "iuf" and f[name].size:
            f[name][...] = np.roll(f[name][()], 1) + 1
        elif f[name].size and f[name].shape:
            f[name][0] = "secret"
    return str(secret)


def damage_dataset(data: h5py.Dataset, content, draw: random.Random) -> bool:
    """One odd value in a dataset."""
    if data.dtype.kind in "iuf" and data.size:
        flat = np.array(content).reshape(-1)
        odd = [-1, 0, 1, 255, 2**31 - 1, flat[0]] + (
            [math.nan, math.inf, -math.inf, -3.0, 1e30] if flat.dtype.kind == "f" else []
        )
        with np.errstate(all="ignore"):
            flat[draw.randrange(flat.size)] = np.array(draw.choice(odd)).astype(flat.dtype)
        data[...] = flat.reshape(data.shape)
    elif data.size and data.shape:
        data[draw.randrange(len(data))] = draw.choice(["", "x", "a/b", "\u00e9", "nan"])
    return False


def damage_json(file: Path, draw: random.Random) -> None:
    """A JSON file, or one of JSON lines, with one odd value."""
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    at = draw.randrange(len(lines))
    lines[at] = json.dumps(damage_values(json.loads(lines[at]), draw))
    file.write_text("\n".join(lines) + "\n")


def damage_npz(file: Path, draw: random.Random) -> None:
    """An .npz with odd arrays."""
    with np.load(file) as archive:
        arrays = dict(archive)
    name = draw.choice(list(arrays))
    old = arrays[name]
    number = np.asarray(old, float) if old.dtype.kind in "iuf" else np.zeros(3)
    odd = [
        np.float64(3),
        number[:0],
        number[None],
        -number - 1,
        number * math.nan,
        number * math.inf,
        number * 1e308,
        old.astype("S3"),
        np.array([None, {}], object),
        number + 1j,
        number.astype("i1"),
        number.flatten(),
    ]
    arrays[name] = draw.choice(odd)
    if draw.random() < 0.2:
        del arrays[name]
    if draw.random() < 0.1:
        arrays["x"] = number
    np.savez(file, **arrays)
    if draw.random() < 0.1:
        damage_header(file, name)


def damage_header(file: Path, name: str) -> None:
    """An array that says that it is larger than any disk."""
    import zipfile

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40, 1 << 10)})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.npy", buffer.getvalue())


def damage_array(file: Path, draw: random.Random) -> None:
    """An .npy or .bin with odd numbers, of another length or kind."""
    array = np.load(file) if file.suffix == ".npy" else np.fromfile(file, np.uint16)
    flat = array.reshape(-1).copy()
    with np.errstate(all="ignore"):
        odd = [array[:-1], array[:0], np.concatenate([array, array]), array.astype("f8"), array[None], flat]
        if flat.size and flat.dtype.kind in "iuf":
            flat[draw.randrange(flat.size)] = np.array(draw.choice([0, 1, 255, 60_000, -1, 9])).astype(flat.dtype)
    wrong = draw.choice([*odd, flat.reshape(array.shape), flat.reshape(array.shape)])
    np.save(file, wrong) if file.suffix == ".npy" else wrong.tofile(file)


# ---------------------------------------------------------------------------------------------------------------
# Formats: files, how they are damaged, who reads them
# ---------------------------------------------------------------------------------------------------------------
class Format(NamedTuple):
    """Files that a fault may hit, and the commands that read them.

    needs: folders of the goods. cases: (pattern of files, commands that read them). inside: damage to what the file
    means, made with the means of its format; accident: damage to its bytes. parse: text -> what an independent parser
    makes of it, raising ValueError; write: that as text once more, in another spelling.
    is_checked: a checksum covers its bytes; guards_values: also what was changed by the means of the format.
    """

    needs: tuple[str, ...]
    cases: list[tuple[str, list[list[str]]]]
    inside: Callable | None = None
    accident: Callable = damaged_bytes
    parse: Callable | None = None
    write: Callable | None = None
    is_checked: bool = False
    guards_values: bool = False


def sampling(path: str, *words: str) -> list[str]:
    return ["sample", path, "--device=cpu", *words]


def analysis(page: str, path: str) -> list[str]:
    return [f"train_{page}", *TINY[page], f"--analyze={path}"]


SAMPLED = {
    "ghmm": ["--num_samples=1", "--length=4"],
    "arxiv": ["--num_samples=1", "--length=5"],
    "apelr": ["--num_samples=1", "--max_new_tokens=4", "--prompt=Once"],
    "state": ["--out=new"],
}
PREPARE = ["prepare_data"]


def checkpoint_readers(page: str) -> list[list[str]]:
    """Commands that read the checkpoint of a run of ours."""
    readers = [
        training(page, out=f"out/{page}"),
        sampling(f"out/{page}", *SAMPLED[page]),
        analysis(page, f"out/{page}"),
        training(page, f"--resume=out/{page}/last.pt"),
    ]
    return readers + [training(page, f"--init_from=out/{page}")] * (page in ("apelr", "state"))


def foreign_readers(page: str, path: str) -> list[list[str]]:
    """Commands that read the checkpoint of a source system."""
    known = {"apelr": ["--prompt=1,2"], "arxiv": ["--length=6"], "ghmm": []}[page]
    tuned = [training(page, f"--init_from={path}", "--data=foreign/own")] if page == "apelr" else []
    return [[*PREPARE, "import", path, "--out_dir=new"], sampling(path, "--num_samples=1", *known), *tuned]


def toml_text(value: Any) -> str:
    """A value as inline TOML, the keys of a document on a line each."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=False)} = {toml_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (bool, float, int)):
        return str(value).lower()
    return value.isoformat()


def toml_document(value: dict) -> str:
    return "".join(f"{json.dumps(k, ensure_ascii=False)} = {toml_text(v)}\n" for k, v in value.items())


def python_settings(text: bytes) -> dict:
    """The settings of a .py file of plain assignments. Raises ValueError for any other Python."""
    found = {}
    try:
        for line in ast.parse(text).body:
            if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
                continue
            if not isinstance(line, ast.Assign) or len(line.targets) != 1 or not isinstance(line.targets[0], ast.Name):
                raise LookupError
            found[line.targets[0].id] = ast.literal_eval(line.value)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error
    return found


CONFIG = ["train_ghmm", "--print_config"]
CELLS = ["prepare_data", "cells", "--output_space=gene", "--out_dir=new"]
FORMATS = {
    "last.pt": Format(
        ("out", "data"),
        [(f"out/{page}/last.pt", checkpoint_readers(page)) for page in TINY],
        lambda file, draw: damage_torch(file, draw, draw.random() < 0.5),
        is_checked=True,
    ),
    "foreign": Format(
        ("foreign", "data"),
        [
            ("foreign/apelr/checkpoint.pt", foreign_readers("apelr", "foreign/apelr/checkpoint.pt")),
            ("foreign/arxiv/latest.pt", foreign_readers("arxiv", "foreign/arxiv/latest.pt")),
            ("foreign/ghmm/40/model.pt", foreign_readers("ghmm", "foreign/ghmm/40/model.pt")),
        ],
        lambda file, draw: damage_torch(file, draw, False),
        is_checked=True,
    ),
    "chunks": Format(
        ("data",),
        [("data/ergodic/*.h5", [training("arxiv"), [*PREPARE, "inspect", "data/ergodic"]])],
        damage_hdf5,
        is_checked=True,
        guards_values=True,
    ),
    "h5ad dense": Format(
        ("data",),
        [
            (
                "data/cells.h5ad",
                [
                    training("state"),
                    [*PREPARE, "inspect", "data/cells.h5ad"],
                    [*PREPARE, "inspect", "data/cells.toml"],
                    [*PREPARE, "state", "preprocess", "--input=data/cells.h5ad", "--out_dir=new"],
                ],
            )
        ],
        damage_hdf5,
    ),
    "h5ad sparse": Format(
        ("data",),
        [
            (
                "data/sparse.h5ad",
                [
                    [*training("state"), "--toml=data/sparse.toml"],
                    [*PREPARE, "inspect", "data/sparse.h5ad"],
                    [*PREPARE, "state", "preprocess", "--input=data/sparse.h5ad", "--out_dir=new"],
                ],
            )
        ],
        damage_hdf5,
    ),
    "cell store": Format(
        ("data",),
        [
            ("data/cells/*/*.npy", [training("state"), [*PREPARE, "inspect", "{folder}"]]),
            ("data/cells/*/meta.json", [training("state"), [*PREPARE, "inspect", "{folder}"]]),
        ],
        lambda file, draw: (damage_json if file.suffix == ".json" else damage_array)(file, draw),
        is_checked=True,
        guards_values=True,
    ),
    "tokens": Format(
        ("data",),
        [
            ("data/text/*.bin", [training("apelr"), [*PREPARE, "inspect", "data/text"]]),
            ("data/text/meta.json", [training("apelr"), [*PREPARE, "inspect", "data/text"]]),
        ],
        lambda file, draw: (damage_json if file.suffix == ".json" else damage_array)(file, draw),
        is_checked=True,
        guards_values=True,
    ),
    "tokenizer.json": Format(
        ("data", "out"),
        [
            (
                "data/text/tokenizer.json",
                [
                    training("apelr"),
                    [*PREPARE, "inspect", "data/text"],
                    [
                        *PREPARE,
                        "text",
                        "--input=data/stories.jsonl",
                        "--out_dir=new",
                        "--tokenizer=data/text/tokenizer.json",
                    ],
                ],
            ),
            ("out/apelr/tokenizer.json", [sampling("out/apelr", *SAMPLED["apelr"])]),
        ],
        damage_json,
        damaged_text,
    ),
    "toml": Format(
        ("data",),
        [("data/cells.toml", [training("state"), [*PREPARE, "inspect", "data/cells.toml"]])],
        None,
        damaged_text,
        lambda text: tomllib.loads(text.decode()),
        toml_document,
    ),
    "yaml": Format(
        ("config",),
        [("config/tiny.yaml", [[*CONFIG, "config/tiny.yaml"]])],
        None,
        damaged_text,
        yaml.safe_load,
        json.dumps,
    ),
    "json": Format(
        ("config",),
        [("config/tiny.json", [[*CONFIG, "config/tiny.json"]])],
        damage_json,
        damaged_text,
        json.loads,
        lambda value: json.dumps(value, indent=3),
    ),
    "py": Format(
        ("config",),
        [("config/tiny.py", [[*CONFIG, "config/tiny.py"]])],
        None,
        damaged_text,
        python_settings,
        lambda values: "".join(f"{name} = {value!r}\n" for name, value in values.items()),
    ),
    "npz": Format(
        ("data",),
        [("data/matrices.npz", [[*training("ghmm"), "--process=custom", "--matrices=data/matrices.npz"]])],
        damage_npz,
        is_checked=True,
    ),
    "jsonl.gz": Format(
        ("data",),
        [
            (
                "data/stories.jsonl.gz",
                [
                    [
                        *PREPARE,
                        "text",
                        "--input=data/stories.jsonl.gz",
                        "--tokenizer=char",
                        "--val_fraction=0.3",
                        "--out_dir=new",
                    ]
                ],
            ),
            (
                "data/papers.jsonl.gz",
                [
                    [
                        *PREPARE,
                        "arxiv",
                        "--input=data/papers.jsonl.gz",
                        "--vocab_size=280",
                        "--chunk_size=8",
                        "--validation_fraction=0.3",
                        "--out_dir=new",
                    ]
                ],
            ),
        ],
        is_checked=True,
    ),
    "run files": Format(
        ("ended", "data"),
        [
            ("ended/*/*.json*", [["{again}"], ["sweep", "report", "{folder}", "--out=new"]]),
            ("ended/arxiv/documents.npz", [["sweep", "report", "ended/arxiv", "--out=new"]]),
        ],
        lambda file, draw: (damage_npz if file.suffix == ".npz" else damage_json)(file, draw),
        damaged_text,
    ),
}


class Spoilt(NamedTuple):
    """A command whose input is damaged."""

    file: Path
    words: list[str]
    is_accident: bool
    is_forbidden: bool  # whether any reading of it is wrong


def fetch(goods: Path, needs: tuple[str, ...]) -> None:
    for name in needs:
        shutil.copytree(goods / name, name, dirs_exist_ok=True)


def choose(form: Format, draw: random.Random) -> tuple[Path, list[str]]:
    """(a file, a command that reads it) of a format."""
    pattern, readers = draw.choice(form.cases)
    file = draw.choice(sorted(Path().glob(pattern)))
    words = draw.choice(readers)
    if words == ["{again}"]:
        page = file.parts[1]
        words = training(page, "--keep_last=-1", out=f"ended/{page}")
    return file, [word.replace("{folder}", str(file.parent)) for word in words]


def spoil(form: Format, draw: random.Random) -> Spoilt:
    file, words = choose(form, draw)
    before = file.read_bytes()
    shutil.copyfile(file, file.with_name("whole"))
    is_forbidden, is_accident = False, form.inside is None or draw.random() < 0.5
    while file.read_bytes() == before:
        if is_accident:
            file.write_bytes(form.accident(before, draw))
        else:
            try:
                is_forbidden = bool(form.inside(file, draw))
            except Exception:  # this value cannot be stored in such a file
                file.write_bytes(before)
    file.with_name("whole").unlink()
    return Spoilt(file, words, is_accident, is_forbidden)


BEFORE: dict[str, str] = {}  # command -> its finding on undamaged files


def undamaged(form: Format, words: list[str], goods: Path) -> str:
    key = " ".join(words)
    if key not in BEFORE:
        with folder_apart("../whole"):
            fetch(goods, form.needs)
            ending = run(words)
        if ending.code or not ending.finding:
            raise RuntimeError(f"{key} fails on undamaged files: {ending.code} {ending.text[-2000:]}")
        BEFORE[key] = ending.finding
    return BEFORE[key]


@contextlib.contextmanager
def folder_apart(name: str) -> Iterator[None]:
    """Stand in an empty folder for a while."""
    here = os.getcwd()
    shutil.rmtree(name, ignore_errors=True)
    Path(name, "here").mkdir(parents=True)
    os.chdir(Path(name, "here"))
    try:
        yield
    finally:
        os.chdir(here)
        shutil.rmtree(name, ignore_errors=True)


def damage_trial(kind: str, draw: random.Random, goods: Path) -> tuple[str, str]:
    """Damage a file of a format and let somebody read it; returns (column, what was done and printed)."""
    form = FORMATS[kind]
    fetch(goods, form.needs)
    spoilt = spoil(form, draw)
    expected = undamaged(form, spoilt.words, goods)
    damaged = spoilt.file.read_bytes()
    ending = run(spoilt.words)
    by = "by accident" if spoilt.is_accident else "inside"
    how = f"{spoilt.file} damaged {by}{', so that it leads elsewhere' * spoilt.is_forbidden}\n{' '.join(spoilt.words)}"
    column = judge(form, spoilt, ending, expected, damaged, goods)
    return column, f"{how}\n{ending.text}\n{differing(ending.finding, expected)}"


def judge(form: Format, spoilt: Spoilt, ending: Ending, expected: str, damaged: bytes, goods: Path) -> str:
    """The column of a command whose input was damaged."""
    if Path("../exploded").exists():
        return "silent"  # code of the file was run
    column = ending.verdict()
    if column == "clear" and not names_file(ending.text, spoilt.file):
        return "vague"
    if column:
        return column
    if form.parse and not spoilt.is_forbidden:
        return reads_as_parsed(form, spoilt, ending, damaged, goods)
    if ending.finding == expected:
        return "right"
    if names_file(ending.text, spoilt.file, "note|warning|damaged|cannot") or "\n  problem: " in ending.text:
        return "clear"
    noticeable = form.is_checked and (spoilt.is_accident or form.guards_values)
    return "silent" if noticeable or spoilt.is_forbidden else "unnoticed"


def names_file(text: str, file: Path, words: str = "") -> bool:
    """Whether a line of what was printed names a file, or the folder it is in, together with one of these words."""
    names = (file.name, file.stem, str(file.parent))
    return any(name in line for name in names for line in text.splitlines() if re.search(words, line))


def reads_as_parsed(form: Format, spoilt: Spoilt, ending: Ending, damaged: bytes, goods: Path) -> str:
    """Whether a text means to the scripts what it means to an independent parser."""
    try:
        meaning = form.parse(damaged)
        text = form.write(meaning)
    except LookupError:
        return "unnoticed"
    except (ValueError, RecursionError, yaml.YAMLError):
        return "silent"  # the parser refuses it
    with folder_apart("../parsed"):
        fetch(goods, form.needs)
        spoilt.file.write_text(text, encoding="utf-8")
        again = run(spoilt.words)
    return "right" if again.finding == ending.finding else "silent"


# ---------------------------------------------------------------------------------------------------------------
# Faults at a place in the code: kills, signals, full disks
# ---------------------------------------------------------------------------------------------------------------
def hook(place: str, call: int, action: Callable[[], None], only: Callable = lambda *args: True) -> Callable[[], None]:
    """Something to do in a process before it starts: at its call-th call of place ("module:name" or
    "module:class.name") that `only` lets pass, the action happens first."""

    def install() -> None:
        module, _, way = place.partition(":")
        holder = importlib.import_module(module)
        *outer, name = way.split(".")
        for part in outer:
            holder = getattr(holder, part)
        original, calls = getattr(holder, name), []

        def hooked(*args, **options):
            if only(*args, **options):
                calls.append(place)
                if len(calls) == call:
                    action()
            return original(*args, **options)

        setattr(holder, name, hooked)

    return install


def send(*numbers: int) -> Callable[[], None]:
    """An action: these signals to the process itself."""

    def sent() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return sent


def refuse(number: int) -> Callable[[], None]:
    """An action: the system refuses, for the reason of this number of errno."""

    def refused() -> None:
        raise OSError(number, os.strerror(number))

    return refused


class Stumbling:
    """A file whose call-th write, counted over all such files of the process, begins with an action."""

    writes = 0

    def __init__(self, file, call: int, action: Callable[[], None]):
        self.file, self.call, self.action = file, call, action

    def write(self, data) -> int:
        Stumbling.writes += 1
        if Stumbling.writes == self.call:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            self.action()
        return self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def stumble(call: int, action: Callable[[], None]) -> Callable[[], None]:
    """Something to do in a process before it starts: the call-th write of a checkpoint's bytes begins with the action,
    when half of them are written."""

    def install() -> None:
        save = torch.save
        torch.save = lambda state, file, **options: save(state, Stumbling(file, call, action), **options)

    return install


def writes(*args, **options) -> bool:
    """Whether a call of open is for writing."""
    mode = options.get("mode", args[1] if len(args) > 1 else "r")
    return any(letter in str(mode) for letter in "wxa+")


def in_writing(draw: random.Random, action: Callable[[], None]) -> Callable[[], None]:
    """A hook at a random moment in which a run writes."""
    place, most = draw.choice(
        [("os:replace", 12), ("os:fsync", 6), ("os:link", 4), ("torch:save", 4), ("", 60), ("", 60)]
    )
    call = draw.randint(1, most)
    return hook(place, call, action) if place else stumble(call, action)


SECONDS: dict[str, float] = {}  # command -> time of the undisturbed run


def undisturbed(words: list[str], goods: Path, needs: tuple[str, ...] = ("data",)) -> str:
    """The finding of a command that nothing disturbs."""
    key = " ".join(words)
    if key not in BEFORE:
        with folder_apart("../whole"):
            fetch(goods, needs)
            began = time.monotonic()
            ending = run(words)
            SECONDS[key] = time.monotonic() - began
        if ending.code or not ending.finding:
            raise RuntimeError(f"{key} fails undisturbed: {ending.code} {ending.text[-2000:]}")
        BEFORE[key] = ending.finding
    return BEFORE[key]


def goes_on(words: list[str], expected: str, first: Ending) -> tuple[str, str]:
    """Whether the same command ends as if nothing had happened; (column, what was printed)."""
    if first.verdict() in ("hang", "traceback") and first.code != -signal.SIGKILL:
        return first.verdict(), first.text
    again = run(words)
    text = f"{first.code}: {first.text}\n--- again: {again.code}\n{again.text}\n{differing(again.finding, expected)}"
    return again.verdict() or ("right" if holds(again.finding, expected) else "silent"), text


def kill_trial(draw: random.Random, goods: Path) -> tuple[str, str]:
    """SIGKILL at a random moment, in every second trial in the midst of writing; then the same command."""
    page = draw.choice(list(TINY))
    words = training(page, "--max_steps=20", "--keep_last=-1")
    expected = undisturbed(words, goods)
    fetch(goods, ("data",))
    if draw.random() < 0.5:
        first = run(words, in_writing(draw, send(signal.SIGKILL)))
    else:
        first = Process(words).wait(draw.uniform(0, SECONDS[" ".join(words)]))
        first = first._replace(code=-signal.SIGKILL if first.code is None else first.code)
    return goes_on(words, expected, first)


EVALUATIONS = {
    "ghmm": "train_ghmm:evaluate",
    "arxiv": "train_arxiv:evaluate",
    "apelr": "train_apelr:evaluate",
    "state": "train_state:validate",
}


def signal_trial(draw: random.Random, goods: Path) -> tuple[str, str]:
    """SIGINT or SIGTERM, once or twice, in training, evaluation, saving or analysis; then the same command."""
    page = draw.choice(list(TINY))
    words = training(page, "--keep_last=-1")
    expected = undisturbed(words, goods)
    fetch(goods, ("data",))
    place, most = draw.choice(
        [("common.runtime:Runtime.step", 6), (EVALUATIONS[page], 3), ("torch:save", 3), (f"train_{page}:finish", 1)]
    )
    number = draw.choice([signal.SIGINT, signal.SIGTERM])
    first = run(words, hook(place, draw.randint(1, most), send(*[number] * draw.randint(1, 2))))
    column, text = goes_on(words, expected, first)
    return column, f"{number} at {place}\n{text}"


# ---------------------------------------------------------------------------------------------------------------
# Disks that are full, read-only or in the way
# ---------------------------------------------------------------------------------------------------------------
def small_files() -> None:
    """No file may grow beyond 4 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, 4_096))


IN_THE_WAY = [
    "last.pt",
    "best.pt",
    "metrics.jsonl",
    "config.json",
    "train.log",
    "summary.json",
    "step_6.pt",
    "results.json",
    "analysis.json",
    "metrics.csv",
    "documents.npz",
    "plots",
]
WRITERS = [
    [*PREPARE, "text", "--input=data/stories.jsonl", "--tokenizer=char", "--val_fraction=0.3", "--out_dir=new"],
    [*PREPARE, "ergodic", "--train_documents=3", "--validation_documents=2", "--out_dir=new"],
    [*PREPARE, "planted", "--train_documents=3", "--validation_documents=2", "--out_dir=new"],
    [
        *PREPARE,
        "state",
        "--num_cell_types=4",
        "--num_perturbations=2",
        "--num_genes=20",
        "--num_batches=1",
        "--cells_per_condition=2",
        "--controls_per_cell_type=2",
        "--out_dir=new",
    ],
    [*PREPARE, "state", "preprocess", "--input=data/cells.h5ad", "--out_dir=new"],
    [*PREPARE, "cells", "--toml=data/cells.toml", "--output_space=gene", "--folder=new"],
    [*PREPARE, "import", "foreign/ghmm/40/model.pt", "--out_dir=new"],
    ["sample", "ended/ghmm", "--num_samples=1", "--device=cpu", "--json=new"],
    ["sample", "ended/state", "--device=cpu", "--out=new"],
    ["sweep", "report", "ended/ghmm", "ended/arxiv", "--out=new"],
    *(analysis(page, f"ended/{page}") for page in TINY),
]


def disk_fault(draw: random.Random, out: Path) -> tuple[str, list, Callable[[], None]]:
    """(what is wrong with the disk, hooks for it, how it is mended), as it befalls a command that writes to out."""
    import errno

    number = draw.choice([errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
    name = draw.choice(IN_THE_WAY)
    target = out / name
    kind = draw.choice(
        ["write", "replace", "open", "open", "mkdir", "size", "folder", "folder", "full", "file", "dangling"]
    )
    if kind == "write":
        return kind, [stumble(draw.randint(1, 40), refuse(number))], nothing
    if kind in ("replace", "mkdir"):
        return f"{kind} {number}", [hook(f"os:{kind}", draw.randint(1, 6), refuse(number))], nothing
    if kind == "open":
        return f"{kind} {number}", [hook("builtins:open", draw.randint(1, 8), refuse(number), writes)], nothing
    if kind == "size":
        return kind, [small_files], nothing
    if kind == "file" and not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("in the way")
        return kind, [], out.unlink
    out.mkdir(parents=True, exist_ok=True)
    kept = target.rename(target.with_name("kept")) if target.exists() else None
    if kind == "folder":
        (target / "full").mkdir(parents=True)
    else:
        target.symlink_to("/dev/full" if kind == "full" else "/nowhere/file")

    def mend() -> None:
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if kept:
            kept.rename(target)

    return f"{kind} at {target}", [], mend


def disk_trial(draw: random.Random, goods: Path) -> tuple[str, str]:
    """A command that cannot write; then, the disk mended, the same command."""
    page = draw.choice(list(TINY))
    needs = ("data", "out", "ended", "foreign")
    words = draw.choice([training(page, out=f"out/{page}"), training(page), draw.choice(WRITERS)])
    expected = undisturbed(words, goods, needs)
    fetch(goods, needs)
    outs = [word.partition("=")[2] for word in words if re.match(r"--(out|out_dir|json|folder|analyze)=", word)]
    what, hooks, mend = disk_fault(draw, Path(outs[0] + "/analysis" * ("--analyze" in " ".join(words))))
    first = run(words, *hooks)
    mend()
    verdict = first.verdict()
    column, text = goes_on(words, expected, first)
    if column == "right" and verdict:
        column = verdict
    elif column == "clear":
        column = "vague"  # the disk is mended and the command still fails
    return column, f"{what}: {' '.join(words)}\n{text}"


# ---------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------
ODD_VALUES = [
    "",
    "-1",
    "0",
    "1",
    "2",
    "0.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "None",
    "null",
    "true",
    "x",
    "[]",
    "{}",
    "[1",
    "{'a': 1}",
    "[1,2]",
    "a,b",
    "../x",
    "~",
    "~nobody/x",
    "\udcff",
    "é",
    "'",
    "nowhere.pt",
    "data",
    "1_000",
    "١",
    "x" * 300,
    "s3://",
    "file://",
    "http://x/y",
    "%",
    "$HOME",
    "1,2",
    "*",
    "a=b",
    "--",
    "\n",
]
NOT_DRAWN = {"wandb", "tensorboard", "compile", "max_steps", "multirun", "max_words"}
COMMANDS = {  # script -> words that make it quick
    **{f"train_{page}": training(page) for page in TINY},
    "sample": ["sample", "out/{page}", "--device=cpu", "--max_new_tokens=2", "--out=new"],
    "prepare_data": ["prepare_data", "{job}", "--out_dir=new"],
    "sweep": ["sweep", "train_ghmm.py", "--print_config"],
}
JOBS = {
    "text": ["--input=data/stories.jsonl", "--tokenizer=char"],
    "planted": ["--train_documents=4", "--document_chunks=2", "--validation_documents=2"],
    "arxiv": ["--input=data/papers.jsonl", "--vocab_size=280"],
    "ergodic": ["--train_documents=3", "--validation_documents=2"],
    "state": [
        "--num_cell_types=4",
        "--num_perturbations=2",
        "--num_genes=20",
        "--cells_per_condition=2",
        "--controls_per_cell_type=2",
    ],
    "cells": ["--toml=data/cells.toml"],
    "inspect": ["data/ergodic"],
    "import": ["foreign/ghmm/40/model.pt"],
}


def line_trial(draw: random.Random, goods: Path, script: str) -> tuple[str, str]:
    """A command line with odd words in it."""
    fetch(goods, ("data", "out", "foreign"))
    words, settings = command_of(script, draw)
    is_forbidden = False
    for _ in range(draw.randint(1, 3)):
        name, value = draw.choice(settings), draw.choice(ODD_VALUES)
        kind = draw.choice(["value"] * 6 + ["bare", "no", "near", "unknown", "noise", "file", "space"])
        if kind == "unknown":
            name = "".join(draw.choices("bcdfghjkq", k=9))
            is_forbidden = True
        word = {
            "value": f"--{name}={value}",
            "bare": f"--{name}",
            "no": f"--no-{name}",
            "near": f"--{name[:-1]}q={value}",
            "unknown": f"--{name}={value}",
            "noise": value,
            "file": draw.choice(
                ["config/nowhere.py", "data/stories.jsonl", "/dev/null", "data", "train_ghmm.py", "x.yaml"]
            ),
            "space": f"--{name} {value}",
        }[kind]
        words.append(word)
    words += ["--print_config"] * (draw.random() < 0.3) + ["--max_steps=2"] * script.startswith("train")
    ending = run(words)
    column = ending.verdict() or ("silent" if is_forbidden and "help" not in ending.text else "right")
    return column, f"{words!r}\n{ending.text}"


def command_of(script: str, draw: random.Random) -> tuple[list[str], list[str]]:
    """(a command that ends soon, names of settings that it takes) of a script."""
    import prepare_data
    import sample
    import sweep

    page, job = draw.choice(list(TINY)), draw.choice(list(JOBS))
    words = [word.replace("{page}", page).replace("{job}", job) for word in COMMANDS[script]]
    if script == "prepare_data":
        words = words[:2] + JOBS[job] + words[2:]
        config = prepare_data.JOBS[job][0]
    elif script == "sample":
        config = sample.Config
    elif script == "sweep":
        config = draw.choice([sweep.Config, importlib.import_module("train_ghmm").Config])
    else:
        config = importlib.import_module(script).Config
    return words, sorted(set(config.__dataclass_fields__) - NOT_DRAWN)


# ---------------------------------------------------------------------------------------------------------------
# Long runs, two runs in one folder, two ranks
# ---------------------------------------------------------------------------------------------------------------
LONG_STEPS, MOST_GROWTH = 20_000, 5 << 20


def endurance_trial(draw: random.Random, goods: Path, steps: int = LONG_STEPS) -> tuple[str, str]:
    """A long run: after a quarter of it neither memory nor open files may grow."""
    log = Path("../memory").resolve()

    def watch() -> None:
        from common.runtime import Runtime

        step, done = Runtime.step, []

        def watched(*args, **options):
            done.append(None)
            if len(done) % (steps // 20) == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                with open(log, "a") as file:
                    print(pages * resource.getpagesize(), len(os.listdir("/proc/self/fd")), file=file)
            return step(*args, **options)

        Runtime.step = watched

    words = training(
        "ghmm",
        f"--max_steps={steps}",
        "--log_interval=50",
        "--eval_interval=500",
        "--save_interval=500",
        "--keep_last=2",
    )
    ending = run(words, watch, seconds=40 * PATIENCE_S)
    rows = [tuple(map(int, line.split())) for line in log.read_text().splitlines()] if log.exists() else []
    late = rows[len(rows) // 4 :]
    text = f"bytes and descriptors: {rows}\n{ending.text[-3000:]}"
    if ending.verdict() or not late:
        return ending.verdict() or "silent", text
    grew = late[-1][0] - late[0][0] > MOST_GROWTH or len({descriptors for _, descriptors in late}) > 1
    return "silent" if grew else "right", text


def folder_trial(draw: random.Random, goods: Path) -> tuple[str, str]:
    """A second run in the folder of one at work: it is refused, and the first ends as if alone; or the first is killed
    and the same command goes on."""
    page = draw.choice(list(TINY))
    words = training(page)
    expected = undisturbed(words, goods)
    fetch(goods, ("data",))
    waiting, go = Path("../waiting").resolve(), Path("../go").resolve()

    def wait() -> None:
        waiting.touch()
        while not go.exists():
            time.sleep(0.01)

    first = Process(words, hook("common.runtime:Runtime.step", 3, wait))
    until(lambda: waiting.exists() or first.poll())
    second = run(words)
    if draw.random() < 0.5:
        os.kill(first.pid, signal.SIGKILL)
        column, text = goes_on(words, expected, first.wait())
    else:
        go.touch()
        ending = first.wait()
        column = ending.verdict() or ("right" if holds(ending.finding, expected) else "silent")
        text = f"{ending.text}\n{differing(ending.finding, expected)}"
    if second.verdict() != "clear":
        column = second.verdict() or "silent"
    return "clear" if column == "right" else column, f"second: {second.text}\nfirst: {text}"


def until(ready: Callable[[], bool], seconds: float = PATIENCE_S) -> bool:
    """Wait until ready() is true; whether it came to that."""
    deadline = time.monotonic() + seconds
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.005)
    return ready()


def rank_trial(draw: random.Random, goods: Path) -> tuple[str, str]:
    """Two ranks, one of which is killed, refused by its disk, or finds another checkpoint: the other ends within 30
    seconds and says so; then the same command on both."""
    page = draw.choice(list(TINY))
    words = training(page)
    fetch(goods, ("data",))
    victim, place = draw.randrange(2), draw.choice(["common.runtime:Runtime.step", EVALUATIONS[page]])
    fault = hook(place, draw.randint(2, 5) if "step" in place else 2, send(signal.SIGKILL))
    endings = two_ranks(words, victim, fault)
    other = endings[1 - victim]
    again = two_ranks(words, 0, nothing)
    text = (
        "".join(
            f"\n--- {name}: {e.code}\n{e.text}"
            for name, e in zip(("rank 0", "rank 1", "again 0", "again 1"), [*endings, *again], strict=True)
        )
        + f"\nkilled: {victim} at {place}"
    )
    column = other.verdict() or ("silent" if endings[victim].code else "right")
    if any(e.verdict() for e in again) and column not in ("hang", "traceback"):
        column = next(filter(None, (e.verdict() for e in again)))
        column = "vague" if column == "clear" else column
    return column, text


def two_ranks(words: list[str], victim: int, fault: Callable[[], None], seconds: float = 30) -> list[Ending]:
    """A command on two ranks, with a fault in one: how both ended, the other so many seconds after it."""
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    ranks = [
        Process(words, *[fault] * (rank == victim), **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)
    ]
    until(lambda: any(rank.poll() for rank in ranks))
    until(lambda: all(rank.poll() for rank in ranks), seconds)
    return [rank.wait(0.1) for rank in ranks]


# ---------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------
class Kind(NamedTuple):
    trial: Callable  # (draw, goods) -> (column, text)
    short: int  # trials
    long: int


def kinds() -> dict[str, Kind]:
    found = {name: Kind(lambda draw, goods, name=name: damage_trial(name, draw, goods), 4, 500) for name in FORMATS}
    found |= {
        f"line {script}": Kind(lambda draw, goods, script=script: line_trial(draw, goods, script), 4, 300)
        for script in COMMANDS
    }
    return found | {
        "kill": Kind(kill_trial, 2, 100),
        "signal": Kind(signal_trial, 2, 40),
        "disk": Kind(disk_trial, 4, 200),
        "two runs": Kind(folder_trial, 1, 12),
        "ranks": Kind(rank_trial, 1, 12),
        "endurance": Kind(endurance_trial, 0, 1),
    }


class Told(NamedTuple):
    """What came of a trial."""

    kind: str
    number: int
    column: str
    text: str
    seconds: float


def nursery(pipe, goods: Path, place: Path, seed: int) -> None:
    """A process that imports everything once and forks for every command; it takes (kind, number) from a pipe."""
    import jinja2  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import rustbpe  # noqa: F401
    import scipy.sparse  # noqa: F401
    import tiktoken  # noqa: F401

    for script in COMMANDS:
        importlib.import_module(script)
    tqdm.tqdm.set_lock(threading.RLock())  # its own is one between processes, which those that are killed leave behind
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    table = kinds()
    with contextlib.suppress(EOFError):
        while True:
            kind, number = pipe.recv()
            folder, began = place / f"{kind}.{number}".replace(" ", "_"), time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            Path(folder, "here").mkdir(parents=True)
            os.chdir(folder / "here")
            try:
                column, text = table[kind].trial(random.Random(f"{seed} {kind} {number}"), goods)
            except Exception:
                column, text = "broken", traceback.format_exc()  # the harness itself
            os.chdir(place)
            if column in GOOD:
                shutil.rmtree(folder, ignore_errors=True)
            pipe.send(Told(kind, number, column, text, time.monotonic() - began))


def nurseries(goods: Path, place: Path, seed: int, jobs: int) -> list[tuple]:
    """[(process, pipe)], forked from the server of commands.py."""
    context, found = server(), []
    for _ in range(jobs):
        ours, theirs = multiprocessing.Pipe()
        process = context.Process(target=nursery, args=(theirs, goods, place, seed))
        process.start()
        theirs.close()
        found.append((process, ours))
    return found


def make_in_fork(goods: Path) -> None:
    process = server().Process(target=make_quietly, args=(goods,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("the files to damage cannot be made: " + (goods / "console").read_text()[-3000:])


def make_quietly(goods: Path) -> None:
    os.chdir(goods)
    descriptor = os.open("console", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    torch.set_num_threads(1)
    without_pictures()
    make_goods(None)


def all_trials(wanted: list[tuple[str, int]], place: Path, seed: int, jobs: int) -> Iterator[Told]:
    """Each (kind, number) tried, in the order in which they end."""
    goods = place / "goods"
    if not goods.exists():
        goods.mkdir(parents=True)
        make_in_fork(goods)
    workers = nurseries(goods, place, seed, jobs)
    queue, idle, busy = list(reversed(wanted)), [pipe for _, pipe in workers], []
    while queue or busy:
        while queue and idle:
            busy.append(idle.pop())
            busy[-1].send(queue.pop())
        for pipe in multiprocessing.connection.wait(busy):
            yield pipe.recv()
            busy.remove(pipe)
            idle.append(pipe)
    for process, pipe in workers:
        pipe.close()
        process.join()


def gist(text: str) -> str:
    """What went wrong in a line: the last error, the innermost line of ours, and what was done."""
    lines = text.strip().splitlines() or [""]
    errors = [line for line in lines if re.match(r"(error: |[\w.]*(Error|Exception|Interrupt|Panic\w*)\b)", line)]
    frames = [
        line.strip()
        for line in lines
        if line.startswith("  File ") and "site-packages" not in line and "faults.py" not in line
    ]
    where = frames[-1].rpartition("/")[2].replace('"', "") if frames else ""
    return " | ".join([errors[-1][:200] if errors else lines[-1][:200], where, *(line[:200] for line in lines[:2])])


def table_of(told: list[Told]) -> dict[str, dict[str, int]]:
    """{kind: {"tried": n, column: n}}"""
    table: dict[str, dict[str, int]] = {}
    for trial in told:
        row = table.setdefault(trial.kind, {"tried": 0, **dict.fromkeys(COLUMNS, 0)})
        row["tried"] += 1
        row[trial.column] = row.get(trial.column, 0) + 1
    return table


def lines_of(table: dict[str, dict[str, int]]) -> list[str]:
    names = ["tried", *COLUMNS, "broken"]
    rows = {**table, "all": {name: sum(row.get(name, 0) for row in table.values()) for name in names}}
    return [
        " | ".join([f"{'kind':<18}", *(f"{name:>9}" for name in names)]),
        *(" | ".join([f"{kind:<18}", *(f"{row.get(name, 0):>9}" for name in names)]) for kind, row in rows.items()),
    ]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="a few trials of each kind")
    parser.add_argument("--only", default="", help="KIND,KIND or KIND:NUMBER")
    parser.add_argument("--most", type=int, help="trials of a kind at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", default="", help="file for the table and for every trial that went wrong")
    parser.add_argument("--folder", default="", help="where to work; default a new folder of the system's for such")
    args = parser.parse_args(argv)
    counts = {name: kind.short if args.short else kind.long for name, kind in kinds().items()}
    wanted = []
    for word in args.only.split(",") if args.only else counts:
        name, _, number = word.partition(":")
        most = min(counts[name], args.most or counts[name])
        wanted += [(name, int(number))] if number else [(name, i) for i in range(most)]
    place = Path(args.folder or tempfile.mkdtemp(prefix="faults-")).resolve()
    told = []
    for trial in all_trials(wanted, place, args.seed, args.jobs):
        told.append(trial)
        if trial.column not in GOOD or len(wanted) == 1:
            print(f"{trial.kind}:{trial.number} {trial.column} | {gist(trial.text)}", flush=True)
        if ":" in args.only:
            print(trial.text, place)
    table = table_of(told)
    print("\n".join(lines_of(table)))
    if args.json:
        wrong = [t._asdict() for t in told if t.column not in ("clear", "right")]
        Path(args.json).write_text(json.dumps({"seed": args.seed, "table": table, "wrong": wrong}, indent=1))
    return table


if __name__ == "__main__":
    main()
