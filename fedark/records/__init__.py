"""Records: a customer's own data, one prompt and its answer each.

    reading    `read_records`: the records of a file, checked; labels
    rows       the rows of a CSV, JSON Lines, Parquet or Arrow file, whatever is in it
    template   prompt templates, which name columns
    splits     into a training and a test part, and into customers

Start with `reading.Record` and `reading.read_records`. A file is taken as an attacker could have
made it. A record's content never stands in an error, a log line or a `repr`.
"""
