#!/usr/bin/env bash
# The second check, question by question; each command resumes where it was stopped.
#   experiments/second/run.sh QUESTION IMAGES OUT [OPTIONS of relaylab compare]
# QUESTION: model-a, model-b, windows, today. IMAGES: the folder that prepare.sh has made.
set -euo pipefail
cd "$(dirname "$0")/../.."

question=$1 images=$2 out=$3
shift 3
here=experiments/second
all="standard,multi-loss,relay,isolated"
precision=bf16

compare() { # NAME RECIPE DATA SCHEMES, then options
  local name=$1 recipe=$2 data=$3 schemes=$4
  shift 4
  relaylab compare "$recipe" --data "$images/$data" --schemes "$schemes" --out "$out/$name" \
    --precision "$precision" --workers 0 --diagnose-every 0 "$@"
}

case $question in
model-a | model-b)
  rates=optimizer.lr=0.005,0.01,0.02
  compare "$question" $here/$question.toml scenes $all --seeds 0,1,2,3,4 \
    --tune-share 0.5 --tune-hold-out 100 --tune $rates '*.gain=he,quiet' "$@"
  # At equal time instead of equal iterations: in the paper, a step of relay takes 1.1 times as long.
  compare "$question-equal-time" $here/$question.toml scenes relay --seeds 0,1,2,3,4 --set optimizer.iterations=5455 \
    $(python -m experiments.second.arms "$out/$question/comparison.json" relay) "$@"
  compare "$question-weight-1" $here/$question.toml scenes relay --seeds 0,1,2 --set 'plan.auxiliary.aux.weight=1' \
    --tune-share 0.5 --tune-hold-out 100 --tune $rates '*.gain=he,quiet' "$@"
  # Standard BP with a separate rate for the layers below the head: multi-loss with a weight of nearly zero.
  compare "$question-rates" $here/$question.toml scenes multi-loss --seeds 0,1,2 \
    --set 'plan.auxiliary.aux.weight=0.000001' --tune-share 0.5 --tune-hold-out 100 \
    --tune optimizer.lr=0.005,0.01,0.02 'optimizer.segment_lr.aux+primary=1,2,4' "$@"
  ;;
windows)
  python -m experiments.second.windows "$out/recipes"
  windows() { # NAME SCHEME
    compare "$1-$2" "$out/recipes/$1.toml" cifar "$2" --seeds 0,1,2 \
      --tune-share 0.5 --tune optimizer.lr=0.05,0.1,0.2 "${@:3}"
  }
  windows windows-15-1 standard "$@"
  for name in windows-15-1 windows-8-1 windows-4-1 windows-2-2; do windows $name isolated "$@"; done
  for name in windows-15-1 windows-15-3 windows-8-2 windows-4-4 windows-8-1 windows-4-1 windows-2-2 windows-15-2; do
    windows $name relay "$@"
  done
  windows windows-15-1 multi-loss "$@"
  ;;
today)
  rates=optimizer.lr=0.001,0.003,0.01
  compare resnet18 $here/resnet18.toml cifar $all --tune-share 0.5 --tune $rates "$@"
  for name in resnet18-two-branches resnet18-early-branches; do
    compare $name $here/$name.toml cifar relay --tune-share 0.5 --tune $rates "$@"
  done
  precision=32 # the small matrices of the ViT are slow in bfloat16
  compare vit $here/vit.toml cifar $all --tune-share 0.5 --tune $rates "$@"
  for name in resnet18 vit; do # pretrained by standard BP on five classes, fine-tuned on the five others
    compare $name-first $here/$name.toml cifar-first standard --seeds 0 --tune-share 0.5 --tune $rates \
      --set network.num_classes=5 "$@"
    compare $name-tuned $here/$name.toml cifar-last $all --tune-share 0.5 --tune optimizer.lr=0.0003,0.001,0.003 \
      --set network.num_classes=5 optimizer.iterations=936 network.pretrained="$out/$name-first/standard-s0/model.safetensors" "$@"
  done
  ;;
*) echo "unknown question: $question" >&2; exit 2 ;;
esac
