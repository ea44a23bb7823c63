import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # reference.py and checkpoints_for_tests.py

import torch

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings, most of all on a busy machine
