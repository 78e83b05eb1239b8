"""Stage 2 of TimeBalance: fine-tune both teachers on the labelled videos.

The loss is the cross-entropy (Sec. 3.1.2; lines 17 to 21 of the paper's Algorithm 1). This stage
also chooses the labelled videos, by --percent, --per-class or --labeled-list.

Reads:  the labelled videos, OUT/inv.pt and OUT/dist.pt.
Writes: OUT/inv_ft.pt and OUT/dist_ft.pt, with a log each, and OUT/labeled.txt, the names and
        labels of the labelled videos.

    python finetune.py
        After stage 1 on toy videos, in two minutes on a CPU. The accuracy on the 24 labelled
        videos (train_accuracy) ends above 0.9.
    python finetune.py --init none
        The baseline from random weights, OUT/labeled_only.pt.
    torchrun --nproc-per-node 4 finetune.py --data ucf101 --percent 5
        After stage 1 on UCF101. 5 % of each class have a label.
"""

import argparse
import math
from pathlib import Path

from common import (
    WEAK, Batches, Pool, State, UserError, augment_clips, autocast, build_model, command,
    distribute, labeled_and_all_videos, rng, seed_of, stage_parser, start, start_from, to_input,
    warm_up, write_text)  # before torch

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau


@command
def main(argv=None):
    parser = stage_parser("finetune", __doc__)
    parser.add_argument("--init", nargs="+", default=["inv.pt", "dist.pt"], metavar="CHECKPOINT",
                        help="checkpoints to fine-tune, one after the other: file names in "
                        "--pretrained, or paths; none: random weights")
    parser.add_argument("--pretrained", metavar="DIR",
                        help="folder with the checkpoints of stage 1 (default: OUT)")
    args, device, pretrained = start(parser, "finetune", argv, lambda args, out: (
        args.init, args.pretrained or out, ["pretrain_inv", "pretrain_dist", None]))
    labeled, videos = labeled_and_all_videos(args)
    names = ["labeled_only" if init == "none" else f"{Path(init).stem}_ft" for init in args.init]
    if len(set(names)) < len(names):
        raise UserError(f"--init: two of these would write {args.out}/{names[0]}.pt")
    runs = []
    for init, name in zip(args.init, names):
        own_args = argparse.Namespace(**{**vars(args), "init": init, "name": name})
        runs.append(finetune(own_args, pretrained.get(init), labeled, videos, device))
    for run in runs:
        next(run)
    rows = [f"{videos.names[i]} {videos.labels[i]}\n" for i in labeled]
    write_text(Path(args.out) / "labeled.txt", "".join(rows))
    for run in runs:
        next(run, None)


def finetune(args, saved, labeled, videos, device):
    """Fine-tune one network. It stops at `yield`, prepared: so all runs are ready, or one has been
    refused, before the first one trains.

    saved: the content of the checkpoint to start from, None for random weights."""
    seed = seed_of("finetune", args.seed)
    torch.manual_seed(seed)
    model = build_model(args.arch, len(videos.classes))
    made_from = {}
    passed_on = {}  # of stage 1, for stage 3
    if saved is not None:
        start_from(model, args.init, saved)
        made_from[args.init] = saved
        passed_on = {k: v for k, v in saved.items() if k.startswith("similarity")}
        passed_on["pretrained_by"] = saved.get("stage")
    model.to(device, memory_format=torch.channels_last_3d)
    net = distribute(model, args.batch, args, device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.999), fused=True)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=args.patience)
    pool = Pool(labeled, args.batch, cycle=True)
    steps = math.ceil(len(labeled) / args.batch)
    batches = Batches(videos, [pool], steps, args.frames, seed, args, device)
    state = State("finetune", args, batches, made_from, labeled, model=model,
                  optimizer=optimizer, scheduler=scheduler)
    yield
    if state.finished:
        return

    for epoch in range(state.epoch, args.epochs):
        warm_up(optimizer, args.lr, epoch, args.warmup)
        net.train()
        for batch in state.steps():
            rngs = [rng(seed, *key, 0) for key in batch.keys]
            clips = augment_clips(batch.videos, args.size, rngs, not args.no_flip, **WEAK)
            y = torch.as_tensor(videos.labels[batch.ids]).to(device, non_blocking=True)
            with autocast(args, device):
                logits = net(to_input(clips, model))  # (b, classes)
            loss = F.cross_entropy(logits.float(), y)  # L_sup, Eq. 4
            optimizer.zero_grad()
            loss.backward()  # in frozen steps, too: it frees what autograd keeps of this step
            if state.steps_left() >= state.recalibration:  # then weights are frozen
                optimizer.step()
            accuracy = (logits.argmax(1) == y).float().mean()
            state.add(len(clips), loss=loss, train_accuracy=accuracy)
            if state.steps_done() % args.save_every == 0:
                state.save()
        means = state.end_epoch()
        if epoch >= args.warmup:
            scheduler.step(means["loss"])  # halves the learning rate on a plateau

    state.finish(**passed_on)


if __name__ == "__main__":
    main()
