"""`offpath study minilm` on a transformer of a few thousand weights: whole, stopped and gone on with, recomputed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

import offpath
from commands import run_offpath
from offpath.studies import RunError
from offpath.studies.compression.config import QUICK, StudyConfig
from offpath.studies.compression.pretrained import Pretrained, open_pretrained
from offpath.studies.compression.quality import embed, embedding_quality
from offpath.studies.compression.report import write_report
from offpath.studies.compression.result import StudyResult
from offpath.studies.compression.study import study
from offpath.studies.compression.tables import docs_block, tables
from offpath.studies.compression.texts import shuffled_batches, study_texts
from offpath.studies.compression.tokens import token_ids
from tiny_transformers import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def _unwatched(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    model = tiny_checkpoint("bert", tmp_path_factory.mktemp("tiny") / "bert")
    sizes = {"test_pairs": 40, "other_pairs": 10, "calibration_texts": 64, "train_texts": 200}
    return replace(QUICK, model=str(model), points=((1, 8), (2, 16)), seconds=0.05, **sizes)


@pytest.fixture(scope="module", autouse=True)
def measured_briefly() -> Iterator[None]:
    """What is tested here does not depend on how well times are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("offpath.convert.compress.contest"), "BUDGET_SECONDS", 0.02)
        yield


@pytest.fixture(scope="module")
def finished(config: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("study") / "whole"
    result = study(config, out, None, _unwatched)
    torch.set_num_threads(threads)
    return out, result


def _arms(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (out / "arms").glob("*.json")}


def test_study_is_whole(finished: tuple[Path, StudyResult], config: StudyConfig) -> None:
    out, result = finished
    assert result.complete and result.config == config
    assert [(arm.method, arm.sparsity) for arm in result.arms] == config.arms()
    assert len(result.versions) == 2 * (1 + len(config.sparsities)) and set(result.times) == {"1x8", "2x16"}
    assert StudyResult.from_json(json.loads((out / "minilm.json").read_text())) == result
    assert result.arm("dense", 0.0).tests["python-docs"].rank_correlation == pytest.approx(1, abs=1e-5)
    write_report(result, out)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 and "<script" not in page and "src=" not in page and "Incomplete" not in page
    for text in ("90% GMP, distilled", "50% Wanda", "90% sparse, bf16", "over fp32"):
        assert text in page and text in docs_block(result)


def test_numbers_are_those_that_are_recomputed(finished: tuple[Path, StudyResult], config: StudyConfig) -> None:
    out, result = finished
    pairs = study_texts(config, None).tests["python-docs"]
    dense = open_pretrained(config.model)
    ids = [token_ids(dense, texts) for texts in (pairs.queries, pairs.documents)]
    models = {
        "gmp": offpath.load(out / "arms" / "gmp-0.9.safetensors"),
        "bfloat16": offpath.load(out / "versions" / "sparse-0.9-bfloat16.safetensors"),
    }
    found = {"gmp": result.arm("gmp", 0.9), "bfloat16": result.versions[-1]}
    for name, model in models.items():
        own = Pretrained(model, dense.tokenizer, False, Path())
        quality = embedding_quality(embed(own, ids[0]), embed(own, ids[1]), embed(dense, ids[1]))
        test = found[name].tests["python-docs"]
        assert test.rank_correlation == pytest.approx(quality.rank_correlation, abs=1e-4)  # five digits are kept
        assert test.retrieval == pytest.approx(quality.retrieval, abs=1e-5)
    layers = [m for m in models["gmp"].modules() if isinstance(m, offpath.SparseLinear)]
    assert len(layers) == 12 and all(m.nnz == round(0.1 * m.in_features * m.out_features) for m in layers)
    last = result.versions[-1]
    assert (last.sparsity, last.dtype) == (0.9, "bfloat16")
    assert last.file_bytes == (out / "versions" / "sparse-0.9-bfloat16.safetensors").stat().st_size
    times = result.times["2x16"]
    assert result.speedup("2x16", last, "float32") == times["dense-float32"] / times[last.name]


@pytest.mark.parametrize(
    ("phase", "missing"),
    [
        ("training: GMP to 90%", "arms/gmp-0.9*"),
        ("testing gmp 90%", "arms/gmp-0.9*"),
        ("testing wanda 90%", "arms/wanda-0.9*"),
        ("making the finished versions", "versions/*"),
    ],
)
def test_study_that_was_stopped_goes_on_to_the_same_numbers(
    finished: tuple[Path, StudyResult], config: StudyConfig, tmp_path: Path, phase: str, missing: str
) -> None:
    whole, out = finished[0], tmp_path / "stopped"
    shutil.copytree(whole, out)
    for path in out.glob(missing):
        path.unlink()
    stopped = study(config, out, None, _impatient(phase))
    assert len(list(out.glob(missing))) < len(list(whole.glob(missing)))
    assert not stopped.complete
    write_report(stopped, out)
    assert "Incomplete" in (out / "report.html").read_text()
    assert study(config, out, None, _unwatched).complete
    assert _arms(out) == _arms(whole)


def _impatient(phase: str) -> Callable[[str, int, int], None]:
    def watch(what: str, done: int, total: int) -> None:
        if what == phase and done >= total // 2:
            signal.raise_signal(signal.SIGINT)

    return watch


def test_folder_of_another_study_is_refused(finished: tuple[Path, StudyResult], config: StudyConfig) -> None:
    with pytest.raises(RunError, match="another was started there"):
        study(replace(config, seed=1), finished[0], None, _unwatched)


def test_pairs_that_would_not_be_read_are_refused(config: StudyConfig) -> None:
    with pytest.raises(RunError, match="expected no --data for python-docs, which is always there"):
        study_texts(replace(config, pairs="python-docs"), Path("pairs.txt"))


def test_training_lowers_the_loss(config: StudyConfig) -> None:
    """Beside the same pruning of weights that are not trained."""
    from offpath.studies.compression.distill import Distillation, is_trained

    losses = []
    for learning_rate in (0.0, config.learning_rate):
        dense, student = open_pretrained(config.model), open_pretrained(config.model)
        offpath.sparsify(student.model, 0, method="magnitude", filter_fn=lambda _, name: is_trained(name))
        ids = token_ids(dense, study_texts(config, None).train[:64])
        longer = replace(config, sparsities=(0.8,), steps=(60,), batch_size=64, learning_rate=learning_rate)
        run = Distillation(longer, 0, student, ids, embed(dense, ids))
        embeddings = student.model.get_submodule("embeddings.word_embeddings").weight.clone()
        run.advance(run.total_steps - 1)
        before = run.meter.loss_sum
        run.advance()
        losses.append(run.meter.loss_sum - before)
        assert torch.equal(student.model.get_submodule("embeddings.word_embeddings").weight, embeddings)
    pruned, trained = losses
    assert trained < pruned / 2


def test_every_text_comes_once_before_any_again() -> None:
    ids = [[1] * (1 + n % 5) for n in range(50)]
    batches = shuffled_batches(ids, 8, seed=0)
    first = [place for _ in range(7) for place in next(batches)]
    assert sorted(first) == list(range(50))
    again = [place for _ in range(7) for place in next(batches)]
    assert sorted(again) == sorted(first) and again != first


def test_tests_and_training_have_no_text_in_common(config: StudyConfig) -> None:
    texts = study_texts(config, None)
    tested = {text for pairs in texts.tests.values() for text in (*pairs.queries, *pairs.documents)}
    assert len(texts.train) == config.train_texts and not tested & set(texts.train)


def test_what_cannot_be_run_is_refused(config: StudyConfig, tmp_path: Path) -> None:
    for change, said in (
        ({"pairs": "proverbs"}, "expected pairs of wordnet, python-docs"),
        ({"sparsities": (0.9, 0.5)}, "expected growing sparsities"),
        ({"steps": (1,)}, "for each of 2 sparsities"),
    ):
        with pytest.raises(RunError, match=said):
            replace(config, **change)
    with pytest.raises(RunError, match="other texts in python-docs"):
        study(replace(config, train_texts=10**6), tmp_path / "out", None, _unwatched)
    with pytest.raises(RunError, match="expected the folder of a checkpoint"):
        study(replace(config, model="nowhere"), tmp_path / "out", None, _unwatched)
    assert not (tmp_path / "out").exists()


def test_command_says_what_brings_the_text(tmp_path: Path) -> None:
    finished = run_offpath("study", "minilm", "--data", tmp_path, "--out", tmp_path / "out")
    assert finished.exit_code == 1 and "apt-get install wordnet-base" in finished.stderr
    assert finished.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_tables_of_nothing_are_none(config: StudyConfig) -> None:
    assert tables(StudyResult(config, (), (), {}, None, {"python-docs": "here"})) == []
