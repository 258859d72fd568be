"""What a package is made of: the template that servers get, the system text, the licence, where BOS comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtgdm.export.trained import Trained
from mtgdm.export.turns import NotOfTurns
from mtgdm.student.noise import quiet
from mtgdm.student.template import CHATML
from tests.conftest import write_lines
from tests.tiny_student import LLAMA3, MARKED, THINKING, make_base, teacher_row

SYSTEM_INSIDE = (
    "{% set s = messages[0].content + '\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ (s if m.role == 'user' else '') + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML that puts the system text into the user's turns."""
ASK = [{"role": "user", "content": "西湖"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model") / "base")


def trained(base: Path, workspace: Path, template: str | None = None, *rows: dict[str, Any]) -> Trained:
    """A checkpoint with this template, as far as a package asks before it loads weights."""
    with quiet():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(workspace / "checkpoint")
    answered = write_lines(workspace / "teacher.jsonl", *rows)
    return Trained.of(
        workspace / "checkpoint", {"base_model": str(base), "max_len": 512}, answered, workspace
    )


def as_a_server_asks(student: Trained) -> str:
    """What llama.cpp and Ollama render: the template of the GGUF, told nothing but the messages."""
    with quiet():
        from transformers.utils.chat_template_utils import render_jinja_template

    texts: Any = render_jinja_template(
        conversations=[ASK], chat_template=student.template, add_generation_prompt=True
    )[0]
    return str(texts[0])


def test_the_template_in_the_gguf_offers_nothing_that_was_not_trained(base: Path, tmp_path: Path) -> None:
    offering = CHATML.replace("{% for", "{% if tools %}{{ tools | tojson }}{% endif %}{% for", 1)
    student = trained(base, tmp_path, offering)
    assert student.chat.template == offering, "the checkpoint keeps what its base can do"
    assert "tool" not in student.template
    assert as_a_server_asks(student) == student.chat.prompt_text(ASK)


@pytest.mark.parametrize("template", [THINKING, MARKED])
def test_a_template_that_servers_would_render_otherwise_is_written_anew(
    template: str, base: Path, tmp_path: Path
) -> None:
    student = trained(base, tmp_path, template)
    assert student.template != template
    assert "generation %}" not in student.template
    prompt = student.chat.prompt(ASK)
    assert student.chat.tokens(as_a_server_asks(student)) == prompt


def test_a_template_that_does_more_is_left_to_the_gguf_and_the_modelfile_says_so(
    base: Path, tmp_path: Path
) -> None:
    student = trained(base, tmp_path, SYSTEM_INSIDE)
    assert isinstance(student.turns, NotOfTurns)
    assert student.template == SYSTEM_INSIDE
    modelfile = student.modelfile("x.gguf", {})
    assert modelfile.template is None
    assert "Ollama takes the one inside the GGUF" in modelfile.text().splitlines()[0]


def test_a_template_that_trims_is_left_to_the_gguf_which_can(base: Path, tmp_path: Path) -> None:
    llama = LLAMA3.replace("<|begin_of_text|>", "").replace("<|eot_id|>", "<|im_end|>")
    modelfile = trained(base, tmp_path, llama).modelfile("x.gguf", {})
    assert modelfile.template is None
    assert any("white space" in remark for remark in modelfile.remarks)
    assert "TEMPLATE" not in modelfile.request()
    lines = modelfile.text().splitlines()
    first = lines.index(next(line for line in lines if line.startswith('# TEMPLATE """')))
    of_old = "\n".join(line.removeprefix("# ") for line in lines[first:]).partition('"""')[2]
    assert of_old.startswith(modelfile.template_of_old or "nothing"), "an older Ollama still gets one by hand"


def test_a_system_text_that_all_training_rows_share_is_the_students(base: Path, tmp_path: Path) -> None:
    rows = [teacher_row("甲", "train"), teacher_row("乙", "train"), teacher_row("丙", "val")]
    student = trained(base, tmp_path, None, *rows)
    assert student.system == "你是讲解员。"
    assert [row.spot for row in student.rows] == ["丙"]
    rows[0]["messages"] = rows[0]["messages"][1:]
    assert trained(base, tmp_path, None, *rows).system is None


def test_a_system_text_that_no_modelfile_can_hold_is_left_out_and_told(base: Path, tmp_path: Path) -> None:
    row = teacher_row("甲", "train")
    row["messages"][0]["content"] = 'Say "hello"'
    modelfile = trained(base, tmp_path, None, row).modelfile("x.gguf", {"license": "mit"})
    assert modelfile.system is None
    assert any("SYSTEM" in remark for remark in modelfile.remarks)
    assert modelfile.licence == "mit"


def test_a_licence_that_no_modelfile_can_hold_is_left_to_the_card(base: Path, tmp_path: Path) -> None:
    modelfile = trained(base, tmp_path).modelfile("x.gguf", {"license": 'the "free"'})
    assert modelfile.licence is None
    assert any("LICENSE" in remark for remark in modelfile.remarks)


def test_a_first_question_comes_in_the_form_that_the_tokenizer_reads(base: Path, tmp_path: Path) -> None:
    row = teacher_row("Cafe\u0301", "val")
    student = trained(base, tmp_path, None, row)
    assert "Caf\u00e9" in student.question[-1]["content"]


def test_the_licence_is_that_of_the_bases_card(base: Path, tmp_path: Path) -> None:
    assert trained(base, tmp_path).licence == {}
    card = base / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: qwen-research\n---\n# A model\n", encoding="utf-8")
    assert trained(base, tmp_path).licence == {"license": "other", "license_name": "qwen-research"}
    card.write_text("# A model without front matter: `---`\n", encoding="utf-8")
    assert trained(base, tmp_path).licence == {}
    card.unlink()


def test_a_base_of_the_hub_keeps_its_id_wherever_it_lies_now(base: Path, tmp_path: Path) -> None:
    with quiet():
        trained(base, tmp_path)
    training = {"base_model": "qwen2.5:3b", "base_state": {"hub": "Qwen/Qwen2.5-3B-Instruct"}}
    student = Trained.of(tmp_path / "checkpoint", training, Path(), tmp_path, base=str(base))
    assert (student.is_on_hub, student.base_name) == (True, "Qwen/Qwen2.5-3B-Instruct")
    assert (student.revision, student.licence) == (None, {})
    assert student.parameters > 0
    of_folder = {"base_model": r"C:\models\mine", "base_state": {"model.safetensors": "0"}}
    student = Trained.of(tmp_path / "checkpoint", of_folder, Path(), tmp_path, base=str(base))
    assert (student.is_on_hub, student.base_name) == (False, "mine")
    assert student.training_to_tell["base_model"] == "mine"


def test_weights_are_counted_without_being_loaded(base: Path, tmp_path: Path) -> None:
    student = trained(base, tmp_path)
    assert student.merged_bytes("float16") == 2 * student.parameters
    assert student.merged_bytes("auto") == 4 * student.parameters
    assert json.loads((base / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
