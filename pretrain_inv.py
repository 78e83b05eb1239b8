"""Stage 1a of TimeBalance: the temporally-invariant teacher (Sec. 3.1.1, Eq. 1; Algorithm 1, lines
8-11).

Clips of one video are to agree, clips of different videos to differ. Reads the training videos and
no label. Writes OUT/inv.pt: backbone, projection head, and each video's temporal similarity matrix
(Eq. 5), which stage 3 weighs by.

    python pretrain_inv.py                                       # toy videos: a minute on a CPU
    torchrun --nproc-per-node 4 pretrain_inv.py --data ucf101    # four GPUs, 40 videos in all
"""

import math

from common import (
    Batches, Embedder, Meter, Parser, Pool, State, UserError, all_gather, augment_clips, autocast,
    beside_chance, build_model, command, draw, invariant_loss, measure_similarity, ranged,
    read_checkpoint, seed_of, settle, shared_arguments, start, start_from, to_input,
    training_videos, warm_up)  # before torch

import torch


@command
def main(argv=None):
    parser = Parser(__doc__, parents=[shared_arguments("pretrain")])
    parser.add_argument("--temperature", type=ranged(float, 1e-3), default=0.1, metavar="X",
                        help="tau of Eq. 1")
    parser.add_argument("--init", metavar="FILE", help="start from these weights, public ones or a "
                        "checkpoint, instead of random ones")
    parser.add_argument("--name", default="inv", help="the checkpoint is OUT/NAME.pt")
    args, device = start(parser, "pretrain", argv)
    settle(parser, "pretrain", args)
    if args.batch < 2:
        raise UserError("--batch 1: Eq. 1 takes its negatives from other videos, give 2 or more")

    videos = training_videos(args)
    seed = seed_of("pretrain_inv", args.seed)
    torch.manual_seed(seed)
    embedder = Embedder(build_model(args.arch, len(videos.classes)))
    if args.init:
        start_from(embedder.backbone, args.init, read_checkpoint(args.init))
    n = args.clips
    everyone = Pool(range(len(videos)), args.batch, cycle=False)
    batches = Batches(videos, [everyone], n * args.frames, seed, args, device)
    state = State("pretrain_inv", args.name, args, embedder, batches, device)
    if state.finished:
        return
    meter = Meter(state, batches)

    for epoch in range(state.epoch, args.epochs):
        warm_up(state.optimizer, args.lr, epoch, args.warmup)
        state.net.train()
        for batch in meter.steps(epoch):
            clips = []  # n of each video, concatenated
            rngs = []  # each has its own augmentation
            for video, key in zip(batch.videos, batch.keys):
                for t, clip in enumerate(video.split(args.frames)):
                    clips.append(clip)
                    rngs.append(draw(seed, *key, t))
            clips = augment_clips(clips, args.size, rngs)
            with autocast(args, device):
                z = state.net(to_input(clips, embedder.backbone))  # (own videos * n, 128)
            z = z.unflatten(0, (-1, n))
            z = all_gather(z)  # (B, n, 128): the other processes' videos are negatives, too
            loss = invariant_loss(z, args.temperature)  # Eq. 1
            state.update(loss)
            meter.add(len(clips), loss=loss)
        means = meter.means()
        if epoch >= args.warmup:
            state.scheduler.step(means["loss"])  # halves the learning rate on a plateau
        chance = {"loss": math.log(2 * args.batch - 1)}
        means = beside_chance(means, chance, state)
        state.end_epoch(means)  # log, checkpoint

    state.finish(measure_similarity(embedder, videos, args, device))  # Algorithm 1, line 16


if __name__ == "__main__":
    main()
