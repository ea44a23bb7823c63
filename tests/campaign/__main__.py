"""python -m campaign [NAME ...] [--count N] [--seed N]: the campaigns, by default all of them at full count."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch

from campaign import checkpoints, enospc, kills, slots, states, token_files
from campaign.watched import Report

# name -> (full count, the campaign)
CAMPAIGNS: dict[str, tuple[int, Callable[[int, int], Report]]] = {
    "token_files": (100_000, token_files.run),
    "checkpoints": (10_000, checkpoints.run),
    "states": (10_000, states.run),
    "enospc": (0, lambda count, seed: enospc.run()),
    "kills": (100, kills.run),
    "slots": (1_000, slots.run),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="campaign", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CAMPAIGNS)}")
    parser.add_argument("--count", type=int, metavar="N", help="attempts, instead of the full figure of each")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other seeds damage and kill otherwise")
    options = parser.parse_args()
    if strange := set(options.names) - set(CAMPAIGNS):
        parser.error(f"no campaign {', '.join(sorted(strange))}; there are {', '.join(CAMPAIGNS)}")
    torch.set_num_threads(1)
    failed = 0
    for name in options.names or CAMPAIGNS:
        full, campaign = CAMPAIGNS[name]
        start = time.monotonic()
        report = campaign(options.count or full, options.seed)
        print(f"{report}\n  {time.monotonic() - start:.0f} s, seed {options.seed}", flush=True)
        failed += len(report.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
