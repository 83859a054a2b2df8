"""The project's own experiments: what docs/evidence.md asks, as runs of `relaylab train`, and the tables they give.

python -m experiments --size 32px --data TRAIN.tar.xz ... VAL.tar.xz      # train what is missing; may be stopped
python -m experiments --size 64px --at-once 24 --data ...                # the same, all together on one GPU
python -m experiments --size 32px --report FOLDER                        # tables and figures of what is there
"""
