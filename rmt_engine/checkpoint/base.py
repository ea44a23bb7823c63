"""The Hugging Face folder of a backbone: its config, its special tokens, its tokenizer files.

transformers is imported here and nowhere else in the package, and only for checkpoints that are not converted yet.
No code of a folder is ever run: the config class is looked up by model_type, `auto_map` is not read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmt_engine.backbones import module_of
from rmt_engine.checkpoint.containers import read_json
from rmt_engine.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BASE_PATTERNS = ("*.json", "*.txt", "*.jinja", "tokenizer.model")
WEIGHT_PATTERNS = (*BASE_PATTERNS, "*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SLOW_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")
NOT_KEPT = ("_name_or_path", "auto_map", "transformers_version", "quantization_config")


def locate(name: str | Path, patterns: tuple[str, ...] = WEIGHT_PATTERNS) -> Path:
    """A file or folder here, or else a hub id (`owner/name`), downloaded. Raises CheckpointError."""
    path = Path(name).expanduser()
    if os.path.exists(path):
        return path
    if not HUB_ID.fullmatch(str(name)) or path.suffix in (".pth", ".pt", ".bin", ".safetensors", ".json"):
        raise CheckpointError(f"{name}: no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{name} is no file or folder here, and the hub did not give it ({reason}): check the name, or download "
            "it where there is a network and give its folder"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The backbone's complete config, every default written out, as plain JSON values."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json: expected the Hugging Face folder of the backbone")
    data = read_json(path)
    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} has no model_type: it is not a backbone's config")
    module_of(model_type)
    from transformers import CONFIG_MAPPING

    known = {key: value for key, value in data.items() if key not in (*NOT_KEPT, "model_type", "rmt")}
    try:
        config = CONFIG_MAPPING[model_type].from_dict(known)
        complete: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    except Exception as error:  # its validators raise many types
        raise CheckpointError(f"{path} is not a config that transformers reads: {error}") from error
    return {key: value for key, value in complete.items() if key not in NOT_KEPT}


def special_ids(folder: Path) -> dict[str, int]:
    """Ids of the tokenizer's pad, cls, sep, bos and eos tokens, those that it has; empty without a tokenizer."""
    if not has_tokenizer(folder):
        return {}
    tokenizer = _tokenizer(folder)
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "cls", "sep", "bos", "eos")}
    return {name: int(i) for name, i in ids.items() if i is not None}


def eos_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer: of generation_config.json, or of the config."""
    path = folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = config.get("eos_token_id") if ids is None else ids
    found = ids if isinstance(ids, list) else [ids]
    return tuple(i for i in found if isinstance(i, int) and 0 <= i < config["vocab_size"])


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", *SLOW_FILES))


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Put the tokenizer's files into `out`; a tokenizer.json is made where there are only the older files."""
    if not has_tokenizer(folder):
        return
    if not (folder / "tokenizer.json").is_file():
        _tokenizer(folder).save_pretrained(out)
        return
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def _tokenizer(folder: Path) -> Any:
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in read_json(settings):
        raise CheckpointError(f"{folder} has a tokenizer with code of its own (auto_map), which is never run")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
