"""A pretrained encoder tuned on RTE: full fine-tuning, LoRA, cuts."""

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.peft_arm import peft_lora
from benchmarks.training.problems.encoder import TunedRTE

_RATES = (0.25, 0.5, 1.0)

EXPERIMENT = Experiment(
    title="all-MiniLM-L6-v2 tuned on 1,600 pairs of RTE, one epoch, AdamW",
    problem=TunedRTE,
    metric="accuracy",
    arms=[
        *arms.with_rates(arms.full_rank(), _RATES),
        *arms.with_rates(arms.shorter(0.7), _RATES),
        peft_lora(8),
        *arms.adapters(8, rates=(4.0, 8.0, 16.0)),
        *arms.with_rates(arms.cut(0.7), _RATES),
        *arms.with_rates(arms.decays(0.7), _RATES),
    ],
    seeds=(0, 1, 2),
    points=2,
    note="Embeddings are frozen. Cut is by data, before the first step.",
)
