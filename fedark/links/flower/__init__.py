"""Flower 1.42 as the transport: SuperLink, ServerApp and ClientApp relay bytes that they cannot
read.

- bundle: the constant app bundle and its pinned hash
- adapter: the only module that touches private Flower APIs
- payload, link: bytes in Flower messages, and the link's body over a grid
- server_app, client_app: the two thin apps that the bundle names
- pinned: the task processes, in which nothing but the pinned bundle runs
- supernode, service, node_daemon: a node's connection, its local gRPC service, the process that
  owns it
- provision, configuration: TLS and node keys, and the files that one process writes for another
- processes, deployment: child processes that never outlive their parent, and all those of one
  machine
"""
