"""Answers of a model: greedy, in left-padded batches sorted by length, halved where memory runs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psutil
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import GenerationConfig, PreTrainedModel

from mtgdm.errors import UserError
from mtgdm.student import adapter_files, base
from mtgdm.student.chat import Chat

if TYPE_CHECKING:
    from mtgdm.student.base import Placement

T = TypeVar("T")

_SAVE_MEMORY = "a smaller --batch or --max-new-tokens, --load-in-4bit"

FOR_THE_CACHE = 0.5
"""Share of the free memory that the keys and values of a batch may take."""
MOST_ON_CPU = 32
MOST_ON_GPU = 128
"""More rows at once bring little: the tokens of a row then take as long as those of all."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt.

    `latency_s` is the row's share of its batch: the seconds of the batch divided by its rows, so that
    the latencies of a run add up to its time, and `output_tokens / latency_s` is the throughput.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    output_tokens: int
    latency_s: float
    batch_rows: int = 1
    """How many rows were generated at once."""


def answers(
    model: PreTrainedModel | PeftModel,
    chat: Chat,
    prompts: Sequence[list[int]],
    *,
    batch: int,
    max_new_tokens: int,
) -> Iterator[list[tuple[int, Answer]]]:
    """Answers batch by batch with the place of their prompts; the longest prompts come first.

    Rows of like length share a batch, so little is padded; in float32 every answer is the one that the
    prompt gets alone. `batch` 0 takes as many rows as memory has room for; a batch that does not fit all
    the same is halved and asked again.
    """
    size = batch or fitting(model, max((len(prompt) for prompt in prompts), default=0) + max_new_tokens)
    for places, found in Batches(size).run(
        prompts,
        lambda places: _batch(model, chat, [prompts[place] for place in places], max_new_tokens),
    ):
        yield list(zip(places, found, strict=True))


class Batches:
    """Prompts in batches of like length; the size is halved, for good, where memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(
        self, prompts: Sequence[list[int]], generate: Callable[[list[int]], T]
    ) -> Iterator[tuple[list[int], T]]:
        """What `generate` makes of each batch, which it gets as the places of its prompts, longest first.

        A batch that does not fit comes again in halves; UserError where a single prompt does not.
        """
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        done = 0
        while done < len(order):
            places = order[done : done + self.size]
            try:
                found = generate(places)
            except RuntimeError as error:
                if not base.is_out_of_memory(error):
                    raise
                if len(places) == 1:
                    raise UserError("out of memory with a single row", hint=_SAVE_MEMORY) from error
                self.size = len(places) // 2
            else:
                yield places, found
                done += len(places)
                continue
            # Only here is the error gone, whose frames held the tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def fitting(model: PreTrainedModel | PeftModel, tokens: int) -> int:
    """How many rows of so many tokens memory has room for, in powers of two up to a most.

    What a row takes is its keys and values in every layer; what the activations of a step take beside them
    is left to the other half of the memory that is free.
    """
    on_cpu = model.device.type == "cpu"
    free = psutil.virtual_memory().available if on_cpu else torch.cuda.mem_get_info(model.device)[0]
    about: Any = model.config.get_text_config()
    heads = getattr(about, "num_key_value_heads", None) or about.num_attention_heads
    size = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
    width = 4 if model.dtype == torch.float32 else 2
    row_bytes = 2 * about.num_hidden_layers * heads * size * width * max(1, tokens)
    rows = min(MOST_ON_CPU if on_cpu else MOST_ON_GPU, int(free * FOR_THE_CACHE) // row_bytes)
    return int(2 ** max(0, int(rows).bit_length() - 1))


def _batch(
    model: PreTrainedModel | PeftModel, chat: Chat, prompts: list[list[int]], max_new_tokens: int
) -> list[Answer]:
    ids, mask = padded(prompts, chat.pad)
    ends = end_tokens(model, chat)
    started = time.perf_counter()
    with torch.inference_mode():
        generate: Any = model.generate
        written = generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=_greedy(model, ends, chat.pad, max_new_tokens),
        )
    rows = written[:, ids.shape[1] :].tolist()
    seconds = (time.perf_counter() - started) / len(prompts)
    return [
        replace(answer_of(chat, row, ends, len(prompt), seconds), batch_rows=len(prompts))
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def padded(prompts: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of a batch, both (rows, longest prompt), padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        ids[place, width - len(prompt) :] = torch.tensor(prompt)
        mask[place, width - len(prompt) :] = 1
    return ids, mask


def _greedy(model: Any, ends: list[int], pad: int, max_new_tokens: int) -> GenerationConfig:
    options: dict[str, Any] = {}
    if model.device.type == "cpu":
        # A cache that grows is copied whole at every token: a third of the time of a small model.
        options = {"cache_implementation": "static", "disable_compile": True}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad, **options
    )


def answer_of(chat: Chat, row: list[int], ends: list[int], prompt_tokens: int, seconds: float) -> Answer:
    """What the tokens after a prompt say, up to the first that ends an answer."""
    stop = next((place for place, token in enumerate(row) if token in ends), None)
    written = row if stop is None else row[:stop]
    text = chat.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(
        text=str(text),
        finish_reason="length" if stop is None else "stop",
        prompt_tokens=prompt_tokens,
        output_tokens=len(written) + (stop is not None),
        latency_s=seconds,
    )


def end_tokens(model: PreTrainedModel | PeftModel, chat: Chat) -> list[int]:
    """The tokens that end an answer: the template's end of turn and those that the model declares."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    ends = [declared] if isinstance(declared, int) else list(declared or [])
    return sorted({chat.end_of_turn, *ends})


def load_chat(source: str, name: str, workspace: Path, *, base_source: str | None = None) -> Chat:
    """The tokenizer and template of a model; an adapter without its own speaks as its base does.

    `base_source` is where the base lies, if not where the adapter says. Whether it writes its thoughts says its
    training; of a model that mtgdm has not trained, its template.
    """
    thoughts = base.writes_thoughts(source)
    if base.is_adapter(source) and not adapter_files.has_tokenizer(Path(source)):
        name = base.base_of(source)
        source = base_source or base.locate(name, workspace)
    return Chat(base.load_tokenizer(source, name), name, thoughts=thoughts)


def load(
    source: str, name: str, placement: Placement, *, workspace: Path, load_in_4bit: bool
) -> PreTrainedModel | PeftModel:
    """A model to generate with: a checkpoint's adapter over its base, or a model as it is."""
    if not base.is_adapter(source):
        model = base.load_model(source, name, placement, load_in_4bit=load_in_4bit)
        return ready(model)
    base.check_folder(source)
    base_name = base.base_of(source)
    model = base.load_model(
        base.locate(base_name, workspace), base_name, placement, load_in_4bit=load_in_4bit
    )
    return ready(with_adapter(model, source, base_name))


def with_adapter(model: PreTrainedModel, source: str, base_name: str) -> PeftModel:
    """The adapter of a checkpoint over its loaded base; UserError where the two do not fit."""
    hint = f"was it trained on another model? {base.names_base(source)}"
    check_adapter(source)
    _fit_vocabulary(model, Path(source), base_name)
    try:
        adapted: PeftModel = PeftModel.from_pretrained(model, source)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the adapter does not fit its base {base_name}: {str(error).strip().splitlines()[0]}",
            where=source,
            hint=hint,
        ) from error
    # PEFT only warns where the base takes more than the adapter has, and says nothing where it takes less.
    has = _lora(adapter_files.shapes(Path(source)))
    takes = _lora(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if has != takes:
        raise UserError(
            f"the adapter does not fit its base {base_name}: it holds {len(has):,} tensors, "
            f"{len(has & takes):,} of the {len(takes):,} that this base takes",
            where=source,
            hint=hint,
        )
    return adapted


def _fit_vocabulary(model: PreTrainedModel, adapter: Path, base_name: str) -> None:
    """Give the base as many tokens as it had when the adapter was trained, which holds the embeddings of the new."""
    known = model.get_input_embeddings().weight.shape[0]
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    wanted = adapter_files.check_vocabulary(adapter, known, base_name, tied=tied)
    if wanted != known:
        model.resize_token_embeddings(wanted, mean_resizing=False)


def check_adapter(source: str) -> None:
    """UserError where the weights are damaged, or of another rank than adapter_config.json says."""
    config = base.adapter_config(source)
    found = adapter_files.shapes(Path(source))
    ranks = {shape[0] for name, shape in found.items() if ".lora_A." in name}
    if ranks and not config.get("rank_pattern") and ranks != {config["r"]}:
        raise UserError(
            f"the adapter's weights have rank {', '.join(map(str, sorted(ranks)))}, adapter_config.json says "
            f"{config['r']}",
            where=source,
            hint="files of two checkpoints lie in one folder: copy the checkpoint anew",
        )


def _lora(names: Iterable[str]) -> set[str]:
    return {name for name in names if "lora_" in name}


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """The adapter added into the weights, which halves the matrix products of a token; 4-bit stays apart."""
    if not isinstance(model, PeftModel) or getattr(model.get_base_model(), "is_loaded_in_4bit", False):
        return model
    whole: PreTrainedModel = model.merge_and_unload()
    return ready(whole)


def ready(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """The model as it is asked: no dropout, a cache, and no settings of its own."""
    model.eval()
    model.config.use_cache = True
    # Sampling settings of a model's own file would be warned of at every greedy call.
    declared = getattr(model.generation_config, "eos_token_id", None)
    model.generation_config = GenerationConfig(eos_token_id=declared)  # type: ignore[no-untyped-call]
    return model
