"""What the engine must know about a checkpoint beyond its weights: the `rmt` section of config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rmt_engine.errors import CheckpointError

Family = Literal["decoder", "encoder_classifier"]
Alignment = Literal["left", "right", "center"]

FORMAT_VERSION = 1
ALIGNMENTS = ("left", "right", "center")
FAMILIES = ("decoder", "encoder_classifier")


def _row_limits(backbone: Mapping[str, Any]) -> dict[str, int]:
    """What bounds the rows of one segment, by the entry of the backbone's config that says so."""
    limits: dict[str, int] = {}
    model_type = backbone.get("model_type")
    key = "n_positions" if "n_positions" in backbone else "max_position_embeddings"
    if backbone.get(key) is not None:
        limits[key] = int(backbone[key])
    if model_type == "roberta" and key in limits:  # row 0 has the position behind the padding id
        limits = {f"{key}-pad_token_id-1": limits[key] - int(backbone["pad_token_id"]) - 1}
    window, layers = backbone.get("sliding_window"), backbone.get("layer_types")
    if window is not None and (layers is None or model_type == "mistral" or "sliding_attention" in layers):
        limits["sliding_window"] = int(window)  # up to it, every row sees all rows before it
    return limits


@dataclass(frozen=True)
class RMTConfig:
    """One checkpoint's shape and reading rules.

    family: `decoder` (MemoryCell/RecurrentWrapper) or `encoder_classifier` (RMTEncoderForSequenceClassification).
    backbone: the complete Hugging Face config of the wrapped model, as a plain dict with `model_type`.
    num_mem_tokens: M. segment_size: S, the most *text* tokens of one segment.
    alignment: where the short segment goes (left: last, right: first, center: all nearly equal).
    drop_ids: token ids removed from the content before it is cut into segments.
    cls_id, sep_id: the encoder's own tokens of every segment.
    ask_template, stop_ids: how a question is put to a decoder, and the ids that end an answer.
    """

    family: Family
    backbone: Mapping[str, Any]
    num_mem_tokens: int
    segment_size: int
    alignment: Alignment = "left"
    drop_ids: tuple[int, ...] = ()
    cls_id: int | None = None
    sep_id: int | None = None
    ask_template: str = "{question}"
    stop_ids: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {self.family!r}")
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}; got {self.alignment!r}")
        self._check_types()
        if self.num_mem_tokens < 1:
            raise ValueError(f"num_mem_tokens must be at least 1; got {self.num_mem_tokens}")
        if self.segment_size < 1:
            raise ValueError(f"segment_size must be at least 1; got {self.segment_size}")
        if self.family == "encoder_classifier" and (self.cls_id is None or self.sep_id is None):
            raise ValueError("an encoder_classifier needs cls_id and sep_id, the tokens that frame every segment")
        if "{question}" not in self.ask_template:
            raise ValueError(f"ask_template must hold {{question}}; got {self.ask_template!r}")
        self._check_positions()

    def _check_types(self) -> None:
        """A config.json may hold anything."""
        single = {name: getattr(self, name) for name in ("num_mem_tokens", "segment_size")}
        single |= {name: getattr(self, name) for name in ("cls_id", "sep_id") if getattr(self, name) is not None}
        for name, value in single.items():
            if type(value) is not int:
                raise ValueError(f"{name} must be an integer; got {value!r}")
        for name in ("drop_ids", "stop_ids"):
            if any(type(i) is not int for i in getattr(self, name)):
                raise ValueError(f"{name} must be integers; got {getattr(self, name)!r}")
        if not isinstance(self.ask_template, str):
            raise ValueError(f"ask_template must be a text; got {self.ask_template!r}")
        names = self.backbone.get("id2label") or {}
        if not isinstance(names, Mapping) or not all(str(key).isdecimal() for key in names):
            raise ValueError(f"id2label must map class numbers to names; got {names!r}")

    def _check_positions(self) -> None:
        limits = _row_limits(self.backbone)
        name = min(limits, key=lambda key: limits[key], default=None)
        if name is None or self.segment_size + self.overhead <= limits[name]:
            return
        around = (
            f"2×{self.num_mem_tokens} memory tokens"
            if self.family == "decoder"
            else f"{self.num_mem_tokens} memory tokens and 3 special tokens"
        )
        raise ValueError(
            f"segment_size={self.segment_size} does not fit {name}={limits[name]} with {around}; "
            f"use at most {limits[name] - self.overhead}"
        )

    @property
    def model_type(self) -> str:
        return str(self.backbone["model_type"])

    @property
    def overhead(self) -> int:
        """Rows of a full segment that are not text."""
        return 2 * self.num_mem_tokens if self.family == "decoder" else self.num_mem_tokens + 3

    @property
    def max_positions(self) -> int | None:
        """Rows the backbone can hold in one segment."""
        return min(_row_limits(self.backbone).values(), default=None)

    @property
    def labels(self) -> list[str]:
        """The classifier's label names, by id."""
        names = self.backbone.get("id2label") or {}
        return [str(names[key]) for key in sorted(names, key=int)]

    def to_dict(self) -> dict[str, Any]:
        """The whole config.json: the backbone's config with our `rmt` section."""
        rmt = asdict(self)
        backbone = rmt.pop("backbone")
        return {**backbone, "rmt": {"format_version": FORMAT_VERSION, **rmt}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RMTConfig:
        """Inverse of `to_dict`. Raises CheckpointError on a missing, unknown or impossible entry."""
        section = data.get("rmt")
        if not section:
            raise CheckpointError(
                "config.json has no `rmt` section: it is a backbone's config, not a converted checkpoint; "
                "run `rmt-engine convert` first"
            )
        if not isinstance(section, Mapping):
            raise CheckpointError(f"config.json, section rmt: expected an object, got {type(section).__name__}")
        rmt = dict(section)
        version = rmt.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise CheckpointError(f"config.json has rmt.format_version={version!r}; this engine reads {FORMAT_VERSION}")
        backbone = {key: value for key, value in data.items() if key != "rmt"}
        if not isinstance(backbone.get("model_type"), str):
            raise CheckpointError("config.json has no model_type: the backbone's family is unknown")
        try:
            for key in ("drop_ids", "stop_ids"):
                rmt[key] = tuple(rmt.get(key) or ())
            return cls(backbone=backbone, **rmt)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"config.json, section rmt: {error}") from error

    @classmethod
    def from_folder(cls, folder: str | Path) -> RMTConfig:
        path = Path(folder) / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder} holds no config.json: it is not a converted checkpoint") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
        return cls.from_dict(data)

    def save(self, folder: str | Path) -> None:
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
