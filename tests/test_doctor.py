"""What this machine can do, and the memory of a checkpoint against what a process gains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints_for_tests import TinyCheckpoint, tiny_decoder, tiny_encoder
from rmt_kernels import dispatch
from safetensors.torch import save_file

from rmt_engine import doctor
from rmt_engine.backbones import MODEL_TYPES
from rmt_engine.cli import main
from rmt_engine.engine import Engine
from rmt_engine.memory_plan import plan_memory
from rmt_engine.run import resident_bytes

MIB = 2**20


def converted(folder: Path, checkpoint: TinyCheckpoint, segment_size: int) -> Path:
    folder.mkdir()
    checkpoint.rmt_config(segment_size).save(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in checkpoint.weights().items()}, folder / "model.safetensors"
    )
    return folder


def report_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["doctor", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_everything_runs_or_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys)
    assert set(report["backends"]) == set(dispatch.BACKENDS) - {"auto"}
    assert (
        report["backends"]["ref"]["runs"] and report["backends"]["cpu"]["runs"] and report["executors"]["eager"]["runs"]
    )
    for kind in ("backends", "executors", "formats"):
        for found in report[kind].values():
            assert found["runs"] is (found["reason"] is None)
            assert found["runs"] or len(found["reason"]) > 10
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads() and report["cpu"]["cores"] >= 1
    assert bool(report["gpu"]["devices"]) is (report["gpu"]["reason"] is None) is torch.cuda.is_available()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    there = doctor._is_there
    monkeypatch.setattr(doctor, "_is_there", lambda module: module not in ("pyarrow", "aiohttp") and there(module))
    found = doctor.formats()
    assert found[".parquet"]["reason"] == "pyarrow missing: pip install 'rmt-engine[parquet]'"
    assert found["https://"]["reason"] == "aiohttp missing: pip install 'rmt-engine[url]'"
    assert found[".gz"]["runs"]
    assert not doctor._is_there("no_such_package.no_such_module")


def test_a_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_lines", lambda path: {})
    report = doctor.examine()
    assert report["memory"] == {"total": None, "free": None} and report["cpu"]["features"] == []
    assert "unknown, unknown available" in doctor.describe(report)


def test_the_report_for_people(capsys: pytest.CaptureFixture[str], decoder_folder: Path) -> None:
    line = ["doctor", "--model", str(decoder_folder), "--device", "cpu", "--dtype", "bfloat16", "--slots", "3"]
    assert main(line) == 0
    text = capsys.readouterr().out
    assert "backend cpu                yes" in text and "executor graph             no: " in text
    assert f"{decoder_folder}: gpt2, " in text and "on cpu in bfloat16 a stream takes" in text
    graphs = "stream, scored stream of 8, 1 segments; fold, logits, scores, prefill, decode of 1, 2, 4 slots"
    assert f"captured on a GPU in bfloat16 when an engine is built: {graphs}" in text
    assert "shared workspace " in text and "logits of all tokens " in text


def test_a_path_that_is_no_checkpoint_has_its_own_exit_code(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--model", str(tmp_path / "nothing")]) == 3
    assert "nothing" in capsys.readouterr().err


def test_transformers_is_named_but_not_imported() -> None:
    code = "import sys, rmt_engine.doctor as d; print(d.versions()['transformers'], 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split()[-1] == "False" and done.stdout[0].isdigit()


# --------------------------------------------------------------------------------------------------- the memory plan


@pytest.mark.parametrize("kind", ["gpt2-untied", *MODEL_TYPES])
def test_what_the_plan_counts_is_what_is_there(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder, kind, tied = kind in ("bert", "roberta"), kind.split("-")[0], kind == "gpt2"
    checkpoint = tiny_encoder(kind) if encoder else tiny_decoder(kind, tied=tied)
    plan = report_of(capsys, "--model", str(converted(tmp_path / "model", checkpoint, 20)), "--device", "cpu")["model"]
    assert plan["fits"] and plan["segment_size"] == 20
    weights = checkpoint.weights()
    assert plan["bytes"]["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert plan["bytes"]["file"] == 4 * plan["bytes"]["parameters"]
    layers = [tensor for name, tensor in weights.items() if tensor.dim() == 2 and any(c.isdigit() for c in name)]
    apart = [t for name, t in weights.items() if name.startswith(("bert.pooler", "classifier.")) and t.dim() == 2]
    assert plan["bytes"]["weights"] == sum(4 * tensor.numel() for tensor in layers + apart)
    assert plan["bytes"]["state"] == 4 * checkpoint.memory.numel()


def test_a_kv_cache_and_a_state_file_are_as_large_as_planned(tmp_path: Path) -> None:
    checkpoint = tiny_decoder("llama")
    engine = Engine.from_weights(checkpoint.rmt_config(20), checkpoint.weights(), device="cpu")
    plan = plan_memory(engine.config, torch.float32)
    _, caches = engine.executor.prefill(torch.ones(1, 20, dtype=torch.int64), engine.initial_memory(), 16)
    held = sum(4 * (cache.keys.numel() + cache.values.numel()) for cache in caches)
    assert plan.answer == held + 4 * engine.vocab_size
    stream = engine.stream(score=True)
    stream.feed([1] * 40)
    stream.save(tmp_path / "a.state")
    assert plan.state_file - 4096 < (tmp_path / "a.state").stat().st_size <= plan.state_file


def test_another_dtype_than_the_files_is_held_whole() -> None:
    config = tiny_decoder("gpt2").rmt_config(20)
    plan = plan_memory(config, torch.bfloat16, torch.float32)
    assert plan.file == 0 and plan.weights == 2 * plan.parameters
    assert plan_memory(config, torch.bfloat16).file == 2 * plan.parameters


MEASURE = """
import sys, threading, time
import torch
from rmt_engine.engine import Engine
from rmt_engine.run import resident_bytes
from rmt_engine.sampling import generate

def read(engine):
    stream = engine.stream(score=True)
    stream.feed(torch.ones(2 * engine.config.segment_size + 1, dtype=torch.int64))
    stream.scores()
    ids = torch.ones(1, engine.config.segment_size, dtype=torch.int64)
    generate(engine.executor, ids, stream.place.memory, 16, ())

def watch():
    global most
    while not done:
        most = max(most, resident_bytes())
        time.sleep(0.005)

torch.set_num_threads(1)
read(Engine.from_pretrained(device="cpu"))  # torch's own first steps
before = most = resident_bytes()
done = False
thread = threading.Thread(target=watch)
thread.start()
read(Engine.from_pretrained(sys.argv[1], device="cpu"))
done = True
thread.join()
print(most - before)
"""


@pytest.mark.skipif(resident_bytes() is None, reason="this system does not tell RssAnon")
def test_a_process_gains_what_was_planned(tmp_path: Path) -> None:
    checkpoint = tiny_decoder("gpt2", n_embd=512, n_head=8, layers=4, positions=512, num_mem_tokens=16)
    folder = converted(tmp_path / "model", checkpoint, 480)
    plan = plan_memory(checkpoint.rmt_config(480), torch.float32).total
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert abs(int(done.stdout) - plan) <= plan / 4 + 8 * MIB, f"{int(done.stdout) / MIB:.0f} of {plan / MIB:.0f} MiB"
