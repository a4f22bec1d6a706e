"""Goes on, in a fresh process, with every run that was saved under a folder, after every step that it was saved at.

Run as ``python -m flowra_testing.resuming_child ROOT``. ``ROOT/<case>/<step>`` holds what
:class:`flowra_testing.resumable_run.ResumableRun` has saved. What each of them ends with is written to
``ROOT/<case>/resumed.json`` by step, and what it saves one step later to ``ROOT/<case>/<step>/next``.
"""

import json
import sys
from pathlib import Path

import torch

from flowra_testing.resumable_run import ResumableRun

if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sorted(Path(sys.argv[1]).iterdir()):
        ends = {}
        for step in sorted(int(folder.name) for folder in case.iterdir() if folder.is_dir()):
            run = ResumableRun(case.name)
            run.restore(case / str(step))
            run.step()
            run.save(case / str(step) / "next")
            run.finish()
            ends[step] = run.fingerprint()
        (case / "resumed.json").write_text(json.dumps(ends))
