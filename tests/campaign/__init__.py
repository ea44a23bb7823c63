"""The long checks of reliability: files damaged at random, runs killed at random, disks that fail.

`make campaign` runs them at full count; `tests/test_reliability.py` runs a small share of each.
"""
