"""What runs inside an enclave, and the host's end of it.

    order                  the legal order of calls, as a table (docs/enclave-states.md)
    session                what trainer and aggregator have in common: keys, evidence, checkpoints
    trainer, aggregator    the two sessions of a job; roles makes the one that is asked for
    inference              the session that answers with a finished adapter, under a lease
    intake                 what a trainer takes in: records, and opened models
    masking, private       masked rounds and private rounds inside a session
    protection             what leaves an enclave: encrypted, signed and bound
    main, channel          the life of the process, and the frames that it exchanges with its host
    launcher, host         measure, confine and start it; call it and end it
    durable, checkpoint    an enclave that outlives its process

Every byte that crosses the border is in `protos/fedark/v1/enclave.proto`. Start with `order`, then
`session`.
"""
