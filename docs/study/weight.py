"""Is TSTR's weight s informative, or is it a fixed weight?

On the test videos of each run folder, 5 clips at one scale. Prints the mean and the standard
deviation of s over videos; the correlation of s with which teacher is right, over the videos that
exactly one of them gets right (positive: s is larger where the invariant one is right); and the
accuracy in per cent of both teachers combined by s, by the mean of s for all videos, and by 1/2.

    python docs/study/weight.py runs/study-*
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import (
    combine_teachers, command, default_precision, new_parser, prepare, read_checkpoint,
    read_videos)  # before torch: see its imports

import numpy as np
import torch

from evaluate import TEACHERS, class_probabilities, print_table, score_test_videos


@command
def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="run folders")
    args = parser.parse_args(argv)
    device = prepare(args)
    args.precision = args.precision or default_precision(args.device)
    args.clips = 5
    args.scales = [1.0]
    rows = []
    for folder in args.folders:
        teachers = {name: read_checkpoint(name, folder, ["finetune"]) for name in TEACHERS}
        trained = teachers[TEACHERS[0]]["args"]
        videos = read_videos(trained["data"], trained["root"], False, trained["split"])
        found = class_probabilities(teachers, videos, args, device, os.devnull)
        ids = list(found)
        s = score_test_videos(ids, teachers, folder, videos, args, device)
        p = torch.stack(list(found.values()), 1)
        rows.append([str(folder), *(f"{x:.2f}" for x in weigh(p, s, videos.labels[ids]))])
    print_table(["run", "mean of s", "its deviation", "one teacher right", "correlation", "by s",
                 "by its mean", "by 1/2"], rows)


def weigh(p, s, labels):
    """p: (2, N, C), of both teachers. s, labels: (N,) -> the seven numbers of a row."""
    right_inv, right_dist = (rows.argmax(1).numpy() == labels for rows in p)
    one = right_inv != right_dist
    correlation = np.corrcoef(s[one].numpy(), right_inv[one])[0, 1]

    def accuracy(weight):
        return 100 * np.mean(combine_teachers(*p, weight).argmax(1).numpy() == labels)

    fixed = [accuracy(torch.full_like(s, weight)) for weight in (float(s.mean()), 0.5)]
    return float(s.mean()), float(s.std()), one.sum(), correlation, accuracy(s), *fixed


if __name__ == "__main__":
    main()
