#!/bin/sh
# Expected: BatchNorm under DistributedDataParallel saves running statistics of all processes' data.
# Guess before the first run: about the mean over the processes, here 5.
# What happens: without SyncBatchNorm the statistics of process 0 go to all processes before each
#   step (broadcast_buffers). What is saved knows only the data of process 0. In the others the
#   mean stands at one step's update of it, here 1, after however many steps, though their data
#   have the mean 10. There eval mode and train mode are two networks.
# Versions: torch 2.14.1, gloo, two processes on a CPU. 2026-11-30.
# Who is hit: training over several GPUs or nodes whose processes see different data (sorted by
#   class or site), or few videos each.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cat > "$work/try.py" <<'EOF'
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


def train(rank, broadcast, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    layers = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    net = nn.parallel.DistributedDataParallel(layers, broadcast_buffers=broadcast)
    for _ in range(200):
        net(10 * rank + torch.randn(256, 1)).sum().backward()
    means = [None, None]
    dist.all_gather_object(means, round(layers[0].running_mean.item()))
    if rank == 0:
        print(f"broadcast_buffers={broadcast}: running means {means}, the data's [0, 10]")
    dist.destroy_process_group()


if __name__ == "__main__":
    for broadcast in (True, False):
        mp.spawn(train, (broadcast, f"{os.path.dirname(__file__)}/{broadcast}"), nprocs=2)
EOF
"$work/venv/bin/python" "$work/try.py" > "$work/seen" 2> "$work/errors" || cat "$work/errors"
cat "$work/seen"
diff - "$work/seen" <<'EOF'
broadcast_buffers=True: running means [0, 1], the data's [0, 10]
broadcast_buffers=False: running means [0, 10], the data's [0, 10]
EOF
echo "as recorded on 2026-11-30"
