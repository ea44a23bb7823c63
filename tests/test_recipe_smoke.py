"""The recipes: they run end to end in small, come in through `convert`, and what they claim exactly is exact."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rmt_engine import Engine  # noqa: E402
from rmt_engine.checkpoint.conversion import convert  # noqa: E402

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
MODULES = (
    "facts_data", "episodes", "pool", "blank", "copying_init", "growing", "rmt_training", "retrieval_settings",
    "learners", "train_retrieval", "lm_data", "train_lm",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipes() -> Iterator[SimpleNamespace]:
    """The recipes' modules, imported the way the scripts import them."""
    sys.path.insert(0, str(RECIPES))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, recipes) -> Path:
    """What the smoke run of the decoder writes."""
    out = tmp_path_factory.mktemp("decoder")
    train(recipes, "facts", out)
    return out


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, recipes, decoder: Path) -> Path:
    """The encoder's; it goes on from the decoder's tokenizer and noise, to save time."""
    out = tmp_path_factory.mktemp("encoder")
    of_another_run(decoder, out)
    train(recipes, "encoder", out)
    return out


def of_another_run(trained: Path, out: Path) -> None:
    """The tokenizer and the noise, without which a run takes long to begin."""
    shutil.copytree(trained / "training", out / "training", ignore=shutil.ignore_patterns("state.pt", "run.json"))


def train(recipes: SimpleNamespace, kind: str, out: Path) -> None:
    run(recipes.train_retrieval.main, "--kind", kind, "--smoke", "--out", str(out))


def run(main: Callable[[], None], *arguments: str) -> None:
    before, threads = sys.argv, torch.get_num_threads()
    sys.argv = ["recipe", *arguments]
    try:
        main()
    finally:
        sys.argv = before
        torch.set_num_threads(threads)


def converted(trained: Path, tmp_path: Path) -> tuple[Engine, dict]:
    """The engine of what a recipe wrote, and what the recipe says of it."""
    recipe = json.loads((trained / "recipe.json").read_text())
    out = tmp_path / "converted"
    convert(trained / "model_best", out, trained / "base", segment_size=recipe["segment_size"])
    return Engine.from_pretrained(out, device="cpu", dtype="float32"), recipe


def test_the_decoders_smoke_run_writes_the_authors_container(decoder: Path, recipes) -> None:
    weights = torch.load(decoder / "model_best" / "pytorch_model.bin", weights_only=True)
    config = transformers.LlamaConfig.from_pretrained(decoder / "base")
    assert weights["memory_cell.memory"].shape == (8, config.hidden_size)
    model = transformers.LlamaForCausalLM(config)
    backbone = {k.removeprefix("memory_cell.model."): v for k, v in weights.items() if k != "memory_cell.memory"}
    assert not model.load_state_dict(backbone).missing_keys
    recipe = json.loads((decoder / "recipe.json").read_text())
    assert recipe["ask_template"] == "\nQuestion: {question}\nAnswer:"
    assert recipe["stop_ids"] == [config.eos_token_id]
    assert recipe["segment_size"] + 2 * recipe["num_mem_tokens"] <= config.max_position_embeddings


def test_the_engine_computes_what_the_decoder_was_trained_on(decoder: Path, recipes, tmp_path: Path) -> None:
    engine, recipe = converted(decoder, tmp_path)
    weights = torch.load(decoder / "model_best" / "pytorch_model.bin", weights_only=True)
    config = transformers.LlamaConfig.from_pretrained(decoder / "base")
    model = recipes.rmt_training.RecurrentDecoder(transformers.LlamaForCausalLM(config), 8)
    model.load_state_dict(weights)
    size = recipe["segment_size"]
    ids = torch.randint(1, 600, (2, 2 * size + 9))
    with torch.no_grad():
        memory = model.initial_memory(2)
        for start in range(0, 2 * size, size):
            memory = model.fold(memory, ids[:, start : start + size])
        logits = model.answering(memory, ids[:, 2 * size :], torch.tensor([[7, 8]] * 2))
    out = engine.forward(ids[:, : 2 * size], output="none")
    torch.testing.assert_close(out.memory_state, memory, rtol=1e-4, atol=1e-4)
    answered = engine.forward(ids, output="last").logits
    torch.testing.assert_close(answered[:, -2:], logits, rtol=1e-4, atol=1e-4)


def test_the_engine_computes_what_the_encoder_was_trained_on(encoder: Path, recipes, tmp_path: Path) -> None:
    engine, recipe = converted(encoder, tmp_path)
    assert engine.config.alignment == "right"
    config = transformers.BertConfig.from_pretrained(encoder / "base")
    model = recipes.rmt_training.RecurrentEncoder(transformers.BertForSequenceClassification(config), 8, 0, 0)
    weights = torch.load(encoder / "model_best" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(weights.pop("model.embeddings.weight"), weights["model.bert.embeddings.word_embeddings.weight"])
    model.load_state_dict(weights)
    size = recipe["segment_size"]
    ids = torch.randint(10, 600, (2, size + 9))
    with torch.no_grad():
        memory = model.initial_memory(2)
        for part in (ids[:, :9], ids[:, 9:]):
            logits, memory = model.segment(memory, part)
    out = engine.forward(ids, output="last")
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)
    assert [config.id2label[i] for i in range(6)] == list(recipes.facts_data.ROOMS)


def test_a_run_that_was_cut_off_goes_on(decoder: Path, recipes) -> None:
    recipe = replace(recipes.retrieval_settings.FACTS, **recipes.retrieval_settings.TINY)
    resumed = recipes.train_retrieval.Trainer(recipe, decoder)
    assert (resumed.step, resumed.pool_steps_done) == (8, 4)
    figures = json.loads((decoder / "recipe.json").read_text())["figures"]
    assert figures["phase"] == 2 and resumed.seconds() >= figures["seconds"]
    resumed.curriculum()  # nothing is left to learn, or to say
    assert json.loads((decoder / "recipe.json").read_text())["figures"] == figures


@pytest.mark.parametrize("cut_in", ["curriculum_step", "pool_step"])
def test_a_run_that_was_cut_off_within_a_phase_goes_on(
    decoder: Path, recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_in: str
) -> None:
    of_another_run(decoder, tmp_path)
    small = {**recipes.retrieval_settings.TINY, "curriculum_steps": 6, "pool_steps": 6, "save_every": 2}
    recipe = replace(recipes.retrieval_settings.FACTS, **small)
    trainer = recipes.train_retrieval.Trainer(recipe, tmp_path)
    plain, calls = getattr(trainer, cut_in), []

    def cut(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(trainer, cut_in, cut)
    with pytest.raises(KeyboardInterrupt):
        trainer.curriculum()
        trainer.pool()
    resumed = recipes.train_retrieval.Trainer(recipe, tmp_path)
    assert (resumed.step, resumed.pool_steps_done) == ((4, 0) if cut_in == "curriculum_step" else (10, 4))
    assert all(torch.isfinite(value).all() for value in resumed.average.values.values())
    resumed.curriculum()
    resumed.pool()
    assert (resumed.step, resumed.pool_steps_done) == (12, 6)


def test_a_folder_holds_one_run(decoder: Path, recipes, tmp_path: Path) -> None:
    of_another_run(decoder, tmp_path)
    settings, trainer = recipes.retrieval_settings, recipes.train_retrieval.Trainer
    recipe = replace(settings.FACTS, **settings.TINY)
    trainer(recipe, tmp_path)
    trainer(replace(recipe, pool_steps=9), tmp_path)  # more of the same
    with pytest.raises(
        recipes.rmt_training.RecipeError, match=r"other settings \(seed, pool_rate\): give another --out"
    ):
        trainer(replace(recipe, seed=11, pool_rate=1.0), tmp_path)
    with pytest.raises(recipes.rmt_training.RecipeError, match=r"other settings \(--from\)"):
        trainer(recipe, tmp_path, tmp_path / "model")


def test_what_a_refused_source_left_is_not_gone_on_from(decoder: Path, recipes, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    convert(decoder / "model_best", model, decoder / "base", segment_size=112)
    recipe = replace(recipes.retrieval_settings.FACTS, **recipes.retrieval_settings.TINY)
    with pytest.raises(recipes.rmt_training.RecipeError, match="other parameters than --kind"):
        recipes.train_retrieval.Trainer(replace(recipe, width=64), out, model)
    assert not [*(out / "training").iterdir()]


def test_a_curriculum_that_was_not_learned_is_an_error(decoder: Path, recipes, tmp_path: Path) -> None:
    of_another_run(decoder, tmp_path)
    recipe = replace(recipes.retrieval_settings.FACTS, **{**recipes.retrieval_settings.TINY, "must_learn": True})
    with pytest.raises(recipes.rmt_training.RecipeError, match="stage 1 of 6 of the curriculum was not learned in 4"):
        recipes.train_retrieval.Trainer(recipe, tmp_path).curriculum()


def test_errors_are_one_line(recipes) -> None:
    def fails() -> None:
        raise recipes.rmt_training.RecipeError("what to do")

    with pytest.raises(SystemExit, match=r"^error: what to do$"):
        recipes.rmt_training.reported(fails)


def test_an_encoder_is_asked_within_its_segments(encoder: Path, recipes) -> None:
    recipe = replace(recipes.retrieval_settings.ENCODER, **recipes.retrieval_settings.TINY)
    trainer = recipes.train_retrieval.Trainer(recipe, encoder)
    assert not any(trainer.rests(117, 1.0).any() for _ in range(8))


def test_made_up_noise_holds_no_special_ids_and_no_answers(decoder: Path, recipes) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(decoder / "base")
    writer = recipes.facts_data.StatementWriter(tokenizer)
    bank = recipes.facts_data.NoiseBank.load(decoder / "training" / "noise.npz", tokenizer)
    recipes.episodes.EpisodeMaker(writer, bank, 1)
    made = bank._ordinary(np.arange(len(tokenizer)))
    assert not {*tokenizer.all_special_ids, *writer.answers.tolist()} & {*made.tolist()}
    assert (made == np.arange(len(tokenizer))).sum() == len(tokenizer) - len(tokenizer.all_special_ids) - 6


def test_the_pool_goes_on_from_a_converted_decoder(decoder: Path, recipes, tmp_path: Path) -> None:
    model = tmp_path / "model"
    convert(decoder / "model_best", model, decoder / "base", segment_size=112)
    recipe = replace(recipes.retrieval_settings.FACTS, **recipes.retrieval_settings.TINY)
    trainer = recipes.train_retrieval.Trainer(recipe, tmp_path / "more", model)
    trained = torch.load(decoder / "model_best" / "pytorch_model.bin", weights_only=True)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    trainer.begin_pool()
    assert torch.equal(trainer.blank.states[0], trained["memory_cell.memory"])
    assert trainer.tokenizer.get_vocab() == transformers.AutoTokenizer.from_pretrained(decoder / "base").get_vocab()
    trainer.curriculum()
    assert trainer.step == 0  # nothing is left of it
    wider = replace(recipe, width=64)
    with pytest.raises(recipes.rmt_training.RecipeError, match="other parameters than --kind"):
        recipes.train_retrieval.Trainer(wider, tmp_path / "wider", model)
    shallow = replace(recipe, layers=1)
    with pytest.raises(recipes.rmt_training.RecipeError, match="2 layers does not grow to 1"):
        recipes.train_retrieval.Trainer(shallow, tmp_path / "shallow", model)


def test_the_pool_goes_on_from_a_converted_encoder(encoder: Path, recipes, tmp_path: Path) -> None:
    model = tmp_path / "model"
    convert(encoder / "model_best", model, encoder / "base", segment_size=117)
    recipe = replace(recipes.retrieval_settings.ENCODER, **recipes.retrieval_settings.TINY)
    trainer = recipes.train_retrieval.Trainer(recipe, tmp_path / "more", model)
    trained = torch.load(encoder / "model_best" / "pytorch_model.bin", weights_only=True)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    decoder = replace(recipes.retrieval_settings.FACTS, **recipes.retrieval_settings.TINY)
    with pytest.raises(recipes.rmt_training.RecipeError, match="other parameters than --kind"):
        recipes.train_retrieval.Trainer(decoder, tmp_path / "decoder", model)


def test_a_grown_model_computes_the_same_with_directions_for_names(decoder: Path, recipes, tmp_path: Path) -> None:
    model = tmp_path / "model"
    convert(decoder / "model_best", model, decoder / "base", segment_size=112)
    recipe = replace(recipes.retrieval_settings.LINKS, **{**recipes.retrieval_settings.TINY, "layers": 3})
    trainer = recipes.train_retrieval.Trainer(recipe, tmp_path / "links", model)
    people = recipes.train_retrieval.Trainer(
        replace(recipes.retrieval_settings.FACTS, **recipes.retrieval_settings.TINY), tmp_path / "people", model
    )
    said, turned = (
        torch.tensor([trainer.tokenizer.encode(text)])
        for text in ("so Mary went to the garden", "so north went to the garden")
    )
    with torch.no_grad():
        expected = people.model.segment(people.model.initial_memory(1), said)
        for ids in (said, turned):
            for one, other in zip(trainer.model.segment(trainer.model.initial_memory(1), ids), expected, strict=True):
                torch.testing.assert_close(one, other)
    scales = {id(values): group["scale"] for group in trainer.optimizer.param_groups for values in group["params"]}
    for name, values in trainer.model.named_parameters():
        assert scales[id(values)] == (1.0 if ".layers.1." in name else recipe.grown_rate), name
    trainer.curriculum()
    assert trainer.step == 4 and any(
        p.any() for p in trainer.model.memory_cell.model.model.layers[1].mlp.down_proj.parameters()
    )


def test_a_placed_statement_is_tokenized_as_in_joined_text(decoder: Path, recipes) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(decoder / "base")
    writer, rng = recipes.facts_data.StatementWriter(tokenizer), np.random.default_rng(0)
    noise = recipes.facts_data.encode_files(tokenizer, [Path(json.__file__).read_text()])[:3000]
    for at in range(0, len(noise), 37):
        said = writer.fact(rng, at % 4, at % 6) if at % 2 else writer.chain(rng)[0]
        place, ids = writer.place(noise, at, said, rng)
        joined = [*noise[:place], *ids, *noise[place:]]
        assert tokenizer.encode(tokenizer.decode(joined), add_special_tokens=False) == joined


def test_questions_follow_from_what_was_said(decoder: Path, recipes) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(decoder / "base")
    data = recipes.facts_data
    writer = data.StatementWriter(tokenizer)

    def asked(*says: tuple[int, ...]) -> dict[str, str]:
        world = data.World()
        for one in says:
            world = world.told(one)
        found = writer.questions(world)
        return {tokenizer.decode(q).split("\n")[1][10:]: tokenizer.decode([a]).strip() for q, a in found}

    assert asked((0, 2), (1, 3), (0, 5)) == {"Where is Mary?": "kitchen", "Where is John?": "office"}
    north, south = data.DIRECTIONS.index("north"), data.DIRECTIONS.index("south")
    line = {"Which room is furthest north?": "garden", "Which room is furthest south?": "office"}
    assert asked((2, north, 5), (5, north, 3)) == line
    assert asked((3, south, 5), (5, south, 2)) == line


def test_an_episode_knows_what_was_read_by_when(decoder: Path, recipes) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(decoder / "base")
    writer = recipes.facts_data.StatementWriter(tokenizer)
    bank = recipes.facts_data.NoiseBank.load(decoder / "training" / "noise.npz", tokenizer)
    maker = recipes.episodes.EpisodeMaker(writer, bank, 1)
    for seed in range(20):
        said = [(30, writer.facts[0, seed % 6][0]), (70, writer.facts[1, 4][1])]
        row = maker.row(120, recipes.facts_data.World(), said, distracted=0.5)
        assert len(row.ids) == 120 and len(row.said) == 2
        for start, end, (name, room) in row.said:
            assert f"{recipes.facts_data.NAMES[name]} " in tokenizer.decode(row.ids[start:end])
            assert row.known(end).rooms[name] == room and row.known(end - 1).rooms[name] == -1
            assert row.cut_at(end - 1) and not row.cut_at(end)


def test_a_second_link_puts_a_third_room_at_an_end(decoder: Path, recipes) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(decoder / "base")
    writer, rng = recipes.facts_data.StatementWriter(tokenizer), np.random.default_rng(0)
    for seed in range(40):
        first = writer.chain(rng, count=1)[0]
        second = writer.another_link(rng, (*first.says[:3],))
        world = recipes.facts_data.World().told(first.says).told(second.says)
        answers = [answer for _, answer in writer.questions(world)]
        rooms = {room for near, _, far in world.links for room in (near, far)}
        assert len(rooms) == 3 and len(set(answers)) == 2, seed


def test_half_of_the_states_are_disturbed_by_noise_and_half_by_others(recipes) -> None:
    torch.manual_seed(0)
    memory = torch.randn(400, 8, 16)
    noisy, mixed = (recipes.pool.disturbed(memory, *most) - memory for most in ((0.4, 0.0), (0.0, 0.25)))
    for change in (noisy, mixed):
        assert 0.4 < float((change.flatten(1).norm(dim=1) > 0).float().mean()) < 0.6
    assert 0.0 < float(noisy.std()) < 0.4
    assert float(mixed.norm() / memory.norm()) < 0.25
    assert len(recipes.pool.disturbed(memory[:0], 0.4, 0.25)) == 0


def test_noise_that_was_taken_badly_is_read_by_others(decoder: Path, recipes) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(decoder / "base")
    writer = recipes.facts_data.StatementWriter(tokenizer)
    bank = recipes.facts_data.NoiseBank.load(decoder / "training" / "noise.npz", tokenizer)
    maker, bad = recipes.episodes.EpisodeMaker(writer, bank, 1), np.full(20, 7, dtype=np.int32)
    maker.feared.append(bad)
    for fear, least, most in ((0.0, 0, 0), (0.5, 10, 30)):
        maker.fear = fear
        rows = [maker.row(30, recipes.facts_data.World(), []).ids for _ in range(40)]
        assert least <= sum(np.array_equal(ids[:20], bad) for ids in rows) <= most
        assert {len(ids) for ids in rows} == {30}


def test_what_states_took_worst_is_read_again(decoder: Path, recipes, tmp_path: Path) -> None:
    of_another_run(decoder, tmp_path)
    sizes = {**recipes.retrieval_settings.TINY, "hard": 2, "lived": 8, "blank_size": 4}
    recipe = replace(recipes.retrieval_settings.FACTS, **sizes)
    trainer = recipes.train_retrieval.Trainer(recipe, tmp_path)
    pool, world = trainer.pool_states, recipes.facts_data.World().told((0, 1))
    for place in range(8):
        memory = trainer.model.initial_memory(1)[0].detach() + 0.1 * place
        pool.states[place] = recipes.pool.Lived(memory, world, 112)
    worst = {}
    plain = trainer.learner.live
    trainer.learner.live = lambda memory, rows: worst.setdefault("of", (memory, plain(memory, rows)))[1]
    trainer.begin_pool()
    trainer.live_on({})
    memory, reading = worst["of"]
    order = reading.loss.argsort(descending=True)[:2].tolist()
    assert reading.asked.any() and len(trainer.hard) == 2
    for one, i in zip(trainer.hard, order, strict=True):
        assert torch.equal(one.memory, memory[i]) and len(one.row.ids) == recipe.segment_size
    longer = trainer.maker.read_on(trainer.hard[0].row, 300)
    assert len(longer.ids) == 300 and np.array_equal(longer.ids[:112], trainer.hard[0].row.ids)
    trainer.learner.live = plain
    trainer.pool_step({}, 1.0)
    assert len(trainer.hard) == 2  # those of the next step


@pytest.fixture
def links(decoder: Path, recipes, tmp_path: Path):
    """A trainer of links, tiny, with nothing trained, at the start of its pool."""
    of_another_run(decoder, tmp_path)
    recipe = replace(recipes.retrieval_settings.LINKS, **recipes.retrieval_settings.TINY)
    trainer = recipes.train_retrieval.Trainer(recipe, tmp_path)
    trainer.begin_pool()
    return trainer


def test_states_that_know_nothing_are_kept_at_rest(links) -> None:
    blank, rng = links.blank, np.random.default_rng(0)
    blank.rest_is(links.model.fold(blank.states, links.noise(4, 0.0)))
    blank.states = blank.rest.repeat(4, 1, 1)
    blank.states[3] *= 2  # as far as the norm of the rest
    far = blank.far(blank.states)
    assert far[:3].max() < 1e-6 and abs(float(far[3]) - 1) < 1e-5
    assert torch.equal(blank.near(rng, 8), blank.states[:3])
    read, ids = blank.states.clone(), links.noise(4, 0.0)
    read[1] *= 1.5
    read[3] *= 1.5  # was far before: it holds something, and is not to be held back
    assert blank.keep_worst(read, ids, 2).tolist() == [True, False, True, False]
    (moved,) = blank.moved
    assert torch.equal(moved.memory, blank.states[1]) and torch.equal(moved.ids, ids[1])
    assert blank.leaving(rng, oldest=1e9, share=1.0).tolist() == [False, False, False, True]
    loss = links.unrest(0.0)
    loss.backward()
    assert loss > 0 and not blank.moved
    gradients = [values.grad for values in links.model.parameters() if values.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert links.model.memory_cell.memory.grad is None  # states come to their rest, not the rest to them


def test_the_pool_of_links_trains_from_its_first_step(links, monkeypatch: pytest.MonkeyPatch) -> None:
    unrest, plain = [], links.unrest
    monkeypatch.setattr(links, "unrest", lambda noise: unrest.append(plain(noise)) or unrest[-1])
    before, right = links.model.memory_cell.memory.detach().clone(), {}
    links.pool_step(right, 1.0)
    links.blank.states[:2] = links.blank.rest  # an untrained model's do not come near it
    links.pool_step(right, 1.0)
    assert unrest[0] == 0  # at the start no state has read anything
    assert unrest[1] > 0 and unrest[1].isfinite()
    assert not torch.equal(links.model.memory_cell.memory, before)
    assert 0 <= right["at rest"] < 1


def test_only_states_that_had_to_hold_on_are_read_again(links, recipes) -> None:
    world = recipes.facts_data.World
    link = links.maker.writer.chain(np.random.default_rng(0), 1)[0].says
    hard = []
    for _ in range(4):
        for place in range(links.recipe.pool_size):
            memory = links.model.initial_memory(1)[0].detach()
            links.pool_states.states[place] = recipes.pool.Lived(memory, world(links=(link,)), 112)
        links.hard = []
        links.live_on({})
        hard += links.hard
    assert hard and all(not one.row.said and one.row.world.links for one in hard)


@pytest.mark.parametrize("right", [True, False])
def test_a_state_that_knows_one_link_stays_when_it_is_told_the_second(links, recipes, right: bool) -> None:
    maker, world = links.maker, recipes.facts_data.World
    first, second = maker.writer.chain(np.random.default_rng(0), 2)
    memory = links.model.initial_memory(1).detach()
    old = recipes.pool.Lived(memory[0], world(links=(first.says,)), 500)
    links.pool_states.states[3] = old
    row = maker.row(112, old.world, [(5, second)])
    asked = torch.ones(1, dtype=torch.bool)
    reading = recipes.learners.Reading(memory.sum(), memory + 1, asked & right, asked)
    links.settle(reading, [row], [3], 112)
    assert links.pool_states.states[3] is old
    others = [state for state in links.pool_states.states if state is not None and state is not old]
    assert [(len(state.world.links), state.age) for state in others] == [(2, 612)] * right


def test_a_question_stands_in_a_text_of_its_own(decoder: Path, recipes) -> None:
    """Two questions in one text teach to answer the second by what the first one's answer leaves."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(decoder / "base")
    writer = recipes.facts_data.StatementWriter(tokenizer)
    bank = recipes.facts_data.NoiseBank.load(decoder / "training" / "noise.npz", tokenizer)
    maker = recipes.episodes.EpisodeMaker(writer, bank, 1)
    rows = [
        maker.row(60, recipes.facts_data.World(), [(5, writer.facts[n, n][0]), (40, writer.facts[2, 5][0])])
        for n in (0, 1)
    ]
    asks = maker.asks(rows, 50, np.array([10, 0]), count=2)
    assert asks.of.tolist() == [0, 0, 1] and len(asks.ids) == 3
    for text, (answer, end), (room, stop) in zip(asks.ids, asks.rows, asks.targets, strict=True):
        words = tokenizer.decode(text)
        assert words.count("Question") == words.count("Answer") == 1
        assert text[answer + 1] == room in writer.answers and text[end + 1] == stop == tokenizer.eos_token_id


def test_heads_start_out_looking_back(recipes) -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0}, attention_bias=True, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        recipes.copying_init.look_back(model.model.layers[0].self_attn, 4, 100.0)
        weights = model(torch.randint(0, 40, (1, 24)), output_attentions=True).attentions[0][0]
    for head in range(4):
        assert weights[head, 8:].argmax(1).tolist() == list(range(7 - head, 23 - head))


def test_an_encoders_heads_start_out_looking_around(recipes) -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=96, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    recipes.copying_init.look_around(model)
    with torch.no_grad():
        weights = model(torch.randint(1, 40, (1, 64)), output_attentions=True).attentions[0][0]
    for head, distance in enumerate((1, 2, 3, 4, 5, 6, -1, -2)):
        off = (weights[head, 8:56].argmax(1) - torch.arange(8 - distance, 56 - distance)).abs()
        assert off.max() <= 1 and (off == 0).float().mean() > 0.6, head  # neighbours differ in size


def test_the_language_model_recipe_runs(recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = RECIPES.parent / "rmt_engine"
    run(recipes.train_lm.main, "--smoke", "--text", str(text), "--out", str(tmp_path / "lm"))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(last["perplexity_after"]) == ["1", "2", "4", "8"]
    engine, recipe = converted(tmp_path / "lm", tmp_path)
    assert engine.config.segment_size == recipe["segment_size"] == 16
    assert any((tmp_path / "lm" / "held_out").iterdir())


def test_a_language_model_run_that_was_cut_off_goes_on(
    recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, plain, steps = RECIPES.parent / "rmt_engine", recipes.train_lm.Trainer.train_step, []

    def cut(trainer: object) -> torch.Tensor:
        steps.append(trainer.step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return plain(trainer)

    monkeypatch.setattr(recipes.train_lm.Trainer, "train_step", cut)
    command = ("--smoke", "--text", str(text), "--out", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(recipes.train_lm.main, *command)
    run(recipes.train_lm.main, *command)
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    with pytest.raises(recipes.rmt_training.RecipeError, match=r"other settings \(segment_size, rate\)"):
        run(recipes.train_lm.main, *command, "--segment-size", "12", "--rate", "0.1")
    with pytest.raises(recipes.rmt_training.RecipeError, match=r"other settings \(--text\)"):
        run(recipes.train_lm.main, *command[:2], str(text / "evaluation"), *command[3:])
    assert json.loads((tmp_path / "recipe.json").read_text())["steps"] == 8


def test_one_text_is_trained_on_but_for_its_end(recipes, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {i}\n" for i in range(1000)))
    (training,), (held_out,) = recipes.lm_data.documents(book)
    assert training + held_out == book.read_text() and held_out.startswith("line ")
    assert 0.05 < len(held_out) / len(training) < 0.15
    run(recipes.train_lm.main, "--smoke", "--steps", "2", "--text", str(book), "--out", str(tmp_path / "lm"))
    assert (tmp_path / "lm" / "model_best" / "pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("lines", "error"),
    [(3, "none of 1 texts to train on has 32 tokens"), (120, "none of 1 texts held out has 144 tokens")],
)
def test_texts_that_are_too_short_are_an_error_before_training(recipes, tmp_path: Path, lines: int, error: str) -> None:
    (tmp_path / "short.txt").write_text("a few words\n" * lines)
    with pytest.raises(recipes.rmt_training.RecipeError, match=error):
        run(recipes.train_lm.main, "--smoke", "--text", str(tmp_path / "short.txt"), "--out", str(tmp_path / "lm"))
    assert not [*(tmp_path / "lm" / "training").iterdir()]  # a tokenizer of these texts would serve the next ones


def test_a_half_precision_model_is_trained_in_full(recipes, decoder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    config = transformers.LlamaConfig.from_pretrained(decoder / "base", dtype="bfloat16")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    transformers.AutoTokenizer.from_pretrained(decoder / "base").save_pretrained(source)
    text = RECIPES.parent / "rmt_engine"
    command = ("--smoke", "--steps", "2", "--from", str(source), "--text", str(text), "--out", str(tmp_path / "lm"))
    run(recipes.train_lm.main, *command)
    weights = torch.load(tmp_path / "lm" / "model_best" / "pytorch_model.bin", weights_only=True)
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_document_streams_carry_on_until_the_horizon(recipes) -> None:
    documents = [np.arange(1000, 1100), np.arange(2000, 2300)]
    streams = recipes.lm_data.DocumentStreams(documents, batch=3, segment_size=10, seed=0)
    before, _ = streams.next(segments=2, horizon=4)
    for _ in range(20):
        ids, new = streams.next(segments=2, horizon=4)
        assert ids.shape == (3, 20) and (np.diff(ids) == 1).all()
        assert (ids[~new, 0] == before[~new, -1] + 1).all()
        before = ids
