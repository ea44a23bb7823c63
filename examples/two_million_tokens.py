"""The main job, as a newcomer would try it: hide a fact in two million tokens, read them, ask for it.

The text is made of the sources of the Python that runs this, those files that the embedded checkpoint never saw in
training. It is read twice by the real command: as text, tokenized while it streams, and as a file of tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from rmt_engine.engine import EMBEDDED
from rmt_engine.evaluation.facts import Fact, random_fact
from rmt_engine.evaluation.noise import Noise, noise_text
from rmt_engine.tokens import Tokenizer


def hide(noise: Noise, tokens: int, rng: np.random.Generator) -> tuple[Fact, int, str, np.ndarray]:
    """A fact, the token where it stands, and the whole as text and as ids."""
    fact = random_fact(rng)
    laps = -(-tokens // len(noise))
    ends = np.concatenate([noise.starts[1:] + lap * len(noise) for lap in range(laps)])
    pieces = [i % len(noise.pieces) for i in range(int(np.searchsorted(ends, tokens)) + 1)]
    place = int(rng.integers(len(pieces)))
    cut = next(noise.tokenizer.cut_rule.cuts(noise.pieces[pieces[place]]), 0)
    texts = [noise.pieces[i] for i in pieces]
    texts[place] = f"{texts[place][:cut]}\n{fact.sentence}{texts[place][cut:]}"
    text = "".join(texts)
    at = int(ends[place - 1]) if place else 0
    return fact, at, text, noise.tokenizer.encode_pieces(texts)


def read(path: Path, fact: Fact) -> bool:
    """Runs the command on a file and shows what it prints; whether the answer is right."""
    command = [sys.executable, "-m", "rmt_engine", "run", "--input", str(path), "--ask", fact.question]
    print(f"\n$ rmt-engine run --input {path} --ask {fact.question!r}", flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(result.stdout, end="", flush=True)
    return fact.is_answered_by(result.stdout.strip().splitlines()[-1].removeprefix(fact.question))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder for the text and the token file")
    options = parser.parse_args()
    noise = Noise(noise_text(), Tokenizer.from_folder(EMBEDDED))
    fact, at, text, ids = hide(noise, options.tokens, np.random.default_rng(options.seed))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "big.txt").write_text(text, encoding="utf-8", newline="")
    np.save(options.out / "big.npy", ids.astype(np.uint16))
    about = {"tokens": len(ids), "fact": fact.sentence, "token": at, "seed": options.seed}
    (options.out / "big.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    print(f"{len(ids):,} tokens of Python's own sources, and near token {at:,}: {fact.sentence!r}")
    right = [read(options.out / name, fact) for name in ("big.txt", "big.npy")]
    print("\nthe fact was found both times" if all(right) else f"\nnot found: the answer is {fact.room}")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
