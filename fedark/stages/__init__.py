"""The protocol: what the parties say to each other in a job, stage by stage.

    coordinator           the aggregator's side: seven stages, in order
    node                  what every party's node does with a request
    provider, customer    the stages of a provider and of a customer
    aggregator            the host of the aggregator enclave
    consent, rules        what an operator agreed to, and which contracts are covered by a standing rule
    budget                what a customer's node charges to its privacy ledger
    runs, progress        what must outlive a killed process

Start with `coordinator`, then `node`.
"""
