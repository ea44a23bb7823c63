"""BABILong: samples in every format, prompts, and the rules by which an answer counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from checkpoints_for_tests import byte_tokenizer, tiny_decoder
from pyarrow import ipc, parquet

from rmt_engine import Engine, InputError
from rmt_engine.evaluation.babilong import (
    LABELS,
    Prompts,
    Sample,
    check_template,
    encode,
    evaluate,
    find_files,
    instructed_prompt,
    is_right,
    plain_prompt,
    read_instructions,
    read_samples,
)
from rmt_engine.evaluation.store import Store
from rmt_engine.tokens import Tokenizer

ROOMS = LABELS["qa1"]
SAMPLES = [
    {"input": "Ann sat down. Mary went to the garden. It rained.", "question": "Where is Mary?", "target": "garden"},
    {"input": "John moved to the office. So he said.", "question": "Where is John?", "target": "office"},
    {"input": "Daniel went back to the kitchen.", "question": "Where is Daniel?", "target": "hallway"},
]


@pytest.mark.parametrize(
    ("task", "target", "output", "question", "right"),
    [
        ("qa1", "garden", "garden", "Where is Mary?", True),
        ("qa1", "garden", "The most recent location of Mary is GARDEN. Not the office.", "Where is Mary?", True),
        ("qa1", "garden", "garden or office", "Where is Mary?", False),
        ("qa1", "garden", "office", "Where is Mary?", False),
        ("qa1", "garden", "", "Where is Mary?", False),
        ("qa1", "garden", "I do not know. garden", "Where is Mary?", False),
        ("qa1", "garden", "garden <context> office", "Where is Mary?", True),
        ("qa1", "garden", "garden <example> office", "Where is Mary?", True),
        ("qa1", "garden", "garden question: office", "Where is Mary?", False),
        ("qa4", "garden", "the kitchen is north of the garden", "What is the kitchen north of?", True),
        ("qa5", "Fred", "fred", "Who gave the football to Jeff?", True),
        ("qa5", "Fred", "fred gave the milk", "Who gave the football to Jeff?", False),
        ("qa7", "two", "two", "How many objects is Mary carrying?", True),
        ("qa8", "apple,milk", "milk and apple", "What is Mary carrying?", True),
        ("qa8", "apple,milk", "milk", "What is Mary carrying?", False),
        ("qa8", "apple,milk", "milk, apple, football", "What is Mary carrying?", False),
        ("qa8", "nothing", "nothing", "What is Mary carrying?", True),
        ("qa19", "e,s", "e,s", "How do you go from the garden to the office?", True),
        ("qa19", "e,s", "s,e", "How do you go from the garden to the office?", False),
    ],
)
def test_rules(task: str, target: str, output: str, question: str, right: bool) -> None:
    assert is_right(target, output, question, LABELS[task]) == right


def test_every_task_has_labels() -> None:
    assert set(LABELS) == {f"qa{number}" for number in range(1, 21)}


def test_prompts() -> None:
    sample = Sample(" Text {question}. ", "Who?", "x")
    assert plain_prompt(sample) == " Text {question}.  Who?"  # a context may hold anything
    assert plain_prompt(sample, "Q: {question}\n{context}") == "Q: Who?\n Text {question}. "
    parts = {"instruction": "Do this.", "examples": "<example>A</example>", "post_prompt": "One word."}
    assert instructed_prompt(sample, parts) == (
        "Do this.\n\n<example>A</example>\n\nOne word.\n\n<context>\nText {question}.\n</context>\n\nQuestion: Who?"
    )
    assert instructed_prompt(sample, {}) == "<context>\nText {question}.\n</context>\n\nQuestion: Who?"
    with pytest.raises(ValueError, match=r"must hold \{context\} and \{question\}"):
        check_template("{context}")
    with pytest.raises(ValueError, match="the instructions say nothing of qa2"):
        Prompts(instructions={"qa1": parts}).of("qa2", sample)


def _write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(SAMPLES)
    if path.suffix == ".json":
        path.write_text(json.dumps(SAMPLES), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, SAMPLES)) + "\n\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        make = ipc.new_file if "file" in path.name else ipc.new_stream
        with open(path, "wb") as raw, make(raw, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "data/qa1/4k.json",
        "qa1_4k.jsonl",
        "4k/qa1-00000-of-00001.parquet",
        "4k/qa1/data-00000-of-00001.arrow",
        "4k/qa1/file.arrow",
    ],
)
def test_samples_of_every_format(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name)
    for found in (find_files(tmp_path), find_files(path)):
        assert [(file.path, file.task, file.length) for file in found] == [(path, "qa1", "4k")]
    samples = list(read_samples(path))
    assert [vars(sample) for sample in samples] == [
        {"context": one["input"], "question": one["question"], "target": one["target"]} for one in SAMPLES
    ]
    assert list(read_samples(path, 2)) == samples[:2]


def test_files_are_found_by_task_and_length(tmp_path: Path) -> None:
    for task in ("qa10", "qa2", "qa1", "qa99"):
        for length in ("1M", "4k", "0k"):
            _write(tmp_path / "babilong-1k-samples" / task / f"{length}.json")
    (tmp_path / "README.json").write_text("{}")
    every = [(file.task, file.length) for file in find_files(tmp_path)]
    assert every == [(task, length) for task in ("qa1", "qa2", "qa10") for length in ("0k", "4k", "1M")]
    assert [(f.task, f.length) for f in find_files(tmp_path, ["qa2"], ["4k", "1M"])] == [("qa2", "4k"), ("qa2", "1M")]
    with pytest.raises(InputError, match="has no samples of these tasks and lengths"):
        find_files(tmp_path, ["qa3"])
    with pytest.raises(InputError, match="there are no samples at"):
        find_files(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("qa1_1k.json", "[{", "expected a JSON array, or a JSON object a line"),
        (
            "qa1_1k.json",
            '[{"input": "a", "question": 3, "target": "b"}]',
            "sample 0: expected the texts input, question",
        ),
        ("qa1_1k.jsonl", "", "holds no samples"),
        ("qa1_1k.parquet", "no parquet", "cannot be read by pyarrow"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        list(read_samples(tmp_path / name))


def test_instructions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('{"qa1": {"instruction": "Answer."}}')
    assert read_instructions(path) == {"qa1": {"instruction": "Answer."}}
    for damaged in ("[1]", '{"qa1": 3}', '{"qa1": {"instruction": 3}}', "{"):
        path.write_text(damaged)
        with pytest.raises(InputError, match=r"prompts\.json"):
            read_instructions(path)


def test_the_embedded_checkpoint_is_scored(tmp_path: Path) -> None:
    """Its own way to be asked; the third target is wrong on purpose."""
    engine = Engine.from_pretrained(device="cpu")
    _write(tmp_path / "qa1" / "0k.json")
    prompts = Prompts("{context}\nQuestion: {question}\nAnswer:")
    store = Store(tmp_path / "kept", {})
    (score,) = evaluate(engine, find_files(tmp_path), prompts, store, slots=2)
    assert (score.task, score.length, score.samples, score.correct) == ("qa1", "0k", 3, 2)
    assert score.wrong == (("Where is Daniel?", "hallway", "kitchen"),)
    again = evaluate(engine, find_files(tmp_path), prompts, Store(tmp_path / "kept", {}), on_step=pytest.fail)
    assert list(again) == [score]


def test_a_prompt_is_cut_as_generate_cuts_it() -> None:
    """Context and question are one text: the last segment begins where the prompt's own cut puts it."""
    tiny = tiny_decoder("gpt2", seed=1, noise="all", layers=2)
    tokenizer = Tokenizer(byte_tokenizer().to_str())
    engine = Engine.from_weights(tiny.rmt_config(20), tiny.weights(), tokenizer, device="cpu")
    prompt = "The milk is in the garden. Where is the milk?"
    ids = encode(engine, prompt)
    assert np.array_equal(ids, tokenizer.encode(prompt))
    (result,) = engine.run_many([ids])
    assert result.stream is not None and len(result.stream.rest) == len(prompt) % 20
    expected = tiny.reference(20).generate(ids, 12)
    assert result.stream.generate(12) == tokenizer.decode(expected)


def test_a_classifier_is_refused(encoder_folder: Path, tmp_path: Path) -> None:
    _write(tmp_path / "qa1" / "0k.json")
    with pytest.raises(ValueError, match="this checkpoint is a classifier"):
        list(evaluate(Engine.from_pretrained(encoder_folder, device="cpu"), find_files(tmp_path)))
