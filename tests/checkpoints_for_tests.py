"""Tiny recurrent-memory checkpoints, built on Hugging Face models and written as the authors' code writes them."""

from __future__ import annotations

import json
import math
import re
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
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rmt_engine.config import RMTConfig

DECODER_VOCAB = 271  # 256 bytes and some more: odd, so that nothing divides it
ENCODER_VOCAB = 97
SPECIAL = SpecialIds(pad=0, cls=2, sep=3)
# RoBERTa has one token for two purposes, and its authors' mask then keeps it.
SPECIALS = {"bert": SPECIAL, "roberta": SpecialIds(pad=1, cls=0, sep=2, bos=0, eos=2)}
LABELS = 6

CLASSES: dict[str, tuple[Any, Any]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "bert": (BertConfig, BertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
}

# a decoder's word embeddings, which a tied head shares; of all others Llama's
WORDS = {"gpt2": "transformer.wte.weight", "gpt_neox": "gpt_neox.embed_in.weight"}


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
    def special(self) -> SpecialIds:
        """The encoder's own tokens."""
        return SPECIALS[self.model_type]

    @property
    def words(self) -> str:
        """The encoder's word embeddings, in the wrapped model."""
        return f"{self.model_type}.embeddings.word_embeddings.weight"

    @property
    def tied(self) -> dict[str, str]:
        """Name in the wrapped model -> name of the tensor that is the same."""
        if self.family != "decoder" or not self.backbone["tie_word_embeddings"]:
            return {}
        return {"lm_head.weight": WORDS.get(self.model_type, "model.embed_tokens.weight")}

    def weights(self) -> dict[str, Tensor]:
        """Canonical names -> tensors, as the checkpoint loader must give them."""
        weights = {name: t.detach().clone() for name, t in self.model.state_dict().items() if name not in self.tied}
        if self.family == "encoder_classifier":
            weights[self.words] = weights[self.words][: -self.num_mem_tokens].clone()
        return {**weights, "memory": self.memory.detach().clone()}

    def rmt_config(self, segment_size: int, alignment: str | None = None, **more: Any) -> RMTConfig:
        if self.family == "encoder_classifier":
            own, dropped = self.special, tuple(sorted(self.special.dropped()))
            more = {"cls_id": own.cls, "sep_id": own.sep, "drop_ids": dropped, **more}
        alignment = alignment or ("left" if self.family == "decoder" else "right")
        return RMTConfig(self.family, self.backbone, self.num_mem_tokens, segment_size, alignment, **more)  # type: ignore[arg-type]

    def reference(self, segment_size: int, alignment: str | None = None) -> ReferenceDecoder | ReferenceEncoder:
        if self.family == "decoder":
            return ReferenceDecoder(self.model, self.memory, segment_size, alignment or "left")
        input_size = segment_size + self.num_mem_tokens + 3
        return ReferenceEncoder(self.model, self.num_mem_tokens, self.special, input_size, alignment or "right")

    def state_dict(self) -> dict[str, Tensor]:
        """What `state_dict()` of the authors' wrapper gives: every name, tied ones too."""
        inner = self.model.state_dict()
        if self.family == "decoder":
            return {"memory_cell.memory": self.memory, **{f"memory_cell.model.{k}": v for k, v in inner.items()}}
        vocab = len(inner[self.words]) - self.num_mem_tokens
        own = {name: getattr(self.special, name) for name in ("cls", "sep", "eos", "bos")}
        return {
            **{f"{name}_token": torch.tensor([i]) for name, i in own.items() if i is not None},
            "mem_token_ids": torch.arange(vocab, vocab + self.num_mem_tokens),
            **{f"model.{k}": v for k, v in inner.items()},
            "model.embeddings.weight": inner[self.words],
        }

    def aliases(self) -> tuple[str, str] | None:
        """The two names under which one and the same tensor stands in `state_dict()`, if there are any."""
        if self.family == "encoder_classifier":
            return "model.embeddings.weight", f"model.{self.words}"
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
    """A decoder of `CLASSES`, 32 wide, 4 heads (over 2 of keys and values, but for gpt2 and gpt_neox).

    noise: `norms` leaves matrices as initialised and moves biases and norms; `all` moves every weight by 0.05.
    rope: `llama3` scales the rotary positions. overrides: of the config.
    """
    torch.manual_seed(seed)
    make_config, make_model = CLASSES[model_type]
    tied = model_type == "gpt2" if tied is None else tied
    shape = {"vocab_size": DECODER_VOCAB, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}
    if model_type == "gpt2":
        shape |= {"n_embd": 32, "n_head": 4, "n_layer": layers, "n_positions": positions}
    else:
        shape |= {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 56}
        shape |= {"num_hidden_layers": layers, "max_position_embeddings": positions}
        shape |= {"rope_parameters": _rope(rope, positions)}
    if model_type == "gpt_neox":
        del shape["num_key_value_heads"]
    if model_type == "qwen3":
        shape["head_dim"] = 12  # not hidden_size over heads
    model: torch.nn.Module = make_model(make_config(**{**shape, **overrides}))
    _prepare(model, noise)
    words = model.get_input_embeddings().weight
    memory = torch.randn(num_mem_tokens, words.shape[1]) * words.std().detach()
    return TinyCheckpoint("decoder", model_type, model, memory, plain_config(model))


def _rope(kind: str, positions: int) -> dict[str, Any]:
    if kind == "default":
        return {"rope_type": "default", "rope_theta": 10000.0}
    scaling = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
    return {**scaling, "high_freq_factor": 4.0, "original_max_position_embeddings": positions // 8}


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
    """`bert` or `roberta` with a classifier, 32 wide, its word embeddings extended by the memory rows."""
    torch.manual_seed(seed)
    make_config, make_model = CLASSES[model_type]
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 56, "num_hidden_layers": layers}
    shape |= {"vocab_size": ENCODER_VOCAB, "max_position_embeddings": positions, "num_labels": labels}
    shape |= {"pad_token_id": SPECIALS[model_type].pad, "type_vocab_size": 2 if model_type == "bert" else 1}
    model = make_model(make_config(**{**shape, **overrides}))
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


def with_lora(
    tiny: TinyCheckpoint, layers: str, *, rank: int = 3, scale: float = 2.0, saved: str = "", old: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict of `tiny` under peft, and the canonical weights once the pairs are merged.

    layers: pattern of the modules that have a pair; saved: of those trained whole. The pairs' product counts `scale`
    times. old: names as peft wrote them before version 0.7, without base_layer.
    """
    outer, weights = "memory_cell.model." if tiny.family == "decoder" else "model.", tiny.weights()
    conv1d, state = tiny.model_type == "gpt2", {}
    for name, tensor in tiny.state_dict().items():
        module, _, kind = name.removeprefix(outer).rpartition(".")
        wrapped = f"{outer}base_model.model.{module}"
        if not name.startswith(outer) or module == "embeddings":
            state[name] = tensor
        elif saved and re.fullmatch(saved, module):
            state[f"{wrapped}.original_module.{kind}"] = torch.full_like(tensor, 7.0)
            state[f"{wrapped}.modules_to_save.default.{kind}"] = tensor
        elif not re.fullmatch(layers, module):
            state[f"{wrapped}.{kind}"] = tensor
        else:
            state[f"{wrapped}.{kind}" if old else f"{wrapped}.base_layer.{kind}"] = tensor
            if kind == "weight":
                inputs, outputs = tensor.shape if conv1d else tensor.shape[::-1]
                a, b = torch.randn(rank, inputs) * 0.1, torch.randn(outputs, rank) * 0.1
                state |= {f"{wrapped}.lora_A.default.weight": a, f"{wrapped}.lora_B.default.weight": b}
                product = scale * (a.T @ b.T)  # x -> x · product, as the layer adds it
                weights[f"{module}.weight"] = tensor + (product if conv1d else product.T)
    return state, weights


# The backbone's own Hugging Face folder: config and tokenizer.


def save_base(folder: Path, tiny: TinyCheckpoint, *, tokenizer: str = "fast", **config: Any) -> Path:
    """tokenizer: `fast` (tokenizer.json), `slow` (only the vocabulary files) or `none`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**tiny.backbone, **config}))
    if tokenizer == "none":
        return folder
    made = {"bert": bert_tokenizer, "roberta": roberta_tokenizer}.get(tiny.model_type, byte_tokenizer)()
    if tokenizer == "fast":
        made.save(str(folder / "tokenizer.json"))
    elif tiny.model_type == "bert":
        (folder / "vocab.txt").write_text("\n".join(bert_vocab()) + "\n")
    else:
        (folder / "vocab.json").write_text(json.dumps(made.get_vocab(), ensure_ascii=False))
        (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"eos_token": "<end>", "bos_token": "<end>", "unk_token": "<end>"}
    if tiny.model_type == "bert":
        special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    if tiny.model_type == "roberta":
        special = dict.fromkeys(("bos_token", "cls_token"), "<s>") | dict.fromkeys(("eos_token", "sep_token"), "</s>")
        special |= {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "mask")}
    kinds = {"bert": "BertTokenizer", "roberta": "RobertaTokenizer", "gpt2": "GPT2Tokenizer"}
    kind = kinds.get(tiny.model_type, "PreTrainedTokenizerFast")
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


ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def roberta_tokenizer() -> Tokenizer:
    """Byte-level as RoBERTa's, over as many bytes as fit into the vocabulary: the printable ones first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (not c.isascii() and c != "Ġ", c))
    vocab = {token: i for i, token in enumerate([*ROBERTA_SPECIAL, *alphabet][:ENCODER_VOCAB])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(ROBERTA_SPECIAL)
    return tokenizer
