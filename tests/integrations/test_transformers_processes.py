"""The Trainer under DDP, started by torchrun: the losses of one process, and every resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pretrained_models import gpt2
from trainer_runs import fit
from warm_python import run as python

TESTS = Path(__file__).parents[1]
SCRIPT = """
import json, os, sys
from pathlib import Path
from pretrained_models import gpt2
from trainer_runs import fit
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
how = {"ddp_backend": "gloo", "save_steps": 4, "per_device_train_batch_size": 2}
found = {}
def model(seed=0):
    made = gpt2(seed)
    for dropout in made.modules():
        dropout.p = 0.0  # each process draws its own
    return made
for to in ("adapted", "low-rank"):
    found[to] = [fit(model(), folder / to, to, save_strategy="steps", **how)]
    for step in (4, 12, 20):
        checkpoint = str(folder / to / f"checkpoint-{step}")
        found[to].append(fit(model(5), folder / "again", to, resume=checkpoint, **how))
if rank == 0:
    (folder / "losses.json").write_text(json.dumps(found))
os._exit(0)  # gloo's threads, still at the Trainer's last call, may abort a process that ends
"""


@pytest.mark.slow
def test_two_processes_train_and_resume_alike(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d"
    launcher += " --rdzv-endpoint localhost:0"
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = python([*launcher.split(), tmp_path / "script.py", tmp_path], env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for to, (whole, *again) in json.loads((tmp_path / "losses.json").read_text()).items():
        assert len(again) == 3 and all(losses == whole for losses in again), to
        alone = gpt2()
        for module in alone.modules():
            module.p = 0.0
        assert fit(alone, tmp_path / "alone", to) == pytest.approx(whole, abs=1e-4)
