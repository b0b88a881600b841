"""The aggregator's host: who may join, which jobs wait, and the processes that run them. It is
trusted with nothing secret.

- store: nodes, invitations, offers, jobs and answers, in one SQLite file
- folder: the host's folder: keys, certificates, the platform's root
- admission: invitations, requests, approval, revocation
- offers, jobs: a provider's sealed models, and contracts made of them
- catalogue: sealed bundles on their way from provider to customers
- service, front: the host's own routes, and the one port that the world can reach
- work: what is run for a job
- supervisor: everything that runs
"""
