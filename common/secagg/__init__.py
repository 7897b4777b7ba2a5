"""Secure aggregation: the coordinator learns the sum of the sites' updates, and nothing about any one of them.

Pure functions over bytes and arrays; a state machine for a site and one for the aggregator. Nothing here touches the
network or a disk. `docs/secure-aggregation.md` says what is promised, and on what it rests.

ring         numbers as elements of Z/2^32 and Z/2^64
masks        key streams that are added to a vector, and taken away again
shares       Shamir's secret sharing
keys         key encapsulation, key derivation, sealed boxes
roster       signed statements: run keys, the roster, the context of a sum, an upload
skellam      noise, drawn exactly from a key stream
calibration  how much of it keeps a promise to each site, and the scale that leaves room for it
site         a site's part, step by step
upload       the tensors in which a site gives to a sum
model        the model on its way down, sealed to the roster
aggregator   the aggregator's part
"""

#: A sum of fewer sites would show each of two others to the third.
LEAST_SITES = 3
#: The graph is complete: a site shares a secret with each other one.
MOST_SITES = 100
