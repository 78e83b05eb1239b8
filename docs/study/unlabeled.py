"""How well classifiers know the unlabelled training videos of UCF101.

The clips of one group were cut from the same recording: v_<Class>_g<group>_c<clip>.avi. So an
unlabelled video is easy if a labelled one is of its group. Prints, in per cent, as the mean and the
standard deviation over run folders: the accuracy on all unlabelled videos, on those of a labelled
group and on the others; the confidence, which is the probability of the predicted class; and the
accuracy on all minus that of the last of --rows. One clip in the middle of each video.

    python docs/study/unlabeled.py runs/ucf14-?-?-20 --rows student_dist.pt student_alone_dist.pt
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import (
    Videos, combine_teachers, command, default_precision, find_labeled, new_parser, prepare, print0,
    read_checkpoint, read_videos)  # before torch: see its imports

import numpy as np
import torch

from docs.study.intervals import compare
from evaluate import TEACHERS, class_probabilities, print_table, spread
from train_student import weigh_videos


@command
def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="run folders")
    parser.add_argument("--rows", nargs="+", default=["student.pt", "student_alone_dist.pt"],
                        metavar="CHECKPOINT", help="classifiers, beside both teachers")
    args = parser.parse_args(argv)
    device = prepare(args)
    args.precision = args.precision or default_precision(args.device)
    args.clips = 1
    args.scales = [1.0]
    labeled_groups = []  # of each folder, the share of unlabelled videos that are in one
    numbers = {}  # of each row, {name: the four numbers of each folder}
    for folder in args.folders:
        saved = {}
        for name in (*TEACHERS, *args.rows):
            saved[name] = read_checkpoint(name, folder, ["finetune", "student"])
        trained = saved[TEACHERS[0]]["args"]
        videos = read_videos(trained["data"], trained["root"], True, trained["split"])
        labeled = find_labeled(videos, saved)
        groups = {group_of(videos.names[i]) for i in labeled}
        ids = np.setdiff1d(np.arange(len(videos)), labeled)
        unlabeled = Videos(videos.folder, [videos.names[i] for i in ids], videos.labels[ids],
                           videos.classes)
        found = class_probabilities(saved, unlabeled, args, device, os.devnull)
        names = [unlabeled.names[i] for i in found]
        labels = unlabeled.labels[list(found)]
        p = dict(zip(saved, torch.stack(list(found.values()), 1)))
        s = weigh_videos("tstr", {name: saved[name] for name in TEACHERS}, names)
        p["teachers, TSTR"] = combine_teachers(*(p[name] for name in TEACHERS), s)
        easy = np.array([group_of(name) in groups for name in names])
        labeled_groups.append(100 * easy.mean())
        for name, rows in p.items():
            confidence, predicted = rows.max(1)
            right = predicted.numpy() == labels
            four = [right.mean(), right[easy].mean(), right[~easy].mean(), confidence.mean()]
            numbers.setdefault(name, []).append([100 * float(x) for x in four])

    print0(f"{spread(labeled_groups)} % of the unlabelled videos are of a labelled group")
    control = np.array(numbers[args.rows[-1]])
    table = []
    for name, values in numbers.items():
        table.append([name, *map(spread, zip(*values)), *compare((values - control)[:, 0])])
    print_table([f"{len(args.folders)} runs", "all", "labelled groups", "others", "confidence",
                 f"all - {args.rows[-1]}", "95 % interval", "above 0"], table)


def group_of(name):
    return name.rpartition("_c")[0]


if __name__ == "__main__":
    main()
