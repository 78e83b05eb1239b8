"""Stage 1b of TimeBalance: train the temporally-distinctive teacher, without labels.

The loss L_D = L_D1 + L_D2 makes clips of one video different from each other. L_D1 (Sec. 3.1.2,
Eq. 3) compares clips under two augmentations. L_D2 (supplement D.2) compares them with the time
steps of a long clip. The training loop is lines 12 to 15 of the paper's Algorithm 1.

Reads:  the training videos.
Writes: OUT/dist.pt and OUT/dist.log, with the same content as those of stage 1a. The student of
        stage 3 starts from dist.pt.

    python pretrain_dist.py
        On toy videos, in two minutes on a CPU. l_d1 ends near 1.2, l_d2 near 0.9. Their values at
        chance are 1.95 and 1.39.
    python pretrain_dist.py --invariant-weight 1 --epochs 14
        Adds L_I, which takes more epochs on toy videos, and writes both.pt. The paper's student
        starts from a similar pre-training (TCLR).
    torchrun --nproc-per-node 4 pretrain_dist.py --data ucf101
        The paper's recipe on four GPUs. On one GPU of 80 GB: --batch 16 --checkpointing.
"""

import math

from common import (
    Batches, Embedder, Pool, State, UserError, all_gather, augment_clips, autocast, build_model,
    command, distinctive_loss, distribute, invariant_loss, matrices_for_tstr, print0, ranged,
    read_checkpoint, rng, seed_of, stage_parser, start, start_from, to_input, training_videos,
    unpooled_distinctive_loss, warm_up)  # before torch

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau


@command
def main(argv=None):
    parser = stage_parser("pretrain_dist", __doc__)
    parser.add_argument("--temperature", type=ranged(float, 1e-3), default=0.1, metavar="X",
                        help="temperature tau of the losses, Eq. 3")
    parser.add_argument("--invariant-weight", type=ranged(float, 0), default=0.0, metavar="X",
                        help="add X times the loss of stage 1a, L_I")
    parser.add_argument("--init", metavar="FILE", help="initial weights: public ones or a "
                        "checkpoint (default: random)")
    parser.add_argument("--name", help="write OUT/NAME.pt (default: dist, or both with "
                        "--invariant-weight)")
    args, device, _ = start(parser, "pretrain_dist", argv)
    args.name = args.name or ("both" if args.invariant_weight else "dist")
    if args.batch < 2 and args.invariant_weight:
        raise UserError("--batch 1: Eq. 1 takes its negatives from other videos, give 2 or more")
    n = args.clips
    with torch.device("meta"):  # computes only shapes
        x = torch.empty(1, 3, args.frames, 64, 64)
        time_steps = build_model(args.arch, 1).features(x).shape[2]
    if time_steps % n:
        raise UserError(f"--frames {args.frames} leave {time_steps} time steps in the features of "
                        f"{args.arch}, which L_D2 cannot cut into --clips {n} equal slices: give "
                        f"another number of --clips or --frames, or --arch slow_r50")

    videos = training_videos(args)
    seed = seed_of("pretrain_dist", args.seed)
    torch.manual_seed(seed)
    embedder = Embedder(build_model(args.arch, len(videos.classes)))
    made_from = {}
    if args.init:
        made_from[args.init] = read_checkpoint(args.init, finished=False)
        start_from(embedder.backbone, args.init, made_from[args.init])
    embedder.to(device, memory_format=torch.channels_last_3d)
    net = distribute(embedder, args.batch * 2 * (n + 1), args, device)
    trained = [p for p in embedder.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, args.lr, betas=(0.9, 0.999), fused=True)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=args.patience)
    everyone = Pool(range(len(videos)), args.batch, cycle=False)
    steps = len(videos) // args.batch
    batches = Batches(videos, [everyone], steps, n * args.frames, seed, args, device)
    state = State("pretrain_dist", args, batches, made_from, model=embedder.backbone,
                  head=embedder.head, optimizer=optimizer, scheduler=scheduler)
    if state.finished:
        return
    # The loss of a network to which all clips look alike: of l_d1, l_d2 and l_i.
    chance = math.log(2 * n - 1) + math.log(n)
    chance += args.invariant_weight * math.log(2 * args.batch - 1)
    print0(f"loss at chance: {chance:.3f} (l_d1 {math.log(2 * n - 1):.3f}, l_d2 {math.log(n):.3f})")

    for epoch in range(state.epoch, args.epochs):
        warm_up(optimizer, args.lr, epoch, args.warmup)
        net.train()
        for batch in state.steps():
            # Of each video its n clips, and the long clip that spans them in as many frames as one
            # has; all of them twice, for two augmentations.
            short = [clip for video in batch.videos for clip in video.split(args.frames)] * 2
            long = [video[::n] for video in batch.videos] * 2
            views = [(*key, view * (n + 1)) for view in (0, 1) for key in batch.keys]
            rngs = [rng(seed, *key, draw + t) for *key, draw in views for t in range(n)]
            rngs += [rng(seed, *key, draw + n) for *key, draw in views]
            clips = augment_clips(short + long, args.size, rngs, flip=not args.no_flip)
            with autocast(args, device):
                x = to_input(clips, embedder.backbone)
                rows = net(x, num_long=len(long), slices=n)
            of_clips, of_slices = rows.split([len(short), len(long) * n])
            z, z_aug = of_clips.unflatten(0, (2, -1, n))  # (b, n, 128) each: clips
            g, g_aug = of_slices.unflatten(0, (2, -1, n))  # (b, n, 128) each: slices of long clips
            l_d1 = distinctive_loss(z, z_aug, args.temperature)  # Eq. 3
            l_d2 = sum(unpooled_distinctive_loss(local, slices, args.temperature)
                       for local in (z, z_aug) for slices in (g, g_aug)) / 4  # supplement D.2
            loss = l_d1 + l_d2
            terms = {"l_d1": l_d1, "l_d2": l_d2}
            if args.invariant_weight:
                l_i = invariant_loss(all_gather(z), args.temperature)  # Eq. 1
                loss = loss + args.invariant_weight * l_i
                terms["l_i"] = l_i
            optimizer.zero_grad()
            loss.backward()  # in frozen steps, too: it frees what autograd keeps of this step
            if state.steps_left() >= state.recalibration:  # then weights are frozen
                optimizer.step()
            state.add(len(x), loss=loss, **terms)
            if state.steps_done() % args.save_every == 0:
                state.save()
        means = state.end_epoch()
        # A loss can stay at chance for thousands of steps before it falls: that is no plateau.
        if epoch >= args.warmup and means["loss"] < 0.95 * chance:
            scheduler.step(means["loss"])  # halves the learning rate on a plateau

    state.finish(**matrices_for_tstr(embedder, videos, args, device))  # Algorithm 1, line 16


if __name__ == "__main__":
    main()
