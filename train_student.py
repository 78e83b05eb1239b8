"""Stage 3 of TimeBalance: the student learns from the labels and from both teachers (Sec. 3.2; Algorithm 1, 22-26).

Reads OUT/inv_ft.pt and OUT/dist_ft.pt, from which it takes the data set, the network and the labelled videos, and
OUT/dist.pt, from which the student starts. Writes OUT/student.pt.

    python train_student.py                               # after stages 1 and 2 on toy videos: two minutes on a CPU
    torchrun --nproc-per-node 4 train_student.py --data ucf101
    python train_student.py --reweight mean --name mean   # both teachers alike: table 2 (f)
"""

import numpy as np
import torch
import torch.nn.functional as F

from common import (
    WEAK, Parser, Pool, Run, UserError, VideoStream, augment, autocast, build_model, choose_labeled, combine_teachers,
    command, distillation_loss, draw, labeled_of_teachers, load_backbone, load_classifier, load_finished, number,
    paired_similarity, print0, settle_arguments, similarity_score, start, to_input, training_videos)


@command
def main(argv=None):
    parser = Parser(__doc__, "student")
    parser.add("model", "--teachers", "one or two: file names in OUT, or paths; none: labels alone", nargs="+",
               default=["inv_ft.pt", "dist_ft.pt"], metavar="CHECKPOINT")
    parser.add("model", "--init", "what the student starts from: a file name in --pretrained, a path, or none for "
               "random weights", default="dist.pt", metavar="CHECKPOINT")
    parser.add("model", "--pretrained", "folder of stage 1 (default OUT)", metavar="DIR")
    parser.add("training", "--omega", "weight of the unsupervised loss", type=number(float, 0), default=1.0,
               metavar="X")
    parser.add("training", "--teacher-loss", "distillation loss", choices=("l2", "kl", "js"), default="l2")
    parser.add("training", "--reweight", "weight of the first teacher: each video's similarity score, one half, or a "
               "number from 0 to 1", default="tstr", metavar="{tstr,mean,W}",
               type=lambda text: text if text in ("tstr", "mean") else number(float, 0, 1)(text))
    parser.add("run", "--name", "the checkpoint is OUT/NAME.pt", default="student")
    args = parser.parse_args(argv)
    device = start(args)
    if len(set(args.teachers)) != len(args.teachers) or len(args.teachers) > 2:
        raise UserError("--teachers takes one or two different checkpoints, or none")
    saved_teachers = load_finished(args.teachers, args.out, ["finetune"])
    init = load_finished([args.init], args.pretrained or args.out, [
        "pretrain_inv", "pretrain_dist", "finetune", "student", None]).get(args.init)
    settle_arguments(args, "student", saved_teachers, [
        "data", "root", "split", "pool", "arch", "size", "frames", "stride", "percent", "labeled_list", "subset_seed"])

    videos = training_videos(args)
    labeled = labeled_of_teachers(saved_teachers, videos) if saved_teachers else choose_labeled(videos, args)
    unlabeled = np.setdiff1d(np.arange(len(videos)), labeled)
    if len(unlabeled) == 0:
        unlabeled = labeled  # with all labels, the teachers speak on the same videos once more
    torch.manual_seed(args.seed)
    student = build_model(args.arch, len(videos.classes))
    if init:
        load_backbone(student, args.init, init)
    run = Run(args, "student", args.name, student, videos, device, labeled)
    if run.finished:
        return
    teachers = [load_classifier(saved, device) for saved in saved_teachers.values()]
    score = score_videos(args.reweight, saved_teachers, videos.names())  # s of every video
    pools = [Pool(unlabeled, args.batch, cycle=False), Pool(labeled, args.batch, cycle=True)]
    steps = len(unlabeled) // args.batch  # an epoch is one pass over the unlabelled videos; the labelled ones cycle
    stream = VideoStream(videos, pools if teachers else pools[1:], args.frames, args, device, run, steps)

    for _ in run.epochs():
        for frames, numbers, keys in run.steps(stream):
            clips = [augment(video, args.size, draw(args.seed, *key, 0), **WEAK) for video, key in zip(frames, keys)]
            x = to_input(clips, student)  # the unlabelled videos, then as many labelled ones
            u = len(x) // 2 if teachers else 0
            y = torch.as_tensor(videos.labels[numbers[u:]]).to(device, non_blocking=True)
            with autocast(args, device):
                logits = run.net(x)
            p_student = logits.float().softmax(1)
            l_sup = F.cross_entropy(logits[u:].float(), y)  # Eq. 4
            loss, terms = l_sup, {"l_sup": l_sup}
            if teachers:
                with torch.no_grad(), autocast(args, device):
                    p = [teacher(x).float().softmax(1) for teacher in teachers]
                s = score[numbers].to(device, non_blocking=True)
                p_teacher = combine_teachers(*p, s) if len(p) == 2 else p[0]  # Eq. 7
                on_unlabeled = distillation_loss(p_student[:u], p_teacher[:u], args.teacher_loss)  # Eq. 8
                on_labeled = distillation_loss(p_student[u:], p_teacher[u:], args.teacher_loss)
                loss = l_sup + args.omega * (on_unlabeled + 0.5 * on_labeled)  # Eq. 2
                terms |= {"l_unsup": on_unlabeled, "l_unsup_labeled": on_labeled}
                if len(p) == 2:
                    terms |= {"weight_inv": s.mean(), "clamped": ((s == 0) | (s == 1)).float().mean(),
                              "agreement": (p[0].argmax(1) == p[1].argmax(1)).float().mean()}
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            run.record(len(x), loss=loss, **terms)
    run.finish()


def score_videos(reweight, saved_teachers, names):
    """The weight of the first teacher for every video, (N,): s of Eq. 6, or one number for all."""
    s, otherwise = {}, 0.5 if isinstance(reweight, str) else reweight
    if reweight == "tstr" and len(saved_teachers) == 2:
        known, *matrices = paired_similarity(saved_teachers)
        s = dict(zip(known, similarity_score(*matrices).tolist()))
        if absent := sum(name not in s for name in names):
            print0(f"{absent} videos could not be decoded after stage 1: their teachers count alike")
    return torch.tensor([s.get(name, otherwise) for name in names])


if __name__ == "__main__":
    main()
