"""The project's own experiments: what docs/evidence.md asks, as runs of `relaylab train`, and the tables they give.

python -m experiments --size cores --data TRAIN.tar.xz ... VAL.tar.xz     # train what is missing; may be stopped
python -m experiments --size cores --report FOLDER                       # tables and figures of what is there
"""
