"""What must hold in many processes. As a program it is one of them: it runs the checks that it is given in turn.

Every process runs every check; what one of them says went wrong is written down for `test_distributed.py`. The same
seed everywhere is the rule, and where a process is to differ, it says so.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

import distributed_alike  # noqa: F401 (registers its checks; the order is that in which they run)
import distributed_refusals  # noqa: F401 (registers its checks)
import distributed_runs  # noqa: F401 (registers its checks)
from ranks import CHECKS


def main(rank: int, count: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{count}", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    results = {}
    for name in names:
        try:
            CHECKS[name]()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        (folder / f"results-{count}-{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1]), json.loads(sys.argv[2]))
