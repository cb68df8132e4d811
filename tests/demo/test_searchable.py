"""The index of a demo: made whole, made again where pictures changed, and never in the place of somebody's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.models import make_experiment, write_checkpoint
from helpers.pictures import encoded, photo
from rich.console import Console
from typer.testing import CliRunner

from nev.commands.main import app
from nev.config.base import ConfigError
from nev.demo import searchable
from nev.demo.searchable import Searchable, make_searchable, open_folder, open_pictures

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(make_experiment(tmp_path_factory.mktemp("small")))


def write_photos(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encoded(photo(number, 40, 30), "PNG"))
    lines = ["file_name,caption", *(f"{number}.png,a drawing of {number // 2}" for number in range(count))]
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


def index(model: str, photos: Path, work: Path) -> Searchable:
    kind, source = open_pictures(str(photos), None, QUIET)
    assert kind == "folder-captions"
    return make_searchable(model, source, [str(photos)], work, QUIET)


def test_pictures_and_each_caption_once(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, work = write_photos(tmp_path / "photos", 6), tmp_path / "demo"
    made = index(model, photos, work)
    assert (made.images, made.texts) == (6, 3)
    written = list((work / "index").rglob("*.lance"))
    with monkeypatch.context() as patch:
        patch.setattr(searchable, "write_index", None)
        assert index(model, photos, work) == made, "nothing has changed, and nothing is written"
    write_photos(photos, 8)
    with monkeypatch.context() as patch:
        patch.setattr("nev.search.fill.fill", interrupt)
        with pytest.raises(KeyboardInterrupt):
            index(model, photos, work)
    assert index(model, photos, work)[2:] == (8, 4), "an interrupted call does not leave the index of before"
    assert written != list((work / "index").rglob("*.lance"))


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "work"
    (theirs / "index").mkdir(parents=True)
    (theirs / "index" / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="was not made by nev demo"):
        open_folder(theirs, "/photos")
    open_folder(tmp_path / "demo", "/photos")
    open_folder(tmp_path / "demo", "/photos")
    with pytest.raises(ConfigError, match="is the demo of /photos"):
        open_folder(tmp_path / "demo", "/other/photos")


@pytest.mark.parametrize("folder", ["..", ".", "../here"])
def test_pictures_around_the_output_are_refused(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "index").mkdir()
    monkeypatch.chdir(here)
    done = CliRunner().invoke(app, ["demo", folder, "--model", "absent", "--port", "0"])
    assert done.exit_code == 2
    assert "would be taken for pictures" in done.stderr
    assert (here / "index").exists()
