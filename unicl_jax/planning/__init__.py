"""Before a run: does it fit, how fast is it, what bounds it; no accelerator needed."""
