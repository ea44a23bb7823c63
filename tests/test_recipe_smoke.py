"""The retrieval recipe: runs end to end in small, and each thing it claims exactly is exact."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.fixture(scope="module")
def recipe_modules():
    """The recipe's modules, imported the way its scripts import them."""
    sys.path.insert(0, str(RECIPES))
    try:
        yield {name: importlib.import_module(name) for name in ("facts_data", "rmt_training")}
    finally:
        sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint")
    command = [sys.executable, str(RECIPES / "train_retrieval.py"), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


def test_the_smoke_run_writes_the_authors_container(trained: Path) -> None:
    weights = torch.load(trained / "model_best" / "pytorch_model.bin", weights_only=True)
    config = transformers.GPT2Config.from_pretrained(trained / "base")
    assert weights["memory_cell.memory"].shape == (8, config.n_embd)
    model = transformers.GPT2LMHeadModel(config)
    backbone = {k.removeprefix("memory_cell.model."): v for k, v in weights.items() if k != "memory_cell.memory"}
    assert not model.load_state_dict(backbone).missing_keys
    assert torch.equal(backbone["lm_head.weight"], backbone["transformer.wte.weight"])
    recipe = json.loads((trained / "recipe.json").read_text())
    assert recipe["ask_template"] == "\nQuestion: {question}\nAnswer:"
    assert recipe["stop_ids"] == [config.eos_token_id]
    assert recipe["segment_size"] + 2 * recipe["num_mem_tokens"] <= config.n_positions


def test_our_forward_equals_hugging_face(trained: Path, recipe_modules) -> None:
    weights = torch.load(trained / "model_best" / "pytorch_model.bin", weights_only=True)
    config = transformers.GPT2Config.from_pretrained(trained / "base")
    model = recipe_modules["rmt_training"].RecurrentMemoryModel(config, 8, torch.float32)
    model.load_state_dict(weights)
    backbone, ids = model.memory_cell.model, torch.randint(1, 600, (3, 40))
    memory = torch.randn(3, 8, backbone.config.n_embd)
    text = backbone.transformer.wte(ids)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            folded = model.fold(memory, ids)
            logits = model.answer_logits(memory, ids, torch.tensor([[38, 39]] * 3))
        with torch.no_grad():
            expected = backbone.transformer(inputs_embeds=torch.cat([memory, text, memory], 1)).last_hidden_state
            expected_logits = backbone(inputs_embeds=torch.cat([memory, text], 1)).logits
        torch.testing.assert_close(folded, expected[:, -8:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, expected_logits[:, -2:], rtol=1e-5, atol=1e-5)


def test_a_placed_fact_is_tokenized_as_in_joined_text(trained: Path, recipe_modules) -> None:
    facts_data = recipe_modules["facts_data"]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(trained / "base")
    writer, rng = facts_data.FactWriter(tokenizer), np.random.default_rng(0)
    noise = facts_data.encode_files(tokenizer, [Path(json.__file__).read_text()])
    for at in range(0, len(noise), 17):
        place, fact = writer.place(noise, at, writer.random_fact(rng), rng)
        joined = [*noise[:place], *fact, *noise[place:]]
        assert tokenizer.encode(tokenizer.decode(joined), add_special_tokens=False) == joined
