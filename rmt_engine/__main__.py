"""`python -m rmt_engine` is `rmt-engine`."""

import sys

from rmt_engine.cli import main

sys.exit(main())
