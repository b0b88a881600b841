"""Base models, adapters, data sets, training and evaluation.

Submodules are imported one by one, so that what needs only numpy (`layout`, `server_optimizer`,
`export`, `data`) runs where torch is not loaded. Nothing here opens a network connection except
`sources.resolve("hub:...")`, on the provider's machine.
"""
