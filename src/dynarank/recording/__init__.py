"""Recording a run: what any training loop does, in the files that reports are made of."""
