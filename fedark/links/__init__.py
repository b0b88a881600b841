"""How a stage's message travels between the aggregator's side and the parties.

    link        the interface, `Link`, and its body inside one process
    hostlink    the coordinator's way to the aggregator's host
    faults      errors as they cross a link
    flower/     the body over Flower's deployment engine

A link carries bytes that it cannot read. Start with `link.Link`.
"""
