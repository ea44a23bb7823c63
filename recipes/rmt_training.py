"""Recurrent Memory Transformers for training: a recurrent wrapper around Hugging Face modules.

A decoder's segment is `[memory][text][the same memory]` under a plain causal mask; the new memory state is the output
of the final norm at the last M rows. The answering segment is `[memory][text]`. An encoder's segment is
`[CLS][memory][SEP][text][SEP]`; the new memory state is the last hidden state of the memory rows. Every parameter lives
in the Hugging Face module, and the state dict has the names of the authors' code.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rmt_engine.errors import RMTError
from rmt_engine.memory import write_atomically


class RecipeError(RMTError):
    """A recipe that cannot be run as it was asked for, or that did not learn what it has to."""


class MemoryCell(nn.Module):
    def __init__(self, model: PreTrainedModel, memory_tokens: int) -> None:
        super().__init__()
        self.model = model
        words = model.get_input_embeddings().weight
        self.memory = nn.Parameter(torch.randn(memory_tokens, words.shape[1]) * words.std().item())


class RecurrentDecoder(nn.Module):
    """Any causal language model with memory: keys `memory_cell.memory`, `memory_cell.model.<its keys>`."""

    def __init__(self, model: PreTrainedModel, memory_tokens: int) -> None:
        super().__init__()
        self.memory_cell = MemoryCell(model, memory_tokens)

    @property
    def memory_tokens(self) -> int:
        return len(self.memory_cell.memory)

    def initial_memory(self, batch: int) -> Tensor:
        """[B, M, E]"""
        return self.memory_cell.memory.expand(batch, -1, -1)

    def named(self, converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a converted checkpoint under the names of this module's state."""
        return {
            "memory_cell.memory" if name == "memory" else f"memory_cell.model.{name}": value
            for name, value in converted.items()
        }

    def fold(self, memory: Tensor, ids: Tensor) -> Tensor:
        """The memory state after one segment: memory [B, M, E], ids [B, S] -> [B, M, E]."""
        return self.segment(memory, ids)[1]

    def segment(self, memory: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states of the read memory and the text [B, M + S, E], and the new memory state [B, M, E]."""
        hidden = self._backbone(torch.cat([memory, self._embed(ids), memory], dim=1))
        return hidden.split([hidden.shape[1] - self.memory_tokens, self.memory_tokens], dim=1)

    def answering(self, memory: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """Logits [B, R, V] of an answering segment at rows [B, R] of its text."""
        hidden = self._backbone(torch.cat([memory, self._embed(ids)], dim=1))
        rows = rows + self.memory_tokens
        return self.logits(hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[2])))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.memory_cell.model.get_output_embeddings()(hidden)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.memory_cell.model.get_input_embeddings()(ids)

    def _backbone(self, rows: Tensor) -> Tensor:
        return self.memory_cell.model.base_model(inputs_embeds=rows, use_cache=False).last_hidden_state


class RecurrentEncoder(nn.Module):
    """A BERT classifier with memory: the initial memory is the last M rows of its word embeddings."""

    def __init__(self, model: BertForSequenceClassification, memory_tokens: int, cls: int, sep: int) -> None:
        super().__init__()
        vocab = model.get_input_embeddings().num_embeddings
        model.resize_token_embeddings(vocab + memory_tokens, mean_resizing=False)
        self.model = model
        self.register_buffer("cls_token", torch.tensor([cls]))
        self.register_buffer("sep_token", torch.tensor([sep]))
        self.register_buffer("mem_token_ids", torch.arange(vocab, vocab + memory_tokens))

    @property
    def memory_tokens(self) -> int:
        return len(self.mem_token_ids)

    def initial_memory(self, batch: int) -> Tensor:
        """[B, M, E]"""
        return self.model.get_input_embeddings()(self.mem_token_ids).expand(batch, -1, -1)

    def named(self, converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a converted checkpoint under the names of this module's state."""
        state = {f"model.{name}": value for name, value in converted.items() if name != "memory"}
        words = "model.bert.embeddings.word_embeddings.weight"
        if "memory" in converted and words in state:
            state[words] = torch.cat([state[words], converted["memory"]])
        return state

    def fold(self, memory: Tensor, ids: Tensor) -> Tensor:
        """The memory state after one segment: memory [B, M, E], ids [B, S] -> [B, M, E]."""
        return self.segment(memory, ids)[1]

    def segment(self, memory: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the classifier [B, C] and the new memory state [B, M, E]."""
        words = self.model.get_input_embeddings()
        cls, sep = (words(token).expand(len(ids), -1, -1) for token in (self.cls_token, self.sep_token))
        out = self.model.bert(inputs_embeds=torch.cat([cls, memory, sep, words(ids), sep], dim=1))
        return self.model.classifier(out.pooler_output), out.last_hidden_state[:, 1 : 1 + self.memory_tokens]


def load_converted(model: RecurrentDecoder | RecurrentEncoder, converted: Mapping[str, Tensor]) -> None:
    """Takes the weights of a converted checkpoint, of the same kind and sizes. Raises RecipeError for any other."""
    state, own = model.named(converted), model.state_dict()
    needed = {name for name, _ in model.named_parameters()}  # a tied head is named once
    strange = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    if strange or needed - set(state):
        raise RecipeError(f"--from has other parameters than --kind: {sorted({*strange, *(needed - set(state))})}")
    model.load_state_dict(state, strict=False)


class MovingAverage:
    """An exponential moving average of a model's floating-point state."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = {name: value.detach().clone() for name, value in _floats(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in _floats(model).items():
            self.values[name].lerp_(value, 1 - decay)


def _floats(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def reported(main: Callable[[], None]) -> None:
    """Runs a script; what its user can mend is said in one line, exit status 1."""
    try:
        main()
    except RMTError as error:
        raise SystemExit(f"error: {error}") from None


class OneRun:
    """What a run in a folder was begun with, so that none with other settings goes on from it."""

    def __init__(
        self, path: Path, recipe: Mapping[str, object], may_change: str, sources: Mapping[str, Path | None]
    ) -> None:
        """path: where it is kept; recipe: all settings, of which one, how long to train, may be another; sources: files
        that were given. Raises RecipeError where another run was begun."""
        given = {name: source and str(source.resolve()) for name, source in sources.items()}
        settings = {name: value for name, value in recipe.items() if name != may_change}
        self.path, self.written = path, json.dumps({**settings, **given}, indent=2).encode() + b"\n"
        if not path.exists():
            return
        kept = json.loads(path.read_bytes())
        other = [name for name, value in json.loads(self.written).items() if kept.get(name) != value]
        if other:
            raise RecipeError(f"{path.parent} is of a run with other settings ({', '.join(other)}): give another --out")

    def keep(self) -> None:
        write_atomically(self.path, self.written)


def log(**values: object) -> None:
    print(json.dumps(values), flush=True)


def save_whole(state: object, path: Path) -> None:
    """torch.save, the file replaced in one move."""
    partial = path.with_name(path.name + ".tmp")
    torch.save(state, partial)
    os.replace(partial, path)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """tokenizer.save_pretrained, each file replaced in one move. `tokenizer.json` is last: with it all are there."""
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        tokenizer.save_pretrained(partial)
        for path in sorted(Path(partial).rglob("*"), key=lambda path: path.name == "tokenizer.json"):
            if path.is_file():
                final = folder / path.relative_to(partial)
                final.parent.mkdir(exist_ok=True)
                os.replace(path, final)


def save_checkpoint(
    out: Path,
    model: RecurrentDecoder | RecurrentEncoder,
    weights: dict[str, Tensor],
    base_config: dict[str, object],
    tokenizer: PreTrainedTokenizerBase,
    described: dict[str, object],
) -> None:
    """The authors' container `model_best/`, `base/` with the backbone's config and tokenizer, and `recipe.json`.

    weights replace those of the model's state dict, so that an average can be saved. Each file is replaced in one move.
    """
    base, best = out / "base", out / "model_best"
    for folder in (base, best):
        folder.mkdir(parents=True, exist_ok=True)
    state = {name: weights.get(name, value).detach().cpu().clone() for name, value in model.state_dict().items()}
    if isinstance(model, RecurrentEncoder):
        state["model.embeddings.weight"] = state["model.bert.embeddings.word_embeddings.weight"]
    save_whole(state, best / "pytorch_model.bin")
    save_tokenizer(tokenizer, base)
    for path, values in ((base / "config.json", base_config), (out / "recipe.json", described)):
        write_atomically(path, json.dumps(values, indent=2).encode() + b"\n")
