"""Stopping a run anywhere and going on in another process, to the same bits.

stopping.py      signals, which wait for a moment at which the run can be saved
marks.py         where the run stood when it could last be saved, all but weights and moments
places.py        the part of it that is Lightning's: where its loops are
logged.py        the part of it that is Lightning's: the numbers it shows again
rollouts.py      the part of it that is data: a rollout in the middle of its minibatches
randomness.py    the part of it that is Python's, numpy's and torch's: generators
writing.py       from the last mark to a checkpoint
going_on.py      from a checkpoint back into the middle of a run
fingerprints.py  whether a run is resumed with the base model and the tokenizer it had
"""
