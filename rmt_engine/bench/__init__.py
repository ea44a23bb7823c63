"""`rmt-engine bench`: speed and memory over the length of the context, beside baselines measured in the same run.

arguments.py what can be said; setup.py the model; readers.py who reads; session.py, cases.py what is read, checked and
timed; timing.py, card.py, peak_memory.py how it is measured; results.py rows and their formats; command.py the plan.
"""
