"""The use of a finished adapter.

    adapter      the folder that a job left, read as an attacker could have made it
    model        a base in clear with an adapter: what answers
    leased       a sealed base in an inference enclave, under a lease: what answers too
    asking       a file of prompts in, a file of answers out; a file of records in, figures out
    merging      base and adapter as one folder that `transformers` loads

Start with `adapter.read_adapter` and `model.load`. Nothing here trains, and nothing of a prompt is
kept.
"""
