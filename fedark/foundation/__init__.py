"""What every other room stands on. Nothing here knows of contracts, enclaves or Flower.

    errors              what fedark raises on purpose: what happened, what is safe, what to do
    keys                signing (Ed25519) and encryption (HPKE), one label for each purpose
    canonical           canonical CBOR: one byte string for one value
    terms               the base class of everything that people write in TOML and parties sign
    jsontext            JSON that somebody else wrote
    modelfolder         which files of a folder make a base model
    files, database     files and SQLite tables that are there whole or not at all
    logs, metrics       what operators see; redact takes secrets out of it

Start with `errors`, then `keys`.
"""
