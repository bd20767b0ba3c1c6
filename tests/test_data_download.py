"""Downloading a data set: from a server on this machine that answers, breaks off, or sends something else."""

from __future__ import annotations

import gzip
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_files import names_below, tiny_files, write_files
from offpath.studies.data import DATASETS, DataError, IdxSpec, download, load
from offpath.studies.data.locate import cache_dir
from offpath.studies.data.spec import TEST_LABELS, TRAIN_IMAGES

WAIT_SECONDS = 30


@dataclass
class Home:
    """A loopback HTTP server: `answers` by path.

    Half-way through the paths in `truncated` the connection closes; half-way through those in
    `interrupting` this process gets the signal of Ctrl-C.
    """

    url: str = ""
    answers: dict[str, bytes] = field(default_factory=dict)
    truncated: set[str] = field(default_factory=set)
    interrupting: set[str] = field(default_factory=set)
    requested: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tiny: IdxSpec) -> Iterator[Home]:
    home = Home(answers={f"/{name}.gz": gzip.compress(body) for name, body in tiny_files().items()})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            home.requested.append(self.path)
            if self.path not in home.answers:
                self.send_error(404)
                return
            body = home.answers[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.path in home.truncated | home.interrupting:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                if self.path in home.interrupting:
                    os.kill(os.getpid(), signal.SIGINT)
                    home.released.wait(WAIT_SECONDS)
                return
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    home.url = f"http://127.0.0.1:{server.server_address[1]}/"
    monkeypatch.setitem(DATASETS, "tiny", replace(tiny, home_url=home.url))
    yield home
    home.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


ALL_GZ = sorted(f"tiny/{name}.gz" for name in tiny_files())


def test_download_fills_the_cache_once(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    folder = download("tiny", progress=True)
    assert folder == cache_dir() / "tiny"
    assert names_below(cache_dir()) == ["tiny", *ALL_GZ]
    assert sorted(home.requested) == sorted(home.answers)
    assert capsys.readouterr().err.count(f"downloading {home.url}") == 4
    assert load("tiny").source == str(folder)

    download("tiny")
    assert len(home.requested) == 4


@pytest.mark.usefixtures("home")
def test_download_to_a_given_folder_is_found_there(tmp_path: Path) -> None:
    folder = download("tiny", tmp_path / "mine")
    assert folder == tmp_path / "mine" / "tiny"
    assert load("tiny", tmp_path / "mine").source == str(folder)
    assert not cache_dir().exists()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_download_mends_a_corrupt_file(suffix: str) -> None:
    folder = write_files(cache_dir() / "tiny", tiny_files() | {f"{TEST_LABELS}{suffix}": b"corrupt"})
    with pytest.raises(DataError, match="SHA-256"):
        load("tiny")
    download("tiny")
    assert load("tiny").source == str(folder)


@pytest.mark.parametrize(
    "body",
    [b"<html>sign in</html>", gzip.compress(b"other", mtime=0), gzip.compress(b"x" * 99, mtime=0)[:-9]],
    ids=["page", "other", "cut"],
)
def test_corrupt_answer_leaves_nothing_behind(home: Home, body: bytes) -> None:
    home.answers[f"/{TEST_LABELS}.gz"] = body
    with pytest.raises(DataError, match=re.escape(f"{home.url}{TEST_LABELS}.gz")):
        download("tiny")
    assert names_below(cache_dir()) == []


def test_failed_download_keeps_the_intact_files(home: Home) -> None:
    folder = write_files(cache_dir() / "tiny", {TRAIN_IMAGES: tiny_files()[TRAIN_IMAGES]})
    del home.answers[f"/{TEST_LABELS}.gz"]
    with pytest.raises(DataError, match=re.escape(f"download from {home.url}{TEST_LABELS}.gz; got 404")):
        download("tiny")
    assert names_below(folder.parent) == ["tiny", f"tiny/{TRAIN_IMAGES}"]


def test_connection_closed_half_way_leaves_nothing_behind(home: Home) -> None:
    home.truncated.add(f"/{TEST_LABELS}.gz")
    with pytest.raises(DataError, match=re.escape(f"download from {home.url}{TEST_LABELS}.gz")):
        download("tiny")
    assert names_below(cache_dir()) == []


def test_interrupt_half_way_leaves_nothing_behind(home: Home) -> None:
    home.interrupting.add(f"/{TEST_LABELS}.gz")
    with pytest.raises(KeyboardInterrupt):
        download("tiny")
    home.released.set()
    assert len(home.requested) == 4
    assert names_below(cache_dir()) == []


@pytest.mark.usefixtures("tiny")
def test_unreachable_home_is_reported() -> None:
    with pytest.raises(DataError, match=r"download from http://127\.0\.0\.1:9/.*`offpath data tiny`"):
        download("tiny")


@pytest.mark.usefixtures("home")
def test_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"to write .*file.*next step: name a writable folder"):
        download("tiny", tmp_path / "file")


def test_wheel_set_is_not_downloaded() -> None:
    with pytest.raises(DataError, match="comes inside the Python package scikit-learn"):
        download("digits")
