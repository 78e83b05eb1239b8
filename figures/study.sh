#!/bin/sh
# The paper's tables on toy videos: tables 2 and 3 over ten seeds, the other rows over three. Each
# seed has other labelled videos, too. Begun again, it goes on. From the repository's root:
#
#     sh figures/study.sh                 # two processes at a time; PROCESSES=8 for eight
set -e
export OMP_NUM_THREADS=1
in_parallel() { xargs -P "${PROCESSES:-2}" -I{} sh -c "python {} --workers 0"; }
out=runs/study-
python -c "import common; common.render_toy('data/study', test=1000)"

for s in 0 1 2 3 4 5 6 7 8 9; do                    # stage 1
    run="--root data/study --seed $s --out $out$s"
    echo pretrain_dist.py $run
    echo pretrain_dist.py $run --invariant-weight 1
    echo pretrain_inv.py $run
    [ $s -lt 3 ] || continue                        # table 5
    echo pretrain_dist.py $run --clips 2 --name dist_n2
    echo pretrain_inv.py $run --clips 2 --name inv_n2
done | in_parallel

for s in 0 1 2; do                              # second teachers: those of the next seed
    cp $out$((s + 1))/inv.pt $out$s/inv2.pt
    cp $out$((s + 1))/dist.pt $out$s/dist2.pt
done

for s in 0 1 2 3 4 5 6 7 8 9; do                    # stage 2
    run="finetune.py --seed $s --subset-seed $s --out $out$s"
    echo $run --root data/study --init none --lr 1e-3
    echo $run --init inv.pt dist.pt both.pt
    [ $s -lt 3 ] || continue
    echo $run --init inv2.pt dist2.pt inv_n2.pt dist_n2.pt
done | in_parallel

for s in 0 1 2 3 4 5 6 7 8 9; do                    # stage 3
    run="train_student.py --seed $s --out $out$s"
    echo $run --init none --name student_random
    echo $run --init none --name student_random_mean --reweight mean
    echo $run --init none --name student_random_inv --teachers inv_ft.pt
    echo $run --init none --name student_random_dist --teachers dist_ft.pt
    echo $run --init none --name student_random_alone --teachers none --subset-seed $s --root data/study
    echo $run --init both.pt --name student_tstr
    echo $run --init both.pt --name student_mean --reweight mean
    echo $run --name student
done | in_parallel

for s in 0 1 2; do
    run="train_student.py --seed $s --out $out$s"
    echo $run --init both.pt --name student_inv --teachers inv_ft.pt
    echo $run --init both.pt --name student_dist --teachers dist_ft.pt
    echo $run --init both.pt --name student_inv_inv --teachers inv_ft.pt inv2_ft.pt --reweight mean
    echo $run --init both.pt --name student_dist_dist --teachers dist_ft.pt dist2_ft.pt --reweight mean
    echo $run --init both.pt --name student_inv_dist2 --teachers inv_ft.pt dist2_ft.pt --reweight mean
    echo $run --init both.pt --name student_kl --teacher-loss kl
    echo $run --init both.pt --name student_js --teacher-loss js
done | in_parallel

torchrun --nproc-per-node "${PROCESSES:-2}" evaluate.py $out? --clips 5 --scales 1 --figures \
    --against student_random_alone.pt student_random_mean.pt student_mean.pt student_tstr.pt
