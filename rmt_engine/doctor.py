"""What this machine can do: processor, GPU, backends, executors, formats, and the memory that a checkpoint takes."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rmt_kernels import dispatch
from rmt_kernels.cpu_linear import has_instructions

from rmt_engine import _C, checkpoint
from rmt_engine.checkpoint.loading import is_converted
from rmt_engine.config import RMTConfig
from rmt_engine.graph_plan import STREAMS, Sizes, keys_for, logits_bytes, plan_graphs
from rmt_engine.memory_plan import plan_memory
from rmt_engine.recording import why_no_graphs

PACKAGES = ("rmt-engine", "torch", "numpy", "tokenizers", "safetensors", "transformers", "huggingface_hub", "triton")
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
FORMATS = {  # what is read -> the modules that it needs, and the extra that brings them
    ".gz": ((), ""),
    ".zst": ((ZSTD,), "zst"),
    ".parquet": (("pyarrow",), "parquet"),
    "https://": (("fsspec", "aiohttp"), "url"),
    "s3://": (("fsspec", "s3fs"), "s3"),
}
Runs = dict[str, dict[str, Any]]  # name -> runs: whether it does here; reason: why not


def examine() -> dict[str, Any]:
    """Everything but the checkpoint, as plain JSON values."""
    return {
        "versions": versions(),
        "cpu": cpu(),
        "memory": system_memory(),
        "gpu": gpus(),
        "backends": backends(),
        "executors": {"eager": _verdict(None), "graph": _verdict(why_no_graphs(_device()))},
        "formats": formats(),
    }


def versions() -> dict[str, str | None]:
    """Of Python, the packages (None: not installed) and the compiler of the extension."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {**found, "compiler of the extension": _compiler(Path(_C.__file__ or ""))}


def _compiler(extension: Path) -> str | None:
    """What the compiler wrote into the file it made, where it did."""
    found = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", extension.read_bytes())
    return found[0].decode() if found else None


def cpu() -> dict[str, Any]:
    """Name, cores, torch's threads, and the instructions that matter to the kernels."""
    fields = _lines("/proc/cpuinfo")
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [flag for flag in CPU_FEATURES if flag in flags],
        "bf16": has_instructions(torch.bfloat16),
    }


def system_memory() -> dict[str, int | None]:
    """Bytes in all and available now; None where the system does not tell."""
    fields = _lines("/proc/meminfo")
    kilobytes = {name: fields.get(key, "").split() for name, key in (("total", "MemTotal"), ("free", "MemAvailable"))}
    return {name: int(words[0]) * 1024 if words else None for name, words in kilobytes.items()}


def _lines(path: str) -> dict[str, str]:
    """The first `key: value` of each key of a file; nothing where there is no such file."""
    found: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def gpus() -> dict[str, Any]:
    """The CUDA devices that torch sees, or the reason why it sees none."""
    if torch.version.cuda is None:
        return {"devices": [], "reason": f"this torch ({torch.__version__}) is built without CUDA"}
    if not torch.cuda.is_available():
        return {"devices": [], "reason": f"torch is built for CUDA {torch.version.cuda}, but it finds no device"}
    devices = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = f"{about.major}.{about.minor}"
        devices.append({"name": about.name, "memory": about.total_memory, "capability": capability})
    return {"devices": devices, "reason": None}


def backends() -> Runs:
    """On this machine's device: the GPU where there is one; `cpu` is asked about the CPU."""
    device = _device().type
    found = {}
    for name in dispatch.BACKENDS:
        if name == "auto":
            continue
        try:
            dispatch.choose(name, "cpu" if name == "cpu" else device)
            found[name] = _verdict(None)
        except RuntimeError as error:
            found[name] = _verdict(str(error).partition("cannot run: ")[2] or str(error))
    return found


def _device() -> torch.device:
    """That of `device="auto"`."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def formats() -> Runs:
    """Inputs beyond plain text, JSON lines and token files."""
    found = {}
    for name, (modules, extra) in FORMATS.items():
        missing = [module for module in modules if not _is_there(module)]
        reason = f"{' and '.join(missing)} missing: pip install 'rmt-engine[{extra}]'"
        found[name] = _verdict(reason if missing else None)
    return found


def _verdict(reason: str | None) -> dict[str, Any]:
    return {"runs": reason is None, "reason": reason}


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


def examine_model(
    path: str | Path, device: torch.device, dtype: torch.dtype, slots: int = 1, **arguments: Any
) -> dict[str, Any]:
    """A checkpoint's memory on this machine. slots: that its graphs are captured for. Raises what `checkpoint.load`
    raises."""
    config, stored = _config(path, arguments)
    plan = plan_memory(config, dtype, stored, device=device.type)
    graph_dtype = dtype if device.type == "cuda" else torch.bfloat16
    sizes = Sizes.of(config, graph_dtype)
    graphs = plan_graphs(sizes, keys_for(sizes, slots)).to_dict()
    free = system_memory()["free"] if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    return {
        "path": str(path),
        "model_type": config.model_type,
        "device": device.type,
        "dtype": _name(dtype),
        "segment_size": config.segment_size,
        "num_mem_tokens": config.num_mem_tokens,
        "bytes": plan.to_dict(),
        "graphs": {"dtype": _name(graph_dtype), **graphs, "logits": logits_bytes(sizes, slots)},
        "fits": None if free is None else plan.total <= free,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config(path: str | Path, arguments: Mapping[str, Any]) -> tuple[RMTConfig, torch.dtype]:
    """The config and the dtype of the file. Of a converted folder no weight is read."""
    given = any(value is not None for value in arguments.values())
    if not given and is_converted(Path(path)):
        config, weights = RMTConfig.from_folder(path), checkpoint.read_tensors(path).tensors
    else:
        config, weights = checkpoint.load(path, **arguments)
    return config, next(iter(weights.values())).dtype


def describe(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [f"{name:<26} {value or 'not installed'}" for name, value in report["versions"].items()]
    processor, memory, gpu = report["cpu"], report["memory"], report["gpu"]
    half = "yes" if processor["bf16"] else "in fp32, then rounded: its instructions are missing"
    lines += [
        f"{'CPU':<26} {processor['name']}, {processor['cores']} cores, {processor['threads']} threads",
        f"{'instructions':<26} {' '.join(processor['features']) or 'unknown'}",
        f"{'bf16 on the CPU':<26} {half}",
        f"{'memory':<26} {_size(memory['total'])}, {_size(memory['free'])} available",
    ]
    for device in gpu["devices"]:
        lines.append(f"{'GPU':<26} {device['name']}, {_size(device['memory'])}, capability {device['capability']}")
    if gpu["reason"]:
        lines.append(f"{'GPU':<26} none: {gpu['reason']}")
    for kind in ("backends", "executors", "formats"):
        for name, found in report[kind].items():
            lines.append(f"{f'{kind[:-1]} {name}':<26} {'yes' if found['runs'] else 'no: ' + found['reason']}")
    return "\n".join([*lines, *(_describe_model(report["model"]) if "model" in report else [])])


WORDS = {
    "file": "weights left in their file",
    "weights": "weights held",
    "loading": "left over from loading",
    "step": "a segment step",
    "score": "scoring a segment",
    "answer": "an answering segment",
    "logits": "logits, if asked for",
    "state": "memory state",
    "state_file": "state file, at most",
    "total": "held at most, in all",
}


def _describe_model(model: Mapping[str, Any]) -> list[str]:
    head = f"{model['path']}: {model['model_type']}, {model['bytes']['parameters']:,} parameters"
    lines = ["", f"{head}; on {model['device']} in {model['dtype']} a stream takes"]
    lines += [f"{words:<26} {_size(model['bytes'][name])}" for name, words in WORDS.items()]
    lines += _describe_graphs(model["graphs"])
    if model["fits"] is False:
        lines.append("this does not fit into the memory that is available now")
    return lines


GRAPH_WORDS = {
    "buffers": "static buffers",
    "outputs": "results",
    "workspace": "shared workspace",
    "total": "in all",
    "pinned": "pinned, of the host",
    "logits": "logits of all tokens",
}


def _describe_graphs(graphs: Mapping[str, Any]) -> list[str]:
    sizes: dict[str, list[str]] = {}
    for graph in graphs["graphs"]:
        sizes.setdefault(graph["step"], []).append(str(graph["segments" if graph["step"] in STREAMS else "slots"]))
    alike: dict[str, list[str]] = {}
    for step, counts in sizes.items():
        alike.setdefault(f"{', '.join(counts)} {'segments' if step in STREAMS else 'slots'}", []).append(step)
    listed = "; ".join(f"{', '.join(steps)} of {counts}" for counts, steps in alike.items())
    lines = ["", f"captured on a GPU in {graphs['dtype']} when an engine is built: {listed}"]
    return lines + [f"{words:<26} {_size(graphs[name])}" for name, words in GRAPH_WORDS.items() if graphs[name]]


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
