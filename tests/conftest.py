import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # reference.py and checkpoints_for_tests.py

import pytest
import torch
from checkpoints_for_tests import TinyCheckpoint, save_base, save_trainer_dict, tiny_decoder, tiny_encoder

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; some tests send it and wait for it
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings, most of all on a busy machine

SEGMENT = 20  # of the converted folders below


@pytest.fixture(scope="session")
def tiny_gpt2() -> TinyCheckpoint:
    """What `decoder_folder` was made of."""
    return tiny_decoder("gpt2", seed=5, noise="all", layers=2)


@pytest.fixture(scope="session")
def decoder_folder(tiny_gpt2: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted GPT-2 whose tokenizer makes one token of each byte."""
    return converted(tmp_path_factory.mktemp("decoder"), tiny_gpt2, ask_template=" Q: {question} A:", stop_ids=[0])


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted BERT classifier, aligned right; its tokenizer makes one token of each letter that stands alone."""
    return converted(tmp_path_factory.mktemp("encoder"), tiny_encoder("bert", seed=3, noise="all", layers=2))


def converted(folder: Path, tiny: TinyCheckpoint, **options: object) -> Path:
    """The authors' files in `folder`, converted to `folder`/converted."""
    from rmt_engine.checkpoint import convert

    source = save_trainer_dict(folder / "model_best.pth", tiny.state_dict())
    base = save_base(folder / "base", tiny)
    return convert(source, folder / "converted", base, segment_size=SEGMENT, **options).folder  # type: ignore[arg-type]
