"""The transparency log (RFC 9162, section 2.1): what a party decided about enclaves and keys, so
that it cannot be unsaid unseen.

- merkle: the tree, inclusion and consistency proofs, and how they are verified
- entry: what is logged: attestations, releases, refusals; digests and names, nothing else
- head: a signed tree head, by which a party commits to its whole log
- update: a head with proofs for one party in one run
- log: the durable log of one party
- memory: the latest head of every other log that a party has seen; a forked or rewound log shows
  against it
- view: customers of one run tell each other which head they were shown

Merkle proofs alone do not stop a log's owner from showing different logs to different people: the
memory does over time, the views do across one cohort, and a head that anybody kept does in `fedark
log verify --against`.
"""
