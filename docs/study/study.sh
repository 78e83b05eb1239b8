#!/bin/sh
# The paper's tables on toy videos. Table 3, the default student and its control have twenty seeds,
# the control with the student's batches (--omega 0) eight, the other rows three. Each seed also has
# its own labelled videos. If the script is stopped, the same command goes on. Run it from the root
# of the repository:
#
#     sh docs/study/study.sh                 # two seeds at a time; PROCESSES=8 for eight
set -e
export OMP_NUM_THREADS=1
if [ $# = 0 ]; then
    python -c "import common; common.render_toy('data/study', test=1000)"
    seq 0 19 | xargs -P "${PROCESSES:-2}" -I{} sh "$0" {}
    torchrun --nproc-per-node "${PROCESSES:-2}" evaluate.py runs/study-* --clips 5 --scales 1
    python docs/study/intervals.py runs/study-* \
        --against labeled_only.pt student_alone_dist.pt student_random_alone.pt \
        student_random_mean.pt student_mean.pt student_random.pt student_random_inv.pt \
        student_random_dist.pt "teachers, mean" "teachers, TSTR"
    python docs/study/intervals.py runs/study-[0-7] --against student_omega0.pt
    python docs/study/intervals.py runs/study-[0-2] \
        --against student_alone_both.pt both_ft.pt student_alone_dist.pt student.pt \
        student_both_mean.pt student_both_inv.pt student_both_dist.pt student_inv_inv.pt \
        student_dist_dist.pt student_kl.pt student_js.pt inv_n2_ft.pt dist_n2_ft.pt
    python docs/study/draw.py runs/study-*
    exit
fi

seed=$1
ssl="--root data/study --seed $seed --out runs/study-$seed --workers 0"
run="--seed $seed --subset-seed $seed --out runs/study-$seed --workers 0"
python pretrain_inv.py $ssl
python pretrain_dist.py $ssl
python finetune.py $run --root data/study --init inv.pt dist.pt none
python train_student.py $run
python train_student.py $run --name student_mean --reweight mean
python train_student.py $run --init dist.pt --name student_alone_dist --teachers none --root data/study
python train_student.py $run --init none --name student_random
python train_student.py $run --init none --name student_random_mean --reweight mean
python train_student.py $run --init none --name student_random_inv --teachers inv_ft.pt
python train_student.py $run --init none --name student_random_dist --teachers dist_ft.pt
python train_student.py $run --init none --name student_random_alone --teachers none --root data/study
[ $seed -lt 8 ] || exit 0
python train_student.py $run --omega 0 --name student_omega0
[ $seed -lt 3 ] || exit 0                                              # the other rows

python pretrain_dist.py $ssl --invariant-weight 1 --epochs 14
python pretrain_inv.py $ssl --clips 2 --name inv_n2
python pretrain_dist.py $ssl --clips 2 --name dist_n2
python pretrain_inv.py $ssl --seed $((seed + 10)) --name inv2
python pretrain_dist.py $ssl --seed $((seed + 10)) --name dist2
python finetune.py $run --init both.pt inv_n2.pt dist_n2.pt inv2.pt dist2.pt
both="train_student.py $run --init both.pt"
python $both --name student_both
python $both --name student_alone_both --teachers none --root data/study
python $both --name student_both_mean --reweight mean
python $both --name student_both_inv --teachers inv_ft.pt
python $both --name student_both_dist --teachers dist_ft.pt
python $both --name student_inv_inv --teachers inv_ft.pt inv2_ft.pt --reweight mean
python $both --name student_dist_dist --teachers dist_ft.pt dist2_ft.pt --reweight mean
python $both --name student_inv_dist2 --teachers inv_ft.pt dist2_ft.pt --reweight mean
python $both --name student_kl --teacher-loss kl
python $both --name student_js --teacher-loss js
