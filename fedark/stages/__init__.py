"""The protocol: what the parties say to each other in a job, stage by stage.

    coordinator           the aggregator's side: seven stages, in order
    node                  what every party's node does with a request
    settings              what a node knows before any job, and compares a contract with
    provider, customer    the stages of a provider and of a customer
    aggregator            the host of the aggregator enclave
    consent, rules        what an operator agreed to; contracts covered by a standing rule
    budget                what a customer's node charges to its privacy ledger
    parties               who takes part, who answered, who was passed over; the coordinator's state
    loading               what a customer brings into its trainer enclave
    shown_log             what a provider's log must show
    runs                  what of a run must outlive a killed node

Start with `coordinator`, then `node`.
"""
