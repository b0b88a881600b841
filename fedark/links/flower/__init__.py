"""Flower 1.42 as the transport: SuperLink, ServerApp and ClientApp relay bytes that they cannot
read.

- bundle: the constant app bundle and its pinned hash
- adapter: the only module that touches private Flower APIs
- payload, link: bytes in Flower messages, and the link's body over a grid
- server_app, client_app: the two thin apps that the bundle names
- supernode, service: a node's connection, and the local gRPC service of a party's daemon
- provision, configuration: TLS and node keys, and the files that one process writes for another
"""
