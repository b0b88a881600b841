"""The use of a finished adapter.

    model        a base in clear with an adapter: what answers
    leased       a sealed base in an inference enclave, under a lease: what answers too
    asking       a file of prompts in, a file of answers out; a file of records in, figures out
    merging      base and adapter as one folder that `transformers` loads
    engine       what a server answers with: many adapters on a base in clear, or on a leased one
    worker       the one thread that uses an engine, and the bounded queue before it
    models       which adapters a server has, and whose they are
    keys         who may ask
    http         the OpenAI API; `requests`, `replies` and `faults` are its forms
    observed     metrics and the log of requests
    running      the server as a process: socket, signals, end
    trying       a served model is asked a few questions, before and after

Start with `fedark.tuning.adapter.read_adapter` and `model.load`, or with `http.Server`. Nothing
here trains, and nothing of a prompt is kept.
"""
