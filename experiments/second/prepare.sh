#!/usr/bin/env bash
# Images of the second check, from the archives of MiniPlaces and of CIFAR-10 as JPEG files:
#   experiments/second/prepare.sh "miniplaces72_*.tar.xz" "cifar10_jpeg_*.tar.xz" IMAGES
set -euo pipefail

images=$3
mkdir -p "$images"/{all,scenes,cifar,cifar-first,cifar-last}
for archive in $1; do tar xf "$archive" -C "$images/all"; done
for split in train val; do # every fifth of the 100 scenes
  mkdir -p "$images/scenes/$split"
  ls "$images/all/$split" | awk 'NR % 5 == 1' | while read -r class; do
    cp -r "$images/all/$split/$class" "$images/scenes/$split/"
  done
done
rm -r "$images/all"
mkdir "$images/all"
for archive in $2; do tar xf "$archive" -C "$images/all"; done
cp -r "$images/all/val" "$images/cifar/"
for path in "$images"/all/train/*; do # the first 2,000 training images of each class
  target="$images/cifar/train/$(basename "$path")"
  mkdir -p "$target"
  ls "$path" | awk 'NR <= 2000' | while read -r name; do cp "$path/$name" "$target/"; done
done
rm -r "$images/all"
for split in train val; do # five classes each
  mkdir -p "$images"/cifar-{first,last}/$split
  ls "$images/cifar/$split" | awk 'NR <= 5' | while read -r c; do cp -r "$images/cifar/$split/$c" "$images/cifar-first/$split/"; done
  ls "$images/cifar/$split" | awk 'NR > 5' | while read -r c; do cp -r "$images/cifar/$split/$c" "$images/cifar-last/$split/"; done
done
