"""Run a script with the frames of each video decoded only once, into a cache on the disk.

A file holds all frames of a video, as decode_frames scales them: 1.5 GB for the training videos of
the fourteen classes at --size 32. No digit changes. CACHE names the folder.

    python docs/study/cached.py pretrain_inv.py --data ucf101 --workers 0
"""

import hashlib
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # before torch: see its imports

import numpy as np
import torch

decode_frames = common.decode_frames


def read_frames(path, indices, short_side=None):
    """decode_frames, from the cache."""
    folder = Path(os.environ.get("CACHE", "data/decoded"))
    key = hashlib.sha256(os.fsencode(f"{os.path.realpath(path)} {short_side}")).hexdigest()
    file = folder / f"{key}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{os.getpid()}.npy"  # other processes may write the same video
        np.save(part, decode_frames(path, range, short_side).numpy())
        part.replace(file)
    frames = np.load(file, mmap_mode="r")
    return torch.from_numpy(frames[indices(len(frames)) if callable(indices) else indices])


if __name__ == "__main__":
    common.decode_frames = read_frames
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
