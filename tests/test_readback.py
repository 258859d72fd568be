"""A GGUF read back: what is whole passes in every type, and what is damaged is named, however little it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mtgdm.errors import UserError
from mtgdm.export.gguf import convert
from mtgdm.export.readback import LIMITS, ReadBack, check
from mtgdm.student.noise import quiet
from tests.families import CHATML, FAMILIES, make_family, template_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

HERE = ("f32", "f16", "bf16", "q8_0")
BY_LLAMA_CPP = [
    pytest.param(
        quant,
        marks=[pytest.mark.llama, pytest.mark.skipif(find_spec("llama_cpp") is None, reason="nox -s llama")],
    )
    for quant in ("q4_k_m", "q5_k_m", "q6_k")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in FAMILIES:
        make_family(folder / kind, kind)
    return folder


def about(model: Path) -> dict[str, Any]:
    return {"name": "guide", "template": template_of(model)}


def written(model: Path, folder: Path, quant: str) -> Path:
    with quiet():
        return convert(model, folder / f"{quant}.gguf", quant, **about(model)).path


def read_back(file: Path, model: Path, quant: str, **options: Any) -> ReadBack:
    with quiet():
        return check(file, model, quant, **{**about(model), **options})


@contextmanager
def changed(file: Path, tensor: str) -> Iterator[Any]:
    """The data of a tensor, to be written over."""
    reader = gguf.GGUFReader(file, "r+")
    yield next(one for one in reader.tensors if one.name == tensor).data
    reader.data.flush()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("quant", [*HERE, *BY_LLAMA_CPP])
def test_a_whole_file_is_its_model_in_every_type(quant: str, kind: str, models: Path, tmp_path: Path) -> None:
    done: list[int] = []
    found = read_back(written(models / kind, tmp_path, quant), models / kind, quant, advance=done.append)
    assert found.tensors == len(gguf.GGUFReader(tmp_path / f"{quant}.gguf").tensors)
    assert sum(done) == sum(4 * one.numel() for one in weights(models / kind).values())
    if quant in ("f32", "f16", "bf16"):
        assert (found.equal, found.largest_error) == (found.tensors, None)
    else:
        assert found.largest_error is not None
        assert 0 < found.largest_error < max(LIMITS.values())
        assert "within" in str(found)


def weights(model: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_a_single_wrong_row_of_the_embeddings_is_found(quant: str, models: Path, tmp_path: Path) -> None:
    file = written(models / "qwen2-untied", tmp_path, quant)
    with changed(file, "token_embd.weight") as data:
        data[17] = data[18]
    with pytest.raises(
        UserError, match=r"gguf: what was written is .* token_embd\.weight has 1 rows that differ"
    ):
        read_back(file, models / "qwen2-untied", quant)


@pytest.mark.parametrize(
    ("tensor", "rows"),
    [("blk.0.ffn_up.weight", slice(0, 8)), ("blk.1.attn_k.bias", slice(None)), ("output_norm.weight", 3)],
)
def test_what_was_zeroed_is_found(tensor: str, rows: Any, models: Path, tmp_path: Path) -> None:
    file = written(models / "qwen2-tied", tmp_path, "q8_0")
    with changed(file, tensor) as data:
        data[rows] = 0
    with pytest.raises(UserError, match=rf"{tensor} has \d+ rows that differ"):
        read_back(file, models / "qwen2-tied", "q8_0")


def test_scales_that_are_all_a_little_off_are_found(models: Path, tmp_path: Path) -> None:
    file = written(models / "qwen3", tmp_path, "q8_0")
    with changed(file, "blk.0.attn_q.weight") as data:
        scales = data.reshape(-1, 34)[:, :2].copy().view(np.float16)
        data.reshape(-1, 34)[:, :2] = (scales * np.float16(1.03)).view(np.uint8)
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight differs by 3\.\d% \(limit 2%\)"):
        read_back(file, models / "qwen3", "q8_0")


def test_a_number_that_is_none_is_found(models: Path, tmp_path: Path) -> None:
    file = written(models / "qwen3", tmp_path, "q8_0")
    with changed(file, "blk.0.attn_q.weight") as data:
        data[5, :2] = np.frombuffer(np.float16("nan").tobytes(), np.uint8)
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight has 1 rows"):
        read_back(file, models / "qwen3", "q8_0")


def test_rows_of_llama_in_the_order_of_transformers_are_found(models: Path, tmp_path: Path) -> None:
    file = written(models / "llama3", tmp_path, "f32")
    with changed(file, "blk.0.attn_q.weight") as data:
        data[:] = weights(models / "llama3")["model.layers.0.self_attn.q_proj.weight"].numpy()
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight has \d+ rows that differ"):
        read_back(file, models / "llama3", "f32")


def test_rows_of_nearly_nothing_are_no_damage(tmp_path: Path) -> None:
    """Rows of tokens that were never trained: a scale in float16 cannot hold them, and nobody misses them."""
    model = make_family(tmp_path / "qwen2-tied", "qwen2-tied")
    rewrite(model, lambda tensors: tensors["model.embed_tokens.weight"][-5:].mul_(1e-9))
    assert read_back(written(model, tmp_path, "q8_0"), model, "q8_0").tensors


def rewrite(model: Path, change: Any) -> None:
    from safetensors.torch import save_file

    tensors = weights(model)
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_a_key_of_another_value_is_found(models: Path, tmp_path: Path) -> None:
    model = make_family(tmp_path / "qwen2-tied", "qwen2-tied")
    file = written(model, tmp_path, "f16")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"]["rope_theta"] = 5e5
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"qwen2\.rope\.freq_base is another than was meant"):
        read_back(file, model, "f16")
    with pytest.raises(UserError, match=r"tokenizer\.chat_template is another than was meant"):
        read_back(file, models / "qwen2-tied", "f16", template=CHATML + "{# as edited #}")


def test_a_file_that_was_cut_is_one_line(models: Path, tmp_path: Path) -> None:
    file = written(models / "qwen3", tmp_path, "f16")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"f16\.gguf: this file cannot be read back"):
        read_back(file, models / "qwen3", "f16")
