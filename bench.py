"""Benchmarks: ratios to a named peer, or to what the machine can do, side by side in one run.

    python bench.py                              # the list of them, with minutes; runs nothing
    python bench.py ghmm arxiv --json=out.json   # two of them, the results written too
    python bench.py all                          # those of the list that need no GPU
    python bench.py arxiv --peer=NANOGPT         # against a checkout of nanoGPT too
    python bench.py ghmm --peer=SIMPLEXITY --peer_python=PYTHON     # which needs jax and equinox

Each result is {name, value, unit, against, ratio, spread, ratio_spread, marked}: a median over
rounds in turns, ratio value / the peer's value, so above 1 is faster (of memory, below 1 is less),
spreads (q3 - q1) / median, marked where one is above 25%. Both sides train on fresh batches,
without denormal numbers, once their rate is steady. Peers take part where they can be imported:
hmmlearn, transformer-lens before version 4 (`pip install "transformer-lens<4"`), tokenizers,
transformers, arc-state, cell-load; a line says which was missing.
"""

# First, as a Ctrl-C while what follows is imported shall be quiet.
from common.errors import clear_errors  # isort: skip

import argparse
import functools
import importlib
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from benchmarks import racing
from common.runlog import write_json
from common.telling import begin
from configurator import fail
from sources.shared import closest


class Bench(NamedTuple):
    """A row of the list: minutes on two idle cores, with what by path (its name, a file of it); needs a GPU."""

    minutes: int
    races: str
    peer: str = ""
    looked_for: str = ""
    on_gpu: bool = False


BENCHES = {
    "ghmm": Bench(
        2, "drawing, filtering and training, against hmmlearn, Simplexity and HookedTransformer",
        "Simplexity", "simplexity/generative_processes/hidden_markov_model.py"),
    "arxiv": Bench(
        4, "tokenizer, loader and training, against tokenizers, h5py, GPT-2 of transformers and nanoGPT",
        "nanoGPT", "model.py"),
    "apelr": Bench(
        7, "training and writing against APEL-R's source; planners against the baseline",
        "APEL-R", "src/apelr/model_v2.py"),
    "state": Bench(4, "loader, training and distance, against cell-load, arc-state and geomloss"),
    "scale": Bench(3, "how time and memory grow with the work: exponents against their laws"),
    "gpu": Bench(
        15, "default and published runs on a GPU: share of its matrix rate, memory, compile, bf16, resume, its tests",
        on_gpu=True),
}


def main(argv: list[str] | None = None) -> list[dict]:
    with clear_errors():
        options = parse(argv)
        if not options.names:
            return print_list()
        check(options)
        return measure(options)


def parse(argv: list[str] | None) -> argparse.Namespace:
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    form = functools.partial(argparse.RawDescriptionHelpFormatter, width=width, max_help_position=20)
    parser = argparse.ArgumentParser(prog="python bench.py", description=__doc__, formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHES)}, or all; without: the list")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument("--peer", metavar="PATH", action="append", default=[],
                        help="checkout of a peer, for the named benchmarks that take one; may be given once for each")
    parser.add_argument("--peer_python", metavar="PATH", help="a Python with jax and equinox, for Simplexity")
    parser.add_argument("--full", action="store_true", help="apelr: the whole grid of shapes, an hour; state: state_sm "
                        "with its loader too")
    parser.add_argument("--only", metavar="TEXT", default="", help="scale, gpu: the rows whose name holds this")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="gpu: cuda, or cpu to see that it runs")
    parser.add_argument("--short", action="store_true", help="two rounds of one step: to see that a benchmark runs")
    parser.error = functools.partial(refuse, parser)
    return parser.parse_args(argv)


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """One line, as everywhere, with the option that was meant."""
    what, _, word = message.partition(": ")
    if what == "unrecognized arguments":
        known = [option for action in parser._actions for option in action.option_strings]
        fail(f"{word.split()[0]}: no such option{closest(word.split()[0].split('=')[0], known)}")
    fail(message)


def print_list() -> list[dict]:
    """Names, minutes and what each races."""
    print(racing.describe(racing.machine()))
    print("\npython bench.py NAME ..., with minutes on two idle cores (options: --help):")
    minutes = sum(it.minutes for it in BENCHES.values() if not it.on_gpu)
    rows = {**BENCHES, "all": Bench(minutes, "all of these that need no GPU")}
    for name, it in rows.items():
        by_path = f" (--peer: a checkout of {it.peer})" if it.peer else ""
        start = f"  {name:<6} {it.minutes:>3} min   "
        print(textwrap.fill(it.races + by_path, 100, initial_indent=start, subsequent_indent=" " * len(start)))
    return []


def check(options: argparse.Namespace) -> None:
    """Everything that can be wrong, before anything is measured. Leaves in options.peers a path by benchmark."""
    known = [*BENCHES, "all"]
    for name in options.names:
        if name not in known:
            fail(f"no benchmark {name!r}{closest(name, known) or '.'} There are {', '.join(known)}")
    without_gpu = [name for name, it in BENCHES.items() if not it.on_gpu]
    each = [one for name in options.names for one in (without_gpu if name == "all" else [name])]
    options.names = list(dict.fromkeys(each))
    for option, users in (("only", ("scale", "gpu")), ("device", ("gpu",)), ("full", ("apelr", "state")),
                          ("peer_python", ("ghmm",))):
        if getattr(options, option) and not {*users} & {*options.names}:
            fail(f"--{option} is for {' and '.join(users)} alone")
    if options.json is not None and not Path(options.json).resolve().parent.is_dir():
        fail(f"--json={options.json}: its folder does not exist")
    if options.json is not None and Path(options.json).is_dir():
        fail(f"--json={options.json}: that is a folder; name a file")
    if "gpu" in options.names and not torch.cuda.is_available() and not (options.device == "cpu" and options.short):
        fail(f"gpu: this torch ({torch.__version__}) sees no GPU; --device=cpu --short drives it in miniature")
    takers = {name: BENCHES[name] for name in options.names if BENCHES[name].peer}
    if "gpu" in options.names:
        takers["apelr"] = BENCHES["apelr"]
    options.peers = {}
    for path in options.peer:
        names = [name for name, it in takers.items() if (Path(path) / it.looked_for).is_file()]
        if not names:
            wanted = " or ".join(f"{it.looked_for} ({it.peer}, for {name})" for name, it in takers.items())
            fail(f"--peer={path}: there is no {wanted} in it" if takers else f"--peer={path}: no benchmark named here "
                 "takes a checkout")
        options.peers |= dict.fromkeys(names, Path(path).resolve())
    if "ghmm" in options.peers:
        importlib.import_module("benchmarks.ghmm").check_jax(options.peers["ghmm"], options.peer_python)


def measure(options: argparse.Namespace) -> list[dict]:
    """What the command line asks for: the results."""
    machine = racing.machine()
    print(racing.describe(machine))
    print(racing.LEGEND)
    racing.RESULTS.clear()
    racing.SHORT = options.short
    written = {name: str(value) for name, value in vars(options).items() if value and name != "json"}
    about = racing.result("machine", machine["cores"], "cores", racing.describe(machine))
    about |= {"machine": machine, "settings": written}
    for name in options.names:
        options.peer = options.peers.get(name)
        it = BENCHES[name]
        begin(__file__, f"{name}, {it.races}; about {it.minutes} min on an idle machine", file=sys.stdout)
        with racing.without_denormals(), racing.load_told(name):
            importlib.import_module(f"benchmarks.{name}").bench(options)
        if options.json:  # after each: an error of the next leaves it
            write_json(Path(options.json), [about, *racing.RESULTS])
    return racing.RESULTS


if __name__ == "__main__":
    main()
