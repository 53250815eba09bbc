"""Pages of results: write_page, and the page that a run leaves."""

import base64
import html
import importlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, SCRIPTS

from common.runlog import write_json
from configurator import config_dict
from measure import figures
from measure.figures import figure
from measure.glossary import meaning
from measure.pages import Section, cell_of, filled_table, run_page, write_page


def test_a_page_holds_text_tables_and_pictures_in_one_file(tmp_path):
    with figure(tmp_path, "line", width=6, height=3) as axes:
        axes.plot([1, 2])
    rows = [{"lr": 0.001, "what": "a<b", "n": 3}, {"lr": None, "what": "c", "n": 123456}]
    picture = tmp_path / "plots" / "line.png"
    section = Section("Runs & results", ["5 < 6"], [rows, []], [(picture, "a line")], ["python x.py '--a=<b>'"])
    write_page(tmp_path / "deep" / "page.html", "One <page>", "It works.", [section, Section("more", folded=True)])
    text = (tmp_path / "deep" / "page.html").read_text()
    assert "One &lt;page&gt;" in text and "Runs &amp; results" in text and "5 &lt; 6" in text
    assert html.unescape(re.search("<pre>(.*?)</pre>", text)[1]) == "python x.py '--a=<b>'"
    cells = re.findall(r'<td(.*?) data-value="(.*?)">(.*?)</td>', text)
    number = ' class="number"'
    assert cells == [
        (number, "0.001", "0.001"), ("", "a&lt;b", "a&lt;b"), (number, "3", "3"),
        ("", "", ""), ("", "c", "c"), (number, "123456", "123,456"),
    ]  # fmt: skip
    assert text.count("<th") - text.count("<thead") == 3  # and none of the empty table
    assert text.count('<th class="number">') == 2  # a blank is none and makes no text of a column
    [(encoded, width)] = re.findall('src="data:image/png;base64,(.*?)" width="(.*?)"', text)
    assert base64.b64decode(encoded) == picture.read_bytes() and int(width) == 600
    assert "<details>" in text and not re.search(r"(src|href)=\"(?!data:)", text)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]


def test_a_picture_that_is_not_there_is_said(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    pictures = [(tmp_path / "none.png", "first"), (tmp_path / "torn.png", "second")]
    write_page(tmp_path / "page.html", "title of \udcff", "", [Section("s", pictures=pictures)])  # as of a file's name
    text = (tmp_path / "page.html").read_text()
    assert "none.png is not there: first" in text and "torn.png is not there: second" in text and "<img" not in text


def test_what_is_undefined_is_blank_and_numbers_are_short():
    assert [cell_of(value).text for value in (None, float("nan"), float("inf"))] == ["", "", ""]
    told = [cell_of(value).text for value in (1 / 3, 1e-7, 12345.6, 12_345, 123_456, True, "a", np.float64(2.5))]
    assert told == ["0.3333", "1e-07", "12,346", "12345", "123,456", "true", "a", "2.5"]
    assert [cell_of(text).style for text in ("short", "a b " * 20, 1)] == ["", "long", "number"]
    assert cell_of(np.float64(0.1)).value == "0.1" and cell_of(np.int64(7)) == ("7", "7", True)


def test_few_long_rows_stand_on_their_side_and_unknown_columns_are_left_out():
    def told(rows: list[dict]) -> list[list[str]]:
        table = filled_table(rows)
        heads = [column["name"] for column in table["columns"]]
        return [heads, *([cell.text for cell in row] for row in table["rows"])]

    values = {f"at_{i}": i for i in range(10)}
    first, second = {"K": 1, "gone": None} | values, {"K": 2, "gone": float("nan")} | values | {"at_3": None}
    turned = told([first, second])
    assert turned[0] == ["K", "K 1", "K 2"] and turned[1] == ["at_0", "0", "0"] and turned[4] == ["at_3", "3", ""]
    assert len(turned) == 11 and filled_table([first, second])["columns"][1]["is_number"]
    assert told([first, second | {"K": 1}])[0] == ["K", *values]  # what is across must be one thing each
    assert told([{"K": i} | values for i in range(6)])[0] == ["K", *values]  # many rows are to be sorted
    del first["at_9"], second["at_9"]
    assert told([first, second])[0] == ["K", *list(values)[:9]]
    assert told([{"a": None}]) == [[]]


def test_every_html_file_beside_a_module_is_in_the_package():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert re.search(r'^measure = \["\*\.html"\]$', text, re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------
# The page of a run
# ---------------------------------------------------------------------------------------------------------------
def run_folder(folder: Path, page, settings: dict, summary: dict) -> Path:
    """What a run of these settings leaves, without the run."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config_dict(page.Config(**settings)))
    write_json(folder / "summary.json", summary)
    shutil.copy(page.__file__, folder)
    with figure(folder, "loss", 2, 2) as axes:
        axes.plot([1, 2])
    return folder


def settings_by(page, words: list[str], capsys) -> dict:
    """All settings that a page makes of a command line, by its --print_config."""
    with pytest.raises(SystemExit) as end:
        page.main([*words, "--print_config"])
    values = {}
    told = capsys.readouterr()
    exec(told.out, {}, values)
    assert not end.value.code and not told.err
    return config_dict(page.Config(**values))


CHOSEN = {  # as configure() fills them in; with values that a shell would take apart
    "train_ghmm": {"components": [{"process": "mess3", "weight": 1}, {"process": "rrxor"}],
                   "open_probs": [1.0, 0.25], "add_bos": True, "lr": 1e-05, "out_dir": "out/a b's $(c)"},
    "train_arxiv": {"lr": 1e-3, "min_lr": 4e-4, "categories": ["cs.PL", "math, pure"], "patience": 0, "probe": False},
    "train_apelr": {"lr": 1e-3, "loss_weights": {"usage_balance": 0.1}, "batch_size": "auto", "data": "data/x y"},
    "train_state": {"embed_key": None, "decoder_hidden_dims": [512], "wandb": "offline", "pert_col": "5",
                    "rope_theta": 12.5, "perturbation_features_file": "none"},
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_command_of_a_page_makes_the_settings_of_the_run(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = importlib.import_module(name)
    folder = run_folder(tmp_path / "run 1", page, CHOSEN[name], {"verdict": "it works", "steps": 3, "torch": "2"})
    assert run_page(folder, page.Config) == f"pictures in {folder}/plots, all of it in {folder}/report.html"
    text = html.unescape((folder / "report.html").read_text())
    command = re.search("<pre>(.*?)</pre>", text, re.DOTALL)[1]
    python, script, *words = shlex.split(command.replace("\\\n", ""))
    assert (python, script) == ("python", f"{name}.py") and all(len(line) < 120 for line in command.splitlines())
    saved = json.loads((folder / "config.json").read_text())
    assert settings_by(page, words, capsys) == saved
    cell = r"\s*<td[^>]*>(.*?)</td>"
    told = {name: said for name, value, default, said in re.findall(rf"<tr>{cell * 4}\s*</tr>", text)}
    if name == "train_state":  # the text none would be read as nothing: the file says it
        assert words == [str(folder / "config.json")] and "cannot be typed (perturbation_features_file)" in text
    else:
        # Those that were chosen, and none that only follows from them: a last learning rate of a tenth of the first.
        assert sorted(word[2:].split("=")[0] for word in words) == sorted(CHOSEN[name])
    assert {*CHOSEN[name]} <= told.keys() and all(told[setting] for setting in CHOSEN[name])  # what --help says of it


def test_the_page_of_a_run_says_what_it_found_and_where(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = importlib.import_module("train_state")
    rivals = {"mean": {"mae": 0.5, "pearson_delta": None}, "control": {"mae": 0.75, "pearson_delta": 0.0}}
    summary = {"pearson_delta": 0.25, "mae": None, "mse": 1.5, "baselines": rivals, "fit": {"c": 2.0}, "seconds": 12.0,
               "cells_per_second": 345.6, "xe": list(range(20)), "verdict": "5 < 6", "device": "cpu"}  # fmt: skip
    folder = run_folder(tmp_path / "run", page, {}, summary)
    stale = folder / "plots" / "stale.png"
    shutil.copy(folder / "plots" / "loss.png", stale)
    os.utime(stale, (1, 1))  # of a run that was here before
    run_page(folder, page.Config)
    text = (folder / "report.html").read_text()
    assert '<p class="lead">5 &lt; 6</p>' in text and text.count("<img") == 1 and "Loss while training, and" in text
    cells = re.findall(r'data-value="(.*?)">', text)
    first = cells.index("pearson_delta")
    assert cells[first + 1] == "0.25" and "mae" not in cells[first : first + 6]
    folded = text[text.index("<details>") :]
    told = re.findall('data-value="(.*?)"', folded)
    assert told[:2] == ["mse", "1.5"] and "squared error" in told[2] and told[3:6] == ["fit.c", "2.0", ""]
    # The head of a column says on a hover what it is, and the end of the page for those who cannot.
    said = meaning("mae", "state")
    assert f'<th class="number" title="{said}">' in text and f'data-value="{said}"' in text.split("What the col")[1]
    assert "20 values, the first 0, the last 19" in folded and ">control<" in folded and "5 &lt; 6" not in folded
    for fact in ("12 s", "345.6 cells/s", "begun", "ended", torch.__version__, f"{os.cpu_count()} cores"):
        assert fact in text, fact
    assert f"All {len(config_dict(page.Config()))} settings have their defaults" in text and "edited" not in text
    assert ">python train_state.py</pre>" in text and "it says again what the run said" in text
    monkeypatch.chdir(tmp_path)  # where that would find no script
    for resume, said in (("never", "and replaces it"), ("a/last.pt", "which goes on from a/last.pt")):
        write_json(folder / "config.json", config_dict(page.Config(resume=resume)))
        run_page(folder, page.Config)
        text = (folder / "report.html").read_text()
        assert f">python {page.__file__} --resume={resume}</pre>" in text
        assert f"The command repeats the run, {said}" in text
    (folder / "train_state.py").write_text("# edited")
    run_page(folder, page.Config)
    assert "train_state.py was edited since" in (folder / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_a_note_and_an_old_run_has_no_verdict(tmp_path, capsys, monkeypatch):
    page = importlib.import_module("train_ghmm")
    folder = run_folder(tmp_path / "run", page, {}, {"loss": 1.0})
    assert run_page(folder, page.Config).startswith("pictures in ") and (folder / "report.html").is_file()
    # Of a run on GPUs, whose page had another setting then.
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"gone": 1})
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H100 of {device}")
    assert run_page(folder, page.Config, {"device": "cuda:1"}) and "gone" not in (folder / "report.html").read_text()
    for name, value in (("ranks", "8"), ("device", "cuda:1, H100 of cuda:1")):
        assert re.search(f'>{name}</td>\\s*<td[^>]*>{value}<', (folder / "report.html").read_text())
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()  # in the way, for root too
    monkeypatch.setattr(figures, "STRICT", False)
    assert run_page(folder, page.Config) == f"pictures in {folder}/plots"
    (folder / "summary.json").write_text("torn {")
    assert run_page(folder, page.Config, {"verdict": "fine"}) == f"pictures in {folder}/plots"
    assert run_page(folder, page.Config) == f"pictures in {folder}/plots"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all(line.startswith(f"note: {folder}/report.html was not written (") for line in told)
    assert not list(folder.glob(".saving-*"))


def test_a_look_at_a_checkpoint_alone_has_a_page_without_settings(tmp_path):
    page = importlib.import_module("train_ghmm")
    (tmp_path / "imported" / "analysis").mkdir(parents=True)
    told = run_page(tmp_path / "imported" / "analysis", page.Config, {"verdict": "v", "loss": 1.0})
    assert told == f"all of it in {tmp_path}/imported/analysis/report.html"
    text = (tmp_path / "imported" / "analysis" / "report.html").read_text()
    assert "imported: a look at a run of train_ghmm.py" in text and "no config.json" in text and "<pre>" not in text
    write_json(tmp_path / "imported" / "config.json", config_dict(page.Config(lr=0.5)))
    run_page(tmp_path / "imported" / "analysis", page.Config, {"verdict": "v", "loss": 1.0})
    assert "train_ghmm.py --lr=0.5</pre>" in (tmp_path / "imported" / "analysis" / "report.html").read_text()
