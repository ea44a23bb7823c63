"""Tiny recurrent-memory checkpoints, built on Hugging Face models and written as the authors' code writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import ReferenceDecoder, ReferenceEncoder, SpecialIds
from safetensors.torch import save_file, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rmt_engine.config import RMTConfig

DECODER_VOCAB = 271  # 256 bytes and some more: odd, so that nothing divides it
ENCODER_VOCAB = 97
SPECIAL = SpecialIds(pad=0, cls=2, sep=3)
LABELS = 6

# name in the wrapped model -> name of the tensor that is the same when tied
TIED = {
    "gpt2": {"lm_head.weight": "transformer.wte.weight"},
    "llama": {"lm_head.weight": "model.embed_tokens.weight"},
    "bert": {},
}


@dataclass
class TinyCheckpoint:
    """A wrapped model and the facts a test needs.

    memory [M, E] is the initial state (for an encoder: the last rows of `model`'s word embeddings, which have V + M).
    backbone is the complete Hugging Face config of the model *before* it was wrapped.
    """

    family: str
    model_type: str
    model: torch.nn.Module
    memory: Tensor
    backbone: dict[str, Any]

    @property
    def num_mem_tokens(self) -> int:
        return len(self.memory)

    @property
    def tied(self) -> dict[str, str]:
        return TIED[self.model_type] if self.backbone["tie_word_embeddings"] else {}

    def weights(self) -> dict[str, Tensor]:
        """Canonical names -> tensors, as the checkpoint loader must give them."""
        weights = {name: t.detach().clone() for name, t in self.model.state_dict().items() if name not in self.tied}
        if self.family == "encoder_classifier":
            words = "bert.embeddings.word_embeddings.weight"
            weights[words] = weights[words][: -self.num_mem_tokens].clone()
        return {**weights, "memory": self.memory.detach().clone()}

    def rmt_config(self, segment_size: int, alignment: str | None = None, **more: Any) -> RMTConfig:
        if self.family == "encoder_classifier":
            more = {"cls_id": SPECIAL.cls, "sep_id": SPECIAL.sep, "drop_ids": tuple(sorted(SPECIAL.dropped())), **more}
        alignment = alignment or ("left" if self.family == "decoder" else "right")
        return RMTConfig(self.family, self.backbone, self.num_mem_tokens, segment_size, alignment, **more)  # type: ignore[arg-type]

    def reference(self, segment_size: int, alignment: str | None = None) -> ReferenceDecoder | ReferenceEncoder:
        if self.family == "decoder":
            return ReferenceDecoder(self.model, self.memory, segment_size, alignment or "left")
        input_size = segment_size + self.num_mem_tokens + 3
        return ReferenceEncoder(self.model, self.num_mem_tokens, SPECIAL, input_size, alignment or "right")

    def state_dict(self) -> dict[str, Tensor]:
        """What `state_dict()` of the authors' wrapper gives: every name, tied ones too."""
        inner = self.model.state_dict()
        if self.family == "decoder":
            return {"memory_cell.memory": self.memory, **{f"memory_cell.model.{k}": v for k, v in inner.items()}}
        vocab = len(inner["bert.embeddings.word_embeddings.weight"]) - self.num_mem_tokens
        return {
            "cls_token": torch.tensor([SPECIAL.cls]),
            "sep_token": torch.tensor([SPECIAL.sep]),
            "mem_token_ids": torch.arange(vocab, vocab + self.num_mem_tokens),
            **{f"model.{k}": v for k, v in inner.items()},
            "model.embeddings.weight": inner["bert.embeddings.word_embeddings.weight"],
        }

    def aliases(self) -> tuple[str, str] | None:
        """The two names under which one and the same tensor stands in `state_dict()`, if there are any."""
        if self.family == "encoder_classifier":
            return "model.embeddings.weight", "model.bert.embeddings.word_embeddings.weight"
        pairs = [(f"memory_cell.model.{a}", f"memory_cell.model.{b}") for a, b in self.tied.items()]
        return pairs[0] if pairs else None


def tiny_decoder(
    model_type: str,
    seed: int = 0,
    *,
    tied: bool | None = None,
    num_mem_tokens: int = 4,
    noise: str = "norms",
    positions: int = 128,
    layers: int = 3,
    rope: str = "default",
    **overrides: Any,
) -> TinyCheckpoint:
    """`gpt2` or `llama` (GQA: 4 heads over 2; `rope="llama3"` scales it), 32 wide.

    noise: `norms` leaves matrices as initialised and moves biases and norms; `all` moves every weight by 0.05.
    """
    torch.manual_seed(seed)
    tied = model_type == "gpt2" if tied is None else tied
    common = {"vocab_size": DECODER_VOCAB, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}
    model: torch.nn.Module
    if model_type == "gpt2":
        shape = {"n_embd": 32, "n_head": 4, "n_layer": layers, "n_positions": positions}
        model = GPT2LMHeadModel(GPT2Config(**{**common, **shape, **overrides}))
    else:
        shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 56}
        shape |= {"num_hidden_layers": layers, "max_position_embeddings": positions}
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = positions // 8
        rope_args = {"rope_theta": 500.0, "rope_scaling": scaling} if rope == "llama3" else {"rope_theta": 10000.0}
        model = LlamaForCausalLM(LlamaConfig(**{**common, **shape, **rope_args, **overrides}))
    _prepare(model, noise)
    words = model.get_input_embeddings().weight
    memory = torch.randn(num_mem_tokens, words.shape[1]) * words.std().detach()
    return TinyCheckpoint("decoder", model_type, model, memory, plain_config(model))


def tiny_encoder(
    model_type: str = "bert",
    seed: int = 0,
    *,
    num_mem_tokens: int = 4,
    noise: str = "norms",
    positions: int = 64,
    layers: int = 3,
    labels: int = LABELS,
    **overrides: Any,
) -> TinyCheckpoint:
    """`bert` with a classifier, 32 wide, its word embeddings extended by the memory rows."""
    assert model_type == "bert", model_type
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 56, "num_hidden_layers": layers}
    shape |= {"vocab_size": ENCODER_VOCAB, "max_position_embeddings": positions, "num_labels": labels}
    model = BertForSequenceClassification(BertConfig(**{**shape, **overrides}))
    backbone = plain_config(model)
    model.resize_token_embeddings(ENCODER_VOCAB + num_mem_tokens, mean_resizing=False)
    _prepare(model, noise)
    memory = model.get_input_embeddings().weight[-num_mem_tokens:].detach().clone()
    return TinyCheckpoint("encoder_classifier", model_type, model, memory, backbone)


def plain_config(model: torch.nn.Module) -> dict[str, Any]:
    """A model's config as config.json holds it, without what says where it came from."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}


def _prepare(model: torch.nn.Module, noise: str) -> None:
    model.set_attn_implementation("eager")
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        vector = parameter.ndim == 1
        if vector or noise == "all":
            parameter += torch.randn_like(parameter) * (0.1 if vector else 0.05)


# Containers. Each takes the state dict to write, so that a test can damage it first.


def save_trainer_dict(path: Path, state: Mapping[str, Tensor]) -> Path:
    """model_best.pth of the first code: weights, optimizer, and metrics that are numpy scalars."""
    moments = {0: {"step": 7, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]}
    torch.save(
        {
            "model_state_dict": dict(state),
            "optimizer_state_dict": optimizer,
            "iteration": 100,
            "epoch": 1,
            "metrics": {"loss": np.mean([1.0, 2.0]), "exact_match": np.float64(0.5)},
            "lr_scheduler_state_dict": {"base_lrs": [1e-4], "last_epoch": 100, "lr_lambdas": [{}]},
        },
        path,
    )
    return path


def save_flat(path: Path, state: Mapping[str, Tensor]) -> Path:
    torch.save(dict(state), path)
    return path


def save_accelerate_bin(folder: Path, state: Mapping[str, Tensor]) -> Path:
    """model_best/ of accelerate: weights beside files that only its own code may unpickle."""
    folder.mkdir(parents=True)
    save_flat(folder / "pytorch_model.bin", state)
    for name in ("trainer.pckl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin"):
        (folder / name).write_bytes(b"\x80\x04not to be read")
    return folder


def save_safetensors(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone().contiguous() for k, v in state.items()}, path, {"format": "pt", **(metadata or {})})
    return path


class _Wrapped(torch.nn.Module):
    """A module whose state dict has the authors' names, so that `save_model` can drop tied ones by its own rule."""

    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__()
        self.state = dict(state)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return dict(self.state)


def save_by_save_model(path: Path, state: Mapping[str, Tensor]) -> Path:
    """safetensors' own `save_model`: one of two tied names is dropped and noted in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(_Wrapped(state), str(path))
    return path


def save_sharded(folder: Path, state: Mapping[str, Tensor], shards: int = 3, kind: str = "safetensors") -> Path:
    folder.mkdir(parents=True)
    names = sorted(state)
    size = math.ceil(len(names) / shards)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map = {}
    for number, start in enumerate(range(0, len(names), size), start=1):
        part = {name: state[name] for name in names[start : start + size]}
        file = f"{stem}-{number:05d}-of-{shards:05d}.{suffix}"
        weight_map |= dict.fromkeys(part, file)
        if kind == "safetensors":
            save_safetensors(folder / file, part)
        else:
            save_flat(folder / file, part)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


# The backbone's own Hugging Face folder: config and tokenizer.


def save_base(folder: Path, tiny: TinyCheckpoint, *, tokenizer: str = "fast", **config: Any) -> Path:
    """tokenizer: `fast` (tokenizer.json), `slow` (only the vocabulary files) or `none`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**tiny.backbone, **config}))
    if tokenizer == "none":
        return folder
    bert = tiny.family == "encoder_classifier"
    if tokenizer == "fast":
        (bert_tokenizer() if bert else byte_tokenizer()).save(str(folder / "tokenizer.json"))
    elif bert:
        (folder / "vocab.txt").write_text("\n".join(bert_vocab()) + "\n")
    else:
        (folder / "vocab.json").write_text(json.dumps(byte_vocab(), ensure_ascii=False))
        (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"eos_token": "<end>", "bos_token": "<end>", "unk_token": "<end>"}
    if bert:
        special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    kind = {"bert": "BertTokenizer", "gpt2": "GPT2Tokenizer", "llama": "PreTrainedTokenizerFast"}[tiny.model_type]
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **special}))
    return folder


def byte_vocab() -> dict[str, int]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: i for i, token in enumerate(["<end>", *alphabet])}


def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=byte_vocab(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def bert_vocab() -> list[str]:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), ".", "?", ","]
    return words + [f"[unused{i}]" for i in range(ENCODER_VOCAB - len(words))]


def bert_tokenizer() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(bert_vocab())}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer
