"""What scored completions say of a training before it is started: see `tools/diagnose.py`."""
