"""``deslo report``: figures of runs that are known by hand, on a page that loads nothing."""

import json
import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from deslo_plugin import ConfigError
from deslo_plugin.cli.app import app
from deslo_plugin.telemetry.report.page import rows
from deslo_plugin.telemetry.report.run import Flight, Run
from tests.support.telemetry_lines import MOMENT, PARAMS, average, end, log, start, write


@pytest.fixture
def known(tmp_path):
    """Two replicas of three ranks; 6 steps of a second; replica 1 has half the loss, waits twice as long, and logs NaN
    once."""
    for replica, waited in ((0, 0.1), (1, 0.2)):
        records = [start(replica)]
        for steps in range(1, 7):
            records.append(
                log(steps, 100.0 + steps, None if (replica, steps) == (1, 6) else 8.0 / (1 + replica) / steps)
            )
            if steps in (2, 4):
                both = {"params": PARAMS} | ({"exp_avg": MOMENT} if steps == 4 else {})
                records.append(average(steps, 100.75 + steps, waited, **both))
        write(tmp_path / "known", replica, *records, end(106.5, 6))
    return tmp_path / "known"


@pytest.fixture
def bare(tmp_path):
    """One replica's file of two, without losses or averages, not ended."""
    write(tmp_path / "bare <&>", 0, start(0), {"kind": "log", "at": 103.0, "steps": 3, "grad_norm": 1.0})
    return tmp_path / "bare <&>"


def test_figures_of_a_known_run(known):
    run = Run(known)
    assert run.bytes == {"params": 2 * PARAMS, "exp_avg": MOMENT}
    assert run.reduction == pytest.approx(6 * PARAMS / (2 * PARAMS + MOMENT))
    assert run.exposed == pytest.approx([0.2, 0.4]) and dict(run.exposure) == pytest.approx({2: 0.15, 4: 0.3})
    # the last: replica 0 alone
    assert [point.loss for point in run.losses] == pytest.approx([6.0, 3.0, 2.0, 1.5, 1.2, 8 / 6])
    assert [point.tokens for point in run.losses] == [60 * steps for steps in range(1, 7)]
    assert [point.seconds for point in run.losses] == pytest.approx(range(1, 7)) and run.seconds == 6.5
    assert {seen.steps: seen.distance for seen in run.drift["params"]} == pytest.approx({2: 0.2, 4: 0.4})
    assert {seen.steps: seen.cosine for seen in run.drift["params"]} == pytest.approx({2: 0.8, 4: 0.6})
    assert run.flights[0] == Flight("params", 2, 2.25, 2.75, 0.1) and len(run.flights) == 3
    assert (run.steps, run.taken, run.ended, run.processes, run.found) == (6, 6, True, 1, 2)


def test_the_table_puts_runs_side_by_side(known, bare):
    table = {title: cells for title, *cells in rows([Run(known), Run(bare)])}
    assert table[""] == ["known", "bare <&>"]
    assert table["steps"] == ["6", "3, not ended"] and table["periods"] == ["2 / 4", "2 / 4"]
    assert table["tokens"] == ["360 ", "-"] and table["final loss"] == ["1.3333", "-"]
    assert table["bytes of a rank: params"] == ["2 kB", "-"] and table["times fewer than synchronous"] == ["2.4", "-"]
    assert table["seconds waited, mean (most)"] == ["0.30 (0.40)", "0.00 (0.00)"] and table["% waited"] == ["4.6", "0"]
    assert table["last cosine: exp_avg"] == ["0.6000", "-"]


def test_json_has_the_figures_of_the_table(known):
    said = json.loads(CliRunner().invoke(app, ["report", str(known), "--json"]).output)["known"]
    assert said["bytes"] == {"params": 2 * PARAMS, "exp_avg": MOMENT} and said["reduction"] == pytest.approx(2.4)
    assert said["exposed_s"] == pytest.approx([0.2, 0.4]) and said["last_drift"]["params"]["cosine"] == pytest.approx(
        0.6
    )


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.cells = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [
            value for name, value in attributes if name.endswith(("src", "href")) and not value.startswith("#")
        ]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag != "meta":
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.cells.append(data)


def test_the_page_is_whole_and_loads_nothing(known, bare, tmp_path):
    picture, text = tmp_path / "all.png", tmp_path / "all.md"
    done = CliRunner().invoke(
        app,
        [
            "report",
            str(known),
            str(bare),
            "--out",
            str(tmp_path / "r.html"),
            "--png",
            str(picture),
            "--markdown",
            str(text),
        ],
    )
    assert done.exit_code == 0, done.output
    content = (tmp_path / "r.html").read_text()
    page = Page(content)
    assert page.open == [] and page.loads == [] and not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "@import" not in content and not re.search(r"url\((?!#)", content)
    # loss, costs, drift, and the one timeline that there is
    assert page.tags.count("svg") == page.tags.count("figure") == 4
    assert {"known", "bare <&>", "2.4", "1.3333"} <= set(page.cells)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "| times fewer than synchronous | 2.4 | - |" in text.read_text() and "![charts](all.png)" in text.read_text()


def test_runs_without_anything_to_draw_have_a_table_all_the_same(bare, tmp_path):
    done = CliRunner().invoke(
        app, ["report", str(bare), "--out", str(tmp_path / "r.html"), "--png", str(tmp_path / "r.png")]
    )
    content = (tmp_path / "r.html").read_text()
    assert done.exit_code == 0 and "<table>" in content and "<svg" not in content
    assert "files of 1 of 2 replicas" in content


def test_a_restart_goes_over_steps_again_and_time_stands_still_between(tmp_path):
    first = [
        start(0, replicas=1),
        *(log(t, 100.0 + t, 5.0) for t in (1, 2, 3, 4, 5)),
        average(2, 102.1, 0.1, params=PARAMS),
        average(4, 104.1, 0.1, params=PARAMS),
    ]
    again = [
        start(0, at=1000.0, replicas=1),
        log(4, 1001.0, 1.0),
        average(4, 1001.1, 0.2, params=PARAMS),
        log(5, 1002.0, 1.0),
    ]
    run = Run(write(tmp_path, 0, *first, *again))
    assert [(point.steps, point.loss) for point in run.losses] == [(1, 5.0), (2, 5.0), (3, 5.0), (4, 1.0), (5, 1.0)]
    assert [point.seconds for point in run.losses] == pytest.approx([1, 2, 3, 4, 5])
    assert run.bytes == {"params": 2 * PARAMS} and run.exposed == pytest.approx([0.3]) and run.processes == 2
    assert run.name == "replica-0"


def test_a_run_that_starts_anew_in_its_folder_replaces_what_was_there(tmp_path):
    run = Run(
        write(tmp_path, 0, start(0), log(1, 101.0, 9.0), log(2, 102.0, 9.0), start(0, at=500.0), log(1, 501.0, 1.0))
    )
    assert [(point.steps, point.loss, point.seconds) for point in run.losses] == [(1, 1.0, 1.0)]


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "expected a folder with replica-0.jsonl, ... of deslo.telemetry, or such a file, got nothing there"),
        ("", "expected lines of deslo.telemetry, got none"),
        ('{"kind":"start"}\n{"kind":\n', "line 2: "),
        ("[1]\n", "line 1: no object"),
        ('{"loss":1}\n', "line 1: kind None"),
        ('{"kind":"log","at":1,"steps":1}\n', "no start"),
        ('{"kind":"what"}\n', "kind 'what'"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, content, expected):
    path = tmp_path / "replica-0.jsonl"
    if content is not None:
        path.write_text(content)
    done = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 2 and f"deslo report {path}: " in done.output and expected in done.output
    assert not (tmp_path / "r.html").exists()


def test_other_mistakes_are_told(known, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="got a folder without them"):
        Run(tmp_path / "empty")
    assert "2 called 'known'" in CliRunner().invoke(app, ["report", str(known), str(known)]).output
    done = CliRunner().invoke(app, ["report", str(known), "--out", str(tmp_path / "no" / "r.html")])
    assert done.exit_code == 2 and "expected a place to write to" in done.output
