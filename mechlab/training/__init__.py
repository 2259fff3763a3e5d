"""Training: the loop (loop.py), batches as pure functions (batches.py), checkpoints of training and of edits."""
