"""Tables and charts as data: their files, their axes."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET

import pytest

from prototok.report.chart import Axis, Chart, Series, extent, svg, tick_label, ticks
from prototok.report.tables import Cell, Table, label, mean_std, number, to_csv, to_latex

TABLE = Table(
    "t", "50 % of {all}", ("who, what", "N = 4"),
    ((label('a_b & "c"'), Cell("1.00±0.50", 1.0)),
     (label("≥8"), Cell("…", None, "missing")), (label("x"), Cell("failed", None, "failed"))),
)  # fmt: skip


def test_mean_and_standard_deviation() -> None:
    found = mean_std([1.0, 0.0])
    assert (found.text, found.value, found.std, found.note) == ("0.50±0.50", 0.5, 0.5, "n = 2")
    assert found.n == 2
    assert number(12345.678, 1).text == "12,345.7"
    assert number(None).text == "–" and number(float("nan")).value is None


def test_csv_reads_back() -> None:
    rows = list(csv.reader(io.StringIO(to_csv(TABLE))))
    assert rows == [
        ["who, what", "N = 4"], ['a_b & "c"', "1.00±0.50"], ["≥8", "[missing]"], ["x", "[failed]"],
    ]  # fmt: skip


def test_csv_has_mean_std_and_n_in_columns_of_their_own() -> None:
    table = Table(
        "t", "c", ("who", "N = 4", "tokens/s"),
        ((label("a"), mean_std([1.0, 0.5]), number(12345.5, 1)),
         (label("b"), Cell("0.45±0.31", 0.45, std=0.31), number(None)),
         (label("c"), Cell("…", None, "missing"), Cell("3/3; 1.0", 1.0))),
    )  # fmt: skip
    assert list(csv.reader(io.StringIO(to_csv(table)))) == [
        ["who", "N = 4 mean", "N = 4 std", "N = 4 n", "tokens/s"],
        ["a", "0.75", "0.25", "2", "12345.5"],
        ["b", "0.45", "0.31", "", "–"],
        ["c", "[missing]", "", "", "3/3; 1.0"],
    ]


def test_latex_is_booktabs_and_escaped() -> None:
    text = to_latex(TABLE)
    assert text.index("\\toprule") < text.index("\\midrule") < text.index("\\bottomrule")
    assert 'a\\_b \\& "c" & 1.00$\\pm$0.50 \\\\' in text
    assert "\\caption{50 \\% of \\{all\\}}" in text
    assert "$\\geq$8 & [missing] \\\\" in text
    assert "\\begin{tabular}{lr}" in text


def test_ticks_are_round_and_inside() -> None:
    assert ticks(Axis(""), 0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(Axis("", log=True), 3, 4000) == [10, 100, 1000]
    assert ticks(Axis("", log=True), 8, 60) == [10, 20, 50]
    assert ticks(Axis("", log=True, ticks=(4, 8, 64)), 3, 20) == [4, 8]
    assert len(ticks(Axis("", log=True), 3.02, 3.07)) >= 2
    assert [tick_label(v) for v in (0, 0.25, 1500.0, 2e7)] == ["0", "0.25", "1,500", "2e+07"]


def test_points_stand_where_their_axes_say() -> None:
    """Read back from the drawing: place is linear in log x and in y."""
    chart = Chart(
        "c", "title <&>", Axis("x", log=True), Axis("y", low=0, high=1),
        (Series("s", (1.0, 10.0, 100.0), (0.0, 0.5, 1.0)),),
    )  # fmt: skip
    assert extent(chart) == ((0.8, 125.0), (0, 1))
    root = ET.fromstring(svg(chart, alone=True))
    line = root.find(".//{*}polyline[@class='s0']")
    assert line is not None
    places = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.11)
    assert places[0][1] - places[1][1] == pytest.approx(places[1][1] - places[2][1], abs=0.11)
    assert root.attrib["aria-label"] == "title <&>"


def test_a_chart_of_nothing_is_a_chart() -> None:
    for log in (False, True):
        chart = Chart("c", "t", Axis("x", log=log), Axis("y", log=log), ())
        ET.fromstring(svg(chart))
    one = Chart("c", "t", Axis("x"), Axis("y"), (Series("s", (3.0,), (3.0,), "points"),))
    (x0, x1), _ = extent(one)
    assert x0 < 3 < x1


def test_a_logarithmic_axis_leaves_out_zero() -> None:
    chart = Chart("c", "t", Axis("x", log=True), Axis("y"), (Series("s", (0.0, 5.0), (1.0, 2.0)),))
    root = ET.fromstring(svg(chart))
    line = root.find(".//{*}polyline[@class='s0']")
    assert line is not None and len(line.attrib["points"].split()) == 1


def test_markers_on_the_edge_are_whole() -> None:
    ends = Series("", (0.0, 1.0), (0.0, 1.0), "points", weight=6)
    chart = Chart("c", "t", Axis("x", low=0, high=1), Axis("y", low=0, high=1), (ends,))
    root = ET.fromstring(svg(chart))
    clipped = root.find(".//{*}g[@clip-path]")
    assert clipped is not None and clipped.findall(".//{*}circle") == []
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    marks = root.findall(".//{*}circle")
    assert len(marks) == 2
    for mark in marks:
        x, y, r = (float(mark.attrib[name]) for name in ("cx", "cy", "r"))
        assert r < x < width - r and r < y < height - r


def test_one_series_is_named_as_well() -> None:
    drawn = svg(Chart("c", "t", Axis("x"), Axis("y"), (Series("alone", (1.0,), (1.0,)),)))
    assert ">alone</text>" in drawn
