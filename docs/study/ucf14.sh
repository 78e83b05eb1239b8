#!/bin/sh
# Fourteen classes of UCF101 on a CPU: two seeds of stage 1; for each six draws of the labelled
# videos with 5 % of the labels, three with 20 %. Three draws of seed 0 also start from both.pt
# (L_I + L_D). Needs UCF101 in data/ucf101 (see the README). If the script is stopped, the same
# command goes on. Run it from the root of the repository:
#
#     sh docs/study/ucf14.sh                 # two processes at a time; PROCESSES=8 for eight
set -e
export OMP_NUM_THREADS=1
settings="--data ucf101 --root data/ucf14 --arch r3d_tiny --size 32 --workers 0"
cached="python docs/study/cached.py"
if [ $# = 0 ]; then
    classes="Archery|Basketball|BasketballDunk|CricketBowling|CricketShot|Diving|Fencing|HorseRace"
    classes="$classes|PizzaTossing|PlayingCello|PlayingPiano|PlayingSitar|PlayingViolin|Surfing"
    mkdir -p data/ucf14/ucfTrainTestlist
    [ -e data/ucf14/UCF-101 ] || ln -s ../ucf101/UCF-101 data/ucf14/UCF-101
    for list in classInd trainlist01 testlist01; do
        grep -E "(^| )($classes)(/|[[:space:]]*$)" "data/ucf101/ucfTrainTestlist/$list.txt" \
            > "data/ucf14/ucfTrainTestlist/$list.txt"
    done
    for stage in "both 0" "dist 0" "dist 1" "inv 0" "inv 1"; do echo $stage; done |
        xargs -P "${PROCESSES:-2}" -L 1 sh "$0"
    for draw in 0 1 2 3 4 5; do for seed in 0 1; do
        echo labels $seed $draw 5
        [ $draw -gt 2 ] || echo labels $seed $draw 20
    done; done | xargs -P "${PROCESSES:-2}" -L 1 sh "$0"
    $cached evaluate.py runs/ucf14-?-?-* --clips 5 --scales 1 --workers 0
    for percent in 5 20; do
        for seed in "?" 0 1; do
            python docs/study/intervals.py runs/ucf14-$seed-?-$percent --against labeled_only.pt \
                student_alone_dist.pt student_mean_dist.pt dist_ft.pt inv_ft.pt "teachers, mean" \
                "teachers, TSTR"
        done
        $cached docs/study/unlabeled.py runs/ucf14-?-?-$percent --workers 0 \
            --rows student_dist.pt student_alone_dist.pt
        $cached docs/study/weight.py runs/ucf14-?-?-$percent --workers 0
        python docs/study/draw.py runs/ucf14-?-?-$percent --out docs/ucf14-$percent
    done
    python docs/study/intervals.py runs/ucf14-0-[0-2]-5 \
        --against student_alone_both.pt student_mean_both.pt student_dist.pt
    exit
fi

seed=$2
stage1="$settings --batch 8 --seed $seed --out runs/ucf14-$seed"
case $1 in
    inv) exec $cached pretrain_inv.py $stage1 --epochs 24 ;;
    dist) exec $cached pretrain_dist.py $stage1 --epochs 30 ;;
    both) exec $cached pretrain_dist.py $stage1 --epochs 60 --invariant-weight 1 ;;
esac

draw=$3
percent=$4
labels="$settings --frames 16 --percent $percent --subset-seed $draw --seed $seed"
run="$labels --pretrained runs/ucf14-$seed --out runs/ucf14-$seed-$draw-$percent"
student="$cached train_student.py $run --epochs 20 --warmup 2"
starts=dist
[ "$seed $percent" = "0 5" ] && [ $draw -le 2 ] && starts="dist both"
$cached finetune.py $run --lr 3e-4
$cached finetune.py $run --init none
for start in $starts; do
    $student --init $start.pt --name student_$start
    $student --init $start.pt --name student_alone_$start --teachers none
    $student --init $start.pt --name student_mean_$start --reweight mean
done
