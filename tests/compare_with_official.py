"""Our GGUF files beside those of llama.cpp's own converter: key by key, tensor by tensor, bit by bit.

    python tests/compare_with_official.py LLAMA_CPP/convert_hf_to_gguf.py              each family, made small here
    python tests/compare_with_official.py LLAMA_CPP/convert_hf_to_gguf.py --model DIR  a model of yours (repeatable)

Needs `sentencepiece` and `protobuf` beside the project's own packages: the converter wants a tokenizer.model of the
models that have one, so tokenizers of that kind are trained with SentencePiece itself, whose scores are compared
with those derived from tokenizer.json. The converter knows pre-tokenizers by a hash of well-known vocabularies; for
the vocabularies that are made here, this script tells it the name (`--model` leaves it to the converter).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np

from mtgdm.export import gguf as ours
from tests import families

QUANTS = ("f32", "f16", "bf16", "q8_0")
_NAME = "guide"

MEANT: Mapping[str, str] = {
    "general.name": "the student's name",
    "general.size_label": "for names of files; ours have the student's",
    "general.basename": "from the folder's name",
    "general.finetune": "from the folder's name",
    "general.version": "from the folder's name",
    "*.vocab_size": "written for all families, as readers ask for it",
    "*.attention.key_length": "written where it is what llama.cpp would take, too",
    "*.attention.value_length": "as above",
    "*.rope.dimension_count": "as above",
    "*.rope.freq_base": "the converter takes 10,000 for GlmForCausalLM, whatever rope_theta says",
    "*.context_length": "where a window or LongRoPE ends what llama.cpp computes alike; the converter takes "
    "hidden_size for GlmForCausalLM",
    "*.attention.layer_norm_rms_epsilon": "the converter takes 1e-5 for GlmForCausalLM, whatever rms_norm_eps says",
    "tokenizer.ggml.pre": "another name for the same rules",
    "tokenizer.ggml.add_bos_token": "what tokenizer.json does, told always",
    "tokenizer.ggml.add_eos_token": "told always",
    "tokenizer.ggml.add_sep_token": "never asked for",
    "tokenizer.ggml.add_space_prefix": "what tokenizer.json does, told always; llama.cpp's default is to put one",
    "tokenizer.ggml.eot_token_id": "the end of turn of the training's template",
    "tokenizer.ggml.eom_token_id": "GLM: <|observation|>, which no student is trained on",
    "tokenizer.ggml.bos_token_id": "GLM: as tokenizer_config.json has it; the converter puts one of its own choice",
    "tokenizer.ggml.unknown_token_id": "GLM: as tokenizer_config.json has it",
}
"""Differences that are meant, with the reason; `*` stands for the architecture."""
_SAME_RULES = (
    {"llama-bpe", "glm4"},
    {"qwen2", "deepseek-r1-qwen"},
    {"dbrx", "chatglm-bpe", "smaug-bpe"},
    {"deepseek-v3", "joyai-llm"},
)
_OF_GLM = ("rope.freq_base", "layer_norm_rms_epsilon", "eom_token_id", "bos_token_id", "unknown_token_id")


def main() -> int:
    """Compare, print what differs, and return 1 where something does that is not meant to."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    options.add_argument("--model", type=Path, action="append", help="a model folder with a chat template")
    options.add_argument("--quant", choices=QUANTS, action="append", help="default: all")
    options.add_argument("--family", choices=families.FAMILIES, action="append", help="default: all")
    given = options.parse_args()
    worst = 0
    with TemporaryDirectory() as made:
        models = given.model or [_made(Path(made), kind) for kind in given.family or families.FAMILIES]
        for model in models:
            for quant in given.quant or QUANTS:
                worst |= _report(model, quant, given.converter, Path(made), stubbed=not given.model)
    return worst


def _made(folder: Path, kind: str) -> Path:
    """A model of a family, its tokenizer saved by transformers as a merge does it."""
    from transformers import AutoTokenizer

    model = families.make_family(folder / kind, kind)
    words = families.WORDS[families.KINDS[kind].words]
    if words.rules is None:
        _train_sentencepiece(model, words)
        return model
    AutoTokenizer.from_pretrained(model).save_pretrained(model)
    if families.KINDS[kind].config == "Phi3":  # by which the converter knows that there is no tokenizer.model
        path = model / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}), encoding="utf-8")
    return model


def _report(model: Path, quant: str, converter: Path, folder: Path, *, stubbed: bool) -> int:
    mine, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    template = _template(model)
    ours.convert(model, mine, quant, name=_NAME, template=template)
    pre = str(gguf.GGUFReader(mine).fields["tokenizer.ggml.pre"].contents()) if stubbed else ""
    _convert_officially(converter, model, theirs, quant, pre)
    tensors, differing = _compare(mine, theirs)
    wrong = [(key, text) for key, text, meant in differing if not meant]
    print(
        f"{model.name} {quant}: {tensors} tensors equal" if not wrong else f"{model.name} {quant}: DIFFERENT"
    )
    for key, text, meant in differing:
        print(f"    {key}: {text}{f'  [{meant}]' if meant else '  <-- not meant'}")
    return bool(wrong)


def _template(model: Path) -> str:
    from mtgdm.student.base import load_tokenizer

    return str(load_tokenizer(str(model), model.name).chat_template)


_RUN = """
import runpy, sys
converter, pre = sys.argv[1:3]
sys.argv = [converter, *sys.argv[3:]]
if pre:
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
runpy.run_path(converter, run_name="__main__")
"""


def _convert_officially(converter: Path, model: Path, out: Path, quant: str, pre: str) -> None:
    paths = [converter.parent, converter.parent / "gguf-py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", _RUN, converter, pre, model, "--outfile", out, "--outtype", quant]
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"the converter failed on {model}:\n{done.stderr[-3000:]}")


def _compare(mine: Path, theirs: Path) -> tuple[int, list[tuple[str, str, str | None]]]:
    """How many tensors are equal, and what differs: where, how, and why if that is meant."""
    left, right = gguf.GGUFReader(mine), gguf.GGUFReader(theirs)
    differing = list(_keys(left, right))
    own = {str(one.name): one for one in left.tensors}
    other = {str(one.name): one for one in right.tensors}
    equal = 0
    for name in sorted(own.keys() | other.keys()):
        if name not in own or name not in other:
            differing.append((name, "ours alone" if name in own else "theirs alone", None))
        elif own[name].tensor_type != other[name].tensor_type or not np.array_equal(
            own[name].data.view(np.uint8), other[name].data.view(np.uint8)
        ):
            differing.append((name, "other bytes", None))
        else:
            equal += 1
    return equal, differing


def _keys(left: Any, right: Any) -> Iterator[tuple[str, str, str | None]]:
    architecture = str(left.fields["general.architecture"].contents())
    for key in sorted(left.fields.keys() | right.fields.keys()):
        if key.startswith("GGUF."):
            continue
        found = [_value(reader, key) for reader in (left, right)]
        if found[0] != found[1]:
            yield key, _shown(*found), _why(key, architecture, *found)


def _why(key: str, architecture: str, mine: Any, theirs: Any) -> str | None:
    general = key.replace(f"{architecture}.", "*.", 1) if key.startswith(f"{architecture}.") else key
    if key == "tokenizer.ggml.pre" and not any({mine, theirs} <= same for same in _SAME_RULES):
        return None
    if key.endswith(_OF_GLM) and architecture not in ("chatglm", "glm4"):
        return None
    return MEANT.get(general)


def _value(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    value = None if field is None else field.contents()
    return [float(one) for one in value] if key.endswith("scores") and value is not None else value


def _shown(mine: Any, theirs: Any) -> str:
    if isinstance(mine, list) and isinstance(theirs, list):
        places = [place for place, (one, two) in enumerate(zip(mine, theirs, strict=False)) if one != two]
        first = [(place, mine[place], theirs[place]) for place in places[:4]]
        return f"{len(mine)} and {len(theirs)}, {len(places)} differ: {first}"
    return f"ours {str(mine)[:60]!r}, theirs {str(theirs)[:60]!r}"


# --- tokenizers that SentencePiece trained -------------------------------------------------------


def _train_sentencepiece(model: Path, words: families.Words) -> None:
    """Put a tokenizer.model of SentencePiece, and what transformers makes of it, in place of the model's tokenizer."""
    import sentencepiece

    text = model / "text.txt"
    text.write_text(families.TEXT * 3, encoding="utf-8")
    size = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    named = {
        "unk": "<unk>",
        "bos": words.names["bos_token"],
        "eos": "</s>" if "</s>" in words.special else "<eos>",
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(model / "tokenizer"),
        model_type="bpe",
        byte_fallback=True,
        vocab_size=size - 5,
        hard_vocab_limit=False,
        add_dummy_prefix=words.space != "never",
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        control_symbols=[one for one in words.special if one not in named.values() and one != "<pad>"],
        user_defined_symbols=list(words.written),
        pad_id=words.special.index("<pad>") if "<pad>" in words.special else -1,
        minloglevel=2,
        **{f"{role}_id": words.special.index(token) for role, token in named.items()},
        **{f"{role}_piece": token for role, token in named.items()},
    )
    for path in (text, model / "tokenizer.vocab", model / "tokenizer.json"):
        path.unlink()
    _convert_sentencepiece(model, words)


def _convert_sentencepiece(model: Path, words: families.Words) -> None:
    """The tokenizer.json that transformers makes of a tokenizer.model, with the space and the flags of its kind."""
    from transformers import AutoTokenizer

    path, about = model / "tokenizer.json", model / "tokenizer_config.json"
    kind = "GemmaTokenizer" if words.space == "never" else "LlamaTokenizer"
    about.write_text(json.dumps({"tokenizer_class": kind, **words.names}), encoding="utf-8")
    AutoTokenizer.from_pretrained(model).save_pretrained(model)
    made = json.loads(path.read_text(encoding="utf-8"))
    like = json.loads(families.make_tokenizer(words).backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        made[part] = like[part]
    for step in (made["post_processor"] or {}).get("processors", []):
        for token, special in step.get("special_tokens", {}).items():
            special["ids"] = [one["id"] for one in made["added_tokens"] if one["content"] == token]
    for one in made["added_tokens"]:
        one["rstrip"] = one["content"] in words.rstrip
    path.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    decoder = {str(one.pop("id")): one for one in made["added_tokens"]}
    config = {"tokenizer_class": "TokenizersBackend", "added_tokens_decoder": decoder, **words.names}
    about.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    (model / "chat_template.jinja").write_text(words.template, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
