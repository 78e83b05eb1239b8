"""Stage 3 of TimeBalance: train the student, from the labels and from both teachers.

The student learns the labels of the labelled videos. On all videos it also learns the weighted mean
of the teachers' predictions (Sec. 3.2, Eq. 2 to 8; lines 22 to 26 of the paper's Algorithm 1). The
invariant teacher has the weight s of the video, the distinctive one 1 - s.

Reads:  all training videos, OUT/inv_ft.pt, OUT/dist_ft.pt and OUT/dist.pt, the student's initial
        weights. The data set, the network and the labelled videos are those of the teachers.
Writes: OUT/student.pt and OUT/student.log.

    python train_student.py
        After stages 1 and 2 on toy videos, in a minute on a CPU. It first prints the mean of s,
        near 0.8. `agreement` is near 0.8: the share of videos for which both teachers predict the
        same class.
    python train_student.py --teachers none --init dist.pt --name student_alone_dist
        The control: the same start and as many steps, but the labels alone.
    torchrun --nproc-per-node 4 train_student.py --data ucf101
        The paper's recipe on four GPUs, after stages 1 and 2 on UCF101.
"""

import warnings

from common import (
    WEAK, Batches, Meter, Parser, Pool, State, UserError, augment_clips, autocast, build_model,
    combine_teachers, command, distillation_loss, draw, find_checkpoint, labeled_and_all_videos,
    load_classifier, paired_similarity, print0, ranged, read_checkpoint, seed_of, settle,
    shared_arguments, similarity_score, start, start_from, to_input, warm_up)  # before torch

import numpy as np
import torch
import torch.nn.functional as F


@command
def main(argv=None):
    parser = Parser(__doc__, parents=[shared_arguments("student")])
    parser.add_argument("--teachers", nargs="+", default=["inv_ft.pt", "dist_ft.pt"],
                        metavar="CHECKPOINT", help="one or two teachers: file names in OUT, or "
                        "paths; none: the labels alone (default: inv_ft.pt dist_ft.pt)")
    parser.add_argument("--init", default="dist.pt", metavar="CHECKPOINT",
                        help="initial weights of the student: a file name in --pretrained, or a "
                        "path; none: random weights")
    parser.add_argument("--pretrained", metavar="DIR",
                        help="folder with the checkpoints of stage 1 (default: OUT)")
    parser.add_argument("--omega", type=ranged(float, 0), default=1.0, metavar="X",
                        help="weight of the distillation loss, Eq. 2")
    parser.add_argument("--teacher-loss", choices=("l2", "kl", "js"), default="l2",
                        help="distance between the teachers' and the student's predictions")
    parser.add_argument("--reweight", type=weighting, default="tstr", metavar="{tstr,mean,W}",
                        help="weight of the first teacher: s of each video (tstr), 0.5 (mean) or a "
                        "number W from 0 to 1")
    parser.add_argument("--name", default="student", help="write OUT/NAME.pt")
    args, device = start(parser, "student", argv)
    if len(set(args.teachers)) != len(args.teachers) or len(args.teachers) > 2:
        raise UserError("--teachers takes one or two different checkpoints, or none")
    saved_teachers = {}
    for name in args.teachers if args.teachers != ["none"] else ():
        saved_teachers[name] = read_checkpoint(find_checkpoint(name, args.out), ["finetune"])
    init = None
    if args.init != "none":
        init = read_checkpoint(find_checkpoint(args.init, args.pretrained or args.out), [
            "pretrain_inv", "pretrain_dist", "finetune", "student", None])
    settle(parser, "student", args, saved_teachers, inherited=[
        "data", "root", "split", "pool", "arch", "size", "frames", "stride", "percent",
        "labeled_list", "subset_seed"])

    labeled, videos = labeled_and_all_videos(args, saved_teachers)
    unlabeled = np.setdiff1d(np.arange(len(videos)), labeled)
    if len(unlabeled) == 0:
        unlabeled = labeled  # all videos are labelled: they serve as the unlabelled ones, too
    steps = len(unlabeled) // args.batch  # an epoch is one pass over these; labelled ones repeat
    if not steps:
        raise UserError(f"--batch {args.batch} is more than the {len(unlabeled)} unlabelled videos")
    seed = seed_of("student", args.seed)
    torch.manual_seed(seed)
    student = build_model(args.arch, len(videos.classes))
    if init is not None:
        start_from(student, args.init, init)
    score = score_videos(args.reweight, saved_teachers, videos.names())  # s of every video, (N,)
    pools = [Pool(labeled, args.batch, cycle=True)]
    if saved_teachers:  # the unlabelled videos come first
        pools.insert(0, Pool(unlabeled, args.batch, cycle=False))
    batches = Batches(videos, pools, args.frames, seed, args, device, steps)
    state = State("student", args.name, args, student, batches, device, labeled)
    if state.finished:
        return
    teachers = [load_classifier(saved, device) for saved in saved_teachers.values()]
    meter = Meter(state, batches)

    for epoch in range(state.epoch, args.epochs):
        warm_up(state.optimizer, args.lr, epoch, args.warmup)
        state.net.train()
        for batch in meter.steps(epoch):
            rngs = [draw(seed, *key, 0) for key in batch.keys]
            clips = augment_clips(batch.videos, args.size, rngs, **WEAK)  # teachers see them, too
            u = len(clips) // 2 if teachers else 0  # number of unlabelled clips, which come first
            y = torch.as_tensor(videos.labels[batch.ids[u:]]).to(device, non_blocking=True)
            with autocast(args, device):
                x = to_input(clips, student)
                logits = state.net(x)
            p_student = logits.float().softmax(1)
            loss = l_sup = F.cross_entropy(logits[u:].float(), y)  # Eq. 4
            accuracy = (logits[u:].argmax(1) == y).float().mean()
            terms = {"l_sup": l_sup, "train_accuracy": accuracy}
            if teachers:
                s = score[batch.ids].to(device, non_blocking=True)
                with autocast(args, device):
                    p_teacher, agreement = teach(teachers, x, s)  # Eq. 7
                on_unlabeled = distillation_loss(p_student[:u], p_teacher[:u], args.teacher_loss)
                on_labeled = distillation_loss(p_student[u:], p_teacher[u:], args.teacher_loss)
                l_unsup = on_unlabeled + 0.5 * on_labeled  # Eq. 8
                loss = l_sup + args.omega * l_unsup  # Eq. 2
                terms |= {"l_unsup": on_unlabeled, "l_unsup_labeled": on_labeled, **agreement}
            state.update(loss)
            meter.add(len(x), loss=loss, **terms)
        means = meter.means()
        if epoch >= args.warmup:
            state.scheduler.step(means["loss"])  # halves the learning rate on a plateau
        state.end_epoch(means)  # log, checkpoint

    state.finish()


@torch.no_grad()
def teach(teachers, x, s):
    """p_T, (B, C), of one teacher or of two, weighted by s (Eq. 7), and what to log of the two."""
    p = [teacher(x).float().softmax(1) for teacher in teachers]
    if len(p) == 1:
        return p[0], {}
    p_inv, p_dist = p
    return combine_teachers(p_inv, p_dist, s), {
        "weight_inv": s.mean(),
        "clamped": ((s == 0) | (s == 1)).float().mean(),
        "agreement": (p_inv.argmax(1) == p_dist.argmax(1)).float().mean(),
    }


def weighting(text):
    return text if text in ("tstr", "mean") else ranged(float, 0, 1)(text)


def score_videos(reweight, saved_teachers, names):
    """The weight of the first teacher for every video, (N,): s of Eq. 6, or one number for all."""
    if reweight != "tstr":
        return torch.full((len(names),), 0.5 if reweight == "mean" else reweight)
    if len(saved_teachers) < 2:
        return torch.ones(len(names))
    known, c_inv, c_dist = paired_similarity(saved_teachers)
    score_of = dict(zip(known, similarity_score(c_inv, c_dist).tolist()))
    if absent := sum(name not in score_of for name in names):
        print0(f"{absent} of {len(names)} videos have no similarity from stage 1 (added since, or "
               "unreadable then): s = 0.5")
    score = torch.tensor([score_of.get(name, 0.5) for name in names])
    print0(f"s of {len(names)} videos: {score.mean():.3f} ± {score.std():.3f}")
    if score.std() < 0.02:
        warnings.warn("s is nearly the same for all videos, so TSTR is no better than "
                      f"--reweight {score.mean():.2f}: has stage 1 trained long enough?")
    return score


if __name__ == "__main__":
    main()
