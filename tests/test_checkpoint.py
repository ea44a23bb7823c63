"""Every container and alias becomes the same tensors; everything else becomes an error that says what to do."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_for_tests import (
    DECODER_VOCAB,
    ENCODER_VOCAB,
    LABELS,
    SPECIAL,
    TinyCheckpoint,
    save_accelerate_bin,
    save_base,
    save_by_save_model,
    save_flat,
    save_safetensors,
    save_sharded,
    save_trainer_dict,
    tiny_decoder,
    tiny_encoder,
    with_lora,
)
from torch import Tensor

from rmt_engine.checkpoint import convert, inspect, load, read_tensors
from rmt_engine.config import RMTConfig
from rmt_engine.errors import CheckpointError

S = 12
State = dict[str, Tensor]


@lru_cache
def tiny(name: str) -> TinyCheckpoint:
    small: dict[str, Any] = {"layers": 2}
    return {
        "gpt2": lambda: tiny_decoder("gpt2", tied=True, **small),
        "gpt2-untied": lambda: tiny_decoder("gpt2", tied=False, **small),
        "llama": lambda: tiny_decoder("llama", tied=False, **small),
        "llama-tied": lambda: tiny_decoder("llama", tied=True, rope="llama3", **small),
        "gpt_neox": lambda: tiny_decoder("gpt_neox", tied=False, **small),
        "gpt_neox-tied": lambda: tiny_decoder("gpt_neox", tied=True, use_parallel_residual=False, **small),
        "mistral": lambda: tiny_decoder("mistral", sliding_window=S + 8, **small),
        "qwen2": lambda: tiny_decoder("qwen2", tied=True, **small),
        "qwen3": lambda: tiny_decoder("qwen3", **small),
        "bert": lambda: tiny_encoder("bert", **small),
        "roberta": lambda: tiny_encoder("roberta", **small),
    }[name]()


ENCODERS = ["bert", "roberta"]
NAMES = [
    "gpt2",
    "gpt2-untied",
    "llama",
    "llama-tied",
    "gpt_neox",
    "gpt_neox-tied",
    "mistral",
    "qwen2",
    "qwen3",
    *ENCODERS,
]

CONTAINERS: dict[str, Callable[[Path, State], Path]] = {
    "model_best.pth": lambda d, s: save_trainer_dict(d / "model_best.pth", s),
    "flat.pt": lambda d, s: save_flat(d / "flat.pt", s),
    "accelerate bin": lambda d, s: save_accelerate_bin(d / "model_best", s),
    "folder over accelerate": lambda d, s: save_accelerate_bin(d / "run" / "model_best", s).parent,
    "safetensors": lambda d, s: save_safetensors(d / "model.safetensors", s),
    "accelerate safetensors": lambda d, s: save_safetensors(d / "best" / "model.safetensors", s).parent,
    "shards": lambda d, s: save_sharded(d / "shards", s),
    "bin shards": lambda d, s: save_sharded(d / "shards", s, kind="bin"),
    "no extension": lambda d, s: save_safetensors(d / "blob", s),
}


def same(a: State, b: State) -> None:
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def base_of(checkpoint: TinyCheckpoint, folder: Path, **options: Any) -> Path:
    return save_base(folder / "base", checkpoint, **options)


def alias_states(checkpoint: TinyCheckpoint) -> dict[str, State]:
    state, names = checkpoint.state_dict(), checkpoint.aliases()
    if names is None:
        return {"": state}
    return {
        "both": state,
        **{f"only {kept}": {n: t for n, t in state.items() if n != other} for kept, other in (names, names[::-1])},
    }


# Round trips


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_container_and_alias_gives_the_same_weights(name: str, container: str, tmp_path: Path) -> None:
    checkpoint = tiny(name)
    base = base_of(checkpoint, tmp_path, tokenizer="none")
    expected = checkpoint.rmt_config(S, stop_ids=(0,) if checkpoint.family == "decoder" else ())
    for i, state in enumerate(alias_states(checkpoint).values()):
        (tmp_path / str(i)).mkdir()
        config, weights = load(CONTAINERS[container](tmp_path / str(i), state), base=base, segment_size=S)
        same(weights, checkpoint.weights())
        if checkpoint.family == "decoder":
            assert config == expected


@pytest.mark.parametrize("name", NAMES)
def test_save_model_of_safetensors_drops_a_name_and_it_is_found_again(name: str, tmp_path: Path) -> None:
    checkpoint = tiny(name)
    path = save_by_save_model(tmp_path / "model.safetensors", checkpoint.state_dict())
    _, weights = load(path, base=base_of(checkpoint, tmp_path), segment_size=S)
    same(weights, checkpoint.weights())


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_folder_loads_to_the_same_tensors(name: str, tmp_path: Path) -> None:
    checkpoint = tiny(name)
    path = save_trainer_dict(tmp_path / "model_best.pth", checkpoint.state_dict())
    base = base_of(checkpoint, tmp_path)
    done = convert(path, tmp_path / "out", base, segment_size=S, alignment="center", ask_template="Q: {question}\nA:")
    config, weights = load(tmp_path / "out")
    same(weights, checkpoint.weights())
    assert config == done.config
    assert (config.alignment, config.ask_template, config.segment_size) == ("center", "Q: {question}\nA:", S)
    assert done.has_tokenizer and done.parameters == sum(t.numel() for t in weights.values())
    assert sorted(os.listdir(tmp_path / "out")) == list(done.files)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    direct, _ = load(path, base=base, segment_size=S, alignment="center", ask_template="Q: {question}\nA:")
    assert direct == config


@pytest.mark.parametrize(("name", "drop_ids"), [("bert", (0, 2, 3)), ("roberta", (1,))])
def test_the_encoder_config_follows_its_buffers_tokenizer_and_classifier(
    name: str, drop_ids: tuple[int, ...], tmp_path: Path
) -> None:
    checkpoint = tiny(name)
    nameless = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    base = base_of(checkpoint, tmp_path, **nameless)
    path = save_flat(tmp_path / "pytorch_model.bin", checkpoint.state_dict())
    config, weights = load(path, base=base, input_size=40)
    assert config.segment_size == 40 - 4 - 3
    assert (config.cls_id, config.sep_id, config.drop_ids) == (checkpoint.special.cls, checkpoint.special.sep, drop_ids)
    assert config.alignment == "right"
    assert config.labels == [f"LABEL_{i}" for i in range(LABELS)]
    assert config.backbone["vocab_size"] == ENCODER_VOCAB == len(weights[checkpoint.words])


@pytest.mark.parametrize("name", ENCODERS)
def test_a_base_that_counts_the_memory_rows_is_understood(name: str, tmp_path: Path) -> None:
    checkpoint = tiny(name)
    base = base_of(checkpoint, tmp_path, vocab_size=ENCODER_VOCAB + 4)
    path = save_flat(tmp_path / "w.pth", checkpoint.state_dict())
    config, weights = load(path, base=base, segment_size=S)
    assert config.backbone["vocab_size"] == ENCODER_VOCAB
    same(weights, checkpoint.weights())


def test_an_id_that_serves_two_purposes_is_not_dropped(tmp_path: Path) -> None:
    checkpoint = tiny("bert")
    state = checkpoint.state_dict() | {"bos_token": torch.tensor([SPECIAL.cls]), "eos_token": torch.tensor([5])}
    base = base_of(checkpoint, tmp_path, tokenizer="none")
    config, _ = load(save_flat(tmp_path / "w.pth", state), base=base, segment_size=S)
    assert config.drop_ids == (SPECIAL.pad, SPECIAL.sep, 5)


def test_wrappers_and_old_buffers_do_not_matter(tmp_path: Path) -> None:
    for name, old in {
        "gpt2": {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).byte(),
            "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
        },
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        "gpt_neox": {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8).bool(),
            "gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(1),
        },
        "bert": {"bert.embeddings.position_ids": torch.arange(64)[None]},
        "roberta": {"roberta.embeddings.position_ids": torch.arange(64)[None]},
    }.items():
        checkpoint = tiny(name)
        prefix = "model." if name in ENCODERS else "memory_cell.model."
        state = {**checkpoint.state_dict(), **{prefix + key: value for key, value in old.items()}}
        state = {"module." + key.replace("model.", "model._orig_mod.", 1): value for key, value in state.items()}
        (tmp_path / name).mkdir()
        path = save_flat(tmp_path / name / "w.pth", state)
        _, weights = load(path, base=base_of(checkpoint, tmp_path / name), segment_size=S)
        same(weights, checkpoint.weights())


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_neox-tied"])
def test_the_older_name_of_a_head(name: str, tmp_path: Path) -> None:
    checkpoint = tiny(name)
    base, state, inner = base_of(checkpoint, tmp_path), checkpoint.state_dict(), "memory_cell.model."
    head = state.pop(inner + "lm_head.weight")
    path = save_flat(tmp_path / "w.pth", {**state, inner + "embed_out.weight": head})
    same(load(path, base=base, segment_size=S)[1], checkpoint.weights())
    both = {**state, inner + "embed_out.weight": head, inner + "lm_head.weight": head + 1}
    with pytest.raises(CheckpointError, match=r"different: embed_out.weight and lm_head.weight"):
        load(save_flat(tmp_path / "both.pth", both), base=base, segment_size=S)


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta"])
def test_a_tokenizer_json_is_made_from_older_files(name: str, tmp_path: Path) -> None:
    checkpoint = tiny(name)
    base = base_of(checkpoint, tmp_path, tokenizer="slow")
    path = save_flat(tmp_path / "w.pth", checkpoint.state_dict())
    assert convert(path, tmp_path / "out", base, segment_size=S).has_tokenizer
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("a cab").ids


def test_stop_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    checkpoint = tiny("llama")
    base = base_of(checkpoint, tmp_path)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7, DECODER_VOCAB]}))
    path = save_flat(tmp_path / "w.pth", checkpoint.state_dict())
    assert load(path, base=base, segment_size=S)[0].stop_ids == (3, 7)
    assert load(path, base=base, segment_size=S, stop_ids=[9])[0].stop_ids == (9,)


def test_rope_scaling_is_normalised(tmp_path: Path) -> None:
    checkpoint = tiny("llama-tied")
    old = {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}
    old["rope_scaling"] |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # type: ignore[operator]
    base = save_base(tmp_path / "base", checkpoint, **old)
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    (base / "config.json").write_text(json.dumps(config))
    path = save_flat(tmp_path / "w.pth", checkpoint.state_dict())
    backbone = load(path, base=base, segment_size=S)[0].backbone
    assert backbone["rope_parameters"]["rope_type"] == "llama3"
    assert backbone["rope_parameters"]["rope_theta"] == 500.0
    assert backbone["rope_parameters"]["factor"] == 8.0


def test_dtype_is_kept_or_changed(tmp_path: Path) -> None:
    checkpoint = tiny("llama")
    state = {name: t.bfloat16() for name, t in checkpoint.state_dict().items()}
    path, base = save_flat(tmp_path / "w.pth", state), base_of(checkpoint, tmp_path)
    assert {t.dtype for t in load(path, base=base, segment_size=S)[1].values()} == {torch.bfloat16}
    assert {t.dtype for t in load(path, base=base, segment_size=S, dtype=torch.float32)[1].values()} == {torch.float32}


def test_a_converted_folder_needs_no_transformers(tmp_path: Path) -> None:
    checkpoint = tiny("gpt2")
    path = save_flat(tmp_path / "w.pth", checkpoint.state_dict())
    convert(path, tmp_path / "out", base_of(checkpoint, tmp_path), segment_size=S)
    code = (
        "import sys; from rmt_engine.checkpoint import inspect, load; load(sys.argv[1]); "
        "assert inspect(sys.argv[1])['runs']; assert not {'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True)


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    checkpoint = tiny("gpt2")
    path, base = save_flat(tmp_path / "w.pth", checkpoint.state_dict()), base_of(checkpoint, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    convert(path, out, base, segment_size=S)
    with pytest.raises(ValueError, match=r"holds a converted checkpoint: give another folder, or force"):
        convert(path, out, base, segment_size=S)
    convert(path, out, base, segment_size=S + 1, force=True)
    assert load(out)[0].segment_size == S + 1
    with pytest.raises(ValueError, match=r"holds something else: give another folder"):
        convert(path, base, base, segment_size=S, force=True)
    with pytest.raises(ValueError, match=r"is a file"):
        convert(path, path, base, segment_size=S)
    with pytest.raises(ValueError, match=r"converted already"):
        convert(out, tmp_path / "again", base, segment_size=S)


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny("gpt2")
    path, base = save_flat(tmp_path / "w.pth", checkpoint.state_dict()), base_of(checkpoint, tmp_path)
    convert(path, tmp_path / "out", base, segment_size=S)
    before = sorted(os.listdir(tmp_path))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    for place in ("save_file", "_sync", "_put"):
        monkeypatch.setattr(f"rmt_engine.checkpoint.conversion.{place}", full)
        with pytest.raises(OSError, match=r"No space"):
            convert(path, tmp_path / "out", base, segment_size=S + 1, force=True)
        monkeypatch.undo()
        assert sorted(os.listdir(tmp_path)) == before
        assert load(tmp_path / "out")[0].segment_size == S


# LoRA

LORA = [
    ("gpt2", r".*\.attn\.c_\w+", "", False),  # Conv1D, one of them square
    ("gpt2-untied", r".*\.c_attn", "lm_head", True),
    ("llama", r".*\.[qv]_proj", "", False),
    ("llama-tied", r".*\.(q|down)_proj", "", True),
    ("bert", r".*\.(query|value)", "classifier", False),
    ("gpt_neox", r".*\.query_key_value", "", False),
    ("qwen3", r".*\.[qkvo]_proj", "lm_head", False),
    ("roberta", r".*\.(query|value)", r"classifier\.\w+", True),
]


def settings(folder: Path, **more: Any) -> None:
    adapter = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_dora": False, "fan_in_fan_out": False, **more}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


def near(ours: State, truth: State) -> None:
    assert sorted(ours) == sorted(truth)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, truth[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "layers", "saved", "old"), LORA)
def test_lora_pairs_are_merged(name: str, layers: str, saved: str, old: bool, tmp_path: Path) -> None:
    checkpoint = tiny(name)
    state, truth = with_lora(checkpoint, layers, saved=saved, old=old)
    pairs = sum("lora_A" in key for key in state)
    assert pairs >= 2 and any("modules_to_save" in key for key in state) == bool(saved)
    path, base = save_accelerate_bin(tmp_path / "model_best", state), base_of(checkpoint, tmp_path)
    settings(path)
    near(load(path, base=base, segment_size=S)[1], truth)
    assert inspect(path)["lora_pairs"] == pairs and "convert" in inspect(path)
    near(load(convert(path, tmp_path / "out", base, segment_size=S).folder)[1], truth)


def test_the_scale_of_lora(tmp_path: Path) -> None:
    checkpoint = tiny("llama")
    base = base_of(checkpoint, tmp_path)
    for rank, alpha, root, scale in ((4, 6, False, 1.5), (4, 6, True, 3.0), (2, 0.5, False, 0.25), (1, 0, False, 0.0)):
        state, truth = with_lora(checkpoint, r".*\.q_proj", rank=rank, scale=scale)
        path = save_flat(tmp_path / "w.pth", state)
        settings(tmp_path, lora_alpha=alpha, use_rslora=root, r=99)  # each pair's own rank counts
        near(load(path, base=base, segment_size=S)[1], truth)


def test_lora_of_an_embedding(tmp_path: Path) -> None:
    checkpoint = tiny("llama")
    state, truth = checkpoint.state_dict(), checkpoint.weights()
    words = "memory_cell.model.base_model.model.model.embed_tokens"
    a, b = torch.randn(3, DECODER_VOCAB), torch.randn(32, 3)
    state = {name.replace("memory_cell.model.", "memory_cell.model.base_model.model."): t for name, t in state.items()}
    state[f"{words}.base_layer.weight"] = state.pop(f"{words}.weight")
    state |= {f"{words}.lora_embedding_A.default": a, f"{words}.lora_embedding_B.default": b}
    truth["model.embed_tokens.weight"] = truth["model.embed_tokens.weight"] + 2 * (b @ a).T
    settings(tmp_path)
    near(load(save_flat(tmp_path / "w.pth", state), base=base_of(checkpoint, tmp_path), segment_size=S)[1], truth)


def test_adapters_that_cannot_be_merged_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny("gpt2")
    base = base_of(checkpoint, tmp_path)
    good, _ = with_lora(checkpoint, r".*\.c_attn")
    layer = "memory_cell.model.base_model.model.transformer.h.0.attn.c_attn."
    a, b = f"{layer}lora_A.default.weight", f"{layer}lora_B.default.weight"

    def refused(words: str, state: State = good) -> None:
        path = save_flat(tmp_path / "w.pth", state)
        with pytest.raises(CheckpointError, match=words):
            load(path, base=base, segment_size=S)
        assert re.search(words, inspect(path)["error"])

    refused(r"their scale stands in no weights file: put peft's adapter_config.json beside it, or write .*lora_alpha")
    for words, more in {
        r"has use_dora: this engine merges plain LoRA only; merge it where": {"use_dora": True},
        r"has alpha_pattern: ": {"alpha_pattern": {"c_attn": 4}},
        r"has peft_type='IA3'": {"peft_type": "IA3"},
        r"has lora_alpha='6'; expected a number": {"lora_alpha": "6"},
        r"has lora_alpha=None": {"lora_alpha": None},
        r"has use_rslora=2; expected true or false": {"use_rslora": 2},
    }.items():
        settings(tmp_path, **more)
        refused(words)
    settings(tmp_path)
    refused(
        r"half a LoRA pair.*: memory_cell.model.transformer.h.0.attn.c_attn$", {k: t for k, t in good.items() if k != b}
    )
    refused(
        r"not plain LoRA: .*lora_magnitude_vector.*merge_and_unload",
        {**good, f"{layer}lora_magnitude_vector.default.weight": torch.ones(96)},
    )
    refused(r"not plain LoRA: .*ia3_l", {**good, f"{layer}ia3_l.default": torch.ones(96)})
    other = {key.replace("default", "second"): t for key, t in good.items() if "lora" in key}
    refused(r"several adapters \(default, second\): save the model with the one to run", {**good, **other})
    for wrong in (torch.ones(3, 33), torch.ones(4, 32), torch.ones(3), torch.ones(3, 32).long()):
        refused(r"lora_A \[.*\] and lora_B \[96, 3\] do not fit .*c_attn.weight \[32, 96\]", {**good, a: wrong})
    lost = {key: t for key, t in good.items() if key != f"{layer}base_layer.weight"}
    refused(r"LoRA pair for .*c_attn, but no .*c_attn.weight to merge it into", lost)
    twice = {**good, f"{layer}weight": good[f"{layer}base_layer.weight"]}
    refused(r"holds 'memory_cell.model.transformer.h.0.attn.c_attn.weight' twice", twice)
    with pytest.raises(CheckpointError, match=r"not finite: transformer.h.0.attn.c_attn.weight"):
        load(save_flat(tmp_path / "w.pth", {**good, a: good[a] / 0}), base=base, segment_size=S)


# What the user must say


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    checkpoint = tiny("gpt2")
    return save_flat(tmp_path / "w.pth", checkpoint.state_dict()), base_of(checkpoint, tmp_path)


def test_missing_arguments_say_what_to_give(files: tuple[Path, Path], tmp_path: Path) -> None:
    path, base = files
    with pytest.raises(ValueError, match=r"give segment_size \(--segment-size\).* or input_size .* 2×4 memory tokens"):
        load(path, base=base)
    with pytest.raises(ValueError, match=r"give base \(--base\)"):
        load(path, segment_size=S)
    with pytest.raises(
        ValueError, match=r"input_size=8 leaves no room for text beside 2×4 memory tokens; use more than 8"
    ):
        load(path, base=base, input_size=8)
    with pytest.raises(ValueError, match=r"segment_size=5 and input_size=20 disagree: .* segment_size is 12"):
        load(path, base=base, input_size=20, segment_size=5)
    with pytest.raises(ValueError, match=r"segment_size=121 does not fit n_positions=128 .*; use at most 120"):
        load(path, base=base, segment_size=121)
    with pytest.raises(ValueError, match=r"alignment must be one of left, right, center"):
        load(path, base=base, segment_size=S, alignment="middle")  # type: ignore[arg-type]
    assert load(path, base=base, input_size=20, segment_size=12)[0].segment_size == 12
    convert(path, tmp_path / "out", base, segment_size=S)
    with pytest.raises(ValueError, match=r"leave out base"):
        load(tmp_path / "out", base=base)
    assert load(tmp_path / "out", input_size=30)[0].segment_size == 22


def test_a_base_that_is_not_the_backbone(files: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = files
    other = save_base(tmp_path / "other", tiny("llama"))
    with pytest.raises(CheckpointError, match=r"w\.pth wraps a gpt2 model, but .*other is the folder of a llama"):
        load(path, base=other, segment_size=S)
    with pytest.raises(CheckpointError, match=r"holds no config.json: expected the Hugging Face folder"):
        load(path, base=tmp_path, segment_size=S)
    with pytest.raises(CheckpointError, match=r"no backbone for model_type 'mamba'"):
        load(path, base=save_base(tmp_path / "mamba", tiny("gpt2"), model_type="mamba"), segment_size=S)
    with pytest.raises(CheckpointError, match=r"speaks of 10000000 layers, but the checkpoint has only"):
        load(path, base=save_base(tmp_path / "deep", tiny("gpt2"), n_layer=10_000_000), segment_size=S)
    with pytest.raises(CheckpointError, match=r"transformer.wte.weight is \[271, 32\], expected \[999, 32\]"):
        load(path, base=save_base(tmp_path / "wide", tiny("gpt2"), vocab_size=999), segment_size=S)
    bert = tiny("bert")
    weights = save_flat(tmp_path / "bert.pth", bert.state_dict())
    with pytest.raises(CheckpointError, match=r"memory rows begin at 97, but the vocabulary of .* has 120 words"):
        load(weights, base=save_base(tmp_path / "b", bert, vocab_size=120), segment_size=S)
    moved = {**bert.state_dict(), "cls_token": torch.tensor([9])}
    with pytest.raises(CheckpointError, match=r"trained with cls id 9, but the tokenizer in .* has 2"):
        load(save_flat(tmp_path / "m.pth", moved), base=save_base(tmp_path / "c", bert), segment_size=S)


def test_names_shared_by_two_backbones_follow_the_base(tmp_path: Path) -> None:
    llama, mistral = tiny("llama"), tiny("mistral")
    for owner, base in ((llama, mistral), (mistral, llama), (llama, llama)):
        path = save_flat(tmp_path / "w.pth", owner.state_dict())
        config, weights = load(path, base=save_base(tmp_path / base.model_type, base), segment_size=S)
        assert config.model_type == base.model_type
        same(weights, owner.weights())
    bases = {name: save_base(tmp_path / name, tiny(name)) for name in ("llama", "qwen2", "qwen3", "bert")}
    for name, base_name, words in (
        ("qwen2", "llama", r"tied in the config|stray: .*q_proj.bias"),
        ("qwen3", "llama", r"wraps a qwen3 model, but .* is the folder of a llama"),
        ("llama", "qwen2", r"wraps a llama or mistral model, but .* is the folder of a qwen2"),
        ("roberta", "bert", r"wraps a roberta model, but .* is the folder of a bert"),
    ):
        path = save_flat(tmp_path / "w.pth", tiny(name).state_dict())
        with pytest.raises(CheckpointError, match=words):
            load(path, base=bases[base_name], segment_size=S)


def test_what_bounds_the_rows_of_a_segment(tmp_path: Path) -> None:
    """Each limit is the last one at which the engine still computes what the backbone does."""

    def base_and_file(name: str, **config: Any) -> dict[str, Path]:
        path = save_flat(tmp_path / "w.pth", tiny(name).state_dict())
        return {"path": path, "base": save_base(tmp_path / name, tiny(name), **config)}

    window = base_and_file("mistral")
    assert load(**window, segment_size=S)[0].max_positions == S + 8
    with pytest.raises(
        ValueError, match=rf"^segment_size={S + 1} does not fit sliding_window={S + 8} with 2×4 .* most {S}$"
    ):
        load(**window, segment_size=S + 1)
    assert load(**base_and_file("mistral", sliding_window=None), segment_size=S)[0].max_positions == 128
    assert load(**base_and_file("qwen2", sliding_window=9), segment_size=S)[0].max_positions == 128
    sliding = {"use_sliding_window": True, "sliding_window": 25, "max_window_layers": 1, "layer_types": None}
    assert load(**base_and_file("qwen3", **sliding), segment_size=S)[0].max_positions == 25
    assert load(**base_and_file("qwen3", **sliding | {"max_window_layers": 2}), segment_size=S)[0].max_positions == 128
    encoder = base_and_file("roberta")
    assert load(**encoder, segment_size=55)[0].max_positions == 62
    with pytest.raises(ValueError, match=r"does not fit max_position_embeddings-pad_token_id-1=62 with 4 .* most 55$"):
        load(**encoder, segment_size=56)
    with pytest.raises(CheckpointError, match=r"is not a whole config: TypeError"):
        load(**base_and_file("roberta", pad_token_id=None), segment_size=S)


def test_code_in_a_base_is_never_run(files: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = files
    marker = tmp_path / "ran"
    base = save_base(tmp_path / "remote", tiny("gpt2"), auto_map={"AutoConfig": "evil.Config"})
    (base / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    config, _ = load(path, base=base, segment_size=S)
    assert "auto_map" not in config.backbone and not marker.exists()
    settings = base / "tokenizer_config.json"
    settings.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Config", None]}}))
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"code of its own"):
        convert(path, tmp_path / "out", base, segment_size=S)
    assert not marker.exists()


def test_a_name_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.pth: no such file or folder"):
        load(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match=r"dir/nowhere.bin: no such file or folder"):
        load("dir/nowhere.bin")

    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"owner/model is no file or folder here, .*\(offline\): check the name"):
        load("owner/model")


def test_a_hub_id_is_fetched(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, base = files
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str({"owner/rmt": path.parent, "owner/base": base}[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    same(load("owner/rmt", base="owner/base", segment_size=S)[1], tiny("gpt2").weights())
    assert "*.safetensors" in asked["owner/rmt"] and "*.safetensors" not in asked["owner/base"]


# Other families


def test_other_families_are_recognised_and_refused(tmp_path: Path) -> None:
    one = torch.ones(2, 2)
    gpt2, bert = tiny("gpt2").state_dict(), tiny("bert").state_dict()
    inner = {name.removeprefix("memory_cell.model."): t for name, t in gpt2.items() if "model" in name}
    cases: dict[str, State] = {
        r"ARMT checkpoint \(associative memory": {
            "memory_cell.memory": one,
            "memory_cell.model.transformer.h.0.W_mq": one,
        },
        "legacy RMTDecoderLMHead": {"memory": one, **{f"model.{name}": t for name, t in inner.items()}},
        "T5 encoder-decoder": {"mem_token_ids": torch.arange(2), "model.encoder.block.0.layer.0.x": one},
        "token classification": {name: t for name, t in bert.items() if "pooler" not in name},
        "without a sequence classifier": {name: t for name, t in bert.items() if "classifier" not in name},
        "plain backbone without memory tokens": inner,
        "encoder RMT, but not on bert or roberta": {"mem_token_ids": torch.arange(2), "model.deberta.x": one},
        r"none of gpt2, gpt_neox, llama, .*, roberta; its names begin with rwkv.x": {
            "memory_cell.memory": one,
            "memory_cell.model.rwkv.x": one,
        },
        "no memory_cell.memory: it is not a whole checkpoint": {
            n: t for n, t in gpt2.items() if "cell.memory" not in n
        },
        "of no family this engine knows; its names begin with conv": {"conv": one},
        r"has shape \[0, 32\]; expected \[M, E\]": {**gpt2, "memory_cell.memory": torch.ones(0, 32)},
        "lacks the buffers sep_token": {name: t for name, t in bert.items() if name != "sep_token"},
        "mem_token_ids are .*; expected the rows after": {**bert, "mem_token_ids": torch.tensor([4, 3, 2, 1])},
        "expected a row of token ids": {**bert, "cls_token": torch.tensor(2.5)},
    }
    for number, (words, state) in enumerate(cases.items()):
        path = save_flat(tmp_path / f"{number}.pth", state)
        with pytest.raises(CheckpointError, match=words) as caught:
            load(path, base=tmp_path, segment_size=S)
        assert caught.value.exit_code == 3 and path.name in str(caught.value)
        assert inspect(path)["error"] == str(caught.value)


# Tensors that do not fit


def test_one_error_names_everything(files: tuple[Path, Path], tmp_path: Path) -> None:
    _, base = files
    state = tiny("gpt2").state_dict()
    inner = "memory_cell.model.transformer."
    del state[inner + "h.0.ln_1.weight"], state[inner + "h.1.mlp.c_fc.bias"]
    state[inner + "ln_f.bias"] = torch.ones(33)
    state[inner + "ln_f.weight"] = torch.ones(32, dtype=torch.int32)
    state[inner + "h.0.ln_2.bias"] = torch.tensor([float("nan")] + [0.0] * 31)
    state[inner + "h.1.ln_2.bias"] = torch.tensor([float("-inf")] + [0.0] * 31)
    state["memory_cell.memory"] = torch.ones(4, 31)
    state[inner + "h.2.extra"] = torch.ones(2)
    state["optimizer.junk"] = torch.ones(2)
    state["memory_cell.model.lm_head.weight"] = torch.zeros(DECODER_VOCAB, 32)
    with pytest.raises(CheckpointError) as caught:
        load(save_flat(tmp_path / "bad.pth", state), base=base, segment_size=S)
    text = str(caught.value)
    for words in (
        "missing: transformer.h.0.ln_1.weight, transformer.h.1.mlp.c_fc.bias",
        "stray: optimizer.junk, transformer.h.2.extra",
        "memory is [4, 31], expected [4, 32]",
        "transformer.ln_f.bias is [33], expected [32]",
        "wrong dtype: transformer.ln_f.weight is torch.int32",
        "not finite: transformer.h.0.ln_2.bias, transformer.h.1.ln_2.bias",
        "tied in the config but different: lm_head.weight and transformer.wte.weight",
    ):
        assert words in text, text


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_every_backbone_that_do_not_fit(name: str, tmp_path: Path) -> None:
    checkpoint = tiny(name)
    base, state = base_of(checkpoint, tmp_path, tokenizer="none"), checkpoint.state_dict()
    prefix = "model." if name in ENCODERS else "memory_cell.model."
    layers = [key.removeprefix(prefix) for key in state if re.search(r"\.1\..*(?<!classifier)\.(weight|bias)$", key)]
    assert len(layers) >= 9
    for gone in layers:
        lost = {key: t for key, t in state.items() if key != prefix + gone}
        with pytest.raises(CheckpointError, match=rf"does not fit its config\. missing: {re.escape(gone)}$"):
            load(save_flat(tmp_path / "w.pth", lost), base=base, segment_size=S)
    wide = torch.ones(*(size + 1 for size in state[prefix + layers[0]].shape))
    bad = {**state, prefix + layers[0]: wide, prefix + layers[1] + ".extra": torch.ones(2)}
    with pytest.raises(CheckpointError) as caught:
        load(save_flat(tmp_path / "w.pth", bad), base=base, segment_size=S)
    shape = list(state[prefix + layers[0]].shape)
    assert f"stray: {layers[1]}.extra; " in str(caught.value)
    assert f"wrong shape: {layers[0]} is {list(wide.shape)}, expected {shape}" in str(caught.value)


def test_a_damaged_converted_folder(files: tuple[Path, Path], tmp_path: Path) -> None:
    path, base = files
    out = tmp_path / "out"
    convert(path, out, base, segment_size=S)
    weights = tiny("gpt2").weights()
    weights["memory"] = weights["memory"] * float("nan")
    save_safetensors(out / "model.safetensors", {**weights, "junk": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"stray: junk; not finite: memory"):
        load(out)
    report = inspect(out)
    assert report["kind"] == "converted checkpoint" and not report["runs"] and "stray: junk" in report["error"]
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights"):
        load(out)
    (out / "config.json").write_text('{"rmt": ' + "[" * 100_000)
    with pytest.raises(CheckpointError, match=r"cannot be read as JSON"):
        load(out)


# Files that are not checkpoints


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    cases = {
        b"": r"is empty \(0 bytes\)",
        b"\x00" * 100: "neither a safetensors file nor one of torch.save",
        b"once upon a time": "neither a safetensors file",
        b"version https://git-lfs.github.com/spec/v1\n": "Git LFS pointer",
        pickle.dumps({"a": 1}): "bare pickle",
        b"PK\x03\x04 and no more": "torn torch.save file",
        (1 << 40).to_bytes(8, "little") + b"{}": "neither a safetensors file",
        (90_000_000).to_bytes(8, "little") + b"{}": "not a whole safetensors file",
    }
    for content, words in cases.items():
        path = tmp_path / "file.bin"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            read_tensors(path)
        assert inspect(path)["error"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("word/document.xml", "text")
    with pytest.raises(CheckpointError, match=r"not one that torch.save wrote"):
        read_tensors(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1_000_000)
    with pytest.raises(CheckpointError, match=r"is compressed"):
        read_tensors(tmp_path / "b.zip")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"not a regular file"):
        read_tensors(tmp_path / "pipe")


def test_folders_that_hold_none_or_several(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no weights: expected one of model.safetensors.* found nothing"):
        read_tensors(tmp_path)
    (tmp_path / "trainer.pckl").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"found trainer.pckl"):
        read_tensors(tmp_path)
    for name in ("model_100.pth", "model_200.pth"):
        save_flat(tmp_path / name, {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"several weight files \(model_100.pth, model_200.pth\): name the one"):
        read_tensors(tmp_path)


def test_shards_in_the_folders_of_their_authors(tmp_path: Path) -> None:
    checkpoint = tiny("llama")
    base, state = base_of(checkpoint, tmp_path, tokenizer="none"), checkpoint.state_dict()
    for number, kind in enumerate(("safetensors", "bin")):
        run = tmp_path / str(number)
        best = save_sharded(run / "model_best", state, shards=4, kind=kind)
        (best / "trainer.pckl").write_bytes(b"not to be read")
        for place in (run, best):
            assert inspect(place)["container"] == "4 shards"
            same(load(place, base=base, segment_size=S)[1], checkpoint.weights())
        index = next(best.glob("*.index.json"))
        index.rename(tmp_path / "index")
        for place in (run, best):
            with pytest.raises(
                CheckpointError, match=rf"holds shards of weights \(.*-00001-of-00004.*copy {index.name} too"
            ):
                load(place, base=base, segment_size=S)
        (tmp_path / "index").rename(index)
        next(best.glob("*-00003-of-*")).unlink()
        with pytest.raises(CheckpointError, match=r"shards that are not there: .*-00003-of-00004.*; copy all of them"):
            load(run, base=base, segment_size=S)


def test_shards_of_a_tied_model_that_save_model_wrote(tmp_path: Path) -> None:
    """One of two tied names is dropped, and the note of it stands in one shard's header alone."""
    checkpoint = tiny("llama-tied")
    state, (dropped, kept) = checkpoint.state_dict(), checkpoint.aliases() or ("", "")
    folder = save_sharded(tmp_path / "s", {name: t for name, t in state.items() if name != dropped})
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][kept]
    part = dict(read_tensors(folder / file).tensors)
    save_safetensors(folder / file, part, {dropped: kept})
    same(load(folder, base=base_of(checkpoint, tmp_path), segment_size=S)[1], checkpoint.weights())


def test_broken_shards(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path / "s", tiny("gpt2").state_dict())
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    (folder / "model-00002-of-00003.safetensors").rename(folder / "away")
    with pytest.raises(CheckpointError, match=r"shards that are not there: model-00002-of-00003.safetensors"):
        read_tensors(folder)
    (folder / "away").rename(folder / "model-00002-of-00003.safetensors")
    for weight_map, words in (
        ({**good["weight_map"], "x": "../../etc/passwd"}, "not shards beside it: ../../etc/passwd"),
        ({**good["weight_map"], "x": "model-00001-of-00003.safetensors"}, "promises tensors that its shards lack: x"),
        ([], "expected a weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=words):
            read_tensors(folder)


class Touch:
    """A pickle that would make a file if it were trusted."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("forced", ["0", "1"])
def test_a_malicious_pickle_is_not_run(forced: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    marker, weights = tmp_path / "ran", tiny("gpt2").state_dict()
    for content in ({**weights, "x": Touch(marker)}, {"model_state_dict": weights, "metrics": Touch(marker)}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(
            CheckpointError, match=r"holds more than tensors \(it asks for \w+\.system\), .*save the weights"
        ):
            read_tensors(tmp_path / "w.pth")
        assert "more than tensors" in inspect(tmp_path / "w.pth")["error"]
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(CheckpointError, match=r"bare pickle"):
        read_tensors(tmp_path / "bare.pth")
    save_accelerate_bin(tmp_path / "best", weights)
    (tmp_path / "best" / "trainer.pckl").write_bytes(pickle.dumps(Touch(marker)))
    assert read_tensors(tmp_path / "best").tensors.keys() == weights.keys()
    assert not marker.exists()


def test_only_dense_tensors_of_an_honest_size(tmp_path: Path) -> None:
    for value, words in (
        (torch.eye(3).to_sparse(), "'x': a tensor .* of torch.sparse_coo"),
        (torch.empty(3, device="meta"), "'x': a tensor .* on meta"),
        (torch.ones(1).expand(10**12), "'x': a tensor"),
        ([1, 2], "'x': a list"),
    ):
        torch.save({"x": value}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=words):
            read_tensors(tmp_path / "w.pth")
    for value, words in ((torch.ones(3), "holds a tensor"), ({}, "an empty dictionary"), ([], "holds a list")):
        torch.save(value, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=words):
            read_tensors(tmp_path / "w.pth")


def test_numpy_in_a_trainer_file_is_left_out_and_torch_is_left_as_it_was(tmp_path: Path) -> None:
    path = save_trainer_dict(tmp_path / "w.pth", tiny("gpt2").state_dict())
    before = set(torch.serialization.get_safe_globals())
    assert read_tensors(path).tensors.keys() == tiny("gpt2").state_dict().keys()
    assert set(torch.serialization.get_safe_globals()) == before
    assert b"multiarray" in path.read_bytes()  # the trainer's metrics really are numpy's


MUTATIONS = 200


def mutate(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(5)
    place = rng.randrange(min(len(data), rng.choice([16, 2000, len(data)])))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + rng.randbytes(rng.randrange(1, 40)) + data[place:]
    if kind == 3:
        return data[:place] + data[place + rng.randrange(1, 40) :]
    end = len(data) - rng.randrange(1, min(len(data), 3000))  # the directory of a zip file
    return data[:end] + rng.randbytes(4) + data[end + 4 :]


@pytest.mark.parametrize("kind", ["pth", "safetensors", "config"])
def test_mutated_files_give_typed_errors(kind: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    path, base = files
    out = tmp_path / "out"
    convert(path, out, base, segment_size=S)
    target = {"pth": path, "safetensors": out / "model.safetensors", "config": out / "config.json"}[kind]
    good, rng = target.read_bytes(), random.Random(kind)
    refused = 0
    for _ in range(MUTATIONS):
        target.write_bytes(mutate(good, rng))
        start = time.perf_counter()
        try:
            _, weights = load(path, base=base, segment_size=S) if kind == "pth" else load(out)
            assert all(torch.isfinite(tensor).all() for tensor in weights.values())
        except CheckpointError as error:
            refused += 1
            assert str(tmp_path) in str(error) or kind == "config"
        except ValueError as error:
            # a config that lost its `rmt` is a backbone's: then the user is asked for more
            assert kind == "config" and "--" in str(error)
        json.dumps(inspect(path if kind == "pth" else out))
        assert time.perf_counter() - start < 2
    assert refused > MUTATIONS // 4


# inspect


def test_inspect_says_how_to_go_on(files: tuple[Path, Path], tmp_path: Path) -> None:
    path, base = files
    report = inspect(path)
    assert json.loads(json.dumps(report)) == report
    assert (report["family"], report["model_type"], report["num_mem_tokens"]) == ("decoder", "gpt2", 4)
    assert report["parameters"] == sum(t.numel() for t in tiny("gpt2").weights().values())
    assert report["convert"] == f"rmt-engine convert {path} --base DIR --segment-size N --out DIR"
    assert not report["runs"] and report["error"] is None and len(report["missing"]) == 2
    bert = inspect(save_flat(tmp_path / "bert.pth", tiny("bert").state_dict()))
    assert bert["family"] == "encoder_classifier" and "--input-size N" in bert["convert"]
    assert bert["parameters"] == sum(t.numel() for t in tiny("bert").weights().values())
    folder = inspect(base)
    assert folder["kind"] == "backbone folder" and folder["tokenizer"] and "no weights" in folder["error"]
    convert(path, tmp_path / "out", base, segment_size=S)
    done = inspect(tmp_path / "out")
    assert done["runs"] and done["segment_size"] == S and done["shapes"]["memory"] == [4, 32]
    assert re.search("no such file", inspect(tmp_path / "none.pth")["error"])


@pytest.mark.parametrize("name", NAMES)
def test_inspect_names_every_backbone(name: str, tmp_path: Path) -> None:
    checkpoint = tiny(name)
    report = inspect(save_flat(tmp_path / "w.pth", checkpoint.state_dict()))
    kind = "llama" if name == "mistral" else checkpoint.model_type
    assert (report["error"], report["family"], report["model_type"]) == (None, checkpoint.family, kind)
    assert checkpoint.model_type in report["missing"][0]
    assert report["parameters"] == sum(t.numel() for t in checkpoint.weights().values())


def test_a_config_with_odd_values_is_refused(tmp_path: Path) -> None:
    good = tiny("gpt2").rmt_config(S).to_dict()
    for key, value in (
        ("segment_size", 3.5),
        ("segment_size", True),
        ("num_mem_tokens", "4"),
        ("drop_ids", 5),
        ("stop_ids", ["x"]),
        ("ask_template", 7),
        ("unknown", 1),
        ("alignment", ["left"]),
        ("cls_id", [1]),
    ):
        with pytest.raises(CheckpointError, match=r"section rmt"):
            RMTConfig.from_dict({**good, "rmt": {**good["rmt"], key: value}})
    for key, value in (
        ("n_positions", float("inf")),
        ("n_positions", "many"),
        ("id2label", {"a": "b"}),
        ("id2label", [1]),
    ):
        with pytest.raises(CheckpointError, match=r"section rmt"):
            RMTConfig.from_dict({**good, key: value})
    with pytest.raises(CheckpointError, match=r"expected an object, got list"):
        RMTConfig.from_dict({**good, "rmt": [1]})
