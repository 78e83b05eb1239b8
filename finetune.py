"""Stage 2 of TimeBalance: both teachers learn the classes from the labelled videos (Sec. 3.1.2;
Algorithm 1, lines 17-21).

Draws the labelled videos (--percent or --labeled-list) and writes their names to OUT/labeled.txt.
Reads OUT/inv.pt and OUT/dist.pt, writes OUT/inv_ft.pt and OUT/dist_ft.pt. With --init none it
trains the labelled-only baseline instead, from random weights: OUT/labeled_only.pt.

    python finetune.py                                  # after stage 1 on toy videos: seconds
    python finetune.py --init none                      # the baseline
    torchrun --nproc-per-node 4 finetune.py --data ucf101 --percent 5
"""

from pathlib import Path

from common import (
    WEAK, Batches, Meter, Parser, Pool, State, augment_clips, autocast, build_model, command, draw,
    find_checkpoint, labeled_and_all_videos, read_checkpoint, report_neighbours, seed_of, settle,
    shared_arguments, start, start_from, to_input, warm_up)  # before torch

import torch
import torch.nn.functional as F


@command
def main(argv=None):
    parser = Parser(__doc__, parents=[shared_arguments("finetune")])
    parser.add_argument("--init", nargs="+", default=["inv.pt", "dist.pt"], metavar="CHECKPOINT",
                        help="what to fine-tune, one after the other: file names in --pretrained, "
                        "paths, or none for random weights")
    parser.add_argument("--pretrained", metavar="DIR", help="folder of stage 1 (default: OUT)")
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


if __name__ == "__main__":
    main()
