"""GGUF files in the real llama.cpp: tokens, logits, adapters, k-quants. Run by `nox -s llama`."""

from __future__ import annotations

import errno
import json
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtgdm.errors import UserError
from mtgdm.export import disk, engines, parity, quantize
from mtgdm.export.gguf import QUANTS, convert
from mtgdm.export.lora_gguf import convert_adapter
from mtgdm.export.merge import merge
from mtgdm.rows import Row
from mtgdm.student import generation
from mtgdm.student.chat import Chat
from mtgdm.student.noise import quiet
from tests.families import FAMILIES, TEXT, make_checkpoint, make_family

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(
        find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: nox -s llama"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PIECES = [
    *"西湖龘𠮷𪚥㐀〇鿿あカ한ไทยعربىह，。《》 \t\n\u3000\u200b\ufeff\xa0éß²Ⅳ½—…％🎉",
    *("👩\u200d👩\u200d👧", "🇨🇳", "1\ufe0f\u20e3", "123", "0", "4567.89", "  ", "\n\n", "\r\n"),
    *("It's", "they'LL", "don’t", "Temple", "naïve", "a_b", '{"a": [1]}', "--", "...", "http://a.b/c?d=1"),
    *("<think>", "</think>"),
]


@dataclass(frozen=True)
class Student:
    """A family's base, a checkpoint over it, and both merged in float32."""

    base: Path
    checkpoint: Path
    merged: Path
    template: str


@pytest.fixture(scope="module", params=FAMILIES)
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = tmp_path_factory.mktemp(request.param)
    return made(make_family(folder / "base", request.param), folder)


def made(base: Path, folder: Path, **lora: Any) -> Student:
    from mtgdm.student.base import load_tokenizer

    checkpoint = make_checkpoint(folder / "checkpoint", base, **lora)
    with quiet():
        tokenizer = load_tokenizer(str(checkpoint), "checkpoint")
        merge(checkpoint, str(base), "base", Chat(tokenizer, "base"), "float32", folder / "merged")
    return Student(base, checkpoint, folder / "merged", str(tokenizer.chat_template))


def written(student: Student, out: Path, quant: str = "f32") -> Path:
    with quiet():
        return convert(student.merged, out, quant, name="guide", template=student.template).path


def llama(file: Path, **options: Any) -> Any:
    import llama_cpp

    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    with quantize.log():
        return llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, verbose=False, **(exact | options))


def texts(count: int) -> list[str]:
    """Random strings of pieces that tokenizers cut differently, in NFC."""
    source = random.Random(7)
    made = ["".join(source.choices(PIECES, k=source.randint(1, 12))) for _ in range(count)]
    return [unicodedata.normalize("NFC", one) for one in made]


def row(question: str, answer: str) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row("0" * 16, messages, {}, Path("rows.jsonl"), 1)


ROWS = [
    row("西湖在哪里？ It's 12345 🎉", "西湖在杭州市，始建于1089年。湖光山色，四季皆宜。"),
    row("When was the temple built?", "The temple was built in 1089 and rebuilt in 1736."),
]


def prove(student: Student, files: Sequence[Path]) -> list[parity.Proof]:
    with quiet():
        return parity.prove_all(
            files,
            student.checkpoint,
            ROWS,
            name="base",
            base=str(student.base),
            workspace=student.base.parent,
            merged=student.merged,
        )


def test_a_float32_file_answers_like_base_and_adapter(student: Student, tmp_path: Path) -> None:
    (proof,) = prove(student, [written(student, tmp_path / "f32.gguf")])
    assert proof.engine == "llama.cpp"
    assert proof.max_logit_difference is not None
    assert proof.max_logit_difference <= 1e-3
    assert (proof.tokens_equal, proof.greedy_equal, proof.top1_agreement) == (2, 2, 1.0)
    assert proof.failures("f32") == []


def test_logits_in_parts_are_those_of_the_whole_row(student: Student, tmp_path: Path) -> None:
    file = written(student, tmp_path / "f32.gguf")
    ids = [5 + place % 300 for place in range(2 * engines.POSITIONS_AT_ONCE + 7)]
    whole = llama(file)
    whole.eval(ids)
    with engines.opened(file, generation.load_chat(str(student.checkpoint), "base", tmp_path), 256) as (
        _,
        engine,
    ):
        parts = [part.copy() for part in engine.logits(ids)]
        again = [part.copy() for part in engine.logits(ids)]
        greedy = engine.greedy(ids, 4)
    assert [len(part) for part in parts] == [engines.POSITIONS_AT_ONCE, engines.POSITIONS_AT_ONCE, 7]
    assert abs(np.concatenate(parts) - whole.scores[: len(ids)]).max() < 1e-3
    assert (np.concatenate(parts) == np.concatenate(again)).all(), "a row does not see the one before"
    assert greedy[:1] == [whole.scores[len(ids) - 1].argmax()][: len(greedy)]


def test_300_strings_have_the_same_tokens(student: Student, tmp_path: Path) -> None:
    with quiet():
        from transformers import AutoTokenizer

        own = AutoTokenizer.from_pretrained(student.merged)
    theirs = llama(written(student, tmp_path / "f32.gguf"), vocab_only=True)
    differing = [
        text
        for text in [*texts(280), *PIECES[:20]]
        if theirs.tokenize(text.encode("utf-8"), add_bos=True, special=True) != own(text)["input_ids"]
    ]
    assert differing == []


@pytest.mark.parametrize("quant", QUANTS)
def test_every_type_loads_and_tells_its_kind(quant: str, student: Student, tmp_path: Path) -> None:
    file = written(student, tmp_path / f"{quant}.gguf", quant)
    kinds = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
    assert llama(file).metadata["general.file_type"] == str(kinds[quant])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_an_adapter_on_a_file_of_the_base_answers_like_the_merged_model(
    student: Student, tmp_path: Path
) -> None:
    config = json.loads((student.base / "config.json").read_text(encoding="utf-8"))
    with quiet():
        base = convert(
            student.base, tmp_path / "base.gguf", "f32", name="base", template=student.template
        ).path
    adapter = convert_adapter(student.checkpoint, config, tmp_path / "adapter.gguf", name="guide").path
    whole, parts, alone = (
        llama(written(student, tmp_path / "f32.gguf")),
        llama(base, lora_path=str(adapter)),
        llama(base),
    )
    ids = list(range(5, 60))
    for one in (whole, parts, alone):
        one.eval(ids)
    assert abs(whole.scores[: len(ids)] - parts.scores[: len(ids)]).max() < 1e-3
    assert abs(whole.scores[: len(ids)] - alone.scores[: len(ids)]).max() > 0.1, "the adapter does something"


def test_an_adapter_with_ranks_and_scales_of_its_own_for_some_layers_is_right(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llama3")
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3, "k_proj": 20}}
    student = made(base, tmp_path, use_rslora=True, **patterns)
    test_an_adapter_on_a_file_of_the_base_answers_like_the_merged_model(student, tmp_path)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "linear", "factor": 2.0},
    ],
    ids=["yarn", "linear"],
)
def test_a_stretched_rotation_is_computed_alike(rope: dict[str, Any], tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "qwen2-tied", rope={"rope_theta": 1e6, **rope})
    student = made(base, tmp_path)
    (proof,) = prove(student, [written(student, tmp_path / "f32.gguf")])
    assert proof.failures("f32") == []


def test_a_file_with_another_end_of_turn_stops_there(tmp_path: Path) -> None:
    """<|finis|> is a name that llama.cpp does not know for an end."""
    base = make_family(tmp_path / "base", "qwen2-tied")
    for path in base.iterdir():
        if path.suffix in (".json", ".jinja"):
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace("<|im_end|>", "<|finis|>"), encoding="utf-8", newline="\n")
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["eos_token"] = "<|endoftext|>"
    (base / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8", newline="\n")
    student = made(base, tmp_path)
    file = llama(written(student, tmp_path / "f32.gguf"))
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(file.model)
    (end,) = file.tokenize(b"<|finis|>", add_bos=False, special=True)
    assert llama_cpp.llama_vocab_is_eog(vocabulary, end)


def test_a_file_of_another_student_is_found_out(student: Student, tmp_path: Path) -> None:
    other = made(student.base, tmp_path / "other", seed=2)
    (proof,) = prove(other, [written(student, tmp_path / "f32.gguf")])
    assert any("mean KL" in failure for failure in proof.failures("q4_k_m", "bfloat16"))


def test_a_file_that_cannot_be_loaded_is_one_line(student: Student, tmp_path: Path) -> None:
    file = written(student, tmp_path / "f32.gguf")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"f32\.gguf: llama\.cpp cannot load this file"):
        prove(student, [file])


def test_a_file_that_cannot_be_quantized_says_why(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no GGUF at all")
    with pytest.raises(UserError, match="could not quantize to q4_k_m") as caught:
        quantize.quantize(tmp_path / "x.gguf", tmp_path / "y.gguf", "q4_k_m")
    assert "code" not in caught.value.message, "llama.cpp's own reason"
    assert not (tmp_path / "y.gguf").exists()


def test_a_disk_that_is_full_while_quantizing_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no GGUF at all")
    monkeypatch.setattr(disk, "free", lambda path: 4096)
    with pytest.raises(OSError, match=r"y\.gguf") as caught:
        quantize.quantize(tmp_path / "x.gguf", tmp_path / "y.gguf", "q4_k_m")
    assert caught.value.errno == errno.ENOSPC


def test_the_types_of_a_trained_model_are_within_their_limits(tmp_path: Path) -> None:
    base = trained_base(tmp_path / "base")
    student = made(base, tmp_path, init_lora_weights="gaussian", lora_alpha=1)
    files = [written(student, tmp_path / f"{quant}.gguf", quant) for quant in QUANTS]
    for quant, proof in zip(QUANTS, prove(student, files), strict=True):
        assert proof.failures(quant) == [], (quant, str(proof))
        assert proof.mean_kl is not None
        assert proof.mean_kl <= 1e-3 or quant.endswith(("k", "m"))


def trained_base(folder: Path, kind: str = "qwen2-tied") -> Path:
    """A base that has learned a page of text: quantizing says something about such a one alone."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.02}
    make_family(folder, kind, shape=shape)
    with quiet():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]])
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(60):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
    return folder
