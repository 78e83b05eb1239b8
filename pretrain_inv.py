"""Stage 1a of TimeBalance: train the temporally-invariant teacher, without labels.

The loss L_I (Sec. 3.1.1, Eq. 1) makes clips of one video similar and clips of different videos
different. The training loop is lines 8 to 11 of the paper's Algorithm 1.

Reads:  the training videos.
Writes: OUT/inv.pt, which holds the backbone, the projection head and the similarity matrix of each
        video's clips (Eq. 5). Stage 2 fine-tunes the backbone. Stage 3 computes s from the
        matrices. OUT/inv.log: the command, then a line of JSON for each epoch.

    python pretrain_inv.py
        On toy videos, in two minutes on a CPU. The loss ends near 1.4. Its value at chance is
        2.94.
    python pretrain_inv.py --data folder --root my --arch r3d_18 --size 112 --init ./r3d_18.pth
        On your own videos, from public weights. The README has their address, and the flags for
        fewer than 1,000 videos.
    torchrun --nproc-per-node 4 pretrain_inv.py --data ucf101
        The paper's recipe on four GPUs: 250 epochs. Each GPU has 10 of a step's 40 videos.
        On one GPU of 80 GB: --checkpointing.
"""

import math

from common import (
    Batches, Embedder, Pool, State, UserError, all_gather, augment_clips, autocast, build_model,
    command, distribute, invariant_loss, matrices_for_tstr, print0, ranged, read_checkpoint, rng,
    seed_of, stage_parser, start, start_from, to_input, training_videos, warm_up)  # before torch

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau


@command
def main(argv=None):
    parser = stage_parser("pretrain_inv", __doc__)
    parser.add_argument("--temperature", type=ranged(float, 1e-3), default=0.1, metavar="X",
                        help="temperature tau of the loss, Eq. 1")
    parser.add_argument("--init", metavar="FILE", help="initial weights: public ones or a "
                        "checkpoint (default: random)")
    parser.add_argument("--name", default="inv", help="write OUT/NAME.pt")
    args, device, _ = start(parser, "pretrain_inv", argv)
    if args.batch < 2:
        raise UserError("--batch 1: Eq. 1 takes its negatives from other videos, give 2 or more")

    videos = training_videos(args)
    seed = seed_of("pretrain_inv", args.seed)
    torch.manual_seed(seed)
    embedder = Embedder(build_model(args.arch, len(videos.classes)))
    made_from = {}
    if args.init:
        made_from[args.init] = read_checkpoint(args.init, finished=False)
        start_from(embedder.backbone, args.init, made_from[args.init])
    embedder.to(device, memory_format=torch.channels_last_3d)
    n = args.clips
    net = distribute(embedder, args.batch * n, args, device)
    trained = [p for p in embedder.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, args.lr, betas=(0.9, 0.999), fused=True)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=args.patience)
    everyone = Pool(range(len(videos)), args.batch, cycle=False)
    steps = len(videos) // args.batch
    batches = Batches(videos, [everyone], steps, n * args.frames, seed, args, device)
    state = State("pretrain_inv", args, batches, made_from, model=embedder.backbone,
                  head=embedder.head, optimizer=optimizer, scheduler=scheduler)
    if state.finished:
        return
    chance = math.log(2 * args.batch - 1)  # the loss of a network to which all clips look alike
    print0(f"loss at chance: {chance:.3f}")

    for epoch in range(state.epoch, args.epochs):
        warm_up(optimizer, args.lr, epoch, args.warmup)
        net.train()
        for batch in state.steps():
            clips = [clip for video in batch.videos for clip in video.split(args.frames)]
            rngs = [rng(seed, *key, t) for key in batch.keys for t in range(n)]  # one for each clip
            clips = augment_clips(clips, args.size, rngs, flip=not args.no_flip)
            with autocast(args, device):
                z = net(to_input(clips, embedder.backbone))  # (own videos * n, 128)
            z = z.unflatten(0, (-1, n))
            z = all_gather(z)  # (B, n, 128): the other processes' videos are negatives, too
            loss = invariant_loss(z, args.temperature)  # Eq. 1
            optimizer.zero_grad()
            loss.backward()  # in frozen steps, too: it frees what autograd keeps of this step
            if state.steps_left() >= state.recalibration:  # then weights are frozen
                optimizer.step()
            state.add(len(clips), loss=loss)
            if state.steps_done() % args.save_every == 0:
                state.save()
        means = state.end_epoch()
        # A loss can stay at chance for thousands of steps before it falls: that is no plateau.
        if epoch >= args.warmup and means["loss"] < 0.95 * chance:
            scheduler.step(means["loss"])  # halves the learning rate on a plateau

    state.finish(**matrices_for_tstr(embedder, videos, args, device))  # Algorithm 1, line 16


if __name__ == "__main__":
    main()
