"""What the parties agree on, and what the words of that agreement mean.

    job           the job file: what a person writes
    draft         from a job file to a contract
    contract      the contract: what every party signs and every enclave is bound to
    protection    what `protection.mode` means: who can see which sum
    privacy       what `privacy.mechanism` means: which guarantee it gives

Start with `contract.Contract`. The mathematics behind the last two is in `fedark.secagg` and
`fedark.privacy`.
"""
