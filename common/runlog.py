"""What a run leaves behind: aligned lines on the console, a progress bar, and the files of the run folder.

config.json (settings), metrics.jsonl (one object a line: step, time_s, split, values), train.log (all lines),
summary.json (final metrics) and a copy of the script. TensorBoard and W&B only if asked for.
"""

import contextlib
import importlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from common import checkpoint
from common.errors import InputError, RunError, hush, leave, reason, regular_file, replacing, system_sentence, writing
from common.telling import begin, duration, fitted, note

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # names of files may be no text
FILES = (".1", ".csv", ".html", ".json", ".jsonl", ".lock", ".log", ".npz", ".png", ".pt", ".py", ".txt", ".yaml")
FOLDERS = ("checkpoints", "plots", "smolstate", "tensorboard", "wandb")
MOST_HEADLINES = 6  # with the verdict and the places a run ends in eight lines
LOG_BYTES = 10_000_000  # a longer train.log becomes train.log.1


class RunLog:
    """Opened once the run is known to be valid; rank 0 writes and prints, all other ranks' calls do nothing.

    Args:
        folder: the run folder, made if missing.
        start_step: steps already done; later lines of an interrupted run's metrics.jsonl are dropped.
        data: {what names the data: fingerprint}, for summary.json: runs on other data are not compared as equals.
    """

    def __init__(self, rt, cfg, config: dict, folder: Path, script: str, start_step: int, max_steps: int,
                 data: dict[str, str] | None = None):
        self.rt, self.active, self.folder, self.began = rt, rt.is_main, folder, time.perf_counter()
        self.data = {"data": data} if data else {}
        self.bar = self.board = self.wandb = None
        self.level = LEVELS.index(getattr(cfg, "log_level", "INFO"))
        goes_on = cfg.resume == "auto" and getattr(cfg, "load_checkpoint_step", None) is None
        self.again = "the same command" if goes_on else "the same command with resume=auto"
        rt.agree(**config, **{"the first step": start_step})
        rt.take_signals()
        if rt.ranks:
            rt.ranks.kept = self._goes_on
        if not self.active:
            return
        board = _optional("torch.utils.tensorboard", "tensorboard") if cfg.tensorboard else None
        off = _dotenv("WANDB_MODE") == "disabled"  # whatever the settings say
        self.wandb = _optional("wandb", "wandb") if cfg.wandb and not off else None
        folder.mkdir(parents=True, exist_ok=True)
        look_at_names(folder)
        if self.wandb:
            self._start_wandb(cfg, config, folder, Path(script).stem, start_step)
        write_json(folder / "config.json", config)
        if not (start_step and (folder / Path(script).name).exists()):
            with replacing(folder / Path(script).name) as fresh:
                shutil.copyfile(script, fresh)
        self._text = open(folder / "train.log", "a" if start_step else "w", **TEXT)
        self._metrics = _reopen(folder / "metrics.jsonl", start_step)
        (folder / "summary.json").unlink(missing_ok=True)  # there is one when the run has ended, and only then
        if board:
            self.board = board.SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)
        self.is_first, self.log_interval = True, cfg.log_interval
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=max_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=not terminal,
                        mininterval=0.5, leave=False)

        if cfg.wandb and off:
            self.say("W&B is off: WANDB_MODE=disabled")
        for name, value in config.items():
            self.say(f"  {name} = {value!r}", "DEBUG")

    def _start_wandb(self, cfg, config: dict, folder: Path, project: str, start_step: int) -> None:
        """A resumed run goes on in its own W&B run. Raises InputError where the package does not start one."""
        file, known = folder / "wandb_id.txt", None
        if start_step and file.is_file():
            known = file.read_text(errors="replace").strip()
            if not re.fullmatch(r"[\w-]{1,128}", known, re.ASCII):
                note(f"{file} is damaged: in W&B the run goes on as another one")
                known = None
        project = getattr(cfg, "wandb_project", "") or _dotenv("WANDB_PROJECT") or project
        entity = getattr(cfg, "wandb_entity", "") or _dotenv("WANDB_ENTITY")
        for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):  # what the package reads itself
            if _dotenv(variable):
                os.environ[variable] = _dotenv(variable)
        mode = cfg.wandb if isinstance(cfg.wandb, str) else None  # else as WANDB_MODE says
        try:
            run = self.wandb.init(project=project, entity=entity, mode=mode, config=config, dir=str(folder), id=known,
                                  resume="allow")
        except Exception as e:  # no key, no network, no such project: errors of its own
            raise InputError(f"W&B does not start ({reason(e)}): mend that, or use wandb=offline or wandb=false") from e
        file.write_text(run.id)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """An error of the system becomes a RunError, which says what was kept."""
        told = system_sentence(error)
        if told:
            told = f"{told}. {self._kept()}"
        if self.active:
            if error is not None and not isinstance(error, SystemExit):
                with contextlib.suppress(OSError):
                    self._text.write(f"stopped by {kind.__name__}: {told or error}\n")
            for opened in filter(None, (self.bar, self._metrics, self._text, self.board)):
                with contextlib.suppress(OSError):  # what they still hold has been told of
                    opened.close()
            if self.wandb:
                self.wandb.finish(exit_code=int(error is not None))
        if told:
            raise RunError(told) from error
        if isinstance(error, KeyboardInterrupt):
            error.args = (f"stopped at once. {self._kept()}",)

    def _kept(self) -> str:
        """Where a run that failed can go on."""
        try:
            step = checkpoint.load(self.folder)["step"]
        except (InputError, OSError) as e:
            is_there = (self.folder / "last.pt").exists()
            return str(e) if is_there else f"No checkpoint was saved before: {self.again} begins anew"
        return f"{self.folder / 'last.pt'} of step {step} is whole, and {self.again} goes on from there"

    def _goes_on(self) -> str:
        step = checkpoint.step_of(self.folder)
        return f"{self.again} " + ("begins anew" if step is None else f"goes on from step {step}")

    def say(self, text: str, level: str = "INFO") -> None:
        """A line for the console and train.log, where the setting log_level is not above its level."""
        if not self.active or LEVELS.index(level) < self.level:
            return
        try:
            tqdm.write(fitted(text), file=sys.stdout)
            sys.stdout.flush()
        except OSError as e:  # whoever read it has gone, or its disk is full
            hush(sys.stdout)
            note(f"standard output takes no more ({e.strerror}): the run goes on, and its lines are in "
                      f"{self.folder / 'train.log'}")
        path = self.folder / "train.log"
        with writing(path):
            self._text.write(text + "\n")
            self._text.flush()
            if self._text.tell() > LOG_BYTES:
                self._text.close()
                os.replace(path, self.folder / "train.log.1")
                self._text = open(path, "w", **TEXT)

    def resumed(self, path: Path, step: int, changes: list[str]) -> None:
        """What a run goes on from, and the settings that changed since, a line each."""
        self.say("\n  ".join([f"resumed from {path} at step {step}", *changes]))

    def stopped(self, step: int) -> None:
        self.say(f"stopped by a signal after step {step}; {self.again} goes on from there")

    def metrics(self, step: int, split: str, values: dict) -> None:
        """A line of metrics.jsonl, whole or not at all: numbers, or lists of numbers."""
        if not self.active:
            return
        record = {"step": step, "time_s": round(time.perf_counter() - self.began, 3), "split": split, **values}
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            raise RunError(f"{path} is gone: it or its folder was moved or removed under this run. Put the folder "
                           f"back, and {self.again} goes on from the last checkpoint in it")
        with writing(path):
            self._metrics.write(json.dumps(_plain(record)) + "\n")
            self._metrics.flush()
        numbers = {f"{split}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        if self.board:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def train(self, step: int, values: dict, lr: float, norm, speed: float, left: float, unit: str = "tok",
              **shown: float) -> None:
        """The aligned line of a logging step, and its line in metrics.jsonl.

        Args:
            values: for metrics.jsonl. speed: units (tokens, cells) a second. left: seconds to go.
            shown: numbers for the line and the bar, such as loss and floor.
        """
        if not self.active:
            return
        self.metrics(step, "train", values)
        self.say(f"step {step:>6}/{self.bar.total} | " + "".join(f"{k} {v:.4f} | " for k, v in shown.items())
                 + f"lr {lr:.1e} | norm {float(norm):.2f} | {speed / 1e3:.0f}k {unit}/s "
                 f"| eta {tqdm.format_interval(left)}")
        if self.rt.compiler and (news := self.rt.compiler.news()):
            self.say(news)
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in shown.items()} | {f"{unit}/s": f"{speed / 1e3:.0f}k"})

    def progress(self, step: int, loss: torch.Tensor | None = None, meter=None) -> None:
        """Move the progress bar, which shows on a terminal only; of the first step say its loss.

        Steps may take long, and the means of a line are of many: that one alone says that the model trains.

        Args:
            loss: of this step. meter: whose clock has run since this process began to train.
        """
        if not self.active:
            return
        if not self.bar.disable:
            self.bar.update(step - self.bar.n)
        is_first, self.is_first = self.is_first, False
        next_line = min(self.bar.total, -(-step // self.log_interval) * self.log_interval)
        if is_first and loss is not None and step < next_line:
            told = f"step {step:>6}/{self.bar.total} | loss {float(loss):.4f} | "  # waits for the step to end
            most = (next_line - step) * meter.since_start()
            self.say(f"{told}the next line at step {next_line}, in at most {duration(most)}")

    def summary(self, values: dict, headlines: Collection[str] = ()) -> None:
        """Write summary.json, and say what it comes to: see conclusion."""
        if not self.active:
            return
        write_json(self.folder / "summary.json", values | self.data)
        self.bar.clear()
        for line in conclusion(values, headlines):
            self.say(line)


def run_facts(rt, step: int, meter, unit: str = "tokens") -> dict:
    """What summary.json says of every run: steps, seconds, units a second of training, torch, device."""
    speed = meter.units / meter.seconds if meter.seconds else None  # none where nothing was left to train
    return {"steps": step, "seconds": time.perf_counter() - meter.began, f"{unit}_per_second": speed,
            "torch": torch.__version__, "device": str(rt.device)}


def ended_before(rt, folder: Path, path: Path | None, state: dict | None, changes: list,
                 headlines: Collection[str] = (), table_of: Callable[[dict], str] | None = None) -> dict | None:
    """The summary of a run that has ended, told once more; None where there is something left to do.

    Args:
        path, state, changes: what checkpoint.start_from found. headlines: see conclusion.
        table_of: what stands below these.
    """

    def read() -> dict | None:
        try:
            return read_json(folder / "summary.json")
        except (OSError, ValueError):  # ended by a kill between its last step and its summary
            return None

    if not state or changes or not checkpoint.is_over(state) or path.parent.resolve() != folder.resolve():
        return None
    summary = rt.from_main(read)
    if summary and rt.is_main:
        print(f"{folder}: this run ended at step {state['step']}, nothing was left to train. It said:")
        table = [table_of(summary)] if table_of else []
        print(fitted("\n".join([*conclusion(summary, headlines), *table, places(folder)])))
    return summary


def conclusion(summary: dict, headlines: Collection[str] = (), lead: str = "done") -> list[str]:
    """What a run comes to, in a few lines for people and grep alike: its verdict, then `name: value` of its headlines.

    headlines: names of a page's own few figures, of which those are told that the run has; by default the first of all.
    All else is in summary.json.
    """
    numbers = {name: value for name, value in summary.items() if isinstance(value, (int, float))}
    names = [name for name in headlines or numbers if name in numbers][:MOST_HEADLINES]
    told = [numbers[name] if isinstance(numbers[name], int) else f"{numbers[name]:.6g}" for name in names]
    lines = [f"{name}: {number}" for name, number in zip(names, told, strict=True)]
    return [f"{lead}: {summary['verdict']}", *lines] if "verdict" in summary else lines


def places(folder: Path) -> str:
    """Where the pictures and the report of a run are, as far as they are there: the last line of a command."""
    there = [f"pictures in {folder / 'plots'}"] if (folder / "plots").is_dir() else []
    there += [f"all of it in {folder / 'report.html'}"] if (folder / "report.html").is_file() else []
    return ", ".join(there) or f"results in {folder}"


def say_again(step: int, result: dict, headlines: Collection[str], last_line: str) -> None:
    """What a look at a run ends with: as the run itself."""
    print(fitted("\n".join([*conclusion(result, headlines, f"step {step}"), last_line])))


def first_line(script: str, cfg, makes: str) -> None:
    """Say at once who is at work (the page's __file__), on what and where, before anything that takes its time."""
    if LEVELS.index(getattr(cfg, "log_level", "INFO")) > LEVELS.index("INFO"):
        return
    if cfg.analyze:
        begin(script, f"a look at {cfg.analyze}", cfg.out, sys.stdout)
    else:
        begin(script, makes, cfg.out_dir, sys.stdout)


def _dotenv(name: str) -> str | None:
    """A variable of the environment, or else of a file .env in the current folder.

    Its lines are NAME=VALUE, also with `export` before and a comment behind. Spaces around either do not count, and a
    value in quotes is what stands between them.
    """
    if name in os.environ or not os.path.isfile(".env"):  # a folder .env is a virtual environment
        return os.environ.get(name)
    values = {}
    for line in Path(".env").read_text(encoding="utf-8-sig", errors="replace").splitlines():
        key, equals, value = line.strip().removeprefix("export ").partition("=")
        value = value.strip()
        end = value.find(value[:1], 1)  # of a quoted value
        if value[:1] in ("'", '"') and end > 0:
            value = value[1:end]
        elif equals:
            value = re.split(r"(?:^|\s)#", value)[0].rstrip()
        values[key.strip()] = value
    return values.get(name)


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run's metrics.jsonl, also from its folder analysis; none where there is no such file."""
    path = folder / "metrics.jsonl"
    if folder.name == "analysis" and not path.exists():
        path = folder.parent / "metrics.jsonl"
    return list(records_in(path))


def records_in(path: Path) -> Iterator[dict]:
    """Those of a file, one after the other: there may be a million."""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from filter(None, map(record_of, file))


def record_of(line: str) -> dict | None:
    """What a line of metrics.jsonl says; None for one that was torn by a kill or a full disk, or is damaged."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    step, numbers = record.get("step"), [value for name, value in record.items() if name != "split"]
    is_whole = isinstance(record.get("split"), str) and type(step) is int and step >= 0
    return record if is_whole and all(map(_is_numeric, numbers)) else None


def _is_numeric(value) -> bool:
    """Whether a value is one of those that metrics() writes: a number, None, or a list of such."""
    return all(map(_is_numeric, value)) if isinstance(value, list) else value is None or type(value) in (int, float)


def read_json(path: Path) -> dict:
    """The object that a JSON file of a run holds. Raises ValueError (see parse_json) and OSError."""
    return parse_json(regular_file(path, InputError).read_text(encoding="utf-8"))


def parse_json(text: str) -> dict:
    """A JSON object in which every number is one: NaN, infinity and what does not fit into 64 bits are None.

    Raises ValueError for what is no JSON, no object, nested too deeply, sets a name twice or is no text that can be
    printed.
    """

    def object_of(pairs: list[tuple]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is set twice")
        return dict(pairs)

    def finite(word: str) -> float | None:
        return number if math.isfinite(number := float(word)) else None

    def whole(word: str) -> int | None:
        return int(word) if len(word) < 20 and abs(int(word)) < 2**63 else None

    try:
        tree = json.loads(text, object_pairs_hook=object_of, parse_float=finite, parse_int=whole,
                          parse_constant=lambda word: None)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    level, depth = [tree], 0
    while level and depth < 50:
        inside = [value.values() if isinstance(value, dict) else value for value in level
                  if isinstance(value, dict | list)]
        level, depth = [value for values in inside for value in values], depth + 1
    if level:
        raise ValueError("is nested too deeply")
    if "\\u" in text:
        json.dumps(tree, ensure_ascii=False).encode()  # half a character cannot be printed: UnicodeError, a ValueError
    if not isinstance(tree, dict):
        raise ValueError("holds no settings or results")
    return tree


def look_at_names(folder: Path, names: Collection[str] = ()) -> None:
    """Raises InputError where something that no file can replace has one of these names, or one that a run may write.
    """
    for path in [folder / name for name in names] or sorted([*folder.glob("*"), *(folder / "plots").glob("*")]):
        if path.name in FOLDERS and not path.is_dir():
            raise InputError(f"{path} is no folder, as the run needs one there: move it, or use another out_dir")
        is_ours = path.name in names or path.suffix in FILES or path.name.startswith(".saving-")
        if is_ours and (path.is_dir() or path.is_fifo() or path.is_socket()):
            kind = "a folder" if path.is_dir() else "no file"
            raise InputError(f"{path} is {kind}, where a file may be written: move it, or use another out_dir")


def _reopen(path: Path, start_step: int):
    """metrics.jsonl for appending, without what an interrupted run wrote after its last checkpoint."""
    with replacing(path) as fresh, open(fresh, "w", encoding="utf-8") as file:
        for record in records_in(path) if start_step else ():
            if record["step"] <= start_step:
                file.write(json.dumps(record) + "\n")
    return open(path, "a", encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    """A JSON file, complete or not there; what is not finite becomes null."""
    with replacing(path) as fresh:
        fresh.write_text(json_text(value), **TEXT)


def json_text(value: dict) -> str:
    return json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n"


def _plain(value):
    """JSON has no NaN or infinity: they become null, so that every line can be read by any tool."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _optional(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        leave(f"{package}=true needs the package {package}: pip install {package}", 2)
