"""Stage 2 of TimeBalance: fine-tune both teachers on the labelled videos.

The loss is the cross-entropy (Sec. 3.1.2; lines 17 to 21 of the paper's Algorithm 1). This stage
also chooses the labelled videos, by --percent or --labeled-list.

Reads:  the labelled videos, OUT/inv.pt and OUT/dist.pt.
Writes: OUT/inv_ft.pt and OUT/dist_ft.pt, with a log each, and OUT/labeled.txt, the names and
        labels of the labelled videos.

    python finetune.py
        After stage 1 on toy videos, in a minute on a CPU. The accuracy on the 24 labelled
        videos (train_accuracy) ends near 0.9.
    python finetune.py --init none
        The baseline from random weights, OUT/labeled_only.pt.
    torchrun --nproc-per-node 4 finetune.py --data ucf101 --percent 5
        After stage 1 on UCF101. 5 % of each class have a label.
"""

import functools
import math
from pathlib import Path

from common import (
    WEAK, Batches, Meter, Parser, Pool, State, Videos, augment_clips, autocast, build_model,
    centre_crop, command, cosine_similarity, draw, find_checkpoint, labeled_and_all_videos,
    map_videos, print0, read_checkpoint, seed_of, settle, shared_arguments, spaced_clips, start,
    start_from, to_input, warm_up)  # before torch

import numpy as np
import torch
import torch.nn.functional as F


@command
def main(argv=None):
    parser = Parser(__doc__, parents=[shared_arguments("finetune")])
    parser.add_argument("--init", nargs="+", default=["inv.pt", "dist.pt"], metavar="CHECKPOINT",
                        help="checkpoints to fine-tune, one after the other: file names in "
                        "--pretrained, or paths; none: random weights (default: inv.pt dist.pt)")
    parser.add_argument("--pretrained", metavar="DIR",
                        help="folder with the checkpoints of stage 1 (default: OUT)")
    args, device = start(parser, "finetune", argv)
    pretrained = {}
    for init in args.init:
        path = find_checkpoint(init, args.pretrained or args.out)
        stages = ["pretrain_inv", "pretrain_dist", None]
        pretrained[init] = None if init == "none" else read_checkpoint(path, stages)
    settle(parser, "finetune", args, pretrained,
           inherited=["data", "root", "split", "pool", "arch", "size"])
    labeled, videos = labeled_and_all_videos(args)
    for init, saved in pretrained.items():
        args.init = init  # each checkpoint says what it alone was made from
        finetune(args, saved, labeled, videos, device)


def finetune(args, saved, labeled, videos, device):
    seed = seed_of("finetune", args.seed)
    torch.manual_seed(seed)
    model = build_model(args.arch, len(videos.classes))
    name = "labeled_only"
    similarity = {}  # what stage 1 measured goes on to stage 3
    if saved is not None:
        start_from(model, args.init, saved)
        name = f"{Path(args.init).stem}_ft"
        similarity = {k: v for k, v in saved.items() if k.startswith("similarity")}
    pool = Pool(labeled, args.batch, cycle=True)
    batches = Batches(videos, [pool], args.frames, seed, args, device)
    state = State("finetune", name, args, model, batches, device, labeled, similarity)
    if state.finished:
        return
    if similarity and state.epoch == state.step == 0:
        report_neighbours(model, videos, labeled, args, device)
    meter = Meter(state, batches)

    for epoch in range(state.epoch, args.epochs):
        warm_up(state.optimizer, args.lr, epoch, args.warmup)
        state.net.train()
        for batch in meter.steps(epoch):
            rngs = [draw(seed, *key, 0) for key in batch.keys]
            clips = augment_clips(batch.videos, args.size, rngs, **WEAK)
            y = torch.as_tensor(videos.labels[batch.ids]).to(device, non_blocking=True)
            with autocast(args, device):
                logits = state.net(to_input(clips, model))  # (b, classes)
            loss = F.cross_entropy(logits.float(), y)  # L_sup, Eq. 4
            state.update(loss)
            accuracy = (logits.argmax(1) == y).float().mean()
            meter.add(len(clips), loss=loss, train_accuracy=accuracy)
        means = meter.means()
        if epoch >= args.warmup:
            state.scheduler.step(means["loss"])  # halves the learning rate on a plateau
        state.end_epoch(means)  # log, checkpoint

    state.finish()


def report_neighbours(model, videos, labeled, args, device):
    """Print nearest_neighbours of a model beside those of an untrained one and chance."""
    counts = np.bincount(videos.labels[labeled])
    ids = labeled[counts[videos.labels[labeled]] > 1]  # the only one of its class has no match
    if len(ids) < 2:
        return
    ids = ids[::math.ceil(len(ids) / 2000)]  # at most 2,000
    counts = np.bincount(videos.labels[ids])
    untrained = build_model(args.arch, len(videos.classes))
    trained = nearest_neighbours(model, videos, ids, args, device)
    untrained = nearest_neighbours(untrained, videos, ids, args, device)
    chance = (counts * (counts - 1)).sum() / len(ids) / (len(ids) - 1)
    print0(f"{args.init}: the nearest other labelled video is of the same class for "
           f"{100 * trained:.1f} % of {len(ids)} videos; of an untrained network for "
           f"{100 * untrained:.1f} %, at chance for {100 * chance:.1f} %")


def nearest_neighbours(backbone, videos, ids, args, device):
    """The share of the videos `ids` whose nearest other one is of the same class: what the features
    of stage 1 know of the classes, before a label has trained them.

    By the cosine of features, mean over time, of the clip in the middle of each video."""
    def features(frames):
        clips = [centre_crop(video, args.size) for video in frames]
        with autocast(args, device):
            return backbone.features(to_input(clips, backbone)).float().mean(2)

    names = [videos.name(i) for i in ids]
    some = Videos(videos.folder, names, videos.labels[ids], videos.classes)
    span = functools.partial(spaced_clips, clips=1, frames=args.frames, stride=args.stride)
    backbone.to(device, memory_format=torch.channels_last_3d).eval()
    rows, _ = map_videos(features, some, span, args.batch, args.size, args.workers, device,
                         "neighbours")
    z = torch.stack(list(rows.values()))
    labels = some.labels[list(rows)]
    nearest = cosine_similarity(z, z).fill_diagonal_(-torch.inf).argmax(1)
    return float((labels[nearest] == labels).mean())


if __name__ == "__main__":
    main()
