"""All measurements that require a GPU, in one script with a time limit.

    python -m benchmarks.gpu --out DIR [--minutes 8] [--tiny] [--only ENTRY ...] [--cifar DATA] [--places DATA]

| entry | measurement                                                                                  | module     |
| ----- | -------------------------------------------------------------------------------------------- | ---------- |
| A1    | time and memory of one training step by every method, at 224 pixels, on a third of the card  | `steps`    |
| A2    | the largest batch that fits: standard BP, checkpointing, early release with 2 and 4 branches | `largest`  |
| A3    | the trainer against a bare loop on images in memory; decoding workers against it             | `training` |
| A1c   | the step of A1 with `torch.compile`, in a child process with a time limit                    | `compiled` |
| A4    | the tests marked `gpu`                                                                       | `commands` |
| B1    | the second check's windows of ResNet-32 on CIFAR-10, at the published size                   | `commands` |
| B2    | the second check's models A and B, at the paper's width on crops of 64 pixels                | `commands` |

Entries run in this order. No entry starts after the time limit. DIR/results.json is rewritten after every result, so an
interrupted run keeps its results; DIR/log.txt has the output of child processes. A contender that runs out of memory,
fails, or computes gradients other than it claims is recorded with the reason, and the others continue.

Without a GPU only `--tiny` is allowed: all entries run with small networks on small images, to test the script.
"""
