"""The training run: launch, step, checkpoint, log."""
