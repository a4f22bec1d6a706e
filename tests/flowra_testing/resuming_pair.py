"""One of two processes that train together, save, and go on from what they saved.

Run as ``python -m flowra_testing.resuming_pair FOLDER PROCESS``. For every step that is saved at, what the process ends
with is written to ``FOLDER/<process>.json``: without a break, and after one.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from flowra_testing.resumable_run import ResumableRun

CASE, SAVED = "breathe of slots", (3, 6, 8)  # two of them among observed steps

if __name__ == "__main__":
    torch.set_num_threads(1)
    root, process = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=process, world_size=2)
    run = ResumableRun(CASE, process)
    while run.finished <= max(SAVED):
        if run.finished in SAVED:
            run.save(root / f"{run.finished}.{process}", root / f"{run.finished}")
        run.step()
    run.finish()
    ends = {"uninterrupted": run.fingerprint()}
    dist.barrier()  # the first process has written
    for step in SAVED:
        again = ResumableRun(CASE, process)
        again.restore(root / f"{step}.{process}", root / f"{step}")
        again.finish()
        ends[str(step)] = again.fingerprint()
    (root / f"{process}.json").write_text(json.dumps(ends))
    dist.destroy_process_group()
