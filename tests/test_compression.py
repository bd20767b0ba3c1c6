"""`offpath compress` and `offpath bench`."""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import offpath
from offpath.studies import RunError
from offpath.studies.compression.bench import BenchConfig, bench
from offpath.studies.compression.compress import CompressConfig, compress_checkpoint
from offpath.studies.compression.pretrained import Pretrained, open_pretrained
from offpath.studies.compression.quality import embed, embedding_quality
from offpath.studies.compression.tokens import read_lines, text_windows, token_ids
from offpath.studies.data import DataError, load_pairs
from offpath_cli import compression  # noqa: F401 (it adds its commands)
from offpath_cli.commands import app
from tiny_transformers import tiny_checkpoint

# One thread: tiny layers wait more for each other than they compute.
pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("bert", "gpt2", "llama")
SPARSITY = 0.9


def _unwatched(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny_checkpoint(kind, tmp_path_factory.mktemp("tiny") / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(load_pairs("python-docs").documents[:300]))
    return path


@pytest.fixture(scope="module", autouse=True)
def measured_briefly() -> Iterator[None]:
    """What is tested here does not depend on how well times are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("offpath.convert.compress.contest"), "BUDGET_SECONDS", 0.02)
        yield


@pytest.fixture(scope="module")
def compressed(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each checkpoint pruned by wanda and made sparse."""
    made = {}
    for kind, source in checkpoints.items():
        made[kind] = tmp_path_factory.mktemp("made") / kind
        config = CompressConfig(str(source), SPARSITY, "wanda", str(text), batch=2, tokens=16, quick=True)
        compress_checkpoint(config, made[kind], _unwatched)
    return made


# --- compress


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_folder_holds_the_pruned_model(
    checkpoints: dict[str, Path], compressed: dict[str, Path], kind: str
) -> None:
    folder = compressed[kind]
    assert {"config.json", "model.safetensors", "report.html", "report.json", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    report = json.loads((folder / "report.json").read_text())
    assert report["prune"]["sparsity"] == pytest.approx(SPARSITY, abs=0.02)
    assert report["bytes"]["file"] == (folder / "model.safetensors").stat().st_size
    model = offpath.load(folder)
    dense = open_pretrained(str(checkpoints[kind]))
    head = dense.model.get_output_embeddings() if dense.decoder else None
    assert type(model) is type(dense.model)
    offpath.densify(model)
    nonzero = total = 0
    for name, layer in dense.model.named_modules():
        if layer is not head and isinstance(getattr(layer, "weight", None), nn.Parameter) and layer.weight.ndim == 2:
            if isinstance(layer, nn.Embedding):
                continue
            own = model.get_submodule(name).weight
            if own.shape != layer.weight.shape:  # a Conv1D, which keeps its weight the other way, became a linear layer
                own = own.T
            nonzero, total = nonzero + int((own != 0).sum()), total + own.numel()
            kept = own != 0
            assert own.shape == layer.weight.shape and torch.equal(own[kept], layer.weight[kept])
    assert 1 - nonzero / total == pytest.approx(report["prune"]["sparsity"], abs=1e-4)
    if head is not None:
        assert torch.equal(model.get_output_embeddings().weight, head.weight)
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "<script" not in page and "src=" not in page


def test_checkpoint_that_is_mostly_zero_needs_no_pruning(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pruned = open_pretrained(str(checkpoints["llama"]))
    offpath.prune(pruned.model, SPARSITY, filter_fn=lambda _, name: "layers" in name)
    pruned.model.save_pretrained(tmp_path / "zeros")
    pruned.tokenizer.save_pretrained(tmp_path / "zeros")
    report = compress_checkpoint(CompressConfig(str(tmp_path / "zeros")), tmp_path / "out", _unwatched)
    assert report["prune"] is None and len(report["compress"]["layers"]) == 14


@pytest.mark.parametrize(
    ("stored", "options", "saved"),
    [
        (torch.bfloat16, [], torch.bfloat16),
        (torch.bfloat16, ["--dtype", "float32"], torch.float32),
        (torch.float16, [], torch.float32),
    ],
    ids=("kept", "asked for", "no kernel"),
)
def test_dtype_of_the_checkpoint_is_kept_where_a_kernel_computes_in_it(
    checkpoints: dict[str, Path], tmp_path: Path, stored: torch.dtype, options: list[str], saved: torch.dtype
) -> None:
    source, out = tmp_path / "stored", tmp_path / "out"
    shutil.copytree(checkpoints["llama"], source)
    dense = open_pretrained(str(source))
    dense.model.to(stored).save_pretrained(source)
    assert open_pretrained(str(source)).dtype == str(stored).removeprefix("torch.")
    made = CliRunner().invoke(app, ["compress", str(source), "--sparsity", "0.9", "--out", str(out), *options])
    assert made.exit_code == 0, made.output
    report = json.loads((out / "report.json").read_text())
    assert report["dtype"] == {k: str(v)[len("torch.") :] for k, v in (("checkpoint", stored), ("saved", saved))}
    assert report["bytes"]["checkpoint"] == 2 * sum(p.numel() for p in dense.model.parameters())
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(saved).removeprefix("torch.")
    assert "and not from_pretrained, which leaves the sparse layers random" in made.output.splitlines()[-1]
    model = offpath.load(out)
    assert {p.dtype for p in model.parameters()} == {saved}
    offpath.densify(model)
    weight, own = (m.model.layers[0].mlp.up_proj.weight for m in (model, dense.model))
    assert torch.equal(weight[weight != 0], own[weight != 0].to(saved))
    assert ("no kernel computes in the checkpoint's float16: saved in float32" in made.output) == (
        not options and stored != saved
    )


def test_int8_embeddings_where_asked_for(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config = CompressConfig(str(checkpoints["bert"]), SPARSITY, dtype="bfloat16", embeddings="int8")
    compress_checkpoint(config, tmp_path / "out", _unwatched)
    words = offpath.load(tmp_path / "out").get_submodule("embeddings.word_embeddings")
    dense = open_pretrained(str(checkpoints["bert"])).model.get_submodule("embeddings.word_embeddings").weight
    assert isinstance(words, offpath.nn.Int8Embedding)
    step = dense.abs().amax(1, keepdim=True) / 127
    # Half a step, and what bfloat16 had rounded before and rounds again: 2^-9 of an entry each.
    assert ((words(torch.arange(len(dense))) - dense).abs() <= step / 2 + 2**-7 * dense.abs() + 2**-8 * step).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": 1.0}, r"sparsity in \(0, 1\)"),
        ({"method": "magic"}, "expected method to be one of magnitude, random, wanda, sparsegpt"),
        ({"sparsity": 0.5, "method": "wanda"}, "expected --data"),
        ({"sparsity": 0.5, "data": "text"}, "leave it out"),
        ({"data": "text"}, "leave it out"),
        ({"dtype": "float16"}, "expected dtype to be one of float32, bfloat16"),
        ({"batch": 0}, "expected batch from 1 to"),
        ({"precision": "int4"}, "expected --precision int8 or none at all, got 'int4'"),
        ({"embeddings": "int4"}, "expected --embeddings int8"),
    ],
)
def test_contradictions_are_refused(options: dict, said: str) -> None:
    with pytest.raises(RunError, match=said):
        CompressConfig("somewhere", **options)


def test_models_that_read_few_tokens_are_pruned_timed_and_tested_on_as_many(text: Path, tmp_path: Path) -> None:
    short = tiny_checkpoint("bert", tmp_path / "short", max_position_embeddings=12)
    config = CompressConfig(str(short), SPARSITY, "wanda", str(text), quick=True)
    assert compress_checkpoint(config, tmp_path / "out", _unwatched)["example"] == [32, 12]
    with pytest.raises(RunError, match="at most the 12 tokens that the model reads, got 64; name fewer with --tokens"):
        bench(BenchConfig(str(tmp_path / "out")), tmp_path / "bench", _unwatched)
    config = BenchConfig(str(tmp_path / "out"), batch=2, tokens=12, seconds=0.01, tested=20)
    result = bench(config, tmp_path / "bench", _unwatched)
    assert result["points"] == {"latency": [1, 12], "throughput": [2, 12]}


def test_what_the_model_itself_raises_is_an_error_and_no_traceback(text: Path, tmp_path: Path) -> None:
    """Here its tokenizer knows words for which it has no embeddings."""
    poor = tiny_checkpoint("bert", tmp_path / "poor", vocab_size=10)
    with pytest.raises(RunError, match="index out of range"):
        compress_checkpoint(CompressConfig(str(poor), SPARSITY, "wanda", str(text)), tmp_path / "out", _unwatched)
    compress_checkpoint(CompressConfig(str(poor), SPARSITY), tmp_path / "out", _unwatched)
    with pytest.raises(RunError, match="index out of range"):
        bench(BenchConfig(str(tmp_path / "out")), tmp_path / "bench", _unwatched)


def test_int8_embeddings_that_are_tied_stay_and_the_command_says_so(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    llama = open_pretrained(str(checkpoints["llama"]))
    llama.model.config.tie_word_embeddings = True
    llama.model.tie_weights()
    llama.model.save_pretrained(tmp_path / "tied")
    llama.tokenizer.save_pretrained(tmp_path / "tied")
    options = ["--sparsity", "0.9", "--embeddings", "int8", "--out", str(tmp_path / "out")]
    made = CliRunner().invoke(app, ["compress", str(tmp_path / "tied"), *options])
    assert made.exit_code == 0, made.output
    assert "no embedding became int8: the report says why" in made.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "model.embed_tokens" in page and "tied to another module" in page


def test_refusals_leave_nothing_behind(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    bert, out = str(checkpoints["bert"]), tmp_path / "out"
    cases = [
        (CompressConfig(bert, 0.5, "sparsegpt", str(text), "output"), "expected no scope"),
        (CompressConfig(bert, 0.5, tokens=1000), "at most the 128 tokens"),
        (CompressConfig(bert, 0.5, "wanda", str(tmp_path / "missing")), "name a file of plain text"),
        (CompressConfig(str(tmp_path / "missing"), 0.5), "expected the folder of a checkpoint"),
    ]
    for config, said in cases:
        with pytest.raises((RunError, DataError), match=said):
            compress_checkpoint(config, out, _unwatched)
        assert not list(tmp_path.iterdir())

    def meanwhile(what: str, done: int, total: int) -> None:
        """Another process begins in the same folder, and is faster."""
        if what == "saving":
            out.mkdir()
            (out / "mine").touch()

    with pytest.raises(RunError, match="another process wrote there meanwhile"):
        compress_checkpoint(CompressConfig(bert, 0.5), out, meanwhile)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(RunError, match="expected a new or empty folder"):
        compress_checkpoint(CompressConfig(bert, 0.5), out, _unwatched)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_full_disk_names_the_folder_that_was_asked_for(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the same calls fail, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "out"

    def full(what: str, done: int, total: int) -> None:
        if what == "saving":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))

    try:
        with pytest.raises(RunError, match="free space or choose another") as refused:
            compress_checkpoint(CompressConfig(str(checkpoints["bert"]), 0.5), out, full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(refused.value).startswith(f"expected to write {out / 'model.safetensors'}, got: ")
    assert str(refused.value).count(";") == 1
    assert ".out." not in str(refused.value) and not list(tmp_path.iterdir())
    with pytest.raises(RunError, match="expected to write /proc/self/out, got") as refused:  # not even root may
        compress_checkpoint(CompressConfig(str(checkpoints["bert"]), 0.5), Path("/proc/self/out"), _unwatched)
    assert ".out." not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "magnitude"], "no --method without --sparsity"),
        (["--scope", "layer"], "no --scope without --sparsity"),
        (["--distribution", "erk"], "no --distribution without --sparsity"),
        (["--seed", "0"], "no --seed without --sparsity"),
        (["--quick"], "no --quick without --data"),
        (["--sparsity", "0.9", "--seed", "3"], "no --seed with --method magnitude"),
        (["--sparsity", "0.9", "--method", "random", "--quick"], "no --quick without --data"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path, options: list[str], said: str
) -> None:
    refused = CliRunner().invoke(app, ["compress", str(checkpoints["bert"]), *options, "--out", str(tmp_path / "out")])
    assert refused.exit_code == 1 and f"expected {said}, which would change nothing" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_nothing_behind(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def impatient(what: str, done: int, total: int) -> None:
        if what == "making layers sparse":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(CompressConfig(str(checkpoints["bert"]), 0.9), tmp_path / "out", impatient)
    assert not list(tmp_path.iterdir())


# --- bench


def test_bench_of_an_encoder_agrees_with_what_is_recomputed(compressed: dict[str, Path], tmp_path: Path) -> None:
    config = BenchConfig(str(compressed["bert"]), batch=2, tokens=16, seconds=0.1, tested=40)
    result = bench(config, tmp_path / "bench", _unwatched)
    assert json.loads((tmp_path / "bench" / "bench.json").read_text()) == result
    dense, half, sparse = result["versions"].values()
    assert dense["accuracy"]["rank_correlation"] == pytest.approx(1, abs=1e-6)
    assert half["file_bytes"] * 2 == dense["file_bytes"]
    assert sparse["file_bytes"] == (compressed["bert"] / "model.safetensors").stat().st_size
    assert all(v[f"{p}_seconds"]["median"] > 0 for v in (dense, half, sparse) for p in ("latency", "throughput"))
    source = open_pretrained(json.loads((compressed["bert"] / "report.json").read_text())["source"])
    pairs = load_pairs("python-docs")
    places = torch.randperm(len(pairs.queries), generator=torch.Generator().manual_seed(0))[:40].tolist()
    ids = [token_ids(source, [texts[place] for place in places]) for texts in (pairs.queries, pairs.documents)]
    made = Pretrained(offpath.load(compressed["bert"]), source.tokenizer, False, Path())
    quality = embedding_quality(embed(made, ids[0]), embed(made, ids[1]), embed(source, ids[1]))
    assert sparse["accuracy"]["rank_correlation"] == pytest.approx(quality.rank_correlation, abs=1e-4)  # five digits
    assert sparse["accuracy"]["retrieval"] == pytest.approx(quality.retrieval, abs=1e-5)


def test_bench_of_a_decoder_agrees_with_what_is_recomputed(
    compressed: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    folder = compressed["gpt2"]
    with pytest.raises(RunError, match="expected --data, a text file that a decoder is to predict"):
        bench(BenchConfig(str(folder)), tmp_path / "bench", _unwatched)
    config = BenchConfig(str(folder), data=str(text), batch=2, tokens=16, seconds=0.1, tested=3)
    found = bench(config, tmp_path / "bench", _unwatched)["versions"]["as saved"]["accuracy"]["perplexity"]
    model = offpath.load(folder)
    windows = text_windows(
        open_pretrained(json.loads((folder / "report.json").read_text())["source"]), read_lines(text)
    )
    with torch.no_grad():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows[:3]]
    assert found == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)


def test_bench_refuses_what_does_not_fit(
    compressed: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("batch", "tokens"):
        with pytest.raises(RunError, match=f"expected --{name} from 1 to 1048576, got 0"):
            BenchConfig(str(compressed["bert"]), **{name: 0})
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:  # before anything is measured
        patch.setattr("offpath.studies.compression.bench.embed", None)
        with pytest.raises(RunError, match="expected a writable folder"):
            bench(BenchConfig(str(compressed["bert"])), tmp_path / "file", _unwatched)
    with pytest.raises(RunError, match=r"expected a folder that `offpath compress` made"):
        bench(BenchConfig(str(checkpoints["bert"])), tmp_path / "bench", _unwatched)
    with pytest.raises(RunError, match="expected a dense BertModel"):
        bench(BenchConfig(str(compressed["bert"]), str(checkpoints["llama"])), tmp_path / "bench", _unwatched)
    with pytest.raises(RunError, match="name it with --dense"):
        bench(BenchConfig(str(compressed["bert"]), str(tmp_path / "gone")), tmp_path / "bench", _unwatched)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "report.json").write_text("{")
    with pytest.raises(RunError, match="compress the checkpoint again"):
        bench(BenchConfig(str(tmp_path / "damaged")), tmp_path / "bench", _unwatched)
    assert not (tmp_path / "bench").exists()


# --- as a user types them


def test_the_commands(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("offpath.studies.compression.bench"), "QUICK_SECONDS", 0.1)
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "out"
    options = ["--sparsity", "0.9", "--method", "wanda", "--data", str(text), "--quick", "--out", str(out)]
    made = CliRunner().invoke(app, ["compress", str(checkpoints["bert"]), *options])
    assert made.exit_code == 0, made.output
    assert "before / after" in made.output and f"offpath bench {out}" in made.output
    benched = CliRunner().invoke(app, ["bench", str(out), "--quick"])
    assert benched.exit_code == 0, benched.output
    assert "dense, bfloat16" in benched.output
    assert max(map(len, benched.output.splitlines()[-12:-2])) < 80, benched.output
    assert (out / "bench" / "report.html").is_file()
    idle = CliRunner().invoke(app, ["compress", str(checkpoints["bert"]), "--out", str(tmp_path / "idle")])
    assert idle.exit_code == 0 and "name the share that is to become zero with --sparsity" in idle.output
    again = CliRunner().invoke(app, ["compress", str(checkpoints["bert"]), *options])
    assert again.exit_code == 1 and again.stderr.count("\n") == 1 and "new or empty folder" in again.stderr
