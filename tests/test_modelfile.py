"""The Modelfile: what it holds, and that the API is told the same."""

from __future__ import annotations

import pytest

from mtgdm.export.modelfile import Modelfile, can_be_quoted, context_length, is_ollama_name


def test_a_modelfile_says_what_the_api_is_told() -> None:
    template = "{{ range $i, $_ := .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}{{ end }}\n"
    modelfile = Modelfile(
        "guide-q8_0.gguf", template, "<|im_end|>", 768, "第一行\n第二行", "mit", ("A remark.",)
    )
    text = modelfile.text()
    assert text.startswith("# A remark.\nFROM ./guide-q8_0.gguf\nTEMPLATE ")
    assert f'TEMPLATE """{template}"""\n' in text
    assert 'SYSTEM """第一行\n第二行"""\n' in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER num_ctx 768\n" in text
    assert modelfile.request() == {
        "template": template,
        "system": "第一行\n第二行",
        "license": "mit",
        "parameters": {"temperature": 0, "repeat_penalty": 1, "num_ctx": 768, "stop": ["<|im_end|>"]},
    }


def test_what_is_not_known_is_left_out() -> None:
    bare = Modelfile("guide-q8_0.gguf", None, "</s>", 256)
    assert [line.split()[0] for line in bare.text().splitlines()] == ["FROM", *["PARAMETER"] * 4]
    assert bare.request().keys() == {"parameters"}


@pytest.mark.parametrize(
    ("text", "fits"), [("a", True), ('say "a" now', True), ('say "a"', False), ('"""', False)]
)
def test_three_quotation_marks_know_no_escape(text: str, fits: bool) -> None:
    assert can_be_quoted(text) is fits


@pytest.mark.parametrize(
    "name",
    ["guide", "guide:3b", "me/guide", "me/guide:Q8_0", "hf.co/me/guide.v2", "localhost:5000/me/_guide:1"],
)
def test_names_that_ollama_takes(name: str) -> None:
    assert is_ollama_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "my guide",
        "导游",
        "-guide",
        ".guide",
        "me//guide",
        "guide:",
        "a:b:c",
        "m.e/guide",
        "a/b/c/d",
        "g" * 81,
    ],
)
def test_names_that_ollama_does_not_take(name: str) -> None:
    assert not is_ollama_name(name)


@pytest.mark.parametrize(
    ("longest", "most", "context"),
    [(2048, 32768, 2560), (1000, 32768, 1280), (2048, 2048, 2048), (16, 32768, 256), (512, None, 768)],
)
def test_the_context_is_a_quarter_longer_than_the_rows_and_no_longer_than_the_base_allows(
    longest: int, most: int | None, context: int
) -> None:
    config = {} if most is None else {"max_position_embeddings": most}
    assert context_length(longest, config) == context
