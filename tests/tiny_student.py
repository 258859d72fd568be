"""A random Qwen2 of a few thousand parameters, rows for it, and templates of other families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtgdm import rows
from mtgdm.student.noise import quiet
from tests.conftest import write_lines

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Headers around the role, the text trimmed, no newline after the end of turn."""

THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    ""
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
"""ChatML with an empty thought before the last answer alone."""

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with generation marks, by which transformers itself tells what the assistant wrote."""


def make_base(folder: Path, *, hidden: int = 32, seed: int = 0) -> Path:
    """A model folder as the Hub would give it."""
    with quiet():
        from mtgdm.student.tiny import build_model, build_tokenizer

        tokenizer = build_tokenizer()
        model = build_model(len(tokenizer), hidden=hidden, layers=2, heads=1, feed_forward=64, seed=seed)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def teacher_row(name: str, split: str | None, answer: str = "", **meta: Any) -> dict[str, Any]:
    """One answered row."""
    messages = [
        {"role": "system", "content": "你是讲解员。"},
        {"role": "user", "content": f"资料：\n名称：{name}\n写一句介绍。"},
        {"role": "assistant", "content": answer or f"{name}在杭州市，始建于1089年。"},
    ]
    about = {"spot": name, "province": "浙江省", **({"split": split} if split else {}), **meta}
    return {"id": rows.row_id(messages), "messages": messages, "meta": about}


def teacher_file(workspace: Path, *, train: int = 10, val: int = 3, test: int = 4) -> Path:
    """`data/teacher.jsonl` with one row a spot, of different lengths."""
    found = []
    for split, count in (("train", train), ("val", val), ("test", test)):
        found += [
            teacher_row(
                f"{split}景区{number}",
                split,
                f"{split}景区{number}在杭州市。" + "湖光山色。" * (number % 4 + 1),
            )
            for number in range(count)
        ]
    return write_lines(workspace / "data" / "teacher.jsonl", *found)
