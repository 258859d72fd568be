"""GGUF files in the real llama.cpp: tokens, logits, adapters, k-quants. Run by `nox -s llama`."""

from __future__ import annotations

import dataclasses
import errno
import json
import random
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtgdm.errors import UserError
from mtgdm.export import architectures, disk, engines, parity, quantize, rotary
from mtgdm.export.gguf import QUANTS, convert
from mtgdm.export.lora_gguf import convert_adapter
from mtgdm.export.merge import merge
from mtgdm.rows import Row
from mtgdm.student import generation
from mtgdm.student.chat import Chat
from mtgdm.student.noise import quiet
from tests.families import FAMILIES, KINDS, TEXT, WORDS, make_checkpoint, make_family, template_of

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


# One of each architecture and of each kind of tokenizer.
SOME = ("qwen2-tied", "llama3", "gemma3", "phi3")


@pytest.fixture(scope="module", params=SOME)
def some(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = tmp_path_factory.mktemp(request.param)
    return made(make_family(folder / request.param, request.param), folder)


@pytest.fixture(scope="module", params=FAMILIES)
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = tmp_path_factory.mktemp(request.param)
    return made(make_family(folder / request.param, request.param), folder)


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
        return llama_cpp.Llama(
            str(file), **({"n_ctx": 256, "logits_all": True, "verbose": False} | exact | options)
        )


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
    assert proof.max_logit_difference <= limit(student)
    assert (proof.tokens_equal, proof.greedy_equal, proof.top1_agreement) == (2, 2, 1.0)
    assert proof.failures("f16") == []


def limit(student: Student) -> float:
    """llama.cpp reads GELU, which Gemma has, from a table in float16; all else it computes in float32."""
    return 5e-3 if student.base.name == "gemma3" else 1e-3


@pytest.mark.parametrize(
    ("kind", "shape", "context", "length"),
    [
        ("gemma3", {}, 256, 200),
        ("phi3", {}, 256, 250),
        ("phi3", {}, 512, 300),
        ("phi4-mini", {}, 512, 300),
        ("mistral", {"sliding_window": 40}, 256, 40),
        ("phi4", {"sliding_window": 40}, 256, 40),
    ],
    ids=["gemma3-window", "phi3-short", "phi3-long", "phi4-mini-long", "mistral-window", "phi4-window"],
)
def test_long_texts_are_computed_alike(
    kind: str, shape: dict[str, Any], context: int, length: int, tmp_path: Path
) -> None:
    """Far beyond Gemma's window, with both of LongRoPE's factors, and as far as windows that llama.cpp has not."""
    model = make_family(tmp_path / kind, kind, shape=shape)
    with quiet():
        import torch
        from transformers import AutoModelForCausalLM

        file = convert(model, tmp_path / "f32.gguf", "f32", name="guide", template=template_of(model)).path
        own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        ids = [5 + place % 300 for place in range(length)]
        with torch.inference_mode():
            logits = own(torch.tensor([ids])).logits[0].numpy()
    theirs = llama(file, n_ctx=context)
    theirs.eval(ids)
    assert abs(theirs.scores[:length] - logits).max() < (5e-3 if kind == "gemma3" else 1e-3)


def test_a_space_behind_a_token_of_phi3_is_none(tmp_path: Path) -> None:
    """By the model's name, which gets phi-3 where it has none, and loses it where the tokenizer is another."""
    for kind, name, behind in (("phi3", "guide", []), ("llama3", "my-phi-3-guide", ["\n"])):
        model = make_family(tmp_path / kind, kind)
        with quiet():
            file = convert(
                model, tmp_path / f"{kind}.gguf", "f32", name=name, template=template_of(model)
            ).path
        theirs = llama(file, vocab_only=True)
        special = WORDS[KINDS[kind].words].special[-1].encode()
        ids = theirs.tokenize(special + b"\n", add_bos=False, special=True)
        assert [theirs.detokenize([one]).decode() for one in ids[1:]] == behind


def test_logits_in_parts_are_those_of_the_whole_row(
    some: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "READ_AT_ONCE", 40)
    monkeypatch.setattr(engines, "LOGITS_AT_ONCE", 30)
    file = written(some, tmp_path / "f32.gguf")
    ids = [5 + place % 300 for place in range(167)]
    whole = llama(file)
    whole.eval(ids)
    with engines.opened(file, generation.load_chat(str(some.checkpoint), "base", tmp_path), 256) as (
        _,
        engine,
    ):
        parts = [part.copy() for part in engine.logits(ids, 100)]
        again = [part.copy() for part in engine.logits(ids, 100)]
    assert [len(part) for part in parts] == [30, 30, 7]
    assert abs(np.concatenate(parts) - whole.scores[100 : len(ids)]).max() < 1e-3
    assert (np.concatenate(parts) == np.concatenate(again)).all(), "a row does not see the one before"


def test_300_strings_have_the_same_tokens(student: Student, tmp_path: Path) -> None:
    with quiet():
        from transformers import AutoTokenizer

        own = AutoTokenizer.from_pretrained(student.merged)
    theirs = llama(written(student, tmp_path / "f32.gguf"), vocab_only=True)
    words = WORDS[KINDS[student.base.name].words]
    # A space before the first text alone is none of a chat's, which begins with a special token.
    before = words.special[1] if words.space == "first" else ""
    # llama.cpp puts one token in front of a text at most.
    after = len(words.first) if len(words.first) > 1 else 0
    space = (
        "" if words.rstrip and words.space is None else " "
    )  # which no template may write there: see `problems`
    between = [f"{one}{space}{text}{one}{text}" for one in words.special for text in PIECES[::7]]
    differing = [
        text
        for text in (before + text for text in [*texts(280), *PIECES, *between])
        if theirs.tokenize(text.encode("utf-8"), add_bos=True, special=True) != own(text)["input_ids"][after:]
    ]
    assert differing == []


@pytest.mark.parametrize("quant", QUANTS)
def test_every_type_loads_and_tells_its_kind(quant: str, some: Student, tmp_path: Path) -> None:
    file = written(some, tmp_path / f"{quant}.gguf", quant)
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
    assert abs(whole.scores[: len(ids)] - parts.scores[: len(ids)]).max() < limit(student)
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


def test_a_file_of_another_student_is_found_out(some: Student, tmp_path: Path) -> None:
    other = made(some.base, tmp_path / "other", seed=2)
    (proof,) = prove(other, [written(some, tmp_path / "f32.gguf")])
    assert any("mean KL" in failure for failure in proof.failures("q4_k_m", "bfloat16"))


def test_a_file_without_the_factors_of_its_rotation_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = made(make_family(tmp_path / "base", "llama3"), tmp_path)
    monkeypatch.setattr(rotary, "tensors", lambda config: {})
    (proof,) = prove(student, [written(student, tmp_path / "f32.gguf")])
    assert any("mean KL" in failure for failure in proof.failures("q8_0", "bfloat16"))


def test_a_file_with_the_rows_of_q_and_k_in_the_wrong_order_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = made(make_family(tmp_path / "base", "llama3"), tmp_path)
    monkeypatch.setattr(architectures, "interleaved", lambda found, name: False)
    (proof,) = prove(student, [written(student, tmp_path / "f32.gguf")])
    assert any("mean KL" in failure for failure in proof.failures("q4_k_m", "bfloat16"))


def test_a_file_with_other_tokens_is_found_out(some: Student, tmp_path: Path) -> None:
    other = Path(shutil.copytree(some.merged, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    with quiet():
        from transformers import AutoTokenizer

        one, *_, two = AutoTokenizer.from_pretrained(other).tokenize("temple was built")
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    file = written(dataclasses.replace(some, merged=other), tmp_path / "f32.gguf")
    (proof,) = prove(some, [file])
    assert any("rows have other tokens" in failure for failure in proof.failures("q4_k_m", "bfloat16"))


def test_a_file_that_cannot_be_loaded_is_one_line(some: Student, tmp_path: Path) -> None:
    file = written(some, tmp_path / "f32.gguf")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"f32\.gguf: llama\.cpp cannot load this file"):
        prove(some, [file])


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
