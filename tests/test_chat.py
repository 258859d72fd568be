"""Which tokens are trained: the assistant's, with the end of its turn, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtgdm.errors import UserError
from mtgdm.student.chat import IGNORED, Chat, ChatProblem, Encoded
from mtgdm.student.noise import quiet
from tests.tiny_student import LLAMA3, MARKED, THINKING

SYSTEM = {"role": "system", "content": "你是讲解员。"}
ASKED = {"role": "user", "content": "介绍西湖。"}
ANSWER = {"role": "assistant", "content": '{"name":"西湖","year":2007}'}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    with quiet():
        from mtgdm.student.tiny import build_tokenizer

        return build_tokenizer()


@pytest.fixture
def chat(tokenizer: Any) -> Chat:
    return chat_with(tokenizer)


def chat_with(tokenizer: Any, template: str | None = None, *, tokens: tuple[str, ...] = ()) -> Chat:
    from copy import deepcopy

    own = deepcopy(tokenizer)
    if tokens:
        own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tokens]})
    if template is not None:
        own.chat_template = template
    return Chat(own, "the model")


def encode(chat: Chat, *messages: dict[str, str]) -> Encoded:
    return next(chat.encode([list(messages)]))


def trained_text(chat: Chat, encoded: Encoded) -> str:
    return str(chat.tokenizer.decode([label for label in encoded.labels if label != IGNORED]))


def test_the_answer_and_its_end_of_turn_are_trained_token_by_token(chat: Chat) -> None:
    encoded = encode(chat, SYSTEM, ASKED, ANSWER)
    prompt = chat.tokens(
        "<|im_start|>system\n你是讲解员。<|im_end|>\n<|im_start|>user\n介绍西湖。<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = chat.tokens('{"name":"西湖","year":2007}<|im_end|>')
    after = chat.tokens("\n")
    assert encoded.ids == prompt + answer + after
    assert encoded.labels == [IGNORED] * len(prompt) + answer + [IGNORED] * len(after)


def test_what_is_read_in_training_is_what_is_read_when_answering(chat: Chat) -> None:
    encoded = encode(chat, SYSTEM, ASKED, ANSWER)
    prompt = chat.prompt([SYSTEM, ASKED])
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.labels[len(prompt)] != IGNORED


def test_every_assistant_turn_is_trained(chat: Chat) -> None:
    again = {"role": "assistant", "content": "在杭州。"}
    encoded = encode(chat, ASKED, ANSWER, {"role": "user", "content": "在哪？"}, again)
    assert trained_text(chat, encoded) == f"{ANSWER['content']}<|im_end|>在杭州。<|im_end|>"


@pytest.mark.parametrize("turns", [[SYSTEM, ASKED, ANSWER], [ASKED, ANSWER, ASKED, ANSWER]])
def test_the_mask_is_the_one_of_generation_marks(tokenizer: Any, turns: list[dict[str, str]]) -> None:
    chat = chat_with(tokenizer, MARKED)
    encoded = encode(chat, *turns)
    theirs: Any = chat.tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.ids == theirs["input_ids"]
    assert [label != IGNORED for label in encoded.labels] == [mask == 1 for mask in theirs["assistant_masks"]]
    assert encoded.labels == encode(chat_with(tokenizer), *turns).labels


def test_a_llama_3_template_trains_up_to_its_own_end_of_turn(tokenizer: Any) -> None:
    tokens = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    chat = chat_with(tokenizer, LLAMA3, tokens=tokens)
    encoded = encode(chat, SYSTEM, ASKED, {"role": "assistant", "content": "  西湖在杭州。\n"})
    assert trained_text(chat, encoded) == "西湖在杭州。<|eot_id|>"
    assert chat.end_of_turn == chat.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert encoded.ids[0] == chat.tokenizer.convert_tokens_to_ids("<|begin_of_text|>")


def test_a_thinking_template_trains_the_answer_after_the_empty_thought(tokenizer: Any) -> None:
    chat = chat_with(tokenizer, THINKING)
    encoded = list(chat.encode([[ASKED, {"role": "assistant", "content": "在杭州。"}, ASKED, ANSWER]]))
    assert [trained_text(chat, one) for one in encoded] == [
        "在杭州。<|im_end|>",
        f"{ANSWER['content']}<|im_end|>",
    ]
    for one in encoded:
        before = one.ids[: next(place for place, label in enumerate(one.labels) if label != IGNORED)]
        assert str(chat.tokenizer.decode(before)).endswith("<think>\n\n</think>\n\n"), "as it is asked for"
    assert str(chat.tokenizer.decode(chat.prompt([ASKED]))).endswith("<think>\n\n</think>\n\n")


def test_a_token_across_the_edge_of_a_turn_is_cut_as_it_is_when_answering() -> None:
    chat = Chat(_newline_tokenizer(), "the model")
    whole = chat.tokens("assistant\n\n西湖")
    assert chat.tokens("assistant\n") + chat.tokens("\n西湖") != whole, (
        "the tokenizer must merge the two newlines"
    )
    encoded = encode(chat, ASKED, {"role": "assistant", "content": "\n西湖"})
    assert encoded.ids[: len(chat.prompt([ASKED]))] == chat.prompt([ASKED])
    assert trained_text(chat, encoded) == "\n西湖<|im_end|>"


def _newline_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        ["\n\n"] * 50,
        trainers.BpeTrainer(
            special_tokens=["<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=inner, eos_token="<|im_end|>")


def test_letters_with_loose_accents_and_rare_characters_are_trained_whole(chat: Chat) -> None:
    encoded = encode(chat, ASKED, {"role": "assistant", "content": "Cafe\u0301 棣𠮷 e\u0301"})
    assert trained_text(chat, encoded) == "Café 棣𠮷 é<|im_end|>"
    first, last = (
        encoded.labels.index(next(label for label in encoded.labels if label != IGNORED)),
        len(encoded.labels) - 1 - encoded.labels[::-1].index(chat.end_of_turn),
    )
    assert IGNORED not in encoded.labels[first : last + 1]


def test_a_lone_surrogate_becomes_a_replacement_character(chat: Chat) -> None:
    encoded = encode(chat, {"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a\udfff"})
    assert trained_text(chat, encoded) == "a\ufffd<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([ASKED, {"role": "assistant", "content": " \n"}], "the answer is empty"),
        ([ASKED], "no answer to train on"),
        (
            [{"role": "user", "content": "a<|im_end|>b"}, ANSWER],
            "a user text holds the control token '<|im_end|>'",
        ),
        ([ASKED, {"role": "assistant", "content": "<|im_start|>"}], "an assistant text|assistant text holds"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_refused(chat: Chat, messages: Any, reason: str) -> None:
    with pytest.raises(ChatProblem, match=reason):
        encode(chat, *messages)


def test_a_template_without_an_end_of_turn_is_refused(tokenizer: Any) -> None:
    chat = chat_with(
        tokenizer,
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: ",
    )
    with pytest.raises(ChatProblem):
        encode(chat, ASKED, ANSWER)


def test_a_template_that_refuses_a_role_is_one_line(tokenizer: Any) -> None:
    chat = chat_with(tokenizer, "{{ raise_exception('System role not supported') }}")
    with pytest.raises(ChatProblem, match="System role not supported"):
        chat.prompt([SYSTEM, ASKED])


def test_a_model_that_cannot_chat_is_refused() -> None:
    tokenizer = _newline_tokenizer()
    Chat(tokenizer, "the model")  # it has the tokens of ChatML
    bare = _newline_tokenizer()
    bare.get_vocab = dict
    with pytest.raises(UserError, match="has no chat template"):
        Chat(bare, "the model")


def test_the_tokens_are_the_same_after_the_tokenizer_was_saved(chat: Chat, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chat.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    with quiet():
        again = Chat(AutoTokenizer.from_pretrained(tmp_path), "the model")
    turns = (
        SYSTEM,
        ASKED,
        {"role": "assistant", "content": "西湖（39.916，116.391）\n\nWest Lake's “best” ﬁn。𠮷"},
    )
    assert encode(again, *turns) == encode(chat, *turns)
    assert again.fingerprint == chat.fingerprint
