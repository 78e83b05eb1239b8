"""Stage 2 of TimeBalance: both teachers learn the classes from the labelled videos (Sec. 3.1.2; Algorithm 1, 17-21).

Draws the labelled videos (--percent or --labeled-list) and writes their names to OUT/labeled.txt. Reads OUT/inv.pt and
OUT/dist.pt, writes OUT/inv_ft.pt and OUT/dist_ft.pt. With --init none it trains the labelled-only baseline instead,
from random weights: OUT/labeled_only.pt.

    python finetune.py                                           # after stage 1 on toy videos: seconds on a CPU
    python finetune.py --init none                               # the baseline
    torchrun --nproc-per-node 4 finetune.py --data ucf101 --percent 5
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from common import (
    WEAK, Parser, Pool, Run, VideoStream, augment, autocast, build_model, choose_labeled, command, draw, load_backbone,
    load_finished, settle_arguments, start, to_input, training_videos)


@command
def main(argv=None):
    parser = Parser(__doc__, "finetune")
    parser.add("model", "--init", "what to fine-tune, one after the other: file names in --pretrained, paths, or none "
               "for random weights", nargs="+", default=["inv.pt", "dist.pt"], metavar="CHECKPOINT")
    parser.add("model", "--pretrained", "folder of stage 1 (default OUT)", metavar="DIR")
    args = parser.parse_args(argv)
    device = start(args)
    pretrained = load_finished(args.init, args.pretrained or args.out, ["pretrain_inv", "pretrain_dist", None])
    settle_arguments(args, "finetune", pretrained, ["data", "root", "split", "pool", "arch", "size"])
    videos = training_videos(args)
    labeled = choose_labeled(videos, args)
    for init in args.init:
        finetune(argparse.Namespace(**{**vars(args), "init": init}), pretrained.get(init), videos, labeled, device)


def finetune(args, saved, videos, labeled, device):
    torch.manual_seed(args.seed)
    model = build_model(args.arch, len(videos.classes))
    if saved:
        load_backbone(model, args.init, saved)
    name = "labeled_only" if args.init == "none" else f"{Path(args.init).stem}_ft"
    run = Run(args, "finetune", name, model, videos, device, labeled)
    if run.finished:
        return
    if saved and "similarity" in saved:
        run.carried = {key: value for key, value in saved.items() if key.startswith("similarity")}
    stream = VideoStream(videos, [Pool(labeled, args.batch, cycle=True)], args.frames, args, device, run)

    for _ in run.epochs():
        for frames, numbers, keys in run.steps(stream):
            clips = [augment(video, args.size, draw(args.seed, *key, 0), **WEAK) for video, key in zip(frames, keys)]
            y = torch.as_tensor(videos.labels[numbers]).to(device, non_blocking=True)
            with autocast(args, device):
                logits = run.net(to_input(clips, model))  # (b, classes)
            loss = F.cross_entropy(logits.float(), y)  # L_sup, Eq. 4
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            run.record(len(clips), loss=loss, accuracy=(logits.argmax(1) == y).float().mean())
    run.finish()


if __name__ == "__main__":
    main()
