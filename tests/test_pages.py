"""Pages of results: write_page, and the page that a run leaves."""

import base64
import html
import re
from pathlib import Path

import numpy as np

from measure.figures import figure
from measure.pages import Section, cell_of, write_page


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
    [(encoded, width)] = re.findall('src="data:image/png;base64,(.*?)" width="(.*?)"', text)
    assert base64.b64decode(encoded) == picture.read_bytes() and int(width) == 600
    assert "<details>" in text and not re.search(r"(src|href)=\"(?!data:)", text)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]


def test_a_picture_that_is_not_there_is_said(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    pictures = [(tmp_path / "none.png", "first"), (tmp_path / "torn.png", "second")]
    write_page(tmp_path / "page.html", "title", "", [Section("s", pictures=pictures)])
    text = (tmp_path / "page.html").read_text()
    assert "none.png is not there: first" in text and "torn.png is not there: second" in text and "<img" not in text


def test_what_is_undefined_is_blank_and_numbers_are_short():
    assert [cell_of(value).text for value in (None, float("nan"), float("inf"))] == ["", "", ""]
    told = [cell_of(value).text for value in (1 / 3, 1e-7, 1234567.8, 1337, True, "a", np.float64(2.5))]
    assert told == ["0.33333", "1e-07", "1,234,568", "1337", "true", "a", "2.5"]
    assert cell_of(np.float64(0.1)).value == "0.1" and cell_of(np.int64(7)) == ("7", "7", True)


def test_every_html_file_beside_a_module_is_in_the_package():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert re.search(r'^measure = \["\*\.html"\]$', text, re.MULTILINE)
