"""configurator.py: what a user types, what comes out, and what is said about what cannot be read."""
import importlib
import json
import math
import os
import random
import re
import shlex
import string
import subprocess
import sys
import warnings
from dataclasses import dataclass, field, fields, make_dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

import configurator
from configurator import (
    COMMENTS_AT,
    READ,
    Derived,
    Settings,
    config_dict,
    config_hash,
    configure,
    differences,
    fail,
    from_dict,
    help_text,
    print_config,
)
from sources.foreign import Dialect

ROOT = Path(configurator.__file__).parent


@dataclass
class Config:
    # ---- model
    n_layer: int = 4  # layers, counted from #1
    dropout: float = 0.1  # probability
    name: str = "a # b"  # of the run
    start: str = ""  # prompt
    # optimizer
    lr: float = 1e-3  # 1/step
    max_steps: int = 100  # steps
    batch_size: int = 8  # sequences
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    clip: float | None = 1.0  # gradient norm
    # system
    compile: bool = True  # torch.compile
    precision: Literal["auto", "bf16", "fp16"] = "auto"  # arithmetic
    amp: bool | Literal["auto"] = "auto"  # switch or choice
    size: int | str = 1  # number or word
    label: Optional[str] = None  # noqa: UP045  # the older spelling is read too
    layers: list[int] = field(default_factory=lambda: [1, 2])
    tags: list[str] = field(default_factory=list)
    anything: list = field(default_factory=list)
    widths: tuple[int, ...] = ()
    names: str | list[str] = "one"
    kwargs: dict = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    maybe: dict[str, int] | None = None


ALIASES = {"learning_rate": "lr", "num_train_steps": "max_steps", "optim.size": "batch_size", "inert": None}


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def errors_of(capsys, *argv: str, cls: type = Config, aliases: dict | None = None) -> list[str]:
    """The error lines of a command line that must be refused with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        configure(cls, list(argv), aliases)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert all(line.startswith("error: ") for line in err.splitlines())
    return err.splitlines()


def only_error(capsys, *argv: str, **options) -> str:
    lines = errors_of(capsys, *argv, **options)
    assert len(lines) == 1, lines
    return lines[0]


def output_of(capsys, *argv: str, cls: type = Config) -> str:
    with pytest.raises(SystemExit) as stop:
        configure(cls, list(argv))
    assert stop.value.code == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("argv, name, value", [
    (["--dropout=0"], "dropout", 0.0),
    (["--lr=1"], "lr", 1.0),
    (["--max_steps=1e5"], "max_steps", 100_000),
    (["--max_steps=10_000"], "max_steps", 10_000),
    (["--max-steps=7"], "max_steps", 7),
    (["--compile=false"], "compile", False),
    (["--start=a=b"], "start", "a=b"),
    (["start=a=b"], "start", "a=b"),
    (["--start="], "start", ""),
    (["--start=none"], "start", "none"),
    (["--lr", "-1"], "lr", -1.0),
    (["--lr=-1"], "lr", -1.0),
    (["lr=-1e-2"], "lr", -0.01),
    (["+lr=3"], "lr", 3.0),
    (["++lr=3"], "lr", 3.0),
    (["--start", "x=1"], "start", "x=1"),
    (["--start", "-v"], "start", "-v"),
    (["--lr=inf"], "lr", math.inf),
    (["--lr=-inf"], "lr", -math.inf),
    (["--no-compile"], "compile", False),
    (["--no_compile"], "compile", False),
    (["--compile=no", "--compile"], "compile", True),
    (["--compile", "off"], "compile", False),
    (["--compile", "0"], "compile", False),
    (["--amp"], "amp", True),
    (["--amp", "auto"], "amp", "auto"),
    (["--no-amp"], "amp", False),
    (["--amp="], "amp", False),
    (["--clip=none"], "clip", None),
    (["--clip=NULL"], "clip", None),
    (["--clip=2"], "clip", 2.0),
    (["--label=none"], "label", None),
    (["--label=5"], "label", "5"),
    (["--precision=bf16"], "precision", "bf16"),
    (["--size=5"], "size", 5),
    (["--size=big"], "size", "big"),
    (["--layers=1,2,3"], "layers", [1, 2, 3]),
    (["--layers=[1, 2,3]"], "layers", [1, 2, 3]),
    (["--layers=5"], "layers", [5]),
    (["--layers= [1, 2] "], "layers", [1, 2]),
    (["--layers="], "layers", []),
    (["--layers=1,2,"], "layers", [1, 2]),
    (["--layers", "-1,2"], "layers", [-1, 2]),
    (["--tags=a,b"], "tags", ["a", "b"]),
    (["--tags=[1e3,007]"], "tags", ["1e3", "007"]),
    (["--tags=['a,b', \"c\"]"], "tags", ["a,b", "c"]),
    (["--tags=it's,b"], "tags", ["it's", "b"]),
    (["--anything=1,2.5,a,true,null"], "anything", [1, 2.5, "a", True, None]),
    (["--anything=[[1,2],[3]]"], "anything", [[1, 2], [3]]),
    (["--betas=(0,1)"], "betas", (0.0, 1.0)),
    (["--widths=1,2,3"], "widths", (1, 2, 3)),
    (["--names=one"], "names", "one"),
    (["--names=a,b"], "names", ["a", "b"]),
    (['--kwargs={"a": [1, true], "b": null}'], "kwargs", {"a": [1, True], "b": None}),
    (["--kwargs={'a': None}"], "kwargs", {"a": None}),
    (["--kwargs.x=3"], "kwargs", {"x": 3}),
    (["--kwargs.x=3", "model.kwargs.y=z", "kwargs.lr=1,2"], "kwargs", {"x": 3, "y": "z", "lr": [1, 2]}),
    (["--kwargs.a.b=true"], "kwargs", {"a": {"b": True}}),
    (["--weights.my-key=1"], "weights", {"my-key": 1.0}),
    (["--maybe.x=1"], "maybe", {"x": 1}),
    (["model.kwargs2.max-steps=512"], "max_steps", 512),
    (["--lr=1", "--lr=2"], "lr", 2.0),
])
def test_an_override_is_read_by_the_type_of_its_field(argv, name, value):
    got = getattr(configure(Config, argv), name)
    assert got == value and type(got) is type(value)
    assert repr(got) == repr(value)  # items have their types too


def test_a_choice_keeps_its_type():
    cls = make_dataclass("Choice", [("x", Literal["1", 1, True, None, 0.5], 1)])
    assert repr(from_dict(cls, {"x": 1}, "here")) == "Choice(x=1)"
    assert [configure(cls, [f"x={word}"]).x for word in ("none", "0.5", "true")] == [None, 0.5, True]


def test_a_choice_may_be_typed_in_upper_or_lower_case():
    assert configure(Config, ["precision=BF16"]).precision == "bf16"
    cls = make_dataclass("Choice", [("x", Literal["a", "A", "Word"], "a")])
    assert [configure(cls, [f"x={word}"]).x for word in ("A", "a", "wORD")] == ["A", "a", "Word"]


def test_odd_escapes_in_a_value_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configure(Config, ["--kwargs={'a': '\\d'}"]).kwargs == {"a": "\\d"}


@pytest.mark.parametrize("word", ["true", "Yes", "ON", "1"])
def test_every_boolean_word_is_read_in_any_case(word):
    assert configure(Config, [f"--compile={word}"]).compile is True
    assert configure(Config, ["--compile", word]).compile is True


def test_a_switch_leaves_the_config_file_after_it_alone(tmp_path):
    cfg = configure(Config, ["--no-compile", "--compile", write(tmp_path, "a.py", "lr = 5")])
    assert (cfg.compile, cfg.lr) == (True, 5.0)


@pytest.mark.parametrize("argument, parts", [
    ("--max_steps=1.5", ["max_steps", "int", "1.5", "not a whole number"]),
    ("--max_steps=inf", ["max_steps", "int", "inf"]),
    ("--max_steps=True", ["max_steps", "int", "True"]),
    ("--max_steps=", ["max_steps", "int", "''"]),
    ("--lr=abc", ["lr", "float", "'abc'", "not a number"]),
    ("--lr=nan", ["lr", "float", "nan is not allowed"]),
    ("--compile=maybe", ["compile", "bool", "'maybe'", "true, false"]),
    ("--precision=fp8", ["precision", "auto|bf16|fp16", "'fp8'"]),
    ("--clip=abc", ["clip", "float|none", "'abc'", "not a number"]),
    ("--betas=1,2,3", ["betas", "tuple[float, float]", "needs 2 values"]),
    ("--layers=1,x", ["layers", "list[int]", "'1,x'"]),
    ("--tags=[{]", ["tags", "list[str]", "'[{]'", "neither JSON nor a Python literal"]),
    ("--kwargs=3", ["kwargs", "dict", "not a dict"]),
    ("--weights.a=x", ["weights.a", "dict[str, float]", "'x'"]),
    ("--lrr=1", ["command line", "lrr", "did you mean lr?"]),
    ("--model.learning=1", ["model.learning", "no such setting"]),
    ("--max-step=1", ["max-step", "did you mean max_steps?"]),
    ("--learning-rat=1", ["did you mean learning_rate?"]),
    ("--lr", ["lr", "needs a value", "--lr=0.001"]),
    ("--no-lr", ["no-lr", "no such setting", "did you mean lr?"]),
    ("lr", ["'lr'", "--key=value", ".py, .yaml, .yml, .json"]),
    ("model.pt", ["'model.pt'", "ends in .py"]),
    ("-x", ["'-x'"]),
    ("--", ["'--'"]),
    ("=3", ["'=3'"]),
    ("--=3", ["'--=3'"]),
    ("-", ["'-'"]),
    ("", ["''"]),
    ("+lr", ["'+lr'"]),
    ("model..lr=1", ["model..lr", "no such setting"]),
    ("kwargs.=1", ["kwargs.", "no such setting"]),
])
def test_a_bad_argument_is_one_line_that_names_it(capsys, argument, parts):
    line = only_error(capsys, argument, aliases=ALIASES)
    assert all(part in line for part in parts), line


def test_all_errors_of_a_call_are_reported_at_once(capsys, tmp_path):
    path = write(tmp_path, "a.yaml", "lrr: 1\nmodel: {dropout: x}\n")
    lines = errors_of(capsys, path, write(tmp_path, "b.py", "lr ="), "nowhere.py", "--max_steps=x", "--foo=1", "bar")
    for part in ("lrr", "dropout", "b.py:1", "nowhere.py", "max_steps", "foo", "'bar'"):
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 7


def test_a_missing_value_is_not_taken_from_the_next_option(capsys):
    assert "needs a value" in only_error(capsys, "--name", "--lr=1")


def test_only_local_rank_0_prints_errors(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert errors_of(capsys, "--lrr=1") == []
    assert output_of(capsys, "--help") == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert len(errors_of(capsys, "--lrr=1")) == 1


def test_fail_prints_one_line_a_message_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        fail("first\nwith a break", "second")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: first with a break\nerror: second\n"


def test_argv_defaults_to_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr=7"])
    assert configure(Config).lr == 7.0


# --------------------------------------------------------------------------------------------------------- aliases


def test_aliases_translate_foreign_names():
    cfg = configure(Config, ["--learning-rate=3", "train.num_train_steps=9"], ALIASES)
    assert (cfg.lr, cfg.max_steps) == (3.0, 9)
    assert configure(Config, ["--step_size=3"], {"step-size": "lr"}).lr == 3.0


def test_an_alias_for_no_field_is_a_bug_of_the_script():
    with pytest.raises(AssertionError, match="nowhere"):
        configure(Config, [], {"foreign": "nowhere"})


def test_a_dotted_alias_wins_over_a_field_and_a_plain_alias():
    cfg = configure(Config, ["model.optim.size=3", "size=4"], {**ALIASES, "size": "n_layer"})
    assert (cfg.batch_size, cfg.size, cfg.n_layer) == (3, 4, Config.n_layer)
    cfg = configure(Config, ["a.kwargs.size=5"], {"a.kwargs.size": "n_layer"})
    assert (cfg.n_layer, cfg.kwargs) == (5, {})


def test_an_alias_to_none_is_accepted_and_listed_as_without_effect(tmp_path):
    path = write(tmp_path, "a.yaml", "model: {inert: {depth: 3}, lr: 2}")
    with pytest.warns(UserWarning, match=r"without effect here: model\.inert, inert"):
        cfg = configure(Config, [path, "--inert=1"], ALIASES)
    assert cfg == Config(lr=2.0)


# ---------------------------------------------------------------------------------------------------- .py files


def test_files_apply_in_order_and_overrides_win_wherever_they_stand(tmp_path):
    first = write(tmp_path, "a.py", "lr = 1\nmax_steps = 1\nn_layer = 1")
    second = write(tmp_path, "b.json", '{"lr": 2, "max_steps": 2}')
    cfg = configure(Config, ["--lr=3", first, second])
    assert (cfg.lr, cfg.max_steps, cfg.n_layer) == (3.0, 2, 1)


def test_a_python_file_sees_the_current_values(tmp_path):
    first = write(tmp_path, "a.json", '{"batch_size": 16}')
    second = write(tmp_path, "b.py", "batch_size = batch_size * 2\nlayers.append(3)\nkwargs['a'] = 1")
    cfg = configure(Config, [first, second])
    assert (cfg.batch_size, cfg.layers, cfg.kwargs) == (32, [1, 2, 3], {"a": 1})
    assert configure(Config, []) == Config()  # the defaults were not changed in place


def test_a_python_file_has_names_of_its_own(tmp_path):
    text = """
import math
from collections import OrderedDict
from pathlib import Path
_half = 0.5
def twice(x):
    return 2 * x
class Helper:
    pass
lr = twice(_half) * math.floor(1.5)
name = Path(__file__).parent / "x"
"""
    cfg = configure(Config, [write(tmp_path, "a.py", text)])
    assert (cfg.lr, cfg.name) == (1.0, str(tmp_path / "x"))


@pytest.mark.parametrize("text, name, value", [
    ("dropout = 0", "dropout", 0.0),
    ("max_steps = 1e5", "max_steps", 100_000),
    ("max_steps = '3'", "max_steps", 3),
    ("compile = 0", "compile", False),
    ("layers = (1, 2.0)", "layers", [1, 2]),
    ("betas = [1, 0]", "betas", (1.0, 0.0)),
    ("name = 5", "name", "5"),
    ("label = 'none'", "label", "none"),
    ("size = '5'", "size", "5"),
    ("anything = ['1', 1, (2,)]", "anything", ["1", 1, (2,)]),
    ("learning_rate = 3", "lr", 3.0),
    ("import numpy as np\nmax_steps = np.int64(3)", "max_steps", 3),
    ("import numpy as np\nkwargs = {'a': [np.int64(3), np.float64(0.5)]}", "kwargs", {"a": [3, 0.5]}),
])
def test_a_value_of_a_python_file_is_read_by_its_field_too(tmp_path, text, name, value):
    got = getattr(configure(Config, [write(tmp_path, "a.py", text)], ALIASES), name)
    assert repr(got) == repr(value)


@pytest.mark.parametrize("text, parts", [
    ("batchsize = 3", ["a.py: batchsize", "no such setting", "did you mean batch_size?"]),
    ("max_steps = 1.5", ["a.py: max_steps", "int", "1.5"]),
    ("max_steps = True", ["a.py: max_steps", "int", "True"]),
    ("name = 1.5", ["a.py: name", "str", "quotes"]),
    ("lr = True", ["a.py: lr", "float", "True"]),
    ("name = True", ["a.py: name", "str", "True"]),
    ("layers.append('x')", ["a.py: layers", "list[int]", "'x'"]),
    ("lr = None", ["a.py: lr", "float", "None"]),
    ("lr = float('nan')", ["a.py: lr", "nan"]),
    ("kwargs = {'a': {1, 2}}", ["a.py: kwargs", "dict"]),
    ("lr = 1\nlr = (", ["a.py:2:", "never closed"]),
    ("lr = 1\n\nlr = undefined", ["a.py:3:", "NameError", "undefined"]),
    ("def f():\n    1 / 0\nf()", ["a.py:2:", "ZeroDivisionError"]),
    ("import json\njson.loads('{')", ["a.py:2:", "Expecting"]),
    ("raise SystemExit('stop')", ["a.py:1:", "SystemExit: stop"]),
    ("n_layer = 1\nraise KeyboardInterrupt", ["a.py:2: KeyboardInterrupt"]),
    ("raise GeneratorExit", ["a.py:1: GeneratorExit"]),
    ("class Own(BaseException):\n    def __str__(self):\n        1 / 0\nraise Own", ["a.py:4: Own"]),
    ("def f():\n    f()\nf()", ["a.py:2: nested too deeply"]),
    ("class F(float):\n    def __float__(self):\n        raise KeyError('x')\nlr = F(1)", ["a.py: lr", "KeyError"]),
    ("class O:\n    def __repr__(self):\n        1 / 0\nlr = O()", ["a.py: lr", "got a O"]),
    ("n_layer = 10**5000", ["a.py: n_layer", "64 bits"]),
    ("kwargs = {'a': 10**5000}", ["a.py: kwargs", "64 bits"]),
    ("raise ValueError('x\\n' * 10_000)", ["a.py:1: x x", "..."]),
    (b"lr = 1\0", ["a.py", "null bytes"]),
    (b"\xff\xfe\x00junk", ["a.py"]),
])
def test_an_error_in_a_python_file_is_one_line_with_its_place(capsys, tmp_path, text, parts):
    line = only_error(capsys, write(tmp_path, "a.py", text))
    assert all(part in line for part in parts), line


# ------------------------------------------------------------------------------------------- .yaml and .json files


@pytest.mark.parametrize("text, expected", [
    ("", {}),
    ("# nothing\n", {}),
    ("lr: 1e-4", {"lr": 1e-4}),
    ("lr: '1e-4'", {"lr": 1e-4}),
    ("lr: .inf", {"lr": math.inf}),
    ("max_steps: 1e3", {"max_steps": 1000}),
    ("name: 5", {"name": "5"}),
    ("name: 1.10", {"name": "1.10"}),
    ("name: off", {"name": "off"}),
    ("name: 12:30:00", {"name": "12:30:00"}),
    ("name: 2024-01-01", {"name": "2024-01-01"}),
    ("compile: off", {"compile": False}),
    ("compile: No", {"compile": False}),
    ("clip: null", {"clip": None}),
    ("clip:", {"clip": None}),
    ("label: ~", {"label": None}),
    ("label: 'null'", {"label": "null"}),
    ("size: 5", {"size": 5}),
    ("size: '5'", {"size": "5"}),
    ("max-steps: 5", {"max_steps": 5}),
    ("layers: [3, 4]", {"layers": [3, 4]}),
    ("layers: 3,4", {"layers": [3, 4]}),
    ("anything: [1, '1', x, true, 1e-3, null]", {"anything": [1, "1", "x", True, 1e-3, None]}),
    ("train: {deep: {lr: 2}, n_layer: 3}", {"lr": 2.0, "n_layer": 3}),
    ("train.deep.lr: 2", {"lr": 2.0}),
    ("train: {weights: {lr: 0.05, b: 1}}", {"weights": {"lr": 0.05, "b": 1.0}}),
    ("kwargs: {a: {b: [1, x]}}\n", {"kwargs": {"a": {"b": [1, "x"]}}}),
    ("kwargs.a: 1\nkwargs.b: 2", {"kwargs": {"a": 1, "b": 2}}),
    ("maybe: null", {"maybe": None}),
    ("_base: &base {lr: 2, n_layer: 5}\ntrain:\n  <<: *base\n  n_layer: 6", {"lr": 2.0, "n_layer": 6}),
    ("a: {lr: 1}\nb: {lr: 1.0}", {"lr": 1.0}),
    ("a: {lr: 3}\nclip: ${a.lr}", {"lr": 3.0, "clip": 3.0}),
    ("size: 3\nname: run-${size}-${ start }\nstart: s", {"size": 3, "name": "run-3-s", "start": "s"}),
    ("_x: &x {lr: 4}\na: ${_x}", {"lr": 4.0}),
    ("n_layer: ${_a.b}\n_a: ${_c}\n_c: {b: '${_d}'}\n_d: 7", {"n_layer": 7}),
    ("layers: ['${n_layer}', 2]\nn_layer: 9", {"layers": [9, 2], "n_layer": 9}),
    ("kwargs: {a: '${lr}'}\nlr: 0.5", {"kwargs": {"a": 0.5}, "lr": 0.5}),
])
def test_a_yaml_file_is_read_down_to_its_leaves(tmp_path, text, expected):
    cfg = configure(Config, [write(tmp_path, "a.yaml", text)])
    wanted = Config(**expected)
    assert cfg == wanted and repr(cfg) == repr(wanted)


@pytest.mark.parametrize("text, parts", [
    ("train:\n  lrr: 3", ["a.yml: train.lrr", "did you mean lr?"]),
    ("train: {num_train_steps: x}", ["a.yml: train.num_train_steps (max_steps)", "int", "'x'"]),
    ("lr: null", ["a.yml: lr", "float", "None"]),
    ("name: null", ["a.yml: name", "str", "None"]),
    ("lr: .nan", ["a.yml: lr", "nan"]),
    ("- 1\n- 2", ["a.yml", "mapping", "['1', '2']"]),
    ("just text", ["a.yml", "mapping"]),
    ("lr: 1\nn_layer: [1", ["a.yml:2"]),
    ("lr: 1\nlr: 2", ["a.yml:2: lr is set twice"]),
    ("a:\n  lr: 1\n  lr: 1", ["a.yml:3: lr is set twice"]),
    ("lr: 1\n--- \nlr: 2", ["a.yml"]),
    ("lr: !!python/object:os.system x", ["a.yml:1"]),
    ("? [1, 2]\n: 3", ["a.yml:1"]),
    ("a: {lr: 1}\nb: {lr: 2}", ["a.yml: b.lr", "ambiguous", "a.lr", "1.0 or 2.0"]),
    ("lr: 1\nlearning_rate: 2", ["ambiguous"]),
    ("a: {kwargs.x: 1}\nb: {kwargs.x: 2}", ["ambiguous", "kwargs.x"]),
    ("lr: ${b.c}", ["a.yml: lr", "${b.c} is not in this file"]),
    ("train: {lr: '${_b}'}\n_b: '${_c}'\n_c: '${_b}'", ["a.yml: train.lr", "circle", "_b -> _c -> _b"]),
    ("lr: ${lr}", ["circle", "lr -> lr"]),
    ("train: {start: '${train}'}", ["circle"]),
    ("name: '${a.${b}}'\nstart: x", ["a.yml: name"]),
    ("name: '${lr'\nlr: 1", ["a.yml: name", "${lr"]),
    ("a: &a [*a]\n", ["a.yml: an alias refers to what it is a part of"]),
    ("_a: &a [x]\n" + "".join(f"_{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in pairwise("abcdefghij"))
     + "tags: *j", ["a.yml: holds more than 100,000 values"]),
    ("".join(f"_{b}: '{f'${{_{c}}}' * 9}'\n" for b, c in pairwise("abcdefghij")) + "_j: x\nname: ${_a}",
     ["a.yml: name: more than 100,000 references"]),
    (f"_a: {'x' * 1000}\n_b: '{'${_a}' * 99}'\nname: ${{_b}}${{_b}}", ["a.yml: name: its references make a text of"]),
    ("n_layer: 010", ["a.yml: n_layer", "octal"]),
    ("lr: -08", ["a.yml: lr", "octal"]),
    ("n_layer: 12:30", ["a.yml: n_layer", "not a number"]),
    ("n_layer: 0x10", ["a.yml: n_layer", "not a number"]),
    ("n_layer: ١٢", ["a.yml: n_layer", "not a number"]),
    ("lr: 2026-01-02", ["a.yml: lr", "not a number"]),
    ("n_layer: {}", ["a.yml: n_layer", "not a number"]),
    ('name: "a\\0b"', ["a.yml: name", "NUL"]),
    ('tags: ["\\ud800"]', ["a.yml: tags", "half a character"]),
    ("lr: !!int x", ["a.yml:1: 'x' is no int"]),
    (b"\x00\x01\x02", ["a.yml"]),
    (b"\xff\xff\xff", ["a.yml"]),
    ("lr: " + "[" * 1000, ["a.yml"]),
    ("lr: !!timestamp x", ["a.yml:1: 'x' is no timestamp"]),
    ("lr: 1\n".encode("utf-16-le"), ["a.yml"]),
    ("lr: 1 #" + "x" * 4_000_000, ["a.yml", "larger than 4 MB"]),
])
def test_an_error_in_a_yaml_file_is_one_line_with_its_place(capsys, tmp_path, text, parts):
    line = only_error(capsys, write(tmp_path, "a.yml", text), aliases=ALIASES)
    assert all(part in line for part in parts), line


def test_a_bad_reference_does_not_hide_the_other_errors_of_its_section(capsys, tmp_path):
    lines = errors_of(capsys, write(tmp_path, "a.yaml", "t:\n  lr: ${x}\n  clip: ${y}\n  n_layer: z"))
    assert len(lines) == 3


@pytest.mark.parametrize("text, expected", [
    ('{"train": {"lr": 1, "layers": [3]}}', {"lr": 1.0, "layers": [3]}),
    ('{"name": "${not.a.reference}"}', {"name": "${not.a.reference}"}),
    ('{"size": "5", "clip": null}', {"size": "5", "clip": None}),
    ('{"kwargs": {"a": {"b": 1}}, "lr": Infinity}', {"kwargs": {"a": {"b": 1}}, "lr": math.inf}),
])
def test_a_json_file_is_read_down_to_its_leaves(tmp_path, text, expected):
    assert configure(Config, [write(tmp_path, "a.json", text)]) == Config(**expected)


@pytest.mark.parametrize("text, parts", [
    ('{"lr": 1,\n "n_layer": }', ["a.json:2"]),
    ('{"lr": 1, "lr": 2}', ["a.json: 'lr' is set twice"]),
    ('{"lr":' * 9000, ["a.json: nested too deeply"]),
    ('{"n_layer": 9223372036854775808}', ["a.json: n_layer", "64 bits"]),
    (f'{{"n_layer": {"9" * 5000}}}', ["a.json", "5000 digits"]),
    ('{"kwargs": {"a": "\\u0000"}}', ["a.json: kwargs", "NUL"]),
    ('{"weights": {"\\ud800": 1}}', ["a.json: weights", "half a character"]),
    ('{"lr": {}}', ["a.json: lr", "not a number"]),
    ('[1]', ["a.json", "mapping"]),
    ('', ["a.json:1"]),
    ('{"lr": NaN}', ["a.json: lr", "nan"]),
    ('{"a":' * 900 + "1" + "}" * 900, ["a.json"]),
    ('{"kwargs": {"a": ' + "[" * 300 + "]" * 300 + "}}", ["kwargs", "nested too deeply"]),
    (b"\xff\xfa", ["a.json"]),
])
def test_an_error_in_a_json_file_is_one_line_with_its_place(capsys, tmp_path, text, parts):
    line = only_error(capsys, write(tmp_path, "a.json", text))
    assert all(part in line for part in parts), line


# ------------------------------------------------------------------------------------------------- finding files


@pytest.fixture
def script(tmp_path):
    """A script with a config folder, run from another folder."""
    folder = tmp_path / "project"
    (folder / "config").mkdir(parents=True)
    write(folder / "config", "small.py", "lr = 5")
    write(folder, "train.py", '''"""Trains a thing → a model."""
from __future__ import annotations
from dataclasses import dataclass
from configurator import configure
@dataclass
class Config:
    lr: float = 1.0  # rate
    clip: float | None = None  # norm
if __name__ == "__main__":
    print(configure(Config))
''')

    def run(*argv: str, encoding: str = "utf-8") -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
        return subprocess.run([sys.executable, str(folder / "train.py"), *argv], cwd=tmp_path, encoding=encoding,
                              capture_output=True, env=environment)
    return run


def test_a_script_run_from_another_folder_finds_its_configs(script):
    done = script("config/small.py", "--clip=2")
    assert done.returncode == 0 and done.stdout == "Config(lr=5.0, clip=2.0)\n"


def test_a_file_of_the_working_directory_comes_first(script, tmp_path):
    (tmp_path / "config").mkdir()
    write(tmp_path / "config", "small.py", "lr = 6")
    assert script("config/small.py").stdout == "Config(lr=6.0, clip=None)\n"


def test_a_missing_file_names_the_near_ones(script, tmp_path):
    done = script("config/smal.py", "--lrr=3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: command line: no config file 'config/smal.py'; there is config/small.py",
        "error: command line: lrr: no such setting, did you mean lr?"]
    for name in "abcdefgh":
        write(tmp_path / "project" / "config", f"{name}.py", "")
    assert script("config/0123.py").stderr.rstrip().endswith("config/h.py, ...")


def test_a_script_shows_its_help(script):
    done = script("--help")
    assert done.returncode == 0 and done.stdout.startswith("Trains a thing → a model.\n\nusage: python train.py")
    assert "  --clip=none".ljust(COMMENTS_AT) + "norm [float|none]" in done.stdout.splitlines()


@pytest.mark.parametrize("name", ["nowhere/x.py", "a\0b.py", "x" * 5000 + ".yaml"])
def test_a_path_that_is_no_file_is_an_error(capsys, name):
    assert "no config file" in only_error(capsys, name)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)])
def test_what_is_no_regular_file_is_no_config_file(capsys, tmp_path, make):
    make(tmp_path / "x.py")
    line = only_error(capsys, str(tmp_path / "x.py"))
    assert "no config file" in line and "no regular file" in line


def test_a_tilde_is_the_home_folder_in_every_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("name: ~/a\ntags: ['~', b~, ~c]\nlabel: ~\nkwargs: {x: ~/y}")
    cfg = configure(Config, ["~/x.yaml", "--start=~/s"])
    assert (cfg.name, cfg.start, cfg.kwargs) == (f"{tmp_path}/a", f"{tmp_path}/s", {"x": f"{tmp_path}/y"})
    assert cfg.tags == [str(tmp_path), "b~", "~c"] and cfg.label is None


def test_what_a_python_file_prints_is_no_part_of_the_printed_config(tmp_path, capsys):
    path = write(tmp_path, "a.py", "import sys\nprint('hello')\nlr = 0.5\nsys.stdout = None")
    with pytest.raises(SystemExit):
        configure(Config, [path, "--print_config"])
    out, err = capsys.readouterr()
    assert "hello" not in out and "hello" in err and "lr = 0.5" in out


# ------------------------------------------------------------------------------------- --help and --print_config


def test_help_lists_every_field_with_default_comment_and_type(capsys):
    lines = output_of(capsys, "--help", "--lrr=3").splitlines()
    assert lines[0] == sys.modules[__name__].__doc__
    assert [line for line in lines if line and not line.startswith(" ")][2:] == ["model", "optimizer", "system"]
    assert "  --n_layer=4".ljust(COMMENTS_AT) + "layers, counted from #1 [int]" in lines
    assert "  --name='a # b'".ljust(COMMENTS_AT) + "of the run [str]" in lines
    assert "  --precision=auto".ljust(COMMENTS_AT) + "arithmetic [auto|bf16|fp16]" in lines
    assert any("CONFIG FILE" in line and ".yaml" in line for line in lines)
    assert output_of(capsys, "-h").splitlines() == lines


@pytest.mark.parametrize("script", ["train_ghmm", "train_arxiv", "train_state", "train_apelr", "sample"])
def test_the_help_of_a_page_fits_a_terminal_and_can_be_typed(script, monkeypatch):
    """Values as they stand there are the defaults."""
    module = importlib.import_module(script)
    for columns in ("100", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        text = help_text(module.Config, f"{script}.py")
        assert max(map(len, text.splitlines())) <= 100 and "^" not in text
    rows = text.partition("--print_config")[2].partition("\nstudies of")[0]
    shown = dict(re.findall(r"^  --(\w+)=(.*?)(?:   *\S.*)?$", rows, re.MULTILINE))
    shown.pop("dialect", None)
    assert shown.keys() == {field.name for field in fields(module.Config)}
    words = [shlex.split(f"--{name}={value}")[0] for name, value in shown.items()]
    settings = Settings(module.Config, {})
    for name, value in settings.split(words)[1]:
        settings.assign([name], value, "command line")
    assert not settings.errors and settings.values == Settings(module.Config, {}).values


def test_help_shows_what_it_is_asked_to():
    class Job(Config):
        """What the job makes."""

    text = help_text(Job, "x.py job", usage="python x.py job FOLDER", only=["lr", "layers"])
    rows = [line.split("=")[0] for line in text.splitlines() if line.startswith("  --")]
    assert text.startswith("What the job makes.\n\nusage: python x.py job FOLDER\n")
    assert rows == ["  --lr", "  --layers"]


@dataclass
class Wordy:
    """W."""

    # first
    a: int = 1  # begins
    # ^ goes on
    # ^ and ends
    # second
    b: Literal["", "x"] = ""


def test_a_comment_goes_on_behind_a_caret(capsys):
    assert help_text(Wordy, "x.py").splitlines()[-5:] == [
        "first", "  --a=1".ljust(COMMENTS_AT) + "begins goes on and ends [int]", "",
        "second", "  --b=''".ljust(COMMENTS_AT) + "[''|x]",
    ]  # fmt: skip


def test_help_fits_commands_and_paragraphs(monkeypatch):
    words = " ".join(["word"] * 40)
    command = "    python x.py" + " " * 80 + "# what it does"
    long = "    python x.py --" + "a" * 75 + "  # what it does at some length"
    monkeypatch.setattr(Wordy, "__doc__", f"{words}\n\n{command}\n{long}\n    kept  as it is\n\nEnd.")
    lines = help_text(Wordy, "x.py").splitlines()
    assert lines[:2] == [" ".join(["word"] * 20), " ".join(["word"] * 20)]
    assert lines[3:7] == ["    python x.py  # what it does", long.split("  # ")[0],
                          "        # what it does at some length", "    kept  as it is"]


def test_help_works_without_source(capsys):
    cls = make_dataclass("Bare", [("lr", float, 1.0)])
    assert "  --lr=1.0".ljust(COMMENTS_AT) + "[float]" in output_of(capsys, "--help", cls=cls)
    assert configure(cls, ["--lr=2"]).lr == 2.0


@dataclass
class Wider(Config):
    lr: float = 5.0
    dropout: float = 0.2  # another comment
    # extra
    width: int = 3  # columns


def test_a_subclass_inherits_fields_and_comments():
    text = print_config(configure(Wider, ["--width=4", "--n_layer=2"]))
    assert "lr = 5.0  # 1/step" in text and "dropout = 0.2  # another comment" in text
    assert "# extra\nwidth = 4  # columns" in text and "n_layer = 2  # layers, counted from #1" in text


def test_print_config_comes_after_all_is_applied(capsys, tmp_path):
    path = write(tmp_path, "a.py", "lr = 3")
    for option in ("--print_config", "--print-config"):
        text = output_of(capsys, option, path, "--max_steps=1e3")
        assert configure(Config, [write(tmp_path, "b.py", text)]) == Config(lr=3.0, max_steps=1000)
    assert "lrr" in only_error(capsys, "--print_config", "--lrr=1")


def test_help_survives_a_terminal_without_unicode(script):
    done = script("--help", encoding="ascii")
    assert done.returncode == 0 and done.stdout.startswith("Trains a thing \\u2192 a model.")


@pytest.mark.parametrize("word, hint", [
    ("--precision=bf", "precision: expected auto|bf16|fp16, got 'bf': did you mean bf16?"),
    ("--precision=fp61", "did you mean fp16?"), ("--precision=zz", "got 'zz': not one of these"),
    ("--precision=", "got '': not one of these"),
    ("--amp=aut", "got 'aut': not one of true, false, yes, no, on, off, 1, 0, did you mean auto?"),
    ("--max_steps=1,000", "got '1,000': leave the commas out"), ("--lr=3e-4x", "got '3e-4x': not a number"),
    ("--steps=3", "steps: no such setting, did you mean max_steps?"),
    ("--batch=3", "batch: no such setting, did you mean batch_size?"),
    ("--max_step=3", "did you mean max_steps?"), ("--blorp=3", "blorp: no such setting; --help lists them all"),
    ("-lr=3", "command line: '-lr=3': two dashes, --lr=3"), ("-x", "'-x': expected --key=value, or a config file"),
    ("ghmm_rrxr", "'ghmm_rrxr': did you mean config/ghmm_rrxor.py?"),
    ("ghmm_rrxr.py", "no config file 'ghmm_rrxr.py'; there is config/ghmm_rrxor.py"),
    ("blorp", "'blorp': expected --key=value, or a config file that ends in .py"),
])  # fmt: skip
def test_a_slip_of_the_pen_is_told_what_it_may_have_been(word, hint, capsys, monkeypatch):
    monkeypatch.setattr(configurator, "_script", lambda Config: ROOT / "x.py")
    assert hint in only_error(capsys, word)


def test_a_run_folder_without_a_setting_is_told_what_to_do_with_it(tmp_path, capsys):
    (tmp_path / "config.json").touch()
    with pytest.raises(SystemExit):
        configure(importlib.import_module("train_ghmm").Config, [str(tmp_path)])
    assert f"--analyze={tmp_path} measures it again, --resume={tmp_path} goes on from it" in capsys.readouterr().err


@pytest.mark.parametrize("word, steps", [("1e3", 1000), ("1_000", 1000), ("2E2", 200), ("+7", 7)])
def test_whole_numbers_as_people_write_them(word, steps):
    assert configure(Config, [f"--max_steps={word}"]).max_steps == steps


# ----------------------------------------------------------------------------------------- saved configurations


def test_a_default_is_of_its_annotated_type_and_never_shared():
    @dataclass
    class Loose:
        lr: float = 1
        layers: list[int] = field(default_factory=lambda: [1])

    first, second = configure(Loose, []), configure(Loose, [])
    first.layers.append(2)
    assert second.layers == [1] and isinstance(first.lr, float)
    assert config_hash(second) == config_hash(configure(Loose, ["--lr=1"]))


def test_a_shared_reference_or_anchor_gives_separate_values(tmp_path):
    cfg = configure(Config, [write(tmp_path, "a.yaml", "layers: &x [1]\nanything: *x\ntags: ${layers}")])
    cfg.anything.append(2)
    assert (cfg.layers, cfg.tags) == ([1], ["1"])


def test_from_dict_warns_once_of_unknown_settings_and_defaults_the_missing():
    with pytest.warns(UserWarning, match="ckpt: ignored settings of another version: old, older") as caught:
        cfg = from_dict(Config, {"lr": 3, "old": 1, "older": 2, "betas": [1, 2]}, "ckpt")
    assert len(caught) == 1 and caught[0].filename == __file__ and cfg == Config(lr=3.0, betas=(1.0, 2.0))


def test_from_dict_takes_no_notice_of_what_only_a_dialect_reads():
    with pytest.warns(UserWarning, match="here: ignored settings of another version: pace"):
        assert from_dict(Config, {"pace": 3, "lr": 2}, "here", {"pace": READ}) == Config(lr=2.0)


@pytest.mark.parametrize("saved, part", [({"lr": "x"}, "config.json: lr"), ([1], "config.json: expected")])
def test_from_dict_refuses_bad_values(capsys, saved, part):
    with pytest.raises(SystemExit) as stop:
        from_dict(Config, saved, "config.json")
    assert stop.value.code == 2 and part in capsys.readouterr().err


def test_config_dict_is_plain_json():
    saved = config_dict(configure(Config, ["--kwargs={'a': (1, {'b': (2,)})}"]))
    assert saved["betas"] == [0.9, 0.95] and saved["kwargs"] == {"a": [1, {"b": [2]}]}
    assert json.loads(json.dumps(saved)) == saved


def test_a_saved_config_json_is_a_config_file(tmp_path):
    cfg = configure(Config, ["--lr=inf", "--label=${x}", "--kwargs.a=1", "--maybe=none", "--tags=a,b"])
    path = write(tmp_path, "config.json", json.dumps(config_dict(cfg)))
    assert configure(Config, [path]) == cfg


def test_the_hash_depends_on_the_values_alone():
    assert config_hash(Config()) == config_hash(configure(Config, ["--lr=1e-3"]))
    assert config_hash(Config()) != config_hash(configure(Config, ["--lr=2e-3"]))
    assert config_hash(Config(kwargs={"a": 1, "b": 2})) == config_hash(Config(kwargs={"b": 2, "a": 1}))
    assert len(config_hash(Config())) == 12 and int(config_hash(Config()), 16) >= 0
    program = ("import configurator, dataclasses; "
               "A = dataclasses.make_dataclass('A', [('kwargs', dict, dataclasses.field(default_factory=dict))]); "
               "print(configurator.config_hash(A({'b': 1, 'a': 'x'})))")
    found = {subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                            env={**os.environ, "PYTHONHASHSEED": seed}).stdout.strip() for seed in ("5", "6")}
    assert len(found) == 1 and len(found.pop()) == 12


def test_differences_tell_what_changed():
    old = config_dict(Config())
    assert differences(old, Config()) == []
    assert differences({**old, "unknown": 1}, Config(lr=1e-4, label="x", betas=(0.5, 0.9))) == [
        "lr: 0.001 -> 0.0001", "betas: [0.9, 0.95] -> [0.5, 0.9]", "label: None -> 'x'"]
    del old["lr"]
    assert differences(old, Config(lr=0.5)) == ["lr: 0.001 -> 0.5"]


# ------------------------------------------------------------------------------------------------------- check()


@dataclass
class Checked:
    lr: float = 1.0

    def check(self) -> list[str]:
        return ["lr must be positive", "try --lr=1e-3"] if self.lr <= 0 else []


def test_the_check_of_a_config_adds_errors(capsys):
    assert configure(Checked, ["--lr=2"]).lr == 2.0
    assert errors_of(capsys, "--lr=-1", cls=Checked) == ["error: lr must be positive", "error: try --lr=1e-3"]


def test_the_check_waits_until_there_are_no_other_errors(capsys):
    assert "lrr" in only_error(capsys, "--lr=-1", "--lrr=1", cls=Checked)


def test_an_old_run_can_be_read_whatever_the_check_says_now():
    assert from_dict(Checked, {"lr": -1}, "config.json") == Checked(lr=-1.0)


def test_a_wrong_default_is_a_bug_of_the_script():
    with pytest.raises(TypeError, match="Wrong.steps: its default None"):
        configure(make_dataclass("Wrong", [("steps", int, None)]), [])


# ------------------------------------------------------------------------------------------- whatever is thrown in


TEXT = string.ascii_letters + string.digits + " '\"\\\n\r\t#${}[],=:-.%\x1b\x85\u2028é漢🙂"


def random_text(rng: random.Random) -> str:
    return rng.choice(["", "none", "null", "5", "1e3", "true", "[1]", "a,b", "inf", "${lr}",
                       "".join(rng.choices(TEXT, k=rng.randrange(9)))])


def random_float(rng: random.Random) -> float:
    return rng.choice([0.0, -0.0, 1.0, 1e-4, 1e300, 5e-324, math.inf, -math.inf, rng.gauss(0, 1)])


def random_plain(rng: random.Random, depth: int = 0, tuples: bool = True) -> Any:
    kinds = ["none", "bool", "int", "float", "text"]
    if depth < 3:
        kinds += ["list", "dict", "tuple"] if tuples else ["list", "dict"]
    kind = rng.choice(kinds)
    if kind in ("list", "tuple"):
        items = [random_plain(rng, depth + 1, tuples) for _ in range(rng.randrange(3))]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {random_text(rng): random_plain(rng, depth + 1, tuples) for _ in range(rng.randrange(3))}
    return {"none": None, "bool": rng.random() < 0.5, "int": rng.randrange(-2**63, 2**63),
            "float": random_float(rng), "text": random_text(rng)}[kind]


def random_config(rng: random.Random, tuples: bool) -> Config:
    values = {
        "n_layer": rng.randrange(-2**63, 2**63), "dropout": random_float(rng), "lr": random_float(rng),
        "name": random_text(rng), "start": random_text(rng), "max_steps": rng.randrange(100),
        "betas": (random_float(rng), random_float(rng)), "clip": rng.choice([None, random_float(rng)]),
        "compile": rng.random() < 0.5, "precision": rng.choice(["auto", "bf16", "fp16"]),
        "amp": rng.choice([True, False, "auto"]), "size": rng.choice([rng.randrange(9), random_text(rng)]),
        "label": rng.choice([None, random_text(rng)]), "layers": [rng.randrange(9) for _ in range(rng.randrange(4))],
        "tags": [random_text(rng) for _ in range(rng.randrange(4))],
        "anything": [random_plain(rng, tuples=tuples) for _ in range(rng.randrange(4))],
        "widths": tuple(rng.randrange(9) for _ in range(rng.randrange(3))),
        "names": rng.choice([random_text(rng), [random_text(rng)], []]),
        "kwargs": {random_text(rng): random_plain(rng, tuples=tuples) for _ in range(rng.randrange(4))},
        "weights": {random_text(rng): random_float(rng) for _ in range(rng.randrange(3))},
        "maybe": rng.choice([None, {}, {random_text(rng): 3}]),
    }
    return Config(**{name: value for name, value in values.items() if rng.random() < 0.7})


def test_a_printed_config_gives_the_same_config_whatever_its_values(tmp_path):
    rng = random.Random(0)
    for _ in range(50):
        cfg = random_config(rng, tuples=True)
        again = configure(Config, [write(tmp_path, "a.py", print_config(cfg))])
        assert again == cfg and repr(again) == repr(cfg)


def test_a_saved_config_gives_the_same_config_whatever_its_values():
    rng = random.Random(1)
    for _ in range(200):
        cfg = random_config(rng, tuples=False)
        again = from_dict(Config, json.loads(json.dumps(config_dict(cfg))), "config.json")
        assert again == cfg and repr(again) == repr(cfg)
        assert config_hash(again) == config_hash(cfg) and differences(config_dict(cfg), again) == []


def junk_word(rng: random.Random, files: list[str]) -> str:
    fields = ["lr", "compile", "kwargs", "layers", "betas", "weights.a", "kwargs.a.b", "amp", "nope", "no-compile",
              "model.lr", "", ".", "..lr", "lr.", "kwargs.", "inert", "é", "maybe.x", "names", "optim.size", "clip"]
    key = rng.choice(["--", "", "+", "++", "-", "---", "~"]) + rng.choice(fields)
    value = rng.choice([random_text(rng), "[" * 300, "{" * 300, "{1:", "{[]:1}", "{'a':{1,2}}", "'\\d'", "1if 2", "-1",
                        "9" * 5000, "1e999", "1e-999", "...", "b'x'", "(1,", "nan", "None",
                        "[1,'2',{}]", "{}", "-" * 300])
    return rng.choice([key, value, f"{key}={value}", f"{key}={value}", rng.choice(files), "--"])


def test_no_command_line_gives_a_traceback(capsys, tmp_path):
    rng = random.Random(2)
    bad = [b"", b"\0", b"lr = 3", b"lr: 3", b'{"lr": 3}', b"1/0", b"\xff\xfe", b"a: &a [*a]", b"lr: ${lr}", b"[" * 300,
           b"lr = lr * 'a'", b"import sys; sys.exit(7)", b"lr = 10 ** 5000", b"kwargs = {1: {2}}", b"? {a: b}\n: c"]
    files = [write(tmp_path, f"{index}{suffix}", text) for index, text in enumerate(bad)
             for suffix in (".py", ".yaml", ".json")]
    (tmp_path / "folder.py").mkdir()
    files += [str(tmp_path / "folder.py"), "a\0.py", "/", "x" * 3000 + ".py", "",
              "\ud800.yaml", "--help", "--help", "--print_config"]
    codes = {0: 0, 2: 0, None: 0}
    for _ in range(1500):
        argv = [junk_word(rng, files) for _ in range(rng.randrange(1, 4))]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                cfg = configure(Config, argv, ALIASES)
            assert isinstance(cfg, Config)
            code = None
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            pytest.fail(f"{argv!r}: {error!r}")
        codes[code] += 1
        if code == 2:
            assert capsys.readouterr().err.startswith("error: ")
    assert min(codes.values()) > 20, codes  # every way out was taken


@pytest.mark.parametrize("word", [
    "--" + "a" * 1_000_000, "--" + "a." * 100_000 + "lr=3", "--kwargs." + "a." * 10_000 + "a=3",
    "a" * 1_000_000 + ".py", "--lr" + "=" * 1_000_000,
    "--kwargs=" + "[" * 100_000, "--kwargs=" + "-" * 100_000 + "1", "--kwargs=" + "1+" * 100_000 + "1",
    "--layers=" + "1," * 100_000, "--lr=" + "9" * 100_000, "--max_steps=" + "9" * 100_000,
    "--anything=" + "[" * 100_000,
])
def test_huge_words_are_read_or_refused_in_a_short_line(capsys, word):
    try:
        assert isinstance(configure(Config, [word]), Config)
    except SystemExit as stop:
        assert stop.code == 2 and len(capsys.readouterr().err) < 1000


# ------------------------------------------------------------------------------------ dialects of other systems

OTHER = Dialect("other", "the other system", "abc123", marks=("model.deep.", "n_embd"), defaults={"lr": 0.5},
                groups={"preset": {"small": {"training": {"steps": 7}, "deep": {"depth": 2}}},
                        "config_name": {"base": {"lr": 0.25}}})
OLDER = Dialect("older", "the older system", "abc122", defaults={"lr": 0.75},
                complete=lambda given, values, fields: {"n_layer": values["max_steps"] // 10})
DIALECTS = (OTHER, OLDER)
OTHER_NAMES = {"n_embd": "batch_size", "steps": "max_steps", "depth": "n_layer", "inert": None}


def spoken(*argv: str) -> Any:
    return configure(Config, list(argv), OTHER_NAMES, DIALECTS)


def test_what_settings_of_another_system_leave_out_has_its_default(tmp_path, capsys):
    path = write(tmp_path, "a.yaml", "model:\n  deep:\n    batch_size: 3\n")
    cfg = spoken(path)
    assert (cfg.batch_size, cfg.lr, cfg.max_steps) == (3, 0.5, 100)
    line = "note: read as the other system: absent keys take its defaults (--dialect=none: ours)\n"
    assert capsys.readouterr() == ("", line)
    assert spoken(path, "--lr=2").lr == 2.0
    assert spoken("n_embd=4").lr == 0.5  # a command line is enough
    assert spoken(path, "--dialect=none").lr == 1e-3
    ours = write(tmp_path, "a.py", "max_steps = 5")
    assert spoken(ours, "n_embd=4").lr == 1e-3  # a Python file is ours
    assert spoken(write(tmp_path, "b.yaml", "batch_size: 3")).lr == 1e-3


def test_a_dialect_may_be_asked_for(tmp_path, capsys):
    assert spoken("--dialect=older", "--max_steps=50") == Config(lr=0.75, n_layer=5, max_steps=50)
    with pytest.raises(SystemExit):
        spoken("--dialect=newer")
    assert "dialect: there is no 'newer', there is other, older, none" in capsys.readouterr().err


def test_a_group_stands_for_its_settings_and_comes_before_what_is_typed(tmp_path, capsys):
    assert spoken("--max_steps=9", "preset=small") == Config(lr=0.5, n_layer=2, max_steps=9)
    assert spoken("+preset=small").max_steps == 7
    assert spoken("--config-name", "base").lr == 0.25
    text = "defaults:\n  - _self_\n  - preset: small\n  - missing: x\nmodel.deep.lr: 3\n"
    assert spoken(write(tmp_path, "a.yaml", text)) == Config(lr=3.0, n_layer=2, max_steps=7)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        spoken("preset=smal")
    assert "preset: the other system has no 'smal', did you mean small?" in capsys.readouterr().err


@pytest.mark.parametrize("group", ["preset", "override preset", "/preset", "override /preset@model", "optional preset"])
def test_a_list_of_defaults_is_enough_to_know_a_system_and_names_groups_as_hydra_does(tmp_path, group):
    path = write(tmp_path, "a.yaml", f"defaults:\n  - base\n  - {group}: small\n  - _self_\n")
    assert spoken(path) == Config(lr=0.5, n_layer=2, max_steps=7)


def test_a_group_of_many_names_or_of_none_is_one_short_line(tmp_path, capsys):
    several = write(tmp_path, "a.yaml", "defaults:\n  - preset: [small, large]\n")
    many = Dialect("many", "that system", "abc", groups={"zoo": {f"animal{number}": {} for number in range(300)}})
    for argv, told in (([several], "has no ['small', 'large']"), (["zoo=x"], "animal23, ...")):
        with pytest.raises(SystemExit):
            configure(Config, argv, OTHER_NAMES, (*DIALECTS, many))
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and told in line and len(line) < 400


def test_a_dialect_sees_what_is_typed_after_what_files_say(tmp_path):
    def last(given: dict, values: dict, fields: dict) -> dict:
        return {"n_layer": int([raw for key, raw in given.items() if key.endswith("rate_of_x")][-1])}

    groups = {"preset": {"p": {"a.rate_of_x": 2}}}
    dialect = Dialect("x", "X", "abc", marks=("a.rate_of_x",), groups=groups, complete=last)
    path = write(tmp_path, "a.yaml", "a: {rate_of_x: 1}\n")
    for argv, expected in (([path], 1), ([path, "--a.rate-of-x=3"], 3), ([path, "b.rate_of_x=3", "preset=p"], 3)):
        assert configure(Config, argv, {"rate_of_x": READ}, (dialect,)).n_layer == expected


def test_what_only_a_dialect_reads_is_refused_with_its_name(tmp_path, capsys):
    ours = write(tmp_path, "a.py", "max_steps = 5")
    for word in ("deep.pace=3", "preset=small"):
        with pytest.raises(SystemExit):
            configure(Config, [ours, word], {"pace": READ}, DIALECTS)
        line = f"error: command line: {word.split('=')[0]}: no setting of ours; --dialect=other reads all of them as"
        assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("text", ["a:\n  lr: 3\nb:\n  lr: null\n", "a:\n  lr: ~\nb:\n  lr: 3\n"])
def test_null_never_competes_with_a_value(tmp_path, text):
    assert configure(Config, [write(tmp_path, "a.yaml", text)]).lr == 3.0


def test_null_of_another_system_is_an_absent_key(tmp_path, capsys):
    path = write(tmp_path, "a.yaml", "n_embd: 2\nlr: null\nclip: null\n")
    cfg = spoken(path)
    assert (cfg.lr, cfg.clip) == (0.5, None)  # clip takes none, lr does not
    with pytest.warns(UserWarning, match="without effect here: section_of_another"):
        assert spoken(write(tmp_path, "c.yaml", "n_embd: 2\nsection_of_another: null\n")).lr == 0.5
    capsys.readouterr()
    assert "lr: expected float, got None" in only_error(capsys, write(tmp_path, "b.yaml", "lr: null\n"))


def test_null_of_a_name_in_another_unit_is_an_absent_key():
    aliases = {"ratio": Derived("clip", lambda ratio, settings: ratio * settings["lr"])}
    dialect = Dialect("x", "X", "abc", marks=("ratio",), defaults={"clip": 5.0})
    for word, expected in (("null", 5.0), ("2", 2e-3)):
        assert configure(Config, [f"ratio={word}"], aliases, (dialect,)).clip == expected


def test_null_or_to_be_set_in_a_group_leaves_the_default():
    groups = {"preset": {"open": {"lr": "???", "batch_size": None, "max_steps": 3}}}
    dialect = Dialect("x", "X", "abc", defaults={"lr": 0.5}, groups=groups)
    assert configure(Config, ["preset=open"], None, (dialect,)) == Config(lr=0.5, max_steps=3)


def test_a_configuration_by_name_comes_before_groups_and_is_a_file_elsewhere(capsys):
    groups = {"preset": {"small": {"lr": 2}}, "config_name": {"base": {"lr": 0.25}}}
    dialect = Dialect("x", "X", "abc", groups=groups)
    assert configure(Config, ["preset=small", "--config-name=base"], None, (dialect,)).lr == 2.0
    capsys.readouterr()
    told = only_error(capsys, "--config-name=base")
    assert "config-name: name the configuration file itself, bare: base.yaml" in told


def test_what_only_a_dialect_reads_has_no_effect_where_there_is_to_be_none(tmp_path):
    path = write(tmp_path, "a.yaml", "model: {deep: {pace: 3, lr: 2}}\n")
    with pytest.warns(UserWarning, match="without effect here: model.deep.pace"):
        assert configure(Config, [path, "--dialect=none"], {"pace": READ}, DIALECTS) == Config(lr=2.0)


def test_a_dialect_is_not_asked_to_complete_settings_that_are_wrong(capsys):
    dialect = Dialect("x", "X", "abc", marks=("n_embd",), complete=lambda given, values, fields: 1 / 0)
    with pytest.raises(SystemExit):
        configure(Config, ["n_embd=1", "lr=x"], OTHER_NAMES, (dialect,))
    assert "lr: expected float, got 'x'" in capsys.readouterr().err


def test_references_of_a_file_of_a_group_name_the_group(tmp_path):
    assert configure(Config, [write(tmp_path, "a.yaml", "lr: 2\nclip: ${optim.lr}\n")]).clip == 2.0


def test_cuda_of_a_file_of_another_system_is_no_demand(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Machine = make_dataclass("Machine", [("device", str, "auto"), ("lr", float, 1.0)])
    path = write(tmp_path, "a.yaml", "device: cuda\n")
    dialects = (Dialect("other", "the other system", "abc123", marks=("device",)),)
    assert configure(Machine, [path], None, dialects).device == "auto"
    assert f"note: device = cuda of {path} is not there: device = auto" in capsys.readouterr().err
    assert configure(Machine, ["device=cuda"], None, dialects).device == "cuda"


def test_what_a_key_refers_to_does_not_matter_where_the_key_has_no_effect(tmp_path):
    with pytest.warns(UserWarning, match="without effect here: inert"):
        configure(Config, [write(tmp_path, "a.yaml", "inert: ${nowhere}\n")], ALIASES)


def test_references_to_the_time_and_to_the_environment(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PLACE", "here")
    path = write(tmp_path, "a.yaml", "name: out/${now:%Y}/${oc.env:PLACE}-${oc.env:NO_SUCH, there}\n")
    assert configure(Config, [path]).name == f"out/{datetime.now().year}/here-there"
    missing = write(tmp_path, "b.yaml", "name: ${oc.env:NO_SUCH}\n")
    assert "the environment has no NO_SUCH" in only_error(capsys, missing)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "is not the same in all processes of a run: set --name=..." in only_error(capsys, path)
    assert configure(Config, [path, "--name=x"]).name == "x"


def test_a_warning_reads_as_a_note():
    done = subprocess.run([sys.executable, "-c", "from configurator import warn; warn('inert')"],
                          cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "note: inert\n"


def test_hydra_s_own_settings_have_no_effect(tmp_path):
    with pytest.warns(UserWarning, match=r"without effect here: hydra.run.dir, hydra/job_logging"):
        configure(Config, ["hydra.run.dir=x", "--hydra/job_logging=none"])
    with pytest.warns(UserWarning, match=r"without effect here: hydra/job_logging"):
        configure(Config, ["hydra/job_logging=none"])


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--lr=3", "--config=a.yaml"],
         "config: files go bare, without --config: python test_configurator.py --lr=3 a.yaml"),
        (["--config", "a b.yaml", "--lr=3"], "without --config: python test_configurator.py 'a b.yaml' --lr=3"),
        (["-c", "a.yaml", "lr=3"], "c: files go bare, without -c: python test_configurator.py a.yaml lr=3"),
        (["--yaml=a.yaml"], "yaml: files go bare, without --yaml: python test_configurator.py a.yaml"),
        (["--checkpoint", "x.pt"], "checkpoint: files go bare, without --checkpoint: python test_configurator.py x.pt"),
        (["--config"], "config: files go bare, without --config"),
        (["--config-path=conf"], "name the configuration file itself, bare"),
        (["--dialect=none"], "dialect: no such setting"),  # where there is none to choose
    ],
)
def test_names_that_other_programs_have_for_files(capsys, words, hint):
    error = only_error(capsys, *words)
    assert hint in error and "true" not in error


def test_words_that_a_script_has_read_itself_stay_in_the_line_that_is_right(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "text", "--config", "a.yaml", "--lr=3"])
    assert only_error(capsys, "--config", "a.yaml", "--lr=3").endswith("python test_configurator.py text a.yaml --lr=3")
    assert only_error(capsys, "--config", "a.yaml").endswith("python test_configurator.py a.yaml")  # of another line


def test_many_runs_are_left_to_sweep(monkeypatch):
    called = []

    def call(program: str, command: list[str]) -> None:  # never returns
        assert program == sys.executable
        called.append(command)
        raise SystemExit(5)

    monkeypatch.setattr(configurator.os, "execv", call)
    for words in (["lr=1,2", "-m"], ["--multirun", "lr=1,2"], ["hydra.sweeper.n_trials=3", "lr=1,2"]):
        with pytest.raises(SystemExit) as stop:
            configure(Config, words)
        assert stop.value.code == 5
        assert called[-1][1:3] == [str(ROOT / "sweep.py"), __file__]
        assert "lr=1,2" in called[-1] and not {"-m", "--multirun"} & set(called[-1])


def test_the_words_of_a_study_are_left_to_sweep_by_pages_alone(monkeypatch, capsys):
    called = []

    def call(program: str, command: list[str]) -> None:  # never returns
        called.append(command[1:])
        raise SystemExit(0)

    monkeypatch.setattr(configurator.os, "execv", call)
    for words in (["--holdout=each"], ["--controls", "lr=1"], ["study=all", "lr=1"], ["--jobs", "2"]):
        assert "no such setting" in errors_of(capsys, *words)[0]  # of sample.py, say
        monkeypatch.setattr(sys.modules[Config.__module__], "train", None, raising=False)
        with pytest.raises(SystemExit):
            configure(Config, words)
        assert called[-1] == [str(ROOT / "sweep.py"), __file__, *words]
        assert capsys.readouterr().out == "test_configurator: several runs, by sweep.py\n"
        monkeypatch.delattr(sys.modules[Config.__module__], "train")
    monkeypatch.setattr(sys.modules[Config.__module__], "train", None, raising=False)
    for words in (["--report=out/a", "--out=out/b"], ["--report", "out/a", "--out=out/b"]):
        with pytest.raises(SystemExit):
            configure(Config, words)
        assert called[-1] == [str(ROOT / "sweep.py"), "report", "out/a", "--out=out/b"]
        assert capsys.readouterr().out == "test_configurator: a report, by sweep.py\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--launcher='torchrun --nproc_per_node=N'" in only_error(capsys, "-m", "lr=1,2")
