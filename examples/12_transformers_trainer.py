"""Dynamic rank in transformers' Trainer, by one callback; a checkpoint that is resumed and loaded.

The pixels of scikit-learn's digits are the words of a tiny BERT. The Trainer's losses are those of
a plain loop, step by step, through both changes of form, and so are those of a run that is resumed
from a checkpoint. Needs ``pip install 'dynarank[hf,demo]'``; runs in some seconds on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

import dynarank as dr
from dynarank.integrations.transformers import DynamicRankCallback

BATCH, RATE = 16, 3e-3


def network(seed: int = 0) -> BertForSequenceClassification:
    """A BERT that reads 64 pixels of 17 grays."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=17, num_hidden_layers=1, num_labels=10, **sizes, **without)
    return BertForSequenceClassification(config)


def schedule(steps: int) -> dr.schedules.Schedule:
    """Low-rank, full-rank from a third of the run, an adapter on frozen weights from two thirds."""
    return dr.schedules.dynamic_rank(rank=4, inflate=steps // 3, deflate=2 * steps // 3)


def with_the_trainer(data: Any, steps: int, folder: str, resume: str | None = None) -> Any:
    """Train; the model and the loss of each step."""
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=steps // 4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    callback = DynamicRankCallback(schedule(steps))
    model = network(seed=0 if resume is None else 1)  # whose weights are those of the checkpoint
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)  # a line for each step
    trainer.train(resume_from_checkpoint=resume)
    return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def with_a_plain_loop(data: Any, steps: int) -> list[float]:
    """What the Trainer does by default, written out; the loss of each step."""
    model, losses = network().train(), list[float]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    torch.manual_seed(42)  # TrainingArguments.seed, of which the adapters are drawn
    how: dict[str, Any] = {"lr_scheduler": rates, "lr_every": 1}
    ranks = dr.RankScheduler(model, optimizer, schedule(steps), steps, **how)
    for step in range(steps):
        batch = data[step * BATCH : (step + 1) * BATCH]
        ids = torch.stack([row["input_ids"] for row in batch])
        labels = torch.tensor([row["labels"] for row in batch])
        loss = model(input_ids=ids, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if changes := ranks.step():
            one = changes[0]
            print(f"step {step + 1}: {one.before} -> {one.after}, {len(changes)} layers")
    return losses


def main() -> None:
    """Train on the handwritten digits of scikit-learn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=96, help="the length of the run")
    steps = parser.parse_args().steps
    disable_progress_bar()

    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.long)
    data = [{"input_ids": x, "labels": int(y)} for x, y in zip(pixels, digits.target, strict=True)]

    plain = with_a_plain_loop(data, steps)
    with tempfile.TemporaryDirectory() as folder:
        model, losses = with_the_trainer(data, steps, folder)
        for step, (one, other) in enumerate(zip(losses, plain, strict=True)):
            assert abs(one - other) < 1e-4, f"step {step}: {one} and {other}"
        for part in (1, 2, 3):
            checkpoint = f"{folder}/checkpoint-{part * (steps // 4)}"
            _, resumed = with_the_trainer(data, steps, f"{folder}/resumed", checkpoint)
            assert resumed == losses, checkpoint

        model.save_pretrained(f"{folder}/ranked")  # the forms are written into its config.json
        loaded = BertForSequenceClassification.from_pretrained(f"{folder}/ranked")
        x = pixels[:8]
        torch.testing.assert_close(loaded(x).logits, model.eval()(x).logits)
    print(f"{steps} losses as in the plain loop; resumed from 3 checkpoints: the same")
    print(f"loaded: {loaded.bert.encoder.layer[0].attention.self.query.form}")


if __name__ == "__main__":
    main()
