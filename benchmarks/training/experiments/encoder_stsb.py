"""A pretrained encoder tuned on STS-B: full fine-tuning, LoRA, cuts."""

from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.peft_arm import fine_tuning
from benchmarks.training.problems.encoder import STSB

EXPERIMENT = Experiment(
    title="all-MiniLM-L6-v2 tuned on 1,600 pairs of STS-B, one epoch, AdamW",
    label="MiniLM, STS-B",
    problem=STSB,
    metric="spearman",
    arms=fine_tuning(),
    points=2,
    note="Embeddings are frozen. Cut is by data, before the first step.",
)
