"""A kernel of plain PyTorch that tells how fast a machine is at this moment: times are compared as ratios to its own.

Half an MLP block of GPT-2's shape: a layer norm, two matrix products in fp32, a GELU. It uses nothing of this project.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

ROWS, WIDTH, INNER = 128, 512, 2048
CALLS = 20


def calibration_seconds() -> float:
    """Processor time of the fastest of some calls: what else runs on the machine does not count."""
    generator = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(shape, generator=generator) for shape in ((ROWS, WIDTH), (INNER, WIDTH), (WIDTH, INNER)))
    times = []
    with torch.inference_mode():
        for _ in range(CALLS):
            start = time.process_time()
            F.linear(F.gelu(F.linear(F.layer_norm(x, (WIDTH,)), up)), down)
            times.append(time.process_time() - start)
    return min(times)
