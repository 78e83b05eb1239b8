"""Stage 1a of TimeBalance: the temporally-invariant teacher (Sec. 3.1.1, Eq. 1; Algorithm 1, lines 8-11).

Clips of one video are to agree, clips of different videos to differ. Reads the training videos and no label. Writes
OUT/inv.pt: backbone, projection head, and each video's temporal similarity matrix (Eq. 5), which stage 3 weighs by.

    python pretrain_inv.py                                       # toy videos: a minute on a CPU
    torchrun --nproc-per-node 4 pretrain_inv.py --data ucf101    # four GPUs, the same batch of 40 videos in all
"""

import torch

from common import (
    STRONG, Embedder, Parser, Pool, Run, UserError, VideoStream, all_gather, augment, autocast, build_model, command,
    draw, invariant_loss, measure_similarity, number, settle_arguments, start, to_input, training_videos)


@command
def main(argv=None):
    parser = Parser(__doc__, "pretrain")
    parser.add("training", "--temperature", "tau of Eq. 1", type=number(float, 1e-3), default=0.1, metavar="X")
    parser.add("run", "--name", "the checkpoint is OUT/NAME.pt", default="inv")
    args = parser.parse_args(argv)
    device = start(args)
    settle_arguments(args, "pretrain")
    if args.batch < 2:
        raise UserError("--batch 1: Eq. 1 takes its negatives from other videos, give it at least 2")

    videos = training_videos(args)
    videos.hide_labels()
    torch.manual_seed(args.seed)
    embedder = Embedder(build_model(args.arch, len(videos.classes)))
    run = Run(args, "pretrain_inv", args.name, embedder, videos, device)
    if run.finished:
        return
    n = args.clips
    pools = [Pool(range(len(videos)), args.batch, cycle=False)]
    stream = VideoStream(videos, pools, n * args.frames, args, device, run)

    for _ in run.epochs():
        for frames, _, keys in run.steps(stream):
            clips = [augment(clip, args.size, draw(args.seed, *key, t), **STRONG)
                     for video, key in zip(frames, keys) for t, clip in enumerate(video.split(args.frames))]
            with autocast(args, device):
                z = run.net(to_input(clips, embedder.backbone))  # (own videos * n, 128)
            z = all_gather(z.unflatten(0, (-1, n)))  # (B, n, 128): the other processes' videos are negatives, too
            loss = invariant_loss(z, args.temperature)  # Eq. 1
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            run.record(len(clips), loss=loss)

    run.finish(**measure_similarity(embedder, videos, args, device))  # Algorithm 1, line 16


if __name__ == "__main__":
    main()
