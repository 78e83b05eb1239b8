"""Stage 3 of TimeBalance: train the student, from the labels and from both teachers.

The student learns the labels of the labelled videos. On all videos it also learns the weighted mean
of the teachers' predictions (Sec. 3.2, Eq. 2 to 8; lines 22 to 26 of the paper's Algorithm 1). The
invariant teacher has the weight s of the video, the distinctive one 1 - s.

Reads:  all training videos, OUT/inv_ft.pt, OUT/dist_ft.pt and OUT/dist.pt, the student's initial
        weights. The data set, the network and the labelled videos are those of the teachers.
Writes: OUT/student.pt and OUT/student.log.

    python train_student.py
        After stages 1 and 2 on toy videos, in two minutes on a CPU. It first prints the mean of s,
        near 0.8. `agreement` is near 0.7: the share of unlabelled videos for which both teachers
        predict the same class.
    python train_student.py --teachers none --init dist.pt --name student_alone_dist
        The control: the same start and as many steps, but the labels alone.
    torchrun --nproc-per-node 4 train_student.py --data ucf101
        The paper's recipe on four GPUs, after stages 1 and 2 on UCF101.
"""

import os
from collections import Counter

from common import (
    WEAK, Batches, Pool, State, UserError, augment_clips, autocast, build_model, combine_teachers,
    command, distillation_loss, distribute, fit_tstr, labeled_and_all_videos, load_classifier,
    order_teachers, print0, ranged, read_checkpoint, rng, score_videos, seed_of, stage_parser,
    start, start_from, to_input, warm_up)  # before torch

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau


@command
def main(argv=None):
    parser = stage_parser("student", __doc__)
    add = parser.add_argument
    add("--teachers", nargs="+", default=["inv_ft.pt", "dist_ft.pt"], metavar="CHECKPOINT",
        help="one or two teachers: file names in OUT, or paths; none: the labels alone")
    add("--init", default="dist.pt", metavar="CHECKPOINT", help="initial weights of the student: "
        "a file name in --pretrained, or a path; none: random weights")
    add("--pretrained", metavar="DIR",
        help="folder with the checkpoints of stage 1 (default: OUT)")
    add("--omega", type=ranged(float, 0), default=1.0, metavar="X",
        help="weight of the distillation loss, Eq. 2")
    add("--teacher-loss", choices=("l2", "kl", "js"), default="l2",
        help="distance between the teachers' and the student's predictions")
    add("--reweight", default="tstr", metavar="{tstr,mean,W}",
        type=lambda text: text if text in ("tstr", "mean") else ranged(float, 0, 1)(text),
        help="weight of the invariant teacher (of the first, if both are of one kind): s of each "
        "video (tstr), 0.5 (mean) or a number W from 0 to 1")
    add("--name", default="student", help="write OUT/NAME.pt")
    args, device, saved_teachers = start(parser, "student", argv, lambda args, out: (
        args.teachers, out, ["finetune"]))
    if len(set(args.teachers)) != len(args.teachers) or len(args.teachers) > 2:
        raise UserError("--teachers takes one or two different checkpoints, or none")
    saved_teachers = order_teachers(saved_teachers)

    labeled, videos = labeled_and_all_videos(args, saved_teachers)
    unlabeled = np.setdiff1d(np.arange(len(videos)), labeled)
    if len(unlabeled) == 0:
        unlabeled = labeled  # all videos are labelled: they serve as the unlabelled ones, too
    seed = seed_of("student", args.seed)
    torch.manual_seed(seed)
    student = build_model(args.arch, len(videos.classes))
    made_from = dict(saved_teachers)
    if args.init != "none":
        saved = made_from[args.init] = read_checkpoint(args.init, args.pretrained or args.out)
        start_from(student, args.init, saved)
        if saved.get("stage") and saved["args"]["no_flip"] and not args.no_flip:
            args.no_flip = True
            print0(f"--no-flip, as {args.init}")
    student.to(device, memory_format=torch.channels_last_3d)
    net = distribute(student, 2 * args.batch, args, device)
    optimizer = torch.optim.Adam(student.parameters(), args.lr, betas=(0.9, 0.999), fused=True)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=args.patience)
    score = weigh_videos(args.reweight, saved_teachers, videos.names)  # s of every video, (N,)
    pools = [Pool(labeled, args.batch, cycle=True)]
    if saved_teachers:  # the unlabelled videos come first
        pools.insert(0, Pool(unlabeled, args.batch, cycle=False))
    steps = len(unlabeled) // args.batch  # an epoch is one pass over these; labelled ones repeat
    batches = Batches(videos, pools, steps, args.frames, seed, args, device)
    state = State("student", args, batches, made_from, labeled, model=student,
                  optimizer=optimizer, scheduler=scheduler)
    if state.finished:
        return
    teachers = [load_classifier(saved, device) for saved in saved_teachers.values()]

    for epoch in range(state.epoch, args.epochs):
        warm_up(optimizer, args.lr, epoch, args.warmup)
        net.train()
        for batch in state.steps():
            rngs = [rng(seed, *key, 0) for key in batch.keys]
            # The teachers see the same clips.
            clips = augment_clips(batch.videos, args.size, rngs, not args.no_flip, **WEAK)
            u = len(clips) // 2 if teachers else 0  # number of unlabelled clips, which come first
            y = torch.as_tensor(videos.labels[batch.ids[u:]]).to(device, non_blocking=True)
            with autocast(args, device):
                x = to_input(clips, student)
                logits = net(x)
            p_student = logits.float().softmax(1)
            loss = l_sup = F.cross_entropy(logits[u:].float(), y)  # Eq. 4
            accuracy = (logits[u:].argmax(1) == y).float().mean()
            terms = {"l_sup": l_sup, "train_accuracy": accuracy}
            if teachers:
                s = score[batch.ids].to(device, non_blocking=True)
                with autocast(args, device):
                    p_teacher, agreement = teach(teachers, x, s, u)  # Eq. 7
                on_unlabeled = distillation_loss(p_student[:u], p_teacher[:u], args.teacher_loss)
                on_labeled = distillation_loss(p_student[u:], p_teacher[u:], args.teacher_loss)
                l_unsup = on_unlabeled + 0.5 * on_labeled  # Eq. 8
                loss = l_sup + args.omega * l_unsup  # Eq. 2
                terms |= {"l_unsup": on_unlabeled, "l_unsup_labeled": on_labeled, **agreement}
            optimizer.zero_grad()
            loss.backward()  # in frozen steps, too: it frees what autograd keeps of this step
            if state.steps_left() >= state.recalibration:  # then weights are frozen
                optimizer.step()
            state.add(len(x), loss=loss, **terms)
            if state.steps_done() % args.save_every == 0:
                state.save()
        means = state.end_epoch()
        if epoch >= args.warmup:
            scheduler.step(means["loss"])  # halves the learning rate on a plateau

    state.finish()


@torch.no_grad()
def teach(teachers, x, s, u):
    """p_T, (B, C), of one teacher or of two, weighted by s (Eq. 7), and what to log of the two on
    the first u clips, which are unlabelled."""
    p = [teacher(x).float().softmax(1) for teacher in teachers]
    if len(p) == 1:
        return p[0], {}
    p_inv, p_dist = p
    return combine_teachers(p_inv, p_dist, s), {
        "weight_inv": s[:u].mean(),
        "clamped": ((s == 0) | (s == 1))[:u].float().mean(),
        "agreement": (p_inv.argmax(1) == p_dist.argmax(1))[:u].float().mean(),
    }


def weigh_videos(reweight, saved_teachers, names):
    """The weight of the first teacher for every video, (N,): s of Eq. 6, or one number for all."""
    if reweight != "tstr" or len(saved_teachers) < 2:
        same = {"mean": 0.5, "tstr": 1.0}.get(reweight, reweight)
        return torch.full((len(names),), same)
    if not fit_tstr(saved_teachers):
        raise UserError("TSTR needs a teacher of pretrain_inv.py and one of pretrain_dist.py; "
                        f"{' and '.join(saved_teachers)} are others: --reweight mean or a number")
    c_inv, c_dist = (find_moved(dict(zip(saved["similarity_names"], saved["similarity"])), names)
                     for saved in saved_teachers.values())
    if absent := len(names) - len(set(names) & c_inv.keys() & c_dist.keys()):
        print0(f"{absent} of {len(names)} videos have no similarity from stage 1 (added since, or "
               "unreadable then): s = 0.5")
    try:
        score = score_videos(names, c_inv, c_dist)
    except ValueError as error:
        raise UserError(f"the teachers come from stage 1 with other --clips: {error}") from None
    print0(f"s of {len(names)} videos: {score.mean():.3f} ± {score.std():.3f}")
    if score.std() < 0.02:
        print0("warning: s is nearly the same for all videos, so TSTR is no better than "
               f"--reweight {score.mean():.2f}: has stage 1 trained long enough?")
    return score


def find_moved(matrices, names):
    """The matrices, {name: C}, with those of videos that lie in another folder now, as they do when
    they get a label: a video has that of its file name, if the name was and is there only once."""
    def unique(names):
        counts = Counter(map(os.path.basename, names))
        return {file: name for name in names if counts[file := os.path.basename(name)] == 1}

    before, now = unique(matrices), unique(names)
    return matrices | {now[file]: matrices[before[file]] for file in now.keys() & before.keys()}


if __name__ == "__main__":
    main()
