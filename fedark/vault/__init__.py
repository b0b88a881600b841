"""The vault: sealed weights (`bundle`, `opener`, `manifest`), their keys (`weightkey`) and how
those are released (`release`).

An enclave needs `manifest`, `opener`, `weightkey` and `release` alone; `bundle` reads and writes
disks.
"""
