"""How a federation is operated: processes, folders, and the commands' work.

    host/        the aggregator's host: who may join, which jobs wait, the one open port
    node/        a party's node on its own premises: joining, consent, outbound connections
    broker/      a provider's node that answers release requests directly
    party        what every party's folder holds, and the node that is made from it
    joining      how a node and a host come to know each other
    processes    child processes that never outlive their parent

Start with `host.supervisor` or `node.supervisor`.
"""
