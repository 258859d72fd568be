from __future__ import annotations

import random
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtgdm.errors import BadRow
from mtgdm.shipped import shipped
from mtgdm.student import tiny, warmup
from mtgdm.tourism.domain import Tourism

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = [
    "名称：布达拉宫\n英文名：Potala Palace (Lhasa)\n坐标：29.658,91.117\n5A评定：2013年",
    '{"name":"甲·乙-丙（丁）","history":["始建于631年。","“白宫”与“红宫”！"],"tickets_hours":[],"lat":29.658,"x":null}',
    "  two  spaces\n\n\ttab 'quoted' it's — … 《书》 ￥120 ½ é 峇龘棣㙍 🀄",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.build_tokenizer()


@pytest.fixture(scope="module")
def sample_texts() -> list[str]:
    domain = Tourism()
    texts = []

    def refuse(bad: BadRow) -> None:
        raise bad

    for record in domain.read(shipped("data/sample/spots.jsonl"), refuse):
        for prompt in domain.prompts(record):
            texts += [message["content"] for message in prompt.messages]
            texts.append(domain.answer(record.facts, prompt.type))
    return texts


def is_chinese(character: str) -> bool:
    return "\u4e00" <= character <= "\u9fff"


def test_tokens_are_the_same_after_saving_and_loading(
    tokenizer: PreTrainedTokenizerFast, sample_texts: list[str], tmp_path: Path
) -> None:
    tiny.build_model(len(tokenizer), hidden=32, layers=1, heads=1, feed_forward=32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in [*TEXTS, *sample_texts]:
        ids = tokenizer(text).input_ids
        assert loaded(text).input_ids == ids
        assert again(text).input_ids == ids


def test_decoding_gives_the_text_back(tokenizer: PreTrainedTokenizerFast, sample_texts: list[str]) -> None:
    for text in [*TEXTS, *sample_texts]:
        assert tokenizer.decode(tokenizer(text).input_ids) == unicodedata.normalize("NFC", text)


def test_no_token_holds_a_chinese_character_and_something_else(tokenizer: PreTrainedTokenizerFast) -> None:
    for number in range(len(tokenizer)):
        text = tokenizer.decode([number])
        if any(is_chinese(character) for character in text):
            assert len(text) == 1


def test_a_copied_text_has_the_same_tokens_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    write = warmup.Writer(rng, tiny.common_characters(), ["town", "Lake"], entangled=2)
    for _ in range(200):
        text = rng.choice([write.title(), write.sentence(), write.english()])
        ids = tokenizer(text).input_ids
        for before, after in (
            ("名称：", "\n"),
            ('{"名称":"', '","'),
            ('":["', '"],"'),
            ('"},{"a":"', '"}]}'),
            ("是", "。"),
        ):
            whole = tokenizer(before + text + after).input_ids
            start = len(tokenizer(before).input_ids)
            assert whole[start : start + len(ids)] == ids, (before, text)


def test_a_rare_character_is_two_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    common = set(tiny.common_characters())
    rare = [chr(code) for code in range(0x4E00, 0xA000) if chr(code) not in common]
    assert {len(tokenizer(character).input_ids) for character in rare} == {2}
    assert {len(tokenizer(character).input_ids) for character in common} == {1}


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("2007").input_ids) == 4


def test_the_chat_template_adds_no_system_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "好"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n好<|im_end|>\n<|im_start|>assistant\n"


def test_the_shipped_base_is_small_and_generates() -> None:
    assert (tiny.TINY_BASE / "model.safetensors").stat().st_size < 5 * 2**20
    model: Any = AutoModelForCausalLM.from_pretrained(
        tiny.TINY_BASE, dtype=torch.float32, local_files_only=True
    )
    loaded = AutoTokenizer.from_pretrained(tiny.TINY_BASE, local_files_only=True)
    assert model.config.model_type == "qwen2"
    assert model.config.max_position_embeddings == tiny.MAX_POSITIONS
    messages = [{"role": "user", "content": "资料：\n颜色：棣蓝旧窗\n型号：K29\n任务：输出JSON。color,model"}]
    prompt: Any = loaded.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    assert loaded.decode(answer, skip_special_tokens=True) == '{"color":"棣蓝旧窗","model":"K29"}'


def test_the_shipped_tokenizer_is_the_one_that_is_built(tokenizer: PreTrainedTokenizerFast) -> None:
    loaded = AutoTokenizer.from_pretrained(tiny.TINY_BASE, local_files_only=True)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token, loaded.pad_token) == (tiny.TURN_END, tiny.END_OF_TEXT)


def test_the_warm_up_has_every_token_of_the_sample(
    tokenizer: PreTrainedTokenizerFast, sample_texts: list[str]
) -> None:
    # A token that is never trained drifts to where all such tokens are, and no adapter can tell them apart.
    needed = {number for text in sample_texts for number in tokenizer(text).input_ids}
    rows = warmup.Corpus(tokenizer.backend_tokenizer, seed=0).rows(lambda: 1000)
    for _ in range(8000):
        needed -= set(next(rows)[0])
        if not needed:
            break
    assert not tokenizer.convert_ids_to_tokens(sorted(needed))


def test_the_warm_up_holds_no_sentence_of_the_sample(sample_texts: list[str]) -> None:
    source = Path(warmup.__file__).read_text(encoding="utf-8") + Path(tiny.__file__).read_text(
        encoding="utf-8"
    )
    sentences = {part for text in sample_texts for part in text.split("。") if len(part) > 12}
    assert not [sentence for sentence in sentences if sentence in source]


def test_the_same_seed_draws_the_same_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    def drawn(seed: int) -> list[tuple[list[int], list[int]]]:
        rows = warmup.Corpus(tokenizer.backend_tokenizer, seed).rows(lambda: 300)
        return [next(rows) for _ in range(20)]

    assert drawn(3) == drawn(3) != drawn(4)


def test_only_answers_and_their_end_are_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = warmup.Corpus(tokenizer.backend_tokenizer, seed=0)
    conversation = warmup.Document("静。", [("甲？", "乙。"), ("丙？", "丁。")])
    tokens, labels = corpus.encode(conversation)
    messages = [{"role": "system", "content": "静。"}]
    for question, answer in conversation.turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert f"{tokenizer.decode(tokens)}\n" == tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode([label for label in labels if label != -100]) == "乙。<|im_end|>丁。<|im_end|>"


def test_a_short_warm_up_lowers_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny.build_model(len(tokenizer), hidden=96, layers=2, heads=3, feed_forward=64)
    warmup.start_copying(model)
    corpus = warmup.Corpus(tokenizer.backend_tokenizer, seed=0)
    losses = warmup.train(
        model, corpus, positions=24_000, batch_positions=1024, longest=200, log=lambda line: None
    )
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


def test_the_script_writes_a_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiny.build_model
    monkeypatch.setattr(
        tiny,
        "build_model",
        lambda size, seed: small(size, hidden=48, layers=2, heads=3, feed_forward=32, seed=seed),
    )
    arguments = f"--out {tmp_path} --positions 2000 --batch-positions 1000 --longest 200 --device cpu"
    warmup.main([*arguments.split(), "--threads", str(torch.get_num_threads())])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float16
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == model.config.vocab_size
