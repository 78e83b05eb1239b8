#!/bin/sh
# Fourteen classes of UCF101 on a CPU: two seeds of stage 1 (one of both.pt, L_I + L_D), three draws
# of the labelled videos for each, 5 % and 20 % of the labels. Needs UCF101 in data/ucf101 (see the
# README). If the script is stopped, the same command goes on. Run it from the root of the
# repository:
#
#     sh docs/study/ucf14.sh                 # two processes at a time; PROCESSES=8 for eight
set -e
export OMP_NUM_THREADS=1
settings="--data ucf101 --root data/ucf14 --arch r3d_tiny --size 32 --workers 1"
if [ $# = 0 ]; then
    classes="Archery|Basketball|BasketballDunk|CricketBowling|CricketShot|Diving|Fencing|HorseRace"
    classes="$classes|PizzaTossing|PlayingCello|PlayingPiano|PlayingSitar|PlayingViolin|Surfing"
    mkdir -p data/ucf14/ucfTrainTestlist
    [ -e data/ucf14/UCF-101 ] || ln -s ../ucf101/UCF-101 data/ucf14/UCF-101
    for list in classInd trainlist01 testlist01; do
        grep -E "(^| )($classes)(/|[[:space:]]*$)" "data/ucf101/ucfTrainTestlist/$list.txt" \
            > "data/ucf14/ucfTrainTestlist/$list.txt"
    done
    for stage in "inv 0" "inv 1" "dist 0" "dist 1" "both 0"; do echo $stage; done |
        xargs -P "${PROCESSES:-2}" -L 1 sh "$0"
    for percent in 5 20; do for draw in 0 1 2; do for seed in 0 1; do
        echo labels $seed $draw $percent
    done; done; done | xargs -P "${PROCESSES:-2}" -L 1 sh "$0"
    python evaluate.py runs/ucf14-?-*-* --clips 5 --scales 1
    for percent in 5 20; do
        python docs/study/intervals.py runs/ucf14-?-?-$percent --against labeled_only.pt \
            student_alone.pt student_alone_dist.pt student_alone_inv.pt student_alone_both.pt \
            dist_ft.pt inv_ft.pt student_dist.pt student_inv.pt student_mean_dist.pt \
            student_mean_inv.pt student_mean_both.pt "teachers, mean" "teachers, TSTR"
        for start in dist inv both; do
            [ $start = both ] && seed=0 || seed=?
            python docs/study/unlabeled.py runs/ucf14-$seed-?-$percent \
                --rows student_$start.pt student_alone_$start.pt
        done
        python docs/study/draw.py runs/ucf14-?-?-$percent --out docs/ucf14-$percent
    done
    exit
fi

seed=$2
stage1="$settings --batch 8 --seed $seed --out runs/ucf14-$seed"
case $1 in
    inv) exec python pretrain_inv.py $stage1 --epochs 24 ;;
    dist) exec python pretrain_dist.py $stage1 --epochs 30 ;;
    both) exec python pretrain_dist.py $stage1 --epochs 60 --invariant-weight 1 ;;
esac

draw=$3
percent=$4
labels="$settings --frames 16 --percent $percent --subset-seed $draw --seed $seed"
run="$labels --pretrained runs/ucf14-$seed --out runs/ucf14-$seed-$draw-$percent"
student="train_student.py $run --epochs 20 --warmup 2"
python finetune.py $run --lr 3e-4
python finetune.py $run --init none
[ $seed = 0 ] && starts="dist inv both" || starts="dist inv"
for start in $starts; do
    python $student --init $start.pt --name student_$start
    python $student --init $start.pt --name student_alone_$start --teachers none
    python $student --init $start.pt --name student_mean_$start --reweight mean
done
python $student --init none --name student_alone --teachers none
