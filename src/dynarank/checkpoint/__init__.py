"""What survives a run: saving and loading, checkpoints for each step, and their verification."""
