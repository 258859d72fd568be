"""What a training run holds in memory, term by term, before it starts; and what it took in the end.

The terms are those of LoRA on a frozen decoder. A frozen layer keeps none of its inputs for the backward pass;
what is kept is listed at `Shape.kept_per_position`, counted on PyTorch's own saved tensors (a test compares them).
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PretrainedConfig

from mtgdm.student.adapter import put_on

MIB = 2**20
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""Bytes of a weight in NF4 with double quantisation: half, and for 64 of them a scale of one byte, for 256 scales
four bytes (Dettmers et al. 2023, QLoRA, section 3)."""
ADAPTER_BYTES = 4
"""PEFT holds the adapter in float32, whatever the base is held in."""
ADAM_BYTES = 8
"""AdamW's two moments of a parameter."""


@dataclass(frozen=True)
class Shape:
    """What of a model and its adapter decides about memory; counts are of parameters or of features."""

    parameters: int
    quantizable: int
    """Parameters of the linear layers that bitsandbytes holds in 4-bit: all but the output layer."""
    largest_layer: int
    adapter: int
    adapter_inputs: int
    """Input features of all layers that have an adapter, added up."""
    adapter_ranks: int
    """Their ranks, added up."""
    layers: int
    hidden: int
    heads: int
    head_size: int
    key_value_heads: int
    feed_forward: int
    normalized: int
    """Features that the norms of one layer read."""
    vocabulary: int

    def kept_per_position(self, *, width: int, mask: int, bin_tokens: int = 0) -> int:
        """Bytes one position keeps of all layers for the backward pass.

        `width` are the bytes of a number in the matrix products, `mask` those that dropout remembers of a feature.
        A layer keeps: the input of its norms in float32; queries, keys, values and the output of attention,
        with a normaliser of each head in float32; three results of the gated feed-forward; of each layer with an
        adapter the input, cast for it alone, and the adapter's inner result. (In float32 without dropout nothing
        is cast and some inputs are shared: there this is too much by up to a quarter.) In bins of `bin_tokens` each
        layer holds its line of the attention mask too, and keys and values once for every head.
        """
        attention = 2 * self.heads * self.head_size + 2 * self.key_value_heads * self.head_size
        if bin_tokens:
            attention += bin_tokens + 2 * (self.heads - self.key_value_heads) * self.head_size
        a_layer = 4 * self.normalized + width * (attention + 3 * self.feed_forward) + 4 * self.heads
        adapters = (width + mask) * self.adapter_inputs + width * self.adapter_ranks
        return self.layers * a_layer + adapters + 4 * self.hidden

    @property
    def logits_per_trained(self) -> int:
        """Bytes one trained token costs at the output: log-softmax, its gradient and that of the logits, in float32."""
        return 3 * 4 * self.vocabulary


@dataclass(frozen=True)
class Memory:
    """Bytes by term; `activations` and `logits` are those of the batch that asks most."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def in_mib(self) -> dict[str, int]:
        """The terms and their sum in MiB."""
        return {name: round(value / MIB) for name, value in {**asdict(self), "total": self.total}.items()}

    def __str__(self) -> str:
        terms = " + ".join(f"{_shown(value)} {name}" for name, value in asdict(self).items() if value >= MIB)
        return f"{_shown(self.total)} = {terms}"


@dataclass(frozen=True)
class Demand:
    """What a run asks of its memory, beside the shape of its model."""

    width: int
    """Bytes of a number in the matrix products: 2 or 4."""
    weight_bytes: int
    """Bytes of a weight that is not quantized."""
    four_bit: bool
    checkpointing: bool
    mask: int
    """Bytes dropout remembers of a feature: none without dropout, 1 on a GPU, 4 on a CPU."""
    bin_tokens: int = 0
    """Tokens of a bin; 0 without packing."""
    processes: int = 1

    def of_batch(self, shape: Shape, positions: int, trained: int) -> tuple[int, int]:
        """Bytes of activations and of logits of a batch; `positions` counts padding too."""
        kept = positions * shape.kept_per_position(
            width=self.width, mask=self.mask, bin_tokens=self.bin_tokens
        )
        logits = trained * shape.logits_per_trained
        # What flows back through a layer: by then the logits are gone.
        working = positions * self.width * (shape.feed_forward + 2 * shape.hidden)
        if self.checkpointing:
            # The input of every layer is kept, and one layer at a time is computed anew in full.
            working += kept // shape.layers
            kept = positions * (shape.layers * self.width + 4) * shape.hidden
        kept += max(0, working - logits)
        # Weights in 4-bit are unpacked for each product, the largest of them here.
        unpacked = self.width * shape.largest_layer if self.four_bit else 0
        return kept + unpacked, logits

    def estimate(self, shape: Shape, positions: int, trained: int) -> Memory:
        """The memory of a run whose hungriest batch has so many positions and trained tokens."""
        narrow = shape.quantizable if self.four_bit else 0
        activations, logits = self.of_batch(shape, positions, trained)
        # DistributedDataParallel holds the gradients a second time, in the buckets it sends.
        gradients = ADAPTER_BYTES * shape.adapter * (2 if self.processes > 1 else 1)
        return Memory(
            weights=round((shape.parameters - narrow) * self.weight_bytes + narrow * NF4_BYTES),
            adapter=ADAPTER_BYTES * shape.adapter,
            gradients=gradients,
            optimizer=ADAM_BYTES * shape.adapter,
            activations=activations,
            logits=logits,
        )


def shape_of(config: PretrainedConfig, lora: LoraConfig) -> Shape | None:
    """The shape of a model with an adapter, from a model without weights; None where it is no plain decoder."""
    text = config.get_text_config()
    named = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    if not all(isinstance(getattr(text, name, None), int) for name in named):
        return None
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        linear = [
            module.in_features * module.out_features
            for module in base.modules()
            if isinstance(module, torch.nn.Linear) and module is not base.get_output_embeddings()
        ]
        parameters = sum(value.numel() for value in base.parameters())
        model = put_on(base, lora)
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    # Qwen3 and others normalise queries and keys too.
    per_head = any(name.endswith("q_norm") for name, _ in base.named_modules())
    return Shape(
        parameters=parameters,
        quantizable=sum(linear),
        largest_layer=max(linear, default=0),
        adapter=model.get_nb_trainable_parameters()[0],
        adapter_inputs=sum(int(layer.in_features or 0) for layer in adapted),
        adapter_ranks=sum(sum(layer.r.values()) for layer in adapted),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        head_size=head_size,
        key_value_heads=key_value_heads,
        feed_forward=(getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
        * (getattr(text, "num_experts_per_tok", None) or 1),
        normalized=2 * text.hidden_size + ((heads + key_value_heads) * head_size if per_head else 0),
        vocabulary=text.vocab_size,
    )


def checkpoint_bytes(shape: Shape) -> int:
    """Bytes of one `checkpoint-N/`: the adapter and AdamW's two moments; the rest is small."""
    return (ADAPTER_BYTES + ADAM_BYTES) * shape.adapter


# --- what was taken ------------------------------------------------------------------------------


def peak_bytes(device: str) -> int:
    """The most memory PyTorch held on the GPUs of this process; on the CPU the most the whole process held."""
    if device != "cpu":
        return sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _shown(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / MIB:.0f} MiB"
