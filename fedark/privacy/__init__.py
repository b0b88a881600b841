"""Differential privacy: mechanisms on the grid of a masked sum, their accounting, and the ledger of
what was spent.

Nothing here trains and nothing here federates: `mechanisms` says how much noise a contract needs
and what it guarantees, `noise` and `sampling` draw it and the batches, `accounting` turns spends
into epsilon, `ledger` keeps them for good. docs/privacy.md says what is protected, from whom, and
what is not.
"""
