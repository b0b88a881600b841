"""A measured lower bound on epsilon beside the claimed upper bound: one run of training, with
canaries, on the path that trains.

`claims` audits what a job claims: start there. `bound` turns right guesses into epsilon, `canaries`
makes what is guessed about, `one_run` trains and guesses, `rounds` is the trainer's own round,
`jobs` reads a job file, `embedded` is a task small enough for seconds.

What an audit cannot see: noise that is a little short (one share of eight missing), or batches that
are not Poisson samples. For these there are direct tests, `fedark.privacy.noise.check_variance` and
`fedark.privacy.sampling.sampler_problems`. A bound below the claim is thus weak evidence for it,
and a bound above the claim is proof against it, but for the stated confidence.
"""
