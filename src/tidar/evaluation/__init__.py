"""Scores of a checkpoint on tasks of lm-evaluation-harness. lm-eval is imported by `harness.py` and `run.py` only."""
