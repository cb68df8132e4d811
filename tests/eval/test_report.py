"""The page of a suite: complete, self-contained, safe with any text in it, fit for a phone and for paper in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.pictures import photo
from PIL import Image

from nev.eval.report.figures import Figure
from nev.eval.report.page import write_report
from nev.eval.suite.results import SuiteResult, TaskResult

NASTY = "<script>alert(1)</script> & \"quotes\" 'n' $x$"
PHONE, DESK = 390, 1280


def result(**more: object) -> SuiteResult:
    tasks = (
        TaskResult(
            name="cifar10",
            kind="zero_shot",
            metric="top1",
            value=0.561,
            low=0.55,
            high=0.571,
            chance=0.1,
            published={"nomic-embed-vision-v1.5": 0.95},
            metrics={"top1": 0.561, "top1_low": 0.55, "top1_high": 0.571, "scale": 61.3},
            table=({"right": NASTY, "given": "a_very_long_class_name_without_any_space_" * 4, "share": 0.4},),
            images=10_000,
            bad=3,
        ),
        TaskResult(
            name="absent", kind="retrieval", metric="mean_recall_1", reason=f"no such folder {'/long' * 40} {NASTY}"
        ),
    )
    settings = {
        **{
            "suite": "quick",
            "about": "Quick",
            "checkpoint": "runs/a/step-1" + "/deep" * 30,
            "model": NASTY,
            "step": 1170,
        },
        **{"average": None, "seconds": 61.2, "tasks": tasks},
    }
    return SuiteResult.model_validate({**settings, **more})


def page(tmp_path: Path, found: SuiteResult, others: tuple[SuiteResult, ...] = ()) -> Path:
    picture = tmp_path / "wide.png"
    photo(0).resize((2400, 900)).save(picture)
    exhibits = [[Figure("found: the nearest pictures", picture)], []]
    return write_report(found, exhibits, others, (), tmp_path, tmp_path)[0]


class Seen(HTMLParser):
    """Tags with their attributes, and whether all that were opened are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    html = page(tmp_path, result()).read_text()
    seen = Seen(html)
    assert seen.open == []
    names = [tag for tag, _ in seen.tags]
    assert not {"script", "link", "iframe", "object"} & set(names)
    sources = [attributes["src"] for tag, attributes in seen.tags if tag == "img"]
    assert sources
    assert all(str(source).startswith("data:image/png;base64,") for source in sources)
    assert all(str(attributes["href"]).startswith("#") for tag, attributes in seen.tags if tag == "a")
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert "&lt;script&gt;" in html


def test_it_says_what_was_not_run_and_gives_no_average(tmp_path: Path) -> None:
    html = page(tmp_path, result(published={"other": 0.568})).read_text()
    assert "1 of 2 tasks were run" in html
    assert "There is no average while one is missing" in html
    assert "not run: no such folder" in html
    whole = page(tmp_path, result(average=0.5, tasks=result().tasks[:1] * 2)).read_text()
    assert "Average of all 2 tasks: <b>50.0%</b>" in whole


def test_other_models_stand_beside_it(tmp_path: Path) -> None:
    html = page(tmp_path, result(), (result(model="before", step=500),)).read_text()
    heads = re.findall(r"<th>([^<]*)</th>", html)
    assert {"nomic-embed-vision-v1.5", "before, step 500"} <= set(heads)


# --- in a real browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


def chromium(tmp_path: Path, *options: str) -> str:
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@browser
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_reaches_beyond_the_screen(tmp_path: Path, width: int) -> None:
    """The page itself does not scroll sideways; wide tables do, each in its own frame."""
    own = page(tmp_path, result(), (result(model="before"), result(model="long before that, and longer still")))
    measure = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script></body>"
    frame = tmp_path / "frame.html"
    (tmp_path / "measured.html").write_text(own.read_text().replace("</body>", measure))
    # A window has a least width, a frame has not.
    report = "<script>onload = () => document.title = frames[0].document.title</script>"
    frame.write_text(f'<iframe src="measured.html" width="{width}" height="800"></iframe>{report}')
    options = ("--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom")
    found = re.search(r"<title>(\d+) (\d+)</title>", chromium(tmp_path, *options, frame.as_uri()))
    assert found
    reach, inner = map(int, found.groups())
    assert reach <= inner <= width


@pytest.mark.slow
@browser
def test_it_draws_and_it_prints(tmp_path: Path) -> None:
    own = page(tmp_path, result()).as_uri()
    shot, paper = tmp_path / "shot.png", tmp_path / "paper.pdf"
    chromium(tmp_path, f"--screenshot={shot}", "--window-size=1280,1400", own)
    with Image.open(shot) as image:
        assert len(image.convert("RGB").getcolors(2**24) or []) > 100
    chromium(tmp_path, f"--print-to-pdf={paper}", "--no-pdf-header-footer", own)
    assert paper.read_bytes().startswith(b"%PDF")
