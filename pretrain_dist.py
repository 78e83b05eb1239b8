"""Stage 1b of TimeBalance: the temporally-distinctive teacher (Sec. 3.1.2, Eq. 3, supplement D.2; Algorithm 1, 12-15).

Clips of one video are to differ from each other, two augmentations of one clip to agree. Reads the training videos and
no label. Writes OUT/dist.pt, as stage 1a does. The student of stage 3 starts from it, too.

    python pretrain_dist.py                                       # toy videos: two minutes on a CPU
    torchrun --nproc-per-node 4 pretrain_dist.py --data ucf101    # four GPUs
    python pretrain_dist.py --invariant-weight 1                  # L_D + L_I: the paper's student start, OUT/both.pt
"""

import torch

from common import (
    STRONG, Embedder, Parser, Pool, Run, UserError, VideoStream, all_gather, augment, autocast, build_model, command,
    distinctive_loss, draw, invariant_loss, measure_similarity, number, settle_arguments,
    start, to_input, training_videos, unpooled_distinctive_loss)


@command
def main(argv=None):
    parser = Parser(__doc__, "pretrain")
    parser.add("training", "--temperature", "tau of Eq. 3", type=number(float, 1e-3), default=0.1, metavar="X")
    parser.add("training", "--invariant-weight", "adds X times the invariant loss of stage 1a", type=number(float, 0),
               default=0.0, metavar="X")
    parser.add("run", "--name", "the checkpoint is OUT/NAME.pt (default dist; both with --invariant-weight)")
    args = parser.parse_args(argv)
    device = start(args)
    args.name = args.name or ("both" if args.invariant_weight else "dist")
    settle_arguments(args, "pretrain")
    n = args.clips
    with torch.device("meta"):  # computes shapes alone
        steps = build_model(args.arch, 1).features(torch.empty(1, 3, args.frames, args.size, args.size)).shape[2]
    if steps % n:
        raise UserError(f"--frames {args.frames} leave {steps} time steps in the features of {args.arch}, which L_D2 "
                        f"cannot cut into --clips {n} equal slices")

    videos = training_videos(args)
    videos.hide_labels()
    torch.manual_seed(args.seed)
    embedder = Embedder(build_model(args.arch, len(videos.classes)))
    run = Run(args, "pretrain_dist", args.name, embedder, videos, device)
    if run.finished:
        return
    pools = [Pool(range(len(videos)), args.batch, cycle=False)]
    stream = VideoStream(videos, pools, n * args.frames, args, device, run)

    for _ in run.epochs():
        for frames, _, keys in run.steps(stream):
            # Of each video twice, differently augmented: its n clips, and the long clip, which spans them in as many
            # frames as one of them has. First all clips of the first augmentation, then those of the second, ...
            short = [augment(clip, args.size, draw(args.seed, *key, view * (n + 1) + t), **STRONG) for view in (0, 1)
                     for video, key in zip(frames, keys) for t, clip in enumerate(video.split(args.frames))]
            long = [augment(video[::n], args.size, draw(args.seed, *key, view * (n + 1) + n), **STRONG)
                    for view in (0, 1) for video, key in zip(frames, keys)]
            with autocast(args, device):
                x = to_input(short + long, embedder.backbone)
                z = run.net(x, num_long=len(long), slices=n)
            z, z_aug, g, g_aug = z.unflatten(0, (4, -1, n))  # (b, n, 128) each: clips, and slices of the long clip
            l_d1 = distinctive_loss(z, z_aug, args.temperature)  # Eq. 3
            l_d2 = sum(unpooled_distinctive_loss(clips, slices, args.temperature)
                       for clips in (z, z_aug) for slices in (g, g_aug)) / 4  # supplement D.2
            loss, terms = l_d1 + l_d2, {"l_d1": l_d1, "l_d2": l_d2}
            if args.invariant_weight:
                terms["l_i"] = invariant_loss(all_gather(z), args.temperature)  # Eq. 1
                loss = loss + args.invariant_weight * terms["l_i"]
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            run.record(len(x), loss=loss, **terms)

    run.finish(**measure_similarity(embedder, videos, args, device))  # Algorithm 1, line 16


if __name__ == "__main__":
    main()
