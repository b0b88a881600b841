"""How a federation is operated: processes, folders, and the commands' work.

    host/        the aggregator's host: who may join, which jobs wait, the one open port
    node/        a party's node on its own premises: joining, consent, outbound connections
    broker/      a provider's node that answers release requests directly
    party        what every party's folder holds, and the node that is made from it
    joining      how a node and a host come to know each other
    supervisor   named child processes that are kept running, for host and node alike
    processes    one child process that never outlives its parent
    daemon       the process that owns a party and serves it on a unix socket
    pinned       Flower's processes at a host

Start with `host.supervisor` or `node.supervisor`.
"""
