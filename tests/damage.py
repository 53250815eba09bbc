"""Small files of every format that the scripts read, and damage to them: to their bytes, their lines, their values.

make_goods fills a folder with such files; FORMATS says how each is damaged and by which commands it is read. Damage is
a function of a random.Random, so that a seed brings it back. faults.py counts what comes of it.
"""

import ast
import contextlib
import gzip
import importlib
import io
import json
import math
import random
import re
import shutil
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import scipy.sparse
import torch
import yaml

# ---------------------------------------------------------------------------------------------------------------
# Small runs of the four scripts, and the files that they read
# ---------------------------------------------------------------------------------------------------------------
COMMON = ("--batch_size=8 --max_steps=6 --warmup_steps=0 --log_interval=1 --eval_interval=2 --save_interval=2 "
          "--device=cpu --precision=fp32 --n_layers=1 --d_model=8")
TINY = {
    "ghmm": "--d_mlp=8 --n_ctx=4 --max_words=100 --eval_sequences=16",
    "arxiv": "--n_heads=2 --d_mlp=8 --bootstrap=5 --no-probe --data=data/ergodic",
    "apelr": "--num_plan_states=2 --chunk_size=4 --seq_len=15 --token_dim=4 --eval_batches=1 --final_eval_batches=1 "
             "--preview_tokens=0 --data=data/text",
    "state": "--n_heads=2 --d_mlp=8 --cell_set_len=4 --eval_sentences=4 --toml=data/cells.toml",
}
STORIES = "prepare_data text --val_fraction=0.3 --input=data/stories.jsonl"
CELLS = ("prepare_data state --num_cell_types=4 --num_perturbations=3 --num_genes=20 --num_batches=2 "
         "--cells_per_condition=8 --controls_per_cell_type=8 --out_dir=data")
COMPONENTS = [{"name": "a", "process": "coin", "p": 0.9}, {"name": "b", "process": "coin", "p": 0.1}]
SETTINGS = {"model": "gru", "lr": 3e-3, "n_layers": 1, "d_model": 8, "n_ctx": 4, "process": "mess3", "act": "gelu",
            "schedule": "cosine", "carry_state": False, "seed": 3}


def training(page: str, words: str = "", out: str = "new") -> str:
    """The command of a small run: 6 steps, saved every second."""
    return f"train_{page} {COMMON} {TINY[page]} --out_dir={out} {words}"


def call(command: str, *words: str) -> None:
    """A command in this process."""
    script, *rest = command.split()
    importlib.import_module(script).main([*rest, *words])


def make_goods() -> None:
    """Fill the current folder: data/ (files to read), out/ (a run of each script, at step 4 of 6), ended/ (the whole
    runs), foreign/ (checkpoints of the source systems), config/ (settings in every notation)."""
    write_texts()
    call("prepare_data ergodic --train_documents=12 --chunk_size=8 --validation_documents=5 --test_documents=0 "
         "--out_dir=data/ergodic", f"--components={json.dumps(COMPONENTS)}")
    call(f"{STORIES} --tokenizer=char --out_dir=data/text")
    call(CELLS)
    write_cells()
    write_configs()
    write_foreign()
    for page in TINY:
        run, ended = Path("out", page), Path("ended", page)
        call(training(page, "--keep_last=-1", out=str(run)))
        shutil.copytree(run, ended)
        kept = ("step_4.pt", "config.json", "metrics.jsonl", "tokenizer.json", f"train_{page}.py")
        for file in [file for file in run.iterdir() if file.name not in kept]:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        (run / "step_4.pt").rename(run / "last.pt")
        for file in ended.glob("step_*"):
            file.unlink()


def write_texts() -> None:
    """data/stories and data/papers (.jsonl, .jsonl.gz), and data/matrices.npz: a process of two states and tokens."""
    Path("data").mkdir()
    lines = []
    for n in range(9):
        for who in ("Lily", "Beep"):
            for what in ("a needle", "the fuel"):
                line = {"text": f"Once upon a time {who} found {what} {n} times.", "category": what.split()[1]}
                lines.append(json.dumps(line) + "\n")
    for name in ("stories", "papers"):
        Path(f"data/{name}.jsonl").write_text("".join(lines))
        Path(f"data/{name}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    np.savez("data/matrices.npz", matrices=np.array([[[0.5, 0.1], [0.2, 0.3]], [[0.1, 0.3], [0.3, 0.2]]]))


def write_cells() -> None:
    """data/cells.h5ad and data/sparse.h5ad with their .toml: the synthetic cells with X dense and as CSR."""
    from sources.h5ad import H5ad, as_dense, write_h5ad

    with H5ad("data/synthetic.h5ad") as file:
        dense = np.concatenate([as_dense(block) for _, _, block in file.matrix(None).blocks()])
        columns = {}
        for name in ("gene", "cell_type", "gem_group"):
            codes, names = file.column(name)
            columns[name] = np.array(names)[codes]
        genes = file.gene_names
    marked = np.ones(len(genes), bool)
    for name, X in (("cells", dense), ("sparse", scipy.sparse.csr_array(dense))):
        write_h5ad(f"data/{name}.h5ad", X, columns, genes, {"X_hvg": X}, var={"highly_variable": marked})
        text = Path("data/synthetic.toml").read_text().replace("synthetic", name)
        Path(f"data/{name}.toml").write_text(text)


def write_configs() -> None:
    """config/tiny.json, .yaml and .py, for train_ghmm.py."""
    Path("config").mkdir()
    Path("config/tiny.json").write_text(json.dumps(SETTINGS, indent=1))
    Path("config/tiny.yaml").write_text("# a comment\n" + yaml.safe_dump(SETTINGS))
    lines = [f"{name} = {value!r}  # a comment\n" for name, value in SETTINGS.items()]
    Path("config/tiny.py").write_text('"""A small run."""\n' + "".join(lines))


def write_foreign() -> None:
    """foreign/ghmm, foreign/arxiv, foreign/apelr: checkpoints in the forms of the source systems; foreign/own: text in
    the tokens of the last."""
    import test_dialect_arxiv
    import test_dialect_ghmm
    import test_foreign_apelr

    Path("foreign").mkdir()
    Path("foreign/itos.json").write_text(json.dumps({"itos": test_foreign_apelr.ITOS}))
    test_foreign_apelr.source_run("foreign/apelr", Path("foreign/itos.json"))
    call(f"{STORIES} --tokenizer=foreign/itos.json --out_dir=foreign/own")
    test_dialect_ghmm.put(test_dialect_ghmm.hooked_weights(), folder="foreign/ghmm")
    test_dialect_arxiv.write_source("foreign/arxiv/latest.pt")


# ---------------------------------------------------------------------------------------------------------------
# Damage to bytes and to text
# ---------------------------------------------------------------------------------------------------------------
ACCIDENTS = "bit bit bit bit noise zeros cut cut lost twice more swap".split()
SLIPS = "word word word word word word drop drop out twice swap join bytes".split()
ODD_WORDS = ["", "[" * 3_000, "{" * 3_000, "\0", "\ud7ff", "é", "\u2028", "9" * 400, "1" * 5_000, "x" * 70_000,
             "\ufeff", "&a [*a]", "<<: *x", "\t", "\r", "\x1b", "# "]
ODD_WORDS += """-1 0 1e400 -1e400 nan NaN inf null None true ' " [ ] { } 0x10 1_0 ~ !!python/none = : , ... ../.. / %s
                {0} /dev/null 1e-400 18446744073709551616 -9223372036854775809 0.1.2 2024-01-01""".split()


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """The content of a file after one accident of a disk or of a copy."""
    at = draw.randrange(max(1, len(data)))
    to = min(len(data), at + draw.choice([1, 2, 8, 64, 512]))
    half = (at + to) // 2
    before, hit, after = data[:at], data[at:to], data[to:]
    kind = draw.choice(ACCIDENTS)
    if kind == "bit" and data:
        return before + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == "noise":
        return before + draw.randbytes(len(hit)) + after
    if kind == "zeros":
        return before + bytes(len(hit)) + after
    if kind == "cut":
        return before
    if kind == "lost":
        return before + after
    if kind == "twice":
        return before + hit + hit + after
    if kind == "swap":
        return before + data[half:to] + data[at:half] + after
    return data + draw.randbytes(1 + len(hit))


def damaged_text(data: bytes, draw: random.Random) -> bytes:
    """The content of a text file after a slip of an editor, one in four times after an accident."""
    try:
        text = data.decode()
    except ValueError:  # no text
        return damaged_bytes(data, draw)
    words = list(re.finditer(r"[\w.+-]+|[^\w\s]", text))
    if draw.random() < 0.25 or not words:
        return damaged_bytes(data, draw)
    kind = draw.choice(SLIPS)
    if kind in ("word", "drop"):
        word = draw.choice(words)
        new = draw.choice(ODD_WORDS) if kind == "word" else ""
        return (text[: word.start()] + new + text[word.end() :]).encode()
    lines = data.splitlines(keepends=True)
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    if kind == "out":
        del lines[at]
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == "join":
        lines[at] = lines[at].strip()
    else:
        lines.insert(at, draw.choice([b"\xff\xfe", b"\xc3", "\udc80".encode(errors="surrogatepass")]))
    return b"".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# Damage to values, by the means of a format
# ---------------------------------------------------------------------------------------------------------------
ODD_VALUES = [None, -1, 0, 1, 2**63, -(2**63), 10**30, 0.5, -0.5, math.nan, math.inf, -math.inf, 1e308, True, "", "x",
              "../x", "\0", "9" * 50, [], {}, [[]], [None], [1, "a"], [0] * 50, {"x": 1}, {"": {}}]


def places(value: Any, way: tuple = ()) -> Iterator[tuple]:
    """The way to every value in nested dicts and lists."""
    items = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, part in items[:200]:
        yield (*way, key)
        yield from places(part, (*way, key))


def damage_values(value: Any, draw: random.Random) -> Any:
    """Nested plain data with one value gone, under another name, or replaced."""
    ways = list(places(value))
    if not ways:
        return draw.choice(ODD_VALUES)
    *outer, key = draw.choice(ways)
    holder = value
    for step in outer:
        holder = holder[step]
    old = holder[key]
    kind = draw.choice(["odd", "odd", "odd", "odd", "gone", "renamed", "near"])
    if kind == "gone":
        del holder[key]
    elif kind == "renamed" and isinstance(holder, dict):
        holder[draw.choice(["x", "", "step ", 3])] = holder.pop(key)
    elif kind == "near" and isinstance(old, torch.Tensor):
        holder[key] = odd_tensor(old, draw)
    elif kind == "near" and type(old) in (int, float):
        holder[key] = old + draw.choice([1, -1, 0.5])
    else:
        holder[key] = draw.choice(ODD_VALUES)
    return value


def odd_tensor(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """A tensor of another shape, kind or content."""
    if not tensor.numel():
        return torch.ones(3)
    if tensor.is_floating_point() and draw.random() < 0.5:
        wrong = tensor.clone()
        wrong.view(-1)[draw.randrange(tensor.numel())] = draw.choice([math.nan, math.inf, 1e30, 0.0])
        return wrong
    kinds = [
        tensor.double(),
        tensor.half(),
        tensor.int(),
        tensor.bool(),
        tensor.to(torch.complex64),
        tensor.to_sparse(),
        tensor.to("meta"),
    ]
    shapes = [
        tensor[None],
        tensor.flatten()[:-1],
        torch.zeros(0),
        torch.zeros(1).expand(1 << 20),
    ]
    return draw.choice([*kinds, *shapes])


class Bomb:
    """A pickle that makes the file ../exploded when its code is run."""

    def __reduce__(self):
        return open, (str(Path("../exploded").resolve()), "w")


def damage_torch(file: Path, draw: random.Random) -> bool:
    """A checkpoint with other contents; returns whether nobody may read it."""
    state = torch.load(file, weights_only=True)
    if draw.random() < 0.05:
        torch.save(draw.choice([Bomb(), state | {"extra": Bomb()}]), file)
        return True
    if draw.random() < 0.1:
        state = draw.choice([[1, 2], torch.ones(2), "text", {}, None, {"model": state.get("model")}])
    else:
        state = damage_values(state, draw)
    torch.save(state, file, _use_new_zipfile_serialization=draw.random() > 0.05)
    return False


def damage_sealed(file: Path, draw: random.Random) -> bool:
    """A checkpoint of ours with other contents, half of the time with the digest that belongs to them, so that only
    what the values mean is wrong; returns whether nobody may read it."""
    from common import checkpoint

    is_forbidden = damage_torch(file, draw)
    with contextlib.suppress(Exception):  # a pickle, a text: nothing that has a digest
        state = torch.load(file, weights_only=True)
        if draw.random() < 0.5 and hasattr(checkpoint, "seal"):
            torch.save(checkpoint.seal(state), file)
    return is_forbidden


HDF5 = """gone group scalar null shape type values values values huge soft circle dead external elsewhere storage
          virtual attribute attribute text""".split()
FORBIDDEN = ("external", "storage", "virtual")  # other files of the machine would be read
ODD_TYPES = ["f8", "i1", "S3", "u8", "c8", "?", h5py.string_dtype(), np.dtype([("x", "i4")]), h5py.vlen_dtype("i4"),
             h5py.ref_dtype]
ODD_ATTRIBUTES = [-1, 0, 10**6, "x", "", math.nan, [1, 2, 3], np.void(b"xx"), h5py.Empty("f4")]


def damage_hdf5(file: Path, draw: random.Random) -> bool:
    """An HDF5 file with one object replaced, or with a link or storage that leads elsewhere; returns whether nobody may
    read it."""
    with h5py.File(file, "r+") as f:
        names = []
        f.visit(names.append)
        name, kind = draw.choice(names), draw.choice(HDF5)
        old = f[name]
        if kind == "attribute" and len(old.attrs):
            damage_attribute(old, draw)
        elif kind == "values" and isinstance(old, h5py.Dataset):
            damage_dataset(old, draw)
        else:
            array = np.asarray(old[()]) if isinstance(old, h5py.Dataset) else np.zeros(3)
            del f[name]
            if kind in ("soft", "circle", "dead", "external", "elsewhere"):
                targets = {"soft": "/" + draw.choice(names), "circle": "/" + name, "dead": "/nowhere"}
                f[name] = h5py.SoftLink(targets[kind]) if kind in targets else link_out(file, name, kind)
            else:
                replace_dataset(f, file, name, kind, array, draw)
    return kind in FORBIDDEN


def link_out(file: Path, name: str, kind: str) -> h5py.ExternalLink:
    """A link to another file, which is there or (elsewhere) not."""
    if kind == "elsewhere":
        return h5py.ExternalLink("nowhere.h5", "/x")
    return h5py.ExternalLink(secret_of(file, name), "/" + name)


def replace_dataset(f: h5py.File, file: Path, name: str, kind: str, array: np.ndarray, draw: random.Random) -> None:
    """Put something odd where this array was."""
    number = array.dtype if array.dtype.kind in "iuf" else np.dtype("f4")
    if kind == "group":
        f.create_group(name)
    elif kind == "scalar":
        f[name] = draw.choice([3, 0.5, "x", np.void(b"x")])
    elif kind == "null":
        f[name] = h5py.Empty("f4")
    elif kind == "shape":
        f[name] = draw.choice([array[None], array.flatten(), array.flatten()[:0], np.concatenate([array, array])])
    elif kind == "type":
        f.create_dataset(name, array.shape, draw.choice(ODD_TYPES))
    elif kind == "huge":
        f.create_dataset(name, draw.choice([(1 << 40,), (1 << 33, 1 << 20), (1 << 62,)]), number, chunks=True)
    elif kind == "storage":
        secret = Path("../secret").resolve()
        secret.write_bytes(b"\1" * max(1, array.nbytes))
        f.create_dataset(name, array.shape or (1,), number, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout(array.shape, array.dtype)
        layout[:] = h5py.VirtualSource(secret_of(file, name), name, array.shape)
        f.create_virtual_dataset(name, layout)
    elif kind == "text":
        f[name] = draw.choice(["", "é" * 50, b"\xff\xfe", "x" * 70_000])


def secret_of(file: Path, name: str) -> str:
    """Another file with this object in it, of other content: who reads that computes something else."""
    secret = Path("../secret.h5").resolve()
    shutil.copyfile(file.with_name("whole"), secret)
    with h5py.File(secret, "r+") as f:
        old = f[name]
        if isinstance(old, h5py.Group):
            old.clear()
        elif old.dtype.kind in "iuf" and old.size:
            old[...] = np.roll(old[()], 1) + 1
        elif old.size and old.shape:
            old[0] = "secret"
    return str(secret)


def damage_attribute(holder: h5py.Group | h5py.Dataset, draw: random.Random) -> None:
    """One attribute gone, or of an odd value."""
    name = draw.choice(list(holder.attrs))
    if draw.random() < 0.5:
        del holder.attrs[name]
    else:
        holder.attrs[name] = draw.choice(ODD_ATTRIBUTES)


def damage_dataset(data: h5py.Dataset, draw: random.Random) -> None:
    """One odd value in a dataset."""
    if data.dtype.kind in "iuf" and data.size:
        data[...] = with_odd_number(data[()], draw)
    elif data.size and data.shape:
        data[draw.randrange(len(data))] = draw.choice(["", "x", "a/b", "\u00e9", "nan"])


def with_odd_number(array: np.ndarray, draw: random.Random) -> np.ndarray:
    """The numbers with one of them changed."""
    flat = np.array(array).reshape(-1)
    odd = [-1, 0, 1, 9, 255, 60_000, 2**31 - 1, flat[0]]
    if flat.dtype.kind == "f":
        odd += [math.nan, math.inf, -math.inf, -3.0, 1e30]
    with np.errstate(all="ignore"):
        flat[draw.randrange(flat.size)] = np.array(draw.choice(odd)).astype(flat.dtype)
    return flat.reshape(np.shape(array))


def damage_json(file: Path, draw: random.Random) -> None:
    """A JSON file, or one of JSON lines, with one odd value."""
    text = file.read_text()
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    at = draw.randrange(len(lines))
    lines[at] = json.dumps(damage_values(json.loads(lines[at]), draw))
    file.write_text("\n".join(lines) + "\n")


def damage_npz(file: Path, draw: random.Random) -> None:
    """An .npz with odd arrays."""
    with np.load(file) as archive:
        arrays = dict(archive)
    name = draw.choice(list(arrays))
    if draw.random() < 0.1:
        damage_header(file, name)
        return
    number = np.asarray(arrays[name], float) if arrays[name].dtype.kind in "iuf" else np.zeros(3)
    with np.errstate(all="ignore"):
        values = [-number - 1, number * math.nan, number * math.inf, number * 1e308]
    shapes = [np.float64(3), number[:0], number[None], number.flatten()]
    objects = np.array([None, {}], object)
    types = [number.astype("S3"), number + 1j, number.astype("i1"), objects]
    arrays[name] = draw.choice([*values, *shapes, *types])
    if draw.random() < 0.2:
        del arrays[name]
    if draw.random() < 0.1:
        arrays["x"] = number
    np.savez(file, **arrays)


def damage_header(file: Path, name: str) -> None:
    """An array that says that it is larger than any disk."""
    header = {"descr": "<f8", "fortran_order": False, "shape": (1 << 40, 1 << 10)}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.npy", buffer.getvalue())


def damage_array(file: Path, draw: random.Random) -> None:
    """An .npy or .bin with odd numbers, of another length or kind."""
    array = np.load(file) if file.suffix == ".npy" else np.fromfile(file, np.uint16)
    wrong = [array[:-1], array[:0], np.concatenate([array, array]), array.astype("f8"), array[None]]
    if array.size and array.dtype.kind in "iuf":
        wrong += [with_odd_number(array, draw) for _ in range(4)]
    chosen = draw.choice(wrong)
    np.save(file, chosen) if file.suffix == ".npy" else chosen.tofile(file)


def damage_prepared(file: Path, draw: random.Random) -> None:
    """A file of a prepared folder or of a run, by its format."""
    if file.suffix in (".json", ".jsonl"):
        damage_json(file, draw)
    else:
        (damage_npz if file.suffix == ".npz" else damage_array)(file, draw)


# ---------------------------------------------------------------------------------------------------------------
# What a text means to somebody else
# ---------------------------------------------------------------------------------------------------------------
def parse_toml(text: bytes) -> dict:
    return tomllib.loads(text.decode())


def toml_text(value: Any) -> str:
    """A value as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(toml_lines(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml_text(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (bool, float, int)):
        return str(value).lower()
    return value.isoformat()  # a date or a time


def toml_lines(value: dict) -> list[str]:
    return [f"{json.dumps(key, ensure_ascii=False)} = {toml_text(part)}" for key, part in value.items()]


def parse_python(text: bytes) -> dict:
    """The settings of a .py file of plain assignments. Raises ValueError where it is no Python, LookupError where it is
    more than that."""
    found = {}
    try:
        for line in ast.parse(text).body:
            if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
                continue  # the docstring
            if not isinstance(line, ast.Assign) or len(line.targets) != 1 or not isinstance(line.targets[0], ast.Name):
                raise LookupError("no plain assignment")
            try:
                found[line.targets[0].id] = ast.literal_eval(line.value)
            except ValueError as error:
                raise LookupError("no literal") from error
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error
    return found


def write_python(values: dict) -> str:
    return "".join(f"{name} = {value!r}\n" for name, value in values.items())


# ---------------------------------------------------------------------------------------------------------------
# Formats: files, how they are damaged, who reads them
# ---------------------------------------------------------------------------------------------------------------
class Format(NamedTuple):
    """Files that a fault may hit, and the commands that read them.

    needs: folders of the goods. cases: (pattern of files, commands that read them, with {folder} for that of the file).
    inside: damage by the means of the format, to what it means, or None; accident: damage to bytes. parse: bytes ->
    what an independent parser makes of them, raising ValueError; write: that as text once more, in another spelling.
    is_checked: a checksum covers the bytes; guards_values: the checksum is of a kind that no other program writes, so
    that values changed by the means of the format are noticed too.
    """

    needs: str
    cases: list[tuple[str, list[str]]]
    inside: Callable | None = None
    accident: Callable = damaged_bytes
    parse: Callable | None = None
    write: Callable | None = None
    is_checked: bool = False
    guards_values: bool = False


SAMPLED = {"ghmm": "--num_samples=1 --length=4", "arxiv": "--num_samples=1 --length=5",
           "apelr": "--num_samples=1 --max_new_tokens=4 --prompt=Once", "state": "--out=new"}
FOREIGN = {"apelr": "foreign/apelr/checkpoint.pt", "arxiv": "foreign/arxiv/latest.pt",
           "ghmm": "foreign/ghmm/40/model.pt"}
PREPROCESS = "prepare_data state preprocess --out_dir=new --input=data"
CONFIG = "train_ghmm --print_config config/tiny"


def analysis(page: str, path: str) -> str:
    return f"train_{page} {COMMON} {TINY[page]} --analyze={path}"


def readers_of_ours(page: str) -> tuple[str, list[str]]:
    """(the checkpoint of a run of ours, the commands that read it)."""
    run = f"out/{page}"
    readers = [
        training(page, out=run),
        training(page, f"--resume={run}/last.pt"),
        f"sample {run} --device=cpu {SAMPLED[page]}",
        analysis(page, run),
    ]
    if page in ("apelr", "state"):
        readers.append(training(page, f"--init_from={run}"))
    return f"{run}/last.pt", readers


def readers_of_theirs(page: str, path: str) -> tuple[str, list[str]]:
    """(the checkpoint of a source system, the commands that read it)."""
    prompt = {"apelr": "--prompt=1,2", "arxiv": "--length=6", "ghmm": ""}[page]
    readers = [f"prepare_data import {path} --out_dir=new", f"sample {path} --device=cpu --num_samples=1 {prompt}"]
    if page == "apelr":
        readers.append(training(page, f"--init_from={path} --data=foreign/own"))
    return path, readers


FORMATS = {
    "last.pt": Format("out data", [readers_of_ours(page) for page in TINY], damage_sealed, is_checked=True),
    "foreign": Format("foreign data", [readers_of_theirs(*item) for item in FOREIGN.items()], damage_torch,
                      is_checked=True),  # of its records, as of every zip
    "chunks": Format("data", [
        ("data/ergodic/*.h5", [training("arxiv"), "prepare_data inspect {folder}"])],
        damage_hdf5, is_checked=True, guards_values=True),
    "h5ad dense": Format("data", [
        ("data/cells.h5ad", [training("state"), "prepare_data inspect data/cells.h5ad", f"{PREPROCESS}/cells.h5ad",
                             "prepare_data inspect data/cells.toml"])],
        damage_hdf5),
    "h5ad sparse": Format("data", [
        ("data/sparse.h5ad", [training("state", "--toml=data/sparse.toml"), "prepare_data inspect data/sparse.h5ad",
                              f"{PREPROCESS}/sparse.h5ad"])],
        damage_hdf5),
    "cell store": Format("data", [
        (f"data/cells/*/{name}", [training("state"), "prepare_data inspect {folder}"]) for name in ("*.npy", "*.json")],
        damage_prepared, is_checked=True, guards_values=True),
    "tokens": Format("data", [
        (f"data/text/{name}", [training("apelr"), "prepare_data inspect {folder}"]) for name in ("*.bin", "meta.json")],
        damage_prepared, is_checked=True, guards_values=True),
    "tokenizer.json": Format("data out", [
        ("data/text/tokenizer.json", [training("apelr"), "prepare_data inspect {folder}",
                                      f"{STORIES} --tokenizer=data/text/tokenizer.json --out_dir=new"]),
        ("out/apelr/tokenizer.json", [f"sample out/apelr --device=cpu {SAMPLED['apelr']}"])],
        damage_json, damaged_text),
    "toml": Format("data", [
        ("data/cells.toml", [training("state"), "prepare_data inspect data/cells.toml"])],
        None, damaged_text, parse_toml, lambda value: "\n".join(toml_lines(value)) + "\n"),
    "yaml": Format("config", [
        ("config/tiny.yaml", [f"{CONFIG}.yaml"])],
        None, damaged_text, yaml.safe_load, json.dumps),
    "json": Format("config", [
        ("config/tiny.json", [f"{CONFIG}.json"])],
        damage_json, damaged_text, json.loads, json.dumps),
    "py": Format("config", [
        ("config/tiny.py", [f"{CONFIG}.py"])],
        None, damaged_text, parse_python, write_python),
    "npz": Format("data", [
        ("data/matrices.npz", [training("ghmm", "--process=custom --matrices=data/matrices.npz")])],
        damage_npz, is_checked=True),  # a zip, too
    "jsonl.gz": Format("data", [
        ("data/stories.jsonl.gz", [f"{STORIES}.gz --tokenizer=char --out_dir=new"]),
        ("data/papers.jsonl.gz", ["prepare_data arxiv --input=data/papers.jsonl.gz --vocab_size=280 --chunk_size=8 "
                                  "--validation_fraction=0.3 --out_dir=new"])],
        is_checked=True),
    "run files": Format("ended data", [
        *((f"ended/{page}/*.json*", [training(page, "--keep_last=-1", out=f"ended/{page}"),
                                     "sweep report {folder} --out=new"]) for page in TINY),
        ("ended/arxiv/documents.npz", ["sweep report ended/arxiv --out=new"])],
        damage_prepared, damaged_text),
}
