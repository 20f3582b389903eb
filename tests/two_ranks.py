"""A function in two processes that meet over gloo; those that hang say where, and end."""

import faulthandler
import gc
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 300  # seconds, of which a slow machine under load needs a part


def _rank(rank, meet, function, args):
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    limit = timedelta(seconds=LIMIT / 2)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2, timeout=limit)
    # What it made is gone before the group is: a DistributedDataParallel that is the last to hold the group waits for
    # gloo's threads and keeps the GIL, for which one of them may wait (pytorch/pytorch#56297).
    function(rank, *args)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def run(function, folder, *args):
    """``function(rank, folder, *args)`` on both ranks. An error of one of them is raised."""
    context = mp.spawn(_rank, (folder / "meet", function, (folder, *args)), nprocs=2, join=False)
    end = time.monotonic() + 2 * LIMIT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "a rank does not end"
    finally:
        for process in context.processes:
            process.kill()
