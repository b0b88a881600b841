"""A node on its operator's own premises: joins a host, asks its operator, and makes outbound
connections only.

- folder: joining, and what a node's folder holds besides that of every party
- hostclient: the node's calls to its host's own routes
- hostsync: fetches contracts and sealed bundles, tells the host what the operator said
- doctor: what is wrong with this machine, and how to mend it
- queries: what its operator asks of it
- serve: what its daemon serves
- supervisor: the processes of a running node
"""
